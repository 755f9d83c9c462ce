/* SPDX-License-Identifier: BSD-3-Clause */
/* Finding a small graph inside a larger one. Rules in SEMANTICS "Rewriter".
 *
 * A pattern is a graph: its placeholders stand for anything (a node, a literal, a list of nodes), its other nodes for
 * nodes of the same kind, and what its output returns may be used from outside a match, nothing else. Matching starts
 * at the pattern's anchors, the returned nodes that nothing else in the pattern uses, and goes from users to inputs,
 * where every step has one way to go; so only the anchors need candidates. Further anchors take theirs from the users
 * of what is bound already, when a chain of users leads there, which keeps ordinary patterns linear in the size of
 * the graph. */
#ifndef CBN_GRAPH_MATCH_H
#define CBN_GRAPH_MATCH_H
#include "graph/op_table.h"

typedef struct cbn_match_options {
    bool ignore_literals;
    bool match_output;      /* the pattern's output node is matched too */
    bool match_placeholder; /* placeholders match placeholders only */
    bool keep_overlaps;     /* do not drop matches that share nodes with an earlier one */
    cbn_host root, pattern_root; /* owning modules or NULL: constants met while tracing are compared by value */
    cbn_status (*same_array)(cbn_host a, cbn_host b, bool *same); /* for these constants; NULL: by identity */
    /* Called now and then while searching (may run host code); a failure ends the search. May be NULL. */
    cbn_status (*poll)(void *arg);
    void *poll_arg;
} cbn_match_options;

enum { CBN_PATTERN_NONE = UINT32_MAX };

/* A pattern made ready. Its graph must not change while this is in use. Positions count the nodes that take part, in
 * list order: all but the output node, and that too with match_output. */
typedef struct cbn_pattern {
    cbn_graph *graph; /* one reference */
    cbn_match_options opt;
    cbn_node_id output;
    uint32_t n;
    cbn_node_id *ids; /* [n] position -> node of the pattern */
    uint32_t *index;  /* [slots] node -> position, or CBN_PATTERN_NONE */
    uint32_t nplaceholders, nanchors, nreturning;
    uint32_t *placeholders, *anchors, *returning; /* positions */
    /* How to find candidates of anchor k >= 1: route[route_at[k]] is the anchor, each entry an input of the one
     * before it, and the last one is bound by an earlier anchor. Length 0: no such chain. */
    uint32_t *route, *route_at; /* route_at has nanchors + 1 entries */
} cbn_pattern;

/* CBN_BAD_VALUE: an empty pattern, one without an output, one that returns nothing or only its placeholders, a returned
 * placeholder that nothing else uses, dead code. */
CBN_NODISCARD cbn_status cbn_pattern_new(cbn_graph *graph, const cbn_match_options *opt, cbn_pattern **out,
                                         cbn_error *err);
void cbn_pattern_free(cbn_pattern *p); /* NULL is fine */

/* Tag of a position that is bound to nothing: a placeholder nobody uses. */
enum { CBN_V_UNBOUND = 255 };

/* Matches in the order of the target's nodes. Row i has p->n values: what each position is bound to (one reference
 * each), a NODE for everything but placeholders; and the positions in the order in which they were bound. */
typedef struct cbn_match_list {
    cbn_graph *graph; /* borrowed */
    uint32_t count, capacity, width;
    cbn_value *values;
    uint32_t *order; /* rows of `width`; CBN_PATTERN_NONE fills up a row with unbound positions */
} cbn_match_list;

/* Every match of `p` in `g`. Host code (equal, poll) may run: both graphs are locked meanwhile. */
CBN_NODISCARD cbn_status cbn_graph_match(cbn_graph *g, const cbn_pattern *p, cbn_match_list *out, cbn_error *err);
void cbn_match_list_free(cbn_match_list *l); /* zero-initialised is fine */
#endif
