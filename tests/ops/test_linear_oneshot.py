# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers of one call, whose weights are not packed for few rows: the bits a plan gives."""

from __future__ import annotations

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core


@pytest.mark.parametrize(("ic", "oc"), [(1, 1), (33, 130), (300, 17), (1030, 65)])
def test_same_bits_as_a_plan(ic: int, oc: int, rng: np.random.Generator) -> None:
    w, b = rng.standard_normal((oc, ic), np.float32), rng.standard_normal(oc, np.float32)
    x = rng.standard_normal((50, ic), np.float32)
    want = pyconvbn.Plan(w, b)(x)
    before = pyconvbn.get_num_threads()
    try:
        for threads in (1, 2):
            pyconvbn.set_num_threads(threads)
            for n in (0, 1, 2, 3, 4, 6, 7, 50):
                np.testing.assert_array_equal(_core.linear(x[:n], w, b, None), want[:n])
    finally:
        pyconvbn.set_num_threads(before)


def test_failing_allocation_of_many_rows(rng: np.random.Generator) -> None:
    """Beyond few rows the weights are packed into scratch, which may fail."""
    w, x = rng.standard_normal((40, 90), np.float32), rng.standard_normal((20, 90), np.float32)
    want = _core.linear(x, w, None, None)
    failures = 0
    for at in range(20):
        _core._testing.alloc_fail_after(at)
        try:
            np.testing.assert_array_equal(_core.linear(x, w, None, None), want)
        except MemoryError:
            failures += 1
        finally:
            _core._testing.alloc_fail_after(-1)
    assert failures >= 2
