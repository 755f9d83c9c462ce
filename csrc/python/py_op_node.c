/* SPDX-License-Identifier: BSD-3-Clause */
/* What the op table says about the nodes of a graph. */
#include "python/py_ops.h"

#include "graph/graph_shape.h"
#include "python/py_host_hold.h"

#include <string.h>

static PyObject *bound_value(PyObject *graph, const cbn_bound *b, int i) {
    const cbn_param *p = &b->op->params[i];
    if (p->variadic) { /* always a tuple, however it was passed */
        PyObject *tuple = PyTuple_New(b->nrest);
        for (uint32_t k = 0; tuple != NULL && k < b->nrest; k++) {
            PyObject *item = cbn_py_value_to_object(graph, &b->rest[k]);
            if (item == NULL) Py_CLEAR(tuple);
            else PyTuple_SET_ITEM(tuple, k, item);
        }
        return tuple;
    }
    return b->given[i] ? cbn_py_value_to_object(graph, &b->v[i]) : cbn_py_op_default(p);
}

PyObject *cbn_py_op_bind(PyObject *graph, cbn_node_id id) {
    cbn_graph *g = cbn_py_graph_get(graph, "graph");
    if (g == NULL) return NULL;
    cbn_bound bound;
    cbn_error err;
    const cbn_status status = cbn_op_bind(g, id, &bound, &err);
    if (status != CBN_OK) return cbn_py_graph_raise(graph, status, &err);
    PyObject *dict = PyDict_New();
    cbn_graph_lock(g); /* making views may run the collector, and that anything */
    for (int i = 0; dict != NULL && i < bound.n; i++) {
        PyObject *value = bound_value(graph, &bound, i);
        if (value == NULL || PyDict_SetItemString(dict, bound.op->params[i].name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    cbn_graph_unlock(g);
    return dict;
}

/* The graph (new reference, and its C side) and id of a Node. */
static PyObject *node_of(PyObject *node, cbn_graph **g, cbn_node_id *id) {
    PyObject *graph = PyObject_GetAttrString(node, "graph");
    if (graph == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Format(PyExc_TypeError, "node: expected a Node, got %.200s", Py_TYPE(node)->tp_name);
        }
        return NULL;
    }
    if (!cbn_py_node_get(graph, node, "node", id) || (*g = cbn_py_graph_get(graph, "graph")) == NULL) Py_CLEAR(graph);
    return graph;
}

static PyObject *op_bind(PyObject *module, PyObject *node) {
    (void)module;
    cbn_graph *g;
    cbn_node_id id;
    PyObject *graph = node_of(node, &g, &id);
    if (graph == NULL) return NULL;
    PyObject *result = cbn_py_op_bind(graph, id);
    Py_DECREF(graph);
    return result;
}

static PyObject *op_impure(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("op_impure", nargs, 2)) return NULL;
    cbn_graph *g;
    cbn_node_id id;
    PyObject *graph = node_of(args[0], &g, &id);
    if (graph == NULL) return NULL;
    bool impure;
    cbn_error err;
    cbn_graph_lock(g);
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_node_impure(g, id, args[1] == Py_None ? NULL : args[1], &impure, &err);
    cbn_py_host_hold_end();
    cbn_graph_unlock(g);
    PyObject *result = status == CBN_OK ? PyBool_FromLong(impure) : cbn_py_graph_raise(graph, status, &err);
    Py_DECREF(graph);
    return result;
}

/* ---- shapes ------------------------------------------------------------------------------------------------------ */
/* (shape, kind, itemsize) or None. */
static PyObject *tensor_object(const cbn_tensor_meta *m) {
    if (m == NULL || m->ndim < 0) Py_RETURN_NONE;
    PyObject *shape = PyTuple_New(m->ndim);
    for (int i = 0; shape != NULL && i < m->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(m->shape[i]);
        if (size == NULL) Py_CLEAR(shape);
        else PyTuple_SET_ITEM(shape, i, size);
    }
    return shape == NULL ? NULL : Py_BuildValue("NCi", shape, m->kind, (int)m->itemsize);
}

static bool tensor_from_object(PyObject *obj, cbn_tensor_meta *out) {
    PyObject *shape;
    int kind, itemsize;
    if (!PyTuple_Check(obj) || !PyArg_ParseTuple(obj, "O!Ci:op_set_tensor", &PyTuple_Type, &shape, &kind, &itemsize)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "tensor: expected (shape, kind, itemsize) or None");
        return false;
    }
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    if (ndim > CBN_MAX_DIMS || kind > 127 || itemsize < 0 || itemsize > 255) {
        PyErr_SetString(PyExc_ValueError, "tensor: too many axes, or no such dtype");
        return false;
    }
    *out = (cbn_tensor_meta){.ndim = (int8_t)ndim, .kind = (int8_t)kind, .itemsize = (uint8_t)itemsize};
    for (Py_ssize_t i = 0; i < ndim; i++) {
        if (!cbn_py_int64(PyTuple_GET_ITEM(shape, i), "shape", &out->shape[i])) return false;
    }
    return true;
}

static PyObject *op_infer_shape(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("op_infer_shape", nargs, 2)) return NULL;
    cbn_graph *g;
    cbn_node_id id;
    PyObject *graph = node_of(args[0], &g, &id);
    if (graph == NULL) return NULL;
    PyObject *result;
    bool known;
    cbn_error err;
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_graph_infer_shape(g, id, args[1] == Py_None ? NULL : args[1], &known, &err);
    cbn_py_host_hold_end();
    if (status != CBN_OK) result = cbn_py_graph_raise(graph, status, &err);
    else result = tensor_object(known ? cbn_graph_node(g, id)->tensor : NULL);
    Py_DECREF(graph);
    return result;
}

typedef struct unknown_nodes {
    PyObject *graph, *list;
} unknown_nodes;

static cbn_status add_unknown(cbn_node_id id, void *arg) {
    const unknown_nodes *u = arg;
    PyObject *node = cbn_py_node_view(u->graph, id);
    const bool ok = node != NULL && PyList_Append(u->list, node) == 0;
    Py_XDECREF(node);
    return ok ? CBN_OK : CBN_HOST_ERROR;
}

static PyObject *op_infer_shapes(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("op_infer_shapes", nargs, 2)) return NULL;
    cbn_graph *g = cbn_py_graph_get(args[0], "graph");
    if (g == NULL) return NULL;
    unknown_nodes u = {args[0], PyList_New(0)};
    if (u.list == NULL) return NULL;
    cbn_error err = {0};
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_graph_infer_shapes(g, args[1] == Py_None ? NULL : args[1], add_unknown, &u, &err);
    cbn_py_host_hold_end();
    if (status == CBN_OK) return u.list;
    Py_DECREF(u.list);
    return cbn_py_graph_raise(args[0], status, &err);
}

static PyObject *op_tensor(PyObject *module, PyObject *node) {
    (void)module;
    cbn_graph *g;
    cbn_node_id id;
    PyObject *graph = node_of(node, &g, &id);
    if (graph == NULL) return NULL;
    PyObject *result = tensor_object(cbn_graph_node(g, id)->tensor);
    Py_DECREF(graph);
    return result;
}

static PyObject *op_set_tensor(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("op_set_tensor", nargs, 2)) return NULL;
    cbn_tensor_meta meta;
    if (args[1] != Py_None && !tensor_from_object(args[1], &meta)) return NULL;
    cbn_graph *g;
    cbn_node_id id;
    PyObject *graph = node_of(args[0], &g, &id);
    if (graph == NULL) return NULL;
    cbn_error err;
    const cbn_status status = cbn_graph_set_tensor(g, id, args[1] == Py_None ? NULL : &meta, &err);
    PyObject *result = status == CBN_OK ? Py_NewRef(Py_None) : cbn_py_graph_raise(graph, status, &err);
    Py_DECREF(graph);
    return result;
}

PyMethodDef cbn_op_node_methods[] = {
    {"op_infer_shape", (PyCFunction)(void (*)(void))op_infer_shape, METH_FASTCALL,
     "Shape of a node's value by its rule, kept with the node; None: no rule applies."},
    {"op_infer_shapes", (PyCFunction)(void (*)(void))op_infer_shapes, METH_FASTCALL,
     "Shapes of all nodes by their rules; a list of the calls that no rule knows."},
    {"op_tensor", op_tensor, METH_O, "The shape kept with a node, or None."},
    {"op_set_tensor", (PyCFunction)(void (*)(void))op_set_tensor, METH_FASTCALL,
     "Keeps a shape with a node; None forgets."},
    {"op_bind", op_bind, METH_O, "Arguments of a node by name, defaults filled in."},
    {"op_impure", (PyCFunction)(void (*)(void))op_impure, METH_FASTCALL, "Must a node be kept though nobody uses it?"},
    {NULL, NULL, 0, NULL},
};
