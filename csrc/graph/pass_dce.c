/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/passes.h"

/* cbn_graph_dce cannot see modules: whether a call of one must stay is asked here, with the owning module at hand. */
static cbn_status sweep(cbn_graph *g, cbn_host root, cbn_graph_iter *it, uint32_t *removed, cbn_error *err) {
    cbn_node_id id;
    while ((id = cbn_graph_iter_next(it)) != 0) {
        if (cbn_graph_node(g, id)->n_users != 0) continue;
        bool impure = true;
        cbn_graph_lock(g); /* host code may run */
        const cbn_status status = cbn_node_impure(g, id, root, &impure, err);
        cbn_graph_unlock(g);
        if (status != CBN_OK) return status;
        if (impure) continue;
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
    const cbn_status status = sweep(g, root, &it, removed, err);
    cbn_graph_iter_end(&it);
    if (status == CBN_OK) {
        cbn_graph_snapshot_drop(g, snapshot);
    } else {
        *removed = 0;
        cbn_graph_snapshot_restore(g, snapshot);
    }
    return status;
}
