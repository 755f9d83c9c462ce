# SPDX-License-Identifier: BSD-3-Clause
"""GraphModule: what it takes over, running, editing, copying, pickling and being collected."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx, nn


class Net(nn.Module):
    """Dotted targets, a module under two names, a parameter of its own, an unsaved buffer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.act = nn.ReLU()
        self.again = self.act
        self.scale = nn.Parameter(np.full(1, 2.0, np.float32), requires_grad=False)
        self.register_buffer("shift", np.ones(1, np.float32), persistent=False)
        self.unused = nn.Linear(2, 2)
        self.eval()

    def forward(self, x, gain=1.0):
        y = self.again(self.act(self.stem(x)))
        return y * self.scale + self.shift * gain


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 2, 5, 5)).astype(np.float32)


def add_one(gm):
    """Edits the graph in place: the output becomes output + 1."""
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        new = gm.graph.call_function(operator.add, (output.args[0], 1))
    output.args = (new,)


def test_it_holds_what_the_graph_refers_to(net, x):
    gm = fx.symbolic_trace(net)
    assert isinstance(gm, nn.Module) and gm.class_name == "Net" and gm.training is False
    assert [name for name, _ in gm.named_modules()] == ["", "stem", "stem.0", "stem.1", "act"]
    assert [name for name, _ in gm.named_parameters()] == [
        "scale", "stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"
    ]
    assert getattr(gm.stem, "0") is net.stem[0] and gm.scale is net.scale and gm.shift is net.shift
    assert "shift" not in gm.state_dict() and "unused" not in vars(gm)
    assert set(gm.state_dict()) <= set(net.state_dict())
    np.testing.assert_array_equal(gm(x), net(x))
    gm.train()
    assert net.stem[1].training and not net.training
    assert gm.eval() is gm and not net.stem[1].training


def test_arguments_bind_as_in_a_call(net, x):
    gm = fx.symbolic_trace(net)
    for args, kwargs in [((x, 3.0), {}), ((x,), {"gain": 3.0}), ((), {"gain": 3.0, "x": x})]:
        np.testing.assert_array_equal(gm(*args, **kwargs), net(x, 3.0))
    for args, kwargs, text in [
        ((), {}, "missing.*'x'"), ((x, 1, 2), {}, "takes 2"), ((x,), {"x": x}, "multiple values.*'x'"),
        ((x,), {"other": 1}, "unexpected.*'other'"), ((), {"gain": 2.0}, "missing.*'x'"),
    ]:
        with pytest.raises(TypeError, match=text):
            gm(*args, **kwargs)


def test_edits_take_effect_without_recompiling(net, x):
    gm = fx.symbolic_trace(net)
    before = gm(x)
    add_one(gm)
    np.testing.assert_array_equal(gm(x), before + 1)
    (add, *_) = gm.graph.find_nodes(op="call_function", target=operator.mul)
    add.target = operator.sub
    assert not np.array_equal(gm(x), before + 1)
    assert gm.recompile() is None
    for node in reversed(gm.graph.nodes):
        if node.op not in ("placeholder", "output"):
            node.replace_all_uses_with(next(iter(gm.graph.nodes)))
            gm.graph.erase_node(node)
    assert gm(x) is x


def test_in_place_weights_are_seen(net, x):
    gm = fx.symbolic_trace(net)
    net.scale[...] = 0
    np.testing.assert_array_equal(gm(x), np.ones_like(gm(x)))
    gm.scale = nn.Parameter(np.full(1, 3.0, np.float32))  # another array under the same name
    assert gm(x).max() > 1
    gm.set_submodule("act", nn.Sigmoid())
    assert (gm(x) > 1).all()


def test_the_graph_can_be_replaced(net, x):
    gm = fx.symbolic_trace(net)
    graph = fx.Graph()
    graph.output(graph.call_function(F.relu, (graph.placeholder("v"),)))
    gm.graph = graph
    assert gm.graph is graph and graph.owning_module is gm
    np.testing.assert_array_equal(gm(v=x), F.relu(x))
    for bad in (None, 3, fx.symbolic_trace(net)):
        with pytest.raises(TypeError, match="graph: expected a Graph"):
            gm.graph = bad
    assert gm.graph is graph


def test_from_a_dict():
    graph = fx.Graph()
    v = graph.placeholder("v")
    y = graph.call_module("block.act", (graph.call_function(operator.mul, (v, graph.get_attr("block.w"))),))
    graph.output(y)
    w = np.array([2.0, -1.0])
    gm = fx.GraphModule({"block.act": nn.ReLU(), "block.w": w, "more": nn.ReLU()}, graph, "Made")
    assert gm.block.w is w and "more" not in vars(gm)
    assert repr(gm) == "Made(\n  (block): Module(\n    (act): ReLU()\n  )\n)"
    assert gm(np.ones(2)).tolist() == [2.0, 0.0]
    with pytest.raises(AttributeError, match="'block.w'"):
        fx.GraphModule({"block.act": nn.ReLU()}, graph)
    for root in (None, 3, [nn.ReLU()]):
        with pytest.raises(TypeError, match="root: expected a Module or a dict"):
            fx.GraphModule(root, graph)
    with pytest.raises(TypeError, match="graph: expected a Graph"):
        fx.GraphModule(nn.Module(), None)


def test_a_missing_target_is_named(net):
    graph = fx.Graph()
    graph.output(graph.call_module("stem.7.conv", (graph.placeholder("v"),)))
    with pytest.raises(AttributeError, match="'stem.7.conv'.*stem .Sequential. has no '7'"):
        fx.GraphModule(net, graph)


@pytest.mark.parametrize("name", ["graph", "code", "meta", "forward", "recompile", "_graph", "class_name", "training"])
def test_targets_that_would_hide_its_own_attributes(name):
    graph = fx.Graph()
    graph.output(graph.call_module(name, (graph.placeholder("v"),)))
    with pytest.raises(ValueError, match=f"'{name}'"):
        fx.GraphModule({name: nn.ReLU()}, graph)


def test_a_part_and_the_whole():
    """`a.b` and `a`: the whole module is shared, and its part is the same object."""
    root = nn.Module()
    root.a = nn.Sequential(nn.ReLU())
    graph = fx.Graph()
    v = graph.placeholder("v")
    graph.output(graph.call_module("a", (graph.call_module("a.0", (v,)),)))
    gm = fx.GraphModule(root, graph)
    assert gm.a is root.a and list(gm.named_modules()) == [("", gm), ("a", root.a), ("a.0", root.a[0])]


def test_a_dict_that_contradicts_itself():
    graph = fx.Graph()
    v = graph.placeholder("v")
    graph.output(graph.call_module("a", (graph.call_module("a.0", (v,)),)))
    whole, part = nn.Sequential(nn.ReLU()), nn.ReLU()
    gm = fx.GraphModule({"a": whole, "a.0": whole[0]}, graph)
    assert gm.a is whole
    inner = whole[0]
    with pytest.raises(ValueError, match="'a.0' is not what 'a' holds"):
        fx.GraphModule({"a": whole, "a.0": part}, graph)
    assert whole[0] is inner


def test_submodules_added_and_deleted(net, x):
    gm = fx.symbolic_trace(net)
    assert gm.add_submodule("new.inner.act", nn.Sigmoid()) is True
    assert gm.get_submodule("new.inner.act")(np.zeros(1)) == 0.5
    assert gm.add_submodule("scale.act", nn.ReLU()) is False
    assert gm.delete_submodule("new.inner.act") is True
    assert gm.delete_submodule("new.inner.act") is False and gm.delete_submodule("no.such") is False
    assert gm.delete_submodule("scale") is False and gm.scale is net.scale
    gm.add_submodule("other", nn.Sequential(nn.ReLU()))
    gm.delete_all_unused_submodules()
    assert [name for name, _ in gm.named_modules()] == ["", "stem", "stem.0", "stem.1", "act"]
    np.testing.assert_array_equal(gm(x), net(x))
    with pytest.raises(TypeError, match="m: expected a Module"):
        gm.add_submodule("a", np.ones(1))
    for bad in ("", "a..b", "graph", "meta.x"):
        with pytest.raises(ValueError, match="target"):
            gm.add_submodule(bad, nn.ReLU())


def test_unused_modules_below_a_used_one_stay():
    root = nn.Module()
    root.block = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    root.weights = nn.Module()
    root.weights.inner = nn.Linear(1, 1)
    graph = fx.Graph()
    v = graph.call_module("block", (graph.placeholder("v"),))
    graph.output((v, graph.get_attr("weights.inner.bias")))
    gm = fx.GraphModule(root, graph)
    gm.add_submodule("weights.extra", nn.ReLU())
    gm.delete_all_unused_submodules()
    expected = ["", "block", "block.0", "block.0.0", "block.1", "weights", "weights.inner"]
    assert [name for name, _ in gm.named_modules()] == expected


def test_deepcopy(net, x):
    gm = fx.symbolic_trace(net)
    gm.meta["note"] = ["a"]
    gm.tied = gm.stem  # the same module under another name
    gm.own = {"module": gm.act}
    clone = copy.deepcopy(gm)
    np.testing.assert_array_equal(clone(x), gm(x))
    assert type(clone) is fx.GraphModule and clone.class_name == "Net" and clone.graph.owning_module is clone
    assert clone.graph is not gm.graph and str(clone.graph) == str(gm.graph) and clone.code == gm.code
    assert clone.meta == {"note": ["a"]} and clone.meta["note"] is not gm.meta["note"]
    assert clone.tied is clone.stem is not gm.stem and clone.own["module"] is clone.act
    assert clone.scale is not gm.scale and isinstance(clone.scale, nn.Parameter) and clone.scale.requires_grad is False
    assert "shift" not in clone.state_dict()
    before = gm(x)
    add_one(clone)
    clone.scale[...] = 0
    np.testing.assert_array_equal(gm(x), before)
    # in a structure: one copy for all references
    pair = copy.deepcopy([gm, gm, gm.stem])
    assert pair[0] is pair[1] and pair[0].stem is pair[2]
    outer = copy.deepcopy(nn.Sequential(gm, gm))
    assert outer[0] is outer[1] is not gm and outer[0].graph.owning_module is outer[0]


def test_shallow_copy(net, x):
    gm = fx.symbolic_trace(net)
    clone = copy.copy(gm)
    before = gm(x)
    assert clone.scale is gm.scale and clone.stem is gm.stem
    add_one(clone)
    np.testing.assert_array_equal(gm(x), before)
    np.testing.assert_array_equal(clone(x), before + 1)


def test_pickle(net, x):
    gm = fx.symbolic_trace(net)
    gm.meta["note"] = 3
    gm.tied = gm.stem
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(gm, protocol))
        np.testing.assert_array_equal(loaded(x), gm(x))
        assert loaded.code == gm.code and str(loaded.graph) == str(gm.graph)
        assert loaded.meta == {"note": 3} and loaded.tied is loaded.stem and loaded.training is False
        assert loaded.graph.owning_module is loaded
        assert [n.meta for n in loaded.graph.nodes] == [n.meta for n in gm.graph.nodes]
        add_one(loaded)
        np.testing.assert_array_equal(loaded(x), gm(x) + 1)


def test_pickle_read_in_a_fresh_process(net, x, tmp_path):
    gm = fx.symbolic_trace(net)
    (tmp_path / "gm.pickle").write_bytes(pickle.dumps(gm))
    np.save(tmp_path / "x.npy", x)
    code = (
        "import pickle, sys, numpy as np\n"
        f"gm = pickle.load(open({str(tmp_path / 'gm.pickle')!r}, 'rb'))\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, gm(np.load({str(tmp_path / 'x.npy')!r})))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), gm(x))


def test_a_function_that_cannot_be_pickled_is_a_clean_error():
    gm = fx.symbolic_trace(lambda x: fx.wrap(lambda y: y)(x))
    assert gm(3) == 3
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(gm)
    assert gm(4) == 4


def test_it_is_collected(x):
    gm = fx.symbolic_trace(Net())
    gm(x)
    gm.keep = [gm]  # a cycle through Python
    owner = next(iter(gm.graph.nodes))
    owner.meta["gm"] = gm  # and one through the graph
    refs = [weakref.ref(obj) for obj in (gm, gm.graph, gm.stem, gm.act, getattr(gm.stem, "0").weight)]
    del gm, owner
    gc.collect()
    assert [ref() for ref in refs] == [None] * 5


def test_arrays_of_a_constant_are_collected():
    array = np.ones(100)
    gm = fx.symbolic_trace(lambda x: x + array)
    ref = weakref.ref(array)
    del array, gm
    gc.collect()
    assert ref() is None


def test_text(net, capsys):
    gm = fx.symbolic_trace(net)
    assert repr(gm) == (
        "Net(\n  (stem): Module(\n    (0): Conv2d(2, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))\n"
        f"    (1): {net.stem[1]!r}\n  )\n  (act): ReLU()\n)"
    )
    assert str(gm) == f"{gm!r}\n\n{gm.code}"
    text = gm.print_readable()
    assert capsys.readouterr().out == text + "\n"
    head = "class Net(Module):\n    def forward(self, x, gain=1.0):\n        stem_0 = getattr(self.stem, '0')(x)\n"
    assert text.startswith(head)
    gm.print_readable(print_output=False)
    assert capsys.readouterr().out == ""
    assert "<svg" in gm._repr_html_()


def test_an_exception_names_node_and_line(net):
    def f(x):
        y = x + 1
        return F.conv2d(y, np.ones((1, 5, 3, 3)))

    gm = fx.symbolic_trace(f)
    line = f.__code__.co_firstlineno + 2
    with pytest.raises(ValueError) as caught:
        gm(np.ones((1, 2, 4, 4)))
    notes = "\n".join(caught.value.__notes__)
    assert "%conv2d" in notes and f'File "{__file__}", line {line}, in f' in notes
    assert len(caught.value.__notes__) == 1


def test_a_failed_run_leaves_it_usable(x):
    calls = []

    @fx.wrap
    def fails_once(v):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return v

    gm = fx.symbolic_trace(lambda v: fails_once(v) * 2)
    with pytest.raises(KeyboardInterrupt):
        gm(x)
    np.testing.assert_array_equal(gm(x), x * 2)


def test_runs_in_many_threads_at_once(net, x):
    from concurrent.futures import ThreadPoolExecutor

    gm = fx.symbolic_trace(net)
    expected = [net(x * k) for k in range(20)]
    with ThreadPoolExecutor(8) as pool:
        for result, wanted in zip(pool.map(lambda k: gm(x * k), range(20)), expected):
            np.testing.assert_array_equal(result, wanted)


def test_hooks_of_the_graph_module(net, x):
    gm = fx.symbolic_trace(net)
    plain = gm(x)
    handle = gm.register_forward_hook(lambda module, args, output: output * 0)
    first = gm.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    assert not gm(x).any()
    handle.remove()
    np.testing.assert_array_equal(gm(x), net(x + 1))
    first.remove()
    first.remove()
    np.testing.assert_array_equal(gm(x), plain)
    with pytest.raises(TypeError, match="hook: expected a callable"):
        gm.register_forward_hook(3)


def test_a_call_with_proxies_appends_the_graph():
    inner = fx.symbolic_trace(lambda a, b=1: F.relu(a) * b)
    graph = fx.Graph()
    x = fx.Proxy(graph.placeholder("x"))
    graph.output((inner(x) + inner(x.T, b=x)).node)
    assert [n.name for n in graph.nodes] == ["x", "relu", "mul", "getattr_1", "relu_1", "mul_1", "add", "output"]
    array = np.array([[1.0, -2.0], [3.0, 4.0]])
    expected = inner(array) + inner(array.T, array)
    np.testing.assert_array_equal(fx.GraphModule({}, graph)(array), expected)


def test_graphs_without_output_or_inputs():
    graph = fx.Graph()
    graph.placeholder("x")
    gm = fx.GraphModule({}, graph)
    assert gm(1) is None
    empty = fx.GraphModule({}, fx.Graph())
    assert empty() is None
    with pytest.raises(TypeError):
        empty(1)
