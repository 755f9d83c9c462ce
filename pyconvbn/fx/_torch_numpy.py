# SPDX-License-Identifier: BSD-3-Clause
"""Tensor operations with torch's meaning over arrays, for what is neither in `functional` nor in `ops.aten`.

Module-level functions, so that graphs that call them can be pickled and printed. None returns a view: the passes,
which do not know these functions, may take every result for new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import functional as F

_Array = NDArray[Any]


def _axes(dim: Any) -> Any:
    """torch's dims as NumPy's axis; no dims mean all."""
    if isinstance(dim, (tuple, list)):
        return tuple(dim) if dim else None
    return dim


# -- facts ---------------------------------------------------------------------------------------------------------
def is_floating_point(input: _Array) -> bool:
    """Has it a float dtype?"""
    return input.dtype.kind == "f"


def check(condition: Any, message: str) -> None:
    """torch._assert."""
    if not condition:
        raise AssertionError(message)


def check_none(value: Any, message: str) -> None:
    """An argument that tracing took for None."""
    if value is not None:
        raise AssertionError(message)


# -- shapes --------------------------------------------------------------------------------------------------------
def movedim(input: _Array, source: Any, destination: Any) -> _Array:
    """Axes `source` put at `destination`."""
    return np.moveaxis(input, source, destination).copy()


def unflatten(input: _Array, dim: int, sizes: Sequence[int]) -> _Array:
    """One axis cut into `sizes`, of which one may be -1."""
    dim %= input.ndim
    known = -int(np.prod(sizes)) if -1 in sizes else 0
    whole = tuple(input.shape[dim] // known if size == -1 else size for size in sizes)
    return np.array(input).reshape(*input.shape[:dim], *whole, *input.shape[dim + 1 :])


def to_dtype_of(input: _Array, other: _Array) -> _Array:
    """A copy in the dtype of `other`."""
    return input.astype(other.dtype)


# -- elementwise ---------------------------------------------------------------------------------------------------
def _quiet(function: Callable[..., Any], *args: Any) -> _Array:
    """Infinities and NaN come without NumPy's warnings, as from torch."""
    with np.errstate(all="ignore"):
        return np.asarray(function(*args))


def log1p(input: _Array) -> _Array:
    """`log(1 + x)`."""
    return _quiet(np.log1p, input)


def log2(input: _Array) -> _Array:
    """Logarithm to base 2."""
    return _quiet(np.log2, input)


def expm1(input: _Array) -> _Array:
    """`exp(x) - 1`."""
    return _quiet(np.expm1, input)


def sinh(input: _Array) -> _Array:
    """Hyperbolic sine."""
    return _quiet(np.sinh, input)


def cosh(input: _Array) -> _Array:
    """Hyperbolic cosine."""
    return _quiet(np.cosh, input)


def trunc(input: _Array) -> _Array:
    """Towards zero."""
    return np.asarray(np.trunc(input))


def isnan(input: _Array) -> _Array:
    """Elementwise."""
    return np.asarray(np.isnan(input))


def isinf(input: _Array) -> _Array:
    """Elementwise."""
    return np.asarray(np.isinf(input))


def isfinite(input: _Array) -> _Array:
    """Elementwise."""
    return np.asarray(np.isfinite(input))


def logsigmoid(input: _Array) -> _Array:
    """`-log(1 + exp(-x))`."""
    return np.asarray(-np.logaddexp(-input, input.dtype.type(0)))


def glu(input: _Array, dim: int = -1) -> _Array:
    """First half along `dim` times the sigmoid of the second. Source: Dauphin et al., arXiv 1612.08083."""
    if input.shape[dim] % 2:
        raise ValueError(f"input: expected an even size of axis {dim}, got {input.shape[dim]}")
    first, second = np.split(input, 2, axis=dim)
    return first * F.sigmoid(second)


def where(condition: _Array, input: Any, other: Any) -> _Array:
    """One of two numbers: float32 if one is a float, as torch's default dtype says."""
    dtype = np.float32 if isinstance(input, float) or isinstance(other, float) else None
    return np.where(condition, np.asarray(input, dtype), np.asarray(other, dtype))


# -- reductions ----------------------------------------------------------------------------------------------------
class ValuesIndices(NamedTuple):
    """Result of max and min along a dim."""

    values: _Array
    indices: _Array


def max_dim(input: _Array, dim: int, keepdim: bool = False) -> ValuesIndices:
    """Largest values along `dim`, and where they are."""
    return ValuesIndices(
        np.asarray(input.max(axis=dim, keepdims=keepdim)), np.asarray(input.argmax(axis=dim, keepdims=keepdim))
    )


def min_dim(input: _Array, dim: int, keepdim: bool = False) -> ValuesIndices:
    """Smallest values along `dim`, and where they are."""
    return ValuesIndices(
        np.asarray(input.min(axis=dim, keepdims=keepdim)), np.asarray(input.argmin(axis=dim, keepdims=keepdim))
    )


def min(input: _Array) -> _Array:
    """The smallest value."""
    return np.asarray(input.min())


def std(input: _Array, dim: Any = None, correction: float = 1, keepdim: bool = False) -> _Array:
    """Standard deviation with `n - correction` as divisor."""
    return _quiet(lambda x: x.std(axis=_axes(dim), ddof=correction, keepdims=keepdim), input)


def normalize(input: _Array, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> _Array:
    """`x / max(norm(x), eps)` along `dim`."""
    norm = np.power(np.power(np.abs(input), p).sum(axis=dim, keepdims=True), 1 / p)
    return input / np.maximum(norm, input.dtype.type(eps))


def einsum(equation: str, *operands: Any) -> _Array:
    """Sums of products by Einstein's rule."""
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    return np.array(np.einsum(equation, *operands, optimize=True))
