/* SPDX-License-Identifier: BSD-3-Clause */
/* Weights of a Winograd convolution in float64; contract in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header.
 * Defines  CBN_FN(wino_weights).
 * Double vectors are gcc's own, of WT_LANES lanes: nothing but their size is known here, and gcc makes of them what the
 * instruction set has. There is no fused multiply-add, so all of them give the same bits. */
#include <string.h>

enum { WT_POINTS = 6, WT_TAPS = 5 };

#define WT_LANES CBN_MIN(VF_LANES, 4)
typedef double CBN_FN(wt_double) __attribute__((vector_size(8 * WT_LANES)));
typedef float CBN_FN(wt_float) __attribute__((vector_size(4 * WT_LANES)));
#define WT_VD CBN_FN(wt_double)
#define WT_VF CBN_FN(wt_float)

/* All points of `lines` lines of taps: out[i*out_i + line*out_line] from x[b*x_b + line*x_line]. Points come in pairs of
 * opposite sign, which share the sums over even and over odd taps. */
CBN_INLINE void CBN_FN(wt_lines)(const int taps, int n, const double *g, int lines, const WT_VD *x, int x_b, int x_line,
                                 WT_VD *out, int out_i, int out_line) {
    for (int line = 0; line < lines; line++, x += x_line, out += out_line) {
        WT_VD t[WT_TAPS];
        CBN_UNROLL for (int b = 0; b < taps; b++) t[b] = x[b * x_b];
        if (n > 1) out[0] = g[0] * t[0];
        for (int i = 1; i + 1 < n; i += 2) {
            const double *f = g + i * WT_POINTS;
            WT_VD even = f[0] * t[0], odd = {0};
            if (taps > 1) odd = f[1] * t[1];
            if (taps > 2) even += f[2] * t[2];
            if (taps > 3) odd += f[3] * t[3];
            if (taps > 4) even += f[4] * t[4];
            out[i * out_i] = taps > 1 ? even + odd : even;
            out[(i + 1) * out_i] = taps > 1 ? even - odd : even;
        }
        out[(n - 1) * out_i] = t[taps - 1];
    }
}

#define WT_LINES_(taps)                                                                                            \
    case taps:                                                                                                     \
        CBN_FN(wt_lines)(taps, n, g, lines, x, x_b, x_line, out, out_i, out_line);                                 \
        break;
CBN_INLINE void CBN_FN(wt_axis)(int taps, int n, const double *g, int lines, const WT_VD *x, int x_b, int x_line,
                                WT_VD *out, int out_i, int out_line) {
    switch (taps) {
        WT_LINES_(1)
        WT_LINES_(2)
        WT_LINES_(3)
        WT_LINES_(4)
        WT_LINES_(5)
    }
}
#undef WT_LINES_

static void CBN_FN(wino_weights)(const cbn_wino_weights_args *a) {
    const int nh = a->nh, nw = a->nw, high = a->high, wide = a->wide;
    assert(1 <= high && high <= WT_TAPS && 1 <= wide && wide <= WT_TAPS && nh <= WT_POINTS && nw <= WT_POINTS);
    WT_VD tap[WT_TAPS * WT_TAPS], column[WT_POINTS * WT_TAPS], point[WT_POINTS * WT_POINTS];
    for (int64_t k = 0; k < a->n; k++) {
        for (int l = 0; l < VF_LANES; l += WT_LANES) {
            const float *w = a->w + k * a->w_c + l;
            for (int i = 0; i < high * wide; i++) {
                WT_VF v = {0};
                if (a->tap[i] >= 0) memcpy(&v, w + a->tap[i], sizeof v);
                tap[i] = __builtin_convertvector(v, WT_VD);
            }
            CBN_FN(wt_axis)(high, nh, a->gh, wide, tap, wide, 1, column, wide, 1);
            CBN_FN(wt_axis)(wide, nw, a->gw, nh, column, 1, wide, point, 1, nw);
            float *u = a->u + k * a->u_c + l;
            for (int i = 0; i < nh * nw; i++, u += a->u_xi) {
                const WT_VF v = __builtin_convertvector(point[i], WT_VF);
                memcpy(u, &v, sizeof v);
            }
        }
    }
}
#undef WT_VD
#undef WT_VF
#undef WT_LANES
