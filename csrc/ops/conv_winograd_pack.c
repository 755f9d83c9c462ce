/* SPDX-License-Identifier: BSD-3-Clause */
/* Weights of a Winograd convolution: transformed in float64, rounded once, packed in the order of their use. Some input
 * channels of a pair of vectors are brought into lanes, transformed piece by piece into a block that stays in L1, and
 * copied point by point: the points' places are powers of two apart and would push each other out of the cache. */
#include <string.h>

#include "ops/conv_winograd_priv.h"
#include "threads/cbn_parallel.h"

enum {
    N = CBN_WINO_POINTS,
    LANES = 16,
    CHANNELS = 8,      /* input channels of a block */
    TAP_FLOATS = 4096, /* room for their taps */
    GRAIN = 4096       /* weights worth a thread */
};

typedef struct pack {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const wino_state *s;
    const float *w;
    int64_t pairs; /* of vectors of a group */
    double gh[N][N], gw[N][N];
} pack;

/* Input channels first .. first+n-1 of up to two vectors of output channels. */
typedef struct block {
    int64_t group, vector, nv;
    int64_t first, n;
    float taps[2][TAP_FLOATS] __attribute__((aligned(CBN_CACHE_LINE)));
    float u[N * N * CHANNELS * 2 * LANES] __attribute__((aligned(CBN_CACHE_LINE)));
} block;

static int64_t plane_taps(const wino_geometry *g) { return g->h.k * g->w.k; }

/* Whether all taps of a channel are brought into lanes at once; else those of a piece are, one by one. */
static bool whole_kernels(const wino_geometry *g) {
    return g->z.k * plane_taps(g) * g->lanes <= TAP_FLOATS;
}

static int64_t block_channels(const wino_geometry *g) {
    return whole_kernels(g) ? CBN_MIN(CHANNELS, TAP_FLOATS / (g->z.k * plane_taps(g) * g->lanes)) : CHANNELS;
}

/* Weights of input channel `channel` and the first output channel of a vector. */
typedef struct rows {
    const float *from;
    int64_t oc_step, ic_step;
    int nch;
} rows;

static rows rows_of(const pack *p, const block *b, int64_t v) {
    const wino_geometry *g = &p->s->g;
    const int64_t taps = g->z.k * plane_taps(g), oc0 = (b->vector + v) / g->sets * g->lanes;
    rows r = {.oc_step = g->icg * taps, .ic_step = taps, .nch = (int)CBN_MIN(g->ocg - oc0, g->lanes)};
    if (p->d->transposed) {
        r.oc_step = taps;
        r.ic_step = g->ocg * taps;
    }
    r.from = p->w + b->group * g->ocg * g->icg * taps + oc0 * r.oc_step + b->first * r.ic_step;
    return r;
}

/* b->taps[v][channel][tap][lane] */
static void taps_read(const pack *p, block *b, int64_t v) {
    const wino_geometry *g = &p->s->g;
    const int64_t taps = g->z.k * plane_taps(g);
    const rows r = rows_of(p, b, v);
    if (r.ic_step == taps) {
        p->k->lanes_gather(b->taps[v], r.from, r.oc_step, r.nch, 0, b->n * taps, b->n * taps);
        return;
    }
    for (int64_t i = 0; i < b->n; i++)
        p->k->lanes_gather(b->taps[v] + i * taps * g->lanes, r.from + i * r.ic_step, r.oc_step, r.nch, 0, taps, taps);
}

/* Taps of a piece: index into a plane of the kernel, -1 where there is none. */
static void piece_taps(const wino_geometry *g, int64_t set, int qh, int qw, int32_t *tap) {
    const wino_axis *h = &g->h, *w = &g->w;
    const int64_t y0 = h->piece[qh].k0 + set / w->sets, x0 = w->piece[qw].k0 + set % w->sets;
    for (int a = 0; a < h->piece[qh].ntaps; a++) {
        for (int b = 0; b < w->piece[qw].ntaps; b++, tap++) {
            const int64_t y = y0 + a * h->k_step, x = x0 + b * w->k_step;
            *tap = y >= 0 && y < h->k && x >= 0 && x < w->k ? (int32_t)(y * w->k + x) : -1;
        }
    }
}

/* One piece of vector v into b->u[point][channel][v][lane]. */
static void piece_transform(const pack *p, block *b, int64_t v, int64_t plane, int qh, int qw) {
    const wino_geometry *g = &p->s->g;
    const int64_t taps = g->z.k * plane_taps(g), lanes = g->lanes;
    int32_t tap[N * N];
    cbn_wino_weights_args a = {.nh = g->h.n, .nw = g->w.n, .high = g->h.piece[qh].ntaps, .wide = g->w.piece[qw].ntaps,
                               .gh = p->gh[0], .gw = p->gw[0], .w = b->taps[v], .w_c = taps * lanes, .tap = tap,
                               .u = b->u + v * lanes, .u_c = b->nv * lanes, .u_xi = CHANNELS * b->nv * lanes, .n = b->n};
    const int n = a.high * a.wide;
    piece_taps(g, (b->vector + v) % g->sets, qh, qw, tap);
    if (whole_kernels(g)) {
        for (int t = 0; t < n; t++)
            if (tap[t] >= 0) tap[t] = (int32_t)((plane * plane_taps(g) + tap[t]) * lanes);
    } else {
        const rows r = rows_of(p, b, v);
        a.w_c = n * lanes;
        for (int t = 0; t < n; t++) {
            if (tap[t] < 0) continue;
            const float *from = r.from + plane * plane_taps(g) + tap[t];
            tap[t] = (int32_t)(t * lanes);
            for (int64_t i = 0; i < b->n; i++)
                p->k->lanes_gather(b->taps[v] + i * a.w_c + tap[t], from + i * r.ic_step, r.oc_step, r.nch, 0, 1, 1);
        }
    }
    p->k->wino_weights(&a);
}

/* The transformed piece to where it belongs, with zeros for the channels between icg and icp. `to`: the slice; `at`: its
 * vectors before the pair. */
static void piece_store(const pack *p, const block *b, int64_t plane, int qh, int qw, int64_t vectors, int64_t at,
                        int64_t rounded, float *to) {
    const wino_geometry *g = &p->s->g;
    const int64_t line = b->nv * g->lanes;
    for (int i = 0; i < g->h.n; i++) {
        for (int j = 0; j < g->w.n; j++) {
            const int64_t high = cbn_wino_rows_at(&g->h, i), wide = cbn_wino_rows_at(&g->w, j);
            const int64_t vector = g->z.k * high * wide * g->icp * g->lanes; /* floats a vector has at this point */
            if (qh < high && qw < wide) {
                float *out = to + at * vector + (((plane * high + qh) * wide + qw) * g->icp + b->first) * line;
                const float *from = b->u + (i * g->w.n + j) * CHANNELS * line;
                memcpy(out, from, (size_t)(b->n * line) * sizeof *out);
                memset(out + b->n * line, 0, (size_t)((rounded - b->n) * line) * sizeof *out);
            }
            to += vectors * vector;
        }
    }
}

/* Items are pairs of vectors of all groups. */
static void pairs_range(void *arg, int64_t begin, int64_t end, int worker) {
    const pack *p = arg;
    const wino_state *s = p->s;
    const wino_geometry *g = &s->g;
    const int64_t step = block_channels(g);
    block b;
    (void)worker;
    for (int64_t item = begin; item < end; item++) {
        b.group = item / p->pairs;
        b.vector = item % p->pairs * 2;
        const int64_t slice = b.vector / s->b.slice, at = b.vector % s->b.slice;
        const int64_t vectors = CBN_MIN(s->b.slice, g->vectors - slice * s->b.slice);
        b.nv = CBN_MIN(vectors - at, 2);
        float *to = s->u + b.group * s->group_floats + slice * s->slice_floats;
        for (b.first = 0; b.first < g->icp; b.first += step) {
            const int64_t rounded = CBN_MIN(step, g->icp - b.first);
            b.n = CBN_MAX(CBN_MIN(rounded, g->icg - b.first), 0);
            if (whole_kernels(g) && b.n > 0)
                for (int64_t v = 0; v < b.nv; v++) taps_read(p, &b, v);
            for (int64_t plane = 0; plane < g->z.k; plane++)
                for (int qh = 0; qh < g->h.npieces; qh++)
                    for (int qw = 0; qw < g->w.npieces; qw++) {
                        for (int64_t v = 0; v < b.nv && b.n > 0; v++) piece_transform(p, &b, v, plane, qh, qw);
                        piece_store(p, &b, plane, qh, qw, vectors, at, rounded, to);
                    }
        }
    }
}

void cbn_wino_pack(const cbn_conv_desc *d, const cbn_conv_context *ctx, const wino_state *s, const float *w) {
    const wino_geometry *g = &s->g;
    pack p = {.d = d, .k = ctx->kernels, .s = s, .w = w, .pairs = cbn_ceil_div(g->vectors, 2)};
    assert(g->lanes <= LANES && s->b.slice % 2 == 0);
    cbn_wino_g(g->h.n, g->h.m, p.gh);
    cbn_wino_g(g->w.n, g->w.m, p.gw);
    const int64_t weights = 2 * g->lanes * g->icg * g->z.k * plane_taps(g); /* of a pair, unless it is one of sets */
    cbn_parallel_for(g->groups * p.pairs, 1 + GRAIN / weights, 0, pairs_range, &p);
}
