# SPDX-License-Identifier: BSD-3-Clause
"""The first steps of freezing: views become reshapes, parameters become constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _core
from ._pass_run import STEM, add_rows, all_or_nothing
from .freeze_report import FreezeRow
from .nn.parameter import as_ndarray

if TYPE_CHECKING:
    from .fx import GraphModule

__all__ = ["ParamMetadata", "replace_params_with_constants", "view_to_reshape"]


class ParamMetadata(NamedTuple):
    """What an exporter knows of the inputs of a lifted graph.

    Attributes:
        mutated_inputs: indices of the placeholders whose arrays the graph writes.
        output_aliases: indices of the placeholders of which an output is a view, or the array itself.

    >>> from pyconvbn import passes
    >>> passes.ParamMetadata(mutated_inputs=(2,)).output_aliases
    ()
    """

    mutated_inputs: tuple[int, ...] = ()
    output_aliases: tuple[int, ...] = ()


def view_to_reshape(gm: GraphModule, *, report: list[FreezeRow] | None = None) -> int:
    """Makes `reshape` of `view` where nobody can tell a copy from a view, in place.

    That is `aten.view.default`, `aten._unsafe_view.default` and the method `view` with sizes; `x.view(dtype)` stays. A
    view raises for strides that do not allow one, a reshape then copies: later steps may change strides. A view stays
    if its memory is written anywhere in the graph, or if the caller gets it while he has it by another way too (an
    input, a parameter, another output).

    Args:
        gm: the graph to change.
        report: a list to which a row (step "view") for each such node is appended.

    Returns:
        How many nodes changed.

    Raises:
        TypeError: `gm` is not a GraphModule.
        RuntimeError: its graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, ops, passes
    >>> gm = fx.symbolic_trace(lambda x: ops.aten.view.default(ops.aten.relu.default(x), [-1]))
    >>> passes.view_to_reshape(gm), [str(node.target) for node in gm.graph.nodes]
    (1, ['x', 'aten.relu.default', 'aten.reshape.default', 'output'])

    Source: torch/_inductor/freezing.py, where all views become reshapes.
    """
    from .ops import aten
    from .passes import _check

    graph = _check(gm)
    with all_or_nothing(gm):
        changed, rows = _core.pass_view_to_reshape(graph, gm, aten.reshape.default)
        add_rows(report, rows)
    return changed


def replace_params_with_constants(
    gm: GraphModule,
    flat_params: Sequence[Any] | None = None,
    metadata: ParamMetadata | None = None,
    *,
    report: list[FreezeRow] | None = None,
) -> list[int]:
    """Makes constants of parameters and buffers, in place, but for those that the graph writes or returns.

    Both forms of a graph are understood. In a lifted graph (`fx.to_aten(gm, lift_params=True)`, or an exporter's) the
    parameters are the first placeholders: each becomes a get_attr node, under its old name, of an attribute
    `_frozen_param<N>`, which is the very array. The get_attr nodes of arrays, which are the parameters of traced graphs,
    read such an attribute from now on, one for each array.

    What stays as it is: parameters whose memory may be written while the graph runs, or may be (a part of) what it
    returns, and parameters that share memory with such. An array that is passed as parameter and as input at once is not
    seen.

    Args:
        gm: the graph to change.
        flat_params: the arrays of the first placeholders, in order; None: `gm.meta["params_flat"]`, if it is there.
            Afterwards `gm.meta["params_flat"]` (and `gm.meta["params_names"]`) have those that remain inputs.
        metadata: what is known of the placeholders, taken as true instead of an analysis of the graph.
        report: a list to which a row (step "parameter") for each parameter is appended: done with the name of its
            constant, or kept with the node that writes or returns it.

    Returns:
        The indices of the placeholders that remain: parameters that stayed, and all other inputs.

    Raises:
        TypeError: `gm` is not a GraphModule, `flat_params` no list of arrays, `metadata` no ParamMetadata of indices.
        ValueError: more parameters than placeholders, one of another shape than its placeholder, an index out of range,
            or `gm.meta` is that of another graph.
        RuntimeError: the graph is not well-formed (`Graph.lint`).

    >>> from pyconvbn import fx, nn, passes
    >>> gm = fx.to_aten(fx.symbolic_trace(nn.Linear(2, 3)), lift_params=True)
    >>> passes.replace_params_with_constants(gm)
    [2]
    >>> [(node.op, node.target) for node in gm.graph.nodes][:3]
    [('get_attr', '_frozen_param0'), ('get_attr', '_frozen_param1'), ('placeholder', 'input')]

    Source: torch/_inductor/freezing.py, `replace_params_with_constants`.
    """
    from .passes import _check

    graph = _check(gm)
    placeholders = graph.find_nodes(op="placeholder")
    params, names = _params(gm, flat_params, placeholders)
    given = _given(metadata, len(params), len(placeholders))
    attributes = gm.__dict__
    known = {
        id(attributes[name]): name for name in _core.constant_names(attributes, STEM) if name[len(STEM) :].isdigit()
    }
    with all_or_nothing(gm) as constants:
        _, rows = _core.pass_params(graph, gm, constants, known, params, given)
        remain = [i for i, node in enumerate(placeholders) if node.op == "placeholder"]
        add_rows(report, rows)
    if flat_params is not None or "params_flat" in gm.meta:
        kept = [i for i in remain if i < len(params)]
        gm.meta["params_flat"] = [params[i] for i in kept]
        if names is not None:
            gm.meta["params_names"] = [names[i] for i in kept]
    return remain


def _params(gm: Any, flat_params: Any, placeholders: list[Any]) -> tuple[tuple[Any, ...], list[str] | None]:
    """The arrays of the first placeholders, and their dotted names if `gm.meta` has them."""
    where = "flat_params"
    if flat_params is None:
        where = 'gm.meta["params_flat"]'
        flat_params = gm.meta.get("params_flat", ())
    if not isinstance(flat_params, (list, tuple)):
        raise TypeError(f"{where}: expected a list of arrays, got {type(flat_params).__name__}")
    arrays = tuple(as_ndarray(value, f"{where}[{i}]") for i, value in enumerate(flat_params))
    if len(arrays) > len(placeholders):
        raise ValueError(
            f"{where}: expected at most {len(placeholders)} arrays, one for each placeholder, got {len(arrays)}"
        )
    names = gm.meta.get("params_names")
    if not isinstance(names, (list, tuple)) or len(names) != len(arrays):
        names = None
    for i, node in enumerate(placeholders[: len(arrays)]):
        if str(node.target).startswith("*"):
            raise ValueError(f"{where}[{i}]: placeholder {node.target!r} takes any number of arguments")
        if where != "flat_params" and names is not None:
            clean = str(names[i]).replace(".", "_")
            if node.target not in (f"p_{clean}", f"b_{clean}"):  # meta that came from another graph
                raise ValueError(
                    f"{where}[{i}]: parameter {names[i]!r} is not placeholder {node.target!r}; pass flat_params"
                )
    return arrays, None if names is None else list(names)


def _given(metadata: Any, count: int, placeholders: int) -> bytes | None:
    """For each parameter "M" (mutated), "O" (aliases an output) or "-"."""
    if metadata is None:
        return None
    if not isinstance(metadata, ParamMetadata):
        raise TypeError(f"metadata: expected a passes.ParamMetadata, got {type(metadata).__name__}")
    letters = bytearray(b"-" * count)
    for field, letter in (("output_aliases", b"O"), ("mutated_inputs", b"M")):  # mutated wins
        indices = getattr(metadata, field)
        if not isinstance(indices, (list, tuple)):
            raise TypeError(f"metadata.{field}: expected a tuple of indices, got {type(indices).__name__}")
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"metadata.{field}: expected indices (int), got {type(index).__name__}")
            if not 0 <= index < placeholders:
                raise ValueError(f"metadata.{field}: expected indices from 0 to {placeholders - 1}, got {index}")
            if index < count:
                letters[index] = letter[0]
    return bytes(letters)
