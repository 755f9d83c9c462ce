# SPDX-License-Identifier: BSD-3-Clause
"""Stored PyTorch results (float64) against our operators in float32 and float64; needs no torch."""

import json
from pathlib import Path

import numpy as np
import pytest

from pyconvbn import functional as F

DATA = np.load(Path(__file__).parent.parent / "golden" / "golden.npz")
CASES = json.loads(str(DATA["index"]))["cases"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{i}-{c['op']}" for i, c in enumerate(CASES)])
def test_golden(number, dtype):
    case = CASES[number]
    arrays = {name: DATA[f"{number}/{name}"].astype(dtype) for name in case["tensors"]}
    result = getattr(F, case["op"])(**arrays, **case["kwargs"])
    wanted = DATA[f"{number}/result"]
    assert result.shape == wanted.shape and result.dtype == dtype
    # the inputs are float32 values, so only the operator's own arithmetic differs: a few hundred roundings at most,
    # each relative to the largest value of the result
    scale = np.abs(wanted).max()
    assert np.abs(result - wanted).max() <= 32 * np.finfo(dtype).eps * scale
