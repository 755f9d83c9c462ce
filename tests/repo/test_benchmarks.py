# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark harness: shape files, statistics, the float64 check, and one run end to end. No timings asserted."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import kernels as kernel_benches  # noqa: E402
import layers as shape_files  # noqa: E402
import problem as problems  # noqa: E402
import report  # noqa: E402
import stats  # noqa: E402

ALL_LAYERS = shape_files.read_layers(BENCHMARKS / "shapes" / "layers.txt")
SMOKE_LAYERS = shape_files.read_layers(BENCHMARKS / "shapes" / "smoke.txt")


def test_layers_txt_is_read_whole():
    text = (BENCHMARKS / "shapes" / "layers.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(ALL_LAYERS) == len(lines) == 72


@pytest.mark.parametrize("layer", ALL_LAYERS + SMOKE_LAYERS, ids=lambda layer: layer.name)
def test_stated_mflop_matches(layer):
    assert layer.stated_mflop == pytest.approx(layer.flops / 1e6, abs=0.051)
    assert layer.kind
    assert 0 < layer.flops_real <= layer.flops


def test_fields_of_a_transposed_line():
    layer = shape_files.parse_line(
        "up n2 g2 ic6 oc4 i5x4 k4x3 s2x1 p1x1 d1x1 t op1x0  # transposed; a; b; 0.0 mflop")
    assert layer.transposed and layer.output_padding == (1, 0)
    assert (layer.kind, layer.note, layer.stated_mflop) == ("transposed", "a; b", 0.0)
    assert layer.input_shape == (2, 6, 5, 4)
    assert layer.weight_shape == (6, 2, 4, 3)
    assert layer.output_shape == (2, 4, 11, 4)
    assert layer.terms == 3 * 12


def test_real_flops_counted_by_hand():
    # 3 taps on 4 pixels with padding 1: the first and the last output lose one each, 10 of 12 products remain.
    assert shape_files.parse_line("a ic1 oc1 i4 k3 p1").flops_real == 2 * 10
    # Transposed with stride 2, 4 -> 9 cropped by one on either side: each end pixel loses one product.
    layer = shape_files.parse_line("b ic1 oc1 i4 k3 s2 p1 t")
    assert (layer.output_shape, layer.flops, layer.flops_real) == ((1, 1, 7), 2 * 12, 2 * 10)
    # Dilation as large as the map: only the centre tap ever meets it.
    assert shape_files.parse_line("c ic1 oc1 i4x4 k3x3 p4x4 d4x4").flops_real == 2 * 16


@pytest.mark.parametrize(("line", "message"), [
    ("a ic1 oc1 q3", "'q3' is not one of"),
    ("a ic1 oc1 k3", "'i' and 'k' come together"),
    ("a oc1", "'ic' is missing"),
    ("a ic1 ic2 oc1", "'ic' is given twice"),
    ("a ic1 oc1 i4x4 k3", "'i' has 2 numbers, 'k' has 1"),
    ("a ic3 oc4 g2", "2 groups do not divide"),
    ("a ic1 oc1 i2 k3", "output would be empty"),
    ("a ic1 oc1 i4 k3 op1", "'op' needs 't'"),
    ("a ic1 oc1 i4 k3 s0", "must be positive"),
    ("a n1x2 ic1 oc1", "'n' takes one number"),
    ("a ic1 oc1 i2x2x2x2 k1x1x1x1", "at most 3 spatial axes, got 4"),
])
def test_bad_lines_say_why(line, message):
    with pytest.raises(ValueError, match=message):
        shape_files.parse_line(line)


def test_bad_file_names_the_line(tmp_path):
    path = tmp_path / "shapes.txt"
    path.write_text("# comment\n\na ic1 oc1\na ic2 oc2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="shapes.txt:4: a occurs twice"):
        shape_files.read_layers(path)


def test_statistics():
    assert stats.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(stats.geometric_mean([]))
    with pytest.raises(ValueError, match="got 0"):
        stats.geometric_mean([1.0, 0])
    assert stats.by_kind(["a", "b", "a"], [1.0, 2.0, 3.0]) == {"a": [1.0, 3.0], "b": [2.0]}
    timing = stats.Timing([3.0, 1.0, 2.0, 10.0])
    assert (timing.median, timing.best) == (2.5, 1.0)


class FakeClock:
    """Calls take the time they say, nothing else takes any."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(stats.time, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds
        return run


def test_interleaving_rotates_and_measures(monkeypatch):
    clock = FakeClock(monkeypatch)
    starts = []
    calls = {"a": clock.call("a", 0.004), "b": clock.call("b", 0.002)}
    timings = stats.interleave(calls, rounds=3, slice_seconds=0.01,
                               quiet=lambda: starts.append(len(clock.log)))
    assert [clock.log[at] for at in starts] == ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].samples == pytest.approx([0.004] * 9)
    assert timings["b"].samples == pytest.approx([0.002] * 15)


def test_hopeless_rival_is_let_go_but_not_the_kept_one(monkeypatch):
    clock = FakeClock(monkeypatch)
    calls = {"ours": clock.call("ours", 0.1), "slow": clock.call("slow", 0.1), "fast": clock.call("fast", 0.01)}
    timings = stats.interleave(calls, rounds=4, slice_seconds=0.01, keep=("ours",), quiet=lambda: None)
    assert {name: len(timing.samples) for name, timing in timings.items()} == {
        "ours": 4, "slow": 2, "fast": 4}


def test_short_calls_are_timed_in_bursts(monkeypatch):
    clock = FakeClock(monkeypatch)
    timing = stats.interleave({"a": clock.call("a", 1e-5)}, rounds=1, slice_seconds=1e-3,
                              quiet=lambda: None)["a"]
    assert len(timing.samples) <= 11
    assert timing.median == pytest.approx(1e-5)


@pytest.mark.parametrize("layer", SMOKE_LAYERS, ids=lambda layer: layer.name)
def test_check_agrees_with_plain_loops_and_sees_errors(layer):
    """The check's gathered products against scattered loops that share nothing with it."""
    problem = problems.make_problem(layer)
    check = problems.make_check(problem)
    exact = plain_loops(problem)
    assert check.points >= 64 and np.isfinite(check.bound)
    np.testing.assert_allclose(check.exact, exact[check.index], rtol=1e-12, atol=1e-12)
    y = exact.astype(np.float32)
    assert check.rms_ratio(y) < 1.5
    corner = (-1,) * y.ndim
    for wrong in (np.float32(np.nan), y[corner] + np.float32(2 * check.bound)):
        broken = y.copy()
        broken[corner] = wrong
        with pytest.raises(AssertionError, match="allowed"):
            check.rms_ratio(broken)


def plain_loops(problem):
    layer = problem.layer
    y = np.zeros(layer.output_shape)
    y += problem.folded_bias.astype(np.float64).reshape(1, -1, *[1] * layer.nd)
    x = problem.x.astype(np.float64)
    per_ic, per_oc = layer.ic // layer.groups, layer.oc // layer.groups
    for o in range(layer.oc):
        group = o // per_oc
        for j in range(per_ic):
            i = group * per_ic + j
            w = problem.folded_weight[i, o % per_oc] if layer.transposed else problem.folded_weight[o, j]
            # From the side that never has holes: pixels of the input when transposed, of the output else.
            sites = layer.size if layer.transposed else layer.output_size
            far = layer.output_size if layer.transposed else layer.size
            for site in np.ndindex(*sites):
                for tap in np.ndindex(*layer.kernel):
                    at = tuple(a * s - p + t * d for a, s, p, t, d in zip(
                        site, layer.stride, layer.padding, tap, layer.dilation, strict=True))
                    if not all(0 <= a < size for a, size in zip(at, far, strict=True)):
                        continue
                    into, source = (at, site) if layer.transposed else (site, at)
                    y[(slice(None), o, *into)] += float(w[tap]) * x[(slice(None), i, *source)]
    return y


def test_folded_parameters_are_the_batch_norm():
    """Depthwise and grouped transposed weights: the fold must use each output channel's own scale."""
    for layer in SMOKE_LAYERS:
        problem = problems.make_problem(layer)
        assert problem.x.ctypes.data % 64 == 0
        for o in range(layer.oc):
            scale = float(problem.gamma[o]) / math.sqrt(float(problem.var[o]) + problems.EPS)
            per_ic, per_oc = layer.ic // layer.groups, layer.oc // layer.groups
            group = o // per_oc
            if layer.transposed:
                rows = slice(group * per_ic, (group + 1) * per_ic)
                raw, folded = problem.weight[rows, o % per_oc], problem.folded_weight[rows, o % per_oc]
            else:
                raw, folded = problem.weight[o], problem.folded_weight[o]
            np.testing.assert_allclose(folded, raw * scale, rtol=2e-7)
            shift = float(problem.beta[o]) - float(problem.mean[o]) * scale
            assert problem.folded_bias[o] == pytest.approx(shift, rel=1e-6, abs=1e-7)


def fake_row(name, kind, ours, peer):
    return {"layer": name, "kind": kind, "flops": 1e6, "algorithm": "direct", "gflops": 1.0,
            "gflops_real": 1.0, "peak_percent": None, "best_peer": "ort", "ratio": peer / ours,
            "ratio_of_best": peer / ours, "rms_ratio": 1.0,
            "rivals": {"ours": {"median_us": ours, "best_us": ours}, "ort": {"median_us": peer},
                       "ov": {"failed": "boom", "wrong": False}}}


def test_summary_and_table():
    rows = [fake_row("one", "1x1", 10.0, 20.0), fake_row("two", "dw", 2000.0, 1000.0)]
    summary = report.summarize(rows)
    assert summary["geometric_mean"] == pytest.approx(1.0)
    assert [entry["layer"] for entry in summary["below_one"]] == ["two"]
    assert summary["by_class"]["1x1"] == {"layers": 1, "geometric_mean": pytest.approx(2.0)}
    assert len(summary["failed"]) == 2
    lines = report.table(rows, ["ours", "ort", "ov"]).splitlines()
    assert len(lines) == 4 and "FAILED" in lines[2]
    assert "0.50 <" in lines[3] and "2000" in lines[3]
    text = report.summary_text(summary, 0.5)
    assert "NOT A QUIET MACHINE" in text and "two 0.50 (ort)" in text


def test_one_shot_beside_the_plan():
    rows = [fake_row("one", "1x1", 10.0, 20.0), fake_row("two", "dw", 20.0, 10.0), fake_row("three", "dw", 20.0, 10.0)]
    for row, flops, us in zip(rows, (2e8, 2e8, 1e6), (11.0, 80.0, 40.0), strict=True):
        row["flops"] = flops
        row["rivals"]["one_shot"] = {"median_us": us, "best_us": us, "rms_ratio": 1.0}
    summary = report.summarize_one_shot(rows)
    assert summary["ratios"] == pytest.approx({"one": 1.1, "two": 4.0, "three": 2.0})
    assert summary["geometric_mean"] == pytest.approx(8.8 ** (1 / 3))
    assert summary["geometric_mean_large"] == pytest.approx(4.4**0.5)
    assert (summary["large"], summary["met"], summary["missed"]) == (2, 1, ["two"])
    lines = report.one_shot(rows, summary).splitlines()
    assert [line.endswith(">") for line in lines] == [False, False, False, True, False, False]
    rows[0]["rivals"]["one_shot"] = {"failed": "wrong", "wrong": True}
    summary = report.summarize_one_shot(rows)
    assert summary["missed"] == ["one", "two"] and "WRONG" in report.one_shot(rows, summary)


def run(*arguments):
    return subprocess.run([sys.executable, str(BENCHMARKS / "run.py"), *arguments], capture_output=True,
                          text=True, timeout=300, check=False)


def test_run_end_to_end_without_peers(tmp_path):
    target = tmp_path / "result.json"
    done = run("--shapes", "shapes/smoke.txt", "--own-only", "--rounds", "1", "--slice", "1",
               "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest rms error" in done.stdout
    result = json.loads(target.read_text(encoding="utf-8"))
    assert [row["layer"] for row in result["layers"]] == [layer.name for layer in SMOKE_LAYERS]
    for row in result["layers"]:
        assert row["rivals"]["ours"]["median_us"] > 0 and row["algorithm"]
        assert row["ratio"] is None and row["points_checked"] >= 64
    assert result["info"]["peak_gflops"] > 0 and result["info"]["isa"]


def test_every_kernel_bench_runs():
    from pyconvbn import _core

    testing = _core._testing
    assert set(kernel_benches.KERNEL_BENCHES) == set(testing.kernel_names())
    for name, bench in kernel_benches.KERNEL_BENCHES.items():
        cases = bench(testing, testing.active_isa())
        assert cases, name
        for case in cases:
            case.call()
            assert case.work > 0 and case.unit in ("FLOP", "B"), f"{name} {case.label}"


def test_kernel_run_end_to_end(tmp_path):
    target = tmp_path / "kernels.json"
    done = run("--kernels", "--match", "^mul$", "--rounds", "1", "--slice", "0.1", "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    assert {row["kernel"] for row in result["kernels"]} == {"mul"}
    assert all(row["rate"] > 0 for row in result["kernels"]) and result["without_benchmark"] == []


def test_one_shot_run_end_to_end(tmp_path):
    target = tmp_path / "result.json"
    done = run("--shapes", "shapes/smoke.txt", "--own-only", "--one-shot", "--rounds", "1", "--slice", "1",
               "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "efficient_conv_bn_eval / that of the plan" in done.stdout
    result = json.loads(target.read_text(encoding="utf-8"))
    ratios = result["summary"]["one_shot"]["ratios"]
    assert list(ratios) == [layer.name for layer in SMOKE_LAYERS] and all(ratio > 0 for ratio in ratios.values())
    for row in result["layers"]:
        assert 0 <= row["rivals"]["one_shot"]["rms_ratio"] < 20


@pytest.mark.parametrize(("arguments", "message"), [
    (("--one-shot", "--precision", "strict"), "must come first"),
    (("--match", "no such layer"), "matches"),
    (("--isa", "sse9"), "choose one of"),
    (("--threads", "100000"), "may use 1 to"),
    (("--shapes", "no_such_file.txt"), "no_such_file.txt"),
])
def test_run_refuses_clearly(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
