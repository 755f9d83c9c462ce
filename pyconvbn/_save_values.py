# SPDX-License-Identifier: BSD-3-Clause
"""How the arguments and targets of nodes stand in the JSON text of a saved graph.

None, True, False, integers, strings and lists are themselves; everything else is a dict of one key, which says what it
is. Functions are written by the name of their row in the op table and found there again: a file can name nothing else.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core

__all__ = ["ATTRIBUTES", "TYPES", "Unsupported", "decode", "encode", "function_name", "function_of", "is_plain_dtype"]

#: What a `getattr` node may read. Any other attribute could lead from an array to all that a process holds.
ATTRIBUTES = frozenset(
    "shape dtype ndim size T mT H real imag itemsize nbytes strides device layout is_cuda requires_grad data start "
    "stop step name kind".split()
)

#: Type annotations of nodes.
TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, tuple, list, dict)}, "ndarray": np.ndarray,
    "Any": Any,
}

_SCALARS = {
    np.dtype(code).name: np.dtype(code).type for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2",
                                                        "f4", "f8", "c8", "c16")
}
_CLASSES: dict[str, type] = {
    **{f"numpy.{name}": kind for name, kind in _SCALARS.items()},
    **{kind.__name__: kind for kind in (bool, int, float, complex)},
}
_CLASS_NAMES = {kind: name for name, kind in _CLASSES.items()}
_MAX_DEPTH = 220  # the graph itself refuses deeper nesting


class Unsupported(TypeError):
    """A value that a file cannot hold."""


def is_plain_dtype(dtype: Any) -> bool:
    """Numbers of a size that is the same on every machine."""
    return dtype.kind in "biufc" and dtype.name in _SCALARS and dtype.fields is None and dtype.metadata is None


# -- functions ---------------------------------------------------------------------------------------------------------
@functools.cache
def _rows() -> frozenset[str]:
    return frozenset(_core.op_names())


def function_name(function: Any) -> str:
    """The name of a function's row; Unsupported if it has none."""
    name = _core.op_lookup(function) if callable(function) else None
    if name is None:
        what = getattr(function, "__name__", None) or type(function).__name__
        raise Unsupported(f"{what} is no operator of the op table, and functions are saved by name only")
    return name


@functools.cache
def function_of(name: str) -> Callable[..., Any]:
    """The function of a row; ValueError if there is no such row, or it is a method."""
    from . import _efficient, functional, ops

    found: Any = None
    if name in _rows():
        space, _, rest = name.partition(".")
        if space in ("operator", "builtins", "math"):
            found = getattr({"operator": operator, "builtins": builtins, "math": math}[space], rest, None)
        elif space == "functional":
            found = getattr(functional, rest, None)
        elif not rest:
            found = getattr(_efficient, f"graph_{name}", None)
        elif space != "method" and "." in rest:
            packet, _, overload = rest.partition(".")
            found = getattr(getattr(getattr(ops, space), packet), overload)
    if found is None or _core.op_lookup(found) != name:
        raise ValueError(f"there is no operator {name!r} in the op table")
    function: Callable[..., Any] = found
    return function


# -- values ------------------------------------------------------------------------------------------------------------
def _float(value: float) -> str:
    return value.hex() if value == value else f"nan:{struct.pack('>d', value).hex()}"


def _unfloat(text: Any) -> float:
    if type(text) is not str or len(text) > 40:
        raise ValueError("a float is not written as hexadecimal text")
    if text.startswith("nan:"):
        value: float = struct.unpack(">d", bytes.fromhex(text[4:]))[0]
        if value == value:
            raise ValueError("a NaN is none")
        return value
    value = float.fromhex(text)
    if _float(value) != text:
        raise ValueError(f"{text!r} is not how a float is written")
    return value


def encode(value: Any, node: Callable[[Any], int], array: Callable[[Any], str], depth: int = 0) -> Any:
    """`value` as JSON has it. `node` gives the position of a Node, `array` the member that an array goes to."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is int:
        return value
    if kind is float:
        return {"float": _float(value)}
    if depth > _MAX_DEPTH:
        raise Unsupported("it is nested too deeply")
    if kind is tuple:
        return {"tuple": [encode(item, node, array, depth + 1) for item in value]}
    if isinstance(value, list) and kind.__name__ in ("list", "immutable_list"):
        return [encode(item, node, array, depth + 1) for item in value]
    if isinstance(value, dict) and kind.__name__ in ("dict", "immutable_dict"):
        pairs = [[encode(k, node, array, depth + 1), encode(v, node, array, depth + 1)] for k, v in value.items()]
        return {"dict": pairs}
    if kind is slice:
        parts = (value.start, value.stop, value.step)
        return {"slice": [encode(part, node, array, depth + 1) for part in parts]}
    if isinstance(value, _core.Node):
        return {"node": node(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    if kind is complex:
        return {"complex": [_float(value.real), _float(value.imag)]}
    if isinstance(value, np.dtype) and is_plain_dtype(value):
        return {"dtype": value.str}
    if isinstance(value, type) and value in _CLASS_NAMES:
        return {"class": _CLASS_NAMES[value]}
    if kind in _CLASS_NAMES and isinstance(value, np.generic):
        return {"scalar": [value.dtype.name, value.astype(value.dtype.newbyteorder("<")).tobytes().hex()]}
    if isinstance(value, np.ndarray):
        return {"array": array(value)}
    raise Unsupported(f"a value of type {kind.__module__}.{kind.__qualname__} cannot be saved")


def decode(found: Any, node: Callable[[int], Any], array: Callable[[str], Any], depth: int = 0) -> Any:
    """The value that `encode` wrote; ValueError for anything that it would not have written."""
    kind = type(found)
    if found is None or kind is bool or kind is str or kind is int:
        return found
    if depth > _MAX_DEPTH + 1:
        raise ValueError("it is nested too deeply")
    if kind is list:
        return [decode(item, node, array, depth + 1) for item in found]
    if kind is not dict or len(found) != 1:
        raise ValueError(f"{str(found)[:60]!r} stands for no value")
    ((what, inside),) = found.items()
    decoder = _DECODERS.get(what)
    if decoder is None:
        raise ValueError(f"there is no kind of value {what[:60]!r}")
    return decoder(inside, node, array, depth + 1)


def _list(found: Any, length: int | None = None) -> list[Any]:
    if type(found) is not list or (length is not None and len(found) != length):
        raise ValueError("a list is missing, or has another length")
    return found


def _pairs(found: Any, node: Any, array: Any, depth: int) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for pair in _list(found):
        key, value = (decode(item, node, array, depth) for item in _list(pair, 2))
        if isinstance(key, list | dict | np.ndarray | _core.Node) or key in result:
            raise ValueError("a key of a dict cannot be one, or is there twice")
        result[key] = value
    return result


def _scalar(found: Any, node: Any, array: Any, depth: int) -> Any:
    name, raw = _list(found, 2)
    if type(name) is not str or name not in _SCALARS or type(raw) is not str:
        raise ValueError("a NumPy scalar is damaged")
    dtype = np.dtype(_SCALARS[name])
    data = bytes.fromhex(raw)
    if len(data) != dtype.itemsize or (name == "bool" and data not in (b"\0", b"\1")):
        raise ValueError("a NumPy scalar has another size")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)[0]


def _dtype(found: Any, node: Any, array: Any, depth: int) -> Any:
    if type(found) is not str or len(found) not in (3, 4) or found[0] not in "<>|":
        raise ValueError(f"{str(found)[:60]!r} is no dtype")
    try:
        dtype = np.dtype(found)
    except TypeError:
        raise ValueError(f"there is no dtype {found!r}") from None
    if not is_plain_dtype(dtype) or dtype.str != found:
        raise ValueError(f"there is no dtype {found!r}")
    return dtype


def _class(found: Any, node: Any, array: Any, depth: int) -> type:
    if type(found) is not str or found not in _CLASSES:
        raise ValueError(f"{str(found)[:60]!r} is no class that a file may name")
    return _CLASSES[found]


def _node(found: Any, node: Callable[[int], Any], array: Any, depth: int) -> Any:
    if type(found) is not int:
        raise ValueError("a node is not given by its position")
    return node(found)


def _array(found: Any, node: Any, array: Callable[[str], Any], depth: int) -> Any:
    if type(found) is not str:
        raise ValueError("an array is not given by its name")
    return array(found)


def _ellipsis(found: Any, node: Any, array: Any, depth: int) -> Any:
    if found is not True:
        raise ValueError("an ellipsis is damaged")
    return Ellipsis


_DECODERS: dict[Any, Callable[[Any, Callable[[int], Any], Callable[[str], Any], int], Any]] = {
    "float": lambda found, n, a, depth: _unfloat(found),
    "complex": lambda found, n, a, depth: complex(*map(_unfloat, _list(found, 2))),
    "tuple": lambda found, n, a, depth: tuple([decode(item, n, a, depth) for item in _list(found)]),
    "slice": lambda found, n, a, depth: slice(*[decode(item, n, a, depth) for item in _list(found, 3)]),
    "dict": _pairs, "scalar": _scalar, "dtype": _dtype, "class": _class, "node": _node, "array": _array,
    "ellipsis": _ellipsis,
}
