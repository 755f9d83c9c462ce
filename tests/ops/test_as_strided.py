# SPDX-License-Identifier: BSD-3-Clause
"""as_strided and its kin against torch, bounds and owners of memory, memory formats, forced stride orders."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided as numpy_as_strided

from pyconvbn import ops
from pyconvbn.ops._aten_strided import copy_storage, storage_offset

A = ops.aten
force = ops.prims.force_stride_order.default


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def elements(x: Any) -> tuple[int, ...]:
    return tuple(s // x.itemsize for s in x.strides)


# -- as_strided --------------------------------------------------------------------------------------------------
def geometries(rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int | None]:
    nd = int(rng.integers(0, 4))
    size, stride = [int(v) for v in rng.integers(0, 4, nd)], [int(v) for v in rng.integers(0, 6, nd)]
    return size, stride, None if rng.random() < 0.3 else int(rng.integers(0, n))


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_values_and_bounds_are_torchs(torch: Any, dtype: Any, rng: np.random.Generator) -> None:
    agreed = refused = 0
    for _ in range(300):
        base = rng.integers(0, 99, 24).astype(dtype)
        mine, its = base.reshape(2, 3, 4), torch.from_numpy(base.copy()).reshape(2, 3, 4)
        which = int(rng.integers(4))  # views of the same memory, with offsets and gaps
        mine = (mine, mine.transpose(2, 0, 1), mine[1:], mine[:, 1:, ::2])[which]
        its = (its, its.permute(2, 0, 1), its[1:], its[:, 1:, ::2])[which]
        size, stride, offset = geometries(rng, 24)
        try:
            wanted = torch.as_strided(its, size, stride, offset)
        except RuntimeError:
            with pytest.raises(ValueError, match="storage"):
                A.as_strided.default(mine, size, stride, offset)
            refused += 1
            continue
        found = A.as_strided.default(mine, size, stride, offset)
        np.testing.assert_array_equal(found, wanted.numpy())
        assert found.dtype == dtype and found.shape == tuple(size)
        if found.size > 1:
            assert all(n == 1 or s == t for n, s, t in zip(size, elements(found), stride))
        src = rng.integers(0, 99, size).astype(dtype)
        if 0 not in stride:  # torch: several values for one element are nobody's promise
            scattered = A.as_strided_scatter.default(mine, src, size, stride, offset)
            theirs = torch.as_strided_scatter(its, torch.from_numpy(src), size, stride, offset)
            overlap = len({*np.ravel(A.as_strided.default(np.arange(24), size, stride, offset or 0))}) < src.size
            if not overlap:
                np.testing.assert_array_equal(scattered, theirs.numpy())
                assert not np.shares_memory(scattered, mine)
        agreed += 1
    assert agreed > 50 and refused > 5


def test_result_is_a_view_that_keeps_the_memory_alive() -> None:
    x = np.arange(12.0)
    y = A.as_strided.default(x[4:].reshape(2, 4), [2, 2], [1, 3], 1)
    y[0, 0] = -1
    assert x[1] == -1 and np.shares_memory(x, y)
    z = A.as_strided.default(y, [3], [4], 0)  # again from the owner's start
    np.testing.assert_array_equal(z, [0, 4, 8])
    del x, y
    gc.collect()
    np.testing.assert_array_equal(z, [0, 4, 8])


def test_every_owner_has_its_memory() -> None:
    backwards = np.arange(6.0)[::-1]
    np.testing.assert_array_equal(A.as_strided.default(backwards, [3], [2], 0), [0, 2, 4])
    assert storage_offset(backwards) == 5
    columns = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(A.as_strided.default(columns, [6], [1]), [0, 3, 1, 4, 2, 5])
    gaps = np.frombuffer(bytes(range(16)), np.uint8)[2::3]  # the owner is the array over the bytes
    np.testing.assert_array_equal(A.as_strided.default(gaps, [2], [1], 14), [14, 15])
    odd = numpy_as_strided(np.arange(9.0), (3,), (24,))  # NumPy's own view: its base is no array
    np.testing.assert_array_equal(A.as_strided.default(odd, [9], [1]), np.arange(9.0))
    mixed = np.arange(4, dtype=np.float64).view(np.float32)  # the owner has another dtype
    assert A.as_strided.default(mixed, [8], [1]).dtype == np.float32
    with pytest.raises(ValueError, match="at most the 8 elements"):
        A.as_strided.default(mixed, [9], [1])


def test_a_tensors_memory_is_its_storage(torch: Any) -> None:
    """Offsets count from the start of the storage, which may come before what the tensor shows."""
    base = torch.arange(12.0)
    for part in (base[4:], base[4:].reshape(2, 4)[:, ::2], base.reshape(3, 4).T[1:]):
        for offset in (None, 0, 3):
            wanted = torch.as_strided(part, [2, 2], [3, 1], offset).numpy()
            for mine in (part, part.numpy(), part.numpy()[...]):
                np.testing.assert_array_equal(A.as_strided.default(mine, [2, 2], [3, 1], offset), wanted)
    with pytest.raises(ValueError, match="at most the 12 elements"):
        A.as_strided.default(base[4:].numpy(), [13], [1], 0)
    view = A.as_strided.default(base[4:].numpy(), [3], [1], 0)
    del base, part
    gc.collect()
    np.testing.assert_array_equal(A.as_strided.default(view, [12], [1]), np.arange(12.0))


def test_reading_rights_stay() -> None:
    x = np.arange(4.0)
    locked = x[:]
    locked.flags.writeable = False
    assert not A.as_strided.default(locked, [2], [1]).flags.writeable
    assert A.as_strided.default(x, [2], [1]).flags.writeable and x.flags.writeable
    assert A.as_strided_scatter.default(locked, np.ones(2), [2], [1]).flags.writeable


def test_refusals() -> None:
    x = np.arange(6.0)
    bad: list[tuple[Any, str]] = [
        (([2], [1, 1]), "stride: expected 1 entries"), (([-1], [1]), "size: expected no negative"),
        (([2], [-1]), "stride: expected no negative"), (([2], [1], -1), "storage_offset: expected at least 0"),
        (([7], [1]), "at most the 6 elements"), (([2], [6]), "at most the 6 elements"),
        (([1], [1], 6), "at most the 6 elements"), (([2], [2**62]), "at most the 6 elements"),
        (([2**40, 2**40], [0, 2**60]), "at most the 6 elements"),
    ]  # fmt: skip
    for args, words in bad:
        for function in (A.as_strided.default, A.as_strided_.default):
            with pytest.raises(ValueError, match=words):
                function(x, *args)
    with pytest.raises(ValueError, match=r"src: expected shape \(2,\)"):
        A.as_strided_scatter.default(x, np.ones(3), [2], [1])
    assert A.as_strided.default(np.empty((0,)), [0, 3], [1, 1]).shape == (0, 3)
    with pytest.raises(ValueError, match="at most the 0 elements"):
        A.as_strided.default(np.empty((0,)), [1], [1])


def test_copies_of_memory_keep_what_is_shared() -> None:
    x = np.arange(12.0).reshape(3, 4)
    memories: dict[int, Any] = {}
    a, b = copy_storage(x[1:, ::2], memories), copy_storage(x.T, memories)
    np.testing.assert_array_equal(a, x[1:, ::2])
    assert a.strides == x[1:, ::2].strides and storage_offset(a) == 4
    a[0, 0] = 77
    assert b[0, 1] == 77 and x[1, 0] == 4 and not np.shares_memory(a, x)


# -- memory formats ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", ["channels_last", "torch.channels_last", 2])
def test_clone_in_channels_last(value: Any) -> None:
    x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    for source in (x, x.transpose(2, 0, 3, 1).copy().transpose(1, 3, 0, 2)):
        y = A.clone.default(source, memory_format=value)
        np.testing.assert_array_equal(y, x)
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous and not np.shares_memory(y, source)


def test_clone_in_other_formats(torch: Any) -> None:
    x = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).transpose(3, 1, 0, 2)
    for mine, its in ((None, torch.preserve_format), ("contiguous_format", torch.contiguous_format),
                      ("preserve_format", torch.preserve_format), (torch.channels_last, torch.channels_last),
                      (0, torch.contiguous_format), (1, torch.preserve_format)):  # fmt: skip
        y = A.clone.default(x, memory_format=mine)
        assert elements(y) == torch.from_numpy(x).clone(memory_format=its).stride(), mine
    five = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 1, 4, 5)
    y = A.clone.default(five, memory_format="channels_last_3d")
    assert y.transpose(0, 2, 3, 4, 1).flags.c_contiguous
    with pytest.raises(ValueError, match="channels_last is for arrays of 4 axes, got 5"):
        A.clone.default(five, memory_format="channels_last")
    with pytest.raises(ValueError, match="memory_format: expected one of contiguous_format.*got 'upside_down'"):
        A.clone.default(x, memory_format="upside_down")


# -- force_stride_order ------------------------------------------------------------------------------------------
def test_what_has_the_order_is_itself(rng: np.random.Generator) -> None:
    for _ in range(100):
        nd = int(rng.integers(0, 5))
        order = rng.permutation(nd)
        x = np.zeros([int(v) for v in rng.integers(1, 4, nd)]).transpose(order)
        assert force(x, elements(x)) is x
        y = np.empty(x.shape)
        y[...] = rng.normal(size=x.shape)
        z = force(y, elements(x))  # the other layout: exactly these strides, but for axes of one entry
        np.testing.assert_array_equal(z, y)
        assert all(n == 1 or s == t for n, s, t in zip(x.shape, z.strides, x.strides)) or x.size <= 1
        assert force(z, elements(x)) is z


def test_an_order_for_another_shape() -> None:
    """Strides that were noted for another batch size say the order of the axes."""
    x = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    y = force(x, (60, 1, 15))
    np.testing.assert_array_equal(y, x)
    assert elements(y) == (12, 1, 3)


def test_gaps_are_closed() -> None:
    x = np.arange(24.0).reshape(4, 6)[:, ::2]
    y = force(x, (3, 1))
    assert y is not x and elements(y) == (3, 1) and np.array_equal(x, y)
    empty = np.zeros((0, 3))[:, ::2]
    assert force(empty, (2, 1)) is empty


def test_forced_orders_are_checked() -> None:
    with pytest.raises(ValueError, match="stride: expected 2 entries"):
        force(np.ones((2, 2)), (1,))
    with pytest.raises(ValueError, match="stride: expected no negative entry"):
        force(np.ones((2, 2)), (-2, 1))


def test_the_namespace() -> None:
    import copy
    import pickle

    assert "prims.force_stride_order.default" in ops.list()
    assert repr(force) == "<OpOverload(op='prims.force_stride_order', overload='default')>"
    for value in (ops.prims, ops.prims.force_stride_order, force):
        assert pickle.loads(pickle.dumps(value)) is value and copy.deepcopy(value) is value
