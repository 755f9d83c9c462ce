# SPDX-License-Identifier: BSD-3-Clause
"""The fused operator: bn(conv(x)) of an eval-mode BatchNorm as ONE convolution, parameters read at each call.

Source: Yang et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from . import _core, counters, functional
from ._modules import read_bn, read_conv, transposed_output_padding
from .errors import FoldError

__all__ = ["efficient_conv_bn_eval", "efficient_conv_bn_eval_decomposed"]

_Array = NDArray[Any]
_Bn = tuple[Any, Any, Any, Any, float]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _operator(row: str) -> Callable[[_Function], _Function]:
    return lambda function: cast(_Function, _core.Operator(function, row))


class _ConvForm(NamedTuple):
    """How a convolution callable takes what follows (x, weight, bias)."""

    nd: int | None  # spatial axes; 0 linear; None: those of the weight
    transposed: bool
    remaining: tuple[str, ...]


_PLAIN = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
# by row of the op table
_CONV_FORMS: dict[str, _ConvForm] = {
    "functional.linear": _ConvForm(0, False, ()),
    "aten.linear.default": _ConvForm(0, False, ()),
    "aten.convolution.default": _ConvForm(
        None, False, ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    ),
}
for _nd in (1, 2, 3):
    _CONV_FORMS |= {
        f"functional.conv{_nd}d": _ConvForm(_nd, False, _PLAIN),
        f"aten.conv{_nd}d.default": _ConvForm(_nd, False, _PLAIN),
        f"aten.conv{_nd}d.padding": _ConvForm(_nd, False, _PLAIN),
        f"functional.conv_transpose{_nd}d": _ConvForm(_nd, True, _TRANSPOSED),
        f"aten.conv_transpose{_nd}d.{'default' if _nd == 1 else 'input'}": _ConvForm(_nd, True, _TRANSPOSED),
    }


def _conv_form(conv: Any) -> _ConvForm:
    row = _core.op_lookup(conv)
    if row is None or row not in _CONV_FORMS:
        known = ", ".join(name.removeprefix("functional.") for name in _CONV_FORMS if name.startswith("functional."))
        raise TypeError(
            f"conv: expected one of pyconvbn.functional's {known}, or an overload of those in pyconvbn.ops.aten, "
            f"got {conv!r}"
        )
    return _CONV_FORMS[row]


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


@_operator("efficient_conv_bn_eval")
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


@_operator("efficient_conv_bn_eval_decomposed")
def efficient_conv_bn_eval_decomposed(
    bn_weight: Any | None, bn_bias: Any | None, bn_running_mean: Any, bn_running_var: Any, bn_eps: float,
    conv: Any, conv_weight: Any, conv_bias: Any | None, x: Any, conv_remaining_args: Sequence[Any] = (),
    *, out: _Array | None = None,
) -> _Array:
    """The same for functional code: ``batch_norm(conv(x, W, b, *conv_remaining_args), ...)`` in one convolution.

    Args:
        bn_weight, bn_bias, bn_running_mean, bn_running_var, bn_eps: BatchNorm's parameters in this order; the
            first two may be None (1 and 0). 1-D of length out_channels.
        conv: ``linear``, ``conv1d/2d/3d`` or ``conv_transpose1d/2d/3d`` of ``pyconvbn.functional``, or of
            ``pyconvbn.ops.aten`` (any overload, ``convolution`` too).
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
    form = _conv_form(conv)
    for name, value in (("bn_running_mean", bn_running_mean), ("bn_running_var", bn_running_var)):
        if value is None:
            raise FoldError(f"{name} is None: a BatchNorm without running statistics cannot be fused",
                            "NO_RUNNING_STATS")
    bn: _Bn = (bn_weight, bn_bias, bn_running_mean, bn_running_var, bn_eps)
    rest = tuple(conv_remaining_args)
    if len(rest) > len(form.remaining):
        raise ValueError(
            f"conv_remaining_args: expected at most {len(form.remaining)} entries {form.remaining} for "
            f"{conv.__name__}, got {len(rest)}"
        )
    if form.nd == 0:
        return _linear_bn(x, conv_weight, conv_bias, bn, out)
    arguments: dict[str, Any] = {
        "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1, "transposed": form.transposed,
    }  # fmt: skip
    arguments.update(zip(form.remaining, rest))
    nd = len(conv_weight.shape) - 2 if form.nd is None else form.nd
    transposed = bool(arguments["transposed"])
    return _core.conv_bn(
        nd, x, conv_weight, conv_bias, bn, arguments["stride"], arguments["padding"], "zeros",
        arguments["dilation"], arguments["groups"], transposed, arguments["output_padding"] if transposed else 0, out,
    )


# -- what the passes put into graphs -----------------------------------------------------------------------------
# A rewritten graph never fails where the original worked: what cannot be one convolution at run time (a linear output
# that is not 2-D, an unbatched input, a BatchNorm put into training since) is computed as it was written, and counted.
# What the original cannot do either fails with the original's error.
_REFUSALS = (ValueError, TypeError, NotImplementedError, AttributeError)


def _as_written(compute: Callable[[], Any], out: _Array | None) -> Any:
    result = compute()
    counters["efficient_conv_bn_eval_fallback"] += 1
    if out is None:
        return result
    if not isinstance(out, np.ndarray) or out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(f"out: expected an array of shape {result.shape} and dtype {result.dtype}")
    out[...] = result
    return out


@_operator("efficient_conv_bn_eval")
def graph_efficient_conv_bn_eval(
    bn: Any, conv: Any, x: Any, *, output_size: Sequence[int] | int | None = None, out: _Array | None = None
) -> Any:
    """:func:`efficient_conv_bn_eval` as a node of a graph: ``bn(conv(x))`` where they cannot be one convolution."""
    try:
        return _fused(bn, conv, x, output_size=output_size, out=out)
    except _REFUSALS:
        pass
    return _as_written(lambda: bn(conv(x) if output_size is None else conv(x, output_size)), out)


@_operator("efficient_conv_bn_eval_decomposed")
def graph_efficient_conv_bn_eval_decomposed(
    bn_weight: Any | None, bn_bias: Any | None, bn_running_mean: Any, bn_running_var: Any, bn_eps: float,
    conv: Any, conv_weight: Any, conv_bias: Any | None, x: Any, conv_remaining_args: Sequence[Any] = (),
    *, out: _Array | None = None,
) -> Any:
    """:func:`efficient_conv_bn_eval_decomposed` as a node of a graph, with the same way out."""
    try:
        return _fused_decomposed(
            bn_weight, bn_bias, bn_running_mean, bn_running_var, bn_eps, conv, conv_weight, conv_bias, x,
            conv_remaining_args, out=out,
        )  # fmt: skip
    except _REFUSALS:
        pass
    return _as_written(
        lambda: functional.batch_norm(
            conv(x, conv_weight, conv_bias, *conv_remaining_args), bn_running_mean, bn_running_var, bn_weight, bn_bias,
            False, 0.0, bn_eps,
        ),
        out,
    )  # fmt: skip


# Without the look for proxies: the arguments of a node are values.
_fused: Any = getattr(efficient_conv_bn_eval, "__wrapped__")
_fused_decomposed: Any = getattr(efficient_conv_bn_eval_decomposed, "__wrapped__")
# They print as what they are; the qualified name, by which pickle finds them, stays their own.
setattr(graph_efficient_conv_bn_eval, "__name__", "efficient_conv_bn_eval")
setattr(graph_efficient_conv_bn_eval_decomposed, "__name__", "efficient_conv_bn_eval_decomposed")
