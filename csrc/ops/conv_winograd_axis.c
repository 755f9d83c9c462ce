/* SPDX-License-Identifier: BSD-3-Clause */
/* Which convolutions are sums of Winograd tiles, and how they are cut into them. */
#include "ops/conv_winograd_priv.h"

#include <math.h>

#include "cpu/cbn_cpu.h"

/* Adds the pieces of `ntaps` taps whose first input is at `in` and whose first kernel index is k0. */
static bool pieces_add(wino_axis *a, int64_t in, int64_t k0, int64_t ntaps) {
    for (int64_t b = 0; b < ntaps; b += a->r) {
        if (a->npieces == CBN_WINO_PIECES) return false;
        wino_piece *p = &a->piece[a->npieces++];
        *p = (wino_piece){in + b * a->in_step, k0 + b * a->k_step, (int)CBN_MIN(ntaps - b, a->r)};
    }
    return true;
}

/* Full pieces to the front. */
static void pieces_sort(wino_axis *a) {
    for (int q = 0; q < a->npieces; q++) {
        if (a->piece[q].ntaps < a->r) continue;
        const wino_piece p = a->piece[q];
        a->piece[q] = a->piece[a->nfull];
        a->piece[a->nfull++] = p;
    }
}

/* The axis with n points and m outputs. */
static bool axis_make(const cbn_conv_desc *d, int axis, int n, int m, wino_axis *a) {
    const int64_t s = d->stride[axis], lo = d->pad_lo[axis], k = d->k[axis], dil = d->dil[axis];
    *a = (wino_axis){.n = n, .m = m, .r = n - m + 1, .in = d->in[axis], .out = d->out[axis], .k = k};
    a->phases = a->sets = 1;
    a->steps = 1;
    if (d->transposed) {
        /* Output o meets kernel index t at input (o + lo - t)/s. With o + lo = s*j + u: t = u + s*i meets j - i. */
        if (dil != 1 || s > CBN_WINO_SETS) return false;
        const int64_t most = cbn_ceil_div(k, s);
        a->steps = a->sets = (int)s;
        a->in_step = 1;
        a->in_tile = m;
        a->in0 = lo / s - (most - 1);
        a->out0 = -(lo % s);
        a->k_step = -s;
        a->tiles = (a->out - 1 - a->out0) / s / m + 1;
        if (!pieces_add(a, 0, (most - 1) * s, most)) return false;
    } else if (s == 1) {
        if (dil > 64) return false;
        a->steps = a->phases = (int)dil;
        a->in_step = dil;
        a->in_tile = m * dil;
        a->in0 = -lo;
        a->k_step = 1;
        a->tiles = cbn_wino_phase_tiles(a, 0);
        if (!pieces_add(a, 0, 0, k)) return false;
    } else {
        if (dil != 1 || s > CBN_WINO_PIECES) return false;
        a->in_step = s;
        a->in_tile = m * s;
        a->in0 = -lo;
        a->k_step = s;
        a->tiles = cbn_wino_phase_tiles(a, 0);
        for (int64_t e = 0; e < CBN_MIN(s, k); e++)
            if (!pieces_add(a, e, e, (k - e + s - 1) / s)) return false;
    }
    pieces_sort(a);
    return a->nfull > 0;
}

/* Multiplications along the axis. */
static int64_t axis_work(const wino_axis *a) {
    int64_t tiles = 0;
    for (int p = 0; p < a->phases; p++) tiles += cbn_wino_phase_tiles(a, p);
    return tiles * a->sets * (a->npieces * (a->n - 1) + a->nfull);
}

/* The axis with n points, cut into as many outputs as is cheapest. */
static bool axis_choose(const cbn_conv_desc *d, int axis, int n, wino_axis *best) {
    if (n == 1) return axis_make(d, axis, 1, 1, best);
    bool found = false;
    for (int m = 2; m < n; m++) {
        wino_axis a;
        if (!axis_make(d, axis, n, m, &a)) continue;
        if (!found || axis_work(&a) < axis_work(best)) *best = a;
        found = true;
    }
    return found;
}

/* Kernels along depth alone: height and width are one long row then, and depth takes the place of height. */
static cbn_conv_desc depth_as_height(const cbn_conv_desc *d) {
    cbn_conv_desc out = *d;
    if (d->transposed || d->k[0] == 1) return out;
    for (int a = 1; a < 3; a++)
        if (d->k[a] != 1 || d->stride[a] != 1 || d->pad_lo[a] != 0 || d->pad_hi[a] != 0) return out;
    out.in[0] = out.out[0] = out.k[0] = out.stride[0] = out.dil[0] = 1;
    out.pad_lo[0] = out.pad_hi[0] = 0;
    out.in[1] = d->in[0];
    out.out[1] = d->out[0];
    out.k[1] = d->k[0];
    out.stride[1] = d->stride[0];
    out.dil[1] = d->dil[0];
    out.pad_lo[1] = d->pad_lo[0];
    out.pad_hi[1] = d->pad_hi[0];
    out.in[2] = d->in[1] * d->in[2];
    out.out[2] = d->out[1] * d->out[2];
    return out;
}

bool cbn_wino_geometry_make(const cbn_conv_desc *full, int lanes, int nh, int nw, wino_geometry *g,
                            const char **why_not) {
    const cbn_conv_desc desc = depth_as_height(full), *d = &desc;
    *g = (wino_geometry){.groups = d->g, .icg = d->ic / d->g, .ocg = d->oc / d->g, .lanes = lanes};
    g->icp = cbn_ceil_div(g->icg, lanes) * lanes;
    if (g->icg < 16 || g->ocg < 16) {
        *why_not = "a group has fewer than 16 channels";
        return false;
    }
    const bool high = d->k[1] > 1, wide = d->k[2] > 1;
    if (!high && !wide) {
        *why_not = "no axis has more than one tap";
        return false;
    }
    if (nh != nw && !(high && wide)) {
        *why_not = "one axis alone has taps";
        return false;
    }
    if (d->in[2] > INT32_MAX / 64 || d->out[2] > INT32_MAX / 64) {
        *why_not = "rows are too long";
        return false;
    }
    g->z = (wino_depth){d->in[0], d->out[0], d->k[0], d->stride[0], d->pad_lo[0], d->dil[0]};
    if ((d->transposed && (d->k[0] > 1 || d->stride[0] > 1)) || d->k[0] > CBN_WINO_DEPTH) {
        *why_not = "too many taps along depth, or transposed there";
        return false;
    }
    if (!axis_choose(d, 1, high ? nh : 1, &g->h) || !axis_choose(d, 2, wide ? nw : 1, &g->w)) {
        *why_not = "kernel, stride or dilation are not made of short dense pieces";
        return false;
    }
    g->sets = g->h.sets * g->w.sets;
    g->vectors = cbn_ceil_div(g->ocg, lanes) * g->sets;
    for (int i = 0; i < g->h.n; i++)
        for (int j = 0; j < g->w.n; j++) g->pairs += cbn_wino_pieces_at(g, i, j);
    return true;
}

/* Of sums taken in one go; fitted to simulations with ReLU'd data. */
static double axis_error(const wino_axis *a) {
    static const double six[] = {0, 0, 1.15, 1.24, 1.44, 1.87};
    if (a->n == 1) return 1.08;
    return a->n == 6 ? six[a->m] : a->m == 2 ? 0.87 : 1.06;
}

static double error_of(const wino_geometry *g, int64_t chunk) {
    const int pieces = g->h.npieces * g->w.npieces;
    const double terms = (double)(g->icg * pieces * g->z.k);
    /* Rounding errors of a sum of n random terms grow like n: here those of chunks, of their sum, and the rest. */
    const double share = (double)chunk / terms + 1.0 / (double)chunk + 0.03;
    /* Pieces with fewer taps than they could have add to the errors but not to the sum. */
    const double filled = (double)(g->h.k * g->w.k) / (double)(g->sets * pieces * g->h.r * g->w.r);
    return axis_error(&g->h) * axis_error(&g->w) * sqrt((share < 1.0 ? share : 1.0) / filled);
}

int64_t cbn_wino_chunk(const wino_geometry *g, cbn_precision precision) {
    /* What is allowed, less some room for data that are worse than those of the simulations. */
    const double most = precision == CBN_PRECISION_STRICT ? 0.8 : 1.6;
    int64_t chunk = 256;
    while (chunk > 16 && (chunk / 2 >= g->icp || error_of(g, chunk) > most)) chunk /= 2;
    return precision == CBN_PRECISION_FAST || error_of(g, chunk) <= most ? chunk : 0;
}

int64_t cbn_wino_band_tiles(const wino_axis *w, int64_t first, int64_t end, int32_t *col_in, int32_t *col_out) {
    int64_t n = 0;
    for (int64_t f = 0; f < w->phases; f++) {
        const int64_t last = CBN_MIN(end, cbn_wino_phase_tiles(w, f));
        if (!col_in) n += CBN_MAX(last - first, 0);
        for (int64_t t = first; col_in && t < last; t++, n++) {
            col_in[n] = (int32_t)(f + (t - first) * w->in_tile);
            col_out[n] = (int32_t)(f + (t - first) * w->m * w->steps);
        }
    }
    return n;
}

static int64_t round_to(int64_t a, int64_t step) { return cbn_ceil_div(a, step) * step; }

/* A block's transformed inputs should lie in the L2 cache, but where many weights are read anew for each block it pays
 * to have more tiles than fit there: weights then come from the L3 cache while inputs are used point by point. */
void cbn_wino_blocking_make(const wino_geometry *g, const cbn_conv_context *ctx, wino_blocking *b) {
    const cbn_kernels *k = ctx->kernels;
    const int64_t l2 = (int64_t)cbn_cpu_cache_sizes().l2 / (int64_t)sizeof(float), points = g->h.n * g->w.n;
    const int64_t planes = g->z.k * g->h.npieces * g->w.npieces;
    const int64_t per_tile = points * planes * g->icp;
    const int64_t u = g->pairs * g->z.k * g->icp * g->vectors * g->lanes;
    *b = (wino_blocking){.chunk = cbn_wino_chunk(g, ctx->precision)};
    const int64_t fits = l2 / 2 / per_tile, least = u > l2 / 2 ? 64 : 2 * k->wino_np;
    int64_t most = CBN_MAX(fits, least);
    /* Equal strips no wider than that; on average they must not be, either. An even number of them, for two threads. */
    const int64_t row_tiles = cbn_wino_band_tiles(&g->w, 0, g->w.tiles, NULL, NULL);
    int64_t strips = cbn_ceil_div(row_tiles, most);
    if (strips > 1) strips += strips % 2;
    for (b->strips = CBN_MIN(strips, g->w.tiles);; b->strips++) {
        b->strip_tiles = 0;
        for (int64_t i = 0; i < b->strips; i++) {
            const int64_t t = cbn_wino_band_tiles(&g->w, cbn_wino_cut(g->w.tiles, b->strips, i),
                                                  cbn_wino_cut(g->w.tiles, b->strips, i + 1), NULL, NULL);
            b->strip_tiles = CBN_MAX(b->strip_tiles, t);
        }
        if (b->strip_tiles <= most || b->strips == g->w.tiles) break;
    }
    b->tiles = CBN_MAX(most / b->strip_tiles, 1) * b->strip_tiles;
    /* Sums of a slice: an eighth to a quarter of L2. */
    const int64_t step = g->sets % 2 == 0 ? g->sets : 2 * g->sets;
    const int64_t want = CBN_MAX(l2 / 4 / (b->tiles * points * g->lanes), 1);
    b->slice = CBN_MIN(round_to(CBN_MAX(want, 4), step), round_to(g->vectors, step));
    b->slices = cbn_ceil_div(g->vectors, b->slice);
    b->slice = round_to(cbn_ceil_div(g->vectors, b->slices), step);
    b->slices = cbn_ceil_div(g->vectors, b->slice);
    /* Weights of one call stay in L1 while the tiles of the block pass. */
    const int64_t part = (int64_t)cbn_cpu_cache_sizes().l1d / 2 / (2 * g->lanes * (int64_t)sizeof(float)) / 64 * 64;
    b->k_part = round_to(cbn_ceil_div(g->icp, cbn_ceil_div(g->icp, CBN_MAX(part, 64))), g->lanes);
}
