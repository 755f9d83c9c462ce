/* SPDX-License-Identifier: BSD-3-Clause */
/* Direct convolution of any geometry, output channels in vector lanes (kernel conv_oc).
 *
 * The output is cut into regions: one for each combination of the axis classes of depth, height and width. All pixels
 * of a region meet the same taps, so padded taps are never computed and no padded copy of the input is needed; a
 * transposed convolution is its phases, which are classes too. Regions are cut into tiles of at most oc_np pixels, tiles
 * are numbered through all regions, and a job is a run of tile numbers. The kernel wants the address of every pixel and
 * the taps of every tile; a worker makes these tables for its job and uses them for a batch of blocks of output channels.
 *
 * Input channels are taken a chunk at a time, so that the weights of a block stay in L1 while all tiles of the job use
 * them. When several blocks share a job, the part of the input a tile reads, its window, is first copied to one place:
 * in the image every row of every channel is another cache line and every channel another page, which costs more
 * (8 % on 3x3, 25 % on 1x1 layers, measured) than the copy.
 *
 * The sum of an output element is always taken over channels, then taps, each one fused multiply-add, so results do
 * not depend on tiles, jobs, threads or the batch. */
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    MAX_NP = 16,
    /* Pixels of a job: enough to reuse a chunk of weights often, few enough for its sums to stay in the L1 cache. */
    JOB_TILES = 32,
    /* A chunk of weights of one output channel block stays in L1 while the tiles of a job pass. */
    CHUNK_BYTES = 16 * 1024,
    BATCH_BLOCKS = 8,  /* blocks of output channels that share tables, windows and a place for their sums */
    WINDOW_STEP = 4,   /* pixels further apart than this share no cache lines worth copying */
    /* Fewer multiply-adds than this (about 10 us) are not worth a thread. */
    THREAD_WORK = 500 * 1000
};

typedef struct region {
    int64_t first_tile; /* number of its first tile */
    int64_t cls[3];     /* axis classes */
    int64_t run;        /* pixels that are cut into tiles together: one row, or all */
    int64_t per_run;    /* tiles of a run */
    int64_t ntaps;
    /* Windows: `segments` pieces of `width` elements for each channel, or none (0). A piece is what one row of taps
     * reads or, when taps are far apart (by_tap), what one tap reads. */
    int64_t segments, width;
    int64_t reach; /* how far a segment goes beyond its last pixel */
    bool by_tap;
} region;

typedef struct direct_state {
    bool linear;
    cbn_axis_plan axis[3];
    int64_t nregions, tiles;
    region *regions; /* nregions + 1: the last one ends the tile numbers */
    int64_t job_taps; /* most taps a job's regions have together */
    int64_t window;   /* largest window of a channel; 0: no windows */
    int64_t batches, batch; /* blocks are run in `batches` batches of at most `batch` */
    int64_t icg, ocg; /* channels of one group */
    int nv;           /* vectors of a block of output channels */
    int64_t vw, blocks, ic_chunk, taps;
    size_t w_bytes;
    float *w; /* [group][block][channel][tap][vw], zeros beyond the last channel */
} direct_state;

typedef struct tile {
    int np;
    bool y_run;
    int64_t ntaps;
    const int64_t *tap_x, *tap_w; /* tap_x: within the window if there is one */
    int64_t xpix[MAX_NP], ypix[MAX_NP];
    int64_t acc;  /* where its sums begin, in elements of one block's sums */
    float *window; /* NULL: xpix points into the image; else from x_at there, and xpix into the window */
    int64_t x_at;
    const region *r;
    const int64_t *segment_x;
} tile;

/* ---- preparing ------------------------------------------------------------------------------------------------------ */
static bool direct_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    (void)ctx;
    if (d->dtype != CBN_F32) {
        *why_not = "dtype is not float32";
        return false;
    }
    return true;
}

static const cbn_axis_class *region_class(const direct_state *s, const region *r, int axis) {
    return &s->axis[axis].classes[r->cls[axis]];
}

/* A row whose tiles would be half empty is cut together with the other rows; so are full rows, since their pixels
 * follow each other in y anyway. Elsewhere tiles end with the row, because only neighbours in y are stored fast. */
static void region_cut(const direct_state *s, const cbn_conv_desc *d, int np, region *r) {
    const cbn_axis_class *w = region_class(s, r, 2);
    const int64_t rows = region_class(s, r, 0)->count * region_class(s, r, 1)->count;
    const int64_t thin = w->count / cbn_ceil_div(w->count, np);
    const bool by_row = w->out_step == 1 && w->count != d->out[2] && 2 * thin > np;
    r->run = by_row ? w->count : w->count * rows;
    r->per_run = cbn_ceil_div(r->run, np);
    const int64_t tap_rows = region_class(s, r, 0)->ntaps * region_class(s, r, 1)->ntaps;
    r->ntaps = w->ntaps * tap_rows;
    r->segments = r->width = r->reach = 0;
    r->by_tap = false;
    if (r->ntaps == 0 || w->in_step > WINDOW_STEP) return;
    const int64_t pixels = (cbn_ceil_div(r->run, r->per_run) - 1) * w->in_step + 1;
    for (int64_t t = 0; t < w->ntaps; t++) r->reach = CBN_MAX(r->reach, w->tap_in[t]);
    r->by_tap = pixels * w->ntaps < pixels + r->reach;
    r->segments = r->by_tap ? r->ntaps : tap_rows;
    if (r->by_tap) r->reach = 0;
    r->width = pixels + r->reach;
}

static cbn_status regions_make(direct_state *s, const cbn_conv_desc *d, int np, cbn_error *err) {
    int64_t n = 1;
    for (int a = 0; a < 3; a++) {
        CBN_TRY(cbn_axis_plan_make(d, a, &s->axis[a], err));
        if (!cbn_mul_ok(n, s->axis[a].nclasses, &n)) n = INT64_MAX;
    }
    s->regions = n < INT32_MAX ? cbn_alloc_array((size_t)n + 1, sizeof *s->regions) : NULL;
    if (!s->regions) return cbn_fail_memory(err, "the regions of a convolution", (size_t)n * sizeof *s->regions);
    s->nregions = n;
    int64_t tiles = 0;
    for (int64_t i = 0; i < n; i++) {
        region *r = &s->regions[i];
        r->first_tile = tiles;
        r->cls[2] = i % s->axis[2].nclasses;
        r->cls[1] = i / s->axis[2].nclasses % s->axis[1].nclasses;
        r->cls[0] = i / s->axis[2].nclasses / s->axis[1].nclasses;
        region_cut(s, d, np, r);
        const int64_t pixels = region_class(s, r, 0)->count * region_class(s, r, 1)->count *
                               region_class(s, r, 2)->count;
        tiles += pixels / r->run * r->per_run;
        s->window = CBN_MAX(s->window, r->segments * r->width);
    }
    s->regions[n] = (region){.first_tile = tiles};
    s->tiles = tiles;
    return CBN_OK;
}

static int64_t job_first(int64_t tiles, int64_t jobs, int64_t j) { return tiles / jobs * j + CBN_MIN(j, tiles % jobs); }

static int64_t job_count(int64_t tiles) { return cbn_ceil_div(tiles, JOB_TILES); }

static int64_t region_of(const direct_state *s, int64_t t) {
    int64_t lo = 0, hi = s->nregions;
    while (hi - lo > 1) {
        const int64_t mid = lo + (hi - lo) / 2;
        if (s->regions[mid].first_tile <= t)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* The largest sum of taps of the regions a job touches. */
static int64_t job_taps_max(const direct_state *s) {
    int64_t most = 0;
    for (int64_t j = 0, jobs = job_count(s->tiles); j < jobs; j++) {
        const int64_t end = job_first(s->tiles, jobs, j + 1);
        int64_t sum = 0;
        for (int64_t r = region_of(s, job_first(s->tiles, jobs, j)); s->regions[r].first_tile < end; r++)
            sum += s->regions[r].ntaps;
        most = CBN_MAX(most, sum);
    }
    return most;
}

/* w is [oc][ic/g][taps], transposed [ic][oc/g][taps]. */
static void weights_pack(const direct_state *s, const cbn_conv_desc *d, const float *w) {
    const int64_t oc_step = d->transposed ? s->taps : s->icg * s->taps;
    const int64_t ic_step = d->transposed ? s->ocg * s->taps : s->taps;
    float *p = s->w;
    for (int64_t g = 0; g < d->g; g++) {
        const float *wg = w + g * (s->ocg * s->icg * s->taps);
        for (int64_t b = 0; b < s->blocks; b++) {
            const int64_t valid = CBN_MIN(s->ocg - b * s->vw, s->vw);
            for (int64_t i = 0; i < s->icg; i++) {
                for (int64_t t = 0; t < s->taps; t++, p += s->vw) {
                    const float *from = wg + b * s->vw * oc_step + i * ic_step + t;
                    for (int64_t c = 0; c < valid; c++) p[c] = from[c * oc_step];
                    memset(p + valid, 0, (size_t)(s->vw - valid) * sizeof(float));
                }
            }
        }
    }
}

static void direct_destroy(void *state) {
    direct_state *s = state;
    if (!s) return;
    for (int a = 0; a < 3; a++) cbn_axis_plan_free(&s->axis[a]);
    cbn_free(s->regions);
    cbn_free(s->w);
    cbn_free(s);
}

/* Blocks it takes to earn back the copy of the windows (measured): more without a stride, where neighbouring tiles share
 * cache lines anyway. */
static int64_t window_blocks(const direct_state *s, const cbn_conv_desc *d) {
    return d->stride[2] == 1 && s->taps > 1 ? 8 : 3;
}

static cbn_status direct_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                                 cbn_error *err) {
    const cbn_kernels *k = ctx->kernels;
    assert(k->oc_np <= MAX_NP);
    direct_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a direct convolution", sizeof *s);
    cbn_status status = CBN_OK;
    s->linear = d->nd == 0;
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->taps = d->k[0] * d->k[1] * d->k[2];
    /* Blocks of equal width rather than one that is nearly empty. */
    const int64_t vectors = cbn_ceil_div(s->ocg, k->lanes), nblocks = cbn_ceil_div(vectors, k->oc_nv);
    s->nv = (int)cbn_ceil_div(vectors, nblocks);
    s->vw = (int64_t)s->nv * k->lanes;
    s->blocks = cbn_ceil_div(s->ocg, s->vw);
    const int64_t chunk = CBN_MAX(CHUNK_BYTES / (s->taps * s->vw * (int64_t)sizeof(float)), 1);
    s->ic_chunk = cbn_ceil_div(s->icg, cbn_ceil_div(s->icg, chunk));

    if (s->linear) {
        s->job_taps = 1;
    } else {
        status = regions_make(s, d, k->oc_np, err);
        if (status != CBN_OK) goto done;
        s->job_taps = job_taps_max(s);
        if (s->blocks < window_blocks(s, d)) s->window = 0;
    }
    /* Without windows blocks share nothing but the tables, which stay from item to item. */
    const int64_t most = s->ic_chunk < s->icg ? BATCH_BLOCKS : 4 * BATCH_BLOCKS;
    s->batches = s->window > 0 ? cbn_ceil_div(s->blocks, most) : s->blocks;
    s->batch = cbn_ceil_div(s->blocks, s->batches);
    int64_t n;
    const bool fits = cbn_mul_ok(d->g * s->blocks, s->icg * s->taps, &n) && cbn_mul_ok(n, s->vw, &n) &&
                      cbn_mul_ok(n, sizeof(float), &n);
    s->w_bytes = fits ? (size_t)n : SIZE_MAX;
    s->w = fits ? cbn_alloc(s->w_bytes) : NULL;
    if (!s->w) {
        status = cbn_fail_memory(err, "the packed weights of a convolution", s->w_bytes);
        goto done;
    }
    weights_pack(s, d, w);
    *state = s;
    s = NULL;
done:
    direct_destroy(s);
    return status;
}

/* ---- running -------------------------------------------------------------------------------------------------------- */
typedef struct direct_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const direct_state *s;
    const cbn_conv_call *call;
    int64_t tiles, jobs, groups, images;
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
    int64_t ahead;     /* how much further in the image the next job reads */
} direct_job;

/* Four lists of r->ntaps: offsets in the image, in the weights, in the window; offsets of the window's segments. */
static void taps_list(const direct_state *s, const cbn_conv_desc *d, const region *r, int64_t *lists) {
    const cbn_axis_class *z = region_class(s, r, 0), *y = region_class(s, r, 1), *x = region_class(s, r, 2);
    int64_t *tap_x = lists, *tap_w = lists + r->ntaps, *tap_win = tap_w + r->ntaps, *seg = tap_win + r->ntaps;
    if (r->ntaps == 0) return; /* rows without taps have no place in the lists */
    if (r->ntaps == 0) return; /* rows of taps without columns would still write segments */
    int64_t row = 0;
    if (r->ntaps == 0) return; /* rows of no taps would still be written to seg, for which there is no room then */
    for (int64_t a = 0; a < z->ntaps; a++) {
        for (int64_t b = 0; b < y->ntaps; b++, row++) {
            const int64_t in = (z->tap_in[a] * d->in[1] + y->tap_in[b]) * d->in[2];
            const int64_t at = (z->tap_k[a] * d->k[1] + y->tap_k[b]) * d->k[2];
            if (!r->by_tap) seg[row] = in;
            for (int64_t c = 0; c < x->ntaps; c++) {
                const int64_t t = row * x->ntaps + c;
                tap_x[t] = in + x->tap_in[c];
                tap_w[t] = (at + x->tap_k[c]) * s->vw;
                tap_win[t] = r->by_tap ? t * r->width : row * r->width + x->tap_in[c];
                if (r->by_tap) seg[t] = tap_x[t];
            }
        }
    }
}

/* Pixels of tile number t of region r, whose lists are at `lists`. */
static void tile_fill(const direct_run *u, const region *r, int64_t t, const int64_t *lists, tile *out) {
    const direct_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const cbn_axis_class *z = region_class(s, r, 0), *y = region_class(s, r, 1), *x = region_class(s, r, 2);
    const int64_t line = (t - r->first_tile) / r->per_run, piece = (t - r->first_tile) % r->per_run;
    const int64_t q0 = line * r->run + piece * r->run / r->per_run;
    const int64_t q1 = line * r->run + (piece + 1) * r->run / r->per_run;
    int64_t jx = q0 % x->count, jy = q0 / x->count % y->count, jz = q0 / x->count / y->count;
    bool x_run = s->window > 0 && r->segments > 0;
    *out = (tile){.np = (int)(q1 - q0), .ntaps = r->ntaps, .y_run = true, .r = r};
    for (int p = 0; p < out->np;) {
        /* the tile's pixels in one row */
        const int64_t iz = z->in0 + jz * z->in_step, iy = y->in0 + jy * y->in_step, ix = x->in0 + jx * x->in_step;
        const int64_t oz = z->out0 + jz * z->out_step, oy = y->out0 + jy * y->out_step;
        int64_t from = (iz * d->in[1] + iy) * d->in[2] + ix;
        int64_t to = (oz * d->out[1] + oy) * d->out[2] + x->out0 + jx * x->out_step;
        if (p > 0) {
            x_run = x_run && from == out->xpix[0] + p * x->in_step;
            out->y_run = out->y_run && to == out->ypix[0] + p;
        }
        const int end = (int)CBN_MIN(out->np, p + x->count - jx);
        for (; p < end; p++, from += x->in_step, to += x->out_step) {
            out->xpix[p] = from;
            out->ypix[p] = to;
        }
        jx = 0;
        if (++jy < y->count) continue;
        jy = 0;
        jz++;
    }
    if (x->out_step != 1 && out->np > 1) out->y_run = false;
    out->tap_x = lists;
    out->tap_w = lists + r->ntaps;
    if (!x_run) return;
    out->tap_x = lists + 2 * r->ntaps;
    out->segment_x = lists + 3 * r->ntaps;
    out->x_at = out->xpix[0];
    for (int p = 0; p < out->np; p++) out->xpix[p] = p * x->in_step;
}

/* The tables of tiles [t0, t1) of the image. */
static void job_image(const direct_run *u, int64_t t0, int64_t t1, direct_job *job) {
    const direct_state *s = u->s;
    int64_t at = region_of(s, t0), *lists = job->taps, *free_lists = job->taps;
    float *window = job->windows;
    for (int64_t t = t0; t < t1; t++) {
        tile *out = &job->tiles[t - t0];
        while (t >= s->regions[at + 1].first_tile) at++;
        const region *r = &s->regions[at];
        if (t == t0 || t == r->first_tile) {
            lists = free_lists;
            free_lists += 4 * r->ntaps;
            taps_list(s, u->d, r, lists);
        }
        tile_fill(u, r, t, lists, out);
        if (out->segment_x) {
            out->window = window;
            window += r->segments * r->width * s->ic_chunk;
        }
    }
}

/* The tables of tiles [t0, t1) of the rows of a batch. */
static void job_linear(const direct_run *u, int64_t t0, int64_t t1, direct_job *job) {
    job->taps[0] = 0;
    for (int64_t t = t0; t < t1; t++) {
        const int64_t row = u->call->n * t / u->tiles, end = u->call->n * (t + 1) / u->tiles;
        tile *out = &job->tiles[t - t0];
        *out = (tile){.np = (int)(end - row), .ntaps = 1, .tap_x = job->taps, .tap_w = job->taps};
        for (int p = 0; p < out->np; p++) {
            out->xpix[p] = (row + p) * u->d->ic;
            out->ypix[p] = (row + p) * u->d->oc;
        }
    }
}

static void job_make(const direct_run *u, int64_t id, direct_job *job) {
    if (job->id == id) return;
    const int64_t t0 = job_first(u->tiles, u->jobs, id), t1 = job_first(u->tiles, u->jobs, id + 1);
    job->id = id;
    job->count = t1 - t0;
    (u->s->linear ? job_linear : job_image)(u, t0, t1, job);
    int64_t acc = 0;
    for (int64_t t = 0; t < job->count; t++) {
        job->tiles[t].acc = acc;
        acc += job->tiles[t].np * u->s->vw;
    }
    job->acc_block = acc;
    const tile *first = job->tiles, *last = first + job->count - 1;
    job->ahead = u->s->linear ? 0 : last->xpix[last->np - 1] - first->xpix[0];
}

/* Copies `width` elements of each of ic channels. The four-element pieces overlap at the end of a row. */
CBN_INLINE void rows_copy(int pieces, float *to, int64_t to_ic, const float *from, int64_t from_ic, int64_t width,
                          int64_t ic) {
    for (int64_t i = 0; i < ic; i++, to += to_ic, from += from_ic) {
        CBN_UNROLL for (int q = 0; q < pieces; q++) {
            const int64_t at = q < pieces - 1 ? 4 * q : width - 4;
            memcpy(to + at, from + at, 4 * sizeof(float));
        }
    }
}

/* x: first channel of the chunk. */
static void window_copy(const tile *t, const float *x, int64_t x_plane, int64_t ic) {
    const region *r = t->r;
    /* A tile with fewer pixels than the region's largest reads less than the region's width. */
    /* Taps of a row ascend in x, those of a transposed convolution descend. */
    const int64_t last = CBN_MAX(t->tap_x[0] % r->width, t->tap_x[t->ntaps - 1] % r->width);
    const int64_t width = t->xpix[t->np - 1] + 1 + (r->by_tap ? 0 : last), size = r->segments * r->width;
    for (int64_t g = 0; g < r->segments; g++) {
        float *to = t->window + g * r->width;
        const float *from = x + t->x_at + t->segment_x[g];
        switch ((width + 3) / 4) {
        case 2: rows_copy(2, to, size, from, x_plane, width, ic); break;
        case 3: rows_copy(3, to, size, from, x_plane, width, ic); break;
        case 4: rows_copy(4, to, size, from, x_plane, width, ic); break;
        default:
            for (int64_t i = 0; i < ic; i++)
                memcpy(to + i * size, from + i * x_plane, (size_t)width * sizeof(float));
        }
    }
}

/* Asks for what the next job reads in the place of tile t: the hardware does not foresee a walk over channels. */
static void job_prefetch(const direct_job *job, const tile *t, const float *x, int64_t x_plane, int64_t ic) {
    if (t->window || t->ntaps == 0 || job->ahead <= 0) return;
    const int64_t at = t->xpix[t->np - 1] + t->tap_x[t->ntaps - 1] + job->ahead;
    if (at >= x_plane) return;
    for (int64_t i = 0; i < ic; i++) __builtin_prefetch(x + i * x_plane + at, 0, 2);
}

/* A batch of blocks of output channels, b0 to b1, of one job. */
static void batch_run(const direct_run *u, int64_t image, int64_t g, int64_t b0, int64_t b1, const direct_job *job) {
    const direct_state *s = u->s;
    const cbn_conv_call *call = u->call;
    const int64_t per_ic = s->taps * s->vw;
    const float *x = (const float *)call->x + image * u->x_image + g * s->icg * u->x_plane;
    cbn_conv_oc_args a = {.w_ic = per_ic, .y_oc = u->y_plane};
    for (int64_t i = 0; i < s->icg; i += s->ic_chunk, x += s->ic_chunk * u->x_plane) {
        a.ic = CBN_MIN(s->ic_chunk, s->icg - i);
        a.load_acc = i > 0;
        const bool last = i + a.ic == s->icg;
        for (const tile *t = job->tiles; t < job->tiles + job->count; t++)
            if (t->window) window_copy(t, x, u->x_plane, a.ic);
        for (int64_t b = b0; b < b1; b++) {
            const int64_t oc0 = g * s->ocg + b * s->vw, y_at = image * u->y_image + oc0 * u->y_plane;
            const float *residual = call->residual ? (const float *)call->residual + y_at : NULL;
            a.epi = (cbn_epilogue_args){(const float *)call->bias + oc0, residual, call->lo, call->hi};
            a.oc_valid = (int32_t)CBN_MIN(s->ocg - b * s->vw, s->vw);
            a.w = s->w + ((g * s->blocks + b) * s->icg + i) * per_ic;
            a.y = last ? (float *)call->y + y_at : NULL;
            const int nv = (int)cbn_ceil_div(a.oc_valid, u->k->lanes);
            float *acc = job->acc + (b - b0) * job->acc_block;
            const int64_t lines = a.ic * per_ic * (int64_t)sizeof(float) / CBN_CACHE_LINE;
            const char *next = (const char *)(b + 1 < b1 ? a.w + s->icg * per_ic
                                                         : a.w + (s->ic_chunk - (b1 - 1 - b0) * s->icg) * per_ic);
            if (b + 1 == b1 && last) next = NULL;
            int64_t fetched = 0;
            for (const tile *t = job->tiles; t < job->tiles + job->count; t++) {
                a.x = t->window ? t->window : x;
                a.x_ic = t->window ? t->r->segments * t->r->width : u->x_plane;
                a.xpix = t->xpix;
                a.ypix = t->ypix;
                a.y_run = t->y_run;
                a.ntaps = t->ntaps;
                a.tap_x = t->tap_x;
                a.tap_w = t->tap_w;
                a.acc = acc + t->acc;
                for (const int64_t goal = (t - job->tiles + 1) * lines / job->count; next && fetched < goal; fetched++)
                    __builtin_prefetch(next + fetched * CBN_CACHE_LINE, 0, 2);
                if (b == b0) job_prefetch(job, t, x, u->x_plane, a.ic);
                u->k->conv_oc(t->np, nv, &a);
            }
        }
    }
}

/* Items are numbered image, job, group, batch: the tables of a job serve all groups. */
static void direct_range(void *arg, int64_t begin, int64_t end, int worker) {
    const direct_run *u = arg;
    const direct_state *s = u->s;
    char *scratch = u->scratch + (size_t)worker * u->worker_bytes;
    direct_job job = {.id = -1, .tiles = (tile *)scratch};
    job.taps = (int64_t *)(scratch += u->tiles_bytes);
    job.windows = (float *)(scratch += u->taps_bytes);
    job.acc = (float *)(scratch + u->window_bytes);
    for (int64_t item = begin; item < end; item++) {
        const int64_t batch = item % s->batches, rest = item / s->batches;
        const int64_t g = rest % u->groups, image = rest / u->groups / u->jobs;
        job_make(u, rest / u->groups % u->jobs, &job);
        batch_run(u, image, g, batch * s->blocks / s->batches, (batch + 1) * s->blocks / s->batches, &job);
    }
}

static size_t round_up(size_t bytes) { return (bytes + CBN_CACHE_LINE - 1) / CBN_CACHE_LINE * CBN_CACHE_LINE; }

static void scratch_layout(const direct_state *s, const cbn_kernels *k, direct_run *u) {
    const int64_t acc = s->ic_chunk < s->icg ? JOB_TILES * k->oc_np * s->vw * s->batch : 0;
    u->tiles_bytes = round_up(JOB_TILES * sizeof(tile));
    u->taps_bytes = round_up((size_t)s->job_taps * 4 * sizeof(int64_t));
    u->window_bytes = round_up((size_t)(JOB_TILES * s->window * s->ic_chunk) * sizeof(float));
    u->worker_bytes = u->tiles_bytes + u->taps_bytes + u->window_bytes + round_up((size_t)acc * sizeof(float));
}

static size_t direct_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n,
                               int threads) {
    (void)d;
    (void)n;
    direct_run u;
    scratch_layout(state, ctx->kernels, &u);
    return u.worker_bytes * (size_t)CBN_MAX(threads, 1);
}

static cbn_status direct_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                            const cbn_conv_call *call, cbn_error *err) {
    const direct_state *s = state;
    if (call->n == 0) return CBN_OK;
    direct_run u = {.d = d, .k = ctx->kernels, .s = s, .call = call, .groups = d->g, .images = call->n};
    u.x_plane = d->in[0] * d->in[1] * d->in[2];
    u.y_plane = d->out[0] * d->out[1] * d->out[2];
    u.x_image = d->ic * u.x_plane;
    u.y_image = d->oc * u.y_plane;
    u.tiles = s->tiles;
    if (s->linear) {
        u.images = 1;
        u.tiles = cbn_ceil_div(call->n, ctx->kernels->oc_np);
    }
    u.jobs = job_count(u.tiles);
    scratch_layout(s, ctx->kernels, &u);
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
    if (!u.scratch) return cbn_fail_memory(err, "scratch of a convolution", u.worker_bytes * (size_t)threads);
    const int64_t items = u.images * u.groups * u.jobs * s->batches;
    const int64_t work = cbn_ceil_div(u.tiles, u.jobs) * u.k->oc_np * s->vw * s->batch * s->icg * s->taps;
    cbn_parallel_for(items, CBN_MAX(THREAD_WORK / work, 1), threads, direct_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static size_t direct_state_bytes(const void *state) {
    const direct_state *s = state;
    return sizeof *s + s->w_bytes + (size_t)(s->nregions + 1) * sizeof *s->regions;
}

static void direct_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                            size_t size) {
    const direct_state *s = state;
    (void)d;
    snprintf(buf, size, "%d pixels x %lld channels, %lld regions, %lld input channels at a time", ctx->kernels->oc_np,
             (long long)s->vw, (long long)CBN_MAX(s->nregions, 1), (long long)s->ic_chunk);
}

const cbn_conv_impl cbn_conv_direct = {
    .name = "direct",
    .supports = direct_supports,
    .prepare = direct_prepare,
    .run = direct_go,
    .destroy = direct_destroy,
    .state_bytes = direct_state_bytes,
    .workspace_bytes = direct_workspace,
    .describe = direct_describe,
    .fused_epilogue = true,
};
