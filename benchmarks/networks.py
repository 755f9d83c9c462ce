# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks as chains of steps, random weights: what chains.py runs through every library.

A network is a list of `Step`s in order of execution. Step 0 is the input; a step names the steps it reads. Convolutions
carry folded weights and bias, an activation ('relu', 'relu6' or None) applied after an optional residual is added.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass
class Step:
    """kind: input, conv, max_pool, global_pool, concat, linear."""

    kind: str
    name: str
    shape: tuple[int, ...]  # of the result, batch included
    sources: tuple[int, ...] = ()
    residual: int | None = None
    activation: str | None = None
    weight: Floats | None = None
    bias: Floats | None = None
    geometry: dict[str, Any] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Two per multiply-add; padded taps counted."""
        if self.weight is None:
            return 0
        if self.kind == "linear":
            return 2 * self.shape[0] * self.weight.size
        if self.geometry.get("transposed"):
            pixels = math.prod(self.geometry["in_size"])
            return 2 * self.shape[0] * pixels * self.weight.size
        return 2 * self.shape[0] * math.prod(self.shape[2:]) * self.weight.size


class Network:
    """Builds the list of steps; every method returns the number of its step."""

    def __init__(self, name: str, batch: int, channels: int, size: tuple[int, ...]) -> None:
        self.name = name
        self.rng = np.random.default_rng(1)
        self.steps = [Step("input", "input", (batch, channels, *size))]

    @property
    def nd(self) -> int:
        return len(self.steps[0].shape) - 2

    def _axes(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * self.nd

    def conv(self, x: int, oc: int, kernel: int | tuple[int, ...], *, stride: int | tuple[int, ...] = 1,
             padding: int | tuple[int, ...] = 0, groups: int = 1, activation: str | None = "relu",
             residual: int | None = None, transposed: bool = False) -> int:
        n, ic, *size = self.steps[x].shape
        k, s, p = self._axes(kernel), self._axes(stride), self._axes(padding)
        shape = (ic, oc // groups, *k) if transposed else (oc, ic // groups, *k)
        terms = ic // groups * math.prod(k)
        # He weights keep activations near 1 through a deep chain; a residual doubles the variance, so less there.
        scale = math.sqrt((0.5 if residual is not None else 2) / terms)
        weight = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        bias = self.rng.normal(0, 0.1, oc).astype(np.float32)
        if transposed:
            out = [(i - 1) * b + a - 2 * c for i, a, b, c in zip(size, k, s, p, strict=True)]
        else:
            out = [(i + 2 * c - a) // b + 1 for i, a, b, c in zip(size, k, s, p, strict=True)]
        text = "x".join(map(str, k)) + ("t" if transposed else "") + (f" g{groups}" if groups > 1 else "")
        if set(s) != {1}:
            text += f" s{'x'.join(map(str, s))}"
        name = f"conv {ic}>{oc} {text} @{'x'.join(map(str, out))}"
        geometry = {"stride": s, "padding": p, "groups": groups, "transposed": transposed, "kernel": k,
                    "in_size": tuple(size)}
        self.steps.append(Step("conv", name, (n, oc, *out), (x,), residual, activation, weight, bias, geometry))
        return len(self.steps) - 1

    def max_pool(self, x: int, kernel: int, stride: int, padding: int = 0) -> int:
        n, c, *size = self.steps[x].shape
        out = [(i + 2 * padding - kernel) // stride + 1 for i in size]
        geometry = {"kernel": self._axes(kernel), "stride": self._axes(stride), "padding": self._axes(padding)}
        self.steps.append(Step("max_pool", f"max pool @{'x'.join(map(str, out))}", (n, c, *out), (x,), geometry=geometry))
        return len(self.steps) - 1

    def global_pool(self, x: int) -> int:
        n, c = self.steps[x].shape[:2]
        self.steps.append(Step("global_pool", "global average pool", (n, c), (x,)))
        return len(self.steps) - 1

    def concat(self, x: int, y: int) -> int:
        n, _, *size = self.steps[x].shape
        channels = self.steps[x].shape[1] + self.steps[y].shape[1]
        self.steps.append(Step("concat", f"concat {channels}", (n, channels, *size), (x, y)))
        return len(self.steps) - 1

    def linear(self, x: int, oc: int, activation: str | None = None) -> int:
        n = self.steps[x].shape[0]
        features = math.prod(self.steps[x].shape[1:])
        weight = self.rng.standard_normal((oc, features), dtype=np.float32) * np.float32(math.sqrt(2 / features))
        bias = self.rng.normal(0, 0.1, oc).astype(np.float32)
        self.steps.append(Step("linear", f"linear {features}>{oc}", (n, oc), (x,), None, activation, weight, bias))
        return len(self.steps) - 1


def resnet50(batch: int, scale: int = 1) -> Network:
    """ResNet-50 v1.5 (He et al. 2015; stride in the 3x3). `scale` divides the image's side, for tests."""
    net = Network("resnet-50", batch, 3, (224 // scale,) * 2)
    x = net.max_pool(net.conv(0, 64, 7, stride=2, padding=3), 3, 2, 1)
    for width, blocks, first_stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            short = net.conv(x, 4 * width, 1, stride=stride, activation=None) if block == 0 else x
            y = net.conv(net.conv(x, width, 1), width, 3, stride=stride, padding=1)
            x = net.conv(y, 4 * width, 1, residual=short)
    net.linear(net.global_pool(x), 1000)
    return net


def vgg16(batch: int, scale: int = 1) -> Network:
    """VGG-16 (Simonyan & Zisserman 2014)."""
    net = Network("vgg-16", batch, 3, (224 // scale,) * 2)
    x = 0
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            x = net.conv(x, width, 3, padding=1)
        x = net.max_pool(x, 2, 2)
    net.linear(net.linear(net.linear(x, 4096, "relu"), 4096, "relu"), 1000)
    return net


def mobilenet_v2(batch: int, scale: int = 1) -> Network:
    """MobileNet-V2, width 1 (Sandler et al. 2018)."""
    net = Network("mobilenet-v2", batch, 3, (224 // scale,) * 2)
    x = net.conv(0, 32, 3, stride=2, padding=1, activation="relu6")
    for expand, width, blocks, first_stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2),
                                                (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            inner = net.steps[x].shape[1] * expand
            y = net.conv(x, inner, 1, activation="relu6") if expand > 1 else x
            y = net.conv(y, inner, 3, stride=stride, padding=1, groups=inner, activation="relu6")
            x = net.conv(y, width, 1, activation=None, residual=x if block else None)
    net.linear(net.global_pool(net.conv(x, 1280, 1, activation="relu6")), 1000)
    return net


def ecg_resnet(batch: int, scale: int = 1) -> Network:
    """A 1-D residual network of the kind used on 12-lead ECGs: k = 7 throughout, 5,000 samples."""
    net = Network("ecg-resnet", batch, 12, (5000 // scale,))
    x = net.max_pool(net.conv(0, 64, 15, stride=2, padding=7), 3, 2, 1)
    for width, blocks, first_stride in ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)):
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            short = net.conv(x, width, 1, stride=stride, activation=None) if stride > 1 else x
            x = net.conv(net.conv(x, width, 7, stride=stride, padding=3), width, 7, padding=3, residual=short)
    net.linear(net.global_pool(x), 9)
    return net


def r3d_18(batch: int, scale: int = 1) -> Network:
    """r3d_18 (Tran et al. 2018): 16 frames of 112 x 112."""
    net = Network("r3d-18", batch, 3, (16, 112 // scale, 112 // scale))
    x = net.conv(0, 64, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3))
    for width, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for block in range(2):
            stride = first_stride if block == 0 else 1
            short = net.conv(x, width, 1, stride=stride, activation=None) if stride > 1 else x
            x = net.conv(net.conv(x, width, 3, stride=stride, padding=1), width, 3, padding=1, residual=short)
    net.linear(net.global_pool(x), 400)
    return net


def unet(batch: int, scale: int = 1) -> Network:
    """U-Net (Ronneberger et al. 2015), padded convolutions, 64 channels at 224 x 224."""
    net = Network("u-net", batch, 3, (224 // scale,) * 2)
    x, skips = 0, []
    for width in (64, 128, 256, 512):
        x = net.conv(net.conv(x, width, 3, padding=1), width, 3, padding=1)
        skips.append(x)
        x = net.max_pool(x, 2, 2)
    x = net.conv(net.conv(x, 1024, 3, padding=1), 1024, 3, padding=1)
    for width, skip in zip((512, 256, 128, 64), reversed(skips), strict=True):
        x = net.concat(skip, net.conv(x, width, 2, stride=2, transposed=True, activation=None))
        x = net.conv(net.conv(x, width, 3, padding=1), width, 3, padding=1)
    net.conv(x, 2, 1, activation=None)
    return net


NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet-50": resnet50, "vgg-16": vgg16, "mobilenet-v2": mobilenet_v2, "ecg-resnet": ecg_resnet,
    "r3d-18": r3d_18, "u-net": unet,
}
