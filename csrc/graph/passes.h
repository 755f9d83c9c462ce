/* SPDX-License-Identifier: BSD-3-Clause */
/* The passes, one per pass_<name>.c. A failed pass leaves the graph as it was (snapshot). */
#ifndef CBN_PASSES_H
#define CBN_PASSES_H
#include "graph/effects.h"
#include "graph/fold_report.h"

/* What a pass needs from the host beside the graph. Handles are borrowed. */
typedef struct cbn_pass_host {
    cbn_host root;           /* owning module; NULL: module targets and get_attr cannot be resolved */
    cbn_host efficient;      /* callable of inserted nodes: efficient_conv_bn_eval */
    cbn_host decomposed;     /* efficient_conv_bn_eval_decomposed */
    const char *const *skip; /* names or glob patterns (* and ?) of nodes or module targets to leave alone */
    int nskip;
    bool caller_restores; /* the caller has a snapshot and goes back to it when anything fails: the pass takes none */
    cbn_node_id only; /* this node alone, if it is a BatchNorm; 0: the whole graph */
    /* Are the scales gamma/sqrt(var + eps) finite in the dtype of `weight`, and the shifts finite? bn: gamma, beta,
     * mean, var, the first two may be NULL. NULL function: not asked. Host code may run. */
    cbn_status (*finite)(const cbn_host bn[4], double eps, cbn_host weight, bool *out, cbn_error *err);
} cbn_pass_host;

/* Fuses conv -> BatchNorm into one call that reads the parameters at run time (SEMANTICS: "The pass"); three forms. */
CBN_NODISCARD cbn_status cbn_pass_efficient(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report,
                                            cbn_error *err);
/* Decides which pairs can have the BatchNorm folded into the weights; changes nothing. Rows with outcome FOLDED are the
 * pairs to fold; the host makes the weights and then edits the graph. */
CBN_NODISCARD cbn_status cbn_pass_fuse_plan(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report,
                                            cbn_error *err);
/* Dead code: removes nodes without users, last to first, that cbn_node_impure does not protect. */
CBN_NODISCARD cbn_status cbn_pass_dce(cbn_graph *g, cbn_host root, uint32_t *removed, cbn_error *err);
#endif
