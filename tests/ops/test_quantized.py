# SPDX-License-Identifier: BSD-3-Clause
"""ops.quantized_decomposed: torch's numbers bit for bit, and what is defined where torch's are not."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, ops
from pyconvbn.ops import _quantized

Q = ops.quantized_decomposed
NAMES = ("quantize_per_tensor", "dequantize_per_tensor", "quantize_per_channel", "dequantize_per_channel")
DTYPES = ("int8", "uint8", "int16", "uint16", "int32")


@pytest.fixture(scope="module")
def torch() -> Any:
    module = pytest.importorskip("torch")
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    return module


def theirs(torch: Any, name: str) -> Any:
    return getattr(torch.ops.quantized_decomposed, name).default


def limits(dtype: str) -> tuple[int, int]:
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


def values(rng: np.random.Generator, shape: tuple[int, ...], scale: float, span: float) -> Any:
    """Around the range, half of them near the middle between two integers."""
    x = rng.uniform(-span, span, shape)
    halves = (np.floor(x) + 0.5) * (1 + rng.integers(-2, 3, shape) * 2.0**-24)
    return (np.where(rng.random(shape) < 0.5, halves, x) * scale).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_schema_is_torchs(torch: Any, name: str) -> None:
    schema = theirs(torch, name)._schema
    ours = _core.op_info(f"quantized_decomposed.{name}.default")["params"]
    assert [p["name"] for p in ours] == [a.name for a in schema.arguments]
    assert [p["keyword_only"] for p in ours] == [a.kwarg_only for a in schema.arguments]
    assert [p["has_default"] for p in ours] == [a.has_default_value() for a in schema.arguments]
    function = inspect.signature(_quantized.QUANTIZED[f"quantized_decomposed.{name}.default"]).parameters.values()
    assert [p.name for p in function] == [p["name"] for p in ours]
    assert str(getattr(Q, name).default) == f"quantized_decomposed.{name}.default"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [False, True])
def test_per_tensor_is_torchs(torch: Any, dtype: str, half: bool, rng: np.random.Generator) -> None:
    differences = 0
    for scale in (0.1, 1 / 3, 0.0123456789, 7.3e-5, 3.0):
        low, high = limits(dtype)
        zero = int(rng.integers(max(low, -100), min(high, 100)))
        span = min(high * 1.3, 2.0**30)
        x = values(rng, (7, 33), scale, span)
        if half:
            x = np.clip(x, -6e4, 6e4).astype(np.float16)
        if dtype == "int8":
            low, high = -127, 126
        ours = Q.quantize_per_tensor.default(x, scale, zero, low, high, np.dtype(dtype))
        want = theirs(torch, "quantize_per_tensor")(torch.from_numpy(x), scale, zero, low, high, getattr(torch, dtype))
        assert ours.dtype == dtype and ours.shape == x.shape
        np.testing.assert_array_equal(ours, want.numpy())
        naive = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)) + zero, low, high)
        differences += int((naive != ours).sum())
        for out in (None, "float16", "float32", "float64"):
            back = Q.dequantize_per_tensor.default(ours, scale, zero, low, high, dtype, out_dtype=out)
            kind = None if out is None else getattr(torch, out)
            args = torch.from_numpy(ours), scale, zero, low, high, getattr(torch, dtype)
            reference = theirs(torch, "dequantize_per_tensor")(*args, out_dtype=kind)
            np.testing.assert_array_equal(back, reference.numpy())
            assert back.dtype == (out or "float32")
    assert half or differences > 0  # the inverse is what was multiplied with


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("wide", [False, True])
def test_per_channel_is_torchs(torch: Any, dtype: str, axis: int, wide: bool, rng: np.random.Generator) -> None:
    low, high = limits(dtype)
    shape = (5, 6, 7)
    n = shape[axis]
    scales = rng.uniform(1e-3, 0.4, n).astype(np.float64 if wide else np.float32)
    zeros = rng.integers(max(low, -50), min(high, 50), n)
    x = values(rng, shape, 0.1, min(high * 1.3, 2.0**28))
    ours = Q.quantize_per_channel.default(x, scales, zeros, axis, low, high, dtype)
    torchs = [torch.from_numpy(a) for a in (x, scales, zeros)]
    want = theirs(torch, "quantize_per_channel")(*torchs, axis, low, high, getattr(torch, dtype))
    inside = np.abs(x / np.min(scales)) < 2.0**30 if dtype == "int32" else np.ones(shape, bool)
    np.testing.assert_array_equal(ours[inside], want.numpy()[inside])
    assert ours.dtype == dtype and inside.any()
    np.testing.assert_array_equal(ours, Q.quantize_per_channel.default(x, scales, zeros, axis - 3, low, high, dtype))
    single = scales.astype(np.float32)
    small = np.clip(ours, -2**23, 2**23).astype(dtype)  # torch subtracts integers, exact in float32 only up to here
    for some in (zeros, None):
        back = Q.dequantize_per_channel.default(small, single, some, axis, low, high, dtype)
        stored = "int32" if dtype == "uint16" else dtype  # torch subtracts nothing from uint16
        kept = torch.from_numpy(small.astype(stored))
        args = kept, torch.from_numpy(single), None if some is None else torch.from_numpy(some)
        reference = theirs(torch, "dequantize_per_channel")(*args, axis, low, high, getattr(torch, stored))
        np.testing.assert_array_equal(back, reference.numpy())
        half = Q.dequantize_per_channel.default(small, single, some, axis, low, high, dtype, out_dtype="float16")
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(half, reference.numpy().astype(np.float16))


def test_what_torch_leaves_open() -> None:
    per_tensor = Q.quantize_per_tensor.default
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -0.0], np.float32)
    low, high = limits("int32")
    np.testing.assert_array_equal(per_tensor(x, 1e-3, 7, low, high, "int32"), [7, high, low, high, low, 7, 7])
    np.testing.assert_array_equal(per_tensor(x, 1e-3, 7, -5, 5, "int8"), [5, 5, -5, 5, -5, 5, 5])
    got = Q.quantize_per_channel.default(
        np.full((2, 2), np.nan, np.float32), np.ones(2, np.float32), np.array([3, 90]), -1, -8, 8, "int8"
    )
    np.testing.assert_array_equal(got, [[3, 8], [3, 8]])
    one = per_tensor(np.array(1.26, np.float32), 0.5, 0, -128, 127, "int8")
    assert isinstance(one, np.ndarray) and one.shape == () and one == 3
    assert per_tensor(np.ones((0, 3), np.float32), 0.5, 0, -128, 127, "int8").shape == (0, 3)
    # halves go to even
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    np.testing.assert_array_equal(per_tensor(halves, 1.0, 0, -128, 127, "int8"), [0, 2, 2, 0, -2])


def test_arguments_of_torch_are_taken(torch: Any) -> None:
    x = torch.tensor([0.3, -1.2])
    ours = Q.quantize_per_tensor.default(x, 0.1, 0, -128, 127, torch.int8)
    np.testing.assert_array_equal(ours, [3, -12])
    q = torch.from_numpy(ours)
    back = Q.dequantize_per_tensor.default(q, 0.1, 0, -128, 127, torch.int8, out_dtype=torch.float64)
    np.testing.assert_array_equal(back, ours * 0.1)


def test_inputs_are_not_written(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 4)).astype(np.float32)
    q = rng.integers(-9, 9, (3, 4)).astype(np.int8)
    scales, zeros = np.ones(3, np.float32), np.zeros(3, np.int64)
    for a in (x, q, scales, zeros):
        a.flags.writeable = False
    Q.quantize_per_tensor.default(x, 0.1, 1, -128, 127, "int8")
    Q.quantize_per_channel.default(x, scales, zeros, 0, -128, 127, "int8")
    Q.dequantize_per_tensor.default(q, 0.1, 1, -128, 127, "int8")
    Q.dequantize_per_channel.default(q, scales, zeros, 0, -128, 127, "int8")


X, I = np.ones((2, 3), np.float32), np.ones((2, 3), np.int8)
S, Z = np.ones(3, np.float32), np.zeros(3, np.int64)


@pytest.mark.parametrize(
    "name, args, error, text",
    [
        ("quantize_per_tensor", (X.astype(np.float64), 0.1, 0, -128, 127, "int8"), TypeError, "input.*float64"),
        ("quantize_per_tensor", (I, 0.1, 0, -128, 127, "int8"), TypeError, "input.*int8"),
        ("quantize_per_tensor", (X, 0.1, 0, -128, 127, "int64"), TypeError, "dtype.*int64"),
        ("quantize_per_tensor", (X, 0.1, 0, -129, 127, "int8"), ValueError, "quant_min.*-129"),
        ("quantize_per_tensor", (X, 0.1, 0, 0, 256, "uint8"), ValueError, "quant_max.*256"),
        ("quantize_per_tensor", (X, 0.0, 0, -128, 127, "int8"), ValueError, "scale"),
        ("quantize_per_channel", (X, S[:2], Z, 1, -128, 127, "int8"), ValueError, r"scales.*\(3,\).*\(2,\)"),
        ("quantize_per_channel", (X, S, Z[:2], 1, -128, 127, "int8"), ValueError, "zero_points"),
        ("quantize_per_channel", (X, S, Z, 2, -128, 127, "int8"), ValueError, "axis.*2"),
        ("quantize_per_channel", (X[0, 0], S, Z, 0, -128, 127, "int8"), (ValueError, TypeError), "input"),
        ("dequantize_per_tensor", (I, 0.1, 0, 0, 255, "uint8"), TypeError, "input.*uint8.*int8"),
        ("dequantize_per_channel", (I, S[:2], Z, 1, -128, 127, "int8"), ValueError, "scales"),
        ("dequantize_per_channel", (I, S, Z, -3, -128, 127, "int8"), ValueError, "axis.*-3"),
    ],
)
def test_errors_name_the_argument(name: str, args: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        getattr(Q, name).default(*args)


def test_out_dtype_is_floating() -> None:
    with pytest.raises(TypeError, match="out_dtype.*int32"):
        Q.dequantize_per_tensor.default(I, 0.1, 0, -128, 127, "int8", out_dtype="int32")


@pytest.mark.parametrize("dtype", ["int8", np.dtype("int16"), np.uint16, np.int32])
@pytest.mark.parametrize("out", [None, "float16", np.dtype("float64"), np.float32])
def test_shapes_are_predicted(dtype: Any, out: Any, rng: np.random.Generator) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    _core.op_set_tensor(x, ((2, 3), "f", 2))
    low, high = (int(v) for v in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    for name, params in (("per_tensor", (0.1, 0)), ("per_channel", (S, Z, -1))):
        q = graph.call_function(getattr(Q, f"quantize_{name}").default, (x, *params, low, high, dtype))
        keywords = {} if out is None else {"out_dtype": out}
        back = graph.call_function(getattr(Q, f"dequantize_{name}").default, (q, *params, low, high, dtype), keywords)
        plain, wide = np.dtype(dtype), np.dtype(out or np.float32)
        assert _core.op_infer_shape(q, None) == ((2, 3), plain.kind, plain.itemsize)
        assert _core.op_infer_shape(back, None) == ((2, 3), "f", wide.itemsize)
        output = graph.output(back)
        assert fx.GraphModule({}, graph)(X.astype(np.float16)).dtype == wide
        graph.erase_node(output)


def test_no_shape_is_predicted_where_the_operator_refuses() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    quantize = Q.quantize_per_tensor.default
    for meta, dtype in ((((2,), "f", 8), "int8"), (((2,), "f", 4), "int64"), (((2,), "f", 4), "float32")):
        _core.op_set_tensor(x, meta)
        assert _core.op_infer_shape(graph.call_function(quantize, (x, 0.1, 0, -128, 127, dtype)), None) is None
