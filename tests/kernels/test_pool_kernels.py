# SPDX-License-Identifier: BSD-3-Clause
"""pool_max and pool_add of every instruction set against NumPy, on small whole numbers: equal to the bit.

Guard pages are the business of tests/c/check_pool.c.
"""

from __future__ import annotations

import numpy as np
import pytest

from pyconvbn import _core

T = _core._testing


@pytest.mark.parametrize("isa", T.isas())
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize(("taps", "apart"), [((1, 1), (0, 0)), ((1, 2), (0, 1)), ((1, 3), (0, 1)), ((1, 3), (0, 20)),
                                             ((1, 5), (0, 2)), ((2, 3), (50, 7)), ((3, 1), (9, 0))])
@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 8, 9, 15, 16, 17, 18, 33, 97])
def test_windows(isa: str, step: int, taps: tuple[int, int], apart: tuple[int, int], n: int,
                 rng: np.random.Generator) -> None:
    reach = max(n - 1, 0) * step + (taps[0] - 1) * apart[0] + (taps[1] - 1) * apart[1] + 1
    x = rng.integers(-9, 10, reach).astype(np.float32)
    if reach > 30:
        x[[5, 11, 25]] = np.nan, np.inf, -np.inf
    at = np.arange(n)[:, None, None] * step + np.arange(taps[0])[:, None] * apart[0] + np.arange(taps[1]) * apart[1]
    for kernel, function in ((T.pool_max, np.max), (T.pool_add, np.sum)):
        framed = np.full(n + 32, np.float32(-12345))
        kernel(isa, framed[16:16 + n], x, step, taps, apart)
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(framed[16:16 + n], function(x[at], axis=(1, 2)))
        assert (framed[:16] == -12345).all() and (framed[16 + n:] == -12345).all()


@pytest.mark.parametrize(("step", "taps", "apart"), [(0, (1, 1), (0, 0)), (1, (0, 1), (0, 0)), (1, (1, 2), (0, -1)),
                                                     (1, (1, 2), (0, 7)), (2, (1, 1), (0, 0))])
def test_what_leaves_the_arrays_is_refused(step: int, taps: tuple[int, int], apart: tuple[int, int]) -> None:
    y, x = np.zeros(4, np.float32), np.zeros(6, np.float32)
    with pytest.raises(ValueError):
        T.pool_max("scalar", y, x, step, taps, apart)
