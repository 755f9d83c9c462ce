/* SPDX-License-Identifier: BSD-3-Clause */
/* Graph and Node as Python sees them: views over a cbn_graph that a capsule owns. Needs the GIL throughout. */
#ifndef CBN_PY_GRAPH_H
#define CBN_PY_GRAPH_H
#include "python/py_error.h"

#include "graph/graph.h"

#define CBN_GRAPH_CAPSULE "pyconvbn.graph"

/* The C graph of a _core.Graph instance (or subclass); NULL with TypeError naming `argument`. Borrowed. */
cbn_graph *cbn_py_graph_get(PyObject *graph, const char *argument);
/* The Node object of a live node: the one that exists, or a new one. New reference. */
PyObject *cbn_py_node_view(PyObject *graph, cbn_node_id id);
/* The id of a Node that is alive and belongs to `graph`; else false with TypeError (not a Node) or RuntimeError
 * (stale, or of another graph) naming `argument`. */
CBN_NODISCARD bool cbn_py_node_get(PyObject *graph, PyObject *node, const char *argument, cbn_node_id *out);
/* Python object <-> value. to_object: nodes become views, lists immutable_list, dicts immutable_dict, new reference.
 * from_object: everything that is not None, bool, int, float, str, Node, tuple, list, dict or slice becomes HOST; no
 * node may be inside that. Messages call the value args. */
PyObject *cbn_py_value_to_object(PyObject *graph, const cbn_value *v);
CBN_NODISCARD bool cbn_py_value_from_object(PyObject *graph, PyObject *obj, cbn_value *out);
/* An interned text as a new str; None for CBN_STR_NONE. */
PyObject *cbn_py_str_or_none(const cbn_graph *g, cbn_str s);
/* Drops what the graph has queued; call when no pointer into the graph is held. Keeps a pending exception. */
void cbn_py_graph_flush(PyObject *graph);
/* status to exception; flushes too. Returns NULL. */
PyObject *cbn_py_graph_raise(PyObject *graph, cbn_status status, const cbn_error *err);

/* Handles are PyObject pointers. py_host.c has retain, release, equal, describe; py_host_module.c the rest. */
extern const cbn_host_vtable cbn_py_host_vtable;
cbn_status cbn_py_host_array(cbn_host h, cbn_array_info *out, bool *is_array, cbn_error *err);
cbn_status cbn_py_host_resolve(cbn_host root, const char *target, cbn_host *out, cbn_error *err);
cbn_status cbn_py_host_module(cbn_host h, cbn_module_info *out, cbn_error *err);
cbn_status cbn_py_host_module_arrays(cbn_host h, cbn_status (*fn)(cbn_host array, void *arg), void *arg,
                                     cbn_error *err);
bool cbn_py_host_plain(cbn_host h);
cbn_status cbn_py_host_batch_norms(cbn_host h, cbn_status (*fn)(cbn_host bn, const char *path, void *arg), void *arg,
                                   cbn_error *err);

/* The process's op table (py_ops.c), with the callables registered so far. NULL only before module init. */
cbn_op_table *cbn_py_op_table(void);
#endif
