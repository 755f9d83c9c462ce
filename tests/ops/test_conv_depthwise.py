# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise row: shapes that have code of their own, special values, and the error of its sums."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import ISAS, assert_same_bits, forced  # noqa: E402


def depthwise(isa: str, w: np.ndarray, x: np.ndarray, b: np.ndarray | None = None, **options: object) -> pyconvbn.Plan:
    return forced("depthwise", isa, x.shape, w, b, **options)


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2), (3, 3)])
def test_sizes_threads_and_batches(
    isa: str, multiplier: int, kernel: int, stride: int, rng: np.random.Generator
) -> None:
    """Whole maps, strips and their borders; one run of planes ends inside an image or a channel when threads share."""
    channels = 7
    w = rng.integers(-3, 4, (channels * multiplier, 1, kernel, kernel)).astype(np.float32)
    b = rng.integers(-3, 4, channels * multiplier).astype(np.float32)
    arguments = dict(stride=stride, padding=kernel // 2, groups=channels)
    for size in ((7, 7), (14, 14), (13, 15), (23, 31), (9, 60)):
        x = rng.integers(-3, 4, (3, channels, *size)).astype(np.float32)
        plan = depthwise(isa, w, x, b, **arguments)
        want = testing.reference_conv(x, w, b, stride, kernel // 2, 1, channels)
        residual = rng.integers(-3, 4, want.shape).astype(np.float32)
        for threads in (1, 2, 3):
            pyconvbn.set_num_threads(threads)
            np.testing.assert_array_equal(plan(x), want)
            np.testing.assert_array_equal(plan(x, residual=residual), want + residual)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 14), (5, 1, 14), (3, 1, 40), (5, 2, 41), (7, 1, 30)])
def test_same_bits_for_any_threads_and_batch(
    isa: str, kernel: int, stride: int, size: int, rng: np.random.Generator
) -> None:
    w = rng.normal(size=(3, 1, kernel, kernel)).astype(np.float32)
    x = rng.normal(size=(2, 3, size, size)).astype(np.float32)
    assert_same_bits(depthwise(isa, w, x, stride=stride, padding=kernel // 2, groups=3), x, (2, 3, 4))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, 1, 7), (3, 1, 14), (3, 2, 17), (5, 1, 14), (7, 1, 20), (3, 3, 9)]
)
def test_infinite_weights_do_not_meet_the_padding(
    isa: str, multiplier: int, kernel: int, stride: int, size: int, rng: np.random.Generator
) -> None:
    """A tap outside the image contributes nothing, so inf * 0 may not make the border NaN."""
    w = np.ones((4 * multiplier, 1, kernel, kernel), np.float32)
    w[1, 0, 0, 0], w[2, 0, -1, 0], w[3, 0, kernel // 2, kernel // 2] = np.inf, -np.inf, np.nan
    x = rng.integers(1, 4, (2, 4, size, size)).astype(np.float32)
    residual = np.ones((2, 4 * multiplier, *((size - 1) // stride + 1,) * 2), np.float32)
    plan = depthwise(isa, w, x, stride=stride, padding=kernel // 2, groups=4, activation="relu6")
    want = testing.reference_conv(x, w, None, stride, kernel // 2, 1, 4) + residual
    assert np.isfinite(want[:, 1]).any() and np.isinf(want[:, 1]).any()
    assert np.isnan(want[:, 3]).all()
    np.testing.assert_array_equal(plan(x, residual=residual)[:, 1:4], np.clip(want, 0, 6)[:, 1:4])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, 1, 7), (5, 1, 14), (3, 2, 33), (5, 2, 40), (7, 1, 30), (3, 1, 56)]
)
def test_nonfinite_inputs_stay_in_place(
    isa: str, value: float, kernel: int, stride: int, size: int, rng: np.random.Generator
) -> None:
    w = rng.normal(size=(3, 1, kernel, kernel)).astype(np.float32)
    for where in ((0, 0), (size - 1, size - 1), (size // 2, 0), (size // 2, size - 1), (3, size // 2)):
        x = rng.normal(size=(1, 3, size, size)).astype(np.float32)
        x[0, 1][where] = value
        y = depthwise(isa, w, x, stride=stride, padding=kernel // 2, groups=3)(x)
        want = testing.reference_conv(x, w, None, stride, kernel // 2, 1, 3)
        assert not np.isfinite(want).all()
        np.testing.assert_array_equal(np.isfinite(y), np.isfinite(want))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 14), (3, 1, 40), (5, 1, 30), (5, 2, 40), (7, 1, 30)])
def test_error_is_that_of_a_sequential_sum(isa: str, kernel: int, stride: int, size: int) -> None:
    """The bias, which comes last in the sequential sum, may not enlarge the partial sums."""
    ours = chain = 0.0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        w = rng.normal(size=(16, 1, kernel, kernel)).astype(np.float32) / kernel
        b = (4 * rng.normal(size=16)).astype(np.float32)
        x = np.maximum(rng.normal(size=(1, 16, size, size)), 0).astype(np.float32)
        wide = np.pad(x, ((0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
        windows = np.lib.stride_tricks.sliding_window_view(wide, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
        products = windows.astype(np.float64) * w[None, :, 0, None, None]
        products = products.reshape(*products.shape[:4], -1)
        exact = products.sum(-1) + b[:, None, None].astype(np.float64)
        sums = np.zeros(exact.shape, np.float32)
        for tap in range(kernel * kernel):
            sums = (sums + products[..., tap]).astype(np.float32)
        sums += b[:, None, None]
        y = depthwise(isa, w, x, b, stride=stride, padding=kernel // 2, groups=16, precision="strict")(x)
        ours += float(np.sum((y - exact) ** 2))
        chain += float(np.sum((sums - exact) ** 2))
    assert math.sqrt(ours / chain) < 1.02
