# SPDX-License-Identifier: BSD-3-Clause
"""`passes.binary_folding`: what stays, with its reason."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyconvbn import functional as F
from pyconvbn import fx, nn, passes
from pyconvbn.freeze_report import FreezeRow
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from binary_util import (  # noqa: E402
    CONVS, OC, OPERATIONS, Layer, constants, folds, graph_call, stays, times,
)


# ---- what stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONVS)
def test_shapes_that_do_not_fit_a_convolution(kind: str) -> None:
    layer = Layer(kind)
    spatial = layer.reference().shape[2:]
    bad: dict[tuple[int, ...], str] = {
        spatial: "SHAPE_MISMATCH", (OC, *spatial): "SHAPE_MISMATCH", (2, OC, *spatial): "SHAPE_MISMATCH",
        (1, 1, *spatial): "SHAPE_MISMATCH", (1, 1, OC, *(1,) * len(spatial)): "RANK_CHANGES",
        (1, 1, 1, *(1,) * len(spatial)): "RANK_CHANGES", (3, 1, *(1,) * len(spatial)): "SHAPE_MISMATCH",
        (spatial[-1],): "SHAPE_MISMATCH",
    }  # fmt: skip
    for shape, reason in bad.items():
        if shape == (2, OC, *spatial) and layer.x.shape[0] != 2:
            continue
        c = np.full(shape, 2.0)
        for operation in ("y * c", "y + c"):
            try:
                layer.reference() * c
            except ValueError:
                continue  # the call raises
            stays(layer.graph(graph_call(operation, c)), reason, layer.x)
            stays(layer.graph(graph_call(operation, c), shapes=False), reason, layer.x)


def test_a_single_channel_that_would_be_repeated() -> None:
    w = np.ones((1, 2, 3))
    gm = fx.symbolic_trace(lambda x: F.conv1d(x, w) * np.ones((4, 1)))
    stays(gm, "SHAPE_MISMATCH", np.ones((2, 2, 5)))


def test_shapes_beside_linear() -> None:
    layer = Layer("linear")
    for shape, reason in {(OC, 1): "SHAPE_MISMATCH", (5, 1): "SHAPE_MISMATCH", (5, OC): "SHAPE_MISMATCH",
                          (1, 1, OC): "RANK_CHANGES", (2, 1, 1): "RANK_CHANGES"}.items():
        c = np.full(shape, 2.0)
        if shape != (OC, 1):
            stays(layer.graph(graph_call("y + c", c)), reason, layer.x)
        stays(layer.graph(graph_call("y + c", c), shapes=False), reason)


def test_linear_of_any_rank() -> None:
    """What broadcasts along the last axis folds whatever the rank; two axes need to know that there are two."""
    rng = np.random.default_rng(0)
    w, c = rng.normal(size=(3, 4)), rng.normal(size=3)
    for constant in (2.0, np.array(2.0), np.array([2.0]), c):
        gm = times(F.linear, w, constant)
        assert passes.binary_folding(gm) == 1
        for shape in ((4,), (5, 4), (2, 5, 4), (3, 3, 4)):
            x = rng.normal(size=shape)
            np.testing.assert_allclose(gm(x), (x @ w.T) * constant, atol=1e-12)
    for constant in (c[None], np.array([[2.0]])):
        gm = times(F.linear, w, constant)
        stays(gm, "SHAPE_UNKNOWN", blocking="linear")
        fx.shape_prop(gm, np.ones(4))
        stays(gm, "RANK_CHANGES", np.ones(4))


def test_unbatched_convolutions() -> None:
    """Known to have no batch axis: what needs one stays, the rest folds."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(3, 2, 3)), rng.normal(size=(2, 6))
    for constant, reason in ((np.full((1, 3, 1), 2.0), "RANK_CHANGES"), (np.full((1, 1, 1), 2.0), "RANK_CHANGES")):
        gm = times(F.conv1d, w, constant)
        fx.shape_prop(gm, x)
        stays(gm, reason, x)
    for constant in (np.array([[1.0], [2.0], [3.0]]), 2.0):
        gm = times(F.conv1d, w, constant)
        fx.shape_prop(gm, x)
        wanted = gm(x)
        assert passes.binary_folding(gm) == 1
        np.testing.assert_allclose(gm(x), wanted, atol=1e-13)


@pytest.mark.parametrize("name", ["c / y", "floor", "trunc"])
def test_not_linear(name: str) -> None:
    layer = Layer("conv2d")
    c = constants("conv2d", np.float64)["[oc, 1...]"]
    calls: dict[str, Callable[[Any], Any]] = {
        "c / y": lambda y: aten.div.Tensor(c, y),
        "floor": lambda y: aten.div.Tensor_mode(y, c, rounding_mode="floor"),
        "trunc": lambda y: aten.div.Tensor_mode(y, c, rounding_mode="trunc"),
    }
    stays(layer.graph(calls[name]), "NOT_LINEAR", layer.x)
    stays(layer.graph(graph_call("c / y", 2.0)), "NOT_LINEAR", layer.x)


@pytest.mark.parametrize("call", [
    lambda y: aten.add_.Tensor(y, 2.0), lambda y: aten.mul_.Scalar(y, 2), lambda y: aten.div_.Tensor(y, 2.0),
    lambda y: aten.sub_.Tensor(y, 2.0), lambda y: y.tracer.create_proxy("call_function", operator.iadd, (y, 2.0), {}),
    lambda y: y.tracer.create_proxy("call_function", operator.itruediv, (y, 2.0), {}),
    lambda y: y.tracer.create_proxy("call_method", "add_", (y, 2.0), {}),
], ids=["add_", "mul_", "div_", "sub_", "iadd", "itruediv", "method"])  # fmt: skip
def test_in_place(call: Any) -> None:
    stays(Layer("conv2d").graph(call, shapes=False), "IN_PLACE")


def test_calls_that_would_raise() -> None:
    layer = Layer("conv2d")
    for call in (lambda y: aten.sub.Tensor(2.0, y), lambda y: F.add(y, 2.0), lambda y: y * "text",
                 lambda y: y.tracer.create_proxy("call_method", "add", (y, 2.0), {}),
                 lambda y: y * np.array(["a"])):
        stays(layer.graph(call, shapes=False), "UNSUPPORTED")
    stays(layer.graph(lambda y: F.mul(y, np.float32(2)), shapes=False), "DTYPE")
    stays(layer.graph(lambda y: y * 1j), "DTYPE_CHANGES")


def test_values_that_are_not_finite() -> None:
    layer = Layer("conv2d")
    for c in (np.inf, -np.inf, np.nan, np.array([1, 2, 3, np.nan, 5, 6.0]).reshape(6, 1, 1)):
        for operation in OPERATIONS:
            stays(layer.graph(graph_call(operation, c)), "NONFINITE")
    stays(layer.graph(graph_call("y / c", 0)), "NONFINITE")
    stays(layer.graph(graph_call("y / c", np.array([0, 1, 1, 1, 1, 1.0]).reshape(6, 1, 1))), "NONFINITE")
    small = Layer("conv2d", dtype=np.float16)
    stays(small.graph(graph_call("y * c", 1e5)), "NONFINITE")
    stays(small.graph(graph_call("y * c", 6e4)), "NONFINITE")  # a number of float16, but no weight times it
    row = stays(small.graph(graph_call("y * c", 1e-7)), "NONFINITE")
    assert "float16" in row.hint
    weights = Layer("conv2d")
    weights.weight[0, 0, 0, 0] = np.inf
    stays(weights.graph(graph_call("y * c", 2.0)), "NONFINITE")


def test_zero() -> None:
    layer = Layer("conv2d")
    folds(layer, lambda y: y * 0)
    folds(layer, lambda y: y + 0)
    c = np.array([0, 1, 2, 3, 4, 5.0]).reshape(6, 1, 1)
    folds(layer, lambda y: y * c)


def test_the_layer_has_other_users() -> None:
    layer = Layer("conv2d")
    row = stays(layer.graph(lambda y: (y * 2) + F.relu(y)), "MULTI_USER", layer.x)
    assert row.blocking == "relu"
    row = stays(fx.symbolic_trace(lambda x: (lambda y: (y * 2, y))(layer(x, layer.weight, None))), "MULTI_USER")
    assert row.blocking == "output"
    gm = layer.graph(lambda y: (y * 2) + (y + 1))
    rows: list[FreezeRow] = []
    assert passes.binary_folding(gm, report=rows) == 0
    assert [(row.node, row.reason) for row in rows] == [("mul", "MULTI_USER"), ("add", "MULTI_USER")]


def test_no_row_where_nobody_expects_a_fold() -> None:
    w = np.ones((2, 2, 1))
    gm = fx.symbolic_trace(lambda x: F.relu(F.conv1d(x, w) + x) * 2 + F.conv1d(x, w) * F.conv1d(x, w))
    rows: list[FreezeRow] = []
    assert passes.binary_folding(gm, report=rows) == 0
    assert rows == []


def test_behind_what_stayed() -> None:
    """The first of a chain stays: so do the others, and each says which node it stands behind."""
    layer = Layer("conv2d", dtype=np.float32)
    gm = layer.graph(lambda y: y * np.float64(2) + 1)
    rows: list[FreezeRow] = []
    assert passes.binary_folding(gm, report=rows) == 0
    assert [(row.node, row.reason, row.blocking) for row in rows] == [
        ("mul", "DTYPE_CHANGES", None), ("add", "NO_LAYER", "mul")]
    bn = [np.ones(OC, np.float32)] * 2
    row = stays(layer.graph(lambda y: F.batch_norm(y, *bn) * 2), "NO_LAYER")
    assert row.blocking == "batch_norm"


def test_shared_weights() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 2, 3))
    x = rng.normal(size=(1, 2, 9))
    gm = fx.symbolic_trace(lambda x: F.conv1d(x, w) * 2 + F.relu(F.conv1d(x, w)))
    assert stays(gm, "WEIGHT_SHARED", x).node == "mul"
    views = w[::-1]  # other elements of the same memory
    gm = fx.symbolic_trace(lambda x: F.conv1d(x, w) * 2 + F.relu(F.conv1d(x, views)))
    stays(gm, "WEIGHT_SHARED", x)
    gm = fx.symbolic_trace(lambda x: (F.conv1d(x, w) * 2, w))
    stays(gm, "ALIASES_OUTPUT")
    graph = fx.Graph()  # the weight itself as an argument, and that of a module
    node = graph.call_function(F.conv1d, (graph.placeholder("x"), w))
    graph.output(graph.call_function(operator.mul, (node, 2.0)))
    assert passes.binary_folding(fx.GraphModule({}, graph)) == 1
    net = nn.Sequential(nn.Conv1d(2, 2, 3, bias=False, dtype=np.float64)).eval()
    net[0].weight = nn.Parameter(w)
    gm = fx.symbolic_trace(lambda x: F.conv1d(x, w) * 2)
    gm.add_module("net", net)
    with gm.graph.inserting_before(gm.graph.output_node()):
        output = gm.graph.output_node()
        output.args = ((output.args[0], gm.graph.call_module("net.0", (next(iter(gm.graph.nodes)),))),)
    stays(gm, "WEIGHT_SHARED", blocking="net_0")


def test_a_module_called_twice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1, dtype=np.float64)

        def forward(self, x: Any) -> Any:
            return self.conv(self.conv(x) * 2) * 3

    gm = fx.symbolic_trace(Net().eval())
    x = np.ones((1, 2, 3))
    wanted = gm(x)
    rows: list[FreezeRow] = []
    assert passes.binary_folding(gm, report=rows) == 0
    assert [(row.node, row.reason, row.blocking) for row in rows] == [
        ("mul", "WEIGHT_SHARED", "conv_1"), ("mul_1", "WEIGHT_SHARED", "conv")]
    np.testing.assert_array_equal(gm(x), wanted)


def test_what_the_graph_writes_or_returns() -> None:
    rng = np.random.default_rng(0)
    w, b, c = rng.normal(size=(2, 2, 3)), rng.normal(size=2), rng.normal(size=(2, 1))

    def write(array: Any) -> Any:
        def call(x: Any) -> Any:
            y = F.conv1d(x, w, b) * c
            written = x.tracer.create_proxy("call_function", aten.add_.Scalar, (x.tracer.create_arg(array), 0), {})
            return y, written.sum()

        return call

    for array in (w, b, c, c[:1]):
        assert stays(fx.symbolic_trace(write(array)), "MUTATED").blocking == "add__scalar"
    stays(fx.symbolic_trace(lambda x: (F.conv1d(x, w, b) * c, c)), "ALIASES_OUTPUT")
    stays(fx.symbolic_trace(lambda x: (F.conv1d(x, w, b) * c, b)), "ALIASES_OUTPUT")
    assert passes.binary_folding(fx.symbolic_trace(lambda x: (F.conv1d(x, w, b) * c, x))) == 1
    gm = fx.symbolic_trace(lambda x, w: F.conv1d(x, w) * 2)
    assert stays(gm, "NONCONST").blocking == "w"


def test_layers_of_mixed_dtypes() -> None:
    w, b = np.ones((2, 2, 1), np.float32), np.ones(2)
    assert stays(fx.symbolic_trace(lambda x: F.conv1d(x, w, b) * 2), "DTYPE").blocking == "_tensor_constant1"
