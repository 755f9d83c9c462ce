# SPDX-License-Identifier: BSD-3-Clause
"""efficient_conv_bn_eval and its decomposed form: all seven kinds, every option carried, refusals with reasons."""

import copy

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import nn, testing

KINDS = {
    "linear": (lambda **kw: nn.Linear(6, 8, **kw), nn.BatchNorm1d, (4, 6)),
    "conv1d": (lambda **kw: nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=2, **kw), nn.BatchNorm1d, (2, 4, 11)),
    "conv2d": (
        lambda **kw: nn.Conv2d(4, 8, (3, 5), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2, **kw),
        nn.BatchNorm2d, (2, 4, 12, 13),
    ),
    "conv3d": (lambda **kw: nn.Conv3d(2, 8, 3, padding=1, **kw), nn.BatchNorm3d, (2, 2, 5, 6, 7)),
    "conv_transpose1d": (
        lambda **kw: nn.ConvTranspose1d(4, 8, 5, stride=3, padding=1, output_padding=2, groups=2, **kw),
        nn.BatchNorm1d, (2, 4, 7),
    ),
    "conv_transpose2d": (
        lambda **kw: nn.ConvTranspose2d(6, 8, (4, 3), stride=2, padding=1, groups=2, dilation=(1, 2), **kw),
        nn.BatchNorm2d, (2, 6, 5, 4),
    ),
    "conv_transpose3d": (
        lambda **kw: nn.ConvTranspose3d(2, 8, 3, stride=(1, 2, 2), **kw), nn.BatchNorm3d, (1, 2, 3, 4, 3)),
}


def make_pair(kind, rng, *, bias=True, sync=False, affine=True, bn_dtype=np.float32, dtype=np.float32):
    """A conv and a BatchNorm whose statistics are far from 0 and 1, and an input."""
    make, bn_class, shape = KINDS[kind]
    conv = make(bias=bias, dtype=dtype).eval()
    bn = (nn.SyncBatchNorm if sync else bn_class)(8, affine=affine, dtype=bn_dtype).eval()
    bn.running_mean[...] = rng.normal(3.0, 2.0, 8)
    bn.running_var[...] = rng.uniform(0.05, 9.0, 8)
    if affine:
        bn.weight[...] = rng.normal(0.0, 2.0, 8)
        bn.bias[...] = rng.normal(-1.0, 2.0, 8)
    return conv, bn, rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("sync", [False, True], ids=["bn", "sync_bn"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_seven_kinds_match_the_reference(kind, bias, sync, rng):
    conv, bn, x = make_pair(kind, rng, bias=bias, sync=sync)
    before = [x.copy(), np.array(conv.weight), np.array(bn.running_mean)]
    y = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    testing.assert_matches_reference(y, x, conv, bn)
    assert y.dtype == np.float32 and type(y) is np.ndarray
    for array, copy_ in zip((x, conv.weight, bn.running_mean), before):
        np.testing.assert_array_equal(array, copy_)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_changed_in_place_are_seen_by_the_next_call(kind, rng):
    conv, bn, x = make_pair(kind, rng)
    first = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    conv.weight[...] *= 1.5
    bn.running_mean[...] += 1.0
    second = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    assert np.abs(second - first).max() > 0.1
    testing.assert_matches_reference(second, x, conv, bn)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bn_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d"])
def test_result_has_the_convolutions_dtype(kind, dtype, bn_dtype, rng):
    conv, bn, x = make_pair(kind, rng, dtype=dtype, bn_dtype=bn_dtype)
    y = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    assert y.dtype == dtype
    testing.assert_matches_reference(y, x, conv, bn)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv_transpose1d"])
def test_batch_norm_without_affine_parameters(kind, rng):
    conv, bn, x = make_pair(kind, rng, affine=False)
    testing.assert_matches_reference(pyconvbn.efficient_conv_bn_eval(bn, conv, x), x, conv, bn)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("nd", [1, 2, 3])
def test_padding_modes(nd, mode, rng):
    conv = getattr(nn, f"Conv{nd}d")(3, 5, 3, padding=1, padding_mode=mode)
    bn = getattr(nn, f"BatchNorm{nd}d")(5).eval()
    bn.running_mean[...] = rng.normal(size=5)
    bn.running_var[...] = rng.uniform(0.1, 4.0, 5)
    x = rng.normal(size=(2, 3) + (6, 5, 4)[:nd]).astype(np.float32)
    testing.assert_matches_reference(pyconvbn.efficient_conv_bn_eval(bn, conv, x), x, conv, bn)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_string_padding(mode, rng):
    conv = nn.Conv2d(3, 5, (3, 4), padding="same", dilation=(2, 1), padding_mode=mode)
    bn = nn.BatchNorm2d(5).eval()
    bn.running_mean[...] = rng.normal(size=5)
    x = rng.normal(size=(2, 3, 9, 8)).astype(np.float32)
    y = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    assert y.shape == (2, 5, 9, 8)
    testing.assert_matches_reference(y, x, conv, bn)


def test_output_size_of_a_transposed_convolution(rng):
    conv = nn.ConvTranspose2d(3, 4, 3, stride=3, padding=1)
    bn = nn.BatchNorm2d(4).eval()
    bn.running_mean[...] = rng.normal(size=4)
    x = rng.normal(size=(1, 3, 4, 4)).astype(np.float32)
    for size in ([10, 12], (1, 4, 10, 12)):
        y = pyconvbn.efficient_conv_bn_eval(bn, conv, x, output_size=size)
        assert y.shape == (1, 4, 10, 12)
        testing.assert_matches_reference(y, x, conv, bn, output_size=size)
    with pytest.raises(ValueError, match=r"output_size: expected between 10 and 12 on spatial axis 0.*got 13"):
        pyconvbn.efficient_conv_bn_eval(bn, conv, x, output_size=[13, 12])
    with pytest.raises(ValueError, match="output_size: expected 2 or 4 entries.*got 3"):
        pyconvbn.efficient_conv_bn_eval(bn, conv, x, output_size=[10, 12, 3])
    with pytest.raises(ValueError, match="output_size: expected None"):
        pyconvbn.efficient_conv_bn_eval(bn, nn.Conv2d(3, 4, 3), x, output_size=[2, 2])
    with pytest.raises(ValueError, match="output_size: expected None for a Linear"):
        pyconvbn.efficient_conv_bn_eval(nn.BatchNorm1d(4).eval(), nn.Linear(3, 4), x[0, :, :, 0].T, output_size=[2])


def test_out_is_written_and_returned(rng):
    conv, bn, x = make_pair("conv2d", rng)
    expected = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    out = np.full(expected.shape, 7, np.float32)
    assert pyconvbn.efficient_conv_bn_eval(bn, conv, x, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_training_batch_norm_is_refused(rng):
    conv, bn, x = make_pair("conv2d", rng)
    bn.train()
    with pytest.raises(pyconvbn.FoldError, match="training mode") as caught:
        pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    assert caught.value.reason == "BN_TRAINING"


def test_training_convolution_with_frozen_batch_norm_is_served(rng):
    conv, bn, x = make_pair("conv2d", rng)
    conv.train()
    testing.assert_matches_reference(pyconvbn.efficient_conv_bn_eval(bn, conv, x), x, conv, bn)


def test_batch_norm_without_statistics_is_refused(rng):
    conv, _, x = make_pair("conv2d", rng)
    bn = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="running_mean is None") as caught:
        pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    assert caught.value.reason == "NO_RUNNING_STATS"


def test_unbatched_input_is_refused_because_batch_norm_would_read_another_axis(rng):
    for kind in ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear"):
        conv, bn, x = make_pair(kind, rng)
        with pytest.raises(ValueError, match="axes"):
            pyconvbn.efficient_conv_bn_eval(bn, conv, x[0])


class TestLinear:
    def test_three_dimensional_output_is_refused_even_when_sizes_agree(self, rng):
        conv, bn, _ = make_pair("linear", rng)
        x = rng.normal(size=(2, 8, 6)).astype(np.float32)  # axis 1 has bn's 8 channels by accident
        with pytest.raises(pyconvbn.FoldError) as caught:
            pyconvbn.efficient_conv_bn_eval(bn, conv, x)
        assert caught.value.reason == "LINEAR_ND"

    def test_one_feature_over_a_unit_axis(self, rng):
        linear, bn = nn.Linear(6, 5), nn.BatchNorm1d(1).eval()
        bn.running_mean[...], bn.running_var[...] = 2.0, 5.0
        x = rng.normal(size=(3, 1, 6)).astype(np.float32)
        y = pyconvbn.efficient_conv_bn_eval(bn, linear, x)
        assert y.shape == (3, 1, 5)
        plain = testing.reference_linear(x, linear.weight, linear.bias)
        np.testing.assert_allclose(y, (plain - 2.0) / np.sqrt(5.0 + bn.eps), rtol=1e-5, atol=1e-6)

    def test_length_mismatch_names_both_numbers(self, rng):
        conv, _, x = make_pair("linear", rng)
        with pytest.raises(ValueError, match="expected statistics of length 8.*got 5"):
            pyconvbn.efficient_conv_bn_eval(nn.BatchNorm1d(5).eval(), conv, x)


def test_channel_mismatch_names_both_numbers(rng):
    conv, _, x = make_pair("conv2d", rng)
    with pytest.raises(ValueError, match=r"running_mean.*8.*5"):
        pyconvbn.efficient_conv_bn_eval(nn.BatchNorm2d(5).eval(), conv, x)


def test_wrong_modules_are_named(rng):
    conv, bn, x = make_pair("conv2d", rng)
    with pytest.raises(TypeError, match="bn: expected a BatchNorm.*got Conv2d"):
        pyconvbn.efficient_conv_bn_eval(conv, conv, x)
    with pytest.raises(TypeError, match="conv: expected a Linear, Conv.*got BatchNorm2d"):
        pyconvbn.efficient_conv_bn_eval(bn, bn, x)


def test_negative_variance_gives_nan_in_exactly_its_channel(rng):
    conv, bn, x = make_pair("conv2d", rng)
    bn.running_var[3] = -1.0
    y = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    assert np.isnan(y[:, 3]).all()
    assert np.isfinite(np.delete(y, 3, axis=1)).all()


def test_empty_batch(rng):
    conv, bn, x = make_pair("conv2d", rng)
    y = pyconvbn.efficient_conv_bn_eval(bn, conv, x[:0])
    assert y.shape == (0, 8) + pyconvbn.efficient_conv_bn_eval(bn, conv, x).shape[2:]


class TestDecomposed:
    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_the_module_form_bit_for_bit(self, kind, rng):
        conv, bn, x = make_pair(kind, rng)
        rest = ()
        if kind.startswith("conv_transpose"):
            rest = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        elif kind.startswith("conv"):
            rest = (conv.stride, conv.padding, conv.dilation, conv.groups)
        y = pyconvbn.efficient_conv_bn_eval_decomposed(
            bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, getattr(F, kind), conv.weight,
            conv.bias, x, rest)
        np.testing.assert_array_equal(y, pyconvbn.efficient_conv_bn_eval(bn, conv, x))

    def test_missing_remaining_arguments_take_their_defaults(self, rng):
        w = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
        x = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
        mean, var = np.zeros(4, np.float32), np.full(4, 4.0, np.float32)
        y = pyconvbn.efficient_conv_bn_eval_decomposed(None, None, mean, var, 0.0, F.conv2d, w, None, x, (2,))
        np.testing.assert_allclose(y, F.conv2d(x, w, stride=2) / 2, rtol=1e-6, atol=1e-6)

    def test_refusals(self, rng):
        one = np.ones(4, np.float32)
        w, x = np.ones((4, 3, 1, 1), np.float32), np.ones((1, 3, 2, 2), np.float32)
        call = pyconvbn.efficient_conv_bn_eval_decomposed
        with pytest.raises(TypeError, match="conv: expected one of pyconvbn.functional's linear, conv1d"):
            call(one, one, one, one, 1e-5, np.add, w, None, x, ())
        with pytest.raises(ValueError, match="conv_remaining_args: expected at most 4 entries.*got 5"):
            call(one, one, one, one, 1e-5, F.conv2d, w, None, x, (1, 0, 1, 1, 1))
        with pytest.raises(pyconvbn.FoldError, match="bn_running_var is None"):
            call(one, one, one, None, 1e-5, F.conv2d, w, None, x, ())
        with pytest.raises(ValueError, match="eps"):
            call(one, one, one, one, -1.0, F.conv2d, w, None, x, ())


class TestTorchModules:
    """torch.nn modules as they are; run where torch is installed."""

    CASES = {
        "linear": ("Linear", (6, 8), {}, "BatchNorm1d", (4, 6)),
        "conv1d": ("Conv1d", (4, 8, 3), {"padding": "same", "padding_mode": "circular"}, "BatchNorm1d", (2, 4, 9)),
        "conv2d": ("Conv2d", (4, 8, 3), {"stride": 2, "padding": 1, "groups": 2}, "BatchNorm2d", (2, 4, 9, 8)),
        "conv3d": ("Conv3d", (4, 8, 3), {"padding": 1}, "BatchNorm3d", (1, 4, 4, 5, 6)),
        "conv_transpose1d": ("ConvTranspose1d", (4, 8, 4), {"stride": 2, "groups": 2}, "BatchNorm1d", (2, 4, 9)),
        "conv_transpose2d": (
            "ConvTranspose2d", (4, 8, 3), {"stride": 2, "padding": 1, "output_padding": 1}, "BatchNorm2d", (2, 4, 5, 6)),
        "conv_transpose3d": ("ConvTranspose3d", (2, 8, 3), {}, "BatchNorm3d", (1, 2, 3, 3, 3)),
    }

    @pytest.mark.parametrize("kind", CASES)
    def test_matches_torch(self, kind, rng, torch):
        name, args, kwargs, bn_name, shape = self.CASES[kind]
        torch.manual_seed(0)
        conv = getattr(torch.nn, name)(*args, **kwargs)
        bn = getattr(torch.nn, bn_name)(8).eval()
        with torch.no_grad():
            for t in (bn.running_mean, bn.weight, bn.bias):
                t.normal_(1.0, 2.0)
            bn.running_var.uniform_(0.1, 5.0)
        x = torch.randn(shape)
        y = pyconvbn.efficient_conv_bn_eval(bn, conv, x)
        assert type(y) is np.ndarray
        testing.assert_matches_reference(y, x.numpy(), conv, bn)
        wanted = bn(conv(x)).detach().numpy()
        assert np.abs(y - wanted).max() <= 1e-4 * max(1.0, np.abs(wanted).max())

    def test_fused_copy_is_a_torch_module(self, rng, torch):
        conv, bn = torch.nn.Conv2d(3, 4, 3, bias=False).eval(), torch.nn.BatchNorm2d(4).eval()
        bn.running_mean.normal_()
        conv.weight.requires_grad_(False)
        original = copy.deepcopy(conv.state_dict())
        fused = pyconvbn.fuse_conv_bn_eval(conv, bn)
        assert type(fused) is torch.nn.Conv2d and isinstance(fused.bias, torch.nn.Parameter)
        assert not fused.weight.requires_grad and not fused.bias.requires_grad
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(fused(x), bn(conv(x)), rtol=1e-4, atol=1e-5)
        assert conv.bias is None and torch.equal(conv.weight, original["weight"])
