/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_px2: conv_px for two phases of the columns, whose sums are woven in registers and stored as
 * whole rows; contract in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_PX_MR (even), TILE_PX_NV.
 * Defines  CBN_FN(conv_px2).
 * Vector registers: TILE_PX_MR*TILE_PX_NV sums + TILE_PX_NV pixels + 1 weight. */

/* The 2*np outputs of each channel; np = nv*VF_LANES: made constant by the caller where it can. */
CBN_INLINE void CBN_FN(px2_store)(const int mr, const int nv, const int64_t np, const int64_t valid,
                                  const vf *acc, const float *bias, const float *res, float *y,
                                  const cbn_conv_px_args *a) {
    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    CBN_UNROLL for (int c = 0; c < mr / 2; c++) {
        if (2 * c >= valid) break;
        const vf b = vf_set1(bias[c]);
        CBN_UNROLL for (int v = 0; v < nv; v++) {
            const vf even = acc[2 * c * nv + v], odd = acc[(2 * c + 1) * nv + v];
            CBN_UNROLL for (int h = 0; h < 2; h++) {
                const int64_t at = (2 * v + h) * VF_LANES;
                const int64_t n = CBN_MAX(CBN_MIN(2 * np - at, VF_LANES), 0);
                vf s = vf_add(h ? vf_zip_hi(even, odd) : vf_zip_lo(even, odd), b);
                if (res) s = vf_add(s, vf_load_n(res + at, n));
                vf_store_n(y + at, vf_min(hi, vf_max(lo, s)), n);
            }
        }
        y += a->y_oc;
        if (res) res += a->y_oc;
    }
}

CBN_INLINE void CBN_FN(px2_blocks)(const int mr, const int nv, const bool copying,
                                   const cbn_conv_px_args *a) {
    const int64_t last = a->np - (nv - 1) * VF_LANES, x_ic = a->x_ic;
    const float *w = a->w, *bias = a->epi.bias, *res = a->epi.residual;
    const float *pf = a->prefetch ? a->prefetch : w;
    int64_t pf_step = a->prefetch ? a->prefetch_step : 0;
    float *y = a->y;
    for (int64_t left = a->oc_valid; left > 0; left -= mr) {
        vf acc[TILE_PX_MR * TILE_PX_NV];
        CBN_UNROLL for (int i = 0; i < mr * nv; i++) acc[i] = vf_zero();
        const float *x = a->x;
        float *copy = a->copy;
        for (int64_t k = a->ic; k > 0; k--) {
            vf xv[TILE_PX_NV];
            CBN_UNROLL for (int v = 0; v < nv; v++) {
                xv[v] = vf_pin(!copying || v < nv - 1 ? vf_load(x + v * VF_LANES)
                                                      : vf_load_n(x + v * VF_LANES, last));
                if (copying) vf_store(copy + v * VF_LANES, xv[v]);
            }
            __builtin_prefetch(pf, 0, 2);
            CBN_UNROLL for (int c = 0; c < mr; c++) {
                const vf wv = vf_pin(vf_set1(w[c]));
                CBN_UNROLL for (int v = 0; v < nv; v++) acc[c * nv + v] = vf_fma(wv, xv[v], acc[c * nv + v]);
            }
            x += x_ic;
            w += mr;
            pf += pf_step;
            if (copying) copy += nv * VF_LANES;
        }
        if (last < VF_LANES || left < mr)
            CBN_FN(px2_store)(mr, nv, a->np, left, acc, bias, res, y, a);
        else if (res)
            CBN_FN(px2_store)(mr, nv, nv * VF_LANES, mr, acc, bias, res, y, a);
        else
            CBN_FN(px2_store)(mr, nv, nv * VF_LANES, mr, acc, bias, NULL, y, a);
        bias += mr / 2;
        y += mr / 2 * a->y_oc;
        if (res) res += mr / 2 * a->y_oc;
        pf = a->w;
        pf_step = 0;
    }
}

#define PX2_INSTANCE_(mr, nv)                                                        \
    static void CBN_FN(CBN_CAT(px2_##mr##x##nv, plain))(const cbn_conv_px_args *a) { \
        CBN_FN(px2_blocks)(mr, nv, false, a);                                        \
    }                                                                                \
    static void CBN_FN(CBN_CAT(px2_##mr##x##nv, copy))(const cbn_conv_px_args *a) {  \
        CBN_FN(px2_blocks)(mr, nv, true, a);                                         \
    }
#if TILE_PX_MR == 4
#define PX2_FOR_TILES_(X, R) R(X, 2) R(X, 4)
#elif TILE_PX_MR == 6
#define PX2_FOR_TILES_(X, R) R(X, 4) R(X, 6)
#elif TILE_PX_MR == 8
#define PX2_FOR_TILES_(X, R) R(X, 6) R(X, 8)
#else
#error "add a list for this TILE_PX_MR"
#endif
PX2_FOR_TILES_(PX2_INSTANCE_, PX_FOR_NV_)

static void CBN_FN(conv_px2)(const cbn_conv_px_args *a) {
#define PX2_ROW_(X, mr) {PX_FOR_NV_(X, mr)},
#define PX2_NAMES_(mr, nv) {CBN_FN(CBN_CAT(px2_##mr##x##nv, plain)), CBN_FN(CBN_CAT(px2_##mr##x##nv, copy))},
    static void (*const tile[2][TILE_PX_NV][2])(const cbn_conv_px_args *) = {
        PX2_FOR_TILES_(PX2_NAMES_, PX2_ROW_)};
    assert((a->mr == TILE_PX_MR || a->mr == TILE_PX_MR - 2) && 2 <= a->oc_valid && a->oc_valid % 2 == 0);
    assert(1 <= a->np && a->np <= TILE_PX_NV * VF_LANES && a->ic >= 0 && (a->copy || a->x_padded));
    const int vectors = (int)cbn_ceil_div(a->np, VF_LANES), wide = a->mr == TILE_PX_MR;
    cbn_conv_px_args rest = *a;
    if (a->copy) {
        cbn_conv_px_args first = *a;
        first.oc_valid = CBN_MIN(a->oc_valid, a->mr);
        tile[wide][vectors - 1][1](&first);
        rest.oc_valid -= first.oc_valid;
        if (rest.oc_valid == 0) return;
        rest.x = a->copy;
        rest.x_ic = vectors * VF_LANES;
        rest.prefetch = NULL;
        rest.w += a->mr * a->ic;
        rest.y += a->mr / 2 * a->y_oc;
        rest.epi.bias += a->mr / 2;
        if (rest.epi.residual) rest.epi.residual += a->mr / 2 * a->y_oc;
    }
    tile[wide][vectors - 1][0](&rest);
}
