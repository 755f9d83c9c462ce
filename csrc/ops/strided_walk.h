/* SPDX-License-Identifier: BSD-3-Clause */
/* Walking several strided arrays of one shape together. Used by strided.c and bn_fold.c. */
#ifndef CBN_STRIDED_WALK_H
#define CBN_STRIDED_WALK_H
#include "ops/bn_fold.h"

#include <string.h>

/* Integer arithmetic only: exact (narrowing: one rounding, half to even), no flags, untouched by
 * denormal modes. */
double cbn_half_to_double(uint16_t h);
uint16_t cbn_double_to_half(double v);

/* cbn_load_f64 and cbn_store_f64 for loops where t is a constant. Any alignment. */
CBN_INLINE double cbn_get_f64(const char *p, cbn_dtype t) {
    double d;
    float f;
    uint16_t h;
    if (t == CBN_F64) {
        memcpy(&d, p, sizeof d);
    } else if (t == CBN_F32) {
        memcpy(&f, p, sizeof f);
        d = (double)f;
    } else {
        memcpy(&h, p, sizeof h);
        d = cbn_half_to_double(h);
    }
    return d;
}

CBN_INLINE void cbn_put_f64(char *p, cbn_dtype t, double v) {
    if (t == CBN_F64) {
        memcpy(p, &v, sizeof v);
    } else if (t == CBN_F32) {
        const float f = (float)v;
        memcpy(p, &f, sizeof f);
    } else {
        const uint16_t h = cbn_double_to_half(v);
        memcpy(p, &h, sizeof h);
    }
}

enum { CBN_WALK_ARRAYS = 3, CBN_WALK_DIMS = CBN_MAX_DIMS + 2 };

/* Array 0 is the one that is written; strides in bytes, any sign, 0 repeats. */
typedef struct cbn_walk {
    int narrays, ndim;
    int64_t shape[CBN_WALK_DIMS];
    int64_t stride[CBN_WALK_ARRAYS][CBN_WALK_DIMS];
    char *data[CBN_WALK_ARRAYS];
} cbn_walk;

/* A block of rows x cols elements; array i's element (r, c) is at data[i] + r*row[i] + c*col[i]. */
typedef struct cbn_walk_block {
    char *data[CBN_WALK_ARRAYS];
    int64_t row[CBN_WALK_ARRAYS], col[CBN_WALK_ARRAYS], rows, cols;
} cbn_walk_block;

typedef void (*cbn_walk_fn)(const cbn_walk_block *b, void *arg);

/* Calls fn on blocks that cover every element once, from several threads when there is much. Axes
 * are reordered and merged first: the columns are the axis along which array 0 is densest, the rows
 * that of array 1 where it differs. fn runs with the caller's denormal mode, and floating-point
 * flags it raises are dropped. */
void cbn_walk_run(const cbn_walk *w, cbn_walk_fn fn, void *arg);
#endif
