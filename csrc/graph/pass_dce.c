/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/passes.h"

/* cbn_graph_dce cannot see modules: whether a call of one must stay is asked here, with the owning module at hand.
 * f: gets a row for each call that goes, the last one of the graph first; NULL: nobody asks. */
static cbn_status sweep(cbn_graph *g, cbn_host root, cbn_graph_iter *it, cbn_freeze *f, uint32_t *removed,
                        cbn_error *err) {
    cbn_node_id id;
    while ((id = cbn_graph_iter_next(it)) != 0) {
        if (cbn_graph_node(g, id)->n_users != 0) continue;
        bool impure = true;
        cbn_graph_lock(g); /* host code may run */
        const cbn_status status = cbn_node_impure(g, id, root, &impure, err);
        cbn_graph_unlock(g);
        if (status != CBN_OK) return status;
        if (impure) continue;
        if (f != NULL && cbn_graph_node(g, id)->op != CBN_NODE_GET_ATTR) {
            CBN_TRY(cbn_freeze_done(f, CBN_STEP_DEAD, id, CBN_STR_NONE));
        }
        CBN_TRY(cbn_graph_erase(g, id, err));
        (*removed)++;
    }
    return CBN_OK;
}

cbn_status cbn_pass_dce(cbn_graph *g, cbn_host root, uint32_t *removed, cbn_error *err) {
    *removed = 0;
    cbn_graph_snapshot *snapshot;
    CBN_TRY(cbn_graph_snapshot_take(g, &snapshot, err));
    cbn_graph_iter it = {0};
    cbn_graph_iter_begin(g, true, &it);
    const cbn_status status = sweep(g, root, &it, NULL, removed, err);
    cbn_graph_iter_end(&it);
    if (status == CBN_OK) {
        cbn_graph_snapshot_drop(g, snapshot);
    } else {
        *removed = 0;
        cbn_graph_snapshot_restore(g, snapshot);
    }
    return status;
}

cbn_status cbn_pass_dead(cbn_freeze *f) {
    uint32_t removed = 0;
    cbn_graph_iter it = {0};
    cbn_graph_iter_begin(f->g, true, &it);
    const cbn_status status = sweep(f->g, f->root, &it, f, &removed, f->err);
    cbn_graph_iter_end(&it);
    cbn_freeze_row *const rows = f->report.rows;
    for (uint32_t i = 0, j = f->report.count; i + 1 < j; i++) { /* in the order of the graph */
        const cbn_freeze_row row = rows[--j];
        rows[j] = rows[i];
        rows[i] = row;
    }
    return status;
}
