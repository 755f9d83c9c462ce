/* SPDX-License-Identifier: BSD-3-Clause */
/* Values: nested immutable sequences of leaves. Recursion is bounded by CBN_VALUE_MAX_DEPTH everywhere. */
#include "graph/graph_priv.h"

#include <string.h>

static cbn_seq *seq_new(cbn_graph *g, uint32_t count) {
    if (count > UINT32_MAX / 4) return NULL;
    cbn_seq *s = cbn_cell_get(g, CBN_CELL_SEQ, count);
    if (!s) return NULL;
    s->count = count;
    s->cls = NULL;
    return s;
}

cbn_status cbn_value_seq(cbn_graph *g, cbn_value_tag tag, const cbn_value *items, uint32_t count, cbn_host cls,
                         cbn_value *out, cbn_error *err) {
    assert(tag >= CBN_V_TUPLE && tag <= CBN_V_SLICE);
    assert(tag != CBN_V_SLICE || count == 3);
    cbn_value v = {.tag = (uint8_t)tag};
    for (uint32_t i = 0; i < count; i++) {
        v.has_nodes |= items[i].has_nodes;
        const uint8_t depth = cbn_value_is_seq(&items[i]) ? items[i].depth : 0;
        if (depth >= CBN_VALUE_MAX_DEPTH)
            return cbn_fail(err, CBN_BAD_VALUE, "arguments: nested deeper than %d levels", CBN_VALUE_MAX_DEPTH);
        if (depth >= v.depth) v.depth = depth;
    }
    v.depth++;
    v.u.seq = seq_new(g, count);
    if (!v.u.seq) return cbn_fail_memory(err, "arguments", sizeof(cbn_seq) + (size_t)count * sizeof *items);
    if (count) memcpy(v.u.seq->v, items, count * sizeof *items);
    v.u.seq->cls = cls;
    *out = v;
    return CBN_OK;
}

cbn_value cbn_value_retain(cbn_graph *g, cbn_value v) {
    if (v.tag == CBN_V_HOST) g->host->retain(v.u.host);
    else if (cbn_value_is_seq(&v)) v.u.seq->refs++;
    return v;
}

void cbn_value_release(cbn_graph *g, cbn_value v) {
    if (v.tag == CBN_V_HOST) cbn_host_queue(g, v.u.host);
    else if (cbn_value_is_seq(&v)) cbn_seq_release(g, v.u.seq);
}

bool cbn_value_each_node(const cbn_value *v, bool (*fn)(cbn_node_id id, void *arg), void *arg) {
    if (v->tag == CBN_V_NODE) return fn(v->u.node, arg);
    if (!cbn_value_is_seq(v) || !v->has_nodes) return true;
    const cbn_seq *s = v->u.seq;
    for (uint32_t i = 0; i < s->count; i++) {
        if (s->v[i].has_nodes && !cbn_value_each_node(&s->v[i], fn, arg)) return false;
    }
    return true;
}

/* ---- copies with other nodes ------------------------------------------------------------------------------------- */
/* Drops the first n items of a sequence under construction and the sequence. */
static void undo_seq(cbn_graph *g, cbn_seq *s, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) cbn_value_release(g, s->v[i]);
    cbn_cell_put(g, CBN_CELL_SEQ, s->count, s);
}

cbn_status cbn_value_map(cbn_graph *dst, const cbn_graph *src, const cbn_value *v,
                         cbn_node_id (*map)(cbn_node_id id, void *arg), void *arg, cbn_value *out, cbn_error *err) {
    if (v->tag == CBN_V_NODE) {
        *out = cbn_value_node(map(v->u.node, arg));
        return CBN_OK;
    }
    if (v->tag == CBN_V_STR && dst != src) {
        size_t len;
        const char *s = cbn_graph_str(src, v->u.str, &len);
        *out = cbn_value_str(0);
        return cbn_graph_intern(dst, s, len, &out->u.str, err);
    }
    if (!cbn_value_is_seq(v) || (dst == src && !v->has_nodes)) {
        *out = cbn_value_retain(dst, *v);
        return CBN_OK;
    }
    const cbn_seq *from = v->u.seq;
    cbn_seq *to = seq_new(dst, from->count);
    if (!to) return cbn_fail_memory(err, "arguments", sizeof(cbn_seq) + (size_t)from->count * sizeof *v);
    for (uint32_t i = 0; i < from->count; i++) {
        const cbn_status st = cbn_value_map(dst, src, &from->v[i], map, arg, &to->v[i], err);
        if (st != CBN_OK) {
            undo_seq(dst, to, i);
            return st;
        }
    }
    to->cls = from->cls;
    if (to->cls) dst->host->retain(to->cls);
    *out = *v;
    out->u.seq = to;
    return CBN_OK;
}

typedef struct swap_arg {
    cbn_node_id old_id, new_id;
} swap_arg;

static bool is_not(cbn_node_id id, void *arg) { return id != *(const cbn_node_id *)arg; }

static cbn_node_id swapped(cbn_node_id id, void *arg) {
    const swap_arg *a = arg;
    return id == a->old_id ? a->new_id : id;
}

/* Sequences without old_id are shared with the original. */
cbn_status cbn_value_swap(cbn_graph *g, const cbn_value *v, cbn_node_id old_id, cbn_node_id new_id, cbn_value *out,
                          cbn_error *err) {
    swap_arg a = {old_id, new_id};
    if (v->tag == CBN_V_NODE || !v->has_nodes || cbn_value_each_node(v, is_not, &a.old_id)) {
        *out = v->tag == CBN_V_NODE ? cbn_value_node(swapped(v->u.node, &a)) : cbn_value_retain(g, *v);
        return CBN_OK;
    }
    return cbn_value_map(g, g, v, swapped, &a, out, err);
}

/* ---- equality ---------------------------------------------------------------------------------------------------- */
static bool same_text(const cbn_graph *ga, cbn_str a, const cbn_graph *gb, cbn_str b) {
    if (ga == gb) return a == b;
    size_t la, lb;
    const char *sa = cbn_graph_str(ga, a, &la), *sb = cbn_graph_str(gb, b, &lb);
    return la == lb && memcmp(sa, sb, la) == 0;
}

cbn_status cbn_value_equal(const cbn_graph *ga, const cbn_value *a, const cbn_graph *gb, const cbn_value *b, bool *out,
                           cbn_error *err) {
    *out = false;
    if (a->tag != b->tag) return CBN_OK;
    switch ((cbn_value_tag)a->tag) {
    case CBN_V_NONE: *out = true; return CBN_OK;
    case CBN_V_BOOL: *out = a->u.b == b->u.b; return CBN_OK;
    case CBN_V_INT: *out = a->u.i == b->u.i; return CBN_OK;
    case CBN_V_FLOAT: *out = memcmp(&a->u.f, &b->u.f, sizeof a->u.f) == 0; return CBN_OK;
    case CBN_V_STR: *out = same_text(ga, a->u.str, gb, b->u.str); return CBN_OK;
    case CBN_V_NODE: *out = a->u.node == b->u.node; return CBN_OK;
    case CBN_V_HOST:
        *out = a->u.host == b->u.host;
        return *out ? CBN_OK : ga->host->equal(a->u.host, b->u.host, out, err);
    case CBN_V_TUPLE:
    case CBN_V_LIST:
    case CBN_V_DICT:
    case CBN_V_SLICE: break;
    }
    const cbn_seq *sa = a->u.seq, *sb = b->u.seq;
    if (sa == sb) {
        *out = true;
        return CBN_OK;
    }
    if (sa->count != sb->count || sa->cls != sb->cls) return CBN_OK;
    for (uint32_t i = 0; i < sa->count; i++) {
        CBN_TRY(cbn_value_equal(ga, &sa->v[i], gb, &sb->v[i], out, err));
        if (!*out) return CBN_OK;
    }
    *out = true;
    return CBN_OK;
}
