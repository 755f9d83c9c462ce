# SPDX-License-Identifier: BSD-3-Clause
"""passes.replace_params_with_constants: the arrays and the metadata it is given, torch's own pass as the oracle."""

from __future__ import annotations

import copy
import operator
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyconvbn import fx, nn, passes
from pyconvbn.fx import Graph

sys.path.insert(0, str(Path(__file__).parent))
from params_util import call, freeze_params, lifted_graph, values  # noqa: E402


def three() -> Any:
    return lifted_graph(
        "a b c x", lambda g, a, b, c, x: call(g, operator.add, call(g, operator.mul, a, b), call(g, operator.mul, c, x))
    )


def test_metadata_is_taken_as_it_is() -> None:
    arrays = [values(2), values(2), values(2)]
    gm = three()
    remain, rows = freeze_params(gm, arrays, passes.ParamMetadata(mutated_inputs=(0,), output_aliases=(0, 2, 3)))
    assert remain == [0, 2, 3]
    assert rows == {"a": ("MUTATED", None, None), "b": ("OK", None, "_frozen_param0"),
                    "c": ("ALIASES_OUTPUT", "output", None)}  # fmt: skip
    assert [id(a) for a in gm.meta["params_flat"]] == [id(arrays[0]), id(arrays[2])]


def test_metadata_wins_over_the_analysis() -> None:
    """An exporter knows what its callable does."""
    gm = lifted_graph("a b x", lambda g, a, b, x: call(g, lambda *v: v[0] + v[1], a, b))
    assert freeze_params(copy.deepcopy(gm), [values(2), values(2)])[0] == [0, 1, 2]
    remain, rows = freeze_params(gm, [values(2), values(2)], passes.ParamMetadata())
    assert remain == [2] and rows["a"][0] == rows["b"][0] == "OK"


def test_metadata_speaks_of_inputs_not_of_memory() -> None:
    base = values(6)
    arrays = [base[:3], base[2:4], base[3:5], base[5:]]
    gm = lifted_graph("a b c d x", lambda g, a, b, c, d, x: call(g, operator.add, call(g, operator.add, c, x), d))
    remain, rows = freeze_params(gm, arrays, passes.ParamMetadata(output_aliases=[1]))  # type: ignore[arg-type]
    assert remain == [0, 1, 2, 4] and rows["d"][0] == "OK"
    g = Graph()
    p, x = g.placeholder("p"), g.placeholder("x")
    g.output(call(g, operator.add, call(g, operator.mul, x, p), g.get_attr("w")))
    gm = fx.GraphModule({"w": base[1:3]}, g)
    remain, rows = freeze_params(gm, [base[:2]], passes.ParamMetadata((0,)))
    assert rows["w"] == ("MUTATED", None, None)


def test_parameters_are_read_from_meta_or_given() -> None:
    gm = three()
    assert freeze_params(copy.deepcopy(gm))[0] == [0, 1, 2, 3], "nothing is known of the placeholders"
    gm.meta["params_flat"] = [values(2)]
    assert freeze_params(copy.deepcopy(gm))[0] == [1, 2, 3]
    remain, _ = freeze_params(gm, [values(2), values(2)])
    assert remain == [2, 3] and gm.meta["params_flat"] == [] and "params_names" not in gm.meta


def test_meta_of_another_graph_is_refused() -> None:
    """A GraphModule made from another one has its meta: what were parameters there may be inputs here."""
    lifted = fx.to_aten(fx.symbolic_trace(nn.Linear(2, 2)), lift_params=True)
    g = Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    g.output(call(g, operator.add, x, y))
    other = fx.GraphModule(lifted, g)
    assert "params_flat" in other.meta
    with pytest.raises(ValueError, match="'weight' is not placeholder 'x'.*flat_params"):
        passes.replace_params_with_constants(other)
    assert freeze_params(other, [])[0] == [0, 1]


def test_array_likes(torch: Any) -> None:
    gm = three()
    tensor = torch.ones(2)
    remain, _ = freeze_params(gm, (tensor, values(2)))
    assert remain == [2, 3]
    tensor.mul_(3)
    assert gm._frozen_param0[0] == 3.0, "shared, not copied"


@pytest.mark.parametrize(
    "params, metadata, error, match",
    [
        ([values(2)] * 5, None, ValueError, "flat_params: expected at most 4 arrays.*got 5"),
        (values(3, 2), None, TypeError, "flat_params: expected a list of arrays, got ndarray"),
        ({"a": values(2)}, None, TypeError, "flat_params: expected a list of arrays, got dict"),
        ("ab", None, TypeError, "flat_params: .*str"),
        ([values(2), [1.0, 2.0]], None, TypeError, r"flat_params\[1\]"),
        ([values(2), None], None, TypeError, r"flat_params\[1\]"),
        ([values(3)], None, ValueError, r"flat_params\[0\]: its shape is not that of placeholder a"),
        ([values(2)], ((0,), ()), TypeError, "metadata: expected a passes.ParamMetadata, got tuple"),
        ([values(2)], passes.ParamMetadata(3), TypeError, "metadata.mutated_inputs: expected a tuple"),  # type: ignore
        ([values(2)], passes.ParamMetadata((), (1.0,)), TypeError, "metadata.output_aliases: .*float"),  # type: ignore
        ([values(2)], passes.ParamMetadata((True,)), TypeError, "metadata.mutated_inputs: .*bool"),
        ([values(2)], passes.ParamMetadata((4,)), ValueError, "metadata.mutated_inputs: .*0 to 3, got 4"),
        ([values(2)], passes.ParamMetadata((), (-1,)), ValueError, "metadata.output_aliases: .*got -1"),
    ],
)
def test_bad_arguments(params: Any, metadata: Any, error: Any, match: str) -> None:
    gm = three()
    fx.shape_prop(gm, *[values(2)] * 4)
    text, held = str(gm.graph), dict(gm.__dict__)
    with pytest.raises(error, match=match):
        passes.replace_params_with_constants(gm, params, metadata)
    assert str(gm.graph) == text and gm.__dict__ == held and gm.meta == {}


def test_bad_meta_is_named() -> None:
    gm = three()
    gm.meta["params_flat"] = 3
    with pytest.raises(TypeError, match='gm.meta.*params_flat.*: expected a list'):
        passes.replace_params_with_constants(gm)
    with pytest.raises(TypeError, match="gm: expected a GraphModule"):
        passes.replace_params_with_constants(gm.graph)


def test_a_placeholder_of_any_number_of_arguments_is_no_parameter() -> None:
    g = Graph()
    rest = g.placeholder("*rest")
    g.output(rest)
    with pytest.raises(ValueError, match="any number"):
        passes.replace_params_with_constants(fx.GraphModule({}, g), [values(2)])


def test_placeholders_with_defaults_and_annotations() -> None:
    g = Graph()
    p = g.placeholder("p", type_expr=float, default_value=2.0)
    x = g.placeholder("x", default_value=3.0)
    g.output(call(g, operator.mul, p, x))
    gm = fx.GraphModule({}, g)
    assert freeze_params(gm, [values(2)])[0] == [1]
    np.testing.assert_array_equal(gm(), 3 * values(2))
    assert "float" not in gm.code


# ---- torch's own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mutated, aliased", [((), ()), ((1,), ()), ((), (0, 2)), ((0, 3), (1,))])
def test_indices_as_in_torch(torch: Any, mutated: tuple[int, ...], aliased: tuple[int, ...]) -> None:
    """The oracle: torch._inductor's pass on the same graph with the same metadata."""
    freezing = pytest.importorskip("torch._inductor.freezing")
    from torch._functorch._aot_autograd.schemas import MutationType

    g = torch.fx.Graph()
    a, b, c, x = (g.placeholder(n) for n in "abcx")
    y = g.call_function(torch.ops.aten.mul.Tensor, (g.call_function(torch.ops.aten.add.Tensor, (a, b)), c))
    g.output((g.call_function(torch.ops.aten.add.Tensor, (y, x)),))
    theirs = torch.fx.GraphModule(torch.nn.Module(), g)
    kinds = [MutationType.MUTATED_IN_GRAPH if i in mutated else MutationType.NOT_MUTATED for i in range(4)]
    facts = SimpleNamespace(
        input_info=[SimpleNamespace(mutation_type=kind) for kind in kinds],
        output_info=[SimpleNamespace(base_idx=i) for i in (*aliased, None)],
        static_input_indices=[0, 1, 2],
    )
    wanted = freezing.replace_params_with_constants(theirs, [torch.ones(2)] * 3, facts)
    arrays = [values(2), values(2), values(2)]
    assert freeze_params(three(), arrays, passes.ParamMetadata(mutated, aliased))[0] == wanted
