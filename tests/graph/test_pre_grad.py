# SPDX-License-Identifier: BSD-3-Clause
"""passes.pre_grad and passes.dce: the switches of the automatic pipeline, and what dead code elimination must keep."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import config, functional as F, fx, nn, passes

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import checked, trace  # noqa: E402


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    before = config.efficient_conv_bn_eval_fx_passes, config.freezing
    yield
    config.efficient_conv_bn_eval_fx_passes, config.freezing = before


def model() -> Any:
    return trace(nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval())


def test_the_switch_is_off_by_default() -> None:
    assert config.efficient_conv_bn_eval_fx_passes is False and config.freezing is False


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("freezing", [False, True])
def test_pre_grad_obeys_the_switches(enabled: bool, freezing: bool) -> None:
    config.efficient_conv_bn_eval_fx_passes, config.freezing = enabled, freezing
    gm, counter = model(), pyconvbn.counters["efficient_conv_bn_eval"]
    text = str(gm.graph)
    report = checked(gm, passes.pre_grad(gm))
    assert len(report) == 2
    if enabled and not freezing:
        assert report.counts == {"fused": 1, "kept": 1} and report[1].reason == "NOT_CONV"
        assert pyconvbn.counters["efficient_conv_bn_eval"] == counter + 1
    else:
        assert report.reasons == {"SKIPPED_BY_USER": 2} and str(gm.graph) == text
        assert ("freezing" if enabled else "fx_passes") in report[0].hint
        assert pyconvbn.counters["efficient_conv_bn_eval"] == counter


@pytest.mark.parametrize("freezing", [False, True])
def test_the_pass_itself_always_runs(freezing: bool) -> None:
    config.freezing = freezing
    assert passes.efficient_conv_bn_eval(model()).counts["fused"] == 1


def test_all_passes_are_in_the_table() -> None:
    assert {"efficient_conv_bn_eval", "fuse_conv_bn", "dce", "pre_grad", "prepare_layers"} < set(passes.PASSES)
    assert set(passes.PASSES) == set(passes.__all__) - {"PASSES", "ParamMetadata"}
    assert all(passes.PASSES[name] is getattr(passes, name) for name in passes.PASSES)
    assert all(f"| `{name}(gm" in str(passes.__doc__) for name in passes.PASSES)


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.Dropout()
        self.register_buffer("m", np.zeros(2, np.float32))
        self.register_buffer("v", np.ones(2, np.float32))

    def forward(self, x: Any) -> Any:
        self.bn(self.conv(x))
        F.batch_norm(x, self.m, self.v, training=True)
        F.relu(F.relu(x))
        return x + 1


def names(gm: Any) -> list[str]:
    return [n.name for n in gm.graph.nodes]


def test_dce_removes_chains_and_says_so() -> None:
    gm = trace(Dead().eval())
    assert passes.dce(gm) is True
    gm.graph.lint()
    # batch_norm in training writes its statistics
    assert names(gm) == ["x", "m", "v", "batch_norm", "add", "output"]
    assert passes.dce(gm) is False


def test_dce_keeps_a_bn_module_in_training_and_what_it_needs() -> None:
    net = Dead().eval()
    net.bn.train()
    gm = trace(net)
    assert passes.dce(gm)
    assert names(gm) == ["x", "conv", "bn", "m", "v", "batch_norm", "add", "output"]


def test_dce_finds_the_dead_batchnorm_that_a_pass_reported() -> None:
    class Unused(nn.Sequential):
        def forward(self, x: Any) -> Any:
            self[1](self[0](x))
            return x

    gm = trace(Unused(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)).eval())
    assert passes.efficient_conv_bn_eval(gm)[0].reason == "BN_OUTPUT_UNUSED"
    assert passes.dce(gm) and names(gm) == ["x", "output"]
    assert len(passes.efficient_conv_bn_eval(gm)) == 0


def test_dce_failure_leaves_the_graph_as_it_was() -> None:
    class Hostile(nn.BatchNorm1d):
        training: Any = property(lambda self: 1 / 0, lambda self, value: None)

    gm = trace(Dead().eval())
    relu = next(n for n in gm.graph.nodes if n.target == "bn")
    assert not relu.users
    gm.bn.__class__ = Hostile
    text = str(gm.graph)
    with pytest.raises(ZeroDivisionError):
        passes.dce(gm)
    assert str(gm.graph) == text
    gm.graph.lint()
