# SPDX-License-Identifier: BSD-3-Clause
"""`GraphModule`: a module whose forward is a graph."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from types import FunctionType, MethodType
from typing import Any, Self

import numpy as np

from .. import _core
from ..nn.module import Module
from ..nn.parameter import Parameter
from ._codegen import PythonCode, python_code
from .graph import Graph
from .node import Node
from .proxy import Proxy

__all__ = ["GraphModule"]

_MISSING = object()


def member(owner: Any, name: str) -> Any:
    """`getattr`, but the stored object itself also while a trace gives proxies for the parameters of modules."""
    if isinstance(owner, Module):
        found = owner.__dict__.get(name, _MISSING)
        if found is not _MISSING:
            return found
    return getattr(owner, name)


def resolve(root: Any, target: str) -> Any:
    """The object at a dotted path below `root`; `AttributeError` naming the path if there is none."""
    found = root
    for i, name in enumerate(target.split(".")):
        try:
            found = member(found, name)
        except AttributeError:
            where = ".".join(target.split(".")[:i]) or "the root"
            raise AttributeError(f"target {target!r}: {where} ({type(found).__name__}) has no {name!r}") from None
    return found


def add_node_note(error: BaseException, node: Node) -> None:
    """Say in a note of the exception which node raised it; the innermost graph speaks first."""
    text = f"while executing {node.format_node()}"
    line = node.meta.get("stack_trace")
    error.add_note(f"{text}\n  traced at {line}" if line else text)


class GraphModule(Module):
    """A module that computes `graph`, holding what the graph refers to under the same dotted names.

    `root` is a module, or a dict of the targets; only what the graph refers to is taken over, shared and not copied.
    Editing `graph` in place takes effect at the next call. `meta` is a dict for the user and the passes, copied by
    `copy.deepcopy`. Pickling keeps the graph and the modules; functions in it must be importable.

    Raises `TypeError` for other kinds of arguments, `AttributeError` naming a target that `root` does not have, and
    `ValueError` for a target that would hide an attribute of `GraphModule` itself.

    >>> from pyconvbn import fx, nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    >>> [node.target for node in gm.graph.nodes]
    ['input', '0', '1', 'output']
    >>> gm(np.ones((1, 2), np.float32)).shape
    (1, 2)
    """

    meta: dict[str, Any]

    def __init__(
        self, root: Module | Mapping[str, Any], graph: Graph, class_name: str = "GraphModule"
    ) -> None:
        if not isinstance(root, (Module, Mapping)):
            raise TypeError(f"root: expected a Module or a dict, got {type(root).__name__}")
        if not isinstance(graph, Graph):
            raise TypeError(f"graph: expected a Graph, got {type(graph).__name__}")
        super().__init__()
        object.__setattr__(self, "class_name", str(class_name))
        object.__setattr__(self, "meta", {})
        if isinstance(root, Module):
            object.__setattr__(self, "training", root.training)
            if isinstance(root, GraphModule):
                self.meta.update(root.meta)
        names = dict.fromkeys(str(n.target) for n in graph.nodes if n.op in ("get_attr", "call_module"))
        for target in names:
            first = target.partition(".")[0]
            if first in _RESERVED:
                raise ValueError(f"graph: the target {target!r} would hide GraphModule.{first}; rename it")
        if isinstance(root, Module):
            _take_from_module(root, self, names)
        else:
            _take_from_dict(root, self, names)
        self.graph = graph

    # -- the graph -------------------------------------------------------------------------------

    @property
    def graph(self) -> Graph:
        """The graph that a call computes; assigning another one makes this module its owner."""
        graph: Graph = self.__dict__["_graph"]
        return graph

    @graph.setter
    def graph(self, graph: Graph) -> None:
        if not isinstance(graph, Graph):
            raise TypeError(f"graph: expected a Graph, got {type(graph).__name__}")
        self.__dict__["_graph"] = graph
        graph.owning_module = self
        self.recompile()

    def recompile(self) -> None:
        """Forget what was prepared from the graph. Never needed: a call notices that the graph was edited."""
        self.__dict__["_program"] = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "graph":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def code(self) -> str:
        """The graph as the Python source of its forward."""
        return python_code(self.graph).src

    def python_code(self) -> PythonCode:
        """The source of forward, and the globals it needs to run."""
        return python_code(self.graph)

    def _python_forward(self) -> MethodType:
        """`code` as a bound method: what tracing runs, since the run loop itself takes no proxies."""
        self.graph._verify()  # Python would say of a node used before it is defined only that a local is unbound
        code = self.python_code()
        names: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, f"<code of {self.class_name}>", "exec"), names)  # noqa: S102
        function = names["forward"]
        assert isinstance(function, FunctionType)
        return MethodType(function, self)

    def print_readable(self, print_output: bool = True) -> str:
        """The code as a class, returned and by default printed."""
        lines = self.code.split("\n")
        text = "\n".join([f"class {self.class_name}(Module):", *(f"    {line}" for line in lines)])
        if print_output:
            print(text)
        return text

    # -- running ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; the parameters are its placeholders."""
        for a in args:
            if isinstance(a, Proxy):  # called while another graph is made: appends this one to it
                return self._python_forward()(*args, **kwargs)
        if kwargs and any(isinstance(a, Proxy) for a in kwargs.values()):
            return self._python_forward()(*args, **kwargs)
        # The run loop in C. It binds the arguments, prepares the graph again whenever its version has changed, looks up
        # the members of this module at each run, frees each value after its last use and adds the note of an exception
        # with `add_node_note`. It holds the graph, not this module.
        program = self.__dict__["_program"]
        if program is None:
            program = self.__dict__["_program"] = _core.Program(self.__dict__["_graph"])
        return program(self, *args, **kwargs)

    # -- what it holds ---------------------------------------------------------------------------

    def add_submodule(self, target: str, m: Module) -> bool:
        """Put a module at a dotted path, making modules on the way; False if the path leads through another object.

        Raises `TypeError` if `m` is no module, `ValueError` for an empty or a reserved name.
        """
        if not isinstance(m, Module):
            raise TypeError(f"m: expected a Module, got {type(m).__name__}")
        *path, name = target.split(".")
        if not all([*path, name]) or target.partition(".")[0] in _RESERVED:
            raise ValueError(f"target: expected a dotted name that GraphModule does not use itself, got {target!r}")
        owner: Any = self
        for part in path:
            child = getattr(owner, part, _MISSING)
            if child is not _MISSING and not isinstance(child, Module):
                return False
            if child is _MISSING:
                child = Module()
                setattr(owner, part, child)
            owner = child
        owner.add_module(name, m)
        return True

    def delete_submodule(self, target: str) -> bool:
        """Remove the module at a dotted path; False if there is none."""
        path, _, name = target.rpartition(".")
        try:
            owner = self.get_submodule(path)
        except AttributeError:
            return False
        if not isinstance(vars(owner).get(name), Module):
            return False
        delattr(owner, name)
        return True

    def delete_all_unused_submodules(self) -> None:
        """Remove the modules that no node refers to, neither by name nor by a part or a parent of theirs."""
        used: set[str] = set()
        for node in self.graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            parts = str(node.target).split(".")
            used.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
            try:
                found = resolve(self, str(node.target))
            except AttributeError:
                continue
            if isinstance(found, Module):
                used.update(name for name, _ in found.named_modules(prefix=str(node.target), remove_duplicate=False))
        for name, _ in list(self.named_modules(remove_duplicate=False)):
            if name and name not in used:
                self.delete_submodule(name)

    # -- copying, printing -----------------------------------------------------------------------

    def _traced_module(self) -> Module | None:
        """The module that `symbolic_trace` made this one from, if that was one and it still lives."""
        traced = self.__dict__.get("_traced")
        module: Module | None = None if traced is None else traced()
        return module

    def __copy__(self) -> Self:
        clone = super().__copy__()
        clone.__dict__.pop("_traced", None)  # a copy was not traced from it
        clone.__dict__["meta"] = dict(self.meta)
        clone.__dict__["_graph"] = copy.deepcopy(self.graph)
        clone.graph = clone.__dict__["_graph"]
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        for name, value in self.__dict__.items():
            if name not in ("_graph", "_program", "_traced"):
                clone.__dict__[name] = copy.deepcopy(value, memo)
        clone.graph = copy.deepcopy(self.graph, memo)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_program"]
        state.pop("_traced", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.graph = state["_graph"]

    def __repr__(self) -> str:
        text = super().__repr__()
        return self.class_name + text.removeprefix(type(self).__name__)

    def __str__(self) -> str:
        return f"{self!r}\n\n{self.code}"

    def _repr_html_(self) -> str:
        from .drawing import graph_html

        return graph_html(self)


#: Names of GraphModule's own that a submodule must not take.
_RESERVED = {name for name in vars(GraphModule) if not name.startswith("__")} - set(vars(Module)) | {
    "forward", "meta", "class_name", "training", "_graph", "_program", "_traced", "_kinds", "_not_saved", "_hooked",
}


def _store(owner: Module, name: str, value: Any, source: Any) -> None:
    """Make `value` an attribute of `owner`, of the kind (parameter, buffer, module) that it has in `source`."""
    kind = source._kinds.get(name) if isinstance(source, Module) else None
    if kind is None and isinstance(value, np.ndarray) and not isinstance(value, Parameter):
        kind = "buffer"
    if kind is None:
        setattr(owner, name, value)
        return
    owner.__dict__[name] = value
    owner._kinds[name] = kind
    if isinstance(source, Module) and name in source._not_saved:
        owner._not_saved.add(name)


def _child(owner: Module, name: str, training: bool) -> Module:
    """The module below `owner` under that name, a new empty one if there is none."""
    child = owner.__dict__.get(name)
    if not isinstance(child, Module):
        child = Module()
        object.__setattr__(child, "training", training)
        setattr(owner, name, child)
    return child


def _part_of(target: str, targets: Collection[str]) -> str | None:
    """The target above this one, if there is one: that object brings its parts along."""
    if "." in target:
        parts = target.split(".")
        for i in range(1, len(parts)):
            above = ".".join(parts[:i])
            if above in targets:
                return above
    return None


def _take_from_dict(root: Mapping[str, Any], owner: Module, targets: Collection[str]) -> None:
    """Put the values of `root` at dotted paths below `owner`."""
    for target in targets:
        if target not in root:
            raise AttributeError(f"root: has no {target!r}, which the graph refers to")
        above = _part_of(target, targets)
        if above is not None:
            if above in root and resolve(root[above], target[len(above) + 1 :]) is not root[target]:
                raise ValueError(f"root: {target!r} is not what {above!r} holds under that name")
            continue
        *path, name = target.split(".")
        mine = owner
        for part in path:
            mine = _child(mine, part, owner.training)
        _store(mine, name, root[target], None)


def _take_from_module(root: Module, owner: Module, targets: Collection[str]) -> None:
    """Share what `root` has at dotted paths with `owner`."""
    homes: dict[str, tuple[Any, Module]] = {"": (root, owner)}

    def home(path: str) -> tuple[Any, Module]:
        if path not in homes:
            above, _, part = path.rpartition(".")
            source, mine = home(above)
            found = member(source, part)
            homes[path] = found, _child(mine, part, getattr(found, "training", True))
        return homes[path]

    for target in targets:
        path, _, name = target.rpartition(".")
        if _part_of(target, targets) is not None:
            resolve(root, target)
            continue
        try:
            source, mine = home(path)
            value = member(source, name)
        except AttributeError:
            resolve(root, target)  # says where the path ends
            raise
        _store(mine, name, value, source)
