# SPDX-License-Identifier: BSD-3-Clause
"""ATen's elementwise functions, arithmetic, comparisons, reductions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ._aten_util import as_array, axis_of, dtype_of, operand, operands, store, writable

_Array = NDArray[Any]
MATH: dict[str, Callable[..., Any]] = {}


def _row(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            MATH[f"aten.{name}"] = function
        return function

    return put


# -- activations of the C library --------------------------------------------------------------------------------
def _activation(name: str) -> None:
    @_row(f"{name}.default")
    def activation(self: Any) -> _Array:
        return _core.unary(name, self, 0.0, 0.0, None)

    @_row(f"{name}_.default")
    def in_place(self: Any) -> _Array:
        x = writable(self, "self")
        return _core.unary(name, x, 0.0, 0.0, x)


for _name in ("relu", "relu6", "sigmoid", "hardswish", "silu"):
    _activation(_name)


@_row("leaky_relu.default")
def _leaky_relu(self: Any, negative_slope: float = 0.01) -> _Array:
    return _core.unary("leaky_relu", self, negative_slope, 0.0, None)


@_row("leaky_relu_.default")
def _leaky_relu_(self: Any, negative_slope: float = 0.01) -> _Array:
    x = writable(self, "self")
    return _core.unary("leaky_relu", x, negative_slope, 0.0, x)


@_row("hardtanh.default")
def _hardtanh(self: Any, min_val: float = -1, max_val: float = 1) -> _Array:
    return _core.unary("hardtanh", self, min_val, max_val, None)


@_row("hardtanh_.default")
def _hardtanh_(self: Any, min_val: float = -1, max_val: float = 1) -> _Array:
    x = writable(self, "self")
    return _core.unary("hardtanh", x, min_val, max_val, x)


@_row("gelu.default")
def _gelu(self: Any, *, approximate: str = "none") -> _Array:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _core.unary("gelu" if approximate == "none" else "gelu_tanh", self, 0.0, 0.0, None)


# -- elementwise functions of NumPy ------------------------------------------------------------------------------
def _softplus_of(x: _Array) -> _Array:
    return np.logaddexp(x, x.dtype.type(0))


_erf = np.frompyfunc(math.erf, 1, 1)

# float16 is computed in float32 and rounded once
_FUNCTIONS: dict[str, Callable[[_Array], Any]] = {
    "tanh": np.tanh, "hardsigmoid": lambda x: np.clip(x + x.dtype.type(3), 0, 6) / x.dtype.type(6),
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "reciprocal": lambda x: 1 / x, "exp": np.exp, "log": np.log,
    "sin": np.sin, "cos": np.cos, "mish": lambda x: x * np.tanh(_softplus_of(x)),
    "erf": lambda x: _erf(x).astype(x.dtype),
}  # fmt: skip
_EXACT: dict[str, Callable[[_Array], Any]] = {
    "neg": np.negative, "abs": np.abs, "square": np.square, "floor": np.floor, "ceil": np.ceil, "round": np.rint,
    "sign": np.sign, "logical_not": np.logical_not,
}  # fmt: skip


def _widely(function: Callable[[_Array], Any], x: _Array) -> _Array:
    with np.errstate(all="ignore"):
        if x.dtype == np.float16:
            return np.asarray(function(x.astype(np.float32))).astype(np.float16)
        if x.dtype.kind in "iub":
            return np.asarray(function(x.astype(np.float32)))
        return np.asarray(function(x))


def _unary_rows(name: str, function: Callable[[_Array], Any], exact: bool) -> None:
    @_row(f"{name}.default")
    def unary(self: Any) -> _Array:
        x = as_array(self, "self")
        return np.asarray(function(x)) if exact else _widely(function, x)


for _name, _function in _FUNCTIONS.items():
    _unary_rows(_name, _function, False)
for _name, _function in _EXACT.items():
    _unary_rows(_name, _function, True)


def _in_place(name: str) -> None:
    function = MATH[f"aten.{name}.default"]

    @_row(f"{name}_.default")
    def in_place(self: Any) -> _Array:
        x = writable(self, "self")
        x[...] = function(x)
        return x


for _name in ("tanh", "hardsigmoid"):
    _in_place(_name)


@_row("elu.default")
def _elu(self: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> _Array:
    def function(x: _Array) -> _Array:
        below = x.dtype.type(alpha) * np.expm1(np.minimum(x * x.dtype.type(input_scale), 0))
        return x.dtype.type(scale) * np.where(x > 0, x, below)

    return _widely(function, as_array(self, "self"))


@_row("elu_.default")
def _elu_(self: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> _Array:
    x = writable(self, "self")
    x[...] = _elu(x, alpha, scale, input_scale)
    return x


@_row("softplus.default")
def _softplus(self: Any, beta: float = 1, threshold: float = 20) -> _Array:
    def function(x: _Array) -> _Array:
        scaled = x * x.dtype.type(beta)
        return np.where(scaled > threshold, x, _softplus_of(scaled) / x.dtype.type(beta))

    return _widely(function, as_array(self, "self"))


@_row("prelu.default")
def _prelu(self: Any, weight: Any) -> _Array:
    x, w = as_array(self, "self"), as_array(weight, "weight")
    if w.size > 1 and x.ndim > 1:
        w = w.reshape((1, -1) + (1,) * (x.ndim - 2))
    return np.where(x > 0, x, x * w)


# -- softmax -----------------------------------------------------------------------------------------------------
def _log_softmax_of(x: _Array, dim: int) -> _Array:
    def function(wide: _Array) -> _Array:
        shifted = wide - wide.max(dim, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(dim, keepdims=True))

    return _widely(function, x)


@_row("softmax.int")
def _softmax(self: Any, dim: int, dtype: Any = None) -> _Array:
    return _core.softmax(self if dtype is None else as_array(self, "self").astype(dtype_of(dtype, None)), dim, None)


@_row("_softmax.default")
def _softmax_internal(self: Any, dim: int, half_to_float: bool) -> _Array:
    return _core.softmax(as_array(self, "self").astype(np.float32) if half_to_float else self, dim, None)


@_row("log_softmax.int")
def _log_softmax(self: Any, dim: int, dtype: Any = None) -> _Array:
    x = as_array(self, "self")
    return _log_softmax_of(x if dtype is None else x.astype(dtype_of(dtype, None)), dim)


@_row("_log_softmax.default")
def _log_softmax_internal(self: Any, dim: int, half_to_float: bool) -> _Array:
    x = as_array(self, "self")
    return _log_softmax_of(x.astype(np.float32) if half_to_float else x, dim)


# -- arithmetic --------------------------------------------------------------------------------------------------
def _sides(x: _Array, other: Any, alpha: Any = 1) -> tuple[Any, Any]:
    x, y = operands(x, other, "other")
    return x, y if alpha == 1 else y * operand(alpha, "alpha", np.asarray(y))


def _divide(x: Any, y: Any) -> Any:
    with np.errstate(all="ignore"):
        result = np.true_divide(x, y)
    kinds = {np.asarray(x).dtype.kind, np.asarray(y).dtype.kind}
    return result.astype(np.float32) if kinds <= set("iub") else result  # ints divide to PyTorch's default dtype


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    def quiet(x: Any, y: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(x, y)

    return quiet


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {"add": _quiet(np.add), "sub": _quiet(np.subtract)}
_PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {"mul": _quiet(np.multiply), "div": _divide}


def _with_alpha(name: str, function: Callable[[Any, Any], Any]) -> None:
    def tensor(self: Any, other: Any, *, alpha: Any = 1) -> _Array:
        x = as_array(self, "self")
        return np.asarray(function(*_sides(x, other, alpha)))

    def scalar(self: Any, other: Any, alpha: Any = 1) -> _Array:
        x = as_array(self, "self")
        return np.asarray(function(*_sides(x, other, alpha)))

    def tensor_(self: Any, other: Any, *, alpha: Any = 1) -> _Array:
        x = writable(self, "self")
        return store(x, function(*_sides(x, other, alpha)))

    def scalar_(self: Any, other: Any, alpha: Any = 1) -> _Array:
        return tensor_(self, other, alpha=alpha)

    _row(f"{name}.Tensor")(tensor)
    _row(f"{name}.Scalar")(scalar)
    _row(f"{name}_.Tensor")(tensor_)
    _row(f"{name}_.Scalar")(scalar_)


def _without_alpha(name: str, function: Callable[[Any, Any], Any]) -> None:
    @_row(f"{name}.Tensor", f"{name}.Scalar")
    def plain(self: Any, other: Any) -> _Array:
        x = as_array(self, "self")
        return np.asarray(function(*_sides(x, other)))

    @_row(f"{name}_.Tensor", f"{name}_.Scalar")
    def in_place(self: Any, other: Any) -> _Array:
        x = writable(self, "self")
        return store(x, function(*_sides(x, other)))


for _name, _binary in _ARITHMETIC.items():
    _with_alpha(_name, _binary)
for _name, _binary in _PRODUCTS.items():
    _without_alpha(_name, _binary)


@_row("rsub.Tensor")
def _rsub(self: Any, other: Any, *, alpha: Any = 1) -> _Array:
    x = as_array(self, "self")
    x, y = operands(x, other, "other")
    return np.asarray(y - (x if alpha == 1 else x * operand(alpha, "alpha", x)))


@_row("rsub.Scalar")
def _rsub_scalar(self: Any, other: Any, alpha: Any = 1) -> _Array:
    return _rsub(self, other, alpha=alpha)


@_row("div.Tensor_mode")
def _div_mode(self: Any, other: Any, *, rounding_mode: str | None) -> _Array:
    x = as_array(self, "self")
    x, y = operands(x, other, "other")
    if rounding_mode is None:
        return np.asarray(_divide(x, y))
    if rounding_mode not in ("floor", "trunc"):
        raise ValueError(f"rounding_mode: expected None, 'floor' or 'trunc', got {rounding_mode!r}")
    with np.errstate(all="ignore"):
        if rounding_mode == "floor":
            return np.asarray(np.floor_divide(x, y))
        return np.trunc(np.true_divide(x, y)).astype(np.result_type(x, y))


def _binary_row(name: str, function: Callable[[Any, Any], Any]) -> None:
    overloads = ("default",) if name in ("minimum", "maximum", "logical_and") else ("Tensor", "Scalar")

    @_row(*(f"{name}.{overload}" for overload in overloads))
    def binary(self: Any, other: Any) -> _Array:
        x = as_array(self, "self")
        return np.asarray(function(*_sides(x, other)))


_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "gt": np.greater, "ge": np.greater_equal, "lt": np.less, "le": np.less_equal,
    "minimum": np.minimum, "maximum": np.maximum, "logical_and": np.logical_and,
}  # fmt: skip
for _name, _binary in _COMPARISONS.items():
    _binary_row(_name, _binary)


def _power(x: Any, y: Any) -> _Array:
    with np.errstate(all="ignore"):
        return np.asarray(np.power(x, y))


@_row("pow.Tensor_Scalar", "pow.Tensor_Tensor")
def _pow(self: Any, exponent: Any) -> _Array:
    x = as_array(self, "self")
    return _power(*operands(x, exponent, "exponent"))


@_row("pow.Scalar")
def _pow_scalar(self: Any, exponent: Any) -> _Array:
    y = as_array(exponent, "exponent")
    return _power(operand(self, "self", y), y)


@_row("clamp.default")
def _clamp(self: Any, min: Any = None, max: Any = None) -> _Array:
    x = as_array(self, "self")
    if min is None and max is None:
        raise ValueError("min, max: expected at least one of the two")
    if min is not None:
        x = np.maximum(x, operand(min, "min", x))
    return np.asarray(x if max is None else np.minimum(x, operand(max, "max", x)))


@_row("clamp_.default")
def _clamp_(self: Any, min: Any = None, max: Any = None) -> _Array:
    x = writable(self, "self")
    return store(x, _clamp(x, min, max))


@_row("clamp_min.default")
def _clamp_min(self: Any, min: Any) -> _Array:
    return _clamp(self, min)


@_row("clamp_max.default")
def _clamp_max(self: Any, max: Any) -> _Array:
    return _clamp(self, None, max)


@_row("where.self", "where.ScalarOther", "where.ScalarSelf")
def _where(condition: Any, self: Any, other: Any) -> _Array:
    sides = [v for v in (self, other) if not isinstance(v, bool | int | float)]
    beside = as_array(sides[0], "self") if sides else np.zeros((), np.float32)
    return np.where(as_array(condition, "condition"), operand(self, "self", beside), operand(other, "other", beside))


@_row("masked_fill.Scalar")
def _masked_fill(self: Any, mask: Any, value: Any) -> _Array:
    x = as_array(self, "self")
    return np.where(as_array(mask, "mask"), x.dtype.type(value), x)


# -- reductions --------------------------------------------------------------------------------------------------
def _axes(dim: Any, ndim: int) -> Any:
    if dim is None:
        return None
    dims = [dim] if isinstance(dim, int) else [*dim]
    return tuple(axis_of(d, ndim) for d in dims) if dims and ndim else None


def _mean_of(x: _Array, axes: Any, keepdim: bool, dtype: Any) -> _Array:
    wide = dtype_of(dtype, x.dtype)
    if wide.kind != "f":
        raise TypeError(f"self: expected a floating dtype for a mean, got {x.dtype}")
    with np.errstate(all="ignore"):
        result = x.mean(axes, dtype=np.float32 if wide == np.float16 else wide, keepdims=keepdim)
    return np.asarray(result).astype(wide, copy=False)


def _sum_of(x: _Array, axes: Any, keepdim: bool, dtype: Any) -> _Array:
    wide = dtype_of(dtype, np.int64 if x.dtype.kind in "iub" else x.dtype)
    result = x.sum(axes, dtype=np.float32 if wide == np.float16 else wide, keepdims=keepdim)
    return np.asarray(result).astype(wide, copy=False)


for _name, _overload, _reduction in (("mean", "dim", _mean_of), ("sum", "dim_IntList", _sum_of)):

    def _reduction_rows(name: str, overload: str, reduction: Callable[..., _Array]) -> None:
        @_row(f"{name}.{overload}")
        def over_axes(self: Any, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> _Array:
            x = as_array(self, "self")
            return reduction(x, _axes(dim, x.ndim), keepdim, dtype)

        @_row(f"{name}.default")
        def over_all(self: Any, *, dtype: Any = None) -> _Array:
            return reduction(as_array(self, "self"), None, False, dtype)

    _reduction_rows(_name, _overload, _reduction)


@_row("amax.default")
def _amax(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> _Array:
    x = as_array(self, "self")
    return np.asarray(x.max(_axes(dim, x.ndim), keepdims=keepdim))


@_row("amin.default")
def _amin(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> _Array:
    x = as_array(self, "self")
    return np.asarray(x.min(_axes(dim, x.ndim), keepdims=keepdim))


@_row("max.default")
def _max(self: Any) -> _Array:
    return np.asarray(as_array(self, "self").max())


@_row("argmax.default")
def _argmax(self: Any, dim: int | None = None, keepdim: bool = False) -> _Array:
    x = as_array(self, "self")
    return np.asarray(np.argmax(x, axis=dim, keepdims=keepdim))


@_row("var.correction")
def _var(self: Any, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> _Array:
    x = as_array(self, "self")
    wide = x.astype(np.float64)
    axes = _axes(dim, x.ndim)
    count = x.size if axes is None else math.prod(x.shape[a] for a in axes)
    with np.errstate(all="ignore"):
        squares = np.square(wide - wide.mean(axes, keepdims=True)).sum(axes, keepdims=keepdim)
        divisor = np.float64(max(0.0, count - (1.0 if correction is None else float(correction))))
        return np.asarray(squares / divisor).astype(x.dtype)


# -- matrix products ---------------------------------------------------------------------------------------------
@_row("matmul.default")
def _matmul(self: Any, other: Any) -> _Array:
    return np.asarray(np.matmul(as_array(self, "self"), as_array(other, "other")))


def _product(a: Any, b: Any, ndim: int, a_name: str, b_name: str) -> _Array:
    x, y = as_array(a, a_name), as_array(b, b_name)
    for array, name in ((x, a_name), (y, b_name)):
        if array.ndim != ndim:
            raise ValueError(f"{name}: expected {ndim} axes, got {array.ndim}")
    return np.matmul(x, y)


@_row("mm.default")
def _mm(self: Any, mat2: Any) -> _Array:
    return _product(self, mat2, 2, "self", "mat2")


@_row("bmm.default")
def _bmm(self: Any, mat2: Any) -> _Array:
    return _product(self, mat2, 3, "self", "mat2")


def _add_product(x: Any, product: _Array, beta: Any, alpha: Any) -> _Array:
    if alpha != 1:
        product = product * product.dtype.type(alpha)
    if beta == 0:  # then what self holds does not matter, NaN included
        return product
    base = as_array(x, "self")
    return np.asarray((base if beta == 1 else base * base.dtype.type(beta)) + product)


@_row("addmm.default")
def _addmm(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> _Array:
    return _add_product(self, _product(mat1, mat2, 2, "mat1", "mat2"), beta, alpha)


@_row("baddbmm.default")
def _baddbmm(self: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> _Array:
    return _add_product(self, _product(batch1, batch2, 3, "batch1", "batch2"), beta, alpha)
