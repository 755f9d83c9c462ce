/* SPDX-License-Identifier: BSD-3-Clause */
/* What a transposed convolution by phases does around its matrix products; contracts in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header.
 * Defines  CBN_FN(panel_pack), CBN_FN(interleave).
 * Vector registers of interleave: one for each phase (at most 8), three constants, two temporaries. */

/* Lanes lo <= l < hi from every other element, 0 in the others. */
CBN_INLINE vf CBN_FN(pack_skip)(const float *x, int64_t lo, int64_t hi) {
    const int64_t end = 2 * hi - 1; /* behind the last element */
    return vf_even(vf_load_range(x, CBN_MIN(2 * lo, VF_LANES), CBN_MIN(end, VF_LANES)),
                   vf_load_range(x + VF_LANES, CBN_MAX(2 * lo - VF_LANES, 0), CBN_MAX(end - VF_LANES, 0)));
}

/* One move for nc channels. */
CBN_INLINE void CBN_FN(pack_move)(const int nc, float *out, int64_t out_c, const float *x, int64_t x_c,
                                  const cbn_panel_move *m) {
    const int64_t lo = m->lo, hi = m->hi;
    x += m->x;
    out += m->out;
    if (m->skip && lo < hi) {
        if (m->n == VF_LANES && lo == 0 && hi == VF_LANES) {
            CBN_UNROLL for (int c = 0; c < nc; c++)
                vf_store(out + c * out_c, CBN_FN(pack_skip)(x + c * x_c, 0, VF_LANES));
        } else if (m->n == VF_LANES) {
            CBN_UNROLL for (int c = 0; c < nc; c++) vf_store(out + c * out_c, CBN_FN(pack_skip)(x + c * x_c, lo, hi));
        } else {
            for (int c = 0; c < nc; c++) vf_store_n(out + c * out_c, CBN_FN(pack_skip)(x + c * x_c, lo, hi), m->n);
        }
    } else if (hi - lo == VF_LANES && m->n == VF_LANES) {
        CBN_UNROLL for (int c = 0; c < nc; c++) vf_store(out + c * out_c, vf_load(x + c * x_c));
    } else if (m->n == VF_LANES) {
        CBN_UNROLL for (int c = 0; c < nc; c++)
            vf_store(out + c * out_c, lo < hi ? vf_load_range(x + c * x_c, lo, hi) : vf_zero());
    } else {
        for (int c = 0; c < nc; c++)
            vf_store_n(out + c * out_c, lo < hi ? vf_load_range(x + c * x_c, lo, hi) : vf_zero(), m->n);
    }
}

static void CBN_FN(panel_pack)(float *out, int64_t out_c, const float *x, int64_t x_c, int64_t n,
                               const cbn_panel_move *moves, int64_t nmoves) {
    enum { TOGETHER = 4 }; /* channels, so that looking at a move costs little */
    for (; n >= TOGETHER; n -= TOGETHER, out += TOGETHER * out_c, x += TOGETHER * x_c)
        for (int64_t m = 0; m < nmoves; m++) CBN_FN(pack_move)(TOGETHER, out, out_c, x, x_c, &moves[m]);
    for (; n > 0; n--, out += out_c, x += x_c)
        for (int64_t m = 0; m < nmoves; m++) CBN_FN(pack_move)(1, out, out_c, x, x_c, &moves[m]);
}

/* v[r] holds elements of phase r; afterwards the ns vectors hold them in the order phase 0 of the
 * first element, phase 1 of the first element, ... */
CBN_INLINE void CBN_FN(weave)(const int ns, vf *v) {
    vf t[8];
    if (ns == 2) {
        t[0] = vf_zip_lo(v[0], v[1]);
        t[1] = vf_zip_hi(v[0], v[1]);
    } else {
        /* Phases of even and of odd number woven for themselves, then into each other. */
        vf e[4] = {v[0], v[2], ns == 8 ? v[4] : v[0], ns == 8 ? v[6] : v[0]};
        vf o[4] = {v[1], v[3], ns == 8 ? v[5] : v[0], ns == 8 ? v[7] : v[0]};
        if (ns == 8) {
            const vf a0 = vf_zip_lo(e[0], e[2]), a1 = vf_zip_hi(e[0], e[2]), b0 = vf_zip_lo(e[1], e[3]),
                     b1 = vf_zip_hi(e[1], e[3]), c0 = vf_zip_lo(o[0], o[2]), c1 = vf_zip_hi(o[0], o[2]),
                     d0 = vf_zip_lo(o[1], o[3]), d1 = vf_zip_hi(o[1], o[3]);
            e[0] = vf_zip_lo(a0, b0), e[1] = vf_zip_hi(a0, b0), e[2] = vf_zip_lo(a1, b1),
            e[3] = vf_zip_hi(a1, b1);
            o[0] = vf_zip_lo(c0, d0), o[1] = vf_zip_hi(c0, d0), o[2] = vf_zip_lo(c1, d1),
            o[3] = vf_zip_hi(c1, d1);
        } else {
            const vf e0 = e[0], o0 = o[0];
            e[0] = vf_zip_lo(e0, e[1]), e[1] = vf_zip_hi(e0, e[1]);
            o[0] = vf_zip_lo(o0, o[1]), o[1] = vf_zip_hi(o0, o[1]);
        }
        CBN_UNROLL for (int i = 0; i < ns / 2; i++) {
            t[2 * i] = vf_zip_lo(e[i], o[i]);
            t[2 * i + 1] = vf_zip_hi(e[i], o[i]);
        }
    }
    CBN_UNROLL for (int i = 0; i < ns; i++) v[i] = t[i];
}

CBN_INLINE vf CBN_FN(weave_end)(vf s, vf bias, const float *res, int64_t n, vf lo, vf hi) {
    s = vf_add(s, bias);
    if (res) s = vf_add(s, vf_load_n(res, n));
    return vf_min(hi, vf_max(lo, s));
}

/* One channel, ns phases. */
CBN_INLINE void CBN_FN(weave_row)(const int ns, float *y, const float *s, int64_t s_p, int64_t n,
                                  const float *res, vf bias, vf lo, vf hi) {
    vf v[8];
    for (; n >= ns * VF_LANES; n -= ns * VF_LANES, s += VF_LANES) {
        CBN_UNROLL for (int r = 0; r < ns; r++) v[r] = vf_load(s + r * s_p);
        CBN_FN(weave)(ns, v);
        if (res) {
            CBN_UNROLL for (int r = 0; r < ns; r++) v[r] =
                vf_add(vf_add(v[r], bias), vf_load(res + r * VF_LANES));
            CBN_UNROLL for (int r = 0; r < ns; r++) vf_store(y + r * VF_LANES, vf_min(hi, vf_max(lo, v[r])));
            res += ns * VF_LANES;
        } else {
            CBN_UNROLL for (int r = 0; r < ns; r++)
                vf_store(y + r * VF_LANES, vf_min(hi, vf_max(lo, vf_add(v[r], bias))));
        }
        y += ns * VF_LANES;
    }
    if (n == 0) return;
    CBN_UNROLL for (int r = 0; r < ns; r++) v[r] =
        vf_load_n(s + r * s_p, r < n ? (n - r + ns - 1) / ns : 0); /* elements of this phase that are left */
    CBN_FN(weave)(ns, v);
    CBN_UNROLL for (int r = 0; r < ns; r++) {
        const int64_t left = n - r * VF_LANES;
        if (left <= 0) return;
        const int64_t m = CBN_MIN(left, VF_LANES);
        vf_store_n(y + r * VF_LANES,
                   CBN_FN(weave_end)(v[r], bias, res ? res + r * VF_LANES : NULL, m, lo, hi), m);
    }
}

static void CBN_FN(interleave)(float *y, int64_t y_c, int nch, int ns, const float *s, int64_t s_c,
                               int64_t s_p, int64_t n, const cbn_epilogue_args *e) {
    assert(ns >= 1 && nch >= 0 && n >= 0);
    const vf lo = vf_set1(e->lo), hi = vf_set1(e->hi);
    const float *res = e->residual;
    for (int c = 0; c < nch; c++, y += y_c, s += s_c) {
        const vf bias = vf_set1(e->bias[c]);
        if (ns == 2) {
            CBN_FN(weave_row)(2, y, s, s_p, n, res, bias, lo, hi);
        } else if (ns == 4) {
            CBN_FN(weave_row)(4, y, s, s_p, n, res, bias, lo, hi);
        } else if (ns == 8) {
            CBN_FN(weave_row)(8, y, s, s_p, n, res, bias, lo, hi);
        } else {
            for (int r = 0; r < ns; r++) {
                for (int64_t i = 0, o = r; o < n; i++, o += ns) {
                    float v = s[r * s_p + i] + e->bias[c];
                    if (res) v += res[o];
                    v = e->lo > v ? e->lo : v;
                    y[o] = e->hi < v ? e->hi : v;
                }
            }
        }
        if (res) res += y_c;
    }
}
