/* SPDX-License-Identifier: BSD-3-Clause */
/* float32 products on a bfloat16 matrix unit (Intel AMX), by splitting.
 *
 * A float32 is the sum of three bfloat16 numbers (8 + 8 + 8 bits of significand): x = x0 + x1 + x2. Of the nine products of
 * two such sums the six largest are taken, small ones first, and added up in float32; the three that are left out are below
 * 2^-24 of the whole. The error is smaller than that of a chain of float32 FMAs. An infinite x has x1 = x2 = 0; a finite one
 * that would round to infinity is cut instead. The unit flushes denormals.
 *
 * Everything but the six tile operations is shared by the hardware and its emulation in plain C (amx_tmpl.h). */
#ifndef CBN_AMX_H
#define CBN_AMX_H
#include "base/cbn_base.h"

enum {
    CBN_AMX_TERMS = 3,
    CBN_AMX_SIDE = 16,              /* rows of a tile */
    CBN_AMX_DEPTH = 32,             /* channels of a step: pairs fill the 64 bytes of a row */
    CBN_AMX_BLOCK = 2 * CBN_AMX_SIDE, /* output channels, and pixels, of one call */
    CBN_AMX_STEP_WEIGHTS = CBN_AMX_TERMS * CBN_AMX_BLOCK * CBN_AMX_DEPTH /* bfloat16 numbers */
};

/* sums[c][p] = sum over steps s, channels k < 32 of W[s][c][k] * X[s][k][p], for c, p < 32. */
typedef struct cbn_amx_args {
    int64_t steps;
    const uint16_t *w;     /* step s at w + w_at[s]: [term][2 tiles][16 output channels][32 channels] */
    const int64_t *w_at;   /* [steps] */
    const uint32_t *x;     /* words of two neighbouring channels (the even one in the low half) */
    const int64_t *x_at;   /* [steps] the word of pixel 0 of the first pair, term 0; 32 words from there on are read */
    int64_t x_term, x_pair; /* words from one term, one pair of channels to the next */
    float *sums;           /* [32][32], 64-byte aligned */
} cbn_amx_args;

typedef struct cbn_amx {
    const char *name;
    /* A thread calls `tile` between begin and end. */
    void (*begin)(void);
    void (*end)(void);
    void (*tile)(const cbn_amx_args *a);
    /* Words p[t*term + i], t < 3, of the channels even[i*step] and odd[i*step], i < n; odd may be NULL (zeros). */
    void (*split)(uint32_t *p, int64_t term, const float *even, const float *odd, int64_t step, int64_t n);
    /* [t*term] for one number: bfloat16 terms of a weight. */
    void (*split_one)(uint16_t *p, int64_t term, float value);
} cbn_amx;

/* The hardware is used with PYCONVBN_ENABLE_CPU=amx only: it has never been measured by its authors. */
extern const cbn_amx cbn_amx_hardware;
extern const cbn_amx cbn_amx_emulated;
#endif
