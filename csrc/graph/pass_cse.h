/* SPDX-License-Identifier: BSD-3-Clause */
/* Inside the elimination of common subexpressions: what a node computes (pass_cse_key.c), what becomes of it
 * (pass_cse.c). */
#ifndef CBN_PASS_CSE_H
#define CBN_PASS_CSE_H
#include "graph/conv_bn_pair.h"
#include "graph/passes.h"
#include "graph/value_hash.h"

/* What one call computes, read once. */
typedef struct cbn_cse_key {
    cbn_node_id id;
    uint64_t hash;
    bool bound_ok;  /* an operator of the table: `bound` */
    bool layer;     /* a module of known kind called as (input[, output_size]): `call` */
    bool opaque;    /* it may do anything to what it is given */
    uint8_t reason; /* CBN_FREEZE_OK, or why no two such calls can be one */
    const char *hint;
    cbn_bound bound;
    cbn_module_call call;
} cbn_cse_key;

typedef struct cbn_cse {
    cbn_freeze *f;
    cbn_graph *g;
    const cbn_cse_host *host;
    cbn_effects *effects;
    cbn_value_keys keys;
    cbn_node_id *same;   /* by node id: the node that it counts as (of get_attr nodes the first that reads the object) */
    cbn_node_id *into;   /* by node id: the node that it was merged into, 0: none */
    cbn_host *object;    /* by node id: what a get_attr or call_module node names, NULL: not found */
    bool *holds_objects; /* by node id: its value may be, or lead to, a module or another object that is no array */
    cbn_node_id barrier; /* the last node that may have changed such objects, 0: none */
    cbn_node_id by_identity; /* a node that asks whether two values are one object, 0: none */
} cbn_cse;

/* Finds the object that a get_attr node names, and whether it is something else than an array. */
CBN_NODISCARD cbn_status cbn_cse_read_attr(cbn_cse *c, cbn_node_id id);
/* For call_function, call_method and call_module. */
CBN_NODISCARD cbn_status cbn_cse_read_call(cbn_cse *c, cbn_node_id id, cbn_cse_key *out);
/* Does an earlier node compute the same? */
bool cbn_cse_same(const cbn_cse *c, const cbn_cse_key *key, cbn_node_id earlier);
#endif
