# SPDX-License-Identifier: BSD-3-Clause
"""passes.constant_fold: what is folded, to the very same bits."""

from __future__ import annotations

import copy
import operator
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn, ops, passes
from pyconvbn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from constants_util import X, f32, fold, make, same, shapes_of  # noqa: E402

A = ops.aten


# ---- what is folded --------------------------------------------------------------------------------------------------


def test_weights_from_weights(rng: np.random.Generator) -> None:
    gm = make(
        lambda m, x: F.linear(x, F.cat([A.t.default(m.w), m.v * 2]), m.b + m.b),
        w=f32(rng, 4, 3), v=f32(rng, 5, 4), b=f32(rng, 8),
    )
    count, rows = fold(gm, X)
    assert count == 4
    assert shapes_of(gm) == ["placeholder x", "get_attr cat", "get_attr add", "call_function linear", "output output"]
    assert [node.target for node in gm.graph.nodes][1:3] == ["_frozen_param0", "_frozen_param1"]
    assert rows["mul"].into == rows["cat"].into == rows["t_default"].into == "_frozen_param0"
    assert rows["add"].into == "_frozen_param1"
    assert gm._frozen_param0.base is None and type(gm._frozen_param0) is np.ndarray
    # the shapes that shape propagation would find
    cat = next(node for node in gm.graph.nodes if node.name == "cat")
    assert _core.op_tensor(cat) == ((8, 4), "f", 4)


def test_changing_the_parameter_afterwards_does_not_matter(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: x + m.w.reshape(4), w=f32(rng, 2, 2))
    wanted = gm(X)
    assert fold(gm)[0] == 1
    gm_w = next(iter(gm.parameters()))
    gm_w[...] = 0
    same(gm(X), wanted)


def test_chains_end_in_one_constant(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        w = m.w
        for i in range(50):
            w = w * 1.01 + i
        return x @ w

    gm = make(forward, w=f32(rng, 4, 4))
    assert fold(gm, X)[0] == 100
    assert len(gm.graph) == 4


def test_lists_and_their_items(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        parts = A.chunk.default(m.w, 3)
        others = A.split_with_sizes.default(m.w, [1, 5], 0)
        return x + parts[0] * parts[2], A.cat.default([x, others[1]])

    gm = make(forward, w=f32(rng, 6, 4))
    x = f32(rng, 2, 4)
    count, rows = fold(gm, x)
    assert count == 6 and {row.outcome for row in rows.values()} == {"done"}
    assert [node.op for node in gm.graph.nodes].count("get_attr") == 2


def test_a_list_that_somebody_needs_stays(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        return operator.getitem(A.chunk.default(m.w * 2, 2), A.sym_size.int(x, 0) - 3) + x

    gm = make(forward, w=f32(rng, 6, 4))
    count, rows = fold(gm, X)
    assert count == 1 and rows["chunk_default"].reason == "NOT_ARRAY" and rows["mul"].into == "_frozen_param0"


def test_shapes_compute_further_shapes(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        rows, columns = m.w.shape[0], m.w.shape[1]
        return x.reshape(rows * columns) * A.zeros.default([rows, columns]).reshape(columns * rows) + rows

    gm = make(forward, w=f32(rng, 3, 4))
    _, rows = fold(gm, X)
    kept = {name: row.reason for name, row in rows.items() if row.outcome == "kept"}
    assert set(kept.values()) == {"NOT_ARRAY"}
    assert "reshape_1" in rows and rows["reshape_1"].outcome == "done"


def test_nodes_without_inputs() -> None:
    gm = make(lambda m, x: x, w=np.zeros(1))
    graph = fx.Graph()
    x = graph.placeholder("x")
    zeros = graph.call_function(A.zeros.default, ([3, 4],))
    count = graph.call_function(A.arange.default, (4,))
    full = graph.call_function(A.full.default, ([4], 2.5))
    graph.output(graph.call_function(operator.add, (graph.call_function(operator.add, (x, zeros)),
                                                    graph.call_function(operator.mul, (count, full)))))
    gm = fx.GraphModule(nn.Module(), graph)
    assert fold(gm, X)[0] == 4
    assert [node.op for node in gm.graph.nodes].count("get_attr") == 2


def test_modules_of_constants(rng: np.random.Generator) -> None:
    conv, bn = nn.Conv1d(3, 2, 3, padding=1), nn.BatchNorm1d(2)
    bn.running_mean[...], bn.running_var[...] = [1, 2], [3, 4]
    w = f32(rng, 1, 3, 6)
    gm = make(lambda m, x: x + m.relu(m.bn(m.conv(m.w))).reshape(3, 4), conv=conv, bn=bn, relu=nn.ReLU(), w=w)
    count, rows = fold(gm, X)
    assert count == len(rows) == 4 and [node.op for node in gm.graph.nodes].count("call_module") == 0


def test_functional_batch_norm_of_constants(rng: np.random.Generator) -> None:
    def forward(m: Any, x: Any) -> Any:
        return x + F.batch_norm(m.w, m.mean_buffer, m.var_buffer, None, None, False)

    gm = make(forward, w=f32(rng, 3, 4), mean_buffer=f32(rng, 4), var_buffer=np.abs(f32(rng, 4)))
    assert fold(gm, X)[0] == 1
    gm = make(
        lambda m, x: x + F.batch_norm(m.w, m.mean_buffer, m.var_buffer, None, None, True),
        w=f32(rng, 3, 4), mean_buffer=f32(rng, 4), var_buffer=np.abs(f32(rng, 4)),
    )
    count, rows = fold(gm, X)
    assert count == 0 and rows["batch_norm"].reason == "IMPURE"


def test_dead_nodes_go_unless_nothing_is_known_of_them(rng: np.random.Generator) -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    lonely = graph.get_attr("w")
    dead = graph.call_function(operator.mul, (graph.call_function(operator.neg, (w,)), 2))
    graph.call_function(operator.neg, (x,))
    graph.output(x)
    root = nn.Module()
    root.register_buffer("w", f32(rng, 3))
    gm, name = fx.GraphModule(root, graph), dead.name
    count, rows = fold(gm, X)
    assert count == 2 and rows[name].into is None and len(gm.graph) == 4
    assert lonely.op == "get_attr" and not hasattr(gm, "_frozen_param0")


def test_names_targets_and_identity_of_nodes(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: (x + m.w * 2) * (m.w * 2), w=f32(rng, 4))
    nodes = {node.name: node for node in gm.graph.nodes}
    nodes["mul"].meta["mine"] = 7
    fold(gm, X)
    assert next(n for n in gm.graph.nodes if n.name == "mul") is nodes["mul"]
    assert nodes["mul"].op == "get_attr" and nodes["mul"].args == () and nodes["mul"].meta["mine"] == 7
    assert nodes["mul"].target == "_frozen_param0" and "_frozen_param0" in dict(gm.named_buffers())


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "bool"])
def test_dtypes(dtype: str, rng: np.random.Generator) -> None:
    w = (rng.standard_normal((3, 4)) * 3).astype(dtype)
    gm = make(lambda m, x: (x + A.add.Tensor(m.w_buffer, m.w_buffer), x * m.w_buffer.T.reshape(3, 4)), w_buffer=w)
    for kind in ("float16", "float32", "float64"):
        fold(copy.deepcopy(gm), X.astype(kind))


@pytest.mark.parametrize("wide", ["float16", "float32", "float64"])
@pytest.mark.parametrize("x", [X, X.astype(np.float16), X.astype(np.float64), np.arange(3), 2, 2.5, np.float32(3)])
def test_numpy_scalars_keep_their_say_in_the_dtype(wide: str, x: Any, rng: np.random.Generator) -> None:
    w = f32(rng, 3, 4).astype(wide)
    gm = make(lambda m, x: (x * m.w.sum(), m.w.mean() - x, x / m.w.max(), (x + m.w[0, 0])), w=w)
    count, rows = fold(gm, x)
    assert count == 4 and {row.outcome for row in rows.values()} == {"done"}
    assert all(isinstance(getattr(gm, row.into or ""), np.ndarray) for row in rows.values())


def test_numpy_scalars_stay_where_an_array_would_mean_something_else(rng: np.random.Generator) -> None:
    # numpy.float64 is a Python float: beside float32 it has no say, a 0-d float64 array has
    gm = make(lambda m, x: A.mul.Tensor(x, m.w.sum()), w=rng.standard_normal(3))
    count, rows = fold(gm, X)
    assert count == 0 and rows["sum_1"].reason == "NOT_ARRAY" and gm(X).dtype == np.float32
    # a scalar index gives a view, a 0-d array a copy
    graph = fx.Graph()
    x, i = graph.placeholder("x"), graph.get_attr("i")
    index = graph.call_function(operator.getitem, (i, 1))
    row = graph.call_function(operator.getitem, (x, index))
    graph.output(graph.call_function(A.add_.Scalar, (row, 1)))
    gm = fx.GraphModule({"i": np.array([0, 2])}, graph)
    count, rows = fold(gm, X.copy())
    assert count == 0 and rows[index.name].reason == "NOT_ARRAY"
    x = X.copy()
    gm(x)
    np.testing.assert_array_equal(x[2], X[2] + 1)


def test_zero_dimensional_arrays_stay_arrays(rng: np.random.Generator) -> None:
    gm = make(lambda m, x: A.mul.Tensor(x, A.sum.default(m.w)) + A.sum.default(m.w), w=rng.standard_normal(3))
    count, _ = fold(gm, X)
    assert count == 2


def test_strides(rng: np.random.Generator) -> None:
    w = f32(rng, 8, 6)
    gm = make(
        lambda m, x: (x @ m.w.T, x + A.expand.default(m.w[0:1, 0:6], [50000, 6])[0:3], x * m.w[::2, ::-1][0:3]), w=w
    )
    x = f32(rng, 3, 6)
    fold(gm, x)
    constants = [getattr(gm, node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    assert constants[0].flags.f_contiguous and not any(np.shares_memory(c, w) for c in constants)
    gm = make(lambda m, x: x + A.expand.default(m.w, [50000, 6]), w=w[:1])
    fold(gm, x[0])
    (spread,) = [getattr(gm, node.target) for node in gm.graph.nodes if node.op == "get_attr"]
    assert spread.strides == (0, 4) and spread.base.nbytes == 24
    # a node that stays reads the strides
    gm = make(lambda m, x: x[0, 0] + (m.w[::2, ::-2]).strides[x.shape[0] - 3], w=w)
    wanted = gm(x)
    assert fold(gm)[0] == 1
    same(gm(x), wanted)


def test_no_warning_reaches_the_caller_and_none_becomes_an_error() -> None:
    w, h = np.ones(4, np.float32), np.full(4, 3e4, np.float16)
    gm = make(lambda m, x: x + m.w / 0 + A.log.default(-m.w) + m.h * m.h, w=w, h=h)
    with np.errstate(all="raise"):
        assert passes.constant_fold(gm) == 4
        with pytest.raises(FloatingPointError):
            np.float32(1) / np.float32(0)
    with np.errstate(all="ignore"):
        assert np.isnan(gm(X)).all()


def test_values_are_dropped_after_their_last_use() -> None:
    """A long chain of 1 MB arrays, with lists and shapes in between, needs room for a few."""
    graph = fx.Graph()
    x, v = graph.placeholder("x"), graph.get_attr("w")
    for _ in range(40):
        shape = graph.call_function(getattr, (v, "shape"))
        parts = graph.call_function(A.chunk.default, (graph.call_function(operator.mul, (v, 2.0)), 2))
        halves = [graph.call_function(operator.getitem, (parts, i)) for i in range(2)]
        joined = graph.call_function(A.cat.default, (halves,))
        v = graph.call_function(A.reshape.default, (graph.call_function(operator.add, (joined, v)), shape))
    graph.output(graph.call_function(operator.add, (x, v)))
    gm = fx.GraphModule({"w": np.ones((512, 256))}, graph)
    tracemalloc.start()
    try:
        passes.constant_fold(gm)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(gm.graph) == 4 and 2 * 2**20 < most < 7 * 2**20
