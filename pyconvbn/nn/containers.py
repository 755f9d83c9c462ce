# SPDX-License-Identifier: BSD-3-Clause
"""`Sequential` and `ModuleList`: modules kept in order under the names "0", "1", ..."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, overload

from .module import Module


class _Ordered(Module):
    """Children in order; by number unless they were given names."""

    def _names(self) -> list[str]:
        return [name for name, _ in self._own("module")]

    def _name_at(self, index: Any) -> str:
        names = self._names()
        position = operator.index(index)
        if not -len(names) <= position < len(names):
            raise IndexError(f"index {position} is out of range for {len(names)} modules")
        return names[position]

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[Module]:
        return (child for _, child in self._own("module"))

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._of(dict(list(self._own("module"))[index]))
        return getattr(self, self._name_at(index))

    def _of(self, members: Mapping[str, Module]) -> Self:
        raise NotImplementedError

    def __setitem__(self, index: int, module: Module) -> None:
        if not isinstance(module, Module):
            raise TypeError(f"module: expected a Module, got {type(module).__name__}")
        setattr(self, self._name_at(index), module)

    def __delitem__(self, index: int | slice) -> None:
        names = self._names()
        doomed = names[index] if isinstance(index, slice) else [self._name_at(index)]
        kept = [(name, getattr(self, name)) for name in names if name not in doomed]
        numbered = names == [str(i) for i in range(len(names))]
        for name in names:
            delattr(self, name)
        for position, (name, child) in enumerate(kept):
            self.add_module(str(position) if numbered else name, child)

    def append(self, module: Module) -> Self:
        """Add a module at the end; returns this container."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add several modules at the end; returns this container."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> None:
        """Put a module before position `index`; the modules are numbered anew."""
        if not isinstance(module, Module):
            raise TypeError(f"module: expected a Module, got {type(module).__name__}")
        members = list(self)
        members.insert(index, module)
        for name in self._names():
            delattr(self, name)
        self.extend(members)


class Sequential(_Ordered):
    """Calls its modules one after the other; takes modules, or one mapping of names to modules.

    >>> len(Sequential(ReLU(), ReLU()))
    2
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()
        if len(args) == 1 and isinstance(args[0], Mapping):
            for name, module in args[0].items():
                self.add_module(name, module)
        else:
            self.extend(args)

    def _of(self, members: Mapping[str, Module]) -> Self:
        return type(self)(members)

    def forward(self, input: Any) -> Any:
        """Feed `input` through all modules."""
        for module in self:
            input = module(input)
        return input


class ModuleList(_Ordered):
    """A list of modules that the tree walks see; it has no forward of its own."""

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        super().__init__()
        self.extend(() if modules is None else modules)

    def _of(self, members: Mapping[str, Module]) -> Self:
        return type(self)(members.values())

    def __iadd__(self, modules: Iterable[Module]) -> Self:
        return self.extend(modules)

    def _repr_children(self) -> list[str]:
        """Equal neighbours are printed once, as `(0-2): 3 x ...`."""
        runs: list[tuple[int, int, str]] = []
        for position, text in enumerate(map(repr, self)):
            if runs and runs[-1][2] == text:
                runs[-1] = (runs[-1][0], position, text)
            else:
                runs.append((position, position, text))
        return [
            f"({i}): {text}" if i == j else f"({i}-{j}): {j - i + 1} x {text}"
            for i, j, text in runs
        ]
