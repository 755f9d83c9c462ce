# SPDX-License-Identifier: BSD-3-Clause
"""passes.concat_matmuls: which products are joined, which are not and why, and that values are exactly the same."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, _pass_matmul, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn.ops import aten as A


class Holder(nn.Module):
    """A module with these arrays and this forward."""

    def __init__(self, run: Callable[..., Any], **arrays: Any) -> None:
        super().__init__()
        self.run = run
        for name, array in arrays.items():
            self.register_buffer(name, array)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def traced(run: Callable[..., Any], **arrays: Any) -> Any:
    return fx.symbolic_trace(Holder(run, **arrays))


def small(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Any:
    """Integers: sums of their products are exact in any order."""
    return rng.integers(-4, 5, shape).astype(dtype)


def joined(gm: Any, x: Any, expected: int) -> list[Any]:
    """Runs the pass, checks what always holds, gives the rows."""
    before, state = gm(x), {name: np.array(v) for name, v in gm.state_dict().items()}
    outputs = [node.name for node in gm.graph.output_node().all_input_nodes]
    rows: list[Any] = []
    assert passes.concat_matmuls(gm, report=rows) == expected
    gm.graph.lint()
    after = gm(x)
    for one, other in zip(*[v if isinstance(v, tuple) else (v,) for v in (before, after)], strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).dtype == np.asarray(other).dtype and np.shape(one) == np.shape(other)
    assert [node.name for node in gm.graph.output_node().all_input_nodes] == outputs
    assert all(np.array_equal(gm.state_dict()[name], value) for name, value in state.items())
    assert sum(row.outcome == "done" for row in rows) == expected
    for row in rows:
        assert row.step == "matmul" and (row.outcome == "done") == (row.reason == "OK") == (row.into is not None)
        assert row.outcome == "done" or row.hint
    text, again = str(gm.graph), []
    assert passes.concat_matmuls(gm, report=again) == 0 and str(gm.graph) == text, "a second run changes nothing"
    assert not [row for row in again if row.outcome == "done"]
    return rows


def reasons(rows: list[Any]) -> list[tuple[str, str]]:
    return [(row.node, row.reason) for row in rows]


def products(gm: Any, target: Any) -> int:
    return len([n for n in gm.graph.nodes if n.target == target])


FORMS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "mm": (A.mm.default, lambda x, w, b: A.mm.default(x, w)),
    "aten_matmul": (A.matmul.default, lambda x, w, b: A.matmul.default(self=x, other=w)),
    "operator": (operator.matmul, lambda x, w, b: x @ w),
    "aten_linear": (A.linear.default, lambda x, w, b: A.linear.default(x, w)),
    "aten_linear_bias": (A.linear.default, lambda x, w, b: A.linear.default(x, w, bias=b)),
    "functional_linear": (F.linear, lambda x, w, b: F.linear(x, w)),
    "functional_linear_bias": (F.linear, lambda x, w, b: F.linear(x, w, b)),
    "addmm": (A.addmm.default, lambda x, w, b: A.addmm.default(b, x, w, beta=1, alpha=1.0)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("count", "groups"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_two_or_three_at_a_time(form: str, count: int, groups: int, dtype: Any, rng: np.random.Generator) -> None:
    target, call = FORMS[form]
    shape = (5, 3) if "linear" in form else (3, 5)
    arrays = {f"w{i}": small(rng, *shape, dtype=dtype) for i in range(count)}
    arrays |= {f"b{i}": small(rng, 5, dtype=dtype) for i in range(count)}

    def run(m: Any, x: Any) -> Any:
        parts = [call(x, getattr(m, f"w{i}"), getattr(m, f"b{i}")) for i in range(count)]
        return sum((i + 1) * F.relu(part) for i, part in enumerate(parts))

    gm = traced(run, **arrays)
    names = [n.name for n in gm.graph.nodes if n.target == target]
    rows = joined(gm, small(rng, 4, 3, dtype=dtype), count if count > 1 else 0)
    assert products(gm, target) == (groups or count)
    assert {row.node for row in rows} == ({*names} if count > 1 else set())
    assert {n.name for n in gm.graph.nodes} >= {*names}, "parts have the names of the products"


@pytest.mark.parametrize("name", ["matmul", "mm"])
def test_methods(name: str, rng: np.random.Generator) -> None:
    """Arrays have no such methods, tensors do: here the graph is not run."""
    gm = traced(lambda m, x: x)
    gm.a, gm.b = small(rng, 3, 5), small(rng, 3, 5)
    graph = gm.graph
    x, out = graph.find_nodes(op="placeholder")[0], graph.output_node()
    with graph.inserting_before(out):
        a, b = (graph.call_method(name, (x, graph.get_attr(w))) for w in "ab")
        out.args = (graph.call_function(operator.mul, (a, b)),)
    assert passes.concat_matmuls(gm) == 2
    gm.graph.lint()
    calls = [n for n in graph.nodes if n.op == "call_method"]
    assert [(n.target, n.args[1].target) for n in calls] == [(name, "_frozen_param0")]
    np.testing.assert_array_equal(gm._frozen_param0, np.concatenate([gm.a, gm.b], 1))


def test_golden(rng: np.random.Generator) -> None:
    arrays = {"q": small(rng, 3, 4), "k": small(rng, 3, 4), "v": small(rng, 3, 4)}
    gm = traced(lambda m, x: (x @ m.q) * (x @ m.k) + (x @ m.v), **arrays)
    fx.shape_prop(gm, small(rng, 2, 3))
    rows = joined(gm, small(rng, 2, 3), 3)
    text = [f"{n.name} = {n.op} {n.target if n.op != 'call_function' else n.target.__name__}" for n in gm.graph.nodes]
    assert text == [
        "x = placeholder x", "_frozen_param0 = get_attr _frozen_param0", "concat_matmul = call_function matmul",
        "matmul = call_function slice.Tensor", "matmul_1 = call_function slice.Tensor",
        "matmul_2 = call_function slice.Tensor", "mul = call_function mul", "add = call_function add",
        "output = output output",
    ]  # fmt: skip
    assert [row.into for row in rows] == ["concat_matmul"] * 3
    shapes = {n.name: _core.op_tensor(n) for n in gm.graph.nodes}
    assert shapes["_frozen_param0"] == ((3, 12), "f", 4) and shapes["concat_matmul"] == ((2, 12), "f", 4)
    assert shapes["matmul"] == shapes["matmul_2"] == ((2, 4), "f", 4)
    constant = gm._frozen_param0
    assert not constant.flags.writeable and constant.flags.c_contiguous and constant.base is None
    np.testing.assert_array_equal(constant, np.concatenate([*arrays.values()], 1))


def test_metadata_and_insertion_point_stay(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: (x @ m.a) * (x @ m.b), a=small(rng, 3, 4), b=small(rng, 3, 4))
    nodes = {n.name: n for n in gm.graph.nodes}
    nodes["matmul_1"].meta["mine"] = "kept"
    with gm.graph.inserting_before(nodes["b"]):  # a node that goes
        assert passes.concat_matmuls(gm) == 2
        new = gm.graph.call_function(F.relu, (nodes["x"],))
    gm.graph.lint()
    assert {n.name: n for n in gm.graph.nodes}["matmul_1"].meta["mine"] == "kept"
    assert new.next.name in ("_frozen_param0", "concat_matmul", "matmul", "matmul_1", "mul")


def test_more_axes_and_one_axis(rng: np.random.Generator) -> None:
    arrays = {"a": small(rng, 3, 4), "b": small(rng, 3, 4)}
    for shape in ((3,), (2, 5, 3), (1, 3), (0, 3)):
        joined(traced(lambda m, x: (x @ m.a) - 2 * (x @ m.b), **arrays), small(rng, *shape), 2)


def test_results_that_are_returned_are_arrays_of_their_own(rng: np.random.Generator) -> None:
    """As with the products themselves: what the caller writes into one is not seen in another."""
    gm = traced(lambda m, x: (x @ m.a, x @ m.b, (x @ m.c)[0]), **{n: small(rng, 3, 4) for n in "abc"})
    for rows in (1, 4):
        x = small(rng, rows, 3)
        if rows == 1:
            joined(gm, x, 3)
        a, b, c = gm(x)
        assert not np.shares_memory(a, b) and not np.shares_memory(b, c)
        assert a.flags.c_contiguous and b.flags.c_contiguous and a.base is None and b.base is None
        assert [n.target for n in gm.graph.nodes].count(A.clone.default) == 3


def test_products_of_a_joined_product(rng: np.random.Generator) -> None:
    def run(m: Any, x: Any) -> Any:
        first = x @ m.a
        return F.relu(first @ m.c) + F.relu(first @ m.d) + F.relu(x @ m.b)

    gm = traced(run, a=small(rng, 3, 4), b=small(rng, 3, 4), c=small(rng, 4, 4), d=small(rng, 4, 4))
    joined(gm, small(rng, 2, 3), 4)
    assert products(gm, operator.matmul) == 2


def test_equal_products_find_each_other(rng: np.random.Generator) -> None:
    """Two shapes, alternating; the lone third kind stays."""
    shapes = {"a": (3, 4), "b": (3, 5), "c": (3, 4), "d": (3, 5), "e": (3, 6)}
    gm = traced(lambda m, x: tuple(F.relu(x @ getattr(m, n)) for n in shapes),
                **{n: small(rng, *s) for n, s in shapes.items()})  # fmt: skip
    rows = joined(gm, small(rng, 2, 3), 4)
    assert [(r.node, r.reason, r.blocking) for r in rows if r.reason != "OK"] == [("matmul_4", "UNEQUAL", "matmul")]
    assert [r.into for r in rows if r.reason == "OK"] == ["concat_matmul"] * 2 + ["concat_matmul_1"] * 2


# -- what stays --------------------------------------------------------------------------------------------------
W = np.ones((3, 4), np.float32)


def ones(*names: str, **more: Any) -> dict[str, Any]:
    return {n: W.copy() for n in names} | more


SHARED = np.ones((4, 4), np.float32)
STAY: dict[str, tuple[Callable[..., Any], dict[str, Any], list[str]]] = {
    "shapes": (lambda m, x: F.relu(x @ m.a) @ W.T + F.relu(x @ m.b) @ W[:, :2].copy().T,
               ones("a", b=W[:, :2].copy()), ["UNEQUAL", "UNEQUAL"]),
    "dtypes": (lambda m, x: F.relu(x @ m.a) + F.relu(x @ m.b).astype(np.float32),
               ones("a", b=W.astype(np.float64)), ["UNEQUAL", "UNEQUAL"]),
    "operators": (lambda m, x: F.relu(x @ m.a) + F.relu(A.mm.default(x, m.b)), ones("a", "b"), ["UNEQUAL"] * 2),
    "bias_and_none": (lambda m, x: F.relu(F.linear(x, m.a, m.v)) + F.relu(F.linear(x, m.b)),
                      {"a": W.T.copy(), "b": W.T.copy(), "v": np.ones(4, np.float32)}, ["UNEQUAL"] * 2),
    "shared_node": (lambda m, x: F.relu(x @ m.a) + F.relu(x @ m.b) + (m.b * x.sum()).sum(), ones("a", "b"),
                    ["WEIGHT_SHARED", "WEIGHT_SHARED"]),
    "same_weight_twice": (lambda m, x: F.relu(x @ m.a) + F.relu(x @ m.a), ones("a"), ["WEIGHT_SHARED"] * 2),
    "shared_memory": (lambda m, x: F.relu(x @ m.a) + F.relu(x @ m.b), {"a": SHARED[:3], "b": SHARED[1:]},
                      ["WEIGHT_SHARED"] * 2),
    "run_time_weight": (lambda m, x: F.relu(x @ m.a) + F.relu(x @ (m.b + x.sum())), ones("a", "b"), ["NONCONST"] * 2),
    "weight_written": (lambda m, x: F.relu(x @ m.a) + F.relu(x @ m.b) + A.mul_.Tensor(m.b, x.sum()).sum(),
                       ones("a", "b"),
                       ["MUTATED"] * 2),
    "bias_written": (
        lambda m, x: F.relu(A.addmm.default(m.v, x, m.a)) + F.relu(A.addmm.default(m.u, x, m.b))
        + A.add_.Tensor(m.u, x.sum()),
        ones("a", "b", v=np.ones(4, np.float32), u=np.ones(4, np.float32)), ["MUTATED"] * 2),
    "bias_shape": (lambda m, x: F.relu(A.addmm.default(m.v, x, m.a)) + F.relu(A.addmm.default(m.v, x, m.b)),
                   ones("a", "b", v=np.ones((1, 4), np.float32)), ["SHAPE_MISMATCH"] * 2),
    "alpha": (lambda m, x: F.relu(A.addmm.default(m.v, x, m.a, alpha=2))
              + F.relu(A.addmm.default(m.v, x, m.b, beta=0.5)),
              ones("a", "b", v=np.ones(4, np.float32)), ["UNSUPPORTED"] * 2),
    "result_written": (lambda m, x: A.add_.Tensor(x @ m.a, 1.0) + F.relu(x @ m.b), ones("a", "b"), ["MUTATED"] * 2),
    "view_written": (lambda m, x: F.relu(x @ m.a) + A.add_.Tensor(A.view.default(x @ m.b, [-1]), 1.0).sum(),
                     ones("a", "b"), ["MUTATED"] * 2),
    "input_written": (lambda m, x: (lambda y: F.relu(y @ m.a) + F.relu(A.add_.Tensor(y, 1.0)) @ W
                                    + F.relu(y @ m.b))(x * 2),
                      ones("a", "b"), ["MUTATED"] * 2),
    "as_strided": (lambda m, x: A.as_strided.default(x @ m.a, [2], [1], 0).sum() + F.relu(x @ m.b).sum(),
                   ones("a", "b"), ["UNSUPPORTED"] * 2),
}  # fmt: skip


def opaque(x: Any) -> Any:
    return np.array(x) + 0


@pytest.mark.parametrize("case", STAY)
def test_these_stay(case: str, rng: np.random.Generator) -> None:
    run, arrays, expected = STAY[case]
    gm = traced(run, **arrays)
    text = str(gm.graph)
    rows: list[Any] = []
    assert passes.concat_matmuls(gm, report=rows) == 0
    mine = [row for row in rows if row.node.startswith(("matmul", "mm", "linear", "addmm"))]
    found = [row.reason for row in mine][: len(expected)]
    assert found == expected, rows
    assert all(row.hint and row.outcome == "kept" for row in rows)
    assert str(gm.graph) == text and not [n for n in gm.__dict__ if n.startswith("_frozen_param")]
    gm.graph.lint()


def test_what_nobody_knows_may_write(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: (x @ m.a) * (x @ m.b), **ones("a", "b"))
    first = next(n for n in gm.graph.nodes if n.name == "matmul")
    with gm.graph.inserting_after(first):
        unknown = gm.graph.call_function(opaque, (first,))
    first.replace_all_uses_with(unknown, delete_user_cb=lambda user: user is not unknown)
    rows: list[Any] = []
    assert passes.concat_matmuls(gm, report=rows) == 0
    assert reasons(rows) == [("matmul", "MUTATED"), ("matmul_1", "MUTATED")] and rows[0].blocking == "opaque"


def test_input_written_between_some(rng: np.random.Generator) -> None:
    """Two before the write and two after it: two pairs."""
    def run(m: Any, x: Any) -> Any:
        y = x * 2
        early = F.relu(y @ m.a) + F.relu(y @ m.b)
        A.add_.Tensor(y, 1.0)
        return early + F.relu(y @ m.c) + F.relu(y @ m.d)

    gm = traced(run, **{n: small(rng, 3, 4) for n in "abcd"})
    rows = joined(gm, small(rng, 2, 3), 4)
    assert [row.into for row in rows] == ["concat_matmul"] * 2 + ["concat_matmul_1"] * 2


def test_out_is_written(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: F.relu(F.linear(x, m.a)) + F.linear(x, m.b, out=m.c), a=W.T.copy(), b=W.T.copy(),
                c=np.empty((2, 4), np.float32))  # fmt: skip
    rows: list[Any] = []
    assert passes.concat_matmuls(gm, report=rows) == 0
    assert {row.reason for row in rows} == {"IN_PLACE"}


def test_other_arrays_than_numpys_stay(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: (x @ m.a) * (x @ m.b), **ones("a", "b"))
    gm.__dict__["b"] = np.ma.masked_array(W)
    rows: list[Any] = []
    assert passes.concat_matmuls(gm, report=rows) == 0 and rows[1].reason == "NOT_ARRAY"
    gm.__dict__["b"] = nn.Parameter(W.copy())
    joined(gm, small(rng, 2, 3), 2)


def test_integers_and_complex_numbers(rng: np.random.Generator) -> None:
    for dtype in (np.int32, np.complex64):
        arrays = {name: small(rng, 3, 4, dtype=dtype) for name in "ab"}
        gm = traced(lambda m, x: (x @ m.a) * (x @ m.b), **arrays)
        joined(gm, small(rng, 2, 3, dtype=dtype), 2)


def test_alone_gets_no_row(rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: (x @ m.a) + ((x + 1) @ m.b), **ones("a", "b"))
    rows: list[Any] = []
    assert passes.concat_matmuls(gm, report=rows) == 0 and rows == []


def test_unlowered_modules_are_left(rng: np.random.Generator) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Any) -> Any:
            return self.a(x) * self.b(x)

    assert passes.concat_matmuls(fx.symbolic_trace(Two().eval())) == 0


# -- failures ----------------------------------------------------------------------------------------------------
def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: sum(F.relu(x @ getattr(m, n)) for n in "abcde"), **{n: small(rng, 3, 4) for n in "abcde"})
    text, names, rows = str(gm.graph), set(gm.__dict__), []
    real, calls = _pass_matmul._Joiner.__call__, []

    def failing(self: Any, targets: Any, axis: int) -> Any:
        calls.append(targets)
        if len(calls) == 2:
            raise OSError("no more")
        return real(self, targets, axis)

    monkeypatch.setattr(_pass_matmul._Joiner, "__call__", failing)
    with pytest.raises(OSError, match="no more"):
        passes.concat_matmuls(gm, report=rows)
    assert str(gm.graph) == text and set(gm.__dict__) == names and rows == [] and len(calls) == 2
    gm.graph.lint()
    monkeypatch.setattr(_pass_matmul._Joiner, "__call__", lambda self, targets, axis: 3)
    with pytest.raises(TypeError):
        passes.concat_matmuls(gm)
    assert str(gm.graph) == text
    monkeypatch.undo()
    joined(gm, small(rng, 2, 3), 5)


def test_every_allocation_may_fail(rng: np.random.Generator) -> None:
    arrays = {name: small(rng, 3, 4) for name in "abcd"}
    gm = traced(lambda m, x: (x @ m.a, F.relu(x @ m.b), (x @ m.c)[0], F.relu(x @ m.d)), **arrays)
    text, names, failures = str(gm.graph), set(gm.__dict__), 0
    while True:
        _core._testing.alloc_fail_after(failures)
        try:
            changed = passes.concat_matmuls(gm)
        except MemoryError:
            failures += 1
            _core._testing.alloc_fail_after(-1)
            assert str(gm.graph) == text and set(gm.__dict__) == names and failures < 500
            gm.graph.lint()
            continue
        finally:
            _core._testing.alloc_fail_after(-1)
        break
    assert failures > 10 and changed == 4


def test_the_graph_is_locked_while_arrays_are_joined(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    gm = traced(lambda m, x: (x @ m.a) * (x @ m.b), **ones("a", "b"))
    monkeypatch.setattr(_pass_matmul._Joiner, "__call__", lambda self, t, axis: gm.graph.placeholder("late"))
    with pytest.raises(RuntimeError):
        passes.concat_matmuls(gm)
    assert "late" not in str(gm.graph)


def test_only_graph_modules() -> None:
    with pytest.raises(TypeError, match="gm: expected a GraphModule, got Linear"):
        passes.concat_matmuls(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_many_inputs_and_many_products(rng: np.random.Generator) -> None:
    """100 inputs of 1 to 9 products each."""
    counts = [1 + i % 9 for i in range(100)]
    arrays = {f"w{i}_{k}": small(rng, 3, 3) for i, count in enumerate(counts) for k in range(count)}

    def run(m: Any, x: Any) -> Any:
        for i, count in enumerate(counts):
            x = sum(F.relu(x @ getattr(m, f"w{i}_{k}")) for k in range(count)) * 0.25
            x = x.clip(-4, 4).round()
        return x

    gm = traced(run, **arrays)
    joined(gm, small(rng, 2, 3), sum(c for c in counts if c > 1))
    assert products(gm, operator.matmul) == sum((1, 1, 1, 2, 2, 2, 3, 3, 3)[count - 1] for count in counts)
