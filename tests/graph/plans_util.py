# SPDX-License-Identifier: BSD-3-Clause
"""Small graphs for the tests of prepared layers, and what each run of the pass has to leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyconvbn import _core, fx, nn
from pyconvbn._lower import lower_modules
from pyconvbn._pass_plans import prepare_layers
from pyconvbn.freeze_report import FreezeRow

SHAPE = (2, 4, 5, 6)


class Net(nn.Module):
    """A function of the input and of one layer, or several."""

    def __init__(self, function: Callable[..., Any], *layers: Any, inputs: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function
        self.inputs = inputs

    def forward(self, x: Any, y: Any = None) -> Any:
        return self.function(*([x, y][: self.inputs]), *self.layers)


def traced(net: Any, *shapes: Any) -> Any:
    """Its graph of operators."""
    gm = fx.symbolic_trace(net.eval())
    lower_modules(gm)
    if shapes:
        fx.shape_prop(gm, *shapes)
    return gm


def prepared(gm: Any) -> list[FreezeRow]:
    rows: list[FreezeRow] = []
    names = [node.name for node in gm.graph.nodes]
    changed = prepare_layers(gm, report=rows)
    gm.graph.lint()
    assert changed == sum(row.outcome == "done" for row in rows)
    for row in rows:
        assert row.step == "plan" and row.node in names
        assert (row.outcome == "done") == (row.reason == "OK") == (row.into is not None)
        assert row.outcome == "done" or row.hint
        assert row.into is None or isinstance(gm.get_submodule(row.into), nn.FrozenLayer)
    assert [names.index(row.node) for row in rows] == sorted(names.index(row.node) for row in rows)
    text = str(gm.graph)
    assert prepare_layers(gm) == 0 and str(gm.graph) == text
    return rows


def calls(gm: Any) -> list[str]:
    """What the graph does, constants and inputs left out."""
    return [
        "layer" if node.op == "call_module" else _core.op_lookup(node.target) if node.op == "call_function" else node.op
        for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")
    ]


def near(actual: Any, reference: Any, dtype: Any = np.float32) -> None:
    """As exact as a few operations of that dtype can be."""
    reference = np.asarray(reference)
    assert actual.dtype == dtype and actual.shape == reference.shape
    scale = max(1.0, float(np.abs(reference).max(initial=0)))
    np.testing.assert_allclose(actual, reference, rtol=0, atol=64 * float(np.finfo(dtype).eps) * scale)
