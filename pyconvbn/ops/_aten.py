# SPDX-License-Identifier: BSD-3-Clause
"""What the ATen operators compute: the package's C operators where they are hot, a line of NumPy elsewhere.

IMPLEMENTATIONS has one function for each aten row of the op table, with the row's parameter names. Meanings are those
of PyTorch's documentation of the operators; dtypes are NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ._aten_math import MATH
from ._aten_shape import SHAPE
from ._aten_strided import STRIDED
from ._aten_util import as_array, dtype_of, operand, pair_sizes, writable

_Array = NDArray[Any]
_Ints = int | Sequence[int]

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {**MATH, **SHAPE, **STRIDED}


def _row(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            IMPLEMENTATIONS[f"aten.{name}"] = function
        return function

    return put


# -- convolution family ------------------------------------------------------------------------------------------
def _conv_rows(nd: int) -> None:
    one, zero = (1,) * nd, (0,) * nd

    @_row(f"conv{nd}d.default")
    def conv(
        input: Any, weight: Any, bias: Any = None, stride: _Ints = one, padding: _Ints = zero,
        dilation: _Ints = one, groups: int = 1,
    ) -> _Array:
        return _core.conv(nd, input, weight, bias, stride, padding, dilation, groups, None)

    @_row(f"conv{nd}d.padding")
    def conv_padding(
        input: Any, weight: Any, bias: Any = None, stride: _Ints = one, padding: str = "valid",
        dilation: _Ints = one, groups: int = 1,
    ) -> _Array:
        return _core.conv(nd, input, weight, bias, stride, padding, dilation, groups, None)

    @_row(f"conv_transpose{nd}d.{'default' if nd == 1 else 'input'}")
    def conv_transpose(
        input: Any, weight: Any, bias: Any = None, stride: _Ints = one, padding: _Ints = zero,
        output_padding: _Ints = zero, groups: int = 1, dilation: _Ints = one,
    ) -> _Array:
        return _core.conv_transpose(
            nd, input, weight, bias, stride, padding, output_padding, groups, dilation, None
        )


for _nd in (1, 2, 3):
    _conv_rows(_nd)


@_row("convolution.default")
def _convolution(
    input: Any, weight: Any, bias: Any, stride: _Ints, padding: _Ints, dilation: _Ints, transposed: bool,
    output_padding: _Ints, groups: int,
) -> _Array:
    nd = len(weight.shape) - 2
    if not 1 <= nd <= 3:
        raise ValueError(f"weight: expected 3 to 5 axes, got {nd + 2}")
    if transposed:
        return _core.conv_transpose(
            nd, input, weight, bias, stride, padding, output_padding, groups, dilation, None
        )
    return _core.conv(nd, input, weight, bias, stride, padding, dilation, groups, None)


@_row("linear.default")
def _linear(input: Any, weight: Any, bias: Any = None) -> _Array:
    return _core.linear(input, weight, bias, None)


# -- normalisation -----------------------------------------------------------------------------------------------
@_row("batch_norm.default")
def _batch_norm(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float,
    eps: float, cudnn_enabled: bool,
) -> _Array:
    return _core.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, None)


def _statistics(input: Any, eps: float) -> tuple[_Array, _Array]:
    """Mean and 1/sqrt(var + eps) of each channel of the batch."""
    x = as_array(input, "input")
    axes = (0, *range(2, x.ndim))
    wide = x.astype(np.float64)
    dtype = np.float32 if x.dtype == np.float16 else x.dtype
    with np.errstate(all="ignore"):
        return wide.mean(axes).astype(dtype), (1.0 / np.sqrt(wide.var(axes) + eps)).astype(dtype)


def _native(
    input: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[_Array, _Array, _Array]:
    output = _core.batch_norm(input, mean, var, weight, bias, training, momentum, eps, None)
    if training:
        return output, *_statistics(input, eps)
    empty = np.empty(0, np.float32 if output.dtype == np.float16 else output.dtype)
    return output, empty, empty.copy()


@_row("_native_batch_norm_legit.default", "native_batch_norm.default")
def _native_legit(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float,
    eps: float,
) -> tuple[_Array, ...]:
    return _native(input, weight, bias, running_mean, running_var, training, momentum, eps)


@_row("_native_batch_norm_legit.no_stats")
def _native_no_stats(
    input: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[_Array, ...]:
    return _native(input, weight, bias, None, None, training, momentum, eps)


@_row("_native_batch_norm_legit_no_training.default")
def _native_no_training(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> tuple[_Array, ...]:
    return _native(input, weight, bias, running_mean, running_var, False, momentum, eps)


@_row("_native_batch_norm_legit_functional.default")
def _native_functional(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float,
    eps: float,
) -> tuple[_Array, ...]:
    mean, var = as_array(running_mean, "running_mean").copy(), as_array(running_var, "running_var").copy()
    return *_native(input, weight, bias, mean, var, training, momentum, eps), mean, var


@_row("layer_norm.default")
def _layer_norm(
    input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> _Array:
    x = as_array(input, "input")
    n = len(normalized_shape)
    if n == 0 or tuple(x.shape[-n:]) != tuple(normalized_shape):
        raise ValueError(f"normalized_shape: expected the last axes of {x.shape}, got {tuple(normalized_shape)}")
    wide = x.astype(np.float64)
    axes = tuple(range(x.ndim - n, x.ndim))
    y = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + eps)
    if weight is not None:
        y = y * as_array(weight, "weight")
    return (y if bias is None else y + as_array(bias, "bias")).astype(x.dtype)


@_row("group_norm.default")
def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> _Array:
    x = as_array(input, "input")
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the channels of {x.shape}, got {num_groups}")
    wide = x.astype(np.float64).reshape(x.shape[0], num_groups, -1)
    y = (wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + eps)
    y, channel = y.reshape(x.shape), (1, -1) + (1,) * (x.ndim - 2)
    if weight is not None:
        y = y * as_array(weight, "weight").reshape(channel)
    return (y if bias is None else y + as_array(bias, "bias").reshape(channel)).astype(x.dtype)


# -- pooling -----------------------------------------------------------------------------------------------------
def _pool_rows(nd: int) -> None:
    flat = nd == 1
    zero, one = ((0,), (1,)) if flat else (0, 1)

    @_row(f"max_pool{nd}d.default")
    def max_pool(
        self: Any, kernel_size: _Ints, stride: _Ints = (), padding: _Ints = zero, dilation: _Ints = one,
        ceil_mode: bool = False,
    ) -> _Array:
        return _core.max_pool(nd, self, kernel_size, _stride(stride), padding, dilation, ceil_mode, None)

    if flat:

        @_row("avg_pool1d.default")
        def avg_pool1d(
            self: Any, kernel_size: _Ints, stride: _Ints = (), padding: _Ints = zero, ceil_mode: bool = False,
            count_include_pad: bool = True,
        ) -> _Array:
            return _core.avg_pool(
                1, self, kernel_size, _stride(stride), padding, ceil_mode, count_include_pad, None, None
            )

    else:

        @_row(f"avg_pool{nd}d.default")
        def avg_pool(
            self: Any, kernel_size: _Ints, stride: _Ints = (), padding: _Ints = zero, ceil_mode: bool = False,
            count_include_pad: bool = True, divisor_override: int | None = None,
        ) -> _Array:
            return _core.avg_pool(
                nd, self, kernel_size, _stride(stride), padding, ceil_mode, count_include_pad, divisor_override, None
            )

    names = [f"adaptive_avg_pool{nd}d.default"] + ([] if flat else [f"_adaptive_avg_pool{nd}d.default"])

    @_row(*names)
    def adaptive_avg_pool(self: Any, output_size: _Ints) -> _Array:
        return _core.adaptive_avg_pool(nd, self, pair_sizes(output_size, nd), None)


def _stride(stride: _Ints) -> _Ints | None:
    return None if not isinstance(stride, int) and len(stride) == 0 else stride


for _nd in (1, 2, 3):
    _pool_rows(_nd)


# -- resizing ----------------------------------------------------------------------------------------------------
def _interpolate(input: Any, size: Any, scales: Any, mode: str, align_corners: bool | None) -> _Array:
    from .. import functional

    resize: Any = getattr(functional.interpolate, "__wrapped__")
    return resize(
        input, None if size is None else [int(s) for s in size], None if scales is None else [float(s) for s in scales],
        mode, align_corners,
    )


@_row("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
def _nearest(input: Any, output_size: Any, scale_factors: Any) -> _Array:
    return _interpolate(input, output_size, scale_factors, "nearest", None)


@_row("upsample_bilinear2d.vec")
def _bilinear(input: Any, output_size: Any, align_corners: bool, scale_factors: Any) -> _Array:
    return _interpolate(input, output_size, scale_factors, "bilinear", align_corners)


# -- new arrays, copies ------------------------------------------------------------------------------------------
def _like(fill: Callable[..., Any]) -> Callable[..., Any]:
    def like(
        self: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
        memory_format: Any = None,
    ) -> _Array:
        x = as_array(self, "self")
        return fill(x.shape, dtype_of(dtype, x.dtype))

    return like


def _random(kind: str) -> Callable[..., Any]:
    return lambda shape, dtype: getattr(np.random.default_rng(), kind)(shape).astype(dtype)


_row("zeros_like.default")(_like(np.zeros))
_row("ones_like.default")(_like(np.ones))
_row("rand_like.default")(_like(_random("random")))
_row("randn_like.default")(_like(_random("standard_normal")))


@_row("full_like.default")
def _full_like(
    self: Any, fill_value: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> _Array:
    x = as_array(self, "self")
    return np.full(x.shape, fill_value, dtype_of(dtype, x.dtype))


def _new(fill: Callable[..., Any]) -> Callable[..., Any]:
    def new(
        size: Sequence[int], *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
    ) -> _Array:
        return fill(tuple(size), dtype_of(dtype, np.float32))

    return new


_row("zeros.default")(_new(np.zeros))
_row("ones.default")(_new(np.ones))


@_row("full.default")
def _full(
    size: Sequence[int], fill_value: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
    pin_memory: Any = None,
) -> _Array:
    kind = np.bool_ if isinstance(fill_value, bool) else np.int64 if isinstance(fill_value, int) else np.float32
    return np.full(tuple(size), fill_value, dtype_of(dtype, kind))


def _range_dtype(dtype: Any, *values: Any) -> Any:
    return dtype_of(dtype, np.int64 if all(isinstance(v, int) for v in values) else np.float32)


@_row("arange.default")
def _arange(end: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> _Array:
    return np.arange(0, end).astype(_range_dtype(dtype, end))


@_row("arange.start")
def _arange_start(
    start: Any, end: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> _Array:
    return np.arange(start, end).astype(_range_dtype(dtype, start, end))


@_row("_to_copy.default")
def _to_copy(
    self: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    non_blocking: bool = False, memory_format: Any = None,
) -> _Array:
    x = as_array(self, "self")
    return x.astype(dtype_of(dtype, x.dtype), copy=True)


@_row("to.dtype")
def _to_dtype(
    self: Any, dtype: Any, non_blocking: bool = False, copy: bool = False, memory_format: Any = None
) -> _Array:
    x = as_array(self, "self")
    return x.astype(dtype_of(dtype, x.dtype), copy=copy)


@_row("to.dtype_layout")
def _to_dtype_layout(
    self: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    non_blocking: bool = False, copy: bool = False, memory_format: Any = None,
) -> _Array:
    x = as_array(self, "self")
    return x.astype(dtype_of(dtype, x.dtype), copy=copy)


@_row("lift_fresh_copy.default")
def _copied(self: Any) -> _Array:
    return as_array(self, "self").copy(order="K")


@_row("copy.default")
def _copy(self: Any, src: Any, non_blocking: bool = False) -> _Array:
    x = as_array(self, "self")
    return np.broadcast_to(operand(src, "src", x), x.shape).astype(x.dtype)


@_row("copy_.default")
def _copy_(self: Any, src: Any, non_blocking: bool = False) -> _Array:
    x = writable(self, "self")
    x[...] = operand(src, "src", x)
    return x


@_row("fill_.Scalar")
def _fill_(self: Any, value: Any) -> _Array:
    x = writable(self, "self")
    x[...] = value
    return x


@_row("zero_.default")
def _zero_(self: Any) -> _Array:
    x = writable(self, "self")
    x[...] = 0
    return x


# -- dropout -----------------------------------------------------------------------------------------------------
def _drop(x: _Array, p: float, shape: tuple[int, ...]) -> _Array:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected between 0 and 1, got {p}")
    kept = np.random.default_rng().random(shape) >= p
    return np.where(kept, x * x.dtype.type(0.0 if p == 1.0 else 1.0 / (1.0 - p)), x.dtype.type(0))


@_row("dropout.default")
def _dropout(input: Any, p: float, train: bool) -> _Array:
    x = as_array(input, "input")
    return _drop(x, p, x.shape) if train and p > 0 else x


@_row("feature_dropout.default")
def _feature_dropout(input: Any, p: float, train: bool) -> _Array:
    x = as_array(input, "input")
    return _drop(x, p, x.shape[:2] + (1,) * (x.ndim - 2)) if train and p > 0 else x


@_row("dropout_.default")
def _dropout_(self: Any, p: float, train: bool) -> _Array:
    x = writable(self, "self")
    if train and p > 0:
        x[...] = _drop(x, p, x.shape)
    return x
