# SPDX-License-Identifier: BSD-3-Clause
"""Default initialisation and its random generator; checks shared by the constructors."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .parameter import Parameter

_generator: np.random.Generator | None = None


def manual_seed(seed: int) -> np.random.Generator:
    """Make the initialisation of the modules created from now on reproducible.

    Returns the generator. Without a call it is seeded by the operating system.

    >>> _ = manual_seed(0); first = Linear(2, 2).weight.copy()
    >>> _ = manual_seed(0); bool((Linear(2, 2).weight == first).all())
    True
    """
    global _generator
    _generator = np.random.default_rng(seed)
    return _generator


def generator() -> np.random.Generator:
    """The generator that initialisation draws from, made at its first use."""
    global _generator
    if _generator is None:
        _generator = np.random.default_rng()
    return _generator


def init_weight_and_bias(
    shape: tuple[int, ...], bias_length: int | None, dtype: Any
) -> tuple[Parameter, Parameter | None]:
    """Draw both from U(-b, b), `b = 1/sqrt(fan_in)`, `fan_in = prod(shape[1:])`.

    He et al. 2015 (arXiv 1502.01852), equation 14, with a leaky slope `a = sqrt(5)`: the bound
    `sqrt(6 / ((1 + a*a) * fan_in))` is then `1/sqrt(fan_in)`, which serves the bias too.
    """
    fan_in = math.prod(shape[1:])
    bound = 1.0 / math.sqrt(fan_in) if fan_in > 0 else 0.0
    resolved = float_dtype(dtype)

    def draw(size: tuple[int, ...]) -> Parameter:
        values: NDArray[Any] = generator().uniform(-bound, bound, size)
        return Parameter(values.astype(resolved))

    return draw(shape), None if bias_length is None else draw((bias_length,))


def float_dtype(dtype: Any) -> np.dtype[Any]:
    """None means float32; `TypeError` unless float16, float32 or float64. Always native order."""
    resolved = np.dtype(np.float32 if dtype is None else dtype).newbyteorder("=")
    if resolved.name not in ("float16", "float32", "float64"):
        raise TypeError(f"dtype: expected float16, float32 or float64, got {resolved}")
    return resolved


def check_int(value: Any, name: str, least: int) -> int:
    """`value` as an int that is at least `least`; `TypeError` or `ValueError` naming `name`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def check_ints(value: Any, nd: int, name: str, least: int) -> tuple[int, ...]:
    """An int spread over `nd` axes, or a sequence of `nd` ints, each at least `least`."""
    if not isinstance(value, (tuple, list)):
        return (check_int(value, name, least),) * nd
    if len(value) != nd:
        raise ValueError(f"{name}: expected an int or {nd} ints, got {len(value)}: {value!r}")
    return tuple(check_int(item, name, least) for item in value)
