# SPDX-License-Identifier: BSD-3-Clause
"""ErasedArray, what puts it in place of parameters, and that the memory is really given back."""

from __future__ import annotations

import copy
import gc
import math
import operator
import pickle
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
import pyconvbn.freezing
from pyconvbn import functional as F
from pyconvbn import fx, nn, ops
from pyconvbn._erased import ErasedArray, discard_traced_gm_params, invalidate_eager_modules

X = np.ones((1, 3, 8, 8), np.float32)
Y = np.ones((1, 4, 8, 8), np.float32)


class Block(nn.Module):
    """conv, bn, and a parameter and an array of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(np.ones((4, 1, 1), np.float32), requires_grad=False)
        self.register_buffer("shift", np.zeros((4, 1, 1), np.float32), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.bn(self.conv(x)) * self.scale + self.shift


def model() -> Any:
    net = nn.Module()
    net.layer1 = Block()
    return net.eval()


def erased() -> Any:
    net = model()
    invalidate_eager_modules(net)
    return net.layer1.conv.weight


ABOUT = r"parameter 'weight' of Conv2d 'layer1\.conv' was erased"


def refused(operation: str) -> Any:
    return pytest.raises(RuntimeError, match=rf"^{operation}: {ABOUT}, its memory given back")


BINARY = [
    ("addition", operator.add), ("subtraction", operator.sub), ("multiplication", operator.mul),
    ("division", operator.truediv), ("floor division", operator.floordiv), ("remainder", operator.mod),
    ("power", operator.pow), ("matrix multiplication", operator.matmul), ("&", operator.and_), (r"\|", operator.or_),
    (r"\^", operator.xor), ("<<", operator.lshift), (">>", operator.rshift), ("divmod", divmod),
]


@pytest.mark.parametrize(("name", "function"), BINARY)
def test_binary_operators(name: str, function: Callable[[Any, Any], Any]) -> None:
    w = erased()
    with refused(name):
        function(w, 2)
    with refused(name):
        function(2, w)
    with refused(name):
        function(w, X)
    with refused(r"numpy\.\w+"):  # NumPy asks the one that is no ndarray
        function(X, w)
    in_place = getattr(operator, f"i{getattr(function, '__name__', '').strip('_')}", None)
    if in_place is not None:
        with refused(name):
            in_place(w, 2)
        with refused(r"numpy\.\w+"):
            in_place(X.copy(), w)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(name: str) -> None:
    with refused("comparison"):
        getattr(operator, name)(erased(), 2)
    with refused("comparison"):
        getattr(operator, name)(2, erased())


USES: list[tuple[str, Callable[[Any], Any]]] = [
    ("negation", operator.neg), ("unary plus", operator.pos), ("abs", abs), ("inversion", operator.invert),
    ("len", len), ("bool", bool), ("float", float), ("int", int), ("complex", complex),
    ("use as an index", operator.index), ("use as an index", lambda w: [0][w]), ("round", round),
    ("rounding down", math.floor), ("rounding up", math.ceil), ("truncation", math.trunc),
    ("indexing", lambda w: w[0]), ("indexing", lambda w: w[..., None]),
    ("assigning to an index", lambda w: operator.setitem(w, 0, 1)),
    ("deleting an index", lambda w: operator.delitem(w, 0)),
    ("iteration", list), ("iteration", iter), ("iteration", reversed), ("iteration", next),
    ("membership test", lambda w: 1 in w), ("hashing", hash), ("hashing", lambda w: {w}), ("calling", lambda w: w(1)),
    ("conversion to bytes", bytes), ("formatting", lambda w: f"{w:.3f}"),
    ("reading .shape", lambda w: w.shape), ("reading .dtype", lambda w: w.dtype), ("reading .T", lambda w: w.T),
    ("reading .data", lambda w: w.data), ("reading .detach", lambda w: w.detach()),
    ("reading .numpy", lambda w: w.numpy()), ("reading .nope", lambda w: hasattr(w, "nope")),
    ("reading .__dict__", vars), ("reading ._about", lambda w: w._about),
    ("setting .data", lambda w: setattr(w, "data", X)),
    ("setting .requires_grad", lambda w: setattr(w, "requires_grad", True)),
    ("deleting .data", lambda w: delattr(w, "data")),
    ("conversion to an ndarray", np.asarray), ("conversion to an ndarray", np.array),
    ("conversion to an ndarray", lambda w: np.array([w, w])), ("conversion to an ndarray", np.float32),
    ("conversion to an ndarray", lambda w: X.dot(w)),
    (r"numpy\.sin", np.sin), (r"numpy\.add\.reduce", np.add.reduce), (r"numpy\.sum", np.sum),
    (r"numpy\.concatenate", lambda w: np.concatenate([w, w])), (r"numpy\.copyto", lambda w: np.copyto(X.copy(), w)),
    (r"numpy\.result_type", np.result_type), (r"numpy\.shape", np.shape), (r"numpy\.linalg\.norm", np.linalg.norm),
    ("reading it as an array", np.from_dlpack),
    (r"copy\.copy", copy.copy), (r"copy\.deepcopy", copy.deepcopy),
    ("pickling", pickle.dumps), ("pickling", lambda w: pickle.dumps(w, 0)), ("pickling", lambda w: w.__reduce__()),
    ("reading it as an array", lambda w: F.conv2d(X, w)), ("reading it as an array", F.relu),
    ("reading it as an array", lambda w: ops.aten.conv2d.default(X, w)),
    ("reading it as an array", lambda w: pyconvbn.Plan(w)),
    ("reading .detach", lambda w: ops.aten.add.Tensor(X, w)), ("reading .detach", nn.Parameter),
    ("assigning it to 'weight'", lambda w: setattr(nn.Linear(2, 2), "weight", w)),
    ("registering it as 'b'", lambda w: nn.Module().register_buffer("b", w)),
    ("tracing", lambda w: fx.symbolic_trace(lambda x: F.conv2d(x, w))),
]


@pytest.mark.parametrize(("name", "use"), USES)
def test_uses(name: str, use: Callable[[Any], Any]) -> None:
    with refused(name):
        use(erased())


def test_what_can_be_read() -> None:
    w = erased()
    assert repr(w) == str(w) == f"{w}" == "ErasedArray(parameter 'weight' of Conv2d 'layer1.conv', requires_grad=True)"
    assert w.requires_grad and not isinstance(w, np.ndarray) and isinstance(w, ErasedArray)
    assert pyconvbn.ErasedArray is ErasedArray and dir(w) == ["requires_grad"]
    assert weakref.ref(w)() is w


def test_every_array_below_is_erased_with_its_flags() -> None:
    net = model()
    arrays = dict([*net.named_parameters(), *net.named_buffers()])
    flags = {name: getattr(array, "requires_grad", False) for name, array in arrays.items()}
    assert flags["layer1.conv.weight"] and not flags["layer1.scale"] and not flags["layer1.bn.running_mean"]
    rows = invalidate_eager_modules(net)
    assert {row.node for row in rows} == set(arrays) and len(rows) == len(arrays)
    assert all(row.step == "discard" and (row.outcome, row.reason) == ("done", "OK") for row in rows)
    after = dict([*net.named_parameters(), *net.named_buffers()])
    assert list(after) == list(arrays)  # what is a parameter, what a buffer, and the order stay
    for name, value in after.items():
        assert type(value) is ErasedArray and value.requires_grad == flags[name]
    assert "buffer 'shift' of Block 'layer1'" in repr(net.layer1.shift)
    assert invalidate_eager_modules(net) == []  # nothing left


@pytest.mark.parametrize("use", [
    lambda net: net.layer1(X), lambda net: net.layer1.conv(X), lambda net: net.layer1.bn(Y),
    lambda net: pyconvbn.efficient_conv_bn_eval(net.layer1.bn, net.layer1.conv, X),
    lambda net: pyconvbn.Plan.from_modules(net.layer1.conv, net.layer1.bn),
    lambda net: pyconvbn.fuse_conv_bn_eval(net.layer1.conv, net.layer1.bn), lambda net: pyconvbn.fold(net.layer1),
    lambda net: fx.symbolic_trace(net.layer1)(X), lambda net: fx.to_aten(fx.symbolic_trace(net.layer1)),
    lambda net: net.state_dict(), lambda net: net.load_state_dict(model().state_dict()),
    lambda net: net.load_state_dict({}), lambda net: net.load_state_dict(model().state_dict(), assign=True),
    lambda net: copy.deepcopy(net), lambda net: pickle.dumps(net),
])
def test_modules_that_were_erased(use: Callable[[Any], Any]) -> None:
    net = model()
    invalidate_eager_modules(net)
    with pytest.raises(RuntimeError, match=r": (parameter|buffer) '\w+' of \w+ '(layer1\.)?\w*' was erased"):
        use(net)


def test_state_dict_errors_name_the_operation() -> None:
    net = model()
    invalidate_eager_modules(net)
    with pytest.raises(RuntimeError, match="^state_dict: parameter 'scale' of Block 'layer1'"):
        net.state_dict()
    with pytest.raises(RuntimeError, match="^load_state_dict: parameter 'scale' of Block 'layer1'"):
        net.load_state_dict({})


def test_modes_and_printing_still_work() -> None:
    net = model()
    text = repr(net)
    invalidate_eager_modules(net)
    assert repr(net.train().eval().requires_grad_(False)) == text


def test_an_assigned_array_revives_the_module() -> None:
    conv = nn.Conv2d(3, 4, 3)
    weight, bias = conv.weight, conv.bias
    expected = conv(X)
    invalidate_eager_modules(conv)
    conv.weight, conv.bias = weight, bias
    assert np.array_equal(conv(X), expected) and list(conv.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("make", [
    lambda: nn.Conv1d(3, 4, 3), lambda: nn.Conv3d(3, 4, 3), lambda: nn.ConvTranspose2d(3, 4, 3),
    lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(3).eval(), lambda: nn.BatchNorm1d(3),
])
def test_every_layer(make: Callable[[], Any]) -> None:
    layer = make()
    name = type(layer).__name__
    x = np.ones((2, 3) if name in ("Linear", "BatchNorm1d") else (2, 3, *[6] * int(name[-2])), np.float32)
    layer(x)
    invalidate_eager_modules(layer)
    with pytest.raises(RuntimeError, match=rf"'\w+' of {name} was erased"):
        layer(x)


# -- keep ----------------------------------------------------------------------------------------------------------
def test_keep_goes_by_memory() -> None:
    net = model()
    conv, bn = net.layer1.conv, net.layer1.bn
    view = conv.weight[1:, :, ::-1]
    rows = {row.node: row for row in invalidate_eager_modules(net, keep=[view, bn.bias, np.zeros(3)])}
    kept = {name for name, row in rows.items() if row.outcome == "kept"}
    assert kept == {"layer1.conv.weight", "layer1.bn.bias"}
    assert rows["layer1.bn.bias"].reason == "IN_USE" and rows["layer1.bn.bias"].hint
    assert isinstance(conv.weight, np.ndarray) and type(conv.bias) is ErasedArray


def test_neighbours_in_one_block_are_told_apart() -> None:
    net = nn.Module()
    block = np.arange(12, dtype=np.float32)
    for i in range(4):
        net.register_buffer(f"b{i}", block[3 * i : 3 * i + 3])
    net.register_buffer("empty", block[3:3])
    rows = invalidate_eager_modules(net, keep=[block[6:9], block[3:6][::-1]])
    assert [row.outcome for row in rows] == ["done", "kept", "kept", "done", "done"]


def test_wrong_arguments_change_nothing() -> None:
    net = model()
    with pytest.raises(TypeError, match="^keep: expected arrays, got str at 1"):
        invalidate_eager_modules(net, keep=[X, "x"])
    with pytest.raises(TypeError, match="^module: expected a Module, got function"):
        invalidate_eager_modules(model)  # type: ignore[arg-type]
    gm = fx.symbolic_trace(net.layer1)
    with pytest.raises(TypeError, match="^keep: expected arrays, got None"):
        discard_traced_gm_params(gm, keep=[None])
    with pytest.raises(TypeError, match="^gm: expected a GraphModule, got Block"):
        discard_traced_gm_params(net.layer1)
    assert all(isinstance(array, np.ndarray) for array in [*net.parameters(), *net.buffers(), *gm.parameters()])


def test_a_shared_array_and_a_shared_module() -> None:
    net = nn.Module()
    net.a, net.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    net.again = net.a
    net.b.weight = net.a.weight
    assert [row.node for row in invalidate_eager_modules(net)] == ["a.weight", "b.weight"]
    assert "Linear 'a'" in repr(net.again.weight) and "Linear 'b'" in repr(net.b.weight)


# -- traced graphs ---------------------------------------------------------------------------------------------------
def test_a_traced_graph() -> None:
    net = model().layer1
    gm = fx.symbolic_trace(net)
    rows = discard_traced_gm_params(gm)
    assert {row.node for row in rows} == {
        "conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
        "bn.num_batches_tracked", "scale", "shift",
    }
    with pytest.raises(RuntimeError, match="'weight' of Conv2d 'conv' was erased"):
        gm(X)
    assert type(gm.scale) is ErasedArray and isinstance(net.scale, np.ndarray)  # the module's own attribute
    assert type(net.conv.weight) is ErasedArray  # the module that both call


def test_arrays_that_only_a_node_reads_and_literals() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.plain = np.ones(3, np.float32)  # no buffer

        def forward(self, x: Any) -> Any:
            return x + self.inner.plain

    gm = fx.symbolic_trace(Net())
    literal = np.ones(3, np.float32)
    with gm.graph.inserting_before(gm.graph.output_node()):
        added = gm.graph.call_function(operator.add, (gm.graph.output_node().args[0], literal), {})
    gm.graph.output_node().args = (added,)
    rows = discard_traced_gm_params(gm)
    assert [(row.node, row.outcome) for row in rows] == [("inner.plain", "done"), (added.name, "kept")]
    assert rows[1].reason == "IN_USE" and "arguments of the node" in rows[1].hint
    with pytest.raises(RuntimeError, match="'plain' of Module 'inner' was erased"):
        gm(literal)


def test_lifted_parameters() -> None:
    gm = fx.to_aten(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3))), lift_params=True)
    first = weakref.ref(gm.meta["params_flat"][0])
    rows = discard_traced_gm_params(gm)
    gc.collect()  # the graph that this one was made from
    assert [row.node for row in rows] == ["0.weight", "0.bias"] and first() is None
    with pytest.raises(RuntimeError, match="lifted parameter '0.weight' of Sequential was erased"):
        gm(*gm.meta["params_flat"], np.ones((1, 2), np.float32))


def test_the_traced_module_is_known_and_not_held() -> None:
    net = model().layer1
    gm = fx.symbolic_trace(net)
    assert gm._traced_module() is net
    assert fx.symbolic_trace(net.forward)._traced_module() is net
    assert fx.symbolic_trace(lambda x: x + 1)._traced_module() is None
    for other in (copy.copy(gm), copy.deepcopy(gm), fx.GraphModule(gm, gm.graph)):
        assert other._traced_module() is None
    assert gm._traced_module() is net
    there = weakref.ref(net)
    del net
    gc.collect()
    assert there() is None and gm._traced_module() is None
    assert pickle.loads(pickle.dumps(fx.symbolic_trace(nn.Sequential(nn.ReLU()))))._traced_module() is None


# -- memory ----------------------------------------------------------------------------------------------------------
def test_arrays_die() -> None:
    net = model()
    gm = fx.symbolic_trace(net.layer1)
    gm(X)
    arrays = [weakref.ref(array) for array in [*net.parameters(), *net.buffers()]]
    invalidate_eager_modules(net)
    assert any(ref() is not None for ref in arrays)  # what the graph reads by itself
    discard_traced_gm_params(gm)
    assert all(ref() is None for ref in arrays)


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="the resident size is read from /proc")
def test_the_process_shrinks() -> None:
    script = textwrap.dedent("""
        import gc, os
        import numpy as np
        from pyconvbn import fx, nn
        from pyconvbn._erased import discard_traced_gm_params, invalidate_eager_modules

        def resident():
            gc.collect()
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        net = nn.Sequential(*[nn.Linear(1600, 2560) for _ in range(12)])
        for p in net.parameters():
            p[...] = 1
        gm = fx.symbolic_trace(net)
        size = sum(p.nbytes for p in net.parameters())
        assert size > 190e6
        before = resident()
        invalidate_eager_modules(net)
        discard_traced_gm_params(gm)
        print((before - resident()) / size)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) >= 0.95


# -- freezing ----------------------------------------------------------------------------------------------------------
def frozen(net: Any, lift: bool = False) -> tuple[Any, Any]:
    gm = fx.symbolic_trace(net)
    if lift:
        gm = fx.to_aten(gm, lift_params=True)
    return gm, pyconvbn.freezing.freeze(gm, X, discard_parameters=True)[0]


def test_freezing_gives_the_memory_back() -> None:
    net = model().layer1
    expected = net(X)
    arrays = {name: weakref.ref(array) for name, array in [*net.named_parameters(), *net.named_buffers()]}
    gm, result = frozen(net)
    gc.collect()
    assert [name for name, ref in arrays.items() if ref() is not None] == []
    assert np.allclose(result(X), expected, atol=1e-5)
    done = {row.node for row in result.report.by_step("discard") if row.outcome == "done"}
    assert done == {*arrays, "scale", "shift"} and not [row for row in result.report.by_step("discard") if row.blocking]
    for use in (lambda: net(X), lambda: gm(X), lambda: net.conv(X), lambda: copy.deepcopy(gm)):
        with pytest.raises(RuntimeError, match="was erased"):
            use()
    with pytest.raises(RuntimeError, match="was erased"):
        pyconvbn.freezing.freeze(gm, X)[0](X)
    assert np.array_equal(pickle.loads(pickle.dumps(result))(X), result(X))


def test_freezing_a_lifted_graph_gives_the_memory_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    expected = net(X)
    arrays = [weakref.ref(array) for array in net[0].parameters()]
    gm, result = frozen(net, lift=True)
    del net
    gc.collect()
    assert all(ref() is None for ref in arrays)
    assert np.allclose(result(X), expected, atol=1e-5)


def test_what_the_frozen_graph_still_uses_is_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # in training: each call writes the averages
    gm, result = frozen(net)
    rows = {row.node: row for row in result.report.by_step("discard")}
    assert rows["0.weight"].outcome == "done" and rows["1.running_mean"].reason == "IN_USE"
    before = net[1].running_mean.copy()
    result(X * np.arange(1, 9, dtype=np.float32))
    assert not np.array_equal(net[1].running_mean, before)


def test_nothing_is_discarded_by_default() -> None:
    net = model().layer1
    gm = fx.symbolic_trace(net)
    result, _ = pyconvbn.freezing.freeze(gm, X)
    assert np.array_equal(gm(X), net(X)) and result.report.by_step("discard") == []
