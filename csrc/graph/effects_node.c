/* SPDX-License-Identifier: BSD-3-Clause */
/* One node's contribution to the effects analysis. */
#include "graph/effects_priv.h"

#include <string.h>

enum { WRITES = 1, VIEWS = 2, RETURNS = 4 };

typedef struct visit {
    cbn_effects *e;
    cbn_node_id node;
    int what;
    uint32_t held; /* arrays found in what the node names */
    cbn_error *err;
} visit;

static cbn_status touch(const visit *v, uint32_t element) {
    if (v->what & VIEWS) cbn_effects_join(v->e, v->node, element);
    if (v->what & RETURNS) CBN_TRY(cbn_effects_return(v->e, element, v->err));
    return v->what & WRITES ? cbn_effects_mark(v->e, element, v->node, v->err) : CBN_OK;
}

/* Everything in memory that a value holds: nodes and constant arrays, nested ones too. */
static cbn_status touch_value(const visit *v, const cbn_value *value) {
    if (value->tag == CBN_V_NODE) return touch(v, value->u.node);
    if (cbn_value_is_seq(value)) {
        for (uint32_t i = 0; i < value->u.seq->count; i++) CBN_TRY(touch_value(v, &value->u.seq->v[i]));
        return CBN_OK;
    }
    if (value->tag != CBN_V_HOST) return CBN_OK;
    bool is_array;
    uint32_t element;
    CBN_TRY(cbn_effects_add_array(v->e, value->u.host, UINT32_MAX, &is_array, &element, v->err));
    return is_array ? touch(v, element) : CBN_OK;
}

static cbn_status touch_all(const visit *v, const cbn_args *args) {
    for (uint32_t i = 0; i < args->nargs; i++) CBN_TRY(touch_value(v, &args->v[i]));
    for (uint32_t k = 0; k < args->nkw; k++) CBN_TRY(touch_value(v, cbn_args_kw(args, k)));
    return CBN_OK;
}

/* How many lists deep the arrays of a value may be: [x] is one deep, and so is what chunk gives. */
static uint32_t list_depth(const cbn_effects *e, const cbn_value *value) {
    if (value->tag == CBN_V_NODE) return e->lists.v[value->u.node];
    if (value->tag != CBN_V_TUPLE && value->tag != CBN_V_LIST && value->tag != CBN_V_DICT) return 0;
    uint32_t deepest = 0;
    for (uint32_t i = 0; value->has_nodes && i < value->u.seq->count; i++) {
        deepest = CBN_MAX(deepest, list_depth(e, &value->u.seq->v[i]));
    }
    return value->has_nodes ? 1 + deepest : 0;
}

/* Python's operators on lists make lists of the same objects: [x, y] + [z], parts + others, parts[0] = x. */
static bool makes_lists(const visit *v, const cbn_bound *b) {
    uint32_t *mine = &v->e->lists.v[v->node];
    if (b->op->family == CBN_FAMILY_GETITEM) {
        const uint32_t depth = list_depth(v->e, &b->v[0]);
        *mine = b->v[1].tag == CBN_V_SLICE || depth == 0 ? depth : depth - 1;
        return false;
    }
    if (strncmp(b->op->name, "operator.", 9) != 0) {
        *mine = b->op->nreturns != 1;
        return false;
    }
    for (int i = 0; i < b->n; i++) *mine = CBN_MAX(*mine, list_depth(v->e, &b->v[i]));
    return *mine != 0;
}

static cbn_status bound_call(visit *v, const cbn_bound *b) {
    const bool lists = makes_lists(v, b);
    for (int i = 0; i < b->n; i++) {
        v->what = (cbn_bound_writes(b, i) ? WRITES : 0) | (b->op->params[i].aliased ? VIEWS : 0);
        if (lists && (b->v[i].has_nodes || cbn_value_is_seq(&b->v[i]))) v->what |= VIEWS;
        if (v->what == 0) continue;
        if (!b->op->params[i].variadic) {
            CBN_TRY(touch_value(v, &b->v[i]));
            continue;
        }
        for (uint32_t k = 0; k < b->nrest; k++) CBN_TRY(touch_value(v, &b->rest[k]));
    }
    return CBN_OK;
}

static cbn_status call(visit *v, const cbn_node *node) {
    cbn_graph *g = v->e->g;
    cbn_bound bound;
    cbn_error ignored; /* a call that does not bind is like one of a callable or method that nobody knows */
    if (node->opcode != 0 && cbn_op_bind(g, v->node, &bound, &ignored) == CBN_OK) return bound_call(v, &bound);
    CBN_TRY(cbn_effects_share(v->e, v->node, v->err));
    v->what = VIEWS | WRITES;
    return touch_all(v, node->args);
}

/* ---- modules ----------------------------------------------------------------------------------------------------- */
static cbn_status touch_held(cbn_host array, void *arg) {
    const visit *v = arg;
    bool is_array;
    uint32_t element;
    CBN_TRY(cbn_effects_add_array(v->e, array, UINT32_MAX, &is_array, &element, v->err));
    return is_array ? touch(v, element) : CBN_OK;
}

/* num_batches_tracked: the only array of integers a BatchNorm has. */
static cbn_status touch_counter(cbn_host array, void *arg) {
    const visit *v = arg;
    cbn_array_info info;
    bool is_array;
    CBN_TRY(cbn_graph_host(v->e->g)->array(array, &info, &is_array, v->err));
    return is_array && info.kind != 'f' ? touch_held(array, arg) : CBN_OK;
}

static cbn_status write_statistics(visit *v, cbn_host module, const cbn_module_info *info) {
    v->what = WRITES;
    if (info->mean != NULL) CBN_TRY(touch_held(info->mean, v));
    if (info->var != NULL) CBN_TRY(touch_held(info->var, v));
    return cbn_graph_host(v->e->g)->module_arrays(module, touch_counter, v, v->err);
}

static cbn_status call_module(visit *v, const cbn_node *node, cbn_host root) {
    const cbn_host_vtable *host = cbn_graph_host(v->e->g);
    cbn_host module = NULL;
    if (root != NULL && node->target.tag == CBN_V_STR) {
        CBN_TRY(host->resolve(root, cbn_graph_str(v->e->g, node->target.u.str, NULL), &module, v->err));
    }
    if (module != NULL) {
        cbn_module_info info;
        CBN_TRY(host->module(module, &info, v->err));
        const bool layer = info.kind != CBN_MODULE_OTHER && !info.hooked;
        const bool trains = info.kind == CBN_MODULE_BATCH_NORM && info.training;
        if (layer) return trains ? write_statistics(v, module, &info) : CBN_OK;
        v->what = VIEWS;
        if (info.pure) return touch_all(v, node->args);
        v->what = VIEWS | WRITES;
        CBN_TRY(host->module_arrays(module, touch_held, v, v->err));
    }
    CBN_TRY(cbn_effects_share(v->e, v->node, v->err));
    v->what = VIEWS | WRITES;
    return touch_all(v, node->args);
}

static cbn_status join_held(cbn_host array, void *arg) {
    visit *v = arg;
    bool is_array;
    uint32_t element;
    v->held++;
    return cbn_effects_add_array(v->e, array, v->node, &is_array, &element, v->err);
}

static cbn_status get_attr(visit *v, const cbn_node *node, cbn_host root) {
    cbn_effects *e = v->e;
    const cbn_host_vtable *host = cbn_graph_host(e->g);
    cbn_host object = NULL;
    CBN_TRY(cbn_effects_share(e, v->node, v->err));
    if (root != NULL && node->target.tag == CBN_V_STR) {
        CBN_TRY(host->resolve(root, cbn_graph_str(e->g, node->target.u.str, NULL), &object, v->err));
    }
    if (object == NULL) {
        cbn_effects_join(e, v->node, e->anything);
        return CBN_OK;
    }
    bool is_array;
    uint32_t element;
    CBN_TRY(cbn_effects_add_array(e, object, v->node, &is_array, &element, v->err));
    if (is_array) return CBN_OK;
    if (host->plain != NULL && host->plain(object)) return CBN_OK;
    e->lists.v[v->node] = 1; /* or a list of some */
    /* A module: whoever is handed it may look at its arrays. Another object may hold any. */
    CBN_TRY(host->module_arrays(object, join_held, v, v->err));
    if (v->held == 0) cbn_effects_join(e, v->node, e->anything);
    return CBN_OK;
}

static cbn_status placeholder(visit *v) {
    cbn_effects *e = v->e;
    CBN_TRY(cbn_effects_share(e, v->node, v->err));
    if (e->next_input == e->ninputs) return CBN_OK;
    bool is_array;
    uint32_t element;
    return cbn_effects_add_array(e, e->inputs[e->next_input++], v->node, &is_array, &element, v->err);
}

cbn_status cbn_effects_node(cbn_effects *e, cbn_node_id id, cbn_host root, cbn_error *err) {
    const cbn_node *node = cbn_graph_node(e->g, id);
    visit v = {.e = e, .node = id, .err = err};
    switch (node->op) {
    case CBN_NODE_PLACEHOLDER: return placeholder(&v);
    case CBN_NODE_GET_ATTR: return get_attr(&v, node, root);
    case CBN_NODE_CALL_MODULE: return call_module(&v, node, root);
    case CBN_NODE_CALL_FUNCTION:
    case CBN_NODE_CALL_METHOD: return call(&v, node);
    case CBN_NODE_OUTPUT: v.what = RETURNS; return touch_all(&v, node->args);
    default: return CBN_OK;
    }
}
