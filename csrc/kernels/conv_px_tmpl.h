/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_px: blocks of up to TILE_PX_MR output channels by up to TILE_PX_NV vectors of pixels; contract in
 * cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_PX_MR, TILE_PX_NV.
 * Defines  CBN_FN(conv_px).
 * Vector registers: TILE_PX_MR*TILE_PX_NV sums + TILE_PX_NV pixels + 1 weight. */

typedef enum { PX_WHOLE, PX_PART, PX_COPY } CBN_FN(px_kind);
typedef enum { PX_QUIET, PX_DENSE, PX_SPARSE } CBN_FN(px_fetch);

/* What changes from block to block. */
typedef struct CBN_FN(px_block) {
    const float *x, *w, *bias, *residual;
    float *y, *copy;
} CBN_FN(px_block);

/* Channels from which on a line asked for in every one is a burst that has to be waited for. */
#define PX_MANY_ 192

/* Sums of `valid` channels, the last vector holding `last` pixels, to y. The caller makes as much of it constant as it
 * can: a branch for each vector costs as much as the rest. */
CBN_INLINE void CBN_FN(px_store)(const int mr, const int nv, const int64_t last, const int64_t valid, const vf *acc,
                                 const float *res, const CBN_FN(px_block) *b, const cbn_conv_px_args *a) {
    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    float *y = b->y;
    CBN_UNROLL for (int c = 0; c < mr; c++) {
        if (c >= valid) break;
        const vf bias = vf_set1(b->bias[c]);
        CBN_UNROLL for (int v = 0; v < nv; v++) {
            const int64_t n = v < nv - 1 ? VF_LANES : last;
            vf s = vf_add(acc[c * nv + v], bias);
            if (res) s = vf_add(s, vf_load_n(res + v * VF_LANES, n));
            vf_store_n(y + v * VF_LANES, vf_min(hi, vf_max(lo, s)), n);
        }
        y += a->y_oc;
        if (res) res += a->y_oc;
    }
}

/* One block. Prefetch: none, one line in each channel's step, or one whenever pf_mask leaves nothing of the number of
 * channels to go. */
CBN_INLINE void CBN_FN(px_tile)(const int mr, const int nv, const CBN_FN(px_kind) kind, const CBN_FN(px_fetch) fetch,
                                const int64_t last, const int64_t valid, const CBN_FN(px_block) *b, const float *pf,
                                const int64_t pf_mask, const cbn_conv_px_args *a) {
    vf acc[TILE_PX_MR * TILE_PX_NV];
    CBN_UNROLL for (int i = 0; i < mr * nv; i++) acc[i] = vf_zero();
    const float *x = b->x, *w = b->w;
    float *copy = b->copy;
    const int64_t x_ic = a->x_ic, pf_step = a->prefetch_step;
    for (int64_t k = a->ic; k > 0; k--) {
        vf xv[TILE_PX_NV];
        CBN_UNROLL for (int v = 0; v < nv; v++) {
            const bool all = kind == PX_WHOLE || v < nv - 1;
            xv[v] = vf_pin(all ? vf_load(x + v * VF_LANES) : vf_load_n(x + v * VF_LANES, last));
            if (kind == PX_COPY) vf_store(copy + v * VF_LANES, xv[v]);
        }
        if (fetch == PX_DENSE || (fetch == PX_SPARSE && (k & pf_mask) == 0)) {
            __builtin_prefetch(pf, 0, 2);
            pf += pf_step;
        }
        CBN_UNROLL for (int c = 0; c < mr; c++) {
            const vf wv = vf_pin(vf_set1(w[c]));
            CBN_UNROLL for (int v = 0; v < nv; v++) acc[c * nv + v] = vf_fma(wv, xv[v], acc[c * nv + v]);
        }
        x += x_ic;
        w += mr;
        if (kind == PX_COPY) copy += nv * VF_LANES;
    }
    if (last < VF_LANES || valid < mr)
        CBN_FN(px_store)(mr, nv, last, valid, acc, b->residual, b, a);
    else if (b->residual)
        CBN_FN(px_store)(mr, nv, VF_LANES, mr, acc, b->residual, b, a);
    else
        CBN_FN(px_store)(mr, nv, VF_LANES, mr, acc, NULL, b, a);
}

/* One block of channels over panels side by side. While they are copied it asks for the next one's lines. */
CBN_INLINE void CBN_FN(px_row)(const int mr, const int nv, const CBN_FN(px_kind) kind, const int64_t valid,
                               const CBN_FN(px_block) *of, const cbn_conv_px_args *a) {
    CBN_FN(px_block) b = *of;
    for (int p = a->panels; p > 0; p--) {
        if (kind == PX_COPY && a->ic < PX_MANY_)
            CBN_FN(px_tile)(mr, nv, kind, PX_DENSE, VF_LANES, valid, &b, b.x + a->x_panel, 0, a);
        else
            CBN_FN(px_tile)(mr, nv, kind, PX_QUIET, VF_LANES, valid, &b, NULL, 0, a);
        b.x += a->x_panel;
        b.y += nv * VF_LANES;
        if (b.residual) b.residual += nv * VF_LANES;
        if (kind == PX_COPY) b.copy += a->ic * nv * VF_LANES;
    }
}

/* All blocks: the loop is in here because leaving and entering a function costs as much as some twenty channels. Lines
 * to be asked for are spread over the blocks when they are many: a burst of them would have to be waited for. */
CBN_INLINE void CBN_FN(px_blocks)(const int mr, const int nv, const CBN_FN(px_kind) kind, const cbn_conv_px_args *a) {
    enum { SPARSEST = 15 };
    const int64_t last = a->np - (nv - 1) * VF_LANES;
    CBN_FN(px_block) b = {a->x, a->w, a->epi.bias, a->epi.residual, a->y, a->copy};
    const float *pf = a->prefetch;
    int64_t pf_left = pf && kind != PX_COPY ? a->ic : 0, mask = 0;
    if (a->ic >= PX_MANY_)
        while (mask < SPARSEST && 2 * (mask + 1) * mr <= a->oc_valid) mask = 2 * mask + 1;
    for (int64_t left = a->oc_valid; left > 0; left -= mr) {
        if (kind != PX_PART && a->panels > 0)
            CBN_FN(px_row)(mr, nv, kind, left, &b, a);
        else if (kind == PX_COPY || pf_left <= 0)
            CBN_FN(px_tile)(mr, nv, kind, PX_QUIET, last, left, &b, NULL, 0, a);
        else if (mask == 0)
            CBN_FN(px_tile)(mr, nv, kind, PX_DENSE, last, left, &b, pf, 0, a);
        else
            CBN_FN(px_tile)(mr, nv, kind, PX_SPARSE, last, left, &b, pf, mask, a);
        b.w += mr * a->ic;
        b.bias += mr;
        b.y += mr * a->y_oc;
        if (b.residual) b.residual += mr * a->y_oc;
        if (pf_left <= 0) continue;
        const int64_t done = a->ic / (mask + 1);
        pf_left -= done;
        pf += done * a->prefetch_step;
    }
}

#define PX_INSTANCE_(mr, nv, kind) \
    static void CBN_FN(CBN_CAT(px_##mr##x##nv, kind))(const cbn_conv_px_args *a) { CBN_FN(px_blocks)(mr, nv, kind, a); }
#define PX_INSTANCES_(mr, nv) PX_INSTANCE_(mr, nv, PX_WHOLE) PX_INSTANCE_(mr, nv, PX_PART) PX_INSTANCE_(mr, nv, PX_COPY)
#if TILE_PX_NV == 2
#define PX_FOR_NV_(X, mr) X(mr, 1) X(mr, 2)
#elif TILE_PX_NV == 3
#define PX_FOR_NV_(X, mr) X(mr, 1) X(mr, 2) X(mr, 3)
#elif TILE_PX_NV == 4
#define PX_FOR_NV_(X, mr) X(mr, 1) X(mr, 2) X(mr, 3) X(mr, 4)
#else
#error "add a list for this TILE_PX_NV"
#endif
#if TILE_PX_MR == 4
#define PX_FOR_TILES_(X, R) R(X, 3) R(X, 4)
#elif TILE_PX_MR == 6
#define PX_FOR_TILES_(X, R) R(X, 4) R(X, 5) R(X, 6)
#elif TILE_PX_MR == 8
#define PX_FOR_TILES_(X, R) R(X, 5) R(X, 6) R(X, 7) R(X, 8)
#else
#error "add a list for this TILE_PX_MR"
#endif
PX_FOR_TILES_(PX_INSTANCES_, PX_FOR_NV_)

static void CBN_FN(conv_px)(const cbn_conv_px_args *a) {
#define PX_ROW_(X, mr) {PX_FOR_NV_(X, mr)},
#define PX_NAMES_(mr, nv)                                                                      \
    {CBN_FN(CBN_CAT(px_##mr##x##nv, PX_WHOLE)), CBN_FN(CBN_CAT(px_##mr##x##nv, PX_PART)), \
     CBN_FN(CBN_CAT(px_##mr##x##nv, PX_COPY))},
    enum { LEAST = CBN_PX_MR_MIN(TILE_PX_MR) };
    static void (*const tile[TILE_PX_MR - LEAST + 1][TILE_PX_NV][3])(const cbn_conv_px_args *) = {
        PX_FOR_TILES_(PX_NAMES_, PX_ROW_)};
    const int mr = a->mr ? a->mr : TILE_PX_MR;
    assert(LEAST <= mr && mr <= TILE_PX_MR && 1 <= a->oc_valid);
    assert(1 <= a->np && a->np <= TILE_PX_NV * VF_LANES && a->ic >= 0);
    assert(a->panels == 0 || a->np % VF_LANES == 0);
    const int vectors = (int)cbn_ceil_div(a->np, VF_LANES);
    cbn_conv_px_args rest = *a;
    if (a->copy) {
        cbn_conv_px_args first = *a;
        first.oc_valid = CBN_MIN(a->oc_valid, mr);
        tile[mr - LEAST][vectors - 1][PX_COPY](&first);
        rest.oc_valid -= first.oc_valid;
        if (rest.oc_valid == 0) return;
        rest.x = a->copy;
        rest.x_ic = vectors * VF_LANES;
        rest.x_panel = vectors * VF_LANES * a->ic;
        rest.x_padded = true;
        rest.w += mr * a->ic;
        rest.y += mr * a->y_oc;
        rest.epi.bias += mr;
        if (rest.epi.residual) rest.epi.residual += mr * a->y_oc;
    }
    const bool whole = rest.x_padded || a->np % VF_LANES == 0;
    tile[mr - LEAST][vectors - 1][whole ? PX_WHOLE : PX_PART](&rest);
}
