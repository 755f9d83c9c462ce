# SPDX-License-Identifier: BSD-3-Clause
"""lower_modules: module calls become operators, in place."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn, passes
from pyconvbn._lower import lower_modules
from pyconvbn.freeze_report import FreezeRow

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import KINDS, randomise, sample  # noqa: E402

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **{kind: (make, shape) for kind, (make, _, shape) in KINDS.items()},
    "conv_no_bias": (lambda: nn.Conv2d(3, 4, (3, 1), stride=(2, 1), bias=False), (2, 3, 7, 5)),
    "conv_same": (lambda: nn.Conv2d(3, 3, 4, padding="same", groups=3), (2, 3, 7, 5)),
    "conv_valid": (lambda: nn.Conv1d(3, 3, 4, padding="valid"), (2, 3, 7)),
    "conv_reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 7, 5)),
    "conv_circular": (lambda: nn.Conv1d(3, 4, 3, padding=0, padding_mode="circular"), (2, 3, 7)),
    "unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 5)),
    "linear_3d": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "output_padding": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5, 4)),
    "bn1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "bn2d": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 2, 2)),
    "bn3d": (lambda: nn.BatchNorm3d(3, affine=False), (4, 3, 2, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(3), (4, 3, 2)),
    **{name: (getattr(nn, name), (2, 3, 4)) for name in ("ReLU", "ReLU6", "SiLU", "Hardswish", "Sigmoid", "GELU")},
    "gelu_tanh": (lambda: nn.GELU("tanh"), (2, 3, 4)),
    "leaky": (lambda: nn.LeakyReLU(0.25), (2, 3, 4)),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 3, 8, 7)),
    "avg_pool": (lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False, divisor_override=3), (2, 3, 8, 6)),
    "avg_pool1d": (lambda: nn.AvgPool1d(2), (2, 3, 8)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((1, 2)), (2, 3, 8, 6)),
    "flatten": (lambda: nn.Flatten(1), (2, 3, 4)),
    "upsample": (lambda: nn.Upsample(scale_factor=(2.0, 3.0)), (2, 3, 4, 5)),
}


class Two(nn.Module):
    """The layer called twice, in different ways."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(layer)

    def forward(self, x: Any) -> Any:
        return self.inner[0](x), self.inner[0](input=x)


def lowered(module: Any, *shapes: Any) -> tuple[Any, list[FreezeRow]]:
    gm = fx.symbolic_trace(module)
    if shapes:
        fx.shape_prop(gm, *shapes)
    rows: list[FreezeRow] = []
    changed = lower_modules(gm, report=rows)
    gm.graph.lint()
    assert changed == sum(row.outcome == "done" for row in rows)
    assert all(row.step == "lower" and (row.reason == "OK") == (row.outcome == "done") for row in rows)
    assert all(row.hint for row in rows if row.outcome == "kept")
    return gm, rows


@pytest.mark.parametrize("shapes", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, shapes: bool) -> None:
    make, shape = LAYERS[name]
    rng = np.random.default_rng(3)
    net = randomise(Two(make()), rng)
    x = rng.normal(size=shape).astype(np.float32)
    before = fx.symbolic_trace(net)
    names = [node.name for node in before.graph.nodes if node.op == "call_module"]
    gm, rows = lowered(net, *([shape] if shapes else []))
    assert [row.node for row in rows] == names
    assert all(row.outcome == "done" and row.into.startswith("aten.") for row in rows)
    assert not gm.graph.find_nodes(op="call_module")
    nodes = {node.name: node for node in gm.graph.nodes}
    for got, wanted, called in zip(gm(x), net(x), names):
        np.testing.assert_array_equal(got, wanted)
        assert nodes[called].op == "call_function"
        if shapes:
            assert _core.op_tensor(nodes[called]) == (wanted.shape, "f", 4)
            assert nodes[called].meta["tensor_meta"].shape == wanted.shape
    if shapes:
        assert all(_core.op_tensor(node) for node in gm.graph.nodes if node.op == "get_attr")
    assert lower_modules(gm) == 0


def test_golden() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(4), nn.Identity(), nn.Dropout(),
        nn.ReLU(inplace=True),
    ).eval()
    gm, rows = lowered(net)
    assert "\n".join(str(gm.graph).splitlines()[1:]) == "\n".join([
        "    %input_1 : 'Any' [num_users=1] = placeholder[target=input]",
        "    %pad_default : [num_users=1] = call_function[target=pyconvbn.ops.pad.default]"
        "(args = (%input_1, [1, 1, 1, 1], reflect), kwargs = {})",
        "    %_0_weight : [num_users=1] = get_attr[target=0.weight]",
        "    %_0 : [num_users=1] = call_function[target=pyconvbn.ops.conv2d.default]"
        "(args = (%pad_default, %_0_weight, None, [1, 1], [0, 0], [1, 1], 1), kwargs = {})",
        "    %_1_weight : [num_users=1] = get_attr[target=1.weight]",
        "    %_1_bias : [num_users=1] = get_attr[target=1.bias]",
        "    %_1_running_mean : [num_users=1] = get_attr[target=1.running_mean]",
        "    %_1_running_var : [num_users=1] = get_attr[target=1.running_var]",
        "    %_1 : [num_users=1] = call_function[target=pyconvbn.ops.batch_norm.default]"
        "(args = (%_0, %_1_weight, %_1_bias, %_1_running_mean, %_1_running_var, False, 0.1, 1e-05, False), kwargs = {})",
        "    %_4 : [num_users=1] = call_function[target=pyconvbn.ops.relu.default](args = (%_1,), kwargs = {})",
        "    return _4",
    ])
    assert [(row.node, row.into) for row in rows] == [
        ("_0", "aten.conv2d.default"), ("_1", "aten.batch_norm.default"), ("_2", "_1"), ("_3", "_1"),
        ("_4", "aten.relu.default"),
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_the_quick_way_is_that_of_to_aten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyconvbn import _lower

    gm = fx.symbolic_trace(Two(LAYERS[name][0]()).eval())
    twin = copy.copy(gm)
    lower_modules(gm)
    monkeypatch.setattr(_lower, "_QUICK", {})
    lower_modules(twin)
    assert str(gm.graph) == str(twin.graph)


def test_names_meta_and_identity_of_nodes_stay() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval())
    conv, relu = gm.graph.find_nodes(op="call_module")
    conv.meta["mine"] = 1
    lower_modules(gm)
    assert (conv.name, conv.meta["mine"], list(conv.users)) == ("_0", 1, [relu])
    assert not conv._erased and not relu._erased


def test_some_nodes_only() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.ReLU()).eval())
    nodes = gm.graph.find_nodes(op="call_module")
    assert lower_modules(gm, nodes[1:2]) == 1
    assert [node.op for node in nodes] == ["call_module", "call_function", "call_module"]


# ---- what stays ------------------------------------------------------------------------------------------------------
class OwnForward(nn.ReLU):
    def forward(self, input: Any) -> Any:
        return super().forward(input) + 1


class OwnHelper(nn.ConvTranspose2d):
    def output_padding_for(self, input_shape: Any, output_size: Any) -> Any:
        return (0, 0)


class Property(nn.Conv2d):
    calls = 0

    @property
    def gain(self) -> Any:
        return 2.0

    @gain.setter
    def gain(self, value: Any) -> None: ...


class OnlyNamed(nn.Conv2d):
    """A subclass that adds nothing to the call."""

    def extra_repr(self) -> str:
        return "mine"


class Mine(nn.Module):
    def forward(self, x: Any) -> Any:
        return np.sort(x)


def kept(module: Any, mode: str = "eval", shape: tuple[int, ...] | None = None) -> FreezeRow | None:
    """The row of a module that stays; None if it was lowered."""
    root = nn.Module()
    root.m = module
    if mode == "eval":
        module.eval()
    root.forward = lambda x: root.m(x)  # type: ignore[method-assign]
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("m", (x,)))
    gm = fx.GraphModule(root, graph)
    if shape is not None:
        _core.op_set_tensor(x, (shape, "f", 4))
    text = str(gm.graph)
    rows: list[FreezeRow] = []
    changed = lower_modules(gm, report=rows)
    gm.graph.lint()
    assert len(rows) == 1 and changed == (rows[0].outcome == "done")
    if changed:
        return None
    assert str(gm.graph) == text
    return rows[0]


def hooked(module: Any, pre: bool = False) -> Any:
    (module.register_forward_pre_hook if pre else module.register_forward_hook)(lambda *args: None)
    return module


def own_forward() -> Any:
    module = nn.ReLU()
    module.forward = lambda input: input + 1  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("make", "mode", "reason"),
    [
        (lambda: nn.BatchNorm2d(3), "train", "TRAINING"),
        (lambda: nn.Dropout(), "train", "TRAINING"),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), "eval", "UNSUPPORTED"),
        (lambda: hooked(nn.ReLU()), "eval", "HOOKED"),
        (lambda: hooked(nn.Conv2d(3, 3, 1), pre=True), "eval", "HOOKED"),
        (own_forward, "eval", "HOOKED"),
        (lambda: OwnForward(), "eval", "HOOKED"),
        (lambda: OwnHelper(3, 3, 1), "eval", "HOOKED"),
        (lambda: Property(3, 3, 1), "eval", "HOOKED"),
        (lambda: Mine(), "eval", "UNKNOWN"),
        (lambda: nn.AdaptiveAvgPool2d((None, 1)), "eval", "UNSUPPORTED"),
        (lambda: nn.Upsample(scale_factor=2), "eval", "UNSUPPORTED"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1, padding_mode="circular", padding=1), nn.Dropout()), "train",
         "TRAINING"),
        (lambda: nn.Sequential(nn.ReLU(), Mine()), "eval", "UNKNOWN"),
    ],
)
def test_left_alone(make: Any, mode: str, reason: str) -> None:
    row = kept(make(), mode)
    assert row is not None and row.reason == reason and row.hint


def test_a_removed_hook_is_no_obstacle() -> None:
    module = nn.ReLU()
    module.register_forward_hook(lambda *args: None).remove()
    assert kept(module) is None


def test_a_subclass_that_computes_the_same() -> None:
    assert kept(OnlyNamed(3, 3, 1)) is None


def test_modes_do_not_matter_where_they_do_not() -> None:
    assert kept(nn.Conv2d(3, 3, 1), "train") is None


def test_guard_of_folded_modules() -> None:
    net = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), np.random.default_rng(0))
    gm = fx.symbolic_trace(net)
    fx.shape_prop(gm, (5, 4))
    folded, _ = passes.fuse_conv_bn(gm)
    module = folded.get_submodule("0")
    assert module.input_ndim == 2
    row = kept(copy.deepcopy(module))
    assert row is not None and row.reason == "SHAPE_UNKNOWN"
    row = kept(copy.deepcopy(module), shape=(2, 5, 4))
    assert row is not None and row.reason == "UNSUPPORTED" and "2 axes" in row.hint
    assert kept(copy.deepcopy(module), shape=(5, 4)) is None


def test_container_as_one_node() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), np.random.default_rng(0))
    root = nn.Module()
    root.block = net
    graph = fx.Graph()
    graph.output(graph.call_module("block", (graph.placeholder("x"),)))
    gm = fx.GraphModule(root, graph)
    assert lower_modules(gm) == 1
    gm.graph.lint()
    x = sample("conv2d", np.random.default_rng(1))[:, :3]
    np.testing.assert_array_equal(gm(x), net(x))
    assert "block.1.running_var" in str(gm.graph)


def test_identity_of_what_is_returned() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Identity()).eval())
    assert lower_modules(gm) == 1
    x = np.ones(3, np.float32)
    assert gm(x) is x


def test_output_size() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)

        def forward(self, x: Any) -> Any:
            return self.up(x, output_size=(10, 10))

    net = Net().eval()
    _, rows = lowered(net)
    assert [row.reason for row in rows] == ["UNSUPPORTED"]
    gm, rows = lowered(net, (2, 3, 4, 4))
    assert [row.reason for row in rows] == ["OK"]
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(gm(x), net(x))


# ---- all or nothing --------------------------------------------------------------------------------------------------
def test_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval())
    text = str(gm.graph)
    rows: list[FreezeRow] = []
    seen = []

    def fail(*args: Any) -> Any:
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return emit(*args)

    from pyconvbn import _lower

    emit = _lower._QUICK[nn.Conv2d]
    monkeypatch.setitem(_lower._QUICK, nn.Conv2d, fail)
    with pytest.raises(KeyboardInterrupt):
        lower_modules(gm, report=rows)
    assert (str(gm.graph), rows, len(seen)) == (text, [], 2)
    gm.graph.lint()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="expected a GraphModule"):
        lower_modules(nn.ReLU())  # type: ignore[arg-type]
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    gm.delete_submodule("0")
    with pytest.raises(AttributeError, match="'0'"):
        lower_modules(gm)


def test_the_insertion_point_stays() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3)).eval())
    lower_modules(gm)
    gm.graph.call_function(abs, (next(iter(gm.graph.nodes)),))
    assert [node.name for node in gm.graph.nodes][-1] == "abs_1"
