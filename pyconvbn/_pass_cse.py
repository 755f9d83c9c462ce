# SPDX-License-Identifier: BSD-3-Clause
"""Common subexpressions, computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _core
from ._pass_run import add_rows, all_or_nothing
from .freeze_report import FreezeRow

if TYPE_CHECKING:
    from .fx import GraphModule


def cse(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> bool:
    """Merges nodes that compute the same value, in place: the users of the later ones take the first.

    The same means: one operator, or one module object, with the same arguments once they are bound to the operator's
    schema, so that keywords, positions and defaults do not matter. Literals are compared by type and value: `x + 1`,
    `x + 1.0` and `x + True` differ, so do 0.0 and -0.0, tuple and list; arrays and other objects are compared by
    identity. Two get_attr nodes that read one object count as one input; they themselves stay, as placeholders do.

    Left alone are random operators, operators and modules that write, that train or that are not known, values whose
    memory the graph writes or returns, and pairs with a write to an input between them; behind the write equal nodes
    merge with each other. Each of these that equals an earlier node gets a row.

    Args:
        gm: the graph to change.
        report: a list that gets a row for each node merged (`into`: the node that is left) and each equal one kept.

    Returns:
        Whether anything was merged.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, passes
    >>> gm = fx.symbolic_trace(lambda x: (x + 1) * (x + 1.0) - (x + 1))
    >>> passes.cse(gm), passes.cse(gm)
    (True, False)
    >>> [node.name for node in gm.graph.nodes]
    ['x', 'add', 'add_1', 'mul', 'sub', 'output']

    Source: Cocke, "Global common subexpression elimination", 1970.
    """
    from . import passes

    graph = passes._check(gm)
    with all_or_nothing(gm):
        merged, rows = _core.pass_cse(graph, gm)
        add_rows(report, rows)
    return merged > 0
