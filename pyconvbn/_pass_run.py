# SPDX-License-Identifier: BSD-3-Clause
"""What the steps of freezing share: all or nothing, and where their new arrays live."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from .freeze_report import FreezeRow

#: How the arrays are called that freezing makes: `_frozen_param0`, `_frozen_param1`, ...
STEM = "_frozen_param"


class Constants:
    """Arrays that a step makes, as buffers of a GraphModule, to be taken away again if the step fails."""

    def __init__(self, gm: Any) -> None:
        self.gm = gm
        self.names: list[str] = []
        self._next = 0

    def add(self, array: Any) -> str:
        """The name under which the graph's get_attr nodes find `array` from now on."""
        attributes = self.gm.__dict__
        while (name := f"{STEM}{self._next}") in attributes:
            self._next += 1
        self._next += 1
        # What register_buffer does, without its checks: there may be thousands.
        attributes[name] = array
        self.gm._kinds[name] = "buffer"
        self.names.append(name)
        return name

    def take_back(self) -> None:
        """Remove all that was added."""
        for name in self.names:
            self.gm.__dict__.pop(name, None)
            self.gm._kinds.pop(name, None)
        self.names.clear()


@contextlib.contextmanager
def all_or_nothing(gm: Any) -> Iterator[Constants]:
    """Whatever fails inside, the graph of `gm` is afterwards what it was and has none of the constants added."""
    graph, constants = gm.graph, Constants(gm)
    before = graph._snapshot()
    try:
        yield constants
    except BaseException:
        graph._restore(before)
        constants.take_back()
        raise


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: a step makes thousands of objects that stay, and each collection looks at all."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def add_rows(report: list[FreezeRow] | None, rows: list[tuple[Any, ...]]) -> None:
    """Append the rows that a step of _core gave to the caller's list, if there is one."""
    if report is not None:
        report.extend([FreezeRow(*row) for row in rows])
