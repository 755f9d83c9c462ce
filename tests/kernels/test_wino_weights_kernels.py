# SPDX-License-Identifier: BSD-3-Clause
"""wino_weights of every instruction set: the definition in float64, and the same bits everywhere."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pyconvbn import _core

T = _core._testing
ISAS = T.isas()
SENTINEL = np.float32(-12345.0)
POINTS = {1: [], 4: [0, 1, -1], 6: [0, Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)]}
AXES = [(1, 1), (4, 2), (4, 3), (6, 2), (6, 3), (6, 4), (6, 5)]


def factors(n: int, m: int, taps: int) -> np.ndarray:
    """Row i: what the taps count at point i."""
    points, rows = POINTS[n], []
    for i, p in enumerate(points):
        product = Fraction(1)
        for j, q in enumerate(points):
            product *= p - q if i != j else 1
        rows.append([float(p**b / product) for b in range(taps)])
    return np.array([*rows, [float(b == n - m) for b in range(taps)]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vertical", AXES)
@pytest.mark.parametrize("horizontal", AXES)
def test_definition(isa: str, vertical: tuple[int, int], horizontal: tuple[int, int], rng: np.random.Generator) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    (nh, mh), (nw, mw) = vertical, horizontal
    for less in (0, 1):  # pieces may have fewer taps: the last point is nobody's business then
        high, wide = max(nh - mh + 1 - less, 1), max(nw - mw + 1 - less, 1)
        channels, taps = 3, high * wide + 2
        w = rng.normal(size=(channels, taps, lanes)).astype(np.float32)
        tap = rng.permutation(taps)[: high * wide].reshape(high, wide).astype(np.int32)
        tap[rng.random(tap.shape) < 0.2] = -1
        u = np.full((nh * nw, channels, lanes), SENTINEL)
        T.wino_weights(isa, nh, mh, nw, mw, w, tap, u)
        there = np.where(tap[None, :, :, None] >= 0, w[:, tap], 0).astype(np.float64)
        gh, gw = factors(nh, mh, high), factors(nw, mw, wide)
        want = np.einsum("ia,jb,cabl->ijcl", gh, gw, there)
        size = np.einsum("ia,jb,cabl->ijcl", abs(gh), abs(gw), abs(there))
        got = u.reshape(want.shape).astype(np.float64)
        rows = nh if high == nh - mh + 1 else nh - 1
        columns = nw if wide == nw - mw + 1 else nw - 1
        error = abs(got - want)[:rows, :columns]
        assert (error <= 2.0**-24 * abs(want[:rows, :columns]) + 1e-14 * size[:rows, :columns]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_as_the_scalar_table(isa: str, rng: np.random.Generator) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    w = rng.normal(size=(5, 9, lanes)).astype(np.float32)
    tap = np.arange(9, dtype=np.int32).reshape(3, 3)
    u = np.empty((36, 5, lanes), np.float32)
    T.wino_weights(isa, 6, 4, 6, 4, w, tap, u)
    for lane in range(lanes):
        one = np.empty((36, 5, 1), np.float32)
        T.wino_weights("scalar", 6, 4, 6, 4, np.ascontiguousarray(w[:, :, lane : lane + 1]), tap, one)
        np.testing.assert_array_equal(u[:, :, lane], one[:, :, 0])


@pytest.mark.parametrize("isa", ISAS)
def test_refuses_what_does_not_fit(isa: str) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    w, u = np.zeros((2, 9, lanes), np.float32), np.zeros((36, 2, lanes), np.float32)
    tap = np.arange(9, dtype=np.int32).reshape(3, 3)
    T.wino_weights(isa, 6, 4, 6, 4, w, tap, u)
    for bad in ((5, 4, 6, 4, w, tap, u), (6, 5, 6, 4, w, tap, u), (6, 4, 6, 4, w, tap + 1, u),
                (6, 4, 6, 4, w, tap, u[:35]), (6, 4, 6, 4, w[:1], tap, u)):
        with pytest.raises(ValueError, match="wino_weights"):
            T.wino_weights(isa, *bad)
