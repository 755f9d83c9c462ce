# SPDX-License-Identifier: BSD-3-Clause
"""linear and linear_raw of every instruction set: the same sums, in the order of the inputs. Guard pages around the
arrays are the business of tests/c/check_linear.c."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyconvbn import _core

T = _core._testing
ISAS = T.isas()
RAW_ROWS = 3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("ic", "oc"), [(1, 1), (5, 40), (16, 7), (64, 64), (211, 75), (500, 33)])
def test_same_bits_packed_or_not(isa: str, ic: int, oc: int, rng: np.random.Generator) -> None:
    width = 2 * T.tile_sizes(isa)["lanes"]
    w, bias = rng.standard_normal((oc, ic), np.float32), rng.standard_normal(oc, np.float32)
    w[oc // 2, ic // 2] = np.nan
    padded = np.zeros((-(-oc // width) * width, ic), np.float32)
    padded[:oc] = w
    packed = np.ascontiguousarray(padded.reshape(-1, width, ic).transpose(0, 2, 1))
    for rows in range(1, RAW_ROWS + 1):
        x = rng.standard_normal((rows, ic), np.float32)
        x[0, ic - 1] = np.inf
        lo, hi = (-1.0, 1.5) if rows == 2 else (-math.inf, math.inf)
        want, got = np.full((2, rows, oc), 7, np.float32)
        T.linear(isa, rows, x, packed, ic, oc, want, bias, lo, hi)
        T.linear_raw(isa, rows, x, w, ic, oc, got, bias, lo, hi)
        np.testing.assert_array_equal(got, want)
        exact = np.clip(x[1:].astype(np.float64) @ w.T.astype(np.float64) + bias, lo, hi)
        np.testing.assert_allclose(got[1:], exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_refuses_more_rows(isa: str) -> None:
    z = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="not a call of this kernel"):
        T.linear_raw(isa, RAW_ROWS + 1, z, z, 1, 1, z, z, 0.0, 0.0)
