/* SPDX-License-Identifier: BSD-3-Clause */
/* A graph as a list of steps over numbered slots, with the slots to free after each step: what a run loop executes. */
#ifndef CBN_GRAPH_EXEC_H
#define CBN_GRAPH_EXEC_H
#include "graph/graph.h"

#define CBN_SLOT_NONE UINT32_MAX

typedef struct cbn_step {
    cbn_node_id node;
    uint32_t slot;               /* where its value goes; the output has CBN_SLOT_NONE */
    uint32_t first_free, n_free; /* into cbn_program.frees: slots whose last use is this step, its own if nobody uses it */
} cbn_step;

typedef struct cbn_program {
    uint64_t version; /* of the graph when built */
    uint32_t nsteps, nslots, ninputs; /* ninputs: placeholders; nslots: most values alive at once */
    cbn_step *steps;  /* in graph order, up to the first output, placeholders among them */
    uint32_t *frees;
    uint32_t *slot_of; /* per node id; CBN_SLOT_NONE: no step */
    uint32_t nids;
} cbn_program;

/* CBN_BAD_STATE naming both nodes when a step uses the value of a later one. Nothing to free on failure. */
CBN_NODISCARD cbn_status cbn_program_build(const cbn_graph *g, cbn_program *out, cbn_error *err);
void cbn_program_free(cbn_program *p); /* zeroed is fine */
#endif
