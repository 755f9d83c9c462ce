# SPDX-License-Identifier: BSD-3-Clause
"""The table of torch functions and tensor methods, and the helpers that its rows are written with.

A row is a Python function with torch's own signature: binding the arguments of a torch node to it checks them and
gives them names, and its result says what to call instead.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _torch_numpy as T
from ._torch_values import Unsupported


class Call(NamedTuple):
    """A call_function node to be made."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    view: bool = False  # the result may share memory with the first argument
    inplace: bool = False  # torch writes the result over the first argument


def aten(name: str) -> Any:
    """`ops.aten.<op>.<overload>`; where that operator is not there, the NumPy function of the same meaning."""
    from .. import ops

    packet, _, overload = name.partition(".")
    found = getattr(getattr(ops.aten, packet, None), overload or "default", None)
    if found is None:
        found = getattr(T, packet, None)
    if found is None:
        raise Unsupported(f"ops.aten.{name} does not exist")
    return found


def call(target: Any, *args: Any, **kwargs: Any) -> Call:
    """A call of new memory; `target` is a callable or "<op>.<overload>" of `ops.aten`."""
    return Call(aten(target) if isinstance(target, str) else target, args, kwargs)


def view(target: Any, *args: Any, **kwargs: Any) -> Call:
    """A call whose result may share memory with its first argument."""
    return call(target, *args, **kwargs)._replace(view=True)


Adapter = Callable[..., Call]
FUNCTIONS: dict[str, Adapter] = {}  # by the name below `torch.`
METHODS: dict[str, Adapter] = {}


def row(*names: str, methods: str = "") -> Callable[[Adapter], Adapter]:
    """Registers an adapter for torch functions (names below `torch.`) and tensor methods (separated by blanks)."""

    def add(adapter: Adapter) -> Adapter:
        FUNCTIONS.update(dict.fromkeys(names, adapter))
        METHODS.update(dict.fromkeys(methods.split(), adapter))
        return adapter

    return add


def same(target: Any, *names: str, methods: str = "") -> None:
    """torch's function has the parameters of ours: the arguments stay as they stand."""
    signature = inspect.signature(target)

    def adapter(*args: Any, **kwargs: Any) -> Call:
        if kwargs.get("out", None) is not None:
            raise Unsupported("the argument out=")
        kwargs.pop("out", None)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise Unsupported(str(error)) from error
        return Call(target, args, kwargs)

    row(*names, methods=methods)(adapter)


def given(**arguments: Any) -> None:
    """Refuses arguments that ask for what is not there; each must have the value that changes nothing."""
    for name, (value, neutral) in arguments.items():
        if value is not neutral and value != neutral:
            raise Unsupported(f"the argument {name}={value!r}")


def nonone(**arguments: Any) -> dict[str, Any]:
    """The arguments that are not 1, which is the default."""
    return {name: value for name, value in arguments.items() if not (isinstance(value, (int, float)) and value == 1)}


def as_dims(dim: Any) -> list[Any]:
    """An int, or several, as a list."""
    return list(dim) if isinstance(dim, (tuple, list)) else [dim]


def as_sizes(sizes: tuple[Any, ...]) -> list[Any]:
    """`f(2, 3)` and `f((2, 3))` are the same."""
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else list(sizes)


def is_shape(node: Any) -> bool:
    """Does this node of ours give a whole shape?"""
    if getattr(node, "op", None) != "call_function":
        return False
    if node.target is operator.add:
        return any(is_shape(a) for a in node.args) and all(isinstance(a, tuple) or is_shape(a) for a in node.args)
    if node.target is builtins.getattr:
        return bool(node.args[1] == "shape")
    return node.target is operator.getitem and isinstance(node.args[1], slice) and is_shape(node.args[0])


def is_size(node: Any) -> bool:
    """Does this node of ours give one number that comes from shapes?"""
    if getattr(node, "op", None) != "call_function":
        return False
    if node.target is operator.getitem:
        return isinstance(node.args[1], int) and is_shape(node.args[0])
    if node.target is builtins.getattr:
        return node.args[1] in ("ndim", "size")
    if node.target in _INT_ARITHMETIC:
        return any(is_size(a) for a in node.args) and all(isinstance(a, (int, float)) or is_size(a) for a in node.args)
    return node.target in (builtins.int, builtins.len, math.floor, math.ceil) or node.target is aten("sym_size.int")


_INT_ARITHMETIC = (
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow,
    operator.neg,
)


def is_attribute(node: Any, name: str) -> bool:
    """Is it a node of ours that reads this attribute?"""
    return getattr(node, "op", None) == "call_function" and node.target is builtins.getattr and node.args[1] == name


# In-place operators: what the result is, before it is written over the first argument.
AUGMENTED = {
    getattr(operator, f"i{name}"): getattr(operator, full)
    for name, full in (("add", "add"), ("sub", "sub"), ("mul", "mul"), ("truediv", "truediv"), ("floordiv", "floordiv"),
                       ("pow", "pow"), ("mod", "mod"), ("and", "and_"), ("or", "or_"), ("xor", "xor"))
}


# -- dtypes --------------------------------------------------------------------------------------------------------
_WITH_INTEGERS = {operator.add: "add.Tensor", operator.sub: "sub.Tensor", operator.mul: "mul.Tensor",
                  operator.truediv: "div.Tensor"}
_COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.not_,
                T.isnan, T.isinf, T.isfinite}


def as_torch_promotes(made: Call, integers: set[Any]) -> Call:
    """Arithmetic with integer tensors: NumPy makes float64 of int64 with float32, torch (and `ops.aten`) float32."""
    name = _WITH_INTEGERS.get(made.target) if callable(made.target) else None
    args = made.args
    if name is None or not any(_is_one_of(a, integers) for a in args):
        return made
    if not isinstance(args[0], (bool, int, float)):
        return made._replace(target=aten(name))
    if made.target is operator.sub:
        return made._replace(target=aten("rsub.Scalar"), args=(args[1], args[0]))
    if made.target is operator.truediv:
        raise Unsupported("a number divided by a tensor of integers")
    return made._replace(target=aten(name), args=(args[1], args[0]))


def gives_integers(made: Call, integers: set[Any]) -> bool:
    """Does this call give a tensor of integers or bools, as far as it shows?"""
    target, args = made.target, made.args
    name = str(target)
    if target in _COMPARISONS or name == "aten.argmax.default":
        return True
    if name == "aten.to.dtype":
        return isinstance(args[1], np.dtype) and args[1].kind in "iub"
    if target is operator.getitem and getattr(args[0], "target", None) in (T.max_dim, T.min_dim):
        return bool(args[1] == 1)
    if target is builtins.getattr and args[1] == "indices":
        return True
    first = args[0] if args else None
    if made.view or name in ("aten.sum.default", "aten.sum.dim_IntList", "aten.max.default"):
        return _is_one_of(first, integers)
    if name in ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.rsub.Scalar"):
        return all(_is_one_of(a, integers) or isinstance(a, (bool, int)) for a in args)
    return False


def _is_one_of(value: Any, nodes: set[Any]) -> bool:
    return hasattr(value, "all_input_nodes") and value in nodes


def bound(adapter: Adapter, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
    """What the row says for these arguments; Unsupported if torch's signature, as known here, does not take them."""
    renamed = {"axis": "dim", "keepdims": "keepdim", "self": "input"}  # NumPy's names, which torch takes too
    kwargs = {renamed.get(key, key): value for key, value in kwargs.items()}
    try:
        inspect.signature(adapter).bind(*args, **kwargs)
    except TypeError as error:
        raise Unsupported(str(error)) from error
    return adapter(*args, **kwargs)
