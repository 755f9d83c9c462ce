# SPDX-License-Identifier: BSD-3-Clause
"""Every forward of `pyconvbn.nn` against the float64 reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from pyconvbn import nn, testing

RNG = np.random.default_rng


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch, the second oracle, is not installed")


def sample(nd, channels=4, dtype=np.float32, seed=0):
    return RNG(seed).normal(size=(2, channels, *(7, 6, 5)[:nd])).astype(dtype)


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "groups": 2, "bias": False},
        {"dilation": 2, "padding": "same"},
        {"padding": "valid", "padding_mode": "reflect"},
        *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
        {"padding": "same", "padding_mode": "circular", "dilation": 3, "kernel_size": 2},
        {"padding": (3, 1, 2), "padding_mode": "reflect", "stride": (1, 2, 3)},
    ],
)
def test_conv_forward(nd, dtype, options):
    options = {"kernel_size": 3, **options}
    options = {k: v[:nd] if isinstance(v, tuple) else v for k, v in options.items()}
    conv = getattr(nn, f"Conv{nd}d")(4, 6, dtype=dtype, **options)
    x = sample(nd, dtype=dtype)
    y = conv(x)
    assert y.dtype == dtype
    testing.assert_matches_reference(y, x, conv)
    testing.assert_matches_reference(conv(x[0]), x[0], conv)


@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 3, "padding": 1, "output_padding": 2, "groups": 2}, {"dilation": 2}]
)
def test_conv_transpose_forward(nd, options):
    conv = getattr(nn, f"ConvTranspose{nd}d")(4, 6, 3, **options)
    x = sample(nd)
    testing.assert_matches_reference(conv(x), x, conv)
    testing.assert_matches_reference(conv(x[0]), x[0], conv)


def test_conv_transpose_output_size():
    conv = nn.ConvTranspose2d(4, 3, 3, stride=(2, 3), padding=1)
    x = sample(2)
    for size in ((14, 18), [13, 16], (2, 3, 14, 17)):
        y = conv(x, output_size=size)
        assert y.shape[2:] == tuple(size[-2:])
        testing.assert_matches_reference(y, x, conv, output_size=size)
    assert conv(x[0], output_size=(14, 18)).shape == (3, 14, 18)
    with pytest.raises(ValueError, match=r"from \(13, 16\) to \(14, 18\).*got \(15, 16\)"):
        conv(x, output_size=(15, 16))
    with pytest.raises(ValueError, match="output_size: expected 2 or 4 sizes, got 3"):
        conv(x, output_size=(1, 14, 18))


def test_linear_forward():
    linear = nn.Linear(5, 3)
    for shape in ((5,), (2, 5), (2, 3, 5)):
        x = RNG(0).normal(size=shape).astype(np.float32)
        reference, tolerance = testing.error_model(x, linear.weight, linear.bias)
        testing.assert_within(linear(x), reference, tolerance, channel_axis=-1)


BATCH_NORMS = [
    (nn.BatchNorm1d, 0), (nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3),
    (nn.SyncBatchNorm, 0), (nn.SyncBatchNorm, 2),
]


def batch_norm_within(y, x, mean, var, bn):
    reference = testing.reference_batch_norm(x, mean, var, bn.weight, bn.bias, eps=bn.eps)
    tolerance = testing.batch_norm_error_model(x, mean, var, bn.weight, bn.bias, bn.eps)
    testing.assert_within(y, reference, tolerance)


@pytest.mark.parametrize(("cls", "nd"), BATCH_NORMS)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_forward_in_eval(cls, nd, affine):
    bn = cls(4, affine=affine).eval()
    rng = RNG(3)
    bn.running_mean[...] = rng.normal(size=4)
    bn.running_var[...] = rng.uniform(0.1, 5, 4)
    if affine:
        bn.weight[...], bn.bias[...] = rng.normal(size=4), rng.normal(size=4)
    x = sample(nd)
    state = copy.deepcopy(bn.state_dict())
    batch_norm_within(bn(x), x, bn.running_mean, bn.running_var, bn)
    assert all(np.array_equal(value, state[key]) for key, value in bn.state_dict().items())


@pytest.mark.parametrize(("cls", "nd"), BATCH_NORMS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_forward_in_training(cls, nd, momentum):
    bn = cls(4, momentum=momentum)
    mean, var = np.zeros(4), np.ones(4)
    held = bn.running_mean
    for step in range(1, 4):
        x = sample(nd, seed=step) * step + step
        others = tuple(a for a in range(x.ndim) if a != 1)
        x64 = x.astype(np.float64)
        batch_norm_within(bn(x), x, x64.mean(axis=others), x64.var(axis=others), bn)
        factor = 1 / step if momentum is None else momentum
        mean, var = testing.reference_batch_norm_stats(x, mean, var, factor)
        np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(bn.running_var, var, rtol=1e-5)
        assert bn.num_batches_tracked == step
    assert bn.running_mean is held
    bn.reset_running_stats()
    assert bn.running_mean is held and not held.any() and (bn.running_var == 1).all()
    assert bn.num_batches_tracked == 0


def test_batch_norm_without_statistics_uses_the_batch_in_eval_too():
    bn = nn.BatchNorm2d(4, track_running_stats=False)
    x = sample(2) + 3
    x64 = x.astype(np.float64)
    for mode in (True, False):
        y = bn.train(mode)(x)
        batch_norm_within(y, x, x64.mean(axis=(0, 2, 3)), x64.var(axis=(0, 2, 3)), bn)
    untracked = nn.BatchNorm2d(4)
    untracked.track_running_stats = False
    untracked(x)
    assert not untracked.running_mean.any() and untracked.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("bn", "shape", "text"),
    [
        (nn.BatchNorm1d(4), (4,), "2-D or 3-D, got 1-D"),
        (nn.BatchNorm1d(4), (1, 4, 1, 1), "2-D or 3-D, got 4-D"),
        (nn.BatchNorm2d(4), (2, 4, 3), "4-D, got 3-D"),
        (nn.BatchNorm3d(4), (2, 4), "5-D, got 2-D"),
        (nn.SyncBatchNorm(4), (4,), "at least 2-D, got 1-D"),
    ],
)
def test_batch_norm_checks_the_number_of_axes(bn, shape, text):
    with pytest.raises(ValueError, match=text):
        bn(np.zeros(shape, np.float32))
    assert bn.num_batches_tracked == 0


def test_a_failed_batch_norm_counts_no_batch():
    bn = nn.BatchNorm1d(4)
    with pytest.raises(ValueError):
        bn(np.ones((1, 4), np.float32))  # one value per channel has no variance
    with pytest.raises((ValueError, TypeError)):
        bn(np.ones((3, 5), np.float32))
    assert bn.num_batches_tracked == 0 and not bn.running_mean.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("code", "reference"),
    [
        ("ReLU(inplace=True)", testing.reference_relu),
        ("ReLU6()", testing.reference_relu6),
        ("LeakyReLU(0.3)", lambda x: testing.reference_leaky_relu(x, 0.3)),
        ("Hardswish()", testing.reference_hardswish),
        ("SiLU()", testing.reference_silu),
        ("Sigmoid()", testing.reference_sigmoid),
        ("GELU()", testing.reference_gelu),
        ("GELU('tanh')", lambda x: testing.reference_gelu(x, "tanh")),
    ],
)
def test_activation_forward(code, reference, dtype):
    x = (sample(2, dtype=dtype) * 3).astype(dtype)
    original = x.copy()
    y, expected = eval(code, vars(nn))(x), reference(x)
    # The slopes are at most about 1.5, and GELU cancels: its error is relative to x.
    testing.assert_within(y, expected, testing.sum_error_model(expected, np.abs(x), 1, dtype))
    assert y.dtype == dtype and np.array_equal(x, original)


@pytest.mark.parametrize("nd", [1, 2, 3])
def test_pool_forwards(nd):
    x = sample(nd)
    y = getattr(nn, f"MaxPool{nd}d")(3, 2, 1, ceil_mode=True)(x)
    assert np.array_equal(y, testing.reference_max_pool(nd, x, 3, 2, 1, ceil_mode=True))
    for module, expected in (
        (getattr(nn, f"AvgPool{nd}d")(3, 2, 1, True, False),
         testing.reference_avg_pool(nd, x, 3, 2, 1, True, False)),
        (getattr(nn, f"AvgPool{nd}d")(2), testing.reference_avg_pool(nd, x, 2)),
        (getattr(nn, f"AdaptiveAvgPool{nd}d")(3), testing.reference_adaptive_avg_pool(nd, x, 3)),
    ):
        tolerance = testing.sum_error_model(expected, np.abs(x).max(), 27, np.float32)
        testing.assert_within(module(x), expected, tolerance)
        testing.assert_within(module(x[0]), expected[0], tolerance[0], channel_axis=0)
    if nd > 1:
        y = getattr(nn, f"AvgPool{nd}d")(2, divisor_override=3)(x)
        expected = testing.reference_avg_pool(nd, x, 2, divisor_override=3)
        tolerance = testing.sum_error_model(expected, np.abs(x).max() * 3, 8, np.float32)
        testing.assert_within(y, expected, tolerance)


def test_shape_module_forwards():
    x = sample(2)
    assert nn.Identity(1, a=2)(x) is x
    assert nn.Flatten()(x).shape == (2, 4 * 42) and nn.Flatten(2)(x).shape == (2, 4, 42)
    assert np.array_equal(nn.Dropout(0.5).eval()(x), x)
    up = nn.Upsample(scale_factor=2)(x)
    assert np.array_equal(up, testing.reference_interpolate(x, scale_factor=2))
    for align in (False, True):
        up = nn.Upsample(size=(9, 11), mode="bilinear", align_corners=align)(x)
        expected = testing.reference_interpolate(x, (9, 11), None, "bilinear", align)
        tolerance = testing.sum_error_model(expected, np.abs(x).max() * 10, 4, np.float32)
        testing.assert_within(up, expected, tolerance)


@pytest.mark.oracle
def test_modules_take_torch_tensors(torch):
    x = sample(2)
    for module in (
        nn.Conv2d(4, 2, 3), nn.ConvTranspose2d(4, 2, 3), nn.BatchNorm2d(4).eval(), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Upsample(scale_factor=2),
    ):
        y = module(torch.from_numpy(x).requires_grad_())
        assert isinstance(y, np.ndarray) and np.array_equal(y, module(x))


def test_undefined_forward():
    with pytest.raises(NotImplementedError, match="Module does not define"):
        nn.Module()(1)
