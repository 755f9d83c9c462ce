# SPDX-License-Identifier: BSD-3-Clause
"""How the ATen operators take their arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core

_Array = NDArray[Any]


def as_array(value: Any, name: str) -> _Array:
    """A plain ndarray over the value's memory: any dtype for ndarrays and torch tensors, NumPy scalars become 0-d."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if hasattr(value, "detach") and hasattr(value, "numpy"):
        return np.asarray(value.detach().numpy())
    return _core.as_array(value, name)


def operand(value: Any, name: str, beside: _Array) -> Any:
    """The other side of arithmetic with `beside`: an array, or a Python number as the array's dtype takes it.

    A Python number never changes the dtype of a floating array, nor an int that of an integer one, on any NumPy; a
    float beside integers is PyTorch's default dtype, float32.
    """
    if isinstance(value, bool | int | float):
        kind = beside.dtype.kind
        if kind == "f" or (kind in "iu" and isinstance(value, int)):
            with np.errstate(over="ignore"):
                return beside.dtype.type(value)
        return np.float32(value) if isinstance(value, float) else value
    return as_array(value, name)


def operands(x: _Array, other: Any, name: str) -> tuple[Any, Any]:
    """Both sides of arithmetic; beside floating numbers integers take their dtype, as in PyTorch."""
    y = operand(other, name, x)
    kinds = x.dtype.kind, np.asarray(y).dtype.kind
    if kinds[0] == "f" and kinds[1] in "iub":
        y = y.astype(x.dtype)
    elif kinds[1] == "f" and kinds[0] in "iub":
        x = x.astype(y.dtype)
    return x, y


def writable(value: Any, name: str) -> _Array:
    """The array itself, to be written in place."""
    x = value if isinstance(value, np.ndarray) else as_array(value, name)
    if not x.flags.writeable:
        raise ValueError(f"{name}: expected an array that can be written, got a read-only one")
    return x


def store(x: _Array, value: Any) -> _Array:
    """x[...] = value of exactly x's shape: an in-place operator does not drop or repeat axes."""
    if np.shape(value) != x.shape:
        raise ValueError(f"self: expected the result's shape {np.shape(value)} to be written in place, got {x.shape}")
    x[...] = value
    return x


def dtype_of(dtype: Any, default: Any) -> np.dtype[Any]:
    """A NumPy dtype from what a graph may carry: None, a dtype, its name, or a torch dtype."""
    if dtype is None:
        return np.dtype(default)
    text = str(dtype)
    return np.dtype(text.removeprefix("torch.")) if text.startswith("torch.") else np.dtype(dtype)


def axis_of(dim: int, ndim: int, name: str = "dim") -> int:
    """`dim` counted from the front; an axis of a 0-d array may be called 0 or -1."""
    bound = max(ndim, 1)
    if not -bound <= dim < bound:
        raise ValueError(f"{name}: expected between {-bound} and {bound - 1}, got {dim}")
    return dim % bound


def pair_sizes(size: int | Sequence[int], nd: int) -> int | tuple[int, ...]:
    """An output size for nd axes: one int for all, or nd of them."""
    if isinstance(size, int):
        return size
    sizes = tuple(size)
    return sizes * nd if len(sizes) == 1 else sizes
