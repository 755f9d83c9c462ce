# SPDX-License-Identifier: BSD-3-Clause
"""The float64 reference against torch in float64, as a second oracle."""

from __future__ import annotations

import numpy as np
import pytest

from pyconvbn import testing

RNG = np.random.default_rng


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch, the second oracle, is not installed")


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(60))
def test_convolutions_match_torch(torch, seed):
    rng = RNG(seed)
    nd, transposed = 1 + seed % 3, seed % 2 == 1
    groups = int(rng.choice([1, 2, 3]))

    def axes(high, low=1):
        return tuple(int(v) for v in rng.integers(low, high, nd))

    ic, oc = groups * int(rng.integers(1, 4)), groups * int(rng.integers(1, 4))
    kernel, stride, dilation, padding = axes(4), axes(4), axes(3), axes(3, 0)
    size = [d * (k - 1) + 2 + int(rng.integers(0, 5)) for k, d in zip(kernel, dilation)]
    x = rng.normal(size=(2, ic, *size))
    options = {"groups": groups, "dilation": dilation, "bias": bool(rng.integers(2))}
    if transposed:
        extra = tuple(int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation))
        options |= {"stride": stride, "padding": padding, "output_padding": extra}
    else:
        mode = str(rng.choice(["zeros", "reflect", "replicate", "circular"]))
        choice = int(rng.integers(3))
        options |= {"padding_mode": mode}
        if choice < 2:
            options |= {"stride": stride, "padding": "valid" if choice else padding}
        else:
            options |= {"padding": "same"}
            size = [max(i, d * k) for i, d, k in zip(size, dilation, kernel)]
            x = rng.normal(size=(2, ic, *size))
    name = f"Conv{'Transpose' if transposed else ''}{nd}d"
    try:
        conv = getattr(torch.nn, name)(ic, oc, kernel, dtype=torch.float64, **options)
        expected = conv(torch.from_numpy(x)).detach().numpy()
    except RuntimeError as error:  # an output size below 1
        with pytest.raises(ValueError):
            testing.reference_module(conv, x)
        assert "size" in str(error)
        return
    got = testing.reference_module(conv, x)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(testing.reference_module(conv, x[0]), got[0], rtol=1e-14, atol=1e-14)
    bn = getattr(torch.nn, f"BatchNorm{nd}d")(oc, dtype=torch.float64)
    bn.running_mean.copy_(torch.from_numpy(rng.normal(size=oc)))
    bn.running_var.copy_(torch.from_numpy(rng.uniform(0.1, 3, oc)))
    for training in (True, False):
        if training and expected.size // oc == 1:
            continue
        mean, var = (t.numpy().copy() for t in (bn.running_mean, bn.running_var))
        bn.train(training)
        fused = testing.reference_conv_bn(x, conv, bn)
        target = bn(conv(torch.from_numpy(x))).detach().numpy()
        np.testing.assert_allclose(fused, target, rtol=1e-8, atol=1e-10)
        if training:
            mean, var = testing.reference_batch_norm_stats(expected, mean, var, bn.momentum)
        np.testing.assert_allclose(mean, bn.running_mean.numpy(), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(var, bn.running_var.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(10))
def test_linear_matches_torch(torch, seed):
    rng = RNG(seed)
    lead = tuple(int(v) for v in rng.integers(1, 4, int(rng.integers(0, 4))))
    linear = torch.nn.Linear(5, 3, bias=seed % 2 == 0, dtype=torch.float64)
    x = rng.normal(size=(*lead, 5))
    expected = linear(torch.from_numpy(x)).detach().numpy()
    got = testing.reference_module(linear, x)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.oracle
def test_linear_bn_normalises_axis_1_as_torch(torch):
    x = RNG(0).normal(size=(4, 3, 5))
    linear = torch.nn.Linear(5, 7, dtype=torch.float64)
    bn = torch.nn.BatchNorm1d(3, dtype=torch.float64).eval()
    bn.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    expected = bn(linear(torch.from_numpy(x))).detach().numpy()
    got = testing.reference_conv_bn(x, linear, bn)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.oracle
@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_pools_match_torch(torch, nd, seed):
    rng = RNG(seed)
    F = torch.nn.functional

    def axes(high, low=1):
        return tuple(int(v) for v in rng.integers(low, high, nd))

    x = rng.normal(size=(2, 3, *axes(9, 6)))
    t = torch.from_numpy(x)
    kernel, stride, dilation = axes(4), axes(4), axes(3)
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    ceil = bool(seed % 2)
    expected = getattr(F, f"max_pool{nd}d")(t, kernel, stride, padding, dilation, ceil)
    got = testing.reference_max_pool(nd, x, kernel, stride, padding, dilation, ceil)
    assert np.array_equal(got, expected.numpy())
    include = bool(seed % 4 < 2)
    expected = getattr(F, f"avg_pool{nd}d")(t, kernel, stride, padding, ceil, include)
    got = testing.reference_avg_pool(nd, x, kernel, stride, padding, ceil, include)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-14)
    size = axes(9)
    expected = getattr(F, f"adaptive_avg_pool{nd}d")(t, size)
    got = testing.reference_adaptive_avg_pool(nd, x, size)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.oracle
def test_elementwise_match_torch(torch):
    F = torch.nn.functional
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 800, -800]
    x = np.concatenate([RNG(0).normal(size=200) * 8, special])
    t = torch.from_numpy(x)
    pairs = [
        (testing.reference_relu(x), F.relu(t)),
        (testing.reference_relu6(x), F.relu6(t)),
        (testing.reference_hardtanh(x, -2, 3), F.hardtanh(t, -2, 3)),
        (testing.reference_leaky_relu(x, 0.3), F.leaky_relu(t, 0.3)),
        (testing.reference_sigmoid(x), torch.sigmoid(t)),
        (testing.reference_silu(x), F.silu(t)),
        (testing.reference_hardswish(x), F.hardswish(t)),
    ]
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-300)
    # For very negative x torch's 1 + erf and 1 + tanh cancel, hence an absolute tolerance.
    for kind in ("none", "tanh"):
        got, expected = testing.reference_gelu(x, kind), F.gelu(t, approximate=kind)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-14)
    grid = RNG(1).normal(size=(3, 4, 5)) * 20
    for dim in (0, 1, -1):
        expected = torch.softmax(torch.from_numpy(grid), dim)
        got = testing.reference_softmax(grid, dim)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_pad_matches_torch(torch, mode):
    x = RNG(0).normal(size=(2, 3, 5, 6))
    for pad in ([1, 2], [2, 0, 1, 3], [0, 0, 4, 4]):
        if len(pad) == 2 and mode != "constant":
            source = x[0]
        else:
            source = x
        expected = torch.nn.functional.pad(torch.from_numpy(source), pad, mode)
        assert np.array_equal(testing.reference_pad(source, pad, mode), expected.numpy())
    if mode == "constant":
        expected = torch.nn.functional.pad(torch.from_numpy(x), [-1, 2, 0, -3], mode, 7.0)
        assert np.array_equal(testing.reference_pad(x, [-1, 2, 0, -3], mode, 7.0), expected.numpy())


@pytest.mark.oracle
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 16])
def test_interpolate_matches_torch(torch, size):
    F = torch.nn.functional
    x = RNG(0).normal(size=(2, 3, 5, 7))
    t = torch.from_numpy(x)
    got = testing.reference_interpolate(x, size)
    assert np.array_equal(got, F.interpolate(t, size).numpy())
    for align in (False, True):
        got = testing.reference_interpolate(x, (size, 4), mode="bilinear", align_corners=align)
        expected = F.interpolate(t, (size, 4), mode="bilinear", align_corners=align)
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-13)
    factor = size / 3
    got = testing.reference_interpolate(x, scale_factor=factor)
    assert np.array_equal(got, F.interpolate(t, scale_factor=factor).numpy())
