# SPDX-License-Identifier: BSD-3-Clause
"""The bfloat16 matrix engine: its logic on emulated tiles everywhere, on real ones where this CPU has them.

Speed is not the matter here. Whole numbers below 2^8 are one bfloat16 term, so their sums are exact and any wrong index
shows; random numbers show that six products of three terms are as good as float32.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import assert_failures_are_clean, forced, why_not  # noqa: E402

T = _core._testing
UNITS = ["amx_emulated", *(["amx"] if "amx" in T.isas() else [])]

# (spatial size, kernel, stride, padding, dilation), ic, oc, groups
CASES: list[tuple[tuple[Any, ...], int, int, int]] = [
    (((5, 7), (3, 3), 1, 1, 1), 16, 16, 1),
    (((9, 6), (3, 3), (2, 2), 1, 1), 33, 47, 1),
    (((11, 10), (5, 3), (3, 2), (2, 0), 1), 40, 32, 1),
    (((13, 14), (3, 3), 1, (4, 5), (4, 5)), 32, 16, 1),
    (((8, 8), (3, 2), (2, 1), (0, 1), (2, 3)), 17, 31, 1),
    (((7, 7), (1, 1), 1, 0, 1), 64, 70, 1),
    (((8, 9), (1, 1), 2, 0, 1), 35, 16, 1),
    (((1, 40), (1, 7), 1, (0, 3), 1), 16, 33, 1),
    (((50,), (7,), 2, 3, 1), 20, 18, 1),
    (((70,), (3,), 1, 64, 64), 16, 16, 1),
    (((4, 5, 6), (3, 3, 3), 1, 1, 1), 16, 20, 1),
    (((5, 6, 7), (3, 1, 2), (2, 1, 2), (1, 0, 1), (1, 1, 2)), 34, 16, 1),
    (((6, 6), (3, 3), 1, 1, 1), 48, 64, 2),
    (((2, 2), (3, 3), 1, 2, 1), 16, 16, 1),
]


def plan_for(unit: str, case: tuple[Any, ...], rng: np.random.Generator, integers: bool, **more: Any) -> tuple[Any, ...]:
    (size, kernel, stride, padding, dilation), ic, oc, groups = case
    draw = (lambda *s: rng.integers(-4, 5, s)) if integers else (lambda *s: rng.normal(0.2, 1, s))
    x = draw(3, ic, *size).astype(np.float32)
    w = draw(oc, ic // groups, *kernel).astype(np.float32)
    b = draw(oc).astype(np.float32)
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    plan = forced("amx", unit, x.shape, w, b, **geometry, **more)
    double = pyconvbn.Plan(w.astype(np.float64), b.astype(np.float64), **geometry)
    return plan, x, double(x.astype(np.float64)), w


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("unit", UNITS)
def test_whole_numbers_are_exact(unit: str, case: tuple[Any, ...]) -> None:
    plan, x, exact, _ = plan_for(unit, case, np.random.default_rng(3), integers=True)
    np.testing.assert_array_equal(plan(x), exact)


@pytest.mark.parametrize("unit", UNITS)
def test_error_is_below_that_of_a_float32_chain(unit: str) -> None:
    ratios = []
    for seed in range(6):
        plan, x, exact, w = plan_for(unit, CASES[0], np.random.default_rng(seed), integers=False)
        chain = forced("ref", "scalar", x.shape, w, padding=1)
        bias = (plan(x * 0))[0, :, 0, 0]
        sequential = chain(x) + bias[:, None, None]
        ratios.append(np.sqrt(np.mean((plan(x) - exact) ** 2)) / np.sqrt(np.mean((sequential - exact) ** 2)))
    assert max(ratios) < 1.1, ratios


@pytest.mark.parametrize("unit", UNITS)
def test_residual_activation_threads_and_batches(unit: str) -> None:
    rng = np.random.default_rng(5)
    plan, x, exact, _ = plan_for(unit, CASES[1], rng, integers=True, activation="relu")
    r = rng.integers(-30, 30, exact.shape).astype(np.float32)
    expected = np.maximum(exact + r, 0)
    assert 0.1 < np.mean(expected == 0) < 0.9
    before = pyconvbn.get_num_threads()
    try:
        for threads, n in itertools.product((1, 2), (1, 3)):
            pyconvbn.set_num_threads(threads)
            np.testing.assert_array_equal(plan(x[:n], residual=r[:n]), expected[:n])
    finally:
        pyconvbn.set_num_threads(before)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, np.float32(3.4e38)])
@pytest.mark.parametrize("unit", UNITS)
def test_inf_and_nan_stay_in_place(unit: str, value: float) -> None:
    plan, x, _, w = plan_for(unit, CASES[1], np.random.default_rng(7), integers=False)
    x[1, 2, 3, 4] = value
    plain = forced("direct", "scalar", x.shape, w, stride=2, padding=1)
    y, reference = plan(x), plain(x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(reference))
    np.testing.assert_array_equal(np.isinf(y), np.isinf(reference))
    assert np.all(np.isfinite(y[[0, 2]]))


@pytest.mark.parametrize("unit", UNITS)
def test_wide_range_of_magnitudes(unit: str) -> None:
    """Three terms cover 24 bits at every size; numbers near the largest are cut, not rounded to infinity."""
    rng = np.random.default_rng(9)
    w = np.zeros((16, 16, 1, 1), np.float32)
    w[np.arange(16), np.arange(16)] = 1
    x = (rng.uniform(1, 2, (1, 16, 4, 5)) * 2.0 ** rng.integers(-100, 127, (1, 16, 4, 5))).astype(np.float32)
    x[0, 0, 0, :2] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    np.testing.assert_array_equal(forced("amx", unit, x.shape, w)(x), x)


def test_refusals_have_reasons() -> None:
    def reason(*shape: int, x: tuple[int, ...], isa: str = "amx_emulated", **geometry: Any) -> str:
        return why_not("amx", T.plan_with_isa(isa, np.zeros(shape, np.float32), **geometry), x)

    assert reason(16, 8, 3, 3, x=(1, 8, 9, 9)) == "a group has fewer than 16 channels"
    assert reason(16, 16, 3, 3, x=(1, 16, 9, 9), transposed=True) == "transposed"
    assert reason(16, 16, x=(1, 16)) == "linear"
    assert reason(16, 16, 3, 3, x=(1, 16, 9, 9), isa="scalar") == "no AMX unit, or it is not enabled"


def test_failed_allocations_leave_nothing() -> None:
    w, x = np.ones((16, 16, 3, 3), np.float32), np.ones((1, 16, 6, 6), np.float32)
    want = np.full((1, 16, 4, 4), 144, np.float32)
    assert_failures_are_clean(lambda: T.plan_with_isa("amx_emulated", w), "amx", x, want)
