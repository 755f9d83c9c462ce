# SPDX-License-Identifier: BSD-3-Clause
"""The five kernels of a Winograd convolution, for every instruction set, against matrices in float64.

Data are small whole numbers and the constants of the matrices are dyadic, so everything but the weights is exact in
float32 and must be equal to the bit. Guard pages around the arrays are the business of tests/c/check_wino.c.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from pyconvbn import _core

T = _core._testing
ISAS = T.isas()
SENTINEL = np.float32(-12345.0)
INF = math.inf
AXES = [(1, 1), (4, 2), (4, 3), (6, 2), (6, 3), (6, 4), (6, 5)]  # points, outputs

Floats = NDArray[np.float32]
Matrix = list[list[Fraction]]


def points(n: int) -> list[Fraction]:
    """Of an axis, without infinity."""
    half = [Fraction(1)] if n == 4 else [Fraction(5, 8), Fraction(3, 2)]
    return [Fraction(0), *(sign * p for p in half for sign in (1, -1))]


def output_matrix(n: int, m: int) -> NDArray[np.float64]:
    """A^T: powers of the points; infinity gives its highest coefficient."""
    if n == 1:
        return np.ones((1, 1))
    rows = [[p**i for p in points(n)] + [Fraction(i == m - 1)] for i in range(m)]
    return np.array(rows, float)


def weight_matrix(n: int, k: int) -> Matrix:
    if n == 1:
        return [[Fraction(1)]]
    pts = points(n)
    rows = [[p**b / math.prod(p - q for q in pts if q != p) for b in range(k)] for p in pts]
    return [*rows, [Fraction(b == k - 1) for b in range(k)]]


def input_matrix(n: int) -> NDArray[np.float64]:
    """B^T: row i is the product of (x - p_j) over the other points, the last row that over all of them."""
    if n == 1:
        return np.ones((1, 1))
    pts = points(n)
    rows = [[q for q in pts if q != p] for p in pts] + [pts]
    matrix = np.zeros((n, n))
    for i, roots in enumerate(rows):
        coefficients = [Fraction(1)]
        for root in roots:
            coefficients = [(coefficients[j - 1] if j else Fraction(0)) - root * (coefficients[j] if j < len(
                coefficients) else Fraction(0)) for j in range(len(coefficients) + 1)]  # fmt: skip
        matrix[i, : len(coefficients)] = np.array(coefficients, float)
    return matrix


def lanes(isa: str) -> int:
    return int(T.tile_sizes(isa)["lanes"])


def aligned(*shape: int) -> Floats:
    """Vectors lie on cache lines."""
    raw = np.zeros(math.prod(shape) * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    values = raw[start : start + math.prod(shape) * 4].view(np.float32).reshape(shape)
    values[...] = SENTINEL
    return values


def whole(rng: np.random.Generator, *shape: int) -> Floats:
    values = aligned(*shape)
    values[...] = rng.integers(-4, 5, shape)
    return values


@pytest.mark.parametrize("isa", ISAS)
def test_gather(isa: str, rng: np.random.Generator) -> None:
    size = lanes(isa)
    for nch, w, x0, n in product(
        sorted({1, size - 1, size} - {0}), (0, 1, 5, size, 3 * size + 3), (-2 * size - 1, -1, 0, 2, 50), (0, 1, 6, 40)
    ):
        x_c = w + 3
        x = whole(rng, nch * x_c)
        s = aligned(n, size)
        T.lanes_gather(isa, s, x, x_c, nch, x0, w)
        want = np.zeros((n, size), np.float32)
        for c in range(max(0, -x0), min(n, w - x0)):
            want[c, :nch] = x[np.arange(nch) * x_c + x0 + c]
        assert np.array_equal(s, want), (nch, w, x0, n)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(-INF, INF), (0.0, INF), (-3.0, 5.0)])
def test_scatter(isa: str, with_residual: bool, lo: float, hi: float, rng: np.random.Generator) -> None:
    size = lanes(isa)
    for nch, n, gap in product(
        sorted({1, size - 1, size} - {0}), (0, 1, 3, size - 1, size, size + 1, 3 * size - 1, 40), (0, 5)
    ):
        y_c = n + gap
        s, bias = whole(rng, n, size), whole(rng, nch)
        y = aligned(nch * y_c + 9)
        residual = whole(rng, y.size) if with_residual else None
        want = y.copy()
        for channel in range(nch):
            at = slice(channel * y_c, channel * y_c + n)
            more = residual[at] if residual is not None else np.float32(0)
            want[at] = np.clip(s[:, channel] + bias[channel] + more, np.float32(lo), np.float32(hi))
        assert T.lanes_scatter(isa, y, y_c, nch, s, bias, residual, lo, hi) is False
        assert np.array_equal(y, want), (nch, n, gap)


@pytest.mark.parametrize("isa", ISAS)
def test_scatter_adds_to_what_is_there(isa: str, rng: np.random.Generator) -> None:
    """The residual may be the output itself."""
    size = lanes(isa)
    for n in (1, size, 2 * size + 3):
        s, y, bias = whole(rng, n, size), whole(rng, size, n), np.zeros(size, np.float32)
        want = y + s.T
        T.lanes_scatter(isa, y, n, size, s, bias, y, -INF, INF)
        assert np.array_equal(y, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_scatter_reports_what_is_not_finite(isa: str, value: float, rng: np.random.Generator) -> None:
    size = lanes(isa)
    for nch, n in product(sorted({1, size}), (1, size, 2 * size + 3)):
        for column, lane in product(range(n), range(size)):
            s, y = whole(rng, n, size), aligned(nch, n)
            s[column, lane] = value
            found = T.lanes_scatter(isa, y, n, nch, s, np.zeros(nch, np.float32), None, -1.0, 1.0)
            assert found is (lane < nch), (nch, n, column, lane)
    large = aligned(3, size)
    large[...] = np.finfo(np.float32).max
    assert T.lanes_scatter(isa, aligned(size, 3), 3, size, large, np.zeros(size, np.float32), None, -1.0, 1.0) is False


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("nh", [1, 4, 6])
@pytest.mark.parametrize("nw", [1, 4, 6])
def test_in(isa: str, nh: int, nw: int, rng: np.random.Generator) -> None:
    size = lanes(isa)
    vertical, horizontal = input_matrix(nh), input_matrix(nw)
    for ncols, step, ntiles in ((nw, 1, 1), (23, 1, 7), (23, 3, 4), (16, 1, 0)):
        x = whole(rng, nh + 2, ncols, size)
        rows = rng.permutation(nh + 2)[:nh]
        rows[-1] = rows[0]  # they may repeat
        col = rng.integers(0, ncols - (nw - 1) * step, ntiles).astype(np.int32)
        tmp = aligned(nh * ncols, size)
        v_xi = (ntiles + 2) * size
        v = aligned(nh * nw, ntiles + 2, size)
        want = v.copy()
        for t in range(ntiles):
            d = x[rows][:, col[t] + np.arange(nw) * step].astype(float)
            want[:, t] = np.einsum("ia,jb,abl->ijl", vertical, horizontal, d).reshape(nh * nw, size)
        T.wino_in(isa, nh, nw, x, rows * ncols * size, ncols, col, step, tmp, v, v_xi)
        assert np.array_equal(v, want), (ncols, step, ntiles)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("add", [False, True])
def test_gemm(isa: str, add: bool, rng: np.random.Generator) -> None:
    size = lanes(isa)
    group = T.tile_sizes(isa)["wino_np"]
    for np_, nv in product((*range(1, group + 1), group + 1, 2 * group, 3 * group + 2), (1, 2)):
        for blocks, chunk in ((1, 1), (5, 2), (4, 2), (3, 8)):
            nk, tiles = blocks * size, np_ + 1
            v, u = whole(rng, blocks, tiles, size), whole(rng, nk, nv, size)
            m = whole(rng, nv, np_, 3, size)
            want = m.copy()
            sums = np.einsum("btk,bkjc->jtc", v[:, :np_], u.reshape(blocks, size, nv, size))
            want[:, :, 0] = sums + (m[:, :, 0] if add else 0)
            if not add:
                m[:, :, 0] = math.nan
            T.wino_gemm(isa, np_, nv, v, tiles * size, u, nk, chunk * size, m, 3 * size, np_ * 3 * size, add)
            assert np.array_equal(m, want), (np_, nv, blocks, chunk)


def rounded_fma(a: Floats, b: Floats, c: Floats) -> Floats:
    return (a.astype(float) * b + c).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_gemm_sums_chunk_by_chunk(isa: str, rng: np.random.Generator) -> None:
    """Numbers of any size: each sum of a chunk is one chain, and the chunks are added in order."""
    size = lanes(isa)
    blocks, chunk, np_, nv = 7, 3, T.tile_sizes(isa)["wino_np"], 2
    v, u, m = aligned(blocks, np_, size), aligned(blocks * size, nv, size), aligned(nv, np_, size)
    v[...], u[...], m[...] = (rng.standard_normal(a.shape) for a in (v, u, m))
    want = m.copy()
    for first in range(0, blocks, chunk):
        s = np.zeros((nv, np_, size), np.float32)
        for k in range(first * size, min(first + chunk, blocks) * size):
            s = rounded_fma(v[k // size, :, k % size][None, :, None], u[k][:, None, :], s)
        want += s
    T.wino_gemm(isa, np_, nv, v, np_ * size, u, blocks * size, chunk * size, m, size, np_ * size, True)
    assert np.array_equal(m, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("nh", "mh"), AXES)
@pytest.mark.parametrize(("nw", "mw"), AXES)
def test_out(isa: str, nh: int, mh: int, nw: int, mw: int, rng: np.random.Generator) -> None:
    size = lanes(isa)
    vertical, horizontal = output_matrix(nh, mh), output_matrix(nw, mw)
    for step, ntiles in ((1, 5), (3, 4), (1, 0)):
        m_t = (nh * nw + 1) * size
        m = whole(rng, max(ntiles, 1), nh * nw + 1, size)
        width = ntiles * mw * step + 2
        # Tiles of a dilated axis interleave; here each has its own columns.
        col = (rng.permutation(ntiles) * mw * step + rng.integers(0, 3)).astype(np.int32)
        o = aligned(mh, width, size)
        want = o.copy()
        for t in range(ntiles):
            d = m[t, : nh * nw].reshape(nh, nw, size).astype(float)
            want[:, col[t] + np.arange(mw) * step] = np.einsum("ia,jb,abl->ijl", vertical, horizontal, d)
        T.wino_out(isa, nh, mh, nw, mw, m, m_t, col, step, o, width * size)
        if nh == nw == 6 and mh + mw > 8:  # more bits than float32 has
            np.testing.assert_allclose(o, want, rtol=1e-5, atol=1e-4)
        else:
            assert np.array_equal(o, want), (step, ntiles)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_as_scalar(isa: str, rng: np.random.Generator) -> None:
    """Numbers of any size through both transforms: all instruction sets round in the same places."""
    size = lanes(isa)
    for (nh, mh), (nw, mw) in product(AXES, AXES):
        d = rng.standard_normal((nh, nw, size)).astype(np.float32)
        results = []
        for name, parts in ((isa, [d]), ("scalar", [d[..., lane : lane + 1].copy() for lane in range(size)])):
            columns = []
            for part in parts:
                width = part.shape[-1]
                v, tmp, o = aligned(nh * nw, width), aligned(nh * nw, width), aligned(mh, mw, width)
                first = np.zeros(1, np.int32)
                T.wino_in(name, nh, nw, part, np.arange(nh) * nw * width, nw, first, 1, tmp, v, width)
                T.wino_out(name, nh, mh, nw, mw, v, nh * nw * width, first, 1, o, mw * width)
                columns += [v.ravel().reshape(-1, width), o.reshape(-1, width)]
            rows = len(columns) // len(parts)
            results.append(np.concatenate(
                [np.concatenate(columns[i::rows], axis=1) for i in range(rows)]))  # fmt: skip
        assert np.array_equal(results[0], results[1]), (nh, mh, nw, mw)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "m"), AXES[1:])
def test_all_steps_are_a_convolution(isa: str, n: int, m: int, rng: np.random.Generator) -> None:
    """F(m, k) of one axis: gather, transform, multiply, transform back, scatter."""
    size = lanes(isa)
    k, ic, oc, w = n - m + 1, 2 * size, size, 4 * m + 1
    pad = k - 1
    out = w + 2 * pad - k + 1
    tiles = -(-out // m)
    x = rng.standard_normal((ic, w)).astype(np.float32)
    weights, bias = rng.standard_normal((oc, ic, k)).astype(np.float32), whole(rng, oc)
    matrix = np.array(weight_matrix(n, k), float)
    u = np.ascontiguousarray(np.einsum("pb,oib->pio", matrix, weights), np.float32)
    ncols = (tiles - 1) * m + n
    col = (np.arange(tiles) * m).astype(np.int32)
    v, s, tmp = aligned(n, 2, tiles, size), aligned(ncols, size), aligned(ncols, size)
    for block in range(2):
        T.lanes_gather(isa, s, x[block * size :].ravel(), w, size, -pad, w)
        T.wino_in(isa, 1, n, s, np.zeros(1, np.int64), ncols, col, 1, tmp, v.ravel()[block * tiles * size :],
                  2 * tiles * size)  # fmt: skip
    ms = aligned(tiles, n, size)
    for t, p in product(range(tiles), range(n)):
        T.wino_gemm(isa, 1, 1, v.ravel()[(p * 2 * tiles + t) * size :], tiles * size, u[p], ic, ic,
                    ms.ravel()[(t * n + p) * size :], size, size, False)  # fmt: skip
    o, y = aligned(tiles * m, size), aligned(oc, out)
    T.wino_out(isa, 1, 1, n, m, ms, n * size, col, 1, o, o.size)
    assert T.lanes_scatter(isa, y, out, size, o[:out].ravel(), bias, None, -INF, INF) is False
    padded = np.pad(x.astype(float), ((0, 0), (pad, pad)))
    want = sum(np.einsum("oi,ix->ox", weights[:, :, b].astype(float), padded[:, b : b + out]) for b in range(k))
    np.testing.assert_allclose(y, want + bias[:, None], rtol=0, atol=2e-5)


def test_refuses_what_does_not_fit(rng: np.random.Generator) -> None:
    small = whole(rng, 4)
    col = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="isa"):
        T.lanes_gather("mmx", small, small, 1, 1, 0, 1)
    with pytest.raises(ValueError, match="too small"):
        T.lanes_gather("scalar", small, small, 1, 1, 0, 5)
    with pytest.raises(ValueError, match="too small"):
        T.lanes_scatter("scalar", small[:3], 1, 1, small, small, None, 0.0, 1.0)
    with pytest.raises(ValueError, match="points"):
        T.wino_in("scalar", 1, 5, small, np.zeros(1, np.int64), 4, col, 1, small, small, 1)
    with pytest.raises(ValueError, match="outside"):
        T.wino_in("scalar", 1, 4, small, np.zeros(1, np.int64), 4, col + 1, 1, small, small, 1)
    with pytest.raises(ValueError, match="instruction set"):
        T.wino_gemm("scalar", 1, 3, small, 1, small, 1, 1, small, 1, 1, False)
    with pytest.raises(ValueError, match="too small"):
        T.wino_gemm("scalar", 1, 1, small, 1, small, 5, 1, small, 1, 1, False)
    with pytest.raises(ValueError, match="axes"):
        T.wino_out("scalar", 4, 4, 1, 1, small, 4, col, 1, small, 1)
    with pytest.raises(ValueError, match="outside"):
        T.wino_out("scalar", 4, 2, 1, 1, small, 4, col + 3, 1, small, 1)
    with pytest.raises(TypeError, match="dtype"):
        T.wino_out("scalar", 4, 2, 1, 1, small.astype(float), 4, col, 1, small, 1)
