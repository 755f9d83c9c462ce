# SPDX-License-Identifier: BSD-3-Clause
"""Nothing leaks: what a graph holds dies with it, cycles through it are collected, references are counted right."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx


class Thing:
    """Something that can be watched, called and compared."""

    def __call__(self) -> None: ...


@pytest.fixture(autouse=True)
def no_automatic_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(*refs: weakref.ref[Any]) -> list[bool]:
    return [ref() is not None for ref in refs]


def build(things: list[Any]) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x", type_expr=things[0])
    node = graph.call_function(things[1], (x, things[2], [things[3], {"k": (things[4], slice(None, things[5]))}]))
    node.meta["thing"] = things[6]
    graph.call_function(len, (), {"k": things[7], "n": node})
    graph.output(node)
    return graph


def test_everything_dies_with_the_graph_at_once() -> None:
    things = [Thing() for _ in range(8)]
    refs = [weakref.ref(thing) for thing in things]
    graph = build(things)
    things.clear()
    assert all(alive(*refs))
    del graph
    assert not any(alive(*refs)), "without the garbage collector"


def test_erased_nodes_let_go_at_once() -> None:
    things = [Thing() for _ in range(8)]
    refs = [weakref.ref(thing) for thing in things]
    graph = build(things)
    things.clear()
    nodes = list(graph.nodes)
    for node in reversed(nodes):
        graph.erase_node(node)
    assert not any(alive(*refs)), "the Node objects are still there, the graph too"


def test_replaced_values_are_let_go() -> None:
    graph = fx.Graph()
    first, second, third, fourth = (Thing() for _ in range(4))
    refs = [weakref.ref(t) for t in (first, second, third, fourth)]
    node = graph.call_function(first, (second,), type_expr=third)
    node.meta["k"] = fourth
    del first, second, third, fourth
    node.target = len
    node.args = (1,)
    node.type = None
    node.meta = {}
    assert not any(alive(*refs))


@pytest.mark.parametrize("how", ["meta", "args", "module", "graph_attribute", "type", "target", "iterator", "users"])
def test_cycles_are_collected(how: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    thing = Thing()
    thing.array = np.zeros(3)  # type: ignore[attr-defined]
    if how == "meta":
        x.meta["self"] = x
        x.meta["thing"] = thing
    elif how == "args":
        graph.call_function(len, ([thing],))
        thing.graph = graph  # type: ignore[attr-defined]
    elif how == "module":
        graph.owning_module = thing
        thing.graph = graph  # type: ignore[attr-defined]
    elif how == "graph_attribute":
        graph.me = x  # type: ignore[attr-defined]
        graph.thing = thing  # type: ignore[attr-defined]
    elif how == "type":
        x.type = thing
        thing.node = x  # type: ignore[attr-defined]
    elif how == "target":
        graph.call_function(thing)
        thing.node = x  # type: ignore[attr-defined]
    else:
        x.meta["thing"] = thing
        thing.way_back = iter(graph.nodes) if how == "iterator" else x.users  # type: ignore[attr-defined]
        next(iter(graph.nodes))
    refs = [weakref.ref(o) for o in (graph, x, thing, thing.array)]  # type: ignore[attr-defined]
    del graph, x, thing
    gc.collect()
    assert not any(alive(*refs))


def test_a_module_and_its_graph_need_no_collector() -> None:
    """The graph holds its owner weakly, so weights go when the module goes."""
    module, graph = Thing(), fx.Graph()
    module.graph = graph  # type: ignore[attr-defined]
    graph.owning_module = module
    assert graph.owning_module is module
    ref = weakref.ref(module)
    del module
    assert ref() is None
    assert graph.owning_module is None
    graph.owning_module = 3  # what takes no weak reference is held
    assert graph.owning_module == 3


def test_a_held_node_keeps_all() -> None:
    thing = Thing()
    graph = build([thing] * 8)
    ref = weakref.ref(thing)
    node = next(iter(graph.nodes))
    del graph, thing
    gc.collect()
    assert ref() is not None and node.graph.nodes is not None and node.type is ref()
    del node
    gc.collect()
    assert ref() is None


def test_a_held_capsule_keeps_the_structure_and_leaks_nothing() -> None:
    thing = Thing()
    graph = build([thing] * 8)
    ref, capsule = weakref.ref(thing), graph._capsule
    next(iter(graph.nodes)).meta["cycle"] = graph
    del graph, thing
    gc.collect()
    assert ref() is not None, "what the capsule holds is not the collector's to take"
    del capsule
    gc.collect()
    assert ref() is None


def test_snapshots_hold_and_let_go() -> None:
    graph = fx.Graph()
    thing = Thing()
    ref = weakref.ref(thing)
    node = graph.call_function(len, (thing,))
    state = graph._snapshot()
    graph.erase_node(node)
    del thing
    gc.collect()
    assert ref() is not None
    graph._restore(state)
    assert not node._erased and node.args == (ref(),)
    state = graph._snapshot()
    graph.erase_node(node)
    del state
    assert ref() is None
    node = graph.call_function(len)
    node.meta["state"] = graph._snapshot()
    ref = weakref.ref(graph)
    del graph, node
    gc.collect()
    assert ref() is None


def test_destructors_may_use_the_graph() -> None:
    graph = fx.Graph()
    seen: list[str] = []

    class Curious:
        def __del__(self) -> None:
            seen.append(str(graph))
            graph.call_function(len)

    x = graph.placeholder("x")
    node = graph.call_function(abs, (x, Curious()))
    node.meta["k"] = Curious()
    graph.erase_node(node)
    node = graph.call_function(abs, ([x, Curious()],))
    node.args = (x,)
    node.update_arg(0, Curious())
    node.update_arg(0, None)
    node.meta["k"] = Curious()
    node.meta = {}
    assert len(seen) == 5
    assert graph._count() == 2 + 5
    graph.lint()


def test_destructor_that_drops_the_graph() -> None:
    class Last:
        def __del__(self) -> None:
            box.clear()

    box = [fx.Graph()]
    node = box[0].call_function(len, (Last(),))
    box[0].erase_node(node)
    del node
    assert box == []


def test_collection_inside_a_call() -> None:
    """Collections at every allocation find a graph that is whole."""
    gc.enable()
    old = gc.get_threshold()
    gc.set_threshold(1)
    try:
        graph = fx.Graph()
        nodes = [graph.placeholder("x")]
        for i in range(60):
            args = (nodes[-1], [nodes[0], {"k": (i, nodes[i // 2])}])
            nodes.append(graph.call_function(operator.add, args, {"z": [i]}))
            nodes[-1].meta["node"] = nodes[-2]
            assert nodes[-1].args[1][1]["k"][0] == i
        copied = copy.deepcopy(graph)
        again = pickle.loads(pickle.dumps(graph))
        assert str(copied) == str(graph) == str(again)
        assert [n.all_input_nodes for n in graph.nodes] == [n.all_input_nodes for n in nodes]
    finally:
        gc.set_threshold(*old)
        gc.disable()


def operations() -> list[Callable[[], object]]:
    module = Thing()

    def create() -> None:
        graph = fx.Graph(module)
        x = graph.placeholder("x", default_value=Thing())
        y = graph.call_function(Thing(), (x, [1, {"k": Thing()}]), {"a": Thing()}, name="y", type_expr=Thing())
        graph.call_method("view", (y, "text", 10**30))
        graph.call_module("m", (y,))
        graph.get_attr("w")
        graph.output((y,))
        [*graph.nodes], [*reversed(graph.nodes)], y.users, y.args, y.kwargs, y.meta, y.all_input_nodes, y.type
        [*y.users.items()], y.next, y.prev, y.target, repr(y), hash(y), y == x, y < x

    def edit() -> None:
        graph = build([Thing() for _ in range(8)])
        nodes = list(graph.nodes)
        nodes[1].update_arg(1, Thing())
        nodes[1].insert_arg(0, nodes[0])
        nodes[1].update_kwarg("k", Thing())
        with graph.inserting_before():
            nodes[0].replace_all_uses_with(graph.placeholder("y"), lambda user: True)
        nodes[1]._rename("other")
        nodes[1].target = Thing()
        graph._restore(graph._snapshot())
        graph.eliminate_dead_code()
        graph.find_nodes(op="call_function", target=Thing())

    def fail() -> None:
        graph = fx.Graph()
        other = fx.Graph().placeholder("z")
        x = graph.placeholder("x")
        graph.call_function(len, (x,))
        loop: list[Any] = []
        loop.append(loop)
        for call in (
            lambda: graph.call_function(Thing(), (Thing(), other)),
            lambda: graph.call_function(Thing(), (Thing(), loop)),
            lambda: graph.call_function(Thing(), (Thing(), {x: 1})),
            lambda: graph.call_function(Thing(), (Thing(),), {"k": other}),
            lambda: graph.call_module(Thing()),  # type: ignore[arg-type]
            lambda: graph.create_node("none", "x"),
            lambda: graph.create_node("call_method", "x", name=3),  # type: ignore[arg-type]
            lambda: graph.erase_node(x),
            lambda: x.update_arg(3, Thing()),
            lambda: x.replace_all_uses_with(other),
            lambda: x.replace_all_uses_with(x, lambda user: 1 / 0),  # type: ignore[arg-type, return-value]
            lambda: x.args.append(3),  # type: ignore[attr-defined]
            lambda: pickle.dumps(x),
        ):
            with pytest.raises(Exception):  # noqa: B017, PT011
                call()
        loop.clear()

    def whole() -> None:
        graph = build([len, Thing, 2, 3, 4, 5, 6, 7])
        copy.deepcopy(graph)
        pickle.loads(pickle.dumps(graph))
        graph._repr_html_()
        graph._clear()

    return [create, edit, fail, whole]


@pytest.mark.parametrize("operation", operations(), ids=lambda f: f.__name__)
def test_no_reference_is_lost(operation: Callable[[], object]) -> None:
    """Neither memory of ours nor references of Python's objects grow."""

    def state() -> tuple[int, int, int]:
        gc.collect()
        return _core.alloc_stats()["live_blocks"], len(gc.get_objects()), sys.getrefcount(None)

    for _ in range(3):
        operation()
    before = state()
    for _ in range(20):
        operation()
    after = state()
    assert after[0] == before[0]
    assert after[1] - before[1] < 10
    assert abs(after[2] - before[2]) < 15
