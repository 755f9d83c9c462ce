# SPDX-License-Identifier: BSD-3-Clause
"""Small graphs for the tests of passes.replace_params_with_constants, and what it has to leave behind."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyconvbn import fx, passes
from pyconvbn.fx import Graph


def values(*shape: int) -> Any:
    return np.arange(1.0, 1.0 + np.prod(shape), dtype=np.float32).reshape(shape)


def freeze_params(gm: Any, *args: Any) -> tuple[list[int], dict[str, tuple[str, str | None, str | None]]]:
    """(what the pass returned, node -> (reason, blocking, into)); what holds always is checked here."""
    names = [node.name for node in gm.graph.nodes]
    rows: list[Any] = []
    remain = passes.replace_params_with_constants(gm, *args, report=rows)
    gm.graph.lint()
    assert [node.name for node in gm.graph.nodes] == names
    found = {}
    for row in rows:
        assert row.step == "parameter" and row.node in names and row.node not in found
        assert (row.outcome == "done") == (row.reason == "OK") == (row.into is not None) == (not row.hint)
        if row.into is not None:
            (node,) = [n for n in gm.graph.nodes if n.name == row.node]
            assert (node.op, node.target) == ("get_attr", row.into) and row.into.startswith("_frozen_param")
            assert isinstance(getattr(gm, row.into), np.ndarray) and node.args == () == tuple(node.kwargs)
        found[row.node] = (row.reason, row.blocking, row.into)
    assert len(gm.graph.find_nodes(op="placeholder")) == len(remain)
    if len(args) < 2:  # metadata would name other indices now
        text = str(gm.graph)
        again: list[Any] = []
        assert passes.replace_params_with_constants(gm, report=again) == list(range(len(remain)))
        assert str(gm.graph) == text and all(row.outcome == "kept" for row in again), "a second run changes nothing"
    return remain, found


def lifted_graph(names: str, build: Any) -> Any:
    """A graph of the inputs `names`, the first of which are its parameters."""
    g = Graph()
    nodes = [g.placeholder(name) for name in names.split()]
    g.output(build(g, *nodes))
    return fx.GraphModule({}, g)


def attributes(build: Any, **members: Any) -> Any:
    """A graph of x that reads `members` by get_attr nodes."""
    g = Graph()
    g.output(build(g, g.placeholder("x")))
    return fx.GraphModule(members, g)


def call(g: Graph, target: Any, *args: Any) -> Any:
    return g.call_function(target, args)
