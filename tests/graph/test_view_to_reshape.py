# SPDX-License-Identifier: BSD-3-Clause
"""passes.view_to_reshape: which views become reshapes, and those of which a copy could be told."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyconvbn import fx, ops, passes
from pyconvbn.fx import Graph

aten = ops.aten
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def built(build: Callable[[Graph, Any], Any], **attributes: Any) -> Any:
    """A graph of one input x whose output is what `build` gives."""
    g = Graph()
    x = g.placeholder("x")
    g.output(build(g, x))
    return fx.GraphModule(attributes, g)


def run(gm: Any, count: int) -> list[tuple[str, str, str | None]]:
    """(node, reason, blocking) of each row; what holds always is checked here."""
    ids, text = [node.name for node in gm.graph.nodes], str(gm.graph)
    rows: list[Any] = []
    assert passes.view_to_reshape(gm, report=rows) == count == sum(row.outcome == "done" for row in rows)
    gm.graph.lint()
    assert [node.name for node in gm.graph.nodes] == ids and (count > 0 or str(gm.graph) == text)
    assert all(row.step == "view" and (row.outcome == "done") == (row.reason == "OK") == (not row.hint) for row in rows)
    after = str(gm.graph)
    assert passes.view_to_reshape(gm) == 0 and str(gm.graph) == after, "a second run changes nothing"
    return [(row.node, row.reason, row.blocking) for row in rows]


def relu(g: Graph, v: Any) -> Any:
    return g.call_function(aten.relu.default, (v,))


@pytest.mark.parametrize("target", [aten.view.default, aten._unsafe_view.default], ids=["view", "_unsafe_view"])
@pytest.mark.parametrize("keywords", [False, True], ids=["positions", "keywords"])
def test_operators(target: Any, keywords: bool) -> None:
    def build(g: Graph, x: Any) -> Any:
        v = g.call_function(target, (x,), {"size": [6, -1]}) if keywords else g.call_function(target, (x, [6, -1]))
        v.meta["mine"] = 3
        return relu(g, v)

    gm = built(build)
    wanted = gm(X)
    assert [reason for _, reason, _ in run(gm, 1)] == ["OK"]
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.reshape.default)
    assert node.meta["mine"] == 3 and node.args[1:] == ([6, -1],) and node.kwargs == {}
    np.testing.assert_array_equal(gm(X), wanted)


def test_a_golden_graph() -> None:
    gm = built(lambda g, x: relu(g, g.call_function(aten.view.default, (relu(g, x), [-1]))))
    names = ["x", "relu_default", "view_default", "relu_default_1", "output"]
    assert [node.name for node in gm.graph.nodes] == names
    run(gm, 1)
    assert [str(node.target) for node in gm.graph.nodes] == [
        "x", "aten.relu.default", "aten.reshape.default", "aten.relu.default", "output"]  # fmt: skip


def test_strides_that_allow_no_view_are_no_obstacle_afterwards() -> None:
    gm = built(lambda g, x: relu(g, g.call_function(aten.view.default, (g.call_function(aten.t.default, (x,)), [-1]))))
    with pytest.raises(ValueError, match="reshape"):
        gm(X[0])
    run(gm, 1)
    np.testing.assert_array_equal(gm(X[0]), X[0].T.reshape(-1))


def shape(g: Graph, x: Any) -> Any:
    return g.call_function(getattr, (x, "shape"))


def length(g: Graph, x: Any, i: int = 0) -> Any:
    return g.call_function(operator.getitem, (shape(g, x), i))


SIZES: dict[str, Callable[[Graph, Any], tuple[Any, ...]]] = {
    "ints": lambda g, x: (6, -1),
    "tuple": lambda g, x: ((6, -1),),
    "list": lambda g, x: ([6, -1],),
    "one": lambda g, x: (-1,),
    "size": lambda g, x: (length(g, x), -1),
    "two sizes": lambda g, x: (length(g, x), g.call_function(operator.mul, (length(g, x, 1), length(g, x, 2)))),
    "last size": lambda g, x: (-1, length(g, x, 2)),
    "shape": lambda g, x: (shape(g, x),),
    "part of shape": lambda g, x: (g.call_function(operator.add, (g.call_function(operator.getitem, (
        shape(g, x), slice(0, 1))), (-1,))),),
    "sizes in a list": lambda g, x: ([length(g, x), -1],),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_method_with_sizes(name: str) -> None:
    gm = built(lambda g, x: relu(g, g.call_method("view", (x, *SIZES[name](g, x)))))
    assert [row[:2] for row in run(gm, 1)] == [("view", "OK")]
    assert gm(X).size == 24
    np.testing.assert_array_equal(gm(X).ravel(), X.ravel())


def test_the_method_with_size_by_keyword() -> None:
    gm = built(lambda g, x: relu(g, g.call_method("view", (x,), {"size": (4, 6)})))
    run(gm, 1)
    assert gm(X).shape == (4, 6)


DTYPES: dict[str, Callable[[Graph, Any], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "class": lambda g, x: ((np.int8,), {}),
    "dtype": lambda g, x: ((np.dtype("int32"),), {}),
    "text": lambda g, x: (("i4",), {}),
    "None": lambda g, x: ((None,), {}),
    "nothing": lambda g, x: ((), {}),
    "node": lambda g, x: ((g.call_function(getattr, (x, "dtype")),), {}),
    "keyword": lambda g, x: ((), {"dtype": np.int32}),
    "subarray": lambda g, x: (((np.float32, 2),), {}),
    "subarray of a node": lambda g, x: (((g.call_function(getattr, (x, "dtype")), 2),), {}),
    "array class": lambda g, x: ((np.ndarray,), {}),
}


@pytest.mark.parametrize("name", DTYPES)
def test_the_method_with_a_dtype_stays(name: str) -> None:
    def build(g: Graph, x: Any) -> Any:
        args, kwargs = DTYPES[name](g, x)
        return g.call_function(operator.add, (g.call_method("view", (x, *args), kwargs), 1))

    gm = built(build)
    before: Any = None
    try:
        before = gm(X)
    except (TypeError, ValueError):
        assert name.startswith(("subarray", "None"))
    assert run(gm, 0) == [("view", "UNSUPPORTED", None)]
    if before is not None:
        np.testing.assert_array_equal(gm(X), before)


def test_unknown_sizes_stay() -> None:
    """A node that may be a dtype."""
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(relu(g, g.call_method("view", (x, y))))
    assert run(fx.GraphModule({}, g), 0) == [("view", "UNSUPPORTED", None)]


def test_calls_that_do_not_bind_stay() -> None:
    gm = built(lambda g, x: relu(g, g.call_function(aten.view.default, (x,))))
    assert run(gm, 0) == [("view_default", "UNSUPPORTED", None)]


# ---- a copy would be noticed ---------------------------------------------------------------------


def add_(g: Graph, v: Any) -> Any:
    return g.call_function(aten.add_.Tensor, (v, 1.0))


def view(g: Graph, x: Any, unsafe: bool = False) -> Any:
    return g.call_function(aten._unsafe_view.default if unsafe else aten.view.default, (x, [-1]))


def test_written_through_the_view() -> None:
    def build(g: Graph, x: Any) -> Any:
        add_(g, view(g, x))
        return relu(g, x)

    gm = built(build)
    assert run(gm, 0) == [("view_default", "MUTATED", "add__tensor")]
    x = X.copy()
    np.testing.assert_array_equal(gm(x), X + 1)
    np.testing.assert_array_equal(x, X + 1)


def test_written_below_the_view() -> None:
    def build(g: Graph, x: Any) -> Any:
        v = view(g, x)
        add_(g, x)
        return relu(g, v)

    gm = built(build)
    assert run(gm, 0) == [("view_default", "MUTATED", "add__tensor")]
    np.testing.assert_array_equal(gm(X.copy()), (X + 1).ravel())


@pytest.mark.parametrize("which", ["copy", "base", "later"])
def test_unsafe_view_is_a_copy_that_writes_would_tell(which: str) -> None:
    def build(g: Graph, x: Any) -> Any:
        y = relu(g, x)
        v = view(g, y, unsafe=True)
        if which == "later":
            v = g.call_method("reshape", (v, 4, 6))
        add_(g, y if which == "base" else v)
        return g.call_function(operator.add, (g.call_method("reshape", (y, -1)), g.call_method("reshape", (v, -1))))

    gm = built(build)
    wanted = gm(X)
    assert run(gm, 0) == [("_unsafe_view_default", "MUTATED", "add__tensor")]
    np.testing.assert_array_equal(gm(X), wanted)


def test_what_the_caller_has_already() -> None:
    gm = built(lambda g, x: view(g, x))
    assert run(gm, 0) == [("view_default", "ALIASES_OUTPUT", "output")]
    x = X.copy()
    assert np.shares_memory(gm(x), x)
    weight = X.copy()
    gm = built(lambda g, x: view(g, g.get_attr("weight")), weight=weight)
    assert run(gm, 0) == [("view_default", "ALIASES_OUTPUT", "output")]
    assert np.shares_memory(gm(X), weight)
    gm = built(lambda g, x: view(g, g.call_function(lambda v: v, (X,))))  # a callable that nobody knows
    assert [row[1] for row in run(gm, 0)] == ["MUTATED"]
    gm = built(lambda g, x: view(g, X))
    assert run(gm, 0) == [("view_default", "ALIASES_OUTPUT", "output")]


def test_memory_of_the_graphs_own() -> None:
    """What only one output has may be a copy; of two that share memory neither."""
    gm = built(lambda g, x: {"a": [view(g, relu(g, x))]})
    run(gm, 1)
    np.testing.assert_array_equal(gm(X)["a"][0], X.ravel())

    def both(g: Graph, x: Any) -> Any:
        y = relu(g, x)
        return y, view(g, y)

    gm = built(both)
    assert run(gm, 0) == [("view_default", "ALIASES_OUTPUT", "output")]
    assert np.shares_memory(*gm(X))

    def in_a_list(g: Graph, x: Any) -> Any:
        y = relu(g, x)
        return g.call_function(operator.add, ([y], [view(g, y)]))

    gm = built(in_a_list)
    assert run(gm, 0) == [("view_default", "ALIASES_OUTPUT", "output")]
    assert np.shares_memory(*gm(X))
    gm = built(lambda g, x: relu(g, view(g, x)))
    run(gm, 1)


def test_unsafe_view_that_the_caller_gets_is_his_own() -> None:
    gm = built(lambda g, x: view(g, x, unsafe=True))
    assert run(gm, 0) == [("_unsafe_view_default", "ALIASES_OUTPUT", "output")]
    x = X.copy()
    assert not np.shares_memory(gm(x), x)

    def two(g: Graph, x: Any) -> Any:
        y = relu(g, x)
        return view(g, y, unsafe=True), view(g, y, unsafe=True)

    gm = built(two)
    assert [row[1] for row in run(gm, 0)] == ["ALIASES_OUTPUT"] * 2
    assert not np.shares_memory(*gm(X))


def test_shapes_are_kept() -> None:
    gm = built(lambda g, x: relu(g, view(g, relu(g, x))))
    fx.shape_prop(gm, X)
    before = [node.meta["tensor_meta"].shape for node in gm.graph.nodes if "tensor_meta" in node.meta]
    run(gm, 1)
    assert [node.meta["tensor_meta"].shape for node in gm.graph.nodes if "tensor_meta" in node.meta] == before


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match="gm: expected a GraphModule"):
        passes.view_to_reshape(fx.Graph())  # type: ignore[arg-type]


def test_a_failure_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _pass_params

    gm = built(lambda g, x: relu(g, view(g, relu(g, x))))
    text = str(gm.graph)

    def fail(*_: Any) -> None:
        assert str(gm.graph) != text
        raise KeyboardInterrupt

    monkeypatch.setattr(_pass_params, "add_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        passes.view_to_reshape(gm)
    assert str(gm.graph) == text
