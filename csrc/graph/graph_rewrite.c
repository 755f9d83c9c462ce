/* SPDX-License-Identifier: BSD-3-Clause */
/* Replacements, one match after another. A match was found in the graph as it was before the first replacement; what
 * has been replaced since is looked up in a table from old nodes to new values. */
#include "graph/graph_rewrite_priv.h"

#include <string.h>

#include "base/cbn_alloc.h"

cbn_status cbn_rewrite_reserve(void *array, size_t *room, size_t need, size_t item, cbn_error *err) {
    if (need <= *room) return CBN_OK;
    const size_t more = need < 16 ? 32 : 2 * need;
    void *p; /* array is a T **: its pointer is copied, not cast */
    memcpy(&p, array, sizeof p);
    p = more > SIZE_MAX / item ? NULL : cbn_realloc(p, more * item);
    if (p == NULL) return cbn_fail_memory(err, "rewriting", more * item);
    memset((char *)p + *room * item, 0, (more - *room) * item);
    memcpy(array, &p, sizeof p);
    *room = more;
    return CBN_OK;
}

cbn_status cbn_rewrite_flag(cbn_rewrite *rw, cbn_node_id id, uint8_t bits, cbn_error *err) {
    if (rw->flags[id] == 0) {
        CBN_TRY(cbn_rewrite_reserve(&rw->touched, &rw->touched_room, rw->ntouched + 1, sizeof *rw->touched, err));
        rw->touched[rw->ntouched++] = id;
    }
    rw->flags[id] |= bits;
    return CBN_OK;
}

cbn_status cbn_rewrite_begin(cbn_graph *g, const cbn_pattern *p, cbn_host root, cbn_rewrite **out, cbn_error *err) {
    *out = NULL;
    cbn_rewrite *rw = cbn_calloc(sizeof *rw);
    if (rw == NULL) return cbn_fail_memory(err, "rewriting", sizeof *rw);
    *rw = (cbn_rewrite){.g = g, .p = p, .root = root, .slots = cbn_graph_slots(g)};
    rw->gen = cbn_alloc_array(rw->slots, sizeof *rw->gen);
    rw->changed = cbn_calloc(rw->slots * sizeof *rw->changed);
    if (rw->gen == NULL || rw->changed == NULL) {
        cbn_rewrite_end(rw);
        return cbn_fail_memory(err, "rewriting", cbn_graph_slots(g) * sizeof *rw->gen);
    }
    for (uint32_t i = 0; i < rw->slots; i++) rw->gen[i] = cbn_graph_node(g, i)->gen;
    *out = rw;
    return CBN_OK;
}

void cbn_rewrite_end(cbn_rewrite *rw) {
    if (rw == NULL) return;
    for (size_t i = 0; i < rw->nchanges; i++) cbn_value_release(rw->g, rw->changes[i].to);
    cbn_free(rw->gen);
    cbn_free(rw->changed);
    cbn_free(rw->changes);
    cbn_free(rw->flags);
    cbn_free(rw->touched);
    cbn_free(rw->late);
    cbn_free(rw->replaced);
    cbn_free(rw->pairs);
    cbn_free(rw->values);
    cbn_free(rw);
}

void cbn_rewrite_result_free(const cbn_graph *g, cbn_rewrite_result *r) {
    for (uint32_t i = 0; i < r->count; i++)
        if (r->metas[i] != NULL) cbn_graph_host(g)->release(r->metas[i]);
    cbn_free(r->nodes);
    cbn_free(r->sources);
    cbn_free(r->metas);
    cbn_free(r->returned);
    *r = (cbn_rewrite_result){0};
}

/* ---- values with nodes replaced by values ------------------------------------------------------------------------ */

/* What stands for a node in dst; NULL after filling *err (never NULL here). */
typedef const cbn_value *(*find_fn)(cbn_node_id id, void *arg, cbn_error *err);

/* A value of dst like v of src (may be the same graph) with every node replaced. Recursion is bounded by
 * CBN_VALUE_MAX_DEPTH. */
static cbn_status substitute(cbn_graph *dst, const cbn_graph *src, const cbn_value *v, find_fn find, void *arg,
                             cbn_value *out, cbn_error *err) {
    if (v->tag == CBN_V_NODE) {
        const cbn_value *to = find(v->u.node, arg, err);
        if (to == NULL) return err->status;
        *out = cbn_value_retain(dst, *to);
        return CBN_OK;
    }
    if (!v->has_nodes) {
        if (dst != src) return cbn_value_map(dst, src, v, NULL, NULL, out, err);
        *out = cbn_value_retain(dst, *v);
        return CBN_OK;
    }
    const cbn_seq *seq = v->u.seq;
    cbn_value few[16], *items = few;
    if (seq->count > 16) items = cbn_alloc_array(seq->count, sizeof *items);
    if (items == NULL) return cbn_fail_memory(err, "a list of arguments", seq->count * sizeof *items);
    uint32_t n = 0;
    cbn_status status = CBN_OK;
    for (; status == CBN_OK && n < seq->count; n += status == CBN_OK)
        status = substitute(dst, src, &seq->v[n], find, arg, &items[n], err);
    if (status == CBN_OK) {
        const cbn_host_vtable *host = cbn_graph_host(dst);
        if (seq->cls != NULL) host->retain(seq->cls);
        status = cbn_value_seq(dst, (cbn_value_tag)v->tag, items, seq->count, seq->cls, out, err);
        if (status != CBN_OK && seq->cls != NULL) host->release(seq->cls);
    }
    if (status != CBN_OK)
        while (n > 0) cbn_value_release(dst, items[--n]);
    if (items != few) cbn_free(items);
    return status;
}

/* ---- what has changed -------------------------------------------------------------------------------------------- */

static const cbn_change *find_change(const cbn_rewrite *rw, cbn_node_id id, uint32_t gen) {
    if (id < rw->slots && rw->gen[id] == gen) return rw->changed[id] != 0 ? &rw->changes[rw->changed[id] - 1] : NULL;
    for (size_t i = 0; rw->nlate_keys > 0 && i < rw->nchanges; i++)
        if (rw->changes[i].id == id && rw->changes[i].gen == gen) return &rw->changes[i];
    return NULL;
}

typedef struct lookup {
    const cbn_rewrite *rw;
    cbn_value node; /* the answer when it is a node */
} lookup;

/* What stands now for a node that was there when the round began. */
static const cbn_value *current(cbn_node_id id, void *arg, cbn_error *err) {
    lookup *l = arg;
    uint32_t gen = l->rw->gen[id];
    for (const cbn_change *c; (c = find_change(l->rw, id, gen)) != NULL;) {
        if (c->to.tag != CBN_V_NODE) return &c->to;
        id = c->to.u.node;
        gen = c->to_gen;
    }
    if (!cbn_graph_alive(l->rw->g, id, gen)) {
        cbn_status ignored = cbn_fail(err, CBN_BAD_STATE, "a node of a match was erased before the match was replaced");
        (void)ignored;
        return NULL;
    }
    l->node = cbn_value_node(id);
    return &l->node;
}

cbn_status cbn_rewrite_update(cbn_rewrite *rw, cbn_value *row, cbn_error *err) {
    lookup l = {.rw = rw};
    cbn_error local;
    if (err == NULL) err = &local;
    for (uint32_t pos = 0; pos < rw->p->n; pos++) {
        if (row[pos].tag == CBN_V_UNBOUND || !row[pos].has_nodes) continue;
        if (row[pos].tag == CBN_V_NODE) { /* the common case, without references */
            const cbn_value *now = current(row[pos].u.node, &l, err);
            if (now == NULL) return err->status;
            if (now->tag == CBN_V_NODE) {
                row[pos] = *now;
                continue;
            }
        }
        cbn_value fresh;
        CBN_TRY(substitute(rw->g, rw->g, &row[pos], current, &l, &fresh, err));
        cbn_value_release(rw->g, row[pos]);
        row[pos] = fresh;
    }
    return CBN_OK;
}

typedef struct one_change {
    cbn_node_id id;
    const cbn_value *to;
    cbn_value node;
} one_change;

static const cbn_value *change_one(cbn_node_id id, void *arg, cbn_error *err) {
    one_change *c = arg;
    (void)err;
    if (id == c->id) return c->to;
    c->node = cbn_value_node(id);
    return &c->node;
}

static cbn_status remember(cbn_rewrite *rw, cbn_node_id id, const cbn_value *to, cbn_error *err) {
    CBN_TRY(cbn_rewrite_reserve(&rw->changes, &rw->changes_room, rw->nchanges + 1, sizeof *rw->changes, err));
    one_change one = {.id = id, .to = to};
    for (size_t i = 0; rw->nlists > 0 && i < rw->nchanges; i++) {
        if (rw->changes[i].to.tag == CBN_V_NODE || !rw->changes[i].to.has_nodes) continue;
        cbn_value fresh;
        CBN_TRY(substitute(rw->g, rw->g, &rw->changes[i].to, change_one, &one, &fresh, err));
        cbn_value_release(rw->g, rw->changes[i].to);
        rw->changes[i].to = fresh;
    }
    cbn_change *c = &rw->changes[rw->nchanges++];
    *c = (cbn_change){.id = id, .gen = cbn_graph_node(rw->g, id)->gen, .to = cbn_value_retain(rw->g, *to)};
    if (to->tag == CBN_V_NODE) c->to_gen = cbn_graph_node(rw->g, to->u.node)->gen;
    else rw->nlists += to->has_nodes;
    if (id < rw->slots && rw->gen[id] == c->gen) rw->changed[id] = (uint32_t)rw->nchanges;
    else rw->nlate_keys++;
    return CBN_OK;
}

/* ---- copying ----------------------------------------------------------------------------------------------------- */

typedef struct replacement_lookup {
    const cbn_rewrite *rw;
    const cbn_graph *rep;
} replacement_lookup;

static const cbn_value *replaced_value(cbn_node_id id, void *arg, cbn_error *err) {
    const replacement_lookup *l = arg;
    const cbn_value *v = &l->rw->replaced[id];
    if (v->tag != CBN_V_UNBOUND) return v;
    const char *name = cbn_rewrite_name(l->rep, id);
    const cbn_status ignored =
        cbn_is_placeholder(l->rep, id)
            ? cbn_fail(err, CBN_BAD_VALUE,
                       "replacement: uses placeholder '%s', whose counterpart the pattern does not use", name)
            : cbn_fail(err, CBN_BAD_STATE, "replacement: node '%s' is used before it is defined", name);
    (void)ignored;
    return NULL;
}

static cbn_status local_string(cbn_graph *g, const cbn_graph *rep, cbn_str s, cbn_str *out, cbn_error *err) {
    size_t len;
    const char *text = cbn_graph_str(rep, s, &len);
    return cbn_graph_intern(g, text, len, out, err);
}

static cbn_status copy_node(cbn_rewrite *rw, const cbn_graph *rep, cbn_node_id id, cbn_node_id *out, cbn_error *err) {
    const cbn_node *node = cbn_graph_node(rep, id);
    const cbn_args *args = node->args;
    replacement_lookup l = {rw, rep};
    cbn_node_spec spec = {
        .op = (cbn_node_op)node->op, .nargs = args->nargs, .nkw = args->nkw, .type_expr = node->type_expr};
    const uint32_t total = args->nargs + 2 * args->nkw;
    CBN_TRY(cbn_rewrite_reserve(&rw->values, &rw->values_room, (size_t)total + 1, sizeof *rw->values, err));
    CBN_TRY(local_string(rw->g, rep, node->name, &spec.name, err));
    uint32_t n = 0;
    cbn_status status = CBN_OK;
    for (; status == CBN_OK && n < total; n += status == CBN_OK) {
        status = substitute(rw->g, rep, &args->v[n], replaced_value, &l, &rw->values[n], err);
    }
    if (status == CBN_OK) {
        status = cbn_value_map(rw->g, rep, &node->target, NULL, NULL, &spec.target, err);
        if (status == CBN_OK) {
            spec.args = rw->values;
            spec.kw = rw->values + args->nargs;
            status = cbn_graph_create(rw->g, &spec, out, err);
            if (status != CBN_OK) cbn_value_release(rw->g, spec.target);
        }
    }
    if (status != CBN_OK)
        while (n > 0) cbn_value_release(rw->g, rw->values[--n]);
    return status;
}

static cbn_status add_new(cbn_rewrite_result *r, cbn_node_id id, cbn_node_id source, cbn_error *err) {
    if (r->count == r->capacity) {
        size_t a = r->capacity, b = a, c = a, d = a;
        CBN_TRY(cbn_rewrite_reserve(&r->nodes, &a, a + 1, sizeof *r->nodes, err));
        CBN_TRY(cbn_rewrite_reserve(&r->sources, &b, b + 1, sizeof *r->sources, err));
        CBN_TRY(cbn_rewrite_reserve(&r->metas, &c, c + 1, sizeof *r->metas, err));
        CBN_TRY(cbn_rewrite_reserve(&r->returned, &d, d + 1, sizeof *r->returned, err));
        r->capacity = (uint32_t)a;
    }
    r->nodes[r->count] = id;
    r->sources[r->count] = source;
    r->returned[r->count] = false;
    r->metas[r->count++] = NULL;
    return CBN_OK;
}

static cbn_status bind_placeholders(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep, cbn_error *err) {
    CBN_TRY(cbn_rewrite_reserve(&rw->replaced, &rw->replaced_room, cbn_graph_slots(rep), sizeof *rw->replaced, err));
    for (uint32_t i = 0; i < cbn_graph_slots(rep); i++) rw->replaced[i] = (cbn_value){.tag = CBN_V_UNBOUND};
    uint32_t n = 0;
    for (cbn_node_id id = cbn_graph_first(rep); id != 0; id = cbn_graph_next(rep, id)) {
        if (!cbn_is_placeholder(rep, id)) continue;
        if (n < rw->p->nplaceholders) rw->replaced[id] = row[rw->p->placeholders[n]];
        n++;
    }
    if (n != rw->p->nplaceholders)
        return cbn_fail(err, CBN_BAD_VALUE, "replacement: expected %u placeholders, as the pattern has, got %u",
                        rw->p->nplaceholders, n);
    return CBN_OK;
}

static cbn_status copy_nodes(cbn_rewrite *rw, const cbn_graph *rep, cbn_node_id before, cbn_rewrite_result *result,
                             cbn_error *err) {
    bool after;
    const cbn_node_id anchor = cbn_graph_insert_anchor(rw->g, &after);
    cbn_graph_set_insert_point(rw->g, before);
    cbn_status status = CBN_OK;
    for (cbn_node_id id = cbn_graph_first(rep); id != 0 && status == CBN_OK; id = cbn_graph_next(rep, id)) {
        const uint8_t op = cbn_graph_node(rep, id)->op;
        if (op == CBN_NODE_PLACEHOLDER || op == CBN_NODE_OUTPUT) continue;
        cbn_node_id fresh = 0;
        status = copy_node(rw, rep, id, &fresh, err);
        if (status != CBN_OK) break;
        rw->replaced[id] = cbn_value_node(fresh);
        status = cbn_rewrite_flag(rw, fresh, FRESH, err);
        if (status == CBN_OK) status = add_new(result, fresh, id, err);
    }
    if (after) cbn_graph_set_insert_after(rw->g, anchor);
    else cbn_graph_set_insert_point(rw->g, anchor);
    return status;
}

/* ---- putting it in ----------------------------------------------------------------------------------------------- */

static bool user_changes(cbn_node_id user, void *arg) {
    return (((const cbn_rewrite *)arg)->flags[user] & (MATCHED | FRESH)) == 0;
}

/* Users of id take a value that is not a node (a literal, or a list that a placeholder was bound to). */
static cbn_status use_value(cbn_rewrite *rw, cbn_node_id id, const cbn_value *to, cbn_error *err) {
    one_change one = {.id = id, .to = to};
    for (;;) {
        cbn_node_id user = 0;
        for (uint32_t e = cbn_graph_node(rw->g, id)->first_user; e != 0 && user == 0;) {
            const cbn_edge *edge = cbn_graph_edge(rw->g, e);
            if (user_changes(edge->user, rw)) user = edge->user;
            e = edge->next_user;
        }
        if (user == 0) return CBN_OK;
        const cbn_args *args = cbn_graph_node(rw->g, user)->args;
        const uint32_t total = args->nargs + 2 * args->nkw;
        CBN_TRY(cbn_rewrite_reserve(&rw->values, &rw->values_room, (size_t)total + 1, sizeof *rw->values, err));
        uint32_t n = 0;
        cbn_status status = CBN_OK;
        for (; status == CBN_OK && n < total; n += status == CBN_OK)
            status = substitute(rw->g, rw->g, &args->v[n], change_one, &one, &rw->values[n], err);
        if (status == CBN_OK)
            status = cbn_graph_set_args(rw->g, user, rw->values, args->nargs, rw->values + args->nargs, args->nkw, err);
        if (status != CBN_OK) {
            while (n > 0) cbn_value_release(rw->g, rw->values[--n]);
            return status;
        }
    }
}

static bool same_target(const cbn_graph *a, const cbn_node *x, const cbn_graph *b, const cbn_node *y) {
    if (x->op != y->op || x->target.tag != y->target.tag) return false;
    if (x->target.tag == CBN_V_HOST) return x->target.u.host == y->target.u.host;
    return x->target.tag == CBN_V_STR &&
           strcmp(cbn_graph_str(a, x->target.u.str, NULL), cbn_graph_str(b, y->target.u.str, NULL)) == 0;
}

/* The matched node whose role a new node has, 0: none. */
static cbn_node_id role_of(const cbn_rewrite *rw, const cbn_value *row, cbn_node_id fresh, bool *returned) {
    for (size_t i = 0; i < rw->npairs; i++) {
        const cbn_result_pair *x = &rw->pairs[i];
        *returned = !x->same && x->to.tag == CBN_V_NODE && x->to.u.node == fresh;
        if (*returned) return row[x->pos].u.node;
    }
    cbn_node_id role = 0;
    const cbn_node *node = cbn_graph_node(rw->g, fresh);
    for (uint32_t pos = 0; pos < rw->p->n; pos++) {
        if (cbn_is_placeholder(rw->p->graph, rw->p->ids[pos])) continue;
        if (!same_target(rw->g, node, rw->g, cbn_graph_node(rw->g, row[pos].u.node))) continue;
        if (role != 0) return 0;
        role = row[pos].u.node;
    }
    return role;
}

static cbn_status give_roles(cbn_rewrite *rw, const cbn_value *row, cbn_rewrite_result *result, cbn_error *err) {
    bool any = false;
    for (uint32_t pos = 0; pos < rw->p->n && !any; pos++)
        if (row[pos].tag == CBN_V_NODE) {
            const cbn_node *node = cbn_graph_node(rw->g, row[pos].u.node);
            any = node->meta != NULL || node->tensor != NULL;
        }
    for (uint32_t k = 0; any && k < result->count; k++) {
        bool returned = false;
        const cbn_node_id role = role_of(rw, row, result->nodes[k], &returned);
        if (role == 0) continue;
        result->returned[k] = returned;
        const cbn_node *node = cbn_graph_node(rw->g, role);
        if (node->meta != NULL) {
            cbn_graph_host(rw->g)->retain(node->meta);
            result->metas[k] = node->meta;
        }
        if (returned && node->tensor != NULL) {
            const cbn_tensor_meta tensor = cbn_tensor_copy(node->tensor);
            CBN_TRY(cbn_graph_set_tensor(rw->g, result->nodes[k], &tensor, err));
        }
    }
    return CBN_OK;
}

static cbn_status connect(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep, cbn_error *err) {
    replacement_lookup l = {rw, rep};
    for (size_t i = 0; i < rw->npairs; i++) {
        cbn_result_pair *x = &rw->pairs[i];
        CBN_TRY(substitute(rw->g, rep, x->value, replaced_value, &l, &x->to, err));
        x->owned = true;
    }
    for (size_t i = 0; i < rw->npairs; i++) {
        cbn_result_pair *x = &rw->pairs[i];
        if (x->same) continue;
        const cbn_node_id from = row[x->pos].u.node;
        if (x->to.tag == CBN_V_NODE)
            CBN_TRY(cbn_graph_replace_uses(rw->g, from, x->to.u.node, user_changes, rw, NULL, err));
        else
            CBN_TRY(use_value(rw, from, &x->to, err));
        CBN_TRY(remember(rw, from, &x->to, err));
    }
    return CBN_OK;
}

static cbn_status apply(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep, cbn_rewrite_result *result,
                        cbn_error *err) {
    cbn_node_id before = 0;
    const cbn_node_id output = cbn_graph_output(rep);
    if (rep == rw->g)
        return cbn_fail(err, CBN_BAD_VALUE, "replacement: expected another graph than the one it changes");
    if (output == 0) return cbn_fail(err, CBN_BAD_VALUE, "replacement: expected a graph with an output node, got none");
    CBN_TRY(bind_placeholders(rw, row, rep, err));
    CBN_TRY(cbn_rewrite_pair(rw, rep, err));
    CBN_TRY(cbn_rewrite_place(rw, row, rep, &before, err));
    CBN_TRY(copy_nodes(rw, rep, before, result, err));
    CBN_TRY(connect(rw, row, rep, err));
    for (size_t i = 0; i < rw->nlate; i++) CBN_TRY(cbn_graph_move_before(rw->g, rw->late[i], before, err));
    CBN_TRY(give_roles(rw, row, result, err));
    for (uint32_t pos = rw->p->n; pos-- > 0;)
        if (!cbn_is_placeholder(rw->p->graph, rw->p->ids[pos])) CBN_TRY(cbn_graph_erase(rw->g, row[pos].u.node, err));
    return CBN_OK;
}

cbn_status cbn_rewrite_apply(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *replacement,
                             cbn_rewrite_result *result, cbn_error *err) {
    cbn_error local;
    if (err == NULL) err = &local;
    assert(!rw->p->opt.match_output);
    result->count = 0;
    rw->nlate = rw->npairs = 0;
    const cbn_status status = apply(rw, row, replacement, result, err);
    for (size_t i = 0; i < rw->npairs; i++)
        if (rw->pairs[i].owned) cbn_value_release(rw->g, rw->pairs[i].to);
    while (rw->ntouched > 0) rw->flags[rw->touched[--rw->ntouched]] = 0;
    return status;
}
