# SPDX-License-Identifier: BSD-3-Clause
"""1x1 convolutions by the row `strassen` (precision "fast"): sizes, residual, threads, Inf, NaN, overflow, accuracy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import testing
from pyconvbn._core import _testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import ISAS, arrays, assert_failures_are_clean, assert_same_bits, forced, why_not  # noqa: E402

# n, groups, ic, oc of a group; size. Two panels of AVX-512 are 96 pixels: there are planes of one pair and of many,
# with and without pixels beyond the pairs, and channels of one and of several batches.
LAYERS = [
    (1, 1, 128, 128, (8, 12)),
    (2, 1, 130, 134, (13, 17)),
    (1, 2, 128, 142, (97,)),
    (1, 1, 514, 166, (14, 15)),
    (1, 1, 150, 300, (5, 7, 11)),
    (1, 1, 1100, 128, (12, 13)),
]


def problem(layer: tuple, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    n, groups, ic, oc, size = layer
    return *arrays(rng, n, groups * ic, groups * oc, size, (1,) * len(size), groups), {"groups": groups}


def plan_for(
    isa: str, w: np.ndarray, b: np.ndarray, shape: tuple[int, ...], row: str = "strassen", **options: Any
) -> pyconvbn.Plan:
    return forced(row, isa, shape, w, b, precision="fast", **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_matches_the_reference(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    """Within the stated bound for the norm, with room to spare; rms at most three times that of a sequential sum."""
    x, w, b, geometry = problem(layer, rng)
    reference, _ = testing.error_model(x, w, b, **geometry)
    error = plan_for(isa, w, b, x.shape, **geometry)(x).astype(np.float64) - reference
    n = layer[2]
    bound = (18 * (n * n / 4 + 3 * n) - 6 * n) * 2.0**-24 * np.abs(x).max() * np.abs(w).max()
    assert np.abs(error).max() <= 0.01 * bound
    sequential = plan_for(isa, w, b, x.shape, "ref", **geometry)(x) - reference
    assert np.sqrt(np.mean(error**2)) <= 3 * np.sqrt(np.mean(sequential**2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_whole_numbers_are_exact(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    """All sums are exact, so that one misplaced or missing product shows; residual and clamp included."""
    x, w, b, geometry = problem(layer, rng)
    x, w, b = np.rint(3 * x), np.rint(3 * w), np.rint(9 * b)
    exact = plan_for(isa, w, b, x.shape, "ref", **geometry)(x)
    plain = plan_for(isa, w, b, x.shape, **geometry)
    np.testing.assert_array_equal(plain(x), exact)
    residual = np.rint(99 * rng.standard_normal(exact.shape)).astype(np.float32)
    np.testing.assert_array_equal(plain(x, residual=residual), exact + residual)
    relu = plan_for(isa, w, b, x.shape, activation="relu", **geometry)
    np.testing.assert_array_equal(relu(x), np.maximum(exact, 0))
    np.testing.assert_array_equal(relu(x, residual=residual), np.maximum(exact + residual, 0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_same_bits_for_any_threads_and_batch(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    x = np.concatenate([x, x[::-1]])
    assert_same_bits(plan_for(isa, w, b, x.shape, **geometry), x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("channel", [0, 66, 129])
@pytest.mark.parametrize("pixel", [0, 20, 95, 99])
def test_nonfinite_values_stay_in_their_pixel(
    isa: str, value: float, channel: int, pixel: int, rng: np.random.Generator
) -> None:
    x, w, b, _ = problem((3, 1, 130, 128, (100,)), rng)
    plan = plan_for(isa, w, b, x.shape, activation="relu")
    clean = plan(x)
    reference = plan_for(isa, w, b, x.shape, "ref", activation="relu")
    x[1, channel, pixel] = value
    out = plan(x)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(reference(x)))
    np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(clean, 1, 0))
    others = np.delete(np.arange(100), pixel)
    np.testing.assert_allclose(out[1][:, others], clean[1][:, others], rtol=0, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_what_would_overflow_on_the_way_does_not(isa: str, rng: np.random.Generator) -> None:
    """Finite inputs whose sums T, and products of these, are beyond float32, while every result is small."""
    x, w, b, _ = problem((1, 1, 128, 128, (96,)), rng)
    largest = np.finfo(np.float32).max
    x[0, 5] = np.where(np.arange(96) // 4 % 2 == 0, largest, -largest)
    w[:, 5] = 1e-38
    plan, reference = plan_for(isa, w, b, x.shape), plan_for(isa, w, b, x.shape, "ref")
    np.testing.assert_allclose(plan(x), reference(x), rtol=0, atol=1e-3)
    assert np.all(np.isfinite(plan(x)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38])
def test_weights_that_are_not_finite_stay_in_their_channel(isa: str, value: float, rng: np.random.Generator) -> None:
    x, w, b, _ = problem((1, 1, 128, 128, (97,)), rng)
    clean = plan_for(isa, w, b, x.shape)(x)
    w[70, 3] = value
    out, reference = plan_for(isa, w, b, x.shape)(x), plan_for(isa, w, b, x.shape, "ref")(x)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(reference))
    others = np.delete(np.arange(128), 70)
    np.testing.assert_allclose(out[:, others], clean[:, others], rtol=0, atol=1e-3)


def test_workspace_is_what_explain_says(rng: np.random.Generator) -> None:
    x, w, b, _ = problem((1, 1, 514, 166, (14, 15)), rng)
    report = plan_for(ISAS[0], w, b, x.shape).memory(x.shape)
    assert 0 < report["workspace"] <= 8 << 20
    # One level needs 7/4 of the weights, or twice as much where pixels are left over.
    assert 7 * w.nbytes // 4 <= report["packed"] <= 2 * w.nbytes + 4096


def test_refusals_have_reasons() -> None:
    def reason(oc: int, ic: int, *kernel: int, precision: str = "fast", size: int = 40, **options: Any) -> str:
        plan = pyconvbn.Plan(np.zeros((oc, ic, *kernel), np.float32), precision=precision, **options)
        return why_not("strassen", plan, (1, ic, *(size for _ in kernel)))

    assert reason(128, 128, 1, 1, precision="fp32") == "precision is not fast"
    assert reason(128, 129, 1, 1) == "odd number of channels"
    assert reason(131, 128, 1, 1) == "odd number of channels"
    assert reason(126, 128, 1, 1) == "fewer than 128 channels"
    assert reason(128, 128, 3, 3) == "kernel is not 1"
    assert reason(128, 128, 1, 1, stride=2) == "stride is not 1"
    assert reason(128, 128, 1, 1, padding=1) == "padding is not 0"
    assert reason(128, 128, 1, 1, transposed=True) == "transposed"
    assert reason(128, 128, 1, 1, size=7) == "the map is small"
    assert reason(128, 128) == "linear has no pixels to put into lanes"


def test_failed_allocations_leave_nothing(rng: np.random.Generator) -> None:
    x, w, b, _ = problem((1, 1, 128, 128, (97,)), rng)
    want = plan_for(ISAS[0], w, b, x.shape)(x)
    assert_failures_are_clean(lambda: _testing.plan_with_isa(ISAS[0], w, b, precision="fast"), "strassen", x, want)
