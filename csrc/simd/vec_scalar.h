/* SPDX-License-Identifier: BSD-3-Clause */
/* The vector operations, one lane wide: this file is their specification. The files of the other
 * ISAs define the same names with the same meaning lane by lane, to the bit (one exception: the
 * payload of a NaN). A new operation needs two users and a test.
 *
 *   vf          a vector of VF_LANES floats
 *   VF_LANES    a power of two
 *
 * Pointers need no alignment beyond that of their element. Nothing outside the named elements is
 * touched. */
#ifndef CBN_VEC_SCALAR_H
#define CBN_VEC_SCALAR_H
#include <string.h>
#include "base/cbn_base.h"

typedef float vf;
#define VF_LANES 1

CBN_INLINE vf vf_zero(void) { return 0.0f; }
CBN_INLINE vf vf_set1(float x) { return x; }

CBN_INLINE vf vf_load(const float *p) { return *p; }
CBN_INLINE void vf_store(float *p, vf a) { *p = a; }
/* The first n lanes, 0 <= n <= VF_LANES; further lanes are loaded as 0 and not stored. */
CBN_INLINE vf vf_load_n(const float *p, int64_t n) { return n > 0 ? *p : 0.0f; }
CBN_INLINE void vf_store_n(float *p, vf a, int64_t n) {
    if (n > 0) *p = a;
}

/* Lanes lo <= i < hi, 0 <= lo, hi <= VF_LANES (none when hi <= lo); the others are 0 and their
 * memory is not touched. */
CBN_INLINE vf vf_load_range(const float *p, int64_t lo, int64_t hi) {
    return lo <= 0 && hi > 0 ? *p : 0.0f;
}
/* The same in two steps, for a range that is used many times. */
typedef bool vm;
CBN_INLINE vm vf_mask(int64_t lo, int64_t hi) { return lo <= 0 && hi > 0; }
CBN_INLINE vf vf_load_mask(const float *p, vm m) { return m ? *p : 0.0f; }

/* a, and from here on in a register: gcc 12 otherwise loads a vector again as the memory operand of
 * each of its uses. */
CBN_INLINE vf vf_pin(vf a) { return a; }
/* Up to here a keeps its register. After the last FMA of a factor: gcc 12 otherwise puts the sum into the register of
 * that factor, and at the end of the loop moves all the sums back, some of them through memory. */
CBN_INLINE void vf_keep(vf a) { (void)a; }

CBN_INLINE vf vf_add(vf a, vf b) { return a + b; }
CBN_INLINE vf vf_sub(vf a, vf b) { return a - b; }
CBN_INLINE vf vf_mul(vf a, vf b) { return a * b; }
CBN_INLINE vf vf_div(vf a, vf b) { return a / b; }
/* a*b + c, rounded once. */
CBN_INLINE vf vf_fma(vf a, vf b, vf c) { return __builtin_fmaf(a, b, c); }

/* The second operand is returned when either is NaN or both are zero, as x86 does. So a clamp that
 * lets NaN through is vf_min(hi, vf_max(lo, x)). */
CBN_INLINE vf vf_min(vf a, vf b) { return a < b ? a : b; }
CBN_INLINE vf vf_max(vf a, vf b) { return a > b ? a : b; }

/* a < b ? x : y (false when either is NaN); a is NaN ? x : y. */
CBN_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) { return a < b ? x : y; }
CBN_INLINE vf vf_if_nan(vf a, vf x, vf y) { return a != a ? x : y; }

/* Of the 2*VF_LANES elements of a followed by b: those at even positions, those at odd positions,
 * in order. */
CBN_INLINE vf vf_even(vf a, vf b) {
    (void)b;
    return a;
}
CBN_INLINE vf vf_odd(vf a, vf b) {
    (void)a;
    return b;
}

/* The same, in an order that is cheaper to make and the same for both; vf_unmix puts the lanes of
 * any one vector made of such vectors lane by lane into order. */
CBN_INLINE vf vf_even_mixed(vf a, vf b) { return vf_even(a, b); }
CBN_INLINE vf vf_odd_mixed(vf a, vf b) { return vf_odd(a, b); }
CBN_INLINE vf vf_unmix(vf a) { return a; }

/* Elements a[0] b[0] a[1] b[1] ...: the first VF_LANES of them, the last. Undoes vf_even and vf_odd. */
CBN_INLINE vf vf_zip_lo(vf a, vf b) {
    (void)b;
    return a;
}
CBN_INLINE vf vf_zip_hi(vf a, vf b) {
    (void)a;
    return b;
}

/* Lane j of r[i] changes places with lane i of r[j]. */
CBN_INLINE void vf_transpose(vf r[VF_LANES]) { (void)r; }

/* Nearest integer, ties to even, for |a| < 2^22. */
CBN_INLINE vf vf_round(vf a) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: its unit in the last place is 1 */
    volatile float t = a + magic;
    return t - magic;
}

/* a * 2^n for an integral n in -126 .. 127. */
CBN_INLINE vf vf_scale2(vf a, vf n) {
    const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float p;
    memcpy(&p, &bits, sizeof p);
    return a * p;
}

/* IEEE binary16 bit patterns. Narrowing rounds to nearest even; a NaN stays a (quiet) NaN. */
CBN_INLINE vf vf_load_f16(const uint16_t *p) {
    const uint32_t h = *p, sign = (h & 0x8000u) << 16, mant = h & 0x3ffu, expo = (h >> 10) & 0x1fu;
    uint32_t bits;
    float y;
    if (expo == 31) {
        bits = sign | 0x7f800000u | mant << 13 | (mant ? 0x00400000u : 0u);
    } else if (expo == 0) {
        y = (float)mant * 0x1p-24f; /* exact: zero or a binary16 denormal */
        return sign ? -y : y;
    } else {
        bits = sign | (expo + 112u) << 23 | mant << 13;
    }
    memcpy(&y, &bits, sizeof y);
    return y;
}
CBN_INLINE void vf_store_f16(uint16_t *p, vf a) {
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, mag = bits & 0x7fffffffu;
    uint32_t h;
    if (mag > 0x7f800000u) {
        h = 0x7e00u | (mag >> 13 & 0x3ffu);
    } else if (mag >= 0x47800000u) { /* 2^16 and above */
        h = 0x7c00u;
    } else if (
        mag >=
        0x38800000u) { /* normal binary16; rounding may carry into the exponent, up to infinity */
        h = (mag - 0x38000000u + 0xfffu + (mag >> 13 & 1u)) >> 13;
    } else { /* a multiple of 2^-24 after rounding: let the adder round at that place */
        float m;
        memcpy(&m, &mag, sizeof m);
        volatile float t = m + 0.5f; /* 0.5 has its unit in the last place at 2^-24 */
        const float u = t;
        memcpy(&h, &u, sizeof h);
        h -= 0x3f000000u;
    }
    *p = (uint16_t)(sign | h);
}
#endif
