# SPDX-License-Identifier: BSD-3-Clause
"""Common subexpressions: what counts as the same computation, and what it becomes."""

from __future__ import annotations

import operator
import sys
from collections import namedtuple
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx, passes
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from cse_util import Root, of, ones, outcomes, pair, run_cse  # noqa: E402

Point = namedtuple("Point", "a b")


def test_golden() -> None:
    gm = fx.symbolic_trace(lambda x, y: ((x + y) * 2 + (x + y) * 2) - (y + x) * 2)
    rows = run_cse(gm)
    assert outcomes(rows) == [("add_1", "into add"), ("mul_1", "into mul")]
    assert [(n.name, [str(a) for a in n.args]) for n in gm.graph.nodes][2:-1] == [
        ("add", ["x", "y"]), ("mul", ["add", "2"]), ("add_2", ["mul", "mul"]), ("add_3", ["y", "x"]),
        ("mul_2", ["add_3", "2"]), ("sub", ["add_2", "mul_2"]),
    ]
    np.testing.assert_array_equal(gm(ones(3), 2 * ones(3)), 6 * ones(3))


def test_a_third_equal_node_merges_too() -> None:
    gm = fx.symbolic_trace(lambda x: F.relu(x) + F.relu(x) + F.relu(x) + F.relu(x))
    assert outcomes(run_cse(gm)) == [("relu_1", "into relu"), ("relu_2", "into relu"), ("relu_3", "into relu")]


def test_chains() -> None:
    """What becomes equal because its inputs were merged is merged in the same run."""

    def chain(x: Any) -> Any:
        for i in range(20):
            x = F.relu(x * 2 + i)
        return x

    gm = fx.symbolic_trace(lambda x: chain(x) + chain(x))
    count = len(gm.graph)
    run_cse(gm)
    assert len(gm.graph) == count - 60
    assert list(gm.graph.output_node().args[0].args) == [gm.graph.output_node().args[0].args[0]] * 2


NAN = float("nan")
OTHER_NAN = np.array([0x7FF8000000000001], np.uint64).view(np.float64)[0].item()
ARRAY = ones(2)
OBJECT = Fraction(1, 3)

EQUAL = [
    (1, 1), (10**30, 10**30), (1.5, 1.5), (NAN, NAN), (NAN, np.array([NAN])[0].item()), (0.0, 0.0), (-0.0, -0.0), (2j, 2j),
    (complex(0.0, -0.0), complex(0.0, -0.0)), (True, True), (None, None), ("a", "a"), (b"ab", bytes([97, 98])), (..., ...),
    (np.float32, np.float32), (np.dtype("f4"), np.dtype(np.float32)), (np.float32(1), np.float32(1)),
    (np.float64(NAN), np.float64(NAN)), (np.longdouble(1) / 3, np.longdouble(1) / 3), (np.bool_(True), np.bool_(True)),
    (np.int8(3), np.int8(3)), ((1, [2, {"k": 3}]), (1, [2, {"k": 3}])), (slice(1, None, 2), slice(1, None, 2)),
    (Point(1, 2), Point(1, 2)), (ARRAY, ARRAY), (OBJECT, OBJECT), ([], []), ((), ()), ({}, {}), ([ARRAY], [ARRAY]),
]  # fmt: skip
DIFFERENT = [
    (1, 1.0), (1, True), (1.0, True), (0, False), (0.0, -0.0), (NAN, OTHER_NAN), (1, 2), (10**30, 10**30 + 1), (None, 0),
    (None, False), (10**30, 1e30), (2j, 2.0), (complex(0.0, 0.0), complex(0.0, -0.0)), (1, "1"), ("a", "b"), ("a", b"a"),
    ([1], (1,)), ([1], [1.0]), ([1, [2]], [[1], 2]), ([[], []], [[[]]]), ((), []), ({}, []), (slice(1), slice(1, None)),
    (slice(0, 1), (0, 1, None)), (Point(1, 2), (1, 2)), ({"a": 1}, {"b": 1}), ({"a": 1}, ["a", 1]), ({1: 2}, {True: 2}),
    (np.float32(1), np.float64(1)), (np.float64(1), 1.0), (np.int32(1), np.int64(1)), (np.float32(0.0), np.float32(-0.0)),
    (np.float16(1), np.float16(2)), (np.bool_(True), True), (np.float32, np.float64), (np.dtype("<f4"), np.dtype(">f4")),
    (ones(2), ones(2)), (Fraction(1, 3), Fraction(1, 3)), (np.complex64(1), np.complex128(1)), (..., None),
]  # fmt: skip


@pytest.mark.parametrize("a, b", EQUAL, ids=repr)
def test_equal_literals(a: Any, b: Any) -> None:
    rows = pair(lambda g, x: g.call_function(F.mul, (x, a)), lambda g, x: g.call_function(F.mul, (x, b)))
    assert outcomes(rows) == [("mul_1", "into mul")]


@pytest.mark.parametrize("a, b", DIFFERENT, ids=repr)
@pytest.mark.parametrize("nested", [False, True])
def test_different_literals(a: Any, b: Any, nested: bool) -> None:
    if nested:
        a, b = [(a, 1)], [(b, 1)]
    assert pair(lambda g, x: g.call_function(F.mul, (x, a)), lambda g, x: g.call_function(F.mul, (x, b))) == []


def test_a_subclass_of_a_number_is_compared_by_identity() -> None:
    class Number(np.float64):
        pass

    one = Number(1)
    assert pair(lambda g, x: g.call_function(F.mul, (x, Number(1)))) == []
    assert len(pair(lambda g, x: g.call_function(F.mul, (x, one)))) == 1


def test_no_code_of_a_literal_runs() -> None:
    class Loud:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("compared")

        def __hash__(self) -> int:
            raise RuntimeError("hashed")

    loud = Loud()
    assert pair(lambda g, x: g.call_function(F.mul, (x, Loud()))) == []
    assert len(pair(lambda g, x: g.call_function(F.mul, (x, loud)))) == 1


def test_operators_of_one_name_differ() -> None:
    def call(function: Any) -> Callable[[fx.Graph, Any], Any]:
        return lambda g, x: g.call_function(function, (x,))

    assert pair(call(F.relu), call(aten.relu.default)) == []
    for a, b in [(F.add, operator.add), (F.add, aten.add.Tensor), (operator.add, operator.sub)]:
        assert pair(lambda g, x, f=a: g.call_function(f, (x, x)), lambda g, x, f=b: g.call_function(f, (x, x))) == []
    assert pair(call(operator.neg), lambda g, x: g.call_method("neg", (x,))) == []
    assert pair(lambda g, x: g.call_function(operator.sub, (x, 1)),
                lambda g, x: g.call_function(operator.sub, (1, x))) == []


W = ones(2, 2, 3, 3)
SAME_CALLS: list[tuple[str, Any, Any, Any]] = [
    ("keyword", F.conv2d, ((W,), {}), ((), {"weight": W})),
    ("defaults", F.conv2d, ((W,), {}), ((W, None, 1, 0, 1, 1), {})),
    ("mixed", F.conv2d, ((W, None), {"groups": 1, "padding": 2}), ((W,), {"padding": 2, "stride": 1})),
    ("order", F.conv2d, ((W,), {"groups": 2, "padding": 2}), ((W,), {"padding": 2, "groups": 2})),
    ("list default", aten.conv2d.default, ((W,), {}), ((W, None, [1, 1], [0, 0], [1, 1], 1), {})),
    ("eps", F.batch_norm, ((W, W), {}), ((W, W, None, None, False, 0.1, 1e-5), {})),
    ("alpha", aten.add.Tensor, ((W,), {}), ((W,), {"alpha": 1})),
    ("out", F.relu, ((), {}), ((), {"out": None})),
]
OTHER_CALLS: list[tuple[str, Any, Any, Any]] = [
    ("another keyword", F.conv2d, ((W,), {"padding": 1}), ((W,), {"stride": 1})),
    ("another default", F.conv2d, ((W,), {}), ((W, None, 2), {})),
    ("tuple for list", aten.conv2d.default, ((W,), {}), ((W, None, (1, 1)), {})),
    ("type of eps", F.leaky_relu, ((1,), {}), ((1.0,), {})),
]


@pytest.mark.parametrize("case", SAME_CALLS, ids=lambda c: c[0])
def test_arguments_are_bound_to_the_schema(case: Any) -> None:
    _, function, (args, kwargs), (other, other_kwargs) = case
    rows = pair(lambda g, x: g.call_function(function, (x, *args), kwargs),
                lambda g, x: g.call_function(function, (x, *other), other_kwargs))
    assert [row.outcome for row in rows] == ["done"]


@pytest.mark.parametrize("case", OTHER_CALLS, ids=lambda c: c[0])
def test_other_arguments(case: Any) -> None:
    _, function, (args, kwargs), (other, other_kwargs) = case
    assert pair(lambda g, x: g.call_function(function, (x, *args), kwargs),
                lambda g, x: g.call_function(function, (x, *other), other_kwargs)) == []


def test_methods() -> None:
    def both(a: tuple[Any, ...], b: tuple[Any, ...], name: str = "reshape") -> list[FreezeRow]:
        return pair(lambda g, x: g.call_function(F.relu, (g.call_method(name, (x, *a)),)),
                    lambda g, x: g.call_function(F.relu, (g.call_method(name, (x, *b)),)))

    assert outcomes(both((2, 3), ((2, 3),))) == [("reshape_1", "into reshape"), ("relu_1", "into relu")]
    assert outcomes(both((6,), ((6,),))) == [("reshape_1", "into reshape"), ("relu_1", "into relu")]
    assert both((2, 3), (3, 2)) == [] and both((2, 3), (2, 3.0)) == [] and both((), ((),)) == []
    # transpose(0, 1) is a swap for some arrays, transpose((0, 1)) never
    assert both((0, 1), ((0, 1),), "transpose") == []
    assert len(both((1, 0), (1, 0), "transpose")) == 2
    assert len(both((0,), (0,), "sum")) == 2 and both((0,), (1,), "sum") == []


def test_a_size_that_may_be_a_sequence() -> None:
    def build(g: fx.Graph, x: Any) -> Any:
        n = g.call_method("size", (x,))
        a = g.call_function(F.relu, (g.call_method("reshape", (x, n)),))
        return g.call_function(F.add, (a, g.call_function(F.relu, (g.call_method("reshape", (x, (n,))),))))

    assert run_cse(of(build)) == []


def test_getattr_with_and_without_a_default() -> None:
    def both(a: tuple[Any, ...], b: tuple[Any, ...]) -> list[FreezeRow]:
        return pair(lambda g, x: g.call_function(F.relu, (g.call_function(getattr, (x, *a)),)),
                    lambda g, x: g.call_function(F.relu, (g.call_function(getattr, (x, *b)),)))

    assert both(("T",), ("T", None)) == []
    assert len(both(("T",), ("T",))) == 2 and len(both(("T", None), ("T", None))) == 2


def test_views_slices_and_items() -> None:
    def forward(x: Any) -> Any:
        a = F.relu(x[1:, ::2][0]) + F.relu(x.transpose(1, 0))
        return a + F.relu(x[1:, ::2][0]) + F.relu(x.transpose(1, 0)) + F.relu(x[1:, ::3][0])

    gm = fx.symbolic_trace(forward)
    rows = run_cse(gm)
    assert outcomes(rows) == [("getitem_2", "into getitem"), ("getitem_3", "into getitem_1"), ("relu_2", "into relu"),
                              ("transpose_1", "into transpose"), ("relu_3", "into relu_1")]


def test_lists_of_results() -> None:
    def forward(x: Any) -> Any:
        a, b = aten.split.Tensor(x, 2)[0], aten.split.Tensor(x, 2)[1]
        return a * b + aten.split.Tensor(x, 2)[0] * aten.chunk.default(x, 2)[1] + aten.chunk.default(x, 2)[1]

    gm, x = fx.symbolic_trace(forward), np.arange(8.0, dtype=np.float32).reshape(4, 2)
    want = gm(x)
    rows = run_cse(gm)
    assert outcomes(rows) == [("split_tensor_1", "into split_tensor"), ("split_tensor_2", "into split_tensor"),
                              ("getitem_2", "into getitem"), ("chunk_default_1", "into chunk_default"),
                              ("getitem_4", "into getitem_3")]
    np.testing.assert_array_equal(gm(x), want)


def test_nested_arguments() -> None:
    def call(g: fx.Graph, x: Any, *rest: Any) -> Any:
        return g.call_function(F.cat, ([x, g.call_function(F.relu, (x,)), *rest], 0))

    assert outcomes(pair(call)) == [("relu_1", "into relu"), ("cat_1", "into cat")]
    assert outcomes(pair(call, lambda g, x: call(g, x, x))) == [("relu_1", "into relu")]


def test_a_user_of_many_duplicates() -> None:
    """Its arguments are rewritten as a whole, nested ones and keywords too; a dict of them stays what it is."""

    graph = fx.Graph()
    x = graph.placeholder("x")
    many = [graph.call_function(operator.add, (graph.call_function(F.relu, (x,)), i % 3)) for i in range(40)]
    cat = graph.call_function(F.cat, ([x, *many], 0))
    other = graph.call_function(F.cat, (), {"tensors": [many[7], x, *many[8:]], "dim": 0})
    graph.output({"a": cat, "b": [other]})
    gm = fx.GraphModule(Root(), graph)
    value = np.array([-1.0, 2.0], np.float32)
    want = gm(value)
    assert len(run_cse(gm)) == 39 + 37
    got = gm(value)
    np.testing.assert_array_equal(got["a"], want["a"])
    np.testing.assert_array_equal(got["b"][0], want["b"][0])
    assert [n.op for n in gm.graph.nodes].count("call_function") == 1 + 3 + 2
