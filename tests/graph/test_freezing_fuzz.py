# SPDX-License-Identifier: BSD-3-Clause
"""Random programs before and after freezing, or after single passes in any order: what they return, what of it shares
memory with what, what they write, and when they fail."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import fx, nn, passes
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from freezing_fuzz_program import Program  # noqa: E402
from freezing_fuzz_util import arrays_of, leaves  # noqa: E402

TOLERANCE = {2: 2e-2, 4: 2e-4, 8: 1e-8}


@contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """The package draws from fresh generators: here each one is the next of a fixed sequence."""
    real, count = np.random.default_rng, iter(range(10**9))
    np.random.default_rng = lambda s=None: real([seed, next(count)] if s is None else s)  # type: ignore[assignment]
    try:
        yield
    finally:
        np.random.default_rng = real


def structure(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value), [structure(v) for v in value]
    if isinstance(value, dict):
        return {k: structure(v) for k, v in value.items()}
    return np.ndarray if isinstance(value, np.ndarray) else type(value)


def same(actual: Any, wanted: Any, where: str) -> None:
    a, w = np.asarray(actual), np.asarray(wanted)
    assert a.dtype == w.dtype and a.shape == w.shape, f"{where}: {a.dtype}{a.shape}, expected {w.dtype}{w.shape}"
    if w.dtype.kind != "f" or not w.size:
        assert np.array_equal(a, w), f"{where}: values"
        return
    finite = np.isfinite(w)
    assert np.array_equal(finite, np.isfinite(a)), f"{where}: NaN or Inf"
    a64, w64 = a[finite].astype(np.float64), w[finite].astype(np.float64)
    scale = max(1.0, float(np.abs(w64).max(initial=0)))
    worst = float(np.abs(a64 - w64).max(initial=0))
    assert worst <= TOLERANCE[min(8, w.itemsize)] * scale, f"{where}: values differ by {worst} of {scale}"


def sharing(outputs: list[Any], others: dict[str, Any]) -> set[tuple[Any, Any]]:
    found: set[tuple[Any, Any]] = set()
    for i, out in enumerate(outputs):
        if not isinstance(out, np.ndarray) or not out.size:
            continue
        for name, other in [*others.items(), *((j, o) for j, o in enumerate(outputs[:i]) if isinstance(o, np.ndarray))]:
            if np.may_share_memory(out, other) and np.shares_memory(out, other):
                found.add((i, name))
    return found


class Side:
    """A program with its module, and how to call it."""

    def __init__(self, program: Program, gm: Any, takes: list[int] | None, params: list[Any]) -> None:
        self.program, self.gm, self.takes, self.params = program, gm, takes, params
        self.old: list[Any] = []

    def call(self, inputs: list[Any], seed: int) -> Any:
        everything = [*self.params, *inputs]
        given = everything if self.takes is None else [everything[i] for i in self.takes]
        with same_random_numbers(seed), np.errstate(all="ignore"):
            return self.gm(*given)


def dense(array: Any) -> bool:
    """No gaps, nothing twice: its strides are kept."""
    if not array.size:
        return False
    order = sorted(range(array.ndim), key=lambda i: -abs(array.strides[i]))
    return bool(array.transpose(order).flags.c_contiguous)


def compare(one: Side, two: Side, runs: list[dict[str, Any]], strides: bool) -> None:
    """The same calls of both, one after the other."""
    for number, how in enumerate(runs):
        where = f"call {number} {how}"
        ins = [side.program.inputs(**how) for side in (one, two)]
        try:
            wanted = one.call(ins[0], number)
        except Exception as error:
            try:
                got = two.call(ins[1], number)
            except Exception:
                return
            if os.environ.get("FUZZ_SILENT"):
                raise AssertionError(f"{where}: silent, the original says {error!r}, got {structure(got)}") from None
            return
        got = two.call(ins[1], number)
        assert structure(got) == structure(wanted), f"{where}: {structure(got)}, expected {structure(wanted)}"
        a, w = list(leaves(got)), list(leaves(wanted))
        shares = []
        for side, mine, given in ((one, w, ins[0]), (two, a, ins[1])):
            known = {f"input {i}": v for i, v in enumerate(given)}
            known |= {k: v for k, v in arrays_of(side.program.root).items()}
            known |= {f"old {i}": v for i, v in enumerate(side.old)}
            known |= {f"literal {i}": v for i, (v, _) in enumerate(side.program.literals)}
            shares.append(sharing(mine, known))
            side.old = [v for v in mine if isinstance(v, np.ndarray)]
        for i, (x, y) in enumerate(zip(a, w, strict=True)):
            if isinstance(y, np.ndarray | np.generic):
                same(x, y, f"{where}, output {i}")
            else:
                assert x == y
            if isinstance(y, np.ndarray):
                assert x.flags.writeable == y.flags.writeable, f"{where}, output {i}: writeable {x.flags.writeable}"
                if strides and how == {"number": 0} and dense(y):
                    assert all(s == t for s, t, n in zip(x.strides, y.strides, y.shape) if n > 1), (
                        f"{where}, output {i}: strides {x.strides}, expected {y.strides}")
        found, wanted = (sorted(shared, key=str) for shared in (shares[1], shares[0]))
        assert found == wanted, f"{where}: memory shared by {found}, expected {wanted}"
        for i, (x, y) in enumerate(zip(ins[1], ins[0], strict=True)):
            same(x, y, f"{where}, input {i} afterwards")
        state = arrays_of(one.program.root)
        for name, value in arrays_of(two.program.root).items():
            same(value, state[name], f"{where}, {name} afterwards")
        for (mine, _), (theirs, _) in zip(two.program.literals, one.program.literals, strict=True):
            same(mine, theirs, f"{where}, a literal afterwards")
        if number % 2 == 0:  # what is returned is the caller's: spoil it
            for mine in (a, w):
                for value in mine:
                    if isinstance(value, np.ndarray) and value.flags.writeable:
                        value[...] = 1


def sides(seed: int, form: str) -> tuple[Program, Any, list[Any]]:
    with same_random_numbers(seed):
        program = Program(seed)
    gm, params = program.gm, []
    if form != "plain":
        try:
            gm = fx.to_aten(gm, [tuple(v.shape) for v in program.example], lift_params=form == "lifted")
        except (NotImplementedError, ValueError):  # not everything has an ATen form; shapes alone are taken for float32
            return program, gm, params
        params = list(gm.meta.get("params_flat", []))
    return program, gm, params


def batch_norms(gm: Any) -> list[str]:
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and hasattr(gm.get_submodule(node.target), "running_mean"):
            found.append(node.name)
        elif node.op == "call_function" and "batch_norm" in str(node.target):
            found.append(node.name)
    return sorted(found)


RUNS = [{"number": 0}, {"number": 0}, {"number": 1}, {"number": 2, "batch": 1}, {"number": 3, "strides": False},
        {"number": 4, "batch": 0}, {"number": 5, "batch": 5}]


def check_freezing(seed: int) -> None:
    rng = np.random.default_rng([seed, 11])
    form = ["plain", "plain", "aten", "lifted"][int(rng.integers(4))]
    program, gm, params = sides(seed, form)
    other, same_gm, same_params = sides(seed, form)
    one, text = Side(program, gm, None, params), str(same_gm.graph)
    state = {k: v.copy() for k, v in arrays_of(other.root).items()}
    shapes = bool(rng.random() < 0.7)
    example = other.inputs(0)
    frozen, takes = pyconvbn.freeze(same_gm, example if shapes else None)
    frozen.graph.lint()
    assert str(same_gm.graph) == text, "the graph was changed"
    for name, value in arrays_of(other.root).items():
        assert np.array_equal(value, state[name], equal_nan=True), f"freezing wrote {name}"
    for x, y in zip(example, other.inputs(0), strict=True):
        assert np.array_equal(x, y), "freezing wrote its example"
    assert sorted(row.node for row in frozen.report.folds) == batch_norms(gm), "rows of BatchNorms"
    names = {node.name for node in frozen.graph.nodes}
    for row in frozen.report.folds:
        assert row.outcome in ("folded", "removed", "planned", "kept"), str(row)
        assert row.new_node is None or row.new_node in names, f"{row}: no such node"
        assert row.outcome == "kept" or row.reason == "OK" or row.outcome == "planned", str(row)
    everything = [*same_params, *example]
    again, same_takes = pyconvbn.freeze(frozen, [everything[i] for i in takes] if shapes else None)
    late = {"dead", "parameter", "output_layout"}  # what a dead node stood in the way of before
    if not late & {row.step for row in again.report if row.outcome == "done"}:
        assert str(again.graph) == str(frozen.graph), f"freezing twice:\n{frozen.graph}\n{again.graph}"
        assert same_takes == list(range(len(takes)))
    runs = [RUNS[i] for i in (0, 1, 2)] + [RUNS[int(i)] for i in rng.permutation(range(3, 7))[:2]]
    for copied in (pickled(frozen), saved(frozen)):
        if copied is not None:
            first = Program(seed)
            inputs = [*copy.deepcopy(same_params), *first.inputs(0)]
            reference = [*copy.deepcopy(same_params), *first.inputs(0)]
            fresh, fresh_gm, fresh_params = sides(seed, form)
            fresh_gm = pickled(fresh_gm)  # views become arrays of their own in both
            del reference, fresh_params
            try:
                wanted = Side(fresh, fresh_gm, None, copy.deepcopy(params)).call(fresh.inputs(0), 0)
            except Exception:
                continue
            with same_random_numbers(0), np.errstate(all="ignore"):
                got = copied(*[inputs[i] for i in takes])
            for i, (x, y) in enumerate(zip(leaves(got), leaves(wanted), strict=True)):
                if isinstance(y, np.ndarray | np.generic):
                    same(x, y, f"a copy from a file, output {i}")
    if "as_strided" in text:  # they see the strides of the example, whatever the strides at run time
        runs = [run for run in runs if run.get("strides", True) and "batch" not in run]
    compare(one, Side(other, frozen, takes, same_params), runs, shapes)


def pickled(frozen: Any) -> Any:
    return pickle.loads(pickle.dumps(frozen, protocol=5))


def saved(frozen: Any) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            pyconvbn.save(frozen, Path(folder) / "g.npz")
        except TypeError as error:
            assert "cannot be saved" in str(error), error
            return None
        return pyconvbn.load(Path(folder) / "g.npz")


NAMES = [
    "cse", "dce", "view_to_reshape", "replace_params_with_constants", "constant_fold", "binary_folding",
    "concat_matmuls", "convert_conv_weights_to_channels_last", "enforce_as_strided_input_layout",
    "enforce_output_layout", "prepare_layers", "efficient_conv_bn_eval", "fuse_conv_bn",
]


def check_passes(seed: int) -> None:
    rng = np.random.default_rng([seed, 13])
    form = ["plain", "aten", "lifted"][int(rng.integers(3))]
    program, gm, params = sides(seed, form)
    other, changed, other_params = sides(seed, form)
    example = [*other_params, *other.inputs(0)]
    order = [str(n) for n in rng.permutation(NAMES)[: int(rng.integers(1, 6))]]
    if rng.random() < 0.5:
        with np.errstate(all="ignore"), same_random_numbers(0):
            state = {k: v.copy() for k, v in arrays_of(other.root).items()}
            try:
                fx.shape_prop(changed, *[np.array(v) for v in example])
            except Exception:
                return
            for k, v in arrays_of(other.root).items():
                v[...] = state[k]
            for literal, was in other.literals:  # the run behind shape_prop may write them
                literal[...] = was
    takes: list[int] | None = None
    done = []
    for name in order:
        if name == "fuse_conv_bn":
            done.append(name)
            passes.fuse_conv_bn(changed, inplace=True)
            continue
        done.append(name)
        result = passes.PASSES[name](changed)
        changed.graph.lint()
        if name == "replace_params_with_constants":
            takes = list(result)
    try:
        compare(Side(program, gm, None, params), Side(other, changed, takes, other_params),
                [RUNS[0], RUNS[1], RUNS[2], RUNS[int(rng.integers(3, 7))]], False)
    except Exception as error:
        error.add_note(f"after {done}")
        raise


def bump(x: Any) -> Any:
    x += 1
    return x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", np.zeros(1, np.float32))

    def forward(self, x: Any) -> Any:
        self.count += 1
        return x


@pytest.mark.parametrize("known", [False, True], ids=["", "shapes"])
def test_what_nobody_knows_stays_though_nobody_uses_it(known: bool) -> None:
    root = nn.Module()
    root.counter, root.table = Counter(), nn.Parameter(np.zeros(2, np.float32))
    g = fx.Graph()
    x, table = g.placeholder("x"), g.get_attr("table")
    g.call_function(bump, (x,))
    g.call_function(bump, (table,))
    g.call_module("counter", (x,))
    g.output([g.call_function(aten.neg.default, (x,)), g.call_function(aten.relu.default, (table,))])
    frozen, _ = pyconvbn.freeze(fx.GraphModule(root.eval(), g), np.ones(2, np.float32) if known else None)
    assert not root.table.any() and not root.counter.count.any(), "freezing ran on copies"
    value = np.ones(2, np.float32)
    first, second = frozen(value)
    assert value.tolist() == [2, 2] and first.tolist() == [-2, -2]
    assert second.tolist() == [1, 1] and root.table.tolist() == [1, 1] and root.counter.count.tolist() == [1]


def test_freezing_leaves_literals_alone_that_the_graph_writes() -> None:
    literal = np.zeros(2, np.float32)
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_function(aten.as_strided.default, (g.call_function(aten.add_.Tensor, (literal, x)), [2], [1])))
    gm = fx.GraphModule(nn.Module().eval(), g)
    frozen, _ = pyconvbn.freeze(gm, np.ones(2, np.float32))
    assert not literal.any()
    frozen(np.ones(2, np.float32))
    assert frozen(np.ones(2, np.float32)).tolist() == [2, 2] and literal.tolist() == [2, 2]


def test_shape_prop_leaves_literals_alone() -> None:
    literal = np.zeros(2, np.float32)
    g = fx.Graph()
    g.output(g.call_function(bump, (literal,)))
    fx.shape_prop(fx.GraphModule(nn.Module(), g))
    assert not literal.any()


def test_to_aten_refuses_a_slice_that_goes_backwards() -> None:
    """aten.slice has no negative steps: what to_aten made failed in each call, and in freezing."""
    gm = fx.symbolic_trace(lambda x: x[::-1])
    with pytest.raises(NotImplementedError, match="negative step"):
        fx.to_aten(gm, [(3,)])


def test_rows_name_nodes_of_the_frozen_graph() -> None:
    root = nn.Module()
    root.bn, root.bn_plan = nn.BatchNorm2d(3), nn.Identity()
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_module("bn", (g.call_function(aten.neg.default, (g.call_module("bn", (x,)),)),)))
    frozen, _ = pyconvbn.freeze(fx.GraphModule(root.eval(), g), np.ones((1, 3, 2, 2), np.float32))
    names = {node.name for node in frozen.graph.nodes}
    assert [row.outcome for row in frozen.report.folds] == ["planned", "planned"]
    assert all(row.new_node in names for row in frozen.report.folds)


def noted(check: Any, seed: int) -> None:
    try:
        check(seed)
    except BaseException as failure:
        failure.add_note(f"{check.__name__}({seed})")
        raise


@pytest.mark.parametrize("block", range(8))
def test_freezing(block: int) -> None:
    for seed in range(block, 240, 8):
        noted(check_freezing, seed)


@pytest.mark.parametrize("block", range(4))
def test_passes_in_any_order(block: int) -> None:
    for seed in range(block, 160, 4):
        noted(check_passes, seed)
