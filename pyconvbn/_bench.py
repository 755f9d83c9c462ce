# SPDX-License-Identifier: BSD-3-Clause
"""``pyconvbn bench``: a few well-known layers, unfused against fused, in a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import _core, functional, nn, testing
from ._demo_measure import time_interleaved
from ._demo_view import Terminal
from ._efficient import efficient_conv_bn_eval
from .plan import Plan

__all__ = ["bench_text", "run_bench"]


class _Layer(NamedTuple):
    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]  # without the batch


_LAYERS = (
    _Layer("ResNet-50 3x3 64, 56x56", lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 56, 56)),
    _Layer("ResNet-50 1x1 64->256, 56x56", lambda: nn.Conv2d(64, 256, 1), (64, 56, 56)),
    _Layer("ResNet-50 3x3 256, 14x14", lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 14, 14)),
    _Layer(
        "MobileNet depthwise 3x3 144, 56x56",
        lambda: nn.Conv2d(144, 144, 3, padding=1, groups=144),
        (144, 56, 56),
    ),
    _Layer(
        "transposed 4x4/2 64->32, 28x28",
        lambda: nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
        (64, 28, 28),
    ),
    _Layer("1-D k=9 64->64, 1000", lambda: nn.Conv1d(64, 64, 9, padding=4), (64, 1000)),
    _Layer("linear 512->512", lambda: nn.Linear(512, 512), (512,)),
)
_WHERE = "benchmarks/run.py in the source tree compares more layers and other libraries"


def _batch_norm(conv: Any, rng: np.random.Generator) -> Any:
    dims = conv.weight.ndim - 2
    channels = conv.out_channels if dims else conv.out_features
    bn = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d][dims](channels)
    bn.running_mean[...] = rng.normal(size=channels)
    bn.running_var[...] = rng.uniform(0.5, 2.0, size=channels)
    return bn.eval()


def _measure(layer: _Layer, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    conv = layer.make().eval()
    bn = _batch_norm(conv, rng)
    x = rng.normal(size=(batch, *layer.input_shape)).astype(np.float32)
    plan = Plan.from_modules(conv, bn, activation="relu")
    failure = None
    try:
        # Checked before it is timed: a fast wrong answer is worth nothing.
        testing.assert_matches_reference(plan(x), x, conv, bn, activation="relu")
    except AssertionError as error:
        failure = str(error)
    medians, _, rounds = time_interleaved(
        {
            "unfused": lambda: functional.relu(bn(conv(x))),
            "one_shot": lambda: functional.relu(efficient_conv_bn_eval(bn, conv, x)),
            "planned": lambda: plan(x),
        },
        seconds=0.3,
    )
    flops = plan.cost(x.shape)["flops_real"]
    return {
        "layer": layer.name,
        "algorithm": plan.explain(x.shape)["algorithm"],
        **{f"{name}_us": value * 1e6 for name, value in medians.items()},
        "rounds": rounds,
        "planned_gflops": flops / medians["planned"] / 1e9,
        "failure": failure,
    }


def run_bench(
    *, batch: int = 1, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Median times of relu(bn(conv(x))): three operators, one-shot fused + relu, one prepared plan.

    `progress` is called with the name of each layer before it runs.
    """
    rng = np.random.default_rng(0)
    nn.manual_seed(0)
    rows = []
    for layer in _LAYERS:
        progress(layer.name)
        rows.append(_measure(layer, batch, rng))
    cpu, build = _core.cpu_info(), _core.build_info()
    return {
        "machine": {
            "cpu": cpu["name"],
            "isa": cpu["isa_active"],
            "threads": _core.get_num_threads(),
            "compiler": build["compiler"],
        },
        "batch": batch,
        "layers": rows,
        "verified": not any(row["failure"] for row in rows),
        "full_benchmark": _WHERE,
    }


def bench_text(result: dict[str, Any], term: Terminal) -> str:
    """The result of `run_bench` as a table."""
    machine, rows = result["machine"], result["layers"]
    width = max(len(row["layer"]) for row in rows)
    lines = [
        *term.wrap(
            f"relu(bn(conv(x))), batch {result['batch']}, {machine['cpu']}, {machine['isa']}, "
            f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}; median microseconds",
            "",
        ),
        "",
        term.paint(
            f"{'layer':<{width}} {'unfused':>9} {'one-shot':>9} {'planned':>9} {'gain':>6} "
            f"{'GFLOP/s':>8}  algorithm",
            "bold",
        ),
    ]
    for row in rows:
        gain = row["unfused_us"] / row["planned_us"]
        lines.append(
            f"{row['layer']:<{width}} {row['unfused_us']:9.1f} {row['one_shot_us']:9.1f} "
            f"{row['planned_us']:9.1f} {term.text(f'{gain:.2f}×'):>6} "
            f"{row['planned_gflops']:8.1f}  {term.paint(row['algorithm'], 'accent')}"
        )
        if row["failure"]:
            lines += [term.paint("  WRONG: " + line, "bad") for line in row["failure"].splitlines()]
    return "\n".join([*lines, "", *term.wrap(result["full_benchmark"] + ".", "")]) + "\n"
