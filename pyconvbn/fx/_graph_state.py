# SPDX-License-Identifier: BSD-3-Clause
"""Pickling of graphs: a plain description of the nodes, callables by reference."""

from __future__ import annotations

from typing import Any

from .graph import Graph
from .node import Node, map_aggregate


class NodeRef:
    """Stands for the node at a position of the list."""

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position

    def __reduce__(self) -> tuple[Any, ...]:
        return NodeRef, (self.position,)


def new_graph(cls: type[Graph]) -> Graph:
    """An empty graph, to be filled by __setstate__."""
    graph = cls.__new__(cls)
    Graph.__init__(graph)
    return graph


def describe(graph: Graph) -> dict[str, Any]:
    """Everything about a graph but its owning module."""
    positions = {node: i for i, node in enumerate(graph.nodes)}

    def ref(value: Any) -> Any:
        def leaf(a: Any) -> Any:
            return NodeRef(positions[a]) if isinstance(a, Node) and a in positions else a

        return map_aggregate(value, leaf) if isinstance(value, Node | tuple | list | dict | slice) else value

    nodes = []
    for i, n in enumerate(positions):
        for used in n.all_input_nodes:
            if positions.get(used, i) >= i:  # it could not be made again in this order
                raise RuntimeError(f"pickling of {n.name}: its input {used.name} does not stand before it")
        meta = {key: ref(v) for key, v in n.meta.items()}
        nodes.append((n.op, n.name, n.target, ref(n.args), ref(n.kwargs), n.type, meta))
    return {"version": 1, "nodes": nodes, "tracer_cls": graph._tracer_cls, "attributes": dict(graph.__dict__)}


def rebuild(graph: Graph, state: dict[str, Any]) -> None:
    """Fills an empty graph from its description."""
    if state.get("version") != 1:
        raise ValueError(f"state: expected a graph pickled in version 1 of the format, got {state.get('version')!r}")
    Graph.__init__(graph, tracer_cls=state["tracer_cls"])
    graph.__dict__.update(state["attributes"])
    made: list[Node] = []

    def deref(value: Any) -> Any:
        def leaf(a: Any) -> Any:
            return made[a.position] if isinstance(a, NodeRef) else a

        return map_aggregate(value, leaf) if isinstance(value, NodeRef | tuple | list | dict | slice) else value

    for op, name, target, args, kwargs, type_expr, _ in state["nodes"]:
        node = graph.create_node(op, target, deref(args), deref(kwargs), name, type_expr)
        if node.name != name:
            node.name = name
        made.append(node)
    for node, (*_, meta) in zip(made, state["nodes"], strict=True):
        if meta:
            node.meta = {key: deref(value) for key, value in meta.items()}
