/* SPDX-License-Identifier: BSD-3-Clause */
/* Walks that survive changes, snapshots, copies of whole graphs. */
#include "graph/graph_priv.h"

#include <string.h>

/* ---- iterators --------------------------------------------------------------------------------------------------- */
void cbn_graph_iter_begin(cbn_graph *g, bool reversed, cbn_graph_iter *it) {
    *it = (cbn_graph_iter){.next = g->iters, .graph = g, .reversed = reversed};
    if (g->iters) g->iters->prev = it;
    g->iters = it;
}

cbn_node_id cbn_graph_iter_next(cbn_graph_iter *it) {
    if (!it->graph || it->done) return 0;
    const cbn_node *n = &it->graph->s.nodes[it->cursor];
    it->cursor = it->reversed ? n->prev : n->next;
    it->done = !it->cursor;
    return it->cursor;
}

void cbn_graph_iter_end(cbn_graph_iter *it) {
    if (!it->graph) return;
    if (it->prev) it->prev->next = it->next;
    else it->graph->iters = it->next;
    if (it->next) it->next->prev = it->prev;
    *it = (cbn_graph_iter){.done = true};
}

void cbn_iters_leave(cbn_graph *g, cbn_node_id id) {
    for (cbn_graph_iter *it = g->iters; it; it = it->next) {
        if (it->cursor == id) it->cursor = it->reversed ? g->s.nodes[id].next : g->s.nodes[id].prev;
    }
}

void cbn_iters_detach(cbn_graph *g) {
    for (cbn_graph_iter *it = g->iters, *next; it; it = next) {
        next = it->next;
        *it = (cbn_graph_iter){.done = true};
    }
    g->iters = NULL;
}

/* ---- snapshots --------------------------------------------------------------------------------------------------- */
cbn_status cbn_graph_snapshot_take(cbn_graph *g, cbn_graph_snapshot **out, cbn_error *err) {
    *out = NULL;
    cbn_graph_snapshot *s = cbn_calloc(sizeof *s);
    if (!s) return cbn_fail_memory(err, "a snapshot of a graph", sizeof *s);
    s->state = g->s;
    s->state.node_cap = g->s.nslots;
    s->state.edge_cap = g->s.nedges;
    s->state.nodes = cbn_alloc_array(g->s.nslots, sizeof *s->state.nodes);
    s->state.edges = cbn_alloc_array(g->s.nedges, sizeof *s->state.edges);
    if (!s->state.nodes || !s->state.edges) {
        cbn_free(s->state.nodes);
        cbn_free(s->state.edges);
        cbn_free(s);
        return cbn_fail_memory(err, "a snapshot of a graph",
                               g->s.nslots * sizeof *s->state.nodes + g->s.nedges * sizeof *s->state.edges);
    }
    memcpy(s->state.edges, g->s.edges, g->s.nedges * sizeof *s->state.edges);
    memcpy(s->state.nodes, g->s.nodes, g->s.nslots * sizeof *s->state.nodes);
    for (uint32_t i = 0; i < g->s.nslots; i++) {
        cbn_node *n = &s->state.nodes[i];
        if (n->op == CBN_NODE_OP_COUNT) {
            if (n->target.tag != CBN_V_HOST && !n->meta && !n->type_expr) continue;
            /* It waits for the flush here and now; in the snapshot the slot is free. */
            n->target = cbn_value_none();
            n->meta = n->type_expr = NULL;
            n->next = s->state.free_node;
            s->state.free_node = i;
            continue;
        }
        if (n->args) n->args->refs++;
        if (n->tensor) n->tensor->refs++;
        cbn_value_retain(g, n->target);
        if (n->meta) g->host->retain(n->meta);
        if (n->type_expr) g->host->retain(n->type_expr);
    }
    s->next = g->snapshots;
    if (g->snapshots) g->snapshots->prev = s;
    g->snapshots = s;
    *out = s;
    return CBN_OK;
}

static void unlink_snapshot(cbn_graph *g, cbn_graph_snapshot *s) {
    if (s->prev) s->prev->next = s->next;
    else g->snapshots = s->next;
    if (s->next) s->next->prev = s->prev;
    s->prev = s->next = NULL;
}

/* Its references are dropped by the flush. */
static void queue_snapshot(cbn_graph *g, cbn_graph_snapshot *s) {
    s->next = g->dead_snapshots;
    g->dead_snapshots = s;
}

void cbn_graph_snapshot_drop(cbn_graph *g, cbn_graph_snapshot *s) {
    if (!s) return;
    unlink_snapshot(g, s);
    queue_snapshot(g, s);
}

void cbn_graph_snapshot_restore(cbn_graph *g, cbn_graph_snapshot *s) {
    if (g->locked) { /* a pass inside a pass: it could change nothing, and the outer one has pointers into the state */
        cbn_graph_snapshot_drop(g, s);
        return;
    }
    unlink_snapshot(g, s);
    const cbn_graph_state now = g->s;
    g->s = s->state;
    s->state = now;
    const uint32_t both = CBN_MIN(now.nslots, g->s.nslots);
    for (uint32_t i = 0; i < g->s.nslots; i++) {
        g->s.nodes[i].view = NULL;
        g->s.nodes[i].mark = 0; /* marks may have started over since */
    }
    for (uint32_t i = 0; i < both; i++) {
        const cbn_node *was = &now.nodes[i];
        if (cbn_graph_alive(g, i, was->gen) && was->op != CBN_NODE_OP_COUNT) g->s.nodes[i].view = was->view;
    }
    for (cbn_graph_iter *it = g->iters; it; it = it->next) {
        if (it->cursor && !cbn_graph_alive(g, it->cursor, now.nodes[it->cursor].gen)) {
            it->cursor = 0;
            it->done = true;
        }
    }
    g->dead_node = 0; /* slots that wait for the flush go with their array */
    g->version++;
    queue_snapshot(g, s);
}

void cbn_snapshot_release_now(cbn_graph *g, cbn_graph_snapshot *s) {
    for (uint32_t i = 0; i < s->state.nslots; i++) cbn_slot_release_now(g, &s->state.nodes[i]);
    cbn_free(s->state.nodes);
    cbn_free(s->state.edges);
    cbn_free(s);
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */
typedef struct copy_arg {
    const cbn_node_id *map;
    uint32_t slots;
    cbn_node_id missing;
} copy_arg;

static bool has_copy(cbn_node_id id, void *arg) {
    copy_arg *c = arg;
    if (id < c->slots && c->map[id]) return true;
    c->missing = id;
    return false;
}

static cbn_node_id copy_of(cbn_node_id id, void *arg) { return ((const copy_arg *)arg)->map[id]; }

static cbn_status copy_str(cbn_graph *dst, const cbn_graph *src, cbn_str s, cbn_str *out, cbn_error *err) {
    *out = s;
    if (dst == src) return CBN_OK;
    size_t len;
    const char *text = cbn_graph_str(src, s, &len);
    return cbn_graph_intern(dst, text, len, out, err);
}

/* `slots` bounds the map: copying inside one graph makes new ids. */
static cbn_status copy_node(cbn_graph *dst, const cbn_graph *src, cbn_node_id id, const cbn_node_id *map,
                            uint32_t slots, cbn_node_id *out, cbn_error *err) {
    enum { FEW = 16 };
    const cbn_node *n = cbn_graph_node(src, id);
    const cbn_args *a = n->args;
    const uint32_t count = a->nargs + 2 * a->nkw;
    copy_arg c = {map, slots, 0};
    for (uint32_t i = 0; i < count; i++) {
        if (!cbn_value_each_node(&a->v[i], has_copy, &c))
            return cbn_fail(err, CBN_BAD_STATE, "copy of %s: its input %s was not copied", cbn_node_label(src, id),
                            cbn_node_label(src, c.missing));
    }
    cbn_value few[FEW], *v = count <= FEW ? few : cbn_alloc_array(count, sizeof *v);
    if (!v) return cbn_fail_memory(err, "arguments", count * sizeof *v);
    uint32_t done = 0;
    cbn_status st = CBN_OK;
    while (done < count && st == CBN_OK) {
        st = cbn_value_map(dst, src, &a->v[done], copy_of, &c, &v[done], err);
        if (st == CBN_OK) done++;
    }
    cbn_node_spec spec = {.op = (cbn_node_op)n->op,
                          .target = n->target,
                          .args = v,
                          .nargs = a->nargs,
                          .kw = v + a->nargs,
                          .nkw = a->nkw,
                          .type_expr = n->type_expr};
    if (st == CBN_OK) st = copy_str(dst, src, n->name, &spec.name, err);
    if (st == CBN_OK && spec.target.tag == CBN_V_STR) st = copy_str(dst, src, n->target.u.str, &spec.target.u.str, err);
    cbn_tensor_meta *const tensor = n->tensor; /* dst may be src: n does not outlive the creation */
    if (st == CBN_OK) st = cbn_graph_create(dst, &spec, out, err);
    if (st != CBN_OK) {
        for (uint32_t i = 0; i < done; i++) cbn_value_release(dst, v[i]);
    } else {
        cbn_value_retain(dst, spec.target);
        if (tensor) {
            st = cbn_graph_set_tensor(dst, *out, tensor, err);
            if (st != CBN_OK) {
                cbn_node_erase(dst, *out);
                *out = 0;
            }
        }
    }
    if (v != few) cbn_free(v);
    return st;
}

cbn_status cbn_graph_copy_node(cbn_graph *dst, const cbn_graph *src, cbn_node_id id, const cbn_node_id *map,
                               cbn_node_id *out, cbn_error *err) {
    *out = 0;
    CBN_TRY(cbn_node_check(src, id, "node", err));
    return copy_node(dst, src, id, map, src->s.nslots, out, err);
}

cbn_status cbn_graph_copy_nodes(cbn_graph *dst, const cbn_graph *src, cbn_node_id *map, cbn_error *err) {
    CBN_TRY(cbn_graph_may_change(dst, err));
    /* The ids first: copying inside one graph makes the list longer while it is walked. */
    const uint32_t slots = src->s.nslots;
    cbn_node_id *todo = cbn_alloc_array((size_t)src->s.count + 1, sizeof *todo);
    if (!todo) return cbn_fail_memory(err, "a copy of a graph", ((size_t)src->s.count + 1) * sizeof *todo);
    uint32_t n = 0, done = 0;
    for (cbn_node_id id = cbn_graph_first(src); id; id = cbn_graph_next(src, id)) {
        if (!map[id]) todo[n++] = id;
    }
    cbn_status st = CBN_OK;
    while (done < n && st == CBN_OK) {
        cbn_node_id made = 0;
        st = copy_node(dst, src, todo[done], map, slots, &made, err);
        if (st == CBN_OK) map[todo[done++]] = made;
    }
    if (st != CBN_OK) {
        /* Last to first, so that none has users. */
        while (done) {
            cbn_node_erase(dst, map[todo[--done]]);
            map[todo[done]] = 0;
        }
    }
    cbn_free(todo);
    return st;
}
