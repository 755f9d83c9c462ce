# SPDX-License-Identifier: BSD-3-Clause
"""`Proxy`: stands for an array while a function is traced, and writes down what is done to it.

Every operation on a proxy appends a node to the graph under construction and returns a proxy for the result. What
would need the value itself (a branch, a loop, a length) raises `TraceError` naming the source line.
"""

from __future__ import annotations

import copy
import dataclasses
import linecache
import opcode
import operator
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

import numpy as np

from .. import _core
from .graph import Graph
from .node import Node

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FX = os.path.join(_PACKAGE, "fx") + os.sep
_MODULE_PY = os.path.join(_PACKAGE, "nn", "module.py")
#: The code object below which (towards the caller) nothing belongs to the traced function any more.
trace_root: list[Any] = [None]
_USER, _MACHINERY, _OURS = 0, 1, 2
_file_kinds: dict[str, int] = {}  # walking over frames must cost less than a microsecond
_tracer_code: dict[int, CodeType] = {}  # of the methods of tracers defined elsewhere; by id, since hashing code is slow

_LEAVES = frozenset(
    {int, float, bool, str, complex, bytes, type(None), type(Ellipsis), type(NotImplemented), type}
)


class TraceError(ValueError):
    """Tracing met something that depends on a value, which is not known while tracing."""


# -- where in the user's code ------------------------------------------------------------------------------------
def user_frame() -> FrameType | None:
    """The innermost frame of the traced code: outside of this package, or of the traced module if it is part of it.

    None when no traced code runs, as for placeholders.
    """
    frame: FrameType | None = sys._getframe(2)  # the caller is a tracer's method, its caller at best the user
    inside = None
    root = trace_root[0]
    while frame is not None:
        code = frame.f_code
        kind = _file_kinds.get(code.co_filename)
        if kind is None:
            kind = _file_kinds[code.co_filename] = _kind_of_file(code.co_filename)
        if kind == _USER and id(code) not in _tracer_code:
            return frame
        if code is root:
            return inside
        if kind == _OURS and inside is None:
            inside = frame
        frame = frame.f_back
    return inside


def _kind_of_file(path: str) -> int:
    if not path.startswith(_PACKAGE):
        return _USER
    return _MACHINERY if path.startswith(_FX) or path == _MODULE_PY else _OURS


def refuse(what: str, hint: str) -> TraceError:
    """A `TraceError` that shows the line of the traced code."""
    frame, where = user_frame(), ""
    if frame is not None:
        path, line = frame.f_code.co_filename, frame.f_lineno
        text = linecache.getline(path, line).strip()
        text = text if len(text) <= 100 else text[:97] + "..."
        where = f"\n  {path}:{line}, in {frame.f_code.co_name}" + (f": {text}" if text else "")
    return TraceError(f"{what}; {hint}{where}")


# -- what makes the nodes ----------------------------------------------------------------------------------------
class TracerBase:
    """Makes nodes and proxies in `graph`; what `Tracer`, `GraphAppendingTracer` and `Transformer` share."""

    graph: Graph
    #: Keep `meta["stack_trace"]`, the source line of the traced code, with each node.
    record_stack_traces: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in vars(cls).values():
            if isinstance(method, FunctionType):
                _tracer_code[id(method.__code__)] = method.__code__

    def create_node(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        name: str | None = None, type_expr: Any = None,
    ) -> Node:
        """Append a node; arguments hold nodes, not proxies. Every node that tracing makes comes through here."""
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        if self.record_stack_traces:
            frame = user_frame()
            if frame is not None:
                code = frame.f_code
                node.meta["stack_trace"] = f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
        return node

    def proxy(self, node: Node) -> Proxy:
        """The proxy for a node; subclasses may return their own class."""
        return Proxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any],
        name: str | None = None, type_expr: Any = None,
    ) -> Proxy:
        """Append a node whose arguments may hold proxies, arrays and modules; returns its proxy."""
        if kwargs:
            if "out" in kwargs:
                self.check_out(kwargs["out"])
            kwargs = {key: self.create_arg(value) for key, value in kwargs.items()}
        node = self.create_node(kind, target, tuple([self.create_arg(a) for a in args]), kwargs, name, type_expr)
        return self.proxy(node)

    def create_arg(self, a: Any) -> Any:
        """What stands for `a` in a node's arguments: proxies become nodes, containers are rebuilt."""
        kind = type(a)
        if kind in _LEAVES:
            return a
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, (tuple, list)):
            items = [self.create_arg(item) for item in a]
            if isinstance(a, list):
                return items
            return tuple.__new__(kind, items) if hasattr(kind, "_fields") else tuple(items)
        if isinstance(a, dict):
            if any(holds_proxy(key) for key in a):
                raise refuse("a traced value is a key of a dict", "use keys that are known while tracing")
            return {key: self.create_arg(value) for key, value in a.items()}
        if isinstance(a, slice):
            return slice(self.create_arg(a.start), self.create_arg(a.stop), self.create_arg(a.step))
        if isinstance(a, Node):
            return a
        return self.create_other_arg(a)

    def create_other_arg(self, a: Any) -> Any:
        """`create_arg` for what is no proxy, container or plain literal: kept as it is if that is possible."""
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a) if f.init}
            return self.create_node("call_function", type(a), (), fields)
        if isinstance(a, (Iterator, Coroutine)):
            raise refuse(f"an argument is a {type(a).__name__}", "pass a list or a tuple")
        if isinstance(a, (set, frozenset)) and any(isinstance(item, Proxy) for item in a):
            raise refuse("a set holds a traced value", "use a list or a tuple")
        return a

    def check_out(self, out: Any) -> None:
        """Refuse an `out=` that would make every run of the graph write into the same array of nobody's."""

    # what a proxy is asked that only a value could answer; subclasses may answer
    def to_bool(self, obj: Proxy) -> bool:
        """Called when a traced value decides a branch."""
        raise refuse(
            f"control flow depends on the value of {obj.node.name!r}, which tracing does not know",
            "use numpy.where, or make the choice outside of the traced function",
        )

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Called when a traced value is iterated over, except `a, b = x`, whose length is known."""
        raise refuse(
            f"cannot iterate over {obj.node.name!r}: its length is not known while tracing",
            "index it, or unpack it into a fixed number of names",
        )

    def keys(self, obj: Proxy) -> Any:
        """Called for `x.keys()`, and so for `f(**x)`."""
        return Attribute(obj, "keys")()

    def to_number(self, obj: Proxy, what: str) -> Any:
        """Called when a traced value is asked for an int, a float, its length or an array."""
        raise refuse(
            f"{what} of {obj.node.name!r} is not known while tracing",
            "keep it an array, or wrap the function that needs the value with pyconvbn.fx.wrap",
        )


class GraphAppendingTracer(TracerBase):
    """Appends to an existing graph: what a `Proxy` made by hand from a node uses."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph


def holds_proxy(a: Any) -> bool:
    """Is a proxy in `a`, or in containers inside of it?"""
    return find_proxy(a) is not None


def find_proxy(a: Any) -> Proxy | None:
    """The first proxy in `a` or in containers, slices and dataclasses inside of it."""
    if isinstance(a, Proxy):
        return a
    if isinstance(a, dict):
        a = [*a, *a.values()]
    elif isinstance(a, slice):
        a = (a.start, a.stop, a.step)
    elif not isinstance(a, (tuple, list, set, frozenset)):
        if not dataclasses.is_dataclass(a) or isinstance(a, type):
            return None
        a = [getattr(a, field.name, None) for field in dataclasses.fields(a)]
    for item in a:
        found = find_proxy(item)
        if found is not None:
            return found
    return None


def record_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Proxy:
    """A call_function node for a call that a proxy takes part in; what operators call for proxies."""
    found = find_proxy(args)
    if found is None:
        found = find_proxy(kwargs)
    assert found is not None
    return found.tracer.create_proxy("call_function", target, args, kwargs or {})


# -- Proxy -------------------------------------------------------------------------------------------------------
def _unpack_count(frame: FrameType) -> int | None:
    """How many names the frame unpacks into, if that is what it does at this moment."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if code[at] != opcode.opmap["UNPACK_SEQUENCE"]:
        return None
    count, shift = code[at + 1], 8
    while at >= 2 and code[at - 2] == opcode.opmap["EXTENDED_ARG"]:
        at -= 2
        count |= code[at + 1] << shift
        shift += 8
    return count


def _is_operator(frame: FrameType) -> bool:
    """Does the frame compute `a + b`, `a < b` or the like at this moment?"""
    return frame.f_code.co_code[frame.f_lasti] in (opcode.opmap["BINARY_OP"], opcode.opmap["COMPARE_OP"])


_OPERATOR_OF: dict[np.ufunc, Callable[..., Any]] = {
    np.add: operator.add, np.subtract: operator.sub, np.multiply: operator.mul, np.true_divide: operator.truediv,
    np.floor_divide: operator.floordiv, np.remainder: operator.mod, np.power: operator.pow,
    np.left_shift: operator.lshift, np.right_shift: operator.rshift, np.bitwise_and: operator.and_,
    np.bitwise_or: operator.or_, np.bitwise_xor: operator.xor, np.matmul: operator.matmul, np.equal: operator.eq,
    np.not_equal: operator.ne, np.less: operator.lt, np.less_equal: operator.le, np.greater: operator.gt,
    np.greater_equal: operator.ge,
}


class Proxy:
    """A value that is not known yet: `node` of the graph that `tracer` builds.

    Arithmetic, comparison, indexing, attributes, methods, NumPy functions and ufuncs, and the functions of
    `pyconvbn.functional` and `pyconvbn.ops` give new proxies. Raises `TraceError` where a value is needed.

    >>> from pyconvbn import fx
    >>> graph = fx.Graph()
    >>> x = fx.Proxy(graph.placeholder("x"))
    >>> (2 * x).sum(axis=0), graph.nodes
    (Proxy(sum_1), [x, mul, sum_1])
    """

    __slots__ = ("node", "tracer", "__weakref__")
    node: Node
    tracer: TracerBase

    def __init__(self, node: Node, tracer: TracerBase | None = None) -> None:
        self.node = node
        self.tracer = GraphAppendingTracer(node.graph) if tracer is None else tracer

    def __repr__(self) -> str:
        return f"Proxy({self.node.name})"

    def __getattr__(self, name: str) -> Attribute:
        # Protocols are probed for by name (DLPack, pickling, printing); to them a proxy is nothing special.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"'Proxy' object has no attribute {name!r}")
        return Attribute(self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Proxy:
        return self.tracer.create_proxy("call_method", "__call__", (self, *args), kwargs)

    def __iter__(self) -> Iterator[Any]:
        count = _unpack_count(sys._getframe(1))
        if count is None:
            return self.tracer.iter(self)
        return iter([self[i] for i in range(count)])

    def keys(self) -> Any:
        return self.tracer.keys(self)

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __len__(self) -> int:
        return self.tracer.to_number(self, "the length")

    def __index__(self) -> int:
        return self.tracer.to_number(self, "the integer value")

    def __int__(self) -> int:
        return self.tracer.to_number(self, "the integer value")

    def __float__(self) -> float:
        return self.tracer.to_number(self, "the number")

    def __complex__(self) -> complex:
        return self.tracer.to_number(self, "the number")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.to_number(self, "the array")

    def __contains__(self, item: Any) -> bool:
        raise refuse(
            f"what is in {self.node.name!r} is not known while tracing", "use (x == item).any() as a value"
        )

    def __setitem__(self, key: Any, value: Any) -> None:
        raise refuse(
            f"{self.node.name!r} is written in place, which tracing does not record",
            "build a new array, for instance with numpy.where",
        )

    def __delitem__(self, key: Any) -> None:
        raise refuse(f"an item of {self.node.name!r} is deleted", "build a new array")

    def __copy__(self) -> Proxy:
        return self.tracer.create_proxy("call_function", copy.copy, (self,), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Proxy:
        return self.tracer.create_proxy("call_function", copy.deepcopy, (self,), {})

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Proxy:
        return self.tracer.create_proxy("call_function", func, args, kwargs)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Proxy:
        target: Any = ufunc if method == "__call__" else getattr(ufunc, method)
        if target is ufunc and not kwargs and _is_operator(sys._getframe(1)):
            target = _OPERATOR_OF.get(ufunc, ufunc)  # `array * x` arrives here as numpy.multiply(array, x)
        return self.tracer.create_proxy("call_function", target, inputs, kwargs)

    __hash__ = object.__hash__  # by identity, although == is recorded


class Attribute(Proxy):
    """`x.name`: becomes a call_method node when it is called, and a getattr node when it is used as a value."""

    __slots__ = ("root", "attr", "_node")
    root: Proxy
    attr: str
    _node: Node | None

    def __init__(self, root: Proxy, attr: str) -> None:
        self.root = root
        self.attr = attr
        self.tracer = root.tracer
        self._node = None

    @property
    def node(self) -> Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy("call_function", getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Proxy:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class ParameterProxy(Proxy):
    """A parameter whose shape, ndim, size and dtype are read from the array instead of being recorded."""

    __slots__ = ("array", "name")

    def __init__(self, tracer: TracerBase, node: Node, name: str, array: np.ndarray[Any, Any]) -> None:
        super().__init__(node, tracer)
        self.array = array
        self.name = name

    def __repr__(self) -> str:
        return f"ParameterProxy({self.name})"

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype


def _record_operator(function: Callable[..., Any], arity: int) -> Callable[..., Proxy]:
    if arity == 1:

        def unary(self: Proxy) -> Proxy:
            return self.tracer.create_proxy("call_function", function, (self,), {})

        return unary

    def binary(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return binary


def _record_reflected(function: Callable[..., Any]) -> Callable[..., Proxy]:
    def reflected(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", function, (other, self), {})

    return reflected


_REFLECTED = (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor", "matmul",
)
_BINARY = (*_REFLECTED, "getitem", "eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "invert", "abs")

# No in-place methods: Python falls back from `x += y` to `x + y`, which is what the graph should say.
for _name in (*_BINARY, *_UNARY):
    _function = getattr(operator, _name)
    _method = f"__{_name.rstrip('_')}__"
    setattr(Proxy, _method, _record_operator(_function, 1 if _name in _UNARY else 2))
    if _name in _REFLECTED:
        setattr(Proxy, f"__r{_name.rstrip('_')}__", _record_reflected(_function))

_core.set_proxy_handler(Proxy, record_call)
