# SPDX-License-Identifier: BSD-3-Clause
"""Node, a view of one node of a graph, and the functions over its arguments.

`Node` itself is written in C. A node that was erased, or whose graph was cleared, raises RuntimeError when it is used.
"""

from __future__ import annotations

import html
import types
from collections.abc import Callable, Mapping
from typing import Any

from .._core import Node, NodeUsers
from .immutable import immutable_dict, immutable_list

__all__ = ["Argument", "Node", "Target", "map_aggregate", "map_arg"]

#: What may stand in args and kwargs: a Node, a constant, or tuples, lists, dicts and slices of them.
Argument = Any
#: What a node calls: a callable, or the name of a method, module or attribute.
Target = Callable[..., Any] | str

Mapping.register(NodeUsers)


def map_aggregate(a: Argument, fn: Callable[[Argument], Argument]) -> Argument:
    """`a` with `fn` applied to every leaf; tuples, named tuples, lists, dicts (values) and slices are rebuilt.

    Lists and dicts become immutable ones.

    >>> from pyconvbn.fx.node import map_aggregate
    >>> map_aggregate((1, [2, {"k": 3}]), lambda leaf: leaf * 10)
    (10, [20, {'k': 30}])
    """
    if isinstance(a, tuple):
        items = [map_aggregate(item, fn) for item in a]
        return tuple.__new__(type(a), items) if hasattr(a, "_fields") else tuple(items)
    if isinstance(a, list):
        return immutable_list([map_aggregate(item, fn) for item in a])
    if isinstance(a, dict):
        return immutable_dict({key: map_aggregate(value, fn) for key, value in a.items()})
    if isinstance(a, slice):
        return slice(map_aggregate(a.start, fn), map_aggregate(a.stop, fn), map_aggregate(a.step, fn))
    return fn(a)


def map_arg(a: Argument, fn: Callable[[Node], Argument]) -> Argument:
    """`a` with `fn` applied to every Node in it.

    Raises:
        TypeError: `fn` is not callable.

    >>> from pyconvbn.fx import Graph
    >>> from pyconvbn.fx.node import map_arg
    >>> x = Graph().placeholder("x")
    >>> map_arg((x, [1, x]), lambda node: node.name)
    ('x', [1, 'x'])
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a callable, got {type(fn).__name__}")
    return map_aggregate(a, lambda leaf: fn(leaf) if isinstance(leaf, Node) else leaf)


def type_name(obj: Any) -> str:
    """How a type is written in text: `int`, `numpy.ndarray`, `list[int]`."""
    if isinstance(obj, type) and not isinstance(obj, types.GenericAlias):
        return obj.__qualname__ if obj.__module__ == "builtins" else f"{obj.__module__}.{obj.__qualname__}"
    if obj is ...:
        return "..."
    return repr(obj) if not isinstance(obj, types.FunctionType) else obj.__name__


def qualified_name(function: Callable[..., Any]) -> str:
    """Where a callable can be found, as text: `operator.add`, `pyconvbn.functional.relu`, `builtins.len`."""
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        return f"{type_name(type(function))} object"
    module = getattr(function, "__module__", None)
    if isinstance(function, types.MethodDescriptorType | types.WrapperDescriptorType):
        return f"{type_name(function.__objclass__)}.{name}"
    own = str(function) if hasattr(function, "_op_name") else ""
    if own:
        return own
    if not isinstance(module, str):
        return name
    return f"{'operator' if module == '_operator' else module}.{name}"


def target_text(node: Node) -> str:
    """The target of a node as its line of text shows it."""
    target = node.target
    return target if isinstance(target, str) else qualified_name(target)


def _format_arg(arg: Any) -> str:
    if isinstance(arg, Node):
        return f"%{arg.name}"
    if isinstance(arg, list):
        return f"[{', '.join(map(_format_arg, arg))}]"
    if isinstance(arg, tuple) and not hasattr(arg, "_fields"):
        return f"({', '.join(map(_format_arg, arg))}{',' if len(arg) == 1 else ''})"
    if isinstance(arg, dict):
        return f"{{{', '.join(f'{key}: {_format_arg(value)}' for key, value in arg.items())}}}"
    return str(arg)


# The methods of Node that are not hot; the C type calls them here.
def _format_node(
    self: Node, placeholder_names: list[str] | None = None, maybe_return_typename: list[str] | None = None
) -> str | None:
    type_ = f" : {type_name(self.type)}" if self.type is not None else ""
    head = f"%{self.name}{type_ or ' :'} [num_users={len(self.users)}] = {self.op}"
    if self.op == "placeholder":
        if placeholder_names:
            placeholder_names.append(self.target if self.type is None else f"{self.target}{type_}")
        default = f"(default={self.args[0]})" if self.args else ""
        return f"{head}[target={self.target}]{default}"
    if self.op == "get_attr":
        return f"{head}[target={target_text(self)}]"
    if self.op == "output":
        if self.type is not None and maybe_return_typename:
            maybe_return_typename[0] = f" -> {type_name(self.type)}"
        return f"return {self.args[0] if self.args else None}"
    return f"{head}[target={target_text(self)}](args = {_format_arg(self.args)}, kwargs = {_format_arg(self.kwargs)})"


def _repr_html(self: Node) -> str:
    rows = [("op", self.op), ("target", target_text(self)), ("args", self.args), ("kwargs", self.kwargs)]
    rows.append(("users", ", ".join(user.name for user in self.users)))
    cells = "".join(
        f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>node {html.escape(self.name)}</caption>{cells}</table>"


def _deepcopy(self: Node, memo: dict[Any, Any]) -> Node:
    from copy import deepcopy

    if self._erased:
        raise RuntimeError(f"node '{self}' was erased from its graph")
    if self.op == "root":
        raise RuntimeError("the root of a graph is copied with the graph only")
    graph = deepcopy(self.graph, memo)
    copies = memo.setdefault(("pyconvbn.fx", id(self.graph)), {})
    if self not in copies:
        copies.update(zip(self.graph.nodes, graph.nodes, strict=True))
    return copies[self]
