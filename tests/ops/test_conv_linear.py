# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers: the row `linear` against float64, and the same bits for any number of rows and threads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import ISAS, assert_same_bits, forced  # noqa: E402

SIZES = [(1, 1), (7, 5), (33, 130), (300, 17), (1500, 65), (2600, 48)]


def linear(isa: str, w: np.ndarray, b: np.ndarray | None, n: int, **options: object) -> pyconvbn.Plan:
    return forced("linear", isa, (n, w.shape[1]), w, b, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("ic", "oc"), SIZES)
def test_linear_matches_the_reference(isa: str, ic: int, oc: int, rng: np.random.Generator) -> None:
    w, b = rng.standard_normal((oc, ic)).astype(np.float32), rng.standard_normal(oc).astype(np.float32)
    for n in (1, 2, 3, 4, 6, 7, 13, 50, 97):
        x = rng.standard_normal((n, ic)).astype(np.float32)
        reference, tolerance = testing.error_model(x, w, b)
        testing.assert_within(linear(isa, w, b, n)(x), reference, tolerance, channel_axis=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("ic", "oc"), SIZES)
def test_rows_do_not_depend_on_their_number(isa: str, ic: int, oc: int, rng: np.random.Generator) -> None:
    """A row alone has the bits it has in a batch; residual and activation included."""
    w, b = rng.standard_normal((oc, ic)).astype(np.float32), rng.standard_normal(oc).astype(np.float32)
    x, residual = (rng.standard_normal((55, c)).astype(np.float32) for c in (ic, oc))
    plan = linear(isa, w, b, 55, activation="relu")
    whole = plan(x, residual=residual)
    assert np.all(whole >= 0)
    for n in (1, 2, 3, 5, 8):
        np.testing.assert_array_equal(plan(x[:n], residual=residual[:n]), whole[:n])


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_rows_do_not_depend_on_threads(rows: int, rng: np.random.Generator) -> None:
    w = rng.standard_normal((700, 1200)).astype(np.float32)
    x = rng.standard_normal((rows, 1200)).astype(np.float32)
    plan = pyconvbn.Plan(w)
    assert plan.explain(x.shape)["algorithm"] == "linear"
    assert_same_bits(plan, x)


@pytest.mark.parametrize("isa", ISAS)
def test_nonfinite_values_stay_in_their_row(isa: str, rng: np.random.Generator) -> None:
    w = rng.standard_normal((40, 100)).astype(np.float32)
    x = rng.standard_normal((9, 100)).astype(np.float32)
    plan = linear(isa, w, None, 9)
    clean = plan(x)
    x[4, 50] = np.nan
    out = plan(x)
    assert np.all(np.isnan(out[4]))
    np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(clean, 4, 0))
