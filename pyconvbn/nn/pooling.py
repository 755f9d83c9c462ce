# SPDX-License-Identifier: BSD-3-Clause
"""Pooling modules in one to three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from numpy.typing import NDArray

from .. import functional as F
from .init import check_ints
from .module import Module

_IntOrSeq = int | Sequence[int]
_Function = Callable[..., NDArray[Any]]


class _MaxPool(Module):
    """Maximum over windows of the last axes; `stride=None` means `kernel_size`.

    Arguments and attributes are those of PyTorch; `return_indices=True` is not implemented and
    raises `NotImplementedError`.

    >>> MaxPool2d(3, stride=2, padding=1)
    MaxPool2d(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)
    """

    nd: ClassVar[int]

    def __init__(
        self,
        kernel_size: _IntOrSeq,
        stride: _IntOrSeq | None = None,
        padding: _IntOrSeq = 0,
        dilation: _IntOrSeq = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        if return_indices:
            raise NotImplementedError("return_indices: only False is supported")
        stride = kernel_size if stride is None else stride
        for name, value, least in (
            ("kernel_size", kernel_size, 1), ("stride", stride, 1),
            ("padding", padding, 0), ("dilation", dilation, 1),
        ):
            check_ints(value, self.nd, name, least)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.return_indices = False
        self.ceil_mode = ceil_mode

    def forward(self, input: Any) -> NDArray[Any]:
        """Pool `input` `[N, C, *size]` or `[C, *size]`."""
        function: _Function = getattr(F, f"max_pool{self.nd}d")
        return function(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class MaxPool1d(_MaxPool):
    __doc__ = _MaxPool.__doc__
    nd = 1


class MaxPool2d(_MaxPool):
    __doc__ = _MaxPool.__doc__
    nd = 2


class MaxPool3d(_MaxPool):
    __doc__ = _MaxPool.__doc__
    nd = 3


class _AvgPool(Module):
    """Mean over windows of the last axes; arguments and attributes are those of PyTorch.

    >>> AvgPool2d(2)
    AvgPool2d(kernel_size=2, stride=2, padding=0)
    """

    nd: ClassVar[int]

    def __init__(
        self,
        kernel_size: _IntOrSeq,
        stride: _IntOrSeq | None = None,
        padding: _IntOrSeq = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__()
        stride = kernel_size if stride is None else stride
        for name, value, least in (
            ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)
        ):
            check_ints(value, self.nd, name, least)
        if divisor_override == 0:
            raise ValueError("divisor_override: must not be 0")
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def forward(self, input: Any) -> NDArray[Any]:
        """Pool `input` `[N, C, *size]` or `[C, *size]`."""
        args: tuple[Any, ...] = (
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad,
        )
        if self.divisor_override is not None:
            args += (self.divisor_override,)
        function: _Function = getattr(F, f"avg_pool{self.nd}d")
        return function(*args)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool1d(_AvgPool):
    __doc__ = _AvgPool.__doc__
    nd = 1

    def __init__(
        self,
        kernel_size: _IntOrSeq,
        stride: _IntOrSeq | None = None,
        padding: _IntOrSeq = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        # PyTorch keeps one-element tuples here, in no other pooling module, and has no
        # divisor_override in one dimension.
        stride = kernel_size if stride is None else stride
        super().__init__(
            check_ints(kernel_size, 1, "kernel_size", 1), check_ints(stride, 1, "stride", 1),
            check_ints(padding, 1, "padding", 0), ceil_mode, count_include_pad,
        )


class AvgPool2d(_AvgPool):
    __doc__ = _AvgPool.__doc__
    nd = 2


class AvgPool3d(_AvgPool):
    __doc__ = _AvgPool.__doc__
    nd = 3


class _AdaptiveAvgPool(Module):
    """Mean over as many windows as `output_size` says; None keeps the size of that axis.

    >>> AdaptiveAvgPool2d(1)
    AdaptiveAvgPool2d(output_size=1)
    """

    nd: ClassVar[int]

    def __init__(self, output_size: int | None | Sequence[int | None]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, input: Any) -> NDArray[Any]:
        """Pool `input` `[N, C, *size]` or `[C, *size]`."""
        function: _Function = getattr(F, f"adaptive_avg_pool{self.nd}d")
        return function(input, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    __doc__ = _AdaptiveAvgPool.__doc__
    nd = 1


class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    __doc__ = _AdaptiveAvgPool.__doc__
    nd = 2


class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    __doc__ = _AdaptiveAvgPool.__doc__
    nd = 3
