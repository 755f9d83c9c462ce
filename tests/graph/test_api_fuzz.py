# SPDX-License-Identifier: BSD-3-Clause
"""Random calls with whatever arguments: nodes that are alive, erased, of another graph or the root, and things that are
no nodes at all. Every call either works or raises one of the expected exceptions, and the graph stays exact."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest

from pyconvbn import fx
from pyconvbn.fx.node import map_arg

EXPECTED = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, ZeroDivisionError)


def check(graph: fx.Graph) -> None:
    """Users and inputs say the same as the arguments, both ways, names are unique."""
    nodes = list(graph.nodes)
    assert len(nodes) == len(graph.nodes) == len({n.name for n in nodes})
    assert [*reversed(graph.nodes)] == nodes[::-1]
    users: dict[fx.Node, set[fx.Node]] = {n: set() for n in nodes}
    for node in nodes:
        inputs: dict[fx.Node, None] = {}
        map_arg((node.args, node.kwargs), lambda n: inputs.setdefault(n))
        assert list(inputs) == node.all_input_nodes
        for n in inputs:
            users[n].add(node)
    for node, by in users.items():
        assert set(node.users) == by and len(node.users) == len(by)


class Fuzz:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.graph = fx.Graph()
        self.other = fx.Graph()
        self.nodes: list[fx.Node] = [self.graph.placeholder("x"), self.other.placeholder("z"), self.graph._root]
        self.snapshots: list[Any] = []
        self.iterators: list[Any] = []

    def node(self) -> Any:
        if self.rng.random() < 0.05:
            return self.rng.choice([None, 3, "x", self.graph])
        if self.rng.random() < 0.6:
            alive = [n for n in self.nodes[-30:] if not n._erased]
            return self.rng.choice(alive or self.nodes)
        return self.rng.choice(self.nodes)

    def value(self, depth: int = 0) -> Any:
        kind = self.rng.randrange(12)
        if kind < 4 or depth > 3:
            return self.node()
        if kind < 7:
            return self.rng.choice([None, 1, 2.5, "s", 10**30, ..., len, object(), self.graph])
        items = [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        if kind == 7:
            return {self.rng.choice(["a", "b", 1, (2,)]): item for item in items}
        if kind == 8:
            return slice(*(items + [None] * 3)[:3])
        return tuple(items) if kind < 10 else items

    def args(self) -> Any:
        return self.rng.choice([tuple(self.value() for _ in range(self.rng.randrange(4))), None, [1], ()])

    def kwargs(self) -> Any:
        return self.rng.choice([None, {}, {"k": self.value()}, {"a": self.value(), "b": self.value()}, {1: 2}])

    def callback(self, user: fx.Node) -> Any:
        if self.rng.random() < 0.2:
            self.step()
        return 1 / self.rng.choice([0, 1, 1, 1]) > self.rng.random()

    def keep(self, node: Any) -> None:
        if isinstance(node, fx.Node):
            self.nodes.append(node)

    def copies(self) -> None:
        for again in (copy.deepcopy(self.graph), pickle.loads(pickle.dumps(self.graph))):
            check(again)
            assert [n.name for n in again.nodes] == [n.name for n in self.graph.nodes]

    def calls(self) -> list[Callable[[], Any]]:
        g, rng = self.graph, self.rng
        op = rng.choice(["placeholder", "get_attr", "call_function", "call_method", "call_module", "output", "x"])
        target = rng.choice(["a", "b.c", len, operator.add, 3])
        return [
            lambda: self.keep(g.create_node(op, target, self.args(), self.kwargs(), rng.choice([None, "n", "m_1", 3]))),
            lambda: self.keep(g.call_function(operator.add, self.args(), self.kwargs())),
            lambda: self.keep(g.call_method("m", self.args())),
            lambda: g.erase_node(self.node()),
            lambda: g.erase_node(next(n for n in reversed(g.nodes) if not n.users)),
            lambda: setattr(self.node(), "args", self.args()),
            lambda: setattr(self.node(), "kwargs", self.kwargs()),
            lambda: self.node().update_arg(rng.randrange(-2, 3), self.value()),
            lambda: self.node().insert_arg(rng.randrange(-1, 3), self.value()),
            lambda: self.node().update_kwarg("k", self.value()),
            lambda: self.node().replace_all_uses_with(self.node()),
            lambda: self.node().replace_all_uses_with(self.node(), self.callback, propagate_meta=rng.random() < 0.3),
            lambda: self.node().replace_input_with(self.node(), self.node()),
            lambda: self.node().append(self.node()),
            lambda: self.node().prepend(self.node()),
            lambda: g.inserting_before(self.node()),
            lambda: g.inserting_after(self.node()),
            lambda: self.node()._rename("n"),
            lambda: setattr(self.node(), "target", target),
            lambda: setattr(self.node(), "meta", {"n": self.node()}),
            lambda: self.node().meta.update(k=self.value()),
            lambda: setattr(self.node(), "type", self.node()),
            lambda: self.snapshots.append(g._snapshot()),
            lambda: g._restore(self.snapshots.pop(rng.randrange(len(self.snapshots)))),
            lambda: self.snapshots.clear(),
            lambda: self.iterators.append(g._iter(rng.random() < 0.5)),
            lambda: [next(it, None) for it in self.iterators],
            lambda: self.iterators.pop(),
            lambda: g.eliminate_dead_code(self.callback),  # type: ignore[arg-type]
            lambda: g.find_nodes(op="call_function", target=operator.add),
            lambda: (self.node() < self.node(), self.node().users == self.node().users, hash(self.node())),
            lambda: [self.node().next, self.node().prev, self.node().is_impure(), self.node().format_node()],
            lambda: (self.node() in self.node().users, list(self.node().users), self.node().all_input_nodes),
            lambda: self.copies() if rng.random() < 0.2 else None,
            lambda: g._clear() if rng.random() < 0.1 else None,
            lambda: gc.collect(0),
            lambda: self.nodes.__delitem__(slice(3, rng.randrange(3, 20))) if rng.random() < 0.2 else None,
        ]

    def step(self) -> None:
        try:
            self.rng.choice(self.calls())()
        except StopIteration:
            pass
        except EXPECTED:
            pass


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(seed: int) -> None:
    fuzz = Fuzz(seed)
    old = gc.get_threshold()
    gc.set_threshold(20 if seed % 2 else 700, 2, 2)
    try:
        for i in range(400):
            fuzz.step()
            if i % 5 == 0:
                check(fuzz.graph)
    finally:
        gc.set_threshold(*old)
    assert len(fuzz.other.nodes) == 1
    check(fuzz.graph)
