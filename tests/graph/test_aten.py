# SPDX-License-Identifier: BSD-3-Clause
"""ops.aten: every operator computes what torch's of that name does, and looks as it does."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, ops
from pyconvbn import functional as F
from pyconvbn.ops import _aten

RNG = np.random.default_rng(20)


def f(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Any:
    return (np.abs(f(*shape)) + 0.5).astype(np.float32)


X, X1, X2, X3 = f(2, 4, 6, 6), f(2, 4, 9), f(2, 4, 9, 7), f(2, 4, 5, 6, 4)
M, N = f(5, 3), f(3, 4)
MEAN, VAR, GAMMA, BETA = f(4), positive(4), f(4), f(4)
B = X > 0

# overload -> calls (args, kwargs)
CALLS: dict[str, list[Any]] = {
    "conv1d.default": [((X1, f(6, 2, 3), f(6), [2], [1], [1], 2), {})],
    "conv2d.default": [((X2, f(6, 4, 3, 3)), {}), ((X2, f(6, 2, 3, 3)), {"padding": [1, 0], "groups": 2})],
    "conv3d.default": [((X3, f(3, 4, 2, 3, 1), None, [1, 2, 1]), {})],
    "conv1d.padding": [((X1, f(6, 4, 3), None, [1], "same"), {})],
    "conv2d.padding": [((X2, f(6, 4, 3, 2), f(6)), {"padding": "same", "dilation": [2, 1]}), ((X2, f(6, 4, 3, 2)), {})],
    "conv3d.padding": [((X3, f(3, 4, 2, 3, 1)), {"padding": "valid"})],
    "conv_transpose1d.default": [((X1, f(4, 3, 3), f(3), [2], [1], [1]), {})],
    "conv_transpose2d.input": [((X2, f(4, 3, 3, 2), f(6), [2, 1], [1, 0], [1, 0], 2, [1, 2]), {})],
    "conv_transpose3d.input": [((X3, f(4, 2, 2, 2, 2)), {})],
    "convolution.default": [
        ((X2, f(6, 2, 3, 3), f(6), [2, 1], [1, 1], [1, 1], False, [0, 0], 2), {}),
        ((X2, f(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 0], 2), {}),
        ((X1, f(6, 4, 3), None, [1], [0], [2], False, [0], 1), {}),
    ],
    "linear.default": [((M, f(4, 3), f(4)), {}), ((f(2, 3, 3), f(4, 3)), {})],
    "batch_norm.default": [
        ((X, GAMMA, BETA, MEAN, VAR, False, 0.1, 1e-3, True), {}), ((X, None, None, MEAN, VAR, True, 0.3, 1e-5, False), {}),
    ],
    "_native_batch_norm_legit.default": [
        ((X, GAMMA, BETA, MEAN, VAR, True, 0.2, 1e-3), {}), ((X, GAMMA, BETA, MEAN, VAR, False, 0.2, 1e-3), {}),
    ],
    "native_batch_norm.default": [((X, GAMMA, BETA, MEAN, VAR, True, 0.2, 1e-3), {})],
    "_native_batch_norm_legit.no_stats": [((X, GAMMA, BETA, True, 0.2, 1e-3), {})],
    "_native_batch_norm_legit_no_training.default": [((X, GAMMA, BETA, MEAN, VAR, 0.2, 1e-3), {})],
    "_native_batch_norm_legit_functional.default": [((X, GAMMA, BETA, MEAN, VAR, True, 0.2, 1e-3), {})],
    "layer_norm.default": [((X, [6, 6], f(6, 6), f(6, 6)), {}), ((X, [6]), {"eps": 1e-3})],
    "group_norm.default": [((X, 2, GAMMA, BETA), {}), ((X, 4), {})],
    "leaky_relu.default": [((X,), {}), ((X, 0.3), {})], "leaky_relu_.default": [((X, 0.3), {})],
    "hardtanh.default": [((X, -0.5, 2), {})], "hardtanh_.default": [((X,), {})],
    "gelu.default": [((X,), {}), ((X,), {"approximate": "tanh"})],
    "elu.default": [((X,), {}), ((X, 0.5, 1.2, 0.7), {})], "elu_.default": [((X, 0.5), {})],
    "softplus.default": [((X,), {}), ((X * 20, 2, 5), {})], "prelu.default": [((X, f(4)), {}), ((X, f(1)), {})],
    "softmax.int": [((X, 1), {})], "_softmax.default": [((X, -1, False), {})],
    "log_softmax.int": [((X, 1), {})], "_log_softmax.default": [((X, -1, False), {})],
    "rsub.Tensor": [((X, f(6)), {"alpha": 2})], "rsub.Scalar": [((X, 1.5), {}), ((X, 1.5, 3), {})],
    "div.Tensor_mode": [((X, positive(6)), {"rounding_mode": m}) for m in (None, "floor", "trunc")],
    "max_pool1d.default": [((X1, [3], [2], [1]), {}), ((X1, [3]), {})],
    "max_pool2d.default": [((X2, [3, 2]), {}), ((X2, [3, 3], [2, 2], [1, 1], [1, 1], True), {})],
    "max_pool3d.default": [((X3, [2, 2, 2], [1, 1, 2]), {})],
    "avg_pool1d.default": [((X1, [3], [2], [1], False, False), {})],
    "avg_pool2d.default": [((X2, [3, 3], [2, 2], [1, 1], True, False), {}), ((X2, [2, 2]), {"divisor_override": 3})],
    "avg_pool3d.default": [((X3, [2, 2, 2]), {})],
    "adaptive_avg_pool1d.default": [((X1, [4]), {})], "adaptive_avg_pool2d.default": [((X2, [1, 1]), {}), ((X2, [4, 3]), {})],
    "adaptive_avg_pool3d.default": [((X3, [2, 3, 1]), {})],
    "_adaptive_avg_pool2d.default": [((X2, [2, 3]), {})], "_adaptive_avg_pool3d.default": [((X3, [2, 3, 1]), {})],
    "mean.dim": [((X, [2, 3]), {}), ((X, [-1], True), {}), ((X, None), {})], "mean.default": [((X,), {})],
    "sum.dim_IntList": [((X, [2, 3]), {}), ((X, [1], True), {})], "sum.default": [((X,), {})],
    "amax.default": [((X, [1, 2]), {}), ((X,), {})], "amin.default": [((X, [1], True), {})],
    "max.default": [((X,), {})], "argmax.default": [((X, 1), {}), ((X,), {}), ((X, -1, True), {})],
    "var.correction": [((X, [2, 3]), {"correction": 0}), ((X, [1]), {"keepdim": True}), ((X,), {})],
    "flatten.using_ints": [((X, 1), {}), ((X, 0, 2), {})], "view.default": [((X, [2, -1]), {})],
    "_unsafe_view.default": [((X, [8, 36]), {})], "reshape.default": [((X, [-1, 6]), {})],
    "permute.default": [((X, [0, 2, 3, 1]), {})], "transpose.int": [((X, 1, -1), {})], "t.default": [((M,), {}), ((f(3),), {})],
    "cat.default": [(([X, X], 1), {}), (([X, f(2, 1, 6, 6)],), {"dim": -3})], "stack.default": [(([M, M], -1), {})],
    "unsqueeze.default": [((M, -1), {}), ((M, 0), {})], "squeeze.dim": [((f(2, 1, 3), 1), {}), ((M, 0), {})],
    "squeeze.dims": [((f(1, 2, 1), [0, -1]), {})], "squeeze.default": [((f(1, 2, 1),), {})],
    "slice.Tensor": [((X, 1, 1, 3), {}), ((X, -1, None, 9223372036854775807, 2), {}), ((X,), {"dim": 2, "start": -3})],
    "select.int": [((X, 1, -1), {}), ((f(3), 0, 1), {})], "narrow.default": [((X, 3, 1, 4), {}), ((X, 3, -3, 2), {})],
    "chunk.default": [((X, 3, 1), {}), ((X, 4, -1), {})], "split.Tensor": [((X, 4, 2), {})],
    "split_with_sizes.default": [((X, [1, 3], 1), {})], "unbind.int": [((X, 1), {})],
    "expand.default": [((f(1, 3), [4, 2, -1]), {})], "expand_as.default": [((f(1, 3), f(4, 3)), {})],
    "repeat.default": [((M, [2, 1, 3]), {})], "flip.default": [((X, [1, -1]), {})],
    "roll.default": [((X, [2], [1]), {}), ((X, [3]), {}), ((X, [1, -2], [2, 3]), {})],
    "copy.default": [((X, f(6)), {})], "copy_.default": [((X, f(6)), {})], "fill_.Scalar": [((X, 2), {})],
    "pad.default": [((X, [1, 2, 0, 1]), {}), ((X, [1, 2, 3, 1], "reflect"), {}), ((X, [1, 1], "constant", 2.5), {})],
    "constant_pad_nd.default": [((X, [1, -2]), {}), ((X, [0, 0, 1, 1], 3), {})],
    "upsample_nearest1d.vec": [((X1, [12], None), {}), ((X1, None, [2.0]), {})],
    "upsample_nearest2d.vec": [((X2, [12, 5], None), {}), ((X2, None, [2.0, 1.5]), {})],
    "upsample_nearest3d.vec": [((X3, None, [2.0, 1.0, 1.0]), {})],
    "upsample_bilinear2d.vec": [((X2, [12, 5], False, None), {}), ((X2, None, True, [2.0, 1.5]), {})],
    "dropout.default": [((X, 0.5, False), {})], "feature_dropout.default": [((X, 0.5, False), {})],
    "dropout_.default": [((X, 0.5, False), {})],
    "matmul.default": [((M, N), {}), ((f(2, 5, 3), N), {}), ((f(3), f(3)), {})], "mm.default": [((M, N), {})],
    "bmm.default": [((f(2, 5, 3), f(2, 3, 4)), {})],
    "addmm.default": [((f(4), M, N), {}), ((f(5, 4), M, N), {"beta": 0, "alpha": 2})],
    "baddbmm.default": [((f(2, 5, 4), f(2, 5, 3), f(2, 3, 4)), {"beta": 0.5})],
    "where.self": [((B, X, f(6)), {})], "where.ScalarOther": [((B, X, 2.0), {})], "where.ScalarSelf": [((B, 1, X), {})],
    "masked_fill.Scalar": [((X, B, -1.5), {})], "full_like.default": [((X, 2.5), {})],
    "zeros.default": [(([2, 3],), {})], "ones.default": [(([2, 3],), {})],
    "full.default": [(([2], 3), {}), (([2], 3.5), {}), (([2], True), {})],
    "arange.default": [((5,), {}), ((2.5,), {})], "arange.start": [((2, 7), {})],
    "sqrt.default": [((positive(9),), {})], "rsqrt.default": [((positive(9),), {})], "log.default": [((positive(9),), {})],
    "pow.Tensor_Scalar": [((positive(9), 2.5), {}), ((X, 2), {})], "pow.Tensor_Tensor": [((positive(9), f(9)), {})],
    "pow.Scalar": [((2.0, X), {})],
    "clamp.default": [((X, -0.3), {}), ((X, None, 0.5), {}), ((X, -1, 1), {})], "clamp_.default": [((X, 0.0), {})],
    "clamp_min.default": [((X, 0.1), {})], "clamp_max.default": [((X, 0.1), {})],
    "minimum.default": [((X, f(6)), {})], "maximum.default": [((X, f(6)), {})],
    "pixel_shuffle.default": [((f(2, 8, 3, 4), 2), {})], "pixel_unshuffle.default": [((f(2, 3, 4, 6), 2), {})],
    "channel_shuffle.default": [((X, 2), {})], "logical_and.default": [((B, ~B), {})], "logical_not.default": [((B,), {})],
    "index.Tensor": [((X, [None, np.array([2, 0])]), {})], "sym_size.int": [((X, -1), {})],
    "view_as.default": [((X, f(8, 36)), {})],
    "as_strided.default": [((X, [3, 2], [1, 4]), {}), ((X, [4, 4], [2, 0], 5), {})],
    "as_strided_.default": [((M, [5, 3], [3, 1]), {})],  # its own strides: torch changes the argument's
    "as_strided_scatter.default": [((X, f(3, 2), [3, 2], [1, 4]), {}), ((X, f(2, 2), [2, 2], [9, 1], 5), {})],
}  # fmt: skip
for name in ("add", "sub"):
    for mark in ("", "_"):
        CALLS[f"{name}{mark}.Tensor"] = [((X, f(6)), {}), ((X, f(2, 4, 6, 6)), {"alpha": 3})]
        CALLS[f"{name}{mark}.Scalar"] = [((X, 1.5), {}), ((X, 2, 0.5), {})]
for name in ("mul", "div"):
    for mark in ("", "_"):
        CALLS[f"{name}{mark}.Tensor"] = [((X, positive(6)), {})]
        CALLS[f"{name}{mark}.Scalar"] = [((X, 1.5), {}), ((X, 3), {})]
for name in ("eq", "ne", "gt", "ge", "lt", "le"):
    CALLS[f"{name}.Tensor"] = [((X, f(6)), {})]
    CALLS[f"{name}.Scalar"] = [((X, 0), {})]
RANDOM = {"rand_like.default", "randn_like.default"}
# dtypes are tested by a test of their own; torch's has no CPU kernel for these alone
APART = {"_to_copy.default", "to.dtype", "to.dtype_layout"}
NAMES = [n.removeprefix("aten.") for n in ops.list() if n.startswith("aten.")]


def find(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(ops.aten, packet), overload)


def calls(name: str) -> list[Any]:
    """Calls of an overload; an elementwise one of a single argument needs no entry above."""
    return CALLS.get(name, [((X,), {})])


def fresh(value: Any, wrap: Any) -> Any:
    """A copy, so that what is written in place is seen by one side only."""
    if isinstance(value, np.ndarray):
        return wrap(value.copy())
    if isinstance(value, list | tuple):
        return type(value)(fresh(v, wrap) for v in value)
    return value


def close(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
    elif isinstance(theirs, int | float):
        assert ours == theirs and type(ours) is type(theirs)
    else:
        expected = theirs.detach().numpy()
        assert isinstance(ours, np.ndarray), type(ours)
        assert ours.shape == expected.shape and ours.dtype == expected.dtype, (ours.dtype, expected.dtype)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RANDOM | APART])
def test_values_agree_with_torch(torch: Any, name: str) -> None:
    packet, overload = name.split(".")
    theirs = getattr(getattr(torch.ops.aten, packet), overload)
    for args, kwargs in calls(name):
        a, b = fresh(args, np.asarray), fresh(args, torch.from_numpy)
        close(find(name)(*a, **kwargs), theirs(*b, **kwargs))
        for mine, its in zip(a, b, strict=True):  # what was written in place
            if isinstance(mine, np.ndarray):
                np.testing.assert_allclose(mine, its.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_schema_says_about_memory_is_true(name: str) -> None:
    """Arguments without (a!) are not written; without (a) the result shares no memory with them."""
    info = _core.op_info(f"aten.{name}")
    batch_norm = "batch_norm" in name
    for args, kwargs in [((X, np.float32), {})] if name == "to.dtype" else calls(name):
        a = fresh(args, np.asarray)
        result = find(name)(*a, **kwargs)
        results = [r for r in (result if isinstance(result, list | tuple) else [result]) if isinstance(r, np.ndarray)]
        for parameter, before, after in zip(info["params"], args, a, strict=False):
            arrays = list(zip(before, after, strict=True)) if isinstance(before, list) else [(before, after)]
            for old, new in arrays:
                if not isinstance(old, np.ndarray):
                    continue
                if not parameter["written"] and not (batch_norm and parameter["name"].startswith("running")):
                    np.testing.assert_array_equal(old, new)
                if not parameter["aliased"]:
                    assert not any(np.shares_memory(r, new) for r in results), parameter["name"]


def test_views_are_views() -> None:
    """(a) operators whose result torch always makes a view of its argument."""
    for name in ("view.default", "permute.default", "transpose.int", "t.default", "unsqueeze.default", "squeeze.dim",
                 "slice.Tensor", "select.int", "chunk.default", "split.Tensor", "expand.default", "detach.default",
                 "flatten.using_ints", "narrow.default", "unbind.int", "as_strided.default"):  # fmt: skip
        for args, kwargs in calls(name):
            result = find(name)(*args, **kwargs)
            for part in result if isinstance(result, list) else [result]:
                assert np.shares_memory(part, args[0]), name


def test_view_refuses_what_needs_a_copy() -> None:
    with pytest.raises(ValueError, match="size: .*reshape"):
        ops.aten.view.default(M.T, [-1])
    assert ops.aten.reshape.default(M.T, [-1]).shape == (15,)


def test_dtypes(torch: Any) -> None:
    half = X.astype(np.float16)
    for name in ("tanh.default", "exp.default", "sigmoid.default", "mean.default", "softmax.int"):
        args = (half, 1) if name == "softmax.int" else (half,)
        assert find(name)(*args).dtype == np.float16
    assert ops.aten._to_copy.default(X, dtype=torch.float64).dtype == np.float64
    assert ops.aten.to.dtype(X, np.float16).dtype == np.float16
    same = ops.aten.to.dtype(X, "float32")
    assert same is X
    assert not np.shares_memory(ops.aten._to_copy.default(X), X)
    counts = np.arange(3)
    for ours, theirs in (
        (ops.aten.add.Tensor(counts, 1), torch.ops.aten.add.Tensor(torch.arange(3), 1)),
        (ops.aten.add.Tensor(counts, 1.5), torch.ops.aten.add.Tensor(torch.arange(3), 1.5)),
        (ops.aten.div.Tensor(counts, 2), torch.ops.aten.div.Tensor(torch.arange(3), 2)),
        (ops.aten.sum.default(counts > 1), torch.ops.aten.sum.default(torch.arange(3) > 1)),
        (ops.aten.mul.Tensor(np.float32(2), 3), torch.ops.aten.mul.Tensor(torch.tensor(2.0), 3)),
    ):
        close(ours, theirs)


def test_random_operators() -> None:
    a, b = ops.aten.rand_like.default(X), ops.aten.randn_like.default(X, dtype="float64")
    assert a.shape == X.shape and a.dtype == np.float32 and 0 <= a.min() and a.max() < 1
    assert b.dtype == np.float64 and not np.array_equal(b, ops.aten.randn_like.default(X))
    x = np.ones((1, 8, 50, 50), np.float32)
    assert sorted(set(np.unique(ops.aten.dropout.default(x, 0.5, True)))) == [0.0, 2.0]
    channels = ops.aten.feature_dropout.default(np.ones((64, 8, 3, 3), np.float32), 0.5, True)
    assert all(len(np.unique(c)) == 1 for c in channels.reshape(-1, 9))


def test_torch_tensors_are_taken(torch: Any) -> None:
    x = torch.from_numpy(X.copy())
    assert isinstance(ops.aten.tanh.default(x.requires_grad_()), np.ndarray)
    counts = torch.zeros(3, dtype=torch.int64)
    assert ops.aten.add.Tensor(counts, 1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_torchs(torch: Any, name: str) -> None:
    packet, overload = name.split(".")
    theirs = getattr(getattr(torch.ops.aten, packet), overload)._schema
    ours = _core.op_info(f"aten.{name}")
    assert [p["name"] for p in ours["params"]] == [a.name for a in theirs.arguments]
    assert [p["keyword_only"] for p in ours["params"]] == [a.kwarg_only for a in theirs.arguments]
    for p, a in zip(ours["params"], theirs.arguments, strict=True):
        assert p["has_default"] == a.has_default_value(), p
        if p["has_default"]:
            default = p["default"]
            if isinstance(default, int) and isinstance(a.default_value, list):  # int[2] padding=0 stands for [0, 0]
                default = [default] * len(a.default_value)
            assert default == a.default_value and type(default) is type(a.default_value), p
        if a.alias_info is not None:
            assert p["aliased"] and p["written"] == a.alias_info.is_write
    assert ours["nreturns"] == (-1 if str(theirs).endswith("[]") else len(theirs.returns))


@pytest.mark.parametrize("name", NAMES)
def test_functions_have_their_rows_parameters(name: str) -> None:
    params = _core.op_info(f"aten.{name}")["params"]
    found = inspect.signature(_aten.IMPLEMENTATIONS[f"aten.{name}"]).parameters.values()
    assert [p.name for p in found] == [p["name"] for p in params]
    for have, want in zip(found, params, strict=True):
        assert (have.kind is have.KEYWORD_ONLY) == want["keyword_only"]
        assert (have.default is not have.empty) == want["has_default"]
        if want["has_default"]:
            default = list(have.default) if isinstance(have.default, tuple) else have.default
            assert default == want["default"], have.name


@pytest.mark.parametrize("name", NAMES)
def test_it_looks_as_torchs(torch: Any, name: str) -> None:
    packet, overload = name.split(".")
    theirs, ours = getattr(getattr(torch.ops.aten, packet), overload), find(name)
    assert repr(ours) == repr(theirs) and str(ours) == str(theirs) and ours.__name__ == theirs.__name__
    assert name in str(ours.__doc__) and ours.schema in str(ours.__doc__)


def test_names_of_nodes_are_those_of_torch_fx(torch: Any) -> None:
    from pyconvbn.fx import Graph

    ours, theirs = Graph(), torch.fx.Graph()
    for name in NAMES:
        packet, overload = name.split(".")
        a = ours.call_function(find(name), ())
        b = theirs.call_function(getattr(getattr(torch.ops.aten, packet), overload), ())
        assert a.name == b.name


def test_lookup_pickle_and_copy() -> None:
    assert ops.aten.conv2d is ops.aten.conv2d and ops.aten.conv2d.default is ops.aten.conv2d.default
    assert ops.aten.conv2d.overloads() == ["default", "padding"]
    assert "default" in dir(ops.aten.conv2d) and "conv2d" in dir(ops.aten)
    for value in (ops.aten.conv2d.padding, ops.aten.conv2d, ops.aten, F.conv2d):
        assert copy.deepcopy(value) is value and copy.copy(value) is value
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(value, protocol)) is value
    assert isinstance(ops.aten.relu.default, _core.Operator) and not isinstance(F.relu, ops.OpOverload)
    assert hash(ops.aten.relu.default) != hash(ops.aten.relu_.default)


def test_packets_call_an_overload() -> None:
    np.testing.assert_array_equal(ops.aten.relu(X), np.maximum(X, 0))
    np.testing.assert_array_equal(ops.aten.add(X, 1.0), X + 1)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no operator 'conv2e'; near it: .*conv2d"):
        ops.aten.conv2e
    with pytest.raises(AttributeError, match="no overload 'out'; it has: default, padding"):
        ops.aten.conv2d.out
    assert not hasattr(ops.aten, "__wrapped__") and not hasattr(ops.aten.conv2d, "__wrapped__")


def test_bad_arguments() -> None:
    bad: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
        ("convolution.default", (X, f(3), None, [1], [0], [1], False, [0], 1), ValueError, "weight"),
        ("clamp.default", (X,), ValueError, "min, max"), ("t.default", (X,), ValueError, "self"),
        ("cat.default", ([],), ValueError, "tensors"), ("chunk.default", (X, 0), ValueError, "chunks"),
        ("split.Tensor", (X, 0), ValueError, "split_size"), ("select.int", (X, 0, 5), IndexError, "index"),
        ("slice.Tensor", (X, 0, 0, 1, 0), ValueError, "step"), ("unsqueeze.default", (X, 9), ValueError, "dim"),
        ("narrow.default", (X, 0, 1, 5), ValueError, "length"), ("mm.default", (X, M), ValueError, "self"),
        ("pixel_shuffle.default", (X, 3), ValueError, "upscale_factor"), ("mean.default", (np.arange(3),), TypeError, "self"),
        ("channel_shuffle.default", (X, 3), ValueError, "groups"), ("relu.default", (None,), TypeError, "None"),
        ("div.Tensor_mode", (X, X), TypeError, "rounding_mode"), ("layer_norm.default", (X, [5]), ValueError, "normalized_shape"),
        ("expand.default", (X, [2]), ValueError, "size"), ("gelu.default", (), TypeError, "self"),
    ]  # fmt: skip
    for name, args, error, words in bad:
        with pytest.raises(error, match=words):
            find(name)(*args)
    for name in ("add_.Tensor", "mul_.Tensor"):  # the result has more axes than what is written
        with pytest.raises(ValueError, match=r"self: .*\(2, 3\).*got \(3,\)"):
            find(name)(f(3), f(2, 3))
    read_only = X.copy()
    read_only.flags.writeable = False
    for name in ("relu_.default", "add_.Tensor", "zero_.default", "copy_.default"):
        with pytest.raises(ValueError, match="self: .*read-only"):
            find(name)(read_only, *([1.0] if name in ("add_.Tensor", "copy_.default") else []))
