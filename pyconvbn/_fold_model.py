# SPDX-License-Identifier: BSD-3-Clause
"""`pyconvbn.fold`: a model or graph in, the folded graph and its report out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import nn

if TYPE_CHECKING:
    from .fx.graph_module import GraphModule
    from .report import FoldReport

__all__ = ["fold"]


def fold(
    model: Any, *, example_inputs: Any = None, verify: bool = False, strict: bool = False,
    skip: str | Iterable[str] = (),
) -> tuple[GraphModule, FoldReport]:
    """Folds every BatchNorm that can be folded into the convolution or linear layer before it.

    Args:
        model: a :class:`pyconvbn.nn.Module` (it is traced), a :class:`pyconvbn.fx.GraphModule`, a ``torch.nn.Module``,
            ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram`` (:func:`pyconvbn.fx.from_torch`). It is not
            changed, and the result shares no memory with it.
        example_inputs: an array, or a tuple of arrays: what the model is called with. Tells how many axes each value
            has, which linear layers need, and how much each fold saves.
        verify: run both on ``example_inputs`` (or inputs made up) and compare, see :func:`pyconvbn.verify`.
        strict: raise unless all are folded.
        skip: names of nodes or modules to leave alone, or patterns with ``*`` and ``?``.

    Returns:
        ``(graph module, report)``. The report has one row for each BatchNorm with what was done or why not. Modes are
        taken as they are: a BatchNorm in training mode stays, with the reason ``BN_TRAINING``; call ``model.eval()``
        first.

    Raises:
        TypeError: ``model`` is none of these. FoldError: ``strict`` and a BatchNorm stays. NotImplementedError: parts
        of a torch model have no counterpart. AssertionError: ``verify`` and the folded graph is less accurate than it
        should be; the text says where.

    Example:
        >>> import numpy as np, pyconvbn
        >>> from pyconvbn import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded, report = pyconvbn.fold(net, verify=True)
        >>> [(row.node, row.outcome) for row in report.rows]
        [('_1', 'folded')]
        >>> [node.target for node in folded.graph.nodes]
        ['input', '0', '2', 'output']
    """
    from . import _pass_fuse, passes

    before = _graph_of(model)
    inputs = None if example_inputs is None else _inputs(example_inputs)
    result = _pass_fuse._copy(before)
    if inputs is not None:
        from .fx.shape_prop import shape_prop

        # On a copy of its own: what has no shape rule is run, and may write what the graph holds.
        measured = _pass_fuse._copy(before)
        shape_prop(measured, *(tuple(array.shape) for array in inputs))
        result.graph = measured.graph
    folded, report = passes.fuse_conv_bn(result, skip=skip, strict=strict, inplace=True)
    if verify:
        from ._verify import verify as run_verify

        run_verify(before, folded, inputs).raise_if_failed()
    return folded, report


def _graph_of(model: Any) -> GraphModule:
    """The model as a graph; the arrays are still the model's."""
    from .fx._from_torch import from_torch
    from .fx.graph_module import GraphModule
    from .fx.tracer import symbolic_trace

    if isinstance(model, GraphModule):
        return model
    if isinstance(model, nn.Module):
        return symbolic_trace(model)
    torch = sys.modules.get("torch")
    if torch is not None and (isinstance(model, torch.nn.Module) or type(model).__name__ == "ExportedProgram"):
        return from_torch(model)
    raise TypeError(
        "model: expected a pyconvbn.nn.Module, a pyconvbn.fx.GraphModule or a torch module, graph module or exported "
        f"program, got {type(model).__name__}"
    )


def _inputs(example_inputs: Any) -> Sequence[Any]:
    from .nn.parameter import as_ndarray

    values = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    return tuple(as_ndarray(value, f"example_inputs[{i}]") for i, value in enumerate(values))
