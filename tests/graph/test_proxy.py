# SPDX-License-Identifier: BSD-3-Clause
"""What a proxy records, and what it refuses."""

from __future__ import annotations

import copy
import operator
from collections import namedtuple

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx
from pyconvbn.fx.proxy import GraphAppendingTracer, Proxy


@pytest.fixture
def x():
    return fx.Proxy(fx.Graph().placeholder("x"))


def last(proxy):
    return list(proxy.node.graph.nodes)[-1]


BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor", "matmul"]


@pytest.mark.parametrize("name", BINARY)
def test_operators_with_their_reflected_forms(x, name):
    function = getattr(operator, name)
    node = function(x, 3).node
    assert (node.op, node.target, tuple(node.args), dict(node.kwargs)) == ("call_function", function, (x.node, 3), {})
    assert tuple(function(3, x).node.args) == (3, x.node)
    assert tuple(function(x, x).node.args) == (x.node, x.node)


@pytest.mark.parametrize("name", BINARY)
def test_in_place_operators_fall_back(x, name):
    result = getattr(operator, "i" + name.rstrip("_"))(x, 3)
    assert result is not x and result.node.target is getattr(operator, name)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(x, name):
    function = getattr(operator, name)
    mirrored = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(name, name)
    assert function(x, 3).node.target is function
    node = function(3, x).node
    assert node.target is getattr(operator, mirrored) and tuple(node.args) == (x.node, 3)


@pytest.mark.parametrize("name", ["neg", "pos", "invert", "abs"])
def test_unary_operators(x, name):
    function = getattr(operator, name)
    assert function(x).node.target is function and tuple(function(x).node.args) == (x.node,)


@pytest.mark.parametrize("name", [*BINARY, "eq", "ne", "lt", "le", "gt", "ge"])
def test_an_array_on_the_left_is_the_operator_too(x, name):
    function = getattr(operator, name)
    array = np.arange(3)
    symbols = {
        "lshift": "<<", "rshift": ">>", "matmul": "@", "pow": "**", "mod": "%", "add": "+", "sub": "-", "mul": "*",
        "truediv": "/", "floordiv": "//", "and_": "&", "or_": "|", "xor": "^", "eq": "==", "ne": "!=", "lt": "<",
        "le": "<=", "gt": ">", "ge": ">=",
    }
    node = eval(f"a {symbols[name]} x", {"a": array, "x": x}).node
    assert node.target is function
    assert node.args[0] is array and node.args[1] is x.node


def test_items_attributes_and_methods(x):
    assert tuple(x[0, 1:x, ..., None].node.args) == (x.node, (0, slice(1, x.node, None), ..., None))
    before = len(list(x.node.graph.nodes))
    attribute = x.shape
    assert len(list(x.node.graph.nodes)) == before  # nothing until it is used
    assert attribute.node.target is getattr and tuple(attribute.node.args) == (x.node, "shape")
    assert attribute.node is attribute.node
    call = x.sum(axis=(0, 1), keepdims=True).node
    assert (call.op, call.target, tuple(call.args)) == ("call_method", "sum", (x.node,))
    assert dict(call.kwargs) == {"axis": (0, 1), "keepdims": True}
    node = (x.shape[0] + 1).node
    assert [n.target for n in (node.args[0], node.args[0].args[0])] == [operator.getitem, getattr]
    assert x(1, key=2).node.target == "__call__"


def test_numpy_functions_and_ufuncs(x):
    node = np.concatenate([x, x], axis=1).node
    assert node.target is np.concatenate and node.args[0] == [x.node, x.node] and dict(node.kwargs) == {"axis": 1}
    assert np.add(x, 1).node.target is np.add
    assert np.add(np.ones(2), x).node.target is np.add  # called by name: kept by name
    assert np.add.reduce(x, axis=0).node.target == np.add.reduce
    assert np.where(x > 0, x, 0).node.target is np.where
    assert np.linalg.norm(x).node.target is np.linalg.norm
    assert np.zeros_like(x).node.target is np.zeros_like
    assert (np.float32(2) * x).node.target is operator.mul


def test_functions_of_this_package(x):
    for node, name in ((F.relu(x).node, "relu"), (F.cat([np.ones(2), x]).node, "cat"),
                       (F.conv2d(np.ones((1, 1, 3, 3)), weight=x).node, "conv2d")):
        assert node.op == "call_function" and node.target is getattr(F, name)
    assert F.relu(np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_arguments_are_rebuilt(x):
    Pair = namedtuple("Pair", "a b")
    node = np.array_equal(x, [(x, {"k": x}), Pair(x, 1), None, 1.5, "s", np.float32]).node
    assert node.args[1] == [(x.node, {"k": x.node}), (x.node, 1), None, 1.5, "s", np.float32]
    assert type(node.args[1][1]) is Pair


def test_unpacking_a_known_number(x):
    a, b, c = x
    assert [tuple(p.node.args) for p in (a, b, c)] == [(x.node, 0), (x.node, 1), (x.node, 2)]
    (d, (e, f)), g = x, 1
    assert tuple(f.node.args)[0] is e.node.args[0]
    [h] = x.shape
    assert tuple(h.node.args)[1] == 0
    many = ", ".join(f"v{i}" for i in range(300))
    scope = {"x": x}
    exec(f"{many} = x", scope)
    assert scope["v299"].node.args[1] == 299





REFUSED = {
    "branch": lambda x: 1 if x else 2,
    "and": lambda x: x and 1,
    "not": lambda x: not x,
    "chained comparison": lambda x: 0 < x < 1,
    "loop": lambda x: [i for i in x],
    "star": lambda x: max(*x),
    "star target": lambda x: [0 for a, *b in [x]],
    "tuple": lambda x: tuple(x),
    "mapping": lambda x: dict(**x),
    "len": len,
    "int": int,
    "float": float,
    "complex": complex,
    "range": range,
    "index": lambda x: [1, 2][x],
    "contains": lambda x: 3 in x,
    "array": np.asarray,
    "set item": lambda x: operator.setitem(x, 0, 1),
    "delete item": lambda x: operator.delitem(x, 0),
    "min": lambda x: min(x, 3),
    "key": lambda x: x.use({x: 1}),
    "set": lambda x: x.isin({1, x}),
    "generator": lambda x: x.cat(i for i in (1, 2)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_values_are_refused_with_the_line(what):
    def traced(x):
        return REFUSED[what](x)

    with pytest.raises(fx.TraceError) as caught:
        fx.symbolic_trace(traced)
    assert f"{__file__}:" in str(caught.value)


def test_the_message_names_line_and_text():
    def traced(x):
        y = x + 1
        if y.sum() > 0:
            return x
        return y

    line = traced.__code__.co_firstlineno + 2
    with pytest.raises(fx.TraceError, match="control flow depends on the value of 'gt'") as caught:
        fx.symbolic_trace(traced)
    assert f"{__file__}:{line}, in traced: if y.sum() > 0:" in str(caught.value)


def test_protocols_do_not_find_a_proxy(x):
    for name in ("__dlpack__", "__array_interface__", "__array_struct__", "__torch_function__", "__fspath__"):
        assert not hasattr(x, name)
    with pytest.raises(TypeError):
        np.linalg.norm(round(x))


def test_copies_are_recorded(x):
    assert copy.copy(x).node.target is copy.copy
    nested = copy.deepcopy({"a": [x]})
    assert nested["a"][0].node.target is copy.deepcopy


def test_identity_hash_and_repr(x):
    assert len({x, x, Proxy(x.node)}) == 2
    assert repr(x) == "Proxy(x)" and repr(x.T) == "Proxy(getattr_1)"


def test_a_proxy_by_hand_appends_to_its_graph():
    graph = fx.Graph()
    x = fx.Proxy(graph.placeholder("x"))
    assert isinstance(x.tracer, GraphAppendingTracer)
    array = np.ones(2)
    graph.output((x + array).node)
    gm = fx.GraphModule({}, graph)
    assert gm(array).tolist() == [2.0, 2.0]


def test_two_traces_do_not_mix(x):
    other = fx.Proxy(fx.Graph().placeholder("y"))
    before = len(list(x.node.graph.nodes)), len(list(other.node.graph.nodes))
    with pytest.raises(RuntimeError):
        x + other
    with pytest.raises(RuntimeError):
        F.cat([x, other])
    assert (len(list(x.node.graph.nodes)), len(list(other.node.graph.nodes))) == before
