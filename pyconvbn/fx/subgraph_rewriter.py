# SPDX-License-Identifier: BSD-3-Clause
"""Replacing every occurrence of a small graph inside a larger one. Matching and replacing are written in C.

>>> import operator
>>> from pyconvbn import fx
>>> gm = fx.symbolic_trace(lambda a, b: operator.mul(operator.add(a, b), 2))
>>> def pattern(x, y):
...     return operator.add(x, y)
>>> def replacement(x, y):
...     return operator.sub(x, operator.neg(y))
>>> len(fx.replace_pattern(gm, pattern, replacement))
1
>>> [node.name for node in gm.graph.nodes]
['a', 'b', 'neg', 'sub', 'mul', 'output']
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from ..nn import Module, Parameter
from .graph import Graph
from .graph_module import GraphModule, resolve
from .matcher import graph_of, InternalMatch
from .node import Node

__all__ = ["Match", "ReplacedPatterns", "replace_pattern", "replace_pattern_with_filters"]

#: What may be given as a pattern or a replacement: a function or module (it is traced), or a graph.
Pattern = Callable[..., Any] | Graph
MatchFilter = Callable[[InternalMatch, Graph, Graph], bool]


class Match(NamedTuple):
    """A replaced match: the pattern's node where matching started, and what each node of the pattern matched.

    The matched nodes themselves were erased; what placeholders are bound to is still in the graph.
    """

    anchor: Node
    nodes_map: dict[Node, Any]


@dataclass
class ReplacedPatterns:
    """A replaced match as `Match`, with the nodes that took its place."""

    anchor: Node
    nodes_map: dict[Node, Any]
    replacements: list[Node]


def replace_pattern(gm: GraphModule, pattern: Pattern, replacement: Pattern) -> list[Match]:
    """Replaces every match of `pattern` in `gm.graph` by a copy of `replacement`, in place.

    What a match is: see `SubgraphMatcher`. Of overlapping matches the first is replaced. The replacement's placeholders
    take, in order, what the pattern's are bound to; its results take the place of what the pattern returns, place by
    place. The new nodes stand before the first user of the match's results, if all inputs are defined there, else right
    after the last input, and users in between move behind them.

    A node that takes the place of a returned value inherits that node's `meta`; another new node inherits the `meta` of
    the only matched node with the same target, if there is one, without what describes its value. What the
    replacement's own node has in `meta` comes on top, except for the source line (`stack_trace`). Modules and arrays
    that the replacement refers to and `gm` does not have are copied into `gm`; what `gm` has under the same name is used
    as it is.

    Args:
        gm: the module to change.
        pattern: a function, a Graph or a GraphModule.
        replacement: the same, with as many parameters and results as the pattern.

    Returns:
        The replaced matches in order.

    Raises:
        ValueError: a pattern that cannot be used, or numbers of parameters or results that differ.
        RuntimeError: the new graph would have a cycle, or a node would have to move past one with side effects.
        TypeError: an argument of another kind.

    Whatever is raised, `gm` is as it was before.

    >>> import operator
    >>> from pyconvbn import fx
    >>> gm = fx.symbolic_trace(lambda a: operator.add(operator.mul(a, 2), 1))
    >>> _ = fx.replace_pattern(gm, lambda x, y: operator.add(operator.mul(x, 2), y), lambda x, y: operator.add(x, y))
    >>> gm(5)
    6
    """
    results = _replace(gm, pattern, replacement, (), False, None, simple=True)
    return [r if isinstance(r, Match) else Match(r.anchor, r.nodes_map) for r in results]


def replace_pattern_with_filters(
    gm: GraphModule,
    pattern: Pattern,
    replacement: Pattern | None = None,
    match_filters: Iterable[MatchFilter] | None = None,
    ignore_literals: bool = False,
    replacement_callback: Callable[[InternalMatch, Graph, Graph], Graph] | None = None,
) -> list[ReplacedPatterns]:
    """`replace_pattern` for the matches that all filters accept, with a replacement that may depend on the match.

    Args:
        gm: the module to change.
        pattern: a function, a Graph or a GraphModule.
        replacement: the same; may be None when there is a callback.
        match_filters: functions `(match, graph, pattern_graph) -> bool`; all are asked before anything is replaced.
            They and the callback can look at the graph, not change it.
        ignore_literals: literals of the pattern match any literal.
        replacement_callback: `(match, graph, pattern_graph) -> Graph`, called for each match; its Graph or GraphModule
            takes the place of `replacement`.

    Returns:
        The replaced matches in order, each with the new nodes.

    Raises:
        ValueError, RuntimeError, TypeError: as `replace_pattern`; and whatever a filter or the callback raises. The
            graph is then as it was before.

    >>> import operator
    >>> from pyconvbn import fx
    >>> gm = fx.symbolic_trace(lambda a: operator.add(operator.add(a, 1), 2))
    >>> def only_two(match, graph, pattern):
    ...     return match.placeholder_nodes[1] == 2
    >>> [done] = fx.replace_pattern_with_filters(gm, operator.add, operator.mul, [only_two])
    >>> done.replacements, gm(3)
    ([mul], 8)
    """
    if match_filters is not None and not isinstance(match_filters, Iterable):
        raise TypeError(f"match_filters: expected a list of functions, got {type(match_filters).__name__}")
    filters = () if match_filters is None else tuple(match_filters)
    for one in filters:
        if not callable(one):
            raise TypeError(f"match_filters: expected functions, got {type(one).__name__}")
    return _replace(gm, pattern, replacement, filters, ignore_literals, replacement_callback, simple=False)


def _replace(
    gm: GraphModule,
    pattern: Pattern,
    replacement: Pattern | None,
    filters: tuple[MatchFilter, ...],
    ignore_literals: bool,
    callback: Callable[[InternalMatch, Graph, Graph], Graph] | None,
    *,
    simple: bool,
) -> list[Any]:
    if not isinstance(gm, GraphModule):
        raise TypeError(f"gm: expected a GraphModule, got {type(gm).__name__}")
    if callback is None and replacement is None:
        raise TypeError("replacement: expected a function, a Graph or a GraphModule (or a callback), got None")
    if callback is not None and not callable(callback):
        raise TypeError(f"replacement_callback: expected a function, got {type(callback).__name__}")
    graph = gm.graph
    pattern_graph, owner = _other_graph(pattern, "pattern", graph)
    new_graph, new_owner, ask = None, None, None
    owners: list[Any] = []  # of the replacement of each match
    if callback is None:
        new_graph, new_owner = _other_graph(replacement, "replacement", graph)
    else:

        def ask(match: InternalMatch, graph: Graph, pattern_graph: Graph) -> Graph:
            new, new_owner = _other_graph(callback(match, graph, pattern_graph), "replacement_callback", graph)
            owners.append(new_owner)
            return new

    homing = callback is not None or any(n.op in ("get_attr", "call_module") for n in new_graph.nodes)
    simple = simple and not homing

    def finish(results: list[ReplacedPatterns]) -> None:
        _take_over(gm, zip(results, owners if callback is not None else [new_owner] * len(results), strict=True))

    results = _core._rewrite_graph(
        graph, pattern_graph, new_graph, filters, ask, ignore_literals, InternalMatch,
        Match if simple else ReplacedPatterns, not simple, finish if homing else None,
    )  # fmt: skip
    del owner
    if results:
        gm.recompile()
        if isinstance(replacement, Module):
            gm.delete_all_unused_submodules()
    return results


def _other_graph(source: Any, argument: str, graph: Graph) -> tuple[Graph, Any]:
    """As `graph_of`, with a copy in place of `graph` itself, which is going to change."""
    found, owner = graph_of(source, argument)
    return (copy.deepcopy(found), owner) if found is graph else (found, owner)


def _take_over(gm: GraphModule, replaced: Iterable[tuple[ReplacedPatterns, Any]]) -> None:
    """Gives `gm` what the new nodes refer to and it does not have. What can fail comes before the first change."""
    new: dict[str, Any] = {}
    homes: dict[int, str] = {}  # of constants met while tracing: id of the array -> name in gm
    renamed: list[tuple[Node, str]] = []
    for result, owner in replaced:
        for node in result.replacements:
            if node.op not in ("get_attr", "call_module"):
                continue
            target = node.target
            wanted = _find(owner, target)
            existing = new[target] if target in new else _find(gm, target)
            if target.startswith("_tensor_constant") and wanted is not None and existing is not wanted:
                # Tracing counts its constants in each function anew: the same name says nothing.
                if id(wanted) not in homes:
                    i = 0
                    while hasattr(gm, name := f"_tensor_constant{i}") or name in new:
                        i += 1
                    homes[id(wanted)] = name
                    new[name] = wanted
                if homes[id(wanted)] != target:
                    renamed.append((node, homes[id(wanted)]))
            elif existing is None and wanted is None:
                raise RuntimeError(
                    f"replacement: node '{node}' refers to {target!r}, which neither gm nor the replacement has"
                )
            elif existing is None:
                new[target] = copy.deepcopy(wanted)
    for node, name in renamed:
        node.target = name
    placed: list[tuple[Any, str]] = []
    try:
        for target in sorted(new, key=lambda t: t.count(".")):
            placed.append(_first_missing(gm, target))
            _put(gm, target, new[target])
    except BaseException:
        for at, name in placed:
            if hasattr(at, name):
                delattr(at, name)
        raise


def _first_missing(gm: GraphModule, target: str) -> tuple[Any, str]:
    """The object on the way to `target` that lacks the next name, and that name."""
    at: Any = gm
    *path, last = target.split(".")
    for name in path:
        if not hasattr(at, name):
            return at, name
        at = getattr(at, name)
    return at, last


def _put(gm: GraphModule, target: str, value: Any) -> None:
    path, _, name = target.rpartition(".")
    if isinstance(value, Module):
        done = gm.add_submodule(target, value)
    else:
        done = not path or _find(gm, path) is not None or gm.add_submodule(path, Module())
        if done:
            owner = resolve(gm, path) if path else gm
            is_buffer = isinstance(value, np.ndarray) and not isinstance(value, Parameter)
            if is_buffer and isinstance(owner, Module):
                owner.register_buffer(name, value)
            else:
                setattr(owner, name, value)
    if not done:
        raise RuntimeError(f"replacement: {target!r} cannot be put into gm: the path leads through another object")


def _find(owner: Any, target: str) -> Any:
    if owner is None:
        return None
    try:
        return resolve(owner, target)
    except AttributeError:
        return None
