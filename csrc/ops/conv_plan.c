/* SPDX-License-Identifier: BSD-3-Clause */
/* The list of convolution algorithms and the plan: its weights, and the entries for the input shapes it has met. Which
 * algorithm serves a shape is decided in conv_plan_choose.c.
 *
 * Shapes are kept in a few slots that are filled once by compare-and-swap and never emptied. Two
 * threads that meet a new shape at the same time may both prepare it, and one of the two results is
 * dropped; in exchange there is no lock that a fork could catch held. */
#include "ops/conv_plan_priv.h"

#include "base/cbn_alloc.h"

#include <math.h>
#include <string.h>

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

size_t cbn_plan_shape_bytes(const cbn_plan_shape *s) {
    size_t bytes = 0;
    for (int i = 0; i < CBN_PLAN_NIMPLS; ++i)
        if (atomic_load_explicit(&s->state[i], memory_order_acquire))
            bytes += atomic_load_explicit(&s->state_bytes[i], memory_order_relaxed);
    return bytes;
}

cbn_status cbn_plan_state_make(const cbn_conv_plan *p, const cbn_plan_shape *s, int i, cbn_plan_state *out,
                               cbn_error *err) {
    out->state = NULL;
    const int64_t before = cbn_alloc_thread_bytes();
    const bool recycle = cbn_alloc_recycle(p->ctx.one_shot || s->temporary);
    const cbn_status status =
        cbn_plan_impls[i]->prepare(&s->d, &p->ctx, p->wide_w ? p->wide_w : p->w, &out->state, err);
    (void)cbn_alloc_recycle(recycle);
    if (status != CBN_OK) return status;
    assert(out->state);
    out->bytes = (size_t)(cbn_alloc_thread_bytes() - before);
    return CBN_OK;
}

void cbn_plan_state_publish(cbn_plan_shape *s, int i, cbn_plan_state made) {
    void *none = NULL;
    /* Before the state: who sees the state sees its size. Another thread's state of this row is of the same size. */
    atomic_store_explicit(&s->state_bytes[i], made.bytes, memory_order_relaxed);
    if (!atomic_compare_exchange_strong(&s->state[i], &none, made.state)) cbn_plan_impls[i]->destroy(made.state);
}

cbn_status cbn_plan_state_ensure(const cbn_conv_plan *p, cbn_plan_shape *s, int i,
                                 cbn_error *err) {
    if (atomic_load_explicit(&s->state[i], memory_order_acquire)) return CBN_OK;
    cbn_plan_state made;
    CBN_TRY(cbn_plan_state_make(p, s, i, &made, err));
    cbn_plan_state_publish(s, i, made);
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
    cbn_plan_choose(s, cbn_plan_cheapest(p, s), CBN_CHOICE_LISTED);
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
    const bool recycle = cbn_alloc_recycle(opt->borrow);
    if (ok && g->dtype == CBN_F16) {
        p->wide_w = widen_copy(p, p->w, p->w_elems);
        p->wide_b = widen_copy(p, p->b, g->oc);
        ok = p->wide_w && p->wide_b;
    }
    (void)cbn_alloc_recycle(recycle);
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

cbn_status cbn_plan_prepare(cbn_conv_plan *p, const int64_t *in, cbn_error *err) {
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_shape_acquire(p, in, &s, err));
    const cbn_status status = cbn_plan_state_ensure(p, s, cbn_plan_choice(s), err);
    cbn_plan_shape_release(s);
    return status;
}

size_t cbn_plan_bytes(const cbn_conv_plan *p) {
    const size_t elem = cbn_dtype_size(p->g.dtype), wide = p->wide_w ? sizeof(float) : 0;
    size_t bytes = sizeof *p;
    bytes += (size_t)p->w_elems * (wide + (p->own_w ? elem : 0)) + (size_t)p->g.oc * (wide + (p->own_b ? elem : 0));
    for (int i = 0; i < CBN_PLAN_SHAPES; ++i) {
        const cbn_plan_shape *s = atomic_load_explicit(&p->shapes[i], memory_order_acquire);
        if (s) bytes += sizeof *s + cbn_plan_shape_bytes(s);
    }
    return bytes;
}
