# SPDX-License-Identifier: BSD-3-Clause
"""What a plan says about its memory is what the counting allocator sees, for every algorithm; nothing grows; results are
made in recycled memory."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import Plan, _core
from pyconvbn._core import _testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import rows_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("keep_threads")

# name -> (weight shape, constructor arguments, input shape); together every algorithm finds something it supports
LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "3x3": ((48, 40, 3, 3), {"padding": 1}, (1, 40, 30, 29)),
    "3x3 many channels": ((64, 128, 3, 3), {"padding": 1}, (1, 128, 14, 14)),
    "3x3 stride 2": ((32, 32, 3, 3), {"padding": 1, "stride": 2}, (1, 32, 28, 28)),
    "3x3 dilated": ((32, 32, 3, 3), {"padding": 2, "dilation": 2}, (1, 32, 28, 28)),
    "3x3 batch": ((32, 32, 3, 3), {"padding": 1}, (70, 32, 12, 12)),
    "stem": ((32, 3, 7, 7), {"padding": 3, "stride": 2}, (1, 3, 64, 64)),
    "5x5": ((32, 32, 5, 5), {"padding": 2}, (1, 32, 17, 17)),
    "1x7": ((32, 32, 1, 7), {"padding": (0, 3)}, (1, 32, 17, 17)),
    "pointwise": ((128, 128, 1, 1), {}, (2, 128, 28, 28)),
    "pointwise stride 2": ((256, 128, 1, 1), {"stride": 2}, (1, 128, 28, 28)),
    "pointwise large": ((256, 256, 1, 1), {}, (1, 256, 28, 28)),
    "depthwise": ((96, 1, 3, 3), {"groups": 96, "padding": 1}, (1, 96, 28, 28)),
    "grouped": ((64, 8, 3, 3), {"groups": 8, "padding": 1}, (1, 64, 28, 28)),
    "grouped by four": ((64, 4, 3, 3), {"groups": 16, "padding": 1}, (1, 64, 28, 28)),
    "transposed": ((32, 24, 4, 4), {"transposed": True, "stride": 2, "padding": 1}, (1, 32, 14, 14)),
    "transposed 2x2": ((32, 24, 2, 2), {"transposed": True, "stride": 2}, (1, 32, 14, 14)),
    "1d": ((64, 48, 3), {"padding": 1}, (1, 48, 500)),
    "1d dilated": ((64, 64, 3), {"padding": 8, "dilation": 8}, (1, 64, 500)),
    "3d": ((32, 32, 3, 3, 3), {"padding": 1}, (1, 32, 6, 14, 14)),
    "3d depth": ((32, 32, 3, 1, 1), {"padding": (1, 0, 0)}, (1, 32, 8, 14, 14)),
    "linear": ((500, 300), {}, (1, 300)),
    "linear batch": ((500, 300), {}, (40, 300)),
    "reflect": ((24, 16, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (3, 16, 33, 31)),
}


def rand(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


@pytest.fixture(autouse=True, scope="module")
def no_garbage() -> None:
    gc.collect()


def live() -> int:
    return int(_core.alloc_stats()["live_bytes"])


def supporting(isa: str, name: str, precision: str) -> list[str]:
    """Algorithms that support the layer."""
    shape, arguments, input_shape = LAYERS[name]
    plan = _testing.plan_with_isa(isa, rand(*shape), precision=precision, **arguments)
    return rows_of(plan, input_shape)


def workspace_used(plan: Plan, x: np.ndarray, out: np.ndarray) -> int:
    before = live()
    _testing.alloc_reset_peak()
    plan(x, out=out)
    assert live() == before
    return int(_core.alloc_stats()["peak_bytes"]) - before


# The precision decides which algorithms there are, the instruction set how they pack.
KINDS = [*((_testing.isas()[0], precision) for precision in ("strict", "fp32", "fast")),
         *((isa, "fp32") for isa in _testing.isas()[1:])]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("isa", "precision"), KINDS)
def test_memory_is_what_is_allocated(isa: str, name: str, precision: str) -> None:
    shape, arguments, input_shape = LAYERS[name]
    x, w = rand(*input_shape), rand(*shape)
    for algorithm in supporting(isa, name, precision):
        if algorithm == "ref" and len(input_shape) > 3:
            continue  # slow, and without workspace
        before = live()
        plan = _testing.plan_with_isa(isa, w, precision=precision, **arguments)
        _testing.plan_force(plan, input_shape, algorithm)
        for threads in (1, 2, 3):
            pyconvbn.set_num_threads(threads)
            memory = plan.memory(input_shape)
            assert live() - before == memory["plan"], algorithm
            folded = (int(np.prod(shape)) + plan.output_shape(input_shape)[1]) * 4
            assert memory["weights"] == folded + memory["packed"], algorithm
            assert memory["plan"] - memory["weights"] < 8192, algorithm
            out = np.empty(plan.output_shape(input_shape), np.float32)
            assert memory["output"] == out.nbytes and memory["input"] == x.nbytes
            assert workspace_used(plan, x, out) == memory["workspace"], f"{algorithm}, {threads} threads"
        del plan
        assert live() == before


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("name", ["3x3", "pointwise", "depthwise", "linear", "reflect", "3x3 batch"])
def test_memory_of_other_dtypes(name: str, dtype: str) -> None:
    shape, arguments, input_shape = LAYERS[name]
    x, w = rand(*input_shape, dtype=dtype), rand(*shape, dtype=dtype)
    before = live()
    plan = Plan(w, input_shape=input_shape, **arguments)
    for threads in (1, 3):
        pyconvbn.set_num_threads(threads)
        memory = plan.memory(input_shape)
        assert live() - before == memory["plan"]
        assert workspace_used(plan, x, np.empty(plan.output_shape(input_shape), dtype)) == memory["workspace"]


def test_memory_of_several_shapes() -> None:
    """`plan` counts what all shapes hold, `weights` and `packed` what this one does."""
    before = live()
    plan = Plan(rand(32, 32, 3, 3), padding=1)
    memory = [plan.memory((1, 32, size, size)) for size in (10, 20, 30)]
    assert live() - before == memory[-1]["plan"] > memory[0]["plan"] > memory[0]["weights"]
    assert memory[0]["packed"] > 0 and memory[0]["weights"] == plan.memory((1, 32, 10, 10))["weights"]
    del plan
    assert live() == before


def test_more_shapes_than_a_plan_keeps_are_not_held() -> None:
    plan = Plan(rand(16, 16, 3, 3), padding=1)
    for size in range(3, 11):
        plan(rand(1, 16, size, size))
    held = live()
    memory = plan.memory((1, 16, 40, 40))
    assert memory["packed"] > 0 and live() == held
    plan(rand(1, 16, 40, 40))
    assert live() == held


def layers() -> list[Any]:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        from layers import read_layers
    finally:
        sys.path.remove(str(folder))
    return [pytest.param(layer, id=layer.name) for layer in read_layers(folder / "shapes" / "layers.txt")]


@pytest.mark.parametrize("layer", layers())
def test_workspace_of_the_layer_table(layer: Any) -> None:
    """At most 8 MB or a quarter of input, output and weights, whichever is more, with two threads too."""
    arguments: dict[str, Any] = {}
    if layer.nd:
        arguments = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    if layer.transposed:
        arguments.update(transposed=True, output_padding=layer.output_padding)
    w = np.zeros(layer.weight_shape, np.float32)
    for precision in ("strict", "fp32", "fast"):
        plan = Plan(w, precision=precision, **arguments)
        for threads in (1, 2):
            pyconvbn.set_num_threads(threads)
            memory = plan.memory(layer.input_shape)
            allowed = max(8 << 20, (memory["input"] + memory["output"] + w.nbytes) // 4)
            assert memory["workspace"] <= allowed, (precision, threads, plan.explain(layer.input_shape)["algorithm"])


# -- steady state --------------------------------------------------------------------------------------

STEADY = """
import resource
import numpy as np
import pyconvbn
from pyconvbn import _core

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

rng = np.random.default_rng(0)
for threads in (1, 2):
    pyconvbn.set_num_threads(threads)
    for shape, arguments, input_shape in CASES:
        plan = pyconvbn.Plan(rng.normal(size=shape).astype(np.float32), **arguments)
        x = rng.normal(size=input_shape).astype(np.float32)
        out = np.zeros(plan.output_shape(input_shape), np.float32)
        for call in (lambda: plan(x, out=out), lambda: plan(x)):
            for _ in range(5):
                call()
            # The system may take pages away on its own account; one undisturbed round of several will do.
            for _ in range(6):
                before, bytes_before = faults(), _core.alloc_stats()
                for _ in range(50):
                    call()
                taken, bytes_after = faults() - before, _core.alloc_stats()
                if taken == 0:
                    break
            assert taken == 0, (threads, shape, taken)
            for name in ("live_bytes", "live_blocks", "scratch_kept_bytes"):
                assert bytes_after[name] == bytes_before[name], name
print("steady")
"""


def test_steady_state_takes_no_page_fault() -> None:
    """With out= and without: 50 calls, not one new page."""
    if "sanitize" in _core.build_info()["cflags"]:
        pytest.skip("a sanitizer keeps freed memory aside, so every call gets new pages")
    cases = [LAYERS[name] for name in ("3x3", "3x3 batch", "pointwise", "depthwise", "transposed", "1d", "reflect")]
    cases.append(((256, 64, 1, 1), {}, (1, 64, 56, 56)))  # 3 MB of output
    cases.append(((64, 16, 3, 3), {"padding": 1}, (1, 16, 150, 150)))  # 5.8 MB
    done = subprocess.run([sys.executable, "-c", f"CASES = {cases!r}\n{STEADY}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "steady"


# -- results in recycled memory -------------------------------------------------------------------------


def large() -> tuple[Plan, np.ndarray]:
    x = rand(1, 16, 60, 50)
    return Plan(rand(64, 16, 1, 1), input_shape=x.shape), x


def test_a_result_is_an_ordinary_array() -> None:
    plan, x = large()
    y = plan(x)
    assert type(y) is np.ndarray and y.base is None
    assert y.flags.owndata and y.flags.c_contiguous and y.flags.writeable and y.flags.aligned
    assert y.ctypes.data % 64 == 0
    want = y.copy()
    y += 1
    np.testing.assert_array_equal(y, want + 1)
    np.testing.assert_array_equal(plan(x), want)
    assert sys.getsizeof(y) > y.nbytes


def test_a_result_can_be_resized() -> None:
    plan, x = large()
    want = plan(x)
    for shape in ((10,), (64, 3000), (100, 60, 64), (3 * want.size,)):
        y = plan(x)
        y.resize(shape, refcheck=False)
        kept = min(y.size, want.size)
        np.testing.assert_array_equal(y.reshape(-1)[:kept], want.reshape(-1)[:kept])
        assert not y.reshape(-1)[kept:].any()


def test_memory_of_a_dead_result_is_used_again() -> None:
    plan, x = large()
    before = live()
    y = plan(x)
    assert live() - before == y.nbytes
    at = y.ctypes.data
    view = y[0, 3]
    del y
    z = plan(x)
    assert z.ctypes.data != at, "the view still needs it"
    del view, z
    assert live() == before
    at = plan(x).ctypes.data  # not within the assert, which would keep the array alive
    assert plan(x).ctypes.data == at


def test_results_alive_at_the_same_time_are_different_memory() -> None:
    plan, x = large()
    results = [plan(x * i) for i in range(40)]
    assert len({y.ctypes.data for y in results}) == 40
    for i, y in enumerate(results):
        np.testing.assert_array_equal(y, plan(x * i))


def test_the_pool_is_bounded() -> None:
    plan, x = Plan(rand(64, 16, 1, 1)), rand(1, 16, 200, 200)
    results = [plan(x) for _ in range(30)]  # 10 MB each
    del results
    assert _core.alloc_stats()["scratch_kept_bytes"] <= 64 << 20


def test_results_die_on_other_threads() -> None:
    plan, x = large()
    want, wrong = plan(x), []
    handed: list[np.ndarray] = []

    def work() -> None:
        for _ in range(100):
            handed.append(plan(x))
            y = handed.pop(0) if len(handed) > 3 else plan(x)
            if not np.array_equal(y, want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_without_memory_for_the_pool_numpy_makes_the_result() -> None:
    plan, x = large()
    want = plan(x)
    _testing.scratch_trim()
    _testing.alloc_fail_after(0)
    try:
        y = plan(x)
    except MemoryError:  # of the algorithm's own scratch
        return
    finally:
        _testing.alloc_fail_after(-1)
    np.testing.assert_array_equal(y, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_results_in_a_forked_child() -> None:
    plan, x = large()
    pyconvbn.set_num_threads(1)
    want, y = plan(x), plan(x)
    child = os.fork()
    if child == 0:
        same = np.array_equal(y, want)
        del y
        same = same and np.array_equal(plan(x), want)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(y, want)


def test_faults_are_counted() -> None:
    """The measure the steady-state test relies on."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fresh = np.ones(40 << 20, np.uint8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt > before and fresh[0] == 1
