# SPDX-License-Identifier: BSD-3-Clause
"""A torch module, torch.fx graph or exported program as a GraphModule of ours, on the same memory."""

from __future__ import annotations

import importlib
import linecache
import operator
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import nn
from ._torch_functions import Functions
from ._torch_modules import Modules, check_call, is_hooked
from ._torch_table import AUGMENTED, Call, as_torch_promotes, aten, gives_integers, is_shape, is_size
from ._torch_values import Unsupported, Values, loaded_torch

if TYPE_CHECKING:
    from .graph_module import GraphModule

__all__ = ["from_torch"]


def from_torch(obj: Any, *, concrete_args: dict[str, Any] | None = None) -> GraphModule:
    """Turns a torch model into a :class:`GraphModule` that computes the same over arrays.

    Args:
        obj: a ``torch.nn.Module`` (traced by ``torch.fx``; subclasses of convolution, linear, BatchNorm and the other
            known layers that inherit their ``forward`` are one node), a ``torch.fx.GraphModule``, or a
            ``torch.export.ExportedProgram``. torch is found among the loaded modules and never imported from here.
        concrete_args: as in ``torch.fx.symbolic_trace``; for a module that is traced only.

    Returns:
        A GraphModule whose node names are those of the torch.fx graph, with modules of :mod:`pyconvbn.nn`, functions of
        :mod:`pyconvbn.functional`, ``operator`` and ``ops.aten`` as targets. **Arrays share memory with the tensors**:
        what is changed in place on one side is seen on the other. Shared modules and tied tensors stay shared, training
        flags and all BatchNorm settings are kept. A layer with forward hooks goes on being called through torch, hooks
        included; passes leave it alone (reason ``HOOKED``).

        In-place operations (``relu(inplace=True)``, ``x.add_(y)``, ``x += y``) become pure ones whose result stands for
        the written tensor from there on; where a view of it is still used afterwards, memory is really written (an
        input's too). As in torch.fx, what a forward computes from buffers alone is computed once, while it is traced.

    Raises:
        TypeError: ``obj`` is nothing of the above. NotImplementedError: torch.fx cannot trace it, or operations,
        modules, tensors (dtype, device) have no counterpart; the message lists every one with its node and source line.

    Example:
        >>> import pyconvbn
        >>> pyconvbn.fx.from_torch("not a model")
        Traceback (most recent call last):
        ...
        TypeError: obj: expected a torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram, got str
    """
    torch = loaded_torch()
    expected = "expected a torch.nn.Module, torch.fx.GraphModule or torch.export.ExportedProgram"
    if torch is None:
        raise TypeError(f"obj: {expected}, got {type(obj).__name__}")
    if not isinstance(obj, torch.nn.Module):
        if type(obj).__name__ != "ExportedProgram" or not callable(getattr(obj, "module", None)):
            raise TypeError(f"obj: {expected}, got {type(obj).__name__}")
        obj = obj.module()
    return _Import(torch).run(obj, concrete_args)


class _Import:
    """One conversion: the tables of this torch, and what has been converted so far."""

    def __init__(self, torch: ModuleType) -> None:
        self.torch = torch
        self.fx = importlib.import_module("torch.fx")
        self.values = Values(torch)
        self.functions = Functions(torch)
        self.modules = Modules(torch, self.values, self.functions)
        self.modules.nested = lambda module: self.run(module, None)

    def run(self, source: Any, concrete_args: dict[str, Any] | None) -> GraphModule:
        self._refuse_hidden(source)
        if isinstance(source, self.fx.GraphModule):
            if concrete_args:
                raise ValueError("concrete_args: only for a module that is traced, got a GraphModule")
            graph = source.graph
        else:
            graph = self._trace(source, concrete_args)
        return _GraphImport(self, source, graph).run()

    def _refuse_hidden(self, source: Any) -> None:
        """What runs when the model is called but is seen by no tracer."""
        torch = self.torch
        if isinstance(source, torch.jit.ScriptModule):
            raise NotImplementedError("obj: a ScriptModule cannot be traced; pass the torch.nn.Module it was made from")
        if is_hooked(source):
            raise NotImplementedError(
                f"obj: {type(source).__name__} itself has forward hooks (or a forward of its own instance), which a "
                "graph would lose; remove them, or wrap the model in torch.nn.Sequential"
            )
        inner = torch.nn.modules.module
        if getattr(inner, "_global_forward_hooks", None) or getattr(inner, "_global_forward_pre_hooks", None):
            raise NotImplementedError("obj: global forward hooks are registered in torch, which a graph would lose")

    def _trace(self, source: Any, concrete_args: dict[str, Any] | None) -> Any:
        fx, modules = self.fx, self.modules

        class LayerTracer(fx.Tracer):  # type: ignore[name-defined, misc]
            """Knows our layers, sees in-place operators, and notes where each operation is written."""

            def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
                return bool(super().is_leaf_module(m, module_qualified_name)) or modules.known(m)

            def proxy(self, node: Any) -> Any:
                return writable(node, self)

            def create_node(self, *args: Any, **kwargs: Any) -> Any:
                node = super().create_node(*args, **kwargs)
                node.stack_trace = _author_line(here)
                return node

        here = (str(Path(self.torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)

        writable = _writable_proxy(fx)
        buffers = [(tensor, tensor._version, tensor.detach().clone()) for tensor in source.buffers()]
        try:
            graph = LayerTracer().trace(source, concrete_args)
            written = [(tensor, value) for tensor, version, value in buffers if tensor._version != version]
            if written:
                # torch.fx lets operations on buffers alone happen while it traces: undo, and make them nodes.
                for tensor, value in written:
                    tensor.data.copy_(value)
                tracer = LayerTracer()
                tracer.proxy_buffer_attributes = True
                graph = tracer.trace(source, concrete_args)
            return graph
        except fx.proxy.TraceError as error:
            raise NotImplementedError(
                f"obj: torch.fx cannot trace {type(source).__name__}: {error}. Its forward looks at values or sizes; "
                "give concrete_args, or pass the torch.export.ExportedProgram of it"
            ) from error


def _author_line(libraries: tuple[str, ...]) -> str | None:
    """The innermost line being run that is outside of these folders, as a traceback shows it.

    torch.fx can record stacks itself, but takes seconds to load what it needs for that.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(libraries):
        frame = frame.f_back
    if frame is None:
        return None
    code = frame.f_code
    text = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}' + (f"\n    {text}" if text else "")


def _writable_proxy(fx: ModuleType) -> type:
    """A Proxy that sees `x += y` as what it is for a tensor; torch.fx takes it for `x = x + y`.

    The node keeps the name that torch.fx gives it.
    """

    def method(augmented: Any, plain: Any) -> Any:
        def call(self: Any, other: Any) -> Any:
            return self.tracer.create_proxy("call_function", augmented, (self, other), {}, name=plain.__name__)

        return call

    methods = {f"__{augmented.__name__}__": method(augmented, plain) for augmented, plain in AUGMENTED.items()}
    return type("WritableProxy", (fx.Proxy,), methods)


class _GraphImport:
    """One graph: its nodes in order."""

    def __init__(self, parent: _Import, source: Any, graph: Any) -> None:
        from .graph import Graph

        self.parent = parent
        self.source = source
        self.torch_graph = graph
        self.graph = Graph()
        self.root = nn.Module()
        self.env: dict[Any, Any] = {}  # torch node -> our node that now holds its value
        self.problems: list[str] = []
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        # Memory: nodes of one storage group share memory; nodes of one tensor group are the very same tensor.
        self.storage: dict[Any, list[Any]] = {}
        self.tensor: dict[Any, list[Any]] = {}
        self.names = {node.name for node in graph.nodes}
        self.integers: set[Any] = set()  # our nodes that are tensors of integers or bools, as far as it shows

    def run(self) -> GraphModule:
        from .graph_module import GraphModule

        for node in self.torch_graph.nodes:
            self.storage[node], self.tensor[node] = [node], [node]
            try:
                if node.op == "output":
                    self._output(node)
                else:
                    self.env[node] = getattr(self, "_" + node.op)(node)
            except Unsupported as error:
                self.problems.append(self._problem(node, error))
                self.env[node] = None
        if self.problems:
            count = len(self.problems)
            raise NotImplementedError(
                f"from_torch: {count} thing{'s' if count > 1 else ''} in {type(self.source).__name__} "
                f"{'have' if count > 1 else 'has'} no counterpart:\n  " + "\n  ".join(self.problems)
            )
        module = GraphModule(self.root, self.graph, type(self.source).__name__)
        module.training = bool(self.source.training)
        return module

    def _problem(self, node: Any, error: Unsupported) -> str:
        target = node.target
        if not isinstance(target, str):
            home = getattr(target, "__module__", None)
            name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
            readable = str(target) if type(target).__name__ == "OpOverload" or name is None else name
            target = readable if home is None or readable.startswith("aten") else f"{home}.{readable}"
        line = _source_line(node)
        return f"node {node.name!r} ({node.op} {target}): {error}" + (f" (at {line})" if line else "")

    # -- arguments -------------------------------------------------------------------------------------------------
    def _argument(self, value: Any) -> Any:
        if isinstance(value, self.parent.fx.Node):
            return self.env[value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._argument(item) for item in value))
        if isinstance(value, tuple):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._argument(value.start), self._argument(value.stop), self._argument(value.step))
        if isinstance(value, range):
            return list(value)
        return self.parent.values.literal(value)

    def _arguments(self, node: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self._argument(a) for a in node.args), {k: self._argument(v) for k, v in node.kwargs.items()}

    def _create(self, node: Any, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = self.graph.create_node(op, target, args, kwargs or {}, node.name)
        if made.name != node.name:  # the exporter sets names that a graph itself would not give
            made.name = node.name
        line = _source_line(node)
        if line:
            made.meta["stack_trace"] = line
        return made

    # -- one method for each kind of node ---------------------------------------------------------------------------
    def _placeholder(self, node: Any) -> Any:
        return self._create(node, "placeholder", node.target, tuple(self._argument(a) for a in node.args))

    def _get_attr(self, node: Any) -> Any:
        owner_path, _, name = node.target.rpartition(".")
        try:
            owner = self.source.get_submodule(owner_path)
            value = getattr(owner, name)
        except AttributeError as error:
            raise Unsupported(f"the attribute is not there: {error}") from error
        if not self.parent.values.is_tensor(value):
            raise Unsupported(f"an attribute of type {type(value).__name__}, not a tensor")
        array = self.parent.values.array(value)
        home = self._home(owner_path)
        if name not in vars(home):
            if isinstance(array, nn.Parameter):
                home.register_parameter(name, array)
            else:
                home.register_buffer(name, array, name not in getattr(owner, "_non_persistent_buffers_set", ()))
        made = self._create(node, "get_attr", node.target)
        if array.dtype.kind in "iub":
            self.integers.add(made)
        return made

    def _call_module(self, node: Any) -> Any:
        try:
            source = self.source.get_submodule(node.target)
        except AttributeError as error:
            raise Unsupported(f"the module is not there: {error}") from error
        if node.target == "_guards_fn" and not node.users:  # torch.export's check of input shapes
            return None
        module = self.parent.modules.convert(source)
        args, kwargs = self._arguments(node)
        check_call(module, args, kwargs)
        path, _, name = node.target.rpartition(".")
        home = self._home(path)
        if vars(home).get(name) is not module:
            setattr(home, name, module)
        made = self._create(node, "call_module", node.target, args, kwargs)
        if getattr(source, "inplace", False) and "forward" not in vars(module):
            return self._written(node, made)
        if isinstance(module, (nn.Identity, nn.Flatten, nn.Dropout)) or "forward" in vars(module):
            self._same_storage(node)
        return made

    def _call_function(self, node: Any) -> Any:
        args, kwargs = self._arguments(node)
        if str(node.target) == "aten.max_pool2d_with_indices.default" and _first_only(node):
            return self._call(node, Call(aten("max_pool2d.default"), args, kwargs))
        if node.target is operator.getitem and str(getattr(args[0], "target", "")) == "aten.max_pool2d.default":
            return self._call(node, Call(aten("alias.default"), args[:1], {}, view=True))
        return self._call(node, self.parent.functions.function(node.target, args, kwargs))

    def _call_method(self, node: Any) -> Any:
        args, kwargs = self._arguments(node)
        return self._call(node, self.parent.functions.method(node.target, args, kwargs))

    def _call(self, node: Any, call: Call) -> Any:
        call = as_torch_promotes(call, self.integers)
        made = self._create(node, "call_function", call.target, call.args, call.kwargs)
        if gives_integers(call, self.integers):
            self.integers.add(made)
        if call.inplace and not (is_size(made) or is_shape(made)):  # numbers and tuples are never written
            return self._written(node, made)
        if call.view:
            self._same_storage(node)
        return made

    def _output(self, node: Any) -> None:
        result = self._argument(node.args[0])
        codegen = self.torch_graph._codegen
        info = getattr(codegen, "pytree_info", None)
        if info is not None:
            pytree = importlib.import_module("torch.utils._pytree")
            flat_inputs = sum(1 for n in self.torch_graph.nodes if n.op == "placeholder")
            if info.in_spec is not None and not _flat(info.in_spec, flat_inputs):
                raise Unsupported("nested inputs (tuples, lists or dicts as arguments)")
            if info.out_spec is not None:
                leaves = list(result) if isinstance(result, (tuple, list)) else [result]
                result = pytree.tree_unflatten(leaves, info.out_spec)
        made = self.graph.output(result)
        if made.name != node.name:  # only where the source graph has an unusual name
            made.name = node.name

    # -- modules -----------------------------------------------------------------------------------------------------
    def _home(self, path: str) -> nn.Module:
        """The module of ours at a dotted path, with its parents; made where it is not there."""
        home, source = self.root, self.source
        for name in path.split(".") if path else ():
            source = source.get_submodule(name)
            child = vars(home).get(name)
            if child is None:
                child = self._container(source)
                home.register_module(name, child)
            home = child
        return home

    def _container(self, source: Any) -> nn.Module:
        """A layer whose arrays are read is converted whole; a container starts empty."""
        if self.parent.modules.known(source):
            return self.parent.modules.convert(source)
        module = nn.Module()
        module.training = bool(source.training)
        return module

    # -- memory ------------------------------------------------------------------------------------------------------
    def _first(self, node: Any) -> Any:
        """The torch node that an operation reads first, which is the one it writes or views."""
        nodes = node.all_input_nodes
        if not nodes:
            raise Unsupported("an in-place operation on no tensor")
        return nodes[0]

    def _same_storage(self, node: Any) -> None:
        for other in node.all_input_nodes[:1]:
            group = self.storage[other]
            group.append(node)
            self.storage[node] = group

    def _written(self, node: Any, pure: Any) -> Any:
        """`pure` computes what torch writes over its first argument: let it stand for that tensor from here on."""
        written = self._first(node)
        here = self.position[node]
        same = self.tensor[written]
        viewed = any(
            self.position[user] > here
            for member in self.storage[written] if member not in same
            for user in member.users
        )
        constant = any(member.op == "get_attr" for member in self.storage[written])
        result = pure
        if viewed or constant:
            result = self._write(node, self.env[written], pure)
        group = self.storage[written]
        group.append(node)
        self.storage[node] = group
        same.append(node)
        self.tensor[node] = same
        for member in same:
            if member is not node:
                self.env[member] = result
        return result

    def _write(self, node: Any, target: Any, value: Any) -> Any:
        """Writes the memory itself: other names of it are still read, or it outlives the call."""
        from .. import ops

        copy = getattr(getattr(ops.aten, "copy_", None), "default", None)
        if copy is None:
            raise Unsupported("an in-place operation on memory that is also read through a view, or is a parameter")
        name = f"{node.name}_written"
        while name in self.names:
            name += "_"
        self.names.add(name)
        return self.graph.create_node("call_function", copy, (target, value), {}, name)


def _first_only(node: Any) -> bool:
    """Is only the first of the results ever read?"""
    return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)


def _flat(spec: Any, count: int) -> bool:
    """Is this torch pytree ((leaf, leaf, ...), {name: leaf, ...}) with `count` leaves?"""
    leaves = []
    for part in _children(spec):
        leaves.extend([part] if part.is_leaf() else _children(part))
    return len(leaves) == count and all(leaf.is_leaf() for leaf in leaves)


def _children(spec: Any) -> list[Any]:
    return list(spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs)


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*(?:\n\s*(?!File ")(?P<code>[^\n]+))?')


def _source_line(node: Any) -> str | None:
    """Where the model's author wrote this operation, if the tracer kept it."""
    trace = getattr(node, "stack_trace", None)
    if not trace:
        return None
    frames = [m for m in _FRAME.finditer(trace) if "torch" not in Path(m["file"]).parts]
    frames = frames or list(_FRAME.finditer(trace))
    if not frames:
        return None
    frame = frames[-1]
    return f"{frame['file']}:{frame['line']}" + (f": {frame['code'].strip()}" if frame["code"] else "")
