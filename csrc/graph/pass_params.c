/* SPDX-License-Identifier: BSD-3-Clause */
/* Parameters become constants: placeholders of lifted graphs and get_attr nodes of arrays.
 *
 * First every verdict, on the untouched graph, then the edits, in place: ids, names and users stay. */
#include "graph/passes.h"

#include <stdlib.h>
#include <string.h>

#include "base/cbn_alloc.h"

/* One placeholder or get_attr node of an array. */
typedef struct param {
    cbn_node_id node, blocking;
    uint8_t reason; /* CBN_FREEZE_OK: becomes a constant */
    cbn_host array; /* borrowed */
    uintptr_t lo, hi;
} param;

typedef struct freezer {
    cbn_freeze *f;
    cbn_graph *g;
    const cbn_params_host *host;
    cbn_effects *effects;
    param *v;
    uint32_t n;
} freezer;

/* ---- verdicts ---------------------------------------------------------------------------------------------------- */
static void judge(const freezer *z, param *p) {
    if (cbn_effects_written(z->effects, p->node)) {
        p->reason = CBN_FREEZE_MUTATED;
        p->blocking = cbn_effects_writer(z->effects, p->node, 0, 0);
    } else if (cbn_effects_returned(z->effects, p->node)) {
        p->reason = CBN_FREEZE_ALIASES_OUTPUT;
        p->blocking = cbn_graph_output(z->g);
    }
}

/* What the exporter says of parameter i, word for word. */
static void take_word(const freezer *z, uint32_t i, param *p) {
    p->reason = z->host->given[i];
    if (p->reason == CBN_FREEZE_MUTATED) p->blocking = cbn_effects_writer(z->effects, p->node, 0, 0);
    if (p->reason == CBN_FREEZE_ALIASES_OUTPUT) p->blocking = cbn_graph_output(z->g);
}

static cbn_status fits(const freezer *z, uint32_t i, const param *p, const cbn_array_info *info) {
    const cbn_tensor_meta *t = cbn_graph_node(z->g, p->node)->tensor;
    if (t == NULL || t->ndim < 0) return CBN_OK;
    bool equal = t->ndim == info->ndim;
    for (int k = 0; equal && k < info->ndim; k++) equal = t->shape[k] == info->shape[k];
    if (equal) return CBN_OK;
    return cbn_fail(z->f->err, CBN_BAD_VALUE, "flat_params[%u]: its shape is not that of placeholder %s", i,
                    cbn_graph_str(z->g, cbn_graph_node(z->g, p->node)->name, NULL));
}

static cbn_status add_placeholder(freezer *z, uint32_t i, cbn_node_id id) {
    param *p = &z->v[z->n];
    *p = (param){.node = id, .array = z->host->params[i]};
    cbn_array_info info;
    bool is_array;
    CBN_TRY(cbn_graph_host(z->g)->array(p->array, &info, &is_array, z->f->err));
    assert(is_array);
    CBN_TRY(fits(z, i, p, &info));
    p->lo = (uintptr_t)info.lo;
    p->hi = (uintptr_t)info.hi;
    if (z->host->given != NULL) take_word(z, i, p);
    else judge(z, p);
    z->n++;
    return CBN_OK;
}

static cbn_status add_get_attr(freezer *z, cbn_node_id id) {
    const cbn_host_vtable *vt = cbn_graph_host(z->g);
    const cbn_value target = cbn_graph_node(z->g, id)->target;
    cbn_host object = NULL;
    if (z->f->root == NULL || target.tag != CBN_V_STR) return CBN_OK;
    CBN_TRY(vt->resolve(z->f->root, cbn_graph_str(z->g, target.u.str, NULL), &object, z->f->err));
    if (object == NULL) return CBN_OK; /* the graph raises when it runs, as it did */
    cbn_array_info info;
    bool is_array;
    CBN_TRY(vt->array(object, &info, &is_array, z->f->err));
    if (!is_array) return CBN_OK;
    param *p = &z->v[z->n++];
    *p = (param){.node = id, .array = object, .lo = (uintptr_t)info.lo, .hi = (uintptr_t)info.hi};
    judge(z, p);
    return CBN_OK;
}

static cbn_status judge_all(freezer *z) {
    uint32_t placeholders = 0;
    for (cbn_node_id id = cbn_graph_first(z->g); id != 0; id = cbn_graph_next(z->g, id)) {
        const uint8_t op = cbn_graph_node(z->g, id)->op;
        if (op == CBN_NODE_GET_ATTR) {
            CBN_TRY(add_get_attr(z, id));
        } else if (op == CBN_NODE_PLACEHOLDER && placeholders < z->host->nparams) {
            CBN_TRY(add_placeholder(z, placeholders++, id));
        }
    }
    if (placeholders == z->host->nparams) return CBN_OK;
    return cbn_fail(z->f->err, CBN_BAD_VALUE,
                    "flat_params: expected at most %u arrays, one for each placeholder, got %u", placeholders,
                    z->host->nparams);
}

static int by_start(const void *a, const void *b) {
    const param *p = *(const param *const *)a, *q = *(const param *const *)b;
    return (p->lo > q->lo) - (p->lo < q->lo);
}

/* The exporter speaks of inputs, not of memory: what shares memory with a parameter that stays, stays. (Our own
 * analysis knows the memory already.) */
static cbn_status spread(freezer *z) {
    if (z->host->given == NULL || z->n == 0) return CBN_OK;
    param **sorted = cbn_alloc_array(z->n, sizeof *sorted);
    if (sorted == NULL) return cbn_fail_memory(z->f->err, "parameters", z->n * sizeof *sorted);
    uint32_t n = 0;
    for (uint32_t i = 0; i < z->n; i++) {
        if (z->v[i].lo != z->v[i].hi) sorted[n++] = &z->v[i];
    }
    if (n > 0) qsort(sorted, n, sizeof *sorted, by_start);
    for (uint32_t first = 0, end; first < n; first = end) {
        uintptr_t hi = sorted[first]->hi;
        const param *stays = NULL;
        for (end = first; end < n && (end == first || sorted[end]->lo < hi); end++) {
            hi = CBN_MAX(hi, sorted[end]->hi);
            if (stays == NULL && sorted[end]->reason != CBN_FREEZE_OK) stays = sorted[end];
        }
        for (uint32_t i = first; stays != NULL && i < end; i++) {
            if (sorted[i]->reason != CBN_FREEZE_OK) continue;
            sorted[i]->reason = stays->reason;
            sorted[i]->blocking = stays->blocking;
        }
    }
    cbn_free(sorted);
    return CBN_OK;
}

/* ---- edits ------------------------------------------------------------------------------------------------------- */
static bool has_constant_name(const freezer *z, const cbn_node *node) {
    const char *target = cbn_graph_str(z->g, node->target.u.str, NULL);
    const size_t stem = strlen(z->host->stem);
    if (strncmp(target, z->host->stem, stem) != 0 || target[stem] == '\0') return false;
    return target[stem + strspn(target + stem, "0123456789")] == '\0';
}

static cbn_status become_get_attr(freezer *z, cbn_node_id id) {
    if (cbn_graph_node(z->g, id)->op == CBN_NODE_GET_ATTR) return CBN_OK;
    CBN_TRY(cbn_graph_set_args(z->g, id, NULL, 0, NULL, 0, z->f->err)); /* a default */
    cbn_graph_set_type_expr(z->g, id, NULL);
    return cbn_graph_set_op(z->g, id, CBN_NODE_GET_ATTR, z->f->err);
}

static cbn_status freeze_one(freezer *z, const param *p) {
    if (p->reason != CBN_FREEZE_OK) {
        return cbn_freeze_keep(z->f, CBN_STEP_PARAMETER, (cbn_freeze_reason)p->reason, p->node, p->blocking, NULL);
    }
    const cbn_node *node = cbn_graph_node(z->g, p->node);
    if (node->op == CBN_NODE_GET_ATTR && has_constant_name(z, node)) return CBN_OK;
    cbn_str name;
    CBN_TRY(z->host->constant(z->g, p->array, &name, z->host->arg, z->f->err));
    if (name == CBN_STR_NONE) {
        return cbn_freeze_keep(z->f, CBN_STEP_PARAMETER, CBN_FREEZE_NOT_ARRAY, p->node, 0, NULL);
    }
    CBN_TRY(become_get_attr(z, p->node));
    CBN_TRY(cbn_graph_set_target(z->g, p->node, cbn_value_str(name), z->f->err));
    return cbn_freeze_done(z->f, CBN_STEP_PARAMETER, p->node, name);
}

static cbn_status run(freezer *z) {
    const cbn_params_host *h = z->host;
    const bool own = h->given == NULL;
    CBN_TRY(cbn_effects_build_with(z->g, z->f->root, h->params, own ? h->nparams : 0, &z->effects, z->f->err));
    z->v = cbn_alloc_array(cbn_graph_count(z->g) + 1, sizeof *z->v);
    if (z->v == NULL) return cbn_fail_memory(z->f->err, "parameters", cbn_graph_count(z->g) * sizeof *z->v);
    cbn_graph_lock(z->g); /* host code may run */
    const cbn_status status = judge_all(z);
    cbn_graph_unlock(z->g);
    CBN_TRY(status);
    CBN_TRY(spread(z));
    for (uint32_t i = 0; i < z->n; i++) CBN_TRY(freeze_one(z, &z->v[i]));
    return CBN_OK;
}

cbn_status cbn_pass_params(cbn_freeze *f, const cbn_params_host *host) {
    freezer z = {.f = f, .g = f->g, .host = host};
    const cbn_status status = run(&z);
    cbn_effects_free(z.effects);
    cbn_free(z.v);
    return status;
}
