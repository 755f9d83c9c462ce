# SPDX-License-Identifier: BSD-3-Clause
"""Activations, broadcasting arithmetic, softmax and padding against the float64 reference and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyconvbn.functional as F
from pyconvbn import _core, testing

DTYPES = [np.float16, np.float32, np.float64]
RUN = settings(max_examples=200, deadline=None, print_blob=True)

# name: (ours, reference)
ACTIVATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "relu": (F.relu, testing.reference_relu),
    "relu6": (F.relu6, testing.reference_relu6),
    "leaky_relu": (lambda x, **k: F.leaky_relu(x, 0.2, **k), lambda x: testing.reference_leaky_relu(x, 0.2)),
    "hardtanh": (lambda x, **k: F.hardtanh(x, -0.5, 2.0, **k), lambda x: testing.reference_hardtanh(x, -0.5, 2.0)),
    "hardswish": (F.hardswish, testing.reference_hardswish),
    "sigmoid": (F.sigmoid, testing.reference_sigmoid),
    "silu": (F.silu, testing.reference_silu),
    "gelu": (F.gelu, testing.reference_gelu),
    "gelu_tanh": (lambda x, **k: F.gelu(x, "tanh", **k), lambda x: testing.reference_gelu(x, "tanh")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, dtype: Any, rng: np.random.Generator) -> None:
    ours, reference = ACTIVATIONS[name]
    x = np.concatenate([rng.standard_normal(3001) * 4, [0.0, 1e-7, -1e-7, 3.0, -3.0, 6.0, 20.0, -20.0]]).astype(dtype)
    got, want = ours(x), reference(x)
    assert got.dtype == x.dtype
    # Absolute part: cancellation of x + 3, and tails that float32 formulas carry with the error of their argument.
    tolerance = testing.sum_error_model(want, 0.25 * np.abs(want) + 0.05 * np.minimum(np.abs(x.astype(float)), 8), 1, dtype)
    testing.assert_within(got, want, tolerance, channel_axis=0)
    np.testing.assert_array_equal(ours(x.reshape(17, -1)[::-1]), got.reshape(17, -1)[::-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_limits(name: str, dtype: Any) -> None:
    ours, reference = ACTIVATIONS[name]
    x = np.array([np.nan, np.inf, -np.inf], dtype)
    np.testing.assert_array_equal(ours(x), reference(x).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_in_place_and_empty(dtype: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 1300)).astype(dtype)
    for ours, _ in ACTIVATIONS.values():
        want, y = ours(x), x.copy()
        assert ours(y, out=y) is y
        np.testing.assert_array_equal(y, want)
        assert ours(x[:0]).shape == (0, 1300)
        out = np.empty((1300, 3), dtype).T
        ours(x, out=out)
        np.testing.assert_array_equal(out, want)


def test_threads_change_nothing(keep_threads: None, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((2, 4, 64, 777)).astype(np.float32)
    row = np.ascontiguousarray(y[0, :, :1])
    results = []
    for threads in (1, 2, 5):
        _core.set_num_threads(threads)
        results.append([F.gelu(x), F.relu(x), F.add(x, y, alpha=0.3), F.mul(x, row), F.softmax(x, 1), F.pad(x, (1, 2, 3, 4))])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


# -- binary ------------------------------------------------------------------------------------------------------


@st.composite
def operands(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    full = draw(st.lists(st.integers(0, 6), max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))

    def one() -> np.ndarray:
        shape = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, len(full))) :]
        return rng.integers(-9, 10, shape).astype(dtype)

    return one(), one()


@RUN
@given(operands(), st.sampled_from([1.0, -2.0, 0.5]))
def test_binary(pair: tuple[np.ndarray, np.ndarray], alpha: float) -> None:
    """Whole numbers: every result is exact."""
    x, y = pair
    np.testing.assert_array_equal(F.add(x, y, alpha=alpha), x + x.dtype.type(alpha) * y)
    got = F.mul(x, y)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x * y)


def test_binary_rounds_float16_once() -> None:
    x = np.array([2048], np.float16)
    assert F.add(x, np.array([1.5], np.float16), alpha=0.5).item() == 2048  # 2048.75 in float32, rounded once
    assert F.add(x, np.array([3.0], np.float16), alpha=1.0).item() == 2052


def test_binary_out_may_be_an_operand(rng: np.random.Generator) -> None:
    x, bias = rng.standard_normal((3, 5, 40)).astype(np.float32), rng.standard_normal((5, 1)).astype(np.float32)
    want, y = x + bias, x.copy()
    assert F.add(y, bias, out=y) is y
    np.testing.assert_array_equal(y, want)
    base = x.copy()
    F.add(base[:, :, 1:], base[:, :, :-1], out=base[:, :, 1:])  # overlaps both inputs
    np.testing.assert_array_equal(base[:, :, 1:], x[:, :, 1:] + x[:, :, :-1])


def test_binary_errors() -> None:
    a = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"y: expected a shape that broadcasts with x, got sizes 4 and 3 on axis 1"):
        _core.binary("add", a, np.zeros((2, 4), np.float32), 1.0, None)
    with pytest.raises(TypeError, match="float64"):
        _core.binary("mul", a, np.zeros(3), 1.0, None)
    with pytest.raises(TypeError, match="x"):
        _core.binary("mul", a.astype(int), a.astype(int), 1.0, None)
    with pytest.raises(ValueError, match="kind"):
        _core.binary("sub", a, a, 1.0, None)
    with pytest.raises(ValueError, match="out"):
        _core.binary("add", a, a, 1.0, np.zeros((3, 2), np.float32))


# -- softmax -----------------------------------------------------------------------------------------------------


@RUN
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.sampled_from(DTYPES), st.integers(0, 2**31), st.data())
def test_softmax(shape: list[int], dtype: Any, seed: int, choose: st.DataObject) -> None:
    x = (np.random.default_rng(seed).standard_normal(shape) * 20).astype(dtype)
    axis = choose.draw(st.integers(-len(shape), len(shape) - 1))
    got, want = F.softmax(x, axis), testing.reference_softmax(x, axis)
    assert got.dtype == x.dtype
    testing.assert_within(got, want, testing.sum_error_model(want, 0.0, 0, dtype), channel_axis=0)


def test_softmax_limits_and_errors() -> None:
    np.testing.assert_array_equal(F.softmax(np.array([0.0, -np.inf], np.float32)), [1, 0])
    np.testing.assert_array_equal(F.softmax(np.array([1e30, -1e30, 1e30])), [0.5, 0, 0.5])
    assert np.isnan(F.softmax(np.array([np.nan, 1.0]))).all()
    assert F.softmax(np.zeros((0, 3), np.float32), 1).shape == (0, 3)
    with pytest.raises(ValueError, match=r"axis: expected -1 to 0, got 1"):
        _core.softmax(np.zeros(3), 1, None)


# -- pad ---------------------------------------------------------------------------------------------------------


@st.composite
def paddings(draw: st.DrawFn) -> tuple[np.ndarray, list[int], str]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    amounts: list[int] = []
    for size in reversed(shape[draw(st.integers(0, len(shape) - 1)) :]):
        if mode == "constant":
            low = draw(st.integers(-(size // 2), 4))
            amounts += [low, draw(st.integers(-(size // 2), 4))]
        else:
            most = {"reflect": size - 1, "replicate": 5, "circular": size}[mode]
            amounts += [draw(st.integers(0, most)), draw(st.integers(0, most))]
    x = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape).astype(draw(st.sampled_from(DTYPES)))
    return x, amounts, mode


@RUN
@given(paddings())
def test_pad(case: tuple[np.ndarray, list[int], str]) -> None:
    x, amounts, mode = case
    value = 1.5 if mode == "constant" else 0.0
    got = F.pad(x, amounts, mode, value)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, testing.reference_pad(x, amounts, mode, value))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_cropping_with_other_modes(mode: str) -> None:
    x = np.arange(6.0)
    cropped = x[1:]  # crop first, then repeat what is left
    wanted = {"reflect": [*cropped, 4, 3], "replicate": [*cropped, 5, 5], "circular": [*cropped, 1, 2]}[mode]
    np.testing.assert_array_equal(F.pad(x, (-1, 2), mode), wanted)


@pytest.mark.parametrize(
    ("amounts", "mode", "text"),
    [
        ((4, 0), "reflect", r"padding: mode 'reflect' expects less than the input size 4, got 4"),
        ((0, 5), "circular", r"padding: mode 'circular' expects at most the input size 4, got 5"),
        ((-3, -2), "constant", r"padding: expected amounts that leave something .* \(-3, -2\) for size 4"),
        ((1, 2, 3), "constant", r"padding: expected an even number of entries up to 2, got 3"),
        ((1, 1, 1, 1), "constant", r"padding: expected an even number of entries up to 2, got 4"),
        ((2**63 - 1, 1), "constant", r"padding: expected sizes below 2\^63"),
        ((1, 1), "mirror", r"mode"),
    ],
)
def test_pad_errors(amounts: tuple[int, ...], mode: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        F.pad(np.zeros(4, np.float32), amounts, mode)


def test_an_impossible_padding_is_a_memory_error() -> None:
    with pytest.raises((MemoryError, ValueError)):
        F.pad(np.zeros((4, 4), np.float32), (2**40, 0, 2**40, 0))


# -- torch -------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_against_torch(name: str, dtype: Any, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functions = torch.nn.functional
    theirs: dict[str, Callable[[Any], Any]] = {
        "leaky_relu": lambda t: functions.leaky_relu(t, 0.2), "hardtanh": lambda t: functions.hardtanh(t, -0.5, 2.0),
        "gelu_tanh": lambda t: functions.gelu(t, approximate="tanh"), "sigmoid": torch.sigmoid,
    }  # fmt: skip
    x = np.concatenate([rng.standard_normal(999) * 3, [np.nan, np.inf, -np.inf, 0.0]]).astype(dtype)
    want = theirs.get(name, getattr(functions, name, None))(torch.from_numpy(x).double()).numpy()
    got = ACTIVATIONS[name][0](x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=8 * float(np.finfo(dtype).eps), atol=4 * float(np.finfo(dtype).eps))


@pytest.mark.oracle
@RUN
@given(paddings())
def test_pad_against_torch(case: tuple[np.ndarray, list[int], str]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, amounts, mode = case
    if mode != "constant":
        axes = len(amounts) // 2  # torch pads the last 1 to 3 axes of batches only
        if axes > 3:
            return
        x = x.reshape((1,) * (axes + 2 - x.ndim) + x.shape if x.ndim < axes + 2 else (-1, *x.shape[-axes - 1 :]))
    want = torch.nn.functional.pad(torch.from_numpy(x), amounts, mode)
    np.testing.assert_array_equal(F.pad(x, amounts, mode), want.numpy())


def test_scalars() -> None:
    x = np.array(2.5, np.float32)
    assert F.relu(x).shape == () and F.relu(x).item() == 2.5
    assert math.isclose(F.sigmoid(x).item(), 1 / (1 + math.exp(-2.5)), rel_tol=1e-6)
    assert F.mul(x, x).item() == 6.25
