/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_px: blocks of up to TILE_PX_MR output channels by up to TILE_PX_NV vectors of pixels; contract in
 * cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_PX_MR, TILE_PX_NV.
 * Defines  CBN_FN(conv_px).
 * Vector registers: TILE_PX_MR*TILE_PX_NV sums + TILE_PX_NV pixels + 1 weight; of few pixels at most 12 sums + 3
 * weights + 1 pixel. */

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

/* One block. It asks for the lines of its residual before it sums: afterwards it would have to wait for them. (The line
 * of the first pixel is most often that of the panel before.) Prefetch: none, one line in each channel's step, or one
 * whenever pf_mask leaves nothing of the number of channels to go. */
CBN_INLINE void CBN_FN(px_tile)(const int mr, const int nv, const CBN_FN(px_kind) kind, const CBN_FN(px_fetch) fetch,
                                const int64_t last, const int64_t valid, const CBN_FN(px_block) *b, const float *pf,
                                const int64_t pf_mask, const cbn_conv_px_args *a) {
    vf acc[TILE_PX_MR * TILE_PX_NV];
    CBN_UNROLL for (int i = 0; i < mr * nv; i++) acc[i] = vf_zero();
    if (b->residual) {
        CBN_UNROLL for (int c = 0; c < mr; c++)
            __builtin_prefetch(b->residual + c * a->y_oc + nv * VF_LANES - 1);
    }
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

#if TILE_PX_MR <= VF_LANES
/* A few pixels leave most lanes of a vector idle: for them channels lie in the lanes, one vector of sums for each of
 * `nb` blocks of mr and each pixel. What the lanes beyond mr add up is thrown away. The order of a sum is the same. */
enum { PX_FEW = 4, PX_FEW_BLOCKS = 3 };

CBN_INLINE void CBN_FN(px_few_step)(const int np, const int nb, const bool whole, int mr, const float *x,
                                    const float *w, int64_t w_block, vf *acc) {
    if (!whole) { /* the mask takes the register of a weight */
        CBN_UNROLL for (int b = 0; b < nb; b++) {
            const vf wb = vf_pin(vf_load_n(w + b * w_block, mr));
            CBN_UNROLL for (int p = 0; p < np; p++) acc[p * nb + b] = vf_fma(wb, vf_set1(x[p]), acc[p * nb + b]);
            CBN_BARRIER(); /* nor may pixels stay in registers */
        }
        return;
    }
    vf wv[PX_FEW_BLOCKS];
    CBN_UNROLL for (int b = 0; b < nb; b++) wv[b] = vf_pin(vf_load(w + b * w_block));
    CBN_UNROLL for (int p = 0; p < np; p++) {
        const vf xv = vf_pin(vf_set1(x[p]));
        CBN_UNROLL for (int b = 0; b < nb; b++) acc[p * nb + b] = vf_fma(wv[b], xv, acc[p * nb + b]);
    }
}

CBN_INLINE void CBN_FN(px_few)(const int np, const int nb, int mr, const CBN_FN(px_block) *of,
                               const cbn_conv_px_args *a) {
    vf acc[PX_FEW * PX_FEW_BLOCKS];
    CBN_UNROLL for (int i = 0; i < np * nb; i++) acc[i] = vf_zero();
    const float *x = of->x, *w = of->w;
    const int64_t w_block = mr * a->ic;
    int64_t k = 0;
    /* A whole vector of weights ends before the block does. */
    for (; k <= a->ic - cbn_ceil_div(VF_LANES, mr); k++, x += a->x_ic, w += mr)
        CBN_FN(px_few_step)(np, nb, true, mr, x, w, w_block, acc);
    for (; k < a->ic; k++, x += a->x_ic, w += mr) CBN_FN(px_few_step)(np, nb, false, mr, x, w, w_block, acc);
    const float *res = of->residual;
    float *y = of->y;
    CBN_UNROLL for (int b = 0; b < nb; b++) {
        float sum[PX_FEW][VF_LANES];
        const vf bias = vf_load_n(of->bias + b * mr, mr);
        CBN_UNROLL for (int p = 0; p < np; p++) vf_store(sum[p], vf_add(acc[p * nb + b], bias));
        for (int c = 0; c < mr; c++, y += a->y_oc) {
            CBN_UNROLL for (int p = 0; p < np; p++) {
                float v = res ? sum[p][c] + res[p] : sum[p][c];
                v = a->epi.lo > v ? a->epi.lo : v;
                y[p] = a->epi.hi < v ? a->epi.hi : v;
            }
            if (res) res += a->y_oc;
        }
    }
}

/* Does some of the blocks at *b, at least 2 of `blocks`, and returns how many. */
static int64_t CBN_FN(px_few_blocks)(int mr, int64_t blocks, const CBN_FN(px_block) *b, const cbn_conv_px_args *a) {
    const int64_t n = blocks == PX_FEW_BLOCKS || blocks > PX_FEW_BLOCKS + 1 ? PX_FEW_BLOCKS : 2;
#define PX_FEW_(few)                                              \
    if (a->np == few && n == 2) CBN_FN(px_few)(few, 2, mr, b, a); \
    if (a->np == few && n == 3) CBN_FN(px_few)(few, 3, mr, b, a);
    PX_FEW_(1) PX_FEW_(2) PX_FEW_(3) PX_FEW_(4)
    return n;
}
#endif

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
#if TILE_PX_MR <= VF_LANES
    CBN_FN(px_block) b = {rest.x, rest.w, rest.epi.bias, rest.epi.residual, rest.y, NULL};
    while (a->np <= PX_FEW && rest.panels == 0 && rest.oc_valid >= 2 * mr) {
        const int64_t done = CBN_FN(px_few_blocks)(mr, rest.oc_valid / mr, &b, &rest) * mr;
        rest.oc_valid -= (int32_t)done;
        b.w += done * rest.ic;
        b.bias += done;
        b.y += done * rest.y_oc;
        if (b.residual) b.residual += done * rest.y_oc;
    }
    if (rest.oc_valid == 0) return;
    rest.w = b.w;
    rest.y = b.y;
    rest.epi.bias = b.bias;
    rest.epi.residual = b.residual;
#endif
    const bool whole = rest.x_padded || a->np % VF_LANES == 0;
    tile[mr - LEAST][vectors - 1][whole ? PX_WHOLE : PX_PART](&rest);
}
