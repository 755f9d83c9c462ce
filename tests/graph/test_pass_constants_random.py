# SPDX-License-Identifier: BSD-3-Clause
"""passes.constant_fold on random graphs: not a bit of the results changes, whatever callers do with them."""

from __future__ import annotations

import copy
import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import fx, ops

sys.path.insert(0, str(Path(__file__).parent))
from constants_util import arrays, fold, same  # noqa: E402

A = ops.aten


def random_graph(rng: np.random.Generator) -> Any:
    """Arithmetic, views, lists, copies written in place, of parameters and of the input; some results are returned."""
    graph = fx.Graph()
    root: dict[str, Any] = {}
    x = graph.placeholder("x")
    pool: list[tuple[Any, Any]] = [(x, rng.standard_normal((3, 4)).astype(np.float32))]
    for i in range(4):
        dtype = rng.choice(["float16", "float32", "float32", "float64"])
        root[f"w{i}"] = rng.standard_normal((3, 4)).astype(dtype)
        pool.append((graph.get_attr(f"w{i}"), root[f"w{i}"].copy()))

    def pick() -> tuple[Any, Any]:
        return pool[int(rng.integers(len(pool)))]

    for _ in range(int(rng.integers(8, 30))):
        (a, av), (b, bv) = pick(), pick()
        kind = int(rng.integers(12))
        with np.errstate(all="ignore"):
            try:
                if isinstance(av, list):
                    i = int(rng.integers(len(av)))
                    target, args = operator.getitem, (a, i)
                elif kind < 3 and not isinstance(bv, list):
                    target, args = [operator.add, operator.mul, operator.sub][kind], (a, b)
                elif kind == 3:
                    target, args = operator.mul, (a, float(rng.standard_normal()))
                elif kind == 4:
                    target, args = A.t.default, (a,)
                elif kind == 5:
                    target, args = A.chunk.default, (a, 2)
                elif kind == 6:
                    target, args = A.clone.default, (a,)
                elif kind == 7 and rng.random() < 0.5:
                    target, args = A.mul_.Scalar, (a, 0.5)
                elif kind == 8:
                    target, args = A.sum.dim_IntList, (a, [0], True)
                elif kind == 9 and isinstance(av, np.ndarray):
                    target, args = getattr, (a, "shape")
                elif kind == 10:
                    target, args = A.relu.default, (a,)
                else:
                    target, args = operator.getitem, (a, slice(0, 2))
                given = [av if n is a else bv if n is b else n for n in args]
                trial = [v.copy() if isinstance(v, np.ndarray) else v for v in given]
                value = target(*trial)
            except (ValueError, TypeError, IndexError):
                continue
        if target is A.mul_.Scalar and a is x:
            continue  # two runs are compared on one input
        pool.append((graph.call_function(target, args), [*value] if isinstance(value, tuple) else value))
    count = int(rng.integers(1, 4))
    graph.output(tuple(pool[-1 - int(rng.integers(min(len(pool), 8)))][0] for _ in range(count)))
    return fx.GraphModule(root, graph)


def spoil(value: Any) -> None:
    """What a caller may do with results."""
    for a in arrays(value):
        if isinstance(a, np.ndarray) and a.flags.writeable:
            a[...] = a * 0.5 + 1


@pytest.mark.parametrize("part", range(8))
def test_random_graphs(part: int) -> None:
    folded = kept = 0
    for i in range(60):
        rng = np.random.default_rng([part, i])
        gm = random_graph(rng)
        gm.graph.lint()
        twin = copy.deepcopy(gm)
        with np.errstate(all="ignore"):
            count, rows = fold(gm)
            folded += count
            kept += len(rows) - count
            for _ in range(3):
                x = rng.standard_normal((3, 4)).astype(np.float32)
                outputs = []
                for module in (gm, twin):
                    try:
                        outputs.append(module(x.copy()))
                    except (ValueError, TypeError, IndexError) as error:
                        outputs.append(str(error))
                        break
                if any(isinstance(out, str) for out in outputs):
                    with pytest.raises((ValueError, TypeError, IndexError)):
                        twin(x.copy())
                    break
                same(*outputs)
                spoil(outputs[0])
                spoil(outputs[1])
    assert folded > 60 and kept > 30
