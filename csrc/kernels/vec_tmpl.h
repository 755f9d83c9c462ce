/* SPDX-License-Identifier: BSD-3-Clause */
/* Elementwise kernels: unary, affine, add, mul, widen_f16, narrow_f16.
 *
 * Before: CBN_FN, the vector header of the ISA. Defines: CBN_FN(<each of the above>). */
#include <string.h>

#include "kernels/cbn_kernels.h"

/* y[i] = expr(v) with v = x[i], whole vectors and then the rest. */
#define VEC_MAP_(expr)                                                                             \
    do {                                                                                           \
        int64_t i_ = 0;                                                                            \
        for (; i_ + VF_LANES <= n; i_ += VF_LANES) {                                               \
            const vf v = vf_load(x + i_);                                                          \
            vf_store(y + i_, expr);                                                                \
        }                                                                                          \
        if (i_ < n) {                                                                              \
            const vf v = vf_load_n(x + i_, n - i_);                                                \
            vf_store_n(y + i_, expr, n - i_);                                                      \
        }                                                                                          \
    } while (0)

/* ---- functions --------------------------------------------------------------------------------------------------- */

/* exp, 1 ulp. Reduction x = n*ln2 + r with ln2 in two parts (Cody and Waite 1980), then 1 + r + r^2*q(r) with a minimax
 * q (own Remez fit, |r| <= 0.347, relative error 3e-9); 2^n is applied in two steps so that results may be denormal. */
CBN_INLINE vf vec_exp(vf x) {
    /* Below -104 the result rounds to 0, above 89 it is infinite; NaN takes part as -104 and is put back at the end. */
    const vf t = vf_min(vf_max(x, vf_set1(-104.0f)), vf_set1(89.0f));
    const vf n = vf_round(vf_mul(t, vf_set1(1.44269504f)));
    vf r = vf_fma(n, vf_set1(-0.693359375f), t); /* 9 bits: n times this is exact */
    r = vf_fma(n, vf_set1(2.12194440e-4f), r);
    vf q = vf_set1(0.00139506031f);
    q = vf_fma(q, r, vf_set1(0.0083689535f));
    q = vf_fma(q, r, vf_set1(0.0416662041f));
    q = vf_fma(q, r, vf_set1(0.166665183f));
    q = vf_fma(q, r, vf_set1(0.5f));
    vf p = vf_add(vf_fma(vf_mul(r, r), q, r), vf_set1(1.0f));
    const vf half = vf_round(vf_mul(n, vf_set1(0.5f)));
    p = vf_scale2(vf_scale2(p, half), vf_sub(n, half));
    return vf_if_nan(x, x, p);
}

CBN_INLINE vf vec_neg(vf x) { return vf_sub(vf_zero(), x); }
CBN_INLINE vf vec_clamp(vf x, vf lo, vf hi) { return vf_min(hi, vf_max(lo, x)); } /* NaN stays */

CBN_INLINE vf vec_sigmoid(vf x) {
    const vf one = vf_set1(1.0f);
    return vf_div(one, vf_add(one, vec_exp(vec_neg(x))));
}

CBN_INLINE vf vec_silu(vf x) { return vf_div(x, vf_add(vf_set1(1.0f), vec_exp(vec_neg(x)))); }

CBN_INLINE vf vec_hardswish(vf x) {
    const vf c = vec_clamp(vf_add(x, vf_set1(3.0f)), vf_zero(), vf_set1(6.0f));
    return vf_mul(x, vf_mul(c, vf_set1(1.0f / 6.0f)));
}

/* x * Phi(x). With a = |x|: Phi(-a) = exp(-a^2/2) * Q(a), where Q(a) = erfc(a/sqrt2)*exp(a^2/2)/2 is smooth and is a
 * polynomial in (a - 3)/(a + 3) to 1e-8 (the variable of Schonfelder 1978, "Chebyshev expansions for the error and
 * related functions"; own Remez fit). So both tails have small relative errors, which 1 + erf has not. */
CBN_INLINE vf vec_gelu(vf x) {
    const vf a = vf_min(vf_set1(14.5f), vf_max(vec_neg(x), x)); /* exp(-14.5^2/2) is 0 */
    const vf t = vf_div(vf_sub(a, vf_set1(3.0f)), vf_add(a, vf_set1(3.0f)));
    vf q = vf_set1(5.3162063e-05f);
    q = vf_fma(q, t, vf_set1(0.000115013756f));
    q = vf_fma(q, t, vf_set1(-0.000339013009f));
    q = vf_fma(q, t, vf_set1(-0.000983288282f));
    q = vf_fma(q, t, vf_set1(0.00290438744f));
    q = vf_fma(q, t, vf_set1(0.0061319423f));
    q = vf_fma(q, t, vf_set1(-0.0462132636f));
    q = vf_fma(q, t, vf_set1(0.123225041f));
    q = vf_fma(q, t, vf_set1(-0.20640262f));
    q = vf_fma(q, t, vf_set1(0.121513948f));
    /* a^2/2 is s + e exactly: the rounding error of a large s would otherwise be the error of the result */
    const vf h = vf_mul(a, vf_set1(0.5f)), s = vf_mul(h, a);
    const vf e = vf_fma(h, a, vec_neg(s));
    const vf g = vec_exp(vec_neg(s));
    const vf tail = vf_mul(q, vf_fma(vec_neg(e), g, g));
    return vf_mul(x, vf_if_lt(x, vf_zero(), tail, vf_sub(vf_set1(1.0f), tail)));
}

/* x/2 * (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi)*(x + 0.044715 x^3) (Hendrycks and Gimpel 2016) */
CBN_INLINE vf vec_gelu_tanh(vf x) {
    const vf cube = vf_mul(vf_mul(x, x), x);
    const vf u = vf_mul(vf_fma(cube, vf_set1(0.044715f), x), vf_set1(-1.59576912f));
    return vf_div(x, vf_add(vf_set1(1.0f), vec_exp(u)));
}

static void CBN_FN(unary)(cbn_act act, float a, float b, float *y, const float *x, int64_t n) {
    const vf va = vf_set1(a), vb = vf_set1(b), zero = vf_zero();
    switch (act) {
    case CBN_ACT_NONE:
        if (y != x && n > 0) memcpy(y, x, (size_t)n * sizeof *y);
        break;
    case CBN_ACT_RELU: VEC_MAP_(vf_max(zero, v)); break;
    case CBN_ACT_RELU6: VEC_MAP_(vec_clamp(v, zero, vf_set1(6.0f))); break;
    case CBN_ACT_LEAKY_RELU: VEC_MAP_(vf_if_lt(zero, v, v, vf_mul(va, v))); break;
    case CBN_ACT_SIGMOID: VEC_MAP_(vec_sigmoid(v)); break;
    case CBN_ACT_HARDTANH: VEC_MAP_(vec_clamp(v, va, vb)); break;
    case CBN_ACT_HARDSWISH: VEC_MAP_(vec_hardswish(v)); break;
    case CBN_ACT_SILU: VEC_MAP_(vec_silu(v)); break;
    case CBN_ACT_GELU: VEC_MAP_(vec_gelu(v)); break;
    case CBN_ACT_GELU_TANH: VEC_MAP_(vec_gelu_tanh(v)); break;
    }
}

/* ---- arithmetic -------------------------------------------------------------------------------------------------- */

static void CBN_FN(affine)(float *y, const float *x, float scale, float shift, int64_t n) {
    const vf s = vf_set1(scale), t = vf_set1(shift);
    VEC_MAP_(vf_fma(v, s, t));
}

static void CBN_FN(add)(float *y, const float *x, const float *z, float alpha, int64_t n) {
    const vf va = vf_set1(alpha);
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(y + i, vf_fma(va, vf_load(z + i), vf_load(x + i)));
    if (i < n) vf_store_n(y + i, vf_fma(va, vf_load_n(z + i, n - i), vf_load_n(x + i, n - i)), n - i);
}

static void CBN_FN(mul)(float *y, const float *x, const float *z, int64_t n) {
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(y + i, vf_mul(vf_load(x + i), vf_load(z + i)));
    if (i < n) vf_store_n(y + i, vf_mul(vf_load_n(x + i, n - i), vf_load_n(z + i, n - i)), n - i);
}

/* ---- float16 ----------------------------------------------------------------------------------------------------- */

static void CBN_FN(widen_f16)(float *y, const uint16_t *x, int64_t n) {
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store(y + i, vf_load_f16(x + i));
    if (i < n) {
        uint16_t rest[VF_LANES] = {0};
        memcpy(rest, x + i, (size_t)(n - i) * sizeof *x);
        vf_store_n(y + i, vf_load_f16(rest), n - i);
    }
}

static void CBN_FN(narrow_f16)(uint16_t *y, const float *x, int64_t n) {
    int64_t i = 0;
    for (; i + VF_LANES <= n; i += VF_LANES) vf_store_f16(y + i, vf_load(x + i));
    if (i < n) {
        uint16_t rest[VF_LANES];
        vf_store_f16(rest, vf_load_n(x + i, n - i));
        memcpy(y + i, rest, (size_t)(n - i) * sizeof *y);
    }
}
#undef VEC_MAP_
#undef VEC_INTO_
