# SPDX-License-Identifier: BSD-3-Clause
"""passes.fuse_conv_bn: values, sharing in every shape, names, copies, and that a failure changes nothing."""

from __future__ import annotations

import copy
import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import fx, nn, passes, testing

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import KINDS, Multi, Pair, checked, close, randomise, sample, trace  # noqa: E402

FORMS = ["module", "functional", "aten"]


def folded_of(gm: Any, **keywords: Any) -> tuple[Any, Any]:
    """Folds a copy, checks both graphs, and that the original is untouched to the last bit."""
    text = str(gm.graph)
    state = {k: np.array(v) for k, v in gm.state_dict().items()}
    objects = {name: id(m) for name, m in gm.named_modules()}
    result, report = passes.fuse_conv_bn(gm, **keywords)
    checked(result, report)
    assert result is not gm and result.graph is not gm.graph and result.graph.owning_module is result
    assert str(gm.graph) == text and {name: id(m) for name, m in gm.named_modules()} == objects
    assert all(np.array_equal(v, state[k], equal_nan=True) for k, v in gm.state_dict().items())
    mine = {id(v) for v in gm.state_dict(keep_vars=True).values()}
    assert not any(np.shares_memory(a, b) for a in result.state_dict().values() for b in gm.state_dict().values())
    assert mine.isdisjoint(id(v) for v in result.state_dict(keep_vars=True).values())
    return result, report


def know_rank(gm: Any, kind: str, x: Any) -> None:
    """A linear output must be known to be 2-D."""
    if kind == "linear":
        fx.shape_prop(gm, x)


@pytest.mark.parametrize("sync", [False, True], ids=["bn", "sync_bn"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_pair(kind: str, form: str, bias: bool, sync: bool, rng: np.random.Generator) -> None:
    model, x = Pair(kind, rng, form=form, bias=bias, sync=sync), sample(kind, rng)
    gm = trace(model)
    know_rank(gm, kind, x)
    result, report = folded_of(gm)
    assert [(row.outcome, row.form) for row in report] == [("folded", form)]
    testing.assert_matches_reference(result(x), x, model.conv1, model.bn1)
    work = ["call_module"] if form == "module" else ["get_attr", "get_attr", "call_function"]
    assert [n.op for n in result.graph.nodes] == ["placeholder", *work, "output"]
    assert not any("running" in key for key in result.state_dict()), "the BatchNorm is gone"
    again, second = passes.fuse_conv_bn(result)
    assert len(second) == 0 and str(again.graph) == str(result.graph)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_three_pairs_with_several_users(kind: str, form: str, rng: np.random.Generator) -> None:
    model, x = Multi(kind, rng, form=form), sample(kind, rng, np.float64)
    gm = trace(model)
    know_rank(gm, kind, x)
    result, report = folded_of(gm)
    assert report.counts == {"folded": 3, "kept": 1}
    close(result(x), model.reference(x))
    again, second = passes.fuse_conv_bn(result)
    assert str(again.graph) == str(result.graph) and second.counts == {"kept": 1}


def two(**more: Any) -> Any:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(2, 2, 1, dtype=np.float64), nn.BatchNorm1d(2, dtype=np.float64)
            self.bn2 = nn.BatchNorm1d(2, eps=0.1, dtype=np.float64)

        def forward(self, x: Any) -> Any:
            return more["run"](self, x)

    return randomise(Model(), np.random.default_rng(5))


X = np.random.default_rng(6).normal(size=(2, 2, 5))


def pair(conv: Any, bn: Any, x: Any = X) -> Any:
    return testing.reference_conv_bn(x, conv, bn)


def test_conv_used_elsewhere_keeps_its_weight() -> None:
    model = two(run=lambda m, x: m.bn(m.conv(x)) + m.conv(x))
    result, report = folded_of(trace(model))
    assert report.ok
    close(result(X), pair(model.conv, model.bn) + pair(model.conv, None))
    assert np.array_equal(result.conv.weight, model.conv.weight)
    assert {n.target for n in result.graph.nodes if n.op == "call_module"} == {"conv", "conv_folded"}


def test_one_conv_with_two_bns_gets_two_weights() -> None:
    model = two(run=lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x + 1)))
    result, report = folded_of(trace(model))
    assert report.counts == {"folded": 2}
    close(result(X), pair(model.conv, model.bn) + pair(model.conv, model.bn2, X + 1))
    assert not hasattr(result, "conv"), "nobody calls the original any more"


def test_same_pair_called_twice_is_folded_once() -> None:
    model = two(run=lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x + 1)))
    result, report = folded_of(trace(model))
    assert report.counts == {"folded": 2}
    close(result(X), pair(model.conv, model.bn) + pair(model.conv, model.bn, X + 1))
    assert [name for name, _ in result.named_modules()] == ["", "conv"]


def test_conv_read_by_get_attr_keeps_its_weight() -> None:
    model = two(run=lambda m, x: m.bn(m.conv(x)) + m.conv.weight[0, 0, 0])
    result, report = folded_of(trace(model))
    assert report.ok
    close(result(X), pair(model.conv, model.bn) + model.conv.weight[0, 0, 0])


def test_returned_weight_keeps_its_values() -> None:
    model = two(run=lambda m, x: (m.bn(m.conv(x)), m.conv.weight))
    result, _ = folded_of(trace(model))
    y, weight = result(X)
    close(y, pair(model.conv, model.bn))
    assert np.array_equal(weight, model.conv.weight)


def test_two_modules_on_one_weight_array() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 2, 1, dtype=np.float64), nn.Conv1d(2, 2, 1, dtype=np.float64)
            self.b.weight = self.a.weight
            self.bn = nn.BatchNorm1d(2, dtype=np.float64)

        def forward(self, x: Any) -> Any:
            return self.bn(self.a(x)) + self.b(x)

    model = randomise(Model(), np.random.default_rng(1))
    for inplace in (False, True):
        gm = trace(model)
        result, report = passes.fuse_conv_bn(gm, inplace=inplace)
        assert checked(result, report).ok
        close(result(X), pair(model.a, model.bn) + pair(model.b, None))
    assert np.array_equal(model.a.weight, model.b.weight) and model.a.weight is model.b.weight


def test_views_of_one_base_array_stay_views_in_the_copy() -> None:
    """Somebody writes the base while the graph runs: the copy's unfolded convolution has to see it as well."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Parameter(np.arange(12.0))
            self.a, self.b = nn.Conv1d(2, 2, 1, dtype=np.float64), nn.Conv1d(2, 2, 1, dtype=np.float64)
            self.a.weight = nn.Parameter(self.base[:4].reshape(2, 2, 1))
            self.b.weight = nn.Parameter(self.base[2:6].reshape(2, 2, 1))
            self.c = nn.Conv1d(2, 2, 1, dtype=np.float64)
            self.bn, self.bn2 = nn.BatchNorm1d(2, dtype=np.float64), nn.BatchNorm1d(2, dtype=np.float64)

    model, graph = randomise(Model(), np.random.default_rng(1)), fx.Graph()
    x = graph.placeholder("x")
    kept = graph.call_module("bn", (graph.call_module("a", (x,)),))
    graph.call_function(operator.iadd, (graph.get_attr("base"), 1.0))
    late = graph.call_module("b", (x,))
    folded = graph.call_module("bn2", (graph.call_module("c", (x,)),))
    graph.output((kept, late, folded))
    gm = fx.GraphModule(model, graph)
    wanted = pair(model.a, model.bn), None, pair(model.c, model.bn2)
    result, report = folded_of(gm)
    assert [row.reason for row in report] == ["MUTATED_BETWEEN", "OK"]
    assert np.shares_memory(result.base, result.a.weight) and np.shares_memory(result.base, result.b.weight)
    before = np.array(model.base)
    got = result(X)
    close(got[0], wanted[0])
    close(got[2], wanted[2])
    assert np.array_equal(model.base, before) and np.array_equal(result.base, before + 1)
    close(got[1], testing.reference_conv_bn(X, result.b))
    assert np.array_equal(result.b.weight.ravel(), before[2:6] + 1)
    assert isinstance(result.a.weight, nn.Parameter)


def test_functional_weight_used_by_others_keeps_its_values(rng: np.random.Generator) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(rng.normal(size=(3, 2, 1)), requires_grad=False)
            self.m, self.v = rng.normal(size=3), rng.uniform(1, 2, 3)

        def forward(self, x: Any) -> Any:
            one = F.batch_norm(F.conv1d(x, self.w), self.m, self.v)
            other = F.batch_norm(F.conv1d(x + 1, weight=self.w), running_mean=self.m, running_var=self.v, eps=2.0)
            return one + other + F.conv1d(x, self.w)

    model = Model()
    result, report = folded_of(trace(model))
    assert report.counts == {"folded": 2}
    conv = lambda v: testing.reference_conv(v, model.w, None)  # noqa: E731
    norm = testing.reference_batch_norm
    close(result(X), norm(conv(X), model.m, model.v) + norm(conv(X + 1), model.m, model.v, eps=2.0) + conv(X))
    names = sorted(result.state_dict())
    assert names == ["w", "w_folded", "w_folded_1", "w_folded_bias", "w_folded_bias_1"]
    assert isinstance(result.w_folded, nn.Parameter) and not result.w_folded.requires_grad


def test_functional_pair_called_twice_is_folded_once(rng: np.random.Generator) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(rng.normal(size=(3, 2, 1)))
            self.register_buffer("m", rng.normal(size=3))
            self.register_buffer("v", rng.uniform(1, 2, 3))

        def forward(self, x: Any) -> Any:
            f = lambda y: F.batch_norm(F.conv1d(y, self.w), self.m, self.v)  # noqa: E731
            return f(x) + f(x + 1)

    model = Model()
    result, report = folded_of(trace(model))
    assert report.counts == {"folded": 2} and sorted(result.state_dict()) == ["w_folded", "w_folded_bias"]
    f = lambda y: testing.reference_batch_norm(testing.reference_conv(y, model.w, None), model.m, model.v)  # noqa: E731
    close(result(X), f(X) + f(X + 1))


def test_array_literals_are_folded(rng: np.random.Generator) -> None:
    graph = fx.Graph()
    w, m, v = rng.normal(size=(3, 2, 1)), rng.normal(size=3), rng.uniform(1, 2, 3)
    y = graph.call_function(F.conv1d, (graph.placeholder("x"), w), {"bias": None})
    graph.output(graph.call_function(F.batch_norm, (y, m, v)))
    result, report = passes.fuse_conv_bn(fx.GraphModule({}, graph))
    assert checked(result, report).ok
    close(result(X), testing.reference_batch_norm(testing.reference_conv(X, w, None), m, v))


def test_chain_of_bns_is_folded_whole() -> None:
    model = two(run=lambda m, x: m.bn2(m.bn(m.conv(x))))
    result, report = folded_of(trace(model))
    assert report.counts == {"folded": 2} and [row.conv for row in report] == ["conv", "conv"]
    close(result(X), testing.reference_module(model.bn2, pair(model.conv, model.bn)))
    assert [n.op for n in result.graph.nodes] == ["placeholder", "call_module", "output"]


def test_tuple_form_of_aten(rng: np.random.Generator) -> None:
    from pyconvbn.ops import aten

    graph = fx.Graph()
    x = graph.placeholder("x")
    w, g, m, v = rng.normal(size=(2, 4, 3)), *rng.uniform(1, 2, (3, 6))
    y = graph.call_function(aten.convolution.default, (x, w, None, [2], [1], [1], True, [1], 1))
    w6 = rng.normal(size=(4, 3, 3))
    y.args = (x, w6, None, [2], [1], [1], True, [1], 2)
    bn = graph.call_function(aten._native_batch_norm_legit_no_training.default, (y, g, None, m, v, 0.1, 1e-3))
    graph.output(graph.call_function(operator.getitem, (bn, 0)))
    result, report = passes.fuse_conv_bn(fx.GraphModule({}, graph))
    assert checked(result, report).ok
    a = rng.normal(size=(2, 4, 5))
    raw = testing.reference_conv_transpose(a, w6, None, stride=2, padding=1, output_padding=1, groups=2)
    close(result(a), testing.reference_batch_norm(raw, m, v, g, eps=1e-3))


def test_conv_inside_a_container_that_is_called_as_a_whole(rng: np.random.Generator) -> None:
    """What a container does is not known: it may write its weights, so nothing of it is folded."""
    block = nn.Sequential(nn.Conv1d(2, 2, 1, dtype=np.float64), nn.ReLU())
    root = randomise(nn.Sequential(block, nn.BatchNorm1d(2, dtype=np.float64)), rng)
    graph = fx.Graph()
    x = graph.placeholder("x")
    whole = graph.call_module("0", (x,))
    part = graph.call_module("1", (graph.call_module("0.0", (x,)),))
    graph.output((whole, part))
    gm = fx.GraphModule(root, graph)
    for inplace in (False, True):
        result, report = passes.fuse_conv_bn(copy.deepcopy(gm), inplace=inplace)
        assert [(row.reason, row.blocking) for row in checked(result, report)] == [("MUTATED_BETWEEN", "_0")]
        close(result(X)[0], np.maximum(pair(block[0], None), 0))
        close(result(X)[1], pair(block[0], root[1]))


def test_conv_that_an_efficient_call_reads_keeps_its_weight() -> None:
    model = two(run=lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x + 1)))
    gm = trace(model)
    node = next(n for n in gm.graph.nodes if n.target == "bn")
    passes._run_efficient(gm, only=node)
    result, report = folded_of(gm)
    assert [row.node for row in report] == ["bn2"] and report.ok
    close(result(X), pair(model.conv, model.bn) + pair(model.conv, model.bn2, X + 1))
    assert np.array_equal(result.conv.weight, model.conv.weight) and not hasattr(result, "bn2")


def test_one_module_under_two_names(rng: np.random.Generator) -> None:
    root = nn.Module()
    root.a = root.b = nn.Conv1d(2, 2, 1, dtype=np.float64)
    root.bn = nn.BatchNorm1d(2, dtype=np.float64)
    randomise(root, rng)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("bn", (graph.call_module("a", (x,)),)), graph.call_module("b", (x,))))
    result, report = passes.fuse_conv_bn(fx.GraphModule(root, graph))
    assert checked(result, report).ok
    close(result(X)[0], pair(root.a, root.bn))
    close(result(X)[1], pair(root.b, None))


def test_inplace_replaces_modules_and_never_writes_them() -> None:
    model = two(run=lambda m, x: m.bn(m.conv(x)))
    state = {k: v.copy() for k, v in model.state_dict().items()}
    gm = trace(model)
    result, report = passes.fuse_conv_bn(gm, inplace=True)
    assert result is gm and checked(gm, report).ok
    assert gm.conv is not model.conv and not hasattr(gm, "bn")
    assert all(np.array_equal(v, state[k]) for k, v in model.state_dict().items()) and hasattr(model, "bn")
    close(gm(X), pair(model.conv, model.bn))


def test_nothing_to_fold_still_gives_a_copy() -> None:
    gm = trace(two(run=lambda m, x: m.bn(x)))
    result, report = folded_of(gm)
    assert report.counts == {"kept": 1} and str(result.graph) == str(gm.graph)


@pytest.mark.parametrize("inplace", [False, True])
def test_strict_lists_what_stays_and_changes_nothing(inplace: bool) -> None:
    model = two(run=lambda m, x: m.bn2(F.relu(m.bn(m.conv(x)))))
    gm = trace(model)
    text, objects = str(gm.graph), {name: id(m) for name, m in gm.named_modules()}
    with pytest.raises(pyconvbn.FoldError, match=r"1 of 2 BatchNorms") as caught:
        passes.fuse_conv_bn(gm, strict=True, inplace=inplace)
    assert caught.value.reason == "NOT_CONV" and "bn2" in str(caught.value)
    assert str(gm.graph) == text and {name: id(m) for name, m in gm.named_modules()} == objects
    gm.graph.lint()
    good = trace(two(run=lambda m, x: m.bn(m.conv(x))))
    assert passes.fuse_conv_bn(good, strict=True)[1].ok


class Boom(Exception):
    pass


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["module", "functional"])
def test_failure_half_way_is_taken_back(kind: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method of the editing half raises once."""
    from pyconvbn import _pass_fuse

    rng = np.random.default_rng(0)
    model = Multi("conv1d", rng, form=kind)
    for name in ("_module", "_function", "_remove_bn", "_delete_unused"):
        gm = trace(model)
        text, state = str(gm.graph), {k: id(v) for k, v in gm.state_dict(keep_vars=True).items()}
        original, calls = getattr(_pass_fuse._Editor, name), []

        def wrapped(self: Any, *args: Any, original: Any = original, calls: Any = calls) -> Any:
            result = original(self, *args)
            calls.append(1)
            if len(calls) == 2 or original.__name__ == "_delete_unused":
                raise Boom
            return result

        with monkeypatch.context() as patch:
            patch.setattr(_pass_fuse._Editor, name, wrapped)
            try:
                passes.fuse_conv_bn(gm, inplace=inplace)
            except Boom:
                pass
            else:
                assert not calls, "the failure was swallowed"
                continue  # this form does not come by there
        assert str(gm.graph) == text
        assert {k: id(v) for k, v in gm.state_dict(keep_vars=True).items()} == state
        gm.graph.lint()
        x = sample("conv1d", rng, np.float64)
        close(gm(x), model.reference(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", ["fuse", "dce"])
def test_every_allocation_that_fails_is_taken_back(run: str, form: str) -> None:
    from pyconvbn import _core

    rng = np.random.default_rng(0)
    model = Multi("conv1d", rng, form=form)
    gm = trace(model)
    dead = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(dead):
        gm.graph.call_function(F.relu, (dead,))
    apply = passes.dce if run == "dce" else lambda gm: passes.fuse_conv_bn(gm, inplace=True)
    text, state = str(gm.graph), {k: id(v) for k, v in gm.state_dict(keep_vars=True).items()}
    failures = 0
    while failures < 3000:
        _core._testing.alloc_fail_after(failures)
        try:
            apply(gm)
            break
        except MemoryError:
            failures += 1
        finally:
            _core._testing.alloc_fail_after(-1)
        assert str(gm.graph) == text
        assert {k: id(v) for k, v in gm.state_dict(keep_vars=True).items()} == state
        gm.graph.lint()
    assert failures >= (1 if run == "dce" else 5) and str(gm.graph) != text
    x = sample("conv1d", rng, np.float64)
    close(gm(x), model.reference(x))


def test_modules_that_are_plain_objects(torch: Any) -> None:
    """A torch module as a leaf: its clone is a torch module too, and the original is untouched."""
    conv, bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4).eval()
    conv.eval()
    with torch.no_grad():
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    weight = conv.weight.detach().clone()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("bn", (graph.call_module("conv", (x,)),)))
    gm = fx.GraphModule({"conv": conv, "bn": bn}, graph)
    a = torch.randn(2, 3, 6, 6)
    wanted = bn(conv(a)).detach().numpy()
    result, report = passes.fuse_conv_bn(gm, inplace=True)
    assert report.ok and isinstance(result.conv, torch.nn.Conv2d) and result.conv is not conv
    assert torch.equal(conv.weight, weight)
    np.testing.assert_allclose(result(a).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_report_after_shape_propagation() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    fx.shape_prop(gm, np.zeros((2, 3, 10, 10), np.float32))
    report = passes.fuse_conv_bn(gm)[1]
    assert report.bytes_saved == 2 * 4 * 2 * 8 * 8 * 8 and "saves" in str(report)
