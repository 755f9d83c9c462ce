/* SPDX-License-Identifier: BSD-3-Clause */
/* Batch normalisation (Ioffe and Szegedy 2015, algorithms 1 and 2). */
#include "ops/nn_ops.h"

#include <math.h>

#include "base/cbn_alloc.h"
#include "threads/cbn_parallel.h"

enum {
    GRAIN_ELEMENTS = 1 << 15, /* about 20 us of work */
    CHUNK = 512               /* float16 elements converted at a time, on the stack */
};

/* y = ((x - mean) - mean_lo)*scale + shift. The mean is kept as a float32 and its remainder: with |mean| far above the
 * standard deviation the rounding of the mean alone would otherwise cost most digits of the result. */
typedef struct channel_coef {
    double mean, scale, shift;
    float mean_hi, mean_lo, scale_f, shift_f;
} channel_coef;

static channel_coef make_coef(double mean, double var, double gamma, double beta, double eps) {
    channel_coef c = {.mean = mean, .scale = gamma / sqrt(var + eps), .shift = beta};
    c.mean_hi = (float)c.mean;
    c.mean_lo = (float)(c.mean - (double)c.mean_hi);
    if (!isfinite(c.mean_lo)) c.mean_lo = 0.0f; /* inf - inf: the first term has the answer */
    c.scale_f = (float)c.scale;
    c.shift_f = (float)c.shift;
    return c;
}

static void apply_f32(float *y, const float *x, const channel_coef *c, int64_t n) {
    const float hi = c->mean_hi, lo = c->mean_lo, s = c->scale_f, t = c->shift_f;
    for (int64_t i = 0; i < n; i++) y[i] = ((x[i] - hi) - lo) * s + t;
}

static void apply_f64(double *y, const double *x, const channel_coef *c, int64_t n) {
    const double m = c->mean, s = c->scale, t = c->shift;
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - m) * s + t;
}

static void apply_f16(uint16_t *y, const uint16_t *x, const channel_coef *c, int64_t n) {
    const cbn_kernels *k = cbn_kernels_active();
    float wide[CHUNK];
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t m = CBN_MIN(n - i, CHUNK);
        k->widen_f16(wide, x + i, m);
        apply_f32(wide, wide, c, m);
        k->narrow_f16(y + i, wide, m);
    }
}

typedef struct norm_job {
    cbn_dtype dtype;
    int64_t n, c, inner;
    const void *x;
    void *y;
    channel_coef *coef; /* [c] */
    double *mean, *var; /* [c], training only */
} norm_job;

static void apply_planes(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const norm_job *j = arg;
    int64_t channel = begin % j->c;
    for (int64_t p = begin; p < end; p++) {
        const channel_coef *c = &j->coef[channel];
        channel = channel + 1 == j->c ? 0 : channel + 1;
        const int64_t at = p * j->inner;
        if (j->dtype == CBN_F32) apply_f32((float *)j->y + at, (const float *)j->x + at, c, j->inner);
        else if (j->dtype == CBN_F64) apply_f64((double *)j->y + at, (const double *)j->x + at, c, j->inner);
        else apply_f16((uint16_t *)j->y + at, (const uint16_t *)j->x + at, c, j->inner);
    }
}

static void apply_all(norm_job *j) {
    cbn_parallel_for(j->n * j->c, cbn_ceil_div(GRAIN_ELEMENTS, CBN_MAX(j->inner, 1)), 0, apply_planes, j);
}

static double coefficient(const cbn_strided *v, int64_t channel, double missing) {
    if (!v->data) return missing;
    return cbn_load_f64((const char *)v->data + channel * v->stride_bytes[0], v->dtype);
}

static void set_coefs(norm_job *j, const cbn_bn *bn, bool batch) {
    for (int64_t c = 0; c < j->c; c++)
        j->coef[c] = make_coef(batch ? j->mean[c] : coefficient(&bn->mean, c, 0.0),
                               batch ? j->var[c] : coefficient(&bn->var, c, 1.0),
                               coefficient(&bn->weight, c, 1.0), coefficient(&bn->bias, c, 0.0), bn->eps);
}

static cbn_status check_length(const cbn_strided *v, const char *name, int64_t channels, cbn_error *err) {
    if (!v->data) return CBN_OK;
    if (v->ndim != 1 || v->shape[0] != channels)
        return cbn_fail(err, CBN_BAD_VALUE, "%s: expected length %lld (channels of input), got %s%lld", name,
                        (long long)channels, v->ndim == 1 ? "" : "a number of axes of ",
                        (long long)(v->ndim == 1 ? v->shape[0] : v->ndim));
    return CBN_OK;
}

static cbn_status check_parameters(const cbn_bn *bn, int64_t channels, cbn_error *err) {
    CBN_TRY(check_length(&bn->mean, "running_mean", channels, err));
    CBN_TRY(check_length(&bn->var, "running_var", channels, err));
    CBN_TRY(check_length(&bn->weight, "weight", channels, err));
    CBN_TRY(check_length(&bn->bias, "bias", channels, err));
    if (!(bn->eps >= 0.0) || !isfinite(bn->eps))
        return cbn_fail(err, CBN_BAD_VALUE, "eps: expected a finite number >= 0, got %g", bn->eps);
    return CBN_OK;
}

cbn_status cbn_batch_norm_eval(cbn_dtype dtype, int64_t n, int64_t c, int64_t inner, const void *x,
                               const cbn_bn *bn, void *y, cbn_error *err) {
    CBN_TRY(check_parameters(bn, c, err));
    if (!bn->mean.data || !bn->var.data)
        return cbn_fail(err, CBN_BAD_VALUE, "%s: expected an array outside of training, got None",
                        bn->mean.data ? "running_var" : "running_mean");
    norm_job j = {.dtype = dtype, .n = n, .c = c, .inner = inner, .x = x, .y = y};
    j.coef = cbn_alloc_array((size_t)c, sizeof *j.coef);
    if (!j.coef) return cbn_fail_memory(err, "batch_norm", (size_t)c * sizeof *j.coef);
    set_coefs(&j, bn, false);
    apply_all(&j);
    cbn_free(j.coef);
    return CBN_OK;
}

/* ---- statistics of the batch ----------------------------------------------------------------------------------- */

/* Sum of (x - shift)^power for power 1 or 2, in float64; eight partial sums let the additions overlap. */
#define CBN_DEFINE_MOMENT_(name, type)                                                             \
    static double name(const type *x, int64_t n, double shift, int power) {                        \
        double s[8] = {0};                                                                         \
        int64_t i = 0;                                                                             \
        for (; i + 8 <= n; i += 8) {                                                               \
            CBN_UNROLL for (int q = 0; q < 8; q++) {                                               \
                const double v = (double)x[i + q] - shift;                                         \
                s[q] += power == 1 ? v : v * v;                                                    \
            }                                                                                      \
        }                                                                                          \
        for (; i < n; i++) {                                                                       \
            const double v = (double)x[i] - shift;                                                 \
            s[0] += power == 1 ? v : v * v;                                                        \
        }                                                                                          \
        return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));                  \
    }
CBN_DEFINE_MOMENT_(moment_f32, float)
CBN_DEFINE_MOMENT_(moment_f64, double)
#undef CBN_DEFINE_MOMENT_

static double moment_f16(const uint16_t *x, int64_t n, double shift, int power) {
    float wide[CHUNK];
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t m = CBN_MIN(n - i, CHUNK);
        cbn_kernels_active()->widen_f16(wide, x + i, m);
        sum += moment_f32(wide, m, shift, power);
    }
    return sum;
}

static double channel_moment(const norm_job *j, int64_t channel, double shift, int power) {
    double sum = 0.0;
    for (int64_t n = 0; n < j->n; n++) {
        const int64_t at = (n * j->c + channel) * j->inner;
        if (j->dtype == CBN_F32) sum += moment_f32((const float *)j->x + at, j->inner, shift, power);
        else if (j->dtype == CBN_F64) sum += moment_f64((const double *)j->x + at, j->inner, shift, power);
        else sum += moment_f16((const uint16_t *)j->x + at, j->inner, shift, power);
    }
    return sum;
}

/* Two passes: the textbook E[x^2] - E[x]^2 has no digits left when the mean dominates. The first-order term corrects
 * for the rounding of the mean (Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance"). */
static void channel_stats(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const norm_job *j = arg;
    const double count = (double)(j->n * j->inner);
    for (int64_t c = begin; c < end; c++) {
        const double mean = channel_moment(j, c, 0.0, 1) / count;
        const double rest = channel_moment(j, c, mean, 1) / count;
        j->mean[c] = mean + rest;
        j->var[c] = channel_moment(j, c, mean, 2) / count - rest * rest;
        if (!isfinite(mean)) j->mean[c] = mean;
    }
}

static void update_running(const cbn_strided *running, int64_t channels, const double *batch, double factor,
                           double momentum) {
    if (!running->data) return;
    for (int64_t c = 0; c < channels; c++) {
        char *p = (char *)running->data + c * running->stride_bytes[0];
        const double old = cbn_load_f64(p, running->dtype);
        cbn_store_f64(p, running->dtype, (1.0 - momentum) * old + momentum * (batch[c] * factor));
    }
}

cbn_status cbn_batch_norm_train(cbn_dtype dtype, int64_t n, int64_t c, int64_t inner, const void *x,
                                const cbn_bn *bn, double momentum, void *y, cbn_error *err) {
    CBN_TRY(check_parameters(bn, c, err));
    const int64_t count = n * inner;
    if (n == 0 || c == 0 || inner == 0) return CBN_OK;
    if (count < 2)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "input: expected more than 1 value per channel when training, got %lld", (long long)count);
    norm_job j = {.dtype = dtype, .n = n, .c = c, .inner = inner, .x = x, .y = y};
    j.coef = cbn_alloc_array((size_t)c, sizeof *j.coef);
    j.mean = cbn_alloc_array((size_t)c, 2 * sizeof *j.mean);
    cbn_status status = CBN_OK;
    if (!j.coef || !j.mean) {
        status = cbn_fail_memory(err, "batch_norm", (size_t)c * (sizeof *j.coef + 2 * sizeof *j.mean));
        goto done;
    }
    j.var = j.mean + c;
    cbn_parallel_for(c, cbn_ceil_div(GRAIN_ELEMENTS, count * 2), 0, channel_stats, &j);
    set_coefs(&j, bn, true);
    apply_all(&j);
    update_running(&bn->mean, c, j.mean, 1.0, momentum);
    update_running(&bn->var, c, j.var, (double)count / (double)(count - 1), momentum);
done:
    cbn_free(j.coef);
    cbn_free(j.mean);
    return status;
}
