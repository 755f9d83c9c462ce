/* SPDX-License-Identifier: BSD-3-Clause */
/* The Winograd kernels of every table with all arrays between guard pages: what Python cannot see is an access one
 * element outside. What they compute is checked there (tests/kernels/test_wino_kernels.py), here only so far that a
 * kernel cannot pass by leaving something out. */
#include "check.h"
#include <math.h>
#include <string.h>

static float *whole_numbers(int64_t n, check_side side) {
    float *p = check_guard((size_t)n * sizeof *p, side);
    check_fill_int(p, (size_t)n, -3, 3);
    return p;
}

static float *sentinels(int64_t n, check_side side) {
    float *p = check_guard((size_t)n * sizeof *p, side);
    check_sentinel_fill(p, (size_t)n);
    return p;
}

static bool all_written(const float *p, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (check_sentinel_is(p[i])) return false;
    return true;
}

CHECK_TEST(lanes_stay_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        const int L = (*t)->lanes;
        for (int round = 0; round < 400; round++) {
            const size_t mark = check_mark();
            const check_side side = round & 1 ? CHECK_LEFT : CHECK_RIGHT;
            const int nch = round % 3 ? L : (int)check_range(1, L);
            const int64_t w = check_range(0, 3 * L + 2), n = check_range(0, 4 * L);
            const int64_t x0 = check_range(-L, w), x_c = w + round % 2;
            const float *x = whole_numbers((nch - 1) * x_c + w, side);
            float *s = sentinels(n * L, side);
            (*t)->lanes_gather(s, x, x_c, nch, x0, n, w);
            for (int64_t c = 0; c < n; c++)
                for (int l = 0; l < L; l++) {
                    const float want = l < nch && x0 + c >= 0 && x0 + c < w ? x[l * x_c + x0 + c] : 0.0f;
                    if (!CHECK_MSG(s[c * L + l] == want, "%s s[%d][%d]", (*t)->isa, (int)c, l)) return;
                }

            const int64_t y_c = n + round % 4, ny = n ? (nch - 1) * y_c + n : 0;
            float *y = sentinels(ny, side);
            const cbn_epilogue_args e = {whole_numbers(nch, side), round & 4 ? whole_numbers(ny, side) : NULL, -2, 4};
            bool nonfinite = false;
            (*t)->lanes_scatter(y, y_c, nch, s, n, &e, &nonfinite);
            CHECK(!nonfinite);
            for (int64_t i = 0; i < ny; i++) {
                const int64_t l = i / y_c, c = i % y_c;
                const float sum = c < n ? s[c * L + l] + e.bias[l] + (e.residual ? e.residual[i] : 0.0f) : 0.0f;
                const bool good = c < n ? y[i] == fminf(fmaxf(sum, -2), 4) : check_sentinel_is(y[i]);
                if (!CHECK_MSG(good, "%s y[%d] = %g", (*t)->isa, (int)i, (double)y[i])) return;
            }
            check_release(mark);
        }
    }
}

CHECK_TEST(wino_in_stays_inside) {
    static const int points[] = {1, 4, 6};
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        const int L = (*t)->lanes;
        for (int round = 0; round < 90; round++) {
            const size_t mark = check_mark();
            const check_side side = round & 1 ? CHECK_LEFT : CHECK_RIGHT;
            const int nh = points[round % 3], nw = points[round / 3 % 3];
            const int64_t step = check_range(1, 3), ntiles = check_range(0, 5),
                          ncols = (nw - 1) * step + check_range(1, 9), v_xi = (ntiles + check_range(0, 2)) * L;
            int32_t col[5];
            const int64_t last = ncols - 1 - (nw - 1) * step;
            for (int64_t i = 0; i < ntiles; i++) /* one tile reaches the end of the rows */
                col[i] = (int32_t)(i == ntiles - 1 ? last : check_range(0, last));
            const int64_t nv = ntiles ? (nh * nw - 1) * v_xi + ntiles * L : 0;
            cbn_wino_in_args a = {.nh = nh, .nw = nw, .ncols = ncols, .ntiles = ntiles, .col = col, .step = step,
                                  .tmp = sentinels(nh * ncols * L, side), .v = sentinels(nv, side), .v_xi = v_xi};
            for (int i = 0; i < nh; i++) a.row[i] = whole_numbers(ncols * L, side);
            (*t)->wino_in(&a);
            for (int p = 0; ntiles && p < nh * nw; p++)
                CHECK_MSG(all_written(a.v + p * v_xi, ntiles * L), "%s %dx%d point %d", (*t)->isa, nh, nw, p);
            check_release(mark);
        }
    }
}

CHECK_TEST(wino_out_stays_inside) {
    static const int axes[][2] = {{1, 1}, {4, 2}, {4, 3}, {6, 2}, {6, 3}, {6, 4}, {6, 5}};
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        const int L = (*t)->lanes;
        for (int round = 0; round < 196; round++) {
            const size_t mark = check_mark();
            const check_side side = round & 1 ? CHECK_LEFT : CHECK_RIGHT;
            const int *h = axes[round / 2 % 7], *w = axes[round / 14 % 7];
            const int64_t step = check_range(1, 2), ntiles = check_range(1, 4);
            const int64_t m_t = (h[0] * w[0] + check_range(0, 1)) * L, columns = ntiles * w[1] * step - step + 1;
            const int64_t o_row = (columns + check_range(0, 2)) * L;
            int32_t col[4];
            for (int64_t i = 0; i < ntiles; i++) col[i] = (int32_t)(i * w[1] * step);
            const cbn_wino_out_args a = {.nh = h[0], .nw = w[0], .mh = h[1], .mw = w[1],
                                         .m = whole_numbers((ntiles - 1) * m_t + h[0] * w[0] * L, side), .m_t = m_t,
                                         .ntiles = ntiles, .col = col, .step = step,
                                         .o = sentinels((h[1] - 1) * o_row + columns * L, side), .o_row = o_row};
            (*t)->wino_out(&a);
            for (int i = 0; i < h[1]; i++)
                for (int64_t c = 0; c < columns; c += step)
                    CHECK_MSG(all_written(a.o + i * o_row + c * L, L), "%s (%d,%d)x(%d,%d)", (*t)->isa, h[0], h[1],
                    w[0],
                              w[1]);
            check_release(mark);
        }
    }
}

CHECK_TEST(wino_gemm_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        const int L = (*t)->lanes;
        for (int round = 0; round < 8 * (*t)->wino_np; round++) {
            const size_t mark = check_mark();
            const check_side side = round & 1 ? CHECK_LEFT : CHECK_RIGHT;
            const int nv = 1 + round / 2 % 2, np = 1 + round / 4;
            const int64_t blocks = check_range(1, 5), nk = blocks * L, v_b = (np + check_range(0, 2)) * L,
                          m_t = check_range(1, 2) * L, m_v = np * m_t, nm = (nv - 1) * m_v + (np - 1) * m_t + L;
            const cbn_wino_gemm_args a = {whole_numbers((blocks - 1) * v_b + np * L, side), v_b,
                                          whole_numbers(nk * nv * L, side), nk, check_range(1, 3) * L,
                                          sentinels(nm, side), m_t, m_v, false};
            (*t)->wino_gemm(np, nv, &a);
            for (int p = 0; p < np; p++)
                for (int c = 0; c < nv * L; c++) {
                    float want = 0.0f;
                    for (int64_t k = 0; k < nk; k++) want += a.v[k / L * v_b + p * L + k % L] * a.u[k * nv * L + c];
                    const float got = a.m[p * m_t + c / L * m_v + c % L];
                    if (!CHECK_MSG(got == want, "%s %dx%d m[%d][%d] %g != %g", (*t)->isa, np, nv, p, c, (double)got,
                                   (double)want))
                        return;
                }
            check_release(mark);
        }
    }
}
