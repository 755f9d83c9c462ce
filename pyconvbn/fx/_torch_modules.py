# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn modules as pyconvbn.nn modules on the same memory."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import functional as F
from .. import nn
from ._torch_table import aten
from ._torch_values import Unsupported, Values

# What a subclass may define and still compute what its torch.nn base class computes.
_HARMLESS = frozenset({
    "__module__", "__doc__", "__init__", "__annotations__", "__constants__", "__static_attributes__",
    "__firstlineno__", "__dict__", "__weakref__", "__orig_bases__", "__parameters__", "__abstractmethods__",
    "_abc_impl", "_version", "extra_repr", "__repr__", "reset_parameters", "cls_to_become",
})


class ChannelDropout(nn.Module):
    """Dropout1d to 3d: the identity in eval, in training whole channels are zeroed with probability `p`."""

    def __init__(self, p: float = 0.5, inplace: bool = False, nd: int = 2) -> None:
        super().__init__()
        self.p = p
        self.inplace = inplace
        self.nd = nd

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply to `input` `[N, C, *size]` or `[C, *size]`."""
        if not self.training or self.p == 0.0:
            return input
        lead = input.shape[: input.ndim - self.nd]
        kept = F.dropout(np.ones(lead, input.dtype), self.p, True)
        return input * kept.reshape(lead + (1,) * self.nd)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class PReLU(nn.Module):
    """`x` where positive, `weight * x` elsewhere; one weight, or one for each channel (axis 1)."""

    def __init__(self, weight: NDArray[Any]) -> None:
        super().__init__()
        self.num_parameters = int(weight.size)
        self.register_parameter("weight", weight)

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        weight = self.weight
        if weight.size > 1 and input.ndim > 2:
            weight = weight.reshape(-1, *(1,) * (input.ndim - 2))
        return np.where(input > 0, input, np.asarray(weight) * input)

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


class Norm(nn.Module):
    """LayerNorm and GroupNorm: `function(input, sizes, weight, bias, eps)`."""

    weight: Any
    bias: Any

    def __init__(self, class_name: str, function: Callable[..., Any], sizes: Any, eps: float) -> None:
        super().__init__()
        self.class_name = class_name
        self.function = function
        self.sizes = sizes
        self.eps = eps

    def forward(self, input: Any) -> Any:
        """Normalise `input`."""
        return self.function(input, self.sizes, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.class_name}, {self.sizes}, eps={self.eps}"


class FunctionModule(nn.Module):
    """A module without parameters that has no class of its own here: `function(input, *args, **kwargs)`."""

    def __init__(self, class_name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.class_name = class_name
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def forward(self, input: Any) -> Any:
        """Call the function."""
        return self.function(input, *self.args, **self.kwargs)

    def extra_repr(self) -> str:
        parts = [self.class_name, *map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return ", ".join(parts)


class TorchForward:
    """Calls a torch module on arrays: the `forward` of a module whose hooks must go on running.

    The torch module is a shallow copy: same parameters, buffers and hooks, a training flag of its own. Inputs of
    another float dtype than its parameters (a float64 reference run) are computed in their own.
    """

    def __init__(self, torch_module: Any, owner: nn.Module) -> None:
        self._call = copy.copy(torch_module)
        self._owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with all hooks, without gradients."""
        torch = sys.modules["torch"]  # the module was made by it
        module = self._call
        given = {v.dtype for v in (*args, *kwargs.values()) if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
        own = {str(t.dtype) for t in module.parameters() if t.dtype.is_floating_point}
        if len(given) == 1 and own and own != {f"torch.{next(iter(given))}"}:
            module = copy.deepcopy(module).to(getattr(torch, str(next(iter(given)))))
        module.training = self._owner.training
        with torch.no_grad():
            result = module(
                *(_to_tensor(torch, value) for value in args),
                **{name: _to_tensor(torch, value) for name, value in kwargs.items()},
            )
        return _to_array(torch, result)


def _to_tensor(torch: ModuleType, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        # torch cannot see negative strides, and warns when it is given memory that may not be written.
        usable = value.flags.writeable and all(step >= 0 for step in value.strides) and value.dtype.isnative
        return torch.from_numpy(np.asarray(value) if usable else np.array(value, dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, (tuple, list)):
        return type(value)(_to_tensor(torch, item) for item in value)
    return value


def _to_array(torch: ModuleType, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().numpy()
    if isinstance(value, tuple):
        return tuple(_to_array(torch, item) for item in value)
    if isinstance(value, list):
        return [_to_array(torch, item) for item in value]
    return value


def is_hooked(module: Any) -> bool:
    """Does calling it do more than its class's forward? torch.export's check of the inputs does not count."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not _only_checks(hook) for hook in hooks) or "forward" in vars(module)


def _only_checks(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(("torch.export", "torch._export"))


# -- the table -----------------------------------------------------------------------------------------------------
_Build = Callable[["Modules", Any], nn.Module]
_BUILD: dict[str, _Build] = {}


def _row(*names: str) -> Callable[[_Build], _Build]:
    def add(build: _Build) -> _Build:
        for name in names:
            _BUILD[name] = build
        return build

    return add


def _empty(cls: type[nn.Module]) -> nn.Module:
    """An instance without arrays: nothing is drawn at random only to be replaced."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


def _copy_settings(source: Any, module: nn.Module, *names: str) -> None:
    for name in names:
        value = getattr(source, name)
        setattr(module, name, tuple(value) if isinstance(value, list) else value)


@_row("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
def _conv(table: Modules, source: Any) -> nn.Module:
    module = _empty(getattr(nn, table.base_name(source)))
    _copy_settings(
        source, module, "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed",
        "output_padding", "groups", "padding_mode",
    )
    table.share(source, module, "parameter", "weight", "bias")
    return module


@_row("Linear")
def _linear(table: Modules, source: Any) -> nn.Module:
    module = _empty(nn.Linear)
    _copy_settings(source, module, "in_features", "out_features")
    table.share(source, module, "parameter", "weight", "bias")
    return module


@_row("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
def _batch_norm(table: Modules, source: Any) -> nn.Module:
    module = _empty(getattr(nn, table.base_name(source)))
    _copy_settings(source, module, "num_features", "eps", "momentum", "affine", "track_running_stats")
    if isinstance(module, nn.SyncBatchNorm):
        module.process_group = None  # one process
    table.share(source, module, "parameter", "weight", "bias")
    table.share(source, module, "buffer", "running_mean", "running_var", "num_batches_tracked")
    return module


@_row("ReLU", "ReLU6", "SiLU", "Hardswish")
def _activation(table: Modules, source: Any) -> nn.Module:
    return getattr(nn, table.base_name(source))(inplace=bool(source.inplace))


@_row("LeakyReLU")
def _leaky_relu(table: Modules, source: Any) -> nn.Module:
    return nn.LeakyReLU(source.negative_slope, bool(source.inplace))


@_row("Sigmoid")
def _sigmoid(table: Modules, source: Any) -> nn.Module:
    return nn.Sigmoid()


@_row("GELU")
def _gelu(table: Modules, source: Any) -> nn.Module:
    return nn.GELU(source.approximate)


@_row("Identity")
def _identity(table: Modules, source: Any) -> nn.Module:
    return nn.Identity()


@_row("Flatten")
def _flatten(table: Modules, source: Any) -> nn.Module:
    return nn.Flatten(source.start_dim, source.end_dim)


@_row("Dropout")
def _dropout(table: Modules, source: Any) -> nn.Module:
    return nn.Dropout(source.p, bool(source.inplace))


@_row("Dropout1d", "Dropout2d", "Dropout3d")
def _channel_dropout(table: Modules, source: Any) -> nn.Module:
    return ChannelDropout(source.p, bool(source.inplace), int(table.base_name(source)[-2]))


@_row("MaxPool1d", "MaxPool2d", "MaxPool3d")
def _max_pool(table: Modules, source: Any) -> nn.Module:
    if source.return_indices:
        raise Unsupported("return_indices=True")
    return getattr(nn, table.base_name(source))(
        source.kernel_size, source.stride, source.padding, source.dilation, ceil_mode=source.ceil_mode
    )


@_row("AvgPool1d", "AvgPool2d", "AvgPool3d")
def _avg_pool(table: Modules, source: Any) -> nn.Module:
    arguments = [source.kernel_size, source.stride, source.padding, source.ceil_mode, source.count_include_pad]
    if getattr(source, "divisor_override", None) is not None:
        arguments.append(source.divisor_override)
    return getattr(nn, table.base_name(source))(*arguments)


@_row("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d")
def _adaptive_avg_pool(table: Modules, source: Any) -> nn.Module:
    return getattr(nn, table.base_name(source))(source.output_size)


@_row("Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d")
def _upsample(table: Modules, source: Any) -> nn.Module:
    if source.recompute_scale_factor:
        raise Unsupported("recompute_scale_factor=True")
    if source.mode not in ("nearest", "bilinear"):
        raise Unsupported(f"mode={source.mode!r}; 'nearest' and 'bilinear' are there")
    return nn.Upsample(source.size, source.scale_factor, source.mode, source.align_corners)


@_row("PReLU")
def _prelu(table: Modules, source: Any) -> nn.Module:
    return PReLU(table.values.array(source.weight))


@_row("LayerNorm", "GroupNorm")
def _norm(table: Modules, source: Any) -> nn.Module:
    if table.base_name(source) == "LayerNorm":
        module = Norm("LayerNorm", aten("layer_norm.default"), list(source.normalized_shape), source.eps)
    else:
        module = Norm("GroupNorm", aten("group_norm.default"), source.num_groups, source.eps)
    table.share(source, module, "parameter", "weight", "bias")
    return module


@_row("Sequential")
def _sequential(table: Modules, source: Any) -> nn.Module:
    return nn.Sequential({name: table.convert(child) for name, child in source._modules.items()})


@_row("ModuleList")
def _module_list(table: Modules, source: Any) -> nn.Module:
    return nn.ModuleList([table.convert(child) for child in source])


# name -> (row of the function table, attributes passed as further arguments)
_FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Tanh": ("nn.functional.tanh", ()),
    "Softmax": ("nn.functional.softmax", ("dim",)),
    "LogSoftmax": ("nn.functional.log_softmax", ("dim",)),
    "Hardtanh": ("nn.functional.hardtanh", ("min_val", "max_val")),
    "Hardsigmoid": ("nn.functional.hardsigmoid", ()),
    "ELU": ("nn.functional.elu", ("alpha",)),
    "Softplus": ("nn.functional.softplus", ("beta", "threshold")),
    "Mish": ("nn.functional.mish", ()),
    "LogSigmoid": ("nn.functional.logsigmoid", ()),
    "PixelShuffle": ("nn.functional.pixel_shuffle", ("upscale_factor",)),
    "PixelUnshuffle": ("nn.functional.pixel_unshuffle", ("downscale_factor",)),
    "ChannelShuffle": ("nn.functional.channel_shuffle", ("groups",)),
    "Unflatten": ("unflatten", ("dim", "unflattened_size")),
    "GLU": ("nn.functional.glu", ("dim",)),
}


@_row(*_FUNCTIONS)
def _function(table: Modules, source: Any) -> nn.Module:
    name = table.base_name(source)
    function, attributes = _FUNCTIONS[name]
    target, args, kwargs = table.functions.adapt(function, (None, *(getattr(source, key) for key in attributes)), {})
    return FunctionModule(name, target, *args[1:], **kwargs)


@_row(*(f"{kind}{nd}d" for nd in (1, 2, 3) for kind in
        ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad")))
def _pad(table: Modules, source: Any) -> nn.Module:
    name = table.base_name(source)
    modes = {"Reflection": "reflect", "Replication": "replicate", "Circular": "circular"}
    mode = modes.get(name[: name.index("Pad")], "constant")
    return FunctionModule(name, F.pad, tuple(source.padding), mode, float(getattr(source, "value", 0.0)))


class Modules:
    """Converts torch modules, each once: a module that torch shares is shared here."""

    def __init__(self, torch: ModuleType, values: Values, functions: Any) -> None:
        self.values = values
        self.functions = functions
        self._torch = torch
        self._classes = {getattr(torch.nn, name): name for name in _BUILD if hasattr(torch.nn, name)}
        self._converted: dict[int, tuple[Any, nn.Module]] = {}
        self.nested: Callable[[Any], nn.Module] | None = None  # converts a torch.fx.GraphModule used as a module

    def _base(self, cls: type) -> type | None:
        """The torch.nn class that `cls` is, or inherits all its computing from."""
        for position, base in enumerate(cls.__mro__):
            if base in self._classes:
                shadowing = (
                    name for derived in cls.__mro__[:position] for name in vars(derived)
                    if name not in _HARMLESS and (hasattr(base, name) or name in ("weight", "bias"))
                )
                return None if any(shadowing) else base
        return None

    def known(self, module: Any) -> bool:
        """Is it, for tracing, one operator? Containers are traced through."""
        base = self._base(type(module))
        return base is not None and self._classes[base] not in ("Sequential", "ModuleList")

    def base_name(self, module: Any) -> str:
        base = self._base(type(module))
        assert base is not None
        return self._classes[base]

    def share(self, source: Any, module: nn.Module, kind: str, *names: str) -> None:
        """Registers arrays on the memory of the source's tensors under the same names."""
        for name in names:
            tensor = getattr(source, name, None)
            try:
                array = None if tensor is None else self.values.array(tensor)
            except Unsupported as error:
                raise Unsupported(f"{name} is {error}") from error
            if kind == "buffer":
                module.register_buffer(name, array)
            else:
                if array is not None and not isinstance(array, nn.Parameter):  # weight_norm keeps a plain tensor
                    array = nn.Parameter(array, False)
                module.register_parameter(name, array)

    def convert(self, source: Any) -> nn.Module:
        """Our module for a torch module; Unsupported with the reason."""
        done = self._converted.get(id(source))
        if done is not None:
            return done[1]
        base = self._base(type(source))
        if base is None and self.nested is not None and hasattr(source, "graph"):
            module = self.nested(source)
        elif base is None:
            raise Unsupported(self._refusal(source))
        else:
            module = _BUILD[self._classes[base]](self, source)
            if is_hooked(source):
                # An own forward is what the passes call HOOKED: they leave the module alone.
                object.__setattr__(module, "forward", TorchForward(source, module))
        module.training = bool(source.training)
        self._converted[id(source)] = (source, module)
        return module

    def _refusal(self, source: Any) -> str:
        cls = type(source)
        if "parametrizations" in getattr(source, "_modules", {}):
            return (f"{cls.__name__} has parametrizations; call "
                    "torch.nn.utils.parametrize.remove_parametrizations(module, name) first")
        return f"no counterpart of the module class {cls.__module__}.{cls.__qualname__}"


def check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Unsupported unless the module's forward takes these arguments."""
    try:
        inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    except TypeError as error:
        raise Unsupported(f"{type(module).__name__}.forward: {error}") from error
