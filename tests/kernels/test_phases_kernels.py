# SPDX-License-Identifier: BSD-3-Clause
"""panel_pack, interleave and conv_px2 of every instruction set against NumPy: small whole numbers, equal to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyconvbn import _core

T = _core._testing
ISAS = T.isas()
SENTINEL = np.float32(-12345.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [0, 1, 4, 7])
def test_panel_pack(isa: str, channels: int, rng: np.random.Generator) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    width, out_c = 4 * lanes + 3, 5 * lanes + 1
    x = rng.integers(1, 99, (channels, width)).astype(np.float32)
    for _ in range(30):
        moves = []
        for _ in range(int(rng.integers(0, 9))):
            lo, hi = sorted(int(v) for v in rng.integers(0, lanes + 1, 2))
            if rng.integers(0, 2):
                lo, hi = 0, lanes
            n = int(rng.integers(1, lanes + 1)) if rng.integers(0, 2) else lanes
            # Beyond the array on either side where no lane is read.
            step = 1 + int(rng.integers(0, 2))
            start = int(rng.integers(-lo * step, width - (hi - 1) * step))
            moves.append([start, int(rng.integers(0, out_c - n + 1)), lo, hi, n, step - 1])
        out = np.full(max(channels, 1) * out_c, SENTINEL)
        want = out.copy()
        for c in range(channels):
            for start, at, lo, hi, n, skip in moves:
                for lane in range(n):
                    want[c * out_c + at + lane] = x[c, start + lane * (1 + skip)] if lo <= lane < hi else 0
        T.panel_pack(isa, out, out_c, x, np.array(moves, np.int64).reshape(-1, 6))
        np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("isa", ISAS)
def test_panel_pack_refuses_what_would_leave_the_arrays(isa: str) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    x, out = np.zeros((2, lanes), np.float32), np.zeros(2 * lanes, np.float32)
    T.panel_pack(isa, out, lanes, x, np.array([[0, 0, 0, lanes, lanes, 0]], np.int64))
    for move in ([1, 0, 0, lanes, lanes, 0], [-1, 0, 0, lanes, lanes, 0], [0, 1, 0, lanes, lanes, 0],
                 [0, -1, 0, lanes, 1, 0], [0, 0, 0, lanes + 1, lanes, 0], [0, 0, 0, lanes, lanes + 1, 0],
                 [0, 0, 0, lanes, 0, 0], [0, 0, 0, 1, lanes, 2], [0, 0, 0, 1, lanes, -1],
                 [lanes - 1, 0, 0, 2, 1, 1], [-1, 0, 0, lanes, lanes, 1]):
        with pytest.raises(ValueError, match="panel_pack"):
            T.panel_pack(isa, out, lanes, x, np.array([move], np.int64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("phases", [1, 2, 3, 4, 5, 8, 10, 16])
@pytest.mark.parametrize(("lo", "hi"), [(-math.inf, math.inf), (-3.0, 5.0)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_interleave(isa: str, phases: int, lo: float, hi: float, with_residual: bool, rng: np.random.Generator) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    most = phases * (2 * lanes + 3)
    lengths = {0, 1, 2, phases - 1, phases, phases + 1, phases * lanes - 1, phases * lanes, phases * lanes + 1, most}
    lengths |= {int(v) for v in rng.integers(1, most, 6)}
    for n in sorted(lengths):
        per_phase = math.ceil(n / phases)
        for channels in (1, 3):
            s = rng.integers(-9, 10, (channels, phases, per_phase + 1)).astype(np.float32)
            bias = rng.integers(-3, 4, channels).astype(np.float32)
            y = np.full((channels, n + 2), SENTINEL)
            residual = rng.integers(-9, 10, y.shape).astype(np.float32) if with_residual else None
            want = y.copy()
            row = s.transpose(0, 2, 1).reshape(channels, -1)[:, :n] + bias[:, None]
            if residual is not None:
                row += residual[:, :n]
            want[:, :n] = np.clip(row, lo, hi)
            T.interleave(isa, y, s, n, bias, residual, lo, hi)
            np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("phases", [2, 3, 8])
def test_interleave_lets_nan_through_and_clamps_infinities(isa: str, phases: int) -> None:
    s = np.zeros((1, phases, 20), np.float32)
    s[0, 1, 3], s[0, 0, 4], s[0, 1, 18] = np.nan, np.inf, -np.inf
    y = np.zeros((1, 20 * phases), np.float32)
    T.interleave(isa, y, s, y.size, np.zeros(1, np.float32), None, 0.0, 6.0)
    assert np.flatnonzero(np.isnan(y)).tolist() == [3 * phases + 1]
    assert np.flatnonzero(y == 6).tolist() == [4 * phases]
    assert (np.delete(y[0], [3 * phases + 1, 4 * phases]) == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("narrow", [0, 2])
@pytest.mark.parametrize("copying", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("ic", [0, 1, 5])
def test_conv_px2(
    isa: str, narrow: int, copying: bool, with_residual: bool, ic: int, rng: np.random.Generator
) -> None:
    size = T.tile_sizes(isa)
    lanes, mr = size["lanes"], size["px_mr"] - narrow
    most = lanes * size["px_nv"]
    for pixels in sorted({1, 2, lanes - 1, lanes, lanes + 1, most - 1, most} & set(range(1, most + 1))):
        whole = math.ceil(pixels / lanes) * lanes
        for channels in (1, mr // 2, mr // 2 + 1, 2 * mr):
            x = rng.integers(-3, 4, (ic, pixels if copying else whole)).astype(np.float32)
            blocks = math.ceil(2 * channels / mr)
            w = rng.integers(-3, 4, (blocks, ic, mr)).astype(np.float32)
            bias = rng.integers(-3, 4, channels).astype(np.float32)
            y = np.full((channels, 2 * pixels + 1), SENTINEL)
            residual = rng.integers(-9, 10, y.shape).astype(np.float32) if with_residual else None
            copy = np.full(ic * whole, SENTINEL) if copying else None
            want = y.copy()
            rows = w.transpose(0, 2, 1).reshape(blocks * mr, ic)[: 2 * channels] @ x[:, :pixels]
            want[:, :-1] = rows.reshape(channels, 2, pixels).transpose(0, 2, 1).reshape(channels, -1) + bias[:, None]
            if residual is not None:
                want[:, :-1] += residual[:, :-1]
            want[:, :-1] = np.clip(want[:, :-1], -7.0, 9.0)
            T.conv_px2(isa, x, pixels, copy, w.ravel(), mr, y, bias, residual, -7.0, 9.0)
            np.testing.assert_array_equal(y, want)
            if copy is not None:
                np.testing.assert_array_equal(copy.reshape(ic, whole), np.pad(x, ((0, 0), (0, whole - pixels))))
