# SPDX-License-Identifier: BSD-3-Clause
"""Interpreter and Transformer: every step open to subclasses, values dropped after their last use."""

from __future__ import annotations

import operator
import weakref

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx, nn


@pytest.fixture
def gm():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.scale = nn.Parameter(np.full(3, 2.0, np.float32))

        def forward(self, x, k=2):
            return F.relu(self.fc(x)).sum(axis=1) + k, self.scale

    return fx.symbolic_trace(Net())


def test_each_kind_of_node_has_its_method(gm):
    seen = []

    class Watch(fx.Interpreter):
        def run_node(self, n):
            seen.append(("run_node", n.name))
            return super().run_node(n)

        def placeholder(self, target, args, kwargs):
            seen.append(("placeholder", target))
            return super().placeholder(target, args, kwargs)

        def get_attr(self, target, args, kwargs):
            seen.append(("get_attr", target))
            return super().get_attr(target, args, kwargs)

        def call_function(self, target, args, kwargs):
            seen.append(("call_function", target.__name__))
            return super().call_function(target, args, kwargs)

        def call_method(self, target, args, kwargs):
            seen.append(("call_method", target, len(args), dict(kwargs)))
            return super().call_method(target, args, kwargs)

        def call_module(self, target, args, kwargs):
            seen.append(("call_module", target))
            return super().call_module(target, args, kwargs)

        def output(self, target, args, kwargs):
            seen.append(("output", target))
            return super().output(target, args, kwargs)

    x = np.ones((2, 3), np.float32)
    result = Watch(gm).run(x)
    np.testing.assert_array_equal(result[0], gm(x)[0])
    assert result[1] is gm.scale
    assert [entry for entry in seen if entry[0] != "run_node"] == [
        ("placeholder", "x"), ("placeholder", "k"), ("call_module", "fc"), ("call_function", "relu"),
        ("call_method", "sum", 1, {"axis": 1}), ("call_function", "add"), ("get_attr", "scale"), ("output", "output"),
    ]
    assert [name for kind, name, *_ in seen if kind == "run_node"] == [node.name for node in gm.graph.nodes]


def test_arguments_and_defaults(gm):
    x = np.ones((2, 3), np.float32)
    run = fx.Interpreter(gm).run
    np.testing.assert_allclose(run(x, 5)[0], run(x)[0] + 3, rtol=1e-6)  # two additions instead of one
    with pytest.raises(TypeError, match="no value for the placeholder 'x'"):
        run()
    with pytest.raises(TypeError, match="2 placeholders.*got 3"):
        run(x, 1, 2)
    stars = fx.symbolic_trace(lambda x, *rest, **more: (x, rest, more))
    assert fx.Interpreter(stars).run(1, 2, 3) == (1, (2, 3), {})
    boxed = [x, 5]
    np.testing.assert_array_equal(fx.Interpreter(gm).boxed_run(boxed)[0], run(x, 5)[0])
    assert boxed == []


def test_initial_values_replace_nodes(gm):
    (relu,) = gm.graph.find_nodes(op="call_function", target=F.relu)
    x = np.ones((2, 3), np.float32)
    result = fx.Interpreter(gm).run(x, initial_env={relu: np.full((2, 3), 10.0)})
    assert result[0].tolist() == [32.0, 32.0]


def test_another_graph_on_the_same_module(gm):
    graph = fx.Graph()
    graph.output(graph.call_module("fc", (graph.placeholder("v"),)))
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(fx.Interpreter(gm, graph=graph).run(x), gm.fc(x))
    with pytest.raises(TypeError, match="module: expected a GraphModule"):
        fx.Interpreter(nn.ReLU())


@pytest.mark.parametrize("collect", [True, False])
def test_values_live_until_their_last_use(collect):
    class Array(np.ndarray):
        pass

    alive = []
    refs = {}

    @fx.wrap
    def make(x, name):
        alive.append([key for key, ref in refs.items() if ref() is not None])
        result = np.ones(2).view(Array)
        refs[name] = weakref.ref(result)
        return result

    def f(x):
        a = make(x, "a")
        b = make(a, "b")
        make(a, "unused")
        c = make(b, "c")
        return make(c, "d")

    fx.Interpreter(fx.symbolic_trace(f), garbage_collect_values=collect).run(1)
    expected = [[], ["a"], ["a", "b"], ["b"], ["c"]] if collect else [[], ["a"], ["a", "b"], ["a", "b", "unused"],
                                                                     ["a", "b", "unused", "c"]]
    assert alive == expected


def test_helpers(gm):
    interpreter = fx.Interpreter(gm)
    (add,) = gm.graph.find_nodes(op="call_function", target=operator.add)
    assert interpreter.fetch_attr("fc.weight") is gm.fc.weight
    with pytest.raises(AttributeError, match="'fc.nothing'.*fc .Linear. has no 'nothing'"):
        interpreter.fetch_attr("fc.nothing")
    interpreter.env = {add.args[0]: 1, add.args[1]: 2}
    assert interpreter.fetch_args_kwargs_from_env(add) == ((1, 2), {})
    nested = {"a": [add.args[0], slice(add.args[1], None)], "b": (3, "x")}
    assert interpreter.map_nodes_to_values(nested, add) == {"a": [1, slice(2, None)], "b": (3, "x")}
    interpreter.env = {}
    with pytest.raises(RuntimeError, match="'add' uses 'sum_1'"):
        interpreter.fetch_args_kwargs_from_env(add)


def test_an_exception_names_node_and_line():
    def f(x):
        return x.no_such_method(1)

    gm = fx.symbolic_trace(f)
    with pytest.raises(AttributeError) as caught:
        fx.Interpreter(gm).run(np.ones(1))
    (note,) = caught.value.__notes__
    assert "call_method[target=no_such_method]" in note and f"line {f.__code__.co_firstlineno + 1}, in f" in note


def test_transformer(gm):
    class Swap(fx.Transformer):
        def call_function(self, target, args, kwargs):
            return super().call_function(F.sigmoid if target is F.relu else target, args, kwargs)

        def call_method(self, target, args, kwargs):
            return super().call_method(target, args, kwargs) * 2

    new = Swap(gm).transform()
    x = np.ones((2, 3), np.float32)
    expected = F.sigmoid(gm.fc(x)).sum(axis=1) * 2 + 2
    np.testing.assert_array_equal(new(x)[0], expected)
    assert new.fc is gm.fc and new.class_name == gm.class_name
    assert [n.name for n in new.graph.nodes] == ["x", "k", "fc", "sigmoid", "sum_1", "mul", "add", "scale", "output"]
    assert [n.name for n in gm.graph.nodes] == ["x", "k", "fc", "relu", "sum_1", "add", "scale", "output"]
    (sigmoid,) = new.graph.find_nodes(op="call_function", target=F.sigmoid)
    assert "stack_trace" in sigmoid.meta
    new.graph.lint()
    same = fx.Transformer(gm).transform()
    assert str(same.graph) == str(gm.graph)
