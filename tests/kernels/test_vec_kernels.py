# SPDX-License-Identifier: BSD-3-Clause
"""conv_dw and the elementwise kernels of every instruction set against NumPy.

Data are small whole numbers where a kernel only adds and multiplies, so results must be equal to the bit. Guard pages,
tails and accuracy in units in the last place are the business of tests/c/check_vec.c and check_dw.c.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pyconvbn import _core

T = _core._testing
ISAS = T.isas()
SENTINEL = np.float32(-12345.0)
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19, 31, 33, 35, 97]
Floats = NDArray[np.float32]


def whole(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.integers(-9, 10, shape).astype(np.float32)


class Framed:
    """n elements between sentinels; `ok` says whether the frame is untouched."""

    def __init__(self, *shape: int) -> None:
        n = math.prod(shape)
        self.all = np.full(n + 32, SENTINEL)
        self.y = self.all[16 : 16 + n].reshape(shape)

    def ok(self) -> bool:
        return bool((self.all[:16] == SENTINEL).all() and (self.all[self.all.size - 16 :] == SENTINEL).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
def test_arithmetic(isa: str, n: int, rng: np.random.Generator) -> None:
    x, z = whole(rng, n), whole(rng, n)
    for call, want in [
        (lambda y: T.affine(isa, y, x, 3.0, -2.0), 3 * x - 2),
        (lambda y: T.add(isa, y, x, z, -2.0), x - 2 * z),
        (lambda y: T.mul(isa, y, x, z), x * z),
    ]:
        frame = Framed(n)
        call(frame.y)
        np.testing.assert_array_equal(frame.y, want)
        assert frame.ok()


@pytest.mark.parametrize("isa", ISAS)
def test_float16_conversions_agree_with_numpy(isa: str, rng: np.random.Generator) -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(np.float16)
    wide = np.empty(patterns.size, np.float32)
    T.widen_f16(isa, wide, patterns)
    np.testing.assert_array_equal(wide, patterns.astype(np.float32))
    values = np.concatenate([
        rng.standard_normal(20011) * 10.0 ** rng.integers(-9, 6, 20011), [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520]
    ]).astype(np.float32)
    for n in (values.size, 1, 7):
        narrow = np.empty(n, np.float16)
        T.narrow_f16(isa, narrow, values[:n])
        with np.errstate(over="ignore", under="ignore"):
            want = values[:n].astype(np.float16)
        np.testing.assert_array_equal(narrow, want)


@pytest.mark.parametrize("isa", ISAS)
def test_unary_is_the_same_on_every_instruction_set(isa: str, rng: np.random.Generator) -> None:
    """One formula, fused multiply-adds only where written: the bits agree with the scalar table."""
    x = np.concatenate([rng.standard_normal(4001) * 8, [0.0, np.inf, -np.inf, np.nan, 88.0, -88.0, -104.0]])
    x = x.astype(np.float32)
    kinds = ["none", "relu", "relu6", "leaky_relu", "sigmoid", "hardtanh", "hardswish", "silu", "gelu", "gelu_tanh"]
    for kind in kinds:
        got, want = np.empty_like(x), np.empty_like(x)
        T.unary(isa, kind, -0.5, 2.0, got, x)
        T.unary("scalar", kind, -0.5, 2.0, want, x)
        np.testing.assert_array_equal(got, want, err_msg=kind)
        assert kind == "none" or not np.array_equal(got, x, equal_nan=True)


def naive_depthwise(
    x: Floats, w: Floats, bias: float, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> NDArray[np.float64]:
    """Sum over taps of shifted, strided views of the padded volume."""
    wide = np.pad(x.astype(np.float64), [(p, p) for p in padding])
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(wide.shape, w.shape, stride, dilation)]
    y = np.full(out, bias)
    for tap in np.ndindex(*w.shape):
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilation, out, stride)
        )
        y += w[tap] * wide[window]
    return y


DW_SHAPES = [
    # input, kernel, stride, padding, dilation
    *[((1, 19, width), (1, k, k), (1, s, s), (0, k // 2, k // 2), (1, 1, 1))
      for width, k, s in itertools.product((7, 14, 16, 33, 56), (1, 3, 5, 7), (1, 2))],
    ((4, 9, 13), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((5, 9, 20), (3, 1, 1), (2, 1, 1), (1, 0, 0), (2, 1, 1)),
    ((1, 1, 300), (1, 1, 3), (1, 1, 1), (0, 0, 64), (1, 1, 64)),
    ((1, 1, 90), (1, 1, 5), (1, 1, 3), (0, 0, 2), (1, 1, 1)),
    ((1, 21, 40), (1, 3, 3), (1, 1, 1), (0, 4, 4), (1, 4, 4)),
    ((1, 21, 40), (1, 3, 3), (1, 2, 2), (0, 2, 2), (1, 2, 2)),
    ((1, 15, 22), (1, 1, 7), (1, 1, 1), (0, 0, 3), (1, 1, 1)),
    ((1, 15, 22), (1, 7, 1), (1, 1, 1), (0, 3, 0), (1, 1, 1)),
    ((1, 15, 22), (1, 4, 6), (1, 2, 1), (0, 2, 5), (1, 1, 1)),
    ((1, 30, 30), (1, 11, 11), (1, 4, 4), (0, 5, 5), (1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation"), DW_SHAPES)
def test_conv_dw(
    isa: str, residual: bool, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], rng: np.random.Generator,
) -> None:  # fmt: skip
    x, w = whole(rng, *size), whole(rng, *kernel)
    want = naive_depthwise(x, w, 2.0, stride, padding, dilation)
    extra = whole(rng, *want.shape) if residual else None
    want = np.clip(want + (0 if extra is None else extra), -150.0, np.inf)
    frame = Framed(*want.shape)
    planes, rows = (0, want.shape[0]), (0, want.shape[1])
    T.conv_dw(isa, frame.y, x, w, extra, 2.0, -150.0, math.inf, stride, padding, dilation, planes, rows)
    np.testing.assert_array_equal(frame.y, want)
    assert frame.ok()


@pytest.mark.parametrize("isa", ISAS)
def test_conv_dw_writes_its_rows_only(isa: str, rng: np.random.Generator) -> None:
    for width in (5, 14, 40):
        x, w = whole(rng, 2, 20, width), whole(rng, 1, 3, 3)
        want = naive_depthwise(x, w, 0.0, (1, 1, 1), (0, 1, 1), (1, 1, 1))
        for first, stop in itertools.combinations(range(0, 21, 3), 2):
            frame = Framed(2, 20, width)
            frame.y[...] = SENTINEL
            T.conv_dw(isa, frame.y, x, w, None, 0.0, -math.inf, math.inf, 1, (0, 1, 1), 1, (1, 2), (first, stop))
            np.testing.assert_array_equal(frame.y[1, first:stop], want[1, first:stop])
            frame.y[1, first:stop] = SENTINEL
            assert (frame.all == SENTINEL).all()
