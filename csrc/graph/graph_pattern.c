/* SPDX-License-Identifier: BSD-3-Clause */
/* Making a pattern ready: which nodes take part, where matching starts, how one anchor leads to the next. */
#include "graph/graph_match.h"

#include <string.h>

#include "base/cbn_alloc.h"

static cbn_status allocate(cbn_pattern *p, uint32_t slots, cbn_error *err) {
    const size_t n = (size_t)cbn_graph_count(p->graph) + 1;
    p->ids = cbn_alloc_array(n, sizeof *p->ids);
    p->index = cbn_alloc_array(slots, sizeof *p->index);
    p->placeholders = cbn_alloc_array(n, sizeof *p->placeholders);
    p->anchors = cbn_alloc_array(n, sizeof *p->anchors);
    p->returning = cbn_alloc_array(n, sizeof *p->returning);
    p->route_at = cbn_calloc((n + 1) * sizeof *p->route_at);
    if (p->ids == NULL || p->index == NULL || p->placeholders == NULL || p->anchors == NULL || p->returning == NULL ||
        p->route_at == NULL)
        return cbn_fail_memory(err, "a pattern", n * 5 * sizeof(uint32_t));
    return CBN_OK;
}

/* Marks with `mark` everything that `start` depends on, itself included, using `stack` (room for every node). */
static void mark_upstream(cbn_graph *g, cbn_node_id start, uint32_t mark, cbn_node_id *stack) {
    if (cbn_graph_node(g, start)->mark == mark) return;
    size_t top = 0;
    stack[top++] = start;
    cbn_graph_set_mark(g, start, mark);
    while (top > 0) {
        const cbn_node *node = cbn_graph_node(g, stack[--top]);
        for (uint32_t e = node->first_input; e != 0; e = cbn_graph_edge(g, e)->next_input) {
            const cbn_node_id in = cbn_graph_edge(g, e)->producer;
            if (cbn_graph_node(g, in)->mark == mark) continue;
            cbn_graph_set_mark(g, in, mark);
            stack[top++] = in;
        }
    }
}

static const char *name_of(const cbn_graph *g, cbn_node_id id) {
    return cbn_graph_str(g, cbn_graph_node(g, id)->name, NULL);
}

static cbn_status collect(cbn_pattern *p, cbn_node_id *stack, cbn_error *err) {
    cbn_graph *g = p->graph;
    const uint32_t mark = cbn_graph_new_mark(g);
    mark_upstream(g, p->output, mark, stack);
    uint32_t work = 0;
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const cbn_node *node = cbn_graph_node(g, id);
        if (id == p->output && !p->opt.match_output) continue;
        if (node->op == CBN_NODE_PLACEHOLDER) {
            p->placeholders[p->nplaceholders++] = p->n;
        } else {
            if (node->mark != mark)
                return cbn_fail(err, CBN_BAD_VALUE,
                                "pattern: node '%s' is dead code: nothing that the pattern returns depends on it",
                                name_of(g, id));
            work += id != p->output;
        }
        p->index[id] = p->n;
        p->ids[p->n++] = id;
    }
    if (work == 0 && !p->opt.match_output)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "pattern: expected at least one operation, got a graph that only returns its placeholders: it "
                        "would match everything");
    return CBN_OK;
}

static cbn_status find_anchors(cbn_pattern *p, cbn_error *err) {
    cbn_graph *g = p->graph;
    const cbn_node *output = cbn_graph_node(g, p->output);
    if (p->opt.match_output) p->anchors[p->nanchors++] = p->index[p->output];
    for (uint32_t e = output->first_input; e != 0; e = cbn_graph_edge(g, e)->next_input) {
        const cbn_node_id in = cbn_graph_edge(g, e)->producer;
        const cbn_node *node = cbn_graph_node(g, in);
        p->returning[p->nreturning++] = p->index[in];
        if (p->opt.match_output || node->n_users != 1) continue;
        if (node->op == CBN_NODE_PLACEHOLDER && !p->opt.match_placeholder)
            return cbn_fail(err, CBN_BAD_VALUE,
                            "pattern: placeholder '%s' is returned and used by nothing else: it would match everything",
                            name_of(g, in));
        p->anchors[p->nanchors++] = p->index[in];
    }
    if (p->nanchors == 0)
        return cbn_fail(err, CBN_BAD_VALUE,
                        "pattern: expected an output that returns a node, got one that returns none");
    return CBN_OK;
}

/* Shortest way from each further anchor up to a node that an earlier anchor binds: breadth first, where came[x] is
 * the user through which x was reached. */
static cbn_status find_routes(cbn_pattern *p, cbn_node_id *queue, cbn_error *err) {
    cbn_graph *g = p->graph;
    if (p->nanchors < 2) return CBN_OK;
    const uint32_t slots = cbn_graph_slots(g);
    const uint32_t bound = cbn_graph_new_mark(g);
    cbn_node_id *came = cbn_alloc_array(slots, sizeof *came);
    uint32_t *seen = cbn_calloc((size_t)slots * sizeof *seen);
    cbn_node_id *stack = cbn_alloc_array(slots, sizeof *stack);
    uint32_t used = 0, room = 0;
    cbn_status status = CBN_OK;
    if (came == NULL || seen == NULL || stack == NULL) {
        status = cbn_fail_memory(err, "a pattern", slots * sizeof(uint32_t));
        goto done;
    }
    mark_upstream(g, p->ids[p->anchors[0]], bound, stack);
    for (uint32_t k = 1; k < p->nanchors; k++) {
        const cbn_node_id anchor = p->ids[p->anchors[k]];
        cbn_node_id end = 0;
        uint32_t head = 0, tail = 0;
        queue[tail++] = anchor;
        seen[anchor] = k;
        while (head < tail && end == 0) {
            const cbn_node_id at = queue[head++];
            const cbn_node *node = cbn_graph_node(g, at);
            for (uint32_t e = node->first_input; e != 0; e = cbn_graph_edge(g, e)->next_input) {
                const cbn_node_id in = cbn_graph_edge(g, e)->producer;
                if (seen[in] == k) continue;
                seen[in] = k;
                came[in] = at;
                queue[tail++] = in;
                if (cbn_graph_node(g, in)->mark == bound) {
                    end = in;
                    break;
                }
            }
        }
        p->route_at[k] = used;
        if (end != 0) {
            uint32_t length = 1;
            for (cbn_node_id x = end; x != anchor; x = came[x]) length++;
            if (used + length > room) {
                const uint32_t more = 2 * (used + length);
                uint32_t *wider = cbn_alloc_array(more, sizeof *wider);
                if (wider == NULL) {
                    status = cbn_fail_memory(err, "a pattern", more * sizeof *wider);
                    goto done;
                }
                if (used > 0) memcpy(wider, p->route, used * sizeof *wider);
                cbn_free(p->route);
                p->route = wider;
                room = more;
            }
            cbn_node_id x = end;
            for (uint32_t i = length; i-- > 0; x = i > 0 ? came[x] : x) p->route[used + i] = p->index[x];
            used += length;
        }
        p->route_at[k + 1] = used;
        mark_upstream(g, anchor, bound, stack);
    }
done:
    cbn_free(came);
    cbn_free(seen);
    cbn_free(stack);
    return status;
}

cbn_status cbn_pattern_new(cbn_graph *graph, const cbn_match_options *opt, cbn_pattern **out, cbn_error *err) {
    *out = NULL;
    const cbn_node_id output = cbn_graph_output(graph);
    if (cbn_graph_count(graph) == 0) return cbn_fail(err, CBN_BAD_VALUE, "pattern: expected nodes, got an empty graph");
    if (output == 0) return cbn_fail(err, CBN_BAD_VALUE, "pattern: expected a graph with an output node, got none");
    if (cbn_graph_node(graph, output)->n_users > 0)
        return cbn_fail(err, CBN_BAD_VALUE, "pattern: the output node is used by another node");

    cbn_pattern *p = cbn_calloc(sizeof *p);
    if (p == NULL) return cbn_fail_memory(err, "a pattern", sizeof *p);
    p->graph = graph;
    cbn_graph_retain(graph);
    p->opt = *opt;
    p->output = output;
    const uint32_t slots = cbn_graph_slots(graph);
    cbn_node_id *stack = cbn_alloc_array(slots, sizeof *stack);
    cbn_status status = stack == NULL ? cbn_fail_memory(err, "a pattern", slots * sizeof *stack)
                                      : allocate(p, slots, err);
    if (status == CBN_OK) {
        for (uint32_t i = 0; i < slots; i++) p->index[i] = CBN_PATTERN_NONE;
        status = collect(p, stack, err);
    }
    if (status == CBN_OK) status = find_anchors(p, err);
    if (status == CBN_OK) status = find_routes(p, stack, err);
    cbn_free(stack);
    if (status == CBN_OK) *out = p;
    else cbn_pattern_free(p);
    return status;
}

void cbn_pattern_free(cbn_pattern *p) {
    if (p == NULL) return;
    cbn_free(p->ids);
    cbn_free(p->index);
    cbn_free(p->placeholders);
    cbn_free(p->anchors);
    cbn_free(p->returning);
    cbn_free(p->route);
    cbn_free(p->route_at);
    cbn_graph_release(p->graph);
    cbn_free(p);
}
