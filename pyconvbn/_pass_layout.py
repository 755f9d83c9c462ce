# SPDX-License-Identifier: BSD-3-Clause
"""Layouts: convolution weights in channels_last, and strides that readers may rely on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._pass_run import add_rows, all_or_nothing
from .freeze_report import FreezeRow
from .nn.parameter import as_ndarray

if TYPE_CHECKING:
    from .fx import GraphModule, Node

__all__ = ["convert_conv_weights_to_channels_last", "enforce_as_strided_input_layout", "enforce_output_layout"]


# -- what strides were -------------------------------------------------------------------------------------------
def _note(node: Node, value: Any) -> None:
    """Leaves the strides of an array with its node: None if it has gaps or overlaps."""
    from .ops._aten_strided import dense_strides, storage_offset

    node.meta.pop("strides", None)
    node.meta.pop("storage_offset", None)
    if not isinstance(value, np.ndarray):
        return
    steps = [s // value.itemsize if value.itemsize else 0 for s in value.strides]
    whole = all(s >= 0 and s * value.itemsize == b for s, b in zip(steps, value.strides))
    dense = dense_strides(value.shape, steps) if whole else []
    if not whole or (value.size > 1 and any(n != 1 and s != d for n, s, d in zip(value.shape, steps, dense))):
        node.meta["strides"] = None
        return
    node.meta["strides"] = tuple(dense)
    offset = storage_offset(value)
    if offset:
        node.meta["storage_offset"] = offset


def _leaves(argument: Any, value: Any) -> Iterator[tuple[Node, Any]]:
    """(node, its value) of an output's argument, which nests as the value does."""
    from .fx import Node

    if isinstance(argument, Node):
        yield argument, value
    elif isinstance(argument, dict):
        for key in argument:
            yield from _leaves(argument[key], value[key])
    elif isinstance(argument, tuple | list):
        for part, its in zip(argument, value, strict=True):
            yield from _leaves(part, its)
    elif isinstance(argument, slice):
        for name in ("start", "stop", "step"):
            yield from _leaves(getattr(argument, name), getattr(value, name))


def _as_strided_nodes(graph: Any) -> list[Node]:
    from .ops import aten

    targets = (aten.as_strided.default, aten.as_strided_.default, aten.as_strided_scatter.default)
    return [node for target in targets for node in graph._find("call_function", target)]


def _copied(value: Any, memories: dict[int, Any]) -> Any:
    """A copy of an input; arrays are copied with all the memory they are a part of, which as_strided may read."""
    from .ops._aten_strided import copy_storage

    return copy_storage(value, memories) if type(value) is np.ndarray else copy.deepcopy(value)


def _without_writes(gm: Any, inputs: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The module and inputs for one run: copies of what the graph may write, else the very objects."""
    graph = gm.graph
    places = graph._find("placeholder", None)
    # A module that nobody knows may write what it is given and what it holds: its own value is then written too.
    nodes = [*places, *graph._find("get_attr", None), *graph._find("call_module", None)]
    stored = [(v, as_ndarray(v, "array")) for v in gm.state_dict(keep_vars=True).values() if v is not None]
    questions = [("written", node) for node in nodes] + [("writer", array, None, None) for _, array in stored]
    literals = _literals(graph)
    answers = _core.graph_effects(graph, gm, questions + [("writer", array, None, None) for array in literals])
    memories: dict[int, Any] = {}
    if literals:
        written = any(answer is not None for answer in answers[len(questions) :])
        del answers[len(questions) :]
        if written:
            from ._pass_fuse import _copy

            return _copy(gm), [_copied(v, memories) for v in inputs]
    # Arguments and placeholders need not pair off (*args): if one is written, all are copied.
    arguments = [_copied(v, memories) if any(answers[: len(places)]) else v for v in inputs]
    if not any(answers[len(places) :]):
        return gm, arguments
    memo = {id(v): v for (v, _), writer in zip(stored, answers[len(nodes) :], strict=True) if writer is None}
    return copy.deepcopy(gm, memo), arguments


def _literals(graph: Any) -> list[Any]:
    """The arrays that stand in arguments."""
    from .fx.node import map_aggregate

    found: dict[int, Any] = {}

    def collect(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            found[id(value)] = value
        return value

    for node in _core.freeze_literals(graph):
        map_aggregate((node.args, node.kwargs), collect)
    return list(found.values())


def record_strides(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Runs the graph once and notes strides, in elements, where the layout steps need them.

    `node.meta["strides"]` is a tuple of ints at each input of as_strided and its kin and at each node that is returned;
    None where the array has gaps or overlaps. `node.meta["storage_offset"]` is where in its memory an array begins, if
    not at the start. Everything runs on deep copies: neither the module's arrays nor `inputs` change.

    Args:
        gm: the graph.
        inputs: arguments of the call, by position.

    >>> from pyconvbn import fx
    >>> gm = fx.symbolic_trace(lambda x: (x + 1).T)
    >>> record_strides(gm, [np.ones((2, 3))])
    >>> [node.meta.get("strides") for node in gm.graph.nodes]
    [None, None, (1, 3), None]
    """
    from .fx import Interpreter

    graph = gm.graph
    found = graph._find("output", None)
    if not found:
        return
    output = found[-1]
    readers = _as_strided_nodes(graph)
    wanted = {node.args[0] if node.args else node.kwargs.get("self") for node in readers}
    run, arguments = _without_writes(gm, inputs)
    if not readers:
        values = run(*arguments)
    else:
        mine = {theirs: node for theirs, node in zip(run.graph.nodes, graph.nodes, strict=True) if node in wanted}

        class Noting(Interpreter):
            def run_node(self, n: Any) -> Any:
                value = super().run_node(n)
                if n in mine:
                    _note(mine[n], value)
                return value

        values = Noting(run).run(*arguments)
    for node, value in _leaves(output.args[0], values):
        _note(node, value)


def needs_strides(gm: GraphModule) -> bool:
    """Whether anything relies on strides that only a run can tell: inputs of as_strided, outputs not always in C order."""
    if _as_strided_nodes(gm.graph):
        return True
    from .ops import prims

    before = gm.graph._snapshot()
    try:  # what the pass would say; what it would change is taken back
        _, rows = _core.pass_output_layout(gm.graph, gm, prims.force_stride_order.default)
    finally:
        gm.graph._restore(before)
    return any(row[3] == "STRIDES_UNKNOWN" for row in rows)


# -- the passes --------------------------------------------------------------------------------------------------
def convert_conv_weights_to_channels_last(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> int:
    """Puts the constant weights of 2-D convolutions into channels_last, in place: before freezing, on request.

    Between each weight of four axes that is not in that layout yet and the convolutions that read it there is then one
    `aten.clone.default(weight, memory_format="channels_last")`, which `constant_fold` computes. Values stay equal.
    `Conv2d` and `ConvTranspose2d` modules are rewritten as operators first. Plans pack weights in a layout of their
    own, whatever this one is.

    Args:
        gm: the graph to change; the module's arrays are left as they are.
        report: a list to which a row (step "weight_layout") is appended for each convolution whose weight was cloned or
            could not be; the rows of rewritten modules (step "lower") come first.

    Returns:
        How many convolutions read a clone now.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import functional as F, fx, passes
    >>> w = np.ones((4, 3, 3, 3), np.float32)
    >>> gm = fx.symbolic_trace(lambda x: F.conv2d(x, w))
    >>> passes.convert_conv_weights_to_channels_last(gm)
    1
    >>> [str(node) for node in gm.graph.nodes]
    ['x', '_tensor_constant0', 'clone', 'conv2d', 'output']

    Source: torch/_inductor/freezing.py.
    """
    from ._lower import lower_modules
    from .nn import Conv2d, ConvTranspose2d
    from .ops import aten
    from .passes import _check

    graph = _check(gm)
    rows: list[FreezeRow] = []
    with all_or_nothing(gm):
        layers = [node for node in graph._find("call_module", None) if _calls(gm, node, (Conv2d, ConvTranspose2d))]
        if layers:
            lower_modules(gm, layers, report=rows)
        changed, more = _core.pass_weight_layout(graph, gm, aten.clone.default)
    if report is not None:
        report.extend(rows)
    add_rows(report, more)
    return changed


def _calls(gm: Any, node: Node, classes: tuple[type, ...]) -> bool:
    from .fx.graph_module import resolve

    try:
        return isinstance(resolve(gm, str(node.target)), classes)
    except AttributeError:
        return False


def enforce_as_strided_input_layout(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> int:
    """Makes as_strided, as_strided_ and as_strided_scatter see the strides they were written for, in place.

    Each input whose strides are known (`node.meta["strides"]`, noted when freezing runs the example) gets a
    `prims.force_stride_order.default` in front of this use of it: itself while it has those strides, else a copy that
    has them. Left alone, with a row: inputs of unknown strides, and those that something writes, because a write must
    not go to a copy.

    Args:
        gm: the graph to change.
        report: a list to which a row (step "input_layout") for each such call is appended.

    Returns:
        How many calls changed.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, ops, passes
    >>> gm = fx.symbolic_trace(lambda x: ops.aten.as_strided.default(x, [2, 2], [1, 1]))
    >>> gm.graph.find_nodes(op="placeholder")[0].meta["strides"] = (2, 1)
    >>> passes.enforce_as_strided_input_layout(gm), passes.enforce_as_strided_input_layout(gm)
    (1, 0)
    >>> [str(node) for node in gm.graph.nodes]
    ['x', 'force_stride_order', 'as_strided_default', 'output']

    Source: torch/_inductor/freezing.py.
    """
    return _enforce(gm, _core.pass_input_layout, report)


def enforce_output_layout(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> int:
    """Makes outputs keep the strides they had, in place.

    Between the output node and each array without gaps and overlaps that it returns and whose strides are known
    (`node.meta["strides"]`, noted when freezing runs the example) there is then a `prims.force_stride_order.default`.
    Other users of the array are not changed. What comes from a kernel of this package that always gives C order, as it
    did, needs none. Left alone, with a row: arrays of unknown strides, and those that may share memory with an input,
    with the module or with another output, because the caller would notice a copy.

    Args:
        gm: the graph to change.
        report: a list to which a row (step "output_layout") for each array returned is appended.

    Returns:
        How many outputs changed.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, passes
    >>> gm = fx.symbolic_trace(lambda x: x + 1)
    >>> gm.graph.find_nodes(op="call_function")[0].meta["strides"] = (1, 2)
    >>> passes.enforce_output_layout(gm)
    1
    >>> gm(np.zeros((2, 2))).strides
    (8, 16)

    Source: torch/_inductor/freezing.py.
    """
    return _enforce(gm, _core.pass_output_layout, report)


def _enforce(gm: Any, step: Any, report: list[FreezeRow] | None) -> int:
    from .ops import prims
    from .passes import _check

    graph = _check(gm)
    with all_or_nothing(gm):
        changed, rows = step(graph, gm, prims.force_stride_order.default)
    add_rows(report, rows)
    return int(changed)
