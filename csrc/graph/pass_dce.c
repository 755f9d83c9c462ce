/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/passes.h"

/* Must this node stay though nobody uses its value? As cbn_node_impure says, and besides whatever nobody knows: a
 * callable or a module that is not in the tables may write what it is given, or memory of its own. */
static cbn_status stays(cbn_graph *g, cbn_node_id id, cbn_host root, bool *out, cbn_error *err) {
    CBN_TRY(cbn_node_impure(g, id, root, out, err));
    const cbn_node *node = cbn_graph_node(g, id);
    if (*out || node->op == CBN_NODE_GET_ATTR) return CBN_OK;
    if (node->op != CBN_NODE_CALL_MODULE) {
        *out = node->opcode == 0;
        return CBN_OK;
    }
    if (root == NULL || node->target.tag != CBN_V_STR) return CBN_OK;
    const cbn_host_vtable *host = cbn_graph_host(g);
    cbn_host module;
    CBN_TRY(host->resolve(root, cbn_graph_str(g, node->target.u.str, NULL), &module, err));
    if (module == NULL) return CBN_OK;
    cbn_module_info info;
    CBN_TRY(host->module(module, &info, err));
    *out = !info.pure;
    return CBN_OK;
}

/* cbn_graph_dce cannot see modules: whether a call of one must stay is asked here, with the owning module at hand.
 * f: gets a row for each call that goes, the last one of the graph first; NULL: nobody asks. */
static cbn_status sweep(cbn_graph *g, cbn_host root, bool keep_unknown, cbn_graph_iter *it, cbn_freeze *f,
                        uint32_t *removed, cbn_error *err) {
    cbn_node_id id;
    while ((id = cbn_graph_iter_next(it)) != 0) {
        if (cbn_graph_node(g, id)->n_users != 0) continue;
        bool impure = true;
        cbn_graph_lock(g); /* host code may run */
        const cbn_status status =
            keep_unknown ? stays(g, id, root, &impure, err) : cbn_node_impure(g, id, root, &impure, err);
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

cbn_status cbn_pass_dce(cbn_graph *g, cbn_host root, bool keep_unknown, uint32_t *removed, cbn_error *err) {
    *removed = 0;
    cbn_graph_snapshot *snapshot;
    CBN_TRY(cbn_graph_snapshot_take(g, &snapshot, err));
    cbn_graph_iter it = {0};
    cbn_graph_iter_begin(g, true, &it);
    const cbn_status status = sweep(g, root, keep_unknown, &it, NULL, removed, err);
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
    const cbn_status status = sweep(f->g, f->root, true, &it, f, &removed, f->err);
    cbn_graph_iter_end(&it);
    cbn_freeze_row *const rows = f->report.rows;
    for (uint32_t i = 0, j = f->report.count; i + 1 < j; i++) { /* in the order of the graph */
        const cbn_freeze_row row = rows[--j];
        rows[j] = rows[i];
        rows[i] = row;
    }
    return status;
}
