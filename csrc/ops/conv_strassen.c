/* SPDX-License-Identifier: BSD-3-Clause */
/* 1x1 convolution with 7/8 of the multiplications, for precision "fast": one level of Strassen's matrix product
 * (V. Strassen, Gaussian elimination is not optimal, Numer. Math. 13, 1969) in the form of S. Winograd (1971) that
 * needs 15 additions.
 *
 * Output channels (rows of the weights A), input channels and two neighbouring panels of pixels (columns of the input
 * B) are the halves of a 2x2 product C = A B:
 *   S1 = A21 + A22, S2 = S1 - A11, S3 = A11 - A21, S4 = A12 - S2     made once, in double, rounded once
 *   T1 = B12 - B11, T2 = B22 - T1, T3 = B22 - B12, T4 = B21 - T2     made for each super-panel
 *   C11 = A11 B11 + A12 B21       U2 = A11 B11 + S2 T2               U3 = U2 + S3 T3
 *   C12 = U2 + S1 T1 + S4 B22     C21 = U3 + A22 T4                  C22 = U3 + S1 T1
 * The seven products are calls of conv_px whose `residual` is the sum so far: sums wait in the parts of y that become
 * their results. S1 T1 is needed twice and added apart. Pixels that fill no pair of panels are summed as usual.
 *
 * Error (N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, section 23.2.2), with u = 2^-24
 * and n input channels of a group, in the norm max |.| over a group's weights and a pair of panels:
 *   |C - exact| <= (18 (n^2/4 + 3 n) - 6 n) u |A| |B| + O(u^2)
 * It is a bound for the norm only: an output that is small beside its neighbours is not as accurate relative to its
 * own size. Measured, the rms error is 2 to 2.5 times that of one sequential sum.
 *
 * T mixes pixels, so that an Inf or NaN would spread, and intermediate sums may overflow where the result does not.
 * Both need large values: sum |A| * sum |B| bounds all that is ever added, and an image where it is not far below the
 * largest float is left to `direct`. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "base/cbn_alloc.h"
#include "ops/conv_cost.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"

enum {
    SUPER_BYTES = 200 * 1024, /* right operands of a super-panel and ... */
    BATCH_BYTES = 128 * 1024, /* weights of one product of a batch of blocks: both stay in L2 */
    Y_BYTES = 64 * 1024, /* outputs of a batch: they are sums for a while */
    LEAST_CHANNELS = 128,
    LEAST_PIXELS = 64, /* less: conv_direct wastes no lane */
    MAX_PANEL = 64, /* pixels */
    CHUNK = 4,
    AHEAD = 8, /* channels */
    LINE = CBN_CACHE_LINE / sizeof(float),
    THREAD_WORK = 500 * 1000
};

/* Left and right operands as they are stored; only the pixels beyond the pairs need A21. */
enum { A11, A12, A22, S1, S2, S3, S4, A21, LEFT };
enum { B11, B21, B22, T1, T2, T3, T4, RIGHT };
enum { C11, C12, C21, C22, NONE };

typedef struct strassen_state {
    int64_t ic2, oc2;              /* channels of a half */
    int64_t blocks, narrow, wider; /* of a half: blocks of `narrow` output channels, the first `wider` of one more */
    int64_t batches;
    int64_t plane, panel;       /* pixels of a channel, of a panel */
    int64_t pairs, supers, fit; /* pairs are spread evenly over super-panels, at most `fit` each */
    int64_t rest, rest_panels, rest_vectors; /* pixels beyond the pairs */
    int64_t operand;            /* floats of a right operand and some, lest all start in the same lines of L1 */
    float limit;                /* of the sum of a column's absolute values */
    float *w;     /* [group][left operand][block][channel][width of the block] */
    float *zeros; /* [oc2] */
} strassen_state;

static bool strassen_supports(const cbn_conv_desc *d, const cbn_conv_context *ctx, const char **why_not) {
    const int64_t icg = d->ic / d->g, ocg = d->oc / d->g;
    *why_not = NULL;
    if (ctx->precision != CBN_PRECISION_FAST)
        *why_not = "precision is not fast";
    else if (d->dtype != CBN_F32)
        *why_not = "dtype is not float32";
    else if (d->nd == 0)
        *why_not = "linear has no pixels to put into lanes";
    else if (d->transposed)
        *why_not = "transposed";
    else if (ctx->one_shot)
        *why_not = "sums of the weights do not pay off in one call";
    else if (icg < LEAST_CHANNELS || ocg < LEAST_CHANNELS)
        *why_not = "fewer than 128 channels";
    else if (icg % 2 != 0 || ocg % 2 != 0)
        *why_not = "odd number of channels";
    for (int a = 0; a < CBN_MAX_SPATIAL && !*why_not; a++) {
        if (d->k[a] != 1)
            *why_not = "kernel is not 1";
        else if (d->stride[a] != 1)
            *why_not = "stride is not 1";
        else if (d->pad_lo[a] != 0 || d->pad_hi[a] != 0)
            *why_not = "padding is not 0";
    }
    const int64_t least = CBN_MAX(2 * ctx->kernels->px_nv * ctx->kernels->lanes, LEAST_PIXELS);
    if (!*why_not && d->out[0] * d->out[1] * d->out[2] < least) *why_not = "the map is small";
    return !*why_not;
}

/* Beside the products there are T1 to T4 to be made, and sums to be stored and loaded once more: so many cycles for
 * each column of a pair and channel (measured). Few channels do not earn them back. */
static double strassen_cost(const cbn_conv_desc *d, const cbn_conv_context *ctx) {
    const cbn_kernels *k = ctx->kernels;
    const double icg = (double)(d->ic / d->g), ocg = (double)(d->oc / d->g), g = (double)d->g;
    const int64_t plane = d->out[0] * d->out[1] * d->out[2], panel = k->px_nv * k->lanes;
    const int64_t pairs = plane / (2 * panel), rest = plane - pairs * 2 * panel;
    const double columns = (double)(pairs * panel);
    const int64_t vectors = cbn_ceil_div(rest, k->lanes), panels = cbn_ceil_div(vectors, k->px_nv);
    const double taken = (double)(CBN_MAX(vectors, panels * 8 / k->px_mr) * k->lanes);
    const double fmas = g * icg * ocg * (columns * 7.0 / 4.0 + taken);
    return cbn_cost_fma(k, fmas, 0.93) + g * columns * (icg * 1.7 + ocg * 2.5);
}

static void strassen_destroy(void *state) {
    strassen_state *s = state;
    if (!s) return;
    cbn_free(s->w);
    cbn_free(s->zeros);
    cbn_free(s);
}

/* First output channel of a block; that of block number `blocks` is oc2. */
static int64_t block_channel(const strassen_state *s, int64_t b) { return b * s->narrow + CBN_MIN(b, s->wider); }

static int64_t left_operands(const strassen_state *s) { return s->rest ? LEFT : A21; }

static const float *left_operand(const strassen_state *s, int64_t g, int which, int64_t b) {
    return s->w + ((g * left_operands(s) + which) * s->oc2 + block_channel(s, b)) * s->ic2;
}

/* Element of a left operand; a: where A11 has it, the other quarters lie so many elements on. */
static float left_element(const float *a, int64_t right, int64_t down, int which) {
    const double a11 = a[0], a12 = a[right], a21 = a[down], a22 = a[down + right], s1 = a21 + a22, s2 = s1 - a11;
    const double all[LEFT] = {
        [A11] = a11, [A12] = a12, [A22] = a22, [S1] = s1, [S2] = s2, [S3] = a11 - a21, [S4] = a12 - s2, [A21] = a21};
    return (float)all[which];
}

/* Packs the weights; *total: sum of their absolute values. */
static void weights_pack(const cbn_conv_desc *d, const strassen_state *s, const float *w, double *total) {
    float *to = s->w;
    *total = 0.0;
    for (int64_t g = 0; g < d->g; g++) {
        for (int which = 0; which < left_operands(s); which++) {
            for (int64_t b = 0; b < s->blocks; b++) {
                const int64_t c0 = block_channel(s, b), c1 = block_channel(s, b + 1);
                for (int64_t i = 0; i < s->ic2; i++) {
                    for (int64_t c = c0; c < c1; c++) {
                        const float *a = w + (g * 2 * s->oc2 + c) * 2 * s->ic2 + i;
                        *to = left_element(a, s->ic2, s->oc2 * 2 * s->ic2, which);
                        *total += fabs((double)*to++);
                    }
                }
            }
        }
    }
}

static cbn_status strassen_prepare(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *w, void **state,
                                   cbn_error *err) {
    const int64_t mr = ctx->kernels->px_mr, lanes = ctx->kernels->lanes, nv = ctx->kernels->px_nv;
    strassen_state *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a pointwise convolution", sizeof *s);
    s->ic2 = d->ic / d->g / 2;
    s->oc2 = d->oc / d->g / 2;
    s->blocks = cbn_ceil_div(s->oc2, mr);
    s->narrow = s->oc2 / s->blocks;
    s->wider = s->oc2 % s->blocks;
    s->plane = d->out[0] * d->out[1] * d->out[2];
    s->panel = nv * lanes;
    assert(s->panel <= MAX_PANEL && s->panel % CHUNK == 0);
    s->operand = s->ic2 * s->panel + LINE;
    s->pairs = s->plane / (2 * s->panel);
    s->supers = cbn_ceil_div(s->pairs, CBN_MAX(SUPER_BYTES / (RIGHT * s->operand * (int64_t)sizeof(float)), 1));
    s->fit = cbn_ceil_div(s->pairs, s->supers);
    /* A block's weights for one product, its outputs. */
    const int64_t w_block = mr * s->ic2 * (int64_t)sizeof(float);
    const int64_t y_block = s->fit * 4 * mr * s->panel * (int64_t)sizeof(float);
    const int64_t fit_blocks = CBN_MAX(CBN_MIN(BATCH_BYTES / w_block, Y_BYTES / y_block), 1);
    s->batches = cbn_ceil_div(s->blocks, fit_blocks);
    s->rest = s->plane - s->pairs * 2 * s->panel;
    s->rest_vectors = cbn_ceil_div(s->rest, lanes);
    s->rest_panels = cbn_ceil_div(s->rest_vectors, nv);
    s->w = cbn_alloc_or_fail((size_t)(d->g * left_operands(s) * s->oc2), (size_t)s->ic2 * sizeof *s->w,
                             "the packed weights of a convolution", err);
    if (s->w) s->zeros = cbn_alloc_or_fail((size_t)s->oc2, sizeof *s->zeros, "zeros for a convolution", err);
    if (!s->zeros) {
        strassen_destroy(s);
        return CBN_NO_MEMORY;
    }
    memset(s->zeros, 0, (size_t)s->oc2 * sizeof *s->zeros);
    double total;
    weights_pack(d, s, w, &total);
    /* 0 when a weight is Inf or NaN. */
    s->limit = total >= 0.0 ? (float)CBN_MIN(FLT_MAX / (8.0 * total), FLT_MAX) : 0.0f;
    *state = s;
    return CBN_OK;
}

typedef struct strassen_run {
    const cbn_conv_desc *d;
    const cbn_kernels *k;
    const strassen_state *s;
    const cbn_conv_call *call;
    char *scratch;
    size_t worker_bytes;
} strassen_run;

static int64_t rest_pitch(const strassen_state *s, int lanes) { return s->rest_vectors * lanes; }

/* A worker's scratch: [pair][right operand], then the channels of the pixels beyond the pairs. */
static size_t worker_bytes(const strassen_state *s, int lanes) {
    const int64_t floats = s->fit * RIGHT * s->operand + 2 * s->ic2 * rest_pitch(s, lanes);
    return (size_t)(cbn_ceil_div(floats, LINE) * LINE) * sizeof(float);
}

/* CHUNK pixels of a channel of T1 to T4, which lie `step` floats apart. size: grows by the absolute values. The
 * number is fixed because copies of any length would become calls of memcpy. */
CBN_INLINE void right_chunk(const float *restrict x, int64_t panel, int64_t down, float *restrict out, int64_t step,
                            float *restrict size) {
    float v[4][CHUNK], t[4][CHUNK];
    CBN_UNROLL for (int i = 0; i < CHUNK; i++) {
        v[0][i] = x[i];
        v[1][i] = x[panel + i];
        v[2][i] = x[down + i];
        v[3][i] = x[down + panel + i];
        size[i] += (fabsf(v[0][i]) + fabsf(v[1][i])) + (fabsf(v[2][i]) + fabsf(v[3][i]));
        t[0][i] = v[1][i] - v[0][i];
        t[1][i] = v[3][i] - t[0][i];
        t[2][i] = v[3][i] - v[1][i];
        t[3][i] = v[2][i] - t[1][i];
    }
    CBN_UNROLL for (int o = 0; o < 4; o++)
        CBN_UNROLL for (int i = 0; i < CHUNK; i++) out[o * step + i] = t[o][i];
}

/* T1 to T4 of the pair of panels at x; false: too large to be sure that nothing overflows. */
static bool pair_pack(const strassen_state *s, const float *x, float *out) {
    float size[MAX_PANEL] = {0};
    const int64_t n = s->panel, step = s->operand, down = s->ic2 * s->plane;
    for (int64_t i = 0; i < s->ic2; i++, x += s->plane, out += n) {
        /* The hardware does not foresee a walk over channels. */
        const float *ahead = x + CBN_MIN(AHEAD, s->ic2 - 1 - i) * s->plane;
        for (int64_t p = 0; p < 2 * n + LINE; p += LINE) {
            __builtin_prefetch(ahead + CBN_MIN(p, 2 * n - 1));
            __builtin_prefetch(ahead + down + CBN_MIN(p, 2 * n - 1));
        }
        for (int64_t p = 0; p < n; p += CHUNK) right_chunk(x + p, n, down, out + p, step, size + p);
    }
    bool ok = true;
    for (int64_t p = 0; p < n; p++) ok &= size[p] < s->limit;
    return ok;
}

/* A batch of blocks [b0, b1) of a super-panel, pairs [i0, i1) and perhaps the rest, of a group of an image. */
typedef struct job {
    int64_t g, b0, b1, i0, i1;
    bool rest;
    const float *x; /* first pixel of the group: the first batch reads B there and copies it; NULL: later ones */
    const float *bias, *residual; /* of the batch's first channel in the upper half; residual may be NULL */
    float *y;                     /* likewise, first pixel */
    float lo, hi;                 /* clamp of a finished sum: none when a residual is still to be added */
} job;

/* y (+)= left operand times right operand, in the upper or lower half of the output channels, n pixels. sum: NULL or
 * where the sum so far lies, as y; last: bias and clamp follow. copy: NULL, or becomes x without gaps. */
static void product(const strassen_run *u, const job *j, int left, bool lower, const float *x, int64_t pitch,
                    float *copy, int64_t n, float *y, const float *sum, bool last) {
    const strassen_state *s = u->s;
    const int64_t change = CBN_MAX(CBN_MIN(s->wider, j->b1), j->b0), first = block_channel(s, j->b0);
    const int64_t from[3] = {j->b0, change, j->b1};
    for (int i = 0; i < 2; i++) {
        if (from[i] == from[i + 1]) continue;
        const int64_t c = block_channel(s, from[i]) - first;
        cbn_conv_px_args a = {.x = x, .x_ic = pitch, .x_padded = true, .ic = s->ic2, .y_oc = s->plane};
        a.np = (int32_t)n;
        a.w = left_operand(s, j->g, left, from[i]);
        a.mr = (int32_t)(s->narrow + (i == 0));
        a.oc_valid = (int32_t)(block_channel(s, from[i + 1]) - first - c);
        a.y = y + c * s->plane;
        a.epi = (cbn_epilogue_args){s->zeros, sum ? sum + c * s->plane : NULL, -INFINITY, INFINITY};
        if (last) {
            a.epi.bias = j->bias + (lower ? s->oc2 : 0) + c;
            a.epi.lo = j->lo;
            a.epi.hi = j->hi;
        }
        a.copy = copy;
        u->k->conv_px(&a);
        if (!copy) continue;
        x = copy;
        pitch = n;
        copy = NULL;
    }
}

static float *quarter(const strassen_state *s, const job *j, int64_t pair, int which) {
    return j->y + (which >> 1) * s->oc2 * s->plane + (2 * pair + (which & 1)) * s->panel;
}

/* y[which] (+)= product for all pairs; `from` holds the sum so far. */
static void products(const strassen_run *u, const job *j, float *operands, int left, int right, int which, int from,
                     bool last) {
    const strassen_state *s = u->s;
    const int64_t from_x[RIGHT] = {[B21] = s->ic2 * s->plane, [B22] = s->ic2 * s->plane + s->panel};
    for (int64_t i = j->i0; i < j->i1; i++) {
        float *b = operands + ((i - j->i0) * RIGHT + right) * s->operand;
        const float *sum = from == NONE ? NULL : quarter(s, j, i, from);
        float *y = quarter(s, j, i, which);
        if (j->x && right < T1)
            product(u, j, left, which >> 1, j->x + 2 * i * s->panel + from_x[right], s->plane, b, s->panel, y, sum,
                    last);
        else
            product(u, j, left, which >> 1, b, s->panel, NULL, s->panel, y, sum, last);
    }
}

static float clamp(float v, float lo, float hi) {
    v = v < lo ? lo : v; /* a NaN stays */
    return v > hi ? hi : v;
}

/* c12 += c22, which holds S1 T1; c22 = clamp(c22 + u3 + bias). */
static void share_row(int64_t n, float *restrict c12, float *restrict c22, const float *restrict u3, float bias,
                      float lo, float hi) {
    for (int64_t i = 0; i < n; i++) {
        const float p = c22[i];
        c12[i] += p;
        c22[i] = clamp(u3[i] + p + bias, lo, hi);
    }
}

static void share(const strassen_run *u, const job *j) {
    const strassen_state *s = u->s;
    const int64_t channels = block_channel(s, j->b1) - block_channel(s, j->b0);
    for (int64_t i = j->i0; i < j->i1; i++) {
        float *c12 = quarter(s, j, i, C12), *c22 = quarter(s, j, i, C22), *c21 = quarter(s, j, i, C21);
        for (int64_t c = 0; c < channels; c++)
            share_row(s->panel, c12 + c * s->plane, c22 + c * s->plane, c21 + c * s->plane, j->bias[s->oc2 + c], j->lo,
                      j->hi);
    }
}

static void residual_row(int64_t n, float *restrict y, const float *restrict residual, float lo, float hi) {
    for (int64_t i = 0; i < n; i++) y[i] = clamp(y[i] + residual[i], lo, hi);
}

static void residual_add(const strassen_run *u, const job *j) {
    const strassen_state *s = u->s;
    const int64_t channels = block_channel(s, j->b1) - block_channel(s, j->b0);
    const int64_t p0 = 2 * j->i0 * s->panel, p1 = j->rest ? s->plane : 2 * j->i1 * s->panel;
    for (int half = 0; half < 2; half++) {
        for (int64_t c = 0; c < channels; c++) {
            const int64_t at = (half * s->oc2 + c) * s->plane + p0;
            residual_row(p1 - p0, j->y + at, j->residual + at, u->call->lo, u->call->hi);
        }
    }
}

/* First pixel of a panel of the rest, counted from there. */
static int64_t rest_pixel(const strassen_run *u, int64_t panel) {
    return u->s->rest_vectors * panel / u->s->rest_panels * u->k->lanes;
}

static void rest_products(const strassen_run *u, const job *j, const float *x) {
    const strassen_state *s = u->s;
    const int64_t pitch = rest_pitch(s, u->k->lanes);
    for (int64_t i = 0; i < s->rest_panels; i++) {
        const int64_t p = rest_pixel(u, i), n = CBN_MIN(rest_pixel(u, i + 1), s->rest) - p;
        for (int half = 0; half < 2; half++) {
            float *y = quarter(s, j, s->pairs, half ? C21 : C11) + p;
            product(u, j, half ? A21 : A11, half, x + p, pitch, NULL, n, y, NULL, false);
            product(u, j, half ? A22 : A12, half, x + p + s->ic2 * pitch, pitch, NULL, n, y, y, true);
        }
    }
}

static void super_pack(const strassen_run *u, const job *j, int64_t image, const float *x, float *operands,
                       float *rest) {
    const strassen_state *s = u->s;
    bool ok = true;
    for (int64_t i = j->i0; i < j->i1; i++)
        ok &= pair_pack(s, x + 2 * i * s->panel, operands + ((i - j->i0) * RIGHT + T1) * s->operand);
    /* Another thread may set the same byte. */
    if (!ok && u->call->redo) __atomic_store_n(&u->call->redo[image], 1, __ATOMIC_RELAXED);
    if (!j->rest) return;
    const int64_t pitch = rest_pitch(s, u->k->lanes);
    x += 2 * s->pairs * s->panel;
    for (int64_t c = 0; c < 2 * s->ic2; c++, x += s->plane, rest += pitch) {
        memcpy(rest, x, (size_t)s->rest * sizeof(float));
        memset(rest + s->rest, 0, (size_t)(pitch - s->rest) * sizeof(float));
    }
}

/* Where a super-panel's group of an image starts in x; its first and last pair. */
static const float *super_find(const strassen_run *u, int64_t number, int64_t *i0, int64_t *i1) {
    const strassen_state *s = u->s;
    const int64_t super = number % s->supers, image = number / s->supers / u->d->g, g = number / s->supers % u->d->g;
    *i0 = s->pairs * super / s->supers;
    *i1 = s->pairs * (super + 1) / s->supers;
    return (const float *)u->call->x + (image * u->d->ic + g * 2 * s->ic2) * s->plane;
}

/* Items are numbered image, group, super-panel, batch of blocks. */
static void strassen_range(void *arg, int64_t begin, int64_t end, int worker) {
    const strassen_run *u = arg;
    const strassen_state *s = u->s;
    float *operands = (float *)(u->scratch + (size_t)worker * u->worker_bytes);
    float *rest = operands + s->fit * RIGHT * s->operand;
    for (int64_t item = begin; item < end; item++) {
        const int64_t batch = item % s->batches, number = item / s->batches, image = number / s->supers / u->d->g;
        job j = {.g = number / s->supers % u->d->g, .lo = u->call->lo, .hi = u->call->hi};
        j.b0 = batch * s->blocks / s->batches;
        j.b1 = (batch + 1) * s->blocks / s->batches;
        const float *x = super_find(u, number, &j.i0, &j.i1);
        j.rest = j.i1 == s->pairs && s->rest > 0;
        const int64_t channel = j.g * 2 * s->oc2 + block_channel(s, j.b0);
        j.bias = (const float *)u->call->bias + channel;
        j.y = (float *)u->call->y + (image * u->d->oc + channel) * s->plane;
        if (u->call->residual) {
            j.residual = (const float *)u->call->residual + (image * u->d->oc + channel) * s->plane;
            j.lo = -INFINITY;
            j.hi = INFINITY;
        }
        if (batch == 0 || item == begin) {
            super_pack(u, &j, image, x, operands, rest);
            j.x = x;
        }
        products(u, &j, operands, A11, B11, C21, NONE, false);
        products(u, &j, operands, A12, B21, C11, C21, true);
        products(u, &j, operands, S2, T2, C12, C21, false);  /* U2 */
        products(u, &j, operands, S3, T3, C21, C12, false);  /* U3 */
        products(u, &j, operands, S1, T1, C22, NONE, false);
        share(u, &j);
        products(u, &j, operands, S4, B22, C12, C12, true);
        products(u, &j, operands, A22, T4, C21, C21, true);
        if (j.rest) rest_products(u, &j, rest);
        if (j.residual) residual_add(u, &j);
    }
}

static cbn_status strassen_go(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state,
                              const cbn_conv_call *call, cbn_error *err) {
    const strassen_state *s = state;
    const int threads = call->max_threads > 0 ? call->max_threads : cbn_threads_get(NULL);
    strassen_run u = {.d = d, .k = ctx->kernels, .s = s, .call = call};
    u.worker_bytes = worker_bytes(s, ctx->kernels->lanes);
    if (call->n == 0) return CBN_OK;
    u.scratch = cbn_scratch_get(u.worker_bytes * (size_t)threads);
    if (!u.scratch) return cbn_fail_memory(err, "scratch of a convolution", u.worker_bytes * (size_t)threads);
    const int64_t work = s->fit * s->panel * cbn_ceil_div(s->oc2, s->batches) * s->ic2 * 7;
    cbn_parallel_for(call->n * d->g * s->supers * s->batches, CBN_MAX(THREAD_WORK / work, 1), threads, strassen_range,
                     &u);
    cbn_scratch_put(u.scratch);
    return CBN_OK;
}

static size_t strassen_workspace(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, int64_t n,
                                 int threads) {
    (void)d;
    (void)n;
    return worker_bytes(state, ctx->kernels->lanes) * (size_t)CBN_MAX(threads, 1);
}

static void strassen_describe(const cbn_conv_desc *d, const cbn_conv_context *ctx, const void *state, char *buf,
                              size_t size) {
    const strassen_state *s = state;
    (void)d;
    snprintf(buf, size, "%d channels x %lld pixels, super-panels of %lld, %lld pixels as usual", ctx->kernels->px_mr,
             (long long)s->panel, (long long)(2 * s->fit * s->panel), (long long)s->rest);
}

const cbn_conv_impl cbn_conv_strassen = {
    .name = "strassen",
    .supports = strassen_supports,
    .cost = strassen_cost,
    .prepare = strassen_prepare,
    .run = strassen_go,
    .destroy = strassen_destroy,
    .workspace_bytes = strassen_workspace,
    .describe = strassen_describe,
    .fused_epilogue = true,
    .spreads_nonfinite = true,
};
