# SPDX-License-Identifier: BSD-3-Clause
"""conv_bn without a plan. Where the outputs are fewer than the weights it scales the outputs instead of folding the weights:
both ways are held against the reference here."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import BatchNormParams, Plan, _core, testing
from pyconvbn._core import _testing

# name -> (weight shape, arguments, input shape, whether the outputs are scaled)
LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...], bool]] = {
    "3x3 large map": ((16, 8, 3, 3), {"padding": 1}, (2, 8, 20, 20), False),
    "3x3 small map": ((64, 48, 3, 3), {"padding": 1}, (1, 48, 7, 7), True),
    "3x3 batch": ((64, 48, 3, 3), {"padding": 1}, (3, 48, 7, 7), True),
    "stride 2": ((40, 40, 3, 3), {"padding": 1, "stride": 2}, (1, 40, 14, 14), True),
    "pointwise": ((96, 80, 1, 1), {}, (1, 80, 7, 7), True),
    "grouped": ((64, 16, 3, 3), {"groups": 4, "padding": 1}, (1, 64, 7, 7), True),
    "reflect": ((32, 32, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 32, 6, 6), True),
    "transposed": ((32, 24, 4, 4), {"transposed": True, "stride": 2, "padding": 1}, (1, 32, 7, 7), True),
    "transposed large map": ((16, 8, 2, 2), {"transposed": True, "stride": 2}, (1, 16, 9, 9), False),
    "1d": ((64, 32, 9), {"padding": 4}, (1, 32, 30), True),
    "3d": ((32, 16, 3, 3, 3), {"padding": 1}, (1, 16, 3, 4, 4), True),
    "linear": ((50, 30), {}, (4, 30), True),
    "linear batch": ((50, 30), {}, (64, 30), True),
}


def make(name: str, rng: np.random.Generator, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    shape, arguments, input_shape, _ = LAYERS[name]
    oc = shape[1] * arguments.get("groups", 1) if arguments.get("transposed") else shape[0]
    bn = BatchNormParams(rng.normal(1, 0.3, oc), rng.normal(size=oc), rng.normal(size=oc), rng.uniform(0.3, 3, oc), 1e-3)
    w, b = rng.normal(0.1, 0.5, shape).astype(dtype), rng.normal(size=oc).astype(dtype)
    return rng.normal(0.2, 1.0, input_shape).astype(dtype), w, b, bn


def conv_bn(name: str, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, bn: Any, out: np.ndarray | None = None) -> np.ndarray:
    a = LAYERS[name][1]
    return _core.conv_bn(  # type: ignore[no-any-return]
        w.ndim - 2, x, w, b, bn, a.get("stride", 1), a.get("padding", 0), a.get("padding_mode", "zeros"), 1,
        a.get("groups", 1), a.get("transposed", False), 0, out)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_against_the_reference(name: str, dtype: str, with_bias: bool, rng: np.random.Generator) -> None:
    x, w, b, bn = make(name, rng, dtype)
    bias = b if with_bias else None
    reference, tolerance = testing.error_model(x, w, bias, bn=bn, **LAYERS[name][1])
    testing.assert_within(conv_bn(name, x, w, bias, bn), reference, tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_small_weights_are_folded_large_ones_are_not(name: str, rng: np.random.Generator) -> None:
    """Told apart by a weight that overflows only together with its scale."""
    x, w, b, bn = make(name, rng)
    big = bn._replace(weight=np.full_like(bn.weight, 1e30))
    y = conv_bn(name, np.zeros_like(x), np.full_like(w, 1e10), b, big)
    assert np.isfinite(y).all() == LAYERS[name][3]


def test_a_folded_weight_that_overflows_is_no_reason_to_fail(rng: np.random.Generator) -> None:
    x, w, b, bn = make("pointwise", rng)
    out = np.full((1, 96, 7, 7), 7, np.float32)
    assert conv_bn("pointwise", x, w, b, bn, out) is out
    np.testing.assert_array_equal(out, conv_bn("pointwise", x, w, b, bn))


@pytest.mark.parametrize("name", LAYERS)
def test_threads_and_batch_do_not_change_a_bit(name: str, rng: np.random.Generator, keep_threads: None) -> None:
    x, w, b, bn = make(name, rng)
    pyconvbn.set_num_threads(1)
    want = conv_bn(name, x, w, b, bn)
    for threads in (2, 3):
        pyconvbn.set_num_threads(threads)
        np.testing.assert_array_equal(conv_bn(name, x, w, b, bn), want)


@pytest.mark.parametrize("name", ["3x3 large map", "3x3 small map", "linear"])
def test_bad_batch_norms_are_refused_either_way(name: str, rng: np.random.Generator) -> None:
    x, w, b, bn = make(name, rng)
    for field in ("running_mean", "running_var", "weight", "bias"):
        with pytest.raises(ValueError, match=rf"{field}.*{len(b)}.*got 3"):
            conv_bn(name, x, w, b, bn._replace(**{field: np.ones(3)}))
    with pytest.raises(ValueError, match="bias"):
        conv_bn(name, x, w, b[:3], bn)
    with pytest.raises(ValueError, match="channels|features|got"):
        conv_bn(name, x[:, :3], w, b, bn)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_kept_after_the_call(name: str, rng: np.random.Generator) -> None:
    x, w, b, bn = make(name, rng)
    out = conv_bn(name, x, w, b, bn)
    gc.collect()
    before = _core.alloc_stats()
    for _ in range(20):
        conv_bn(name, x, w, b, bn, out)
    gc.collect()
    after = _core.alloc_stats()
    assert after["live_bytes"] == before["live_bytes"] and after["live_blocks"] == before["live_blocks"]


@pytest.mark.parametrize("name", ["3x3 small map", "pointwise", "3x3 large map"])
def test_every_allocation_may_fail(name: str, rng: np.random.Generator) -> None:
    x, w, b, bn = make(name, rng)
    want = conv_bn(name, x, w, b, bn)
    gc.collect()
    _testing.scratch_trim()
    before, failures = _core.alloc_stats()["live_bytes"] - want.nbytes * (want.nbytes >= 1 << 16), 0
    for n in range(200):
        _testing.alloc_fail_after(n)
        try:
            got = conv_bn(name, x, w, b, bn)
        except MemoryError as error:
            assert "out of memory" in str(error)
            failures += 1
            continue
        finally:
            _testing.alloc_fail_after(-1)
        np.testing.assert_array_equal(got, want)
        if _core.alloc_stats()["total_allocs"] and failures < n:
            break
    del got
    assert failures > 0
    _testing.scratch_trim()
    assert _core.alloc_stats()["live_bytes"] - want.nbytes * (want.nbytes >= 1 << 16) == before


def test_plans_made_later_see_no_trace_of_recycled_memory(rng: np.random.Generator) -> None:
    """Packed weights with padded lanes, in a block that held something else before."""
    junk = Plan(np.full((64, 64, 3, 3), np.nan, np.float32), padding=1)
    junk(np.full((1, 64, 9, 9), np.nan, np.float32))
    del junk
    x, w = rng.normal(size=(1, 61, 9, 9)).astype(np.float32), rng.normal(size=(53, 61, 3, 3)).astype(np.float32)
    bn = BatchNormParams(np.ones(53), np.zeros(53), np.zeros(53), np.ones(53), 0.0)
    for _ in range(3):
        nans = np.full((64, 64, 3, 3), np.nan, np.float32)
        _core.conv_bn(2, np.ones((1, 64, 9, 9), np.float32), nans, None, BatchNormParams(*[np.ones(64)] * 4), 1, 1, "zeros",
                      1, 1, False, 0, None)
        y = _core.conv_bn(2, x, w, None, bn, 1, 1, "zeros", 1, 1, False, 0, None)
        testing.assert_within(y, *testing.error_model(x, w, None, bn=bn, padding=1))
