# SPDX-License-Identifier: BSD-3-Clause
"""What an array argument may be: any layout, byte order, alignment, DLPack, torch; and what `out=` may be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pyconvbn
import pyconvbn.functional as F
from pyconvbn import Plan, _core

DTYPES = ["float16", "float32", "float64"]


def misaligned(a: np.ndarray) -> np.ndarray:
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert not view.flags.aligned
    return view


def read_only(a: np.ndarray) -> np.ndarray:
    view = a.view()
    view.flags.writeable = False
    return view


def every_second(a: np.ndarray) -> np.ndarray:
    big = np.full(tuple(2 * s for s in a.shape), np.nan, a.dtype)
    view = big[tuple(slice(None, None, 2) for _ in a.shape)]
    view[...] = a
    return view


class Own(np.ndarray):
    """A subclass that would notice if its own methods were called."""

    def __array_finalize__(self, obj: Any) -> None:
        pass

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a subclass's ufunc was called")


class DLPackOnly:
    """An exporter that is nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class InterfaceOnly:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__


# Each makes an array of equal values. None: with a C-contiguous array as argument nothing has to be copied.
LAYOUTS: dict[str, tuple[Callable[[np.ndarray], Any], str | None]] = {
    "plain": (lambda a: a, None),
    "read-only": (read_only, None),
    "subclass": (lambda a: a.view(Own), None),
    "parameter": (lambda a: pyconvbn.nn.Parameter(a), None),
    "dlpack": (DLPackOnly, None),
    "array interface": (InterfaceOnly, None),
    "fortran": (np.asfortranarray, "not C-contiguous"),
    "channels last": (lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1), "not C-contiguous"),
    "negative strides": (lambda a: a[::-1, ::-1].copy()[::-1, ::-1], "not C-contiguous"),
    "every second": (every_second, "not C-contiguous"),
    "misaligned": (misaligned, "unaligned"),
    "byte-swapped": (lambda a: a.astype(a.dtype.newbyteorder()), "byte-swapped"),
    "byte-swapped fortran": (lambda a: np.asfortranarray(a.astype(a.dtype.newbyteorder())), "byte-swapped"),
}


@pytest.fixture(params=DTYPES)
def arrays(request: pytest.FixtureRequest, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = [rng.normal(size=shape).astype(request.param) for shape in ((2, 6, 9, 10), (4, 3, 3, 3), (4,))]
    return draw[0], draw[1], draw[2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout: str, arrays: tuple[np.ndarray, ...]) -> None:
    x, w, b = arrays
    make, _ = LAYOUTS[layout]
    want = F.conv2d(x, w, b, padding=1, groups=2)
    if layout == "channels last":  # needs two axes
        bias = make(b.reshape(2, 2)).reshape(4)
    elif layout == "negative strides":
        bias = b[::-1].copy()[::-1]
    else:
        bias = make(b)
    ours, theirs, filters = make(x), make(w), bias
    for got in (
        F.conv2d(ours, w, b, padding=1, groups=2),
        F.conv2d(x, theirs, b, padding=1, groups=2),
        F.conv2d(x, w, filters, padding=1, groups=2),
        Plan(theirs, filters, padding=1, groups=2)(ours),
    ):
        assert type(got) is np.ndarray and got.dtype == x.dtype and got.dtype.isnative and got.flags.c_contiguous
        np.testing.assert_array_equal(got, want)
    residual, plan = want * np.asarray(0.5, want.dtype), Plan(w, b, padding=1, groups=2)
    np.testing.assert_array_equal(plan(x, residual=make(residual)), plan(x, residual=residual))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_counted_and_explained(layout: str) -> None:
    make, reason = LAYOUTS[layout]
    plan = Plan(np.ones((4, 6, 3, 3), np.float32))
    x = np.ones((2, 6, 9, 10), np.float32)
    plan(x)
    plan(make(x))
    plan(make(x))
    assert plan.explain(x.shape)["copies"] == ([f"x: copied in 2 of 3 calls: {reason}"] if reason else [])


def test_the_padding_copy_is_explained() -> None:
    plan = Plan(np.ones((4, 6, 3, 3), np.float32), padding=1, padding_mode="circular")
    assert plan.explain((1, 6, 9, 9))["copies"] == ["x: padded into a temporary (padding_mode='circular')"]


def test_broadcast_input(rng: np.random.Generator) -> None:
    row = rng.normal(size=(1, 3, 1, 8)).astype(np.float32)
    x = np.broadcast_to(row, (4, 3, 6, 8))
    assert 0 in x.strides
    w = rng.normal(size=(5, 3, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(F.conv2d(x, w), F.conv2d(x.copy(), w))
    flat = np.broadcast_to(np.float32(2.0), (5, 3, 3, 3))
    np.testing.assert_array_equal(F.conv2d(x, flat), F.conv2d(x, flat.copy()))


def test_unit_axes_with_odd_strides_need_no_copy() -> None:
    x = np.lib.stride_tricks.as_strided(np.ones(8, np.float32), (1, 8, 1, 1), (12, 4, 999, 7))
    assert x.flags.c_contiguous
    plan = Plan(np.ones((2, 8, 1, 1), np.float32))
    np.testing.assert_array_equal(plan(x).ravel(), [8.0, 8.0])
    assert plan.explain(x.shape)["copies"] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_array_is_a_view(dtype: str) -> None:
    x = np.ones((3, 4), dtype).T
    view = _core.as_array(x.view(Own), "input")
    assert type(view) is np.ndarray and np.shares_memory(view, x) and view.strides == x.strides
    swapped = _core.as_array(x.astype(x.dtype.newbyteorder()), "input")
    assert swapped.dtype.isnative and swapped.strides == x.strides
    np.testing.assert_array_equal(swapped, x)


def test_inputs_are_never_written(arrays: tuple[np.ndarray, ...]) -> None:
    x, w, b = (a.copy() for a in arrays)
    one = np.ones(4, x.dtype)
    Plan(w, b, groups=2, bn=pyconvbn.BatchNormParams(one, one, one, one), activation="silu")(x)
    F.conv2d(x, w, b, groups=2)
    for now, before in zip((x, w, b, one), (*arrays, np.ones(4, x.dtype))):
        np.testing.assert_array_equal(now, before)


def test_bn_arrays_of_any_layout_and_dtype(rng: np.random.Generator) -> None:
    w = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    x = rng.normal(size=(1, 3, 7, 7)).astype(np.float32)
    params = [rng.uniform(0.5, 2.0, 4) for _ in range(4)]
    want = Plan(w, bn=pyconvbn.BatchNormParams(*params, 1e-3))(x)
    odd = [np.repeat(p, 2)[::2] for p in params[:2]] + [p[::-1].copy()[::-1] for p in params[2:]]
    np.testing.assert_array_equal(Plan(w, bn=pyconvbn.BatchNormParams(*odd, 1e-3))(x), want)
    swapped = [p.astype(">f8") for p in params]
    np.testing.assert_array_equal(Plan(w, bn=pyconvbn.BatchNormParams(*swapped, 1e-3))(x), want)
    np.testing.assert_array_equal(Plan(w, bn=(*params, np.float32(1e-3).item()))(x).shape, want.shape)


# -- torch, without importing it ourselves -----------------------------------------------------------


@pytest.fixture
def torch() -> Iterator[Any]:
    yield pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(torch: Any, dtype: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 3, 8, 8)).astype(dtype)
    w = rng.normal(size=(4, 3, 3, 3)).astype(dtype)
    want = F.conv2d(x, w)
    tensor = torch.from_numpy(x)
    for variant in (
        tensor, tensor.clone().requires_grad_(), torch.nn.Parameter(tensor.clone()),
        tensor.contiguous(memory_format=torch.channels_last), (tensor.clone().requires_grad_() * 1.0),
    ):
        got = F.conv2d(variant, torch.from_numpy(w))
        assert type(got) is np.ndarray and got.dtype == dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.oracle
def test_torch_tensor_on_another_device(torch: Any) -> None:
    with pytest.raises(TypeError, match="input.*CPU.*meta"):
        F.conv2d(torch.ones(1, 3, 8, 8, device="meta"), np.ones((4, 3, 3, 3), np.float32))


@pytest.mark.oracle
def test_torch_dtypes_and_layouts_are_named(torch: Any) -> None:
    w = np.ones((4, 3, 3, 3), np.float32)
    with pytest.raises(TypeError, match="input.*bfloat16"):
        F.conv2d(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16), w)
    with pytest.raises(TypeError, match="input.*int64"):
        F.conv2d(torch.ones(1, 3, 8, 8, dtype=torch.int64), w)
    with pytest.raises(TypeError, match="input"):
        F.conv2d(torch.ones(3, 3).to_sparse(), w)


@pytest.mark.oracle
def test_lazily_negated_tensor(torch: Any) -> None:
    tensor = torch.complex(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)).conj().imag
    assert tensor.is_neg()
    np.testing.assert_array_equal(F.conv2d(tensor, np.ones((1, 1, 1, 1), np.float32)), np.full((1, 1, 2, 2), -3.0))


@pytest.mark.oracle
def test_torch_convolution_agrees(torch: Any, rng: np.random.Generator) -> None:
    x, w = torch.from_numpy(rng.normal(size=(2, 4, 9, 9))), torch.from_numpy(rng.normal(size=(6, 2, 3, 3)))
    want = torch.nn.functional.conv2d(x, w, stride=2, padding=1, groups=2).numpy()
    np.testing.assert_allclose(F.conv2d(x, w, stride=2, padding=1, groups=2), want, rtol=1e-12, atol=1e-12)


def test_a_broken_exporter_is_a_type_error() -> None:
    class Broken:
        def __dlpack__(self, **kwargs: Any) -> Any:
            raise BufferError("no memory to show")

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

    with pytest.raises(TypeError, match="input: this Broken cannot be read as a CPU array: no memory to show"):
        F.conv2d(Broken(), np.ones((1, 1, 1, 1)))


# -- out= --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "fortran", "channels last", "negative strides", "every second",
                                    "misaligned", "subclass"])
def test_out_of_any_layout(layout: str, arrays: tuple[np.ndarray, ...]) -> None:
    x, w, b = arrays
    want = F.conv2d(x, w, b, groups=2)
    out = LAYOUTS[layout][0](np.full_like(want, np.nan))
    assert F.conv2d(x, w, b, groups=2, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), want)
    base = out.base if layout == "every second" else None
    if base is not None:  # what lies between the elements is not ours
        assert np.isnan(base[1::2]).all()


def test_out_is_written_in_place() -> None:
    out = np.zeros((1, 2, 3, 3), np.float32)
    plan = Plan(np.ones((2, 1, 1, 1), np.float32))
    assert plan(np.ones((1, 1, 3, 3), np.float32), out=out) is out and (out == 1.0).all()


@pytest.mark.parametrize("offset", [-30, -1, 0, 1, 7, 31, 200])
def test_out_that_overlaps_the_input(offset: int, rng: np.random.Generator) -> None:
    """As if the input had been copied first, whichever way the two lie."""
    memory = rng.normal(size=600).astype(np.float32)
    x = memory[200:400].reshape(1, 2, 10, 10)
    out = memory[200 + offset : 400 + offset].reshape(1, 2, 10, 10)
    w = rng.normal(size=(2, 2, 3, 3)).astype(np.float32)
    want = F.conv2d(x.copy(), w, padding=1)
    np.testing.assert_array_equal(F.conv2d(x, w, padding=1, out=out), want)


def test_out_that_is_the_input_or_the_residual(rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    residual = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    plan = Plan(rng.normal(size=(4, 4, 3, 3)).astype(np.float32), padding=1, activation="relu")
    want = plan(x, residual=residual)
    out = residual.copy()
    np.testing.assert_array_equal(plan(x, residual=out, out=out), want)
    out = x.copy()
    np.testing.assert_array_equal(plan(out, residual=residual, out=out), want)
    np.testing.assert_array_equal(plan(x, residual=x), plan(x, residual=x.copy()))


def test_out_that_overlaps_reversed(rng: np.random.Generator) -> None:
    memory = rng.normal(size=(1, 1, 1, 40)).astype(np.float32)
    w = rng.normal(size=(1, 1, 1, 1)).astype(np.float32)
    want = F.conv2d(memory[..., ::-1].copy(), w)
    np.testing.assert_array_equal(F.conv2d(memory[..., ::-1], w, out=memory), want)


def test_out_that_is_the_weight(rng: np.random.Generator) -> None:
    """Weights are copied when the plan is made."""
    w = rng.normal(size=(3, 3, 1, 1)).astype(np.float32)
    x = rng.normal(size=(3, 3, 1, 1)).astype(np.float32)
    want = F.conv2d(x, w.copy())
    np.testing.assert_array_equal(F.conv2d(x, w, out=w), want)


def test_results_belong_to_the_caller() -> None:
    plan = Plan(np.ones((2, 2, 1, 1), np.float32))
    x = np.ones((1, 2, 4, 4), np.float32)
    first, second = plan(x), plan(x)
    assert first.base is None and first.flags.owndata and first.flags.writeable and not np.shares_memory(first, second)


def test_input_may_change_after_the_call_that_made_the_plan(rng: np.random.Generator) -> None:
    w = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    x = rng.normal(size=(1, 3, 8, 8)).astype(np.float32)
    plan = Plan(w, input_shape=x.shape)
    want = plan(x)
    w[...] = 0.0
    np.testing.assert_array_equal(plan(x), want)


def test_calls_from_many_threads_on_shared_read_only_input(rng: np.random.Generator) -> None:
    x = read_only(rng.normal(size=(1, 8, 16, 16)).astype(np.float32))
    w = rng.normal(size=(8, 8, 3, 3)).astype(np.float32)
    want, results = F.conv2d(x, w), [None] * 8
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, F.conv2d(x, w))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in results:
        np.testing.assert_array_equal(got, want)
