# SPDX-License-Identifier: BSD-3-Clause
"""SubgraphMatcher: rules one by one, beside a matcher that tries everything, patterns cut out of the graph itself."""

import itertools
import operator
import random

import numpy as np
import pytest

from pyconvbn import fx, nn
from pyconvbn import functional as F
from pyconvbn.fx import Graph, Node, SubgraphMatcher, map_arg, symbolic_trace


def found(pattern, target, **flags):
    """Names of what each match binds, by the pattern's names."""
    if not isinstance(target, Graph):
        target = symbolic_trace(target)
    matches = SubgraphMatcher(pattern, **flags).match(target)
    return [{p.name: t.name if isinstance(t, Node) else t for p, t in m.nodes_map.items()} for m in matches]


# ---- rules ----------------------------------------------------------------------------------------------------------
def test_a_chain_is_found_and_described():
    matcher = SubgraphMatcher(lambda x: operator.neg(operator.add(x, 1)))
    gm = symbolic_trace(lambda a: operator.neg(operator.add(operator.neg(operator.add(a, 1)), 1)))
    first, second = matcher.match(gm)
    assert [a.name for a in first.anchors] == ["neg"]
    assert [n.name for n in first.nodes_map] == ["neg", "add", "x"]
    assert [n.name for n in first.nodes_map.values()] == ["neg", "add", "a"]
    assert [n.name for n in second.placeholder_nodes] == ["neg"]
    assert [n.name for n in second.returning_nodes] == ["neg_1"]
    assert first.name_node_map == {}


def test_placeholders_bind_anything():
    assert found(lambda x, y: operator.add(x, y), lambda a: operator.add(a, 3)) == [{"add": "add", "x": "a", "y": 3}]
    graph = Graph()
    a = graph.placeholder("a")
    graph.output(graph.call_function(operator.neg, ([a, 1, {"k": a}],)))
    [match] = SubgraphMatcher(operator.neg).match(graph)
    assert match.placeholder_nodes == [[a, 1, {"k": a}]]


def test_the_same_placeholder_binds_the_same_thing():
    def twice(x):
        return operator.add(x, x)

    assert len(found(twice, lambda a, b: operator.add(a, b))) == 0
    assert len(found(twice, lambda a, b: operator.add(a, a))) == 1
    for pair, expected in [((1, 1), 1), ((1, 1.0), 0), ((1, True), 0), ((0.0, -0.0), 0), ((2.5, 2.5), 1)]:
        graph = Graph()
        graph.output(graph.call_function(operator.add, pair))
        assert len(found(twice, graph)) == expected, pair


def test_two_placeholders_may_bind_the_same_node():
    assert found(operator.add, lambda a: operator.add(a, a)) == [{"add": "add", "a": "a", "b": "a"}]


@pytest.mark.parametrize(
    ("in_pattern", "in_target", "same"),
    [
        (1, 1, True), (1, 1.0, False), (1, True, False), (0, False, False), (0.0, -0.0, False),
        (float("nan"), float("nan"), True), ("a", "a", True), ("a", "b", False), (None, None, True), (None, 0, False),
        ([1, 2], [1, 2], True), ([1, 2], (1, 2), True), ([1, 2], [1, 2, 3], False), ([1], [1.0], False),
        ({"k": 1, "l": 2}, {"l": 2, "k": 1}, True), ({"k": 1}, {"k": 2}, False), ({"k": 1}, {"j": 1}, False),
        (slice(1, 2, None), slice(1, 2, None), True), (slice(1, 2, None), slice(1, 3, None), False),
        (2**70, 2**70, True), (2**70, 2**70 + 1, False), (np.dtype("f4"), np.dtype("f4"), True),
    ],
)  # fmt: skip
def test_literals(in_pattern, in_target, same):
    def graph_with(value):
        graph = Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_method("foo", (x, value)))
        return graph

    assert len(found(graph_with(in_pattern), graph_with(in_target))) == same
    assert len(found(graph_with(in_pattern), graph_with(in_target), ignore_literals=True)) == 1


def test_lists_and_tuples_differ_as_an_index():
    def graph_with(index):
        graph = Graph()
        graph.output(graph.call_function(operator.getitem, (graph.placeholder("x"), index)))
        return graph

    assert len(found(graph_with([0, 1]), graph_with([0, 1]))) == 1
    assert len(found(graph_with([0, 1]), graph_with((0, 1)))) == 0


def test_ignoring_literals_ignores_nothing_else():
    assert found(lambda x: operator.add(x, 1), lambda a, b: operator.add(a, b), ignore_literals=True) == []
    assert found(lambda x: operator.add(operator.neg(x), 1), lambda a: operator.add(2, 1), ignore_literals=True) == []


def test_structures_are_looked_into():
    def graph_with(build):
        graph = Graph()
        a = graph.placeholder("a")
        graph.output(graph.call_method("foo", (build(a, graph.call_function(operator.neg, (a,))),)))
        return graph

    assert len(found(graph_with(lambda a, n: {"k": [n, a]}), graph_with(lambda a, n: {"k": (n, a)}))) == 1
    assert len(found(graph_with(lambda a, n: {"k": [n, a]}), graph_with(lambda a, n: {"k": [a, n]}))) == 0
    assert len(found(graph_with(lambda a, n: slice(n, None)), graph_with(lambda a, n: slice(n, None)))) == 1


def test_calls_are_compared_by_their_schema():
    def model(x, w, b):
        return F.conv2d(x, w, b, stride=2), F.conv2d(x, bias=b, weight=w, stride=2), F.conv2d(x, w, b, 2, 0, 1, 1)

    assert len(found(lambda x, w, b: F.conv2d(x, w, b, 2), model)) == 3
    assert len(found(lambda x, w, b: F.conv2d(x, w, b), model)) == 0
    assert found(lambda x, w, b: F.conv2d(x, w, b), lambda x, w: F.conv2d(x, weight=w)) == [
        {"conv2d": "conv2d", "x": "x", "w": "w", "b": None}
    ]


def test_strings_left_out_equal_the_default():
    def pattern(x):
        return F.pad(x, (1, 1), "constant")

    assert len(found(pattern, lambda x: F.pad(x, (1, 1)))) == 1
    assert len(found(pattern, lambda x: F.pad(x, (1, 1), mode="reflect"))) == 0
    assert len(found(lambda x: F.pad(x, (1, 1)), lambda x: F.pad(x, (1, 1), mode="constant"))) == 1


def test_keywords_of_unknown_calls_need_the_same_names():
    def graph_with(*args, **kwargs):
        graph = Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_method("foo", (x, *args), kwargs))
        return graph

    assert len(found(graph_with(a=1, b=2), graph_with(b=2, a=1))) == 1
    assert len(found(graph_with(a=1), graph_with(b=1))) == 0
    assert len(found(graph_with(1), graph_with(a=1))) == 0


def test_what_is_inside_has_no_users_outside():
    def pattern(x):
        return operator.neg(operator.add(x, 1))

    assert found(pattern, lambda a: (operator.neg(t := operator.add(a, 1)), operator.mul(t, 2))) == []
    both = symbolic_trace(lambda x: (operator.neg(t := operator.add(x, 1)), t))
    assert len(found(both.graph, lambda a: (operator.neg(t := operator.add(a, 1)), operator.mul(t, 2)))) == 1


def test_a_placeholder_does_not_bind_a_part_of_the_match():
    def pattern(x, y):
        return operator.add(operator.neg(x), y)

    assert found(pattern, lambda a: operator.add(t := operator.neg(a), t)) == []
    assert len(found(pattern, lambda a: operator.add(operator.neg(a), a))) == 1


def test_a_value_must_not_leave_and_come_back():
    def pattern(x, y):
        t = operator.neg(x)
        return t, operator.add(t, y)

    assert found(pattern, lambda a: operator.add(t := operator.neg(a), operator.abs(operator.abs(t)))) == []
    assert len(found(pattern, lambda a: operator.mul(operator.add(t := operator.neg(a), a), operator.abs(t)))) == 1


def test_the_first_of_overlapping_matches_wins():
    def model(a):
        return operator.neg(operator.neg(operator.neg(a)))

    def pattern(x):
        return operator.neg(operator.neg(x))

    assert found(pattern, model) == [{"neg_1": "neg_1", "neg": "neg", "x": "a"}]
    assert [m["x"] for m in found(pattern, model, remove_overlapping_matches=False)] == ["a", "neg"]
    both = symbolic_trace(lambda x: (operator.neg(t := operator.neg(x)), t))
    assert [m["x"] for m in found(both.graph, model, remove_overlapping_matches=False)] == ["a", "neg"]
    assert [m["x"] for m in found(both.graph, model)] == ["a"]


def test_several_anchors_that_share_an_input():
    def pattern(x):
        return operator.neg(x), operator.abs(x)

    def model(a, b):
        return operator.neg(a), operator.neg(b), operator.abs(b), operator.abs(a)

    assert found(pattern, model) == [
        {"neg": "neg", "abs_1": "abs_2", "x": "a"},
        {"neg": "neg_1", "abs_1": "abs_1", "x": "b"},
    ]


def test_several_anchors_that_share_nothing():
    def pattern(x, y):
        return operator.neg(x), operator.abs(y)

    def model(a, b):
        return operator.neg(a), operator.neg(b), operator.abs(b), operator.abs(a)

    assert [(m["neg"], m["abs_1"]) for m in found(pattern, model)] == [("neg", "abs_1"), ("neg_1", "abs_2")]
    assert len(found(pattern, model, remove_overlapping_matches=False)) == 4


def test_an_unused_placeholder_is_bound_to_nothing():
    [match] = SubgraphMatcher(lambda x, y: operator.neg(x)).match(symbolic_trace(operator.neg))
    assert match.placeholder_nodes[1] is None and len(match.nodes_map) == 2


def test_matching_the_output_and_placeholders():
    def pattern(x):
        return operator.neg(x)

    def model(a):
        return operator.neg(operator.neg(a))

    assert [m["neg"] for m in found(pattern, model)] == ["neg", "neg_1"]
    assert [m["neg"] for m in found(pattern, model, match_output=True)] == ["neg_1"]
    assert [m["neg"] for m in found(pattern, model, match_placeholder=True)] == ["neg"]


def test_modules_and_attributes_match_by_target():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.other = nn.ReLU(), nn.ReLU()
            self.w = nn.Parameter(np.ones(2, np.float32))

        def forward(self, x):
            return self.other(self.act(x) * self.w)

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()
            self.w = nn.Parameter(np.zeros(2, np.float32))

        def forward(self, x):
            return self.act(x) * self.w

    [match] = SubgraphMatcher(Part()).match(symbolic_trace(Net()))
    assert [str(n.target) for n in match.nodes_map.values() if n.op in ("call_module", "get_attr")] == ["act", "w"]


def test_constants_met_while_tracing_match_by_value():
    one, same, two = np.ones(2, np.float32), np.ones(2, np.float32), np.full(2, 2, np.float32)

    def times(c):
        return lambda x: operator.mul(x, operator.add(x, c))

    target = symbolic_trace(times(one))
    assert len(SubgraphMatcher(times(one)).match(target)) == 1
    assert len(SubgraphMatcher(times(two)).match(target)) == 0
    assert len(SubgraphMatcher(times(same)).match(target)) == 1


# ---- refusals -------------------------------------------------------------------------------------------------------
def graph_without_output():
    graph = Graph()
    graph.call_function(operator.neg, (graph.placeholder("x"),))
    return graph


def graph_with_dead_code():
    graph = Graph()
    x = graph.placeholder("x")
    graph.call_function(operator.abs, (x,), name="unused")
    graph.output(graph.call_function(operator.neg, (x,)))
    return graph


def graph_of_a_literal():
    graph = Graph()
    graph.output(1)
    return graph


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Graph(), "empty graph"),
        (graph_without_output(), "output node, got none"),
        (lambda x: x, "only returns its placeholders"),
        (lambda x, y: (x, y), "only returns its placeholders"),
        (graph_of_a_literal(), "only returns its placeholders"),
        (lambda x, y: (operator.neg(x), y), "placeholder 'y' is returned and used by nothing else"),
        (graph_with_dead_code(), "'unused' is dead code"),
    ],
)
def test_patterns_that_cannot_be_used(pattern, message):
    with pytest.raises(ValueError, match=f"pattern: .*{message}"):
        SubgraphMatcher(pattern)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="pattern: expected a function, a Graph or a GraphModule, got int"):
        SubgraphMatcher(3)
    with pytest.raises(TypeError, match="ignore_literals"):
        SubgraphMatcher(operator.neg, ignore_literals=2)
    with pytest.raises(TypeError, match="graph: expected a Graph, got function"):
        SubgraphMatcher(operator.neg).match(lambda x: x)


class Odd:
    """A literal whose comparison fails, or tries to change the graph."""

    def __init__(self, action):
        self.action = action

    def __eq__(self, other):
        return self.action()

    __hash__ = None


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_errors_of_a_comparison_come_out(error):
    def boom():
        raise error("in __eq__")

    def graph_with():
        graph = Graph()
        graph.output(graph.call_method("foo", (graph.placeholder("x"), Odd(boom))))
        return graph

    target = graph_with()
    before = str(target)
    with pytest.raises(error, match="in __eq__"):
        SubgraphMatcher(graph_with()).match(target)
    assert str(target) == before


def test_a_comparison_cannot_change_the_graph():
    target = Graph()

    def change():
        target.call_method("bar", ())
        return True

    pattern = Graph()
    pattern.output(pattern.call_method("foo", (pattern.placeholder("x"), Odd(lambda: True))))
    target.output(target.call_method("foo", (target.placeholder("x"), Odd(change))))
    with pytest.raises(RuntimeError, match="cannot be changed"):
        SubgraphMatcher(target).match(pattern)
    target.lint()
    assert len(target.nodes) == 3


def test_a_deep_pattern_needs_no_stack():
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(50_000):
        x = graph.call_function(operator.neg, (x,))
    graph.output(graph.call_function(operator.abs, (x,)))
    [match] = SubgraphMatcher(graph).match(graph)
    assert len(match.nodes_map) == 50_002


# ---- against a matcher that tries everything ------------------------------------------------------------------------
def random_graph(rng, n, *, outputs=1):
    graph = Graph()
    nodes = [graph.placeholder(name) for name in ("a", "b")]
    for _ in range(n):
        pick = lambda: rng.choice(nodes[-4:] if rng.random() < 0.7 else nodes)  # noqa: E731
        kind = rng.randrange(7)
        if kind == 0:
            node = graph.call_function(operator.add, (pick(), pick()))
        elif kind == 1:
            node = graph.call_function(operator.mul, (pick(), rng.choice([1, 1.0, True])))
        elif kind == 2:
            node = graph.call_method("cat", (pick(), [pick(), pick()]))
        elif kind == 3:
            node = graph.call_method("sum", (pick(),), {"axis": rng.choice([0, 1])})
        else:
            node = graph.call_function(rng.choice([operator.neg, operator.abs]), (pick(),))
        nodes.append(node)
    ends = [node for node in nodes[2:] if not node.users] or nodes[-1:]
    graph.output(tuple(ends) if len(ends) > 1 else ends[0])
    return graph


def cut_out(rng, graph, size):
    """A pattern that is a part of the graph, and which node of the graph each of its nodes was; None if not convex."""
    work = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    part = {rng.choice(work)}
    while len(part) < size:
        near = {m for n in part for m in [*n.all_input_nodes, *n.users] if m in set(work)} - part
        if not near:
            break
        part.add(rng.choice(sorted(near, key=work.index)))
    if not is_convex(part):
        return None
    pattern, copies, inputs = Graph(), {}, []
    for node in work:
        if node in part:
            for i in node.all_input_nodes:
                if i not in part and i not in inputs:
                    inputs.append(i)
    for i, node in enumerate(inputs):
        copies[node] = pattern.placeholder(f"p{i}")
    for node in work:
        if node in part:
            copies[node] = pattern.node_copy(node, copies.__getitem__)
    returned = [n for n in work if n in part and (not n.users or any(u not in part for u in n.users))]
    pattern.output(tuple(copies[n] for n in returned) if len(returned) > 1 else copies[returned[0]])
    return pattern, {copy: node for node, copy in copies.items()}


def is_convex(part):
    seen, stack = set(), [u for n in part for u in n.users if u not in part]
    while stack:
        node = stack.pop()
        if node in part:
            return False
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return True


def bind(p, t, bound):
    """Compares two arguments, recording what nodes of the pattern stand for."""
    if isinstance(p, Node):
        if p in bound:
            old = bound[p]
            return old is t if isinstance(old, Node) or isinstance(t, Node) else repr(old) == repr(t)
        if p.op != "placeholder":
            return False  # every other node has been assigned already
        bound[p] = t
        return True
    if isinstance(p, (list, tuple)) and isinstance(t, (list, tuple)):
        return len(p) == len(t) and all(bind(x, y, bound) for x, y in zip(p, t, strict=True))
    return not isinstance(t, Node) and type(p) is type(t) and p == t


def try_everything(pattern, graph):
    """All matches, by trying every assignment of the pattern's operations to nodes of the graph."""
    ops = [n for n in pattern.nodes if n.op not in ("placeholder", "output")]
    returned = set(pattern.output_node().all_input_nodes)
    results = []
    candidates = [
        [t for t in graph.nodes if (t.op, t.target) == (p.op, p.target) and list(t.kwargs) == list(p.kwargs)]
        for p in ops
    ]
    for choice in itertools.product(*candidates):
        if len(set(choice)) < len(choice):
            continue
        bound = dict(zip(ops, choice, strict=True))
        if not all(
            bind(p.args, t.args, bound) and bind(tuple(p.kwargs.values()), tuple(t.kwargs.values()), bound)
            for p, t in zip(ops, choice, strict=True)
        ):
            continue
        part = set(choice)
        if any(p not in returned and any(u not in part for u in t.users) for p, t in zip(ops, choice, strict=True)):
            continue
        inputs = []
        map_arg([v for p, v in bound.items() if p.op == "placeholder"], inputs.append)
        if part.isdisjoint(inputs) and is_convex(part):
            results.append(bound)
    return results


def canonical(maps):
    return sorted(repr(sorted((p.name, repr(t)) for p, t in m.items())) for m in maps)


@pytest.mark.parametrize("seed", range(150))
def test_finds_what_trying_everything_finds(seed):
    rng = random.Random(seed)
    graph = random_graph(rng, rng.randint(4, 11))
    cut = None
    while cut is None:
        cut = cut_out(rng, random_graph(rng, 8) if seed % 3 == 0 else graph, rng.randint(1, 4))
    pattern = cut[0]
    matches = SubgraphMatcher(pattern, remove_overlapping_matches=False).match(graph)
    expected = try_everything(pattern, graph)
    assert canonical(m.nodes_map for m in matches) == canonical(expected)

    kept, taken = [], set()
    for match in matches:
        nodes = {t for p, t in match.nodes_map.items() if p.op != "placeholder"}
        if taken.isdisjoint(nodes):
            kept.append(match.nodes_map)
            taken |= nodes
    assert [m.nodes_map for m in SubgraphMatcher(pattern).match(graph)] == kept


@pytest.mark.parametrize("seed", range(100))
def test_finds_a_part_of_the_graph_in_the_graph(seed):
    rng = random.Random(1000 + seed)
    graph = random_graph(rng, 60)
    cut = None
    while cut is None:
        cut = cut_out(rng, graph, rng.randint(1, 8))
    pattern, origin = cut
    matches = SubgraphMatcher(pattern, remove_overlapping_matches=False).match(graph)
    assert origin in [m.nodes_map for m in matches]
