# SPDX-License-Identifier: BSD-3-Clause
"""Layers, constants and what has to hold for the tests of `passes.binary_folding`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from pyconvbn import functional as F
from pyconvbn import fx, nn, passes
from pyconvbn.freeze_report import FreezeRow

IC, OC = 4, 6
#: kind -> shape of the input
INPUTS = {
    "linear": (5, IC), "conv1d": (2, IC, 9), "conv2d": (2, IC, 6, 5), "conv3d": (1, IC, 4, 5, 3),
    "conv_transpose1d": (2, IC, 7), "conv_transpose2d": (2, IC, 4, 5), "conv_transpose3d": (1, IC, 3, 2, 4),
}  # fmt: skip
ND = {kind: len(shape) - 2 for kind, shape in INPUTS.items()}
CONVS = [kind for kind in INPUTS if kind != "linear"]
EPS = {np.float16: 2e-3, np.float32: 1e-6, np.float64: 1e-14}


class Layer:
    """One layer of random weights, as a graph node and as a float64 reference."""

    def __init__(self, kind: str, *, bias: bool = True, groups: int = 1, dtype: Any = np.float64) -> None:
        rng = np.random.default_rng(7)
        self.kind, self.groups, self.dtype = kind, 1 if kind == "linear" else groups, np.dtype(dtype)
        transposed = kind.startswith("conv_transpose")
        shape = (IC, OC // self.groups) if transposed else (OC, IC // self.groups)
        shape += (3,) * ND[kind]
        self.weight = rng.normal(size=shape).astype(dtype)
        self.bias = rng.normal(size=OC).astype(dtype) if bias else None
        self.x = rng.normal(size=INPUTS[kind]).astype(dtype)

    def __call__(self, x: Any, weight: Any, bias: Any) -> Any:
        more = {} if self.kind == "linear" else {"groups": self.groups, "padding": 1}
        return getattr(F, self.kind)(x, weight, bias, **more)

    def reference(self) -> Any:
        x, w = self.x.astype(np.float64), self.weight.astype(np.float64)
        return self(x, w, None if self.bias is None else self.bias.astype(np.float64))

    def graph(self, apply: Callable[[Any], Any], *, shapes: bool = True) -> Any:
        gm = fx.symbolic_trace(lambda x: apply(self(x, self.weight, self.bias)))
        if shapes:
            fx.shape_prop(gm, self.x)
        return gm


def layer_nodes(gm: Any) -> list[Any]:
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def folds(layer: Layer, apply: Callable[[Any], Any], wanted: Callable[[Any], Any] | None = None, count: int = 1) -> Any:
    """Folds, leaving the layer alone, with the float64 values of `wanted` (the same arithmetic on arrays)."""
    gm = layer.graph(apply)
    rows: list[FreezeRow] = []
    assert passes.binary_folding(gm, report=rows) == count
    gm.graph.lint()
    assert [(row.step, row.outcome, row.reason) for row in rows] == [("binary", "done", "OK")] * count
    (node,) = layer_nodes(gm)
    assert {row.into for row in rows} == {node.name}
    reference = np.asarray((wanted or apply)(layer.reference()))
    result = gm(layer.x)
    assert result.dtype == layer.dtype and result.shape == reference.shape
    tolerance = EPS[layer.dtype.type] * 60 * max(1.0, float(np.abs(reference).max()))
    np.testing.assert_allclose(result, reference, rtol=0, atol=tolerance)
    kept = sum(name.startswith("_frozen_param") for name in vars(gm))
    read = {n.target for n in gm.graph.nodes if n.op == "get_attr" and n.target.startswith("_frozen_param")}
    assert kept == len(read)
    for name in read:
        made = getattr(gm, name)
        assert made.dtype == layer.dtype and made.flags.c_contiguous and not made.flags.writeable
    before = fx.GraphModule(gm, gm.graph).code
    assert passes.binary_folding(gm) == 0
    assert gm.code == before
    return gm


def stays(gm: Any, reason: str, x: Any = None, blocking: str | None = None) -> FreezeRow:
    """Changes nothing, for this reason."""
    before, code = gm.code, [n.name for n in gm.graph.nodes]
    rows: list[FreezeRow] = []
    wanted = None if x is None else gm(x)
    assert passes.binary_folding(gm, report=rows) == 0
    gm.graph.lint()
    assert gm.code == before and [n.name for n in gm.graph.nodes] == code
    assert not any(name.startswith("_frozen_param") for name in vars(gm))
    (row,) = [row for row in rows if row.outcome == "kept"]
    assert (row.step, row.reason) == ("binary", reason), row
    assert row.hint and row.into is None
    if blocking is not None:
        assert row.blocking == blocking
    if x is not None:
        np.testing.assert_array_equal(gm(x), wanted)
    return row


def constants(kind: str, dtype: Any) -> dict[str, Any]:
    """Everything that folds, by shape."""
    rng = np.random.default_rng(3)
    c = rng.choice([-1, 1], OC) * rng.uniform(0.5, 2.0, OC)
    one = float(rng.uniform(0.5, 2.0))
    shapes: dict[str, Any] = {
        "int": 3, "float": one, "bool": True, "numpy scalar": np.dtype(dtype).type(one),
        "0-d": np.array(one, dtype), "[1]": np.array([one], dtype),
    }
    if kind == "linear":
        arrays = {"[out]": c, "[1, out]": c[None], "[1, 1]": np.array([[one]])}
    else:
        spatial = (1,) * ND[kind]
        arrays = {"[oc, 1...]": c.reshape(OC, *spatial), "[1, oc, 1...]": c.reshape(1, OC, *spatial),
                  "[1, 1, 1...]": np.full((1, 1, *spatial), one), "[1...]": np.full(spatial, one)}
    return {**shapes, **{name: array.astype(dtype) for name, array in arrays.items()}}


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "y + c": lambda y, c: y + c,
    "y - c": lambda y, c: y - c,
    "y * c": lambda y, c: y * c,
    "y / c": lambda y, c: y / c,
    "c + y": lambda y, c: operator.add(c, y),
    "c - y": lambda y, c: operator.sub(c, y),
    "c * y": lambda y, c: operator.mul(c, y),
}


def graph_call(operation: str, c: Any) -> Callable[[Any], Any]:
    """The operation on a Proxy: NumPy's scalars and arrays on the left would try to compute themselves."""
    symbol = operation.replace("y", "").replace("c", "").strip()
    function = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[symbol]
    left = operation.startswith("c")

    def apply(y: Any) -> Any:
        return y.tracer.create_proxy("call_function", function, (c, y) if left else (y, c), {})

    return apply


def times(layer: Any, weight: Any, constant: Any) -> Any:
    return fx.symbolic_trace(lambda x: layer(x, weight) * constant)
