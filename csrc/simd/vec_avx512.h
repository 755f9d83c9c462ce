/* SPDX-License-Identifier: BSD-3-Clause */
/* The operations of vec_scalar.h for AVX-512 (F, BW, DQ, VL). */
#ifndef CBN_VEC_AVX512_H
#define CBN_VEC_AVX512_H
#include <immintrin.h>
#include "base/cbn_base.h"

typedef __m512 vf;
#define VF_LANES 16

CBN_INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
CBN_INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }

CBN_INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
CBN_INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
CBN_INLINE __mmask16 vf_mask_(int64_t n) { return (__mmask16)((1u << n) - 1u); }
CBN_INLINE vf vf_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(vf_mask_(n), p); }
CBN_INLINE void vf_store_n(float *p, vf a, int64_t n) { _mm512_mask_storeu_ps(p, vf_mask_(n), a); }

typedef __mmask16 vm;
CBN_INLINE vm vf_mask(int64_t lo, int64_t hi) { return (__mmask16)(vf_mask_(hi) & ~vf_mask_(lo)); }
CBN_INLINE vf vf_load_mask(const float *p, vm m) { return _mm512_maskz_loadu_ps(m, p); }
CBN_INLINE vf vf_load_range(const float *p, int64_t lo, int64_t hi) { return vf_load_mask(p, vf_mask(lo, hi)); }

CBN_INLINE vf vf_pin(vf a) {
    __asm__("" : "+v"(a));
    return a;
}
CBN_INLINE void vf_keep(vf a) { __asm__("" : : "v"(a)); }

CBN_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
CBN_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
CBN_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
CBN_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
CBN_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
CBN_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
CBN_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
CBN_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
CBN_INLINE vf vf_if_nan(vf a, vf x, vf y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), y, x);
}

CBN_INLINE vf vf_even(vf a, vf b) {
    const __m512i idx =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, idx, b);
}
CBN_INLINE vf vf_odd(vf a, vf b) {
    const __m512i idx =
        _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, idx, b);
}

/* A shuffle of two vectors leaves its pairs in the order a b a b ... */
CBN_INLINE vf vf_even_mixed(vf a, vf b) { return _mm512_shuffle_ps(a, b, 0x88); }
CBN_INLINE vf vf_odd_mixed(vf a, vf b) { return _mm512_shuffle_ps(a, b, 0xdd); }
CBN_INLINE vf vf_unmix(vf t) {
    const __m512i pairs = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_castpd_ps(_mm512_permutexvar_pd(pairs, _mm512_castps_pd(t)));
}

CBN_INLINE vf vf_zip_lo(vf a, vf b) {
    const __m512i idx = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, idx, b);
}
CBN_INLINE vf vf_zip_hi(vf a, vf b) {
    const __m512i idx = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, idx, b);
}

CBN_INLINE void vf_transpose(vf r[VF_LANES]) {
    vf t[16], q[16];
    /* pairs of rows, then quadruples within each 128-bit lane, then the lanes */
    CBN_UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    CBN_UNROLL for (int i = 0; i < 4; i++) {
        q[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        q[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        q[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        q[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    /* 128-bit lane l of q[4*i + j] is column 4*l + j of rows 4*i .. 4*i + 3 */
    CBN_UNROLL for (int j = 0; j < 4; j++) {
        const vf ab02 = _mm512_shuffle_f32x4(q[j], q[4 + j], 0x88);
        const vf ab13 = _mm512_shuffle_f32x4(q[j], q[4 + j], 0xdd);
        const vf cd02 = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0x88);
        const vf cd13 = _mm512_shuffle_f32x4(q[8 + j], q[12 + j], 0xdd);
        r[j] = _mm512_shuffle_f32x4(ab02, cd02, 0x88);
        r[8 + j] = _mm512_shuffle_f32x4(ab02, cd02, 0xdd);
        r[4 + j] = _mm512_shuffle_f32x4(ab13, cd13, 0x88);
        r[12 + j] = _mm512_shuffle_f32x4(ab13, cd13, 0xdd);
    }
}

CBN_INLINE vf vf_round(vf a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CBN_INLINE vf vf_scale2(vf a, vf n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(e, 23)));
}

CBN_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
CBN_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
