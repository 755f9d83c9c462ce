# SPDX-License-Identifier: BSD-3-Clause
"""The same random operations on a graph of ours and on one of torch.fx: equal names, order, users, arguments, text."""

from __future__ import annotations

import math
import operator
import random
from types import ModuleType
from typing import Any

import pytest

from pyconvbn import fx

FUNCTIONS = [operator.add, operator.mul, operator.getitem, operator.neg, math.sqrt, len, getattr, max, print]
METHODS = ["view", "relu_", "size", "__add__", "HTTPGet"]
TARGETS = ["conv", "layer1.0.conv", "HTTPServer", "a.b_1", "x_1", "_w", "self", "for", "device", "q.torch", "1.2"]


def name_of(a: Any) -> Any:
    """An argument with its nodes as names, its containers as tagged tuples."""
    if isinstance(a, fx.Node) or type(a).__module__ == "torch.fx.node":
        return ("node", a.name)
    if isinstance(a, tuple):
        return ("tuple", *map(name_of, a))
    if isinstance(a, list):
        return ("list", *map(name_of, a))
    if isinstance(a, dict):
        return ("dict", *((k, name_of(v)) for k, v in a.items()))
    if isinstance(a, slice):
        return ("slice", name_of(a.start), name_of(a.stop), name_of(a.step))
    return (type(a), repr(a))


def picture(graph: Any) -> list[Any]:
    return [
        (
            n.op,
            n.name,
            n.target,
            name_of(n.args),
            name_of(n.kwargs),
            [u.name for u in n.users],
            [i.name for i in n.all_input_nodes],
            n.next.name,
            n.prev.name,
        )
        for n in graph.nodes
    ]


class Pair:
    """Two graphs that go through the same operations."""

    def __init__(self, torch: ModuleType, seed: int) -> None:
        import torch.fx as torch_fx

        self.random = random.Random(seed)
        self.graphs: tuple[Any, Any] = (fx.Graph(), torch_fx.Graph())
        self.nodes: list[tuple[Any, Any]] = []  # alive, in the order of creation

    def pick(self) -> tuple[Any, Any]:
        return self.random.choice(self.nodes)

    def value(self, depth: int = 0) -> tuple[Any, Any]:
        kind = self.random.randrange(11 if depth < 3 else 6)
        if kind < 3 and self.nodes:
            return self.pick()
        if kind < 6:
            leaf = self.random.choice([None, True, 3, -1, 2.5, "s", 10**30, 1j, ..., float])
            return leaf, leaf
        if kind == 9:
            parts = [self.value(3) for _ in range(3)]
            return slice(*(p[0] for p in parts)), slice(*(p[1] for p in parts))
        items = [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        if kind == 10:
            return {f"k{i}": v[0] for i, v in enumerate(items)}, {f"k{i}": v[1] for i, v in enumerate(items)}
        cls = tuple if kind < 8 else list
        return cls(v[0] for v in items), cls(v[1] for v in items)

    def arguments(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        args = [self.value() for _ in range(self.random.randrange(4))]
        kwargs = {f"key{i}": self.value() for i in range(self.random.choice([0, 0, 1, 2]))}
        both = [(tuple(a[i] for a in args), {k: v[i] for k, v in kwargs.items()}) for i in range(2)]
        return both[0], both[1]

    def create(self) -> None:
        kind = self.random.randrange(6)
        target: Any = self.random.choice(TARGETS)
        name = self.random.choice([None, None, None, "x", "x_1", "a b", "9", "", "conv", "device"])
        both = self.arguments()
        op = ["placeholder", "get_attr", "call_function", "call_function", "call_method", "call_module"][kind]
        if op in {"placeholder", "get_attr"}:
            both = (((), {}), ((), {}))
        elif op == "call_function":
            target = self.random.choice(FUNCTIONS)
        elif op == "call_method":
            target = self.random.choice(METHODS)
        made = [g.create_node(op, target, *both[i], name=name) for i, g in enumerate(self.graphs)]
        self.nodes.append((made[0], made[1]))

    def step(self) -> None:
        what = self.random.choice(
            ["create"] * 6
            + "before after erase replace replace_some input args kwargs".split()
            + "update insert prepend append rename".split()
        )
        if what == "create" or not self.nodes:
            self.create()
            return
        pair, other = self.pick(), self.pick()
        if what in {"before", "after"}:
            for g, n in zip(self.graphs, pair, strict=True):
                (g.inserting_before if what == "before" else g.inserting_after)(n)
        elif what == "erase":
            pair = next((p for p in reversed(self.nodes) if not p[0].users), pair)
            if not pair[0].users:
                for g in self.graphs:  # torch.fx does not notice when its insertion point is erased
                    g.inserting_after(None)
                for g, n in zip(self.graphs, pair, strict=True):
                    g.erase_node(n)
                self.nodes.remove(pair)
        elif pair == other:  # torch.fx moves the users about
            return
        elif what == "replace":
            got = [n.replace_all_uses_with(m) for n, m in zip(pair, other, strict=True)]
            assert [n.name for n in got[0]] == [n.name for n in got[1]]
        elif what == "replace_some":
            for n, m in zip(pair, other, strict=True):
                n.replace_all_uses_with(m, lambda user: len(user.name) % 2 == 0)
        elif what == "input":
            for n, m, user in zip(pair, other, self.pick(), strict=True):
                user.replace_input_with(n, m)
        elif what in {"args", "kwargs"}:
            for n, both in zip(pair, self.arguments(), strict=True):
                setattr(n, what, both[what == "kwargs"])
        elif what == "update":
            value = self.value()
            for n, v in zip(pair, value, strict=True):
                if n.args:
                    n.update_arg(len(n.args) - 1, v)
                n.update_kwarg("key1", v)
        elif what == "insert":
            value = self.value()
            for n, v in zip(pair, value, strict=True):
                n.insert_arg(len(n.args) // 2, v)
                n.args = n.args  # torch.fx appends new inputs last here; in order of use after any other change
        elif what in {"prepend", "append"}:
            for n, m in zip(pair, other, strict=True):
                getattr(n, what)(m)
        elif what == "rename":
            candidate = self.random.choice(TARGETS)
            for n in pair:
                n._rename(candidate)


@pytest.mark.parametrize("case", range(60))
def test_random_operations(torch: ModuleType, case: int) -> None:
    pair = Pair(torch, case)
    for _ in range(80):
        pair.step()
        for ours, theirs in zip(picture(pair.graphs[0]), picture(pair.graphs[1]), strict=True):
            assert ours == theirs
    for node, theirs in pair.nodes:
        assert node.op == theirs.op
    assert [n.name for n in reversed(pair.graphs[0].nodes)] == [n.name for n in reversed(pair.graphs[1].nodes)]


@pytest.mark.parametrize("case", range(20))
def test_text_of_ordered_graphs(torch: ModuleType, case: int) -> None:
    """Only created, so that arguments stand before their users; then the text, a copy, dead code."""
    pair = Pair(torch, 1000 + case)
    for _ in range(40):
        pair.create()
    some = pair.value(1)
    ours, theirs = pair.graphs
    ours.output(some[0])
    theirs.output(some[1])
    assert str(ours) == str(theirs)
    import copy

    copies = [copy.deepcopy(g) for g in pair.graphs]
    assert picture(copies[0]) == picture(copies[1])
    ours.lint()

    def impure(node: Any) -> bool:
        return node.op in {"placeholder", "output", "call_method"}

    assert ours.eliminate_dead_code(impure) == theirs.eliminate_dead_code(impure)
    assert picture(ours) == picture(theirs)


@pytest.mark.parametrize("case", range(5))
def test_many_names(torch: ModuleType, case: int) -> None:
    """Thousands of names made from random candidates and from targets."""
    import torch.fx as torch_fx

    rng = random.Random(case)
    words = ["x", "conv", "getattr", "HTTPServer", "a.b.0", "9lives", "for", "_", "__", "__len__", "é", "x_1", "x_01"]
    words += ["device", "torch", "dtype", "Tensor", "NoneType", "inf", "nan", "add_", "a-b", "a__b", "_1", "1", ""]
    words += ["self", "print_1"]
    ours, theirs = fx.Graph(), torch_fx.Graph()
    for _ in range(1500):
        word = rng.choice(words)
        while rng.random() < 0.4:
            word += rng.choice(["_1", "_", "0", ".", "A", "_10", " ", "_2", "b", "__"])
        if rng.random() < 0.5:
            pair = [g.create_node("placeholder", "x", name=word) for g in (ours, theirs)]
        else:
            if word == "":
                continue
            pair = [g.create_node("call_module", word) for g in (ours, theirs)]
        assert pair[0].name == pair[1].name, word


def test_format_of_every_kind(torch: ModuleType) -> None:
    import torch.fx as torch_fx

    texts = []
    for module in (fx, torch_fx):
        g = module.Graph()
        x = g.placeholder("x", type_expr=int)
        y = g.placeholder("y", default_value=3)
        w = g.get_attr("w.v")
        g.call_module("a.b", (x,), {"k": [w, (1,), {}]})
        g.call_method("view", (x, -1, "text", slice(y, None, 2)), type_expr=float)
        g.call_function(len, ([x, None], ...))
        g.placeholder("*args")
        g.placeholder("**kwargs")
        g.output({"a": (x, [y])})
        texts.append((str(g), [n.format_node() for n in g.nodes]))
    assert texts[0] == texts[1]
