/* SPDX-License-Identifier: BSD-3-Clause */
/* Running a Winograd convolution: block by block, rows of the input are brought into lanes and transformed (V),
 * multiplied with the transformed weights for each point (M, one slice of output channels at a time), transformed back
 * into rows of lanes (O) and stored as rows of y.
 *
 * With several threads either each takes blocks of its own, or, when there are too few of them, all work on one block:
 * first each transforms some input channels, then each takes slices. Neither changes the order of any sum. */
#include <string.h>

#include "base/cbn_alloc.h"
#include "cpu/cbn_cpu.h"
#include "ops/conv_winograd_priv.h"
#include "threads/cbn_parallel.h"

/* A block at work. */
typedef struct block {
    int64_t group, image;     /* image: only where depth is summed; else bands know their images */
    int64_t z0, z1;           /* output planes, where depth is summed */
    int64_t band0, bands;     /* numbers of its bands */
    int64_t first, end;       /* columns of tiles of its strip */
    int64_t band_tiles, tiles;
    int64_t ncols, piece_ncols; /* input columns of its strip, and what one piece needs of them */
    int32_t *col_in, *col_out;
    float *v;
    int64_t *ring; /* the input plane each slot of v holds */
} block;

/* A band: a row of tiles of one frame, which is an output plane of an image. */
typedef struct band {
    int64_t image, z; /* z: output plane */
    int64_t phase, row;
} band;

typedef struct run {
    const wino_geometry *g;
    const wino_blocking *b;
    const wino_state *s;
    const cbn_kernels *k;
    const cbn_conv_call *call;
    bool deep;                /* depth is summed */
    int64_t frame_bands;      /* bands of a frame */
    int64_t bands, blocks;    /* of a strip: of all frames, or of one where depth is summed */
    int64_t tiles;            /* most of a block in this call */
    int64_t segments;         /* pieces of depth, where it is summed */
    int64_t items;
    int64_t x_c, y_c;         /* elements of a channel */
    bool ahead;               /* the input lies beyond the L2 cache */
    int64_t slots, rows;      /* planes in v; rows in lanes kept at a time */
    int64_t v_b, v_piece, v_plane, v_xi, m_t, m_v, s_row, o_row;
    /* Scratch in floats: of a block, of a worker. */
    int64_t col_floats, ring_floats, v_floats, block_floats, s_floats, tmp_floats, m_floats, o_floats, worker_floats;
    float *workers_scratch, *blocks_scratch;
    block shared; /* the block all threads work on, and the output plane */
    int64_t shared_z;
} run;

/* ---- layout ---- */
static int64_t lines(int64_t floats) { return cbn_ceil_div(floats, 16) * 16; }
/* An odd number of cache lines, so that steps of this length meet all sets of a cache. */
static int64_t odd_lines(int64_t floats) { return (cbn_ceil_div(floats, 16) | 1) * 16; }

/* With at most `block_bands` bands a block. */
static void layout_make(run *u, int64_t n, int threads, int64_t block_bands) {
    const wino_geometry *g = u->g;
    const wino_blocking *b = u->b;
    const int64_t lanes = g->lanes, points = g->h.n * g->w.n;
    u->deep = g->z.k > 1;
    u->frame_bands = 0;
    for (int f = 0; f < g->h.phases; f++) u->frame_bands += cbn_wino_phase_tiles(&g->h, f);
    u->bands = u->deep ? u->frame_bands : u->frame_bands * n * g->z.out;
    const int64_t per_block = CBN_MIN(block_bands, u->bands);
    u->blocks = cbn_even_parts(g->groups * b->strips * (u->deep ? n : 1), cbn_ceil_div(u->bands, per_block), u->bands, threads);
    u->tiles = cbn_ceil_div(u->bands, u->blocks) * b->strip_tiles;
    u->items = g->groups * b->strips * u->blocks;
    u->segments = 1;
    if (u->deep) {
        u->items *= n;
        /* A segment begins with planes its neighbour has transformed, too. */
        while (threads > 1 && u->items * u->segments < 2 * threads && g->z.out / (2 * u->segments) >= 2 * g->z.k)
            u->segments *= 2;
        u->items *= u->segments;
    }
    u->x_c = g->z.in * g->h.in * g->w.in;
    u->y_c = g->z.out * g->h.out * g->w.out;
    u->ahead = g->groups * g->icg * u->x_c * (int64_t)sizeof(float) > (int64_t)cbn_cpu_cache_sizes().l2;
    u->slots = u->deep ? CBN_MIN((g->z.k - 1) * g->z.dil + 1, g->z.in) : 1;
    u->rows = cbn_wino_rows(&g->h);

    u->v_b = odd_lines(u->tiles * lanes);
    u->v_piece = g->icp / lanes * u->v_b;
    u->v_plane = u->v_piece * g->h.npieces * g->w.npieces;
    u->v_xi = odd_lines(u->v_plane * u->slots);
    u->m_t = odd_lines(points * lanes);
    u->m_v = u->tiles * u->m_t;
    const int64_t strip_tiles = cbn_ceil_div(g->w.tiles, b->strips);
    u->s_row = odd_lines(cbn_wino_columns(&g->w, strip_tiles) * lanes);
    u->o_row = odd_lines(strip_tiles * g->w.m * g->w.steps * lanes);

    u->col_floats = lines(b->strip_tiles);
    u->ring_floats = lines(2 * u->slots);
    u->v_floats = points * u->v_xi;
    u->block_floats = 2 * u->col_floats + u->ring_floats + u->v_floats;
    u->s_floats = (u->rows + 1) * u->s_row;
    u->tmp_floats = g->h.n * u->s_row;
    u->m_floats = CBN_MIN(b->slice, g->vectors) * u->m_v;
    u->o_floats = g->h.m * u->o_row;
    u->worker_floats = u->s_floats + u->tmp_floats + u->m_floats + u->o_floats;
}

/* Whether all threads work on one block at a time. */
static bool run_shared(const run *u, int threads) {
    return threads > 1 && u->items < 2 * threads && u->items % threads != 0 &&
           (u->b->slices > 1 || u->g->icp > u->g->lanes);
}

static int64_t scratch_floats(const run *u, int threads) {
    const int64_t blocks = run_shared(u, threads) ? 1 : threads;
    return blocks * u->block_floats + threads * u->worker_floats;
}

static bool scratch_fits(const run *u, int threads) {
    return scratch_floats(u, threads) * (int64_t)sizeof(float) <= cbn_wino_allowed(u->g);
}

/* Blocks get fewer bands where the threads' scratch would exceed what a layer may take, and where one band is too much, too,
 * there are fewer threads (one fits: `supports` asked). Returns how many. */
static int run_layout(run *u, int64_t n, int threads) {
    for (;; threads--) {
        int64_t block_bands = CBN_MAX(u->b->tiles / u->b->strip_tiles, 1);
        layout_make(u, n, threads, block_bands);
        while (block_bands > 1 && !scratch_fits(u, threads))
            layout_make(u, n, threads, block_bands = CBN_MAX(CBN_MIN(block_bands, u->bands) / 2, 1));
        if (threads == 1 || scratch_fits(u, threads)) return threads;
    }
}

static float *worker_scratch(const run *u, int worker) { return u->workers_scratch + worker * u->worker_floats; }

/* ---- blocks and bands ---- */
static void block_make(const run *u, int64_t item, float *scratch, block *k) {
    const wino_geometry *g = u->g;
    const wino_blocking *b = u->b;
    const int64_t i = item % u->blocks;
    item /= u->blocks;
    const int64_t strip = item % b->strips;
    item /= b->strips;
    const int64_t segment = item % u->segments;
    item /= u->segments;
    *k = (block){.group = item % g->groups, .image = item / g->groups};
    k->z0 = u->deep ? cbn_wino_cut(g->z.out, u->segments, segment) : 0;
    k->z1 = u->deep ? cbn_wino_cut(g->z.out, u->segments, segment + 1) : 1;
    k->band0 = cbn_wino_cut(u->bands, u->blocks, i);
    k->bands = cbn_wino_cut(u->bands, u->blocks, i + 1) - k->band0;
    k->first = cbn_wino_cut(g->w.tiles, b->strips, strip);
    k->end = cbn_wino_cut(g->w.tiles, b->strips, strip + 1);
    k->ncols = cbn_wino_columns(&g->w, k->end - k->first);
    k->piece_ncols = k->ncols - cbn_wino_reach(&g->w) + (g->w.n - 1) * g->w.in_step;
    k->col_in = (int32_t *)(void *)scratch;
    k->col_out = (int32_t *)(void *)(scratch += u->col_floats);
    k->ring = (int64_t *)(void *)(scratch += u->col_floats);
    k->v = scratch + u->ring_floats;
    k->band_tiles = cbn_wino_band_tiles(&g->w, k->first, k->end, k->col_in, k->col_out);
    k->tiles = k->bands * k->band_tiles;
    for (int64_t p = 0; p < u->slots; p++) k->ring[p] = -1;
}

static band band_at(const run *u, const block *k, int64_t i, int64_t z) {
    const wino_geometry *g = u->g;
    const int64_t number = k->band0 + i, frame = number / u->frame_bands;
    band out = {.image = k->image, .z = z};
    if (!u->deep) {
        out.image = frame / g->z.out;
        out.z = frame % g->z.out;
    }
    int64_t rest = number % u->frame_bands;
    while (rest >= cbn_wino_phase_tiles(&g->h, out.phase)) rest -= cbn_wino_phase_tiles(&g->h, out.phase++);
    out.row = rest;
    return out;
}

/* ---- inputs ---- */
/* Asks for a row of the next vector of channels: the hardware does not foresee the jump. */
static void row_prefetch(const run *u, const float *x, int64_t x0, int64_t n) {
    const wino_geometry *g = u->g;
    const int64_t first = CBN_MAX(x0, 0), end = CBN_MIN(x0 + n, g->w.in);
    for (int64_t l = 0; l < g->lanes; l++, x += u->x_c)
        for (int64_t i = first; i < end; i += CBN_CACHE_LINE / (int64_t)sizeof(float)) __builtin_prefetch(x + i, 0, 2);
}

/* One vector of input channels of the bands of a block, plane `plane` (its own one where depth is not summed), to v. */
static void channels_in(const run *u, const block *k, int64_t plane, int64_t slot, int64_t c, float *scratch) {
    enum { NONE = -1 };
    const wino_geometry *g = u->g;
    const wino_axis *h = &g->h, *w = &g->w;
    const int64_t lanes = g->lanes, unit = cbn_wino_row_step(h);
    const int nch = (int)CBN_MIN(g->icg - c * lanes, lanes);
    float *rows = scratch, *zeros = scratch + u->rows * u->s_row;
    int64_t held[64]; /* which row of which frame lies in each slot of `rows` */
    assert(u->rows <= 64);
    for (int64_t i = 0; i < u->rows; i++) held[i] = NONE;
    cbn_wino_in_args a = {.nh = h->n,
                          .nw = w->n,
                          .ncols = k->ncols,
                          .ntiles = k->band_tiles,
                          .col = k->col_in,
                          .step = w->in_step,
                          .tmp = scratch + u->s_floats,
                          .v_xi = u->v_xi};
    const int64_t x0 = w->in0 + k->first * w->in_tile;
    float *v = k->v + slot * u->v_plane + c * u->v_b;
    for (int64_t i = 0; i < k->bands; i++) {
        const band at = band_at(u, k, i, 0);
        const int64_t z = u->deep ? plane : at.z * g->z.stride - g->z.pad;
        const int64_t channel = (at.image * g->groups + k->group) * g->icg + c * lanes;
        const float *x = (const float *)u->call->x + channel * u->x_c + z * h->in * w->in;
        const int64_t y0 = at.phase + at.row * h->in_tile;
        for (int qh = 0; qh < h->npieces; qh++) {
            for (int r = 0; r < h->n; r++) {
                const int64_t rel = y0 + h->piece[qh].in + r * h->in_step, y = h->in0 + rel;
                a.row[r] = zeros;
                if (y < 0 || y >= h->in || z < 0 || z >= g->z.in) continue;
                const int64_t place = rel / unit % u->rows, key = (at.image * g->z.in + z) * h->in + y;
                float *row = rows + place * u->s_row;
                if (held[place] != key) {
                    u->k->lanes_gather(row, x + y * w->in, u->x_c, nch, x0, k->ncols, w->in);
                    if (u->ahead && c + 1 < g->icp / lanes)
                        row_prefetch(u, x + lanes * u->x_c + y * w->in, x0, k->ncols);
                }
                held[place] = key;
                a.row[r] = row;
            }
            for (int qw = 0; qw < w->npieces; qw++) {
                /* Columns of a piece begin further right. The first one transforms the columns of all. */
                cbn_wino_in_args piece = a;
                const int64_t right = w->piece[qw].in * lanes;
                piece.v = v + (qh * w->npieces + qw) * u->v_piece + i * k->band_tiles * lanes;
                if (h->n == 1) {
                    piece.row[0] += right;
                    piece.ncols = k->piece_ncols;
                } else {
                    piece.tmp += right * h->n;
                    if (qw > 0) piece.ncols = 0;
                }
                u->k->wino_in(&piece);
            }
        }
    }
}

/* ---- sums ---- */
/* The sums of a slice for output plane z. */
static void slice_multiply(const run *u, const block *k, int64_t slice, int64_t z, float *sums) {
    const wino_geometry *g = u->g;
    const wino_blocking *b = u->b;
    const int64_t lanes = g->lanes, vectors = CBN_MIN(b->slice, g->vectors - slice * b->slice);
    const float *weights = u->s->u + k->group * u->s->group_floats + slice * u->s->slice_floats;
    cbn_wino_gemm_args a = {.v_b = u->v_b, .chunk = b->chunk, .m_t = u->m_t, .m_v = u->m_v};
    for (int i = 0; i < g->h.n; i++) {
        for (int j = 0; j < g->w.n; j++) {
            const int high = cbn_wino_rows_at(&g->h, i), wide = cbn_wino_rows_at(&g->w, j);
            for (int64_t at = 0; at < vectors; at += 2) {
                const int nv = (int)CBN_MIN(vectors - at, 2);
                a.m = sums + at * u->m_v + (i * g->w.n + j) * lanes;
                a.add = false;
                for (int64_t t = 0; t < g->z.k; t++) {
                    const int64_t plane = z * g->z.stride - g->z.pad + t * g->z.dil;
                    const float *from = weights + t * high * wide * g->icp * nv * lanes;
                    if (u->deep && (plane < 0 || plane >= g->z.in)) continue;
                    const int64_t slot = u->deep ? plane % u->slots : 0;
                    const float *v = k->v + (i * g->w.n + j) * u->v_xi + slot * u->v_plane;
                    for (int q = 0; q < high * wide; q++, from += g->icp * nv * lanes) {
                        const float *piece = v + (q / wide * g->w.npieces + q % wide) * u->v_piece;
                        for (int64_t c = 0; c < g->icp; c += b->k_part, a.add = true) {
                            a.nk = CBN_MIN(b->k_part, g->icp - c);
                            a.v = piece + c / lanes * u->v_b;
                            a.u = from + c * nv * lanes;
                            u->k->wino_gemm((int)k->tiles, nv, &a);
                        }
                    }
                }
                /* No plane of the input is met. */
                for (int64_t t = 0; !a.add && t < k->tiles; t++)
                    for (int v = 0; v < nv; v++)
                        memset(a.m + v * u->m_v + t * u->m_t, 0, (size_t)lanes * sizeof(float));
                weights += g->z.k * high * wide * g->icp * nv * lanes;
            }
        }
    }
}

/* ---- outputs ---- */
static void band_store(const run *u, const block *k, const band *at, int set_h, int64_t oc, const float *o) {
    const wino_geometry *g = u->g;
    const wino_axis *h = &g->h, *w = &g->w;
    const int64_t begin = w->out0 + k->first * w->m * w->steps, c0 = CBN_MAX(begin, 0),
                  c1 = CBN_MIN(begin + (k->end - k->first) * w->m * w->steps, w->out);
    if (c0 >= c1) return;
    const int nch = (int)CBN_MIN(g->ocg - oc, g->lanes);
    const int64_t channel = k->group * g->ocg + oc;
    bool nonfinite = false;
    cbn_epilogue_args e = {.bias = (const float *)u->call->bias + channel, .lo = u->call->lo, .hi = u->call->hi};
    for (int64_t i = 0; i < h->m; i++) {
        const int64_t y = h->out0 + at->phase + set_h + (at->row * h->m + i) * h->steps;
        if (y < 0 || y >= h->out) continue;
        const int64_t to = (at->image * g->groups * g->ocg + channel) * u->y_c + (at->z * h->out + y) * w->out + c0;
        if (u->call->residual) e.residual = (const float *)u->call->residual + to;
        u->k->lanes_scatter((float *)u->call->y + to, u->y_c, nch, o + i * u->o_row + (c0 - begin) * g->lanes, c1 - c0,
                            &e, &nonfinite);
    }
    /* Another thread may set the same byte. */
    if (nonfinite && u->call->redo) __atomic_store_n(&u->call->redo[at->image], 1, __ATOMIC_RELAXED);
}

static void slice_out(const run *u, const block *k, int64_t slice, int64_t z, const float *sums, float *o) {
    const wino_geometry *g = u->g;
    const int64_t lanes = g->lanes, first = slice * u->b->slice, end = CBN_MIN(first + u->b->slice, g->vectors);
    cbn_wino_out_args a = {.nh = g->h.n,
                           .nw = g->w.n,
                           .mh = g->h.m,
                           .mw = g->w.m,
                           .m_t = u->m_t,
                           .ntiles = k->band_tiles,
                           .col = k->col_out,
                           .step = g->w.steps,
                           .o_row = u->o_row};
    for (int64_t v = first; v < end; v += g->sets) {
        for (int64_t i = 0; i < k->bands; i++) {
            const band at = band_at(u, k, i, z);
            for (int sh = 0; sh < g->h.sets; sh++) {
                for (int sw = 0; sw < g->w.sets; sw++) {
                    a.m = sums + (v - first + sh * g->w.sets + sw) * u->m_v + i * k->band_tiles * u->m_t;
                    a.o = o + sw * lanes;
                    u->k->wino_out(&a);
                }
                band_store(u, k, &at, sh, v / g->sets * lanes, o);
            }
        }
    }
}

/* ---- the loops ---- */
/* Planes of the input that output plane z needs and v does not hold yet are transformed: channels c0 to c1. */
static void planes_in(const run *u, const block *k, int64_t z, int64_t c0, int64_t c1, float *scratch) {
    const wino_geometry *g = u->g;
    memset(scratch + u->rows * u->s_row, 0, (size_t)u->s_row * sizeof(float));
    for (int64_t t = 0; t < g->z.k; t++) {
        const int64_t plane = z * g->z.stride - g->z.pad + t * g->z.dil, slot = u->deep ? plane % u->slots : 0;
        if (u->deep && (plane < 0 || plane >= g->z.in || k->ring[slot] == plane)) continue;
        for (int64_t c = c0; c < c1; c++) channels_in(u, k, plane, slot, c, scratch);
    }
}

static void planes_note(const run *u, const block *k, int64_t z) {
    const wino_geometry *g = u->g;
    for (int64_t t = 0; u->deep && t < g->z.k; t++) {
        const int64_t plane = z * g->z.stride - g->z.pad + t * g->z.dil;
        if (plane >= 0 && plane < g->z.in) k->ring[plane % u->slots] = plane;
    }
}

static void slice_run(const run *u, const block *k, int64_t slice, int64_t z, float *scratch) {
    float *sums = scratch + u->s_floats + u->tmp_floats;
    slice_multiply(u, k, slice, z, sums);
    slice_out(u, k, slice, z, sums, sums + u->m_floats);
}

/* Each thread on blocks of its own. */
static void blocks_range(void *arg, int64_t begin, int64_t end, int worker) {
    const run *u = arg;
    float *scratch = worker_scratch(u, worker);
    for (int64_t item = begin; item < end; item++) {
        block k;
        block_make(u, item, u->blocks_scratch + worker * u->block_floats, &k);
        for (int64_t z = k.z0; z < k.z1; z++) {
            planes_in(u, &k, z, 0, u->g->icp / u->g->lanes, scratch);
            planes_note(u, &k, z);
            for (int64_t i = 0; i < u->b->slices; i++) slice_run(u, &k, i, z, scratch);
        }
    }
}

/* All threads on one block. */
static void inputs_range(void *arg, int64_t begin, int64_t end, int worker) {
    const run *u = arg;
    planes_in(u, &u->shared, u->shared_z, begin, end, worker_scratch(u, worker));
}

static void slices_range(void *arg, int64_t begin, int64_t end, int worker) {
    const run *u = arg;
    for (int64_t i = begin; i < end; i++) slice_run(u, &u->shared, i, u->shared_z, worker_scratch(u, worker));
}

static void blocks_together(run *u, int threads) {
    block *k = &u->shared;
    for (int64_t item = 0; item < u->items; item++) {
        block_make(u, item, u->blocks_scratch, k);
        for (u->shared_z = k->z0; u->shared_z < k->z1; u->shared_z++) {
            cbn_parallel_for(u->g->icp / u->g->lanes, 1, threads, inputs_range, u);
            planes_note(u, k, u->shared_z);
            cbn_parallel_for(u->b->slices, 1, threads, slices_range, u);
        }
    }
}

bool cbn_wino_fits(const wino_geometry *g, const wino_blocking *b) {
    run u = {.g = g, .b = b};
    (void)run_layout(&u, 1, 1);
    return scratch_fits(&u, 1);
}

size_t cbn_wino_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n,
                          int threads) {
    const wino_state *s = state;
    run u = {.g = &s->g, .b = &s->b, .s = s, .k = ctx->kernels};
    (void)d;
    if (n == 0) return 0;
    threads = run_layout(&u, n, CBN_MAX(threads, 1));
    return (size_t)scratch_floats(&u, threads) * sizeof(float);
}

cbn_status cbn_wino_run(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                        const cbn_conv_call *call, cbn_error *err) {
    const wino_state *s = state;
    run u = {.g = &s->g, .b = &s->b, .s = s, .k = ctx->kernels, .call = call};
    (void)d;
    if (call->n == 0) return CBN_OK;
    const int threads = run_layout(&u, call->n, call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL));
    const size_t bytes = (size_t)scratch_floats(&u, threads) * sizeof(float);
    float *scratch = cbn_scratch_get(bytes);
    if (!scratch) return cbn_fail_memory(err, "scratch of a convolution", bytes);
    u.workers_scratch = scratch;
    u.blocks_scratch = scratch + threads * u.worker_floats;
    if (run_shared(&u, threads))
        blocks_together(&u, threads);
    else
        cbn_parallel_for(u.items, 1, threads, blocks_range, &u);
    cbn_scratch_put(scratch);
    return CBN_OK;
}
