# SPDX-License-Identifier: BSD-3-Clause
"""FreezeReport, the outcomes of FoldRow that only freezing has, and how the rows of the steps become one FoldReport."""

from __future__ import annotations

import copy
import json
import pickle
from html.parser import HTMLParser
from typing import Any

import pytest

import pyconvbn
from pyconvbn.freeze_report import REASONS, STEPS, FreezeReport, FreezeRow, merge_folds
from pyconvbn.report import FoldReport, FoldRow

FOLDS = FoldReport([
    FoldRow("bn1", "layer.bn1", "folded", "OK", new_node="conv1", conv="conv1", bytes_saved=800, flops_saved=200),
    FoldRow("bn2", "bn2", "removed", "OK", hint="it computed the same as bn1", new_node="conv1"),
    FoldRow("bn3", "bn3", "planned", "MULTI_USER", "add", "the convolution has other users", new_node="bn3",
            conv="conv3"),
])
ROWS = [
    FreezeRow("lower", "conv1", "done", "OK"),
    FreezeRow("cse", "bn2", "done", "OK", into="bn1"),
    FreezeRow("constant", "rand", "kept", "RANDOM", hint=REASONS["RANDOM"]),
    FreezeRow("constant", "call", "kept", "UNKNOWN", hint="a row's own hint"),
    FreezeRow("binary", "mul", "kept", "MULTI_USER", "conv1", REASONS["MULTI_USER"]),
    FreezeRow("plan", "conv1", "done", "OK"),
]
KEPT = FoldReport([*FOLDS, FoldRow("bn4", None, "kept", "BN_TRAINING", hint="call eval() on it", form="aten")])


def test_sequence_and_sums() -> None:
    report = FreezeReport(ROWS, FOLDS)
    assert len(report) == 6 and report[1] is ROWS[1] and list(report) == ROWS and report.rows == tuple(ROWS)
    assert list(report[2:4]) == ROWS[2:4] and ROWS[0] in report and report.index(ROWS[3]) == 3
    assert report.folds is FOLDS and report.ok and not FreezeReport(ROWS, KEPT).ok
    assert report.counts == {
        "lower": {"done": 1, "kept": 0}, "cse": {"done": 1, "kept": 0}, "constant": {"done": 0, "kept": 2},
        "binary": {"done": 0, "kept": 1}, "plan": {"done": 1, "kept": 0},
    }
    assert list(report.counts) == [step for step in STEPS if step in report.counts]
    assert report.reasons == {"OK": 3, "RANDOM": 1, "UNKNOWN": 1, "MULTI_USER": 1}
    assert report.by_step("constant") == ROWS[2:4] and report.by_step("dead") == []
    with pytest.raises(ValueError, match="name: expected one of lower, .*got 'constants'"):
        report.by_step("constants")
    with pytest.raises(TypeError, match="folds: expected a FoldReport, got list"):
        FreezeReport([], [])  # type: ignore[arg-type]
    assert pyconvbn.FreezeReport is FreezeReport


def test_empty() -> None:
    report = FreezeReport()
    assert len(report) == 0 and report.ok and report.counts == {} and report.reasons == {}
    assert str(report) == "no step had anything to do\nno BatchNorm in the graph"
    assert repr(report) == "<FreezeReport: 0 done, 0 kept; 0 BatchNorms>"
    assert "<table" in report._repr_html_()


def test_rows_as_the_tuples_of_the_core() -> None:
    report = FreezeReport([tuple(row) for row in ROWS], FOLDS)
    assert report.counts["constant"] == {"done": 0, "kept": 2}  # before any FreezeRow is made
    assert report == FreezeReport(ROWS, FOLDS) and hash(report) == hash(FreezeReport(ROWS, FOLDS))
    assert all(type(row) is FreezeRow for row in report)
    short = FreezeReport([("cse", "a", "done", "OK")])
    assert short[0] == FreezeRow("cse", "a", "done", "OK")


def test_a_list_changed_later_is_not_the_reports() -> None:
    rows = list(ROWS)
    report = FreezeReport(rows)
    rows.clear()
    assert len(report) == 6


def test_copies_and_equality() -> None:
    report = FreezeReport(ROWS, FOLDS)
    for other in (pickle.loads(pickle.dumps(report)), copy.copy(report), copy.deepcopy(report)):
        assert type(other) is FreezeReport and other == report and hash(other) == hash(report)
    assert report != FreezeReport(ROWS[:-1], FOLDS) and report != FreezeReport(ROWS, KEPT) and report != list(ROWS)


def test_dict_is_json_and_goes_back() -> None:
    report = FreezeReport(ROWS, KEPT)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["ok"] is False and found["counts"]["cse"] == {"done": 1, "kept": 0}
    assert found["rows"][4] == ROWS[4]._asdict() and len(found["folds"]["rows"]) == 4
    assert FreezeReport._from_dict(found) == report


@pytest.mark.parametrize("change", [
    lambda d: None,
    lambda d: d.pop("rows") and d,
    lambda d: d["rows"].append([]) or d,
    lambda d: d["rows"][0].pop("into") or d["rows"][0].update(other=1) or d,
    lambda d: d["rows"][0].update(node=1) or d,
    lambda d: d["rows"][0].update(outcome="dome") or d,
    lambda d: d["rows"][0].update(outcome=[]) or d,
    lambda d: d.pop("folds") and d,
    lambda d: d["folds"]["rows"][0].update(outcome="frozen") or d,
    lambda d: d["folds"]["rows"][0].update(bytes_saved=True) or d,
])
def test_other_dicts_are_refused(change: Any) -> None:
    found = json.loads(json.dumps(FreezeReport(ROWS, KEPT).to_dict()))
    with pytest.raises(ValueError, match="^(FreezeReport|FoldReport): "):
        FreezeReport._from_dict(change(found))


def test_text() -> None:
    assert str(FreezeReport(ROWS, KEPT)) == """\
step      done  kept
lower        1     0
cse          1     0
constant     0     2
binary       0     1
plan         1     0
BatchNorm  convolution  outcome  reason       note
layer.bn1  conv1        folded   OK           now conv1
bn2        -            removed  OK           now conv1; it computed the same as bn1
bn3        conv3        planned  MULTI_USER   now bn3; because of add; the convolution has other users
bn4        -            kept     BN_TRAINING  call eval() on it
4 BatchNorms: 1 folded, 1 removed, 1 planned, 1 kept; a call saves 800 B of traffic and 200 FLOP
kept RANDOM (1): it gives another value at each call
  constant  rand
kept UNKNOWN (1): an operator that is not in the op table: it may do anything
  constant  call  a row's own hint
kept MULTI_USER (1): the layer's output has other users
  binary  mul  because of conv1"""


def test_long_lists_are_cut() -> None:
    rows = [FreezeRow("constant", f"n{i}", "kept", "MUTATED", hint=REASONS["MUTATED"]) for i in range(5000)]
    rows += [FreezeRow("cse", f"m{i}", "kept", "RANDOM", hint=REASONS["RANDOM"]) for i in range(6)]
    for text in (str(FreezeReport(rows)), FreezeReport(rows)._repr_html_()):
        assert "kept MUTATED (5000)" in text and "... and 4990 more" in text and "n9" in text and "n10" not in text
        assert "m5" in text and len(text) < 12000
    with pytest.raises(KeyError) as caught:
        FreezeReport(rows).explain("nobody")
    assert "n39, ... and 4966 more" in str(caught.value) and len(str(caught.value)) < 600


class Tags(HTMLParser):
    """Every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_holds_the_same_and_escapes() -> None:
    rows = [*ROWS, FreezeRow("cse", "<b>x</b>", "kept", "IMPURE", hint="<i>")]
    page = FreezeReport(rows, KEPT)._repr_html_()
    words = Tags(page).words
    for expected in ("constant", "rand", "<b>x</b>", "<i>", "because of conv1", "planned", "removed"):
        assert expected in words, expected
    assert "<b>" not in page and "<i>" not in page
    assert "color:#fff" not in page and "background:#" not in page and "background:white" not in page


def test_explain() -> None:
    report = FreezeReport(ROWS, KEPT)
    assert report.explain("bn2") == (
        "bn2:\n  cse: it computed what another node computes too, and was merged with it. It is bn1 now.\n"
        "bn2 (module form) was removed: the graph does not compute it any more. Why: it computed the same as bn1. "
        "conv1 gives the value now."
    )
    assert "bn1 stands for bn2 too." in report.explain("bn1")
    assert report.explain("layer.bn1").startswith("bn1 (module form, module layer.bn1) was folded")
    text = report.explain("conv1")
    assert text.index("lower: ") < text.index("plan: ")
    assert report.explain("mul").endswith("The layer's output has other users. The node in the way is conv1.")
    assert "it was left as it is, UNKNOWN. A row's own hint." in report.explain("call")
    planned = report.explain("bn3")
    assert "prepared on its own" in planned and "bn3 does that now" in planned and "not folded: MULTI_USER" in planned
    assert "The node in the way is add." in planned and "follows the convolution conv3" in planned
    with pytest.raises(KeyError, match="no row about 'conv9' in this report, which has: conv1, bn2, rand, call, mul"):
        report.explain("conv9")


def test_explain_follows_the_node_and_ends_in_circles() -> None:
    rows = [FreezeRow("cse", "c", "done", "OK", into="b"), FreezeRow("cse", "b", "done", "OK", into="a"),
            FreezeRow("plan", "a", "done", "OK", into="plan_a"), FreezeRow("dead", "plan_a", "done", "OK", into="c")]
    text = FreezeReport(rows).explain("c")
    assert [line for line in text.splitlines() if not line.startswith(" ")][:4] == ["c:", "b:", "a:", "plan_a:"]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_its_sentence(step: str) -> None:
    text = FreezeReport([FreezeRow(step, "n", "done", "OK")]).explain("n")
    assert text.startswith(f"n:\n  {step}: ") and not text.endswith("done.")


def test_fold_outcomes_of_freezing() -> None:
    assert FOLDS.ok and FOLDS.counts == {"folded": 1, "removed": 1, "planned": 1}
    assert FOLDS.bytes_saved == 800 and FOLDS.flops_saved == 200  # the other two do not hide them
    assert repr(FOLDS) == (
        "<FoldReport: 3 BatchNorms: 1 folded, 1 removed, 1 planned; a call saves 800 B of traffic and 200 FLOP>"
    )
    unused = FoldReport([FoldRow("bn", None, "removed", "OK", hint="nobody used it", form="aten")])
    assert unused.ok and "bn         -            removed  OK      nobody used it" in str(unused)
    assert unused.explain("bn").endswith("Why: nobody used it.")


# -- merge_folds ---------------------------------------------------------------------------------------------------
def bn(name: str, outcome: Any = "kept", reason: str = "NOT_CONV", **fields: Any) -> FoldRow:
    return FoldRow(name, fields.pop("target", name), outcome, reason, **fields)


def done(step: str, node: str, into: str | None = None) -> FreezeRow:
    return FreezeRow(step, node, "done", "OK", into=into)


def test_merge() -> None:
    before = FoldReport([
        bn("bn1"), bn("twin"), bn("fixed"), bn("loose"), bn("kept"), bn("alone"), bn("late"), bn("lost"),
    ])
    after = FoldReport([
        bn("bn1", "folded", "OK", target=None, form="aten", new_node="conv1", conv="conv1"),
        bn("kept", reason="BN_TRAINING", target=None, form="aten"),
        bn("alone", reason="NOT_CONV", blocking="relu", hint="h", target=None, form="aten"),
        bn("late", reason="BN_OUTPUT_UNUSED", target=None, form="aten"),
        bn("more", reason="BN_TRAINING"),
    ])
    rows = [
        done("cse", "twin", "bn1"), done("constant", "fixed", "_frozen_param0"), done("dead", "loose"),
        FreezeRow("constant", "kept", "kept", "MUTATED"), done("plan", "alone", "frozen_alone"), done("dead", "late"),
        done("plan", "conv1", "frozen_conv1"), FreezeRow("plan", "kept", "kept", "TRAINING"),
    ]
    merged = {row.node: row for row in merge_folds(before, after, rows)}
    assert list(merged) == ["bn1", "twin", "fixed", "loose", "kept", "alone", "late", "lost", "more"]
    assert merged["bn1"] == bn("bn1", "folded", "OK", new_node="conv1", conv="conv1")
    assert merged["twin"] == bn("twin", "removed", "OK", hint="it computed the same as bn1", new_node="frozen_conv1")
    assert merged["fixed"] == bn("fixed", "removed", "OK", hint="its value is a constant", new_node="_frozen_param0")
    assert merged["loose"] == bn("loose", "removed", "OK", hint="nobody used it")
    assert merged["kept"] == bn("kept", "kept", "BN_TRAINING")
    assert merged["alone"] == bn("alone", "planned", "NOT_CONV", blocking="relu", hint="h", new_node="frozen_alone")
    assert merged["late"] == bn("late", "removed", "OK", hint="nobody used it")
    assert merged["lost"] == bn("lost", "removed", "OK", hint="the graph does not have it any more")
    assert merged["more"] == bn("more", "kept", "BN_TRAINING")


def test_merge_of_nothing() -> None:
    assert merge_folds(FoldReport(), FoldReport(), []) == FoldReport()
    kept = FoldReport([bn("bn")])
    assert merge_folds(kept, kept, []) == kept


def test_a_prepared_batch_norm_without_another_name_names_itself() -> None:
    kept = FoldReport([bn("bn")])
    assert merge_folds(kept, kept, [done("plan", "bn")])[0].new_node == "bn"


def test_a_chain_of_merges_ends() -> None:
    before = FoldReport([bn("a"), bn("b"), bn("c")])
    rows = [done("cse", "c", "b"), done("cse", "b", "a"), done("constant", "a", "value")]
    assert [row.new_node for row in merge_folds(before, FoldReport(), rows)] == ["value", "value", "value"]
