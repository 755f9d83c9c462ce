# SPDX-License-Identifier: BSD-3-Clause
"""Times whole networks: plans run one after the other against libraries that see the network as one model.

See README.md beside this file.
"""

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

# Modules that load NumPy are imported inside functions: its threads and pyconvbn's choice of ISA are fixed at import.


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--match", default="", metavar="REGEX", help="only networks whose name matches")
    parser.add_argument("--batch", default="1,8", metavar="LIST", help="batch sizes (default: 1,8)")
    parser.add_argument("--peers", default="all", metavar="LIST",
                        help="comma list of ort, ov, or all (those that are installed), or none")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads and CPUs (default: 1)")
    parser.add_argument("--isa", metavar="NAME", help="the best ISA pyconvbn may use; the peers are not restricted")
    parser.add_argument("--precision", choices=("strict", "fp32", "fast"), default="fp32")
    parser.add_argument("--tune", action="store_true", help="plans measure their candidates once (tune=True)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--slice", type=float, default=60, metavar="MS", help="time of one rival in one round (default: 60)")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide the sides of the input, for a quick look")
    parser.add_argument("--layers", action="store_true", help="print every step: ours, and each library's own profile")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: all right; 1: a result of pyconvbn was wrong; 2: it could not run."""
    arguments = parse_arguments(argv)
    try:
        info = machine.prepare(arguments.threads, arguments.isa)
        return run(arguments, info)
    except (ValueError, OSError) as error:
        print(f"chains.py: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace, info: dict[str, Any]) -> int:
    import re

    import chain_rivals as rivals
    import report
    from networks import NETWORKS

    names = [name for name in NETWORKS if re.search(arguments.match, name)]
    if not names:
        raise ValueError(f"--match {arguments.match!r}: none of {', '.join(NETWORKS)}")
    own = rivals.Ours(arguments.threads, arguments.precision, arguments.tune)
    peers, missing = rivals.load_peers(arguments.peers, arguments.threads)
    versions = {}
    for rival in [own, *peers]:
        versions.update(rival.versions)
    from run import measure_peak

    info.update(versions=versions, missing=missing, isa=own.isa, precision=arguments.precision, reuse_out=True,
                build=own.build, peak_gflops=measure_peak(own.testing, own.isa))
    print(report.header(info), end="\n\n", flush=True)
    gc.disable()
    load = machine.OtherLoad(cpus_of(info))
    rows: list[dict[str, Any]] = []
    print(f"{'network':<13} {'batch':>5} {'gflop':>7} {'ours ms':>9} {'best ms':>9} "
          + " ".join(f"{peer.key + ' ms':>9}" for peer in peers) + f" {'GF/s':>7} {'ratio':>6}  largest error, ours (peers)")
    for name in names:
        for batch in map(int, arguments.batch.split(",")):
            row = measure(NETWORKS[name](batch, arguments.scale), own, peers, arguments)
            rows.append(row)
            print(line(row, [peer.key for peer in peers]), flush=True)
            if arguments.layers:
                print(layer_table(row), flush=True)
            gc.collect()
    info["other_load"] = load.share()
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"\nbest peer / ours, geometric mean over {len(ratios)} chains: {mean:.3f}")
    print(f"other programs used {100 * info['other_load']:.0f} % of these CPUs during the run")
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"info": info, "arguments": vars(arguments), "chains": rows}, indent=1) + os.linesep)
    return int(any(row["wrong"] for row in rows))


def cpus_of(info: dict[str, Any]) -> list[int]:
    return info["cpus_used"]


def measure(net: Any, own: Any, peers: list[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepares all rivals, compares what they compute, and times those that run."""
    import numpy as np
    from chain_rivals import truth
    from stats import interleave

    x = np.maximum(np.random.default_rng(2).standard_normal(net.steps[0].shape, dtype=np.float32), 0)
    expected = truth(net, x)
    calls: dict[str, Callable[[], Any]] = {}
    errors, failed, prepared = {}, {}, {}
    for rival in [own, *peers]:
        try:
            call, fetch = rival.prepare(net, x)
            y = np.asarray(fetch(call()))
            # Of the largest value: deep chains of float32 layers agree to a few 1e-6 of it.
            errors[rival.key] = float(np.max(np.abs(y.reshape(expected.shape) - expected)) / np.max(np.abs(expected)))
            calls[rival.key], prepared[rival.key] = call, rival
        except Exception as error:
            failed[rival.key] = f"{type(error).__name__}: {error}"
            if rival is own:
                raise
    wrong = not errors["ours"] < 1e-4
    timings = interleave(calls, rounds=arguments.rounds, slice_seconds=arguments.slice / 1e3, keep=("ours",))
    ms = {name: timing.median * 1e3 for name, timing in timings.items()}
    best = min((value for name, value in ms.items() if name != "ours"), default=None)
    flops = sum(step.flops for step in net.steps)
    row = {"network": net.name, "batch": net.steps[0].shape[0], "flops": flops, "ms": ms,
           "best_ms": {name: timing.best * 1e3 for name, timing in timings.items()},
           "ratio": best / ms["ours"] if best else None,
           "errors": errors, "wrong": wrong, "failed": failed}
    if arguments.layers:
        row["steps"] = [{"name": step.name, "flops": step.flops} for step in net.steps]
        row["layers"] = {rival.key: rival.profile() for rival in prepared.values()}
        row["algorithms"] = own.algorithms()
    return row


def line(row: dict[str, Any], peers: list[str]) -> str:
    ms = row["ms"]
    cells = " ".join(f"{ms[name]:9.2f}" if name in ms else f"{'FAILED':>9}" for name in peers)
    others = ", ".join(f"{error:.0e}" for name, error in row["errors"].items() if name != "ours")
    ratio = f"{row['ratio']:6.2f}" if row["ratio"] else f"{'-':>6}"
    own = f"{ms['ours']:9.2f} {row['best_ms']['ours']:9.2f}"
    return (f"{row['network']:<13} {row['batch']:5d} {row['flops'] / 1e9:7.2f} {own} {cells} "
            f"{row['flops'] / ms['ours'] / 1e6:7.1f} {ratio}  {'WRONG ' if row['wrong'] else ''}"
            f"{row['errors']['ours']:.0e} ({others})" + "".join(f"  {k}: {v}" for k, v in row["failed"].items()))


def layer_table(row: dict[str, Any]) -> str:
    """Microseconds of each step, '<' where a peer is faster, and what the steps amount to."""
    own = row["layers"]["ours"]
    peers = {name: values for name, values in row["layers"].items() if name != "ours"}
    lines = [f"    {'step':<34} {'algorithm':<13} {'ours us':>9} {'GF/s':>7}"
             + "".join(f" {name + ' us':>9}" for name in peers) + ("  best peer - ours" if peers else "")]
    won, lost = [], []
    for number, step in enumerate(row["steps"]):
        if number not in own:
            continue
        rate = f"{step['flops'] / own[number] / 1e3:7.1f}" if step["flops"] else f"{'':>7}"
        times = [values.get(number) for values in peers.values()]
        known = [t for t in times if t is not None]
        gap = ""
        if known:
            difference = min(known) - own[number]
            (won if difference >= 0 else lost).append(difference)
            gap = f"{difference:+10.1f}" + " <" * (difference < 0)
        lines.append(f"    {step['name']:<34} {row['algorithms'].get(number, ''):<13} {own[number]:9.1f} {rate}" + "".join(
            f" {t:9.1f}" if t is not None else f" {'-':>9}" for t in times) + gap)
    lines.append(f"    {'all steps':<34} {'':<13} {sum(own.values()):9.1f} {'':>7}"
                 + "".join(f" {sum(values.values()):9.1f}" for values in peers.values()))
    if won or lost:
        lines.append(f"    won {sum(won):.0f} us in {len(won)} steps, lost {-sum(lost):.0f} us in {len(lost)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
