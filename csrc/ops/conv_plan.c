/* SPDX-License-Identifier: BSD-3-Clause */
/* The ordered list of convolution algorithms, and the plan: which of them serves which input shape.
 *
 * Shapes are kept in a few slots that are filled once by compare-and-swap and never emptied. Two
 * threads that meet a new shape at the same time may both prepare it, and one of the two results is
 * dropped; in exchange there is no lock that a fork could catch held. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "ops/conv_plan_priv.h"

#include "base/cbn_alloc.h"
#include "threads/cbn_parallel.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define CBN_IMPL_ENTRY_(name) &cbn_conv_##name,
const cbn_conv_impl *const cbn_plan_impls[CBN_PLAN_NIMPLS] = {CBN_CONV_IMPLS(CBN_IMPL_ENTRY_)};
#undef CBN_IMPL_ENTRY_

/* ---- shapes ---- */
static void shape_destroy(cbn_plan_shape *s) {
    if (!s) return;
    for (int i = 0; i < CBN_PLAN_NIMPLS; ++i) {
        void *state = atomic_load_explicit(&s->state[i], memory_order_relaxed);
        if (state) cbn_plan_impls[i]->destroy(state);
    }
    cbn_free(s);
}

static cbn_status shape_make(const cbn_conv_plan *p, const int64_t *in, cbn_plan_shape **out,
                             cbn_error *err) {
    cbn_plan_shape *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a plan's entry for an input shape", sizeof *s);
    const cbn_status status = cbn_conv_desc_make(&p->g, 1, p->g.ic, in, &s->d, s->pad, err);
    if (status != CBN_OK) {
        cbn_free(s);
        return status;
    }
    if (p->g.dtype == CBN_F16) s->d.dtype = CBN_F32;
    s->x_elems = s->xp_elems = p->g.ic;
    s->y_elems = p->g.oc;
    for (int a = 0; a < CBN_MAX_SPATIAL; ++a) {
        s->image[a] = s->d.in[a] - s->pad[a][0] - s->pad[a][1];
        s->padded |= s->image[a] != s->d.in[a];
        s->x_elems *= s->image[a];
        s->xp_elems *= s->d.in[a];
        s->y_elems *= s->d.out[a];
    }
    for (int a = 0; a < p->g.nd; ++a) s->in[a] = in[a];
    s->max_n = INT64_MAX / 8 / CBN_MAX(s->xp_elems, s->y_elems);
    *out = s;
    return CBN_OK;
}

static bool shape_is(const cbn_conv_plan *p, const cbn_plan_shape *s, const int64_t *in) {
    for (int a = 0; a < p->g.nd; ++a)
        if (s->in[a] != in[a]) return false;
    return true;
}

static void shape_choose(cbn_plan_shape *s, int index, cbn_choice_origin origin) {
    atomic_store_explicit(&s->choice, index + (int)origin * CBN_PLAN_NIMPLS, memory_order_release);
}

static int cheapest_supporting(const cbn_conv_plan *p, const cbn_plan_shape *s) {
    const char *why_not;
    int best = CBN_PLAN_NIMPLS - 1;
    double least = INFINITY;
    for (int i = 0; i < CBN_PLAN_NIMPLS - 1; ++i) {
        if (!cbn_plan_impls[i]->supports(&s->d, &p->ctx, &why_not)) continue;
        const double cost = cbn_plan_impls[i]->cost(&s->d, &p->ctx);
        if (cost >= least) continue;
        least = cost;
        best = i;
    }
    return best;
}

static const void *compute_weights(const cbn_conv_plan *p) { return p->wide_w ? p->wide_w : p->w; }

/* Keeps `state` for row i unless another thread was faster; then it is destroyed. */
static void state_publish(cbn_plan_shape *s, int i, void *state) {
    void *none = NULL;
    if (!atomic_compare_exchange_strong(&s->state[i], &none, state))
        cbn_plan_impls[i]->destroy(state);
}

cbn_status cbn_plan_state_ensure(const cbn_conv_plan *p, cbn_plan_shape *s, int i,
                                 cbn_error *err) {
    if (atomic_load_explicit(&s->state[i], memory_order_acquire)) return CBN_OK;
    void *state = NULL;
    CBN_TRY(cbn_plan_impls[i]->prepare(&s->d, &p->ctx, compute_weights(p), &state, err));
    assert(state);
    state_publish(s, i, state);
    return CBN_OK;
}

/* Puts s into a slot, or gives the equal shape that another thread put there first (s is then
 * destroyed). */
static cbn_plan_shape *shape_publish(cbn_conv_plan *p, cbn_plan_shape *s) {
    for (int i = 0; i < CBN_PLAN_SHAPES; ++i) {
        cbn_plan_shape *there = NULL;
        if (atomic_compare_exchange_strong(&p->shapes[i], &there, s)) return s;
        if (shape_is(p, there, s->in)) {
            shape_destroy(s);
            return there;
        }
    }
    s->temporary = true;
    return s;
}

cbn_status cbn_plan_shape_acquire(cbn_conv_plan *p, const int64_t *in, cbn_plan_shape **out,
                                  cbn_error *err) {
    for (int i = 0; i < CBN_PLAN_SHAPES; ++i) {
        cbn_plan_shape *s = atomic_load_explicit(&p->shapes[i], memory_order_acquire);
        if (!s) break;
        if (!shape_is(p, s, in)) continue;
        *out = s;
        return CBN_OK;
    }
    cbn_plan_shape *s = NULL;
    CBN_TRY(shape_make(p, in, &s, err));
    const int index = cheapest_supporting(p, s);
    const cbn_status status = cbn_plan_state_ensure(p, s, index, err);
    if (status != CBN_OK) {
        shape_destroy(s);
        return status;
    }
    shape_choose(s, index, CBN_CHOICE_LISTED);
    *out = shape_publish(p, s);
    return CBN_OK;
}

void cbn_plan_shape_release(cbn_plan_shape *s) {
    if (s && s->temporary) shape_destroy(s);
}

/* ---- creation ---- */
static void set_clamp(cbn_conv_plan *p) {
    p->clamps = true;
    p->lo = -INFINITY;
    p->hi = INFINITY;
    switch (p->opt.activation) {
    case CBN_ACT_NONE:
        break;
    case CBN_ACT_RELU:
        p->lo = 0.0f;
        break;
    case CBN_ACT_RELU6:
        p->lo = 0.0f, p->hi = 6.0f;
        break;
    case CBN_ACT_HARDTANH:
        p->lo = (float)p->opt.act_a, p->hi = (float)p->opt.act_b;
        break;
    default:
        p->clamps = false;
        break;
    }
}

/* A copy of n elements; NULL source gives zeros. */
static void *copy_elems(const void *src, int64_t n, size_t elem) {
    void *to = cbn_alloc_array((size_t)n, elem);
    if (to && src) memcpy(to, src, (size_t)n * elem);
    if (to && !src) memset(to, 0, (size_t)n * elem);
    return to;
}

static void *widen_copy(const cbn_conv_plan *p, const void *src, int64_t n) {
    float *to = cbn_alloc_array((size_t)n, sizeof *to);
    if (to) p->ctx.kernels->widen_f16(to, src, n);
    return to;
}

cbn_status cbn_plan_create(const cbn_conv_geometry *g, const void *w, const void *b,
                           const cbn_plan_options *opt, cbn_conv_plan **out, cbn_error *err) {
    *out = NULL;
    cbn_conv_plan *p = cbn_calloc(sizeof *p);
    if (!p) return cbn_fail_memory(err, "a plan", sizeof *p);
    p->g = *g;
    p->opt = *opt;
    if (!p->opt.kernels) p->opt.kernels = cbn_kernels_active();
    p->ctx = (cbn_conv_context){p->opt.kernels, p->opt.precision, p->opt.borrow};
    set_clamp(p);
    const size_t elem = cbn_dtype_size(g->dtype);
    p->w_elems = (g->transposed ? g->ic : g->oc) * ((g->transposed ? g->oc : g->ic) / g->g);
    for (int a = 0; a < g->nd; ++a) p->w_elems *= g->k[a];
    if (!opt->borrow) p->own_w = copy_elems(w, p->w_elems, elem);
    if (!opt->borrow || !b) p->own_b = copy_elems(b, g->oc, elem);
    p->w = opt->borrow ? w : p->own_w;
    p->b = opt->borrow && b ? b : p->own_b;
    bool ok = p->w && p->b;
    if (ok && g->dtype == CBN_F16) {
        p->wide_w = widen_copy(p, p->w, p->w_elems);
        p->wide_b = widen_copy(p, p->b, g->oc);
        ok = p->wide_w && p->wide_b;
    }
    if (!ok) {
        const size_t bytes = (size_t)p->w_elems * elem;
        cbn_plan_destroy(p);
        return cbn_fail_memory(err, "a plan's copy of the weights", bytes);
    }
    *out = p;
    return CBN_OK;
}

void cbn_plan_destroy(cbn_conv_plan *p) {
    if (!p) return;
    for (int i = 0; i < CBN_PLAN_SHAPES; ++i)
        shape_destroy(atomic_load_explicit(&p->shapes[i], memory_order_relaxed));
    cbn_free(p->own_w);
    cbn_free(p->own_b);
    cbn_free(p->wide_w);
    cbn_free(p->wide_b);
    cbn_free(p);
}

const cbn_conv_geometry *cbn_plan_geometry(const cbn_conv_plan *p) { return &p->g; }
const cbn_plan_options *cbn_plan_get_options(const cbn_conv_plan *p) { return &p->opt; }
const void *cbn_plan_weights(const cbn_conv_plan *p) { return p->w; }
const void *cbn_plan_bias(const cbn_conv_plan *p) { return p->b; }

cbn_status cbn_plan_output(const cbn_conv_plan *p, int64_t n, int64_t channels, const int64_t *in,
                           int64_t *out, cbn_error *err) {
    cbn_conv_desc d;
    CBN_TRY(cbn_conv_desc_make(&p->g, n, channels, in, &d, NULL, err));
    for (int a = 0; a < p->g.nd; ++a) out[a] = d.out[CBN_MAX_SPATIAL - p->g.nd + a];
    return CBN_OK;
}

/* ---- choosing ---- */
cbn_status cbn_plan_prepare(cbn_conv_plan *p, const int64_t *in, cbn_error *err) {
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_shape_acquire(p, in, &s, err));
    cbn_plan_shape_release(s);
    return CBN_OK;
}

/* An entry whose choice will be kept. */
static cbn_status acquire_kept(cbn_conv_plan *p, const int64_t *in, cbn_plan_shape **out,
                               cbn_error *err) {
    CBN_TRY(cbn_plan_shape_acquire(p, in, out, err));
    if (!(*out)->temporary) return CBN_OK;
    cbn_plan_shape_release(*out);
    return cbn_fail(err, CBN_BAD_VALUE,
                    "input_shape: expected one of the first %d shapes of a plan, got a further one",
                    CBN_PLAN_SHAPES);
}

cbn_status cbn_plan_force(cbn_conv_plan *p, const int64_t *in, const char *impl, cbn_error *err) {
    int index = 0;
    while (index < CBN_PLAN_NIMPLS && strcmp(cbn_plan_impls[index]->name, impl) != 0) ++index;
    if (index == CBN_PLAN_NIMPLS)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "algorithm: expected one of the names explain() lists, got '%.40s'", impl);
    cbn_plan_shape *s;
    CBN_TRY(acquire_kept(p, in, &s, err));
    const char *why_not = NULL;
    if (!cbn_plan_impls[index]->supports(&s->d, &p->ctx, &why_not))
        return cbn_fail(err, CBN_BAD_VALUE,
                        "algorithm: expected one that supports this shape, got '%s' (%s)", impl,
                        why_not ? why_not : "no reason given");
    CBN_TRY(cbn_plan_state_ensure(p, s, index, err));
    shape_choose(s, index, CBN_CHOICE_FORCED);
    return CBN_OK;
}

static double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { TUNE_RUNS = 7 };
static const double TUNE_SECONDS = 0.4;

static void sort_doubles(double *v, int n) {
    for (int i = 1; i < n; ++i)
        for (int j = i; j > 0 && v[j] < v[j - 1]; --j) {
            const double t = v[j];
            v[j] = v[j - 1];
            v[j - 1] = t;
        }
}

/* Median time of a few runs within `budget` seconds; always at least one. */
static cbn_status time_impl(const cbn_conv_plan *p, const cbn_plan_shape *s, int i,
                            const void *state, const cbn_conv_call *call, double budget,
                            double *seconds, cbn_error *err) {
    double runs[TUNE_RUNS];
    int n = 0;
    const double start = now_seconds();
    double before = start, after;
    do {
        CBN_TRY(cbn_plan_impls[i]->run(&s->d, &p->ctx, state, call, err));
        after = now_seconds();
        runs[n++] = after - before;
        before = after;
    } while (n < TUNE_RUNS && after - start + runs[n - 1] < budget);
    /* The first run warms caches and the scratch pool; it counts only when it is all there is. */
    if (n > 1) runs[0] = runs[--n];
    sort_doubles(runs, n);
    *seconds = runs[n / 2];
    return CBN_OK;
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

static cbn_status tune_measured(cbn_conv_plan *p, cbn_plan_shape *s, const bool candidate[],
                                int count, int *best, cbn_error *err) {
    void *states[CBN_PLAN_NIMPLS] = {0};
    const size_t elem = cbn_dtype_size(s->d.dtype);
    void *x = cbn_scratch_get((size_t)s->xp_elems * elem),
         *y = cbn_scratch_get((size_t)s->y_elems * elem);
    cbn_status status = CBN_OK;
    double fastest = INFINITY;
    const double start = now_seconds();
    if (!x || !y) {
        status = cbn_fail_memory(err, "tuning", (size_t)(s->xp_elems + s->y_elems) * elem);
        goto done;
    }
    fill_synthetic(s, x);
    const cbn_conv_call call = {.x = x,
                                .y = y,
                                .n = 1,
                                .bias = p->wide_b ? p->wide_b : p->b,
                                .lo = -INFINITY,
                                .hi = INFINITY};
    for (int i = 0; i < CBN_PLAN_NIMPLS; ++i) {
        if (!candidate[i]) continue;
        /* Where already one run takes this long, the order of the list decides. */
        if (isfinite(fastest) && now_seconds() - start + fastest > TUNE_SECONDS) break;
        double seconds = 0.0;
        status = cbn_plan_impls[i]->prepare(&s->d, &p->ctx, compute_weights(p), &states[i], err);
        if (status == CBN_OK)
            status = time_impl(p, s, i, states[i], &call, TUNE_SECONDS / count, &seconds, err);
        if (status != CBN_OK) goto done;
        if (seconds < fastest) {
            fastest = seconds;
            *best = i;
        }
    }
    state_publish(s, *best, states[*best]);
    states[*best] = NULL;
done:
    for (int i = 0; i < CBN_PLAN_NIMPLS; ++i)
        if (states[i]) cbn_plan_impls[i]->destroy(states[i]);
    cbn_scratch_put(x);
    cbn_scratch_put(y);
    return status;
}

cbn_status cbn_plan_tune(cbn_conv_plan *p, const int64_t *in, cbn_error *err) {
    cbn_plan_shape *s;
    CBN_TRY(acquire_kept(p, in, &s, err));
    bool candidate[CBN_PLAN_NIMPLS] = {false};
    int count = 0, best = CBN_PLAN_NIMPLS - 1;
    const char *why_not;
    /* The last row never wins against a kernel and can take long, so it is measured never. */
    for (int i = 0; i < CBN_PLAN_NIMPLS - 1; ++i) {
        candidate[i] = cbn_plan_impls[i]->supports(&s->d, &p->ctx, &why_not);
        if (candidate[i]) best = i;
        count += candidate[i];
    }
    if (count > 1) CBN_TRY(tune_measured(p, s, candidate, count, &best, err));
    CBN_TRY(cbn_plan_state_ensure(p, s, best, err));
    shape_choose(s, best, CBN_CHOICE_TUNED);
    return CBN_OK;
}

/* ---- explaining ---- */
static const char *reason_for(const cbn_conv_plan *p, const cbn_plan_shape *s, int i,
                              cbn_choice_origin origin) {
    const char *why_not = NULL;
    if (!cbn_plan_impls[i]->supports(&s->d, &p->ctx, &why_not))
        return why_not ? why_not : "no reason given";
    if (origin == CBN_CHOICE_FORCED) return "another algorithm was chosen by name";
    if (origin == CBN_CHOICE_TUNED)
        return i == CBN_PLAN_NIMPLS - 1 ? "fallback, not measured"
                                        : "tuning kept another algorithm";
    return "another algorithm is estimated to be faster";
}

cbn_status cbn_plan_explain(cbn_conv_plan *p, int64_t n, const int64_t *in, cbn_plan_report *out,
                            cbn_error *err) {
    cbn_conv_desc d;
    CBN_TRY(cbn_conv_desc_make(&p->g, n, p->g.ic, in, &d, NULL, err));
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_shape_acquire(p, in, &s, err));
    const int choice = atomic_load_explicit(&s->choice, memory_order_acquire);
    const int index = choice % CBN_PLAN_NIMPLS;
    const cbn_choice_origin origin = (cbn_choice_origin)(choice / CBN_PLAN_NIMPLS);
    const cbn_conv_impl *impl = cbn_plan_impls[index];
    const void *state = atomic_load_explicit(&s->state[index], memory_order_acquire);
    const int64_t elem = (int64_t)cbn_dtype_size(p->g.dtype);
    const int64_t images = cbn_plan_stage_images(p, s, n, false);
    *out = (cbn_plan_report){
        .isa = impl == &cbn_conv_ref ? "scalar" : p->ctx.kernels->isa,
        .algorithm = impl->name,
        .ncandidates = CBN_PLAN_NIMPLS,
        .tuned = origin == CBN_CHOICE_TUNED,
        .weight_bytes = (size_t)((p->w_elems + p->g.oc) * (p->wide_w ? elem + 4 : elem)) +
                        impl->state_bytes(state),
        .workspace_bytes =
            cbn_plan_stage_bytes(p, s, images, false) +
            impl->workspace_bytes(&s->d, &p->ctx, state, images, cbn_threads_get(NULL)),
        .input_bytes = (size_t)(n * s->x_elems * elem),
        .output_bytes = (size_t)(n * s->y_elems * elem),
        .flops = cbn_conv_flops(&d),
        .flops_real = cbn_conv_flops_real(&d),
    };
    impl->describe(&s->d, &p->ctx, state, out->tile, sizeof out->tile);
    for (int i = 0; i < CBN_PLAN_NIMPLS; ++i)
        out->candidates[i] = (cbn_plan_candidate){cbn_plan_impls[i]->name,
                                                  i == index ? NULL : reason_for(p, s, i, origin)};
    cbn_plan_shape_release(s);
    return CBN_OK;
}
