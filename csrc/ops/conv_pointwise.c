/* SPDX-License-Identifier: BSD-3-Clause */
/* 1x1 convolution: a matrix product whose pixels lie in vector lanes (kernel conv_px).
 *
 * The plane is cut into panels of px_nv vectors, and panels into super-panels whose input stays in
 * the L2 cache while all blocks of px_mr output channels pass over it; a block's weights stay in L1
 * while it passes over the panels.
 *
 * With enough blocks the super-panel is first copied, so that a panel is one piece of memory: in
 * the image every channel is another page, and rows rarely start at a multiple of a vector
 * (together up to 25 % of the time, measured). The copy also picks the pixels of a strided
 * convolution. */
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include "ops/conv_cost.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    /* Input of a super-panel: more than this falls out of L2 (measured: 1024 channels, 14x14, 5 %
     * slower at 800 KB). */
    SUPER_BYTES = 200 * 1024,
    PACK_BLOCKS = 8, /* blocks it takes to earn back the copy */
    MIN_VECTORS = 8,
    MIN_VECTORS_STRIDED = 4, /* less: conv_direct copies wider windows for these */
    MAX_PANEL = 64,          /* pixels */
    THREAD_WORK = 500 * 1000
};

typedef struct pointwise_state {
    int64_t icg, ocg, blocks;
    int64_t plane, x_plane; /* pixels of a channel of y and of x */
    int64_t vectors, panels,
        supers;    /* the plane's vectors are spread evenly over panels, these over super-panels */
    int64_t super; /* most pixels in a super-panel, rounded up to vectors */
    bool strided, pack;
    size_t w_bytes;
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
    for (int a = 0; a < CBN_MAX_SPATIAL && !*why_not; a++) {
        if (d->k[a] != 1)
            *why_not = "kernel is not 1";
        else if (d->pad_lo[a] != 0 || d->pad_hi[a] != 0)
            *why_not = "padding is not 0";
    }
    if (!*why_not && strided && d->oc / d->g < PACK_BLOCKS * ctx->kernels->px_mr)
        *why_not = "strided with too few output channels to earn back a copy of the input";
    /* conv_direct wastes no lane on the last pixels of a plane; here they cost a vector each. */
    const int64_t least = (strided ? MIN_VECTORS_STRIDED : MIN_VECTORS) * ctx->kernels->lanes;
    if (!*why_not && plane < least) *why_not = "the map is small";
    return !*why_not;
}

static double pointwise_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    return cbn_cost_fma(ctx->kernels, cbn_cost_real_fmas(d), 0.9);
}

static void pointwise_destroy(void *state) {
    pointwise_state *s = state;
    if (!s) return;
    cbn_free(s->w);
    cbn_free(s);
}

static cbn_status pointwise_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx,
                                    const void *w, void **state, cbn_error *err) {
    const int64_t mr = ctx->kernels->px_mr;
    pointwise_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a pointwise convolution", sizeof *s);
    s->icg = d->ic / d->g;
    s->ocg = d->oc / d->g;
    s->blocks = cbn_ceil_div(s->ocg, mr);
    s->plane = d->out[0] * d->out[1] * d->out[2];
    s->x_plane = d->in[0] * d->in[1] * d->in[2];
    s->strided = d->stride[0] * d->stride[1] * d->stride[2] != 1;
    s->pack = s->strided || s->blocks >= PACK_BLOCKS;
    assert(ctx->kernels->px_nv * ctx->kernels->lanes <= MAX_PANEL);
    const int64_t lanes = ctx->kernels->lanes, nv = ctx->kernels->px_nv;
    s->vectors = cbn_ceil_div(s->plane, lanes);
    s->panels = cbn_ceil_div(s->vectors, nv);
    const int64_t fit = CBN_MAX(SUPER_BYTES / (s->icg * nv * lanes * (int64_t)sizeof(float)), 1);
    s->supers = cbn_ceil_div(s->panels, fit);
    s->super = cbn_ceil_div(s->panels, s->supers) * nv * lanes;
    int64_t n;
    const bool fits =
        cbn_mul_ok(d->g * s->blocks * mr, s->icg, &n) && cbn_mul_ok(n, sizeof(float), &n);
    s->w_bytes = fits ? (size_t)n : SIZE_MAX;
    s->w = fits ? cbn_alloc(s->w_bytes) : NULL;
    if (!s->w) {
        pointwise_destroy(s);
        return cbn_fail_memory(err, "the packed weights of a convolution",
                               fits ? (size_t)n : SIZE_MAX);
    }
    float *p = s->w;
    for (int64_t g = 0; g < d->g; g++) {
        for (int64_t b = 0; b < s->blocks; b++) {
            const float *from = (const float *)w + (g * s->ocg + b * mr) * s->icg;
            for (int64_t i = 0; i < s->icg; i++)
                for (int64_t c = 0; c < mr; c++)
                    *p++ = b * mr + c < s->ocg ? from[c * s->icg + i] : 0.0f;
        }
    }
    *state = s;
    return CBN_OK;
}

/* First pixel of a panel; that of panel number `panels` is at or past the end of the plane. */
static int64_t panel_pixel(const pointwise_state *s, const cbn_kernels *k, int64_t panel) {
    return s->vectors * panel / s->panels * k->lanes;
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

/* Copies n pixels from p0 on of every channel to out[channel][pixel], `pitch` apart. */
static void panel_pack(const pointwise_run *u, const float *x, int64_t p0, int64_t n, int64_t pitch,
                       float *out) {
    const pointwise_state *s = u->s;
    const cbn_conv_desc *d = u->d;
    if (s->strided) {
        int64_t from[MAX_PANEL];
        for (int64_t p = 0; p < n; p++) {
            const int64_t c = (p0 + p) % d->out[2], b = (p0 + p) / d->out[2] % d->out[1];
            const int64_t a = (p0 + p) / d->out[2] / d->out[1];
            from[p] =
                (a * d->stride[0] * d->in[1] + b * d->stride[1]) * d->in[2] + c * d->stride[2];
        }
        for (int64_t i = 0; i < s->icg; i++, out += pitch, x += s->x_plane)
            for (int64_t p = 0; p < n; p++) out[p] = x[from[p]];
    } else if (n == 24) { /* a size the compiler knows becomes a few vector moves */
        for (int64_t i = 0; i < s->icg; i++, out += pitch)
            memcpy(out, x + i * s->x_plane + p0, 24 * sizeof(float));
    } else if (n == 16) {
        for (int64_t i = 0; i < s->icg; i++, out += pitch)
            memcpy(out, x + i * s->x_plane + p0, 16 * sizeof(float));
    } else {
        for (int64_t i = 0; i < s->icg; i++, out += pitch)
            memcpy(out, x + i * s->x_plane + p0, (size_t)n * sizeof(float));
    }
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

/* One block of output channels over panels [first, end); packed: NULL or these panels one after the
 * other. */
static void block_run(const pointwise_run *u, int64_t image, int64_t g, int64_t first, int64_t end,
                      int64_t b, const float *x, const float *packed) {
    const pointwise_state *s = u->s;
    const int64_t mr = u->k->px_mr, oc0 = g * s->ocg + b * mr;
    const float *residual = u->call->residual;
    cbn_conv_px_args a = {.y_oc = s->plane, .ic = s->icg};
    a.w = s->w + (g * s->blocks + b) * s->icg * mr;
    a.oc_valid = (int32_t)CBN_MIN(s->ocg - b * mr, mr);
    a.epi = (cbn_epilogue_args){(const float *)u->call->bias + oc0, NULL, u->call->lo, u->call->hi};
    for (int64_t i = first; i < end; i++) {
        const panel p = panel_get(u, i);
        const int64_t at = (image * u->d->oc + oc0) * s->plane + p.p0;
        a.np = (int32_t)p.n;
        a.x = packed ? packed : x + p.p0;
        a.x_ic = packed ? p.pitch : s->x_plane;
        a.y = (float *)u->call->y + at;
        a.epi.residual = residual ? residual + at : NULL;
        u->k->conv_px(&a);
        if (packed) packed += p.pitch * s->icg;
    }
}

/* Items are numbered image, group, super-panel, block. */
static void pointwise_range(void *arg, int64_t begin, int64_t end, int worker) {
    const pointwise_run *u = arg;
    const pointwise_state *s = u->s;
    float *packed = s->pack ? (float *)(u->scratch + (size_t)worker * u->worker_bytes) : NULL;
    int64_t have = -1;
    for (int64_t item = begin; item < end; item++) {
        const int64_t b = item % s->blocks, rest = item / s->blocks;
        const int64_t image = rest / s->supers / u->d->g, g = rest / s->supers % u->d->g,
                      super = rest % s->supers;
        const int64_t i0 = s->panels * super / s->supers, i1 = s->panels * (super + 1) / s->supers;
        const float *x = (const float *)u->call->x + (image * u->d->ic + g * s->icg) * s->x_plane;
        if (packed && rest != have) {
            float *out = packed;
            for (int64_t i = i0; i < i1; i++) {
                const panel p = panel_get(u, i);
                panel_pack(u, x, p.p0, p.n, p.pitch, out);
                out += p.pitch * s->icg;
            }
        }
        have = rest;
        block_run(u, image, g, i0, i1, b, x, packed);
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
    const int64_t work = CBN_MIN(s->super, s->plane) * ctx->kernels->px_mr * s->icg;
    cbn_parallel_for(call->n * d->g * s->supers * s->blocks, CBN_MAX(THREAD_WORK / work, 1),
                     threads, pointwise_range, &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static size_t pointwise_state_bytes(const void *state) {
    return sizeof(pointwise_state) + ((const pointwise_state *)state)->w_bytes;
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
    .state_bytes = pointwise_state_bytes,
    .workspace_bytes = pointwise_workspace,
    .describe = pointwise_describe,
    .fused_epilogue = true,
};
