/* SPDX-License-Identifier: BSD-3-Clause */
/* 1x1 convolution: a matrix product whose pixels lie in vector lanes (kernel conv_px).
 *
 * The plane is cut into panels of px_nv vectors, and panels into super-panels whose input stays in the L2 cache while
 * all blocks of up to px_mr output channels pass over it, a batch of blocks at a time. One call of the kernel takes a
 * batch over a super-panel, a block after the other: y is written in long rows then. (Of a strided one: over a
 * panel.)
 *
 * With more than one block the kernel copies a panel as its first block reads it, so that it is one piece of memory
 * for the others: in the image every channel is another page, and rows rarely start at a multiple of a vector. The
 * panels of a strided convolution are gathered beforehand. Meanwhile the kernel asks for the lines that come next
 * (of the panel after it, or the super-panel): the hardware does not foresee a walk over channels. */
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "ops/conv_cost.h"
#include "ops/conv_pack.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    /* Input of a super-panel: more than this falls out of L2 (measured: 1024 channels, 14x14, 5 %
     * slower at 800 KB). */
    SUPER_BYTES = 400 * 1024,
    SUPER_BYTES_STRIDED = 200 * 1024,
    LEAST_ITEMS = 4, /* for a plane, so that threads get even shares */
    BATCH_BYTES = 128 * 1024, /* weights of a batch of blocks: they stay in L2 while the panels pass */
    PACK_BLOCKS = 2,           /* blocks that share a copy */
    GATHER_BLOCKS = 8,         /* blocks it takes to earn back the gathering of a strided one */
    MIN_VECTORS = 8,
    MIN_VECTORS_STRIDED = 4, /* less: conv_direct copies wider windows for these */
    MAX_PANEL = 64,          /* pixels */
    MAX_LINES = 96,          /* of a channel that are asked for ahead */
    THREAD_WORK = 500 * 1000
};

typedef struct pointwise_state {
    int64_t icg, ocg;
    int64_t blocks, narrow, wider; /* blocks of `narrow` output channels, the first `wider` ones of one more */
    int64_t min_mr, batches;       /* packed width of a block at least; blocks are spread over batches */
    int64_t plane, x_plane; /* pixels of a channel of y and of x */
    int64_t vectors, panels,
        supers;    /* the plane's vectors are spread evenly over panels, these over super-panels */
    int64_t even, larger; /* vectors of a panel; the first `larger` panels have one more */
    int64_t super; /* most pixels in a super-panel, rounded up to vectors */
    bool strided, pack;
    float *w; /* [group][block][channel][px_mr], zeros beyond the last channel */
} pointwise_state;

static bool pointwise_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                               const char **why_not) {
    const int64_t plane = d->out[0] * d->out[1] * d->out[2];
    const bool strided = d->stride[0] * d->stride[1] * d->stride[2] != 1;
    *why_not = NULL;
    if (d->dtype != CBN_F32)
        *why_not = "dtype is not float32";
    else if (d->nd == 0)
        *why_not = "linear has no pixels to put into lanes";
    else if (d->transposed)
        *why_not = "transposed";
    else if (d->g == d->ic && d->g == d->oc && !strided && d->g > 1)
        *why_not = "a group has one channel";
    for (int a = 0; a < CBN_MAX_SPATIAL && !*why_not; a++) {
        if (d->k[a] != 1)
            *why_not = "kernel is not 1";
        else if (d->pad_lo[a] != 0 || d->pad_hi[a] != 0)
            *why_not = "padding is not 0";
    }
    if (!*why_not && strided && d->oc / d->g < GATHER_BLOCKS * ctx->kernels->px_mr)
        *why_not = "strided with too few output channels to earn back a copy of the input";
    /* conv_direct wastes no lane on the last pixels of a plane; here they cost a vector each. */
    const int64_t least = (strided ? MIN_VECTORS_STRIDED : MIN_VECTORS) * ctx->kernels->lanes;
    if (!*why_not && plane < least) *why_not = "the map is small";
    return !*why_not;
}

/* A panel of few vectors waits for the latency of its sums: 8 of them keep both multipliers busy. */
static double pointwise_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const cbn_kernels *k = ctx->kernels;
    const int64_t plane = d->out[0] * d->out[1] * d->out[2], vectors = cbn_ceil_div(plane, k->lanes);
    const int64_t panels = cbn_ceil_div(vectors, k->px_nv), even = vectors / panels, larger = vectors % panels;
    const double least = 8.0 / k->px_mr;
    const double taken = (double)larger * CBN_MAX((double)even + 1, least) +
                         (double)(panels - larger) * CBN_MAX((double)even, least);
    const double filled = (double)plane / (double)k->lanes / taken;
    const double pack = ctx->one_shot ? 1.5 * (double)(d->oc * (d->ic / d->g)) : 0;
    return cbn_cost_fma(k, cbn_cost_real_fmas(d), 0.93 * filled) + pack;
}

static void pointwise_destroy(void *state) {
    pointwise_state *s = state;
    if (!s) return;
    cbn_free(s->w);
    cbn_free(s);
}

/* First output channel of a block; that of block number `blocks` is ocg. */
static int64_t block_channel(const pointwise_state *s, int64_t b) {
    return b * s->narrow + CBN_MIN(b, s->wider);
}

/* Channels its packed weights have room for, and those of the blocks before it. */
static int64_t block_width(const pointwise_state *s, int64_t b) {
    return CBN_MAX(s->narrow + (b < s->wider), s->min_mr);
}

static int64_t width_before(const pointwise_state *s, int64_t b) {
    const int64_t wide = CBN_MIN(b, s->wider);
    return wide * block_width(s, 0) + (b - wide) * CBN_MAX(s->narrow, s->min_mr);
}

static int64_t group_width(const pointwise_state *s) { return width_before(s, s->blocks); }

static cbn_status pointwise_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                                    const void *w, void **state, cbn_error *err) {
    const int64_t mr = ctx->kernels->px_mr;
    pointwise_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a pointwise convolution", sizeof *s);
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->blocks = cbn_ceil_div(s->ocg, mr);
    s->narrow = s->ocg / s->blocks;
    s->wider = s->ocg % s->blocks;
    s->min_mr = CBN_PX_MR_MIN(mr);
    const int64_t fit_blocks = CBN_MAX(BATCH_BYTES / (mr * s->icg * (int64_t)sizeof(float)), 1);
    s->batches = cbn_ceil_div(s->blocks, fit_blocks);
    s->plane = d->out[0] * d->out[1] * d->out[2];
    s->x_plane = d->in[0] * d->in[1] * d->in[2];
    s->strided = d->stride[0] * d->stride[1] * d->stride[2] != 1;
    const int64_t super_bytes = s->strided ? SUPER_BYTES_STRIDED : SUPER_BYTES;
    s->pack = s->strided || s->blocks >= PACK_BLOCKS;
    assert(ctx->kernels->px_nv * ctx->kernels->lanes <= MAX_PANEL);
    const int64_t lanes = ctx->kernels->lanes, nv = ctx->kernels->px_nv;
    s->vectors = cbn_ceil_div(s->plane, lanes);
    s->panels = cbn_ceil_div(s->vectors, nv);
    s->even = s->vectors / s->panels;
    s->larger = s->vectors % s->panels;
    const int64_t fit = CBN_MAX(super_bytes / (s->icg * nv * lanes * (int64_t)sizeof(float)), 1);
    s->supers = CBN_MAX(cbn_ceil_div(s->panels, fit), CBN_MIN(s->panels, cbn_ceil_div(LEAST_ITEMS, s->batches)));
    s->super = cbn_ceil_div(s->panels, s->supers) * nv * lanes;
    s->w = cbn_alloc_or_fail((size_t)(d->g * group_width(s)), (size_t)s->icg * sizeof *s->w,
                             "the packed weights of a convolution", err);
    if (!s->w) {
        pointwise_destroy(s);
        return CBN_NO_MEMORY;
    }
    float *p = s->w;
    for (int64_t g = 0; g < d->g; g++) {
        for (int64_t b = 0; b < s->blocks; b++) {
            const int64_t c0 = block_channel(s, b), valid = block_channel(s, b + 1) - c0, width = block_width(s, b);
            const float *from = (const float *)w + (g * s->ocg + c0) * s->icg;
            cbn_pack_rows(p, width, from, s->icg, valid, s->icg);
            p += width * s->icg;
        }
    }
    *state = s;
    return CBN_OK;
}

/* First pixel of a panel; that of panel number `panels` is at or past the end of the plane. */
static int64_t panel_pixel(const pointwise_state *s, const cbn_kernels *k, int64_t panel) {
    return (panel * s->even + CBN_MIN(panel, s->larger)) * k->lanes;
}

typedef struct pointwise_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const pointwise_state *s;
    const cbn_conv_call *call;
    char *scratch;
    size_t worker_bytes;
} pointwise_run;

static size_t worker_bytes(const pointwise_state *s) {
    return s->pack ? (size_t)(s->super * s->icg) * sizeof(float) : 0;
}

/* Where output pixel p lies in a channel of x. */
static int64_t pixel_at(const cbn_conv_desc *d, int64_t p) {
    const int64_t c = p % d->out[2], b = p / d->out[2] % d->out[1], a = p / d->out[2] / d->out[1];
    return (a * d->stride[0] * d->in[1] + b * d->stride[1]) * d->in[2] + c * d->stride[2];
}

/* What a tile covers: n pixels from p0 on, `pitch` of room. */
typedef struct panel {
    int64_t p0, n, pitch;
} panel;

static panel panel_get(const pointwise_run *u, int64_t number) {
    panel p = {.p0 = panel_pixel(u->s, u->k, number)};
    p.pitch = panel_pixel(u->s, u->k, number + 1) - p.p0;
    p.n = CBN_MIN(p.pitch, u->s->plane - p.p0);
    return p;
}

/* Copies every channel's pixels of a strided panel. */
static void panel_gather(const pointwise_run *u, const panel *t, const float *x, float *out) {
    const pointwise_state *s = u->s;
    const int64_t width = u->d->out[2], step = u->d->stride[2], lanes = u->k->lanes;
    if (step <= 2) {
        cbn_panel_move moves[MAX_PANEL];
        int64_t nmoves = 0;
        for (int64_t p = 0, end = 0; p < t->n; p = end) {
            const int64_t from = pixel_at(u->d, t->p0 + p);
            end = CBN_MIN(p + width - (t->p0 + p) % width, t->n);
            /* The last row goes on as zeros to where the panel ends. */
            for (int64_t q = p; q < (end < t->n ? end : t->pitch); q += lanes) {
                const int64_t n = CBN_MIN(lanes, t->pitch - q), read = CBN_MAX(CBN_MIN(end - q, lanes), 0);
                moves[nmoves++] = (cbn_panel_move){from + (q - p) * step,
                                                   q,
                                                   .hi = (int16_t)read,
                                                   .n = (int16_t)n,
                                                   .skip = (int16_t)(step - 1)};
            }
        }
        u->k->panel_pack(out, t->pitch, x, s->x_plane, s->icg, moves, nmoves);
        return;
    }
    int64_t from[MAX_PANEL];
    for (int64_t p = 0; p < t->n; p++) from[p] = pixel_at(u->d, t->p0 + p);
    for (int64_t i = 0; i < s->icg; i++, out += t->pitch, x += s->x_plane) {
        for (int64_t p = 0; p < t->n; p++) out[p] = x[from[p]];
        for (int64_t p = t->n; p < t->pitch; p++) out[p] = 0.0f;
    }
}

/* A super-panel, panels [i0, i1) of a group of an image, and the one a worker takes after it (of a strided one). */
typedef struct super_panel {
    int64_t i0, i1;
    const float *x, *next_x; /* first channel of the group; NULL: no next one */
    int64_t lines[MAX_LINES], nlines; /* of each channel of the next one, as offsets from next_x */
    int64_t line, calls, due;         /* next line to ask for; the lines are spread over so many tiles */
} super_panel;

static const float *super_find(const pointwise_run *u, int64_t number, int64_t *i0, int64_t *i1) {
    const pointwise_state *s = u->s;
    const int64_t image = number / s->supers / u->d->g, g = number / s->supers % u->d->g, super = number % s->supers;
    *i0 = s->panels * super / s->supers;
    *i1 = s->panels * (super + 1) / s->supers;
    return (const float *)u->call->x + (image * u->d->ic + g * s->icg) * s->x_plane;
}

static void super_lines(const pointwise_run *u, int64_t i0, int64_t i1, super_panel *t) {
    enum { LINE = CBN_CACHE_LINE / sizeof(float) };
    const int64_t end = CBN_MIN(panel_pixel(u->s, u->k, i1), u->s->plane);
    int64_t last = INT64_MIN / 2;
    t->nlines = 0;
    for (int64_t p = panel_pixel(u->s, u->k, i0); p < end && t->nlines < MAX_LINES; p++) {
        const int64_t at = pixel_at(u->d, p);
        if (at - last < LINE && p + 1 < end) continue;
        t->lines[t->nlines++] = last = at;
    }
}

/* The next line to ask for, when it is time. */
static const float *super_prefetch(super_panel *t) {
    t->due += t->nlines;
    if (t->due < t->calls || t->line == t->nlines) return NULL;
    t->due -= t->calls;
    return t->next_x + t->lines[t->line++];
}

/* How many panels from i on the kernel takes at once: full ones of the same width. */
static int64_t panels_side(const pointwise_run *u, int64_t i, int64_t end) {
    const panel p = panel_get(u, i);
    int64_t n = 1;
    if (u->s->strided || p.n % u->k->lanes != 0) return 1;
    while (i + n < end && panel_get(u, i + n).n == p.n) n++;
    return n;
}

/* Blocks [b0, b1) of one width over the super-panel. packed: NULL or where its copy is; `copy`: is made now. */
static void blocks_run(const pointwise_run *u, int64_t image, int64_t g, super_panel *t, int64_t b0, int64_t b1,
                       float *packed, bool copy) {
    const pointwise_state *s = u->s;
    const int64_t c0 = block_channel(s, b0), oc0 = g * s->ocg + c0;
    const float *residual = u->call->residual;
    cbn_conv_px_args a = {.y_oc = s->plane, .ic = s->icg, .prefetch_step = s->x_plane};
    a.mr = (int32_t)block_width(s, b0);
    a.w = s->w + (g * group_width(s) + width_before(s, b0)) * s->icg;
    a.oc_valid = (int32_t)(block_channel(s, b1) - c0);
    a.epi = (cbn_epilogue_args){(const float *)u->call->bias + oc0, NULL, u->call->lo, u->call->hi};
    int64_t side = 0;
    for (int64_t i = t->i0; i < t->i1; i += side) {
        const panel p = panel_get(u, i);
        side = panels_side(u, i, t->i1);
        const int64_t at = (image * u->d->oc + oc0) * s->plane + p.p0;
        if (copy && s->strided) panel_gather(u, &p, t->x, packed);
        const bool from_image = !packed || (copy && !s->strided);
        a.np = (int32_t)p.n;
        a.x = from_image ? t->x + p.p0 : packed;
        a.x_ic = from_image ? s->x_plane : p.pitch;
        a.x_padded = !from_image;
        a.copy = copy && !s->strided ? packed : NULL;
        a.y = (float *)u->call->y + at;
        a.epi.residual = residual ? residual + at : NULL;
        a.prefetch = s->strided ? super_prefetch(t) : NULL;
        a.panels = side > 1 ? (int32_t)side : 0;
        a.x_panel = from_image ? p.pitch : p.pitch * s->icg;
        u->k->conv_px(&a);
        if (packed) packed += side * p.pitch * s->icg;
    }
}

static void super_enter(const pointwise_run *u, int64_t item, int64_t end, super_panel *t) {
    const pointwise_state *s = u->s;
    const int64_t number = item / s->batches, stop = CBN_MIN((number + 1) * s->batches, end);
    t->next_x = NULL;
    t->nlines = t->line = t->due = 0;
    if (stop < end && s->strided) {
        t->next_x = super_find(u, number + 1, &t->i0, &t->i1);
        super_lines(u, t->i0, t->i1, t);
    }
    t->x = super_find(u, number, &t->i0, &t->i1);
    t->calls = (stop - item) * (t->i1 - t->i0);
}

/* Items are numbered image, group, super-panel, batch of blocks. */
static void pointwise_range(void *arg, int64_t begin, int64_t end, int worker) {
    const pointwise_run *u = arg;
    const pointwise_state *s = u->s;
    float *packed = s->pack ? (float *)(u->scratch + (size_t)worker * u->worker_bytes) : NULL;
    super_panel t = {0};
    for (int64_t item = begin; item < end; item++) {
        const int64_t batch = item % s->batches, number = item / s->batches;
        const int64_t g = number / s->supers % u->d->g, image = number / s->supers / u->d->g;
        const int64_t b0 = batch * s->blocks / s->batches, b1 = (batch + 1) * s->blocks / s->batches;
        const int64_t change = CBN_MAX(CBN_MIN(s->wider, b1), b0); /* the first block that is not wider */
        bool copy = batch == 0 || item == begin;
        if (copy) super_enter(u, item, end, &t);
        copy = copy && packed;
        if (b0 < change) blocks_run(u, image, g, &t, b0, change, packed, copy);
        if (change < b1) blocks_run(u, image, g, &t, change, b1, packed, copy && b0 == change);
    }
}

static cbn_status pointwise_go(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                               const void *state, const cbn_conv_call *call, cbn_error *err) {
    const pointwise_state *s = state;
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    pointwise_run u = {
        .d = d, .k = ctx->kernels, .s = s, .call = call, .worker_bytes = worker_bytes(s)};
    if (call->n == 0) return CBN_OK;
    if (s->pack) {
        u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
        if (!u.scratch)
            return cbn_fail_memory(err, "scratch of a convolution",
                                   u.worker_bytes * (size_t)threads);
    }
    const int64_t work = CBN_MIN(s->super, s->plane) * cbn_ceil_div(s->ocg, s->batches) * s->icg;
    cbn_parallel_for(call->n * d->g * s->supers * s->batches, CBN_MAX(THREAD_WORK / work, 1),
                     threads, pointwise_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static size_t pointwise_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                                  const void *state, int64_t n, int threads) {
    (void)d;
    (void)ctx;
    (void)n;
    return worker_bytes(state) * (size_t)CBN_MAX(threads, 1);
}

static void pointwise_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                               const void *state, char *buf, size_t size) {
    const pointwise_state *s = state;
    (void)d;
    snprintf(buf, size, "%d channels x %d pixels, super-panels of %lld%s", ctx->kernels->px_mr,
             ctx->kernels->px_nv * ctx->kernels->lanes, (long long)s->super,
             s->pack ? ", copied" : "");
}

const cbn_conv_impl cbn_conv_pointwise = {
    .name = "pointwise",
    .supports = pointwise_supports,
    .cost = pointwise_cost,
    .prepare = pointwise_prepare,
    .run = pointwise_go,
    .destroy = pointwise_destroy,
    .workspace_bytes = pointwise_workspace,
    .describe = pointwise_describe,
    .fused_epilogue = true,
};
