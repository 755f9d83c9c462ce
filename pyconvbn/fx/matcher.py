# SPDX-License-Identifier: BSD-3-Clause
"""Finding a small graph inside a larger one. The search is written in C.

>>> import operator
>>> from pyconvbn import fx
>>> def double(x):
...     return operator.add(x, x)
>>> gm = fx.symbolic_trace(lambda a, b: operator.mul(operator.add(a, a), operator.add(a, b)))
>>> [match] = fx.SubgraphMatcher(double).match(gm)
>>> match.placeholder_nodes, match.returning_nodes
([a], [add])
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import _core
from .graph import Graph
from .graph_module import GraphModule
from .node import Node
from .tracer import symbolic_trace

__all__ = ["InternalMatch", "SubgraphMatcher"]


@dataclass
class InternalMatch:
    """One match of a pattern.

    Attributes:
        anchors: the nodes of the pattern where matching started: what it returns and nothing else in it uses.
        nodes_map: node of the pattern to what it matched: a node, or for placeholders also a literal or a list.
        placeholder_nodes: what the pattern's placeholders are bound to, in order; None for one that nothing uses.
        returning_nodes: the nodes that matched what the pattern returns.
        name_node_map: free for callers who name nodes.
    """

    anchors: list[Node]
    nodes_map: dict[Node, Any] = field(default_factory=dict)
    placeholder_nodes: list[Any] = field(default_factory=list)
    returning_nodes: list[Node] = field(default_factory=list)
    name_node_map: dict[str, Node] = field(default_factory=dict)

    def __copy__(self) -> InternalMatch:
        return InternalMatch(
            self.anchors,
            dict(self.nodes_map),
            list(self.placeholder_nodes),
            list(self.returning_nodes),
            dict(self.name_node_map),
        )


def graph_of(source: Callable[..., Any] | Graph, argument: str) -> tuple[Graph, Any]:
    """The graph of a Graph, a GraphModule or something to trace, and the object that keeps its attributes alive."""
    if isinstance(source, Graph):
        return source, source.owning_module
    if not isinstance(source, GraphModule):
        if not callable(source):
            raise TypeError(f"{argument}: expected a function, a Graph or a GraphModule, got {type(source).__name__}")
        source = symbolic_trace(source)
    return source.graph, source


class SubgraphMatcher:
    """Finds all places of a graph that look like a pattern.

    The pattern's placeholders match anything: a node, a literal, a list; the same placeholder the same thing. Every
    other node matches a node of the same kind with the same target and matching arguments, where operators of pyconvbn
    are compared by their schema (a keyword or a position, a default given or left out: one call); lists and tuples are
    alike except as an index. `get_attr` and `call_module` nodes match by target, arrays that tracing met as constants
    by value. Literals match if type and value are equal, floats bit for bit.

    In a match only what the pattern returns is used from outside; no value leaves it and comes back in.

    Differs from torch.fx: two placeholders may be bound to the same node; a failed try leaves nothing behind; dicts and
    slices are looked into; with `match_placeholder` no placeholder matches a literal.

    Args:
        pattern: a function (it is traced), a Graph or a GraphModule.
        match_output: the output node is part of the pattern.
        match_placeholder: placeholders match placeholders only.
        remove_overlapping_matches: of matches that share a node (placeholders apart) keep the first.
        ignore_literals: literals match any literal.

    Raises:
        ValueError: the pattern is empty, returns nothing, consists of placeholders, or has dead code.
        TypeError: `pattern` is none of these, or a flag is no bool.

    >>> import operator
    >>> matcher = SubgraphMatcher(lambda x: operator.neg(operator.add(x, 1)))
    >>> [node.name for node in matcher.pattern_anchors]
    ['neg']
    """

    def __init__(
        self,
        pattern: Callable[..., Any] | Graph,
        match_output: bool = False,
        match_placeholder: bool = False,
        remove_overlapping_matches: bool = True,
        ignore_literals: bool = False,
    ) -> None:
        self.pattern, self._owner = graph_of(pattern, "pattern")
        self.match_output = match_output
        self.match_placeholder = match_placeholder
        self.remove_overlapping_matches = remove_overlapping_matches
        self.ignore_literals = ignore_literals
        _core._match_pattern(self.pattern, *self._flags())

        output = self.pattern.output_node()
        self.pattern_placeholder_nodes = self.pattern.find_nodes(op="placeholder")
        self.pattern_returning_nodes = list(output.all_input_nodes)
        self.pattern_anchors = [output]
        if not match_output:
            self.pattern_anchors = [n for n in self.pattern_returning_nodes if len(n.users) == 1]

    def _flags(self) -> tuple[bool, bool, bool, bool]:
        return self.match_output, self.match_placeholder, self.remove_overlapping_matches, self.ignore_literals

    def match(self, graph: Graph | GraphModule) -> list[InternalMatch]:
        """The matches in `graph`, in the order of the nodes that the first anchor matched.

        Args:
            graph: a Graph or a GraphModule.

        Raises:
            TypeError: `graph` is neither.
            ValueError: the pattern was changed and cannot be used any more.
        """
        owner = graph  # keeps a GraphModule, and so what its targets name, alive
        if isinstance(graph, GraphModule):
            graph = graph.graph
        pattern = copy.deepcopy(self.pattern) if graph is self.pattern else self.pattern
        matches = _core._match_graph(graph, pattern, *self._flags(), InternalMatch)
        del owner
        return matches
