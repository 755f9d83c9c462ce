# SPDX-License-Identifier: BSD-3-Clause
"""A graph of module and functional calls as a graph of `ops.aten` operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import nn
from . import _aten_functions, _aten_modules  # noqa: F401  (their rows)
from ._aten_table import Lowering, NoLowering

if TYPE_CHECKING:
    from .graph_module import GraphModule

__all__ = ["to_aten"]


def to_aten(
    gm: GraphModule, example_shapes: Sequence[Sequence[int]] | None = None, *, lift_params: bool = False
) -> GraphModule:
    """Rewrites module calls, functional calls and arithmetic as ``ops.aten`` nodes, as an exporter makes them.

    Args:
        gm: a :class:`GraphModule`; it is not changed.
        example_shapes: a shape for each placeholder. Needed only where an operator depends on the number of axes or a
            size: nearest resizing, ``output_size`` of a transposed convolution, ``...`` in an index.
        lift_params: make parameters and buffers arguments of the graph.

    Returns:
        A GraphModule on the same arrays with the same numbers. The node of an operation keeps its name, so that reports
        of both graphs can be compared. Parameters are get_attr nodes; with ``lift_params`` they are the first
        placeholders, in the order of ``named_parameters()`` and then ``named_buffers()``, each array once. Then
        ``meta["params_flat"]`` is the list of these arrays and ``meta["params_names"]`` that of their dotted names, and
        the graph is called as ``result(*result.meta["params_flat"], *inputs)``. Identity modules vanish,
        ``padding_mode`` becomes a ``pad`` node, arithmetic on sizes stays as it is.

    Raises:
        TypeError: ``gm`` is no GraphModule. NotImplementedError: nodes without a counterpart; all are listed.
        RuntimeError: the graph is not well-formed (``Graph.lint``).

    Example:
        >>> from pyconvbn import fx, nn
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
        >>> [str(node.target) for node in fx.to_aten(gm).graph.nodes]
        ['input', '0.weight', '0.bias', 'aten.conv2d.default', 'aten.relu.default', 'output']
    """
    from .graph_module import GraphModule

    if not isinstance(gm, GraphModule):
        raise TypeError(f"gm: expected a GraphModule, got {type(gm).__name__}")
    return _ToAten(gm, _shapes(gm, example_shapes), bool(lift_params)).run()


def _shapes(gm: GraphModule, example_shapes: Sequence[Sequence[int]] | None) -> dict[Any, tuple[int, ...]]:
    """Node -> shape, where it is known: from shape_prop on a copy, or what an earlier one left."""
    known: dict[Any, tuple[int, ...]] = {}
    nodes = list(gm.graph.nodes)
    measured = nodes
    if example_shapes is not None:
        import copy

        from .shape_prop import shape_prop

        twin = copy.copy(gm)
        shape_prop(twin, *example_shapes)
        measured = list(twin.graph.nodes)
    for node, other in zip(nodes, measured):
        meta = other.meta.get("tensor_meta")
        if meta is not None and hasattr(meta, "shape"):
            known[node] = tuple(meta.shape)
    return known


class _ToAten:
    """One conversion."""

    def __init__(self, gm: GraphModule, shapes: dict[Any, tuple[int, ...]], lift: bool) -> None:
        from .graph import Graph

        self.gm = gm
        self.graph = Graph()
        self.root = nn.Module()
        self.shapes = shapes
        self.env: dict[Any, Any] = {}
        self.lifted: dict[int, Any] = {}  # id of an array -> its placeholder
        self.params: list[tuple[str, Any]] = []
        self.attributes: dict[str, Any] = {}  # dotted name -> get_attr node
        self.lift = lift
        self.lowering = Lowering(self)

    def run(self) -> GraphModule:
        from .graph_module import GraphModule

        self.gm.graph.lint()
        if self.lift:
            self._lift()
        problems = []
        for node in self.gm.graph.nodes:
            try:
                self.env[node] = self._node(node)
            except NoLowering as error:
                target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
                problems.append(f"node {node.name!r} ({node.op} {target}): {error}")
                self.env[node] = None
        if problems:
            raise NotImplementedError(
                f"to_aten: {len(problems)} node{'s have' if len(problems) > 1 else ' has'} no ATen form:\n  "
                + "\n  ".join(problems)
            )
        result = GraphModule(self.root, self.graph, self.gm.class_name)
        result.training = self.gm.training
        result.meta.update(self.gm.meta)
        if self.lift:
            result.meta["params_flat"] = [array for _, array in self.params]
            result.meta["params_names"] = [name for name, _ in self.params]
        return result

    def _lift(self) -> None:
        for kind, arrays in (("p", self.gm.named_parameters()), ("b", self.gm.named_buffers())):
            for name, array in arrays:
                if id(array) in self.lifted:
                    continue
                clean = f"{kind}_{name}".replace(".", "_")
                self.lifted[id(array)] = self.graph.create_node("placeholder", clean, (), {}, clean)
                self.params.append((name, array))

    def _node(self, node: Any) -> Any:
        args, kwargs = self._map(node.args), self._map(node.kwargs)
        if node.op == "placeholder":
            made = self.graph.create_node("placeholder", node.target, args, kwargs, node.name)
        elif node.op == "get_attr":
            value: Any = self.gm
            for part in node.target.split("."):
                value = getattr(value, part)
            if not isinstance(value, np.ndarray):
                raise NoLowering(f"the attribute is a {type(value).__name__}, not an array")
            made = self.array(node.target, value, node.name)
        elif node.op == "output":
            made = self.graph.output(args[0] if args else None)
        elif node.op == "call_module":
            module = self.gm.get_submodule(node.target)
            made = self.lowering.module(node, module, node.target, args, kwargs)
        elif node.op == "call_function":
            made = self.lowering.function(node, node.target, args, kwargs)
        else:
            made = self.lowering.method(node, node.target, args, kwargs)
        if hasattr(made, "meta"):
            for key, value in node.meta.items():
                made.meta.setdefault(key, value)
        return made

    def _map(self, value: Any) -> Any:
        if hasattr(value, "all_input_nodes"):  # a Node
            if value not in self.env:  # lint was content: an attribute of a module has edited the graph since
                raise RuntimeError(f"gm: node {value.name!r} has no value yet; the graph changed while it was read")
            return self.env[value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._map(item) for item in value))
        if isinstance(value, tuple):
            return tuple(self._map(item) for item in value)
        if isinstance(value, list):
            return [self._map(item) for item in value]
        if isinstance(value, dict):
            return {key: self._map(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._map(value.start), self._map(value.stop), self._map(value.step))
        return value

    # -- what the rows of the table use ------------------------------------------------------------------------------
    def array(self, path: str, array: Any, name: str | None = None) -> Any:
        """The node of a parameter or buffer; made once."""
        if array is None:
            return None
        if id(array) in self.lifted:
            return self.lifted[id(array)]
        if path not in self.attributes:
            self.attributes[path] = self.graph.create_node("get_attr", path, (), {}, name)
            self._keep(path, array)
        return self.attributes[path]

    def _keep(self, path: str, array: Any) -> None:
        owner, source = self.root, self.gm
        *parents, name = path.split(".")
        for part in parents:
            child = vars(owner).get(part)
            source = getattr(source, part)
            if child is None:
                child = nn.Module()
                child.training = bool(getattr(source, "training", False))
                owner.register_module(part, child)
            owner = child
        if isinstance(array, nn.Parameter):
            owner.register_parameter(name, array)
        else:
            owner.register_buffer(name, array)

    def emit(self, name: str | None, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A new ATen node."""
        return self.graph.create_node("call_function", target, args, kwargs, name)
