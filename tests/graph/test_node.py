# SPDX-License-Identifier: BSD-3-Clause
"""Node: identity, attributes, edits, and what is refused with which words."""

from __future__ import annotations

import copy
import operator
import pickle
import weakref
from collections.abc import Mapping
from typing import Any

import pytest

from pyconvbn import fx


@pytest.fixture
def graph() -> fx.Graph:
    """x, y = inputs; add = x + y; mul = add * x; output mul."""
    g = fx.Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    add = g.call_function(operator.add, (x, y))
    g.output(g.call_function(operator.mul, (add, x)))
    return g


def by_name(graph: fx.Graph, *names: str) -> list[fx.Node]:
    found = {n.name: n for n in graph.nodes}
    return [found[name] for name in names]


def test_one_object_a_node(graph: fx.Graph) -> None:
    x, add, mul = by_name(graph, "x", "add", "mul")
    assert add.args[0] is x and list(x.users) == [add, mul] and next(iter(x.users)) is add
    assert mul.all_input_nodes == [add, x] and mul.all_input_nodes[1] is x
    assert x.next.next is add and add.prev.prev is x and graph.output_node().prev is mul
    assert weakref.ref(x)() is x
    assert {x: 1}[add.args[0]] == 1


def test_equality_outlives_the_object(graph: fx.Graph) -> None:
    x = next(iter(graph.nodes))
    word, number = hash(x), id(x)
    kept = {x}
    del x
    x = next(iter(graph.nodes))
    assert id(x) == number and hash(x) == word and x in kept
    other = copy.deepcopy(graph)
    assert next(iter(other.nodes)) != x and x != "x"


def test_attributes(graph: fx.Graph) -> None:
    x, add, mul, out = by_name(graph, "x", "add", "mul", "output")
    assert (add.op, add.name, add.target, add.args, add.kwargs) == ("call_function", "add", operator.add, add.args, {})
    assert add.graph is graph and add.type is None and add.meta == {} and not add._erased and add.stack_trace is None
    add.meta["k"] = 1
    add.stack_trace = "line 3"
    assert add.meta == {"k": 1, "stack_trace": "line 3"} and add.stack_trace == "line 3"
    meta: dict[str, int] = {}
    add.meta = meta
    assert add.meta is meta
    add.type = int
    assert add.type is int
    del add.type
    assert add.type is None
    add.target = operator.sub
    add.op = "call_method"
    assert (add.op, str(out), repr(x)) == ("call_method", "output", "x")
    with pytest.raises(AttributeError):
        add.surprise = 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        add.users = {}  # type: ignore[misc, assignment]


def test_meta_outlives_the_object(graph: fx.Graph) -> None:
    next(iter(graph.nodes)).meta["k"] = 1
    assert next(iter(graph.nodes)).meta == {"k": 1}


def test_users(graph: fx.Graph) -> None:
    x, add, mul = by_name(graph, "x", "add", "mul")
    users = x.users
    assert isinstance(users, Mapping) and len(users) == 2 and bool(users) and add in users and x not in users
    assert 3 not in users and list(users.keys()) == [add, mul] and list(users.items()) == [(add, None), (mul, None)]
    assert list(users.values()) == [None, None] and users[add] is None and users.get(x, 5) == 5
    assert users == {add: None, mul: None} and users != {add: None} and repr(users) == "{add: None, mul: None}"
    assert users.copy() == dict.fromkeys([add, mul])
    with pytest.raises(KeyError):
        users[x]
    with pytest.raises(TypeError):
        users[add] = 1  # type: ignore[index]
    for user in x.users:  # may be changed while it is walked
        user.replace_input_with(x, by_name(graph, "y")[0])
    assert len(users) == 0 and not users and not x.users


def test_order(graph: fx.Graph) -> None:
    x, y, add, mul = by_name(graph, "x", "y", "add", "mul")
    assert x < y < add < mul and mul > add >= add <= mul and sorted([mul, x, add, y]) == [x, y, add, mul]
    mul.append(x)
    assert x > mul and list(graph.nodes)[:4] == [y, add, mul, x]
    with pytest.raises(TypeError, match="not supported"):
        x < 3  # type: ignore[operator]  # noqa: B015
    with pytest.raises(RuntimeError, match="node: node 'z' belongs to another graph"):
        x < fx.Graph().placeholder("z")  # noqa: B015


def test_ends_of_the_list(graph: fx.Graph) -> None:
    x, out = by_name(graph, "x", "output")
    root = x.prev
    assert root.op == "root" and root is out.next is graph._root and root.name == "" and root.next is x
    for change in (
        lambda: setattr(root, "name", "r"),
        lambda: setattr(root, "args", (x,)),
        lambda: graph.erase_node(root),
        lambda: x.update_arg(0, root),
        lambda: graph.call_function(len, (root,)),
        lambda: x.append(root),
        lambda: root.replace_all_uses_with(x),
        lambda: root.is_impure(),
    ):
        with pytest.raises((RuntimeError, IndexError), match="root"):
            change()
    root.append(out)
    assert next(iter(graph.nodes)) is out


def test_edits(graph: fx.Graph) -> None:
    x, y, add, mul = by_name(graph, "x", "y", "add", "mul")
    add.args = (y, [x, 1])
    assert add.all_input_nodes == [y, x] and list(y.users) == [add] and list(x.users) == [mul, add]
    add.kwargs = {"k": x}
    assert add.args == (y, [x, 1]) and add.kwargs == {"k": x}
    add.update_arg(-1, 5)
    add.update_kwarg("k", y)
    add.update_kwarg(key="z", arg=(x,))
    add.insert_arg(0, x)
    assert add.args == (x, y, 5) and add.kwargs == {"k": y, "z": (x,)}
    add.replace_input_with(x, y)
    assert add.args == (y, y, 5) and add.kwargs == {"k": y, "z": (y,)} and list(x.users) == [mul]
    assert mul.replace_all_uses_with(x) == [graph.output_node()]
    graph.lint()


def test_replace_all_uses_with(graph: fx.Graph) -> None:
    x, y, add, mul = by_name(graph, "x", "y", "add", "mul")
    assert x.replace_all_uses_with(y, lambda user: user is mul) == [mul]
    assert add.args == (x, y) and mul.args == (add, y)
    y.meta["a"] = 1
    with pytest.raises(ValueError, match="propagate_meta: expected replace_with to have no meta"):
        x.replace_all_uses_with(y, propagate_meta=True)
    assert add.args == (x, y)
    y.replace_all_uses_with(x, propagate_meta=True)
    assert x.meta == {"a": 1} and x.meta is not y.meta and add.args == (x, x)
    assert y.replace_all_uses_with(x) == []


def test_callbacks_that_do_what_they_should_not(graph: fx.Graph) -> None:
    x, y, add, mul = by_name(graph, "x", "y", "add", "mul")
    out = graph.output_node()

    def erase_users(user: fx.Node) -> bool:
        graph.erase_node(out)
        graph.erase_node(mul)
        return True

    with pytest.raises(RuntimeError, match="node 'mul' was erased"):
        mul.replace_all_uses_with(x, erase_users)
    assert x.replace_all_uses_with(y, lambda user: graph.placeholder("new") is not None) == [add]
    assert add.args == (y, y)
    with pytest.raises(KeyboardInterrupt):
        y.replace_all_uses_with(x, lambda user: (_ for _ in ()).throw(KeyboardInterrupt))
    assert add.args == (y, y)

    class Index:
        def __index__(self) -> int:
            graph.erase_node(add)
            return 0

    with pytest.raises(RuntimeError, match="node 'add' was erased"):
        add.update_arg(Index(), 1)  # type: ignore[arg-type]


def test_stale_nodes() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    node = graph.call_function(operator.add, (x, y))
    users = node.users
    graph.erase_node(node)
    reused = graph.call_function(operator.sub, (x, y))  # takes the slot
    assert node != reused and node._erased and str(node) == repr(node) == "add" and hash(node) is not None
    assert node.graph is graph and repr(users) == "<users of an erased node>"
    message = "node 'add' was erased from its graph"
    attributes = "name op target args kwargs users meta type next prev".split()
    for use in (
        *(lambda name=name: getattr(node, name) for name in attributes),
        lambda: node.all_input_nodes,
        lambda: node.stack_trace,
        lambda: setattr(node, "args", (1,)),
        lambda: setattr(node, "meta", {}),
        lambda: setattr(node, "type", int),
        lambda: setattr(node, "name", "n"),
        lambda: setattr(node, "stack_trace", "n"),
        lambda: len(users),
        lambda: list(users),
        lambda: x in users,
        lambda: node.update_arg(0, 1),
        lambda: node.update_kwarg("k", 1),
        lambda: node.insert_arg(0, 1),
        lambda: node.replace_all_uses_with(x),
        lambda: x.replace_all_uses_with(node),
        lambda: x.replace_input_with(node, y),
        lambda: x.replace_input_with(y, node),
        lambda: node.prepend(x),
        lambda: x.append(node),
        lambda: node < x,
        lambda: node.is_impure(),
        lambda: node.format_node(),
        lambda: node.bound_arguments(),
        lambda: node._rename("n"),
        lambda: copy.deepcopy(node),
        lambda: graph.erase_node(node),
        lambda: graph.inserting_before(node),
        lambda: graph.call_function(len, ([node],)),
        lambda: graph.node_copy(node),
    ):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert [n.name for n in graph.nodes] == ["x", "y", "sub"]
    graph._clear()
    with pytest.raises(RuntimeError, match="node 'x' was erased"):
        x.name  # noqa: B018
    assert repr([x, y, reused]) == "[x, y, sub]"


def test_nodes_of_another_graph(graph: fx.Graph) -> None:
    z = fx.Graph().placeholder("z")
    x, add = by_name(graph, "x", "add")
    before = str(graph)
    for use in (
        lambda: graph.call_function(len, (1, [z])),
        lambda: graph.call_function(len, (), {"k": z}),
        lambda: graph.output(z),
        lambda: graph.erase_node(z),
        lambda: graph.inserting_after(z),
        lambda: x.prepend(z),
        lambda: z.append(x),
        lambda: x.replace_all_uses_with(z),
        lambda: add.replace_input_with(x, z),
        lambda: add.update_arg(0, z),
        lambda: add.update_kwarg("k", {"a": z}),
        lambda: add.insert_arg(0, z),
        lambda: setattr(add, "args", (z,)),
        lambda: setattr(add, "kwargs", {"k": z}),
    ):
        with pytest.raises(RuntimeError, match="node '[zx]' belongs to another graph"):
            use()
    assert str(graph) == before
    assert z not in x.users
    graph.lint()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda n: setattr(n, "args", [1]), TypeError, "args: expected a tuple, got list"),
        (lambda n: setattr(n, "args", None), TypeError, "args: expected a tuple, got None"),
        (lambda n: setattr(n, "kwargs", [1]), TypeError, "kwargs: expected a dict, got list"),
        (lambda n: delattr(n, "args"), TypeError, "cannot be deleted"),
        (lambda n: setattr(n, "meta", None), TypeError, "meta: expected a dict, got NoneType"),
        (lambda n: delattr(n, "meta"), TypeError, "meta: expected a dict, got nothing"),
        (lambda n: setattr(n, "name", 3), TypeError, "name: expected a str, got int"),
        (lambda n: delattr(n, "name"), TypeError, "name: expected a str, got nothing"),
        (lambda n: setattr(n, "target", "add"), TypeError, "target: expected a callable for call_function, got str"),
        (lambda n: delattr(n, "target"), TypeError, "target: expected a callable"),
        (lambda n: setattr(n, "op", "call"), ValueError, "op: expected one of placeholder, .* got 'call'"),
        (lambda n: setattr(n, "op", 3), TypeError, "op: expected a str, got int"),
        (lambda n: delattr(n, "op"), TypeError, "op: expected a str, got nothing"),
        (lambda n: n.update_arg(2, 1), IndexError, "idx: expected an index of 2 arguments, got 2"),
        (lambda n: n.update_arg(-3, 1), IndexError, "idx: expected an index of 2 arguments, got -3"),
        (lambda n: n.update_arg("a", 1), TypeError, "idx: expected an int, got str"),
        (lambda n: n.insert_arg(3, 1), IndexError, "idx: expected 0 to 2, got 3"),
        (lambda n: n.update_arg(0), TypeError, "update_arg: expected the argument 'arg', got none"),
        (lambda n: n.update_arg(0, 1, arg=1), TypeError, "update_arg: got the argument 'arg' twice"),
        (lambda n: n.update_arg(0, 1, 2), TypeError, "update_arg: expected at most 2 positional arguments, got 3"),
        (lambda n: n.update_arg(0, arg=1, k=2), TypeError, "update_arg: got an unexpected keyword argument 'k'"),
        (lambda n: n.update_kwarg(3, 1), TypeError, "kwargs: expected str keys, got int"),
        (lambda n: n.replace_all_uses_with(3), TypeError, "replace_with: expected a Node, got int"),
        (lambda n: n.replace_all_uses_with(n, None, True), TypeError, "at most 2 positional"),
        (lambda n: n.replace_all_uses_with(n, 3), TypeError, "not callable"),
        (lambda n: n.prepend(3), TypeError, "x: expected a Node, got int"),
        (lambda n: n._rename(3), TypeError, "candidate: expected a str, got int"),
        (lambda n: n.replace_input_with(n, 3), TypeError, "new_input: expected a Node, got int"),
        (lambda n: type(n)(), TypeError, "cannot create"),
        (lambda n: pickle.dumps(n), TypeError, "node 'add': a node cannot be pickled by itself"),
    ],
)
def test_errors(graph: fx.Graph, call: Any, kind: type[Exception], message: str) -> None:
    before = str(graph)
    (add,) = by_name(graph, "add")
    with pytest.raises(kind, match=message):
        call(add)
    assert str(graph) == before


def test_names(graph: fx.Graph) -> None:
    x, y = by_name(graph, "x", "y")
    x._rename("y")
    assert x.name == "y_1"
    x._rename("y_1")
    assert x.name == "y_1"
    x.name = "y"
    with pytest.raises(RuntimeError, match="y"):
        graph.lint()
    x.name = "z"
    graph.lint()
    assert graph.placeholder("z").name == "z_1" and y.name == "y"


def test_deepcopy_finds_the_counterpart(graph: fx.Graph) -> None:
    x, add = by_name(graph, "x", "add")
    twice = copy.deepcopy([x, add, graph])
    assert twice[0].graph is twice[1].graph is twice[2] is not graph
    assert twice[1].args[0] is twice[0] and (twice[0].name, twice[1].name) == ("x", "add")


def test_purity_and_binding() -> None:
    from pyconvbn import functional as F

    graph = fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(F.relu, (x,))
    write = graph.call_method("add_", (x, 1))
    assert x.is_impure() and write.is_impure() and not relu.is_impure()
    assert not relu.is_impure(impure_random=False)
    conv = graph.call_function(F.conv2d, (x, 1), {"stride": (2, 2)})
    bound = conv.bound_arguments()
    assert bound["input"] is x and bound["weight"] == 1 and bound["stride"] == (2, 2) and bound["groups"] == 1
    assert bound["bias"] is None and list(bound)[:3] == ["input", "weight", "bias"]
    with pytest.raises(TypeError, match="strides"):
        graph.call_function(F.conv2d, (x, 1), {"strides": 2}).bound_arguments()
    with pytest.raises(ValueError, match="unknown|not .* op"):
        graph.call_function(lambda v: v, (x,)).bound_arguments()


def test_html(graph: fx.Graph) -> None:
    node = graph.call_function(operator.lt, (by_name(graph, "x")[0], "<b>"))
    text = node._repr_html_()
    assert "&lt;b&gt;" in text and "<b>" not in text and "operator.lt" in text
