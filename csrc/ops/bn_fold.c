/* SPDX-License-Identifier: BSD-3-Clause */
/* BatchNorm folding (Markus 2018; Jacob et al. 2018, section 3.2). All arithmetic is float64 with
 * one rounding at the end. The channel of a weight element is an affine function of its coordinates
 * once axis 0 is split by groups, so the scale is just one more strided array with zero strides
 * along the axes that it does not depend on. */
#include "ops/bn_fold.h"

#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "ops/strided_walk.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

/* ---- checks ---- */
static cbn_status check_vector(const cbn_strided *v, const char *name, int64_t channels,
                               const char *meaning, bool allow_one, cbn_error *err) {
    if (!v->data) return CBN_OK;
    if (v->ndim != 1)
        return cbn_fail(err, CBN_BAD_VALUE, "%s: expected 1 dimension, got %d", name, v->ndim);
    if (v->shape[0] == channels || (allow_one && v->shape[0] == 1)) return CBN_OK;
    return cbn_fail(err, CBN_BAD_VALUE, "%s: expected length %lld (%s)%s, got %lld", name,
                    (long long)channels, meaning, allow_one ? " or 1" : "", (long long)v->shape[0]);
}

static cbn_status check_present(const cbn_strided *v, const char *name, int64_t channels,
                                cbn_error *err) {
    if (v->data) return CBN_OK;
    return cbn_fail(err, CBN_BAD_VALUE, "%s: expected running statistics of length %lld, got None",
                    name, (long long)channels);
}

static cbn_status check_bn(const cbn_bn *bn, int64_t channels, const char *meaning, bool allow_one,
                           cbn_error *err) {
    CBN_TRY(check_present(&bn->mean, "bn_rm", channels, err));
    CBN_TRY(check_present(&bn->var, "bn_rv", channels, err));
    if (!isfinite(bn->eps) || bn->eps < 0.0)
        return cbn_fail(err, CBN_BAD_VALUE, "bn_eps: expected a finite number >= 0, got %g",
                        bn->eps);
    CBN_TRY(check_vector(&bn->mean, "bn_rm", channels, meaning, allow_one, err));
    CBN_TRY(check_vector(&bn->var, "bn_rv", channels, meaning, allow_one, err));
    CBN_TRY(check_vector(&bn->weight, "bn_w", channels, meaning, allow_one, err));
    return check_vector(&bn->bias, "bn_b", channels, meaning, allow_one, err);
}

cbn_status cbn_bn_check(const cbn_bn *bn, int64_t channels, bool allow_one, cbn_error *err) {
    return check_bn(bn, channels, "channels", allow_one, err);
}

static cbn_status check_weights(const cbn_strided *w, bool linear, int64_t groups, cbn_error *err) {
    if (linear && w->ndim != 2)
        return cbn_fail(err, CBN_BAD_VALUE, "linear_w: expected 2 dimensions, got %d", w->ndim);
    if (w->ndim < 2)
        return cbn_fail(err, CBN_BAD_VALUE, "conv_w: expected at least 2 dimensions, got %d",
                        w->ndim);
    if (groups < 1)
        return cbn_fail(err, CBN_BAD_VALUE, "groups: expected >= 1, got %lld", (long long)groups);
    if (w->shape[0] % groups != 0)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "groups: expected a divisor of conv_w.shape[0] = %lld, got %lld",
                        (long long)w->shape[0], (long long)groups);
    int64_t across;
    if (!cbn_mul_ok(w->shape[1], groups, &across))
        return cbn_fail(
            err, CBN_BAD_VALUE,
            "groups: expected a product with conv_w.shape[1] = %lld below 2^63, got %lld",
            (long long)w->shape[1], (long long)groups);
    return CBN_OK;
}

/* ---- coefficients ---- */
/* Entry c, or the only one of a length-1 array; `absent` when there is no array. */
static double vector_at(const cbn_strided *v, int64_t c, double absent) {
    if (!v->data) return absent;
    const int64_t at = v->shape[0] == 1 ? 0 : c;
    return cbn_load_f64((const char *)v->data + at * v->stride_bytes[0], v->dtype);
}

static void vector_set(cbn_strided *v, int64_t c, double value) {
    cbn_store_f64((char *)v->data + c * v->stride_bytes[0], v->dtype, value);
}

void cbn_bn_scale_shift(const cbn_bn *bn, int64_t channels, double *s, double *t) {
    fenv_t before;
    feholdexcept(&before);
    for (int64_t c = 0; c < channels; ++c) {
        const double r = 1.0 / sqrt(vector_at(&bn->var, c, 1.0) + bn->eps);
        s[c] = vector_at(&bn->weight, c, 1.0) * r;
        t[c] = vector_at(&bn->bias, c, 0.0) - vector_at(&bn->mean, c, 0.0) * s[c];
    }
    fesetenv(&before);
}

/* ---- scaling of weights ---- */
CBN_INLINE void scale_rows(const cbn_walk_block *b, cbn_dtype t) {
    for (int64_t r = 0; r < b->rows; ++r) {
        char *y = b->data[0] + r * b->row[0];
        const char *x = b->data[1] + r * b->row[1], *s = b->data[2] + r * b->row[2];
        for (int64_t c = 0; c < b->cols; ++c)
            cbn_put_f64(y + c * b->col[0], t,
                        cbn_get_f64(x + c * b->col[1], t) *
                            cbn_get_f64(s + c * b->col[2], CBN_F64));
    }
}

typedef float four_f32 __attribute__((vector_size(16)));
typedef double four_f64 __attribute__((vector_size(32)));

/* Rows of contiguous float32 under one factor are what nearly all weights come to. */
static void scale_rows_f32(const cbn_walk_block *b) {
    for (int64_t r = 0; r < b->rows; ++r) {
        char *CBN_RESTRICT y = b->data[0] + r * b->row[0];
        const char *CBN_RESTRICT x = b->data[1] + r * b->row[1];
        const double s = cbn_get_f64(b->data[2] + r * b->row[2], CBN_F64);
        int64_t c = 0;
        for (; c + 4 <= b->cols; c += 4) {
            four_f32 v;
            memcpy(&v, x + c * 4, sizeof v);
            v = __builtin_convertvector(__builtin_convertvector(v, four_f64) * s, four_f32);
            memcpy(y + c * 4, &v, sizeof v);
        }
        for (; c < b->cols; ++c)
            cbn_put_f64(y + c * 4, CBN_F32, cbn_get_f64(x + c * 4, CBN_F32) * s);
    }
}

static void scale_block(const cbn_walk_block *b, void *arg) {
    const cbn_dtype t = *(const cbn_dtype *)arg;
    if (t == CBN_F32 && b->col[0] == 4 && b->col[1] == 4 && b->col[2] == 0)
        scale_rows_f32(b);
    else if (t == CBN_F32)
        scale_rows(b, CBN_F32);
    else if (t == CBN_F64)
        scale_rows(b, CBN_F64);
    else
        scale_rows(b, CBN_F16);
}

/* w_out = w * s[channel], where the channel is group*outer + (index within the group on axis
 * 0)*inner0 + j*inner1. */
static void scale_weights(const cbn_strided *w, cbn_strided *w_out, double *s, int64_t groups,
                          int64_t outer, int64_t inner0, int64_t inner1) {
    assert(w_out->dtype == w->dtype && w_out->ndim == w->ndim);
    const int64_t in_group = w->shape[0] / groups, of_double = (int64_t)sizeof(double);
    cbn_walk k = {.narrays = 3,
                  .ndim = w->ndim + 1,
                  .shape = {groups, in_group},
                  .data = {w_out->data, w->data, (char *)s}};
    const cbn_strided *arrays[2] = {w_out, w};
    for (int i = 0; i < 2; ++i) {
        k.stride[i][0] = arrays[i]->stride_bytes[0] * in_group;
        k.stride[i][1] = arrays[i]->stride_bytes[0];
        for (int a = 1; a < w->ndim; ++a) k.stride[i][a + 1] = arrays[i]->stride_bytes[a];
    }
    for (int a = 1; a < w->ndim; ++a) {
        assert(w_out->shape[a] == w->shape[a]);
        k.shape[a + 1] = w->shape[a];
    }
    k.stride[2][0] = outer * of_double;
    k.stride[2][1] = inner0 * of_double;
    k.stride[2][2] = inner1 * of_double;
    cbn_dtype dtype = w->dtype;
    cbn_walk_run(&k, scale_block, &dtype);
}

static cbn_status make_coefficients(const cbn_bn *bn, int64_t channels, double **s, double **t,
                                    cbn_error *err) {
    *s = cbn_alloc_array((size_t)channels, 2 * sizeof(double));
    if (!*s)
        return cbn_fail_memory(err, "the coefficients of a fold",
                               (size_t)channels * 2 * sizeof(double));
    *t = *s + channels;
    cbn_bn_scale_shift(bn, channels, *s, *t);
    return CBN_OK;
}

/* ---- conv first, then BN ---- */
cbn_status cbn_fold_conv_bn(const cbn_strided *w, const cbn_strided *b, const cbn_bn *bn,
                            bool linear, bool transposed, int64_t groups, cbn_strided *w_out,
                            cbn_strided *b_out, cbn_error *err) {
    CBN_TRY(check_weights(w, linear, groups, err));
    const int64_t channels = transposed ? w->shape[1] * groups : w->shape[0];
    const char *meaning = linear       ? "out_features = linear_w.shape[0]"
                          : transposed ? "out_channels = conv_w.shape[1] * groups"
                                       : "out_channels = conv_w.shape[0]";
    CBN_TRY(check_vector(b, linear ? "linear_b" : "conv_b", channels, meaning, false, err));
    CBN_TRY(check_bn(bn, channels, meaning, linear, err));
    double *s, *t;
    CBN_TRY(make_coefficients(bn, channels, &s, &t, err));
    if (transposed)
        scale_weights(w, w_out, s, groups, w->shape[1], 0, 1);
    else
        scale_weights(w, w_out, s, 1, 0, 1, 0);
    fenv_t before;
    feholdexcept(&before);
    for (int64_t c = 0; c < channels; ++c)
        vector_set(b_out, c,
                   (vector_at(b, c, 0.0) - vector_at(&bn->mean, c, 0.0)) * s[c] +
                       vector_at(&bn->bias, c, 0.0));
    fesetenv(&before);
    cbn_free(s);
    return CBN_OK;
}

/* ---- BN first, then conv ---- */
static bool all_zero(const double *t, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        if (!(t[i] == 0.0)) return false;
    return true;
}

/* Sum over W[o, j, ...]*t[first + j], in the order of the axes. */
static double weighted_shift(const cbn_strided *w, int64_t o, const double *t) {
    int64_t at[CBN_MAX_DIMS] = {0}, count = 1;
    for (int a = 1; a < w->ndim; ++a) count *= w->shape[a];
    const char *p = (const char *)w->data + o * w->stride_bytes[0];
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        sum += cbn_load_f64(p, w->dtype) * t[at[1]];
        for (int a = w->ndim - 1; a >= 1; --a) {
            p += w->stride_bytes[a];
            if (++at[a] < w->shape[a]) break;
            p -= w->stride_bytes[a] * w->shape[a];
            at[a] = 0;
        }
    }
    return sum;
}

cbn_status cbn_fold_bn_conv(const cbn_bn *bn, const cbn_strided *w, const cbn_strided *b,
                            bool padding_is_zero, bool zeros_mode, bool transposed, int64_t groups,
                            cbn_strided *w_out, cbn_strided *b_out, cbn_error *err) {
    CBN_TRY(check_weights(w, false, groups, err));
    const int64_t across = w->shape[1] * groups;
    const int64_t ic = transposed ? w->shape[0] : across, oc = transposed ? across : w->shape[0];
    CBN_TRY(check_vector(b, "conv_b", oc,
                         transposed ? "out_channels = conv_w.shape[1] * groups"
                                    : "out_channels = conv_w.shape[0]",
                         false, err));
    CBN_TRY(check_bn(bn, ic,
                     transposed ? "in_channels = conv_w.shape[0]"
                                : "in_channels = conv_w.shape[1] * groups",
                     false, err));
    double *s = NULL, *t = NULL;
    CBN_TRY(make_coefficients(bn, ic, &s, &t, err));
    const bool shifted = !all_zero(t, ic);
    if (shifted && (transposed || (zeros_mode && !padding_is_zero))) {
        cbn_free(s);
        return cbn_fail_fold(err, "PADDED_PRE_BN",
                             "padding: expected %s because the BatchNorm before the convolution "
                             "shifts its input, got %s; "
                             "at the border the shift is not constant",
                             transposed ? "a convolution that is not transposed"
                                        : "0 or a mode other than 'zeros'",
                             transposed ? "a transposed one" : "zero padding");
    }
    if (transposed)
        scale_weights(w, w_out, s, 1, 0, 1, 0);
    else
        scale_weights(w, w_out, s, groups, w->shape[1], 0, 1);
    fenv_t before;
    feholdexcept(&before);
    for (int64_t o = 0; o < oc; ++o) {
        const double shift =
            shifted ? weighted_shift(w, o, t + o / (oc / groups) * w->shape[1]) : 0.0;
        vector_set(b_out, o, vector_at(b, o, 0.0) + shift);
    }
    fesetenv(&before);
    cbn_free(s);
    return CBN_OK;
}
