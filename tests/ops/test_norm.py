# SPDX-License-Identifier: BSD-3-Clause
"""batch_norm against the float64 reference and, where torch is installed, against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyconvbn.functional as F
from pyconvbn import _core, testing

DTYPES = [np.float16, np.float32, np.float64]
RUN = settings(max_examples=200, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    channels = draw(st.integers(1, 6))
    shape = [draw(st.integers(0, 4)), channels, *draw(st.lists(st.integers(1, 9), max_size=3))]
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    dtype, parameters = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    offset = draw(st.sampled_from([0.0, 3.0, 300.0]))
    return dict(
        x=(rng.standard_normal(shape) * 2 + offset).astype(dtype),
        mean=(offset + rng.standard_normal(channels)).astype(parameters),
        var=(rng.random(channels) + 0.1).astype(parameters),
        weight=draw(st.sampled_from([None, (rng.standard_normal(channels)).astype(parameters)])),
        bias=draw(st.sampled_from([None, (rng.standard_normal(channels)).astype(parameters)])),
        eps=draw(st.sampled_from([0.0, 1e-5, 1e-2])), momentum=draw(st.sampled_from([0.0, 0.1, 1.0])),
    )  # fmt: skip


@RUN
@given(cases())
def test_eval(case: dict[str, Any]) -> None:
    x, rest = case["x"], (case["mean"], case["var"], case["weight"], case["bias"])
    got = F.batch_norm(x, *rest, eps=case["eps"])
    assert got.dtype == x.dtype and got.shape == x.shape
    want = testing.reference_batch_norm(x, *rest, eps=case["eps"])
    testing.assert_within(got, want, testing.batch_norm_error_model(x, *rest, eps=case["eps"]))


@RUN
@given(cases())
def test_training(case: dict[str, Any]) -> None:
    x, mean, var = case["x"], case["mean"].copy(), case["var"].copy()
    if x[:, 0].size < 2:
        return
    got = F.batch_norm(x, mean, var, case["weight"], case["bias"], True, case["momentum"], 1e-5)
    want = testing.reference_batch_norm(x, None, None, case["weight"], case["bias"], True, eps=1e-5)
    others, wide = tuple(a for a in range(x.ndim) if a != 1), x.astype(np.float64)
    batch_mean, batch_var = wide.mean(axis=others), wide.var(axis=others)
    tolerance = testing.batch_norm_error_model(x, batch_mean, batch_var, case["weight"], case["bias"], eps=1e-5)
    # The batch mean is a float64 sum whose error is relative to the mean magnitude, which may exceed |x| and |mean|.
    scale = (1.0 if case["weight"] is None else np.abs(case["weight"].astype(np.float64))) / np.sqrt(batch_var + 1e-5)
    of_mean = testing.sum_error_model(0.0, np.abs(wide).mean(axis=others) * scale, x[:, 0].size, np.float64)
    testing.assert_within(got, want, tolerance + of_mean.reshape([-1 if a == 1 else 1 for a in range(x.ndim)]))
    stats = testing.reference_batch_norm_stats(x, case["mean"], case["var"], case["momentum"])
    for updated, wanted, size in zip((mean, var), stats, (np.abs(wide), wide**2)):
        # Statistics are float64 sums whatever the dtype; storing them rounds once.
        summing = testing.sum_error_model(wanted, size.mean(axis=others) * 2, x[:, 0].size, np.float64)
        testing.assert_within(updated, wanted, summing + testing.sum_error_model(wanted, 0.0, 0, updated.dtype), channel_axis=0)


def test_a_large_mean_keeps_its_digits() -> None:
    """The mean is a thousand deviations: x*s + t in float32 would lose three digits."""
    rng = np.random.default_rng(3)
    x = (1000 + rng.standard_normal((8, 4, 16, 16))).astype(np.float32)
    mean, var = np.full(4, 1000.1), np.full(4, 0.9)
    got = F.batch_norm(x, mean, var)
    want = testing.reference_batch_norm(x, mean, var)
    assert np.abs(got - want).max() < 2e-6
    got = F.batch_norm(x, None, None, training=True)
    want = testing.reference_batch_norm(x, None, None, training=True)
    assert np.abs(got - want).max() < 2e-6


def test_running_statistics_of_any_layout() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    plain_mean, plain_var = np.zeros(3), np.ones(3)
    F.batch_norm(x, plain_mean, plain_var, training=True)
    for convert in (
        lambda a: np.repeat(a, 2)[::2], lambda a: a[::-1].copy()[::-1], lambda a: a.astype(">f8"),
        lambda a: np.frombuffer(bytearray(b"\0" + a.tobytes()), np.uint8)[1:].view(np.float64),
    ):  # fmt: skip
        mean, var = convert(np.zeros(3)), convert(np.ones(3))
        F.batch_norm(x, mean, var, training=True)
        np.testing.assert_array_equal(mean, plain_mean)
        np.testing.assert_array_equal(var, plain_var)


def test_training_with_one_or_no_running_array() -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    mean = np.zeros(2)
    alone = F.batch_norm(x, mean, None, training=True)
    np.testing.assert_array_equal(alone, F.batch_norm(x, None, None, training=True))
    np.testing.assert_allclose(mean, 0.1 * x.mean(axis=(0, 2)))


def test_nan_channels_are_those_of_the_formula() -> None:
    x = np.ones((2, 3, 4), np.float32)
    got = F.batch_norm(x, np.zeros(3), np.array([1.0, -1.0, np.inf]), eps=0.0)
    assert np.isnan(got[:, 1]).all() and (got[:, 0] == 1).all() and (got[:, 2] == 0).all()
    got = F.batch_norm(x, np.array([np.inf, 0.0, np.nan]), np.ones(3), eps=0.0)
    assert np.isneginf(got[:, 0]).all() and (got[:, 1] == 1).all() and np.isnan(got[:, 2]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype: Any) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2, 3, 700)).astype(dtype)
    for training in (False, True):
        want = F.batch_norm(x, np.zeros(3), np.ones(3), training=training)
        y = x.copy()
        assert F.batch_norm(y, np.zeros(3), np.ones(3), training=training, out=y) is y
        np.testing.assert_array_equal(y, want)


def test_same_bits_for_any_thread_count(keep_threads: None, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 40, 33, 31)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        _core.set_num_threads(threads)
        mean, var = np.zeros(40), np.ones(40)
        results.append((F.batch_norm(x, mean, var), F.batch_norm(x, mean, var, training=True), mean, var))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


X = np.ones((2, 3, 4), np.float32)
ONE, ZERO = np.ones(3), np.zeros(3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: F.batch_norm(X, np.zeros(2), ONE), r"running_mean: expected length 3 .* got 2"),
        (lambda: F.batch_norm(X, ZERO, np.ones(1)), r"running_var: expected length 3 .* got 1"),
        (lambda: F.batch_norm(X, ZERO, ONE, np.ones(4)), r"weight: expected length 3 .* got 4"),
        (lambda: F.batch_norm(X, ZERO, ONE, None, np.ones((3, 1))), r"bias: expected length 3 .* axes of 2"),
        (lambda: F.batch_norm(X, None, ONE), r"running_mean: expected an array .* got None"),
        (lambda: F.batch_norm(X, ZERO, None), r"running_var: expected an array .* got None"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps=-1.0), r"eps: expected .* got -1"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps=float("nan")), r"eps: expected .* got"),
        (lambda: F.batch_norm(X[:1, :, :1], ZERO, ONE, training=True), r"input: expected more than 1 value .* got 1"),
        (lambda: F.batch_norm(X[0, 0], ZERO, ONE), r"input: expected 2 to \d+ axes, got 1"),
        (lambda: F.batch_norm(X, ZERO, ONE, momentum=None, training=True), r"momentum"),
    ],
)
def test_errors(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_a_failure_leaves_the_statistics_alone() -> None:
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="weight"):
        F.batch_norm(X, mean, var, np.ones(4), training=True)
    var.flags.writeable = False
    with pytest.raises(ValueError, match="running_var"):
        F.batch_norm(X, mean, var, training=True)
    assert (mean == 0).all() and (var == 1).all()


def test_integer_statistics_are_refused() -> None:
    with pytest.raises(TypeError, match="running_mean"):
        F.batch_norm(X, np.zeros(3, int), ONE)


@pytest.mark.oracle
@RUN
@given(cases(), st.booleans())
def test_against_torch(case: dict[str, Any], training: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = case["x"]
    if x[:, 0].size < 2:
        return

    def tensor(a: Any) -> Any:
        return None if a is None else torch.from_numpy(np.array(a, np.float64))

    mean, var = case["mean"].astype(np.float64), case["var"].astype(np.float64)
    t_mean, t_var = tensor(mean), tensor(var)
    want = torch.nn.functional.batch_norm(
        tensor(x), t_mean, t_var, tensor(case["weight"]), tensor(case["bias"]), training, case["momentum"], 1e-3
    ).numpy()
    got = F.batch_norm(x, mean, var, case["weight"], case["bias"], training, case["momentum"], 1e-3)
    scale = np.abs(want).max(initial=1.0) + np.abs(x.astype(np.float64)).max()
    testing.assert_within(got, want, np.full(want.shape, 64 * float(np.finfo(x.dtype).eps) * scale))
    np.testing.assert_allclose(mean, t_mean.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(var, t_var.numpy(), rtol=1e-9, atol=1e-12)
