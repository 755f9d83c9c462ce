/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_tap and rows_copy of every table with all arrays between guard pages, on whole numbers. */
#include "check.h"
#include <math.h>

enum { MOST_NV = 40, MOST_TAPS = 30, MOST_MR = 8 };

/* One call; the lowest and the highest element it may read are both read. */
static void tap_case(const cbn_kernels *k, int mr, int64_t nv, int64_t ntaps, int64_t lanes, check_side side) {
    int64_t xpix[MOST_NV], ypix[MOST_NV], x_last = 0;
    int32_t tap[MOST_TAPS];
    for (int64_t v = 0; v < nv; v++) {
        xpix[v] = v == 0 ? 0 : check_range(0, 40);
        ypix[v] = v * lanes;
        x_last = CBN_MAX(x_last, xpix[v]);
    }
    int32_t tap_last = 0;
    for (int64_t t = 0; t < ntaps; t++) {
        tap[t] = t == 0 ? 0 : (int32_t)check_range(0, 50);
        tap_last = CBN_MAX(tap_last, tap[t]);
    }
    const int64_t y_oc = nv * lanes + check_range(0, 3), ny = (mr - 1) * y_oc + nv * lanes;
    const size_t nx = (size_t)(x_last + tap_last + k->lanes), nw = (size_t)(ntaps * mr);
    float *x = check_guard(nx * sizeof *x, side), *w = check_guard(nw * sizeof *w, side);
    float *y = check_guard((size_t)ny * sizeof *y, side), *bias = check_guard((size_t)mr * sizeof *bias, side);
    float *residual = check_range(0, 1) ? check_guard((size_t)ny * sizeof *residual, side) : NULL;
    int32_t *taps = check_guard((size_t)ntaps * sizeof *taps, side);
    for (int64_t t = 0; t < ntaps; t++) taps[t] = tap[t];
    check_fill_int(x, nx, -3, 3);
    check_fill_int(w, nw, -3, 3);
    check_fill_int(bias, (size_t)mr, -3, 3);
    check_sentinel_fill(y, (size_t)ny);
    if (residual) check_fill_int(residual, (size_t)ny, -3, 3);
    const float lo = check_range(0, 1) ? -INFINITY : -9.0f, hi = check_range(0, 1) ? INFINITY : 11.0f;
    /* One run of all taps, or runs that end with the last tap and leave out some between them. */
    const int64_t more = check_range(0, 3), skip = more > 0 ? check_range(0, 2) : 0;
    const int64_t per_run = (ntaps - more * skip) / (more + 1);
    const bool runs = more > 0 && per_run > 0 && per_run * (more + 1) + more * skip == ntaps;
    cbn_conv_tap_args a = {.x = x, .xpix = xpix, .tap = taps, .ntaps = ntaps, .w = w, .y = y, .ypix = ypix,
                           .y_oc = y_oc, .nv = nv, .lanes = lanes, .epi = {bias, residual, lo, hi}};
    if (runs) {
        a.ntaps = per_run;
        a.more_runs = more;
        a.skip = skip;
    }
    k->conv_tap(mr, &a);
    for (int64_t i = 0; i < ny; i++) {
        const int64_t c = i / y_oc, v = i % y_oc / lanes, l = i % y_oc % lanes;
        if (v >= nv) {
            CHECK_MSG(check_sentinel_is(y[i]), "%s mr=%d: wrote between the channels", k->isa, mr);
            continue;
        }
        float want = bias[c] + (residual ? residual[i] : 0.0f);
        for (int64_t t = 0; t < ntaps; t++) {
            if (runs && t % (per_run + skip) >= per_run) continue;
            want += w[t * mr + c] * x[xpix[v] + taps[t] + l];
        }
        want = want < lo ? lo : want > hi ? hi : want;
        if (!CHECK_MSG(y[i] == want, "%s mr=%d nv=%d lanes=%d [%d][%d][%d]: %g, want %g", k->isa, mr, (int)nv,
                       (int)lanes, (int)c, (int)v, (int)l, (double)y[i], (double)want))
            return;
    }
}

CHECK_TEST(conv_tap) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int mr = 1; mr <= (*t)->tap_mr; mr++) {
            const int most = cbn_tap_nv(*t, mr);
            for (int64_t nv = 1; nv <= 2 * most + 2; nv++) {
                for (int i = 0; i < 4; i++) {
                    const size_t mark = check_mark();
                    tap_case(*t, mr, nv, check_range(1, MOST_TAPS), i < 2 ? (*t)->lanes : check_range(1, (*t)->lanes),
                             i % 2 ? CHECK_LEFT : CHECK_RIGHT);
                    check_release(mark);
                }
                if (check_failures()) return;
            }
        }
    }
}

CHECK_TEST(rows_copy) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        const int64_t lanes = (*t)->lanes;
        for (int i = 0; i < 2000; i++) {
            const size_t mark = check_mark();
            const check_side side = i % 2 ? CHECK_LEFT : CHECK_RIGHT;
            const int64_t w = check_range(0, 5 * lanes + 3), step = check_range(1, 4), n = check_range(0, 6) * lanes;
            const int64_t ic = check_range(1, 3), rows = check_range(1, 3), x0 = check_range(-3 * lanes, w + 2);
            const size_t nx = (size_t)(ic * rows * w), nt = (size_t)(ic * rows * n);
            float *x = check_guard(nx * sizeof *x, side), *to = check_guard(nt * sizeof *to, side);
            check_fill_int(x, nx, -9, 9);
            check_sentinel_fill(to, nt);
            const cbn_rows_copy_args a = {.to = to, .to_ic = n, .to_row = ic * n, .x = x, .x_ic = rows * w,
                                          .x_row = w, .ic = ic, .rows = rows, .n = n, .x0 = x0, .step = step, .w = w};
            (*t)->rows_copy(&a);
            for (int64_t j = 0; j < (int64_t)nt; j++) {
                const int64_t at = x0 + j % n * step, c = j / n % ic, r = j / n / ic;
                const float want = at >= 0 && at < w ? x[(c * rows + r) * w + at] : 0.0f;
                if (!CHECK_MSG(to[j] == want, "%s w=%d x0=%d step=%d [%d]: %g, want %g", (*t)->isa, (int)w, (int)x0,
                               (int)step, (int)j, (double)to[j], (double)want))
                    return;
            }
            check_release(mark);
        }
    }
}
