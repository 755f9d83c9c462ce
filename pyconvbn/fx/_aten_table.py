# SPDX-License-Identifier: BSD-3-Clause
"""The tables of `fx.to_aten`, and the class that looks up and calls their rows.

A row takes the Lowering, the node of the old graph and the call's arguments (of the new graph), and returns the node
that stands for the result.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

from .. import functional as F
from .. import nn


class NoLowering(Exception):
    """Why a node has no ATen form; collected, and reported together."""


@functools.cache
def _aten(name: str) -> Any:
    from ..ops import aten

    packet, _, overload = name.partition(".")
    found = getattr(getattr(aten, packet, None), overload, None)
    if found is None:
        raise NoLowering(f"ops.aten.{name} does not exist")
    return found


def ints(value: Any, nd: int) -> list[Any]:
    """One int for each axis, as ATen graphs write it."""
    return list(value) if isinstance(value, (tuple, list)) else [value] * nd


MODULES: dict[type, Callable[..., Any]] = {}
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
METHODS: dict[str, Callable[..., Any]] = {}  # of ndarrays


def module(*classes: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(lower: Callable[..., Any]) -> Callable[..., Any]:
        MODULES.update(dict.fromkeys(classes, lower))
        return lower

    return add


def function(*targets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(lower: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(targets, lower))
        return lower

    return add


class Lowering:
    """Writes calls into the graph of `owner`, which supplies `emit`, `array` and `shapes`."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.sizes: set[Any] = set()  # nodes of the new graph that are sizes or shapes, not arrays

    def emit(self, node: Any, name: str, *args: Any, last: bool = True, **kwargs: Any) -> Any:
        """A node; the last one of an operation takes the name of the node it replaces."""
        return self.owner.emit(node.name if last else None, _aten(name), *args, **kwargs)

    def ndim(self, node: Any, position: int = 0) -> int | None:
        """Axes of the tensor that `node` of the old graph reads, if known."""
        inputs = node.all_input_nodes
        shape = self.owner.shapes.get(inputs[position]) if position < len(inputs) else None
        return None if shape is None else len(shape)

    # -- modules -----------------------------------------------------------------------------------------------------
    def module(self, node: Any, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        cls = next((c for c in type(module).__mro__ if c in MODULES), None)
        if cls is None:
            raise NoLowering(f"the module class {type(module).__name__}")
        if "forward" in vars(module) or type(module).forward is not cls.forward:
            raise NoLowering(f"a {cls.__name__} with a forward of its own, or with hooks")
        try:
            bound = inspect.signature(cls.forward).bind(module, *args, **kwargs)
        except TypeError as error:
            raise NoLowering(str(error)) from error
        return MODULES[cls](self, node, module, path, *bound.args[1:], **bound.kwargs)

    def parameter(self, module: nn.Module, path: str, name: str) -> Any:
        return self.owner.array(f"{path}.{name}", getattr(module, name))

    # -- functions ---------------------------------------------------------------------------------------------------
    def function(self, node: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target).startswith("aten."):
            made = self.owner.emit(node.name, target, *args, **kwargs)
            if str(target) == "aten.sym_size.int":
                self.sizes.add(made)
            return made
        try:
            lower = FUNCTIONS.get(target)
        except TypeError:
            lower = None
        if target in ON_SIZES and all(not is_node(a) or a in self.sizes for a in (*args, *kwargs.values())):
            made = self.owner.emit(node.name, target, *args, **kwargs)  # arithmetic on sizes
            self.sizes.add(made)
            return made
        if lower is None:
            raise NoLowering("the function has no ATen counterpart")
        signature = inspect.signature(target) if getattr(F, getattr(target, "__name__", ""), None) is target else None
        if signature is not None:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise NoLowering(str(error)) from error
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            if arguments.pop("out", None) is not None:
                raise NoLowering("the argument out=")
            return lower(self, node, **arguments)
        if kwargs:
            raise NoLowering(f"keyword arguments {list(kwargs)}")
        return lower(self, node, *args)

    def method(self, node: Any, name: str, args: Any, kwargs: Any) -> Any:
        lower = METHODS.get(name)
        if lower is None:
            raise NoLowering("the method has no ATen counterpart")
        try:
            inspect.signature(lower).bind(self, node, *args, **kwargs)
        except TypeError as error:
            raise NoLowering(str(error)) from error
        return lower(self, node, *args, **kwargs)


def is_node(value: Any) -> bool:
    return hasattr(value, "all_input_nodes")


# Python functions that stay when they work on sizes only.
ON_SIZES = {
    getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le",
                 "gt", "ge", "getitem", "index")
} | {math.floor, math.ceil, math.sqrt, math.prod, builtins.int, builtins.float, builtins.len, builtins.max,
     builtins.min}
