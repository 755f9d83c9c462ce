/* SPDX-License-Identifier: BSD-3-Clause */
/* linear: rows of a matrix product, output channels in vector lanes; contract in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header.
 * Defines  CBN_FN(linear).
 * Vector registers: 12 sums (8 for one row) + 2 weights + 1 broadcast.
 *
 * One row is bound by memory, and several streams of weights read at a time bring more of its bandwidth than one
 * (measured: 1.6 times from L3, 1.3 to 1.4 times from DRAM); there software prefetch made it slower. */

enum { CBN_FN(LN_NV) = 2, CBN_FN(LN_WIDTH) = CBN_FN(LN_NV) * VF_LANES, CBN_FN(LN_SUMS) = 12 };

CBN_INLINE void CBN_FN(ln_store)(const int np, const int nb, const vf *acc, const cbn_linear_args *a) {
    enum { NV = CBN_FN(LN_NV) };
    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    CBN_UNROLL for (int v = 0; v < nb * NV; v++) {
        const int64_t n = CBN_MIN(a->oc_valid - v * VF_LANES, VF_LANES);
        if (n <= 0) return;
        const vf bias = a->last ? vf_load_n(a->epi.bias + v * VF_LANES, n) : vf_zero();
        CBN_UNROLL for (int p = 0; p < np; p++) {
            const int64_t at = p * a->y_p + v * VF_LANES;
            vf s = acc[p * nb * NV + v];
            if (a->last) {
                s = vf_add(s, bias);
                if (a->epi.residual) s = vf_add(s, vf_load_n(a->epi.residual + at, n));
                s = vf_min(hi, vf_max(lo, s));
            }
            vf_store_n(a->y + at, s, n);
        }
    }
}

/* np rows by nb blocks of LN_WIDTH output channels. */
CBN_INLINE void CBN_FN(ln_tile)(const int np, const int nb, const cbn_linear_args *a) {
    enum { NV = CBN_FN(LN_NV), WIDTH = CBN_FN(LN_WIDTH) };
    vf acc[CBN_FN(LN_SUMS)];
    CBN_UNROLL for (int v = 0; v < nb * NV; v++) {
        const int64_t n = CBN_MAX(CBN_MIN(a->oc_valid - v * VF_LANES, VF_LANES), 0);
        CBN_UNROLL for (int p = 0; p < np; p++)
            acc[p * nb * NV + v] = a->first || n == 0 ? vf_zero() : vf_load_n(a->y + p * a->y_p + v * VF_LANES, n);
    }
    const float *w = a->w, *pf = a->prefetch ? a->prefetch : w;
    const int64_t pf_step = a->prefetch ? a->prefetch_step : 0, w_b = a->w_b;
    const float *row[6];
    CBN_UNROLL for (int p = 0; p < np; p++) row[p] = a->x + p * a->x_p;
    for (int64_t k = 0; k < a->ic; k++) {
        if (np > 3) __builtin_prefetch(pf, 0, 2);
        CBN_UNROLL for (int b = 0; b < nb; b++) {
            vf wv[NV];
            CBN_UNROLL for (int v = 0; v < NV; v++) wv[v] = vf_pin(vf_load(w + b * w_b + v * VF_LANES));
            CBN_UNROLL for (int p = 0; p < np; p++) {
                const vf x = vf_pin(vf_set1(row[p][k]));
                CBN_UNROLL for (int v = 0; v < NV; v++) {
                    const int i = (p * nb + b) * NV + v;
                    acc[i] = vf_fma(x, wv[v], acc[i]);
                }
            }
            if (np * nb > 4) CBN_BARRIER(); /* keeps gcc 12 from holding the broadcasts for the next block */
        }
        w += WIDTH;
        pf += pf_step;
    }
    CBN_FN(ln_store)(np, nb, acc, a);
}

#define LN_INSTANCE_(np, nb) \
    static void CBN_FN(CBN_CAT(ln_##np, x##nb))(const cbn_linear_args *a) { CBN_FN(ln_tile)(np, nb, a); }
LN_INSTANCE_(1, 1)
LN_INSTANCE_(2, 1)
LN_INSTANCE_(3, 1)
LN_INSTANCE_(4, 1)
LN_INSTANCE_(5, 1)
LN_INSTANCE_(6, 1)
LN_INSTANCE_(1, 4)
LN_INSTANCE_(2, 3)
LN_INSTANCE_(3, 2)

static void CBN_FN(linear)(int np, const cbn_linear_args *a) {
#define LN_NAME_(np, nb) CBN_FN(CBN_CAT(ln_##np, x##nb))
    typedef void (*tile_fn)(const cbn_linear_args *);
    static const tile_fn one[] = {LN_NAME_(1, 1), LN_NAME_(2, 1), LN_NAME_(3, 1),
                                  LN_NAME_(4, 1), LN_NAME_(5, 1), LN_NAME_(6, 1)};
    static const tile_fn many[] = {LN_NAME_(1, 4), LN_NAME_(2, 3), LN_NAME_(3, 2)};
    static const int streams[] = {4, 3, 2, 1, 1, 1};
    enum { WIDTH = CBN_FN(LN_WIDTH) };
    assert(1 <= np && np <= CBN_LINEAR_ROWS && a->ic >= 0 && a->oc_valid >= 1);
    cbn_linear_args t = *a;
    for (int64_t left = a->oc_valid; left > 0;) {
        const int nb = left > (streams[np - 1] - 1) * WIDTH ? streams[np - 1] : 1;
        t.oc_valid = CBN_MIN(left, nb * WIDTH);
        (nb > 1 ? many[np - 1] : one[np - 1])(&t);
        left -= nb * WIDTH;
        t.w += nb * a->w_b;
        t.y += nb * WIDTH;
        t.epi.bias += nb * WIDTH;
        if (t.epi.residual) t.epi.residual += nb * WIDTH;
        t.prefetch = NULL;
    }
}
