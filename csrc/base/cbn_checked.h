/* SPDX-License-Identifier: BSD-3-Clause */
/* Size arithmetic that reports overflow instead of wrapping. */
#ifndef CBN_CHECKED_H
#define CBN_CHECKED_H
#include "base/cbn_base.h"

/* *out = a op b; false on overflow (then *out is unspecified). */
CBN_INLINE CBN_NODISCARD bool cbn_mul_ok(int64_t a, int64_t b, int64_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}
CBN_INLINE CBN_NODISCARD bool cbn_add_ok(int64_t a, int64_t b, int64_t *out) {
    return !__builtin_add_overflow(a, b, out);
}
#endif
