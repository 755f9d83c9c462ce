/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolution plans, without Python: against loops written from the definition. Data are small
 * whole numbers, so that every algorithm in every dtype must give exactly the same result. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pthread_barrier */
#endif
#include "check.h"
#include "base/cbn_alloc.h"
#include "ops/bn_fold.h"
#include "ops/conv_plan.h"
#include "threads/cbn_parallel.h"
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static size_t total_allocs(void) {
    cbn_alloc_stats s;
    cbn_alloc_get_stats(&s);
    return s.total_allocs;
}

static cbn_conv_geometry plain_2d(void) {
    return (cbn_conv_geometry){.dtype = CBN_F32, .nd = 2, .g = 1, .stride = {1, 1}, .dil = {1, 1}};
}

/* ---- plans against the definition ---- */
typedef struct problem {
    cbn_conv_geometry g;
    int64_t n, in[3], out[3];
    int64_t nw, nx, ny;
    void *w, *b, *x, *r, *y, *want;
} problem;

static double at(const void *p, cbn_dtype t, int64_t i) {
    return cbn_load_f64((const char *)p + (size_t)i * cbn_dtype_size(t), t);
}
static void set(void *p, cbn_dtype t, int64_t i, double v) {
    cbn_store_f64((char *)p + (size_t)i * cbn_dtype_size(t), t, v);
}
static void *random_array(cbn_dtype t, int64_t n) {
    void *p = malloc((size_t)n * cbn_dtype_size(t));
    for (int64_t i = 0; i < n; i++) set(p, t, i, (double)check_range(-2, 2));
    return p;
}

/* Input index that a padded coordinate stands for; -1: zero. */
static int64_t source(int64_t i, int64_t size, cbn_pad_mode mode) {
    if (i >= 0 && i < size) return i;
    switch (mode) {
    case CBN_MODE_REFLECT:
        return i < 0 ? -i : 2 * (size - 1) - i;
    case CBN_MODE_REPLICATE:
        return i < 0 ? 0 : size - 1;
    case CBN_MODE_CIRCULAR:
        return (i + size) % size;
    default:
        return -1;
    }
}

/* want = relu(conv(x) + b + r), straight from the definition; the dense sum over every (output,
 * tap) pair. */
static void solve(problem *q, const cbn_conv_desc *d, int64_t pad[3][2]) {
    const cbn_conv_geometry *g = &q->g;
    const cbn_dtype t = g->dtype;
    const int64_t icg = g->ic / g->g, ocg = g->oc / g->g;
    int64_t image[3], plane = 1, out_plane = 1, kernel = 1, lo[3];
    for (int a = 0; a < 3; a++) {
        image[a] = d->in[a] - pad[a][0] - pad[a][1];
        lo[a] = d->pad_lo[a] + pad[a][0];
        plane *= image[a];
        out_plane *= d->out[a];
        kernel *= d->k[a];
    }
    for (int64_t i = 0; i < q->ny; i++) {
        const int64_t o = i % out_plane, c = i / out_plane % g->oc, n = i / out_plane / g->oc;
        const int64_t pos[3] = {o / (d->out[1] * d->out[2]), o / d->out[2] % d->out[1],
                                o % d->out[2]};
        double sum = at(q->b, t, c) + at(q->r, t, i);
        for (int64_t m = 0; m < kernel; m++) {
            const int64_t tap[3] = {m / (d->k[1] * d->k[2]), m / d->k[2] % d->k[1], m % d->k[2]};
            int64_t from[3];
            bool inside = true;
            for (int a = 0; a < 3; a++) {
                if (g->transposed) {
                    const int64_t v = pos[a] + lo[a] - tap[a] * d->dil[a];
                    inside &= v >= 0 && v % d->stride[a] == 0 && v / d->stride[a] < image[a];
                    from[a] = v / d->stride[a];
                } else {
                    from[a] = source(pos[a] * d->stride[a] - lo[a] + tap[a] * d->dil[a], image[a],
                                     g->pad_mode);
                    inside &= from[a] >= 0;
                }
            }
            if (!inside) continue;
            const int64_t group = c / ocg;
            for (int64_t j = 0; j < icg; j++) {
                const int64_t wi = g->transposed ? ((group * icg + j) * ocg + c % ocg) * kernel + m
                                                 : (c * icg + j) * kernel + m;
                sum +=
                    at(q->w, t, wi) * at(q->x, t,
                                         (n * g->ic + group * icg + j) * plane +
                                             (from[0] * image[1] + from[1]) * image[2] + from[2]);
            }
        }
        set(q->want, t, i, sum > 0 ? sum : 0);
    }
}

static void problem_free(problem *q) {
    void *all[] = {q->w, q->b, q->x, q->r, q->y, q->want};
    for (int i = 0; i < 6; i++) free(all[i]);
}

/* A random problem; false when this one has no output. */
static bool problem_make(problem *q, int nd, cbn_dtype t) {
    const bool transposed = nd > 0 && check_range(0, 2) == 0;
    const int64_t groups = nd > 0 ? check_range(1, 3) : 1, a0 = check_range(1, 5),
                  a1 = check_range(1, 4);
    int64_t w[5] = {groups * (check_range(0, 3) == 0 ? 1 : a0), check_range(0, 3) == 0 ? 1 : a1};
    *q = (problem){.g = {.dtype = t, .nd = nd, .transposed = transposed, .g = groups},
                   .n = check_range(1, 3)};
    if (!transposed && check_range(0, 2) == 0) q->g.pad_mode = (cbn_pad_mode)check_range(1, 3);
    if (!transposed && check_range(0, 5) == 0) q->g.pad_kind = CBN_PAD_SAME;
    const bool pointwise = check_range(0, 4) == 0;
    for (int a = 0; a < nd; a++) {
        w[2 + a] = pointwise ? 1 : check_range(1, 4);
        q->g.stride[a] = pointwise || q->g.pad_kind == CBN_PAD_SAME ? 1 : check_range(1, 3);
        q->g.dil[a] = check_range(1, 2);
        q->g.pad[a] = pointwise ? 0 : check_range(0, 3);
        q->g.output_pad[a] =
            transposed ? check_range(0, CBN_MAX(q->g.stride[a], q->g.dil[a]) - 1) : 0;
        q->in[a] = check_range(1, nd == 3 ? 6 : 19);
    }
    cbn_error err;
    cbn_conv_desc d;
    int64_t pad[3][2];
    if (!CHECK(cbn_conv_geometry_check(&q->g, w, -1, &err) == CBN_OK)) return false;
    if (cbn_conv_desc_make(&q->g, q->n, q->g.ic, q->in, &d, pad, &err) != CBN_OK) return false;
    q->nw = w[0] * w[1];
    q->nx = q->n * q->g.ic;
    q->ny = q->n * q->g.oc;
    for (int a = 0; a < nd; a++) {
        q->nw *= w[2 + a];
        q->nx *= q->in[a];
        if (q->g.pad_kind == CBN_PAD_SAME) {
            const int64_t total = q->g.dil[a] * (w[2 + a] - 1),
                          lo = d.pad_lo[3 - nd + a] + pad[3 - nd + a][0];
            CHECK(d.out[3 - nd + a] == q->in[a] && lo == total / 2);
        }
    }
    for (int a = 0; a < 3; a++) q->ny *= d.out[a];
    q->w = random_array(t, q->nw);
    q->b = random_array(t, q->g.oc);
    q->x = random_array(t, q->nx);
    q->r = random_array(t, q->ny);
    q->y = random_array(t, q->ny);
    q->want = random_array(t, q->ny);
    solve(q, &d, pad);
    return true;
}

/* All numbers are whole ones. Algorithms that transform the data (the ones that spread Inf and NaN) work with fractions
 * and may be off by less than one rounding: a mistake would be off by one or more. */
static bool outputs_near(const problem *q, const char *what, double slack) {
    for (int64_t i = 0; i < q->ny; i++)
        if (!(fabs(at(q->y, q->g.dtype, i) - at(q->want, q->g.dtype, i)) <= slack))
            return CHECK_MSG(
                false,
                "%s: nd %d dtype %d transposed %d groups %d mode %d: element %d is %g, expected %g",
                what, q->g.nd, q->g.dtype, q->g.transposed, (int)q->g.g, q->g.pad_mode, (int)i,
                at(q->y, q->g.dtype, i), at(q->want, q->g.dtype, i));
    return true;
}

#define EXACT_OF(name) !cbn_conv_##name.spreads_nonfinite,
static bool exact(int algorithm) { return (const bool[]){CBN_CONV_IMPLS(EXACT_OF)}[algorithm]; }
#undef EXACT_OF

#define NAME_OF(name) #name,
static const char *const ALGORITHMS[] = {CBN_CONV_IMPLS(NAME_OF)};
#undef NAME_OF
#define ROW_OF(name) ROW_##name,
enum { CBN_CONV_IMPLS(ROW_OF) };
#undef ROW_OF
enum { NALGORITHMS = sizeof ALGORITHMS / sizeof *ALGORITHMS }; /* the last one supports everything */

CHECK_TEST(plans_equal_the_definition) {
    const int threads = cbn_threads_get(NULL);
    int ran[NALGORITHMS] = {0}, solved = 0;
    const int rounds = 600; /* fewer need not meet every algorithm */
    for (int round = 0; round < rounds; round++) {
        problem q;
        if (!problem_make(&q, (int)check_range(0, 3), (cbn_dtype)(round % 3))) continue;
        const size_t live = check_live_blocks();
        const cbn_plan_options opt = {.activation = CBN_ACT_RELU, .borrow = round % 2};
        cbn_conv_plan *p;
        cbn_error err = {0};
        CHECK(cbn_plan_create(&q.g, q.w, q.b, &opt, &p, &err) == CBN_OK);
        CHECK(cbn_plan_run(p, q.x, 0, q.in, NULL, NULL, &err) == CBN_OK); /* touches nothing */
        CHECK(cbn_plan_run(p, q.x, q.n, q.in, q.r, q.y, &err) == CBN_OK);
        bool ok = outputs_near(&q, "first choice", 0.25);
        for (int a = 0; a < NALGORITHMS && ok; a++) {
            if (cbn_plan_force(p, q.in, ALGORITHMS[a], &err) != CBN_OK) {
                ok = CHECK(a < NALGORITHMS - 1 && strstr(err.message, ALGORITHMS[a]));
                continue;
            }
            ran[a]++;
            for (int t = 1; t <= 3 && ok; t += 2) {
                cbn_threads_set(t);
                for (int64_t i = 0; i < q.ny; i++) set(q.y, q.g.dtype, i, NAN);
                ok = CHECK(cbn_plan_run(p, q.x, q.n, q.in, q.r, q.y, &err) == CBN_OK) &&
                     outputs_near(&q, ALGORITHMS[a], exact(a) ? 0.0 : 0.25);
            }
        }
        cbn_plan_destroy(p);
        CHECK(check_live_blocks() == live);
        problem_free(&q);
        solved++;
        if (!ok) break;
    }
    cbn_threads_set(threads);
    CHECK(solved > rounds / 2);
    /* Rows that want many channels have checks of their own. */
    CHECK(ran[ROW_depthwise] > 0 && ran[ROW_pointwise] > 0 && ran[ROW_direct] > 0 && ran[ROW_ref] > 0);
}

/* ---- choosing ---- */
CHECK_TEST(plan_choice_explain_force_tune) {
    cbn_conv_geometry g = plain_2d();
    cbn_error err = {0};
    g.pad[0] = g.pad[1] = 1;
    CHECK(cbn_conv_geometry_check(&g, (int64_t[]){16, 8, 3, 3}, -1, &err) == CBN_OK);
    float *w = random_array(CBN_F32, 16 * 8 * 9);
    cbn_conv_plan *p;
    const cbn_plan_options opt = {.activation = CBN_ACT_SILU};
    const int64_t in[2] = {14, 14};
    CHECK(cbn_plan_create(&g, w, NULL, &opt, &p, &err) == CBN_OK);
    CHECK(((const float *)cbn_plan_bias(p))[15] == 0 &&
          memcmp(cbn_plan_weights(p), w, 16 * 8 * 9 * 4) == 0);
    cbn_plan_report r;
    CHECK(cbn_plan_explain(p, 2, in, &r, &err) == CBN_OK);
    CHECK(r.ncandidates == NALGORITHMS && !r.tuned && r.tile[0]);
    CHECK(r.flops == 2LL * 2 * 16 * 8 * 9 * 196 && r.flops_real == 2LL * 2 * 16 * 8 * (40 * 40));
    CHECK(r.input_bytes == 2 * 8 * 196 * 4 && r.output_bytes == 2 * 16 * 196 * 4 &&
          r.weight_bytes >= 16 * 8 * 9 * 4);
    for (int i = 0; i < NALGORITHMS; i++) {
        CHECK(strcmp(r.candidates[i].name, ALGORITHMS[i]) == 0);
        CHECK((strcmp(r.algorithm, ALGORITHMS[i]) == 0) == (r.candidates[i].reason == NULL));
    }
    CHECK(cbn_plan_force(p, in, "nonsense", &err) == CBN_BAD_VALUE &&
          strstr(err.message, "got 'nonsense'") && strstr(err.message, "depthwise") && strstr(err.message, "ref"));
    CHECK(cbn_plan_force(p, in, "depthwise", &err) == CBN_BAD_VALUE &&
          strstr(err.message, "got 'depthwise' ("));
    CHECK(cbn_plan_force(p, in, "ref", &err) == CBN_OK &&
          cbn_plan_explain(p, 1, in, &r, &err) == CBN_OK);
    CHECK(strcmp(r.algorithm, "ref") == 0 && r.candidates[NALGORITHMS - 1].reason == NULL &&
          r.candidates[0].reason != NULL);
    const double start = check_seconds();
    CHECK(cbn_plan_tune(p, in, &err) == CBN_OK && cbn_plan_explain(p, 1, in, &r, &err) == CBN_OK &&
          r.tuned);
    CHECK(strcmp(r.algorithm, "ref") != 0);
    CHECK(check_seconds() - start < (check_under("") ? 1.0 : 60.0));
    CHECK(cbn_plan_tune(p, (int64_t[]){14, 0}, &err) == CBN_BAD_VALUE &&
          strstr(err.message, "got 0"));

    /* More shapes than a plan keeps: it stops growing and goes on working. */
    float *x = random_array(CBN_F32, 8 * 40 * 14), *y = random_array(CBN_F32, 16 * 40 * 14);
    size_t live = 0;
    for (int64_t h = 1; h <= 40; h++) {
        CHECK(cbn_plan_run(p, x, 1, (int64_t[]){h, 14}, NULL, y, &err) == CBN_OK);
        if (h == CBN_PLAN_SHAPES) live = check_live_blocks();
    }
    CHECK(check_live_blocks() == live);
    CHECK(cbn_plan_tune(p, (int64_t[]){40, 14}, &err) == CBN_BAD_VALUE &&
          strstr(err.message, "input_shape"));
    CHECK(cbn_plan_run(p, x, -1, in, NULL, y, &err) == CBN_BAD_VALUE);
    CHECK(cbn_plan_run(p, x, INT64_MAX / 64, in, NULL, y, &err) == CBN_BAD_VALUE &&
          strstr(err.message, "2^63"));
    cbn_plan_destroy(p);
    cbn_plan_destroy(NULL);
    free(w);
    free(x);
    free(y);
}

/* ---- many threads on one new plan ---- */
enum { CALLERS = 8, HEIGHTS = 12 };
typedef struct shared_plan {
    cbn_conv_plan *p;
    const float *x;
    const float *want[HEIGHTS + 1];
    int heights; /* how many of them are used */
    pthread_barrier_t start;
} shared_plan;

static void *call_shapes(void *arg) {
    shared_plan *s = arg;
    float *y = malloc(sizeof(float) * 8 * HEIGHTS * 9);
    cbn_error err;
    intptr_t wrong = 0;
    pthread_barrier_wait(&s->start);
    for (int round = 0; round < 5; round++)
        for (int64_t h = 1; h <= s->heights; h++) {
            const int64_t in[2] = {h, 9};
            wrong += cbn_plan_run(s->p, s->x, 1, in, NULL, y, &err) != CBN_OK ||
                     memcmp(y, s->want[h], sizeof(float) * 8 * (size_t)h * 9) != 0;
        }
    free(y);
    return (void *)wrong;
}

CHECK_TEST(one_plan_from_many_threads) {
    cbn_conv_geometry g = plain_2d();
    cbn_error err = {0};
    g.pad_kind = CBN_PAD_SAME;
    CHECK(cbn_conv_geometry_check(&g, (int64_t[]){8, 8, 3, 3}, -1, &err) == CBN_OK);
    float *w = random_array(CBN_F32, 8 * 8 * 9), *x = random_array(CBN_F32, 8 * HEIGHTS * 9);
    const cbn_plan_options opt = {.activation = CBN_ACT_NONE};
    const size_t live = check_live_blocks();
    size_t one_shape = 0;
    cbn_conv_plan *serial;
    shared_plan s = {.x = x};
    CHECK(cbn_plan_create(&g, w, NULL, &opt, &serial, &err) == CBN_OK);
    for (int64_t h = 1; h <= HEIGHTS; h++) {
        float *y = malloc(sizeof(float) * 8 * (size_t)h * 9);
        CHECK(cbn_plan_run(serial, x, 1, (int64_t[]){h, 9}, NULL, y, &err) == CBN_OK);
        s.want[h] = y;
        if (h == 1) one_shape = check_live_blocks() - live;
    }
    cbn_plan_destroy(serial);
    pthread_barrier_init(&s.start, NULL, CALLERS);
    for (int round = 0; round < (check_under("") ? 200 : 4); round++) {
        s.heights = round % 2 ? HEIGHTS : 1;
        CHECK(cbn_plan_create(&g, w, NULL, &opt, &s.p, &err) == CBN_OK);
        pthread_t t[CALLERS];
        for (int i = 0; i < CALLERS; i++) pthread_create(&t[i], NULL, call_shapes, &s);
        for (int i = 0; i < CALLERS; i++) {
            void *wrong;
            pthread_join(t[i], &wrong);
            CHECK_MSG(wrong == NULL, "thread %d: %d wrong results", i, (int)(intptr_t)wrong);
        }
        if (s.heights == 1)
            CHECK(check_live_blocks() - live == one_shape); /* prepared by several, kept once */
        cbn_plan_destroy(s.p);
    }
    pthread_barrier_destroy(&s.start);
    CHECK(check_live_blocks() == live);
    for (int h = 1; h <= HEIGHTS; h++) free((void *)(uintptr_t)s.want[h]);
    free(w);
    free(x);
}

/* ---- allocation failures ---- */
/* Everything a plan can do, with the given allocation failing; true when it all succeeded. */
static bool plan_life(const problem *q, const cbn_plan_options *opt, const char *algorithm,
                      int64_t fail) {
    cbn_error err = {0};
    cbn_conv_plan *p = NULL;
    cbn_plan_report report;
    const size_t live = check_live_blocks(), before = total_allocs();
    cbn_alloc_fail_after(fail);
    cbn_status s = cbn_plan_create(&q->g, q->w, q->b, opt, &p, &err);
    if (s == CBN_OK) s = cbn_plan_run(p, q->x, q->n, q->in, q->r, q->y, &err);
    if (s == CBN_OK) s = cbn_plan_tune(p, q->in, &err);
    if (s == CBN_OK) {
        /* Not every row supports every problem. */
        s = cbn_plan_force(p, q->in, algorithm, &err);
        if (s == CBN_BAD_VALUE) s = CBN_OK;
    }
    if (s == CBN_OK) s = cbn_plan_run(p, q->x, q->n, q->in, NULL, q->y, &err);
    if (s == CBN_OK) s = cbn_plan_explain(p, q->n, q->in, &report, &err);
    const bool fired = total_allocs() - before > (size_t)fail;
    cbn_alloc_fail_after(-1);
    CHECK_MSG(fired == (s == CBN_NO_MEMORY), "allocation %d: status %d, '%s'", (int)fail, s,
              err.message);
    CHECK_MSG(s == CBN_OK || strncmp(err.message, "out of memory: ", 15) == 0, "'%s'", err.message);
    if (s != CBN_OK && p) {
        /* The plan survives and works. */
        CHECK(cbn_plan_run(p, q->x, q->n, q->in, q->r, q->y, &err) == CBN_OK);
        if (opt->activation == CBN_ACT_RELU) outputs_near(q, "after a failure", 0.25);
    }
    CHECK(s == CBN_OK || s == CBN_NO_MEMORY);
    cbn_plan_destroy(p);
    CHECK_MSG(check_live_blocks() == live, "allocation %d: %d blocks leaked", (int)fail,
              (int)(check_live_blocks() - live));
    return s == CBN_OK;
}

CHECK_TEST(allocation_failures_of_plans) {
    const cbn_act acts[] = {CBN_ACT_RELU, CBN_ACT_HARDSWISH};
    cbn_parallel_for(0, 1, 0, NULL, NULL);
    int failed = 0;
    for (int round = 0; round < (check_under("") ? 48 : 12); round++) {
        problem q;
        if (!problem_make(&q, round % 4, (cbn_dtype)(round % 3))) continue;
        const cbn_plan_options opt = {.activation = acts[round / 4 % 2]};
        int64_t fail = 0;
        while (!plan_life(&q, &opt, ALGORITHMS[round % NALGORITHMS], fail) && fail < 200 &&
               check_failures() == 0)
            fail++;
        CHECK(fail < 200);
        failed += (int)fail;
        problem_free(&q);
        if (check_failures()) return;
    }
    CHECK_MSG(failed > 100, "only %d failures injected", failed);
}
