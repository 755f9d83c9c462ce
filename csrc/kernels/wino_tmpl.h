/* SPDX-License-Identifier: BSD-3-Clause */
/* The transforms of a Winograd convolution; contracts and conventions in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header.
 * Defines  CBN_FN(wino_in), CBN_FN(wino_out) and an instance for each frequent shape of a tile.
 *
 * Every constant of B and A is a small dyadic number, so it is exact; the points come in pairs +-p, so that even and
 * odd powers are summed once for both. All instances of an axis use the same operations in the same order. */

/* Hides a pointer from gcc, which otherwise keeps one pointer for each of the streams and most of them in memory. */
#define WT_OPAQUE(p) __asm__("" : "+r"(p))

enum { CBN_FN(WT_MAX) = 6 }; /* points of an axis */

/* ---- one axis ---- */
CBN_INLINE void CBN_FN(wt_bt)(const int n, const vf *d, vf *o) {
    if (n == 1) {
        o[0] = d[0];
    } else if (n == 4) {
        o[0] = vf_sub(d[2], d[0]);
        o[1] = vf_add(d[1], d[2]);
        o[2] = vf_sub(d[2], d[1]);
        o[3] = vf_sub(d[3], d[1]);
    } else {
        const float a = 5 / 8.0f, b = 3 / 2.0f;
        const vf both = vf_set1(-(a * a + b * b)), product = vf_set1(a * a * b * b);
        const vf even_a = vf_fma(vf_set1(-b * b), d[2], d[4]);
        const vf odd_a = vf_fma(vf_set1(-a * b * b), d[1], vf_mul(vf_set1(a), d[3]));
        const vf even_b = vf_fma(vf_set1(-a * a), d[2], d[4]);
        const vf odd_b = vf_fma(vf_set1(-b * a * a), d[1], vf_mul(vf_set1(b), d[3]));
        o[0] = vf_fma(both, d[2], vf_fma(product, d[0], d[4]));
        o[1] = vf_add(even_a, odd_a);
        o[2] = vf_sub(even_a, odd_a);
        o[3] = vf_add(even_b, odd_b);
        o[4] = vf_sub(even_b, odd_b);
        o[5] = vf_fma(both, d[3], vf_fma(product, d[1], d[5]));
    }
}

CBN_INLINE void CBN_FN(wt_at)(const int n, const int m, const vf *d, vf *o) {
    if (n == 1) {
        o[0] = d[0];
    } else if (n == 4) {
        const vf even = vf_add(d[1], d[2]), odd = vf_sub(d[1], d[2]);
        o[0] = vf_add(d[0], even);
        o[1] = m == 2 ? vf_add(odd, d[3]) : odd;
        if (m > 2) o[2] = vf_add(even, d[3]);
    } else {
        const float a = 5 / 8.0f, b = 3 / 2.0f;
        const vf even_a = vf_add(d[1], d[2]), odd_a = vf_sub(d[1], d[2]);
        const vf even_b = vf_add(d[3], d[4]), odd_b = vf_sub(d[3], d[4]);
        o[0] = vf_add(vf_add(d[0], even_a), even_b);
        float pa = a, pb = b;
        CBN_UNROLL for (int i = 1; i < m; i++) {
            const vf xa = i % 2 ? odd_a : even_a, xb = i % 2 ? odd_b : even_b;
            const vf s = i == m - 1 ? vf_fma(vf_set1(pa), xa, d[5]) : vf_mul(vf_set1(pa), xa);
            o[i] = vf_fma(vf_set1(pb), xb, s);
            pa *= a;
            pb *= b;
        }
    }
}

/* ---- wino_in ---- */
/* tmp holds [column][nh]: rows at a power-of-two distance would meet in one set of the cache. */
CBN_INLINE void CBN_FN(wt_in)(const int nh, const int nw, const cbn_wino_in_args *a) {
    vf d[CBN_FN(WT_MAX)], o[CBN_FN(WT_MAX)];
    const int32_t *const col = a->col;
    const int64_t v_xi = a->v_xi, ntiles = a->ntiles;
    float *v = a->v;
    if (nw == 1) {
        for (int64_t t = 0; t < ntiles; t++) {
            CBN_UNROLL for (int i = 0; i < nh; i++) d[i] = vf_load(a->row[i] + (int64_t)col[t] * VF_LANES);
            CBN_FN(wt_bt)(nh, d, o);
            CBN_UNROLL for (int i = 0; i < nh; i++) vf_store(v + i * v_xi + t * VF_LANES, o[i]);
        }
        return;
    }
    const float *from = a->row[0];
    if (nh > 1) {
        const float *row[CBN_FN(WT_MAX)];
        float *to = a->tmp;
        CBN_UNROLL for (int i = 0; i < nh; i++) row[i] = a->row[i];
        for (int64_t c = 0; c < a->ncols; c++, to += nh * VF_LANES) {
            CBN_UNROLL for (int i = 0; i < nh; i++) d[i] = vf_load(row[i] + c * VF_LANES);
            CBN_FN(wt_bt)(nh, d, o);
            CBN_UNROLL for (int i = 0; i < nh; i++) vf_store(to + i * VF_LANES, o[i]);
        }
        from = a->tmp;
    }
    const int64_t pitch = a->step * nh * VF_LANES;
    for (int64_t t = 0; t < ntiles; t++, v += VF_LANES) {
        const float *p = from + (int64_t)col[t] * nh * VF_LANES;
        float *q = v;
        CBN_UNROLL for (int i = 0; i < nh; i++, p += VF_LANES, q += nw * v_xi) {
            CBN_UNROLL for (int j = 0; j < nw; j++) d[j] = vf_load(p + j * pitch);
            CBN_FN(wt_bt)(nw, d, o);
            WT_OPAQUE(q);
            CBN_UNROLL for (int j = 0; j < nw; j++) vf_store(q + j * v_xi, o[j]);
        }
    }
}

#define WT_FOR_IN_(X) X(1, 1) X(1, 4) X(1, 6) X(4, 1) X(6, 1) X(4, 4) X(4, 6) X(6, 4) X(6, 6)
#define WT_IN_(nh, nw)                                                              \
    static void CBN_FN(CBN_CAT(wt_in_##nh, nw))(const cbn_wino_in_args *a) { CBN_FN(wt_in)(nh, nw, a); }
WT_FOR_IN_(WT_IN_)

static void CBN_FN(wino_in)(const cbn_wino_in_args *a) {
#define WT_IN_CASE_(h, w) \
    if (a->nh == h && a->nw == w) CBN_FN(CBN_CAT(wt_in_##h, w))(a);
    WT_FOR_IN_(WT_IN_CASE_)
}

/* ---- wino_out ---- */
CBN_INLINE void CBN_FN(wt_out)(const int nh, const int mh, const int nw, const int mw, const cbn_wino_out_args *a) {
    const int64_t pitch = a->step * VF_LANES, o_row = a->o_row;
    const float *m = a->m;
    for (int64_t t = 0; t < a->ntiles; t++, m += a->m_t) {
        vf y[CBN_FN(WT_MAX) * CBN_FN(WT_MAX)], d[CBN_FN(WT_MAX)], o[CBN_FN(WT_MAX)];
        CBN_UNROLL for (int j = 0; j < nw; j++) {
            CBN_UNROLL for (int i = 0; i < nh; i++) d[i] = vf_load(m + (i * nw + j) * VF_LANES);
            CBN_FN(wt_at)(nh, mh, d, o);
            CBN_UNROLL for (int i = 0; i < mh; i++) y[i * CBN_FN(WT_MAX) + j] = o[i];
        }
        float *q = a->o + (int64_t)a->col[t] * VF_LANES;
        CBN_UNROLL for (int i = 0; i < mh; i++, q += o_row) {
            CBN_FN(wt_at)(nw, mw, y + i * CBN_FN(WT_MAX), o);
            WT_OPAQUE(q);
            CBN_UNROLL for (int j = 0; j < mw; j++) vf_store(q + j * pitch, o[j]);
        }
    }
}

/* Any shape: the axis to be transformed is looked up for each vector. */
static void CBN_FN(wt_at_any)(int n, int m, const vf *d, vf *o) {
    switch (n * 8 + m) {
#define WT_AT_(n, m) \
    case n * 8 + m: CBN_FN(wt_at)(n, m, d, o); break;
        WT_AT_(1, 1) WT_AT_(4, 2) WT_AT_(4, 3) WT_AT_(6, 2) WT_AT_(6, 3) WT_AT_(6, 4)
    default:
        assert(n == 6 && m == 5);
        CBN_FN(wt_at)(6, 5, d, o);
    }
}

static void CBN_FN(wt_out_any)(const cbn_wino_out_args *a) {
    const int nh = a->nh, mh = a->mh, nw = a->nw, mw = a->mw;
    for (int64_t t = 0; t < a->ntiles; t++) {
        vf y[CBN_FN(WT_MAX)][CBN_FN(WT_MAX)], d[CBN_FN(WT_MAX)], o[CBN_FN(WT_MAX)];
        for (int i = 0; i < CBN_FN(WT_MAX); i++) o[i] = vf_zero(); /* gcc does not see that all that is used is set */
        for (int j = 0; j < nw; j++) {
            for (int i = 0; i < nh; i++) d[i] = vf_load(a->m + t * a->m_t + (i * nw + j) * VF_LANES);
            CBN_FN(wt_at_any)(nh, mh, d, o);
            for (int i = 0; i < mh; i++) y[i][j] = o[i];
        }
        for (int i = 0; i < mh; i++) {
            CBN_FN(wt_at_any)(nw, mw, y[i], o);
            for (int j = 0; j < mw; j++) vf_store(a->o + i * a->o_row + (a->col[t] + j * a->step) * VF_LANES, o[j]);
        }
    }
}

#define WT_FOR_OUT_(X)                                                                                 \
    X(6, 4, 6, 4) X(6, 4, 4, 2) X(4, 2, 6, 4) X(4, 2, 4, 2) X(6, 2, 6, 2) X(6, 3, 6, 3) X(6, 5, 6, 5) \
    X(4, 3, 4, 3) X(6, 5, 4, 3) X(4, 3, 6, 5)                                                          \
    X(1, 1, 4, 2) X(1, 1, 4, 3) X(1, 1, 6, 2) X(1, 1, 6, 3) X(1, 1, 6, 4) X(1, 1, 6, 5)                \
    X(4, 2, 1, 1) X(4, 3, 1, 1) X(6, 2, 1, 1) X(6, 3, 1, 1) X(6, 4, 1, 1) X(6, 5, 1, 1)
#define WT_OUT_(nh, mh, nw, mw)                                                          \
    static void CBN_FN(CBN_CAT(wt_out_##nh##mh, nw##mw))(const cbn_wino_out_args *a) {   \
        CBN_FN(wt_out)(nh, mh, nw, mw, a);                                               \
    }
WT_FOR_OUT_(WT_OUT_)

static void CBN_FN(wino_out)(const cbn_wino_out_args *a) {
    switch (((a->nh * 8 + a->mh) * 8 + a->nw) * 8 + a->mw) {
#define WT_OUT_CASE_(nh, mh, nw, mw)          \
    case ((nh * 8 + mh) * 8 + nw) * 8 + mw:   \
        CBN_FN(CBN_CAT(wt_out_##nh##mh, nw##mw))(a); \
        break;
        WT_FOR_OUT_(WT_OUT_CASE_)
    default:
        CBN_FN(wt_out_any)(a);
    }
}
