# SPDX-License-Identifier: BSD-3-Clause
"""A graph with a node of every kind."""

from __future__ import annotations

import operator

import numpy as np

from pyconvbn import fx


def sample() -> fx.Graph:
    g = fx.Graph()
    x, y = g.placeholder("x"), g.placeholder("y", type_expr=int, default_value=3)
    w = g.get_attr("layer.weight")
    add = g.call_function(operator.add, (x, [y, {"k": w}]), {"a": 2})
    relu = g.call_method("relu", (add,), type_expr=np.ndarray)
    conv = g.call_module("layer.0.conv", (relu,))
    g.output((conv, {"aux": add}))
    return g
