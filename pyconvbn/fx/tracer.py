# SPDX-License-Identifier: BSD-3-Clause
"""`Tracer` and `symbolic_trace`: a module or function becomes a graph by running it once on proxies.

While a trace runs, three things of the process are changed, and put back after the last trace has ended: calls of
modules and reads of their parameters are seen by the tracer of the thread that traces (others do not notice), and the
functions of `math` and those named to `wrap` are recorded when a proxy is among their arguments.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..nn.module import Module
from ..nn.state import refuse_erased
from .graph import Graph
from .proxy import ParameterProxy, Proxy, TraceError, TracerBase, find_proxy, record_call, refuse, trace_root

if TYPE_CHECKING:
    from .graph_module import GraphModule

__all__ = ["Tracer", "symbolic_trace", "wrap"]


# -- opaque functions --------------------------------------------------------------------------------------------
_to_wrap: list[tuple[dict[str, Any], str]] = []


def _opaque(function: Callable[..., Any], target: Any = None) -> Callable[..., Any]:
    """`function`, recorded as a call of `target` (default: of the result) when a proxy is among the arguments."""

    @functools.wraps(function)
    def opaque(*args: Any, **kwargs: Any) -> Any:
        if find_proxy(args) is None and (not kwargs or find_proxy(kwargs) is None):
            return function(*args, **kwargs)
        return record_call(opaque if target is None else target, args, kwargs)

    opaque._fx_opaque = True  # type: ignore[attr-defined]
    return opaque


def wrap(fn_or_name: Any) -> Any:
    """Make a function one node: traced calls of it are recorded, its body is not looked into.

    As a decorator, or at module level with a function of that module or its name (also that of a builtin, as in
    `wrap("len")`). Returns what a decorator should. Raises `TypeError` for anything but a function or a str, and
    `NotImplementedError` for a name given elsewhere than at module level.

    >>> from pyconvbn import fx
    >>> @fx.wrap
    ... def clip(x):
    ...     return x if x.min() > 0 else x - x.min()
    >>> [node.name for node in fx.symbolic_trace(lambda x: clip(x) + 1).graph.nodes]
    ['x', 'clip', 'add', 'output']
    """
    if not callable(fn_or_name) and not isinstance(fn_or_name, str):
        raise TypeError(f"fn_or_name: expected a function or its name, got {type(fn_or_name).__name__}")
    frame = sys._getframe(1)
    at_module_level = frame.f_code.co_name == "<module>"
    if callable(fn_or_name):
        name = getattr(fn_or_name, "__name__", None)
        if at_module_level and name is not None:
            _to_wrap.append((frame.f_globals, name))
        return _opaque(fn_or_name)
    if not at_module_level:
        raise NotImplementedError(f"fn_or_name: the name {fn_or_name!r} can be given at module level only")
    _to_wrap.append((frame.f_globals, fn_or_name))
    return fn_or_name


# -- what a trace changes in the process -------------------------------------------------------------------------
class _Active(threading.local):
    tracer: Tracer | None = None


_active = _Active()
_plain_call = Module.__call__
_plain_getattribute = object.__getattribute__


def _traced_call(self: Module, *args: Any, **kwargs: Any) -> Any:
    tracer = _active.tracer
    if tracer is None:
        return _plain_call(self, *args, **kwargs)
    return tracer._module_called(self, args, kwargs)


def _traced_getattribute(self: Module, name: str) -> Any:
    value = _plain_getattribute(self, name)
    if isinstance(value, np.ndarray):
        tracer = _active.tracer
        if tracer is not None:
            return tracer.getattr(name, value, tracer._parameter_proxies)
    return value


class _Patches:
    """Installed by the first of the traces that run at the same time, undone by the last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.traces = 0
        self.undo: list[tuple[dict[str, Any] | None, str, Any]] = []
        self.seen: set[int] = set()
        self.math: dict[int, Callable[..., Any]] = {}

    def begin(self) -> None:
        with self.lock:
            self.traces += 1
            if self.traces > 1:
                return
            Module.__call__ = _traced_call  # type: ignore[method-assign]
            Module.__getattribute__ = _traced_getattribute  # type: ignore[method-assign]
            if not self.math:
                functions = [f for f in vars(math).values() if isinstance(f, BuiltinFunctionType)]
                self.math = {id(f): _opaque(f, f) for f in functions}
            self.functions_of(vars(math))
            for namespace, name in _to_wrap:
                builtins = namespace.get("__builtins__", {})
                builtins = builtins if isinstance(builtins, dict) else vars(builtins)
                original = namespace.get(name, builtins.get(name))
                if original is not None and not hasattr(original, "_fx_opaque"):
                    self.replace(namespace, name, _opaque(original, original))

    def end(self) -> None:
        with self.lock:
            self.traces -= 1
            if self.traces:
                return
            Module.__call__ = _plain_call  # type: ignore[method-assign]
            del Module.__getattribute__
            for namespace, name, value in reversed(self.undo):
                if namespace is None:
                    setattr(*value)
                elif value is _MISSING:
                    namespace.pop(name, None)
                else:
                    namespace[name] = value
            self.undo.clear()
            self.seen.clear()

    def replace(self, namespace: dict[str, Any], name: str, value: Any) -> None:
        self.undo.append((namespace, name, namespace.get(name, _MISSING)))
        namespace[name] = value

    def functions_of(self, namespace: dict[str, Any]) -> None:
        """Record calls of the functions of `math` that these globals hold, as after `from math import sqrt`."""
        if id(namespace) in self.seen:
            return
        with self.lock:
            self.seen.add(id(namespace))
            for name, value in list(namespace.items()):
                if type(value) is BuiltinFunctionType and id(value) in self.math:
                    self.replace(namespace, name, self.math[id(value)])

    def foreign_modules(self, cls: Any) -> None:
        """See the calls of torch modules too, which are leaves."""
        with self.lock:
            plain = cls.__call__
            if hasattr(plain, "_fx_opaque"):
                return

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                tracer = _active.tracer
                path = None if tracer is None else tracer._modules.get(id(self))
                if tracer is None or path is None:
                    return plain(self, *args, **kwargs)
                return tracer.create_proxy("call_module", path[0], args, kwargs)

            call._fx_opaque = True  # type: ignore[attr-defined]
            self.undo.append((None, "", (cls, "__call__", plain)))
            cls.__call__ = call


_MISSING = object()
_patches = _Patches()


def _torch_module() -> Any:
    """`torch.nn.Module` where torch is loaded; this package never loads it. Fit for isinstance either way."""
    return getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", ())


_NO_ARRAYS = frozenset({int, float, bool, str, tuple, list, dict, set, type(None)})


def _forward(module: Module, *args: Any, **kwargs: Any) -> Any:
    """The call of a module that is looked into."""
    compiled = getattr(type(module), "_python_forward", None)
    if compiled is not None:  # a GraphModule: the run loop knows no proxies, its code does
        return module._call_hooked(compiled(module), args, kwargs)
    _patches.functions_of(getattr(type(module).forward, "__globals__", {}))
    return _plain_call(module, *args, **kwargs)


# -- the tracer --------------------------------------------------------------------------------------------------
class Tracer(TracerBase):
    """Runs a module or function on proxies and collects the graph; subclass it to change what is a leaf.

    `param_shapes_constant`: reading `shape`, `ndim`, `size` or `dtype` of a parameter gives the value instead of a
    node. `record_stack_traces`: keep the source line of each node in `meta["stack_trace"]`.

    >>> from pyconvbn import nn
    >>> class Deep(Tracer):
    ...     def is_leaf_module(self, m, module_qualified_name):
    ...         return False
    >>> graph = Deep().trace(nn.Sequential(nn.ReLU()))
    >>> [node.op for node in graph.nodes]
    ['placeholder', 'call_function', 'output']
    """

    root: Module
    _parameter_proxies: dict[str, Proxy]

    def __init__(self, *, param_shapes_constant: bool = False, record_stack_traces: bool = True) -> None:
        self.param_shapes_constant = param_shapes_constant
        self.record_stack_traces = record_stack_traces

    # -- what subclasses may change --

    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        """Is a call of `m` one node? By default for the modules of `pyconvbn.nn` but its containers."""
        if not isinstance(m, Module):
            return True
        home = type(m).__module__
        return home.startswith("pyconvbn.nn.") and home != "pyconvbn.nn.containers"

    def call_module(
        self, m: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A module is called: one node for a leaf, else what `forward(*args, **kwargs)` records."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        return forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """An array attribute of a module is read: a parameter gives the proxy of its get_attr node."""
        entry = self._arrays.get(id(attr_val))
        if entry is None or entry[1] is not attr_val or not entry[2]:
            return attr_val
        name = entry[0]
        if name not in parameter_proxy_cache:
            proxy = self.create_proxy("get_attr", name, (), {})
            if self.param_shapes_constant:
                proxy = ParameterProxy(self, proxy.node, name, attr_val)
            parameter_proxy_cache[name] = proxy
        return parameter_proxy_cache[name]

    def path_of_module(self, mod: Any) -> str:
        """Dotted path of a module below the root, the first one if it has several. `NameError` if it is not there."""
        entry = self._modules.get(id(mod))
        if entry is None or entry[1] is not mod:
            self._look_at_root()
            entry = self._modules.get(id(mod))
            if entry is None:
                raise NameError(
                    f"a {type(mod).__name__} is called that is no submodule of the traced {type(self.root).__name__}; "
                    "make it an attribute of the module, or put it into a ModuleList"
                )
        return entry[0]

    def create_other_arg(self, a: Any) -> Any:
        """Arrays become get_attr nodes on the very array, modules on the very module."""
        if hasattr(type(a), "__dlpack__"):
            return self.create_node("get_attr", self._name_of_array(a), (), {})
        if isinstance(a, Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        refuse_erased(a, "tracing")
        return super().create_other_arg(a)

    def check_out(self, out: Any) -> None:
        for array in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(array, np.ndarray) and id(array) not in self._arrays and not self._knows_plain:
                self._look_at_plain_attributes()
            if isinstance(array, np.ndarray) and id(array) not in self._arrays:
                raise refuse(
                    "an array that was made while tracing is written (out= or an in-place operator), so that every run "
                    "of the graph would write into the same memory", "compute a new array instead"
                )

    # -- tracing --

    def trace(self, root: Module | Callable[..., Any], concrete_args: Mapping[str, Any] | None = None) -> Graph:
        """The graph of `root`; afterwards `self.root` is the module that its targets refer to.

        Raises `TraceError` for what depends on values, `TypeError` for a root that is neither a module nor a
        function, `ValueError` for names in `concrete_args` that are no arguments.
        """
        if isinstance(root, _torch_module()):
            raise TypeError(
                f"root: {type(root).__name__} is a torch module; use pyconvbn.fx.from_torch, which shares its arrays"
            )
        if isinstance(root, Module):
            self.root, function = root, root.forward
            compiled = getattr(root, "_python_forward", None)
            if compiled is not None:
                function = compiled()
        elif callable(root):
            owner = getattr(root, "__self__", None)
            self.root, function = owner if isinstance(owner, Module) else Module(), root
        else:
            raise TypeError(f"root: expected a Module or a function, got {type(root).__name__}")
        self.graph = Graph()
        self._constants: list[str] = []
        self._parameter_proxies = {}
        self._look_at_root()
        outer, _active.tracer = _active.tracer, self
        _patches.begin()
        try:
            self._run(function, dict(concrete_args or {}), isinstance(root, Module))
        except BaseException:
            for name in self._constants:
                delattr(self.root, name)
            raise
        finally:
            _active.tracer = outer
            _patches.end()
            self._parameter_proxies = {}
        return self.graph

    def _run(self, function: Callable[..., Any], concrete: dict[str, Any], of_module: bool) -> None:
        if self._has_torch_modules:
            _patches.foreign_modules(_torch_module())
        _patches.functions_of(getattr(inspect.unwrap(function), "__globals__", {}))
        call, args, kwargs = self._bind_proxies(function, concrete)
        result = self.root._call_hooked(call, args, kwargs) if of_module else call(*args, **kwargs)
        annotations = getattr(inspect.unwrap(function), "__annotations__", {})
        try:
            value = self.create_arg(result)
        except TraceError as error:
            error.add_note(f"in what {getattr(function, '__qualname__', function)} returns")
            raise
        self.create_node("output", "output", (value,), {}, type_expr=annotations.get("return"))

    def _bind_proxies(
        self, function: Callable[..., Any], concrete: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """A placeholder for each parameter that is not concrete; how to call the function with them."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as error:
            raise TypeError(f"root: the parameters of {function!r} cannot be read: {error}") from None
        unknown = concrete.keys() - {p.name for p in parameters}
        if unknown:
            raise ValueError(f"concrete_args: {sorted(unknown)} are no parameters of the traced function")
        annotations = getattr(inspect.unwrap(function), "__annotations__", {})
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        values: dict[str, Any] = {}
        for p in parameters:
            if p.name in concrete:
                values[p.name] = concrete[p.name]
                continue
            default = () if p.default is p.empty else (p.default,)
            name = stars.get(p.kind, "") + p.name
            node = self.create_node("placeholder", name, default, {}, type_expr=annotations.get(p.name))
            values[p.name] = self.proxy(node)
        if any(p.kind in stars for p in parameters):
            # a code object has *args and **kwargs after the keyword-only ones
            parameters.sort(key=lambda p: (p.kind in stars, p.kind))
            return _plain_parameters(function), tuple([values[p.name] for p in parameters]), {}
        positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        keywords = {p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
        return function, tuple(values[name] for name in positional), keywords

    def _module_called(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = self._modules.get(id(module))
        if (entry is None or entry[1] is not module) and find_proxy((args, kwargs)) is None:
            return _plain_call(module, *args, **kwargs)  # computes a constant
        return self.call_module(module, functools.partial(_forward, module), args, kwargs)

    def _look_at_root(self) -> None:
        """Which module and array is where, by identity; the first name wins, parameters come before buffers."""
        modules: dict[int, tuple[str, Any]] = {}
        arrays: dict[int, tuple[str, Any, bool]] = {}
        buffers: list[tuple[str, Any]] = []
        todo: list[tuple[str, Module]] = [("", self.root)]
        while todo:
            path, module = todo.pop()
            if id(module) in modules:
                continue
            modules[id(module)] = (path, module)
            members, prefix = module.__dict__, f"{path}." if path else ""
            children = []
            for name, kind in module._kinds.items():
                value = members[name]
                if value is None:
                    pass
                elif kind == "module":
                    children.append((prefix + name, value))
                elif kind == "parameter":
                    arrays.setdefault(id(value), (prefix + name, value, True))
                else:
                    buffers.append((prefix + name, value))
            children.reverse()
            todo += children
        for name, value in buffers:
            arrays.setdefault(id(value), (name, value, False))
        self._modules, self._arrays, self._has_torch_modules = modules, arrays, False
        self._knows_plain = "torch" in sys.modules
        if self._knows_plain:  # else only when it is needed, which is rarely
            self._look_at_plain_attributes()

    def _look_at_plain_attributes(self) -> None:
        """Arrays, and torch modules with those below them, that are attributes without being registered."""
        self._knows_plain = True
        foreign = _torch_module()
        for path, module in list(self._modules.values()):
            if not isinstance(module, Module):
                continue
            prefix, kinds = f"{path}." if path else "", module._kinds
            for name, value in module.__dict__.items():
                if type(value) in _NO_ARRAYS or name in kinds:
                    continue
                if isinstance(value, foreign):
                    self._has_torch_modules = True
                    for below, child in value.named_modules(prefix=prefix + name):
                        self._modules.setdefault(id(child), (below, child))
                elif hasattr(type(value), "__dlpack__"):
                    self._arrays.setdefault(id(value), (prefix + name, value, False))

    def _name_of_array(self, array: Any) -> str:
        if id(array) not in self._arrays and not self._knows_plain:
            self._look_at_plain_attributes()
        entry = self._arrays.get(id(array))
        if entry is None:
            i = 0
            while hasattr(self.root, f"_tensor_constant{i}"):
                i += 1
            name = f"_tensor_constant{i}"
            setattr(self.root, name, array)
            self._constants.append(name)
            entry = self._arrays[id(array)] = (name, array, False)
        return entry[0]


trace_root[0] = Tracer._run.__code__


def _plain_parameters(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with *args and **kwargs as ordinary parameters, so that a proxy can stand for each of them."""
    bound = inspect.ismethod(function)
    plain = function.__func__ if bound else function
    if not isinstance(plain, FunctionType) or hasattr(plain, "__wrapped__"):
        raise TypeError(f"root: {function!r} takes *args or **kwargs, which is traced for plain functions only")
    code: CodeType = plain.__code__
    stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    code = code.replace(
        co_argcount=code.co_argcount + code.co_kwonlyargcount + stars, co_posonlyargcount=0, co_kwonlyargcount=0,
        co_flags=code.co_flags & ~(inspect.CO_VARARGS | inspect.CO_VARKEYWORDS),
    )
    result = FunctionType(code, plain.__globals__, plain.__name__, None, plain.__closure__)
    return functools.partial(result, function.__self__) if bound else result


def symbolic_trace(
    root: Module | Callable[..., Any], concrete_args: Mapping[str, Any] | None = None
) -> GraphModule:
    """Run `root` once on proxies; returns the `GraphModule` that computes the same.

    The GraphModule shares the modules and arrays of `root`. Parameters named in `concrete_args` have that value for
    ever and are no parameters of the result; so a branch on them can be traced. Modules of `pyconvbn.nn` become one
    call_module node each, other modules are looked into.

    Raises:
        TraceError: the code branches on, iterates over or converts a value that is not known; the message shows the
            source line.
        TypeError: `root` is neither a module nor a function.
        ValueError: `concrete_args` names what is no parameter.

    Example:
        >>> import numpy as np
        >>> from pyconvbn import fx
        >>> gm = fx.symbolic_trace(lambda x, flip=False: -x if flip else x + 1, {"flip": True})
        >>> print(gm.code)
        def forward(self, x):
            neg = -x
            return neg
        >>> gm(np.array([1.0, 2.0]))
        array([-1., -2.])
    """
    from .graph_module import GraphModule

    tracer = Tracer()
    graph = tracer.trace(root, concrete_args)
    name = type(root).__name__ if isinstance(root, Module) else getattr(root, "__name__", type(root).__name__)
    gm = GraphModule(tracer.root, graph, name)
    if isinstance(root, Module) or tracer.root is getattr(root, "__self__", None):
        gm.__dict__["_traced"] = weakref.ref(tracer.root)  # for freezing, which may give its memory back
    return gm
