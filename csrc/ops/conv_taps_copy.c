/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution by taps: the copy of the input that a box reads, and prefetching. */
#include "cpu/cbn_cpu.h"
#include "ops/conv_taps_priv.h"

/* Whether copied row i is read: with a stride not all of them are. */
static bool row_needed(const cbn_conv_desc *d, int64_t i, int64_t rows) {
    for (int64_t b = 0; b < d->k[1]; b++) {
        const int64_t from = i - b * d->dil[1];
        if (from >= 0 && from % d->stride[1] == 0 && from / d->stride[1] < rows) return true;
    }
    return false;
}

typedef enum { ROW_UNUSED, ROW_ZERO, ROW_IMAGE } row_kind;

static row_kind row_of(const cbn_conv_desc *d, const taps_box *box, int64_t i) {
    const int64_t row = box->r0 * d->stride[1] - d->pad_lo[1] + i;
    if ((d->stride[1] > 1 || d->dil[1] > 1) && !row_needed(d, i, box->r1 - box->r0)) return ROW_UNUSED;
    return row < 0 || row >= d->in[1] ? ROW_ZERO : ROW_IMAGE;
}

void cbn_taps_copy(const taps_run *u, taps_box *box, int64_t end) {
    const taps_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const float *x = (const float *)u->call->x + (box->image * d->ic + box->g * s->icg) * u->x_plane;
    cbn_rows_copy_args a = {.to_ic = s->phases * s->phase_floats,
                            .to_row = s->row_floats,
                            .x_ic = u->x_plane,
                            .x_row = d->in[2],
                            .ic = s->icg,
                            .n = s->used_floats,
                            .step = d->stride[2]};
    for (int64_t t = 0; t < d->k[0]; t++) {
        const int64_t z = box->z * d->stride[0] - d->pad_lo[0] + t * d->dil[0];
        if (z < 0 || z >= d->in[0]) continue; /* its taps are skipped */
        for (int64_t i = box->copied, n; i < end; i += n) {
            const row_kind kind = row_of(d, box, i);
            for (n = 1; i + n < end && row_of(d, box, i + n) == kind;) n++;
            if (kind == ROW_UNUSED) continue;
            const int64_t row = box->r0 * d->stride[1] - d->pad_lo[1] + i;
            a.rows = n;
            a.w = kind == ROW_IMAGE ? d->in[2] : 0;
            a.x = kind == ROW_IMAGE ? x + (z * d->in[1] + row) * d->in[2] : x;
            for (int64_t p = 0; p < s->phases; p++) {
                a.to = box->copy + (t * s->plane_rows + i) * s->row_floats + p * s->phase_floats;
                a.x0 = box->col0 * d->stride[2] - d->pad_lo[2] + s->phase[p];
                u->k->rows_copy(&a);
            }
        }
    }
    box->copied = CBN_MAX(box->copied, end);
}

void cbn_taps_prefetch(const taps_run *u, const taps_box *box, int64_t from, int64_t end, int64_t i0, int64_t i1) {
    const taps_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const int64_t top = box->r0 * d->stride[1] - d->pad_lo[1], left = box->col0 * d->stride[2] - d->pad_lo[2];
    const int64_t row0 = CBN_MAX(top + from, 0), row1 = CBN_MIN(top + end, d->in[1]);
    const int64_t col0 = CBN_MAX(left, 0), col1 = CBN_MIN(left + s->used_floats * d->stride[2], d->in[2]);
    const int64_t line = CBN_CACHE_LINE / (int64_t)sizeof(float);
    if (row0 >= row1 || col0 >= col1) return;
    for (int64_t t = 0; t < d->k[0]; t++) {
        const int64_t z = box->z * d->stride[0] - d->pad_lo[0] + t * d->dil[0];
        if (z < 0 || z >= d->in[0]) continue;
        for (int64_t i = i0; i < i1; i++) {
            const float *x = (const float *)u->call->x + (box->image * d->ic + box->g * s->icg + i) * u->x_plane;
            x += z * d->in[1] * d->in[2];
            if (s->cols == 1) {
                for (int64_t at = row0 * d->in[2]; at < row1 * d->in[2]; at += line)
                    __builtin_prefetch(x + at, 0, 2);
                continue;
            }
            for (int64_t row = row0; row < row1; row++)
                for (int64_t at = col0; at < col1; at += line)
                    __builtin_prefetch(x + row * d->in[2] + at, 0, 2);
        }
    }
}

void cbn_taps_prefetch_in_place(const taps_run *u, const float *x, int64_t from, int64_t end, int64_t i0, int64_t i1) {
    const int64_t line = CBN_CACHE_LINE / (int64_t)sizeof(float);
    for (int64_t i = i0; i < i1; i++)
        for (int64_t at = from; at < end; at += line) __builtin_prefetch(x + i * u->x_plane + at, 0, 2);
}
