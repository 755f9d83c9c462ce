# SPDX-License-Identifier: BSD-3-Clause
"""What the steps of freezing share: all or nothing, and where their new arrays live."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from . import _core
from .freeze_report import FreezeRow

#: How the arrays are called that freezing makes: `_frozen_param0`, `_frozen_param1`, ...
STEM = "_frozen_param"


class Constants(_core.ConstantStore):
    """Arrays that a step makes, as buffers of a GraphModule, to be taken away again if the step fails.

    `add(array)` gives the name under which the graph's get_attr nodes find the array from then on: what register_buffer
    does, without its checks, since there may be thousands.
    """

    def __init__(self, gm: Any) -> None:
        super().__init__(gm.__dict__, gm._kinds, STEM)
        self.gm = gm

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
    """No garbage is collected meanwhile: a step makes thousands of objects that stay, each collection looks at all."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def add_rows(report: list[FreezeRow] | None, rows: list[FreezeRow]) -> None:
    """Append the rows of a step to the caller's list, if there is one."""
    if report is not None:
        report.extend(rows)
