# SPDX-License-Identifier: BSD-3-Clause
"""Graph: creation, insertion, walks, copies, pickles, text, and failures that change nothing."""

from __future__ import annotations

import ast
import copy
import inspect
import io
import operator
import random
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pyconvbn import _core, fx, nn

sys.path.insert(0, str(Path(__file__).parent))
from graph_util import sample  # noqa: E402


TEXT = """\
graph():
    %x : [num_users=1] = placeholder[target=x]
    %y : int [num_users=1] = placeholder[target=y](default=3)
    %layer_weight : [num_users=1] = get_attr[target=layer.weight]
    %add : [num_users=2] = call_function[target=operator.add](args = (%x, [%y, {k: %layer_weight}]), kwargs = {a: 2})
    %relu : numpy.ndarray [num_users=1] = call_method[target=relu](args = (%add,), kwargs = {})
    %layer_0_conv : [num_users=1] = call_module[target=layer.0.conv](args = (%relu,), kwargs = {})
    return (layer_0_conv, {'aux': add})"""

TABLE = """\
opcode         name          target                   args                             kwargs
-------------  ------------  -----------------------  -------------------------------  --------
placeholder    x             x                        ()                               {}
placeholder    y             y                        (3,)                             {}
get_attr       layer_weight  layer.weight             ()                               {}
call_function  add           <built-in function add>  (x, [y, {'k': layer_weight}])    {'a': 2}
call_method    relu          relu                     (add,)                           {}
call_module    layer_0_conv  layer.0.conv             (relu,)                          {}
output         output        output                   ((layer_0_conv, {'aux': add}),)  {}
"""


def names(graph: Any) -> list[str]:
    return [n.name for n in graph.nodes]


def test_text() -> None:
    assert str(sample()) == TEXT
    out = io.StringIO()
    with redirect_stdout(out):
        sample().print_tabular()
        fx.Graph().print_tabular()
    assert out.getvalue().startswith(TABLE)
    assert str(fx.Graph()) == "graph():"
    assert "<svg" in sample()._repr_html_()
    assert "def forward(self, x, y" in sample().python_code().src


def test_format_node_tells_types() -> None:
    graph = sample()
    place: list[str] = ["first"]
    returns = [""]
    for node in graph.nodes:
        node.format_node(place, returns)
    assert place == ["first", "x", "y : int"] and returns == [""]
    node = graph.output_node()
    node.type = float
    node.format_node(maybe_return_typename=returns)
    assert returns == [" -> float"]


# -- where nodes go --------------------------------------------------------------------------------------------------
def test_insertion() -> None:
    g = fx.Graph()
    a, z = g.placeholder("a"), g.placeholder("z")
    with g.inserting_before(z):
        g.placeholder("b")
        with g.inserting_after(a):
            g.placeholder("d")
            g.placeholder("c")
        g.placeholder("y")
    g.placeholder("end")
    with g.inserting_before():
        g.placeholder("start")
    with g.inserting_after():
        g.placeholder("last")
    assert names(g) == ["start", "a", "c", "d", "b", "y", "z", "end", "last"]
    g.inserting_before(a)
    g.placeholder("for_good")
    assert names(g)[1:3] == ["for_good", "a"]


def test_insertion_points_that_go() -> None:
    g = fx.Graph()
    a, b, c = (g.placeholder(n) for n in "abc")
    with g.inserting_before(b):
        g.erase_node(b)
        g.placeholder("b2")
    assert names(g) == ["a", "b2", "c"]
    with g.inserting_after(c):
        g.erase_node(c)
        g.placeholder("c2")
    with g.inserting_before(a):
        with g.inserting_after(a):
            g.erase_node(a)
        g.placeholder("at_the_end")
    assert names(g) == ["b2", "c2", "at_the_end"]
    with pytest.raises(KeyError), g.inserting_before(next(iter(g.nodes))):
        raise KeyError
    g.placeholder("after_the_exception")
    assert names(g)[-1] == "after_the_exception"


def test_appending_and_prepending() -> None:
    g = fx.Graph()
    a, b, c = (g.placeholder(n) for n in "abc")
    a.append(c)
    c.prepend(b)
    assert names(g) == ["a", "b", "c"]
    b.prepend(c)
    a.append(a)
    a.append(c)
    assert names(g) == ["a", "c", "b"] and [n.name for n in reversed(g.nodes)] == ["b", "c", "a"]


# -- walks -----------------------------------------------------------------------------------------------------------
def test_walking_while_erasing() -> None:
    g = fx.Graph()
    for i in range(50):
        g.placeholder(f"n{i}")
    seen = []
    for node in g.nodes:
        seen.append(node.name)
        for other in list(g.nodes)[3:5]:
            g.erase_node(other)
        if not node._erased:
            g.erase_node(node)
    assert len(seen) > 10 and len(set(seen)) == len(seen) and len(g.nodes) == 0
    it = iter(g.nodes)
    assert next(it, None) is None
    g.placeholder("late")
    assert next(it, None) is None


def test_walking_while_adding() -> None:
    g = fx.Graph()
    g.placeholder("x")
    for node in g.nodes:
        if len(g.nodes) < 5:
            g.call_method("m", (node,))
    assert len(g.nodes) == 5
    it = iter(g.nodes)
    next(it)
    g._clear()
    assert list(it) == []


def test_membership() -> None:
    g = sample()
    x = next(iter(g.nodes))
    assert x in g.nodes and 3 not in g.nodes and g._root not in g.nodes and fx.Graph().placeholder("x") not in g.nodes
    out = g.output_node()
    g.erase_node(out)
    assert out not in g.nodes


def test_find_nodes() -> None:
    g = sample()
    assert [n.name for n in g.find_nodes(op="placeholder")] == ["x", "y"]
    assert [n.name for n in g.find_nodes(op="call_function", target=operator.add)] == ["add"]
    assert g.find_nodes(op="call_function", target=operator.mul) == [] == g.find_nodes(op="call_module", target="none")
    assert [n.name for n in g.find_nodes(op="call_module", target="layer.0.conv", sort=False)] == ["layer_0_conv"]
    assert g.find_nodes(op="nothing") == []
    method = [].append  # bound methods are equal, not identical
    node = g.call_function(method)
    assert g.find_nodes(op="call_function", target=method) == [node]
    text = "ab"
    equal = g.call_function(text.upper)
    assert g.find_nodes(op="call_function", target=text.upper) == [equal]
    with pytest.raises(TypeError, match="op: expected a str, got int"):
        g.find_nodes(op=3)  # type: ignore[arg-type]


def test_output_node() -> None:
    g = sample()
    assert g.output_node().op == "output" and g.output_node() is list(g.nodes)[-1]
    with pytest.raises(RuntimeError, match="no output node"):
        fx.Graph().output_node()


# -- erasing ---------------------------------------------------------------------------------------------------------
def test_erase() -> None:
    g = fx.Graph()
    x = g.placeholder("x")
    y = g.call_method("relu", (x, [x]))
    with pytest.raises(RuntimeError, match="Tried to erase Node x but it still had 1 users in the graph"):
        g.erase_node(x)
    g.erase_node(y)
    assert not x.users
    g.erase_node(x)
    assert len(g.nodes) == 0
    with pytest.raises(TypeError, match="to_erase: expected a Node, got str"):
        g.erase_node("x")  # type: ignore[arg-type]


def test_dead_code() -> None:
    g = sample()
    with g.inserting_before(g.output_node()):
        dead = g.call_function(operator.neg, (next(iter(g.nodes)),))
        g.call_function(operator.neg, (dead,))
        g.call_method("add_", (next(iter(g.nodes)), 1))
    assert g.eliminate_dead_code() is True and names(g)[-2] == "add_" and "neg" not in names(g)
    assert g.eliminate_dead_code() is False
    before = str(g)

    def impure(node: fx.Node) -> bool:
        if node.op == "placeholder":
            raise ZeroDivisionError
        return node.op == "output"

    with g.inserting_before():
        g.placeholder("unused")
    with pytest.raises(ZeroDivisionError):
        g.eliminate_dead_code(impure)
    assert "unused" in names(g) and str(g).endswith(before.split("\n", 1)[1])
    assert g.eliminate_dead_code(lambda node: node.op == "output") and names(g)[-1] == "output"


# -- lint ------------------------------------------------------------------------------------------------------------
def test_lint() -> None:
    g = sample()
    g.lint()
    x, _, _, add, *_ = g.nodes
    add.append(x)
    with pytest.raises(RuntimeError, match="x"):
        g.lint()


def test_lint_looks_at_the_owner() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1))
    g = fx.Graph(owning_module=module)
    g.output(g.call_module("0", (g.get_attr("0.weight"),)))
    g.lint()
    node = g.get_attr("0.wait")
    message = "node '_0_wait': target '0.wait' of get_attr does not exist: Conv2d has no attribute 'wait'"
    with pytest.raises(RuntimeError, match=message):
        g.lint()
    g.erase_node(node)
    g.call_module("1")
    with pytest.raises(RuntimeError, match="target '1' of call_module"):
        g.lint()


# -- snapshots -------------------------------------------------------------------------------------------------------
def test_snapshots() -> None:
    g = sample()
    before, nodes = str(g), list(g.nodes)
    state = g._snapshot()
    version = g.version
    for node in reversed(nodes[3:]):
        g.erase_node(node)
    new = g.call_method("new", (nodes[0],))
    nodes[0].name = "renamed"
    g._restore(state)
    assert str(g) == before and g.version > version and new._erased
    assert list(g.nodes) == nodes and not nodes[3]._erased and nodes[3].users == {nodes[4]: None, nodes[6]: None}
    assert {nodes[5]: 1}[list(g.nodes)[5]] == 1
    g.lint()
    with pytest.raises(RuntimeError, match="restored already"):
        g._restore(state)
    with pytest.raises(RuntimeError, match="another graph"):
        fx.Graph()._restore(g._snapshot())
    with pytest.raises(TypeError, match="snapshot: expected what _snapshot"):
        g._restore(None)


def test_version_and_size() -> None:
    g = fx.Graph()
    versions = [g.version]
    x = g.placeholder("x")
    for change in (
        lambda: g.call_method("m", (x,)),
        lambda: x.update_kwarg("k", 1),
        lambda: x.next.prepend(x),
        lambda: g.erase_node(x.next),
        lambda: setattr(x, "target", "y"),
    ):
        versions.append(g.version)
        change()
    versions.append(g.version)
    assert versions == sorted(versions) and versions[-1] > versions[0]
    small = g._nbytes
    for _ in range(20_000):
        x = g.call_function(operator.add, (x, x))
    assert (g._nbytes - small) / 20_000 <= 400
    assert len(g.nodes) == 20_001


# -- wrong calls -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda g: g.create_node("call", "x"), ValueError, "op: expected one of placeholder.* got 'call'"),
        (lambda g: g.create_node("root", "x"), ValueError, "op: expected one of"),
        (lambda g: g.create_node(3, "x"), TypeError, "op: expected a str, got int"),
        (lambda g: g.create_node("call_function", "x"), TypeError, "target: expected a callable .*, got str"),
        (lambda g: g.create_node("call_method", len), TypeError, "target: expected a str for call_method, got builtin"),
        (lambda g: g.create_node("call_method"), TypeError, "create_node: expected the argument 'target', got none"),
        (lambda g: g.create_node("call_method", "x", [1]), TypeError, "args: expected a tuple, got list"),
        (lambda g: g.create_node("call_method", "x", (), (1,)), TypeError, "kwargs: expected a dict, got tuple"),
        (lambda g: g.create_node("call_method", "x", name=3), TypeError, "name: expected a str, got int"),
        (lambda g: g.create_node("call_method", "x", nam="y"), TypeError, "unexpected keyword argument 'nam'"),
        (lambda g: g.create_node("call_method", "x", op="y"), TypeError, "got the argument 'op' twice"),
        (lambda g: g.placeholder(3), TypeError, "target: expected a str for placeholder"),
        (lambda g: g.get_attr(None), TypeError, "target: expected a str for get_attr"),
        (lambda g: g.output(), TypeError, "expected the argument 'result'"),
        (lambda g: g.inserting_before(3), TypeError, "n: expected a Node, got int"),
        (lambda g: fx.Graph(1, 2, 3), TypeError, "Graph"),
        (lambda g: fx.Graph(owner=1), TypeError, "owner"),
        (lambda g: g.nodes.__class__(g, "_up"), ValueError, "direction: expected '_next' or '_prev', got '_up'"),
        (lambda g: g._set_insert_point(None), TypeError, "expected 2 arguments, got 1"),
        (lambda g: g._copy_from(3), TypeError, "source: expected a Graph, got int"),
        (lambda g: g.node_copy(3), AttributeError, "args"),
    ],
)
def test_errors(call: Callable[[fx.Graph], object], kind: type[Exception], message: str) -> None:
    g = sample()
    with pytest.raises(kind, match=message):
        call(g)
    assert str(g) == TEXT


def test_keyword_strings_need_not_be_interned() -> None:
    g = fx.Graph()
    words = {"".join(["ar", "gs"]): (1,), "".join(["na", "me"]): "n", "".join(["o", "p"]): "".join(["call_", "method"])}
    node = g.create_node(target="m", **words)  # type: ignore[arg-type]
    assert (node.op, node.name, node.args) == ("call_method", "n", (1,))


def test_a_second_init_keeps_the_nodes() -> None:
    g = sample()
    g.__init__(tracer_cls=dict)  # type: ignore[misc]
    assert str(g) == TEXT and g._tracer_cls is dict
    made = fx.Graph.__new__(fx.Graph)
    made.placeholder("x")
    assert names(made) == ["x"]


# -- allocation failures ---------------------------------------------------------------------------------------------
def operations() -> dict[str, Callable[[fx.Graph], object]]:
    def long(g: fx.Graph) -> fx.Node:
        x = next(iter(g.nodes))
        kwargs = {f"k{i}": (i, x) for i in range(20)}
        return g.call_function(len, (x, *range(40), [*range(50)], {"k": [x] * 20}), kwargs)

    return {
        "create": long,
        "set_args": lambda g: setattr(list(g.nodes)[4], "args", (list(g.nodes)[0], [*range(100)])),
        "update": lambda g: list(g.nodes)[3].update_arg(0, [*range(60)]),
        "replace": lambda g: list(g.nodes)[3].replace_all_uses_with(list(g.nodes)[0]),
        "rename": lambda g: list(g.nodes)[3]._rename("y" * 1000),
        "copy": lambda g: copy.deepcopy(g),
        "snapshot": lambda g: g._restore(g._snapshot()),
        "lint": lambda g: g.lint(),
        "dce": lambda g: g.eliminate_dead_code(),
        "users": lambda g: list(list(g.nodes)[3].users),
        "new": lambda g: fx.Graph(),
    }


@pytest.mark.parametrize("name", operations())
def test_out_of_memory(name: str) -> None:
    """Each allocation fails in turn: MemoryError, and the graph is what it was."""
    operation = operations()[name]
    for n in range(1000):
        g = sample()
        before = str(g)
        _core._testing.alloc_fail_after(n)
        try:
            operation(g)
        except MemoryError:
            _core._testing.alloc_fail_after(-1)
            assert str(g) == before
            g.lint()
            continue
        finally:
            _core._testing.alloc_fail_after(-1)
        g.lint()
        break
    else:
        pytest.fail("it never got through")
    assert n > 0, "there was no allocation to fail"


def test_many_threads() -> None:
    """The interpreter's lock serialises; nothing is lost."""
    g = fx.Graph()

    def work(i: int) -> None:
        rng = random.Random(i)
        mine = [g.placeholder(f"p{i}")]
        for _ in range(300):
            mine.append(g.call_function(operator.add, (rng.choice(mine), [rng.choice(mine)])))
            if rng.random() < 0.3 and not mine[-1].users:
                g.erase_node(mine.pop())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    g.lint()


# -- the stub --------------------------------------------------------------------------------------------------------
STUB = ast.parse((Path(__file__).resolve().parents[2] / "pyconvbn" / "_core.pyi").read_text())


@pytest.mark.parametrize("name", ["Graph", "Node", "NodeUsers"])
def test_stub(name: str) -> None:
    cls = next(n for n in STUB.body if isinstance(n, ast.ClassDef) and n.name == name)
    functions = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
    attributes = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    there = {n for n in vars(getattr(_core, name)) if not n.startswith("__")}
    assert there == {n for n in {*functions, *attributes} if not n.startswith("__")}
    for function, node in functions.items():
        found = getattr(getattr(_core, name), function)
        if function.startswith("__") or node.decorator_list:
            continue
        wanted = [(a.arg, None) for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]][1:]
        got = [(p.name, None) for p in inspect.signature(found).parameters.values()][1:]
        assert got == wanted, function


def test_length() -> None:
    graph = fx.Graph()
    assert len(graph) == 0 and graph, "an empty graph is not false"
    graph.output(graph.placeholder("x"))
    assert len(graph) == len(graph.nodes) == 2
