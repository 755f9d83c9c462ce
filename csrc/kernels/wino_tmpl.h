/* SPDX-License-Identifier: BSD-3-Clause */
/* The steps of a Winograd convolution; contracts in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_OC_NP.
 * Defines  CBN_FN(lanes_gather), CBN_FN(wino_in), CBN_FN(wino_gemm), CBN_FN(wino_out), CBN_FN(lanes_scatter). */

static void CBN_FN(lanes_gather)(float *s, const float *x, int64_t x_c, int nch, int64_t x0, int64_t n, int64_t w) {
    for (int64_t c = 0; c < n; c++)
        for (int l = 0; l < VF_LANES; l++)
            s[c * VF_LANES + l] = x0 + c >= 0 && x0 + c < w && l < nch ? x[l * x_c + x0 + c] : 0.0f;
}

/* B^T of one axis. */
CBN_INLINE void CBN_FN(wino_bt)(int n, const vf *d, vf *o) {
    if (n == 1) {
        o[0] = d[0];
    } else if (n == 4) {
        o[0] = vf_sub(d[2], d[0]);
        o[1] = vf_add(d[1], d[2]);
        o[2] = vf_sub(d[2], d[1]);
        o[3] = vf_sub(d[3], d[1]);
    } else {
        static const float bt[6][6] = {{225 / 256.f, 0, -169 / 64.f, 0, 1, 0},
                                       {0, -45 / 32.f, -9 / 4.f, 5 / 8.f, 1, 0},
                                       {0, 45 / 32.f, -9 / 4.f, -5 / 8.f, 1, 0},
                                       {0, -75 / 128.f, -25 / 64.f, 3 / 2.f, 1, 0},
                                       {0, 75 / 128.f, -25 / 64.f, -3 / 2.f, 1, 0},
                                       {0, 225 / 256.f, 0, -169 / 64.f, 0, 1}};
        for (int i = 0; i < 6; i++) {
            o[i] = vf_zero();
            for (int j = 0; j < 6; j++) o[i] = vf_fma(vf_set1(bt[i][j]), d[j], o[i]);
        }
    }
}

static void CBN_FN(wino_in)(const cbn_wino_in_args *a) {
    const int64_t pitch = a->ncols * VF_LANES;
    vf d[6], o[6];
    for (int64_t c = 0; c < a->ncols; c++) {
        for (int i = 0; i < a->nh; i++) d[i] = vf_load(a->row[i] + c * VF_LANES);
        CBN_FN(wino_bt)(a->nh, d, o);
        for (int i = 0; i < a->nh; i++) vf_store(a->tmp + i * pitch + c * VF_LANES, o[i]);
    }
    for (int64_t t = 0; t < a->ntiles; t++) {
        for (int i = 0; i < a->nh; i++) {
            for (int j = 0; j < a->nw; j++)
                d[j] = vf_load(a->tmp + i * pitch + (a->col[t] + j * a->step) * VF_LANES);
            CBN_FN(wino_bt)(a->nw, d, o);
            for (int j = 0; j < a->nw; j++) vf_store(a->v + (i * a->nw + j) * a->v_xi + t * VF_LANES, o[j]);
        }
    }
}

static void CBN_FN(wino_gemm)(int np, int nv, const cbn_wino_gemm_args *a) {
    for (int t = 0; t < np; t++) {
        for (int j = 0; j < nv; j++) {
            float *m = a->m + t * a->m_t + j * a->m_v;
            bool add = a->add;
            for (int64_t k0 = 0; k0 < a->nk; k0 += a->chunk, add = true) {
                vf s = vf_zero();
                for (int64_t k = k0; k < CBN_MIN(k0 + a->chunk, a->nk); k++)
                    s = vf_fma(vf_set1(a->v[k / VF_LANES * a->v_b + t * VF_LANES + k % VF_LANES]),
                               vf_load(a->u + (k * nv + j) * VF_LANES), s);
                vf_store(m, add ? vf_add(vf_load(m), s) : s);
            }
        }
    }
}

/* A^T of one axis. */
CBN_INLINE void CBN_FN(wino_at)(int n, int m, const vf *d, vf *o) {
    static const float p4[3] = {0, 1, -1}, p6[5] = {0, 5 / 8.f, -5 / 8.f, 3 / 2.f, -3 / 2.f};
    const float *p = n == 4 ? p4 : p6;
    float power[5] = {1, 1, 1, 1, 1};
    if (n == 1) {
        o[0] = d[0];
        return;
    }
    for (int a = 0; a < m; a++) {
        o[a] = a == m - 1 ? d[n - 1] : vf_zero();
        for (int i = 0; i < n - 1; i++) {
            o[a] = vf_fma(vf_set1(power[i]), d[i], o[a]);
            power[i] *= p[i];
        }
    }
}

static void CBN_FN(wino_out)(const cbn_wino_out_args *a) {
    vf d[6], o[6], y[6][6];
    for (int64_t t = 0; t < a->ntiles; t++) {
        for (int j = 0; j < a->nw; j++) {
            for (int i = 0; i < a->nh; i++) d[i] = vf_load(a->m + t * a->m_t + (i * a->nw + j) * VF_LANES);
            CBN_FN(wino_at)(a->nh, a->mh, d, o);
            for (int i = 0; i < a->mh; i++) y[i][j] = o[i];
        }
        for (int i = 0; i < a->mh; i++) {
            CBN_FN(wino_at)(a->nw, a->mw, y[i], o);
            for (int j = 0; j < a->mw; j++) vf_store(a->o + i * a->o_row + (a->col[t] + j * a->step) * VF_LANES, o[j]);
        }
    }
}

static void CBN_FN(lanes_scatter)(float *y, int64_t y_c, int nch, const float *s, int64_t n, const cbn_epilogue_args *e,
                                  bool *nonfinite) {
    for (int l = 0; l < nch; l++) {
        for (int64_t c = 0; c < n; c++) {
            const float v = s[c * VF_LANES + l];
            if (!(v - v == 0.0f)) *nonfinite = true;
            float t = v + e->bias[l];
            if (e->residual) t += e->residual[l * y_c + c];
            t = e->lo > t ? e->lo : t;
            y[l * y_c + c] = e->hi < t ? e->hi : t;
        }
    }
}
