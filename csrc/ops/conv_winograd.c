/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution by Winograd's short convolutions: a tile of m outputs takes n = m + r - 1 multiplications for r taps along
 * each axis instead of m*r. Three rows: 6 points along both axes, 6 x 4 and 4 x 4, named after what they make of 3x3
 * kernels; more outputs a tile mean fewer multiplications and larger rounding errors.
 *
 * A tile sees taps at distance 1. What else there is becomes a sum of such convolutions or several of them side by side
 * (conv_winograd_axis.c): long kernels are cut into pieces; of a strided one the even and the odd taps are pieces, each
 * on its own grid of inputs; a dilated one is as many convolutions as the dilation, each on its own grid; the phases of a
 * transposed one are sets of weights for the same tiles. Depth is summed plane by plane.
 *
 * The points keep rounding errors low (0, +-5/8, +-3/2, inf: half of those of 0, +-1, +-2, inf), and the sum over channels
 * is taken in chunks. An Inf or NaN of the input spreads over the outputs of its tiles; images where this happens are
 * reported and computed anew by `direct`. */
#include <stdio.h>
#include <string.h>

#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "cpu/cbn_cpu.h"
#include "ops/conv_cost.h"
#include "ops/conv_winograd_priv.h"
#include "threads/cbn_parallel.h"

static bool wino_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, int nh, int nw, const char **why_not) {
    if (d->dtype != CBN_F32) {
        *why_not = "dtype is not float32";
        return false;
    }
    wino_geometry g;
    if (!cbn_wino_geometry_make(d, ctx->kernels->lanes, nh, nw, &g, why_not)) return false;
    /* Some room for data that are worse than those of the simulations. */
    if (ctx->precision != CBN_PRECISION_FAST && cbn_wino_error(&g) > (ctx->precision == CBN_PRECISION_STRICT ? 0.9 : 1.85)) {
        *why_not = "rounding errors would exceed those of the precision asked for";
        return false;
    }
    return true;
}

/* ---- cost ---- */
static double wino_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx, int nh, int nw) {
    const char *why_not;
    wino_geometry g;
    wino_blocking b;
    const bool ok = cbn_wino_geometry_make(d, ctx->kernels->lanes, nh, nw, &g, &why_not);
    assert(ok);
    (void)ok;
    cbn_wino_blocking_make(&g, ctx->kernels, &b);
    int64_t bands = 0;
    for (int f = 0; f < g.h.phases; f++) bands += cbn_wino_phase_tiles(&g.h, f);
    const int64_t columns = cbn_wino_band_tiles(&g.w, 0, g.w.tiles, NULL, NULL), frames = g.z.out;
    const double tiles = (double)(bands * columns * frames * g.groups), points = g.h.n * g.w.n;
    const double planes = (double)(g.h.npieces * g.w.npieces);
    /* Chunks of few tiles wait for the sums. */
    const int64_t block = CBN_MIN(b.tiles, bands * columns * (g.z.k > 1 ? 1 : frames)), chunks = cbn_ceil_div(block, ctx->kernels->wino_np);
    const double full = (double)CBN_MAX(block, 4 * chunks) / (double)block;
    const double k = (double)(g.pairs * g.z.k * g.icp), vectors = (double)g.vectors;
    const double multiply = 1.05 * tiles * full * k * vectors / 2;
    const double in = tiles * planes * (double)(g.icp / g.lanes) * points * 5.0;
    const double out = tiles * vectors * points * 4.0;
    const double u_bytes = k * vectors * g.lanes * sizeof(float), blocks = tiles / (double)block;
    const cbn_cpu_caches c = cbn_cpu_cache_sizes();
    double stream = 0;
    if (u_bytes > (double)c.l2 / 2) stream += u_bytes / 12 * blocks;
    if (u_bytes > (double)c.l3 / 2) stream += (u_bytes - (double)c.l3 / 2) / 6 * blocks;
    const double pack = ctx->one_shot ? (double)(g.groups * g.icg * g.ocg) * points * 12 : 0;
    return multiply + in + out + 0.5 * stream + pack;
}

/* ---- weights ---- */
typedef struct pack {
    const cbn_conv_desc *d;
    const wino_state *s;
    const float *w;
    double gh[CBN_WINO_POINTS][CBN_WINO_POINTS], gw[CBN_WINO_POINTS][CBN_WINO_POINTS];
} pack;

/* Values at all points of the kernel of one input channel, `oc` its output channel; missing channels are zero. */
static void kernel_transform(const pack *p, int64_t oc, int64_t ic, int set, int64_t tz, int qh, int qw,
                             double out[CBN_WINO_POINTS][CBN_WINO_POINTS]) {
    const wino_geometry *g = &p->s->g;
    const wino_axis *h = &g->h, *w = &g->w;
    const cbn_conv_desc *d = p->d;
    const int64_t taps = g->z.k * h->k * w->k;
    const float *from = p->w + (d->transposed ? ic * g->ocg + oc % g->ocg : oc * g->icg + ic % g->icg) * taps;
    from += tz * h->k * w->k;
    double rows[CBN_WINO_POINTS][CBN_WINO_POINTS] = {{0}};
    memset(out, 0, sizeof(double[CBN_WINO_POINTS][CBN_WINO_POINTS]));
    for (int a = 0; a < h->piece[qh].ntaps; a++) {
        const int64_t ky = h->piece[qh].k0 + set / w->sets + a * h->k_step;
        if (ky < 0 || ky >= h->k) continue;
        for (int b = 0; b < w->piece[qw].ntaps; b++) {
            const int64_t kx = w->piece[qw].k0 + set % w->sets + b * w->k_step;
            if (kx < 0 || kx >= w->k) continue;
            const double tap = from[ky * w->k + kx];
            for (int j = 0; j < w->n; j++) rows[a][j] += tap * p->gw[j][b];
        }
        for (int i = 0; i < h->n; i++)
            for (int j = 0; j < w->n; j++) out[i][j] += p->gh[i][a] * rows[a][j];
    }
}

/* Slice `item` (of all groups). */
static void slice_pack(const pack *p, int64_t item) {
    const wino_state *s = p->s;
    const wino_geometry *g = &s->g;
    const int64_t group = item / s->b.slices, slice = item % s->b.slices, first = slice * s->b.slice, lanes = g->lanes;
    const int64_t vectors = CBN_MIN(s->b.slice, g->vectors - first);
    float *base = s->u + group * s->group_floats + slice * s->slice_floats;
    double value[CBN_WINO_POINTS][CBN_WINO_POINTS];
    for (int64_t at = 0; at < vectors; at += 2) {
        const int64_t nv = CBN_MIN(vectors - at, 2);
        for (int64_t e = 0; e < nv * lanes; e++) {
            const int64_t vector = first + at + e / lanes, oc = vector / g->sets * lanes + e % lanes;
            for (int64_t c = 0; c < g->icp; c++) {
                for (int64_t piece = 0; piece < g->z.k * g->h.npieces * g->w.npieces; piece++) {
                    const int qw = (int)(piece % g->w.npieces), qh = (int)(piece / g->w.npieces % g->h.npieces);
                    const int64_t tz = piece / g->w.npieces / g->h.npieces;
                    const bool there = oc < g->ocg && c < g->icg;
                    if (there)
                        kernel_transform(p, group * g->ocg + oc, group * g->icg + c, (int)(vector % g->sets), tz, qh, qw, value);
                    else
                        memset(value, 0, sizeof value);
                    float *to = base;
                    for (int i = 0; i < g->h.n; i++) {
                        for (int j = 0; j < g->w.n; j++) {
                            const int high = cbn_wino_rows_at(&g->h, i), wide = cbn_wino_rows_at(&g->w, j);
                            const int64_t step = g->z.k * high * wide * g->icp * lanes;
                            if (qh < high && qw < wide)
                                to[at * step + (((tz * high + qh) * wide + qw) * g->icp + c) * nv * lanes + e] = (float)value[i][j];
                            to += step * vectors;
                        }
                    }
                }
            }
        }
    }
}

static void pack_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    for (int64_t i = begin; i < end; i++) slice_pack(arg, i);
}

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
    cbn_wino_blocking_make(&s->g, ctx->kernels, &s->b);
    int64_t channel = 0, n = 0;
    const bool fits = cbn_mul_ok(s->g.pairs * s->g.z.k * s->g.lanes, s->g.icp, &channel) &&
                      cbn_mul_ok(channel, s->g.vectors, &s->group_floats) && cbn_mul_ok(s->group_floats, s->g.groups, &n) &&
                      cbn_mul_ok(n, sizeof(float), &n);
    s->slice_floats = channel * s->b.slice;
    s->u_bytes = fits ? (size_t)n : SIZE_MAX;
    s->u = fits ? cbn_alloc(s->u_bytes) : NULL;
    if (!s->u) {
        wino_destroy(s);
        return cbn_fail_memory(err, "the transformed weights of a convolution", fits ? (size_t)n : SIZE_MAX);
    }
    pack p = {.d = d, .s = s, .w = w};
    cbn_wino_g(s->g.h.n, s->g.h.m, p.gh);
    cbn_wino_g(s->g.w.n, s->g.w.m, p.gw);
    cbn_parallel_for(s->g.groups * s->b.slices, 1, 0, pack_range, &p);
    *state = s;
    return CBN_OK;
}

static size_t wino_state_bytes(const void *state) {
    const wino_state *s = state;
    return sizeof *s + s->u_bytes;
}

static void wino_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf, size_t size) {
    const wino_state *s = state;
    const wino_geometry *g = &s->g;
    (void)d;
    (void)ctx;
    snprintf(buf, size, "F(%dx%d, %dx%d), %d pieces, blocks of %lld tiles x %lld channels", g->h.m, g->w.m, g->h.r, g->w.r,
             (int)(g->z.k * g->h.npieces * g->w.npieces), (long long)s->b.tiles,
             (long long)(s->b.slice / g->sets * g->lanes));
}

/* ---- rows ---- */
#define WINO_ROW(id, nh, nw)                                                                                             \
    static bool supports_##id(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {               \
        return wino_supports(d, ctx, nh, nw, why_not);                                                                   \
    }                                                                                                                    \
    static double cost_##id(const cbn_conv_desc *d, const cbn_conv_context *ctx) { return wino_cost(d, ctx, nh, nw); }   \
    static cbn_status prepare_##id(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,     \
                                   cbn_error *err) {                                                                     \
        return wino_prepare(d, ctx, w, nh, nw, state, err);                                                              \
    }                                                                                                                    \
    const cbn_conv_impl cbn_conv_winograd_##id = {                                                                       \
        .name = "winograd_" #id,                                                                                         \
        .supports = supports_##id,                                                                                       \
        .cost = cost_##id,                                                                                               \
        .prepare = prepare_##id,                                                                                         \
        .run = cbn_wino_run,                                                                                             \
        .destroy = wino_destroy,                                                                                         \
        .state_bytes = wino_state_bytes,                                                                                 \
        .workspace_bytes = cbn_wino_workspace,                                                                           \
        .describe = wino_describe,                                                                                       \
        .fused_epilogue = true,                                                                                          \
        .spreads_nonfinite = true,                                                                                       \
    };
WINO_ROW(4x4, 6, 6)
WINO_ROW(4x2, 6, 4)
WINO_ROW(2x2, 4, 4)
