/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_tap: a tile of a convolution with pixels in vector lanes and weights broadcast; rows_copy: the padded copy of
 * the input it reads. Contracts in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_TAP_MR, TILE_TAP_ACC.
 * Defines  CBN_FN(conv_tap), CBN_FN(rows_copy).
 * Vector registers: at most TILE_TAP_ACC sums + the fewer of mr weights and nv pixel vectors + 1. */

/* One tap of a tile. The more numerous of weights and pixel vectors is used as it is loaded, the other kept in
 * registers. */
CBN_INLINE void CBN_FN(tap_step)(vf *acc, const int mr, const int nv, const float *const *p, int64_t at,
                              const float *w) {
    if (nv < mr) {
        vf q[CBN_TAP_MAX_NV];
        CBN_UNROLL for (int v = 0; v < nv; v++) q[v] = vf_pin(vf_load(p[v] + at));
        CBN_UNROLL for (int c = 0; c < mr; c++) {
            const vf b = vf_pin(vf_set1(w[c]));
            CBN_UNROLL for (int v = 0; v < nv; v++) acc[c * nv + v] = vf_fma(b, q[v], acc[c * nv + v]);
        }
    } else {
        vf b[TILE_TAP_MR];
        CBN_UNROLL for (int c = 0; c < mr; c++) b[c] = vf_pin(vf_set1(w[c]));
        CBN_UNROLL for (int v = 0; v < nv; v++) {
            const vf q = vf_pin(vf_load(p[v] + at));
            CBN_UNROLL for (int c = 0; c < mr; c++) acc[c * nv + v] = vf_fma(b[c], q, acc[c * nv + v]);
        }
    }
}

/* One tile of nv vectors; `valid` of them are stored. */
CBN_INLINE void CBN_FN(tap_tile)(const int mr, const int nv, const cbn_conv_tap_args *a, const int64_t *xpix,
                                 const int64_t *ypix, int64_t valid) {
    vf acc[TILE_TAP_ACC];
    CBN_UNROLL for (int i = 0; i < mr * nv; i++) acc[i] = vf_zero();

    const float *p[CBN_TAP_MAX_NV];
    CBN_UNROLL for (int v = 0; v < nv; v++) p[v] = a->x + xpix[CBN_MIN(v, valid - 1)];
    const float *w = a->w;
    const int32_t *t = a->tap;
    for (int64_t run = a->more_runs; run >= 0; run--, t += a->skip, w += a->skip * mr)
        for (const int32_t *end = t + a->ntaps; t < end; t++, w += mr) CBN_FN(tap_step)(acc, mr, nv, p, *t, w);

    CBN_BARRIER(); /* else what follows is loaded before the loop and takes registers there */
    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    const float *res = a->epi.residual, *bias = a->epi.bias;
    const int64_t y_oc = a->y_oc;
    float *y = a->y;
    CBN_UNROLL for (int c = 0; c < mr; c++) {
        const vf b = vf_set1(bias[c]);
        CBN_UNROLL for (int v = 0; v < nv; v++) acc[c * nv + v] = vf_add(acc[c * nv + v], b);
    }
    if (valid == nv && a->lanes == VF_LANES) {
        int64_t at[CBN_TAP_MAX_NV];
        CBN_UNROLL for (int v = 0; v < nv; v++) at[v] = ypix[v];
        if (res) {
            CBN_UNROLL for (int c = 0; c < mr; c++, res += y_oc) {
                CBN_UNROLL for (int v = 0; v < nv; v++) acc[c * nv + v] = vf_add(acc[c * nv + v], vf_load(res + at[v]));
            }
        }
        CBN_UNROLL for (int c = 0; c < mr; c++, y += y_oc) {
            CBN_UNROLL for (int v = 0; v < nv; v++) vf_store(y + at[v], vf_min(hi, vf_max(lo, acc[c * nv + v])));
        }
        return;
    }
    float sum[TILE_TAP_ACC * VF_LANES] = {0};
    CBN_UNROLL for (int i = 0; i < mr * nv; i++) vf_store(sum + i * VF_LANES, acc[i]);
    for (int c = 0; c < mr; c++) {
        for (int64_t v = 0; v < CBN_MIN(valid, nv); v++) {
            const int64_t at = c * y_oc + ypix[v];
            vf s = vf_load(sum + (c * nv + v) * VF_LANES);
            if (res) s = vf_add(s, vf_load_n(res + at, a->lanes));
            vf_store_n(y + at, vf_min(hi, vf_max(lo, s)), a->lanes);
        }
    }
}

/* Tiles of mr channels: as many vectors as there is room for, the last one perhaps half of that. */
CBN_INLINE void CBN_FN(tap_tiles)(const int mr, const cbn_conv_tap_args *args) {
    const cbn_conv_tap_args a = *args; /* stores to y may not change a local copy */
    const int nv = CBN_MIN(CBN_TAP_MAX_NV, TILE_TAP_ACC / mr);
    int64_t i = 0;
    for (; a.nv - i > nv / 2; i += nv) CBN_FN(tap_tile)(mr, nv, &a, a.xpix + i, a.ypix + i, CBN_MIN(nv, a.nv - i));
    if (i < a.nv) CBN_FN(tap_tile)(mr, nv / 2, &a, a.xpix + i, a.ypix + i, a.nv - i);
}
#define TAP_INSTANCE_(mr) \
    static void CBN_FN(tap_tiles_##mr)(const cbn_conv_tap_args *a) { CBN_FN(tap_tiles)(mr, a); }
#if TILE_TAP_MR == 4
#define TAP_FOR_MR_(X) X(1) X(2) X(3) X(4)
#elif TILE_TAP_MR == 8
#define TAP_FOR_MR_(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#else
#error "add a list for this TILE_TAP_MR"
#endif
TAP_FOR_MR_(TAP_INSTANCE_)

static void CBN_FN(conv_tap)(int mr, const cbn_conv_tap_args *a) {
#define TAP_NAME_(mr) CBN_FN(tap_tiles_##mr),
    static void (*const tiles[TILE_TAP_MR])(const cbn_conv_tap_args *) = {TAP_FOR_MR_(TAP_NAME_)};
    assert(1 <= mr && mr <= TILE_TAP_MR && a->ntaps >= 0 && a->nv >= 0 && 1 <= a->lanes && a->lanes <= VF_LANES);
    assert(a->more_runs >= 0 && a->skip >= 0);
    tiles[mr - 1](a);
}

/* ---- the copy ---------------------------------------------------------------------------------------------------- */

CBN_INLINE int64_t CBN_FN(rows_clip)(int64_t v) { return CBN_MAX(0, CBN_MIN(v, VF_LANES)); }

/* Elements x[at + l*step] for lanes l, 0 where that is not in 0 .. w-1. */
CBN_INLINE vf CBN_FN(rows_part)(const float *x, int64_t at, int64_t step, int64_t w) {
    if (step == 1) return vf_load_range(x + at, CBN_FN(rows_clip)(-at), CBN_FN(rows_clip)(w - at));
    if (step == 2) {
        const int64_t next = at + VF_LANES;
        return vf_even(vf_load_range(x + at, CBN_FN(rows_clip)(-at), CBN_FN(rows_clip)(w - at)),
                       vf_load_range(x + next, CBN_FN(rows_clip)(-next), CBN_FN(rows_clip)(w - next)));
    }
    float lane[VF_LANES];
    for (int l = 0; l < VF_LANES; l++, at += step) lane[l] = at >= 0 && at < w ? x[at] : 0.0f;
    return vf_load(lane);
}

CBN_INLINE void CBN_FN(rows_step)(const int64_t step, const cbn_rows_copy_args *args) {
    const cbn_rows_copy_args a = *args; /* stores may not change a local copy */
    const int64_t width = step * VF_LANES, all = a.n / VF_LANES;
    /* Vectors [left, right) meet the row, [first, last) of them lie inside it: at most one at either end does not. */
    const int64_t left = a.x0 < 0 ? CBN_MIN(all, -a.x0 / width) : 0;
    const int64_t right = CBN_MAX(left, a.w > a.x0 ? CBN_MIN(all, cbn_ceil_div(a.w - a.x0, width)) : 0);
    const int64_t first = CBN_MIN(right, a.x0 < 0 ? cbn_ceil_div(-a.x0, width) : 0);
    const int64_t last = CBN_MAX(first, a.w - a.x0 >= width ? CBN_MIN(right, (a.w - a.x0) / width) : 0);
    const int64_t left_at = a.x0 + left * width, right_at = a.x0 + last * width;
    for (int64_t i = 0; i < a.ic; i++) {
        const float *x = a.x + i * a.x_ic;
        float *to = a.to + i * a.to_ic;
        for (int64_t r = 0; r < a.rows; r++, x += a.x_row, to += a.to_row) {
            float *p = to;
            for (int64_t v = 0; v < left; v++, p += VF_LANES) vf_store(p, vf_zero());
            if (left < first) {
                vf_store(p, CBN_FN(rows_part)(x, left_at, step, a.w));
                p += VF_LANES;
            }
            const float *q = x + a.x0 + first * width;
            for (int64_t v = first; v < last; v++, p += VF_LANES, q += width) {
                if (step == 1) vf_store(p, vf_load(q));
                else if (step == 2) vf_store(p, vf_even(vf_load(q), vf_load(q + VF_LANES)));
                else vf_store(p, CBN_FN(rows_part)(q, 0, step, width));
            }
            if (last < right) {
                vf_store(p, CBN_FN(rows_part)(x, right_at, step, a.w));
                p += VF_LANES;
            }
            for (int64_t v = right; v < all; v++, p += VF_LANES) vf_store(p, vf_zero());
        }
    }
}

static void CBN_FN(rows_copy)(const cbn_rows_copy_args *a) {
    assert(a->n >= 0 && a->n % VF_LANES == 0 && a->w >= 0 && a->step >= 1);
    if (a->step == 1) CBN_FN(rows_step)(1, a);
    else if (a->step == 2) CBN_FN(rows_step)(2, a);
    else CBN_FN(rows_step)(a->step, a);
}
