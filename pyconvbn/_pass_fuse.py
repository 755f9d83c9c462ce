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
from ._fold import _fused_copy, _like_parameters
from ._modules import read_bn, read_conv
from .errors import FoldError
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


# ---- deciding and computing ------------------------------------------------------------------------------------------


class _Refused(Exception):
    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def _finite(*arrays: _Array) -> None:
    if not all(np.isfinite(a).all() for a in arrays):
        raise _Refused("NONFINITE_FOLD")


def _fold_modules(conv: Any, bn: Any) -> _Folded:
    record = read_conv(conv)
    weight, bias, mean, var, eps = read_bn(bn)
    if record.nd == 0:
        folded = _core.fold_linear_bn(record.weight, record.bias, mean, var, eps, weight, bias)
    else:
        folded = _core.fold_conv_bn(
            record.weight, record.bias, mean, var, eps, weight, bias, record.transposed, record.groups
        )
    _finite(*folded)
    try:
        module = _fused_copy(conv, folded, "conv")
    except Exception as error:
        raise _Refused("WEIGHT_SHARED", f"{type(conv).__name__} cannot be copied: {error}") from error
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
        _finite(*folded)
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
        bn, conv = nodes[row.node], nodes[row.conv]
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


def _copy(gm: Any) -> Any:
    """A deep copy in which arrays that were views of one memory still are."""
    memo: dict[int, Any] = {}
    groups: dict[int, list[_Array]] = {}
    bases: dict[int, _Array] = {}
    for module in gm.modules():
        for value in list(vars(module).values()):
            if not isinstance(value, np.ndarray):
                continue
            base = value
            while isinstance(base.base, np.ndarray):
                base = base.base
            bases[id(base)] = base
            groups.setdefault(id(base), []).append(value)
    for key, members in groups.items():
        if len({id(a) for a in members}) > 1:
            _copy_views(bases[key], members, memo)
    return copy.deepcopy(gm, memo)


def _copy_views(base: _Array, members: list[_Array], memo: dict[int, Any]) -> None:
    flat = base if base.flags.c_contiguous else base.T
    if not flat.flags.c_contiguous or base.dtype.hasobject:
        return
    memory = np.frombuffer(bytearray(flat.tobytes()), np.uint8)
    start = base.__array_interface__["data"][0]
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
        self._undo.append(lambda: delattr(owner, name) if old is _MISSING else setattr(owner, name, old))
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
        self.folds = [(nodes[f.bn], nodes[f.conv], f.folded) for f in folds]
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
    result, rows, editors = gm, dict[str, FoldRow](), list[_Editor]()
    snapshot = gm.graph._snapshot() if inplace else None
    try:
        while True:
            step = plan(result, skip)
            rows.update((row.node, row) for row in step.report)
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
