# SPDX-License-Identifier: BSD-3-Clause
"""Freezing: a GraphModule for inference only, its parameters constants, its layers prepared operators.

| name | what it does |
|---|---|
| `freeze(gm, example_inputs)` | the frozen GraphModule, and which inputs it still takes |
| `save(frozen, path)`, `load(path)` | one file, readable without pickle |
| `invalidate_eager_modules(module)`, `discard_traced_gm_params(gm)` | give the memory of parameters back |
| `FreezeReport` | what was done to which node, and why not the rest |

The single steps are passes of their own in `pyconvbn.passes`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import _core, config, nn, passes
from ._erased import ErasedArray, discard_traced_gm_params, invalidate_eager_modules
from ._lower import lower_modules
from ._pass_layers import fold_layers
from ._pass_layout import needs_strides, record_strides
from ._pass_plans import prepare_layers
from ._pass_run import STEM, no_collection
from ._save import load, save
from .freeze_report import FreezeReport, FreezeRow, merge_folds
from .fx.graph_module import GraphModule, resolve
from .fx.node import map_aggregate
from .nn.parameter import as_ndarray
from .report import FoldReport

__all__ = [
    "ErasedArray", "FreezeReport", "FreezeRow", "discard_traced_gm_params", "freeze", "invalidate_eager_modules",
    "load", "save",
]


def freeze(
    gm: GraphModule, example_inputs: Any = None, *, discard_parameters: bool | None = None
) -> tuple[GraphModule, list[int]]:
    """Makes a GraphModule for inference: parameters become constants, layers prepared operators.

    What is computed from constants alone is computed now, equal computations are merged, BatchNorm in eval mode and
    arithmetic with constants are folded into the layers before them, parallel products are joined, and each convolution
    and linear layer becomes a `Plan` with the activation and the residual addition that follow it. Layers that train,
    have hooks, or are not this package's stay calls of the very same modules. A parameter that the graph writes, or
    whose memory it returns, stays what it is: shared with `gm`, written and read at each call.

    Args:
        gm: a traced module in eval mode, with its parameters read by get_attr nodes and module calls, or as its first
            placeholders (`fx.to_aten(gm, lift_params=True)`). It is not changed.
        example_inputs: an array, or a sequence of arrays, as `gm` is called with (those behind the parameters will do).
            Shapes decide what can be folded into linear layers and which additions are residuals; without them layers
            choose their algorithm at the first call. Where strides of outputs matter the graph runs once, on copies.
        discard_parameters: give the memory of the parameters back: those of `gm` and of the module it was traced from
            become `ErasedArray`. None: `pyconvbn.config.freezing_discard_parameters`.

    Returns:
        The frozen GraphModule, picklable and safe to call from many threads, and the indices of the placeholders of
        `gm` that it still takes, in order. `frozen.report` is a FreezeReport.

    Raises:
        TypeError: `gm` is no GraphModule, or an input is no array.
        ValueError: the inputs do not fit the graph; the message names the node.
        RuntimeError: the graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import freezing, fx, nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
    >>> frozen, inputs = freezing.freeze(gm, np.ones((1, 3, 8, 8), np.float32))
    >>> [node.op for node in frozen.graph.nodes], inputs
    (['placeholder', 'call_module', 'output'], [0])
    >>> frozen.report.folds.counts
    {'folded': 1}

    Source: the steps are those of PyTorch Inductor's freezing; folding is Jacob et al., CVPR 2018, section 3.2.
    """
    passes._check(gm)
    discard = config.freezing_discard_parameters if discard_parameters is None else bool(discard_parameters)
    with no_collection():
        return _freeze(gm, example_inputs, discard)


def _freeze(gm: GraphModule, example_inputs: Any, discard: bool) -> tuple[GraphModule, list[int]]:
    work = copy.copy(gm)
    work.__dict__.pop("report", None)  # of an earlier freezing
    before = FoldReport._from_core(_core.pass_fuse_plan(work.graph, work, ()))
    rows: list[FreezeRow] = []
    if example_inputs is not None:
        inputs = _all_inputs(work, example_inputs)
        lower_modules(work, report=rows)
        rows[:] = [row for row in rows if row.outcome == "done"]  # what is left is asked again, with shapes
        _infer_shapes(work, inputs)
    lower_modules(work, report=rows)
    if example_inputs is not None and needs_strides(work):
        record_strides(work, inputs)
    passes.view_to_reshape(work, report=rows)
    preserved = passes.replace_params_with_constants(work, report=rows)
    borrowed = set(_core.constant_names(vars(work), STEM))  # what later steps add are arrays of their own
    _remove_dead(work, rows)
    passes.cse(work, report=rows)
    passes.constant_fold(work, report=rows)
    batched: set[str] = set()
    folds = fold_layers(work, report=rows, batched=batched)
    passes.concat_matmuls(work, report=rows)
    passes.enforce_as_strided_input_layout(work, report=rows)
    _remove_dead(work, rows)
    prepare_layers(work, report=rows, batched=batched)
    passes.enforce_output_layout(work, report=rows)
    _own_constants(work, borrowed)
    frozen = GraphModule(work, work.graph, gm.class_name)
    frozen.graph.lint()
    object.__setattr__(frozen, "training", False)
    if "report" in frozen.__dict__:
        raise ValueError("gm: its attribute 'report' would hide the report of freezing; rename it")
    folds = _by_node(merge_folds(before, folds, rows), frozen)
    if discard:  # last, since it cannot be taken back
        keep = [*_shared_arrays(frozen)]
        module = gm._traced_module()
        if module is not None:
            rows += invalidate_eager_modules(module, keep=keep)
        rows += discard_traced_gm_params(gm, keep=keep)
    frozen.__dict__["report"] = FreezeReport(rows, folds)
    return frozen, preserved


def _by_node(folds: FoldReport, frozen: GraphModule) -> FoldReport:
    """`new_node` of each row as a node of the frozen graph: steps name the constant or the layer that a node became."""
    graph = frozen.graph
    names = {node.name for node in graph.nodes}
    if all(row.new_node is None or row.new_node in names for row in folds):
        return folds
    nodes = [*graph._find("get_attr", None), *graph._find("call_module", None)]
    targets = {str(node.target): node.name for node in nodes}
    return FoldReport(
        row if row.new_node is None or row.new_node in names else replace(row, new_node=targets.get(row.new_node))
        for row in folds
    )


# ---- what the graph is called with -----------------------------------------------------------------------------------


def _all_inputs(gm: GraphModule, example_inputs: Any) -> list[Any]:
    """One value for each placeholder, parameters included."""
    values = list(example_inputs) if isinstance(example_inputs, tuple | list) else [example_inputs]
    inputs = [as_ndarray(value, f"example_inputs[{i}]") for i, value in enumerate(values)]
    takers = sum(node.op == "placeholder" for node in gm.graph.nodes)
    params = list(gm.meta.get("params_flat", ()))
    if len(inputs) + len(params) <= takers and len(inputs) != takers:
        inputs = [*params, *inputs]
    if len(inputs) > takers:
        raise ValueError(f"example_inputs: expected at most {takers} arrays (the graph's inputs), got {len(values)}")
    return inputs


def _infer_shapes(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Shapes of all nodes for passes to read; `meta` is left alone."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, inputs):
        _core.op_set_tensor(node, (value.shape, value.dtype.kind, value.dtype.itemsize))
    if not _core.op_infer_shapes(gm.graph, gm):
        return
    # Somebody's own functions or modules: found by running them, on copies, since they may write what they are given.
    from . import _pass_fuse
    from .fx.shape_prop import shape_prop

    measured = _pass_fuse._copy(gm)
    shape_prop(measured, *inputs)
    for node, other in zip(list(gm.graph.nodes), list(measured.graph.nodes), strict=True):
        _core.op_set_tensor(node, _core.op_tensor(other))


# ---- dead code, constants of its own -----------------------------------------------------------------------------------


def _remove_dead(gm: GraphModule, rows: list[FreezeRow]) -> None:
    """Without a snapshot: the graph is freezing's own."""
    rows += _core.freeze_dead(gm.graph, gm)[1]


def _private(array: Any) -> Any:
    """A read-only copy with the same strides' order."""
    mine = np.array(array, order="K", copy=True, subok=False)
    mine.flags.writeable = False
    return mine


def _own_constants(gm: GraphModule, borrowed: set[str]) -> None:
    """Constants that still are somebody else's arrays become copies: what the owner writes later must not matter."""
    for name in borrowed & vars(gm).keys():
        value = vars(gm)[name]
        if isinstance(value, np.ndarray):
            gm.__dict__[name] = _private(value)
    literals = [node for node in _core.freeze_literals(gm.graph) if node.op != "output"]
    arrays: dict[int, Any] = {}

    def collect(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[id(value)] = value
        return value

    for node in literals:
        map_aggregate((node.args, node.kwargs), collect)
    if not arrays:
        return
    questions = [q for value in arrays.values() for q in (("writer", value, None, None), ("returned", value))]
    answers = iter(_core.graph_effects(gm.graph, gm, questions))
    mine = {
        key: value if writer is not None or returned else _private(value)
        for (key, value), writer, returned in zip(arrays.items(), answers, answers, strict=True)
    }

    def own(value: Any) -> Any:
        return mine[id(value)] if isinstance(value, np.ndarray) else value

    for node in literals:
        node.args, node.kwargs = map_aggregate(node.args, own), map_aggregate(node.kwargs, own)


def _shared_arrays(frozen: GraphModule) -> Iterator[Any]:
    """Arrays of the graph's module that the frozen one still uses: they must not be erased."""
    literals: list[Any] = []

    def collect(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            literals.append(value)
        return value

    for node in _core.freeze_literals(frozen.graph):
        map_aggregate((node.args, node.kwargs), collect)
    yield from literals
    for node in frozen.graph.nodes:
        if node.op not in ("get_attr", "call_module") or str(node.target).startswith(STEM):
            continue
        found = resolve(frozen, str(node.target))
        if isinstance(found, nn.Module):
            yield from (value for m in found.modules() for value in vars(m).values() if isinstance(value, np.ndarray))
        elif isinstance(found, np.ndarray):
            yield found
