# SPDX-License-Identifier: BSD-3-Clause
"""The op table, its binder, the Operator type, and the fused operators as nodes."""

from __future__ import annotations

import builtins
import copy
import inspect
import math
import operator
import pickle
import weakref
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import FoldError, _core, _efficient, counters, nn, ops
from pyconvbn import functional as F
from pyconvbn.fx import Graph

ROWS = _core.op_names()
FUNCTIONAL = [n for n in F.__all__]
EFFECTS = {"pure", "view", "mutates", "random"}


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


# -- rows --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ROWS)
def test_rows_are_consistent(row: str) -> None:
    info = _core.op_info(row)
    params = info["params"]
    names = [p["name"] for p in params]
    assert len(set(names)) == len(names) and info["doc"] and info["effect"] in EFFECTS
    assert sum(p["variadic"] for p in params) <= 1
    required_after_default = [p for p, q in zip(params[1:], params, strict=False)
                              if q["has_default"] and not p["has_default"] and not p["keyword_only"] and not p["variadic"]]
    assert not required_after_default
    written = [p for p in params if p["written"] and p["name"] != "out"]
    assert all(p["aliased"] for p in written)
    if info["effect"] == "mutates":
        assert written
    elif "batch_norm" not in row:
        assert not written
    if info["effect"] == "view":
        assert any(p["aliased"] for p in params)
    # the schema's words are the parameters'
    assert info["schema"].startswith("(") and f") -> {info['returns']}" in info["schema"]
    for p in params:
        assert f" {p['name']}" in info["schema"]


def test_every_public_function_is_an_operator_with_its_rows_signature() -> None:
    functions = {f"functional.{n}": getattr(F, n) for n in FUNCTIONAL}
    functions["efficient_conv_bn_eval"] = pyconvbn.efficient_conv_bn_eval
    functions["efficient_conv_bn_eval_decomposed"] = pyconvbn.efficient_conv_bn_eval_decomposed
    assert {r for r in ROWS if r.startswith(("functional.", "efficient"))} == set(functions)
    for row, function in functions.items():
        assert isinstance(function, _core.Operator) and function.op_name == row == _core.op_lookup(function)
        params = _core.op_info(row)["params"]
        found = inspect.signature(function).parameters.values()
        assert [p.name for p in found] == [p["name"] for p in params], row
        for have, want in zip(found, params, strict=True):
            assert (have.kind is have.KEYWORD_ONLY) == want["keyword_only"], row
            assert (have.default is not have.empty) == want["has_default"], row
            if want["has_default"] and have.default != ():
                assert have.default == want["default"] and type(have.default) is type(want["default"]), (row, have)


@pytest.mark.parametrize("module", [operator, math, builtins])
def test_pythons_own_functions_are_rows(module: Any) -> None:
    rows = [r for r in ROWS if r.startswith(module.__name__ + ".")]
    assert rows
    for row in rows:
        assert _core.op_lookup(getattr(module, row.split(".")[1])) == row
    assert _core.op_lookup(print) is None and _core.op_lookup(test_bad_questions) is None


def test_bad_questions() -> None:
    for bad, error in (("no.such.row", ValueError), (3, TypeError), ("", ValueError)):
        with pytest.raises(error, match="name"):
            _core.op_info(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row of the op table, got 'conv9d'"):
        _core.Operator(len, "conv9d")
    with pytest.raises(TypeError, match="function: expected a callable, got int"):
        _core.Operator(3, "functional.relu")
    with pytest.raises(TypeError, match="handler: expected a callable"):
        _core.set_proxy_handler(int, 3)
    with pytest.raises(TypeError, match="type: expected a class"):
        _core.set_proxy_handler(3, len)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="node: expected a Node, got int"):
        _core.op_bind(3)


# -- Operator ----------------------------------------------------------------------------------------------------
def test_an_operator_is_still_a_function_to_its_readers() -> None:
    assert F.conv2d.__name__ == F.conv2d.__qualname__ == "conv2d" and F.conv2d.__module__ == "pyconvbn.functional"
    assert (F.conv2d.__doc__ or "").startswith("2-D convolution")
    assert inspect.isroutine(F.conv2d) and inspect.getsource(F.conv2d).startswith("@_operator")
    assert "stride" in inspect.signature(F.conv2d).parameters and repr(F.conv2d) == "<Operator functional.conv2d>"
    assert pickle.loads(pickle.dumps(F.conv2d)) is F.conv2d and copy.deepcopy(F.conv2d) is F.conv2d
    assert weakref.ref(F.conv2d)() is F.conv2d
    F.conv2d.mine = 3  # type: ignore[attr-defined]
    assert F.conv2d.__dict__.pop("mine") == 3


def test_an_operator_in_a_class_is_a_method_as_functions_are() -> None:
    class Layer:
        act = F.relu
        other = ops.aten.relu.default  # as PyTorch's, not bound
        data = None

    with pytest.raises(TypeError, match="Layer"):
        Layer().act()
    np.testing.assert_array_equal(Layer.act(-ones(2)), np.zeros(2))
    np.testing.assert_array_equal(Layer().other(-ones(2)), np.zeros(2))


def test_errors_of_calls_are_the_functions_own() -> None:
    with pytest.raises(TypeError, match=r"relu\(\) got an unexpected keyword argument 'inplace'"):
        F.relu(ones(1), inplace=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        F.relu()  # type: ignore[call-arg]


def test_calls_with_a_proxy_go_to_the_handler() -> None:
    code = """
import numpy as np
from pyconvbn import _core, functional as F, ops
class Proxy: pass
class Sub(Proxy): pass
seen = []
_core.set_proxy_handler(Proxy, lambda op, args, kwargs: seen.append((op, args, kwargs)) or "handled")
p, x = Sub(), np.ones((1, 1, 2, 2), np.float32)
assert F.relu(p) == "handled" and seen.pop() == (F.relu, (p,), {})
assert F.relu(input=p) == "handled" and seen.pop() == (F.relu, (), {"input": p})
assert F.cat([x, p], dim=1) == "handled" and seen.pop() == (F.cat, ([x, p],), {"dim": 1})
assert F.cat((x, Proxy())) == "handled" and seen.pop()[0] is F.cat
assert ops.aten.relu.default(p) == "handled" and seen.pop()[0] is ops.aten.relu.default
assert F.relu(x).shape == x.shape and F.cat([x, x]).shape == (2, 1, 2, 2) and not seen
def broken(op, args, kwargs): raise KeyError("mine")
_core.set_proxy_handler(Proxy, broken)
try: F.relu(p)
except KeyError: pass
else: raise AssertionError
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- binding -----------------------------------------------------------------------------------------------------
def bound(target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    g = Graph()
    op = "call_method" if isinstance(target, str) else "call_function"
    return _core.op_bind(g.create_node(op, target, args, kwargs or {}))


def test_binding_fills_in_defaults() -> None:
    assert bound(F.conv2d, (1, 2), {"stride": 3}) == {
        "input": 1, "weight": 2, "bias": None, "stride": 3, "padding": 0, "dilation": 1, "groups": 1, "out": None,
    }  # fmt: skip
    assert bound(ops.aten.max_pool2d.default, (1,), {"kernel_size": [2, 2]})["stride"] == []
    assert bound(ops.aten.conv2d.padding, (1, 2))["padding"] == "valid"
    assert bound(F.gelu, (1,)) == {"input": 1, "approximate": "none", "out": None}
    assert bound(F.batch_norm, (1, 2, 3))["eps"] == 1e-5
    assert list(bound(F.batch_norm, (1,), {"running_var": 3, "running_mean": 2})) == [
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", "out",
    ]  # fmt: skip


def test_binding_agrees_with_python() -> None:
    """For every function of the package and random ways to call it."""
    rng = np.random.default_rng(5)
    for name in FUNCTIONAL:
        function = getattr(F, name)
        signature = inspect.signature(function)
        names = [*signature.parameters]
        for _ in range(30):
            n = int(rng.integers(0, len(names) + 2))
            args = tuple(range(n))
            kwargs = {str(k): 7 for k in rng.permutation([*names, "nonsense"])[: rng.integers(0, 3)]}
            try:
                expected = signature.bind(*args, **kwargs)
                expected.apply_defaults()
            except TypeError:
                with pytest.raises(TypeError, match=f"functional.{name}: .*(node |')"):
                    bound(function, args, kwargs)
            else:
                assert bound(function, args, kwargs) == dict(expected.arguments)


def test_the_rest_of_the_arguments() -> None:
    for args, kwargs in (((0, 2, -1), {}), ((0, (2, -1)), {}), ((0, [2, -1]), {}), ((0,), {"size": (2, -1)})):
        result = bound("view", args, kwargs)
        assert result["self"] == 0 and result["size"] == (2, -1)
    assert bound("permute", (0,))["dims"] == ()
    assert bound("reshape", (0, 4))["size"] == (4,)


def test_binding_errors_name_operator_argument_and_node() -> None:
    g = Graph()
    x = g.placeholder("x")
    for args, kwargs, words in (
        ((), {}, "missing argument 'input'"), ((x,), {}, "missing argument 'weight'"),
        ((x,) * 9, {}, "at most 7 positional arguments, got 9"), ((x, x), {"strid": 1}, "keyword argument 'strid'"),
        ((x, x), {"input": x}, "'input' is given twice"),
    ):  # fmt: skip
        node = g.create_node("call_function", F.conv2d, args, kwargs, "mine")
        with pytest.raises(TypeError, match=rf"functional.conv2d: .*{words}.*\(node {node.name}\)"):
            _core.op_bind(node)
    for node in (x, g.call_function(len, ()), g.call_function(test_bad_questions, (x,)), g.call_method("no_such", (x,))):
        if node.target is not len:
            with pytest.raises(ValueError, match=f"node {node.name}: its target has no schema"):
                _core.op_bind(node)


def test_a_stale_node_is_refused() -> None:
    g = Graph()
    node = g.call_function(F.relu, (1,))
    g.erase_node(node)
    with pytest.raises(RuntimeError):
        _core.op_bind(node)


# -- what must be kept -------------------------------------------------------------------------------------------
def test_impure() -> None:
    g = Graph()
    x = g.placeholder("x")
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = [
        (F.relu, (x,), {}, False), (F.relu, (x,), {"out": x}, True), (operator.add, (x, 1), {}, False),
        (operator.setitem, (x, 0, 1), {}, True), (operator.iadd, (x, 1), {}, True),
        (F.dropout, (x,), {}, False), (F.dropout, (x, 0.5, True), {}, True), (F.dropout, (x,), {"training": x}, True),
        (ops.aten.dropout.default, (x, 0.5, False), {}, False), (ops.aten.dropout.default, (x, 0.5, True), {}, True),
        (ops.aten.rand_like.default, (x,), {}, True), (ops.aten.relu_.default, (x,), {}, True),
        (ops.aten.batch_norm.default, (x, x, x, x, x, False, 0.1, 1e-5, True), {}, False),
        (ops.aten.batch_norm.default, (x, x, x, x, x, True, 0.1, 1e-5, True), {}, True),
        (ops.aten._native_batch_norm_legit.default, (x, x, x, x, x, True, 0.1, 1e-5), {}, True),
        (ops.aten._native_batch_norm_legit.default, (x, x, x, x, x, False, 0.1, 1e-5), {}, False),
        (ops.aten._native_batch_norm_legit.no_stats, (x, x, x, True, 0.1, 1e-5), {}, False),
        (ops.aten._native_batch_norm_legit_no_training.default, (x, x, x, x, x, 0.1, 1e-5), {}, False),
        (F.batch_norm, (x, None, None), {"training": True}, False),  # no statistics to write
        ("add_", (x, 1), {}, True), ("whatever_", (x,), {}, True), ("__getitem__", (x, 0), {}, False),
        ("add", (x, 1), {}, False), ("whatever", (x,), {}, False), ("sort", (x,), {}, True), ("append", (x, 1), {}, True),
        (print, (x,), {}, False), (F.conv2d, (x,), {}, True),
    ]  # fmt: skip
    for target, args, kwargs, expected in cases:
        node = g.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)
        assert _core.op_impure(node, None) == expected, (target, args, kwargs)
    assert _core.op_impure(x, None) and _core.op_impure(g.output(x), None)
    assert not _core.op_impure(g.get_attr("w"), None)


# -- the fused operators as nodes --------------------------------------------------------------------------------
def pair(conv: Any, features: int, bn: Any = nn.BatchNorm1d) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    layer = bn(features)
    layer.running_mean[...] = rng.standard_normal(features)
    layer.running_var[...] = rng.random(features) + 0.5
    layer.weight[...] = rng.standard_normal(features)
    return conv, layer.eval()


@pytest.fixture
def fallbacks() -> Any:
    start = counters["efficient_conv_bn_eval_fallback"]
    return lambda: counters["efficient_conv_bn_eval_fallback"] - start


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_graph_nodes_compute_what_was_written_where_they_cannot_fuse(fallbacks: Any, rng: Any) -> None:
    node = _efficient.graph_efficient_conv_bn_eval
    linear, bn = pair(nn.Linear(4, 5), 5)
    x = rng.standard_normal((3, 4)).astype(np.float32)
    close(node(bn, linear, x), bn(linear(x)))
    assert fallbacks() == 0
    deep = rng.standard_normal((3, 5, 4)).astype(np.float32)  # BatchNorm reads axis 1, which here has 5 entries too
    with pytest.raises(FoldError):
        pyconvbn.efficient_conv_bn_eval(bn, linear, deep)
    close(node(bn, linear, deep), bn(linear(deep)))
    out = np.empty((3, 5, 5), np.float32)
    assert node(bn, linear, deep, out=out) is out
    close(out, bn(linear(deep)))
    assert fallbacks() == 2
    conv, bn = pair(nn.Conv1d(4, 5, 3, padding=1), 5)
    bn.train()
    twin = copy.deepcopy(bn)
    image = rng.standard_normal((2, 4, 6)).astype(np.float32)
    close(node(bn, conv, image), twin(conv(image)))
    close(bn.running_mean, twin.running_mean)  # the statistics moved as they would have
    assert fallbacks() == 3


def test_unbatched_input(fallbacks: Any, rng: Any) -> None:
    conv, bn = pair(nn.Conv1d(4, 5, 3, padding=1), 6)
    x = rng.standard_normal((4, 6)).astype(np.float32)  # (5, 6) after the convolution: 6 is BatchNorm's axis
    with pytest.raises(ValueError):
        pyconvbn.efficient_conv_bn_eval(bn, conv, x)
    close(_efficient.graph_efficient_conv_bn_eval(bn, conv, x), bn(conv(x)))
    assert fallbacks() == 1


def test_output_size(fallbacks: Any, rng: Any) -> None:
    conv, bn = pair(nn.ConvTranspose2d(3, 4, 3, stride=2), 4, nn.BatchNorm2d)
    x = rng.standard_normal((2, 3, 5, 5)).astype(np.float32)
    close(_efficient.graph_efficient_conv_bn_eval(bn, conv, x, output_size=(12, 11)), bn(conv(x, (12, 11))))
    assert fallbacks() == 0
    bn.train()
    twin = copy.deepcopy(bn)
    close(_efficient.graph_efficient_conv_bn_eval(bn, conv, x, output_size=(12, 11)), twin(conv(x, (12, 11))))
    assert fallbacks() == 1


def test_what_the_original_cannot_do_fails_as_the_original(fallbacks: Any) -> None:
    conv, bn = pair(nn.Conv1d(4, 5, 3), 5)
    for x in (ones(2, 3, 9), ones(2, 4, 2), "text"):
        with pytest.raises((ValueError, TypeError)) as original:
            bn(conv(x))
        with pytest.raises(type(original.value)) as fused:
            _efficient.graph_efficient_conv_bn_eval(bn, conv, x)
        assert str(fused.value) == str(original.value) and fused.value.__context__ is None
    with pytest.raises(TypeError):
        _efficient.graph_efficient_conv_bn_eval_decomposed(None, None, ones(5), ones(5), 1e-5, len, None, None, ones(1))
    assert fallbacks() == 0


DECOMPOSED: list[tuple[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...], int]] = [
    (F.linear, (2, 4), (5, 4), (), 5), (ops.aten.linear.default, (2, 4), (5, 4), (), 5),
    (F.conv1d, (2, 4, 9), (6, 2, 3), (2, "valid", 1, 2), 6), (F.conv2d, (2, 4, 9, 8), (6, 4, 3, 2), (1, "same"), 6),
    (ops.aten.conv1d.default, (2, 4, 9), (6, 2, 3), ([2], [1], [1], 2), 6),
    (ops.aten.conv2d.padding, (2, 4, 9, 8), (6, 4, 3, 2), ([1, 1], "same", [1, 2]), 6),
    (ops.aten.conv3d.default, (2, 2, 5, 6, 4), (3, 2, 2, 1, 3), (), 3),
    (F.conv_transpose2d, (2, 4, 5, 4), (4, 3, 3, 2), ((2, 1), 1, (1, 0), 2), 6),
    (ops.aten.conv_transpose1d.default, (2, 4, 5), (4, 3, 3), ([2], [0], [1], 2), 6),
    (ops.aten.conv_transpose2d.input, (2, 4, 5, 4), (4, 3, 3, 2), ([2, 1], [1, 0], [1, 0], 2, [1, 2]), 6),
    (ops.aten.conv_transpose3d.input, (2, 2, 3, 2, 3), (2, 3, 2, 2, 2), (), 3),
    (ops.aten.convolution.default, (2, 4, 9), (6, 2, 3), ([2], [1], [1], False, [0], 2), 6),
    (ops.aten.convolution.default, (2, 4, 5, 4), (4, 3, 3, 2), ([2, 1], [1, 0], [1, 2], True, [1, 0], 2), 6),
]  # fmt: skip


@pytest.mark.parametrize("conv, xs, ws, rest, channels", DECOMPOSED, ids=lambda v: getattr(v, "op_name", ""))
@pytest.mark.parametrize("bias", [False, True])
def test_decomposed_takes_every_convolution(
    conv: Any, xs: Any, ws: Any, rest: Any, channels: int, bias: bool, fallbacks: Any, rng: Any
) -> None:
    x, w = rng.standard_normal(xs).astype(np.float32), rng.standard_normal(ws).astype(np.float32)
    b = rng.standard_normal(channels).astype(np.float32) if bias else None
    gamma, beta, mean = (rng.standard_normal(channels).astype(np.float32) for _ in range(3))
    var = (rng.random(channels) + 0.5).astype(np.float32)
    want = F.batch_norm(conv(x, w, b, *rest), mean, var, gamma, beta, eps=1e-3)
    for function in (pyconvbn.efficient_conv_bn_eval_decomposed, _efficient.graph_efficient_conv_bn_eval_decomposed):
        close(function(gamma, beta, mean, var, 1e-3, conv, w, b, x, rest), want)
    assert fallbacks() == 0
    with pytest.raises(ValueError, match="conv_remaining_args"):
        pyconvbn.efficient_conv_bn_eval_decomposed(gamma, beta, mean, var, 1e-3, conv, w, b, x, (1,) * 8)


def test_decomposed_linear_with_more_axes(fallbacks: Any, rng: Any) -> None:
    x, w = rng.standard_normal((3, 5, 4)).astype(np.float32), rng.standard_normal((5, 4)).astype(np.float32)
    mean, var = ones(5), ones(5) * 2
    for conv in (F.linear, ops.aten.linear.default):
        with pytest.raises(FoldError):
            pyconvbn.efficient_conv_bn_eval_decomposed(None, None, mean, var, 0.1, conv, w, None, x)
        got = _efficient.graph_efficient_conv_bn_eval_decomposed(None, None, mean, var, 0.1, conv, w, None, x)
        close(got, F.batch_norm(F.linear(x, w), mean, var, eps=0.1))
    assert fallbacks() == 2


def test_graph_forms_print_as_the_operator_and_pickle_as_themselves() -> None:
    for name in ("efficient_conv_bn_eval", "efficient_conv_bn_eval_decomposed"):
        inserted, public = getattr(_efficient, f"graph_{name}"), getattr(pyconvbn, name)
        assert inserted is not public and inserted.__name__ == name and inserted.op_name == public.op_name == name
        assert pickle.loads(pickle.dumps(inserted)) is inserted and pickle.loads(pickle.dumps(public)) is public
        assert Graph().call_function(inserted, ()).name == name
