# SPDX-License-Identifier: BSD-3-Clause
"""passes.constant_fold: what stays and why, and failures, which change nothing."""

from __future__ import annotations

import copy
import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, _pass_run, fx, nn, ops, passes
from pyconvbn import functional as F
from pyconvbn.freeze_report import FreezeRow

sys.path.insert(0, str(Path(__file__).parent))
from constants_util import Net, X, arrays, f32, fold, make, same  # noqa: E402

A = ops.aten
Q = ops.quantized_decomposed


# ---- what stays ------------------------------------------------------------------------------------------------------


def unknown(a: Any) -> Any:
    return a


fx.wrap("unknown")


def reasons(gm: Any, *inputs: Any, **options: Any) -> dict[str, str]:
    _, rows = fold(gm, *inputs, **options)
    return {name: row.reason for name, row in rows.items()}


def test_random_operators(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: x + A.rand_like.default(m.w * 2) + F.dropout(m.w, 0.5, True), w=f32(rng, 4))
    assert reasons(gm) == {"mul": "OK", "rand_like_default": "RANDOM", "dropout": "RANDOM"}
    assert not np.array_equal(gm(X), gm(X))


def test_dropout(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: x + m.drop(m.w) + F.dropout(m.w, 0.5, False), w=f32(rng, 4), drop=nn.Dropout(0.5))
    assert reasons(copy.deepcopy(gm), X) == {"drop": "OK", "dropout": "OK"}
    gm.drop.train()
    assert reasons(gm) == {"drop": "TRAINING", "dropout": "OK"}


def test_modules_that_stay(rng: np.random.Generator) -> None:
    class Own(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * 2

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: Any, name: str) -> bool:
            return True

    bn, hooked = nn.BatchNorm1d(4), nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *a: None)
    net = Net(
        lambda m, x: x + m.bn(m.w) + m.hooked(m.v) + m.own(m.u),
        w=f32(rng, 3, 4), v=f32(rng, 3, 4), u=f32(rng, 3, 4), bn=bn, hooked=hooked, own=Own(),
    )
    bn.train()
    gm = fx.GraphModule(net, Tracer().trace(net))
    assert reasons(gm) == {"bn": "TRAINING", "hooked": "HOOKED", "own": "UNKNOWN"}


def test_unknown_functions(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: x + unknown(m.w) + m.v * 2 + m.w * 2, w=f32(rng, 4), v=f32(rng, 4))
    _, rows = fold(gm, X)
    assert {name: row.reason for name, row in rows.items()} == {"unknown": "UNKNOWN", "mul": "OK", "mul_1": "MUTATED"}
    assert rows["mul_1"].blocking == "w"  # unknown may write it


def test_written_parameters(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = x + m.w * 2 + m.v * 2
        A.add_.Scalar(m.w, 10)
        return y

    gm = make(forward, w=f32(rng, 4), v=f32(rng, 4))
    twin = copy.deepcopy(gm)
    assert reasons(gm) == {"mul": "MUTATED", "mul_1": "OK", "add__scalar": "IMPURE"}
    for _ in range(3):
        same(gm(X), twin(X))


def test_parameters_written_through_a_view(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = x + m.w * 2
        A.add_.Tensor(A.reshape.default(m.w, [4]), x[0])
        return y

    gm = make(forward, w=f32(rng, 1, 4))
    twin = copy.deepcopy(gm)
    assert reasons(gm) == {"mul": "MUTATED", "reshape_default": "MUTATED"}
    for _ in range(3):
        same(gm(X), twin(X))


def test_modules_whose_weights_the_graph_writes_or_returns(rng: np.random.Generator) -> None:
    linear = nn.Linear(4, 4)

    def writes(m: Any, x: Any) -> Any:
        y = x + m.linear(m.w)
        A.add_.Scalar(m.linear.weight, 1)
        return y

    gm = make(writes, w=f32(rng, 3, 4), linear=linear)
    twin = copy.deepcopy(gm)
    assert reasons(gm)["linear"] == "MUTATED"
    for _ in range(2):
        same(gm(X), twin(X))
    gm = make(lambda m, x: (x + m.linear(m.w), A.t.default(m.linear.weight)), w=f32(rng, 3, 4), linear=linear)
    twin = copy.deepcopy(gm)
    assert reasons(gm) == {"linear": "ALIASES_OUTPUT", "t_default": "ALIASES_OUTPUT"}
    for _ in range(2):
        outputs = gm(X), twin(X)
        same(*outputs)
        for out in outputs:
            out[1][...] += 1


def test_a_copy_that_is_written_is_made_at_each_call(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = A.clone.default(m.w * 2)
        A.add_.Tensor(y, x)
        return y * 1, x + m.w * 2

    gm = make(forward, w=f32(rng, 3, 4))
    _, rows = fold(gm, X)
    assert rows["mul"].outcome == "done" and rows["clone_default"].reason == "MUTATED"
    assert rows["clone_default"].blocking == "add__tensor"
    same(gm(X), gm(X))


def test_what_is_returned_is_new_at_each_call(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: (m.w.T.reshape(4) * 2, [m.v + 1], x + (m.w * 2 + 1)), w=f32(rng, 1, 4), v=f32(rng, 3))
    twin = copy.deepcopy(gm)
    _, rows = fold(gm, X)
    assert [name for name, row in rows.items() if row.reason == "ALIASES_OUTPUT"] == ["mul", "add"]
    assert rows["add"].blocking == "output" and rows["mul_1"].outcome == "done"
    for _ in range(3):
        first = gm(X)
        same(first, twin(X))
        for a in arrays(first):
            a[...] = np.nan


def test_values_beside_a_returned_one_are_folded(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.w * 2
        return y, x + (y + 1)

    gm = make(forward, w=f32(rng, 4))
    twin = copy.deepcopy(gm)
    assert reasons(gm) == {"mul": "ALIASES_OUTPUT", "add": "OK"}
    for _ in range(2):
        out = gm(X)
        same(out, twin(X))
        out[0][...] = 0


def test_a_returned_parameter_is_no_constant(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: (A.view.default(m.w, [4]), x + m.w * 2), w=f32(rng, 1, 4))
    twin = copy.deepcopy(gm)
    _, rows = fold(gm, X)
    assert rows["mul"].reason == "ALIASES_OUTPUT" and rows["mul"].blocking == "w"
    for _ in range(2):
        outputs = gm(X), twin(X)
        same(*outputs)
        for out in outputs:
            out[0][...] += 1


def test_literal_arrays(rng: np.random.Generator) -> None:
    table, written, returned = f32(rng, 4), f32(rng, 4), f32(rng, 4)
    graph = fx.Graph()
    x = graph.placeholder("x")
    ones = [graph.call_function(operator.mul, (a, 2)) for a in (table, written, returned)]
    graph.call_function(A.add_.Scalar, (written, 1))
    total = graph.call_function(operator.add, (ones[0], x))
    sums = graph.call_function(operator.add, (total, ones[1])), graph.call_function(operator.add, (x, ones[2]))
    graph.output((*sums, returned))
    gm = fx.GraphModule(nn.Module(), graph)
    names = [node.name for node in ones]
    _, rows = fold(gm)
    assert [rows[name].reason for name in names] == ["OK", "MUTATED", "ALIASES_OUTPUT"]


def test_dequantize_stays(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        q = Q.quantize_per_tensor.default(m.w * 2, 0.05, 0, -127, 127, np.int8)
        w = Q.dequantize_per_tensor.default(q, 0.05, 0, -127, 127, np.int8)
        qc = Q.quantize_per_channel.default(m.w, m.s * 2, m.z_buffer, 0, -127, 127, np.int8)
        v = Q.dequantize_per_channel.default(qc, m.s * 2, m.z_buffer, 0, -127, 127, np.int8)
        return F.linear(x, w * 1.5) + F.linear(x, v)

    gm = make(forward, w=f32(rng, 5, 4), s=np.full(5, 0.01, np.float32), z_buffer=np.zeros(5, np.int64))
    count, rows = fold(gm, X)
    kept = {name: row.reason for name, row in rows.items() if row.outcome == "kept"}
    assert kept == {"dequantize_per_tensor_default": "DEQUANTIZE", "dequantize_per_channel_default": "DEQUANTIZE"}
    assert count == 5
    q = next(node for node in gm.graph.nodes if node.name == "quantize_per_channel_default")
    assert q.op == "get_attr" and getattr(gm, q.target).dtype == np.int8


def test_constraint(rng: np.random.Generator) -> None:
    asked: list[str] = []

    def only_additions(node: Any) -> Any:
        asked.append(node.name)
        return [] if node.target is operator.mul else [node]

    gm = make(lambda m, x: x + ((m.w + 1) * 2 + 1) + (m.v + 1 + 1), w=f32(rng, 4), v=f32(rng, 4))
    _, rows = fold(gm, X, constraint_fn=only_additions)
    assert {n: r.reason for n, r in rows.items()} == {"add": "OK", "mul": "CONSTRAINT", "add_3": "OK", "add_4": "OK"}
    assert asked[:4] == ["add", "mul", "add_3", "add_4"]
    assert sorted(node.name for node in gm.graph.nodes if node.op == "get_attr") == ["add", "add_4"]


def test_what_raises_stays(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        return x + m.v * 2 + (m.w * 2).reshape(5)

    gm = make(forward, w=f32(rng, 4), v=f32(rng, 4))
    before = copy.deepcopy(gm)
    assert reasons(gm) == {"mul": "OK", "mul_1": "OK", "reshape": "RAISED"}
    messages = []
    for module in (before, gm):
        with pytest.raises(ValueError) as caught:
            module(X)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_calls_that_fit_no_schema_stay(rng: np.random.Generator) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    bad = graph.call_function(A.relu.default, (w,), {"inplace": True})
    graph.output((x, bad))
    root = nn.Module()
    root.register_buffer("w", f32(rng, 3))
    assert reasons(fx.GraphModule(root, graph)) == {bad.name: "UNSUPPORTED"}


def test_objects_that_are_no_plain_arrays(rng: np.random.Generator) -> None:
    words = np.array([{"a": 1}, None], object)
    gm = make(lambda m, x: x[0:1] + (m.words_buffer.reshape(2) == None).sum() * 0.5, words_buffer=words)  # noqa: E711
    fold(gm, X)
    class Transposing(np.ndarray):  # type: ignore[type-arg]
        def __rmul__(self, other: Any) -> Any:
            return other @ np.asarray(self)

        def __mul__(self, other: Any) -> Any:
            return np.multiply(self, other)

    graph = fx.Graph()
    x, m = graph.placeholder("x"), graph.get_attr("m")
    twice = graph.call_function(operator.mul, (m, 2.0))
    graph.output(graph.call_function(operator.mul, (x, twice)))
    gm = fx.GraphModule({"m": np.eye(4, dtype=np.float32).view(Transposing)}, graph)
    wanted = gm(X)
    _, rows = fold(gm)
    assert rows[twice.name].reason == "NOT_ARRAY"
    same(gm(X), wanted)


# ---- failures --------------------------------------------------------------------------------------------------------


def state(gm: Any) -> Any:
    return [node.format_node() for node in gm.graph.nodes], sorted(vars(gm)), dict(gm._kinds), gm.code


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_a_failing_constraint_changes_nothing(error: Any, rng: np.random.Generator) -> None:
    gm = make(lambda m, x: x + (m.w + 1) * 2, w=f32(rng, 4))
    before, rows = state(gm), list[FreezeRow]()

    def fails(node: Any) -> bool:
        if node.name == "mul":
            raise error("mine")
        return True

    with pytest.raises(error, match="mine"):
        passes.constant_fold(gm, fails, report=rows)
    assert state(gm) == before and rows == []
    assert passes.constant_fold(gm) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupts_and_lack_of_memory_change_nothing(error: Any, rng: np.random.Generator) -> None:
    class Array(np.ndarray):  # type: ignore[type-arg]
        def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
            raise error("mine")

    graph = fx.Graph()
    x, w, v = graph.placeholder("x"), graph.get_attr("w"), graph.get_attr("v")
    first = graph.call_function(operator.mul, (v, 2))
    second = graph.call_function(operator.mul, (w, 2))
    graph.output(graph.call_function(A.cat.default, ([x, first, second],)))
    gm = fx.GraphModule({"w": f32(rng, 4).view(Array), "v": f32(rng, 4)}, graph)
    before = state(gm)
    with pytest.raises(error, match="mine"):
        passes.constant_fold(gm)
    assert state(gm) == before


def test_a_constant_that_cannot_be_named_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    gm = make(lambda m, x: x + m.w * 2 + m.v * 2, w=f32(rng, 4), v=f32(rng, 4))
    before = state(gm)
    add = _pass_run.Constants.add

    def fails(self: Any, array: Any) -> str:
        if self.names:
            raise RuntimeError("no room")
        return add(self, array)

    monkeypatch.setattr(_pass_run.Constants, "add", fails)
    with pytest.raises(RuntimeError, match="no room"):
        passes.constant_fold(gm)
    assert state(gm) == before


def test_allocation_failures_change_nothing(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        parts = A.chunk.default(F.relu(m.w) * 2, 2)
        return x + parts[0] + m.linear(parts[1]) + A.rand_like.default(m.v * 2), m.v * 3

    original = make(forward, w=f32(rng, 6, 4), v=f32(rng, 4), linear=nn.Linear(4, 4))
    failed = 0
    for n in range(500):
        gm = copy.copy(original)
        before, rows = state(gm), list[FreezeRow]()
        counted = _core.alloc_stats()["total_allocs"]
        _core._testing.alloc_fail_after(n)
        try:
            passes.constant_fold(gm, lambda node: True, report=rows)
        except MemoryError:
            failed += 1
            _core._testing.alloc_fail_after(-1)
            assert state(gm) == before and rows == []
            gm.graph.lint()
        finally:
            _core._testing.alloc_fail_after(-1)
        if _core.alloc_stats()["total_allocs"] - counted <= n:
            break
    else:
        pytest.fail("does not come to an end")
    assert failed > 5 and len(rows) == 9


def test_the_graph_cannot_be_edited_meanwhile(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: x + m.w * 2, w=f32(rng, 4))

    def edits(node: Any) -> bool:
        node.graph.erase_node(next(iter(node.users)))
        return True

    before = state(gm)
    with pytest.raises(RuntimeError):
        passes.constant_fold(gm, edits)
    assert state(gm) == before


def test_arguments_are_checked(rng: np.random.Generator) -> None:
    with pytest.raises(TypeError, match="gm: expected a GraphModule, got int"):
        passes.constant_fold(3)  # type: ignore[arg-type]
    gm = make(lambda m, x: x + m.w * 2, w=f32(rng, 4))
    with pytest.raises(TypeError, match="constraint_fn: expected a callable or None, got int"):
        passes.constant_fold(gm, 3)  # type: ignore[arg-type]
