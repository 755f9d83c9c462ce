# SPDX-License-Identifier: BSD-3-Clause
"""The row "scale": a 1x1 convolution of each channel for itself, which is what a BatchNorm on its own becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import ISAS, assert_same_bits, forced, why_not  # noqa: E402

#: Planes of less than a vector, of a few, and of more than a block.
SHAPES = [(2, 5, 1), (3, 7, 9), (2, 3, 5, 7), (1, 4, 33, 64), (2, 3, 3, 29, 41)]


def expected(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    ones = (1,) * (x.ndim - 2)
    return x * w.reshape(1, -1, *ones) + b.reshape(1, -1, *ones)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", ("leaky_relu", 0.25)])
def test_small_whole_numbers_are_exact(
    isa: str, shape: tuple[int, ...], activation: Any, rng: np.random.Generator
) -> None:
    channels = shape[1]
    w = rng.integers(-3, 4, (channels, 1, *(1,) * (len(shape) - 2))).astype(np.float32)
    b = rng.integers(-3, 4, channels).astype(np.float32)
    x, residual = (rng.integers(-4, 5, shape).astype(np.float32) for _ in range(2))
    plan = forced("scale", isa, shape, w, b, groups=channels, activation=activation)
    act = {
        None: lambda v: v, "relu": lambda v: np.maximum(v, 0), "relu6": lambda v: np.clip(v, 0, 6),
        "silu": lambda v: v / (1 + np.exp(-v.astype(np.float64))),
        ("leaky_relu", 0.25): lambda v: np.where(v < 0, 0.25 * v, v),
    }[activation]
    compare = np.testing.assert_allclose if activation == "silu" else np.testing.assert_array_equal
    more = {"rtol": 1e-5, "atol": 1e-6} if activation == "silu" else {}
    compare(plan(x), act(expected(x, w, b)), **more)
    compare(plan(x, residual=residual), act(expected(x, w, b) + residual), **more)


@pytest.mark.parametrize("isa", ISAS)
def test_special_values_stay_in_place(isa: str) -> None:
    x = np.ones((1, 2, 40), np.float32)
    x[0, 0, 3], x[0, 1, 7], x[0, 1, 8] = np.nan, np.inf, -np.inf
    w, b = np.full((2, 1, 1), 2, np.float32), np.ones(2, np.float32)
    plan = forced("scale", isa, x.shape, w, b, groups=2, activation="relu")
    want = np.full((1, 2, 40), 3, np.float32)
    want[0, 0, 3], want[0, 1, 7], want[0, 1, 8] = np.nan, np.inf, 0
    np.testing.assert_array_equal(plan(x), want)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_any_threads_and_batch(isa: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 16, 40, 40)).astype(np.float32)
    w, b = rng.standard_normal((16, 1, 1, 1)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
    assert_same_bits(forced("scale", isa, x.shape, w, b, groups=16), x)


def test_it_is_chosen_and_says_why_not(rng: np.random.Generator) -> None:
    def plan(shape: tuple[int, ...], **options: Any) -> pyconvbn.Plan:
        return pyconvbn.Plan(rng.standard_normal(shape).astype(np.float32), **options)

    assert plan((8, 1, 1, 1), groups=8).explain((1, 8, 9, 9))["algorithm"] == "scale"
    shape = (1, 8, 9, 9)
    assert why_not("scale", plan((8, 1, 3, 3), groups=8), shape) == "kernel is not 1"
    assert why_not("scale", plan((8, 1, 1, 1), groups=8, stride=2), shape) == "stride is not 1"
    assert why_not("scale", plan((8, 1, 1, 1), groups=8, padding=1), shape) == "padding is not 0"
    assert why_not("scale", plan((16, 1, 1, 1), groups=8), shape) == "groups are not the channels"
    assert why_not("scale", plan((8, 1, 1, 1), groups=8, transposed=True), shape) == "transposed"
