/* SPDX-License-Identifier: BSD-3-Clause */
/* BatchNorm folding (Markus 2018; Jacob et al. 2018, section 3.2): in float64, rounded once. */
#ifndef CBN_BN_FOLD_H
#define CBN_BN_FOLD_H
#include "base/cbn_base.h"
#include "base/cbn_status.h"

/* A strided array: ndim axes, strides in bytes (any sign, 0 allowed). data == NULL: absent. */
typedef struct cbn_strided {
    void *data;
    cbn_dtype dtype;
    int ndim;
    int64_t shape[CBN_MAX_DIMS], stride_bytes[CBN_MAX_DIMS];
} cbn_strided;

/* 1-D arrays of any float dtype and stride; weight and bias may be absent (1 and 0). */
typedef struct cbn_bn {
    cbn_strided weight, bias, mean, var;
    double eps;
} cbn_bn;

/* eps finite and >= 0, mean and var present, all lengths equal `channels` (allow_one: or 1). */
CBN_NODISCARD cbn_status cbn_bn_check(const cbn_bn *bn, int64_t channels, bool allow_one,
                                      cbn_error *err);

/* s = gamma * (1 / sqrt(var + eps)), t = beta - mean*s, float64, `channels` entries (length-1
 * statistics are repeated). No floating-point flag is left raised. */
void cbn_bn_scale_shift(const cbn_bn *bn, int64_t channels, double *s, double *t);

/* W' = W * s[channel of the element], b' = (b - mean)*s + beta. w_out has w's shape and any strides
 * and dtype w->dtype; b_out is 1-D of `channels`, dtype w->dtype. b may be absent. The output
 * channel of W[i, j, ...] is i, or transposed (i / (ic/g))*(oc/g) + j. Checks shapes and lengths
 * (argument names as in pyconvbn.fuse_conv_bn_weights). */
CBN_NODISCARD cbn_status cbn_fold_conv_bn(const cbn_strided *w, const cbn_strided *b,
                                          const cbn_bn *bn, bool linear, bool transposed,
                                          int64_t groups, cbn_strided *w_out, cbn_strided *b_out,
                                          cbn_error *err);

/* BN first, then conv: W'[o, j] = W[o, j] * s[input channel], b' = b + sum W * t. FoldError
 * PADDED_PRE_BN unless exact. */
CBN_NODISCARD cbn_status cbn_fold_bn_conv(const cbn_bn *bn, const cbn_strided *w,
                                          const cbn_strided *b, bool padding_is_zero,
                                          bool zeros_mode, bool transposed, int64_t groups,
                                          cbn_strided *w_out, cbn_strided *b_out, cbn_error *err);

/* Element access shared by everything that walks strided arrays. */
double cbn_load_f64(const void *p, cbn_dtype t);
void cbn_store_f64(void *p, cbn_dtype t,
                   double v); /* one rounding; float16 round-half-even straight from double */

/* dst = src elementwise with conversion; shapes equal, both any strides, no overlap. */
void cbn_strided_copy(const cbn_strided *src, cbn_strided *dst);
#endif
