# SPDX-License-Identifier: BSD-3-Clause
"""Activation modules. `inplace` is kept and printed, but no module ever writes its input."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .. import functional as F
from .module import Module


class _InplaceActivation(Module):
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class ReLU(_InplaceActivation):
    """`max(x, 0)`."""

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.relu(input)


class ReLU6(_InplaceActivation):
    """`min(max(x, 0), 6)`."""

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.relu6(input)


class SiLU(_InplaceActivation):
    """`x * sigmoid(x)`."""

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.silu(input)


class Hardswish(_InplaceActivation):
    """`x * relu6(x + 3) / 6`."""

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.hardswish(input)

    def extra_repr(self) -> str:
        return ""  # as PyTorch, which prints no argument here


class LeakyReLU(_InplaceActivation):
    """`x` where positive, `negative_slope * x` elsewhere."""

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        super().__init__(inplace)
        self.negative_slope = negative_slope

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.leaky_relu(input, self.negative_slope)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}" + (", inplace=True" if self.inplace else "")


class Sigmoid(Module):
    """`1 / (1 + exp(-x))`."""

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.sigmoid(input)


class GELU(Module):
    """`x * Phi(x)`, exactly (`approximate='none'`) or by the tanh formula (`'tanh'`)."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, input: Any) -> NDArray[Any]:
        """Apply elementwise."""
        return F.gelu(input, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
