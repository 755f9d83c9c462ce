# SPDX-License-Identifier: BSD-3-Clause
"""The fused operator: bn(conv(x)) of an eval-mode BatchNorm as ONE convolution, parameters read at each call.

Source: Yang et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core, functional
from ._modules import read_bn, read_conv, transposed_output_padding
from .errors import FoldError

__all__ = ["efficient_conv_bn_eval", "efficient_conv_bn_eval_decomposed"]

_Array = NDArray[Any]
_Bn = tuple[Any, Any, Any, Any, float]

# callable -> (spatial axes, transposed)
_CONV_CALLABLES: dict[Any, tuple[int, bool]] = {
    functional.linear: (0, False),
    functional.conv1d: (1, False),
    functional.conv2d: (2, False),
    functional.conv3d: (3, False),
    functional.conv_transpose1d: (1, True),
    functional.conv_transpose2d: (2, True),
    functional.conv_transpose3d: (3, True),
}
_REMAINING = {
    False: ("stride", "padding", "dilation", "groups"),
    True: ("stride", "padding", "output_padding", "groups", "dilation"),
}


def _linear_bn(x: Any, weight: Any, bias: Any | None, bn: _Bn, out: _Array | None) -> _Array:
    shape = tuple(np.shape(x)) if not hasattr(x, "shape") else tuple(x.shape)
    if len(shape) < 2:
        raise ValueError(
            f"x: expected at least 2 axes (batch, features) for Linear + BatchNorm, got {len(shape)}"
        )
    features = len(bn[2])
    if len(shape) == 2:
        if features != weight.shape[0]:
            raise ValueError(
                f"bn: expected statistics of length {weight.shape[0]} (the linear layer's out_features), got {features}"
            )
    elif not (features == 1 and shape[1] == 1):
        # BatchNorm's channel axis is axis 1, which here is not the feature axis, whatever the sizes are.
        raise FoldError(
            f"Linear output has {len(shape)} axes: BatchNorm normalises axis 1, not the features, so the pair "
            "is not one linear operator; compute bn(linear(x))",
            "LINEAR_ND",
        )
    return _core.conv_bn(0, x, weight, bias, bn, (), (), "zeros", (), 1, False, (), out)


def efficient_conv_bn_eval(
    bn: Any, conv: Any, x: Any, *, output_size: Sequence[int] | int | None = None, out: _Array | None = None
) -> _Array:
    """``bn(conv(x))`` for a BatchNorm in eval mode, computed as one convolution.

    The parameters are read at this call, so in-place updates between calls are seen. Fold coefficients are
    computed in float64 and rounded once: ``s = weight / sqrt(running_var + eps)``, ``W' = W * s``,
    ``b' = (b - running_mean) * s + bias``.

    Args:
        bn: BatchNorm1d/2d/3d or SyncBatchNorm module (``pyconvbn.nn`` or ``torch.nn``), in eval mode.
        conv: Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d module.
        x: ``(N, C, *spatial)``, for Linear ``(N, in_features)``; float16, float32 or float64, dtype of ``conv``.
        output_size: for transposed convolutions, as in ``torch.nn.ConvTranspose2d.forward``.
        out: array of exactly the result's shape and dtype to write into.

    Returns:
        ndarray of the shape and dtype of ``conv(x)``.

    Raises:
        FoldError: ``bn`` is in training mode (``BN_TRAINING``), has no running statistics (``NO_RUNNING_STATS``),
            or follows a Linear layer whose output is not 2-D (``LINEAR_ND``).
        ValueError: unbatched input, lengths that differ, sizes that do not fit.
        TypeError: dtypes that differ, modules or arrays of the wrong kind.

    Example:
        >>> import numpy as np, pyconvbn
        >>> conv = pyconvbn.nn.Conv2d(3, 8, 3, padding=1)
        >>> bn = pyconvbn.nn.BatchNorm2d(8).eval()
        >>> pyconvbn.efficient_conv_bn_eval(bn, conv, np.zeros((2, 3, 5, 5), np.float32)).shape
        (2, 8, 5, 5)

    Source: arXiv 2305.11624, section 3 (the "Deploy"-accurate, "Eval"-trainable form).
    """
    parameters = read_bn(bn)
    record = read_conv(conv)
    if record.nd == 0:
        if output_size is not None:
            raise ValueError("output_size: expected None for a Linear layer")
        return _linear_bn(x, record.weight, record.bias, parameters, out)
    output_padding = record.output_padding
    if output_size is not None:
        if not record.transposed:
            raise ValueError("output_size: expected None for a convolution that is not transposed")
        if x.ndim != record.nd + 2:
            raise ValueError(f"x: expected {record.nd + 2} axes (batched), got {x.ndim}")
        output_padding = transposed_output_padding(
            record, tuple(record.weight.shape[2:]), tuple(x.shape[2:]), output_size
        )
    return _core.conv_bn(
        record.nd, x, record.weight, record.bias, parameters, record.stride, record.padding,
        record.padding_mode, record.dilation, record.groups, record.transposed,
        output_padding if record.transposed else 0, out,
    )


def efficient_conv_bn_eval_decomposed(
    bn_weight: Any | None, bn_bias: Any | None, bn_running_mean: Any, bn_running_var: Any, bn_eps: float,
    conv: Any, conv_weight: Any, conv_bias: Any | None, x: Any, conv_remaining_args: Sequence[Any] = (),
    *, out: _Array | None = None,
) -> _Array:
    """The same for functional code: ``batch_norm(conv(x, W, b, *conv_remaining_args), ...)`` in one convolution.

    Args:
        bn_weight, bn_bias, bn_running_mean, bn_running_var, bn_eps: BatchNorm's parameters in this order; the
            first two may be None (1 and 0). 1-D of length out_channels.
        conv: ``pyconvbn.functional.linear``, ``conv1d/2d/3d`` or ``conv_transpose1d/2d/3d``.
        conv_weight, conv_bias: of that callable; ``conv_bias`` may be None.
        x: input, as for :func:`efficient_conv_bn_eval`.
        conv_remaining_args: what follows (x, weight, bias) in the call, in the callable's own order.

    Raises:
        As :func:`efficient_conv_bn_eval`; TypeError when ``conv`` is another callable.

    Example:
        >>> import numpy as np, pyconvbn
        >>> from pyconvbn import functional as F
        >>> W, one = np.ones((4, 3, 1, 1), np.float32), np.ones(4, np.float32)
        >>> pyconvbn.efficient_conv_bn_eval_decomposed(
        ...     one, None, one, one, 1e-5, F.conv2d, W, None, np.ones((1, 3, 2, 2), np.float32), (2,)).shape
        (1, 4, 1, 1)

    Source: arXiv 2305.11624.
    """
    try:
        nd, transposed = _CONV_CALLABLES[conv]
    except (KeyError, TypeError):
        known = ", ".join(function.__name__ for function in _CONV_CALLABLES)
        raise TypeError(f"conv: expected one of pyconvbn.functional's {known}, got {conv!r}") from None
    for name, value in (("bn_running_mean", bn_running_mean), ("bn_running_var", bn_running_var)):
        if value is None:
            raise FoldError(f"{name} is None: a BatchNorm without running statistics cannot be fused",
                            "NO_RUNNING_STATS")
    bn: _Bn = (bn_weight, bn_bias, bn_running_mean, bn_running_var, bn_eps)
    names = _REMAINING[transposed] if nd else ()
    rest = tuple(conv_remaining_args)
    if len(rest) > len(names):
        raise ValueError(
            f"conv_remaining_args: expected at most {len(names)} entries {names} for {conv.__name__}, got {len(rest)}"
        )
    if nd == 0:
        return _linear_bn(x, conv_weight, conv_bias, bn, out)
    arguments: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    arguments.update(zip(names, rest))
    return _core.conv_bn(
        nd, x, conv_weight, conv_bias, bn, arguments["stride"], arguments["padding"], "zeros",
        arguments["dilation"], arguments["groups"], transposed, arguments["output_padding"], out,
    )
