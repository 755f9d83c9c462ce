# SPDX-License-Identifier: BSD-3-Clause
"""Operators that go by strides: as_strided and its kin, copies in a memory format, and prims.force_stride_order.

Strides and storage offsets count elements, as PyTorch's do. The *storage* of an array is the memory of its ultimate
owner: the last ndarray on its chain of `base`s, from that one's lowest byte to its highest, or the tensor's storage if
that array shows one. What reaches outside it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided as _view_of_memory
from numpy.typing import NDArray

from ._aten_util import as_array

_Array = NDArray[Any]
STRIDED: dict[str, Callable[..., Any]] = {}

#: How a graph may write a memory format: its name, `torch.<name>`, or PyTorch's number.
_FORMATS = {"0": "contiguous_format", "1": "preserve_format", "2": "channels_last", "3": "channels_last_3d"}


def _row(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        STRIDED[name] = function
        return function

    return put


# -- storage -----------------------------------------------------------------------------------------------------
def _owner(x: _Array) -> _Array:
    while True:
        base = x.base
        if not isinstance(base, np.ndarray):
            base = getattr(base, "base", None)  # numpy.lib.stride_tricks has an object of its own in between
            if not isinstance(base, np.ndarray):
                return x
        x = base


class _TensorMemory:
    """The whole storage of a tensor that `base`, an array, shows; NumPy makes an array of it."""

    def __init__(self, base: _Array, storage: Any) -> None:
        self.base = base
        data = (storage.data_ptr(), not base.flags.writeable)
        self.__array_interface__ = {"data": data, "shape": (storage.nbytes(),), "typestr": "|u1", "version": 3}


def _address(x: _Array) -> int:
    return int(x.__array_interface__["data"][0])


def _storage(x: _Array) -> tuple[_Array, int]:
    """The bytes of the storage of `x`, as a 1-d view, and where in them its first element is."""
    owner = _owner(x)
    base: Any = owner.base
    if hasattr(base, "untyped_storage"):
        memory = np.asarray(_TensorMemory(owner, base.untyped_storage()))
        return memory, _address(x) - _address(memory) if x.size else 0
    if owner.flags.c_contiguous:
        low, memory = owner, owner.reshape(-1)
    else:
        low = owner[tuple(slice(-1, None) if step < 0 else slice(1) for step in owner.strides)]
        reach = sum((size - 1) * abs(step) for size, step in zip(owner.shape, owner.strides)) if owner.size else 0
        memory = low.reshape(-1).view(np.uint8)
        if memory.size:
            memory = _view_of_memory(memory, (reach + owner.itemsize,), (1,))
    return memory.view(np.uint8), _address(x) - _address(low)


def storage_offset(x: _Array) -> int:
    """How many elements of its storage come before the first of `x`."""
    return _storage(x)[1] // max(x.itemsize, 1)


def copy_storage(x: _Array, memories: dict[int, _Array]) -> _Array:
    """A copy of `x` together with its storage; `memories` has those made before, so that what shares memory still does."""
    if x.dtype.hasobject or not x.size:
        return x.copy()
    memory, first = _storage(x)
    low = _address(memory)
    if low not in memories:
        memories[low] = memory.copy()
    return np.ndarray(x.shape, x.dtype, memories[low], first, x.strides)


def _window(
    memory: _Array, first: int, x: _Array, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> _Array:
    """Elements of x's dtype in `memory`, in which x begins at byte `first`."""
    shape, steps = tuple(size), tuple(stride)
    if len(shape) != len(steps):
        raise ValueError(f"stride: expected {len(shape)} entries, as many as size, got {len(steps)}")
    if any(n < 0 for n in shape):
        raise ValueError(f"size: expected no negative entry, got {[*shape]}")
    if any(s < 0 for s in steps):
        raise ValueError(f"stride: expected no negative entry, got {[*steps]}")
    if offset is not None and offset < 0:
        raise ValueError(f"storage_offset: expected at least 0, got {offset}")
    width = x.itemsize
    start = first if offset is None else offset * width
    if 0 in shape:
        return np.ndarray(shape, x.dtype, memory[:0])
    last = start + width * (1 + sum((n - 1) * s for n, s in zip(shape, steps)))
    if last > memory.size:
        raise ValueError(
            f"size, stride, storage_offset: expected at most the {memory.size // width} elements of the storage, "
            f"got sizes {[*shape]} with strides {[*steps]} from element {start // width}, which end at {last // width}"
        )
    return np.ndarray(shape, x.dtype, memory, start, tuple(s * width for s in steps))


@_row("aten.as_strided.default")
def _as_strided(self: Any, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> _Array:
    x = as_array(self, "self")
    y = _window(*_storage(x), x, size, stride, storage_offset)
    if not x.flags.writeable:
        y.flags.writeable = False
    return y


@_row("aten.as_strided_.default")
def _as_strided_(self: Any, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> _Array:
    return _as_strided(self, size, stride, storage_offset)


@_row("aten.as_strided_scatter.default")
def _as_strided_scatter(
    self: Any, src: Any, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> _Array:
    x, values = as_array(self, "self"), as_array(src, "src")
    memory, first = _storage(x)
    memory = memory.copy()
    window = _window(memory, first, x, size, stride, storage_offset)
    if values.shape != window.shape:
        raise ValueError(f"src: expected shape {window.shape}, that of size, got {values.shape}")
    window[...] = values
    return np.ndarray(x.shape, x.dtype, memory, first if x.size else 0, x.strides)


# -- layouts -----------------------------------------------------------------------------------------------------
def dense_strides(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Strides, in elements, of an array without gaps whose axes lie in memory in the order that `stride` says.

    Of equal strides the earlier axis is the outer one; an axis of one entry has no say.
    """
    order = sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: -stride[a])
    dense, step = [1] * len(shape), 1
    for axis in reversed(order):
        dense[axis] = step
        step *= max(shape[axis], 1)
    for axis in range(len(shape) - 1, -1, -1):  # an axis of one entry: as if it were the next one's outer neighbour
        if shape[axis] == 1:
            dense[axis] = dense[axis + 1] * max(shape[axis + 1], 1) if axis + 1 < len(shape) else 1
    return dense


@_row("prims.force_stride_order.default")
def _force_stride_order(input: Any, stride: Sequence[int]) -> _Array:
    x = as_array(input, "input")
    if len(stride) != x.ndim:
        raise ValueError(f"stride: expected {x.ndim} entries, one for each axis of input, got {len(stride)}")
    if any(s < 0 for s in stride):
        raise ValueError(f"stride: expected no negative entry, got {[*stride]}")
    dense = [s * x.itemsize for s in dense_strides(x.shape, stride)]
    if x.size <= 1 or all(n == 1 or have == want for n, have, want in zip(x.shape, x.strides, dense)):
        return x
    y = np.ndarray(x.shape, x.dtype, np.empty(x.size, x.dtype), 0, tuple(dense))
    y[...] = x
    return y


def memory_format_of(value: Any) -> str:
    """The name of a memory format: preserve_format for None, else what a graph carries without a `torch.` before it."""
    if value is None:
        return "preserve_format"
    text = str(value).removeprefix("torch.")
    name = _FORMATS.get(text, text)
    if name not in _FORMATS.values():
        raise ValueError(f"memory_format: expected one of {', '.join(_FORMATS.values())} or None, got {value!r}")
    return name


@_row("aten.clone.default")
def _clone(self: Any, *, memory_format: Any = None) -> _Array:
    x, name = as_array(self, "self"), memory_format_of(memory_format)
    if not name.startswith("channels_last"):
        return x.copy(order="C" if name == "contiguous_format" else "K")
    ndim = 4 if name == "channels_last" else 5
    if x.ndim != ndim:
        raise ValueError(f"memory_format: {name} is for arrays of {ndim} axes, got {x.ndim}")
    return np.moveaxis(np.array(np.moveaxis(x, 1, -1), order="C"), -1, 1)
