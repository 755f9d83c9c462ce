# SPDX-License-Identifier: BSD-3-Clause
"""Literals and tensors of torch as NumPy sees them. torch itself is found among the loaded modules, never imported."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..nn import Parameter

# torch dtypes that NumPy has, by name; the others (bfloat16, quantized, float8 ...) are refused where they occur.
_DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "bool", "complex64", "complex128",
)


class Unsupported(Exception):
    """Why one node or module cannot be taken over; collected, and reported together."""


def loaded_torch() -> ModuleType | None:
    """torch, if this process has imported it."""
    return sys.modules.get("torch")


class Values:
    """Turns what stands in a torch graph into NumPy terms, each tensor once.

    The arrays share memory with the tensors: the same tensor always gives the same array object, tensors that are
    views of one storage give arrays that are views of one memory.
    """

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch
        self._dtypes = {getattr(torch, name): np.dtype(name) for name in _DTYPES if hasattr(torch, name)}
        self._arrays: dict[int, tuple[Any, NDArray[Any]]] = {}  # id -> (tensor, kept alive; its array)

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def array(self, tensor: Any) -> NDArray[Any]:
        """The array on the tensor's memory; a Parameter for a torch Parameter."""
        known = self._arrays.get(id(tensor))
        if known is not None:
            return known[1]
        torch = self._torch
        if tensor.device.type != "cpu":
            raise Unsupported(f"a tensor on device {tensor.device}: only CPU tensors share memory; call .cpu() first")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise Unsupported(f"a tensor that is {'quantized' if tensor.is_quantized else tensor.layout}")
        if tensor.dtype not in self._dtypes:
            raise Unsupported(f"a tensor of {tensor.dtype}, which NumPy does not have; convert it, as by .float()")
        try:
            array = tensor.detach().numpy()
        except (RuntimeError, TypeError, ValueError) as error:  # fake and uninitialised tensors, conjugate views
            raise Unsupported(f"a tensor that NumPy cannot see: {error}") from error
        if isinstance(tensor, torch.nn.Parameter):
            array = Parameter(array, bool(tensor.requires_grad))
        self._arrays[id(tensor)] = (tensor, array)
        return array

    def literal(self, value: Any) -> Any:
        """A constant argument: plain Python values stay, dtypes become NumPy's, tensors arrays."""
        torch = self._torch
        if value is None or value is Ellipsis or type(value) in (bool, int, float, str, complex):
            return value
        if isinstance(value, torch.Tensor):
            return self.array(value)
        if isinstance(value, torch.dtype):
            if value not in self._dtypes:
                raise Unsupported(f"the dtype {value}, which NumPy does not have")
            return self._dtypes[value]
        if isinstance(value, torch.device):
            if value.type != "cpu":
                raise Unsupported(f"the device {value}: only the CPU is there")
            return "cpu"
        if isinstance(value, torch.memory_format) or isinstance(value, torch.layout):
            return str(value).removeprefix("torch.")
        if isinstance(value, (bool, int, float, str)):  # subclasses: enumerations and the like
            return value
        raise Unsupported(f"an argument of type {type(value).__module__}.{type(value).__qualname__}")
