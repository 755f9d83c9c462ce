/* SPDX-License-Identifier: BSD-3-Clause */
/* Rows are read a cache line at a time and turned in squares of four by four: taken element by element, rows that are a
 * power of two apart push each other out of the cache (three to five times slower, measured). */
#include "ops/conv_pack.h"

#include "threads/cbn_parallel.h"

#include <string.h>

enum {
    LINE = CBN_CACHE_LINE / sizeof(float),
    GRAIN = 1 << 16 /* elements, about 10 us */
};

typedef float four __attribute__((vector_size(16)));

CBN_INLINE four load(const float *p) {
    four v;
    memcpy(&v, p, sizeof v);
    return v;
}

CBN_INLINE void store(float *p, four v) { memcpy(p, &v, sizeof v); }

/* Four elements of each of four rows. */
CBN_INLINE void pack_4x4(float *CBN_RESTRICT out, int64_t lanes, const float *CBN_RESTRICT rows, int64_t row_step) {
    const four a = load(rows), b = load(rows + row_step), c = load(rows + 2 * row_step), d = load(rows + 3 * row_step);
    const four ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const four cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(out, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
    store(out + lanes, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
    store(out + 2 * lanes, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
    store(out + 3 * lanes, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
}

/* The same of two rows. */
CBN_INLINE void pack_2x4(float *CBN_RESTRICT out, int64_t lanes, const float *CBN_RESTRICT rows, int64_t row_step) {
    const four a = load(rows), b = load(rows + row_step);
    float pairs[8];
    store(pairs, __builtin_shufflevector(a, b, 0, 4, 1, 5));
    store(pairs + 4, __builtin_shufflevector(a, b, 2, 6, 3, 7));
    for (int i = 0; i < 4; i++) memcpy(out + i * lanes, pairs + 2 * i, 2 * sizeof *out);
}

/* n rows, 4 or 2 of them. */
CBN_INLINE void pack_few(int n, float *CBN_RESTRICT out, int64_t lanes, const float *CBN_RESTRICT rows, int64_t row_step,
                         int64_t count) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        if (n == 4) pack_4x4(out + k * lanes, lanes, rows + k, row_step);
        else pack_2x4(out + k * lanes, lanes, rows + k, row_step);
    }
    for (; k < count; k++)
        for (int i = 0; i < n; i++) out[k * lanes + i] = rows[i * row_step + k];
}

CBN_INLINE void pack_some(float *CBN_RESTRICT out, int64_t lanes, const float *CBN_RESTRICT rows, int64_t row_step,
                          int64_t valid, int64_t count) {
    int64_t lane = 0;
    for (; lane + 4 <= valid; lane += 4) pack_few(4, out + lane, lanes, rows + lane * row_step, row_step, count);
    for (; lane + 2 <= valid; lane += 2) pack_few(2, out + lane, lanes, rows + lane * row_step, row_step, count);
    for (; lane < valid; lane++)
        for (int64_t k = 0; k < count; k++) out[k * lanes + lane] = rows[lane * row_step + k];
}

void cbn_pack_rows(float *CBN_RESTRICT out, int64_t lanes, const float *CBN_RESTRICT rows, int64_t row_step,
                   int64_t valid, int64_t count) {
    int64_t k = 0;
    if (valid < lanes)
        for (int64_t i = 0; i < count; i++) memset(out + i * lanes + valid, 0, (size_t)(lanes - valid) * sizeof *out);
    for (; k + LINE <= count; k += LINE) {
        /* The rows' next lines are fetched while these are moved. */
        for (int64_t lane = 0; lane < valid; lane++) __builtin_prefetch(rows + lane * row_step + k + LINE);
        pack_some(out + k * lanes, lanes, rows + k, row_step, valid, LINE);
    }
    pack_some(out + k * lanes, lanes, rows + k, row_step, valid, count - k);
}

typedef struct pack_job {
    float *out;
    const float *w;
    int64_t lanes, blocks, channels, count;
} pack_job;

/* Items are blocks of all groups. */
static void pack_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const pack_job *j = arg;
    for (int64_t i = begin; i < end; i++) {
        const int64_t group = i / j->blocks, first = i % j->blocks * j->lanes;
        cbn_pack_rows(j->out + i * j->lanes * j->count, j->lanes, j->w + (group * j->channels + first) * j->count, j->count,
                      CBN_MIN(j->lanes, j->channels - first), j->count);
    }
}

void cbn_pack_blocks(float *out, int64_t lanes, const float *w, int64_t groups, int64_t channels, int64_t count) {
    pack_job job = {out, w, lanes, (channels + lanes - 1) / lanes, channels, count};
    if (count > 0) cbn_parallel_for(groups * job.blocks, 1 + GRAIN / (lanes * count), 0, pack_range, &job);
}
