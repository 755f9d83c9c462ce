/* SPDX-License-Identifier: BSD-3-Clause */
/* conv_oc: a tile of np pixels by nv vectors of output channels; contract in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_OC_NP and TILE_OC_NV: the largest tile.
 * Defines  CBN_FN(conv_oc) and one instance for each (np, nv) up to that.
 * Vector registers: np*nv sums + nv weights + 1 broadcast; TILE_OC_NP*TILE_OC_NV + TILE_OC_NV + 1
 * must fit. General registers: np pixel addresses + 7. */

/* Hides a value from gcc, which otherwise replaces the one offset shared by all pixels by one
 * pointer per pixel. */
#define OC_OPAQUE(v) __asm__("" : "+r"(v))

/* Sums of one (channel, tap): acc[p][v] += w[v] * pixel p. */
CBN_INLINE void CBN_FN(oc_step)(const int np, const int nv, vf *acc, const float *w,
                                const float *const *px, int64_t off) {
    vf wv[TILE_OC_NV];
    CBN_UNROLL for (int v = 0; v < nv; v++) wv[v] = vf_pin(vf_load(w + v * VF_LANES));
    CBN_UNROLL for (int p = 0; p < np; p++) {
        const vf b = vf_pin(vf_set1(px[p][off]));
        CBN_UNROLL for (int v = 0; v < nv; v++) acc[p * nv + v] = vf_fma(b, wv[v], acc[p * nv + v]);
    }
}

CBN_INLINE vf CBN_FN(oc_clamp)(vf a, vf lo, vf hi) { return vf_min(hi, vf_max(lo, a)); }

/* Output channels contiguous (linear): the accumulators are stored as they lie. */
CBN_INLINE void CBN_FN(oc_store_lanes)(const int np, const int nv, const vf *acc,
                                       const cbn_conv_oc_args *a) {
    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    CBN_UNROLL for (int v = 0; v < nv; v++) {
        const int64_t n = CBN_MIN(a->oc_valid - v * VF_LANES, VF_LANES);
        if (n <= 0) return;
        CBN_UNROLL for (int p = 0; p < np; p++) {
            const int64_t at = a->ypix[p] + v * VF_LANES;
            vf s = acc[p * nv + v];
            if (a->epi.residual) s = vf_add(s, vf_load_n(a->epi.residual + at, n));
            vf_store_n(a->y + at, CBN_FN(oc_clamp)(s, lo, hi), n);
        }
    }
}

/* The tile's pixels are neighbours in y: transpose, so that each channel's pixels leave as one
 * row. */
CBN_INLINE void CBN_FN(oc_store_rows)(const int np, const int nv, const vf *acc,
                                      const cbn_conv_oc_args *a) {
    const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
    const float *res = a->epi.residual;
    CBN_UNROLL for (int v = 0; v < nv; v++) {
        const int valid = CBN_MIN(a->oc_valid - v * VF_LANES, VF_LANES);
        CBN_UNROLL for (int h = 0; h < np; h += VF_LANES) {
            const int n = CBN_MIN(np - h, VF_LANES);
            vf r[VF_LANES];
            CBN_UNROLL for (int i = 0; i < VF_LANES; i++) r[i] =
                i < n ? acc[(i < n ? h + i : 0) * nv + v] : vf_zero();
            if (!res) {
                CBN_UNROLL for (int i = 0; i < n; i++) r[i] = CBN_FN(oc_clamp)(r[i], lo, hi);
            }
            vf_transpose(r);
            int64_t at = a->ypix[0] + h + v * VF_LANES * a->y_oc;
            CBN_UNROLL for (int c = 0; c < VF_LANES; c++) {
                if (c >= valid) break;
                if (res) r[c] = CBN_FN(oc_clamp)(vf_add(r[c], vf_load_n(res + at, n)), lo, hi);
                vf_store_n(a->y + at, r[c], n);
                at += a->y_oc;
            }
        }
    }
}

/* Pixels anywhere: one element at a time, from a copy s[np][vw] of the sums, clamped already when
 * there is no residual. Channel by channel, since those lie far apart while the pixels of a tile
 * are close. Shared by all instances. */
static __attribute__((noinline)) void CBN_FN(oc_scatter)(int np, int vw, const float *s,
                                                         const cbn_conv_oc_args *a) {
    const int64_t *const ypix = a->ypix;
    float *y = a->y;
    if (!a->epi.residual) {
        for (int c = 0; c < a->oc_valid; c++, y += a->y_oc)
            for (int p = 0; p < np; p++) y[ypix[p]] = s[p * vw + c];
        return;
    }
    const float *res = a->epi.residual;
    const float lo = a->epi.lo, hi = a->epi.hi;
    for (int c = 0; c < a->oc_valid; c++, y += a->y_oc, res += a->y_oc) {
        for (int p = 0; p < np; p++) {
            float v = s[p * vw + c] + res[ypix[p]];
            v = lo > v ? lo : v;
            y[ypix[p]] = hi < v ? hi : v;
        }
    }
}

CBN_INLINE void CBN_FN(oc_tile)(const int np, const int nv, const cbn_conv_oc_args *a) {
    vf acc[TILE_OC_NP * TILE_OC_NV];
    const float *px[TILE_OC_NP];
    CBN_UNROLL for (int p = 0; p < np; p++) px[p] = a->x + a->xpix[p];
    CBN_UNROLL for (int i = 0; i < np * nv; i++) acc[i] =
        a->load_acc ? vf_load(a->acc + i * VF_LANES) : vf_zero();

    const float *w = a->w;
    const int64_t x_ic = a->x_ic, w_ic = a->w_ic, ntaps = a->ntaps;
    const float *ahead = a->prefetch ? a->prefetch : w;
    const int64_t ahead_step = a->prefetch ? a->prefetch_step : 0;
    if (ntaps == 1) {
        int64_t off = a->tap_x[0];
        w += a->tap_w[0];
        for (int64_t i = a->ic; i > 0; i--) {
            __builtin_prefetch(ahead, 0, 2);
            ahead += ahead_step;
            CBN_FN(oc_step)(np, nv, acc, w, px, off);
            off += x_ic;
            w += w_ic;
            OC_OPAQUE(off);
        }
    } else if (ntaps > 1) {
        const int64_t *const tx = a->tap_x, *const tw = a->tap_w;
        int64_t xo = 0;
        for (int64_t i = a->ic; i > 0; i--) {
            __builtin_prefetch(ahead, 0, 2);
            ahead += ahead_step;
            for (int64_t t = 0; t < ntaps; t++)
                CBN_FN(oc_step)(np, nv, acc, w + tw[t], px, xo + tx[t]);
            xo += x_ic;
            w += w_ic;
        }
    }

    if (!a->y) {
        float *const sums = a->acc; /* read once: the stores might change it, for all gcc knows */
        CBN_UNROLL for (int i = 0; i < np * nv; i++) vf_store(sums + i * VF_LANES, acc[i]);
        return;
    }
    CBN_UNROLL for (int v = 0; v < nv; v++) {
        const int64_t n = CBN_MAX(CBN_MIN(a->oc_valid - v * VF_LANES, VF_LANES), 0);
        const vf b = vf_load_n(a->epi.bias + v * VF_LANES, n);
        CBN_UNROLL for (int p = 0; p < np; p++) acc[p * nv + v] = vf_add(acc[p * nv + v], b);
    }
    if (a->y_oc == 1) {
        CBN_FN(oc_store_lanes)(np, nv, acc, a);
    } else if (a->y_run) {
        CBN_FN(oc_store_rows)(np, nv, acc, a);
    } else {
        float sums[TILE_OC_NP * TILE_OC_NV * VF_LANES];
        if (!a->epi.residual) {
            const vf lo = vf_set1(a->epi.lo), hi = vf_set1(a->epi.hi);
            CBN_UNROLL for (int i = 0; i < np * nv; i++) acc[i] = CBN_FN(oc_clamp)(acc[i], lo, hi);
        }
        CBN_UNROLL for (int i = 0; i < np * nv; i++) vf_store(sums + i * VF_LANES, acc[i]);
        CBN_FN(oc_scatter)(np, nv * VF_LANES, sums, a);
    }
}

/* Instances. The list of pixels stops at the tile size of the ISA. */
#define OC_INSTANCE_(np, nv)                                                 \
    static void CBN_FN(CBN_CAT(oc_##np, x##nv))(const cbn_conv_oc_args *a) { \
        CBN_FN(oc_tile)(np, nv, a);                                          \
    }
#if TILE_OC_NV == 2
#define OC_FOR_NV_(X, np) X(np, 1) X(np, 2)
#elif TILE_OC_NV == 4
#define OC_FOR_NV_(X, np) X(np, 1) X(np, 2) X(np, 3) X(np, 4)
#else
#error "add a list for this TILE_OC_NV"
#endif
#if TILE_OC_NP == 4
#define OC_FOR_TILES_(X, R) R(X, 1) R(X, 2) R(X, 3) R(X, 4)
#elif TILE_OC_NP == 6
#define OC_FOR_TILES_(X, R) R(X, 1) R(X, 2) R(X, 3) R(X, 4) R(X, 5) R(X, 6)
#else
#error "add a list for this TILE_OC_NP"
#endif
OC_FOR_TILES_(OC_INSTANCE_, OC_FOR_NV_)

static void CBN_FN(conv_oc)(int np, int nv, const cbn_conv_oc_args *a) {
#define OC_ROW_(X, np) {OC_FOR_NV_(X, np)},
#define OC_NAME_(np, nv) CBN_FN(CBN_CAT(oc_##np, x##nv)),
    static void (*const tile[TILE_OC_NP][TILE_OC_NV])(const cbn_conv_oc_args *) = {
        OC_FOR_TILES_(OC_NAME_, OC_ROW_)};
    assert(1 <= np && np <= TILE_OC_NP && 1 <= nv && nv <= TILE_OC_NV);
    assert(a->ic >= 0 && a->ntaps >= 0 && 1 <= a->oc_valid && a->oc_valid <= nv * VF_LANES);
    assert(a->y || a->acc);
    tile[np - 1][nv - 1](a);
}
