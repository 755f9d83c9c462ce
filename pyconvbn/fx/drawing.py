# SPDX-License-Identifier: BSD-3-Clause
"""Graphs as pictures: SVG by our own layout, and text for graphviz.

A chain of single uses such as convolution, BatchNorm, ReLU is drawn as one stack. Parameters
(get_attr nodes) are not boxes; the tooltip of the node that reads them names them.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ._describe import describe, owning_module, safe_text, shape_text
from ._layout import Drawn, assign_layers, place

__all__ = ["Picture", "draw", "draw_before_after", "graph_html", "to_dot"]

#: A larger graph is drawn up to this many nodes, with a note that says so.
MAX_NODES = 300

_ROW, _PAD, _STEP = 24.0, 9.0, 3.0  # height of a box, its side margin, gap inside a stack
_MIN_WIDTH, _MAX_TITLE, _MAX_WHERE = 96.0, 44, 28
_MARGIN, _HEADER, _BETWEEN = 16.0, 46.0, 48.0

# kind -> (fill, stroke) on light and on dark ground
_COLOURS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "conv": (("#ddf0ff", "#58a6f0"), ("#10304f", "#3d82c4")),
    "bn": (("#f1e8fd", "#b48ae0"), ("#2f2148", "#8f68c9")),
    "fused": (("#d9f5df", "#3fae5a"), ("#11381f", "#34934c")),
    "kept": (("#fff1c2", "#d19a0d"), ("#453205", "#c08f17")),
    "act": (("#f4f5f7", "#c3c9d1"), ("#20262e", "#4b545f")),
    "pool": (("#dcf5f2", "#4bb3a7"), ("#0f3733", "#36877d")),
    "join": (("#fdebdf", "#e08f5c"), ("#42260f", "#b06f3f")),
    "io": (("#e3e7ec", "#7c8691"), ("#30363e", "#86909b")),
    "other": (("#ffffff", "#a8b0ba"), ("#161b21", "#5c6672")),
}
# class -> (property, light, dark)
_INKS = {
    "bg": ("fill", "#ffffff", "#0f1318"),
    "ink": ("fill", "#1d232a", "#e4e9ee"),
    "dim": ("fill", "#5d6772", "#98a3ae"),
    "edge": ("stroke", "#8e98a3", "#717c88"),
    "head": ("fill", "#8e98a3", "#717c88"),
    "halo": ("stroke", "#ffffff", "#0f1318"),
    "pair": ("stroke", "#2c9a48", "#3fae5a"),
}


def _style() -> str:
    def rules(ground: int, prefix: str) -> str:
        boxes = (
            f"{prefix} .cbn-{kind}{{fill:{pair[ground][0]};stroke:{pair[ground][1]}}}"
            for kind, pair in _COLOURS.items()
        )
        inks = (f"{prefix} .cbn-{name}{{{ink[0]}:{ink[1 + ground]}}}" for name, ink in _INKS.items())
        return "".join((*boxes, *inks))

    return (
        ".cbn-graph{font:12px/1 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
        ".cbn-graph .cbn-edge{fill:none;stroke-width:1.4}.cbn-graph .cbn-pair{fill:none;stroke-width:1.5}"
        ".cbn-graph .cbn-small{font-size:10.5px}.cbn-graph .cbn-big{font-size:14px;font-weight:600}"
        ".cbn-graph .cbn-title{font-weight:500}.cbn-graph .cbn-halo{paint-order:stroke;stroke-width:3}"
        + rules(0, ".cbn-graph")
        + "@media (prefers-color-scheme:dark){"
        + rules(1, ".cbn-graph")
        + "}"
    )


# -- text ----------------------------------------------------------------------------------------


def _char_width(char: str) -> float:
    if char in " .,:;|!'ijlIft()[]":
        return 0.36
    if char in "mwMW@%—…+→":
        return 0.9
    return 1.0 if ord(char) > 0x2E80 else 0.7 if char.isupper() else 0.625


def _width(text: str, size: float) -> float:
    """Width of `text` in a sans-serif face: a bit generous, since the face is the viewer's."""
    return size * sum(map(_char_width, text))


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _text(x: float, y: float, text: str, classes: str, anchor: str = "") -> str:
    where = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}"{where}>{_escape(text)}</text>'


class Picture(str):
    """SVG as text; a notebook shows the picture."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return f'<div style="overflow:auto;max-height:90em">{self}</div>'


# -- what is drawn -------------------------------------------------------------------------------


@dataclass
class _Row:
    """One node as one box."""

    node: Any
    kind: str
    title: str
    where: str
    tip: str
    follows: bool  # may stand directly below what it reads
    pair: bool = False  # belongs together with the next row: one convolution does both


@dataclass
class _Stack:
    """Nodes drawn directly below each other; edges enter at the first and leave at the last."""

    rows: list[_Row] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)

    def size(self) -> tuple[float, float]:
        widest = max(_row_width(row) for row in self.rows)
        return max(widest, _MIN_WIDTH), len(self.rows) * (_ROW + _STEP) - _STEP


def _row_width(row: _Row) -> float:
    width = 2 * _PAD + _width(row.title, 12)
    return width + (14 + _width(row.where, 10.5) if row.where else 0)


@dataclass
class _Scene:
    stacks: list[_Stack]
    edges: list[tuple[int, int]]
    stack_of: dict[str, int]  # by node name
    nodes: int
    norms: int
    left_out: int


def _graph_and_root(graph: Any) -> tuple[Any, Any]:
    """The Graph of a GraphModule and the module, or the Graph itself and its owner; else `TypeError`."""
    inner = getattr(graph, "graph", graph)
    if not hasattr(inner, "nodes"):
        raise TypeError(f"graph: expected a Graph or a GraphModule, got {type(graph).__name__}")
    return inner, owning_module(graph) if inner is graph else graph


def _report_rows(report: Any) -> dict[str, Any]:
    """Rows of a FoldReport by the name of their BatchNorm node."""
    return {} if report is None else {row.node: row for row in report.rows}


def _tip(node: Any, params: Sequence[str]) -> str:
    lines = [f"{safe_text(node.name, 80)}: {node.op} {safe_text(node.target, 120)}"]
    shape = shape_text(node)
    if shape:
        lines.append(f"shape {shape}")
    if params:
        lines.append("reads " + ", ".join(params))
    return "\n".join(lines)


def _scene(graph: Any, root: Any, report: Any) -> _Scene:
    """Stacks and edges of a graph, parameters left out; `root` is the module its targets belong to."""
    rows = _report_rows(report)
    scene = _Scene([], [], {}, 0, 0, 0)
    order: dict[Any, int] = {}
    names = {node.name for node in graph.nodes}
    absorbed = {row.new_node for row in rows.values() if row.new_node and row.node not in names}
    for node in islice(graph.nodes, MAX_NODES):
        scene.nodes += 1
        about = describe(node, root)
        kind, title, where = about
        if kind == "param":
            continue
        inputs = [used for used in node.all_input_nodes if used.op != "get_attr"]
        params = [safe_text(used.target, 60) for used in node.all_input_nodes if used.op == "get_attr"]
        title, where = _shorten(title, _MAX_TITLE), "" if where == title else _shorten(where, _MAX_WHERE)
        row = _Row(node, kind, title, where, _tip(node, params), kind in ("bn", "act"))
        report_row = rows.get(node.name)
        if kind == "bn":
            scene.norms += 1
            if report_row is not None and report_row.outcome == "kept":
                row.kind, row.title = "kept", f"{title} · {safe_text(report_row.reason, 40)}"
                row.tip += f"\nkept: {safe_text(report_row.reason, 40)} - {safe_text(report_row.hint, 200)}"
            elif report_row is not None:
                row.kind = "fused"
        elif node.name in absorbed:
            row.kind = "fused"
            if "+" not in row.title:
                row.title = f"{row.title} + BN"
        place_at = _join(scene, row, inputs)
        if place_at is None:
            place_at = len(scene.stacks)
            scene.stacks.append(_Stack())
            scene.stacks[-1].inputs = sorted({order[used] for used in inputs if used in order})
            scene.edges += [(source, place_at) for source in scene.stacks[-1].inputs]
        stack = scene.stacks[place_at].rows
        if kind == "bn" and row.kind == "fused" and stack and stack[-1].kind == "conv":
            stack[-1].pair, stack[-1].kind = True, "fused"
        stack.append(row)
        order[node] = place_at
        scene.stack_of[node.name] = place_at
    scene.left_out = max(0, len(graph.nodes) - scene.nodes)
    return scene


def _join(scene: _Scene, row: _Row, inputs: list[Any]) -> int | None:
    """The stack that `row` continues: its only input ends it and has no other reader."""
    if not row.follows or len(inputs) != 1:
        return None
    (used,) = inputs
    place_at = scene.stack_of.get(used.name)
    if place_at is None or used.op == "placeholder" or len(used.users) != 1:
        return None
    last = scene.stacks[place_at].rows[-1]
    return place_at if last.node is used else None


# -- drawing -------------------------------------------------------------------------------------


def _arrange(scenes: Sequence[_Scene], aliases: Mapping[str, str]) -> list[Drawn]:
    """Places scenes so that what they have in common stands at the same height."""
    first = scenes[0]
    layers = [assign_layers(len(first.stacks), first.edges)]
    for scene in scenes[1:]:
        at_least: dict[int, int] = {}
        for name, stack in scene.stack_of.items():
            twin = first.stack_of.get(name, first.stack_of.get(aliases.get(name, "")))
            if twin is not None:
                at_least[stack] = max(at_least.get(stack, 0), layers[0][twin])
        layers.append(assign_layers(len(scene.stacks), scene.edges, at_least))
    heights = [0.0] * (1 + max((max(row, default=-1) for row in layers), default=-1))
    sizes = [[stack.size() for stack in scene.stacks] for scene in scenes]
    for numbers, boxes in zip(layers, sizes):
        for layer, (_, height) in zip(numbers, boxes):
            heights[layer] = max(heights[layer], height)
    shapes = any(shape_text(stack.rows[-1].node) for scene in scenes for stack in scene.stacks)
    gap = 34.0 if shapes else 24.0
    return [
        place(boxes, scene.edges, numbers, heights, layer_gap=gap)
        for scene, numbers, boxes in zip(scenes, layers, sizes)
    ]


def _edge_path(points: Sequence[tuple[float, float]]) -> str:
    (x, y), *others = points
    parts = [f"M{x:.1f} {y:.1f}"]
    for index, (nx, ny) in enumerate(others):
        if index % 2 == 0 or abs(nx - x) < 0.5:
            parts.append(f"L{nx:.1f} {ny:.1f}")
        else:
            middle = (y + ny) / 2
            parts.append(f"C{x:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {ny:.1f}")
        x, y = nx, ny
    return "".join(parts)


def _box(row: _Row, x: float, y: float, width: float) -> str:
    baseline = y + _ROW / 2 + 4
    parts = [
        f"<g><title>{_escape(row.tip)}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_ROW:.0f}" rx="6" class="cbn-{row.kind}"/>'
    ]
    if row.where:
        parts.append(_text(x + _PAD, baseline, row.title, "cbn-ink cbn-title"))
        parts.append(_text(x + width - _PAD, baseline, row.where, "cbn-dim cbn-small", "end"))
    else:
        parts.append(_text(x + width / 2, baseline, row.title, "cbn-ink cbn-title", "middle"))
    return "".join([*parts, "</g>"])


def _draw_scene(scene: _Scene, drawn: Drawn, left: float, top: float) -> list[str]:
    out, labels = [], []
    labelled: set[int] = set()
    for (source, _), path in zip(scene.edges, drawn.paths):
        points = [(left + x, top + y) for x, y in path]
        end_x, end_y = points[-1]
        points[-1] = (end_x, end_y - 5)
        out.append(f'<path d="{_edge_path(points)}" class="cbn-edge"/>')
        arrow = f"M{end_x - 4:.1f} {end_y - 7:.1f}h8l-4 6.5z"
        out.append(f'<path d="{arrow}" class="cbn-head"/>')
        shape = shape_text(scene.stacks[source].rows[-1].node)
        if shape and source not in labelled:
            labelled.add(source)
            x, y = points[0][0], points[0][1] + 13
            aside = (x - 6, "end") if points[2][0] > x + 1 else (x + 6, "")
            labels.append(_text(aside[0], y, shape, "cbn-dim cbn-small cbn-halo", aside[1]))
    out += labels
    for stack, centre, y in zip(scene.stacks, drawn.x, drawn.y):
        width, _ = stack.size()
        x, y = left + centre - width / 2, top + y
        for row in stack.rows:
            out.append(_box(row, x, y, width))
            if row.pair:
                out.append(
                    f'<rect x="{x - 2.5:.1f}" y="{y - 2.5:.1f}" width="{width + 5:.1f}" '
                    f'height="{2 * _ROW + _STEP + 5:.0f}" rx="8" class="cbn-pair"/>'
                )
            y += _ROW + _STEP
    return out


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _summary(scene: _Scene) -> str:
    text = f"{_count(scene.nodes + scene.left_out, 'node')}, {_count(scene.norms, 'BatchNorm')}"
    return f"first {scene.nodes} of {text}" if scene.left_out else text


def _svg(graphs: Sequence[Any], names: Sequence[str], report: Any, title: str | None) -> Picture:
    scenes = [_scene(*_graph_and_root(graph), report) for graph in graphs]
    aliases = {row.new_node: row.node for row in _report_rows(report).values() if row.new_node}
    drawings = _arrange(scenes, aliases)
    top = _MARGIN + _HEADER + (24 if title else 0)
    left, body, spoken = _MARGIN, [], []
    for name, scene, drawn in zip(names, scenes, drawings):
        summary = _summary(scene)
        spoken.append(f"{name}: {summary}")
        room = max(drawn.width, _width(name, 14), _width(summary, 10.5))
        shift = left + (room - drawn.width) / 2
        body.append(_text(left + room / 2, top - 28, name, "cbn-ink cbn-big", "middle"))
        body.append(_text(left + room / 2, top - 12, summary, "cbn-dim cbn-small", "middle"))
        body += _draw_scene(scene, drawn, shift, top)
        if scene.left_out:
            note = f"… {_count(scene.left_out, 'more node')}: print_tabular() shows all"
            body.append(_text(left, top + drawn.height + 22, note, "cbn-dim"))
            room = max(room, _width(note, 12))
        left += room + _BETWEEN
    width = left - _BETWEEN + _MARGIN
    height = top + max(drawn.height for drawn in drawings) + _MARGIN + (22 if any(s.left_out for s in scenes) else 0)
    if title:
        title = safe_text(title, 120)
        width = max(width, 2 * _MARGIN + _width(title, 14))
        body.insert(0, _text(_MARGIN, _MARGIN + 14, title, "cbn-ink cbn-big"))
    about = _escape(title or "graph")
    return Picture(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="cbn-graph" role="img" aria-label="{about}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:100%;height:auto"><title>{about}</title><desc>{_escape("; ".join(spoken))}</desc>'
        f'<style>{_style()}</style><rect width="100%" height="100%" rx="8" class="cbn-bg"/>{"".join(body)}</svg>'
    )


def draw(graph: Any, *, report: Any = None, title: str | None = None) -> Picture:
    """A Graph or GraphModule as an SVG picture: text that starts with ``<svg``, shown as a picture in a notebook.

    With a FoldReport, BatchNorms that stay are amber and say why. Shapes stand at the edges once
    `fx.shape_prop` has run. A graph of more than 300 nodes is drawn in part, with a note.
    Raises `TypeError` for anything but a graph.

    >>> from pyconvbn import fx, nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    >>> fx.draw(gm).startswith("<svg")
    True
    """
    return _svg([graph], [_name_of(graph)], report, title)


def draw_before_after(before: Any, after: Any, report: Any = None, *, title: str | None = None) -> Picture:
    """Two graphs side by side as one SVG picture, common nodes at the same height.

    `report` is the FoldReport of the pass between them: it colours, in `before`, what was fused
    and what was kept and why. Raises `TypeError` for anything but graphs.

    >>> import pyconvbn
    >>> from pyconvbn import fx, nn
    >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())
    >>> folded, report = pyconvbn.fold(gm)
    >>> picture = fx.draw_before_after(gm, folded, report)
    >>> "4 nodes, 1 BatchNorm" in picture and "3 nodes, 0 BatchNorms" in picture
    True
    """
    return _svg([before, after], ["before", "after"], report, title)


def _name_of(graph: Any) -> str:
    root = _graph_and_root(graph)[1]
    return "graph" if root is None else safe_text(getattr(root, "class_name", type(root).__name__), 60)


def graph_html(graph: Any) -> str:
    """What a notebook shows for a Graph or GraphModule: the picture in a scrollable frame."""
    return draw(graph)._repr_html_()


# -- graphviz ------------------------------------------------------------------------------------


def _dot_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def to_dot(graph: Any, *, report: Any = None) -> str:
    """The whole graph, parameters included, in graphviz's language.

    Raises `TypeError` for anything but a graph.

    >>> from pyconvbn import fx, nn
    >>> print(fx.to_dot(fx.symbolic_trace(nn.ReLU())).splitlines()[-2])
      n1 -> n2;
    """
    inner, root = _graph_and_root(graph)
    rows = _report_rows(report)
    lines = [
        "digraph {",
        '  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=11];',
    ]
    nodes = list(inner.nodes)
    ids = {node: f"n{index}" for index, node in enumerate(nodes)}
    for node in nodes:
        kind, title, where = describe(node, root)
        row = rows.get(node.name)
        if row is not None:
            kind = "kept" if row.outcome == "kept" else "fused"
        reason = "" if row is None or row.outcome != "kept" else safe_text(row.reason, 40)
        text = "\n".join(part for part in (title, where, reason) if part)
        fill, stroke = _COLOURS.get(kind, _COLOURS["other"])[0]
        lines.append(f'  {ids[node]} [label={_dot_string(text)}, fillcolor="{fill}", color="{stroke}"];')
        for used in node.all_input_nodes:
            shape = shape_text(used)
            label = f" [label={_dot_string(shape)}]" if shape else ""
            lines.append(f"  {ids.get(used, 'foreign')} -> {ids[node]}{label};")
    return "\n".join([*lines, "}"]) + "\n"
