# SPDX-License-Identifier: BSD-3-Clause
"""Who may write whose memory: views, arrays of one base, in-place operators, modules, what nobody knows."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, nn
from pyconvbn import functional as F
from pyconvbn.fx import Graph


def writer(graph: Any, value: Any, after: Any = None, before: Any = None, root: Any = None) -> Any:
    return _core.graph_effects(graph, root, [("writer", value, after, before)])[0]


def alias(graph: Any, a: Any, b: Any, root: Any = None) -> bool:
    return _core.graph_effects(graph, root, [("alias", a, b)])[0]


class Root(nn.Module):
    """Holds what a test names."""

    def __init__(self, **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            setattr(self, name, value)


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def test_pure_operators_write_nothing_and_share_nothing() -> None:
    g = Graph()
    x, w = g.placeholder("x"), g.placeholder("w")
    c = g.call_function(F.conv2d, (x, w))
    r = g.call_function(F.relu, (c,))
    s = g.call_function(operator.add, (r, 1.0))
    for value in (x, w, c, r, s):
        assert writer(g, value) is None
        assert not _core.graph_effects(g, None, [("written", value)])[0]
    nodes = [x, w, c, r, s]
    assert [[alias(g, a, b) for b in nodes] for a in nodes] == np.eye(5, dtype=bool).tolist()


VIEWS = [
    ("call_method", "view", (2, -1)), ("call_method", "reshape", ((2, -1),)), ("call_method", "t", ()),
    ("call_method", "permute", (1, 0)), ("call_method", "contiguous", ()), ("call_method", "unsqueeze", (0,)),
    ("call_function", operator.getitem, (0,)), ("call_function", F.flatten, (1,)), ("call_function", F.dropout, ()),
    ("call_function", getattr, ("T",)), ("call_method", "nobody_knows_this", ()), ("call_function", lambda v: v, ()),
]


@pytest.mark.parametrize("op, target, rest", VIEWS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_write_through_a_view_is_seen(op: str, target: Any, rest: tuple[Any, ...]) -> None:
    g = Graph()
    x = g.placeholder("x")
    v = g.create_node(op, target, (x, *rest))
    w = g.call_method("add_", (v, 1.0))
    other = g.call_function(F.relu, (x,))
    assert alias(g, x, v) and alias(g, x, w)
    assert writer(g, x, after=v) is w
    assert writer(g, x, after=w) is None
    assert writer(g, x, before=w) in (None, v)  # v itself where nobody knows what it does
    assert writer(g, other) is None


def test_list_results_share_memory_with_their_source() -> None:
    g = Graph()
    x = g.placeholder("x")
    parts = g.call_method("chunk", (x, 2))
    first = g.call_function(operator.getitem, (parts, 0))
    w = g.call_function(operator.setitem, (first, 0, 1.0))
    assert writer(g, x) is w and writer(g, parts) is w
    joined = g.call_function(operator.add, ([x], [parts]))
    assert alias(g, joined, x)


WRITES = [
    ("call_method", "relu_", (), {}), ("call_method", "copy_", (1.0,), {}), ("call_method", "fill", (0,), {}),
    ("call_method", "anything_", (), {}), ("call_function", operator.iadd, (1.0,), {}),
    ("call_function", operator.setitem, (0, 1.0), {}), ("call_function", operator.imul, (2.0,), {}),
]


@pytest.mark.parametrize("op, target, rest, kw", WRITES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_writes_its_first_argument(op: str, target: Any, rest: Any, kw: Any) -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    w = g.create_node(op, target, (x, *rest), kw)
    assert writer(g, x) is w and writer(g, y) is None
    assert _core.op_impure(w, None)


def test_out_is_written_and_is_the_result() -> None:
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    w = g.call_function(F.relu, (x,), {"out": y})
    assert writer(g, y) is w and writer(g, x) is None and alias(g, y, w)
    assert _core.op_impure(w, None)
    assert not _core.op_impure(g.call_function(F.relu, (x,), {"out": None}), None)


def test_batch_norm_writes_its_statistics_in_training_only() -> None:
    g = Graph()
    x, m, v = (g.placeholder(n) for n in "xmv")
    evaluation = g.call_function(F.batch_norm, (x, m, v))
    assert writer(g, m) is None
    training = g.call_function(F.batch_norm, (x, m), {"running_var": v, "training": True})
    unknown = g.call_function(F.batch_norm, (x, m, v), {"training": x})
    assert writer(g, m) is training and writer(g, v) is training and writer(g, x) is None
    assert writer(g, m, after=training) is unknown
    assert [_core.op_impure(n, None) for n in (evaluation, training, unknown)] == [False, True, True]


def test_arrays_of_one_base_are_one_class() -> None:
    base = ones(10)
    root = Root(a=base[:6], b=base[5:], c=ones(3))
    g = Graph()
    a, b, c = (g.get_attr(n) for n in "abc")
    w = g.call_method("mul_", (b, 2.0))
    assert alias(g, a, b, root) and not alias(g, a, c, root)
    assert writer(g, a, root=root) is w and writer(g, c, root=root) is None
    assert writer(g, base[:1], root=root) is w and writer(g, root.c, root=root) is None
    assert writer(g, ones(4), root=root) is None
    # without the module that the names belong to, every array may be every other
    assert writer(g, c) is w and writer(g, ones(4)) is w


def test_ranges_that_only_touch_are_different() -> None:
    base = ones(10)
    root = Root(a=base[:5], b=base[5:], empty=base[3:3])
    g = Graph()
    a, b, empty = (g.get_attr(n) for n in ("a", "b", "empty"))
    g.call_method("mul_", (b, 2.0))
    assert writer(g, a, root=root) is None and not alias(g, a, b, root) and not alias(g, empty, a, root)


def test_constant_arrays_in_arguments() -> None:
    weight = ones(4)
    root = Root(w=weight)
    g = Graph()
    w = g.get_attr("w")
    copy = g.call_method("copy_", (weight[::2], 0.0))
    assert writer(g, w, root=root) is copy and writer(g, weight[1:], root=root) is copy


def test_a_missing_attribute_may_be_any_array() -> None:
    root = Root(a=ones(2), b=ones(2))
    g = Graph()
    a, lost = g.get_attr("a"), g.get_attr("not_there")
    w = g.call_method("mul_", (lost, 2.0))
    assert writer(g, a, root=root) is w and writer(g, root.b, root=root) is w


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = ones(3)

    def forward(self, x: Any, y: Any = None) -> Any:
        return x


def test_modules() -> None:
    conv, bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)
    root = Root(conv=conv, bn=bn, custom=Custom(), linear=nn.Linear(1, 1))
    bn.eval()
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    c = g.call_module("conv", (x,))
    b = g.call_module("bn", (c,))
    assert writer(g, x, root=root) is None and writer(g, bn.running_mean, root=root) is None
    assert not alias(g, x, c, root) and not alias(g, b, c, root)
    assert not _core.op_impure(b, root)
    bn.train()
    assert writer(g, bn.running_mean, root=root) is b and writer(g, c, root=root) is None
    assert _core.op_impure(b, root)
    u = g.call_module("custom", (x,), {"y": [y]})
    assert writer(g, x, root=root) is u and writer(g, y, root=root) is u and alias(g, u, x, root)
    assert writer(g, root.custom.buffer, root=root) is u
    assert writer(g, conv.weight, root=root) is None
    lost = g.call_module("nowhere", (c,))
    assert writer(g, c, root=root) is lost


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Identity, nn.Flatten, nn.Hardswish, lambda: nn.MaxPool2d(2)])
def test_known_modules_are_pure_but_may_return_their_input(kind: Any) -> None:
    root = Root(m=kind())
    g = Graph()
    x = g.placeholder("x")
    y = g.call_module("m", (x,))
    assert writer(g, x, root=root) is None
    w = g.call_method("add_", (y, 1.0))
    assert writer(g, x, root=root) is w


def test_a_module_handed_over_as_a_value_brings_its_arrays() -> None:
    root = Root(conv=nn.Conv2d(1, 1, 1))
    g = Graph()
    weight, conv = g.get_attr("conv.weight"), g.get_attr("conv")
    w = g.call_method("mul_", (weight, 2.0))
    assert alias(g, weight, conv, root) and writer(g, conv, root=root) is w


def test_unknown_callables_write_what_they_are_given() -> None:
    g = Graph()
    x, y, z = (g.placeholder(n) for n in "xyz")
    u = g.call_function(lambda *a, **k: a, (x, [1, (y,)]), {"k": {"deep": y}})
    assert writer(g, x) is u and writer(g, y) is u and writer(g, z) is None
    assert not _core.op_impure(u, None)  # as torch.fx: an unused one may go
    bad = g.call_function(F.conv2d, (z,))  # does not fit its schema
    assert writer(g, z) is bad and _core.op_impure(bad, None)


def test_the_interval_is_open_on_both_sides() -> None:
    g = Graph()
    x = g.placeholder("x")
    nodes = [g.call_method("add_", (x, float(i))) for i in range(40)]
    for i in range(0, 40, 7):
        for j in range(i, 40, 5):
            expected = nodes[i + 1] if j > i + 1 else None
            assert writer(g, x, after=nodes[i], before=nodes[j]) is expected


def test_randomly_chained_views_against_numpy(rng: np.random.Generator) -> None:
    """may_alias is never false for arrays of which NumPy says that they share memory."""
    for _ in range(30):
        g, values = Graph(), {}
        nodes = [g.placeholder(f"p{i}") for i in range(3)]
        values = {n: rng.standard_normal((4, 6)).astype(np.float32) for n in nodes}
        for _ in range(25):
            source = nodes[rng.integers(len(nodes))]
            kind = rng.integers(4)
            if kind == 0:
                new, value = g.call_method("reshape", (source, 6, 4)), values[source].reshape(6, 4)
            elif kind == 1:
                new, value = g.call_function(F.flatten, (source, 0, 1)), values[source].reshape(-1).reshape(4, 6)
                new, value = g.call_method("reshape", (new, 4, 6)), value
            elif kind == 2:
                new, value = g.call_function(F.relu, (source,)), np.maximum(values[source], 0)
            else:
                new, value = g.call_function(operator.getitem, (source, slice(None))), values[source][:]
            nodes.append(new)
            values[new] = value.reshape(4, 6)
        questions = [("alias", a, b) for a in nodes for b in nodes]
        answers = _core.graph_effects(g, None, questions)
        for (_, a, b), claimed in zip(questions, answers, strict=True):
            shared = np.shares_memory(values[a], values[b])
            assert claimed or not shared, (a, b)


def test_bad_questions() -> None:
    g, other = Graph(), Graph()
    x, foreign = g.placeholder("x"), other.placeholder("x")
    for question, error in (
        ("writer", TypeError), ((), TypeError), (("who", x), ValueError), (("writer", x), TypeError),
        (("writer", 3, None, None), TypeError), (("writer", foreign, None, None), RuntimeError),
        (("alias", x, foreign), RuntimeError),
    ):  # fmt: skip
        with pytest.raises(error):
            _core.graph_effects(g, None, [question])
