/* SPDX-License-Identifier: BSD-3-Clause */
/* wino_weights of every table between guard pages, on whole numbers: with 4 points all results are multiples of 1/4. */
#include "check.h"
#include "ops/wino_matrix.h"

static void weights_case(const cbn_kernels *k, int n, check_side side) {
    const int L = k->lanes, nw = n, nh = check_range(0, 1) ? n : 1, r = n == 4 ? 3 : 2, mw = n - r + 1;
    const int high = nh == 1 ? 1 : r, wide = r;
    const int64_t taps = high * wide + check_range(0, 2), channels = check_range(1, 4), points = nh * nw;
    double gh[CBN_WINO_POINTS][CBN_WINO_POINTS], gw[CBN_WINO_POINTS][CBN_WINO_POINTS];
    cbn_wino_g(nh, nh == 1 ? 1 : mw, gh);
    cbn_wino_g(nw, mw, gw);
    int32_t *tap = check_guard((size_t)(high * wide) * sizeof *tap, side);
    for (int i = 0; i < high * wide; i++) tap[i] = check_range(0, 4) ? (int32_t)(taps - 1 - i) * L : -1;
    float *w = check_guard((size_t)(channels * taps * L) * sizeof *w, side);
    check_fill_int(w, (size_t)(channels * taps * L), -8, 8);
    float *u = check_guard((size_t)(points * channels * L) * sizeof *u, side);
    check_sentinel_fill(u, (size_t)(points * channels * L));
    const cbn_wino_weights_args a = {.nh = nh, .nw = nw, .high = high, .wide = wide, .gh = gh[0], .gw = gw[0], .w = w,
                                     .w_c = taps * L, .tap = tap, .u = u, .u_c = L, .u_xi = channels * L, .n = channels};
    k->wino_weights(&a);
    for (int64_t e = 0; e < points * channels * L; e++) {
        const int64_t point = e / (channels * L), c = e / L % channels, l = e % L;
        double want = 0.0;
        for (int i = 0; i < high * wide; i++)
            if (tap[i] >= 0)
                want += gh[point / nw][i / wide] * gw[point % nw][i % wide] * (double)w[c * taps * L + tap[i] + l];
        const double off = (double)u[e] - want;
        if (!CHECK_MSG(n == 4 ? off == 0.0 : off < 1e-5 && off > -1e-5, "%s %dx%d: u[%d] = %g, want %g", k->isa, nh, nw,
                       (int)e, (double)u[e], want))
            return;
    }
}

CHECK_TEST(wino_weights_stay_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int i = 0; i < 200; i++) {
            const size_t mark = check_mark();
            weights_case(*t, i % 2 ? 4 : 6, i % 4 < 2 ? CHECK_LEFT : CHECK_RIGHT);
            check_release(mark);
            if (check_failures()) return;
        }
    }
}
