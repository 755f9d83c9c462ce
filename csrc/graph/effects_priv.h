/* SPDX-License-Identifier: BSD-3-Clause */
/* Inside the effects analysis: elements, classes, writers. */
#ifndef CBN_EFFECTS_PRIV_H
#define CBN_EFFECTS_PRIV_H
#include "graph/effects.h"

/* A growing array of 32-bit numbers. */
typedef struct cbn_u32s {
    uint32_t *v;
    uint32_t n, room;
} cbn_u32s;
CBN_NODISCARD cbn_status cbn_u32s_push(cbn_u32s *a, uint32_t value, cbn_error *err);

/* Memory [lo, hi) that an element has. */
typedef struct cbn_interval {
    uintptr_t lo, hi;
    uint32_t element;
} cbn_interval;

/* An element is a node's value (its id) or, from `anything` on, an array met as a constant or in a module. While
 * building,
 * `parent` is a union-find forest over elements; afterwards parent.v[id] is each node's class, `anything` and the
 * ranges'
 * elements are classes too. */
struct cbn_effects {
    cbn_graph *g;
    uint32_t anything; /* memory nobody could look at */
    bool no_root;
    bool unknown;      /* some node's memory is `anything`: then all arrays are */
    cbn_u32s parent;
    cbn_u32s gens; /* each node's generation + 1 when it was looked at; 0: not seen */
    cbn_interval *ranges; /* sorted and disjoint once built */
    uint32_t nranges, range_room;
    cbn_u32s written, writer; /* pairs (element, node), in list order */
    cbn_u32s returned;        /* elements that the output has; once built: for each class what _returned_by says */
    cbn_u32s outside;         /* elements that others have too; once built: for each class, is it */
    cbn_u32s lists;           /* for each node how many lists deep its arrays may be, as far as it shows; 0: an array */
    const cbn_host *inputs;   /* arrays of the first placeholders */
    uint32_t ninputs, next_input;
    cbn_u32s first, by_class; /* writers of class c: by_class.v[first.v[c] .. first.v[c + 1]) */
};

uint32_t cbn_effects_find(cbn_effects *e, uint32_t element);
void cbn_effects_join(cbn_effects *e, uint32_t a, uint32_t b);
/* A new element with the memory of an array. */
CBN_NODISCARD cbn_status cbn_effects_add_array(cbn_effects *e, cbn_host array, uint32_t joined_with, bool *is_array,
                                               uint32_t *element, cbn_error *err);
CBN_NODISCARD cbn_status cbn_effects_mark(cbn_effects *e, uint32_t element, cbn_node_id node, cbn_error *err);
/* The output has this element. */
CBN_NODISCARD cbn_status cbn_effects_return(cbn_effects *e, uint32_t element, cbn_error *err);
/* Somebody outside the graph may have this element. */
CBN_NODISCARD cbn_status cbn_effects_share(cbn_effects *e, uint32_t element, cbn_error *err);
/* What one node writes and views: effects_node.c. */
CBN_NODISCARD cbn_status cbn_effects_node(cbn_effects *e, cbn_node_id id, cbn_host root, cbn_error *err);
#endif
