/* SPDX-License-Identifier: BSD-3-Clause */
/* Pooling. Max and average windows are separable: the rows of a window are combined into one input-wide line, then the
 * columns of that line, kd*kh + kw passes instead of kd*kh*kw, all of them long vector operations. */
#include "ops/nn_ops.h"

#include <math.h>
#include <string.h>

#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "threads/cbn_parallel.h"

/* Elements a thread should at least handle, about 20 us. */
enum { GRAIN_ELEMENTS = 1 << 15 };

cbn_status cbn_pool_desc_make(cbn_dtype dtype, int nd, int64_t planes, const int64_t *in, const int64_t *k,
                              const int64_t *stride, const int64_t *pad, const int64_t *dil, bool ceil_mode,
                              cbn_pool_desc *d, cbn_error *err) {
    assert(nd >= 1 && nd <= CBN_MAX_SPATIAL);
    *d = (cbn_pool_desc){.dtype = dtype, .nd = nd, .planes = planes, .count_include_pad = true};
    for (int i = 0; i < CBN_MAX_SPATIAL; i++) {
        d->in[i] = d->out[i] = d->k[i] = d->stride[i] = d->dil[i] = 1;
        const int u = i - (CBN_MAX_SPATIAL - nd);
        if (u < 0) continue;
        const int64_t dl = dil ? dil[u] : 1;
        if (k[u] < 1)
            return cbn_fail(err, CBN_BAD_VALUE, "kernel_size: expected >= 1, got %lld", (long long)k[u]);
        if (stride[u] < 1)
            return cbn_fail(err, CBN_BAD_VALUE, "stride: expected >= 1, got %lld", (long long)stride[u]);
        if (dl < 1) return cbn_fail(err, CBN_BAD_VALUE, "dilation: expected >= 1, got %lld", (long long)dl);
        int64_t reach, padded;
        if (!cbn_mul_ok(k[u] - 1, dl, &reach) || !cbn_add_ok(reach, 1, &reach))
            return cbn_fail(err, CBN_BAD_VALUE, "kernel_size: expected a product with dilation below 2^63, got %lld and %lld",
                            (long long)k[u], (long long)dl);
        if (pad[u] < 0 || pad[u] > reach / 2)
            return cbn_fail(err, CBN_BAD_VALUE,
                            "padding: expected 0 to half of the kernel's extent %lld, got %lld",
                            (long long)reach, (long long)pad[u]);
        if (stride[u] > INT64_MAX / 2)
            return cbn_fail(err, CBN_BAD_VALUE, "stride: expected a number below 2^62, got %lld", (long long)stride[u]);
        if (!cbn_add_ok(in[u], 2 * pad[u], &padded) || padded > INT64_MAX / 2)
            return cbn_fail(err, CBN_BAD_VALUE, "input: expected a padded size below 2^62, got %lld with padding %lld",
                            (long long)in[u], (long long)pad[u]);
        const int64_t room = padded - reach;
        int64_t out = room < 0 ? 0 : room / stride[u] + 1;
        if (ceil_mode && room >= 0) {
            out = cbn_ceil_div(room, stride[u]) + 1;
            if ((out - 1) * stride[u] >= in[u] + pad[u]) out--;
        } else if (ceil_mode && room + stride[u] - 1 >= 0) {
            out = 1;
        }
        if (in[u] < 1 || out < 1)
            return cbn_fail(err, CBN_BAD_VALUE,
                            "input: expected a padded size >= the kernel's extent %lld, got %lld with padding %lld",
                            (long long)reach, (long long)in[u], (long long)pad[u]);
        d->in[i] = in[u];
        d->out[i] = out;
        d->k[i] = k[u];
        d->stride[i] = stride[u];
        d->pad[i] = pad[u];
        d->dil[i] = dl;
    }
    return CBN_OK;
}

/* ---- the window passes ----------------------------------------------------------------------------------------- */

/* The float kernels and their float64 counterparts behind one signature. */
typedef void (*pool_fn)(const cbn_pool_args *a);

static void max_f32(const cbn_pool_args *a) { cbn_kernels_active()->pool_max(a); }
static void add_f32(const cbn_pool_args *a) { cbn_kernels_active()->pool_add(a); }

/* y and x are doubles. */
CBN_INLINE void pool_f64(const bool max, const cbn_pool_args *a) {
    const double *x = (const double *)(const void *)a->x;
    double *y = (double *)(void *)a->y;
    for (int64_t i = 0; i < a->n; i++, x += a->step) {
        double s = x[0];
        for (int64_t r = 0; r < a->taps[0]; r++)
            for (int64_t t = r == 0; t < a->taps[1]; t++) {
                const double v = x[r * a->apart[0] + t * a->apart[1]];
                if (!max) s += v;
                else if (v > s || v != v) s = v;
            }
        y[i] = s;
    }
}
static void max_f64(const cbn_pool_args *a) { pool_f64(true, a); }
static void add_f64(const cbn_pool_args *a) { pool_f64(false, a); }

typedef struct pool_job {
    const cbn_pool_desc *d;
    const char *x;
    char *y;
    char *scratch;
    size_t scratch_bytes; /* of one worker */
    pool_fn pool;
    int64_t line; /* elements of the padded line that the columns are combined from */
    bool average, adaptive;
    const double *width_divisor; /* average: elements of the window along the last axis, [ow] */
} pool_job;

/* Kernel indices of output `o` whose input lies in the image: k in [*lo, *hi). */
static void taps_inside(const cbn_pool_desc *d, int axis, int64_t o, int64_t *lo, int64_t *hi) {
    const int64_t start = o * d->stride[axis] - d->pad[axis], dil = d->dil[axis];
    /* No division for windows inside: it takes as long as a short row. */
    *lo = start >= 0 ? 0 : cbn_ceil_div(-start, dil);
    *hi = start + (d->k[axis] - 1) * dil < d->in[axis] ? d->k[axis]
          : d->in[axis] <= start                       ? 0
                                                       : cbn_ceil_div(d->in[axis] - start, dil);
}

/* The window's length along an axis, as the average divides by it. */
static int64_t window_length(const cbn_pool_desc *d, int axis, int64_t o) {
    const int64_t start = o * d->stride[axis] - d->pad[axis];
    const int64_t end = CBN_MIN(start + d->k[axis], d->in[axis] + d->pad[axis]);
    if (d->count_include_pad) return end - start;
    return CBN_MIN(end, d->in[axis]) - CBN_MAX(start, 0);
}

static void divide_row(const pool_job *j, void *row, double rows) {
    const cbn_pool_desc *d = j->d;
    for (int64_t i = 0; i < d->out[2]; i++) {
        const double div = d->divisor ? (double)d->divisor : rows * j->width_divisor[i];
        if (d->dtype == CBN_F64) ((double *)row)[i] /= div;
        else ((float *)row)[i] /= (float)div;
    }
}

static void fill(char *y, double value, int64_t n, size_t es) {
    for (int64_t i = 0; i < n; i++) {
        if (es == sizeof(double)) ((double *)y)[i] = value;
        else ((float *)y)[i] = (float)value;
    }
}

/* Output row (od, oh) of one plane. line: padded already; es: bytes of a computed element. */
static void window_row(const pool_job *j, const char *x, char *y, char *line, size_t es, int64_t od, int64_t oh) {
    const cbn_pool_desc *d = j->d;
    const int64_t iw = d->in[2], row = d->in[1] * iw;
    int64_t d0, d1, h0, h1;
    taps_inside(d, 0, od, &d0, &d1);
    taps_inside(d, 1, oh, &h0, &h1);
    if (d0 >= d1 || h0 >= h1) {
        fill(y, j->average ? 0.0 : -INFINITY, d->out[2], es);
    } else {
        const int64_t id = od * d->stride[0] - d->pad[0] + d0 * d->dil[0];
        const int64_t ih = oh * d->stride[1] - d->pad[1] + h0 * d->dil[1];
        const cbn_pool_args rows = {.y = (float *)(void *)(line + (size_t)d->pad[2] * es),
                                    .x = (const float *)(const void *)(x + (size_t)(id * row + ih * iw) * es),
                                    .n = iw,
                                    .step = 1,
                                    .taps = {d1 - d0, h1 - h0},
                                    .apart = {d->dil[0] * row, d->dil[1] * iw}};
        const cbn_pool_args columns = {.y = (float *)(void *)y,
                                       .x = (const float *)(const void *)line,
                                       .n = d->out[2],
                                       .step = d->stride[2],
                                       .taps = {1, d->k[2]},
                                       .apart = {0, d->dil[2]}};
        if (rows.taps[0] * rows.taps[1] == 1) memcpy(rows.y, rows.x, (size_t)iw * es);
        else j->pool(&rows);
        /* The rows that come next: the hardware does not foresee them while several are read side by side. */
        const char *next = (const char *)rows.x + (size_t)((h1 - h0) * d->dil[1] * iw) * es;
        for (int64_t at = 0; at < d->stride[1] * iw; at += CBN_CACHE_LINE / (int64_t)es)
            __builtin_prefetch(next + (size_t)at * es, 0, 3);
        j->pool(&columns);
    }
    if (j->average) divide_row(j, y, (double)(window_length(d, 0, od) * window_length(d, 1, oh)));
}

/* ---- adaptive -------------------------------------------------------------------------------------------------- */

/* Independent partial sums let the additions overlap; the order is the same for every caller. */
#define CBN_DEFINE_RUN_SUM_(name, type)                                                            \
    static double name(const type *x, int64_t n) {                                                 \
        double s[8] = {0};                                                                         \
        int64_t i = 0;                                                                             \
        for (; i + 8 <= n; i += 8) {                                                               \
            CBN_UNROLL for (int q = 0; q < 8; q++) s[q] += (double)x[i + q];                       \
        }                                                                                          \
        for (; i < n; i++) s[0] += (double)x[i];                                                   \
        return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));                  \
    }
CBN_DEFINE_RUN_SUM_(run_sum_f32, float)
CBN_DEFINE_RUN_SUM_(run_sum_f64, double)
#undef CBN_DEFINE_RUN_SUM_

static void adaptive_plane(const cbn_pool_desc *d, const char *x, char *y, size_t es) {
    const int64_t iw = d->in[2];
    int64_t at = 0;
    for (int64_t od = 0; od < d->out[0]; od++)
        for (int64_t oh = 0; oh < d->out[1]; oh++)
            for (int64_t ow = 0; ow < d->out[2]; ow++, at++) {
                int64_t lo[3], len[3];
                const int64_t o[3] = {od, oh, ow};
                for (int a = 0; a < 3; a++) {
                    lo[a] = 0;
                    len[a] = d->in[a];
                    if (d->out[a] == 1) continue; /* divisions take longer than the sum of a small plane */
                    lo[a] = o[a] * d->in[a] / d->out[a];
                    len[a] = cbn_ceil_div((o[a] + 1) * d->in[a], d->out[a]) - lo[a];
                }
                const int64_t count = len[0] * len[1] * len[2];
                int64_t rows = len[1], run = len[2];
                if (run == iw) { /* whole rows are one stretch of memory */
                    run *= rows;
                    rows = 1;
                }
                double sum = 0.0;
                for (int64_t i = 0; i < len[0]; i++)
                    for (int64_t r = 0; r < rows; r++) {
                        const int64_t p = ((lo[0] + i) * d->in[1] + lo[1] + r) * iw + lo[2];
                        sum += es == sizeof(double) ? run_sum_f64((const double *)x + p, run)
                                                    : run_sum_f32((const float *)x + p, run);
                    }
                if (es == sizeof(double)) ((double *)y)[at] = sum / (double)count;
                else ((float *)y)[at] = (float)(sum / (double)count);
            }
}

/* ---- running --------------------------------------------------------------------------------------------------- */

static void pool_planes(void *arg, int64_t begin, int64_t end, int worker) {
    const pool_job *j = arg;
    const cbn_pool_desc *d = j->d;
    const bool half = d->dtype == CBN_F16;
    const size_t es = d->dtype == CBN_F64 ? sizeof(double) : sizeof(float);
    const int64_t in = d->in[0] * d->in[1] * d->in[2], out = d->out[0] * d->out[1] * d->out[2];
    char *line = j->scratch + (size_t)worker * j->scratch_bytes;
    char *wide_x = line + (size_t)j->line * es, *wide_y = wide_x + (size_t)in * es;
    if (!j->adaptive) fill(line, j->average ? 0.0 : -INFINITY, j->line, es);
    for (int64_t p = begin; p < end; p++) {
        const char *x = j->x + (size_t)(p * in) * cbn_dtype_size(d->dtype);
        char *y = j->y + (size_t)(p * out) * cbn_dtype_size(d->dtype), *target = half ? wide_y : y;
        if (half) {
            cbn_kernels_active()->widen_f16((float *)wide_x, (const uint16_t *)x, in);
            x = wide_x;
        }
        if (j->adaptive) adaptive_plane(d, x, target, es);
        for (int64_t r = 0; !j->adaptive && r < d->out[0] * d->out[1]; r++)
            window_row(j, x, target + (size_t)(r * d->out[2]) * es, line, es, r / d->out[1], r % d->out[1]);
        if (half) cbn_kernels_active()->narrow_f16((uint16_t *)y, (const float *)wide_y, out);
    }
}

/* Elements of a row with its padding, as far as windows reach. */
static int64_t padded_line(const cbn_pool_desc *d) {
    const int64_t reach = (d->out[2] - 1) * d->stride[2] + (d->k[2] - 1) * d->dil[2] + 1;
    return CBN_MAX(reach, d->pad[2] + d->in[2]);
}

static cbn_status pool_run(const cbn_pool_desc *d, const void *x, void *y, pool_fn pool, bool average, bool adaptive,
                           cbn_error *err) {
    const int64_t in = d->in[0] * d->in[1] * d->in[2], out = d->out[0] * d->out[1] * d->out[2];
    const int workers = cbn_threads_get(NULL);
    const size_t es = d->dtype == CBN_F64 ? sizeof(double) : sizeof(float);
    const int64_t line = adaptive ? 0 : padded_line(d);
    if (line > INT64_MAX >> 20) return cbn_fail_memory(err, "pooling", SIZE_MAX);
    size_t bytes = (size_t)line * es + (d->dtype == CBN_F16 ? (size_t)(in + out) * es : 0);
    bytes = cbn_whole_lines(bytes);
    if (d->planes == 0) return CBN_OK;
    char *scratch = cbn_scratch_get(bytes * (size_t)workers);
    double *width = cbn_alloc_array((size_t)d->out[2], sizeof *width);
    cbn_status status = CBN_OK;
    if (!scratch || !width) {
        status = cbn_fail_memory(err, "pooling", bytes * (size_t)workers);
        goto done;
    }
    if (average)
        for (int64_t i = 0; i < d->out[2]; i++) width[i] = (double)window_length(d, 2, i);
    pool_job job = {.d = d,
                    .x = x,
                    .y = y,
                    .scratch = scratch,
                    .scratch_bytes = bytes,
                    .pool = pool,
                    .line = line,
                    .average = average,
                    .adaptive = adaptive,
                    .width_divisor = width};
    const int64_t work = adaptive ? in : in + d->out[0] * d->out[1] * d->k[0] * d->k[1] * d->in[2] / 4 + out * d->k[2];
    cbn_parallel_for(d->planes, cbn_ceil_div(GRAIN_ELEMENTS, work), workers, pool_planes, &job);
done:
    cbn_scratch_put(scratch);
    cbn_free(width);
    return status;
}

cbn_status cbn_max_pool(const cbn_pool_desc *d, const void *x, void *y, cbn_error *err) {
    return pool_run(d, x, y, d->dtype == CBN_F64 ? max_f64 : max_f32, false, false, err);
}
cbn_status cbn_avg_pool(const cbn_pool_desc *d, const void *x, void *y, cbn_error *err) {
    return pool_run(d, x, y, d->dtype == CBN_F64 ? add_f64 : add_f32, true, false, err);
}
cbn_status cbn_adaptive_avg_pool(const cbn_pool_desc *d, const void *x, void *y, cbn_error *err) {
    return pool_run(d, x, y, NULL, false, true, err);
}
