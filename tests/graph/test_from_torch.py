# SPDX-License-Identifier: BSD-3-Clause
"""fx.from_torch: names, numbers, shared memory, in-place operations, hooks, and what is refused."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from pyconvbn import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
import torch_models  # noqa: E402

pytestmark = pytest.mark.oracle

EPS = {np.dtype(np.float32): 2.0**-23, np.dtype(np.float64): 2.0**-52}


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


def run_torch(torch, model, x):
    with torch.no_grad():
        return [value.numpy() for value in outputs(model(torch.from_numpy(x)))]


def assert_as_accurate(torch, model, module, x, *params):
    """Errors against a float64 run: at most 32 times torch's own, or roundings of the largest value. (A layer may have twice
    the rms error of one float32 sum, torch's blocked sums have half of it, and the largest of all errors is compared here.)"""
    double = copy.deepcopy(model).double()
    exact = run_torch(torch, double, x.astype(np.float64))
    single = run_torch(torch, copy.deepcopy(model).float(), x.astype(np.float32))
    ours = outputs(module(*params, x))
    assert len(ours) == len(exact)
    for mine, theirs, right in zip(ours, single, exact):
        assert mine.shape == right.shape
        assert mine.dtype == x.dtype
        unit = EPS[mine.dtype] / EPS[np.dtype(np.float32)]  # a float64 run has its own rounding
        allowed = 32 * unit * (np.abs(theirs - right).max() + EPS[np.dtype(np.float32)] * np.abs(right).max())
        assert np.abs(mine - right).max() <= allowed


@pytest.fixture(params=list(torch_models.MODELS))
def name(request):
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_architectures(torch, rng, name, dtype):
    model = torch_models.build(torch, name, dtype=getattr(torch, np.dtype(dtype).name))
    module = fx.from_torch(model)
    module.graph.lint()
    expected = torch.fx.symbolic_trace(model).graph
    assert [node.name for node in module.graph.nodes] == [node.name for node in expected.nodes]
    assert [node.op for node in module.graph.nodes if "module" in node.op] == [
        node.op for node in expected.nodes if "module" in node.op
    ]
    assert not module.training
    x = rng.normal(size=torch_models.MODELS[name][1]).astype(dtype)
    before = x.copy()
    assert_as_accurate(torch, model, module, x)
    assert np.array_equal(x, before)


def test_memory_is_shared_and_changes_are_seen(torch, rng, name):
    model = torch_models.build(torch, name)
    module = fx.from_torch(model)
    tensors = dict(model.state_dict(keep_vars=True))
    arrays = module.state_dict(keep_vars=True)
    assert arrays
    for key, array in arrays.items():
        assert np.shares_memory(array, tensors[key].detach().numpy()) or array.size == 0
        assert isinstance(array, nn.Parameter) == isinstance(tensors[key], torch.nn.Parameter)
    x = rng.normal(size=torch_models.MODELS[name][1]).astype(np.float32)
    first = outputs(module(x))[0]
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.25)
    second = outputs(module(x))[0]
    assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()
    assert_as_accurate(torch, model, module, x)


def test_graph_module_in(torch, rng):
    traced = torch.fx.symbolic_trace(torch_models.build(torch, "resnet_basic"))
    module = fx.from_torch(traced)
    assert [n.name for n in module.graph.nodes] == [n.name for n in traced.graph.nodes]
    assert_as_accurate(torch, traced, module, rng.normal(size=(2, 3, 20, 20)).astype(np.float32))


@pytest.mark.parametrize("name", torch_models.MODELS)
def test_exported_programs(torch, rng, name):
    model = torch_models.build(torch, name)
    shape = torch_models.MODELS[name][1]
    program = torch.export.export(model, (torch.zeros(shape),))
    module = fx.from_torch(program)
    module.graph.lint()
    expected = {n.name: str(n.target) for n in program.graph.nodes if str(n.target).startswith("aten.")}
    ours = {n.name: str(n.target) for n in module.graph.nodes if n.name in expected}
    assert ours == expected
    assert expected
    assert_as_accurate(torch, model, module, rng.normal(size=shape).astype(np.float32))


# unet: its bilinear resizing becomes arithmetic on indices, which ops.aten does not have.
@pytest.mark.parametrize("name", [n for n in torch_models.MODELS if n != "unet"])
def test_core_aten_graphs(torch, rng, name):
    """After run_decompositions: _native_batch_norm_legit_no_training, max_pool2d_with_indices, addmm ..."""
    model = torch_models.build(torch, name)
    shape = torch_models.MODELS[name][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.export.export(model, (torch.zeros(shape),)).run_decompositions()
    module = fx.from_torch(program)
    module.graph.lint()
    assert any("_native_batch_norm_legit_no_training" in str(n.target) for n in module.graph.nodes)
    assert_as_accurate(torch, model, module, rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("name", ["resnet_basic", "shufflenet_v2", "efficientnet"])
def test_programs_for_any_batch_size(torch, rng, name):
    model = torch_models.build(torch, name)
    shape = torch_models.MODELS[name][1]
    batch = torch.export.Dim("batch", min=2, max=64)
    module = fx.from_torch(torch.export.export(model, (torch.zeros(shape),), dynamic_shapes=({0: batch},)))
    assert_as_accurate(torch, model, module, rng.normal(size=(5, *shape[1:])).astype(np.float32))


def test_exported_training_updates_the_tensors(torch, rng):
    def make():
        torch.manual_seed(5)
        return torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3)).train()

    theirs, shared = make(), make()
    module = fx.from_torch(torch.export.export(shared, (torch.zeros(4, 2, 9),)))
    for _ in range(2):
        x = rng.normal(size=(4, 2, 9)).astype(np.float32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(x)).numpy()
        assert np.abs(module(x) - expected).max() < 1e-5
    assert torch.allclose(theirs[1].running_var, shared[1].running_var, atol=1e-6)
    assert int(shared[1].num_batches_tracked) == 2


def test_graph_module_inside_a_graph_module(torch, rng):
    inner = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.rest = inner, torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.rest(self.inner(x))

    class Whole(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return True

    model = Outer().eval()
    module = fx.from_torch(torch.fx.GraphModule(model, Whole().trace(model)))
    assert [n.target for n in module.graph.nodes] == ["x", "inner", "rest", "output"]
    assert_as_accurate(torch, model, module, rng.normal(size=(2, 3, 5, 5)).astype(np.float32))


def test_lifted_parameters_stay_placeholders(torch, rng):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU()).eval()
    program = torch.export.export(model, (torch.zeros(1, 2, 5, 5),))
    module = fx.from_torch(program.graph_module)
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    assert names == [n.name for n in program.graph.nodes if n.op == "placeholder"]
    values = [program.state_dict[s.target].detach().numpy() for s in program.graph_signature.input_specs[:-1]]
    x = rng.normal(size=(1, 2, 5, 5)).astype(np.float32)
    (result,) = module(*values, x)
    assert np.abs(result - run_torch(torch, model, x)[0]).max() < 1e-5


# -- sharing ---------------------------------------------------------------------------------------------------------
def test_shared_modules_and_tied_weights(torch, rng):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Conv2d(3, 3, 3, padding=1)
            self.again = self.first
            self.other = torch.nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.first.weight
            base = torch.nn.Parameter(torch.randn(6))
            self.low = torch.nn.Parameter(base.data[:3])
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            scale = self.low.view(1, 3, 1, 1)
            return self.norm(self.first(x)) + self.norm(self.again(x)) * scale + self.other(x)

    model = Tied().eval()
    module = fx.from_torch(model)
    assert module.first.weight is module.other.weight
    assert module.first.bias is not module.other.bias
    calls = [n.target for n in module.graph.nodes if n.op == "call_module"]
    assert calls == ["first", "norm", "first", "norm", "other"]
    assert_as_accurate(torch, model, module, rng.normal(size=(2, 3, 6, 6)).astype(np.float32))


def test_views_of_one_storage_stay_views(torch):
    base = torch.randn(2, 4, 3, 3, 3)
    first, second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
    first.weight = torch.nn.Parameter(base[0])
    second.weight = torch.nn.Parameter(base.flatten()[54:162].view(4, 3, 3, 3))
    module = fx.from_torch(torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1), second))
    one, two = module.get_submodule("0").weight, module.get_submodule("3").weight
    assert one is not two
    assert np.shares_memory(one, two)
    base[0] = 7.0
    assert (one == 7.0).all()


def test_batch_norm_settings(torch):
    norms = [
        torch.nn.BatchNorm2d(3, eps=0.5, momentum=None), torch.nn.BatchNorm2d(3, affine=False, momentum=0.25),
        torch.nn.BatchNorm2d(3, track_running_stats=False), torch.nn.SyncBatchNorm(3),
    ]
    model = torch.nn.Sequential(*norms).train()
    norms[1].eval()
    norms[0].num_batches_tracked += 5
    norms[0].weight.requires_grad_(False)
    module = fx.from_torch(model)
    ours = [module.get_submodule(str(i)) for i in range(4)]
    for mine, theirs in zip(ours, norms):
        assert type(mine).__name__ == type(theirs).__name__
        for key in ("eps", "momentum", "affine", "track_running_stats", "training", "num_features"):
            assert getattr(mine, key) == getattr(theirs, key), key
    assert int(ours[0].num_batches_tracked) == 5
    assert not ours[0].weight.requires_grad
    assert ours[1].weight is None and ours[2].running_mean is None
    assert module.training


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_training_updates_the_tensors(torch, rng, momentum):
    def make():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3), torch.nn.BatchNorm1d(3, momentum=momentum)).train()

    theirs, shared = make(), make()
    module = fx.from_torch(shared)
    for _ in range(3):
        x = rng.normal(size=(4, 2, 9)).astype(np.float32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(x)).numpy()
        assert np.abs(module(x) - expected).max() < 1e-5
    assert torch.allclose(theirs[1].running_mean, shared[1].running_mean, atol=1e-6)
    assert torch.allclose(theirs[1].running_var, shared[1].running_var, atol=1e-6)
    assert int(shared[1].num_batches_tracked) == 3


# -- writing --------------------------------------------------------------------------------------------
def test_writing_a_parameter_is_seen_by_the_next_call(torch):
    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return x + self.count

    model = Counter()
    module = fx.from_torch(model)
    assert float(model.count) == 0.0  # tracing did not count
    x = np.zeros(1, np.float32)
    assert [float(module(x)[0]) for _ in range(3)] == [1.0, 2.0, 3.0]
    assert float(model.count) == 3.0


# -- hooks -----------------------------------------------------------------------------------------------------------
def test_hooked_layers_run_their_hooks(torch, rng):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1),
        torch.nn.BatchNorm2d(4),
    ).eval()
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    model[4].register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    module = fx.from_torch(model)
    assert [n.target for n in module.graph.nodes] == ["input", "0", "1", "2", "3", "4", "output"]
    x = rng.normal(size=(2, 3, 7, 7)).astype(np.float32)
    (expected,) = run_torch(torch, model, x)
    assert np.abs(module(x) - expected).max() < 1e-5
    assert seen == [(2, 4, 5, 5)] * 2
    assert np.shares_memory(module.get_submodule("0").weight, model[0].weight.detach().numpy())
    module.train()
    assert not model[4].training
    module(x)
    assert int(model[4].num_batches_tracked) == 1
    assert not model[4].training


def test_hooks_of_containers_are_traced(torch, rng):
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())).eval()
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model[0].register_forward_hook(lambda module, inputs, output: output * 3)
    assert_as_accurate(torch, model, fx.from_torch(model), rng.normal(size=(2, 3, 5, 5)).astype(np.float32))


def test_weight_norm_by_hooks_is_recomputed(torch, rng):
    with pytest.warns((FutureWarning, DeprecationWarning)):
        conv = torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 4, 3))
    model = torch.nn.Sequential(conv, torch.nn.ReLU()).eval()
    module = fx.from_torch(model)
    x = rng.normal(size=(1, 3, 5, 5)).astype(np.float32)
    with torch.no_grad():
        conv.weight_g.mul_(3)
    (expected,) = run_torch(torch, model, x)
    assert np.abs(module(x) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_hooks_that_tracing_cannot_see_are_refused(torch):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    handle = model.register_forward_hook(lambda *args: None)
    with pytest.raises(NotImplementedError, match="forward hooks"):
        fx.from_torch(model)
    handle.remove()
    fx.from_torch(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(NotImplementedError, match="global"):
            fx.from_torch(model)
    finally:
        handle.remove()


# -- what is refused -------------------------------------------------------------------------------------------------
def test_everything_unsupported_is_listed(torch):
    class Many(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(3, 3)
            self.fold = torch.nn.Fold((2, 2), 1)

        def forward(self, x):
            y = torch.fft.fft(x)
            y = y.cumsum(0)
            z, _ = self.rnn(y)
            return torch.nn.functional.interpolate(self.fold(z), scale_factor=2, mode="bicubic")

    with pytest.raises(NotImplementedError) as info:
        fx.from_torch(Many())
    text = str(info.value)
    for word in ("'fft_fft'", "'cumsum'", "'rnn'", "LSTM", "'fold'", "'interpolate'", "bicubic", "5 things",
                 Path(__file__).name, "y = y.cumsum(0)"):
        assert word in text, text
    rows = [row.strip() for row in Path(__file__).read_text().splitlines()]
    line = 1 + rows.index("y = y.cumsum(0)")
    assert f"{Path(__file__).name}:{line}" in text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("F.max_pool2d(x, 2, return_indices=True)[0]", ("max_pool2d_with_indices",)),
        ("F.interpolate(x, scale_factor=2, recompute_scale_factor=True)", ("recompute_scale_factor",)),
        ("torch.add(x, x, out=x)", ("out",)),
        ("x.to('cuda')", ("device",)),
        ("x.view(torch.int32)", ("dtype",)),
        ("x.grad", ("grad",)),
        ("x.cholesky()", ("cholesky", "method")),
        ("x.view(torch.nn.functional.relu(x))", ("size",)),
        ("x.bfloat16()", ("bfloat16",)),
        ("x.to(torch.bfloat16)", ("bfloat16",)),
        ("F.softmax(x)", ("dim",)),
    ],
)
def test_unsupported_arguments(torch, source, words):
    with pytest.raises(NotImplementedError) as info:
        fx.from_torch(torch_models.model_of(torch, source))
    for word in words:
        assert word in str(info.value)


def test_unsupported_tensors_and_modules(torch):
    half = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3).bfloat16())
    with pytest.raises(NotImplementedError, match=r"'_0'.*weight is a tensor of torch.bfloat16"):
        fx.from_torch(half)
    with pytest.raises(NotImplementedError, match="device meta"):
        fx.from_torch(torch.nn.Sequential(torch.nn.Linear(3, 4, device="meta")))
    parametrised = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(3, 4, 3)))
    with pytest.raises(NotImplementedError, match="remove_parametrizations"):
        fx.from_torch(parametrised)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's plan to drop it
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(NotImplementedError, match="ScriptModule"):
        fx.from_torch(scripted)


def test_control_flow_on_values_is_refused(torch):
    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NotImplementedError, match="cannot trace Branch"):
        fx.from_torch(Branch())


@pytest.mark.parametrize("thing", [3, None, "model", np.ones(3)])
def test_other_objects(torch, thing):
    with pytest.raises(TypeError, match=r"obj: expected a torch.nn.Module"):
        fx.from_torch(thing)


def test_subclasses_of_layers_are_one_node(torch, rng):
    class MyConv(torch.nn.Conv2d):
        def __init__(self, channels):
            super().__init__(3, channels, 3)
            self.extra = 1

    class MyNorm(torch.nn.BatchNorm2d):
        pass

    class Scaled(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = torch.nn.Sequential(MyConv(4), MyNorm(4), Scaled(4, 2, 1)).eval()
    module = fx.from_torch(model)
    called = [n.target for n in module.graph.nodes if n.op == "call_module"]
    assert called == ["0", "1"]  # the last computes something of its own, which is traced
    assert type(module.get_submodule("1")) is nn.BatchNorm2d
    assert_as_accurate(torch, model, module, rng.normal(size=(1, 3, 5, 5)).astype(np.float32))


def test_concrete_args(torch):
    class Choice(torch.nn.Module):
        def forward(self, x, double=False):
            return x * 2 if double else x

    module = fx.from_torch(Choice(), concrete_args={"double": True})
    x = np.ones(2, np.float32)
    assert np.array_equal(module(x, True), 2 * x)
    with pytest.raises(AssertionError, match="specialized"):
        module(x, False)
    with pytest.raises(ValueError, match="concrete_args"):
        fx.from_torch(torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU())), concrete_args={"double": True})


def test_nested_outputs_and_default_arguments(torch):
    class Nested(torch.nn.Module):
        def forward(self, x, y=None, scale=2.0):
            return {"a": x * scale, "b": [x, (x + 1,)]}

    module = fx.from_torch(Nested())
    x = np.ones(3, np.float32)
    result = module(x)
    assert np.array_equal(result["a"], 2 * x) and np.array_equal(result["b"][1][0], x + 1)
    exported = fx.from_torch(torch.export.export(Nested(), (torch.ones(3),)))
    result = exported(x)
    assert np.array_equal(result["a"], 2 * x) and np.array_equal(result["b"][1][0], x + 1)


def test_result_can_be_copied_and_pickled(torch, rng, name):
    model = torch_models.build(torch, name)
    module = fx.from_torch(model)
    x = rng.normal(size=torch_models.MODELS[name][1]).astype(np.float32)
    expected = outputs(module(x))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.graph.lint()
        for mine, right in zip(outputs(twin(x)), expected):
            assert np.array_equal(mine, right)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    assert np.array_equal(outputs(twin(x))[0], expected[0])
