# SPDX-License-Identifier: BSD-3-Clause
"""save and load: the same graph comes back, bit for bit, and what cannot be saved says so before a file is touched."""

from __future__ import annotations

import json
import math
import operator
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn
from pyconvbn._save_values import decode, encode
from pyconvbn.freeze_report import FreezeReport, FreezeRow
from pyconvbn.report import FoldReport, FoldRow

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import randomise  # noqa: E402
from save_util import X, net, same_bits, there_and_back  # noqa: E402


def aten() -> fx.GraphModule:
    return fx.to_aten(fx.symbolic_trace(net()))


# -- what comes back -------------------------------------------------------------------------------------------------
def test_a_network_of_operators(tmp_path: Path) -> None:
    gm = fx.shape_prop(aten(), X)
    again = there_and_back(gm, tmp_path)
    assert same_bits(again(X), gm(X)) and not again.training and again.class_name == gm.class_name
    for old, new in zip(gm.graph.nodes, again.graph.nodes, strict=True):
        assert (old.name, old.op, old.target, old.type) == (new.name, new.op, new.target, new.type)
        assert old.meta.get("tensor_meta") == new.meta.get("tensor_meta")
        assert _core.op_tensor(old) == _core.op_tensor(new)
    assert dict(again.named_buffers()).keys() == dict(gm.named_buffers()).keys()
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in gm.named_parameters()]


def test_numpy_reads_the_arrays_without_pickle(tmp_path: Path) -> None:
    gm = aten()
    path = tmp_path / "net.npz"
    pyconvbn.save(gm, path)
    with np.load(path, allow_pickle=False) as file:
        for name, array in [*gm.named_parameters(), *gm.named_buffers()]:
            if name in file.files:
                assert same_bits(file[name], np.asarray(array))
        assert "0.weight" in file.files and json.loads(file["graph.json"])["format"] == "pyconvbn.graph"
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_the_same_graph_makes_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        pyconvbn.save(aten(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_kinds_of_paths(tmp_path: Path) -> None:
    pyconvbn.save(aten(), str(tmp_path / "a"))
    pyconvbn.save(aten(), tmp_path / "a")
    assert same_bits(pyconvbn.load(str(tmp_path / "a"))(X), pyconvbn.load(tmp_path / "a")(X))
    for call in (pyconvbn.load, lambda path: pyconvbn.save(aten(), path)):
        with pytest.raises(TypeError):
            call(3)
        with pytest.raises(TypeError, match="path: expected a str"):
            call(os.fsencode(tmp_path / "a"))
    with pytest.raises(FileNotFoundError):
        pyconvbn.load(tmp_path / "none")
    with pytest.raises(OSError):
        pyconvbn.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        pyconvbn.save(aten(), tmp_path / "no" / "folder")
    with pytest.raises(TypeError, match="gm: expected a GraphModule, got Sequential"):
        pyconvbn.save(net(), tmp_path / "a")


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**62, -(2**63), 10**30, 0.0, -0.0, 1.5, 0.1, math.inf, -math.inf, math.nan, -math.nan,
    5e-324, 1.7976931348623157e308, 1j, complex(-0.0, math.nan), "", "a", "ü\n\0\"'", "\ud800", (), (1,), ((),), [],
    [1], [[]], {}, {"a": 1}, {1: 2, "1": 3}, {(1, None): [2]}, {1.5: {}}, slice(None), slice(1, None, -1),
    slice((1, 2), [3], {"a": 4.0}),
    Ellipsis, (Ellipsis, slice(0, 2), None), np.dtype(np.float32), np.dtype("<i8"),
    np.dtype(">f8"), np.dtype(bool), np.float32, np.int8, np.bool_, float, int, bool, np.float32(0.1),
    np.float64(-0.0), np.int64(-5), np.bool_(True), np.complex64(1 + 2j), np.uint8(255), np.float16(np.nan),
    [1, 1.0, True], (1, [2, (3, {"k": (4,)})]),
]


def exact(value: Any) -> Any:
    """Something equal only for equal types and bits."""
    kind = {"immutable_list": "list", "immutable_dict": "dict"}.get(type(value).__name__, type(value).__name__)
    if isinstance(value, float) and not isinstance(value, np.generic):
        return kind, np.float64(value).tobytes()
    if isinstance(value, complex) and not isinstance(value, np.generic):
        return kind, np.complex128(value).tobytes()
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if isinstance(value, tuple | list):
        return kind, tuple(map(exact, value))
    if isinstance(value, dict):
        return kind, tuple((exact(k), exact(v)) for k, v in value.items())
    if isinstance(value, slice):
        return kind, exact((value.start, value.stop, value.step))
    return kind, value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30].encode("ascii", "replace").decode())
def test_values(value: Any, tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.add, (x, value), {}))
    gm = fx.GraphModule({}, graph)
    pyconvbn.save(gm, tmp_path / "a")
    again = list(pyconvbn.load(tmp_path / "a").graph.nodes)[1]
    assert exact(again.args[1]) == exact(value)


def test_random_values() -> None:
    rng = np.random.default_rng(5)

    def make(depth: int) -> Any:
        kind = int(rng.integers(0, 8 if depth else 4))
        items = [make(depth - 1) for _ in range(int(rng.integers(0, 4)))] if kind > 3 else []
        return [
            lambda: int(rng.integers(-5, 5)), lambda: float(rng.choice([0.0, -0.0, 1e300, np.nan, 2.5])),
            lambda: str(rng.integers(0, 99)), lambda: bool(rng.integers(2)), lambda: tuple(items), lambda: items,
            lambda: {str(i): item for i, item in enumerate(items)},
            lambda: slice(*[*items, None, None, None][:3]),
        ][kind]()

    for _ in range(500):
        value = make(4)
        text = json.dumps(encode(value, lambda node: 0, lambda array: ""), allow_nan=False)
        assert exact(decode(json.loads(text), lambda i: None, lambda name: None)) == exact(value)


def test_every_operator_of_the_table_is_found_again() -> None:
    from pyconvbn._save_values import function_of

    for name in _core.op_names():
        if name.startswith("method."):
            with pytest.raises(ValueError, match="no operator"):
                function_of(name)
        else:
            assert _core.op_lookup(function_of(name)) == name


def long_strides(array: Any) -> list[int]:
    return [stride for stride, n in zip(array.strides, array.shape) if n > 1]


@pytest.mark.parametrize("make", [
    lambda: np.zeros((3, 4), np.float32), lambda: np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
    lambda: np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)), lambda: np.arange(10)[::-2],
    lambda: np.arange(20.0).reshape(4, 5)[1:3, 1:4], lambda: np.broadcast_to(np.float32(2), (3, 4)),
    lambda: np.array(3.5), lambda: np.zeros((0, 3)), lambda: np.array([True, False]), lambda: np.zeros((3, 0, 2), "u1"),
    lambda: np.array([1, 2], ">i4"), lambda: np.array([1 + 2j], np.complex64), lambda: np.array([np.nan, -0.0, np.inf]),
    lambda: np.arange(16, dtype=np.float16).reshape(1, 4, 2, 2).transpose(0, 2, 3, 1),
    lambda: np.arange(5, dtype=np.float64),
])
@pytest.mark.parametrize("writeable", [True, False])
def test_arrays_with_their_layout(make: Any, writeable: bool, tmp_path: Path) -> None:
    array = make()
    if writeable and not array.flags.writeable:
        array = array.copy()
    array.flags.writeable = writeable
    graph = fx.Graph()
    graph.output((graph.get_attr("a"), graph.call_function(operator.add, (1, array))))
    again = there_and_back(fx.GraphModule({"a": array}, graph), tmp_path)
    read = again.a
    assert same_bits(read, array) and read.flags.writeable is writeable
    assert next(n for n in again.graph.nodes if n.op == "call_function").args[1] is read  # one array stays one
    dense = array.copy(order="K")
    assert long_strides(read) == long_strides(dense)


def test_parameters_stay_parameters(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.w = nn.Parameter(np.ones(3, np.float32), requires_grad=False)
            self.v = nn.Parameter(np.ones(3, np.float32))
            self.register_buffer("b", np.zeros(3, np.float32))

        def forward(self, x: Any) -> Any:
            return x * self.inner.w + self.v + self.b

    again = there_and_back(fx.symbolic_trace(Net()), tmp_path)
    assert not again.inner.w.requires_grad and again.v.requires_grad
    assert {n for n, _ in again.named_parameters()} == {"inner.w", "v"}
    assert {n for n, _ in again.named_buffers()} == {"b"}


def test_signatures_methods_and_annotations(tmp_path: Path) -> None:
    def function(x: np.ndarray[Any, Any], n: int = 2, *, scale: float = 0.5) -> Any:
        return (x.reshape(n, -1) * scale).sum(axis=0), {"shape": x.shape, "first": x[0, ..., None]}

    gm = fx.symbolic_trace(function)
    again = there_and_back(gm, tmp_path)
    a, b = gm(X, scale=2.0), again(X, scale=2.0)
    assert same_bits(a[0], b[0]) and a[1]["shape"] == b[1]["shape"] and same_bits(a[1]["first"], b[1]["first"])
    assert [node.type for node in again.graph.nodes] == [node.type for node in gm.graph.nodes]
    for kind in (int, np.ndarray, "list[int]", None):
        next(iter(gm.graph.nodes)).type = kind
        assert next(iter(there_and_back(gm, tmp_path).graph.nodes)).type == kind


def test_the_report_comes_back(tmp_path: Path) -> None:
    gm = aten()
    folds = FoldReport([FoldRow("bn", "1", "folded", "OK", new_node="conv", conv="conv", bytes_saved=5, flops_saved=6)])
    report = FreezeReport([FreezeRow("cse", "a", "done", "OK", into="b")], folds)
    for expected in (report, folds):
        gm.__dict__["report"] = expected
        assert there_and_back(gm, tmp_path).report == expected


def test_a_graph_without_output_and_an_empty_one(tmp_path: Path) -> None:
    graph = fx.Graph()
    assert len(there_and_back(fx.GraphModule({}, graph), tmp_path).graph) == 0
    graph.placeholder("x")
    assert len(there_and_back(fx.GraphModule({}, graph), tmp_path).graph) == 1


def test_loading_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    gm = aten()
    pyconvbn.save(gm, path)
    np.save(tmp_path / "x.npy", X)
    script = (
        "import sys, numpy as np, pyconvbn; "
        "sys.stdout.buffer.write(pyconvbn.load(sys.argv[1])(np.load(sys.argv[2])).tobytes())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, path, tmp_path / "x.npy"], capture_output=True, check=True, cwd="/"
    )
    assert run.stdout == gm(X).tobytes()


# -- what cannot be saved --------------------------------------------------------------------------------------------
def add_literal(value: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.add, (x, value), {}))
    return fx.GraphModule({}, graph)


def reads(array: Any) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.get_attr("a"))
    return fx.GraphModule({"a": array}, graph)


def pair(a: Any, b: Any) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((graph.get_attr("a"), graph.get_attr("b")))
    return fx.GraphModule({"a": a, "b": b}, graph)


def of_getattr(*args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(getattr, (x, *args)))
    return fx.GraphModule({}, graph)


def call_method(name: str) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_method(name, (graph.placeholder("x"),)))
    return fx.GraphModule({}, graph)


BLOCK = np.arange(10.0)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: fx.symbolic_trace(lambda x: np.fft.fft(x)), "node 'fft' cannot be saved: fft is no operator"),
    (lambda: add_literal(object()), "node 'add' .*a value of type builtins.object"),
    (lambda: add_literal({1, 2}), "node 'add' .*builtins.set"),
    (lambda: add_literal(randomise), "node 'add' .*builtins.function"),
    (lambda: add_literal(FreezeRow("a", "b", "done", "OK")), "node 'add' .*FreezeRow"),
    (lambda: add_literal(np.dtype("f4,i4")), "node 'add' .*dtype"),
    (lambda: add_literal(np.array([None])), "node 'add' .*an array of dtype object"),
    (lambda: reads(np.array(["a"])), "node 'a' .*an array of dtype <U1"),
    (lambda: reads(np.ma.masked_array([1.0])), "node 'a' .*class MaskedArray"),
    (lambda: reads(np.zeros(2, np.longdouble)), "node 'a' .*dtype (float128|longdouble|float96)"),
    (lambda: reads(np.zeros(2, "M8[s]")), "node 'a' .*datetime64"),
    (lambda: reads(nn.Sequential()), "node 'a' .*the Sequential that it calls is no layer of pyconvbn.nn"),
    (lambda: reads([1]), "node 'a' .*what it reads is a list"),
    (lambda: of_getattr("__class__"), "node 'getattr_1' .*getattr may read one of"),
    (lambda: of_getattr("tofile"), "node 'getattr_1' .*getattr may read one of"),
    (lambda: of_getattr("shape", 1), "node 'getattr_1' .*getattr may read one of"),
    (lambda: call_method("tofile"), "node 'tofile' .*no method 'tofile'"),
    (lambda: pair(BLOCK[:6], BLOCK[5:]), "the arrays 'a' and 'b' share memory"),
    (lambda: pair(BLOCK, BLOCK[2:3]), "the arrays 'a' and 'b' share memory"),
])
def test_what_cannot_be_saved(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.npz"
    path.write_bytes(b"before")
    with pytest.raises(TypeError, match=message):
        pyconvbn.save(make(), path)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["net.npz"]


def test_hooks_and_erased_arrays(tmp_path: Path) -> None:
    gm = aten()
    from pyconvbn._erased import discard_traced_gm_params

    discard_traced_gm_params(gm)
    with pytest.raises(TypeError, match="node '_0_weight' cannot be saved: what it reads is an ErasedArray"):
        pyconvbn.save(gm, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_neighbouring_and_read_only_views_are_fine(tmp_path: Path) -> None:
    there_and_back(pair(BLOCK[:5], BLOCK[5:]), tmp_path)
    whole = np.arange(10.0)
    whole.flags.writeable = False
    again = there_and_back(pair(whole, whole[2:3]), tmp_path)
    assert same_bits(again.b, whole[2:3])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.npz"
    path.write_bytes(b"before")

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space left"):
                pyconvbn.save(aten(), path)
        assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["net.npz"]
    pyconvbn.save(aten(), path)
    assert same_bits(pyconvbn.load(path)(X), aten()(X)) and os.listdir(tmp_path) == ["net.npz"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_the_file_has_the_usual_mode(tmp_path: Path) -> None:
    pyconvbn.save(aten(), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
