/* SPDX-License-Identifier: BSD-3-Clause */
/* A 1x1 convolution of each channel for itself: y = x*w + b, what a BatchNorm is that no convolution took in.
 *
 * The work is moving x and y, so each plane is taken in blocks that stay in the L1 cache while the residual is added and
 * the result clamped. */
#include <math.h>
#include <stdio.h>

#include "ops/conv_cost.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    BLOCK = 2048,            /* elements: with the residual 24 KB */
    GRAIN_ELEMENTS = 1 << 15 /* about 10 us of work */
};

static bool scale_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    (void)ctx;
    *why_not = NULL;
    if (d->dtype != CBN_F32) *why_not = "dtype is not float32";
    else if (d->transposed) *why_not = "transposed";
    else if (d->nd == 0 || d->g != d->ic || d->g != d->oc) *why_not = "groups are not the channels";
    for (int a = 0; a < CBN_MAX_SPATIAL && !*why_not; a++) {
        if (d->k[a] != 1) *why_not = "kernel is not 1";
        else if (d->stride[a] != 1) *why_not = "stride is not 1";
        else if (d->pad_lo[a] != 0 || d->pad_hi[a] != 0) *why_not = "padding is not 0";
    }
    return !*why_not;
}

static int64_t plane_of(const cbn_conv_desc *d) { return d->out[0] * d->out[1] * d->out[2]; }

/* Below depthwise's estimate: measured 1.0 (large planes) to 3 times (small ones) as fast. */
static double scale_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    return cbn_cost_fma(ctx->kernels, cbn_cost_real_fmas(d), 0.6);
}

static cbn_status scale_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                                cbn_error *err) {
    (void)d;
    (void)ctx;
    (void)err;
    *state = (void *)(uintptr_t)w; /* one weight a channel, kept by the plan; nobody writes through it */
    return CBN_OK;
}

typedef struct scale_job {
    const cbn_kernels *k;
    const cbn_conv_call *call;
    const float *w;
    int64_t channels, plane;
    bool clamps;
} scale_job;

/* Items are planes, [n][channel]. */
static void scale_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const scale_job *j = arg;
    const cbn_conv_call *call = j->call;
    const float *bias = call->bias, *x = call->x, *residual = call->residual;
    float *y = call->y;
    int64_t channel = begin % j->channels;
    for (int64_t p = begin; p < end; p++) {
        for (int64_t i = 0; i < j->plane; i += BLOCK) {
            const int64_t at = p * j->plane + i, n = CBN_MIN(j->plane - i, BLOCK);
            j->k->affine(y + at, x + at, j->w[channel], bias[channel], n);
            if (residual != NULL) j->k->add(y + at, y + at, residual + at, 1.0f, n);
            if (j->clamps) j->k->unary(CBN_ACT_HARDTANH, call->lo, call->hi, y + at, y + at, n);
        }
        channel = channel + 1 == j->channels ? 0 : channel + 1;
    }
}

static cbn_status scale_run(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                            const cbn_conv_call *call, cbn_error *err) {
    (void)err;
    scale_job j = {.k = ctx->kernels, .call = call, .w = state, .channels = d->oc, .plane = plane_of(d)};
    j.clamps = !(isinf(call->lo) && isinf(call->hi));
    cbn_parallel_for(call->n * j.channels, cbn_ceil_div(GRAIN_ELEMENTS, j.plane), call->max_threads, scale_range, &j);
    return CBN_OK;
}

static void scale_destroy(void *state) { (void)state; /* the plan's */ }

static void scale_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                           size_t size) {
    (void)d;
    (void)state;
    snprintf(buf, size, "blocks of %d elements of a plane, vectors of %d", BLOCK, ctx->kernels->lanes);
}

const cbn_conv_impl cbn_conv_scale = {
    .name = "scale",
    .supports = scale_supports,
    .cost = scale_cost,
    .prepare = scale_prepare,
    .run = scale_run,
    .destroy = scale_destroy,
    .describe = scale_describe,
    .fused_epilogue = true,
};
