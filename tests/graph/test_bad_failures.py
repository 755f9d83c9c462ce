# SPDX-License-Identifier: BSD-3-Clause
"""Failures in the middle of a call: it has changed nothing."""

from __future__ import annotations

import copy
import gc
import operator
import signal
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn, passes
from pyconvbn.fx import subgraph_rewriter

sys.path.insert(0, str(Path(__file__).parent))
from bad_input_util import (  # noqa: E402
    CLEAN, Functions, Layers, Modules, PASSES, USES,
    X, add_one, by_name, circle, net, other,
    state,
)


# ---- failures in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PASSES, "run", "deepcopy", "pickle", "trace", "eliminate_dead_code"])
@pytest.mark.parametrize("cls", [Modules, Functions])
def test_allocation_failures_change_nothing(cls: type[Modules], name: str) -> None:
    def fresh() -> Any:
        gm = net(cls)
        by_name(gm)["x"].append(gm.graph.call_function(operator.mul, (by_name(gm)["x"], 2)))  # dead
        return gm

    USES[name](fresh())
    failed = 0
    for n in range(500):
        gm = fresh()
        before = state(gm)
        counted = _core.alloc_stats()["total_allocs"]
        _core._testing.alloc_fail_after(n)
        try:
            USES[name](gm)
        except MemoryError:
            failed += 1
            _core._testing.alloc_fail_after(-1)
            assert state(gm) == before
            gm.graph.lint()
        finally:
            _core._testing.alloc_fail_after(-1)
        if _core.alloc_stats()["total_allocs"] - counted <= n:
            break
    else:
        pytest.fail("does not come to an end")
    assert failed > 0


class Boom(BaseException):
    pass


class Trap:
    """Raises at the n-th call, whatever is called through it."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.sprung = False

    def around(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0 and not self.sprung:
                self.sprung = True
                raise Boom
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("cls", [Modules, Functions])
def test_fuse_that_fails_at_any_step_changes_nothing(cls: type[Modules], monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _pass_fuse

    sprung = 0
    for n in range(100):
        trap, gm = Trap(n), net(cls)
        before = state(gm)
        with monkeypatch.context() as patch:
            for home, names in (
                (_pass_fuse, ("_resolve", "_fused_copy", "_like_parameters", "_free_name", "_set", "plan")),
                (_pass_fuse._Changes, ("set", "delete")),
                (_pass_fuse._Editor, ("_free", "_module", "_function", "_remove_bn", "_delete_unused")),
                (fx.Graph, ("erase_node",)),
            ):
                for attribute in names:
                    patch.setattr(home, attribute, trap.around(getattr(home, attribute)))
            if not trap.sprung:
                try:
                    passes.fuse_conv_bn(gm, inplace=True)
                except Boom:
                    pass
        if not trap.sprung:
            break
        sprung += 1
        assert state(gm) == before
        gm.graph.lint()
    assert sprung > 5 and "b" not in by_name(gm) and "batch_norm" not in by_name(gm)


def test_efficient_that_fails_when_it_reports_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = net()
    before, count = state(gm), pyconvbn.counters["efficient_conv_bn_eval"]
    monkeypatch.setattr(passes.FoldReport, "_from_core", Trap(0).around(passes.FoldReport._from_core))
    with pytest.raises(Boom):
        passes.efficient_conv_bn_eval(gm)
    assert state(gm) == before and pyconvbn.counters["efficient_conv_bn_eval"] == count


def test_interrupt_in_a_filter_and_a_callback() -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    for arguments in (
        {"replacement": Layers(), "match_filters": [interrupt]},
        {"replacement": None, "replacement_callback": interrupt},
    ):
        gm = net()
        before = state(gm)
        with pytest.raises(KeyboardInterrupt):
            subgraph_rewriter.replace_pattern_with_filters(gm, add_one, **arguments)  # type: ignore[arg-type]
        assert state(gm) == before


def test_replacement_that_is_no_graph_adds_no_module() -> None:
    made = fx.symbolic_trace(Layers())
    made.graph.output(made.graph.call_module("nowhere", tuple(made.graph.nodes)[:1]))
    for replacement in (made, fx.Graph(), circle(), lambda x, y: x + y, lambda x: (x, x)):
        gm = net()
        before = state(gm)
        with pytest.raises(CLEAN):
            subgraph_rewriter.replace_pattern(gm, add_one, replacement)
        assert state(gm) == before


def test_a_graph_that_replaces_itself() -> None:
    gm = net()
    wanted = gm(X)
    subgraph_rewriter.replace_pattern(gm, gm.graph, gm.graph)
    gm.graph.lint()
    np.testing.assert_array_equal(gm(X), wanted)


def test_callbacks_can_look_but_not_touch() -> None:
    def erase(match: Any, graph: Any, pattern: Any) -> Any:
        for node in reversed(graph.nodes):
            graph.erase_node(node)

    def erase_pattern(match: Any, graph: Any, pattern: Any) -> Any:
        for node in reversed(pattern.nodes):
            pattern.erase_node(node)

    def add(match: Any, graph: Any, pattern: Any) -> Any:
        graph.placeholder("more")

    for callback in (erase, erase_pattern, add):
        for where in ("match_filters", "replacement_callback"):
            gm = net()
            before = state(gm)
            arguments = {where: [callback] if where == "match_filters" else callback}
            rewrite: Any = subgraph_rewriter.replace_pattern_with_filters
            with pytest.raises(RuntimeError, match="cannot be changed while"):
                rewrite(gm, add_one, other, **arguments)
            assert state(gm) == before


@pytest.mark.parametrize("where", ["function", "method", "module"])
def test_interrupt_while_running(where: str) -> None:
    class Value:
        def method(self) -> Any:
            raise KeyboardInterrupt

    class Stops(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.method()

    graph = fx.Graph()
    x = graph.placeholder("x")
    made = {
        "function": lambda: graph.call_function(Value.method, (x,)),
        "method": lambda: graph.call_method("method", (x,)),
        "module": lambda: graph.call_module("stops", (x,)),
    }[where]()
    graph.output(made)
    gm = fx.GraphModule({"stops": Stops()}, graph)
    for run in (gm, lambda v: fx.Interpreter(gm).run(v), lambda v: fx.shape_prop(gm, v)):
        value = Value()
        seen = weakref.ref(value)
        before = state(gm)
        with pytest.raises(KeyboardInterrupt):
            run(value)
        assert state(gm) == before
        del value
        gc.collect()
        assert seen() is None


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers on this system")
def test_signals_are_heard_in_long_loops() -> None:
    graph = fx.Graph()
    node: Any = graph.placeholder("x")
    for _ in range(3000):
        node = graph.call_function(operator.add, (node, 1))
    graph.output(node)
    gm = fx.GraphModule(nn.Module(), graph)
    before = str(graph)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for use in (gm, passes.dce, passes.efficient_conv_bn_eval, copy.deepcopy):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                while True:
                    use(0 if use is gm else gm)
            assert str(graph) == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_shape_prop_of_a_callable_that_edits_the_graph() -> None:
    gm = net()

    def edit(value: Any) -> Any:
        for node in reversed(gm.graph.nodes):
            gm.graph.erase_node(node)
        return value

    node = by_name(gm)["x"]
    node.append(called := gm.graph.call_function(edit, (node,)))
    by_name(gm)["c"].args = (called,)
    with pytest.raises(CLEAN):
        fx.shape_prop(gm, X)
    assert len(gm.graph.nodes) == 0
