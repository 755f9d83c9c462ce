# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of the run loop share: small graphs and a look at their programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyconvbn import _core, fx, nn


class Box:
    """A value that can be watched."""


def module_of(graph: fx.Graph, **members: Any) -> fx.GraphModule:
    """A GraphModule of the graph with these members."""
    root = nn.Module()
    for name, value in members.items():
        setattr(root, name, value)
    return fx.GraphModule(root, graph)


def chain(*functions: Callable[..., Any]) -> fx.GraphModule:
    """x through the functions, one after the other."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for function in functions:
        node = graph.call_function(function, (node,))
    graph.output(node)
    return module_of(graph)


def direct_of(gm: fx.GraphModule) -> dict[str, str | None]:
    """For each node the function of _core that is called without its Python wrapper, or None."""
    return {name: direct for name, _, direct, _ in _core.Program(gm.graph).steps()}
