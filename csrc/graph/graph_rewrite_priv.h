/* SPDX-License-Identifier: BSD-3-Clause */
/* State of a round of replacements, shared by graph_rewrite.c (the edit) and graph_rewrite_place.c (what goes where).
 */
#ifndef CBN_GRAPH_REWRITE_PRIV_H
#define CBN_GRAPH_REWRITE_PRIV_H
#include "graph/graph_rewrite.h"

/* Flags of nodes of g while one match is replaced: part of the match; its users take another value; has to move
 * behind the new nodes; new. */
enum { MATCHED = 1, SOURCE = 2, LATE = 4, FRESH = 8 };

/* A value that took another's place. */
typedef struct cbn_change {
    cbn_node_id id;
    uint32_t gen, to_gen; /* to_gen: of to's node */
    cbn_value to;         /* one reference */
} cbn_change;

/* One result of the pattern and what the replacement has in its place. */
typedef struct cbn_result_pair {
    uint32_t pos;
    const cbn_value *value; /* of the replacement's output */
    cbn_value to;           /* borrowed from replaced[] or owned (literals) */
    bool owned, same;       /* same: the pattern's input comes back as it is */
} cbn_result_pair;

struct cbn_rewrite {
    cbn_graph *g;
    const cbn_pattern *p;
    cbn_host root;
    uint32_t slots;   /* when the round began */
    uint32_t *gen;    /* [slots] generations then */
    uint32_t *changed; /* [slots] 1 + index of the change of the node that stood there then */
    cbn_change *changes;
    size_t nchanges, changes_room, nlists, nlate_keys; /* changes to lists; changes of nodes made in this round */
    uint8_t *flags;
    size_t flags_room;
    cbn_node_id *touched;
    size_t ntouched, touched_room;
    cbn_node_id *late;
    size_t nlate, late_room;
    cbn_value *replaced; /* node of the replacement -> value in g, borrowed */
    size_t replaced_room;
    cbn_result_pair *pairs;
    size_t npairs, pairs_room;
    cbn_value *values; /* arguments being built */
    size_t values_room;
};

/* Room for `need` items in the array whose address is given (a pointer to a pointer); new items are zero. */
CBN_NODISCARD cbn_status cbn_rewrite_reserve(void *array, size_t *room, size_t need, size_t item, cbn_error *err);
CBN_NODISCARD cbn_status cbn_rewrite_flag(cbn_rewrite *rw, cbn_node_id id, uint8_t bits, cbn_error *err);

/* rw->pairs: what the pattern returns with what the replacement returns. */
CBN_NODISCARD cbn_status cbn_rewrite_pair(cbn_rewrite *rw, const cbn_graph *rep, cbn_error *err);
/* With the pairs and rw->replaced[placeholders] set: flags nodes, finds where the new nodes go (*before; 0: at the
 * end) and which users have to move behind them (rw->late). Changes nothing. */
CBN_NODISCARD cbn_status cbn_rewrite_place(cbn_rewrite *rw, const cbn_value *row, const cbn_graph *rep,
                                           cbn_node_id *before, cbn_error *err);

CBN_INLINE bool cbn_is_placeholder(const cbn_graph *g, cbn_node_id id) {
    return cbn_graph_node(g, id)->op == CBN_NODE_PLACEHOLDER;
}
CBN_INLINE const char *cbn_rewrite_name(const cbn_graph *g, cbn_node_id id) {
    return cbn_graph_str(g, cbn_graph_node(g, id)->name, NULL);
}
#endif
