/* SPDX-License-Identifier: BSD-3-Clause */
/* Running a step of freezing for Python. */
#ifndef CBN_PY_FREEZE_H
#define CBN_PY_FREEZE_H
#include "python/py_graph.h"

#include "graph/freeze.h"

/* What calls back from a step: an argument that is handed through. */
typedef cbn_status (*cbn_py_step_fn)(cbn_freeze *f, void *arg);

/* Runs `step` on a graph with its owning module (None: none): (nodes changed, list of rows), a new reference; a row is
 * (step, node, outcome "done" or "kept", reason, blocking or None, hint, into or None), of the class that was given to
 * freeze_row_class. NULL with an exception, the graph
 * then half changed: pyconvbn/_pass_run.py has a snapshot. */
PyObject *cbn_py_step_run(PyObject *graph, PyObject *root, cbn_py_step_fn step, void *arg);

/* A row as an object, a new reference. */
PyObject *cbn_py_freeze_row(const cbn_graph *g, const cbn_freeze_row *row);

/* store.add(array) of a _core.ConstantStore: the name, a str, a new reference; NULL with an exception. */
PyObject *cbn_py_constant_add(PyObject *store, PyObject *array);
#endif
