# SPDX-License-Identifier: BSD-3-Clause
"""Small networks for the tests of the passes, and what every pass has to leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyconvbn import functional as F
from pyconvbn import fx, nn, testing

#: kind -> (makes a layer of 4 to 4 channels that keeps the spatial sizes, BatchNorm class, input shape)
KINDS: dict[str, tuple[Callable[..., Any], Any, tuple[int, ...]]] = {
    "linear": (lambda **kw: nn.Linear(4, 4, **kw), nn.BatchNorm1d, (5, 4)),
    "conv1d": (lambda **kw: nn.Conv1d(4, 4, 3, padding=1, groups=2, **kw), nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (lambda **kw: nn.Conv2d(4, 4, 3, padding=2, dilation=2, **kw), nn.BatchNorm2d, (2, 4, 7, 6)),
    "conv3d": (lambda **kw: nn.Conv3d(4, 4, 3, padding=1, **kw), nn.BatchNorm3d, (2, 4, 4, 5, 3)),
    "conv_transpose1d": (lambda **kw: nn.ConvTranspose1d(4, 4, 3, padding=1, **kw), nn.BatchNorm1d, (2, 4, 9)),
    "conv_transpose2d": (
        lambda **kw: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2, **kw), nn.BatchNorm2d, (2, 4, 6, 7)),
    "conv_transpose3d": (lambda **kw: nn.ConvTranspose3d(4, 4, 3, padding=1, **kw), nn.BatchNorm3d, (1, 4, 3, 4, 5)),
}


def randomise(module: Any, rng: np.random.Generator) -> Any:
    """Weights, statistics and affine parameters far from their defaults, in place; the module, in eval mode."""
    for m in module.modules():
        if isinstance(getattr(m, "running_mean", None), np.ndarray):
            m.running_mean[...] = rng.normal(2.0, 3.0, m.num_features)
            m.running_var[...] = rng.uniform(0.05, 9.0, m.num_features)
        if isinstance(getattr(m, "num_features", None), int) and m.weight is not None:
            m.weight[...] = rng.normal(0.0, 2.0, m.num_features)
            m.bias[...] = rng.normal(-1.0, 2.0, m.num_features)
    return module.eval()


class Pair(nn.Module):
    """bn(conv(x)) of one kind, by modules, functions or ATen operators."""

    def __init__(self, kind: str, rng: np.random.Generator, *, form: str = "module", bias: bool = True,
                 sync: bool = False, dtype: Any = np.float32) -> None:
        super().__init__()
        make, bn_class, _ = KINDS[kind]
        self.form, self.kind = form, kind
        self.conv1 = make(bias=bias, dtype=dtype)
        self.bn1 = (nn.SyncBatchNorm if sync else bn_class)(4, eps=0.01, dtype=dtype)
        randomise(self, rng)

    def forward(self, x: Any) -> Any:
        return call_pair(self, self.form, self.kind, self.conv1, self.bn1, x)


def conv_of(form: str, kind: str, conv: Any, x: Any) -> Any:
    """conv(x) in one of the three forms."""
    if form == "module":
        return conv(x)
    rest: tuple[Any, ...] = ()
    if kind.startswith("conv_transpose"):
        rest = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
    elif kind != "linear":
        rest = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if form == "functional":
        return getattr(F, kind)(x, conv.weight, conv.bias, *rest)
    from pyconvbn.ops import aten

    lists = tuple(list(v) if isinstance(v, tuple) else v for v in rest)
    overload = "input" if kind in ("conv_transpose2d", "conv_transpose3d") else "default"
    return getattr(getattr(aten, kind), overload)(x, conv.weight, conv.bias, *lists)


def bn_of(form: str, bn: Any, y: Any) -> Any:
    """bn(y) in one of the three forms."""
    if form == "module":
        return bn(y)
    if form == "functional":
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)
    from pyconvbn.ops import aten

    return aten.batch_norm.default(
        y, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, bn.eps, True
    )


def call_pair(root: Any, form: str, kind: str, conv: Any, bn: Any, x: Any) -> Any:
    return bn_of(form, bn, conv_of(form, kind, conv, x))


class Multi(nn.Module):
    """Three pairs, a convolution called twice in a row, inputs by keyword, and a value used twice."""

    def __init__(self, kind: str, rng: np.random.Generator, *, form: str = "module", bias: bool = True,
                 sync: bool = False, dtype: Any = np.float64) -> None:
        super().__init__()
        make, bn_class, _ = KINDS[kind]
        self.form, self.kind = form, kind
        for i in "123":
            setattr(self, f"conv{i}", make(bias=bias, dtype=dtype))
            setattr(self, f"bn{i}", (nn.SyncBatchNorm if sync else bn_class)(4, dtype=dtype))
        randomise(self, rng)

    def forward(self, x: Any) -> Any:
        if self.form != "module":
            conv = lambda i, v: conv_of(self.form, self.kind, getattr(self, f"conv{i}"), v)  # noqa: E731
            bn = lambda i, v: bn_of(self.form, getattr(self, f"bn{i}"), v)  # noqa: E731
            a, b, c = bn(1, conv(1, x)), bn(2, conv(2, conv(2, x))), bn(3, conv(3, x))
            return a + b + (c + bn(3, c)) + x
        a = self.bn1(self.conv1(input=x))
        b = self.bn2(input=self.conv2(self.conv2(x)))
        c = self.bn3(self.conv3(input=x))
        return a + b + (c + self.bn3(c)) + x

    def reference(self, x: Any) -> Any:
        """In float64, without tracing, modules or C."""
        x = np.asarray(x, np.float64)
        pair = testing.reference_conv_bn
        c = pair(x, self.conv3, self.bn3)
        again = testing.reference_module(self.bn3, c)
        return pair(x, self.conv1, self.bn1) + pair(pair(x, self.conv2), self.conv2, self.bn2) + (c + again) + x


def sample(kind: str, rng: np.random.Generator, dtype: Any = np.float32) -> Any:
    return rng.normal(size=KINDS[kind][2]).astype(dtype)


def close(actual: Any, wanted: Any, rtol: float = 1e-9) -> None:
    """For float64: equal to the reference but for rounding, relative to the largest value."""
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=rtol * max(1.0, float(np.max(np.abs(wanted)))))


def checked(gm: Any, report: Any) -> Any:
    """What holds after every pass."""
    gm.graph.lint()
    for row in report:
        assert (row.outcome == "kept") == (row.reason != "OK") == (row.new_node is None)
        assert row.outcome != "kept" or row.hint
        names = {node.name for node in gm.graph.nodes}
        assert (row.node in names) == (row.outcome == "kept")
        assert row.new_node is None or row.new_node in names
    return report


def trace(module: Any) -> Any:
    gm = fx.symbolic_trace(module)
    gm.graph.lint()
    return gm
