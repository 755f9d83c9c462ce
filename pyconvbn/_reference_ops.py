# SPDX-License-Identifier: BSD-3-Clause
"""Naive float64 references of the other inference operators; see `pyconvbn.testing`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import numpy as np

from ._reference import Float64Array, IntOrSeq, as_float64, as_tuple, last_axes, pad_axis


def reference_relu(input: Any) -> Float64Array:
    """`max(x, 0)`, NaN kept."""
    return np.maximum(as_float64(input, "input"), 0.0)


def reference_hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0) -> Float64Array:
    """`x` limited to `[min_val, max_val]`, NaN kept."""
    return np.clip(as_float64(input, "input"), min_val, max_val)


def reference_relu6(input: Any) -> Float64Array:
    """`min(max(x, 0), 6)`, NaN kept."""
    return reference_hardtanh(input, 0.0, 6.0)


def reference_leaky_relu(input: Any, negative_slope: float = 0.01) -> Float64Array:
    """`x` where positive, `negative_slope*x` elsewhere."""
    x = as_float64(input, "input")
    with np.errstate(all="ignore"):
        return np.where(x > 0, x, negative_slope * x)


def reference_sigmoid(input: Any) -> Float64Array:
    """`1/(1 + exp(-x))`; exp overflows to infinity harmlessly for very negative x."""
    with np.errstate(all="ignore"):
        return 1.0 / (1.0 + np.exp(-as_float64(input, "input")))


def reference_silu(input: Any) -> Float64Array:
    """`x * sigmoid(x)`."""
    with np.errstate(all="ignore"):
        return as_float64(input, "input") * reference_sigmoid(input)


def reference_hardswish(input: Any) -> Float64Array:
    """`x * relu6(x + 3) / 6` (Howard et al. 2019, MobileNetV3)."""
    x = as_float64(input, "input")
    with np.errstate(all="ignore"):
        return x * reference_relu6(x + 3.0) / 6.0


def reference_gelu(input: Any, approximate: str = "none") -> Float64Array:
    """`x * Phi(x)` with the normal distribution function, or its tanh approximation.

    Source: Hendrycks and Gimpel 2016. Raises `ValueError` for another `approximate`.
    """
    x = as_float64(input, "input")
    with np.errstate(all="ignore"):
        if approximate == "none":
            # erfc keeps its digits for very negative x, where 1 + erf(x) cancels to zero.
            phi = 0.5 * np.array([math.erfc(-v * math.sqrt(0.5)) for v in x.flat])
        elif approximate == "tanh":
            # (1 + tanh(z))/2 = 1/(1 + exp(-2z)), for the same reason.
            z = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)
            phi = 1.0 / (1.0 + np.exp(-2.0 * z))
        else:
            raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
        return x * phi.reshape(x.shape)


def reference_softmax(input: Any, dim: int = -1) -> Float64Array:
    """`exp(x) / sum(exp(x))` along `dim`, with the maximum taken off first."""
    x = as_float64(input, "input")
    with np.errstate(all="ignore"):
        powers = np.exp(x - x.max(axis=dim, keepdims=True))
        result: Float64Array = powers / powers.sum(axis=dim, keepdims=True)
    return result


# Largest slope of each activation: what it can do to an error in its argument.
_ACTIVATIONS = {
    "relu": (reference_relu, 1.0),
    "relu6": (reference_relu6, 1.0),
    "hardswish": (reference_hardswish, 1.5),
    "silu": (reference_silu, 1.1),
    "sigmoid": (reference_sigmoid, 0.25),
}


def reference_activation(
    input: Any, activation: str | tuple[str, float] | None
) -> tuple[Float64Array, float]:
    """(activated values, largest slope) for an activation as `Plan` names it."""
    if activation is None:
        return as_float64(input, "input"), 1.0
    if isinstance(activation, tuple) and activation[0] == "leaky_relu":
        slope = float(activation[1])
        return reference_leaky_relu(input, slope), max(1.0, abs(slope))
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation: expected None, ('leaky_relu', slope) or one of {sorted(_ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    function, slope = _ACTIVATIONS[activation]
    return function(input), slope


def _pool_out_size(size: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    span = size + 2 * p - d * (k - 1) - 1
    out = (-(-span // s) if ceil_mode else span // s) + 1
    if ceil_mode and (out - 1) * s >= size + p:
        out -= 1  # the last window has to start inside the input or its left padding
    return out


def _pool_geometry(
    nd: int, x: Float64Array, kernel_size: IntOrSeq, stride: IntOrSeq | None, padding: IntOrSeq,
    dilation: IntOrSeq, ceil_mode: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    kernel = as_tuple(kernel_size, nd, "kernel_size")
    strides = kernel if stride is None else as_tuple(stride, nd, "stride")
    pads, dils = as_tuple(padding, nd, "padding"), as_tuple(dilation, nd, "dilation")
    if any(2 * p > k for p, k in zip(pads, kernel)):
        raise ValueError(f"padding: at most half of kernel_size {kernel}, got {pads}")
    out_size = tuple(
        _pool_out_size(i, k, s, p, d, ceil_mode)
        for i, k, s, p, d in zip(x.shape[x.ndim - nd :], kernel, strides, pads, dils)
    )
    if min(out_size) < 1:
        raise ValueError(f"output size {out_size}: kernel_size {kernel} does not fit {x.shape}")
    return kernel, strides, pads, dils, out_size


def reference_max_pool(
    nd: int, input: Any, kernel_size: IntOrSeq, stride: IntOrSeq | None = None,
    padding: IntOrSeq = 0, dilation: IntOrSeq = 1, ceil_mode: bool = False,
) -> Float64Array:
    """Maximum over windows of the last `nd` axes; padding never wins, NaN always does.

    >>> reference_max_pool(1, np.array([[1.0, 5.0, 2.0, 3.0]]), 2)
    array([[5., 3.]])
    """
    x = as_float64(input, "input")
    kernel, strides, pads, dils, out_size = _pool_geometry(
        nd, x, kernel_size, stride, padding, dilation, ceil_mode
    )
    y = np.full((*x.shape[: x.ndim - nd], *out_size), -np.inf)
    for position in np.ndindex(*out_size):
        window = tuple(
            [i for i in range(o * s - p, o * s - p + d * (k - 1) + 1, d) if 0 <= i < size]
            for o, s, p, d, k, size in zip(
                position, strides, pads, dils, kernel, x.shape[x.ndim - nd :]
            )
        )
        for source in product(*window):
            y[last_axes(position)] = np.maximum(y[last_axes(position)], x[last_axes(source)])
    return y


def reference_avg_pool(
    nd: int, input: Any, kernel_size: IntOrSeq, stride: IntOrSeq | None = None,
    padding: IntOrSeq = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Float64Array:
    """Mean over windows of the last `nd` axes.

    The divisor counts padded positions when `count_include_pad`, but never those that `ceil_mode`
    adds beyond the right padding.

    >>> reference_avg_pool(1, np.array([[1.0, 5.0, 2.0, 4.0]]), 2)
    array([[3., 3.]])
    """
    x = as_float64(input, "input")
    kernel, strides, pads, _, out_size = _pool_geometry(
        nd, x, kernel_size, stride, padding, 1, ceil_mode
    )
    size = x.shape[x.ndim - nd :]
    y = np.zeros((*x.shape[: x.ndim - nd], *out_size))
    for position in np.ndindex(*out_size):
        starts = [o * s - p for o, s, p in zip(position, strides, pads)]
        ends = [min(a + k, i + p) for a, k, i, p in zip(starts, kernel, size, pads)]
        inside = [slice(max(a, 0), min(e, i)) for a, e, i in zip(starts, ends, size)]
        if divisor_override is not None:
            divisor = divisor_override
        elif count_include_pad:
            divisor = math.prod(e - a for a, e in zip(starts, ends))
        else:
            divisor = math.prod(s.stop - s.start for s in inside)
        with np.errstate(all="ignore"):
            total = x[last_axes(inside)].sum(axis=tuple(range(-nd, 0)))
            y[last_axes(position)] = total / divisor
    return y


def reference_adaptive_avg_pool(
    nd: int, input: Any, output_size: int | None | Sequence[int | None]
) -> Float64Array:
    """Mean over `[floor(i*size/out), ceil((i+1)*size/out))` of the last `nd` axes.

    None in `output_size` keeps the size of that axis.

    >>> reference_adaptive_avg_pool(1, np.array([[1.0, 2.0, 6.0]]), 2)
    array([[1.5, 4. ]])
    """
    x = as_float64(input, "input")
    size = x.shape[x.ndim - nd :]
    wanted = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,) * nd
    if len(wanted) != nd:
        raise ValueError(f"output_size: expected {nd} sizes, got {output_size!r}")
    out_size = tuple(i if o is None else o for i, o in zip(size, wanted))
    y = np.zeros((*x.shape[: x.ndim - nd], *out_size))
    for position in np.ndindex(*out_size):
        window = tuple(
            slice(o * i // n, -(-(o + 1) * i // n)) for o, i, n in zip(position, size, out_size)
        )
        y[last_axes(position)] = x[last_axes(window)].mean(axis=tuple(range(-nd, 0)))
    return y


def reference_pad(
    input: Any, pad: Sequence[int], mode: str = "constant", value: float = 0.0
) -> Float64Array:
    """Pad the last axes; `pad` holds (left, right) pairs, the last axis first, as PyTorch's.

    `mode` is constant (negative amounts crop), reflect, replicate or circular.

    >>> reference_pad(np.array([1.0, 2.0, 3.0]), (2, 1), "reflect")
    array([3., 2., 1., 2., 3., 2.])
    """
    x = as_float64(input, "input")
    if len(pad) % 2 or len(pad) > 2 * x.ndim:
        raise ValueError(f"pad: expected an even number of at most {2 * x.ndim} ints, got {pad!r}")
    for pair in range(len(pad) // 2):
        axis, (left, right) = x.ndim - 1 - pair, pad[2 * pair : 2 * pair + 2]
        if mode != "constant":
            x = pad_axis(x, axis, left, right, mode)
            continue
        size = x.shape[axis]
        if size + left + right < 0:
            raise ValueError(f"pad: axis {axis} of size {size} cannot shrink by {-left - right}")
        shape = list(x.shape)
        shape[axis] = size + left + right
        padded = np.full(shape, float(value))
        kept = range(max(0, -left), min(size, size + right))
        target = [slice(None)] * x.ndim
        source = [slice(None)] * x.ndim
        target[axis] = slice(kept.start + left, kept.start + left + len(kept))
        source[axis] = slice(kept.start, kept.start + len(kept))
        padded[tuple(target)] = x[tuple(source)]
        x = padded
    return x


def _linear_axis(x: Float64Array, axis: int, out: int, step: float, align: bool) -> Float64Array:
    size = x.shape[axis]
    if align:
        at = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        at = np.maximum((np.arange(out) + 0.5) * step - 0.5, 0.0)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = (at - low).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    mixed: Float64Array = np.take(x, low, axis) * (1.0 - weight) + np.take(x, high, axis) * weight
    return mixed


def reference_interpolate(
    input: Any, size: IntOrSeq | None = None,
    scale_factor: float | Sequence[float] | None = None, mode: str = "nearest",
    align_corners: bool | None = None,
) -> Float64Array:
    """Resize the axes after the second of `[N, C, *size]`: nearest, linear, bilinear or trilinear.

    `nearest` takes index `floor(i * step)`, defined in float32 as PyTorch does; coordinates of the
    linear modes are exact. With `scale_factor` the step is its reciprocal, as PyTorch's default.

    >>> reference_interpolate(np.array([[[1.0, 3.0]]]), scale_factor=2)
    array([[[1., 1., 3., 3.]]])
    """
    x = as_float64(input, "input")
    nd = x.ndim - 2
    if (size is None) == (scale_factor is None):
        raise ValueError("size, scale_factor: expected exactly one of them")
    if mode not in ("nearest", "linear", "bilinear", "trilinear"):
        raise ValueError(f"mode: expected nearest, linear, bilinear or trilinear, got {mode!r}")
    for i in range(nd):
        axis, old = i + 2, x.shape[i + 2]
        if scale_factor is not None:
            factor = scale_factor[i] if isinstance(scale_factor, Sequence) else scale_factor
            new = math.floor(old * factor)
            step = 1.0 / factor
        else:
            new = as_tuple(cast(IntOrSeq, size), nd, "size")[i]
            step = old / new
        if mode == "nearest":
            nearest = np.floor(np.arange(new, dtype=np.float32) * np.float32(step)).astype(int)
            x = np.take(x, np.minimum(nearest, old - 1), axis)
        else:
            x = _linear_axis(x, axis, new, step, bool(align_corners))
    return x


def reference_flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Float64Array:
    """Merge the axes `start_dim` to `end_dim` into one."""
    x = as_float64(input, "input")
    if x.ndim == 0:
        return x.reshape(1)
    first, last = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])
