# SPDX-License-Identifier: BSD-3-Clause
"""prepare_layers: convolutions, linear layers and BatchNorm on constants become prepared layers."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import nn, testing
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import KINDS, randomise  # noqa: E402
from plans_util import SHAPE, Net, calls, near, prepared, traced  # noqa: E402

ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Any]] = {
    "relu": (F.relu, lambda x: np.maximum(x, 0), "relu"),
    "relu6": (F.relu6, lambda x: np.clip(x, 0, 6), "relu6"),
    "hardtanh": (lambda x: F.hardtanh(x, 0, 6), lambda x: np.clip(x, 0, 6), "relu6"),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.25), lambda x: np.where(x > 0, x, 0.25 * x), ("leaky_relu", 0.25)),
    "sigmoid": (F.sigmoid, lambda x: 1 / (1 + np.exp(-x)), "sigmoid"),
    "hardswish": (F.hardswish, lambda x: x * np.clip(x + 3, 0, 6) / 6, "hardswish"),
    "silu": (F.silu, lambda x: x / (1 + np.exp(-x)), "silu"),
    "aten_relu": (aten.relu.default, lambda x: np.maximum(x, 0), "relu"),
    "aten_relu_": (aten.relu_.default, lambda x: np.maximum(x, 0), "relu"),
    "aten_relu6": (aten.relu6.default, lambda x: np.clip(x, 0, 6), "relu6"),
    "aten_hardtanh_": (lambda x: aten.hardtanh_.default(x, 0, 6), lambda x: np.clip(x, 0, 6), "relu6"),
    "aten_leaky_relu": (aten.leaky_relu.default, lambda x: np.where(x > 0, x, 0.01 * x), ("leaky_relu", 0.01)),
    "aten_sigmoid_": (aten.sigmoid_.default, lambda x: 1 / (1 + np.exp(-x)), "sigmoid"),
    "aten_hardswish": (aten.hardswish.default, lambda x: x * np.clip(x + 3, 0, 6) / 6, "hardswish"),
    "aten_silu_": (aten.silu_.default, lambda x: x / (1 + np.exp(-x)), "silu"),
}
SUMS: dict[str, Callable[[Any, Any], Any]] = {
    "operator": operator.add,
    "reversed": lambda a, b: operator.add(b, a),
    "aten": aten.add.Tensor,
    "alpha_one": lambda a, b: aten.add.Tensor(a, b, alpha=1),
    "aten_in_place": aten.add_.Tensor,
    "functional": F.add,
}


# ---- layers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", ["alone", "residual", "both", "no shapes"])
def test_kinds(kind: str, bias: bool, dtype: Any, fused: str) -> None:
    make, _, shape = KINDS[kind]
    rng = np.random.default_rng(5)
    layer = make(bias=bias, dtype=dtype)

    def function(x: Any, layer: Any) -> Any:
        y = layer(x)
        if fused in ("residual", "both"):
            y = y + x
        return F.relu(y) if fused in ("both", "no shapes") else y

    net = Net(function, layer)
    x = rng.normal(size=shape).astype(dtype)
    gm = traced(net, *([] if fused == "no shapes" else [(shape, dtype)]))
    before = gm(x)
    assert calls(gm) != ["layer"]
    rows = prepared(gm)
    assert calls(gm) == ["layer"]
    assert {row.into for row in rows} == {"layers_0"} and len(rows) == {"alone": 1, "both": 3}.get(fused, 2)
    assert not gm.graph.find_nodes(op="get_attr")
    exact = np.asarray(testing.reference_conv_bn(x, layer), np.float64)
    if fused in ("residual", "both"):
        exact = exact + np.asarray(x, np.float64)
    if fused in ("both", "no shapes"):
        exact = np.maximum(exact, 0)
    near(gm(x), exact, dtype)
    near(before, exact, dtype)
    for n in (1, 0) if kind != "linear" else (1,):
        assert gm(x[:n]).shape == before[:n].shape


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_activations(name: str, residual: bool) -> None:
    function, exact, plan = ACTIVATIONS[name]
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = Net(lambda x, conv: function(conv(x) + x if residual else conv(x)), conv)
    x = np.random.default_rng(2).normal(size=(2, 4, 5, 6)).astype(np.float32) * 4
    gm = traced(net, x.shape)
    rows = prepared(gm)
    assert calls(gm) == ["layer"] and len(rows) == 2 + residual
    layer = gm.get_submodule("layers_0")
    assert layer.plan.params["activation"] == plan and layer.residual == residual
    wanted = testing.reference_conv_bn(x, conv) + (x if residual else 0)
    near(gm(x), exact(np.asarray(wanted, np.float64)))


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = Net(lambda x, y, conv: F.relu(SUMS[name](conv(x), y)), conv, inputs=2)
    rng = np.random.default_rng(2)
    x, y = (rng.normal(size=(2, 4, 5, 6)).astype(np.float32) for _ in range(2))
    gm = traced(net, x.shape, y.shape)
    prepared(gm)
    assert calls(gm) == ["layer"]
    near(gm(x, y), np.maximum(np.asarray(testing.reference_conv_bn(x, conv), np.float64) + y, 0))
    # What an example does not tell: the other array may turn out to be smaller, or larger.
    one = y[:1]
    near(gm(x, one), np.maximum(np.asarray(testing.reference_conv_bn(x, conv), np.float64) + one, 0))
    if name != "aten_in_place":
        many = np.maximum(np.asarray(testing.reference_conv_bn(x[:1], conv), np.float64) + y, 0)
        near(gm(x[:1], y), many)
    with pytest.raises(ValueError):
        gm(x, y[:, :, :4])


def test_two_layers_added() -> None:
    one, two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    net = Net(lambda x, one, two: F.relu(one(x) + two(x)), one, two)
    x = np.random.default_rng(2).normal(size=(2, 4, 5, 6)).astype(np.float32)
    gm = traced(net, x.shape)
    prepared(gm)
    assert str(gm.graph).splitlines()[3:] == [
        "    %layers_0 : [num_users=1] = call_module[target=layers_0](args = (%x,), kwargs = {})",
        "    %layers_1 : [num_users=1] = call_module[target=layers_1](args = (%x,), kwargs = {residual: %layers_0})",
        "    return layers_1",
    ]
    near(gm(x), np.maximum(testing.reference_conv_bn(x, one) + testing.reference_conv_bn(x, two), 0))


def test_activation_before_the_sum() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = Net(lambda x, conv: F.relu(conv(x)) + x, conv)
    x = np.random.default_rng(2).normal(size=(2, 4, 5, 6)).astype(np.float32)
    gm = traced(net, x.shape)
    prepared(gm)
    assert calls(gm) == ["layer", "operator.add"]
    near(gm(x), np.maximum(testing.reference_conv_bn(x, conv), 0) + x)


@pytest.mark.parametrize("name", ["mm", "matmul", "operator", "addmm"])
def test_products(name: str) -> None:
    rng = np.random.default_rng(4)
    weight, bias = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    functions = {
        "mm": lambda x: aten.mm.default(x, weight), "matmul": lambda x: aten.matmul.default(x, weight),
        "operator": lambda x: operator.matmul(x, weight), "addmm": lambda x: aten.addmm.default(bias, x, weight),
    }
    net = Net(lambda x: F.relu(functions[name](x)))
    x = rng.normal(size=(5, 6)).astype(np.float32)
    gm = traced(net, x.shape)
    prepared(gm)
    assert calls(gm) == ["layer"]
    near(gm(x), np.maximum(x.astype(np.float64) @ weight + (bias if name == "addmm" else 0), 0))
    unknown = traced(net)
    rows = prepared(unknown)
    assert [row.reason for row in rows] == ["SHAPE_UNKNOWN"] and "layer" not in calls(unknown)


def test_product_that_is_not_a_linear_layer() -> None:
    rng = np.random.default_rng(4)
    weight, bias = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    scaled = traced(Net(lambda x: aten.addmm.default(bias, x, weight, alpha=2)), (5, 6))
    assert [row.reason for row in prepared(scaled)] == ["UNSUPPORTED"]
    wide = traced(Net(lambda x: aten.addmm.default(bias[:1], x, weight)), (5, 6))
    assert [row.reason for row in prepared(wide)] == ["SHAPE_MISMATCH"]
    mixed = traced(Net(lambda x: aten.matmul.default(x, weight)), ((5, 6), np.float64))
    assert [row.reason for row in prepared(mixed)] == ["DTYPE"]
    computed = traced(Net(lambda x, y: aten.matmul.default(x, y), inputs=2), (5, 6), (6, 3))
    assert prepared(computed) == []


def test_convolution_with_transposed_as_an_argument() -> None:
    rng = np.random.default_rng(4)
    w, b = rng.normal(size=(3, 4, 3, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    x = rng.normal(size=(2, 3, 6, 5)).astype(np.float32)
    for transposed, weight in ((True, w), (False, np.ascontiguousarray(w.swapaxes(0, 1)))):
        gm = traced(Net(lambda x, t=transposed, w=weight: aten.convolution.default(
            x, w, b, [2], [1, 1], [1, 1], t, [1 * t, 0], 1)), x.shape)
        wanted = gm(x)
        prepared(gm)
        assert calls(gm) == ["layer"]
        near(gm(x), wanted)


def test_pads_stay_nodes_of_their_own() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    gm = traced(Net(lambda x, conv: F.relu(conv(x)), conv), (2, 4, 5, 6))
    prepared(gm)
    assert calls(gm) == ["aten.pad.default", "layer"]
    x = np.random.default_rng(2).normal(size=(2, 4, 5, 6)).astype(np.float32)
    near(gm(x), np.maximum(testing.reference_conv_bn(x, conv), 0))


def test_unbatched() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    x = np.random.default_rng(2).normal(size=(4, 5, 6)).astype(np.float32)
    gm = traced(Net(lambda x, conv: F.relu(conv(x) + x), conv), x.shape)
    prepared(gm)
    assert calls(gm) == ["layer"]
    near(gm(x), np.maximum(testing.reference_conv_bn(x[None], conv)[0] + x, 0))


# ---- BatchNorm that is left ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 5, 4), (2, 3, 2, 3, 4), (0, 3, 5), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_batch_norm(shape: tuple[int, ...], dtype: Any) -> None:
    bn = randomise(nn.SyncBatchNorm(3), np.random.default_rng(1))
    net = Net(lambda x, bn: F.relu(bn(x)), bn)
    x = np.random.default_rng(2).normal(size=shape).astype(dtype)
    gm = traced(net, (shape, dtype))
    rows = prepared(gm)
    assert calls(gm) == ["layer"] and [row.outcome for row in rows] == ["done", "done"]
    wanted = np.maximum(testing.reference_module(bn, x.astype(np.float64)), 0) if x.size else np.empty(shape)
    near(gm(x), wanted, dtype)
    if x.ndim == 4:  # it is no convolution: any number of axes will do
        near(gm(x[..., 0]), wanted[..., 0], dtype)
        near(gm(np.asfortranarray(x)), wanted, dtype)
    with pytest.raises(ValueError):
        gm(x[:, :2])
    assert "scale and shift 3, relu" in repr(gm.get_submodule("layers_0"))


def test_batch_norm_that_stays() -> None:
    def reason(shape: Any = (2, 3, 4, 4), **changes: Any) -> tuple[str, list[str]]:
        bn = nn.BatchNorm2d(3)
        for name, value in changes.items():
            getattr(bn, name)[...] = value
        gm = traced(Net(lambda x, bn: bn(x), bn), *([shape] if shape else []))
        (row,) = prepared(gm)
        return row.reason, calls(gm)

    same = ["aten.batch_norm.default"]
    assert reason(None) == ("SHAPE_UNKNOWN", same)
    assert reason(running_var=-1) == ("NONFINITE", same)
    assert reason(weight=np.inf) == ("NONFINITE", same)
    assert reason() == ("OK", ["layer"])


def test_batch_norm_in_training() -> None:
    bn = nn.BatchNorm2d(3)
    args = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    gm = traced(Net(lambda x, bn: F.batch_norm(x, *args, training=True), bn), (2, 3, 4, 4))
    assert [row.reason for row in prepared(gm)] == ["TRAINING"]


def test_example_of_no_images() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    gm = traced(Net(lambda x, conv: F.relu(conv(x) + x), conv), (0, 4, 5, 6))
    prepared(gm)
    assert calls(gm) == ["layer"] and repr(gm)
    x = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    near(gm(x), np.maximum(np.asarray(testing.reference_conv_bn(x, conv), np.float64) + x, 0))
    assert gm(x[:0]).shape == (0, 4, 5, 6)
