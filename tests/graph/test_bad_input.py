# SPDX-License-Identifier: BSD-3-Clause
"""Graphs, values, targets and nodes that are wrong: each is a clean error or does what was asked."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyconvbn import _core, fx, nn, passes

sys.path.insert(0, str(Path(__file__).parent))
from bad_input_util import (  # noqa: E402
    CLEAN, Hostile, Modules, Nameless, SHOWS, USES, X, by_name, circle, net, other, replace, state,
)


# ---- graphs that are wrong -------------------------------------------------------------------------------------------


def moved() -> Any:
    gm = net()
    by_name(gm)["b"].append(by_name(gm)["c"])
    return gm


def uses_itself() -> Any:
    gm = net()
    by_name(gm)["c"].args = (by_name(gm)["c"],)
    return gm


def late_input() -> Any:
    gm = net()
    by_name(gm)["b"].append(by_name(gm)["x"])
    return gm


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [moved, uses_itself, circle, late_input])
def test_used_before_defined(make: Callable[[], Any], use: str) -> None:
    gm = make()
    before = str(gm.graph)
    if use in SHOWS or (use == "replace" and make is not moved):
        USES[use](gm)
    elif use == "replace":
        with_error = False
        try:
            USES[use](gm)
        except CLEAN:
            with_error = True
        assert not with_error or str(gm.graph) == before
    else:
        with pytest.raises(RuntimeError, match=r"before it has been defined|no value yet|was not copied|stand before"):
            USES[use](gm)
        assert str(gm.graph) == before


def test_error_of_a_circle_names_both_nodes() -> None:
    gm = circle()
    for use in ("run", "interpreter", "deepcopy", "pickle", "trace", "graph_copy"):
        with pytest.raises(RuntimeError) as caught:
            USES[use](gm)
        assert "b" in str(caught.value) and "c" in str(caught.value)


def without_output() -> Any:
    gm = net()
    gm.graph.erase_node(by_name(gm)["output"])
    return gm


def two_outputs() -> Any:
    gm = net()
    gm.graph.output(by_name(gm)["c"])
    return gm


def early_output() -> Any:
    gm = net()
    by_name(gm)["output"].append(by_name(gm)["add"])
    return gm


def used_output() -> Any:
    gm = net()
    gm.graph.call_function(abs, (by_name(gm)["output"],))
    return gm


def empty_output() -> Any:
    gm = net()
    by_name(gm)["output"].args = ()
    return gm


def no_nodes() -> Any:
    return fx.GraphModule(nn.Module(), fx.Graph())


def no_module() -> Any:
    gm = net()
    assert gm.delete_submodule("c")
    return gm


def no_attribute() -> Any:
    gm = net()
    with gm.graph.inserting_before():
        gm.graph.get_attr("no.such")
    return gm


def wrong_arguments() -> Any:
    gm = net()
    by_name(gm)["c"].args = ()
    by_name(gm)["b"].args = (by_name(gm)["c"], 3, 4)
    return gm


def no_receiver() -> Any:
    gm = net()
    by_name(gm)["output"].prepend(gm.graph.call_method("foo", ()))
    return gm


def none_for_module() -> Any:
    gm = net()
    gm.b = None
    return gm


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "make",
    [without_output, two_outputs, early_output, used_output, empty_output, no_nodes, no_module, no_attribute,
     wrong_arguments, no_receiver, none_for_module],
)  # fmt: skip
def test_odd_graphs(make: Callable[[], Any], use: str) -> None:
    gm = make()
    before = state(gm)
    try:
        USES[use](gm)
    except CLEAN as error:
        assert str(error)
        assert state(gm) == before
    else:
        assert use not in ("run", "interpreter") or make not in (no_module, no_attribute, no_receiver, none_for_module)
    if use in SHOWS:
        str(gm.graph)


def test_a_graph_without_an_output_returns_none() -> None:
    for make in (without_output, empty_output):
        gm = make()
        assert gm(X) is None and fx.Interpreter(gm).run(X) is None and copy.deepcopy(gm)(X) is None
        assert fx.Transformer(gm).transform()(X) is None and fx.Graph().graph_copy(gm.graph, {}) is None


def test_call_method_without_a_receiver() -> None:
    gm = no_receiver()
    for run in (gm, fx.Interpreter(gm).run):
        with pytest.raises(RuntimeError, match="foo.*needs the object as its first argument"):
            run(X)


def test_the_root_of_a_graph_cannot_be_copied_alone() -> None:
    with pytest.raises(RuntimeError, match="root"):
        copy.deepcopy(fx.Graph()._root)


# ---- values without end ----------------------------------------------------------------------------------------------


def deep_list() -> Any:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


def deep_slice() -> Any:
    value = None
    for _ in range(100_000):
        value = slice(value)
    return value


def own_list() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def own_dict() -> Any:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


@pytest.mark.parametrize("make", [deep_list, deep_slice, own_list, own_dict])
def test_nesting_without_end(make: Callable[[], Any]) -> None:
    value = make()
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(len, (x,))
    before = str(graph)
    calls: list[Callable[[], Any]] = [
        lambda: graph.call_function(len, (value,)),
        lambda: graph.call_function(len, (), {"k": value}),
        lambda: graph.placeholder("y", default_value=value),
        lambda: graph.output(value),
        lambda: setattr(node, "args", (value,)),
        lambda: setattr(node, "kwargs", {"k": value}),
        lambda: node.update_arg(0, value),
        lambda: node.update_kwarg("k", value),
        lambda: node.insert_arg(0, value),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="at most 200 levels"):
            call()
    assert str(graph) == before
    node.meta["value"] = value  # meta holds what it likes; walking through it ends
    for walk in (copy.deepcopy, pickle.dumps):
        try:
            walk(graph)
        except RecursionError:
            pass
    with pytest.raises((RecursionError, TypeError)):
        fx.symbolic_trace(lambda x: x + value)
    if isinstance(value, list):  # freed step by step, not by recursion of the test
        while value and value[0] is not value:
            value = value[0]


def test_many_arguments() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(max, (x,) * 200_000)
    graph.output([node] * 50_000)
    gm = fx.GraphModule(nn.Module(), graph)
    assert gm(3) == [3] * 50_000 == copy.deepcopy(gm)(3)
    assert len(node.users) == 1 and node.all_input_nodes == [x]
    node.update_arg(199_999, 7)
    node.insert_arg(0, x)
    assert gm(3)[0] == 7 and len(node.args) == 200_001
    graph.lint()
    assert not passes.dce(gm)


# ---- targets ---------------------------------------------------------------------------------------------------------


class Unhashable(Nameless):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


class OddName(Nameless):
    __name__ = 5
    __module__ = 7  # type: ignore[assignment]


@pytest.mark.parametrize("cls", [Nameless, Unhashable, Hostile, OddName])
def test_odd_callables(cls: type) -> None:
    gm = net()
    node = by_name(gm)["add"]
    node.append(called := gm.graph.call_function(cls(), (node,)))
    by_name(gm)["output"].args = (called,)
    wanted = net(Modules)(X).shape
    assert gm(X).shape == wanted == fx.Interpreter(gm).run(X).shape == copy.deepcopy(gm)(X).shape
    gm.graph.lint()
    assert str(called) in gm.code and str(called) in str(gm.graph)
    for use in USES:
        fresh = copy.deepcopy(gm)
        before = str(fresh.graph)
        try:
            USES[use](fresh)
        except (*CLEAN, ZeroDivisionError, pickle.PicklingError):
            assert str(fresh.graph) == before
    assert passes.efficient_conv_bn_eval(gm).counts == {"fused": 1}
    assert gm(X).shape == wanted


@pytest.mark.parametrize("op", ["call_method", "call_module", "get_attr", "placeholder", "output"])
@pytest.mark.parametrize("target", [5, None, b"x", len, Hostile(), X], ids=lambda t: type(t).__name__)
def test_targets_that_are_no_str(op: str, target: Any) -> None:
    graph = fx.Graph()
    with pytest.raises(TypeError, match="target: expected a str"):
        graph.create_node(op, target)
    assert len(graph.nodes) == 0


def test_names_that_no_encoding_has() -> None:
    graph = fx.Graph()
    for call in (
        lambda: graph.create_node("get_attr", "\ud800"),
        lambda: graph.create_node("call_function", len, (), {}, "\ud800"),
        lambda: graph.create_node("call_function", len, (), {"\ud800": 1}),
    ):
        with pytest.raises(ValueError):
            call()
    assert len(graph.nodes) == 0


# ---- nodes that are not the graph's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["foreign", "erased", "of a dead graph"])
def test_nodes_of_elsewhere(kind: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(abs, (x,))
    graph.output(y)
    if kind == "erased":
        z = graph.call_function(abs, (x,))
        graph.erase_node(z)
    else:
        home = fx.Graph()
        z = home.placeholder("z")
        if kind == "of a dead graph":
            del home
            gc.collect()
    gm = fx.GraphModule(nn.Module(), graph)
    before = state(gm)
    calls: list[Callable[[], Any]] = [
        lambda: graph.call_function(abs, (z,)),
        lambda: graph.call_function(abs, ([{"a": (slice(z),)}],)),
        lambda: graph.call_function(abs, (), {"k": z}),
        lambda: graph.output(z),
        lambda: graph.placeholder("p", default_value=z),
        lambda: graph.erase_node(z),
        lambda: graph.inserting_before(z),
        lambda: graph.inserting_after(z),
        lambda: graph.node_copy(y, lambda n: z),
        lambda: fx.Graph().graph_copy(graph, {x: z}),
        lambda: setattr(y, "args", (z,)),
        lambda: setattr(y, "kwargs", {"k": z}),
        lambda: y.update_arg(0, z),
        lambda: y.update_kwarg("k", z),
        lambda: y.insert_arg(0, z),
        lambda: y.replace_input_with(x, z),
        lambda: y.replace_all_uses_with(z),
        lambda: y.append(z),
        lambda: y.prepend(z),
        lambda: _core.pass_bind(graph, z),
        lambda: _core.pass_efficient(graph, gm, len, len, (), z),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()
        assert state(gm) == before
    assert z not in graph.nodes
