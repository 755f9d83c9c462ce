# SPDX-License-Identifier: BSD-3-Clause
"""`gm.code` is Python that runs, reads well, and computes what the graph computes."""

from __future__ import annotations

import ast
import collections
import math
import operator

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx, nn
from pyconvbn.fx._codegen import python_code


def run(gm, *args, **kwargs):
    """What the text computes."""
    code = gm.python_code()
    names = dict(code.globals)
    exec(code.src, names)
    return names["forward"](gm, *args, **kwargs)


def lines(fn):
    return fx.symbolic_trace(fn).code.split("\n    ")[1:]


def test_it_reads_as_written():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ReLU()])
            self.head = nn.Module()
            self.head.w = nn.Parameter(np.ones(2))

        def forward(self, x, scale=0.5, *, flag=True):
            y = self.layers[0](-x[:, 1:, None] ** 2)
            y = F.relu(y @ self.head.w + np.concatenate([y, x], axis=1).mean(axis=0)) * math.sqrt(scale)
            return {"y": (y,), "shape": y.shape}

    assert fx.symbolic_trace(Net()).code == """\
def forward(self, x, scale=0.5, flag=True):
    getitem = x[:, 1:, None]
    pow_1 = getitem ** 2
    neg = -pow_1
    layers_0 = getattr(self.layers, '0')(neg)
    head_w = self.head.w
    matmul = layers_0 @ head_w
    concatenate = numpy.concatenate([layers_0, x], axis=1)
    mean = concatenate.mean(axis=0)
    add = matmul + mean
    relu = pyconvbn.functional.relu(add)
    sqrt = math.sqrt(scale)
    mul = relu * sqrt
    getattr_1 = mul.shape
    return {'y': (mul,), 'shape': getattr_1}"""


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: 2 - x, "2 - x"),
        (lambda x: (-2) ** x, "(-2) ** x"),
        (lambda x: ~x, "~x"),
        (lambda x: abs(x), "operator.abs(x)"),
        (lambda x: x[1:2, ::3, ...], "x[1:2, ::3, ...]"),
        (lambda x: x[(1,)], "x[1,]"),
        (lambda x: x[()], "x[()]"),
        (lambda x: x[-1], "x[-1]"),
        (lambda x: x["key"], "x['key']"),
        (lambda x: x[[0, 1]], "x[[0, 1]]"),
        (lambda x: x != 1, "x != 1"),
        (lambda x: x.T, "x.T"),
        (lambda x: x.view(float("inf")), "x.view(float('inf'))"),
        (lambda x: x.astype(np.float32), "x.astype(numpy.float32)"),
        (lambda x: x.use(np.dtype("f4")), "x.use(numpy.dtype('float32'))"),
        (lambda x: x.use(1j, b"b", None), "x.use(1j, b'b', None)"),
        (lambda x: x.use(int), "x.use(int)"),
        (lambda x: np.linalg.norm(x), "numpy.linalg.norm(x)"),
        (lambda x: np.add(x, 1, dtype=float), "numpy.add(x, 1, dtype=float)"),
        (lambda x: x.use(a=1, **{"no name": 2}), "x.use(a=1, **{'no name': 2})"),
        (lambda x: np.float64(2) * x, "_float64_0 * x"),
    ],
)
def test_expressions(function, text):
    assert lines(function)[0].partition(" = ")[2] == text


def test_what_cannot_be_written_is_a_global():
    Point = collections.namedtuple("Point", "x y")

    class Odd:
        def __eq__(self, other):
            raise RuntimeError

        __hash__ = None

        def __repr__(self):
            raise RuntimeError

    odd = Odd()
    gm = fx.symbolic_trace(lambda x: x.use(odd, odd, Point(1, x), float("nan"), {"k": [odd]}))
    code = gm.python_code()
    ast.parse(code.src)
    for value in (Point, odd):
        assert sum(other is value for other in code.globals.values()) == 1

    class Value:
        def use(self, *args):
            return args

    result = run(gm, Value())
    assert result[0] is result[1] is result[4]["k"][0] is odd and type(result[2]) is Point and math.isnan(result[3])


def test_functions_without_an_importable_name():
    inner = fx.wrap(lambda x: x + 1)
    local = fx.wrap(lambda x: x * 10)
    local.__name__ = "not an identifier"
    gm = fx.symbolic_trace(lambda x: inner(x) + local(x))
    assert run(gm, 2) == gm(2) == 23


def test_names_do_not_clash():
    """Parameters named like what the text needs."""

    def f(self, numpy, pyconvbn, operator, math, forward, len, print):
        x = F.relu(np.concatenate([self, numpy]))
        return x + pyconvbn, abs(operator), math, forward, len + print

    gm = fx.symbolic_trace(f)
    ast.parse(gm.code)
    arguments = [np.array([-1.0]), np.array([2.0]), 3.0, -4.0, 5, 6, 7, 8]
    for result in (run(gm, *arguments), gm(*arguments)):
        assert result[0].tolist() == [3.0, 5.0] and result[1:] == (4.0, 5, 6, 15)


def test_names_set_by_hand():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("not a name")
    total = graph.call_function(operator.add, (a, b), name="total")
    total.name = "class"
    again = graph.call_function(operator.mul, (total, 2), name="again")
    again.name = "self"
    graph.output(graph.call_function(max, (again, 0)))
    gm = fx.GraphModule({}, graph)
    ast.parse(gm.code)
    assert run(gm, 1, 2) == gm(1, 2) == 6


def test_signatures():
    def f(x, /, y, z=1, *rest, flag=None, need, **more):
        return x, y, z, rest, flag, need, more

    gm = fx.symbolic_trace(f)
    assert gm.code.startswith("def forward(self, x, y, z=1, *rest, flag=None, need, **more):")
    for args, kwargs in [((1, 2), {"need": 0}), ((1, 2, 3, 8, 9), {"need": 0, "flag": 4, "other": 5})]:
        assert run(gm, *args, **kwargs) == gm(*args, **kwargs) == f(*args, **kwargs)
    plain = fx.symbolic_trace(lambda x, *, k=1, need: x + k + need)
    assert plain.code.startswith("def forward(self, x, k=1, *, need):")
    assert run(plain, 1, need=5) == plain(1, need=5) == 7
    stars = fx.symbolic_trace(lambda *args, **kwargs: (args, kwargs))
    assert stars.code.startswith("def forward(self, *args, **kwargs):")
    assert run(stars, 1, 2, a=3) == stars(1, 2, a=3) == ((1, 2), {"a": 3})


def test_calls_of_every_shape():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(operator.add, (x,), {})  # too few arguments: still text
    graph.call_function(operator.getitem, ([x, 1], 0))
    graph.call_method("append", ([1], x))
    graph.call_method("not a name", (x,))
    graph.call_function(getattr, (x, "not a name", None))
    graph.get_attr("a.0.b")
    graph.output((x,))
    code = python_code(graph)
    ast.parse(code.src)
    assert "getattr(x, 'not a name')()" in code.src and "getattr(self.a, '0').b" in code.src
    ast.parse(python_code(fx.Graph()).src)
