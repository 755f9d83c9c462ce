# SPDX-License-Identifier: BSD-3-Clause
"""The network of ``pyconvbn demo`` and the forms it is run in.

The network is an ordinary module. What becomes of its BatchNorms is found by tracing it and running the passes on the
graph, as for any other network; freezing goes one step further and prepares each layer.
"""

from __future__ import annotations

import copy
import importlib.resources
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import freezing, functional, fx, nn, passes, testing

if TYPE_CHECKING:
    from .report import FoldReport

__all__ = ["DigitsNet", "Forms", "load_demo", "make_forms", "reference_logits"]

_Array = NDArray[Any]


class _ConvBN(nn.Module):
    """A convolution and the BatchNorm that reads it."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: _Array) -> _Array:
        y: _Array = self.bn(self.conv(x))
        return y


class _LinearBN(nn.Module):
    """A linear layer and the BatchNorm1d that reads it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.bn = nn.BatchNorm1d(out_features)

    def forward(self, x: _Array) -> _Array:
        y: _Array = self.bn(self.linear(x))
        return y


class DigitsNet(nn.Module):
    """Classifier of 8x8 digits: ``[N, 1, 8, 8]`` pixels from 0 to 16 to ``[N, 10]`` logits.

    Stem, depthwise-separable block, residual block with 1x1 shortcut, grouped transposed
    convolution back to full size, a BatchNorm after an addition, a dilated convolution and a
    Linear + BatchNorm1d head. Trained by ``benchmarks/demo_model/train.py``.

    >>> net, images, labels = load_demo()
    >>> bool((net(images).argmax(1) == labels).mean() > 0.98)
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvBN(nn.Conv2d(1, 16, 3, padding=1), 16)
        self.depthwise = _ConvBN(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), 16)
        self.pointwise = _ConvBN(nn.Conv2d(16, 32, 1, bias=False), 32)
        self.res1 = _ConvBN(nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), 48)
        self.res2 = _ConvBN(nn.Conv2d(48, 48, 3, padding=1), 48)
        self.shortcut = _ConvBN(nn.Conv2d(32, 48, 1, stride=2), 48)
        self.up = _ConvBN(
            nn.ConvTranspose2d(48, 32, 3, stride=2, padding=1, output_padding=1, groups=4), 32
        )
        self.norm = nn.BatchNorm2d(32)
        self.context = _ConvBN(nn.Conv2d(32, 32, 3, padding=2, dilation=2, bias=False), 32)
        self.head = _LinearBN(32 * 2 * 2, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: _Array) -> _Array:
        """Logits of a batch."""
        relu = functional.relu
        x = relu(self.stem(x))
        x = relu(self.depthwise(x))
        skip = relu(self.pointwise(x))
        x = relu(self.res2(relu(self.res1(skip))) + self.shortcut(skip))
        x = self.up(x) + skip
        # This BatchNorm reads a sum: there is no single convolution to fold it into.
        x = relu(self.norm(x))
        x = relu(self.context(x))
        x = functional.flatten(functional.adaptive_avg_pool2d(x, 2), 1)
        x = relu(self.head(x))
        y: _Array = self.classifier(x)
        return y


def load_demo() -> tuple[DigitsNet, _Array, _Array]:
    """The trained network in eval mode, its held-out images [N, 1, 8, 8] as float32, the labels.

    Raises `FileNotFoundError` if the package's data file is missing.
    """
    source = importlib.resources.files("pyconvbn") / "data" / "digits_demo.npz"
    with source.open("rb") as file, np.load(file, allow_pickle=False) as data:
        arrays = dict(data)
    images = arrays.pop("images").astype(np.float32)[:, np.newaxis]
    labels = arrays.pop("labels").astype(np.int64)
    net = DigitsNet()
    net.load_state_dict({key.removeprefix("state/"): value for key, value in arrays.items()})
    return net.eval(), images, labels


# -- the forms it is run in ----------------------------------------------------------------------


class Forms(NamedTuple):
    """The demo network, traced, and what the passes make of it."""

    unfused: fx.GraphModule
    one_shot: fx.GraphModule  # efficient_conv_bn_eval: parameters read at each call
    folded: fx.GraphModule  # fuse_conv_bn: BatchNorm in the weights
    frozen: fx.GraphModule  # freeze: prepared operators
    report: FoldReport  # of fuse_conv_bn


def make_forms(net: nn.Module, shape: tuple[int, ...]) -> Forms:
    """Traces `net` and runs the passes; `shape` is that of its input. `net` is not changed."""
    unfused = fx.symbolic_trace(net)
    fx.shape_prop(unfused, shape)
    one_shot = copy.deepcopy(unfused)
    passes.efficient_conv_bn_eval(one_shot)
    folded, report = passes.fuse_conv_bn(unfused)
    frozen, _ = freezing.freeze(unfused, np.zeros(shape, np.float32))
    return Forms(unfused, one_shot, folded, frozen, report)


# -- float64 -------------------------------------------------------------------------------------

_REFERENCES: dict[Any, Callable[..., Any]] = {
    functional.relu: testing.reference_relu,
    functional.adaptive_avg_pool2d: lambda x, size: testing.reference_adaptive_avg_pool(2, x, size),
    functional.flatten: lambda x, start: x.reshape(*x.shape[:start], -1),
    operator.add: operator.add,
}


class _Reference(fx.Interpreter):
    """Runs the graph in float64 NumPy, independent of the C extension."""

    def call_module(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return testing.reference_module(self.module.get_submodule(target), *args, **kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _REFERENCES[target](*args, **kwargs)


def reference_logits(net: nn.Module, images: _Array) -> NDArray[np.float64]:
    """What the demo network computes for `images` [N, 1, 8, 8] in float64 NumPy."""
    logits: NDArray[np.float64] = _Reference(fx.symbolic_trace(net)).run(images.astype(np.float64))
    return logits
