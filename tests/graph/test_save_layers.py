# SPDX-License-Identifier: BSD-3-Clause
"""save and load of graphs that call layers: prepared ones, those of pyconvbn.nn, and whole frozen networks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
import pyconvbn.freezing
from pyconvbn import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
from random_nets import SPATIAL, RandomNet  # noqa: E402
from save_util import X, net, same_bits, there_and_back  # noqa: E402


def calls(layers: dict[str, Any], *chain: str) -> fx.GraphModule:
    """x through the layers of these names."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in chain:
        x = graph.call_module(name, (x,))
    graph.output(x)
    return fx.GraphModule(layers, graph)


def plan(shape: tuple[int, ...], dtype: Any = np.float32, **fields: Any) -> pyconvbn.Plan:
    rng = np.random.default_rng(7)
    return pyconvbn.Plan(rng.standard_normal(shape).astype(dtype), rng.standard_normal(4).astype(dtype), **fields)


@pytest.mark.parametrize(("make", "shape"), [
    (lambda: plan((4, 3, 3, 3), padding=1, activation="relu"), (2, 3, 9, 9)),
    (lambda: plan((4, 3, 3, 3), padding=1, padding_mode="reflect", stride=2), (2, 3, 9, 9)),
    (lambda: plan((4, 3, 3, 3), padding="same", activation=("leaky_relu", 0.1)), (2, 3, 9, 9)),
    (lambda: plan((4, 3, 3, 3), input_shape=(1, 3, 12, 12), tune=True, precision="strict"), (1, 3, 12, 12)),
    (lambda: plan((3, 4, 3), transposed=True, stride=2, output_padding=1), (2, 3, 9)),
    (lambda: plan((4, 1, 3, 3, 3), groups=4, dilation=2), (1, 4, 8, 8, 8)),
    (lambda: plan((4, 3), np.float64, activation="silu"), (5, 3)),
    (lambda: plan((4, 3, 1, 1), np.float16), (2, 3, 9, 9)),
])
def test_plans(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    prepared = make()
    gm = calls({"layer": nn.FrozenLayer(prepared, residual=True, input_shape=shape)}, "layer")
    again = there_and_back(gm, tmp_path)
    x = np.random.default_rng(2).standard_normal(shape).astype(prepared.dtype)
    assert same_bits(again(x), gm(x)) and repr(again) == repr(gm)
    old, new = prepared.__reduce_ex__(5)[1], again.layer.plan.__reduce_ex__(5)[1]
    assert old[2:] == new[2:] and same_bits(old[0], new[0]) and same_bits(old[1], new[1])
    assert again.layer.explain(shape)["algorithm"] == gm.layer.explain(shape)["algorithm"]


def test_a_prepared_batch_norm(tmp_path: Path) -> None:
    prepared = pyconvbn.Plan(np.arange(1, 4, dtype=np.float32).reshape(3, 1, 1), np.ones(3, np.float32), groups=3)
    gm = calls({"bn": nn.FrozenLayer(prepared, kind="batch_norm")}, "bn")
    again = there_and_back(gm, tmp_path)
    assert same_bits(again(X), gm(X)) and again.bn.kind == "batch_norm" and again(X).shape == X.shape


def test_shared_layers_and_plans_stay_shared(tmp_path: Path) -> None:
    shared = plan((4, 4, 3, 3), padding=1)
    a, b = nn.FrozenLayer(shared), nn.FrozenLayer(shared)
    gm = calls({"a": a, "b": b, "c": a}, "a", "b", "c")
    again = there_and_back(gm, tmp_path)
    x = np.ones((1, 4, 5, 5), np.float32)
    assert same_bits(again(x), gm(x))
    assert again.a is again.c and again.a is not again.b and again.a.plan is again.b.plan


def test_layers_below_others(tmp_path: Path) -> None:
    gm = calls({"net.conv": nn.FrozenLayer(plan((4, 3, 3, 3)))}, "net.conv")
    assert same_bits(there_and_back(gm, tmp_path)(X), gm(X))


@pytest.mark.parametrize("training", [False, True])
def test_a_network_of_layers(training: bool, tmp_path: Path) -> None:
    module = net()
    module.append(nn.Dropout(0.0))
    module[1].momentum = None
    gm = fx.symbolic_trace(module.train(training))
    gm.train(training)
    again = there_and_back(gm, tmp_path)
    assert repr(again) == repr(gm) and list(again.state_dict()) == list(gm.state_dict())
    assert [m.training for m in again.modules()] == [m.training for m in gm.modules()]
    for _ in range(2):  # training counts and averages
        assert same_bits(again(X), gm(X))
    for key, value in gm.state_dict().items():
        assert same_bits(again.state_dict()[key], value)


def test_the_efficient_form_of_modules(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(net())
    pyconvbn.passes.efficient_conv_bn_eval(gm)
    again = there_and_back(gm, tmp_path)
    assert same_bits(again(X), gm(X))
    assert pyconvbn.passes.fuse_conv_bn(fx.symbolic_trace(net()))[1].ok


@pytest.mark.parametrize("make", [
    lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False), lambda: nn.Upsample(scale_factor=2), lambda: nn.GELU(),
    lambda: nn.BatchNorm2d(3, track_running_stats=False, affine=False), lambda: nn.SyncBatchNorm(3).eval(),
    lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), lambda: nn.AvgPool2d(2),
    lambda: nn.LeakyReLU(0.2),
    lambda: nn.Flatten(2), lambda: nn.Identity(),
])
def test_kinds_of_layers(make: Any, tmp_path: Path) -> None:
    layer = make()
    gm = calls({"layer": layer}, "layer")
    again = there_and_back(gm, tmp_path)
    assert repr(again) == repr(gm) and vars(again.layer).keys() == vars(layer).keys()
    assert again.layer._kinds == layer._kinds and same_bits(again(X), gm(X))


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_frozen(seed: int, tmp_path: Path) -> None:
    module = RandomNet(seed, np.float32)
    x = np.random.default_rng(seed).standard_normal((2, 4, *SPATIAL[module.nd])).astype(np.float32)
    frozen, _ = pyconvbn.freezing.freeze(fx.symbolic_trace(module), x)
    again = there_and_back(frozen, tmp_path)
    assert again.report == frozen.report and repr(again) == repr(frozen)
    for a, b in zip(frozen(x), again(x), strict=True):  # of the arrays in a tuple, or of the images
        assert same_bits(a, b)


def hooked() -> Any:
    layer = nn.FrozenLayer(plan((4, 3, 3, 3)))
    layer.register_forward_hook(lambda module, args, result: result * 2)
    return layer


def noted() -> Any:
    layer = nn.FrozenLayer(plan((4, 3, 3, 3)))
    layer.note = "mine"
    return layer


class Derived(nn.FrozenLayer):
    """Not the class itself."""


@pytest.mark.parametrize(("make", "message"), [
    (hooked, "has hooks"), (noted, "an attribute 'note' of its own"),
    (nn.Module, "the Module that it calls is no layer"),
    (lambda: Derived(plan((4, 3, 3, 3))), "the Derived that it calls is no layer"),
])
def test_layers_that_cannot_be_saved(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"^node 'layer' cannot be saved: .*{message}"):
        pyconvbn.save(calls({"layer": make()}, "layer"), tmp_path / "a")
    assert os.listdir(tmp_path) == []
