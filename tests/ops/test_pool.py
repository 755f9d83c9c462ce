# SPDX-License-Identifier: BSD-3-Clause
"""Pooling against the float64 reference and, where torch is installed, against torch."""

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
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """A window that fits its input, dilation included."""
    nd = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 4), min_size=nd, max_size=nd))
    dilation = draw(st.lists(st.integers(1, 2), min_size=nd, max_size=nd))
    size = [draw(st.integers(d * (k - 1) + 1, 12)) for k, d in zip(kernel, dilation)]
    batch = draw(st.sampled_from([None, 0, 1, 3]))
    return dict(
        nd=nd, kernel=kernel, dilation=dilation, size=size,
        stride=draw(st.one_of(st.none(), st.lists(st.integers(1, 3), min_size=nd, max_size=nd))),
        padding=[draw(st.integers(0, k // 2)) for k in kernel], ceil_mode=draw(st.booleans()),
        shape=([] if batch is None else [batch]) + [draw(st.integers(1, 3))] + size,
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


def data(case: dict[str, Any]) -> np.ndarray:
    return np.random.default_rng(case["seed"]).standard_normal(case["shape"]).astype(case["dtype"])


@RUN
@given(windows())
def test_max_pool(case: dict[str, Any]) -> None:
    x = data(case)
    flat, rng = x.reshape(-1), np.random.default_rng(case["seed"])
    if x.size and case["seed"] % 3 == 0:
        flat[rng.integers(x.size)] = np.nan
        flat[rng.integers(x.size)] = -np.inf
    arguments = (case["kernel"], case["stride"], case["padding"], case["dilation"], case["ceil_mode"])
    got = _core.max_pool(case["nd"], x, *arguments, None)
    want = testing.reference_max_pool(case["nd"], x, *arguments)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, want)  # a maximum is one of its inputs: exact


@RUN
@given(windows(), st.booleans(), st.sampled_from([None, 1, 5, -2]))
def test_avg_pool(case: dict[str, Any], include: bool, divisor: int | None) -> None:
    x = data(case)
    arguments = (case["kernel"], case["stride"], case["padding"], case["ceil_mode"], include, divisor)
    got = _core.avg_pool(case["nd"], x, *arguments, None)
    want = testing.reference_avg_pool(case["nd"], x, *arguments)
    assert got.dtype == x.dtype
    count = int(np.prod(case["kernel"]))
    magnitude = testing.reference_avg_pool(case["nd"], np.abs(x), *arguments)
    # float16 is summed in float32 and rounded once, so its sums have no error of their own.
    testing.assert_within(got, want, testing.sum_error_model(want, np.abs(magnitude), 0 if x.dtype == np.float16 else count,
                                                             x.dtype), channel_axis=0)  # fmt: skip


@RUN
@given(windows(), st.data())
def test_adaptive_avg_pool(case: dict[str, Any], choose: st.DataObject) -> None:
    x = data(case)
    wanted = choose.draw(st.lists(st.sampled_from([None, 1, 2, 5, 13]), min_size=case["nd"], max_size=case["nd"]))
    got = _core.adaptive_avg_pool(case["nd"], x, wanted, None)
    want = testing.reference_adaptive_avg_pool(case["nd"], x, wanted)
    assert got.dtype == x.dtype
    magnitude = testing.reference_adaptive_avg_pool(case["nd"], np.abs(x), wanted)
    testing.assert_within(got, want, testing.sum_error_model(want, magnitude, 1, x.dtype), channel_axis=0)


def test_a_large_float16_mean_does_not_overflow() -> None:
    x = np.full((1, 1, 64, 64), 30000, np.float16)
    assert F.adaptive_avg_pool2d(x, 1).item() == 30000
    assert (F.avg_pool2d(x, 8) == 30000).all()


def test_padding_never_wins_a_maximum() -> None:
    x = np.full((1, 1, 4, 4), -5.0, np.float32)
    assert (F.max_pool2d(x, 3, 2, 1) == -5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_strided_and_overlapping(dtype: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 9, 8)).astype(dtype)
    want = F.max_pool2d(x, 2)
    out = np.empty((2, 3, 8, 4), dtype)[:, :, ::2]
    assert F.max_pool2d(x, 2, out=out) is out
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(F.max_pool2d(x[:, ::-1, :, ::-1], 2), F.max_pool2d(x[:, ::-1, :, ::-1].copy(), 2))
    base = x.copy()
    F.max_pool2d(base, 2, out=base[:, :, :4, :4])
    np.testing.assert_array_equal(base[:, :, :4, :4], want)


def test_same_bits_for_any_thread_count(keep_threads: None, rng: np.random.Generator) -> None:
    x = rng.standard_normal((4, 32, 40, 40)).astype(np.float32)
    results = []
    for threads in (1, 2, 5):
        _core.set_num_threads(threads)
        results.append([F.max_pool2d(x, 3, 2, 1), F.avg_pool2d(x, 3, 2, 1), F.adaptive_avg_pool2d(x, 7)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


X = np.zeros((1, 2, 6, 6), np.float32)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: F.max_pool2d(X, 0), r"kernel_size: expected >= 1, got 0"),
        (lambda: F.max_pool2d(X, 2, 0), r"stride: expected >= 1, got 0"),
        (lambda: F.max_pool2d(X, 2, padding=2), r"padding: expected 0 to half of the kernel's extent 2, got 2"),
        (lambda: F.max_pool2d(X, 2, padding=-1), r"padding: expected .* got -1"),
        (lambda: F.max_pool2d(X, 2, dilation=0), r"dilation: expected >= 1, got 0"),
        (lambda: F.max_pool2d(X, 7), r"input: expected a padded size >= the kernel's extent 7, got 6"),
        (lambda: F.max_pool2d(X, (2, 2, 2)), r"kernel_size"),
        (lambda: F.max_pool2d(X[0, 0], 2), r"input: expected 3 to 4 axes, got 2"),
        (lambda: F.avg_pool2d(X, 2, divisor_override=0), r"divisor_override: expected .* got 0"),
        (lambda: F.adaptive_avg_pool2d(X, 0), r"output_size: expected >= 1, got 0"),
        (lambda: F.adaptive_avg_pool2d(X, (1, 2, 3)), r"output_size: expected 2 entries, got 3"),
        (lambda: F.max_pool2d(X, 2, out=np.empty((1, 2, 3, 4), np.float32)), r"out"),
        (lambda: F.max_pool2d(X, 2**62, 1), r"kernel's extent"),
        (lambda: F.max_pool2d(X, 2, 2**62), r"stride: expected a number below 2\^62"),
    ],
)
def test_errors(call: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("bad", [np.zeros((1, 2, 4, 4), np.int32), [[1.0]], None])
def test_type_errors(bad: Any) -> None:
    with pytest.raises(TypeError, match="input"):
        F.max_pool2d(bad, 2)


@pytest.mark.oracle
@RUN
@given(windows(), st.booleans())
def test_against_torch(case: dict[str, Any], include: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = data(case)
    if x.shape[0] == 0:
        return
    nd, t = case["nd"], torch.from_numpy(x).double()
    name = f"pool{nd}d"
    arguments = (case["kernel"], case["stride"], case["padding"])
    got = _core.max_pool(nd, x, *arguments, case["dilation"], case["ceil_mode"], None)
    want = getattr(torch.nn.functional, f"max_{name}")(t, *arguments, case["dilation"], case["ceil_mode"])
    np.testing.assert_array_equal(got, want.numpy().astype(x.dtype))
    got = _core.avg_pool(nd, x, *arguments, case["ceil_mode"], include, None, None)
    want = getattr(torch.nn.functional, f"avg_{name}")(t, *arguments, case["ceil_mode"], include).numpy()
    tolerance = 16 * float(np.finfo(x.dtype).eps) * max(1.0, float(np.abs(x).max(initial=0)))
    testing.assert_within(got, want, np.full(want.shape, tolerance), channel_axis=0)
