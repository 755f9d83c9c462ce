# SPDX-License-Identifier: BSD-3-Clause
"""What ``pyconvbn demo`` measures: accuracy, error against float64, time and memory."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core, fx, nn, testing
from ._verify import VerifyReport, verify
from .demo import Forms, load_demo, make_forms, reference_logits
from .fx._describe import describe

__all__ = ["BatchNormRow", "DemoResult", "FORMS", "run_demo", "time_interleaved"]

_Array = NDArray[Any]

#: The forms of the network as they are measured; attributes of `demo.Forms`.
FORMS = ("unfused", "one_shot", "folded", "frozen")


@dataclass
class BatchNormRow:
    """A row of the FoldReport with what the demo measured of it."""

    name: str
    node: str
    outcome: str
    reason: str
    hint: str
    blocking: str | None
    producer: str | None  # the layer before it
    layer: str = ""  # geometry of that layer, e.g. "Conv2d 3×3 1→16"
    absorbed: list[str] = field(default_factory=list)  # what the prepared operator did too: "add", "relu"
    algorithm: str | None = None
    error_before: float | None = None  # largest error of the layer, relative to its largest output
    error_after: float | None = None


@dataclass
class DemoResult:
    """Everything the demo prints. `to_dict` is its JSON form."""

    network: dict[str, Any]
    machine: dict[str, Any]
    batch_norms: list[BatchNormRow]
    accuracy: dict[str, float]
    error: dict[str, float]
    time: dict[str, Any]
    memory: dict[str, int]
    failures: list[str]
    images: _Array
    labels: _Array
    logits: _Array
    forms: Forms
    reports: dict[str, VerifyReport]

    @property
    def verified(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "machine": self.machine,
            "batch_norms": [vars(row) for row in self.batch_norms],
            "accuracy": self.accuracy,
            "error": self.error,
            "time": self.time,
            "memory": self.memory,
            "fold_report": self.forms.report.to_dict(),
            "freeze_report": self.forms.frozen.report.to_dict(),
            "verify": {name: report.to_dict() for name, report in self.reports.items()},
            "verified": self.verified,
            "failures": self.failures,
        }


def time_interleaved(
    functions: dict[str, Callable[[], Any]], *, seconds: float = 1.0
) -> tuple[dict[str, float], dict[str, float], int]:
    """Median and best seconds of each function, and the number of rounds.

    The functions take turns, so that a slow moment of the machine hits all of them alike.
    """
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    rounds = 0
    end = time.perf_counter() + seconds
    while rounds < 5 or (time.perf_counter() < end and rounds < 200):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - started)
        rounds += 1
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return medians, {name: min(values) for name, values in samples.items()}, rounds


def _relative_error(values: _Array, exact: _Array) -> float:
    return float(np.abs(values - exact).max() / max(np.abs(exact).max(), np.finfo(float).tiny))


class _Layers(fx.Interpreter):
    """Runs the unfused graph and keeps what each module read, by its path, and what each node made, by its name."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.inputs: dict[str, _Array] = {}
        self.outputs: dict[str, _Array] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            self.inputs[str(n.target)] = self.fetch_args_kwargs_from_env(n)[0][0]
        self.outputs[n.name] = value = super().run_node(n)
        return value


def _batch_norm_rows(forms: Forms, run: _Layers, failures: list[str]) -> list[BatchNormRow]:
    """The rows of the FoldReport; each folded layer is compared with float64, both given the same float32 input."""
    nodes = {node.name: node for node in forms.unfused.graph.nodes}
    frozen = {node.name: node for node in forms.frozen.graph.nodes}
    rows = []
    for fold in forms.report.rows:
        name = fold.target or fold.node
        row = BatchNormRow(name, fold.node, fold.outcome, fold.reason, fold.hint, fold.blocking, None)
        rows.append(row)
        if fold.outcome == "kept" or fold.conv is None:
            continue
        conv = nodes[fold.conv]
        row.producer = layer_name = str(conv.target)
        row.layer = describe(conv, forms.unfused).title
        read = run.inputs[layer_name]
        pair = forms.unfused.get_submodule(layer_name), forms.unfused.get_submodule(name)
        exact = testing.reference_conv_bn(read, *pair)
        after = forms.folded.get_submodule(layer_name)(read)
        row.error_before = _relative_error(run.outputs[fold.node], exact)
        row.error_after = _relative_error(after, exact)
        step = frozen[fold.conv]
        layer = forms.frozen.get_submodule(str(step.target))
        row.absorbed = ["add"] * (len(step.all_input_nodes) > 1) + ["relu"] * (layer.plan.params["activation"] == "relu")
        row.algorithm = layer.plan.explain(read.shape)["algorithm"]
        try:
            testing.assert_matches_reference(after, read, *pair)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    return rows


class _Alive(fx.Interpreter):
    """Runs a graph and keeps the most bytes of activations that were alive at one time."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.peak = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        arrays = [v for node, v in (*self.env.items(), (n, value)) if node.op != "get_attr" and isinstance(v, np.ndarray)]
        owners = [array if array.base is None else array.base for array in arrays]
        self.peak = max(self.peak, sum({id(owner): owner.nbytes for owner in owners}.values()))
        return value


def _activations(gm: fx.GraphModule, x: _Array) -> int:
    run = _Alive(gm)
    run.run(x)
    return run.peak


def _layers(frozen: fx.GraphModule) -> list[tuple[fx.Node, nn.FrozenLayer]]:
    """The prepared operators, in the order in which they run."""
    found = [(node, frozen.get_submodule(str(node.target))) for node in frozen.graph.find_nodes(op="call_module")]
    return [(node, layer) for node, layer in found if isinstance(layer, nn.FrozenLayer)]


def _plan_shape(layer: nn.FrozenLayer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the plan of a layer is given for an input of this shape: a BatchNorm takes all positions as one axis."""
    return (*shape[:2], math.prod(shape[2:])) if layer.kind == "batch_norm" else shape


def _memory(net: nn.Module, forms: Forms, x: _Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    parts = [layer.plan.memory(_plan_shape(layer, shapes[node.name])) for node, layer in _layers(forms.frozen)]
    return {
        "parameters": sum(array.nbytes for array in [*net.parameters(), *net.buffers()]),
        "weights": sum(part["weights"] for part in parts) + sum(array.nbytes for array in forms.frozen.buffers()),
        "workspace": max(part["workspace"] for part in parts),
        "activations": _activations(forms.unfused, x),
        "activations_frozen": _activations(forms.frozen, x),
    }


def _network_facts(net: nn.Module, forms: Forms, shapes: dict[str, tuple[int, ...]], batch: int) -> dict[str, Any]:
    layers = _layers(forms.frozen)
    flops = sum(layer.plan.cost(_plan_shape(layer, shapes[node.name]))["flops"] for node, layer in layers)
    return {
        "name": type(net).__name__,
        "parameters": sum(int(parameter.size) for parameter in net.parameters()),
        "layers": len(layers),
        "nodes": {name: len(getattr(forms, name).graph.nodes) for name in FORMS},
        "flops_per_image": round(flops / batch),
    }


def _machine_facts() -> dict[str, Any]:
    cpu = _core.cpu_info()
    return {
        "cpu": cpu["name"],
        "isa": cpu["isa_active"],
        "threads": _core.get_num_threads(),
        "threads_source": _core.num_threads_source(),
        "pyconvbn": _core.__version__,
        "numpy": np.__version__,
    }


def run_demo(*, images: int | None = None, batch: int = 64, seconds: float = 1.0) -> DemoResult:
    """Run the network on its held-out images in each form, and compare.

    `images` limits how many of them are classified (all by default), `batch` is the batch size of
    the timing, `seconds` its budget. Raises `ValueError` for numbers below 1 or more images than
    there are.
    """
    net, pixels, labels = load_demo()
    count = len(pixels) if images is None else images
    if not 1 <= count <= len(pixels):
        raise ValueError(f"images: expected 1 to {len(pixels)}, got {images}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    x, labels = pixels[:count], labels[:count]
    timed = pixels[np.arange(batch) % len(pixels)]

    forms = make_forms(net, timed.shape)
    failures: list[str] = []
    run = _Layers(forms.unfused)
    run.run(timed)
    rows = _batch_norm_rows(forms, run, failures)
    shapes = {node.name: run.inputs[str(node.target)].shape for node in forms.unfused.graph.find_nodes(op="call_module")}

    exact = reference_logits(net, x)
    logits = {name: getattr(forms, name)(x) for name in FORMS}
    reports = {name: verify(net, getattr(forms, name), x) for name in FORMS[1:]}
    error = {name: _relative_error(values, exact) for name, values in logits.items()}
    for name, report in reports.items():
        failures += [f"{name}: {line}" for line in str(report).splitlines() if not report.ok]
        changed = int((logits[name].argmax(1) != logits["unfused"].argmax(1)).sum())
        if changed:
            failures.append(f"{name}: {changed} of {count} predictions differ from unfused")

    calls: dict[str, Callable[[], Any]] = {name: functools.partial(getattr(forms, name), timed) for name in FORMS}
    medians, best, rounds = time_interleaved(calls, seconds=seconds)
    return DemoResult(
        network=_network_facts(net, forms, shapes, batch),
        machine=_machine_facts(),
        batch_norms=rows,
        accuracy={
            "images": count,
            **{n: float((v.argmax(1) == labels).mean()) for n, v in logits.items()},
        },
        error={
            **error,
            **{f"{name}_ratio": report.ratio for name, report in reports.items()},
            "ratio_limit": reports["frozen"].limit,
        },
        time={
            "batch": batch,
            "rounds": rounds,
            **{f"{name}_us": value * 1e6 for name, value in medians.items()},
            **{f"{name}_best_us": value * 1e6 for name, value in best.items()},
        },
        memory=_memory(net, forms, timed, shapes),
        failures=failures,
        images=x,
        labels=labels,
        logits=logits["frozen"],
        forms=forms,
        reports=reports,
    )
