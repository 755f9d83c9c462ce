# SPDX-License-Identifier: BSD-3-Clause
"""What a graph of prepared layers can do: copies, threads, other ways to run it, showing itself."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn
from pyconvbn import functional as F
from pyconvbn._lower import lower_modules
from pyconvbn.fx import _describe

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import randomise  # noqa: E402
from plans_util import calls, prepared, traced  # noqa: E402


# ---- what a frozen graph can do --------------------------------------------------------------------------------------
@pytest.fixture
def frozen() -> Any:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.LeakyReLU(0.1))
            self.one, self.two = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
            self.bn, self.up = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.head = nn.Linear(4, 5)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            x = F.relu(self.two(self.one(x)) + x)
            x = F.relu(self.bn(x * 2.0))
            return self.head(self.up(x).mean((2, 3)))

    net = randomise(Block(), np.random.default_rng(0))
    gm = traced(net, (2, 3, 8, 10))
    prepared(gm)
    return gm


IMAGE = np.random.default_rng(1).normal(size=(2, 3, 8, 10)).astype(np.float32)


def test_copies(frozen: Any) -> None:
    wanted = frozen(IMAGE)
    for protocol in (2, 5):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(frozen, protocol))(IMAGE), wanted)
    twin = copy.deepcopy(frozen)
    np.testing.assert_array_equal(twin(IMAGE), wanted)
    names = [node.target for node in frozen.graph.nodes if node.op == "call_module"]
    for name in names:
        assert twin.get_submodule(name) is not frozen.get_submodule(name)
        assert twin.get_submodule(name).plan is frozen.get_submodule(name).plan
        assert not frozen.get_submodule(name).training


def test_other_ways_to_run(frozen: Any) -> None:
    wanted = frozen(IMAGE)
    np.testing.assert_array_equal(fx.Interpreter(frozen).run(IMAGE), wanted)
    for again in (fx.Transformer(frozen).transform(), fx.symbolic_trace(frozen)):
        np.testing.assert_array_equal(again(IMAGE), wanted)
        assert calls(again) == calls(frozen)
    frozen.train()
    np.testing.assert_array_equal(frozen(IMAGE), wanted)


def test_threads(frozen: Any) -> None:
    wanted, results, errors = frozen(IMAGE), [], []

    def work() -> None:
        try:
            results.extend(frozen(IMAGE) for _ in range(20))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(results) == 160
    for result in results:
        np.testing.assert_array_equal(result, wanted)


def test_shapes_are_propagated_without_running(frozen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("it was run")

    monkeypatch.setattr(nn.FrozenLayer, "forward", fail)
    fx.shape_prop(frozen, (5, 3, 16, 12))
    found = [n.meta["tensor_meta"].shape for n in frozen.graph.nodes if n.op == "call_module"]
    assert found == [(5, 8, 8, 6), (5, 8, 8, 6), (5, 8, 8, 6), (5, 8, 8, 6), (5, 4, 16, 12), (5, 5)]


def test_it_shows_itself(frozen: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = repr(frozen)
    for line in ("conv2d 3x3, 3 -> 8, stride=2, padding=1, leaky_relu 0.1", "conv2d 3x3, 8 -> 8, padding=1, groups=8",
                 "conv2d 1x1, 8 -> 8, + residual, relu", "scale and shift 8, relu", "conv_transpose2d 2x2, 8 -> 4, stride=2",
                 "linear, 4 -> 5"):
        assert line in text
    assert "residual=" in frozen.code and "self." in frozen.code
    frozen.graph.print_tabular()
    assert capsys.readouterr().out.count("call_module") == 6
    shown = [_describe.describe(n, frozen) for n in frozen.graph.nodes if n.op == "call_module"]
    assert [(d.kind, d.title) for d in shown] == [
        ("fused", "conv2d 3×3 3→8 s2 + leaky_relu 0.1"), ("conv", "conv2d 3×3 8→8"),
        ("fused", "conv2d 1×1 8→8 + residual + relu"), ("fused", "scale and shift 8 + relu"),
        ("conv", "conv_transpose2d 2×2 8→4 s2"), ("conv", "linear 4→5"),
    ]
    html = frozen._repr_html_()
    assert "residual + relu" in html and "scale and shift 8" in html


def test_explain(frozen: Any) -> None:
    for node in frozen.graph.find_nodes(op="call_module"):
        layer = frozen.get_submodule(node.target)
        assert layer.explain()["algorithm"] in repr(layer)
    layer = nn.FrozenLayer(pyconvbn.Plan(np.ones((4, 3, 1, 1), np.float32)))
    assert repr(layer) == "FrozenLayer(conv2d 1x1, 3 -> 4)"
    assert layer.explain((1, 3, 8, 8))["algorithm"]
    assert layer.output_shape((1, 3, 8, 8)) == (1, 4, 8, 8)


def test_to_aten_refuses(frozen: Any) -> None:
    with pytest.raises(NotImplementedError, match="weights packed"):
        fx.to_aten(frozen)
    assert lower_modules(frozen) == 0


def test_effects_know_it(frozen: Any) -> None:
    """Its call gives a new array and writes nothing, unless it has hooks."""
    first, second = frozen.graph.find_nodes(op="call_module")[:2]
    assert _core.graph_effects(
        frozen.graph, frozen, [("written", first), ("alias", first, second), ("returned", first)]
    ) == [False, False, False]
    assert not _core.op_impure(first, frozen)
    layer = frozen.get_submodule(second.target)
    layer.register_forward_hook(lambda *args: None)
    assert _core.graph_effects(frozen.graph, frozen, [("written", first)]) == [True]
