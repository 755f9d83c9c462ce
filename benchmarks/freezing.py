# SPDX-License-Identifier: BSD-3-Clause
"""Times freezing, per node, on graphs of growing size, and step by step. See README.md beside this file."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import machine
import numpy as np

import pyconvbn
from pyconvbn import _pass_plans, freezing, functional, fx, nn, passes
from pyconvbn.ops import aten

CHANNELS = 4
SIZES = (1_000, 10_000, 100_000)
#: What freeze calls, by the name under which its module has it.
STEPS = [(freezing, name) for name in ("needs_strides", "record_strides", "lower_modules", "_infer_shapes", "fold_layers",
                                       "prepare_layers", "_own_constants", "_remove_dead", "GraphModule", "merge_folds")]
STEPS += [(passes, name) for name in ("view_to_reshape", "replace_params_with_constants", "cse", "constant_fold",
                                      "concat_matmuls", "enforce_as_strided_input_layout", "enforce_output_layout")]


def aten_graph(nodes: int) -> fx.GraphModule:
    """conv, batch_norm, relu, add of a residual, over and over, each with arrays of its own; ATen operators."""
    rng = np.random.default_rng(0)
    graph, root = fx.Graph(), {}
    x = graph.placeholder("x")

    def array(*shape: int) -> Any:
        name = f"p{len(root)}"
        root[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return graph.get_attr(name)

    while len(graph.nodes) < nodes - 10:
        y = graph.call_function(aten.conv2d.default, (x, array(CHANNELS, CHANNELS, 1, 1), array(CHANNELS)))
        bn = [array(CHANNELS) for _ in range(4)]
        y = graph.call_function(aten.batch_norm.default, (y, *bn, False, 0.1, 1e-5, True))
        y = graph.call_function(aten.add.Tensor, (y, x))
        x = graph.call_function(aten.relu.default, (y,))
    graph.output(x)
    return fx.GraphModule(root, graph)


def module_graph(nodes: int) -> fx.GraphModule:
    """The same with a module for each layer."""
    graph, root = fx.Graph(), {}
    x = graph.placeholder("x")
    while len(graph.nodes) < nodes - 2:
        conv, bn, relu = (f"{kind}{len(root)}" for kind in ("conv", "bn", "relu"))
        root[conv] = nn.Conv2d(CHANNELS, CHANNELS, 1)
        root[bn], root[relu] = nn.BatchNorm2d(CHANNELS), nn.ReLU()
        y = graph.call_module(bn, (graph.call_module(conv, (x,)),))
        x = graph.call_module(relu, (graph.call_function(functional.add, (y, x)),))
    graph.output(x)
    gm = fx.GraphModule(root, graph)
    gm.eval()
    return gm


GRAPHS: dict[str, Callable[[int], fx.GraphModule]] = {"aten": aten_graph, "modules": module_graph}


@contextmanager
def stopwatch(places: list[tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Seconds spent in each of these functions."""
    seconds: dict[str, float] = {}
    saved = [(owner, name, getattr(owner, name)) for owner, name in places]

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return run

    for owner, name, function in saved:
        setattr(owner, name, timed(function, name))
    try:
        yield seconds
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)


def measure(gm: fx.GraphModule, inputs: Any, repeats: int) -> dict[str, float]:
    """Median seconds of freeze, of making the plans inside it, and the difference."""
    total, packing = [], []
    for _ in range(repeats):
        with stopwatch([(_pass_plans, "Plan")]) as seconds:
            start = time.perf_counter()
            pyconvbn.freeze(gm, inputs)
            total.append(time.perf_counter() - start)
        packing.append(seconds.get("Plan", 0.0))
    rest = statistics.median(t - p for t, p in zip(total, packing))
    return {"total": statistics.median(total), "packing": statistics.median(packing), "rest": rest}


def check(gm: fx.GraphModule, x: Any) -> None:
    """Frozen is right before it is fast."""
    frozen, _ = pyconvbn.freeze(gm, x)
    assert pyconvbn.verify(gm, frozen, x).ok
    assert not [node for node in frozen.graph.nodes if "batch_norm" in str(node.target)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="freezings of each graph (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    x = np.ones((1, CHANNELS, 2, 2), np.float32)
    print(f"{machine.facts([])['cpu']}, pyconvbn {pyconvbn.__version__}, NumPy {np.__version__}")
    rows = []
    for form, make in GRAPHS.items():
        check(make(60), x)
        for size in SIZES:
            gm = make(size)
            count = len(gm.graph.nodes)
            for known in (False, True):
                found = measure(gm, x if known else None, options.repeats)
                rows.append({"form": form, "nodes": count, "shapes": known, **found})
                print(f"{form:8} {count:7} nodes, {'with' if known else 'no  '} example: {found['total']:7.3f} s, of it "
                      f"{found['packing']:6.3f} s packing; the rest {found['rest'] / count * 1e6:5.2f} us a node",
                      flush=True)
        with stopwatch(STEPS) as seconds:
            pyconvbn.freeze(gm, x)
        for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"    {name:34} {value / count * 1e6:6.3f} us a node")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
