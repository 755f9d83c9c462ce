/* SPDX-License-Identifier: BSD-3-Clause */
/* What conv_taps.c (preparing, running) and conv_taps_copy.c (the input a box reads) share. Nobody else includes
 * this. */
#ifndef CBN_CONV_TAPS_PRIV_H
#define CBN_CONV_TAPS_PRIV_H
#include "ops/conv_plan.h"

typedef struct taps_state {
    int64_t icg, ocg, blocks, ntaps;
    int64_t vectors; /* of an output row; the last one is moved left to end with the row */
    int64_t cols, rows;             /* boxes of a plane */
    int64_t box_vectors, box_rows;  /* of the largest box */
    int64_t step;                   /* vectors */
    int64_t phases, phase_floats, used_floats; /* of a copied row of a channel */
    int64_t row_floats;             /* of a copied row of all channels */
    int64_t plane_rows;             /* copied rows of one depth tap */
    size_t copy_bytes;
    int32_t *tap;   /* [ntaps] */
    int64_t *phase; /* [phases] column offsets */
    float *w;       /* [group][block][channel][tap][channels of the block] */
    bool finite;    /* all weights are: else they must not meet the zeros of the padding */
    bool in_place;  /* no copy: rows without padding are read where they are */
} taps_state;

typedef struct taps_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const taps_state *s;
    const cbn_conv_call *call;
    int64_t x_plane, y_plane;
    int64_t boxes;
    int64_t parts; /* each a run of blocks of output channels */
    char *scratch;
} taps_run;

/* One box: rows [r0, r1) and vectors [v0, v1) of plane z of the output. */
typedef struct taps_box {
    int64_t id, image, g, z, r0, r1, v0, v1;
    int64_t col0;   /* first output column */
    int64_t copied; /* rows of each depth tap */
    float *copy;
} taps_box;

/* Input rows that n output rows reach over. */
CBN_INLINE int64_t cbn_taps_reach(const cbn_conv_desc *d, int64_t n) {
    return (n - 1) * d->stride[1] + (d->k[1] - 1) * d->dil[1] + 1;
}

/* Makes sure that rows of a box's copy up to number `end` are there. */
void cbn_taps_copy(const taps_run *u, taps_box *box, int64_t end);
/* Asks for rows [from, end) of a copy to come, channels [i0, i1): the hardware does not foresee a walk over
 * channels. */
void cbn_taps_prefetch(const taps_run *u, const taps_box *box, int64_t from, int64_t end, int64_t i0, int64_t i1);
/* The same for elements [from, end) of each of the channels that are read in place. */
void cbn_taps_prefetch_in_place(const taps_run *u, const float *x, int64_t from, int64_t end, int64_t i0, int64_t i1);
#endif
