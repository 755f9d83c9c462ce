/* SPDX-License-Identifier: BSD-3-Clause */
/* Everything that changes nodes. Each function reserves all memory it needs before it changes anything. */
#include "graph/graph_priv.h"

#include <string.h>

cbn_status cbn_graph_may_change(const cbn_graph *g, cbn_error *err) {
    if (!g->locked) return CBN_OK;
    return cbn_fail(err, CBN_BAD_STATE, "the graph cannot be changed while a pass is reading it");
}

const char *cbn_node_label(const cbn_graph *g, cbn_node_id id) {
    if (id >= g->s.nslots || g->s.nodes[id].op == CBN_NODE_OP_COUNT) return "?";
    return cbn_graph_str(g, g->s.nodes[id].name, NULL);
}

/* Alive and not the root. */
cbn_status cbn_node_check(const cbn_graph *g, cbn_node_id id, const char *what, cbn_error *err) {
    if (id && id < g->s.nslots && g->s.nodes[id].op < CBN_NODE_ROOT) return CBN_OK;
    return cbn_fail(err, CBN_BAD_STATE, "%s: not a node of this graph, or erased (id %u)", what, (unsigned)id);
}

static cbn_status node_may_change(const cbn_graph *g, cbn_node_id id, cbn_error *err) {
    CBN_TRY(cbn_graph_may_change(g, err));
    return cbn_node_check(g, id, "node", err);
}

/* ---- reserving --------------------------------------------------------------------------------------------------- */
static cbn_status reserve_node(cbn_graph_state *s, cbn_error *err) {
    if (s->free_node || s->nslots < s->node_cap) return CBN_OK;
    const uint64_t cap = (uint64_t)s->node_cap + s->node_cap / 2 + 16;
    if (cap > UINT32_MAX / 2) return cbn_fail(err, CBN_NO_MEMORY, "a graph of more than %u nodes", UINT32_MAX / 2);
    cbn_node *nodes = cbn_realloc(s->nodes, cap * sizeof *nodes);
    if (!nodes) return cbn_fail_memory(err, "the nodes of a graph", cap * sizeof *nodes);
    s->nodes = nodes;
    s->node_cap = (uint32_t)cap;
    return CBN_OK;
}

static cbn_status reserve_edges(cbn_graph_state *s, uint64_t n, cbn_error *err) {
    const uint64_t have = (uint64_t)s->n_free_edges + (s->edge_cap - s->nedges);
    if (n <= have) return CBN_OK;
    const uint64_t cap = CBN_MAX((uint64_t)s->edge_cap + s->edge_cap / 2, s->edge_cap + (n - have));
    if (cap > UINT32_MAX / 2) return cbn_fail(err, CBN_NO_MEMORY, "a graph of more than %u edges", UINT32_MAX / 2);
    cbn_edge *edges = cbn_realloc(s->edges, cap * sizeof *edges);
    if (!edges) return cbn_fail_memory(err, "the edges of a graph", cap * sizeof *edges);
    s->edges = edges;
    s->edge_cap = (uint32_t)cap;
    return CBN_OK;
}

/* ---- edges ------------------------------------------------------------------------------------------------------- */
static void add_edge(cbn_graph_state *s, cbn_node_id producer, cbn_node_id user) {
    cbn_node *p = &s->nodes[producer], *u = &s->nodes[user];
    /* The user joins at the end of each list: if it is in this one already, it is the last. */
    if (p->last_user && s->edges[p->last_user].user == user) return;
    uint32_t e = s->free_edge;
    if (e) {
        s->free_edge = s->edges[e].next_user;
        s->n_free_edges--;
    } else {
        assert(s->nedges < s->edge_cap);
        e = s->nedges++;
    }
    s->edges[e] = (cbn_edge){producer, user, p->last_user, 0, u->last_input, 0};
    if (p->last_user) s->edges[p->last_user].next_user = e;
    else p->first_user = e;
    p->last_user = e;
    p->n_users++;
    if (u->last_input) s->edges[u->last_input].next_input = e;
    else u->first_input = e;
    u->last_input = e;
    u->n_inputs++;
}

static void drop_inputs(cbn_graph_state *s, cbn_node_id user) {
    cbn_node *u = &s->nodes[user];
    for (uint32_t e = u->first_input, next; e; e = next) {
        cbn_edge *edge = &s->edges[e];
        cbn_node *p = &s->nodes[edge->producer];
        next = edge->next_input;
        if (edge->prev_user) s->edges[edge->prev_user].next_user = edge->next_user;
        else p->first_user = edge->next_user;
        if (edge->next_user) s->edges[edge->next_user].prev_user = edge->prev_user;
        else p->last_user = edge->prev_user;
        p->n_users--;
        *edge = (cbn_edge){.next_user = s->free_edge};
        s->free_edge = e;
        s->n_free_edges++;
    }
    u->first_input = u->last_input = u->n_inputs = 0;
}

typedef struct walk {
    cbn_graph *g;
    cbn_node_id user, bad;
    uint64_t refs;
} walk;

static bool link_one(cbn_node_id id, void *arg) {
    walk *w = arg;
    add_edge(&w->g->s, id, w->user);
    return true;
}

/* Edges for all nodes in the arguments of `user`, which has none. */
static void add_inputs(cbn_graph *g, cbn_node_id user) {
    const cbn_args *a = g->s.nodes[user].args;
    const uint32_t n = a->nargs + 2 * a->nkw;
    walk w = {g, user, 0, 0};
    for (uint32_t i = 0; i < n; i++) {
        if (a->v[i].tag == CBN_V_NODE) add_edge(&g->s, a->v[i].u.node, user);
        else if (a->v[i].has_nodes) cbn_value_each_node(&a->v[i], link_one, &w);
    }
}

static bool check_one(cbn_node_id id, void *arg) {
    walk *w = arg;
    w->refs++;
    if (id && id < w->g->s.nslots && w->g->s.nodes[id].op < CBN_NODE_ROOT) return true;
    w->bad = id;
    return false;
}

/* Are all nodes in the values alive, are the keywords strings? *refs: how many uses there are. */
static cbn_status check_values(cbn_graph *g, const cbn_value *args, uint32_t nargs, const cbn_value *kw, uint32_t nkw,
                               uint64_t *refs, cbn_error *err) {
    walk w = {g, 0, 0, 0};
    for (uint32_t i = 0; i < nargs; i++) {
        if (args[i].has_nodes && !cbn_value_each_node(&args[i], check_one, &w))
            return cbn_fail(err, CBN_BAD_STATE, "args[%u]: not a node of this graph, or erased (id %u)", i,
                            (unsigned)w.bad);
    }
    for (uint32_t k = 0; k < nkw; k++) {
        const cbn_value *key = &kw[2 * k], *value = &kw[2 * k + 1];
        if (key->tag != CBN_V_STR || key->u.str >= g->strings.count)
            return cbn_fail(err, CBN_BAD_TYPE, "kwargs: keywords must be strings");
        if (value->has_nodes && !cbn_value_each_node(value, check_one, &w))
            return cbn_fail(err, CBN_BAD_STATE, "kwargs[%s]: not a node of this graph, or erased (id %u)",
                            cbn_graph_str(g, key->u.str, NULL), (unsigned)w.bad);
    }
    *refs = CBN_MIN(w.refs, (uint64_t)g->s.count);
    return CBN_OK;
}

/* ---- creating ---------------------------------------------------------------------------------------------------- */
static cbn_opcode opcode_of(const cbn_graph *g, cbn_node_op op, const cbn_value *target) {
    if (!g->ops) return 0;
    if (op == CBN_NODE_CALL_FUNCTION && target->tag == CBN_V_HOST) return cbn_op_table_lookup(g->ops, target->u.host);
    if (op == CBN_NODE_CALL_METHOD && target->tag == CBN_V_STR) {
        size_t len;
        const char *s = cbn_graph_str(g, target->u.str, &len);
        return cbn_op_table_method(g->ops, s, len);
    }
    return 0;
}

static cbn_status make_name(cbn_graph *g, const cbn_node_spec *spec, cbn_str *out, cbn_error *err) {
    cbn_str cand = spec->name;
    if (cand == CBN_STR_NONE) {
        if (spec->target.tag == CBN_V_STR) {
            size_t len;
            const char *s = cbn_graph_str(g, spec->target.u.str, &len);
            CBN_TRY(cbn_graph_name_of_target(g, s, len, &cand, err));
        } else {
            CBN_TRY(cbn_graph_intern(g, "_unnamed", 8, &cand, err));
        }
    } else if (cand >= g->strings.count) {
        return cbn_fail(err, CBN_BAD_VALUE, "name: not a string of this graph");
    }
    return cbn_name_make(g, cand, out, err);
}

cbn_status cbn_graph_create(cbn_graph *g, const cbn_node_spec *spec, cbn_node_id *out, cbn_error *err) {
    *out = 0;
    CBN_TRY(cbn_graph_may_change(g, err));
    if (spec->op >= CBN_NODE_ROOT) return cbn_fail(err, CBN_BAD_VALUE, "op: not an operation a node can have");
    const cbn_value_tag want = spec->op == CBN_NODE_CALL_FUNCTION ? CBN_V_HOST : CBN_V_STR;
    if (spec->target.tag != want)
        return cbn_fail(err, CBN_BAD_TYPE, "target: %s needs a %s", cbn_node_op_name(spec->op),
                        want == CBN_V_HOST ? "callable" : "string");
    if (g->last_gen == UINT32_MAX)
        return cbn_fail(err, CBN_BAD_STATE, "the graph has used up its %u nodes", UINT32_MAX);
    uint64_t refs;
    CBN_TRY(check_values(g, spec->args, spec->nargs, spec->kw, spec->nkw, &refs, err));
    CBN_TRY(reserve_node(&g->s, err));
    CBN_TRY(reserve_edges(&g->s, refs, err));
    cbn_args *args = cbn_args_new(g, spec->args, spec->nargs, spec->kw, spec->nkw);
    if (!args)
        return cbn_fail_memory(err, "arguments", ((size_t)spec->nargs + 2 * (size_t)spec->nkw) * sizeof(cbn_value));
    cbn_str name;
    const cbn_status st = make_name(g, spec, &name, err);
    if (st != CBN_OK) {
        cbn_args_forget(g, args);
        return st;
    }

    const cbn_node_id before = cbn_graph_insert_point(g);
    cbn_node_id id = g->s.free_node;
    if (id) g->s.free_node = g->s.nodes[id].next;
    else id = g->s.nslots++;
    if (spec->type_expr) g->host->retain(spec->type_expr);
    if (spec->meta) g->host->retain(spec->meta);
    g->s.nodes[id] = (cbn_node){.gen = ++g->last_gen,
                                .op = (uint8_t)spec->op,
                                .opcode = opcode_of(g, spec->op, &spec->target),
                                .name = name,
                                .target = spec->target,
                                .args = args,
                                .meta = spec->meta,
                                .type_expr = spec->type_expr};
    cbn_list_insert(&g->s, id, before);
    if (refs) add_inputs(g, id);
    g->s.count++;
    g->version++;
    *out = id;
    return CBN_OK;
}

cbn_node_id cbn_graph_insert_point(const cbn_graph *g) {
    return g->s.insert_after ? g->s.nodes[g->s.insert_anchor].next : g->s.insert_anchor;
}

void cbn_graph_set_insert_point(cbn_graph *g, cbn_node_id before) {
    g->s.insert_anchor = before;
    g->s.insert_after = false;
}

void cbn_graph_set_insert_after(cbn_graph *g, cbn_node_id after) {
    g->s.insert_anchor = after;
    g->s.insert_after = true;
}

cbn_node_id cbn_graph_insert_anchor(const cbn_graph *g, bool *after) {
    *after = g->s.insert_after;
    return g->s.insert_anchor;
}

/* ---- erasing ----------------------------------------------------------------------------------------------------- */
void cbn_node_erase(cbn_graph *g, cbn_node_id id) {
    cbn_graph_state *s = &g->s;
    cbn_node *n = &s->nodes[id];
    cbn_iters_leave(g, id);
    if (s->insert_anchor == id) s->insert_anchor = s->insert_after ? n->prev : n->next;
    drop_inputs(s, id);
    cbn_list_remove(s, id);
    cbn_args_release(g, n->args);
    cbn_tensor_release(g, n->tensor);
    const bool waits = n->target.tag == CBN_V_HOST || n->meta || n->type_expr;
    *n = (cbn_node){.gen = n->gen,
                    .op = CBN_NODE_OP_COUNT,
                    .target = waits ? n->target : cbn_value_none(),
                    .meta = n->meta,
                    .type_expr = n->type_expr};
    uint32_t *list = waits ? &g->dead_node : &s->free_node;
    n->next = *list;
    *list = id;
    s->count--;
    g->version++;
}

void cbn_slot_release_now(cbn_graph *g, cbn_node *n) {
    const cbn_host h[3] = {n->target.tag == CBN_V_HOST ? n->target.u.host : NULL, n->meta, n->type_expr};
    cbn_args_release(g, n->args);
    cbn_tensor_release(g, n->tensor);
    *n = (cbn_node){.op = CBN_NODE_OP_COUNT};
    for (int i = 0; i < 3; i++) {
        if (h[i]) g->host->release(h[i]);
    }
}

cbn_status cbn_graph_erase(cbn_graph *g, cbn_node_id id, cbn_error *err) {
    CBN_TRY(node_may_change(g, id, err));
    const cbn_node *n = &g->s.nodes[id];
    if (n->n_users)
        return cbn_fail(err, CBN_BAD_STATE, "Tried to erase Node %s but it still had %u users in the graph",
                        cbn_node_label(g, id), n->n_users);
    cbn_node_erase(g, id);
    return CBN_OK;
}

/* ---- fields ------------------------------------------------------------------------------------------------------ */
/* Makes `args` the arguments of a node; edges are reserved. The old block is released. */
static void put_args(cbn_graph *g, cbn_node_id id, cbn_args *args) {
    cbn_args *old = g->s.nodes[id].args;
    drop_inputs(&g->s, id);
    g->s.nodes[id].args = args;
    add_inputs(g, id);
    if (old != args) cbn_args_release(g, old);
    g->version++;
}

cbn_status cbn_graph_set_args(cbn_graph *g, cbn_node_id id, const cbn_value *args, uint32_t nargs, const cbn_value *kw,
                              uint32_t nkw, cbn_error *err) {
    CBN_TRY(node_may_change(g, id, err));
    uint64_t refs;
    CBN_TRY(check_values(g, args, nargs, kw, nkw, &refs, err));
    const uint32_t own = g->s.nodes[id].n_inputs;
    CBN_TRY(reserve_edges(&g->s, refs > own ? refs - own : 0, err));
    cbn_args *block = cbn_args_new(g, args, nargs, kw, nkw);
    if (!block) return cbn_fail_memory(err, "arguments", ((size_t)nargs + 2 * (size_t)nkw) * sizeof *args);
    put_args(g, id, block);
    return CBN_OK;
}

cbn_status cbn_graph_set_target(cbn_graph *g, cbn_node_id id, cbn_value target, cbn_error *err) {
    CBN_TRY(node_may_change(g, id, err));
    if (target.tag != CBN_V_STR && target.tag != CBN_V_HOST)
        return cbn_fail(err, CBN_BAD_TYPE, "target: a string or a callable");
    cbn_node *n = &g->s.nodes[id];
    const cbn_value old = n->target;
    n->target = target;
    n->opcode = opcode_of(g, (cbn_node_op)n->op, &target);
    g->version++;
    cbn_value_release(g, old);
    return CBN_OK;
}

cbn_status cbn_graph_set_op(cbn_graph *g, cbn_node_id id, cbn_node_op op, cbn_error *err) {
    CBN_TRY(node_may_change(g, id, err));
    if (op >= CBN_NODE_ROOT) return cbn_fail(err, CBN_BAD_VALUE, "op: not an operation a node can have");
    cbn_node *n = &g->s.nodes[id];
    n->op = (uint8_t)op;
    n->opcode = opcode_of(g, op, &n->target);
    g->version++;
    return CBN_OK;
}

cbn_status cbn_graph_set_name(cbn_graph *g, cbn_node_id id, cbn_str name, cbn_error *err) {
    CBN_TRY(node_may_change(g, id, err));
    if (name >= g->strings.count) return cbn_fail(err, CBN_BAD_VALUE, "name: not a string of this graph");
    g->s.nodes[id].name = name;
    cbn_name_use(g, name);
    g->version++;
    return CBN_OK;
}

/* One handle of a node replaced: the old one is queued last, when the graph is whole. */
static void put_host(cbn_graph *g, cbn_host *place, cbn_host h) {
    const cbn_host old = *place;
    if (h) g->host->retain(h);
    *place = h;
    cbn_host_queue(g, old);
}

void cbn_graph_set_meta(cbn_graph *g, cbn_node_id id, cbn_host meta) { put_host(g, &g->s.nodes[id].meta, meta); }

void cbn_graph_set_type_expr(cbn_graph *g, cbn_node_id id, cbn_host type_expr) {
    put_host(g, &g->s.nodes[id].type_expr, type_expr);
    g->version++;
}

void cbn_graph_set_view(cbn_graph *g, cbn_node_id id, void *view) { g->s.nodes[id].view = view; }

/* ---- replacing --------------------------------------------------------------------------------------------------- */
typedef struct change {
    cbn_node_id user;
    cbn_args *args; /* the new block, or the old one to be changed in place */
} change;

static bool differs(cbn_node_id id, void *arg) { return id != *(const cbn_node_id *)arg; }

/* Nobody else has this block, and old_id is in it at the top level only: it can be rewritten where it is. */
static bool in_place(const cbn_args *a, cbn_node_id old_id) {
    if (a->refs != 1) return false;
    const uint32_t n = a->nargs + 2 * a->nkw;
    for (uint32_t i = 0; i < n; i++) {
        const cbn_value *v = &a->v[i];
        if (v->tag != CBN_V_NODE && v->has_nodes && !cbn_value_each_node(v, differs, &old_id)) return false;
    }
    return true;
}

static cbn_status prepare(cbn_graph *g, cbn_node_id user, cbn_node_id old_id, cbn_node_id new_id, change *out,
                          cbn_error *err) {
    cbn_args *a = g->s.nodes[user].args;
    *out = (change){user, a};
    if (in_place(a, old_id)) return CBN_OK;
    const uint32_t n = a->nargs + 2 * a->nkw;
    cbn_args *block = cbn_args_new(g, a->v, a->nargs, a->v + a->nargs, a->nkw);
    if (!block) return cbn_fail_memory(err, "arguments", n * sizeof(cbn_value));
    for (uint32_t i = 0; i < n; i++) {
        const cbn_status st = cbn_value_swap(g, &a->v[i], old_id, new_id, &block->v[i], err);
        if (st != CBN_OK) {
            for (uint32_t k = 0; k < i; k++) cbn_value_release(g, block->v[k]);
            cbn_args_forget(g, block);
            return st;
        }
    }
    out->args = block;
    return CBN_OK;
}

static void apply(cbn_graph *g, const change *c, cbn_node_id old_id, cbn_node_id new_id) {
    cbn_args *a = c->args;
    if (a == g->s.nodes[c->user].args) {
        const uint32_t n = a->nargs + 2 * a->nkw;
        for (uint32_t i = 0; i < n; i++) {
            if (a->v[i].tag == CBN_V_NODE && a->v[i].u.node == old_id) a->v[i].u.node = new_id;
        }
    }
    put_args(g, c->user, a);
}

cbn_status cbn_graph_replace_uses(cbn_graph *g, cbn_node_id old_id, cbn_node_id new_id,
                                  bool (*keep)(cbn_node_id user, void *arg), void *arg, uint32_t *count,
                                  cbn_error *err) {
    enum { FEW = 16 };
    if (count) *count = 0;
    CBN_TRY(node_may_change(g, old_id, err));
    CBN_TRY(cbn_node_check(g, new_id, "replacement", err));
    if (old_id == new_id) return CBN_OK;
    const uint32_t n = g->s.nodes[old_id].n_users;
    change few[FEW], *all = n <= FEW ? few : cbn_alloc_array(n, sizeof *all);
    if (!all) return cbn_fail_memory(err, "the users of a node", n * sizeof *all);
    cbn_status st = CBN_OK;
    uint32_t done = 0;
    for (uint32_t e = g->s.nodes[old_id].first_user; e && st == CBN_OK; e = g->s.edges[e].next_user) {
        const cbn_node_id user = g->s.edges[e].user;
        if (keep) {
            cbn_graph_lock(g);
            const bool wanted = keep(user, arg);
            cbn_graph_unlock(g);
            if (!wanted) continue;
        }
        st = prepare(g, user, old_id, new_id, &all[done], err);
        if (st == CBN_OK) done++;
    }
    /* A user gives back at least as many edges as it takes: nothing can fail from here on. */
    for (uint32_t i = 0; i < done; i++) {
        if (st == CBN_OK) apply(g, &all[i], old_id, new_id);
        else if (all[i].args != g->s.nodes[all[i].user].args) cbn_args_release(g, all[i].args);
    }
    if (all != few) cbn_free(all);
    if (st == CBN_OK && count) *count = done;
    return st;
}

cbn_status cbn_graph_replace_input(cbn_graph *g, cbn_node_id user, cbn_node_id old_id, cbn_node_id new_id,
                                   cbn_error *err) {
    CBN_TRY(node_may_change(g, user, err));
    CBN_TRY(cbn_node_check(g, old_id, "old input", err));
    CBN_TRY(cbn_node_check(g, new_id, "new input", err));
    change c;
    CBN_TRY(prepare(g, user, old_id, new_id, &c, err));
    apply(g, &c, old_id, new_id);
    return CBN_OK;
}

cbn_status cbn_graph_move_before(cbn_graph *g, cbn_node_id id, cbn_node_id before, cbn_error *err) {
    CBN_TRY(node_may_change(g, id, err));
    if (before) CBN_TRY(cbn_node_check(g, before, "place", err));
    if (before == id) return CBN_OK;
    cbn_list_remove(&g->s, id);
    cbn_list_insert(&g->s, id, before);
    g->version++;
    return CBN_OK;
}
