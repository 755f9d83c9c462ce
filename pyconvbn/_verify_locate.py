# SPDX-License-Identifier: BSD-3-Clause
"""Where two graphs part, and what the difference looks like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _verify_run as run_
from .fx._describe import attribute, describe
from .testing import bn_scale_shift, precision_of

__all__ = ["BatchNormFound", "Parting", "first_parting", "gain_of_output"]

_Array = NDArray[Any]
#: Errors this many times those of `before` are no rounding (one run only, so more than the verdict's limit).
_LIMIT = 16.0
#: A guess explains a difference when it leaves this share of it.
_LEFT = 0.01


class Parting(NamedTuple):
    """The first node, in the order of ``after``, whose value is none of those it can stand for in ``before``."""

    node: str  # in after
    stands_for: str  # in before
    pair: tuple[str, str] | None  # convolution and BatchNorm of before that it comes from, by target or name
    error: float  # largest distance to float64
    error_before: float
    cause: str | None

    def __str__(self) -> str:
        pair = "" if self.pair is None else f", from {self.pair[0]} and {self.pair[1]}"
        cause = "" if self.cause is None else f": {self.cause}"
        return (
            f"the graphs part at {self.node} (before: {self.stands_for}{pair}), error {self.error:.2e} against "
            f"{self.error_before:.2e} before{cause}"
        )


class BatchNormFound(NamedTuple):
    """A BatchNorm node's parameters in float64."""

    gamma: _Array
    beta: _Array
    mean: _Array
    var: _Array
    eps: float

    def gain(self) -> _Array:
        return bn_scale_shift(self.mean, self.var, self.eps, self.gamma, None)[0]


# -- reading a BatchNorm node ----------------------------------------------------------------------

_FUNCTIONAL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def batch_norm_of(node: Any, root: Any) -> BatchNormFound | None:
    """Parameters of a BatchNorm node with constant statistics; None for anything else."""
    if node.op == "call_module":
        module = attribute(root, node.target)
        found = {name: getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")}
        eps = getattr(module, "eps", 1e-5)
    else:
        names = _ATEN if "aten" in str(node.target) else _FUNCTIONAL
        bound = {**dict(zip(names, node.args)), **node.kwargs}
        found = {name: attribute(root, getattr(bound.get(name), "target", None)) for name in _FUNCTIONAL[1:5]}
        eps = bound.get("eps", 1e-5)
    mean, var = found["running_mean"], found["running_var"]
    if not isinstance(mean, np.ndarray) or not isinstance(var, np.ndarray) or not isinstance(eps, float):
        return None
    gamma, beta = found["weight"], found["bias"]
    return BatchNormFound(
        np.ones(len(mean)) if gamma is None else np.asarray(gamma, np.float64),
        np.zeros(len(mean)) if beta is None else np.asarray(beta, np.float64),
        np.asarray(mean, np.float64), np.asarray(var, np.float64), eps,
    )  # fmt: skip


def _producers(node: Any) -> list[Any]:
    return [used for used in node.all_input_nodes if used.op != "get_attr"]


def gain_of_output(gm: Any, path: str, channel: int) -> tuple[float, str] | None:
    """(gamma/sigma, name) of the BatchNorm whose channels output `path` has; None when there is none to be found.

    Looks back through activations, pooling and additions, none of which mixes channels.
    """
    root = gm
    outputs = [node for node in gm.graph.nodes if node.op == "output"]
    if not outputs:
        return None
    todo: list[Any] = [dict(run_.leaves(outputs[-1].args[0])).get(path) if outputs[-1].args else None]
    seen: set[str] = set()
    while todo:
        node = todo.pop(0)
        if not hasattr(node, "all_input_nodes") or node.name in seen:
            continue
        seen.add(node.name)
        kind, title, _ = describe(node, root)
        if kind == "bn":
            found = batch_norm_of(node, root)
            if found is not None and channel < len(found.mean):
                name = node.target if node.op == "call_module" else node.name
                return float(found.gain()[channel]), str(name)
        elif kind in ("act", "pool") or title in ("add", "iadd", "sub"):
            todo += _producers(node)
    return None


# -- where -----------------------------------------------------------------------------------------


class _Sides(NamedTuple):
    """Both graphs with the values of their nodes, by name."""

    old: Any
    new: Any
    exact: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    old_nodes: dict[str, Any]
    new_nodes: dict[str, Any]


def _stands_for(node: Any, sides: _Sides) -> Iterator[Any]:
    """Nodes of before whose value `node` of after may have, the likeliest last.

    The node of the same name; what followed it alone and is gone, since a fold absorbs it; and what stood where
    its readers have it now.
    """
    twin = sides.old_nodes.get(node.name)
    if twin is not None:
        yield twin
    for user in node.users:
        old_user = sides.old_nodes.get(user.name)
        if old_user is None:
            continue
        now, then = _producers(user), _producers(old_user)
        if len(now) == len(then):
            for new_input, old_input in zip(now, then):
                if new_input is node and (twin is None or old_input.name not in sides.new_nodes):
                    yield old_input
    while twin is not None and len(twin.users) == 1:
        (twin,) = twin.users
        if twin.name in sides.new_nodes or twin.op == "output":
            break
        yield twin


@np.errstate(all="ignore")
def _distance(value: Any, exact: Any, dtype: np.dtype[Any]) -> _Array | None:
    """Largest error per channel plus one rounding; None when the two cannot be compared."""
    if not isinstance(value, np.ndarray) or not isinstance(exact, np.ndarray) or value.shape != exact.shape:
        return None
    axes = tuple(a for a in range(value.ndim) if a != 1) if value.ndim > 1 else None
    same = (value == exact) | (np.isnan(value) & np.isnan(exact))
    error = np.where(same, 0.0, np.abs(value.astype(np.float64) - exact))
    error = np.where(np.isnan(error), np.inf, error)
    precision = precision_of(dtype)
    floor = np.maximum(precision.eps * np.where(np.isfinite(exact), np.abs(exact), 0.0).max(axes), precision.flush)
    return np.asarray(error.max(axes) + floor)


@np.errstate(all="ignore")
def _parts(value: Any, old: Any, sides: _Sides) -> bool:
    exact, before = sides.exact.get(old.name), sides.before.get(old.name)
    if not isinstance(before, np.ndarray) or before.dtype.kind != "f" or before.size == 0:
        return False
    now, then = (_distance(v, exact, before.dtype) for v in (value, before))
    return now is None or then is None or not bool((now <= _LIMIT * then).all())


def first_parting(old: Any, new: Any, inputs: tuple[Any, ...]) -> Parting | None:
    """Runs both graph modules node by node; None when no node of the two can be told apart."""
    sides = _Sides(
        old, new, run_.record(old, inputs, np.dtype(np.float64)), run_.record(old, inputs), run_.record(new, inputs),
        {node.name: node for node in old.graph.nodes}, {node.name: node for node in new.graph.nodes},
    )  # fmt: skip
    undecided: dict[str, Any] = {}  # nodes without the BatchNorm that is gone; a later layer may have it
    for node in new.graph.nodes:
        value = sides.after.get(node.name)
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.size == 0:
            continue
        candidates = list(_stands_for(node, sides))
        parts = [_parts(value, old_node, sides) for old_node in candidates]
        if not candidates or not all(parts):
            if parts and parts[-1]:
                undecided[node.name] = candidates[-1]
            continue
        for used in _producers(node):
            if used.name in undecided:
                return _parting(used, undecided[used.name], sides)
        return _parting(node, candidates[-1], sides)
    return None


def _label(node: Any) -> str:
    return str(node.target) if node.op == "call_module" else str(node.name)


def _largest(value: Any, exact: Any) -> float:
    if getattr(value, "shape", None) != getattr(exact, "shape", ()):
        return float("inf")
    with np.errstate(all="ignore"):
        error = np.abs(np.asarray(value, np.float64) - exact)
    return float(np.where(np.isnan(error), np.inf, error).max())


def _parting(node: Any, old: Any, sides: _Sides) -> Parting:
    exact, value = sides.exact[old.name], sides.after[node.name]
    pair = cause = None
    kind = describe(old, sides.old).kind
    inputs = _producers(old)
    if kind == "bn" and inputs and describe(inputs[0], sides.old).kind == "conv":
        pair = _label(inputs[0]), _label(old)
        cause = _cause_of_fold(value, exact, inputs[0], old, node, sides)
    elif kind == "conv" and inputs and describe(inputs[0], sides.old).kind == "bn":
        pair = _label(old), _label(inputs[0])
        cause = _cause_of_pattern(value, exact)
    elif getattr(value, "shape", None) == exact.shape:
        cause = _cause_of_pattern(value, exact)
    if getattr(value, "shape", None) != exact.shape:
        cause = f"shape {exact.shape} before, {value.shape} after"
    return Parting(
        node.name, old.name, pair, _largest(value, exact), _largest(sides.before[old.name], exact), cause
    )


# -- why -------------------------------------------------------------------------------------------


def _along(values: _Array, ndim: int) -> _Array:
    return values.reshape([-1 if a == 1 else 1 for a in range(ndim)])


@np.errstate(all="ignore")
def _cause_of_fold(value: _Array, exact: _Array, conv: Any, bn: Any, new: Any, sides: _Sides) -> str | None:
    """What kind of wrong fold of `conv` and `bn` gives `value`: each well-known mistake is tried."""
    found = batch_norm_of(bn, sides.old)
    y = sides.exact.get(conv.name)
    if value.shape != exact.shape or found is None or not isinstance(y, np.ndarray):
        return None
    if not np.isfinite(value).all():
        return "values are not finite"
    r = 1.0 / np.sqrt(found.var + found.eps)
    layer = run_.layer_of(conv, sides.old)
    b = None if layer is None else layer.bias
    g, t, m, r, b = (_along(np.asarray(v, np.float64), y.ndim) for v in (
        found.gamma, found.beta, found.mean, r, np.zeros(len(r)) if b is None else b))  # fmt: skip
    s = g * r
    guesses = {
        "the convolution's bias is not scaled by gamma/sigma": s * (y - b) + b - m * s + t,
        "the convolution's bias is lost": s * (y - b) - m * s + t,
        "gamma and beta are swapped": t * r * (y - m) + g,
        "the BatchNorm is not applied": y,
        "the BatchNorm is applied twice": s * (exact - m) + t,
        "gamma is lost": r * (y - m) + t,
        "beta is lost": s * (y - m),
        "the mean is lost": s * y + t,
        "the shift of the BatchNorm is lost": s * y,
        "sigma squared was taken for sigma": s * r * (y - m) + t,
        "eps is 1e-3 instead of the BatchNorm's": g / np.sqrt(_along(found.var, y.ndim) + 1e-3) * (y - m) + t,
        "eps is 1e-5 instead of the BatchNorm's": g / np.sqrt(_along(found.var, y.ndim) + 1e-5) * (y - m) + t,
    }
    wrong = np.abs(value - exact).max()
    for text, guess in guesses.items():
        if np.abs(guess - exact).max() > 0 and np.abs(value - guess).max() <= _LEFT * wrong:
            return text
    return _cause_of_weights(conv, new, found.gain(), sides) or _cause_of_pattern(value, exact)


@np.errstate(all="ignore")
def _cause_of_weights(conv: Any, new: Any, gain: _Array, sides: _Sides) -> str | None:
    """Reads off the folded weights which channel's gamma/sigma each filter got."""
    layer, new_layer = run_.layer_of(conv, sides.old), run_.layer_of(new, sides.new)
    if layer is None or new_layer is None or layer.weight.shape != new_layer.weight.shape or layer.weight.ndim < 3:
        return None
    old, folded = layer.weight.astype(np.float64), new_layer.weight.astype(np.float64)
    spatial = tuple(range(2, old.ndim))
    # The factor of each filter, by least squares, and what it leaves.
    power = (old * old).sum(spatial)
    factor = (old * folded).sum(spatial) / np.where(power > 0, power, 1.0)
    left = np.abs(folded - factor.reshape(*factor.shape, *[1] * len(spatial)) * old).max()
    if left > _LEFT * np.abs(folded).max():
        return "the weights are not those of before times gamma/sigma: stale, changed since one was made from the other"
    rows, columns = np.indices(factor.shape)
    channel = rows
    if layer.transposed:
        channel = rows // (old.shape[0] // layer.groups) * old.shape[1] + columns
    expected = gain[channel]
    close = 1e-3 * np.abs(gain).max()
    if (np.abs(factor - expected) <= close)[power > 0].all():
        return "the weights are folded right, the bias is wrong"
    nearest = np.abs(factor[..., None] - gain).min(-1)
    if (nearest <= close)[power > 0].all():
        return "gamma/sigma runs along a wrong axis of the weight, or in a wrong order"
    return "the weights are scaled by something else than the present gamma/sigma"


@np.errstate(all="ignore")
def _cause_of_pattern(value: _Array, exact: _Array) -> str | None:
    """What the difference looks like, without knowing where it comes from."""
    if not (np.isfinite(value) == np.isfinite(exact)).all():
        return "values that were finite are not, or the other way round"
    if value.ndim < 3:
        return None
    error = np.abs(value - exact)
    wrong = error.max()
    for border in (1, 2, 3):
        inner = (slice(None), slice(None), *[slice(border, -border)] * (value.ndim - 2))
        if error[inner].size and error[inner].max() <= _LEFT * wrong:
            return "only the border of the image is wrong: was a BatchNorm before a padded convolution folded?"
    axes = (0, *range(2, value.ndim))
    shift = (value - exact).mean(axes, keepdims=True)
    if np.abs(value - exact - shift).max() <= _LEFT * wrong:
        return "each channel is shifted by a constant: its bias is wrong"
    mean_v, mean_e = value.mean(axes, keepdims=True), exact.mean(axes, keepdims=True)
    spread = ((exact - mean_e) ** 2).sum(axes, keepdims=True)
    slope = ((value - mean_v) * (exact - mean_e)).sum(axes, keepdims=True) / np.where(spread > 0, spread, 1.0)
    if np.abs(value - mean_v - slope * (exact - mean_e)).max() <= _LEFT * wrong:
        return "each channel is scaled by a wrong factor (gamma/sigma or the statistics changed?)"
    return None
