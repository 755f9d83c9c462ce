# SPDX-License-Identifier: BSD-3-Clause
"""`Parameter`: an ndarray that a module registers as one of its parameters."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Parameter(np.ndarray[Any, np.dtype[Any]]):
    """An ndarray carrying `requires_grad`, sharing memory with the array it is made from.

    `data` is an ndarray, a CPU `torch.Tensor` or another DLPack exporter. Views and copies,
    deepcopy and pickle keep the class and the flag; the result of arithmetic is a plain array.
    Raises `TypeError` if `data` is not an array, or is not floating point while `requires_grad`.

    >>> weight = Parameter(np.ones(3, np.float32), requires_grad=False)
    >>> weight[:2].requires_grad, type(weight * 2).__name__
    (False, 'ndarray')
    """

    requires_grad: bool

    def __new__(cls, data: Any, requires_grad: bool = True) -> Self:
        array = as_ndarray(data, "data")
        if requires_grad and array.dtype.kind not in "fcV":  # V: ml_dtypes.bfloat16
            raise TypeError(
                f"data: expected a floating-point array, got dtype {array.dtype}; "
                "other types need requires_grad=False"
            )
        parameter = array.view(cls)
        parameter.requires_grad = bool(requires_grad)
        return parameter

    def __array_finalize__(self, source: Any) -> None:
        self.requires_grad = getattr(source, "requires_grad", True)

    def __array_wrap__(
        self, array: NDArray[Any], context: Any = None, return_scalar: bool | None = None
    ) -> Any:
        if array is self:  # an in-place operation, or out=self
            return self
        plain = np.asarray(array)
        # NumPy 1 passes no return_scalar and leaves turning 0-d results into scalars to us.
        scalar = plain.ndim == 0 if return_scalar is None else return_scalar
        return plain[()] if scalar else plain

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set the flag in place and return this parameter."""
        self.requires_grad = bool(requires_grad)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The nested plain array is what pickle protocol 5 can send out of band.
        return _rebuild, (type(self), self.view(np.ndarray), self.requires_grad)


def _rebuild(cls: type[Parameter], array: NDArray[Any], requires_grad: bool) -> Parameter:
    parameter = array.view(cls)
    parameter.requires_grad = requires_grad
    return parameter


def as_ndarray(value: Any, name: str) -> NDArray[Any]:
    """`value` itself if it is an ndarray, else an ndarray sharing its memory.

    Takes what exports DLPack on the CPU, `torch.Tensor` (detached) included; `TypeError` naming
    `name` for the rest, nested lists too.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach()
        try:
            return np.asarray(value.numpy())
        except TypeError as error:  # a device or a dtype that NumPy cannot see
            raise TypeError(f"{name}: cannot be read by NumPy: {error}") from error
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)
    raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
