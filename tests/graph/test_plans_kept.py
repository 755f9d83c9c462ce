# SPDX-License-Identifier: BSD-3-Clause
"""prepare_layers: what must not be fused, what stays a call, sharing, and failures."""

from __future__ import annotations

import copy
import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn, testing
from pyconvbn import functional as F
from pyconvbn._pass_plans import prepare_layers
from pyconvbn.freeze_report import FreezeRow
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from plans_util import SHAPE, Net, calls, near, prepared, traced  # noqa: E402


# ---- what must not be fused ------------------------------------------------------------------------------------------
def conv_and(function: Callable[[Any, Any], Any], *shapes: Any) -> tuple[Any, list[FreezeRow]]:
    """Rows of a graph around one convolution of 4 channels that keeps sizes; numbers stay what they were."""
    gm = traced(Net(function, nn.Conv2d(4, 4, 3, padding=1)), *shapes)
    x = np.random.default_rng(7).normal(size=(2, 4, 5, 6)).astype(np.float32)
    wanted = gm(x.copy())
    rows = prepared(gm)
    got = gm(x.copy())
    for a, b in zip(got if isinstance(got, tuple) else [got], wanted if isinstance(wanted, tuple) else [wanted]):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    return gm, rows


ADD, RELU = "operator.add", "functional.relu"


def several(x: Any, conv: Any) -> Any:
    y = conv(x)
    return F.relu(y) + F.sigmoid(y)


def returned(x: Any, conv: Any) -> Any:
    y = conv(x)
    return y, F.relu(y)


def sum_returned(x: Any, conv: Any) -> Any:
    y = conv(x) + x
    return y, F.relu(y)


def written_between(x: Any, conv: Any) -> Any:
    y = conv(x)
    aten.mul_.Tensor(x, 2.0)
    return F.relu(y)


def written_before_the_sum(x: Any, conv: Any) -> Any:
    y = conv(x)
    aten.mul_.Tensor(x, 2.0)
    return F.relu(y + x)


def residual_written(x: Any, conv: Any) -> Any:
    other = x * 2.0
    y = conv(x) + other
    aten.mul_.Tensor(other, 2.0)
    return F.relu(y)


def view_written(x: Any, conv: Any) -> Any:
    y = conv(x)
    aten.mul_.Tensor(x[0], 2.0)
    return F.relu(y)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (several, ["layer", RELU, "functional.sigmoid", ADD]),
        (returned, ["layer", RELU]),
        (sum_returned, ["layer", RELU]),
        (written_between, ["layer", "aten.mul_.Tensor", RELU]),
        (written_before_the_sum, ["layer", "aten.mul_.Tensor", ADD, RELU]),
        (residual_written, ["operator.mul", "layer", "aten.mul_.Tensor", RELU]),
        (view_written, ["layer", "operator.getitem", "aten.mul_.Tensor", RELU]),
        (lambda x, conv: F.relu(conv(x) + x[:1]), ["layer", "operator.getitem", ADD, RELU]),
        (lambda x, conv: F.relu(conv(x) + 1.0), ["layer", ADD, RELU]),
        (lambda x, conv: aten.add.Tensor(conv(x), x, alpha=2), ["layer", "aten.add.Tensor"]),
        (lambda x, conv: F.add(conv(x), x, alpha=0.5), ["layer", "functional.add"]),
        (lambda x, conv: aten.add_.Tensor(x * 1.0, conv(x)), ["operator.mul", "layer", "aten.add_.Tensor"]),
        (lambda x, conv: conv(x) + x.astype(np.float64), ["layer", "call_method", ADD]),
        (lambda x, conv: F.hardtanh(conv(x), -1, 1), ["layer", "functional.hardtanh"]),
        (lambda x, conv: F.gelu(conv(x)), ["layer", "functional.gelu"]),
        (lambda x, conv: F.relu(conv(x) * x), ["layer", "operator.mul", RELU]),
    ],
)
def test_not_fused(function: Any, left: list[str]) -> None:
    gm, _ = conv_and(function, SHAPE)
    assert calls(gm) == left


@pytest.mark.parametrize("first", [True, False])
def test_iadd(first: bool) -> None:
    """It writes its first operand: fine if that is the layer's result, not if it is the other array."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    gm = traced(Net(lambda x, conv: conv(x) + x * 1.0 if first else x * 1.0 + conv(x), conv), SHAPE)
    (node,) = gm.graph.find_nodes(op="call_function", target=operator.add)
    node.target = operator.iadd
    prepared(gm)
    if first:
        assert calls(gm) == ["operator.mul", "layer"]
    else:
        assert calls(gm) == ["operator.mul", "layer", "operator.iadd"]
    x = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    near(gm(x), np.asarray(testing.reference_conv_bn(x, conv), np.float64) + x)


def test_doubled() -> None:
    def doubled(x: Any, conv: Any) -> Any:
        y = conv(x)
        return y + y

    gm, _ = conv_and(doubled, SHAPE)
    assert calls(gm) == ["layer", ADD]


def test_unknown_shapes_still_fuse_the_activation() -> None:
    gm, rows = conv_and(lambda x, conv: F.relu(conv(x)) + F.sigmoid(conv(x) + x))
    assert calls(gm) == ["layer", "layer", ADD, "functional.sigmoid", ADD]
    assert [row.node for row in rows] == ["layers_0", "relu", "layers_1"]


def test_the_layer_stands_where_the_last_one_stood() -> None:
    def function(x: Any, conv: Any) -> Any:
        y = conv(x)
        z = F.sigmoid(x)
        return F.relu(y + z)

    gm, _ = conv_and(function, SHAPE)
    assert calls(gm) == ["functional.sigmoid", "layer"]


def test_memory_of_what_was_fused_is_followed() -> None:
    """A later layer's residual is a layer whose result is written meanwhile."""

    def function(x: Any, conv: Any) -> Any:
        a = F.relu(conv(x))
        b = conv(x) + a
        aten.mul_.Tensor(a, 2.0)
        return F.relu(b)

    gm, _ = conv_and(function, SHAPE)
    assert calls(gm) == ["layer", "layer", "aten.mul_.Tensor", RELU]


# ---- what stays a call -----------------------------------------------------------------------------------------------
def test_weights_that_are_not_constant() -> None:
    w = np.ones((4, 4, 1, 1), np.float32)
    gm = traced(Net(lambda x, y: F.conv2d(x, y), inputs=2))
    (row,) = prepared(gm)
    assert (row.reason, row.blocking) == ("NONCONST", "y")

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(w.copy())

        def forward(self, x: Any) -> Any:
            aten.mul_.Tensor(self.weight, 2.0)
            return F.conv2d(x, self.weight)

    gm = traced(Written())
    assert [row.reason for row in prepared(gm)] == ["MUTATED"]
    x = np.ones((1, 4, 2, 2), np.float32)
    assert gm(x)[0, 0, 0, 0] * 2 == gm(x)[0, 0, 0, 0]

    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(w.copy())

        def forward(self, x: Any) -> Any:
            return F.conv2d(x, self.weight), self.weight.reshape(-1)

    assert [row.reason for row in prepared(traced(Returned()))] == ["ALIASES_OUTPUT"]


def test_dtypes() -> None:
    conv = nn.Conv2d(4, 4, 1)
    gm = traced(Net(lambda x, conv: conv(x), conv))
    _ = fx.shape_prop  # a graph whose input is known to be of another dtype cannot be propagated: it raises at run time
    _core.op_set_tensor(next(iter(gm.graph.nodes)), ((1, 4, 3, 3), "f", 8))
    assert [row.reason for row in prepared(gm)] == ["DTYPE"]


def test_geometry_computed_at_run_time() -> None:
    conv = nn.Conv2d(4, 4, 1)
    gm = traced(Net(lambda x, y, conv: F.conv2d(x, conv.weight, stride=(y, y)), conv, inputs=2))
    assert [row.reason for row in prepared(gm)] == ["NONCONST"]


def test_a_plan_that_cannot_be_made() -> None:
    w = np.ones((4, 3, 1, 1), np.float32)
    gm = traced(Net(lambda x: F.conv2d(x, w, groups=3)))
    (row,) = prepared(gm)
    assert row.reason == "UNSUPPORTED" and "groups" in row.hint
    with pytest.raises(ValueError, match="groups"):
        gm(np.ones((1, 9, 2, 2), np.float32))


def test_module_calls_are_left_alone() -> None:
    hooked = nn.Conv2d(3, 4, 1)
    hooked.register_forward_hook(lambda *args: None)
    gm = fx.symbolic_trace(nn.Sequential(hooked, nn.Conv2d(4, 4, 1), nn.ReLU()).eval())
    assert [row.reason for row in prepared(gm)] == ["HOOKED", "UNSUPPORTED"]


# ---- sharing, names, constants ---------------------------------------------------------------------------------------
def test_shared_weights_share_a_plan() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    gm, rows = conv_and(lambda x, conv: F.relu(conv(F.relu(conv(x)))) + conv(x), SHAPE)
    layers = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert len(layers) == 3 and layers[0] == layers[1] != layers[2]
    del conv
    assert len(rows) == 6


def test_plans_are_shared_with_and_without_a_residual() -> None:
    gm, _ = conv_and(lambda x, conv: F.relu(conv(x)) * F.relu(conv(x) + x), SHAPE)
    first, second = (gm.get_submodule(n.target) for n in gm.graph.nodes if n.op == "call_module")
    assert first is not second and first.plan is second.plan and not first.residual and second.residual


def test_constants_of_freezing_go() -> None:
    from pyconvbn import passes

    gm = traced(Net(lambda x, conv: F.relu(conv(x)), nn.Conv2d(4, 4, 3, padding=1)), SHAPE)
    passes.replace_params_with_constants(gm)
    names = [name for name in vars(gm) if name.startswith("_frozen_param")]
    assert names
    prepare_layers(gm)
    assert not [name for name in vars(gm) if name.startswith("_frozen_param")]
    assert not [name for name in gm._kinds if name.startswith("_frozen_param")]


def test_meta_and_shapes_stay() -> None:
    gm = traced(Net(lambda x, conv: F.relu(conv(x) + x), nn.Conv2d(4, 4, 3, padding=1)), SHAPE)
    last = list(gm.graph.nodes)[-2]
    last.meta["mine"] = 3
    prepare_layers(gm)
    (node,) = gm.graph.find_nodes(op="call_module")
    assert node.name == "layers_0" and node.meta["mine"] == 3
    assert _core.op_tensor(node) == (SHAPE, "f", 4)
    assert gm.get_submodule(node.target).input_shape == SHAPE


# ---- all or nothing --------------------------------------------------------------------------------------------------
def test_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _pass_plans

    gm = traced(Net(lambda x, one, two: two(F.relu(one(x))), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)), SHAPE)
    text, names = str(gm.graph), list(vars(gm))
    made: list[Any] = []

    def fail(*args: Any, **kwargs: Any) -> Any:
        made.append(args)
        if len(made) == 2:
            raise MemoryError("no memory")
        return pyconvbn.Plan(*args, **kwargs)

    monkeypatch.setattr(_pass_plans, "Plan", fail)
    rows: list[FreezeRow] = []
    with pytest.raises(MemoryError, match="no memory"):
        prepare_layers(gm, report=rows)
    assert (str(gm.graph), list(vars(gm)), rows, len(made)) == (text, names, [], 2)
    gm.graph.lint()


def test_a_graph_cannot_be_edited_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _pass_plans

    gm = traced(Net(lambda x, conv: conv(x), nn.Conv2d(4, 4, 1)), SHAPE)

    def edit(*args: Any, **kwargs: Any) -> Any:
        gm.graph.erase_node(list(gm.graph.nodes)[-1])

    monkeypatch.setattr(_pass_plans, "Plan", edit)
    with pytest.raises(RuntimeError):
        prepare_layers(gm)
    gm.graph.lint()


def test_type_errors() -> None:
    with pytest.raises(TypeError, match="expected a GraphModule"):
        prepare_layers(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plan: expected a Plan"):
        nn.FrozenLayer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: expected"):
        nn.FrozenLayer(pyconvbn.Plan(np.ones((2, 2), np.float32)), kind="x")


def test_without_memory() -> None:
    """Whichever allocation fails, the graph is what it was."""
    gm = traced(Net(lambda x, one, two: F.relu(one(x) + two(x)), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), SHAPE)
    text = str(gm.graph)
    for n in range(200):
        twin = copy.deepcopy(gm)
        names = list(vars(twin))
        _core._testing.alloc_fail_after(n)
        try:
            prepare_layers(twin)
        except MemoryError:
            _core._testing.alloc_fail_after(-1)
            assert str(twin.graph) == text and list(vars(twin)) == names
            twin.graph.lint()
        else:
            _core._testing.alloc_fail_after(-1)
            assert calls(twin) == ["layer", "layer"]
            break
        finally:
            _core._testing.alloc_fail_after(-1)
    else:
        raise AssertionError("it never had enough memory")
    assert n > 10
