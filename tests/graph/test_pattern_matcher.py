# SPDX-License-Identifier: BSD-3-Clause
"""fx.pattern_matcher: registering and applying, and the efficient ConvBN pass as three handlers."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import config, functional as F, fx, nn, passes
from pyconvbn.fx.pattern_matcher import (
    CallFunctionVarArgs, CallMethodVarArgs, CallModuleVarArgs, Match, PatternMatcherPass, efficient_conv_bn_eval_pass,
    register_graph_pattern,
)

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import KINDS, Multi, close, randomise, sample, trace  # noqa: E402


@pytest.fixture
def enabled() -> Iterator[None]:
    config.efficient_conv_bn_eval_fx_passes = True
    yield
    config.efficient_conv_bn_eval_fx_passes = False


@pytest.mark.parametrize("form", ["module", "functional", "aten"])
@pytest.mark.parametrize("kind", KINDS)
def test_handlers_do_what_the_pass_does(kind: str, form: str, enabled: None, rng: np.random.Generator) -> None:
    model = Multi(kind, rng, form=form)
    gm = trace(model)
    other = copy.deepcopy(gm)
    before = pyconvbn.counters["efficient_conv_bn_eval"]
    report = passes.efficient_conv_bn_eval(other)
    called = efficient_conv_bn_eval_pass.apply(gm.graph)
    gm.graph.lint()
    assert called == 4 and report.counts["fused"] == 3
    assert str(gm.graph) == str(other.graph)
    assert pyconvbn.counters["efficient_conv_bn_eval"] == before + 6
    x = sample(kind, rng, np.float64)
    close(gm(x), model.reference(x))
    text = str(gm.graph)
    assert efficient_conv_bn_eval_pass.apply(gm) == 1 and str(gm.graph) == text


@pytest.mark.parametrize(("on", "freezing"), [(False, False), (False, True), (True, True)])
def test_handlers_obey_the_switches(on: bool, freezing: bool, rng: np.random.Generator) -> None:
    gm = trace(Multi("conv1d", rng))
    text = str(gm.graph)
    config.efficient_conv_bn_eval_fx_passes, config.freezing = on, freezing
    try:
        assert efficient_conv_bn_eval_pass.apply(gm.graph) == 0
    finally:
        config.efficient_conv_bn_eval_fx_passes = config.freezing = False
    assert str(gm.graph) == text


def test_subclasses_of_a_module_class_count(enabled: None) -> None:
    class MyNorm(nn.BatchNorm1d):
        pass

    root = randomise(nn.Sequential(nn.Conv1d(1, 2, 1), MyNorm(2)), np.random.default_rng(0))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("1", (graph.call_module("0", (x,)),)))
    gm = fx.GraphModule(root, graph)
    assert efficient_conv_bn_eval_pass.apply(gm) == 1
    assert [n.name for n in gm.graph.nodes] == ["x", "get_conv", "get_bn", "efficient_conv_bn_eval", "output"]


def test_the_pass_has_three_handlers() -> None:
    kinds = [type(entry.pattern).__name__ for entry in efficient_conv_bn_eval_pass]
    assert kinds == ["CallModuleVarArgs", "CallFunctionVarArgs", "CallFunctionVarArgs"]
    assert "BatchNorm2d" in repr(efficient_conv_bn_eval_pass.patterns[0].pattern)


def test_extra_check_order_and_prepend() -> None:
    seen: list[str] = []
    table = PatternMatcherPass("table")

    def add(name: str, pattern: Any, check: Any = lambda match: True, **more: Any) -> None:
        register_graph_pattern(pattern, check, pass_dict=table, **more)(lambda match, *a, **k: seen.append(name))

    add("two", CallFunctionVarArgs([operator.mul]), lambda match: match.args[1] == 2)
    add("any", CallFunctionVarArgs([operator.mul, operator.add]))
    add("never", CallFunctionVarArgs([operator.add]))
    add("first", CallFunctionVarArgs(F.relu), prepend=True)
    add("method", CallMethodVarArgs("sum"))
    gm = fx.symbolic_trace(lambda x: (F.relu(x) * 2 + x * 3).sum())
    assert len(table) == 5 and table.patterns[0].handler is not table.patterns[1].handler
    assert table.apply(gm) == 5
    assert seen == ["first", "two", "any", "any", "method"]


def test_match_has_the_arguments_and_the_graph() -> None:
    got: list[Match] = []
    table = PatternMatcherPass()

    @register_graph_pattern(CallFunctionVarArgs(F.conv1d), pass_dict=table)
    def handler(match: Match, *args: Any, **kwargs: Any) -> None:
        got.append(match)
        assert args == match.args and kwargs == match.kwargs

    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(F.conv1d, (x,), {"weight": w, "stride": 2})
    graph.output(node)
    assert table.apply(fx.GraphModule({}, graph)) == 1
    (match,) = got
    assert match.nodes == [node] and match.output_node() is node and match.output_nodes() == [node]
    assert match.args == (x,) and match.kwargs == {"weight": w, "stride": 2} and match.graph is graph


def test_a_handler_may_erase_nodes_still_to_come() -> None:
    table = PatternMatcherPass()

    @register_graph_pattern(CallFunctionVarArgs(F.relu), pass_dict=table)
    def handler(match: Match, x: Any) -> None:
        for node in reversed(list(match.graph.nodes)):
            if node.target is F.relu:
                node.replace_all_uses_with(x)
                match.graph.erase_node(node)

    gm = fx.symbolic_trace(lambda x: F.relu(F.relu(x)))
    assert table.apply(gm) == 1 and [n.op for n in gm.graph.nodes] == ["placeholder", "output"]


@pytest.mark.parametrize("where", ["handler", "check"])
def test_failure_leaves_the_graph_as_it_was(where: str) -> None:
    table = PatternMatcherPass()
    calls: list[int] = []

    def fail_second(match: Match, *args: Any) -> bool:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return True

    def edit(match: Match, *args: Any) -> None:
        match.nodes[0].replace_all_uses_with(args[0])
        match.erase_nodes()
        if where == "handler":
            fail_second(match)

    check = fail_second if where == "check" else (lambda match: True)
    register_graph_pattern(CallFunctionVarArgs(F.relu), check, pass_dict=table)(edit)
    gm = fx.symbolic_trace(lambda x: F.relu(F.relu(x)))
    text = str(gm.graph)
    with pytest.raises(KeyboardInterrupt):
        table.apply(gm)
    assert str(gm.graph) == text
    gm.graph.lint()


def test_errors_name_the_argument() -> None:
    table = PatternMatcherPass()
    with pytest.raises(TypeError, match=r"^graph: expected a Graph"):
        table.apply(3)
    with pytest.raises(TypeError, match=r"^pattern: expected"):
        register_graph_pattern(F.relu, pass_dict=table)
    with pytest.raises(TypeError, match=r"^pass_dict: expected"):
        register_graph_pattern(CallFunctionVarArgs(F.relu), pass_dict={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^fns: expected module classes"):
        CallModuleVarArgs([F.relu])
    with pytest.raises(ValueError, match=r"^fns: expected at least one"):
        CallFunctionVarArgs([])
