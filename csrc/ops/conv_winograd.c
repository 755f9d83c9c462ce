/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution by Winograd's short convolutions: a tile of m outputs takes n = m + r - 1 multiplications for r taps
 * along each axis instead of m*r. Three rows: 6 points along both axes, 6 x 4 and 4 x 4, named after what they make of
 * 3x3 kernels; more outputs a tile mean fewer multiplications and larger rounding errors.
 *
 * A tile sees taps at distance 1. What else there is becomes a sum of such convolutions or several of them side by side
 * (conv_winograd_axis.c): long kernels are cut into pieces; of a strided one the even and the odd taps are pieces, each
 * on its own grid of inputs; a dilated one is as many convolutions as the dilation, each on its own grid; the phases of
 * a transposed one are sets of weights for the same tiles. Depth is summed plane by plane.
 *
 * The points keep rounding errors low (0, +-5/8, +-3/2, inf: half of those of 0, +-1, +-2, inf), and the sum over
 * channels is taken in chunks. An Inf or NaN of the input spreads over the outputs of its tiles; images where this
 * happens are reported and computed anew by `direct`. */
#include <stdio.h>

#include "base/cbn_alloc.h"
#include "cpu/cbn_cpu.h"
#include "ops/conv_cost.h"
#include "ops/conv_winograd_priv.h"

static bool wino_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, int nh, int nw, const char **why_not) {
    if (d->dtype != CBN_F32) {
        *why_not = "dtype is not float32";
        return false;
    }
    wino_geometry g;
    if (!cbn_wino_geometry_make(d, ctx->kernels->lanes, nh, nw, &g, why_not)) return false;
    if (cbn_wino_chunk(&g, ctx->precision) == 0) {
        *why_not = "rounding errors would exceed those of the precision asked for";
        return false;
    }
    wino_blocking b;
    cbn_wino_blocking_make(&g, ctx, &b);
    if (!cbn_wino_fits(&g, &b)) {
        *why_not = "the transformed inputs of a few rows would take too much memory";
        return false;
    }
    return true;
}

/* ---- cost ---- */
/* Cycles to bring a vector into lanes or back, by the size of what it is read from or written to. */
static double lane_cycles(int64_t floats) {
    const cbn_cpu_caches c = cbn_cpu_cache_sizes();
    const int64_t bytes = floats * (int64_t)sizeof(float);
    return bytes <= (int64_t)c.l2 ? 2.7 : bytes <= (int64_t)c.l3 / 8 ? 3.7 : 7.5;
}

/* Depth taps an output plane meets, on average. */
static double depth_taps(const wino_depth *z) {
    int64_t met = 0;
    for (int64_t o = 0; o < z->out; o++) {
        for (int64_t t = 0; t < z->k; t++) {
            const int64_t at = o * z->stride - z->pad + t * z->dil;
            met += at >= 0 && at < z->in;
        }
    }
    return (double)met / (double)z->out;
}

/* Calibrated on Zen 3; all but the multiplication is small. */
static double wino_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx, int nh, int nw) {
    const char *why_not;
    wino_geometry g;
    wino_blocking b;
    const bool ok = cbn_wino_geometry_make(d, ctx->kernels->lanes, nh, nw, &g, &why_not);
    assert(ok);
    (void)ok;
    cbn_wino_blocking_make(&g, ctx, &b);
    int64_t bands = 0;
    for (int f = 0; f < g.h.phases; f++) bands += cbn_wino_phase_tiles(&g.h, f);
    const int64_t columns = cbn_wino_band_tiles(&g.w, 0, g.w.tiles, NULL, NULL);
    const double tiles = (double)(bands * columns * g.z.out), vectors = (double)g.vectors;
    const double icb = (double)(g.icp / g.lanes), points = g.h.n * g.w.n, pieces = g.h.npieces * g.w.npieces;

    /* Groups of few tiles wait for their sums. */
    const int64_t rows = bands * (g.z.k > 1 ? 1 : g.z.out), block_rows = CBN_MAX(b.tiles / b.strip_tiles, 1);
    const int64_t block = CBN_MIN(block_rows, rows) * b.strip_tiles, np = ctx->kernels->wino_np;
    const double full = (double)CBN_MAX(block, 4 * cbn_ceil_div(block, np)) / (double)block;
    const double sums = (double)(g.pairs * g.icp) * depth_taps(&g.z);
    const double waits = 1.03 + 9.0 / ((double)g.icp * pieces) + 1.5 / (double)b.chunk;
    const double multiply = tiles * full * waits * sums * vectors / 2;
    /* Weights come from beyond L2 once a block, some from beyond L3. */
    const cbn_cpu_caches c = cbn_cpu_cache_sizes();
    const double u_bytes = sums * vectors * g.lanes * sizeof(float);
    const double blocks = (double)(cbn_ceil_div(rows, block_rows) * b.strips * (g.z.k > 1 ? g.z.out : 1));
    double stream = u_bytes > (double)c.l2 / 2 ? u_bytes / 9.6 * blocks : 0;
    if (u_bytes > (double)c.l3) stream += (u_bytes - (double)c.l3) / 6 * blocks;

    const double band_rows = (double)cbn_wino_rows(&g.h);
    const double fresh = CBN_MIN(band_rows, (double)(g.h.in_tile / cbn_wino_row_step(&g.h)));
    const double gathered = (double)rows * fresh + (double)cbn_ceil_div(rows, block_rows) * (band_rows - fresh);
    const double width = (double)(b.strips * cbn_wino_columns(&g.w, cbn_ceil_div(g.w.tiles, b.strips)));
    const double planes = g.z.k > 1 ? (double)g.z.in : 1;
    const int64_t x = d->ic * d->in[0] * d->in[1] * d->in[2], y = d->oc * d->out[0] * d->out[1] * d->out[2];
    const double gather = gathered * width * planes * icb * lane_cycles(x);
    const double column = (double)(g.w.in_tile / g.w.phases);
    const double in = tiles * pieces * icb * g.h.n * (2.7 * column + 1.4 * g.w.n);
    const double out = tiles * vectors * points * 2.3;
    const double scatter = (double)y / g.lanes / (double)g.groups * lane_cycles(y);
    /* Sets of weights bring the same taps into lanes each. */
    const double pack_cycles = ctx->one_shot ? 16 + 3 * (g.sets - 1) : 0;
    const double pack = points * pieces * (double)(g.z.k * g.icp) * vectors * pack_cycles;
    const double sum = CBN_MAX(multiply, stream) + 0.3 * CBN_MIN(multiply, stream);
    return (double)g.groups * (sum + gather + in + out + scatter + pack);
}

/* ---- state ---- */
static void wino_destroy(void *state) {
    wino_state *s = state;
    if (!s) return;
    cbn_free(s->u);
    cbn_free(s);
}

static cbn_status wino_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, int nh, int nw,
                               void **state, cbn_error *err) {
    const char *why_not;
    wino_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a Winograd convolution", sizeof *s);
    const bool ok = cbn_wino_geometry_make(d, ctx->kernels->lanes, nh, nw, &s->g, &why_not);
    assert(ok);
    (void)ok;
    cbn_wino_blocking_make(&s->g, ctx, &s->b);
    const int64_t channel = s->g.pairs * s->g.z.k * s->g.lanes * s->g.icp;
    s->slice_floats = channel * s->b.slice;
    s->group_floats = channel * s->g.vectors;
    s->u = cbn_alloc_or_fail((size_t)s->g.groups, (size_t)s->group_floats * sizeof *s->u,
                             "the transformed weights of a convolution", err);
    if (!s->u) {
        wino_destroy(s);
        return CBN_NO_MEMORY;
    }
    cbn_wino_pack(d, ctx, s, w);
    *state = s;
    return CBN_OK;
}

static void wino_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                          size_t size) {
    const wino_state *s = state;
    const wino_geometry *g = &s->g;
    (void)d;
    (void)ctx;
    const int pieces = (int)g->z.k * g->h.npieces * g->w.npieces;
    snprintf(buf, size, "F(%dx%d, %dx%d), %d piece%s, blocks of %lld tiles x %lld channels", g->h.m, g->w.m, g->h.r,
             g->w.r, pieces, pieces > 1 ? "s" : "", (long long)s->b.tiles,
             (long long)(s->b.slice / g->sets * g->lanes));
}

/* ---- rows ---- */
#define WINO_ROW(id, nh, nw)                                                                                          \
    static bool supports_##id(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {            \
        return wino_supports(d, ctx, nh, nw, why_not);                                                                \
    }                                                                                                                 \
    static double cost_##id(const cbn_conv_desc *d, const cbn_conv_context *ctx) { return wino_cost(d, ctx, nh, nw); }\
    static cbn_status prepare_##id(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,  \
                                   cbn_error *err) {                                                                  \
        return wino_prepare(d, ctx, w, nh, nw, state, err);                                                           \
    }                                                                                                                 \
    const cbn_conv_impl cbn_conv_winograd_##id = {                                                                    \
        .name = "winograd_" #id,                                                                                      \
        .supports = supports_##id,                                                                                    \
        .cost = cost_##id,                                                                                            \
        .prepare = prepare_##id,                                                                                      \
        .run = cbn_wino_run,                                                                                          \
        .destroy = wino_destroy,                                                                                      \
        .workspace_bytes = cbn_wino_workspace,                                                                        \
        .describe = wino_describe,                                                                                    \
        .fused_epilogue = true,                                                                                       \
        .spreads_nonfinite = true,                                                                                    \
    };
WINO_ROW(4x4, 6, 6)
WINO_ROW(4x2, 6, 4)
WINO_ROW(2x2, 4, 4)
