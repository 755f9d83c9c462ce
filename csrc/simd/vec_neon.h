/* SPDX-License-Identifier: BSD-3-Clause */
/* The operations of vec_scalar.h for 64-bit Arm. */
#ifndef CBN_VEC_NEON_H
#define CBN_VEC_NEON_H
#include <arm_neon.h>
#include "base/cbn_base.h"

typedef float32x4_t vf;
#define VF_LANES 4

CBN_INLINE vf vf_zero(void) { return vdupq_n_f32(0.0f); }
CBN_INLINE vf vf_set1(float x) { return vdupq_n_f32(x); }

CBN_INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
CBN_INLINE void vf_store(float *p, vf a) { vst1q_f32(p, a); }
CBN_INLINE vf vf_load_n(const float *p, int64_t n) {
    const float32x2_t z = vdup_n_f32(0.0f);
    switch (n) {
    case 0:
        return vdupq_n_f32(0.0f);
    case 1:
        return vcombine_f32(vld1_lane_f32(p, z, 0), z);
    case 2:
        return vcombine_f32(vld1_f32(p), z);
    case 3:
        return vcombine_f32(vld1_f32(p), vld1_lane_f32(p + 2, z, 0));
    default:
        return vld1q_f32(p);
    }
}
CBN_INLINE void vf_store_n(float *p, vf a, int64_t n) {
    if (n >= VF_LANES) {
        vf_store(p, a);
        return;
    }
    float32x2_t q = vget_low_f32(a);
    if (n & 2) {
        vst1_f32(p, q);
        q = vget_high_f32(a);
        p += 2;
    }
    if (n & 1) vst1_lane_f32(p, q, 0);
}

CBN_INLINE vf vf_load_range(const float *p, int64_t lo, int64_t hi) {
    float t[4] = {0};
    if (lo <= 0 && hi >= VF_LANES) return vf_load(p);
    for (int64_t i = lo; i < hi; i++) t[i] = p[i];
    return vld1q_f32(t);
}
typedef struct vm {
    int8_t lo, hi;
} vm;
CBN_INLINE vm vf_mask(int64_t lo, int64_t hi) { return (vm){(int8_t)lo, (int8_t)hi}; }
CBN_INLINE vf vf_load_mask(const float *p, vm m) { return vf_load_range(p, m.lo, m.hi); }

CBN_INLINE vf vf_pin(vf a) {
    __asm__("" : "+w"(a));
    return a;
}
CBN_INLINE void vf_keep(vf a) { __asm__("" : : "w"(a)); }

CBN_INLINE vf vf_add(vf a, vf b) { return vaddq_f32(a, b); }
CBN_INLINE vf vf_sub(vf a, vf b) { return vsubq_f32(a, b); }
CBN_INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
CBN_INLINE vf vf_div(vf a, vf b) { return vdivq_f32(a, b); }
CBN_INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
/* vminq and vmaxq return a NaN for either operand, so compare and select. */
CBN_INLINE vf vf_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
CBN_INLINE vf vf_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
CBN_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
CBN_INLINE vf vf_if_nan(vf a, vf x, vf y) { return vbslq_f32(vceqq_f32(a, a), y, x); }

CBN_INLINE vf vf_even(vf a, vf b) { return vuzp1q_f32(a, b); }
CBN_INLINE vf vf_odd(vf a, vf b) { return vuzp2q_f32(a, b); }

CBN_INLINE vf vf_even_mixed(vf a, vf b) { return vf_even(a, b); }
CBN_INLINE vf vf_odd_mixed(vf a, vf b) { return vf_odd(a, b); }
CBN_INLINE vf vf_unmix(vf a) { return a; }

CBN_INLINE vf vf_zip_lo(vf a, vf b) { return vzip1q_f32(a, b); }
CBN_INLINE vf vf_zip_hi(vf a, vf b) { return vzip2q_f32(a, b); }

CBN_INLINE void vf_transpose(vf r[VF_LANES]) {
    const float64x2_t t0 = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1]));
    const float64x2_t t1 = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    const float64x2_t t2 = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3]));
    const float64x2_t t3 = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(t0, t2));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(t1, t3));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(t0, t2));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(t1, t3));
}

CBN_INLINE vf vf_round(vf a) { return vrndnq_f32(a); }
CBN_INLINE vf vf_scale2(vf a, vf n) {
    const int32x4_t e = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(e, 23)));
}

CBN_INLINE vf vf_load_f16(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
CBN_INLINE void vf_store_f16(uint16_t *p, vf a) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
}
#endif
