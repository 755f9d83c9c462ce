# SPDX-License-Identifier: BSD-3-Clause
"""pyconvbn.fold: one call from a model or graph to the folded graph and its report."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

import pyconvbn
from pyconvbn import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
import torch_models  # noqa: E402

# What stays in each architecture, with the reason: BatchNorm before the convolution (DenseNet), after cat (SqueezeNet).
KEPT = {
    "densenet": {f"layers_{i}_norm1": "NOT_CONV" for i in range(3)} | {"norm5": "NOT_CONV"},
    "squeezenet": {"features_3_expand_bn": "NOT_CONV", "features_4_expand_bn": "NOT_CONV"},
}


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


def batch_norms(gm):
    """Names of the BatchNorm calls of a graph."""
    found = []
    for node in gm.graph.nodes:
        module = gm.get_submodule(node.target) if node.op == "call_module" else None
        if hasattr(module, "running_mean") or "batch_norm" in getattr(node.target, "__name__", ""):
            found.append(node.name)
    return found


def make_net(rng, training=False):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(4 * 36, 5), nn.BatchNorm1d(5),
    )
    for norm in net:
        if hasattr(norm, "running_mean"):
            norm.running_mean[...] = rng.normal(size=norm.num_features) * 3
            norm.running_var[...] = rng.uniform(0.05, 5, norm.num_features)
            norm.weight[...] = rng.normal(size=norm.num_features) * 2
            norm.bias[...] = rng.normal(size=norm.num_features)
    return net.train(training)


@pytest.mark.oracle
@pytest.mark.parametrize("name", torch_models.MODELS)
def test_architectures(torch, rng, name):
    model = torch_models.build(torch, name)
    shape = torch_models.MODELS[name][1]
    x = rng.normal(size=shape).astype(np.float32)
    original = fx.from_torch(model)
    expected_rows = batch_norms(original)
    assert expected_rows
    before = {key: value.clone() for key, value in model.state_dict().items()}

    folded, report = pyconvbn.fold(model, example_inputs=x)
    folded.graph.lint()
    assert [row.node for row in report.rows] == expected_rows
    kept = {row.node: row.reason for row in report.rows if row.outcome != "folded"}
    assert kept == KEPT.get(name, {})
    assert batch_norms(folded) == list(kept)
    for row in report.rows:
        if row.outcome == "folded":
            assert row.reason == "OK"
            assert row.bytes_saved > 0 and row.flops_saved > 0

    with torch.no_grad():
        single = [t.numpy() for t in outputs(model(torch.from_numpy(x)))]
        exact = [t.numpy() for t in outputs(copy.deepcopy(model).double()(torch.from_numpy(x).double()))]
    for mine, theirs, right in zip(outputs(folded(x)), single, exact):
        rounding = np.finfo(np.float32).eps * np.abs(right).max()
        assert np.abs(mine - right).max() <= 4 * (np.abs(theirs - right).max() + rounding)

    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    own = [p.detach().numpy() for p in (*model.parameters(), *model.buffers())]
    for array in (*folded.parameters(), *folded.buffers()):
        assert not any(np.shares_memory(array, other) for other in own)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["module", "graph module", "exported"])
def test_torch_inputs(torch, rng, kind):
    model = torch_models.build(torch, "resnet_basic")
    x = rng.normal(size=(2, 3, 33, 40)).astype(np.float32)
    given = model
    if kind == "graph module":
        given = torch.fx.symbolic_trace(model)
    if kind == "exported":
        given = torch.export.export(model, (torch.from_numpy(x),))
    folded, report = pyconvbn.fold(given, example_inputs=torch.from_numpy(x), verify=True)
    assert report.counts == {"folded": 8}
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    assert np.abs(folded(x) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["module", "graph module", "aten"])
def test_our_models(rng, kind):
    net = make_net(rng)
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    given = net
    if kind != "module":
        given = fx.symbolic_trace(net)
    if kind == "aten":
        given = fx.to_aten(given)
    text = str(given.graph) if kind != "module" else repr(net)
    state = {key: value.copy() for key, value in net.state_dict().items()}
    folded, report = pyconvbn.fold(given, example_inputs=x, verify=True)
    assert [row.outcome for row in report.rows] == ["folded"] * 3
    assert batch_norms(folded) == []
    expected = net(x)
    assert np.abs(folded(x) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (str(given.graph) if kind != "module" else repr(net)) == text
    for key, value in net.state_dict().items():
        assert np.array_equal(value, state[key]), key
    for array in (*net.parameters(), *net.buffers()):
        array[...] = 7
    assert np.abs(folded(x) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_training_mode_is_reported_not_changed(rng):
    net = make_net(rng, training=True)
    folded, report = pyconvbn.fold(net)
    assert [(row.outcome, row.reason) for row in report.rows] == [("kept", "BN_TRAINING")] * 3
    assert all("eval()" in row.hint for row in report.rows)
    assert net.training and folded.training
    assert len(batch_norms(folded)) == 3


def test_strict_and_skip(rng):
    net = make_net(rng)
    with pytest.raises(pyconvbn.FoldError) as info:
        pyconvbn.fold(make_net(rng, training=True), strict=True)
    assert info.value.reason == "BN_TRAINING"
    folded, report = pyconvbn.fold(net, example_inputs=np.zeros((1, 3, 6, 6), np.float32), skip=("4", "_7"))
    assert [row.reason for row in report.rows] == ["OK", "SKIPPED_BY_USER", "SKIPPED_BY_USER"]
    assert len(batch_norms(folded)) == 2


def test_verify_finds_a_wrong_fold(rng, monkeypatch):
    import pyconvbn.passes as passes

    net = make_net(rng)
    right = passes.fuse_conv_bn

    def wrong(gm, **kwargs):
        folded, report = right(gm, **kwargs)
        conv = next(m for m in folded.modules() if isinstance(m, nn.Conv2d))
        conv.bias[...] += 0.01
        return folded, report

    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    pyconvbn.fold(net, example_inputs=x, verify=True)
    monkeypatch.setattr(passes, "fuse_conv_bn", wrong)
    pyconvbn.fold(net, example_inputs=x)
    with pytest.raises(AssertionError):
        pyconvbn.fold(net, example_inputs=x, verify=True)


@pytest.mark.oracle
def test_hooked_torch_layers_are_reported(torch, rng):
    model = torch_models.build(torch, "mlp")
    model[2].register_forward_hook(lambda module, inputs, output: output * 2)
    x = rng.normal(size=(7, 12)).astype(np.float32)
    folded, report = pyconvbn.fold(model, example_inputs=x)
    assert [row.reason for row in report.rows] == ["HOOKED", "OK"]
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    assert np.abs(folded(x) - expected).max() < 1e-5


@pytest.mark.parametrize("model", [None, 3, np.ones(3), lambda x: x])
def test_other_objects(model):
    with pytest.raises(TypeError, match="model: expected"):
        pyconvbn.fold(model)


def test_example_inputs_are_checked(rng):
    with pytest.raises(TypeError, match=r"example_inputs\[0\]"):
        pyconvbn.fold(make_net(rng), example_inputs=[[1.0, 2.0]])
