# SPDX-License-Identifier: BSD-3-Clause
"""Reading a saved graph: nothing in the file is believed before it is checked, and nothing of it is executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, BinaryIO

from . import _core
from ._save_layers import restore_layer, restore_plan
from ._save_rules import FORMAT, JSON, VERSION, check_call, check_path, is_name
from ._save_values import TYPES, decode, function_of
from ._save_zip import read_array, read_bytes, read_index
from .freeze_report import FreezeReport
from .fx.graph import Graph
from .fx.graph_module import GraphModule, _child
from .fx.node import Node
from .fx.shape_prop import TensorMeta
from .nn.module import Module
from .nn.parameter import Parameter
from .report import FoldReport

__all__ = ["Loader"]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"{JSON} has a key twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{JSON} holds {text}")


def _is(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{what}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _keys(entry: Any, what: str, needed: str, optional: str = "") -> dict[str, Any]:
    found: dict[str, Any] = _is(entry, dict, what)
    missing, other = set(needed.split()) - found.keys(), found.keys() - {*needed.split(), *optional.split()}
    if missing or other:
        raise ValueError(f"{what}: {'missing' if missing else 'unknown'} key {min(missing or other)!r:.100}")
    return found


class Loader:
    """Makes a GraphModule from a file that may hold anything."""

    def __init__(self, file: BinaryIO) -> None:
        index = read_index(file)
        if JSON not in index:
            raise ValueError(f"it has no member {JSON!r}")
        text = read_bytes(file, index.pop(JSON)).decode("ascii")
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_no_constant)
        if type(found) is not dict or found.get("format") != FORMAT:
            raise ValueError("it is not a graph that pyconvbn saved")
        if type(found.get("version")) is not int or found["version"] != VERSION:
            raise ValueError(f"its format is of version {found.get('version')!r:.40}, this is version {VERSION}")
        names = "format version class_name training nodes attributes layers plans arrays report"
        self.json = _keys(found, JSON, names)
        self.arrays: dict[str, Any] = {}
        records = _is(self.json["arrays"], dict, "arrays")
        for name in [*records, *index]:
            if name not in records or name not in index:
                raise ValueError(f"the array {name!r:.100} is {'not listed' if name in index else 'missing'}")
        for name, member in index.items():
            self.arrays[name] = self._array(read_array(file, member), records[name], name)
        self.used: set[str] = set()

    @staticmethod
    def _array(array: Any, record: Any, name: str) -> Any:
        _keys(record, f"array {name!r}", "writeable", "axes requires_grad")
        if "axes" in record:
            axes = _is(record["axes"], list, "axes")
            if any(type(i) is not int for i in axes) or sorted(axes) != list(range(array.ndim)):
                raise ValueError(f"array {name!r}: the axes {str(axes)[:100]} are not those of the array")
            array = array.transpose([axes.index(i) for i in range(len(axes))])
        array.flags.writeable = True
        if "requires_grad" in record:
            array = Parameter(array, _is(record["requires_grad"], bool, "requires_grad"))
        array.flags.writeable = _is(record["writeable"], bool, "writeable")
        return array

    def _named(self, name: Any) -> Any:
        if type(name) is not str or name not in self.arrays:
            raise ValueError(f"there is no array {name!r:.100}")
        self.used.add(name)
        return self.arrays[name]

    def module(self) -> GraphModule:
        class_name = _is(self.json["class_name"], str, "class_name")
        training = _is(self.json["training"], bool, "training")
        root = Module()
        object.__setattr__(root, "training", training)
        self._attributes(root)
        graph = Graph()
        made: list[Node] = []
        taken: set[str] = set()
        for entry in _is(self.json["nodes"], list, "nodes"):
            where = f"node {len(made)}"
            if type(entry) is dict and type(entry.get("name")) is str:
                where = f"node {entry['name']!r:.100}"
            try:
                made.append(self._node(graph, entry, made, taken))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from error
        self._check_use(made)
        gm = GraphModule(root, graph, class_name)
        gm.graph.lint()
        report = self.json["report"]
        if report is not None:
            kind = FreezeReport if type(report) is dict and "folds" in report else FoldReport
            gm.__dict__["report"] = kind._from_dict(report)
        return gm

    def _check_use(self, made: list[Node]) -> None:
        outputs = [node for node in made if node.op == "output"]
        if len(outputs) > 1 or (outputs and outputs[0] is not made[-1]):
            raise ValueError("the output is not the last node, or there are several")
        targets = {str(node.target) for node in made if node.op in ("get_attr", "call_module")}
        idle = [*(self.json["attributes"].keys() - targets), *(self.arrays.keys() - self.used)]
        if idle:
            raise ValueError(f"nothing uses {min(idle)!r:.100}")

    def _attributes(self, root: Module) -> None:
        plans = [self._made("plan", i, restore_plan) for i in range(len(_is(self.json["plans"], list, "plans")))]

        def layer(values: dict[str, Any]) -> Module:
            at = values.get("plan")
            if at is None:
                return restore_layer(values)
            if type(at) is not int or not 0 <= at < len(plans):
                raise ValueError(f"there is no plan {at!r:.40}")
            idle.discard(at)
            return restore_layer({**values, "plan": plans[at]})

        idle = set(range(len(plans)))
        layers = [self._made("layer", i, layer) for i in range(len(_is(self.json["layers"], list, "layers")))]
        unused = set(range(len(layers)))
        attributes = _is(self.json["attributes"], dict, "attributes")
        for target, entry in attributes.items():
            *path, name = check_path(target).split(".")
            owner = root
            for i, part in enumerate(path):
                if ".".join(path[: i + 1]) in attributes:
                    raise ValueError(f"attribute {target!r:.100} is below another one")
                owner = _child(owner, part, root.training)
            _keys(entry, f"attribute {target!r:.100}", *(("layer",) if "layer" in entry else ("array kind",)))
            if "layer" in entry:
                if _is(entry["layer"], int, "layer") not in range(len(layers)):
                    raise ValueError(f"attribute {target!r:.100}: there is no layer {entry['layer']}")
                unused.discard(entry["layer"])
                owner.__dict__[name] = layers[entry["layer"]]
                owner._kinds[name] = "module"
                continue
            if entry["kind"] not in ("parameter", "buffer"):
                raise ValueError(f"attribute {target!r:.100}: there is no kind {entry['kind']!r:.100}")
            owner.__dict__[name] = self._named(entry["array"])
            owner._kinds[name] = entry["kind"]
        if idle or unused:
            raise ValueError("nothing uses one of the plans or layers")

    def _made(self, what: str, i: int, make: Callable[[dict[str, Any]], Any]) -> Any:
        """A plan or layer of the file, from its decoded state."""
        state = _is(self.json[f"{what}s"][i], dict, f"{what} {i}")
        try:
            return make({key: decode(value, self._no_node, self._named) for key, value in state.items()})
        except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
            raise ValueError(f"{what} {i}: {error}") from error

    @staticmethod
    def _no_node(position: int) -> Any:
        raise ValueError("a layer refers to a node")

    def _node(self, graph: Graph, entry: Any, made: list[Node], taken: set[str]) -> Node:
        _keys(entry, "node", "op name target", "args kwargs type tensor tensor_meta")

        def used(position: int) -> Node:
            if not 0 <= position < len(made):
                raise ValueError(f"it uses node {position}, which does not stand before it")
            return made[position]

        name = entry["name"]
        if not is_name(name) or name in taken:
            raise ValueError("its name is no identifier, or there is another one of that name")
        taken.add(name)
        args = tuple([decode(v, used, self._named) for v in _is(entry.get("args", []), list, "args")])
        kwargs: dict[str, Any] = {}
        for pair in _is(entry.get("kwargs", []), list, "kwargs"):
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or pair[0] in kwargs:
                raise ValueError("its keyword arguments are damaged")
            kwargs[pair[0]] = decode(pair[1], used, self._named)
        op, target = entry["op"], entry["target"]
        check_call(op, target, args, kwargs)
        if op in ("get_attr", "call_module"):
            attribute = self.json["attributes"].get(target)
            if attribute is None or ("layer" not in attribute and op == "call_module"):
                raise ValueError(f"there is no {'layer' if op == 'call_module' else 'array'} {target!r:.100}")
        if op == "call_function":
            target = function_of(_is(target, str, "target"))
        elif op == "output" and target != "output":
            raise ValueError("the target of an output is 'output'")
        node = graph.create_node(op, target, args, kwargs, name, _annotation(entry.get("type")))
        if node.name != name:
            node.name = name
        if "tensor" in entry:
            shape, char, size = _is(entry["tensor"], list, "tensor")
            if char not in ("b", "i", "u", "f", "c") or type(size) is not int or not 1 <= size <= 16:
                raise ValueError("its shape is damaged")
            _core.op_set_tensor(node, (_shape(shape), char, size))
        if "tensor_meta" in entry:
            shape, text = _is(entry["tensor_meta"], list, "tensor_meta")
            node.meta["tensor_meta"] = TensorMeta(_shape(shape), decode({"dtype": text}, used, self._named))
        return node


def _annotation(found: Any) -> Any:
    """A type of the table, or the text of an annotation, in a list of one."""
    if type(found) is list and len(found) == 1 and type(found[0]) is str:
        return found[0]
    if found is not None and (type(found) is not str or found not in TYPES):
        raise ValueError(f"there is no type {str(found)[:100]!r}")
    return None if found is None else TYPES[found]


def _shape(found: Any) -> tuple[int, ...]:
    """Sizes whose product the graph can count with."""
    size = 1
    for n in _is(found, list, "shape"):
        if type(n) is not int or n < 0 or len(found) > 32:
            raise ValueError("its shape is damaged")
        size *= max(n, 1)
        if size >= 1 << 48:
            raise ValueError("its shape is too large")
    return tuple(found)
