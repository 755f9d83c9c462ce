/* SPDX-License-Identifier: BSD-3-Clause */
/* Direct convolution of any geometry, output channels in vector lanes (kernel conv_oc).
 *
 * The output is cut into regions: one for each combination of the axis classes of depth, height and
 * width. All pixels of a region meet the same taps, so padded taps are never computed and no padded
 * copy of the input is needed; a transposed convolution is its phases, which are classes too.
 * Regions are cut into tiles of at most oc_np pixels, tiles are numbered through all regions, and a
 * job is a run of tile numbers. The kernel wants the address of every pixel and the taps of every
 * tile; a worker makes these tables for its job and uses them for a batch of blocks of output
 * channels.
 *
 * When several blocks share a job, the part of the input a tile reads, its window, is first copied to one place: in
 * the image every row of every channel is another cache line and every channel another page, which costs more than the
 * copy. With windows both x and the weights stream through L1, which the hardware foresees; input channels are then
 * taken in chunks whose weights, with the windows of a job, stay in L2. Without windows the weights of a chunk stay in
 * L1. What comes next is prefetched by the kernel, one line a channel, since a burst of prefetches stalls.
 *
 * The sum of an output element is always taken over channels, then taps, each one fused
 * multiply-add, so results do not depend on tiles, jobs, threads or the batch. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "cpu/cbn_cpu.h"
#include "ops/conv_cost.h"
#include "ops/conv_direct_priv.h"
#include "ops/conv_pack.h"
#include "threads/cbn_parallel.h"

enum {
    /* Tiles of a job at most: enough to reuse a chunk of weights often. */
    JOB_TILES = 32,
    JOB_TILES_LEAST = 8,
    JOB_TILES_FAR = 80, /* where the weights come from far away: they pass by once for each job */
    /* A chunk of the weights of one block; with windows it is a quarter of L2. They stream, and the
     * longer a tile runs the better. */
    CHUNK_BYTES = 32 * 1024,
    /* Blocks of output channels that share windows and a place for their sums. */
    BATCH_BLOCKS = 16,
    BATCH_BLOCKS_WHOLE = 4, /* when all channels are one chunk: the windows stay from batch to batch */
    TILE_CYCLES = 60,       /* to start and end a tile, and to store pixels one by one */
    SCATTER_CYCLES = 150,
    WINDOW_BLOCKS = 2,  /* blocks it takes to earn back the copy of the windows (measured) */
    WINDOW_CHANNELS = 8,
    WINDOW_STEP = 4,    /* pixels further apart than this share no cache lines worth copying */
    /* Fewer multiply-adds than this (about 10 us) are not worth a thread. */
    THREAD_WORK = 500 * 1000
};

/* ---- preparing ------------------------------------------------------------------------------- */
static bool direct_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                            const char **why_not) {
    (void)ctx;
    if (d->dtype != CBN_F32) {
        *why_not = "dtype is not float32";
        return false;
    }
    return true;
}

/* Rows are cut into tiles one by one or all pixels together: the latter makes fewer tiles, but only pixels that are
 * neighbours in y are stored fast. Full rows are neighbours in y, too. */
static bool region_by_row(const direct_state *s, const region *r, const cbn_conv_desc *d, int np, int64_t rows) {
    const cbn_axis_class *w = cbn_direct_class(s, r, 2);
    if (w->out_step != 1 || w->count == d->out[2]) return false;
    const int64_t cycles = TILE_CYCLES + r->ntaps * s->icg / 4;
    return rows * cbn_ceil_div(w->count, np) * cycles <= cbn_ceil_div(rows * w->count, np) * (cycles + SCATTER_CYCLES);
}

static void region_cut(const direct_state *s, const cbn_conv_desc *d, int np, region *r) {
    const cbn_axis_class *w = cbn_direct_class(s, r, 2);
    const int64_t rows = cbn_direct_class(s, r, 0)->count * cbn_direct_class(s, r, 1)->count;
    const int64_t tap_rows = cbn_direct_class(s, r, 0)->ntaps * cbn_direct_class(s, r, 1)->ntaps;
    r->ntaps = w->ntaps * tap_rows;
    r->run = region_by_row(s, r, d, np, rows) ? w->count : w->count * rows;
    r->per_run = cbn_ceil_div(r->run, np);
    r->segments = r->width = r->reach = 0;
    r->by_tap = false;
    if (r->ntaps == 0 || w->in_step > WINDOW_STEP) return;
    const int64_t pixels = cbn_ceil_div(r->run, r->per_run);
    const int64_t parts = r->run == w->count ? 1 : CBN_MIN(pixels, (pixels + w->count - 2) / w->count + 1);
    int64_t reach = 0;
    for (int64_t t = 0; t < w->ntaps; t++) reach = CBN_MAX(reach, w->tap_in[t]);
    const int64_t read = (pixels - parts) * w->in_step + parts, one = (pixels - 1) * w->in_step + 1;
    r->by_tap = read * w->ntaps < read + parts * reach;
    r->segments = r->by_tap ? r->ntaps : tap_rows;
    r->reach = r->by_tap ? 0 : reach;
    /* With large steps few parts take most, since what lies between the pixels of a part is copied, too. */
    r->width = CBN_MAX(read + parts * r->reach, one + r->reach);
}

static int row_order(const void *a, const void *b) {
    const int64_t x = ((const cbn_axis_class *)a)->out0, y = ((const cbn_axis_class *)b)->out0;
    return (x > y) - (x < y);
}

/* Makes each row of the height axis a class of its own, in the order of the output. The width phases
 * of a transposed convolution write every s-th element of the same rows: taken row by row, a cache
 * line is still at hand when the next phase fills its gaps (measured: 1.35 to 1.6 times faster on
 * outputs larger than L2). */
static cbn_status rows_split(cbn_axis_plan *p, int64_t rows, cbn_error *err) {
    cbn_axis_class *out = cbn_alloc_array((size_t)rows, sizeof *out);
    if (!out) return cbn_fail_memory(err, "the rows of a convolution", (size_t)rows * sizeof *out);
    int64_t n = 0;
    for (int64_t i = 0; i < p->nclasses; i++) {
        for (int64_t j = 0; j < p->classes[i].count; j++, n++) {
            out[n] = p->classes[i];
            out[n].out0 += j * out[n].out_step;
            out[n].in0 += j * out[n].in_step;
            out[n].count = 1;
        }
    }
    assert(n == rows);
    qsort(out, (size_t)n, sizeof *out, row_order);
    cbn_free(p->classes);
    p->classes = out;
    p->nclasses = n;
    return CBN_OK;
}

/* Rows long enough to fill tiles, in phases that leave gaps in an output that L2 does not hold. */
static bool rows_worth_splitting(const direct_state *s, const cbn_conv_desc *d, int np) {
    enum { MANY = 1 << 14 };
    if (!d->transposed || d->stride[2] == 1 || d->out[0] * d->out[1] > MANY) return false;
    const int64_t floats = d->oc * d->out[0] * d->out[1] * d->out[2];
    if (floats <= (int64_t)(cbn_cpu_cache_sizes().l2 / sizeof(float))) return false;
    return d->out[2] / d->stride[2] >= 2 * np && s->axis[2].nclasses <= MANY / (d->out[0] * d->out[1]);
}

static cbn_status regions_make(direct_state *s, const cbn_conv_desc *d, int np, cbn_error *err) {
    int64_t n = 1;
    for (int a = 0; a < 3; a++) CBN_TRY(cbn_axis_plan_make(d, a, &s->axis[a], err));
    if (rows_worth_splitting(s, d, np)) CBN_TRY(rows_split(&s->axis[1], d->out[1], err));
    for (int a = 0; a < 3; a++)
        if (!cbn_mul_ok(n, s->axis[a].nclasses, &n)) n = INT64_MAX;
    s->regions = n < INT32_MAX ? cbn_alloc_array((size_t)n + 1, sizeof *s->regions) : NULL;
    if (!s->regions)
        return cbn_fail_memory(err, "the regions of a convolution", (size_t)n * sizeof *s->regions);
    s->nregions = n;
    int64_t tiles = 0;
    for (int64_t i = 0; i < n; i++) {
        region *r = &s->regions[i];
        r->first_tile = tiles;
        r->cls[2] = i % s->axis[2].nclasses;
        r->cls[1] = i / s->axis[2].nclasses % s->axis[1].nclasses;
        r->cls[0] = i / s->axis[2].nclasses / s->axis[1].nclasses;
        region_cut(s, d, np, r);
        const int64_t pixels = cbn_direct_class(s, r, 0)->count * cbn_direct_class(s, r, 1)->count *
                               cbn_direct_class(s, r, 2)->count;
        tiles += pixels / r->run * r->per_run;
        s->window = CBN_MAX(s->window, r->segments * r->width);
    }
    s->regions[n] = (region){.first_tile = tiles};
    s->tiles = tiles;
    return CBN_OK;
}

static int64_t job_count(const direct_state *s, int64_t tiles) { return cbn_ceil_div(tiles, s->job_tiles); }

/* The largest sum of taps of the regions a job touches. */
static int64_t job_taps_max(const direct_state *s) {
    int64_t most = 0;
    for (int64_t j = 0, jobs = job_count(s, s->tiles); j < jobs; j++) {
        const int64_t end = cbn_direct_first(s->tiles, jobs, j + 1);
        int64_t sum = 0;
        for (int64_t r = cbn_direct_region_of(s, cbn_direct_first(s->tiles, jobs, j));
             s->regions[r].first_tile < end; r++)
            sum += s->regions[r].ntaps;
        most = CBN_MAX(most, sum);
    }
    return most;
}

/* w is [oc][ic/g][taps], transposed [ic][oc/g][taps]. */
static void weights_pack(const direct_state *s, const cbn_conv_desc *d, const float *w) {
    if (!d->transposed) {
        cbn_pack_blocks(s->w, s->vw, w, d->g, s->ocg, s->icg * s->taps);
        return;
    }
    const int64_t ic_step = s->ocg * s->taps;
    float *p = s->w;
    for (int64_t g = 0; g < d->g; g++) {
        const float *wg = w + g * (s->ocg * s->icg * s->taps);
        for (int64_t b = 0; b < s->blocks; b++) {
            const int64_t valid = CBN_MIN(s->ocg - b * s->vw, s->vw);
            for (int64_t i = 0; i < s->icg; i++) {
                for (int64_t t = 0; t < s->taps; t++, p += s->vw) {
                    const float *from = wg + b * s->vw * s->taps + i * ic_step + t;
                    for (int64_t c = 0; c < valid; c++) p[c] = from[c * s->taps];
                    memset(p + valid, 0, (size_t)(s->vw - valid) * sizeof(float));
                }
            }
        }
    }
}

/* Measured: what a tile takes to start and store, a row of a window to copy, and memory beyond L2 to read or write. */
static double direct_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const cbn_kernels *k = ctx->kernels;
    const int64_t ocg = d->oc / d->g, icg = d->ic / d->g, taps = d->k[0] * d->k[1] * d->k[2];
    const int64_t vectors = cbn_ceil_div(ocg, k->lanes), blocks = cbn_ceil_div(vectors, k->oc_nv);
    const double pixels = (double)(d->out[0] * d->out[1] * d->out[2]);
    const double filled = (double)ocg / (double)(vectors * k->lanes);
    /* Few vectors in a block leave the latency of a multiply-add uncovered. */
    const double share = k->oc_np * (double)vectors / (double)blocks < 8 ? 0.6 : 0.95;
    double cycles = cbn_cost_fma(k, cbn_cost_real_fmas(d), share * filled);
    const double row = d->nd == 0 ? k->oc_np : (double)d->out[2] / (double)cbn_ceil_div(d->out[2], k->oc_np);
    const double tiles = (double)d->g * pixels / CBN_MAX(row, 1.0);
    cycles += tiles * (double)blocks * 150;
    if (blocks < WINDOW_BLOCKS) cycles *= 1.15;
    else cycles += tiles * (double)(icg * d->k[0] * d->k[1]) * 7;
    const double w_bytes = (double)(d->oc * icg * taps) * sizeof(float);
    const double xy_bytes = (double)(d->ic * d->in[0] * d->in[1] * d->in[2] + d->oc * (int64_t)pixels) * sizeof(float);
    if (xy_bytes > (double)cbn_cpu_cache_sizes().l2) cycles += xy_bytes / 16;
    cycles += w_bytes / 24;
    return ctx->one_shot ? cycles + w_bytes * (d->transposed ? 1.0 : 0.5) : cycles;
}

static void direct_destroy(void *state) {
    direct_state *s = state;
    if (!s) return;
    for (int a = 0; a < 3; a++) cbn_axis_plan_free(&s->axis[a]);
    cbn_free(s->regions);
    cbn_free(s->w);
    cbn_free(s);
}

static cbn_status direct_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w,
                                 void **state, cbn_error *err) {
    const cbn_kernels *k = ctx->kernels;
    assert(k->oc_np <= CBN_DIRECT_MAX_NP);
    direct_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a direct convolution", sizeof *s);
    cbn_status status = CBN_OK;
    s->linear = d->nd == 0;
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->taps = d->k[0] * d->k[1] * d->k[2];
    /* Blocks of equal width rather than one that is nearly empty. */
    const int64_t vectors = cbn_ceil_div(s->ocg, k->lanes),
                  nblocks = cbn_ceil_div(vectors, k->oc_nv);
    s->nv = (int)cbn_ceil_div(vectors, nblocks);
    s->vw = (int64_t)s->nv * k->lanes;
    s->blocks = cbn_ceil_div(s->ocg, s->vw);
    s->job_tiles = JOB_TILES;
    if (!s->linear) {
        status = regions_make(s, d, k->oc_np, err);
        if (status != CBN_OK) goto done;
        if (s->blocks < WINDOW_BLOCKS || s->icg < WINDOW_CHANNELS) s->window = 0;
    }
    const int64_t l2 = (int64_t)cbn_cpu_cache_sizes().l2;
    /* Weights that come from further away than L2 in each job want larger jobs, so smaller windows. The more there are,
     * the more: then even windows beyond L2, which are read in order, are the lesser evil (measured). */
    const int64_t w_bytes = d->oc * s->icg * s->taps * (int64_t)sizeof(float),
                  part_of_l2 = w_bytes > 32 * l2 ? l2 / 16 : w_bytes > 8 * l2 ? l2 / 8 : l2 / 4;
    const int64_t chunk_bytes = s->window > 0 ? CBN_MAX(part_of_l2, CHUNK_BYTES) : CHUNK_BYTES;
    const int64_t chunk = CBN_MAX(chunk_bytes / (s->taps * s->vw * (int64_t)sizeof(float)), 1);
    s->ic_chunk = cbn_ceil_div(s->icg, cbn_ceil_div(s->icg, chunk));
    if (s->window > 0) {
        const int64_t bytes = s->window * s->ic_chunk * (int64_t)sizeof(float);
        s->job_tiles = CBN_MIN(JOB_TILES, CBN_MAX(l2 / 2 / bytes, JOB_TILES_LEAST));
        if (w_bytes > 32 * l2) s->job_tiles = CBN_MIN(JOB_TILES_FAR, CBN_MAX(2 * l2 / bytes, JOB_TILES_LEAST));
    }
    s->job_taps = s->linear ? 1 : job_taps_max(s);
    /* Without windows blocks share nothing but the tables, which stay from item to item. */
    const int64_t most = s->ic_chunk < s->icg ? BATCH_BLOCKS : BATCH_BLOCKS_WHOLE;
    s->batches = s->window > 0 ? cbn_ceil_div(s->blocks, most) : s->blocks;
    s->batch = cbn_ceil_div(s->blocks, s->batches);
    s->w = cbn_alloc_or_fail((size_t)(d->g * s->blocks * s->vw), (size_t)(s->icg * s->taps) * sizeof *s->w,
                             "the packed weights of a convolution", err);
    if (!s->w) {
        status = CBN_NO_MEMORY;
        goto done;
    }
    weights_pack(s, d, w);
    *state = s;
    s = NULL;
done:
    direct_destroy(s);
    return status;
}

/* ---- running --------------------------------------------------------------------------------- */
/* What the tiles of a block are to prefetch while they compute, one request for every channel of the chunk each: the
 * weights that come next, then what the next chunk or the next job reads of the image, where the hardware does not
 * foresee the walk. */
typedef struct ahead {
    const float *w, *w_end, *x, *x_end;
    int64_t w_step, w_piece, x_plane; /* of w: a channel, a tile */
} ahead;

static void ahead_take(ahead *p, cbn_conv_oc_args *a) {
    const int64_t line = CBN_CACHE_LINE / (int64_t)sizeof(float);
    a->prefetch = NULL;
    if (p->w < p->w_end) {
        a->prefetch = p->w;
        a->prefetch_step = p->w_step;
        p->w += p->w_piece;
    } else if (p->x < p->x_end) {
        a->prefetch = p->x;
        a->prefetch_step = p->x_plane;
        p->x += line;
    }
}

/* Elements of the next weights that a tile asks for with each channel: a line or, where the tiles of a block have the
 * time, less, so that requests for the same line repeat rather than those for all lines come at once. */
static int64_t ahead_step(int64_t per_ic, int64_t tiles) {
    return CBN_MIN(CBN_CACHE_LINE / (int64_t)sizeof(float), cbn_ceil_div(per_ic, tiles));
}

/* A batch of blocks of output channels, b0 to b1, of one job. */
static void batch_run(const direct_run *u, int64_t image, int64_t g, int64_t b0, int64_t b1,
                      direct_job *job) {
    const direct_state *s = u->s;
    const cbn_conv_call *call = u->call;
    const int64_t per_ic = s->taps * s->vw;
    const float *x = (const float *)call->x + image * u->x_image + g * s->icg * u->x_plane;
    cbn_conv_oc_args a = {.w_ic = per_ic, .y_oc = u->y_plane};
    for (int64_t i = 0; i < s->icg; i += s->ic_chunk, x += s->ic_chunk * u->x_plane) {
        a.ic = CBN_MIN(s->ic_chunk, s->icg - i);
        a.load_acc = i > 0;
        const bool last = i + a.ic == s->icg;
        if (s->window > 0 && (s->ic_chunk < s->icg || job->filled != image * u->groups + g))
            cbn_direct_windows_copy(job, x, u->x_plane, a.ic);
        job->filled = image * u->groups + g;
        ahead pf = {.x_plane = u->x_plane, .w_step = ahead_step(per_ic, job->count)};
        pf.w_piece = a.ic * pf.w_step;
        if (last) {
            pf.x = x - i * u->x_plane + job->next_from;
            pf.x_end = pf.x + job->next_to - job->next_from;
        }
        for (int64_t b = b0; b < b1; b++) {
            const int64_t oc0 = g * s->ocg + b * s->vw,
                          y_at = image * u->y_image + oc0 * u->y_plane;
            const float *residual = call->residual ? (const float *)call->residual + y_at : NULL;
            a.epi =
                (cbn_epilogue_args){(const float *)call->bias + oc0, residual, call->lo, call->hi};
            a.w = s->w + ((g * s->blocks + b) * s->icg + i) * per_ic;
            a.y = last ? (float *)call->y + y_at : NULL;
            a.oc_valid = (int32_t)CBN_MIN(s->ocg - b * s->vw, s->vw);
            const int nv = (int)cbn_ceil_div(a.oc_valid, u->k->lanes);
            float *acc = job->acc + (b - b0) * job->acc_block;
            pf.w = a.w + s->icg * per_ic;
            if (b + 1 == b1 && !last) {
                /* The next channels: of the image, too, late enough for them to stay. */
                pf.w = a.w + (s->ic_chunk - (b1 - 1 - b0) * s->icg) * per_ic;
                pf.w_step = CBN_CACHE_LINE / (int64_t)sizeof(float);
                pf.w_piece = a.ic * pf.w_step;
                pf.x = x + s->ic_chunk * u->x_plane + job->from;
                pf.x_end = pf.x + job->next_from - job->from;
            }
            pf.w_end = g * s->blocks + b + 1 < u->groups * s->blocks || !last ? pf.w + a.ic * per_ic : pf.w;
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
                ahead_take(&pf, &a);
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
        const int64_t batch = item % u->batches, rest = item / u->batches;
        const int64_t g = rest % u->groups, image = rest / u->groups / u->jobs;
        cbn_direct_job_make(u, rest / u->groups % u->jobs, &job);
        batch_run(u, image, g, batch * s->blocks / u->batches, (batch + 1) * s->blocks / u->batches, &job);
    }
}

static void scratch_layout(const direct_state *s, const cbn_kernels *k, direct_run *u) {
    const int64_t acc = s->ic_chunk < s->icg ? s->job_tiles * k->oc_np * s->vw * s->batch : 0;
    u->tiles_bytes = cbn_whole_lines((size_t)s->job_tiles * sizeof(tile));
    u->taps_bytes = cbn_whole_lines((size_t)s->job_taps * 4 * sizeof(int64_t));
    u->window_bytes = cbn_whole_lines((size_t)(s->job_tiles * s->window * s->ic_chunk) * sizeof(float));
    u->worker_bytes =
        u->tiles_bytes + u->taps_bytes + u->window_bytes + cbn_whole_lines((size_t)acc * sizeof(float));
}

static size_t direct_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                               const void *state, int64_t n, int threads) {
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
    direct_run u = {
        .d = d, .k = ctx->kernels, .s = s, .call = call, .groups = d->g, .images = call->n};
    u.x_plane = d->in[0] * d->in[1] * d->in[2];
    u.y_plane = d->out[0] * d->out[1] * d->out[2];
    u.x_image = d->ic * u.x_plane;
    u.y_image = d->oc * u.y_plane;
    u.tiles = s->tiles;
    if (s->linear) {
        u.images = 1;
        u.tiles = cbn_ceil_div(call->n, ctx->kernels->oc_np);
    }
    u.jobs = job_count(s, u.tiles);
    scratch_layout(s, ctx->kernels, &u);
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
    if (!u.scratch)
        return cbn_fail_memory(err, "scratch of a convolution", u.worker_bytes * (size_t)threads);
    /* Smaller batches where there would be little to share out; smaller ones need no more scratch. */
    const int64_t runs = u.images * u.groups * u.jobs;
    u.batches = s->batches;
    if (threads > 1 && runs * u.batches < 2 * threads)
        u.batches = CBN_MIN(s->blocks, u.batches * cbn_ceil_div(2 * threads, runs * u.batches));
    u.batches = cbn_even_parts(runs, u.batches, s->blocks, threads);
    const int64_t items = runs * u.batches;
    const int64_t work = cbn_ceil_div(u.tiles, u.jobs) * u.k->oc_np * s->vw * cbn_ceil_div(s->blocks, u.batches) *
                         s->icg * s->taps;
    cbn_parallel_for(items, CBN_MAX(THREAD_WORK / work, 1), threads, direct_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static void direct_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                            char *buf, size_t size) {
    const direct_state *s = state;
    (void)d;
    snprintf(buf, size, "%d pixels x %lld channels, %lld regions, %lld input channels at a time",
             ctx->kernels->oc_np, (long long)s->vw, (long long)CBN_MAX(s->nregions, 1),
             (long long)s->ic_chunk);
}

const cbn_conv_impl cbn_conv_direct = {
    .name = "direct",
    .supports = direct_supports,
    .cost = direct_cost,
    .prepare = direct_prepare,
    .run = direct_go,
    .destroy = direct_destroy,
    .workspace_bytes = direct_workspace,
    .describe = direct_describe,
    .fused_epilogue = true,
};
