# SPDX-License-Identifier: BSD-3-Clause
"""Every convolution kind against the float64 reference with its error model, on every instruction set and algorithm."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pyconvbn
import pyconvbn.functional as F
from pyconvbn import testing
from pyconvbn._core import _testing

sys.path.insert(0, str(Path(__file__).parent))
from rows_util import ISAS, rows_of  # noqa: E402

DTYPES = ["float16", "float32", "float64"]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
RUN = settings(
    max_examples=150, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `batch` None: no batch axis."""

    nd: int
    batch: int | None
    groups: int
    ic_group: int
    oc_group: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    padding_mode: str
    bias: bool
    dtype: str
    seed: int

    @property
    def geometry(self) -> dict[str, Any]:
        return dict(
            stride=self.stride, padding=self.padding, padding_mode=self.padding_mode, dilation=self.dilation,
            groups=self.groups, transposed=self.transposed, output_padding=self.output_padding,
        )

    @property
    def channels(self) -> tuple[int, int]:
        return self.groups * self.ic_group, self.groups * self.oc_group

    def output_size(self) -> list[int]:
        if self.padding in ("same", "valid"):
            total = [d * (k - 1) if self.padding == "same" else 0 for d, k in zip(self.dilation, self.kernel)]
        else:
            total = [2 * p for p in self.padding]
        sizes = []
        for i, k, s, t, d, e in zip(self.size, self.kernel, self.stride, total, self.dilation, self.output_padding):
            reach = d * (k - 1) + 1
            sizes.append((i - 1) * s - t + reach + e if self.transposed else (i + t - reach) // s + 1)
        return sizes

    def arrays(self, integers: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        rng = np.random.default_rng(self.seed)
        ic, oc = self.channels
        across = (ic, self.oc_group) if self.transposed else (oc, self.ic_group)
        lead = () if self.batch is None else (self.batch,)

        def draw(*shape: int) -> np.ndarray:
            values = rng.integers(-3, 4, shape) if integers else rng.normal(0.3, 1.0, shape)
            return values.astype(self.dtype)

        return draw(*lead, ic, *self.size), draw(*across, *self.kernel), draw(oc) if self.bias else None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nd = draw(st.sampled_from([1, 2, 2, 3]))
    transposed = draw(st.booleans())
    large = 40 if nd == 1 else 19 if nd == 2 else 7

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(nd))

    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 16]))
    # Many channels: several blocks of output channels, several chunks of input channels.
    wide = st.integers(1, 3) if groups > 3 else st.one_of(st.integers(1, 37), st.sampled_from([48, 65, 80, 130]))
    kernel = per_axis(1, 3) if draw(st.booleans()) else (draw(st.sampled_from([1, 2, 3, 5])),) * nd
    stride, dilation = per_axis(1, 3), per_axis(1, 3)
    padding: tuple[int, ...] | str = per_axis(0, 3)
    if not transposed and draw(st.integers(0, 5)) == 0:
        padding = draw(st.sampled_from(["valid", "same"]))
        stride = (1,) * nd if padding == "same" else stride
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation))
    mode = "zeros"
    if not transposed and draw(st.integers(0, 5)) == 0:
        mode = draw(st.sampled_from(["reflect", "replicate", "circular"]))
    size = per_axis(7 if mode != "zeros" else 1, large)
    case = Case(
        nd, draw(st.sampled_from([None, 0, 1, 1, 2, 3])), groups, draw(wide), draw(wide), size, kernel, stride,
        padding, dilation, transposed, extra, mode, draw(st.booleans()),
        draw(st.sampled_from(["float32", "float32", *DTYPES])), draw(st.integers(0, 2**31)),
    )
    assume(min(case.output_size()) >= 1)
    return case


def allowed(algorithm: str, tolerance: np.ndarray) -> np.ndarray:
    """Winograd's errors are those of the largest outputs of a tile, at all of its outputs."""
    if not algorithm.startswith("winograd"):
        return tolerance
    return np.full_like(tolerance, np.max(tolerance, initial=0))


def exact_rows(plan: pyconvbn.Plan, shape: tuple[int, ...]) -> list[str]:
    """Those that add products of the numbers given: integers stay integers."""
    return [name for name in rows_of(plan, shape) if not name.startswith("winograd")]


@pytest.mark.parametrize("isa", ISAS)
@RUN
@given(case=cases())
def test_plan_matches_the_reference_with_every_algorithm(isa: str, case: Case) -> None:
    x, w, b = case.arrays()
    reference, tolerance = testing.error_model(x, w, b, **case.geometry) if x.size else (None, None)
    plan = _testing.plan_with_isa(isa, w, b, **case.geometry)
    if reference is None:
        out = plan(x)
        assert out.shape == (0, case.channels[1], *case.output_size()) and out.dtype == w.dtype
        return
    for algorithm in rows_of(plan, x.shape):
        _testing.plan_force(plan, x.shape, algorithm)
        assert plan.explain(x.shape)["algorithm"] == algorithm
        out = plan(x)
        assert out.dtype == w.dtype and out.shape == plan.output_shape(x.shape) == reference.shape
        channel_axis = 0 if case.batch is None else 1
        testing.assert_within(out, reference, allowed(algorithm, tolerance), channel_axis=channel_axis)


@pytest.mark.parametrize("isa", ISAS)
@RUN
@given(case=cases())
def test_small_integers_are_exact(isa: str, case: Case) -> None:
    """Sums of products of integers up to 3 are exact in every dtype while they stay below 2048."""
    case = dataclasses.replace(case, batch=case.batch or 1)
    x, w, b = case.arrays(integers=True)
    reference, _ = testing.error_model(x, w, b, **case.geometry)
    terms, _ = testing.error_model(np.abs(x), np.abs(w), None, **case.geometry)
    assume(case.dtype != "float16" or np.max(terms, initial=0) < 2048)
    plan = _testing.plan_with_isa(isa, w, b, **case.geometry)
    for algorithm in exact_rows(plan, x.shape):
        _testing.plan_force(plan, x.shape, algorithm)
        np.testing.assert_array_equal(plan(x), reference, err_msg=algorithm)


@RUN
@given(case=cases())
def test_functional_matches_the_reference(case: Case) -> None:
    """The one-call functions take their arguments in PyTorch's order. They may choose another algorithm than a plan,
    because for one call packing the weights counts, so the bits may differ."""
    case = dataclasses.replace(case, padding_mode="zeros")
    assume(min(case.output_size()) >= 1)
    x, w, b = case.arrays()
    if case.transposed:
        out = CONV_TRANSPOSE[case.nd](
            x, w, b, case.stride, case.padding, case.output_padding, case.groups, case.dilation
        )
    else:
        out = CONV[case.nd](x, w, b, case.stride, case.padding, case.dilation, case.groups)
    reference, tolerance = testing.error_model(x, w, b, **case.geometry)
    testing.assert_within(out, reference, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@RUN
@given(
    lead=st.lists(st.integers(0, 9), max_size=3), features=st.integers(1, 70), outputs=st.integers(1, 70),
    bias=st.booleans(), seed=st.integers(0, 2**31),
)
def test_linear(
    isa: str, dtype: str, lead: list[int], features: int, outputs: int, bias: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(0.2, 1.0, (*lead, features)).astype(dtype)
    w = rng.normal(0.0, 1.0, (outputs, features)).astype(dtype)
    b = rng.normal(0.0, 1.0, outputs).astype(dtype) if bias else None
    plan = _testing.plan_with_isa(isa, w, b)
    out = plan(x)
    assert out.shape == (*lead, outputs) and out.dtype == dtype
    if x.size:
        reference, tolerance = testing.error_model(x, w, b)
        testing.assert_within(out, reference, tolerance, channel_axis=-1)
    np.testing.assert_array_equal(plan(x), F.linear(x, w, b) if isa == ISAS[0] else plan(x))


# Shapes at which tiles, vectors and blocks are just full, one short or one over.
EDGES = [1, 7, 8, 9, 15, 16, 17, 31, 33]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [(1, 1), (3, 16), (16, 17), (15, 33), (33, 8), (64, 24)], ids=str)
@pytest.mark.parametrize(("kernel", "padding", "stride"), [(1, 0, 1), (1, 0, 2), (3, 1, 1), (3, 1, 2), (5, 2, 1)])
def test_tile_edges(
    isa: str, channels: tuple[int, int], kernel: int, padding: int, stride: int, rng: np.random.Generator
) -> None:
    ic, oc = channels
    w = rng.integers(-3, 4, (oc, ic, kernel, kernel)).astype(np.float32)
    plan = _testing.plan_with_isa(isa, w, padding=padding, stride=stride)
    for width in EDGES:
        x = rng.integers(-3, 4, (1, ic, 5, width)).astype(np.float32)
        if width + 2 * padding < kernel:
            continue
        want = testing.reference_conv(x, w, None, stride, padding)
        for algorithm in exact_rows(plan, x.shape):
            _testing.plan_force(plan, x.shape, algorithm)
            np.testing.assert_array_equal(plan(x), want, err_msg=algorithm)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("nd", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 4), (7, 3, 2)])
def test_depthwise(
    isa: str, multiplier: int, nd: int, kernel: int, stride: int, dilation: int, rng: np.random.Generator
) -> None:
    channels, padding = 5, dilation * (kernel // 2)
    w = rng.integers(-3, 4, (channels * multiplier, 1, *(kernel,) * nd)).astype(np.float32)
    plan = _testing.plan_with_isa(
        isa, w, groups=channels, stride=stride, dilation=dilation, padding=padding
    )
    for size in ((9, 16, 17, 34) if nd < 3 else (4, 9)):
        x = rng.integers(-3, 4, (2, channels, *(size,) * nd)).astype(np.float32)
        want = testing.reference_conv(x, w, None, stride, padding, dilation, channels)
        np.testing.assert_array_equal(plan(x), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs", [9, 100])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(2, 1, 1), (4, 2, 1), (3, 1, 2)])
def test_transposed_with_many_blocks_of_output_channels(
    isa: str, outputs: int, kernel: int, stride: int, dilation: int, rng: np.random.Generator
) -> None:
    """Blocks that share a copy of their input: the taps of a transposed convolution run backwards."""
    w = rng.integers(-3, 4, (5, outputs, kernel, kernel)).astype(np.float32)
    plan = _testing.plan_with_isa(isa, w, transposed=True, stride=stride, dilation=dilation)
    for size in ((1, 2), (2, 7), (9, 11)):
        x = rng.integers(-3, 4, (2, 5, *size)).astype(np.float32)
        want = testing.reference_conv_transpose(x, w, None, stride, dilation=dilation)
        np.testing.assert_array_equal(plan(x), want)


@pytest.mark.usefixtures("keep_threads")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("groups", [1, 16])
def test_transposed_with_phases_that_no_tap_reaches(isa: str, groups: int, rng: np.random.Generator) -> None:
    """Stride above the kernel size: rows between are bias only, whatever else the threads do."""
    pyconvbn.set_num_threads(3)
    w = rng.integers(-3, 4, (groups * 3, 2, 2, 2)).astype(np.float32)
    b = rng.integers(-3, 4, groups * 2).astype(np.float32)
    x = rng.integers(-3, 4, (3, groups * 3, 10, 9)).astype(np.float32)
    arguments = dict(stride=(3, 4), padding=2, output_padding=(2, 1), groups=groups, dilation=(1, 2))
    want = testing.reference_conv_transpose(x, w, b, **arguments)
    plan = _testing.plan_with_isa(isa, w, b, transposed=True, **arguments)
    for _ in range(20):
        np.testing.assert_array_equal(plan(x), want)


# -- special values ------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_where_they_belong(
    isa: str, kernel: int, groups: int, value: float, rng: np.random.Generator
) -> None:
    w = rng.normal(size=(8, 8 // groups, kernel, kernel)).astype(np.float32)
    x = rng.normal(size=(2, 8, 11, 13)).astype(np.float32)
    x[1, 3, 5, 6] = value
    plan = _testing.plan_with_isa(isa, w, padding=kernel // 2, groups=groups, precision="strict")
    reference, tolerance = testing.error_model(x, w, padding=kernel // 2, groups=groups)
    assert 0 < np.count_nonzero(~np.isfinite(reference)) <= 8 * kernel * kernel
    for algorithm in rows_of(plan, x.shape):
        _testing.plan_force(plan, x.shape, algorithm)
        testing.assert_within(plan(x), reference, tolerance)


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_weight_does_not_meet_the_padding(isa: str) -> None:
    """A tap outside the image contributes nothing: inf * 0 must not make the border NaN."""
    w = np.ones((8, 8, 3, 3), np.float32)
    w[2, 0, 0, 0] = np.inf
    x = np.ones((1, 8, 6, 6), np.float32)
    plan = _testing.plan_with_isa(isa, w, padding=1, precision="strict")
    reference, _ = testing.error_model(x, w, padding=1)
    assert not np.isnan(reference).any() and np.isinf(reference).any()
    for algorithm in rows_of(plan, x.shape):
        _testing.plan_force(plan, x.shape, algorithm)
        np.testing.assert_array_equal(plan(x), reference, err_msg=algorithm)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "silu", "sigmoid", ("leaky_relu", 0.1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_passes_through_every_activation(activation: Any, dtype: str) -> None:
    w = np.ones((1, 1, 1, 1), dtype)
    x = np.array([np.nan, 1.0, -1.0, 0.0], dtype).reshape(1, 1, 1, 4)
    out = pyconvbn.Plan(w, activation=activation)(x)
    np.testing.assert_array_equal(np.isnan(out.ravel()), [True, False, False, False])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_subnormal_inputs(dtype: str, kernel: int, rng: np.random.Generator) -> None:
    """Subnormals may be taken as zero but never as anything else."""
    tiny = np.finfo(dtype).smallest_subnormal
    x = (rng.integers(-9, 10, (1, 4, 8, 8)) * tiny).astype(dtype)
    w = rng.normal(size=(4, 4, kernel, kernel)).astype(dtype)
    reference, tolerance = testing.error_model(x, w, padding=kernel // 2)
    flushed = 4 * kernel * kernel * np.finfo(dtype).tiny * np.abs(w).max()
    testing.assert_within(pyconvbn.Plan(w, padding=kernel // 2)(x), reference, tolerance + flushed)


def test_subnormal_inputs_cost_nothing(rng: np.random.Generator) -> None:
    """Without flush-to-zero they cost 10 to 100 times as much; 4 leaves room for a noisy machine."""
    w = rng.normal(size=(32, 32, 3, 3)).astype(np.float32)
    normal = rng.normal(size=(1, 32, 28, 28)).astype(np.float32)
    subnormal = np.full_like(normal, 1e-40)
    plan = pyconvbn.Plan(w, padding=1)

    def best(x: np.ndarray) -> float:
        out = plan(x)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            plan(x, out=out)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(subnormal) < 4 * best(normal)


def test_the_callers_floating_point_mode_is_kept(rng: np.random.Generator) -> None:
    """Kernels flush subnormals, NumPy afterwards must not."""
    w = rng.normal(size=(32, 32, 3, 3)).astype(np.float32)
    pyconvbn.Plan(w, padding=1)(rng.normal(size=(1, 32, 28, 28)).astype(np.float32))
    tiny = np.float32(1e-40)
    assert np.array([tiny]) * np.float32(1.0) == tiny


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_floating_point_warning_reaches_the_caller(dtype: str) -> None:
    huge = np.finfo(dtype).max
    x = np.full((1, 2, 4, 4), huge, dtype)
    w = np.full((2, 2, 3, 3), huge, dtype)
    with np.errstate(all="raise"):
        assert np.isinf(F.conv2d(x, w)).all()
        one, big = np.ones(2, dtype), np.full(2, huge, dtype)
        bn = pyconvbn.BatchNormParams(big, one, one, np.zeros(2, dtype), 0.0)
        pyconvbn.Plan(w, bn=bn)(x)


def test_float16_accumulates_in_float32() -> None:
    """4096 ones summed in float16 would stop at 2048."""
    x, w = np.ones((1, 4096, 1, 1), np.float16), np.ones((1, 4096, 1, 1), np.float16)
    assert F.conv2d(x, w).item() == 4096.0


def test_float64_stays_float64() -> None:
    x = np.full((1, 1, 1, 1), 1.0 + 2.0**-40)
    assert F.conv2d(x, np.ones((1, 1, 1, 1))).item() == 1.0 + 2.0**-40
