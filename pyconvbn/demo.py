# SPDX-License-Identifier: BSD-3-Clause
"""The network of ``pyconvbn demo``, the ways to run it, and which of its BatchNorms can be fused.

The network is written once, over a small set of operations (`Unfused`). Other ways to run it
replace operations: `OneShot` and `Planned` fuse, `Reference` computes in float64, `Recorder`
writes down who read whose output. What is fused follows from that record, never from a list.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _efficient, functional, nn, plan, testing

__all__ = [
    "BatchNormRow",
    "DigitsNet",
    "OneShot",
    "Planned",
    "Recorder",
    "Reference",
    "Unfused",
    "batch_norm_rows",
    "describe_flow",
    "has_weight_matrix",
    "load_demo",
]

_Array = NDArray[Any]


class _ConvBN(nn.Module):
    """Holds a convolution and its BatchNorm; `DigitsNet.forward` connects them."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(channels)


class _LinearBN(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.bn = nn.BatchNorm1d(out_features)


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

    def forward(self, x: _Array, run: Unfused | None = None) -> _Array:
        """Logits of a batch; `run` says how the operations are computed (default: unfused)."""
        run = Unfused(self) if run is None else run
        x = run.conv_bn("stem.conv", "stem.bn", x)
        x = run.conv_bn("depthwise.conv", "depthwise.bn", x)
        skip = run.conv_bn("pointwise.conv", "pointwise.bn", x)
        short = run.conv_bn("shortcut.conv", "shortcut.bn", skip, relu=False)
        x = run.conv_bn("res1.conv", "res1.bn", skip)
        x = run.conv_bn("res2.conv", "res2.bn", x, residual=short)
        x = run.conv_bn("up.conv", "up.bn", x, residual=skip, relu=False)
        x = run.relu(run.module("norm", x))
        x = run.conv_bn("context.conv", "context.bn", x)
        x = run.flatten(run.pool(x, 2))
        x = run.conv_bn("head.linear", "head.bn", x)
        return run.module("classifier", x)


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


# -- ways to run the network -------------------------------------------------------------------


class Unfused:
    """Every operation by itself, in the network's dtype."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def module(self, name: str, x: _Array) -> _Array:
        y: _Array = self.net.get_submodule(name)(x)
        return y

    def relu(self, x: _Array) -> _Array:
        return functional.relu(x)

    def add(self, x: _Array, y: _Array) -> _Array:
        return functional.add(x, y)

    def pool(self, x: _Array, size: int) -> _Array:
        return functional.adaptive_avg_pool2d(x, size)

    def flatten(self, x: _Array) -> _Array:
        return x.reshape(len(x), -1)

    def conv_bn(
        self, conv: str, bn: str, x: _Array, *, residual: _Array | None = None, relu: bool = True
    ) -> _Array:
        """`relu(bn(conv(x)) + residual)`, the unit that other runs fuse."""
        y = self.module(bn, self.module(conv, x))
        return self.finish(y, residual, relu)

    def finish(self, y: _Array, residual: _Array | None, relu: bool) -> _Array:
        if residual is not None:
            y = self.add(y, residual)
        return self.relu(y) if relu else y


class Reference(Unfused):
    """Float64 NumPy, independent of the C extension."""

    def module(self, name: str, x: _Array) -> _Array:
        return testing.reference_module(self.net.get_submodule(name), x)

    def relu(self, x: _Array) -> _Array:
        return testing.reference_relu(x)

    def add(self, x: _Array, y: _Array) -> _Array:
        return x + y

    def pool(self, x: _Array, size: int) -> _Array:
        return testing.reference_adaptive_avg_pool(2, x, size)


class Event(NamedTuple):
    """One operation that ran: its name, what it read, what it wrote."""

    name: str
    is_module: bool
    inputs: tuple[_Array, ...]
    output: _Array


class Recorder(Unfused):
    """Runs the network unfused and keeps every operation with its arrays."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.events: list[Event] = []

    def _keep(self, name: str, is_module: bool, output: _Array, *inputs: _Array) -> _Array:
        self.events.append(Event(name, is_module, inputs, output))
        return output

    def module(self, name: str, x: _Array) -> _Array:
        return self._keep(name, True, super().module(name, x), x)

    def relu(self, x: _Array) -> _Array:
        return self._keep("relu", False, super().relu(x), x)

    def add(self, x: _Array, y: _Array) -> _Array:
        return self._keep("add", False, super().add(x, y), x, y)

    def pool(self, x: _Array, size: int) -> _Array:
        return self._keep("adaptive_avg_pool2d", False, super().pool(x, size), x)

    def flatten(self, x: _Array) -> _Array:
        return self._keep("flatten", False, super().flatten(x), x)

    def producer(self, array: _Array) -> Event | None:
        """The operation that wrote this very array; None for the network's input."""
        return next((event for event in self.events if event.output is array), None)

    def users(self, array: _Array) -> int:
        return sum(array is used for event in self.events for used in event.inputs)


class OneShot(Unfused):
    """`efficient_conv_bn_eval` for the BNs that allow it, parameters read at every call."""

    def __init__(self, net: nn.Module, fused: set[str]) -> None:
        super().__init__(net)
        self.fused = fused

    def conv_bn(
        self, conv: str, bn: str, x: _Array, *, residual: _Array | None = None, relu: bool = True
    ) -> _Array:
        if bn not in self.fused:
            return super().conv_bn(conv, bn, x, residual=residual, relu=relu)
        y = _efficient.efficient_conv_bn_eval(
            self.net.get_submodule(bn), self.net.get_submodule(conv), x
        )
        return self.finish(y, residual, relu)


class Planned(OneShot):
    """Prepared operators: folded and packed once, addition and ReLU inside.

    A plan is made at the first use of a layer, which is when its activation is known.
    """

    def __init__(self, net: nn.Module, fused: set[str]) -> None:
        super().__init__(net, fused)
        self.plans: dict[str, plan.Plan] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.absorbed: dict[str, list[str]] = {}

    def _plan(self, conv: str, bn: str | None, relu: bool, x: _Array) -> plan.Plan:
        made = self.plans.get(conv)
        if made is None:
            made = self.plans[conv] = plan.Plan.from_modules(
                self.net.get_submodule(conv),
                None if bn is None else self.net.get_submodule(bn),
                activation="relu" if relu else None,
            )
            self.shapes[conv] = x.shape
        return made

    def conv_bn(
        self, conv: str, bn: str, x: _Array, *, residual: _Array | None = None, relu: bool = True
    ) -> _Array:
        if bn not in self.fused:
            return Unfused.conv_bn(self, conv, bn, x, residual=residual, relu=relu)
        self.absorbed[bn] = ["add"] * (residual is not None) + ["relu"] * relu
        return self._plan(conv, bn, relu, x)(x, residual=residual)

    def module(self, name: str, x: _Array) -> _Array:
        if has_weight_matrix(self.net.get_submodule(name)):
            return self._plan(name, None, False, x)(x)
        return super().module(name, x)


# -- which BatchNorms can be fused -------------------------------------------------------------


@dataclass
class BatchNormRow:
    """What happened to one BatchNorm of the network, and why (`reason` is a stable code)."""

    name: str
    outcome: str  # "fused" or "kept"
    reason: str
    producer: str
    layer: str  # geometry of the producer, e.g. "conv 3x3 1->16"
    detail: str
    absorbed: list[str]  # what the prepared operator did in the same pass: "add", "relu"
    algorithm: str | None = None
    error_before: float | None = None
    error_after: float | None = None


def has_weight_matrix(module: Any) -> bool:
    """Whether `module` is a convolution or linear layer: what a BatchNorm can be fused into."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim >= 2 and not hasattr(module, "running_mean")


def describe_layer(conv: Any) -> str:
    """A convolution or linear layer in short: "transposed 3x3 48->32 s2 g4" (stride, groups)."""
    if conv.weight.ndim == 2:
        return f"linear {conv.in_features}->{conv.out_features}"
    kind = "transposed" if conv.transposed else "conv"
    groups = f" g{conv.groups}" if conv.groups > 1 else ""
    if conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels:
        kind, groups = "depthwise", ""
    kernel = "x".join(map(str, conv.kernel_size))
    text = f"{kind} {kernel} {conv.in_channels}->{conv.out_channels}"
    for letter, values in (("s", conv.stride), ("d", conv.dilation)):
        if max(values) > 1:
            text += f" {letter}{values[0] if len(set(values)) == 1 else values}"
    return text + groups


def _out_channels(conv: Any) -> int:
    return int(conv.out_channels if hasattr(conv, "out_channels") else conv.out_features)


def _folds_finite(conv: Any, bn: Any) -> bool:
    with np.errstate(all="ignore"):
        scale = 1.0 / np.sqrt(np.asarray(bn.running_var, np.float64) + bn.eps)
        if bn.weight is not None:
            scale = scale * np.asarray(bn.weight, np.float64)
        largest = np.abs(scale) * np.abs(np.asarray(conv.weight, np.float64)).max()
        return bool((largest <= np.finfo(conv.weight.dtype).max).all())


def _reason(bn: Any, source: Event | None, conv: Any | None, users: int) -> tuple[str, str]:
    """(code, sentence) of the first check that fails, in the documented order; or OK."""
    if bn.training:
        return "BN_TRAINING", "in training mode: statistics change with every batch"
    if bn.running_mean is None or bn.running_var is None:
        return "NO_RUNNING_STATS", "no running statistics: mean and variance are the batch's"
    if source is None:
        return "NOT_CONV", "reads the network's input"
    if conv is None:
        return "NOT_CONV", f"reads the result of {source.name}, not of a layer"
    if users != 1:
        return "MULTI_USER", f"{source.name} is read by {users} operations"
    if conv.training:
        return "CONV_TRAINING", f"{source.name} is in training mode: its weights change"
    if bn.num_features != _out_channels(conv):
        return (
            "CHANNEL_MISMATCH",
            f"{bn.num_features} features after {_out_channels(conv)} channels",
        )
    if conv.weight.ndim == 2 and source.output.ndim != 2:
        return "LINEAR_ND", f"linear output has {source.output.ndim} axes; BN reads axis 1"
    if not _folds_finite(conv, bn):
        return "NONFINITE_FOLD", "variance + eps too close to zero for the weights' dtype"
    return "OK", f"into {source.name}"


def batch_norm_rows(net: nn.Module, x: _Array) -> list[BatchNormRow]:
    """One row per BatchNorm of `net`, in the order they run on the batch `x` (not changed)."""
    record = Recorder(net)
    result = net(x, record)
    rows = []
    for event in record.events:
        bn = net.get_submodule(event.name) if event.is_module else None
        if bn is None or not hasattr(bn, "running_mean"):
            continue
        (array,) = event.inputs
        source = record.producer(array)
        conv = net.get_submodule(source.name) if source and source.is_module else None
        if conv is not None and not has_weight_matrix(conv):
            conv = None
        users = record.users(array) + (array is result)
        code, detail = _reason(bn, source, conv, users)
        rows.append(
            BatchNormRow(
                name=event.name,
                outcome="fused" if code == "OK" else "kept",
                reason=code,
                producer=source.name if source else "input",
                layer=describe_layer(conv) if conv is not None else "",
                detail=detail,
                absorbed=[],
            )
        )
    return rows


def describe_flow(net: nn.Module, x: _Array) -> list[list[str]]:
    """The network as chains of "layer outputshape"; a chain begins where an earlier one branched.

    ReLU and the BatchNorms right after a layer are left out: the table of BatchNorms has them.
    """
    record = Recorder(net)
    net(x, record)
    rows = {row.name: row for row in batch_norm_rows(net, x)}
    labels = {id(x): "input"}
    chains = [["input " + "x".join(map(str, x.shape[1:]))]]
    last = "input"
    for event in record.events:
        origin = labels[id(event.inputs[0])]
        silent = event.name == "relu" or (
            event.name in rows and rows[event.name].reason != "NOT_CONV"
        )
        if silent:
            labels[id(event.output)] = origin
            continue
        name = event.name.split(".")[0]
        labels[id(event.output)] = "sum" if event.name == "add" else name
        if origin != last:
            chains.append([origin])
        text = "+ " + labels[id(event.inputs[1])] if event.name == "add" else name
        if event.output.shape != event.inputs[0].shape:
            text += " " + "x".join(map(str, event.output.shape[1:]))
        chains[-1].append(text)
        last = labels[id(event.output)]
    return chains
