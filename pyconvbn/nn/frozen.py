# SPDX-License-Identifier: BSD-3-Clause
"""`FrozenLayer`: the module that a frozen graph calls instead of a convolution, linear layer or BatchNorm."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import Plan
from .linear import check_input_ndim
from .module import Module

_PLAN = re.compile(r"<pyconvbn\.Plan (\w+) (\d+) -> (\d+)(?:, kernel ([\dx]+))?")


class FrozenLayer(Module):
    """A layer whose weights are packed already: a call is `plan(x, residual=residual)`.

    It has no parameters and is the same in training and eval. Copies share the plan, which nothing can change, and which
    may be called from many threads at once; pickling keeps it.

    Args:
        plan: the prepared operator.
        kind: "layer", or "batch_norm": then `plan` is a 1-D convolution of each channel for itself, and the input may
            have any number of axes from 2 on.
        residual: calls are expected to add an array before the activation; only said in the repr.
        input_shape: the shape the plan was made for, if there is one.
        input_ndim: refuse inputs of another number of axes: a BatchNorm folded into the layer normalised axis 1 of the
            output, which is the axis of its channels for inputs of that many axes only. None: any that the plan takes.

    Raises:
        TypeError: `plan` is no Plan. ValueError: another `kind`.

    >>> import pyconvbn
    >>> plan = pyconvbn.Plan(np.ones((8, 3, 3, 3), np.float32), padding=1, activation="relu")
    >>> layer = FrozenLayer(plan)
    >>> layer
    FrozenLayer(conv2d 3x3, 3 -> 8, padding=1, relu)
    >>> layer(np.ones((1, 3, 5, 5), np.float32)).shape
    (1, 8, 5, 5)
    """

    plan: Plan
    kind: str
    residual: bool
    input_shape: tuple[int, ...] | None
    input_ndim: int | None
    _by_channel: bool

    def __init__(
        self, plan: Plan, *, kind: str = "layer", residual: bool = False, input_shape: Sequence[int] | None = None,
        input_ndim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
        if kind not in ("layer", "batch_norm"):
            raise ValueError(f"kind: expected 'layer' or 'batch_norm', got {kind!r}")
        shape = None if input_shape is None else tuple(map(int, input_shape))
        self.__dict__.update(  # none of them is a parameter or a module
            training=False, plan=plan, kind=kind, residual=bool(residual), input_shape=shape,
            input_ndim=input_ndim, _by_channel=kind == "batch_norm",
        )

    def forward(self, x: Any, residual: Any = None) -> NDArray[Any]:
        """The result of the layer; `residual` is added before the activation."""
        if self._by_channel:
            return self._normalise(x, residual)
        if self.input_ndim is not None:
            check_input_ndim(self, x)
        if residual is None:
            return self.plan(x)
        try:
            return self.plan(x, residual=residual)
        except ValueError:
            return self._broadcast(x, residual)

    def _broadcast(self, x: Any, residual: Any) -> NDArray[Any]:
        """Addition broadcasts, a plan takes a residual of the very shape of its result."""
        have, wanted = np.shape(residual), self.plan.output_shape(np.shape(x))
        if have == wanted:
            return self.plan(x, residual=residual)  # raises once more
        whole = np.broadcast_shapes(have, wanted)
        if whole != wanted:  # the same numbers for each image
            x = np.broadcast_to(x, (*whole[:1], *np.shape(x)[1:]))
        return self.plan(x, residual=np.broadcast_to(residual, whole))

    def _normalise(self, x: Any, residual: Any) -> NDArray[Any]:
        shape = np.shape(x)
        if len(shape) < 2:
            raise ValueError(f"x: expected at least 2 axes (batch and channels), got {len(shape)}")
        flat = (*shape[:2], math.prod(shape[2:]))
        if residual is not None:
            residual = np.broadcast_to(residual, shape).reshape(flat)
        if flat[2] == 0:  # there is nothing to convolve
            result = self.plan(np.ones((1, shape[1], 1), self.plan.dtype))  # but the channels must fit
            return np.empty(shape, result.dtype)
        return self.plan(np.reshape(x, flat), residual=residual).reshape(shape)

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the result for an input of this shape; `ValueError` if it does not fit."""
        shape = tuple(input_shape)
        if not self._by_channel:
            return self.plan.output_shape(shape)
        if len(shape) < 2:
            raise ValueError(f"input_shape: expected at least 2 axes (batch and channels), got {len(shape)}")
        self.plan.output_shape((1, shape[1], 1))
        return shape

    def explain(self, input_shape: Sequence[int] | None = None) -> Any:
        """What a call does for this input shape (None: that of construction): `Plan.explain`."""
        shape = self.input_shape if input_shape is None else tuple(input_shape)
        if shape is not None and self._by_channel:
            shape = (*shape[:2], math.prod(shape[2:]))
        return self.plan.explain(shape)

    # -- what it is ------------------------------------------------------------------------------------------------------
    def layer_name(self) -> str:
        """The operator and its sizes: "conv2d 3x3, 3 -> 8", or "scale and shift 8" for a BatchNorm."""
        found = _PLAN.match(repr(self.plan))
        assert found is not None
        name, channels_in, channels_out, kernel = found.groups()
        if self._by_channel:
            return f"scale and shift {channels_in}"
        return f"{name}{' ' + kernel if kernel else ''}, {channels_in} -> {channels_out}"

    def activation_name(self) -> str:
        """"relu", "leaky_relu 0.1", or "" without one."""
        activation = self.plan.params["activation"]
        if activation is None:
            return ""
        return activation if isinstance(activation, str) else " ".join(str(part) for part in activation)

    def extra_repr(self) -> str:
        parts, params = [self.layer_name()], self.plan.params
        if not self._by_channel:
            for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
                value = params[name]
                if isinstance(value, str):
                    parts.append(f"{name}={value!r}")
                elif any(v != usual for v in value):
                    parts.append(f"{name}={value[0] if len(set(value)) == 1 else value}")
            if params["groups"] != 1:
                parts.append(f"groups={params['groups']}")
            if params["padding_mode"] != "zeros":
                parts.append(f"padding_mode={params['padding_mode']!r}")
        if self.residual:
            parts.append("+ residual")
        if activation := self.activation_name():
            parts.append(activation)
        if self.input_shape is not None:
            try:
                parts.append(self.explain()["algorithm"])
            except ValueError:  # the shape of an empty array, say
                pass
        return ", ".join(parts)
