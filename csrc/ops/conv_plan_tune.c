/* SPDX-License-Identifier: BSD-3-Clause */
/* Choosing by measurement: the promising rows run the layer in turns, round by round, so that a machine that becomes
 * slower for a while does so for all of them; the least median wins. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "ops/conv_plan_priv.h"

#include "base/cbn_alloc.h"

#include <math.h>
#include <string.h>
#include <time.h>

enum { ROUNDS = 15 };
static const double TUNE_SECONDS = 0.4; /* no further round begins later than this */
static const double TOO_SLOW = 2.0;     /* than the fastest in the first round: not asked again */
/* The estimate's choice stays unless another is faster by more than measurements differ. */
static const double CLEARLY = 0.98;

typedef struct contender {
    int row;
    cbn_plan_state made;
    int nruns;
    double runs[ROUNDS], median;
} contender;

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double median_of(double *v, int n) {
    for (int i = 1; i < n; ++i)
        for (int j = i; j > 0 && v[j] < v[j - 1]; --j) {
            const double t = v[j];
            v[j] = v[j - 1];
            v[j - 1] = t;
        }
    return v[n / 2];
}

static void fill_synthetic(const cbn_plan_shape *s, void *x) {
    for (int64_t i = 0; i < s->xp_elems; ++i) {
        const double v = (double)(i * 7919 % 251) / 251.0 - 0.5;
        if (s->d.dtype == CBN_F64)
            ((double *)x)[i] = v;
        else
            ((float *)x)[i] = (float)v;
    }
}

static cbn_status run_once(const cbn_conv_plan *p, const cbn_plan_shape *s, contender *c,
                           const cbn_conv_call *call, double *seconds, cbn_error *err) {
    const double start = now_seconds();
    CBN_TRY(cbn_plan_impls[c->row]->run(&s->d, &p->ctx, c->made.state, call, err));
    *seconds = now_seconds() - start;
    return CBN_OK;
}

/* Rounds of all contenders; the slow ones drop out after the first. */
static cbn_status measure(const cbn_conv_plan *p, const cbn_plan_shape *s, contender *c, int n,
                          const cbn_conv_call *call, cbn_error *err) {
    const double start = now_seconds();
    double fastest = INFINITY, seconds;
    for (int i = 0; i < n; ++i) { /* warms caches and the scratch pool; counts only when there is no time for more */
        CBN_TRY(run_once(p, s, &c[i], call, &seconds, err));
        c[i].median = seconds;
        fastest = CBN_MIN(fastest, seconds);
    }
    for (int round = 0; round < ROUNDS && now_seconds() - start < TUNE_SECONDS; ++round) {
        for (int i = 0; i < n; ++i) {
            contender *now = &c[(round + i) % n];
            if (round > 0 && now->nruns < round) continue;
            CBN_TRY(run_once(p, s, now, call, &seconds, err));
            if (round > 0 || seconds < TOO_SLOW * fastest) now->runs[now->nruns++] = seconds;
            now->median = CBN_MIN(now->median, seconds);
            fastest = CBN_MIN(fastest, seconds);
        }
    }
    for (int i = 0; i < n; ++i)
        if (c[i].nruns > 0) c[i].median = median_of(c[i].runs, c[i].nruns);
    return CBN_OK;
}

static cbn_status tune_measured(cbn_conv_plan *p, cbn_plan_shape *s, contender *c, int n, int *best,
                                cbn_error *err) {
    const size_t elem = cbn_dtype_size(s->d.dtype), x_bytes = (size_t)s->xp_elems * elem,
                 y_bytes = (size_t)s->y_elems * elem;
    void *x = cbn_scratch_get(x_bytes), *y = cbn_scratch_get(y_bytes);
    uint8_t redo = 0;
    cbn_status status = CBN_OK;
    if (!x || !y) {
        status = cbn_fail_memory(err, "tuning", x_bytes + y_bytes);
        goto done;
    }
    fill_synthetic(s, x);
    memset(y, 0, y_bytes); /* fresh pages are nobody's time */
    const cbn_conv_call call = {.x = x,
                                .y = y,
                                .n = 1,
                                .bias = p->wide_b ? p->wide_b : p->b,
                                .lo = p->clamps ? p->lo : -INFINITY,
                                .hi = p->clamps ? p->hi : INFINITY,
                                .redo = &redo};
    for (int i = 0; i < n && status == CBN_OK; ++i) status = cbn_plan_state_make(p, s, c[i].row, &c[i].made, err);
    if (status == CBN_OK) status = measure(p, s, c, n, &call, err);
    if (status != CBN_OK) goto done;
    int winner = 0, expected = 0;
    for (int i = 0; i < n; ++i) {
        atomic_store_explicit(&s->seconds[c[i].row], (float)c[i].median, memory_order_relaxed);
        if (c[i].row == *best) expected = i;
        if (c[i].median < c[winner].median) winner = i;
    }
    if (!(c[winner].median < CLEARLY * c[expected].median)) winner = expected;
    *best = c[winner].row;
    cbn_plan_state_publish(s, *best, c[winner].made);
    c[winner].made.state = NULL;
done:
    for (int i = 0; i < n; ++i)
        if (c[i].made.state) cbn_plan_impls[c[i].row]->destroy(c[i].made.state);
    cbn_scratch_put(x);
    cbn_scratch_put(y);
    return status;
}

cbn_status cbn_plan_tune(cbn_conv_plan *p, const int64_t *in, cbn_error *err) {
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_acquire_kept(p, in, &s, err));
    contender c[CBN_PLAN_NIMPLS];
    int n = 0, best = cbn_plan_cheapest(p, s);
    const char *why_not;
    /* The last row never wins against a kernel and can take long, so it is never measured. */
    for (int i = 0; best < CBN_PLAN_NIMPLS - 1 && i < CBN_PLAN_NIMPLS - 1; ++i) {
        if (!cbn_plan_impls[i]->supports(&s->d, &p->ctx, &why_not)) continue;
        const double times = cbn_plan_times(p, s, i, best);
        if (i == best || times <= CBN_PLAN_HOPELESS) c[n++] = (contender){.row = i};
    }
    if (n > 1) CBN_TRY(tune_measured(p, s, c, n, &best, err));
    CBN_TRY(cbn_plan_state_ensure(p, s, best, err));
    cbn_plan_choose(s, best, CBN_CHOICE_TUNED);
    return CBN_OK;
}
