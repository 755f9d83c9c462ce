/* SPDX-License-Identifier: BSD-3-Clause */
/* The last algorithm of the list: accepts every float32 and float64 problem. In float32 it is also
 * the definition of the accuracy baseline: fused multiply-adds in the order ic, kd, kh, kw, then
 * the bias.
 *
 * A row of the output is its own accumulator: for each weight, the run of output columns that it
 * meets inside the image is updated in one inner loop over contiguous (or strided) columns. Taps
 * outside the image are never visited. Problems of a single pixel (linear layers) keep their sums
 * in registers instead, in the same order. */
#include "base/cbn_alloc.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Taps that one output plane (or row) meets; tables belong to the axis plan. */
typedef struct ref_taps {
    int64_t ntaps, in;
    const int64_t *tap_k, *tap_in;
} ref_taps;

/* Output columns that one kernel column meets: out + j*out_step from in + j*in_step, j < count. */
typedef struct ref_span {
    int64_t out, in, count;
} ref_span;

typedef struct ref_state {
    const void *w; /* the plan's */
    int64_t ic, oc, icg, ocg, od, oh, ow, iw, kh, kw;
    int64_t x_ic, x_d;             /* elements between channels and planes of x */
    int64_t w_group, w_oc, w_ic;   /* elements between groups, output and input channels of w */
    int64_t group_blocks, nblocks; /* blocks of up to 4 output channels */
    int64_t out_step, in_step;
    bool points; /* one pixel in, one tap, one pixel out */
    cbn_axis_plan axes[2];
    ref_taps *depth, *height; /* [od], [oh] */
    ref_span *spans;          /* [kw] */
} ref_state;

typedef struct ref_row {
    const ref_taps *depth, *height;
} ref_row;

typedef struct ref_job {
    const ref_state *state;
    const cbn_conv_call *call;
} ref_job;

#define REF_T float
#define REF_NAME(base) base##_f32
#define REF_MADD(acc, w, x) fmaf((w), (x), (acc))
#include "ops/conv_ref_tmpl.h"

#define REF_T double
#define REF_NAME(base) base##_f64
#define REF_MADD(acc, w, x) ((acc) + (w) * (x))
#include "ops/conv_ref_tmpl.h"

static bool ref_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                         const char **why_not) {
    (void)ctx;
    (void)why_not;
    assert(d->dtype != CBN_F16);
    (void)d;
    return true;
}

static void ref_destroy(void *state) {
    ref_state *s = state;
    if (!s) return;
    for (int a = 0; a < 2; ++a) cbn_axis_plan_free(&s->axes[a]);
    cbn_free(s->depth);
    cbn_free(s->spans);
    cbn_free(s);
}

static void fill_taps(const cbn_axis_plan *plan, ref_taps *taps) {
    for (int64_t i = 0; i < plan->nclasses; ++i) {
        const cbn_axis_class *c = &plan->classes[i];
        for (int64_t j = 0; j < c->count; ++j)
            taps[c->out0 + j * c->out_step] =
                (ref_taps){c->ntaps, c->in0 + j * c->in_step, c->tap_k, c->tap_in};
    }
}

/* The pairs (output, input) of kernel column t walk in steps of (1, stride), transposed (stride,
 * 1). */
static ref_span make_span(const cbn_conv_desc *d, int64_t t) {
    const int64_t s = d->stride[2], shift = t * d->dil[2] - d->pad_lo[2];
    const int64_t many = d->transposed ? d->in[2] : d->out[2],
                  limit = d->transposed ? d->out[2] : d->in[2];
    const int64_t first = shift >= 0 ? 0 : cbn_ceil_div(-shift, s);
    const int64_t end = shift >= limit ? 0 : CBN_MIN(many, cbn_ceil_div(limit - shift, s));
    if (first >= end) return (ref_span){0};
    const int64_t far_side = first * s + shift;
    return (ref_span){.out = d->transposed ? far_side : first,
                      .in = d->transposed ? first : far_side,
                      .count = end - first};
}

static cbn_status ref_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w,
                              void **state, cbn_error *err) {
    (void)ctx;
    *state = NULL;
    ref_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "conv_ref", sizeof *s);
    const int64_t kernel = d->k[0] * d->k[1] * d->k[2];
    const int64_t icg = d->ic / d->g, ocg = d->oc / d->g;
    const int64_t rows = d->out[0] + d->out[1];
    *s = (ref_state){.w = w,
                     .ic = d->ic,
                     .oc = d->oc,
                     .icg = icg,
                     .ocg = ocg,
                     .od = d->out[0],
                     .oh = d->out[1],
                     .ow = d->out[2],
                     .iw = d->in[2],
                     .kh = d->k[1],
                     .kw = d->k[2],
                     .x_ic = d->in[0] * d->in[1] * d->in[2],
                     .x_d = d->in[1] * d->in[2],
                     .w_group = icg * ocg * kernel,
                     .w_oc = d->transposed ? kernel : icg * kernel,
                     .w_ic = d->transposed ? ocg * kernel : kernel,
                     .group_blocks = cbn_ceil_div(ocg, 4),
                     .nblocks = d->g * cbn_ceil_div(ocg, 4),
                     .out_step = d->transposed ? d->stride[2] : 1,
                     .in_step = d->transposed ? 1 : d->stride[2],
                     .points = true};
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a)
        s->points &= d->in[a] == 1 && d->out[a] == 1 && d->k[a] == 1 && d->pad_lo[a] == 0;
    s->depth = cbn_alloc_array((size_t)rows, sizeof(ref_taps));
    s->spans = cbn_alloc_array((size_t)s->kw, sizeof(ref_span));
    if (!s->depth || !s->spans) {
        const size_t bytes = (size_t)rows * sizeof(ref_taps) + (size_t)s->kw * sizeof(ref_span);
        ref_destroy(s);
        return cbn_fail_memory(err, "conv_ref", bytes);
    }
    s->height = s->depth + s->od;
    for (int a = 0; a < 2; ++a) {
        const cbn_status status = cbn_axis_plan_make(d, a, &s->axes[a], err);
        if (status != CBN_OK) {
            ref_destroy(s);
            return status;
        }
        fill_taps(&s->axes[a], a == 0 ? s->depth : s->height);
    }
    for (int64_t t = 0; t < s->kw; ++t) s->spans[t] = make_span(d, t);
    *state = s;
    return CBN_OK;
}

static cbn_status ref_run(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                          const cbn_conv_call *call, cbn_error *err) {
    (void)ctx;
    (void)err;
    const ref_state *s = state;
    ref_job job = {s, call};
    static const cbn_range_fn ranges[2][2] = {{rows_range_f32, points_range_f32},
                                              {rows_range_f64, points_range_f64}};
    /* A thread is worth starting for about 20 us; a multiply-add here takes 0.2 to 3 ns. */
    const double per_item = (double)(s->icg * CBN_MIN(4, s->ocg)) *
                            (double)(d->k[0] * d->k[1] * d->k[2]) * (double)(s->points ? 4 : s->ow);
    const int64_t items =
        s->points ? cbn_ceil_div(call->n, 4) * s->nblocks : call->n * s->nblocks * s->od * s->oh;
    cbn_parallel_for(items, 1 + (int64_t)(30000.0 / (per_item + 10.0)), call->max_threads,
                     ranges[d->dtype == CBN_F64][s->points], &job);
    return CBN_OK;
}

static void ref_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                         char *buf, size_t size) {
    (void)ctx;
    const ref_state *s = state;
    snprintf(buf, size, "4 channels x %s, %s", s->points ? "4 images" : "1 row",
             d->dtype == CBN_F64 ? "float64" : "float32 FMA in the order ic, kd, kh, kw");
}

const cbn_conv_impl cbn_conv_ref = {
    .name = "ref",
    .supports = ref_supports,
    .prepare = ref_prepare,
    .run = ref_run,
    .destroy = ref_destroy,
    .describe = ref_describe,
    .fused_epilogue = false,
};
