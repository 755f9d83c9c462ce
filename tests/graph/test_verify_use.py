# SPDX-License-Identifier: BSD-3-Clause
"""`verify` as it is used: every structure of outputs, made-up inputs, errors, the report; the user's modules stay."""

from __future__ import annotations

import collections
import copy
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import Plan, fx, nn, verify

sys.path.insert(0, str(Path(__file__).parent))
from verify_util import Net, fold, gain, randomise  # noqa: E402

Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture
def net(rng):
    return randomise(Net(), rng)


@pytest.fixture
def gm(net):
    return fx.symbolic_trace(net)


def swapped(conv, bn, folded):
    other = copy.deepcopy(bn)
    other.weight, other.bias = bn.bias, bn.weight
    return pyconvbn.fuse_conv_bn_eval(conv, other)


# -- outputs of every structure ------------------------------------------------------------------


def test_structures():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def before(x):
        return {"a": x * np.float32(0.1), "b": [x + 1, Pair(x.argmax(), "text")], "n": None}

    report = verify(before, before, x)
    assert report.ok and [o.path for o in report.outputs] == ["output['a']", "output['b'][0]"]
    wrong = verify(before, lambda x: {**before(x), "n": 3}, x)
    assert not wrong.ok and wrong.failures == ["output['n']: NoneType before and int after differ"]
    wrong = verify(before, lambda x: {"a": x * np.float32(0.1), "b": [x + 1], "n": None}, x)
    assert not wrong.ok and wrong.failures[0].startswith("structure: ")
    wrong = verify(before, lambda x: {**before(x), "b": [x + 1, Pair(x.argmin(), "text")]}, x)
    assert not wrong.ok and "output['b'][1].first" in wrong.failures[0]


def test_shape_and_dtype_must_stay():
    x = np.ones((2, 3, 4), np.float32)
    report = verify(lambda x: x * 2, lambda x: (x * 2)[:, :, :2], x)
    assert not report.ok and "shape: (2, 3, 4) before, (2, 3, 2) after" in str(report)
    report = verify(lambda x: x * np.float32(2), lambda x: (x * 2).astype(np.float64), x)
    assert not report.ok and "dtype: float32 before, float64 after" in str(report)


def test_empty_and_scalar_outputs():
    x = np.zeros((0, 3), np.float32)
    assert verify(lambda x: x, lambda x: x, x).ok
    assert verify(lambda x: x.sum(), lambda x: x.sum(), np.ones((3, 3), np.float32)).ok
    assert not verify(lambda x: x.sum(), lambda x: x.sum() * 2, np.ones((3, 3), np.float32)).ok


def test_a_channel_of_zeros_is_fine():
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    report = verify(lambda x: np.maximum(x - 100, 0), lambda x: np.maximum(x - 100, 0), x)
    assert report.ok and report.ratio == 1.0


# -- nothing of the user's changes ---------------------------------------------------------------

TRAINING = nn.BatchNorm1d(3)


def _with_global(x):
    return (lambda y: TRAINING(y))(x)


def test_running_statistics_stay(net):
    net.train()
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    inputs = x.copy()
    state = {key: value.copy() for key, value in net.state_dict().items()}

    class Holder:
        def __init__(self):
            self.inner = [net]

        def run(self, x, scale=1):
            return self.inner[0](x)

    def default(x, model=net):
        return model(x)

    forms = [net, lambda x: net(x), functools.partial(lambda m, x: m(x), net), Holder().run, default]
    for form in [*forms, fx.symbolic_trace(net)]:
        assert verify(form, form, x).ok
        for key, value in net.state_dict().items():
            assert np.array_equal(value, state[key]), key
    assert np.array_equal(x, inputs)
    mean = TRAINING.running_mean.copy()
    assert verify(_with_global, _with_global, x[:, :, 0]).ok
    assert np.array_equal(TRAINING.running_mean, mean)


def test_shared_arrays_stay_shared_in_the_copies(rng):
    conv = nn.Conv1d(3, 3, 1)
    other = nn.Conv1d(3, 3, 1)
    other.weight = conv.weight
    net = nn.Sequential(conv, other, nn.BatchNorm1d(3)).eval()

    def run(x):
        net[0].weight[:] = net[0].weight * 2  # seen by both layers, in each copy
        return net(x)

    before = conv.weight.copy()
    assert verify(run, run, rng.normal(size=(2, 3, 4)).astype(np.float32)).ok
    assert np.array_equal(conv.weight, before)


# -- made-up inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.Conv1d(6, 4, 3, groups=2), nn.BatchNorm1d(4)), "[4, 6, 32]"),
        ((nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), "[4, 2, 32, 32, 32]"),
        ((nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), "[4, 4, 32, 32]"),
        ((nn.Linear(7, 5), nn.BatchNorm1d(5)), "[4, 7]"),
        ((nn.ReLU(), nn.Conv2d(3, 4, 3)), "[4, 3, 32, 32]"),
        ((nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2)), "[4, 3, 16, 16]"),
    ],
)  # fmt: skip
def test_inputs_are_made_up_from_the_first_layer(layers, shape, rng):
    net = randomise(nn.Sequential(*layers), rng)
    report = verify(net, net)
    assert report.ok and shape in report.inputs and "made up" in report.inputs


def test_inputs_are_made_up_from_shape_propagation(net):
    gm = fx.symbolic_trace(net)
    fx.shape_prop(gm, (3, 3, 12, 10))
    assert "float32 [3, 3, 12, 10]" in verify(gm, fold(gm)).inputs


def test_the_seed_decides_the_inputs(gm):
    first, again, other = (verify(gm, fold(gm), seed=seed).outputs[0].max_abs for seed in (1, 1, 2))
    assert first == again != other


def test_inputs_that_cannot_be_made_up():
    with pytest.raises(ValueError, match="^inputs: .*pass inputs=$"):
        verify(nn.Sequential(nn.ReLU()), nn.ReLU())
    with pytest.raises(ValueError, match="^inputs: .*pass inputs=$"):
        verify(Plan(np.ones((2, 2), np.float32)), lambda x: x)
    impossible = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(ValueError, match="^inputs: .*pass inputs=$"):
        verify(impossible, impossible)


def test_several_inputs():
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    assert verify(lambda a, b: a - b, lambda a, b: -(b - a), (x[0], x[1])).ok
    assert not verify(lambda a, b: a - b, lambda a, b: b - a, (x[0], x[1])).ok
    indices = np.array([1, 0])
    assert verify(lambda a, i: a[i], lambda a, i: a[::-1], (x, indices)).ok


# -- errors --------------------------------------------------------------------------------------


def test_errors_name_the_argument(net):
    with pytest.raises(TypeError, match="^before: expected a module or another callable, got int$"):
        verify(3, net)
    with pytest.raises(TypeError, match="^after: expected a module or another callable, got NoneType$"):
        verify(net, None)
    with pytest.raises(ValueError, match="^seed: expected an int of at least 0, got -1$"):
        verify(net, net, seed=-1)
    with pytest.raises(TypeError, match="^inputs: expected an array or a tuple of arrays, got str"):
        verify(net, net, "x")


def test_the_networks_own_exception_passes_through(net):
    with pytest.raises(ValueError) as info:
        verify(net, net, np.ones((1, 4, 8, 8), np.float32))
    assert any("verify was running" in note for note in info.value.__notes__)

    def fails(x):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        verify(net, fails, np.ones((1, 3, 8, 8), np.float32))
    assert "verify was running after" in caught.value.__notes__


# -- the report ----------------------------------------------------------------------------------


def test_report_as_text_dict_and_page(gm):
    report = verify(gm, fold(gm, "c1", swapped))
    found = json.loads(json.dumps(report.to_dict()))
    assert found["ok"] is False and found["parted"]["node"] == "c1" and found["outputs"][0]["shape"] == [4, 10]
    assert max(map(len, str(report).splitlines()[1:3])) < 120
    assert "FAILED" in repr(report)
    page = report._repr_html_()
    assert page.startswith("<div>") and page.endswith("</div>") and page.count("<table>") == 1


def test_report_escapes_what_it_shows():
    name = "<script>"
    report = verify(lambda x: {name: x * 2}, lambda x: {name: x * 3}, np.ones((2, 3), np.float32))
    assert "<script>" in str(report) and "<script>" not in report._repr_html_()


def test_worst_channel_has_its_gain(rng):
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)), rng)
    gm = fx.symbolic_trace(net)

    def one(conv, bn, folded):
        folded.weight[5] *= 1.01
        return folded

    check = verify(gm, fold(gm, "0", one)).outputs[0]
    assert check.worst_channel == 5 and check.gain_of == "1"
    assert math.isclose(check.gain, gain(net[1])[5], rel_tol=1e-6)


def test_figures_are_those_of_the_definition(rng):
    """By hand: max abs, ratio, ULPs of outputs with known errors."""
    x = np.zeros((1, 2, 16), np.float32)

    def before(x):
        return x + np.float32(3) if x.dtype == np.float32 else x + (3 + 1e-6)

    def after(x):
        y = x + np.float32(3)
        y[0, 1] += np.float32(2**-20)
        return y

    check = verify(before, after, x).outputs[0]
    f = 2.0**-23 * (3 + 1e-6)
    e_after = 2.0**-20 - 1e-6
    assert math.isclose(check.max_abs, max(abs(e_after), 1e-6), rel_tol=1e-6)
    assert math.isclose(check.max_abs_before, 1e-6, rel_tol=1e-6)
    assert math.isclose(check.ratio, max(1.0, (abs(e_after) + f) / (1e-6 + f)), rel_tol=1e-6)
    assert math.isclose(check.ulp_max, 1e-6 / 2.0**-22, rel_tol=1e-3)


@pytest.mark.oracle
def test_torch_modules_can_be_the_reference(torch, rng):
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    theirs[1].running_mean.uniform_(-1, 1)
    ours = fx.from_torch(theirs)
    x = rng.normal(size=(2, 3, 9, 9)).astype(np.float32)
    folded, _ = pyconvbn.passes.fuse_conv_bn(ours)
    assert verify(theirs, folded, x).ok
    assert verify(theirs, folded, torch.from_numpy(x)).ok
    theirs[0].weight.data.mul_(1.5)
    assert not verify(theirs, folded, x).ok
