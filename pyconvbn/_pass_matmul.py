# SPDX-License-Identifier: BSD-3-Clause
"""Parallel matrix products of one input become one product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._pass_run import Constants, add_rows, all_or_nothing
from .freeze_report import FreezeRow
from .nn.parameter import Parameter

if TYPE_CHECKING:
    from .fx import GraphModule

__all__ = ["concat_matmuls"]


class _Joiner:
    """Makes one constant of several."""

    def __init__(self, gm: Any, constants: Constants) -> None:
        self.gm, self.constants = gm, constants

    def __call__(self, targets: tuple[str, ...], axis: int) -> str:
        from .fx.graph_module import resolve

        arrays = [np.asarray(resolve(self.gm, target)) for target in targets]
        joined = np.ascontiguousarray(np.concatenate(arrays, axis))
        joined.flags.writeable = False
        return self.constants.add(joined)


def concat_matmuls(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> int:
    """Joins parallel products of one input with constant weights into one product whose result is split, in place.

    `x @ a`, `x @ b` and `x @ c` read x three times; `x @ [a b c]` reads it once and is one larger product. Two or three
    at a time are joined if they are calls of the same operator (aten.mm, aten.matmul, aten.linear, aten.addmm,
    functional.linear, the operator `@`, the methods mm and matmul) on the same input, with weights of equal shape and
    dtype that nothing else uses, biases all absent or all constant vectors, and nothing writes the input in between. The
    parts are views of one array, so a product stays by itself if its result may be written, or is read by as_strided; a
    part that may be returned is copied.

    Args:
        gm: the graph to change; the module's arrays are left as they are.
        report: a list to which a row (step "matmul") is appended for each product that has another one beside it.

    Returns:
        How many products were joined with others.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> import numpy as np
    >>> from pyconvbn import fx, passes
    >>> a, b = np.ones((3, 2)), np.ones((3, 2))
    >>> gm = fx.symbolic_trace(lambda x: (x @ a) * (x @ b))
    >>> passes.concat_matmuls(gm)
    2
    >>> [str(node) for node in gm.graph.nodes]
    ['x', '_frozen_param0', 'concat_matmul', 'matmul', 'matmul_1', 'mul', 'output']

    Source: the patterns of torch/_inductor/fx_passes/freezing_patterns.py.
    """
    from .ops import aten
    from .passes import _check

    graph = _check(gm)
    with all_or_nothing(gm) as constants:
        joiner = _Joiner(gm, constants)
        changed, rows = _core.pass_concat_matmul(graph, gm, aten.slice.Tensor, aten.clone.default, Parameter, joiner)
    add_rows(report, rows)
    return changed
