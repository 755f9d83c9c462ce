/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/conv_bn_pair.h"

cbn_status cbn_pass_fuse_plan(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report, cbn_error *err) {
    *report = (cbn_fold_report){0};
    cbn_pair_list pairs;
    cbn_status status = cbn_pairs_find(g, host, CBN_PAIR_FOLD, &pairs, err);
    if (status == CBN_OK) status = cbn_pairs_report(g, &pairs, CBN_OUTCOME_FOLDED, report, err);
    cbn_pairs_free(&pairs);
    return status;
}
