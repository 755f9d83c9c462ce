# SPDX-License-Identifier: BSD-3-Clause
"""Prepared layers: which calls become one is decided in C, the plans are made here."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._pass_run import STEM, add_rows, all_or_nothing, no_collection
from .freeze_report import REASONS, FreezeRow
from .nn.frozen import FrozenLayer
from .plan import Plan

if TYPE_CHECKING:
    from .fx import GraphModule


def prepare_layers(
    gm: GraphModule, *, report: list[FreezeRow] | None = None, batched: Set[str] = frozenset()
) -> int:
    """Convolutions and linear layers on constants become calls of `nn.FrozenLayer`, in place: weights packed once.

    An addition behind a layer (of an array of the same shape and dtype, both known) and then an activation become part
    of it where nothing else uses the values between; so does an activation behind a BatchNorm in eval mode, which becomes
    a layer of its own where it could not be folded. Products with a constant matrix are linear layers. The node keeps its
    name, and the graph the same numbers up to rounding. Calls of one layer share their plan.

    Weights are read now: changing them afterwards has no effect on the graph. Constants that freezing made and nothing
    uses any more are removed.

    Args:
        gm: the graph to change, without module calls (those are left alone).
        report: gets a row for each layer, and for each addition and activation that became part of one.
        batched: names of nodes whose layers refuse inputs without a batch axis, since a BatchNorm is folded into them.

    Returns:
        The number of nodes that became layers or part of one.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, nn
    >>> gm = fx.to_aten(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()))
    >>> prepare_layers(gm)
    2
    >>> gm
    Sequential(
      (0): Module()
      (_0): FrozenLayer(conv2d 3x3, 3 -> 4, relu)
    )
    """
    from .passes import _check

    graph = _check(gm)
    layers = _Layers(gm, batched)
    with no_collection():
        try:
            with all_or_nothing(gm):
                changed, rows = _core.pass_plans(graph, gm, layers.make)
                rows = [layers.refused.get(row[1], row) if row[2] == "kept" else row for row in reversed(rows)]
                _drop_unused(gm)
        except BaseException:
            layers.take_back()
            raise
        add_rows(report, rows)
    return changed


def _drop_unused(gm: Any) -> None:
    """Removes the constants of freezing that no node reads."""
    attributes, kinds, not_saved = gm.__dict__, gm._kinds, gm._not_saved
    names = _core.constant_names(attributes, STEM)
    for name in _core.constants_unused(gm.graph, names) if names else ():
        if isinstance(attributes[name], np.ndarray):  # what delattr does, which is not quick
            del attributes[name]
            kinds.pop(name, None)
            if not_saved:
                not_saved.discard(name)


class _Refused(Exception):
    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint or REASONS[reason]


class _Layers:
    """Makes the layers of one graph, equal ones once, and puts them where its nodes find them."""

    def __init__(self, gm: Any, batched: Set[str]) -> None:
        self.gm = gm
        self.batched = batched
        self.targets: dict[Any, str] = {}  # what a layer is -> its name
        self.plans: dict[Any, Plan] = {}  # what its plan is -> the plan
        self.owners: list[Any] = []  # keeps alive what has its id in a key
        self.texts: dict[int, str] = {}  # id of a geometry -> its repr: equal calls mostly have the very same dict
        self.arguments: dict[Any, dict[str, Any]] = {}  # of Plan, for a kind, an id of a geometry and a number of axes
        cls = type(gm)
        self.taken = None if hasattr(cls, "__getattr__") else frozenset(dir(cls))  # None: hasattr must be asked
        self.refused: dict[str, FreezeRow] = {}  # name of a node -> its row

    def make(
        self, name: str, kind: str, arrays: tuple[Any, ...], geometry: dict[str, Any], activation: Any, residual: bool,
        itemsize: int, shape: tuple[int, ...] | None, eps: float,
    ) -> str | None:
        """The target of the layer that a node becomes; None: it cannot be one, `refused` says why."""
        text = self.texts.get(id(geometry))
        if text is None:
            text = self.texts[id(geometry)] = repr(geometry)
            self.owners.append(geometry)
        key = (*map(id, arrays), kind, text, activation, itemsize, shape, eps)
        ndim = arrays[0].ndim if name in self.batched else None
        target = self.targets.get((key, residual, ndim))
        if target is not None:
            return target
        normalises = kind == "batch_norm"
        try:
            plan = self.plans.get(key)
            if plan is None:
                if normalises:
                    plan = _batch_norm_plan(arrays, activation, itemsize, shape, eps)
                else:
                    weight = np.ascontiguousarray(np.asarray(arrays[0]).T) if kind == "product" else arrays[0]
                    asked = kind, id(geometry), weight.ndim
                    arguments = self.arguments.get(asked)
                    if arguments is None:
                        arguments = self.arguments[asked] = _plan_arguments(kind, weight.ndim, geometry)
                    plan = Plan(weight, arrays[1], **arguments, activation=activation, input_shape=shape)
        except _Refused as refused:
            self.refuse(name, refused.reason, refused.hint)
            return None
        except (ValueError, TypeError, NotImplementedError) as error:
            self.refuse(name, "UNSUPPORTED", str(error))
            return None
        self.plans[key] = plan
        self.owners.append(arrays)
        target = self.targets[key, residual, ndim] = self.free_name(name)
        layer = FrozenLayer(
            plan, kind="batch_norm" if normalises else "layer", residual=residual, input_shape=shape, input_ndim=ndim
        )
        # What register_module does, without its checks: there may be thousands.
        self.gm.__dict__[target] = layer
        self.gm._kinds[target] = "module"
        return target

    def refuse(self, name: str, reason: str, hint: str) -> None:
        self.refused[name] = FreezeRow("plan", name, "kept", reason, None, hint, None)

    def free_name(self, name: str) -> str:
        plain = name.lstrip("_")
        stem = plain if plain.isidentifier() else name
        candidate, count = stem, 0
        attributes = self.gm.__dict__
        while (candidate in attributes or candidate in self.taken) if self.taken else hasattr(self.gm, candidate):
            candidate = f"{stem}_plan" if count == 0 else f"{stem}_plan_{count}"
            count += 1
        return candidate

    def take_back(self) -> None:
        for target in self.targets.values():
            self.gm.__dict__.pop(target, None)
            self.gm._kinds.pop(target, None)


def _one_or_all(value: Any, nd: int) -> Any:
    """A list of one number is for all axes."""
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 and nd != 1 else tuple(value)
    return value


def _plan_arguments(kind: str, ndim: int, geometry: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of Plan for a weight of so many axes."""
    nd = ndim - 2
    if kind == "linear" and nd != 0:
        raise _Refused("UNSUPPORTED", f"its weight has {ndim} axes, not 2")
    arguments = {name: _one_or_all(value, nd) for name, value in geometry.items()}
    if kind == "conv_transpose":
        arguments["transposed"] = True
    elif kind == "convolution" and not arguments.pop("transposed"):
        del arguments["output_padding"]
    elif kind == "convolution":
        arguments["transposed"] = True
    return arguments


def _batch_norm_plan(
    arrays: tuple[Any, ...], activation: Any, itemsize: int, shape: tuple[int, ...] | None, eps: float
) -> Plan:
    """gamma/sqrt(var + eps) as the one weight of each channel, beta - mean times that as its bias."""
    gamma, beta, mean, var = (None if a is None else np.asarray(a, np.float64) for a in arrays)
    assert mean is not None and var is not None
    if mean.ndim != 1 or any(a is not None and a.shape != mean.shape for a in (gamma, beta, var)):
        raise _Refused("SHAPE_MISMATCH", "the parameters of the BatchNorm have different shapes")
    if shape is None or len(shape) < 2 or shape[1] != mean.size or mean.size == 0:
        raise _Refused("SHAPE_MISMATCH", "the input does not have the channels of the BatchNorm")
    with np.errstate(all="ignore"):
        scale = 1.0 / np.sqrt(var + eps)
        if gamma is not None:
            scale = gamma * scale
        shift = -mean * scale if beta is None else beta - mean * scale
        weight, bias = (a.astype(f"f{itemsize}") for a in (scale, shift))
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise _Refused("NONFINITE")
    flat = (*shape[:2], math.prod(shape[2:]))
    return Plan(
        weight.reshape(-1, 1, 1), bias, groups=mean.size, activation=activation,
        input_shape=flat if flat[2] > 0 else None,
    )
