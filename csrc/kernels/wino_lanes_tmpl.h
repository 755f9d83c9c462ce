/* SPDX-License-Identifier: BSD-3-Clause */
/* Rows of channel planes to vectors of channels and back; contracts in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header.
 * Defines  CBN_FN(lanes_gather), CBN_FN(lanes_scatter).
 * Squares of VF_LANES columns by VF_LANES channels are transposed in registers. */

/* Hides an address from gcc, which otherwise keeps and increments one pointer a channel, most of them in memory. */
#define WL_OPAQUE(p) __asm__("" : "+r"(p))
#define WL_HALF (VF_LANES / 2)

/* s[c*L + l] = x[l*x_c + c] for a square. */
CBN_INLINE void CBN_FN(wl_gather)(float *s, const float *x, int64_t x_c) {
    vf r[VF_LANES];
    const float *high = x + WL_HALF * x_c;
    WL_OPAQUE(x);
    WL_OPAQUE(high);
    CBN_UNROLL for (int l = 0; l < WL_HALF; l++) r[l] = vf_load(x + l * x_c);
    CBN_UNROLL for (int l = WL_HALF; l < VF_LANES; l++) r[l] = vf_load(high + (l - WL_HALF) * x_c);
    vf_transpose(r);
    CBN_UNROLL for (int c = 0; c < VF_LANES; c++) vf_store(s + c * VF_LANES, r[c]);
}

/* The same for n columns and nch channels of it; further lanes become 0. */
static void CBN_FN(wl_gather_part)(float *s, const float *x, int64_t x_c, int nch, int64_t n) {
    vf r[VF_LANES];
    for (int l = 0; l < VF_LANES; l++) r[l] = l < nch ? vf_load_n(x + l * x_c, n) : vf_zero();
    vf_transpose(r);
    for (int64_t c = 0; c < n; c++) vf_store(s + c * VF_LANES, r[c]);
}

static void CBN_FN(lanes_gather)(float *s, const float *x, int64_t x_c, int nch, int64_t x0, int64_t n, int64_t w) {
    assert(1 <= nch && nch <= VF_LANES);
    int64_t c = 0;
    const int64_t begin = CBN_MIN(CBN_MAX(-x0, 0), n), end = CBN_MAX(CBN_MIN(w - x0, n), begin);
    for (; c < begin; c++) vf_store(s + c * VF_LANES, vf_zero());
    if (nch == VF_LANES && end - begin >= VF_LANES) {
        for (; c <= end - VF_LANES; c += VF_LANES) CBN_FN(wl_gather)(s + c * VF_LANES, x + x0 + c, x_c);
        /* the rest together with some columns that are there already */
        if (c < end) CBN_FN(wl_gather)(s + (end - VF_LANES) * VF_LANES, x + x0 + end - VF_LANES, x_c);
    } else {
        for (; c < end; c += VF_LANES)
            CBN_FN(wl_gather_part)(s + c * VF_LANES, x + x0 + c, x_c, nch, CBN_MIN(end - c, VF_LANES));
    }
    for (c = end; c < n; c++) vf_store(s + c * VF_LANES, vf_zero());
}

/* A square to be scattered: n columns, of which the first `valid` channels leave. odd[i] becomes NaN where a number of
 * the square is not finite. */
CBN_INLINE void CBN_FN(wl_scatter)(float *y, int64_t y_c, const int valid, const float *s, const int64_t n, vf bias,
                                   const float *res, vf lo, vf hi, vf *odd) {
    vf r[VF_LANES];
    CBN_UNROLL for (int c = 0; c < VF_LANES; c++) {
        const vf v = c < n ? vf_load(s + c * VF_LANES) : vf_zero();
        odd[c % 2] = vf_fma(v, vf_zero(), odd[c % 2]);
        r[c] = vf_add(v, bias);
        if (!res) r[c] = vf_min(hi, vf_max(lo, r[c]));
    }
    vf_transpose(r);
    CBN_UNROLL for (int h = 0; h < VF_LANES; h += CBN_MAX(WL_HALF, 1)) {
        WL_OPAQUE(y);
        CBN_UNROLL for (int l = h; l < h + CBN_MAX(WL_HALF, 1); l++) {
            if (l >= valid) return;
            if (res) {
                r[l] = vf_min(hi, vf_max(lo, vf_add(r[l], vf_load_n(res, n))));
                res += y_c;
            }
            vf_store_n(y + (l - h) * y_c, r[l], n);
        }
        y += WL_HALF * y_c;
    }
}

static void CBN_FN(lanes_scatter)(float *y, int64_t y_c, int nch, const float *s, int64_t n, const cbn_epilogue_args *e,
                                  bool *nonfinite) {
    assert(1 <= nch && nch <= VF_LANES);
    const vf lo = vf_set1(e->lo), hi = vf_set1(e->hi), bias = vf_load_n(e->bias, nch);
    const float *res = e->residual;
    vf odd[2] = {vf_zero(), vf_zero()};
    int64_t c = 0;
    if (nch == VF_LANES && !res && n >= VF_LANES) {
        for (; c <= n - VF_LANES; c += VF_LANES)
            CBN_FN(wl_scatter)(y + c, y_c, VF_LANES, s + c * VF_LANES, VF_LANES, bias, NULL, lo, hi, odd);
        if (c < n) /* the rest together with some columns that are there already */
            CBN_FN(wl_scatter)(y + n - VF_LANES, y_c, VF_LANES, s + (n - VF_LANES) * VF_LANES, VF_LANES, bias, NULL, lo,
                               hi, odd);
    } else {
        if (nch == VF_LANES)
            for (; c <= n - VF_LANES; c += VF_LANES)
                CBN_FN(wl_scatter)(y + c, y_c, VF_LANES, s + c * VF_LANES, VF_LANES, bias, res ? res + c : NULL, lo, hi,
                                   odd);
        for (; c < n; c += VF_LANES)
            CBN_FN(wl_scatter)(y + c, y_c, nch, s + c * VF_LANES, CBN_MIN(n - c, VF_LANES), bias, res ? res + c : NULL,
                               lo, hi, odd);
    }
    float zero[VF_LANES];
    vf_store(zero, vf_add(odd[0], odd[1]));
    for (int l = 0; l < nch; l++)
        if (zero[l] != 0.0f) *nonfinite = true;
}
