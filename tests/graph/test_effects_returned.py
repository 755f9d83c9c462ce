# SPDX-License-Identifier: BSD-3-Clause
"""Whose memory a graph returns and whose memory others have: what freezing must not make a constant or a copy of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn, ops
from pyconvbn import functional as F
from pyconvbn.fx import Graph


def returned(graph: Graph, *nodes: Any, root: Any = None) -> list[bool]:
    return _core.graph_effects(graph, root, [("returned", node) for node in nodes])


def outside(graph: Graph, *nodes: Any, root: Any = None) -> list[bool]:
    return _core.graph_effects(graph, root, [("outside", node) for node in nodes])


class Root(nn.Module):
    def __init__(self, **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            object.__setattr__(self, name, value)


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def test_only_what_the_output_holds() -> None:
    g = Graph()
    x, w, unused = (g.placeholder(n) for n in ("x", "w", "unused"))
    y = g.call_function(F.linear, (x, w))
    z = g.call_function(F.relu, (y,))
    assert returned(g, x, z) == [False, False], "there is no output yet"
    g.output(z)
    assert returned(g, x, w, unused, y, z) == [False, False, False, False, True]


VIEWS: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("call_method", "view", (2, -1)), ("call_method", "reshape", ((2, -1),)), ("call_method", "t", ()),
    ("call_method", "swapaxes", (0, 1)), ("call_function", operator.getitem, (0,)),
    ("call_function", operator.getitem, ((slice(None), slice(0, 1)),)), ("call_function", F.flatten, (1,)),
    ("call_function", getattr, ("T",)), ("call_function", operator.pos, ()), ("call_function", F.dropout, ()),
    ("call_function", ops.aten.view.default, ([-1],)), ("call_function", ops.aten.permute.default, ([1, 0],)),
    ("call_function", ops.aten.slice.Tensor, (0, 0, 1)), ("call_function", ops.aten.detach.default, ()),
    ("call_function", ops.aten.to.dtype, (np.float32,)), ("call_function", ops.aten.expand.default, ([2, 2],)),
    ("call_method", "nobody_knows_this", ()), ("call_function", lambda v: v, ()),
]  # fmt: skip


@pytest.mark.parametrize("op, target, rest", VIEWS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_views_and_views_of_views(op: str, target: Any, rest: tuple[Any, ...]) -> None:
    g = Graph()
    x, other = g.placeholder("x"), g.placeholder("other")
    v = g.create_node(op, target, (x, *rest))
    w = g.call_method("reshape", (v, -1))
    g.output(w)
    assert returned(g, x, v, w, other) == [True, True, True, False]
    copied = Graph()
    x = copied.placeholder("x")
    v = copied.create_node(op, target, (x, *rest))
    copied.output(copied.call_function(F.relu, (v,)))
    assert returned(copied, x, v) == [False, False]


def test_unsafe_view_is_a_copy() -> None:
    g = Graph()
    x = g.placeholder("x")
    g.output(g.call_function(ops.aten._unsafe_view.default, (x, [-1])))
    assert returned(g, x) == [False]
    a = ones(2, 3)
    assert not np.shares_memory(a, ops.aten._unsafe_view.default(a, [-1]))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: v, lambda v: (v,), lambda v: [v, None], lambda v: {"a": v}, lambda v: ({"a": [(1, v)]}, 2.0),
        lambda v: {"deep": {"deeper": (v,)}},
    ],
    ids=["alone", "tuple", "list", "dict", "nested", "dicts"],
)  # fmt: skip
def test_nested_outputs(wrap: Callable[[Any], Any]) -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(wrap(g.call_method("reshape", (x, -1))))
    assert returned(g, x, y) == [True, False]


def test_an_output_without_memory() -> None:
    g = Graph()
    x = g.placeholder("x")
    g.output((None, 1, 2.0, "text"))
    assert returned(g, x) == [False]


IN_PLACE: list[tuple[str, Any, tuple[Any, ...]]] = [
    ("call_function", operator.iadd, (1.0,)), ("call_function", ops.aten.add_.Tensor, (1.0,)),
    ("call_method", "relu_", ()), ("call_method", "copy_", (0.0,)), ("call_method", "anything_", ()),
]  # fmt: skip


@pytest.mark.parametrize("op, target, rest", IN_PLACE, ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_result_of_an_in_place_operator_is_its_argument(op: str, target: Any, rest: tuple[Any, ...]) -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(g.create_node(op, target, (x, *rest)))
    assert returned(g, x, y) == [True, False]


def test_out_is_what_is_returned() -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(g.call_function(F.relu, (x,), {"out": y}))
    assert returned(g, x, y) == [False, True]


# ---- lists ---------------------------------------------------------------------------------------


def test_getitem_of_chunk() -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    parts = g.call_function(ops.aten.chunk.default, (x, 2))
    fresh = g.call_function(operator.getitem, (g.call_method("chunk", (y, 2)), 1))
    g.output((g.call_function(operator.getitem, (parts, 0)), g.call_function(F.relu, (fresh,))))
    assert returned(g, x, parts, y, fresh) == [True, True, False, False]


def lists(name: str, g: Graph, parts: Any, others: Any, y: Any) -> Any:
    call = g.call_function
    return {
        "literal + literal": lambda: call(operator.add, ([parts], [y])),
        "node + literal": lambda: call(operator.add, (parts, [y])),
        "literal + node": lambda: call(operator.add, ([y], parts)),
        "node + node": lambda: call(operator.add, (parts, others)),
        "node * 2": lambda: call(operator.mul, (parts, 2)),
        "2 * node": lambda: call(operator.mul, (2, parts)),
        "concat": lambda: call(operator.concat, (parts, others)),
        "iadd": lambda: call(operator.iadd, (others, parts)),
        "slice": lambda: call(operator.getitem, (parts, slice(0, 1))),
        "slice + node": lambda: call(operator.add, (call(operator.getitem, (parts, slice(0, 1))), others)),
        "sum of sums": lambda: call(operator.add, (call(operator.add, (parts, others)), others)),
    }[name]()


LISTS = ["literal + literal", "node + literal", "literal + node", "node + node", "node * 2", "2 * node", "concat",
         "iadd", "slice", "slice + node", "sum of sums"]  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists_hold_what_they_were_made_of(name: str) -> None:
    """Python's operators on lists copy the list, not the arrays; checked by running the graph too."""
    g = Graph()
    x, y, z = (g.placeholder(n) for n in "xyz")
    parts, others = (g.call_function(ops.aten.chunk.default, (v, 2)) for v in (x, z))
    g.output(lists(name, g, parts, others, y))
    arrays = [ones(4), ones(3), ones(2)]
    result = fx.GraphModule({}, g)(*arrays)
    flat = [a for item in result for a in (item if isinstance(item, (list, tuple)) else [item])]
    shared = [any(np.shares_memory(r, a) for r in flat) for a in arrays]
    claimed = returned(g, x, y, z)
    assert any(shared) and all(c or not s for c, s in zip(claimed, shared, strict=True)), (claimed, shared)


def test_an_entry_put_into_a_list_is_in_it() -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    parts = g.call_function(ops.aten.chunk.default, (x, 2))
    g.call_function(operator.setitem, (parts, 0, y))
    g.output(parts)
    assert returned(g, x, y) == [True, True]


def test_arrays_from_lists_are_arrays() -> None:
    """Arithmetic with an element of a list is arithmetic: nothing is joined that would keep parameters alive."""
    g = Graph()
    x, w, b = (g.placeholder(n) for n in "xwb")
    part = g.call_function(operator.getitem, (g.call_method("chunk", (x, 2)), 0))
    both = g.call_function(operator.getitem, (g.call_function(operator.add, ([part], [w])), 0))
    g.output(g.call_function(operator.mul, (g.call_function(operator.add, (both, b)), 2.0)))
    assert returned(g, x, w, b) == [False, False, False]


# ---- attributes, literals ------------------------------------------------------------------------


def test_arrays_that_share_memory() -> None:
    base = ones(10)
    root = Root(a=base[:6], b=base[5:], c=base[6:], d=ones(3))
    g = Graph()
    a, b, c, d = (g.get_attr(n) for n in "abcd")
    g.output(a)
    assert returned(g, a, b, d, root=root) == [True, True, False]
    assert returned(g, c, root=root) == [True], "it touches b, which overlaps a"
    without_b = Graph()
    a, c, d = (without_b.get_attr(n) for n in "acd")
    without_b.output(a)
    assert returned(without_b, a, c, d, root=root) == [True, False, False], "ranges that only touch"
    assert returned(without_b, c, d) == [True, True], "without the module any may be any"


def test_interleaved_and_reversed_ranges() -> None:
    base = ones(4, 6)
    root = Root(even=base[:, ::2], odd=base[:, 1::2], back=base[::-1, ::-1], empty=base[2:2])
    g = Graph()
    even, odd, back, empty = (g.get_attr(n) for n in ("even", "odd", "back", "empty"))
    g.output(odd)
    assert returned(g, even, odd, back, empty, root=root) == [True, True, True, False]


def test_literals() -> None:
    weight = ones(4)
    root = Root(w=weight[1:], other=ones(4))
    g = Graph()
    w, other = g.get_attr("w"), g.get_attr("other")
    g.output([{"a": weight[:2]}])
    assert returned(g, w, other, root=root) == [True, False]
    through_a_call = Graph()
    w = through_a_call.get_attr("w")
    through_a_call.output(through_a_call.call_function(ops.aten.slice.Tensor, (weight, 0, 0, 2)))
    assert returned(through_a_call, w, root=root) == [True]


def test_plain_attributes_have_no_memory() -> None:
    for value in (2.0, 3, True, None, "text", (1, 2.0), np.float32(2), np.bool_(True), 1j):
        g = Graph()
        x, w = g.placeholder("x"), g.get_attr("w")
        scale = g.get_attr("scale")
        g.output((g.call_function(operator.mul, (x, w)), scale))
        root = Root(w=ones(2), scale=value)
        assert returned(g, x, w, root=root) == [False, False], value
        assert outside(g, g.find_nodes(op="call_function")[0], root=root) == [False], value


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, np.zeros(1, "V4")[0], object()], ids=["list", "dict", "V4", "any"])
def test_other_objects_may_hold_any_array(value: Any) -> None:
    g = Graph()
    w, thing = g.get_attr("w"), g.get_attr("thing")
    g.output(thing)
    assert returned(g, w, root=Root(w=ones(2), thing=value)) == [True]


def test_lists_held_by_the_module() -> None:
    w = ones(2)
    root = Root(w=w, held=[w], more=[ones(1)])
    g = Graph()
    a, held, more = (g.get_attr(n) for n in ("w", "held", "more"))
    both = g.call_function(operator.add, (more, held))
    g.output(g.call_function(operator.getitem, (both, 1)))
    assert fx.GraphModule({"w": w, "held": root.held, "more": root.more}, g)() is w
    assert returned(g, a, root=root) == [True]


def test_a_returned_module_brings_its_arrays() -> None:
    root = Root(conv=nn.Conv2d(1, 1, 1), other=nn.Conv2d(1, 1, 1))
    g = Graph()
    weight, conv, other = g.get_attr("conv.weight"), g.get_attr("conv"), g.get_attr("other.weight")
    g.output(g.call_function(getattr, (conv, "weight")))
    assert returned(g, weight, other, root=root) == [True, False]


# ---- modules -------------------------------------------------------------------------------------


class GivesItsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = ones(3)

    def forward(self, x: Any) -> Any:
        return self.buffer


def test_modules() -> None:
    root = Root(conv=nn.Conv2d(1, 1, 1), identity=nn.Identity(), mine=GivesItsBuffer())
    g = Graph()
    x = g.placeholder("x")
    weight, buffer = g.get_attr("conv.weight"), g.get_attr("mine.buffer")
    y = g.call_module("conv", (x,))
    i = g.call_module("identity", (y,))
    g.output(i)
    assert returned(g, x, weight, buffer, y, i, root=root) == [False, False, False, True, True]
    g.erase_node(g.output_node())
    g.output(g.call_module("mine", (y,)))
    assert returned(g, buffer, y, weight, x, root=root) == [True, True, False, False]


def test_a_hooked_layer_may_return_anything_it_knows() -> None:
    conv = nn.Conv2d(1, 1, 1)
    root = Root(conv=conv)
    g = Graph()
    x, weight = g.placeholder("x"), g.get_attr("conv.weight")
    g.output(g.call_module("conv", (x,)))
    assert returned(g, x, weight, root=root) == [False, False]
    conv.forward = lambda v: conv.weight
    assert returned(g, x, weight, root=root) == [True, True]


def test_unknown_callables_may_return_what_they_are_given() -> None:
    g = Graph()
    x, y, z = (g.placeholder(n) for n in "xyz")
    g.output(g.call_function(lambda *a, **k: a, (x, [1, (y,)]), {}))
    assert returned(g, x, y, z) == [True, True, False]


def test_nodes_made_since_the_analysis_or_by_others() -> None:
    g, other = Graph(), Graph()
    x, foreign = g.placeholder("x"), other.placeholder("x")
    g.output(x)
    with pytest.raises(RuntimeError):
        returned(g, foreign)
    with pytest.raises(TypeError):
        returned(g, 3)


# ---- outside -------------------------------------------------------------------------------------


def test_what_others_may_have() -> None:
    root = Root(w=ones(2), conv=nn.Conv2d(1, 1, 1), mine=GivesItsBuffer())
    g = Graph()
    x, w = g.placeholder("x"), g.get_attr("w")
    y = g.call_function(F.relu, (x,))
    view = g.call_method("reshape", (y, -1))
    of_input = g.call_method("reshape", (x, -1))
    literal = g.call_method("reshape", (ones(3), -1))
    layer = g.call_module("conv", (y,))
    unknown = g.call_function(lambda: None)
    mine = g.call_module("mine", (g.call_function(F.relu, (x,)),))
    assert outside(g, x, w, of_input, literal, unknown, mine, root=root) == [True] * 6
    assert outside(g, y, view, layer, root=root) == [False] * 3


def test_random_graphs_against_numpy(rng: np.random.Generator) -> None:
    """What NumPy says is shared with the result is never said not to be returned."""
    views: list[Callable[[Graph, Any], Any]] = [
        lambda g, v: g.call_method("reshape", (v, 6, 4)),
        lambda g, v: g.call_function(operator.getitem, (v, slice(1, 4))),
        lambda g, v: g.call_function(getattr, (v, "T")), lambda g, v: g.call_function(F.relu, (v,)),
        lambda g, v: g.call_function(operator.add, (v, 1.0)),
        lambda g, v: g.call_function(operator.getitem, (g.call_function(ops.aten.chunk.default, (v, 2)), 0)),
        lambda g, v: g.call_function(operator.getitem, (
            g.call_function(operator.add, ([v], g.call_function(ops.aten.chunk.default, (v, 2)))), 1)),
    ]  # fmt: skip
    truths = 0
    for _ in range(60):
        g = Graph()
        held = rng.standard_normal((4, 6)).astype(np.float32)
        arrays = [rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2)]
        sources = [g.placeholder("p0"), g.placeholder("p1"), g.get_attr("w"), g.get_attr("v")]
        nodes = list(sources)
        for _ in range(12):
            nodes.append(views[rng.integers(len(views))](g, nodes[rng.integers(len(nodes))]))
        g.output([nodes[rng.integers(len(nodes))], {"a": (nodes[rng.integers(len(nodes))],)}])
        gm = fx.GraphModule({"w": held, "v": held[1:3]}, g)
        try:
            result = gm(*arrays)
        except (ValueError, IndexError, TypeError):  # shapes that do not go together
            continue
        flat = [result[0], result[1]["a"][0]]
        claimed = returned(g, *sources, root=gm)
        for claim, array in zip(claimed, [*arrays, held, held[1:3]], strict=True):
            shared = any(np.shares_memory(r, array) for r in flat)
            truths += shared
            assert claim or not shared, g
    assert truths > 20
