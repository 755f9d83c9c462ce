# SPDX-License-Identifier: BSD-3-Clause
"""Random networks, frozen in every form, against a float64 evaluation that shares no code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import fx

sys.path.insert(0, str(Path(__file__).parent))
from random_nets import RandomNet  # noqa: E402
from test_differential import SEEDS, assert_as_good, bn_nodes, run  # noqa: E402


def trace(net: RandomNet, form: str, x: Any) -> tuple[Any, list[Any]]:
    """The graph and what it takes before x."""
    gm = fx.symbolic_trace(net)
    if form == "module":
        return gm, []
    gm = fx.to_aten(gm, [x.shape], lift_params=form == "lifted")
    return gm, list(gm.meta.get("params_flat", []))


def names_of_norms(gm: Any) -> list[str]:
    found = bn_nodes(gm)
    found += [node.name for node in gm.graph.nodes if "aten.batch_norm" in str(node.target)]
    return sorted(found)


def check(net: RandomNet, form: str, shapes: bool) -> None:
    x = net.example(np.random.default_rng(1))
    state = {k: v.copy() for k, v in net.state_dict().items()}
    gm, params = trace(net, form, x)
    text, norms = str(gm.graph), names_of_norms(gm)
    reference, plain = net.reference(x), run(net, x)
    frozen, preserved = pyconvbn.freeze(gm, x if shapes else None)
    assert str(gm.graph) == text
    assert sorted(row.node for row in frozen.report.folds) == norms, "one row for each BatchNorm"
    inputs = [[*params, x][i] for i in preserved]
    copies = [np.array(value) if value is not x else x for value in inputs]  # statistics that training writes
    assert_as_good(run(frozen, x) if len(inputs) == 1 else frozen(*copies), plain, reference, str(frozen.report))
    again, _ = pyconvbn.freeze(frozen, inputs if shapes else None)
    assert str(again.graph) == str(frozen.graph), "freezing twice changes nothing"
    for key, value in net.state_dict().items():
        assert np.array_equal(value, state[key]), f"the user's {key} was changed"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("form", ["module", "aten", "lifted"])
@pytest.mark.parametrize("block", range(6))
def test_random_networks(block: int, form: str, dtype: Any) -> None:
    for seed in SEEDS[block::6]:
        net = RandomNet(seed, dtype)
        try:
            check(net, form, shapes=seed % 3 != 0)
        except BaseException as failure:
            failure.add_note(f"RandomNet(seed={seed}, dtype={np.dtype(dtype).name}), {form}")
            raise
