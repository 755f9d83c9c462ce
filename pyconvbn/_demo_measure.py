# SPDX-License-Identifier: BSD-3-Clause
"""What ``pyconvbn demo`` measures: accuracy, error against float64, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core, nn, testing
from .demo import (
    BatchNormRow,
    OneShot,
    Planned,
    Reference,
    Unfused,
    batch_norm_rows,
    describe_flow,
    has_weight_matrix,
    load_demo,
)

__all__ = ["DemoResult", "run_demo", "time_interleaved"]

_Array = NDArray[Any]

#: A fused network may be this much further from float64 than the unfused one.
ERROR_RATIO_LIMIT = 4.0


class LayerCheck(Unfused):
    """Runs unfused; compares each fused layer with float64, both given the same float32 input.

    `errors` has per BN the largest error, relative to the largest output, without and with
    fusing; `failures` names the layers outside the error model of `testing`.
    """

    def __init__(self, net: nn.Module, planned: Planned) -> None:
        super().__init__(net)
        self.planned = planned
        self.errors: dict[str, tuple[float, float]] = {}
        self.failures: list[str] = []

    def conv_bn(
        self, conv: str, bn: str, x: _Array, *, residual: _Array | None = None, relu: bool = True
    ) -> _Array:
        unfused = super().conv_bn(conv, bn, x, residual=residual, relu=relu)
        if bn not in self.planned.fused:
            return unfused
        pair = self.net.get_submodule(conv), self.net.get_submodule(bn)
        end: dict[str, Any] = {"residual": residual, "activation": "relu" if relu else None}
        exact = testing.reference_conv_bn(x, *pair, **end)
        fused = self.planned.conv_bn(conv, bn, x, residual=residual, relu=relu)
        self.errors[bn] = _relative_error(unfused, exact), _relative_error(fused, exact)
        try:
            testing.assert_matches_reference(fused, x, *pair, **end)
        except AssertionError as error:
            self.failures.append(f"{bn}: {error}")
        return unfused


def _relative_error(values: _Array, exact: _Array) -> float:
    return float(np.abs(values - exact).max() / max(np.abs(exact).max(), np.finfo(float).tiny))


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


def _error_ratio(before: _Array, after: _Array, exact: _Array) -> float:
    """Largest (e_after + f)/(e_before + f) over the channels; f is one rounding of the result.

    Both errors are largest absolute ones. f keeps a lucky exact result from looking like a loss.
    """
    floor = np.finfo(np.float32).eps * np.abs(exact).max(0)
    errors = [np.abs(values - exact).max(0) + floor for values in (before, after)]
    return float((errors[1] / errors[0]).max())


def _memory(planned: Planned) -> dict[str, int]:
    parts = [made.memory(planned.shapes[name]) for name, made in planned.plans.items()]
    return {
        "weights": sum(part["weights"] for part in parts),
        "workspace": max(part["workspace"] for part in parts),
        "largest_activation": max(max(part["input"], part["output"]) for part in parts),
    }


def _network_facts(net: nn.Module, planned: Planned, x: _Array) -> dict[str, Any]:
    flops = sum(made.cost(planned.shapes[name])["flops"] for name, made in planned.plans.items())
    return {
        "name": type(net).__name__,
        "parameters": sum(int(parameter.size) for parameter in net.parameters()),
        "flow": describe_flow(net, x),
        "layers": sum(has_weight_matrix(module) for module in net.modules()),
        "flops_per_image": round(flops / len(x)),
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
    """Run the network on its held-out images unfused, fused and planned, and compare.

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

    rows = batch_norm_rows(net, timed)
    fused = {row.name for row in rows if row.outcome == "fused"}
    one_shot, planned = OneShot(net, fused), Planned(net, fused)
    net(timed, planned)
    check = LayerCheck(net, planned)
    net(timed, check)
    for row in rows:
        row.error_before, row.error_after = check.errors.get(row.name, (None, None))
        if row.outcome == "fused":
            row.absorbed = planned.absorbed[row.name]
            shape = planned.shapes[row.producer]
            row.algorithm = planned.plans[row.producer].explain(shape)["algorithm"]

    exact = net(x, Reference(net))
    logits = {"unfused": net(x), "one_shot": net(x, one_shot), "planned": net(x, planned)}
    error = {name: _relative_error(values, exact) for name, values in logits.items()}
    ratios = {n: _error_ratio(logits["unfused"], logits[n], exact) for n in ("one_shot", "planned")}
    failures = list(check.failures)
    for name, ratio in ratios.items():
        # Written so that NaN fails.
        if not ratio <= ERROR_RATIO_LIMIT:
            failures.append(
                f"{name}: error is {ratio:.3g} times that of the unfused network "
                f"(limit {ERROR_RATIO_LIMIT:g})"
            )
        changed = int((logits[name].argmax(1) != logits["unfused"].argmax(1)).sum())
        if changed:
            failures.append(f"{name}: {changed} of {count} predictions differ from unfused")

    medians, best, rounds = time_interleaved(
        {
            "unfused": lambda: net(timed),
            "one_shot": lambda: net(timed, one_shot),
            "planned": lambda: net(timed, planned),
        },
        seconds=seconds,
    )
    return DemoResult(
        network=_network_facts(net, planned, timed),
        machine=_machine_facts(),
        batch_norms=rows,
        accuracy={
            "images": count,
            **{n: float((v.argmax(1) == labels).mean()) for n, v in logits.items()},
        },
        error={
            **error,
            **{f"{name}_ratio": ratio for name, ratio in ratios.items()},
            "ratio_limit": ERROR_RATIO_LIMIT,
        },
        time={
            "batch": batch,
            "rounds": rounds,
            **{f"{name}_us": value * 1e6 for name, value in medians.items()},
            **{f"{name}_best_us": value * 1e6 for name, value in best.items()},
        },
        memory=_memory(planned),
        failures=failures,
        images=x,
        labels=labels,
        logits=logits["planned"],
    )
