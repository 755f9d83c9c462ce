# SPDX-License-Identifier: BSD-3-Clause
"""Failing allocations, leaks, references, garbage collection."""

from __future__ import annotations

import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pyconvbn
import pyconvbn.functional as F
from pyconvbn import BatchNormParams, Plan, _core
from pyconvbn._core import _testing


@pytest.fixture(autouse=True)
def no_injection_left() -> Iterator[None]:
    yield
    _testing.alloc_fail_after(-1)


def live() -> tuple[int, int]:
    gc.collect()
    stats = _core.alloc_stats()
    return stats["live_bytes"], stats["live_blocks"]


def rand(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


BN = BatchNormParams(rand(8), rand(8), rand(8), np.abs(rand(8)) + 1, 1e-5)

# Each returns the result of a complete use: construction, preparation, run.
USES: dict[str, Callable[[], Any]] = {
    "direct": lambda: Plan(rand(8, 4, 3, 3), rand(8), bn=BN, padding=1)(rand(2, 4, 9, 9)),
    "direct prepared": lambda: Plan(rand(8, 4, 3, 3), input_shape=(1, 4, 9, 9))(rand(2, 4, 9, 9)),
    "pointwise": lambda: Plan(rand(8, 16, 1, 1), bn=BN, activation="silu")(rand(2, 16, 9, 9)),
    "depthwise": lambda: Plan(rand(8, 1, 3, 3), groups=8, padding=1)(rand(2, 8, 9, 9)),
    "transposed": lambda: Plan(rand(4, 8, 4, 4), transposed=True, stride=2)(rand(2, 4, 9, 9)),
    "linear": lambda: Plan(rand(8, 30), bn=BN)(rand(5, 30)),
    "float64": lambda: Plan(rand(8, 4, 3, dtype="float64"))(rand(2, 4, 9, dtype="float64")),
    "float16": lambda: Plan(rand(8, 4, 3, 3, dtype="float16"), activation="relu")(
        rand(2, 4, 9, 9, dtype="float16"), residual=rand(2, 8, 7, 7, dtype="float16")
    ),
    "reflect": lambda: Plan(rand(8, 4, 3, 3), padding=1, padding_mode="reflect")(rand(2, 4, 9, 9)),
    "residual": lambda: Plan(rand(8, 8, 3, 3), padding=1, activation="hardswish")(
        rand(2, 8, 9, 9), residual=rand(2, 8, 9, 9)
    ),
    "tune": lambda: Plan(rand(8, 4, 1, 1), input_shape=(1, 4, 9, 9), tune=True)(rand(2, 4, 9, 9)),
    "functional": lambda: F.conv2d(rand(2, 4, 9, 9), rand(8, 4, 3, 3), rand(8)),
    "conv_bn": lambda: pyconvbn.efficient_conv_bn_eval_decomposed(
        *BN, F.conv2d, rand(8, 4, 3, 3), None, rand(2, 4, 9, 9), (1, 1)
    ),
    "fold": lambda: pyconvbn.fuse_conv_bn_weights(
        rand(8, 4, 3, 3), rand(8), BN.running_mean, BN.running_var, 1e-5, BN.weight, BN.bias
    ),
    "batch_norm": lambda: F.batch_norm(rand(2, 8, 9), BN.running_mean, BN.running_var, BN.weight, BN.bias),
    "explain": lambda: str(Plan(rand(8, 4, 3, 3)).explain((1, 4, 9, 9))).encode(),
    "pickle": lambda: pickle.loads(pickle.dumps(Plan(rand(8, 4, 3, 3), input_shape=(1, 4, 9, 9))))(rand(1, 4, 9, 9)),
    "update": lambda: Plan(rand(8, 4, 3, 3)).update(rand(8, 4, 3, 3), None, BN)(rand(1, 4, 9, 9)),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("use", USES)
def test_every_allocation_may_fail(use: str, threads: int) -> None:
    """At each allocation in turn: a MemoryError, nothing leaked, and the next call works."""
    pyconvbn.set_num_threads(threads)
    call = USES[use]
    want = call()
    _testing.scratch_trim()
    before, failures = live(), 0
    for n in range(1000):
        _testing.alloc_fail_after(n)
        try:
            got = call()
        except MemoryError as error:
            message, got = str(error), None
            failures += 1
        finally:
            _testing.alloc_fail_after(-1)
        if got is not None:
            break
        assert "out of memory" in message or use == "tune", message
        _testing.scratch_trim()
        assert live() == before, f"allocation {n} leaks"
        assert same(call(), want)
        _testing.scratch_trim()
    assert same(got, want)
    allocates = use not in ("fold", "batch_norm")
    assert failures > 0 or not allocates, "nothing was injected"


def test_a_failed_run_leaves_plan_and_arguments_as_they_were() -> None:
    x, residual = rand(2, 8, 9, 9), rand(2, 8, 9, 9)
    plan = Plan(rand(8, 8, 3, 3), padding=1)
    want = Plan(rand(8, 8, 3, 3), padding=1)(x, residual=residual)
    keep = x.copy(), residual.copy()
    _testing.alloc_fail_after(0)
    with pytest.raises(MemoryError):
        plan(x, residual=residual)
    assert same((x, residual), keep)
    assert same(plan(x, residual=residual), want)


@pytest.mark.parametrize("use", USES)
def test_no_block_is_lost(use: str) -> None:
    USES[use]()
    _testing.scratch_trim()
    before = live()
    for _ in range(5):
        USES[use]()
    _testing.scratch_trim()
    assert live() == before


def test_steady_state_allocates_nothing() -> None:
    plan, x = Plan(rand(16, 8, 3, 3), padding=1), rand(2, 8, 20, 20)
    out = plan(x)
    before = _core.alloc_stats()
    for _ in range(50):
        plan(x, out=out)
    after = _core.alloc_stats()
    assert after["live_bytes"] == before["live_bytes"] and after["live_blocks"] == before["live_blocks"]
    assert after["peak_bytes"] == before["peak_bytes"]


def test_many_shapes_do_not_grow_a_plan_without_end() -> None:
    plan, x = Plan(rand(8, 4, 3, 3)), rand(1, 4, 200, 5)

    def use_all() -> tuple[int, int]:
        for size in range(3, 200):
            plan(x[:, :, :size])
        _testing.scratch_trim()
        return live()

    assert use_all() == use_all()


# -- references ----------------------------------------------------------------------------------------

BAD_CALLS: dict[str, Callable[[np.ndarray, np.ndarray, Plan], Any]] = {
    "input type": lambda x, w, plan: plan([1.0]),
    "input dtype": lambda x, w, plan: plan(x.astype(int)),
    "input channels": lambda x, w, plan: plan(x[:, :2]),
    "input axes": lambda x, w, plan: plan(x[0, 0]),
    "residual": lambda x, w, plan: plan(x, residual=x),
    "residual dtype": lambda x, w, plan: plan(x, residual=x.astype("f8")),
    "out shape": lambda x, w, plan: plan(x, out=x),
    "out type": lambda x, w, plan: plan(x, out=3),
    "keyword": lambda x, w, plan: plan(x, what=1),
    "geometry": lambda x, w, plan: Plan(w, stride=(1, 2, 3)),
    "groups": lambda x, w, plan: Plan(w, groups=3),
    "bias": lambda x, w, plan: Plan(w, x),
    "bn type": lambda x, w, plan: Plan(w, bn=object()),
    "bn length": lambda x, w, plan: Plan(w, bn=BN._replace(running_mean=rand(3))),
    "shape": lambda x, w, plan: Plan(w, input_shape=(1, 4, 1, 1)),
    "explain": lambda x, w, plan: plan.explain((1, 2)),
    "functional": lambda x, w, plan: F.conv2d(x, w, dilation="a"),
    "fold": lambda x, w, plan: pyconvbn.fuse_conv_bn_weights(w, None, x, x, 1e-5, None, None),
    "update": lambda x, w, plan: plan.update(w[:2]),
    "from modules": lambda x, w, plan: Plan.from_modules(object()),
}
GOOD_CALLS: dict[str, Callable[[np.ndarray, np.ndarray, Plan], Any]] = {
    "call": lambda x, w, plan: plan(x),
    "strided": lambda x, w, plan: plan(x[..., ::-1]),
    "swapped": lambda x, w, plan: plan(x.astype(">f4")),
    "residual": lambda x, w, plan: plan(x, residual=plan(x)),
    "construct": lambda x, w, plan: Plan(w, bn=BN, activation=("leaky_relu", 0.1), input_shape=x.shape),
    "output_shape": lambda x, w, plan: plan.output_shape(x.shape),
    "explain": lambda x, w, plan: plan.explain(x.shape),
    "memory and cost": lambda x, w, plan: (plan.memory(x.shape), plan.cost(x.shape), plan.halo()),
    "params": lambda x, w, plan: (plan.params, plan.dtype, repr(plan), plan._repr_html_()),
    "pickle": lambda x, w, plan: pickle.loads(pickle.dumps(plan, 5)),
    "reduce": lambda x, w, plan: plan.__reduce_ex__(5),
    "update": lambda x, w, plan: plan.update(w, bn=BN),
    "functional": lambda x, w, plan: F.conv2d(x, w, padding="same"),
    "fold": lambda x, w, plan: pyconvbn.fuse_conv_bn_weights(w, None, *BN[2:], *BN[:2]),
    "info": lambda x, w, plan: (_core.cpu_info(), _core.build_info(), _core.alloc_stats(), _testing.isas()),
}


@pytest.mark.parametrize(("kind", "name"), [*(("good", n) for n in GOOD_CALLS), *(("bad", n) for n in BAD_CALLS)])
def test_no_reference_is_lost(kind: str, name: str) -> None:
    x, w = rand(1, 4, 9, 9), rand(8, 4, 3, 3)
    plan = Plan(w, input_shape=x.shape)
    call = (GOOD_CALLS if kind == "good" else BAD_CALLS)[name]

    def use() -> None:
        if kind == "good":
            call(x, w, plan)
        else:
            with pytest.raises((TypeError, ValueError)):
                call(x, w, plan)

    watched: list[Any] = [x, w, plan, plan.dtype, *BN[:4], None, Plan]
    for _ in range(20):
        use()
    gc.collect()
    counts, objects = [sys.getrefcount(o) for o in watched], len(gc.get_objects())
    bytes_before = live()
    for _ in range(200):
        use()
    gc.collect()
    lost = [sys.getrefcount(o) - c for o, c in zip(watched, counts)]
    assert max(map(abs, lost)) < 50, lost  # 200 calls would lose 200
    assert len(gc.get_objects()) - objects < 50
    _testing.scratch_trim()
    assert live()[1] <= bytes_before[1]


def test_process_memory_stays() -> None:
    """What neither the garbage collector nor our own counters see."""
    from pathlib import Path

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    x, w = rand(1, 16, 40, 40), rand(64, 16, 3, 3)

    def use() -> None:
        plan = pickle.loads(pickle.dumps(Plan(w, input_shape=x.shape), 5))
        plan(x, residual=plan(x))
        plan(x[..., ::-1])
        with pytest.raises(ValueError):
            plan(x[:, :3])

    for _ in range(50):
        use()
    before = resident()
    for _ in range(300):  # one lost weight array a round would be 11 MB
        use()
    assert resident() - before < 6 << 20


def test_weak_references() -> None:
    plan = Plan(rand(2, 2))
    seen: list[Any] = []
    ref = weakref.ref(plan, seen.append)
    assert ref() is plan and weakref.getweakrefcount(plan) == 1
    del plan
    assert ref() is None and seen == [ref]


def test_a_plan_does_not_keep_its_arguments() -> None:
    w, x = rand(2, 2), rand(1, 2)
    refs = [weakref.ref(w), weakref.ref(x)]
    plan = Plan(w)
    plan(x)
    del w, x
    assert [r() for r in refs] == [None, None]
    assert plan.dtype == np.float32


def test_a_weight_view_keeps_the_plan() -> None:
    plan = Plan(rand(2, 2))
    weight, want = plan.__reduce_ex__(5)[1][0], rand(2, 2)
    ref = weakref.ref(plan)
    del plan
    assert ref() is not None
    np.testing.assert_array_equal(weight, want)
    del weight
    assert ref() is None


def test_the_garbage_collector_sees_plans() -> None:
    plan = Plan(rand(2, 2), input_shape=(3, 2))
    assert gc.is_tracked(plan) and (3, 2) in gc.get_referents(plan)


def test_memory_is_given_back() -> None:
    _testing.scratch_trim()
    before = live()
    plan = Plan(rand(64, 64, 3, 3), input_shape=(1, 64, 20, 20))
    assert live()[0] - before[0] >= 64 * 64 * 9 * 4
    assert live()[0] - before[0] == pytest.approx(plan.memory((1, 64, 20, 20))["weights"], rel=0.1)
    del plan
    assert live() == before
