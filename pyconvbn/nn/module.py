# SPDX-License-Identifier: BSD-3-Clause
"""`Module`: the base class of everything in `pyconvbn.nn`."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .parameter import Parameter
from .state import IncompatibleKeys, collect, load, refuse_erased

_PARAMETER, _BUFFER, _MODULE = "parameter", "buffer", "module"


class RemovableHandle:
    """What registering a hook returns; `remove()` takes the hook away."""

    _next = itertools.count()

    def __init__(self, hooks: dict[int, Callable[..., Any]]) -> None:
        self.id = next(RemovableHandle._next)
        self._hooks = hooks

    def remove(self) -> None:
        """Remove the hook; a second time does nothing."""
        self._hooks.pop(self.id, None)


class Module:
    """A named tree of modules, parameters (learned) and buffers (running statistics).

    Assigning a `Parameter` or a `Module` to a new attribute registers it; a registered name
    accepts any ndarray. The object assigned is the object stored, nothing is copied or wrapped, so
    arrays can be shared between modules. Write the computation in `forward`.

    >>> class Scale(Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.factor = Parameter(np.ones(1))
    ...     def forward(self, x):
    ...         return x * self.factor
    >>> [name for name, _ in Scale().named_parameters()]
    ['factor']
    """

    training: bool
    _kinds: dict[str, str]
    _not_saved: set[str]
    _hooked: bool = False  # one look at each call; true from the first hook on
    _forward_hooks: Mapping[int, Callable[..., Any]] = types.MappingProxyType({})
    _forward_pre_hooks: Mapping[int, Callable[..., Any]] = types.MappingProxyType({})

    def __init__(self) -> None:
        # Values live in the instance dict like any attribute; this only says which are special.
        object.__setattr__(self, "_kinds", {})
        object.__setattr__(self, "_not_saved", set())
        object.__setattr__(self, "training", True)

    def __copy__(self) -> Self:
        """A shallow copy: the same arrays and children, but a registry of its own."""
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.__dict__.update(_kinds=dict(self._kinds), _not_saved=set(self._not_saved))
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            if hooks in clone.__dict__:
                clone.__dict__[hooks] = dict(clone.__dict__[hooks])
        return clone

    # -- registration ------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = self.__dict__.get("_kinds")
        if isinstance(value, (Parameter, Module)):
            if kinds is None:
                raise AttributeError(f"{name}: assigned before Module.__init__() was called")
            kind = kinds.get(name)
            if isinstance(value, Module):
                kind = _MODULE
            elif kind in (None, _MODULE):
                kind = _PARAMETER
            object.__setattr__(self, name, value)
            kinds[name] = kind
            return
        kind = kinds.get(name) if kinds else None
        if kind is not None and value is not None:
            if kind == _MODULE or not isinstance(value, np.ndarray):
                refuse_erased(value, f"assigning it to {name!r}")
                raise TypeError(
                    f"{name}: is a {kind} of {type(self).__name__}, expected "
                    f"{'a Module' if kind == _MODULE else 'an ndarray'} or None, "
                    f"got {type(value).__name__}"
                )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        self._kinds.pop(name, None)
        self._not_saved.discard(name)

    def _register(self, name: str, value: Any, kind: str, wanted: type) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, got {type(name).__name__}")
        if not name or "." in name:
            raise KeyError(f"name: expected a name without dots, got {name!r}")
        if hasattr(self, name) and name not in self._kinds:
            raise KeyError(f"name: {name!r} is already an attribute of {type(self).__name__}")
        if value is not None and not isinstance(value, wanted):
            refuse_erased(value, f"registering it as {name!r}")
            raise TypeError(
                f"{name}: expected {wanted.__name__} or None, got {type(value).__name__}"
            )
        object.__setattr__(self, name, value)
        self._kinds[name] = kind

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter; None reserves the name. `KeyError` for a bad or taken name."""
        self._register(name, param, _PARAMETER, Parameter)

    def register_buffer(
        self, name: str, tensor: NDArray[Any] | None, persistent: bool = True
    ) -> None:
        """Add an array that is state but not learned; `persistent=False` keeps it unsaved."""
        self._register(name, tensor, _BUFFER, np.ndarray)
        (self._not_saved.discard if persistent else self._not_saved.add)(name)

    def register_module(self, name: str, module: Module | None) -> None:
        """Add a child module; None reserves the name. `KeyError` for a bad or taken name."""
        self._register(name, module, _MODULE, Module)

    add_module = register_module

    # -- walking -----------------------------------------------------------------------------

    def _own(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Own members of one kind in registration order, None included."""
        for name, member_kind in list(self._kinds.items()):
            if member_kind == kind and name in self.__dict__:  # not removed since the walk began
                yield name, self.__dict__[name]

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct children, each module once."""
        seen: set[int] = set()
        for name, child in self._own(_MODULE):
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                yield name, child

    def children(self) -> Iterator[Module]:
        """The direct children, each once."""
        return (child for _, child in self.named_children())

    def named_modules(
        self, memo: set[Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """(dotted name, module) of this module, named `prefix`, and all below it, parents first."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, child in self._own(_MODULE):
            if child is not None:
                dotted = f"{prefix}.{name}" if prefix else name
                yield from child.named_modules(memo, dotted, remove_duplicate)

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def _named_arrays(
        self, kind: str, prefix: str, recurse: bool, remove_duplicate: bool
    ) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        owners = (
            self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
            if recurse
            else [(prefix, self)]
        )
        for path, module in owners:
            for name, array in module._own(kind):
                if array is None or id(array) in seen:
                    continue
                if remove_duplicate:
                    seen.add(id(array))
                yield f"{path}.{name}" if path else name, array

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """(dotted name, array) of the parameters; a shared array appears once by default."""
        return self._named_arrays(_PARAMETER, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[NDArray[Any]]:
        """The parameters, each once."""
        return (array for _, array in self.named_parameters(recurse=recurse))

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """(dotted name, array) of the buffers; a shared array appears once by default."""
        return self._named_arrays(_BUFFER, prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[NDArray[Any]]:
        """The buffers, each once."""
        return (array for _, array in self.named_buffers(recurse=recurse))

    # -- access by dotted name ---------------------------------------------------------------

    def get_submodule(self, target: str) -> Module:
        """The module at a dotted path, `""` being this one; `AttributeError` if there is none."""
        module: Module = self
        for name in target.split(".") if target else ():
            if not hasattr(module, name):
                raise AttributeError(f"target {target!r}: {type(module).__name__} has no {name!r}")
            child = getattr(module, name)
            if not isinstance(child, Module):
                raise AttributeError(f"target {target!r}: {name!r} is not a Module")
            module = child
        return module

    def _get_array(self, target: str, kind: str) -> NDArray[Any]:
        path, _, name = target.rpartition(".")
        owner = self.get_submodule(path)
        if owner._kinds.get(name) != kind:
            raise AttributeError(
                f"target {target!r}: {type(owner).__name__} has no {kind} {name!r}"
            )
        array: NDArray[Any] = getattr(owner, name)
        return array

    def get_parameter(self, target: str) -> NDArray[Any]:
        """The parameter at a dotted path; `AttributeError` if there is none."""
        return self._get_array(target, _PARAMETER)

    def get_buffer(self, target: str) -> NDArray[Any]:
        """The buffer at a dotted path; `AttributeError` if there is none."""
        return self._get_array(target, _BUFFER)

    def set_submodule(self, target: str, module: Module, strict: bool = False) -> None:
        """Put `module` at a dotted path, replacing what is there; the very object is stored.

        The parents must exist. With `strict` the last name must exist as well. Raises `ValueError`
        for an empty target or a `module` that is none, `AttributeError` for a wrong path.
        """
        if not target:
            raise ValueError("target: expected the name of a submodule, got an empty string")
        if not isinstance(module, Module):
            raise ValueError(f"module: expected a Module, got {type(module).__name__}")
        path, _, name = target.rpartition(".")
        parent = self.get_submodule(path)
        if strict and not hasattr(parent, name):
            raise AttributeError(f"target {target!r}: {type(parent).__name__} has no {name!r}")
        if hasattr(parent, name) and parent._kinds.get(name) != _MODULE:
            raise AttributeError(f"target {target!r}: {name!r} is not a Module")
        setattr(parent, name, module)

    # -- saving and loading ------------------------------------------------------------------

    def saved_names(self) -> list[str]:
        """Own attributes that `state_dict` holds: parameters, then persistent buffers."""
        return [
            name
            for kind in (_PARAMETER, _BUFFER)
            for name, array in self._own(kind)
            if array is not None and name not in self._not_saved
        ]

    def state_dict(self, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """All parameters and persistent buffers by dotted name, sharing memory with the module.

        The values are plain ndarrays, fit for `numpy.savez`; with `keep_vars` they are the very
        objects that the modules hold.

        >>> list(BatchNorm1d(2, affine=False).state_dict())
        ['running_mean', 'running_var', 'num_batches_tracked']
        """
        return collect(self, prefix, keep_vars)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> IncompatibleKeys:
        """Copy arrays (or CPU tensors) by key into this module's own arrays, cast to their dtype.

        `assign=True` stores the given objects instead, as Parameters where a Parameter was (which
        share memory). Keys must match unless `strict=False`; a `num_batches_tracked` missing from
        a mapping without PyTorch's version metadata keeps its value. Returns the
        `IncompatibleKeys`. Raises `StateDictError` listing every missing key, unexpected key and
        size mismatch, and `TypeError` for a value that is no array; then nothing is changed.
        """
        return load(self, state_dict, strict, assign)

    # -- modes -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the `training` flag here and below; returns this module."""
        if not isinstance(mode, bool):
            raise ValueError(f"mode: expected a bool, got {mode!r}")
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """`train(False)`."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set the flag of each `Parameter` here and below; returns this module."""
        for array in self.parameters():
            if isinstance(array, Parameter):
                array.requires_grad = bool(requires_grad)
        return self

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn` on every module below, children first, and then here; returns this module."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    # -- computing and printing --------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._hooked:
            return self._call_hooked(self.forward, args, kwargs)
        return self.forward(*args, **kwargs)

    def _call_hooked(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for pre_hook in list(self._forward_pre_hooks.values()):
            changed = pre_hook(self, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        result = forward(*args, **kwargs)
        for hook in list(self._forward_hooks.values()):
            changed = hook(self, args, result)
            if changed is not None:
                result = changed
        return result

    def _add_hook(self, attribute: str, hook: Callable[..., Any]) -> RemovableHandle:
        if not callable(hook):
            raise TypeError(f"hook: expected a callable, got {type(hook).__name__}")
        hooks = self.__dict__.setdefault(attribute, {})  # the class has one empty mapping for all
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        object.__setattr__(self, "_hooked", True)
        return handle

    def register_forward_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, args)` before each forward; what it returns, unless None, replaces the arguments."""
        return self._add_hook("_forward_pre_hooks", hook)

    def register_forward_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, args, output)` after each forward; what it returns, unless None, replaces the output.

        Passes leave a hooked module alone, since its call is more than the operator.
        """
        return self._add_hook("_forward_hooks", hook)

    def extra_repr(self) -> str:
        """What stands in the parentheses of this module's repr."""
        return ""

    def _repr_children(self) -> list[str]:
        return [f"({name}): {child!r}" for name, child in self._own(_MODULE)]

    def __repr__(self) -> str:
        name, extra, children = type(self).__name__, self.extra_repr(), self._repr_children()
        if not children:
            return f"{name}({extra})"
        lines = "\n".join([extra] * bool(extra) + children).split("\n")
        return "\n".join([f"{name}(", *(f"  {line}" for line in lines), ")"])
