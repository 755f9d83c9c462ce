# SPDX-License-Identifier: BSD-3-Clause
"""FoldReport: what a pass did to each BatchNorm of a graph, and why it left the others."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import _core

__all__ = ["REASONS", "FoldReport", "FoldRow"]

#: Reason code -> what to do about it, in the order in which a pass asks; the first that applies is reported.
REASONS: dict[str, str] = dict(_core.fold_reasons())

#: For `explain`: what each reason means, beyond the hint.
_MEANING: dict[str, str] = {
    "SKIPPED_BY_USER": "The pass was told to leave this BatchNorm alone.",
    "BN_TRAINING": "In training mode a BatchNorm normalises by the statistics of the batch and updates the running "
    "ones, so it is no fixed linear function that a convolution could take over.",
    "NO_RUNNING_STATS": "Without running statistics a BatchNorm normalises by the batch in eval mode too.",
    "UNSUPPORTED_BN_OP": "The call itself is not one that the pass can express as a fused operator.",
    "NOT_CONV": "Only a BatchNorm that directly takes the output of a convolution or linear layer can be merged.",
    "IS_OUTPUT": "The graph also returns the convolution's own output, which would no longer exist.",
    "MULTI_USER": "Somebody else reads the convolution's own output, which would no longer exist.",
    "CONV_TRAINING": "Folding weights that training still changes would freeze them.",
    "CHANNEL_MISMATCH": "The BatchNorm's channels are not the output channels of the convolution, so the scale of one "
    "is not a scale of the other.",
    "LINEAR_ND": "BatchNorm normalises axis 1. A linear layer's features are the last axis, which is axis 1 only in "
    "2-D outputs.",
    "MUTATED_BETWEEN": "The merged operator would read a value before or after somebody writes it: another result.",
    "WEIGHT_SHARED": "The weight belongs to somebody else too and could not be given a copy of its own.",
    "NONCONST_PARAM": "Folding needs all parameters now; efficient_conv_bn_eval, which reads them at each call, not.",
    "DTYPE_MIX": "One convolution takes weight and bias of one float dtype.",
    "OUTPUT_SIZE_ARG": "The transposed convolution's output size is computed while the graph runs.",
    "NONFINITE_FOLD": "A scale weight/sqrt(running_var + eps) is infinite, NaN or beyond the convolution's dtype, "
    "though the unfused pair may still give finite numbers.",
    "PADDED_PRE_BN": "Zero padding after a BatchNorm is not zero before it, so the border would be wrong.",
    "HOOKED": "Calling the module does more than its operator, and merging would drop that.",
    "BN_OUTPUT_UNUSED": "Dead code: passes.dce(gm) removes it.",
}

_DONE = {
    "fused": "fused: convolution and BatchNorm run as one convolution, which reads their parameters at each call",
    "folded": "folded: its scale and shift are part of the convolution's weight and bias now",
    "removed": "removed: the graph does not compute it any more",
    "planned": "prepared on its own: it runs as one multiplication and one addition for each channel",
}

#: Outcomes in the order in which they are counted; colours in the middle of the range, on whatever background there
#: is: readable in light and in dark.
_COLOURS = {"folded": "#2e9e5b", "fused": "#2e9e5b", "removed": "#2e9e5b", "planned": "#4a90d9", "kept": "#d08010"}


@dataclass(frozen=True, slots=True)
class FoldRow:
    """One BatchNorm of a graph.

    Attributes:
        node: name of the BatchNorm node before the pass.
        target: path of its module; None for functional and aten calls.
        outcome: "folded" (into the weights), "fused" (into one call), "kept"; of freezing also "removed" (its value
            is a constant, that of another node, or used by nobody) and "planned" (a prepared scale and shift for each
            channel, an operator of its own).
        reason: "OK", or the code of the first reason to keep it, or not to fold a planned one (the keys of
            `report.REASONS`).
        blocking: the node that stands in the way; None if it is the BatchNorm itself.
        hint: what to do about it; empty when all is well.
        form: "module", "functional" or "aten".
        bytes_saved: memory traffic a call no longer causes (the output written and read once); None: shapes not known.
        flops_saved: a multiplication and an addition for each element of the output; None: shapes not known.
        run_time_rule: a linear layer whose output's rank is not known: it is fused when that is 2, else computed
            unfused and counted in `pyconvbn.counters["efficient_conv_bn_eval_fallback"]`.
        new_node: the node that does the work now, or gives the value; None when kept, or when nothing needs it.
        conv: name of the convolution node; None if its input is not one.
    """

    node: str
    target: str | None
    outcome: Literal["folded", "fused", "kept", "removed", "planned"]
    reason: str
    blocking: str | None = None
    hint: str = ""
    form: Literal["module", "functional", "aten"] = "module"
    bytes_saved: int | None = None
    flops_saved: int | None = None
    run_time_rule: bool = False
    new_node: str | None = None
    conv: str | None = None


def rows_of(found: Any, row_class: Any, what: str) -> list[Any]:
    """The rows of what a `to_dict` gave, each value of the type that the class says; ValueError if not so."""
    hints = get_type_hints(row_class)
    words = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    types = {name: get_args(hint) or (hint,) for name, hint in hints.items() if name not in words}
    rows = found.get("rows") if type(found) is dict else None
    if type(rows) is not list:
        raise ValueError(f"{what}: expected a dict with a list of rows")
    for row in rows:
        if type(row) is not dict or row.keys() != hints.keys():
            raise ValueError(f"{what}: expected rows with the keys {', '.join(hints)}")
        for name, value in row.items():
            if type(value) not in types[name] if name in types else value not in words[name]:
                raise ValueError(f"{what}: {name} of a row is {value!r:.100}")
    return [row_class(**row) for row in rows]


def _amount(value: int | None, unit: str) -> str:
    if value is None:
        return "?"
    size = float(value)
    for prefix in ("", "k", "M", "G", "T"):
        if size < 1000 or prefix == "T":
            return f"{value} {unit}" if not prefix else f"{size:.3g} {prefix}{unit}"
        size /= 1000
    raise AssertionError


class FoldReport(Sequence[FoldRow]):
    """What a pass did to each BatchNorm of a graph: one row for each, in graph order, without exception.

    `print(report)` shows a table, a notebook an HTML one; `explain(name)` says more about one BatchNorm.

    Args:
        rows: the rows.

    Pickled and copied as its rows.

    >>> from pyconvbn.report import FoldReport, FoldRow
    >>> report = FoldReport([FoldRow("bn1", "bn1", "fused", "OK", new_node="efficient_conv_bn_eval", conv="conv1")])
    >>> print(report)
    BatchNorm  convolution  outcome  reason  note
    bn1        conv1        fused    OK      now efficient_conv_bn_eval
    1 BatchNorm: 1 fused
    >>> report.ok, report.counts
    (True, {'fused': 1})
    """

    __slots__ = ("_core_rows", "_rows")

    # Making the rows takes longer than the pass: they wait in the form the C code gave until somebody looks.
    _core_rows: list[tuple[Any, ...]] | None
    _rows: tuple[FoldRow, ...]

    def __init__(self, rows: Iterable[FoldRow] = ()) -> None:
        self._core_rows = None
        self._rows = tuple(rows)

    @property
    def rows(self) -> tuple[FoldRow, ...]:
        """The rows, in graph order."""
        waiting = self._core_rows
        if waiting is not None:
            self._rows = tuple(FoldRow(*row) for row in waiting)
            self._core_rows = None
        return self._rows

    # -- as a sequence -------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._rows if self._core_rows is None else self._core_rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[FoldRow]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FoldReport) and self.rows == other.rows

    def __hash__(self) -> int:
        return hash(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows,)

    # -- sums ----------------------------------------------------------------------------------------------------------
    @property
    def ok(self) -> bool:
        """Whether no BatchNorm was kept."""
        return all(row.outcome != "kept" for row in self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each outcome; outcomes that did not occur are not in it."""
        if self._core_rows is not None:
            return dict(Counter([row[2] for row in self._core_rows]))
        return dict(Counter(row.outcome for row in self._rows))

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows have each reason code."""
        return dict(Counter(row.reason for row in self.rows))

    def _total(self, field: str) -> int | None:
        values = [getattr(row, field) for row in self.rows if row.outcome in ("folded", "fused")]
        return None if not values or None in values else sum(values)

    @property
    def bytes_saved(self) -> int | None:
        """Sum over the rows; None when a shape is not known (see `fx.shape_prop`) or nothing was done."""
        return self._total("bytes_saved")

    @property
    def flops_saved(self) -> int | None:
        """Sum over the rows; None when a shape is not known or nothing was done."""
        return self._total("flops_saved")

    def _summary(self) -> str:
        n = len(self.rows)
        counts = self.counts
        parts = [f"{counts[outcome]} {outcome}" for outcome in _COLOURS if outcome in counts]
        text = f"{n} BatchNorm{'' if n == 1 else 's'}" + (": " + ", ".join(parts) if parts else "")
        if self.bytes_saved is not None:
            traffic, work = _amount(self.bytes_saved, "B"), _amount(self.flops_saved, "FLOP")
            text += f"; a call saves {traffic} of traffic and {work}"
        return text

    # -- text ----------------------------------------------------------------------------------------------------------
    _HEAD = ("BatchNorm", "convolution", "outcome", "reason", "note")

    @staticmethod
    def _note(row: FoldRow) -> str:
        why = [part for part in (f"because of {row.blocking}" if row.blocking else "", row.hint) if part]
        if row.outcome == "kept":
            return "; ".join(why)
        if row.outcome in ("removed", "planned"):
            return "; ".join([f"now {row.new_node}", *why] if row.new_node else why)
        note = f"now {row.new_node}"
        if row.run_time_rule:
            note += ", decided at each call: the linear output's rank is not known"
        return note

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (r.target if r.target not in (None, r.node) else r.node, r.conv or "-", r.outcome, r.reason, self._note(r))
            for r in self.rows
        ]

    def __str__(self) -> str:
        if not self.rows:
            return "no BatchNorm in the graph"
        table = [self._HEAD, *self._cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self._HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        return "\n".join([*lines, self._summary()])

    def __repr__(self) -> str:
        return f"<FoldReport: {self._summary() if self.rows else 'no BatchNorm'}>"

    def _repr_html_(self) -> str:
        cell = "padding:2px 12px 2px 0;text-align:left;border-bottom:1px solid rgba(128,128,128,.25)"
        head = "".join(f"<th style='{cell}'>{name}</th>" for name in self._HEAD)
        body = []
        for row, cells in zip(self.rows, self._cells()):
            styled = []
            for name, text in zip(self._HEAD, cells):
                style = f"{cell};color:{_COLOURS[row.outcome]};font-weight:600" if name == "outcome" else cell
                styled.append(f"<td style='{style}'>{html.escape(text)}</td>")
            body.append(f"<tr style='background:transparent'>{''.join(styled)}</tr>")
        return (
            "<table style='border-collapse:collapse;color:inherit;background:transparent'>"
            "<caption style='caption-side:bottom;text-align:left;padding:4px 0'>"
            f"{html.escape(self._summary())}</caption>"
            f"<thead><tr style='background:transparent'>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, strings and numbers, fit for `json.dump`."""
        return {
            "ok": self.ok, "counts": self.counts, "reasons": self.reasons, "bytes_saved": self.bytes_saved,
            "flops_saved": self.flops_saved, "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def _from_dict(cls, found: Any) -> FoldReport:
        """What `to_dict` gave; ValueError if this is something else."""
        return cls(rows_of(found, FoldRow, "FoldReport"))

    def explain(self, name: str) -> str:
        """In sentences, what became of the BatchNorm `name` (its node or its module's path) and why.

        A module that is called several times has several rows; all are explained.

        Raises:
            KeyError: no row has that name; the message lists those there are.

        >>> from pyconvbn.report import FoldReport, FoldRow
        >>> print(FoldReport([FoldRow("bn", "bn", "kept", "BN_TRAINING", hint="call eval() on it")]).explain("bn"))
        bn (module form) was kept: BN_TRAINING. In training mode a BatchNorm normalises by the statistics of the batch \
and updates the running ones, so it is no fixed linear function that a convolution could take over. Hint: call eval() \
on it.
        """
        rows = [row for row in self.rows if name in (row.node, row.target)]
        if not rows:
            known = ", ".join(row.node for row in self.rows) or "none"
            raise KeyError(f"name: no BatchNorm {name!r} in this report, which has: {known}")
        return "\n\n".join(self._sentences(row) for row in rows)

    @staticmethod
    def _sentences(row: FoldRow) -> str:
        path = f", module {row.target}" if row.target not in (None, row.node) else ""
        where = f"{row.node} ({row.form} form{path})"
        if row.outcome == "removed":
            parts = [f"{where} was {_DONE[row.outcome]}.", f"Why: {row.hint}." if row.hint else ""]
            if row.new_node:
                parts.append(f"{row.new_node} gives the value now.")
            return " ".join(part for part in parts if part)
        if row.outcome in ("kept", "planned"):
            parts = [f"{where} was kept: {row.reason}."]
            if row.outcome == "planned":
                parts = [f"{where} was {_DONE[row.outcome]}."]
                if row.new_node:
                    parts.append(f"{row.new_node} does that now.")
                if row.reason != "OK":
                    parts.append(f"It was not folded: {row.reason}.")
            parts.append(_MEANING.get(row.reason, ""))
            if row.conv:
                parts.append(f"It follows the convolution {row.conv}.")
            if row.blocking:
                parts.append(f"The node in the way is {row.blocking}.")
            if row.hint:
                parts.append(f"Hint: {row.hint}.")
            return " ".join(part for part in parts if part)
        parts = [f"{where} was {_DONE[row.outcome]}."]
        parts.append(f"The convolution was {row.conv}; {row.new_node} does the work now.")
        if row.bytes_saved is not None:
            traffic, work = _amount(row.bytes_saved, "B"), _amount(row.flops_saved, "FLOP")
            parts.append(f"Each call saves {traffic} of memory traffic and {work}.")
        if row.run_time_rule:
            parts.append(
                "How many axes the linear output has is decided at each call: with other than two the pair is computed "
                "unfused and counted in pyconvbn.counters['efficient_conv_bn_eval_fallback']."
            )
        return " ".join(parts)

    @classmethod
    def _from_core(cls, rows: list[tuple[Any, ...]]) -> FoldReport:
        """From the tuples of the C passes, whose order is that of FoldRow's fields."""
        report = cls()
        report._core_rows = rows
        return report

    def _tuples(self) -> list[tuple[Any, ...]]:
        """The rows as tuples of FoldRow's fields."""
        if self._core_rows is not None:
            return self._core_rows
        return [tuple([getattr(row, name) for name in FoldRow.__slots__]) for row in self._rows]
