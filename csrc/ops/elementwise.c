/* SPDX-License-Identifier: BSD-3-Clause */
/* Activations, broadcasting arithmetic, softmax. float32 runs in the kernels; float16 is widened in chunks that stay in
 * the first-level cache; float64 uses the C library's functions. */
#include "ops/nn_ops.h"

#include <math.h>

#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "threads/cbn_parallel.h"

enum {
    GRAIN_ELEMENTS = 1 << 15, /* about 20 us of simple work */
    COSTLY = 4,               /* an exp costs as much as this many simple operations */
    CHUNK = 512               /* float16 elements converted at a time, on the stack */
};

/* ---- unary ----------------------------------------------------------------------------------------------------- */

static double clamp_f64(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }

static double act_f64(cbn_act act, double a, double b, double x) {
    switch (act) {
    case CBN_ACT_NONE: return x;
    case CBN_ACT_RELU: return x < 0.0 ? 0.0 : x;
    case CBN_ACT_RELU6: return clamp_f64(x, 0.0, 6.0);
    case CBN_ACT_LEAKY_RELU: return x > 0.0 ? x : a * x;
    case CBN_ACT_SIGMOID: return 1.0 / (1.0 + exp(-x));
    case CBN_ACT_HARDTANH: return clamp_f64(x, a, b);
    case CBN_ACT_HARDSWISH: return x * (clamp_f64(x + 3.0, 0.0, 6.0) / 6.0);
    case CBN_ACT_SILU: return x / (1.0 + exp(-x));
    case CBN_ACT_GELU: return x * (0.5 * erfc(-x * 0.70710678118654752440));
    case CBN_ACT_GELU_TANH: {
        const double u = 1.59576912160573071176 * (x + 0.044715 * x * x * x); /* 2*sqrt(2/pi) */
        return x / (1.0 + exp(-u));
    }
    }
    return x;
}

typedef struct unary_job {
    cbn_dtype dtype;
    cbn_act act;
    double a, b;
    const void *x;
    void *y;
} unary_job;

static void unary_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const unary_job *j = arg;
    const cbn_kernels *k = cbn_kernels_active();
    const float a = (float)j->a, b = (float)j->b;
    if (j->dtype == CBN_F32) {
        k->unary(j->act, a, b, (float *)j->y + begin, (const float *)j->x + begin, end - begin);
    } else if (j->dtype == CBN_F64) {
        for (int64_t i = begin; i < end; i++)
            ((double *)j->y)[i] = act_f64(j->act, j->a, j->b, ((const double *)j->x)[i]);
    } else {
        float wide[CHUNK];
        for (int64_t i = begin; i < end; i += CHUNK) {
            const int64_t m = CBN_MIN(end - i, CHUNK);
            k->widen_f16(wide, (const uint16_t *)j->x + i, m);
            k->unary(j->act, a, b, wide, wide, m);
            k->narrow_f16((uint16_t *)j->y + i, wide, m);
        }
    }
}

cbn_status cbn_unary(cbn_dtype dtype, cbn_act act, double a, double b, const void *x, void *y, int64_t n,
                     cbn_error *err) {
    (void)err;
    unary_job j = {dtype, act, a, b, x, y};
    const bool costly = act == CBN_ACT_SIGMOID || act >= CBN_ACT_SILU;
    cbn_parallel_for(n, costly ? GRAIN_ELEMENTS / COSTLY : GRAIN_ELEMENTS, 0, unary_range, &j);
    return CBN_OK;
}

/* ---- binary with broadcasting ---------------------------------------------------------------------------------- */

typedef struct binary_job {
    cbn_dtype dtype;
    cbn_binary_kind kind;
    int ndim; /* of the collapsed problem, at least 1 */
    int64_t shape[CBN_MAX_DIMS], xs[CBN_MAX_DIMS], zs[CBN_MAX_DIMS];
    const char *x, *z;
    char *y;
    double alpha;
} binary_job;

/* Strides 1 and 0 of x and z along a row are the only ones there are after collapsing, in float: x or z a vector or one
 * repeated value. */
static void row_f32(const binary_job *j, float *y, const float *x, int64_t xs, const float *z, int64_t zs,
                    int64_t n) {
    const cbn_kernels *k = cbn_kernels_active();
    const float alpha = (float)j->alpha;
    const bool add = j->kind == CBN_BINARY_ADD;
    if (xs == 1 && zs == 1) {
        if (add) k->add(y, x, z, alpha, n);
        else k->mul(y, x, z, n);
    } else if (xs == 1 && zs == 0) {
        if (!add) k->affine(y, x, *z, -0.0f, n);
        else if (alpha == 1.0f) k->affine(y, x, 1.0f, *z, n);
        else
            for (int64_t i = 0; i < n; i++) y[i] = fmaf(alpha, *z, x[i]);
    } else if (xs == 0 && zs == 1) {
        k->affine(y, z, add ? alpha : *x, add ? *x : -0.0f, n);
    } else {
        for (int64_t i = 0; i < n; i++)
            y[i] = add ? fmaf(alpha, z[i * zs], x[i * xs]) : x[i * xs] * z[i * zs];
    }
}

static void row_f64(const binary_job *j, double *y, const double *x, int64_t xs, const double *z, int64_t zs,
                    int64_t n) {
    if (j->kind == CBN_BINARY_ADD)
        for (int64_t i = 0; i < n; i++) y[i] = x[i * xs] + j->alpha * z[i * zs];
    else
        for (int64_t i = 0; i < n; i++) y[i] = x[i * xs] * z[i * zs];
}

static void row_f16(const binary_job *j, uint16_t *y, const uint16_t *x, int64_t xs, const uint16_t *z,
                    int64_t zs, int64_t n) {
    const cbn_kernels *k = cbn_kernels_active();
    float wx[CHUNK], wz[CHUNK];
    uint16_t gathered[CHUNK];
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t m = CBN_MIN(n - i, CHUNK);
        const uint16_t *const from[2] = {x + i * xs, z + i * zs};
        const int64_t step[2] = {xs, zs};
        float *const to[2] = {wx, wz};
        for (int o = 0; o < 2; o++) {
            const uint16_t *p = from[o];
            if (step[o] != 1) {
                for (int64_t q = 0; q < m; q++) gathered[q] = from[o][q * step[o]];
                p = gathered;
            }
            k->widen_f16(to[o], p, m);
        }
        row_f32(j, wx, wx, 1, wz, 1, m);
        k->narrow_f16(y + i, wx, m);
    }
}

/* Rows [begin, end) of the collapsed problem; a row is the last axis. */
static void binary_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const binary_job *j = arg;
    const int last = j->ndim - 1;
    const int64_t n = j->shape[last], es = (int64_t)cbn_dtype_size(j->dtype);
    int64_t at[CBN_MAX_DIMS], rest = begin, xo = 0, zo = 0;
    for (int a = last - 1; a >= 0; a--) {
        at[a] = rest % j->shape[a];
        rest /= j->shape[a];
        xo += at[a] * j->xs[a];
        zo += at[a] * j->zs[a];
    }
    for (int64_t r = begin; r < end; r++) {
        const void *x = j->x + xo * es, *z = j->z + zo * es;
        void *y = j->y + r * n * es;
        if (j->dtype == CBN_F32) row_f32(j, y, x, j->xs[last], z, j->zs[last], n);
        else if (j->dtype == CBN_F64) row_f64(j, y, x, j->xs[last], z, j->zs[last], n);
        else row_f16(j, y, x, j->xs[last], z, j->zs[last], n);
        for (int a = last - 1; a >= 0; a--) {
            xo += j->xs[a];
            zo += j->zs[a];
            if (++at[a] < j->shape[a]) break;
            xo -= at[a] * j->xs[a];
            zo -= at[a] * j->zs[a];
            at[a] = 0;
        }
    }
}

/* One axis and no broadcasting at all: any element range is as good as another. */
static void binary_elements(void *arg, int64_t begin, int64_t end, int worker) {
    const binary_job *whole = arg;
    const int64_t es = (int64_t)cbn_dtype_size(whole->dtype);
    binary_job part = *whole;
    part.x += begin * whole->xs[0] * es;
    part.z += begin * whole->zs[0] * es;
    part.y += begin * es;
    part.shape[0] = end - begin;
    binary_rows(&part, 0, 1, worker);
}

cbn_status cbn_binary(cbn_dtype dtype, cbn_binary_kind kind, int ndim, const int64_t *shape, const void *x,
                      const int64_t *x_stride, const void *z, const int64_t *z_stride, double alpha, void *out,
                      cbn_error *err) {
    (void)err;
    binary_job j = {.dtype = dtype, .kind = kind, .x = x, .z = z, .y = out, .alpha = alpha};
    int64_t total = 1;
    /* Unit axes go, and an axis joins its inner neighbour where both operands run on from one to the other. */
    for (int a = 0; a < ndim; a++) {
        total *= shape[a];
        if (shape[a] == 1) continue;
        const int l = j.ndim - 1;
        if (l >= 0 && j.xs[l] == x_stride[a] * shape[a] && j.zs[l] == z_stride[a] * shape[a]) {
            j.shape[l] *= shape[a];
            j.xs[l] = x_stride[a];
            j.zs[l] = z_stride[a];
            continue;
        }
        j.shape[j.ndim] = shape[a];
        j.xs[j.ndim] = x_stride[a];
        j.zs[j.ndim++] = z_stride[a];
    }
    if (total == 0) return CBN_OK;
    if (j.ndim == 0) {
        j.shape[0] = 1;
        j.xs[0] = j.zs[0] = 1;
        j.ndim = 1;
    }
    if (j.ndim == 1) {
        cbn_parallel_for(j.shape[0], GRAIN_ELEMENTS, 0, binary_elements, &j);
    } else {
        const int64_t n = j.shape[j.ndim - 1];
        cbn_parallel_for(total / n, cbn_ceil_div(GRAIN_ELEMENTS, n), 0, binary_rows, &j);
    }
    return CBN_OK;
}

/* ---- softmax --------------------------------------------------------------------------------------------------- */

typedef struct softmax_job {
    cbn_dtype dtype;
    int64_t len, inner;
    const void *x;
    void *y;
} softmax_job;

/* exp(x - max) / sum, columns of [outer][inner]; sums in float64. Neither conversions nor exp dominate anything a CNN
 * does with it, so one implementation serves all types. */
static void softmax_columns(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const softmax_job *j = arg;
    const size_t es = cbn_dtype_size(j->dtype);
    for (int64_t i = begin; i < end; i++) {
        const int64_t at = i / j->inner * j->len * j->inner + i % j->inner;
        const char *x = (const char *)j->x + (size_t)at * es;
        char *y = (char *)j->y + (size_t)at * es;
        const size_t step = (size_t)j->inner * es;
        double top = -INFINITY, sum = 0.0;
        for (int64_t q = 0; q < j->len; q++) {
            const double v = cbn_load_f64(x + (size_t)q * step, j->dtype);
            if (v > top || v != v) top = v;
        }
        for (int64_t q = 0; q < j->len; q++) sum += exp(cbn_load_f64(x + (size_t)q * step, j->dtype) - top);
        for (int64_t q = 0; q < j->len; q++)
            cbn_store_f64(y + (size_t)q * step, j->dtype,
                          exp(cbn_load_f64(x + (size_t)q * step, j->dtype) - top) / sum);
    }
}

cbn_status cbn_softmax(cbn_dtype dtype, int64_t outer, int64_t len, int64_t inner, const void *x, void *y,
                       cbn_error *err) {
    (void)err;
    softmax_job j = {dtype, len, inner, x, y};
    if (len == 0) return CBN_OK;
    cbn_parallel_for(outer * inner, cbn_ceil_div(GRAIN_ELEMENTS, len * COSTLY * 4), 0, softmax_columns, &j);
    return CBN_OK;
}
