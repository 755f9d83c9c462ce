# SPDX-License-Identifier: BSD-3-Clause
"""Every error of the array and geometry rules: its type, the argument it names, what was expected and what was got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyconvbn
import pyconvbn.functional as F
from pyconvbn import BatchNormParams, FoldError, Plan

X = np.ones((2, 6, 5, 7), np.float32)
W = np.ones((4, 6, 3, 3), np.float32)
WT = np.ones((6, 4, 3, 3), np.float32)
B = np.ones(4, np.float32)
ONE = np.ones(4, np.float32)
BN = BatchNormParams(ONE, ONE, ONE, ONE, 1e-5)


def broadcast(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """An array of any size that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Training:
    """Something shaped as a BatchNorm module."""

    def __init__(self, training: bool, mean: Any = ONE) -> None:
        self.weight, self.bias, self.running_mean, self.running_var, self.eps = ONE, ONE, mean, ONE, 1e-5
        self.training = training


# (call, exception, what the message must contain, in this order)
CASES: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    # arrays
    "list": (lambda: F.conv2d([[1.0]], W), TypeError, ["input", "expected an ndarray", "got list"]),
    "tuple": (lambda: F.conv2d(X, (1.0,)), TypeError, ["weight", "got tuple"]),
    "none": (lambda: F.conv2d(X, None), TypeError, ["weight", "got NoneType"]),
    "float": (lambda: F.linear(1.0, W), TypeError, ["input", "got float"]),
    "string": (lambda: F.conv2d(X, W, "b"), TypeError, ["bias", "got str"]),
    "plan call list": (lambda: Plan(W)([1.0]), TypeError, ["x", "got list"]),
    "residual list": (lambda: Plan(W)(X, residual=[1.0]), TypeError, ["residual", "got list"]),
    "bn list": (lambda: Plan(W, bn=BN._replace(weight=[1.0] * 4)), TypeError, ["bn.weight", "got list"]),
    # dtypes
    **{
        f"dtype {dtype}": (
            lambda dtype=dtype: F.conv2d(X.astype(dtype), W), TypeError,
            ["input", "expected dtype float16, float32 or float64", f"got {np.dtype(dtype)}"],
        )
        for dtype in ("int8", "int64", "uint8", "bool", "complex64", "complex128", "object", "longdouble", "S3")
    },
    "weight dtype": (lambda: F.conv2d(X, W.astype(int)), TypeError, ["weight", "got int64"]),
    "bias dtype": (lambda: F.conv2d(X, W, B.astype(bool)), TypeError, ["bias", "got bool"]),
    "two dtypes": (
        lambda: F.conv2d(X, W.astype("f8")), TypeError, ["input and weight", "one dtype", "float32 and float64"],
    ),
    "bias of another dtype": (
        lambda: F.conv2d(X, W, B.astype("f2")), TypeError, ["input and bias", "float32 and float16"],
    ),
    "linear dtypes": (
        lambda: F.linear(np.ones((2, 3)), np.ones((1, 3), "f")), TypeError, ["input and weight", "float64 and float32"],
    ),
    "plan dtype": (lambda: Plan(W)(X.astype("f2")), TypeError, ["x and weight", "float16 and float32"]),
    "residual dtype": (
        lambda: Plan(W)(X, residual=np.ones((2, 4, 3, 5))), TypeError, ["residual", "float32", "got float64"],
    ),
    # axes and channels
    "input axes": (lambda: F.conv2d(X[0, 0], W), ValueError, ["input", "3 (unbatched) or 4 axes", "got 2"]),
    "weight axes": (lambda: F.conv2d(X, W[0]), ValueError, ["weight", "expected 4 axes", "got 3"]),
    "plan weight axes": (lambda: Plan(np.ones(3, "f")), ValueError, ["weight", "2 (linear) to 5 axes", "got 1"]),
    "bias axes": (lambda: F.conv2d(X, W, np.ones((4, 1), "f")), ValueError, ["bias", "expected 1 axis", "got 2"]),
    "scalar to linear": (lambda: F.linear(np.float32(1), W[:, :, 0, 0]), ValueError, ["input", "axes", "got 0"]),
    "channels": (lambda: F.conv2d(X[:, :5], W), ValueError, ["input", "expected 6 channels", "got 5"]),
    "channels transposed": (lambda: F.conv_transpose2d(X[:, :5], WT), ValueError, ["input", "6 channels", "got 5"]),
    "features": (lambda: F.linear(X, W[:, :, 0, 0]), ValueError, ["input", "expected 6 features", "got 7"]),
    "bias length": (lambda: F.conv2d(X, W, B[:3]), ValueError, ["bias", "expected length 4", "got 3"]),
    "linear bias length": (lambda: F.linear(X, np.ones((4, 7), "f"), B[:3]), ValueError, ["bias", "4", "got 3"]),
    # geometry
    "groups do not divide": (lambda: F.conv2d(X, W[:, :2], groups=3), ValueError, ["groups", "= 4", "got 3"]),
    "groups transposed": (lambda: F.conv_transpose2d(X, WT, groups=4), ValueError, ["groups", "= 6", "got 4"]),
    "groups 0": (lambda: F.conv2d(X, W, groups=0), ValueError, ["groups", "expected >= 1", "got 0"]),
    "groups negative": (lambda: F.conv2d(X, W, groups=-1), ValueError, ["groups", "got -1"]),
    "groups float": (lambda: F.conv2d(X, W, groups=2.0), TypeError, ["groups", "expected an int", "got float"]),
    "groups 2**64": (lambda: F.conv2d(X, W, groups=2**64), ValueError, ["groups", "64 bits", str(2**64)]),
    "zero kernel": (lambda: F.conv2d(X, W[:, :, :0]), ValueError, ["weight", "expected sizes >= 1", "got 0"]),
    "no outputs": (lambda: F.conv2d(X, W[:0]), ValueError, ["weight", "expected sizes >= 1", "got 0"]),
    "stride 0": (lambda: F.conv2d(X, W, stride=(1, 0)), ValueError, ["stride", "expected >= 1", "axis 1", "got 0"]),
    "stride count": (lambda: F.conv2d(X, W, stride=(1, 1, 1)), ValueError, ["stride", "int or 2 ints", "got 3"]),
    "stride string": (lambda: F.conv2d(X, W, stride="ab"), TypeError, ["stride", "int or 2 ints", "'ab'"]),
    "stride float": (lambda: F.conv2d(X, W, stride=1.5), TypeError, ["stride", "int", "1.5"]),
    "stride item": (lambda: F.conv2d(X, W, stride=(1, 1.5)), TypeError, ["stride", "an int", "float"]),
    "stride huge": (lambda: F.conv2d(X, W, stride=2**40), ValueError, ["stride", "expected <=", str(2**40)]),
    "dilation 0": (lambda: F.conv2d(X, W, dilation=0), ValueError, ["dilation", "expected >= 1", "got 0"]),
    "padding negative": (lambda: F.conv2d(X, W, padding=-1), ValueError, ["padding", "expected >= 0", "got -1"]),
    "padding word": (lambda: F.conv2d(X, W, padding="full"), ValueError, ["padding", "'valid' or 'same'", "'full'"]),
    "padding None": (lambda: F.conv2d(X, W, padding=None), TypeError, ["padding", "int", "None"]),
    "same with stride": (
        lambda: F.conv2d(X, W, stride=2, padding="same"), ValueError, ["padding", "'same'", "stride = 1", "stride = 2"],
    ),
    "same transposed": (
        lambda: Plan(WT, transposed=True, padding="same"), ValueError, ["padding", "transposed", "'same'"],
    ),
    "padding mode": (
        lambda: Plan(W, padding_mode="mirror"), ValueError,
        ["padding_mode", "'zeros', 'reflect', 'replicate', 'circular'", "'mirror'"],
    ),
    "padding mode type": (lambda: Plan(W, padding_mode=1), TypeError, ["padding_mode", "got 1"]),
    "padding mode transposed": (
        lambda: Plan(WT, transposed=True, padding=1, padding_mode="reflect"), ValueError,
        ["padding_mode", "'zeros'", "'reflect'"],
    ),
    "reflect too wide": (
        lambda: Plan(W, padding=5, padding_mode="reflect")(X), ValueError, ["padding", "reflect", "5", "got 5"],
    ),
    "circular too wide": (
        lambda: Plan(W, padding=6, padding_mode="circular")(X), ValueError, ["padding", "circular", "5", "got 6"],
    ),
    "output padding": (
        lambda: F.conv_transpose2d(X, WT, stride=2, output_padding=2), ValueError,
        ["output_padding", "max(stride, dilation) = 2", "got 2"],
    ),
    "output padding negative": (
        lambda: F.conv_transpose2d(X, WT, output_padding=-1), ValueError, ["output_padding", ">= 0", "got -1"],
    ),
    "output padding of a convolution": (
        lambda: Plan(W, output_padding=1), ValueError, ["output_padding", "expected 0", "got 1"],
    ),
    "output size": (lambda: F.conv2d(X[:, :, :2], W), ValueError, ["input", "kernel reach 3", "axis 0", "got 2"]),
    "output size dilated": (
        lambda: F.conv2d(X, W, dilation=(1, 4)), ValueError, ["input", "reach 9", "axis 1", "got 7"],
    ),
    "output size transposed": (
        lambda: F.conv_transpose2d(X, WT, padding=4), ValueError, ["output", ">= 1", "axis 0", "got -1"],
    ),
    "empty axis": (lambda: F.conv2d(X[:, :, :0], W, padding=3), ValueError, ["input", ">= 1", "axis 0", "got 0"]),
    "transposed type": (lambda: Plan(W, transposed="yes"), TypeError, ["transposed", "True or False", "'yes'"]),
    "linear stride": (lambda: Plan(W[:, :, 0, 0], stride=2), ValueError, ["stride", "linear", "got 2"]),
    "linear groups": (lambda: Plan(W[:, :, 0, 0], groups=2), ValueError, ["groups", "linear", "got 2"]),
    # sizes that no machine has
    "output overflow": (
        lambda: F.conv_transpose2d(broadcast((1, 1, 2**20, 2**20)), np.ones((1, 1, 1, 1), "f"), stride=2**11),
        ValueError, ["output", "2^63"],
    ),
    "batch overflow": (
        lambda: Plan(W).output_shape((2**60, 6, 5, 7)), ValueError, ["2^63"],
    ),
    "size overflow": (lambda: Plan(W).output_shape((1, 6, 2**62, 3)), ValueError, ["input", str(2**62)]),
    # out
    "out type": (lambda: F.conv2d(X, W, out=[0.0]), TypeError, ["out", "an ndarray or None", "got list"]),
    "out dtype": (
        lambda: F.conv2d(X, W, out=np.empty((2, 4, 3, 5))), TypeError, ["out", "float32", "got float64"],
    ),
    "out byte order": (
        lambda: F.conv2d(X, W, out=np.empty((2, 4, 3, 5), ">f4")), TypeError, ["out", "float32", "got >f4"],
    ),
    "out shape": (
        lambda: F.conv2d(X, W, out=np.empty((2, 4, 3, 4), "f")), ValueError, ["out", "(2, 4, 3, 5)", "(2, 4, 3, 4)"],
    ),
    "out axes": (lambda: F.conv2d(X, W, out=np.empty(120, "f")), ValueError, ["out", "(2, 4, 3, 5)", "(120,)"]),
    "out read-only": (
        lambda: F.conv2d(X, W, out=broadcast((2, 4, 3, 5))), ValueError, ["out", "writeable", "read-only"],
    ),
    "out repeated": (
        lambda: F.conv2d(X, W, out=np.lib.stride_tricks.as_strided(np.zeros(4, "f"), (2, 4, 3, 5), (0, 4, 0, 0))),
        ValueError, ["out", "of their own", "stride 0 along axis 0"],
    ),
    "residual shape": (
        lambda: Plan(W)(X, residual=np.ones((1, 4, 3, 5), "f")), ValueError,
        ["residual", "(2, 4, 3, 5)", "(1, 4, 3, 5)"],
    ),
    # plan
    "activation": (lambda: Plan(W, activation="tanh"), ValueError, ["activation", "'relu6'", "'tanh'"]),
    "activation type": (lambda: Plan(W, activation=3), TypeError, ["activation", "got 3"]),
    "activation slope missing": (lambda: Plan(W, activation="leaky_relu"), ValueError, ["activation", "slope"]),
    "activation slope extra": (lambda: Plan(W, activation=("relu", 1.0)), ValueError, ["activation", "('relu', 1.0)"]),
    "activation slope type": (lambda: Plan(W, activation=("leaky_relu", "a")), TypeError, ["activation", "str"]),
    "activation slope nan": (lambda: Plan(W, activation=("leaky_relu", np.nan)), ValueError, ["activation", "nan"]),
    "precision": (lambda: Plan(W, precision="fp8"), ValueError, ["precision", "'strict', 'fp32', 'fast'", "'fp8'"]),
    "tune without a shape": (lambda: Plan(W, tune=True), ValueError, ["input_shape", "tune=True", "None"]),
    "tune type": (lambda: Plan(W, tune=1), TypeError, ["tune", "True or False", "1"]),
    "input_shape axes": (lambda: Plan(W, input_shape=(6, 5)), ValueError, ["input_shape", "4 axes", "got 2"]),
    "input_shape type": (lambda: Plan(W, input_shape=6), TypeError, ["input_shape", "sequence of ints", "got 6"]),
    "input_shape string": (lambda: Plan(W, input_shape="1655"), TypeError, ["input_shape", "sequence", "'1655'"]),
    "input_shape item": (lambda: Plan(W, input_shape=(1, 6, 5, 5.0)), TypeError, ["input_shape", "int", "float"]),
    "input_shape negative": (lambda: Plan(W, input_shape=(1, 6, -5, 5)), ValueError, ["input_shape", ">= 0", "got -5"]),
    "input_shape channels": (lambda: Plan(W, input_shape=(1, 5, 5, 5)), ValueError, ["6 channels", "got 5"]),
    "explain without a shape": (lambda: Plan(W).explain(), ValueError, ["input_shape", "got None"]),
    "unknown keyword": (lambda: Plan(W)(X, y=1), TypeError, ["residual= and out=", "'y'"]),
    "two positional": (lambda: Plan(W)(X, X), TypeError, ["1 positional argument", "got 2"]),
    "no x": (lambda: Plan(W)(), TypeError, ["x", "got none"]),
    "x twice": (lambda: Plan(W)(X, x=X), TypeError, ["'x' twice"]),
    "constructor keyword": (lambda: Plan(W, strides=2), TypeError, ["strides"]),
    "update shape": (lambda: Plan(W).update(W[:3]), ValueError, ["weight", "(4, 6, 3, 3)", "(3, 6, 3, 3)"]),
    "update dtype": (lambda: Plan(W).update(W.astype("f8")), TypeError, ["weight", "float32", "got float64"]),
    # batch normalisation
    "bn training": (lambda: Plan(W, bn=Training(True)), FoldError, ["bn", "training mode", "bn.eval()"]),
    "bn without mean": (lambda: Plan(W, bn=BN._replace(running_mean=None)), ValueError, ["bn.running_mean", "None"]),
    "bn without var": (lambda: Plan(W, bn=BN._replace(running_var=None)), ValueError, ["bn.running_var", "None"]),
    "bn type": (lambda: Plan(W, bn=object()), TypeError, ["bn", "BatchNorm", "object", "'weight'"]),
    "bn axes": (lambda: Plan(W, bn=BN._replace(bias=W)), ValueError, ["bn.bias", "expected 1 axis", "got 4"]),
    "bn dtype": (lambda: Plan(W, bn=BN._replace(bias=np.ones(4, int))), TypeError, ["bn.bias", "got int64"]),
    "bn var length": (lambda: Plan(W, bn=BN._replace(running_var=ONE[:3])), ValueError, ["bn.running_var", "4", "3"]),
    "bn mean length": (lambda: Plan(W, bn=BN._replace(running_mean=ONE[:3])), ValueError, ["bn.running_mean", "4", "3"]),
    "bn weight length": (lambda: Plan(W, bn=BN._replace(weight=ONE[:3])), ValueError, ["bn.weight", "4", "3"]),
    "bn bias length": (lambda: Plan(W, bn=BN._replace(bias=ONE[:3])), ValueError, ["bn.bias", "4", "3"]),
    "eps negative": (lambda: Plan(W, bn=BN._replace(eps=-1e-5)), ValueError, ["bn.eps", ">= 0", "-1e-05"]),
    "eps nan": (lambda: Plan(W, bn=BN._replace(eps=float("nan"))), ValueError, ["bn.eps", "finite", "nan"]),
    "eps inf": (lambda: Plan(W, bn=BN._replace(eps=float("inf"))), ValueError, ["bn.eps", "finite", "inf"]),
    "eps type": (lambda: Plan(W, bn=BN._replace(eps="small")), TypeError, ["bn.eps", "expected a float", "got str"]),
    # process-wide
    "threads 0": (lambda: pyconvbn.set_num_threads(0), ValueError, ["1", "got 0"]),
    "threads type": (lambda: pyconvbn.set_num_threads(1.5), TypeError, ["int", "float"]),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    call, exception, parts = CASES[name]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception or exception is ValueError and isinstance(caught.value, FoldError)
    message = str(caught.value)
    assert re.search(".*".join(re.escape(part) for part in parts), message, re.DOTALL), message


def test_fold_error_carries_its_reason() -> None:
    with pytest.raises(FoldError) as caught:
        Plan(W, bn=Training(True))
    assert caught.value.reason == "BN_TRAINING"
    with pytest.raises(FoldError) as caught:
        Plan(W, bn=Training(False, mean=None))
    assert caught.value.reason == "NO_RUNNING_STATS"


def test_fused_operator_refuses_an_unbatched_input() -> None:
    conv = pyconvbn.nn.Conv2d(6, 4, 3)
    bn = pyconvbn.nn.BatchNorm2d(4).eval()
    with pytest.raises(ValueError, match=r"4 axes.*BatchNorm.*got 3"):
        pyconvbn.efficient_conv_bn_eval(bn, conv, X[0])


def test_a_failed_call_changes_nothing() -> None:
    x, w, out = X.copy(), W.copy(), np.full((2, 4, 3, 5), 7.0, np.float32)
    for bad in ({"residual": np.ones(3, "f")}, {"residual": [1.0]}):
        with pytest.raises((TypeError, ValueError)):
            Plan(w)(x, out=out, **bad)
    with pytest.raises(ValueError):
        F.conv2d(x, w, padding=-1, out=out)
    with pytest.raises(TypeError):
        F.conv2d(x, w, B.astype("f8"), out=out)
    assert (out == 7.0).all() and (x == X).all() and (w == W).all()


def test_memory_that_does_not_exist_is_a_memory_error() -> None:
    """A result of 2^55 bytes passes the overflow checks and cannot be had."""
    plan = Plan(np.ones((2**13, 1), np.float32))
    with pytest.raises(MemoryError):
        plan(np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (2**40, 1), (0, 0)))


def test_an_unknown_cpu_name_in_the_mask_is_a_warning() -> None:
    import os
    import subprocess
    import sys

    code = "import warnings; warnings.simplefilter('error'); import pyconvbn"
    environment = {**os.environ, "PYCONVBN_DISABLE_CPU": "avx1024"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "RuntimeWarning" in done.stderr and "avx1024" in done.stderr
