# SPDX-License-Identifier: BSD-3-Clause
"""The layout steps: inputs of as_strided, outputs, and the strides that are noted for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn._pass_layout import record_strides
from pyconvbn.ops import aten as A
from pyconvbn.ops import prims

sys.path.insert(0, str(Path(__file__).parent))
from layout_util import named, traced, weights  # noqa: E402

FORCE = prims.force_stride_order.default


def elements(x: Any) -> tuple[int, ...]:
    return tuple(s // x.itemsize for s in x.strides)


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in flat(part)]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, tuple | list) else [value]


def forced(gm: Any) -> list[Any]:
    return gm.graph.find_nodes(op="call_function", target=FORCE)


def enforced(gm: Any, step: Any, inputs: list[Any], expected: int) -> list[Any]:
    """Records strides, runs the step twice, checks what always holds, gives the rows of the first run."""
    copies = [np.array(x, copy=True) for x in inputs]
    record_strides(gm, inputs)
    assert all(np.array_equal(x, y) for x, y in zip(inputs, copies, strict=True)), "inputs are never written"
    before = flat(gm(*[x.copy("K") for x in inputs]))
    rows: list[Any] = []
    assert step(gm, report=rows) == expected
    gm.graph.lint()
    after = flat(gm(*[x.copy("K") for x in inputs]))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.shape(one) == np.shape(other)
        if isinstance(one, np.ndarray):
            assert one.strides == other.strides
    assert sum(row.outcome == "done" for row in rows) == expected
    assert all((row.outcome == "done") == (row.into is not None) for row in rows)
    assert all(row.outcome == "done" or row.hint for row in rows)
    text = str(gm.graph)
    assert step(gm) == 0 and str(gm.graph) == text, "a second run changes nothing"
    record_strides(gm, inputs)
    assert step(gm) == 0 and str(gm.graph) == text
    return rows


X = np.arange(24.0).reshape(2, 3, 4)


# -- noting strides ----------------------------------------------------------------------------------------------
def test_strides_of_outputs_are_noted() -> None:
    gm = traced(lambda m, x: {"a": x.transpose(2, 0, 1) + 1, "b": [(x[:, ::2], x + 1), 3], "c": x.shape})
    record_strides(gm, [X])
    assert named(gm, "add").meta["strides"] == (1, 12, 4)
    assert named(gm, "getitem").meta["strides"] is None, "it has gaps"
    assert named(gm, "add_1").meta["strides"] == (12, 4, 1)
    assert [n.name for n in gm.graph.nodes if "strides" in n.meta] == ["add", "getitem", "add_1"]
    assert not any("storage_offset" in n.meta for n in gm.graph.nodes)
    record_strides(gm, [X.transpose(1, 2, 0)])
    assert named(gm, "add_1").meta["strides"] == (4, 1, 12)


def test_strides_of_what_as_strided_reads_are_noted() -> None:
    gm = traced(
        lambda m, x: (A.as_strided.default((x * 2)[1], [2], [1], 0).sum(),
                      A.as_strided_scatter.default(self=m.w, src=x[0, 0, :1], size=[1], stride=[1])),
        w=np.ones((2, 3)).T)  # fmt: skip
    record_strides(gm, [X])
    assert named(gm, "getitem").meta["strides"] == (4, 1) and named(gm, "getitem").meta["storage_offset"] == 12
    assert named(gm, "w").meta["strides"] == (1, 3) and "storage_offset" not in named(gm, "w").meta
    assert "strides" not in named(gm, "mul").meta


def test_axes_of_one_entry_and_empty_arrays() -> None:
    gm = traced(lambda m, x: (x + 1, x[:1, :, :1] * 1, x[:0] * 1, x.sum()))
    record_strides(gm, [X])
    by = {n.name: n.meta.get("strides", "-") for n in gm.graph.nodes}
    assert by["add"] == (12, 4, 1) and by["mul"] == (3, 1, 1) and by["mul_1"] == (12, 4, 1)
    assert by["sum_1"] in ((), "-")


def test_nothing_is_written_while_strides_are_noted() -> None:
    """Inputs, attributes and running statistics that the graph writes are copied first."""
    def run(m: Any, x: Any, y: Any) -> Any:
        A.add_.Tensor(x, 1.0)
        A.add_.Tensor(m.count, y.sum())
        return m.bn(y) + x.sum() + A.as_strided.default(y * 1, [2], [1]).sum() + m.count

    gm = traced(run, count=np.zeros(1), bn=nn.BatchNorm1d(3, dtype=np.float64), scale=np.ones(3))
    gm.bn.train()
    x, y = np.zeros(3), np.arange(12.0).reshape(4, 3)
    for _ in range(2):
        record_strides(gm, [x, y])
    assert not x.any() and not gm.count.any() and not gm.bn.running_mean.any() and (gm.bn.running_var == 1).all()
    assert gm.bn.num_batches_tracked == 0 and (y == np.arange(12.0).reshape(4, 3)).all()
    assert any(n.meta.get("strides") == (3, 1) for n in gm.graph.nodes)


def test_written_inputs_are_copied_with_their_memory() -> None:
    """An as_strided that reads around a view still can, and the two inputs still share memory."""
    def run(m: Any, x: Any, y: Any) -> Any:
        A.mul_.Tensor(x, 0.0)
        return A.as_strided.default(x, [6], [1], 0) * 1 + y

    base = np.arange(6.0)
    gm = traced(run)
    record_strides(gm, [base[2:4], base])
    assert (base == np.arange(6.0)).all()
    assert named(gm, "x").meta == {**named(gm, "x").meta, "strides": (1,), "storage_offset": 2}


# -- inputs of as_strided ----------------------------------------------------------------------------------------
def test_as_strided_sees_the_strides_it_was_written_for() -> None:
    gm = traced(lambda m, x: (A.as_strided.default(x * 2, [2, 2], [1, 3], 2), x * 2))
    rows = enforced(gm, passes.enforce_as_strided_input_layout, [X], 1)
    assert [(r.step, r.node, r.into) for r in rows] == [("input_layout", "as_strided_default", "force_stride_order")]
    text = [f"{n.name} = {n.args}" for n in gm.graph.nodes if n.op == "call_function"]
    assert text == ["mul = (x, 2)", "force_stride_order = (mul, (12, 4, 1))",
                    "as_strided_default = (force_stride_order, [2, 2], [1, 3], 2)", "mul_1 = (x, 2)"]  # fmt: skip
    wanted = gm(X)[0]
    other = np.asfortranarray(X)  # x * 2 is then laid out in another way
    assert not np.array_equal(A.as_strided.default(other * 2, [2, 2], [1, 3], 2), wanted)
    np.testing.assert_array_equal(gm(other)[0], wanted)


def test_only_this_use_is_changed() -> None:
    def run(m: Any, x: Any) -> Any:
        y = x * 2
        zeros = A.as_strided_scatter.default(y, y[0, 0, :2] * 0, [2], [1])
        return zeros + y, A.as_strided_scatter.default(y, m.s, [2], [1])

    gm = traced(run, s=np.array([7.0, 8.0]))
    rows = enforced(gm, passes.enforce_as_strided_input_layout, [X], 2)
    assert [r.into for r in rows] == ["force_stride_order", "force_stride_order_1"]
    assert [n.args[0] for n in forced(gm)] == [named(gm, "mul")] * 2
    assert named(gm, "add").args[1] is named(gm, "mul")


def test_shapes_are_kept() -> None:
    gm = traced(lambda m, x: A.as_strided.default(x * 2, [2, 2], [1, 3]))
    fx.shape_prop(gm, X)
    assert _core.op_tensor(named(gm, "as_strided_default")) == ((2, 2), "f", 8)
    enforced(gm, passes.enforce_as_strided_input_layout, [X], 1)
    assert _core.op_tensor(forced(gm)[0]) == ((2, 3, 4), "f", 8)


def kept(gm: Any, step: Any, *inputs: Any) -> list[tuple[str, str, str | None]]:
    rows = enforced(gm, step, list(inputs), 0)
    assert not forced(gm)
    return [(r.node, r.reason, r.blocking) for r in rows]


def test_what_as_strided_reads_may_not_be_copied_when_it_is_written() -> None:
    step = passes.enforce_as_strided_input_layout

    def write(m: Any, x: Any) -> Any:
        y = x * 2
        part = A.as_strided.default(y, [2], [5])
        A.add_.Tensor(part, 1.0)
        return y + 0

    assert kept(traced(write), step, X) == [("as_strided_default", "MUTATED", "add__tensor")]
    # in place: what is written through the result is written in the argument
    def written(m: Any, x: Any) -> Any:
        y = x * 2
        A.add_.Tensor(A.as_strided_.default(y, [2], [5]), 1.0)
        return y * 1

    in_place = traced(written)
    assert kept(in_place, step, X) == [("as_strided__default", "IN_PLACE", "mul")]
    fresh = traced(lambda m, x: A.add_.Tensor(A.as_strided_.default(x * 2, [2], [5]), 1.0))
    rows = enforced(fresh, step, [X], 1)
    assert [r.node for r in rows] == ["as_strided__default"]
    view = traced(lambda m, x: A.add_.Tensor(A.as_strided_.default((x * 2)[0], [2], [5]), 1.0))
    assert kept(view, step, X) == [("as_strided__default", "IN_PLACE", "getitem")]


def test_unknown_strides() -> None:
    step = passes.enforce_as_strided_input_layout
    gm = traced(lambda m, x: A.as_strided.default(x * 2, [2], [1]))
    rows: list[Any] = []
    assert step(gm, report=rows) == 0
    assert [(r.node, r.reason, r.blocking) for r in rows] == [("as_strided_default", "STRIDES_UNKNOWN", "mul")]
    assert "example_inputs" in rows[0].hint
    for bad in ("ab", (1, -2, 3), (1, 2.0, 3), (2**70, 1, 1), [12, 4, 1], (1,) * 99):
        named(gm, "mul").meta["strides"] = bad
        assert step(gm) == 0
    named(gm, "mul").meta["strides"] = (4, 1)  # of another number of axes than is known
    fx.shape_prop(gm, X)
    assert step(gm) == 0
    gaps = traced(lambda m, x: A.as_strided.default((x * 2)[:, ::2], [2], [1]))
    assert kept(gaps, step, X) == [("as_strided_default", "STRIDES_UNKNOWN", "getitem")]


def test_offsets_into_another_array() -> None:
    """storage_offset counts from the start of the memory, which a copy of a part would not have."""
    step = passes.enforce_as_strided_input_layout
    gm = traced(lambda m, x: A.as_strided.default((x * 2)[1], [2], [1], 0))
    assert kept(gm, step, X) == [("as_strided_default", "UNSUPPORTED", "getitem")]
    relative = traced(lambda m, x: A.as_strided.default((x * 2)[1], [2], [1]))
    enforced(relative, step, [X], 1)


# -- outputs -----------------------------------------------------------------------------------------------------
def test_golden_outputs() -> None:
    gm = traced(lambda m, x: {"a": (x.transpose(2, 0, 1) + 1, [x * 2]), "b": x * 3})
    rows = enforced(gm, passes.enforce_output_layout, [X], 3)
    assert [(r.step, r.node, r.into) for r in rows] == [
        ("output_layout", "add", "force_stride_order"), ("output_layout", "mul", "force_stride_order_1"),
        ("output_layout", "mul_1", "force_stride_order_2")]  # fmt: skip
    assert [n.args for n in forced(gm)] == [
        (named(gm, "add"), (1, 12, 4)), (named(gm, "mul"), (12, 4, 1)), (named(gm, "mul_1"), (12, 4, 1))]
    out = gm.graph.output_node()
    assert [n.name for n in list(gm.graph.nodes)[-4:]] == [n.name for n in (*forced(gm), out)]
    assert out.args[0] == {"a": (forced(gm)[0], [forced(gm)[1]]), "b": forced(gm)[2]}


def test_a_changed_layout_is_put_back() -> None:
    """The graph is changed after strides were noted, as a step of freezing might."""
    gm = traced(lambda m, x: x * 2)
    record_strides(gm, [X])
    assert passes.enforce_output_layout(gm) == 1
    double = named(gm, "mul")
    with gm.graph.inserting_after(double):
        turned = gm.graph.call_function(FORCE, (double, (1, 2, 6)))
    forced(gm)[-1].update_arg(0, turned)
    assert elements(double.graph.owning_module(X)) == (12, 4, 1)
    batch = np.arange(60.0).reshape(5, 3, 4)
    np.testing.assert_array_equal(gm(batch), batch * 2)
    assert elements(gm(batch)) == (12, 4, 1), "another batch size: the order of the axes"


def test_other_users_are_not_changed() -> None:
    gm = traced(lambda m, x: (lambda y: (y, y.sum(), y))(x * 2))
    enforced(gm, passes.enforce_output_layout, [X], 1)
    out = gm.graph.output_node().args[0]
    assert out[0] is out[2] is forced(gm)[0] and named(gm, "sum_1").args[0] is named(gm, "mul")
    first, _, last = gm(X)
    assert first is last


def test_own_kernels_need_nothing() -> None:
    rng = np.random.default_rng(1)
    conv = nn.Conv2d(3, 4, 3)
    for run in (lambda m, x: F.conv2d(x, m.w), lambda m, x: F.relu(x), lambda m, x: A.relu.default(x)):
        gm = traced(run, w=conv.weight)
        x = rng.normal(size=(1, 3, 5, 5)).astype(np.float32)
        rows: list[Any] = []
        assert passes.enforce_output_layout(gm, report=rows) == 0 and rows == [], "also when nothing was noted"
        assert enforced(gm, passes.enforce_output_layout, [x], 0) == []
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        assert elements(gm(x))[-1] == 1


def test_prepared_layers_need_nothing() -> None:
    layer = nn.FrozenLayer(pyconvbn.Plan(np.ones((4, 3, 3, 3), np.float32)))
    gm = traced(lambda m, x: (m.layer(x), m.layer(x).transpose(0, 2, 3, 1)), layer=layer)
    x = np.asfortranarray(np.random.default_rng(2).random((1, 3, 5, 5), np.float32))
    assert [r.node for r in enforced(gm, passes.enforce_output_layout, [x], 1)] == ["transpose"]


ALWAYS_C: dict[str, Callable[..., Any]] = {
    "conv1d": lambda x: F.conv1d(x[0], np.ones((2, x.shape[2], 2), x.dtype)),
    "conv2d": lambda x: F.conv2d(x, np.ones((2, x.shape[1], 2, 1), x.dtype)),
    "conv2d_1x1": lambda x: A.conv2d.default(x, np.ones((2, x.shape[1], 1, 1), x.dtype)),
    "convolution": lambda x: A.convolution.default(
        x, np.ones((4, 1, 2, 2), x.dtype), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 4),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, np.ones((x.shape[1], 2, 2, 2), x.dtype)),
    "linear": lambda x: F.linear(x, np.ones((2, x.shape[-1]), x.dtype)),
    "aten_linear": lambda x: A.linear.default(x, np.ones((2, x.shape[-1]), x.dtype)),
    "batch_norm": lambda x: F.batch_norm(x, np.ones(x.shape[1], x.dtype), np.ones(x.shape[1], x.dtype)),
    "batch_norm_training": lambda x: F.batch_norm(x, None, None, training=True),
    "aten_batch_norm": lambda x: A.batch_norm.default(
        x, None, None, np.ones(x.shape[1], x.dtype), np.ones(x.shape[1], x.dtype), False, 0.1, 1e-5, True),
    "aten_relu": A.relu.default,
    **{n: getattr(F, n) for n in ("relu", "relu6", "leaky_relu", "hardtanh", "hardswish", "sigmoid", "silu", "gelu")},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", ALWAYS_C)
def test_own_kernels_give_c_order(name: str, dtype: Any) -> None:
    """What enforce_output_layout takes for granted."""
    for shape in ((2, 4, 5, 6), (1, 4, 1, 6), (3, 4, 9, 2)):
        if name in ("conv1d", "conv2d", "convolution") and min(shape[2:]) < 2:
            continue
        x = np.random.default_rng(0).random(shape).astype(dtype)
        for order in ((3, 2, 1, 0), (0, 2, 3, 1), (1, 0, 2, 3)):
            laid = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
            for source in (laid, np.repeat(x, 2, -1)[..., ::2], x[::-1]):
                assert ALWAYS_C[name](source).flags.c_contiguous, (shape, order)


def test_outputs_that_the_caller_knows_otherwise_are_not_copied() -> None:
    step = passes.enforce_output_layout
    gm = traced(lambda m, x: (x, x.T, m.w), w=np.ones(3))
    rows = kept(gm, step, X)
    assert [(name, reason) for name, reason, _ in rows] == [("x", "ALIASES_OUTPUT"), ("getattr_1", "ALIASES_OUTPUT"),
                                                            ("w", "ALIASES_OUTPUT")]  # fmt: skip
    gm = traced(lambda m, x: (lambda y: (y, y.transpose(1, 0, 2)))(x * 2))
    assert kept(gm, step, X) == [("mul", "ALIASES_OUTPUT", "mul"), ("transpose", "ALIASES_OUTPUT", "mul")]
    gm = traced(lambda m, x: (x * 2)[:, ::2])
    assert kept(gm, step, X) == [("getitem", "STRIDES_UNKNOWN", None)]
    gm = traced(lambda m, x: A.expand.default(x.sum(), [3]))
    assert [r[1] for r in kept(gm, step, X)] == ["STRIDES_UNKNOWN"]


def test_outputs_without_notes() -> None:
    gm = traced(lambda m, x: x * 2)
    rows: list[Any] = []
    assert passes.enforce_output_layout(gm, report=rows) == 0
    assert [(r.node, r.reason) for r in rows] == [("mul", "STRIDES_UNKNOWN")] and "example_inputs" in rows[0].hint
    empty = fx.symbolic_trace(lambda x: 3)
    assert passes.enforce_output_layout(empty) == 0


def test_what_is_written_just_before_the_end_is_seen() -> None:
    def run(m: Any, x: Any) -> Any:
        y = x * 2
        A.add_.Tensor(y, 1.0)
        return y

    gm = traced(run)
    enforced(gm, passes.enforce_output_layout, [X], 1)
    np.testing.assert_array_equal(gm(X), X * 2 + 1)


# -- failures ----------------------------------------------------------------------------------------------------
class BadKey(str):
    """A key of metadata that cannot be compared."""

    def __eq__(self, other: object) -> bool:
        raise OSError("bad key")

    def __hash__(self) -> int:
        return hash("strides")


@pytest.mark.parametrize("step", [passes.enforce_output_layout, passes.enforce_as_strided_input_layout])
def test_a_failure_changes_nothing(step: Any) -> None:
    gm = traced(lambda m, x: (A.as_strided.default(x + 1, [2], [1]) * 1, A.as_strided.default(x * 2, [2], [1]) * 2))
    record_strides(gm, [X])
    last = named(gm, "mul_1" if step is passes.enforce_as_strided_input_layout else "mul_2")
    strides = last.meta.pop("strides")
    last.meta[BadKey("strides")] = strides
    text, rows = str(gm.graph), []
    with pytest.raises(OSError, match="bad key"):
        step(gm, report=rows)
    assert str(gm.graph) == text and rows == []
    gm.graph.lint()


@pytest.mark.parametrize(("step", "expected"), [
    (passes.enforce_output_layout, 2), (passes.enforce_as_strided_input_layout, 2),
    (passes.convert_conv_weights_to_channels_last, 1)])  # fmt: skip
def test_every_allocation_may_fail(step: Any, expected: int, rng: np.random.Generator) -> None:
    def run(m: Any, x: Any) -> Any:
        y = F.conv2d(x, m.w)
        return {"a": [A.as_strided.default(x + 1, [2], [1]) * 1], "b": A.as_strided.default(y, [2], [1]) * 2}

    gm = traced(run, **weights(rng))
    record_strides(gm, [np.ones((1, 3, 5, 5), np.float32)])
    text, failures = str(gm.graph), 0
    while True:
        _core._testing.alloc_fail_after(failures)
        try:
            changed = step(gm)
        except MemoryError:
            failures += 1
            _core._testing.alloc_fail_after(-1)
            assert str(gm.graph) == text and failures < 500
            gm.graph.lint()
            continue
        finally:
            _core._testing.alloc_fail_after(-1)
        break
    assert failures > 3 and changed == expected


@pytest.mark.parametrize("step", [passes.convert_conv_weights_to_channels_last, passes.enforce_output_layout,
                                  passes.enforce_as_strided_input_layout])  # fmt: skip
def test_only_graph_modules(step: Any) -> None:
    with pytest.raises(TypeError, match="gm: expected a GraphModule, got int"):
        step(3)
    gm = traced(lambda m, x: A.as_strided.default(x * 2, [2], [1]))
    with gm.graph.inserting_before(gm.graph.output_node()):
        assert step(gm) == 0
        late = gm.graph.call_function(F.relu, (named(gm, "x"),))
    assert late.next is gm.graph.output_node(), "the insertion point is the caller's"
