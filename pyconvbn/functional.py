# SPDX-License-Identifier: BSD-3-Clause
"""Operators over NumPy arrays with the names, argument orders and meanings of ``torch.nn.functional``.

Common to all: inputs are float16, float32 or float64 ndarrays of any strides (or CPU DLPack exporters, or CPU
torch tensors) and are never written; results are new ndarrays of the input's dtype, or ``out``, which must have
exactly the result's shape and dtype. float16 is computed in float32 and rounded once. Every function raises
TypeError for a wrong kind of array or dtype and ValueError for sizes that do not fit, naming the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from . import _core

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "add", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "batch_norm", "cat", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "dropout", "flatten", "gelu", "hardswish", "hardtanh", "interpolate", "leaky_relu",
    "linear", "max_pool1d", "max_pool2d", "max_pool3d", "mul", "pad", "relu", "relu6", "sigmoid", "silu",
    "softmax",
]

_Array = NDArray[Any]
_Ints = int | Sequence[int]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _operator(function: _Function) -> _Function:
    """Makes the function an Operator: the graph knows its schema, and a tracer sees calls with its proxies."""
    return cast(_Function, _core.Operator(function, f"functional.{function.__name__}"))


# -- convolution family ------------------------------------------------------------------------------------------
@_operator
def conv1d(
    input: Any, weight: Any, bias: Any | None = None, stride: _Ints = 1, padding: _Ints | str = 0,
    dilation: _Ints = 1, groups: int = 1, *, out: _Array | None = None,
) -> _Array:
    """1-D convolution (cross-correlation): ``(N, C, L)`` or ``(C, L)`` with weight ``(out, C/groups, k)``.

    ``padding``: int, sequence, ``'valid'`` or ``'same'`` (stride 1; an odd total puts the extra one on the right).
    Output length ``(L + 2*padding - dilation*(k - 1) - 1)//stride + 1``.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.conv1d(np.arange(4.).reshape(1, 1, 4), np.ones((1, 1, 2)))
        array([[[1., 3., 5.]]])
    """
    return _core.conv(1, input, weight, bias, stride, padding, dilation, groups, out)


@_operator
def conv2d(
    input: Any, weight: Any, bias: Any | None = None, stride: _Ints = 1, padding: _Ints | str = 0,
    dilation: _Ints = 1, groups: int = 1, *, out: _Array | None = None,
) -> _Array:
    """2-D convolution: ``(N, C, H, W)`` or ``(C, H, W)`` with weight ``(out, C/groups, kh, kw)``. See :func:`conv1d`.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)), padding=1)[0, 0]
        array([[4., 6., 4.],
               [6., 9., 6.],
               [4., 6., 4.]])
    """
    return _core.conv(2, input, weight, bias, stride, padding, dilation, groups, out)


@_operator
def conv3d(
    input: Any, weight: Any, bias: Any | None = None, stride: _Ints = 1, padding: _Ints | str = 0,
    dilation: _Ints = 1, groups: int = 1, *, out: _Array | None = None,
) -> _Array:
    """3-D convolution: ``(N, C, D, H, W)`` or ``(C, D, H, W)``, weight ``(out, C/groups, kd, kh, kw)``. See :func:`conv1d`.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.conv3d(np.ones((1, 1, 2, 2, 2)), np.ones((1, 1, 2, 2, 2))).ravel()
        array([8.])
    """
    return _core.conv(3, input, weight, bias, stride, padding, dilation, groups, out)


@_operator
def conv_transpose1d(
    input: Any, weight: Any, bias: Any | None = None, stride: _Ints = 1, padding: _Ints = 0,
    output_padding: _Ints = 0, groups: int = 1, dilation: _Ints = 1, *, out: _Array | None = None,
) -> _Array:
    """1-D transposed convolution: ``(N, C, L)`` or ``(C, L)`` with weight ``(C, out/groups, k)``.

    ``output_padding < max(stride, dilation)``. Output length
    ``(L - 1)*stride - 2*padding + dilation*(k - 1) + output_padding + 1``.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.conv_transpose1d(np.array([[[1., 2.]]]), np.ones((1, 1, 2)), stride=2)
        array([[[1., 1., 2., 2.]]])
    """
    return _core.conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation, out
    )


@_operator
def conv_transpose2d(
    input: Any, weight: Any, bias: Any | None = None, stride: _Ints = 1, padding: _Ints = 0,
    output_padding: _Ints = 0, groups: int = 1, dilation: _Ints = 1, *, out: _Array | None = None,
) -> _Array:
    """2-D transposed convolution, weight ``(C, out/groups, kh, kw)``. See :func:`conv_transpose1d`.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.conv_transpose2d(np.ones((1, 2, 4, 4)), np.ones((2, 3, 2, 2)), stride=2).shape
        (1, 3, 8, 8)
    """
    return _core.conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation, out
    )


@_operator
def conv_transpose3d(
    input: Any, weight: Any, bias: Any | None = None, stride: _Ints = 1, padding: _Ints = 0,
    output_padding: _Ints = 0, groups: int = 1, dilation: _Ints = 1, *, out: _Array | None = None,
) -> _Array:
    """3-D transposed convolution, weight ``(C, out/groups, kd, kh, kw)``. See :func:`conv_transpose1d`.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.conv_transpose3d(np.ones((1, 1, 2, 2, 2)), np.ones((1, 1, 3, 3, 3))).shape
        (1, 1, 4, 4, 4)
    """
    return _core.conv_transpose(
        3, input, weight, bias, stride, padding, output_padding, groups, dilation, out
    )


@_operator
def linear(input: Any, weight: Any, bias: Any | None = None, *, out: _Array | None = None) -> _Array:
    """``input @ weight.T + bias``: ``(*, in)`` with weight ``(out, in)`` gives ``(*, out)``.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.linear(np.array([[1., 2.]]), np.array([[3., 4.]]), np.array([0.5]))
        array([[11.5]])
    """
    return _core.linear(input, weight, bias, out)


@_operator
def batch_norm(
    input: Any, running_mean: Any | None, running_var: Any | None, weight: Any | None = None,
    bias: Any | None = None, training: bool = False, momentum: float | None = 0.1, eps: float = 1e-5,
    *, out: _Array | None = None,
) -> _Array:
    """``(input - mean) / sqrt(var + eps) * weight + bias`` per channel (axis 1).

    Evaluation uses the running statistics. ``training=True`` uses those of the batch (biased variance) and, when
    running arrays are given, updates them in place, ``running = (1 - momentum)*running + momentum*batch``, with the
    unbiased variance. The cumulative average that ``momentum=None`` means needs the number of batches, which a
    module counts: ``nn.BatchNorm1d/2d/3d`` resolves it before calling.

    Args:
        input: ``(N, C, *)``. running_mean, running_var, weight, bias: ``(C,)`` of any float dtype or None.

    Raises:
        ValueError: lengths that differ, statistics missing in evaluation, read-only running arrays in training,
            one value per channel in training, ``momentum=None`` in training with running arrays.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.batch_norm(np.array([[3.], [5.]]), np.array([1.]), np.array([4.]), eps=0.0)
        array([[1.],
               [2.]])

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167.
    """
    if momentum is None:
        if training and running_mean is not None:
            raise ValueError(
                "momentum: expected a float, got None: the cumulative average needs the number of batches, which "
                "nn.BatchNorm modules count"
            )
        momentum = 0.0
    return _core.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, out
    )


# -- activations -------------------------------------------------------------------------------------------------
@_operator
def relu(input: Any, *, out: _Array | None = None) -> _Array:
    """``max(input, 0)``; NaN stays NaN."""
    return _core.unary("relu", input, 0.0, 0.0, out)


@_operator
def relu6(input: Any, *, out: _Array | None = None) -> _Array:
    """``min(max(input, 0), 6)``."""
    return _core.unary("relu6", input, 0.0, 0.0, out)


@_operator
def leaky_relu(input: Any, negative_slope: float = 0.01, *, out: _Array | None = None) -> _Array:
    """``input`` where it is >= 0, else ``negative_slope * input``."""
    return _core.unary("leaky_relu", input, negative_slope, 0.0, out)


@_operator
def hardtanh(
    input: Any, min_val: float = -1.0, max_val: float = 1.0, *, out: _Array | None = None
) -> _Array:
    """``input`` clamped to ``[min_val, max_val]``."""
    return _core.unary("hardtanh", input, min_val, max_val, out)


@_operator
def hardswish(input: Any, *, out: _Array | None = None) -> _Array:
    """``input * relu6(input + 3) / 6``. Source: Howard et al., MobileNetV3, arXiv 1905.02244."""
    return _core.unary("hardswish", input, 0.0, 0.0, out)


@_operator
def sigmoid(input: Any, *, out: _Array | None = None) -> _Array:
    """``1 / (1 + exp(-input))``."""
    return _core.unary("sigmoid", input, 0.0, 0.0, out)


@_operator
def silu(input: Any, *, out: _Array | None = None) -> _Array:
    """``input * sigmoid(input)``. Source: Elfwing et al., arXiv 1702.03118."""
    return _core.unary("silu", input, 0.0, 0.0, out)


@_operator
def gelu(input: Any, approximate: str = "none", *, out: _Array | None = None) -> _Array:
    """``input * Phi(input)``, Phi the normal distribution function; ``approximate='tanh'`` its tanh form.

    Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _core.unary("gelu" if approximate == "none" else "gelu_tanh", input, 0.0, 0.0, out)


@_operator
def softmax(input: Any, dim: int = -1, *, out: _Array | None = None) -> _Array:
    """``exp(input) / sum(exp(input))`` along ``dim``, computed stably."""
    return _core.softmax(input, dim, out)


@_operator
def add(input: Any, other: Any, *, alpha: float = 1.0, out: _Array | None = None) -> _Array:
    """``input + alpha * other`` with NumPy broadcasting; both of one float dtype."""
    return _core.binary("add", input, other, alpha, out)


@_operator
def mul(input: Any, other: Any, *, out: _Array | None = None) -> _Array:
    """``input * other`` with NumPy broadcasting; both of one float dtype."""
    return _core.binary("mul", input, other, 1.0, out)


# -- pooling -----------------------------------------------------------------------------------------------------
@_operator
def max_pool1d(
    input: Any, kernel_size: _Ints, stride: _Ints | None = None, padding: _Ints = 0, dilation: _Ints = 1,
    ceil_mode: bool = False, *, out: _Array | None = None,
) -> _Array:
    """Largest value of each window of ``(N, C, L)``; padding counts as -inf, NaN wins. ``stride`` None: kernel_size."""
    return _core.max_pool(1, input, kernel_size, stride, padding, dilation, ceil_mode, out)


@_operator
def max_pool2d(
    input: Any, kernel_size: _Ints, stride: _Ints | None = None, padding: _Ints = 0, dilation: _Ints = 1,
    ceil_mode: bool = False, *, out: _Array | None = None,
) -> _Array:
    """As :func:`max_pool1d` for ``(N, C, H, W)``."""
    return _core.max_pool(2, input, kernel_size, stride, padding, dilation, ceil_mode, out)


@_operator
def max_pool3d(
    input: Any, kernel_size: _Ints, stride: _Ints | None = None, padding: _Ints = 0, dilation: _Ints = 1,
    ceil_mode: bool = False, *, out: _Array | None = None,
) -> _Array:
    """As :func:`max_pool1d` for ``(N, C, D, H, W)``."""
    return _core.max_pool(3, input, kernel_size, stride, padding, dilation, ceil_mode, out)


@_operator
def avg_pool1d(
    input: Any, kernel_size: _Ints, stride: _Ints | None = None, padding: _Ints = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, *, out: _Array | None = None,
) -> _Array:
    """Mean of each window of ``(N, C, L)``; ``count_include_pad`` counts the zero padding in the divisor."""
    return _core.avg_pool(1, input, kernel_size, stride, padding, ceil_mode, count_include_pad, None, out)


@_operator
def avg_pool2d(
    input: Any, kernel_size: _Ints, stride: _Ints | None = None, padding: _Ints = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    *, out: _Array | None = None,
) -> _Array:
    """As :func:`avg_pool1d` for ``(N, C, H, W)``; ``divisor_override`` replaces the divisor."""
    return _core.avg_pool(
        2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, out
    )


@_operator
def avg_pool3d(
    input: Any, kernel_size: _Ints, stride: _Ints | None = None, padding: _Ints = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
    *, out: _Array | None = None,
) -> _Array:
    """As :func:`avg_pool2d` for ``(N, C, D, H, W)``."""
    return _core.avg_pool(
        3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, out
    )


@_operator
def adaptive_avg_pool1d(input: Any, output_size: int, *, out: _Array | None = None) -> _Array:
    """Means over windows cut so that ``(N, C, L)`` becomes ``(N, C, output_size)``."""
    return _core.adaptive_avg_pool(1, input, output_size, out)


@_operator
def adaptive_avg_pool2d(
    input: Any, output_size: int | None | Sequence[int | None], *, out: _Array | None = None
) -> _Array:
    """As :func:`adaptive_avg_pool1d` for ``(N, C, H, W)``; None keeps an axis."""
    return _core.adaptive_avg_pool(2, input, output_size, out)


@_operator
def adaptive_avg_pool3d(
    input: Any, output_size: int | None | Sequence[int | None], *, out: _Array | None = None
) -> _Array:
    """As :func:`adaptive_avg_pool2d` for ``(N, C, D, H, W)``."""
    return _core.adaptive_avg_pool(3, input, output_size, out)


# -- shape -------------------------------------------------------------------------------------------------------
@_operator
def pad(
    input: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None,
    *, out: _Array | None = None,
) -> _Array:
    """Pads the last ``len(pad)/2`` axes: ``(left, right)`` of the last axis first, then of the one before it, ...

    ``mode``: ``'constant'`` (with ``value``, default 0; negative amounts crop), ``'reflect'``, ``'replicate'`` or
    ``'circular'``.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.pad(np.arange(3.).reshape(1, 1, 3), (1, 2), mode="reflect")
        array([[[1., 0., 1., 2., 1., 0.]]])
    """
    return _core.pad(input, pad, mode, 0.0 if value is None else value, out)


@_operator
def flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> _Array:
    """Joins the axes ``start_dim`` to ``end_dim`` into one; a view of ``input`` where its strides allow it."""
    array = _core.as_array(input, "input")
    if array.ndim == 0:
        return array.reshape(1)
    bounds = []
    for name, value in (("start_dim", start_dim), ("end_dim", end_dim)):
        if not -array.ndim <= value < array.ndim:
            raise ValueError(f"{name}: expected between {-array.ndim} and {array.ndim - 1}, got {value}")
        bounds.append(value % array.ndim)
    first, last = bounds
    if first > last:
        raise ValueError(f"start_dim: expected at most end_dim ({end_dim}), got {start_dim}")
    joined = int(np.prod(array.shape[first : last + 1], dtype=np.int64))
    return array.reshape(*array.shape[:first], joined, *array.shape[last + 1 :])


@_operator
def cat(tensors: Sequence[Any], dim: int = 0, *, out: _Array | None = None) -> _Array:
    """Joins arrays of one float dtype along the existing axis ``dim``.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.cat([np.zeros((1, 2)), np.ones((1, 1))], dim=1)
        array([[0., 0., 1.]])
    """
    arrays = [_core.as_array(tensor, f"tensors[{i}]") for i, tensor in enumerate(tensors)]
    if not arrays:
        raise ValueError("tensors: expected at least one array, got none")
    for i, array in enumerate(arrays):
        if array.dtype != arrays[0].dtype:
            raise TypeError(f"tensors[{i}]: expected dtype {arrays[0].dtype} as tensors[0], got {array.dtype}")
    if not -arrays[0].ndim <= dim < arrays[0].ndim:
        raise ValueError(f"dim: expected between {-arrays[0].ndim} and {arrays[0].ndim - 1}, got {dim}")
    if out is None:
        return np.concatenate(arrays, axis=dim)
    result = np.concatenate(arrays, axis=dim)  # first, so that an overlapping `out` is safe
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(f"out: expected shape {result.shape} of {result.dtype}, got {out.shape} of {out.dtype}")
    out[...] = result
    return out


@_operator
def dropout(input: Any, p: float = 0.5, training: bool = False) -> _Array:
    """Identity in evaluation (the default here, unlike torch: this package is for inference).

    ``training=True`` zeroes each element with probability ``p`` and scales the others by ``1/(1 - p)``.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected between 0 and 1, got {p}")
    array = _core.as_array(input, "input")
    if not training or p == 0.0:
        return array
    kept = np.random.default_rng().random(array.shape) >= p
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    return np.where(kept, array * array.dtype.type(scale), array.dtype.type(0))


def _source_positions(size: int, wanted: int, scale: float | None, align_corners: bool) -> _Array:
    """Input coordinate of each output pixel centre, as torch.nn.functional.interpolate defines it."""
    index = np.arange(wanted, dtype=np.float64)
    if align_corners:
        return index * ((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
    ratio = 1.0 / scale if scale is not None else size / wanted
    return np.maximum((index + 0.5) * ratio - 0.5, 0.0)


@_operator
def interpolate(
    input: Any, size: _Ints | None = None, scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest", align_corners: bool | None = None,
) -> _Array:
    """Resizes the spatial axes of ``(N, C, *spatial)``.

    Args:
        size: output sizes, or ``scale_factor``: output is ``floor(size * scale_factor)``; exactly one of the two.
        mode: ``'nearest'`` (1-D to 3-D) or ``'bilinear'`` (2-D).
        align_corners: bilinear only; True makes the corner pixels' centres coincide.

    Example:
        >>> import numpy as np; from pyconvbn import functional as F
        >>> F.interpolate(np.array([[[1., 2.]]]), scale_factor=2)
        array([[[1., 1., 2., 2.]]])
    """
    array = _core.as_array(input, "input")
    nd = array.ndim - 2
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"mode: expected 'nearest' or 'bilinear', got {mode!r}")
    if not 1 <= nd <= 3 or (mode == "bilinear" and nd != 2):
        expected = "4" if mode == "bilinear" else "3 to 5"
        raise ValueError(f"input: expected {expected} axes for mode {mode!r}, got {array.ndim}")
    if mode == "nearest" and align_corners is not None:
        raise ValueError("align_corners: expected None for mode 'nearest'")
    if (size is None) == (scale_factor is None):
        raise ValueError("size, scale_factor: expected exactly one of the two")
    scales: list[float | None] = [None] * nd
    if size is not None:
        sizes = [size] * nd if isinstance(size, int) else [int(v) for v in size]
        if len(sizes) != nd:
            raise ValueError(f"size: expected {nd} entries, got {len(sizes)}")
    else:
        scales: Any = scale_factor
        factors = [float(scales)] * nd if np.isscalar(scales) else [float(v) for v in scales]
        if len(factors) != nd:
            raise ValueError(f"scale_factor: expected {nd} entries, got {len(factors)}")
        sizes = [int(np.floor(array.shape[2 + i] * factors[i])) for i in range(nd)]
        scales = list(factors)
    for i, wanted in enumerate(sizes):
        if wanted < 1 or array.shape[2 + i] < 1:
            raise ValueError(f"size: expected at least 1 on spatial axis {i}, got {wanted} from {array.shape[2 + i]}")
    if mode == "nearest":
        for i, wanted in enumerate(sizes):
            have, scale = array.shape[2 + i], scales[i]
            ratio = np.float32(1.0 / scale) if scale is not None else np.float32(have) / np.float32(wanted)
            index = np.minimum((np.arange(wanted, dtype=np.float32) * ratio).astype(np.int64), have - 1)
            array = np.take(array, index, axis=2 + i)
        return array
    result = array if array.dtype == np.float64 else array.astype(np.float32)
    for i, wanted in enumerate(sizes):
        have = array.shape[2 + i]
        position = _source_positions(have, wanted, scales[i], bool(align_corners))
        low = np.minimum(position.astype(np.int64), have - 1)
        high = np.minimum(low + 1, have - 1)
        shape = [1] * array.ndim
        shape[2 + i] = wanted
        weight = (position - low).astype(result.dtype).reshape(shape)
        result = np.take(result, low, axis=2 + i) * (1 - weight) + np.take(result, high, axis=2 + i) * weight
    return result.astype(array.dtype, copy=False)
