/* SPDX-License-Identifier: BSD-3-Clause */
/* The operations of vec_scalar.h for AVX2 + FMA + F16C. */
#ifndef CBN_VEC_AVX2_H
#define CBN_VEC_AVX2_H
#include <immintrin.h>
#include "base/cbn_base.h"

typedef __m256 vf;
#define VF_LANES 8

CBN_INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
CBN_INLINE vf vf_set1(float x) { return _mm256_set1_ps(x); }

CBN_INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
CBN_INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
CBN_INLINE vf vf_load_n(const float *p, int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane));
}
/* In pieces: vmaskmovps to memory takes a dozen cycles on AMD cores, and n is often a constant. */
CBN_INLINE void vf_store_n(float *p, vf a, int64_t n) {
    if (n >= VF_LANES) {
        vf_store(p, a);
        return;
    }
    __m128 q = _mm256_castps256_ps128(a);
    if (n & 4) {
        _mm_storeu_ps(p, q);
        q = _mm256_extractf128_ps(a, 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi((__m64 *)p, q);
        q = _mm_movehl_ps(q, q);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, q);
}

typedef __m256i vm;
CBN_INLINE vm vf_mask(int64_t lo, int64_t hi) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)hi), lane);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)lo), lane), below);
}
CBN_INLINE vf vf_load_mask(const float *p, vm m) { return _mm256_maskload_ps(p, m); }
CBN_INLINE vf vf_load_range(const float *p, int64_t lo, int64_t hi) { return vf_load_mask(p, vf_mask(lo, hi)); }

CBN_INLINE vf vf_pin(vf a) {
    __asm__("" : "+x"(a));
    return a;
}
CBN_INLINE void vf_keep(vf a) { __asm__("" : : "x"(a)); }

CBN_INLINE vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
CBN_INLINE vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
CBN_INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
CBN_INLINE vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
CBN_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
CBN_INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
CBN_INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
CBN_INLINE vf vf_if_lt(vf a, vf b, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
CBN_INLINE vf vf_if_nan(vf a, vf x, vf y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

/* A shuffle of two vectors leaves its pairs in the order a b a b. */
CBN_INLINE vf vf_even_mixed(vf a, vf b) { return _mm256_shuffle_ps(a, b, 0x88); }
CBN_INLINE vf vf_odd_mixed(vf a, vf b) { return _mm256_shuffle_ps(a, b, 0xdd); }
CBN_INLINE vf vf_unmix(vf t) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(t), 0xd8));
}
CBN_INLINE vf vf_even(vf a, vf b) { return vf_unmix(vf_even_mixed(a, b)); }
CBN_INLINE vf vf_odd(vf a, vf b) { return vf_unmix(vf_odd_mixed(a, b)); }

CBN_INLINE vf vf_zip_lo(vf a, vf b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
CBN_INLINE vf vf_zip_hi(vf a, vf b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

CBN_INLINE void vf_transpose(vf r[VF_LANES]) {
    vf t[8];
    /* pairs of rows, then quadruples within each 128-bit half, then the halves */
    CBN_UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    vf q[8];
    CBN_UNROLL for (int i = 0; i < 2; i++) {
        q[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        q[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        q[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        q[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    CBN_UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(q[i], q[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(q[i], q[i + 4], 0x31);
    }
}

CBN_INLINE vf vf_round(vf a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CBN_INLINE vf vf_scale2(vf a, vf n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
}

CBN_INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
CBN_INLINE void vf_store_f16(uint16_t *p, vf a) {
    _mm_storeu_si128((__m128i *)p,
                     _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif
