# SPDX-License-Identifier: BSD-3-Clause
"""Graph: the list of nodes, named and used as torch.fx's. The list itself lives in C behind `graph._capsule`.

>>> import operator
>>> from pyconvbn.fx import Graph
>>> graph = Graph()
>>> x = graph.placeholder("x")
>>> y = graph.call_function(operator.add, (x, 1))
>>> _ = graph.output(y)
>>> print(graph)
graph():
    %x : [num_users=1] = placeholder[target=x]
    %add : [num_users=1] = call_function[target=operator.add](args = (%x, 1), kwargs = {})
    return add
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from .. import _core
from .node import Argument, Node, Target, map_aggregate, map_arg

__all__ = ["Graph", "NodeList"]


class NodeList:
    """The nodes of a graph in order: iterable both ways, with a length. Nodes may be erased while it is walked."""

    __slots__ = ("_direction", "_graph")

    def __init__(self, graph: Graph, direction: str = "_next") -> None:
        if direction not in {"_next", "_prev"}:
            raise ValueError(f"direction: expected '_next' or '_prev', got {direction!r}")
        self._graph = graph
        self._direction = direction

    def __len__(self) -> int:
        return self._graph._count()

    def __iter__(self) -> Iterator[Node]:
        return self._graph._iter(self._direction == "_prev")

    def __contains__(self, node: object) -> bool:
        return isinstance(node, Node) and node.graph is self._graph and not node._erased and node.op != "root"

    def __reversed__(self) -> NodeList:
        return NodeList(self._graph, "_next" if self._direction == "_prev" else "_prev")

    def __repr__(self) -> str:
        return f"[{', '.join(node.name for node in self)}]"


class _InsertPoint:
    """Works from its creation on; as a context manager it goes back at the end."""

    def __init__(self, graph: Graph, node: Node | None, after: bool) -> None:
        self._graph = graph
        self._back = graph._set_insert_point(node, after)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        node, after = self._back
        if node is not None and node._erased:
            node, after = None, False
        self._graph._set_insert_point(node, after)


class Graph(_core.Graph):
    """A graph of nodes.

    Args:
        owning_module: the module whose attributes `get_attr` and `call_module` nodes name; held weakly.
        tracer_cls: the class of the tracer that made the graph, kept for whoever asks.
    """

    @property
    def nodes(self) -> NodeList:
        """The nodes in order."""
        return NodeList(self)

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self.nodes)

    def __bool__(self) -> bool:
        return True  # a graph without nodes is a graph

    def placeholder(
        self, name: str, type_expr: Any | None = None, default_value: Any = inspect.Signature.empty
    ) -> Node:
        """Adds an input of the graph's function.

        Args:
            name: name of the parameter, `*args` and `**kwargs` too.
            type_expr: type annotation.
            default_value: default of the parameter.

        Raises:
            TypeError: `name` is not a str.
        """
        args = () if default_value is inspect.Signature.empty else (default_value,)
        return self.create_node("placeholder", name, args, type_expr=type_expr)

    # -- where new nodes go --------------------------------------------------------------------------------------------
    def inserting_before(self, n: Node | None = None) -> _InsertPoint:
        """New nodes go before `n`, in order (None: at the beginning), until the `with` block ends, or for good.

        Raises:
            RuntimeError: `n` is of another graph or was erased.

        >>> graph = Graph()
        >>> b = graph.placeholder("b")
        >>> with graph.inserting_before(b):
        ...     a = graph.placeholder("a")
        >>> graph.nodes
        [a, b]
        """
        return self.inserting_after(self._root) if n is None else _InsertPoint(self, n, False)

    def inserting_after(self, n: Node | None = None) -> _InsertPoint:
        """Each new node goes right after `n` (None: at the end), so that the last one made comes first, as in torch.fx.

        Raises:
            RuntimeError: `n` is of another graph or was erased.

        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> with graph.inserting_after(x):
        ...     _ = graph.call_method("first", (x,)), graph.call_method("second", (x,))
        >>> graph.nodes
        [x, second, first]
        """
        return self.inserting_before(self._root) if n is None else _InsertPoint(self, n, True)

    # -- looking -------------------------------------------------------------------------------------------------------
    def find_nodes(self, *, op: str, target: Target | None = None, sort: bool = True) -> list[Node]:
        """The nodes with this op and target, in the order of the graph.

        Args:
            op: one of the six ops.
            target: compared by identity, then by `==`; None: any.
            sort: for compatibility; the result is always in order.

        Raises:
            TypeError: `op` is not a str.

        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> y = graph.call_function(len, (graph.call_function(abs, (x,)),))
        >>> graph.find_nodes(op="call_function"), graph.find_nodes(op="call_function", target=abs)
        ([abs_1, len_1], [abs_1])
        """
        return self._find(op, target)

    def lint(self) -> None:
        """Checks the graph: arguments belong to it and are defined before use, names are unique, users are exact.

        With an owning module the targets of `call_module` and `get_attr` must exist too.

        Raises:
            RuntimeError: naming the node and what is wrong.

        >>> graph = Graph()
        >>> x, y = graph.placeholder("x"), graph.placeholder("y")
        >>> z = graph.call_method("add", (x, y))
        >>> z.append(x)
        >>> graph.lint()
        Traceback (most recent call last):
        ...
        RuntimeError: Node add: argument x is used before it has been defined
        """
        self._verify()
        owner = self.owning_module
        if owner is None:
            return
        for op in ("call_module", "get_attr"):
            for node in self._find(op, None):
                at = owner
                for part in node.target.split("."):
                    if not hasattr(at, part):
                        what = f"{type(at).__name__} has no attribute {part!r}"
                        raise RuntimeError(f"node '{node}': target {node.target!r} of {op} does not exist: {what}")
                    at = getattr(at, part)

    # -- copying -------------------------------------------------------------------------------------------------------
    def node_copy(self, node: Node, arg_transform: Callable[[Node], Argument] = lambda x: x) -> Node:
        """Copies a node of another graph into this one.

        Args:
            node: the node.
            arg_transform: gives for each node of its arguments what stands there in the copy.

        Raises:
            RuntimeError: `arg_transform` gave a node that is not of this graph.

        >>> source, graph = Graph(), Graph()
        >>> x, here = source.placeholder("x"), graph.placeholder("here")
        >>> copied = graph.node_copy(source.call_method("relu", (x,)), {x: here}.__getitem__)
        >>> copied.args
        (here,)
        """
        args, kwargs = map_arg(node.args, arg_transform), map_arg(node.kwargs, arg_transform)
        copy = self.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        if node.meta:
            copy.meta = dict(node.meta)
        return copy

    def graph_copy(self, g: Graph, val_map: dict[Node, Any], return_output_node: bool = False) -> Any:
        """Appends the nodes of `g` (not those that `val_map` has already) and records the copies in `val_map`.

        Returns:
            What `g` returns, in terms of this graph, None if `g` has no output node; with `return_output_node` a pair
            of it and the output node of `g`.

        Raises:
            RuntimeError: a node of `g` uses one that stands after it.

        >>> source, graph = Graph(), Graph()
        >>> x = source.placeholder("x")
        >>> _ = source.output(source.call_method("relu", (x,)))
        >>> val_map = {x: graph.placeholder("here")}
        >>> graph.output(graph.graph_copy(source, val_map))
        output
        >>> graph.nodes
        [here, relu, output]
        """
        for node in g.nodes:
            if node in val_map:
                continue

            def copied(used: Node, user: Node = node) -> Any:
                if used not in val_map:
                    raise RuntimeError(f"copy of {user.name}: its input {used.name} was not copied")
                return val_map[used]

            if node.op == "output":
                value = map_arg(node.args[0], copied) if node.args else None
                return (value, node) if return_output_node else value
            val_map[node] = self.node_copy(node, copied)
        return None

    def _copy_all(self, source: Graph) -> None:
        """Copies a whole graph into this empty one; nodes in meta become their copies."""
        pairs = self._copy_from(source)
        if pairs:
            copies = None
            for _, copy in pairs:
                meta = copy.meta
                for key, value in meta.items():
                    if _holds_node_of(value, source):
                        if copies is None:
                            copies = dict(zip(source.nodes, self.nodes, strict=True))
                        meta[key] = map_arg(value, lambda n: copies.get(n, n))

    def __deepcopy__(self, memo: dict[Any, Any] | None = None) -> Graph:
        """A copy with nodes of its own; targets and constants are shared."""
        memo = {} if memo is None else memo
        copy = type(self).__new__(type(self))
        Graph.__init__(copy, tracer_cls=self._tracer_cls)
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)
        copy._copy_all(self)
        return copy

    def __copy__(self) -> Graph:
        return self.__deepcopy__()

    def __reduce__(self) -> tuple[Any, ...]:
        from ._graph_state import describe, new_graph

        return new_graph, (type(self),), describe(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        from ._graph_state import rebuild

        rebuild(self, state)

    # -- dead code -----------------------------------------------------------------------------------------------------
    def eliminate_dead_code(self, is_impure_node: Callable[[Node], bool] | None = None) -> bool:
        """Removes nodes that nobody uses and that do nothing but give a value.

        Args:
            is_impure_node: says which nodes must stay; None: the operator table decides (inputs, outputs, whatever
                writes or is random, BatchNorm in training).

        Returns:
            Whether anything was removed.

        Raises:
            RuntimeError: the graph is not well-formed (`lint`).

        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> unused = graph.call_function(abs, (x,))
        >>> _ = graph.output(x)
        >>> graph.eliminate_dead_code(), graph.nodes
        (True, [x, output])
        """
        self.lint()
        if is_impure_node is None:
            return self._dce()
        before = self._snapshot()
        removed = False
        try:
            for node in reversed(self.nodes):
                if not node.users and not is_impure_node(node):
                    self.erase_node(node)
                    removed = True
        except BaseException:
            self._restore(before)
            raise
        return removed

    # -- text ----------------------------------------------------------------------------------------------------------
    def __str__(self) -> str:
        lines = [line for node in self.nodes if (line := node.format_node()) is not None]
        return "\n    ".join(["graph():", *lines])

    def print_tabular(self) -> None:
        """Prints the nodes as a table: opcode, name, target, args, kwargs."""
        print(self._table())

    def _table(self) -> str:
        head = ("opcode", "name", "target", "args", "kwargs")
        rows = [[str(v) for v in (n.op, n.name, n.target, n.args, n.kwargs)] for n in self.nodes]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [head, ["-" * w for w in widths], *rows]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in lines)

    def _repr_html_(self) -> str:
        from .drawing import graph_html

        return graph_html(self)

    def python_code(self, root_module: str = "self") -> Any:
        """The graph as the source of a Python function (`.src`), and the globals it needs (`.globals`).

        Args:
            root_module: what the function calls its owning module.
        """
        from ._codegen import python_code

        return python_code(self, root_module)


def _holds_node_of(value: Any, graph: Graph) -> bool:
    found = False

    def look(leaf: Any) -> Any:
        nonlocal found
        found = found or (isinstance(leaf, Node) and leaf.graph is graph)
        return leaf

    if isinstance(value, Node | tuple | list | dict | slice):
        map_aggregate(value, look)
    return found
