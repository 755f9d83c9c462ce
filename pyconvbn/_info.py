# SPDX-License-Identifier: BSD-3-Clause
"""Threads, build facts and a self-check whose output can be pasted into a bug report."""

from __future__ import annotations

import operator
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from . import _core

__all__ = ["DoctorReport", "doctor", "get_num_threads", "num_threads", "set_num_threads", "show_config"]

_VARIABLES = ("PYCONVBN_NUM_THREADS", "OMP_NUM_THREADS", "PYCONVBN_DISABLE_CPU", "PYCONVBN_ENABLE_CPU")


def set_num_threads(n: int) -> None:
    """Number of threads every later call may use (at least 1). Small work stays on the calling thread anyway.

    Raises: TypeError when ``n`` is no integer, ValueError when it is below 1.
    """
    if isinstance(n, bool):
        raise TypeError("n: expected an integer, got bool")
    try:
        value = operator.index(n)
    except TypeError:
        raise TypeError(f"n: expected an integer, got {type(n).__name__}") from None
    if not 1 <= value <= 1024:
        raise ValueError(f"n: expected between 1 and 1024, got {value}")
    _core.set_num_threads(value)


def get_num_threads() -> int:
    """Threads a call may use: set_num_threads > PYCONVBN_NUM_THREADS > OMP_NUM_THREADS > usable cores."""
    return _core.get_num_threads()


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Context manager: ``set_num_threads(n)`` inside, the former number afterwards (process-wide).

    >>> import pyconvbn
    >>> with pyconvbn.num_threads(1):
    ...     pyconvbn.get_num_threads()
    1
    """
    before = _core.get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        _core.set_num_threads(before)


def _size(count: int) -> str:
    return f"{count // 2**20} MB" if count >= 2**20 else f"{count // 1024} KB"


def _config_lines() -> list[tuple[str, str]]:
    cpu, build = _core.cpu_info(), _core.build_info()
    lines = [
        ("pyconvbn", _core.__version__),
        ("python", f"{platform.python_version()} ({sys.implementation.name}, {platform.platform()})"),
        ("numpy", f"{np.__version__} (built against {build['numpy']})"),
        ("compiler", build["compiler"]),
        ("flags", build["cflags"]),
        ("cpu", f"{cpu['name']}: {', '.join(cpu['features']) or 'baseline'}"),
        ("caches", f"L1d {_size(cpu['l1d'])}, L2 {_size(cpu['l2'])}, L3 {_size(cpu['l3'])}"),
        ("isa", f"using {cpu['isa_active']}; compiled {', '.join(cpu['isa_compiled'])}; "
                f"available {', '.join(cpu['isa_available'])}"),
        ("threads", f"{_core.get_num_threads()} (from {_core.num_threads_source()}; {cpu['cores']} usable cores)"),
    ]
    lines += [("environment", f"{name}={os.environ[name]}") for name in _VARIABLES if name in os.environ]
    return lines


def _format(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name + ':':<13}{value}" for name, value in lines)


def show_config() -> None:
    """Prints version, compiler, CPU, instruction sets compiled, found and used, threads and their source."""
    print(_format(_config_lines()))


@dataclass(frozen=True)
class DoctorReport:
    """Result of :func:`doctor`: ``ok``, the configuration, and one ``(check, passed, detail)`` per check."""

    ok: bool
    config: list[tuple[str, str]]
    checks: list[tuple[str, bool, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"[{'ok' if passed else 'FAILED'}] {name}: {detail}" for name, passed, detail in self.checks]
        return "\n".join([_format(self.config), "", *lines])

    __repr__ = __str__

    def to_dict(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "config": [list(line) for line in self.config],
            "checks": [{"name": n, "passed": p, "detail": d} for n, p, d in self.checks],
        }


def doctor() -> DoctorReport:
    """Checks this installation on this machine: numbers against the float64 reference, threads, settings.

    Takes well under a second; changes nothing. ``print(pyconvbn.doctor())`` is what a bug report should contain.
    """
    from . import functional, nn, testing
    from ._efficient import efficient_conv_bn_eval

    config = _config_lines()  # before the checks below set the number of threads for a moment
    source = _core.num_threads_source()
    checks: list[tuple[str, bool, str]] = []
    rng = np.random.default_rng(0)
    cases = {
        "conv2d 3x3": (nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), (2, 16, 9, 9)),
        "conv2d 1x1": (nn.Conv2d(40, 32, 1), nn.BatchNorm2d(32), (1, 40, 14, 14)),
        "depthwise": (nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), (1, 12, 17, 13)),
        "conv_transpose2d": (nn.ConvTranspose2d(8, 6, 4, 2, 1, groups=2), nn.BatchNorm2d(6), (1, 8, 5, 5)),
        "linear": (nn.Linear(50, 10), nn.BatchNorm1d(10), (3, 50)),
    }
    for name, (conv, bn, shape) in cases.items():
        bn.running_mean[...] = rng.normal(size=bn.num_features)
        bn.running_var[...] = rng.uniform(0.5, 2.0, size=bn.num_features)
        bn.eval()
        x = rng.normal(size=shape).astype(np.float32)
        try:
            testing.assert_matches_reference(efficient_conv_bn_eval(bn, conv, x), x, conv, bn)
            checks.append((f"{name} + BatchNorm", True, "matches the float64 reference"))
        except AssertionError as error:
            checks.append((f"{name} + BatchNorm", False, str(error).splitlines()[0]))
    cpu = _core.cpu_info()
    best = cpu["isa_available"][0]
    checks.append(("instruction set", cpu["isa_active"] == best, f"{cpu['isa_active']} (best available: {best})"))
    threads = _core.get_num_threads()
    detail = f"{threads} for {cpu['cores']} usable cores"
    if threads > cpu["cores"]:
        detail += ": more threads than cores slow everything down; lower " + source
    checks.append(("threads", threads <= cpu["cores"], detail))
    x = rng.normal(size=(2, 32, 40, 40)).astype(np.float32)
    w = rng.normal(size=(32, 32, 3, 3)).astype(np.float32)
    with num_threads(1):
        one = functional.conv2d(x, w)
    with num_threads(2):
        two = functional.conv2d(x, w)
    same = bool((one.view(np.uint32) == two.view(np.uint32)).all())
    checks.append(("same bits on 1 and 2 threads", same, "yes" if same else "no"))
    return DoctorReport(all(passed for _, passed, _ in checks), config, checks)
