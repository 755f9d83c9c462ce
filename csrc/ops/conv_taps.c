/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution of any geometry but transposed, pixels in vector lanes (kernel conv_tap). Good where output channels
 * would leave lanes of conv_direct empty or its sums are short: few channels a group, one-dimensional layers.
 *
 * A job is a box of output rows and columns of one group. The input it reads is first copied to one piece of memory,
 * [row][channel][phase][column], with its padding as zeros and the columns of a stride s sorted into s phases, so that
 * every tap of every geometry is an offset from the pixel, and any vectors of pixels can share a tile. Rows are copied
 * a step ahead of their use, which finds them in L1. Rows of a one-dimensional kernel that need neither padding nor
 * sorting are read where they are.
 *
 * The sum of an output element is taken over channels, then taps, as in conv_direct, with the same result: padded taps
 * add 0, and weights that are Inf or NaN are left to conv_direct. */
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "cpu/cbn_cpu.h"
#include "ops/conv_cost.h"
#include "ops/conv_taps_priv.h"
#include "threads/cbn_parallel.h"

enum {
    COPY_BYTES = 96 * 1024,        /* of a job: stays in L2, with as much of x and y passing by */
    COPY_BYTES_MOST = 1024 * 1024, /* where even a small box needs more */
    WEIGHT_BYTES = 192 * 1024,     /* of a group: stay in L2 */
    ROW_BYTES = 20 * 1024,         /* of what a row reads: stays in L1 with a block's weights */
    STEP_VECTORS = 96, /* the more the better (measured): what a block takes to start outweighs reading a row from L2 */
    PLACE_BYTES = 12 * 1024, /* of a step that reads x in place: y passes by as well */
    MIN_VECTORS = 3,         /* of a row in a box */
    THREAD_WORK = 500 * 1000,
    PARTS_PER_THREAD = 4
};

/* ---- preparing --------------------------------------------------------------------------------------------------- */

CBN_INLINE int64_t block_first(const taps_state *s, int64_t b) { return s->ocg * b / s->blocks; }

/* The number of columns of the phases that the taps of a row meet. */
static int64_t phases_count(const cbn_conv_desc *d) {
    int64_t n = 0;
    for (int64_t p = 0; p < d->stride[2]; p++) {
        for (int64_t c = 0; c < d->k[2]; c++) {
            if (c * d->dil[2] % d->stride[2] != p) continue;
            n++;
            break;
        }
    }
    return n;
}

/* Taps along the width only, at stride 1 and without padding: the image already is what the copy would be. Not if its
 * channels share few sets of L1, or are out of reach of an offset. */
static bool fits_in_place(const cbn_conv_desc *d, const cbn_kernels *k) {
    const int64_t plane = d->in[0] * d->in[1] * d->in[2], page = 4096 / (int64_t)sizeof(float);
    const int64_t past = plane % page, apart = CBN_MIN(past, page - past);
    if (d->k[0] * d->k[1] != 1 || d->stride[2] != 1 || d->out[2] < k->lanes) return false;
    if (d->pad_lo[0] != 0 || d->pad_lo[1] != 0 || d->pad_lo[2] != 0) return false;
    for (int a = 0; a < 3; a++)
        if ((d->out[a] - 1) * d->stride[a] + (d->k[a] - 1) * d->dil[a] >= d->in[a]) return false;
    return d->ic / d->g <= INT32_MAX / plane && (apart >= 64 || d->ic / d->g <= 4);
}

/* Fills what does not depend on weights. false: it would not fit. */
static bool boxes_make(taps_state *s, const cbn_conv_desc *d, const cbn_kernels *k) {
    const int64_t lanes = k->lanes;
    int64_t most, reach;
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->blocks = cbn_ceil_div(s->ocg, k->tap_mr);
    s->vectors = cbn_ceil_div(d->out[2], lanes);
    if (d->stride[2] > 1024 || d->k[2] > 1024) return false;
    s->phases = phases_count(d);
    /* floats of one vector's input: the smallest box needs MIN_VECTORS of them */
    if (!cbn_mul_ok(d->k[2] - 1, d->dil[2], &reach) || !cbn_mul_ok(d->k[1], d->dil[1], &most)) return false;
    reach = cbn_ceil_div(reach / d->stride[2], lanes) * lanes;
    if (most > COPY_BYTES_MOST || reach > COPY_BYTES_MOST || d->k[0] > 1024 || s->icg > 1 << 16) return false;
    const int64_t least = CBN_MIN(s->vectors, MIN_VECTORS), row1 = s->icg * s->phases * (least * lanes + reach);
    if (!cbn_mul_ok(d->k[0] * cbn_taps_reach(d, 1), row1, &most) ||
        most > COPY_BYTES_MOST / (int64_t)sizeof(float))
        return false;
    if (!cbn_mul_ok(s->icg * d->k[0] * d->k[1], d->k[2], &s->ntaps)) return false;

    /* All weights pass by each box: the more there are, the larger it should be. */
    const int64_t few = d->k[0] * cbn_taps_reach(d, CBN_MIN(d->out[1], 4));
    const int64_t limit = CBN_MAX(COPY_BYTES, CBN_MIN(s->ocg * s->ntaps * (int64_t)sizeof(float), WEIGHT_BYTES)) /
                          (int64_t)sizeof(float);
    /* Whole rows if a few of them fit, else columns are cut evenly. */
    int64_t fit = limit / (few * s->icg * s->phases);
    fit = CBN_MAX((fit - reach) / lanes, least);
    /* Full tiles: boxes end with one, but for the last. */
    const int64_t nv = cbn_tap_nv(k, k->tap_mr);
    if (fit < s->vectors && fit > nv) fit = fit / nv * nv;
    s->cols = cbn_ceil_div(s->vectors, CBN_MIN(fit, STEP_VECTORS));
    s->box_vectors = cbn_ceil_div(s->vectors, s->cols);
    if (s->cols > 1) s->box_vectors = CBN_MIN(cbn_ceil_div(s->box_vectors, nv) * nv, fit);
    s->cols = cbn_ceil_div(s->vectors, s->box_vectors);
    s->used_floats = s->phase_floats = s->box_vectors * lanes + reach;
    /* An odd number of vectors: rows of channels should not be a power of two apart in the cache. */
    if (s->phase_floats / lanes % 2 == 0) s->phase_floats += lanes;
    s->row_floats = s->icg * s->phases * s->phase_floats;
    fit = limit / (d->k[0] * s->row_floats) - cbn_taps_reach(d, 1);
    fit = CBN_MIN(CBN_MAX(fit / d->stride[1], 0) + 1, d->out[1]);
    s->rows = cbn_ceil_div(d->out[1], fit);
    s->box_rows = cbn_ceil_div(d->out[1], s->rows);
    s->plane_rows = cbn_taps_reach(d, s->box_rows);
    s->copy_bytes = (size_t)(d->k[0] * s->plane_rows * s->row_floats) * sizeof(float);

    s->step = CBN_MIN(s->box_rows * s->box_vectors, STEP_VECTORS);
    s->in_place = fits_in_place(d, k);
    if (s->in_place) {
        s->step = CBN_MIN(CBN_MAX(PLACE_BYTES / (s->icg * lanes * (int64_t)sizeof(float)), nv), s->step);
        s->copy_bytes = 0;
    }
    if (s->step > nv && s->step < s->box_rows * s->box_vectors) s->step = s->step / nv * nv;
    return true;
}

static bool taps_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    taps_state s = {0};
    if (d->dtype != CBN_F32) *why_not = "dtype is not float32";
    else if (d->nd == 0) *why_not = "linear has no pixels to put into lanes";
    else if (d->transposed) *why_not = "transposed";
    else if (d->k[0] * d->k[1] * d->k[2] == 1) *why_not = "kernel is 1";
    else if (!boxes_make(&s, d, ctx->kernels)) *why_not = "the input of a few pixels is too large to copy";
    else return true;
    return false;
}

/* Taps of depth that plane z of the output meets: [*a0, *a1). */
static void depth_taps(const cbn_conv_desc *d, int64_t z, int64_t *a0, int64_t *a1) {
    const int64_t z0 = z * d->stride[0] - d->pad_lo[0];
    *a0 = z0 < 0 ? CBN_MIN(cbn_ceil_div(-z0, d->dil[0]), d->k[0]) : 0;
    *a1 = d->in[0] > z0 ? CBN_MAX(CBN_MIN(cbn_ceil_div(d->in[0] - z0, d->dil[0]), d->k[0]), *a0) : *a0;
}

static double taps_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const cbn_kernels *k = ctx->kernels;
    taps_state s = {0};
    (void)boxes_make(&s, d, k);
    const double boxes = (double)(s.rows * s.cols), vectors = (double)(s.box_rows * s.vectors) / (double)s.cols;
    const double row_bytes = (double)(d->k[0] * d->k[1] * s.row_floats) * sizeof(float);
    double cycles = 0, taps = (double)s.ntaps;
    const int64_t planes = CBN_MIN(d->out[0], 1024); /* more have few at their borders */
    for (int64_t z = 0; z < planes; z++) {
        int64_t a0, a1;
        depth_taps(d, z, &a0, &a1);
        taps -= (double)s.ntaps * (double)(d->k[0] - (a1 - a0)) / (double)(d->k[0] * d->out[0]);
    }
    for (int64_t b = 0; b < s.blocks; b++) {
        const int mr = (int)(block_first(&s, b + 1) - block_first(&s, b)), nv = cbn_tap_nv(k, mr);
        /* A vector of pixels takes about a cycle to load. */
        const double share = row_bytes < ROW_BYTES ? 0.96 : s.in_place ? 0.92 : 0.95;
        const double tap = CBN_MAX(0.5 * mr * nv / share, 1.0 * nv + 0.5 * mr);
        cycles += CBN_MAX(vectors / nv, 1) * (tap * taps + 50.0 + 3.0 * mr * nv);
    }
    /* Copying the input; weights that do not stay in L2 come anew for each box. */
    const bool near = (size_t)(d->ic * d->in[0] * d->in[1] * d->in[2]) * sizeof(float) < cbn_cpu_cache_sizes().l2;
    const double rows = (double)(d->k[0] * s.plane_rows * s.icg * s.phases);
    cycles += rows * (10.0 + (near ? 1.5 : 7.0) * (double)s.phase_floats / k->lanes);
    const double w_bytes = (double)(s.ocg * s.ntaps) * sizeof(float);
    if (w_bytes > WEIGHT_BYTES) cycles += w_bytes / 10;
    cycles *= (double)(d->g * d->out[0]) * boxes;
    return ctx->one_shot ? cycles + w_bytes * (double)d->g / 2 : cycles;
}

static void taps_destroy(void *state) {
    taps_state *s = state;
    if (!s) return;
    cbn_free(s->tap);
    cbn_free(s->phase);
    cbn_free(s->w);
    cbn_free(s);
}

/* w is [oc][ic/g][taps]. */
static void weights_pack(taps_state *s, const cbn_conv_desc *d, const float *w) {
    float *p = s->w, sum = 0.0f;
    for (int64_t g = 0; g < d->g; g++) {
        for (int64_t b = 0; b < s->blocks; b++) {
            const int64_t c0 = block_first(s, b), mr = block_first(s, b + 1) - c0;
            const float *from = w + (g * s->ocg + c0) * s->ntaps;
            for (int64_t t = 0; t < s->ntaps; t++, from++)
                for (int64_t c = 0; c < mr; c++, p++) sum += 0.0f * (*p = from[c * s->ntaps]);
        }
    }
    s->finite = sum == 0.0f;
}

static void taps_list(const taps_state *s, const cbn_conv_desc *d) {
    int64_t n = 0;
    for (int64_t p = 0; p < d->stride[2] && n < s->phases; p++) {
        for (int64_t c = 0; c < d->k[2]; c++) {
            if (c * d->dil[2] % d->stride[2] != p) continue;
            s->phase[n++] = p;
            break;
        }
    }
    int32_t *t = s->tap;
    for (int64_t i = 0; s->in_place && i < s->icg; i++)
        for (int64_t c = 0; c < d->k[2]; c++) *t++ = (int32_t)(i * d->in[0] * d->in[1] * d->in[2] + c * d->dil[2]);
    for (int64_t i = 0; !s->in_place && i < s->icg; i++) {
        for (int64_t a = 0; a < d->k[0]; a++) {
            for (int64_t b = 0; b < d->k[1]; b++) {
                const int64_t row = a * s->plane_rows + b * d->dil[1];
                for (int64_t c = 0; c < d->k[2]; c++) {
                    const int64_t col = c * d->dil[2];
                    int64_t p = 0;
                    while (s->phase[p] != col % d->stride[2]) p++;
                    *t++ = (int32_t)(row * s->row_floats + (i * s->phases + p) * s->phase_floats +
                                     col / d->stride[2]);
                }
            }
        }
    }
}

static cbn_status taps_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                               cbn_error *err) {
    taps_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a convolution", sizeof *s);
    (void)boxes_make(s, d, ctx->kernels);
    s->tap = cbn_alloc_or_fail((size_t)s->ntaps, sizeof *s->tap, "the taps of a convolution", err);
    if (s->tap) s->phase = cbn_alloc_or_fail((size_t)s->phases, sizeof *s->phase, "the phases of a row", err);
    if (s->phase)
        s->w = cbn_alloc_or_fail((size_t)d->oc, (size_t)s->ntaps * sizeof *s->w,
                                 "the packed weights of a convolution", err);
    if (!s->w) {
        taps_destroy(s);
        return CBN_NO_MEMORY;
    }
    taps_list(s, d);
    weights_pack(s, d, w);
    *state = s;
    return CBN_OK;
}

/* ---- running ----------------------------------------------------------------------------------------------------- */

static void box_get(const taps_run *u, int64_t id, taps_box *box) {
    const taps_state *s = u->s;
    if (box->id == id) return;
    box->id = id;
    box->copied = 0;
    const int64_t r = id % s->rows, c = id / s->rows % s->cols, rest = id / s->rows / s->cols;
    box->r0 = u->d->out[1] * r / s->rows;
    box->r1 = u->d->out[1] * (r + 1) / s->rows;
    box->v0 = c * s->box_vectors;
    box->v1 = CBN_MIN(box->v0 + s->box_vectors, s->vectors);
    box->z = rest % u->d->out[0];
    box->g = rest / u->d->out[0] % u->d->g;
    box->image = rest / u->d->out[0] / u->d->g;
    box->col0 = CBN_MIN(box->v0 * u->k->lanes, CBN_MAX(u->d->out[2] - u->k->lanes, 0));
}

/* Blocks [b0, b1) of output channels of a box. */
static void box_run(const taps_run *u, taps_box *box, int64_t b0, int64_t b1) {
    const taps_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const int64_t lanes = u->k->lanes, per_row = box->v1 - box->v0, all = (box->r1 - box->r0) * per_row;
    const int64_t last_col = CBN_MAX(d->out[2] - lanes, 0);
    int64_t xpix[STEP_VECTORS], ypix[STEP_VECTORS];
    cbn_conv_tap_args a = {.x = box->copy,
                           .tap = s->tap,
                           .ntaps = s->ntaps,
                           .y_oc = u->y_plane,
                           .lanes = CBN_MIN(lanes, d->out[2])};
    int64_t a0, a1;
    depth_taps(d, box->z, &a0, &a1);
    const int64_t plane_taps = d->k[1] * d->k[2];
    if (a1 - a0 < d->k[0]) {
        a.tap += a0 * plane_taps;
        a.ntaps = (a1 - a0) * plane_taps;
        a.more_runs = s->icg - 1;
        a.skip = (d->k[0] - (a1 - a0)) * plane_taps;
    }
    /* Where pixels are in x: rows of the box and columns, from the first ones of the box. */
    int64_t x_row = d->stride[1] * s->row_floats;
    if (s->in_place) {
        x_row = d->stride[1] * d->in[2];
        a.x = (const float *)u->call->x + (box->image * d->ic + box->g * s->icg) * u->x_plane +
              (box->z * d->stride[0] * d->in[1] + box->r0 * d->stride[1]) * d->in[2] + box->col0;
    }
    int64_t row = 0, v = 0;
    for (int64_t q = 0; q < all; q += s->step) {
        const int64_t n = CBN_MIN(s->step, all - q);
        for (int64_t i = 0; i < n; i++) {
            const int64_t col = CBN_MIN((box->v0 + v) * lanes, last_col);
            xpix[i] = row * x_row + col - box->col0;
            ypix[i] = (box->r0 + row) * d->out[2] + col;
            if (++v < per_row) continue;
            v = 0;
            row++;
        }
        if (!s->in_place) cbn_taps_copy(u, box, cbn_taps_reach(d, v > 0 ? row + 1 : row));
        /* While this step is computed, the input of the next one comes nearer. */
        taps_box next = *box;
        int64_t next_from = box->copied, next_end = 0;
        if (q + s->step < all) {
            next_end = cbn_taps_reach(d, (CBN_MIN(q + 2 * s->step, all) - 1) / per_row + 1);
        } else if (b1 == s->blocks && box->id + 1 < u->boxes) {
            box_get(u, box->id + 1, &next);
            next_from = 0;
            next_end = cbn_taps_reach(d, (CBN_MIN(s->step, all) - 1) / per_row + 1);
        }
        a.xpix = xpix;
        a.ypix = ypix;
        a.nv = n;
        for (int64_t b = b0; b < b1; b++) {
            const int64_t c0 = box->g * s->ocg + block_first(s, b);
            const int64_t y_at = (box->image * d->oc + c0) * u->y_plane + box->z * d->out[1] * d->out[2];
            const int64_t i0 = s->icg * (b - b0) / (b1 - b0), i1 = s->icg * (b - b0 + 1) / (b1 - b0);
            const int64_t x_next = xpix[n - 1] + lanes;
            if (s->in_place) cbn_taps_prefetch_in_place(u, a.x, x_next, x_next + n * lanes, i0, i1);
            else cbn_taps_prefetch(u, &next, next_from, next_end, i0, i1);
            a.w = s->w + c0 * s->ntaps + a0 * plane_taps * (block_first(s, b + 1) - block_first(s, b));
            a.y = (float *)u->call->y + y_at;
            a.epi = (cbn_epilogue_args){(const float *)u->call->bias + c0,
                                        u->call->residual ? (const float *)u->call->residual + y_at : NULL,
                                        u->call->lo, u->call->hi};
            u->k->conv_tap((int)(block_first(s, b + 1) - block_first(s, b)), &a);
        }
    }
}

/* Items are numbered image, group, plane, columns, rows, part. */
static void taps_range(void *arg, int64_t begin, int64_t end, int worker) {
    const taps_run *u = arg;
    const int64_t blocks = u->s->blocks;
    taps_box box = {.id = -1, .copy = (float *)(u->scratch + (size_t)worker * u->s->copy_bytes)};
    for (int64_t item = begin; item < end; item++) {
        const int64_t part = item % u->parts;
        box_get(u, item / u->parts, &box);
        box_run(u, &box, blocks * part / u->parts, blocks * (part + 1) / u->parts);
    }
}

static cbn_status taps_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                          const cbn_conv_call *call, cbn_error *err) {
    const taps_state *s = state;
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    const int64_t boxes = call->n * d->g * d->out[0] * s->cols * s->rows;
    if (call->n == 0) return CBN_OK;
    if (!s->finite) {
        memset(call->redo, 1, (size_t)call->n);
        return CBN_OK;
    }
    taps_run u = {.d = d, .k = ctx->kernels, .s = s, .call = call, .boxes = boxes, .parts = 1};
    u.x_plane = d->in[0] * d->in[1] * d->in[2];
    u.y_plane = d->out[0] * d->out[1] * d->out[2];
    if (threads > 1 && boxes < (int64_t)threads * PARTS_PER_THREAD)
        u.parts = CBN_MIN(s->blocks, cbn_ceil_div((int64_t)threads * PARTS_PER_THREAD, boxes));
    u.scratch = cbn_scratch_get(s->copy_bytes * (size_t)threads);
    if (!u.scratch) return cbn_fail_memory(err, "scratch of a convolution", s->copy_bytes * (size_t)threads);
    const int64_t work = s->box_rows * s->box_vectors * ctx->kernels->lanes * s->ocg * s->ntaps / u.parts;
    cbn_parallel_for(boxes * u.parts, CBN_MAX(THREAD_WORK / CBN_MAX(work, 1), 1), threads, taps_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static size_t taps_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n,
                             int threads) {
    (void)d;
    (void)ctx;
    (void)n;
    return ((const taps_state *)state)->copy_bytes * (size_t)CBN_MAX(threads, 1);
}

static void taps_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                          size_t size) {
    const taps_state *s = state;
    const int mr = (int)block_first(s, 1);
    (void)d;
    snprintf(buf, size, "%d channels x %d pixels, boxes of %lld rows x %lld columns, %lld vectors at a time", mr,
             cbn_tap_nv(ctx->kernels, mr) * ctx->kernels->lanes, (long long)s->box_rows,
             (long long)(s->box_vectors * ctx->kernels->lanes), (long long)s->step);
}

const cbn_conv_impl cbn_conv_taps = {
    .name = "taps",
    .supports = taps_supports,
    .cost = taps_cost,
    .prepare = taps_prepare,
    .run = taps_go,
    .destroy = taps_destroy,
    .workspace_bytes = taps_workspace,
    .describe = taps_describe,
    .fused_epilogue = true,
    .spreads_nonfinite = true, /* those of weights */
};
