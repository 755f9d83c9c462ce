# SPDX-License-Identifier: BSD-3-Clause
"""Rows for convolution, normalisation, activations, arithmetic, reductions and pooling."""

from __future__ import annotations

import operator
from typing import Any

from .. import functional as F
from . import _torch_numpy as T
from ._torch_table import as_dims, call, given, nonone, row, same
from ._torch_values import Unsupported


# -- convolution, linear, normalisation ----------------------------------------------------------------------------
for _nd in (1, 2, 3):
    same(getattr(F, f"conv{_nd}d"), f"conv{_nd}d", f"nn.functional.conv{_nd}d")
    same(getattr(F, f"conv_transpose{_nd}d"), f"conv_transpose{_nd}d", f"nn.functional.conv_transpose{_nd}d")
same(F.linear, "nn.functional.linear")


@row("nn.functional.batch_norm")
def _batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05):
    return call(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@row("batch_norm")
def _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return call(F.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)


@row("convolution")
def _convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    return call(
        "convolution.default", input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )


@row("addmm")
def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    return call("addmm.default", input, mat1, mat2, **nonone(beta=beta, alpha=alpha))


@row("nn.functional.layer_norm")
def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-05):
    return call("layer_norm.default", input, list(normalized_shape), weight, bias, eps)


@row("nn.functional.group_norm")
def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-05):
    return call("group_norm.default", input, num_groups, weight, bias, eps)


# -- activations -----------------------------------------------------------------------------------------------------
@row("nn.functional.relu", "relu", methods="relu")
def _relu(input, inplace=False):
    return call(F.relu, input)._replace(inplace=inplace)


@row("nn.functional.relu6")
def _relu6(input, inplace=False):
    return call(F.relu6, input)._replace(inplace=inplace)


@row("nn.functional.silu")
def _silu(input, inplace=False):
    return call(F.silu, input)._replace(inplace=inplace)


@row("nn.functional.hardswish")
def _hardswish(input, inplace=False):
    return call(F.hardswish, input)._replace(inplace=inplace)


@row("nn.functional.hardsigmoid")
def _hardsigmoid(input, inplace=False):
    return call("hardsigmoid.default", input)._replace(inplace=inplace)


@row("nn.functional.mish")
def _mish(input, inplace=False):
    return call("mish.default", input)._replace(inplace=inplace)


@row("nn.functional.leaky_relu")
def _leaky_relu(input, negative_slope=0.01, inplace=False):
    return call(F.leaky_relu, input, negative_slope)._replace(inplace=inplace)


@row("nn.functional.hardtanh")
def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False):
    return call(F.hardtanh, input, min_val, max_val)._replace(inplace=inplace)


@row("nn.functional.elu")
def _elu(input, alpha=1.0, inplace=False):
    return call("elu.default", input, alpha)._replace(inplace=inplace)


@row("nn.functional.softplus")
def _softplus(input, beta=1, threshold=20):
    return call("softplus.default", input, beta, threshold)


@row("nn.functional.gelu")
def _gelu(input, approximate="none"):
    return call(F.gelu, input, approximate)


@row("nn.functional.glu")
def _glu(input, dim=-1):
    return call("glu.default", input, dim)


def _softmax_dim(dim):
    if dim is None:
        raise Unsupported("softmax without dim")


@row("nn.functional.softmax")
def _softmax(input, dim=None, _stacklevel=3, dtype=None):
    _softmax_dim(dim)
    return call(F.softmax, input, dim) if dtype is None else call("softmax.int", input, dim, dtype)


@row("softmax", methods="softmax")
def _torch_softmax(input, dim=None, dtype=None, *, out=None):
    return _softmax(input, dim, dtype=dtype)


@row("nn.functional.log_softmax")
def _log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    _softmax_dim(dim)
    return call("log_softmax.int", input, dim, dtype)


@row("log_softmax", methods="log_softmax")
def _torch_log_softmax(input, dim=None, dtype=None, *, out=None):
    return _log_softmax(input, dim, dtype=dtype)


@row("sigmoid", "special.expit", "nn.functional.sigmoid", methods="sigmoid")
def _sigmoid(input, *, out=None):
    given(out=(out, None))
    return call(F.sigmoid, input)


def _elementwise(name: str, *more: str) -> None:
    """A function of one tensor."""

    def adapter(input, *, out=None):
        given(out=(out, None))
        return call(f"{name}.default", input)

    row(name, *more, methods=name)(adapter)


for _name in ("exp", "log", "sqrt", "rsqrt", "erf", "sin", "cos", "floor", "ceil", "reciprocal", "square", "sign",
              "log1p", "expm1", "isnan", "isinf", "isfinite", "log2", "sinh", "cosh", "trunc"):
    _elementwise(_name)
_elementwise("tanh", "nn.functional.tanh")
_elementwise("logsigmoid", "nn.functional.logsigmoid")


# -- arithmetic ------------------------------------------------------------------------------------------------------
@row("add", methods="add")
def _add(input, other, *, alpha=1, out=None):
    given(out=(out, None))
    return call(operator.add, input, other) if alpha == 1 else call("add.Tensor", input, other, alpha=alpha)


@row("sub", "subtract", methods="sub subtract")
def _sub(input, other, *, alpha=1, out=None):
    given(out=(out, None))
    return call(operator.sub, input, other) if alpha == 1 else call("sub.Tensor", input, other, alpha=alpha)


@row("rsub", methods="rsub")
def _rsub(input, other, *, alpha=1):
    given(alpha=(alpha, 1))
    return call(operator.sub, other, input)


@row("div", "divide", "true_divide", methods="div divide true_divide")
def _div(input, other, *, rounding_mode=None, out=None):
    given(out=(out, None))
    if rounding_mode is None:
        return call(operator.truediv, input, other)
    return call("div.Tensor_mode", input, other, rounding_mode=rounding_mode)


def _binary(target: Any, *names: str) -> None:
    def adapter(input, other, *, out=None):
        given(out=(out, None))
        return call(target, input, other)

    row(*names, methods=" ".join(names))(adapter)


_binary(operator.mul, "mul", "multiply")
_binary(operator.matmul, "matmul")
_binary(operator.floordiv, "floor_divide")
_binary("maximum.default", "maximum")
_binary("minimum.default", "minimum")
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _binary(getattr(operator, _name), _name)


@row("bmm", "mm", methods="bmm mm")
def _mm(input, mat2, *, out=None):
    given(out=(out, None))
    return call(operator.matmul, input, mat2)


@row("pow", methods="pow")
def _pow(input, exponent, *, out=None):
    given(out=(out, None))
    return call(operator.pow, input, exponent)


@row("neg", "negative", methods="neg negative")
def _neg(input, *, out=None):
    return call(operator.neg, input)


@row("abs", "absolute", methods="abs absolute")
def _abs(input, *, out=None):
    return call(operator.abs, input)


@row("clamp", "clip", methods="clamp clip")
def _clamp(input, min=None, max=None, *, out=None):
    return call("clamp.default", input, min, max)


@row("clamp_min", methods="clamp_min")
def _clamp_min(input, min):
    return call("clamp_min.default", input, min)


@row("clamp_max", methods="clamp_max")
def _clamp_max(input, max):
    return call("clamp_max.default", input, max)


@row("where")
def _where(condition, input, other):
    scalars = (isinstance(input, (bool, int, float)), isinstance(other, (bool, int, float)))
    if all(scalars):
        return call(T.where, condition, input, other)
    return call({(0, 0): "where.self", (0, 1): "where.ScalarOther", (1, 0): "where.ScalarSelf"}[scalars],
                 condition, input, other)


@row("masked_fill", methods="masked_fill")
def _masked_fill(input, mask, value):
    if not isinstance(value, (bool, int, float)):
        raise Unsupported("masked_fill with a tensor as value")
    return call("masked_fill.Scalar", input, mask, value)


# -- reductions ------------------------------------------------------------------------------------------------------
def _reduction(name: str, overload: str) -> None:
    """sum and mean: over all axes, or over those of dim."""

    def adapter(input, dim=None, keepdim=False, *, dtype=None, out=None):
        given(out=(out, None))
        more = {} if dtype is None else {"dtype": dtype}
        if dim is None:
            return call(f"{name}.default", input, **more)
        return call(f"{name}.{overload}", input, as_dims(dim), keepdim, **more)

    row(name, methods=name)(adapter)


_reduction("mean", "dim")
_reduction("sum", "dim_IntList")


@row("amax", methods="amax")
def _amax(input, dim=(), keepdim=False, *, out=None):
    return call("amax.default", input, as_dims(dim), keepdim)


@row("amin", methods="amin")
def _amin(input, dim=(), keepdim=False, *, out=None):
    return call("amin.default", input, as_dims(dim), keepdim)


def _extremum(name: str, elementwise: str) -> None:
    """max and min: of everything, along a dim (a pair of values and indices), or of two tensors."""

    def adapter(input, dim=None, keepdim=False, *, other=None, out=None):
        given(out=(out, None))
        if isinstance(dim, int):
            return call(getattr(T, f"{name}_dim"), input, dim, keepdim)
        other = dim if other is None else other
        return call(f"{name}.default", input) if other is None else call(elementwise, input, other)

    row(name, methods=name)(adapter)


_extremum("max", "maximum.default")
_extremum("min", "minimum.default")


@row("argmax", methods="argmax")
def _argmax(input, dim=None, keepdim=False):
    return call("argmax.default", input, dim, keepdim)


def _spread(dim, unbiased, correction, keepdim):
    """Arguments of var and std, which torch takes in two forms: (unbiased) and (dim, unbiased, keepdim)."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = None if dim is None else as_dims(dim)
    return dims, {"correction": (1 if unbiased else 0) if correction is None else correction, "keepdim": keepdim}


@row("var", methods="var")
def _var(input, dim=None, unbiased=True, keepdim=False, *, correction=None):
    dims, kwargs = _spread(dim, unbiased, correction, keepdim)
    return call("var.correction", input, dims, **kwargs)


@row("std", methods="std")
def _std(input, dim=None, unbiased=True, keepdim=False, *, correction=None):
    dims, kwargs = _spread(dim, unbiased, correction, keepdim)
    return call(T.std, input, dims, **kwargs)


# -- pooling ---------------------------------------------------------------------------------------------------------
for _nd in (1, 2, 3):
    same(getattr(F, f"avg_pool{_nd}d"), f"nn.functional.avg_pool{_nd}d", *(("avg_pool1d",) if _nd == 1 else ()))
    same(
        getattr(F, f"adaptive_avg_pool{_nd}d"), f"nn.functional.adaptive_avg_pool{_nd}d",
        *(("adaptive_avg_pool1d",) if _nd == 1 else ()),
    )

    def _max_pool(
        input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, _nd=_nd
    ):
        given(return_indices=(return_indices, False))
        function = getattr(F, f"max_pool{_nd}d")
        return call(function, input, kernel_size, None if stride == [] else stride, padding, dilation, ceil_mode)

    row(f"nn.functional.max_pool{_nd}d", f"max_pool{_nd}d")(_max_pool)
