# SPDX-License-Identifier: BSD-3-Clause
"""Random networks, traced, fused by both passes, run, and compared with a float64 evaluation that shares no code."""

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
from pyconvbn import fx, passes

sys.path.insert(0, str(Path(__file__).parent))
from random_nets import RandomNet  # noqa: E402

SEEDS = range(300)


def outputs_of(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def error(actual: Any, reference: list[Any]) -> list[float]:
    got = outputs_of(actual)
    assert [g.shape for g in got] == [r.shape for r in reference]
    return [float(np.max(np.abs(np.asarray(g, np.float64) - r), initial=0)) for g, r in zip(got, reference)]


def run(net: Any, x: Any) -> Any:
    """On a copy: a BatchNorm in training writes its statistics."""
    return copy.deepcopy(net)(x)


def assert_as_good(fused: Any, plain: Any, reference: list[Any], what: str) -> None:
    """The fused result is not further from the truth than rounding explains: four times the unfused error, and
    a few roundings of the result where the unfused one happens to be exact."""
    for after, before, truth in zip(error(fused, reference), error(plain, reference), reference):
        eps = float(np.finfo(outputs_of(plain)[0].dtype).eps)
        floor = 16 * eps * float(np.max(np.abs(truth), initial=0))
        assert after <= 4 * before + floor, f"{what}: error {after:.3g}, unfused {before:.3g}, floor {floor:.3g}"


def bn_nodes(gm: Any) -> list[str]:
    modules = dict(gm.named_modules())
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and hasattr(modules[node.target], "running_mean"):
            found.append(node.name)
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "batch_norm":
            found.append(node.name)
    return found


def check(net: RandomNet, gm: Any, apply: Any, x: Any) -> None:
    before_names = bn_nodes(gm)
    reference, plain = net.reference(x), run(net, x)
    assert_as_good(run(gm, x), plain, reference, "traced")
    result, report = apply(gm)
    result.graph.lint()
    assert sorted(row.node for row in report.rows) == sorted(before_names), "one row for each BatchNorm"
    kept = [row for row in report.rows if row.outcome == "kept"]
    assert all(row.reason != "OK" for row in kept)
    assert len(report.rows) - len(kept) == net.expected_fused(chains=apply is not efficient), str(report)
    assert sorted(bn_nodes(result)) == sorted(row.node for row in kept)
    assert_as_good(run(result, x), plain, reference, str(report))
    text = str(result.graph)
    again, second = apply(result)
    assert str(again.graph) == text, "a second pass changes nothing"
    assert all(row.outcome == "kept" for row in second.rows) and len(second.rows) == len(kept)


def efficient(gm: Any) -> tuple[Any, Any]:
    return gm, passes.efficient_conv_bn_eval(gm)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("apply", [efficient, passes.fuse_conv_bn], ids=["efficient", "fuse"])
@pytest.mark.parametrize("block", range(10))
def test_random_networks(block: int, apply: Any, dtype: Any) -> None:
    for seed in SEEDS[block::10]:
        net = RandomNet(seed, dtype)
        x = net.example(np.random.default_rng(seed + 1))
        state = {k: v.copy() for k, v in net.state_dict().items()}
        try:
            check(net, fx.symbolic_trace(net), apply, x)
        except BaseException as failure:
            failure.add_note(f"RandomNet(seed={seed}, dtype={np.dtype(dtype).name})")
            raise
        for key, value in net.state_dict().items():
            assert np.array_equal(value, state[key]), f"seed {seed}: the user's {key} was changed"


@pytest.mark.parametrize("apply", [efficient, passes.fuse_conv_bn], ids=["efficient", "fuse"])
def test_aten_form(apply: Any) -> None:
    """The same networks as ATen operators: one row for each BatchNorm, the same results, nothing left to do."""
    done = 0
    for seed in SEEDS[::5]:
        net = RandomNet(seed)
        x = net.example(np.random.default_rng(seed + 1))
        gm = fx.to_aten(fx.symbolic_trace(net), [x.shape])
        names = [n.name for n in gm.graph.nodes if "batch_norm" in getattr(n.target, "__name__", "")]
        reference, plain = net.reference(x), run(net, x)
        result, report = apply(gm)
        result.graph.lint()
        assert [row.node for row in report] == names, seed
        assert_as_good(run(result, x), plain, reference, f"seed {seed}\n{report}")
        # one form for all: a function after a module is no obstacle any more
        assert len(report) - report.counts.get("kept", 0) >= net.expected_fused(chains=apply is not efficient), seed
        done += len(report) - report.counts.get("kept", 0)
        assert all(row.outcome == "kept" for row in apply(result)[1])
    assert done > 100


def insert_writers(gm: Any, rng: np.random.Generator) -> int:
    """Nodes that write what convolutions and BatchNorms read, anywhere; how many."""
    modules = dict(gm.named_modules())
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    count = 0
    for before in [nodes[int(i)] for i in rng.integers(0, len(nodes), 3)]:
        layer = nodes[int(rng.integers(len(nodes)))]
        with gm.graph.inserting_before(before):
            if rng.random() < 0.3:  # an activation: any value made before
                made = list(gm.graph.nodes)
                value = made[int(rng.integers(made.index(before)))]
                if value.op == "get_attr" or value.target is operator.setitem:  # the latter gives None
                    continue
            elif layer.op == "call_module":
                module = modules[layer.target]
                names = ("weight", "bias", "running_mean", "running_var")
                held = [name for name in names if getattr(module, name, None) is not None]
                if not held:
                    continue
                value = gm.graph.get_attr(f"{layer.target}.{rng.choice(held)}")
            else:
                read = [n for n in layer.all_input_nodes if n.op == "get_attr"]
                if not read:
                    continue
                value = gm.graph.get_attr(read[int(rng.integers(len(read)))].target)
            how = int(rng.integers(4))
            if how == 0:
                gm.graph.call_function(operator.imul, (value, 1.25))
            elif how == 1:
                gm.graph.call_function(F.relu, (gm.graph.call_function(operator.add, (value, 0.5)),), {"out": value})
            elif how == 2:
                gm.graph.call_function(operator.setitem, (value, 0, 0.75))
            else:
                gm.graph.call_method("__iadd__", (gm.graph.call_method("reshape", (value, -1)), 0.25))
            count += 1
    return count


@pytest.mark.parametrize("apply", [efficient, passes.fuse_conv_bn], ids=["efficient", "fuse"])
def test_graphs_that_write_their_parameters(apply: Any) -> None:
    """Writers anywhere; the graph as it was, run node by node, is the truth."""
    writers = done = 0
    for seed in SEEDS[::2]:
        net = RandomNet(seed)
        x = net.example(np.random.default_rng(seed + 1))
        gm = fx.symbolic_trace(net)
        rng = np.random.default_rng(seed + 2)
        writers += insert_writers(gm, rng)
        gm.graph.lint()
        names = bn_nodes(gm)
        truth = outputs_of(copy.deepcopy(gm)(x.copy()))
        result, report = apply(copy.deepcopy(gm))
        result.graph.lint()
        assert sorted(row.node for row in report) == sorted(names), seed
        for got, want in zip(outputs_of(copy.deepcopy(result)(x.copy())), truth, strict=True):
            scale = max(1.0, float(np.max(np.abs(want))))
            what = f"seed {seed}\n{report}\n{gm.graph}"
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * scale, err_msg=what)
        done += len(report) - report.counts.get("kept", 0)
    assert writers > 200 and done > 100


def test_the_verifier_agrees() -> None:
    """What both passes did to the networks is no less exact than it was, in the verifier's words too."""
    for seed in SEEDS[::10]:
        net = RandomNet(seed, np.float32)
        gm = fx.symbolic_trace(net)
        x = net.example(np.random.default_rng(seed + 1))
        for result in (passes.fuse_conv_bn(gm)[0], efficient(copy.deepcopy(gm))[0]):
            verdict = pyconvbn.verify(gm, result, (x,))
            assert verdict.ok, f"seed {seed}\n{verdict}"


def test_the_generator_makes_what_it_should() -> None:
    """Without shared, branching and training cases the test above would say little."""
    nets = [RandomNet(seed) for seed in SEEDS]
    bns = sum(len(net.bn_steps()) for net in nets)
    fused = sum(net.expected_fused(chains=False) for net in nets)
    assert bns > 1500 and 0.4 * bns < fused < 0.8 * bns
    assert any(len({s.name for s in net.steps if s.kind == "conv"}) < sum(s.kind == "conv" for s in net.steps)
               for net in nets), "no convolution module is called twice"
    assert any("." in s.name for net in nets for s in net.steps), "no nested container"
    for seed in SEEDS[:40]:  # the evaluation agrees with the eager modules
        net = nets[seed]
        x = net.example(np.random.default_rng(seed))
        for got, want in zip(outputs_of(run(net, x)), net.reference(x)):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.max(np.abs(want)))
