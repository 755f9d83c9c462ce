/* SPDX-License-Identifier: BSD-3-Clause */
/* lint, and dead code. */
#include "graph/graph_priv.h"

#include <string.h>

/* Memory of one verification: nodes are const, so marks of its own. */
typedef struct check {
    const cbn_graph *g;
    cbn_node_id node;  /* whose arguments are walked */
    uint32_t expected; /* edge that the next new input must be */
    uint32_t *seen;    /* per slot: the last node that used it, + 1 */
    cbn_node_id culprit;
    const char *problem;
} check;

static bool check_use(cbn_node_id id, void *arg) {
    check *c = arg;
    const cbn_graph_state *s = &c->g->s;
    c->culprit = id;
    const bool known = id && id < s->nslots && s->nodes[id].op < CBN_NODE_ROOT;
    if (!known) c->problem = "is not a node of this graph, or erased";
    else if (s->nodes[id].order >= s->nodes[c->node].order) c->problem = "is used before it has been defined";
    else if (c->seen[id] == c->node + 1) return true;
    else if (!c->expected || s->edges[c->expected].producer != id) c->problem = "does not have it among its users";
    if (c->problem) return false;
    c->seen[id] = c->node + 1;
    c->expected = s->edges[c->expected].next_input;
    return true;
}

static cbn_status check_links(const cbn_graph *g, cbn_node_id id, cbn_error *err) {
    const cbn_graph_state *s = &g->s;
    const cbn_node *n = &s->nodes[id];
    const char *name = cbn_node_label(g, id);
    uint32_t count = 0, prev = 0;
    for (uint32_t e = n->first_user; e; prev = e, e = s->edges[e].next_user) {
        const cbn_edge *edge = e < s->nedges ? &s->edges[e] : NULL;
        if (!edge || edge->producer != id || edge->prev_user != prev || ++count > n->n_users || !edge->user ||
            edge->user >= s->nslots || s->nodes[edge->user].op >= CBN_NODE_ROOT)
            return cbn_fail(err, CBN_BAD_STATE, "Node %s: its list of users is broken", name);
    }
    if (count != n->n_users || prev != n->last_user)
        return cbn_fail(err, CBN_BAD_STATE, "Node %s: its list of users is broken", name);
    count = prev = 0;
    for (uint32_t e = n->first_input; e; prev = e, e = s->edges[e].next_input) {
        const cbn_edge *edge = e < s->nedges ? &s->edges[e] : NULL;
        if (!edge || edge->user != id || edge->prev_input != prev || ++count > n->n_inputs)
            return cbn_fail(err, CBN_BAD_STATE, "Node %s: its list of inputs is broken", name);
    }
    if (count != n->n_inputs || prev != n->last_input)
        return cbn_fail(err, CBN_BAD_STATE, "Node %s: its list of inputs is broken", name);
    return CBN_OK;
}

static cbn_status check_node(check *c, cbn_node_id id, cbn_error *err) {
    const cbn_graph *g = c->g;
    const cbn_node *n = &g->s.nodes[id];
    const char *name = cbn_node_label(g, id);
    const cbn_value_tag want = n->op == CBN_NODE_CALL_FUNCTION ? CBN_V_HOST : CBN_V_STR;
    if (n->target.tag != want)
        return cbn_fail(err, CBN_BAD_STATE, "Node %s: target of %s must be a %s", name, cbn_node_op_name(n->op),
                        want == CBN_V_HOST ? "callable" : "string");
    CBN_TRY(check_links(g, id, err));
    c->node = id;
    c->expected = n->first_input;
    c->problem = NULL;
    const uint32_t count = n->args->nargs + 2 * n->args->nkw;
    for (uint32_t i = 0; i < count; i++) {
        if (!cbn_value_each_node(&n->args->v[i], check_use, c))
            return cbn_fail(err, CBN_BAD_STATE, "Node %s: argument %s %s", name, cbn_node_label(g, c->culprit),
                            c->problem);
    }
    for (uint32_t k = 0; k < n->args->nkw; k++) {
        if (n->args->v[n->args->nargs + 2 * k].tag != CBN_V_STR)
            return cbn_fail(err, CBN_BAD_STATE, "Node %s: keywords must be strings", name);
    }
    if (c->expected)
        return cbn_fail(err, CBN_BAD_STATE, "Node %s: it is among the users of %s, which is not in its arguments", name,
                        cbn_node_label(g, g->s.edges[c->expected].producer));
    return CBN_OK;
}

static cbn_status check_list(const cbn_graph *g, uint8_t *names, uint32_t *seen, cbn_error *err) {
    const cbn_graph_state *s = &g->s;
    check c = {.g = g, .seen = seen};
    uint32_t count = 0;
    cbn_node_id output = 0, prev = 0;
    for (cbn_node_id id = s->nodes[0].next; id; prev = id, id = s->nodes[id].next) {
        if (id >= s->nslots || s->nodes[id].op >= CBN_NODE_ROOT || s->nodes[id].prev != prev || ++count > s->count ||
            (prev && s->nodes[prev].order >= s->nodes[id].order))
            return cbn_fail(err, CBN_BAD_STATE, "the list of nodes is broken after %s",
                            prev ? cbn_node_label(g, prev) : "the start");
        const cbn_node *n = &s->nodes[id];
        if (names[n->name / 8] & 1u << n->name % 8)
            return cbn_fail(err, CBN_BAD_STATE, "Node redefined name %s!", cbn_node_label(g, id));
        names[n->name / 8] |= (uint8_t)(1u << n->name % 8);
        CBN_TRY(check_node(&c, id, err));
        if (n->op == CBN_NODE_OUTPUT) {
            if (output)
                return cbn_fail(err, CBN_BAD_STATE, "Node %s: there is an output already, %s", cbn_node_label(g, id),
                                cbn_node_label(g, output));
            output = id;
            if (n->n_users)
                return cbn_fail(err, CBN_BAD_STATE, "Node %s: an output cannot be used", cbn_node_label(g, id));
        } else if (output && n->n_users) {
            return cbn_fail(err, CBN_BAD_STATE, "Node %s stands after the output and is used", cbn_node_label(g, id));
        }
    }
    if (count != s->count || prev != s->nodes[0].prev)
        return cbn_fail(err, CBN_BAD_STATE, "the list of nodes is broken at its end");
    const cbn_node_id anchor = s->insert_anchor;
    if (anchor && (anchor >= s->nslots || s->nodes[anchor].op >= CBN_NODE_ROOT))
        return cbn_fail(err, CBN_BAD_STATE, "the insertion point is not a node of this graph");
    return CBN_OK;
}

cbn_status cbn_graph_verify(const cbn_graph *g, cbn_error *err) {
    const size_t name_bytes = g->strings.count / 8 + 1;
    uint8_t *names = cbn_calloc(name_bytes);
    uint32_t *seen = cbn_calloc(g->s.nslots * sizeof *seen);
    const cbn_status st = names && seen
                              ? check_list(g, names, seen, err)
                              : cbn_fail_memory(err, "checking a graph", name_bytes + g->s.nslots * sizeof *seen);
    cbn_free(names);
    cbn_free(seen);
    return st;
}

/* ---- dead code --------------------------------------------------------------------------------------------------- */
static cbn_status stays(const cbn_graph *g, cbn_node_id id, bool (*keep)(cbn_node_id id, void *arg), void *arg,
                        bool *out, cbn_error *err) {
    if (!keep) return cbn_node_impure(g, id, NULL, out, err);
    *out = keep(id, arg);
    return CBN_OK;
}

/* All users of this node are marked. */
static bool users_dead(const cbn_graph_state *s, cbn_node_id id, uint32_t dead) {
    for (uint32_t e = s->nodes[id].first_user; e; e = s->edges[e].next_user) {
        if (s->nodes[s->edges[e].user].mark != dead) return false;
    }
    return true;
}

cbn_status cbn_graph_dce(cbn_graph *g, bool (*keep)(cbn_node_id id, void *arg), void *arg, uint32_t *removed,
                         cbn_error *err) {
    *removed = 0;
    CBN_TRY(cbn_graph_may_change(g, err));
    /* First decide, then erase: a question that fails half way leaves the graph as it was. */
    const uint32_t dead = cbn_graph_new_mark(g);
    cbn_status st = CBN_OK;
    cbn_graph_lock(g);
    for (cbn_node_id id = g->s.nodes[0].prev; id && st == CBN_OK; id = g->s.nodes[id].prev) {
        if (!users_dead(&g->s, id, dead)) continue;
        bool needed = true;
        st = stays(g, id, keep, arg, &needed, err);
        if (!needed) g->s.nodes[id].mark = dead;
    }
    cbn_graph_unlock(g);
    if (st != CBN_OK) return st;
    for (cbn_node_id id = g->s.nodes[0].prev, prev; id; id = prev) {
        prev = g->s.nodes[id].prev;
        if (g->s.nodes[id].mark != dead) continue;
        cbn_node_erase(g, id);
        ++*removed;
    }
    return CBN_OK;
}
