# SPDX-License-Identifier: BSD-3-Clause
"""pyconvbn/_core.pyi says what _core has: names, numbers of arguments, signatures of Plan."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from pyconvbn import _core

STUB = ast.parse((Path(__file__).resolve().parents[2] / "pyconvbn" / "_core.pyi").read_text())
FUNCTIONS = {n.name: n for n in STUB.body if isinstance(n, ast.FunctionDef)}
CLASSES = {n.name for n in STUB.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")}
PLAN = next(n for n in STUB.body if isinstance(n, ast.ClassDef) and n.name == "Plan")
PLAN_MEMBERS = {n.name: n for n in PLAN.body if isinstance(n, ast.FunctionDef)}
# Of every type; written in C without a signature that Python could read.
UNREADABLE = {"__new__", "__call__", "__reduce_ex__", "_repr_html_", "halo"}


def decorators(node: ast.FunctionDef) -> set[str]:
    return {d.id for d in node.decorator_list if isinstance(d, ast.Name)}


def parameters(node: ast.FunctionDef, skip: int) -> list[tuple[str, Any]]:
    """(name, default) of each parameter; inspect.Parameter.empty where there is no default."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(a.defaults)) + list(a.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    empty = inspect.Parameter.empty
    return [(p.arg, empty if d is None else ast.literal_eval(d)) for p, d in pairs][skip:]


def test_same_names() -> None:
    in_stub = {*FUNCTIONS, *CLASSES, "_testing"}
    in_core = {n for n in vars(_core) if not n.startswith("_")} | {"_testing"}
    assert in_core - in_stub == set(), "the stub lacks them"
    assert in_stub - in_core - {n for n in FUNCTIONS if n.startswith("_")} == set(), "_core lacks them"
    assert isinstance(_core.__version__, str)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_number_of_arguments(name: str) -> None:
    node = FUNCTIONS[name]
    assert not node.args.kwonlyargs and not node.args.args, "functions of _core are positional-only"
    wanted = len(node.args.posonlyargs)
    function = getattr(_core, name)
    for given in {max(wanted - 1, 0), wanted + 1} - {wanted}:
        with pytest.raises(TypeError) as caught:
            function(*[object()] * given)
        words = str(caught.value)
        expected = {
            0: ["takes no arguments (1 given)"],
            1: [f"takes exactly one argument ({given} given)", f"expected 1 arguments, got {given}"],
        }.get(wanted, [f"expected {wanted} arguments, got {given}"])
        assert any(e in words for e in expected), words


def test_plan_has_the_members_of_the_stub() -> None:
    in_core = {n for n in vars(_core.Plan) if not n.startswith("_")}
    in_stub = {n for n in PLAN_MEMBERS if not n.startswith("_")}
    assert in_core == in_stub
    for name, node in PLAN_MEMBERS.items():
        assert hasattr(_core.Plan, name)
        if "property" in decorators(node):
            assert inspect.isgetsetdescriptor(getattr(_core.Plan, name)), name


def check_signature(found: inspect.Signature, node: ast.FunctionDef) -> None:
    wanted = parameters(node, skip=1)  # self or cls
    got = [(p.name, p.default) for p in found.parameters.values() if p.name not in {"self", "cls"}]
    assert got == wanted
    kinds = {p.name: p.kind for p in found.parameters.values()}
    for p in node.args.kwonlyargs:
        assert kinds[p.arg] is inspect.Parameter.KEYWORD_ONLY, p.arg


def test_plan_constructor_signature() -> None:
    check_signature(inspect.signature(_core.Plan), PLAN_MEMBERS["__new__"])


@pytest.mark.parametrize("name", [n for n, d in PLAN_MEMBERS.items() if n not in UNREADABLE and not decorators(d) & {"property"}])
def test_plan_method_signature(name: str) -> None:
    check_signature(inspect.signature(getattr(_core.Plan, name)), PLAN_MEMBERS[name])
