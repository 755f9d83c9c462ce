# SPDX-License-Identifier: BSD-3-Clause
"""Reads convolution, linear and BatchNorm modules, ours and torch.nn's alike, by their attributes.

torch is never imported from here: a torch module carries the same attribute names as ours, and its tensors are
taken by the array coercion of the C extension.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from .errors import FoldError

_CONV_ATTRIBUTES = (
    "weight", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
)
_BN_ATTRIBUTES = ("num_features", "eps", "running_mean", "running_var", "training")


class ConvRecord(NamedTuple):
    """Everything the fused operator needs to know of a convolution (``nd`` 1 to 3) or linear (``nd`` 0) module."""

    nd: int
    weight: Any
    bias: Any | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    out_channels: int


def is_torch(module: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(module, torch.nn.Module)


def read_conv(module: Any, argument: str = "conv") -> ConvRecord:
    """The record of a Linear, Conv1d to 3d or ConvTranspose1d to 3d module (subclasses count)."""
    if hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight"):
        return ConvRecord(
            0, module.weight, module.bias, (), (), "zeros", (), 1, False, (), int(module.out_features)
        )
    missing = [name for name in _CONV_ATTRIBUTES if not hasattr(module, name)]
    if missing:
        raise TypeError(
            f"{argument}: expected a Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d module, got "
            f"{type(module).__name__} (it has no attribute {missing[0]!r})"
        )
    nd = len(module.weight.shape) - 2
    padding = module.padding if isinstance(module.padding, str) else _per_axis(module.padding, nd)
    return ConvRecord(
        nd, module.weight, module.bias, _per_axis(module.stride, nd), padding,
        getattr(module, "padding_mode", "zeros"), _per_axis(module.dilation, nd), int(module.groups),
        bool(getattr(module, "transposed", False)), _per_axis(getattr(module, "output_padding", ()), nd),
        int(module.out_channels),
    )


def _per_axis(value: Any, nd: int) -> tuple[int, ...]:
    """As the constructor makes it; whoever assigns the attribute later may write one number for all axes."""
    return (int(value),) * nd if hasattr(value, "__index__") else tuple(value)


def check_bn(module: Any, argument: str = "bn") -> None:
    """TypeError unless ``module`` looks like a BatchNorm; FoldError when its statistics are not fixed."""
    missing = [name for name in _BN_ATTRIBUTES if not hasattr(module, name)]
    if missing:
        raise TypeError(
            f"{argument}: expected a BatchNorm1d/2d/3d or SyncBatchNorm module, got {type(module).__name__} "
            f"(it has no attribute {missing[0]!r})"
        )
    if module.training:
        raise FoldError(
            f"{argument} ({type(module).__name__}) is in training mode: it normalises by the batch and "
            f"cannot be fused; call {argument}.eval()",
            "BN_TRAINING",
        )
    if module.running_mean is None or module.running_var is None:
        which = "running_mean" if module.running_mean is None else "running_var"
        raise FoldError(
            f"{argument}.{which} is None: a BatchNorm without running statistics cannot be fused",
            "NO_RUNNING_STATS",
        )


def read_bn(module: Any, argument: str = "bn") -> tuple[Any, Any, Any, Any, float]:
    """(weight, bias, running_mean, running_var, eps) of a BatchNorm module in eval mode with statistics."""
    check_bn(module, argument)
    return (
        getattr(module, "weight", None), getattr(module, "bias", None), module.running_mean,
        module.running_var, module.eps,
    )


def transposed_output_padding(
    conv: ConvRecord, kernel: Sequence[int], spatial: Sequence[int], output_size: Sequence[int] | int
) -> tuple[int, ...]:
    """The ``output_padding`` that makes a transposed convolution of a ``spatial`` input give ``output_size``.

    ``output_size`` may carry batch and channel axes in front, as torch.nn.ConvTranspose2d accepts it.
    Source: torch.nn.ConvTranspose2d documentation, "Shape".
    """
    wanted = (output_size,) * conv.nd if isinstance(output_size, int) else tuple(int(v) for v in output_size)
    if len(wanted) == conv.nd + 2:
        wanted = wanted[2:]
    if len(wanted) != conv.nd:
        raise ValueError(
            f"output_size: expected {conv.nd} or {conv.nd + 2} entries for a {conv.nd}-d transposed convolution, "
            f"got {len(wanted)}"
        )
    assert not isinstance(conv.padding, str)
    result = []
    for axis in range(conv.nd):
        smallest = (
            (spatial[axis] - 1) * conv.stride[axis] - 2 * conv.padding[axis]
            + conv.dilation[axis] * (kernel[axis] - 1) + 1
        )
        extra = wanted[axis] - smallest
        if not 0 <= extra < conv.stride[axis]:
            raise ValueError(
                f"output_size: expected between {smallest} and {smallest + conv.stride[axis] - 1} on spatial axis "
                f"{axis} (input size {spatial[axis]}), got {wanted[axis]}"
            )
        result.append(extra)
    return tuple(result)
