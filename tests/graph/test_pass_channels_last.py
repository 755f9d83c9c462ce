# SPDX-License-Identifier: BSD-3-Clause
"""passes.convert_conv_weights_to_channels_last: which weights get a clone, and that numbers stay equal."""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, _lower, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn.ops import aten as A

sys.path.insert(0, str(Path(__file__).parent))
from layout_util import traced, weights  # noqa: E402

CLONE = A.clone.default


def converted(gm: Any, x: Any, expected: int) -> list[Any]:
    before, rows = gm(x), []
    state = {name: (np.array(v), v.strides) for name, v in gm.state_dict().items()}
    assert passes.convert_conv_weights_to_channels_last(gm, report=rows) == expected
    gm.graph.lint()
    np.testing.assert_array_equal(gm(x), before)
    assert gm(x).strides == before.strides
    now = {name: (v, v.strides) for name, v in gm.state_dict().items()}
    assert all(np.array_equal(now[k][0], v) and now[k][1] == s for k, (v, s) in state.items())
    text = str(gm.graph)
    assert passes.convert_conv_weights_to_channels_last(gm) == 0 and str(gm.graph) == text
    for node in gm.graph.find_nodes(op="call_function", target=CLONE):
        assert node.kwargs == {"memory_format": "channels_last"} and node.prev is node.args[0]
    return rows


def test_golden_weights(rng: np.random.Generator) -> None:
    def run(m: Any, x: Any) -> Any:
        y = A.conv_transpose2d.input(F.conv2d(x, m.w), m.t)
        y = A.convolution.default(F.conv2d(y, m.p), m.d, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 5)
        return y + F.conv2d(x, weight=m.w).sum()

    gm = traced(run, **weights(rng))
    rows = converted(gm, rng.integers(-3, 4, (1, 3, 8, 8)).astype(np.float32), 3)
    assert [(r.step, r.node) for r in rows] == [
        ("weight_layout", "conv2d"), ("weight_layout", "conv_transpose2d_input"), ("weight_layout", "conv2d_2")]
    clones = {n.args[0].target: n for n in gm.graph.find_nodes(op="call_function", target=CLONE)}
    assert set(clones) == {"w", "t"}, "one entry of space or channels: in channels_last already"
    shapes = {name: _core.op_tensor(n) for name, n in clones.items()}
    assert shapes == {"w": ((4, 3, 3, 3), "f", 4), "t": ((4, 5, 2, 2), "f", 4)}


def test_one_clone_for_each_weight_node(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: x)
    gm.register_buffer("w", weights(rng)["w"])
    graph, x, out = gm.graph, gm.graph.find_nodes(op="placeholder")[0], gm.graph.output_node()
    with graph.inserting_before(out):
        w = graph.get_attr("w")
        one, two = graph.call_function(F.conv2d, (x, w)), graph.call_function(A.conv2d.default, (x, w))
        other = graph.call_function(operator.mul, (w, 2))
        out.args = (graph.call_function(operator.add, (one, two)),)
    converted(gm, rng.integers(-3, 4, (1, 3, 8, 8)).astype(np.float32), 2)
    clone = one.args[1]
    assert clone is two.args[1] and clone.target is CLONE and other.args[0] is w


def test_weights_that_have_the_layout_stay(rng: np.random.Generator) -> None:
    w = np.ascontiguousarray(rng.normal(size=(4, 3, 3, 3)).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    gm = traced(lambda m, x: F.conv2d(x, m.w), w=w)
    assert converted(gm, rng.normal(size=(1, 3, 5, 5)), 0) == []


def test_modules_are_lowered_first(rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.Conv1d(3, 3, 2)).eval()
    gm = fx.symbolic_trace(net)
    with pytest.raises(ValueError):
        gm(np.ones((1, 3, 8, 8), np.float32))
    rows: list[Any] = []
    assert passes.convert_conv_weights_to_channels_last(gm, report=rows) == 2
    assert [(r.step, r.node) for r in rows] == [
        ("lower", "_0"), ("lower", "_2"), ("weight_layout", "_0"), ("weight_layout", "_2")]
    assert [n.op for n in gm.graph.nodes if n.name in ("_1", "_3")] == ["call_module"] * 2


def test_folding_keeps_numbers_equal(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: F.conv2d(x, m.w), **weights(rng))
    x = rng.integers(-3, 4, (1, 3, 8, 8)).astype(np.float32)
    before = gm(x)
    assert passes.convert_conv_weights_to_channels_last(gm) == 1
    assert passes.constant_fold(gm) == 1
    assert not gm.graph.find_nodes(op="call_function", target=CLONE)
    np.testing.assert_array_equal(gm(x), before)


def test_weights_that_are_not_constant(rng: np.random.Generator) -> None:
    step = passes.convert_conv_weights_to_channels_last
    cases = {
        "NONCONST": traced(lambda m, x: F.conv2d(x, m.w * x.sum()), **weights(rng)),
        "MUTATED": traced(lambda m, x: F.conv2d(x, m.w) + A.mul_.Tensor(m.w, x.sum()).sum(), **weights(rng)),
    }
    literal = traced(lambda m, x: F.conv2d(x, m.w), **weights(rng))
    literal.graph.find_nodes(op="call_function")[0].update_arg(1, np.ones((4, 3, 3, 3), np.float32))
    cases["UNSUPPORTED"] = literal
    for reason, gm in cases.items():
        text, rows = str(gm.graph), []
        assert step(gm, report=rows) == 0 and str(gm.graph) == text
        assert [(r.step, r.reason) for r in rows] == [("weight_layout", reason)] and rows[0].hint


def test_a_failed_lowering_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval())
    text, real, rows = str(gm.graph), _lower.lower_modules, []

    def late(*args: Any, **keywords: Any) -> int:
        real(*args, **keywords)
        raise OSError("late")

    monkeypatch.setattr(_lower, "lower_modules", late)
    with pytest.raises(OSError, match="late"):
        passes.convert_conv_weights_to_channels_last(gm, report=rows)
    assert str(gm.graph) == text and rows == []
