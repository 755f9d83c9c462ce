# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the layout steps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyconvbn import fx, nn


class Holder(nn.Module):
    """A module with these arrays and modules, and this forward."""

    def __init__(self, run: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in held.items():
            setattr(self, name, value) if isinstance(value, nn.Module) else self.register_buffer(name, value)

    def forward(self, *x: Any) -> Any:
        return self.run(self, *x)


def traced(run: Callable[..., Any], **held: Any) -> Any:
    root = Holder(run, **held)
    count = run.__code__.co_argcount - 1
    root.forward = {1: lambda x: run(root, x), 2: lambda x, y: run(root, x, y)}[count]  # type: ignore[method-assign]
    return fx.symbolic_trace(root)


def named(gm: Any, name: str) -> Any:
    return next(n for n in gm.graph.nodes if n.name == name)


def weights(rng: np.random.Generator) -> dict[str, Any]:
    def some(*shape: int) -> Any:
        return rng.integers(-3, 4, shape).astype(np.float32)

    return {"w": some(4, 3, 3, 3), "t": some(4, 5, 2, 2), "p": some(5, 5, 1, 1), "d": some(5, 1, 3, 3)}
