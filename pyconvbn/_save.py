# SPDX-License-Identifier: BSD-3-Clause
"""`save` and `load`: a frozen graph as one file, which `numpy.load` can read too and which runs no code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from . import _core
from ._save_layers import layer_state, plan_state
from ._save_read import Loader
from ._save_rules import FORMAT, JSON, VERSION, check_call, check_path, is_name
from ._save_values import TYPES, Unsupported, encode, function_name, function_of, is_plain_dtype
from ._save_zip import npy_header, write_zip
from .freeze_report import FreezeReport
from .fx.graph_module import GraphModule, resolve
from .fx.node import Node
from .fx.shape_prop import TensorMeta
from .nn.module import Module
from .nn.parameter import Parameter
from .plan import Plan
from .report import FoldReport

__all__ = ["load", "save"]

_TYPE_NAMES = {id(kind): name for name, kind in TYPES.items()}
_ROWS = "method."


# -- saving ------------------------------------------------------------------------------------------------------------
class _Saver:
    """Everything about a GraphModule as JSON and arrays; TypeError naming what cannot be saved."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.arrays: dict[str, Any] = {}  # member -> C-contiguous array
        self.records: dict[str, dict[str, Any]] = {}
        self.names: dict[int, str] = {}  # id of an array -> member
        self.alive: list[Any] = []
        self.layers: list[Any] = []
        self.plans: list[Any] = []
        self.ids: dict[int, int] = {}  # id of a layer or plan -> its position
        self.positions = {node: i for i, node in enumerate(gm.graph.nodes)}

    def everything(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        nodes = []
        for i, node in enumerate(self.positions):
            try:
                if node.op in ("get_attr", "call_module"):
                    attributes[node.target] = self._attribute(node)
                nodes.append(self._node(node, i))
            except (Unsupported, ValueError) as error:
                raise TypeError(f"node {node.name!r} cannot be saved: {error}") from None
        paths = sorted(attributes)
        for path, after in zip(paths, paths[1:]):
            if after.startswith(f"{path}."):
                raise TypeError(f"{path!r} and its part {after!r} are both used by nodes, which cannot be saved")
        self._check_overlaps()
        report = self.gm.__dict__.get("report")
        return {
            "format": FORMAT, "version": VERSION, "class_name": self.gm.class_name, "training": self.gm.training,
            "nodes": nodes, "attributes": attributes, "layers": self.layers, "plans": self.plans,
            "arrays": self.records,
            "report": report.to_dict() if type(report) in (FreezeReport, FoldReport) else None,
        }

    def _check_overlaps(self) -> None:
        """Arrays that share memory would not share it any more, which matters where one is written."""
        from ._erased import _extent

        extents = sorted((*_extent(a), i) for i, a in enumerate(self.alive) if a.size)
        end, last = -1, -1
        for low, high, i in extents:
            if low < end and (self.alive[i].flags.writeable or self.alive[last].flags.writeable):
                a, b = (self.names[id(self.alive[k])].removesuffix(".npy") for k in (last, i))
                raise TypeError(f"the arrays {a!r} and {b!r} share memory and are not read-only, which cannot be saved")
            if high > end:
                end, last = high, i

    def _array(self, array: Any, wanted: str) -> str:
        """The member that holds `array`."""
        if id(array) in self.names:
            return self.names[id(array)]
        if type(array) not in (np.ndarray, Parameter):
            raise Unsupported(f"an array of class {type(array).__name__} cannot be saved")
        if not is_plain_dtype(array.dtype):
            raise Unsupported(f"an array of dtype {array.dtype} cannot be saved")
        base = re.sub(r"[^A-Za-z0-9_.-]", "_", wanted)[:200].lstrip(".-") or "array"
        name, n = f"{base}.npy", 0
        while name in self.arrays or name == JSON:
            n += 1
            name = f"{base}-{n}.npy"
        # From the axis with the longest stride to that with the shortest: C-contiguous in this order.
        axes = sorted(range(array.ndim), key=lambda i: -abs(array.strides[i]))
        record: dict[str, Any] = {"writeable": bool(array.flags.writeable)}
        if axes != list(range(array.ndim)) and not array.flags.c_contiguous:
            record["axes"] = axes
        else:
            axes = list(range(array.ndim))
        if type(array) is Parameter:
            record["requires_grad"] = bool(array.requires_grad)
        self.arrays[name] = np.ascontiguousarray(np.transpose(array.view(np.ndarray), axes)).reshape(
            [array.shape[i] for i in axes]
        )
        self.records[name] = record
        self.names[id(array)] = name
        self.alive.append(array)
        return name

    def _attribute(self, node: Node) -> dict[str, Any]:
        """What a get_attr or call_module node finds."""
        target = check_path(node.target)
        path, _, name = target.rpartition(".")
        owner = resolve(self.gm, path) if path else self.gm
        found = resolve(owner, name)
        if isinstance(found, np.ndarray) and node.op == "get_attr":
            kind = owner._kinds.get(name) if isinstance(owner, Module) else None
            return {"array": self._array(found, target), "kind": kind or "buffer"}
        if not isinstance(found, Module):
            raise Unsupported(f"what it reads is {_a(type(found))}, and only arrays and layers can be saved")
        if id(found) not in self.ids:
            state = layer_state(found)
            plan = state.get("plan")
            if isinstance(plan, Plan):
                if id(plan) not in self.ids:  # layers may share one
                    self.ids[id(plan)] = len(self.plans)
                    self.plans.append(self._state(plan_state(plan), target))
                state["plan"] = self.ids[id(plan)]
            self.ids[id(found)] = len(self.layers)
            self.layers.append(self._state(state, target))
        return {"layer": self.ids[id(found)]}

    def _state(self, values: dict[str, Any], target: str) -> dict[str, Any]:
        return {
            key: encode(value, self._no_node, lambda array, key=key: self._array(array, f"{target}.{key.lstrip('.')}"))
            for key, value in values.items()
        }

    @staticmethod
    def _no_node(node: Any) -> int:
        raise Unsupported("a module holds a node")

    def _node(self, node: Node, i: int) -> dict[str, Any]:
        def position(used: Any) -> int:
            at = self.positions.get(used, i)
            if at >= i:
                raise Unsupported(f"its input {used.name} does not stand before it")
            return at

        if not is_name(node.name):
            raise Unsupported("its name is no plain identifier")
        literals = 0

        def array(value: Any) -> str:
            nonlocal literals
            literals += 1
            return self._array(value, f"{node.name}.{literals - 1}")

        target = node.target
        if node.op == "call_function":
            target = function_name(target)
            function_of(target)
        check_call(node.op, target, node.args, node.kwargs)
        entry: dict[str, Any] = {"op": node.op, "name": node.name, "target": target}
        if node.args:
            entry["args"] = [encode(value, position, array) for value in node.args]
        if node.kwargs:
            entry["kwargs"] = [[key, encode(value, position, array)] for key, value in node.kwargs.items()]
        if id(node.type) in _TYPE_NAMES:
            entry["type"] = _TYPE_NAMES[id(node.type)]
        elif type(node.type) is str:
            entry["type"] = [node.type]
        tensor = _core.op_tensor(node)
        if tensor is not None:
            entry["tensor"] = [list(tensor[0]), tensor[1], tensor[2]]
        meta = node.meta.get("tensor_meta")
        if type(meta) is TensorMeta and is_plain_dtype(np.dtype(meta.dtype)):
            entry["tensor_meta"] = [list(meta.shape), np.dtype(meta.dtype).str]
        return entry


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A new file that becomes `path` if all goes well; else `path` is what it was."""
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"


def _path(path: Any) -> str:
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path: expected a str or os.PathLike of str, got {type(path).__name__}")
    return name


def save(gm: GraphModule, path: str | os.PathLike[str]) -> None:
    """Writes a frozen graph to one file, from which `load` makes it again.

    The file is a zip as `numpy.savez` makes it: `graph.json`, and each array (constants, weights and biases of the
    prepared layers) as a member that `numpy.load(path, allow_pickle=False)` can read. It takes any GraphModule whose
    nodes are operators of the op table, calls of layers of `pyconvbn.nn` and reads of arrays, frozen or not. Arguments,
    shapes, constants with their memory layout, and `report` are kept; other metadata is not. The same
    graph gives the same bytes.

    Args:
        gm: the graph, as `freeze` returns it.
        path: the file; replaced when everything is written, so that a failure leaves what was there.

    Raises:
        TypeError: something in the graph has no place in a file (a module of another class or with hooks, a function
            that is no operator, an object as argument); the message names the node. Nothing is written.
        OSError: the file cannot be written.
        RuntimeError: the graph is not well-formed (`Graph.lint`).

    >>> import os, tempfile
    >>> import numpy as np
    >>> import pyconvbn
    >>> from pyconvbn import fx, functional as F
    >>> gm = fx.symbolic_trace(lambda x: F.relu(x + 1.5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pyconvbn.save(gm, os.path.join(folder, "net.npz"))
    ...     again = pyconvbn.load(os.path.join(folder, "net.npz"))
    >>> again(np.array([-2.0, 1.0]))
    array([0. , 2.5])
    """
    if not isinstance(gm, GraphModule):
        raise TypeError(f"gm: expected a GraphModule, got {type(gm).__name__}")
    name = _path(path)
    gm.graph.lint()
    saver = _Saver(gm)
    text = json.dumps(saver.everything(), allow_nan=False, separators=(",", ":")).encode("ascii")
    members: list[tuple[str, list[Any]]] = [(JSON, [text])]
    for member, array in saver.arrays.items():
        members.append((member, [npy_header(array), array.reshape(-1).view(np.uint8)]))
    with _replacing(name) as file:
        write_zip(file, members)


# -- loading -----------------------------------------------------------------------------------------------------------
def load(path: str | os.PathLike[str]) -> GraphModule:
    """The GraphModule that `save` wrote to a file.

    It computes the same bits as the saved one on the same machine and version; prepared layers are packed again for
    this machine. Nothing in the file is executed or imported by name: operators are looked up in the op table. A file
    from somebody else can therefore compute anything with its inputs, but not act on the machine.

    Args:
        path: the file.

    Raises:
        ValueError: the file is damaged, or is not what `save` writes; the message says what is wrong.
        OSError: the file cannot be read.
    """
    name = _path(path)
    with open(name, "rb") as file:
        try:
            return Loader(file).module()
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"path: {name!r} cannot be loaded: {error}") from error
