/* SPDX-License-Identifier: BSD-3-Clause */
/* Transposed convolution whose kernel is its stride, of two columns, without padding: the up-convolution of U-Nets
 * (kernel conv_px2).
 *
 * Each input pixel makes stride x stride outputs of its own, so the weights are a matrix of 2*oc
 * rows for each (depth, height) phase, an even and an odd column for each channel, and pixels in
 * vector lanes become two neighbouring vectors of a row of y. Stored from registers tile by tile,
 * writing y hides behind the sums of the next tile; conv_transposed.c, which does the same for all
 * kernels and strides, writes y in bursts that do not (measured: 12 % of the time when y does not fit
 * the caches).
 *
 * Rows are cut into panels, which end with the row. A few panels make an item; blocks of output
 * channels whose weights fit half of the L2 cache pass over them. */
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "ops/conv_cost.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    PANELS = 6,               /* of an item */
    PANEL_BYTES = 200 * 1024, /* and most bytes they may take */
    GROUP_BYTES = 160 * 1024, /* weights of the blocks that pass over the panels together */
    MIN_ITEMS = 16,           /* pieces of work there should be, so that threads end together */
    MAX_BATCHES = 4,          /* items that may copy the same panels */
    THREAD_WORK = 500 * 1000  /* multiply-adds worth a thread */
};

typedef struct upconv_state {
    int64_t icg, ocg;
    int64_t mr, wide, narrow; /* blocks of mr rows, then of mr - 2 */
    int64_t row_vectors, row_panels, panels, fit, supers;
    int64_t batches, group; /* items of the blocks of a super-panel; blocks that pass together */
    float *w; /* [group][phase][block][channel][rows of the block], zeros beyond the last */
} upconv_state;

static bool upconv_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    (void)ctx;
    *why_not = NULL;
    if (d->dtype != CBN_F32)
        *why_not = "dtype is not float32";
    else if (!d->transposed)
        *why_not = "not transposed";
    else if (d->stride[2] != 2)
        *why_not = "the stride of the columns is not 2";
    for (int a = 0; a < CBN_MAX_SPATIAL && !*why_not; a++) {
        if (d->k[a] != d->stride[a])
            *why_not = "kernel is not stride";
        else if (d->dil[a] != 1 && d->k[a] != 1)
            *why_not = "dilation";
        else if (d->pad_lo[a] != 0 || d->out[a] != d->in[a] * d->stride[a])
            *why_not = "padding";
    }
    return !*why_not;
}

static double upconv_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const cbn_kernels *k = ctx->kernels;
    const int64_t vectors = cbn_ceil_div(d->in[2], k->lanes),
                  per_panel = cbn_ceil_div(vectors, cbn_ceil_div(vectors, k->px_nv));
    /* Lanes beyond the end of a row are computed; few sums in a tile do not keep the multiply-adders busy. */
    const double filled = CBN_MIN(0.97, (double)(per_panel * k->px_mr) / 12.0) * (double)d->in[2] /
                          (double)(vectors * k->lanes);
    const double out = (double)(d->oc * d->out[0] * d->out[1] * d->out[2]);
    const double pack = ctx->one_shot ? 6.0 * (double)(d->ic / d->g * d->oc * d->k[0] * d->k[1] * d->k[2]) : 0;
    return cbn_cost_fma(k, cbn_cost_real_fmas(d), filled) + out * 1.5 / k->lanes + pack;
}

static void upconv_destroy(void *state) {
    upconv_state *s = state;
    if (!s) return;
    cbn_free(s->w);
    cbn_free(s);
}

/* First row of a block. */
static int64_t block_row(const upconv_state *s, int64_t b) { return b * s->mr - 2 * CBN_MAX(b - s->wide, 0); }

static int64_t phases_of(const cbn_conv_desc *d) { return d->stride[0] * d->stride[1]; }

static int64_t group_rows(const upconv_state *s) { return block_row(s, s->wide + s->narrow); }

static void upconv_pack(const upconv_state *s, const cbn_conv_desc *d, const float *w) {
    const int64_t taps = phases_of(d) * 2;
    float *p = s->w;
    for (int64_t g = 0; g < d->g; g++)
        for (int64_t t = 0; t < taps; t += 2)
            for (int64_t b = 0; b < s->wide + s->narrow; b++)
                for (int64_t i = 0; i < s->icg; i++)
                    for (int64_t r = block_row(s, b); r < block_row(s, b + 1); r++)
                        *p++ =
                            r < 2 * s->ocg ? w[((g * s->icg + i) * s->ocg + r / 2) * taps + t + r % 2] : 0.0f;
}

static cbn_status upconv_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w,
                                 void **state, cbn_error *err) {
    const cbn_kernels *k = ctx->kernels;
    upconv_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a transposed convolution", sizeof *s);
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->mr = k->px_mr;
    /* As few blocks as can be, and as many narrow ones of them as leave no row empty. */
    const int64_t blocks = cbn_ceil_div(2 * s->ocg, s->mr);
    s->narrow = CBN_MIN((blocks * s->mr - 2 * s->ocg) / 2, blocks);
    s->wide = blocks - s->narrow;
    s->row_vectors = cbn_ceil_div(d->in[2], k->lanes);
    s->row_panels = cbn_ceil_div(s->row_vectors, k->px_nv);
    s->panels = d->in[0] * d->in[1] * s->row_panels;
    const int64_t f = (int64_t)sizeof(float), panel = s->icg * k->px_nv * k->lanes * f;
    s->fit = CBN_MAX(CBN_MIN(PANEL_BYTES / panel, PANELS), 1);
    s->fit = CBN_MAX(CBN_MIN(s->fit, s->panels / MIN_ITEMS), 1);
    s->supers = cbn_ceil_div(s->panels, s->fit);
    s->batches = CBN_MIN(cbn_ceil_div(MIN_ITEMS, s->supers), CBN_MIN(MAX_BATCHES, blocks));
    const int64_t most = CBN_MAX(GROUP_BYTES / (s->mr * s->icg * f), 1),
                  batch = cbn_ceil_div(blocks, s->batches);
    s->group = cbn_ceil_div(batch, cbn_ceil_div(batch, most));
    s->w = cbn_alloc_or_fail((size_t)(d->g * phases_of(d) * group_rows(s)), (size_t)s->icg * sizeof *s->w,
                             "the packed weights of a convolution", err);
    if (!s->w) {
        upconv_destroy(s);
        return CBN_NO_MEMORY;
    }
    upconv_pack(s, d, w);
    *state = s;
    return CBN_OK;
}

typedef struct upconv_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const upconv_state *s;
    const cbn_conv_call *call;
    int64_t x_plane, y_plane;
    char *scratch;
    size_t worker_bytes;
} upconv_run;

/* n pixels of a row of x from column x on. */
typedef struct panel {
    int64_t row, x, n, pitch;
} panel;

static panel panel_get(const upconv_run *u, int64_t number) {
    const upconv_state *s = u->s;
    const int64_t i = number % s->row_panels;
    panel p = {.row = number / s->row_panels, .x = s->row_vectors * i / s->row_panels * u->k->lanes};
    p.pitch = s->row_vectors * (i + 1) / s->row_panels * u->k->lanes - p.x;
    p.n = CBN_MIN(p.pitch, u->d->in[2] - p.x);
    return p;
}

/* Panels [p0, p1) of a group of channels of an image. */
typedef struct item {
    int64_t image, g, p0, p1;
    float *packed;
    int64_t ahead; /* next panel to ask for early */
} item;

/* Blocks [b0, b1), all of one width, of one phase. copy: the panels are read from the image, and kept. */
static void blocks_run(const upconv_run *u, item *it, int64_t phase, int64_t b0, int64_t b1, bool copy) {
    const upconv_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    const int64_t row0 = block_row(s, b0), oc0 = it->g * s->ocg + row0 / 2;
    const float *x = (const float *)u->call->x + (it->image * d->ic + it->g * s->icg) * u->x_plane;
    const float *residual = u->call->residual;
    cbn_conv_px_args a = {.ic = s->icg, .y_oc = u->y_plane, .prefetch_step = u->x_plane};
    a.mr = (int32_t)(b0 < s->wide ? s->mr : s->mr - 2);
    a.oc_valid = (int32_t)CBN_MIN((b1 - b0) * a.mr, 2 * s->ocg - row0);
    a.w = s->w + ((it->g * phases_of(d) + phase) * group_rows(s) + row0) * s->icg;
    a.epi = (cbn_epilogue_args){(const float *)u->call->bias + oc0, NULL, u->call->lo, u->call->hi};
    float *packed = it->packed;
    for (int64_t i = it->p0; i < it->p1; i++) {
        const panel p = panel_get(u, i);
        const int64_t oz = p.row / d->in[1] * d->stride[0] + phase / d->stride[1],
                      oy = p.row % d->in[1] * d->stride[1] + phase % d->stride[1];
        const int64_t at =
            (it->image * d->oc + oc0) * u->y_plane + (oz * d->out[1] + oy) * d->out[2] + 2 * p.x;
        a.np = (int32_t)p.n;
        a.x = copy ? x + p.row * d->in[2] + p.x : packed;
        a.x_ic = copy ? u->x_plane : p.pitch;
        a.x_padded = !copy;
        a.copy = copy ? packed : NULL;
        a.y = (float *)u->call->y + at;
        a.epi.residual = residual ? residual + at : NULL;
        a.prefetch = NULL;
        if (it->ahead < CBN_MIN(it->p1 + (it->p1 - it->p0), s->panels)) {
            const panel next = panel_get(u, it->ahead++);
            a.prefetch = x + next.row * d->in[2] + next.x;
        }
        u->k->conv_px2(&a);
        packed += p.pitch * s->icg;
    }
}

/* Items are numbered image, group, super-panel, batch of blocks. */
static void upconv_range(void *arg, int64_t begin, int64_t end, int worker) {
    const upconv_run *u = arg;
    const upconv_state *s = u->s;
    const int64_t blocks = s->wide + s->narrow, phases = phases_of(u->d);
    item it = {.packed = (float *)(u->scratch + (size_t)worker * u->worker_bytes)};
    int64_t have = -1;
    for (int64_t i = begin; i < end; i++) {
        const int64_t batch = i % s->batches, rest = i / s->batches, super = rest % s->supers;
        const int64_t b0 = batch * blocks / s->batches, b1 = (batch + 1) * blocks / s->batches;
        it.g = rest / s->supers % u->d->g;
        it.image = rest / s->supers / u->d->g;
        it.p0 = s->panels * super / s->supers;
        it.p1 = s->panels * (super + 1) / s->supers;
        bool copy = rest != have;
        if (copy) it.ahead = it.p1;
        have = rest;
        for (int64_t phase = 0; phase < phases; phase++) {
            for (int64_t b = b0; b < b1; b += s->group) {
                const int64_t stop = CBN_MIN(b + s->group, b1), change = CBN_MAX(CBN_MIN(s->wide, stop), b);
                if (b < change) blocks_run(u, &it, phase, b, change, copy);
                if (change < stop) blocks_run(u, &it, phase, change, stop, copy && b == change);
                copy = false;
            }
        }
    }
}

static size_t worker_bytes(const upconv_state *s, const cbn_kernels *k) {
    return cbn_whole_lines((size_t)(s->fit * k->px_nv * k->lanes * s->icg) * sizeof(float));
}

static cbn_status upconv_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                            const cbn_conv_call *call, cbn_error *err) {
    const upconv_state *s = state;
    if (call->n == 0) return CBN_OK;
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    upconv_run u = {
        .d = d, .k = ctx->kernels, .s = s, .call = call, .worker_bytes = worker_bytes(s, ctx->kernels)};
    u.x_plane = d->in[0] * d->in[1] * d->in[2];
    u.y_plane = d->out[0] * d->out[1] * d->out[2];
    u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
    if (!u.scratch) return cbn_fail_memory(err, "scratch of a convolution", u.worker_bytes * (size_t)threads);
    const int64_t per_image = d->g * s->supers * s->batches;
    const int64_t work = u.y_plane * s->icg * d->oc / per_image;
    cbn_parallel_for(call->n * per_image, CBN_MAX(THREAD_WORK / CBN_MAX(work, 1), 1), threads, upconv_range,
                     &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static size_t upconv_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                               int64_t n, int threads) {
    (void)d;
    (void)n;
    return worker_bytes(state, ctx->kernels) * (size_t)CBN_MAX(threads, 1);
}

static void upconv_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                            size_t size) {
    const upconv_state *s = state;
    (void)d;
    snprintf(buf, size, "2 columns of %d channels x %d pixels, %lld panels at a time",
             ctx->kernels->px_mr / 2, ctx->kernels->px_nv * ctx->kernels->lanes, (long long)s->fit);
}

const cbn_conv_impl cbn_conv_upconv = {
    .name = "upconv",
    .supports = upconv_supports,
    .cost = upconv_cost,
    .prepare = upconv_prepare,
    .run = upconv_go,
    .destroy = upconv_destroy,
    .workspace_bytes = upconv_workspace,
    .describe = upconv_describe,
    .fused_epilogue = true,
};
