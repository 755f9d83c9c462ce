# SPDX-License-Identifier: BSD-3-Clause
"""One benchmark for every kernel of the C kernel list, through the functions the kernel tests use."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """A call to be timed; `work` of it counted in `unit` (1e9 a second are reported)."""

    label: str
    call: Callable[[], object]
    work: float
    unit: str  # "FLOP" or "B"


Bench = Callable[[Any, str], list[Case]]

# name in the kernel list -> function of (testing module, ISA name)
KERNEL_BENCHES: dict[str, Bench] = {}

# Elements: three float arrays of the first fit any L1 data cache; of the second they fit no L2.
SIZES = {"L1": 2048, "memory": 1 << 22}
INFINITE = math.inf


def kernel_bench(function: Bench) -> Bench:
    """Registers `bench_<kernel>` under the kernel's name."""
    KERNEL_BENCHES[function.__name__.removeprefix("bench_")] = function
    return function


def normal(*shape: int) -> NDArray[np.float32]:
    """On a cache line, as the package's own buffers are."""
    size = math.prod(shape)
    raw = np.empty(size * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    values = raw[start:start + size * 4].view(np.float32).reshape(shape)
    np.random.default_rng(1).standard_normal(out=values, dtype=np.float32)
    return values


def streaming(call: Callable[..., object], arrays: dict[str, Callable[[int], Any]], *rest: Any) -> list[Case]:
    """call(*arrays, *rest) at each size; bytes counted once for every array read or written."""
    cases = []
    for label, n in SIZES.items():
        made = [make(n) for make in arrays.values()]
        cases.append(Case(f"{label}, n={n}", lambda made=made: call(*made, *rest),
                          sum(array.nbytes for array in made), "B"))
    return cases


@kernel_bench
def bench_unary(testing: Any, isa: str) -> list[Case]:
    cases = []
    n = SIZES["L1"]
    y, x = normal(n), normal(n)
    for kind in ("relu", "leaky_relu", "sigmoid", "hardswish", "silu", "gelu", "gelu_tanh"):
        cases.append(Case(f"{kind}, L1, n={n}", lambda kind=kind: testing.unary(isa, kind, 0.1, 1.0, y, x),
                          y.nbytes + x.nbytes, "B"))
    return cases


@kernel_bench
def bench_affine(testing: Any, isa: str) -> list[Case]:
    return streaming(lambda y, x: testing.affine(isa, y, x, 1.5, -0.5), {"y": normal, "x": normal})


@kernel_bench
def bench_add(testing: Any, isa: str) -> list[Case]:
    return streaming(lambda y, x, z: testing.add(isa, y, x, z, 1.0), {"y": normal, "x": normal, "z": normal})


@kernel_bench
def bench_mul(testing: Any, isa: str) -> list[Case]:
    return streaming(lambda y, x, z: testing.mul(isa, y, x, z), {"y": normal, "x": normal, "z": normal})


@kernel_bench
def bench_pool_max(testing: Any, isa: str) -> list[Case]:
    return _pool(testing.pool_max, isa)


@kernel_bench
def bench_pool_add(testing: Any, isa: str) -> list[Case]:
    return _pool(testing.pool_add, isa)


def _pool(kernel: Callable[..., object], isa: str) -> list[Case]:
    """What a 3x3 window does: three rows into a line, three columns of it into every second result."""
    n = SIZES["L1"] // 8
    line, rows, y = np.zeros(2 * n + 1, np.float32), normal(3 * (2 * n + 1)), np.zeros(n, np.float32)
    return [Case(f"rows, L1, n={line.size}", lambda: kernel(isa, line, rows, 1, (1, 3), (0, line.size)),
                 line.nbytes + rows.nbytes, "B"),
            Case(f"columns, L1, n={n}, step 2", lambda: kernel(isa, y, line, 2, (1, 3), (0, 1)),
                 y.nbytes + line.nbytes, "B")]


def half(n: int) -> NDArray[np.float16]:
    return normal(n).astype(np.float16)


@kernel_bench
def bench_widen_f16(testing: Any, isa: str) -> list[Case]:
    return streaming(lambda y, x: testing.widen_f16(isa, y, x), {"y": normal, "x": half})


@kernel_bench
def bench_narrow_f16(testing: Any, isa: str) -> list[Case]:
    return streaming(lambda y, x: testing.narrow_f16(isa, y, x), {"y": half, "x": normal})


@kernel_bench
def bench_conv_dw(testing: Any, isa: str) -> list[Case]:
    cases = []
    for label, size, k, stride, dilation in (
        ("3x3 56x56", (1, 56, 56), (1, 3, 3), 1, 1), ("3x3 s2 112x112", (1, 112, 112), (1, 3, 3), 2, 1),
        ("5x5 14x14", (1, 14, 14), (1, 5, 5), 1, 1), ("7x7 56x56", (1, 56, 56), (1, 7, 7), 1, 1),
        ("3 d64 1-D 3199", (1, 1, 3199), (1, 1, 3), 1, 64), ("3x3x3 8x56x56", (8, 56, 56), (3, 3, 3), 1, 1),
    ):
        # An axis of size 1 has neither stride nor padding.
        strides = tuple(stride if taps > 1 else 1 for taps in k)
        dilations = tuple(dilation if taps > 1 else 1 for taps in k)
        padding = tuple(d * (taps - 1) // 2 for taps, d in zip(k, dilations, strict=True))
        out = tuple((i + 2 * p - d * (taps - 1) - 1) // s + 1 for i, p, d, taps, s in zip(
            size, padding, dilations, k, strides, strict=True))
        x, w, y = normal(*size), normal(*k), normal(*out)
        arguments = (isa, y, x, w, None, 0.5, -INFINITE, INFINITE, strides, padding, dilations,
                     (0, out[0]), (0, out[1]))
        pairs = math.prod(
            sum(0 <= o * s - p + t * d < i for o in range(n) for t in range(taps))
            for n, s, p, d, i, taps in zip(out, strides, padding, dilations, size, k, strict=True))
        cases.append(Case(f"{label}", lambda arguments=arguments: testing.conv_dw(*arguments),
                          2 * pairs, "FLOP"))
    return cases


@kernel_bench
def bench_conv_oc(testing: Any, isa: str) -> list[Case]:
    """The full tile. Steps of 0 between channels keep the operands in L1, so that nothing but the loop is timed; the sum
    is long because checking the arguments costs some microseconds."""
    cases = []
    tile = testing.tile_sizes(isa)
    ic = 4096
    for taps in (9, 1):
        np_, width = tile["oc_np"], tile["oc_nv"] * tile["lanes"]
        pixels = np.arange(np_, dtype=np.int64)
        x, w, y, bias = normal(64), normal(taps, width), normal(width, np_), normal(width)
        arguments = {
            "isa": isa, "np": np_, "nv": tile["oc_nv"], "x": x, "xpix": pixels, "x_ic": 0, "w": w, "w_ic": 0,
            "ic": ic, "tap_x": np.arange(taps, dtype=np.int64),
            "tap_w": np.arange(taps, dtype=np.int64) * width, "acc": None, "load_acc": False, "y": y,
            "ypix": pixels, "y_oc": np_, "oc_valid": width, "y_run": True, "bias": bias, "residual": None,
            "lo": -INFINITE, "hi": INFINITE}
        cases.append(Case(f"{width} oc x {np_} px, {taps} taps, ic {ic}",
                          lambda arguments=arguments: testing.conv_oc(**arguments),
                          2 * width * np_ * taps * ic, "FLOP"))
    return cases


@kernel_bench
def bench_conv_px(testing: Any, isa: str) -> list[Case]:
    """The full tile, pixels resident in L1, weights streamed."""
    tile = testing.tile_sizes(isa)
    ic, mr, pixels = 8192, tile["px_mr"], tile["px_nv"] * tile["lanes"]
    arguments = {
        "isa": isa, "x": normal(pixels), "x_ic": 0, "w": normal(ic, mr), "ic": ic, "y": normal(mr, pixels),
        "y_oc": pixels, "oc_valid": mr, "np": pixels, "bias": normal(mr), "residual": None,
        "lo": -INFINITE, "hi": INFINITE}
    return [Case(f"{mr} oc x {pixels} px, ic {ic}", lambda: testing.conv_px(**arguments),
                 2 * mr * pixels * ic, "FLOP")]


@kernel_bench
def bench_conv_px2(testing: Any, isa: str) -> list[Case]:
    """Whole tiles of a panel that stays in L1 while the weights of some blocks pass."""
    tile = testing.tile_sizes(isa)
    ic, mr, pixels = 256, tile["px_mr"], tile["px_nv"] * tile["lanes"]
    x, w, y, bias = normal(ic, pixels), normal(8 * ic * mr), normal(4 * mr, 2 * pixels), normal(4 * mr)
    return [Case(f"{8 * mr} rows x {pixels} px, ic {ic}", lambda: testing.conv_px2(
        isa, x, pixels, None, w, mr, y, bias, None, -INFINITE, INFINITE), 2 * 8 * mr * pixels * ic, "FLOP")]


@kernel_bench
def bench_panel_pack(testing: Any, isa: str) -> list[Case]:
    """A panel of three vectors and four taps, one in three of the vectors at the edge of a row."""
    lanes, channels = testing.tile_sizes(isa)["lanes"], 64
    x, out = normal(channels, 4 * lanes), normal(channels * 12 * lanes + lanes)
    moves = np.array([[v * lanes, (t * 3 + v) * lanes, 0, lanes - (v == 0), lanes, 0]
                      for t in range(4) for v in range(3)], np.int64)
    return [Case(f"{channels} channels x 12 vectors", lambda: testing.panel_pack(isa, out, 12 * lanes, x, moves),
                 2 * channels * 12 * lanes * 4, "B")]


@kernel_bench
def bench_interleave(testing: Any, isa: str) -> list[Case]:
    cases = []
    for phases in (2, 4, 8, 5):
        s = normal(4, phases, 192 // phases)
        y, bias = normal(4, s[0].size), normal(4)
        cases.append(Case(f"{phases} phases, 4 rows of {y.shape[1]}", lambda s=s, y=y, bias=bias: testing.interleave(
            isa, y, s, y.shape[1], bias, None, -INFINITE, INFINITE), s.nbytes + y.nbytes, "B"))
    return cases


@kernel_bench
def bench_conv_tap(testing: Any, isa: str) -> list[Case]:
    """Full tiles over 3x3 taps of padded rows in L1."""
    lanes, cases = testing.tile_sizes(isa)["lanes"], []
    for mr, nv in enumerate(testing.tap_tiles(isa), 1):
        ic, pitch, many = 4, 9 * lanes, 16 * nv
        tap = np.array([(b * ic + i) * pitch + c for i in range(ic) for b in range(3) for c in range(3)], np.int32)
        xpix = np.array([v % 7 * lanes + v // 7 % 4 * ic * pitch for v in range(many)], np.int64)
        arguments = {
            "isa": isa, "mr": mr, "x": normal(7 * ic * pitch), "xpix": xpix, "tap": tap, "w": normal(tap.size, mr),
            "y": normal(mr, many * lanes), "ypix": np.arange(many, dtype=np.int64) * lanes, "y_oc": many * lanes,
            "lanes": lanes, "bias": normal(mr), "residual": None, "lo": -INFINITE, "hi": INFINITE}
        cases.append(Case(f"{mr} oc x {nv * lanes} px, {tap.size} taps",
                          lambda arguments=arguments: testing.conv_tap(**arguments),
                          2 * mr * many * lanes * tap.size, "FLOP"))
    return cases


@kernel_bench
def bench_rows_copy(testing: Any, isa: str) -> list[Case]:
    cases = []
    for step in (1, 2):
        ic, rows, n = 4, 16, 64
        x, to = normal(ic, rows, n * step), normal(rows, ic, n)
        cases.append(Case(f"{ic} x {rows} rows of {n}, step {step}, padding 1",
                          lambda x=x, to=to, step=step: testing.rows_copy(
                              isa, to, n, ic * n, x, rows * n * step, n * step, ic, rows, n, -1, step, n * step),
                          8 * ic * rows * n, "B"))
    return cases


@kernel_bench
def bench_linear(testing: Any, isa: str) -> list[Case]:
    """A full tile of rows with its weights in the caches, and one row with weights that are in none."""
    cases = []
    width = 2 * testing.tile_sizes(isa)["lanes"]
    for label, rows, ic, oc in (("caches", 6, 1024, width), ("memory", 1, 4096, 4096)):
        x, w, y, bias = normal(rows, ic), normal(ic, oc), normal(rows, oc), normal(oc)
        cases.append(Case(f"{rows} rows, {ic} -> {oc}, {label}",
                          lambda rows=rows, x=x, w=w, ic=ic, oc=oc, y=y, bias=bias: testing.linear(
                              isa, rows, x, w, ic, oc, y, bias, -INFINITE, INFINITE), 2 * rows * ic * oc, "FLOP"))
    return cases


@kernel_bench
def bench_linear_raw(testing: Any, isa: str) -> list[Case]:
    cases = []
    for rows, ic, oc in ((3, 512, 64), (1, 4096, 4096)):
        x, w, y, bias = normal(rows, ic), normal(oc, ic), normal(rows, oc), normal(oc)
        cases.append(Case(f"{rows} rows, {ic} -> {oc}",
                          lambda rows=rows, x=x, w=w, ic=ic, oc=oc, y=y, bias=bias: testing.linear_raw(
                              isa, rows, x, w, ic, oc, y, bias, -INFINITE, INFINITE), 4 * ic * oc, "B"))
    return cases


@kernel_bench
def bench_lanes_gather(testing: Any, isa: str) -> list[Case]:
    cases = []
    lanes = testing.tile_sizes(isa)["lanes"]
    for width in (14, 56, 224):
        x, s = normal(lanes, width, 16), normal(width + 2, lanes)
        cases.append(Case(f"row of {width}, padding 1",
                          lambda x=x, s=s, width=width: testing.lanes_gather(isa, s, x, width * 16, lanes, -1, width),
                          2 * s.nbytes, "B"))
    return cases


@kernel_bench
def bench_lanes_scatter(testing: Any, isa: str) -> list[Case]:
    cases = []
    lanes = testing.tile_sizes(isa)["lanes"]
    bias = normal(lanes)
    for width in (14, 56, 224):
        y, s = normal(lanes, width, 16), normal(width, lanes)
        cases.append(Case(f"row of {width}", lambda y=y, s=s, width=width: testing.lanes_scatter(
            isa, y, width * 16, lanes, s, bias, None, 0.0, INFINITE), 2 * s.nbytes, "B"))
    return cases


@kernel_bench
def bench_wino_weights(testing: Any, isa: str) -> list[Case]:
    """Eight channels; what is counted are the weights read."""
    lanes, cases = testing.tile_sizes(isa)["lanes"], []
    for n, m in ((6, 4), (4, 2), (6, 2)):
        r = n - m + 1
        arguments = (isa, n, m, n, m, normal(8, r * r, lanes), np.arange(r * r, dtype=np.int32).reshape(r, r),
                     normal(n * n, 8, lanes))
        cases.append(Case(f"{n}x{n} points, {r}x{r} taps", lambda arguments=arguments: testing.wino_weights(*arguments),
                          4 * 8 * r * r * lanes, "B"))
    return cases


@kernel_bench
def bench_wino_in(testing: Any, isa: str) -> list[Case]:
    """A row of 14 tiles; what is counted is what is stored."""
    cases = []
    lanes, tiles = testing.tile_sizes(isa)["lanes"], 14
    for nh, nw, m in ((6, 6, 4), (4, 4, 2), (6, 4, 2), (1, 6, 4), (6, 1, 1)):
        columns = (tiles - 1) * m + nw
        rows, pitch = normal(nh, columns, lanes), (tiles + 1) * lanes
        arguments = (isa, nh, nw, rows, np.arange(nh, dtype=np.int64) * columns * lanes, columns,
                     np.arange(tiles, dtype=np.int32) * m, 1, normal(nh, columns, lanes), normal(nh * nw * pitch),
                     pitch)
        cases.append(Case(f"{nh}x{nw} points, {tiles} tiles", lambda arguments=arguments: testing.wino_in(*arguments),
                          4 * nh * nw * tiles * lanes, "B"))
    return cases


@kernel_bench
def bench_wino_gemm(testing: Any, isa: str) -> list[Case]:
    """Three groups of tiles by two vectors of output channels, operands in L1 or L2."""
    cases = []
    tile = testing.tile_sizes(isa)
    lanes, tiles = tile["lanes"], 3 * tile["wino_np"]
    for channels in (64, 256):
        for chunk in (32, 256):
            arguments = (isa, tiles, 2, normal(channels, tiles), tiles * lanes, normal(channels, 2 * lanes), channels,
                         chunk, normal(2, tiles, 37, lanes), 37 * lanes, tiles * 37 * lanes, False)
            cases.append(Case(f"{tiles} tiles, {channels} channels by {chunk}",
                              lambda arguments=arguments: testing.wino_gemm(*arguments),
                              4 * tiles * lanes * channels, "FLOP"))
    return cases


@kernel_bench
def bench_wino_out(testing: Any, isa: str) -> list[Case]:
    """A row of 14 tiles; what is counted is what is loaded."""
    cases = []
    lanes, tiles = testing.tile_sizes(isa)["lanes"], 14
    for nh, mh, nw, mw in ((6, 4, 6, 4), (4, 2, 4, 2), (6, 4, 4, 2), (1, 1, 6, 4), (6, 5, 6, 4)):
        m_t, columns = (nh * nw | 1) * lanes, tiles * mw
        arguments = (isa, nh, mh, nw, mw, normal(tiles * m_t), m_t, np.arange(tiles, dtype=np.int32) * mw, 1,
                     normal(mh, columns, lanes), columns * lanes)
        cases.append(Case(f"({nh}, {mh}) x ({nw}, {mw}), {tiles} tiles",
                          lambda arguments=arguments: testing.wino_out(*arguments),
                          4 * nh * nw * tiles * lanes, "B"))
    return cases


@kernel_bench
def bench_fma_peak(testing: Any, isa: str) -> list[Case]:
    iterations = 10_000
    flops, _ = testing.fma_peak(isa, iterations)
    return [Case(f"{iterations} rounds", lambda: testing.fma_peak(isa, iterations), flops, "FLOP")]
