# SPDX-License-Identifier: BSD-3-Clause
"""How `verify` runs things: copies in another precision, recorded runs, inputs made up from the graph."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import nn
from ._modules import is_torch
from .fx._describe import attribute, describe

__all__ = [
    "as_inputs", "call", "cast_tree", "copy_in", "graph_of", "interpret", "layer_of", "leaves",
    "made_up_inputs", "record", "trace",
]  # fmt: skip

_Array = NDArray[Any]
#: Spatial sizes tried when the graph does not tell; the first that runs is taken.
_SIZES = (32, 64, 28, 16, 8, 128, 224, 299)
_BATCH = 4


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


# -- copies --------------------------------------------------------------------------------------


class _Caster:
    """Replaces the float arrays of an object (graph) by arrays of another dtype, each once."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.done: dict[int, tuple[Any, Any]] = {}  # id -> (object, kept alive; its replacement)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (type, types.ModuleType, types.FunctionType, str, bytes, int, float, type(None))):
            return value
        if id(value) in self.done:
            return self.done[id(value)][1]
        self.done[id(value)] = value, value
        made = value
        if _is_float(value):
            made = value.astype(self.dtype)
        elif isinstance(value, tuple):
            items = [self(item) for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                made = type(value)._make(items) if hasattr(value, "_make") else tuple(items)
        elif isinstance(value, list):
            value[:] = [self(item) for item in value]
        elif isinstance(value, dict):
            for key, item in list(value.items()):
                value[key] = self(item)
        elif hasattr(value, "__dict__"):
            members = vars(value)
            for key, item in list(members.items()):
                members[key] = self(item)
        self.done[id(value)] = value, made
        return made


def cast_tree(value: Any, dtype: np.dtype[Any]) -> Any:
    """`value` with float arrays in `dtype`, looking into tuples, lists and dicts only; nothing is changed."""
    if _is_float(value):
        return value.astype(dtype, copy=False)
    if isinstance(value, tuple):
        items = [cast_tree(item, dtype) for item in value]
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    if isinstance(value, list):
        return [cast_tree(item, dtype) for item in value]
    if isinstance(value, dict):
        return {key: cast_tree(item, dtype) for key, item in value.items()}
    return value


def copy_in(target: Callable[..., Any], dtype: np.dtype[Any] | None = None) -> Callable[..., Any]:
    """An independent copy of a callable with everything it holds, float arrays in `dtype` if given.

    Modules and other objects are deep-copied; a function is made anew over copies of what its closure, its
    defaults and the globals it names hold. So running the copy changes nothing of the user's (a BatchNorm in
    training updates its statistics).
    """
    return _copy(target, None if dtype is None else _Caster(dtype), {})


def _copy(value: Any, cast: _Caster | None, memo: dict[int, Any]) -> Any:
    if isinstance(value, functools.partial):
        function = _copy(value.func, cast, memo)
        args = [_copy(item, cast, memo) for item in value.args]
        return functools.partial(function, *args, **{k: _copy(v, cast, memo) for k, v in value.keywords.items()})
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _copy(value.__self__, cast, memo))
    if isinstance(value, types.FunctionType):
        return _copy_function(value, cast, memo)
    if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
        return value
    if is_torch(value):
        copied = copy.deepcopy(value, memo)
        return copied if cast is None else copied.to(getattr(sys.modules["torch"], str(cast.dtype)))
    try:
        copied = copy.deepcopy(value, memo)
    except Exception:
        if isinstance(value, nn.Module):
            raise
        return value  # something that cannot be copied, a lock for example
    return copied if cast is None else cast(copied)


def _names(code: types.CodeType) -> set[str]:
    """Names that a function, and the functions inside it, may look up."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def _copy_function(function: types.FunctionType, cast: _Caster | None, memo: dict[int, Any]) -> types.FunctionType:
    if id(function) in memo:
        return memo[id(function)]  # recursion

    def worth_copying(value: Any) -> bool:
        holders = nn.Module, np.ndarray, types.FunctionType, list, tuple, dict
        return isinstance(value, holders) or is_torch(value)

    made = types.FunctionType(
        function.__code__, dict(function.__globals__), function.__name__, function.__defaults__,
        None if function.__closure__ is None else tuple(types.CellType() for _ in function.__closure__),
    )  # fmt: skip
    memo[id(function)] = made
    for old, new in zip(function.__closure__ or (), made.__closure__ or (), strict=True):
        try:
            new.cell_contents = _copy(old.cell_contents, cast, memo)
        except ValueError:  # an empty cell stays one
            pass
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        foreign = isinstance(value, types.FunctionType) and value.__module__ != function.__module__
        if worth_copying(value) and not foreign:
            made.__globals__[name] = _copy(value, cast, memo)
    if function.__defaults__:
        made.__defaults__ = tuple(_copy(v, cast, memo) if worth_copying(v) else v for v in function.__defaults__)
    if function.__kwdefaults__:
        made.__kwdefaults__ = {
            k: _copy(v, cast, memo) if worth_copying(v) else v for k, v in function.__kwdefaults__.items()
        }
    return made


# -- running -------------------------------------------------------------------------------------


def call(target: Callable[..., Any], inputs: tuple[Any, ...], label: str) -> Any:
    """`target(*inputs)`; an exception gets a note saying what was run. torch modules take and give arrays."""
    try:
        if is_torch(target):
            return _call_torch(target, inputs)
        return target(*inputs)
    except Exception as error:
        error.add_note(f"verify was running {label}")
        raise


def _call_torch(target: Any, inputs: tuple[Any, ...]) -> Any:
    torch = sys.modules["torch"]

    def arrays(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().numpy()
        if isinstance(value, dict):
            return {key: arrays(item) for key, item in value.items()}
        return type(value)(map(arrays, value)) if type(value) in (tuple, list) else value

    with torch.no_grad():
        return arrays(target(*(torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for x in inputs)))


def graph_of(target: Any) -> Any | None:
    """`target` itself if it is a GraphModule of ours, else None."""
    from .fx import GraphModule

    return target if isinstance(target, GraphModule) else None


def trace(target: Any) -> Any | None:
    """A GraphModule of (a copy of) `target`; None where it cannot be traced."""
    from .fx import symbolic_trace

    if graph_of(target) is not None or is_torch(target):
        return graph_of(target)
    if not isinstance(target, (nn.Module, types.FunctionType)):
        return None
    try:
        # Of a copy: tracing runs it, and it may write into what it holds.
        return symbolic_trace(copy_in(target))
    except Exception:
        return None


def interpret(
    gm: Any, inputs: tuple[Any, ...], dtype: np.dtype[Any] | None = None, values: dict[str, Any] | None = None
) -> Any:
    """Runs `gm` node by node; `values` gets each node's value by its name.

    With `dtype` every float array on the way is in it: inputs, literals, and whatever a node returns.
    """
    from .fx import Interpreter

    class Run(Interpreter):  # type: ignore[misc]
        def fetch_args_kwargs_from_env(self, n: Any) -> tuple[Any, Any]:
            args, kwargs = super().fetch_args_kwargs_from_env(n)
            return (args, kwargs) if dtype is None else (cast_tree(args, dtype), cast_tree(kwargs, dtype))

        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            result = result if dtype is None else cast_tree(result, dtype)
            if values is not None:  # a copy: a later node may write into it
                values[n.name] = result.copy() if isinstance(result, np.ndarray) else result
            return result

    return Run(gm).run(*(inputs if dtype is None else cast_tree(inputs, dtype)))


def record(gm: Any, inputs: tuple[Any, ...], dtype: np.dtype[Any] | None = None) -> dict[str, Any]:
    """The value of each node, by its name, in a run of a copy of `gm` (in another precision)."""
    values: dict[str, Any] = {}
    interpret(copy_in(gm, dtype), inputs, dtype, values)
    return values


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested tuples, lists, dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{names[index]}" if names else f"{path}[{index}]")
    else:
        yield path, value


# -- inputs --------------------------------------------------------------------------------------


def as_inputs(inputs: Any) -> tuple[Any, ...]:
    """The tuple of arguments that `inputs` stands for; torch tensors become arrays."""
    torch = sys.modules.get("torch")
    values = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    made = []
    for index, value in enumerate(values):
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().numpy()
        if not isinstance(value, (np.ndarray, np.generic, int, float, bool, type(None), dict, tuple, list)):
            raise TypeError(f"inputs: expected an array or a tuple of arrays, got {type(value).__name__} at {index}")
        made.append(value)
    return tuple(made)


def _first_layer(placeholder: Any, nodes: list[Any], root: Any) -> Any | None:
    """The first convolution or linear node, in graph order, that `placeholder` reaches."""
    reached = {placeholder.name}
    for node in nodes:
        if any(used.name in reached for used in node.all_input_nodes):
            reached.add(node.name)
            if describe(node, root).kind == "conv":
                return node
    return None


class Layer(NamedTuple):
    """Parameters of a convolution or linear node."""

    weight: _Array
    bias: _Array | None
    transposed: bool
    groups: int


def layer_of(node: Any, root: Any) -> Layer | None:
    """What a convolution or linear node computes with; None where the graph does not tell."""
    if node.op == "call_module":
        module = attribute(root, node.target)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        transposed, groups = getattr(module, "transposed", False), getattr(module, "groups", 1)
    else:
        # conv*: (input, weight, bias, stride, padding, dilation, groups); transposed ones have groups there too;
        # aten.convolution: (input, weight, bias, stride, padding, dilation, transposed, output_padding, groups).
        name, args = describe(node, root).title, [*node.args, *[None] * 9]
        found = (node.kwargs.get(key, args[at]) for at, key in ((1, "weight"), (2, "bias")))
        weight, bias = (attribute(root, getattr(source, "target", None)) for source in found)
        transposed = args[6] is True if name == "convolution" else "transpose" in name
        groups = node.kwargs.get("groups", args[8 if name == "convolution" else 6])
    if not isinstance(weight, np.ndarray) or weight.ndim < 2:
        return None
    bias = bias if isinstance(bias, np.ndarray) else None
    return Layer(weight, bias, bool(transposed), groups if isinstance(groups, int) else 1)


def made_up_inputs(gm: Any, rng: np.random.Generator, runs: Callable[[tuple[Any, ...]], bool]) -> tuple[Any, ...]:
    """Random inputs of the shapes that shape propagation left, or that the first layers suggest.

    `runs` tells whether inputs can be computed with; sizes that the graph does not tell are tried. Raises
    `ValueError` that asks for `inputs=`.
    """
    known: list[tuple[tuple[int, ...], int, np.dtype[Any]]] = []  # shape without, number of unknown sizes, dtype
    root = gm
    nodes = list(gm.graph.nodes)
    for node in nodes:
        if node.op != "placeholder":
            continue
        meta = node.meta.get("tensor_meta")
        if getattr(meta, "shape", None) is not None:
            dtype = np.dtype(getattr(meta, "dtype", None) or np.float32)
            if dtype.kind != "f":
                raise ValueError(f"inputs: {node.name!r} is an array of {dtype}; pass inputs=")
            known.append((tuple(meta.shape), 0, dtype))
            continue
        layer = _first_layer(node, nodes, root)
        found = None if layer is None else layer_of(layer, root)
        if found is None:
            raise ValueError(f"inputs: the shape of {node.name!r} cannot be told from the graph; pass inputs=")
        channels = found.weight.shape[0] if found.transposed else found.weight.shape[1] * found.groups
        known.append(((_BATCH, channels), found.weight.ndim - 2, found.weight.dtype))
    for size in _SIZES:
        inputs = tuple(rng.normal(size=shape + (size,) * unknown).astype(dtype) for shape, unknown, dtype in known)
        if runs(inputs):
            return inputs
        if not any(unknown for _, unknown, _ in known):
            break
    raise ValueError("inputs: none that were made up from the graph could be computed with; pass inputs=")
