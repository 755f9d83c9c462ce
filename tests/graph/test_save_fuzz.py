# SPDX-License-Identifier: BSD-3-Clause
"""Damaged and hostile files: `load` raises ValueError naming the file, or gives a well-formed graph; nothing else."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import fx, nn
from pyconvbn._save_zip import npy_header, write_zip
from pyconvbn.freeze_report import FreezeReport, FreezeRow
from pyconvbn.report import FoldReport, FoldRow


def small() -> fx.GraphModule:
    """Operators, constants, a prepared layer, a report."""
    weight = np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1)

    def function(x: Any, scale: float = 2.0) -> Any:
        y = F.relu(F.conv2d(x, weight)) * scale + np.array([[[1.0]], [[-0.0]]], np.float32)
        return {"y": y.reshape(1, -1)[:, ::2], "shape": y.shape}

    gm = fx.symbolic_trace(function)
    first = next(node for node in gm.graph.nodes if node.name == "scale")
    plan = pyconvbn.Plan(np.eye(4, dtype=np.float32)[..., None, None], np.ones(4, np.float32))
    gm.add_submodule("layer", nn.FrozenLayer(plan))
    with gm.graph.inserting_after(first):
        called = gm.graph.call_module("layer", (next(iter(gm.graph.nodes)),))
    gm.graph.find_nodes(op="call_function")[0].update_arg(0, called)
    fx.shape_prop(gm, np.ones((1, 4, 2, 2), np.float32), 2.0)
    gm.__dict__["report"] = FreezeReport(
        [FreezeRow("cse", "a", "done", "OK", into="b")], FoldReport([FoldRow("bn", None, "folded", "OK", new_node="c")])
    )
    return gm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "net.npz"
    pyconvbn.save(small(), path)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], Any]:
    path = tmp_path / "net.npz"

    def loading(data: bytes) -> Any:
        """The graph, or None if it was refused as it should be."""
        path.write_bytes(data)
        try:
            gm = pyconvbn.load(path)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith(f"path: {str(path)!r} cannot be loaded: "), error
            return None
        gm.graph.lint()
        assert isinstance(str(gm), str) and isinstance(gm.code, str)
        return gm

    return loading


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def packed(members: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    """A file whose headers and CRCs are right, whatever is in it."""
    file = io.BytesIO()
    write_zip(file, [(name, [data]) for name, data in (members.items() if isinstance(members, dict) else members)])
    return file.getvalue()


def with_json(saved: bytes, change: Callable[[Any], Any]) -> bytes:
    members = members_of(saved)
    found = json.loads(members["graph.json"])
    result = change(found)
    members["graph.json"] = json.dumps(found if result is None else result).encode()
    return packed(members)


def test_the_untouched_file_loads(saved: bytes, load: Callable[[bytes], Any]) -> None:
    assert load(saved) is not None and packed(members_of(saved)) == saved


def test_cut_off_anywhere(saved: bytes, load: Callable[[bytes], Any]) -> None:
    rng = random.Random(0)
    ends = {*range(120), *range(len(saved) - 120, len(saved)), *rng.sample(range(len(saved)), 200)}
    for end in sorted(ends):
        assert load(saved[:end]) is None, end
    assert load(saved + b"\0") is None and load(b"\0" + saved) is None and load(saved * 2) is None


def test_no_bit_can_be_flipped(saved: bytes, load: Callable[[bytes], Any]) -> None:
    rng = random.Random(1)
    for at in sorted(rng.sample(range(len(saved)), 400)):
        data = bytearray(saved)
        data[at] ^= 1 << rng.randrange(8)
        assert load(bytes(data)) is None, at


def test_random_damage(saved: bytes, load: Callable[[bytes], Any]) -> None:
    rng = random.Random(2)
    for _ in range(200):
        data = bytearray(saved)
        a, b = sorted(rng.sample(range(len(data)), 2))
        b = min(b, a + 200)
        c = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            del data[a:b]
        elif kind == 1:
            data[a:a] = data[c : c + b - a]
        elif kind == 2:
            data[a:b] = bytes(rng.randrange(256) for _ in range(b - a))
        else:
            data[a:b] = bytes(b - a)
        assert bytes(data) == saved or load(bytes(data)) is None


# -- well-formed zips with something else in them --------------------------------------------------------------------
def test_other_files(load: Callable[[bytes], Any], tmp_path: Path) -> None:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    other = io.BytesIO()
    np.save(other, np.zeros(3))
    for data in (b"", b"PK", b"PK\3\4", b"PK\5\6" + bytes(18), b"hello" * 100, bytes(5000), file.getvalue(),
                 other.getvalue(), pickle.dumps({"a": 1}), packed({}), packed({"a.npy": other.getvalue()})):
        assert load(data) is None


def test_zips_of_other_makers(saved: bytes, load: Callable[[bytes], Any]) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as target:
            for name, data in members_of(saved).items():
                target.writestr(name, data)
        assert load(file.getvalue()) is None


def test_a_compressed_bomb_is_not_unpacked(load: Callable[[bytes], Any]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("graph.json", b" " * 50_000_000)
    assert load(file.getvalue()) is None


def test_members(saved: bytes, load: Callable[[bytes], Any]) -> None:
    members = members_of(saved)
    pairs = list(members.items())
    arrays = [name for name in members if name != "graph.json"]
    assert len(arrays) == 4 and arrays[1].startswith("layer.") and not arrays[2].startswith("layer.")
    for name in members:
        assert load(packed({k: v for k, v in members.items() if k != name})) is None  # one is missing
    assert load(packed([*pairs, pairs[-1]])) is None  # one is there twice
    assert load(packed({**members, "more.npy": members[arrays[0]]})) is None  # one that nobody asked for
    assert load(packed({**members, arrays[2]: members[arrays[3]]})) is not None  # another array is another graph
    assert load(packed({**members, arrays[0]: b""})) is None
    assert load(packed({**members, arrays[0]: members["graph.json"]})) is None


def test_a_size_is_not_believed(saved: bytes, load: Callable[[bytes], Any]) -> None:
    """The sizes in the headers, consistently changed, reach beyond the file or into other members."""
    members = members_of(saved)
    size = struct.pack("<Q", len(members["graph.json"]))
    assert saved.count(size) >= 4
    for wrong in (0, 1, len(saved), 1 << 40, (1 << 64) - 1):
        assert load(saved.replace(size, struct.pack("<Q", wrong))) is None


NPY = npy_header(np.zeros((2, 4, 1, 1), np.float32))


@pytest.mark.parametrize("header", [
    NPY.replace(b"(2, 4, 1, 1)", b"(2, 4, 1, 2)"), NPY.replace(b"(2, 4, 1, 1)", b"(9999999999,)"),
    NPY.replace(b"(2, 4, 1, 1), }", b"(0, 999999999999999999), }"), NPY.replace(b"(2, 4, 1, 1)", b"(-2, -4, 1,)"),
    NPY.replace(b"(2, 4, 1, 1)", b"(2, 4, 01,1)"), NPY.replace(b"'<f4'", b"'|O4'"), NPY.replace(b"'<f4'", b"'|O8'"),
    NPY.replace(b"'<f4'", b"'|V4'"), NPY.replace(b"'<f4'", b"'|S4'"), NPY.replace(b"'<f4'", b"'<U1'"),
    NPY.replace(b"'<f4'", b"'<m4'"), NPY.replace(b"'<f4'", b"'<f3'"), NPY.replace(b"'<f4'", b"'|f4'"),
    NPY.replace(b"'<f4'", b"'<f8'"), NPY.replace(b"'<f4'", b"'|b4'"), NPY.replace(b"False", b"True "),
    NPY.replace(b"\x01\x00", b"\x02\x00", 1), NPY.replace(b"NUMPY", b"NUMPX"), NPY[:9], NPY[:40], b"",
    NPY.replace(b"(2, 4, 1, 1)", b"[2, 4, 1, 1]"), NPY.replace(b"\n", b" "),
    NPY.replace(b"\x76\x00", b"\xff\xff", 1), NPY.replace(b"{'descr'", b"{'Descr'"),
])
def test_array_headers(saved: bytes, load: Callable[[bytes], Any], header: bytes) -> None:
    members = members_of(saved)
    name = next(name for name, data in members.items() if data.startswith(NPY))
    assert load(packed({**members, name: header + members[name][len(NPY) :]})) is None


def test_a_bool_that_is_none(tmp_path: Path, load: Callable[[bytes], Any]) -> None:
    graph = fx.Graph()
    graph.output(graph.get_attr("a"))
    pyconvbn.save(fx.GraphModule({"a": np.array([True, False])}, graph), tmp_path / "a")
    members = members_of((tmp_path / "a").read_bytes())
    assert load(packed(members)) is not None
    members["a.npy"] = members["a.npy"][:-1] + b"\2"
    assert load(packed(members)) is None


# -- the JSON text ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [
    b"", b"[]", b"null", b"{}", b"\xff\xfe", b'{"format": "pyconvbn.graph"}', b"[" * 100_000, b"{" * 5, b"1" * 5000,
    b'{"format": NaN}', b'{"format": 1.5}', b'{"format": "pyconvbn.graph", "format": "pyconvbn.graph"}',
    b'{"format": "pyconvbn.graph", "version": true}', b'{"format": "pyconvbn.graph", "version": 2}',
    '{"format": "\u00fc"}'.encode(), b'{"a":' * 5000 + b"1" + b"}" * 5000,
])
def test_other_texts(saved: bytes, load: Callable[[bytes], Any], text: bytes) -> None:
    assert load(packed({**members_of(saved), "graph.json": text})) is None


def test_a_newer_version_says_so(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(with_json(saved, lambda j: j.update(version=2)))
    with pytest.raises(ValueError, match="its format is of version 2, this is version 1"):
        pyconvbn.load(tmp_path / "a")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("plain") / "net.npz"
    pyconvbn.save(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())), path)
    return path.read_bytes()


@pytest.mark.parametrize("change", [
    {"class": "Module"}, {"class": "Sequential"}, {"class": "os"}, {"class": None}, {"class": ["Conv2d"]},
    {"class": "FrozenLayer"}, {"class": "Parameter"}, {"training": 1}, {"kinds": []}, {"temporary": {}},
    {"temporary": ["nope"]}, {".forward": 1}, {".forward": {"class": "float"}}, {".stride": {"class": "float"}},
    {".__class__": 1}, {"._hooked": True}, {"._forward_hooks": {"dict": []}}, {".extra_repr": 1}, {".a b": 1},
    {"stride": 1},
    {".stride": {"dict": []}}, {".weight": 5}, {".weight": "x"}, {"kinds": {"dict": [["weight", "module"]]}},
    {"kinds": {"dict": [["nope", "buffer"]]}}, {"kinds": {"dict": [[1, "buffer"]]}}, {"plan": 0},
    {".bias": {"node": 0}},
])
def test_layers_that_are_none(plain: bytes, load: Callable[[bytes], Any], change: dict[str, Any]) -> None:
    assert load(plain) is not None
    assert load(with_json(plain, lambda j: j["layers"][0].update(change))) is None


def node(name: str) -> Callable[[Any], Any]:
    return lambda j: next(n for n in j["nodes"] if n["name"] == name)


def set_node(which: str, /, **fields: Any) -> Callable[[Any], None]:
    return lambda j: node(which)(j).update(fields)


def new_nodes(*nodes: Any) -> Callable[[Any], None]:
    def change(j: Any) -> None:
        j["nodes"][-1:-1] = nodes

    return change


def call(target: Any, *args: Any, op: str = "call_function", **kwargs: Any) -> dict[str, Any]:
    keywords = [[key, value] for key, value in kwargs.items()]
    return {"op": op, "name": "new", "target": target, "args": list(args), "kwargs": keywords}


def set_param(i: int, value: Any) -> Callable[[Any], None]:
    return lambda j: j["plans"][0]["params"]["dict"][i].__setitem__(1, value)


BAD: list[Callable[[Any], Any]] = [
    # code by name
    new_nodes(call("os.system", "true")), new_nodes(call("builtins.eval", "1")), new_nodes(call("builtins.exec", "1")),
    new_nodes(call("builtins.__import__", "os")), new_nodes(call("operator.attrgetter", "a")),
    new_nodes(call("operator.methodcaller", "a")), new_nodes(call("operator.call", {"node": 0})),
    new_nodes(call("aten.__class__.default")), new_nodes(call("functional.np")), new_nodes(call("functional._core")),
    new_nodes(call("method.view", {"node": 0})), new_nodes(call("efficient_conv_bn_eval.__globals__")),
    new_nodes(call("", 1)), new_nodes(call(None)), new_nodes(call(["a"])), new_nodes(call(5)),
    new_nodes(call("builtins.getattr", {"node": 0}, "__class__")), new_nodes(call("builtins.getattr", {"node": 0})),
    new_nodes(call("builtins.getattr", {"node": 0}, {"node": 0})),
    new_nodes(call("builtins.getattr", {"node": 0}, "shape", 1)),
    new_nodes(call("builtins.getattr", {"node": 0}, "ctypes")),
    new_nodes(call("tofile", {"node": 0}, "/tmp/x", op="call_method")), new_nodes(call("__reduce__", op="call_method")),
    new_nodes(call("forward", op="call_module")), new_nodes(call("graph", op="get_attr")),
    new_nodes(call("__class__", op="get_attr")), new_nodes(call("a.__dict__", op="get_attr")),
    new_nodes(call("nope", op="get_attr")), new_nodes(call("nope", op="call_module")), new_nodes(call("x", op="root")),
    new_nodes(call("x\n    import os", op="placeholder")), new_nodes(call("***x", op="placeholder")),
    new_nodes(call("import", op="placeholder")),
    set_node("relu", name="x; import os"), set_node("relu", name="x\n"), set_node("relu", name=""),
    set_node("relu", name="class"), set_node("relu", name="\u00e4"), set_node("relu", name=3),
    set_node("relu", name="x"),
    set_node("relu", type="os.system"), set_node("relu", type={"a": 1}), set_node("relu", type=[1]),
    # node references
    set_node("relu", args=[{"node": 99}]), set_node("relu", args=[{"node": -1}]),
    lambda j: node("relu")(j).update(args=[{"node": j["nodes"].index(node("relu")(j))}]),
    set_node("relu", args=[{"node": True}]), set_node("relu", args=[{"node": 1.5}]),
    set_node("relu", args=[{"node": "0"}]),
    set_node("relu", args=[{"node": 10**30}]), set_node("relu", args={"node": 0}), set_node("relu", args=None),
    lambda j: j["nodes"].reverse(), lambda j: j["nodes"].append(j["nodes"][-1]),
    lambda j: j["nodes"].insert(0, j["nodes"].pop()), lambda j: j["nodes"].append({}),
    lambda j: j["nodes"].append(None),
    # values
    *(set_node("relu", kwargs=[["x", value]]) for value in (
        {"float": "1"}, {"float": 1}, {"float": "0x1p99999"}, {"float": "nan"}, {"float": "nan:0000000000000000"},
        {"float": "nan:7ff8"}, {"float": "9" * 1000}, {"complex": ["inf"]}, {"slice": [1, 2]}, {"tuple": {"a": 1}},
        {"dict": [[1]]}, {"dict": [[[1], 2]]}, {"dict": [[1, 2], [True, 3]]}, {"dict": [[{"node": 0}, 1]]}, {"dict": 1},
        {"dtype": "O"}, {"dtype": "|O"}, {"dtype": "|O8"}, {"dtype": "<f3"}, {"dtype": "f4,f4"}, {"dtype": "|S5"},
        {"dtype": 3}, {"class": "os.system"}, {"class": "object"}, {"class": ["int"]}, {"scalar": ["float32", "00"]},
        {"scalar": ["object", "00" * 8]}, {"scalar": ["bool", "02"]}, {"scalar": ["float32", "zz"]},
        {"array": "graph.json"},
        {"array": "../x"}, {"array": ["a"]}, {"ellipsis": False}, {"other": 1}, {}, {"node": 0, "float": "inf"},
        {"tuple": None}, {"layer": 0},
    )),
    set_node("relu", kwargs=[["x"]]), set_node("relu", kwargs=[[1, 2]]), set_node("relu", kwargs={"x": 1}),
    set_node("relu", kwargs=[["x", 1], ["x", 2]]), set_node("relu", other=1), lambda j: node("relu")(j).pop("op"),
    # shapes
    set_node("relu", tensor=[[1, -1], "f", 4]), set_node("relu", tensor=[[1 << 60, 1 << 60], "f", 4]),
    set_node("relu", tensor=[[1.5], "f", 4]), set_node("relu", tensor=[[1], "O", 8]),
    set_node("relu", tensor=[[1], "f"]),
    set_node("relu", tensor=[[1], "f", 0]), set_node("relu", tensor=5), set_node("relu", tensor=[[1] * 100, "f", 4]),
    set_node("relu", tensor_meta=[[1], "O"]), set_node("relu", tensor_meta=[[True], "<f4"]),
    set_node("relu", tensor_meta=[["1"], "<f4"]),
    # what belongs together
    lambda j: j["attributes"].clear(), lambda j: j["attributes"].update(more=next(iter(j["attributes"].values()))),
    lambda j: next(iter(j["attributes"].values())).update(array="nope"),
    lambda j: next(iter(j["attributes"].values())).update(kind="module"),
    lambda j: next(iter(j["attributes"].values())).update(kind=[]),
    lambda j: j["attributes"].update(layer={"array": "layer.weight.npy", "kind": "buffer"}),
    lambda j: j["attributes"].update(_tensor_constant0={"layer": 0}),
    lambda j: j["attributes"].update(layer={"layer": -1}), lambda j: j["attributes"].update(layer={"layer": True}),
    lambda j: j["arrays"].clear(), lambda j: next(iter(j["arrays"].values())).update(axes=[1]),
    lambda j: next(iter(j["arrays"].values())).update(axes=[0, 0, 1, 2]),
    lambda j: next(iter(j["arrays"].values())).update(axes=[0, 1, 2, True]),
    lambda j: next(iter(j["arrays"].values())).update(writeable=1),
    lambda j: next(iter(j["arrays"].values())).update(requires_grad="yes"),
    lambda j: j.update(layers=[{}]), lambda j: j.update(plans=[{}]),
    lambda j: j.update(layers={}), lambda j: j.update(plans=None), lambda j: j["plans"].append(j["plans"][0]),
    lambda j: j["layers"].append(j["layers"][0]), lambda j: j["layers"].clear(),
    *(lambda j, change=change: j["layers"][0].update(change) for change in (
        {"plan": 1}, {"plan": -1}, {"plan": True}, {"plan": None}, {"kind": "other"}, {"kind": 1}, {"residual": 1},
        {"input_shape": [1, 2]}, {"input_shape": {"tuple": [-1]}}, {"input_shape": {"tuple": [True]}}, {"more": 1},
        {"input_shape": {"tuple": [1 << 40]}},
    )),
    *(lambda j, change=change: j["plans"][0].update(change) for change in (
        {"weight": 1}, {"weight": {"array": "layer.bias.npy"}}, {"bias": {"array": "layer.weight.npy"}}, {"bias": None},
        {"params": {"dict": []}}, {"params": 1}, {"input_shape": {"tuple": [1 << 40]}}, {"input_shape": 5},
        {"input_shape": {"tuple": [1, 3, 8, 8]}}, {"choices": []}, {"choices": {"dict": [[{"tuple": [8]}, "direct"]]}},
        {"choices": {"dict": [["a", "direct"]]}}, {"choices": {"dict": [[{"tuple": [8, 8]}, 5]]}}, {"more": 1},
    )),
    *(set_param(i, value) for i in range(9) for value in (
        "nope", 1 << 62, {"tuple": [1 << 62, 1]}, {"tuple": [-1, 1]}, {"float": "0x1.0p+0"}, {"node": 0}, {"tuple": []},
    )), lambda j: j.update(nodes={}), lambda j: j.update(arrays=[]),
    lambda j: j.update(class_name=5), lambda j: j.update(training="no"), lambda j: j.update(more=1),
    lambda j: j.pop("report") and None, lambda j: j.update(report=[]), lambda j: j.update(report={"rows": 5}),
    lambda j: j["report"]["rows"][0].update(step=5), lambda j: j["report"]["folds"]["rows"][0].update(outcome="frozen"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_each_wrong_text(saved: bytes, load: Callable[[bytes], Any], i: int) -> None:
    assert load(with_json(saved, BAD[i])) is None


def test_good_changes_are_not_refused(saved: bytes, load: Callable[[bytes], Any]) -> None:
    assert load(with_json(saved, new_nodes(call("aten.relu.default", {"node": 0})))) is not None
    assert load(with_json(saved, new_nodes(call("builtins.getattr", {"node": 0}, "shape")))) is not None
    assert load(with_json(saved, new_nodes(call("sum", {"node": 0}, op="call_method")))) is not None
    assert load(with_json(saved, set_node("relu", kwargs=[["x", {"float": "-0x0.0p+0"}]]))) is not None


def test_deep_values(saved: bytes, load: Callable[[bytes], Any]) -> None:
    value: Any = 1
    for _ in range(400):
        value = [value]
    assert load(with_json(saved, set_node("relu", kwargs=[["x", value]]))) is None


def test_nothing_from_a_file_reaches_a_page_unescaped(saved: bytes, load: Callable[[bytes], Any]) -> None:
    bad = "<script>alert(1)</script>"
    gm = load(with_json(saved, lambda j: (
        j.update(class_name=bad), set_node("relu", kwargs=[["inplace", bad]], type=[bad])(j),
        j["report"]["rows"][0].update(node=bad, hint=bad), None,
    )[-1]))
    assert bad in gm.code + str(gm.graph) + gm.class_name
    assert "<script>" not in gm._repr_html_() + gm.report._repr_html_() + gm.graph._repr_html_()


def spots(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += spots(item, (*path, key))
    return found


def mutated(found: Any, rng: random.Random) -> Any:
    """The same with one to three places changed."""
    result = copy.deepcopy(found)
    for _ in range(rng.randrange(1, 4)):
        places = [path for path in spots(result) if path]
        if not places:
            break
        path = rng.choice(places)
        owner = result
        for key in path[:-1]:
            owner = owner[key]
        kind = rng.randrange(5)
        if kind == 0:
            del owner[path[-1]]
        elif kind == 1:
            donor = result
            for key in rng.choice(places):
                donor = donor[key]
            owner[path[-1]] = copy.deepcopy(donor)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(path[-1], copy.deepcopy(owner[path[-1]]))
        elif kind == 3 and isinstance(owner, list):
            rng.shuffle(owner)
        else:
            owner[path[-1]] = rng.choice([
                None, True, 0, -1, 1, 7, 1 << 31, 1 << 63, -(1 << 70), 10**100, "", "x", "__class__", "a.b", [], {},
                [[]], {"node": 1}, {"float": "inf"}, {"tuple": []}, {"array": "x"}, {"slice": [None] * 3},
                "call_method", "get_attr", "output", "operator.setitem", "aten.conv2d.default", "method.sum", "\ud800",
                "\0",
            ])
    return result


@pytest.mark.parametrize("which", ["saved", "plain"])
def test_random_texts(which: str, load: Callable[[bytes], Any], request: pytest.FixtureRequest) -> None:
    members = members_of(request.getfixturevalue(which))
    found = json.loads(members["graph.json"])
    rng = random.Random(int(os.environ.get("PYCONVBN_FUZZ_SEED", "3")))
    loaded = 0
    for _ in range(int(os.environ.get("PYCONVBN_FUZZ_COUNT", "200"))):
        text = json.dumps(mutated(found, rng)).encode()
        loaded += load(packed({**members, "graph.json": text})) is not None
    assert loaded  # some changes make another good graph
