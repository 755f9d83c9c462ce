/* SPDX-License-Identifier: BSD-3-Clause */
/* What takes whose place, and where the new nodes go. Nothing here changes the graph. */
#include "graph/graph_rewrite_priv.h"

static uint64_t order_of(const cbn_graph *g, cbn_node_id id) { return cbn_graph_node(g, id)->order; }

/* ---- results ----------------------------------------------------------------------------------------------------- */

static bool is_list(const cbn_value *v) { return v->tag == CBN_V_LIST || v->tag == CBN_V_TUPLE; }

static cbn_status add_pair(cbn_rewrite *rw, uint32_t pos, const cbn_value *value, cbn_error *err) {
    CBN_TRY(cbn_rewrite_reserve(&rw->pairs, &rw->pairs_room, rw->npairs + 1, sizeof *rw->pairs, err));
    rw->pairs[rw->npairs++] = (cbn_result_pair){.pos = pos, .value = value};
    return CBN_OK;
}

/* Pairs two outputs of the same build, place by place (dicts by key); *fits false when they are built differently. */
static cbn_status pair_alike(cbn_rewrite *rw, const cbn_graph *rep, const cbn_value *p, const cbn_value *r, bool *fits,
                             cbn_error *err) {
    if (!p->has_nodes) return CBN_OK;
    if (p->tag == CBN_V_NODE) {
        *fits = !cbn_value_is_seq(r);
        return *fits ? add_pair(rw, rw->p->index[p->u.node], r, err) : CBN_OK;
    }
    *fits = (p->tag == r->tag || (is_list(p) && is_list(r))) && p->u.seq->count == r->u.seq->count;
    const uint32_t step = p->tag == CBN_V_DICT ? 2 : 1;
    for (uint32_t i = 0; *fits && i < p->u.seq->count; i += step) {
        uint32_t j = i;
        if (step == 2) {
            bool equal = false;
            for (j = 0; j < r->u.seq->count; j += 2) {
                CBN_TRY(cbn_value_equal(rw->p->graph, &p->u.seq->v[i], rep, &r->u.seq->v[j], &equal, err));
                if (equal) break;
            }
            *fits = equal;
            if (!equal) return CBN_OK;
        }
        CBN_TRY(pair_alike(rw, rep, &p->u.seq->v[i + step - 1], &r->u.seq->v[j + step - 1], fits, err));
    }
    return CBN_OK;
}

/* The k-th leaf of v (keys are not leaves), counting on through *k. */
static const cbn_value *leaf(const cbn_value *v, uint32_t *k) {
    if (!cbn_value_is_seq(v)) return (*k)-- == 0 ? v : NULL;
    const uint32_t step = v->tag == CBN_V_DICT ? 2 : 1;
    for (uint32_t i = step - 1; i < v->u.seq->count; i += step) {
        const cbn_value *found = leaf(&v->u.seq->v[i], k);
        if (found != NULL) return found;
    }
    return NULL;
}

static uint32_t count_leaves(const cbn_value *v) {
    if (!cbn_value_is_seq(v)) return 1;
    const uint32_t step = v->tag == CBN_V_DICT ? 2 : 1;
    uint32_t n = 0;
    for (uint32_t i = step - 1; i < v->u.seq->count; i += step) n += count_leaves(&v->u.seq->v[i]);
    return n;
}

static const cbn_value *returned_by(const cbn_graph *g, cbn_node_id output) {
    static const cbn_value none = {.tag = CBN_V_NONE};
    const cbn_args *args = cbn_graph_node(g, output)->args;
    return args->nargs > 0 ? &args->v[0] : &none;
}

/* Pairs what the pattern returns with what the replacement returns: place by place, or, when they are built
 * differently, the pattern's returned nodes (each once) with the replacement's results in order. */
cbn_status cbn_rewrite_pair(cbn_rewrite *rw, const cbn_graph *rep, cbn_error *err) {
    const cbn_value *p = returned_by(rw->p->graph, rw->p->output), *r = returned_by(rep, cbn_graph_output(rep));
    bool fits = true;
    rw->npairs = 0;
    CBN_TRY(pair_alike(rw, rep, p, r, &fits, err));
    if (!fits) {
        rw->npairs = 0;
        const uint32_t n = count_leaves(r);
        if (n != rw->p->nreturning)
            return cbn_fail(err, CBN_BAD_VALUE, "replacement: expected %u results, as the pattern returns, got %u",
                            rw->p->nreturning, n);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t k = i;
            CBN_TRY(add_pair(rw, rw->p->returning[i], leaf(r, &k), err));
        }
    }
    size_t kept = 0;
    for (size_t i = 0; i < rw->npairs; i++) { /* a node returned twice: the same result twice */
        bool twice = false;
        for (size_t j = 0; j < kept && !twice; j++) {
            if (rw->pairs[j].pos != rw->pairs[i].pos) continue;
            const cbn_value *a = rw->pairs[j].value, *b = rw->pairs[i].value;
            twice = true;
            bool equal = a->tag == CBN_V_NODE && b->tag == CBN_V_NODE && a->u.node == b->u.node;
            if (!equal && !a->has_nodes && !b->has_nodes) CBN_TRY(cbn_value_equal(rep, a, rep, b, &equal, err));
            if (!equal)
                return cbn_fail(err, CBN_BAD_VALUE,
                                "replacement: expected one result for '%s', which the pattern returns twice, got two",
                                cbn_rewrite_name(rw->p->graph, rw->p->ids[rw->pairs[i].pos]));
        }
        if (!twice) rw->pairs[kept++] = rw->pairs[i];
    }
    rw->npairs = kept;
    return CBN_OK;
}

/* ---- where it goes ----------------------------------------------------------------------------------------------- */

/* What a returned placeholder is bound to stays in the graph; it may come back as it is or be replaced by a new node.
 */
static cbn_status check_passed_on(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep, cbn_result_pair *x,
                                  cbn_error *err) {
    const cbn_value *bound = &row[x->pos];
    const bool is_node = x->value->tag == CBN_V_NODE;
    if (is_node && cbn_is_placeholder(rep, x->value->u.node)) {
        const cbn_value *back = &rw->replaced[x->value->u.node];
        x->same = back->tag == bound->tag;
        if (x->same && bound->tag == CBN_V_NODE) x->same = back->u.node == bound->u.node;
        else if (x->same) CBN_TRY(cbn_value_equal(rw->g, back, rw->g, bound, &x->same, err));
        if (x->same) return CBN_OK;
    }
    if (bound->tag == CBN_V_NODE && is_node && !cbn_is_placeholder(rep, x->value->u.node)) return CBN_OK;
    return cbn_fail(err, CBN_BAD_VALUE,
                    "replacement: placeholder '%s' of the pattern is returned: expected the same input or a new "
                    "node in its place%s",
                    cbn_rewrite_name(rw->p->graph, rw->p->ids[x->pos]),
                    bound->tag == CBN_V_NODE ? "" : ", and it is bound to a literal");
}

static cbn_status mark_match(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep, cbn_error *err) {
    const size_t need = (size_t)cbn_graph_slots(rw->g) + cbn_graph_count(rep) + 1;
    CBN_TRY(cbn_rewrite_reserve(&rw->flags, &rw->flags_room, need, sizeof *rw->flags, err));
    for (uint32_t pos = 0; pos < rw->p->n; pos++)
        if (!cbn_is_placeholder(rw->p->graph, rw->p->ids[pos]))
            CBN_TRY(cbn_rewrite_flag(rw, row[pos].u.node, MATCHED, err));
    for (size_t i = 0; i < rw->npairs; i++) {
        cbn_result_pair *x = &rw->pairs[i];
        if (cbn_is_placeholder(rw->p->graph, rw->p->ids[x->pos])) CBN_TRY(check_passed_on(rw, row, rep, x, err));
        if (!x->same) CBN_TRY(cbn_rewrite_flag(rw, row[x->pos].u.node, SOURCE, err));
    }
    return CBN_OK;
}

typedef struct input_scan {
    const cbn_rewrite *rw;
    cbn_node_id last, bad; /* the last one in the list; one that is MATCHED or LATE */
} input_scan;

static bool scan_input(cbn_node_id id, void *arg) {
    input_scan *s = arg;
    if (s->last == 0 || cbn_node_before(s->rw->g, s->last, id)) s->last = id;
    if ((s->rw->flags[id] & (MATCHED | LATE)) != 0) s->bad = id;
    return true;
}

/* Every node the replacement takes as an input. */
static input_scan scan_inputs(const cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep) {
    input_scan s = {.rw = rw};
    uint32_t i = 0;
    for (cbn_node_id id = cbn_graph_first(rep); id != 0; id = cbn_graph_next(rep, id)) {
        if (!cbn_is_placeholder(rep, id)) continue;
        const cbn_value *v = &row[rw->p->placeholders[i++]];
        if (v->tag != CBN_V_UNBOUND && cbn_graph_node(rep, id)->n_users > 0) cbn_value_each_node(v, scan_input, &s);
    }
    return s;
}

static cbn_status would_depend_on_itself(const cbn_rewrite *rw, cbn_node_id input, cbn_error *err) {
    return cbn_fail(err, CBN_BAD_STATE,
                    "cannot replace the match: its input '%s' depends on one of its results, the graph would have a "
                    "cycle",
                    cbn_rewrite_name(rw->g, input));
}

/* The users from `first` on that stand before `last` and depend on a result: they have to move behind the new nodes. */
static cbn_status find_late(cbn_rewrite *rw, cbn_node_id first, cbn_node_id last, cbn_error *err) {
    cbn_graph *g = rw->g;
    const uint64_t end = order_of(g, last);
    cbn_node_id blocker = 0;
    for (cbn_node_id id = first; id != 0 && order_of(g, id) <= end; id = cbn_graph_next(g, id)) {
        if ((rw->flags[id] & MATCHED) != 0) continue;
        const cbn_node *node = cbn_graph_node(g, id);
        bool late = false;
        for (uint32_t e = node->first_input; e != 0 && !late; e = cbn_graph_edge(g, e)->next_input)
            late = (rw->flags[cbn_graph_edge(g, e)->producer] & (SOURCE | LATE)) != 0;
        bool impure = false;
        if (node->op == CBN_NODE_CALL_FUNCTION || node->op == CBN_NODE_CALL_METHOD || node->op == CBN_NODE_CALL_MODULE)
            {
            cbn_graph_lock(g);
            const cbn_status status = cbn_node_impure(g, id, rw->root, &impure, err);
            cbn_graph_unlock(g);
            CBN_TRY(status);
        }
        if (impure && (late || rw->nlate > 0)) blocker = id;
        if (!late) continue;
        CBN_TRY(cbn_rewrite_flag(rw, id, LATE, err));
        CBN_TRY(cbn_rewrite_reserve(&rw->late, &rw->late_room, rw->nlate + 1, sizeof *rw->late, err));
        rw->late[rw->nlate++] = id;
    }
    if (blocker != 0)
        return cbn_fail(err, CBN_BAD_STATE,
                        "cannot replace the match: users of its results would have to move past '%s', which has side "
                        "effects",
                        cbn_rewrite_name(g, blocker));
    return CBN_OK;
}

cbn_status cbn_rewrite_place(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep, cbn_node_id *before,
                             cbn_error *err) {
    CBN_TRY(mark_match(rw, row, rep, err));
    cbn_graph *g = rw->g;
    cbn_node_id user = 0, outside = 0, last = 0; /* first user; first one that stays; last returned node */
    for (size_t i = 0; i < rw->npairs; i++) {
        const cbn_result_pair *x = &rw->pairs[i];
        const cbn_value *v = &row[x->pos];
        if (v->tag != CBN_V_NODE) continue;
        if (last == 0 || cbn_node_before(g, last, v->u.node)) last = v->u.node;
        for (uint32_t e = cbn_graph_node(g, v->u.node)->first_user; e != 0; e = cbn_graph_edge(g, e)->next_user) {
            const cbn_node_id u = cbn_graph_edge(g, e)->user;
            if (user == 0 || cbn_node_before(g, u, user)) user = u;
            if (x->same || (rw->flags[u] & MATCHED) != 0) continue;
            if (outside == 0 || cbn_node_before(g, u, outside)) outside = u;
        }
    }
    const input_scan inputs = scan_inputs(rw, row, rep);
    if (inputs.bad != 0) return would_depend_on_itself(rw, inputs.bad, err);
    const cbn_node_id input = inputs.last;
    if (user == 0) {
        *before = cbn_graph_next(g, input != 0 && cbn_node_before(g, last, input) ? input : last);
    } else if (input == 0 || cbn_node_before(g, input, user)) {
        *before = user;
    } else {
        *before = cbn_graph_next(g, input);
        if (outside != 0 && !cbn_node_before(g, input, outside)) {
            CBN_TRY(find_late(rw, outside, input, err));
            const cbn_node_id bad = scan_inputs(rw, row, rep).bad;
            if (bad != 0) return would_depend_on_itself(rw, bad, err);
        }
    }
    return CBN_OK;
}
