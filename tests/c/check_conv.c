/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_oc and conv_px of every table with all arrays between guard pages, and the algorithms built
 * on them with several threads. Values are checked too, but what this file is for is what Python
 * cannot see: an access one element outside. */
#include "check.h"
#include "base/cbn_alloc.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"
#include <math.h>
#include <string.h>

/* A copy of n floats whose outer edge is a guard page. */
static float *guarded(const float *from, size_t n, check_side side) {
    float *p = check_guard(n * sizeof *p, side);
    if (from) memcpy(p, from, n * sizeof *p);
    return p;
}

static float clamped(float v, float lo, float hi) { return v < lo ? lo : v > hi ? hi : v; }

/* ---- conv_oc --------------------------------------------------------------------------------- */
enum { MOST_TAPS = 4, MOST_IC = 5, MOST_NP = 16, MOST_VW = 64 };
typedef enum { STORE_ACC, STORE_ROWS, STORE_POINTS, STORE_LANES } store_kind;

static void oc_case(const cbn_kernels *k, int np, int nv, int valid, int64_t ic, int64_t ntaps,
                    store_kind store, check_side side) {
    const int64_t vw = (int64_t)nv * k->lanes, x_ic = 7, w_ic = ntaps * vw;
    int64_t xpix[MOST_NP], ypix[MOST_NP], tap_x[MOST_TAPS], tap_w[MOST_TAPS];
    float sums[MOST_NP][MOST_VW] = {{0}}, xs[128], ws[MOST_IC * MOST_TAPS * MOST_VW], bias[MOST_VW];
    /* Lowest and highest element are both read, so that an access beyond either edge meets the
     * page. */
    for (int p = 0; p < np; p++) xpix[p] = p == 0 ? 0 : check_range(0, 12);
    for (int64_t t = 0; t < ntaps; t++)
        tap_x[t] = t == 0 ? 0 : check_range(0, 9), tap_w[t] = t * vw;
    int64_t nx = 0;
    for (int p = 0; p < np; p++)
        for (int64_t t = 0; t < ntaps; t++)
            nx = CBN_MAX(nx, xpix[p] + tap_x[t] + (ic - 1) * x_ic + 1);
    check_fill_int(xs, 128, -3, 3);
    check_fill_int(ws, (size_t)(ic * w_ic), -3, 3);
    check_fill_int(bias, MOST_VW, -3, 3);
    for (int64_t i = 0; i < ic; i++)
        for (int64_t t = 0; t < ntaps; t++)
            for (int p = 0; p < np; p++)
                for (int64_t c = 0; c < vw; c++)
                    sums[p][c] += ws[i * w_ic + tap_w[t] + c] * xs[xpix[p] + i * x_ic + tap_x[t]];

    const int64_t y_oc = store == STORE_ROWS ? np + 2 : store == STORE_POINTS ? 2 * np : 1;
    int64_t ny = 0;
    for (int p = 0; p < np; p++) {
        ypix[p] = store == STORE_POINTS ? 2 * p : store == STORE_LANES ? p * (valid + 3) : p;
        ny = CBN_MAX(ny, ypix[p] + (valid - 1) * y_oc + 1);
    }
    float *y = guarded(NULL, (size_t)ny, side);
    check_sentinel_fill(y, (size_t)ny);
    float *residual = guarded(NULL, (size_t)ny, side);
    check_fill_int(residual, (size_t)ny, -3, 3);
    cbn_conv_oc_args a = {.x = guarded(xs, (size_t)CBN_MAX(nx, 0), side),
                          .xpix = xpix,
                          .x_ic = x_ic,
                          .w = guarded(ws, (size_t)(ic * w_ic), side),
                          .w_ic = w_ic,
                          .ic = ic,
                          .ntaps = ntaps,
                          .tap_x = tap_x,
                          .tap_w = tap_w,
                          .ypix = ypix,
                          .y_oc = y_oc,
                          .oc_valid = valid,
                          .y_run = store == STORE_ROWS,
                          .epi = {guarded(bias, (size_t)valid, side), residual, -20.0f, 25.0f}};
    if (store == STORE_ACC) {
        a.acc = guarded(NULL, (size_t)(np * vw), side);
        check_fill_int(a.acc, (size_t)(np * vw), -3, 3);
        float before[MOST_NP * MOST_VW];
        memcpy(before, a.acc, (size_t)(np * vw) * sizeof(float));
        a.load_acc = true;
        k->conv_oc(np, nv, &a);
        for (int64_t e = 0; e < np * vw; e++) {
            const float want = before[e] + sums[e / vw][e % vw];
            if (!CHECK_MSG(a.acc[e] == want, "%s %dx%d acc[%d] %g != %g", k->isa, np, nv, (int)e,
                           a.acc[e], want))
                return;
        }
        return;
    }
    a.y = y;
    k->conv_oc(np, nv, &a);
    for (int64_t e = 0; e < ny; e++) {
        bool written = false;
        float want = 0.0f;
        for (int p = 0; p < np && !written; p++) {
            const int64_t c = (e - ypix[p]) / y_oc;
            written = e >= ypix[p] && (e - ypix[p]) % y_oc == 0 && c < valid;
            if (written) want = clamped(sums[p][c] + bias[c] + residual[e], -20.0f, 25.0f);
        }
        const bool good = written ? y[e] == want : check_sentinel_is(y[e]);
        if (!CHECK_MSG(good, "%s %dx%d valid %d store %d: y[%d] = %g, expected %g", k->isa, np, nv,
                       valid, (int)store, (int)e, y[e], want))
            return;
    }
}

CHECK_TEST(conv_oc_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int np = 1; np <= (*t)->oc_np; np++) {
            for (int nv = 1; nv <= (*t)->oc_nv; nv++) {
                const int vw = nv * (*t)->lanes,
                          valids[] = {1, CBN_MAX(vw - 1, 1), vw, (int)check_range(1, vw)};
                for (int store = STORE_ACC; store <= STORE_LANES; store++) {
                    for (size_t v = 0; v < sizeof valids / sizeof valids[0]; v++) {
                        const size_t mark = check_mark();
                        const check_side side = check_rand() & 1 ? CHECK_LEFT : CHECK_RIGHT;
                        oc_case(*t, np, nv, valids[v], check_range(1, MOST_IC),
                                check_range(0, MOST_TAPS), store, side);
                        check_release(mark);
                    }
                }
            }
        }
    }
}

/* ---- conv_px --------------------------------------------------------------------------------- */
static void px_case(const cbn_kernels *k, int np, int valid, int64_t ic, check_side side) {
    const int64_t x_ic = np + 1, y_oc = np + 2, ny = (valid - 1) * y_oc + np,
                  nx = (ic - 1) * x_ic + np;
    const int mr = k->px_mr;
    const int64_t nw = cbn_ceil_div(valid, mr) * ic * mr;
    float *x = guarded(NULL, (size_t)nx, side), *w = guarded(NULL, (size_t)nw, side);
    float *y = guarded(NULL, (size_t)ny, side), *residual = guarded(NULL, (size_t)ny, side);
    float *bias = guarded(NULL, (size_t)valid, side);
    check_fill_int(x, (size_t)nx, -3, 3);
    check_fill_int(w, (size_t)nw, -3, 3);
    check_fill_int(residual, (size_t)ny, -3, 3);
    check_fill_int(bias, (size_t)valid, -3, 3);
    check_sentinel_fill(y, (size_t)ny);
    const cbn_conv_px_args a = {.x = x,
                                .x_ic = x_ic,
                                .w = w,
                                .mr = mr,
                                .ic = ic,
                                .y = y,
                                .y_oc = y_oc,
                                .oc_valid = valid,
                                .np = np,
                                .epi = {bias, residual, -20.0f, 25.0f}};
    k->conv_px(&a);
    for (int64_t e = 0; e < ny; e++) {
        const int64_t c = e / y_oc, p = e % y_oc;
        float want = p < np ? bias[c] + residual[e] : 0.0f;
        for (int64_t i = 0; i < ic && p < np; i++) want += w[(c / mr * ic + i) * mr + c % mr] * x[i * x_ic + p];
        const bool good = p < np ? y[e] == clamped(want, -20.0f, 25.0f) : check_sentinel_is(y[e]);
        if (!CHECK_MSG(good, "%s np %d valid %d: y[%d] = %g", k->isa, np, valid, (int)e, y[e]))
            return;
    }
}

CHECK_TEST(conv_px_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int np = 1; np <= (*t)->px_nv * (*t)->lanes; np++) {
            const size_t mark = check_mark();
            for (int side = 0; side < 2; side++)
                for (int blocks = 1; blocks <= 6; blocks++)
                    px_case(*t, np, (int)check_range((blocks - 1) * (*t)->px_mr + 1, blocks * (*t)->px_mr),
                            check_range(1, MOST_IC), side ? CHECK_LEFT : CHECK_RIGHT);
            check_release(mark);
        }
    }
}

/* ---- direct and pointwise: threads, scratch, memory of the image ----------------------------- */
typedef struct problem {
    int64_t n, g, icg, ocg, in[2], k[2], stride[2], pad[2], dil[2];
    bool transposed;
} problem;

/* Big enough for several threads; ragged; a transposed one whose regions have rows of taps but no
 * columns. */
static const problem problems[] = {
    {1, 1, 19, 70, {23, 29}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, false},
    {2, 1, 40, 130, {15, 15}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, false},
    {1, 2, 33, 50, {30, 31}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, false},
    {1, 1, 70, 96, {21, 20}, {1, 1}, {2, 2}, {0, 0}, {1, 1}, false},
    {1, 1, 30, 64, {17, 16}, {5, 4}, {1, 1}, {6, 6}, {3, 4}, false},
    {2, 1, 30, 40, {17, 13}, {3, 2}, {2, 3}, {0, 1}, {1, 3}, true},
    {1, 4, 12, 40, {20, 20}, {1, 1}, {3, 3}, {0, 0}, {1, 1}, true},
    {1, 1, 3, 64, {60, 50}, {7, 7}, {2, 2}, {3, 3}, {1, 1}, false},
};

static void problem_run(const cbn_kernels *k, const problem *p, const cbn_conv_impl *impl,
                        check_side side) {
    cbn_conv_geometry geo = {.dtype = CBN_F32, .nd = 2, .g = p->g, .transposed = p->transposed};
    for (int i = 0; i < 2; i++)
        geo.stride[i] = p->stride[i], geo.dil[i] = p->dil[i], geo.pad[i] = p->pad[i];
    const int64_t ic = p->g * p->icg, oc = p->g * p->ocg;
    const int64_t shape[4] = {p->transposed ? ic : oc, p->transposed ? p->ocg : p->icg, p->k[0],
                              p->k[1]};
    cbn_conv_desc d;
    cbn_error err;
    if (!CHECK(cbn_conv_geometry_check(&geo, shape, -1, &err) == CBN_OK)) return;
    if (!CHECK(cbn_conv_desc_make(&geo, 1, ic, p->in, &d, NULL, &err) == CBN_OK)) return;
    const cbn_conv_context ctx = {.kernels = k, .precision = CBN_PRECISION_FP32};
    const char *why_not = NULL;
    if (!impl->supports(&d, &ctx, &why_not)) {
        CHECK(why_not != NULL);
        return;
    }
    const size_t nx = (size_t)(p->n * ic * d.in[1] * d.in[2]),
                 ny = (size_t)(p->n * oc * d.out[1] * d.out[2]);
    const size_t nw = (size_t)(shape[0] * shape[1] * p->k[0] * p->k[1]);
    float *x = guarded(NULL, nx, side), *w = guarded(NULL, nw, side),
          *bias = guarded(NULL, (size_t)oc, side);
    float *y = guarded(NULL, ny, side), *want = guarded(NULL, ny, side),
          *residual = guarded(NULL, ny, side);
    check_fill_int(x, nx, -2, 2);
    check_fill_int(w, nw, -2, 2);
    check_fill_int(bias, (size_t)oc, -2, 2);
    check_fill_int(residual, ny, -9, 9);
    void *state = NULL, *reference = NULL;
    cbn_conv_call call = {.x = x,
                          .residual = residual,
                          .y = want,
                          .n = p->n,
                          .bias = bias,
                          .lo = -INFINITY,
                          .hi = INFINITY};
    CHECK(cbn_conv_ref.prepare(&d, &ctx, w, &reference, &err) == CBN_OK);
    CHECK(cbn_conv_ref.run(&d, &ctx, reference, &call, &err) == CBN_OK);
    cbn_conv_ref.destroy(reference);
    if (!cbn_conv_ref.fused_epilogue)
        for (size_t i = 0; i < ny; i++) want[i] += residual[i];
    for (size_t i = 0; i < ny; i++) want[i] = clamped(want[i], -30.0f, 40.0f);
    call.lo = -30.0f;
    call.hi = 40.0f;
    call.y = y;
    CHECK(impl->prepare(&d, &ctx, w, &state, &err) == CBN_OK);
    for (int threads = 1; threads <= 3; threads++) {
        call.max_threads = threads;
        check_sentinel_fill(y, ny);
        CHECK(impl->run(&d, &ctx, state, &call, &err) == CBN_OK);
        check_equal_f32(y, want, ny, "%s %s, problem %d, %d threads", k->isa, impl->name,
                        (int)(p - problems), threads);
    }
    cbn_alloc_fail_after(0);
    const cbn_status status = impl->run(&d, &ctx, state, &call, &err);
    CHECK(status == CBN_OK || status == CBN_NO_MEMORY);
    cbn_alloc_fail_after(-1);
    impl->destroy(state);
}

static void problems_run(const cbn_conv_impl *impl) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (size_t i = 0; i < sizeof problems / sizeof problems[0]; i++) {
            const size_t mark = check_mark();
            problem_run(*t, &problems[i], impl, i & 1 ? CHECK_LEFT : CHECK_RIGHT);
            check_release(mark);
        }
    }
}

CHECK_TEST(direct_equals_the_reference) { problems_run(&cbn_conv_direct); }
CHECK_TEST(pointwise_equals_the_reference) { problems_run(&cbn_conv_pointwise); }

/* ---- speed ----------------------------------------------------------------------------------- */
CHECK_BENCH(fma_peak) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        double flops;
        float sink;
        const double start = check_seconds();
        (*t)->fma_peak(200000, &flops, &sink);
        check_report((*t)->isa, "GFLOP/s", flops / (check_seconds() - start) * 1e-9);
    }
}
