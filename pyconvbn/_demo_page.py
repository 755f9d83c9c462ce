# SPDX-License-Identifier: BSD-3-Clause
"""``pyconvbn demo --html``: the demo as a notebook, each cell run and shown with what it gave."""

from __future__ import annotations

import ast
import html
import io
import keyword
import pathlib
import tokenize
from typing import Any

from ._demo_measure import DemoResult
from ._demo_view import RUNS, duration

__all__ = ["CELLS", "demo_page", "write_page"]

#: What a reader would type. The text of a cell is run as it stands.
CELLS = (
    """\
import pyconvbn
from pyconvbn import demo, fx

net, images, labels = demo.load_demo()        # a digits network with ten BatchNorms, and images it has not seen""",
    """\
graph = fx.symbolic_trace(net)
fx.shape_prop(graph, images.shape)
folded, report = pyconvbn.fold(graph)
fx.draw_before_after(graph, folded, report)""",
    "report",
    "pyconvbn.verify(graph, folded, images)",
    """\
frozen, inputs = pyconvbn.freeze(graph, images)  # each layer a prepared operator
frozen""",
    "frozen.report",
    """\
right = [(form(images).argmax(1) == labels).mean() for form in (net, folded, frozen)]
f"{right[0]:.2%} right before, {right[1]:.2%} folded, {right[2]:.2%} frozen" """.rstrip(),
)

_CSS = """
:root{--ground:#fff;--ink:#1d232a;--dim:#5d6772;--cell:#f5f6f8;--line:#dfe3e8;--key:#8250df;--text:#0a3069;
--bar:#58a6f0}
@media (prefers-color-scheme:dark){:root{--ground:#0f1318;--ink:#e4e9ee;--dim:#98a3ae;--cell:#181d24;--line:#2c333b;
--key:#d2a8ff;--text:#a5d6ff;--bar:#3d82c4}}
:root{color-scheme:light dark}
body{margin:24px auto;max-width:1180px;padding:0 20px;background:var(--ground);color:var(--ink);
font:14px/1.45 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
h1{font-size:22px;margin:0}p{margin:4px 0 18px;color:var(--dim)}
.cell{display:grid;grid-template-columns:58px 1fr;gap:4px 8px;margin-bottom:16px}
.cell>span{color:var(--dim);font:12px/20px ui-monospace,Menlo,'DejaVu Sans Mono',monospace;text-align:right;
padding-top:8px}
pre{margin:0;padding:8px 12px;background:var(--cell);border:1px solid var(--line);border-radius:6px;overflow:auto;
font:13px/20px ui-monospace,Menlo,'DejaVu Sans Mono',monospace}
.out{padding:6px 2px;overflow:auto}.k{color:var(--key)}.s{color:var(--text)}.c{color:var(--dim)}
table{font-size:13px;border-collapse:collapse}
.bar{display:inline-block;height:10px;border-radius:3px;background:var(--bar);vertical-align:middle}
td,th{padding:2px 12px 2px 0;text-align:left}
"""


def _coloured(source: str) -> str:
    """Python source as HTML: keywords, strings and comments marked."""
    out, line, column = [], 1, 0
    rows = source.splitlines(keepends=True)

    def take(until: tuple[int, int]) -> str:
        nonlocal line, column
        taken = []
        while line < until[0]:
            taken.append(rows[line - 1][column:])
            line, column = line + 1, 0
        if line <= len(rows):
            taken.append(rows[line - 1][column : until[1]])
        column = until[1]
        return "".join(taken)

    text = {tokenize.STRING, getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)}
    text.add(getattr(tokenize, "FSTRING_MIDDLE", -1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        out.append(html.escape(take(token.start)))
        kind = "s" if token.type in text else "c" if token.type == tokenize.COMMENT else ""
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            kind = "k"
        piece = html.escape(take(token.end))
        out.append(f'<span class="{kind}">{piece}</span>' if kind else piece)
    return "".join(out).rstrip("\n")


def _run(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell; the value of its last line if that is an expression, else None."""
    tree = ast.parse(source)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, "<cell>", "exec"), names)
        return None
    tree.body.pop()
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def _shown(value: Any) -> str:
    if hasattr(value, "_repr_html_"):
        text: str = value._repr_html_()
        return text
    return f"<code>{html.escape(repr(value))}</code>"


def _times(result: DemoResult) -> str:
    slowest = max(result.time[f"{key}_us"] for key, _ in RUNS)
    rows = []
    for key, label in RUNS:
        value = result.time[f"{key}_us"]
        speed = f"{result.time['unfused_us'] / value:.2f}×"
        bar = f'<span class="bar" style="width:{260 * value / slowest:.0f}px"></span>'
        cells = (label, duration(value), speed, f"{result.accuracy[key]:.2%}", f"{result.error[key]:.1e}")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells) + f"<td>{bar}</td>")
    head = "".join(f"<th>{name}</th>" for name in ("", "time", "speed", "right", "error", ""))
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def demo_page(result: DemoResult) -> str:
    """The demo as one HTML page without scripts; the cells are run now, the times are those of `result`."""
    names: dict[str, Any] = {}
    body = []
    for number, source in enumerate(CELLS, 1):
        value = _run(source, names)
        output = "" if value is None else f'<span>[{number}]:</span><div class="out">{_shown(value)}</div>'
        body.append(f'<div class="cell"><span>[{number}]:</span><pre>{_coloured(source)}</pre>{output}</div>')
    machine = result.machine
    note = html.escape(
        f"A batch of {result.time['batch']} images, median of {result.time['rounds']} rounds: {machine['cpu']}, "
        f"{machine['isa']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}. Error: the largest, against "
        f"float64 NumPy, relative to the largest logit."
    )
    body.append(f'<div class="cell"><span></span><div class="out">{_times(result)}<p>{note}</p></div></div>')
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>pyconvbn demo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head><body>'
        f"<h1>pyconvbn {html.escape(machine['pyconvbn'])}</h1>"
        f"<p>Which BatchNorms can be folded, what stays, and is it right?</p>{''.join(body)}</body></html>\n"
    )


def write_page(result: DemoResult, path: pathlib.Path) -> None:
    """Writes `demo_page`; `OSError` if that is not possible."""
    path.write_text(demo_page(result), encoding="utf-8")
