# SPDX-License-Identifier: BSD-3-Clause
"""Folding BatchNorm into weights: the decisions are made in C, the weights here, the graph is edited last.

`plan` reads a graph and computes every folded weight, an `_Editor` puts new modules and arrays in place, `fuse` repeats
both until nothing more can be folded, or leaves everything as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core, nn
from ._fold import _fold_record, _fused_copy, _like_parameters
from ._modules import read_conv
from .errors import FoldError
from .nn.parameter import as_ndarray
from .report import FoldReport, FoldRow

_Array = NDArray[Any]
_MISSING = object()


@dataclass
class _Folded:
    """Weights with a BatchNorm folded in: a module to call instead, or (module None) two arrays to pass instead."""

    module: Any | None
    weight: Any
    bias: Any
    #: the objects whose identity this stands for, kept so that their ids stay theirs
    owners: tuple[Any, ...]
    #: for module None: name of the weight the call had, for the names of the new ones
    stem: str = "folded"


@dataclass
class _Fold:
    bn: str
    conv: str
    folded: _Folded


@dataclass
class Plan:
    report: FoldReport
    folds: list[_Fold] = field(default_factory=list)


def _resolve(root: Any, target: str) -> Any:
    found = root
    for name in target.split("."):
        found = getattr(found, name)
    return found


def _named(nodes: dict[str, Any], name: str) -> Any:
    if name not in nodes:  # an attribute of a module may run anything
        raise RuntimeError(f"gm: its node {name!r} went away while the pass was reading the modules")
    return nodes[name]


# ---- deciding and computing ------------------------------------------------------------------------------------------


class _Refused(Exception):
    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def _peaks(weight: _Array, transposed: bool, groups: int) -> _Array:
    """The largest absolute value among the weights of each output channel."""
    if not transposed:
        return np.abs(weight.reshape(len(weight), -1)).max(axis=1, initial=0)
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return np.abs(split).max(axis=(1, 3), initial=0).ravel()


def _representable(
    folded: tuple[_Array, _Array], weight: Any, gamma: Any, beta: Any, transposed: bool, groups: int
) -> None:
    """Refuses what the convolution's dtype cannot hold.

    That is values beyond its largest, and channels whose weights all become so small that they lose their bits, though
    what the BatchNorm puts out (about its weight, around its bias) would not.
    """
    if not all(np.isfinite(a).all() for a in folded):
        raise _Refused("NONFINITE_FOLD")
    limits = np.finfo(folded[0].dtype)
    small = _peaks(folded[0], transposed, groups) < limits.smallest_normal / 4
    if not small.any():
        return
    small &= _peaks(as_ndarray(weight, "weight"), transposed, groups) > 0
    scale = 1.0 if gamma is None else np.abs(np.asarray(as_ndarray(gamma, "weight"), np.float64))
    shift = 0.0 if beta is None else np.abs(np.asarray(as_ndarray(beta, "bias"), np.float64))
    if (small & (scale >= limits.smallest_normal) & (scale > limits.eps * shift)).any():
        hint = f"a channel's folded weights are below what {folded[0].dtype} holds with all its bits: fold in float32"
        raise _Refused("NONFINITE_FOLD", hint)


def _fold_modules(conv: Any, bn: Any) -> _Folded:
    record = read_conv(conv)
    folded = _fold_record(record, bn)
    _representable(folded, record.weight, bn.weight, bn.bias, record.transposed, record.groups)
    try:
        module = _fused_copy(conv, folded, "conv")
    except Exception as error:
        raise _Refused("WEIGHT_SHARED", f"{type(conv).__name__} cannot be copied: {error}") from error
    if isinstance(module, nn.Module) and (record.nd > 0 or len(bn.running_mean) > 1):
        module.input_ndim = record.nd + 2  # the axes for which the fold is right; others are refused at the call
    return _Folded(module, *folded, owners=(conv, bn))


def _constant(gm: Any, value: Any) -> Any:
    """The array behind an argument that the plan found constant."""
    from .fx import Node

    return _resolve(gm, value.target) if isinstance(value, Node) else value


def _fold_functions(gm: Any, conv: Any, bn: Any, cache: dict[Any, _Folded]) -> _Folded:
    row, conv_args = _core.pass_bind(gm.graph, conv)
    _, bn_args = _core.pass_bind(gm.graph, bn)
    arrays = [_constant(gm, conv_args.get(name)) for name in ("weight", "bias")]
    arrays += [_constant(gm, bn_args.get(name)) for name in ("weight", "bias", "running_mean", "running_var")]
    w, b, gamma, beta, mean, var = arrays
    eps, groups = float(bn_args.get("eps", 1e-5)), int(conv_args.get("groups", 1))
    linear = "linear" in row
    transposed = "conv_transpose" in row or bool(conv_args.get("transposed", False))
    key = (*map(id, arrays), eps, linear, transposed, groups)
    if key not in cache:
        if linear:
            folded = _core.fold_linear_bn(w, b, mean, var, eps, gamma, beta)
        else:
            folded = _core.fold_conv_bn(w, b, mean, var, eps, gamma, beta, transposed, groups)
        _representable(folded, w, gamma, beta, transposed, groups)
        source = conv_args["weight"]
        stem = source.target.replace(".", "_") if hasattr(source, "target") else f"{conv.name}_weight"
        cache[key] = _Folded(None, *_like_parameters(folded, w, b), owners=tuple(arrays), stem=stem)
    return cache[key]


def plan(gm: Any, skip: tuple[str, ...]) -> Plan:
    """What can be folded, with the folded weights. Reads only."""
    rows = [FoldRow(*row) for row in _core.pass_fuse_plan(gm.graph, gm, skip)]
    nodes = {node.name: node for node in gm.graph.nodes}
    pairs: dict[tuple[int, int], _Folded] = {}
    arrays: dict[Any, _Folded] = {}
    folds = []
    for i, row in enumerate(rows):
        if row.outcome == "kept":
            continue
        assert row.conv is not None
        bn, conv = _named(nodes, row.node), _named(nodes, row.conv)
        try:
            if row.form == "module":
                modules = _resolve(gm, conv.target), _resolve(gm, bn.target)
                key = id(modules[0]), id(modules[1])
                if key not in pairs:
                    pairs[key] = _fold_modules(*modules)
                folded = pairs[key]
            else:
                folded = _fold_functions(gm, conv, bn, arrays)
        except _Refused as refused:
            from .report import REASONS

            hint = refused.hint or REASONS[refused.reason]
            rows[i] = replace(
                row, outcome="kept", reason=refused.reason, hint=hint, bytes_saved=None, flops_saved=None
            )
            continue
        rows[i] = replace(row, new_node=row.conv)
        folds.append(_Fold(row.node, row.conv, folded))
    return Plan(FoldReport(rows), folds)


# ---- copying ---------------------------------------------------------------------------------------------------------


class _Memory:
    """Bytes of somebody else's, as NumPy's array interface describes them."""

    def __init__(self, start: int, length: int) -> None:
        self.__array_interface__ = {"data": (start, True), "shape": (length,), "typestr": "|u1", "version": 3}


def _bounds(a: _Array) -> tuple[int, int]:
    """Where its memory begins and ends."""
    lo = hi = a.__array_interface__["data"][0]
    for size, stride in zip(a.shape, a.strides):
        lo, hi = lo + min(0, (size - 1) * stride), hi + max(0, (size - 1) * stride)
    return lo, hi + a.itemsize


def _copy(gm: Any) -> Any:
    """A deep copy, of the arrays in arguments too, in which arrays that shared memory still do."""
    from .fx.node import map_aggregate

    arrays = [value for module in gm.modules() for value in vars(module).values() if isinstance(value, np.ndarray)]
    literals: dict[int, _Array] = {}

    def collect(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            literals[id(value)] = value
        return value

    for node in gm.graph.nodes:
        map_aggregate((node.args, node.kwargs), collect)
    memo: dict[int, Any] = {}
    for members in _overlapping([*arrays, *literals.values()]):
        _copy_views(members, memo)
    result = copy.deepcopy(gm, memo)
    if literals:
        twins = {key: memo[key] if key in memo else copy.deepcopy(array, memo) for key, array in literals.items()}
        for node in result.graph.nodes:
            node.args = map_aggregate(node.args, lambda value: twins.get(id(value), value))
            node.kwargs = map_aggregate(node.kwargs, lambda value: twins.get(id(value), value))
    return result


def _overlapping(arrays: list[_Array]) -> Iterator[list[_Array]]:
    """Groups of different arrays whose memory overlaps."""
    distinct = {id(a): a for a in arrays if a.size and not a.dtype.hasobject}
    spans = sorted(((*_bounds(a), key) for key, a in distinct.items()), key=lambda span: span[:2])
    group: list[_Array] = []
    end = 0
    for lo, hi, key in spans:
        if lo >= end:
            if len(group) > 1:
                yield group
            group = []
        group.append(distinct[key])
        end = max(end, hi)
    if len(group) > 1:
        yield group


def _copy_views(members: list[_Array], memo: dict[int, Any]) -> None:
    """Twins of the members in one copy of their memory (each lies in one allocation, so all between is theirs)."""
    bounds = [_bounds(a) for a in members]
    start, end = min(lo for lo, _ in bounds), max(hi for _, hi in bounds)
    room = np.empty(end - start + 64, np.uint8)
    skip = (start - room.__array_interface__["data"][0]) % 64  # aligned as the original is
    memory = room[skip : skip + end - start]
    memory[...] = np.asarray(_Memory(start, end - start))
    for view in members:
        offset = view.__array_interface__["data"][0] - start
        twin: _Array = np.ndarray(view.shape, view.dtype, memory, offset, view.strides)
        if isinstance(view, nn.Parameter):
            twin = nn.Parameter(twin, view.requires_grad)
        memo[id(view)] = twin


# ---- editing ---------------------------------------------------------------------------------------------------------


class _Slots:
    """Which attributes of which modules the nodes of a graph depend on: pairs of (id of the owner, name)."""

    def __init__(self, gm: Any) -> None:
        self.gm = gm
        self.users: dict[tuple[int, str], list[Any]] = {}
        slots: dict[str, set[tuple[int, str]]] = {}  # of each target
        for node in gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                target = node.target
                if target not in slots:
                    slots[target] = {*self.path(target), *self._inside(target)}
                for slot in slots[target]:
                    self.users.setdefault(slot, []).append(node)

    def path(self, target: str) -> Iterator[tuple[int, str]]:
        owner = self.gm
        for name in target.split("."):
            yield id(owner), name
            owner = getattr(owner, name)

    def _inside(self, target: str) -> Iterator[tuple[int, str]]:
        """What a call of the module itself depends on: all that it holds."""
        found = _resolve(self.gm, target)
        for module in found.modules() if hasattr(found, "modules") else ():
            for name in vars(module).get("_kinds", vars(module).get("_modules", ())):
                yield id(module), name

    def last(self, target: str) -> tuple[int, str]:
        return list(self.path(target))[-1]


def _set(owner: Any, name: str, value: Any) -> None:
    """setattr, but arrays become a parameter or buffer like what they replace or are."""
    if isinstance(value, np.ndarray) and not isinstance(value, nn.Parameter) and isinstance(owner, nn.Module):
        owner.register_buffer(name, value)
    else:
        setattr(owner, name, value)


class _Changes:
    """Attributes set and deleted, so that they can be put back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._saved: set[int] = set()  # ids of owners whose whole state is kept

    def set(self, owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name, _MISSING)

        def back() -> None:
            if old is not _MISSING:
                setattr(owner, name, old)
            elif hasattr(owner, name):  # not if setting it was what failed
                delattr(owner, name)

        self._undo.append(back)
        _set(owner, name, value)

    def delete(self, owner: Any, name: str) -> None:
        # The whole state, since putting one attribute back would put it last. Once for each owner: `back` keeps the
        # owner alive, so its id stays its own.
        if id(owner) not in self._saved:
            self._save(owner)
            self._saved.add(id(owner))
        delattr(owner, name)

    def _save(self, owner: Any) -> None:
        state = dict(vars(owner))
        kinds = dict(state["_kinds"]) if "_kinds" in state else None

        def back() -> None:
            vars(owner).clear()
            vars(owner).update(state)
            if kinds is not None:
                state["_kinds"].clear()
                state["_kinds"].update(kinds)

        self._undo.append(back)

    def take_back(self) -> None:
        for undo in reversed(self._undo):
            undo()


def _free_name(gm: Any, name: str) -> str:
    candidate, count = name, 0
    while hasattr(gm, candidate):
        count += 1
        candidate = f"{name}_{count}"
    return candidate


class _Editor:
    def __init__(self, gm: Any, folds: list[_Fold]) -> None:
        self.gm, self.graph, self.changes = gm, gm.graph, _Changes()
        nodes = {node.name: node for node in gm.graph.nodes}
        self.folds = [(_named(nodes, f.bn), _named(nodes, f.conv), f.folded) for f in folds]
        self.slots = _Slots(gm)
        self.freed: list[tuple[Any, str]] = []  # (owner, name) that may have lost its last user
        self.names: dict[int, Any] = {}  # id of a _Folded -> target(s) of what it became

    def run(self) -> None:
        # Which call takes its convolution from where, before any name changes hands.
        takes = {conv: folded for _, conv, folded in self.folds}
        for bn, conv, folded in self.folds:
            if folded.module is not None:
                self._free(bn.target)
                self._module(conv, folded, takes)
            else:
                self._function(bn, conv, folded)
            self._remove_bn(bn, conv)
        self._delete_unused()

    def _free(self, target: str) -> None:
        path, _, name = target.rpartition(".")
        self.freed.append((_resolve(self.gm, path) if path else self.gm, name))

    def _module(self, conv: Any, folded: _Folded, takes: dict[Any, _Folded]) -> None:
        """The call gets the folded module: under the old name if all who use that name get it, else under a new one."""
        target = conv.target
        if (id(folded), target) not in self.names:
            users = self.slots.users[self.slots.last(target)] if self.names.get(target) is None else ()
            if users and all(takes.get(user) is folded and user.target == target for user in users):
                self.names[id(folded), target] = target
                path, _, name = target.rpartition(".")
                self.changes.set(_resolve(self.gm, path) if path else self.gm, name, folded.module)
            else:
                if id(folded) not in self.names:
                    name = _free_name(self.gm, f"{target.replace('.', '_')}_folded")
                    self.changes.set(self.gm, name, folded.module)
                    self.names[id(folded)] = name
                self.names[id(folded), target] = self.names[id(folded)]
        new = self.names[id(folded), target]
        if new != target:
            self._free(target)
            conv.target = new

    def _function(self, bn: Any, conv: Any, folded: _Folded) -> None:
        """The call gets two new constants."""
        if id(folded) not in self.names:
            pair = []
            for kind, value in (("", folded.weight), ("_bias", folded.bias)):
                pair.append(_free_name(self.gm, f"{folded.stem}_folded{kind}"))
                self.changes.set(self.gm, pair[-1], value)
            self.names[id(folded)] = pair
        old = [node for node in dict.fromkeys([*conv.all_input_nodes, *bn.all_input_nodes]) if node.op == "get_attr"]
        args, kwargs = list(conv.args), dict(conv.kwargs)
        with self.graph.inserting_before(conv):
            constants = [self.graph.create_node("get_attr", name) for name in self.names[id(folded)]]
        for position, (key, node) in enumerate(zip(("weight", "bias"), constants), 1):
            if position < len(args):
                args[position] = node
            else:
                kwargs[key] = node
        conv.args, conv.kwargs = tuple(args), kwargs
        self.old = old

    def _remove_bn(self, bn: Any, conv: Any) -> None:
        if bn.op == "call_function" and _core.op_info(_core.op_lookup(bn.target) or "")["nreturns"] != 1:
            for item in list(bn.users):  # results of a tuple form; only the first is used
                item.replace_all_uses_with(conv)
                self.graph.erase_node(item)
        else:
            bn.replace_all_uses_with(conv)
        self.graph.erase_node(bn)
        if bn_was_function := getattr(self, "old", None):
            for node in bn_was_function:
                if not node.users:
                    self._free(node.target)
                    self.graph.erase_node(node)
            self.old = []

    def _delete_unused(self) -> None:
        used = _Slots(self.gm).users
        for owner, name in self.freed:
            if (id(owner), name) not in used and name in vars(owner):
                self.changes.delete(owner, name)


def fuse(gm: Any, skip: tuple[str, ...], strict: bool, inplace: bool) -> tuple[Any, FoldReport]:
    """Folds until nothing more can be: a BatchNorm behind a BatchNorm stands behind the convolution once the first is
    gone.

    A failure, also of `strict`, leaves `gm` as it was.
    """
    result, rows, editors = gm, dict[tuple[str, str | None], FoldRow](), list[_Editor]()
    snapshot = gm.graph._snapshot() if inplace else None
    try:
        while True:
            step = plan(result, skip)
            rows.update(((row.node, row.target), row) for row in step.report)
            if not step.folds:
                break
            if result is gm and not inplace:
                result = _copy(gm)
            editors.append(_Editor(result, step.folds))
            editors[-1].run()
        report = FoldReport(rows.values())
        if strict and not report.ok:
            kept = [row for row in report if row.outcome == "kept"]
            text = f"strict: {len(kept)} of {len(report)} BatchNorms cannot be folded\n{report}"
            raise FoldError(text, kept[0].reason)
    except BaseException:
        if snapshot is not None:
            gm.graph._restore(snapshot)
            for editor in reversed(editors):
                editor.changes.take_back()
        raise
    return _copy(gm) if result is gm and not inplace else result, report
