# SPDX-License-Identifier: BSD-3-Clause
"""Exceptions and warnings of our own; everything else is ValueError, TypeError, MemoryError or NotImplementedError."""

from __future__ import annotations

__all__ = ["FoldError", "PyConvBNWarning"]


class FoldError(ValueError):
    """A BatchNorm cannot be folded or fused as asked.

    ``reason`` is a stable code (``"BN_TRAINING"``, ``"LINEAR_ND"``, ``"PADDED_PRE_BN"``, ...); the message says
    what was met and what to do.

    >>> from pyconvbn.errors import FoldError
    >>> FoldError("bn is in training mode; call bn.eval()", "BN_TRAINING").reason
    'BN_TRAINING'
    """

    reason: str

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} [{self.reason}]"

    def __reduce__(self) -> tuple[type[FoldError], tuple[str, str]]:
        return type(self), (self.args[0], self.reason)


class PyConvBNWarning(UserWarning):
    """Base of every warning this package gives."""
