# SPDX-License-Identifier: BSD-3-Clause
"""`passes.binary_folding`: which arithmetic folds into which layer, and with which values."""

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
    CONVS, INPUTS, OC, OPERATIONS, Layer, constants, folds, graph_call, layer_nodes, stays, times,
)


def conv1d_then(weight: Any, bias: Any, apply: Callable[[Any], Any]) -> Any:
    return fx.symbolic_trace(lambda x: apply(F.conv1d(x, weight, bias)))


# ---- what folds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_operation_and_shape(kind: str, operation: str, bias: bool) -> None:
    layer = Layer(kind, bias=bias)
    for c in constants(kind, np.float64).values():
        folds(layer, graph_call(operation, c), lambda y, c=c: OPERATIONS[operation](y, c))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", CONVS)
def test_channels_of_groups(kind: str, groups: int) -> None:
    """The channel of a transposed weight's element depends on its group."""
    layer = Layer(kind, groups=groups)
    c = constants(kind, np.float64)["[1, oc, 1...]"]
    for operation in ("y * c", "y / c", "c - y"):
        folds(layer, graph_call(operation, c), lambda y, o=operation: OPERATIONS[o](y, c))


@pytest.mark.parametrize("kind", ["conv_transpose2d", "conv2d"])
def test_depthwise(kind: str) -> None:
    rng = np.random.default_rng(1)
    w, c = rng.normal(size=(4, 1, 3, 3)), rng.normal(size=(4, 1, 1))
    gm = fx.symbolic_trace(lambda x: getattr(F, kind)(x, w, groups=4) * c)
    x = rng.normal(size=(2, 4, 5, 5))
    wanted = gm(x)
    assert passes.binary_folding(gm) == 1
    np.testing.assert_allclose(gm(x), wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose1d", "linear"])
def test_dtypes_of_the_layer(kind: str, dtype: Any) -> None:
    layer = Layer(kind, dtype=dtype)
    for c in constants(kind, dtype).values():
        for operation in ("y + c", "y * c", "c - y", "y / c"):
            exact = c if isinstance(c, bool | int) else np.float64(np.asarray(c).astype(dtype))
            folds(layer, graph_call(operation, c), lambda y, c=exact, o=operation: OPERATIONS[o](y, c))


def _promotes(dtype: Any, c: Any) -> bool:
    """NumPy 2's verdict, from dtypes alone: NumPy 1 looks at values."""
    return np.promote_types(dtype, np.asarray(c).dtype) != np.dtype(dtype)


@pytest.mark.parametrize("of_constant", ["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_promotion(dtype: Any, of_constant: str) -> None:
    layer = Layer("conv1d", dtype=dtype)
    for c in (np.ones((OC, 1), of_constant), np.ones((), of_constant), np.dtype(of_constant).type(1)):
        for function in (operator.add, operator.mul, operator.sub, operator.truediv):
            apply = lambda y, c=c, f=function: y.tracer.create_proxy("call_function", f, (y, c), {})  # noqa: E731
            if _promotes(dtype, c):
                stays(layer.graph(apply), "DTYPE_CHANGES")
            else:
                folds(layer, apply, lambda y, c=c, f=function: f(y, np.float64(c)))


@pytest.mark.parametrize("of_constant", ["b1", "i1", "i4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_promotion_of_aten(dtype: Any, of_constant: str) -> None:
    """Beside floating numbers integers take their dtype, as in torch; what happens is what running the graph gives."""
    layer = Layer("conv1d", dtype=dtype)
    c = np.full((OC, 1), 1, of_constant)
    for call in (lambda y: aten.add.Tensor(y, c), lambda y: aten.sub.Tensor(c, y), lambda y: aten.mul.Tensor(y, c),
                 lambda y: aten.div.Tensor(y, c), lambda y: aten.rsub.Tensor(y, c)):
        gm = layer.graph(call)
        if gm(layer.x).dtype != dtype:
            stays(gm, "DTYPE_CHANGES", layer.x)
        else:
            folds(layer, call, lambda y, f=call: f(y))


def test_a_numpy_float64_is_a_python_number_to_aten_only() -> None:
    layer = Layer("conv2d", dtype=np.float32)
    c = np.float64(0.1)
    stays(layer.graph(graph_call("y * c", c)), "DTYPE_CHANGES")
    folds(layer, lambda y: aten.mul.Tensor(y, c), lambda y: y * np.float64(np.float32(0.1)))


ALPHA: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "add": (lambda y, c: aten.add.Tensor(y, c, alpha=3), lambda y, c: y + 3 * c),
    "add, float": (lambda y, c: aten.add.Tensor(y, c, alpha=-0.5), lambda y, c: y - 0.5 * c),
    "add, constant first": (lambda y, c: aten.add.Tensor(c, y, alpha=3), lambda y, c: c + 3 * y),
    "sub": (lambda y, c: aten.sub.Tensor(y, c, alpha=3), lambda y, c: y - 3 * c),
    "sub, constant first": (lambda y, c: aten.sub.Tensor(c, y, alpha=3), lambda y, c: c - 3 * y),
    "rsub": (lambda y, c: aten.rsub.Tensor(y, c, alpha=3), lambda y, c: c - 3 * y),
    "rsub, constant first": (lambda y, c: aten.rsub.Tensor(c, y, alpha=3), lambda y, c: y - 3 * c),
    "rsub, alpha 1": (lambda y, c: aten.rsub.Tensor(y, c), lambda y, c: c - y),
    "add scalar": (lambda y, c: aten.add.Scalar(y, 2.0, 3), lambda y, c: y + 6),
    "sub scalar": (lambda y, c: aten.sub.Scalar(y, 2, 3), lambda y, c: y - 6),
    "rsub scalar": (lambda y, c: aten.rsub.Scalar(y, 2, 3), lambda y, c: 2 - 3 * y),
    "mul scalar": (lambda y, c: aten.mul.Scalar(y, 2), lambda y, c: 2 * y),
    "div scalar": (lambda y, c: aten.div.Scalar(y, 4), lambda y, c: y / 4),
    "div": (lambda y, c: aten.div.Tensor(y, c), lambda y, c: y / c),
    "div, no rounding": (lambda y, c: aten.div.Tensor_mode(y, c, rounding_mode=None), lambda y, c: y / c),
    "functional add": (lambda y, c: F.add(y, c, alpha=3.0), lambda y, c: y + 3 * c),
    "functional add, constant first": (lambda y, c: F.add(c, y, alpha=3.0), lambda y, c: c + 3 * y),
    "functional mul": (lambda y, c: F.mul(c, y), lambda y, c: c * y),
    "a numpy alpha": (lambda y, c: aten.add.Tensor(y, c, alpha=np.float64(3)), lambda y, c: y + 3 * c),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose2d", "linear"])
@pytest.mark.parametrize("name", ALPHA)
def test_alpha_and_overloads(name: str, kind: str, bias: bool) -> None:
    layer = Layer(kind, bias=bias, groups=2)
    c = constants(kind, np.float64)["[1, out]" if kind == "linear" else "[oc, 1...]"]
    apply, wanted = ALPHA[name]
    folds(layer, lambda y: apply(y, c), lambda y: wanted(y, c))


def test_alpha_is_rounded_as_the_operator_rounds_it() -> None:
    """A float16 constant beside float32: aten computes alpha * c in float16."""
    layer = Layer("conv1d", dtype=np.float32, bias=False)
    c = np.full((OC, 1), 1.5, np.float16)
    gm = layer.graph(lambda y: aten.add.Tensor(y, c, alpha=0.1))
    assert passes.binary_folding(gm) == 1
    bias = next(getattr(gm, n.target) for n in gm.graph.nodes if n.name.startswith("_frozen"))
    np.testing.assert_array_equal(bias, np.full(OC, np.float16(0.1) * np.float16(1.5), np.float32))


def test_small_integers_are_exact() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64):
        w, b = rng.integers(-4, 5, (3, 2, 3)).astype(dtype), rng.integers(-4, 5, 3).astype(dtype)
        x = rng.integers(-4, 5, (2, 2, 6)).astype(dtype)
        c = rng.integers(1, 5, (3, 1)).astype(dtype)
        gm = conv1d_then(w, b, lambda y, c=c: ((1 - y * c) + c) * 2 / 4)
        wanted = gm(x)
        assert passes.binary_folding(gm) == 5
        np.testing.assert_array_equal(gm(x), wanted)


def test_only_what_changes_is_made() -> None:
    """Adding leaves the weight alone; scaling without a bias makes none."""
    layer = Layer("conv2d", bias=False)
    gm = folds(layer, lambda y: y + 2)
    (node,) = layer_nodes(gm)
    assert getattr(gm, node.args[1].target) is layer.weight
    gm = folds(layer, lambda y: y * 2)
    (node,) = layer_nodes(gm)
    assert node.args[2] is None


def test_arguments_stay_as_they_were_given() -> None:
    w = np.ones((2, 2, 3))
    for call in (lambda x: F.conv1d(input=x, weight=w, stride=2) * 2 + 1, lambda x: F.conv1d(x, w, stride=2) * 2 + 1,
                 lambda x: F.conv1d(x, w, None, 2) * 2 + 1,
                 lambda x: F.conv1d(x, stride=2, bias=None, weight=w) * 2 + 1,
                 lambda x: aten.convolution.default(x, w, None, [2], [0], [1], False, [0], 1) * 2 + 1):
        gm = fx.symbolic_trace(call)
        x = np.random.default_rng(0).normal(size=(1, 2, 7))
        wanted = gm(x)
        assert passes.binary_folding(gm) == 2
        np.testing.assert_allclose(gm(x), wanted, rtol=1e-14)
        (node,) = layer_nodes(gm)
        bound = dict(zip(("input", "weight", "bias", "stride"), node.args)) | node.kwargs
        assert bound["stride"] in (2, [2]) and bound["bias"].op == "get_attr"


def test_a_transposed_aten_convolution() -> None:
    layer = Layer("conv_transpose2d", groups=2)
    c = constants("conv_transpose2d", np.float64)["[oc, 1...]"]
    gm = fx.symbolic_trace(
        lambda x: aten.convolution.default(x, layer.weight, layer.bias, [1, 1], [1, 1], [1, 1], True, [0, 0], 2) * c
    )
    assert passes.binary_folding(gm) == 1
    np.testing.assert_allclose(gm(layer.x), layer.reference() * c, atol=1e-12)


def test_constants_of_get_attr() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(np.ones((2, 2, 1)))
            self.scale = nn.Parameter(np.array([[2.0], [3.0]]))
            self.inner = nn.Module()
            self.inner.register_buffer("shift", np.array(1.0))

        def forward(self, x: Any) -> Any:
            return F.conv1d(x, self.weight) * self.scale - self.inner.shift

    gm = fx.symbolic_trace(Net())
    x = np.arange(6.0).reshape(1, 2, 3)
    wanted = gm(x)
    assert passes.binary_folding(gm) == 2
    assert {n.target for n in gm.graph.nodes if n.op == "get_attr"} == {"_frozen_param0", "_frozen_param1"}
    np.testing.assert_array_equal(gm(x), wanted)


def test_any_memory_layout_of_the_weights() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 3, 3, 8))
    c = rng.normal(size=(4, 1, 1))
    turned = base.transpose(3, 0, 1, 2)
    for w in (turned[::2], turned[::-2], np.asfortranarray(base.T[:4, :, :, :5]),
              rng.normal(size=(4, 2, 3, 3)).astype(">f8")):
        x = rng.normal(size=(1, w.shape[1], 6, 9))
        gm = times(F.conv2d, w, c)
        wanted = gm(x)
        assert passes.binary_folding(gm) == 1
        np.testing.assert_allclose(gm(x), wanted, rtol=1e-12, atol=1e-12)


# ---- chains and modules ----------------------------------------------------------------------------------------------


def test_a_chain_leaves_one_layer_and_two_constants() -> None:
    layer = Layer("conv2d")
    c = constants("conv2d", np.float64)["[oc, 1...]"]
    apply = lambda y: ((1 - (y * c + 3) / 2) * c - c) * 4  # noqa: E731
    gm = folds(layer, apply, count=7)
    assert sum(n.op == "get_attr" for n in gm.graph.nodes) == 2


def test_a_relu_ends_the_chain() -> None:
    layer = Layer("conv2d")
    gm = layer.graph(lambda y: F.relu(y * 2) * 3)
    rows: list[FreezeRow] = []
    assert passes.binary_folding(gm, report=rows) == 1
    assert [row.node for row in rows] == ["mul"]
    np.testing.assert_allclose(gm(layer.x), np.maximum(layer.reference() * 2, 0) * 3, atol=1e-12)


def test_modules_become_operators_where_it_helps() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.l = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Any) -> Any:
            x = self.b(self.a(x)) * 2 + 1
            return self.l(x.mean((2, 3))) - 3

    net = Net().eval()
    gm = fx.symbolic_trace(net)
    weights = net.b.weight.copy()
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 5)).astype(np.float32)
    wanted = gm(x)
    assert passes.binary_folding(gm) == 3
    gm.graph.lint()
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["a"]
    np.testing.assert_allclose(gm(x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(net.b.weight, weights)


@pytest.mark.parametrize(("change", "reason"), [(lambda m: m.train(), "TRAINING"), (None, "HOOKED")])
def test_modules_that_are_more_than_their_operator(change: Any, reason: str) -> None:
    class Own(nn.Conv1d):
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: Any, name: str) -> bool:
            return True

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Own(2, 2, 1) if change is None else nn.Conv1d(2, 2, 1)

        def forward(self, x: Any) -> Any:
            return self.conv(x) * 2

    net = Net().eval()
    if change is not None:
        change(net.conv)
    gm = fx.GraphModule(net, Tracer().trace(net))
    row = stays(gm, reason, np.ones((1, 2, 3), np.float32), "conv")
    assert row.node == "mul"


# ---- nothing half done -----------------------------------------------------------------------------------------------


def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _pass_run

    layer = Layer("conv2d")
    gm = layer.graph(lambda y: (y * 2 + 1) * 3)
    before, code = set(vars(gm)), gm.code
    calls = iter(range(100))
    add = _pass_run.Constants.add

    def failing(self: Any, array: Any) -> str:
        if next(calls) == 2:
            raise KeyError("no room")
        return add(self, array)

    monkeypatch.setattr(_pass_run.Constants, "add", failing)
    rows: list[FreezeRow] = []
    with pytest.raises(KeyError, match="no room"):
        passes.binary_folding(gm, report=rows)
    assert set(vars(gm)) == before and gm.code == code and rows == []
    gm.graph.lint()
    monkeypatch.undo()
    assert passes.binary_folding(gm) == 3


def test_what_it_takes() -> None:
    with pytest.raises(TypeError, match="gm: expected a GraphModule, got Conv1d"):
        passes.binary_folding(nn.Conv1d(1, 1, 1))
