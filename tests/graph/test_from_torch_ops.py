# SPDX-License-Identifier: BSD-3-Clause
"""fx.from_torch: each function and tensor method beside torch, and in-place operations."""

from __future__ import annotations

import operator
import sys
from pathlib import Path

import numpy as np
import pytest

from pyconvbn import fx

sys.path.insert(0, str(Path(__file__).parent))
import torch_models  # noqa: E402

pytestmark = pytest.mark.oracle


def run_torch(torch, model, x):
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


OPERATIONS = [
    "x.view(2, -1)", "x.view((2, 4, 30))", "x.reshape(4, 60)", "torch.reshape(x, (8, 30))",
    "x.view(x.size(0), x.shape[1] * 30)", "x.view(x.shape)", "x.reshape(x.size())", "x.view(x.size()[:2] + (30,))",
    "x.view_as(x + 1)", "x.permute(0, 2, 3, 1)", "x.permute((3, 0, 1, 2))", "torch.permute(x, (3, 0, 1, 2))",
    "x.transpose(1, 2)", "x.transpose(-1, 0).contiguous()", "torch.transpose(x, 0, 3)", "x.swapaxes(0, 1)",
    "x[0, 0].t()", "x[0, 0].T", "x.mT", "x.movedim(1, 3)", "torch.moveaxis(x, 0, -1)", "x.flatten(1)",
    "torch.flatten(x, start_dim=2)", "x.flatten()", "x.unflatten(1, (2, 2))", "x.unflatten(1, (-1, 2))",
    "x.unsqueeze(1)", "x.unsqueeze(-1)", "x[:, :1].squeeze(1)", "x[:1, :1].squeeze()", "x.squeeze(1)",
    "torch.squeeze(x[:1], (0, 1))", "x[:, :1].expand(2, 5, 5, 6)", "x[:, :1].expand(-1, 3, -1, -1)",
    "x[:, :1].expand_as(x)", "x.repeat(1, 2, 1, 3)", "x.chunk(2, 1)[1]", "x.chunk(3, dim=3)[2]",
    "torch.chunk(x, 4, 1)[3]", "x.split(3, 1)[1]", "x.split([1, 3], dim=1)[1]", "torch.split(x, 4, -1)[1]",
    "torch.split(x, [2, 4], dim=3)[0]", "x.unbind(1)[2]", "x.narrow(1, 1, 2)", "x.select(2, -1)",
    "torch.cat([x, x], 1)", "torch.cat((x, x * 2), dim=-1)", "torch.cat(tensors=[x, x], axis=2)",
    "torch.concat([x, x])", "torch.stack([x, -x])", "torch.stack((x, x), dim=2)", "x.flip(1)",
    "torch.flip(x, [2, 3])", "torch.roll(x, 2, 1)", "x.roll((1, -2), (2, 3))", "x[..., 0]", "x[:, None, 1:3, ::2]",
    "x[0]", "x[:, [0, 2]]", "x[-1, :, 2]", "x + 1", "1 - x", "x * x", "x / 3", "2 / (x + 9)", "-x", "abs(x)",
    "(x + 9) ** 2", "x // 0.5", "x @ x.transpose(2, 3)", "torch.add(x, x, alpha=2)", "x.add(1)", "torch.sub(x, 2)",
    "x.sub(x, alpha=3)", "torch.mul(x, 2.5)", "x.div(4)", "torch.div(x, 0.3, rounding_mode='floor')",
    "torch.div(x, 0.3, rounding_mode='trunc')", "torch.matmul(x, x.transpose(2, 3))",
    "torch.bmm(x[0], x[1].transpose(1, 2))", "torch.rsub(x, 2)", "torch.pow(x, 2)", "(x + 9).pow(0.5)",
    "torch.abs(x)", "x.neg()", "torch.maximum(x, -x)", "torch.minimum(x, x * 2)", "x.clamp(-0.5, 0.5)",
    "torch.clamp(x, min=0)", "x.clamp(max=0.25)", "x.clamp_min(0.1)", "torch.where(x > 0, x, -x)",
    "torch.where(x > 0, x, 0.5)", "torch.where(x > 0, 1.0, x)", "x.masked_fill(x < 0, 7.0)",
    "torch.addmm(x[0, 0, 0], x[0, 0], x[0, 0].t() @ x[0, 1])", "torch.einsum('nchw,mchw->nm', x, x)", "x.mean()",
    "x.mean(1)", "x.mean((2, 3))", "x.mean([2, 3], True)", "torch.mean(x, dim=-1)", "x.mean(axis=1, keepdims=True)",
    "x.sum()", "x.sum(dim=(0, 2))", "torch.sum(x, 1, keepdim=True)", "x.amax((2, 3))", "torch.amin(x, 1, True)",
    "x.max()", "torch.min(x)", "x.max(1)[0]", "x.max(dim=2, keepdim=True).values", "torch.max(x, 3)[1]",
    "x.min(1).indices", "torch.max(x, -x)", "x.argmax(1)", "torch.argmax(x)", "x.var(1)",
    "torch.var(x, (2, 3), unbiased=False)", "x.std((0, 1), keepdim=True)", "x.var((2, 3), correction=0)",
    "torch.relu(x)", "x.relu()", "F.relu(x)", "F.relu6(x * 9)", "F.hardtanh(x, -0.3, 0.6)", "F.leaky_relu(x)",
    "F.leaky_relu(x, 0.3)", "F.silu(x)", "F.gelu(x)", "F.gelu(x, approximate='tanh')", "F.hardswish(x * 4)",
    "F.hardsigmoid(x * 4)", "F.mish(x)", "F.elu(x, 0.7)", "F.softplus(x)", "F.softplus(x, 2, 1)", "torch.sigmoid(x)",
    "x.sigmoid()", "F.logsigmoid(x)", "torch.tanh(x)", "F.tanh(x)", "x.tanh()", "F.glu(x, 1)", "F.softmax(x, 1)",
    "torch.softmax(x, dim=-1)", "x.softmax(1)", "F.log_softmax(x, dim=1)", "x.log_softmax(2)", "torch.exp(x)",
    "(x + 9).log()", "(x * x).sqrt()", "(x + 9).rsqrt()", "torch.erf(x)", "torch.floor(x * 5)", "x.ceil()",
    "(x + 9).reciprocal()", "x.square()", "torch.sign(x)", "torch.sin(x)", "x.cos()", "torch.log1p(x * x)",
    "torch.expm1(x)", "torch.isnan(x)", "F.normalize(x)", "F.normalize(x, dim=-1)", "F.max_pool2d(x, 2)",
    "F.max_pool2d(x, 3, 2, 1, ceil_mode=True)", "torch.max_pool2d(x, 2, 1)", "F.avg_pool2d(x, (2, 3), stride=1)",
    "F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)", "F.avg_pool2d(x, 2, divisor_override=3)",
    "F.adaptive_avg_pool2d(x, (1, 1))", "F.adaptive_avg_pool2d(x, (2, None))", "F.avg_pool1d(x[0], 2)",
    "F.max_pool1d(x[0], 2)", "F.adaptive_avg_pool1d(x[0], 2)", "F.max_pool3d(x[None], 2)", "F.avg_pool3d(x[None], 2)",
    "F.pad(x, (1, 2))", "F.pad(x, [1, 0, 2, 1], value=3.0)", "F.pad(x, (1, 1, 1, 1), mode='reflect')",
    "F.pad(x, (1, 1, 2, 0), 'replicate')", "F.pad(x, (1, 1, 1, 1), mode='circular')", "F.pad(x, (-1, 0))",
    "F.interpolate(x, scale_factor=2)", "F.interpolate(x, size=(3, 9))", "F.interpolate(x, (10, 12), mode='nearest')",
    "F.interpolate(x, scale_factor=1.5, mode='bilinear', align_corners=False)",
    "F.interpolate(x, size=7, mode='bilinear', align_corners=True)", "F.interpolate(x, size=x.shape[2:])",
    "F.pixel_shuffle(x, 2)", "torch.pixel_unshuffle(x[..., :4, :], 2)", "F.channel_shuffle(x, 2)",
    "F.dropout(x, 0.4, False)", "F.dropout(x, p=0.4, training=self.training)", "torch.dropout(x, 0.4, False)",
    "x.as_strided((2, 3), (1, 2))", "torch.as_strided(x, (2, 2), (3, 1), 4)", "torch.as_strided(x[1:], [3], [2], 1)",
    "x.contiguous()", "x.contiguous(memory_format=torch.channels_last)", "x.clone()", "x.detach()",
    "x.to(torch.float64)", "x.to('cpu')", "x.to(x.device)", "x.to(x.dtype)", "x.double()", "x.float()", "x.half()",
    "x.type(torch.float64)", "x.type_as(x.double())", "x.to(dtype=torch.float16)", "(x > 0).float()",
    "(x > 0).long()", "torch.zeros_like(x)", "torch.ones(2, 3) + x[0, 0, 0, 0]",
    "x * x.size(1)", "x / x.shape[-1] ** 0.5", "x.data",
    "x * (x.dim() + x.ndim)", "x / x.numel()", "F.layer_norm(x, (6,))", "F.group_norm(x, 2)", "F.conv2d(x, self.w)",
    "torch.conv2d(x, self.w, self.b, 2, 1)", "F.conv2d(x, weight=self.w, padding='same')",
    "F.conv_transpose2d(x, self.w.transpose(0, 1), stride=2)", "F.linear(x, self.m)",
    "F.batch_norm(x, self.b, self.b * self.b + 1)",
    "torch.batch_norm(x, None, None, self.b, self.v, False, 0.1, 1e-3, False)",
    "torch.convolution(x, self.w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)", "x == x",
    "x * torch.tensor(3)", "torch.tensor([2]) - x", "x / torch.tensor([1, 2, 3, 4, 5, 6])", "x.argmax(1) * 0.5",
    "(x > 0).sum() / x.numel()", "1 - (x > 0).long()", "x.max(1)[1] + x[:, 0]", "2 * x.max(1).indices / 3", "x > 0",
    "torch.ge(x, 0.1)", "x.lt(0)", "(x > 0) & (x < 1)",
]


@pytest.mark.parametrize("source", OPERATIONS)
def test_operations(torch, rng, source):
    model = torch_models.model_of(torch, source)
    module = fx.from_torch(model)
    module.graph.lint()
    x = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    expected = run_torch(torch, model, x)
    got = np.asarray(module(x.copy()))
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if expected.dtype.kind != "f":
        assert np.array_equal(got, expected)
        return
    scale = np.abs(expected).max(initial=0.0)
    assert np.abs(got.astype(np.float64) - expected).max(initial=0.0) <= 64 * np.finfo(expected.dtype).eps * scale


# -- in-place operations ---------------------------------------------------------------------------------------------
IN_PLACE = {
    "relu_then_old_name": "y = x * 2\n    z = F.relu(y, inplace=True)\n    return y + z",
    "method": "y = x * 2\n    y.add_(1).mul_(3)\n    return y",
    "method_alpha": "y = x * 2\n    y.add_(x, alpha=3)\n    return y - x",
    "function": "y = x * 2\n    torch.relu_(y)\n    return y + 1",
    "unused_result": "y = x + 0\n    y.clamp_(min=0.1)\n    return y * 2",
    "view_before": "y = x * 2\n    v = y.view(2, -1)\n    y.relu_()\n    return v + 1",
    "write_view": "y = x * 2\n    v = y[:, 0]\n    v.mul_(5)\n    return y",
    "write_chunk": "y = x * 2\n    a, b = y.chunk(2, 1)\n    a.mul_(0)\n    return y + 0",
    "transposed_view": "y = x * 2\n    v = y.transpose(1, 2)\n    F.leaky_relu(v, 0.1, True)\n    return y",
    "detached": "y = x * 2\n    v = y.detach()\n    v.neg_()\n    return y",
    "identity_dropout": "y = x * 2\n    v = F.dropout(y, 0.5, False)\n    v.add_(1)\n    return y",
    "chain": "y = x * 2\n    a = y.add_(1)\n    b = a.mul_(2)\n    c = y.add_(3)\n    return a + b + c + y",
    "module": "y = x * 2\n    z = self.act(y)\n    return y + z",
    "module_and_view": "y = x * 2\n    v = y.flatten(1)\n    z = self.act(y)\n    return v + z.flatten(1)",
    "two_views": "y = x * 2\n    v, w = y[:, :2], y[:, 1:]\n    v.add_(1)\n    w.mul_(2)\n    return v + w[:, :2]",
    "augmented": "y = x * 2\n    z = y\n    y += 1\n    return y + z",
    "augmented_view": "y = x * 2\n    v = y[:, 1:]\n    v *= 3\n    v -= 1\n    return y / 2",
    "augmented_size": "n = x.size(1)\n    m = n\n    n += 1\n    s = x.shape[:2]\n    t = s\n    t += (30,)\n    "
                      "return x.view(t)[:, :, 0].view(s) * m + n",
    "iadd": "y = x * 2\n    z = operator.iadd(y, 1)\n    return y + z",
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_operations(torch, rng, case):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.ReLU(inplace=True)

    names = {"torch": torch, "F": torch.nn.functional, "operator": operator}
    exec(f"def forward(self, x):\n    {IN_PLACE[case]}\n", names)
    Model.forward = names["forward"]
    model = Model().eval()
    module = fx.from_torch(model)
    x = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    expected = run_torch(torch, model, x.copy())
    for _ in range(2):
        got = module(x)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    module.graph.eliminate_dead_code()
    assert np.abs(module(x) - expected).max() <= 1e-5 * np.abs(expected).max()


def random_program(seed: int) -> str:
    """Statements with views, in-place operations and several names for one tensor; all values are returned."""
    rng = np.random.default_rng(seed)
    names, lines = ["v0"], ["v0 = x * 2"]
    for _ in range(int(rng.integers(4, 12))):
        a, b = (str(rng.choice(names)) for _ in range(2))
        new = f"v{len(names)}"
        statement = str(rng.choice([
            "{new} = {a} * 3", "{new} = {a} + {b}.mean()", "{new} = {a}", "{new} = {a}[:, 1:]",
            "{new} = {a}.transpose(0, 1)", "{new} = {a}.detach()", "{new} = {a}.unsqueeze(0).squeeze(0)",
            "{new} = {a}.chunk(2, 0)[0]", "{new} = F.dropout({a}, 0.5, False)", "{new} = self.same({a})",
            "{new} = self.act({a})", "{new} = {a}.mul_(1.5)", "{new} = F.relu({a}, inplace=True)", "{a}.add_(1)",
            "{a} += 0.5", "{a} *= {b}.mean()", "F.leaky_relu({a}, 0.1, True)", "{a}.clamp_(-2, 2)",
            "{a}[:1].neg_()", "{a}.copy_({a} - 1)", "{a}[:, :2].fill_(3)", "{a}[1:].zero_()", "{new} = {a}.clone()",
            "{new} = {a}.sub_({b}.sum() * 0.01)",
        ]))
        lines.append(statement.format(a=a, b=b, new=new))
        if "{new}" in statement:
            names.append(new)
    return "\n    ".join([*lines, f"return {', '.join(names)},"])


@pytest.mark.parametrize("seed", range(150))
def test_random_in_place_programs(torch, rng, seed):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.ReLU(inplace=True)
            self.same = torch.nn.Identity()

    source = random_program(seed)
    names = {"torch": torch, "F": torch.nn.functional}
    exec(f"def forward(self, x):\n    {source}\n", names)
    Model.forward = names["forward"]
    model = Model().eval()
    x = rng.normal(size=(4, 5)).astype(np.float32)
    with torch.no_grad():
        expected = [value.numpy() for value in model(torch.from_numpy(x.copy()))]
    module = fx.from_torch(model)
    got = module(x)
    assert len(got) == len(expected)
    for i, (mine, right) in enumerate(zip(got, expected)):
        assert mine.shape == right.shape
        assert np.abs(mine - right).max() <= 1e-4 * (1 + np.abs(right).max()), f"v{i} of\n    {source}"
