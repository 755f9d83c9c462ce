# SPDX-License-Identifier: BSD-3-Clause
"""Linear, and the modules that only reshape, resize or pass on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import functional as F
from .init import check_int, init_weight_and_bias
from .module import Module


def check_input_ndim(module: Any, input: Any) -> None:
    """A layer with a BatchNorm folded in is right for inputs of one number of axes only: with another, axis 1 of the
    output, which the BatchNorm normalised, was not the axis of the features."""
    if np.ndim(input) != module.input_ndim:
        raise ValueError(
            f"input: expected {module.input_ndim} axes, got {np.ndim(input)}: a BatchNorm is folded into this "
            f"{type(module).__name__}, which is exact for batched input of that many axes only"
        )


class Linear(Module):
    """`input @ weight.T + bias`: input `[..., in_features]`, weight `[out_features, in_features]`.

    Raises `ValueError` or `TypeError` naming the argument that does not fit.

    >>> Linear(3, 4)
    Linear(in_features=3, out_features=4, bias=True)
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None
    #: number of axes the input must have; set where a BatchNorm was folded in
    input_ndim: int | None = None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features = check_int(in_features, "in_features", 0)
        self.out_features = check_int(out_features, "out_features", 0)
        shape = (self.out_features, self.in_features)
        weight, bias_value = init_weight_and_bias(shape, self.out_features if bias else None, dtype)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias_value)

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply to the last axis of `input`."""
        if self.input_ndim is not None:
            check_input_ndim(self, input)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class Identity(Module):
    """Returns its input; takes any arguments, so that it can stand in for another module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, input: Any) -> Any:
        """`input`, the same object."""
        return input


class Flatten(Module):
    """Merges the axes `start_dim` to `end_dim` into one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, input: Any) -> NDArray[Any]:
        """Reshape `input`."""
        return F.flatten(input, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Dropout(Module):
    """The identity in eval; in training what `functional.dropout` does. `p` is in [0, 1]."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability between 0 and 1, got {p}")
        self.p = p
        self.inplace = inplace

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply to `input`, which is never written."""
        return F.dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"


class Upsample(Module):
    """Resizes the axes after the second to `size` or by `scale_factor`; nearest or bilinear."""

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        if isinstance(scale_factor, Sequence):
            self.scale_factor: Any = tuple(float(factor) for factor in scale_factor)
        else:
            self.scale_factor = None if scale_factor is None else float(scale_factor)
        self.mode = mode
        self.align_corners = align_corners

    def forward(self, input: Any) -> NDArray[Any]:
        """Resize `input`; the errors are those of `functional.interpolate`."""
        return F.interpolate(input, self.size, self.scale_factor, self.mode, self.align_corners)

    def extra_repr(self) -> str:
        what = f"size={self.size}"
        if self.scale_factor is not None:
            what = f"scale_factor={self.scale_factor}"
        return f"{what}, mode={self.mode!r}"
