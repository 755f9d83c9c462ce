/* SPDX-License-Identifier: BSD-3-Clause */
/* Linear layers: rows of the batch times the weights (kernel linear), output channels in vector lanes.
 *
 * A few rows are bound by memory: the weights pass once, several blocks of output channels at a time. Of many rows, a
 * piece of a block's weights stays in L2 while all rows of a job use it; the piece after it is asked for meanwhile.
 * For a single call of few rows they are not packed at all (kernel linear_raw): reading them once is all there is to do.
 *
 * The sum of an output is taken over channels in order, each one fused multiply-add, whatever the number of rows. */
#include <stdio.h>
#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "ops/conv_cost.h"
#include "ops/conv_pack.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    PIECE_BYTES = 64 * 1024, /* weights of a piece */
    JOB_TILES = 8,           /* tiles of CBN_LINEAR_ROWS rows that use a piece */
    STREAM_BLOCKS = 4,       /* blocks of an item of a few rows */
    FEW_ROWS = 3,
    RAW_ROWS = 2 * CBN_LINEAR_RAW_ROWS, /* rows that do not earn back the packing for one call */
    THREAD_WORK = 400 * 1000 /* multiply-adds worth a thread */
};

#define PACKED_WEIGHTS "the packed weights of a linear layer"

typedef struct linear_state {
    int64_t ic, oc, width, blocks;
    size_t w_bytes;
    float *w;         /* [block][channel][width], zeros beyond the last channel */
    const float *raw; /* NULL, or what is there instead for a single call: the caller's [channel][input] */
} linear_state;

static bool linear_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    (void)ctx;
    *why_not = NULL;
    if (d->dtype != CBN_F32)
        *why_not = "dtype is not float32";
    else if (d->nd != 0 || d->g != 1)
        *why_not = "not a linear layer";
    return !*why_not;
}

static double linear_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const int64_t lanes = ctx->kernels->lanes;
    const double filled = (double)d->oc / (double)(cbn_ceil_div(d->oc, lanes) * lanes);
    return cbn_cost_fma(ctx->kernels, cbn_cost_real_fmas(d), 0.92 * filled);
}

static void linear_destroy(void *state) {
    linear_state *s = state;
    if (!s) return;
    cbn_free(s->w);
    cbn_free(s);
}

static void weights_pack(const linear_state *s, float *to, const float *w) {
    cbn_pack_blocks(to, s->width, w, 1, s->oc, s->ic);
}

static cbn_status linear_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                                 cbn_error *err) {
    linear_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a linear layer", sizeof *s);
    s->ic = d->ic;
    s->oc = d->oc;
    s->width = 2 * ctx->kernels->lanes;
    s->blocks = cbn_ceil_div(s->oc, s->width);
    int64_t n;
    const bool fits = cbn_mul_ok(s->blocks * s->width, s->ic, &n) && cbn_mul_ok(n, sizeof(float), &n);
    s->w_bytes = fits ? (size_t)n : SIZE_MAX;
    if (fits && ctx->one_shot) {
        s->raw = w;
        *state = s;
        return CBN_OK;
    }
    s->w = fits ? cbn_alloc(s->w_bytes) : NULL;
    if (!s->w) {
        const size_t bytes = s->w_bytes;
        linear_destroy(s);
        return cbn_fail_memory(err, PACKED_WEIGHTS, bytes);
    }
    weights_pack(s, s->w, w);
    *state = s;
    return CBN_OK;
}

typedef struct linear_run {
    const cbn_kernels *k;
    const linear_state *s;
    const cbn_conv_call *call;
    const float *w;              /* packed, unless they are raw */
    int64_t tiles, jobs;         /* rows are spread evenly over tiles, these over jobs */
    int64_t per_item, items;     /* blocks of an item, items of a job */
    int64_t pieces;              /* of the sum */
} linear_run;

static int64_t tile_row(const linear_run *u, int64_t tile) { return u->call->n * tile / u->tiles; }

/* All rows of a job for the blocks of an item. */
static void item_run(const linear_run *u, int64_t job, int64_t item) {
    const linear_state *s = u->s;
    const cbn_conv_call *call = u->call;
    const int64_t t0 = u->tiles * job / u->jobs, t1 = u->tiles * (job + 1) / u->jobs;
    const int64_t c0 = item * u->per_item * s->width;
    cbn_linear_args a = {.x_p = s->ic, .w_b = s->ic * s->width, .y_p = s->oc};
    a.oc_valid = CBN_MIN(u->per_item * s->width, s->oc - c0);
    a.prefetch_step = cbn_ceil_div(s->width, t1 - t0);
    for (int64_t piece = 0; piece < u->pieces; piece++) {
        const int64_t i0 = s->ic * piece / u->pieces, i1 = s->ic * (piece + 1) / u->pieces;
        a.ic = i1 - i0;
        a.first = piece == 0;
        a.last = piece + 1 == u->pieces;
        a.w = u->w + (c0 * s->ic) + i0 * s->width;
        /* What follows in memory is the next piece or the next block. */
        const bool ahead = !a.last || item + 1 < u->items;
        for (int64_t t = t0; t < t1; t++) {
            const int64_t row = tile_row(u, t), at = row * s->oc + c0;
            a.x = (const float *)call->x + row * s->ic + i0;
            a.y = (float *)call->y + at;
            a.prefetch = ahead ? a.w + a.ic * s->width + (t - t0) * a.prefetch_step * a.ic : NULL;
            a.epi = (cbn_epilogue_args){(const float *)call->bias + c0,
                                        call->residual ? (const float *)call->residual + at : NULL, call->lo,
                                        call->hi};
            u->k->linear((int)(tile_row(u, t + 1) - row), &a);
        }
    }
}

static void linear_range(void *arg, int64_t begin, int64_t end, int worker) {
    const linear_run *u = arg;
    (void)worker;
    for (int64_t i = begin; i < end; i++) item_run(u, i / u->items, i % u->items);
}

/* Items are pairs of a tile of rows and some channels. */
static void raw_range(void *arg, int64_t begin, int64_t end, int worker) {
    const linear_run *u = arg;
    const linear_state *s = u->s;
    const cbn_conv_call *call = u->call;
    (void)worker;
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = tile_row(u, i / u->items), c0 = i % u->items * s->width, at = row * s->oc + c0;
        const cbn_linear_args a = {
            .x = (const float *)call->x + row * s->ic, .x_p = s->ic, .w = s->raw + c0 * s->ic, .w_b = s->ic,
            .ic = s->ic, .y = (float *)call->y + at, .y_p = s->oc, .oc_valid = CBN_MIN(s->width, s->oc - c0),
            .first = true, .last = true,
            .epi = {(const float *)call->bias + c0, call->residual ? (const float *)call->residual + at : NULL,
                    call->lo, call->hi}};
        u->k->linear_raw((int)(tile_row(u, i / u->items + 1) - row), &a);
    }
}

static void run_raw(linear_run *u) {
    const linear_state *s = u->s;
    u->tiles = cbn_ceil_div(u->call->n, CBN_LINEAR_RAW_ROWS);
    u->items = s->blocks;
    const int64_t work = s->ic * s->width * cbn_ceil_div(u->call->n, u->tiles);
    cbn_parallel_for(u->tiles * u->items, CBN_MAX(THREAD_WORK / CBN_MAX(work, 1), 1), u->call->max_threads, raw_range, u);
}

static cbn_status linear_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                            const cbn_conv_call *call, cbn_error *err) {
    const linear_state *s = state;
    (void)d;
    if (call->n == 0) return CBN_OK;
    linear_run u = {.k = ctx->kernels, .s = s, .call = call, .w = s->w};
    if (s->raw && call->n <= RAW_ROWS) {
        run_raw(&u);
        return CBN_OK;
    }
    float *packed = NULL;
    if (s->raw) {
        packed = cbn_scratch_get(s->w_bytes);
        if (!packed) return cbn_fail_memory(err, PACKED_WEIGHTS, s->w_bytes);
        weights_pack(s, packed, s->raw);
        u.w = packed;
    }
    u.tiles = cbn_ceil_div(call->n, CBN_LINEAR_ROWS);
    u.jobs = cbn_ceil_div(u.tiles, JOB_TILES);
    u.per_item = call->n <= FEW_ROWS ? STREAM_BLOCKS : 1;
    u.items = cbn_ceil_div(s->blocks, u.per_item);
    const int64_t fit = PIECE_BYTES / (s->width * (int64_t)sizeof(float));
    u.pieces = u.tiles == 1 ? 1 : cbn_ceil_div(s->ic, fit);
    const int64_t work = s->ic * s->width * u.per_item * cbn_ceil_div(call->n, u.jobs);
    cbn_parallel_for(u.jobs * u.items, CBN_MAX(THREAD_WORK / work, 1), call->max_threads, linear_range, &u);
    cbn_scratch_put(packed);
    return CBN_OK;
}

static size_t linear_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n,
                               int threads) {
    (void)d;
    (void)ctx;
    (void)threads;
    const linear_state *s = state;
    return s->raw && n > RAW_ROWS ? s->w_bytes : 0;
}

static void linear_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                            size_t size) {
    (void)d;
    (void)ctx;
    snprintf(buf, size, "%d rows x %lld channels", CBN_LINEAR_ROWS, (long long)((const linear_state *)state)->width);
}

const cbn_conv_impl cbn_conv_linear = {
    .name = "linear",
    .supports = linear_supports,
    .cost = linear_cost,
    .prepare = linear_prepare,
    .run = linear_go,
    .destroy = linear_destroy,
    .workspace_bytes = linear_workspace,
    .describe = linear_describe,
    .fused_epilogue = true,
};
