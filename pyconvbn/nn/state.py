# SPDX-License-Identifier: BSD-3-Clause
"""Saving and loading the arrays of a module tree under PyTorch's key names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .parameter import Parameter, as_ndarray

if TYPE_CHECKING:
    from .module import Module


class StateDictError(ValueError, RuntimeError):
    """A state_dict does not fit; a `RuntimeError` too, as PyTorch code expects to catch."""


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict(strict=False)` did not find, and what it did not use."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def refuse_erased(value: Any, operation: str) -> None:
    """RuntimeError if `value` is an `ErasedArray`."""
    if type(value).__name__ == "ErasedArray":
        from .._erased import ErasedArray, refuse

        if isinstance(value, ErasedArray):
            refuse(value, operation)


def _source(value: Any, key: str) -> NDArray[Any]:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no such type; widening is exact
            value = value.float()
        value = value.numpy()
    if isinstance(value, np.generic):
        value = np.asarray(value)
    return as_ndarray(value, f"state_dict[{key!r}]")


def _slots(root: Module, prefix: str) -> Iterator[tuple[str, Module, str]]:
    """(key, owner, attribute) of everything saved: module by module, parameters first."""
    for path, module in root.named_modules(prefix=prefix, remove_duplicate=False):
        for name in module.saved_names():
            yield f"{path}.{name}" if path else name, module, name


def collect(root: Module, prefix: str, keep_vars: bool) -> dict[str, Any]:
    """The work of `Module.state_dict`."""
    result = {}
    for key, module, name in _slots(root, prefix.removesuffix(".")):
        array = getattr(module, name)
        refuse_erased(array, "state_dict")
        result[key] = array if keep_vars else array.view(np.ndarray)
    return result


def load(
    root: Module, state_dict: Mapping[str, Any], strict: bool, assign: bool
) -> IncompatibleKeys:
    """The work of `Module.load_state_dict`: check everything, then copy."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    slots = list(_slots(root, ""))
    for _, module, name in slots:
        refuse_erased(getattr(module, name), "load_state_dict")
    known = {key for key, _, _ in slots}
    versioned = hasattr(state_dict, "_metadata")
    missing = [
        key
        for key, _, name in slots
        if key not in state_dict and (versioned or name != "num_batches_tracked")
    ]
    unexpected = [key for key in state_dict if key not in known]
    problems = []
    if strict and missing:
        problems.append("missing keys: " + ", ".join(missing))
    if strict and unexpected:
        problems.append("unexpected keys: " + ", ".join(unexpected))
    loads = []
    for key, module, name in slots:
        if key not in state_dict:
            continue
        current, value = getattr(module, name), _source(state_dict[key], key)
        if value.shape != current.shape:
            problems.append(f"{key}: expected shape {current.shape}, got {value.shape}")
        elif not assign and not current.flags.writeable:
            problems.append(f"{key}: the module's array is read-only")
        elif value.dtype.kind not in "biufV":
            raise TypeError(f"state_dict[{key!r}]: expected real numbers, got {value.dtype}")
        loads.append((module, name, current, value))
    if problems:
        raise StateDictError(
            f"state_dict does not fit {type(root).__name__}:\n  " + "\n  ".join(problems)
        )
    for module, name, current, value in loads:
        if not assign:
            with np.errstate(all="ignore"):
                np.copyto(current, value, casting="unsafe")
        elif isinstance(current, Parameter) and not isinstance(value, Parameter):
            setattr(module, name, Parameter(value, current.requires_grad))
        else:
            setattr(module, name, value)
    return IncompatibleKeys(missing, unexpected)
