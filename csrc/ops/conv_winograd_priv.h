/* SPDX-License-Identifier: BSD-3-Clause */
/* What the files of the Winograd rows share: geometry (conv_winograd_axis.c), rows, cost and packing (conv_winograd.c),
 * running (conv_winograd_run.c). Nobody else includes this. */
#ifndef CBN_CONV_WINOGRAD_PRIV_H
#define CBN_CONV_WINOGRAD_PRIV_H
#include "ops/conv_plan.h"
#include "ops/wino_matrix.h"

enum { CBN_WINO_PIECES = 6, CBN_WINO_SETS = 8, CBN_WINO_DEPTH = 7 };

/* One axis of the tiles. Its convolution is the sum of `npieces` short ones, each of at most r taps at distance 1 on a
 * grid of every in_step-th input:
 *   input b of piece q, tile t, phase f:   in0 + f + t*in_tile + piece[q].in + b*in_step    (outside the image: zero)
 *   output a of tile t, phase or set u:    out0 + u + (t*m + a)*steps
 * A dilated axis has `steps` phases: interleaved convolutions of the same weights (tiles of their own). A transposed
 * one has `steps` sets of weights, which all see the same tiles. Else steps is 1. Tap b of piece q and set u is kernel
 * index piece[q].k0 + u + b*k_step, none if that is not in 0..k-1. */
typedef struct wino_piece {
    int64_t in, k0;
    int ntaps;
} wino_piece;

typedef struct wino_axis {
    int n, m, r;
    int npieces, nfull; /* the first nfull have r taps; the others do not reach the point at infinity */
    wino_piece piece[CBN_WINO_PIECES];
    int64_t in, out, k;
    int64_t in0, in_step, in_tile;
    int64_t out0, steps, k_step;
    int phases, sets; /* one of them is `steps`, the other 1 */
    int64_t tiles;    /* of the largest phase */
} wino_axis;

/* Depth is summed plane by plane: plane o*stride - pad + t*dil of the input for tap t. */
typedef struct wino_depth {
    int64_t in, out, k, stride, pad, dil;
} wino_depth;

typedef struct wino_geometry {
    wino_axis h, w;
    wino_depth z;
    int64_t groups, icg, ocg, icp; /* icp: icg rounded up to vectors */
    int lanes, sets;               /* sets of both axes */
    int64_t vectors;               /* of output channels of one group, times sets */
    int64_t pairs;                 /* point, piece combinations that have weights: sum over points, one depth tap */
} wino_geometry;

/* How the work is cut. A band is a row of tiles, a strip some columns of tiles (of all phases), a block some bands of
 * one strip, a slice the output channels whose sums are held at a time. */
typedef struct wino_blocking {
    int64_t strips;
    int64_t strip_tiles; /* most tiles of a band of a strip */
    int64_t tiles;       /* most tiles of a block */
    int64_t slice;       /* vectors of a slice, a multiple of 2 and of the sets */
    int64_t slices;
    int64_t k_part; /* channels of one wino_gemm call */
    int64_t chunk;  /* of these to sum in one go */
} wino_blocking;

typedef struct wino_state {
    wino_geometry g;
    wino_blocking b;
    int64_t slice_floats, group_floats; /* of u */
    float *u; /* [group][slice][point][pair of vectors][depth tap][piece][channel][nv*lanes] */
} wino_state;

/* Points nh x nw. False: *why_not is a phrase for explain(). */
bool cbn_wino_geometry_make(const cbn_conv_desc *d, int lanes, int nh, int nw, wino_geometry *g, const char **why_not);
/* Channels to sum in one go: as many as keep the expected rms error within that of the precision, 0 if none do. */
int64_t cbn_wino_chunk(const wino_geometry *g, cbn_precision precision);
void cbn_wino_blocking_make(const wino_geometry *g, const cbn_conv_context *ctx, wino_blocking *b);
/* Tiles of a band whose columns of tiles are first .. end-1; col_in, col_out (may be NULL) get their columns relative
 * to those of tile `first` of phase 0. */
int64_t cbn_wino_band_tiles(const wino_axis *w, int64_t first, int64_t end, int32_t *col_in, int32_t *col_out);

/* Fills s->u. */
void cbn_wino_pack(const cbn_conv_desc *d, const cbn_conv_context *ctx, const wino_state *s, const float *w);
cbn_status cbn_wino_run(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                        const cbn_conv_call *call, cbn_error *err);
size_t cbn_wino_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n,
                          int threads);
/* Whether one thread's scratch stays within cbn_wino_allowed. */
bool cbn_wino_fits(const wino_geometry *g, const wino_blocking *b);
/* Bytes of scratch a layer may take: 8 MB, or a quarter of input, output and weights of one image. */
CBN_INLINE int64_t cbn_wino_allowed(const wino_geometry *g) {
    const double x = (double)(g->icg * g->z.in) * (double)(g->h.in * g->w.in),
                 y = (double)(g->ocg * g->z.out) * (double)(g->h.out * g->w.out),
                 w = (double)(g->icg * g->ocg) * (double)(g->z.k * g->h.k * g->w.k);
    return CBN_MAX(INT64_C(8) << 20, (int64_t)((double)g->groups * (x + y + w)));
}

/* Pieces that have weights at point (i, j), of one depth tap. */
CBN_INLINE int cbn_wino_rows_at(const wino_axis *a, int i) { return i == a->n - 1 ? a->nfull : a->npieces; }
CBN_INLINE int cbn_wino_pieces_at(const wino_geometry *g, int i, int j) {
    return cbn_wino_rows_at(&g->h, i) * cbn_wino_rows_at(&g->w, j);
}
CBN_INLINE int64_t cbn_wino_phase_tiles(const wino_axis *a, int64_t phase) {
    return a->sets > 1 ? a->tiles : cbn_ceil_div(cbn_ceil_div(a->out - phase, a->steps), a->m);
}
/* Inputs a tile reaches beyond its first. */
CBN_INLINE int64_t cbn_wino_reach(const wino_axis *a) {
    int64_t reach = 0;
    for (int q = 0; q < a->npieces; q++) reach = CBN_MAX(reach, a->piece[q].in + (a->n - 1) * a->in_step);
    return reach;
}
/* Rows of the input that bands of one phase may read: every how many, and how many of these a band spans. */
CBN_INLINE int64_t cbn_wino_row_step(const wino_axis *h) { return h->phases > 1 ? h->in_step : 1; }
CBN_INLINE int64_t cbn_wino_rows(const wino_axis *h) { return cbn_wino_reach(h) / cbn_wino_row_step(h) + 1; }
/* Columns of the input that `ntiles` columns of tiles read. */
CBN_INLINE int64_t cbn_wino_columns(const wino_axis *w, int64_t ntiles) {
    return w->phases + (ntiles - 1) * w->in_tile + cbn_wino_reach(w);
}
/* Part i of n equal parts of 0..total begins here. */
CBN_INLINE int64_t cbn_wino_cut(int64_t total, int64_t n, int64_t i) { return total / n * i + CBN_MIN(i, total % n); }
#endif
