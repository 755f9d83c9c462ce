# SPDX-License-Identifier: BSD-3-Clause
"""Passes over a GraphModule. Each one changes nothing when it fails.

| pass | what it does | gives |
|---|---|---|
| `efficient_conv_bn_eval(gm)` | convolution + BatchNorm (eval) become one call, parameters read then | FoldReport |
| `fuse_conv_bn(gm)` | BatchNorm is folded into the weights of a copy | (GraphModule, FoldReport) |
| `cse(gm)` | equal computations become one | bool |
| `dce(gm)` | removes nodes that nobody needs | bool |
| `view_to_reshape(gm)` | views become reshapes where no copy can be noticed | int |
| `replace_params_with_constants(gm)` | parameters become constants | list of the inputs that remain |
| `constant_fold(gm, constraint_fn=None)` | computes now what depends on constants alone | int: nodes folded |
| `binary_folding(gm)` | arithmetic with constants goes into convolutions and linear layers | int: nodes folded |
| `concat_matmuls(gm)` | parallel products with constant weights become one | int |
| `convert_conv_weights_to_channels_last(gm)` | weights of 2-D convolutions in another layout, on request | int |
| `enforce_as_strided_input_layout(gm)` | what as_strided reads keeps the strides it had | int |
| `enforce_output_layout(gm)` | outputs keep the strides they had | int |
| `prepare_layers(gm)` | convolutions and linear layers become prepared operators with packed weights | int |
| `pre_grad(gm)` | the automatic pipeline, switched by `pyconvbn.config` | FoldReport |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import _core, _efficient, config, counters
from ._pass_params import ParamMetadata, replace_params_with_constants, view_to_reshape
from ._pass_constants import constant_fold
from ._pass_cse import cse
from ._pass_layers import binary_folding
from ._pass_layout import (
    convert_conv_weights_to_channels_last,
    enforce_as_strided_input_layout,
    enforce_output_layout,
)
from ._pass_matmul import concat_matmuls
from ._pass_plans import prepare_layers
from .report import FoldReport

if TYPE_CHECKING:
    from .fx import GraphModule

__all__ = [
    "PASSES",
    "ParamMetadata",
    "binary_folding",
    "concat_matmuls",
    "constant_fold",
    "convert_conv_weights_to_channels_last",
    "cse",
    "dce",
    "efficient_conv_bn_eval",
    "enforce_as_strided_input_layout",
    "enforce_output_layout",
    "fuse_conv_bn",
    "pre_grad",
    "prepare_layers",
    "replace_params_with_constants",
    "view_to_reshape",
]


def _check(gm: Any) -> Any:
    """The graph of a GraphModule, or TypeError; RuntimeError if it is not well-formed."""
    from .fx import GraphModule

    if isinstance(gm, GraphModule):
        gm.graph._verify()
        return gm.graph
    hint = ": trace it first, gm = fx.symbolic_trace(module)" if hasattr(gm, "forward") else ""
    raise TypeError(f"gm: expected a GraphModule, got {type(gm).__name__}{hint}")


def _run_efficient(gm: Any, skip: tuple[str, ...] = (), only: Any = None) -> FoldReport:
    graph = gm.graph
    before = graph._snapshot()
    try:
        rows = _core.pass_efficient(
            graph, gm, _efficient.graph_efficient_conv_bn_eval, _efficient.graph_efficient_conv_bn_eval_decomposed,
            skip, only,
        )
        report = FoldReport._from_core(rows)
        counters["efficient_conv_bn_eval"] += report.counts.get("fused", 0)
    except BaseException:  # also one that comes when the pass itself is done
        graph._restore(before)
        raise
    return report


def efficient_conv_bn_eval(gm: GraphModule) -> FoldReport:
    """Merges convolution (or linear) and the BatchNorm in eval mode after it into one call, in place.

    The new node, named `efficient_conv_bn_eval`, computes `bn(conv(x))` as one convolution and reads the parameters
    each time it runs, so changing weights or statistics in place afterwards has the effect it had before. A module that
    is called several times is no obstacle: only calls change. Three forms are understood: modules
    (`efficient_conv_bn_eval(bn, conv, x)`, placed before the convolution, the modules read by `get_attr` nodes),
    functions of `pyconvbn.functional` and operators of `pyconvbn.ops.aten` (`efficient_conv_bn_eval_decomposed(...)`,
    placed before the BatchNorm). The new node has the BatchNorm's metadata.

    What the new node cannot merge at run time (a linear output of more than two axes) it computes unfused and counts in
    `pyconvbn.counters["efficient_conv_bn_eval_fallback"]`: a rewritten graph does not fail where the original worked.

    Args:
        gm: the graph to change.

    Returns:
        A row for each BatchNorm in the graph. `pyconvbn.counters["efficient_conv_bn_eval"]` grows by the fused ones.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, nn, passes
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    >>> print(passes.efficient_conv_bn_eval(gm))
    BatchNorm  convolution  outcome  reason  note
    1          _0           fused    OK      now efficient_conv_bn_eval
    1 BatchNorm: 1 fused

    Source: Yang et al., arXiv 2305.11624.
    """
    _check(gm)
    return _run_efficient(gm)


def _patterns(skip: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (skip,) if isinstance(skip, str) else tuple(skip)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"skip: expected names or patterns (str), got {type(pattern).__name__}")
    return patterns


def fuse_conv_bn(
    gm: GraphModule, *, skip: str | Iterable[str] = (), strict: bool = False, inplace: bool = False
) -> tuple[GraphModule, FoldReport]:
    """Folds each BatchNorm (eval) behind a convolution or linear layer into its weight and bias.

    The fold is computed in float64 and rounded once. It goes by values, not by names: a convolution that is called
    elsewhere too, or whose weight somebody else uses, keeps it, and the folded call gets a convolution of its own; the
    same pair called twice is folded once. What something in the graph writes, or what is only known at run time, stays.

    How many axes a value has decides whether a BatchNorm's axis 1 is the channel axis. A linear layer is folded only
    when its output is known to be 2-D: run `fx.shape_prop(gm, example)` before (a 3-D output whose axis 1 happens to
    have as many entries would give wrong numbers). A convolution's input is taken to have a batch axis unless shapes
    are known to say otherwise. A folded module refuses inputs of another number of axes (`ValueError`): a fold that would
    be wrong for them is not silent.

    Args:
        gm: the graph.
        skip: names of nodes or modules to leave alone; `*` and `?` are wildcards.
        strict: raise FoldError if any BatchNorm stays.
        inplace: change `gm` itself (its modules are replaced, never written) instead of a deep copy.

    Returns:
        The folded GraphModule (`gm` if `inplace`), without the modules that nothing uses any more, and the report with
        a row for each BatchNorm.

    Raises:
        FoldError: with `strict`, listing what stayed; `reason` is that of the first.
        TypeError: `gm` is not a GraphModule, or `skip` holds something else than str.
        RuntimeError: the graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, nn, passes
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
    >>> folded, report = passes.fuse_conv_bn(gm)
    >>> [node.name for node in folded.graph.nodes]
    ['input_1', '_0', '_2', 'output']
    >>> print(report)
    BatchNorm  convolution  outcome  reason  note
    1          _0           folded   OK      now _0
    1 BatchNorm: 1 folded

    Source: Jacob et al., CVPR 2018, section 3.2.
    """
    from . import _pass_fuse

    _check(gm)
    return _pass_fuse.fuse(gm, _patterns(skip), strict, inplace)


def dce(gm: GraphModule) -> bool:
    """Removes nodes without users that do nothing but give a value, in place.

    Inputs, the output, whatever writes or is random, and BatchNorm in training stay.

    Returns:
        Whether anything was removed.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> import operator
    >>> from pyconvbn import fx, passes
    >>> gm = fx.symbolic_trace(lambda x: (operator.mul(x, 2), x)[1])
    >>> passes.dce(gm), passes.dce(gm)
    (True, False)
    """
    return bool(_core.pass_dce(_check(gm), gm))


def pre_grad(gm: GraphModule) -> FoldReport:
    """The automatic pipeline: `efficient_conv_bn_eval` if `pyconvbn.config` says so, in place.

    It runs when `config.efficient_conv_bn_eval_fx_passes` is true and `config.freezing` is not (freezing folds
    BatchNorm itself). Otherwise every row is `SKIPPED_BY_USER` and its hint names the switch.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import config, fx, nn, passes
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    >>> passes.pre_grad(gm)[0].hint
    'config.efficient_conv_bn_eval_fx_passes is False'
    """
    _check(gm)
    if config.efficient_conv_bn_eval_fx_passes and not config.freezing:
        return _run_efficient(gm)
    why = (
        "config.freezing is True: freezing folds it"
        if config.efficient_conv_bn_eval_fx_passes
        else "config.efficient_conv_bn_eval_fx_passes is False"
    )
    return FoldReport(replace(row, hint=why) for row in _run_efficient(gm, ("*",)))


#: Every pass by name.
PASSES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        efficient_conv_bn_eval,
        fuse_conv_bn,
        cse,
        dce,
        view_to_reshape,
        replace_params_with_constants,
        constant_fold,
        binary_folding,
        concat_matmuls,
        convert_conv_weights_to_channels_last,
        enforce_as_strided_input_layout,
        enforce_output_layout,
        prepare_layers,
        pre_grad,
    )
}
