# SPDX-License-Identifier: BSD-3-Clause
"""1x1 convolutions by the row `pointwise`: blocks of every width, ragged panels, strides, groups, residual, threads."""

from __future__ import annotations

import numpy as np
import pytest

import pyconvbn
from pyconvbn import testing
from pyconvbn._core import _testing

ISAS = _testing.isas()
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
]


def problem(layer: tuple, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    n, groups, ic, oc, size, stride = layer
    x = rng.standard_normal((n, groups * ic, *size)).astype(np.float32)
    w = rng.standard_normal((groups * oc, ic, 1, 1)).astype(np.float32)
    return x, w, rng.standard_normal(groups * oc).astype(np.float32), {"groups": groups, "stride": stride}


def forced(isa: str, w: np.ndarray, b: np.ndarray, shape: tuple[int, ...], **options: object) -> pyconvbn.Plan:
    plan = _testing.plan_with_isa(isa, w, b, **options)
    _testing.plan_force(plan, shape, "pointwise")
    assert plan.explain(shape)["algorithm"] == "pointwise"
    return plan


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_pointwise_matches_the_reference(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    reference, tolerance = testing.error_model(x, w, b, **geometry)
    plan = forced(isa, w, b, x.shape, **geometry)
    testing.assert_within(plan(x), reference, tolerance, channel_axis=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_residual_and_clamp(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    plain = forced(isa, w, b, x.shape, **geometry)(x)
    residual = rng.standard_normal(plain.shape).astype(np.float32)
    clamped = forced(isa, w, b, x.shape, activation="relu6", **geometry)(x, residual=residual)
    np.testing.assert_array_equal(clamped, np.clip(plain + residual, 0, 6))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_same_bits_for_any_threads_and_batch(isa: str, layer: tuple, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem(layer, rng)
    x = np.concatenate([x, x[::-1]])
    plan = forced(isa, w, b, x.shape, **geometry)
    before = pyconvbn.get_num_threads()
    try:
        pyconvbn.set_num_threads(1)
        one = plan(x)
        pyconvbn.set_num_threads(2)
        np.testing.assert_array_equal(plan(x), one)
        np.testing.assert_array_equal(plan(x[:1]), one[:1])
    finally:
        pyconvbn.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_nonfinite_values_stay_in_their_pixel(isa: str, rng: np.random.Generator) -> None:
    x, w, b, geometry = problem((1, 1, 200, 30, (13, 13), (1, 1)), rng)
    plan = forced(isa, w, b, x.shape, **geometry)
    clean = plan(x)
    x[0, 77, 12, 12] = np.inf
    out = plan(x)
    assert not np.any(np.isfinite(out[0, :, 12, 12]))
    out[0, :, 12, 12] = clean[0, :, 12, 12]
    np.testing.assert_array_equal(out, clean)
