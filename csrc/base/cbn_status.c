/* SPDX-License-Identifier: BSD-3-Clause */
#include "base/cbn_status.h"
#include <stdarg.h>
#include <stdio.h>

static void fill(cbn_error *err, cbn_status status, const char *reason, const char *fmt,
                 va_list ap) {
    if (!err) return;
    err->status = status;
    err->reason = reason;
    vsnprintf(err->message, sizeof err->message, fmt, ap);
}

cbn_status cbn_fail(cbn_error *err, cbn_status status, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fill(err, status, NULL, fmt, ap);
    va_end(ap);
    return status;
}

cbn_status cbn_fail_fold(cbn_error *err, const char *reason, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fill(err, CBN_FOLD, reason, fmt, ap);
    va_end(ap);
    return CBN_FOLD;
}

cbn_status cbn_fail_memory(cbn_error *err, const char *what, size_t bytes) {
    return cbn_fail(err, CBN_NO_MEMORY, "out of memory: %s needs %zu bytes", what, bytes);
}
