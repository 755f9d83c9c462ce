# SPDX-License-Identifier: BSD-3-Clause
"""Folding BatchNorm and arithmetic with constants into weights: one walk in C, which calls back for new constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._pass_fuse import _peaks, _Refused, _representable
from ._pass_run import Constants, add_rows, all_or_nothing, no_collection
from .freeze_report import FreezeRow
from .nn.parameter import Parameter, as_ndarray
from .report import FoldReport

if TYPE_CHECKING:
    from .fx import GraphModule

__all__ = ["binary_folding", "fold_layers"]

_Array = NDArray[Any]


class _Helper:
    """What the walk asks of Python."""

    parameter = Parameter

    def __init__(self, gm: Any, constants: Constants | None) -> None:
        self.gm, self.constants = gm, constants

    def drop(self, name: str) -> None:
        """Forget a constant into which more was folded: nobody reads it."""
        del self.gm.__dict__[name]
        self.gm._kinds.pop(name, None)

    @staticmethod
    def bn_refusal(
        w_new: _Array, b_new: _Array, weight: Any, gamma: Any, beta: Any, transposed: bool, groups: int
    ) -> str | None:
        """Why these weights with a BatchNorm in them are none; None: they are fine. "": the reason's own hint."""
        try:
            _representable((w_new, b_new), weight, gamma, beta, transposed, groups)
        except _Refused as refused:
            return refused.hint or ""
        return None

    @staticmethod
    def scale_refusal(w_new: _Array, weight: Any, scale: _Array, transposed: bool, groups: int) -> str | None:
        """The same for weights times `scale`: a channel must not become so small that it loses its bits."""
        small = _peaks(w_new, transposed, groups) < np.finfo(w_new.dtype).smallest_normal / 4
        small &= (_peaks(as_ndarray(weight, "weight"), transposed, groups) > 0) & (scale != 0)
        if not small.any():
            return None
        return f"a channel's folded weights are below what {w_new.dtype} holds with all its bits"


def _fold(
    gm: Any, batch_norms: bool, report: list[FreezeRow] | None, batched: set[str] | None = None
) -> tuple[int, FoldReport]:
    with no_collection(), all_or_nothing(gm) as constants:
        helper = _Helper(gm, constants)
        changed, rows, folds, layers = _core.pass_fold_layers(gm.graph, gm, helper, batch_norms, True)
        fold_report = FoldReport._from_core(folds)
    add_rows(report, rows)
    if batched is not None:
        batched.update(layers)
    return changed, fold_report


def fold_layers(
    gm: GraphModule, *, report: list[FreezeRow] | None = None, batched: set[str] | None = None
) -> FoldReport:
    """BatchNorm (eval) and arithmetic with constants into the weights of the operators before them, in place.

    Args:
        gm: a graph whose layers are operators (`_lower.lower_modules`).
        report: gets a row of step "binary" for each arithmetic operator that was folded or might have been.
        batched: gets the names of the layers whose fold took their input to have a batch axis (convolutions: one axis
            more than channels and space; linear: two axes): with another number of axes they would be wrong now.

    Returns:
        A row for each BatchNorm.
    """
    return _fold(gm, True, report, batched)[1]


def binary_folding(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> int:
    """Folds addition, subtraction, multiplication and division with a constant into the layer before it, in place.

    `conv(x) * c + d` is one convolution with other weights: computed in float64 from the constants as the operator
    takes them, rounded once. A constant is a number, a NumPy scalar or an array that nothing in the graph writes; an
    array has one entry, or one for each output channel where broadcasting puts them on the channel axis. `c - conv`
    folds, `c / conv` does not. Left alone, each with a row that says why: what would change the dtype or the number of
    axes, layers whose output or whose weight something else uses too, and weights that would not be finite.

    A convolution's input is taken to have a batch axis unless shapes are known to say otherwise, as in `fuse_conv_bn`.

    Args:
        gm: the graph. Module calls that arithmetic can be folded into become operators (`ops.aten`) first.
        report: gets a FreezeRow for each operator that was folded or might have been.

    Returns:
        How many operators were folded.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> import numpy as np
    >>> from pyconvbn import functional as F, fx, passes
    >>> w = np.ones((2, 1, 3), np.float32)
    >>> gm = fx.symbolic_trace(lambda x: 1 - 2 * F.conv1d(x, w))
    >>> passes.binary_folding(gm), [node.name for node in gm.graph.nodes]
    (2, ['x', '_frozen_param1', '_frozen_param2', 'conv1d', 'output'])
    >>> gm(np.ones((1, 1, 3), np.float32)).ravel()
    array([-5., -5.], dtype=float32)

    Source: arithmetic on the output channels, as BatchNorm folding does it (Jacob et al., CVPR 2018, section 3.2).
    """
    from . import passes

    passes._check(gm)
    modules = _core.pass_binary_modules(gm.graph, gm, _Helper(gm, None))
    if not modules:
        return _fold(gm, False, report)[0]
    from ._lower import lower_modules

    with all_or_nothing(gm):
        lower_modules(gm, modules)
        return _fold(gm, False, report)[0]
