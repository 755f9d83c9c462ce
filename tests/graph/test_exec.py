# SPDX-License-Identifier: BSD-3-Clause
"""The run loop of GraphModule: what it calls and how arguments get there. See test_exec_life.py for the rest."""

from __future__ import annotations

import collections
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn
from pyconvbn import functional as F


sys.path.insert(0, str(Path(__file__).parent))
from exec_util import chain, direct_of, module_of  # noqa: E402

Point = collections.namedtuple("Point", "x y")


# -- what is called --------------------------------------------------------------------------------------------------
X = np.random.default_rng(0).normal(size=(2, 4, 7, 7)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(4, 4, 3, 3)).astype(np.float32)
V = np.abs(np.random.default_rng(2).normal(size=4)).astype(np.float32) + 0.5
B = np.random.default_rng(3).normal(size=4).astype(np.float32)

OPERATOR_CALLS: list[tuple[str, Callable[..., Any], str]] = [
    ("conv", lambda x, w, v, b: F.conv2d(x, w), "conv2d"),
    ("conv keywords", lambda x, w, v, b: F.conv2d(weight=w, input=x, bias=b, padding=(1, 2), groups=1), "conv2d"),
    ("conv same", lambda x, w, v, b: F.conv2d(x, w, b, 1, "same", dilation=2), "conv2d"),
    ("conv_transpose", lambda x, w, v, b: F.conv_transpose2d(x, w, b, 2, output_padding=[1, 0]), "conv_transpose2d"),
    ("linear", lambda x, w, v, b: F.linear(x, np.ones((5, 7), np.float32)), "linear"),
    ("batch_norm", lambda x, w, v, b: F.batch_norm(x, b, v, bias=b, weight=v, eps=0.25), "batch_norm"),
    ("relu", lambda x, w, v, b: F.relu(x), "relu"),
    ("leaky_relu", lambda x, w, v, b: F.leaky_relu(x, negative_slope=0.3), "leaky_relu"),
    ("hardtanh", lambda x, w, v, b: F.hardtanh(x, -0.5, max_val=0.25), "hardtanh"),
    ("silu", lambda x, w, v, b: F.silu(x), "silu"),
    ("softmax", lambda x, w, v, b: F.softmax(x, dim=1), "softmax"),
    ("add", lambda x, w, v, b: F.add(x, x, alpha=3.0), "add"),
    ("mul", lambda x, w, v, b: F.mul(x, other=x), "mul"),
    ("max_pool", lambda x, w, v, b: F.max_pool2d(x, 3, stride=2, ceil_mode=True), "max_pool2d"),
    ("avg_pool", lambda x, w, v, b: F.avg_pool2d(x, [2, 3], padding=1, count_include_pad=False), "avg_pool2d"),
    ("adaptive", lambda x, w, v, b: F.adaptive_avg_pool2d(x, (None, 3)), "adaptive_avg_pool2d"),
    ("pad", lambda x, w, v, b: F.pad(x, (1, 2, 0, 1)), "pad"),
    ("pad value", lambda x, w, v, b: F.pad(x, (1, 2), value=2.5), "pad"),
]


@pytest.mark.parametrize(("call", "name"), [row[1:] for row in OPERATOR_CALLS], ids=[row[0] for row in OPERATOR_CALLS])
def test_our_operators_are_called_directly(call: Callable[..., Any], name: str) -> None:
    gm = fx.symbolic_trace(call)
    assert direct_of(gm)[name] is not None
    np.testing.assert_array_equal(gm(X, W, V, B), call(X, W, V, B))
    gm(X, W, V, B)  # a second time: constants are still there


def test_one_dimension_and_aten() -> None:
    from pyconvbn.ops import aten

    graph = fx.Graph()
    x = graph.placeholder("x")
    w = graph.get_attr("w")
    y = graph.call_function(aten.conv1d.default, (x, w, None, [2]), {"padding": [1]})
    y = graph.call_function(F.avg_pool1d, (y, 2))
    graph.output(y)
    weight, data = W[:, :, 0], X[:, :, 0]
    gm = module_of(graph, w=weight)
    assert set(direct_of(gm).values()) >= {"conv", "avg_pool"}
    np.testing.assert_array_equal(gm(data), F.avg_pool1d(F.conv1d(data, weight, None, 2, 1), 2))


def test_what_needs_the_wrapper_keeps_it() -> None:
    graph = fx.Graph()
    x, value, momentum = graph.placeholder("x"), graph.placeholder("value"), graph.placeholder("momentum")
    padded = graph.call_function(F.pad, (x, (1, 1)), {"value": value})  # None at run time means 0
    normed = graph.call_function(F.batch_norm, (padded, B, V), {"momentum": momentum})
    graph.output(normed)
    gm = module_of(graph)
    assert [direct_of(gm)[name] for name in ("pad", "batch_norm")] == [None, None]
    np.testing.assert_array_equal(gm(X, None, None), F.batch_norm(F.pad(X, (1, 1)), B, V, momentum=None))


def test_errors_are_those_of_the_operator() -> None:
    for arguments, keywords in (((X, W, None, 1, 0, 1, 1, 5), {}), ((X,), {}), ((X, W), {"colour": 1})):
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(F.conv2d, (x, *arguments[1:]), keywords))
        gm = module_of(graph)
        with pytest.raises(TypeError) as expected:
            F.conv2d(*arguments, **keywords)
        with pytest.raises(TypeError) as got:
            gm(X)
        assert str(got.value) == str(expected.value)


def test_out_is_written() -> None:
    graph = fx.Graph()
    x, out = graph.placeholder("x"), graph.placeholder("out")
    graph.output(graph.call_function(F.relu, (x,), {"out": out}))
    buffer = np.empty_like(X)
    assert module_of(graph)(X, buffer) is buffer
    np.testing.assert_array_equal(buffer, np.maximum(X, 0))


# -- arguments -------------------------------------------------------------------------------------------------------
def test_nested_arguments_arrive_as_plain_containers() -> None:
    got: list[Any] = []

    def take(*args: Any, **kwargs: Any) -> int:
        got.append((args, kwargs))
        return 1

    graph = fx.Graph()
    x = graph.placeholder("x")
    nested = [x, (1, [x, 2.5]), {"k": [x], "c": "text"}, slice(x, None, 2), Point(x, 3), Point(1, 2)]
    graph.output(graph.call_function(take, (nested, (4, 5), [6]), {"key": {"a": x}, "none": None}))
    module_of(graph)(7)
    args, kwargs = got[0]
    expected = [7, (1, [7, 2.5]), {"k": [7], "c": "text"}, slice(7, None, 2), Point(7, 3), Point(1, 2)]
    assert (args, kwargs) == ((expected, (4, 5), [6]), {"key": {"a": 7}, "none": None})
    assert [type(v) for v in args[0]] == [int, tuple, dict, slice, Point, Point]
    assert type(args[0]) is list and type(args[0][2]["k"]) is list and type(kwargs["key"]) is dict


def test_a_callee_may_change_its_list() -> None:
    def push(items: list[int]) -> int:
        items.append(0)
        return len(items)

    graph = fx.Graph()
    graph.output(graph.call_function(push, ([1, 2],)))
    gm = module_of(graph)
    assert [gm(), gm(), gm()] == [3, 3, 3]


def test_placeholders_bind_as_a_call_does() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", default_value=[1, 2])
    rest, named = graph.placeholder("*rest"), graph.placeholder("**named")
    graph.output((x, y, rest, named))
    gm = module_of(graph)
    assert gm(1) == (1, [1, 2], (), {})
    assert gm(1, 2, 3, 4, k=5) == (1, 2, (3, 4), {"k": 5})
    assert gm(y=2, x=1, z=3) == (1, 2, (), {"z": 3})
    gm(1)[1].append(3)
    assert gm(1)[1] == [1, 2]  # nobody got the default itself
    with pytest.raises(TypeError, match=r"GraphModule.forward\(\) missing a required argument: 'x'"):
        gm(y=1)
    with pytest.raises(TypeError, match=r"GraphModule.forward\(\) got multiple values for argument 'x'"):
        gm(1, x=2)


def test_wrong_arguments() -> None:
    gm = chain(operator.neg)
    with pytest.raises(TypeError, match=r"takes 1 arguments, got 2"):
        gm(1, 2)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'y'"):
        gm(1, y=2)
    with pytest.raises(TypeError, match=r"missing a required argument: 'x'"):
        gm()
    with pytest.raises(TypeError, match="the module that the graph runs on"):
        _core.Program(gm.graph)()
    with pytest.raises(TypeError, match="graph"):
        _core.Program(gm)  # type: ignore[arg-type]


def test_many_placeholders_and_wide_calls() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"p{i}") for i in range(200)]
    total = graph.call_function(lambda *values: sum(values), tuple(nodes))
    graph.output(total)
    gm = module_of(graph)
    assert gm(*range(200)) == sum(range(200))
    assert gm(*range(150), **{f"p{i}": i for i in range(150, 200)}) == sum(range(200))


def test_call_method_get_attr_and_no_output() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    text = graph.call_method("replace", (x, "a", "b"), {})
    graph.output(graph.call_function(operator.add, (text, graph.get_attr("part.word"))))
    root = nn.Module()
    root.part = nn.Module()
    root.part.word = "!"
    gm = fx.GraphModule(root, graph)
    assert gm("banana") == "bbnbnb!"
    gm.part.word = "?"  # read at each call
    assert gm("a") == "b?"
    empty = fx.Graph()
    empty.placeholder("x")
    assert module_of(empty)(1) is None


# -- members are read at each call -----------------------------------------------------------------------------------
def test_replaced_modules_and_weights_changed_in_place_are_seen() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU()))
    x = np.ones((1, 3), np.float32)
    layer = gm.get_submodule("0")
    layer.weight[...] = 1
    assert gm(x).tolist() == [[3, 3, 3]]
    layer.weight[...] = 2
    assert gm(x).tolist() == [[6, 6, 6]]
    gm.set_submodule("0", nn.Identity())
    assert gm(x).tolist() == [[1, 1, 1]]
    gm.set_submodule("1", nn.Linear(3, 1, bias=False))
    gm.get_submodule("1").weight[...] = 4
    assert gm(x).tolist() == [[12]]


def test_a_missing_member_is_named() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Sequential(nn.ReLU())))
    gm.delete_submodule("0.0")
    with pytest.raises(AttributeError, match=r"target '0\.0': 0 \(\w+\) has no '0'"):
        gm(X)
