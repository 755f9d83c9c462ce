# SPDX-License-Identifier: BSD-3-Clause
"""passes.efficient_conv_bn_eval: the matrix of kinds and forms, what is inserted where, that nothing else changes."""

from __future__ import annotations

import copy
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
matrix = [
    pytest.mark.parametrize("sync", [False, True], ids=["bn", "sync_bn"]),
    pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"]),
    pytest.mark.parametrize("form", FORMS),
    pytest.mark.parametrize("kind", KINDS),
]


def over_matrix(test: Any) -> Any:
    for mark in matrix:
        test = mark(test)
    return test


def fused(gm: Any) -> int:
    """Runs the pass, checks the graph and the counter, and says how many it fused."""
    before = pyconvbn.counters["efficient_conv_bn_eval"]
    count: int = checked(gm, passes.efficient_conv_bn_eval(gm)).counts.get("fused", 0)
    assert pyconvbn.counters["efficient_conv_bn_eval"] == before + count
    return count


@over_matrix
def test_one_pair(kind: str, form: str, bias: bool, sync: bool, rng: np.random.Generator) -> None:
    model, x = Pair(kind, rng, form=form, bias=bias, sync=sync), sample(kind, rng)
    gm = trace(model)
    assert fused(gm) == 1
    testing.assert_matches_reference(gm(x), x, model.conv1, model.bn1)
    assert fused(gm) == 0
    # the parameters are read at each call
    first = gm(x)
    model.conv1.weight[...] *= -1.5
    model.bn1.running_var[...] += 3.0
    model.bn1.bias[...] -= 1.0
    assert np.abs(gm(x) - first).max() > 0.1
    testing.assert_matches_reference(gm(x), x, model.conv1, model.bn1)


@over_matrix
def test_three_pairs_with_several_users(kind: str, form: str, bias: bool, sync: bool, rng: np.random.Generator) -> None:
    model, x = Multi(kind, rng, form=form, bias=bias, sync=sync), sample(kind, rng, np.float64)
    gm = trace(model)
    report = checked(gm, passes.efficient_conv_bn_eval(gm))
    assert report.counts == {"fused": 3, "kept": 1}  # bn3(bn3(...)) has no convolution before it
    assert report.reasons == {"OK": 3, "NOT_CONV": 1}
    close(gm(x), model.reference(x))
    text = str(gm.graph)
    assert fused(gm) == 0 and str(gm.graph) == text
    model.conv2.weight[...] += 0.5
    model.bn3.running_mean[...] *= -2.0
    close(gm(x), model.reference(x))


def test_upstreams_multi_user_graph(rng: np.random.Generator) -> None:
    """As written in the contract: bn3 applied to the input has no convolution before it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in "123":
                setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=1))
                setattr(self, f"bn{i}", nn.BatchNorm2d(3))

        def forward(self, x: Any) -> Any:
            a = self.bn1(self.conv1(input=x))
            b = self.bn2(input=self.conv2(self.conv2(x)))
            c = self.bn3(self.conv3(input=x))
            return a + b + c + (self.bn3(x) + x)

    gm = trace(randomise(Model(), rng))
    assert fused(gm) == 3 and fused(gm) == 0


def test_what_is_inserted_for_modules() -> None:
    """Two get_attr nodes and the call before the convolution, whatever stands between it and the BatchNorm."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))

        def forward(self, x: Any) -> Any:
            y = self.block[0](x)
            z = F.relu(x)
            return self.block[1](input=y), z

    gm = trace(Model().eval())
    bn = next(n for n in gm.graph.nodes if n.target == "block.1")
    bn.meta["mark"] = "of the BatchNorm"
    bn.type = int
    assert fused(gm) == 1
    assert [(n.op, n.name, str(n.target), str(n.args)) for n in gm.graph.nodes][1:-1] == [
        ("get_attr", "get_conv", "block.0", "()"),
        ("get_attr", "get_bn", "block.1", "()"),
        ("call_function", "efficient_conv_bn_eval", str(next(iter(gm.graph.find_nodes(op="call_function"))).target),
         "(get_bn, get_conv, x)"),
        ("call_function", "relu", str(F.relu), "(x,)"),
    ]
    new = next(iter(gm.graph.find_nodes(op="call_function")))
    assert new.target.__name__.endswith("efficient_conv_bn_eval")
    assert new.meta["mark"] == "of the BatchNorm" and new.type is int
    assert [n.name for n in new.users] == ["output"]


def test_what_is_inserted_for_functions() -> None:
    """The call stands before the BatchNorm and has every argument by the schema, given by keyword or left out."""
    graph = fx.Graph()
    x, w, m, v = (graph.placeholder(name) for name in "xwmv")
    conv = graph.call_function(F.conv2d, (), {"weight": w, "input": x, "groups": 2, "padding": "same"})
    relu = graph.call_function(F.relu, (x,))
    bn = graph.call_function(F.batch_norm, (conv,), {"running_var": v, "running_mean": m, "eps": 0.5})
    graph.output((relu, bn))
    gm = fx.GraphModule({}, graph)
    assert fused(gm) == 1
    new = list(gm.graph.nodes)[-2]
    assert [n.name for n in gm.graph.nodes] == ["x", "w", "m", "v", "relu", "efficient_conv_bn_eval", "output"]
    assert new.args == (None, None, m, v, 0.5, F.conv2d, w, None, x, (1, "same", 1, 2))
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(1, 4, 5, 5)), rng.normal(size=(6, 2, 3, 3))
    mean, var = rng.normal(size=6), rng.uniform(1, 2, 6)
    raw = testing.reference_conv(a, b, None, padding="same", groups=2)
    close(gm(a, b, mean, var)[1], testing.reference_batch_norm(raw, mean, var, eps=0.5))


def test_insertion_point_survives() -> None:
    gm = trace(nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)).eval())
    bn = next(n for n in gm.graph.nodes if n.target == "1")
    gm.graph.inserting_before(bn)
    assert fused(gm) == 1
    new = gm.graph.call_function(F.relu, (next(iter(gm.graph.nodes)),))
    assert [n.op for n in gm.graph.nodes][-2:] == ["call_function", "output"] and new.next.op == "output"


def test_output_size_is_carried(rng: np.random.Generator) -> None:
    class Model(nn.Module):
        def __init__(self, by_keyword: bool) -> None:
            super().__init__()
            self.by_keyword = by_keyword
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, dtype=np.float64)
            self.bn = nn.BatchNorm2d(3, dtype=np.float64)

        def forward(self, x: Any) -> Any:
            return self.bn(self.up(x, output_size=(10, 9)) if self.by_keyword else self.up(x, [10, 9]))

    for by_keyword in (True, False):
        model = randomise(Model(by_keyword), rng)
        x = rng.normal(size=(2, 2, 4, 4))
        gm = trace(model)
        assert fused(gm) == 1
        close(gm(x), testing.reference_conv_bn(x, model.up, model.bn, output_size=(10, 9)))
        assert gm(x).shape == (2, 3, 10, 9)


@pytest.mark.parametrize("nested", [False, True])
def test_dotted_targets(nested: bool, rng: np.random.Generator) -> None:
    inner = nn.Sequential(nn.Conv1d(2, 3, 1, dtype=np.float64), nn.BatchNorm1d(3, dtype=np.float64))
    model = randomise(nn.Sequential(nn.Sequential(inner)) if nested else nn.Sequential(inner), rng)
    gm = trace(model)
    assert fused(gm) == 1
    x = rng.normal(size=(2, 2, 5))
    close(gm(x), testing.reference_conv_bn(x, inner[0], inner[1]))


def test_a_module_called_twice_is_no_obstacle(rng: np.random.Generator) -> None:
    """Weights are not touched, only this call: once before a BatchNorm, once on its own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(2, 2, 1, dtype=np.float64), nn.BatchNorm1d(2, dtype=np.float64)

        def forward(self, x: Any) -> Any:
            return self.bn(self.conv(x)) + self.conv(x), self.bn(self.conv(x + 1))

    model = randomise(Model(), rng)
    gm = trace(model)
    assert fused(gm) == 2
    x = rng.normal(size=(2, 2, 5))
    pair = lambda v: testing.reference_conv_bn(v, model.conv, model.bn)  # noqa: E731
    close(gm(x)[0], pair(x) + testing.reference_conv_bn(x, model.conv))
    close(gm(x)[1], pair(x + 1))


def test_tuple_forms_of_aten(rng: np.random.Generator) -> None:
    from operator import getitem

    from pyconvbn.ops import aten

    graph = fx.Graph()
    x, w, g, m, v = (graph.placeholder(name) for name in "xwgmv")
    conv = graph.call_function(aten.convolution.default, (x, w, None, [2], [1], [1], False, [0], 1))
    bn = graph.call_function(aten._native_batch_norm_legit_no_training.default, (conv, g, None, m, v, 0.1, 0.25))
    y = graph.call_function(getitem, (bn, 0))
    graph.call_function(getitem, (bn, 1))  # dead
    graph.output(y)
    gm = fx.GraphModule({}, graph)
    report = checked(gm, passes.efficient_conv_bn_eval(gm))
    assert [(row.form, row.outcome) for row in report] == [("aten", "fused")]
    assert len(gm.graph.nodes) == 7
    a, b, gamma, mean, var = rng.normal(size=(2, 3, 7)), rng.normal(size=(4, 3, 3)), *rng.uniform(1, 2, (3, 4))
    raw = testing.reference_conv(a, b, None, stride=2, padding=1)
    close(gm(a, b, gamma, mean, var), testing.reference_batch_norm(raw, mean, var, gamma, eps=0.25))


def test_linear_of_unknown_rank_is_decided_at_each_call(rng: np.random.Generator) -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 4, dtype=np.float64), nn.BatchNorm1d(4, dtype=np.float64)), rng)
    gm = trace(model)
    (row,) = checked(gm, passes.efficient_conv_bn_eval(gm))
    assert row.outcome == "fused" and row.run_time_rule
    name = "efficient_conv_bn_eval_fallback"
    before = pyconvbn.counters[name]
    x = rng.normal(size=(5, 3))
    close(gm(x), testing.reference_conv_bn(x, model[0], model[1]))
    assert pyconvbn.counters[name] == before
    x = rng.normal(size=(2, 4, 3))  # 4 rows: BatchNorm takes axis 1 for the channels, though the features are 4 too
    close(gm(x), testing.reference_module(model[1], testing.reference_conv_bn(x, model[0])))
    assert pyconvbn.counters[name] == before + 1


def test_float32_network_keeps_its_dtype(rng: np.random.Generator) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, dtype=np.float64)), rng)
    gm = trace(model)
    assert fused(gm) == 1
    x = rng.normal(size=(1, 3, 5, 5)).astype(np.float32)
    assert gm(x).dtype == np.float32
    testing.assert_matches_reference(gm(x), x, model[0], model[1])


def test_the_user_module_is_not_touched(rng: np.random.Generator) -> None:
    model = Pair("conv2d", rng)
    state = {k: v.copy() for k, v in model.state_dict().items()}
    gm = trace(model)
    fused(gm)
    assert all(np.array_equal(v, state[k]) for k, v in model.state_dict().items())
    assert gm.conv1 is model.conv1 and gm.bn1 is model.bn1


def test_deepcopy_and_second_module_of_a_fused_graph(rng: np.random.Generator) -> None:
    model, x = Pair("conv2d", rng, dtype=np.float64), sample("conv2d", rng, np.float64)
    gm = trace(model)
    fused(gm)
    twin = copy.deepcopy(gm)
    model.conv1.weight[...] = 0
    testing.assert_matches_reference(twin(x), x, twin.conv1, twin.bn1)


def test_report_knows_bytes_after_shape_propagation() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    assert passes.efficient_conv_bn_eval(copy.deepcopy(gm)).bytes_saved is None
    fx.shape_prop(gm, np.zeros((2, 3, 10, 10), np.float32))
    report = passes.efficient_conv_bn_eval(gm)
    assert report.bytes_saved == 2 * 4 * 2 * 8 * 8 * 8 and report.flops_saved == 2 * 2 * 8 * 8 * 8
    new = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert new.meta["tensor_meta"].shape == (2, 8, 8, 8)


@pytest.mark.parametrize("bad", [None, 1, nn.Conv2d(1, 1, 1), fx.Graph()], ids=lambda v: type(v).__name__)
def test_type_errors_name_the_argument(bad: Any) -> None:
    for run in passes.PASSES.values():
        with pytest.raises(TypeError, match=r"^gm: expected a GraphModule"):
            run(bad)


def test_untraced_module_says_to_trace_first() -> None:
    with pytest.raises(TypeError, match="symbolic_trace"):
        passes.efficient_conv_bn_eval(nn.Conv2d(1, 1, 1))


def test_failure_leaves_the_graph_as_it_was() -> None:
    """Every allocation of the pass fails once; the graph is the same each time, and the last try succeeds."""
    from pyconvbn import _core

    gm = trace(nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)).eval())
    text, failures = str(gm.graph), 0
    while True:
        _core._testing.alloc_fail_after(failures)
        try:
            report = passes.efficient_conv_bn_eval(gm)
        except MemoryError:
            failures += 1
            _core._testing.alloc_fail_after(-1)
            assert str(gm.graph) == text and failures < 500
            gm.graph.lint()
            continue
        finally:
            _core._testing.alloc_fail_after(-1)
        break
    assert failures > 3 and report.counts == {"fused": 2}


def test_host_code_that_raises_leaves_the_graph_as_it_was() -> None:
    class Hostile(nn.BatchNorm1d):
        @property
        def eps(self) -> float:
            raise KeyboardInterrupt

        @eps.setter
        def eps(self, value: float) -> None:
            pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.b1 = nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)
            self.c2, self.b2 = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)

        def forward(self, x: Any) -> Any:
            return self.b2(self.c2(self.b1(self.c1(x))))

    gm = trace(Model().eval())
    gm.b2.__class__ = Hostile
    text = str(gm.graph)
    with pytest.raises(KeyboardInterrupt):
        passes.efficient_conv_bn_eval(gm)
    assert str(gm.graph) == text
    gm.graph.lint()
    gm.b2.__class__ = nn.BatchNorm1d
    gm.b2.eps = 1e-5
    assert fused(gm) == 2


def test_host_code_that_changes_the_graph_is_refused() -> None:
    class Meddler(nn.BatchNorm1d):
        graph: Any = None

        @property
        def eps(self) -> float:
            if Meddler.graph is not None:
                graph, Meddler.graph = Meddler.graph, None
                for node in reversed(list(graph.nodes)):
                    graph.erase_node(node)
            return 1e-5

        @eps.setter
        def eps(self, value: float) -> None:
            pass

    gm = trace(nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)).eval())
    getattr(gm, "1").__class__ = Meddler
    text, Meddler.graph = str(gm.graph), gm.graph
    with pytest.raises(RuntimeError):
        passes.efficient_conv_bn_eval(gm)
    assert str(gm.graph) == text
