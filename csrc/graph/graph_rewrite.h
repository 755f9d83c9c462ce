/* SPDX-License-Identifier: BSD-3-Clause */
/* Putting a replacement in the place of a match. Rules in SEMANTICS "Rewriter". */
#ifndef CBN_GRAPH_REWRITE_H
#define CBN_GRAPH_REWRITE_H
#include "graph/graph_match.h"

/* One round of replacements: remembers what earlier ones replaced, so that later matches see the new values. */
typedef struct cbn_rewrite cbn_rewrite;

/* `p` and the matches of the round (made from g as it is now) must outlive it. root: g's owning module or NULL. */
CBN_NODISCARD cbn_status cbn_rewrite_begin(cbn_graph *g, const cbn_pattern *p, cbn_host root, cbn_rewrite **out,
                                           cbn_error *err);
void cbn_rewrite_end(cbn_rewrite *rw); /* NULL is fine */

/* Brings a row of a match list up to date: what its placeholders are bound to, with everything that earlier
 * replacements replaced, also inside lists, tuples, dicts and slices. CBN_BAD_STATE when a node of the match is gone.
 */
CBN_NODISCARD cbn_status cbn_rewrite_update(cbn_rewrite *rw, cbn_value *row, cbn_error *err);

/* What a replacement added, in the order of the list. */
typedef struct cbn_rewrite_result {
    uint32_t count, capacity;
    cbn_node_id *nodes;   /* new nodes */
    cbn_node_id *sources; /* their nodes in the replacement */
    cbn_host *metas;      /* metadata of the matched node whose role the new node has: one reference, or NULL */
    bool *returned;       /* its value takes the place of what that node returned */
} cbn_rewrite_result;
void cbn_rewrite_result_free(const cbn_graph *g, cbn_rewrite_result *r); /* may run host code: releases metas */

/* Replaces one match (a row brought up to date) by a copy of `replacement`, whose placeholders take, in order, what
 * the pattern's are bound to. The new nodes stand before the first user of what the match returned if every input is
 * defined there, else right after the last input; users in between move behind them in their order.
 *
 * Roles: a node whose value takes the place of a returned value has that node's metadata and shape; another new node
 * has those metadata (not the shape) of the only matched node with the same target.
 *
 * CBN_BAD_VALUE: numbers of placeholders or results differ, or a result cannot take the place of what the pattern
 * returns. CBN_BAD_STATE: the replacement would depend on itself, or a node would have to move past one that has side
 * effects. On failure the graph may be half changed: the caller holds a snapshot. Host code (resolve, module) may run
 * when nodes have to move, with g locked. *result is overwritten: its metas must have been released. */
CBN_NODISCARD cbn_status cbn_rewrite_apply(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *replacement,
                                           cbn_rewrite_result *result, cbn_error *err);
#endif
