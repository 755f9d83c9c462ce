/* SPDX-License-Identifier: BSD-3-Clause */
/* Prepared convolution: weights folded once, algorithm chosen and weights packed once per input
 * shape. */
#ifndef CBN_CONV_PLAN_H
#define CBN_CONV_PLAN_H
#include "base/cbn_status.h"
#include "kernels/cbn_kernels.h"
#include "ops/conv_desc.h"

typedef enum { CBN_PRECISION_STRICT, CBN_PRECISION_FP32, CBN_PRECISION_FAST } cbn_precision;

/* What an algorithm may know when it decides and prepares. */
typedef struct cbn_conv_context {
    const cbn_kernels *kernels;
    cbn_precision precision;
    bool one_shot; /* the plan serves one call: preparing counts, too */
} cbn_conv_context;

typedef struct cbn_conv_call {
    const void *x;        /* C-contiguous */
    const void *residual; /* NULL, or shaped as y, C-contiguous */
    void *y;              /* C-contiguous, overlaps no input */
    int64_t n;            /* images in this call */
    const void *bias;     /* oc entries, never NULL */
    float lo, hi; /* clamp applied at the end (float algorithms); infinities when there is none */
    int max_threads; /* 0: configured */
    /* One byte an image, zero before. A row that spreads an Inf or NaN over its neighbours sets the byte of each image in
     * whose result it met one; conv_plan_run.c has such images computed by `direct`, where they stay in place. */
    uint8_t *redo;
} cbn_conv_call;

/* One row of the list of algorithms. Rows get descriptions with n = 1: the choice depends on the per-image shape
 * only, so that results do not depend on the batch size. Of the rows that support a description the one of least
 * cost is taken, the earlier one when they are equal. */
typedef struct cbn_conv_impl {
    const char *name;
    /* false: *why_not is a static sentence fragment ("stride is not 1"). */
    bool (*supports)(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not);
    /* Estimated clock cycles of one image on one core, from shape, lanes and cache sizes (ops/conv_cost.h); with
     * ctx->one_shot those of packing the weights are added. Only called when `supports` said yes. */
    double (*cost)(const cbn_conv_desc *d, const cbn_conv_context *ctx);
    /* Packs w (C-contiguous, d->dtype) and whatever geometry it wants to keep into *state, never
     * NULL on success. w outlives the state, so a row that needs no packing may keep the pointer.
     */
    cbn_status (*prepare)(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w,
                          void **state, cbn_error *err);
    cbn_status (*run)(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                      const cbn_conv_call *call, cbn_error *err);
    void (*destroy)(void *state); /* NULL is fine */
    /* Scratch of one run with this many threads; NULL: none. */
    size_t (*workspace_bytes)(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                              const void *state, int64_t n, int threads);
    /* A few words about tiling for explain(), into buf. */
    void (*describe)(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                     char *buf, size_t size);
    /* true: applies call->lo/hi and call->residual itself; false: conv_plan_run.c does it afterwards.
     */
    bool fused_epilogue;
    /* true: an Inf or NaN of the input may reach outputs that do not depend on it; `run` reports such images in
     * call->redo (then never NULL). */
    bool spreads_nonfinite;
} cbn_conv_impl;

/* The list of algorithms, in the order explain() shows them; the last accepts everything. Adding one is a line here
 * and a file ops/conv_<name>.c. */
#define CBN_CONV_IMPLS(X) \
    X(amx)                \
    X(scale)              \
    X(depthwise)          \
    X(linear)             \
    X(pointwise)          \
    X(strassen)           \
    X(winograd_4x4)       \
    X(winograd_4x2)       \
    X(winograd_2x2)       \
    X(upconv)             \
    X(transposed)         \
    X(taps)               \
    X(direct)             \
    X(ref)
#define CBN_IMPL_DECL_(name) extern const cbn_conv_impl cbn_conv_##name;
CBN_CONV_IMPLS(CBN_IMPL_DECL_)
#undef CBN_IMPL_DECL_

/* ---- the plan (opaque, immutable to its user, safe from many threads) ---- */
/* Input shapes whose choice and packing a plan keeps; further ones are prepared anew in each call,
 * so that a stream of ever new shapes cannot grow a plan without bound. */
enum { CBN_PLAN_SHAPES = 8 };

typedef struct cbn_conv_plan cbn_conv_plan;

typedef struct cbn_plan_options {
    cbn_act activation;
    double act_a, act_b; /* leaky slope; hardtanh bounds */
    cbn_precision precision;
    const cbn_kernels *kernels; /* NULL: the active table */
    bool borrow;                /* w and b outlive the plan and need no copy (one-shot calls) */
    /* oc entries each that outlive the plan, or NULL: y = conv(x, w) * scale + shift, for float32 plans of one call without
     * bias, residual and activation whose weights are more than their outputs. */
    const float *scale, *shift;
} cbn_plan_options;

/* w, b: C-contiguous arrays of g->dtype, already folded (ops/bn_fold.h); b may be NULL. Copied
 * unless opt->borrow. g must have passed cbn_conv_geometry_check. */
CBN_NODISCARD cbn_status cbn_plan_create(const cbn_conv_geometry *g, const void *w, const void *b,
                                         const cbn_plan_options *opt, cbn_conv_plan **out,
                                         cbn_error *err);
void cbn_plan_destroy(cbn_conv_plan *p);

/* Output sizes (nd entries) for an input; same checks as a run. */
CBN_NODISCARD cbn_status cbn_plan_output(const cbn_conv_plan *p, int64_t n, int64_t channels,
                                         const int64_t *in, int64_t *out, cbn_error *err);
/* Chooses and packs for this shape now instead of at first use. */
CBN_NODISCARD cbn_status cbn_plan_prepare(cbn_conv_plan *p, const int64_t *in, cbn_error *err);
/* Measures the promising candidates on this shape, on the configured number of threads, and keeps the fastest for it. */
CBN_NODISCARD cbn_status cbn_plan_tune(cbn_conv_plan *p, const int64_t *in, cbn_error *err);
/* Fixes the algorithm for this shape by name (a tuned choice coming out of a pickle). */
CBN_NODISCARD cbn_status cbn_plan_force(cbn_conv_plan *p, const int64_t *in, const char *impl,
                                        cbn_error *err);
/* All the memory the plan holds now, as the allocator counts it. */
size_t cbn_plan_bytes(const cbn_conv_plan *p);

/* x: [n][ic][in...], residual and y: [n][oc][out...], C-contiguous, of the plan's dtype. Blocks; no
 * Python inside. y may not overlap x or residual (the binding copies when they do). */
CBN_NODISCARD cbn_status cbn_plan_run(cbn_conv_plan *p, const void *x, int64_t n, const int64_t *in,
                                      const void *residual, void *y, cbn_error *err);

/* One algorithm. reason: why it was not taken (NULL: chosen); it may point to `text`, so a report must not be copied. */
typedef struct cbn_plan_candidate {
    const char *name;
    const char *reason;
    double seconds; /* measured by tuning; 0: not measured */
    char text[128];
} cbn_plan_candidate;
enum { CBN_MAX_IMPLS = 24 };
typedef struct cbn_plan_report {
    const char *isa, *algorithm;
    char tile[128];
    int ncandidates;
    cbn_plan_candidate candidates[CBN_MAX_IMPLS];
    bool tuned;
    /* Folded weights as they came, packed weights and tables of this shape, and all the plan holds now for whatever
     * shapes it has met. */
    size_t weight_bytes, packed_bytes, plan_bytes;
    size_t workspace_bytes, input_bytes, output_bytes; /* of a call of n images without residual */
    int64_t flops, flops_real;
} cbn_plan_report;
CBN_NODISCARD cbn_status cbn_plan_explain(cbn_conv_plan *p, int64_t n, const int64_t *in,
                                          cbn_plan_report *out, cbn_error *err);
const cbn_conv_geometry *cbn_plan_geometry(const cbn_conv_plan *p);
const cbn_plan_options *cbn_plan_get_options(const cbn_conv_plan *p);
/* The folded weights and bias the plan was made of, C-contiguous; bias is never NULL (zeros). For
 * pickling. */
const void *cbn_plan_weights(const cbn_conv_plan *p);
const void *cbn_plan_bias(const cbn_conv_plan *p);
#endif
