/* SPDX-License-Identifier: BSD-3-Clause */
/* What conv_transposed.c (preparing, items) and conv_transposed_item.c (the work of an item) share.
 * Nobody else includes this. */
#ifndef CBN_CONV_TRANSPOSED_PRIV_H
#define CBN_CONV_TRANSPOSED_PRIV_H
#include "ops/conv_plan.h"

/* Of one remainder on one axis. */
typedef struct phase {
    int64_t ntaps, t0;
    int64_t first;  /* input of the tap t0, counted from q */
    int64_t before; /* taps of smaller remainders */
} phase;

typedef struct transposed_state {
    /* For weights that are not all finite, whose product with a zero of the padding would be NaN: what
     * conv_direct made of them, and everything below is unused. */
    void *direct;
    phase *phases[CBN_MAX_SPATIAL]; /* `stride` of each axis, in one allocation */
    int64_t grid[CBN_MAX_SPATIAL];  /* pixels q */
    bool shared;                    /* one panel serves all phases */
    bool plain;                     /* and is made of neighbours in the image */
    int64_t icg, ocg, blocks, batches;
    int64_t pixels, vectors, panels, supers;
    int64_t super;                 /* most pixels of a super-panel, in whole vectors */
    int64_t max_taps;              /* of a phase */
    int64_t row_phases, row_items; /* (depth, height) phases that have outputs; those that are items */
    int64_t group_blocks;          /* most blocks that are woven together */
    float *zeros; /* for a block's channels, all of them */
    float *w;     /* [group][phase][block][channel][tap][px_mr], zeros beyond the last channel */
} transposed_state;

typedef struct transposed_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const transposed_state *s;
    const cbn_conv_call *call;
    int64_t x_plane, y_plane;
    char *scratch;
    size_t panel_bytes, sums_bytes, moves_bytes, worker_bytes;
} transposed_run;

/* What an item is about; r: its phase, r[2] changing. */
typedef struct item {
    int64_t image, g, p0, p1; /* panels */
    int64_t r[CBN_MAX_SPATIAL];
    float *packed, *sums;
    cbn_panel_move *moves;
    int64_t pixel0, width; /* first pixel; room of the item's pixels in sums */
    /* What the next super-panel reads of the first channel, as far as it has not been asked for yet. */
    const float *next, *next_end;
    bool copy; /* the panels are still to be made, from neighbours in the image */
} item;

CBN_INLINE int64_t cbn_phase_taps(const transposed_state *s, const int64_t r[CBN_MAX_SPATIAL]) {
    return s->phases[0][r[0]].ntaps * s->phases[1][r[1]].ntaps * s->phases[2][r[2]].ntaps;
}

/* First pixel of a panel; that of panel number `panels` is at or past the end. */
CBN_INLINE int64_t cbn_panel_pixel(const transposed_run *u, int64_t panel) {
    return u->s->vectors * panel / u->s->panels * u->k->lanes;
}

/* Weights of blocks from `block` on of one phase, [block][channel][tap][px_mr]. */
float *cbn_phase_weights(const transposed_state *s, const cbn_conv_desc *d, int mr, int64_t g,
                         const int64_t r[CBN_MAX_SPATIAL], int64_t block);
/* Makes the panels of the item's phase. */
void cbn_item_pack(const transposed_run *u, const item *it);
/* What is to be asked for early. */
void cbn_item_ahead(const transposed_run *u, item *it);
/* Blocks [b0, b1) of the rows of one (depth, height) phase. */
void cbn_item_rows(const transposed_run *u, item *it, int64_t b0, int64_t b1);
#endif
