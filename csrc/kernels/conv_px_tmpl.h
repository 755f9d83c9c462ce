/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_px: a tile of TILE_PX_MR output channels by up to TILE_PX_NV vectors of pixels; contract in
 * cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_PX_MR, TILE_PX_NV.
 * Defines  CBN_FN(conv_px).
 * Vector registers: TILE_PX_MR*TILE_PX_NV sums + TILE_PX_NV pixels + 1 weight. */

/* nv vectors of pixels; the last one holds `last` of them (masked when it is not whole). */
CBN_INLINE void CBN_FN(px_tile)(const int nv, const bool whole, const int64_t last,
                                const cbn_conv_px_args *a) {
    vf acc[TILE_PX_MR * TILE_PX_NV];
    CBN_UNROLL for (int i = 0; i < TILE_PX_MR * nv; i++) acc[i] = vf_zero();

    const float *x = a->x, *w = a->w;
    const float *pf = a->prefetch ? a->prefetch : w;
    const int64_t pf_step = a->prefetch ? a->prefetch_step : 0, x_ic = a->x_ic;
    for (int64_t k = a->ic; k > 0; k--) {
        vf xv[TILE_PX_NV];
        CBN_UNROLL for (int v = 0; v < nv; v++) xv[v] = vf_pin(
            whole || v < nv - 1 ? vf_load(x + v * VF_LANES) : vf_load_n(x + v * VF_LANES, last));
        __builtin_prefetch(pf);
        CBN_UNROLL for (int c = 0; c < TILE_PX_MR; c++) {
            const vf b = vf_pin(vf_set1(w[c]));
            CBN_UNROLL for (int v = 0; v < nv; v++) acc[c * nv + v] =
                vf_fma(b, xv[v], acc[c * nv + v]);
        }
        x += x_ic;
        w += TILE_PX_MR;
        pf += pf_step;
    }

    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    const float *res = a->epi.residual;
    float *y = a->y;
    CBN_UNROLL for (int c = 0; c < TILE_PX_MR; c++) {
        if (c >= a->oc_valid) break;
        const vf b = vf_set1(a->epi.bias[c]);
        CBN_UNROLL for (int v = 0; v < nv; v++) {
            const int64_t n = whole || v < nv - 1 ? VF_LANES : last;
            vf s = vf_add(acc[c * nv + v], b);
            if (res) s = vf_add(s, vf_load_n(res + c * a->y_oc + v * VF_LANES, n));
            vf_store_n(y + v * VF_LANES, vf_min(hi, vf_max(lo, s)), n);
        }
        y += a->y_oc;
    }
}

#define PX_INSTANCE_(nv)                                            \
    static void CBN_FN(px_whole_##nv)(const cbn_conv_px_args *a) {  \
        CBN_FN(px_tile)(nv, true, VF_LANES, a);                     \
    }                                                               \
    static void CBN_FN(px_part_##nv)(const cbn_conv_px_args *a) {   \
        CBN_FN(px_tile)(nv, false, a->np - (nv - 1) * VF_LANES, a); \
    }
#if TILE_PX_NV == 2
#define PX_FOR_NV_(X) X(1) X(2)
#elif TILE_PX_NV == 3
#define PX_FOR_NV_(X) X(1) X(2) X(3)
#elif TILE_PX_NV == 4
#define PX_FOR_NV_(X) X(1) X(2) X(3) X(4)
#else
#error "add a list for this TILE_PX_NV"
#endif
PX_FOR_NV_(PX_INSTANCE_)

static void CBN_FN(conv_px)(const cbn_conv_px_args *a) {
#define PX_NAME_(nv) {CBN_FN(px_part_##nv), CBN_FN(px_whole_##nv)},
    static void (*const tile[TILE_PX_NV][2])(const cbn_conv_px_args *) = {PX_FOR_NV_(PX_NAME_)};
    assert(1 <= a->np && a->np <= TILE_PX_NV * VF_LANES && a->ic >= 0);
    assert(1 <= a->oc_valid && a->oc_valid <= TILE_PX_MR);
    tile[(a->np - 1) / VF_LANES][a->np % VF_LANES == 0](a);
}
