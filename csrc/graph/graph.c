/* SPDX-License-Identifier: BSD-3-Clause */
/* Life of a graph and everything that only reads it. */
#include "graph/graph_priv.h"

#include <string.h>

static const char *const op_names[] = {
#define NAME_(e, name) name,
    CBN_NODE_OPS(NAME_)
#undef NAME_
};

const char *cbn_node_op_name(cbn_node_op op) { return op < CBN_NODE_OP_COUNT ? op_names[op] : "erased"; }

cbn_node_op cbn_node_op_parse(const char *name, size_t len) {
    for (int i = 0; i < CBN_NODE_OP_COUNT; i++) {
        if (strlen(op_names[i]) == len && memcmp(op_names[i], name, len) == 0) return (cbn_node_op)i;
    }
    return CBN_NODE_OP_COUNT;
}

/* ---- life -------------------------------------------------------------------------------------------------------- */
cbn_status cbn_graph_new(const cbn_host_vtable *host, const cbn_op_table *ops, cbn_graph **out, cbn_error *err) {
    enum { FIRST_NODES = 16, FIRST_EDGES = 16 };
    *out = NULL;
    cbn_graph *g = cbn_calloc(sizeof *g);
    if (!g) return cbn_fail_memory(err, "a graph", sizeof *g);
    g->refs = 1;
    g->host = host;
    g->ops = ops;
    g->s.nodes = cbn_alloc_array(FIRST_NODES, sizeof *g->s.nodes);
    g->s.edges = cbn_alloc_array(FIRST_EDGES, sizeof *g->s.edges);
    cbn_status st = CBN_OK;
    if (!g->s.nodes || !g->s.edges) st = cbn_fail_memory(err, "a graph", FIRST_NODES * sizeof *g->s.nodes);
    g->s.node_cap = FIRST_NODES;
    g->s.edge_cap = FIRST_EDGES;
    cbn_str root;
    if (st == CBN_OK) st = cbn_graph_intern(g, "root", 4, &root, err);
    if (st == CBN_OK) {
        cbn_args *args = cbn_args_new(g, NULL, 0, NULL, 0);
        if (!args) st = cbn_fail_memory(err, "a graph", sizeof *args);
        memset(&g->s.nodes[0], 0, sizeof g->s.nodes[0]);
        memset(&g->s.edges[0], 0, sizeof g->s.edges[0]);
        g->s.nodes[0].op = CBN_NODE_ROOT;
        g->s.nodes[0].name = root;
        g->s.nodes[0].args = args;
        g->s.nodes[0].target = cbn_value_str(root);
        g->s.nslots = g->s.nedges = 1;
    }
    if (st != CBN_OK) {
        cbn_free(g->s.nodes);
        cbn_free(g->s.edges);
        cbn_strings_free(&g->strings);
        cbn_pool_free(g);
        cbn_free(g);
        return st;
    }
    *out = g;
    return CBN_OK;
}

void cbn_graph_retain(cbn_graph *g) { g->refs++; }
uint32_t cbn_graph_refs(const cbn_graph *g) { return g->refs; }

void cbn_graph_release(cbn_graph *g) {
    if (!g || --g->refs) return;
    g->refs = 1; /* host code that runs below may hold and drop the graph */
    while (g->snapshots) cbn_graph_snapshot_drop(g, g->snapshots);
    cbn_graph_clear(g);
    while (cbn_graph_needs_flush(g)) cbn_graph_flush(g);
    cbn_iters_detach(g);
    cbn_args_release(g, g->s.nodes[0].args);
    cbn_free(g->s.nodes);
    cbn_free(g->s.edges);
    cbn_strings_free(&g->strings);
    cbn_pool_free(g);
    cbn_free(g);
}

void cbn_graph_clear(cbn_graph *g) {
    /* Arguments first: then no node has users. Both walks end where they began when the graph is empty. */
    for (cbn_node_id id = g->s.nodes[0].prev; id;) {
        cbn_node *n = &g->s.nodes[id];
        n->first_user = n->last_user = n->n_users = 0;
        n->first_input = n->last_input = n->n_inputs = 0;
        id = n->prev;
    }
    g->s.nedges = 1;
    g->s.free_edge = g->s.n_free_edges = 0;
    g->s.insert_anchor = 0;
    g->s.insert_after = false;
    while (g->s.nodes[0].prev) cbn_node_erase(g, g->s.nodes[0].prev);
    g->version++;
}

int cbn_graph_visit_hosts(const cbn_graph *g, int (*fn)(cbn_host h, void *arg), void *arg) {
    const cbn_graph_state *live = &g->s;
    const cbn_graph_snapshot *lists[2] = {g->snapshots, g->dead_snapshots};
    const cbn_graph_snapshot *snap = NULL;
    int list = -1, r = 0;
    while (live) {
        /* Free slots hold nothing, slots that wait for the flush still hold theirs. */
        for (uint32_t i = 0; i < live->nslots; i++) {
            const cbn_node *n = &live->nodes[i];
            if (n->target.tag == CBN_V_HOST && (r = fn(n->target.u.host, arg))) return r;
            if (n->meta && (r = fn(n->meta, arg))) return r;
            if (n->type_expr && (r = fn(n->type_expr, arg))) return r;
        }
        if (snap) snap = snap->next;
        while (!snap && ++list < 2) snap = lists[list];
        live = snap ? &snap->state : NULL;
    }
    return cbn_pool_visit(g, fn, arg);
}

const cbn_host_vtable *cbn_graph_host(const cbn_graph *g) { return g->host; }
const cbn_op_table *cbn_graph_ops(const cbn_graph *g) { return g->ops; }

size_t cbn_graph_bytes(const cbn_graph *g) {
    return sizeof *g + g->s.node_cap * sizeof *g->s.nodes + g->s.edge_cap * sizeof *g->s.edges +
           cbn_strings_bytes(&g->strings) + g->cell_bytes;
}

uint64_t cbn_graph_version(const cbn_graph *g) { return g->version; }
void cbn_graph_lock(cbn_graph *g) { g->locked++; }
bool cbn_graph_locked(const cbn_graph *g) { return g->locked > 0; }

void cbn_graph_unlock(cbn_graph *g) {
    assert(g->locked);
    g->locked--;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */
const cbn_node *cbn_graph_node(const cbn_graph *g, cbn_node_id id) {
    assert(id < g->s.nslots);
    return &g->s.nodes[id];
}

const cbn_edge *cbn_graph_edge(const cbn_graph *g, uint32_t edge) {
    assert(edge < g->s.nedges);
    return &g->s.edges[edge];
}

uint32_t cbn_graph_slots(const cbn_graph *g) { return g->s.nslots; }
uint32_t cbn_graph_count(const cbn_graph *g) { return g->s.count; }

bool cbn_graph_alive(const cbn_graph *g, cbn_node_id id, uint32_t gen) {
    return id < g->s.nslots && g->s.nodes[id].gen == gen && g->s.nodes[id].op != CBN_NODE_OP_COUNT;
}

bool cbn_node_before(const cbn_graph *g, cbn_node_id a, cbn_node_id b) {
    return g->s.nodes[a].order < g->s.nodes[b].order;
}

cbn_node_id cbn_graph_first(const cbn_graph *g) { return g->s.nodes[0].next; }
cbn_node_id cbn_graph_next(const cbn_graph *g, cbn_node_id id) { return g->s.nodes[id].next; }
cbn_node_id cbn_graph_prev(const cbn_graph *g, cbn_node_id id) { return g->s.nodes[id].prev; }

cbn_node_id cbn_graph_output(const cbn_graph *g) {
    cbn_node_id id = g->s.nodes[0].prev;
    while (id && g->s.nodes[id].op != CBN_NODE_OUTPUT) id = g->s.nodes[id].prev;
    return id;
}

cbn_node_id cbn_node_single_user(const cbn_graph *g, cbn_node_id id) {
    const cbn_node *n = &g->s.nodes[id];
    return n->n_users == 1 ? g->s.edges[n->first_user].user : 0;
}

uint32_t cbn_graph_new_mark(cbn_graph *g) {
    if (g->mark == UINT32_MAX) {
        for (uint32_t i = 0; i < g->s.nslots; i++) g->s.nodes[i].mark = 0;
        g->mark = 0;
    }
    return ++g->mark;
}

void cbn_graph_set_mark(cbn_graph *g, cbn_node_id id, uint32_t mark) { g->s.nodes[id].mark = mark; }
