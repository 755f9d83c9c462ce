/* SPDX-License-Identifier: BSD-3-Clause */
/* Strided arrays: element access, the common walk, copy with conversion. */
#include "kernels/cbn_kernels.h"
#include "ops/strided_walk.h"
#include "threads/cbn_parallel.h"

#include <fenv.h>
#include <string.h>

/* ---- float16 ---- */
double cbn_half_to_double(uint16_t h) {
    const uint64_t sign = (uint64_t)(h & 0x8000u) << 48;
    const int exp = h >> 10 & 31;
    uint64_t man = h & 1023u, bits;
    if (exp == 31) {
        bits = UINT64_C(2047) << 52 | man << 42;
    } else if (exp != 0) {
        bits = (uint64_t)(exp - 15 + 1023) << 52 | man << 42;
    } else if (man == 0) {
        bits = 0;
    } else {
        int e = -14;
        while (!(man & 1024u)) {
            man <<= 1;
            --e;
        }
        bits = (uint64_t)(e + 1023) << 52 | (man & 1023u) << 42;
    }
    bits |= sign;
    double v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* Round half to even straight from the double: through float32 half-way cases would be rounded
 * twice. */
uint16_t cbn_double_to_half(double v) {
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    const uint16_t sign = (uint16_t)(bits >> 48 & 0x8000u);
    const int exp = (int)(bits >> 52 & 2047u);
    const uint64_t man = bits & ((UINT64_C(1) << 52) - 1);
    if (exp == 2047) return (uint16_t)(sign | 0x7c00u | (man ? 0x200u | man >> 42 : 0u));
    const int e = exp - 1023;
    if (e > 15) return (uint16_t)(sign | 0x7c00u);
    if (e < -25) return sign;
    const bool normal = e >= -14;
    const uint64_t full = normal ? (uint64_t)(e + 15) << 52 | man : UINT64_C(1) << 52 | man;
    const int shift = normal ? 42 : 42 + (-14 - e);
    uint64_t h = full >> shift;
    const uint64_t rest = full & ((UINT64_C(1) << shift) - 1), half = UINT64_C(1) << (shift - 1);
    /* A carry runs into the exponent as it should, up to infinity. */
    if (rest > half || (rest == half && (h & 1u))) ++h;
    return (uint16_t)(sign | h);
}

double cbn_load_f64(const void *p, cbn_dtype t) { return cbn_get_f64(p, t); }
void cbn_store_f64(void *p, cbn_dtype t, double v) { cbn_put_f64(p, t, v); }

/* ---- the walk ---- */
static int64_t distance(int64_t stride) { return stride < 0 ? -stride : stride; }

static void drop_unit_axes(cbn_walk *w) {
    int n = 0;
    for (int a = 0; a < w->ndim; ++a) {
        if (w->shape[a] == 1) continue;
        w->shape[n] = w->shape[a];
        for (int i = 0; i < w->narrays; ++i) w->stride[i][n] = w->stride[i][a];
        ++n;
    }
    w->ndim = n;
}

static void move_axis(cbn_walk *w, int from, int to) {
    const int step = from < to ? 1 : -1;
    for (int a = from; a != to; a += step) {
        const int64_t size = w->shape[a];
        w->shape[a] = w->shape[a + step];
        w->shape[a + step] = size;
        for (int i = 0; i < w->narrays; ++i) {
            const int64_t stride = w->stride[i][a];
            w->stride[i][a] = w->stride[i][a + step];
            w->stride[i][a + step] = stride;
        }
    }
}

/* Largest steps of array 0 first; equal ones by array 1. */
static void sort_axes(cbn_walk *w) {
    for (int a = 1; a < w->ndim; ++a) {
        int to = a;
        while (to > 0) {
            const int64_t here = distance(w->stride[0][a]), there = distance(w->stride[0][to - 1]);
            if (there > here ||
                (there == here && distance(w->stride[1][to - 1]) >= distance(w->stride[1][a])))
                break;
            --to;
        }
        move_axis(w, a, to);
    }
}

static void merge_axes(cbn_walk *w) {
    int n = 0;
    for (int a = 1; a < w->ndim; ++a) {
        bool together = true;
        for (int i = 0; i < w->narrays; ++i)
            together &= w->stride[i][n] == w->stride[i][a] * w->shape[a];
        if (!together) ++n;
        w->shape[n] = together ? w->shape[n] * w->shape[a] : w->shape[a];
        for (int i = 0; i < w->narrays; ++i) w->stride[i][n] = w->stride[i][a];
    }
    w->ndim = w->ndim ? n + 1 : 0;
}

static void plan_axes(cbn_walk *w) {
    drop_unit_axes(w);
    sort_axes(w);
    merge_axes(w);
    while (w->ndim < 2) {
        w->shape[w->ndim] = 1;
        for (int i = 0; i < w->narrays; ++i) w->stride[i][w->ndim] = 0;
        move_axis(w, w->ndim, 0);
        ++w->ndim;
    }
    int densest = w->ndim - 1;
    for (int a = w->ndim - 2; a >= 0; --a)
        if (w->shape[a] > 1 && w->stride[1][a] != 0 &&
            distance(w->stride[1][a]) < distance(w->stride[1][densest]))
            densest = a;
    if (densest < w->ndim - 1) move_axis(w, densest, w->ndim - 2);
}

typedef struct walk_job {
    const cbn_walk *w;
    cbn_walk_fn fn;
    void *arg;
    fenv_t env;
} walk_job;

/* Items are the rows, counted through all outer axes. */
static void walk_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    walk_job *job = arg;
    const cbn_walk *w = job->w;
    const int rows_axis = w->ndim - 2;
    fenv_t mine;
    fegetenv(&mine);
    fesetenv(&job->env);
    for (int64_t at = begin; at < end;) {
        const int64_t first = at % w->shape[rows_axis];
        cbn_walk_block b = {.rows = CBN_MIN(w->shape[rows_axis] - first, end - at),
                            .cols = w->shape[rows_axis + 1]};
        for (int i = 0; i < w->narrays; ++i) {
            b.row[i] = w->stride[i][rows_axis];
            b.col[i] = w->stride[i][rows_axis + 1];
            b.data[i] = w->data[i] + first * b.row[i];
        }
        int64_t rest = at / w->shape[rows_axis];
        for (int a = rows_axis - 1; a >= 0; --a) {
            for (int i = 0; i < w->narrays; ++i) b.data[i] += rest % w->shape[a] * w->stride[i][a];
            rest /= w->shape[a];
        }
        job->fn(&b, job->arg);
        at += b.rows;
    }
    fesetenv(&mine);
}

void cbn_walk_run(const cbn_walk *w, cbn_walk_fn fn, void *arg) {
    for (int a = 0; a < w->ndim; ++a)
        if (w->shape[a] == 0) return;
    cbn_walk plan = *w;
    plan_axes(&plan);
    int64_t rows = 1;
    for (int a = 0; a < plan.ndim - 1; ++a) rows *= plan.shape[a];
    walk_job job = {.w = &plan, .fn = fn, .arg = arg};
    fenv_t before;
    feholdexcept(&before);
    fegetenv(&job.env);
    /* 20 us are about 32 k elements; whole tiles of the transposing copy stay together. */
    const int64_t grain = CBN_MAX(16, 32768 / plan.shape[plan.ndim - 1]);
    cbn_parallel_for(rows, grain, 0, walk_range, &job);
    fesetenv(&before);
}

/* ---- copy ---- */
/* One row; the cases differ in nothing but constants, which the compiler turns into vector moves.
 */
#define COPY_ROW(type)                                                                            \
    CBN_INLINE void copy_steps_##type(char *to, int64_t ts, const char *from, int64_t fs,         \
                                      int64_t n) {                                                \
        for (int64_t i = 0; i < n; ++i) {                                                         \
            type v;                                                                               \
            memcpy(&v, from + i * fs, sizeof v);                                                  \
            memcpy(to + i * ts, &v, sizeof v);                                                    \
        }                                                                                         \
    }                                                                                             \
    static void copy_row_##type(char *CBN_RESTRICT to, int64_t ts, const char *CBN_RESTRICT from, \
                                int64_t fs, int64_t n) {                                          \
        const int64_t size = (int64_t)sizeof(type);                                               \
        if (ts != size)                                                                           \
            copy_steps_##type(to, ts, from, fs, n);                                               \
        else if (fs == -size)                                                                     \
            copy_steps_##type(to, size, from, -size, n);                                          \
        else if (fs == 2 * size)                                                                  \
            copy_steps_##type(to, size, from, 2 * size, n);                                       \
        else                                                                                      \
            copy_steps_##type(to, size, from, fs, n);                                             \
    }
COPY_ROW(uint16_t)
COPY_ROW(uint32_t)
COPY_ROW(uint64_t)

typedef void (*copy_row_fn)(char *CBN_RESTRICT to, int64_t ts, const char *CBN_RESTRICT from,
                            int64_t fs, int64_t n);

/* Arrays that are dense along different axes: tiles of about TILE elements whose touched cache
 * lines are used whole. */
enum { TILE_ROWS = 16, TILE = 256 };

static void copy_tiled(const cbn_walk_block *b, copy_row_fn copy_row) {
    const int64_t tile_cols = TILE / CBN_MIN(b->rows, TILE_ROWS);
    for (int64_t r0 = 0; r0 < b->rows; r0 += TILE_ROWS) {
        const int64_t r1 = CBN_MIN(b->rows, r0 + TILE_ROWS);
        for (int64_t c = 0; c < b->cols; c += tile_cols) {
            const int64_t n = CBN_MIN(b->cols - c, tile_cols);
            for (int64_t r = r0; r < r1; ++r)
                copy_row(b->data[0] + r * b->row[0] + c * b->col[0], b->col[0],
                         b->data[1] + r * b->row[1] + c * b->col[1], b->col[1], n);
        }
    }
}

static void copy_same(const cbn_walk_block *b, void *arg) {
    const int64_t elem = *(const int64_t *)arg;
    if (b->col[0] == elem && b->col[1] == elem) {
        for (int64_t r = 0; r < b->rows; ++r)
            memcpy(b->data[0] + r * b->row[0], b->data[1] + r * b->row[1],
                   (size_t)(b->cols * elem));
        return;
    }
    const copy_row_fn copy_row = elem == 2   ? copy_row_uint16_t
                                 : elem == 4 ? copy_row_uint32_t
                                             : copy_row_uint64_t;
    if (distance(b->row[1]) < distance(b->col[1])) {
        copy_tiled(b, copy_row);
        return;
    }
    for (int64_t r = 0; r < b->rows; ++r)
        copy_row(b->data[0] + r * b->row[0], b->col[0], b->data[1] + r * b->row[1], b->col[1],
                 b->cols);
}

/* One constant pair of types per call, so that the loops hold no branch on them. */
CBN_INLINE void convert_steps(const cbn_walk_block *b, cbn_dtype to, int64_t ts, cbn_dtype from,
                              int64_t fs) {
    for (int64_t r = 0; r < b->rows; ++r) {
        char *CBN_RESTRICT y = b->data[0] + r * b->row[0];
        const char *CBN_RESTRICT x = b->data[1] + r * b->row[1];
        for (int64_t c = 0; c < b->cols; ++c)
            cbn_put_f64(y + c * ts, to, cbn_get_f64(x + c * fs, from));
    }
}

CBN_INLINE void convert_block(const cbn_walk_block *b, cbn_dtype to, cbn_dtype from) {
    const int64_t ts = (int64_t)cbn_dtype_size(to), fs = (int64_t)cbn_dtype_size(from);
    if (b->col[0] == ts && b->col[1] == fs)
        convert_steps(b, to, ts, from, fs);
    else
        convert_steps(b, to, b->col[0], from, b->col[1]);
}

typedef struct convert_types {
    cbn_dtype to, from;
} convert_types;

/* float16 <-> float32 of whole aligned rows has vector kernels, which round the same way. */
static bool convert_half_rows(const cbn_walk_block *b, const convert_types *t) {
    const bool widens = t->to == CBN_F32 && t->from == CBN_F16,
               narrows = t->to == CBN_F16 && t->from == CBN_F32;
    if ((!widens && !narrows) || b->col[0] != (widens ? 4 : 2) || b->col[1] != (widens ? 2 : 4))
        return false;
    const uintptr_t at =
        (uintptr_t)b->data[0] | (uintptr_t)b->data[1] | (uintptr_t)b->row[0] | (uintptr_t)b->row[1];
    if (at % 4 != 0) return false;
    const cbn_kernels *k = cbn_kernels_active();
    for (int64_t r = 0; r < b->rows; ++r) {
        void *to = b->data[0] + r * b->row[0];
        const void *from = b->data[1] + r * b->row[1];
        if (widens)
            k->widen_f16(to, from, b->cols);
        else
            k->narrow_f16(to, from, b->cols);
    }
    return true;
}

static void copy_convert(const cbn_walk_block *b, void *arg) {
    const convert_types *t = arg;
    if (convert_half_rows(b, t)) return;
    if (t->to == CBN_F64 && t->from == CBN_F32)
        convert_block(b, CBN_F64, CBN_F32);
    else if (t->to == CBN_F32 && t->from == CBN_F64)
        convert_block(b, CBN_F32, CBN_F64);
    else
        convert_block(b, t->to, t->from);
}

void cbn_strided_copy(const cbn_strided *src, cbn_strided *dst) {
    cbn_walk w = {.narrays = 2, .ndim = dst->ndim, .data = {dst->data, src->data}};
    assert(src->ndim == dst->ndim);
    for (int a = 0; a < dst->ndim; ++a) {
        assert(src->shape[a] == dst->shape[a]);
        w.shape[a] = dst->shape[a];
        w.stride[0][a] = dst->stride_bytes[a];
        w.stride[1][a] = src->stride_bytes[a];
    }
    if (src->dtype == dst->dtype) {
        int64_t elem = (int64_t)cbn_dtype_size(dst->dtype);
        cbn_walk_run(&w, copy_same, &elem);
    } else {
        convert_types types = {dst->dtype, src->dtype};
        cbn_walk_run(&w, copy_convert, &types);
    }
}
