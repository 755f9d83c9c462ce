/* SPDX-License-Identifier: BSD-3-Clause */
/* What the entry points of _core._testing share. The kernels run on the caller's own memory, so that tests can put it
 * between guard pages: arrays are C-contiguous ndarrays of the exact dtype, and what would reach outside of them is
 * refused. All of these set an exception when they give NULL or false. */
#ifndef CBN_PY_TESTING_H
#define CBN_PY_TESTING_H
#include "python/py_error.h"

#include "kernels/cbn_kernels.h"

/* The table of that name; isa == NULL: an exception is set already. */
const cbn_kernels *cbn_testing_table(const char *isa);

typedef struct cbn_span {
    void *data; /* NULL: the argument was None */
    int64_t size;
} cbn_span;

/* An array of `type` (NPY_FLOAT ...) or None. */
CBN_NODISCARD bool cbn_testing_span(PyObject *obj, const char *name, int type, cbn_span *out);
/* An array of `type` with at least `least` elements; *n (NULL is fine) receives how many there are. */
void *cbn_testing_array(PyObject *obj, const char *name, int type, int64_t least, int64_t *n);
/* An array of `type` with ndim axes. */
void *cbn_testing_axes(PyObject *obj, const char *name, int type, int ndim, int64_t *shape);

/* ValueError; always NULL. */
PyObject *cbn_testing_refuse(const char *what);

#define CBN_TESTING_METHOD(name, signature) \
    { #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, PyDoc_STR(#name signature) }
#endif
