/* SPDX-License-Identifier: BSD-3-Clause */
/* Running a plan. Around the algorithm's own run stand up to four steps, each only where needed:
 * explicit padding (non-zero padding modes), widening float16 to float32, what the algorithm does
 * not fuse (residual, activation), and rounding back once. Staged calls go through the batch in
 * pieces, so that their scratch stays small for any batch; which images share a piece has no
 * influence on the results. */
#include "ops/conv_plan_priv.h"

#include "base/cbn_alloc.h"
#include "ops/nn_ops.h"
#include "threads/cbn_parallel.h"

#include <math.h>
#include <string.h>

/* Half of what one layer may use as workspace. A single image that needs more gets it. */
static const int64_t STAGE_BYTES = INT64_C(4) << 20;

/* Elements of the pieces' buffers for one image; 0: not needed. */
typedef struct stage_sizes {
    int64_t padded;         /* plan's dtype */
    int64_t x, residual, y; /* float32, float16 plans only */
} stage_sizes;

static stage_sizes stage_elems(const cbn_conv_plan *p, const cbn_plan_shape *s, bool residual) {
    const bool wide = p->g.dtype == CBN_F16;
    return (stage_sizes){.padded = s->padded ? s->xp_elems : 0,
                         .x = wide ? s->xp_elems : 0,
                         .residual = wide && residual ? s->y_elems : 0,
                         .y = wide ? s->y_elems : 0};
}

static size_t padded_bytes(const cbn_conv_plan *p, const stage_sizes *z, int64_t images) {
    return cbn_whole_lines((size_t)(images * z->padded) * cbn_dtype_size(p->g.dtype));
}

static size_t wide_bytes(int64_t elems, int64_t images) {
    return cbn_whole_lines((size_t)(images * elems) * sizeof(float));
}

size_t cbn_plan_stage_bytes(const cbn_conv_plan *p, const cbn_plan_shape *s, int64_t images,
                            bool residual) {
    const stage_sizes z = stage_elems(p, s, residual);
    return padded_bytes(p, &z, images) + wide_bytes(z.x, images) + wide_bytes(z.residual, images) +
           wide_bytes(z.y, images);
}

int64_t cbn_plan_stage_images(const cbn_conv_plan *p, const cbn_plan_shape *s, int64_t n,
                              bool residual) {
    const int64_t one = (int64_t)cbn_plan_stage_bytes(p, s, 1, residual);
    if (one == 0) return n;
    return CBN_MIN(n, CBN_MAX(1, STAGE_BYTES / one));
}

/* ---- float16 ---- */
typedef struct convert_job {
    const cbn_kernels *kernels;
    float *wide;
    uint16_t *narrow;
} convert_job;

/* About 0.2 ns an element. */
static const int64_t CONVERT_GRAIN = 1 << 16;

static void widen_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const convert_job *j = arg;
    j->kernels->widen_f16(j->wide + begin, j->narrow + begin, end - begin);
}

static void narrow_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const convert_job *j = arg;
    j->kernels->narrow_f16(j->narrow + begin, j->wide + begin, end - begin);
}

static void widen(const cbn_conv_plan *p, const void *src, float *to, int64_t n) {
    /* The job is shared with narrowing; this direction only reads `narrow`. */
    convert_job j = {p->ctx.kernels, to, (uint16_t *)(uintptr_t)src};
    cbn_parallel_for(n, CONVERT_GRAIN, 0, widen_range, &j);
}

static void narrow(const cbn_conv_plan *p, float *src, void *to, int64_t n) {
    convert_job j = {p->ctx.kernels, src, to};
    cbn_parallel_for(n, CONVERT_GRAIN, 0, narrow_range, &j);
}

/* ---- images with an Inf or NaN that an algorithm would spread ---- */
enum { REDO_HERE = 64 };

size_t cbn_plan_redo_bytes(const cbn_conv_impl *impl, int64_t n) {
    return impl->spreads_nonfinite && n > REDO_HERE ? (size_t)n : 0;
}

static cbn_status redo_images(const cbn_conv_plan *p, cbn_plan_shape *s, cbn_conv_call call,
                              const uint8_t *redo, cbn_error *err) {
    const int64_t images = call.n;
    const size_t elem = cbn_dtype_size(s->d.dtype), x_bytes = (size_t)s->xp_elems * elem,
                 y_bytes = (size_t)s->y_elems * elem;
    const char *x = call.x, *residual = call.residual;
    char *y = call.y;
    call.n = 1;
    call.redo = NULL;
    for (int64_t i = 0; i < images; ++i) {
        if (!redo[i]) continue;
        CBN_TRY(cbn_plan_state_ensure(p, s, CBN_PLAN_direct, err));
        call.x = x + (size_t)i * x_bytes;
        call.residual = residual ? residual + (size_t)i * y_bytes : NULL;
        call.y = y + (size_t)i * y_bytes;
        CBN_TRY(cbn_conv_direct.run(
            &s->d, &p->ctx, atomic_load_explicit(&s->state[CBN_PLAN_direct], memory_order_acquire),
            &call, err));
    }
    return CBN_OK;
}

static cbn_status run_algorithm(const cbn_conv_plan *p, cbn_plan_shape *s, int index,
                                cbn_conv_call *call, cbn_error *err) {
    const cbn_conv_impl *impl = cbn_plan_impls[index];
    CBN_TRY(cbn_plan_state_ensure(p, s, index, err));
    const void *state = atomic_load_explicit(&s->state[index], memory_order_acquire);
    if (!impl->spreads_nonfinite) return impl->run(&s->d, &p->ctx, state, call, err);
    assert(impl->fused_epilogue && cbn_conv_direct.fused_epilogue);
    uint8_t here[REDO_HERE] = {0}, *redo = here;
    if (call->n > REDO_HERE) {
        redo = cbn_scratch_get((size_t)call->n);
        if (!redo) return cbn_fail_memory(err, "scratch of a convolution", (size_t)call->n);
        memset(redo, 0, (size_t)call->n);
    }
    call->redo = redo;
    cbn_status status = impl->run(&s->d, &p->ctx, state, call, err);
    if (status == CBN_OK) status = redo_images(p, s, *call, redo, err);
    if (redo != here) cbn_scratch_put(redo);
    return status;
}

/* ---- BatchNorm that was not folded into the weights ---- */
typedef struct scale_job {
    const float *scale, *shift;
    float *y;
    int64_t oc, plane;
} scale_job;

/* Planes [begin, end) of all images. */
static void scale_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const scale_job *j = arg;
    for (int64_t i = begin; i < end; ++i) {
        const float scale = j->scale[i % j->oc], shift = j->shift[i % j->oc];
        float *y = j->y + i * j->plane;
        for (int64_t k = 0; k < j->plane; ++k) y[k] = y[k] * scale + shift;
    }
}

static void scale_outputs(const cbn_conv_plan *p, const cbn_plan_shape *s, int64_t n, float *y) {
    scale_job job = {p->opt.scale, p->opt.shift, y, p->g.oc, s->y_elems / p->g.oc};
    cbn_parallel_for(n * p->g.oc, 1 + CONVERT_GRAIN / job.plane, 0, scale_range, &job);
}

/* ---- one piece ---- */
/* x, residual and y are in the computation's dtype; x is padded. */
static cbn_status run_computed(const cbn_conv_plan *p, cbn_plan_shape *s, const void *x,
                               int64_t n, const void *residual, void *y, cbn_error *err) {
    const int index = cbn_plan_choice(s);
    const cbn_conv_impl *impl = cbn_plan_impls[index];
    const bool clamp = impl->fused_epilogue && p->clamps;
    cbn_conv_call call = {.x = x,
                          .residual = impl->fused_epilogue ? residual : NULL,
                          .y = y,
                          .n = n,
                          .bias = p->wide_b ? p->wide_b : p->b,
                          .lo = clamp ? p->lo : -INFINITY,
                          .hi = clamp ? p->hi : INFINITY};
    CBN_TRY(run_algorithm(p, s, index, &call, err));
    if (p->opt.scale) {
        assert(s->d.dtype == CBN_F32 && !residual && p->opt.activation == CBN_ACT_NONE);
        scale_outputs(p, s, n, y);
        return CBN_OK;
    }
    const int64_t total = n * s->y_elems, one = 1;
    if (residual && !impl->fused_epilogue)
        CBN_TRY(cbn_binary(s->d.dtype, CBN_BINARY_ADD, 1, &total, y, &one, residual, &one, 1.0, y,
                           err));
    if (!clamp && p->opt.activation != CBN_ACT_NONE)
        CBN_TRY(
            cbn_unary(s->d.dtype, p->opt.activation, p->opt.act_a, p->opt.act_b, y, y, total, err));
    return CBN_OK;
}

static cbn_status pad_images(const cbn_conv_plan *p, const cbn_plan_shape *s, const void *x,
                             int64_t n, void *to, cbn_error *err) {
    int64_t shape[2 + CBN_MAX_SPATIAL] = {n, p->g.ic}, lo[2 + CBN_MAX_SPATIAL] = {0},
                      hi[2 + CBN_MAX_SPATIAL] = {0};
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a) {
        shape[2 + a] = s->image[a];
        lo[2 + a] = s->pad[a][0];
        hi[2 + a] = s->pad[a][1];
    }
    return cbn_pad(p->g.dtype, 2 + CBN_MAX_SPATIAL, shape, lo, hi, p->g.pad_mode, 0.0, x, to, err);
}

static cbn_status run_staged(const cbn_conv_plan *p, cbn_plan_shape *s, const char *x,
                             int64_t n, const char *residual, char *y, cbn_error *err) {
    const stage_sizes z = stage_elems(p, s, residual != NULL);
    const int64_t piece = cbn_plan_stage_images(p, s, n, residual != NULL);
    const size_t elem = cbn_dtype_size(p->g.dtype),
                 bytes = cbn_plan_stage_bytes(p, s, piece, residual != NULL);
    char *block = cbn_scratch_get(bytes);
    if (!block) return cbn_fail_memory(err, "scratch of a convolution", bytes);
    char *padded = block;
    float *wide_x = (float *)(void *)(padded + padded_bytes(p, &z, piece));
    float *wide_residual = wide_x + wide_bytes(z.x, piece) / sizeof(float);
    float *wide_y = wide_residual + wide_bytes(z.residual, piece) / sizeof(float);
    const bool wide = z.y != 0;
    cbn_status status = CBN_OK;
    for (int64_t i = 0; i < n && status == CBN_OK; i += piece) {
        const int64_t m = CBN_MIN(piece, n - i);
        const void *px = x + (size_t)(i * s->x_elems) * elem;
        const void *pr = residual ? residual + (size_t)(i * s->y_elems) * elem : NULL;
        void *py = y + (size_t)(i * s->y_elems) * elem;
        if (z.padded) {
            status = pad_images(p, s, px, m, padded, err);
            if (status != CBN_OK) break;
            px = padded;
        }
        if (!wide) {
            status = run_computed(p, s, px, m, pr, py, err);
            continue;
        }
        widen(p, px, wide_x, m * s->xp_elems);
        if (pr) widen(p, pr, wide_residual, m * s->y_elems);
        status = run_computed(p, s, wide_x, m, pr ? wide_residual : NULL, wide_y, err);
        if (status == CBN_OK) narrow(p, wide_y, py, m * s->y_elems);
    }
    cbn_scratch_put(block);
    return status;
}

cbn_status cbn_plan_run(cbn_conv_plan *p, const void *x, int64_t n, const int64_t *in,
                        const void *residual, void *y, cbn_error *err) {
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_shape_acquire(p, in, &s, err));
    cbn_status status;
    if (n < 0 || n > s->max_n) {
        cbn_conv_desc d;
        status = cbn_conv_desc_make(&p->g, n, p->g.ic, in, &d, NULL, err);
        if (status == CBN_OK)
            status = cbn_fail(err, CBN_BAD_VALUE, "input: expected a batch size <= %lld, got %lld",
                              (long long)s->max_n, (long long)n);
    } else if (n == 0) {
        status = CBN_OK;
    } else if (s->padded || p->g.dtype == CBN_F16) {
        status = run_staged(p, s, x, n, residual, y, err);
    } else {
        status = run_computed(p, s, x, n, residual, y, err);
    }
    cbn_plan_shape_release(s);
    return status;
}
