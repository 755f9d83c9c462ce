# SPDX-License-Identifier: BSD-3-Clause
"""What the operators of `ops.quantized_decomposed` compute.

`q = clamp(rint(x * inv) + float32(zero_point), quant_min, quant_max)` in float32, halves rounded to even, where `inv`
is float32(1 / scale) of the float64 scale for a whole array, and 1 / float32(scale) per channel. Per-channel scales of
float64 compute in float64. Beyond the dtype's range (int32 in float32) the result saturates; NaN becomes the clamped
zero point. Back: `(T(q) - T(zero_point)) * T(scale)`, T being float32, or `out_dtype` for a whole array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._aten_util import as_array, axis_of, dtype_of

_Array = NDArray[Any]

QUANTIZED: dict[str, Callable[..., Any]] = {}

_INTEGERS = {np.dtype(name) for name in ("int8", "uint8", "int16", "uint16", "int32")}


def _row(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        QUANTIZED[f"quantized_decomposed.{name}.default"] = function
        return function

    return put


def _integer(dtype: Any, quant_min: int, quant_max: int) -> np.dtype[Any]:
    """The dtype of the quantized numbers, which holds both limits."""
    resolved = dtype_of(dtype, np.int8)
    if resolved not in _INTEGERS:
        raise TypeError(f"dtype: expected int8, uint8, int16, uint16 or int32, got {resolved}")
    limits = np.iinfo(resolved)
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if not limits.min <= value <= limits.max:
            raise ValueError(f"{name}: expected between {limits.min} and {limits.max} for {resolved}, got {value}")
    return resolved


def _number(value: Any, name: str) -> float:
    """A scale of a whole array."""
    number = float(value)
    if number == 0.0:
        raise ValueError(f"{name}: expected a number other than 0")
    return number


def _floating(input: Any) -> _Array:
    x = as_array(input, "input")
    if x.dtype not in (np.float16, np.float32):
        raise TypeError(f"input: expected dtype float32 or float16, got {x.dtype}")
    return x.astype(np.float32, copy=False)


def _quantize(x: _Array, inv: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: np.dtype[Any]) -> _Array:
    """inv and zero_point: numbers, or arrays that broadcast, of the dtype to compute in."""
    lowest, highest = inv.dtype.type(quant_min), inv.dtype.type(quant_max)
    with np.errstate(all="ignore"):
        y = np.asarray(x * inv)
        np.rint(y, out=y)
        y += zero_point
        np.clip(y, lowest, highest, out=y)
        unordered = np.isnan(y)
        if unordered.any():
            y[unordered] = np.broadcast_to(np.clip(zero_point, lowest, highest), y.shape)[unordered]
        if dtype.itemsize == 4:  # float32(2**31 - 1) is 2**31
            limits = np.iinfo(dtype)
            y = np.clip(y.astype(np.float64), limits.min, limits.max)
        return np.asarray(y.astype(dtype))


def _along(values: _Array, x: _Array, axis: int, name: str) -> _Array:
    """One number for each entry of the axis, shaped to broadcast."""
    if values.shape != (x.shape[axis],):
        raise ValueError(f"{name}: expected shape ({x.shape[axis]},), the size of axis {axis}, got {values.shape}")
    return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _channels(x: _Array, axis: int) -> int:
    if x.ndim == 0:
        raise ValueError("input: expected at least one axis, got a 0-d array")
    return axis_of(axis, x.ndim, "axis")


def _quantized(input: Any, dtype: np.dtype[Any]) -> _Array:
    q = as_array(input, "input")
    if q.dtype != dtype:
        raise TypeError(f"input: expected dtype {dtype}, as the argument dtype says, got {q.dtype}")
    return q


def _result_type(out_dtype: Any) -> np.dtype[Any]:
    resolved = dtype_of(out_dtype, np.float32)
    if resolved.kind != "f":
        raise TypeError(f"out_dtype: expected a floating dtype, got {resolved}")
    return resolved


@_row("quantize_per_tensor")
def _quantize_per_tensor(
    input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any
) -> _Array:
    x, integer = _floating(input), _integer(dtype, quant_min, quant_max)
    with np.errstate(all="ignore"):
        inv, zero = np.float32(1.0 / _number(scale, "scale")), np.float32(zero_point)
    return _quantize(x, inv, zero, quant_min, quant_max, integer)


@_row("quantize_per_channel")
def _quantize_per_channel(
    input: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: Any
) -> _Array:
    x, integer = _floating(input), _integer(dtype, quant_min, quant_max)
    axis = _channels(x, axis)
    s, z = as_array(scales, "scales"), as_array(zero_points, "zero_points")
    compute = np.float64 if s.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        inv = np.divide(1, s.astype(compute, copy=False), dtype=compute)
        zero = z.astype(compute)
    return _quantize(
        x, _along(inv, x, axis, "scales"), _along(zero, x, axis, "zero_points"), quant_min, quant_max, integer
    )


@_row("dequantize_per_tensor")
def _dequantize_per_tensor(
    input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: Any, *, out_dtype: Any = None
) -> _Array:
    q = _quantized(input, _integer(dtype, quant_min, quant_max))
    result = _result_type(out_dtype)
    # PyTorch's float16 arithmetic: each operation in float32, its result rounded to float16.
    compute = np.dtype(np.float32) if result == np.float16 else result
    with np.errstate(all="ignore"):
        y = q.astype(result).astype(compute, copy=False) - compute.type(zero_point)
        y = np.asarray(y).astype(result, copy=False).astype(compute, copy=False) * compute.type(scale)
        return np.asarray(np.asarray(y).astype(result, copy=False))


@_row("dequantize_per_channel")
def _dequantize_per_channel(
    input: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: Any, *,
    out_dtype: Any = None,
) -> _Array:
    q = _quantized(input, _integer(dtype, quant_min, quant_max))
    result = _result_type(out_dtype)
    axis = _channels(q, axis)
    with np.errstate(all="ignore"):
        y = q.astype(np.float32)
        if zero_points is not None:
            y -= _along(as_array(zero_points, "zero_points").astype(np.float32), y, axis, "zero_points")
        y *= _along(as_array(scales, "scales").astype(np.float32), y, axis, "scales")
        return y.astype(result, copy=False)
