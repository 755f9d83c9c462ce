# SPDX-License-Identifier: BSD-3-Clause
"""replace_pattern by itself: what torch.fx does otherwise or not at all. test_rewriter_torch.py has what they share."""

import gc
import operator
import random
import signal
import weakref

import numpy as np
import pytest

from pyconvbn import fx, nn
from pyconvbn import functional as F
from pyconvbn.fx import Graph, GraphModule, replace_pattern, replace_pattern_with_filters, symbolic_trace

add, mul, neg, sub, absolute = operator.add, operator.mul, operator.neg, operator.sub, operator.abs


def names(gm):
    return [n.name for n in gm.graph.nodes]


def check(gm, *inputs, expected):
    gm.graph.lint()
    assert gm(*inputs) == expected


# ---- where the new nodes go -----------------------------------------------------------------------------------------
def test_new_nodes_stand_before_the_first_user_if_the_inputs_allow_it():
    gm = symbolic_trace(lambda a, b: mul(add(neg(a), b), absolute(b)))
    replace_pattern(gm, lambda x: neg(x), lambda x: sub(0, x))
    assert names(gm) == ["a", "b", "sub", "add", "abs_1", "mul", "output"]


def two_results(x, y):
    return neg(x), absolute(y)


def swapped(x, y):
    t = sub(x, y)
    return mul(t, 2), mul(t, 3)


def test_users_in_between_move_behind_the_new_nodes():
    """`neg` has a user before the second input exists: torch.fx makes a graph that is out of order."""
    graph = Graph()
    a = graph.placeholder("a")
    first = graph.call_function(neg, (a,))
    user = graph.call_function(add, (first, 1), name="user")
    late = graph.call_function(mul, (a, 5), name="late")
    other = graph.call_function(add, (a, 9), name="other")
    second = graph.call_function(absolute, (late,))
    graph.output((user, second, other))
    gm = GraphModule({}, graph)
    gm.graph.lint()
    assert len(replace_pattern(gm, two_results, swapped)) == 1
    check(gm, 2, expected=((2 - 10) * 2 + 1, (2 - 10) * 3, 11))
    assert names(gm) == ["a", "late", "sub", "mul", "mul_1", "user", "other", "output"]


def test_a_cycle_is_refused():
    """Two results of each match feed the other match: each alone is fine, after the first the second is not."""

    def model(a, b):
        p = neg(a)
        q = neg(b)
        return absolute(q), absolute(p)

    gm = symbolic_trace(model)
    before = gm.graph.nodes.__repr__(), str(gm.graph)
    with pytest.raises(RuntimeError, match="input '.*' depends on one of its results, the graph would have a cycle"):
        replace_pattern(gm, lambda x, y: (neg(x), absolute(y)), swapped)
    assert (gm.graph.nodes.__repr__(), str(gm.graph)) == before
    gm.graph.lint()


def test_nothing_moves_past_side_effects():
    graph = Graph()
    a = graph.placeholder("a")
    first = graph.call_function(neg, (a,))
    user = graph.call_function(add, (first, 1), name="user")
    graph.create_node("call_method", "add_", (a, 1), name="writes")
    late = graph.call_function(mul, (a, 5), name="late")
    graph.output((user, graph.call_function(absolute, (late,))))
    gm = GraphModule({}, graph)
    before = str(graph)
    with pytest.raises(RuntimeError, match="past 'writes', which has side effects"):
        replace_pattern(gm, two_results, swapped)
    assert str(graph) == before


@pytest.mark.parametrize("seed", range(200))
def test_random_replacements_leave_a_legal_graph_with_the_same_values(seed):
    """The replacement computes the same through other nodes; numbers must not change, and every match must go."""
    rng = random.Random(seed)
    graph = Graph()
    values = [graph.placeholder("a"), graph.placeholder("b")]
    for _ in range(rng.randint(4, 30)):
        x, y = rng.choice(values[-5:]), rng.choice(values[-5:])
        kind = rng.randrange(4)
        if kind < 2:
            values.append(graph.call_function((neg, absolute)[kind], (x,)))
        else:
            values.append(graph.call_function((add, sub)[kind - 2], (x, y)))
    graph.output(tuple(n for n in values[2:] if not n.users))
    gm = GraphModule({}, graph)
    expected, before = gm(3, -7), str(graph)

    def pattern(x, y):
        return neg(x), absolute(y)

    def replacement(x, y):
        pair = add(mul(x, -1), mul(y, 0))
        return pair, absolute(mul(add(y, mul(x, 0)), 1))

    try:
        matches = replace_pattern(gm, pattern, replacement)
    except RuntimeError as error:
        assert "would have a cycle" in str(error)
        assert str(gm.graph) == before and gm(3, -7) == expected
    else:
        assert len(matches) <= before.count("operator.neg")
        check(gm, 3, -7, expected=expected)


# ---- what torch.fx gets wrong ---------------------------------------------------------------------------------------
def test_replaced_values_are_found_in_lists_dicts_and_slices():
    """The second match binds a list that holds a result of the first."""
    for wrap in (lambda v: [v, 1], lambda v: (v,), lambda v: {"k": [v]}, lambda v: slice(v, None)):
        graph = Graph()
        a = graph.placeholder("a")
        t = graph.call_function(neg, (graph.call_function(neg, (a,)),))
        inner = graph.call_method("foo", (a, wrap(t)))
        graph.output(graph.call_function(neg, (graph.call_function(neg, (wrap(inner),)),)))
        gm = GraphModule({}, graph)
        matches = replace_pattern(gm, lambda x: neg(neg(x)), lambda x: absolute(x))
        assert len(matches) == 2
        gm.graph.lint()
        foo = next(n for n in gm.graph.nodes if n.name == "foo")
        assert [n.name for n in foo.all_input_nodes] == ["a", "abs_1"]

    graph = Graph()
    a = graph.placeholder("a")
    t = graph.call_function(neg, (a,))
    graph.output(graph.call_function(neg, ([a, {"k": (t, slice(t, 1))}],)))
    gm = GraphModule({}, graph)
    matches = replace_pattern(gm, lambda x: neg(x), lambda x: absolute(x))
    gm.graph.lint()
    assert [n.name for n in gm.graph.nodes] == ["a", "abs_1", "abs_2", "output"]
    assert gm.graph.nodes.__repr__() == "[a, abs_1, abs_2, output]"
    last = next(n for n in gm.graph.nodes if n.name == "abs_2")
    assert str(last.args) == "([a, {'k': (abs_1, slice(abs_1, 1, None))}],)"
    assert str(list(matches[1].nodes_map.values())[1:]) == "[[a, {'k': (abs_1, slice(abs_1, 1, None))}]]"


def test_a_literal_comes_back():
    """An input that is a literal takes the place of a node."""
    gm = symbolic_trace(lambda a: add(neg(neg(a)), mul(a, 2)))
    graph = gm.graph
    [m] = [n for n in graph.nodes if n.target is neg and n.args[0].op == "placeholder"]
    m.args = (5,)
    assert len(replace_pattern(gm, lambda x: neg(neg(x)), lambda x: x)) == 1
    check(gm, 3, expected=11)


def test_a_list_comes_back_and_is_kept_up_to_date():
    graph = Graph()
    a = graph.placeholder("a")
    t = graph.call_function(neg, ([a, 1],))
    graph.output((graph.call_function(neg, ((t, t),)), t))
    gm = GraphModule({}, graph)
    replace_pattern(gm, lambda x: neg(x), lambda x: x)
    gm.graph.lint()
    assert gm(3) == (([3, 1], [3, 1]), [3, 1])


def test_a_returned_input_gets_a_new_value_everywhere_else():
    """torch.fx makes the new node its own input here."""
    gm = symbolic_trace(lambda a, b: (mul(a, 10), add(neg(a), a), b))
    replace_pattern(gm, lambda x: (neg(x), x), lambda x: (lambda t: (sub(0, t), t))(add(x, 1)))
    check(gm, 2, 0, expected=(30, -3 + 3, 0))
    assert names(gm) == ["a", "b", "add_1", "sub", "mul", "add", "output"]


def test_a_later_match_sees_the_new_value_of_an_input():
    gm = symbolic_trace(lambda a: (neg(a), absolute(neg(a))))
    matches = replace_pattern(gm, lambda x: (neg(x), x), lambda x: (lambda t: (sub(0, t), t))(add(x, 1)))
    assert len(matches) == 2
    check(gm, 2, expected=(-4, 4))  # the second one adds 1 to what the first one made of the input


def test_unusable_results_for_a_returned_input():
    def swap(x, y):
        return add(x, y), x, y

    for replacement in (lambda x, y: (add(y, x), y, x), lambda x, y: (add(x, y), x, 3)):
        gm = symbolic_trace(lambda a, b: mul(add(a, b), sub(a, b)))
        before = str(gm.graph)
        with pytest.raises(ValueError, match="placeholder '[xy]' of the pattern is returned: expected the same input"):
            replace_pattern(gm, swap, replacement)
        assert str(gm.graph) == before


def test_two_placeholders_on_one_node():
    gm = symbolic_trace(lambda a: add(a, a))
    assert len(replace_pattern(gm, lambda x, y: add(x, y), lambda x, y: sub(x, y))) == 1
    check(gm, 3, expected=0)


def test_results_in_dicts_and_lists():
    def pattern(x):
        return {"n": neg(x), "more": [absolute(x), None]}

    def replacement(x):
        return {"more": (mul(x, 3), None), "n": mul(x, 2)}

    gm = symbolic_trace(lambda a: sub(neg(a), absolute(a)))
    assert len(replace_pattern(gm, pattern, replacement)) == 1
    check(gm, 5, expected=-5)
    gm = symbolic_trace(lambda a: sub(neg(a), absolute(a)))
    replace_pattern(gm, pattern, lambda x: (mul(x, 2), mul(x, 3)))  # built differently: in order
    check(gm, 5, expected=-5)


def test_a_call_spelled_differently_is_replaced():
    gm = symbolic_trace(lambda x, w: (F.conv2d(x, w, stride=2), F.conv2d(input=x, weight=w, bias=None, stride=2)))
    done = replace_pattern(gm, lambda x, w, b: F.conv2d(x, w, b, 2), lambda x, w, b: F.conv2d(x, w, b, (2, 2)))
    assert len(done) == 2
    assert [n.args[2:] for n in gm.graph.nodes if n.op == "call_function"] == [(None, (2, 2))] * 2
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((1, 2, 5, 5), (3, 2, 3, 3)))
    for result in gm(x, w):
        np.testing.assert_array_equal(result, F.conv2d(x, w, stride=2))


# ---- what comes back ------------------------------------------------------------------------------------------------
def test_matches_say_what_was_replaced_by_what():
    gm = symbolic_trace(lambda a: neg(add(neg(add(a, 1)), 1)))
    first, second = replace_pattern_with_filters(
        gm, lambda x: neg(add(x, 1)), lambda x: sub(-1, absolute(x)), match_filters=[lambda m, g, p: True]
    )
    assert first.anchor.name == "neg" and first.replacements[0].name == "abs_1"
    assert [n.name for n in second.replacements] == ["abs_2", "sub_1"]
    assert [str(v) for v in second.nodes_map.values()][-1] == "sub"  # the input is the new node, not the erased one
    matches = replace_pattern(gm, lambda x: absolute(x), lambda x: x)
    assert matches[0]._fields == ("anchor", "nodes_map") and len(matches) == 2


def test_metadata_goes_by_role():
    gm = symbolic_trace(lambda a: neg(add(mul(a, 2), 1)))
    for node in gm.graph.nodes:
        node.meta = {"of": node.name, "val": 1, "stack_trace": "the model's line"}
    replacement = symbolic_trace(lambda x: sub(-1, mul(add(x, 0), 2)))
    next(n for n in replacement.graph.nodes if n.name == "sub").meta["own"] = True
    [match] = replace_pattern_with_filters(gm, lambda x: neg(add(mul(x, 2), 1)), replacement)
    meta = {n.name: n.meta for n in match.replacements}
    assert all(m.pop("stack_trace") == "the model's line" for m in meta.values())
    assert meta == {"add_1": {"of": "add"}, "mul_1": {"of": "mul"}, "sub": {"of": "neg", "val": 1, "own": True}}
    next(n for n in gm.graph.nodes if n.name == "sub").meta["changed"] = 1
    assert all("changed" not in n.meta for n in replacement.graph.nodes)


# ---- modules and arrays of the replacement --------------------------------------------------------------------------
class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(np.full(1, factor, np.float32))
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(mul(x, self.factor))


def test_modules_of_the_replacement_are_copied_in():
    part = Scale(3)
    gm = symbolic_trace(lambda a: neg(a))
    replace_pattern(gm, lambda x: neg(x), part)
    assert gm(np.float32([1, -1])).tolist() == [3, 0]
    assert gm.act is not part.act and gm.factor is not part.factor
    gm.graph.lint()


def test_what_gm_has_under_the_name_is_used():
    gm = symbolic_trace(Scale(2))
    replace_pattern(gm, symbolic_trace(lambda x: x.foo()), lambda x: x)
    assert len(replace_pattern(gm, Scale(7), symbolic_trace(Scale(9)))) == 1
    assert gm(np.float32([1, -1])).tolist() == [2, 0]


def test_constants_of_two_functions_do_not_mix():
    """Both traces call their constant _tensor_constant0."""
    two, three = np.full(1, 2, np.float32), np.full(1, 3, np.float32)
    gm = symbolic_trace(lambda a: add(mul(a, two), neg(a)))
    replace_pattern(gm, lambda x: neg(x), lambda x: mul(x, three))
    gm.graph.lint()
    assert gm(np.float32([1])).tolist() == [5]
    assert {n.target for n in gm.graph.nodes if n.op == "get_attr"} == {"_tensor_constant0", "_tensor_constant1"}
    assert gm._tensor_constant1 is three


def test_a_missing_attribute_is_an_error_and_changes_nothing():
    replacement = Graph()
    x = replacement.placeholder("x")
    replacement.output(replacement.call_function(mul, (x, replacement.get_attr("nowhere.weight"))))
    gm = symbolic_trace(neg)
    before = str(gm.graph)
    with pytest.raises(RuntimeError, match="'nowhere.weight', which neither gm nor the replacement has"):
        replace_pattern(gm, neg, replacement)
    assert str(gm.graph) == before
    gm.graph.lint()


def test_attributes_that_cannot_be_placed_change_nothing():
    """The second one leads through an array; the first one and its parents must not stay."""
    replacement = Graph()
    x = replacement.placeholder("x")
    first = replacement.call_function(mul, (x, replacement.get_attr("new.part.w")))
    replacement.output(replacement.call_module("factor.act.one.two", (first,)))
    owner = nn.Module()
    owner.new = nn.Module()
    owner.new.part = nn.Module()
    owner.new.part.w = nn.Parameter(np.ones(1, np.float32))
    owner.factor = nn.Module()
    owner.factor.act = nn.Module()
    owner.factor.act.one = nn.Module()
    owner.factor.act.one.two = nn.ReLU()
    gm = symbolic_trace(Scale(2))
    before, members = str(gm.graph), sorted(vars(gm))
    with pytest.raises(RuntimeError, match="'factor.act.one.two' cannot be put into gm"):
        replace_pattern(gm, Scale(2), GraphModule(owner, replacement))
    assert str(gm.graph) == before and sorted(vars(gm)) == members
    assert gm(np.float32([1])).tolist() == [2]


def test_the_graph_may_be_its_own_pattern_and_replacement():
    gm = symbolic_trace(lambda a: neg(add(a, 1)))
    assert len(replace_pattern(gm, gm, gm)) == 1
    check(gm, 3, expected=-4)
    assert len(replace_pattern(gm, gm.graph, lambda x: x)) == 1
    check(gm, 3, expected=3)


# ---- refusals; whatever fails, nothing has changed ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pattern", "replacement", "error", "message"),
    [
        (lambda x: neg(x), lambda x, y: add(x, y), ValueError, "expected 1 placeholders, as the pattern has, got 2"),
        (lambda x: neg(x), lambda x: (x, neg(x)), ValueError, "expected 1 results, as the pattern returns, got 2"),
        (lambda x: (neg(x), add(x, 1)), lambda x: neg(x), ValueError, "expected 2 results.*got 1"),
        (lambda x: (neg(x),) * 2, lambda x: (add(x, 0), sub(x, 0)), ValueError, "expected one result for 'neg'"),
        (lambda x, y: neg(x), lambda x, y: add(x, y), ValueError, "uses placeholder 'y', whose counterpart"),
        (lambda x: x, lambda x: neg(x), ValueError, "only returns its placeholders"),
        (3, lambda x: x, TypeError, "pattern: expected a function"),
        (lambda x: neg(x), 3, TypeError, "replacement: expected a function"),
        (lambda x: neg(x), None, TypeError, "replacement: expected a function"),
        (lambda x: neg(x), Graph(), ValueError, "replacement: expected a graph with an output node"),
    ],
)  # fmt: skip
def test_errors_change_nothing(pattern, replacement, error, message):
    gm = symbolic_trace(lambda a: add(neg(a), add(a, 1)))
    before, nodes = str(gm.graph), list(gm.graph.nodes)
    with pytest.raises(error, match=message):
        replace_pattern(gm, pattern, replacement)
    assert str(gm.graph) == before
    assert list(gm.graph.nodes) == nodes and [n.name for n in nodes] == names(gm)
    check(gm, 3, expected=1)


def test_wrong_arguments():
    gm = symbolic_trace(neg)
    with pytest.raises(TypeError, match="gm: expected a GraphModule, got Graph"):
        replace_pattern(gm.graph, neg, neg)
    with pytest.raises(TypeError, match="match_filters: expected a list of functions, got function"):
        replace_pattern_with_filters(gm, neg, neg, lambda *_: True)
    with pytest.raises(TypeError, match="match_filters: expected functions, got int"):
        replace_pattern_with_filters(gm, neg, neg, [3])
    with pytest.raises(TypeError, match="replacement_callback: expected a function"):
        replace_pattern_with_filters(gm, neg, None, replacement_callback=3)
    with pytest.raises(TypeError, match="replacement_callback: expected a function, a Graph or a GraphModule, got int"):
        replace_pattern_with_filters(gm, neg, None, replacement_callback=lambda *_: 3)


@pytest.mark.parametrize("where", ["filter", "callback"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_half_way_takes_everything_back(where, error):
    gm = symbolic_trace(lambda a: neg(neg(neg(a))))
    for node in gm.graph.nodes:
        node.meta["mark"] = node.name
    before, nodes = str(gm.graph), list(gm.graph.nodes)
    calls = []

    def ask(match, graph, pattern):
        calls.append(match)
        if len(calls) == 3:
            raise error("third")
        return True if where == "filter" else symbolic_trace(absolute).graph

    in_filter = {"match_filters": [ask], "replacement": absolute}
    arguments = in_filter if where == "filter" else {"replacement_callback": ask}
    with pytest.raises(error, match="third"):
        replace_pattern_with_filters(gm, neg, **arguments)
    assert str(gm.graph) == before and list(gm.graph.nodes) == nodes
    assert [n.meta["mark"] for n in nodes] == names(gm)
    gm.graph.lint()


def test_filters_and_callbacks_cannot_change_the_graph():
    gm = symbolic_trace(lambda a: neg(a))
    before = str(gm.graph)

    def change(match, graph, pattern):
        graph.erase_node(match.returning_nodes[0].next)
        return True

    with pytest.raises(RuntimeError, match="cannot be changed"):
        replace_pattern_with_filters(gm, neg, absolute, [change])
    with pytest.raises(RuntimeError, match="cannot be changed"):
        replace_pattern_with_filters(gm, neg, replacement_callback=change)
    assert str(gm.graph) == before
    gm.graph.call_function(neg, (next(iter(gm.graph.nodes)),))  # unlocked again


def test_filters_see_every_match_before_anything_is_replaced():
    gm = symbolic_trace(lambda a: neg(neg(a)))
    seen = []

    def look(match, graph, pattern):
        seen.append(str(graph))
        assert graph is gm.graph and match.anchors[0].graph is pattern
        return np.bool_(len(seen) == 2)

    assert len(replace_pattern_with_filters(gm, neg, absolute, [look])) == 1
    assert len(set(seen)) == 1 and names(gm) == ["a", "neg", "abs_1", "output"]


def test_nothing_is_kept_alive():
    class Token:
        def __call__(self, x):
            return x

    token = Token()
    alive = weakref.ref(token)
    graph = Graph()
    graph.output(graph.call_function(token, (graph.placeholder("a"),)))
    gm = GraphModule({}, graph)
    pattern = Graph()
    pattern.output(pattern.call_function(token, (pattern.placeholder("x"),)))
    assert len(replace_pattern(gm, pattern, neg)) == 1
    del pattern, token, graph
    gc.collect()
    assert alive() is None
    assert gm(3) == -3


def test_a_search_without_end_can_be_interrupted():
    """Anchors that share nothing, overlaps kept: every combination is a match."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output([graph.call_function(neg, (x,)) for _ in range(200)])
    pattern = Graph()
    inputs = [pattern.placeholder(f"x{i}") for i in range(6)]
    pattern.output([pattern.call_function(neg, (i,)) for i in [*inputs, 1]])

    def ring(signum, frame):
        raise InterruptedError("rung")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(InterruptedError, match="rung"):
            fx.SubgraphMatcher(pattern, remove_overlapping_matches=False).match(graph)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    graph.lint()


def test_a_thousand_replacements():
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(1000):
        x = graph.call_function(neg, (graph.call_function(add, (x, 1)),))
    graph.output(x)
    gm = GraphModule({}, graph)
    assert len(replace_pattern(gm, lambda x: neg(add(x, 1)), lambda x: sub(-1, x))) == 1000
    gm.graph.lint()
    assert len(gm.graph.nodes) == 1002 and gm(3) == 3
