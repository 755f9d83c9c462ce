# SPDX-License-Identifier: BSD-3-Clause
"""The prepared operator. ``Plan`` itself is a C type; here are the record it takes and how it shows itself."""

from __future__ import annotations

import html
from typing import Any, NamedTuple

from ._core import Plan
from ._modules import read_bn, read_conv

__all__ = ["BatchNormParams", "Plan", "PlanExplanation"]


class BatchNormParams(NamedTuple):
    """BatchNorm in eval mode as plain arrays, each 1-D of length out_channels and of any float dtype.

    ``weight`` None is 1, ``bias`` None is 0.

    >>> import numpy as np, pyconvbn
    >>> one = np.ones(4, np.float32)
    >>> bn = pyconvbn.BatchNormParams(one, None, one, one)
    >>> pyconvbn.Plan(np.ones((4, 3), np.float32), bn=bn)(np.ones((1, 3), np.float32)).shape
    (1, 4)
    """

    weight: Any | None
    bias: Any | None
    running_mean: Any
    running_var: Any
    eps: float = 1e-5


def _plan_arguments(conv: Any, bn: Any | None) -> dict[str, Any]:
    """Keyword arguments of Plan for a pair of modules (called by Plan.from_modules)."""
    record = read_conv(conv)
    arguments: dict[str, Any] = {"weight": record.weight, "bias": record.bias}
    if bn is not None:
        arguments["bn"] = BatchNormParams(*read_bn(bn))
    if record.nd:
        arguments.update(
            stride=record.stride, padding=record.padding, padding_mode=record.padding_mode,
            dilation=record.dilation, groups=record.groups, transposed=record.transposed,
        )
        if record.transposed:
            arguments["output_padding"] = record.output_padding
    return arguments


class PlanExplanation(dict[str, Any]):
    """What a plan does for one input shape: a dict that prints as a short table.

    Keys: ``isa``, ``algorithm``, ``tile``, ``dtype``, ``precision``, ``tuned``, ``seconds`` (of one image, for each
    algorithm that ``tune=True`` measured), ``copies`` (copies of the input that a call makes, with their reason),
    ``candidates`` (every algorithm in order with ``"chosen"``, or why it cannot serve, or how its estimated or measured
    time compares with that of the chosen one).
    """

    def __str__(self) -> str:
        lines = [
            f"{self['algorithm']} on {self['isa']} ({self['dtype']}, precision {self['precision']})",
            f"  tile: {self['tile']}",
        ]
        if self["algorithm"] in self["seconds"]:
            lines.append(f"  tuned: measured {self['seconds'][self['algorithm']] * 1e6:.4g} us")
        lines += [f"  copy: {copy}" for copy in self["copies"]]
        width = max((len(name) for name, _ in self["candidates"]), default=0)
        lines += [f"  {name:<{width}}  {reason}" for name, reason in self["candidates"]]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td style='text-align:left'>{html.escape(reason)}</td></tr>"
            for name, reason in self["candidates"]
        )
        return (
            f"<div><b>{html.escape(self['algorithm'])}</b> on {html.escape(self['isa'])} "
            f"({html.escape(self['dtype'])}, precision {html.escape(self['precision'])}), "
            f"{html.escape(self['tile'])}<table>{rows}</table></div>"
        )


def _explanation(facts: dict[str, Any]) -> PlanExplanation:
    return PlanExplanation(facts)


def _plan_html(plan: Plan) -> str:
    """Notebook view of a plan: its geometry as a two-column table."""
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for name, value in {"dtype": plan.dtype.name, **plan.params}.items()
    )
    return f"<div><b>pyconvbn.Plan</b><table>{rows}</table></div>"
