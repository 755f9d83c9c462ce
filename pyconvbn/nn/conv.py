# SPDX-License-Identifier: BSD-3-Clause
"""Convolution and transposed convolution modules in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from numpy.typing import NDArray

from .. import functional as F
from .init import check_int, check_ints, init_weight_and_bias
from .linear import check_input_ndim
from .module import Module

_IntOrSeq = int | Sequence[int]
_Function = Callable[..., NDArray[Any]]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _ConvNd(Module):
    nd: ClassVar[int]
    padding: Any  # a tuple of ints, 'same' or 'valid'
    transposed: bool
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    #: number of axes the input must have; set where a BatchNorm was folded in
    input_ndim: int | None = None

    def _setup(
        self, in_channels: int, out_channels: int, kernel_size: _IntOrSeq, stride: _IntOrSeq,
        padding: _IntOrSeq | str, dilation: _IntOrSeq, transposed: bool, output_padding: _IntOrSeq,
        groups: int, bias: bool, padding_mode: str, dtype: Any,
    ) -> None:
        Module.__init__(self)
        self.in_channels = check_int(in_channels, "in_channels", 0)
        self.out_channels = check_int(out_channels, "out_channels", 0)
        self.groups = check_int(groups, "groups", 1)
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"groups: {name} must be divisible by groups, "
                    f"got {name}={getattr(self, name)} and groups={self.groups}"
                )
        self.kernel_size = check_ints(kernel_size, self.nd, "kernel_size", 1)
        self.stride = check_ints(stride, self.nd, "stride", 1)
        self.padding = self._check_padding(padding, transposed)
        self.dilation = check_ints(dilation, self.nd, "dilation", 1)
        self.transposed = transposed
        self.output_padding = check_ints(output_padding, self.nd, "output_padding", 0)
        if padding_mode not in _PADDING_MODES:
            modes = ", ".join(_PADDING_MODES)
            raise ValueError(f"padding_mode: expected one of {modes}, got {padding_mode!r}")
        if transposed and padding_mode != "zeros":
            raise ValueError(
                f"padding_mode: {type(self).__name__} supports only 'zeros', got {padding_mode!r}"
            )
        self.padding_mode = padding_mode
        rows, columns = self.out_channels, self.in_channels
        if transposed:
            rows, columns = columns, rows
        shape = (rows, columns // self.groups, *self.kernel_size)
        weight, bias_value = init_weight_and_bias(shape, self.out_channels if bias else None, dtype)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias_value)

    def _check_padding(self, padding: _IntOrSeq | str, transposed: bool) -> str | tuple[int, ...]:
        if not isinstance(padding, str):
            return check_ints(padding, self.nd, "padding", 0)
        if transposed or padding not in ("same", "valid"):
            wanted = "ints" if transposed else "ints, 'same' or 'valid'"
            raise ValueError(f"padding: expected {wanted}, got {padding!r}")
        if padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"padding: 'same' needs stride 1, got stride {self.stride}")
        return padding

    def extra_repr(self) -> str:
        none = (0,) * self.nd
        parts = [
            f"{self.in_channels}, {self.out_channels}",
            f"kernel_size={self.kernel_size}, stride={self.stride}",
        ]
        # As PyTorch prints it: only what differs from the default, strings without quotes.
        if self.padding != none:
            parts.append(f"padding={self.padding}")
        if self.dilation != (1,) * self.nd:
            parts.append(f"dilation={self.dilation}")
        if self.output_padding != none:
            parts.append(f"output_padding={self.output_padding}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)


class _Conv(_ConvNd):
    """Convolution of `[N, in_channels, *size]` or unbatched `[in_channels, *size]` input.

    `weight` is `[out_channels, in_channels/groups, *kernel_size]`, `bias` `[out_channels]` or None;
    sizes are ints or one int per axis, `padding` also 'valid' or 'same', `padding_mode` one of
    zeros, reflect, replicate and circular. Initialised from U(-b, b), b = 1/sqrt(fan_in).
    Raises `ValueError` or `TypeError` naming the argument that does not fit.

    >>> Conv2d(16, 32, 3, stride=2, padding=1)
    Conv2d(16, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _IntOrSeq,
        stride: _IntOrSeq = 1,
        padding: _IntOrSeq | str = 0,
        dilation: _IntOrSeq = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        dtype: Any = None,
    ) -> None:
        self._setup(
            in_channels, out_channels, kernel_size, stride, padding, dilation, False, 0, groups,
            bias, padding_mode, dtype,
        )

    def _pad_amounts(self) -> list[int]:
        """Arguments of `functional.pad`: (left, right) pairs, the last axis first."""
        amounts: list[int] = []
        for axis in reversed(range(self.nd)):
            if isinstance(self.padding, str):
                same = self.padding == "same"
                total = self.dilation[axis] * (self.kernel_size[axis] - 1) if same else 0
                amounts += [total // 2, total - total // 2]
            else:
                amounts += [self.padding[axis]] * 2
        return amounts

    def forward(self, input: Any) -> NDArray[Any]:
        """Convolve `input`; the errors are those of the functional operator."""
        if self.input_ndim is not None:
            check_input_ndim(self, input)
        padding = self.padding
        if self.padding_mode != "zeros":
            amounts = self._pad_amounts()
            if any(amounts):
                input = F.pad(input, amounts, mode=self.padding_mode)
            padding = (0,) * self.nd
        function: _Function = getattr(F, f"conv{self.nd}d")
        return function(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class Conv1d(_Conv):
    __doc__ = _Conv.__doc__
    nd = 1


class Conv2d(_Conv):
    __doc__ = _Conv.__doc__
    nd = 2


class Conv3d(_Conv):
    __doc__ = _Conv.__doc__
    nd = 3


class _ConvTranspose(_ConvNd):
    """Transposed convolution of `[N, in_channels, *size]` or unbatched input.

    `weight` is `[in_channels, out_channels/groups, *kernel_size]`. `output_padding` extends the
    right end of each axis. Raises `ValueError` or `TypeError` naming the argument that does not
    fit.

    >>> ConvTranspose2d(8, 4, 2, stride=2)
    ConvTranspose2d(8, 4, kernel_size=(2, 2), stride=(2, 2))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _IntOrSeq,
        stride: _IntOrSeq = 1,
        padding: _IntOrSeq = 0,
        output_padding: _IntOrSeq = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _IntOrSeq = 1,
        padding_mode: str = "zeros",
        *,
        dtype: Any = None,
    ) -> None:
        self._setup(
            in_channels, out_channels, kernel_size, stride, padding, dilation, True,
            output_padding, groups, bias, padding_mode, dtype,
        )

    def output_padding_for(
        self, input_shape: Sequence[int], output_size: _IntOrSeq | None
    ) -> tuple[int, ...]:
        """The `output_padding` that makes an input of `input_shape` give `output_size`.

        `output_size` is an int, the spatial sizes, or the whole output shape; None means the
        module's own output_padding. Raises `ValueError` if no output_padding reaches it.
        """
        if output_size is None:
            return self.output_padding
        lead = len(input_shape) - self.nd
        if isinstance(output_size, int):
            output_size = (output_size,) * self.nd
        wanted = tuple(output_size)
        if lead not in (1, 2) or len(wanted) not in (self.nd, self.nd + lead):
            raise ValueError(
                f"output_size: expected {self.nd} or {self.nd + lead} sizes, got {len(wanted)}"
            )
        wanted = wanted[-self.nd :]
        shortest = [
            (i - 1) * s - 2 * p + d * (k - 1) + 1
            for i, s, p, d, k in zip(
                input_shape[lead:], self.stride, self.padding, self.dilation, self.kernel_size
            )
        ]
        longest = [size + s - 1 for size, s in zip(shortest, self.stride)]
        if any(not a <= w <= b for a, w, b in zip(shortest, wanted, longest)):
            raise ValueError(
                f"output_size: expected sizes from {tuple(shortest)} to {tuple(longest)} for input "
                f"{tuple(input_shape)}, got {wanted}"
            )
        return tuple(w - a for w, a in zip(wanted, shortest))

    def forward(self, input: Any, output_size: _IntOrSeq | None = None) -> NDArray[Any]:
        """Transposed convolution, of the given spatial `output_size` if there is one."""
        if self.input_ndim is not None:
            check_input_ndim(self, input)
        extra = self.output_padding
        if output_size is not None:
            extra = self.output_padding_for(input.shape, output_size)
        function: _Function = getattr(F, f"conv_transpose{self.nd}d")
        return function(
            input, self.weight, self.bias, self.stride, self.padding, extra, self.groups,
            self.dilation,
        )


class ConvTranspose1d(_ConvTranspose):
    __doc__ = _ConvTranspose.__doc__
    nd = 1


class ConvTranspose2d(_ConvTranspose):
    __doc__ = _ConvTranspose.__doc__
    nd = 2


class ConvTranspose3d(_ConvTranspose):
    __doc__ = _ConvTranspose.__doc__
    nd = 3
