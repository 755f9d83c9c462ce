/* SPDX-License-Identifier: BSD-3-Clause */
/* What a plan does for a shape and why: chosen row, refusals, estimates and measurements, memory. */
#include "ops/conv_plan_priv.h"

#include "threads/cbn_parallel.h"

#include <stdio.h>

static double micros(const cbn_plan_shape *s, int i) {
    return 1e6 * (double)atomic_load_explicit(&s->seconds[i], memory_order_relaxed);
}

/* Why row i was not taken although it supports the shape; `index` was. */
static void compare(const cbn_conv_plan *p, const cbn_plan_shape *s, int i, int index, cbn_choice_origin origin,
                    char *buf, size_t size) {
    const int last = CBN_PLAN_NIMPLS - 1;
    const char *chosen = cbn_plan_impls[index]->name;
    if (origin == CBN_CHOICE_TUNED && micros(s, i) > 0) {
        snprintf(buf, size, "measured %.4g us, %.2f times the time of %s", micros(s, i), micros(s, i) / micros(s, index),
                 chosen);
    } else if (i == last) {
        snprintf(buf, size, "fallback, slower than any other");
    } else if (index == last) {
        snprintf(buf, size, "estimated to be faster than %s, which was asked for by name", chosen);
    } else if (origin == CBN_CHOICE_TUNED) {
        snprintf(buf, size, "not measured: estimated %.2f times the time of %s", cbn_plan_times(p, s, i, index), chosen);
    } else {
        snprintf(buf, size, "estimated %.2f times the time of %s%s", cbn_plan_times(p, s, i, index), chosen,
                 origin == CBN_CHOICE_FORCED ? ", which was asked for by name" : "");
    }
}

static void candidates_fill(const cbn_conv_plan *p, const cbn_plan_shape *s, int index, cbn_choice_origin origin,
                            cbn_plan_report *out) {
    _Static_assert((int)CBN_PLAN_NIMPLS <= (int)CBN_MAX_IMPLS, "the report has room for every algorithm");
    out->ncandidates = CBN_PLAN_NIMPLS;
    for (int i = 0; i < CBN_PLAN_NIMPLS; ++i) {
        cbn_plan_candidate *c = &out->candidates[i];
        const char *why_not = NULL;
        c->name = cbn_plan_impls[i]->name;
        c->reason = c->text;
        c->seconds = atomic_load_explicit(&s->seconds[i], memory_order_relaxed);
        if (i == index)
            c->reason = NULL;
        else if (!cbn_plan_impls[i]->supports(&s->d, &p->ctx, &why_not))
            snprintf(c->text, sizeof c->text, "%s", why_not ? why_not : "no reason given");
        else
            compare(p, s, i, index, origin, c->text, sizeof c->text);
    }
}

static size_t image_workspace(const cbn_conv_plan *p, const cbn_plan_shape *s, int index, int64_t n, int64_t images) {
    const cbn_conv_impl *impl = cbn_plan_impls[index];
    const void *state = atomic_load_explicit(&s->state[index], memory_order_acquire);
    const size_t own =
        impl->workspace_bytes ? impl->workspace_bytes(&s->d, &p->ctx, state, images, cbn_threads_get(NULL)) : 0;
    return cbn_plan_stage_bytes(p, s, CBN_MIN(n, images), false) + cbn_plan_redo_bytes(impl, images) + own;
}

cbn_status cbn_plan_explain(cbn_conv_plan *p, int64_t n, const int64_t *in, cbn_plan_report *out,
                            cbn_error *err) {
    cbn_conv_desc d;
    CBN_TRY(cbn_conv_desc_make(&p->g, n, p->g.ic, in, &d, NULL, err));
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_shape_acquire(p, in, &s, err));
    const int choice = atomic_load_explicit(&s->choice, memory_order_acquire), index = choice % CBN_PLAN_NIMPLS;
    const cbn_choice_origin origin = (cbn_choice_origin)(choice / CBN_PLAN_NIMPLS);
    const cbn_status status = cbn_plan_state_ensure(p, s, index, err);
    if (status != CBN_OK) {
        cbn_plan_shape_release(s);
        return status;
    }
    const cbn_conv_impl *impl = cbn_plan_impls[index];
    const void *state = atomic_load_explicit(&s->state[index], memory_order_acquire);
    const int64_t elem = (int64_t)cbn_dtype_size(p->g.dtype);
    *out = (cbn_plan_report){
        .isa = impl == &cbn_conv_ref ? "scalar" : p->ctx.kernels->isa,
        .algorithm = impl->name,
        .tuned = origin == CBN_CHOICE_TUNED,
        .weight_bytes = (size_t)((p->w_elems + p->g.oc) * (p->wide_w ? elem + 4 : elem)),
        .packed_bytes = cbn_plan_shape_bytes(s),
        .plan_bytes = cbn_plan_bytes(p) + (s->temporary ? sizeof *s + cbn_plan_shape_bytes(s) : 0),
        .workspace_bytes = image_workspace(p, s, index, n, cbn_plan_stage_images(p, s, n, false)),
        .input_bytes = (size_t)(n * s->x_elems * elem),
        .output_bytes = (size_t)(n * s->y_elems * elem),
        .flops = cbn_conv_flops(&d),
        .flops_real = cbn_conv_flops_real(&d),
    };
    impl->describe(&s->d, &p->ctx, state, out->tile, sizeof out->tile);
    candidates_fill(p, s, index, origin, out);
    cbn_plan_shape_release(s);
    return CBN_OK;
}
