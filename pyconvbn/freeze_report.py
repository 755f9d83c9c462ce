# SPDX-License-Identifier: BSD-3-Clause
"""FreezeReport: what freezing did to each node that it looked at, and why it left the others."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from . import _core
from .report import FoldReport, FoldRow, rows_of

__all__ = ["REASONS", "STEPS", "FreezeReport", "FreezeRow", "merge_folds"]

#: Reason code -> hint.
REASONS: dict[str, str] = dict(_core.freeze_reasons())

#: The steps of freezing by name, in order.
STEPS: tuple[str, ...] = _core.freeze_steps()

#: For `explain`: what a step does to a node.
_DONE: dict[str, str] = {
    "lower": "the call of a module became an operator that reads the parameters",
    "view": "view became reshape, which takes every memory layout",
    "parameter": "the parameter became a constant",
    "cse": "it computed what another node computes too, and was merged with it",
    "constant": "it was computed now, once, and became a constant",
    "binary": "the arithmetic was folded into the weight and bias of a layer",
    "matmul": "products of one input became one product",
    "weight_layout": "the weight is stored channels-last",
    "input_layout": "the input keeps the strides for which its reader was written",
    "output_layout": "the output keeps the strides that it had",
    "dead": "nobody needed it, so it was removed",
    "plan": "it became a prepared operator, its algorithm chosen and its weights packed",
    "discard": "its memory was given back",
}

_SHOWN = 20  # kept nodes that a printed report lists
_CELL = "padding:2px 12px 2px 0;text-align:left;border-bottom:1px solid rgba(128,128,128,.25)"
_PLAIN = "background:transparent"


class FreezeRow(NamedTuple):
    """What one step did to one node.

    Attributes:
        step: one of `STEPS`.
        node: name of the node before the step.
        outcome: "done" or "kept".
        reason: "OK", or the code of the first reason to leave the node as it is (the keys of `REASONS`).
        blocking: the node that stands in the way; None if it is the node itself.
        hint: what to do about it; empty when all is well.
        into: what the node is now: the node it was merged or folded into, the name of its constant; None: itself.
    """

    step: str
    node: str
    outcome: Literal["done", "kept"]
    reason: str
    blocking: str | None = None
    hint: str = ""
    into: str | None = None


_core.freeze_row_class(FreezeRow)


class FreezeReport(Sequence[FreezeRow]):
    """What freezing did: a row for each node that a step changed, or might have been expected to change.

    Args:
        rows: the rows, in the order of the steps: FreezeRows, or tuples of their fields.
        folds: one row for each BatchNorm of the graph.

    `print(report)` sums it up, a notebook shows tables; `explain(node)` tells the story of one node. Pickled and copied
    as its arguments.

    >>> from pyconvbn.freeze_report import FreezeReport, FreezeRow
    >>> from pyconvbn.report import FoldReport, FoldRow
    >>> folds = FoldReport([FoldRow("bn", "bn", "folded", "OK", new_node="conv", conv="conv")])
    >>> report = FreezeReport([FreezeRow("cse", "add_1", "done", "OK", into="add"),
    ...                        FreezeRow("constant", "rand", "kept", "RANDOM")], folds)
    >>> print(report)
    step      done  kept
    cse          1     0
    constant     0     1
    BatchNorm  convolution  outcome  reason  note
    bn         conv         folded   OK      now conv
    1 BatchNorm: 1 folded
    kept RANDOM (1): it gives another value at each call
      constant  rand
    >>> report.ok, report.counts["cse"], len(report)
    (True, {'done': 1, 'kept': 0}, 2)
    """

    __slots__ = ("_folds", "_made", "_rows")

    # Making 100,000 rows takes longer than the steps: they wait as the plain tuples that the C code gave.
    _rows: tuple[tuple[Any, ...], ...]
    _made: bool

    def __init__(self, rows: Iterable[FreezeRow | tuple[Any, ...]] = (), folds: FoldReport | None = None) -> None:
        if folds is not None and not isinstance(folds, FoldReport):
            raise TypeError(f"folds: expected a FoldReport, got {type(folds).__name__}")
        self._rows = tuple(rows)
        self._made = False
        self._folds = FoldReport() if folds is None else folds

    @property
    def rows(self) -> tuple[FreezeRow, ...]:
        """The rows, in the order in which they came to be."""
        if not self._made:
            self._rows = tuple([row if type(row) is FreezeRow else FreezeRow(*row) for row in self._rows])
            self._made = True
        return self._rows  # type: ignore[return-value]

    @property
    def folds(self) -> FoldReport:
        """What became of each BatchNorm of the graph."""
        return self._folds

    # -- as a sequence -------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[FreezeRow]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreezeReport) and self.rows == other.rows and self.folds == other.folds

    def __hash__(self) -> int:
        return hash((self.rows, self._folds))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows, self._folds)

    # -- sums ----------------------------------------------------------------------------------------------------------
    @property
    def ok(self) -> bool:
        """Whether no BatchNorm was kept."""
        return self._folds.ok

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Step -> how many rows are "done" and "kept"; steps without rows are not in it."""
        found = Counter([row[0::2][:2] for row in self._rows])
        steps = {step for step, _ in found}
        ordered = [step for step in STEPS if step in steps] + sorted(steps.difference(STEPS))
        return {step: {how: found[step, how] for how in ("done", "kept")} for step in ordered}

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows have each reason code."""
        return dict(Counter([row[3] for row in self._rows]))

    def by_step(self, name: str) -> list[FreezeRow]:
        """The rows of one step.

        Raises:
            ValueError: there is no step of that name.
        """
        if name not in STEPS:
            raise ValueError(f"name: expected one of {', '.join(STEPS)}, got {name!r}")
        return [row for row in self.rows if row.step == name]

    def _kept(self) -> dict[str, list[FreezeRow]]:
        found: dict[str, list[FreezeRow]] = {}
        for row in self.rows:
            if row.outcome == "kept":
                found.setdefault(row.reason, []).append(row)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    # -- text ----------------------------------------------------------------------------------------------------------
    @staticmethod
    def _why(row: FreezeRow) -> str:
        own = row.hint if row.hint != REASONS.get(row.reason) else ""
        return "; ".join(part for part in (f"because of {row.blocking}" if row.blocking else "", own) if part)

    def _listed(self) -> Iterator[tuple[str, int, list[tuple[str, str, str]], int]]:
        """(heading, how many, rows to show, how many not shown) of each reason to keep."""
        kept = self._kept()
        room = max(3, _SHOWN // max(1, len(kept)))
        for reason, rows in kept.items():
            hint = REASONS.get(reason, "")
            heading = f"kept {reason} ({len(rows)})" + (f": {hint}" if hint else "")
            shown = rows if len(rows) <= room + 1 else rows[:room]
            cells = [(row.step, row.node, self._why(row)) for row in shown]
            yield heading, len(rows), cells, len(rows) - len(shown)

    def __str__(self) -> str:
        counts = self.counts
        wide = max(map(len, ("step", *counts)))
        lines = [f"{'step':<{wide}}  done  kept"]
        lines += [f"{step:<{wide}}  {n['done']:>4}  {n['kept']:>4}" for step, n in counts.items()]
        if not counts:
            lines = ["no step had anything to do"]
        lines.append(str(self._folds))
        for heading, _, cells, more in self._listed():
            lines.append(heading)
            widths = [max(len(row[i]) for row in cells) for i in (0, 1)]
            lines += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {why}".rstrip() for a, b, why in cells]
            if more:
                lines.append(f"  ... and {more} more")
        return "\n".join(lines)

    def _summary(self) -> str:
        done = sum(n["done"] for n in self.counts.values())
        return f"{done} done, {len(self) - done} kept; {self._folds._summary()}"

    def __repr__(self) -> str:
        return f"<FreezeReport: {self._summary()}>"

    def _repr_html_(self) -> str:
        def table(head: Sequence[str], body: Iterable[Sequence[str]], title: str) -> str:
            top = "".join(f"<th style='{_CELL}'>{html.escape(name)}</th>" for name in head)
            rows = "".join(
                f"<tr style='{_PLAIN}'>" + "".join(f"<td style='{_CELL}'>{html.escape(c)}</td>" for c in row) + "</tr>"
                for row in body
            )
            return (
                f"{html.escape(title)}<table style='border-collapse:collapse;color:inherit;margin:0 0 8px 0;{_PLAIN}'>"
                f"<thead><tr style='{_PLAIN}'>{top}</tr></thead><tbody>{rows}</tbody></table>"
            )

        steps = [(step, str(n["done"]), str(n["kept"])) for step, n in self.counts.items()]
        parts = [table(("step", "done", "kept"), steps, self._summary()), self._folds._repr_html_()]
        for heading, _, cells, more in self._listed():
            rows = [*cells, ("", f"... and {more} more", "")] if more else cells
            inner = table(("step", "node", "note"), rows, "")
            parts.append(f"<details><summary style='cursor:pointer'>{html.escape(heading)}</summary>{inner}</details>")
        return f"<div style='color:inherit;{_PLAIN}'>{''.join(parts)}</div>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers, fit for `json.dump`."""
        return {
            "ok": self.ok, "counts": self.counts, "reasons": self.reasons, "folds": self._folds.to_dict(),
            "rows": [row._asdict() for row in self.rows],
        }

    @classmethod
    def _from_dict(cls, found: Any) -> FreezeReport:
        """What `to_dict` gave; ValueError if this is something else."""
        rows = rows_of(found, FreezeRow, "FreezeReport")
        return cls(rows, FoldReport._from_dict(found.get("folds")))

    # -- the story of one node -----------------------------------------------------------------------------------------
    def explain(self, node_name: str) -> str:
        """In sentences, what each step did to a node, and what became of the node that it was merged into.

        Args:
            node_name: name of a node before freezing or after a step; of a BatchNorm its module's path too.

        Raises:
            KeyError: no row is about that name; the message lists those there are.

        >>> from pyconvbn.freeze_report import FreezeReport, FreezeRow
        >>> rows = [FreezeRow("lower", "fc", "done", "OK"), FreezeRow("cse", "fc", "done", "OK", into="fc_1")]
        >>> print(FreezeReport(rows).explain("fc"))
        fc:
          lower: the call of a module became an operator that reads the parameters.
          cse: it computed what another node computes too, and was merged with it. It is fc_1 now.
        """
        rows = self.rows
        about: dict[str, list[FreezeRow]] = {}
        for row in rows:
            about.setdefault(row.node, []).append(row)
        paragraphs: list[str] = []
        name: str | None = node_name
        told: set[str] = set()
        while name is not None and name not in told:
            told.add(name)
            following = about.get(name, [])
            if following:
                paragraphs.append("\n".join([f"{name}:", *(f"  {self._sentence(row)}" for row in following)]))
            moved = [row.into for row in following if row.outcome == "done" and row.into is not None]
            name = moved[-1] if moved else None
        made_of = [row.node for row in rows if row.into == node_name and row.node != node_name]
        if made_of:
            paragraphs.append(f"{node_name} stands for {_cut(made_of)} too.")
        for fold in self._folds:
            if node_name in (fold.node, fold.target):
                paragraphs.append(FoldReport._sentences(fold))
        if not paragraphs:
            known = dict.fromkeys([*about, *(fold.node for fold in self._folds)])
            raise KeyError(f"node_name: no row about {node_name!r} in this report, which has: {_cut([*known], 40)}")
        return "\n".join(paragraphs)

    @staticmethod
    def _sentence(row: FreezeRow) -> str:
        if row.outcome == "done":
            now = f" It is {row.into} now." if row.into is not None and row.into != row.node else ""
            return f"{row.step}: {_DONE.get(row.step, 'done')}.{now}"
        parts = [f"{row.step}: it was left as it is, {row.reason}."]
        why = row.hint or REASONS.get(row.reason, "")
        if why:
            parts.append(f"{why[0].upper()}{why[1:]}.")
        if row.blocking:
            parts.append(f"The node in the way is {row.blocking}.")
        return " ".join(parts)


def _cut(names: list[str], room: int = _SHOWN) -> str:
    text = ", ".join(names[:room]) or "none"
    return f"{text}, ... and {len(names) - room} more" if len(names) > room else text


_GONE = frozenset({"cse", "constant", "dead"})
_NEW_NODE = [field.name for field in fields(FoldRow)].index("new_node")


def merge_folds(before: FoldReport, after: FoldReport, rows: list[FreezeRow]) -> FoldReport:
    """One row for each BatchNorm that a graph had, from what the single steps said.

    Args:
        before: the BatchNorms of the graph before the first step.
        after: what folding said of those that were left then.
        rows: what all steps did.

    Returns:
        The rows of `before` in order, then those that only `after` has. What a step merged, computed or dropped is
        "removed", with the node that gives the value; what folding kept and a plan took over is "planned".
    """
    # Tuples throughout, in the order of the fields: making a FoldRow takes longer than folding.
    made = [row for row in rows if row[2] == "done"]
    went = {row[1]: row for row in made if row[0] in _GONE}
    plans = {row[1]: row for row in made if row[0] == "plan"}
    folded = {row[0]: row for row in after._tuples()}

    def gives(name: str | None) -> str | None:
        """The node that has the value of `name` in the end."""
        seen: set[str] = set()
        while name is not None and name not in seen:
            seen.add(name)
            if name in went:
                name = went[name].into
            elif name in folded and folded[name][_NEW_NODE] is not None:
                name = folded[name][_NEW_NODE]
            elif name in plans and plans[name].into is not None:
                name = plans[name].into
            else:
                break
        return name

    def merged(first: tuple[Any, ...]) -> tuple[Any, ...]:
        name = first[0]
        row = folded.get(name)
        if row is None or (row[2] == "kept" and name in went):
            how = went.get(name)
            hint = "the graph does not have it any more"
            if how is not None and how.step == "cse":
                hint = f"it computed the same as {how.into}"
            elif how is not None:
                hint = "its value is a constant" if how.step == "constant" else "nobody used it"
            new_node = gives(name) if how is not None and how.step != "dead" else None
            return (*first[:2], "removed", "OK", None, hint, *first[6:_NEW_NODE], new_node, *first[_NEW_NODE + 1 :])
        outcome, new_node = row[2], row[_NEW_NODE]
        if outcome == "kept" and name in plans:
            outcome, new_node = "planned", plans[name].into or name
        # The module and the form as the user wrote them: lowering made all of them operators.
        target = row[1] if first[1] is None else first[1]
        return (name, target, outcome, *row[3:6], first[6], *row[7:_NEW_NODE], new_node, *row[_NEW_NODE + 1 :])

    known = before._tuples()
    names = {row[0] for row in known}
    new = [row for row in after._tuples() if row[0] not in names]
    return FoldReport._from_core([merged(row) for row in known + new])
