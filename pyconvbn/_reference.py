# SPDX-License-Identifier: BSD-3-Clause
"""Naive float64 convolution, batch normalisation and folding: the oracle behind `pyconvbn.testing`.

Nothing here calls the C extension. Each function is the definition of its operation written out:
a loop over kernel taps, a loop over weight elements. Inputs are widened to float64 (exact for
float16, bfloat16 and float32) and every result is float64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
IntOrSeq = int | Sequence[int]


def as_float64(value: Any, name: str) -> Float64Array:
    """Widen `value` (ndarray, CPU torch.Tensor or DLPack exporter) to a float64 ndarray.

    Raises `TypeError` naming `name` for anything that is not a real floating-point array.
    """
    if hasattr(value, "detach"):  # torch.Tensor: .double() also reads bfloat16, which NumPy lacks
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        return np.asarray(value.detach().cpu().double().numpy())
    if not isinstance(value, (np.ndarray, np.floating)) and hasattr(value, "__dlpack__"):
        value = np.from_dlpack(value)
    if not isinstance(value, (np.ndarray, np.floating)):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
    array = np.asarray(value)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected a floating-point array, got dtype {array.dtype}")
    return array.astype(np.float64)


def optional_float64(value: Any | None, name: str) -> Float64Array | None:
    """`as_float64`, passing None through."""
    return None if value is None else as_float64(value, name)


def as_tuple(value: IntOrSeq, nd: int, name: str) -> tuple[int, ...]:
    """Spread an int over `nd` axes, or check that a sequence has `nd` ints (1 is spread too)."""
    items = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(items) == 1:
        items = items * nd
    if len(items) != nd:
        raise ValueError(f"{name}: expected an int or {nd} ints, got {len(items)}: {value!r}")
    return tuple(operator.index(item) for item in items)


def last_axes(index: Iterable[Any]) -> tuple[Any, ...]:
    """An index of the last axes that leaves those before them whole."""
    return (..., *index)


class Window(NamedTuple):
    """Where one kernel tap meets the input along one axis: y[out] takes x[src]."""

    out: slice
    src: slice


def _tap_window(tap: int, size: int, out_size: int, stride: int, left: int, dil: int) -> Window:
    """Output positions `o` for which `o*stride - left + tap*dil` lies inside the input."""
    offset = tap * dil - left
    first = max(0, -(offset // stride))  # ceil(-offset / stride)
    last = min(out_size - 1, (size - 1 - offset) // stride)
    if last < first:
        return Window(slice(0, 0), slice(0, 0))
    start = first * stride + offset
    return Window(slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride))


def padding_pairs(
    padding: IntOrSeq | str, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Resolve int, tuple, 'valid' and 'same' padding to (left, right) of each axis.

    With 'same' the total is `dilation*(kernel-1)`; when it is odd the extra one goes right.
    """
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding: expected 'same', 'valid' or ints, got {padding!r}")
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in as_tuple(padding, len(kernel), "padding")]


def pad_axis(x: Float64Array, axis: int, left: int, right: int, mode: str) -> Float64Array:
    """Extend one axis by non-constant padding: reflect, replicate or circular."""
    size = x.shape[axis]
    index = np.arange(-left, size + right)
    if mode == "reflect":
        if max(left, right) >= size:
            raise ValueError(f"padding: reflect needs less than the size {size}, got {left, right}")
        index = np.abs(index)
        index = np.where(index >= size, 2 * (size - 1) - index, index)
    elif mode == "replicate":
        index = np.clip(index, 0, size - 1)
    elif mode == "circular":
        if max(left, right) > size:
            raise ValueError(f"padding: circular allows at most {size}, got {left, right}")
        index = index % size
    else:
        raise ValueError(
            f"padding_mode: expected 'zeros', 'reflect', 'replicate' or 'circular', got {mode!r}"
        )
    return np.take(x, index, axis=axis)


def _batched(x: Float64Array, nd: int, channels: int) -> Float64Array:
    if x.ndim not in (nd + 1, nd + 2):
        raise ValueError(f"input: expected {nd + 1} (unbatched) or {nd + 2} axes, got {x.ndim}")
    batched = x if x.ndim == nd + 2 else x[np.newaxis]
    if batched.shape[1] != channels:
        raise ValueError(f"input: expected {channels} channels, got {batched.shape[1]}")
    return batched


def _taps(kernel: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(k) for k in kernel))


def _mix_channels(w_tap: Float64Array, x: Float64Array) -> Float64Array:
    """Sum over the channels of each group: (g, o, i) and (n, g, i, *s) to (n, g, o, *s)."""
    n, g, i, *spatial = x.shape
    mixed: Float64Array = np.matmul(w_tap, x.reshape(n, g, i, math.prod(spatial)))
    return mixed.reshape(n, g, w_tap.shape[1], *spatial)


def _add_bias(y: Float64Array, bias: Any | None, nd: int) -> Float64Array:
    values = optional_float64(bias, "bias")
    if values is None:
        return y
    if values.shape != (y.shape[1],):
        raise ValueError(f"bias: expected shape ({y.shape[1]},), got {values.shape}")
    return y + values.reshape(-1, *[1] * nd)


@np.errstate(all="ignore")
def reference_conv(
    input: Any,
    weight: Any,
    bias: Any | None = None,
    stride: IntOrSeq = 1,
    padding: IntOrSeq | str = 0,
    dilation: IntOrSeq = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
) -> Float64Array:
    """Cross-correlation in 1 to 3 dimensions, as `torch.nn.functional.conv{1,2,3}d` defines it.

    `input` is `[N, ic, *size]` or unbatched `[ic, *size]`, `weight` is `[oc, ic/groups, *kernel]`,
    `bias` is None or `[oc]`; the number of spatial axes is `weight.ndim - 2`. With zero padding
    the taps outside the input contribute nothing, so an infinite weight does not turn the border
    into NaN. Raises `TypeError` for non-float arrays and `ValueError` for sizes that do not fit.

    >>> reference_conv(np.array([[1.0, 2.0, 3.0]]), np.array([[[1.0, -1.0]]]))
    array([[-1., -1.]])
    """
    x, w = as_float64(input, "input"), as_float64(weight, "weight")
    nd = w.ndim - 2
    if not 1 <= nd <= 3:
        raise ValueError(f"weight: expected 3 to 5 axes, got {w.ndim}")
    oc, icg, *kernel = w.shape
    if groups < 1 or oc % groups:
        raise ValueError(f"groups: expected a positive divisor of out_channels={oc}, got {groups}")
    strides, dils = as_tuple(stride, nd, "stride"), as_tuple(dilation, nd, "dilation")
    if padding == "same" and any(s != 1 for s in strides):
        raise ValueError(f"padding: 'same' needs stride 1, got stride {stride!r}")
    batched = _batched(x, nd, icg * groups)
    pads = padding_pairs(padding, kernel, dils)
    if padding_mode != "zeros":
        for axis, (left, right) in enumerate(pads, start=2):
            batched = pad_axis(batched, axis, left, right, padding_mode)
        pads = [(0, 0)] * nd

    n, _, *size = batched.shape
    out_size = [
        (i + left + right - d * (k - 1) - 1) // s + 1
        for i, (left, right), k, s, d in zip(size, pads, kernel, strides, dils)
    ]
    if min(kernel) < 1 or min(out_size) < 1:
        raise ValueError(f"output size {out_size}: kernel {kernel} does not fit in input {size}")
    grouped = batched.reshape(n, groups, icg, *size)
    y = np.zeros((n, groups, oc // groups, *out_size))
    for tap in _taps(kernel):
        windows = [
            _tap_window(t, i, o, s, left, d)
            for t, i, o, s, (left, _), d in zip(tap, size, out_size, strides, pads, dils)
        ]
        w_tap = w[last_axes(tap)].reshape(groups, oc // groups, icg)
        src = grouped[last_axes(window.src for window in windows)]
        y[last_axes(window.out for window in windows)] += _mix_channels(w_tap, src)
    y = _add_bias(y.reshape(n, oc, *out_size), bias, nd)
    return y if x.ndim == nd + 2 else y[0]


@np.errstate(all="ignore")
def reference_conv_transpose(
    input: Any,
    weight: Any,
    bias: Any | None = None,
    stride: IntOrSeq = 1,
    padding: IntOrSeq = 0,
    output_padding: IntOrSeq = 0,
    groups: int = 1,
    dilation: IntOrSeq = 1,
) -> Float64Array:
    """Transposed convolution in 1 to 3 dimensions, arguments in PyTorch's order.

    `input` is `[N, ic, *size]` or unbatched, `weight` is `[ic, oc/groups, *kernel]`. Each input
    element adds its multiple of the kernel at `stride` times its position; `padding` is cropped
    from both ends and `output_padding` extends the right end. Errors as in `reference_conv`.

    >>> reference_conv_transpose(np.array([[1.0, 2.0]]), np.array([[[1.0, 10.0]]]), stride=2)
    array([[ 1., 10.,  2., 20.]])
    """
    x, w = as_float64(input, "input"), as_float64(weight, "weight")
    nd = w.ndim - 2
    if not 1 <= nd <= 3:
        raise ValueError(f"weight: expected 3 to 5 axes, got {w.ndim}")
    ic, ocg, *kernel = w.shape
    if groups < 1 or ic % groups:
        raise ValueError(f"groups: expected a positive divisor of in_channels={ic}, got {groups}")
    strides, dils = as_tuple(stride, nd, "stride"), as_tuple(dilation, nd, "dilation")
    pads, extra = as_tuple(padding, nd, "padding"), as_tuple(output_padding, nd, "output_padding")
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dils)):
        raise ValueError(f"output_padding: must be below max(stride, dilation), got {extra}")
    batched = _batched(x, nd, ic)
    n, _, *size = batched.shape
    out_size = [
        (i - 1) * s - 2 * p + d * (k - 1) + e + 1
        for i, s, p, d, k, e in zip(size, strides, pads, dils, kernel, extra)
    ]
    if min(kernel) < 1 or min(size) < 1 or min(out_size) < 1:
        raise ValueError(f"output size {out_size}: from input {size}, kernel {kernel}")
    grouped = batched.reshape(n, groups, ic // groups, *size)
    uncropped = np.zeros((n, groups, ocg, *(o + 2 * p for o, p in zip(out_size, pads))))
    for tap in _taps(kernel):
        w_tap = w[last_axes(tap)].reshape(groups, ic // groups, ocg).swapaxes(1, 2)
        target = tuple(
            slice(t * d, t * d + (i - 1) * s + 1, s)
            for t, d, i, s in zip(tap, dils, size, strides)
        )
        uncropped[last_axes(target)] += _mix_channels(w_tap, grouped)
    cropped = uncropped[last_axes(slice(p, p + o) for p, o in zip(pads, out_size))]
    y = _add_bias(cropped.reshape(n, groups * ocg, *out_size), bias, nd)
    return y if x.ndim == nd + 2 else y[0]


@np.errstate(all="ignore")
def reference_linear(input: Any, weight: Any, bias: Any | None = None) -> Float64Array:
    """`input @ weight.T + bias` for `input` `[..., in]`, `weight` `[out, in]`, `bias` `[out]`.

    Raises `ValueError` when the sizes do not fit.

    >>> reference_linear(np.array([1.0, 2.0]), np.array([[3.0, 4.0]]), np.array([0.5]))
    array([11.5])
    """
    x, w = as_float64(input, "input"), as_float64(weight, "weight")
    b = optional_float64(bias, "bias")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"input {x.shape} and weight {w.shape}: expected [..., in] and [out, in]")
    if b is not None and b.shape != (w.shape[0],):
        raise ValueError(f"bias: expected shape ({w.shape[0]},), got {b.shape}")
    y: Float64Array = np.matmul(x, w.T)
    return y if b is None else y + b


def _along(values: Float64Array, ndim: int, axis: int) -> Float64Array:
    """Reshape a vector so that it broadcasts along `axis` of an array with `ndim` axes."""
    return values.reshape([-1 if a == axis else 1 for a in range(ndim)])


@np.errstate(all="ignore")
def reference_batch_norm(
    input: Any,
    running_mean: Any | None,
    running_var: Any | None,
    weight: Any | None = None,
    bias: Any | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
) -> Float64Array:
    """`(x - mean) / sqrt(var + eps) * weight + bias` along `channel_axis`.

    In training, or when both running arrays are None, mean and (biased) variance are those of the
    batch. Nothing is updated, so `momentum` has no effect here; see `reference_batch_norm_stats`.
    Raises `ValueError` when a length differs from the number of channels.
    Formula: Ioffe and Szegedy 2015, algorithm 1 and section 3.1.

    >>> x = np.array([[1.0], [3.0]])
    >>> reference_batch_norm(x, np.array([1.0]), np.array([4.0]), eps=0.0)
    array([[0.],
           [1.]])
    """
    x = as_float64(input, "input")
    axis = channel_axis % x.ndim
    others = tuple(a for a in range(x.ndim) if a != axis)
    if training or (running_mean is None and running_var is None):
        mean, var = x.mean(axis=others), x.var(axis=others)
    else:
        mean, var = as_float64(running_mean, "running_mean"), as_float64(running_var, "running_var")
    gamma, beta = optional_float64(weight, "weight"), optional_float64(bias, "bias")
    for name, values in (
        ("running_mean", mean), ("running_var", var), ("weight", gamma), ("bias", beta)
    ):
        if values is not None and values.shape != (x.shape[axis],):
            raise ValueError(f"{name}: expected shape ({x.shape[axis]},), got {values.shape}")
    y = (x - _along(mean, x.ndim, axis)) / np.sqrt(_along(var, x.ndim, axis) + eps)
    if gamma is not None:
        y = y * _along(gamma, x.ndim, axis)
    return y if beta is None else y + _along(beta, x.ndim, axis)


def reference_batch_norm_stats(
    input: Any, running_mean: Any, running_var: Any, momentum: float = 0.1
) -> tuple[Float64Array, Float64Array]:
    """Running mean and variance after one training step on `input` `[N, C, ...]`.

    `new = (1 - momentum) * old + momentum * batch`, with the unbiased variance of the batch.

    >>> reference_batch_norm_stats(np.array([[1.0], [3.0]]), np.zeros(1), np.ones(1), 0.5)
    (array([1.]), array([1.5]))
    """
    x = as_float64(input, "input")
    others = tuple(a for a in range(x.ndim) if a != 1)
    mean, var = x.mean(axis=others), x.var(axis=others, ddof=1)
    keep = 1.0 - momentum
    return (
        keep * as_float64(running_mean, "running_mean") + momentum * mean,
        keep * as_float64(running_var, "running_var") + momentum * var,
    )


def bn_scale_shift(
    running_mean: Any, running_var: Any, eps: float, weight: Any | None, bias: Any | None
) -> tuple[Float64Array, Float64Array]:
    """(s, t) with `bn(y) = s*y + t`: `s = weight/sqrt(var + eps)`, `t = bias - mean*s`."""
    mean, var = as_float64(running_mean, "bn_rm"), as_float64(running_var, "bn_rv")
    gamma, beta = optional_float64(weight, "bn_w"), optional_float64(bias, "bn_b")
    with np.errstate(all="ignore"):
        inverse_std = 1.0 / np.sqrt(var + eps)
        scale = inverse_std if gamma is None else gamma * inverse_std
        shift = -mean * scale
    return scale, shift if beta is None else beta + shift


def weight_output_channel(
    index: Sequence[int], shape: Sequence[int], transpose: bool, groups: int
) -> int:
    """Output channel to which element `index` of a conv weight of `shape` contributes."""
    if not transpose:
        return index[0]
    in_per_group, out_per_group = shape[0] // groups, shape[1]
    return (index[0] // in_per_group) * out_per_group + index[1]


@np.errstate(all="ignore")
def reference_fold_conv_bn(
    conv_w: Any,
    conv_b: Any | None,
    bn_rm: Any,
    bn_rv: Any,
    bn_eps: float,
    bn_w: Any | None,
    bn_b: Any | None,
    transpose: bool = False,
    groups: int = 1,
) -> tuple[Float64Array, Float64Array]:
    """(W', b') in float64 such that `conv(x, W', b') == bn(conv(x, conv_w, conv_b))`.

    `W' = W*s` and `b' = (b - mean)*s + beta` per output channel, `s = gamma/sqrt(var + eps)`.
    The output channel of each weight element is looked up one by one, grouped transposed
    weights `[ic, oc/groups, ...]` included.

    >>> one = np.ones(1)
    >>> reference_fold_conv_bn(np.full((1, 1, 1), 3.0), None, one, 4 * one, 0.0, one, one)
    (array([[[1.5]]]), array([0.5]))
    """
    w, b = as_float64(conv_w, "conv_w"), optional_float64(conv_b, "conv_b")
    scale, _ = bn_scale_shift(bn_rm, bn_rv, bn_eps, bn_w, bn_b)
    mean, beta = as_float64(bn_rm, "bn_rm"), optional_float64(bn_b, "bn_b")
    out_channels = w.shape[1] * groups if transpose else w.shape[0]
    if scale.shape != (out_channels,):
        raise ValueError(f"bn_rv: expected length {out_channels}, got shape {scale.shape}")
    folded = w.copy()
    for index in np.ndindex(*w.shape[:2]):
        folded[index] *= scale[weight_output_channel(index, w.shape, transpose, groups)]
    shift = ((0.0 if b is None else b) - mean) * scale
    return folded, shift if beta is None else shift + beta


@np.errstate(all="ignore")
def reference_fold_linear_bn(
    linear_w: Any,
    linear_b: Any | None,
    bn_rm: Any,
    bn_rv: Any,
    bn_eps: float,
    bn_w: Any | None,
    bn_b: Any | None,
) -> tuple[Float64Array, Float64Array]:
    """(W', b') for `linear` followed by BN; BN parameters of length 1 serve every output.

    >>> one = np.ones(1)
    >>> reference_fold_linear_bn(np.full((2, 1), 3.0), None, one, 4 * one, 0.0, None, None)
    (array([[1.5],
           [1.5]]), array([-0.5, -0.5]))
    """
    w, b = as_float64(linear_w, "linear_w"), optional_float64(linear_b, "linear_b")
    scale, _ = bn_scale_shift(bn_rm, bn_rv, bn_eps, bn_w, bn_b)
    mean, beta = as_float64(bn_rm, "bn_rm"), optional_float64(bn_b, "bn_b")
    if scale.shape not in ((w.shape[0],), (1,)):
        raise ValueError(f"bn_rv: expected length {w.shape[0]} or 1, got shape {scale.shape}")
    shift = ((np.zeros(w.shape[0]) if b is None else b) - mean) * scale
    return w * scale[:, np.newaxis], shift if beta is None else shift + beta


@np.errstate(all="ignore")
def reference_fold_bn_conv(
    bn_rm: Any,
    bn_rv: Any,
    bn_eps: float,
    bn_w: Any | None,
    bn_b: Any | None,
    conv_w: Any,
    conv_b: Any | None,
    *,
    groups: int = 1,
    transpose: bool = False,
) -> tuple[Float64Array, Float64Array]:
    """(W', b') for BN *before* the convolution: `conv(x, W', b') == conv(bn(x), conv_w, conv_b)`.

    Exact only where the shift of BN is zero or every tap reads real data; the caller decides.

    >>> one = np.ones(1)
    >>> reference_fold_bn_conv(one, 4 * one, 0.0, None, None, np.full((1, 1, 2), 3.0), None)
    (array([[[1.5, 1.5]]]), array([-3.]))
    """
    w, b = as_float64(conv_w, "conv_w"), optional_float64(conv_b, "conv_b")
    scale, shift = bn_scale_shift(bn_rm, bn_rv, bn_eps, bn_w, bn_b)
    out_channels = w.shape[1] * groups if transpose else w.shape[0]
    folded = w.copy()
    bias = np.zeros(out_channels) if b is None else b.copy()
    for row, column in np.ndindex(*w.shape[:2]):
        out = weight_output_channel((row, column), w.shape, transpose, groups)
        source = row if transpose else (row // (out_channels // groups)) * w.shape[1] + column
        folded[row, column] *= scale[source]
        if shift[source] != 0.0:
            bias[out] += shift[source] * w[row, column].sum()
    return folded, bias
