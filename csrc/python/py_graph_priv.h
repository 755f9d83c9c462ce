/* SPDX-License-Identifier: BSD-3-Clause */
/* What the files of the Graph and Node types share; nobody else includes this. */
#ifndef CBN_PY_GRAPH_PRIV_H
#define CBN_PY_GRAPH_PRIV_H
#include "python/py_graph.h"

typedef struct cbn_graph_object {
    PyObject_HEAD
    cbn_graph *graph; /* of the capsule */
    PyObject *capsule;
    PyObject *owner; /* weak reference to the owning module (the module itself if it takes none), or NULL */
    PyObject *tracer_cls;
    PyObject *weakrefs;
} cbn_graph_object;

/* (graph, id, generation). The node's slot points back to its one Node object, without owning it. */
typedef struct cbn_node_object {
    PyObject_HEAD
    cbn_graph_object *graph;
    cbn_node_id id;
    uint32_t gen;
    cbn_str name; /* for messages when the node is gone */
    PyObject *weakrefs;
} cbn_node_object;

/* Interned strings: names of keyword arguments and the like, compared by pointer first. */
#define CBN_PY_IDS(X)                                                                                                  \
    X(arg) X(args) X(delete_user_cb) X(idx) X(impure_random) X(key) X(kwargs) X(method_name) X(module_name) X(name)    \
    X(new_input) X(old_input) X(op) X(output) X(propagate_meta) X(qualified_name) X(replace_with) X(result)            \
    X(stack_trace) X(target) X(the_function) X(type_expr) X(__name__) X(_fields)

typedef struct cbn_py_ids {
#define CBN_PY_ID_FIELD_(id) PyObject *id;
    CBN_PY_IDS(CBN_PY_ID_FIELD_)
#undef CBN_PY_ID_FIELD_
    PyObject *ops[CBN_NODE_OP_COUNT];
} cbn_py_ids;
extern cbn_py_ids cbn_ids;

extern PyTypeObject *cbn_graph_type, *cbn_node_type, *cbn_node_iter_type, *cbn_node_users_type, *cbn_snapshot_type;
extern PyType_Spec cbn_graph_spec, cbn_node_spec_py, cbn_node_iter_spec, cbn_node_users_spec, cbn_snapshot_spec;
extern PyMethodDef cbn_graph_edit_methods[], cbn_graph_read_methods[], cbn_node_edit_methods[];

CBN_INLINE bool cbn_py_is_node(PyObject *obj) { return Py_IS_TYPE(obj, cbn_node_type); }
CBN_INLINE bool cbn_py_is_graph(PyObject *obj) { return PyObject_TypeCheck(obj, cbn_graph_type); }

/* Sorts arguments of a METH_FASTCALL | METH_KEYWORDS call into slots[count] (NULL: not given). The first `required`
 * must be there; at most `positional` may come by position. */
CBN_NODISCARD bool cbn_py_sort_args(const char *function, PyObject **const *names, int count, int required,
                                    int positional, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
                                    PyObject **slots);

/* The live node behind the object, or NULL with RuntimeError "node 'x' was erased from its graph". Valid until Python
 * code runs or the graph changes. */
const cbn_node *cbn_py_node_live(cbn_node_object *self);
bool cbn_py_node_is_live(const cbn_node_object *self);
/* Name of the node, erased or not, as a new str. */
PyObject *cbn_py_node_name(const cbn_node_object *self);
/* As cbn_py_node_get, the root allowed. */
CBN_NODISCARD bool cbn_py_node_get_or_root(PyObject *graph, PyObject *node, const char *argument, cbn_node_id *out);
/* Module that owns the graph, a new reference, or NULL without an exception. */
PyObject *cbn_py_graph_owner(cbn_graph_object *self);
CBN_INLINE void cbn_py_graph_flush_if(cbn_graph_object *self) {
    if (cbn_graph_needs_flush(self->graph)) cbn_py_graph_flush((PyObject *)self);
}
PyObject *cbn_py_str(const cbn_graph *g, cbn_str s);

/* Converted arguments, on the stack while they are few. */
enum { CBN_PY_FEW = 16 };
typedef struct cbn_py_values {
    cbn_graph_object *graph;
    uint32_t nargs, nkw, filled;
    cbn_value *v; /* nargs values, then nkw pairs */
    cbn_value few[CBN_PY_FEW];
} cbn_py_values;
/* args: a tuple, NULL or None; kwargs: a dict with str keys, NULL or None. TypeError names args or kwargs. */
CBN_NODISCARD bool cbn_py_values_from(cbn_graph_object *graph, PyObject *args, PyObject *kwargs, cbn_py_values *out);
/* Room for so many values, all None. */
CBN_NODISCARD bool cbn_py_values_room(cbn_graph_object *graph, uint32_t nargs, uint32_t nkw, cbn_py_values *out);
/* Gives everything back, unless `moved`: then the graph has it. */
void cbn_py_values_done(cbn_py_values *a, bool moved);

PyObject *cbn_py_immutable_dict(PyObject *dict);
PyObject *cbn_py_node_args(cbn_node_object *self);
PyObject *cbn_py_node_kwargs(cbn_node_object *self);
/* Setters: 0, or -1 with an exception. put_args: the one that is NULL stays. */
int cbn_py_node_put_name(cbn_node_object *self, PyObject *value);
int cbn_py_node_put_target(cbn_node_object *self, PyObject *value);
int cbn_py_node_put_op(cbn_node_object *self, PyObject *value);
int cbn_py_node_put_args(cbn_node_object *self, PyObject *args, PyObject *kwargs);
CBN_NODISCARD bool cbn_py_parse_op(PyObject *obj, cbn_node_op *out);
/* An iterator over ids that were collected before; takes `ids` (cbn_alloc'd pairs id, generation). */
PyObject *cbn_py_iter_over(cbn_graph_object *graph, uint32_t *pairs, Py_ssize_t count);
PyObject *cbn_py_iter_graph(cbn_graph_object *graph, bool reversed);
PyObject *cbn_py_users_of(cbn_node_object *node);
/* Types made once for the process, with all they need. */
int cbn_py_graph_types(PyObject *module);
#endif
