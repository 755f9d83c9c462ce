# SPDX-License-Identifier: BSD-3-Clause
"""Random graphs before and after the elimination of common subexpressions: equal bit for bit, in what they return, in
what they write and in which of it shares memory."""

from __future__ import annotations

import collections
import copy
import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import functional as F
from pyconvbn import fx, nn, passes
from pyconvbn.freeze_report import FreezeRow
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from cse_util import run_cse  # noqa: E402
from random_nets import RandomNet  # noqa: E402

SIZE = 4
LITERALS: list[Any] = [1, True, 2, -1, 0, 3]


def nobody_knows(x: Any) -> Any:
    return x[::1]


def nobody_knows_writes(x: Any) -> Any:
    x += 1
    return x.copy()


class Bump(nn.Module):
    """Not known to the passes: writes its buffer and returns something new."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", np.ones((SIZE, SIZE), np.int64))

    def forward(self, x: Any) -> Any:
        self.count += x
        return self.count * 2


class Root(nn.Module):
    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        for name in ("p", "q"):
            self.register_buffer(name, rng.integers(-3, 4, (SIZE, SIZE)))
        self.same = self.p
        self.view = self.q[1:, :1]
        self.bump = Bump()
        self.relu = nn.Identity()
        self.eval()


class Maker:
    """A graph of integer arithmetic with views, lists, writes, attributes and calls that nobody knows."""

    def __init__(self, seed: int, length: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.root = Root(self.rng)
        self.g = fx.Graph()
        self.full = [self.g.placeholder(n) for n in "xy"]  # matrices
        self.rows: list[Any] = []  # vectors
        self.calls: list[tuple[str, Any, tuple[Any, ...], dict[str, Any], list[Any] | None]] = []
        while len(self.calls) < length:
            self.step()
        values = self.full + self.rows
        self.g.output([self.pick(values) for _ in range(int(self.rng.integers(1, 5)))])
        self.gm = fx.GraphModule(self.root, self.g)
        self.gm.graph.lint()

    def pick(self, items: list[Any]) -> Any:
        """Mostly one of the last few."""
        recent = items[-8:] if self.rng.random() < 0.6 else items
        return recent[int(self.rng.integers(len(recent)))]

    def add(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None,
            into: list[Any] | None = None) -> Any:
        node = self.g.create_node(op, target, args, kwargs or {})
        self.calls.append((op, target, args, kwargs or {}, into))
        if into is not None:
            into.append(node)
        return node

    def call(self, target: Any, *args: Any, into: list[Any] | None = None, **kwargs: Any) -> Any:
        return self.add("call_function", target, args, kwargs, into)

    def step(self) -> None:
        rng = self.rng
        if self.calls and rng.random() < 0.45:  # the same again
            self.add(*self.pick(self.calls))
            return
        matrix = rng.random() < 0.8 or not self.rows
        family = self.full if matrix else self.rows
        a, b = self.pick(family), self.pick([*family, *LITERALS])
        kind = rng.choice(["binary", "alpha", "view", "list", "write", "attr", "unknown", "module"],
                          p=[0.42, 0.08, 0.16, 0.08, 0.1, 0.1, 0.03, 0.03])
        if kind == "binary":
            target = [operator.add, operator.sub, operator.mul][int(rng.integers(3))]
            self.call(target, *((a, b) if rng.random() < 0.7 else (b, a)), into=family)
        elif kind == "alpha":
            form = int(rng.integers(3))
            b = self.pick(family)
            if form == 0:
                self.call(aten.add.Tensor, a, b, into=family)
            elif form == 1:
                self.call(aten.add.Tensor, a, b, alpha=1, into=family)
            else:
                self.add("call_function", aten.add.Tensor, (), {"other": b, "self": a, "alpha": int(rng.integers(1, 3))}, family)
        elif kind == "view":
            self.view(a, matrix)
        elif kind == "list" and matrix:
            parts = self.call(aten.split.Tensor, a, 2) if rng.random() < 0.7 else self.call(aten.unbind.int, a)
            if rng.random() < 0.2:
                self.add("call_method", "reverse", (parts,))
            part = self.call(operator.getitem, parts, int(rng.integers(2)))
            self.call(aten.sum.dim_IntList, part, [0], True)
        elif kind == "write":
            self.write(a, b)
        elif kind == "attr":
            name = ["p", "q", "same", "bump.count"][int(rng.integers(4))]
            self.full.append(self.g.get_attr(name))
        elif kind == "unknown":
            self.call(nobody_knows if rng.random() < 0.5 else nobody_knows_writes, a, into=family)
        elif kind == "module" and matrix:
            self.add("call_module", "bump" if rng.random() < 0.5 else "relu", (a,), None, family)

    def view(self, a: Any, matrix: bool) -> None:
        form = int(self.rng.integers(4)) if matrix else 3
        if form == 0:
            self.call(operator.getitem, a, int(self.rng.integers(SIZE)), into=self.rows)
        elif form == 1:
            self.call(getattr, a, "T", into=self.full)
        elif form == 2:
            size = (SIZE, SIZE) if self.rng.random() < 0.5 else ((SIZE, SIZE),)
            self.add("call_method", "reshape", (a, *size), None, self.full)
        else:
            items = slice(None, None, -1 if self.rng.random() < 0.5 else None)
            self.call(operator.getitem, a, items, into=self.full if matrix else self.rows)

    def write(self, a: Any, b: Any) -> None:
        form = int(self.rng.integers(4))
        literal = LITERALS[int(self.rng.integers(len(LITERALS)))]
        if form == 0:
            self.call(aten.add_.Tensor, a, b)
        elif form == 1:
            self.call(operator.setitem, a, int(self.rng.integers(SIZE)), int(literal))
        elif form == 2:
            self.call(operator.iadd, a, b, into=None)
        else:
            self.call(aten.fill_.Scalar, a, int(literal))


def behaviour(maker: Maker, seed: int) -> tuple[list[Any], list[list[bool]]]:
    """All that can be seen from outside of two calls: results, inputs and parameters, and who shares memory."""
    rng = np.random.default_rng(seed)
    seen: list[Any] = []
    for _ in range(2):
        inputs = [rng.integers(-3, 4, (SIZE, SIZE)) for _ in "xy"]
        with np.errstate(over="ignore"):
            seen += [*maker.gm(*inputs), *inputs]
    root = maker.root
    seen += [root.p, root.q, root.same, root.view, root.bump.count]
    return [np.array(v, copy=True) for v in seen], [[np.shares_memory(a, b) for b in seen] for a in seen]


def compare(seed: int, length: int) -> list[FreezeRow]:
    before, after = Maker(seed, length), Maker(seed, length)
    rows = run_cse(after.gm)
    want, want_shared = behaviour(before, seed)
    got, got_shared = behaviour(after, seed)
    assert got_shared == want_shared
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return rows


@pytest.mark.parametrize("block", range(10))
def test_random_arithmetic(block: int) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(block * 30, block * 30 + 30):
        counts.update(row.reason for row in compare(seed, int(np.random.default_rng(seed).integers(5, 60))))
    assert counts["OK"] > 30, counts
    for reason in ("MUTATED", "ALIASES_OUTPUT", "IMPURE", "UNKNOWN"):
        assert counts[reason] > 0, counts


@pytest.mark.parametrize("aten_form", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_random_networks(seed: int, aten_form: bool) -> None:
    """Run twice over in one graph: everything but BatchNorm in training becomes one."""
    net = RandomNet(seed)
    x = net.example(np.random.default_rng(seed))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Any) -> Any:
            return [v * 1.0 for part in (self.net.forward(x), self.net.forward(x)) for v in as_list(part)]

    def as_list(value: Any) -> list[Any]:
        return list(value) if isinstance(value, tuple) else [value]

    gm = fx.symbolic_trace(Twice())
    if aten_form:
        gm = fx.to_aten(gm)
    other = copy.deepcopy(gm)
    rows = run_cse(gm)
    for _ in range(2):
        for a, b in zip(gm(x), other(x), strict=True):
            assert a.tobytes() == b.tobytes()
    calls = [n for n in other.graph.nodes if n.op.startswith("call")]
    if not any(row.reason == "TRAINING" for row in rows):
        assert sum(row.outcome == "done" for row in rows) >= (len(calls) - 2 * len(net.outputs)) // 2


def test_two_runs_are_alike() -> None:
    """Hashes are seeded, results do not depend on them."""
    for seed in range(20):
        a, b = Maker(seed, 50).gm, Maker(seed, 50).gm
        assert passes.cse(a) == passes.cse(b) and str(a.graph) == str(b.graph)


def test_functions_in_eval_and_training() -> None:
    rng = np.random.default_rng(3)
    mean, var = rng.normal(size=3), rng.uniform(1, 2, 3)

    def forward(x: Any) -> Any:
        a = F.batch_norm(x, mean, var) + F.batch_norm(x, mean, var, None, None, False, 0.1, 1e-5)
        b = F.batch_norm(x, mean, var, training=True) + F.batch_norm(x, mean, var, training=True)
        return a + b + F.batch_norm(x, mean, var) + F.batch_norm(x, mean, var)

    x = rng.normal(size=(4, 3))
    start = mean.copy(), var.copy()
    gm = fx.symbolic_trace(forward)
    want, stats = gm(x), (mean.copy(), var.copy())
    rows = run_cse(gm)
    assert [row.reason for row in rows] == ["OK", "TRAINING", "MUTATED", "OK"]
    mean[...], var[...] = start
    np.testing.assert_array_equal(gm(x), want)
    np.testing.assert_array_equal((mean, var), stats)
