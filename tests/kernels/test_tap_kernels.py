# SPDX-License-Identifier: BSD-3-Clause
"""conv_tap and rows_copy of every instruction set against plain loops, on whole numbers: results must be equal to the
bit. Guard pages around the arrays are the business of tests/c/check_tap.c."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pyconvbn import _core

T = _core._testing
ISAS = T.isas()
SENTINEL = np.float32(-12345.0)
INF = math.inf


def whole(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.integers(-4, 5, shape).astype(np.float32)


def clamp(values: NDArray[np.float32], lo: float, hi: float) -> NDArray[np.float32]:
    return np.minimum(np.maximum(values, np.float32(lo)), np.float32(hi))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("ntaps", [0, 1, 2, 9, 50])
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv_tap(isa: str, ntaps: int, with_residual: bool, rng: np.random.Generator) -> None:
    full = T.tile_sizes(isa)["lanes"]
    for mr, most in enumerate(T.tap_tiles(isa), 1):
        for nv in (0, 1, most - 1, most, most + 1, 2 * most + most // 2, 3 * most):
            for lanes in sorted({1, full // 2 or 1, full - 1 or 1, full}):
                x = whole(rng, 400)
                tap = rng.integers(0, 200, ntaps).astype(np.int32)
                xpix = rng.integers(0, 180, nv)
                ypix = rng.permutation(nv) * (lanes + 1) + 2
                y_oc = (nv + 2) * (lanes + 1)
                w, bias = whole(rng, ntaps, mr), whole(rng, mr)
                y = np.full(mr * y_oc + 5, SENTINEL, np.float32)
                residual = whole(rng, y.size) if with_residual else None
                lo, hi = (-INF, INF) if nv % 2 else (-7.0, 9.0)
                want = y.copy()
                for v in range(nv):
                    for c in range(mr):
                        at = slice(c * y_oc + ypix[v], c * y_oc + ypix[v] + lanes)
                        s = np.full(lanes, bias[c], np.float32)
                        for t in range(ntaps):
                            s += w[t, c] * x[xpix[v] + tap[t] :][:lanes]
                        want[at] = clamp(s + (residual[at] if residual is not None else np.float32(0)), lo, hi)
                T.conv_tap(isa, mr, x, xpix, tap, w, y, ypix, y_oc, lanes, bias, residual, lo, hi)
                assert np.array_equal(y, want), (mr, nv, lanes)


@pytest.mark.parametrize("isa", ISAS)
def test_conv_tap_order_of_the_sum(isa: str, rng: np.random.Generator) -> None:
    """Taps are added in the order of the list, each as one fused multiply-add, whatever the tile."""
    lanes, ntaps = T.tile_sizes(isa)["lanes"], 37
    x, tap = rng.normal(size=300).astype(np.float32), rng.integers(0, 200, ntaps).astype(np.int32)
    for mr, most in enumerate(T.tap_tiles(isa), 1):
        nv = 2 * most + 1
        xpix, w = rng.integers(0, 80, nv), rng.normal(size=(ntaps, mr)).astype(np.float32)
        y = np.zeros((mr, nv * lanes), np.float32)
        zeros = np.zeros(mr, np.float32)
        T.conv_tap(isa, mr, x, xpix, tap, w, y, np.arange(nv) * lanes, nv * lanes, lanes, zeros, None, -INF, INF)
        at = (xpix[:, None] + np.arange(lanes)).reshape(-1)
        for c in range(mr):
            s = np.zeros(nv * lanes, np.float32)
            for t in range(ntaps):
                # the product is exact in float64, its sum with a float32 almost always rounds the same way twice
                s = (w[t, c].astype(np.float64) * x[at + tap[t]] + s).astype(np.float32)
            assert np.mean(y[c] == s) > 0.99, (mr, c)


@pytest.mark.parametrize("isa", ISAS)
def test_conv_tap_nan_passes_the_clamp(isa: str) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    for mr, most in enumerate(T.tap_tiles(isa), 1):
        x = np.ones((most, lanes), np.float32)
        x[0, 0], x[-1, -1] = np.nan, np.inf
        y = np.zeros((mr, most, lanes), np.float32)
        at = np.arange(most) * lanes
        w, bias = np.ones((1, mr), np.float32), np.zeros(mr, np.float32)
        T.conv_tap(isa, mr, x, at, np.zeros(1, np.int32), w, y, at, most * lanes, lanes, bias, None, 0.0, 6.0)
        want = np.broadcast_to(np.minimum(x, np.float32(6)), y.shape)
        assert np.array_equal(y, want, equal_nan=True) and np.isnan(y).sum() == mr * np.isnan(x).sum()


@pytest.mark.parametrize("isa", ISAS)
def test_conv_tap_refuses_what_would_leave_the_arrays(isa: str) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    x, y, w = np.zeros(lanes + 3, np.float32), np.zeros(lanes, np.float32), np.zeros(1, np.float32)
    at = np.zeros(1, np.int64)

    def run(shift: int, mr: int = 1) -> None:
        T.conv_tap(isa, mr, x, at, np.full(1, shift, np.int32), w, y, at, 0, lanes, w, None, -INF, INF)

    run(3)
    for shift, mr in ((4, 1), (-1, 1), (0, 2), (0, 99)):
        with pytest.raises(ValueError):
            run(shift, mr)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_rows_copy(isa: str, step: int, rng: np.random.Generator) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    for w in (0, 1, 2, lanes, 2 * lanes + 1, 37, 71):
        for x0 in (-80, -lanes - 1, -3, -1, 0, 1, 5, 40):
            for n in (0, lanes, 3 * lanes, 5 * lanes):
                ic, rows = int(rng.integers(1, 4)), int(rng.integers(1, 4))
                x = whole(rng, ic, rows, w + 2)
                to = np.full((rows, ic, n + 3), SENTINEL, np.float32)
                want = to.copy()
                for c in range(n):
                    at = x0 + c * step
                    want[:, :, c] = x[:, :, at].T if 0 <= at < w else 0
                T.rows_copy(isa, to, n + 3, ic * (n + 3), x, rows * (w + 2), w + 2, ic, rows, n, x0, step, w)
                assert np.array_equal(to, want), (w, x0, n)
