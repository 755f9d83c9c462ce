# SPDX-License-Identifier: BSD-3-Clause
"""`Interpreter`: runs a graph node by node in Python, each step open to subclasses; `Transformer` rewrites with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..nn.module import Module
from .graph import Graph
from .graph_module import GraphModule, add_node_note, resolve
from .node import Node
from .proxy import Proxy, TracerBase

__all__ = ["Interpreter", "Transformer"]


def map_nodes(a: Any, fn: Callable[[Node], Any]) -> Any:
    """`a` with each node in it replaced by `fn(node)`; tuples, lists, dicts and slices are rebuilt."""
    if isinstance(a, Node):
        return fn(a)
    if isinstance(a, tuple):
        items = [map_nodes(item, fn) for item in a]
        return tuple.__new__(type(a), items) if hasattr(a, "_fields") else tuple(items)
    if isinstance(a, list):
        return [map_nodes(item, fn) for item in a]
    if isinstance(a, dict):
        return {key: map_nodes(value, fn) for key, value in a.items()}
    if isinstance(a, slice):
        return slice(map_nodes(a.start, fn), map_nodes(a.stop, fn), map_nodes(a.step, fn))
    return a


class Interpreter:
    """Runs the graph of `module`; override a method to change what the nodes of that kind do.

    `graph` is another graph to run on the module's attributes. With `garbage_collect_values` a value is dropped after
    its last use. An exception gets a note that names the node and its source line.

    >>> from pyconvbn import fx
    >>> class Count(Interpreter):
    ...     calls = 0
    ...     def call_function(self, target, args, kwargs):
    ...         self.calls += 1
    ...         return super().call_function(target, args, kwargs)
    >>> counting = Count(fx.symbolic_trace(lambda x: x * 2 + 1))
    >>> int(counting.run(20)), counting.calls
    (41, 2)
    """

    def __init__(self, module: Module, garbage_collect_values: bool = True, graph: Graph | None = None) -> None:
        if graph is None:
            graph = getattr(module, "graph", None)
            if not isinstance(graph, Graph):
                raise TypeError(f"module: expected a GraphModule (or graph=), got {type(module).__name__}")
        self.module = module
        self.graph = graph
        self.garbage_collect_values = garbage_collect_values
        self.env: dict[Node, Any] = {}
        self.args: list[Any] = []
        self.name = "Interpreter"

    def run(
        self, *args: Any, initial_env: Mapping[Node, Any] | None = None, enable_io_processing: bool = True
    ) -> Any:
        """The output for `args`, one for each placeholder in order; nodes in `initial_env` are not run.

        `enable_io_processing` is accepted for code written for torch.fx; inputs and outputs are never flattened.
        Raises `TypeError` for too few or too many arguments, and what the nodes raise.
        """
        self.env = dict(initial_env or {})
        self.args = list(args)
        nodes = list(self.graph.nodes)
        open_inputs = [n.target for n in nodes if n.op == "placeholder" and n not in self.env]
        if len(args) > len(open_inputs) and not any(str(target).startswith("*") for target in open_inputs):
            raise TypeError(f"args: the graph has {len(open_inputs)} placeholders to fill, got {len(args)} arguments")
        last_uses = self._last_uses(nodes) if self.garbage_collect_values else {}
        result = None
        for node in nodes:
            if node not in self.env:
                try:
                    self.env[node] = self.run_node(node)
                except Exception as error:
                    add_node_note(error, node)
                    raise
            if node.op == "output":
                result = self.env[node]
                break
            for dead in last_uses.get(node, ()):
                self.env.pop(dead, None)
        return result

    def boxed_run(self, args_list: list[Any]) -> Any:
        """`run(*args_list)` that empties the list first, so that no input is kept alive by it."""
        args = list(args_list)
        args_list.clear()
        return self.run(*args)

    @staticmethod
    def _last_uses(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
        seen: set[Node] = set()
        uses: dict[Node, list[Node]] = {}
        for node in reversed(nodes):
            for used in (node, *node.all_input_nodes):  # a value that nobody uses dies where it is made
                if used not in seen:
                    seen.add(used)
                    uses.setdefault(node, []).append(used)
        return uses

    def run_node(self, n: Node) -> Any:
        """Fetch the arguments of a node and call the method named after its op."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)

    # -- one method for each kind of node --

    def placeholder(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The next argument, or the default."""
        if target.startswith("**"):
            return self.args.pop(0) if self.args else {}
        if target.startswith("*"):
            rest, self.args = tuple(self.args), []
            return rest
        if self.args:
            return self.args.pop(0)
        if args:
            return args[0]
        raise TypeError(f"args: no value for the placeholder {target!r}, which has no default")

    def get_attr(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The attribute of the module at a dotted path."""
        return self.fetch_attr(target)

    def call_function(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`target(*args, **kwargs)`."""
        return target(*args, **kwargs)

    def call_method(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`args[0].target(*args[1:], **kwargs)`; `RuntimeError` without `args[0]`."""
        if not args:
            raise RuntimeError(f"call_method {target!r} needs the object as its first argument")
        receiver, *rest = args
        return getattr(receiver, target)(*rest, **kwargs)

    def call_module(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module at a dotted path."""
        return self.fetch_attr(target)(*args, **kwargs)

    def output(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the graph returns."""
        return args[0] if args else None

    # -- helpers of those --

    def fetch_attr(self, target: str) -> Any:
        """The object at a dotted path below the module; `AttributeError` if there is none."""
        return resolve(self.module, target)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `n` with the values of the nodes in them."""
        return self.map_nodes_to_values(n.args, n), self.map_nodes_to_values(n.kwargs, n)

    def map_nodes_to_values(self, args: Any, n: Node) -> Any:
        """`args` with each node replaced by its value; `RuntimeError` for a node that has not run."""

        def value_of(used: Node) -> Any:
            if used not in self.env:
                raise RuntimeError(f"node {n.name!r} uses {used.name!r}, which has no value yet; see graph.lint()")
            return self.env[used]

        return map_nodes(args, value_of)


class _TransformerTracer(TracerBase):
    def __init__(self, graph: Graph) -> None:
        self.graph = graph


class Transformer(Interpreter):
    """An Interpreter on proxies: `transform()` gives a new GraphModule of what the methods returned.

    >>> import operator
    >>> from pyconvbn import fx
    >>> class NegateAdds(Transformer):
    ...     def call_function(self, target, args, kwargs):
    ...         return super().call_function(operator.sub if target is operator.add else target, args, kwargs)
    >>> gm = NegateAdds(fx.symbolic_trace(lambda x: x + 1)).transform()
    >>> gm(np.array([5.0]))
    array([4.])
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.new_graph = Graph()
        self.tracer: TracerBase = _TransformerTracer(self.new_graph)
        self._node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self._node = n
        result = super().run_node(n)
        if isinstance(result, Proxy) and n.meta:
            for key, value in n.meta.items():
                result.node.meta.setdefault(key, value)
        return result

    def _named(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
        node = self._node
        type_expr = None if node is None else node.type
        return self.tracer.create_proxy(kind, target, args, kwargs, type_expr=type_expr)

    def placeholder(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
        return self._named("placeholder", target, args, kwargs)

    def get_attr(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy:
        return self._named("get_attr", target, args, kwargs)

    def call_function(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._named("call_function", target, args, kwargs)

    def call_method(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._named("call_method", target, args, kwargs)

    def call_module(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._named("call_module", target, args, kwargs)

    def transform(self) -> GraphModule:
        """Run, and return the new GraphModule, which shares the attributes of the old one."""
        result = self.run()
        outputs = [node for node in self.graph.nodes if node.op == "output"]
        type_expr = outputs[0].type if outputs else None
        self.tracer.create_node("output", "output", (self.tracer.create_arg(result),), {}, type_expr=type_expr)
        assert isinstance(self.module, GraphModule)
        return GraphModule(self.module, self.new_graph, self.module.class_name)
