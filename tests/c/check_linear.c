/* SPDX-License-Identifier: BSD-3-Clause */
/* linear, linear_raw, and conv_px over several blocks with and without its copy, of every table: all arrays between
 * guard pages, on whole numbers. */
#include "check.h"
#include <math.h>

static float clamped(float v, float lo, float hi) { return v < lo ? lo : v > hi ? hi : v; }

static float *guarded(int64_t n, check_side side) {
    float *p = check_guard((size_t)n * sizeof *p, side);
    check_fill_int(p, (size_t)n, -3, 3);
    return p;
}

static void linear_case(const cbn_kernels *k, int np, int64_t ic, int64_t oc, check_side side) {
    const int64_t width = 2 * k->lanes, blocks = cbn_ceil_div(oc, width), cut = check_range(0, (int)ic);
    const int64_t x_p = ic + check_range(0, 2), y_p = oc + check_range(0, 2);
    const int64_t nx = (np - 1) * x_p + ic, ny = (np - 1) * y_p + oc;
    float *x = guarded(nx, side), *w = guarded(blocks * ic * width, side), *bias = guarded(oc, side);
    float *residual = check_range(0, 1) ? guarded(ny, side) : NULL, *y = guarded(ny, side);
    check_sentinel_fill(y, (size_t)ny);
    cbn_linear_args a = {.x = x, .x_p = x_p, .w = w, .w_b = ic * width, .ic = cut, .y = y, .y_p = y_p, .oc_valid = oc,
                         .first = true, .last = cut == ic, .epi = {bias, residual, -30.0f, INFINITY}};
    k->linear(np, &a);
    if (cut < ic) { /* the sum in two pieces */
        a.x += cut;
        a.w += cut * width;
        a.ic = ic - cut;
        a.first = false;
        a.last = true;
        k->linear(np, &a);
    }
    for (int64_t e = 0; e < ny; e++) {
        const int64_t p = e / y_p, c = e % y_p;
        float want = 0.0f;
        for (int64_t i = 0; i < ic && c < oc; i++) want += w[(c / width * ic + i) * width + c % width] * x[p * x_p + i];
        if (c < oc) want = clamped(want + bias[c] + (residual ? residual[e] : 0.0f), -30.0f, INFINITY);
        const bool good = c < oc ? y[e] == want : check_sentinel_is(y[e]);
        if (!CHECK_MSG(good, "%s rows %d ic %d oc %d cut %d: y[%d] = %g, want %g", k->isa, np, (int)ic, (int)oc,
                       (int)cut, (int)e, (double)y[e], (double)want))
            return;
    }
}

CHECK_TEST(linear_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int np = 1; np <= CBN_LINEAR_ROWS; np++) {
            for (int i = 0; i < 40; i++) {
                const size_t mark = check_mark();
                linear_case(*t, np, check_range(1, 9), check_range(1, 12 * (*t)->lanes),
                            i % 2 ? CHECK_LEFT : CHECK_RIGHT);
                check_release(mark);
                if (check_failures()) return;
            }
        }
    }
}

static void raw_case(const cbn_kernels *k, int np, int64_t ic, int64_t oc, check_side side) {
    const int64_t x_p = ic + check_range(0, 2), y_p = oc + check_range(0, 2), w_p = ic + check_range(0, 2);
    const int64_t nx = (np - 1) * x_p + ic, ny = (np - 1) * y_p + oc;
    float *x = guarded(nx, side), *w = guarded((oc - 1) * w_p + ic, side), *bias = guarded(oc, side);
    float *residual = check_range(0, 1) ? guarded(ny, side) : NULL, *y = guarded(ny, side);
    check_sentinel_fill(y, (size_t)ny);
    const cbn_linear_args a = {.x = x, .x_p = x_p, .w = w, .w_b = w_p, .ic = ic, .y = y, .y_p = y_p, .oc_valid = oc,
                               .first = true, .last = true, .epi = {bias, residual, -30.0f, INFINITY}};
    k->linear_raw(np, &a);
    for (int64_t e = 0; e < ny; e++) {
        const int64_t p = e / y_p, c = e % y_p;
        float want = 0.0f;
        for (int64_t i = 0; i < ic && c < oc; i++) want += w[c * w_p + i] * x[p * x_p + i];
        if (c < oc) want = clamped(want + bias[c] + (residual ? residual[e] : 0.0f), -30.0f, INFINITY);
        const bool good = c < oc ? y[e] == want : check_sentinel_is(y[e]);
        if (!CHECK_MSG(good, "%s raw, rows %d ic %d oc %d: y[%d] = %g, want %g", k->isa, np, (int)ic, (int)oc, (int)e,
                       (double)y[e], (double)want))
            return;
    }
}

CHECK_TEST(linear_raw_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int np = 1; np <= CBN_LINEAR_RAW_ROWS; np++) {
            for (int i = 0; i < 60; i++) {
                const size_t mark = check_mark();
                raw_case(*t, np, i < 30 ? check_range(1, 9) : check_range(10, 70), check_range(1, 5 * (*t)->lanes),
                         i % 2 ? CHECK_LEFT : CHECK_RIGHT);
                check_release(mark);
                if (check_failures()) return;
            }
        }
    }
}

static void blocks_case(const cbn_kernels *k, int mr, int np, int64_t oc, int64_t ic, bool copying, check_side side) {
    const int64_t pitch = cbn_ceil_div(np, k->lanes) * k->lanes, blocks = cbn_ceil_div(oc, mr);
    const bool padded = !copying && check_range(0, 1);
    const int64_t x_ic = padded ? pitch : np + 1, nx = (ic - 1) * x_ic + (padded ? pitch : np);
    const int64_t y_oc = np + 2, ny = (oc - 1) * y_oc + np;
    float *x = guarded(nx, side), *w = guarded(blocks * ic * mr, side), *bias = guarded(oc, side);
    float *residual = check_range(0, 1) ? guarded(ny, side) : NULL, *y = guarded(ny, side);
    float *copy = copying ? guarded(ic * pitch, side) : NULL;
    check_sentinel_fill(y, (size_t)ny);
    const cbn_conv_px_args a = {.x = x, .x_ic = x_ic, .x_padded = padded, .copy = copy, .w = w, .mr = mr, .ic = ic,
                                .y = y, .y_oc = y_oc, .oc_valid = (int32_t)oc, .np = np, .prefetch = x,
                                .prefetch_step = 1, .epi = {bias, residual, -INFINITY, 40.0f}};
    k->conv_px(&a);
    for (int64_t e = 0; e < ny; e++) {
        const int64_t c = e / y_oc, p = e % y_oc;
        float want = 0.0f;
        for (int64_t i = 0; i < ic && p < np; i++) want += w[(c / mr * ic + i) * mr + c % mr] * x[i * x_ic + p];
        if (p < np) want = clamped(want + bias[c] + (residual ? residual[e] : 0.0f), -INFINITY, 40.0f);
        const bool good = p < np ? y[e] == want : check_sentinel_is(y[e]);
        if (!CHECK_MSG(good, "%s mr %d np %d oc %d: y[%d] = %g, want %g", k->isa, mr, np, (int)oc, (int)e,
                       (double)y[e], (double)want))
            return;
    }
    for (int64_t i = 0; copying && i < ic; i++)
        for (int64_t p = 0; p < pitch; p++)
            if (!CHECK_MSG(copy[i * pitch + p] == (p < np ? x[i * x_ic + p] : 0.0f), "%s copy[%d][%d] of %d", k->isa,
                           (int)i, (int)p, np))
                return;
}

CHECK_TEST(conv_px_blocks) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int mr = CBN_PX_MR_MIN((*t)->px_mr); mr <= (*t)->px_mr; mr++) {
            for (int np = 1; np <= (*t)->px_nv * (*t)->lanes; np++) {
                for (int i = 0; i < 4; i++) {
                    const size_t mark = check_mark();
                    blocks_case(*t, mr, np, check_range(1, 4 * mr), check_range(1, 6), i < 2,
                                i % 2 ? CHECK_LEFT : CHECK_RIGHT);
                    check_release(mark);
                    if (check_failures()) return;
                }
            }
        }
    }
}
