/* SPDX-License-Identifier: BSD-3-Clause */
/* Attributes and small macros every other file may use. */
#ifndef CBN_BASE_H
#define CBN_BASE_H
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CBN_CAT_(a, b) a##_##b
#define CBN_CAT(a, b) CBN_CAT_(a, b)
#define CBN_STR_(x) #x
#define CBN_STR(x) CBN_STR_(x)
#define CBN_INLINE static inline __attribute__((always_inline))
#define CBN_NODISCARD __attribute__((warn_unused_result))
#define CBN_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define CBN_RESTRICT restrict

/* Full unrolling of loops with compile-time bounds. Without it gcc -O2 keeps arrays of accumulators in memory. */
#if defined(__clang__)
#define CBN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CBN_UNROLL _Pragma("GCC unroll 64")
#endif

/* Compiler barrier: stops gcc from merging loads of neighbouring taps, which makes it spill accumulators. */
#define CBN_BARRIER() __asm__ volatile("" ::: "memory")

#define CBN_MIN(a, b) ((a) < (b) ? (a) : (b))
#define CBN_MAX(a, b) ((a) > (b) ? (a) : (b))

enum {
    CBN_MAX_SPATIAL = 3, /* spatial axes of a convolution */
    CBN_MAX_DIMS = 32,   /* axes of any array */
    CBN_CACHE_LINE = 64
};

typedef enum { CBN_F16 = 0, CBN_F32 = 1, CBN_F64 = 2 } cbn_dtype;
CBN_INLINE size_t cbn_dtype_size(cbn_dtype t) { return t == CBN_F16 ? 2 : t == CBN_F32 ? 4 : 8; }

CBN_INLINE int64_t cbn_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
#endif
