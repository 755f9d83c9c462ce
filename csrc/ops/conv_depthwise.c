/* SPDX-License-Identifier: BSD-3-Clause */
/* Depthwise convolution: every output channel reads one input channel, so a channel plane is a problem of its own and
 * the kernel conv_dw does all of it. Weights are used as they are.
 *
 * The kernel multiplies padding, as zeros, by the weights. Where a weight is Inf or NaN that is wrong, and the plane is
 * computed by a plain loop instead. */
#include <math.h>
#include <stdio.h>

#include "base/cbn_alloc.h"
#include "ops/conv_cost.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    GRAIN_MADDS = 300000, /* multiply-adds a thread should at least get, about 20 us */
    ROWS_PER_PART = 8,    /* planes are cut at multiples of the kernel's row block */
    PARTS_PER_THREAD = 4
};

typedef struct depthwise_state {
    const float *w; /* the plan's, [oc][kd][kh][kw] */
    bool finite;    /* all of them */
} depthwise_state;

typedef struct depthwise_job {
    const cbn_conv_desc *d;
    const cbn_kernels *kernels;
    const depthwise_state *state;
    const cbn_conv_call *call;
    int64_t parts, rows_per_part; /* of each plane */
} depthwise_job;

static bool depthwise_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    (void)ctx;
    if (d->dtype != CBN_F32) *why_not = "dtype is not float32";
    else if (d->transposed) *why_not = "the convolution is transposed";
    else if (d->g != d->ic) *why_not = "groups differ from the input channels";
    else return true;
    return false;
}

static bool all_finite(const float *w, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(w[i])) return false;
    return true;
}

static cbn_status depthwise_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                                    cbn_error *err) {
    (void)ctx;
    depthwise_state *s = cbn_alloc(sizeof *s);
    *state = s;
    if (!s) return cbn_fail_memory(err, "depthwise", sizeof *s);
    s->w = w;
    s->finite = all_finite(w, d->oc * d->k[0] * d->k[1] * d->k[2]);
    return CBN_OK;
}

/* What conv_dw gives for a.more = 0, without a product for the padding. */
static void plain_plane(const cbn_conv_dw_args *a) {
    const int64_t image[3] = {a->id, a->ih, a->iw};
    for (int64_t od = a->od0; od < a->od1; od++)
        for (int64_t oh = a->oh0; oh < a->oh1; oh++)
            for (int64_t ow = 0; ow < a->ow; ow++) {
                const int64_t at = (od * a->oh + oh) * a->ow + ow;
                const float *w = a->w;
                double sum = 0;
                for (int32_t i = 0; i < a->kd; i++)
                    for (int32_t j = 0; j < a->kh; j++)
                        for (int32_t k = 0; k < a->kw; k++, w++) {
                            const int64_t d = od * a->sd - a->pd + (int64_t)i * a->dd;
                            const int64_t h = oh * a->sh - a->ph + (int64_t)j * a->dh;
                            const int64_t c = ow * a->sw - a->pw + (int64_t)k * a->dw;
                            if (d < 0 || d >= image[0] || h < 0 || h >= image[1] || c < 0 || c >= image[2]) continue;
                            sum += (double)*w * (double)a->x[(d * a->ih + h) * a->iw + c];
                        }
                float y = (float)sum + a->bias;
                if (a->residual) y += a->residual[at];
                if (y < a->lo) y = a->lo;
                if (y > a->hi) y = a->hi;
                a->y[at] = y;
            }
}

/* Items are parts of planes, [n][oc][part]. */
static void depthwise_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const depthwise_job *j = arg;
    const cbn_conv_desc *d = j->d;
    const cbn_conv_call *call = j->call;
    const int64_t x_plane = d->in[0] * d->in[1] * d->in[2], y_plane = d->out[0] * d->out[1] * d->out[2];
    const int64_t taps = d->k[0] * d->k[1] * d->k[2], multiplier = d->oc / d->ic;
    /* clang-format off */
    cbn_conv_dw_args a = {
        .lo = call->lo,
        .hi = call->hi,
        .id = d->in[0], .ih = d->in[1], .iw = d->in[2],
        .od = d->out[0], .oh = d->out[1], .ow = d->out[2],
        .kd = (int32_t)d->k[0], .kh = (int32_t)d->k[1], .kw = (int32_t)d->k[2],
        .sd = (int32_t)d->stride[0], .sh = (int32_t)d->stride[1], .sw = (int32_t)d->stride[2],
        .pd = (int32_t)d->pad_lo[0], .ph = (int32_t)d->pad_lo[1], .pw = (int32_t)d->pad_lo[2],
        .dd = (int32_t)d->dil[0], .dh = (int32_t)d->dil[1], .dw = (int32_t)d->dil[2],
        .od1 = d->out[0],
    };
    /* clang-format on */
    /* Counted along: a division takes as long as a small plane. */
    int64_t plane = begin / j->parts, part = begin % j->parts, oc = plane % d->oc, copy = oc % multiplier;
    int64_t x_index = plane / d->oc * d->ic + oc / multiplier;
    const float *bias = call->bias;
    for (int64_t i = begin; i < end;) {
        a.x = (const float *)call->x + x_index * x_plane;
        a.w = j->state->w + oc * taps;
        a.y = (float *)call->y + plane * y_plane;
        a.residual = call->residual ? (const float *)call->residual + plane * y_plane : NULL;
        a.bias = bias[oc];
        a.oh0 = CBN_MIN(part * j->rows_per_part, d->out[1]);
        a.oh1 = CBN_MIN(a.oh0 + j->rows_per_part, d->out[1]);
        a.more = 0;
        if (!j->state->finite && !all_finite(a.w, taps)) {
            plain_plane(&a);
        } else if (j->parts == 1 && j->state->finite) {
            /* Whole planes that lie one behind the other: of one image, or the copies of one channel. */
            const int64_t run = multiplier == 1 ? d->oc - oc : multiplier - copy;
            a.more = CBN_MIN(run, end - i) - 1;
            a.x_step = multiplier == 1 ? x_plane : 0;
            a.more_bias = bias + oc + 1;
            j->kernels->conv_dw(&a);
        } else {
            j->kernels->conv_dw(&a);
        }
        i += 1 + a.more;
        if (++part < j->parts) continue;
        part = 0;
        plane += 1 + a.more;
        oc += 1 + a.more;
        if (oc == d->oc) oc = 0;
        x_index += (copy + 1 + a.more) / multiplier;
        copy = (copy + 1 + a.more) % multiplier;
    }
}

static cbn_status depthwise_run(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                                const cbn_conv_call *call, cbn_error *err) {
    (void)err;
    const int64_t planes = call->n * d->oc, oh = d->out[1];
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    depthwise_job job = {.d = d,
                         .kernels = ctx->kernels,
                         .state = state,
                         .call = call,
                         .parts = 1,
                         .rows_per_part = oh};
    if (planes == 0) return CBN_OK;
    if (threads > 1 && planes < (int64_t)threads * PARTS_PER_THREAD) {
        const int64_t want = cbn_ceil_div((int64_t)threads * PARTS_PER_THREAD, planes);
        job.rows_per_part = cbn_ceil_div(cbn_ceil_div(oh, want), ROWS_PER_PART) * ROWS_PER_PART;
        job.parts = cbn_ceil_div(oh, job.rows_per_part);
    }
    const double madds = (double)(d->k[0] * d->k[1] * d->k[2]) * (double)(d->out[0] * oh * d->out[2]);
    const int64_t grain = 1 + (int64_t)(GRAIN_MADDS / (madds / (double)job.parts + 500.0));
    cbn_parallel_for(planes * job.parts, grain, call->max_threads, depthwise_range, &job);
    return CBN_OK;
}

static double depthwise_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    return cbn_cost_fma(ctx->kernels, cbn_cost_real_fmas(d), 0.5);
}

static void depthwise_destroy(void *state) { cbn_free(state); }

static void depthwise_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                               size_t size) {
    (void)d;
    (void)state;
    snprintf(buf, size, "one channel at a time, vectors of %d columns, no copies", ctx->kernels->lanes);
}

const cbn_conv_impl cbn_conv_depthwise = {
    .name = "depthwise",
    .supports = depthwise_supports,
    .cost = depthwise_cost,
    .prepare = depthwise_prepare,
    .run = depthwise_run,
    .destroy = depthwise_destroy,
    .describe = depthwise_describe,
    .fused_epilogue = true,
};
