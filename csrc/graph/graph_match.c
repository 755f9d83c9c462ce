/* SPDX-License-Identifier: BSD-3-Clause */
/* The search: candidates for each anchor, what makes a complete match good, the list of matches. */
#include "graph/graph_match_priv.h"

#include <string.h>

#include "base/cbn_alloc.h"

/* ---- is a complete match good? ----------------------------------------------------------------------------------- */

static bool node_is_outside(cbn_node_id id, void *arg) {
    const uint32_t claim = ((const cbn_matcher *)arg)->claim[id];
    return claim == CLAIM_FREE || claim == CLAIM_TAKEN;
}

static bool claimed(const cbn_matcher *m, cbn_node_id id) { return !node_is_outside(id, (void *)(uintptr_t)m); }

/* Does a value leave the match and come back in? Then nothing can take the match's place as one piece. Only nodes
 * that stand before the match's last node can lead back. */
static cbn_status comes_back(cbn_matcher *m, uint64_t last, bool *back, cbn_error *err) {
    uint32_t mark = 0;
    size_t head = 0, tail = 0;
    *back = false;
    for (uint32_t r = 0; r < m->p->nreturning; r++) {
        const cbn_value *v = &m->bound[m->p->returning[r]];
        if (v->tag != CBN_V_NODE || !claimed(m, v->u.node)) continue;
        const cbn_node *node = cbn_graph_node(m->g, v->u.node);
        if (node->order >= last) continue;
        for (uint32_t e = node->first_user; e != 0; e = cbn_graph_edge(m->g, e)->next_user) {
            const cbn_node_id user = cbn_graph_edge(m->g, e)->user;
            const cbn_node *un = cbn_graph_node(m->g, user);
            if (claimed(m, user) || un->order >= last) continue;
            if (mark == 0) {
                mark = cbn_graph_new_mark(m->g);
                if (m->queue == NULL) m->queue = cbn_alloc_array(cbn_graph_slots(m->g), sizeof *m->queue);
                if (m->queue == NULL) return cbn_fail_memory(err, "matching", cbn_graph_slots(m->g) * sizeof *m->queue);
            }
            if (un->mark == mark) continue;
            cbn_graph_set_mark(m->g, user, mark);
            m->queue[tail++] = user;
        }
    }
    while (head < tail) {
        const cbn_node *node = cbn_graph_node(m->g, m->queue[head++]);
        for (uint32_t e = node->first_user; e != 0; e = cbn_graph_edge(m->g, e)->next_user) {
            const cbn_node_id user = cbn_graph_edge(m->g, e)->user;
            const cbn_node *un = cbn_graph_node(m->g, user);
            if (claimed(m, user)) {
                *back = true;
                return CBN_OK;
            }
            if (un->mark == mark || un->order >= last) continue;
            cbn_graph_set_mark(m->g, user, mark);
            m->queue[tail++] = user;
        }
    }
    return CBN_OK;
}

static bool is_returned(const cbn_pattern *p, uint32_t pos) {
    const cbn_node *node = cbn_graph_node(p->graph, p->ids[pos]);
    for (uint32_t e = node->first_user; e != 0; e = cbn_graph_edge(p->graph, e)->next_user)
        if (cbn_graph_edge(p->graph, e)->user == p->output) return true;
    return false;
}

/* Nothing but returned values is used from outside, and no placeholder is bound to a part of the match. */
static cbn_status is_closed(cbn_matcher *m, bool *closed, cbn_error *err) {
    uint64_t last = 0;
    *closed = false;
    for (uint32_t i = 0; i < m->ntrail; i++) {
        const uint32_t pos = m->trail[i];
        const cbn_value *v = &m->bound[pos];
        if (cbn_graph_node(m->p->graph, m->p->ids[pos])->op == CBN_NODE_PLACEHOLDER) {
            if (!m->p->opt.match_placeholder && !cbn_value_each_node(v, node_is_outside, m)) return CBN_OK;
            continue;
        }
        const cbn_node *node = cbn_graph_node(m->g, v->u.node);
        if (node->order > last) last = node->order;
        if (is_returned(m->p, pos)) continue;
        for (uint32_t e = node->first_user; e != 0; e = cbn_graph_edge(m->g, e)->next_user)
            if (!claimed(m, cbn_graph_edge(m->g, e)->user)) return CBN_OK;
    }
    bool back;
    CBN_TRY(comes_back(m, last, &back, err));
    *closed = !back;
    return CBN_OK;
}

static cbn_status record(cbn_matcher *m, cbn_error *err) {
    cbn_match_list *l = m->out;
    const size_t n = l->width;
    if (l->count == l->capacity) {
        if (l->count > UINT32_MAX / 4) return cbn_fail(err, CBN_NO_MEMORY, "too many matches");
        const uint32_t more = l->capacity == 0 ? 16 : 2 * l->capacity;
        cbn_value *values = cbn_alloc_array((size_t)more * n, sizeof *values);
        uint32_t *order = cbn_alloc_array((size_t)more * n, sizeof *order);
        if (values == NULL || order == NULL) {
            cbn_free(values);
            cbn_free(order);
            return cbn_fail_memory(err, "the matches", (size_t)more * n * sizeof *values);
        }
        if (l->count > 0) {
            memcpy(values, l->values, l->count * n * sizeof *values);
            memcpy(order, l->order, l->count * n * sizeof *order);
        }
        cbn_free(l->values);
        cbn_free(l->order);
        l->values = values;
        l->order = order;
        l->capacity = more;
    }
    cbn_value *row = l->values + l->count * n;
    uint32_t *order = l->order + l->count * n;
    for (size_t i = 0; i < n; i++) {
        const bool is_bound = m->bound[i].tag != CBN_V_UNBOUND;
        row[i] = is_bound ? cbn_value_retain(m->g, m->bound[i]) : m->bound[i];
        order[i] = i < m->ntrail ? m->trail[i] : CBN_PATTERN_NONE;
    }
    l->count++;
    return CBN_OK;
}

/* Nodes of the match are taken: a later match must do without them. */
static void take(cbn_matcher *m) {
    for (uint32_t i = 0; i < m->ntrail; i++) {
        const uint32_t pos = m->trail[i];
        const uint8_t op = cbn_graph_node(m->p->graph, m->p->ids[pos])->op;
        if (op != CBN_NODE_PLACEHOLDER && op != CBN_NODE_OUTPUT) m->claim[m->bound[pos].u.node] = CLAIM_TAKEN;
    }
}

/* ---- candidates -------------------------------------------------------------------------------------------------- */

static cbn_status add_candidate(cbn_match_level *l, cbn_node_id id, cbn_error *err) {
    if (l->count == l->capacity) {
        void *data = l->list;
        size_t room = l->capacity;
        CBN_TRY(cbn_match_reserve(&data, &room, (size_t)l->count + 1, sizeof *l->list, err));
        l->list = data;
        l->capacity = (uint32_t)room;
    }
    l->list[l->count++] = id;
    return CBN_OK;
}

static void sort_by_order(const cbn_graph *g, cbn_node_id *ids, uint32_t count) {
    bool sorted = true;
    for (uint32_t i = 1; i < count && sorted; i++) sorted = cbn_node_before(g, ids[i - 1], ids[i]);
    if (sorted) return;
    /* heap sort: no scratch, no worst case, and qsort cannot be given the graph */
    for (uint32_t end = count, start = count / 2; end > 1;) {
        if (start > 0) {
            start--;
        } else {
            end--;
            const cbn_node_id top = ids[0];
            ids[0] = ids[end];
            ids[end] = top;
        }
        uint32_t root = start;
        for (uint32_t child; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && cbn_node_before(g, ids[child], ids[child + 1])) child++;
            if (!cbn_node_before(g, ids[root], ids[child])) break;
            const cbn_node_id up = ids[child];
            ids[child] = ids[root];
            ids[root] = up;
        }
    }
}

static bool first_node(cbn_node_id id, void *arg) {
    *(cbn_node_id *)arg = id;
    return false;
}

/* From the bound end of the anchor's route down through users, level by level. Each round of the list is replaced by
 * the next: the nodes found are appended, then moved to the front. */
static cbn_status follow_route(cbn_matcher *m, uint32_t k, cbn_match_level *l, cbn_node_id from, cbn_error *err) {
    const uint32_t *route = m->p->route + m->p->route_at[k];
    const uint32_t length = m->p->route_at[k + 1] - m->p->route_at[k];
    l->count = 0;
    CBN_TRY(add_candidate(l, from, err));
    for (uint32_t i = length - 1; i-- > 0;) {
        const uint32_t mark = cbn_graph_new_mark(m->g), width = l->count;
        for (uint32_t c = 0; c < width; c++) {
            for (uint32_t e = cbn_graph_node(m->g, l->list[c])->first_user; e != 0;) {
                const cbn_edge *edge = cbn_graph_edge(m->g, e);
                const cbn_node_id user = edge->user;
                e = edge->next_user;
                const cbn_node *node = cbn_graph_node(m->g, user);
                if (node->mark == mark || m->claim[user] != CLAIM_FREE) continue;
                bool same;
                CBN_TRY(cbn_match_poll(m, err));
                CBN_TRY(cbn_match_same_node(m, route[i], node, &same, err));
                if (!same) continue;
                cbn_graph_set_mark(m->g, user, mark);
                CBN_TRY(add_candidate(l, user, err));
            }
        }
        l->count -= width;
        memmove(l->list, l->list + width, l->count * sizeof *l->list);
    }
    sort_by_order(m->g, l->list, l->count);
    return CBN_OK;
}

static cbn_status whole_graph(cbn_matcher *m, uint32_t k, cbn_match_level *l, cbn_error *err) {
    if (l->whole) return CBN_OK;
    l->count = 0;
    for (cbn_node_id id = cbn_graph_first(m->g); id != 0; id = cbn_graph_next(m->g, id)) {
        bool same;
        CBN_TRY(cbn_match_same_node(m, m->p->anchors[k], cbn_graph_node(m->g, id), &same, err));
        if (same) CBN_TRY(add_candidate(l, id, err));
    }
    l->whole = true;
    return CBN_OK;
}

static cbn_status enter(cbn_matcher *m, uint32_t k, cbn_error *err) {
    cbn_match_level *l = &m->levels[k];
    l->next = 0;
    l->trail = m->ntrail;
    const uint32_t length = m->p->route_at[k + 1] - m->p->route_at[k];
    if (length > 0) {
        cbn_node_id from = 0;
        cbn_value_each_node(&m->bound[m->p->route[m->p->route_at[k + 1] - 1]], first_node, &from);
        if (from != 0) {
            l->whole = false;
            return follow_route(m, k, l, from, err);
        }
    }
    return whole_graph(m, k, l, err);
}

/* ---- the search -------------------------------------------------------------------------------------------------- */

/* All matches whose first anchor is bound already (levels 1 and up), or only the first when matches may not overlap:
 * every other one would share the first anchor. */
static cbn_status search_rest(cbn_matcher *m, cbn_error *err) {
    const uint32_t n = m->p->nanchors;
    uint32_t k = 1;
    if (k < n) CBN_TRY(enter(m, k, err));
    for (;;) {
        if (k == n) {
            bool closed;
            CBN_TRY(is_closed(m, &closed, err));
            if (closed) {
                CBN_TRY(record(m, err));
                if (!m->p->opt.keep_overlaps) {
                    take(m);
                    return CBN_OK;
                }
            }
            k--;
            if (k == 0) return CBN_OK;
        }
        cbn_match_level *l = &m->levels[k];
        cbn_match_take_back(m, l->trail);
        bool ok = false;
        while (!ok && l->next < l->count) {
            CBN_TRY(cbn_match_poll(m, err));
            CBN_TRY(cbn_match_try(m, k, l->list[l->next++], &ok, err));
        }
        if (ok) {
            if (++k < n) CBN_TRY(enter(m, k, err));
        } else if (--k == 0) {
            return CBN_OK;
        }
    }
}

static cbn_status search(cbn_matcher *m, cbn_error *err) {
    for (cbn_node_id id = cbn_graph_first(m->g); id != 0; id = cbn_graph_next(m->g, id)) {
        bool ok;
        CBN_TRY(cbn_match_poll(m, err));
        CBN_TRY(cbn_match_try(m, 0, id, &ok, err));
        if (!ok) continue;
        CBN_TRY(search_rest(m, err));
        cbn_match_take_back(m, 0);
    }
    return CBN_OK;
}

cbn_status cbn_graph_match(cbn_graph *g, const cbn_pattern *p, cbn_match_list *out, cbn_error *err) {
    cbn_matcher m = {.g = g, .p = p, .out = out};
    const size_t n = p->n, slots = cbn_graph_slots(g);
    cbn_status status = CBN_OK;
    *out = (cbn_match_list){.graph = g, .width = p->n};
    cbn_graph_lock(g);
    cbn_graph_lock(p->graph);
    m.target = cbn_alloc_array(n, sizeof *m.target);
    m.bound = cbn_alloc_array(n, sizeof *m.bound);
    m.trail = cbn_alloc_array(n, sizeof *m.trail);
    m.claim = cbn_calloc(slots * sizeof *m.claim);
    m.levels = cbn_calloc((size_t)p->nanchors * sizeof *m.levels);
    if (m.target == NULL || m.bound == NULL || m.trail == NULL || m.claim == NULL || m.levels == NULL) {
        status = cbn_fail_memory(err, "matching", slots * sizeof *m.claim);
        goto done;
    }
    for (size_t i = 0; i < n; i++) {
        const cbn_value *target = &cbn_graph_node(p->graph, p->ids[i])->target;
        size_t len = 0;
        const char *text = target->tag == CBN_V_STR ? cbn_graph_str(p->graph, target->u.str, &len) : NULL;
        m.target[i] = text != NULL ? cbn_graph_find_str(g, text, len) : CBN_STR_NONE;
        m.bound[i] = (cbn_value){.tag = CBN_V_UNBOUND};
    }
    status = search(&m, err);
done:
    for (uint32_t k = 0; m.levels != NULL && k < p->nanchors; k++) cbn_free(m.levels[k].list);
    cbn_free(m.target);
    cbn_free(m.bound);
    cbn_free(m.trail);
    cbn_free(m.claim);
    cbn_free(m.levels);
    cbn_free(m.stack);
    cbn_free(m.queue);
    cbn_graph_unlock(p->graph);
    cbn_graph_unlock(g);
    if (status != CBN_OK) cbn_match_list_free(out);
    return status;
}

void cbn_match_list_free(cbn_match_list *l) {
    for (size_t i = 0; i < (size_t)l->count * l->width; i++)
        if (l->values[i].tag != CBN_V_UNBOUND) cbn_value_release(l->graph, l->values[i]);
    cbn_free(l->values);
    cbn_free(l->order);
    *l = (cbn_match_list){.graph = l->graph};
}
