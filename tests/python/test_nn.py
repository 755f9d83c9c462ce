# SPDX-License-Identifier: BSD-3-Clause
"""`pyconvbn.nn`: registration, state, copies, and constructor checks."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

from pyconvbn import nn

RNG = np.random.default_rng


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch, the second oracle, is not installed")


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


def network():
    return nn.Sequential(Block(2), nn.ModuleList([nn.Linear(2, 3), Block(4)]), nn.Flatten())


# -- registration and walking -------------------------------------------------------------------


def test_assigning_stores_the_very_object():
    conv = nn.Conv2d(2, 4, 3)
    plain = np.zeros((4, 2, 3, 3), np.float32)
    conv.weight = plain
    assert conv.weight is plain
    assert [name for name, _ in conv.named_parameters()] == ["weight", "bias"]
    parameter = nn.Parameter(np.ones(4, np.float32))
    conv.bias = parameter
    assert conv.bias is parameter and conv.state_dict(keep_vars=True)["bias"] is parameter
    bn = nn.BatchNorm2d(4)
    mean = np.ones(4)
    bn.running_mean = mean
    assert bn.running_mean is mean and dict(bn.named_buffers())["running_mean"] is mean
    holder = nn.Sequential(conv, bn)
    holder.twin = conv
    assert holder.twin is conv and holder[0] is conv


def test_aliasing_is_kept_and_seen_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    net = nn.Sequential(first, second, first)
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    assert len(list(net.named_parameters(remove_duplicate=False))) == 6
    assert [name for name, _ in net.named_modules()] == ["", "0", "1"]
    assert [name for name, _ in net.named_modules(remove_duplicate=False)] == ["", "0", "1", "2"]
    assert set(net.state_dict()) == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    first.weight[0, 0] = 42
    assert second.weight[0, 0] == 42
    clone = copy.deepcopy(net)
    assert clone[0] is clone[2] and clone[0].weight is clone[1].weight
    assert clone[0].weight is not first.weight
    thawed = pickle.loads(pickle.dumps(net))
    assert thawed[0] is thawed[2] and thawed[0].weight is thawed[1].weight


def test_assignments_that_do_not_fit_are_refused():
    conv = nn.Conv2d(1, 1, 1)
    weight = conv.weight
    with pytest.raises(TypeError, match="weight: is a parameter of Conv2d"):
        conv.weight = [[1.0]]
    with pytest.raises(TypeError, match="running_var"):
        nn.BatchNorm1d(2).running_var = 3
    with pytest.raises(TypeError, match="expected a Module or None, got ndarray"):
        nn.Sequential(conv).__setattr__("0", np.ones(1))
    assert conv.weight is weight

    class Forgetful(nn.Module):
        def __init__(self):
            self.conv = conv

    with pytest.raises(AttributeError, match="Module.__init__"):
        Forgetful()


def test_registration_functions():
    module = nn.Module()
    module.register_parameter("a", nn.Parameter(np.ones(2)))
    module.register_parameter("none", None)
    module.register_buffer("kept", np.zeros(1))
    module.register_buffer("scratch", np.zeros(1), persistent=False)
    module.add_module("child", nn.ReLU())
    module.add_module("missing", None)
    assert [n for n, _ in module.named_parameters()] == ["a"]
    assert [n for n, _ in module.named_buffers()] == ["kept", "scratch"]
    assert [n for n, _ in module.named_children()] == ["child"]
    assert list(module.state_dict()) == ["a", "kept"]
    module.plain = np.zeros(3)  # a plain array under a new name is just an attribute
    assert list(module.state_dict()) == ["a", "kept"]
    for name in ("", "a.b", "forward"):
        with pytest.raises(KeyError, match="name"):
            module.register_buffer(name, np.zeros(1))
    with pytest.raises(TypeError, match="Parameter"):
        module.register_parameter("b", np.zeros(1))
    del module.child
    assert not list(module.children()) and not hasattr(module, "child")
    with pytest.raises(AttributeError):
        _ = module.child


def test_names_modes_and_apply():
    net = network()
    assert [name for name, _ in net.named_modules()][:6] == [
        "", "0", "0.conv", "0.bn", "0.act", "1"
    ]
    assert net.get_submodule("1.1.conv") is net[1][1].conv and net.get_submodule("") is net
    assert net.get_parameter("1.0.bias") is net[1][0].bias
    assert net.get_buffer("0.bn.running_var") is net[0].bn.running_var
    for getter, target in (
        (net.get_submodule, "0.nope"), (net.get_submodule, "0.conv.weight"),
        (net.get_parameter, "0.bn.running_var"), (net.get_buffer, "0.conv.weight"),
    ):
        with pytest.raises(AttributeError, match="target"):
            getter(target)
    assert net.training and all(m.training for m in net.modules())
    assert net.eval() is net and not any(m.training for m in net.modules())
    net[0].train()
    assert net[0].bn.training and not net[1][1].bn.training
    with pytest.raises(ValueError, match="mode"):
        net.train(1)
    seen = []
    net.apply(lambda m: seen.append(type(m).__name__))
    assert seen[:4] == ["Conv2d", "BatchNorm2d", "ReLU", "Block"] and seen[-1] == "Sequential"
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())


def test_set_submodule_dotted():
    net = network()
    other = nn.Identity()
    net.set_submodule("1.1.bn", other)
    assert net[1][1].bn is other and net.get_submodule("1.1.bn") is other
    net.set_submodule("0", other)
    assert net[0] is other and len(net) == 3
    net.set_submodule("1.1.fresh", other)
    assert net[1][1].fresh is other
    with pytest.raises(AttributeError, match="fresher"):
        net.set_submodule("1.1.fresher", other, strict=True)
    with pytest.raises(AttributeError, match="nope"):
        net.set_submodule("1.nope.bn", other)
    with pytest.raises(AttributeError, match="weight"):
        net.set_submodule("1.0.weight", other)
    with pytest.raises(ValueError, match="target"):
        net.set_submodule("", other)
    with pytest.raises(ValueError, match="module"):
        net.set_submodule("0", 3)


def test_containers():
    a, b, c, d = (nn.Linear(i + 1, i + 2) for i in range(4))
    net = nn.Sequential(a, b)
    net.append(c)
    net.insert(0, d)
    assert list(net) == [d, a, b, c] and net[-1] is c and len(net) == 4
    assert [n for n, _ in net.named_children()] == ["0", "1", "2", "3"]
    del net[0]
    assert list(net) == [a, b, c] and [n for n, _ in net.named_children()] == ["0", "1", "2"]
    assert list(net[1:]) == [b, c] and isinstance(net[1:], nn.Sequential)
    net[0] = d
    assert net[0] is d
    for index in (3, -4):
        with pytest.raises(IndexError, match="out of range"):
            net[index]
    with pytest.raises(TypeError, match="module"):
        net[0] = 3
    with pytest.raises(TypeError):
        nn.Sequential(3)
    named = nn.Sequential({"first": a, "second": b})
    assert named.first is a and list(named.state_dict())[0] == "first.weight"
    modules = nn.ModuleList([a])
    modules += [b, c]
    del modules[0:2]
    assert list(modules) == [c] and list(modules.state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(NotImplementedError, match="ModuleList"):
        modules(1)


# -- parameters ---------------------------------------------------------------------------------


def test_parameter_survives_views_copies_and_pickle():
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    parameter = nn.Parameter(base, requires_grad=False)
    assert np.shares_memory(parameter, base)
    for other in (
        parameter[0], parameter.T, parameter.reshape(6), parameter.copy(), copy.copy(parameter),
        copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter)),
        pickle.loads(pickle.dumps(parameter, protocol=2)), parameter.astype(np.float64),
    ):
        assert type(other) is nn.Parameter and other.requires_grad is False
    assert pickle.loads(pickle.dumps(nn.Parameter(base))).requires_grad is True
    fortran = pickle.loads(pickle.dumps(nn.Parameter(np.asfortranarray(base))))
    assert fortran.flags.f_contiguous and np.array_equal(fortran, base)
    assert parameter.requires_grad_() is parameter and parameter.requires_grad


def test_parameter_pickles_out_of_band():
    parameter = nn.Parameter(np.ones(1000))
    buffers = []
    data = pickle.dumps(parameter, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 500 and len(buffers) == 1
    assert np.array_equal(pickle.loads(data, buffers=buffers), parameter)


def test_arithmetic_on_a_parameter_gives_plain_arrays():
    parameter = nn.Parameter(np.ones(3, np.float32))
    for result in (parameter * 2, parameter + parameter, np.sqrt(parameter), 1 - parameter):
        assert type(result) is np.ndarray
    for scalar in (parameter.sum(), parameter[0] * 2):
        assert isinstance(scalar, np.floating)
    same = parameter
    same += 1
    assert same is parameter and type(same) is nn.Parameter and parameter[0] == 2
    assert np.add(parameter, 1, out=parameter) is parameter
    module = nn.Module()
    module.scaled = nn.Parameter(np.ones(1)) * 2
    assert not list(module.parameters())


def test_parameter_refuses_what_is_no_array():
    with pytest.raises(TypeError, match="data: expected an array, got list"):
        nn.Parameter([1.0])
    with pytest.raises(TypeError, match="int64"):
        nn.Parameter(np.arange(3))
    assert nn.Parameter(np.arange(3), requires_grad=False).dtype == np.int64


@pytest.mark.oracle
def test_parameter_shares_memory_with_a_tensor(torch):
    tensor = torch.ones(3, requires_grad=True)
    parameter = nn.Parameter(tensor)
    parameter[0] = 5
    assert tensor[0].item() == 5
    with pytest.raises(TypeError, match="data"):
        nn.Parameter(torch.ones(3, dtype=torch.bfloat16))


# -- state_dict ---------------------------------------------------------------------------------


def test_state_dict_round_trip_through_npz():
    net, other = network(), network()
    net[0].bn.num_batches_tracked[...] = 7
    state = net.state_dict()
    assert list(state)[:6] == [
        "0.conv.weight", "0.bn.weight", "0.bn.bias", "0.bn.running_mean", "0.bn.running_var",
        "0.bn.num_batches_tracked",
    ]
    assert all(type(value) is np.ndarray for value in state.values())
    assert np.shares_memory(state["0.conv.weight"], net[0].conv.weight)
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    before = other[0].conv.weight
    with np.load(file) as archive:
        result = other.load_state_dict(dict(archive))
    assert result == ([], []) and result.missing_keys == []
    assert other[0].conv.weight is before
    for key, value in other.state_dict().items():
        assert np.array_equal(value, state[key]) and not np.shares_memory(value, state[key])
    assert other[0].bn.num_batches_tracked == 7
    assert list(net[0].state_dict(prefix="x.")) == ["x." + k[2:] for k in state if k[0] == "0"]


def test_load_state_dict_errors_change_nothing():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {key: value + 1 for key, value in net.state_dict().items()}
    before = {key: value.copy() for key, value in net.state_dict().items()}
    state["0.weight"] = np.zeros((2, 2))
    state["extra"] = np.zeros(1)
    del state["1.running_mean"]
    for kind in (ValueError, RuntimeError, nn.StateDictError):
        with pytest.raises(kind) as caught:
            net.load_state_dict(state)
    text = str(caught.value)
    assert "missing keys: 1.running_mean" in text and "unexpected keys: extra" in text
    assert "0.weight: expected shape (3, 2), got (2, 2)" in text
    with pytest.raises(nn.StateDictError, match="0.weight"):
        net.load_state_dict(state, strict=False)
    state["0.weight"] = [[1.0]]
    with pytest.raises(TypeError, match="0.weight"):
        net.load_state_dict(state, strict=False)
    with pytest.raises(TypeError, match="state_dict"):
        net.load_state_dict([1])
    for key, value in net.state_dict().items():
        assert np.array_equal(value, before[key])
    del state["0.weight"]
    result = net.load_state_dict(state, strict=False)
    assert result.missing_keys == ["0.weight", "1.running_mean"]
    assert result.unexpected_keys == ["extra"]
    assert np.array_equal(net[1].running_var, before["1.running_var"] + 1)
    net[0].weight.flags.writeable = False
    with pytest.raises(nn.StateDictError, match="read-only"):
        net.load_state_dict(before)


def test_load_state_dict_casts_assigns_and_tolerates_old_batch_norms():
    bn = nn.BatchNorm1d(2, dtype=np.float16)
    state = {k: np.asarray(v, np.float64) + 1 for k, v in bn.state_dict().items()}
    del state["num_batches_tracked"]
    assert bn.load_state_dict(state) == ([], [])
    assert bn.weight.dtype == np.float16 and bn.weight[0] == 2 and bn.num_batches_tracked == 0
    bn.load_state_dict(state, assign=True)
    assert bn.running_var is state["running_var"]
    assert type(bn.weight) is nn.Parameter and np.shares_memory(bn.weight, state["weight"])


@pytest.mark.oracle
def test_state_dict_from_and_to_torch(torch):
    def build(lib):
        return lib.Sequential(
            lib.Conv2d(2, 4, 3, groups=2), lib.BatchNorm2d(4),
            lib.ConvTranspose2d(4, 2, 2, bias=False), lib.SyncBatchNorm(2), lib.Flatten(),
            lib.Linear(18, 5), lib.BatchNorm1d(5, affine=False),
        )

    ours, theirs = build(nn).eval(), build(torch.nn)
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 4)
    theirs(x)  # one training step makes the statistics interesting
    theirs.eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    for key, value in theirs.state_dict().items():
        assert np.array_equal(ours.state_dict()[key], value.numpy())
        assert ours.state_dict()[key].dtype == value.numpy().dtype
    y = x.numpy()
    for module in ours:
        y = module(y)
    np.testing.assert_allclose(y, theirs(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in ours.state_dict().items()})
    strict = theirs.state_dict()
    del strict["1.num_batches_tracked"]  # version metadata says that it has to be there
    with pytest.raises(nn.StateDictError, match="1.num_batches_tracked"):
        ours.load_state_dict(strict)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(half)
    assert np.array_equal(ours[0].weight, half["0.weight"].float().numpy())


# -- repr, copies -------------------------------------------------------------------------------

REPRS = [
    ("Conv2d(3, 8, 3, padding='same', padding_mode='reflect', bias=False)",
     "Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=same, bias=False, "
     "padding_mode=reflect)"),
    ("Conv1d(4, 8, 3, stride=2, padding=1, dilation=2, groups=4)",
     "Conv1d(4, 8, kernel_size=(3,), stride=(2,), padding=(1,), dilation=(2,), groups=4)"),
    ("ConvTranspose3d(3, 8, 3, stride=2, output_padding=1)",
     "ConvTranspose3d(3, 8, kernel_size=(3, 3, 3), stride=(2, 2, 2), output_padding=(1, 1, 1))"),
    ("Linear(3, 4, bias=False)", "Linear(in_features=3, out_features=4, bias=False)"),
    ("ReLU(inplace=True)", "ReLU(inplace=True)"),
    ("ReLU6()", "ReLU6()"),
    ("LeakyReLU(0.2, True)", "LeakyReLU(negative_slope=0.2, inplace=True)"),
    ("Hardswish(True)", "Hardswish()"),
    ("SiLU()", "SiLU()"),
    ("Sigmoid()", "Sigmoid()"),
    ("GELU('tanh')", "GELU(approximate='tanh')"),
    ("MaxPool2d((3, 2), 2, ceil_mode=True)",
     "MaxPool2d(kernel_size=(3, 2), stride=2, padding=0, dilation=1, ceil_mode=True)"),
    ("MaxPool1d(3)", "MaxPool1d(kernel_size=3, stride=3, padding=0, dilation=1, ceil_mode=False)"),
    ("AvgPool1d(3)", "AvgPool1d(kernel_size=(3,), stride=(3,), padding=(0,))"),
    ("AvgPool3d(3, 2)", "AvgPool3d(kernel_size=3, stride=2, padding=0)"),
    ("AdaptiveAvgPool2d((None, 3))", "AdaptiveAvgPool2d(output_size=(None, 3))"),
    ("Flatten()", "Flatten(start_dim=1, end_dim=-1)"),
    ("Dropout(0.2)", "Dropout(p=0.2, inplace=False)"),
    ("Upsample(scale_factor=2)", "Upsample(scale_factor=2.0, mode='nearest')"),
    ("Upsample((3, 4), mode='bilinear')", "Upsample(size=(3, 4), mode='bilinear')"),
    ("Identity(1, x=2)", "Identity()"),
    ("Sequential()", "Sequential()"),
    ("ModuleList([ReLU(), ReLU(), Sequential(ReLU())])",
     "ModuleList(\n  (0-1): 2 x ReLU()\n  (2): Sequential(\n    (0): ReLU()\n  )\n)"),
]


@pytest.mark.parametrize(("code", "text"), REPRS)
def test_repr(code, text):
    assert repr(eval(code, vars(nn))) == text


@pytest.mark.oracle
@pytest.mark.parametrize(("code", "text"), REPRS)
def test_repr_is_that_of_torch(torch, code, text):
    assert repr(eval(code, vars(torch.nn))) == text


def test_batch_norm_repr():
    expected = (
        "BatchNorm2d(3, eps=0.001, momentum=None, affine=True, bias=True, track_running_stats=True)"
    )
    assert repr(nn.BatchNorm2d(3, eps=1e-3, momentum=None)) == expected


def test_deepcopy_and_pickle_keep_everything():
    net = network().eval()
    net[0].conv.weight.requires_grad = False
    net[0].note = "kept"
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert repr(clone) == repr(net) and not clone.training
        assert clone[0].conv.weight.requires_grad is False and clone[0].note == "kept"
        for (name, a), (other, b) in zip(net.state_dict().items(), clone.state_dict().items()):
            assert name == other and np.array_equal(a, b) and not np.shares_memory(a, b)
        clone[0].conv = nn.Identity()
        assert isinstance(net[0].conv, nn.Conv2d)


def test_shallow_copy_shares_arrays_but_not_the_registry():
    conv = nn.Conv1d(1, 1, 1)
    clone = copy.copy(conv)
    assert clone.weight is conv.weight and repr(clone) == repr(conv)
    clone.extra = nn.Parameter(np.ones(1))
    clone.weight = np.zeros((1, 1, 1))
    del clone.bias
    assert list(conv.state_dict()) == ["weight", "bias"] and conv.weight is not clone.weight
    assert list(clone.state_dict()) == ["weight", "extra"]


# -- construction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        ("Conv2d(3, 8, 3, groups=2)", ValueError, "in_channels=3 and groups=2"),
        ("Conv2d(4, 7, 3, groups=2)", ValueError, "out_channels=7 and groups=2"),
        ("Conv2d(4, 8, 3, groups=0)", ValueError, "groups: expected at least 1, got 0"),
        ("Conv2d(4, 8, 3, padding='foo')", ValueError, "padding: .*'foo'"),
        ("Conv2d(4, 8, 3, padding='same', stride=2)", ValueError, "'same' needs stride 1"),
        ("Conv2d(4, 8, 3, padding_mode='foo')", ValueError, "padding_mode: .*'foo'"),
        ("ConvTranspose2d(4, 8, 3, padding_mode='reflect')", ValueError, "only 'zeros'"),
        ("ConvTranspose2d(4, 8, 3, padding='same')", ValueError, "padding: expected ints"),
        ("ConvTranspose2d(4, 8, 3, output_padding=-1)", ValueError, "output_padding"),
        ("Conv2d(-1, 8, 3)", ValueError, "in_channels"),
        ("Conv2d(1, 8, 0)", ValueError, "kernel_size: expected at least 1, got 0"),
        ("Conv2d(1, 8, (3, 3, 3))", ValueError, "kernel_size: expected an int or 2 ints, got 3"),
        ("Conv1d(1, 8, 3.0)", TypeError, "kernel_size: expected an int"),
        ("Conv1d(1, 8, 3, stride=0)", ValueError, "stride"),
        ("Conv1d(1, 8, 3, padding=-1)", ValueError, "padding"),
        ("Conv1d(1, 8, 3, dilation=0)", ValueError, "dilation"),
        ("Conv1d(1, 8, 3, dtype='int32')", TypeError, "dtype: .*int32"),
        ("Linear(2, 2, dtype=complex)", TypeError, "dtype: .*complex128"),
        ("Linear(-1, 2)", ValueError, "in_features"),
        ("BatchNorm1d(-1)", ValueError, "num_features"),
        ("BatchNorm1d(2, eps=-1e-5)", ValueError, "eps"),
        ("BatchNorm1d(2, eps=float('nan'))", ValueError, "eps"),
        ("Dropout(1.5)", ValueError, "p: .*1.5"),
        ("GELU('erf')", ValueError, "approximate: .*'erf'"),
        ("MaxPool2d(2, return_indices=True)", NotImplementedError, "return_indices"),
        ("MaxPool2d((2, 2, 2))", ValueError, "kernel_size"),
        ("MaxPool2d(2, stride=0)", ValueError, "stride"),
        ("AvgPool2d(2, divisor_override=0)", ValueError, "divisor_override"),
    ],
)
def test_constructors_refuse(code, error, match):
    with pytest.raises(error, match=match):
        eval(code, vars(nn))


def test_attributes_are_those_of_torch():
    conv = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), groups=2)
    assert (conv.in_channels, conv.out_channels, conv.groups) == (4, 6, 2)
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 1), (2, 2), (1, 0))
    assert (conv.dilation, conv.output_padding) == ((1, 1), (0, 0))
    assert conv.transposed is False and conv.padding_mode == "zeros"
    assert conv.weight.shape == (6, 2, 3, 1) and conv.bias.shape == (6,)
    transposed = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    assert transposed.transposed is True and transposed.weight.shape == (4, 3, 3)
    assert transposed.bias is None and "bias" not in transposed.state_dict()
    bn = nn.BatchNorm3d(5, affine=False, track_running_stats=False)
    assert bn.weight is None and bn.running_mean is None and bn.num_batches_tracked is None
    assert not bn.state_dict()
    assert nn.BatchNorm1d(5, bias=False).bias is None
    tracked = nn.BatchNorm2d(5).num_batches_tracked
    assert tracked.shape == () and tracked.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.float16, "float32", np.float64])
def test_dtype_reaches_every_array(dtype):
    for module in (
        nn.Conv1d(1, 2, 3, dtype=dtype), nn.ConvTranspose2d(1, 2, 3, dtype=dtype),
        nn.Linear(2, 2, dtype=dtype), nn.BatchNorm2d(2, dtype=dtype),
        nn.SyncBatchNorm(2, dtype=dtype),
    ):
        for name, array in module.state_dict().items():
            expected = np.int64 if name == "num_batches_tracked" else np.dtype(dtype)
            assert array.dtype == expected
    assert nn.Linear(1, 1).weight.dtype == np.float32


def test_initialisation_is_seedable_and_has_the_documented_distribution():
    nn.manual_seed(5)
    first = nn.Conv2d(16, 32, 3, groups=2)
    nn.manual_seed(5)
    second = nn.Conv2d(16, 32, 3, groups=2)
    assert np.array_equal(first.weight, second.weight) and np.array_equal(first.bias, second.bias)
    assert not np.array_equal(nn.Linear(3, 3).weight, nn.Linear(3, 3).weight)
    for module, bound in (
        (first, 1 / np.sqrt(72)), (nn.Linear(400, 100), 1 / 20),
        (nn.ConvTranspose2d(30, 20, 4), 1 / np.sqrt(320)),
    ):
        values = np.asarray(module.weight, np.float64)
        assert np.abs(values).max() <= np.float32(bound)
        assert np.abs(values).max() > 0.99 * bound
        assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert np.abs(module.bias).max() <= np.float32(bound)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "code",
    ["Conv2d(16, 32, 3, groups=2)", "ConvTranspose1d(32, 16, 5, groups=4)", "Linear(100, 50)"],
)
def test_initialisation_has_the_spread_of_torch(torch, code):
    ours, theirs = eval(code, vars(nn)), eval(code, vars(torch.nn))
    for name in ("weight", "bias"):
        spread = float(getattr(theirs, name).detach().abs().max())
        assert np.abs(getattr(ours, name)).max() == pytest.approx(spread, rel=0.25)
    assert np.std(np.asarray(ours.weight)) == pytest.approx(theirs.weight.std().item(), rel=0.1)
