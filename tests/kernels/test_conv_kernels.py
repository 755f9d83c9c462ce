# SPDX-License-Identifier: BSD-3-Clause
"""conv_oc, conv_px and fma_peak of every instruction set against plain loops.

Data are small whole numbers, so every sum is exact in float32 and results must be equal to the bit: an index that is
off by one cannot hide in a tolerance. Guard pages around the arrays are the business of tests/c/check_conv.c.
"""

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

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def whole(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.integers(-4, 5, shape).astype(np.float32)


def aligned(n: int) -> Floats:
    """conv_oc wants its sums on a cache line."""
    raw = np.zeros(n * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n * 4].view(np.float32)


def tiles(isa: str) -> list[tuple[int, int]]:
    size = T.tile_sizes(isa)
    return [(p, v) for p in range(1, size["oc_np"] + 1) for v in range(1, size["oc_nv"] + 1)]


def clamp(values: Floats, lo: float, hi: float) -> Floats:
    return np.minimum(np.maximum(values, np.float32(lo)), np.float32(hi))


class OcCase:
    """A tile with random pixels and taps and what it must give."""

    def __init__(self, isa: str, np_: int, nv: int, ic: int, ntaps: int, rng: np.random.Generator) -> None:
        self.isa, self.np, self.nv, self.ic = isa, np_, nv, ic
        self.vw = nv * T.tile_sizes(isa)["lanes"]
        self.x_ic = 41
        self.x = whole(rng, 200 + ic * self.x_ic)
        self.xpix = rng.integers(0, 100, np_)
        self.tap_x = rng.integers(0, 100, ntaps)
        all_taps = ntaps + 2
        self.w_ic = all_taps * self.vw
        self.w = whole(rng, max(ic, 1) * self.w_ic)
        self.tap_w = np.sort(rng.permutation(all_taps)[:ntaps]) * self.vw
        self.sums = np.zeros((np_, self.vw), np.float32)
        for i in range(ic):
            for tx, tw in zip(self.tap_x, self.tap_w, strict=True):
                weights = self.w[i * self.w_ic + tw : i * self.w_ic + tw + self.vw]
                self.sums += np.outer(self.x[self.xpix + i * self.x_ic + tx], weights)

    def run(self, *, acc: Floats | None = None, load_acc: bool = False, y: Floats | None = None,
            ypix: Ints | None = None, y_oc: int = 1, oc_valid: int | None = None, y_run: bool = False,
            bias: Floats | None = None, residual: Floats | None = None, lo: float = -INF, hi: float = INF) -> None:  # fmt: skip
        T.conv_oc(
            self.isa, self.np, self.nv, self.x, self.xpix, self.x_ic, self.w, self.w_ic, self.ic, self.tap_x, self.tap_w,
            acc, load_acc, y, np.zeros(self.np, np.int64) if ypix is None else ypix, y_oc,
            self.vw if oc_valid is None else oc_valid, y_run, np.zeros(self.vw, np.float32) if bias is None else bias,
            residual, lo, hi,
        )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("ic", "ntaps"), [(0, 1), (1, 0), (1, 1), (7, 1), (3, 2), (2, 9), (5, 3)])
def test_conv_oc_sums(isa: str, ic: int, ntaps: int, rng: np.random.Generator) -> None:
    for np_, nv in tiles(isa):
        case = OcCase(isa, np_, nv, ic, ntaps, rng)
        acc = aligned(np_ * case.vw)
        acc[:] = SENTINEL
        case.run(acc=acc)
        assert np.array_equal(acc.reshape(np_, case.vw), case.sums), (np_, nv)
        case.run(acc=acc, load_acc=True)
        assert np.array_equal(acc.reshape(np_, case.vw), 2 * case.sums), (np_, nv)


def valid_counts(lanes: int, vw: int) -> list[int]:
    return sorted({1, lanes - 1, lanes, lanes + 1, vw - 1, vw} & set(range(1, vw + 1)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("store", ["rows", "points", "lanes"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(-INF, INF), (0.0, INF), (-3.0, 5.0)])
def test_conv_oc_store(
    isa: str, store: str, with_residual: bool, lo: float, hi: float, rng: np.random.Generator
) -> None:
    lanes = T.tile_sizes(isa)["lanes"]
    for np_, nv in tiles(isa):
        case = OcCase(isa, np_, nv, 3, 4, rng)
        for valid in valid_counts(lanes, case.vw):
            if store == "rows":
                ypix, y_oc = 5 + np.arange(np_), np_ + 3
            elif store == "points":
                ypix, y_oc = rng.permutation(40)[:np_], 47
            else:
                ypix, y_oc = 5 + np.arange(np_) * (case.vw + 2), 1
            y = np.full(ypix.max() + case.vw * y_oc + 9, SENTINEL, np.float32)
            residual = whole(rng, y.size) if with_residual else None
            bias = whole(rng, valid)
            at = ypix[:, None] + np.arange(valid) * y_oc
            want = y.copy()
            more = residual[at] if residual is not None else np.float32(0)
            want[at] = clamp(case.sums[:, :valid] + bias + more, lo, hi)
            case.run(y=y, ypix=ypix, y_oc=y_oc, oc_valid=valid, y_run=store == "rows", bias=bias, residual=residual,
                     lo=lo, hi=hi)  # fmt: skip
            assert np.array_equal(y, want), (np_, nv, valid)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("store", ["rows", "points", "lanes"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv_oc_nan_passes_the_clamp(isa: str, store: str, with_residual: bool, rng: np.random.Generator) -> None:
    size = T.tile_sizes(isa)
    np_, nv = size["oc_np"], size["oc_nv"]
    case = OcCase(isa, np_, nv, 2, 3, rng)
    rows = store == "rows"
    y_oc = 1 if store == "lanes" else np_ + 2
    ypix = np.arange(np_) * (case.vw if store == "lanes" else 1)
    y = np.zeros(case.vw * (np_ + 2), np.float32)
    bias = np.zeros(case.vw, np.float32)
    bias[1], bias[2], bias[3] = np.nan, np.inf, -np.inf
    residual = np.zeros_like(y) if with_residual else None
    case.run(y=y, ypix=ypix, y_oc=y_oc, y_run=rows, bias=bias, residual=residual, lo=0.0, hi=6.0)
    got = y[ypix[:, None] + np.arange(case.vw) * y_oc]
    assert np.isnan(got[:, 1]).all() and not np.isnan(np.delete(got, 1, 1)).any()
    assert (got[:, 2] == 6).all() and (got[:, 3] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_conv_oc_refuses_what_would_leave_the_arrays(isa: str, rng: np.random.Generator) -> None:
    case = OcCase(isa, 1, 1, 3, 2, rng)
    acc = aligned(case.vw)
    case.run(acc=acc)
    case.x = case.x[: int(case.xpix.max() + case.tap_x.max()) + 2 * case.x_ic]
    with pytest.raises(ValueError, match="x is too small"):
        case.run(acc=acc)


def px_sizes(isa: str) -> list[int]:
    size = T.tile_sizes(isa)
    lanes, most = size["lanes"], size["lanes"] * size["px_nv"]
    return sorted({1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes, 2 * lanes + 1, most - 1, most} & set(range(1, most + 1)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(-INF, INF), (-2.0, 7.0)])
@pytest.mark.parametrize("ic", [0, 1, 2, 17])
def test_conv_px(isa: str, with_residual: bool, lo: float, hi: float, ic: int, rng: np.random.Generator) -> None:
    mr = T.tile_sizes(isa)["px_mr"]
    for np_ in px_sizes(isa):
        for valid in range(1, mr + 1):
            x_ic, y_oc = np_ + 5, np_ + 2
            x, w, bias = whole(rng, max(ic, 1) * x_ic), whole(rng, max(ic, 1), mr), whole(rng, valid)
            y = np.full(mr * y_oc, SENTINEL, np.float32)
            residual = whole(rng, y.size) if with_residual else None
            want = y.copy()
            for c in range(valid):
                row = np.full(np_, bias[c], np.float32)
                for i in range(ic):
                    row += w[i, c] * x[i * x_ic : i * x_ic + np_]
                if residual is not None:
                    row += residual[c * y_oc : c * y_oc + np_]
                want[c * y_oc : c * y_oc + np_] = clamp(row, lo, hi)
            T.conv_px(isa, x, x_ic, w, ic, y, y_oc, valid, np_, bias, residual, lo, hi)
            assert np.array_equal(y, want), (np_, valid)


@pytest.mark.parametrize("isa", ISAS)
def test_order_of_summation_is_the_same_everywhere(isa: str, rng: np.random.Generator) -> None:
    """Both kernels of every instruction set add channel after channel, each with one rounding."""
    ic = 53
    size = T.tile_sizes(isa)
    x = rng.standard_normal(ic).astype(np.float32)
    weight = rng.standard_normal(ic).astype(np.float32)
    want = np.float32(0)
    for i in range(ic):
        # a float64 holds the product exactly; the sum is rounded to float64 first, which could only differ from one
        # rounding in a tie of float64 that these data do not meet
        want = np.float32(np.float64(weight[i]) * np.float64(x[i]) + np.float64(want))
    zeros, origin = np.zeros(64, np.float32), np.zeros(1, np.int64)
    w = np.zeros((ic, size["px_mr"]), np.float32)
    w[:, 0] = weight
    y = np.zeros(1, np.float32)
    T.conv_px(isa, x, 1, w, ic, y, 1, 1, 1, zeros, None, -INF, INF)
    assert y[0] == want
    w = np.zeros((ic, size["lanes"]), np.float32)
    w[:, 0] = weight
    y = np.zeros(1, np.float32)
    T.conv_oc(isa, 1, 1, x, origin, 1, w, size["lanes"], ic, origin, origin, None, False, y, origin, 1, 1, False, zeros,
              None, -INF, INF)  # fmt: skip
    assert y[0] == want


@pytest.mark.parametrize("isa", ISAS)
def test_fma_peak_counts_its_work(isa: str) -> None:
    one, _ = T.fma_peak(isa, 1000)
    two, seconds = T.fma_peak(isa, 2000)
    assert two == 2 * one > 0 and seconds > 0
    assert one % (2 * 1000 * T.tile_sizes(isa)["lanes"]) == 0


def test_unknown_isa_is_named() -> None:
    with pytest.raises(ValueError, match="'mmx'"):
        T.tile_sizes("mmx")
    with pytest.raises(ValueError, match="isa"):
        T.fma_peak("mmx", 1)
