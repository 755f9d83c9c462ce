/* SPDX-License-Identifier: BSD-3-Clause */
/* Stands before the compiler's immintrin.h in the include path when the AVX-512 kernels are built to be emulated
 * (checks.py, mode simde): SIMDe under the intrinsics' own names, and by hand what
 * SIMDe 0.7.4 lacks or rounds twice. */
#ifndef CHECK_SIMDE_SHIM_H
#define CHECK_SIMDE_SHIM_H
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wshadow"
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#pragma GCC diagnostic pop
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The kernels pin vectors to registers by empty assembly; an emulated vector is larger than any register. All system
 * headers that might want assembly are in by now. */
#define __asm__(...) ((void)0)

#define __mmask8 simde__mmask8
#define __mmask16 simde__mmask16

static inline simde__m512_private shim_ps(__m512 a) { return simde__m512_to_private(a); }

/* One rounding, as the instruction has. */
static inline __m512 shim_fmadd(__m512 a_, __m512 b_, __m512 c_) {
    simde__m512_private a = shim_ps(a_), b = shim_ps(b_), c = shim_ps(c_), r;
    for (int i = 0; i < 16; i++) r.f32[i] = fmaf(a.f32[i], b.f32[i], c.f32[i]);
    return simde__m512_from_private(r);
}
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps shim_fmadd

/* Masked accesses touch no element that is masked out. */
static inline __m512 shim_maskz_loadu(__mmask16 k, const void *p) {
    simde__m512_private r;
    for (int i = 0; i < 16; i++) {
        r.f32[i] = 0;
        if (k >> i & 1) r.f32[i] = ((const float *)p)[i];
    }
    return simde__m512_from_private(r);
}
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps shim_maskz_loadu

static inline void shim_mask_storeu(void *p, __mmask16 k, __m512 a_) {
    simde__m512_private a = shim_ps(a_);
    for (int i = 0; i < 16; i++)
        if (k >> i & 1) ((float *)p)[i] = a.f32[i];
}
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps shim_mask_storeu

static inline __m512 shim_shuffle_f32x4(__m512 a_, __m512 b_, int imm) {
    simde__m512_private a = shim_ps(a_), b = shim_ps(b_), r;
    for (int lane = 0; lane < 4; lane++)
        for (int i = 0; i < 4; i++)
            r.f32[4 * lane + i] = (lane < 2 ? a : b).f32[4 * (imm >> 2 * lane & 3) + i];
    return simde__m512_from_private(r);
}
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 shim_shuffle_f32x4

/* In the rounding mode in force: nearest even. */
static inline __m512i shim_cvtps_epi32(__m512 a_) {
    simde__m512_private a = shim_ps(a_);
    simde__m512i_private r;
    for (int i = 0; i < 16; i++) r.i32[i] = (int32_t)lrintf(a.f32[i]);
    return simde__m512i_from_private(r);
}
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 shim_cvtps_epi32

static inline float shim_half_to_float(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const float v = e == 31 ? (m ? NAN : INFINITY)
                    : e     ? ldexpf((float)(m + 1024), e - 25)
                            : ldexpf((float)m, -24);
    return h >> 15 ? -v : v;
}
static inline uint16_t shim_float_to_half(float f) {
    const uint16_t sign = signbit(f) ? 0x8000 : 0;
    if (isnan(f)) return sign | 0x7E00;
    const float a = fabsf(f);
    if (a >= 65520.0f) return sign | 0x7C00;
    if (a < 0x1p-14f) return (uint16_t)(sign | (uint16_t)lrintf(a * 0x1p24f));
    int e;
    const float m = frexpf(a, &e); /* m in [0.5, 1); a carry of the rounding moves into the exponent by itself */
    return (uint16_t)(sign | (((e + 14) << 10) + (int)lrintf(m * 2048.0f) - 1024));
}
static inline __m512 shim_cvtph_ps(__m256i a_) {
    simde__m256i_private a = simde__m256i_to_private(a_);
    simde__m512_private r;
    for (int i = 0; i < 16; i++) r.f32[i] = shim_half_to_float(a.u16[i]);
    return simde__m512_from_private(r);
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps shim_cvtph_ps

static inline __m256i shim_cvtps_ph(__m512 a_, int imm) {
    (void)imm; /* the code rounds to nearest even only */
    simde__m512_private a = shim_ps(a_);
    simde__m256i_private r;
    for (int i = 0; i < 16; i++) r.u16[i] = shim_float_to_half(a.f32[i]);
    return simde__m256i_from_private(r);
}
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph shim_cvtps_ph

#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT 0
#endif
#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC 8
#endif
#endif
