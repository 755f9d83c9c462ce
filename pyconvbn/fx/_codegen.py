# SPDX-License-Identifier: BSD-3-Clause
"""A graph as the Python function it stands for: text to read, which also runs."""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import sys
from typing import Any, NamedTuple

import numpy as np

from .graph import Graph
from .node import Node

_BINARY = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.lshift: "<<", operator.rshift: ">>", operator.and_: "&",
    operator.or_: "|", operator.xor: "^", operator.matmul: "@", operator.eq: "==", operator.ne: "!=",
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}
_UNARY = {operator.neg: "-", operator.pos: "+", operator.invert: "~"}


class PythonCode(NamedTuple):
    """`src` defines the function; `globals` holds what it names."""

    src: str
    globals: dict[str, Any]


def python_code(graph: Graph, root_name: str = "self") -> PythonCode:
    """`def forward(self, ...)` for a graph.

    Any graph gives valid Python: arguments that cannot be written as text appear as names in `globals`.
    """
    return _Writer(graph, root_name).write()


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and not keyword.iskeyword(text)


class _Writer:
    def __init__(self, graph: Graph, root_name: str) -> None:
        self.nodes = list(graph.nodes)
        self.globals: dict[str, Any] = {}
        self.ids: dict[int, str] = {}
        self.names: dict[Node, str] = {}
        taken = {"forward", "slice", "float", "getattr"}  # what the text itself uses
        for node in self.nodes:  # names set by hand may be anything
            name = str(node.name)
            base = name if _is_name(name) else "_unnamed"
            name, i = base, 0
            while name in taken:
                i += 1
                name = f"{base}_{i}"
            taken.add(name)
            self.names[node] = name
        self.taken = taken
        self.root = self.free_name(root_name)
        self.parameters: dict[Node, str] = {}  # names that callers use; the value may have another one inside
        for node in self.nodes:
            if node.op == "placeholder":
                name = str(node.target).lstrip("*")
                if not _is_name(name) or (name in taken and name != self.names[node]):
                    name = self.names[node]
                taken.add(name)
                self.parameters[node] = name
        self.local = {self.root, *self.names.values(), *self.parameters.values()}

    def free_name(self, base: str) -> str:
        name = base
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    # -- naming what is outside --

    def global_name(self, base: str, value: Any) -> str:
        """The name under which the function finds an object."""
        known = self.ids.get(id(value))
        if known is None:
            known = self.free_name(base if _is_name(base) else "_object")
            self.globals[known] = value
            self.ids[id(value)] = known
        return known

    def qualified(self, value: Any) -> str:
        """`numpy.concatenate`: through its module where that gives the very object, else a global of its own."""
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
        home = getattr(value, "__module__", None)
        if home is None and isinstance(value, np.ufunc):
            home = "numpy"
        if home in ("builtins", None) and isinstance(name, str) and getattr(builtins, name, None) is value:
            return name if name not in self.local else self.global_name(f"_{name}", value)
        if home == "_operator":
            home = "operator"
        if isinstance(name, str) and isinstance(home, str) and all(map(_is_name, f"{home}.{name}".split("."))):
            found: Any = sys.modules.get(home)
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is value:
                package = home.partition(".")[0]
                module = sys.modules.get(package)
                reached: Any = module
                for part in home.split(".")[1:]:
                    reached = getattr(reached, part, None)
                if module is not None and reached is sys.modules[home]:
                    return ".".join([self.global_name(package, module), *f"{home}.{name}".split(".")[1:]])
        return self.global_name(name if isinstance(name, str) and _is_name(name) else "_object", value)

    def path(self, target: Any) -> str:
        """`self.a.b`; parts that are no identifiers through getattr."""
        text = self.root
        for part in str(target).split("."):
            text = f"{text}.{part}" if _is_name(part) else f"getattr({text}, {part!r})"
        return text

    # -- arguments --

    def value(self, a: Any) -> str:
        if isinstance(a, Node):
            return self.names[a] if a in self.names else self.global_name(f"_foreign_{a.name}", a)
        kind = type(a)
        if a is None or a is Ellipsis or kind in (bool, int, str, bytes):
            return "..." if a is Ellipsis else repr(a)
        if kind is float:
            return repr(a) if math.isfinite(a) else f"float({str(a)!r})"
        if kind is complex and math.isfinite(a.real) and math.isfinite(a.imag):
            return repr(a)
        if isinstance(a, tuple):
            items = ", ".join(map(self.value, a))
            if hasattr(kind, "_fields"):
                return f"{self.qualified(kind)}({items})"
            return f"({items},)" if len(a) == 1 else f"({items})"
        if isinstance(a, list):
            return f"[{', '.join(map(self.value, a))}]"
        if isinstance(a, dict):
            return "{" + ", ".join(f"{self.value(k)}: {self.value(v)}" for k, v in a.items()) + "}"
        if isinstance(a, slice):
            return f"slice({self.value(a.start)}, {self.value(a.stop)}, {self.value(a.step)})"
        if isinstance(a, np.dtype) and a.isbuiltin == 1 and a.kind in "?biufc":
            return f"{self.global_name('numpy', np)}.dtype({a.name!r})"
        if isinstance(a, type) or callable(a):
            return self.qualified(a)
        return self.global_name(f"_{kind.__name__}_0", a)

    def index(self, a: Any) -> str:
        """What stands in square brackets."""
        if isinstance(a, tuple) and a and type(a) is tuple:
            return ", ".join(map(self.index_item, a)) + "," * (len(a) == 1)
        return self.index_item(a)

    def index_item(self, a: Any) -> str:
        if not isinstance(a, slice):
            return self.value(a)
        start, stop = ("" if part is None else self.value(part) for part in (a.start, a.stop))
        return f"{start}:{stop}" + ("" if a.step is None else f":{self.value(a.step)}")

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        texts = [self.value(a) for a in args]
        texts += [f"{key}={self.value(v)}" for key, v in kwargs.items() if _is_name(key)]
        odd = {key: v for key, v in kwargs.items() if not _is_name(key)}
        return ", ".join(texts + ([f"**{self.value(odd)}"] if odd else []))

    def operand(self, a: Any) -> str:
        """A literal number with a sign needs parentheses: `(-2) ** x`."""
        text = self.value(a)
        return f"({text})" if text.startswith("-") or isinstance(a, complex) else text

    # -- nodes --

    def call(self, node: Node) -> str:
        target, args, kwargs = node.target, node.args, node.kwargs
        if not kwargs and self.is_plain(target):
            if target in _BINARY and len(args) == 2:
                return f"{self.operand(args[0])} {_BINARY[target]} {self.operand(args[1])}"
            if target in _UNARY and len(args) == 1:
                return f"{_UNARY[target]}{self.operand(args[0])}"
            if target is operator.getitem and len(args) == 2 and isinstance(args[0], Node):
                return f"{self.value(args[0])}[{self.index(args[1])}]"
            if target is getattr and len(args) == 2 and isinstance(args[0], Node) and _is_name(args[1]):
                return f"{self.value(args[0])}.{args[1]}"
        return f"{self.qualified(target)}({self.arguments(args, kwargs)})"

    @staticmethod
    def is_plain(target: Any) -> bool:
        """A builtin function: safe to look up, whatever `__eq__` and `__hash__` others have."""
        return type(target) is type(len)

    def body(self, node: Node) -> str:
        if node.op == "call_function":
            return self.call(node)
        if node.op == "call_method":
            if node.args and _is_name(node.target):
                return f"{self.receiver(node.args[0])}.{node.target}({self.arguments(node.args[1:], node.kwargs)})"
            receiver = self.value(node.args[0]) if node.args else "None"
            return f"getattr({receiver}, {node.target!r})({self.arguments(node.args[1:], node.kwargs)})"
        if node.op == "call_module":
            return f"{self.path(node.target)}({self.arguments(node.args, node.kwargs)})"
        return self.path(node.target)

    def receiver(self, a: Any) -> str:
        return self.value(a) if isinstance(a, Node) else f"({self.value(a)})"

    def signature(self) -> tuple[str, list[str]]:
        """The parameters, and the assignments of those whose node has another name."""
        parts, late, renamed = [self.root], [], []
        star = more = ""
        for node, name in self.parameters.items():
            if name != self.names[node]:
                renamed.append(f"{self.names[node]} = {name}")
            text = str(node.target)
            if text.startswith("**"):
                more = f"**{name}"
            elif text.startswith("*"):
                star = f"*{name}"
            elif node.args:
                (late if star else parts).append(f"{name}={self.value(node.args[0])}")
            else:  # Python wants those without a default first, or behind a star
                (late if star or "=" in parts[-1] or late else parts).append(name)
        if star or late:
            parts.append(star or "*")
        return ", ".join([*parts, *late, *([more] if more else [])]), renamed

    def write(self) -> PythonCode:
        parameters, lines = self.signature()
        returned = False
        for node in self.nodes:
            if node.op == "output":
                lines.append(f"return {self.value(node.args[0])}" if node.args else "return None")
                returned = True
            elif node.op != "placeholder":
                lines.append(f"{self.names[node]} = {self.body(node)}")
        if not lines and not returned:
            lines.append("pass")
        return PythonCode("\n    ".join([f"def forward({parameters}):", *lines]), self.globals)
