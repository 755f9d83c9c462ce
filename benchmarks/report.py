# SPDX-License-Identifier: BSD-3-Clause
"""Results of a run as a table, a summary and a plot. Works on the dictionaries that --json writes."""

from pathlib import Path
from typing import Any

from stats import by_kind, geometric_mean

Row = dict[str, Any]


def header(info: dict[str, Any]) -> str:
    """The facts without which the numbers mean nothing."""
    lines = [f"{name:>10}: {text}" for name, text in (
        ("machine", f"{info['machine']}, {info['cpu']}, {info['cpus_online']} CPUs"),
        ("date", info["date"]),
        ("threads", f"{len(info['cpus_used'])}, pinned to CPU {', '.join(map(str, info['cpus_used']))}"),
        ("memory", f"huge pages {info['huge_pages']}; malloc keeps freed memory: "
                   f"{'yes' if info['malloc_keeps'] else 'no'}; governor {info['governor']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())),
    )]
    if info.get("isa"):
        lines.append(f"{'pyconvbn':>10}: ISA {info['isa']}, precision {info['precision']}, "
                     f"{'caller-owned output' if info['reuse_out'] else 'output allocated each call'}")
        lines.append(f"{'build':>10}: {info['build'].get('compiler')} {info['build'].get('cflags')}")
    peak = info.get("peak_gflops")
    lines.append(f"{'FMA peak':>10}: " + (f"{peak:.1f} GFLOP/s a core, measured in this process"
                                          if peak else "not measured (needs pyconvbn)"))
    for name, reason in info["missing"].items():
        lines.append(f"{'no ' + name:>10}: {reason}")
    return "\n".join(lines)


def table(rows: list[Row], rivals: list[str]) -> str:
    """One line a layer: ours, then every rival's median in microseconds, then the comparison."""
    peers = [name for name in rivals if name != "ours"]
    own = "ours" in rivals
    columns = ["layer", "class", "mflop"]
    if own:
        columns += ["algorithm", "ours us", "best us"]
    columns += peers + ["GF/s", "real GF/s", "% peak"]
    if peers:
        columns += ["best peer"]
    if own and peers:
        columns += ["ratio"]
    columns += ["rms"]
    body = []
    for row in rows:
        cells = [row["layer"], row["kind"], f"{row['flops'] / 1e6:.1f}"]
        if own:
            cells += [row["algorithm"] or "", _us(row, "ours", "median_us"), _us(row, "ours", "best_us")]
        cells += [_us(row, name, "median_us") for name in peers]
        cells += [_number(row["gflops"]), _number(row["gflops_real"]), _number(row["peak_percent"])]
        if peers:
            cells.append(row["best_peer"] or "")
        if own and peers:
            cells.append(_number(row["ratio"], 2) + ("" if row["ratio"] is None or row["ratio"] >= 1 else " <"))
        cells.append(_number(row["rms_ratio"], 2))
        body.append(cells)
    left = {"layer", "class", "algorithm", "best peer", "ratio"}
    widths = [max(len(line[i]) for line in [columns, *body]) for i in range(len(columns))]
    lines = []
    for cells in [columns, *body]:
        lines.append("  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(cells, widths, columns, strict=True)).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _us(row: Row, rival: str, what: str) -> str:
    result = row["rivals"].get(rival, {})
    if "failed" in result:
        return "WRONG" if result["wrong"] else "FAILED"
    value = result.get(what)
    return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Means over the layers that have a ratio, and what deserves a second look."""
    compared = [row for row in rows if row["ratio"] is not None]
    ratios = [row["ratio"] for row in compared]
    kinds = by_kind([row["kind"] for row in compared], ratios)
    wins: dict[str, int] = {}
    for row in rows:
        if row["best_peer"]:
            wins[row["best_peer"]] = wins.get(row["best_peer"], 0) + 1
    checked = [row for row in rows if row["rms_ratio"] is not None]
    worst = max(checked, key=lambda row: row["rms_ratio"], default=None)
    return {
        "layers": len(rows), "compared": len(compared),
        "geometric_mean": geometric_mean(ratios) if ratios else None,
        "geometric_mean_of_best": geometric_mean(row["ratio_of_best"] for row in compared)
        if ratios else None,
        "by_class": {kind: {"layers": len(values), "geometric_mean": geometric_mean(values)}
                     for kind, values in kinds.items()},
        "below_one": [{"layer": row["layer"], "ratio": row["ratio"], "best_peer": row["best_peer"]}
                      for row in sorted(compared, key=lambda row: row["ratio"]) if row["ratio"] < 1],
        "best_peer_count": wins,
        "worst_rms_ratio": {"layer": worst["layer"], "rms_ratio": worst["rms_ratio"]} if worst else None,
        "failed": [{"layer": row["layer"], "rival": name, "reason": result["failed"]}
                   for row in rows for name, result in row["rivals"].items() if "failed" in result],
    }


def precisions(rows: list[Row], names: list[str]) -> str:
    """Speed and accuracy of every precision, layer by layer: ratios to the best peer, then rms errors."""
    keys = ["ours", *names[1:]]
    lines = ["precisions: time of the best peer / ours, and rms error / that of one sequential float32 sum",
             f"{'layer':<8}" + "".join(f" {name + ' x':>9} {'rms':>5} {'algorithm':<13}" for name in names)]
    ratios: dict[str, list[float]] = {key: [] for key in keys}
    below: dict[str, list[str]] = {key: [] for key in keys}
    worst: dict[str, tuple[float, str]] = dict.fromkeys(keys, (0.0, ""))
    for row in rows:
        best = row["rivals"].get(row["best_peer"], {}).get("median_us")
        cells = []
        for key in keys:
            result = row["rivals"].get(key, {})
            ratio = best / result["median_us"] if best and "median_us" in result else None
            rms = result.get("rms_ratio")
            if ratio:
                ratios[key].append(ratio)
                if ratio < 1:
                    below[key].append(f"{row['layer']} {ratio:.2f}")
            if rms is not None:
                worst[key] = max(worst[key], (rms, row["layer"]))
            cells.append(f" {_number(ratio, 2):>9} {_number(rms, 2):>5} {row['algorithms'].get(key, ''):<13}")
        lines.append(f"{row['layer']:<8}" + "".join(cells).rstrip())
    for key, name in zip(keys, names, strict=True):
        mean = f"geometric mean {geometric_mean(ratios[key]):.3f}, " if ratios[key] else ""
        lines.append(f"{name}: {mean}largest rms error {worst[key][0]:.2f} ({worst[key][1]}), below 1.0: "
                     f"{', '.join(below[key]) or 'none'}")
    return "\n".join(lines)


# What `efficient_conv_bn_eval` may take, times the plan's time, and from how many operations on.
ONE_SHOT_LIMIT, ONE_SHOT_FLOPS = 1.15, 100e6


def _one_shot_ratio(row: Row) -> float | None:
    times = [row["rivals"].get(key, {}).get("median_us") for key in ("one_shot", "ours")]
    return times[0] / times[1] if None not in times else None


def summarize_one_shot(rows: list[Row]) -> dict[str, Any]:
    """Time without a plan over that with one: of all layers, and of those large enough to have a target."""
    ratios = {row["layer"]: _one_shot_ratio(row) for row in rows}
    large = [row["layer"] for row in rows if row["flops"] > ONE_SHOT_FLOPS]
    means = {}
    for name, layers in (("geometric_mean", list(ratios)), ("geometric_mean_large", large)):
        values = [ratio for layer in layers if (ratio := ratios[layer]) is not None]
        means[name] = geometric_mean(values) if values else None
    met = [layer for layer in large if (ratio := ratios[layer]) is not None and ratio <= ONE_SHOT_LIMIT]
    return {**means, "ratios": ratios, "large": len(large), "met": len(met),
            "missed": [layer for layer in large if layer not in met]}


def one_shot(rows: list[Row], summary: dict[str, Any]) -> str:
    """The operator without a plan beside the plan, layer by layer."""
    lines = ["without a plan: time of efficient_conv_bn_eval / that of the plan",
             f"{'layer':<8} {'mflop':>8} {'one-shot us':>11} {'ratio':>6} {'rms':>5}"]
    for row in rows:
        ratio, result = summary["ratios"][row["layer"]], row["rivals"].get("one_shot", {})
        late = "" if row["layer"] not in summary["missed"] else " >"
        lines.append(f"{row['layer']:<8} {row['flops'] / 1e6:>8.1f} {_us(row, 'one_shot', 'median_us'):>11} "
                     f"{_number(ratio, 2):>6} {_number(result.get('rms_ratio'), 2):>5}{late}")
    lines.append(f"geometric mean {_number(summary['geometric_mean'], 3)}; of the {summary['large']} layers above "
                 f"{ONE_SHOT_FLOPS / 1e6:.0f} MFLOP {_number(summary['geometric_mean_large'], 3)}, "
                 f"{summary['met']} of them at most {ONE_SHOT_LIMIT}")
    return "\n".join(lines)


def summary_text(summary: dict[str, Any], other_load: float, peak: float | None = None) -> str:
    lines = [f"FMA peak over the run: {peak:.1f} GFLOP/s a core"] if peak else []
    if summary["geometric_mean"] is not None:
        lines.append(f"best peer / ours, geometric mean over {summary['compared']} layers: "
                     f"{summary['geometric_mean']:.3f} (of the best instead of the median times: "
                     f"{summary['geometric_mean_of_best']:.3f})")
        lines.append("by class: " + ", ".join(
            f"{kind} {entry['geometric_mean']:.2f} ({entry['layers']})"
            for kind, entry in summary["by_class"].items()))
        below = ", ".join(f"{entry['layer']} {entry['ratio']:.2f} ({entry['best_peer']})"
                          for entry in summary["below_one"])
        lines.append(f"below 1.0 ({len(summary['below_one'])} of {summary['compared']}): {below or 'none'}")
    if summary["best_peer_count"]:
        lines.append("best peer how often: " + ", ".join(
            f"{name} {count}" for name, count in
            sorted(summary["best_peer_count"].items(), key=lambda item: -item[1])))
    if summary["worst_rms_ratio"]:
        worst = summary["worst_rms_ratio"]
        lines.append(f"largest rms error over that of a sequential float32 sum: {worst['rms_ratio']:.2f} "
                     f"({worst['layer']})")
    for entry in summary["failed"]:
        lines.append(f"FAILED {entry['layer']} {entry['rival']}: {entry['reason']}")
    lines.append(f"other programs used {100 * other_load:.0f} % of these CPUs during the run"
                 + ("" if other_load < 0.05 else ": NOT A QUIET MACHINE, repeat before quoting"))
    return "\n".join(lines)


def plot(rows: list[Row], title: str, path: Path | str) -> None:
    """A bar a layer: best peer's time over ours, coloured by class. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    compared = [row for row in rows if row["ratio"] is not None]
    if not compared:
        raise ValueError("nothing to plot: no layer was timed for both pyconvbn and a peer")
    kinds = list(dict.fromkeys(row["kind"] for row in compared))
    colours = {kind: plt.get_cmap("tab20")(i % 20) for i, kind in enumerate(kinds)}
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.21 * len(compared)), layout="constrained")
    labelled: set[str] = set()
    for y, row in enumerate(compared):
        kind = row["kind"]
        axes.barh(y, row["ratio"] - 1, left=1, color=colours[kind], height=0.75,
                  label=None if kind in labelled else kind)
        labelled.add(kind)
        ahead = row["ratio"] >= 1
        axes.annotate(f"{row['ratio']:.2f} {row['best_peer']}", (row["ratio"], y),
                      xytext=(3 if ahead else -3, 0), textcoords="offset points",
                      ha="left" if ahead else "right", va="center", fontsize=7)
    axes.set_yticks(range(len(compared)), [row["layer"] for row in compared], fontsize=7)
    axes.invert_yaxis()
    axes.set_ylim(len(compared) - 0.3, -0.7)
    # Ratios are compared on a logarithmic axis: twice as fast and half as fast look alike.
    axes.set_xscale("log")
    low, high = min(1, *(row["ratio"] for row in compared)), max(1, *(row["ratio"] for row in compared))
    margin = max(1.3, (high / low) ** 0.18)  # room for the label beside the longest bar
    axes.set_xlim(low / margin, high * margin)
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)
             if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of the best peer / time of pyconvbn (right of 1: pyconvbn is faster)", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
