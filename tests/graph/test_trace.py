# SPDX-License-Identifier: BSD-3-Clause
"""symbolic_trace and Tracer: what becomes which node, arrays and modules by identity, and what is left behind."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import weakref
from math import sqrt

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx, nn


def ops(graph):
    return [(node.op, node.target if isinstance(node.target, str) else node.target.__name__) for node in graph.nodes]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def test_modules_are_leaves_and_shared():
    model = Small()
    gm = fx.symbolic_trace(model)
    assert ops(gm.graph) == [("placeholder", "x"), ("call_module", "conv"), ("call_module", "bn"),
                             ("call_function", "relu"), ("output", "output")]
    assert gm.conv is model.conv and gm.bn is model.bn and type(gm.graph) is fx.Graph


def test_own_subclasses_are_looked_into():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) * 2

    class Renamed(nn.Conv2d):
        pass

    model = nn.Sequential(Scaled(1, 1, 1), Renamed(1, 1, 1))
    gm = fx.symbolic_trace(model)
    assert [name for op, name in ops(gm.graph) if op == "get_attr"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    x = np.ones((1, 1, 2, 2), np.float32)
    np.testing.assert_array_equal(gm(x), model(x))

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)

    assert [name for op, name in ops(Leaves().trace(model)) if op == "call_module"] == ["0", "1"]


def test_arrays_are_the_very_arrays():
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.weight = nn.Parameter(np.ones(2))
    model.inner.register_buffer("buffer", np.ones(2))
    model.inner.plain = np.ones(2)
    loose = np.ones(2)
    model.forward = lambda x: (x * model.inner.weight + model.inner.buffer) * model.inner.plain - loose + loose
    gm = fx.symbolic_trace(model)
    found = {name: fx.Interpreter(gm).fetch_attr(name) for op, name in ops(gm.graph) if op == "get_attr"}
    assert list(found) == ["inner.weight", "inner.buffer", "inner.plain", "_tensor_constant0"]
    assert found["inner.weight"] is model.inner.weight and found["inner.buffer"] is model.inner.buffer
    assert found["inner.plain"] is model.inner.plain and found["_tensor_constant0"] is loose
    model.inner.weight *= 5
    assert gm(np.ones(2)).tolist() == [6.0, 6.0]


def test_a_failed_trace_leaves_nothing_behind():
    model = Small()
    call, attribute = nn.Module.__call__, nn.Module.__getattribute__
    math_names, global_sqrt = dict(vars(math)), sqrt

    def forward(x):
        y = x + np.ones(3)
        return y if y.sum() > sqrt(2) else x

    model.forward = forward
    before = set(vars(model))
    with pytest.raises(fx.TraceError):
        fx.symbolic_trace(model)
    assert set(vars(model)) == before
    assert nn.Module.__call__ is call and nn.Module.__getattribute__ is attribute
    assert "__getattribute__" not in vars(nn.Module)
    assert vars(math) == math_names and sqrt is global_sqrt
    with pytest.raises(ZeroDivisionError):
        fx.symbolic_trace(lambda x: x / (1 // 0))
    assert nn.Module.__call__ is call and vars(math) == math_names


def test_parameters_by_name_and_shape_constants():
    model = nn.Module()
    model.weight = nn.Parameter(np.ones((2, 3)))
    model.forward = lambda x: x.reshape(model.weight.shape[1], -1) + model.get_parameter("weight").shape[0]
    assert "getattr" in [name for _, name in ops(fx.Tracer().trace(model))]
    graph = fx.Tracer(param_shapes_constant=True).trace(model)
    assert "getattr" not in [name for _, name in ops(graph)]
    (reshape,) = [node for node in graph.nodes if node.op == "call_method"]
    assert tuple(reshape.args)[1:] == (3, -1)
    model.forward = lambda x: x if len(model.weight) == 2 and model.weight.ndim == 2 and model.weight.size == 6 else 1
    assert len(list(fx.Tracer(param_shapes_constant=True).trace(model).nodes)) == 3


def test_signature_defaults_stars_and_annotations():
    def f(x: int, y=2, /, z=3, *rest, flag: bool = True, **more) -> float:
        return x + y + z, rest, flag, more

    graph = fx.symbolic_trace(f).graph
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    assert [(n.target, tuple(n.args)) for n in holders] == [
        ("x", ()), ("y", (2,)), ("z", (3,)), ("*rest", ()), ("flag", (True,)), ("**more", ())
    ]
    assert [n.type for n in holders[:1]] == ["int"]
    gm = fx.symbolic_trace(f)
    assert gm(1) == f(1)
    assert gm(1, 5, z=6, flag=False, other=4)[0] == 12
    assert gm(1, 5, 6, 8, 9, flag=False, a=1) == f(1, 5, 6, 8, 9, flag=False, a=1) == (12, (8, 9), False, {"a": 1})


def test_stars_of_methods_closures_and_decorated_functions():
    class Model(nn.Module):
        def forward(self, *args, **kwargs):
            return args[0] + kwargs["b"] + offset

    offset = 10
    assert fx.symbolic_trace(Model())(1, b=2) == 13

    def decorate(fn):
        import functools

        @functools.wraps(fn)
        def inner(*args):
            return fn(*args)

        return inner

    plain = fx.symbolic_trace(decorate(lambda x, y: x * y))
    assert ops(plain.graph)[:2] == [("placeholder", "x"), ("placeholder", "y")] and plain(3, 4) == 12
    with pytest.raises(TypeError, match="args"):
        fx.symbolic_trace(decorate(lambda *many: many[0]))


def test_concrete_args_are_no_parameters():
    def f(x, double=False, k=None, *, shift=0):
        if k is None and double:
            return x * 2 + shift
        return x

    gm = fx.symbolic_trace(f, concrete_args={"double": True, "k": None})
    assert [n.name for n in gm.graph.nodes] == ["x", "shift", "mul", "add", "output"]
    assert gm(3, shift=1) == 7
    with pytest.raises(TypeError):
        gm(3, 1, 2)
    with pytest.raises(ValueError, match="concrete_args.*'other'"):
        fx.symbolic_trace(f, concrete_args={"other": 1})


def test_roots_that_are_not_modules(torch):
    class Call:
        def __call__(self, x):
            return x + 1

    assert fx.symbolic_trace(Call())(2) == 3
    assert fx.symbolic_trace(F.relu)(np.array([-1.0])).tolist() == [0.0]
    model = Small().eval()
    x = np.ones((1, 3, 4, 4), np.float32)
    np.testing.assert_array_equal(fx.symbolic_trace(model.forward)(x), model(x))
    for root in (3, "model", None, [model]):
        with pytest.raises(TypeError, match="root: expected a Module or a function"):
            fx.symbolic_trace(root)
    with pytest.raises(TypeError, match="from_torch"):
        fx.symbolic_trace(torch.nn.Linear(1, 1))


def test_torch_modules_inside_are_leaves(torch):
    model = nn.Module()
    model.theirs = torch.nn.Sequential(torch.nn.ReLU())
    call = torch.nn.Module.__call__
    model.forward = lambda x: model.theirs(x) + model.theirs[0](x)
    graph = fx.Tracer().trace(model)
    assert [name for op, name in ops(graph) if op == "call_module"] == ["theirs", "theirs.0"]
    assert torch.nn.Module.__call__ is call


def test_a_module_from_elsewhere():
    other = nn.ReLU()
    with pytest.raises(NameError, match="no submodule"):
        fx.symbolic_trace(lambda x: other(x))
    # without a proxy it just computes
    gm = fx.symbolic_trace(lambda x: x + other(np.array([-1.0, 2.0])))
    assert gm(1.0).tolist() == [1.0, 3.0]


def test_modules_made_while_tracing_are_found():
    class Lazy(nn.Module):
        def forward(self, x):
            self.act = nn.ReLU()
            return self.act(x)

    assert ops(fx.symbolic_trace(Lazy()).graph)[1] == ("call_module", "act")


def test_modules_and_dataclasses_as_arguments():
    @dataclasses.dataclass
    class Box:
        a: object
        b: int = 3

    @fx.wrap
    def use(module, box):
        return module(box.a) * box.b

    model = nn.Module()
    model.act = nn.ReLU()
    model.forward = lambda x: use(model.act, Box(x + 1))
    gm = fx.symbolic_trace(model)
    assert ("get_attr", "act") in ops(gm.graph)
    assert gm(np.array([1.0, -9.0])).tolist() == [6.0, 0.0]


def test_math_functions_and_wrap():
    def f(x, n):
        return x * sqrt(n) + math.floor(n) + math.sqrt(4.0)

    gm = fx.symbolic_trace(f)
    assert [t for _, t in ops(gm.graph)] == ["x", "n", "sqrt", "mul", "floor", "add", "add", "output"]
    assert gm(2.0, 9.0) == f(2.0, 9.0)

    @fx.wrap
    def opaque(values, *, scale=1):
        return sum(v for v in values) * scale

    gm = fx.symbolic_trace(lambda x: opaque([x, x], scale=x) + opaque([1, 2]))
    assert [t for _, t in ops(gm.graph)] == ["x", "opaque", "add", "output"]
    assert gm(2) == 11
    assert opaque([3, 4], scale=2) == 14
    for bad in (3, None):
        with pytest.raises(TypeError, match="fn_or_name"):
            fx.wrap(bad)
    with pytest.raises(NotImplementedError, match="module level"):
        fx.wrap("len")


def test_wrap_by_name_at_module_level():
    scope: dict = {"__name__": "made_up", "fx": fx}
    source = "fx.wrap('len')\ndef helper(x):\n    return x if x else 0\n"
    source += "fx.wrap(helper)\nf = lambda x: len(x) + helper(x)\n"
    exec(source, scope)
    gm = fx.symbolic_trace(scope["f"])
    assert [t for _, t in ops(gm.graph)] == ["x", "len", "helper", "add", "output"]
    assert gm([1, 2, 3][:0]) == 0 and "len" not in scope
    assert gm.graph.find_nodes(op="call_function", target=len)


def test_writing_into_what_tracing_made_is_refused():
    def accumulate(x):
        total = np.zeros(3)
        total += x
        return total

    with pytest.raises(fx.TraceError, match="made while tracing"):
        fx.symbolic_trace(accumulate)
    with pytest.raises(fx.TraceError, match="made while tracing"):
        fx.symbolic_trace(lambda x: F.relu(x, out=np.zeros(3)))
    model = nn.Module()
    model.register_buffer("total", np.zeros(3))

    def forward(x):
        total = model.total
        total += x
        return total

    model.forward = forward
    gm = fx.symbolic_trace(model)
    gm(np.ones(3))
    assert gm(np.ones(3)).tolist() == [2.0, 2.0, 2.0] and model.total.tolist() == [2.0, 2.0, 2.0]


def test_source_lines_are_kept():
    def f(x):
        y = x + 1
        return F.relu(y)

    first = f.__code__.co_firstlineno
    graph = fx.symbolic_trace(f).graph
    lines = {node.name: node.meta.get("stack_trace") for node in graph.nodes}
    assert lines["add"] == f'File "{__file__}", line {first + 1}, in f'
    assert lines["relu"] == f'File "{__file__}", line {first + 2}, in f'
    assert lines["x"] is None
    assert "containers.py" in list(fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph.nodes)[1].meta["stack_trace"]

    class Own(fx.Tracer):  # its methods are not the traced code
        def create_node(self, *args, **kwargs):
            return super().create_node(*args, **kwargs)

        def create_arg(self, a):
            return super().create_arg(a)

    assert {node.name: node.meta.get("stack_trace") for node in Own().trace(f).nodes} == lines
    graph = fx.Tracer(record_stack_traces=False).trace(f)
    assert all("stack_trace" not in node.meta for node in graph.nodes)


def test_hooks_are_part_of_what_is_traced():
    class Inner(nn.Module):
        def forward(self, x):
            return x + 1

    model = nn.Sequential(Inner(), nn.ReLU())
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output - 3)
    gm = fx.symbolic_trace(model)
    assert [t for _, t in ops(gm.graph)] == ["input", "mul", "add", "1", "sub", "output"]
    x = np.array([4.0])
    assert gm(x).tolist() == model(x).tolist() == [6.0]


def test_a_graph_module_inside_and_as_root():
    inner = fx.symbolic_trace(Small())
    outer = nn.Sequential(inner, nn.ReLU())
    gm = fx.symbolic_trace(outer)
    assert [t for _, t in ops(gm.graph)] == ["input", "0.conv", "0.bn", "relu", "1", "output"]
    again = fx.symbolic_trace(gm)
    assert ops(again.graph) == ops(gm.graph)


def test_tracing_inside_of_tracing():
    def f(x):
        inner = fx.symbolic_trace(lambda y: y * 3)
        return inner.graph and x + len(list(inner.graph.nodes))

    gm = fx.symbolic_trace(f)
    assert [t for _, t in ops(gm.graph)] == ["x", "add", "output"] and gm(1) == 4


def test_a_graph_module_made_while_tracing_holds_arrays():
    model = nn.Module()
    model.weight = nn.Parameter(np.ones(2))
    made = []

    def forward(x):
        gm = fx.symbolic_trace(part)
        made.append(vars(gm)["weight"])
        return x + model.weight

    part = nn.Module()
    part.weight = model.weight
    part.forward = lambda y: y * part.weight
    model.forward = forward
    assert fx.symbolic_trace(model)(np.ones(2)).tolist() == [2.0, 2.0]
    assert made[0] is model.weight


def test_defaults_that_are_no_literals():
    weight = np.ones(2)
    gm = fx.symbolic_trace(lambda x, w=weight, sizes=[1, 2]: (x * w, sizes))  # noqa: B006
    assert [n.op for n in gm.graph.nodes][:3] == ["placeholder"] * 3
    weight[0] = 5
    product, sizes = gm(np.ones(2))
    assert product.tolist() == [5.0, 1.0] and list(sizes) == [1, 2]
    assert gm(np.ones(2), np.zeros(2))[0].tolist() == [0.0, 0.0]


def test_other_threads_do_not_notice():
    model = Small().eval()
    x = np.ones((1, 3, 4, 4), np.float32)
    expected, results, errors = model(x), [], []
    inside, done = threading.Event(), threading.Event()

    def run():
        inside.wait(10)
        try:
            results.append((model(x), math.sqrt(4.0), model.conv.weight))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()

    def f(x):
        inside.set()
        assert done.wait(10)
        return x + 1

    fx.symbolic_trace(f)
    thread.join()
    assert not errors
    np.testing.assert_array_equal(results[0][0], expected)
    assert results[0][1] == 2.0 and results[0][2] is model.conv.weight


def test_many_threads_trace_at_once():
    model = nn.Sequential(*(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()) for _ in range(20)))
    expected = ops(fx.symbolic_trace(model).graph)
    results = []
    threads = [threading.Thread(target=lambda: results.append(ops(fx.symbolic_trace(model).graph))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 6
    assert "__getattribute__" not in vars(nn.Module)


def test_tracer_hooks_of_torch_are_there():
    seen = []

    class Watch(fx.Tracer):
        def create_node(self, *args, **kwargs):
            seen.append(args[0])
            return super().create_node(*args, **kwargs)

        def call_module(self, m, forward, args, kwargs):
            seen.append(self.path_of_module(m))
            return super().call_module(m, forward, args, kwargs)

        def to_bool(self, obj):
            return True

        def iter(self, obj):
            return iter([obj[0], obj[1]])

        def create_arg(self, a):
            return 7 if isinstance(a, str) and a == "seven" else super().create_arg(a)

    def forward(x):
        return [model.act(v) for v in x] if x.any() else "seven", "seven"

    model = nn.Module()
    model.act = nn.ReLU()
    model.forward = forward
    graph = Watch().trace(model)
    assert seen == ["placeholder", "call_method", "call_function", "call_function", "act", "call_module", "act",
                    "call_module", "output"]
    assert list(graph.nodes)[-1].args[0][1] == 7


def test_a_trace_keeps_nothing_alive():
    model = Small()
    gm = fx.symbolic_trace(model)
    refs = [weakref.ref(gm), weakref.ref(model), weakref.ref(model.conv), weakref.ref(gm.graph)]
    del gm, model
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


def test_deep_nesting_and_self_reference_are_clean_errors():
    nested: list = []
    nested.append(nested)
    with pytest.raises(RecursionError):
        fx.symbolic_trace(lambda x: x.use(nested))
    assert "__getattribute__" not in vars(nn.Module)
