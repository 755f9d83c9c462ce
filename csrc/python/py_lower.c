/* SPDX-License-Identifier: BSD-3-Clause */
/* What lowering does to the call of a layer (pyconvbn/_lower.py): parameters get nodes that read them, the call becomes
 * that of an operator. One call for all of it, since a graph may have a hundred thousand. */
#include "python/py_freeze.h"
#include "python/py_graph_priv.h"
#include "python/py_numpy.h"
#include "python/py_passes.h"

#include <string.h>

enum { MAX_MEMBERS = 8, MAX_PATH = 1024, MAX_VALUES = 1 + MAX_MEMBERS + 16 };

typedef struct lowering {
    cbn_graph_object *graph;
    cbn_graph *g;
    cbn_node_id id;
    PyObject *attributes; /* dotted name -> get_attr node */
    char path[MAX_PATH];  /* of the module, and a dot */
    size_t len;
    cbn_error err;
} lowering;

static void tensor_of(PyArrayObject *a, cbn_tensor_meta *out) {
    *out = (cbn_tensor_meta){.ndim = (int8_t)PyArray_NDIM(a), .kind = (int8_t)PyArray_DESCR(a)->kind,
                             .itemsize = (uint8_t)PyArray_ITEMSIZE(a)};
    for (int i = 0; i < PyArray_NDIM(a); i++) out->shape[i] = PyArray_DIM(a, i);
}

/* A new node before the call, known under its name. */
static bool make_node(lowering *l, PyObject *key, size_t len, PyObject *array, cbn_node_id *out) {
    cbn_str target;
    cbn_status status = cbn_graph_intern(l->g, l->path, len, &target, &l->err);
    if (status == CBN_OK) {
        const cbn_node_spec spec = {.op = CBN_NODE_GET_ATTR, .target = cbn_value_str(target), .name = CBN_STR_NONE};
        cbn_graph_set_insert_point(l->g, l->id);
        status = cbn_graph_create(l->g, &spec, out, &l->err);
    }
    if (status == CBN_OK && cbn_graph_node(l->g, l->id)->tensor != NULL) {
        cbn_tensor_meta meta;
        tensor_of((PyArrayObject *)array, &meta);
        status = cbn_graph_set_tensor(l->g, *out, &meta, &l->err);
    }
    if (status != CBN_OK) return (void)cbn_py_graph_raise((PyObject *)l->graph, status, &l->err), false;
    PyObject *view = cbn_py_node_view((PyObject *)l->graph, *out);
    const bool ok = view != NULL && PyDict_SetItem(l->attributes, key, view) == 0;
    Py_XDECREF(view);
    return ok;
}

/* The node that reads a member. */
static bool node_of_member(lowering *l, PyObject *name, PyObject *array, cbn_value *out) {
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(name, &len);
    if (text == NULL) return false;
    if (l->len + (size_t)len > sizeof l->path) {
        PyErr_SetString(PyExc_ValueError, "names: too long");
        return false;
    }
    memcpy(l->path + l->len, text, (size_t)len);
    PyObject *key = PyUnicode_FromStringAndSize(l->path, (Py_ssize_t)l->len + len);
    PyObject *known = key == NULL ? NULL : PyDict_GetItemWithError(l->attributes, key);
    cbn_node_id id = 0;
    bool ok = known != NULL || (key != NULL && !PyErr_Occurred());
    if (known != NULL) ok = cbn_py_node_get((PyObject *)l->graph, known, "attributes", &id);
    else if (ok) ok = make_node(l, key, l->len + (size_t)len, array, &id);
    Py_XDECREF(key);
    *out = cbn_value_node(id);
    return ok;
}

/* Is each member an array or None, and the path short enough? 1: yes, 0: no, -1: exception. */
static int simple(const lowering *l, PyObject *names, PyObject *state, PyObject **arrays) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); i++) {
        arrays[i] = PyDict_GetItemWithError(state, PyTuple_GET_ITEM(names, i));
        if (arrays[i] == NULL) return PyErr_Occurred() ? -1 : 0;
        if (arrays[i] == Py_None) continue;
        if (!PyArray_Check(arrays[i]) || PyArray_NDIM((PyArrayObject *)arrays[i]) > CBN_MAX_DIMS) return 0;
        if (l->len + (size_t)PyUnicode_GET_LENGTH(PyTuple_GET_ITEM(names, i)) * 4 > sizeof l->path) return 0;
    }
    return 1;
}

/* v[0..count): input, members, rest. True: the graph has them. */
static bool become(lowering *l, PyObject *target, const cbn_value *v, uint32_t count) {
    cbn_status status = cbn_graph_set_op(l->g, l->id, CBN_NODE_CALL_FUNCTION, &l->err);
    if (status == CBN_OK) {
        const cbn_value host = cbn_value_host(Py_NewRef(target));
        status = cbn_graph_set_target(l->g, l->id, host, &l->err);
        if (status != CBN_OK) cbn_value_release(l->g, host);
    }
    if (status == CBN_OK) status = cbn_graph_set_args(l->g, l->id, v, count, NULL, 0, &l->err);
    if (status != CBN_OK) (void)cbn_py_graph_raise((PyObject *)l->graph, status, &l->err);
    return status == CBN_OK;
}

static PyObject *lower_now(lowering *l, PyObject *target, PyObject *names, PyObject **arrays, PyObject *rest,
                           PyObject *text) {
    cbn_value v[MAX_VALUES];
    uint32_t count = 0;
    const uint32_t members = (uint32_t)PyTuple_GET_SIZE(names), extra = (uint32_t)PyTuple_GET_SIZE(rest);
    bool ok = true, moved = false;
    v[count++] = cbn_value_retain(l->g, cbn_graph_node(l->g, l->id)->args->v[0]);
    for (uint32_t i = 0; i < members; i++) v[count++] = cbn_value_none();
    for (uint32_t i = 0; ok && i < extra; i++) {
        ok = cbn_py_value_from_object((PyObject *)l->graph, PyTuple_GET_ITEM(rest, i), &v[count]);
        if (ok) count++;
    }
    for (uint32_t i = 0; ok && i < members; i++) {
        if (arrays[i] != Py_None) ok = node_of_member(l, PyTuple_GET_ITEM(names, i), arrays[i], &v[1 + i]);
    }
    cbn_freeze_row row = {.step = CBN_STEP_LOWER, .reason = CBN_FREEZE_OK, .blocking = CBN_STR_NONE};
    if (ok) ok = moved = become(l, target, v, count);
    if (!moved) {
        for (uint32_t i = 0; i < count; i++) cbn_value_release(l->g, v[i]);
    }
    Py_ssize_t len = 0;
    const char *into = ok ? PyUnicode_AsUTF8AndSize(text, &len) : NULL;
    if (into == NULL) return NULL;
    const cbn_status status = cbn_graph_intern(l->g, into, (size_t)len, &row.into, &l->err);
    if (status != CBN_OK) return cbn_py_graph_raise((PyObject *)l->graph, status, &l->err);
    row.node = cbn_graph_node(l->g, l->id)->name;
    return cbn_py_freeze_row(l->g, &row);
}

/* lower_layer(node, target, path, names, state, rest, attributes, text) -> a row of freezing, or None: nothing changed,
 * since the call is not that simple. Otherwise the node calls target(its one argument, the members `names` of the module
 * at `path`, *rest). `state` is the module's dict; `attributes` has the nodes that read members so far. When it fails the
 * graph may be half changed. */
static PyObject *lower_layer(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("lower_layer", nargs, 8)) return NULL;
    PyObject *target = args[1], *path = args[2], *names = args[3], *state = args[4], *rest = args[5];
    if (!cbn_py_is_node(args[0]) || !PyUnicode_Check(path) || !PyTuple_Check(names) || !PyDict_Check(state) ||
        !PyTuple_Check(rest) || !PyDict_Check(args[6]) || !PyUnicode_Check(args[7]) || !PyCallable_Check(target) ||
        PyTuple_GET_SIZE(names) > MAX_MEMBERS || PyTuple_GET_SIZE(rest) > MAX_VALUES - 1 - MAX_MEMBERS) {
        PyErr_SetString(PyExc_TypeError, "lower_layer: unexpected arguments");
        return NULL;
    }
    cbn_node_object *node = (cbn_node_object *)args[0];
    const cbn_node *n = cbn_py_node_live(node);
    if (n == NULL) return NULL;
    if (n->args->nargs != 1 || n->args->nkw != 0 || n->op == CBN_NODE_ROOT) Py_RETURN_NONE;
    lowering l = {.graph = node->graph, .g = node->graph->graph, .id = node->id, .attributes = args[6]};
    Py_ssize_t len;
    const char *utf8 = PyUnicode_AsUTF8AndSize(path, &len);
    PyObject *arrays[MAX_MEMBERS];
    if (utf8 == NULL) return NULL;
    if ((size_t)len + 1 >= sizeof l.path) Py_RETURN_NONE;
    memcpy(l.path, utf8, (size_t)len);
    l.path[len] = '.';
    l.len = (size_t)len + 1;
    const int found = simple(&l, names, state, arrays);
    if (found < 0) return NULL;
    if (found == 0) Py_RETURN_NONE;
    PyObject *row = lower_now(&l, target, names, arrays, rest, args[7]);
    cbn_py_graph_flush_if(node->graph);
    return row;
}

PyMethodDef cbn_lower_methods[] = {
    {"lower_layer", (PyCFunction)(void (*)(void))lower_layer, METH_FASTCALL,
     "lower_layer(node, target, path, names, state, rest, attributes, text) -> a row, or None"},
    {0},
};
