# SPDX-License-Identifier: BSD-3-Clause
"""Random programs over everything that freezing touches, built node by node while they run.

Each step is executed when it is added, so shapes are known and what cannot run is left out. Values are small integers,
halves and quarters, BatchNorms scale by powers of two: sums are exact in any order, and folding shows no rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyconvbn import nn

C = 4  # channels everywhere
LIMIT = 512.0


# ---- what nobody knows -------------------------------------------------------------------------------------------------


def unknown(x: Any) -> Any:
    return x + 1


def unknown_view(x: Any) -> Any:
    return x[...]


def unknown_write(x: Any) -> Any:
    x += 1
    return x * 2


class Scale(nn.Module):
    """A user's layer with state that each call writes."""

    def __init__(self, dtype: Any) -> None:
        super().__init__()
        self.register_buffer("count", np.zeros((), dtype))
        self.weight = nn.Parameter(np.asarray([1, 2, -1, 2], dtype).reshape(C, 1, 1))

    def forward(self, x: Any) -> Any:
        self.count += 1
        return x * self.weight + self.count


class Reads(nn.Module):
    """A user's layer that reads an array it was given."""

    def __init__(self, array: Any) -> None:
        super().__init__()
        self.table = array

    def forward(self, x: Any) -> Any:
        return x + self.table.sum()


class Shouting(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) + 1


def hook(module: Any, args: Any, result: Any) -> Any:
    return result + 2


# ---- numbers -----------------------------------------------------------------------------------------------------------


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def on_grid(value: Any) -> bool:
    """Small multiples of 1/64 only."""
    for leaf in leaves(value):
        array = np.asarray(leaf)
        if array.dtype.kind == "f":
            scaled = array.astype(np.float64) * 64
            if not np.array_equal(scaled, np.rint(scaled)):
                return False
    return True


def small(value: Any) -> bool:
    for leaf in leaves(value):
        array = np.asarray(leaf)
        if array.dtype.kind in "fiu" and array.size:
            if not np.all(np.isfinite(array)) or np.abs(array.astype(np.float64)).max() > LIMIT:
                return False
    return True


def arrays_of(root: Any) -> dict[str, Any]:
    """Every array of a module tree by path, tied ones under each of their names."""
    found: dict[str, Any] = {}
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, np.ndarray):
                found[f"{path}.{name}" if path else name] = value
    return found
