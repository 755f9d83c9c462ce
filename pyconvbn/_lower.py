# SPDX-License-Identifier: BSD-3-Clause
"""Module calls become `ops.aten` calls, in place: what the steps of freezing read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core, nn
from ._pass_run import all_or_nothing, no_collection
from .freeze_report import REASONS, FreezeRow
from .fx import _aten_functions, _aten_modules  # noqa: F401  (their rows)
from .fx._aten_table import MODULES, Lowering, NoLowering, _aten
from .fx._torch_modules import ChannelDropout
from .fx.graph_module import resolve

if TYPE_CHECKING:
    from .fx import GraphModule, Node

__all__ = ["lower_modules"]

#: What a subclass may not define (of its special methods), and what it may (of the others), to compute what its base
#: class computes.
_MATTERS = frozenset({"__call__", "__getattr__", "__getattribute__"})
_HARMLESS = frozenset({"extra_repr", "_check_input_dim", "input_ndims", "reset_running_stats"})


def lower_modules(
    gm: GraphModule, nodes: Iterable[Node] | None = None, *, report: list[FreezeRow] | None = None
) -> int:
    """Rewrites calls of layer modules as calls of `ops.aten` operators, in place.

    Convolutions, linear layers, BatchNorm in eval mode, activations, pooling and whatever else `fx.to_aten` knows
    become operators that read the module's parameters through get_attr nodes ("block.conv.weight"). The node that gives
    the result stays the node it was, with its name, metadata and shape; `Identity`, and dropout in eval mode, vanish.
    Left as they are: BatchNorm and dropout in training, modules with hooks or a forward of their own, other classes.

    Args:
        gm: the graph to change.
        nodes: look at these nodes only.
        report: gets a row for each call_module node looked at.

    Returns:
        How many nodes changed.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).
        AttributeError: it has no module of the name that a node calls.

    >>> from pyconvbn import fx, nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    >>> lower_modules(gm)
    2
    >>> [str(node.target) for node in gm.graph.nodes]
    ['input', '0.weight', '0.bias', 'aten.conv2d.default', 'aten.relu.default', 'output']
    """
    from .passes import _check

    graph = _check(gm)
    calls = graph._find("call_module", None)
    if nodes is not None:
        wanted = set(nodes)
        calls = [node for node in calls if node in wanted]
    if not calls:
        return 0
    rows: list[FreezeRow] = []
    with no_collection(), all_or_nothing(gm), graph.inserting_before(calls[0]):
        changed = _InPlace(gm, rows).run(calls)
    if report is not None:
        report.extend(rows)
    return changed


class _Kept(Exception):
    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint or REASONS[reason]


class _Shapes:
    """Node -> shape, where it is known; what the rows of the table ask."""

    @staticmethod
    def get(node: Any) -> tuple[int, ...] | None:
        found = _core.op_tensor(node)
        return None if found is None else found[0]


@dataclass
class _Facts:
    """What a module class is."""

    row: Any  # of the table; None: not to be lowered, for `reason`
    base: Any
    modes: bool = False  # training is something else than eval
    guarded: bool = False  # has methods and attributes that _ConvNd and Linear have
    same: bool = False  # two calls of one module are one operator with equal arguments
    quick: Any = None  # what calls of this very class become, where that is simple
    reason: str = ""
    hint: str = ""


def _own_name(cls: type, base: type) -> str | None:
    """What makes calls of `cls` something else than calls of its base class; None: nothing does."""
    for c in cls.__mro__:
        if c is base:
            return None
        for name, value in vars(c).items():
            if name.startswith("__") and name.endswith("__"):
                if name not in _MATTERS:
                    continue
            elif name in _HARMLESS:
                continue
            if hasattr(base, name) or hasattr(type(value), "__set__"):
                return name
    return None


class _InPlace:
    """One run; `owner` of the rows of `fx.to_aten`: what they emit goes before the node, the last call becomes it."""

    def __init__(self, gm: Any, rows: list[FreezeRow]) -> None:
        self.gm, self.graph, self.rows = gm, gm.graph, rows
        self.shapes = _Shapes()
        self.attributes: dict[str, Any] = {}  # dotted name -> get_attr node
        self.classes: dict[type, _Facts] = {}
        self.owners: dict[str, Any] = {}  # dotted name -> what has the modules called
        self.recipes: dict[str, tuple[Any, tuple[Any, ...], str]] = {}  # of a module: operator, arguments after the first
        self.texts: dict[Any, str] = {}
        self.node: Any = None
        self.tensor: Any = None
        self.made: list[Any] = []
        self.last: tuple[Any, tuple[Any, ...], str] = (None, (), "")
        self.to: Any = Lowering(self)
        self.to.module = self.inner  # parts of a container are asked the same questions

    def run(self, calls: list[Any]) -> int:
        changed, rows, recipes, attributes = 0, self.rows, self.recipes, self.attributes
        op_tensor, lower_layer = _core.op_tensor, _core.lower_layer
        for node in calls:
            target = node.target
            self.node = node
            if self.made:
                self.made = []
            if target in recipes:  # a call of the same module was lowered before
                recipe, args = recipes[target], node.args
                if len(args) == 1 and not node.kwargs:
                    self.tensor = op_tensor(node)
                    self.become(node, recipe[0], (args[0], *recipe[1]))
                    changed += 1
                    rows.append(FreezeRow("lower", node.name, "done", "OK", None, "", recipe[2]))
                    continue
            module = self.module(target)
            if type(module) is nn.FrozenLayer:
                continue  # it was lowered, and then prepared
            try:
                facts = self.question(module)
                if facts.quick is not None:
                    simple = facts.quick(facts.base, module.__dict__)
                    if simple is not None:
                        operator, text, names, rest = simple
                        row = lower_layer(node, operator, target, names, module.__dict__, rest, attributes, text)
                        if row is not None:
                            changed += 1
                            rows.append(row)
                            continue
                name, self.tensor = node.name, op_tensor(node)  # it may be gone then
                into = self.lower(facts, node, module, target)
            except _Kept as kept:
                self.undo()
                rows.append(FreezeRow("lower", node.name, "kept", kept.reason, None, kept.hint, None))
            except (NoLowering, AttributeError, KeyError, TypeError, ValueError) as error:
                # A module with attributes that make no sense: its call says so better.
                self.undo()
                rows.append(FreezeRow("lower", node.name, "kept", "UNSUPPORTED", None, str(error), None))
            else:
                changed += 1
                rows.append(FreezeRow("lower", name, "done", "OK", None, "", into))
        return changed

    def module(self, target: str) -> Any:
        """The module of that name; what is above it is looked up once."""
        path, _, name = target.rpartition(".")
        owner = self.owners.get(path)
        if owner is None:
            owner = self.owners[path] = resolve(self.gm, path) if path else self.gm
        found = owner.__dict__.get(name) if isinstance(owner, nn.Module) else None
        return resolve(self.gm, target) if found is None else found

    def undo(self) -> None:
        for made in reversed(self.made):
            if made.op == "get_attr":
                del self.attributes[made.target]
            self.graph.erase_node(made)

    # -- one call ----------------------------------------------------------------------------------------------------
    def lower(self, facts: _Facts, node: Any, module: Any, path: str) -> str:
        """Changes the node; what it is now."""
        args, kwargs = node.args, node.kwargs
        if len(args) == 1 and not kwargs:
            result = facts.row(self.to, node, module, path, args[0])
            if result is node and facts.same and (not self.made or self.made[0].op == "get_attr"):
                self.recipes[path] = self.last
        elif not args and len(kwargs) == 1 and "input" in kwargs:
            result = facts.row(self.to, node, module, path, kwargs["input"])
        else:
            result = self.bound(facts, node, module, path, args, kwargs)
        if result is node:
            return self.last[2]
        if not hasattr(result, "all_input_nodes"):
            raise _Kept("UNSUPPORTED")
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)
        return str(result.name)

    def inner(self, node: Any, module: Any, path: str, args: Any, kwargs: Any) -> Any:
        """A part of a container."""
        return self.bound(self.question(module, args[0]), node, module, path, args, kwargs)

    def bound(self, facts: _Facts, node: Any, module: Any, path: str, args: Any, kwargs: Any) -> Any:
        values = inspect.signature(facts.base.forward).bind(module, *args, **kwargs)
        return facts.row(self.to, node, module, path, *values.args[1:], **values.kwargs)

    def question(self, module: Any, x: Any = None) -> _Facts:
        """The row of the module's class; _Kept if the call is not what that class computes."""
        facts = self.classes.get(type(module))
        if facts is None:
            facts = self.classes[type(module)] = self.facts(type(module))
        if facts.row is None:
            raise _Kept(facts.reason, facts.hint)
        state = module.__dict__
        if module._hooked and (module._forward_hooks or module._forward_pre_hooks):
            raise _Kept("HOOKED")
        if "forward" in state or (facts.guarded and ("_pad_amounts" in state or "output_padding_for" in state)):
            raise _Kept("HOOKED")
        if facts.modes and module.training:
            raise _Kept("TRAINING")
        if facts.guarded and "input_ndim" in state:
            self.guard(module, x)
        return facts

    def facts(self, cls: type) -> _Facts:
        base = next((c for c in cls.__mro__ if c in MODULES), None)
        if base is None:
            hint = f"{cls.__name__} is not a layer that this package knows: its call may do anything"
            return _Facts(None, None, reason="UNKNOWN", hint=hint)
        if cls is not base and (name := _own_name(cls, base)) is not None:
            hint = f"{cls.__name__} has its own {name!r}, so its call is not that of {base.__name__}"
            return _Facts(None, None, reason="HOOKED", hint=hint)
        return _Facts(
            _ROWS.get(base, MODULES[base]), base, modes=base in _WITH_MODES, guarded=base in _GUARDED,
            same=base in _GUARDED or base in _WITH_MODES or base.__module__ in _SAME,
            quick=_QUICK.get(base) if cls is base else None,
        )

    def guard(self, module: Any, x: Any) -> None:
        """A module with a BatchNorm folded in refuses inputs of another number of axes; an operator would not."""
        if module.input_ndim is None:
            return
        inputs = self.node.all_input_nodes if x is None else [x]
        shape = self.shapes.get(inputs[0]) if inputs and hasattr(inputs[0], "all_input_nodes") else None
        if shape is None:
            raise _Kept("SHAPE_UNKNOWN")
        if len(shape) != module.input_ndim:
            hint = f"a BatchNorm is folded into it, which is exact for {module.input_ndim} axes only: the call will raise"
            raise _Kept("UNSUPPORTED", hint)

    # -- what the rows of the table use ------------------------------------------------------------------------------
    def array(self, path: str, array: Any) -> Any:
        """The node that reads a parameter or buffer; made once, before the first node that needs it."""
        if array is None:
            return None
        node = self.attributes.get(path)
        if node is None:
            if not isinstance(array, np.ndarray):
                raise _Kept("UNSUPPORTED", f"{path} is a {type(array).__name__}, not an array")
            node = self.attributes[path] = self.create("get_attr", path, ())
            if self.tensor is not None:
                dtype = array.dtype
                _core.op_set_tensor(node, (array.shape, dtype.kind, dtype.itemsize))
        return node

    def create(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if not self.made:
            self.graph._set_insert_point(self.node, False)
        made = self.graph.create_node(op, target, args, kwargs)
        self.made.append(made)
        return made

    def emit(self, name: str | None, target: Any, *args: Any, **kwargs: Any) -> Any:
        """The call that gives the result (it has a name) becomes the module call's node, others are new."""
        if name is None:
            made = self.create("call_function", target, args, kwargs)
            if self.tensor is not None:
                _core.op_infer_shape(made, self.gm)
            return made
        text = self.texts.get(target)
        if text is None:
            text = self.texts[target] = str(target)
        self.last = (target, args[1:], text)
        self.become(self.node, target, args, kwargs)
        return self.node

    def become(self, node: Any, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if kwargs or node.kwargs:
            node.kwargs = kwargs or {}
        node.op = "call_function"
        node.target = target
        node.args = args
        if self.tensor is not None:  # it has another form, not another value
            _core.op_set_tensor(node, self.tensor)


# -- rows that differ from those of fx.to_aten -------------------------------------------------------------------------
def _batch_norm(to: Any, node: Any, module: Any, path: str, input: Any) -> Any:
    if module.running_mean is None or module.running_var is None:
        raise _Kept("UNSUPPORTED", "a BatchNorm without running statistics computes with those of each batch")
    return MODULES[nn.BatchNorm2d](to, node, module, path, input)


def _pass_on(to: Any, node: Any, module: Any, path: str, input: Any) -> Any:
    return input


# -- the same as the rows of fx.to_aten, for the layers of which there may be very many; None: not that simple -----------
#: Operator, its name, members of the module that it takes after the input, and what follows those.
_Simple = tuple[Any, str, tuple[str, ...], tuple[Any, ...]]


def _operator(name: str) -> tuple[Any, str]:
    found = _aten(name)
    return found, str(found)


def _quick_conv(cls: Any, state: dict[str, Any]) -> _Simple | None:
    padding = state["padding"]
    if state["padding_mode"] != "zeros" or type(padding) is not tuple:
        return None
    target, text = _CONV_OPERATORS[cls]
    return target, text, _WEIGHTS, ([*state["stride"]], [*padding], [*state["dilation"]], state["groups"])


def _quick_linear(cls: Any, state: dict[str, Any]) -> _Simple | None:
    return _LINEAR


def _quick_batch_norm(cls: Any, state: dict[str, Any]) -> _Simple | None:
    momentum = state["momentum"]
    if state["running_mean"] is None or state["running_var"] is None or type(momentum) is not float:
        return None
    return *_BATCH_NORM, _STATISTICS, (False, momentum, state["eps"], False)


def _quick_relu(cls: Any, state: dict[str, Any]) -> _Simple | None:
    return _RELU


_WEIGHTS = ("weight", "bias")
_STATISTICS = (*_WEIGHTS, "running_mean", "running_var")
_CONV_OPERATORS = {cls: _operator(f"conv{cls.nd}d.default") for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_BATCH_NORM = _operator("batch_norm.default")
_LINEAR: _Simple = (*_operator("linear.default"), _WEIGHTS, ())
_RELU: _Simple = (*_operator("relu.default"), (), ())

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ROWS: dict[type, Any] = {
    **dict.fromkeys(_NORMS, _batch_norm), nn.Dropout: _pass_on, ChannelDropout: _pass_on, nn.Identity: _pass_on,
}
_GUARDED = frozenset({*_CONVS, nn.Linear})
_WITH_MODES = frozenset({*_NORMS, nn.Dropout, ChannelDropout})
_SAME = frozenset({nn.ReLU.__module__})  # activations
_QUICK: dict[type, Any] = {
    **dict.fromkeys(_CONV_OPERATORS, _quick_conv), **dict.fromkeys(_NORMS, _quick_batch_norm),
    nn.Linear: _quick_linear, nn.ReLU: _quick_relu,
}
