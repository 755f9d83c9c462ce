# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of single rows share: data, a plan that must take one row, and what every row promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import pyconvbn
from pyconvbn._core import _testing

ISAS = _testing.isas()


def arrays(
    rng: np.random.Generator, n: int, ic: int, oc: int, size: tuple[int, ...], kernel: tuple[int, ...], groups: int = 1,
    transposed: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and b of normal numbers; ic and oc are those of all groups."""
    across = (ic, oc // groups) if transposed else (oc, ic // groups)
    x = rng.standard_normal((n, ic, *size)).astype(np.float32)
    w = rng.standard_normal((*across, *kernel)).astype(np.float32)
    return x, w, rng.standard_normal(oc).astype(np.float32)


def takes(plan: pyconvbn.Plan, shape: tuple[int, ...], row: str) -> bool:
    """Whether the row takes this shape; then the plan uses it from now on."""
    try:
        _testing.plan_force(plan, shape, row)
    except ValueError:
        return False
    assert plan.explain(shape)["algorithm"] == row
    return True


def rows_of(plan: pyconvbn.Plan, shape: tuple[int, ...]) -> list[str]:
    """Every row that takes this shape."""
    return [row for row, _ in plan.explain(shape)["candidates"] if takes(plan, shape, row)]


def forced(
    row: str, isa: str, shape: tuple[int, ...], w: np.ndarray, b: np.ndarray | None = None, **options: Any
) -> pyconvbn.Plan:
    """A plan that uses this row for this shape."""
    plan = _testing.plan_with_isa(isa, w, b, **options)
    _testing.plan_force(plan, shape, row)
    assert plan.explain(shape)["algorithm"] == row
    return plan


def why_not(row: str, plan: pyconvbn.Plan, shape: tuple[int, ...]) -> str:
    return str(dict(plan.explain(shape)["candidates"])[row])


def assert_same_bits(plan: pyconvbn.Plan, x: np.ndarray, threads: tuple[int, ...] = (2, 3)) -> None:
    """One result for any number of threads, and of an image alone as in the batch."""
    before = pyconvbn.get_num_threads()
    try:
        pyconvbn.set_num_threads(1)
        want = plan(x)
        np.testing.assert_array_equal(np.concatenate([plan(x[i : i + 1]) for i in range(len(x))]), want)
        for count in {before, *threads}:
            pyconvbn.set_num_threads(count)
            np.testing.assert_array_equal(plan(x), want)
            np.testing.assert_array_equal(plan(x[-1:]), want[-1:])
    finally:
        pyconvbn.set_num_threads(before)


def assert_failures_are_clean(make: Callable[[], pyconvbn.Plan], row: str, x: np.ndarray, want: np.ndarray) -> None:
    """Each allocation of preparing and running fails once: an error, after which the same plan works."""
    for nth in itertools.count():
        plan = make()
        _testing.alloc_fail_after(nth)
        try:
            _testing.plan_force(plan, x.shape, row)
            got = plan(x)
        except MemoryError:
            _testing.alloc_fail_after(-1)
            _testing.plan_force(plan, x.shape, row)
            np.testing.assert_array_equal(plan(x), want)
            continue
        finally:
            _testing.alloc_fail_after(-1)
        np.testing.assert_array_equal(got, want)
        assert 3 <= nth < 100
        return
