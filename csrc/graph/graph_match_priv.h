/* SPDX-License-Identifier: BSD-3-Clause */
/* State of a search, shared by graph_match.c (the search) and graph_match_node.c (one try). */
#ifndef CBN_GRAPH_MATCH_PRIV_H
#define CBN_GRAPH_MATCH_PRIV_H
#include "graph/graph_match.h"

enum {
    CLAIM_FREE = 0,           /* else position + 1 of the pattern's node */
    CLAIM_TAKEN = UINT32_MAX, /* part of an earlier match */
    POLL_EVERY = 4096
};

typedef struct cbn_match_pair {
    cbn_value p, t;
    bool strict; /* an index: [0, 1] and (0, 1) are different things */
} cbn_match_pair;

/* Where the search stands with one anchor. */
typedef struct cbn_match_level {
    cbn_node_id *list; /* candidates; level 0 walks the graph instead */
    uint32_t count, capacity, next, trail;
    bool whole; /* list holds the candidates of the whole graph: made once */
} cbn_match_level;

typedef struct cbn_matcher {
    cbn_graph *g;
    const cbn_pattern *p;
    cbn_match_list *out;
    cbn_str *target;  /* [n] target of the pattern's node as a string of g, CBN_STR_NONE: g has no such string */
    cbn_value *bound; /* [n] borrowed from nodes of g; CBN_V_UNBOUND */
    uint32_t *trail, ntrail;
    uint32_t *claim; /* [slots of g] */
    cbn_match_pair *stack;
    size_t nstack, stack_room;
    cbn_match_level *levels;
    cbn_node_id *queue; /* of the search for ways out and back in; made when needed */
    uint32_t steps;
} cbn_matcher;

/* Room for `need` items in *data; the first *room are kept. */
CBN_NODISCARD cbn_status cbn_match_reserve(void **data, size_t *room, size_t need, size_t item, cbn_error *err);
/* To be called in every loop that may be long. */
CBN_NODISCARD cbn_status cbn_match_poll(cbn_matcher *m, cbn_error *err);
/* Same kind of node with the same target? Arguments are not looked at. */
CBN_NODISCARD cbn_status cbn_match_same_node(const cbn_matcher *m, uint32_t pos, const cbn_node *tn, bool *same,
                                             cbn_error *err);
/* Binds anchor k to the candidate and everything that follows from it; *ok false: nothing is bound. */
CBN_NODISCARD cbn_status cbn_match_try(cbn_matcher *m, uint32_t k, cbn_node_id candidate, bool *ok, cbn_error *err);
/* Unbinds what was bound since the trail had this length. */
void cbn_match_take_back(cbn_matcher *m, uint32_t trail);
#endif
