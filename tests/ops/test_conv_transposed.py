# SPDX-License-Identifier: BSD-3-Clause
"""The rows "transposed" and "upconv" on every instruction set: each result equals that of `direct` to the bit, whose own
results test_conv.py compares with the float64 reference."""

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
from rows_util import ISAS, arrays, assert_failures_are_clean, assert_same_bits, forced, why_not  # noqa: E402


def problem(
    rng: np.random.Generator, ic: int, oc: int, size: tuple[int, ...], kernel: tuple[int, ...], groups: int = 1, n: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return arrays(rng, n, ic, oc, size, kernel, groups, transposed=True)


def run(isa: str, algorithm: str, x: np.ndarray, w: np.ndarray, b: np.ndarray, residual: Any = None, **geometry: Any) -> Any:
    return forced(algorithm, isa, x.shape, w, b, transposed=True, **geometry)(x, residual=residual)


def compare(isa: str, x: np.ndarray, w: np.ndarray, b: np.ndarray, **geometry: Any) -> np.ndarray:
    got = run(isa, "transposed", x, w, b, **geometry)
    np.testing.assert_array_equal(got, run(isa, "direct", x, w, b, **geometry))
    if takes_upconv(w, **geometry):
        np.testing.assert_array_equal(got, run(isa, "upconv", x, w, b, **geometry))
    return got


def takes_upconv(w: np.ndarray, **geometry: Any) -> bool:
    nd = w.ndim - 2
    stride, padding, extra = (np.broadcast_to(geometry.get(key, 0), nd) for key in ("stride", "padding", "output_padding"))
    return bool(stride[-1] == 2 and (stride == w.shape[2:]).all() and not padding.any() and not extra.any())


# input size, kernel, stride, padding, output_padding
GEOMETRIES = [
    ((13, 11), (2, 2), (2, 2), (0, 0), (0, 0)),  # kernel = stride
    ((28, 28), (2, 2), (2, 2), (0, 0), (0, 0)),
    ((1, 1), (2, 2), (2, 2), (0, 0), (0, 0)),
    ((3, 100), (3, 2), (3, 2), (0, 0), (0, 0)),
    ((70,), (2,), (2,), (0,), (0,)),
    ((6, 50), (2, 2), (2, 2), (1, 1), (1, 0)),  # kernel = stride, padded: phases differ in distance
    ((16, 16), (4, 4), (2, 2), (1, 1), (0, 0)),
    ((7, 9), (3, 3), (2, 2), (1, 1), (1, 1)),  # kernel is no multiple of the stride
    ((5, 6), (5, 3), (2, 2), (2, 0), (0, 1)),
    ((9, 7), (1, 1), (2, 2), (0, 0), (1, 1)),  # phases without taps
    ((4, 5), (2, 3), (3, 4), (0, 1), (2, 1)),
    ((5, 4), (3, 4), (1, 2), (1, 1), (0, 0)),  # rows without a stride
    ((6, 5), (7, 6), (2, 2), (6, 5), (0, 0)),  # padding leaves some taps outside everywhere
    ((2, 3), (9, 8), (2, 3), (1, 0), (0, 0)),  # more taps than input
    ((3, 3), (16, 16), (16, 16), (0, 0), (0, 0)),
    ((3, 40), (5, 5), (5, 5), (0, 0), (0, 0)),
    ((32,), (16,), (8,), (4,), (0,)),
    ((101,), (4,), (2,), (1,), (0,)),
    ((19,), (3,), (4,), (0,), (3,)),
    ((3, 4, 5), (2, 2, 2), (2, 2, 2), (0, 0, 0), (0, 0, 0)),
    ((3, 5, 4), (3, 4, 3), (2, 2, 2), (1, 1, 1), (1, 0, 1)),
    ((4, 3, 3), (3, 1, 2), (3, 1, 2), (1, 0, 0), (0, 0, 0)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "output_padding"), GEOMETRIES, ids=str)
@pytest.mark.parametrize(("ic", "oc", "groups"), [(3, 5, 1), (16, 24, 1), (6, 27, 3)])
def test_equals_direct(
    isa: str, size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    output_padding: tuple[int, ...], ic: int, oc: int, groups: int, rng: np.random.Generator,
) -> None:
    x, w, b = problem(rng, ic, oc, size, kernel, groups)
    geometry = dict(stride=stride, padding=padding, output_padding=output_padding, groups=groups)
    got = compare(isa, x, w, b, **geometry)
    reference, tolerance = testing.error_model(x, w, b, transposed=True, **geometry)
    testing.assert_within(got, reference, tolerance, channel_axis=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "padding"), [(2, 0), (4, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogue_and_batch(
    isa: str, kernel: int, padding: int, activation: str | None, with_residual: bool, rng: np.random.Generator
) -> None:
    x, w, b = problem(rng, 24, 19, (9, 14), (kernel, kernel), n=3)
    geometry = dict(stride=2, padding=padding, activation=activation)
    residual = rng.standard_normal((3, 19, 18, 28)).astype(np.float32) if with_residual else None
    got = compare(isa, x, w, b, residual=residual, **geometry)
    for i in range(3):
        one = None if residual is None else residual[i : i + 1]
        np.testing.assert_array_equal(
            run(isa, "transposed", x[i : i + 1], w, b, residual=one, **geometry), got[i : i + 1]
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kernel", "padding", "width"), [(2, 0, 61), (4, 1, 31), (8, 3, 16)])
def test_threads_do_not_matter(isa: str, kernel: int, padding: int, width: int, rng: np.random.Generator) -> None:
    """Several super-panels and batches of output channels."""
    x, w, b = problem(rng, 40, 70, (23, width), (kernel, kernel), n=2)
    compare(isa, x, w, b, stride=2, padding=padding)
    for row in ("transposed", "upconv") if kernel == 2 else ("transposed",):
        assert_same_bits(forced(row, isa, x.shape, w, b, transposed=True, stride=2, padding=padding), x)


@pytest.mark.parametrize("isa", ISAS)
def test_infinities_and_nans_stay_in_place(isa: str, rng: np.random.Generator) -> None:
    x, w, b = problem(rng, 5, 6, (7, 20), (4, 4))
    x[0, 1, 0, 0], x[0, 2, 6, 19], x[0, 3, 3, 8] = np.inf, np.nan, -np.inf
    got = compare(isa, x, w, b, stride=2, padding=1)
    assert 0 < np.isnan(got).mean() < 0.1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_do_not_meet_the_padding(isa: str, value: float, rng: np.random.Generator) -> None:
    x, w, b = problem(rng, 3, 4, (3, 20), (4, 4))
    w[1, 2, 0, 0] = value
    got = compare(isa, x, w, b, stride=2, padding=1)
    assert np.isfinite(got[:, [0, 1, 3]]).all()
    rows, columns = np.nonzero(~np.isfinite(got[0, 2]))
    # Tap (0, 0) multiplies input (i, j) into output (2*i - 1, 2*j - 1).
    assert set(rows.tolist()) == {1, 3} and set(columns.tolist()) == set(range(1, 39, 2)) and rows.size == 2 * 19


@pytest.mark.parametrize(
    ("kernel", "geometry", "reason"),
    [
        ((3, 3), dict(stride=(2, 1), transposed=True), "stride"),
        ((3, 3), dict(stride=2, dilation=2, transposed=True), "dilation"),
        ((2, 2), dict(stride=(2, 65), transposed=True), "stride"),
        ((3, 3), dict(stride=2), "not transposed"),
    ],
)
def test_says_why_not(kernel: tuple[int, ...], geometry: dict[str, Any], reason: str) -> None:
    plan = pyconvbn.Plan(np.ones((4, 4, *kernel), np.float32), **geometry)
    assert reason in why_not("transposed", plan, (1, 4, 9, 9))
    with pytest.raises(ValueError, match="transposed"):
        _testing.plan_force(plan, (1, 4, 9, 9), "transposed")


@pytest.mark.vector_isa
def test_is_chosen_for_usual_layers() -> None:
    for ic, oc, size, algorithm in [(512, 256, 28, "transposed"), (128, 64, 112, "upconv")]:
        plan = pyconvbn.Plan(np.ones((ic, oc, 2, 2), np.float32), stride=2, transposed=True)
        assert plan.explain((1, ic, size, size))["algorithm"] == algorithm


@pytest.mark.parametrize(("algorithm", "kernel"), [("transposed", 2), ("transposed", 4), ("upconv", 2)])
@pytest.mark.parametrize("finite", [True, False])
def test_failed_allocations_are_reported(algorithm: str, kernel: int, finite: bool, rng: np.random.Generator) -> None:
    x, w, b = problem(rng, 8, 9, (6, 7), (kernel, kernel))
    if not finite:
        w[0, 0, 0, 0] = np.nan
    want = run(ISAS[0], algorithm, x, w, b, stride=2)
    assert_failures_are_clean(
        lambda: _testing.plan_with_isa(ISAS[0], w, b, stride=2, transposed=True), algorithm, x, want
    )
