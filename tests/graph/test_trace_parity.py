# SPDX-License-Identifier: BSD-3-Clause
"""Tracing gives torch.fx's nodes: each model is written once and traced with both libraries."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest

from pyconvbn import functional, fx, nn
from pyconvbn.fx.interpreter import map_nodes

OURS = SimpleNamespace(
    nn=nn, F=functional, cat=functional.cat, ones=lambda *s: np.ones(s, np.float32), Parameter=nn.Parameter, ours=True
)


def torch_library(torch):
    return SimpleNamespace(
        nn=torch.nn, F=torch.nn.functional, cat=torch.cat, ones=torch.ones, Parameter=torch.nn.Parameter, ours=False
    )


# -- the models --------------------------------------------------------------------------------------------------
def plain_cnn(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = lib.nn.Sequential(
                lib.nn.Conv2d(3, 8, 3, padding=1), lib.nn.BatchNorm2d(8), lib.nn.ReLU(), lib.nn.MaxPool2d(2)
            )
            self.pool = lib.nn.AdaptiveAvgPool2d(1)
            self.flatten = lib.nn.Flatten()
            self.fc = lib.nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(self.flatten(self.pool(self.features(x))))

    return Net(), (2, 3, 8, 8)


def residual(lib):
    class Block(lib.nn.Module):
        def __init__(self, width, stride):
            super().__init__()
            self.conv1 = lib.nn.Conv2d(4, width, 3, stride=stride, padding=1, bias=False)
            self.bn1 = lib.nn.BatchNorm2d(width)
            self.relu = lib.nn.ReLU(inplace=True)
            self.conv2 = lib.nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = lib.nn.BatchNorm2d(width)
            self.downsample = None
            if stride != 1:
                self.downsample = lib.nn.Sequential(lib.nn.Conv2d(4, width, 1, stride), lib.nn.BatchNorm2d(width))

        def forward(self, x):
            identity = x
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return self.relu(out)

    return lib.nn.Sequential(Block(4, 1), Block(6, 2)), (1, 4, 8, 8)


def keyword_calls(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = lib.nn.Conv2d(3, 3, 1)
            self.bn = lib.nn.BatchNorm2d(3)
            self.up = lib.nn.ConvTranspose2d(3, 3, 2, stride=2)

        def forward(self, x):
            y = self.bn(input=self.conv(input=x))
            return self.up(y, output_size=(9, 9)) + lib.F.relu(input=self.up(y, output_size=[9, 9]))

    return Net(), (1, 3, 4, 4)


def functional_parameters(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = lib.Parameter(lib.ones(5, 3, 3, 3))
            self.bias = lib.Parameter(lib.ones(5))
            self.gamma = lib.Parameter(lib.ones(5))
            self.register_buffer("mean", lib.ones(5))
            self.register_buffer("var", lib.ones(5))
            self.lin = lib.nn.Linear(4, 2)

        def forward(self, x):
            y = lib.F.conv2d(x, self.weight, self.bias, stride=2, padding=1)
            y = lib.F.batch_norm(y, self.mean, self.var, self.gamma, bias=None, training=False, eps=1e-3)
            y = lib.F.relu(y) + lib.F.relu6(lib.F.leaky_relu(y, 0.2))
            y = lib.F.max_pool2d(y, 2, stride=1) + lib.F.avg_pool2d(y, 2, 1)
            y = lib.F.adaptive_avg_pool2d(y, (2, 2)).reshape(2, 5, 4)
            return lib.F.linear(y, self.lin.weight, self.lin.bias) * self.lin.bias

    return Net(), (2, 3, 8, 8)


def nested_containers(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = lib.nn.ModuleList(
                lib.nn.Sequential(lib.nn.Conv1d(2, 2, 3, padding=1), lib.nn.Sequential(lib.nn.ReLU())) for _ in range(3)
            )
            self.heads = lib.nn.ModuleList([lib.nn.Linear(6, 1), lib.nn.Linear(6, 2)])

        def forward(self, x):
            for stage in self.stages:
                x = stage(x) + x
            return [head(x) for head in self.heads]

    return Net(), (1, 2, 6)


def shared_modules(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = lib.nn.Conv2d(2, 2, 1)
            self.again = self.first
            self.act = lib.nn.ReLU()
            self.other = lib.nn.Sequential(self.act, self.first)
            self.tied = lib.nn.Conv2d(2, 2, 1)
            self.tied.weight = self.first.weight

        def forward(self, x):
            y = self.again(self.first(x))
            return self.other(self.act(y)) + lib.F.conv2d(y, self.tied.weight) + self.tied(x)

    return Net(), (1, 2, 3, 3)


def operators(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = lib.Parameter(lib.ones(3))
            self.register_buffer("shift", lib.ones(3))

        def forward(self, x, y):
            z = 1 + x - 2 * y / 3
            z = 1 - (-x) + (2 / (x + 3)) ** 2 - 2**z
            z += x
            z *= 2
            z -= 1
            z = (x @ y) + z // 2 + 7 // (x + 9) + z % 3 + abs(z)
            z = z * self.scale + self.scale * z - +z
            mask = (x < y) | (x <= 0.5) ^ (x > y) & (x >= 0.1)
            return z * self.shift, mask, ~mask, x == y, x != 1, 4 > x

    return Net(), ((3, 3), (3, 3))


def items(lib):
    def net(x, i: int = 1):
        a = x[:, 0] + x[..., 1:3][..., 0] + x[0:, -1]
        b = x[None, :, None, ::2]
        return a, b, x[i], x[i:, : i + 1], x[0][1]

    return net, (4, 4, 4)


def methods(lib):
    class Net(lib.nn.Module):
        def forward(self, x):
            y = x.reshape(2, -1).mean(1) + x.sum()
            z = x.swapaxes(0, 1).reshape((3, 2, 4)).squeeze()
            return y, z, x.shape, x.ndim, x.mean().max(), x.reshape(-1)[0].item()

    return Net(), (2, 3, 4)


def more_methods(lib):
    def net(x):
        return x.view(x.size(0), -1).flatten(1).unsqueeze(dim=0).contiguous().mean(dim=(1, 2), keepdim=True).relu_()

    return net, None


def dropout(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = lib.nn.Dropout(0.3)

        def forward(self, x):
            return lib.F.dropout(self.drop(x), 0.4, training=self.training) + lib.F.dropout(x, training=False)

    return Net(), (2, 3)


def concat(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = lib.nn.Conv2d(4, 2, 1)
            self.b = lib.nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x):
            n, c, h, w = x.shape
            y = lib.cat([self.a(x), self.b(x), x], 1)
            y = lib.cat((y, y), dim=0).reshape(n * 2, -1, h, w)
            return y, c, lib.cat([y, y, y])

    return Net(), (1, 4, 3, 3)


def constants(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = lib.ones(3)
            self.inner = lib.nn.Module()
            self.inner.table = lib.ones(2, 3)
            self.register_buffer("_tensor_constant0", lib.ones(3))

        def forward(self, x):
            x = x + self.plain + self.inner.table
            x = x * lib.ones(3) + x * self._tensor_constant0
            for k in range(2):
                x = x + lib.ones(3) * k
            return x + self.plain

    return Net(), (2, 3)


def signatures(lib):
    class Net(lib.nn.Module):
        def forward(self, x, scale: float = 2.0, mode="add", flag=None, pair=(1, 2), *rest, **options):
            return x * scale, mode, flag, pair[0], rest, options

    return Net(), None


def keyword_only(lib):
    def net(input, *, eps=1e-5, other=3):
        return input + eps + other

    return net, (2, 2)


def outputs(lib):
    def net(x, y):
        return {"sum": x + y, "parts": [x, (y, None, 3, "text")], "empty": (), "slice": slice(0, 2)}, [x, x], 1.5

    return net, ((2,), (2,))


def colliding_names(lib):
    class Net(lib.nn.Module):
        def __init__(self):
            super().__init__()
            names = ["HTTPServer", "list", "device", "torch", "inf", "lambda_", "x", "x_1", "relu_1", "Conv2dBlock"]
            for name in (*names, "_private", "inner__name", "a1b2", "None_"):
                setattr(self, name, lib.nn.ReLU())
            self.class_ = lib.nn.Sequential(lib.nn.Sequential(lib.nn.ReLU()))
            self.names = names

        def forward(self, x, dict, input, x_0, nan):
            for name in self.names:
                x = getattr(self, name)(x)
                x = lib.F.relu(x)
            x = self.class_(self.inner__name(self.a1b2(self.None_(self._private(x)))))
            return x + dict + input + x_0 + nan

    return Net(), ((2,),) * 5


def math_functions(lib):
    def net(x, n):
        return x * math.sqrt(n) + math.pow(n, 2) + math.floor(math.pi) + math.exp(0.0)

    return net, ((2,), 4.0)


MODELS = [
    plain_cnn, residual, keyword_calls, functional_parameters, nested_containers, shared_modules, operators, items,
    methods, more_methods, dropout, concat, constants, signatures, keyword_only, outputs, colliding_names,
    math_functions,
]


# -- comparing ---------------------------------------------------------------------------------------------------
def plain(a):
    """Arguments as text-like data: nodes by name, containers as the plain ones."""
    if isinstance(a, tuple):
        return tuple(map(plain, a))
    if isinstance(a, list):
        return list(map(plain, a))
    if isinstance(a, dict):
        return {key: plain(value) for key, value in a.items()}
    if isinstance(a, slice):
        return ("slice", plain(a.start), plain(a.stop), plain(a.step))
    return f"%{a.name}" if hasattr(a, "all_input_nodes") else a


def target_name(node):
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", None)


def arguments(node):
    """(args, kwargs). Functions of `functional` are bound to their parameters, for torch records the defaults too."""
    args, kwargs = plain(tuple(node.args)), plain(dict(node.kwargs))
    ours = getattr(functional, str(target_name(node)), None) if node.op == "call_function" else None
    if ours is None or target_name(node) in ("add", "mul"):
        return args, kwargs
    signature = inspect.signature(ours)
    unknown = {key for key in kwargs if key not in signature.parameters}
    assert all(kwargs[key] is False for key in unknown), node  # inplace, return_indices
    bound = signature.bind(*args, **{key: value for key, value in kwargs.items() if key not in unknown})
    bound.apply_defaults()
    return dict(bound.arguments), sorted(unknown - {"inplace", "return_indices"})


def rows(graph):
    return [
        (node.op, node.name, target_name(node), arguments(node), [user.name for user in node.users])
        for node in graph.nodes
    ]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_nodes_are_those_of_torch(model, torch):
    theirs = torch.fx.symbolic_trace(model(torch_library(torch))[0])
    ours = fx.symbolic_trace(model(OURS)[0])
    expected, actual = rows(theirs.graph), rows(ours.graph)
    for a, e in zip(actual, expected):
        assert a == e
    assert len(actual) == len(expected)
    ours.graph.lint()


def random_inputs(shapes, rng):
    if shapes and not isinstance(shapes[0], tuple) and all(isinstance(n, int) for n in shapes):
        shapes = (shapes,)
    return [rng.random(s).astype(np.float32) + 0.1 if isinstance(s, tuple) else s for s in shapes]


def assert_same(actual, expected):
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected):
            assert_same(a, e)
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("model", [m for m in MODELS if m(OURS)[1] is not None], ids=lambda model: model.__name__)
def test_graph_computes_what_the_model_computes(model, rng):
    net, shapes = model(OURS)
    if isinstance(net, nn.Module):
        net.eval()
    inputs = random_inputs(shapes, rng)
    expected = net(*inputs)
    gm = fx.symbolic_trace(net)
    assert_same(gm(*inputs), expected)
    assert_same(fx.Interpreter(gm).run(*inputs), expected)
    assert_same(fx.Transformer(gm).transform()(*inputs), expected)
    code = gm.python_code()
    names = dict(code.globals)
    exec(code.src, names)
    assert_same(names["forward"](gm, *inputs), expected)
    again = fx.symbolic_trace(gm)
    assert [(n.op, target_name(n)) for n in again.graph.nodes] == [(n.op, target_name(n)) for n in gm.graph.nodes]
    assert_same(again(*inputs), expected)


def test_the_comparison_can_fail(torch):
    """A different name, argument or order is seen."""
    theirs = rows(torch.fx.symbolic_trace(lambda x: x.relu() + 1).graph)
    for other in (lambda x: x.relu() + 2, lambda y: y.relu() + 1, lambda x: 1 + x.relu(), lambda x: x.abs() + 1):
        assert rows(fx.symbolic_trace(other).graph) != theirs
    assert rows(fx.symbolic_trace(lambda x: x.relu() + 1).graph) == theirs


def test_map_nodes_is_what_the_names_say():
    graph = fx.symbolic_trace(lambda x: x[1:2]).graph
    node = list(graph.nodes)[1]
    assert map_nodes(node.args, lambda n: n.name) == ("x", slice(1, 2, None))
