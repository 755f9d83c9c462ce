# SPDX-License-Identifier: BSD-3-Clause
"""Timing rivals against each other, and the few statistics a table needs."""

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

# One sample is the mean over a burst of calls at least this long: the clock then costs nothing.
BURST_SECONDS = 1e-4
# A rival that is this many times slower than the fastest one is measured twice and then let go.
HOPELESS = 4.0


@dataclass
class Timing:
    """Samples of one rival, in seconds a call."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN for no values. ValueError for a value that is not positive."""
    logs = []
    for value in values:
        if not value > 0:
            raise ValueError(f"geometric mean of positive numbers only, got {value}")
        logs.append(math.log(value))
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def by_kind(kinds: Sequence[str], values: Sequence[float]) -> dict[str, list[float]]:
    """Values gathered under their kind, kinds in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for kind, value in zip(kinds, values, strict=True):
        groups.setdefault(kind, []).append(value)
    return groups


def settle(limit: float = 0.25) -> None:
    """Waits until this process's other threads rest.

    Thread pools spin for a while after their last work (some for tens of milliseconds); the next rival must not
    share the cores with that. The system counts the time of a thread that runs elsewhere at its clock tick only, every
    4 ms at 250 Hz, so the look has to last several of them.
    """
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(0.014)
        if time.process_time() - cpu < 0.2 * (time.perf_counter() - wall):
            return


def _burst(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def interleave(
    calls: dict[str, Callable[[], object]], *, rounds: int, slice_seconds: float = 0.015,
    keep: Collection[str] = (), quiet: Callable[[], None] = settle,
) -> dict[str, Timing]:
    """Times all calls round by round, the starting rival rotating, and returns their samples.

    A slice is a warm-up (one call or a tenth of the slice) and then bursts until `slice_seconds` are used up, at
    least one. `keep`: rivals that are never let go for being slow.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    timings = {name: Timing() for name in calls}
    count = {}
    for name, call in calls.items():
        call()
        once = _burst(call, 1)
        count[name] = max(1, math.ceil(BURST_SECONDS / max(once, 1e-7)))
    running = list(calls)
    for turn in range(rounds):
        start = turn % len(running)
        for name in running[start:] + running[:start]:
            call, samples = calls[name], timings[name].samples
            quiet()
            begin = time.perf_counter()
            while True:
                call()
                if time.perf_counter() - begin >= 0.1 * slice_seconds:
                    break
            begin = time.perf_counter()
            while True:
                samples.append(_burst(call, count[name]))
                if time.perf_counter() - begin >= slice_seconds:
                    break
        if turn == 1:
            fastest = min(timings[name].best for name in running)
            running = [name for name in running
                       if name in keep or timings[name].best <= HOPELESS * fastest]
    return timings
