/* SPDX-License-Identifier: BSD-3-Clause */
/* Common subexpressions: of nodes that compute the same, the later ones go and their users take the first.
 *
 * One walk in list order. A table holds, for each computation met, the node that stands for it; a node that computes the
 * same is merged into that one unless a reason says no. Its users come later: their arguments are rewritten when the
 * walk reaches them, once for all that were merged, so that a user of thousands of duplicates costs its length. What was
 * merged is erased at the end, last to first.
 *
 * The effects analysis, made before the first change, stays true: two values are merged only if nothing writes and
 * nothing returns the memory of either (views of them included), and the writers, which are never merged, keep their
 * places. So the classes that become one have no writers and are not returned, before and after. */
#include "graph/pass_cse.h"

#include "base/cbn_alloc.h"

typedef struct slot {
    uint64_t hash;
    cbn_node_id id; /* 0: free */
} slot;

typedef struct table {
    slot *slots;
    size_t mask; /* a power of two, less one; at most half of the slots are used */
} table;

typedef struct verdict {
    cbn_freeze_reason reason;
    cbn_node_id blocking;
    const char *hint;
    bool stands; /* kept, and from now on the node that stands for the computation */
} verdict;

static const char BY_IDENTITY[] = "the graph asks whether two values are one object, which merging could change";

/* ---- who stands in the way --------------------------------------------------------------------------------------- */
typedef struct search {
    const cbn_cse *c;
    cbn_node_id after, before, found;
} search;

static cbn_status array_written(cbn_host array, void *arg) {
    search *s = arg;
    if (s->found != 0) return CBN_OK;
    return cbn_effects_array_writer(s->c->effects, array, s->after, s->before, &s->found, s->c->f->err);
}

/* Arrays among the literals. */
static cbn_status literals_written(const cbn_value *v, search *s) {
    if (v->tag == CBN_V_HOST) return array_written(v->u.host, s);
    if (!cbn_value_is_seq(v)) return CBN_OK;
    for (uint32_t i = 0; s->found == 0 && i < v->u.seq->count; i++) CBN_TRY(literals_written(&v->u.seq->v[i], s));
    return CBN_OK;
}

/* The first node found between the two that may change what they compute from. */
static cbn_status writer_between(const cbn_cse *c, cbn_node_id earlier, const cbn_cse_key *key, cbn_node_id *out) {
    const cbn_node *node = cbn_graph_node(c->g, key->id);
    search s = {.c = c, .after = earlier, .before = key->id};
    bool objects = node->op == CBN_NODE_CALL_MODULE;
    for (uint32_t edge = node->first_input; edge != 0 && s.found == 0; edge = cbn_graph_edge(c->g, edge)->next_input) {
        const cbn_node_id input = cbn_graph_edge(c->g, edge)->producer;
        objects |= c->holds_objects[input];
        s.found = cbn_effects_writer(c->effects, input, earlier, key->id);
    }
    const cbn_args *args = node->args;
    for (uint32_t i = 0; s.found == 0 && i < args->nargs + 2 * args->nkw; i++) {
        CBN_TRY(literals_written(&args->v[i], &s));
    }
    if (s.found == 0 && node->op == CBN_NODE_CALL_MODULE) {
        cbn_graph_lock(c->g);
        const cbn_status status =
            cbn_graph_host(c->g)->module_arrays(c->object[key->id], array_written, &s, c->f->err);
        cbn_graph_unlock(c->g);
        CBN_TRY(status);
    }
    const bool barred = objects && c->barrier != 0 && cbn_node_before(c->g, earlier, c->barrier);
    *out = s.found == 0 && barred ? c->barrier : s.found;
    return CBN_OK;
}

/* Is this node's own memory nobody else's business? */
static bool memory_is_shared(const cbn_cse *c, cbn_node_id id, verdict *out) {
    if (cbn_effects_returned(c->effects, id)) {
        out->reason = CBN_FREEZE_ALIASES_OUTPUT;
        return true;
    }
    if (!cbn_effects_written(c->effects, id)) return false;
    out->reason = CBN_FREEZE_MUTATED;
    out->blocking = cbn_effects_writer(c->effects, id, 0, 0);
    return true;
}

/* `earlier` stands for what key->id computes too. */
static cbn_status judge(const cbn_cse *c, cbn_node_id earlier, const cbn_cse_key *key, verdict *out) {
    *out = (verdict){.reason = (cbn_freeze_reason)key->reason, .hint = key->hint};
    if (key->reason != CBN_FREEZE_OK) return CBN_OK;
    if (memory_is_shared(c, key->id, out)) return CBN_OK;
    if (memory_is_shared(c, earlier, out)) {
        if (out->blocking == 0) out->blocking = earlier;
        out->stands = true;
        return CBN_OK;
    }
    if (c->by_identity != 0) {
        *out = (verdict){.reason = CBN_FREEZE_UNSUPPORTED, .blocking = c->by_identity, .hint = BY_IDENTITY};
        return CBN_OK;
    }
    CBN_TRY(writer_between(c, earlier, key, &out->blocking));
    if (out->blocking == 0) return CBN_OK;
    out->reason = CBN_FREEZE_MUTATED;
    out->stands = true;
    return CBN_OK;
}

/* ---- changing ---------------------------------------------------------------------------------------------------- */
static cbn_node_id merged(cbn_node_id id, void *arg) {
    const cbn_cse *c = arg;
    return c->into[id] != 0 ? c->into[id] : id;
}

static cbn_status rewrite_whole(cbn_cse *c, cbn_node_id id) {
    const cbn_args *args = cbn_graph_node(c->g, id)->args;
    const uint32_t n = args->nargs + 2 * args->nkw;
    cbn_value *values = cbn_alloc_or_fail(n, sizeof *values, "arguments", c->f->err);
    if (values == NULL) return CBN_NO_MEMORY;
    cbn_status status = CBN_OK;
    uint32_t done = 0;
    while (status == CBN_OK && done < n) {
        status = cbn_value_map(c->g, c->g, &args->v[done], merged, c, &values[done], c->f->err);
        if (status == CBN_OK) done++;
    }
    if (status == CBN_OK) {
        status = cbn_graph_set_args(c->g, id, values, args->nargs, values + args->nargs, args->nkw, c->f->err);
    }
    for (uint32_t i = 0; status != CBN_OK && i < done; i++) cbn_value_release(c->g, values[i]);
    cbn_free(values);
    return status;
}

/* Inputs that were merged are replaced. A few one by one, which leaves the order of everybody's users alone. */
static cbn_status rewrite(cbn_cse *c, cbn_node_id id) {
    enum { FEW = 4 };
    cbn_node_id gone[FEW];
    uint32_t n = 0;
    for (uint32_t edge = cbn_graph_node(c->g, id)->first_input; edge != 0;
         edge = cbn_graph_edge(c->g, edge)->next_input) {
        const cbn_node_id input = cbn_graph_edge(c->g, edge)->producer;
        if (c->into[input] == 0) continue;
        if (n == FEW) return rewrite_whole(c, id);
        gone[n++] = input;
    }
    for (uint32_t i = 0; i < n; i++) {
        CBN_TRY(cbn_graph_replace_input(c->g, id, gone[i], c->into[gone[i]], c->f->err));
    }
    return CBN_OK;
}

static cbn_status erase_merged(cbn_cse *c, cbn_node_id last) {
    while (last != 0) {
        const cbn_node_id id = last;
        last = cbn_graph_prev(c->g, id);
        if (c->into[id] != 0) CBN_TRY(cbn_graph_erase(c->g, id, c->f->err));
    }
    return CBN_OK;
}

/* ---- the walk ---------------------------------------------------------------------------------------------------- */
/* What the node may do to objects that no memory range describes, and whether its value leads to such. */
static void follow_objects(cbn_cse *c, const cbn_cse_key *key) {
    const cbn_node *node = cbn_graph_node(c->g, key->id);
    bool given = false;
    for (uint32_t edge = node->first_input; edge != 0 && !given; edge = cbn_graph_edge(c->g, edge)->next_input) {
        given = c->holds_objects[cbn_graph_edge(c->g, edge)->producer];
    }
    c->holds_objects[key->id] = given && (!key->bound_ok || key->bound.op->effect != CBN_EFFECT_PURE);
    /* A module may change what it holds without being given it. */
    if (key->opaque && (given || node->op == CBN_NODE_CALL_MODULE)) c->barrier = key->id;
}

static cbn_status visit_call(cbn_cse *c, table *t, cbn_node_id id) {
    cbn_cse_key key;
    CBN_TRY(cbn_cse_read_call(c, id, &key));
    slot *at = &t->slots[key.hash & t->mask];
    while (at->id != 0 && !(at->hash == key.hash && cbn_cse_same(c, &key, at->id))) {
        at = at == &t->slots[t->mask] ? t->slots : at + 1;
    }
    verdict v = {.reason = CBN_FREEZE_OK, .stands = true};
    if (at->id != 0) {
        CBN_TRY(judge(c, at->id, &key, &v));
        if (v.reason == CBN_FREEZE_OK) {
            c->same[id] = c->into[id] = at->id;
            return cbn_freeze_done(c->f, CBN_STEP_CSE, id, cbn_graph_node(c->g, at->id)->name);
        }
        CBN_TRY(cbn_freeze_keep(c->f, CBN_STEP_CSE, v.reason, id, v.blocking, v.hint));
    }
    if (v.stands) *at = (slot){key.hash, id};
    follow_objects(c, &key);
    return rewrite(c, id);
}

/* get_attr nodes stay, but two that read one object count as one for what is computed from them. */
static cbn_status visit_attr(cbn_cse *c, table *t, cbn_node_id id) {
    CBN_TRY(cbn_cse_read_attr(c, id));
    if (c->object[id] == NULL) return CBN_OK;
    const uint64_t hash = cbn_hash_word(cbn_hash_word(c->keys.seed, CBN_NODE_GET_ATTR) + 1,
                                        (uint64_t)(uintptr_t)c->object[id]);
    slot *at = &t->slots[hash & t->mask];
    while (at->id != 0 && !(at->hash == hash && c->object[at->id] == c->object[id] &&
                            cbn_graph_node(c->g, at->id)->op == CBN_NODE_GET_ATTR)) {
        at = at == &t->slots[t->mask] ? t->slots : at + 1;
    }
    const bool barred = at->id != 0 && c->barrier != 0 && cbn_node_before(c->g, at->id, c->barrier);
    if (at->id == 0 || barred) *at = (slot){hash, id};
    else c->same[id] = at->id;
    return CBN_OK;
}

static cbn_status visit(cbn_cse *c, table *t, cbn_node_id id) {
    switch (cbn_graph_node(c->g, id)->op) {
    case CBN_NODE_GET_ATTR: return visit_attr(c, t, id);
    case CBN_NODE_CALL_FUNCTION:
    case CBN_NODE_CALL_METHOD:
    case CBN_NODE_CALL_MODULE: return visit_call(c, t, id);
    default: return rewrite(c, id);
    }
}

/* `a is b` of two values. */
static bool compares_identity(const cbn_node *node) {
    return (node->opcode == CBN_OP_OPERATOR_IS_ || node->opcode == CBN_OP_OPERATOR_IS_NOT) && node->n_inputs > 1;
}

static cbn_status prepare(cbn_cse *c, table *t) {
    const uint32_t nodes = cbn_graph_slots(c->g);
    size_t room = 16;
    while (room < 2 * (size_t)cbn_graph_count(c->g) + 2) room *= 2;
    t->slots = cbn_calloc(room * sizeof *t->slots);
    t->mask = room - 1;
    c->same = cbn_alloc_array(nodes, sizeof *c->same);
    c->into = cbn_calloc(nodes * sizeof *c->into);
    c->object = cbn_calloc(nodes * sizeof *c->object);
    c->holds_objects = cbn_calloc(nodes * sizeof *c->holds_objects);
    if (t->slots == NULL || c->same == NULL || c->into == NULL || c->object == NULL || c->holds_objects == NULL) {
        return cbn_fail_memory(c->f->err, "common subexpressions", room * sizeof *t->slots);
    }
    for (uint32_t i = 0; i < nodes; i++) c->same[i] = i;
    c->keys = (cbn_value_keys){.same = c->same,
                               .seed = (uint64_t)(uintptr_t)t->slots ^ (uint64_t)(uintptr_t)c->g << 24,
                               .literal_hash = c->host->literal_hash,
                               .literal_same = c->host->literal_same};
    return CBN_OK;
}

static cbn_status eliminate(cbn_cse *c, table *t) {
    CBN_TRY(prepare(c, t));
    cbn_node_id last = 0;
    for (cbn_node_id id = cbn_graph_first(c->g); id != 0; id = cbn_graph_next(c->g, id)) {
        if (c->by_identity == 0 && compares_identity(cbn_graph_node(c->g, id))) c->by_identity = id;
    }
    CBN_TRY(cbn_effects_build(c->g, c->f->root, &c->effects, c->f->err));
    for (cbn_node_id id = cbn_graph_first(c->g); id != 0; id = cbn_graph_next(c->g, id)) {
        CBN_TRY(visit(c, t, id));
        last = id;
    }
    return erase_merged(c, last);
}

cbn_status cbn_pass_cse(cbn_freeze *f, const cbn_cse_host *host) {
    cbn_cse c = {.f = f, .g = f->g, .host = host};
    table t = {0};
    const cbn_status status = eliminate(&c, &t);
    cbn_effects_free(c.effects);
    cbn_free(t.slots);
    cbn_free(c.same);
    cbn_free(c.into);
    cbn_free(c.object);
    cbn_free(c.holds_objects);
    return status;
}
