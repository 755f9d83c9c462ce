# SPDX-License-Identifier: BSD-3-Clause
"""How each module and each function of `functional` is written with `ops.aten` operators."""

from __future__ import annotations

from typing import Any

from .. import functional as F
from .. import nn
from ._aten_table import Lowering, NoLowering, function, ints, module
from ._torch_modules import ChannelDropout, FunctionModule, Norm, PReLU

# -- convolution family ----------------------------------------------------------------------------------------------
def _conv(
    to: Lowering, node: Any, nd: int, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Any:
    overload = "padding" if isinstance(padding, str) else "default"
    padding = padding if isinstance(padding, str) else ints(padding, nd)
    return to.emit(
        node, f"conv{nd}d.{overload}", x, w, b, ints(stride, nd), padding, ints(dilation, nd), groups
    )


def _conv_transpose(to, node, nd, x, w, b, stride, padding, output_padding, groups, dilation):
    overload = "default" if nd == 1 else "input"
    return to.emit(
        node, f"conv_transpose{nd}d.{overload}", x, w, b, ints(stride, nd), ints(padding, nd),
        ints(output_padding, nd), groups, ints(dilation, nd),
    )


@module(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv_module(to, node, module, path, input):
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        amounts = module._pad_amounts()
        if any(amounts):
            input = to.emit(node, "pad.default", input, amounts, module.padding_mode, last=False)
        padding = [0] * module.nd
    weight, bias = (to.parameter(module, path, name) for name in ("weight", "bias"))
    return _conv(to, node, module.nd, input, weight, bias, module.stride, padding, module.dilation, module.groups)


@module(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose_module(to, node, module, path, input, output_size=None):
    extra = module.output_padding
    if output_size is not None:
        shape = to.owner.shapes.get(node.all_input_nodes[0])
        if shape is None or not _constant(output_size):
            raise NoLowering("output_size needs a constant and example_shapes to become an output_padding")
        extra = module.output_padding_for(shape, output_size)
    weight, bias = (to.parameter(module, path, name) for name in ("weight", "bias"))
    return _conv_transpose(
        to, node, module.nd, input, weight, bias, module.stride, module.padding, extra, module.groups, module.dilation
    )


def _constant(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value))


for _nd in (1, 2, 3):
    def _conv_function(to, node, input, weight, bias, stride, padding, dilation, groups, _nd=_nd):
        return _conv(to, node, _nd, input, weight, bias, stride, padding, dilation, groups)

    def _conv_transpose_function(
        to, node, input, weight, bias, stride, padding, output_padding, groups, dilation, _nd=_nd
    ):
        return _conv_transpose(to, node, _nd, input, weight, bias, stride, padding, output_padding, groups, dilation)

    function(getattr(F, f"conv{_nd}d"))(_conv_function)
    function(getattr(F, f"conv_transpose{_nd}d"))(_conv_transpose_function)


@module(nn.Linear)
def _linear_module(to, node, module, path, input):
    weight, bias = (to.parameter(module, path, name) for name in ("weight", "bias"))
    return to.emit(node, "linear.default", input, weight, bias)


@function(F.linear)
def _linear(to, node, input, weight, bias):
    return to.emit(node, "linear.default", input, weight, bias)


# -- normalisation ---------------------------------------------------------------------------------------------------
@module(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _batch_norm_module(to, node, module, path, input):
    update = module.training and module.track_running_stats
    count = to.parameter(module, path, "num_batches_tracked") if update else None
    if module.momentum is None and count is not None:
        raise NoLowering("momentum=None in training: the average over all batches is no ATen operator")
    momentum = 0.0 if module.momentum is None else float(module.momentum)
    use_batch = module.training or (module.running_mean is None and module.running_var is None)
    weight, bias = (to.parameter(module, path, name) for name in ("weight", "bias"))
    mean = var = None
    if not module.training or update:
        mean, var = (to.parameter(module, path, name) for name in ("running_mean", "running_var"))
    result = to.emit(
        node, "batch_norm.default", input, weight, bias, mean, var, use_batch, momentum, module.eps, False
    )
    if count is not None:
        to.emit(node, "add_.Tensor", count, 1, last=False)
    return result


@function(F.batch_norm)
def _batch_norm(to, node, input, running_mean, running_var, weight, bias, training, momentum, eps):
    momentum = 0.0 if momentum is None else momentum
    return to.emit(
        node, "batch_norm.default", input, weight, bias, running_mean, running_var, training, momentum, eps, False
    )


@module(Norm)
def _norm_module(to, node, module, path, input):
    weight, bias = (to.parameter(module, path, name) for name in ("weight", "bias"))
    return to.owner.emit(node.name, module.function, input, module.sizes, weight, bias, module.eps)


# -- activations -----------------------------------------------------------------------------------------------------
for _name, _class in (("relu", nn.ReLU), ("relu6", nn.ReLU6), ("silu", nn.SiLU), ("hardswish", nn.Hardswish),
                      ("sigmoid", nn.Sigmoid)):
    module(_class)(lambda to, node, module, path, input, _name=_name: to.emit(node, f"{_name}.default", input))
    function(getattr(F, _name))(lambda to, node, input, _name=_name: to.emit(node, f"{_name}.default", input))


@module(nn.LeakyReLU)
def _leaky_relu_module(to, node, module, path, input):
    return to.emit(node, "leaky_relu.default", input, module.negative_slope)


@function(F.leaky_relu)
def _leaky_relu(to, node, input, negative_slope):
    return to.emit(node, "leaky_relu.default", input, negative_slope)


@module(nn.GELU)
def _gelu_module(to, node, module, path, input):
    return _gelu(to, node, input, module.approximate)


@function(F.gelu)
def _gelu(to, node, input, approximate):
    return to.emit(node, "gelu.default", input, **({} if approximate == "none" else {"approximate": approximate}))


@function(F.hardtanh)
def _hardtanh(to, node, input, min_val, max_val):
    return to.emit(node, "hardtanh.default", input, min_val, max_val)


@function(F.softmax)
def _softmax(to, node, input, dim):
    return to.emit(node, "softmax.int", input, dim)


@module(PReLU)
def _prelu_module(to, node, module, path, input):
    return to.emit(node, "prelu.default", input, to.parameter(module, path, "weight"))


@module(FunctionModule)
def _function_module(to, node, module, path, input):
    return to.function(node, module.function, (input, *module.args), dict(module.kwargs))


@module(nn.FrozenLayer)
def _frozen(to, node, module, path, *args, **kwargs):
    raise NoLowering("a prepared layer has its weights packed: convert the graph before freezing it")


@module(nn.Identity)
def _identity(to, node, module, path, input):
    return input


@module(nn.Sequential)
def _sequential(to, node, module, path, input):
    names = [name for name, child in module.__dict__.items() if isinstance(child, nn.Module)]
    for i, name in enumerate(names):
        inner = node if i == len(names) - 1 else _Unnamed(node)
        input = to.module(inner, getattr(module, name), f"{path}.{name}", (input,), {})
    return input


class _Unnamed:
    """Stands for a call_module node while the parts of its module are written, which have names of their own."""

    name = None
    all_input_nodes: tuple[Any, ...] = ()

    def __init__(self, node: Any) -> None:
        self.op = node.op


# -- dropout ---------------------------------------------------------------------------------------------------------
@module(nn.Dropout)
def _dropout_module(to, node, module, path, input):
    return to.emit(node, "dropout.default", input, module.p, module.training)


@function(F.dropout)
def _dropout(to, node, input, p, training):
    return to.emit(node, "dropout.default", input, p, training)


@module(ChannelDropout)
def _channel_dropout(to, node, module, path, input):
    if not module.training:
        return to.emit(node, "dropout.default", input, module.p, False)
    return to.emit(node, "feature_dropout.default", input, module.p, True)


# -- pooling ---------------------------------------------------------------------------------------------------------
def _pool_arguments(nd: int, kernel_size: Any, stride: Any, padding: Any) -> list[Any]:
    return [ints(kernel_size, nd), [] if stride is None else ints(stride, nd), ints(padding, nd)]


def _adaptive(to, node, nd, input, output_size):
    sizes = ints(output_size, nd)
    if None in sizes:
        shape = to.owner.shapes.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if shape is None:
            raise NoLowering("output_size with None needs example_shapes")
        sizes = [shape[i - nd] if size is None else size for i, size in enumerate(sizes)]
    return to.emit(node, f"adaptive_avg_pool{nd}d.default", input, sizes)


for _nd in (1, 2, 3):
    def _max_pool(to, node, input, kernel_size, stride, padding, dilation, ceil_mode, _nd=_nd):
        arguments = _pool_arguments(_nd, kernel_size, stride, padding)
        return to.emit(node, f"max_pool{_nd}d.default", input, *arguments, ints(dilation, _nd), ceil_mode)

    def _avg_pool(
        to, node, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override=None, _nd=_nd
    ):
        arguments = [*_pool_arguments(_nd, kernel_size, stride, padding), ceil_mode, count_include_pad]
        if divisor_override is not None:
            arguments.append(divisor_override)
        return to.emit(node, f"avg_pool{_nd}d.default", input, *arguments)

    def _adaptive_function(to, node, input, output_size, _nd=_nd):
        return _adaptive(to, node, _nd, input, output_size)

    def _max_pool_module(to, node, module, path, input, _lower=_max_pool):
        return _lower(
            to, node, input, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode
        )

    def _avg_pool_module(to, node, module, path, input, _lower=_avg_pool):
        return _lower(
            to, node, input, module.kernel_size, module.stride, module.padding, module.ceil_mode,
            module.count_include_pad, module.divisor_override,
        )

    def _adaptive_module(to, node, module, path, input, _nd=_nd):
        return _adaptive(to, node, _nd, input, module.output_size)

    function(getattr(F, f"max_pool{_nd}d"))(_max_pool)
    function(getattr(F, f"avg_pool{_nd}d"))(_avg_pool)
    function(getattr(F, f"adaptive_avg_pool{_nd}d"))(_adaptive_function)
    module(getattr(nn, f"MaxPool{_nd}d"))(_max_pool_module)
    module(getattr(nn, f"AvgPool{_nd}d"))(_avg_pool_module)
    module(getattr(nn, f"AdaptiveAvgPool{_nd}d"))(_adaptive_module)


# -- shapes ----------------------------------------------------------------------------------------------------------
@module(nn.Flatten)
def _flatten_module(to, node, module, path, input):
    return to.emit(node, "flatten.using_ints", input, module.start_dim, module.end_dim)


@function(F.flatten)
def _flatten(to, node, input, start_dim, end_dim):
    return to.emit(node, "flatten.using_ints", input, start_dim, end_dim)


@function(F.cat)
def _cat(to, node, tensors, dim):
    return to.emit(node, "cat.default", list(tensors), dim)


@function(F.pad)
def _pad(to, node, input, pad, mode, value):
    return to.emit(node, "pad.default", input, list(pad), mode, value)


@module(nn.Upsample)
def _upsample_module(to, node, module, path, input):
    return _interpolate(to, node, input, module.size, module.scale_factor, module.mode, module.align_corners)


@function(F.interpolate)
def _interpolate(to, node, input, size, scale_factor, mode, align_corners):
    if mode == "bilinear":
        nd = 2
    else:
        lists = [len(v) for v in (size, scale_factor) if isinstance(v, (tuple, list))]
        ndim = to.ndim(node)
        if not lists and ndim is None:
            raise NoLowering("resizing by one number needs example_shapes to know the number of axes")
        nd = lists[0] if lists else ndim - 2
    sizes = None if size is None else ints(size, nd)
    scales = None if scale_factor is None else [float(v) for v in ints(scale_factor, nd)]
    if mode == "bilinear":
        return to.emit(node, "upsample_bilinear2d.vec", input, sizes, bool(align_corners), scales)
    return to.emit(node, f"upsample_nearest{nd}d.vec", input, sizes, scales)
