# SPDX-License-Identifier: BSD-3-Clause
"""Lets threadpoolctl see and limit this package's threads.

>>> import threadpoolctl, pyconvbn.threadpool              # doctest: +SKIP
>>> pyconvbn.threadpool.register()                         # doctest: +SKIP
>>> with threadpoolctl.threadpool_limits(1, user_api="pyconvbn"):   # doctest: +SKIP
...     y = plan(x)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import __version__, _core

__all__ = ["register"]

_registered = False


def register() -> None:
    """Registers a controller (``user_api="pyconvbn"``) with threadpoolctl, once. ImportError without threadpoolctl."""
    global _registered
    import threadpoolctl

    if _registered:
        return

    class PyConvBNController(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = "pyconvbn"
        internal_api = "pyconvbn"
        filename_prefixes = ("_core.",)
        check_symbols = ("PyInit__core",)

        def __init__(self, *, filepath: str | None = None, **keywords: Any) -> None:
            super().__init__(filepath=filepath, **keywords)
            if filepath is None or Path(filepath).resolve() != Path(_core.__file__).resolve():
                self.dynlib = None  # another package's _core: it fails the symbol check and is passed over

        def get_num_threads(self) -> int:
            return _core.get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _core.set_num_threads(num_threads)

        def get_version(self) -> str:
            return __version__

        def set_additional_attributes(self) -> None:
            self.threading_layer = "pthreads"

    threadpoolctl.register(PyConvBNController)
    _registered = True
