/* SPDX-License-Identifier: BSD-3-Clause */
/* Weights of a Winograd convolution: transformed in float64, rounded once, packed in the order of their use. */
#include "ops/conv_winograd_priv.h"
#include "threads/cbn_parallel.h"

enum { N = CBN_WINO_POINTS, LANES = 16 };

typedef struct pack {
    const cbn_conv_desc *d;
    const wino_state *s;
    const float *w;
    double gh[N][N], gw[N][N];
} pack;

/* What one call transforms: a vector of output channels, one input channel, one piece of a plane of the kernel. */
typedef struct kernel {
    int64_t group, vector, channel, plane;
    int qh, qw;
} kernel;

/* The taps of the piece, zeros where there are none. */
static void taps_read(const pack *p, const kernel *k, double tap[N][N][LANES]) {
    const wino_geometry *g = &p->s->g;
    const wino_axis *h = &g->h, *w = &g->w;
    const int64_t set = k->vector % g->sets, oc0 = k->vector / g->sets * g->lanes;
    const int64_t nch = CBN_MIN(g->ocg - oc0, g->lanes), plane = h->k * w->k, taps = g->z.k * plane;
    const int64_t oc_step = p->d->transposed ? taps : g->icg * taps, ic_step = p->d->transposed ? g->ocg * taps : taps;
    const float *from =
        p->w + k->group * g->ocg * g->icg * taps + oc0 * oc_step + k->channel * ic_step + k->plane * plane;
    const int64_t y0 = h->piece[k->qh].k0 + set / w->sets, x0 = w->piece[k->qw].k0 + set % w->sets;
    for (int a = 0; a < h->piece[k->qh].ntaps; a++) {
        const int64_t y = y0 + a * h->k_step;
        for (int b = 0; b < w->piece[k->qw].ntaps; b++) {
            const int64_t x = x0 + b * w->k_step;
            const bool there = k->channel < g->icg && y >= 0 && y < h->k && x >= 0 && x < w->k;
            for (int64_t l = 0; l < g->lanes; l++)
                tap[a][b][l] = there && l < nch ? from[l * oc_step + y * w->k + x] : 0.0;
        }
    }
}

/* Sum over n of factor[i]*x[i][l], for `lanes` l, in double. The loop over lanes is short and of known length. */
CBN_INLINE void combine(int lanes, const double *factor, int n, const double *x, int64_t step, double *out) {
    double sum[LANES];
    for (int l = 0; l < lanes; l++) sum[l] = factor[0] * x[l];
    for (int i = 1; i < n; i++)
        for (int l = 0; l < lanes; l++) sum[l] += factor[i] * x[i * step + l];
    for (int l = 0; l < lanes; l++) out[l] = sum[l];
}

/* out = Gh tap Gw^T */
CBN_INLINE void transform_lanes(int lanes, const pack *p, const kernel *k, double tap[N][N][LANES],
                                double out[N][N][LANES]) {
    const wino_axis *h = &p->s->g.h, *w = &p->s->g.w;
    const int high = h->piece[k->qh].ntaps, wide = w->piece[k->qw].ntaps;
    double column[N][LANES];
    for (int i = 0; i < h->n; i++) {
        for (int b = 0; b < wide; b++) combine(lanes, p->gh[i], high, tap[0][b], N * LANES, column[b]);
        for (int j = 0; j < w->n; j++) combine(lanes, p->gw[j], wide, column[0], LANES, out[i][j]);
    }
}

static void kernel_transform(const pack *p, const kernel *k, double out[N][N][LANES]) {
    double tap[N][N][LANES];
    taps_read(p, k, tap);
    switch (p->s->g.lanes) {
    case 4:
        transform_lanes(4, p, k, tap, out);
        break;
    case 8:
        transform_lanes(8, p, k, tap, out);
        break;
    default:
        transform_lanes(p->s->g.lanes, p, k, tap, out);
    }
}

/* Writes the values of vector v of a pair of nv. `to`: the weights of the slice; `at`: its vectors before the pair. */
static void kernel_store(const wino_geometry *g, const kernel *k, double value[N][N][LANES], int64_t vectors,
                         int64_t at, int64_t v, int64_t nv, float *to) {
    for (int i = 0; i < g->h.n; i++) {
        for (int j = 0; j < g->w.n; j++) {
            const int64_t high = cbn_wino_rows_at(&g->h, i), wide = cbn_wino_rows_at(&g->w, j);
            const int64_t vector = g->z.k * high * wide * g->icp * g->lanes; /* floats a vector has at this point */
            if (k->qh < high && k->qw < wide) {
                const int64_t piece = (k->plane * high + k->qh) * wide + k->qw;
                float *line = to + at * vector + ((piece * g->icp + k->channel) * nv + v) * g->lanes;
                for (int l = 0; l < g->lanes; l++) line[l] = (float)value[i][j][l];
            }
            to += vectors * vector;
        }
    }
}

/* Items are slices of all groups. */
static void slices_range(void *arg, int64_t begin, int64_t end, int worker) {
    const pack *p = arg;
    const wino_state *s = p->s;
    const wino_geometry *g = &s->g;
    double value[N][N][LANES];
    (void)worker;
    for (int64_t item = begin; item < end; item++) {
        const int64_t slice = item % s->b.slices, first = slice * s->b.slice;
        const int64_t vectors = CBN_MIN(s->b.slice, g->vectors - first);
        kernel k = {.group = item / s->b.slices};
        float *to = s->u + k.group * s->group_floats + slice * s->slice_floats;
        for (int64_t at = 0; at < vectors; at += 2) {
            const int64_t nv = CBN_MIN(vectors - at, 2);
            for (k.channel = 0; k.channel < g->icp; k.channel++)
                for (k.plane = 0; k.plane < g->z.k; k.plane++)
                    for (k.qh = 0; k.qh < g->h.npieces; k.qh++)
                        for (k.qw = 0; k.qw < g->w.npieces; k.qw++)
                            for (int64_t v = 0; v < nv; v++) {
                                k.vector = first + at + v;
                                kernel_transform(p, &k, value);
                                kernel_store(g, &k, value, vectors, at, v, nv, to);
                            }
        }
    }
}

void cbn_wino_pack(const cbn_conv_desc *d, const wino_state *s, const float *w) {
    pack p = {.d = d, .s = s, .w = w};
    assert(s->g.lanes <= LANES);
    cbn_wino_g(s->g.h.n, s->g.h.m, p.gh);
    cbn_wino_g(s->g.w.n, s->g.w.m, p.gw);
    cbn_parallel_for(s->g.groups * s->b.slices, 1, 0, slices_range, &p);
}
