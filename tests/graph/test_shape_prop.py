# SPDX-License-Identifier: BSD-3-Clause
"""fx.shape_prop on whole graphs: what it finds, what it runs, what it leaves alone."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn
from pyconvbn import functional as F


def shapes(gm: Any) -> dict[str, Any]:
    return {n.name: n.meta["tensor_meta"].shape for n in gm.graph.nodes if "tensor_meta" in n.meta}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 5)
        self.scale = np.ones((1, 4, 1, 1), np.float32)

    def forward(self, x: Any) -> Any:
        y = F.relu(self.bn(self.conv(x)))
        y = self.up(y) * self.scale
        return self.fc(F.flatten(self.pool(y), 1))


def test_a_network(rng: np.random.Generator) -> None:
    gm = fx.symbolic_trace(Net().eval())
    x = rng.standard_normal((2, 3, 9, 11)).astype(np.float32)
    assert fx.shape_prop(gm, (2, 3, 9, 11)) is gm

    class Record(fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if isinstance(result, np.ndarray):
                seen[n.name] = result.shape
            return result

    seen: dict[str, Any] = {}
    Record(gm).run(x)
    assert shapes(gm) == seen
    assert all(n.meta["tensor_meta"].dtype == np.float32 for n in gm.graph.nodes)
    assert all(_core.op_tensor(n) == (seen[n.name], "f", 4) for n in gm.graph.nodes)


def test_forms_of_examples() -> None:
    gm = fx.symbolic_trace(lambda x: x * 2.0)
    x = next(iter(gm.graph.nodes))
    for example, shape, dtype in (
        ((2, 3), (2, 3), "f4"), ([2, 3], (2, 3), "f4"), (((2, 3), "f2"), (2, 3), "f2"), ((), (), "f4"),
        (((2, 3), np.float64), (2, 3), "f8"), (np.ones((4, 1)), (4, 1), "f8"), (fx.TensorMeta((1,), np.dtype("f2")), (1,), "f2"),
        ((0, 2), (0, 2), "f4"),
    ):  # fmt: skip
        fx.shape_prop(gm, example)
        assert x.meta["tensor_meta"] == fx.TensorMeta(shape, np.dtype(dtype))
        assert [n.meta["tensor_meta"].dtype for n in gm.graph.nodes] == [np.dtype(dtype)] * 3
    fx.shape_prop(gm, 5)  # a number is a number
    assert "tensor_meta" not in x.meta and _core.op_tensor(x) is None
    with pytest.raises(TypeError, match=r"example_shapes\[0\]: expected a shape"):
        fx.shape_prop(gm, (2, "x"))
    with pytest.raises(TypeError, match="expected at most 1 .*, got 2"):
        fx.shape_prop(gm, (1,), (1,))
    with pytest.raises(ValueError, match="node x: TypeError: no example shape"):
        fx.shape_prop(gm)


def test_torch_tensors_are_examples(torch: Any) -> None:
    gm = fx.shape_prop(fx.symbolic_trace(lambda x: x + 1.0), torch.zeros(2, 3, dtype=torch.float64))
    assert [n.meta["tensor_meta"].dtype for n in gm.graph.nodes] == [np.dtype("f8")] * 3


def test_unknown_callables_are_run_on_zeros() -> None:
    calls = []

    def mine(x: Any, n: int) -> Any:
        calls.append(x)
        return np.concatenate([x] * n), x[0], "text"

    g = fx.Graph()
    x = g.placeholder("x")
    y = g.call_function(mine, (x, 3))
    first = g.call_function(operator.getitem, (y, 0))
    rest = g.call_function(operator.getitem, (y, 2))
    size = g.call_function(getattr, (first, "shape"))
    n = g.call_function(operator.getitem, (size, 0))
    g.output((g.call_method("reshape", (first, n, 1, -1)), rest))
    gm = fx.GraphModule(nn.Module(), g)
    fx.shape_prop(gm, (2, 5))
    assert len(calls) == 1 and not calls[0].any()
    assert shapes_of(gm) == {"x": (2, 5), "getitem": (6, 5), "reshape": (6, 1, 5)}
    assert y.meta["tensor_meta"] == (fx.TensorMeta((6, 5), np.dtype("f4")), fx.TensorMeta((5,), np.dtype("f4")), None)


def shapes_of(gm: Any) -> dict[str, Any]:
    return {n.name: n.meta["tensor_meta"].shape for n in gm.graph.nodes
            if isinstance(n.meta.get("tensor_meta"), fx.TensorMeta)}  # fmt: skip


def test_nothing_of_the_module_is_written() -> None:
    class Training(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            self.inner = Custom()
            self.table = np.ones(3, np.float32)

        def forward(self, x: Any) -> Any:
            self.table += 1  # traced as an in-place add of the attribute
            return self.inner(self.bn(x)) + self.table

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return x

    class LeafTracer(fx.Tracer):
        def is_leaf_module(self, m: Any, name: str) -> bool:
            return True

    model = Training()
    gm = fx.GraphModule(model, LeafTracer().trace(model))
    before = model.bn.running_mean.copy(), model.table.copy()
    fx.shape_prop(gm, (4, 3))
    np.testing.assert_array_equal(model.bn.running_mean, before[0])
    np.testing.assert_array_equal(model.table, before[1])
    assert model.inner.calls == 0 and gm.inner.calls == 0


def test_errors_name_the_node_and_leave_the_graph() -> None:
    gm = fx.symbolic_trace(Net().eval())
    fx.shape_prop(gm, (2, 3, 9, 11))
    before = shapes(gm), [_core.op_tensor(n) for n in gm.graph.nodes]
    with pytest.raises(ValueError, match="node conv: ValueError: .*channels") as caught:
        fx.shape_prop(gm, (2, 4, 9, 11))
    assert caught.value.__cause__ is not None
    assert (shapes(gm), [_core.op_tensor(n) for n in gm.graph.nodes]) == before
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_function(F.conv2d, (x, x)))
    with pytest.raises(ValueError, match="node conv2d: functional.conv2d: input: expected 3 or 4 axes|node conv2d: .*weight"):
        fx.shape_prop(fx.GraphModule(nn.Module(), g), (2, 3))


def test_fused_graphs() -> None:
    gm = fx.symbolic_trace(Net().eval())
    graph = gm.graph
    bn = next(n for n in graph.nodes if n.name == "bn")
    conv = bn.args[0]
    with graph.inserting_before(conv):
        a, b = graph.get_attr("bn"), graph.get_attr("conv")
        new = graph.call_function(pyconvbn.efficient_conv_bn_eval, (a, b, conv.args[0]))
    bn.replace_all_uses_with(new)
    fx.shape_prop(gm, (2, 3, 9, 11))
    assert new.meta["tensor_meta"].shape == (2, 8, 5, 6) and "tensor_meta" not in a.meta


def test_transposed_convolution_with_output_size() -> None:
    root = nn.Module()
    root.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
    g = fx.Graph()
    x = g.placeholder("x")
    g.output(g.call_module("up", (x, (12, 11))))
    gm = fx.shape_prop(fx.GraphModule(root, g), (1, 3, 5, 5))
    assert gm(np.ones((1, 3, 5, 5), np.float32)).shape == shapes(gm)["up"] == (1, 4, 12, 11)


def test_modules_called_by_keyword() -> None:
    root = nn.Module()
    root.conv, root.bn, root.fc, root.act = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Linear(5, 2), nn.ReLU()
    root.up = nn.ConvTranspose1d(4, 2, 2, stride=2)
    g = fx.Graph()
    node = g.placeholder("x")
    for name in ("conv", "bn", "act", "fc"):
        node = g.call_module(name, (), {"input": node})
    g.output(g.call_module("up", (node,), {"output_size": [5]}))
    gm = fx.shape_prop(fx.GraphModule(root, g), (2, 3, 7))
    assert [*shapes(gm).values()] == [(2, 3, 7), (2, 4, 5), (2, 4, 5), (2, 4, 5), (2, 4, 2), (2, 2, 5), (2, 2, 5)]
    assert gm(np.ones((2, 3, 7), np.float32)).shape == (2, 2, 5)


def test_it_is_both_a_module_and_a_function() -> None:
    from pyconvbn.fx.shape_prop import TensorMeta, shape_prop

    assert callable(fx.shape_prop) and fx.shape_prop.TensorMeta is TensorMeta is fx.TensorMeta
    assert fx.shape_prop.shape_prop is shape_prop
