# SPDX-License-Identifier: BSD-3-Clause
"""Convolution/Linear + BatchNorm as one operator over NumPy arrays, exact folding, prepared plans.

>>> import numpy as np, pyconvbn
>>> conv, bn = pyconvbn.nn.Conv2d(3, 8, 3, padding=1), pyconvbn.nn.BatchNorm2d(8).eval()
>>> x = np.ones((1, 3, 16, 16), np.float32)
>>> y = pyconvbn.efficient_conv_bn_eval(bn, conv, x)     # bn(conv(x)) as one convolution
>>> plan = pyconvbn.Plan.from_modules(conv, bn, activation="relu")   # folded and packed once
>>> plan(x).shape
(1, 8, 16, 16)
"""

from __future__ import annotations

import collections
import importlib
import logging
from typing import TYPE_CHECKING, Any

try:
    from . import _core
except ImportError as error:
    from pathlib import Path

    if (Path(__file__).resolve().parent.parent / "csrc").is_dir():
        raise ImportError(
            "pyconvbn was imported from its source tree, where the C extension is not built. "
            "Run 'pip install .' (or 'pip install -e .') in that folder; without '-e', start Python "
            "in another folder afterwards."
        ) from error
    raise ImportError(f"pyconvbn's C extension could not be loaded: {error}") from error

__version__: str = _core.__version__

#: How often each rewriting or fallback happened in this process, by name.
counters: collections.Counter[str] = collections.Counter()

logging.getLogger("pyconvbn").addHandler(logging.NullHandler())

# public name -> module that defines it; None: the module of that name itself. Loaded at first use, so that
# `import pyconvbn` costs a few milliseconds.
_LAZY: dict[str, str | None] = {
    "functional": None,
    "nn": None,
    "fx": None,
    "ops": None,
    "passes": None,
    "freezing": None,
    "freeze": "freezing",
    "FoldReport": "report",
    "FreezeReport": "freeze_report",
    "ErasedArray": "_erased",
    "save": "_save",
    "load": "_save",
    "verify": "_verify",
    "VerifyReport": "_verify",
    "testing": None,
    "config": None,
    "errors": None,
    "FoldError": "errors",
    "PyConvBNWarning": "errors",
    "Plan": "plan",
    "BatchNormParams": "plan",
    "efficient_conv_bn_eval": "_efficient",
    "efficient_conv_bn_eval_decomposed": "_efficient",
    "fold": "_fold_model",
    "fuse_conv_bn_weights": "_fold",
    "fuse_linear_bn_weights": "_fold",
    "fuse_bn_conv_weights": "_fold",
    "fuse_conv_bn_eval": "_fold",
    "fuse_linear_bn_eval": "_fold",
    "set_num_threads": "_info",
    "get_num_threads": "_info",
    "num_threads": "_info",
    "show_config": "_info",
    "doctor": "_info",
}

__all__ = ["__version__", "counters", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pyconvbn' has no attribute {name!r}")
    home = _LAZY[name]
    module = importlib.import_module(f".{home or name}", __name__)
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from . import config, errors, freezing, functional, fx, nn, passes, testing
    from ._erased import ErasedArray
    from ._efficient import efficient_conv_bn_eval, efficient_conv_bn_eval_decomposed
    from ._fold import (
        fuse_bn_conv_weights,
        fuse_conv_bn_eval,
        fuse_conv_bn_weights,
        fuse_linear_bn_eval,
        fuse_linear_bn_weights,
    )
    from ._fold_model import fold
    from ._info import doctor, get_num_threads, num_threads, set_num_threads, show_config
    from ._save import load, save
    from ._verify import VerifyReport, verify
    from .errors import FoldError, PyConvBNWarning
    from .freeze_report import FreezeReport
    from .freezing import freeze
    from .plan import BatchNormParams, Plan
    from .report import FoldReport
