# SPDX-License-Identifier: BSD-3-Clause
"""Names of nodes: the table of rules, without an oracle (test_parity.py has torch.fx for thousands more)."""

from __future__ import annotations

import builtins
import functools
import keyword
import operator

import pytest

from pyconvbn import fx


def module_name(target: str) -> str:
    return fx.Graph().call_module(target).name


def explicit(*names: str) -> list[str]:
    graph = fx.Graph()
    return [graph.create_node("placeholder", "p", name=name).name for name in names]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("HTTPServer", "httpserver"),
        ("layer1.0.conv", "layer1_0_conv"),
        ("conv", "conv"),
        ("ConvBN", "conv_bn"),
        ("__len__", "len_1"),
        ("0.weight", "_0_weight"),
        ("a..b", "a_b"),
        ("x_0", "x_0"),
        ("for", "for_1"),
        ("device", "device_1"),
    ],
)
def test_from_targets(target: str, name: str) -> None:
    assert module_name(target) == name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "x", "x"], ["x", "x_1", "x_2"]),
        (["x", "x_1", "x", "x"], ["x", "x_1", "x_2", "x_3"]),
        (["x", "x", "x_0", "x_0"], ["x", "x_1", "x_0", "x_2"]),
        (["x_5", "x_5", "x"], ["x_5", "x_6", "x"]),
        (["x_5", "x_2", "x_5", "x_2", "x_5"], ["x_5", "x_2", "x_3", "x_4", "x_6"]),
        (["a b", "a+-b", "9", "", ""], ["a_b", "a_b_1", "_9", "_unnamed", "_unnamed_1"]),
        (["HTTPServer", "é", "inf", "nan", "torch"], ["HTTPServer", "_", "inf_1", "nan_1", "torch_1"]),
    ],
)
def test_explicit(names: list[str], expected: list[str]) -> None:
    assert explicit(*names) == expected


def test_keywords_and_builtins_are_avoided() -> None:
    for word in [*keyword.kwlist, *(b for b in dir(builtins) if b.isidentifier() and not b.startswith("_"))]:
        (name,) = explicit(word)
        assert name == f"{word}_1", word


def test_from_callables() -> None:
    class Called:
        def __call__(self) -> None: ...

    class Odd(Called):
        __name__ = 3  # type: ignore[assignment]

    graph = fx.Graph()
    functions = [operator.add, getattr, lambda: 0, functools.partial(len), Called(), Odd(), operator.__add__, Called]
    names = [graph.call_function(f).name for f in functions]  # type: ignore[arg-type]
    assert names == ["add", "getattr_1", "_lambda_", "partial", "called", "odd", "add_1", "called_1"]

    class Raises(Called):
        @property
        def __name__(self) -> str:  # type: ignore[override]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        graph.call_function(Raises())
    assert len(graph.nodes) == len(functions)


def test_aten_names() -> None:
    def function() -> None: ...

    function.__name__ = "conv2d.default"
    assert fx.Graph().call_function(function).name == "conv2d_default"


def test_erasing_frees_no_name() -> None:
    graph = fx.Graph()
    graph.erase_node(graph.placeholder("x"))
    assert graph.placeholder("x").name == "x_1"


def test_long_names() -> None:
    assert len(module_name("a" * 100_000)) == 100_000
    assert explicit("x_99999999999999999999", "x_99999999999999999999")[0] == "x_99999999999999999999"


@pytest.mark.parametrize(
    "call", [lambda g: g.placeholder("\ud800"), lambda g: g.create_node("call_method", "m", name="\ud800")]
)
def test_text_that_utf8_cannot_spell(call: object) -> None:
    graph = fx.Graph()
    with pytest.raises(ValueError, match="expected text that UTF-8 can spell"):
        call(graph)  # type: ignore[operator]
    assert len(graph.nodes) == 0
