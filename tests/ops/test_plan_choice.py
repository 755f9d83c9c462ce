# SPDX-License-Identifier: BSD-3-Clause
"""How a plan chooses its algorithm: by estimate, by measurement, by name; and what explain() says about it."""

from __future__ import annotations

import gc
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import Plan, _core
from pyconvbn._core import _testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import rows_of  # noqa: E402

SHAPE = (1, 32, 28, 28)
ESTIMATED = re.compile(r"estimated (\d+\.\d\d) times the time of (\w+)$")
MEASURED = re.compile(r"measured ([\d.e+-]+) us, (\d+\.\d\d) times the time of (\w+)$")
NOT_MEASURED = re.compile(r"not measured: estimated (\d+\.\d\d) times the time of (\w+)$")


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def plan(**arguments: Any) -> Plan:
    return Plan(weights(32, 32, 3, 3), padding=1, **arguments)


def reasons(p: Plan, shape: tuple[int, ...] = SHAPE) -> dict[str, str]:
    return dict(p.explain(shape)["candidates"])


def supported(p: Plan, shape: tuple[int, ...] = SHAPE) -> set[str]:
    """Asked of a plan of the same weights."""
    return set(rows_of(p.update(weights(32, 32, 3, 3)), shape))


def test_every_other_algorithm_has_its_reason() -> None:
    p = plan()
    chosen, able = p.explain(SHAPE)["algorithm"], supported(p)
    assert {"direct", "ref", chosen} <= able
    for name, reason in reasons(p).items():
        if name == chosen:
            assert reason == "chosen"
        elif name == "ref":
            assert reason == "fallback, slower than any other"
        elif name in able:
            found = ESTIMATED.match(reason)
            assert found and found[2] == chosen and float(found[1]) >= 1.0, (name, reason)
        else:
            assert reason and not ESTIMATED.match(reason), (name, reason)


def test_reasons_are_whole_and_printed() -> None:
    facts = plan().explain(SHAPE)
    for name, reason in facts["candidates"]:
        assert len(reason) < 127, "cut off"
        assert name in str(facts) and reason in str(facts)


def test_the_algorithm_named_for_a_shape_stays() -> None:
    p = plan()
    estimated = p.explain(SHAPE)["algorithm"]
    other = next(name for name in sorted(supported(p)) if name not in (estimated, "ref"))
    _testing.plan_force(p, SHAPE, other)
    facts = p.explain(SHAPE)
    assert facts["algorithm"] == other and not facts["tuned"]
    assert re.match(rf"estimated \d\.\d\d times the time of {other}, which was asked for by name", reasons(p)[estimated])
    _testing.plan_force(p, SHAPE, "ref")
    assert reasons(p)[estimated] == "estimated to be faster than ref, which was asked for by name"
    assert p.explain((1, 32, 14, 14))["algorithm"] != "ref", "another shape is another choice"


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    p = plan()
    with pytest.raises(ValueError, match="algorithm: expected one of ") as caught:
        _testing.plan_force(p, SHAPE, "fastest")
    for name in reasons(p):
        assert name in str(caught.value)
    assert "got 'fastest'" in str(caught.value)
    with pytest.raises(ValueError, match=r"supports this shape, got 'depthwise' \(groups"):
        _testing.plan_force(p, SHAPE, "depthwise")


@pytest.mark.parametrize("precision", ["strict", "fp32", "fast"])
def test_the_choice_does_not_depend_on_the_batch_or_the_threads(precision: str, keep_threads: None) -> None:
    names = set()
    for threads in (1, 2, 5):
        pyconvbn.set_num_threads(threads)
        for batch in (1, 2, 64):
            names.add(plan(precision=precision).explain((batch, *SHAPE[1:]))["algorithm"])
    assert len(names) == 1


# -- tune ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["strict", "fp32", "fast"])
def test_tuning_measures_and_says_so(precision: str) -> None:
    listed, tuned = plan(precision=precision), plan(precision=precision, input_shape=SHAPE, tune=True)
    facts, able = tuned.explain(), supported(listed)
    assert facts["tuned"] and facts["algorithm"] in able - {"ref"}
    measured = 0
    for name, reason in facts["candidates"]:
        if name == facts["algorithm"]:
            assert reason == "chosen"
        elif name == "ref":
            assert reason == "fallback, slower than any other"
        elif name in able:
            found = MEASURED.match(reason) or NOT_MEASURED.match(reason)
            assert found and found[found.lastindex or 0] == facts["algorithm"], (name, reason)
            measured += bool(MEASURED.match(reason))
            if MEASURED.match(reason):  # the estimate's choice may stay although it is slower by 2 %
                assert float(found[2]) >= 0.97, reason
        else:
            assert not MEASURED.match(reason) and not NOT_MEASURED.match(reason), (name, reason)
    assert measured == len(facts["seconds"]) - 1 or measured == 0
    assert set(facts["seconds"]) <= able
    assert all(0 < s < 10 for s in facts["seconds"].values())


def test_results_of_a_tuned_plan(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, *SHAPE[1:])).astype(np.float32)
    tuned = plan(input_shape=SHAPE, tune=True, activation="relu")
    again = plan(activation="relu")
    _testing.plan_force(again, SHAPE, tuned.explain()["algorithm"])
    np.testing.assert_array_equal(tuned(x), again(x))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tuned))(x), again(x))
    assert pickle.loads(pickle.dumps(tuned)).explain()["algorithm"] == tuned.explain()["algorithm"]


def test_the_losers_of_tuning_are_freed() -> None:
    def held(make: Any) -> int:
        gc.collect()
        before = _core.alloc_stats()["live_bytes"]
        kept = make()
        gc.collect()
        after = _core.alloc_stats()["live_bytes"]
        assert after - before == kept.memory(SHAPE)["plan"]
        return int(after - before)

    names = set()

    def named() -> Plan:
        p = plan()
        _testing.plan_force(p, SHAPE, next(iter(names)))
        return p

    def tuned() -> Plan:
        p = plan(input_shape=SHAPE, tune=True)
        names.add(p.explain()["algorithm"])
        return p

    with_tuning = held(tuned)
    assert with_tuning == held(named)


def test_tuning_is_for_one_shape() -> None:
    tuned = plan(input_shape=SHAPE, tune=True)
    other = tuned.explain((1, 32, 14, 14))
    assert not other["tuned"] and other["seconds"] == {}


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_tuning_of_other_dtypes(dtype: str) -> None:
    tuned = Plan(weights(8, 8, 3, 3).astype(dtype), input_shape=(1, 8, 9, 9), tune=True)
    facts = tuned.explain()
    assert facts["tuned"] and (facts["algorithm"] == "ref") == (dtype == "float64")
