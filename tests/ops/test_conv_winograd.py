# SPDX-License-Identifier: BSD-3-Clause
"""The Winograd rows on every kind of geometry they cut into tiles: right, accurate, the same bits for any split."""

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
from rows_util import ISAS, arrays, assert_same_bits, takes, why_not  # noqa: E402

ROWS = ["winograd_4x4", "winograd_4x2", "winograd_2x2"]

# batch, input channels, output channels, size, kernel, geometry
CASES: dict[str, tuple[int, int, int, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": (1, 16, 16, (8, 8), (3, 3), dict(padding=1)),
    "3x3 ragged": (3, 33, 50, (14, 15), (3, 3), dict(padding=1)),
    "3x3 map smaller than a tile": (2, 17, 24, (1, 2), (3, 3), dict(padding=1)),
    "3x3 one output": (2, 16, 16, (3, 3), (3, 3), dict()),
    "3x3 several images a block": (9, 64, 40, (7, 7), (3, 3), dict(padding=1)),
    "3x3 narrow": (2, 17, 24, (40, 3), (3, 3), dict()),
    "3x3 wide padding": (1, 16, 16, (57, 61), (3, 3), dict(padding=2)),
    "3x3 several strips": (1, 40, 16, (5, 430), (3, 3), dict(padding=1)),
    "3x3 many channels": (2, 300, 100, (6, 7), (3, 3), dict(padding=1)),
    "groups": (2, 64, 48, (5, 6), (3, 3), dict(padding=1, groups=2)),
    "2x2": (2, 16, 17, (9, 8), (2, 2), dict(padding=(1, 0))),
    "3x2": (2, 16, 17, (9, 8), (3, 2), dict(padding=(1, 0))),
    "dilated": (2, 20, 24, (28, 29), (3, 3), dict(padding=2, dilation=2)),
    "dilated unequally": (2, 20, 24, (28, 29), (3, 3), dict(padding=3, dilation=(3, 2))),
    "dilated more than the map": (1, 20, 24, (11, 13), (3, 3), dict(padding=12, dilation=12)),
    "3d": (2, 18, 24, (6, 9, 10), (3, 3, 3), dict(padding=1)),
    "3d strided depth": (2, 18, 24, (7, 9, 10), (3, 3, 3), dict(padding=1, stride=(2, 1, 1))),
    "3d dilated": (2, 18, 24, (9, 9, 10), (3, 3, 3), dict(padding=2, dilation=2)),
    "3d planes of padding alone": (2, 18, 24, (1, 9, 10), (2, 3, 3), dict(padding=(3, 1, 1), dilation=(2, 1, 1))),
    "3x1x1": (2, 18, 24, (7, 9, 10), (3, 1, 1), dict(padding=(1, 0, 0))),
    "1x3x3": (2, 18, 24, (7, 9, 10), (1, 3, 3), dict(padding=1)),
    "k3": (2, 18, 24, (100,), (3,), dict(padding=1)),
    "k7": (2, 18, 24, (101,), (7,), dict(padding=3)),
    "k11 dilated": (2, 18, 24, (201,), (11,), dict(padding=25, dilation=5)),
    "1x7": (2, 18, 24, (17, 17), (1, 7), dict(padding=(0, 3))),
    "7x1": (2, 18, 24, (17, 17), (7, 1), dict(padding=(3, 0))),
    "5x5": (2, 18, 24, (17, 19), (5, 5), dict(padding=2)),
    "strided 3x3": (2, 18, 24, (17, 20), (3, 3), dict(padding=1, stride=2)),
    "strided 5x4": (2, 18, 24, (18, 20), (5, 4), dict(padding=1, stride=(2, 3))),
    "strided rows": (2, 18, 24, (18, 20), (5, 3), dict(padding=1, stride=(2, 1))),
    "strided k3": (2, 18, 24, (101,), (3,), dict(stride=2)),
    "transposed k4 s2": (2, 20, 18, (9, 10), (4, 4), dict(stride=2, padding=1, transposed=True)),
    "transposed k3 s2": (2, 20, 18, (9, 10), (3, 3), dict(stride=2, padding=1, output_padding=1, transposed=True)),
    "transposed 5x4 s3x1": (
        2, 20, 18, (9, 10), (5, 4), dict(stride=(3, 1), padding=(2, 0), output_padding=(1, 0), transposed=True),
    ),
    "transposed k16 s8": (2, 20, 18, (32,), (16,), dict(stride=8, padding=3, output_padding=5, transposed=True)),
    "transposed s1": (2, 20, 18, (9, 10), (3, 3), dict(padding=1, transposed=True)),
    "transposed groups": (2, 40, 36, (9, 10), (4, 4), dict(stride=2, padding=1, transposed=True, groups=2)),
}
# One of each kind for what does not depend on sizes.
KINDS = ["3x3 ragged", "groups", "dilated", "3d", "k7", "strided 3x3", "transposed k4 s2"]


def problem(case: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    n, ic, oc, size, kernel, geometry = CASES[case]
    layer = arrays(rng, n, ic, oc, size, kernel, geometry.get("groups", 1), geometry.get("transposed", False))
    return *layer, geometry


def within(out: np.ndarray, reference: np.ndarray, tolerance: np.ndarray) -> None:
    """Errors of a tile are those of its largest output."""
    testing.assert_within(out, reference, np.full_like(tolerance, tolerance.max()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(isa: str, case: str, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(case, rng)
    reference, tolerance = testing.error_model(x, w, b, **geometry)
    plan = _testing.plan_with_isa(isa, w, b, precision="fast", **geometry)
    ran = 0
    for row in ROWS:
        if takes(plan, x.shape, row):
            ran += 1
            within(plan(x), reference, tolerance)
    assert ran >= 2


@pytest.mark.parametrize("isa", ISAS[:1])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_for_any_split(isa: str, case: str, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(case, rng)
    x = np.concatenate([x] * 2)
    plan = _testing.plan_with_isa(isa, w, b, precision="fast", **geometry)
    for row in ROWS:
        if takes(plan, x.shape, row):
            assert_same_bits(plan, x)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", KINDS)
def test_residual_and_activation(isa: str, case: str, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(case, rng)
    shape = pyconvbn.Plan(w, b, **geometry).output_shape(x.shape)
    residual = rng.standard_normal(shape).astype(np.float32)
    for activation in ("relu", "relu6", "silu"):
        reference, tolerance = testing.error_model(
            x, w, b, residual=residual, activation=activation, **geometry
        )
        plan = _testing.plan_with_isa(isa, w, b, precision="fast", activation=activation, **geometry)
        for row in ROWS:
            if takes(plan, x.shape, row):
                within(plan(x, residual=residual), reference, tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", KINDS)
def test_nan_and_infinity_stay_in_place(isa: str, case: str, value: float, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(case, rng)
    clean = x.copy()
    x[1, 3, ..., 2] = value
    reference, tolerance = testing.error_model(x, w, b, **geometry)
    finite = np.isfinite(reference)
    assert 0 < np.count_nonzero(finite[1]) < finite[1].size
    plan = _testing.plan_with_isa(isa, w, b, precision="fast", **geometry)
    for row in ROWS:
        if not takes(plan, x.shape, row):
            continue
        out, untouched = plan(x), plan(clean)
        within(np.where(finite, out, 0), np.where(finite, reference, 0), np.where(finite, tolerance, 0))
        np.testing.assert_array_equal(out[~finite], reference[~finite].astype(np.float32))
        np.testing.assert_array_equal(np.delete(out, 1, 0), np.delete(untouched, 1, 0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("precision", "most"), [("fp32", 2.0), ("strict", 1.02)])
@pytest.mark.parametrize("channels", [16, 32, 64, 160, 256])
@pytest.mark.parametrize("geometry", [
    (2, 3, dict(padding=1)), (1, 3, dict(padding=1)), (2, 5, dict(padding=2)), (1, 7, dict(padding=3)),
    (2, 3, dict(stride=2, padding=1)), (2, 4, dict(stride=2, padding=1, transposed=True)),
], ids=str)
def test_accuracy_is_that_of_the_precision(
    isa: str, precision: str, most: float, channels: int, geometry: tuple[int, int, dict[str, Any]],
    rng: np.random.Generator,
) -> None:
    """Rms error against that of a sequential float32 sum, which is what `ref` computes, after a ReLU."""
    nd, kernel, arguments = geometry
    oc = 24
    across = (channels, oc) if arguments.get("transposed") else (oc, channels)
    x = np.maximum(rng.standard_normal((1, channels, *((600,) if nd == 1 else (20, 20)))), 0).astype(np.float32)
    w = rng.standard_normal((*across, *(kernel,) * nd)).astype(np.float32)
    plan = _testing.plan_with_isa(isa, w, precision=precision, **arguments)
    reference, _ = testing.error_model(x, w, **arguments)

    def rms(row: str) -> float:
        _testing.plan_force(plan, x.shape, row)
        return float(np.sqrt(np.mean((plan(x) - reference) ** 2)))

    sequential = rms("ref")
    rows = [row for row in ROWS if takes(plan, x.shape, row)]
    assert rows or channels < 160
    for row in rows:
        assert rms(row) <= most * sequential, row


@pytest.mark.parametrize(("shape", "weight", "arguments", "reason"), [
    ((1, 8, 9, 9), (16, 8, 3, 3), {}, "fewer than 16 channels"),
    ((1, 16, 9, 9), (16, 16, 1, 1), {}, "no axis"),
    ((1, 16, 9, 9), (16, 16, 3, 3), dict(stride=2, dilation=2), "dense pieces"),
    ((1, 16, 9, 9), (16, 16, 2, 2), dict(stride=2), "dense pieces"),
    ((1, 16, 9, 9, 9), (16, 16, 3, 3, 3), dict(transposed=True), "depth"),
    ((1, 16, 9, 9), (16, 16, 3, 3), dict(precision="strict"), "rounding errors"),
])
def test_says_why_not(
    shape: tuple[int, ...], weight: tuple[int, ...], arguments: dict[str, Any], reason: str
) -> None:
    plan = pyconvbn.Plan(np.ones(weight, np.float32), **arguments)
    assert reason in why_not("winograd_4x4", plan, shape)


def test_takes_the_layers_it_is_made_for() -> None:
    for weight, shape, geometry in (
        ((64, 64, 3, 3), (1, 64, 56, 56), dict(padding=1)),
        ((512, 512, 3, 3), (1, 512, 28, 28), dict(padding=2, dilation=2)),
        ((64, 64, 3, 3, 3), (1, 64, 8, 28, 28), dict(padding=1)),
    ):
        plan = pyconvbn.Plan(np.ones(weight, np.float32), **geometry)
        assert plan.explain(shape)["algorithm"].startswith("winograd")
