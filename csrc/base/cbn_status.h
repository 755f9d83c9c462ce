/* SPDX-License-Identifier: BSD-3-Clause */
/* The result of everything that can fail. */
#ifndef CBN_STATUS_H
#define CBN_STATUS_H
#include "base/cbn_base.h"

/* X(code, Python exception): python/py_error.c is the only user of the second column.
 * HOST_ERROR: a callback into the host failed and the host keeps its own exception. */
#define CBN_STATUS_LIST(X)                                                                         \
    X(OK, NULL)                                                                                    \
    X(BAD_VALUE, PyExc_ValueError)                                                                 \
    X(BAD_TYPE, PyExc_TypeError)                                                                   \
    X(NO_MEMORY, PyExc_MemoryError)                                                                \
    X(UNSUPPORTED, PyExc_NotImplementedError)                                                      \
    X(FOLD, FoldError)                                                                             \
    X(BAD_STATE, PyExc_RuntimeError)                                                               \
    X(HOST_ERROR, NULL)

typedef enum {
#define CBN_STATUS_ENUM_(code, exc) CBN_##code,
    CBN_STATUS_LIST(CBN_STATUS_ENUM_)
#undef CBN_STATUS_ENUM_
} cbn_status;

/* Message of a failure. `reason` is a reason code name (static string) for CBN_FOLD, else NULL. */
typedef struct cbn_error {
    cbn_status status;
    const char *reason;
    char message[512];
} cbn_error;

/* Fills *err (may be NULL) and returns `status`, so that `return cbn_fail(err, ...)` reads well. */
CBN_NODISCARD cbn_status cbn_fail(cbn_error *err, cbn_status status, const char *fmt, ...)
    CBN_PRINTF(3, 4);
/* The same for CBN_FOLD with its reason code. */
CBN_NODISCARD cbn_status cbn_fail_fold(cbn_error *err, const char *reason, const char *fmt, ...)
    CBN_PRINTF(3, 4);
/* "out of memory: <what> needs <bytes> bytes" */
CBN_NODISCARD cbn_status cbn_fail_memory(cbn_error *err, const char *what, size_t bytes);

#define CBN_TRY(expr)                                                                              \
    do {                                                                                           \
        const cbn_status cbn_try_status_ = (expr);                                                 \
        if (cbn_try_status_ != CBN_OK) return cbn_try_status_;                                     \
    } while (0)
#endif
