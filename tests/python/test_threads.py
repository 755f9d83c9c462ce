# SPDX-License-Identifier: BSD-3-Clause
"""Plans under many threads and processes: the same bits, the GIL released, no hang after fork, spawn works."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import Plan
from pyconvbn._core import _testing

pytestmark = pytest.mark.usefixtures("keep_threads")

# name -> (weight shape, constructor arguments, shape of one image); each large enough to be shared by threads
LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "direct": ((48, 40, 3, 3), {"padding": 1}, (40, 23, 29)),
    "direct stride": ((33, 17, 5, 5), {"stride": 2}, (17, 41, 37)),
    "stem": ((16, 3, 7, 7), {"stride": 2, "padding": 3}, (3, 65, 61)),
    "pointwise": ((96, 80, 1, 1), {}, (80, 29, 31)),
    "depthwise": ((64, 1, 3, 3), {"padding": 1, "groups": 64}, (64, 37, 41)),
    "grouped": ((64, 8, 3, 3), {"padding": 1, "groups": 8}, (64, 23, 19)),
    "transposed": ((24, 20, 4, 4), {"stride": 2, "padding": 1, "transposed": True}, (24, 19, 17)),
    "conv1d": ((40, 32, 9), {"padding": 4}, (32, 700)),
    "conv3d": ((24, 12, 3, 3, 3), {"padding": 1}, (12, 7, 13, 11)),
    "linear": ((500, 300), {}, (300,)),
    "reflect": ((24, 16, 3, 3), {"padding": 1, "padding_mode": "reflect"}, (16, 33, 31)),
}


def make(name: str, rng: np.random.Generator, dtype: str = "float32", batch: int = 3) -> tuple[Plan, np.ndarray]:
    shape, arguments, image = LAYERS[name]
    plan = Plan(rng.normal(size=shape).astype(dtype), activation="hardswish", **arguments)
    return plan, rng.normal(size=(batch, *image)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_for_any_thread_count_and_batch_size(name: str, dtype: str, rng: np.random.Generator) -> None:
    plan, x = make(name, rng, dtype, batch=5)
    pyconvbn.set_num_threads(1)
    want = plan(x)
    for threads in (1, 2, 3, 4):
        pyconvbn.set_num_threads(threads)
        np.testing.assert_array_equal(plan(x), want, err_msg=f"{threads} threads")
        for batch in (1, 2, 4):
            np.testing.assert_array_equal(plan(x[:batch]), want[:batch], err_msg=f"{threads} threads, batch {batch}")
        np.testing.assert_array_equal(plan(x[4:]), want[4:])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_eight_threads_on_one_plan(threads: int, rng: np.random.Generator) -> None:
    pyconvbn.set_num_threads(threads)
    plan, x = make("direct", rng)
    inputs = [x * np.float32(1 + i / 8) for i in range(8)]
    want = [plan(a) for a in inputs]
    start = threading.Barrier(8)

    def work(i: int) -> bool:
        start.wait()
        out = np.empty_like(want[i])
        return all((plan(inputs[i], out=out) == want[i]).all() for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_eight_threads_meet_new_shapes(rng: np.random.Generator) -> None:
    """The first use of a shape by all of them at once, more shapes than a plan keeps."""
    w = rng.integers(-3, 4, (8, 4, 3, 3)).astype(np.float32)
    x = rng.integers(-3, 4, (1, 4, 48, 48)).astype(np.float32)
    want = {size: Plan(w)(x[..., :size, :]) for size in range(3, 45)}
    plan, start = Plan(w), threading.Barrier(8)

    def work(i: int) -> bool:
        start.wait()
        return all((plan(x[..., :size, :]) == y).all() for size, y in want.items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_threads_change_while_plans_run(rng: np.random.Generator) -> None:
    plan, x = make("pointwise", rng)
    want, stop = plan(x), threading.Event()

    def change() -> None:
        n = 0
        while not stop.is_set():
            n = n % 4 + 1
            pyconvbn.set_num_threads(n)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        assert all((plan(x) == want).all() for _ in range(100))
    finally:
        stop.set()
        changer.join()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_a_worker_leaves_the_processor_of_the_caller(rng: np.random.Generator) -> None:
    """Else the two of them take turns for as long as the system leaves it there."""
    get_cpu = ctypes.CDLL(None).sched_getcpu
    pyconvbn.set_num_threads(2)
    plan, x = make("direct", rng)
    plan(x)
    worker = next(int(task.name) for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "pyconvbn-1\n")
    for cpu in sorted(os.sched_getaffinity(0))[:2]:
        os.sched_setaffinity(worker, {cpu})
        end = time.monotonic() + 30
        while get_cpu() == cpu and os.sched_getaffinity(worker) == {cpu} and time.monotonic() < end:
            plan(x)
        assert get_cpu() != cpu or os.sched_getaffinity(worker) != {cpu}
    assert os.sched_getaffinity(worker) < os.sched_getaffinity(0)


def runs_beside(call: Callable[[], Any]) -> bool:
    """Whether another thread gets the GIL before `call` has returned, when nobody is asked to give it up."""
    started, finished = threading.Event(), [False]

    def work() -> None:
        started.set()
        call()
        finished[0] = True

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=work)
    try:
        sys.setswitchinterval(1000.0)
        thread.start()
        started.wait()
        beside = not finished[0]
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    return beside


def test_the_gil_is_released(rng: np.random.Generator) -> None:
    plan, x = make("direct", rng, batch=16)
    plan(x)
    out = np.empty(plan.output_shape(x.shape), np.float32)
    w = np.zeros((512, 512, 3, 3), np.float32)
    assert any(runs_beside(lambda: plan(x, out=out)) for _ in range(5))
    assert any(runs_beside(lambda: Plan(w, input_shape=(1, 512, 9, 9))) for _ in range(5))
    big = np.ones((64, 64, 64, 64), np.float32)
    assert any(runs_beside(lambda: pyconvbn.functional.relu(big)) for _ in range(5))


def test_the_gil_test_can_fail() -> None:
    """Something that keeps the GIL for tens of milliseconds."""
    assert not any(runs_beside(lambda: sum(range(10**6))) for _ in range(3))


# -- processes ---------------------------------------------------------------------------------------


def in_forked_child(work: Callable[[], np.ndarray], seconds: float = 60.0) -> np.ndarray:
    """Result of `work` in a fork of this process; fails instead of hanging."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child(end: multiprocessing.connection.Connection) -> None:
        end.send(work())

    with warnings.catch_warnings():  # newer Pythons warn that a process with threads is being forked: that is the test
        warnings.simplefilter("ignore", DeprecationWarning)
        process = context.Process(target=child, args=(theirs,))
        process.start()
    try:
        assert ours.poll(seconds), "the forked child hangs"
        result: np.ndarray = ours.recv()
        process.join(seconds)
        assert process.exitcode == 0
        return result
    finally:
        process.kill()
        process.join()


def test_fork_after_the_pool_has_run(rng: np.random.Generator) -> None:
    pyconvbn.set_num_threads(4)
    plan, x = make("direct", rng)
    want = plan(x)
    np.testing.assert_array_equal(in_forked_child(lambda: plan(x)), want)
    np.testing.assert_array_equal(in_forked_child(lambda: plan(x[..., :-1])), plan(x[..., :-1]))
    np.testing.assert_array_equal(plan(x), want)


def test_a_forked_child_may_fork_and_change_threads(rng: np.random.Generator) -> None:
    pyconvbn.set_num_threads(3)
    plan, x = make("pointwise", rng)
    want = plan(x)

    def work() -> np.ndarray:
        pyconvbn.set_num_threads(2)
        first = plan(x)
        second = in_forked_child(lambda: plan(x), 30.0)
        return first if (first == second).all() else np.zeros(0)

    np.testing.assert_array_equal(in_forked_child(work), want)


def test_fork_while_other_threads_run(rng: np.random.Generator) -> None:
    pyconvbn.set_num_threads(2)
    plan, x = make("direct", rng)
    want, stop = plan(x), threading.Event()

    def hammer(i: int) -> None:
        height = 9 + i
        while not stop.is_set():
            plan(x)
            Plan(np.ones((4, 40, 3, 3), np.float32))(x[..., :height, :])

    threads = [threading.Thread(target=hammer, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            np.testing.assert_array_equal(in_forked_child(lambda: plan(x)), want)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_spawn(rng: np.random.Generator) -> None:
    """A plan is a picklable function: it travels to a new process with its choices."""
    plan, x = make("depthwise", rng)
    _testing.plan_force(plan, x.shape, "ref")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got, again = pool.map_async(plan, [x, x[:1]]).get(timeout=120)
    np.testing.assert_array_equal(got, plan(x))
    np.testing.assert_array_equal(again, plan(x[:1]))


def test_exit_with_running_daemon_threads() -> None:
    """The interpreter may go away while a kernel runs."""
    code = (
        "import threading, numpy as np, pyconvbn\n"
        "plan = pyconvbn.Plan(np.ones((64, 64, 3, 3), np.float32), padding=1)\n"
        "x = np.ones((8, 64, 56, 56), np.float32)\n"
        "def loop():\n"
        "    while True: plan(x)\n"
        "for _ in range(3): threading.Thread(target=loop, daemon=True).start()\n"
        "plan(x)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("environment", "count", "source"),
    [
        ({"PYCONVBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, 3, "PYCONVBN_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5"}, 5, "OMP_NUM_THREADS"),
        ({}, None, None),
    ],
)
def test_thread_count_from_the_environment(environment: dict[str, str], count: int | None, source: str | None) -> None:
    code = (
        "import pyconvbn._core as c\n"
        "print(c.get_num_threads(), c.num_threads_source(), sep=';')\n"
        "c.set_num_threads(7)\n"
        "print(c.get_num_threads(), c.num_threads_source(), sep=';')"
    )
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYCONVBN_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    first, second = (line.split(";") for line in done.stdout.splitlines())
    assert second == ["7", "set_num_threads"]
    if count is None:
        assert first[1] in ("affinity", "cgroup quota") and int(first[0]) <= len(os.sched_getaffinity(0))
    else:
        assert first == [str(count), source]
