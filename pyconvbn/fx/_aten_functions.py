# SPDX-License-Identifier: BSD-3-Clause
"""How arithmetic, indexing and array methods are written with `ops.aten` operators."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import functional as F
from ._aten_table import METHODS, NoLowering, function, ints, is_node


@function(operator.getitem)
def _getitem(to, node, value, index):
    if value in to.sizes:
        made = to.owner.emit(node.name, operator.getitem, value, index)
        to.sizes.add(made)
        return made
    if str(getattr(value, "target", "")).partition(".default")[0] in _SEQUENCES or \
            str(getattr(value, "target", "")) in _SEQUENCES:
        return to.owner.emit(node.name, operator.getitem, value, index)
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        ndim = to.ndim(node)
        if ndim is None:
            raise NoLowering("'...' in an index needs example_shapes")
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        used = sum(1 for part in parts if part is not None and part is not Ellipsis)
        parts[at : at + 1] = [slice(None)] * (ndim - used)
    steps: list[tuple[Any, ...]] = []
    dim = 0
    for part in parts:
        if part is None:
            steps.append(("unsqueeze.default", dim))
            dim += 1
        elif isinstance(part, slice):
            if part != slice(None):
                if isinstance(part.step, int) and part.step < 0:
                    raise NoLowering("a slice with a negative step")
                end = _LAST if part.stop is None else part.stop
                steps.append(("slice.Tensor", dim, part.start, end, 1 if part.step is None else part.step))
            dim += 1
        elif (isinstance(part, int) and not isinstance(part, bool)) or part in to.sizes:
            steps.append(("select.int", dim, part))
        else:
            raise NoLowering(f"an index of type {type(part).__name__}")
    if not steps:
        return to.emit(node, "alias.default", value)
    for i, (name, *arguments) in enumerate(steps):
        value = to.emit(node, name, value, *arguments, last=i == len(steps) - 1)
    return value


_LAST = 2**63 - 1  # how ATen graphs write "to the end"
_SEQUENCES = ("aten.chunk", "aten.split.Tensor", "aten.split_with_sizes", "aten.unbind.int", "aten.native_batch_norm",
              "aten._native_batch_norm_legit", "aten._native_batch_norm_legit_no_training",
              "aten._native_batch_norm_legit.no_stats", "aten._native_batch_norm_legit_functional")


@function(builtins.getattr)
def _getattr(to, node, value, name, *default):
    made = to.owner.emit(node.name, builtins.getattr, value, name, *default)
    if name in ("shape", "ndim", "size", "dtype", "device"):
        to.sizes.add(made)
        return made
    raise NoLowering(f"the attribute {name!r}")


# -- arithmetic ------------------------------------------------------------------------------------------------------
def _arithmetic(target: Any, name: str, reflected: Callable[..., Any] | None = None, scalar: str = "Tensor") -> None:
    """tensor op tensor, tensor op number, and number op tensor."""

    def lower(to, node, a, b):
        if is_node(a):
            overload = "Tensor" if is_node(b) and b not in to.sizes else scalar
            return to.emit(node, f"{name}.{overload}", a, b)
        if reflected is None:
            raise NoLowering(f"a number as the first argument of {target.__name__}")
        return reflected(to, node, a, b)

    function(target)(lower)


_arithmetic(operator.add, "add", lambda to, node, a, b: to.emit(node, "add.Tensor", b, a))
_arithmetic(operator.mul, "mul", lambda to, node, a, b: to.emit(node, "mul.Tensor", b, a))
_arithmetic(operator.sub, "sub", lambda to, node, a, b: to.emit(node, "rsub.Scalar", b, a))
_arithmetic(
    operator.truediv, "div",
    lambda to, node, a, b: to.emit(node, "mul.Tensor", to.emit(node, "reciprocal.default", b, last=False), a),
)
_arithmetic(operator.iadd, "add_")
_arithmetic(operator.isub, "sub_")
_arithmetic(operator.imul, "mul_")
_arithmetic(operator.itruediv, "div_")
for _name, _mirror in (("eq", "eq"), ("ne", "ne"), ("lt", "gt"), ("le", "ge"), ("gt", "lt"), ("ge", "le")):
    _arithmetic(
        getattr(operator, _name), _name,
        lambda to, node, a, b, _mirror=_mirror: to.emit(node, f"{_mirror}.Scalar", b, a), scalar="Scalar",
    )


@function(operator.floordiv)
def _floordiv(to, node, a, b):
    return to.emit(node, "div.Tensor_mode", a, b, rounding_mode="floor")


@function(operator.pow)
def _pow(to, node, a, b):
    if not is_node(a):
        return to.emit(node, "pow.Scalar", a, b)
    return to.emit(node, "pow.Tensor_Tensor" if is_node(b) else "pow.Tensor_Scalar", a, b)


@function(operator.matmul)
def _matmul(to, node, a, b):
    return to.emit(node, "matmul.default", a, b)


@function(operator.neg)
def _neg(to, node, a):
    return to.emit(node, "neg.default", a)


@function(operator.abs)
def _abs(to, node, a):
    return to.emit(node, "abs.default", a)


@function(F.add)
def _add(to, node, input, other, alpha):
    return to.emit(node, "add.Tensor", input, other, **({} if alpha == 1 else {"alpha": alpha}))


@function(F.mul)
def _mul(to, node, input, other):
    return to.emit(node, "mul.Tensor", input, other)


# -- ndarray methods, with NumPy's meaning ---------------------------------------------------------------------------
def _shape_arguments(values: tuple[Any, ...]) -> list[Any]:
    return list(values[0]) if len(values) == 1 and isinstance(values[0], (tuple, list)) else list(values)


def _reduce(name: str, overload: str, default: str) -> Callable[..., Any]:
    def lower(to, node, x, axis=None, dtype=None, out=None, keepdims=False):
        if dtype is not None or out is not None:
            raise NoLowering("the arguments dtype= and out=")
        if axis is None and not keepdims:
            return to.emit(node, default, x)
        if axis is None:
            raise NoLowering("keepdims over all axes")
        return to.emit(node, f"{name}.{overload}", x, ints(axis, 1), bool(keepdims))

    return lower


def _reshape_method(to, node, x, *shape):
    return to.emit(node, "reshape.default", x, _shape_arguments(shape))


def _transpose_method(to, node, x, *axes):
    dims = _shape_arguments(axes)
    if not dims or dims == [None]:
        ndim = to.ndim(node)
        if ndim is None:
            raise NoLowering("transpose() of all axes needs example_shapes")
        dims = list(range(ndim))[::-1]
    return to.emit(node, "permute.default", x, dims)


def _clip_method(to, node, x, min=None, max=None):
    return to.emit(node, "clamp.default", x, min, max)


def _squeeze_method(to, node, x, axis=None):
    if axis is None:
        return to.emit(node, "squeeze.default", x)
    return to.emit(node, "squeeze.dims", x, ints(axis, 1))


def _astype_method(to, node, x, dtype):
    return to.emit(node, "_to_copy.default", x, dtype=np.dtype(dtype))


METHODS.update({
    "reshape": _reshape_method,
    "transpose": _transpose_method,
    "swapaxes": lambda to, node, x, axis1, axis2: to.emit(node, "transpose.int", x, axis1, axis2),
    "mean": _reduce("mean", "dim", "mean.default"),
    "sum": _reduce("sum", "dim_IntList", "sum.default"),
    "clip": _clip_method,
    "squeeze": _squeeze_method,
    "copy": lambda to, node, x: to.emit(node, "clone.default", x),
    "flatten": lambda to, node, x: to.emit(node, "reshape.default", x, [-1]),
    "ravel": lambda to, node, x: to.emit(node, "reshape.default", x, [-1]),
    "astype": _astype_method,
})
