# SPDX-License-Identifier: BSD-3-Clause
"""Switches of the automatic pipelines. Plain module attributes: assign to change, read at each use."""

from __future__ import annotations

__all__ = ["efficient_conv_bn_eval_fx_passes", "freezing", "freezing_discard_parameters"]

#: Whether the automatic pre-grad pipeline applies the efficient ConvBN rewriting.
efficient_conv_bn_eval_fx_passes: bool = False

#: Whether the automatic pipeline runs for a graph about to be frozen (it then leaves BatchNorm to freezing).
freezing: bool = False

#: Default of ``freeze(discard_parameters=None)``.
freezing_discard_parameters: bool = False
