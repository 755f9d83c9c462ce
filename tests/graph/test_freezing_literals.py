# SPDX-License-Identifier: BSD-3-Clause
"""Arrays that stand in the arguments of nodes: constants of the frozen graph, unless the graph writes or returns them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import fx, nn
from pyconvbn.ops import aten

X = np.random.default_rng(3).normal(size=(1, 3, 2, 2)).astype(np.float32)


def conv(graph: fx.Graph, weight: Any) -> Any:
    return graph.call_function(aten.conv2d.default, (graph.placeholder("x"), weight, None, [1, 1], [0, 0], [1, 1], 1))


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def build(what: str, literal: Any) -> Any:
    """What is computed from the input and the literal."""
    graph = fx.Graph()
    if what == "add":
        y = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), literal))
    else:
        y = conv(graph, literal)
    if what == "binary":
        y = graph.call_function(aten.mul.Tensor, (y, 2.0))
    elif what == "batch_norm":
        y = graph.call_function(
            aten.batch_norm.default, (y, None, None, ones(2) * 0, ones(2) * 3, False, 0.1, 1e-5, True))
    return graph, y


CASES = ["conv", "binary", "batch_norm", "add"]


@pytest.mark.parametrize("shapes", [False, True], ids=["", "shapes"])
@pytest.mark.parametrize("what", CASES)
def test_the_caller_may_write_what_the_graph_returns(what: str, shapes: bool) -> None:
    literal = ones(2, 3, 1, 1) if what != "add" else ones(2)
    graph, y = build(what, literal)
    graph.output((y, literal))
    gm = fx.GraphModule(nn.Module(), graph)
    frozen, _ = pyconvbn.freeze(gm, X if shapes else None)
    before = frozen(X)[0].copy()
    frozen(X)[1][...] = 5
    assert (literal == 5).all() and not np.allclose(before, gm(X)[0])
    np.testing.assert_allclose(frozen(X)[0], gm(X)[0], rtol=1e-6)


@pytest.mark.parametrize("what", CASES)
def test_a_literal_is_a_constant(what: str) -> None:
    literal = ones(2, 3, 1, 1) if what != "add" else ones(2)
    graph, y = build(what, literal)
    graph.output(y)
    gm = fx.GraphModule(nn.Module(), graph)
    frozen, _ = pyconvbn.freeze(gm)
    before = frozen(X)
    literal[...] = 5
    np.testing.assert_array_equal(frozen(X), before)
    assert not np.allclose(gm(X), before)


def test_a_view_of_a_literal_is_returned() -> None:
    literal = ones(2)
    graph = fx.Graph()
    y = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), literal))
    graph.output((y, graph.call_function(aten.unsqueeze.default, (literal, 0))))
    frozen, _ = pyconvbn.freeze(fx.GraphModule(nn.Module(), graph))
    frozen(X)[1][...] = 7
    assert (literal == 7).all()
    np.testing.assert_array_equal(frozen(X)[0], X + 7)


def test_many_literals() -> None:
    """One look at the graph for all of them, and one copy of each."""
    graph = fx.Graph()
    arrays = [ones(2) * i for i in range(4)]
    x = graph.placeholder("x")
    for i in range(40):
        x = graph.call_function(aten.add.Tensor, (x, arrays[i % 4]))
    graph.output(x)
    gm = fx.GraphModule(nn.Module(), graph)
    frozen, _ = pyconvbn.freeze(gm)
    found = {id(v): v for node in frozen.graph.nodes for v in node.args if isinstance(v, np.ndarray)}
    assert len(found) == 4 and not found.keys() & {id(v) for v in arrays}
    assert not any(v.flags.writeable for v in found.values())
    np.testing.assert_array_equal(frozen(X), gm(X))
