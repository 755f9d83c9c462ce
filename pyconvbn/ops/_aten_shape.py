# SPDX-License-Identifier: BSD-3-Clause
"""ATen's operators that move elements or only look at them in another shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ._aten_util import as_array, axis_of

_Array = NDArray[Any]
SHAPE: dict[str, Callable[..., Any]] = {}


def _row(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            SHAPE[f"aten.{name}"] = function
        return function

    return put


# -- another shape -----------------------------------------------------------------------------------------------
@_row("view.default")
def _view(self: Any, size: Sequence[int]) -> _Array:
    x = as_array(self, "self")
    y = x.reshape(tuple(size))
    if y.size and not np.may_share_memory(x, y):
        raise ValueError(f"size: {x.shape} with strides {x.strides} has no view of shape {tuple(size)}; use reshape")
    return y


@_row("_unsafe_view.default")
def _unsafe_view(self: Any, size: Sequence[int]) -> _Array:
    return as_array(self, "self").reshape(tuple(size)).copy()


@_row("reshape.default")
def _reshape(self: Any, shape: Sequence[int]) -> _Array:
    return as_array(self, "self").reshape(tuple(shape))


@_row("view_as.default")
def _view_as(self: Any, other: Any) -> _Array:
    return _view(self, as_array(other, "other").shape)


@_row("flatten.using_ints")
def _flatten(self: Any, start_dim: int = 0, end_dim: int = -1) -> _Array:
    x = as_array(self, "self")
    if x.ndim == 0:
        return x.reshape(1)
    first, last = axis_of(start_dim, x.ndim, "start_dim"), axis_of(end_dim, x.ndim, "end_dim")
    if first > last:
        raise ValueError(f"start_dim: expected at most end_dim ({end_dim}), got {start_dim}")
    joined = int(np.prod(x.shape[first : last + 1], dtype=np.int64))
    return x.reshape(*x.shape[:first], joined, *x.shape[last + 1 :])


@_row("unsqueeze.default")
def _unsqueeze(self: Any, dim: int) -> _Array:
    x = as_array(self, "self")
    return np.expand_dims(x, axis_of(dim, x.ndim + 1))


@_row("squeeze.default")
def _squeeze(self: Any) -> _Array:
    return as_array(self, "self").squeeze()


def _squeeze_axes(x: _Array, dims: Sequence[int]) -> _Array:
    axes = {axis_of(d, x.ndim) for d in dims} if x.ndim else set()
    return x.squeeze(tuple(sorted(a for a in axes if x.shape[a] == 1)))


@_row("squeeze.dim")
def _squeeze_dim(self: Any, dim: int) -> _Array:
    return _squeeze_axes(as_array(self, "self"), [dim])


@_row("squeeze.dims")
def _squeeze_dims(self: Any, dim: Sequence[int]) -> _Array:
    return _squeeze_axes(as_array(self, "self"), [*dim])


# -- axes --------------------------------------------------------------------------------------------------------
@_row("permute.default")
def _permute(self: Any, dims: Sequence[int]) -> _Array:
    return as_array(self, "self").transpose(tuple(dims))


@_row("transpose.int")
def _transpose(self: Any, dim0: int, dim1: int) -> _Array:
    x = as_array(self, "self")
    return x.swapaxes(axis_of(dim0, x.ndim, "dim0"), axis_of(dim1, x.ndim, "dim1")) if x.ndim else x


@_row("t.default")
def _t(self: Any) -> _Array:
    x = as_array(self, "self")
    if x.ndim > 2:
        raise ValueError(f"self: expected at most 2 axes, got {x.ndim}")
    return x.T


# -- parts -------------------------------------------------------------------------------------------------------
def _along(x: _Array, axis: int, index: Any) -> _Array:
    return x[(slice(None),) * axis + (index,)]


@_row("slice.Tensor")
def _slice(self: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> _Array:
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    x = as_array(self, "self")
    return _along(x, axis_of(dim, x.ndim), slice(start, end, step))


@_row("select.int")
def _select(self: Any, dim: int, index: int) -> _Array:
    x = as_array(self, "self")
    axis = axis_of(dim, x.ndim)
    if x.ndim == 0 or not -x.shape[axis] <= index < x.shape[axis]:
        raise IndexError(f"index: {index} is out of bounds for axis {axis} of {x.shape}")
    index %= x.shape[axis]
    return np.squeeze(_along(x, axis, slice(index, index + 1)), axis)  # a view, also of a 1-d array


@_row("narrow.default")
def _narrow(self: Any, dim: int, start: int, length: int) -> _Array:
    x = as_array(self, "self")
    axis = axis_of(dim, x.ndim)
    size = x.shape[axis]
    first = start + size if start < 0 else start
    if length < 0 or first < 0 or first + length > size:
        raise ValueError(f"start, length: expected a range within {size}, got {start} and {length}")
    return _along(x, axis, slice(first, first + length))


def _cut(x: _Array, axis: int, sizes: Sequence[int]) -> list[_Array]:
    parts, at = [], 0
    for size in sizes:
        parts.append(_along(x, axis, slice(at, at + size)))
        at += size
    return parts


def _equal_parts(x: _Array, axis: int, size: int) -> list[_Array]:
    total = x.shape[axis]
    if size < 1:
        if total:
            raise ValueError(f"split_size: expected at least 1, got {size}")
        return [x]
    count = max(1, -(-total // size))
    return _cut(x, axis, [min(size, total - i * size) for i in range(count)])


@_row("split.Tensor")
def _split(self: Any, split_size: int, dim: int = 0) -> list[_Array]:
    x = as_array(self, "self")
    return _equal_parts(x, axis_of(dim, x.ndim), split_size)


@_row("split_with_sizes.default")
def _split_sizes(self: Any, split_sizes: Sequence[int], dim: int = 0) -> list[_Array]:
    x = as_array(self, "self")
    axis = axis_of(dim, x.ndim)
    if sum(split_sizes) != x.shape[axis] or any(s < 0 for s in split_sizes):
        raise ValueError(f"split_sizes: expected sizes with sum {x.shape[axis]}, got {[*split_sizes]}")
    return _cut(x, axis, split_sizes)


@_row("chunk.default")
def _chunk(self: Any, chunks: int, dim: int = 0) -> list[_Array]:
    if chunks < 1:
        raise ValueError(f"chunks: expected at least 1, got {chunks}")
    x = as_array(self, "self")
    axis = axis_of(dim, x.ndim)
    size = -(-x.shape[axis] // chunks)
    return _cut(x, axis, [0] * chunks) if size == 0 else _equal_parts(x, axis, size)


@_row("unbind.int")
def _unbind(self: Any, dim: int = 0) -> list[_Array]:
    x = as_array(self, "self")
    axis = axis_of(dim, x.ndim)
    return [_select(x, axis, i) for i in range(x.shape[axis])]


@_row("index.Tensor")
def _index(self: Any, indices: Sequence[Any]) -> _Array:
    key = tuple(slice(None) if i is None else as_array(i, "indices") for i in indices)
    return np.asarray(as_array(self, "self")[key])


# -- joined and repeated -----------------------------------------------------------------------------------------
def _arrays(tensors: Sequence[Any]) -> list[_Array]:
    arrays = [as_array(t, f"tensors[{i}]") for i, t in enumerate(tensors)]
    if not arrays:
        raise ValueError("tensors: expected at least one array, got none")
    return arrays


@_row("cat.default")
def _cat(tensors: Sequence[Any], dim: int = 0) -> _Array:
    arrays = _arrays(tensors)
    full = [a for a in arrays if a.shape != (0,)] or arrays[:1]  # PyTorch skips empty 1-d arrays
    return np.concatenate(full, axis=axis_of(dim, full[0].ndim))


@_row("stack.default")
def _stack(tensors: Sequence[Any], dim: int = 0) -> _Array:
    arrays = _arrays(tensors)
    return np.stack(arrays, axis=axis_of(dim, arrays[0].ndim + 1))


@_row("expand.default")
def _expand(self: Any, size: Sequence[int], *, implicit: bool = False) -> _Array:
    x = as_array(self, "self")
    extra = len(size) - x.ndim
    if extra < 0:
        raise ValueError(f"size: expected at least {x.ndim} entries, got {len(size)}")
    wanted = tuple(x.shape[i - extra] if s == -1 and i >= extra else s for i, s in enumerate(size))
    return np.broadcast_to(x, wanted)


@_row("expand_as.default")
def _expand_as(self: Any, other: Any) -> _Array:
    return _expand(self, as_array(other, "other").shape)


@_row("repeat.default")
def _repeat(self: Any, repeats: Sequence[int]) -> _Array:
    x = as_array(self, "self")
    if len(repeats) < x.ndim:
        raise ValueError(f"repeats: expected at least {x.ndim} entries, got {len(repeats)}")
    return np.tile(x, tuple(repeats))


@_row("flip.default")
def _flip(self: Any, dims: Sequence[int]) -> _Array:
    return np.flip(as_array(self, "self"), tuple(dims)).copy()


@_row("roll.default")
def _roll(self: Any, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> _Array:
    axes = tuple([dims] if isinstance(dims, int) else dims)
    moved = [shifts] if isinstance(shifts, int) else [*shifts]
    if not axes:
        return np.roll(as_array(self, "self"), moved[0])
    return np.roll(as_array(self, "self"), moved, axes)


@_row("pad.default")
def _pad(self: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> _Array:
    return _core.pad(self, [*pad], mode, 0.0 if value is None else value, None)


@_row("constant_pad_nd.default")
def _constant_pad(self: Any, pad: Sequence[int], value: float = 0) -> _Array:
    return _core.pad(self, [*pad], "constant", float(value), None)


# -- channels and space ------------------------------------------------------------------------------------------
@_row("pixel_shuffle.default")
def _pixel_shuffle(self: Any, upscale_factor: int) -> _Array:
    x, r = as_array(self, "self"), upscale_factor
    if x.ndim < 3 or r < 1 or x.shape[-3] % (r * r):
        raise ValueError(f"upscale_factor: expected channels of {x.shape} divisible by {r}**2")
    *batch, c, h, w = x.shape
    n = len(batch)
    parts = x.reshape(*batch, c // (r * r), r, r, h, w)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return parts.transpose(order).reshape(*batch, c // (r * r), h * r, w * r)


@_row("pixel_unshuffle.default")
def _pixel_unshuffle(self: Any, downscale_factor: int) -> _Array:
    x, r = as_array(self, "self"), downscale_factor
    if x.ndim < 3 or r < 1 or x.shape[-1] % r or x.shape[-2] % r:
        raise ValueError(f"downscale_factor: expected a divisor of the last two sizes of {x.shape}, got {r}")
    *batch, c, h, w = x.shape
    n = len(batch)
    parts = x.reshape(*batch, c, h // r, r, w // r, r)
    return parts.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3).reshape(*batch, c * r * r, h // r, w // r)


@_row("channel_shuffle.default")
def _channel_shuffle(self: Any, groups: int) -> _Array:
    x = as_array(self, "self")
    if x.ndim < 3 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the channels of {x.shape}, got {groups}")
    n, c = x.shape[:2]
    return x.reshape(n, groups, c // groups, -1).swapaxes(1, 2).reshape(x.shape)


# -- the same ----------------------------------------------------------------------------------------------------
@_row("contiguous.default")
def _contiguous(self: Any, *, memory_format: Any = 0) -> _Array:
    x = as_array(self, "self")
    return x if x.flags.c_contiguous else x.copy(order="C")


@_row("detach.default", "alias.default")
def _detach(self: Any) -> _Array:
    return as_array(self, "self")


@_row("detach_.default")
def _detach_(self: Any) -> _Array:
    return as_array(self, "self")


@_row("sym_size.int")
def _sym_size(self: Any, dim: int) -> int:
    x = as_array(self, "self")
    return int(x.shape[axis_of(dim, x.ndim)])
