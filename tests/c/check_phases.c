/* SPDX-License-Identifier: BSD-3-Clause */
/* panel_pack, interleave and conv_px2 of every table with all arrays between guard pages. */
#include "check.h"
#include <math.h>
#include <string.h>

static void pack_case(const cbn_kernels *k, check_side side) {
    enum { MOVES = 6, WIDTH = 40, MOST = 7 };
    const int lanes = k->lanes;
    const int64_t n = check_range(1, MOST), out_c = 3 * lanes;
    cbn_panel_move moves[MOVES];
    float *x = check_guard((size_t)(n * WIDTH) * sizeof *x, side),
          *out = check_guard((size_t)(n * out_c) * sizeof *out, side);
    check_fill_int(x, (size_t)(n * WIDTH), 1, 99);
    for (int i = 0; i < MOVES; i++) {
        /* The first and the last element of the arrays are among what is touched. */
        int64_t hi = check_range(0, lanes), lo = check_range(0, hi);
        if (i % 2) hi = lanes, lo = 0;
        const int64_t skip = check_range(0, 1), put = i % 3 ? lanes : check_range(1, lanes);
        const int64_t least = -lo * (1 + skip), most = WIDTH - 1 - (hi - 1) * (1 + skip);
        const int64_t x0 = i == 0 ? least : i == 1 ? most : check_range(least, most);
        moves[i] = (cbn_panel_move){.x = x0,
                                    .out = i == 0   ? 0
                                           : i == 1 ? out_c - put
                                                    : check_range(0, out_c - put),
                                    .lo = (int16_t)lo,
                                    .hi = (int16_t)hi,
                                    .n = (int16_t)put,
                                    .skip = (int16_t)skip};
    }
    float want[MOST * 3 * 16];
    check_sentinel_fill(out, (size_t)(n * out_c));
    memcpy(want, out, (size_t)(n * out_c) * sizeof *out);
    for (int64_t i = 0; i < n; i++)
        for (int m = 0; m < MOVES; m++)
            for (int l = 0; l < moves[m].n; l++)
                want[i * out_c + moves[m].out + l] =
                    moves[m].lo <= l && l < moves[m].hi ? x[i * WIDTH + moves[m].x + l * (1 + moves[m].skip)] : 0.0f;
    k->panel_pack(out, out_c, x, WIDTH, n, moves, MOVES);
    check_equal_f32(out, want, (size_t)(n * out_c), "%s panel_pack of %d", k->isa, (int)n);
}

CHECK_TEST(panel_pack_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int i = 0; i < 400; i++) {
            const size_t mark = check_mark();
            pack_case(*t, check_rand() & 1 ? CHECK_LEFT : CHECK_RIGHT);
            check_release(mark);
        }
    }
}

static void interleave_case(const cbn_kernels *k, int ns, int64_t n, bool residual, check_side side) {
    const int nch = 2;
    const int64_t s_p = cbn_ceil_div(n, ns), s_c = ns * s_p, y_c = n + 1, ny = (nch - 1) * y_c + n;
    const size_t f = sizeof(float);
    float *s = check_guard((size_t)(nch * s_c) * f, side), *y = check_guard((size_t)ny * f, side),
          *res = check_guard((size_t)ny * f, side), *bias = check_guard((size_t)nch * f, side);
    check_fill_int(s, (size_t)(nch * s_c), -9, 9);
    check_fill_int(res, (size_t)ny, -9, 9);
    check_fill_int(bias, (size_t)nch, -9, 9);
    check_sentinel_fill(y, (size_t)ny);
    const cbn_epilogue_args e = {bias, residual ? res : NULL, -12.0f, 11.0f};
    k->interleave(y, y_c, nch, ns, s, s_c, s_p, n, &e);
    for (int64_t at = 0; at < ny; at++) {
        const int64_t c = at / y_c, o = at % y_c;
        if (o == n) {
            if (!CHECK(check_sentinel_is(y[at]))) return;
            continue;
        }
        float want = s[c * s_c + o % ns * s_p + o / ns] + bias[c] + (residual ? res[at] : 0.0f);
        want = fminf(fmaxf(want, -12.0f), 11.0f);
        if (!CHECK_MSG(y[at] == want, "%s %d phases, %d: y[%d] = %g, expected %g", k->isa, ns, (int)n,
                       (int)at, y[at], want))
            return;
    }
}

CHECK_TEST(interleave_stays_inside) {
    static const int phases[] = {1, 2, 3, 4, 5, 8, 16};
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (size_t i = 0; i < sizeof phases / sizeof *phases; i++) {
            for (int64_t n = 1; n <= 2 * phases[i] * (*t)->lanes + phases[i]; n += 1 + n / 40) {
                const size_t mark = check_mark();
                interleave_case(*t, phases[i], n, check_rand() & 1,
                                check_rand() & 1 ? CHECK_LEFT : CHECK_RIGHT);
                check_release(mark);
            }
        }
    }
}

static void px2_case(const cbn_kernels *k, int np, int channels, int mr, bool copying, check_side side) {
    const int64_t ic = check_range(1, 4), whole = cbn_ceil_div(np, k->lanes) * k->lanes,
                  x_ic = copying ? np + 1 : whole, nx = (ic - 1) * x_ic + (copying ? np : whole),
                  y_oc = 2 * np + 1, ny = (channels - 1) * y_oc + 2 * np,
                  nw = cbn_ceil_div(2 * channels, mr) * mr * ic;
    const size_t f = sizeof(float);
    float *x = check_guard((size_t)nx * f, side), *w = check_guard((size_t)nw * f, side),
          *y = check_guard((size_t)ny * f, side), *res = check_guard((size_t)ny * f, side),
          *bias = check_guard((size_t)channels * f, side),
          *copy = check_guard((size_t)(ic * whole) * f, side);
    check_fill_int(x, (size_t)nx, -3, 3);
    check_fill_int(w, (size_t)nw, -3, 3);
    check_fill_int(res, (size_t)ny, -3, 3);
    check_fill_int(bias, (size_t)channels, -3, 3);
    check_sentinel_fill(y, (size_t)ny);
    const bool residual = check_rand() & 1;
    const cbn_conv_px_args a = {.x = x,
                                .x_ic = x_ic,
                                .x_padded = !copying,
                                .copy = copying ? copy : NULL,
                                .w = w,
                                .mr = mr,
                                .ic = ic,
                                .y = y,
                                .y_oc = y_oc,
                                .oc_valid = 2 * channels,
                                .np = np,
                                .epi = {bias, residual ? res : NULL, -20.0f, 25.0f}};
    k->conv_px2(&a);
    for (int64_t at = 0; at < ny; at++) {
        const int64_t c = at / y_oc, o = at % y_oc, row = 2 * c + o % 2;
        if (o == 2 * np) {
            if (!CHECK(check_sentinel_is(y[at]))) return;
            continue;
        }
        float want = bias[c] + (residual ? res[at] : 0.0f);
        for (int64_t i = 0; i < ic; i++) want += w[(row / mr * ic + i) * mr + row % mr] * x[i * x_ic + o / 2];
        want = fminf(fmaxf(want, -20.0f), 25.0f);
        if (!CHECK_MSG(y[at] == want, "%s %d pixels, %d channels of %d: y[%d] = %g, expected %g", k->isa, np,
                       channels, mr, (int)at, y[at], want))
            return;
    }
}

CHECK_TEST(conv_px2_stays_inside) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        for (int np = 1; np <= (*t)->px_nv * (*t)->lanes; np++) {
            for (int narrow = 0; narrow <= 2; narrow += 2) {
                for (int channels = 1; channels <= (*t)->px_mr + 1; channels += 2) {
                    const size_t mark = check_mark();
                    px2_case(*t, np, channels, (*t)->px_mr - narrow, check_rand() & 1,
                             check_rand() & 1 ? CHECK_LEFT : CHECK_RIGHT);
                    check_release(mark);
                }
            }
        }
    }
}
