# SPDX-License-Identifier: BSD-3-Clause
"""Times pyconvbn.fx beside torch.fx, per node. See README.md beside this file."""

import argparse
import gc
import json
import operator
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

GROWTH = ("create", "iterate", "lint", "dce", "copy", "replace", "erase")
MEMORY_NODES = 200_000


class Library:
    """pyconvbn.fx or torch.fx, with what else differs between the two."""

    def __init__(self, name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name, self.clock = name, clock
        if name == "ours":
            import numpy as np

            import pyconvbn
            from pyconvbn import _core, functional, fx, nn

            self.fx, self.nn, self.relu = fx, nn, functional.relu
            self.relu_alone = lambda x: _core.unary("relu", x, 0.0, 0.0, None)
            self.version = pyconvbn.__version__
            self.value: Any = np.ones(1, np.float32)
        else:
            import torch
            import torch.fx.experimental.optimization

            torch.set_num_threads(1)
            torch.set_grad_enabled(False)
            self.fx, self.nn, self.relu, self.relu_alone = torch.fx, torch.nn, torch.relu, torch.relu
            self.version = torch.__version__
            self.value = torch.ones(1)

    @property
    def ours(self) -> bool:
        return self.name == "ours"

    def module(self, graph: Any) -> Any:
        return self.fx.GraphModule({} if self.ours else self.nn.Module(), graph)


# ---- graphs ---------------------------------------------------------------------------------------------------------
def add_chain(graph: Any, x: Any, nodes: int) -> Any:
    """x = -(x + 1), over and over: `nodes` nodes."""
    call, add, neg = graph.call_function, operator.add, operator.neg
    for _ in range(nodes // 2):
        x = call(neg, (call(add, (x, 1)),))
    return x


def chain(library: Library, nodes: int) -> Any:
    graph = library.fx.Graph()
    graph.output(add_chain(graph, graph.placeholder("x"), nodes))
    return graph


def half_dead(library: Library, nodes: int) -> Any:
    graph = library.fx.Graph()
    x = graph.placeholder("x")
    used = add_chain(graph, x, nodes // 2)
    add_chain(graph, x, nodes // 2)
    graph.output(used)
    return graph


def conv_bn_relu(library: Library, nodes: int) -> Any:
    """A GraphModule of conv -> BatchNorm -> ReLU, three nodes each, smallest weights."""
    nn = library.nn
    layers = [m for _ in range(nodes // 3) for m in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU())]
    return library.fx.symbolic_trace(library.nn.Sequential(*layers).eval())


def describe(graph: Any) -> list[Any]:
    """A graph of either library as plain data, so that the two can be compared."""

    def plain(value: Any) -> Any:
        if type(value).__name__ == "Node":
            return ("node", value.name)
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return [(n.op, str(n.target), n.name, plain(n.args), plain(dict(n.kwargs)), [u.name for u in n.users])
            for n in graph.nodes]


# ---- what is timed --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Task:
    """`run` is timed, on a fresh state from `prepare` each time; `result` is what both libraries must agree on."""

    name: str
    what: str
    target: float | None  # in `unit`
    prepare: Callable[[Library, int], Any]
    run: Callable[[Library, Any], Any]
    result: Callable[[Any, Any], Any] | None  # of the state and what run returned; None: nothing to compare
    unit: str = "us a node"
    ours_only: bool = False


TASKS: dict[str, Task] = {}


def task(what: str, target: float | None, prepare: Callable[[Library, int], Any],
         result: Callable[[Any, Any], Any] | None, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(run: Callable[[Library, Any], Any]) -> Callable[[Library, Any], Any]:
        name = run.__name__.removeprefix("run_")
        TASKS[name] = Task(name, what, target, prepare, run, result, **more)
        return run

    return register


def graph_after(state: Any, returned: Any) -> Any:
    return describe(getattr(state, "graph", state))


@task("call_function, one by one", 0.5, lambda library, n: (library.fx.Graph(), n), lambda s, r: describe(s[0]))
def run_create(library: Library, state: Any) -> Any:
    graph, nodes = state
    graph.output(add_chain(graph, graph.placeholder("x"), nodes))


def prepare_erase(library: Library, nodes: int) -> Any:
    graph = chain(library, nodes)
    return graph, list(reversed(graph.nodes))


@task("erase_node, one by one", 0.5, prepare_erase, lambda s, r: describe(s[0]))
def run_erase(library: Library, state: Any) -> Any:
    erase = state[0].erase_node
    for node in state[1]:
        erase(node)


@task("for node in graph.nodes", None, chain, lambda s, r: r)
def run_iterate(library: Library, graph: Any) -> Any:
    count = 0
    for _ in graph.nodes:
        count += 1
    return count


@task("graph.lint()", 1.0, chain, None)
def run_lint(library: Library, graph: Any) -> Any:
    graph.lint()


@task("eliminate_dead_code, half the graph is dead", 1.0, half_dead, graph_after)
def run_dce(library: Library, graph: Any) -> Any:
    return graph.eliminate_dead_code()


def prepare_copy(library: Library, nodes: int) -> Any:
    import copy

    return chain(library, nodes), copy.deepcopy


@task("copy.deepcopy(graph): created in bulk", None, prepare_copy, lambda s, r: describe(r))
def run_copy(library: Library, state: Any) -> Any:
    graph, deepcopy = state
    return deepcopy(graph)


def prepare_trace(library: Library, nodes: int) -> Any:
    def function(x: Any) -> Any:
        for _ in range(nodes // 2):
            x = -(x + 1)
        return x

    return function


@task("symbolic_trace of a loop", 10.0, prepare_trace, lambda s, r: describe(r.graph))
def run_trace(library: Library, function: Any) -> Any:
    return library.fx.symbolic_trace(function)


def prepare_replace(library: Library, nodes: int) -> Any:
    trace = library.fx.symbolic_trace
    pattern = trace(lambda x: operator.neg(operator.add(x, 1))).graph
    replacement = trace(lambda x: operator.sub(-1, operator.abs(x))).graph
    return library.module(chain(library, nodes)), pattern, replacement


@task("replace_pattern, two nodes by two: ms for 1000 matches", 5.0, prepare_replace,
      lambda s, r: (len(r), describe(s[0].graph)), unit="ms for 1000")
def run_replace(library: Library, state: Any) -> Any:
    gm, pattern, replacement = state
    replace = library.fx.replace_pattern
    return replace(gm, pattern, replacement)


def count_bn(state: Any, returned: Any) -> int:
    """BatchNorms that are still called."""
    module = returned[0] if isinstance(returned, tuple) else state if returned is None else returned
    modules = dict(module.named_modules())
    return sum("BatchNorm" in type(modules[n.target]).__name__ for n in module.graph.nodes if n.op == "call_module")


@task("passes.efficient_conv_bn_eval, a third are pairs", 1.0, conv_bn_relu,
      lambda s, r: count_bn(s, None), ours_only=True)
def run_efficient(library: Library, gm: Any) -> Any:
    from pyconvbn import passes

    return passes.efficient_conv_bn_eval(gm)


@task("deciding what fuse_conv_bn folds (the pass itself, in C)", 1.0, conv_bn_relu, None, ours_only=True)
def run_fuse_plan(library: Library, gm: Any) -> Any:
    from pyconvbn import _core

    rows = _core.pass_fuse_plan(gm.graph, gm, ())
    assert rows
    return rows


@task("fuse_conv_bn in place, weights and modules made", None, conv_bn_relu, count_bn)
def run_fuse(library: Library, gm: Any) -> Any:
    if library.ours:
        from pyconvbn import passes

        return passes.fuse_conv_bn(gm, inplace=True)
    return library.fx.experimental.optimization.fuse(gm, inplace=True)


def prepare_run(library: Library, nodes: int) -> Any:
    graph = library.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(nodes):
        x = graph.call_function(library.relu, (x,))
    graph.output(x)
    gm = library.module(graph)
    gm(library.value)
    return gm, nodes


@task("gm(x) of relu on one number", None, prepare_run, lambda s, r: r.item())
def run_call(library: Library, state: Any) -> Any:
    return state[0](library.value)


@task("the same calls from a Python loop", None, lambda library, n: n, lambda s, r: r.item())
def run_loop(library: Library, nodes: int) -> Any:
    x, relu = library.value, library.relu_alone
    for _ in range(nodes):
        x = relu(x)
    return x


# ---- measuring ------------------------------------------------------------------------------------------------------
def once(one: Task, library: Library, nodes: int) -> tuple[float, Any, Any]:
    """Seconds of one run, the state and what it returned. The garbage collector rests meanwhile, as in timeit."""
    state = one.prepare(library, nodes)
    gc.collect()
    gc.disable()
    try:
        start = library.clock()
        returned = one.run(library, state)
        seconds = library.clock() - start
    finally:
        gc.enable()
    return seconds, state, returned


def scaled(one: Task, seconds: float, nodes: int) -> float:
    return seconds * 1e6 / nodes if one.unit == "us a node" else seconds * 1e3 / (nodes // 2) * 1000


def measure(one: Task, libraries: list[Library], nodes: int, rounds: int) -> dict[str, Any]:
    """Runs the libraries in turn, the first one rotating, and compares their results."""
    rivals = [library for library in libraries if library.ours or not one.ours_only]
    samples: dict[str, list[float]] = {library.name: [] for library in rivals}
    results = {}
    for library in rivals:  # not timed: first uses
        _, state, returned = once(one, library, nodes)
        if one.result is not None:
            results[library.name] = one.result(state, returned)
        del state, returned
    for turn in range(rounds):
        for library in rivals[turn % len(rivals):] + rivals[:turn % len(rivals)]:
            samples[library.name].append(scaled(one, once(one, library, nodes)[0], nodes))
    same = None if len(results) < 2 else results["ours"] == results["torch"]
    row: dict[str, Any] = {"task": one.name, "what": one.what, "unit": one.unit, "nodes": nodes, "target": one.target,
                           "same": same}
    for name, values in samples.items():
        row[name] = statistics.median(values)
        row[name + "_best"] = min(values)
    return with_ratio(row)


def with_ratio(row: dict[str, Any]) -> dict[str, Any]:
    """Adds how many times torch's value ours is smaller: the median of one over the median of the other."""
    row["ratio"] = row["torch"] / row["ours"] if row.get("torch") and row["ours"] > 0 else None
    return row


def overhead(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a GraphModule adds to the calls it makes."""
    by_name = {row["task"]: row for row in rows}
    if not {"call", "loop"} <= by_name.keys():
        return None
    call, loop = by_name["call"], by_name["loop"]
    row = {"task": "overhead", "what": "call minus loop", "unit": call["unit"], "nodes": call["nodes"], "target": 0.5,
           "same": None}
    for name in ("ours", "torch"):
        if name in call:
            row[name] = call[name] - loop[name]
    return with_ratio(row)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS line")


def memory_of(name: str, nodes: int) -> dict[str, float]:
    """Bytes a node in this process, which has done nothing else. No node is held from outside."""
    library = Library(name)
    keep = [chain(library, 1000)]
    gc.collect()
    before = resident_bytes()
    keep.append(chain(library, nodes))
    gc.collect()
    used = {"resident": (resident_bytes() - before) / nodes}
    if library.ours:
        used["structure"] = keep[1]._nbytes / nodes
    return used


def memory(libraries: list[Library], nodes: int) -> list[dict[str, Any]]:
    """A fresh process for each library."""
    found = {}
    for library in libraries:
        done = subprocess.run([sys.executable, __file__, "--memory-of", library.name, "--nodes", str(nodes)],
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"measuring memory of {library.name} failed:\n{done.stderr}")
        found[library.name] = json.loads(done.stdout)
    common = {"unit": "B a node", "nodes": nodes, "target": 300.0, "same": None}
    rows = [{"task": "structure", "what": "graph._nbytes", **common, "ours": found["ours"]["structure"]},
            {"task": "resident", "what": "growth of the process, no node held", **common,
             **{name: used["resident"] for name, used in found.items()}}]
    return [with_ratio(row) for row in rows]


def growth(library: Library, sizes: list[int], wanted: list[str]) -> list[dict[str, Any]]:
    """One row a size: the best of a few runs of each task, per node."""
    rows = []
    for nodes in sizes:
        row: dict[str, Any] = {"nodes": nodes}
        for name in wanted:
            rounds = 5 if nodes <= 10_000 else 2 if nodes <= 100_000 else 1
            row[name] = min(once(TASKS[name], library, nodes)[0] for _ in range(rounds)) * 1e6 / nodes
            gc.collect()
        rows.append(row)
    return rows


# ---- printing -------------------------------------------------------------------------------------------------------
def columns(lines: list[list[str]], left: int) -> str:
    """Columns as wide as they must be, the first `left` of them flush left."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    pads = [(str.ljust if i < left else str.rjust, width) for i, width in enumerate(widths)]
    text = ["  ".join(pad(cell, w) for cell, (pad, w) in zip(line, pads, strict=True)) for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(line.rstrip() for line in text)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [["task", "what", "unit", "nodes", "ours", "best", "torch", "ratio", "target", "met", "same result"]]
    for row in rows:
        met = "" if row["target"] is None else "yes" if row["ours"] <= row["target"] else "NO"
        same = "" if row["same"] is None else "yes" if row["same"] else "NO"
        values = [number(row.get(key)) for key in ("ours", "ours_best", "torch", "ratio", "target")]
        lines.append([row["task"], row["what"], row["unit"], str(row["nodes"]), *values, met, same])
    return columns(lines, 3)


def growth_table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name != "nodes"]
    lines = [["nodes", *names], *([str(row["nodes"]), *(number(row[name]) for name in names)] for row in rows)]
    return columns(lines, 0)


def header(info: dict[str, Any]) -> str:
    return "\n".join(f"{name:>10}: {text}" for name, text in (
        ("machine", f"{info['machine']}, {info['cpu']}, {info['cpus_online']} CPUs"), ("date", info["date"]),
        ("threads", f"1, pinned to CPU {info['cpus_used'][0]}; governor {info['governor']}; clock {info['clock']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())),
        *((f"no {name}", reason) for name, reason in info["missing"].items()),
    ))


# ---- the run --------------------------------------------------------------------------------------------------------
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=2000, metavar="N", help="nodes of a graph (default: 2000)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="timed runs of each library (default: 9)")
    parser.add_argument("--match", default="", metavar="REGEX", help="only tasks whose name matches")
    parser.add_argument("--own-only", action="store_true", help="without torch.fx")
    parser.add_argument("--max-nodes", type=int, default=1_000_000, metavar="N",
                        help="largest graph of the growth table; 0: no such table (default: 1000000)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--cpu-time", action="store_true", help="count this thread's CPU time: for a busy machine")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE (- is standard output)")
    parser.add_argument("--memory-of", choices=("ours", "torch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.nodes < 6:
        parser.error("--rounds must be at least 1 and --nodes at least 6")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """0: all right; 1: a result was not torch's; 2: it could not run."""
    arguments = parse_arguments(argv)
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of, arguments.nodes)))
        return 0
    try:
        return run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"graph.py: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    try:
        wanted = [name for name in TASKS if re.search(arguments.match, name)]
    except re.error as error:
        raise ValueError(f"--match {arguments.match!r}: {error}") from None
    if not wanted:
        raise ValueError(f"no task matches {arguments.match!r}; there are {', '.join(TASKS)}")
    cpus = machine.pin(1)
    load = machine.OtherLoad(cpus)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    libraries, missing = [Library("ours", clock)], {}
    if not arguments.own_only:
        try:
            libraries.append(Library("torch", clock))
        except ImportError as error:
            missing["torch"] = str(error)
    versions = {library.name: library.version for library in libraries}
    info = {**machine.facts(cpus), "versions": versions, "missing": missing, "clock": clock.__name__}
    show = sys.stderr if arguments.json == "-" else sys.stdout
    print(header(info), file=show)

    rows = [measure(TASKS[name], libraries, arguments.nodes, arguments.rounds) for name in wanted]
    extra = overhead(rows)
    rows += [extra] if extra else []
    if not arguments.no_memory:
        rows += memory(libraries, max(arguments.nodes, min(MEMORY_NODES, arguments.max_nodes or MEMORY_NODES)))
    print("\n" + table(rows), file=show)

    sizes = [10**power for power in range(3, 10) if 10**power <= arguments.max_nodes]
    names = [name for name in GROWTH if name in wanted]
    table_rows = growth(libraries[0], sizes, names) if names else []
    if table_rows:
        print("\nus a node (ours, best run) in graphs of growing size\n" + growth_table(table_rows), file=show)
    wrong = [row["task"] for row in rows if row["same"] is False]
    if wrong:
        print(f"\nNOT THE SAME RESULT AS torch.fx: {', '.join(wrong)}", file=show)
    share = load.share()
    print(f"\nother programs used {share:.0%} of this CPU during the run", file=show)
    if arguments.json:
        text = json.dumps({"info": info, "tasks": rows, "growth": table_rows, "other_load": share}, indent=1)
        if arguments.json == "-":
            print(text)
        else:
            Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
