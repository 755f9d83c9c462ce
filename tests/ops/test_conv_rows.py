# SPDX-License-Identifier: BSD-3-Clause
"""Every row of the list of convolution algorithms on random geometries that are as awkward as they come.

What a row accepts, it must get right: the numbers, the same bits however the work is split and wherever the arrays
lie, Inf and NaN where they belong, nothing written outside `out`, memory as stated, a clean state after a failure.
"""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, testing

T = _core._testing
ROWS = [name for name, _ in pyconvbn.Plan(np.ones((1, 1, 1), np.float32)).explain((1, 1, 4))["candidates"]]
UNITS = [*T.isas(), "amx_emulated"]
# The matrix unit's emulation differs from the best instruction set in its own row only.
PAIRS = [(row, unit) for row in ROWS for unit in UNITS if (row == "amx") == ("amx" in unit)]
GUARD = 64
CASES = 6

pytestmark = pytest.mark.usefixtures("keep_threads")


def approximate(row: str) -> bool:
    """Rows whose sums are not those of whole numbers: their errors are those of a tile's largest output."""
    return row.startswith("winograd")


# -- geometries ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    x: tuple[int, ...]
    w: tuple[int, ...]
    geometry: dict[str, Any]


def one_of(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def draw_kernel(rng: np.random.Generator, nd: int) -> tuple[int, ...]:
    if nd == 1 and rng.random() < 0.2:
        return (one_of(rng, 11, 16),)
    if rng.random() < 0.4:
        return (3,) * nd
    return tuple(int(k) for k in rng.integers(1, {1: 8, 2: 6, 3: 4}[nd], nd))


def draw_channels(rng: np.random.Generator) -> tuple[int, int, int]:
    """groups, then channels of a group in and out"""
    kind = rng.random()
    if kind < 0.2:
        return int(rng.integers(1, 40)), 1, int(rng.integers(1, 4))
    if kind < 0.4:
        return int(rng.integers(2, 9)), int(rng.integers(1, 41)), int(rng.integers(1, 41))
    least = 16 if kind < 0.75 else 1
    return 1, int(rng.integers(least, 50)), int(rng.integers(least, 50))


def draw_size(rng: np.random.Generator, nd: int) -> list[int]:
    size = [int(one_of(rng, rng.integers(1, 5), rng.integers(3, 24), rng.integers(16, 60))) for _ in range(nd)]
    if rng.random() < (0.5 if nd == 1 else 0.1):
        size[-1] = int(rng.integers(60, 3001))
    return size


def draw(rng: np.random.Generator, row: str) -> Case:
    """Rows that want something special get it more often."""
    if row == "strassen":
        ic, oc = (2 * int(c) for c in rng.integers(64, 80, 2))
        return Case((one_of(rng, 1, 2, 3), ic, *(int(i) for i in rng.integers(8, 15, 2))), (oc, ic, 1, 1),
                    dict(stride=(1, 1), dilation=(1, 1), groups=1, padding=(0, 0)))
    if row == "linear" or rng.random() < 0.04:
        ic, oc = (int(c) for c in rng.integers(1, 80, 2))
        return Case((int(rng.integers(1, 41)), ic), (oc, ic), {})
    nd = one_of(rng, 1, 2, 2, 3)
    transposed = row in ("upconv", "transposed")
    if row not in ("upconv", "transposed", "depthwise", "pointwise", "taps", "scale"):
        transposed = rng.random() < 0.3
    groups, icg, ocg = draw_channels(rng)
    kernel = draw_kernel(rng, nd)
    stride = one_of(rng, (1,) * nd, (2,) * nd, tuple(int(s) for s in rng.integers(1, 5, nd)))
    dilation = (1,) * nd if rng.random() < 0.7 else tuple(int(d) for d in rng.integers(1, 6, nd))
    if row == "depthwise":
        groups, icg = max(groups, 2), 1
    if row == "scale":
        groups, icg, ocg = int(rng.integers(1, 40)), 1, 1
        stride = (1,) * nd
    if row in ("pointwise", "scale"):
        kernel = (1,) * nd
    if row == "upconv":
        stride = (*stride[:-1], 2)
        kernel, dilation = stride, (1,) * nd
    reach = [(k - 1) * d for k, d in zip(kernel, dilation)]
    padding = one_of(
        rng, (0,) * nd, tuple(r // 2 for r in reach), tuple(int(p) for p in rng.integers(0, np.array(reach) + 1)),
        tuple(int(p) for p in rng.integers(0, 9, nd)),
    )
    if row in ("pointwise", "upconv", "scale"):
        padding = (0,) * nd
    geometry: dict[str, Any] = dict(stride=stride, dilation=dilation, groups=groups, padding=padding)
    size = draw_size(rng, nd)
    if transposed:
        geometry["transposed"] = True
        limits = [1 if row == "upconv" or rng.random() < 0.5 else max(s, d) for s, d in zip(stride, dilation)]
        geometry["output_padding"] = tuple(int(rng.integers(limit)) for limit in limits)
    elif rng.random() < 0.1:
        geometry.update(stride=(1,) * nd, padding="same")
    elif rng.random() < 0.1:
        geometry["padding_mode"] = one_of(rng, "reflect", "replicate", "circular")
    elif rng.random() < 0.15:  # the smallest that gives one output
        size = [max(1, r + 1 - 2 * p) for r, p in zip(reach, padding)]
    across = (groups * icg, ocg) if transposed else (groups * ocg, icg)
    return Case((one_of(rng, 1, 2, 3, 3, 9), groups * icg, *size), (*across, *kernel), geometry)


def cases(row: str, unit: str, rng: np.random.Generator, most: int = 600_000) -> Iterator[tuple[Case, dict[str, Any]]]:
    """CASES geometries that the row takes, with options of the plan."""
    found = 0
    for _ in range(4000):
        case = draw(rng, row)
        options = dict(
            activation=one_of(rng, None, None, "relu", "relu6", "hardswish"),
            precision=one_of(rng, "strict", "fp32", "fast"),
            **case.geometry,
        )
        plan = T.plan_with_isa(unit, np.zeros(case.w, np.float32), **options)
        try:
            if row != "strassen" and math.prod(plan.output_shape(case.x)) * math.prod(case.w[1:]) > most:
                continue
            T.plan_force(plan, case.x, row)
        except ValueError:  # no output, or not a geometry of this row
            continue
        yield case, options
        found += 1
        if found == CASES:
            return
    pytest.fail(f"{found} of the geometries drawn are taken by {row}: draw() should know what it wants")


# -- arrays --------------------------------------------------------------------------------------------


def numbers(rng: np.random.Generator, shape: tuple[int, ...], whole: bool) -> np.ndarray:
    return (rng.integers(-3, 4, shape) if whole else rng.normal(0.1, 1.0, shape)).astype(np.float32)


def channels_out(case: Case) -> int:
    return case.w[1] * case.geometry["groups"] if case.geometry.get("transposed") else case.w[0]


def shifted(x: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins `offset` bytes after a cache line."""
    raw = np.zeros(x.nbytes + 256, np.uint8)
    out = np.ndarray(x.shape, x.dtype, raw, (-raw.ctypes.data) % 64 + offset)
    out[...] = x
    return out


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


class Setting(NamedTuple):
    plan: Any
    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    residual: np.ndarray | None
    whole: bool
    options: dict[str, Any]

    def run(self, x: np.ndarray, plan: Any = None, **more: Any) -> np.ndarray:
        return np.asarray((plan or self.plan)(x, residual=self.residual, **more))

    def expected(self, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            return testing.error_model(x, w, self.b, residual=self.residual, **without(self.options, "precision"))


def settings(row: str, unit: str, rng: np.random.Generator) -> Iterator[Setting]:
    for case, options in cases(row, unit, rng):
        whole = bool(rng.random() < 0.5)
        x, w = numbers(rng, case.x, whole), numbers(rng, case.w, whole)
        b = numbers(rng, (channels_out(case),), True)
        plan = T.plan_with_isa(unit, w, b, **options)
        T.plan_force(plan, case.x, row)
        residual = numbers(rng, plan.output_shape(case.x), True) if rng.random() < 0.4 else None
        yield Setting(plan, x, w, b, residual, whole, options)


def assert_right(row: str, setting: Setting, out: np.ndarray, reference: np.ndarray, tolerance: np.ndarray) -> None:
    if approximate(row):
        tolerance = np.full_like(tolerance, tolerance.max(initial=0.0))
    elif setting.whole and setting.options["activation"] != "hardswish":
        tolerance = np.zeros_like(tolerance)
    testing.assert_within(out, reference, tolerance, channel_axis=1)


# -- tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "unit"), PAIRS)
def test_right_and_the_same_however_it_is_run(row: str, unit: str, rng: np.random.Generator) -> None:
    for s in settings(row, unit, rng):
        reference, tolerance = s.expected(s.x, s.w)
        around = np.full(reference.size + 2 * GUARD + 16, 12345.0, np.float32)
        begin = GUARD + int(rng.integers(16))
        out = around[begin : begin + reference.size].reshape(reference.shape)
        pyconvbn.set_num_threads(1)
        s.run(s.x, out=out)
        assert np.all(around[:begin] == 12345.0) and np.all(around[begin + out.size :] == 12345.0), s.options
        want = out.copy()
        assert_right(row, s, want, reference, tolerance)
        for threads in (2, 3):
            pyconvbn.set_num_threads(threads)
            np.testing.assert_array_equal(s.run(s.x), want)
        for i in range(len(s.x)):
            residual = None if s.residual is None else s.residual[i : i + 1]
            np.testing.assert_array_equal(s.plan(s.x[i : i + 1], residual=residual), want[i : i + 1])
        spread = np.repeat(s.x, 2, axis=-1)[..., ::2]
        for same in (shifted(s.x, 4 * int(rng.integers(1, 16))), shifted(s.x, 3), np.asfortranarray(s.x), spread):
            np.testing.assert_array_equal(s.run(same), want)
        assert s.plan(s.x[:0]).shape == (0, *want.shape[1:])


@pytest.mark.parametrize(("row", "unit"), PAIRS)
def test_special_values_stay_in_place(row: str, unit: str, rng: np.random.Generator) -> None:
    for s in settings(row, unit, rng):
        clean = s.run(s.x)
        value = one_of(rng, np.nan, np.inf, -np.inf, 1e38, -3e38)
        for in_weights in (False, True):
            x, w = s.x.copy(), s.w.copy()
            poked = w if in_weights else x
            at = tuple(int(rng.integers(size)) for size in poked.shape)
            poked[at] = np.nan
            met = np.isnan(testing.error_model(x, w, s.b, **without(s.options, "precision", "activation"))[0])
            poked[at] = value
            plan = T.plan_with_isa(unit, w, s.b, **s.options)
            T.plan_force(plan, x.shape, row)
            out = s.run(x, plan)
            reference, tolerance = s.expected(x, w)
            if np.isfinite(value):  # sums may overflow; elsewhere a tile's errors are those of its largest output
                assert np.isfinite(out[~met]).all()
                if not approximate(row):
                    assert_right(row, s, np.where(met, 0, out), np.where(met, 0, reference), tolerance)
                continue
            exact = reference[met]
            for kind in (np.isnan, np.isposinf, np.isneginf):
                np.testing.assert_array_equal(kind(out[met]), kind(exact))
            assert np.isfinite(out[~met]).all()
            elsewhere = np.where(met, 0, tolerance).max(initial=0.0)
            assert np.abs(np.where(met, 0, out) - np.where(met, 0, clean)).max(initial=0.0) <= 2 * elsewhere


@pytest.mark.parametrize(("row", "unit"), PAIRS)
def test_memory_is_as_stated_and_failures_leave_nothing(row: str, unit: str, rng: np.random.Generator) -> None:
    def live() -> int:
        return int(_core.alloc_stats()["live_bytes"])

    for number, s in enumerate(settings(row, unit, rng)):
        if number == CASES // 2:
            return
        pyconvbn.set_num_threads(2)
        want = s.plan(s.x).copy()
        before, failed = live(), True
        plan = T.plan_with_isa(unit, s.w, s.b, **s.options)
        around = np.full(want.size + 2 * GUARD, 12345.0, np.float32)
        out = around[GUARD:-GUARD].reshape(want.shape)
        for point in range(40):
            if not failed:
                break
            T.scratch_trim()
            T.alloc_fail_after(point)
            try:
                T.plan_force(plan, s.x.shape, row)
                plan(s.x, out=out)
                failed = False
            except MemoryError:
                pass
            finally:
                T.alloc_fail_after(-1)
            assert np.all(around[:GUARD] == 12345.0) and np.all(around[-GUARD:] == 12345.0)
        assert not failed, "more allocations than a call can need"
        np.testing.assert_array_equal(plan(s.x, out=out), want)
        memory = plan.memory(s.x.shape)
        assert live() - before == memory["plan"]
        T.scratch_trim()
        held = live()
        T.alloc_reset_peak()
        plan(s.x, out=out)
        assert _core.alloc_stats()["peak_bytes"] - held == memory["workspace"], s.options
        for _ in range(3):
            plan(s.x, out=out)
        assert live() == held
        del plan
        assert live() == before


@pytest.mark.parametrize("row", ROWS)
def test_one_plan_in_several_threads(row: str, rng: np.random.Generator) -> None:
    unit = "amx_emulated" if row == "amx" else UNITS[0]
    s = next(settings(row, unit, rng))
    want, wrong = s.run(s.x).copy(), []
    shared = T.plan_with_isa(unit, s.w, s.b, **s.options)

    def work() -> None:
        own = T.plan_with_isa(unit, s.w, s.b, **s.options)
        for plan in (shared, own) * 5:
            T.plan_force(plan, s.x.shape, row)
            if not np.array_equal(s.run(s.x, plan), want):
                wrong.append(row)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("row", [row for row in ROWS if row != "amx"])
def test_a_row_comes_back_out_of_a_pickle(row: str, rng: np.random.Generator) -> None:
    case, options = next(cases(row, UNITS[0], rng))
    plan = pyconvbn.Plan(numbers(rng, case.w, False), **options)
    T.plan_force(plan, case.x, row)
    again, x = pickle.loads(pickle.dumps(plan)), numbers(rng, case.x, False)
    assert again.explain(case.x)["algorithm"] == row
    np.testing.assert_array_equal(again(x), plan(x))
    reasons = dict(again.explain(case.x)["candidates"])
    assert reasons.pop(row) == "chosen" and all(reasons.values())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes(dtype: type, rng: np.random.Generator) -> None:
    """float16 runs on the same rows, on whole numbers with the same sums; float64 is left to the last row."""
    for row in ROWS:
        if row == "amx":
            continue
        for number, s in enumerate(settings(row, UNITS[0], rng)):
            if number == 2:
                break
            x, w, b = (np.sign(a).astype(dtype) for a in (s.x, s.w, s.b))
            plan = pyconvbn.Plan(w, b, **s.options)
            if dtype is np.float16:
                T.plan_force(plan, x.shape, row)
            reference, tolerance = testing.error_model(x, w, b, dtype=dtype, **without(s.options, "precision"))
            assert plan(x).dtype == dtype
            testing.assert_within(plan(x), reference, np.full_like(tolerance, tolerance.max(initial=0.0)))


def test_very_long_rows_are_planned_at_once() -> None:
    """Choosing takes no time that grows with the square of the length (minutes, here)."""
    code = """
import numpy, pyconvbn
plan = pyconvbn.Plan(numpy.ones((16, 16, 3), numpy.float32), dilation=64)
print(plan.explain((1, 16, 30_000_000))["algorithm"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in ROWS, done.stderr


@pytest.mark.parametrize(("weight", "geometry", "shape"), [
    ((16, 16, 3, 3, 3), dict(dilation=(1000, 1, 1), padding=(1000, 1, 1)), (1, 16, 3, 8, 8)),
    ((16, 128, 3, 3, 3), dict(dilation=(12, 1, 1), padding=(12, 1, 1)), (1, 128, 112, 112, 7)),
    ((32, 256, 5, 5), dict(padding=2), (1, 256, 56, 56)),
    ((64, 256, 7, 7), dict(padding=3, stride=(2, 1)), (1, 256, 56, 28)),
], ids=str)
def test_workspace_is_bounded_on_awkward_layers(
    weight: tuple[int, ...], geometry: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """8 MB, or a quarter of input, output and weights."""
    plan = pyconvbn.Plan(np.zeros(weight, np.float32), **geometry)
    for threads in (1, 2):
        pyconvbn.set_num_threads(threads)
        memory = plan.memory(shape)
        allowed = max(8 << 20, (memory["input"] + memory["output"] + 4 * math.prod(weight)) // 4)
        assert memory["workspace"] <= allowed, (threads, plan.explain(shape)["algorithm"])
