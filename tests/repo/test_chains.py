# SPDX-License-Identifier: BSD-3-Clause
"""The networks of the chain benchmark: shapes, buffers that are shared, results against float64. No timings asserted."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import chain_rivals  # noqa: E402
import chains  # noqa: E402
import networks  # noqa: E402

SMALL = {"resnet-50": 7, "vgg-16": 7, "mobilenet-v2": 7, "ecg-resnet": 20, "r3d-18": 7, "u-net": 7}


def test_multiply_adds_are_those_of_the_papers():
    """Published: ResNet-50 v1.5 4.1 GMAC, VGG-16 15.5, MobileNet-V2 0.30, r3d_18 40.7 (torchvision)."""
    for name, macs in (("resnet-50", 4.1e9), ("vgg-16", 15.5e9), ("mobilenet-v2", 0.30e9), ("r3d-18", 40.7e9)):
        net = networks.NETWORKS[name](1)
        assert sum(step.flops for step in net.steps) / 2 == pytest.approx(macs, rel=0.015), name


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_plans_in_shared_buffers_give_the_network(name, batch):
    """A buffer that is used again too early, or an in-place concatenation at the wrong channel, shows here."""
    net = networks.NETWORKS[name](batch, SMALL[name])
    x = np.random.default_rng(0).standard_normal(net.steps[0].shape).astype(np.float32)
    own = chain_rivals.Ours(1, "fp32", tune=False)
    call, fetch = own.prepare(net, x)
    call()  # the second run starts from dirty buffers
    call()
    y = fetch(None).astype(np.float64)
    expected = chain_rivals.own_double(net, x)
    assert y.shape == net.steps[-1].shape
    assert np.max(np.abs(y - expected)) <= 2e-5 * np.max(np.abs(expected))
    assert np.max(np.abs(expected)) > 1e-3
    assert set(own.algorithms()) == {i for i, step in enumerate(net.steps) if step.weight is not None}
    assert all(time > 0 for time in own.profile().values())


def test_buffers_are_few():
    net = networks.resnet50(1, 7)
    values = chain_rivals.Ours._place(net, np.zeros(net.steps[0].shape, np.float32))
    whole = sum(math.prod(step.shape) for step in net.steps[1:])
    roots = {}
    for i in range(1, len(net.steps)):
        array = values[i]
        while array.base is not None:
            array = array.base
        roots[id(array)] = array.nbytes
    assert sum(roots.values()) < whole * 4 / 4


def test_unknown_names_are_refused(capsys):
    assert chains.main(["--match", "alexnet", "--peers", "none"]) == 2
    assert "none of resnet-50" in capsys.readouterr().err
    assert chains.main(["--match", "resnet", "--peers", "tvm"]) == 2
    assert "unknown peer 'tvm'" in capsys.readouterr().err
