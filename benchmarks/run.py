# SPDX-License-Identifier: BSD-3-Clause
"""Times pyconvbn against other libraries, layer by layer. See README.md beside this file."""

import argparse
import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import machine

# Modules that load NumPy are imported inside functions: its threads and pyconvbn's choice of ISA are fixed at import.

HERE = Path(__file__).resolve().parent


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--shapes", default="layers.txt", metavar="FILE",
                        help="shape file, a path or a name under shapes/ (default: layers.txt)")
    parser.add_argument("--match", default="", metavar="REGEX", help="only layers whose name or class matches")
    parser.add_argument("--peers", default="all", metavar="LIST",
                        help="comma list of eager, cl, mkldnn, ort, ov, or all, or none (default: all that "
                             "are installed)")
    parser.add_argument("--own-only", action="store_true", help="no peers: the same as --peers none")
    parser.add_argument("--peers-only", action="store_true", help="without pyconvbn")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads and CPUs (default: 1)")
    parser.add_argument("--isa", metavar="NAME", help="the best ISA pyconvbn may use (avx512, avx2, neon, "
                                                      "scalar); the peers are not restricted")
    parser.add_argument("--precision", type=precisions, default=["fp32"], metavar="LIST",
                        help="strict, fp32 or fast; of several (comma list) the first is the one in the table, and all are "
                             "compared below it (default: fp32)")
    parser.add_argument("--one-shot", action="store_true",
                        help="time efficient_conv_bn_eval, which folds and packs in every call, beside the plan")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of all rivals (default: 5)")
    parser.add_argument("--slice", type=float, default=15, metavar="MS", help="time of one rival in one round, "
                                                                              "in ms (default: 15)")
    parser.add_argument("--out", action=argparse.BooleanOptionalAction, default=True,
                        help="write into an output the caller owns, where a library can (default: yes)")
    parser.add_argument("--kernels", action="store_true", help="time the C kernels one by one instead of layers")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE (- is standard output)")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.own_only and arguments.peers_only:
        parser.error("--own-only and --peers-only leave nobody")
    if arguments.one_shot and (arguments.peers_only or arguments.precision[0] != "fp32"):
        parser.error("--one-shot is compared with the plan of precision fp32, which must come first")
    if arguments.rounds < 1 or arguments.slice <= 0:
        parser.error("--rounds must be at least 1 and --slice positive")
    return arguments


def precisions(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= {"strict", "fp32", "fast"} or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of strict, fp32, fast, each once, got {text!r}")
    return names


def main(argv: list[str] | None = None) -> int:
    """0: all right; 1: a result of pyconvbn was wrong or a kernel has no benchmark; 2: it could not run."""
    arguments = parse_arguments(argv)
    try:
        info = machine.prepare(arguments.threads, arguments.isa)
        if arguments.kernels:
            return run_kernels(arguments, info)
        return run_layers(arguments, info)
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def progress(items: list[Any], title: str) -> Any:
    """The items, with a bar on standard error: tqdm's if it is installed, else one line."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _plain_progress(items, title)
    return tqdm(items, desc=title, file=sys.stderr, leave=False)


def _plain_progress(items: list[Any], title: str) -> Any:
    tty = sys.stderr.isatty()
    for number, item in enumerate(items, 1):
        name = getattr(item, "name", item)
        print(f"\r{title} {number}/{len(items)} {name}".ljust(60) if tty else f"{title} {number}/{len(items)} {name}",
              end="" if tty else "\n", file=sys.stderr, flush=True)
        yield item
    if tty:
        print("\r" + " " * 60, end="\r", file=sys.stderr, flush=True)


def read_shapes(arguments: argparse.Namespace) -> list[Any]:
    from layers import read_layers

    given = Path(arguments.shapes)
    path = next((p for p in (given, HERE / given, HERE / "shapes" / given.name) if p.is_file()), given)
    try:
        wanted = re.compile(arguments.match)
    except re.error as error:
        raise ValueError(f"--match {arguments.match!r}: {error}") from None
    layers = [layer for layer in read_layers(path)
              if wanted.search(layer.name) or wanted.search(layer.kind)]
    if not layers:
        raise ValueError(f"no layer of {path} matches {arguments.match!r}")
    return layers


def load_ours(arguments: argparse.Namespace, info: dict[str, Any]) -> list[Any]:
    """pyconvbn in every precision asked for, the first one as `ours`, and without a plan; fills in what the header says
    about it. ValueError when it can't be had or not with this ISA."""
    try:
        from ours import OneShot, Ours

        owns = [Ours(arguments.threads, precision, precision if number else "ours")
                for number, precision in enumerate(arguments.precision)]
        own = owns[0]
        if arguments.one_shot:
            owns.append(OneShot(arguments.threads))
    except ImportError as error:
        raise ValueError(f"pyconvbn can't be imported ({error}); `pip install .` first, or use "
                         "--peers-only") from error
    isa = own.core.cpu_info()["isa_active"]
    if arguments.isa and isa != arguments.isa:
        raise ValueError(f"--isa {arguments.isa}: this build on this CPU would use {isa}")
    info.update(isa=isa, precision=", ".join(arguments.precision), reuse_out=arguments.out,
                build=own.core.build_info(), peak_gflops=measure_peak(own.testing, isa))
    return owns


def measure_peak(testing: Any, isa: str, best: float = 0.0) -> float:
    """GFLOP/s of one thread: the most that this or an earlier measurement (`best`) saw, as a disturbed run is no peak."""
    flops, seconds = testing.fma_peak(isa, 10_000)
    rounds = max(1, int(10_000 * 0.005 / max(seconds, 1e-6)))
    for _ in range(5):
        flops, seconds = testing.fma_peak(isa, rounds)
        best = max(best, flops / seconds / 1e9)
    return best


def run_layers(arguments: argparse.Namespace, info: dict[str, Any]) -> int:
    import report
    from peers import PEERS, load_peers

    import numpy as np

    layers = read_shapes(arguments)
    owns = [] if arguments.peers_only else load_ours(arguments, info)
    own = owns[0] if owns else None
    names = [] if arguments.own_only or arguments.peers == "none" else (
        list(PEERS) if arguments.peers == "all" else arguments.peers.split(","))
    peers, missing = load_peers(names, arguments.threads)
    rivals = [*owns, *peers]
    if not rivals:
        raise ValueError("nobody to time: none of the peers is installed")
    versions = {"numpy": np.__version__}
    for rival in rivals:
        versions.update(rival.versions)
    info.update(versions=versions, missing=missing, rivals={rival.key: rival.title for rival in rivals},
                own=[rival.key for rival in owns])
    text = sys.stderr if arguments.json == "-" else sys.stdout
    print(report.header(info), end="\n\n", file=text, flush=True)

    gc.disable()  # measure_layer collects between layers, never while the clock runs
    load = machine.OtherLoad(info["cpus_used"])
    rows = []
    for layer in progress(layers, "layer"):
        rows.append(measure_layer(layer, rivals, arguments))
        if own:
            # The clock wanders during a run; shares are of the most that was ever seen.
            info["peak_gflops"] = measure_peak(own.testing, info["isa"], info["peak_gflops"])
    for row in rows:
        peak, real = info.get("peak_gflops"), row["gflops_real"]
        row["peak_percent"] = 100 * real / (peak * arguments.threads) if peak and real else None
    info["other_load"] = load.share()
    summary = report.summarize(rows)
    columns = [name for name in info["rivals"] if name == "ours" or name not in info["own"]]
    parts = [report.table(rows, columns), report.summary_text(summary, info["other_load"], info.get("peak_gflops"))]
    if len(arguments.precision) > 1 and own:
        parts.append(report.precisions(rows, arguments.precision))
    if arguments.one_shot:
        summary["one_shot"] = report.summarize_one_shot(rows)
        parts.append(report.one_shot(rows, summary["one_shot"]))
    print(*parts, sep="\n\n", file=text)
    write_json(arguments, {"info": info, "arguments": vars(arguments), "layers": rows, "summary": summary})
    if arguments.plot:
        try:
            report.plot(rows, f"{info['cpu']}, {info.get('isa')}, {arguments.threads} thread(s), "
                              f"precision {arguments.precision[0]}", arguments.plot)
        except ImportError:
            raise ValueError("--plot needs matplotlib") from None
    return int(any(entry["rival"] in info["own"] for entry in summary["failed"]))


def measure_layer(layer: Any, rivals: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepares every rival, checks it, then times those that were right."""
    from peers import Unsupported
    from problem import make_check, make_problem
    from stats import interleave

    problem = make_problem(layer)
    check = make_check(problem)
    calls, results, algorithms, own = {}, {}, {}, {rival.key for rival in rivals if hasattr(rival, "algorithm")}
    for rival in rivals:
        # A rival that breaks must not take the run with it, whatever its library raises.
        try:
            call, fetch = rival.prepare(problem, arguments.out)
            y = fetch(call())
            if y.shape != layer.output_shape:
                raise AssertionError(f"output shape {y.shape}, expected {layer.output_shape}")
            results[rival.key] = {"rms_ratio": check.rms_ratio(y)}
            calls[rival.key] = call
            if rival.key in own:
                algorithms[rival.key] = rival.algorithm(layer)
        except Unsupported as error:
            results[rival.key] = {"unsupported": str(error)}
        except Exception as error:
            results[rival.key] = {"failed": f"{type(error).__name__}: {error}",
                                  "wrong": isinstance(error, AssertionError)}
    timings = interleave(calls, rounds=arguments.rounds, slice_seconds=arguments.slice / 1e3,
                         keep=own) if calls else {}
    for name, timing in timings.items():
        results[name].update(median_us=timing.median * 1e6, best_us=timing.best * 1e6,
                             samples=len(timing.samples))
    peers = {name: result["median_us"] for name, result in results.items()
             if name not in own and "median_us" in result}
    best_peer = min(peers, key=lambda name: peers[name], default=None)
    mine = results.get("ours", {}).get("median_us")
    fastest = min((results[name]["best_us"] for name in peers), default=None)
    # Without ours the columns describe the best peer.
    shown = mine if "ours" in results else peers.get(best_peer)
    row = {
        "layer": layer.name, "kind": layer.kind, "note": layer.note, "n": layer.n, "groups": layer.groups,
        "input_shape": layer.input_shape, "weight_shape": layer.weight_shape,
        "output_shape": layer.output_shape, "stride": layer.stride, "padding": layer.padding,
        "dilation": layer.dilation, "transposed": layer.transposed, "output_padding": layer.output_padding,
        "flops": layer.flops, "flops_real": layer.flops_real, "points_checked": check.points,
        "algorithm": algorithms.get("ours"), "algorithms": algorithms, "rivals": results,
        "gflops": layer.flops / shown / 1e3 if shown else None,
        "gflops_real": layer.flops_real / shown / 1e3 if shown else None,
        "best_peer": best_peer, "ratio": peers[best_peer] / mine if best_peer and mine else None,
        "ratio_of_best": fastest / results["ours"]["best_us"] if best_peer and mine else None,
        "rms_ratio": results["ours" if "ours" in results else best_peer].get("rms_ratio")
        if "ours" in results or best_peer else None,
    }
    del problem, calls
    gc.collect()
    return row


def run_kernels(arguments: argparse.Namespace, info: dict[str, Any]) -> int:
    """Every kernel of every ISA this machine can run."""
    from kernels import KERNEL_BENCHES
    from stats import interleave

    testing = load_ours(arguments, info)[0].testing
    isas = [arguments.isa] if arguments.isa else list(testing.isas())
    names = [name for name in testing.kernel_names() if re.search(arguments.match, name)]
    absent = [name for name in names if name not in KERNEL_BENCHES]
    rows = []
    for name in progress([name for name in names if name in KERNEL_BENCHES], "kernel"):
        for isa in isas:
            for case in KERNEL_BENCHES[name](testing, isa):
                timing = interleave({name: case.call}, rounds=arguments.rounds,
                                    slice_seconds=arguments.slice / 1e3)[name]
                rows.append({"kernel": name, "isa": isa, "case": case.label, "unit": f"G{case.unit}/s",
                             "median_us": timing.median * 1e6, "best_us": timing.best * 1e6,
                             "rate": case.work / timing.median / 1e9})
    text = sys.stderr if arguments.json == "-" else sys.stdout
    print(f"{info['cpu']}, FMA peak {info['peak_gflops']:.1f} GFLOP/s ({info['isa']})\n", file=text)
    for row in rows:
        print(f"{row['kernel']:12} {row['isa']:8} {row['case']:34} {row['median_us']:10.2f} us "
              f"{row['rate']:8.1f} {row['unit']}", file=text)
    for name in absent:
        print(f"NO BENCHMARK for kernel {name}", file=text)
    write_json(arguments, {"info": info, "kernels": rows, "without_benchmark": absent})
    return int(bool(absent))


def write_json(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    if not arguments.json:
        return
    text = json.dumps(result, indent=1, allow_nan=False) + os.linesep
    if arguments.json == "-":
        sys.stdout.write(text)
    else:
        Path(arguments.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
