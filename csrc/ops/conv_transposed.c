/* SPDX-License-Identifier: BSD-3-Clause */
/* Transposed convolution with a stride, as one matrix product for each of its phases, pixels in vector lanes (kernels
 * panel_pack, conv_px, interleave).
 *
 * Outputs whose coordinates leave the same remainders by the strides form a phase. Output q*stride + r meets the taps
 * t0, t0 + stride, ... where t0 = (r + padding) mod stride, and the j-th of them multiplies input
 * q + first - j: within a phase every pixel q has the same taps at the same distance, so a phase is a
 * matrix product of its weights with a panel that holds channels times taps of some pixels; pixels
 * outside the image are zeros there. Sums are taken over channels, then taps, as everywhere.
 *
 * Pixels q are numbered in one sequence and cut into super-panels whose panels stay in the L2 cache while all blocks of
 * px_mr output channels pass over them. The sums of all column phases of some blocks go to a scratch buffer, from
 * which rows of y are woven whole: y is written in long runs, each cache line once.
 *
 * With taps that do not differ in distance (kernel = stride) one panel serves all phases, and some blocks are woven as
 * soon as they are done. Otherwise each phase has its panels, which serve all blocks of the item. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "ops/conv_cost.h"
#include "ops/conv_pack.h"
#include "ops/conv_transposed_priv.h"
#include "threads/cbn_parallel.h"

enum {
    SUPER_BYTES = 200 * 1024, /* panels of a super-panel */
    MIN_ITEMS = 16,           /* pieces of work there should be, so that threads end together */
    MAX_BATCHES = 2,          /* items that may pack the same panels for different output channels */
    MAX_STRIDE = 64,
    MAX_PANEL = 64,         /* pixels */
    SHARED_PANELS = 6,      /* of a super-panel, when it serves all phases: its sums should stay close, too */
    SUMS_BYTES = 96 * 1024, /* of blocks that are woven together then */
    THREAD_WORK = 500 * 1000 /* multiply-adds worth a thread */
};

/* ---- preparing ------------------------------------------------------------------------------- */
static bool transposed_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    (void)ctx;
    *why_not = NULL;
    if (d->dtype != CBN_F32)
        *why_not = "dtype is not float32";
    else if (!d->transposed)
        *why_not = "not transposed";
    else if (d->stride[2] == 1)
        *why_not = "the columns have no stride";
    for (int a = 0; a < CBN_MAX_SPATIAL && !*why_not; a++) {
        if (d->dil[a] != 1 && d->k[a] != 1)
            *why_not = "dilation";
        else if (d->stride[a] > MAX_STRIDE)
            *why_not = "the stride is large";
    }
    return !*why_not;
}

static int64_t grid_size(const cbn_conv_desc *d, int64_t grid[CBN_MAX_SPATIAL]) {
    int64_t n = 1;
    for (int a = 0; a < CBN_MAX_SPATIAL; a++) n *= grid[a] = cbn_ceil_div(d->out[a], d->stride[a]);
    return n;
}

static double transposed_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const cbn_kernels *k = ctx->kernels;
    int64_t grid[CBN_MAX_SPATIAL];
    const int64_t pixels = grid_size(d, grid), vectors = cbn_ceil_div(pixels, k->lanes),
                  per_panel = cbn_ceil_div(vectors, cbn_ceil_div(vectors, k->px_nv)), ocg = d->oc / d->g;
    /* Padded taps are computed. Fewer than some ten independent sums do not keep the multiply-adders busy. */
    const double taps = (double)(d->k[0] * d->k[1] * d->k[2]) * (double)(d->ic / d->g),
                 rows = (double)(d->g * cbn_ceil_div(ocg, k->px_mr) * k->px_mr),
                 filled = CBN_MIN(0.97, (double)(per_panel * k->px_mr) / 12.0);
    const double products = cbn_cost_fma(k, taps * rows * (double)(vectors * k->lanes), filled);
    /* Weaving takes four cycles a vector; with other strides it goes element by element. */
    const int64_t s = d->stride[2];
    const double out = (double)(d->oc * d->out[0] * d->out[1] * d->out[2]);
    const double pack = ctx->one_shot ? 5.0 * taps * (double)d->oc : 0;
    return products + out * (s == 2 || s == 4 || s == 8 ? 4.0 / k->lanes : 2.0) + pack;
}

static void transposed_destroy(void *state) {
    transposed_state *s = state;
    if (!s) return;
    cbn_conv_direct.destroy(s->direct);
    cbn_free(s->phases[0]);
    cbn_free(s->zeros);
    cbn_free(s->w);
    cbn_free(s);
}

static int64_t remainder_of(int64_t a, int64_t s) { return (a % s + s) % s; }

/* Returns whether all remainders of the axis have the same taps at the same distance. */
static bool phases_fill(const cbn_conv_desc *d, int a, phase *p) {
    const int64_t s = d->stride[a], k = d->k[a];
    int64_t before = 0;
    bool same = true;
    for (int64_t r = 0; r < s; r++) {
        const int64_t t0 = remainder_of(r + d->pad_lo[a], s);
        p[r] = (phase){.t0 = t0, .ntaps = t0 < k ? cbn_ceil_div(k - t0, s) : 0, .before = before};
        p[r].first = (r + d->pad_lo[a] - t0) / s;
        before += p[r].ntaps;
        same = same && p[r].ntaps == p[0].ntaps && p[r].first == p[0].first;
    }
    return same;
}

/* ---- packing ---- */
enum {
    TURN = 4096,      /* floats of some channels that are turned at a time */
    SOURCE = 64 * 1024 /* floats that stay in L1 or L2 while all blocks take theirs */
};

/* A phase that has taps: where they begin among all of them, in the order of phases. */
typedef struct run_of_taps {
    int64_t before, ntaps;
} run_of_taps;

typedef struct pack_job {
    const transposed_state *s;
    const float *w; /* [ic][oc/g][tap] */
    int mr;
    int64_t taps, channels, pieces; /* input channels of an item, items of a group */
    int64_t nruns;
    run_of_taps *runs;
    int64_t *tap; /* in the order of phases */
} pack_job;

static void taps_list(pack_job *j, const cbn_conv_desc *d) {
    phase *const *f = j->s->phases;
    int64_t n = 0, r[CBN_MAX_SPATIAL];
    for (r[0] = 0; r[0] < d->stride[0]; r[0]++)
        for (r[1] = 0; r[1] < d->stride[1]; r[1]++)
            for (r[2] = 0; r[2] < d->stride[2]; r[2]++) {
                const phase *z = &f[0][r[0]], *y = &f[1][r[1]], *x = &f[2][r[2]];
                const int64_t ntaps = cbn_phase_taps(j->s, r);
                if (ntaps > 0) j->runs[j->nruns++] = (run_of_taps){n, ntaps};
                for (int64_t t = 0; t < ntaps; t++) {
                    const int64_t tz = t / x->ntaps / y->ntaps, ty = t / x->ntaps % y->ntaps, tx = t % x->ntaps;
                    j->tap[n++] = ((z->t0 + tz * d->stride[0]) * d->k[1] + y->t0 + ty * d->stride[1]) * d->k[2] +
                                  x->t0 + tx * d->stride[2];
                }
            }
    assert(n == j->taps);
}

/* The taps of channels [i0, i1) for all phases of a block from `turned`, [channel][tap][mr]. */
static void phases_take(const pack_job *j, int64_t g, int64_t b, int64_t i0, int64_t i1, const float *turned) {
    const transposed_state *s = j->s;
    for (const run_of_taps *run = j->runs; run < j->runs + j->nruns; run++) {
        const int64_t *tap = j->tap + run->before;
        const int64_t per_tap = s->icg * s->blocks, at = (b * s->icg + i0) * run->ntaps;
        float *p = s->w + ((g * j->taps + run->before) * per_tap + at) * j->mr;
        for (int64_t i = 0; i < i1 - i0; i++)
            for (int64_t t = 0; t < run->ntaps; t++, p += j->mr) {
                const float *from = turned + (i * j->taps + tap[t]) * j->mr;
                if (j->mr == 6) memcpy(p, from, 6 * sizeof *p); /* without a call */
                else memcpy(p, from, (size_t)j->mr * sizeof *p);
            }
    }
}

/* Items are pieces of the input channels of all groups. */
static void pack_range(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    const pack_job *j = arg;
    const transposed_state *s = j->s;
    float turned[TURN];
    for (int64_t n = begin; n < end; n++) {
        const int64_t g = n / j->pieces, i0 = n % j->pieces * j->channels, i1 = CBN_MIN(i0 + j->channels, s->icg);
        for (int64_t b = 0; b < s->blocks; b++) {
            const int64_t valid = CBN_MIN(s->ocg - b * j->mr, j->mr);
            for (int64_t i = i0; i < i1; i++)
                cbn_pack_rows(turned + (i - i0) * j->taps * j->mr, j->mr,
                              j->w + ((g * s->icg + i) * s->ocg + b * j->mr) * j->taps, j->taps, valid, j->taps);
            phases_take(j, g, b, i0, i1, turned);
        }
    }
}

/* Kernels whose taps do not fit into `turned`. */
static void pack_large(const pack_job *j, const cbn_conv_desc *d) {
    const transposed_state *s = j->s;
    for (int64_t g = 0; g < d->g; g++)
        for (const run_of_taps *run = j->runs; run < j->runs + j->nruns; run++) {
            float *p = s->w + (g * j->taps + run->before) * s->icg * s->blocks * j->mr;
            for (int64_t b = 0; b < s->blocks; b++)
                for (int64_t i = 0; i < s->icg; i++)
                    for (int64_t t = run->before; t < run->before + run->ntaps; t++)
                        for (int64_t c = b * j->mr; c < (b + 1) * j->mr; c++)
                            *p++ = c < s->ocg ? j->w[((g * s->icg + i) * s->ocg + c) * j->taps + j->tap[t]] : 0.0f;
        }
}

static cbn_status weights_pack(const transposed_state *s, const cbn_conv_desc *d, int mr, const float *w,
                               cbn_error *err) {
    const int64_t taps = d->k[0] * d->k[1] * d->k[2], fit = TURN / (taps * mr);
    pack_job job = {.s = s, .w = w, .mr = mr, .taps = taps};
    const size_t each = sizeof *job.runs + sizeof *job.tap;
    job.runs = cbn_alloc_array((size_t)taps, each);
    if (!job.runs) return cbn_fail_memory(err, "the taps of a convolution", (size_t)taps * each);
    job.tap = (int64_t *)(job.runs + taps);
    taps_list(&job, d);
    if (fit > 0) {
        job.channels = CBN_MIN(CBN_MAX(SOURCE / (s->ocg * taps), 1), fit);
        job.pieces = cbn_ceil_div(s->icg, job.channels);
        cbn_parallel_for(d->g * job.pieces, 1 + 4 * SOURCE / (s->ocg * taps * job.channels), 0, pack_range, &job);
    } else {
        pack_large(&job, d);
    }
    cbn_free(job.runs);
    return CBN_OK;
}

static bool all_finite(const float *w, int64_t n) {
    /* An Inf or NaN times zero is NaN and stays one in the sum. */
    float sum[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) sum[l] += w[i + l] * 0.0f;
    for (; i < n; i++) sum[0] += w[i] * 0.0f;
    for (int l = 1; l < 8; l++) sum[0] += sum[l];
    return !isnan(sum[0]);
}

/* Cuts the pixels into panels and super-panels, and the output channels into batches. */
static void work_cut(transposed_state *s, const cbn_conv_desc *d, const cbn_kernels *k) {
    s->pixels = grid_size(d, s->grid);
    s->vectors = cbn_ceil_div(s->pixels, k->lanes);
    s->panels = cbn_ceil_div(s->vectors, k->px_nv);
    s->row_phases = CBN_MIN(d->stride[0], d->out[0]) * CBN_MIN(d->stride[1], d->out[1]);
    s->row_items = s->shared ? 1 : s->row_phases;
    const int64_t depth = CBN_MAX(s->icg * s->max_taps, 1),
                  panel = k->px_nv * k->lanes * (int64_t)sizeof(float);
    int64_t fit = CBN_MAX(SUPER_BYTES / (depth * panel), 1);
    if (s->shared) fit = CBN_MIN(fit, SHARED_PANELS);
    if (s->panels * s->row_items >= MIN_ITEMS) fit = CBN_MIN(fit, s->panels * s->row_items / MIN_ITEMS);
    s->supers = cbn_ceil_div(s->panels, fit);
    s->super = cbn_ceil_div(s->panels, s->supers) * k->px_nv * k->lanes;
    s->batches = CBN_MIN(cbn_ceil_div(MIN_ITEMS, s->supers * s->row_items), CBN_MIN(MAX_BATCHES, s->blocks));
    s->group_blocks = cbn_ceil_div(s->blocks, s->batches);
    if (!s->shared) return;
    const int64_t block = d->stride[2] * k->px_mr * s->super * (int64_t)sizeof(float);
    s->group_blocks = cbn_ceil_div(s->group_blocks, cbn_ceil_div(s->group_blocks * block, SUMS_BYTES));
}

static cbn_status transposed_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w,
                                     void **state, cbn_error *err) {
    const int mr = ctx->kernels->px_mr;
    const int64_t *st = d->stride;
    assert(ctx->kernels->px_nv * ctx->kernels->lanes <= MAX_PANEL);
    transposed_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a transposed convolution", sizeof *s);
    cbn_status status = CBN_OK;
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->blocks = cbn_ceil_div(s->ocg, mr);
    const int64_t taps = d->k[0] * d->k[1] * d->k[2];
    if (!all_finite(w, d->ic * s->ocg * taps)) {
        status = cbn_conv_direct.prepare(d, ctx, w, &s->direct, err);
        goto done;
    }
    const size_t nphases = (size_t)(st[0] + st[1] + st[2]);
    s->phases[0] = cbn_alloc_array(nphases, sizeof *s->phases[0]);
    if (!s->phases[0]) {
        status = cbn_fail_memory(err, "the phases of a convolution", nphases * sizeof *s->phases[0]);
        goto done;
    }
    s->shared = true;
    s->max_taps = 1;
    for (int a = 0; a < CBN_MAX_SPATIAL; a++) {
        if (a > 0) s->phases[a] = s->phases[a - 1] + st[a - 1];
        if (!phases_fill(d, a, s->phases[a])) s->shared = false;
        s->max_taps *= cbn_ceil_div(d->k[a], st[a]);
    }
    work_cut(s, d, ctx->kernels);
    s->plain = s->shared && s->max_taps == 1;
    for (int a = 0; a < CBN_MAX_SPATIAL; a++)
        s->plain = s->plain && s->grid[a] == d->in[a] && s->phases[a][0].first == 0;
    const size_t channels = (size_t)(s->blocks * mr);
    s->zeros = cbn_alloc_or_fail(channels, sizeof *s->zeros, "zeros for a convolution", err);
    if (s->zeros)
        s->w = cbn_alloc_or_fail((size_t)d->g * channels, (size_t)(s->icg * taps) * sizeof *s->w,
                                 "the packed weights of a convolution", err);
    if (!s->w) {
        status = CBN_NO_MEMORY;
        goto done;
    }
    memset(s->zeros, 0, channels * sizeof *s->zeros);
    status = weights_pack(s, d, mr, w, err);
done:
    if (status == CBN_OK)
        *state = s;
    else
        transposed_destroy(s);
    return status;
}

/* ---- running --------------------------------------------------------------------------------- */
/* Items are numbered image, group, super-panel, (depth, height) phase unless panels are shared, batch of blocks. */
static void transposed_range(void *arg, int64_t begin, int64_t end, int worker) {
    const transposed_run *u = arg;
    const transposed_state *s = u->s;
    char *scratch = u->scratch + (size_t)worker * u->worker_bytes;
    item it = {.packed = (float *)scratch};
    it.sums = (float *)(scratch + u->panel_bytes);
    it.moves = (cbn_panel_move *)(scratch + u->panel_bytes + u->sums_bytes);
    const int64_t heights = CBN_MIN(u->d->stride[1], u->d->out[1]);
    int64_t have = -1;
    for (int64_t i = begin; i < end; i++) {
        const int64_t batch = i % s->batches, row = i / s->batches % s->row_items,
                      rest = i / s->batches / s->row_items;
        const int64_t super = rest % s->supers, b0 = batch * s->blocks / s->batches,
                      b1 = (batch + 1) * s->blocks / s->batches;
        it.g = rest / s->supers % u->d->g;
        it.image = rest / s->supers / u->d->g;
        it.p0 = s->panels * super / s->supers;
        it.p1 = s->panels * (super + 1) / s->supers;
        it.pixel0 = cbn_panel_pixel(u, it.p0);
        it.width = cbn_panel_pixel(u, it.p1) - it.pixel0;
        if (s->shared && rest != have) {
            memset(it.r, 0, sizeof it.r);
            it.copy = s->plain;
            it.next = it.next_end = NULL;
            if (s->plain)
                cbn_item_ahead(u, &it);
            else
                cbn_item_pack(u, &it);
        }
        have = rest;
        const int64_t first = s->shared ? 0 : row, count = s->shared ? s->row_phases : 1;
        for (int64_t rows = first; rows < first + count; rows++) {
            it.r[0] = rows / heights;
            it.r[1] = rows % heights;
            cbn_item_rows(u, &it, b0, b1);
        }
    }
}

static void scratch_layout(const transposed_state *s, const cbn_conv_desc *d, const cbn_kernels *k,
                           transposed_run *u) {
    const int64_t f = (int64_t)sizeof(float);
    u->panel_bytes = cbn_whole_lines((size_t)(s->super * s->icg * s->max_taps * f));
    u->sums_bytes = cbn_whole_lines((size_t)(s->group_blocks * d->stride[2] * k->px_mr * s->super * f));
    u->moves_bytes = cbn_whole_lines((size_t)(k->px_nv * k->lanes * s->max_taps * (int64_t)sizeof(cbn_panel_move)));
    u->worker_bytes = u->panel_bytes + u->sums_bytes + u->moves_bytes;
}

static size_t transposed_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                                   int64_t n, int threads) {
    const transposed_state *s = state;
    if (s->direct) return cbn_conv_direct.workspace_bytes(d, ctx, s->direct, n, threads);
    transposed_run u;
    scratch_layout(s, d, ctx->kernels, &u);
    return u.worker_bytes * (size_t)CBN_MAX(threads, 1);
}

static cbn_status transposed_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                                const cbn_conv_call *call, cbn_error *err) {
    const transposed_state *s = state;
    if (s->direct) return cbn_conv_direct.run(d, ctx, s->direct, call, err);
    if (call->n == 0) return CBN_OK;
    transposed_run u = {.d = d, .k = ctx->kernels, .s = s, .call = call};
    u.x_plane = d->in[0] * d->in[1] * d->in[2];
    u.y_plane = d->out[0] * d->out[1] * d->out[2];
    scratch_layout(s, d, ctx->kernels, &u);
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
    if (!u.scratch) return cbn_fail_memory(err, "scratch of a convolution", u.worker_bytes * (size_t)threads);
    const int64_t items = call->n * d->g * s->supers * s->row_items * s->batches;
    const int64_t work = s->pixels * s->icg * s->ocg * d->k[0] * d->k[1] * d->k[2] * d->g * call->n / items;
    cbn_parallel_for(items, CBN_MAX(THREAD_WORK / CBN_MAX(work, 1), 1), threads, transposed_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static void transposed_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                                char *buf, size_t size) {
    const transposed_state *s = state;
    if (s->direct) {
        snprintf(buf, size, "by direct: weights are not finite");
        return;
    }
    snprintf(buf, size, "%lldx%lldx%lld phases of %d channels x %d pixels, super-panels of %lld%s",
             (long long)d->stride[0], (long long)d->stride[1], (long long)d->stride[2], ctx->kernels->px_mr,
             ctx->kernels->px_nv * ctx->kernels->lanes, (long long)s->super,
             s->shared ? ", one for all phases" : "");
}

const cbn_conv_impl cbn_conv_transposed = {
    .name = "transposed",
    .supports = transposed_supports,
    .cost = transposed_cost,
    .prepare = transposed_prepare,
    .run = transposed_go,
    .destroy = transposed_destroy,
    .workspace_bytes = transposed_workspace,
    .describe = transposed_describe,
    .fused_epilogue = true,
};
