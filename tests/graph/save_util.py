# SPDX-License-Identifier: BSD-3-Clause
"""A network, an input, and the way of a graph through a file and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyconvbn
from pyconvbn import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import randomise  # noqa: E402


def net() -> Any:
    nn.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).eval()
    randomise(module, np.random.default_rng(0))
    return module


X = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)


def there_and_back(gm: fx.GraphModule, folder: Path) -> fx.GraphModule:
    path = folder / "net.npz"
    pyconvbn.save(gm, path)
    again = pyconvbn.load(path)
    assert str(again.graph) == str(gm.graph) and again.code == gm.code
    second = folder / "again.npz"
    pyconvbn.save(again, second)
    assert second.read_bytes() == path.read_bytes()  # nothing was lost that is saved
    path.unlink()
    second.unlink()
    again.graph.lint()
    return again


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
