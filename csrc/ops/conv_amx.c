/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution on a bfloat16 matrix unit with the accuracy of float32 (kernels/cbn_amx.h).
 *
 * A band of output rows is one job. The input rows it needs are split into three bfloat16 terms, two channels to a word,
 * with their padding written out, and sorted by phase where there is a stride: then output pixel (row, column) reads tap t at
 * row*pitch + column + a constant, and the band is one long run of pixels that tiles may cut anywhere. Pixels between the
 * end of a row and the next row are computed and not stored.
 *
 * The sum of an output element runs over blocks of 32 channels, then taps, whatever the band: same bits for any split. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "kernels/cbn_amx.h"
#include "ops/conv_cost.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    BAND_BYTES = 1 << 20,     /* split input of a band: half of an L2 cache of 2 MB */
    MOST_BYTES = 4 << 20,     /* of one band of one row; more is refused */
    FEW_CHANNELS = 16,
    JOBS = 16,                /* fewer bands than this: output channels are split, too */
    PIXELS = CBN_AMX_BLOCK    /* of a tile */
};

typedef struct tap {
    int64_t plane, phase, shift; /* depth plane, plane of its phase, words from the pixel */
} tap;

typedef struct amx_state {
    int64_t icg, ocg, chunks, blocks; /* of a group: channels, blocks of 32 channels, blocks of 32 output channels */
    int64_t phases, planes;           /* planes of a channel pair: depth taps times phases */
    int64_t pitch;                    /* words of a row */
    int64_t max_row, max_shift;       /* most rows and words that a tap reads ahead */
    int64_t rows, bands;              /* output rows of a band at most; bands of an output plane */
    int64_t plane_words, pair_words, term_words;
    int64_t parts;                    /* jobs into which the output channels of a band are split */
    int64_t ntaps;
    tap *taps;
    uint16_t *w; /* [group][block][chunk][tap][CBN_AMX_STEP_WEIGHTS] */
} amx_state;

/* ---- geometry -------------------------------------------------------------------------------- */
static void layout(const cbn_conv_desc *d, amx_state *s) {
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->chunks = cbn_ceil_div(s->icg, CBN_AMX_DEPTH);
    s->blocks = cbn_ceil_div(s->ocg, CBN_AMX_BLOCK);
    s->phases = d->stride[1] * d->stride[2];
    s->planes = d->k[0] * s->phases;
    s->pitch = d->out[2] + (d->k[2] - 1) * d->dil[2] / d->stride[2];
    s->max_row = (d->k[1] - 1) * d->dil[1] / d->stride[1];
    s->max_shift = s->max_row * s->pitch + (d->k[2] - 1) * d->dil[2] / d->stride[2];
    s->ntaps = d->k[0] * d->k[1] * d->k[2];
    const int64_t row_bytes = s->pitch * s->planes * s->chunks * CBN_AMX_DEPTH / 2 * CBN_AMX_TERMS * (int64_t)sizeof(uint32_t);
    s->rows = CBN_MAX(BAND_BYTES / row_bytes - s->max_row, 1);
    s->rows = CBN_MIN(s->rows, d->out[1]);
    s->bands = cbn_ceil_div(d->out[1], s->rows);
    s->rows = cbn_ceil_div(d->out[1], s->bands);
    const int64_t pixels = cbn_ceil_div(s->rows * s->pitch, PIXELS) * PIXELS;
    s->plane_words = pixels + s->max_shift;
    /* An odd number of cache lines: pairs of channels are rows of a tile and must not share cache sets. */
    s->pair_words = (cbn_ceil_div(s->plane_words * s->planes, 16) | 1) * 16;
    s->term_words = s->pair_words * s->chunks * (CBN_AMX_DEPTH / 2);
    s->parts = CBN_MIN(s->blocks, cbn_ceil_div(JOBS, s->bands * d->out[0] * d->g));
}

static size_t split_bytes(const amx_state *s) { return (size_t)s->term_words * CBN_AMX_TERMS * sizeof(uint32_t); }

static bool amx_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    amx_state s = {0};
    *why_not = NULL;
    if (!ctx->kernels->amx)
        *why_not = "no AMX unit, or it is not enabled";
    else if (d->dtype != CBN_F32)
        *why_not = "dtype is not float32";
    else if (d->nd == 0)
        *why_not = "linear";
    else if (d->transposed)
        *why_not = "transposed";
    else if (d->ic / d->g < FEW_CHANNELS || d->oc / d->g < FEW_CHANNELS)
        *why_not = "a group has fewer than 16 channels";
    else if (d->in[1] * d->in[2] >= INT32_MAX / 64 || d->k[0] * d->k[1] * d->k[2] > 4096)
        *why_not = "too large";
    if (*why_not) return false;
    layout(d, &s);
    if (split_bytes(&s) > MOST_BYTES) *why_not = "one row of the split input is larger than half of the cache";
    return !*why_not;
}

static double amx_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    amx_state s = {0};
    layout(d, &s);
    /* 6 products of 16*16*32 multiply-adds in 16 cycles each; untuned prototypes reached a good half of that. */
    const double pixels = (double)(s.bands * cbn_ceil_div(s.rows * s.pitch, PIXELS) * d->out[0]) * PIXELS;
    const double products = pixels * (double)(s.blocks * CBN_AMX_BLOCK * s.chunks * CBN_AMX_DEPTH * s.ntaps * d->g);
    const double packing = ctx->one_shot ? 4.0 * (double)(d->oc * s.icg * s.ntaps) : 0.0;
    return products * 6.0 / (16 * 32) / 0.55 + (double)(d->ic * d->in[0] * d->in[1] * d->in[2]) * 2.0 + packing;
}

/* ---- preparing ------------------------------------------------------------------------------- */
static void amx_destroy(void *state) {
    amx_state *s = state;
    if (!s) return;
    cbn_free(s->taps);
    cbn_free(s->w);
    cbn_free(s);
}

static size_t weight_count(const cbn_conv_desc *d, const amx_state *s) {
    return (size_t)(d->g * s->blocks * s->chunks * s->ntaps) * CBN_AMX_STEP_WEIGHTS;
}

/* w is [oc][ic/g][taps]. */
static void weights_pack(const cbn_conv_desc *d, const cbn_amx *amx, amx_state *s, const float *w) {
    const int64_t term = CBN_AMX_BLOCK * CBN_AMX_DEPTH;
    memset(s->w, 0, weight_count(d, s) * sizeof *s->w);
    for (int64_t oc = 0; oc < d->oc; oc++) {
        const int64_t g = oc / s->ocg, c = oc % s->ocg, block = g * s->blocks + c / CBN_AMX_BLOCK;
        for (int64_t i = 0; i < s->icg; i++) {
            for (int64_t t = 0; t < s->ntaps; t++) {
                uint16_t *step = s->w + ((block * s->chunks + i / CBN_AMX_DEPTH) * s->ntaps + t) * CBN_AMX_STEP_WEIGHTS;
                amx->split_one(step + c % CBN_AMX_BLOCK * CBN_AMX_DEPTH + i % CBN_AMX_DEPTH, term,
                               w[(oc * s->icg + i) * s->ntaps + t]);
            }
        }
    }
}

static cbn_status amx_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                              cbn_error *err) {
    amx_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "an AMX convolution", sizeof *s);
    layout(d, s);
    s->taps = cbn_alloc_or_fail((size_t)s->ntaps, sizeof *s->taps, "the taps of a convolution", err);
    if (s->taps)
        s->w = cbn_alloc_or_fail(weight_count(d, s), sizeof *s->w, "the packed weights of a convolution", err);
    if (!s->w) {
        amx_destroy(s);
        return CBN_NO_MEMORY;
    }
    for (int64_t t = 0; t < s->ntaps; t++) {
        const int64_t x = t % d->k[2] * d->dil[2], y = t / d->k[2] % d->k[1] * d->dil[1];
        s->taps[t] = (tap){.plane = t / d->k[2] / d->k[1],
                           .phase = y % d->stride[1] * d->stride[2] + x % d->stride[2],
                           .shift = y / d->stride[1] * s->pitch + x / d->stride[2]};
    }
    weights_pack(d, ctx->kernels->amx, s, w);
    *state = s;
    return CBN_OK;
}

/* ---- running --------------------------------------------------------------------------------- */
typedef struct amx_run {
    const cbn_conv_desc *d;
    const cbn_amx *amx;
    const amx_state *s;
    const cbn_conv_call *call;
    char *scratch;
    size_t worker_bytes, sums_bytes, steps_bytes;
} amx_run;

typedef struct worker {
    uint32_t *x;
    float *sums;
    int64_t *w_at, *x_at;
    int64_t steps, have; /* the job whose split input lies in x */
} worker;

/* One row of one plane of a channel pair: padded positions first, first + step, ... of the input row. */
static void split_row(const amx_run *u, uint32_t *p, const float *even, const float *odd, int64_t phase) {
    const cbn_conv_desc *d = u->d;
    const int64_t pitch = u->s->pitch, term = u->s->term_words, step = d->stride[2], off = phase - d->pad_lo[2];
    /* Words j with 0 <= j*step + off < iw. */
    int64_t j0 = off >= 0 ? 0 : cbn_ceil_div(-off, step), j1 = d->in[2] > off ? cbn_ceil_div(d->in[2] - off, step) : 0;
    j0 = CBN_MIN(j0, pitch);
    j1 = CBN_MAX(CBN_MIN(j1, pitch), j0);
    for (int t = 0; t < CBN_AMX_TERMS; t++) {
        memset(p + t * term, 0, (size_t)j0 * sizeof *p);
        memset(p + t * term + j1, 0, (size_t)(pitch - j1) * sizeof *p);
    }
    if (j1 > j0) u->amx->split(p + j0, term, even + j0 * step + off, odd ? odd + j0 * step + off : NULL, step, j1 - j0);
}

/* Whether a tap of this axis reads phase p of the input. */
static bool phase_used(const cbn_conv_desc *d, int axis, int64_t p) {
    for (int64_t t = 0; t < d->k[axis] && t < d->stride[axis]; t++)
        if (t * d->dil[axis] % d->stride[axis] == p) return true;
    return false;
}

/* Rows r0 to r1 of output plane z: splits what they read, and lists the steps that lie inside the input's depth. */
static void band_split(const amx_run *u, const float *x, int64_t z, int64_t r0, int64_t r1, worker *w) {
    const amx_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const int64_t plane = d->in[0] * d->in[1] * d->in[2], rows = r1 - r0 + s->max_row;
    for (int64_t pair = 0; pair < s->chunks * CBN_AMX_DEPTH / 2; pair++) {
        uint32_t *to = w->x + pair * s->pair_words;
        const float *even = 2 * pair < s->icg ? x + 2 * pair * plane : NULL;
        const float *odd = 2 * pair + 1 < s->icg ? x + (2 * pair + 1) * plane : NULL;
        for (int64_t k = 0; k < s->planes; k++, to += s->plane_words) {
            const int64_t depth = z * d->stride[0] - d->pad_lo[0] + k / s->phases * d->dil[0];
            const int64_t ph = k % s->phases / d->stride[2], pw = k % s->phases % d->stride[2];
            if (!phase_used(d, 1, ph) || !phase_used(d, 2, pw)) continue;
            for (int64_t q = 0; q < rows; q++) {
                const int64_t row = (r0 + q) * d->stride[1] + ph - d->pad_lo[1];
                uint32_t *p = to + q * s->pitch;
                const bool inside = even && depth >= 0 && depth < d->in[0] && row >= 0 && row < d->in[1];
                const int64_t at = (depth * d->in[1] + row) * d->in[2];
                if (inside)
                    split_row(u, p, even + at, odd ? odd + at : NULL, pw);
                else
                    for (int t = 0; t < CBN_AMX_TERMS; t++) memset(p + t * s->term_words, 0, (size_t)s->pitch * sizeof *p);
            }
            /* What only pixels that are not stored read. */
            for (int t = 0; t < CBN_AMX_TERMS; t++)
                memset(to + t * s->term_words + rows * s->pitch, 0,
                       (size_t)(s->plane_words - rows * s->pitch) * sizeof *to);
        }
    }
    w->steps = 0;
    for (int64_t i = 0; i < s->chunks; i++) {
        for (int64_t t = 0; t < s->ntaps; t++) {
            const tap *tp = &s->taps[t];
            const int64_t depth = z * d->stride[0] - d->pad_lo[0] + tp->plane * d->dil[0];
            if (depth < 0 || depth >= d->in[0]) continue;
            w->w_at[w->steps] = (i * s->ntaps + t) * CBN_AMX_STEP_WEIGHTS;
            w->x_at[w->steps++] = i * (CBN_AMX_DEPTH / 2) * s->pair_words +
                                  (tp->plane * s->phases + tp->phase) * s->plane_words + tp->shift;
        }
    }
}

/* The pixels of a tile that are in the image, row by row. Returns false when a sum is not finite. */
static bool tile_store(const amx_run *u, const float *sums, int64_t pixel, int64_t rows, int64_t oc0, int64_t valid,
                       int64_t y_at) {
    const cbn_conv_desc *d = u->d;
    const cbn_conv_call *call = u->call;
    const int64_t pitch = u->s->pitch, plane = d->out[0] * d->out[1] * d->out[2];
    const float *bias = (const float *)call->bias + oc0, *residual = call->residual;
    float finite = 0.0f;
    for (int64_t p = 0; p < PIXELS;) {
        const int64_t row = (pixel + p) / pitch, column = (pixel + p) % pitch;
        if (row >= rows) break;
        const int64_t n = CBN_MIN(d->out[2] - column, PIXELS - p);
        for (int64_t c = 0; c < valid && n > 0; c++) {
            const int64_t at = y_at + c * plane + row * d->out[2] + column;
            float *y = (float *)call->y + at;
            const float *from = sums + c * PIXELS + p;
            for (int64_t i = 0; i < n; i++) {
                finite += from[i] * 0.0f;
                float v = from[i] + bias[c];
                if (residual) v += residual[at + i];
                v = call->lo > v ? call->lo : v;
                y[i] = call->hi < v ? call->hi : v;
            }
        }
        p += pitch - column;
    }
    return finite == 0.0f;
}

/* Items are numbered image, group, output plane, band, part. */
static void amx_range(void *arg, int64_t begin, int64_t end, int number) {
    const amx_run *u = arg;
    const amx_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    char *scratch = u->scratch + (size_t)number * u->worker_bytes;
    worker w = {.sums = (float *)scratch, .have = -1};
    w.w_at = (int64_t *)(scratch += u->sums_bytes);
    w.x_at = (int64_t *)(scratch += u->steps_bytes);
    w.x = (uint32_t *)(scratch + u->steps_bytes);
    u->amx->begin();
    for (int64_t item = begin; item < end; item++) {
        const int64_t part = item % s->parts, job = item / s->parts, band = job % s->bands;
        const int64_t z = job / s->bands % d->out[0], g = job / s->bands / d->out[0] % d->g;
        const int64_t image = job / s->bands / d->out[0] / d->g;
        const int64_t r0 = d->out[1] * band / s->bands, r1 = d->out[1] * (band + 1) / s->bands;
        if (w.have != job) {
            const int64_t channel = image * d->ic + g * s->icg;
            band_split(u, (const float *)u->call->x + channel * d->in[0] * d->in[1] * d->in[2], z, r0, r1, &w);
            w.have = job;
        }
        bool finite = true;
        for (int64_t b = s->blocks * part / s->parts; b < s->blocks * (part + 1) / s->parts; b++) {
            const int64_t oc0 = g * s->ocg + b * CBN_AMX_BLOCK;
            const int64_t y_at = ((image * d->oc + oc0) * d->out[0] + z) * d->out[1] * d->out[2] + r0 * d->out[2];
            cbn_amx_args a = {.steps = w.steps, .w_at = w.w_at, .x_at = w.x_at, .x_term = s->term_words,
                              .x_pair = s->pair_words, .sums = w.sums};
            a.w = s->w + (g * s->blocks + b) * s->chunks * s->ntaps * CBN_AMX_STEP_WEIGHTS;
            for (int64_t p = 0; p < (r1 - r0) * s->pitch; p += PIXELS) {
                a.x = w.x + p;
                u->amx->tile(&a);
                finite &= tile_store(u, w.sums, p, r1 - r0, oc0, CBN_MIN(s->ocg - b * CBN_AMX_BLOCK, CBN_AMX_BLOCK), y_at);
            }
        }
        /* Only ever set: workers on one image may both do so. */
        if (!finite) __atomic_store_n(&u->call->redo[image], 1, __ATOMIC_RELAXED);
    }
    u->amx->end();
}

static void scratch_layout(const cbn_conv_desc *d, const amx_state *s, amx_run *u) {
    (void)d;
    u->sums_bytes = (size_t)CBN_AMX_BLOCK * PIXELS * sizeof(float);
    u->steps_bytes = cbn_whole_lines((size_t)(s->chunks * s->ntaps) * sizeof(int64_t));
    u->worker_bytes = u->sums_bytes + 2 * u->steps_bytes + cbn_whole_lines(split_bytes(s));
}

static size_t amx_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n, int threads) {
    amx_run u;
    (void)ctx;
    (void)n;
    scratch_layout(d, state, &u);
    return u.worker_bytes * (size_t)CBN_MAX(threads, 1);
}

static cbn_status amx_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, const cbn_conv_call *call,
                         cbn_error *err) {
    amx_run u = {.d = d, .amx = ctx->kernels->amx, .s = state, .call = call};
    if (call->n == 0) return CBN_OK;
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    scratch_layout(d, state, &u);
    u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
    if (!u.scratch) return cbn_fail_memory(err, "scratch of a convolution", u.worker_bytes * (size_t)threads);
    cbn_parallel_for(call->n * d->g * d->out[0] * u.s->bands * u.s->parts, 1, threads, amx_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static void amx_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf, size_t size) {
    const amx_state *s = state;
    (void)d;
    snprintf(buf, size, "%s, 32 channels x 32 pixels, 3 bfloat16 terms, bands of %lld rows", ctx->kernels->amx->name,
             (long long)s->rows);
}

const cbn_conv_impl cbn_conv_amx = {
    .name = "amx",
    .supports = amx_supports,
    .cost = amx_cost,
    .prepare = amx_prepare,
    .run = amx_go,
    .destroy = amx_destroy,
    .workspace_bytes = amx_workspace,
    .describe = amx_describe,
    .fused_epilogue = true,
    .spreads_nonfinite = true,
};
