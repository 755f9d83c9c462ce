# SPDX-License-Identifier: BSD-3-Clause
"""How ``pyconvbn demo`` shows its result: as text for any terminal, and as a picture."""

from __future__ import annotations

import os
import pathlib
import shutil
import textwrap
from typing import Any, ClassVar, TextIO

import numpy as np
from numpy.typing import NDArray

from ._demo_measure import BatchNormRow, DemoResult
from ._verify import short
from .fx._describe import describe

__all__ = ["RUNS", "Terminal", "demo_text", "draw_plot", "duration"]

_STYLES = {"bold": "1", "dim": "2", "good": "32", "bad": "31", "accent": "36"}
#: Form of the network and what it is called.
RUNS = (
    ("unfused", "unfused"), ("one_shot", "one-shot fused"), ("folded", "folded"), ("frozen", "frozen"),
)  # fmt: skip


class Terminal:
    """What the output can show: width, colour, and whether its encoding has the symbols used.

    Colour only on a terminal, and not with ``NO_COLOR`` set (https://no-color.org).
    """

    #: Every symbol used, and what stands for it in an encoding without them.
    _PLAIN: ClassVar[dict[str, str]] = {
        "→": "->", "←": "<-", "×": "x", "·": ".", "µ": "u", "✓": "+", "✗": "-", "─": "-",
        "█": "#", "▌": "", "▀": "", "▄": "",
    }  # fmt: skip

    def __init__(self, stream: TextIO) -> None:
        self.width = min(max(shutil.get_terminal_size((100, 24)).columns, 40), 110)
        self.colour = (
            stream.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM", "") != "dumb"
        )
        try:
            "".join(self._PLAIN).encode(stream.encoding or "ascii")
            self.symbols = True
        except (UnicodeEncodeError, LookupError):
            self.symbols = False

    def text(self, value: str) -> str:
        """`value` in what the encoding has; call it before measuring widths."""
        if not self.symbols:
            for symbol, plain in self._PLAIN.items():
                value = value.replace(symbol, plain)
        return value

    def paint(self, value: str, style: str) -> str:
        return f"\x1b[{_STYLES[style]}m{value}\x1b[0m" if self.colour else value

    def rule(self) -> str:
        return self.paint(self.text("─") * self.width, "dim")

    def wrap(self, value: str, first: str = "  ", indent: str = "  ") -> list[str]:
        """Lines that fit; `first` and `indent` open the first and the other lines."""
        return textwrap.wrap(
            self.text(value), self.width, initial_indent=first, subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip

    def bar(self, share: float, width: int) -> str:
        """A bar of `share` (0 to 1) of `width` cells, in half cells where they exist."""
        halves = max(1, round(share * width * 2))
        return self.text("█" * (halves // 2) + "▌" * (halves % 2)) or self.text("█")


def _heading(term: Terminal, title: str, note: str) -> list[str]:
    first, *others = term.wrap(f"{title}  {note}", "", "  ")
    line = term.paint(title, "bold") + term.paint(first[len(title) :], "dim")
    return ["", line, *(term.paint(other, "dim") for other in others)]


def _fact(term: Terminal, label: str, value: str) -> list[str]:
    return term.wrap(value, f"  {label:<11}", " " * 13)


def _size(count: int) -> str:
    return f"{count} bytes" if count < 1024 else f"{count / 1024:.0f} KB"


def duration(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1000:.2f} ms"


# -- text --------------------------------------------------------------------------------------


def _digit_lines(image: NDArray[Any], term: Terminal) -> list[str]:
    """An 8x8 image as text: two pixels a character cell where the encoding has half blocks."""
    if not term.symbols:
        ramp = " .:-=+*#%@"
        return ["".join(ramp[min(9, round(v * 9 / 16))] * 2 for v in row) for row in image]
    lines = []
    for upper, lower in zip(image[0::2], image[1::2], strict=True):
        if term.colour:
            # 24 greys of the 256-colour palette: the upper pixel in front, the lower one behind.
            greys = 232 + np.rint(np.stack([upper, lower], 1) * 23 / 16).astype(int)
            cells = [f"\x1b[38;5;{front};48;5;{back}m▀" for front, back in greys]
            lines.append("".join(cells) + "\x1b[0m")
        else:
            cells = [" ▀▄█"[(a >= 8) + 2 * (b >= 8)] for a, b in zip(upper, lower)]
            lines.append("".join(cells))
    return lines


def _gallery(result: DemoResult, term: Terminal) -> list[str]:
    cell = 8 if term.symbols else 16
    count = min((term.width - 2) // (cell + 2), len(result.images))
    pictures = [_digit_lines(image[0], term) for image in result.images[:count]]
    lines = ["  " + "  ".join(parts) for parts in zip(*pictures, strict=True)]
    captions = []
    for logits, label in zip(result.logits[:count], result.labels[:count]):
        guess = int(logits.argmax())
        right = guess == label
        text = f"{guess} ✓" if right else f"{guess} ✗ ({label})"
        text = term.text(text) if term.symbols else f"{guess}" if right else f"{guess}, not {label}"
        captions.append(term.paint(text.center(cell), "good" if right else "bad"))
    return [*lines, "  " + "  ".join(captions)]


def _node_line(node: Any, root: Any, last: Any) -> tuple[str, str]:
    """What a node is and where; what it reads is added when that is not just the node before."""
    about = describe(node, root)
    reads = [used.name for used in node.all_input_nodes if used.op != "get_attr"]
    title = about.title
    if reads and node.op != "output" and (last is None or reads != [last.name]):
        title += " ← " + ", ".join(reads)
    return title, about.where if node.op == "call_module" else node.name


def _graph_lines(result: DemoResult, term: Terminal) -> list[str]:
    """The graph before, and in a second column what became of each node."""
    before, after = result.forms.unfused, result.forms.folded
    rows = {row.node: row for row in result.forms.report.rows}
    holders = {row.conv for row in rows.values() if row.outcome == "folded"}
    left = {node.name for node in after.graph.nodes}
    nodes = list(before.graph.nodes)
    kept = sum(row.outcome == "kept" for row in rows.values())
    lines = _heading(
        term, "Graph",
        f"traced: {len(nodes)} nodes, {len(rows)} BatchNorms; folded: {len(left)} nodes, "
        f"{kept} BatchNorm{'s' * (kept != 1)}",
    )  # fmt: skip
    table, last = [], None
    for node in nodes:
        title, where = _node_line(node, before, last)
        last = node
        row = rows.get(node.name)
        if row is not None and row.outcome == "kept":
            now, style = f"kept: {row.reason}", "bad"
        elif node.name in holders:
            now, style = f"{where} + BN", "good"
        elif node.name in left:
            now, style = where, ""
        else:
            now, style = "·", "dim"
        table.append((term.text(title), term.text(where), term.text(now), style))
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    for title, where, now, style in table:
        place = term.paint(f"{where:<{widths[1]}}", "dim")
        lines.append(f"  {title:<{widths[0]}}  {place}  {term.paint(now, style) if style else now}")
    return lines


def _row_cells(row: BatchNormRow, term: Terminal) -> list[str]:
    """What there is to say about a folded BatchNorm, most important first."""
    cells = [row.layer]
    if row.error_before is not None:
        cells.append(f"{row.error_before:.1e} → {row.error_after:.1e}")
    taken = "".join({"add": " + add", "relu": " + ReLU"}[name] for name in row.absorbed)
    cells += [f"BN{taken}", row.algorithm or ""]
    return [term.text(cell) for cell in cells]


def _rows(result: DemoResult, term: Terminal) -> list[str]:
    """The FoldReport, one row per BatchNorm, with what was measured of each."""
    rows = result.batch_norms
    names = max(len(row.name) for row in rows)
    cells = {row.name: _row_cells(row, term) for row in rows if row.outcome != "kept"}
    # Columns that do not fit are left out, from the right.
    widths: list[int] = []
    for column in zip(*cells.values(), strict=True):
        widths.append(max(map(len, column)))
        if 4 + names + 2 + len("folded") + sum(widths) + 2 * len(widths) > term.width:
            del widths[-1]
            break
    note = str(result.forms.report).splitlines()[-1]
    if len(widths) > 1:
        note += "; error against float64 unfused → folded"
    lines = _heading(term, "FoldReport", note)
    for row in rows:
        good = row.outcome != "kept"
        mark = term.text("✓" if good else "✗")
        head = f"    {row.name:<{names}}  {row.outcome:<6}"
        if good:
            shown = zip(cells[row.name], widths, strict=False)
            texts = [head + "".join(f"  {cell:<{width}}" for cell, width in shown)]
        else:
            # A reason is never cut off: it goes on in the next line.
            blocking = f" ({row.blocking})" if row.blocking else ""
            texts = term.wrap(f"{row.reason}: {row.hint}{blocking}", head + "  ", " " * 6)
        texts[0] = f"  {term.paint(mark, 'good' if good else 'bad')}{texts[0][3:]}"
        lines += texts
    return lines


def _frozen_lines(result: DemoResult, term: Terminal) -> list[str]:
    """The frozen graph: each layer a prepared operator, with what it does beside the convolution."""
    frozen = result.forms.frozen
    nodes = list(frozen.graph.nodes)
    folds = frozen.report.folds
    left = sum(row.outcome == "kept" for row in folds)
    lines = _heading(
        term, "Frozen", f"{len(nodes)} nodes, {left or 'no'} batch_norm left; {_count(folds.counts)}"
    )  # fmt: skip
    table, last = [], None
    for node in nodes:
        title, _ = _node_line(node, frozen, last)
        last = node
        table.append((term.text(title), node.name))
    width = max(len(title) for title, _ in table)
    if width + max(len(name) for _, name in table) + 4 <= term.width:
        return lines + [f"  {title:<{width}}  {term.paint(name, 'dim')}" for title, name in table]
    for title, name in table:  # each name in front of its line, which goes on below
        lines += term.wrap(f"{name}: {title}", "  ", " " * 6)
    return lines


def _count(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def _verify_lines(result: DemoResult, term: Terminal) -> list[str]:
    """The verdicts of `verify`, one line for each form."""
    limit = result.error["ratio_limit"]
    lines = _heading(
        term, "verify", f"error against float64, after / before folding, worst logit (limit {limit:g})"
    )
    lines.append(f"  {'':<16}{'ratio':>7}{'largest error':>15}{'before':>10}  {'ULP median / max':>17}   argmax")
    for key, label in RUNS[1:]:
        report = result.reports[key]
        for o in report.outputs:
            ulp = f"{short(o.ulp_median)} / {short(o.ulp_max)}"
            text = (
                f"  {label:<16}{o.ratio:>7.2f}{o.max_abs:>15.2e}{o.max_abs_before:>10.2e}  {ulp:>17}  "
                f"{(o.argmax_agreement or 0):.2%}"
            )
            lines.append(text if report.ok else term.paint(text, "bad"))
    return lines


def _times(result: DemoResult, term: Terminal) -> list[str]:
    time = result.time
    threads = result.machine["threads"]
    note = (
        f"a batch of {time['batch']}, {threads} thread{'s' * (threads != 1)}, "
        f"median of {time['rounds']} interleaved rounds"
    )
    lines = _heading(term, "Time", note)
    slowest = max(time[f"{key}_us"] for key, _ in RUNS)
    room = term.width - 42
    for key, label in RUNS:
        value = time[f"{key}_us"]
        bar = term.paint(term.bar(value / slowest, max(room, 8)), "accent")
        speed = "" if key == "unfused" else term.text(f"  {time['unfused_us'] / value:.2f}×")
        lines.append(f"  {label:<16}{term.text(duration(value)):>9}  {bar}{speed}")
    return lines


def _verdict(result: DemoResult, term: Terminal) -> list[str]:
    if result.verified:
        text = "✓ verified: same predictions, no further from float64 than rounding allows"
        return ["", *(term.paint(line, "good") for line in term.wrap(text, "", "  "))]
    lines = ["", term.paint(term.text("✗ verification failed"), "bad")]
    return lines + [f"  {line}" for text in result.failures for line in text.splitlines()]


def demo_text(result: DemoResult, term: Terminal) -> str:
    """The whole report, one line per BatchNorm, as wide as the terminal."""
    net, machine, accuracy, error = result.network, result.machine, result.accuracy, result.error
    lines = [
        *_heading(
            term, f"pyconvbn {machine['pyconvbn']}",
            "bn(conv(x)) as one operator, on a trained network",
        )[1:],
        term.rule(),
        *term.wrap(
            f"{machine['cpu']}, {machine['isa']} kernels, {machine['threads']} "
            f"thread{'s' * (machine['threads'] != 1)} (from {machine['threads_source']}), "
            f"NumPy {machine['numpy']}",
            "",
        ),
    ]
    lines += _heading(
        term, "Network",
        f"{net['name']}, {net['parameters']:,} parameters, {len(result.batch_norms)} BatchNorms, "
        f"{net['flops_per_image'] / 1e6:.1f} MFLOP an image",
    )  # fmt: skip
    lines += _graph_lines(result, term)
    lines += _heading(
        term, "Images", f"{accuracy['images']} handwritten digits (UCI) it was not trained on"
    )
    lines += [*_gallery(result, term), *_rows(result, term), *_frozen_lines(result, term)]
    lines += _heading(term, "Results", ", ".join(label for _, label in RUNS))
    shares = " → ".join(f"{accuracy[key]:.2%}" for key, _ in RUNS)
    errors = " → ".join(f"{error[key]:.1e}" for key, _ in RUNS)
    memory = result.memory
    lines += _fact(term, "accuracy", shares)
    lines += _fact(
        term, "error",
        f"{errors} of the largest logit, against float64 NumPy",
    )  # fmt: skip
    lines += _fact(
        term, "memory",
        f"parameters {_size(memory['parameters'])} → {_size(memory['weights'])} packed, activations alive at once "
        f"{_size(memory['activations'])} → {_size(memory['activations_frozen'])}, workspace {_size(memory['workspace'])}",
    )  # fmt: skip
    lines += [*_verify_lines(result, term), *_times(result, term), *_verdict(result, term)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


# -- picture -----------------------------------------------------------------------------------


def draw_plot(result: DemoResult, path: pathlib.Path) -> None:
    """Digits with predictions, timing bars and the error of each BatchNorm, as an image file.

    Raises `ImportError` without matplotlib, `OSError` or `ValueError` if `path` cannot be written.
    """
    from matplotlib.figure import Figure

    ink, grey, blue, orange = "#222222", "#8a8f98", "#0072b2", "#d55e00"
    columns, lines = 12, 3
    wrong = np.flatnonzero(result.logits.argmax(1) != result.labels)[: columns // 2]
    # The mistakes come last; the rest of the grid is filled in the order of the data.
    shown = [i for i in range(len(result.images)) if i not in wrong]
    shown = [*shown[: columns * lines - len(wrong)], *wrong]

    figure = Figure(figsize=(10, 7.2), layout="constrained", facecolor="white")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    upper, lower = halves
    accuracy = result.accuracy
    upper.suptitle(
        f"Held-out digits, predictions of the fused network: {accuracy['frozen']:.2%} of "
        f"{accuracy['images']} right, {accuracy['unfused']:.2%} unfused",
        color=ink, fontsize=12,
    )  # fmt: skip
    axes = upper.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, index in zip(axes, shown):
        guess, label = int(result.logits[index].argmax()), int(result.labels[index])
        axis.imshow(result.images[index, 0], cmap="gray_r", vmin=0, vmax=16)
        right = guess == label
        axis.set_title(
            f"{guess}" if right else f"{guess}, is {label}", color=ink if right else orange,
            fontsize=11, fontweight="normal" if right else "bold", pad=2,
        )  # fmt: skip

    left, right = lower.subplots(1, 2)
    values = [result.time[f"{key}_us"] / 1000 for key, _ in RUNS]
    bars = left.barh([label for _, label in RUNS], values, color=[grey, *[blue] * (len(RUNS) - 1)], height=0.6)
    texts = [
        f"{value:.2f} ms" + (f"   {values[0] / value:.2f}×" if i else "")
        for i, value in enumerate(values)
    ]
    left.bar_label(bars, texts, padding=4, color=ink)
    left.invert_yaxis()
    left.set_xlim(0, max(values) * 1.4)
    left.set_xlabel(
        f"ms for a batch of {result.time['batch']}; {result.machine['isa']}, "
        f"{result.machine['threads']} thread{'s' * (result.machine['threads'] != 1)}"
    )
    left.set_title("Median time", fontsize=12, color=ink, loc="left")

    rows = [row for row in result.batch_norms if row.error_before is not None]
    places = np.arange(len(rows))
    eps = float(np.finfo(np.float32).eps)
    for key, colour, legend in (("before", grey, "unfused"), ("after", blue, "fused")):
        errors = [getattr(row, f"error_{key}") / eps for row in rows]
        right.scatter(errors, places, color=colour, s=36, label=legend, clip_on=False, zorder=3)
    right.set_yticks(places, [row.name for row in rows])
    right.invert_yaxis()
    right.set_xlim(left=0)
    right.set_xlabel("largest error against float64, by largest output\n(in float32 eps, 1.2e-7)")
    right.set_title("Error of each fused layer", fontsize=12, color=ink, loc="left")
    right.grid(axis="y", color="#e6e6e6")
    right.set_axisbelow(True)
    right.legend(
        frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.98),
        handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
