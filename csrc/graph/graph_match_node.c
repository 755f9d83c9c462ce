/* SPDX-License-Identifier: BSD-3-Clause */
/* One try: from an anchor's candidate everything else follows without a choice, so one stack of (pattern value,
 * target value) pairs does instead of recursion: patterns may be as deep as they like. What a try has bound is on a
 * trail and is taken back from there. */
#include "graph/graph_match_priv.h"

#include <string.h>

#include "base/cbn_alloc.h"

cbn_status cbn_match_reserve(void **data, size_t *room, size_t need, size_t item, cbn_error *err) {
    if (need <= *room) return CBN_OK;
    const size_t more = need < 32 ? 64 : 2 * need;
    void *wider = more > SIZE_MAX / item ? NULL : cbn_realloc(*data, more * item);
    if (wider == NULL) return cbn_fail_memory(err, "matching", more * item);
    *data = wider;
    *room = more;
    return CBN_OK;
}

static cbn_status push(cbn_matcher *m, const cbn_value *p, const cbn_value *t, bool strict, cbn_error *err) {
    if (m->nstack == m->stack_room) {
        void *data = m->stack;
        CBN_TRY(cbn_match_reserve(&data, &m->stack_room, m->nstack + 1, sizeof *m->stack, err));
        m->stack = data;
    }
    m->stack[m->nstack++] = (cbn_match_pair){*p, *t, strict};
    return CBN_OK;
}

cbn_status cbn_match_poll(cbn_matcher *m, cbn_error *err) {
    if (++m->steps % POLL_EVERY != 0 || m->p->opt.poll == NULL) return CBN_OK;
    const cbn_status status = m->p->opt.poll(m->p->opt.poll_arg);
    return status == CBN_OK ? CBN_OK : cbn_fail(err, status, "matching was interrupted");
}

/* ---- one node against one node ----------------------------------------------------------------------------------- */

/* Tracing names the constants it meets by counting, so their names say nothing: what counts is the value. */
static bool is_traced_constant(const char *target) { return strncmp(target, "_tensor_constant", 16) == 0; }

static cbn_status same_attribute(const cbn_matcher *m, const cbn_node *pn, const cbn_node *tn, bool *same,
                                 cbn_error *err) {
    const cbn_match_options *opt = &m->p->opt;
    if (pn->target.tag != CBN_V_STR || tn->target.tag != CBN_V_STR) {
        *same = false;
        return CBN_OK;
    }
    const char *a = cbn_graph_str(m->p->graph, pn->target.u.str, NULL);
    const char *b = cbn_graph_str(m->g, tn->target.u.str, NULL);
    *same = strcmp(a, b) == 0;
    if (!is_traced_constant(a) || opt->root == NULL || opt->pattern_root == NULL) return CBN_OK;
    const cbn_host_vtable *host = cbn_graph_host(m->g);
    cbn_host x = NULL, y = NULL;
    CBN_TRY(host->resolve(opt->pattern_root, a, &x, err));
    CBN_TRY(host->resolve(opt->root, b, &y, err));
    if (x == NULL || y == NULL) return CBN_OK;
    *same = x == y;
    if (*same || opt->same_array == NULL) return CBN_OK;
    const cbn_status status = opt->same_array(x, y, same);
    return status == CBN_OK ? CBN_OK : cbn_fail(err, status, "comparing the constants '%s' and '%s' failed", a, b);
}

static cbn_status same_callable(const cbn_matcher *m, const cbn_node *pn, const cbn_node *tn, bool *same,
                                cbn_error *err) {
    const cbn_value *a = &pn->target, *b = &tn->target;
    *same = a->tag == CBN_V_HOST && b->tag == CBN_V_HOST && a->u.host == b->u.host;
    if (*same) return CBN_OK;
    if (pn->opcode != 0 || tn->opcode != 0) {
        *same = pn->opcode == tn->opcode;
        return CBN_OK;
    }
    return cbn_value_equal(m->p->graph, a, m->g, b, same, err);
}

cbn_status cbn_match_same_node(const cbn_matcher *m, uint32_t pos, const cbn_node *tn, bool *same, cbn_error *err) {
    const cbn_node *pn = cbn_graph_node(m->p->graph, m->p->ids[pos]);
    *same = false;
    if (pn->op != tn->op) return CBN_OK;
    switch (pn->op) {
    case CBN_NODE_PLACEHOLDER:
    case CBN_NODE_OUTPUT: *same = true; return CBN_OK;
    case CBN_NODE_GET_ATTR: return same_attribute(m, pn, tn, same, err);
    case CBN_NODE_CALL_FUNCTION: return same_callable(m, pn, tn, same, err);
    default:
        *same = tn->target.tag == CBN_V_STR && m->target[pos] != CBN_STR_NONE && m->target[pos] == tn->target.u.str;
        return CBN_OK;
    }
}

static bool same_text(const cbn_matcher *m, cbn_str p, cbn_str t) {
    size_t np, nt;
    const char *a = cbn_graph_str(m->p->graph, p, &np), *b = cbn_graph_str(m->g, t, &nt);
    return np == nt && memcmp(a, b, np) == 0;
}

static const cbn_value *find_keyword(const cbn_matcher *m, const cbn_args *t, cbn_str key) {
    for (uint32_t k = 0; k < t->nkw; k++)
        if (same_text(m, key, cbn_args_key(t, k))) return cbn_args_kw(t, k);
    return NULL;
}

static bool is_index(const cbn_matcher *m, const cbn_node *pn) {
    if (pn->op == CBN_NODE_CALL_METHOD && pn->target.tag == CBN_V_STR) {
        const char *name = cbn_graph_str(m->p->graph, pn->target.u.str, NULL);
        return strcmp(name, "__getitem__") == 0 || strcmp(name, "__setitem__") == 0;
    }
    if (pn->opcode == 0) return false;
    const cbn_op *row = cbn_op_table_row(cbn_graph_ops(m->p->graph), pn->opcode);
    return (row->family == CBN_FAMILY_GETITEM || strcmp(row->name, "operator.setitem") == 0);
}

/* The default string of a parameter the call leaves out, else NULL: such a default has no value in the graph. */
static const char *default_string(const cbn_bound *b, int i) {
    return b->given[i] ? NULL : b->op->params[i].default_str;
}

static bool is_text(const cbn_graph *g, const cbn_value *v, const char *text) {
    return v->tag == CBN_V_STR && strcmp(cbn_graph_str(g, v->u.str, NULL), text) == 0;
}

static cbn_status push_bound(cbn_matcher *m, const cbn_bound *a, const cbn_bound *b, int i, bool *ok, cbn_error *err) {
    if (!a->given[i] && !b->given[i]) return CBN_OK;
    const char *sa = default_string(a, i), *sb = default_string(b, i);
    if (sa != NULL || sb != NULL) {
        *ok = sa != NULL ? is_text(m->g, &b->v[i], sa) : is_text(m->p->graph, &a->v[i], sb);
        *ok |= m->p->opt.ignore_literals && !a->v[i].has_nodes && !b->v[i].has_nodes;
        return CBN_OK;
    }
    if (!a->op->params[i].variadic) return push(m, &a->v[i], &b->v[i], false, err);
    *ok = a->nrest == b->nrest;
    for (uint32_t k = a->nrest; *ok && k-- > 0;) CBN_TRY(push(m, &a->rest[k], &b->rest[k], false, err));
    return CBN_OK;
}

/* Pushes the arguments of both nodes pair by pair, the first argument on top. Different spellings of one call
 * (positions, keywords, defaults left out) are brought to the order of the operator's schema first. */
static cbn_status push_arguments(cbn_matcher *m, cbn_node_id pid, cbn_node_id tid, bool *ok, cbn_error *err) {
    const cbn_node *pn = cbn_graph_node(m->p->graph, pid), *tn = cbn_graph_node(m->g, tid);
    const cbn_args *a = pn->args, *b = tn->args;
    const bool strict = is_index(m, pn);
    const size_t start = m->nstack;
    *ok = a->nargs == b->nargs && a->nkw == b->nkw;
    for (uint32_t k = a->nkw; *ok && k-- > 0;) {
        const cbn_value *t = k < b->nkw && same_text(m, cbn_args_key(a, k), cbn_args_key(b, k))
                                 ? cbn_args_kw(b, k)
                                 : find_keyword(m, b, cbn_args_key(a, k));
        *ok = t != NULL;
        if (*ok) CBN_TRY(push(m, cbn_args_kw(a, k), t, strict, err));
    }
    if (*ok) {
        for (uint32_t i = a->nargs; i-- > 0;) CBN_TRY(push(m, &a->v[i], &b->v[i], strict, err));
        return CBN_OK;
    }
    m->nstack = start;
    if (strict || pn->opcode == 0 || pn->opcode != tn->opcode) return CBN_OK;

    cbn_bound pb, tb;
    cbn_error ignored; /* a call that its schema does not allow equals only one spelled the same way */
    if (cbn_op_bind(m->p->graph, pid, &pb, &ignored) != CBN_OK || cbn_op_bind(m->g, tid, &tb, &ignored) != CBN_OK)
        return CBN_OK;
    *ok = pb.n == tb.n;
    for (int i = pb.n; *ok && i-- > 0;) CBN_TRY(push_bound(m, &pb, &tb, i, ok, err));
    return CBN_OK;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static void bind(cbn_matcher *m, uint32_t pos, const cbn_value *t) {
    m->bound[pos] = *t;
    m->trail[m->ntrail++] = pos;
}

static cbn_status match_node(cbn_matcher *m, uint32_t pos, const cbn_value *t, bool *ok, cbn_error *err) {
    const cbn_node_id pid = m->p->ids[pos];
    const bool wild = cbn_graph_node(m->p->graph, pid)->op == CBN_NODE_PLACEHOLDER && !m->p->opt.match_placeholder;
    if (m->bound[pos].tag != CBN_V_UNBOUND) {
        if (t->tag == CBN_V_NODE || m->bound[pos].tag == CBN_V_NODE) {
            *ok = t->tag == m->bound[pos].tag && t->u.node == m->bound[pos].u.node;
            return CBN_OK;
        }
        return cbn_value_equal(m->g, &m->bound[pos], m->g, t, ok, err);
    }
    if (wild) {
        bind(m, pos, t);
        *ok = true;
        return CBN_OK;
    }
    *ok = false;
    if (t->tag != CBN_V_NODE) return CBN_OK;
    const cbn_node_id tid = t->u.node;
    if (m->claim[tid] != CLAIM_FREE) return CBN_OK;
    CBN_TRY(cbn_match_same_node(m, pos, cbn_graph_node(m->g, tid), ok, err));
    if (!*ok) return CBN_OK;
    m->claim[tid] = pos + 1;
    bind(m, pos, t);
    return push_arguments(m, pid, tid, ok, err);
}

static bool is_list(const cbn_value *v) { return v->tag == CBN_V_LIST || v->tag == CBN_V_TUPLE; }

static cbn_status match_dict(cbn_matcher *m, const cbn_match_pair *x, bool *ok, cbn_error *err) {
    const cbn_seq *a = x->p.u.seq, *b = x->t.u.seq;
    for (uint32_t i = a->count; i > 0; i -= 2) {
        uint32_t j = 0;
        bool same = false;
        for (; j < b->count; j += 2) {
            CBN_TRY(cbn_value_equal(m->p->graph, &a->v[i - 2], m->g, &b->v[j], &same, err));
            if (same) break;
        }
        *ok = same;
        if (!same) return CBN_OK;
        CBN_TRY(push(m, &a->v[i - 1], &b->v[j + 1], x->strict, err));
    }
    return CBN_OK;
}

static cbn_status match_pair(cbn_matcher *m, const cbn_match_pair *x, bool *ok, cbn_error *err) {
    const cbn_value *p = &x->p, *t = &x->t;
    if (p->tag == CBN_V_NODE) return match_node(m, m->p->index[p->u.node], t, ok, err);
    *ok = true;
    if (!p->has_nodes && !t->has_nodes && m->p->opt.ignore_literals) return CBN_OK;
    const bool alike = p->tag == t->tag || (!x->strict && is_list(p) && is_list(t));
    if (cbn_value_is_seq(p) && alike) {
        const cbn_seq *a = p->u.seq, *b = t->u.seq;
        *ok = a->count == b->count && a->cls == b->cls;
        if (!*ok) return CBN_OK;
        if (p->tag == CBN_V_DICT) return match_dict(m, x, ok, err);
        for (uint32_t i = a->count; i-- > 0;) CBN_TRY(push(m, &a->v[i], &b->v[i], x->strict, err));
        return CBN_OK;
    }
    *ok = false;
    if (t->has_nodes || p->has_nodes) return CBN_OK;
    return cbn_value_equal(m->p->graph, p, m->g, t, ok, err);
}

void cbn_match_take_back(cbn_matcher *m, uint32_t trail) {
    while (m->ntrail > trail) {
        const uint32_t pos = m->trail[--m->ntrail];
        const cbn_value *v = &m->bound[pos];
        if (v->tag == CBN_V_NODE && m->claim[v->u.node] == pos + 1) m->claim[v->u.node] = CLAIM_FREE;
        m->bound[pos].tag = CBN_V_UNBOUND;
    }
}

cbn_status cbn_match_try(cbn_matcher *m, uint32_t k, cbn_node_id candidate, bool *ok, cbn_error *err) {
    const uint32_t trail = m->ntrail;
    const cbn_value t = cbn_value_node(candidate);
    m->nstack = 0;
    CBN_TRY(match_node(m, m->p->anchors[k], &t, ok, err));
    while (*ok && m->nstack > 0) {
        const cbn_match_pair x = m->stack[--m->nstack];
        CBN_TRY(cbn_match_poll(m, err));
        CBN_TRY(match_pair(m, &x, ok, err));
    }
    if (!*ok) cbn_match_take_back(m, trail);
    return CBN_OK;
}
