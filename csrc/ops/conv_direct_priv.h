/* SPDX-License-Identifier: BSD-3-Clause */
/* What conv_direct.c (preparing, running) and conv_direct_job.c (the tables and windows of a job)
 * share. Nobody else includes this. */
#ifndef CBN_CONV_DIRECT_PRIV_H
#define CBN_CONV_DIRECT_PRIV_H
#include "ops/conv_plan.h"

enum { CBN_DIRECT_MAX_NP = 16 };

typedef struct region {
    int64_t first_tile; /* number of its first tile */
    int64_t cls[3];     /* axis classes */
    int64_t run;        /* pixels that are cut into tiles together: one row, or all */
    int64_t per_run;    /* tiles of a run */
    int64_t ntaps;
    /* Windows: `segments` pieces of `width` elements for each channel, or none (0). A piece is what
     * one row of taps reads or, when taps are far apart (by_tap), what one tap reads: one part for
     * each row of the image that the tile's pixels lie in. */
    int64_t segments, width;
    int64_t reach; /* how far a part goes beyond its last pixel */
    bool by_tap;
} region;

typedef struct direct_state {
    bool linear;
    cbn_axis_plan axis[3];
    int64_t nregions, tiles;
    region *regions;        /* nregions + 1: the last one ends the tile numbers */
    int64_t job_tiles;      /* most tiles of a job */
    int64_t job_taps;       /* most taps a job's regions have together */
    int64_t window;         /* largest window of a channel; 0: no windows */
    int64_t batches, batch; /* blocks are run in `batches` batches of at most `batch` */
    int64_t icg, ocg;       /* channels of one group */
    int nv;                 /* vectors of a block of output channels */
    int64_t vw, blocks, ic_chunk, taps;
    float *w; /* [group][block][channel][tap][vw], zeros beyond the last channel */
} direct_state;

/* Pixels of a tile in one row of the image: what they read from x_at on goes to `at` in a piece of the window. */
typedef struct part {
    int64_t x_at;
    int32_t at, width;
} part;

typedef struct tile {
    int np, parts;
    bool y_run;
    int64_t ntaps;
    const int64_t *tap_x, *tap_w; /* tap_x: within the window if there is one */
    int64_t xpix[CBN_DIRECT_MAX_NP], ypix[CBN_DIRECT_MAX_NP];
    int64_t acc;   /* where its sums begin, in elements of one block's sums */
    float *window; /* NULL: xpix points into the image; else here */
    const region *r;
    const int64_t *segment_x;
    part part[CBN_DIRECT_MAX_NP];
} tile;

typedef struct direct_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const direct_state *s;
    const cbn_conv_call *call;
    int64_t tiles, jobs, groups, images, batches;
    int64_t x_image, y_image, x_plane, y_plane;
    char *scratch;
    size_t tiles_bytes, taps_bytes, window_bytes, worker_bytes;
} direct_run;

/* What a worker has for its job. */
typedef struct direct_job {
    int64_t id, count;
    tile *tiles;
    int64_t *taps;
    float *windows, *acc;
    int64_t acc_block; /* elements of the sums of one block */
    int64_t from, next_from, next_to; /* it reads [from, next_from) of a plane, the next job to next_to, roughly */
    int64_t filled;    /* what its windows hold: number of the image and group, or -1 */
} direct_job;

CBN_INLINE const cbn_axis_class *cbn_direct_class(const direct_state *s, const region *r,
                                                  int axis) {
    return &s->axis[axis].classes[r->cls[axis]];
}

/* First tile of job j. */
CBN_INLINE int64_t cbn_direct_first(int64_t tiles, int64_t jobs, int64_t j) {
    return tiles / jobs * j + CBN_MIN(j, tiles % jobs);
}

/* The region of tile number t. */
int64_t cbn_direct_region_of(const direct_state *s, int64_t t);
/* Makes the tables of job number `id` unless *job has them. */
void cbn_direct_job_make(const direct_run *u, int64_t id, direct_job *job);
/* Fills the windows of the job's tiles for ic channels; x: the first of them. */
void cbn_direct_windows_copy(const direct_job *job, const float *x, int64_t x_plane, int64_t ic);
#endif
