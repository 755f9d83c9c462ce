# SPDX-License-Identifier: BSD-3-Clause
"""Compare any convolution + batch normalisation against a float64 reference.

    >>> import numpy as np
    >>> from pyconvbn import nn, testing
    >>> conv, bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8).eval()
    >>> x = np.ones((1, 3, 8, 8), np.float32)
    >>> testing.assert_matches_reference(bn(conv(x)), x, conv, bn)  # or your own fused kernel

The references (`reference_*`) are plain NumPy in float64, independent of the C extension, slow and
meant to be read. `conv` and `bn` may be modules of `pyconvbn.nn`, of `torch.nn`, or any object
with the same attributes. Tolerances come from an error model, never from a hand-picked number.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._reference import (
    Float64Array,
    IntOrSeq,
    as_float64,
    as_tuple,
    bn_scale_shift,
    optional_float64,
    reference_batch_norm,
    reference_batch_norm_stats,
    reference_conv,
    reference_conv_transpose,
    reference_fold_bn_conv,
    reference_fold_conv_bn,
    reference_fold_linear_bn,
    reference_linear,
)
from ._reference_ops import (
    reference_activation,
    reference_adaptive_avg_pool,
    reference_avg_pool,
    reference_flatten,
    reference_gelu,
    reference_hardswish,
    reference_hardtanh,
    reference_interpolate,
    reference_leaky_relu,
    reference_max_pool,
    reference_pad,
    reference_relu,
    reference_relu6,
    reference_sigmoid,
    reference_silu,
    reference_softmax,
)

__all__ = [
    "Precision",
    "assert_matches_reference",
    "assert_within",
    "batch_norm_error_model",
    "error_model",
    "precision_of",
    "reference_activation",
    "reference_adaptive_avg_pool",
    "reference_avg_pool",
    "reference_batch_norm",
    "reference_batch_norm_stats",
    "reference_conv",
    "reference_conv_bn",
    "reference_conv_transpose",
    "reference_flatten",
    "reference_fold_bn_conv",
    "reference_fold_conv_bn",
    "reference_fold_linear_bn",
    "reference_gelu",
    "reference_hardswish",
    "reference_hardtanh",
    "reference_interpolate",
    "reference_leaky_relu",
    "reference_linear",
    "reference_max_pool",
    "reference_module",
    "reference_pad",
    "reference_relu",
    "reference_relu6",
    "reference_sigmoid",
    "reference_silu",
    "reference_softmax",
    "sum_error_model",
    "ulps",
]

Activation = str | tuple[str, float] | None


class Precision(NamedTuple):
    """What the error model needs to know of a floating-point type."""

    eps: float  # distance from 1 to the next larger number
    max: float  # largest finite number
    flush: float  # below this an arithmetic unit may return zero
    smallest: float  # smallest subnormal


def precision_of(dtype: Any) -> Precision:
    """`Precision` of a NumPy float dtype, or of bfloat16 (ml_dtypes or torch).

    float32 and float64 kernels may flush subnormal results to zero, float16 ones never do.
    Raises `TypeError` for anything that is not a floating-point type.
    """
    name = str(dtype)
    if name.removeprefix("torch.") == "bfloat16":
        return Precision(2.0**-7, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133)
    resolved = np.dtype(name.removeprefix("torch.") if name.startswith("torch.") else dtype)
    if resolved.kind != "f":
        raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
    info = np.finfo(resolved)
    smallest = float(info.smallest_subnormal)
    flush = smallest if resolved == np.float16 else float(info.tiny)
    return Precision(float(info.eps), float(info.max), flush, smallest)


# -- the reference of whole modules ------------------------------------------------------------


class _Layer(NamedTuple):
    """A convolution or linear layer in float64, read from a module by its attributes."""

    weight: Float64Array
    bias: Float64Array | None
    stride: IntOrSeq
    padding: Any  # ints, 'same' or 'valid'
    padding_mode: str
    dilation: IntOrSeq
    groups: int
    transposed: bool
    output_padding: IntOrSeq

    @property
    def nd(self) -> int:
        """Spatial axes; 0 for a linear layer."""
        return int(self.weight.ndim) - 2

    @property
    def channel_axis(self) -> int:
        """Of the output, counted from the end so that unbatched input is served too."""
        return -1 - self.nd

    def __call__(self, x: Any) -> Float64Array:
        if self.nd == 0:
            return reference_linear(x, self.weight, self.bias)
        if self.transposed:
            return reference_conv_transpose(
                x, self.weight, self.bias, self.stride, self.padding, self.output_padding,
                self.groups, self.dilation,
            )
        return reference_conv(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            padding_mode=self.padding_mode,
        )

    def sum_of_magnitudes(self, x: Any) -> Float64Array:
        """The same layer over |x| and |W|, without bias: what rounding errors are relative to."""
        magnitudes = self._replace(weight=np.abs(self.weight), bias=None)
        return magnitudes(np.abs(as_float64(x, "x")))

    def terms(self) -> int:
        """Products added up for one output element."""
        if self.nd == 0:
            return int(self.weight.shape[1])
        kernel = self.weight.shape[2:]
        if not self.transposed:
            return int(self.weight.shape[1]) * math.prod(kernel)
        strides = as_tuple(self.stride, self.nd, "stride")
        dils = as_tuple(self.dilation, self.nd, "dilation")
        # One output element meets only the taps whose position is congruent modulo the stride.
        taps = [-(-k // (s // math.gcd(s, d))) for k, s, d in zip(kernel, strides, dils)]
        return int(self.weight.shape[0] // self.groups * math.prod(taps))


def _read_layer(conv: Any, x: Any, output_size: IntOrSeq | None) -> _Layer:
    transposed = bool(getattr(conv, "transposed", False))
    layer = _Layer(
        as_float64(conv.weight, "conv.weight"),
        optional_float64(conv.bias, "conv.bias"),
        getattr(conv, "stride", 1),
        getattr(conv, "padding", 0),
        getattr(conv, "padding_mode", "zeros"),
        getattr(conv, "dilation", 1),
        getattr(conv, "groups", 1),
        transposed,
        getattr(conv, "output_padding", 0),
    )
    if output_size is None:
        return layer
    if not transposed:
        raise ValueError("output_size: only a transposed convolution takes it")
    sizes = (output_size,) if isinstance(output_size, int) else tuple(output_size)[-layer.nd :]
    wanted = as_tuple(sizes, layer.nd, "output_size")
    shortest = layer._replace(output_padding=0)(x).shape[-layer.nd :]
    return layer._replace(output_padding=tuple(w - s for w, s in zip(wanted, shortest)))


class _Norm(NamedTuple):
    weight: Float64Array | None
    bias: Float64Array | None
    running_mean: Float64Array | None
    running_var: Float64Array | None
    eps: float
    training: bool


def _read_norm(bn: Any) -> _Norm:
    fields = ("weight", "bias", "running_mean", "running_var")
    if isinstance(bn, tuple) and not hasattr(bn, "running_mean"):
        values, eps, training = bn[:4], bn[4], False
    else:
        values = tuple(getattr(bn, field) for field in fields)
        eps, training = bn.eps, bool(getattr(bn, "training", False))
    weight, bias, mean, var = (
        optional_float64(value, f"bn.{name}") for name, value in zip(fields, values)
    )
    return _Norm(weight, bias, mean, var, float(eps), training)


def _batch_statistics(norm: _Norm, y: Float64Array, axis: int) -> _Norm:
    """`norm` with the statistics that it will use on `y`: its own, or those of the batch."""
    if not norm.training and not (norm.running_mean is None and norm.running_var is None):
        return norm
    others = tuple(a for a in range(y.ndim) if a != axis % y.ndim)
    return norm._replace(running_mean=y.mean(axis=others), running_var=y.var(axis=others))


def _norm_axis(layer: _Layer, y: Float64Array) -> int:
    """BN's channel axis. It is axis 1, also for a linear layer; unbatched convs have axis 0."""
    return 1 if layer.nd == 0 else y.ndim + layer.channel_axis


def reference_conv_bn(
    x: Any,
    conv: Any,
    bn: Any | None = None,
    *,
    output_size: IntOrSeq | None = None,
    residual: Any | None = None,
    activation: Activation = None,
) -> Float64Array:
    """`activation(bn(conv(x)) + residual)` in float64.

    `conv` is a Conv, ConvTranspose or Linear module, `bn` a BatchNorm module, the tuple
    `(weight, bias, running_mean, running_var, eps)` or None. A `bn` in training, or without
    running statistics, uses those of the batch; nothing is updated. Unbatched input of a
    convolution is normalised along its channels, axis 0.

    Raises `TypeError` for arrays that are not floating point, `ValueError` for sizes that do not
    fit.

    >>> from types import SimpleNamespace
    >>> conv = SimpleNamespace(weight=np.full((1, 1, 1), 3.0), bias=None)
    >>> one = np.ones(1)
    >>> reference_conv_bn(np.array([[[1.0, 2.0]]]), conv, (one, one, one, 4 * one, 0.0))
    array([[[2. , 3.5]]])
    """
    layer = _read_layer(conv, x, output_size)
    y = layer(x)
    if bn is not None:
        norm = _read_norm(bn)
        y = reference_batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training,
            eps=norm.eps, channel_axis=_norm_axis(layer, y),
        )
    if residual is not None:
        y = y + as_float64(residual, "residual")
    return reference_activation(y, activation)[0]


def reference_module(module: Any, x: Any) -> Float64Array:
    """Reference of one Conv, ConvTranspose, Linear or BatchNorm module applied to `x`."""
    if hasattr(module, "running_mean"):
        norm = _read_norm(module)
        return reference_batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training,
            eps=norm.eps,
        )
    return reference_conv_bn(x, module)


# -- tolerances --------------------------------------------------------------------------------


def sum_error_model(
    reference: Any, magnitudes: Any, terms: int, dtype: Any, *, factor: float = 4.0
) -> Float64Array:
    """Tolerance of a sum of `terms` numbers whose magnitudes add up to `magnitudes`.

    `factor * eps * (sqrt(terms) * magnitudes + |reference|)`, plus what `dtype` cannot resolve or
    may flush to zero. With `terms=0` and `magnitudes=0.0`: an elementwise operation.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, section 2.8 (errors
    of a sum grow with the square root of its length).
    """
    precision = precision_of(dtype)
    expected = np.abs(np.asarray(reference, np.float64))
    with np.errstate(all="ignore"):
        spread = math.sqrt(terms) * np.asarray(magnitudes, np.float64)
        return factor * precision.eps * (spread + expected) + precision.flush


@np.errstate(all="ignore")
def batch_norm_error_model(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any | None = None,
    bias: Any | None = None,
    eps: float = 1e-5,
    *,
    dtype: Any = None,
    factor: float = 4.0,
) -> Float64Array:
    """Tolerance of batch normalisation by given statistics, for each element of `x` `[N, C, ...]`.

    `factor * eps_dtype * ((|x| + |mean|)*|s| + |beta| + |ref|)`; `dtype` defaults to that of `x`.
    """
    scale, _ = bn_scale_shift(running_mean, running_var, eps, weight, bias)
    ref = reference_batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    mean, beta = as_float64(running_mean, "running_mean"), optional_float64(bias, "bias")
    shape = [-1 if axis == 1 else 1 for axis in range(ref.ndim)]
    constant = np.abs(mean * scale) + (0.0 if beta is None else np.abs(beta))
    magnitudes = np.abs(as_float64(x, "x")) * np.abs(scale).reshape(shape) + constant.reshape(shape)
    return sum_error_model(ref, magnitudes, 1, x.dtype if dtype is None else dtype, factor=factor)


class _Expectation(NamedTuple):
    reference: Float64Array
    tolerance: Float64Array
    channel_axis: int
    gain: Float64Array | None  # gamma/sigma of each channel


@np.errstate(all="ignore")
def _expect(
    x: Any, layer: _Layer, norm: _Norm | None, residual: Any | None, activation: Activation,
    dtype: Any, factor: float,
) -> _Expectation:
    precision = precision_of(dtype)
    y = layer(x)
    bias = np.abs(layer.bias) if layer.bias is not None else np.zeros(y.shape[layer.channel_axis])
    bias = bias.reshape(-1, *[1] * layer.nd)
    axis = y.ndim + layer.channel_axis
    magnitudes = math.sqrt(layer.terms()) * layer.sum_of_magnitudes(x) + bias
    gain = None
    if norm is not None:
        axis = _norm_axis(layer, y)
        norm = _batch_statistics(norm, y, axis)
        gain, _ = bn_scale_shift(
            norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        y = reference_batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps,
            channel_axis=axis,
        )
        shape = [-1 if a == axis else 1 for a in range(y.ndim)]
        beta = np.zeros(1) if norm.bias is None else np.abs(norm.bias).reshape(shape)
        mean = np.abs(as_float64(norm.running_mean, "bn.running_mean")).reshape(shape)
        magnitudes = (magnitudes + mean) * np.abs(gain).reshape(shape) + beta
    tolerance = factor * precision.eps * (magnitudes + np.abs(y))
    if residual is not None:
        added = as_float64(residual, "residual")
        y = y + added
        tolerance = tolerance + factor * precision.eps * np.abs(added)
    y, slope = reference_activation(y, activation)
    tolerance = slope * tolerance + factor * precision.eps * np.abs(y) + precision.flush
    return _Expectation(y, tolerance, axis, gain)


def error_model(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    bn: Any | None = None,
    stride: IntOrSeq = 1,
    padding: IntOrSeq | str = 0,
    padding_mode: str = "zeros",
    dilation: IntOrSeq = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: IntOrSeq = 0,
    residual: Any | None = None,
    activation: Activation = None,
    dtype: Any = None,
    factor: float = 4.0,
) -> tuple[Float64Array, Float64Array]:
    """(reference, tolerance) of a convolution or linear layer, with BN if `bn` is given.

    Both have the shape of the output. `weight.ndim - 2` is the number of spatial axes, 0 means
    linear; `bn` is a module or `(weight, bias, running_mean, running_var, eps)`; `dtype` is that
    of the result under test and defaults to the weight's. The tolerance is

        factor * eps * (sqrt(K) * sum|w*x| * |s| + (|b| + |mean|) * |s| + |beta| + |ref|)

    with K products per output element and `s = gamma/sqrt(var + eps)`: rounding errors of K terms
    grow like sqrt(K), and folding or not folding BN only moves them around. A residual adds its
    own magnitude, an activation scales the tolerance by its largest slope.
    """
    layer = _Layer(
        as_float64(weight, "weight"), optional_float64(bias, "bias"), stride, padding, padding_mode,
        dilation, groups, transposed, output_padding,
    )
    norm = None if bn is None else _read_norm(bn)
    dtype = weight.dtype if dtype is None else dtype
    expected = _expect(x, layer, norm, residual, activation, dtype, factor)
    return expected.reference, expected.tolerance


# -- assertions --------------------------------------------------------------------------------


def ulps(actual: Any, reference: Any, dtype: Any) -> Float64Array:
    """Distance in units in the last place of `dtype` at `reference`."""
    precision = precision_of(dtype)
    got, ref = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    with np.errstate(all="ignore"):
        exponent = np.floor(np.log2(np.abs(ref)))
        spacing = np.where(np.isfinite(exponent), precision.eps * np.exp2(exponent), 0.0)
        return np.abs(got - ref) / np.maximum(spacing, precision.smallest)


def assert_within(
    actual: Any,
    reference: Any,
    tolerance: Any,
    *,
    channel_axis: int = 1,
    gain: NDArray[Any] | None = None,
) -> None:
    """Assert `|actual - reference| <= tolerance` elementwise, with equal NaN and infinities.

    A reference beyond the range of `actual`'s dtype demands the infinity of that sign. On failure
    the message names the worst channel along `channel_axis` and its index, both values, the error
    in ULPs and, if `gain` is given, gamma/sigma of that channel.

    >>> assert_within(np.float32([1.0]), np.array([1.0]), 1e-6, channel_axis=0)
    """
    dtype = actual.dtype
    precision = precision_of(dtype)
    got = as_float64(actual, "actual")
    ref = np.asarray(reference, np.float64)
    if got.shape != ref.shape:
        raise AssertionError(f"shape: expected {ref.shape}, got {got.shape}")
    if got.size == 0:
        return
    with np.errstate(all="ignore"):
        error = np.abs(got - ref)
        limit = np.broadcast_to(np.asarray(tolerance, np.float64), ref.shape)
        rounds_to_infinity = np.abs(ref) - limit > precision.max
        near_overflow = np.abs(ref) + limit > precision.max
        overflow_fits = np.isinf(got) & (np.sign(got) == np.sign(ref)) & near_overflow
        good = np.where(np.isfinite(ref) & ~rounds_to_infinity, error <= limit, got == ref)
        good |= overflow_fits | (np.isnan(got) & np.isnan(ref))
        if good.all():
            return
        badness = np.where(good, -1.0, np.where(np.isfinite(error), error / limit, np.inf))
    badness = np.where(np.isnan(badness), np.inf, badness)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(badness), badness.shape))
    lines = [
        f"{np.count_nonzero(~good)} of {good.size} elements are outside the tolerance",
    ]
    where = f"index {index}"
    if got.ndim:
        axis = channel_axis if -got.ndim <= channel_axis < got.ndim else got.ndim - 1
        channel = index[axis]
        where = f"channel {channel} of {got.shape[axis]}, {where}"
        if gain is not None:
            factor = gain[channel if gain.size > 1 else 0]
            where += f", gamma/sigma = {factor:.6g}"
    lines.append(f"worst: {where}")
    lines.append(f"  actual    {got[index]!r:<24} ({dtype})")
    lines.append(f"  reference {ref[index]!r} (float64)")
    distance = ulps(got[index], ref[index], dtype)
    lines.append(f"  error     {error[index]:.4g}, {distance:.4g} ULPs; allowed {limit[index]:.4g}")
    raise AssertionError("\n".join(lines))


def assert_matches_reference(
    actual: Any,
    x: Any,
    conv: Any,
    bn: Any | None = None,
    *,
    factor: float = 4.0,
    output_size: IntOrSeq | None = None,
    residual: Any | None = None,
    activation: Activation = None,
) -> None:
    """Assert that `actual` is `activation(bn(conv(x)) + residual)` up to rounding.

    `actual` and `x` are arrays or CPU tensors of any library, `conv` and `bn` modules as in
    `reference_conv_bn`. The tolerance is that of `error_model` with the eps of `actual`'s dtype.

    Raises `AssertionError` naming the worst channel, both values, ULPs and gamma/sigma of that
    channel; `TypeError` if `actual` is not a floating-point array.
    """
    layer = _read_layer(conv, x, output_size)
    norm = None if bn is None else _read_norm(bn)
    if not hasattr(actual, "dtype"):
        raise TypeError(f"actual: expected an array, got {type(actual).__name__}")
    expected = _expect(x, layer, norm, residual, activation, actual.dtype, factor)
    assert_within(
        actual, expected.reference, expected.tolerance, channel_axis=expected.channel_axis,
        gain=expected.gain,
    )
