# SPDX-License-Identifier: BSD-3-Clause
"""Memory that runs out in the middle of freezing: nothing has changed, nothing is lost, and the next call is right."""

from __future__ import annotations

import copy
import gc
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import _core, fx, nn
from pyconvbn import functional as F
from pyconvbn._lower import lower_modules
from pyconvbn._pass_plans import prepare_layers
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import randomise  # noqa: E402

RNG = np.random.default_rng(11)
X = RNG.normal(size=(2, 4, 6, 6)).astype(np.float32)


def array(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


class Everything(nn.Module):
    """Something to do for each step of freezing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.one, self.two = nn.Parameter(array(24, 3)), nn.Parameter(array(24, 3))
        self.scale, self.shift = nn.Parameter(array(4, 1, 1)), nn.Parameter(array(4, 1, 1))
        self.counter = nn.Parameter(np.zeros(3, np.float32))
        randomise(self, np.random.default_rng(5))

    def forward(self, x: Any) -> Any:
        a = F.relu(self.bn1(self.conv1(x)))
        b = self.conv2(x) * (self.scale * 2.0) + self.shift
        y = F.relu(a + b) + self.bn2(x + x) + (x + x)
        flat = aten.view.default(aten.clone.default(y), [-1, 24])
        p, q = aten.mm.default(flat, self.one), aten.mm.default(flat, self.two)
        aten.add_.Tensor(self.counter, 1.0)
        window = aten.as_strided.default(p + q, [4, 3], [3, 1])
        return window, aten.permute.default(y, [0, 2, 3, 1])


def module_state(module: Any) -> Any:
    return {name: (id(value), value.tobytes()) for name, value in module.state_dict(keep_vars=True).items()}


def graph_state(gm: Any) -> Any:
    """All that a failed call may not change."""
    return (
        str(gm.graph), [(n.name, list(n.meta), [u.name for u in n.users], _core.op_tensor(n)) for n in gm.graph.nodes],
        sorted(vars(gm)), dict(gm._kinds), sorted(gm.meta),
    )


def with_memory_for(n: int, use: Callable[[Any], Any], given: Any) -> Any:
    """What `use(given)` gives with memory for n allocations, None without; nothing of a failed call stays alive."""
    _core._testing.alloc_fail_after(n)
    try:
        return use(given)
    except MemoryError:
        return None
    finally:
        _core._testing.alloc_fail_after(-1)


def all_failures(make: Callable[[], Any], use: Callable[[Any], Any], state: Callable[[Any], Any]) -> int:
    """Lets the first, the second, ... allocation of `use(make())` fail, until none does. How often the call failed.

    A failure may be passed over where the result is the same without that memory."""
    wanted = use(make())  # whatever is kept from a first call on is there now
    failed = 0
    gc.collect()
    for n in range(5000):
        live = _core.alloc_stats()["live_blocks"]
        given = make()
        before = state(given)
        counted = _core.alloc_stats()["total_allocs"]
        found = with_memory_for(n, use, given)
        if found is not None:
            assert found == wanted, f"allocation {n}"
            if _core.alloc_stats()["total_allocs"] - counted <= n:
                return failed
        else:
            failed += 1
            assert state(given) == before, f"allocation {n}"
            given.graph.lint()
        del given, before, found
        gc.collect()
        assert _core.alloc_stats()["live_blocks"] <= live, f"allocation {n}: something is lost"
    raise AssertionError("it never had enough memory")


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """What was there before the test is not looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("shapes", "discard"), [(False, True), (True, False)], ids=["discard", "shapes"])
def test_freeze(shapes: bool, discard: bool) -> None:
    net = Everything()
    inputs = X if shapes else None
    reference = fx.symbolic_trace(copy.deepcopy(net))(X)

    def state(gm: Any) -> Any:
        return graph_state(gm), module_state(gm), module_state(gm._traced_module())

    modules: list[Any] = []  # traced modules are referred to weakly

    def make() -> Any:
        modules[:] = [copy.deepcopy(net)]
        return fx.symbolic_trace(modules[0])

    def use(gm: Any) -> Any:
        frozen, preserved = pyconvbn.freeze(gm, inputs, discard_parameters=discard)
        return str(frozen.graph), str(frozen.report), preserved

    assert all_failures(make, use, state) > 200
    frozen, _ = pyconvbn.freeze(make(), inputs, discard_parameters=discard)
    for got, wanted in zip(frozen(X), reference, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_prepare_layers() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = F.relu(self.one(x) + self.two(x))
        y = aten.batch_norm.default(y, None, None, self.mean, self.var, False, 0.1, 1e-5, True)
        return operator.matmul(y, self.weight), self.one(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.mean, self.var = nn.Parameter(array(4)), nn.Parameter(abs(array(4)) + 1)
            self.weight = nn.Parameter(array(6, 5))

        def forward(self, x: Any) -> Any:
            return forward(self, x)

    gm = fx.symbolic_trace(Net().eval())
    lower_modules(gm)
    fx.shape_prop(gm, X)

    def use(twin: Any) -> Any:
        rows: list[Any] = []
        assert prepare_layers(twin, report=rows) == len([row for row in rows if row.outcome == "done"]) == 7
        return str(twin.graph), [str(row) for row in rows]

    assert all_failures(lambda: copy.deepcopy(gm), use, lambda twin: (graph_state(twin), module_state(twin))) > 40
