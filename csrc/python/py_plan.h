/* SPDX-License-Identifier: BSD-3-Clause */
/* The Plan type, as far as other files of the binding need it. */
#ifndef CBN_PY_PLAN_H
#define CBN_PY_PLAN_H
#include "python/py_geometry.h"

/* Bound: one input was copied before a run, for this reason, so many times. Written under the GIL. */
enum { CBN_PLAN_COPY_KINDS = 8 };
typedef struct cbn_copy_count {
    const char *what, *why; /* static strings; what NULL: unused */
    unsigned long long times;
} cbn_copy_count;

typedef struct cbn_plan_object {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *weakrefs;
    cbn_conv_plan *plan;
    PyObject *input_shape; /* tuple or None */
    PyObject *choices;     /* dict: spatial shape -> algorithm fixed by tuning; tuples and strings only */
    unsigned long long calls;
    cbn_copy_count copies[CBN_PLAN_COPY_KINDS];
} cbn_plan_object;

/* Plan(*args, **kwargs) on a given kernel table (NULL: the active one). */
PyObject *cbn_plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs, const cbn_kernels *kernels);
/* Fixes the algorithm for an input shape and remembers it for pickling and update. */
CBN_NODISCARD bool cbn_plan_fix(cbn_plan_object *self, int ndim, const npy_intp *shape, const char *algorithm);
/* Chooses and packs for this shape argument and remembers it; None does nothing. */
CBN_NODISCARD bool cbn_plan_prepare_shape(cbn_plan_object *self, PyObject *input_shape);

/* py_plan_info.c: what a plan tells about itself. */
PyObject *cbn_plan_output_shape(PyObject *self, PyObject *input_shape);
PyObject *cbn_plan_explain_method(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames);
PyObject *cbn_plan_memory(PyObject *self, PyObject *input_shape);
PyObject *cbn_plan_cost(PyObject *self, PyObject *input_shape);
PyObject *cbn_plan_halo(PyObject *self, PyObject *unused);
PyObject *cbn_plan_repr(PyObject *self);
PyObject *cbn_plan_repr_html(PyObject *self, PyObject *unused);

/* py_plan_pickle.c */
PyObject *cbn_plan_reduce_ex(PyObject *self, PyObject *protocol);
PyObject *cbn_plan_update(PyObject *self, PyObject *args, PyObject *kwargs);
extern PyMethodDef cbn_plan_module_methods[]; /* _restore_plan */
#endif
