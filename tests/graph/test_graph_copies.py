# SPDX-License-Identifier: BSD-3-Clause
"""Copies of graphs: node by node, whole, and through pickle."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import fx

sys.path.insert(0, str(Path(__file__).parent))
from graph_util import sample  # noqa: E402


def names(graph: Any) -> list[str]:
    return [n.name for n in graph.nodes]


def test_graph_copy_and_node_copy() -> None:
    g, target = sample(), fx.Graph()
    x = target.placeholder("x")
    val_map: dict[fx.Node, Any] = {next(iter(g.nodes)): x}
    list(g.nodes)[3].meta["k"] = 1
    value = target.graph_copy(g, val_map)
    assert names(target) == ["x", "y", "layer_weight", "add", "relu", "layer_0_conv"]
    assert value == (val_map[list(g.nodes)[5]], {"aux": val_map[list(g.nodes)[3]]})
    assert val_map[list(g.nodes)[3]].meta == {"k": 1} and val_map[list(g.nodes)[3]].args[0] is x
    value, node = target.graph_copy(g, {}, return_output_node=True)
    assert node is g.output_node() and names(target)[6:8] == ["x_1", "y_1"]
    assert fx.Graph().graph_copy(fx.Graph(), {}) is None
    add = list(g.nodes)[3]
    copied = target.node_copy(add, lambda n: 7)
    assert copied.args == (7, [7, {"k": 7}]) and copied.kwargs == {"a": 2} and copied.name == "add_2"
    with pytest.raises(RuntimeError, match="belongs to another graph"):
        target.node_copy(add)


class Sub(fx.Graph):
    """A graph with more to it."""

    def __init__(self, extra: int) -> None:
        super().__init__(tracer_cls=dict)
        self.extra = extra


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle"])
def test_whole_copies(how: str) -> None:
    def again(graph: Any) -> Any:
        return pickle.loads(pickle.dumps(graph)) if how == "pickle" else getattr(copy, how)(graph)

    g = sample()
    x, y, *_ = g.nodes
    x.meta["nodes"] = {"list": [y, (x,)], "n": 1}
    y.meta["node"] = x
    y.name = "not made by counting"
    other = again(g)
    assert other is not g and str(other) == str(g) and type(other) is fx.Graph
    other_x, other_y, *_ = other.nodes
    assert other_x.meta["nodes"]["list"] == [other_y, (other_x,)] and other_y.meta == {"node": other_x}
    assert x.meta["nodes"]["list"][0] is y, "the original keeps its own"
    other_x.meta["n"] = 2
    assert "n" not in x.meta
    assert [n.type for n in other.nodes] == [n.type for n in g.nodes]
    assert again(fx.Graph())._count() == 0
    sub = Sub(3)
    sub.placeholder("x")
    got = again(sub)
    assert type(got) is Sub and got.extra == 3 and got._tracer_cls is dict and names(got) == ["x"]


def test_pickles_name_what_they_cannot_hold() -> None:
    g = fx.Graph()
    g.call_function(lambda: 0)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(g)
    with pytest.raises(ValueError, match="version 1 of the format, got 7"):
        fx.Graph().__setstate__({"version": 7})


def test_copies_share_constants() -> None:
    array = np.zeros(3)
    g = fx.Graph()
    g.call_function(len, (array,))
    assert next(iter(copy.deepcopy(g).nodes)).args[0] is array


def test_deepcopy_of_an_object_that_holds_the_graph_twice() -> None:
    g = sample()
    first, second = copy.deepcopy([g, g])
    assert first is second
