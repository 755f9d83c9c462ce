# SPDX-License-Identifier: BSD-3-Clause
"""The error model and the assertion: right results pass, injected faults are named."""

from __future__ import annotations

import numpy as np
import pytest

from pyconvbn import nn, testing

RNG = np.random.default_rng


def arr(*values):
    return np.array(values, np.float64)


def pair(dtype=np.float32, seed=0, transposed=False):
    rng = RNG(seed)
    if transposed:
        conv = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, dtype=dtype)
    else:
        conv = nn.Conv2d(8, 6, 3, padding=1, groups=2, dtype=dtype)
    bn = nn.BatchNorm2d(6).eval()
    bn.weight[...] = rng.normal(size=6) + 2
    bn.bias[...] = rng.normal(size=6)
    bn.running_mean[...] = rng.normal(size=6) * 3
    bn.running_var[...] = rng.uniform(0.1, 4, 6)
    return rng.normal(size=(2, 8, 7, 5)).astype(dtype), conv, bn


def low_precision(x, conv, bn, dtype):
    """Folded, computed in `dtype` on purpose: rounds the folded weights and the result."""
    w, b = testing.reference_fold_conv_bn(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias,
        conv.transposed, conv.groups,
    )
    w, b = w.astype(dtype), b.astype(dtype)
    if conv.transposed:
        y = testing.reference_conv_transpose(x, w, b, conv.stride, groups=conv.groups)
    else:
        y = testing.reference_conv(x, w, b, padding=conv.padding, groups=conv.groups)
    return y.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_correct_result_passes(dtype, transposed):
    x, conv, bn = pair(dtype, transposed=transposed)
    actual = low_precision(x, conv, bn, dtype)
    testing.assert_matches_reference(actual, x, conv, bn)
    with pytest.raises(AssertionError):
        testing.assert_matches_reference(actual, x, conv, bn, factor=1e-3)


def test_the_tolerance_is_tight():
    x, conv, bn = pair()
    reference, tolerance = testing.error_model(
        x, conv.weight, conv.bias, bn=bn, padding=1, groups=2
    )
    assert reference.shape == tolerance.shape
    assert np.array_equal(reference, testing.reference_conv_bn(x, conv, bn))
    assert 1e-7 < np.median(tolerance) < 1e-4 * np.abs(reference).max()


def faulty(kind, x, conv, bn):
    scale, shift = bn_line(bn)
    plain = testing.reference_conv(x, conv.weight, None, padding=1, groups=2)
    bias = conv.bias.astype(np.float64)

    def column(v):
        return v.reshape(-1, 1, 1)

    if kind == "bias not scaled":
        return plain * column(scale) + column(bias + shift)
    if kind == "wrong axis":
        return plain * column(scale[::-1]) + column(bias * scale + shift)
    if kind == "border":
        y = plain * column(scale) + column(bias * scale + shift)
        y[:, :, 0] += 1e-3
        return y
    if kind == "eps forgotten":
        return (plain + column(bias - bn.running_mean)) / column(
            np.sqrt(bn.running_var.astype(float))
        ) * column(bn.weight.astype(float)) + column(bn.bias)
    assert kind == "one element"
    y = plain * column(scale) + column(bias * scale + shift)
    y[1, 4, 2, 3] += 1e-3
    return y


def bn_line(bn):
    scale = bn.weight / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


@pytest.mark.parametrize(
    "kind", ["bias not scaled", "wrong axis", "border", "eps forgotten", "one element"]
)
def test_injected_faults_are_caught(kind):
    x, conv, bn = pair()
    wrong = faulty(kind, x, conv, bn).astype(np.float32)
    with pytest.raises(AssertionError, match="outside the tolerance"):
        testing.assert_matches_reference(wrong, x, conv, bn)


def test_the_message_names_channel_values_ulps_and_gain():
    x, conv, bn = pair()
    wrong = faulty("one element", x, conv, bn).astype(np.float32)
    with pytest.raises(AssertionError) as caught:
        testing.assert_matches_reference(wrong, x, conv, bn)
    text = str(caught.value)
    gain = bn_line(bn)[0][4]
    reference = testing.reference_conv_bn(x, conv, bn)[1, 4, 2, 3]
    assert "1 of 420 elements" in text
    assert "channel 4 of 6, index (1, 4, 2, 3)" in text
    assert f"gamma/sigma = {gain:.6g}" in text
    assert repr(float(wrong[1, 4, 2, 3])) in text and repr(float(reference)) in text
    assert "ULPs" in text and "(float32)" in text


def test_shape_and_dtype_mismatches():
    x, conv, bn = pair()
    good = low_precision(x, conv, bn, np.float32)
    with pytest.raises(AssertionError, match=r"shape: expected \(2, 6, 7, 5\), got \(1, 6, 7, 5\)"):
        testing.assert_matches_reference(good[:1], x, conv, bn)
    with pytest.raises(TypeError, match="int32"):
        testing.assert_matches_reference(good.astype(np.int32), x, conv, bn)
    with pytest.raises(TypeError, match="actual"):
        testing.assert_matches_reference(good.tolist(), x, conv, bn)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_must_be_where_the_reference_has_them(special):
    x, conv, bn = pair()
    x[0, 0, 3, 3] = special
    reference = testing.reference_conv_bn(x, conv, bn)
    assert not np.isfinite(reference).all()
    with np.errstate(all="ignore"):
        actual = reference.astype(np.float32)
    testing.assert_matches_reference(actual, x, conv, bn)
    for index in [np.argwhere(~np.isfinite(reference))[0], np.argwhere(np.isfinite(reference))[0]]:
        wrong = actual.copy()
        wrong[tuple(index)] = 0.0 if not np.isfinite(wrong[tuple(index)]) else special
        with pytest.raises(AssertionError, match="1 of"):
            testing.assert_matches_reference(wrong, x, conv, bn)


def test_overflow_of_the_output_type_is_infinity():
    reference = arr(1e6, -1e6, 65504, 65519).reshape(1, 4)
    with np.errstate(over="ignore"):
        actual = reference.astype(np.float16)
    assert np.isinf(actual[0, :2]).all()
    tolerance = testing.sum_error_model(reference, 0.0, 0, np.float16)
    testing.assert_within(actual, reference, tolerance)
    with pytest.raises(AssertionError):
        testing.assert_within(-actual, reference, tolerance)
    with pytest.raises(AssertionError):
        testing.assert_within(np.minimum(actual, np.float16(65504)), reference, tolerance)
    with pytest.raises(AssertionError):
        testing.assert_within(np.float16([-np.inf]), arr(65510), tolerance[0, 3], channel_axis=0)


def test_flushed_subnormals_pass_in_float32_but_not_in_float16():
    tiny = np.array([[1e-39]])
    zero32, zero16 = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float16)
    testing.assert_within(zero32, tiny, testing.sum_error_model(tiny, 0.0, 0, np.float32))
    half = np.array([[6e-6]])
    with pytest.raises(AssertionError):
        testing.assert_within(zero16, half, testing.sum_error_model(half, 0.0, 0, np.float16))


def test_ulps():
    one = np.float32(1)
    assert testing.ulps(np.nextafter(one, np.float32(2)), 1.0, np.float32) == 1
    assert testing.ulps(np.nextafter(one, np.float32(0)), 1.0, np.float32) == 0.5
    assert testing.ulps(np.float16(6e-8), 0.0, np.float16) == 1


def test_residual_and_activation():
    x, conv, bn = pair()
    residual = RNG(5).normal(size=(2, 6, 7, 5)).astype(np.float32)
    linear = testing.reference_conv_bn(x, conv, bn)
    for activation in (None, "relu", "relu6", "hardswish", "silu", "sigmoid", ("leaky_relu", 0.1)):
        expected = testing.reference_activation(linear + residual, activation)[0]
        got = testing.reference_conv_bn(x, conv, bn, residual=residual, activation=activation)
        assert np.array_equal(got, expected)
        options = {"residual": residual, "activation": activation}
        testing.assert_matches_reference(expected.astype(np.float32), x, conv, bn, **options)
        with pytest.raises(AssertionError):
            wrong = (expected + 1e-3).astype(np.float32)
            testing.assert_matches_reference(wrong, x, conv, bn, **options)


def test_unbatched_is_normalised_along_its_channels():
    x, conv, bn = pair()
    whole = testing.reference_conv_bn(x, conv, bn)
    np.testing.assert_allclose(testing.reference_conv_bn(x[0], conv, bn), whole[0], rtol=1e-13)
    testing.assert_matches_reference(whole[0].astype(np.float32), x[0], conv, bn)


def test_negative_variance_gives_nan_in_that_channel_only():
    x, conv, bn = pair()
    bn.running_var[2] = -1.0
    reference = testing.reference_conv_bn(x, conv, bn)
    assert np.isnan(reference[:, 2]).all() and np.isfinite(np.delete(reference, 2, axis=1)).all()
    testing.assert_matches_reference(reference.astype(np.float32), x, conv, bn)


def test_bn_without_affine_parameters_and_as_tuple():
    x, conv, _ = pair()
    bn = nn.BatchNorm2d(6, affine=False).eval()
    bn.running_mean[...] = 2.0
    parameters = (None, None, bn.running_mean, bn.running_var, bn.eps)
    assert np.array_equal(
        testing.reference_conv_bn(x, conv, bn), testing.reference_conv_bn(x, conv, parameters)
    )
    reference, tolerance = testing.error_model(
        x, conv.weight, conv.bias, bn=parameters, padding=1, groups=2
    )
    testing.assert_within(reference.astype(np.float32), reference, tolerance)


def test_batch_norm_error_model():
    x, _, bn = pair()
    x = x[:, :6]
    options = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    reference = testing.reference_batch_norm(x, *options, eps=bn.eps)
    tolerance = testing.batch_norm_error_model(x, *options, bn.eps)
    testing.assert_within(reference.astype(np.float32), reference, tolerance)
    with pytest.raises(AssertionError):
        wrong = testing.reference_batch_norm(x, *options, eps=0.0)
        testing.assert_within(wrong.astype(np.float32), reference, tolerance)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_torch_results_pass_in_every_precision(torch, dtype):
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    conv = torch.nn.Conv2d(16, 8, 3, padding=1, dtype=kind)
    bn = torch.nn.BatchNorm2d(8, dtype=kind).eval()
    bn.running_mean.normal_()
    x = torch.randn(2, 16, 9, 9, dtype=kind)
    actual = bn(conv(x))
    testing.assert_matches_reference(actual, x, conv, bn)
    with pytest.raises(AssertionError):
        testing.assert_matches_reference(actual.detach() * 1.5 + 1.0, x, conv, bn)


def test_empty_batch():
    x, conv, bn = pair()
    testing.assert_matches_reference(np.empty((0, 6, 7, 5), np.float32), x[:0], conv, bn)
