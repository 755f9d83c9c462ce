# SPDX-License-Identifier: BSD-3-Clause
"""1x1 convolutions by the row `pointwise`: blocks of every width, ragged panels, strides, groups, residual, threads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import ISAS, arrays, assert_same_bits, forced  # noqa: E402

# n, groups, ic, oc of a group; size; stride. Planes are large enough for vectors of 16.
LAYERS = [
    (1, 1, 1, 1, (12, 12), (1, 1)),
    (2, 1, 3, 7, (13, 17), (1, 1)),
    (1, 3, 20, 13, (16, 16), (1, 1)),
    (2, 1, 230, 45, (14, 14), (1, 1)),
    (1, 1, 900, 100, (12, 13), (1, 1)),
    (1, 2, 200, 64, (15, 20), (1, 1)),
    (1, 1, 60, 70, (31, 29), (2, 2)),
    (2, 1, 300, 65, (30, 30), (2, 2)),
    (1, 1, 17, 64, (40, 50), (3, 1)),
    (1, 1, 200, 50, (10, 13), (1, 1)),
    (1, 1, 30, 31, (1, 131), (1, 1)),
    (1, 1, 33, 70, (67, 5), (1, 2)),
    (1, 1, 20, 66, (100, 9), (1, 4)),
]


def problem(layer: tuple, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    n, groups, ic, oc, size, stride = layer
    return *arrays(rng, n, groups * ic, groups * oc, size, (1, 1), groups), {"groups": groups, "stride": stride}


def pointwise(isa: str, w: np.ndarray, b: np.ndarray, shape: tuple[int, ...], **options: object) -> pyconvbn.Plan:
    return forced("pointwise", isa, shape, w, b, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_pointwise_matches_the_reference(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    reference, tolerance = testing.error_model(x, w, b, **geometry)
    plan = pointwise(isa, w, b, x.shape, **geometry)
    testing.assert_within(plan(x), reference, tolerance, channel_axis=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_residual_and_clamp(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    plain = pointwise(isa, w, b, x.shape, **geometry)(x)
    residual = rng.standard_normal(plain.shape).astype(np.float32)
    clamped = pointwise(isa, w, b, x.shape, activation="relu6", **geometry)(x, residual=residual)
    np.testing.assert_array_equal(clamped, np.clip(plain + residual, 0, 6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_same_bits_for_any_threads_and_batch(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    x = np.concatenate([x, x[::-1]])
    assert_same_bits(pointwise(isa, w, b, x.shape, **geometry), x)


@pytest.mark.parametrize("isa", ISAS)
def test_nonfinite_values_stay_in_their_pixel(isa: str, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem((1, 1, 200, 30, (13, 13), (1, 1)), rng)
    plan = pointwise(isa, w, b, x.shape, **geometry)
    clean = plan(x)
    x[0, 77, 12, 12] = np.inf
    out = plan(x)
    assert not np.any(np.isfinite(out[0, :, 12, 12]))
    out[0, :, 12, 12] = clean[0, :, 12, 12]
    np.testing.assert_array_equal(out, clean)
