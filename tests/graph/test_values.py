# SPDX-License-Identifier: BSD-3-Clause
"""What goes into args comes out of args: types, identity, nesting, and what is refused."""

from __future__ import annotations

import copy
import enum
import pickle
import sys
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from pyconvbn import fx
from pyconvbn.fx.immutable import immutable_dict, immutable_list
from pyconvbn.fx.node import map_aggregate, map_arg

sys.path.insert(0, str(Path(__file__).parent))
from bad_input_util import Hostile  # noqa: E402

Point = namedtuple("Point", "x y")  # noqa: PYI024


class Typed(NamedTuple):
    a: Any
    b: Any = 3


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


def through(value: Any) -> Any:
    graph = fx.Graph()
    node = graph.call_function(len, (value,), {"k": value})
    graph.lint()
    assert type(node.kwargs["k"]) is type(node.args[0])
    return node.args[0]


PLAIN: list[Any] = [None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 2**63, 10**40]
PLAIN += [0.0, -0.0, 1e308, 5e-324, "", "a b", "a\0b", "é€😀"]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values(value: Any) -> None:
    got = through(value)
    assert type(got) is type(value)
    assert repr(got) == repr(value)


@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.int32(3), np.bool_(True), Color.RED, Text("t"), 1j, b"x", ..., NotImplemented]
    + [float, len, "\ud800"]
    + [range(3), frozenset({1}), np.zeros(3), np.dtype("f4"), SimpleNamespace(), OrderedDict(a=1), defaultdict(int)],
    ids=repr,
)
def test_everything_else_is_kept_as_it_is(value: Any) -> None:
    assert through(value) is value


def test_nan_keeps_its_bits() -> None:
    bits = np.array([0x7FF8000000000123, 0xFFF8000000000000], np.uint64).view(np.float64)
    for number in bits.tolist():
        got = through(number)
        assert np.float64(got).tobytes() == np.float64(number).tobytes()


def test_containers() -> None:
    value = (1, [2, {"k": (3,), 4: [], (5, "x"): None}], slice(1, [2], None), {}, (), [])
    got = through(value)
    assert got == value
    assert type(got) is tuple and type(got[1]) is immutable_list and type(got[1][1]) is immutable_dict
    assert list(got[1][1]) == ["k", 4, (5, "x")]
    assert type(got[2]) is slice and type(got[2].stop) is immutable_list
    assert through(immutable_list([1])) == [1] and through(immutable_dict(a=1)) == {"a": 1}


def test_named_tuples_keep_their_class() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(len, (Point(x, [1]), Typed(a=2)))
    point, typed = node.args
    assert type(point) is Point and point.x is x and point.y == [1]
    assert type(typed) is Typed and typed == (2, 3)
    assert copy.deepcopy(graph).find_nodes(op="call_function")[0].args[0].y == [1]


def test_nodes_are_found_everywhere() -> None:
    graph = fx.Graph()
    a, b, c, d, e = (graph.placeholder(n) for n in "abcde")
    node = graph.call_function(len, (a, [b, {"k": c, 1: (d,)}], slice(None, e, a)), {"z": a})
    assert node.all_input_nodes == [a, b, c, d, e]
    assert all(list(n.users) == [node] for n in (a, b, c, d, e))
    assert node.args[0] is a and node.args[1][1]["k"] is c and node.args[2].stop is e


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda x: {x}, "set"),
        (lambda x: frozenset({x}), "frozenset"),
        (lambda x: {"a": [{x}]}, "set"),
        (lambda x: OrderedDict(a=x), "collections.OrderedDict"),
        (lambda x: type("List", (list,), {})([1, (x,)]), "List"),
        (lambda x: type("Tuple", (tuple,), {})((x,)), "Tuple"),
    ],
)
def test_nodes_where_the_graph_cannot_see_them(make: Any, where: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with pytest.raises(TypeError, match=f"args: expected nodes inside tuples.* got one inside a {where}"):
        graph.call_function(len, (make(x),))
    assert len(graph.nodes) == 1 and not x.users


def test_nodes_as_keys() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for key in (x, (1, x)):
        with pytest.raises(TypeError, match="as values of a dict only"):
            graph.call_function(len, ({key: 1},))
    with pytest.raises(TypeError, match="kwargs: expected str keys, got int"):
        graph.call_function(len, (), {1: 2})


def nested(levels: int, kind: Any) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = kind(value)
    return value


@pytest.mark.parametrize("kind", [lambda v: (v,), lambda v: [v], lambda v: {"k": v}, lambda v: slice(v, None)])
def test_nesting(kind: Any) -> None:
    assert repr(through(nested(200, kind))) == repr(nested(200, kind))
    for levels in (201, 10_000):
        graph = fx.Graph()
        with pytest.raises(ValueError, match="at most 200 levels of nesting"):
            graph.call_function(len, (nested(levels, kind),))
        assert len(graph.nodes) == 0


def test_containers_inside_themselves() -> None:
    graph = fx.Graph()
    loop: list[Any] = []
    loop += [loop, loop]
    mapping: dict[str, Any] = {}
    mapping["self"] = mapping
    odd: Any = type("List", (list,), {})()
    odd += [odd, odd]
    for value in (loop, mapping, odd, ({1: odd},)):
        with pytest.raises(ValueError, match="levels of nesting"):
            graph.call_function(len, (value,))
    assert len(graph.nodes) == 0
    loop.clear()
    odd.clear()
    mapping.clear()


def test_hostile_objects_are_just_kept() -> None:
    graph = fx.Graph()
    bad = Hostile()
    node = graph.call_function(bad, (bad, [bad]), {"k": bad}, type_expr=bad)
    graph.output(node)
    assert node.name == "hostile"
    assert node.args[0] is bad and node.args[1][0] is bad and node.target is bad and node.type is bad
    graph.lint()
    assert copy.deepcopy(graph).find_nodes(op="call_function")[0].args[0] is bad
    for call in (lambda: str(graph), lambda: graph.find_nodes(op="call_function", target=Hostile())):
        with pytest.raises(ZeroDivisionError):
            call()
    assert graph.find_nodes(op="call_function", target=bad) == [node]
    assert len(graph.nodes) == 2


def test_a_target_that_erases_what_is_searched() -> None:
    graph = fx.Graph()

    class Eraser(Hostile):
        def __eq__(self, other: object) -> bool:
            for n in reversed(graph.nodes):
                graph.erase_node(n)
            return True

        __hash__ = None  # type: ignore[assignment]

    for _ in range(5):
        graph.call_function(Eraser())
    assert graph.find_nodes(op="call_function", target=len) == [] and len(graph.nodes) == 0


def test_a_dict_key_that_changes_the_graph() -> None:
    """__hash__ runs while args are built: whatever it does, an exception or the arguments come of it."""
    graph = fx.Graph()
    armed = False

    class Key:
        def __hash__(self) -> int:
            if armed:
                for n in reversed(graph.nodes):
                    graph.erase_node(n)
            return 1

    node = graph.call_function(len, ({Key(): [1, 2]}, 2))
    armed = True
    with pytest.raises(RuntimeError, match="was erased"):
        node.args  # noqa: B018
    assert len(graph.nodes) == 0


def test_an_argument_that_changes_while_it_is_read() -> None:
    class Meta(type):
        @property
        def _fields(cls) -> tuple[str, ...]:
            items.clear()
            graph.erase_node(x)
            return ()

    graph = fx.Graph()
    x = graph.placeholder("x")
    items: list[Any] = [Meta("Odd", (tuple,), {})(), x, x]
    with pytest.raises(RuntimeError, match="not a node of this graph, or erased|was erased"):
        graph.call_function(len, (x, items))
    assert len(graph.nodes) == 0
    mapping: dict[str, Any] = {"a": Meta("Odd", (tuple,), {})(), "b": 1}
    x, items = graph.placeholder("x"), []

    class Clears(Meta):
        @property
        def _fields(cls) -> tuple[str, ...]:
            mapping.clear()
            return ()

    mapping["a"] = Clears("Odd", (tuple,), {})()
    assert len(graph.call_function(len, (mapping,), mapping).args) == 1


def test_args_cannot_be_changed_in_place() -> None:
    graph = fx.Graph()
    node = graph.call_function(len, ([1], {"a": 1}), {"k": 1})
    values, mapping = node.args
    for call in (
        lambda: values.append(1),
        lambda: values.sort(),
        lambda: values.__setitem__(0, 2),
        lambda: values.__iadd__([1]),
        lambda: mapping.update(b=1),
        lambda: mapping.__setitem__("a", 2),
        lambda: mapping.__ior__({}),
        lambda: node.kwargs.pop("k"),
    ):
        with pytest.raises(TypeError, match="cannot be changed in place"):
            call()
    assert hash(values) == hash(immutable_list([1])) and hash(mapping) == hash(immutable_dict(a=1))
    for value in (values, mapping):
        for other in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
            assert other == value and type(other) is type(value)


def test_map_arg_and_map_aggregate() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = (x, [1, {"k": x}], Point(x, 2), slice(x, None), range(2))
    assert map_arg(value, lambda n: n.name) == ("x", [1, {"k": "x"}], Point("x", 2), slice("x", None), range(2))
    assert map_aggregate((1, [2, Typed(3)]), str) == ("1", ["2", Typed("3", "3")])
    assert type(map_arg([x], lambda n: n)) is immutable_list
    with pytest.raises(TypeError, match="fn: expected a callable"):
        map_arg(1, 3)  # type: ignore[arg-type]
