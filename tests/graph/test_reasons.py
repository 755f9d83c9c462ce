# SPDX-License-Identifier: BSD-3-Clause
"""Every reason code of a FoldReport: the graph that earns it, the node it blames, in both passes; and their order."""

from __future__ import annotations

import copy
import json
import operator
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import fx, nn, passes
from pyconvbn.report import REASONS, FoldReport, FoldRow

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import checked, randomise, trace  # noqa: E402

ORDER = (
    "SKIPPED_BY_USER BN_TRAINING NO_RUNNING_STATS UNSUPPORTED_BN_OP NOT_CONV IS_OUTPUT MULTI_USER CONV_TRAINING "
    "CHANNEL_MISMATCH LINEAR_ND MUTATED_BETWEEN WEIGHT_SHARED NONCONST_PARAM DTYPE_MIX OUTPUT_SIZE_ARG NONFINITE_FOLD "
    "PADDED_PRE_BN HOOKED BN_OUTPUT_UNUSED OK"
).split()


def test_codes_and_their_order() -> None:
    assert list(REASONS) == ORDER
    assert all(REASONS[code] for code in ORDER[:-1])


class Net(nn.Module):
    """conv, bn, lin, bn1d, up, and a forward given by a function."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self._run = run
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.lin, self.bn1d, self.bn_one = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(1)
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
        self.w, self.m = nn.Parameter(np.ones((4, 3, 1, 1), np.float32)), np.ones(4, np.float32)
        self.register_buffer("mean", self.m)
        self.register_buffer("scale", np.full(4, 2, np.float32))
        randomise(self, np.random.default_rng(0))

    def forward(self, x: Any) -> Any:
        return self._run(self, x)


def f_bn(net: Any, y: Any, **keywords: Any) -> Any:
    return F.batch_norm(y, net.mean, net.scale, **keywords)


#: code -> (forward, change of the module before tracing or None, blamed node or None)
Case = tuple[Callable[[Any, Any], Any], Callable[[Any], Any] | None, str | None]
plain = lambda n, x: n.bn(n.conv(x))  # noqa: E731


def set_train(name: str) -> Callable[[Any], Any]:
    return lambda net: getattr(net, name).train()


def replaced(name: str, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(net: Any) -> None:
        old = getattr(net, name)
        setattr(net, name, make(old).eval())

    return change


def set_array(path: str, value: Any) -> Callable[[Any], Any]:
    def change(net: Any) -> None:
        owner, name = path.split(".")
        getattr(getattr(net, owner), name)[...] = value

    return change


def set_attribute(path: str, value: Any) -> Callable[[Any], Any]:
    def change(net: Any) -> None:
        owner, name = path.split(".")
        setattr(getattr(net, owner), name, value(net) if callable(value) else value)

    return change


BOTH: dict[str, tuple[str, Case]] = {
    "module in training": ("BN_TRAINING", (plain, set_train("bn"), None)),
    "training=True": ("BN_TRAINING", (lambda n, x: f_bn(n, F.conv2d(x, n.w), training=True), None, None)),
    "no statistics": (
        "NO_RUNNING_STATS", (plain, replaced("bn", lambda b: nn.BatchNorm2d(4, track_running_stats=False)), None)),
    "statistics None": ("NO_RUNNING_STATS", (lambda n, x: F.batch_norm(F.conv2d(x, n.w), None, None), None, None)),
    "negative eps": ("UNSUPPORTED_BN_OP", (lambda n, x: f_bn(n, F.conv2d(x, n.w), eps=-1.0), None, None)),
    "eps not finite": ("UNSUPPORTED_BN_OP", (plain, set_attribute("bn.eps", float("inf")), None)),
    "of the input": ("NOT_CONV", (lambda n, x: n.bn(x), None, "x")),
    "relu between": ("NOT_CONV", (lambda n, x: n.bn(F.relu(n.conv(x))), None, "relu")),
    "module after function": ("NOT_CONV", (lambda n, x: n.bn(F.conv2d(x, n.w)), None, "conv2d")),
    "function after module": ("NOT_CONV", (lambda n, x: f_bn(n, n.conv(x)), None, "conv")),
    "bn after bn of a kept one": ("NOT_CONV", (lambda n, x: n.bn(n.other(x)), None, "other")),
    "returned": ("IS_OUTPUT", (lambda n, x: returns_both(n, x), None, "output")),
    "relu too": ("MULTI_USER", (lambda n, x: uses_both(n, x), None, "relu")),
    "wrong channels": ("CHANNEL_MISMATCH", (plain, replaced("bn", lambda b: nn.BatchNorm2d(5)), "conv")),
    "wrong axes": ("CHANNEL_MISMATCH", (plain, replaced("bn", lambda b: nn.BatchNorm1d(4)), "conv")),
    "wrong length": ("CHANNEL_MISMATCH", (plain, set_attribute("bn.running_var", np.ones(3, np.float32)), "conv")),
    "2-d norm of a linear": ("LINEAR_ND", (lambda n, x: n.bn(n.lin(x)), None, "lin")),
    "bias of another dtype": ("DTYPE_MIX", (plain, set_attribute("conv.bias", np.zeros(4)), None)),
    "integer statistics": ("DTYPE_MIX", (plain, set_attribute("bn.running_mean", np.zeros(4, np.int64)), None)),
    "variance 0, eps 0": (
        "NONFINITE_FOLD",
        (plain, lambda net: (set_array("bn.running_var", 0)(net), set_attribute("bn.eps", 0.0)(net)), None)),
    "scale beyond float32": ("NONFINITE_FOLD", (plain, replaced("bn", lambda b: huge()), None)),
    "hook on the conv": ("HOOKED", (plain, lambda n: n.conv.register_forward_hook(lambda *a: None), "conv")),
    "hook on the bn": ("HOOKED", (plain, lambda n: n.bn.register_forward_pre_hook(lambda *a: None), "bn")),
    "forward of its own": ("HOOKED", (plain, set_attribute("conv.forward", lambda net: net.conv.forward), "conv")),
    "subclass with a forward": ("HOOKED", (plain, replaced("conv", lambda c: Doubled(3, 4, 3, padding=1)), "conv")),
    "weight is a property": ("HOOKED", (plain, replaced("conv", lambda c: computed()), "conv")),
    "unused": ("BN_OUTPUT_UNUSED", (lambda n, x: (n.bn(n.conv(x)), x)[1], None, None)),
}


def returns_both(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.bn(y), y


def uses_both(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.bn(y) + F.relu(y)


def huge() -> Any:
    bn = nn.BatchNorm2d(4, dtype=np.float64)
    bn.weight[...] = 1e39
    return bn


class Doubled(nn.Conv2d):
    def forward(self, input: Any) -> Any:
        return super().forward(input) * 2


class Computed(nn.Conv2d):
    """Weight standardisation written as a property: another array at each access."""

    weight: Any = property(lambda self: self.__dict__["weight"] * 2, lambda self, value: None)


def computed() -> Any:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.__class__ = Computed
    return conv


class LeafTracer(fx.Tracer):
    """Whoever has no children is called as a whole, wherever its class is from."""

    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children())


def traced(case: Case) -> Any:
    run, change, _ = case
    net = Net(run)
    if change is not None:
        change(net)
    return fx.GraphModule(net, LeafTracer().trace(net))


def apply_both(gm: Any, **keywords: Any) -> dict[str, Any]:
    """The last BatchNorm's row of each pass."""
    text = str(gm.graph)
    folded, report = passes.fuse_conv_bn(gm)
    checked(folded, report)
    assert str(gm.graph) == text
    rows = {"fuse": report}
    rows["efficient"] = checked(gm, passes.efficient_conv_bn_eval(gm))
    return rows


@pytest.mark.parametrize("name", BOTH)
def test_reason_in_both_passes(name: str) -> None:
    reason, case = BOTH[name]
    gm = traced(case)
    before = str(gm.graph)
    for what, report in apply_both(gm).items():
        row = report[-1]
        assert (row.outcome, row.reason) == ("kept", reason), (what, row)
        assert row.blocking == case[2], (what, row)
        assert row.reason in report.explain(row.node) and (not row.blocking or row.blocking in report.explain(row.node))
    assert str(gm.graph) == before


def test_output_of_the_convolution_returned_beats_other_users() -> None:
    def run(net: Any, x: Any) -> Any:
        y = net.conv(x)
        return net.bn(y) + net.other(y), y

    for report in apply_both(traced((run, None, None))).values():
        assert [row.reason for row in report] == ["IS_OUTPUT", "IS_OUTPUT"]


def test_two_bns_on_one_conv_call() -> None:
    def run(net: Any, x: Any) -> Any:
        y = net.conv(x)
        return net.bn(y) + net.other(y)

    for report in apply_both(traced((run, None, None))).values():
        assert [(row.reason, row.blocking) for row in report] == [("MULTI_USER", "other"), ("MULTI_USER", "bn")]


def test_skip_by_name_by_target_and_by_pattern() -> None:
    gm = trace(randomise(nn.Sequential(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)), nn.Conv1d(3, 3, 1),
                                       nn.BatchNorm1d(3)), np.random.default_rng(0)))
    first, second = (n.name for n in gm.graph.nodes if n.target in ("0.1", "2"))
    for skip, wanted in [
        ((), ["OK", "OK"]), ("0.1", ["SKIPPED_BY_USER", "OK"]), ([first], ["SKIPPED_BY_USER", "OK"]),
        (["0.*"], ["SKIPPED_BY_USER", "OK"]), ({second}, ["OK", "SKIPPED_BY_USER"]), ("*", ["SKIPPED_BY_USER"] * 2),
        (["?"], ["OK", "SKIPPED_BY_USER"]), (["0", "1"], ["OK", "OK"]),
    ]:
        folded, report = passes.fuse_conv_bn(gm, skip=skip)
        checked(folded, report)
        assert [row.reason for row in report] == wanted, skip
    with pytest.raises(TypeError, match="skip"):
        passes.fuse_conv_bn(gm, skip=[1])


def test_conv_in_training_stops_folding_only() -> None:
    gm = traced((plain, set_train("conv"), None))
    assert passes.fuse_conv_bn(gm)[1][0].reason == "CONV_TRAINING"
    assert passes.efficient_conv_bn_eval(gm)[0].reason == "OK"


def test_linear_rank() -> None:
    def make(norm: str) -> Any:
        return traced((lambda n, x: getattr(n, norm)(n.lin(x)), None, None))

    gm = make("bn1d")  # not known: folding could be silently wrong, the efficient pass decides at each call
    row = passes.fuse_conv_bn(gm)[1][0]
    assert row.reason == "LINEAR_ND" and "shape_prop" in row.hint
    assert passes.efficient_conv_bn_eval(copy.deepcopy(gm))[0].run_time_rule
    for norm, shape, wanted in [
        ("bn1d", (2, 3), "OK"), ("bn1d", (2, 4, 3), "LINEAR_ND"), ("bn_one", (2, 1, 3), "OK"),
    ]:
        gm = make(norm)
        fx.shape_prop(gm, np.zeros(shape, np.float32))
        assert [r[0].reason for r in apply_both(gm).values()] == [wanted, wanted], (norm, shape)


def test_unbatched_input_is_known_from_shapes() -> None:
    """A convolution takes (C, L) too; BatchNorm1d then normalises L, which has as many entries here."""
    conv, bn = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)
    gm = trace(randomise(nn.Sequential(conv, bn), np.random.default_rng(0)))
    fx.shape_prop(gm, np.zeros((2, 4), np.float32))
    for report in apply_both(gm).values():
        assert report[0].reason == "CHANNEL_MISMATCH" and "batch axis" in report[0].hint


def graph_with_a_writer(functional: bool, written: str) -> Any:
    """By hand: tracing a module's own arrays in place would write them while tracing."""
    net, graph = Net(plain), fx.Graph()
    x = graph.placeholder("x")
    if functional:
        w, m, v = (graph.get_attr(name) for name in ("w", "mean", "scale"))
        y = graph.call_function(F.conv2d, (x, w))
    else:
        y = graph.call_module("conv", (x,))
    value = x if written == "x" else graph.get_attr(written)
    graph.call_function(operator.iadd, (value, 1.0)).name = "writer"
    out = graph.call_function(F.batch_norm, (y, m, v)) if functional else graph.call_module("bn", (y,))
    graph.output(out)
    return fx.GraphModule(net, graph)


@pytest.mark.parametrize(
    ("functional", "written", "efficient", "fold"),
    [
        # the efficient node stands before a module's convolution: only the BatchNorm's arrays are read too early
        (False, "bn.running_mean", "MUTATED_BETWEEN", "MUTATED_BETWEEN"),
        (False, "bn.weight", "MUTATED_BETWEEN", "MUTATED_BETWEEN"),
        (False, "conv.weight", "OK", "MUTATED_BETWEEN"),
        (False, "x", "OK", "OK"),
        # and before a functional BatchNorm: the convolution's arguments are read too late
        (True, "x", "MUTATED_BETWEEN", "OK"),
        (True, "w", "MUTATED_BETWEEN", "MUTATED_BETWEEN"),
        (True, "mean", "OK", "MUTATED_BETWEEN"),
    ],
)
def test_mutation_between(functional: bool, written: str, efficient: str, fold: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 5, 5)).astype(np.float32)
    gm = graph_with_a_writer(functional, written)
    plain_result = copy.deepcopy(gm)(x.copy())
    folded, report = passes.fuse_conv_bn(gm)
    assert report[0].reason == fold
    assert report[0].blocking == ("writer" if fold != "OK" else None)
    np.testing.assert_allclose(copy.deepcopy(folded)(x.copy()), plain_result, rtol=1e-4, atol=1e-4)
    report = checked(gm, passes.efficient_conv_bn_eval(gm))
    assert report[0].reason == efficient
    np.testing.assert_allclose(copy.deepcopy(gm)(x.copy()), plain_result, rtol=1e-4, atol=1e-4)


def test_weight_that_cannot_be_copied_is_shared() -> None:
    class Single(nn.Conv2d):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is one of me")

    gm = traced((plain, replaced("conv", lambda c: Single(3, 4, 3, padding=1)), None))
    text = str(gm.graph)
    _, report = passes.fuse_conv_bn(gm, inplace=True)
    assert report[0].reason == "WEIGHT_SHARED" and "one of me" in report[0].hint
    assert str(gm.graph) == text
    assert passes.efficient_conv_bn_eval(gm)[0].reason == "OK"


def test_parameters_of_the_run_cannot_be_folded() -> None:
    graph = fx.Graph()
    x, w, m = (graph.placeholder(name) for name in "xwm")
    ones = np.ones(4, np.float32)
    y = graph.call_function(F.conv2d, (x, w))
    graph.output(graph.call_function(F.batch_norm, (y, m, ones)))
    gm = fx.GraphModule({}, graph)
    report = apply_both(gm)
    assert (report["fuse"][0].reason, report["fuse"][0].blocking) == ("NONCONST_PARAM", "w")
    assert report["efficient"][0].reason == "OK"


def test_eps_of_the_run_cannot_be_folded() -> None:
    graph = fx.Graph()
    x, eps = graph.placeholder("x"), graph.placeholder("eps")
    ones = np.ones(4, np.float32)
    y = graph.call_function(F.conv2d, (x, np.ones((4, 3, 1, 1), np.float32)))
    graph.output(graph.call_function(F.batch_norm, (y, ones, ones), {"eps": eps}))
    gm = fx.GraphModule({}, graph)
    report = apply_both(gm)
    assert (report["fuse"][0].reason, report["fuse"][0].blocking) == ("NONCONST_PARAM", "eps")
    assert report["efficient"][0].reason == "OK"
    a = np.ones((1, 3, 2, 2), np.float32)
    np.testing.assert_allclose(gm(a, 3.0), np.ones((1, 4, 2, 2)), rtol=1e-6)


def test_training_of_the_run_counts_as_training() -> None:
    graph = fx.Graph()
    x, training = graph.placeholder("x"), graph.placeholder("training")
    ones = np.ones(4, np.float32)
    y = graph.call_function(F.conv2d, (x, np.ones((4, 3, 1, 1), np.float32)))
    graph.output(graph.call_function(F.batch_norm, (y, ones, ones), {"training": training}))
    for report in apply_both(fx.GraphModule({}, graph)).values():
        assert report[0].reason == "BN_TRAINING" and "run time" in report[0].hint


def test_output_size_computed_by_the_graph() -> None:
    """The efficient pass carries constants only; folding does not touch the call."""
    def make(size: Any) -> Any:
        net, graph = Net(plain), fx.Graph()
        x, n = graph.placeholder("x"), graph.placeholder("n")
        y = graph.call_module("up", (x,), {"output_size": [n, n] if size is None else size})
        graph.output(graph.call_module("bn", (y,)))
        return fx.GraphModule(net, graph)

    reports = apply_both(make(None))
    assert reports["efficient"][0].reason == "OUTPUT_SIZE_ARG" and reports["efficient"][0].blocking == "up"
    assert reports["fuse"][0].reason == "OK"
    assert apply_both(make([8, 8]))["efficient"][0].reason == "OK"


def test_bn_before_a_padded_convolution() -> None:
    """No pass folds forwards, so a row says NOT_CONV; the direct function names the code."""
    bn, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
    gm = trace(randomise(nn.Sequential(bn, conv), np.random.default_rng(0)))
    for report in apply_both(gm).values():
        assert report[0].reason == "NOT_CONV"
    with pytest.raises(pyconvbn.FoldError) as caught:
        pyconvbn.fuse_bn_conv_weights(
            bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias, conv.weight, conv.bias, padding=1
        )
    assert caught.value.reason == "PADDED_PRE_BN"


def test_unsupported_call_of_a_bn_module() -> None:
    net, graph = Net(plain), fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("conv", (x,))
    graph.output(graph.call_module("bn", (y, 1)))
    for report in apply_both(fx.GraphModule(net, graph)).values():
        assert report[0].reason == "UNSUPPORTED_BN_OP"


def test_tuple_form_whose_statistics_are_used() -> None:
    from pyconvbn.ops import aten

    graph = fx.Graph()
    x = graph.placeholder("x")
    ones = np.ones(4, np.float32)
    y = graph.call_function(aten.conv2d.default, (x, np.ones((4, 3, 1, 1), np.float32)))
    bn = graph.call_function(aten._native_batch_norm_legit_no_training.default, (y, ones, ones, ones, ones, 0.1, 1e-5))
    graph.output((graph.call_function(operator.getitem, (bn, 0)), graph.call_function(operator.getitem, (bn, 2))))
    for report in apply_both(fx.GraphModule({}, graph)).values():
        assert report[0].reason == "UNSUPPORTED_BN_OP" and report[0].form == "aten"


def test_order_the_first_reason_wins() -> None:
    """A BatchNorm with everything wrong, mended step by step, gives the codes in their order."""

    def run(net: Any, x: Any) -> Any:
        y = net.conv(x)
        return net.bn(y) + (F.relu(y) if net.again else 0)

    steps: list[tuple[str, Callable[[Any], Any]]] = [
        ("BN_TRAINING", lambda net: net.bn.eval()),
        ("NO_RUNNING_STATS", lambda net: setattr(net.bn, "running_mean", np.ones(5, np.float32))),
        ("UNSUPPORTED_BN_OP", lambda net: setattr(net.bn, "eps", 0.0)),
        ("MULTI_USER", lambda net: object.__setattr__(net, "again", False)),
        ("CONV_TRAINING", lambda net: net.conv.eval()),
        ("CHANNEL_MISMATCH", lambda net: setattr(net.bn, "running_mean", np.ones(4, np.float32))),
        ("DTYPE_MIX", lambda net: setattr(net.conv, "bias", np.zeros(4, np.float32))),
        ("NONFINITE_FOLD", lambda net: net.bn.running_var.fill(1)),
        ("HOOKED", lambda net: net.handle.remove()),
        ("OK", lambda net: None),
    ]
    net = Net(run)
    object.__setattr__(net, "again", True)
    net.bn.train()
    net.bn.running_mean, net.bn.eps, net.conv.bias = None, -1.0, np.zeros(4)
    net.bn.running_var[...] = 0
    net.conv.train()
    object.__setattr__(net, "handle", net.conv.register_forward_hook(lambda *a: None))
    seen = []
    for code, mend in steps:
        report = passes.fuse_conv_bn(trace(net), inplace=True)[1]
        seen.append(report[-1].reason)
        assert seen[-1] == code
        mend(net)
    assert [ORDER.index(code) for code in seen] == sorted(ORDER.index(code) for code in seen)
    assert passes.fuse_conv_bn(trace(net), skip="bn")[1][-1].reason == "SKIPPED_BY_USER"


# ---- the report itself -----------------------------------------------------------------------------------------------


def example() -> FoldReport:
    def run(net: Any, x: Any) -> Any:
        return net.bn(net.conv(x)), net.other(F.relu(x)), net.bn1d(net.lin(x))

    gm = traced((run, None, None))
    return passes.efficient_conv_bn_eval(gm)


def test_table_of_a_report() -> None:
    lines = str(example()).splitlines()
    assert lines[0].split() == ["BatchNorm", "convolution", "outcome", "reason", "note"]
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["bn", "conv", "fused", "OK"], ["other", "-", "kept", "NOT_CONV"], ["bn1d", "lin", "fused", "OK"]]
    columns = [line.index(word) for line, word in zip(lines, ["outcome", "fused", "kept", "fused"])]
    assert len(set(columns)) == 1
    assert lines[-1] == "3 BatchNorms: 2 fused, 1 kept"
    assert "because of relu" in lines[2] and "decided at each call" in lines[3]


def test_report_as_a_sequence_and_as_a_dict() -> None:
    report = example()
    assert len(report) == 3 and list(report) == list(report.rows) and report[0].node == "bn"
    assert not report.ok and report.counts == {"fused": 2, "kept": 1} and report.reasons == {"OK": 2, "NOT_CONV": 1}
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False and data["counts"] == report.counts
    assert FoldReport(FoldRow(**row) for row in data["rows"]) == report
    assert pickle.loads(pickle.dumps(report)) == report and copy.deepcopy(report) == report
    with pytest.raises(AttributeError):
        report[0].reason = "OK"  # type: ignore[misc]


def test_explain() -> None:
    report = example()
    assert "was fused" in report.explain("bn") and "efficient_conv_bn_eval" in report.explain("bn")
    assert "NOT_CONV" in report.explain("other") and "relu" in report.explain("other")
    assert "fallback" in report.explain("bn1d")
    with pytest.raises(KeyError, match=r"no BatchNorm 'nothing'.*bn, other, bn1d"):
        report.explain("nothing")


def test_html_is_escaped_and_has_every_row() -> None:
    row = FoldRow("<b>", None, "kept", "NOT_CONV", hint="a & b")
    text = FoldReport([row])._repr_html_()
    assert "&lt;b&gt;" in text and "a &amp; b" in text and "<b>" not in text
    assert example()._repr_html_().count("<tr") == 4


def test_empty_report() -> None:
    report = passes.efficient_conv_bn_eval(trace(nn.ReLU()))
    assert len(report) == 0 and report.ok and str(report) == "no BatchNorm in the graph"
    assert report.bytes_saved is None and report.counts == {}
