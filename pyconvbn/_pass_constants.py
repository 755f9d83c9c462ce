# SPDX-License-Identifier: BSD-3-Clause
"""Constant folding: which nodes is decided in C, what they compute is NumPy's and the operators' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core, passes
from ._pass_run import add_rows, all_or_nothing
from .freeze_report import FreezeRow
from .nn.parameter import Parameter

if TYPE_CHECKING:
    from .fx import GraphModule
    from .fx.node import Node


def _copy(array: NDArray[Any], exact: bool) -> NDArray[Any]:
    """A private copy with one entry along axes of stride 0, as the original; `exact`: all its strides and its class."""
    plain = np.asarray(array)
    if not exact:
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in plain.strides)
        return np.broadcast_to(np.array(plain[once], order="K", copy=True), plain.shape)
    reach = [(size - 1) * stride for size, stride in zip(plain.shape, plain.strides)] if plain.size else []
    before, behind = -sum(min(0, r) for r in reach), sum(max(0, r) for r in reach)
    memory = np.zeros(before + behind + plain.itemsize, np.uint8)
    twin: NDArray[Any] = np.ndarray(plain.shape, plain.dtype, memory, before, plain.strides)
    twin[...] = plain
    return Parameter(twin, array.requires_grad) if isinstance(array, Parameter) else twin


def constant_fold(
    gm: GraphModule,
    constraint_fn: Callable[[Node], Any] | None = None,
    *,
    report: list[FreezeRow] | None = None,
) -> int:
    """Computes now what depends on constants alone, in place.

    Constants are the arrays that get_attr nodes read, unless the graph writes them or returns their memory. A node
    whose inputs are all constants is computed; what other nodes use of the results become new constants
    (`_frozen_param0`, ...: private and read-only), the rest goes. The numbers are those the graph would have computed.

    Left alone, each with its reason in `report`: operators that the op table does not know, random and impure ones and
    modules in training, what is written later, what the graph may return (each call gives its caller a new array),
    dequantizations (the quantized constant stays small), values that are no arrays, and what raises an exception.

    Args:
        gm: the graph to change.
        constraint_fn: asked with each `Node` that could be folded; a node for which it is false stays.
        report: a row for each node that was folded, or might have been, is appended.

    Returns:
        The number of nodes folded.

    Raises:
        TypeError: `gm` is not a GraphModule, or `constraint_fn` not callable.
        RuntimeError: the graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, nn, passes
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(np.ones((2, 3), np.float32))
    ...     def forward(self, x):
    ...         return x @ (self.weight * 2 + 1).reshape(3, 2)
    >>> gm = fx.symbolic_trace(Net())
    >>> passes.constant_fold(gm)
    3
    >>> [(node.op, node.name) for node in gm.graph.nodes]
    [('placeholder', 'x'), ('get_attr', 'reshape'), ('call_function', 'matmul'), ('output', 'output')]

    Source: Aho, Lam, Sethi, Ullman, Compilers, 2nd edition, section 9.4.
    """
    graph = passes._check(gm)
    if constraint_fn is not None and not callable(constraint_fn):
        raise TypeError(f"constraint_fn: expected a callable or None, got {type(constraint_fn).__name__}")
    with all_or_nothing(gm) as constants, np.errstate(all="ignore"):
        classes = Parameter, np.memmap
        folded, rows = _core.pass_constant_fold(graph, gm, constraint_fn, constants.add, _copy, classes)
        add_rows(report, rows)
    return int(folded)
