/* SPDX-License-Identifier: BSD-3-Clause */
/* Status to exception, and the argument checks that every binding function shares. */
#ifndef CBN_PY_ERROR_H
#define CBN_PY_ERROR_H
#include "python/py_numpy.h"

#include "base/cbn_status.h"

/* Sets the exception that belongs to `status` with err's message (err as filled by the failing call) and returns
 * NULL. CBN_FOLD becomes pyconvbn.errors.FoldError with its `reason`. Needs the GIL. */
PyObject *cbn_py_raise(cbn_status status, const cbn_error *err);

/* For METH_FASTCALL functions of the private module: exactly `want` arguments, else TypeError and false. */
bool cbn_py_nargs(const char *function, Py_ssize_t got, Py_ssize_t want);

/* An integer (int, NumPy integer, anything with __index__). TypeError / ValueError (beyond int64) name `name`. */
CBN_NODISCARD bool cbn_py_int64(PyObject *obj, const char *name, int64_t *out);
/* An integer for all `count` entries, or a sequence of `count` integers (or of one, which is repeated). */
CBN_NODISCARD bool cbn_py_ints(PyObject *obj, const char *name, int count, int64_t *out);
/* float(obj); TypeError names `name`. */
CBN_NODISCARD bool cbn_py_double(PyObject *obj, const char *name, double *out);
/* True, False or a NumPy bool; anything else is a TypeError. */
CBN_NODISCARD bool cbn_py_bool(PyObject *obj, const char *name, bool *out);
/* Index of the string `obj` in the NULL-terminated `choices`, or -1 with TypeError / ValueError that lists them. */
CBN_NODISCARD int cbn_py_choice(PyObject *obj, const char *name, const char *const *choices);
#endif
