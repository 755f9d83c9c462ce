/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/fold_report.h"

#include "base/cbn_alloc.h"

void cbn_fold_report_free(cbn_fold_report *r) {
    cbn_free(r->rows);
    *r = (cbn_fold_report){0};
}

const char *cbn_fold_reason_name(cbn_fold_reason r) {
    static const char *const names[] = {
#define CBN_REASON_NAME_(code, hint) #code,
        CBN_FOLD_REASONS(CBN_REASON_NAME_)
#undef CBN_REASON_NAME_
    };
    assert(r < CBN_REASON_COUNT);
    return names[r];
}

const char *cbn_fold_reason_hint(cbn_fold_reason r) {
    static const char *const hints[] = {
#define CBN_REASON_HINT_(code, hint) hint,
        CBN_FOLD_REASONS(CBN_REASON_HINT_)
#undef CBN_REASON_HINT_
    };
    assert(r < CBN_REASON_COUNT);
    return hints[r];
}
