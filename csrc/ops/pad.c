/* SPDX-License-Identifier: BSD-3-Clause */
/* Padding and cropping, as torch.nn.functional.pad. */
#include "ops/nn_ops.h"

#include <string.h>

#include "base/cbn_checked.h"
#include "threads/cbn_parallel.h"

enum { GRAIN_BYTES = 1 << 18 }; /* about 20 us of copying */

cbn_status cbn_pad_shape(int ndim, const int64_t *shape, const int64_t *lo, const int64_t *hi, cbn_pad_mode mode,
                         int64_t *out_shape, cbn_error *err) {
    for (int a = 0; a < ndim; a++) {
        int64_t size;
        if (!cbn_add_ok(shape[a], lo[a], &size) || !cbn_add_ok(size, hi[a], &size))
            return cbn_fail(err, CBN_BAD_VALUE, "padding: expected sizes below 2^63, got (%lld, %lld)", (long long)lo[a],
                            (long long)hi[a]);
        const int64_t most = CBN_MAX(lo[a], hi[a]);
        const char *limit = NULL;
        if (mode == CBN_MODE_REFLECT && most > 0 && most >= shape[a]) limit = "less than";
        const int64_t left = shape[a] + CBN_MIN(lo[a], 0) + CBN_MIN(hi[a], 0); /* after cropping */
        if (mode == CBN_MODE_CIRCULAR && most > CBN_MAX(left, 0)) limit = "at most";
        if (limit)
            return cbn_fail(err, CBN_BAD_VALUE, "padding: mode '%s' expects %s the input size %lld, got %lld",
                            mode == CBN_MODE_REFLECT ? "reflect" : "circular", limit, (long long)shape[a],
                            (long long)most);
        if (size < 0 || -lo[a] > shape[a] || -hi[a] > shape[a] ||
            (mode != CBN_MODE_ZEROS && (lo[a] || hi[a]) && (size < 1 || shape[a] < 1)))
            return cbn_fail(err, CBN_BAD_VALUE, "padding: expected amounts that leave something of an axis, "
                            "got (%lld, %lld) for size %lld",
                            (long long)lo[a], (long long)hi[a], (long long)shape[a]);
        out_shape[a] = size;
    }
    return CBN_OK;
}

/* Where output index `i` (relative to the input's first) comes from; -1: the fill value. Circular padding repeats what
 * cropping has left. */
static int64_t source_index(int64_t i, int64_t n, int64_t lo, int64_t hi, cbn_pad_mode mode) {
    if (i >= 0 && i < n) return i;
    switch (mode) {
    case CBN_MODE_ZEROS: return -1;
    case CBN_MODE_REFLECT: return i < 0 ? -i : 2 * (n - 1) - i;
    case CBN_MODE_REPLICATE: return i < 0 ? 0 : n - 1;
    case CBN_MODE_CIRCULAR: return i < 0 ? i + n + CBN_MIN(hi, 0) : i - n - CBN_MIN(lo, 0);
    }
    return -1;
}

typedef struct pad_job {
    int ndim;
    const int64_t *shape, *lo, *hi;
    int64_t out[CBN_MAX_DIMS];
    cbn_pad_mode mode;
    size_t es;
    unsigned char fill[8];
    const char *x;
    char *y;
} pad_job;

/* Rows [begin, end) of the output; a row is the last axis. */
static void pad_rows(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const pad_job *j = arg;
    const int last = j->ndim - 1;
    const int64_t n = j->shape[last], m = j->out[last], lo = j->lo[last];
    const int64_t first = CBN_MAX(lo, 0), stop = CBN_MAX(first, CBN_MIN(m, lo + n)); /* columns that are copied */
    for (int64_t r = begin; r < end; r++) {
        int64_t row = 0, pitch = 1, rest = r;
        for (int a = last - 1; a >= 0 && row >= 0; a--) {
            const int64_t s = source_index(rest % j->out[a] - j->lo[a], j->shape[a], j->lo[a], j->hi[a], j->mode);
            rest /= j->out[a];
            row = s < 0 ? -1 : row + s * pitch;
            pitch *= j->shape[a];
        }
        char *y = j->y + (size_t)(r * m) * j->es;
        const char *x = j->x + (size_t)(CBN_MAX(row, 0) * n) * j->es;
        const bool inside = row >= 0;
        if (inside && stop > first)
            memcpy(y + (size_t)first * j->es, x + (size_t)(first - lo) * j->es, (size_t)(stop - first) * j->es);
        for (int64_t i = 0; i < m; i++) {
            if (inside && i == first) i = stop;
            if (i >= m) break;
            const int64_t s = inside ? source_index(i - lo, n, lo, j->hi[last], j->mode) : -1;
            memcpy(y + (size_t)i * j->es, s < 0 ? (const char *)j->fill : x + (size_t)s * j->es, j->es);
        }
    }
}

cbn_status cbn_pad(cbn_dtype dtype, int ndim, const int64_t *shape, const int64_t *lo, const int64_t *hi,
                   cbn_pad_mode mode, double value, const void *x, void *y, cbn_error *err) {
    pad_job j = {.ndim = ndim, .shape = shape, .lo = lo, .hi = hi, .mode = mode, .x = x, .y = y};
    j.es = cbn_dtype_size(dtype);
    CBN_TRY(cbn_pad_shape(ndim, shape, lo, hi, mode, j.out, err));
    cbn_store_f64(j.fill, dtype, value);
    int64_t rows = 1;
    for (int a = 0; a < ndim; a++) rows *= a == ndim - 1 ? 1 : j.out[a];
    if (ndim == 0) {
        memcpy(y, x, j.es);
        return CBN_OK;
    }
    if (rows == 0 || j.out[ndim - 1] == 0) return CBN_OK;
    const int64_t row_bytes = j.out[ndim - 1] * (int64_t)j.es;
    cbn_parallel_for(rows, cbn_ceil_div(GRAIN_BYTES, row_bytes), 0, pad_rows, &j);
    return CBN_OK;
}
