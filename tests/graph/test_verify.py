# SPDX-License-Identifier: BSD-3-Clause
"""`verify` lets right folds pass, whatever their rounding, and finds and names every wrong one."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import Plan, functional, fx, nn, verify

sys.path.insert(0, str(Path(__file__).parent))
from verify_util import Net, fold, gain, randomise, replaced  # noqa: E402


@pytest.fixture
def net(rng):
    return randomise(Net(), rng)


@pytest.fixture
def gm(net):
    return fx.symbolic_trace(net)


# -- right folds pass ----------------------------------------------------------------------------


def test_the_same_network_has_ratio_one(net):
    report = verify(net, net)
    assert report and report.ok and report.ratio == 1.0 and report.parted is None
    assert report.outputs[0].max_abs == report.outputs[0].max_abs_before > 0


@pytest.mark.parametrize("number", range(12))
def test_right_folds_pass_also_for_one_image(number):
    rng = np.random.default_rng(number)
    gm = fx.symbolic_trace(randomise(Net(), rng))
    image = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    for report in (verify(gm, fold(gm), image), verify(gm, fold(gm), seed=number)):
        assert report.ok, str(report)
        assert 0 < report.outputs[0].max_abs < 1e-4
        assert report.outputs[0].argmax_agreement == 1.0


def test_allclose_would_cry_wolf(net):
    """Large gamma/sigma: the outputs differ by far more than 1e-5, as both do from float64."""
    net.b3.running_var[:] = 1e-4
    net.b3.weight[:] *= 100
    gm = fx.symbolic_trace(net)
    report = verify(gm, fold(gm))
    assert report.ok, str(report)
    assert report.outputs[0].max_abs > 1e-4 and report.outputs[0].max_abs_before > 1e-4


def test_the_passes_verify(net, gm):
    folded, _ = pyconvbn.passes.fuse_conv_bn(gm)
    assert verify(net, folded).raise_if_failed().ok
    pyconvbn.passes.efficient_conv_bn_eval(gm)
    assert verify(net, gm).raise_if_failed().ok


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions(dtype, rng):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, dtype=dtype), nn.BatchNorm2d(8, dtype=dtype), nn.ReLU())
    gm = fx.symbolic_trace(randomise(net, rng))
    report = verify(gm, fold(gm))
    assert report.ok, str(report)
    eps = float(np.finfo(dtype).eps)
    assert 0.1 * eps < report.outputs[0].max_rel < 100 * eps


def test_float64_fold_through_float32_is_found(rng):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, dtype=np.float64), nn.BatchNorm2d(8, dtype=np.float64))
    gm = fx.symbolic_trace(randomise(net, rng))

    def rounded(conv, bn, folded):
        folded.weight[:] = folded.weight.astype(np.float32)
        return folded

    report = verify(gm, fold(gm, "0", rounded))
    assert not report.ok and report.outputs[0].max_rel < 1e-6


def test_a_prepared_operator_can_be_verified(rng):
    pair = randomise(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)), rng)
    plan = Plan.from_modules(pair[0], pair[1])
    x = rng.normal(size=(2, 4, 9, 9)).astype(np.float32)
    assert verify(pair, plan, x).ok
    assert verify(lambda x: pair[1](pair[0](x)), plan, x).ok
    assert not verify(pair, Plan.from_modules(pair[0]), x)


# -- wrong folds are found and named -------------------------------------------------------------


def unscaled_bias(conv, bn, folded):
    return replaced(folded, bias=conv.bias - bn.running_mean * gain(bn) + bn.bias)


def lost_bias(conv, bn, folded):
    return replaced(folded, bias=-bn.running_mean * gain(bn) + bn.bias)


def lost_shift(conv, bn, folded):
    return replaced(folded, bias=conv.bias * gain(bn))


def wrong_axis(conv, bn, folded):
    # What works for a convolution (and, on axis 1, for an ungrouped transposed one) only.
    other = 0 if conv.transposed else 1
    scale = gain(bn)[: conv.weight.shape[other]]
    return replaced(folded, weight=conv.weight * np.expand_dims(scale, [a for a in range(4) if a != other]))


def naive_group(conv, bn, folded):
    """The mistake of most libraries: axis 1 of a grouped transposed weight takes the first gammas."""
    scale = gain(bn)[: conv.weight.shape[1]]
    return replaced(folded, weight=conv.weight * scale[:, None, None])


def swapped(conv, bn, folded):
    other = copy.deepcopy(bn)
    other.weight, other.bias = bn.bias, bn.weight
    return pyconvbn.fuse_conv_bn_eval(conv, other)


def forgotten(conv, bn, folded):
    return copy.deepcopy(conv)


def twice(conv, bn, folded):
    return pyconvbn.fuse_conv_bn_eval(folded, bn)


def wrong_eps(conv, bn, folded):
    other = copy.deepcopy(bn)
    other.eps = 1e-3
    return pyconvbn.fuse_conv_bn_eval(conv, other)


def stale_weights(conv, bn, folded):
    older = copy.deepcopy(conv)
    older.weight[:] += 0.01 * np.random.default_rng(0).normal(size=older.weight.shape)
    return pyconvbn.fuse_conv_bn_eval(older, bn)


def stale_variance(conv, bn, folded):
    older = copy.deepcopy(bn)
    older.running_var[:] *= 1.01
    return pyconvbn.fuse_conv_bn_eval(conv, older)


FAULTS = [
    (unscaled_bias, "c1", "bias is not scaled by gamma/sigma"), (unscaled_bias, "up", "bias is not scaled"),
    (lost_bias, "c3", "bias is lost"), (lost_shift, "c1", "shift of the BatchNorm is lost"),
    (wrong_axis, "c3", "wrong axis"), (wrong_axis, "up", "wrong axis"), (naive_group, "up", "wrong axis"),
    (swapped, "c1", "gamma and beta are swapped"), (swapped, "up", "gamma and beta are swapped"),
    (forgotten, "c3", "not applied"), (twice, "c1", "applied twice"), (wrong_eps, "up", "eps is 1e-3"),
    (stale_weights, "c1", "stale"), (stale_weights, "up", "stale"),
    (stale_variance, "c3", "something else than the present gamma/sigma"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "layer", "cause"), FAULTS, ids=[f"{f[0].__name__}-{f[1]}" for f in FAULTS])
def test_fault_is_caught_and_named(gm, fault, layer, cause):
    report = verify(gm, fold(gm, layer, fault))
    assert not report.ok and not report and report.ratio > 100
    parted = report.parted
    assert parted.node == layer and parted.pair == (layer, {"c1": "b1", "up": "b2", "c3": "b3"}[layer])
    assert parted.stands_for == parted.pair[1]
    assert cause in parted.cause
    assert layer in str(report) and cause in str(report)
    with pytest.raises(AssertionError, match="FAILED"):
        report.raise_if_failed()


def test_the_first_of_two_faults_is_named(gm):
    once = fold(gm, "up", swapped)
    assert verify(gm, once).parted.node == "up"
    once.c1.bias[:] += 1
    assert verify(gm, once).parted.node == "c1"


def test_a_fault_in_one_channel_is_found(gm):
    def one(conv, bn, folded):
        folded.bias[5] *= 1.0001
        return folded

    report = verify(gm, fold(gm, "c3", one))
    assert not report.ok and report.parted.node == "c3"


def test_border_of_a_batch_norm_before_a_padded_convolution(rng):
    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.bn(x))

    net = randomise(Before(), rng)
    gm = fx.symbolic_trace(net)
    wrong = copy.deepcopy(gm)
    bn, conv = net.bn, net.conv
    w, b = pyconvbn.fuse_bn_conv_weights(
        bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias, conv.weight, conv.bias
    )  # padding is not told
    replaced(wrong.conv, weight=w, bias=b)
    for node in list(wrong.graph.nodes):
        if node.name == "bn":
            node.replace_all_uses_with(node.args[0])
            wrong.graph.erase_node(node)
    report = verify(gm, wrong)
    assert not report.ok
    assert report.parted.node == "conv" and report.parted.pair == ("conv", "bn")
    assert "only the border" in report.parted.cause


def functional_net(rng):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(rng.normal(size=(4, 3, 3, 3)).astype(np.float32))  # transposed, 2 groups
            self.bias = nn.Parameter(rng.normal(size=6).astype(np.float32))
            for name in ("gamma", "beta", "mean"):
                setattr(self, name, nn.Parameter(rng.normal(size=6).astype(np.float32)))
            self.var = nn.Parameter(rng.uniform(0.1, 3, 6).astype(np.float32))

        def forward(self, x):
            y = functional.conv_transpose2d(x, self.weight, bias=self.bias, stride=2, groups=2)
            y = functional.batch_norm(y, self.mean, self.var, bias=self.beta, weight=self.gamma, eps=1e-4)
            return functional.relu(y)

    return Functional()


@pytest.mark.parametrize(("array", "cause"), [("weight", "wrong axis"), ("bias", "bias is not scaled")])
@pytest.mark.parametrize("form", ["functional", "aten"])
def test_faults_of_functional_graphs_are_named_too(array, cause, form, rng):
    net = functional_net(rng)
    gm = fx.symbolic_trace(net)
    gm = fx.to_aten(gm) if form == "aten" else gm
    folded, report = pyconvbn.passes.fuse_conv_bn(gm)
    assert report.counts == {"folded": 1} and verify(gm, folded)
    conv = next(node for node in folded.graph.nodes if node.name == report.rows[0].new_node)
    targets = [node.target for node in folded.graph.nodes if node.op == "get_attr" and conv in node.users]
    scale = net.gamma / np.sqrt(net.var + 1e-4)
    wrong = net.weight * scale[:3, None, None] if array == "weight" else net.bias - net.mean * scale + net.beta
    replaced(folded, **{targets[0 if array == "weight" else 1]: wrong})
    parted = verify(gm, folded).parted
    assert parted.node == report.rows[0].new_node and cause in parted.cause
    assert parted.pair == (report.rows[0].conv, report.rows[0].node)


def test_changing_weights_later_is_found(net, gm):
    folded = fold(gm)
    assert verify(net, folded).ok
    net.c1.weight[0] *= 1.001
    report = verify(net, folded)
    assert not report.ok and report.parted.node == "c1"
    # The efficient form reads them at each call.
    fused = fx.symbolic_trace(net)
    pyconvbn.passes.efficient_conv_bn_eval(fused)
    net.c1.weight[0] *= 1.001
    assert verify(net, fused).ok


def test_less_precise_is_found(gm):
    def half(conv, bn, folded):
        folded.weight[:] = folded.weight.astype(np.float16)
        return folded

    report = verify(gm, fold(gm, "c1", half))
    assert not report.ok and report.outputs[0].max_rel < 1e-2


def test_functions_without_a_graph_fail_without_a_place(net):
    class Opaque:
        def __call__(self, x):
            return net(x) * np.float32(1.001)

    report = verify(net, Opaque(), np.ones((1, 3, 8, 8), np.float32))
    assert not report.ok and report.parted is None


# -- not finite ----------------------------------------------------------------------------------


def test_nan_and_infinity_must_stay_where_they_are():
    x = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)

    def poison(channel, value):
        def run(x):
            y = x * np.float32(2)
            y[0, channel] = value
            return y

        return run

    assert verify(poison(1, np.nan), poison(1, np.nan), x).ok
    for other in (poison(2, np.nan), poison(1, np.inf), poison(1, 0.0)):
        report = verify(poison(1, np.nan), other, x)
        assert not report.ok and any("not finite" in text for text in report.outputs[0].failures)
    assert report.outputs[0].census_before["nan"] == 5
    assert verify(poison(1, np.inf), poison(1, np.inf), x).ok
    assert not verify(poison(1, np.inf), poison(1, -np.inf), x).ok


def test_all_nan_is_no_proof_of_anything_but_equal():
    x = np.ones((2, 3), np.float32)
    assert verify(lambda x: x * np.float32(np.nan), lambda x: x * np.float32(np.nan), x).ok
    assert not verify(lambda x: x, lambda x: x * np.float32(np.nan), x).ok
