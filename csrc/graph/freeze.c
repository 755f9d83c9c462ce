/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/freeze.h"

#include <string.h>

#include "base/cbn_alloc.h"

const char *cbn_freeze_step_name(int step) {
    static const char *const names[] = {
#define STEP_NAME_(s, name) [CBN_STEP_##s] = name,
        CBN_FREEZE_STEPS(STEP_NAME_)
#undef STEP_NAME_
    };
    return names[step];
}

const char *cbn_freeze_reason_name(int reason) {
    static const char *const names[] = {
#define REASON_NAME_(code, hint) [CBN_FREEZE_##code] = #code,
        CBN_FREEZE_REASONS(REASON_NAME_)
#undef REASON_NAME_
    };
    return names[reason];
}

const char *cbn_freeze_reason_hint(int reason) {
    static const char *const hints[] = {
#define REASON_HINT_(code, hint) [CBN_FREEZE_##code] = hint,
        CBN_FREEZE_REASONS(REASON_HINT_)
#undef REASON_HINT_
    };
    return hints[reason];
}

void cbn_freeze_report_free(cbn_freeze_report *r) {
    cbn_free(r->rows);
    *r = (cbn_freeze_report){0};
}

static cbn_status add(cbn_freeze *f, const cbn_freeze_row *row) {
    cbn_freeze_report *r = &f->report;
    if (r->count == r->room) {
        const uint32_t room = r->room == 0 ? 32 : r->room * 2;
        cbn_freeze_row *larger = cbn_alloc_array(room, sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(f->err, "a freeze report", room * sizeof *larger);
        if (r->count > 0) memcpy(larger, r->rows, r->count * sizeof *larger);
        cbn_free(r->rows);
        r->rows = larger;
        r->room = room;
    }
    r->rows[r->count++] = *row;
    return CBN_OK;
}

cbn_status cbn_freeze_done(cbn_freeze *f, cbn_freeze_step step, cbn_node_id node, cbn_str into) {
    f->changed++;
    return add(f, &(cbn_freeze_row){.step = (uint8_t)step,
                                    .reason = CBN_FREEZE_OK,
                                    .node = cbn_graph_node(f->g, node)->name,
                                    .blocking = CBN_STR_NONE,
                                    .into = into});
}

cbn_status cbn_freeze_keep(cbn_freeze *f, cbn_freeze_step step, cbn_freeze_reason reason, cbn_node_id node,
                           cbn_node_id blocking, const char *hint) {
    return add(f, &(cbn_freeze_row){.step = (uint8_t)step,
                                    .reason = (uint8_t)reason,
                                    .node = cbn_graph_node(f->g, node)->name,
                                    .blocking = blocking == 0 ? CBN_STR_NONE : cbn_graph_node(f->g, blocking)->name,
                                    .into = CBN_STR_NONE,
                                    .hint = hint});
}

cbn_status cbn_freeze_resolve(const cbn_freeze *f, cbn_node_id node, cbn_host *out) {
    const cbn_value *target = &cbn_graph_node(f->g, node)->target;
    *out = NULL;
    if (f->root == NULL || target->tag != CBN_V_STR) return CBN_OK;
    cbn_graph_lock(f->g);
    const char *path = cbn_graph_str(f->g, target->u.str, NULL);
    const cbn_status status = cbn_graph_host(f->g)->resolve(f->root, path, out, f->err);
    cbn_graph_unlock(f->g);
    return status;
}

bool cbn_is_as_strided(cbn_opcode opcode) {
    return opcode == CBN_OP_ATEN_AS_STRIDED_DEFAULT || opcode == CBN_OP_ATEN_AS_STRIDED__DEFAULT ||
           opcode == CBN_OP_ATEN_AS_STRIDED_SCATTER_DEFAULT;
}
