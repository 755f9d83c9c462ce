# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of constant folding share: a net from a function, and folding with all that always holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from passes_util import trace
from pyconvbn import nn, passes
from pyconvbn.freeze_report import FreezeRow

class Net(nn.Module):
    """forward(self, x) is a function of the module; arrays become parameters, `*_buffer` buffers."""

    def __init__(self, forward: Callable[[Any, Any], Any], **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            if isinstance(value, np.ndarray) and not name.endswith("_buffer"):
                setattr(self, name, nn.Parameter(value, requires_grad=value.dtype.kind == "f"))
            elif isinstance(value, np.ndarray):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._compute = forward
        self.eval()

    def forward(self, x: Any) -> Any:
        return self._compute(self, x)


def make(forward: Callable[[Any, Any], Any], **members: Any) -> Any:
    return trace(Net(forward, **members))


def arrays(value: Any) -> list[Any]:
    return [a for v in value for a in arrays(v)] if isinstance(value, tuple | list) else [value]


def same(actual: Any, wanted: Any) -> None:
    """Types, dtypes and bits."""
    for a, b in zip(arrays(actual), arrays(wanted), strict=True):
        assert type(a) is type(b) or {type(a), type(b)} == {np.ndarray, nn.Parameter}
        if isinstance(b, np.ndarray | np.generic):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        else:
            assert a == b


def fold(gm: Any, *inputs: Any, **options: Any) -> tuple[int, dict[str, FreezeRow]]:
    """Folds, and checks what always holds; the number and the rows by node."""
    wanted = copy.deepcopy(gm)(*inputs) if inputs else None
    before = {node.name for node in gm.graph.nodes}
    rows: list[FreezeRow] = []
    count = passes.constant_fold(gm, report=rows, **options)
    gm.graph.lint()
    by_name = {row.node: row for row in rows}
    assert len(by_name) == len(rows) and {row.step for row in rows} <= {"constant"}
    assert sum(row.outcome == "done" for row in rows) == count
    alive = {node.name: node for node in gm.graph.nodes}
    assert set(alive) <= before
    for row in rows:
        assert (row.outcome == "done") == (row.reason == "OK") == (row.hint == "")
        if row.outcome == "kept":
            assert alive[row.node].op.startswith("call_")
        else:
            assert row.node not in alive or alive[row.node].op == "get_attr"
            if row.into is not None:
                constant = getattr(gm, row.into)
                assert not constant.flags.writeable
    if inputs:
        same(copy.deepcopy(gm)(*inputs), wanted)
    again: list[FreezeRow] = []
    listing = [node.format_node() for node in gm.graph.nodes]
    attributes = set(vars(gm))
    assert passes.constant_fold(gm, report=again, **options) == 0
    assert [node.format_node() for node in gm.graph.nodes] == listing and set(vars(gm)) == attributes
    assert [row for row in rows if row.outcome == "kept"] == again
    return count, by_name


def shapes_of(gm: Any) -> list[str]:
    """The graph in short: op and name."""
    return [f"{node.op} {node.name}" for node in gm.graph.nodes]


def f32(rng: np.random.Generator, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


X = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
