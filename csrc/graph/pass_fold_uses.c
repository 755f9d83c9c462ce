/* SPDX-License-Identifier: BSD-3-Clause */
/* How often a graph uses the memory of each array: by get_attr nodes (once for each user), constants in arguments, and
 * modules that are called. Weights of one use only may change their value for everybody. */
#include "graph/pass_fold_layers.h"

#include <stdlib.h>
#include <string.h>

#include "base/cbn_alloc.h"

typedef struct cbn_memory_range {
    uintptr_t lo, hi;
    uint32_t uses;
    cbn_node_id who[2]; /* the first two nodes that have it */
    uint32_t gen[2];
} cbn_memory_range;

void cbn_memory_uses_free(cbn_memory_uses *u) {
    cbn_free(u->ranges);
    cbn_free(u->start);
    *u = (cbn_memory_uses){0};
}

typedef struct gather {
    cbn_memory_uses *u;
    cbn_graph *g;
    const cbn_host_vtable *vt;
    cbn_node_id node;
    uint32_t uses;
    uintptr_t lo; /* of the last array */
    cbn_error *err;
} gather;

static cbn_status add_array(cbn_host array, void *arg) {
    gather *w = arg;
    cbn_memory_uses *u = w->u;
    cbn_array_info info;
    bool is_array;
    CBN_TRY(w->vt->array(array, &info, &is_array, w->err));
    if (!is_array || info.lo == info.hi) return CBN_OK;
    if (u->count == u->room) {
        const uint32_t room = u->room == 0 ? 64 : u->room * 2;
        cbn_memory_range *larger = cbn_realloc(u->ranges, room * sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(w->err, "the uses of weights", room * sizeof *larger);
        u->ranges = larger;
        u->room = room;
    }
    w->lo = (uintptr_t)info.lo;
    u->ranges[u->count++] = (cbn_memory_range){.lo = w->lo,
                                               .hi = (uintptr_t)info.hi,
                                               .uses = w->uses,
                                               .who = {w->node},
                                               .gen = {cbn_graph_node(w->g, w->node)->gen}};
    return CBN_OK;
}

static cbn_status add_value(gather *w, const cbn_value *v) {
    if (v->tag == CBN_V_HOST) return add_array(v->u.host, w);
    if (!cbn_value_is_seq(v)) return CBN_OK;
    for (uint32_t i = 0; i < v->u.seq->count; i++) CBN_TRY(add_value(w, &v->u.seq->v[i]));
    return CBN_OK;
}

static cbn_status add_named(gather *w, const cbn_node *n, cbn_host root) {
    if (root == NULL || n->target.tag != CBN_V_STR) return CBN_OK;
    cbn_host object;
    CBN_TRY(w->vt->resolve(root, cbn_graph_str(w->g, n->target.u.str, NULL), &object, w->err));
    if (object == NULL) return CBN_OK;
    cbn_array_info info;
    bool is_array;
    CBN_TRY(w->vt->array(object, &info, &is_array, w->err));
    return is_array ? add_array(object, w) : w->vt->module_arrays(object, add_array, w, w->err);
}

static cbn_status add_node(gather *w, cbn_node_id id, cbn_host root) {
    const cbn_node *n = cbn_graph_node(w->g, id);
    w->node = id;
    w->uses = 1;
    w->lo = 0;
    if (n->op == CBN_NODE_GET_ATTR) {
        w->uses = n->n_users;
        CBN_TRY(add_named(w, n, root));
        w->u->start[id] = w->lo;
        return CBN_OK;
    }
    if (n->op == CBN_NODE_CALL_MODULE) CBN_TRY(add_named(w, n, root));
    for (uint32_t i = 0; i < n->args->nargs; i++) CBN_TRY(add_value(w, &n->args->v[i]));
    for (uint32_t k = 0; k < n->args->nkw; k++) CBN_TRY(add_value(w, cbn_args_kw(n->args, k)));
    return CBN_OK;
}

static int by_start(const void *a, const void *b) {
    const cbn_memory_range *p = a, *q = b;
    if (p->lo != q->lo) return p->lo < q->lo ? -1 : 1;
    return (p->who[0] > q->who[0]) - (p->who[0] < q->who[0]);
}

static void merge(cbn_memory_uses *u) {
    if (u->count == 0) return;
    qsort(u->ranges, u->count, sizeof *u->ranges, by_start);
    uint32_t n = 0;
    for (uint32_t i = 1; i < u->count; i++) {
        cbn_memory_range *last = &u->ranges[n];
        const cbn_memory_range *next = &u->ranges[i];
        if (next->lo >= last->hi) {
            u->ranges[++n] = *next;
            continue;
        }
        last->hi = CBN_MAX(last->hi, next->hi);
        last->uses += next->uses;
        if (last->who[1] == 0 && next->who[0] != last->who[0]) {
            last->who[1] = next->who[0];
            last->gen[1] = next->gen[0];
        }
    }
    u->count = n + 1;
}

cbn_status cbn_memory_uses_build(cbn_memory_uses *u, cbn_graph *g, cbn_host root, cbn_error *err) {
    u->slots = cbn_graph_slots(g);
    u->start = cbn_calloc(u->slots * sizeof *u->start);
    if (u->start == NULL) return cbn_fail_memory(err, "the uses of weights", u->slots * sizeof *u->start);
    gather w = {.u = u, .g = g, .vt = cbn_graph_host(g), .err = err};
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) CBN_TRY(add_node(&w, id, root));
    merge(u);
    u->built = true;
    return CBN_OK;
}

static cbn_memory_range *find(const cbn_memory_uses *u, uintptr_t at) {
    uint32_t lo = 0, hi = u->count;
    while (lo < hi) { /* the first range that ends behind `at` */
        const uint32_t mid = lo + (hi - lo) / 2;
        if (u->ranges[mid].hi > at) hi = mid;
        else lo = mid + 1;
    }
    return lo < u->count && u->ranges[lo].lo <= at ? &u->ranges[lo] : NULL;
}

uint32_t cbn_memory_uses_count(const cbn_memory_uses *u, const cbn_graph *g, const char *lo, cbn_node_id but,
                               cbn_node_id *who) {
    *who = 0;
    const cbn_memory_range *r = find(u, (uintptr_t)lo);
    if (r == NULL) return 0;
    for (int i = 0; i < 2 && *who == 0; i++) {
        if (r->who[i] != 0 && r->who[i] != but && cbn_graph_alive(g, r->who[i], r->gen[i])) *who = r->who[i];
    }
    return r->uses;
}

void cbn_memory_uses_drop(cbn_memory_uses *u, const char *lo) {
    cbn_memory_range *r = find(u, (uintptr_t)lo);
    if (r != NULL && r->uses > 0) r->uses--;
}

void cbn_memory_uses_drop_node(cbn_memory_uses *u, cbn_node_id get_attr) {
    if (get_attr < u->slots && u->start[get_attr] != 0) cbn_memory_uses_drop(u, (const char *)u->start[get_attr]);
}
