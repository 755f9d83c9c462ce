# SPDX-License-Identifier: BSD-3-Clause
"""Shape propagation: which shape and dtype each node of a graph has for given inputs."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import _core, nn
from .._modules import read_conv, transposed_output_padding
from .graph_module import GraphModule, resolve
from .node import Node, map_aggregate, map_arg

__all__ = ["TensorMeta", "shape_prop"]


class TensorMeta(NamedTuple):
    """Shape and dtype of an array: what ``node.meta["tensor_meta"]`` holds."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ELEMENTWISE = tuple(
    getattr(nn, name)
    for name in ("ReLU", "ReLU6", "LeakyReLU", "SiLU", "Hardswish", "Sigmoid", "GELU", "Identity")
    if hasattr(nn, name)
)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not callable(value.shape)


def _meta_of(value: Any) -> TensorMeta:
    """Of an ndarray, a NumPy scalar or a torch tensor."""
    text = str(value.dtype)
    dtype = np.dtype(text.removeprefix("torch.") if text.startswith("torch.") else value.dtype)
    return TensorMeta(tuple(int(s) for s in value.shape), dtype)


def _example(value: Any, position: int) -> Any:
    """A TensorMeta, or the value itself when it is no array and no description of one."""
    if isinstance(value, TensorMeta):
        return value
    if _is_array(value):
        return _meta_of(value)
    if isinstance(value, tuple | list):
        if len(value) == 2 and isinstance(value[0], tuple | list):
            shape, dtype = value[0], np.dtype(value[1])
        else:
            shape, dtype = value, np.dtype(np.float32)
        if not all(isinstance(s, int | np.integer) and not isinstance(s, bool) and s >= 0 for s in shape):
            raise TypeError(f"example_shapes[{position}]: expected a shape, (shape, dtype) or an array, got {value!r}")
        return TensorMeta(tuple(int(s) for s in shape), dtype)
    return value


def _tensor(meta: Any) -> tuple[tuple[int, ...], str, int] | None:
    if not isinstance(meta, TensorMeta) or len(meta.shape) > 32:
        return None
    return meta.shape, meta.dtype.kind, meta.dtype.itemsize


class _Propagation:
    """One run over the nodes: `found` has a TensorMeta for each array, the value itself for everything else."""

    def __init__(self, gm: GraphModule, examples: Sequence[Any]) -> None:
        self.gm = gm
        self.examples = [_example(value, i) for i, value in enumerate(examples)]
        self.found: dict[Node, Any] = {}

    def run(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            try:
                self.found[node] = self.result(node)
            except MemoryError:
                raise
            except Exception as error:
                words = str(error)
                if not words.startswith(f"node {node.name}:"):
                    words = f"node {node.name}: {type(error).__name__}: {words}"
                raise ValueError(words) from error
            _core.op_set_tensor(node, _tensor(self.found[node]))

    def result(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self.placeholder(node)
        if node.op == "output":
            return map_arg(node.args[0], self.found.__getitem__)
        inferred = _core.op_infer_shape(node, self.gm)
        if inferred is not None:
            shape, kind, itemsize = inferred
            return TensorMeta(shape, np.dtype(f"{kind}{itemsize}"))
        if node.op == "get_attr":
            value = resolve(self.gm, str(node.target))
            return _meta_of(value) if _is_array(value) else value
        return self.by_geometry(node) or self.by_running(node)

    def placeholder(self, node: Node) -> Any:
        if self.examples:
            return self.examples.pop(0)
        if node.args:
            return _meta_of(node.args[0]) if _is_array(node.args[0]) else node.args[0]
        raise TypeError("no example shape is left for this placeholder")

    # -- modules whose geometry says it --
    def by_geometry(self, node: Node) -> TensorMeta | None:
        if node.op == "call_module":
            rest = dict(node.kwargs)
            module = resolve(self.gm, str(node.target))
            if type(module) is nn.FrozenLayer and node.args and not module._hooked:
                x = self.found.get(node.args[0]) if isinstance(node.args[0], Node) else None
                fits = isinstance(x, TensorMeta) and x.dtype == module.plan.dtype
                return TensorMeta(module.output_shape(x.shape), x.dtype) if fits else None
            x = node.args[0] if node.args else rest.pop("input", None)
            size = node.args[1] if len(node.args) > 1 else rest.pop("output_size", None)
            if rest or len(node.args) > 2:
                return None
            return self.of_module(module, x, size)
        if _core.op_lookup(node.target) != "efficient_conv_bn_eval":
            return None
        bound = node.bound_arguments()
        if not isinstance(bound["conv"], Node) or bound["out"] is not None:
            return None
        return self.of_module(self.found.get(bound["conv"]), bound["x"], bound["output_size"])

    def of_module(self, module: Any, source: Any, output_size: Any) -> TensorMeta | None:
        x = self.found.get(source) if isinstance(source, Node) else None
        if not isinstance(x, TensorMeta) or isinstance(output_size, Node):
            return None
        if type(module) in _CONVS:
            return self.of_conv(module, x, output_size)
        if output_size is not None:
            return None
        if type(module) is nn.Linear and x.shape and x.shape[-1] == module.in_features:
            return TensorMeta((*x.shape[:-1], module.out_features), x.dtype)
        return x if type(module) in _ELEMENTWISE else None

    @staticmethod
    def of_conv(module: Any, x: TensorMeta, output_size: Any) -> TensorMeta | None:
        record = read_conv(module)
        channel = len(x.shape) - record.nd - 1
        if channel not in (0, 1) or x.shape[channel] != module.in_channels:
            return None  # running it says what is wrong
        spatial, kernel = x.shape[channel + 1 :], tuple(module.kernel_size)
        if record.transposed:
            extra = record.output_padding
            if output_size is not None:
                extra = transposed_output_padding(record, kernel, spatial, output_size)
            sizes = [
                (size - 1) * s - 2 * p + d * (k - 1) + e + 1
                for size, s, p, d, k, e in zip(
                    spatial, record.stride, record.padding, record.dilation, kernel, extra, strict=True
                )
            ]
        elif output_size is not None:
            return None
        elif record.padding == "same":
            sizes = [*spatial]
        else:
            pads = (0,) * record.nd if isinstance(record.padding, str) else record.padding
            sizes = [
                (size + 2 * p - d * (k - 1) - 1) // s + 1
                for size, s, p, d, k in zip(spatial, record.stride, pads, record.dilation, kernel, strict=True)
            ]
        if min(sizes) < 1:
            return None
        return TensorMeta((*x.shape[:channel], record.out_channels, *sizes), x.dtype)

    # -- everything else --
    def by_running(self, node: Node) -> Any:
        args = map_aggregate(node.args, self.argument)
        kwargs = map_aggregate(node.kwargs, self.argument)
        call: Callable[..., Any]
        if node.op == "call_method":
            call, args = getattr(args[0], str(node.target)), args[1:]
        elif node.op == "call_module":
            call = resolve(self.gm, str(node.target))
            if getattr(call, "training", False):
                call = copy.deepcopy(call)  # statistics of zeros are not the user's
        else:
            assert callable(node.target)
            call = node.target
        with np.errstate(all="ignore"):
            value = call(*args, **kwargs)
        return _meta_of(value) if _is_array(value) else value

    def argument(self, leaf: Any) -> Any:
        """What a leaf of the arguments is called with: an array that stands there may be written, so a copy of it."""
        if isinstance(leaf, Node):
            return self.value(leaf)
        return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf

    def value(self, node: Node) -> Any:
        found = self.found[node]
        return np.zeros(found.shape, found.dtype) if isinstance(found, TensorMeta) else found


def _describe(found: Any) -> Any:
    """What goes into meta: TensorMeta, tuples of it, or None."""
    if isinstance(found, TensorMeta):
        return found
    if _is_array(found):
        return _meta_of(found)
    if isinstance(found, tuple | list) and found:
        parts = tuple(_describe(item) for item in found)
        return parts if any(part is not None for part in parts) else None
    return None


def shape_prop(gm: GraphModule, *example_shapes: Any) -> GraphModule:
    """Finds the shape and dtype of every node's value and keeps them in ``node.meta["tensor_meta"]``.

    Operators of this package, ATen operators, Python's operators and the known modules have rules and are not
    computed. What has none - a callable of yours, a module of yours, an array method without a rule - is **run** on
    arrays of zeros, also when it is random or has side effects; a module in training runs as a deep copy. Parameters
    are replaced by zeros too, so nothing of the module is written.

    Args:
        gm: GraphModule (or any module with a ``graph``).
        example_shapes: for each placeholder in order a shape (float32), ``(shape, dtype)``, or an array whose shape and
            dtype count; other values are taken as they are. Placeholders with a default may be left out.

    Returns:
        ``gm`` itself. A node with several results gets a tuple of TensorMeta; a node whose value is no array gets none.

    Raises:
        ValueError: a node's shapes cannot work, or running it failed; the message starts with the node's name, the
            cause is chained. The graph is then as it was.
        TypeError: an example that is no shape; more examples than placeholders.
        RuntimeError: the graph is not well-formed (`Graph.lint`), or what was run erased nodes of it.

    Example:
        >>> import pyconvbn
        >>> from pyconvbn import fx, nn
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval())
        >>> _ = fx.shape_prop(gm, (1, 3, 32, 32))
        >>> [node.meta["tensor_meta"].shape for node in gm.graph.nodes][-1]
        (1, 8, 30, 30)
    """
    gm.graph._verify()
    nodes = list(gm.graph.nodes)
    before = [(node, _core.op_tensor(node)) for node in nodes]
    work = _Propagation(gm, example_shapes)
    takers = sum(node.op == "placeholder" for node in nodes)
    if len(work.examples) > takers:
        raise TypeError(
            f"example_shapes: expected at most {takers} (the graph's placeholders), got {len(work.examples)}"
        )
    try:
        work.run(nodes)
        metas = [_describe(work.found[node]) for node in nodes]
        if any(node._erased for node in nodes):
            raise RuntimeError("gm: what shape_prop ran erased nodes of the graph")
    except BaseException:
        for node, tensor in before:
            if not node._erased:  # by what was run
                _core.op_set_tensor(node, tensor)
        raise
    for node, meta in zip(nodes, metas, strict=True):
        if meta is None:
            node.meta.pop("tensor_meta", None)
        else:
            node.meta["tensor_meta"] = meta
    return gm


class _CallableModule(types.ModuleType):
    """``fx.shape_prop`` names this module as soon as anybody has imported it, and is to be called all the same."""

    __call__ = staticmethod(shape_prop)


sys.modules[__name__].__class__ = _CallableModule
