# SPDX-License-Identifier: BSD-3-Clause
"""The run loop of GraphModule: when values are freed, what is said about failures, what may happen during a call."""

from __future__ import annotations

import gc
import operator
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn
from pyconvbn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from exec_util import Box, chain, direct_of, module_of  # noqa: E402

X = np.random.default_rng(0).normal(size=(2, 4, 7, 7)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(4, 4, 3, 3)).astype(np.float32)


# -- values are freed after their last use ---------------------------------------------------------------------------
def test_values_die_after_their_last_use() -> None:
    alive: list[weakref.ref[Box]] = []
    counts: list[int] = []

    def make(*_: Any) -> Box:
        counts.append(sum(ref() is not None for ref in alive))
        box = Box()
        alive.append(weakref.ref(box))
        return box

    gm = chain(*[make] * 20)
    gm(1)
    assert counts == [0] + [1] * 19  # only its own input, which the call itself holds
    assert all(ref() is None for ref in alive)


def test_an_unused_value_dies_at_once_and_the_last_use_counts() -> None:
    alive: list[weakref.ref[Box]] = []

    def make() -> Box:
        alive.append(weakref.ref(box := Box()))
        return box

    states: list[list[bool]] = []

    def look(*_: Any) -> int:
        states.append([ref() is not None for ref in alive])
        return 0

    graph = fx.Graph()
    a = graph.call_function(make)
    graph.call_function(make)  # used by nobody
    graph.call_function(look)
    graph.call_function(look, (a, [a]))
    graph.call_function(look)
    graph.output(None)
    module_of(graph)()
    assert states == [[True, False], [True, False], [False, False]]


def test_values_die_when_a_step_fails() -> None:
    box, seen = Box(), []

    def fail(value: Any) -> None:
        raise ValueError("no")

    graph = fx.Graph()
    kept = graph.call_function(Box)
    seen_node = graph.call_function(lambda b: seen.append(weakref.ref(b)), (kept,))
    graph.call_function(fail, (graph.placeholder("x"),))
    graph.output((kept, seen_node))
    gm = module_of(graph)
    references = sys.getrefcount(box)
    with pytest.raises(ValueError, match="no") as info:
        gm(box)
    del info
    gc.collect()
    assert seen[0]() is None and sys.getrefcount(box) == references


def test_no_reference_is_lost_or_kept() -> None:
    constant, given, attribute = Box(), Box(), Box()

    def pick(*args: Any, **kwargs: Any) -> Any:
        return args[0][0] if isinstance(args[0], list) else args[0]

    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(pick, ([x, constant], (constant, 1)), {"key": graph.get_attr("a"), "c": {"d": constant}})
    graph.output([y, x, (constant,)])
    gm = module_of(graph, a=attribute)
    gm(given)
    before = [sys.getrefcount(v) for v in (constant, given, attribute, None)]
    for _ in range(100):
        gm(given)
        gm(x=given)
        with pytest.raises(TypeError):
            gm(given, given)
    after = [sys.getrefcount(v) for v in (constant, given, attribute, None)]
    assert [abs(a - b) < 50 for a, b in zip(before, after, strict=True)] == [True] * 4
    assert before[:3] == after[:3]


def test_a_module_that_was_run_goes_away() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    gm(np.ones((1, 3), np.float32))
    watch = [weakref.ref(gm), weakref.ref(gm.graph), weakref.ref(gm.get_submodule("0"))]
    del gm
    gc.collect()
    assert [ref() for ref in watch] == [None] * 3


def test_a_cycle_through_a_constant_is_collected() -> None:
    holder = Box()
    graph = fx.Graph()
    graph.output(graph.call_function(id, (holder,)))
    gm = module_of(graph)
    holder.gm = gm  # type: ignore[attr-defined]
    gm()
    watch = weakref.ref(holder)
    del holder, graph, gm
    gc.collect()
    assert watch() is None


# -- failures --------------------------------------------------------------------------------------------------------
def test_an_exception_keeps_its_type_and_names_the_node() -> None:
    class Odd(Exception):
        pass

    def boom(value: Any) -> None:
        raise Odd(value)

    gm = chain(operator.neg, boom)
    node = list(gm.graph.nodes)[2]
    node.meta["stack_trace"] = 'File "model.py", line 12, in forward'
    with pytest.raises(Odd) as info:
        gm(3)
    assert info.value.args == (-3,)
    (note,) = info.value.__notes__
    assert note.startswith("while executing %boom") and 'File "model.py", line 12' in note
    assert info.traceback[-1].name == "boom"


def test_the_innermost_graph_speaks_first() -> None:
    inner = chain(lambda v: 1 // v)
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("z"),)))
    with pytest.raises(ZeroDivisionError) as info:
        module_of(graph, inner=inner)(0)
    assert ["call_function" in note for note in info.value.__notes__] == [True, False]
    assert "call_module[target=inner]" in info.value.__notes__[1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_without_a_word(kind: type[BaseException]) -> None:
    def stop(_: Any) -> None:
        raise kind

    gm = chain(stop)
    with pytest.raises(kind) as info:
        gm(1)
    assert not hasattr(info.value, "__notes__")
    assert chain(operator.neg)(1) == -1


def test_an_interrupt_between_steps_that_run_no_python() -> None:
    gm = chain(lambda v: (signal.raise_signal(signal.SIGINT), v)[1], *[operator.pos] * 10)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            gm(1)
    finally:
        signal.signal(signal.SIGINT, old)


def test_a_value_used_before_it_is_made() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(operator.neg, (x,))
    second = graph.call_function(operator.pos, (first,))
    graph.output(second)
    first.args = (x,)
    second.append(first)
    gm = fx.GraphModule(nn.Module(), graph)
    with pytest.raises(RuntimeError, match="node 'pos' uses 'neg', which has no value yet"):
        gm(1)


# -- meanwhile -------------------------------------------------------------------------------------------------------
def test_edits_take_effect_at_the_next_call() -> None:
    gm = chain(operator.neg, operator.neg)
    assert gm(2) == 2
    second = list(gm.graph.nodes)[2]
    second.replace_all_uses_with(next(iter(second.all_input_nodes)))
    gm.graph.erase_node(second)
    assert gm(2) == -2
    list(gm.graph.nodes)[1].target = operator.pos
    assert gm(2) == 2
    gm.graph = chain(abs).graph
    assert gm(-5) == 5


def test_a_callable_that_edits_the_graph_it_runs_in() -> None:
    def edit(value: int) -> int:
        for node in reversed(gm.graph.nodes):
            if node.op == "call_function" and node.target is not edit:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
        return value

    gm = chain(edit, operator.neg, operator.neg, operator.neg)
    assert gm(4) == -4  # finishes as it began
    assert gm(4) == 4


def test_a_callable_that_erases_itself_and_raises() -> None:
    def vanish(value: int) -> None:
        gm.graph = fx.Graph()
        graph.erase_node(list(graph.nodes)[2])
        graph.erase_node(list(graph.nodes)[1])
        raise ValueError("gone")

    gm = chain(vanish)
    graph = gm.graph
    with pytest.raises(ValueError, match="gone") as info:
        gm(1)
    assert "erased" in info.value.__notes__[0]


def test_a_module_that_calls_itself() -> None:
    def again(value: int) -> int:
        return value if value <= 0 else gm(value - 1) + 1

    gm = chain(again)
    assert gm(50) == 50
    with pytest.raises(RecursionError):
        gm(10**6)
    assert gm(5) == 5


def test_the_module_may_go_while_it_runs() -> None:
    modules = [chain(lambda v: (modules.clear(), gc.collect(), v)[2], operator.neg)]
    assert modules.pop()(3) == -3
    modules.append(chain(lambda v: (modules.clear(), gc.collect(), v)[2], operator.neg))
    assert modules[0](3) == -3 and not modules


def test_many_threads_at_once() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval())
    expected = gm(X)
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(30):
            if not np.array_equal(gm(X), expected):
                wrong.append("other values")

    def edit() -> None:
        for _ in range(30):
            with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
                gm.graph.erase_node(gm.graph.call_function(operator.neg, (1,)))

    threads = [threading.Thread(target=work) for _ in range(4)] + [threading.Thread(target=edit)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_proxies_pass_through() -> None:
    gm = fx.symbolic_trace(lambda a: F.relu(F.add(a, a)))
    assert set(direct_of(gm).values()) == {None, "binary", "unary"}
    graph = fx.Graph()
    result = gm(fx.Proxy(graph.placeholder("z")))
    graph.output(result.node)
    assert [n.name for n in graph.nodes] == ["z", "add", "relu", "output"]
    np.testing.assert_array_equal(module_of(graph)(X), gm(X))


def test_deep_and_long_graphs() -> None:
    gm = chain(*[operator.neg] * 20001)
    assert gm(1) == -1
    nested: Any = 1
    for _ in range(150):
        nested = [nested]
    graph = fx.Graph()
    graph.output(graph.call_function(lambda v: v, (nested,)))
    assert module_of(graph)() == nested


def test_every_allocation_may_fail() -> None:
    testing = _core._testing

    def call(*values: Any, key: Any) -> Any:
        return values[0]

    def attempt(fail: int) -> bool:
        program = _core.Program(gm.graph)
        testing.alloc_fail_after(fail)
        try:
            np.testing.assert_array_equal(program(gm, X), expected)
            return True
        except MemoryError:
            return False
        finally:
            testing.alloc_fail_after(-1)

    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(F.conv2d, (x, W), {"padding": [1, 1]})
    y = graph.call_function(call, (y, *[[x, {"a": 1}]] * 30), {"key": (x, slice(None))})
    graph.output(graph.call_function(F.relu, (y,)))
    gm = module_of(graph)
    expected = gm(X)
    gc.collect()
    live = _core.alloc_stats()["live_blocks"]
    fails = 0
    while not attempt(fails):  # the first that does not fail ends it
        fails += 1
        gc.collect()
        assert _core.alloc_stats()["live_blocks"] == live
    assert fails > 10
