# SPDX-License-Identifier: BSD-3-Clause
"""Data for a layer as it occurs in practice, and the float64 check that comes before any timing."""

import math
import zlib
from dataclasses import dataclass

import numpy as np
from layers import Layer
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

EPS = 1e-5
# Products gathered for the check of one layer: bounds its time and memory.
CHECK_PRODUCTS = 4_000_000


@dataclass(frozen=True)
class Problem:
    """Input, convolution weights without bias, BN of a trained network, and the same folded (float32)."""

    layer: Layer
    x: Floats
    weight: Floats
    gamma: Floats
    beta: Floats
    mean: Floats
    var: Floats
    folded_weight: Floats
    folded_bias: Floats


def aligned_empty(shape: tuple[int, ...]) -> Floats:
    """On a cache line, as a framework's allocator does: chance must not favour one run."""
    size = math.prod(shape) * 4
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size].view(np.float32).reshape(shape)


def make_problem(layer: Layer) -> Problem:
    """The same numbers for the same layer name in every run."""
    rng = np.random.default_rng(zlib.crc32(layer.name.encode()))
    f32 = np.float32
    x = aligned_empty(layer.input_shape)
    rng.standard_normal(out=x, dtype=f32)
    np.maximum(x, 0, out=x)
    weight = rng.standard_normal(layer.weight_shape, dtype=f32)
    weight *= f32(math.sqrt(2 / layer.terms))
    gamma = rng.uniform(0.5, 1.5, layer.oc).astype(f32)
    beta = rng.normal(0, 0.3, layer.oc).astype(f32)
    mean = rng.normal(0, 0.5, layer.oc).astype(f32)
    var = rng.uniform(0.5, 2.0, layer.oc).astype(f32)

    scale = gamma / np.sqrt(var.astype(np.float64) + EPS)
    if layer.transposed:
        # weight [ic, oc/g, ...]: row i belongs to group i // (ic/g), so its columns are that group's channels.
        grouped = weight.reshape(layer.groups, layer.ic // layer.groups, layer.oc // layer.groups, -1)
        folded = grouped * scale.reshape(layer.groups, 1, -1, 1)
    else:
        folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return Problem(layer, x, weight, gamma, beta, mean, var,
                   folded.reshape(weight.shape).astype(f32), (beta - mean * scale).astype(f32))


@dataclass(frozen=True)
class Check:
    """Exact values of some output elements: all corners, the rest drawn at random."""

    index: tuple[NDArray[np.int64], ...]
    exact: Doubles
    bound: float
    chain_rms: float  # rms error of one sequential float32 sum per element

    @property
    def points(self) -> int:
        return len(self.exact)

    def rms_ratio(self, y: Floats) -> float:
        """rms error of y over that of the sequential sum. AssertionError names the worst element beyond the bound."""
        error = np.abs(y[self.index].astype(np.float64) - self.exact)
        worst = int(np.argmax(error))  # a NaN counts as the largest
        if not error[worst] <= self.bound:
            where = tuple(int(axis[worst]) for axis in self.index)
            raise AssertionError(
                f"output {where} is {y[where]!r}, expected {self.exact[worst]:.9g}: off by "
                f"{error[worst]:.3g}, allowed {self.bound:.3g}")
        rms = math.sqrt(float(np.mean(error**2)))
        return rms / self.chain_rms if self.chain_rms else float(rms > 0)


def make_check(problem: Problem) -> Check:
    """Truth is float64 arithmetic on the folded float32 parameters.

    The bound is that of the package's error model, 4 eps (sqrt(K) sum|w x| + |b| + |y|), with the layer's largest
    sum: algorithms that work on tiles spread the error of a bright pixel over its neighbours.
    """
    layer = problem.layer
    points = _draw_points(layer)
    products = _gather_products(problem, points)
    bias = problem.folded_bias[points[:, 1]].astype(np.float64)
    exact = products.sum(axis=1) + bias
    size = np.abs(products).sum(axis=1)
    eps = float(np.finfo(np.float32).eps)
    bound = 4 * eps * float(np.max(math.sqrt(layer.terms) * size + np.abs(bias) + np.abs(exact)))

    # The products of two float32 are exact in float64, so this rounds as a float32 FMA chain does.
    chain = np.zeros(len(points), np.float32)
    for column in np.ascontiguousarray(products.T):
        chain = (chain + column).astype(np.float32)
    chain = (chain + bias).astype(np.float32)
    chain_rms = math.sqrt(float(np.mean((chain - exact) ** 2)))
    index = tuple(np.ascontiguousarray(axis) for axis in points.T)
    return Check(index, exact, bound, chain_rms)


def _draw_points(layer: Layer) -> NDArray[np.int64]:
    """Rows (n, oc, spatial...): every corner, then random elements, at least 64 in all where there are as many."""
    shape = layer.output_shape
    corners = np.stack(np.meshgrid(*[sorted({0, size - 1}) for size in shape], indexing="ij"), -1)
    corners = corners.reshape(-1, len(shape))
    rng = np.random.default_rng(zlib.crc32(layer.name.encode()) + 1)
    wanted = min(max(CHECK_PRODUCTS // layer.terms, 64), 2048)
    return np.concatenate([corners, rng.integers(0, shape, (wanted, len(shape)))])


def _gather_products(problem: Problem, points: NDArray[np.int64]) -> Doubles:
    """[point, K] products w*x in the order channel, kernel taps; taps outside the input give 0."""
    layer = problem.layer
    pad3 = 3 - layer.nd
    x = problem.x.reshape(layer.n, layer.ic, *[1] * pad3, *layer.size)
    per_group_ic, per_group_oc = layer.ic // layer.groups, layer.oc // layer.groups
    weight = problem.folded_weight.reshape(*problem.folded_weight.shape[:2], *[1] * pad3, *layer.kernel)

    n, oc = points[:, 0], points[:, 1]
    channel = (oc // per_group_oc)[:, None] * per_group_ic + np.arange(per_group_ic)
    at, inside = [], []
    for axis in range(3):
        a = axis - pad3
        if a < 0:
            at.append(np.zeros((len(points), 1), np.int64))
            inside.append(np.ones((len(points), 1), bool))
            continue
        tap = np.arange(layer.kernel[a]) * layer.dilation[a]
        out, s, p = points[:, 2 + a, None], layer.stride[a], layer.padding[a]
        if layer.transposed:
            where, rest = np.divmod(out + p - tap, s)
            ok = rest == 0
        else:
            where, ok = out * s - p + tap, True
        at.append(np.clip(where, 0, layer.size[a] - 1))
        inside.append(ok & (where >= 0) & (where < layer.size[a]))
    patch = x[n[:, None, None, None, None], channel[:, :, None, None, None],
              at[0][:, None, :, None, None], at[1][:, None, None, :, None], at[2][:, None, None, None, :]]
    valid = (inside[0][:, None, :, None, None] & inside[1][:, None, None, :, None]
             & inside[2][:, None, None, None, :])
    taps = weight[channel, (oc % per_group_oc)[:, None]] if layer.transposed else weight[oc]
    products = patch.astype(np.float64) * taps * valid
    return products.reshape(len(points), -1)
