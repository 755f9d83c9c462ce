# SPDX-License-Identifier: BSD-3-Clause
"""The row `taps`: every geometry it accepts, to the bit what `direct` computes, for any batch and number of threads."""

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
from rows_util import ISAS, arrays, assert_same_bits, forced, why_not  # noqa: E402

# groups, ic, oc (of a group), input, kernel, stride, padding, dilation
CASES: list[tuple[int, int, int, tuple[int, ...], Any, Any, Any, Any]] = [
    (8, 4, 4, (19, 21), 3, 1, 1, 1),
    (3, 16, 16, (14, 14), 3, 1, 1, 1),
    (2, 5, 7, (11, 40), 3, 2, 1, 1),
    (2, 7, 9, (23, 17), (3, 2), (2, 1), (1, 0), (1, 3)),
    (1, 3, 13, (30, 33), 7, 2, 3, 1),
    (1, 9, 3, (17, 50), 5, 1, 2, 1),
    (1, 4, 2, (16, 16), 3, 3, 1, 2),
    (1, 4, 1, (25, 9), (1, 2), (3, 4), 0, 1),
    (2, 6, 4, (9, 3), 3, 1, 1, 1),
    (1, 3, 4, (40, 40), 3, 1, 12, 12),
    (1, 32, 32, (2000,), 2, 1, 0, 1),
    (2, 6, 5, (333,), 11, 1, 25, 5),
    (1, 8, 6, (200,), 5, 4, 2, 1),
    (1, 4, 6, (5, 9, 11), 3, 1, 1, 1),
    (2, 3, 3, (6, 7, 20), (2, 3, 3), (2, 1, 2), (1, 1, 0), (1, 2, 1)),
    # planes of the output that meet only some taps of depth, or none
    (1, 4, 6, (5, 9, 11), (5, 3, 3), 1, (4, 1, 1), 1),
    (2, 3, 5, (4, 7, 20), (3, 1, 3), (2, 1, 1), (6, 0, 1), (3, 1, 2)),
    (1, 3, 5, (3, 5, 19), (2, 1, 3), 1, (3, 0, 1), 1),
    # rows that are read where they are
    (1, 5, 6, (7, 50), (1, 3), (2, 1), 0, (1, 2)),
    (2, 3, 4, (3, 4, 30), (1, 1, 4), 1, 0, 1),
]


def make(case: Any, rng: np.random.Generator, batch: int, isa: str, **options: Any) -> tuple[Any, ...]:
    groups, ic, oc, size, kernel, stride, padding, dilation = case
    taps = (kernel,) * len(size) if isinstance(kernel, int) else kernel
    x, w, b = arrays(rng, batch, groups * ic, groups * oc, size, taps, groups)
    geometry = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return x, w, b, geometry, forced("taps", isa, x.shape, w, b, **geometry, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference_and_direct(isa: str, case: Any, rng: np.random.Generator) -> None:
    x, w, b, geometry, plan = make(case, rng, 2, isa)
    out = plan(x)
    reference, tolerance = testing.error_model(x, w, b, **geometry)
    testing.assert_within(out, reference, tolerance, channel_axis=1)
    _testing.plan_force(plan, x.shape, "direct")
    np.testing.assert_array_equal(out, plan(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_residual_and_activation(isa: str, case: Any, rng: np.random.Generator) -> None:
    x, _, _, _, plain = make(case, np.random.default_rng(7), 1, isa)
    plan = make(case, np.random.default_rng(7), 1, isa, activation="relu6")[-1]
    residual = rng.normal(size=plain(x).shape).astype(np.float32)
    np.testing.assert_array_equal(plan(x, residual=residual), np.clip(plain(x) + residual, 0, 6))
    np.testing.assert_array_equal(plan(x), np.clip(plain(x), 0, 6))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_and_batch_do_not_change_a_bit(case: Any, rng: np.random.Generator) -> None:
    x, *_, plan = make(case, rng, 3, ISAS[0])
    assert_same_bits(plan, x, (2, 5))


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf_stay_in_place(isa: str, rng: np.random.Generator) -> None:
    x, *_, plan = make(CASES[0], rng, 1, isa)
    clean = plan(x)
    x[0, 5, 3, 20], x[0, 30, 10, 8] = np.nan, np.inf
    changed = plan(x) != clean
    want = np.zeros_like(changed)
    want[0, 4:8, 2:5, 19:21] = want[0, 28:32, 9:12, 7:10] = True
    np.testing.assert_array_equal(changed, want)


def test_infinite_weights_do_not_meet_the_padding(rng: np.random.Generator) -> None:
    w = rng.normal(size=(8, 4, 3, 3)).astype(np.float32)
    w[1, 2, 0, 0], w[6, 0, 2, 1] = np.inf, np.nan
    x = rng.normal(size=(3, 8, 9, 20)).astype(np.float32)
    plan = pyconvbn.Plan(w, groups=2, padding=1)
    _testing.plan_force(plan, x.shape, "direct")
    want = plan(x)
    _testing.plan_force(plan, x.shape, "taps")
    np.testing.assert_array_equal(plan(x), want)
    assert np.isfinite(want[:, 1, 0]).all() and np.isinf(want[:, 1, 1:, 1:]).all()


def test_what_it_does_not_take() -> None:
    def why(w: np.ndarray, shape: tuple[int, ...], **geometry: Any) -> str:
        return why_not("taps", pyconvbn.Plan(w, **geometry), shape)

    w = np.ones((4, 4, 3, 3), np.float32)
    assert why(w, (1, 4, 8, 8), transposed=True) == "transposed"
    assert "float32" in why(w.astype(np.float64), (1, 4, 8, 8))
    assert "pixels" in why(w[:, :, 0, 0], (1, 4))
    assert why(w[:, :, :1, :1], (1, 4, 8, 8)) == "kernel is 1"
    assert "too large" in why(w, (1, 4, 5000, 5000), dilation=2000)


@pytest.mark.vector_isa
def test_chosen_for_few_channels_a_group() -> None:
    w = np.ones((128, 4, 3, 3), np.float32)
    assert pyconvbn.Plan(w, groups=32, padding=1).explain((1, 128, 56, 56))["algorithm"] == "taps"
