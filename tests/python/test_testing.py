# SPDX-License-Identifier: BSD-3-Clause
"""The float64 reference itself: hand-computed cases, plain-Python loops, bad inputs."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from pyconvbn import nn, testing

RNG = np.random.default_rng


def arr(*values):
    return np.array(values, np.float64)


# -- hand-computed ------------------------------------------------------------------------------


def test_conv1d_stride_padding_dilation_by_hand():
    x = arr(1, 2, 3, 4, 5).reshape(1, 1, 5)
    w = arr(1, 10).reshape(1, 1, 2)
    conv = testing.reference_conv
    assert conv(x, w).tolist() == [[[21, 32, 43, 54]]]
    assert conv(x, w, arr(0.5)).tolist() == [[[21.5, 32.5, 43.5, 54.5]]]
    assert conv(x, w, stride=2).tolist() == [[[21, 43]]]
    assert conv(x, w, padding=1).tolist() == [[[10, 21, 32, 43, 54, 5]]]
    assert conv(x, w, dilation=3).tolist() == [[[41, 52]]]
    assert conv(x, w, stride=3, padding=2).tolist() == [[[0, 32, 5]]]
    # 'same' with an even kernel: the extra zero is on the right.
    assert conv(x, w, padding="same").tolist() == [[[21, 32, 43, 54, 5]]]
    assert conv(x, w, padding="valid").tolist() == conv(x, w).tolist()


def test_conv_padding_modes_by_hand():
    x = arr(1, 2, 3).reshape(1, 1, 3)
    w = arr(1, 0, 0).reshape(1, 1, 3)  # reads the left neighbour

    def left(mode):
        return testing.reference_conv(x, w, padding=2, padding_mode=mode).ravel().tolist()

    assert left("zeros") == [0, 0, 1, 2, 3]
    assert left("reflect") == [3, 2, 1, 2, 3]
    assert left("replicate") == [1, 1, 1, 2, 3]
    assert left("circular") == [2, 3, 1, 2, 3]


def test_conv2d_groups_and_unbatched_by_hand():
    x = arr(1, 2, 3, 4, 10, 20, 30, 40).reshape(2, 2, 2)
    w = arr(1, 1, 1, 1, 2, 0, 0, 0).reshape(2, 1, 2, 2)
    y = testing.reference_conv(x, w, arr(0, 1), groups=2)
    assert y.shape == (2, 1, 1) and y.ravel().tolist() == [10, 21]
    assert testing.reference_conv(x[None], w, arr(0, 1), groups=2).tolist() == [y.tolist()]


def test_conv_transpose_by_hand():
    conv_t = testing.reference_conv_transpose
    x = arr(1, 2).reshape(1, 1, 2)
    w = arr(1, 10, 100).reshape(1, 1, 3)
    assert conv_t(x, w).tolist() == [[[1, 12, 120, 200]]]
    assert conv_t(x, w, stride=2).tolist() == [[[1, 10, 102, 20, 200]]]
    assert conv_t(x, w, stride=2, padding=1).tolist() == [[[10, 102, 20]]]
    assert conv_t(x, w, stride=2, padding=1, output_padding=1).tolist() == [[[10, 102, 20, 200]]]
    assert conv_t(x, w, dilation=2).tolist() == [[[1, 2, 10, 20, 100, 200]]]
    # Two groups, 2 -> 4 channels: weight rows are input channels, columns the group's outputs.
    x = arr(1, 10).reshape(2, 1)
    w = arr(1, 2, 3, 4).reshape(2, 2, 1)
    assert conv_t(x, w, arr(0, 0, 0, 0.5), groups=2).ravel().tolist() == [1, 2, 30, 40.5]


def test_batch_norm_by_hand():
    x = arr(1, 3, 5, 7).reshape(1, 2, 2)
    mean, var = arr(1, 5), arr(4, 16)
    y = testing.reference_batch_norm(x, mean, var, arr(2, 4), arr(0, 1), eps=0.0)
    assert y.tolist() == [[[0, 2], [1, 3]]]
    batch = testing.reference_batch_norm(x, mean, var, training=True, eps=0.0)
    assert batch.tolist() == [[[-1, 1], [-1, 1]]]
    assert testing.reference_batch_norm(x, None, None, eps=0.0).tolist() == batch.tolist()
    new_mean, new_var = testing.reference_batch_norm_stats(x, mean, var, 0.5)
    assert new_mean.tolist() == [1.5, 5.5] and new_var.tolist() == [3.0, 9.0]


def test_fold_grouped_transposed_index_rule_by_hand():
    # ic=4, oc=6, groups=2: rows 0-1 serve outputs 0-2, rows 2-3 outputs 3-5.
    w = np.ones((4, 3, 1))
    scale = arr(1, 2, 3, 4, 5, 6)
    one = np.ones(6)
    folded, bias = testing.reference_fold_conv_bn(
        w, None, 0 * one, one, 0.0, scale, None, transpose=True, groups=2
    )
    assert folded[..., 0].tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6]]
    assert bias.tolist() == [0] * 6


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_folds_compute_the_same_as_unfolded(transpose, groups):
    rng = RNG(7)
    x, w = rng.normal(size=(2, 4, 5, 6)), rng.normal(size=(4, 6 // groups, 3, 2))
    if not transpose:
        w = rng.normal(size=(6, 4 // groups, 3, 2))
    conv = testing.reference_conv_transpose if transpose else testing.reference_conv
    b = rng.normal(size=6)

    def bn_of(size):
        mean, gamma = rng.normal(size=(2, size))
        return mean, rng.uniform(0.5, 2, size), 1e-3, gamma, b[:size]

    after = bn_of(6)
    mean, var, eps, gamma, beta = after
    w2, b2 = testing.reference_fold_conv_bn(w, b, *after, transpose=transpose, groups=groups)
    expected = testing.reference_batch_norm(
        conv(x, w, b, groups=groups), mean, var, gamma, beta, eps=eps
    )
    np.testing.assert_allclose(conv(x, w2, b2, groups=groups), expected, rtol=1e-12, atol=1e-12)

    before = bn_of(4)
    mean, var, eps, gamma, beta = before
    if transpose:  # exact only without a shift
        mean, beta = 0 * mean, None
    w3, b3 = testing.reference_fold_bn_conv(
        mean, var, eps, gamma, beta, w, b, groups=groups, transpose=transpose
    )
    expected = conv(
        testing.reference_batch_norm(x, mean, var, gamma, beta, eps=eps), w, b, groups=groups
    )
    np.testing.assert_allclose(conv(x, w3, b3, groups=groups), expected, rtol=1e-12, atol=1e-12)


def test_fold_linear_by_hand():
    w, b = arr(1, 2, 3, 4).reshape(2, 2), arr(1, 2)
    folded, bias = testing.reference_fold_linear_bn(w, b, arr(1), arr(4), 0.0, arr(6), arr(10))
    assert folded.tolist() == [[3, 6], [9, 12]] and bias.tolist() == [10, 13]


def test_elementwise_by_hand():
    x = arr(-4, -1, 0, 2, 7)
    assert testing.reference_relu(x).tolist() == [0, 0, 0, 2, 7]
    assert testing.reference_relu6(x).tolist() == [0, 0, 0, 2, 6]
    assert testing.reference_hardtanh(x).tolist() == [-1, -1, 0, 1, 1]
    assert testing.reference_leaky_relu(x, 0.5).tolist() == [-2, -0.5, 0, 2, 7]
    assert testing.reference_hardswish(x).tolist() == [0, -2 / 6, 0, 10 / 6, 7]
    assert testing.reference_sigmoid(arr(0, math.log(3))).tolist() == pytest.approx([0.5, 0.75])
    assert testing.reference_silu(arr(math.log(3)))[0] == pytest.approx(0.75 * math.log(3))
    assert testing.reference_gelu(arr(0.0, 1.0)).tolist() == pytest.approx([0, 0.8413447460685429])
    assert testing.reference_softmax(arr(0, math.log(3), 1000) - 1000)[2] == pytest.approx(1)
    assert np.isnan(testing.reference_relu(arr(math.nan)))[0]


def test_pools_by_hand():
    x = arr(1, 5, 2, 3, math.nan).reshape(1, 5)
    assert testing.reference_max_pool(1, x[:, :4], 2, 1).tolist() == [[5, 5, 3]]
    assert testing.reference_max_pool(1, x[:, :4] - 9, 3, 2, 1).tolist() == [[-4, -4]]
    assert np.isnan(testing.reference_max_pool(1, x, 2, 1)).tolist() == [[False] * 3 + [True]]
    ones = np.ones((1, 5))
    avg = testing.reference_avg_pool
    assert avg(1, ones, 2, 2, 1).tolist() == [[0.5, 1, 1]]
    assert avg(1, ones, 2, 2, 1, count_include_pad=False).tolist() == [[1, 1, 1]]
    assert avg(1, ones, 2, 2, 0, ceil_mode=True).tolist() == [[1, 1, 1]]
    # ceil_mode: the part of a window beyond the right padding counts for nothing ...
    assert avg(1, ones[:, :4], 3, 2, 1, ceil_mode=True).tolist() == [[2 / 3, 1, 0.5]]
    # ... and a window that would start there does not exist.
    assert avg(1, ones, 3, 3, 1, ceil_mode=True).tolist() == [[2 / 3, 1]]
    assert avg(1, ones, 2, 2, divisor_override=4).tolist() == [[0.5, 0.5]]
    adaptive = testing.reference_adaptive_avg_pool(1, arr(1, 2, 3, 4, 5).reshape(1, 5), 3)
    assert adaptive.tolist() == [[1.5, 3, 4.5]]


def test_pad_interpolate_flatten_by_hand():
    x = arr(1, 2, 3)
    assert testing.reference_pad(x, (1, 2), value=9).tolist() == [9, 1, 2, 3, 9, 9]
    assert testing.reference_pad(x, (-1, 1)).tolist() == [2, 3, 0]
    assert testing.reference_pad(x, (2, -1)).tolist() == [0, 0, 1, 2]
    above = testing.reference_pad(x.reshape(1, 3), (0, 0, 1, 0), value=7)
    assert above.tolist() == [[7] * 3, [1, 2, 3]]
    assert testing.reference_pad(x, (1, 2), "circular").tolist() == [3, 1, 2, 3, 1, 2]
    line = arr(0, 4).reshape(1, 1, 2)
    assert testing.reference_interpolate(line, 4).ravel().tolist() == [0, 0, 4, 4]
    linear = testing.reference_interpolate(line, scale_factor=2, mode="linear")
    assert linear.ravel().tolist() == [0, 1, 3, 4]
    aligned = testing.reference_interpolate(line, 3, mode="linear", align_corners=True)
    assert aligned.ravel().tolist() == [0, 2, 4]
    assert testing.reference_flatten(np.zeros((2, 3, 4)), 1).shape == (2, 12)


def test_zero_padding_is_absence_not_a_product_with_zero():
    x, w = np.ones((1, 1, 3)), arr(math.inf, 1).reshape(1, 1, 2)
    assert testing.reference_conv(x, w, padding=1).ravel().tolist() == [1, *[math.inf] * 3]


# -- a second, even more literal implementation -------------------------------------------------


def scalar_conv(x, w, b, stride, padding, dilation, groups):
    """One Python multiplication at a time, straight from the formula."""
    n_, _, *size = x.shape
    oc, icg, *kernel = w.shape
    nd = len(kernel)
    out_size = [
        (size[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a in range(nd)
    ]
    y = np.zeros((n_, oc, *out_size))
    for n, o in product(range(n_), range(oc)):
        for at in product(*map(range, out_size)):
            total = b[o]
            for i in range(icg):
                for tap in product(*map(range, kernel)):
                    source = [
                        at[a] * stride[a] - padding[a] + tap[a] * dilation[a] for a in range(nd)
                    ]
                    if all(0 <= source[a] < size[a] for a in range(nd)):
                        total += w[(o, i, *tap)] * x[(n, o // (oc // groups) * icg + i, *source)]
            y[(n, o, *at)] = total
    return y


@pytest.mark.parametrize("seed", range(12))
def test_reference_conv_equals_scalar_loops_exactly_on_integers(seed):
    rng = RNG(seed)
    nd, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))

    def axes(high, low=1):
        return [int(v) for v in rng.integers(low, high, nd)]

    kernel, stride, dilation, padding = axes(4), axes(4), axes(3), axes(3, 0)
    size = [d * (k - 1) + 1 + int(rng.integers(0, 4)) for k, d in zip(kernel, dilation)]
    x = rng.integers(-9, 10, (2, 2 * groups, *size)).astype(np.float64)
    w = rng.integers(-9, 10, (groups, 2, *kernel)).astype(np.float64)
    b = rng.integers(-9, 10, groups).astype(np.float64)
    got = testing.reference_conv(x, w, b, stride, padding, dilation, groups)
    assert np.array_equal(got, scalar_conv(x, w, b, stride, padding, dilation, groups))


@pytest.mark.parametrize("seed", range(12))
def test_reference_conv_transpose_is_the_adjoint_of_conv(seed):
    """<conv(x), y> == <x, conv_transpose(y)> with the same weight, exactly on integers."""
    rng = RNG(100 + seed)
    nd, groups = int(rng.integers(1, 4)), int(rng.integers(1, 3))

    def axes(high, low=1):
        return [int(v) for v in rng.integers(low, high, nd)]

    kernel, stride, dilation, padding = axes(4), axes(4), axes(3), axes(3, 0)
    size = [d * (k - 1) + 1 + int(rng.integers(0, 4)) for k, d in zip(kernel, dilation)]
    x = rng.integers(-9, 10, (1, 2 * groups, *size)).astype(np.float64)
    w = rng.integers(-9, 10, (3 * groups, 2, *kernel)).astype(np.float64)
    forward = testing.reference_conv(x, w, None, stride, padding, dilation, groups)
    y = rng.integers(-9, 10, forward.shape).astype(np.float64)
    rest = [
        i + 2 * p - d * (k - 1) - 1 - (o - 1) * s
        for i, p, d, k, o, s in zip(size, padding, dilation, kernel, forward.shape[2:], stride)
    ]
    if any(r >= max(s, d) for r, s, d in zip(rest, stride, dilation)):
        pytest.fail("the remainder of a division by the stride is below the stride")
    back = testing.reference_conv_transpose(y, w, None, stride, padding, rest, groups, dilation)
    assert back.shape == x.shape
    assert (forward * y).sum() == (back * x).sum()


# -- inputs -------------------------------------------------------------------------------------


def test_half_is_widened_exactly_and_the_result_is_float64():
    x = np.full((1, 1, 2), 1024.5, np.float16)
    w = np.full((1, 1, 2), 1.0009765625, np.float16)
    y = testing.reference_conv(x, w)
    assert y.dtype == np.float64
    assert y[0, 0, 0] == 2 * float(x[0, 0, 0]) * float(w[0, 0, 0])


def test_any_strides_and_byte_order():
    x = RNG(0).normal(size=(2, 3, 4, 5))
    w = RNG(1).normal(size=(2, 3, 2, 2))
    expected = testing.reference_conv(x, w)
    assert np.array_equal(testing.reference_conv(np.asfortranarray(x), w), expected)
    assert np.array_equal(testing.reference_conv(x[:, :, ::-1][:, :, ::-1], w), expected)
    assert np.array_equal(testing.reference_conv(x.astype(">f8"), w), expected)


@pytest.mark.parametrize(
    "bad", [[[[1.0]]], np.ones((1, 1, 1), np.int64), np.ones((1, 1, 1), complex)]
)
def test_arrays_that_are_not_floating_point_are_refused(bad):
    with pytest.raises(TypeError, match="input"):
        testing.reference_conv(bad, np.ones((1, 1, 1)))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x, w: testing.reference_conv(x, w, np.ones(9)), "bias"),
        (lambda x, w: testing.reference_conv(x, w, groups=4), "groups"),
        (lambda x, w: testing.reference_conv(x[:, :1], w), "channels"),
        (lambda x, w: testing.reference_conv(x, w, dilation=9), "output size"),
        (lambda x, w: testing.reference_conv(x, w, padding="same", stride=2), "same"),
        (lambda x, w: testing.reference_conv(x[0, 0], w), "axes"),
        (lambda x, w: testing.reference_conv(x, w, padding=1, padding_mode="mirror"), "_mode"),
        (lambda x, w: testing.reference_conv(x, w, stride=(1, 2)), "stride"),
        (lambda x, w: testing.reference_conv_transpose(x, w[:2], output_padding=1), "output_pad"),
        (lambda x, w: testing.reference_linear(x, w[0]), "weight"),
        (lambda x, w: testing.reference_batch_norm(x, np.ones(3), np.ones(3)), "running_mean"),
        (lambda x, w: testing.reference_max_pool(1, x, 2, 1, 2), "padding"),
        (lambda x, w: testing.reference_pad(x, (5, 5), "reflect"), "padding"),
        (lambda x, w: testing.reference_interpolate(x), "size"),
        (lambda x, w: testing.reference_gelu(x, "erf"), "approximate"),
        (lambda x, w: testing.reference_activation(x, "swish"), "activation"),
    ],
)
def test_errors_name_the_argument(call, names):
    with pytest.raises(ValueError, match=names):
        call(np.ones((1, 2, 4)), np.ones((3, 2, 2)))


def test_reads_anything_with_the_attributes():
    x = RNG(0).normal(size=(2, 4, 5, 5)).astype(np.float32)
    ours = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    record = SimpleNamespace(
        weight=ours.weight, bias=ours.bias, stride=2, groups=2, transposed=True
    )
    expected = testing.reference_conv_bn(x, ours)
    assert np.array_equal(testing.reference_conv_bn(x, record), expected)
    longer = testing.reference_conv_bn(x, ours, output_size=(12, 12))
    assert longer.shape == (2, 6, 12, 12)
    assert np.array_equal(longer[:, :, :11, :11], expected)
    with pytest.raises(ValueError, match="output_size"):
        testing.reference_conv_bn(x, nn.Conv2d(4, 6, 3), output_size=(3, 3))


@pytest.mark.oracle
def test_reads_torch_modules_and_tensors(torch):
    x = RNG(0).normal(size=(2, 4, 5, 5)).astype(np.float32)
    ours = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    theirs = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(np.asarray(ours.weight)))
        theirs.bias.copy_(torch.from_numpy(np.asarray(ours.bias)))
    expected = testing.reference_conv_bn(x, ours)
    assert np.array_equal(testing.reference_conv_bn(torch.from_numpy(x), theirs), expected)
    longer = theirs(torch.from_numpy(x), output_size=(12, 12))
    testing.assert_matches_reference(longer, x, theirs, output_size=(12, 12))
