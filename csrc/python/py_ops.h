/* SPDX-License-Identifier: BSD-3-Clause */
/* The op table as Python sees it: operators and what can be asked about them. Needs the GIL throughout. */
#ifndef CBN_PY_OPS_H
#define CBN_PY_OPS_H
#include "python/py_graph.h"

#include "graph/op_table.h"

/* Makes the table, the types and the functions; from module.c. -1 with an exception. */
int cbn_py_ops_init(PyObject *module);
int cbn_py_operator_init(PyObject *module); /* py_operator.c's part of it */

/* Is it an Operator (or OpOverload)? */
bool cbn_py_operator_check(PyObject *obj);
/* The Python function an Operator calls, borrowed: what a run loop calls when no argument can be a proxy. */
PyObject *cbn_py_operator_function(PyObject *op);
cbn_opcode cbn_py_operator_code(PyObject *op);
/* Is one of the values, or an item of a list or tuple among them, a proxy of a tracer? */
bool cbn_py_has_proxy(PyObject *const *values, Py_ssize_t count);

/* Registers `callable` as the row `name`, keeping a reference for the life of the process. 0, or -1 with ValueError. */
int cbn_py_ops_register(PyObject *callable, PyObject *name, cbn_opcode *code);
/* The default of a parameter as an object (None where there is none): a new reference. */
PyObject *cbn_py_op_default(const cbn_param *p);

/* ---- py_op_node.c ------------------------------------------------------------------------------------------------ */
extern PyMethodDef cbn_op_node_methods[];
extern PyMethodDef cbn_effects_methods[]; /* py_effects.c */
/* The arguments of a node by name, in the order of the schema, defaults filled in: a new dict. */
PyObject *cbn_py_op_bind(PyObject *graph, cbn_node_id id);
#endif
