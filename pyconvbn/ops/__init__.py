# SPDX-License-Identifier: BSD-3-Clause
"""Operators under the names of PyTorch's: ``ops.aten.<operator>.<overload>``, ``ops.quantized_decomposed. ...``.

An exported ATen graph maps onto them name for name; each is callable and computes with this package's operators.

>>> from pyconvbn import ops
>>> ops.aten.conv2d.default
<OpOverload(op='aten.conv2d', overload='default')>
>>> ops.aten.add.overloads()
['Tensor', 'Scalar']
>>> import numpy as np
>>> ops.aten.relu.default(np.array([-1., 2.]))
array([0., 2.])
"""

from __future__ import annotations

import difflib
import functools
from typing import Any

from .. import _core
from .._core import OpOverload

__all__ = ["OpNamespace", "OpOverload", "OpPacket", "aten", "list", "prims", "quantized_decomposed"]

_list = list


@functools.cache
def _rows() -> dict[str, dict[str, _list[str]]]:
    """namespace -> operator -> overloads, of the op table."""
    found: dict[str, dict[str, _list[str]]] = {}
    for row in _core.op_names():
        parts = row.split(".")
        if len(parts) == 3:
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(parts[2])
    return found


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [*known], n=4, cutoff=0.5)
    return f"; near it: {', '.join(close)}" if close else ""


def _document(row: str) -> str:
    info = _core.op_info(row)
    lines = [f"{row}{info['schema']}", "", f"{info['doc'][:1].upper()}{info['doc'][1:]}."]
    written = [p["name"] for p in info["params"] if p["written"]]
    if written:
        lines.append(f"Writes {', '.join(written)}.")
    elif info["effect"] == "view":
        lines.append("The result may be a view.")
    elif info["effect"] == "random":
        lines.append("Random: another result at each call.")
    return "\n".join(lines)


class OpPacket:
    """All overloads of an operator, as attributes. A call goes to ``default``, or to the first where there is none."""

    def __init__(self, namespace: str, name: str) -> None:
        self.__name__ = name
        self.__qualname__ = f"{namespace}.{name}"
        self.__module__ = __name__
        self._namespace = namespace
        self._overloads = _rows()[namespace][name]

    def overloads(self) -> _list[str]:
        """Names of the overloads."""
        return [*self._overloads]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.__dict__.get("_overloads", ()):
            if name.startswith("_"):
                raise AttributeError(name)
            near = ", ".join(self._overloads)
            raise AttributeError(f"operator '{self.__qualname__}' has no overload {name!r}; it has: {near}")
        overload = _make(self, name)
        setattr(self, name, overload)
        return overload

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        which = "default" if "default" in self._overloads else self._overloads[0]
        return getattr(self, which)(*args, **kwargs)

    def __dir__(self) -> _list[str]:
        return sorted({*object.__dir__(self), *self._overloads})

    def __repr__(self) -> str:
        return f"<OpOverloadPacket(op='{self.__qualname__}')>"

    def __str__(self) -> str:
        return self.__qualname__

    def __reduce__(self) -> str:
        return self.__qualname__


def _make(packet: OpPacket, overload: str) -> OpOverload:
    from . import _aten, _quantized

    row = f"{packet.__qualname__}.{overload}"
    op = OpOverload((_aten.IMPLEMENTATIONS | _quantized.QUANTIZED)[row], row)
    op.__name__ = f"{packet.__name__}.{overload}"
    op.__qualname__ = row
    op.__module__ = __name__
    op.__doc__ = _document(row)
    op.overloadpacket = packet
    return op


class OpNamespace:
    """The operators of one namespace, as attributes."""

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.__qualname__ = name
        self.__module__ = __name__

    def __getattr__(self, name: str) -> Any:
        known = _rows()[self.__dict__["__name__"]] if not name.startswith("__") else {}
        if name not in known:
            raise AttributeError(f"namespace 'ops.{self.__name__}' has no operator {name!r}{_near(name, known)}")
        packet = OpPacket(self.__name__, name)
        setattr(self, name, packet)
        return packet

    def __dir__(self) -> _list[str]:
        return sorted({*object.__dir__(self), *_rows()[self.__name__]})

    def __repr__(self) -> str:
        return f"<namespace 'ops.{self.__name__}' of {len(_rows()[self.__name__])} operators>"

    def __reduce__(self) -> str:
        return self.__name__


#: PyTorch's ATen operators that this package knows.
aten = OpNamespace("aten")

#: What passes put into a graph and PyTorch has no public operator for.
prims = OpNamespace("prims")

#: Quantization written out: integers beside their scales and zero points.
quantized_decomposed = OpNamespace("quantized_decomposed")


def list() -> _list[str]:
    """Names of all operators that can be called from here, such as ``'aten.conv2d.default'``.

    >>> from pyconvbn import ops
    >>> 'aten.convolution.default' in ops.list()
    True
    """
    return [
        f"{namespace}.{name}.{overload}"
        for namespace, packets in _rows().items()
        for name, overloads in packets.items()
        for overload in overloads
    ]
