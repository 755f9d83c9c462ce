/* SPDX-License-Identifier: BSD-3-Clause */
/* linear_raw: linear with weights that were not packed; contract in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, linear_tmpl.h (ln_store).
 * Defines  CBN_FN(linear_raw).
 * Vector registers: VF_LANES for a square of weights, 6 sums + 1 broadcast (AVX2: 15).
 *
 * Squares of VF_LANES channels by VF_LANES inputs are transposed in registers, which memory has time for: this is for
 * few rows. A cache line of each row of weights is used up before other rows come: they may all share a cache set. Two
 * vectors of channels are as many streams as the hardware follows (more, or software prefetch, made it slower). */

enum { CBN_FN(LR_LINE) = CBN_CACHE_LINE / 4 };

/* Inputs from k on, any number of them, of the channels there are. Sums as ln_tile's. */
static void CBN_FN(lr_rest)(int np, const cbn_linear_args *a, int64_t k, vf *acc) {
    float square[VF_LANES * VF_LANES];
    for (; k < a->ic; k += VF_LANES) {
        const int64_t n = CBN_MIN(a->ic - k, VF_LANES);
        for (int v = 0; v < CBN_FN(LN_NV); v++) {
            vf r[VF_LANES];
            const float *w = a->w + v * VF_LANES * a->w_b + k;
            for (int l = 0; l < VF_LANES; l++)
                r[l] = v * VF_LANES + l < a->oc_valid ? vf_load_n(w + l * a->w_b, n) : vf_zero();
            vf_transpose(r);
            for (int l = 0; l < VF_LANES; l++) vf_store(square + l * VF_LANES, r[l]);
            for (int p = 0; p < np; p++) {
                vf *sum = acc + p * CBN_FN(LN_NV) + v;
                for (int64_t c = 0; c < n; c++)
                    *sum = vf_fma(vf_set1(a->x[p * a->x_p + k + c]), vf_load(square + c * VF_LANES), *sum);
            }
        }
    }
}

/* np rows by up to LN_WIDTH channels. */
CBN_INLINE void CBN_FN(lr_tile)(const int np, const cbn_linear_args *a) {
    enum { NV = CBN_FN(LN_NV), LINE = CBN_FN(LR_LINE), HALF = CBN_MAX(VF_LANES / 2, 1) };
    vf acc[3 * NV], sums[3 * NV];
    CBN_UNROLL for (int i = 0; i < np * NV; i++) acc[i] = vf_zero();
    int64_t k = 0;
    const float *row[3];
    CBN_UNROLL for (int p = 0; p < np; p++) row[p] = a->x + p * a->x_p;
    const int64_t w_b = a->w_b, whole = a->oc_valid < NV * VF_LANES ? 0 : a->ic - LINE;
    for (; k <= whole && whole > 0; k += LINE) {
        CBN_UNROLL for (int v = 0; v < NV; v++) {
            for (int h = 0; h < LINE; h += VF_LANES) {
                vf r[VF_LANES];
                /* Hidden from gcc, which would keep a pointer a channel, most of them in memory. */
                const float *low = a->w + v * VF_LANES * w_b + k + h, *high = low + HALF * w_b;
                __asm__("" : "+r"(low));
                __asm__("" : "+r"(high));
                CBN_UNROLL for (int l = 0; l < HALF; l++) r[l] = vf_load(low + l * w_b);
                CBN_UNROLL for (int l = HALF; l < VF_LANES; l++) r[l] = vf_load(high + (l - HALF) * w_b);
                vf_transpose(r);
                CBN_UNROLL for (int c = 0; c < VF_LANES; c++) {
                    CBN_UNROLL for (int p = 0; p < np; p++)
                        acc[p * NV + v] = vf_fma(vf_set1(row[p][k + h + c]), r[c], acc[p * NV + v]);
                }
            }
        }
    }
    CBN_UNROLL for (int i = 0; i < np * NV; i++) sums[i] = acc[i];
    CBN_FN(lr_rest)(np, a, k, sums);
    CBN_FN(ln_store)(np, 1, sums, a);
}

static void CBN_FN(lr_1)(const cbn_linear_args *a) { CBN_FN(lr_tile)(1, a); }
static void CBN_FN(lr_2)(const cbn_linear_args *a) { CBN_FN(lr_tile)(2, a); }
static void CBN_FN(lr_3)(const cbn_linear_args *a) { CBN_FN(lr_tile)(3, a); }

static void CBN_FN(linear_raw)(int np, const cbn_linear_args *a) {
    static void (*const tiles[])(const cbn_linear_args *) = {CBN_FN(lr_1), CBN_FN(lr_2), CBN_FN(lr_3)};
    enum { WIDTH = CBN_FN(LN_WIDTH) };
    assert(1 <= np && np <= CBN_LINEAR_RAW_ROWS && a->ic >= 0 && a->oc_valid >= 1 && a->first && a->last);
    cbn_linear_args t = *a;
    for (int64_t left = a->oc_valid; left > 0; left -= WIDTH) {
        t.oc_valid = CBN_MIN(left, WIDTH);
        tiles[np - 1](&t);
        t.w += WIDTH * a->w_b;
        t.y += WIDTH;
        t.epi.bias += WIDTH;
        if (t.epi.residual) t.epi.residual += WIDTH;
    }
}
