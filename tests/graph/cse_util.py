# SPDX-License-Identifier: BSD-3-Clause
"""Graphs for the tests of common subexpressions, and what holds after every run of the pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyconvbn import functional as F
from pyconvbn import fx, nn, passes
from pyconvbn.freeze_report import FreezeRow


class Root(nn.Module):
    """Holds what a test names."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            setattr(self, name, value)


def state(gm: Any) -> list[Any]:
    return [(n.name, n.op, n.target, repr(n.args), repr(n.kwargs), [u.name for u in n.users]) for n in gm.graph.nodes]


def run_cse(gm: Any) -> list[FreezeRow]:
    """The rows, after all that holds whatever the graph: a second run finds nothing more and says the same of the rest."""
    rows: list[FreezeRow] = []
    names = [node.name for node in gm.graph.nodes]
    changed = passes.cse(gm, report=rows)
    gm.graph.lint()
    left = [node.name for node in gm.graph.nodes]
    done = [row for row in rows if row.outcome == "done"]
    assert changed == bool(done)
    assert [name for name in names if name not in {row.node for row in done}] == left
    for row in rows:
        assert row.step == "cse" and row.node in names
        assert (row.into is None) == (row.outcome == "kept") == (row.reason != "OK")
        assert row.into is None or (row.into in left and names.index(row.into) < names.index(row.node))
        assert row.blocking is None or row.blocking in left
        assert row.outcome == "done" or row.hint
    before, again = state(gm), []
    assert passes.cse(gm, report=again) is False
    assert state(gm) == before
    assert again == [row for row in rows if row.outcome == "kept"]
    return rows


def of(build: Callable[[fx.Graph, Any], Any], root: Any = None) -> Any:
    """A GraphModule of x -> what `build` returns."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(build(graph, x))
    gm = fx.GraphModule(root if root is not None else Root(), graph)
    gm.graph.lint()
    return gm


def pair(make: Callable[[fx.Graph, Any], Any], make_other: Callable[[fx.Graph, Any], Any] | None = None,
         root: Any = None) -> list[FreezeRow]:
    """Rows for two computations whose values end in a new one, so that neither is returned."""

    def build(graph: fx.Graph, x: Any) -> Any:
        return graph.call_function(F.add, (make(graph, x), (make_other or make)(graph, x)))

    return run_cse(of(build, root))


def outcomes(rows: list[FreezeRow]) -> list[tuple[str, str]]:
    return [(row.node, row.reason if row.outcome == "kept" else f"into {row.into}") for row in rows]


def node_names(gm: Any) -> list[str]:
    return [node.name for node in gm.graph.nodes]


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)
