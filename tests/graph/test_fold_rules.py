# SPDX-License-Identifier: BSD-3-Clause
"""A fold is never silently wrong and never silently skipped: graphs in which that was once broken, or easily is."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import fx, nn, passes

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import checked, close, randomise, trace  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, dtype=np.float64), nn.BatchNorm2d(4, dtype=np.float64)
        randomise(self, np.random.default_rng(0))

    def forward(self, x: Any) -> Any:
        return self.bn(self.conv(x))


class Box:
    """An object that is neither array nor module."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def step(self) -> None:
        self.array += 0.5

    def write(self, value: Any) -> None:
        value += 0.5


PARTS = {"w": "conv.weight", "b": "conv.bias", "g": "bn.weight", "h": "bn.bias", "m": "bn.running_mean",
         "v": "bn.running_var"}  # fmt: skip


def array_at(net: Any, part: str) -> Any:
    return operator.attrgetter(PARTS[part])(net) if part != "x" else np.ones(1)


def held_by_a_list(graph: Any, net: Any, value: Any, part: str) -> None:
    net.items = [array_at(net, part)]
    graph.call_function(operator.iadd, (graph.call_function(operator.getitem, (graph.get_attr("items"), 0)), 0.5))


def step_of_an_object(graph: Any, net: Any, value: Any, part: str) -> None:
    net.box = Box(array_at(net, part))
    graph.call_method("step", (graph.get_attr("box"),))


def given_to_an_object(graph: Any, net: Any, value: Any, part: str) -> None:
    net.box = Box(None)
    graph.call_method("write", (graph.get_attr("box"), value))


def half(graph: Any, value: Any) -> Any:
    return graph.call_function(operator.mul, (value, 0.5))


#: name -> inserts nodes that write `value`
WRITERS: dict[str, Callable[[Any, Any, Any, str], Any]] = {
    "iadd": lambda g, net, v, part: g.call_function(operator.iadd, (v, 0.5)),
    "relu out=": lambda g, net, v, part: g.call_function(F.relu, (half(g, v),), {"out": v}),
    "ufunc out=": lambda g, net, v, part: g.call_function(np.add, (v, 0.5), {"out": v}),
    "ufunc, third argument": lambda g, net, v, part: g.call_function(np.add, (v, 0.5, v)),
    "copyto": lambda g, net, v, part: g.call_function(np.copyto, (v, 0.5)),
    "__imul__": lambda g, net, v, part: g.call_method("__imul__", (v, 0.5)),
    "round out=": lambda g, net, v, part: g.call_method("round", (half(g, v), 0), {"out": v}),
    "round, third argument": lambda g, net, v, part: g.call_method("round", (half(g, v), 0, v)),
    "cumsum, fourth argument": lambda g, net, v, part: g.call_method("cumsum", (half(g, v), 0, None, v)),
    "an object's method": given_to_an_object,
    "an object that holds it": step_of_an_object,
    "a list that holds it": held_by_a_list,
}  # fmt: skip


def with_writer(writer: str, part: str, functional: bool, between: bool) -> Any:
    net, graph = Net(), fx.Graph()
    x = graph.placeholder("x")
    nodes = {key: graph.get_attr(path) for key, path in PARTS.items()} if functional else {}

    def write() -> None:
        value = x if part == "x" else nodes.get(part) or graph.get_attr(PARTS[part])
        WRITERS[writer](graph, net, value, part)

    if not between:
        write()
    y = graph.call_function(F.conv2d, (x, nodes["w"], nodes["b"])) if functional else graph.call_module("conv", (x,))
    if between:
        write()
    if functional:
        out = graph.call_function(F.batch_norm, (y, *(nodes[key] for key in "mvgh")))
    else:
        out = graph.call_module("bn", (y,))
    graph.output(out)
    return fx.GraphModule(net, graph)


@pytest.mark.parametrize("functional", [False, True], ids=["module", "functional"])
@pytest.mark.parametrize("writer", WRITERS)
def test_writers(writer: str, functional: bool) -> None:
    """Whoever writes, whatever it is and wherever it stands: both passes give what the graph gave, or leave it."""
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 5))
    for part in [*PARTS, "x"]:
        if part == "x" and "hold" in writer:
            continue
        for between in (False, True):
            gm = with_writer(writer, part, functional, between)
            wanted = copy.deepcopy(gm)(x.copy())
            folded, report = passes.fuse_conv_bn(gm)
            assert len(checked(folded, report)) == 1
            assert part == "x" or report[0].reason == "MUTATED_BETWEEN", (part, between, report[0])
            close(copy.deepcopy(folded)(x.copy()), wanted)
            assert len(checked(gm, passes.efficient_conv_bn_eval(gm))) == 1
            close(copy.deepcopy(gm)(x.copy()), wanted)


@pytest.mark.parametrize("writer", ["ufunc out=", "__imul__", "round out="])
def test_dead_code_that_writes_is_not_dead(writer: str) -> None:
    gm = with_writer(writer, "w", False, False)
    text = str(gm.graph)
    passes.dce(gm)
    assert str(gm.graph) == text


def test_the_result_shares_no_memory_with_the_original() -> None:
    """Neither in modules nor in the arrays among the arguments of nodes; and what shared memory still does."""
    rng = np.random.default_rng(2)
    weight, offset = rng.normal(size=(4, 3, 1, 1)), rng.normal(size=(4, 1, 1))
    for skip in ("", "*"):
        graph = fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(F.batch_norm, (graph.call_function(F.conv2d, (x, weight)), np.ones(4), np.full(4, 3.0)))
        y = graph.call_function(F.cat, ([graph.call_function(F.add, (y, offset)), np.ones((2, 4, 5, 5))],))
        graph.output({"y": graph.call_function(F.add, (y, offset[::-1]))})
        gm = fx.GraphModule({}, graph)
        data = rng.normal(size=(2, 3, 5, 5))
        for fold in (passes.fuse_conv_bn, pyconvbn.fold):
            folded, _ = fold(gm, skip=skip)
            folded.graph.lint()
            before = folded(data)["y"]
            close(before, gm(data)["y"])
            weight += 1
            offset *= 2
            assert np.array_equal(folded(data)["y"], before)


def test_overlapping_arrays_of_any_origin_overlap_in_the_copy() -> None:
    """A write through one is seen through the other, also when neither is the other's NumPy base."""

    class Memory:
        def __init__(self, array: Any, offset: int, length: int) -> None:
            start = array.__array_interface__["data"][0]
            self.owner = array
            self.__array_interface__ = {"data": (start + 8 * offset, False), "shape": (length,), "typestr": "<f8",
                                        "version": 3}  # fmt: skip

    memory = np.zeros(6)
    net, graph = nn.Module(), fx.Graph()
    net.register_buffer("front", np.asarray(Memory(memory, 0, 4)))
    net.register_buffer("back", np.asarray(Memory(memory, 2, 4))[::-1])
    x = graph.placeholder("x")
    front, back = graph.get_attr("front"), graph.get_attr("back")
    graph.call_function(operator.iadd, (front, 1.0))
    graph.output(graph.call_function(operator.add, (x, back)))
    folded, _ = passes.fuse_conv_bn(fx.GraphModule(net, graph))
    assert folded(np.zeros(4)).tolist() == [0, 0, 1, 1] and not memory.any()


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("num_features", None, "CHANNEL_MISMATCH"), ("num_features", 4.0, "CHANNEL_MISMATCH"),
    ("eps", "small", "UNSUPPORTED_BN_OP"),
])  # fmt: skip
def test_a_batch_norm_with_odd_attributes_still_has_a_row(name: str, value: Any, reason: str) -> None:
    gm = trace(Net())
    setattr(gm.bn, name, value)
    assert [row.reason for row in passes.fuse_conv_bn(gm)[1]] == [reason]
    assert [row.reason for row in passes.efficient_conv_bn_eval(gm)] == [reason]


def test_geometry_assigned_later_as_one_number() -> None:
    gm = trace(Net())
    gm.conv.stride = 2
    x = np.random.default_rng(3).normal(size=(2, 3, 7, 7))
    wanted = gm(x)
    folded, report = passes.fuse_conv_bn(gm)
    assert report.ok
    close(folded(x), wanted)
    counted = pyconvbn.counters["efficient_conv_bn_eval_fallback"]
    assert passes.efficient_conv_bn_eval(gm).ok
    close(gm(x), wanted)
    assert pyconvbn.counters["efficient_conv_bn_eval_fallback"] == counted


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", np.zeros(1))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x + self.calls


def test_measuring_shapes_does_not_write_the_result() -> None:
    """A module without a shape rule is run to learn its shapes."""

    class Calls(fx.Tracer):
        def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
            return isinstance(m, Counting) or super().is_leaf_module(m, module_qualified_name)

    net = nn.Sequential(Net(), Counting()).eval()
    gm = fx.GraphModule(net, Calls().trace(net))
    x = np.random.default_rng(7).normal(size=(2, 3, 5, 5))
    folded, report = pyconvbn.fold(gm, example_inputs=x, verify=True)
    assert report.ok and report.bytes_saved
    close(folded(x), gm(x))


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=np.float64), nn.BatchNorm2d(4, dtype=np.float64))
        self.other = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Any) -> Any:
        return self.inner(x)


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return isinstance(m, Opaque | fx.GraphModule) or super().is_leaf_module(m, module_qualified_name)


def test_batch_norms_inside_modules_called_as_a_whole_have_rows() -> None:
    net = nn.Sequential(Net(), Opaque(), fx.symbolic_trace(Opaque()))
    randomise(net, np.random.default_rng(4))
    gm = fx.GraphModule(net, Leaves().trace(net))
    x = np.random.default_rng(5).normal(size=(2, 3, 5, 5))
    wanted = gm(x)
    rows = [("0.bn", "OK"), ("1.inner.1", "UNSUPPORTED_BN_OP"), ("1.other", "NO_RUNNING_STATS"),
            ("2.inner.1", "UNSUPPORTED_BN_OP")]  # fmt: skip
    for apply in (lambda g: passes.fuse_conv_bn(g), lambda g: (g, passes.efficient_conv_bn_eval(g))):
        result, report = apply(copy.deepcopy(gm))
        checked(result, report)
        assert [(row.target, row.reason) for row in report] == rows
        assert "trace into it" in report.explain("1.inner.1")
        close(result(x), wanted)
        assert [row.target for row in apply(result)[1]] == [target for target, _ in rows[1:]]
    gm.get_submodule("1").inner[1].train()
    assert passes.fuse_conv_bn(gm)[1][1].reason == "BN_TRAINING"
    assert passes.pre_grad(gm).reasons == {"SKIPPED_BY_USER": 4}


@pytest.mark.parametrize("kind", ["conv", "transposed", "functional"])
def test_a_fold_that_half_precision_cannot_hold_is_kept(kind: str) -> None:
    """Large statistics make weights that float16 has no bits for; the unfused pair is exact to its eps."""
    rng = np.random.default_rng(6)
    conv: Any = nn.Conv2d(4, 6, 3, dtype=np.float16)
    if kind == "transposed":
        conv = nn.ConvTranspose2d(4, 6, 3, groups=2, dtype=np.float16)
    conv.weight[...] = rng.normal(0, 0.05, conv.weight.shape)
    bn = nn.BatchNorm2d(6)
    net = nn.Sequential(conv, bn).eval()
    if kind == "functional":
        gm = fx.to_aten(trace(net), [(2, 4, 7, 7)])
    else:
        gm = trace(net)

    def outcome(mean: float, sigma: float, weight: float, bias: float) -> tuple[str, str]:
        bn.running_mean[...], bn.running_var[...] = mean, 1.0
        bn.weight[...], bn.bias[...] = 1.0, 0.0
        bn.running_var[4], bn.weight[4], bn.bias[4] = sigma**2, weight, bias
        row = passes.fuse_conv_bn(gm)[1][0]
        return row.reason, row.hint

    assert outcome(0.0, 1e2, 1.0, 0.0)[0] == "OK"
    reason, hint = outcome(0.0, 2e4, 1.0, 0.0)
    assert reason == "NONFINITE_FOLD" and "float16" in hint
    assert outcome(0.0, 1.0, 0.0, 1.0)[0] == "OK"  # no weight at all: exact
    assert outcome(0.0, 1.0, 1e-5, 1.0)[0] == "OK"  # a dead channel: below the rounding of its bias
    conv.weight[...] = 0
    assert outcome(0.0, 2e4, 1.0, 0.0)[0] == "OK"  # a pruned one


# -- a fold that is right for batched input only says so at run time ---------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 5)])
def test_folded_convolution_refuses_unbatched_input(shape):
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)).eval()
    net[1].running_mean[:] = [1, 2, 3, 4]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    folded, report = passes.fuse_conv_bn(fx.symbolic_trace(net))
    assert [row.outcome for row in report] == ["folded"]
    if len(shape) == 2:  # axis 1 of the output is not the channels' here, and the sizes agree by accident
        with pytest.raises(ValueError, match="input: expected 3 axes, got 2.*BatchNorm is folded"):
            folded(x)
    else:
        np.testing.assert_allclose(folded(x), net(x), rtol=1e-5, atol=1e-6)


def test_folded_linear_refuses_another_rank():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    gm = fx.symbolic_trace(net)
    fx.shape_prop(gm, (2, 3))
    folded, _ = passes.fuse_conv_bn(gm, strict=True)
    with pytest.raises(ValueError, match="input: expected 2 axes, got 3"):
        folded(np.zeros((2, 4, 3), np.float32))


def test_shapes_are_forgotten_when_a_node_changes():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    gm = fx.symbolic_trace(net)
    fx.shape_prop(gm, (2, 3))
    linear = next(iter(gm.graph.find_nodes(op="call_module", target="0")))
    with gm.graph.inserting_before(linear):
        wider = gm.graph.call_method("reshape", (linear.args[0], 1, 2, 3))
    linear.args = (wider,)
    _, report = passes.fuse_conv_bn(gm)
    assert [row.reason for row in report] == ["LINEAR_ND"]
