# SPDX-License-Identifier: BSD-3-Clause
"""Folding functions against the float64 reference and the identities they promise."""

import itertools
import warnings

import numpy as np
import pytest

import pyconvbn
from pyconvbn import nn, testing
from pyconvbn import functional as F


def bn_arrays(rng, channels, dtype=np.float32):
    return (
        rng.normal(2.0, 3.0, channels).astype(dtype), rng.uniform(0.01, 9.0, channels).astype(dtype), 1e-3,
        rng.normal(0.0, 2.0, channels).astype(dtype), rng.normal(1.0, 2.0, channels).astype(dtype),
    )


def correctly_rounded(value, dtype):
    """What one rounding of the float64 result gives."""
    with np.errstate(over="ignore"):
        return value.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("transpose,groups", list(itertools.product([False, True], [1, 2, 4])))
@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 2, 2)])
def test_weights_are_the_float64_fold_rounded_once(dtype, transpose, groups, kernel, rng):
    ic, oc = 8, 12
    shape = (ic, oc // groups) if transpose else (oc, ic // groups)
    w = rng.normal(size=shape + kernel).astype(dtype)
    b = rng.normal(size=oc).astype(dtype)
    rm, rv, eps, gamma, beta = bn_arrays(rng, oc)
    got_w, got_b = pyconvbn.fuse_conv_bn_weights(w, b, rm, rv, eps, gamma, beta, transpose, groups)
    want_w, want_b = testing.reference_fold_conv_bn(w, b, rm, rv, eps, gamma, beta, transpose=transpose, groups=groups)
    assert got_w.dtype == dtype and got_b.dtype == dtype
    tolerance = 0 if dtype is not np.float64 else 4
    np.testing.assert_array_max_ulp(got_w, correctly_rounded(want_w, dtype), maxulp=max(tolerance, 1))
    np.testing.assert_array_max_ulp(got_b, correctly_rounded(want_b, dtype), maxulp=max(4 * tolerance, 1))


def test_grouped_transposed_weight_belongs_to_its_own_output_channel():
    """The index rule on numbers one can check by hand: ic 4, oc 6, groups 2, so 3 output channels a group."""
    w = np.ones((4, 3, 1), np.float32)
    zero = np.zeros(6, np.float32)
    gamma = np.arange(1, 7, dtype=np.float32)  # scale of output channel c is c + 1
    got, bias = pyconvbn.fuse_conv_bn_weights(w, None, zero, np.ones(6, np.float32), 0.0, gamma, None, True, 2)
    np.testing.assert_array_equal(got[:, :, 0], [[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]])
    np.testing.assert_array_equal(bias, zero)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_grouped_transposed_fold_gives_the_unfused_output(groups, rng):
    conv = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, groups=groups).eval()
    bn = nn.BatchNorm2d(8).eval()
    rm, rv, _, gamma, beta = bn_arrays(rng, 8)
    bn.running_mean[...], bn.running_var[...], bn.weight[...], bn.bias[...] = rm, rv, gamma, beta
    fused = pyconvbn.fuse_conv_bn_eval(conv, bn)
    assert fused.weight.shape == conv.weight.shape
    x = rng.normal(size=(2, 8, 5, 4)).astype(np.float32)
    testing.assert_matches_reference(fused(x), x, conv, bn)


def test_groups_must_explain_the_transposed_weights_shape(rng):
    w = np.ones((8, 2, 3, 3), np.float32)
    one = np.ones(8, np.float32)
    pyconvbn.fuse_conv_bn_weights(w, None, one, one, 1e-5, one, one, transpose=True, groups=4)
    with pytest.raises(ValueError, match="2.*8|8.*2"):
        pyconvbn.fuse_conv_bn_weights(w, None, one, one, 1e-5, one, one, transpose=True)


def test_memory_layout_of_the_weights_is_kept(rng):
    rm, rv, eps, gamma, beta = bn_arrays(rng, 4)
    base = rng.normal(size=(4, 3, 5, 2)).astype(np.float32)
    channels_last = np.ascontiguousarray(base.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for w in (base, np.asfortranarray(base), channels_last):
        got, _ = pyconvbn.fuse_conv_bn_weights(w, None, rm, rv, eps, gamma, beta)
        assert got.strides == w.strides
        want, _ = pyconvbn.fuse_conv_bn_weights(base, None, rm, rv, eps, gamma, beta)
        np.testing.assert_array_equal(got, want)


def test_any_strides_and_read_only_inputs(rng):
    rm, rv, eps, gamma, beta = bn_arrays(rng, 4)
    w = rng.normal(size=(8, 6, 3)).astype(np.float32)[::-2, ::2, ::-1]
    wide = np.zeros(8, np.float32)
    wide[::2] = rm
    strided_mean = wide[::2]
    for array in (w, rm, rv, gamma, beta):
        array.flags.writeable = False
    got = pyconvbn.fuse_conv_bn_weights(w, None, strided_mean, rv, eps, gamma[::-1][::-1], beta)
    want = pyconvbn.fuse_conv_bn_weights(w.copy(), None, rm, rv, eps, gamma, beta)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("missing", ["weight", "bias", "both", "conv_bias"])
def test_missing_parameters_mean_one_and_zero(missing, rng):
    rm, rv, eps, gamma, beta = bn_arrays(rng, 4)
    w, b = rng.normal(size=(4, 2, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    gamma = None if missing in ("weight", "both") else gamma
    beta = None if missing in ("bias", "both") else beta
    b = None if missing == "conv_bias" else b
    got = pyconvbn.fuse_conv_bn_weights(w, b, rm, rv, eps, gamma, beta)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    want = pyconvbn.fuse_conv_bn_weights(
        w, zero if b is None else b, rm, rv, eps, one if gamma is None else gamma, zero if beta is None else beta)
    for a, c in zip(got, want):
        np.testing.assert_array_equal(a, c)


def test_the_convolutions_bias_is_scaled_too():
    w, two = np.ones((1, 1, 1), np.float32), np.full(1, 2.0, np.float32)
    _, b = pyconvbn.fuse_conv_bn_weights(w, np.full(1, 10.0, np.float32), two, np.full(1, 4.0), 0.0, two * 3, two)
    assert b == (10 - 2) * 3.0 + 2


class TestNonFinite:
    def test_no_floating_point_warning_reaches_the_caller(self):
        w = np.full((3, 1, 1), 1e30, np.float32)
        rv = np.array([0.0, -1.0, 1e-300])
        with warnings.catch_warnings(), np.errstate(all="raise"):
            warnings.simplefilter("error")
            got, _ = pyconvbn.fuse_conv_bn_weights(w, None, np.zeros(3), rv, 0.0, np.full(3, 1e30), None)
        assert np.isinf(got[0]).all() and np.isnan(got[1]).all() and np.isinf(got[2]).all()

    def test_negative_variance_is_nan_only_in_its_channel(self):
        w = np.ones((3, 1, 1), np.float32)
        got, b = pyconvbn.fuse_conv_bn_weights(
            w, None, np.zeros(3), np.array([1.0, -1.0, 4.0]), 0.0, None, None)
        np.testing.assert_array_equal(np.isnan(got.ravel()), [False, True, False])
        np.testing.assert_array_equal(np.isnan(b), [False, True, False])


class TestErrors:
    def call(self, **changed):
        one = np.ones(4, np.float32)
        arguments = dict(conv_w=np.ones((4, 2, 3), np.float32), conv_b=one, bn_rm=one, bn_rv=one, bn_eps=1e-5,
                         bn_w=one, bn_b=one)
        arguments.update(changed)
        return pyconvbn.fuse_conv_bn_weights(**arguments)

    @pytest.mark.parametrize("name", ["conv_b", "bn_rm", "bn_rv", "bn_w", "bn_b"])
    def test_wrong_length(self, name):
        with pytest.raises(ValueError, match=rf"{name}.*4.*5"):
            self.call(**{name: np.ones(5, np.float32)})

    @pytest.mark.parametrize("name", ["bn_rm", "bn_rv"])
    def test_missing_statistics(self, name):
        with pytest.raises(ValueError, match=name):
            self.call(**{name: None})

    @pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf")])
    def test_eps(self, eps):
        with pytest.raises(ValueError, match="eps"):
            self.call(bn_eps=eps)

    @pytest.mark.parametrize("name", ["conv_w", "conv_b", "bn_rm", "bn_w"])
    @pytest.mark.parametrize("dtype", [np.int64, bool, np.complex64, object])
    def test_not_a_float_array(self, name, dtype):
        shape = (4, 2, 3) if name == "conv_w" else (4,)
        with pytest.raises(TypeError, match=rf"{name}.*{np.dtype(dtype).name}"):
            self.call(**{name: np.ones(shape, dtype)})

    def test_weight_and_bias_of_two_dtypes(self):
        with pytest.raises(TypeError, match="float64.*float32|float32.*float64"):
            self.call(conv_b=np.ones(4))

    def test_lists(self):
        with pytest.raises(TypeError, match="bn_rm"):
            self.call(bn_rm=[1.0] * 4)


class TestLinear:
    def test_against_reference(self, rng):
        w, b = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=5).astype(np.float32)
        rm, rv, eps, gamma, beta = bn_arrays(rng, 5)
        got = pyconvbn.fuse_linear_bn_weights(w, b, rm, rv, eps, gamma, beta)
        want = testing.reference_fold_linear_bn(w, b, rm, rv, eps, gamma, beta)
        for a, c in zip(got, want):
            np.testing.assert_array_max_ulp(a, c.astype(np.float32), maxulp=1)

    def test_one_feature_broadcasts(self, rng):
        w = rng.normal(size=(5, 7)).astype(np.float32)
        got_w, got_b = pyconvbn.fuse_linear_bn_weights(w, None, *bn_arrays(rng, 1))
        assert got_w.shape == (5, 7) and got_b.shape == (5,)

    def test_other_lengths_are_refused(self, rng):
        with pytest.raises(ValueError, match="5.*3|3.*5"):
            pyconvbn.fuse_linear_bn_weights(np.ones((5, 7), np.float32), None, *bn_arrays(rng, 3))


class TestBatchNormFirst:
    def reference(self, x, rm, rv, eps, gamma, beta, run):
        normal = testing.reference_batch_norm(x, rm, rv, gamma, beta, eps=eps)
        return run(normal.astype(np.float64))

    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_unpadded_is_exact(self, groups, rng):
        w, b = rng.normal(size=(8, 4 // groups, 3, 3)), rng.normal(size=8)
        arrays = bn_arrays(rng, 4, np.float64)
        got_w, got_b = pyconvbn.fuse_bn_conv_weights(*arrays, w, b, groups=groups)
        x = rng.normal(size=(2, 4, 6, 6))
        want = self.reference(x, *arrays, lambda y: F.conv2d(y, w, b, groups=groups))
        np.testing.assert_allclose(F.conv2d(x, got_w, got_b, groups=groups), want, rtol=1e-10, atol=1e-9)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_transposed_without_shift(self, groups, rng):
        w = rng.normal(size=(4, 6 // groups, 3))
        rv, gamma, zero = rng.uniform(0.1, 4.0, 4), rng.normal(size=4), np.zeros(4)
        got_w, got_b = pyconvbn.fuse_bn_conv_weights(
            zero, rv, 0.0, gamma, None, w, None, groups=groups, transpose=True)
        x = rng.normal(size=(2, 4, 5))
        want = self.reference(x, zero, rv, 0.0, gamma, None, lambda y: F.conv_transpose1d(y, w, groups=groups))
        np.testing.assert_allclose(
            F.conv_transpose1d(x, got_w, got_b, groups=groups), want, rtol=1e-10, atol=1e-9)

    def test_padding_with_a_shift_is_refused_with_its_reason(self, rng):
        arrays, w = bn_arrays(rng, 4), np.ones((8, 4, 3, 3), np.float32)
        for keywords in ({"padding": 1}, {"padding": (0, 1)}, {"padding": "same"}):
            with pytest.raises(pyconvbn.FoldError) as caught:
                pyconvbn.fuse_bn_conv_weights(*arrays, w, None, **keywords)
            assert caught.value.reason == "PADDED_PRE_BN"
        with pytest.raises(pyconvbn.FoldError):
            pyconvbn.fuse_bn_conv_weights(*arrays, np.ones((4, 8, 3, 3), np.float32), None, transpose=True)

    def test_what_stays_exact_with_padding(self, rng):
        rm, rv, eps, gamma, beta = bn_arrays(rng, 4)
        w = np.ones((8, 4, 3, 3), np.float32)
        zero = np.zeros(4, np.float32)
        pyconvbn.fuse_bn_conv_weights(zero, rv, eps, gamma, zero, w, None, padding=1)  # no shift
        pyconvbn.fuse_bn_conv_weights(rm, rv, eps, gamma, beta, w, None, padding=1, padding_mode="reflect")
        pyconvbn.fuse_bn_conv_weights(rm, rv, eps, gamma, beta, w, None, padding="valid")
        with pytest.raises(ValueError, match="padding"):
            pyconvbn.fuse_bn_conv_weights(rm, rv, eps, gamma, beta, w, None, padding="full")


class TestModules:
    @pytest.mark.parametrize("make", [
        lambda: (nn.Conv1d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm1d(4), (2, 3, 9)),
        lambda: (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4), (2, 4, 6, 5)),
        lambda: (nn.ConvTranspose3d(4, 4, 2, 2, groups=2), nn.SyncBatchNorm(4), (1, 4, 3, 2, 2)),
    ], ids=["conv1d", "conv2d", "conv_transpose3d"])
    def test_fused_copy(self, make, rng):
        conv, bn, shape = make()
        conv.eval(), bn.eval()
        bn.running_mean[...] = rng.normal(size=4)
        bn.running_var[...] = rng.uniform(0.1, 3.0, 4)
        weight, state = conv.weight, conv.weight.copy()
        fused = pyconvbn.fuse_conv_bn_eval(conv, bn)
        x = rng.normal(size=shape).astype(np.float32)
        testing.assert_matches_reference(fused(x), x, conv, bn)
        assert type(fused) is type(conv) and fused is not conv and not np.shares_memory(fused.weight, weight)
        assert conv.weight is weight
        np.testing.assert_array_equal(conv.weight, state)
        assert isinstance(fused.weight, nn.Parameter) and isinstance(fused.bias, nn.Parameter)

    def test_requires_grad_flags_are_kept(self):
        conv, bn = nn.Conv1d(2, 4, 3).eval(), nn.BatchNorm1d(4).eval()
        conv.weight.requires_grad, conv.bias.requires_grad = False, True
        fused = pyconvbn.fuse_conv_bn_eval(conv, bn)
        assert fused.weight.requires_grad is False and fused.bias.requires_grad is True
        fused = pyconvbn.fuse_conv_bn_eval(nn.Conv1d(2, 4, 3, bias=False).eval(), bn)
        assert fused.weight.requires_grad is True and fused.bias.requires_grad is False
        w, b = pyconvbn.fuse_conv_bn_weights(
            np.asarray(conv.weight), None, bn.running_mean, bn.running_var, bn.eps, None, None)
        assert type(w) is np.ndarray and type(b) is np.ndarray

    def test_training_is_refused_with_its_reason(self):
        conv, bn = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)
        with pytest.raises(pyconvbn.FoldError) as caught:
            pyconvbn.fuse_conv_bn_eval(conv, bn)
        assert caught.value.reason == "BN_TRAINING"
        with pytest.raises(pyconvbn.FoldError) as caught:
            pyconvbn.fuse_conv_bn_eval(conv, bn.eval())
        assert caught.value.reason == "CONV_TRAINING"
        with pytest.raises(pyconvbn.FoldError) as caught:
            pyconvbn.fuse_conv_bn_eval(conv.eval(), nn.BatchNorm1d(4, track_running_stats=False).eval())
        assert caught.value.reason == "NO_RUNNING_STATS"

    def test_transpose_flag(self):
        bn = nn.BatchNorm1d(4).eval()
        pyconvbn.fuse_conv_bn_eval(nn.ConvTranspose1d(2, 4, 3).eval(), bn, transpose=True)
        with pytest.raises(ValueError, match="transpose: expected None or False.*got True"):
            pyconvbn.fuse_conv_bn_eval(nn.Conv1d(2, 4, 3).eval(), bn, transpose=True)

    def test_kinds_are_not_mixed_up(self):
        bn = nn.BatchNorm1d(4).eval()
        with pytest.raises(TypeError, match="linear: expected a Linear module, got Conv1d"):
            pyconvbn.fuse_linear_bn_eval(nn.Conv1d(2, 4, 3).eval(), bn)
        with pytest.raises(TypeError, match="conv: expected a Conv.*got Linear"):
            pyconvbn.fuse_conv_bn_eval(nn.Linear(2, 4).eval(), bn)
        fused = pyconvbn.fuse_linear_bn_eval(nn.Linear(2, 4).eval(), bn)
        assert type(fused) is nn.Linear
