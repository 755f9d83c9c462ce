# SPDX-License-Identifier: BSD-3-Clause
"""Handlers registered for nodes by what they call, applied over a graph: torch._inductor's pattern matcher in small.

A pattern is a list of targets whose arguments may be anything; a handler sees the match and edits the graph. The three
handlers of `efficient_conv_bn_eval_pass` do through it what `passes.efficient_conv_bn_eval` does in one go.

>>> import operator
>>> from pyconvbn import fx
>>> from pyconvbn.fx.pattern_matcher import CallFunctionVarArgs, PatternMatcherPass, register_graph_pattern
>>> doubling = PatternMatcherPass("doubling")
>>> @register_graph_pattern(CallFunctionVarArgs(operator.mul), pass_dict=doubling,
...                         extra_check=lambda match: match.args[1] == 2)
... def use_add(match, x, two):
...     node = match.nodes[0]
...     with match.graph.inserting_before(node):
...         node.replace_all_uses_with(match.graph.call_function(operator.add, (x, x)))
...     match.erase_nodes()
>>> gm = fx.symbolic_trace(lambda x: x * 2 + x * 3)
>>> doubling.apply(gm), [node.name for node in gm.graph.nodes]
(1, ['x', 'add_1', 'mul_1', 'add', 'output'])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .. import config
from .graph import Graph
from .node import Node

__all__ = [
    "CallFunctionVarArgs", "CallMethodVarArgs", "CallModuleVarArgs", "Match", "PatternEntry", "PatternMatcherPass",
    "efficient_conv_bn_eval_pass", "register_graph_pattern",
]


@dataclass
class Match:
    """A place where a pattern fits.

    Attributes:
        pattern: the pattern.
        nodes: the nodes it covers, here always one.
        args, kwargs: the arguments of that node, which the handler is called with.
    """

    pattern: _VarArgs
    nodes: list[Node]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """The graph of the nodes."""
        return self.nodes[0].graph

    def output_node(self) -> Node:
        """The node whose value is the pattern's."""
        return self.nodes[0]

    def output_nodes(self) -> list[Node]:
        """The nodes whose values are the pattern's."""
        return list(self.nodes)

    def erase_nodes(self) -> None:
        """Erases the nodes of the match that are still there.

        Raises:
            RuntimeError: one of them has users left.
        """
        for node in reversed(self.nodes):
            if not node._erased:
                self.graph.erase_node(node)


class _VarArgs:
    """Calls of one of `fns` with any arguments."""

    op: ClassVar[str]

    def __init__(self, fns: Any) -> None:
        self.fns: tuple[Any, ...] = tuple(fns) if isinstance(fns, list | tuple | set | frozenset) else (fns,)
        if not self.fns:
            raise ValueError("fns: expected at least one target, got none")

    def _is_target(self, node: Node) -> bool:
        return any(node.target is fn for fn in self.fns)

    def match(self, node: Node) -> Match | None:
        """A match at `node`, or None."""
        if node.op != self.op or not self._is_target(node):
            return None
        return Match(self, [node], tuple(node.args), dict(node.kwargs))

    def __repr__(self) -> str:
        names = ", ".join(getattr(fn, "__name__", None) or str(fn) for fn in self.fns)
        return f"{type(self).__name__}([{names}])"


class CallFunctionVarArgs(_VarArgs):
    """Calls of these functions, with any arguments."""

    op = "call_function"


class CallMethodVarArgs(_VarArgs):
    """Calls of the methods of these names, with any arguments."""

    op = "call_method"

    def _is_target(self, node: Node) -> bool:
        return node.target in self.fns


class CallModuleVarArgs(_VarArgs):
    """Calls of modules of these classes (subclasses count), with any arguments."""

    op = "call_module"

    def __init__(self, fns: Any) -> None:
        super().__init__(fns)
        for cls in self.fns:
            if not isinstance(cls, type):
                raise TypeError(f"fns: expected module classes, got {cls!r}")

    def _is_target(self, node: Node) -> bool:
        module: Any = node.graph.owning_module
        for name in str(node.target).split("."):
            module = getattr(module, name, None)
        return isinstance(module, self.fns)


@dataclass
class PatternEntry:
    """A pattern with its handler and the condition under which it is applied."""

    pattern: _VarArgs
    extra_check: Callable[[Match], bool]
    handler: Callable[..., Any]

    def apply(self, match: Match) -> None:
        """Calls the handler with the match and the matched arguments."""
        self.handler(match, *match.args, **match.kwargs)


class PatternMatcherPass:
    """Registered patterns, applied to the nodes of a graph in order.

    Args:
        pass_name: for messages.
    """

    def __init__(self, pass_name: str | None = None) -> None:
        self.pass_name = pass_name
        self.patterns: list[PatternEntry] = []

    def __iter__(self) -> Iterator[PatternEntry]:
        return iter(self.patterns)

    def __len__(self) -> int:
        return len(self.patterns)

    def register(self, entry: PatternEntry, prepend: bool = False) -> None:
        """Adds an entry, asked after those there are (`prepend`: before)."""
        self.patterns.insert(0 if prepend else len(self.patterns), entry)

    def apply(self, graph: Any) -> int:
        """Calls the handler of the first entry that fits at each node; nodes that a handler erased are passed over.

        Args:
            graph: a Graph with an owning module, or a GraphModule.

        Returns:
            How often a handler was called.

        Raises:
            TypeError: `graph` is neither.
            Exception: what a handler or a check raises; the graph is then as it was.
        """
        graph = getattr(graph, "graph", graph)
        if not isinstance(graph, Graph):
            raise TypeError(f"graph: expected a Graph or a GraphModule, got {type(graph).__name__}")
        ops = {entry.pattern.op for entry in self.patterns}
        before = graph._snapshot()
        try:
            return sum(self._apply_at(node) for node in list(graph.nodes) if not node._erased and node.op in ops)
        except BaseException:
            graph._restore(before)
            raise

    def _apply_at(self, node: Node) -> bool:
        for entry in self.patterns:
            match = entry.pattern.match(node)
            if match is not None and entry.extra_check(match):
                entry.apply(match)
                return True
        return False

    def __repr__(self) -> str:
        return f"PatternMatcherPass({self.pass_name!r}, {len(self.patterns)} patterns)"


def _always(match: Match) -> bool:
    return True


def register_graph_pattern(
    pattern: _VarArgs | Sequence[_VarArgs],
    extra_check: Callable[[Match], bool] = _always,
    *,
    pass_dict: PatternMatcherPass,
    prepend: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated handler `handler(match, *args, **kwargs)`.

    Args:
        pattern: what to look for; several make an entry each.
        extra_check: a further condition; False leaves the node to other entries.
        pass_dict: where to register.
        prepend: before the entries there are.

    Raises:
        TypeError: `pattern` holds something else, or `pass_dict` is no PatternMatcherPass.
    """
    patterns: list[Any] = list(pattern) if isinstance(pattern, list | tuple) else [pattern]
    for one in patterns:
        if not isinstance(one, _VarArgs):
            known = "CallFunctionVarArgs, CallMethodVarArgs or CallModuleVarArgs"
            raise TypeError(f"pattern: expected {known}, got {one!r}")
    if not isinstance(pass_dict, PatternMatcherPass):
        raise TypeError(f"pass_dict: expected a PatternMatcherPass, got {type(pass_dict).__name__}")

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        for one in patterns:
            pass_dict.register(PatternEntry(one, extra_check, handler), prepend)
        return handler

    return decorate


# ---- the handlers of the efficient ConvBN pass -----------------------------------------------------------------------


def _enabled(match: Match) -> bool:
    return config.efficient_conv_bn_eval_fx_passes and not config.freezing


def _fuse_one(match: Match) -> None:
    from ..passes import _run_efficient

    node = match.output_node()
    _run_efficient(node.graph.owning_module, only=node)


def _make_efficient_pass() -> PatternMatcherPass:
    from .. import functional, nn
    from ..nn.batchnorm import _BatchNorm
    from ..ops import aten

    made = PatternMatcherPass("efficient_conv_bn_eval_pass")
    modules = [_BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm]
    operators = [aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default]

    @register_graph_pattern(CallModuleVarArgs(modules), extra_check=_enabled, pass_dict=made)
    def fuse_modules(match: Match, *args: Any, **kwargs: Any) -> None:
        _fuse_one(match)

    @register_graph_pattern(CallFunctionVarArgs(functional.batch_norm), extra_check=_enabled, pass_dict=made)
    def fuse_functions(match: Match, *args: Any, **kwargs: Any) -> None:
        _fuse_one(match)

    @register_graph_pattern(CallFunctionVarArgs(operators), extra_check=_enabled, pass_dict=made)
    def fuse_operators(match: Match, *args: Any, **kwargs: Any) -> None:
        _fuse_one(match)

    return made


#: The efficient ConvBN pass as three registered handlers (modules, functions, ATen operators). They look at the
#: switches of `pyconvbn.config` as `passes.pre_grad` does.
efficient_conv_bn_eval_pass = _make_efficient_pass()
