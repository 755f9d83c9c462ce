# SPDX-License-Identifier: BSD-3-Clause
"""Graphs of array programs with torch.fx's names and behaviour, over a node list written in C.

>>> from pyconvbn import fx
>>> graph = fx.Graph()
>>> x = graph.placeholder("x")
>>> graph.output(graph.call_method("relu", (x,)))
output
>>> [node.name for node in graph.nodes]
['x', 'relu', 'output']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# public name -> module of this package that defines it; None: the module of that name itself.
_LAZY: dict[str, str | None] = {
    "Graph": "graph",
    "Node": "node",
    "Argument": "node",
    "map_arg": "node",
    "map_aggregate": "node",
    "immutable_list": "immutable",
    "immutable_dict": "immutable",
    "draw": "drawing",
    "draw_before_after": "drawing",
    "drawing": None,
    "to_dot": "drawing",
    "Attribute": "proxy",
    "GraphAppendingTracer": "proxy",
    "GraphModule": "graph_module",
    "Interpreter": "interpreter",
    "Proxy": "proxy",
    "TraceError": "proxy",
    "Tracer": "tracer",
    "Transformer": "interpreter",
    "symbolic_trace": "tracer",
    "wrap": "tracer",
    "InternalMatch": "matcher",
    "SubgraphMatcher": "matcher",
    "replace_pattern": "subgraph_rewriter",
    "replace_pattern_with_filters": "subgraph_rewriter",
    "subgraph_rewriter": None,
    "pattern_matcher": None,
    "from_torch": "_from_torch",
    "shape_prop": None,
    "TensorMeta": "shape_prop",
    "to_aten": "_to_aten",
}

__all__ = [*_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyconvbn.fx' has no attribute {name!r}")
    home = _LAZY[name]
    module = importlib.import_module(f".{home or name}", __name__)
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from .shape_prop import TensorMeta, shape_prop
    from . import drawing
    from .drawing import draw, draw_before_after, to_dot
    from ._from_torch import from_torch
    from ._to_aten import to_aten
    from .graph import Graph
    from .graph_module import GraphModule
    from .immutable import immutable_dict, immutable_list
    from .interpreter import Interpreter, Transformer
    from .matcher import InternalMatch, SubgraphMatcher
    from .node import Argument, Node, map_aggregate, map_arg
    from .proxy import Attribute, GraphAppendingTracer, Proxy, TraceError
    from .subgraph_rewriter import replace_pattern, replace_pattern_with_filters
    from .tracer import Tracer, symbolic_trace, wrap
