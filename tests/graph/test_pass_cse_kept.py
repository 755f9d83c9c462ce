# SPDX-License-Identifier: BSD-3-Clause
"""Common subexpressions: parameters, modules, what has to stay, and failures."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn.freeze_report import FreezeRow
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from cse_util import Root, node_names, of, ones, outcomes, pair, run_cse, state  # noqa: E402


# ---- parameters and modules ------------------------------------------------------------------------------------------


def test_get_attr_nodes_of_one_array() -> None:
    """They stay, but what is computed from them is one computation; whatever the attribute's name."""
    weight = nn.Parameter(ones(2, 2))

    def from_attr(name: str) -> Callable[[fx.Graph, Any], Any]:
        return lambda g, x: g.call_function(F.linear, (x, g.get_attr(name)))

    root = Root(w=weight, v=weight, u=nn.Parameter(ones(2, 2)), view=weight[:])
    for a, b, merged in [("w", "w", 1), ("w", "v", 1), ("w", "u", 0), ("w", "view", 0)]:
        rows = pair(from_attr(a), from_attr(b), root)
        assert [row.node for row in rows if row.outcome == "done"] == ["linear_1"] * merged
    gm = of(lambda g, x: g.call_function(F.add, (from_attr("w")(g, x), from_attr("w")(g, x))), root)
    run_cse(gm)
    assert node_names(gm) == ["x", "w", "linear", "w_1", "add", "output"]


def test_get_attr_on_both_sides_of_a_write() -> None:
    def build(g: fx.Graph, x: Any) -> Any:
        first = g.call_function(F.linear, (x, g.get_attr("w")))
        g.call_method("add_", (g.get_attr("w"), 1))
        rest = [g.call_function(F.linear, (x, g.get_attr("w"))) for _ in range(2)]
        return g.call_function(F.cat, ([first, *rest],))

    gm = of(build, Root(w=nn.Parameter(ones(2, 2))))
    assert outcomes(run_cse(gm)) == [("linear_1", "MUTATED"), ("linear_2", "into linear_1")]


class Net(nn.Module):
    def __init__(self, *names: str, **modules: Any) -> None:
        super().__init__()
        self.names = names
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Any) -> Any:
        out = getattr(self, self.names[0])(x)
        for name in self.names[1:]:
            out = out + getattr(self, name)(x)
        return out * 1


def of_modules(*names: str, train: bool = False, **modules: Any) -> list[FreezeRow]:
    return run_cse(fx.symbolic_trace(Net(*names, **modules).train(train)))


MODULES: list[Callable[[], Any]] = [
    lambda: nn.Conv2d(2, 2, 3), lambda: nn.ConvTranspose2d(2, 2, 3), lambda: nn.Linear(4, 4), lambda: nn.BatchNorm2d(2),
    nn.ReLU, lambda: nn.MaxPool2d(2), nn.Dropout, nn.Identity, lambda: nn.BatchNorm2d(2, track_running_stats=False),
]


@pytest.mark.parametrize("make", MODULES, ids=lambda m: type(m()).__name__)
def test_a_module_called_twice(make: Callable[[], Any]) -> None:
    assert outcomes(of_modules("m", "m", "m", m=make())) == [("m_1", "into m"), ("m_2", "into m")]
    assert outcomes(of_modules("m", "m", m=make(), train=True)) == [("m_1", "TRAINING")]
    assert of_modules("m", "n", m=make(), n=make()) == []
    shared = make()
    assert len(of_modules("m", "n", m=shared, n=shared)) == 1, "one object under two names"


def test_hooks_and_unknown_modules() -> None:
    class Own(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: Any, qualified_name: str) -> bool:
            return True

    def rows(module: Any) -> list[FreezeRow]:
        net = Net("m", "m", m=module).eval()
        return run_cse(fx.GraphModule(net, Leaf().trace(net)))

    hooked = nn.Conv2d(2, 2, 3)
    hooked.forward = lambda x: x
    assert outcomes(rows(hooked)) == [("m_1", "HOOKED")]
    (row,) = rows(Own())
    assert row.reason == "UNKNOWN" and "not known" in row.hint
    assert outcomes(rows(nn.Conv2d(2, 2, 3))) == [("m_1", "into m")]


def test_module_arguments_by_name() -> None:
    conv = nn.ConvTranspose2d(2, 2, 3).eval()
    calls = [((), {}), ((None,), {}), ((), {"output_size": None}), (((6, 6),), {}), ((), {"output_size": (6, 6)})]

    def build(g: fx.Graph, x: Any) -> Any:
        nodes = [g.call_module("m", (x, *args), kwargs) for args, kwargs in calls]
        return g.call_function(F.cat, ([*nodes, g.call_module("m", (), {"input": x})],))

    rows = run_cse(of(build, Root(m=conv)))
    assert outcomes(rows) == [("m_1", "into m"), ("m_2", "into m"), ("m_4", "into m_3"), ("m_5", "into m")]


def test_weights_written_between_two_calls_of_a_module() -> None:
    def build(g: fx.Graph, x: Any) -> Any:
        first = g.call_module("m", (x,))
        g.call_method("mul_", (g.get_attr("m.weight"), 2))
        rest = [g.call_module("m", (x,)) for _ in range(2)]
        return g.call_function(F.cat, ([first, *rest],))

    gm = of(build, Root(m=nn.Linear(2, 2).eval()))
    rows = run_cse(gm)
    assert outcomes(rows) == [("m_1", "MUTATED"), ("m_2", "into m_1")]
    assert rows[0].blocking == "mul_"


def test_what_is_handed_a_module_may_change_it() -> None:
    def change(module: Any) -> None:
        module.negative_slope += 1.0

    def build(g: fx.Graph, x: Any) -> Any:
        first = g.call_module("m", (x,))
        g.call_function(change, (g.call_function(getattr, (g.get_attr("holder"), "m")),))
        return g.call_function(F.cat, ([first, *(g.call_module("m", (x,)) for _ in range(2))],))

    slope = nn.LeakyReLU(0.5).eval()
    gm = of(build, Root(m=slope, holder=Root(m=slope)))
    want = gm(-ones(2))
    slope.negative_slope = 0.5
    rows = run_cse(gm)
    assert outcomes(rows) == [("m_1", "MUTATED"), ("m_2", "into m_1")] and rows[0].blocking == "change"
    np.testing.assert_array_equal(gm(-ones(2)), want)


def test_a_module_that_binds_its_attribute_anew() -> None:
    """Two get_attr nodes of one attribute, a call between them that may have put another array there."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", ones(2))

        def forward(self, x: Any) -> Any:
            self.w = self.w + 1
            return x * 1

    def build(g: fx.Graph, x: Any) -> Any:
        old = g.get_attr("m.w")
        g.call_module("m", (g.call_function(operator.mul, (x, 3)),))
        a = g.call_function(operator.mul, (old, 2))
        b = g.call_function(operator.mul, (g.get_attr("m.w"), 2))
        return g.call_function(operator.sub, (b, a))

    gm = of(build, Root(m=Own().eval()))
    assert run_cse(gm) == []
    np.testing.assert_array_equal(gm(ones(2)), 2 * ones(2))


def test_batch_norm_and_convolution_as_functions() -> None:
    m, v, w = np.zeros(2, np.float32), ones(2), ones(2, 2, 1, 1)
    assert len(pair(lambda g, x: g.call_function(F.conv2d, (x, w)))) == 1
    bn = lambda training: lambda g, x: g.call_function(F.batch_norm, (x, m, v), {"training": training})  # noqa: E731
    assert outcomes(pair(bn(False))) == [("batch_norm_1", "into batch_norm")]
    assert outcomes(pair(bn(True))) == [("batch_norm_1", "TRAINING")]
    flag = lambda g, x: g.call_function(F.batch_norm, (x, m, v, None, None, x))  # noqa: E731
    assert outcomes(pair(flag)) == [("batch_norm_1", "TRAINING")]
    legit = aten._native_batch_norm_legit_no_training.default
    tuples = lambda g, x: g.call_function(  # noqa: E731
        operator.getitem, (g.call_function(legit, (x, None, None, m, v, 0.1, 0.1)), 0))
    assert len(pair(tuples)) == 2


@pytest.mark.parametrize("one", [True, False])
def test_batches_that_a_batch_norm_counts(one: bool) -> None:
    """In training it writes that too, whether one node reads it or two."""

    def build(g: fx.Graph, x: Any) -> Any:
        count = g.get_attr("bn.num_batches_tracked")
        before = g.call_function(operator.mul, (count, 2))
        y = g.call_module("bn", (x,))
        after = g.call_function(operator.mul, (count if one else g.get_attr("bn.num_batches_tracked"), 2))
        return y, g.call_function(operator.sub, (after, before))

    gm = of(build, Root(bn=nn.BatchNorm1d(2).train()))
    assert outcomes(run_cse(gm)) == [("mul_1", "MUTATED")]
    assert gm(ones(3, 2))[1] == 2


def test_fused_calls() -> None:
    """The efficient pass makes two get_attr nodes for each call; equal calls are found through them."""
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Any) -> Any:
            return self.bn(self.conv(x)) + self.bn(self.conv(x))

    for change, reason in [(lambda net: None, "OK"), (lambda net: net.bn.train(), "TRAINING")]:
        net = Twice().eval()
        gm = fx.symbolic_trace(net)
        passes.efficient_conv_bn_eval(gm)
        change(gm)
        (row,) = run_cse(gm)
        assert (row.node, row.reason) == ("efficient_conv_bn_eval_1", reason)


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_random_operators() -> None:
    random = lambda g, x: g.call_function(aten.rand_like.default, (x,))  # noqa: E731
    assert outcomes(pair(random)) == [("rand_like_default_1", "RANDOM")]
    for training, outcome in [(False, "into dropout"), (True, "RANDOM")]:
        drop = lambda g, x, t=training: g.call_function(F.dropout, (x, 0.5, t))  # noqa: E731
        assert outcomes(pair(drop)) == [("dropout_1", outcome)]
    flag = lambda g, x: g.call_function(F.dropout, (x, 0.5, x))  # noqa: E731
    assert outcomes(pair(flag)) == [("dropout_1", "RANDOM")]


def test_unknown_operators() -> None:
    def nobody_knows(x: Any, y: Any = 1) -> Any:
        return x * y

    assert outcomes(pair(lambda g, x: g.call_function(nobody_knows, (x,)))) == [("nobody_knows_1", "UNKNOWN")]
    assert outcomes(pair(lambda g, x: g.call_method("nobody_knows", (x,)))) == [("nobody_knows_1", "UNKNOWN")]
    assert pair(lambda g, x: g.call_function(nobody_knows, (x, len(g)))) == []
    bad = lambda g, x: g.call_function(F.relu, (x, x, x))  # noqa: E731
    assert outcomes(pair(bad)) == [("relu_1", "UNSUPPORTED")]


def test_in_place_operators_and_out() -> None:
    add = lambda g, x: g.call_method("add_", (x, 1))  # noqa: E731
    assert outcomes(pair(add)) == [("add__1", "IMPURE")]
    buffer = ones(2)
    out = lambda g, x: g.call_function(F.relu, (x,), {"out": buffer})  # noqa: E731
    assert outcomes(pair(out)) == [("relu_1", "IMPURE")]
    assert outcomes(pair(lambda g, x: g.call_function(operator.setitem, (x, 0, 1)))) == [("setitem_1", "IMPURE")]


def test_what_is_returned_stays_two_objects() -> None:
    gm = fx.symbolic_trace(lambda x: (x + 1, x + 1, F.relu(x + 1)))
    rows = run_cse(gm)
    assert outcomes(rows) == [("add_1", "ALIASES_OUTPUT"), ("add_2", "ALIASES_OUTPUT")]
    assert rows[1].blocking == "add", "the value it equals is returned"
    a, b, _ = gm(ones(2))
    assert a is not b and not np.shares_memory(a, b)


def test_a_view_of_what_is_returned() -> None:
    gm = fx.symbolic_trace(lambda x: (F.relu(x)[0], F.relu(x)[0], F.relu(x)[0] + 1, F.relu(x)[0] + 1))
    rows = run_cse(gm)
    a, b, *_ = gm(ones(2, 2))
    assert not np.shares_memory(a, b)
    assert outcomes(rows) == [("relu_1", "ALIASES_OUTPUT"), ("relu_2", "ALIASES_OUTPUT"), ("relu_3", "into relu_2"),
                              ("getitem_3", "into getitem_2"), ("add_1", "ALIASES_OUTPUT")]


def test_regions_of_a_mutation() -> None:
    """Equal nodes merge on each side of a write to their input, never across."""

    def forward(x: Any) -> Any:
        a, b = x * 2, x * 2
        aten.add_.Tensor(x, 1)
        c, d = x * 2, x * 2
        aten.add_.Tensor(x, 2)
        e, f = x * 2, x * 2
        return a + b + c + d + e + f

    gm = fx.symbolic_trace(forward)
    assert outcomes(run_cse(gm)) == [("mul_1", "into mul"), ("mul_2", "MUTATED"), ("mul_3", "into mul_2"),
                                     ("mul_4", "MUTATED"), ("mul_5", "into mul_4")]
    rows: list[FreezeRow] = []
    passes.cse(gm, report=rows)
    assert [row.blocking for row in rows] == ["add__tensor", "add__tensor_1"]
    x = np.arange(3.0)
    np.testing.assert_array_equal(gm(x), 12 * np.arange(3.0) + 16)
    np.testing.assert_array_equal(x, np.arange(3.0) + 3)


@pytest.mark.parametrize("write", [
    lambda g, x: g.call_function(operator.setitem, (x, 0, 7)),
    lambda g, x: g.call_function(operator.iadd, (g.call_function(operator.getitem, (x, 0)), 1)),
    lambda g, x: g.call_function(aten.mul_.Tensor, (g.call_method("reshape", (x, -1)), 2)),
    lambda g, x: g.call_function(aten.zero_.default, (g.call_function(getattr, (x, "T")),)),
    lambda g, x: g.call_function(aten.relu_.default, (x,)), lambda g, x: g.call_function(F.relu, (x,), {"out": x}),
    lambda g, x: g.call_function(operator.iadd, (x, 1)), lambda g, x: g.call_method("sort", (x,)),
], ids=["setitem", "item", "reshape", "T", "relu_", "out", "iadd", "sort"])  # fmt: skip
def test_a_write_through_a_view_of_the_input(write: Callable[[Any, Any], Any]) -> None:
    def build(g: fx.Graph, x: Any) -> Any:
        a = g.call_function(operator.sub, (x, 3))
        write(g, x)
        return g.call_function(operator.mul, (a, g.call_function(operator.sub, (x, 3))))

    gm = of(build)
    x = np.array([[1.0, -1.0], [3.0, 2.0]])
    want = gm(x.copy())
    rows = run_cse(gm)
    assert [(row.node, row.reason) for row in rows][-1] == ("sub_1", "MUTATED")
    np.testing.assert_array_equal(gm(x.copy()), want)
    assert not np.array_equal((x - 3) ** 2, want), "the write makes a difference"


def test_values_that_are_written_themselves() -> None:
    def forward(x: Any) -> Any:
        a, b, c = x + 1, x + 1, x + 1
        aten.mul_.Tensor(a, 2)
        return a * b * c

    gm = fx.symbolic_trace(forward)
    rows = run_cse(gm)
    assert outcomes(rows) == [("add_1", "MUTATED"), ("add_2", "into add_1")]
    assert rows[0].blocking == "mul__tensor"
    np.testing.assert_array_equal(gm(ones(2)), 16 * ones(2))


def test_views_of_written_memory_stay() -> None:
    def forward(x: Any) -> Any:
        a, b = x[0], x[0]
        b.add_(1)
        return a * 1

    assert outcomes(run_cse(fx.symbolic_trace(forward))) == [("getitem_1", "MUTATED")]


@pytest.mark.parametrize("method, args", [("append", (1,)), ("pop", ()), ("clear", ()), ("reverse", ()), ("insert", (0, 1))])
def test_lists_that_methods_change(method: str, args: tuple[Any, ...]) -> None:
    def build(g: fx.Graph, x: Any) -> Any:
        a, b = (g.call_method("tolist", (x,)) for _ in range(2))
        g.call_method(method, (b, *args))
        return g.call_function(operator.add, (g.call_function(len, (a,)), g.call_function(len, (b,))))

    gm = of(build)
    want = gm(np.arange(3.0))
    rows = run_cse(gm)
    assert outcomes(rows) == [("tolist_1", "MUTATED")]
    assert gm(np.arange(3.0)) == want


def test_arrays_among_the_literals() -> None:
    table = np.arange(2.0)

    def build(g: fx.Graph, x: Any) -> Any:
        a = g.call_function(F.add, (x, table))
        g.call_function(operator.iadd, (table[:1], 5))
        b = g.call_function(F.add, (x, table))
        return g.call_function(F.mul, (a, b))

    assert outcomes(run_cse(of(build))) == [("add_1", "MUTATED")]


def test_a_graph_that_compares_identity() -> None:
    def build(g: fx.Graph, x: Any) -> Any:
        a, b = (g.call_function(operator.mul, (x, 2)) for _ in range(2))
        return g.call_function(operator.is_, (a, b))

    gm = of(build)
    (row,) = run_cse(gm)
    assert (row.node, row.reason, row.blocking) == ("mul_1", "UNSUPPORTED", "is_") and "one object" in row.hint
    assert gm(ones(2)) is False
    to_none = of(lambda g, x: g.call_function(operator.is_, (g.call_function(operator.mul, (x, 2)), None)))
    assert run_cse(to_none) == []


def test_inputs_are_never_merged() -> None:
    gm = fx.symbolic_trace(lambda x, y: F.relu(x) + F.relu(y))
    assert run_cse(gm) == []


def test_without_report_and_wrong_arguments() -> None:
    gm = fx.symbolic_trace(lambda x: F.relu(x) + F.relu(x))
    assert passes.cse(gm) is True
    assert passes.PASSES["cse"] is passes.cse
    with pytest.raises(TypeError, match="gm: expected a GraphModule"):
        passes.cse(gm.graph)
    assert passes.cse(fx.symbolic_trace(lambda x: x)) is False


# ---- failures --------------------------------------------------------------------------------------------------------


def busy() -> Any:
    """Merges, a rewritten list, kept nodes, modules."""
    net = Root(m=nn.Conv2d(2, 2, 1), w=nn.Parameter(ones(2)))
    net.eval()

    def build(g: fx.Graph, x: Any) -> Any:
        many = [g.call_function(F.mul, (g.call_module("m", (x,)), 3)) for _ in range(9)]
        attrs = [g.call_function(F.relu, (g.get_attr("w"),)) for _ in range(2)]
        return g.call_function(F.cat, ([*many, *attrs],)), many[0]

    return of(build, net)


def test_allocation_failures_change_nothing() -> None:
    for n in range(500):
        gm = busy()
        before = state(gm)
        report: list[FreezeRow] = []
        _core._testing.alloc_fail_after(n)
        try:
            passes.cse(gm, report=report)
        except MemoryError:
            _core._testing.alloc_fail_after(-1)
            assert state(gm) == before and report == []
            gm.graph.lint()
            continue
        finally:
            _core._testing.alloc_fail_after(-1)
        break
    else:
        pytest.fail("it never got through")
    assert n > 5 and len(gm.graph) < len(before)


def test_a_module_that_raises_changes_nothing() -> None:
    class Angry(Root):
        calm = True

        @property
        def temper(self) -> Any:
            if not self.calm:
                raise RuntimeError("not now")
            return ones(2)

    root = Angry()

    def build(g: fx.Graph, x: Any) -> Any:
        a = [g.call_function(F.relu, (x,)) for _ in range(2)]
        return g.call_function(F.cat, ([*a, g.get_attr("temper")],))

    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    gm = fx.GraphModule(root, graph)
    type(gm).temper = Angry.temper
    type(gm).calm = False
    before = state(gm)
    with pytest.raises(RuntimeError, match="not now"):
        passes.cse(gm)
    assert state(gm) == before


def test_the_user_s_insertion_point_survives() -> None:
    gm = fx.symbolic_trace(lambda x: F.relu(x) * F.relu(x))
    relu = next(node for node in gm.graph.nodes if node.name == "relu_1")
    with gm.graph.inserting_before(relu):
        passes.cse(gm)
        made = gm.graph.call_function(math.floor, (1.5,))
    assert [node.name for node in gm.graph.nodes][:3] == ["x", "relu", made.name]
    gm.graph.lint()
