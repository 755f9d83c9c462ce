/* SPDX-License-Identifier: BSD-3-Clause */
/* Which row serves a shape: the cheapest by estimate, or one fixed by name. */
#include "ops/conv_plan_priv.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

void cbn_plan_choose(cbn_plan_shape *s, int index, cbn_choice_origin origin) {
    atomic_store_explicit(&s->choice, index + (int)origin * CBN_PLAN_NIMPLS, memory_order_release);
}

int cbn_plan_cheapest(const cbn_conv_plan *p, const cbn_plan_shape *s) {
    const char *why_not;
    int best = CBN_PLAN_NIMPLS - 1; /* supports everything and beats no kernel, so it is not asked */
    double least = INFINITY;
    for (int i = 0; i < CBN_PLAN_NIMPLS - 1; ++i) {
        if (!cbn_plan_impls[i]->supports(&s->d, &p->ctx, &why_not)) continue;
        const double cost = cbn_plan_impls[i]->cost(&s->d, &p->ctx);
        if (!(cost < least)) continue;
        least = cost;
        best = i;
    }
    return best;
}

double cbn_plan_times(const cbn_conv_plan *p, const cbn_plan_shape *s, int i, int of) {
    assert(i < CBN_PLAN_NIMPLS - 1 && of < CBN_PLAN_NIMPLS - 1);
    return cbn_plan_impls[i]->cost(&s->d, &p->ctx) / cbn_plan_impls[of]->cost(&s->d, &p->ctx);
}

cbn_status cbn_plan_acquire_kept(cbn_conv_plan *p, const int64_t *in, cbn_plan_shape **out, cbn_error *err) {
    CBN_TRY(cbn_plan_shape_acquire(p, in, out, err));
    if (!(*out)->temporary) return CBN_OK;
    cbn_plan_shape_release(*out);
    return cbn_fail(err, CBN_BAD_VALUE,
                    "input_shape: expected one of the first %d shapes of a plan, got a further one",
                    CBN_PLAN_SHAPES);
}

/* The names of the list, as many as fit. */
static void list_names(char *buf, size_t size) {
    size_t used = 0;
    for (int i = 0; i < CBN_PLAN_NIMPLS && used < size; ++i)
        used += (size_t)snprintf(buf + used, size - used, "%s%s", i ? ", " : "", cbn_plan_impls[i]->name);
}

cbn_status cbn_plan_force(cbn_conv_plan *p, const int64_t *in, const char *impl, cbn_error *err) {
    int index = 0;
    while (index < CBN_PLAN_NIMPLS && strcmp(cbn_plan_impls[index]->name, impl) != 0) ++index;
    if (index == CBN_PLAN_NIMPLS) {
        char names[sizeof err->message - 64];
        list_names(names, sizeof names);
        return cbn_fail(err, CBN_BAD_VALUE, "algorithm: expected one of %s, got '%.30s'", names, impl);
    }
    cbn_plan_shape *s;
    CBN_TRY(cbn_plan_acquire_kept(p, in, &s, err));
    const char *why_not = NULL;
    if (!cbn_plan_impls[index]->supports(&s->d, &p->ctx, &why_not))
        return cbn_fail(err, CBN_BAD_VALUE,
                        "algorithm: expected one that supports this shape, got '%s' (%s)", impl,
                        why_not ? why_not : "no reason given");
    CBN_TRY(cbn_plan_state_ensure(p, s, index, err));
    cbn_plan_choose(s, index, CBN_CHOICE_FORCED);
    return CBN_OK;
}
