# SPDX-License-Identifier: BSD-3-Clause
"""fx.to_aten: module and functional calls as ops.aten nodes, with and without lifted parameters."""

from __future__ import annotations

import builtins
import operator
import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
import torch_models  # noqa: E402


def targets(module):
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def call(module, *inputs):
    return module(*module.meta.get("params_flat", ()), *inputs)


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


def shake(module, rng):
    """Statistics and affine parameters far from their defaults."""
    for norm in module.modules():
        if hasattr(norm, "running_mean") and norm.running_mean is not None:
            norm.running_mean[...] = rng.normal(size=norm.num_features) * 2
            norm.running_var[...] = rng.uniform(0.1, 4, norm.num_features)
            if norm.weight is not None:
                norm.weight[...] = rng.normal(size=norm.num_features) + 1
                norm.bias[...] = rng.normal(size=norm.num_features)
    return module


def assert_close(got, expected):
    """Both are float32 evaluations of one formula by the same kernels."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.abs(a - b).max(initial=0.0) <= 16 * np.finfo(b.dtype).eps * np.abs(b).max(initial=0.0)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6), ["aten.linear.default"]),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, bias=False), (2, 2, 9), ["aten.conv1d.default"]),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), groups=2), (2, 4, 9, 8), ["aten.conv2d.default"]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (1, 2, 6, 5, 6), ["aten.conv3d.default"]),
    "same": (lambda: nn.Conv2d(2, 3, 4, padding="same"), (1, 2, 7, 7), ["aten.conv2d.padding"]),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (1, 2, 7, 7),
                ["aten.pad.default", "aten.conv2d.default"]),
    "circular_same": (lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (1, 2, 7),
                      ["aten.pad.default", "aten.conv1d.default"]),
    "replicate_none": (lambda: nn.Conv1d(2, 3, 4, padding_mode="replicate"), (1, 2, 7), ["aten.conv1d.default"]),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (2, 4, 5),
                         ["aten.conv_transpose1d.default"]),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, dilation=2), (2, 4, 5, 4),
                         ["aten.conv_transpose2d.input"]),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2, bias=False), (1, 2, 3, 4, 3),
                         ["aten.conv_transpose3d.input"]),
    "batch_norm": (lambda: nn.BatchNorm2d(3, eps=0.1), (2, 3, 4, 4), ["aten.batch_norm.default"]),
    "sync": (lambda: nn.SyncBatchNorm(3), (2, 3, 4, 4), ["aten.batch_norm.default"]),
    "no_affine": (lambda: nn.BatchNorm1d(3, affine=False), (2, 3), ["aten.batch_norm.default"]),
    "no_stats": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3, 5), ["aten.batch_norm.default"]),
    "relu": (lambda: nn.ReLU(True), (2, 3), ["aten.relu.default"]),
    "relu6": (nn.ReLU6, (2, 3), ["aten.relu6.default"]),
    "leaky": (lambda: nn.LeakyReLU(0.3), (2, 3), ["aten.leaky_relu.default"]),
    "silu": (nn.SiLU, (2, 3), ["aten.silu.default"]),
    "hardswish": (nn.Hardswish, (2, 3), ["aten.hardswish.default"]),
    "sigmoid": (nn.Sigmoid, (2, 3), ["aten.sigmoid.default"]),
    "gelu": (nn.GELU, (2, 3), ["aten.gelu.default"]),
    "gelu_tanh": (lambda: nn.GELU("tanh"), (2, 3), ["aten.gelu.default"]),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), (1, 2, 8, 8), ["aten.max_pool2d.default"]),
    "max_pool1d": (lambda: nn.MaxPool1d(2), (1, 2, 8), ["aten.max_pool1d.default"]),
    "avg_pool": (lambda: nn.AvgPool2d(2, count_include_pad=False, padding=1), (1, 2, 8, 8),
                 ["aten.avg_pool2d.default"]),
    "avg_pool3d": (lambda: nn.AvgPool3d(2, divisor_override=3), (1, 2, 4, 4, 4), ["aten.avg_pool3d.default"]),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((1, 2)), (1, 2, 8, 8), ["aten.adaptive_avg_pool2d.default"]),
    "adaptive_none": (lambda: nn.AdaptiveAvgPool2d((None, 2)), (1, 2, 8, 8), ["aten.adaptive_avg_pool2d.default"]),
    "flatten": (nn.Flatten, (2, 3, 4), ["aten.flatten.using_ints"]),
    "dropout": (nn.Dropout, (2, 3, 4), ["aten.dropout.default"]),
    "identity": (nn.Identity, (2, 3, 4), []),
    "nearest": (lambda: nn.Upsample(scale_factor=2), (1, 2, 3, 4), ["aten.upsample_nearest2d.vec"]),
    "nearest1d": (lambda: nn.Upsample(size=7), (1, 2, 3), ["aten.upsample_nearest1d.vec"]),
    "bilinear": (lambda: nn.Upsample(size=(5, 7), mode="bilinear", align_corners=True), (1, 2, 3, 4),
                 ["aten.upsample_bilinear2d.vec"]),
}


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(rng, name, lift):
    make, shape, expected = LAYERS[name]
    layer = shake(nn.Sequential(make(), nn.ReLU()).eval(), rng)
    gm = fx.symbolic_trace(layer)
    x = rng.normal(size=shape).astype(np.float32)
    result = fx.to_aten(gm, [shape], lift_params=lift)
    result.graph.lint()
    assert targets(result) == [*expected, "aten.relu.default"]
    assert not any(n.op == "call_module" for n in result.graph.nodes)
    assert_close(outputs(call(result, x)), outputs(layer(x)))


def test_batch_norm_has_nine_arguments():
    gm = fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3, eps=0.25, momentum=0.5)).eval())
    (node,) = fx.to_aten(gm).graph.find_nodes(op="call_function", target=pyconvbn.ops.aten.batch_norm.default)
    names = [getattr(a, "name", a) for a in node.args]
    parameters = [f"_0_{n}" for n in ("weight", "bias", "running_mean", "running_var")]
    assert names == ["input_1", *parameters, False, 0.5, 0.25, False]


def test_training_statistics_are_updated_as_before(rng):
    def make():
        nn.manual_seed(0)
        return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3, momentum=0.3)).train()

    one, two = make(), make()
    result = fx.to_aten(fx.symbolic_trace(two))
    for _ in range(3):
        x = rng.normal(size=(4, 2, 8)).astype(np.float32)
        assert_close([result(x)], [one(x)])
    for key, array in one.state_dict().items():
        assert np.allclose(array, two.state_dict()[key], rtol=1e-6), key
    assert int(two[1].num_batches_tracked) == 3
    result.graph.eliminate_dead_code()
    result(x)
    assert int(two[1].num_batches_tracked) == 4


def test_functional_calls(rng):
    w, t = rng.normal(size=(4, 3, 3, 3)).astype(np.float32), rng.normal(size=(4, 2, 2, 2)).astype(np.float32)
    m, v = rng.normal(size=4).astype(np.float32), rng.uniform(0.5, 2, 4).astype(np.float32)
    lin = rng.normal(size=(5, 7)).astype(np.float32)

    def net(x):
        y = F.conv2d(x, weight=w, padding="same")
        y = F.batch_norm(y, m, v, eps=0.01)
        y = F.conv_transpose2d(F.relu(y), t, stride=2)
        y = F.max_pool2d(F.leaky_relu(y, 0.2), 2) + F.avg_pool2d(F.hardtanh(y), 2)
        y = F.interpolate(y, scale_factor=1.5, mode="bilinear") * 2 - 1
        y = F.cat([y, 1 - y, F.pad(y, (1, 0))[:, :, :, 1:]], dim=1)
        y = F.softmax(F.add(y, F.mul(y, y), alpha=0.5), dim=1) / 3
        y = F.linear(y[:, :, 0, :7], lin)
        z = F.flatten(y, 1)
        last = F.dropout(abs(z)).reshape(z.shape[0], -1)
        return F.gelu(y[..., None, 1:3] @ y[:, :, 1:3, None]), F.silu(-z) ** 2, last

    gm = fx.symbolic_trace(net)
    shape = (2, 3, 8, 8)
    x = rng.normal(size=shape).astype(np.float32)
    for lift in (False, True):
        result = fx.to_aten(gm, [shape], lift_params=lift)
        result.graph.lint()
        assert_close(outputs(call(result, x)), outputs(net(x)))
        called = [n.target for n in result.graph.nodes if n.op == "call_function"]
        others = {target for target in called if not str(target).startswith("aten.")}
        assert others <= {builtins.getattr, operator.getitem}
        assert not any(n.op == "call_module" or n.op == "call_method" for n in result.graph.nodes)


@pytest.mark.oracle
@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("name", torch_models.MODELS)
def test_architectures(torch, rng, name, lift):
    model = torch_models.build(torch, name)
    shape = torch_models.MODELS[name][1]
    gm = fx.from_torch(model)
    result = fx.to_aten(gm, [shape], lift_params=lift)
    result.graph.lint()
    exported = torch.export.export(model, (torch.zeros(shape),))
    theirs = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    for op in ("conv", "batch_norm", "linear"):
        mine = [t for t in targets(result) if t.startswith(f"aten.{op}")]
        assert mine == [t for t in theirs if t.startswith(f"aten.{op}")]
    x = rng.normal(size=shape).astype(np.float32)
    for got, expected in zip(outputs(call(result, x)), outputs(gm(x))):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    for name_, array in result.named_parameters():
        assert any(array is other for other in gm.parameters()), name_


def test_lifted_parameters(rng):
    conv = nn.Conv2d(3, 4, 3)
    tied = nn.Conv2d(3, 4, 3)
    tied.weight = conv.weight

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = conv, tied, nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.a(x)) + self.b(x)

    net = shake(Net().eval(), rng)
    gm = fx.symbolic_trace(net)
    result = fx.to_aten(gm, lift_params=True)
    names = [name for name, _ in [*gm.named_parameters(), *gm.named_buffers()]]
    assert result.meta["params_names"] == names
    assert len(result.meta["params_flat"]) == len(names) == 8
    assert all(a is b for a, b in zip(result.meta["params_flat"], [*gm.parameters(), *gm.buffers()]))
    placeholders = [n.name for n in result.graph.nodes if n.op == "placeholder"]
    parameters = {name for name, _ in gm.named_parameters()}
    prefixed = [("p_" if name in parameters else "b_") + name.replace(".", "_") for name in names]
    assert placeholders == [*prefixed, "x"]
    assert {"p_a_weight", "p_b_bias", "b_norm_num_batches_tracked"} < set(placeholders)
    assert "p_b_weight" not in placeholders  # it is a.weight
    assert not any(n.op == "get_attr" for n in result.graph.nodes)
    x = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    assert_close([call(result, x)], [net(x)])


def test_the_original_is_not_changed_and_names_stay(rng):
    net = shake(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), rng)
    gm = fx.symbolic_trace(net)
    before = str(gm.graph)
    result = fx.to_aten(gm)
    assert str(gm.graph) == before
    kept = [n.name for n in result.graph.nodes if n.op == "call_function"]
    assert kept == [n.name for n in gm.graph.nodes if n.op == "call_module"]
    assert result.get_submodule("0").weight is net[0].weight


def test_output_size(rng):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=(12, 11))

    net = Net().eval()
    gm = fx.symbolic_trace(net)
    with pytest.raises(NotImplementedError, match="'up'.*output_size"):
        fx.to_aten(gm)
    x = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    assert_close([fx.to_aten(gm, [(1, 2, 5, 5)])(x)], [net(x)])


def test_what_has_no_aten_form_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x

    class Conv(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.conv, self.norm = Odd(), Conv(2, 2, 1), nn.BatchNorm2d(2, momentum=None)
            self.hooked = nn.ReLU()
            object.__setattr__(self.hooked, "forward", abs)

        def forward(self, x):
            return np.sort(self.hooked(self.norm(self.conv(self.odd(x)))))

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return True

    net = Net()
    gm = fx.GraphModule(net, Leaves().trace(net))
    with pytest.raises(NotImplementedError) as info:
        fx.to_aten(gm)
    for word in ("5 nodes", "'odd'", "Odd", "'conv'", "'norm'", "momentum=None", "'hooked'", "hooks", "sort"):
        assert word in str(info.value), str(info.value)
    with pytest.raises(TypeError, match="gm: expected a GraphModule"):
        fx.to_aten(net)
