# SPDX-License-Identifier: BSD-3-Clause
"""BatchNorm and arithmetic into weights in one walk: every form, chains, sharing, reasons, all or nothing."""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyconvbn import _core, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn._lower import lower_modules
from pyconvbn._pass_layers import _Helper, fold_layers
from pyconvbn._pass_run import all_or_nothing
from pyconvbn.freeze_report import FreezeRow
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import KINDS, Pair, close, conv_of, randomise, sample  # noqa: E402
from random_nets import RandomNet  # noqa: E402
from test_differential import assert_as_good, bn_nodes, run  # noqa: E402


def targets(gm: Any) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def frozen_names(gm: Any) -> set[str]:
    return {name for name in vars(gm) if name.startswith("_frozen_param")}


def fold(gm: Any, rows: list[FreezeRow] | None = None) -> Any:
    """fold_layers and what holds after it."""
    report = fold_layers(gm, report=rows)
    gm.graph.lint()
    names = {n.name for n in gm.graph.nodes}
    for row in report:
        assert (row.outcome == "kept") == (row.reason != "OK") == (row.new_node is None)
        assert (row.node in names) == (row.outcome == "kept")
        assert row.outcome != "kept" or row.hint
        assert row.new_node is None or row.new_node == row.conv
    read = {n.target for n in gm.graph.nodes if n.op == "get_attr"}
    assert frozen_names(gm) == {name for name in read if name.startswith("_frozen_param")}
    before = str(gm.graph)
    again = fold_layers(gm)
    assert str(gm.graph) == before, "a second pass changes nothing"
    assert [(r.node, r.reason) for r in again] == [(r.node, r.reason) for r in report if r.outcome == "kept"]
    return report


# ---- forms -----------------------------------------------------------------------------------------------------------


def tuple_bn(name: str) -> Callable[[Any, Any], Any]:
    def call(bn: Any, y: Any) -> Any:
        function = getattr(aten, name).default
        if name == "_native_batch_norm_legit_no_training":
            result = function(y, bn.weight, bn.bias, bn.running_mean, bn.running_var, 0.1, bn.eps)
        else:
            result = function(y, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, bn.eps)
        return result[0]

    return call


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("form", ["functional", "aten"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair(kind: str, form: str, bias: bool, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    net = Pair(kind, rng, form=form, bias=bias, dtype=dtype)
    gm = fx.symbolic_trace(net)
    x = sample(kind, rng, dtype)
    fx.shape_prop(gm, x)
    copied, plain = passes.fuse_conv_bn(gm)
    wanted = gm(x)
    report = fold(gm)
    assert [(r.node, r.outcome, r.conv, r.form, r.bytes_saved) for r in report] == [
        (r.node, r.outcome, r.conv, r.form, r.bytes_saved) for r in plain]
    assert report.counts == {"folded": 1}
    assert len(targets(gm)) == 1
    close(gm(x), wanted, 1e-4 if dtype == np.float32 else 1e-12)
    np.testing.assert_array_equal(gm(x), copied(x))  # the same arithmetic as the fold into a copy
    conv = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert [getattr(gm, n.target).shape for n in conv.args[1:3]] == [net.conv1.weight.shape, (4,)]
    assert conv.args[1].next is conv.args[2] and conv.args[2].next is conv


@pytest.mark.parametrize("name", ["_native_batch_norm_legit", "_native_batch_norm_legit_no_training"])
@pytest.mark.parametrize("kind", ["conv1d", "conv_transpose2d", "linear"])
def test_tuple_forms(kind: str, name: str) -> None:
    rng = np.random.default_rng(0)
    net = Pair(kind, rng, dtype=np.float64)
    gm = fx.symbolic_trace(lambda x: F.relu(tuple_bn(name)(net.bn1, conv_of("aten", kind, net.conv1, x))))
    x = sample(kind, rng, np.float64)
    fx.shape_prop(gm, x)
    wanted = gm(x)
    assert fold(gm).counts == {"folded": 1}
    assert len(targets(gm)) == 2
    close(gm(x), wanted, 1e-12)


def test_float16_and_strided_parameters() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float16, np.float32, np.float64):
        w = rng.normal(size=(3, 3, 8, 4)).astype(dtype).T[:, ::2]  # Fortran order, every second channel
        stats = rng.uniform(0.5, 2.0, (2, 8)).astype(np.float32)[:, ::2]
        gm = _bn_net(w, stats)
        x = rng.normal(size=(1, 4, 5, 5)).astype(dtype)
        wanted = gm(x)
        assert fold(gm).counts == {"folded": 1}
        close(gm(x), wanted.astype(np.float64), {2: 1e-2, 4: 1e-5, 8: 1e-13}[np.dtype(dtype).itemsize])


def _bn_net(w: Any, stats: Any) -> Any:
    return fx.symbolic_trace(lambda x: F.batch_norm(F.conv2d(x, w), stats[0], stats[1]))


# ---- chains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_chain_becomes_one_layer(kind: str) -> None:
    rng = np.random.default_rng(0)
    net = Pair(kind, rng, dtype=np.float64)
    other = randomise(KINDS[kind][1](4, dtype=np.float64), rng)
    c = rng.normal(size=4) if kind == "linear" else rng.normal(size=(4, *(1,) * (len(KINDS[kind][2]) - 2)))
    d = np.float64(0.5)

    def chain(x: Any) -> Any:
        y = conv_of("aten", kind, net.conv1, x) + c
        y = 1 - _bn("functional", net.bn1, y) * c
        return _bn("aten", other, _bn("aten", net.bn1, y / 3)) - d

    gm = fx.symbolic_trace(chain)
    x = sample(kind, rng, np.float64)
    fx.shape_prop(gm, x)
    wanted = gm(x)
    rows: list[FreezeRow] = []
    report = fold(gm, rows)
    assert report.counts == {"folded": 3}
    assert [row.node for row in rows] == ["add", "mul", "sub", "truediv", "sub_1"]
    assert all(row.outcome == "done" for row in rows)
    assert len(targets(gm)) == 1 and len(frozen_names(gm)) == 2
    close(gm(x), wanted, 1e-11)


def _bn(form: str, bn: Any, y: Any) -> Any:
    if form == "functional":
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
    return aten.batch_norm.default(y, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, bn.eps, True)


# ---- values that are shared ------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One conv, called `times` times, each call with a BatchNorm of its own or all with the first."""

    def __init__(self, times: int, one_bn: bool) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.conv = nn.Conv1d(3, 3, 3, padding=1, dtype=np.float64)
        self.bns = nn.ModuleList([nn.BatchNorm1d(3, dtype=np.float64) for _ in range(times)])
        self.one_bn = one_bn
        randomise(self, rng)

    def forward(self, x: Any) -> Any:
        for i in range(len(self.bns)):
            x = self.bns[0 if self.one_bn else i](self.conv(x))
        return x


@pytest.mark.parametrize("one_bn", [False, True], ids=["own BatchNorms", "one BatchNorm"])
def test_a_module_called_twice(one_bn: bool) -> None:
    net = Shared(3, one_bn)
    gm = fx.symbolic_trace(net)
    x = np.random.default_rng(0).normal(size=(2, 3, 7))
    weight, wanted = net.conv.weight.copy(), gm(x)
    lower_modules(gm)
    assert fold(gm).counts == {"folded": 3}
    assert len(frozen_names(gm)) == (2 if one_bn else 6)  # the same pair is folded once
    close(gm(x), wanted, 1e-11)
    np.testing.assert_array_equal(net.conv.weight, weight)
    close(net(x), wanted, 1e-14)


def test_two_batch_norms_on_one_call() -> None:
    rng = np.random.default_rng(0)
    net = Pair("conv2d", rng, dtype=np.float64)
    other = randomise(nn.BatchNorm2d(4, dtype=np.float64), rng)

    def both(x: Any) -> Any:
        y = conv_of("functional", "conv2d", net.conv1, x)
        return _bn("functional", net.bn1, y) + _bn("functional", other, y)

    gm = fx.symbolic_trace(both)
    assert [row.reason for row in fold(gm)] == ["MULTI_USER", "MULTI_USER"]


def test_more_into_constants_that_two_calls_share() -> None:
    """The same pair twice is folded once; what follows one of the calls gives that one weights of its own."""
    net = Pair("conv2d", np.random.default_rng(0), form="functional", dtype=np.float64)
    gm = fx.symbolic_trace(lambda x: net.forward(net.forward(x) * 2.0))
    x = sample("conv2d", np.random.default_rng(1), np.float64)
    wanted = gm(x)
    rows: list[FreezeRow] = []
    assert fold(gm, rows).counts == {"folded": 2}
    assert [row.reason for row in rows] == ["OK"] and len(frozen_names(gm)) == 4
    close(gm(x), wanted, 1e-11)


def test_a_weight_that_a_later_fold_sets_free() -> None:
    """The weight is shared with a convolution whose BatchNorm gives it another: then it is not shared any more."""
    rng = np.random.default_rng(0)
    w, stats = rng.normal(size=(2, 2, 1)), rng.uniform(1, 2, (2, 2))

    def net(x: Any) -> Any:
        first = F.conv1d(x, w) * 2.0
        second = F.batch_norm(F.conv1d(first, w), stats[0], stats[1])
        return F.relu(F.batch_norm(second, stats[1], stats[0])) * 3

    gm = fx.symbolic_trace(net)
    x = rng.normal(size=(1, 2, 5))
    wanted = gm(x)
    rows: list[FreezeRow] = []
    assert fold(gm, rows).counts == {"folded": 2}
    assert [(row.node, row.reason) for row in rows] == [("mul", "OK")]
    close(gm(x), wanted, 1e-12)


def test_rows_keep_their_order_over_several_walks() -> None:
    rng = np.random.default_rng(0)
    w, v, stats = rng.normal(size=(2, 2, 1)), rng.normal(size=(2, 2, 1)), rng.uniform(1, 2, (2, 2))

    def net(x: Any) -> Any:
        a = F.conv1d(x, v) * 5.0  # v stays shared
        b = F.batch_norm(F.conv1d(a, w) * 2.0, stats[0], stats[1])  # folds in the second walk, the BatchNorm too
        c = F.batch_norm(F.relu(F.conv1d(b, v)), stats[0], stats[1])  # never
        d = F.batch_norm(F.conv1d(c, w), stats[0], stats[1])  # in the first
        return F.conv1d(d, v) / 2.0

    gm = fx.symbolic_trace(net)
    x = rng.normal(size=(1, 2, 5))
    wanted = gm(x)
    rows: list[FreezeRow] = []
    report = fold(gm, rows)
    assert [(row.node, row.reason) for row in report] == [
        ("batch_norm", "OK"), ("batch_norm_1", "NOT_CONV"), ("batch_norm_2", "OK")]
    assert [(row.node, row.reason) for row in rows] == [
        ("mul", "WEIGHT_SHARED"), ("mul_1", "OK"), ("truediv", "WEIGHT_SHARED")]
    close(gm(x), wanted, 1e-12)


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_parameters_that_the_graph_returns_stay() -> None:
    """The caller may write them between two calls: freezing reads them at each."""
    rng = np.random.default_rng(0)
    net = Pair("conv2d", rng, form="functional", dtype=np.float64)
    for name in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        gm = fx.symbolic_trace(net)
        with gm.graph.inserting_before(gm.graph.output_node()):
            view = gm.graph.call_function(operator.getitem, (gm.graph.get_attr(name), 0))
        gm.graph.output_node().args = ((gm.graph.output_node().args[0], view),)
        (row,) = fold(gm)
        assert row.reason == "NONCONST_PARAM" and "caller" in row.hint, name


def test_modules_that_are_not_operators() -> None:
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval()
    net[1].train()
    gm = fx.symbolic_trace(net)
    assert [(row.node, row.reason) for row in fold(gm)] == [("_1", "BN_TRAINING"), ("_2", "NOT_CONV")]
    net[1].eval()
    assert [row.reason for row in fold(fx.symbolic_trace(net))] == ["UNSUPPORTED_BN_OP", "NOT_CONV"]


def test_hidden_batch_norms_have_rows() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Any) -> Any:
            return self.b(self.a(x))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: Any, name: str) -> bool:
            return isinstance(module, Opaque) or super().is_leaf_module(module, name)

    net = nn.Sequential(Opaque()).eval()
    gm = fx.GraphModule(net, Tracer().trace(net))
    report = fold_layers(gm)
    assert [(row.target, row.reason) for row in report] == [
        ("0.a", "UNSUPPORTED_BN_OP"), ("0.b", "UNSUPPORTED_BN_OP")]


@pytest.mark.parametrize(("var", "gamma", "reason"), [
    (0.0, 1.0, "NONFINITE_FOLD"), (1.0, 1e39, "NONFINITE_FOLD"), (1e30, 1e-30, "OK"), (1.0, 0.0, "OK"),
    (1.0, np.nan, "NONFINITE_FOLD"),
])  # fmt: skip
def test_what_the_dtype_cannot_hold(var: float, gamma: float, reason: str) -> None:
    w = np.full((2, 2, 1), 0.5, np.float32)
    mean, variance = np.zeros(2, np.float32), np.array([1.0, var], np.float32)
    g = np.array([1.0, gamma], np.float64)
    gm = fx.symbolic_trace(lambda x: F.batch_norm(F.conv1d(x, w), mean, variance, g, None, eps=0.0))
    (row,) = passes.fuse_conv_bn(gm)[1]
    assert row.reason == ("NONFINITE_FOLD" if row.reason == "NONFINITE_FOLD" else reason)
    (mine,) = fold(gm)
    assert (mine.reason, mine.hint) == (row.reason, row.hint)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose2d"])
def test_channels_that_would_lose_their_bits(kind: str, dtype: Any) -> None:
    """Tiny weights under a normal gamma are refused as the fold into a copy refuses them; dead channels are not."""
    limits = np.finfo(dtype)
    for weight, var, reason in ((limits.smallest_normal, 1e4, "NONFINITE_FOLD"), (0.0, 1e4, "OK"), (1.0, 1e4, "OK")):
        net = Pair(kind, np.random.default_rng(0), form="functional", dtype=dtype)
        if kind == "conv2d":
            net.conv1.weight[2] = weight
        else:
            net.conv1.weight[2:, 0] = weight
        net.bn1.running_var[...], net.bn1.weight[...], net.bn1.bias[...] = var, 1, 0
        gm = fx.symbolic_trace(net)
        (row,) = passes.fuse_conv_bn(gm)[1]
        (mine,) = fold(gm)
        assert (mine.reason, mine.hint) == (row.reason, row.hint)
        assert mine.reason == reason


@pytest.mark.parametrize(("apply", "wanted"), [
    (lambda y: y * 2, False), (lambda y: y * np.ones((3, 1)), False), (lambda y: y * np.ones((1, 3, 1)), True),
    (lambda y: F.batch_norm(y, np.zeros(3), np.ones(3)), True), (lambda y: F.relu(y * np.ones((1, 3, 1))), True),
])  # fmt: skip
def test_which_layers_need_a_batch_axis_now(apply: Any, wanted: bool) -> None:
    w = np.ones((3, 2, 1))
    gm = fx.symbolic_trace(lambda x: apply(F.conv1d(x, w)))
    batched: set[str] = set()
    fold_layers(gm, batched=batched)
    assert batched == ({"conv1d"} if wanted else set())


# ---- the pass as a whole ---------------------------------------------------------------------------------------------


def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _pass_run

    rng = np.random.default_rng(0)
    net = Pair("conv2d", rng, form="functional", dtype=np.float64)
    gm = fx.symbolic_trace(lambda x: _bn("aten", net.bn1, net.forward(x) * 2) + 1)
    before, graph = dict(vars(gm)), str(gm.graph)
    add = _pass_run.Constants.add
    for failing in range(7):
        left = [failing]

        def limited(self: Any, array: Any, left: list[int] = left) -> str:
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError("no room")
            return add(self, array)

        monkeypatch.setattr(_pass_run.Constants, "add", limited)
        rows: list[FreezeRow] = []
        with pytest.raises(MemoryError, match="no room"):
            fold_layers(gm, report=rows)
        assert str(gm.graph) == graph and rows == []
        assert vars(gm).keys() == before.keys() and frozen_names(gm) == set()
        gm.graph.lint()
    monkeypatch.undo()
    assert fold(gm).counts == {"folded": 2}


def test_memory_that_runs_out_in_c() -> None:
    testing = _core._testing
    if not hasattr(testing, "alloc_fail_after"):
        pytest.skip("this build cannot make allocations fail")
    rng = np.random.default_rng(0)
    net = Pair("conv_transpose2d", rng, form="functional", dtype=np.float64)
    failed = 0
    for after in range(200):
        gm = fx.symbolic_trace(lambda x: _bn("aten", net.bn1, net.forward(x) * 2) + 1)
        graph = str(gm.graph)
        testing.alloc_fail_after(after)
        try:
            fold_layers(gm)
        except MemoryError:
            failed += 1
            assert str(gm.graph) == graph and frozen_names(gm) == set()
            gm.graph.lint()
        else:
            testing.alloc_fail_after(-1)
            break
        finally:
            testing.alloc_fail_after(-1)
    assert failed > 5


def test_the_insertion_point_stays() -> None:
    rng = np.random.default_rng(0)
    net = Pair("conv2d", rng, form="functional", dtype=np.float64)
    gm = fx.symbolic_trace(net)
    conv, bn = [n for n in gm.graph.nodes if n.op == "call_function"]
    with gm.graph.inserting_before(bn):
        fold_layers(gm)
        new = gm.graph.call_function(abs, (conv,))
    assert conv.next is new and new.next.op == "output"
    gm.graph.lint()


@pytest.mark.parametrize("seed", range(120))
def test_random_nets(seed: int) -> None:
    """The BatchNorms that folding into a copy folds; with arithmetic at least those; both with the right values."""
    net = RandomNet(seed, [np.float64, np.float32][seed % 2])
    x = net.example(np.random.default_rng(seed))
    reference, plain = net.reference(x), run(net, x)
    gm = fx.symbolic_trace(net)
    lower_modules(gm)
    passes.dce(gm)
    fx.shape_prop(copy.deepcopy(gm), x)
    wanted = {(r.node, r.outcome) for r in passes.fuse_conv_bn(gm)[1]}
    alone = copy.deepcopy(gm)
    with all_or_nothing(alone) as constants:
        rows = _core.pass_fold_layers(alone.graph, alone, _Helper(alone, constants), True, False)[2]
    assert {(row[0], row[2]) for row in rows} == wanted
    alone.graph.lint()
    assert_as_good(run(alone, x), plain, reference, "BatchNorms alone")
    report = fold(gm)
    assert {r.node for r in report} == {node for node, _ in wanted}
    assert {r.node for r in report if r.outcome == "folded"} >= {node for node, how in wanted if how == "folded"}
    assert len(bn_nodes(gm)) <= len([r for r in report if r.outcome == "kept"])
    assert_as_good(run(gm, x), plain, reference, str(report))
