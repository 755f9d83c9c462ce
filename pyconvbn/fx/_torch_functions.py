# SPDX-License-Identifier: BSD-3-Clause
"""torch functions and tensor methods as targets of ours with the same meaning: finding the row of a node."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import _torch_math, _torch_shapes  # noqa: F401  (their rows)
from ._torch_table import AUGMENTED, FUNCTIONS, METHODS, Call, bound, call, view
from ._torch_values import Unsupported


_PLAIN = {
    getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "eq", "ne",
                 "lt", "le", "gt", "ge", "and_", "or_", "xor", "invert", "not_", "lshift", "rshift", "setitem", "index")
} | {math.sqrt, math.floor, math.ceil, math.prod, builtins.int, builtins.float, builtins.len, builtins.max,
     builtins.min, builtins.slice, builtins.tuple, builtins.list, round, abs, sum}
# Attributes of a tensor that its array has under the same name with the same meaning; shape facts are no views.
_ATTRIBUTES = {"shape": False, "ndim": False, "dtype": False, "T": True, "real": True}


class Functions:
    """The table of one torch: finds and binds the row of a target."""

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch
        self._by_callable: dict[Any, str] = {}
        for name in FUNCTIONS:
            found: Any = torch
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is not None:
                self._by_callable.setdefault(found, name)
        self._inplace: dict[Any, str] = {}
        for name in FUNCTIONS:
            owner: Any = torch
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part, None)
            found = getattr(owner, last + "_", None)
            if found is not None:
                self._inplace.setdefault(found, name)

    def adapt(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Target and arguments for the torch function of a name of the table."""
        return bound(FUNCTIONS[name], args, kwargs)[:3]

    def function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call for a call_function node; Unsupported with the reason."""
        try:
            hash(target)
        except TypeError:
            raise Unsupported("the target has no counterpart") from None
        if target is builtins.getattr:
            return self._attribute(args)
        if target is operator.getitem:
            return Call(target, args, kwargs, view=True)
        if target in AUGMENTED:
            return Call(AUGMENTED[target], args, kwargs, inplace=True)
        if target in _PLAIN:
            return Call(target, args, kwargs)
        if target in self._by_callable:
            return bound(FUNCTIONS[self._by_callable[target]], args, kwargs)
        if target in self._inplace:
            return bound(FUNCTIONS[self._inplace[target]], args, kwargs)._replace(inplace=True)
        overload = getattr(self._torch._ops, "OpOverload", None)
        if overload is not None and isinstance(target, overload):
            return self._overload(target, args, kwargs)
        raise Unsupported("the function has no counterpart")

    def method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call for a call_method node; Unsupported with the reason."""
        if name in METHODS:
            return bound(METHODS[name], args, kwargs)
        if name.endswith("_") and name[:-1] in METHODS:
            return bound(METHODS[name[:-1]], args, kwargs)._replace(inplace=True)
        raise Unsupported("the tensor method has no counterpart")

    @staticmethod
    def _attribute(args: tuple[Any, ...]) -> Call:
        name = args[1] if len(args) == 2 else None
        if name == "device":
            return call(builtins.getattr, args[0], "device", "cpu")
        if name in ("data",):
            return view("alias.default", args[0])
        if name == "mT":
            return view("transpose.int", args[0], -2, -1)
        if name in ("values", "indices"):  # of the pair that max(dim=...) gives
            return Call(builtins.getattr, args, {}, view=True)
        if name not in _ATTRIBUTES:
            raise Unsupported(f"the tensor attribute {name!r} has no counterpart")
        return Call(builtins.getattr, args, {}, view=_ATTRIBUTES[name])

    @staticmethod
    def _overload(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """torch.ops.aten.<op>.<overload>: ours of the same name."""
        namespace, _, name = str(target).partition(".")
        from .. import ops

        if namespace != "aten":
            raise Unsupported("the operator has no counterpart")
        packet, _, overload = name.partition(".")
        found = getattr(getattr(ops.aten, packet, None), overload, None)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("layout", "device", "pin_memory")}
        if packet == "as_strided_":
            raise Unsupported("as_strided_ changes the strides of its argument")
        if found is not None:
            return Call(found, args, kwargs, view=True)  # a view for all that is known here: that is never wrong
        if packet.endswith("_"):
            pure = getattr(getattr(ops.aten, packet[:-1], None), overload, None)
            if pure is not None:
                return Call(pure, args, kwargs, inplace=True)
        raise Unsupported(f"ops.aten.{packet}.{overload} does not exist")
