# SPDX-License-Identifier: BSD-3-Clause
"""`ErasedArray`, what is left of a parameter whose memory was given back, and who puts it there."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .freeze_report import REASONS, FreezeRow
from .nn.module import Module

if TYPE_CHECKING:
    from .fx import GraphModule

__all__ = ["ErasedArray", "discard_traced_gm_params", "invalidate_eager_modules"]

#: How an operation is called that Python or NumPy asks for by the name of an attribute.
_ASKED = {
    "__array__": "conversion to an ndarray", "__array_interface__": "conversion to an ndarray",
    "__array_struct__": "conversion to an ndarray", "__dlpack__": "reading it as an array",
    "__dlpack_device__": "reading it as an array", "__deepcopy__": "copy.deepcopy", "__copy__": "copy.copy",
    "__reduce_ex__": "pickling", "__reduce__": "pickling", "__getstate__": "pickling", "__iter__": "iteration",
}


class ErasedArray:
    """Stands where a parameter or buffer was whose memory was given back.

    Freezing with `discard_parameters=True` puts it there. Whatever is done with it raises `RuntimeError` naming the
    operation, the module and the parameter; only its repr and `requires_grad` can be read. Assigning a new array to the
    module's attribute brings the module back to life. No ndarray: `isinstance(x, numpy.ndarray)` is False.

    Args:
        name: name of the parameter in its module.
        owner: what to call the module, such as "Conv2d 'layer1.conv'".
        requires_grad: the flag that the parameter had.

    >>> from pyconvbn import nn
    >>> from pyconvbn.freezing import invalidate_eager_modules
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> rows = invalidate_eager_modules(model)
    >>> model[0].weight
    ErasedArray(parameter 'weight' of Linear '0', requires_grad=True)
    >>> model[0].weight + 1
    Traceback (most recent call last):
    ...
    RuntimeError: addition: parameter 'weight' of Linear '0' was erased, its memory given back, when the model was \
frozen; use the frozen graph, or assign a new array to it
    """

    __slots__ = ("__weakref__", "_about", "_requires_grad")

    _about: str
    _requires_grad: bool

    def __init__(self, name: str, owner: str, requires_grad: bool = False, kind: str = "parameter") -> None:
        object.__setattr__(self, "_about", f"{kind} {name!r} of {owner}")
        object.__setattr__(self, "_requires_grad", requires_grad)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return ErasedArray
        if name == "requires_grad":
            return object.__getattribute__(self, "_requires_grad")
        refuse(self, _ASKED.get(name, f"reading .{name}"))

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        refuse(self, f"setting .{name}")

    def __delattr__(self, name: str) -> NoReturn:
        refuse(self, f"deleting .{name}")

    def __repr__(self) -> str:
        about = object.__getattribute__(self, "_about")
        return f"ErasedArray({about}, requires_grad={object.__getattribute__(self, '_requires_grad')})"

    def __format__(self, spec: str) -> str:
        return refuse(self, "formatting") if spec else repr(self)

    def __dir__(self) -> list[str]:
        return ["requires_grad"]

    # Also reached through the type, past __getattribute__.
    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> NoReturn:
        refuse(self, f"numpy.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}"))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        refuse(self, f"{function.__module__}.{function.__name__}")


def refuse(erased: ErasedArray, operation: str) -> NoReturn:
    """Raises the RuntimeError that says who used what."""
    about = object.__getattribute__(erased, "_about")
    raise RuntimeError(
        f"{operation}: {about} was erased, its memory given back, when the model was frozen; use the frozen graph, or "
        "assign a new array to it"
    )


_OPERATIONS = {
    "addition": "add radd iadd", "subtraction": "sub rsub isub", "multiplication": "mul rmul imul",
    "division": "truediv rtruediv itruediv", "floor division": "floordiv rfloordiv ifloordiv",
    "remainder": "mod rmod imod", "divmod": "divmod rdivmod", "power": "pow rpow ipow",
    "matrix multiplication": "matmul rmatmul imatmul", "&": "and rand iand", "|": "or ror ior", "^": "xor rxor ixor",
    "<<": "lshift rlshift ilshift", ">>": "rshift rrshift irshift", "comparison": "eq ne lt le gt ge",
    "negation": "neg", "unary plus": "pos", "abs": "abs", "inversion": "invert", "len": "len", "bool": "bool",
    "float": "float", "int": "int", "complex": "complex", "use as an index": "index", "round": "round",
    "truncation": "trunc", "rounding down": "floor", "rounding up": "ceil", "indexing": "getitem",
    "assigning to an index": "setitem", "deleting an index": "delitem", "iteration": "iter next reversed",
    "membership test": "contains", "hashing": "hash", "calling": "call", "conversion to an ndarray": "array",
    "conversion to bytes": "bytes", "copy.copy": "copy", "copy.deepcopy": "deepcopy", "pickling": "reduce reduce_ex",
}


def _refusing(operation: str) -> Callable[..., NoReturn]:
    def refusing(self: ErasedArray, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(self, operation)

    return refusing


for _operation, _methods in _OPERATIONS.items():
    for _method in _methods.split():
        setattr(ErasedArray, f"__{_method}__", _refusing(_operation))
del _operation, _methods, _method


# -- who erases ------------------------------------------------------------------------------------------------------
def _extent(array: Any) -> tuple[int, int]:
    """First byte and the one behind the last."""
    low = array.__array_interface__["data"][0]
    if array.size == 0:
        return low, low
    high = low
    for n, stride in zip(array.shape, array.strides):
        if stride < 0:
            low += (n - 1) * stride
        else:
            high += (n - 1) * stride
    return low, high + array.itemsize


class _Memory:
    """The memory of some arrays; asked whether another one has a byte in it."""

    def __init__(self, arrays: Iterable[Any]) -> None:
        starts: list[int] = []
        ends: list[int] = []
        for low, high in sorted(_extent(array) for array in arrays):
            if ends and low <= ends[-1]:
                ends[-1] = max(ends[-1], high)
            elif low < high:
                starts.append(low)
                ends.append(high)
        self.starts, self.ends = starts, ends

    def __contains__(self, array: Any) -> bool:
        low, high = _extent(array)
        i = bisect.bisect_left(self.starts, high) - 1
        return low < high and i >= 0 and self.ends[i] > low


class _Eraser:
    """Collects what is to be erased; nothing is changed before `finish`."""

    def __init__(self, keep: Iterable[Any]) -> None:
        arrays = list(keep)
        for i, array in enumerate(arrays):
            if not isinstance(array, np.ndarray):
                raise TypeError(f"keep: expected arrays, got {type(array).__name__} at {i}")
        self.kept = _Memory(arrays)
        self.rows: list[FreezeRow] = []
        self.put: list[tuple[Callable[[Any, Any, Any], None], Any, Any, ErasedArray]] = []
        self.seen: set[tuple[int, Any]] = set()

    def slot(self, store: Any, key: Any, path: str, name: str, owner: str, kind: str) -> None:
        """store[key], an array or something else."""
        array = store[key]
        if not isinstance(array, np.ndarray) or (id(store), key) in self.seen:
            return
        self.seen.add((id(store), key))
        if array in self.kept:
            self.rows.append(FreezeRow("discard", path, "kept", "IN_USE", hint=REASONS["IN_USE"]))
            return
        erased = ErasedArray(name, owner, bool(getattr(array, "requires_grad", False)), kind)
        self.put.append((operator.setitem, store, key, erased))
        self.rows.append(FreezeRow("discard", path, "done", "OK"))

    def module(self, path: str, module: Module) -> None:
        """The parameters and buffers of one module, not of those below it."""
        owner = f"{type(module).__name__} {path!r}" if path else type(module).__name__
        for name, kind in module._kinds.items():
            if kind != "module" and name in module.__dict__:
                self.slot(module.__dict__, name, f"{path}.{name}" if path else name, name, owner, kind)

    def finish(self) -> list[FreezeRow]:
        for put, store, key, erased in self.put:
            put(store, key, erased)
        return self.rows


def invalidate_eager_modules(module: Module, *, keep: Iterable[Any] = ()) -> list[FreezeRow]:
    """Gives back the memory of all parameters and buffers of a module and those below it.

    Each becomes an `ErasedArray`. The memory is free as soon as nobody else holds the array or a view of it.

    Args:
        module: the module, itself and below.
        keep: arrays that somebody still needs: whatever shares memory with one of them stays.

    Returns:
        A row for each array: "done", or "kept" because of `keep`.

    Raises:
        TypeError: `module` is not a Module, or `keep` holds something else than arrays; nothing is erased then.

    >>> from pyconvbn import nn
    >>> from pyconvbn.freezing import invalidate_eager_modules
    >>> layer = nn.Linear(2, 2)
    >>> [(row.node, row.outcome) for row in invalidate_eager_modules(layer, keep=[layer.bias])]
    [('weight', 'done'), ('bias', 'kept')]
    """
    if not isinstance(module, Module):
        raise TypeError(f"module: expected a Module, got {type(module).__name__}")
    eraser = _Eraser(keep)
    for path, owner in module.named_modules():
        eraser.module(path, owner)
    return eraser.finish()


def discard_traced_gm_params(gm: GraphModule, *, keep: Iterable[Any] = ()) -> list[FreezeRow]:
    """Gives back the memory of the arrays that a traced GraphModule holds.

    These are its parameters and buffers and those of its modules, the arrays that its get_attr nodes read, and those
    lifted to inputs (`gm.meta["params_flat"]`). An array that stands in the arguments of a node cannot be erased.

    Args:
        gm: the GraphModule, of no use afterwards.
        keep: arrays that somebody still needs: whatever shares memory with one of them stays.

    Returns:
        A row for each array: "done", or "kept" because of `keep` or because it stands in the arguments of a node.

    Raises:
        TypeError: `gm` is not a GraphModule, or `keep` holds something else than arrays; nothing is erased then.

    >>> from pyconvbn import fx, nn
    >>> from pyconvbn.freezing import discard_traced_gm_params
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2, bias=False)))
    >>> [(row.node, row.outcome) for row in discard_traced_gm_params(gm)]
    [('0.weight', 'done')]
    """
    from .fx import GraphModule

    if not isinstance(gm, GraphModule):
        raise TypeError(f"gm: expected a GraphModule, got {type(gm).__name__}")
    eraser = _Eraser(keep)
    for path, owner in gm.named_modules():
        eraser.module(path, owner)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            _read_by(gm, str(node.target), eraser)
    flat, names = gm.meta.get("params_flat"), gm.meta.get("params_names", ())
    if isinstance(flat, list):
        for i in range(len(flat)):
            name = names[i] if i < len(names) else f"params_flat[{i}]"
            eraser.slot(flat, i, name, name, gm.class_name, "lifted parameter")
    for node in gm.graph.nodes:
        if any(True for _ in _arrays_in((node.args, node.kwargs))):
            hint = "an array in the arguments of the node itself: delete the GraphModule to free it"
            eraser.rows.append(FreezeRow("discard", node.name, "kept", "IN_USE", hint=hint))
    return eraser.finish()


def _read_by(gm: GraphModule, target: str, eraser: _Eraser) -> None:
    """The attribute that a get_attr node reads, registered or not."""
    *path, name = target.split(".")
    owner: Any = gm
    for part in path:
        owner = getattr(owner, "__dict__", {}).get(part)
    if isinstance(owner, Module) and name in owner.__dict__:
        where = f"{type(owner).__name__} {'.'.join(path)!r}" if path else gm.class_name
        eraser.slot(owner.__dict__, name, target, name, where, "array")


def _arrays_in(value: Any) -> Iterator[Any]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _arrays_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _arrays_in(item)
    elif isinstance(value, slice):
        yield from _arrays_in((value.start, value.stop, value.step))
