/* SPDX-License-Identifier: BSD-3-Clause */
/* The effects analysis for Python: one analysis for a list of questions. */
#include "python/py_ops.h"

#include "graph/effects.h"
#include "python/py_host_hold.h"

/* None is 0: no bound. */
static bool optional_node(PyObject *graph, PyObject *node, const char *name, cbn_node_id *out) {
    *out = 0;
    return node == Py_None || cbn_py_node_get(graph, node, name, out);
}

static PyObject *node_or_none(PyObject *graph, cbn_node_id id) {
    if (id == 0) Py_RETURN_NONE;
    return cbn_py_node_view(graph, id);
}

static PyObject *writer(PyObject *graph, const cbn_effects *e, PyObject *question) {
    PyObject *value, *after, *before;
    cbn_node_id id, a, b, found = 0;
    if (!PyArg_ParseTuple(question, "OOO:writer", &value, &after, &before)) return NULL;
    if (!optional_node(graph, after, "after", &a) || !optional_node(graph, before, "before", &b)) return NULL;
    if (PyArray_Check(value)) {
        cbn_error err;
        const cbn_status status = cbn_effects_array_writer(e, value, a, b, &found, &err);
        if (status != CBN_OK) return cbn_py_graph_raise(graph, status, &err);
    } else {
        if (!cbn_py_node_get(graph, value, "value", &id)) return NULL;
        found = cbn_effects_writer(e, id, a, b);
    }
    return node_or_none(graph, found);
}

static PyObject *alias(PyObject *graph, const cbn_effects *e, PyObject *question) {
    PyObject *first, *second;
    cbn_node_id a, b;
    if (!PyArg_ParseTuple(question, "OO:alias", &first, &second)) return NULL;
    if (!cbn_py_node_get(graph, first, "a", &a) || !cbn_py_node_get(graph, second, "b", &b)) return NULL;
    return PyBool_FromLong(cbn_effects_may_alias(e, a, b));
}

static PyObject *of_node(PyObject *graph, const cbn_effects *e, PyObject *question,
                         bool (*ask)(const cbn_effects *e, cbn_node_id value)) {
    PyObject *value;
    cbn_node_id id;
    if (!PyArg_ParseTuple(question, "O:question", &value)) return NULL;
    if (!cbn_py_node_get(graph, value, "value", &id)) return NULL;
    return PyBool_FromLong(ask(e, id));
}

static PyObject *returned(PyObject *graph, const cbn_effects *e, PyObject *question) {
    PyObject *value = PyTuple_GET_SIZE(question) == 1 ? PyTuple_GET_ITEM(question, 0) : NULL;
    if (value == NULL || !PyArray_Check(value)) return of_node(graph, e, question, cbn_effects_returned);
    cbn_error err;
    bool found;
    const cbn_status status = cbn_effects_array_returned(e, value, &found, &err);
    return status == CBN_OK ? PyBool_FromLong(found) : cbn_py_graph_raise(graph, status, &err);
}

static PyObject *answer(PyObject *graph, const cbn_effects *e, PyObject *question) {
    if (!PyTuple_Check(question) || PyTuple_GET_SIZE(question) == 0) {
        PyErr_SetString(PyExc_TypeError, "questions: expected tuples (kind, ...)");
        return NULL;
    }
    static const char *const kinds[] = {"writer", "alias", "written", "returned", "outside", NULL};
    const int kind = cbn_py_choice(PyTuple_GET_ITEM(question, 0), "kind", kinds);
    if (kind < 0) return NULL;
    PyObject *rest = PyTuple_GetSlice(question, 1, PyTuple_GET_SIZE(question));
    if (rest == NULL) return NULL;
    PyObject *result = kind == 0   ? writer(graph, e, rest)
                       : kind == 1 ? alias(graph, e, rest)
                       : kind == 2 ? of_node(graph, e, rest, cbn_effects_written)
                       : kind == 3 ? returned(graph, e, rest)
                                   : of_node(graph, e, rest, cbn_effects_outside);
    Py_DECREF(rest);
    return result;
}

static PyObject *graph_effects(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("graph_effects", nargs, 3)) return NULL;
    PyObject *graph = args[0];
    cbn_graph *g = cbn_py_graph_get(graph, "graph");
    if (g == NULL) return NULL;
    PyObject *questions = PySequence_Tuple(args[2]);
    if (questions == NULL) return NULL;
    cbn_effects *e = NULL;
    cbn_error err;
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_effects_build(g, args[1] == Py_None ? NULL : args[1], &e, &err);
    cbn_py_host_hold_end();
    PyObject *list =
        status == CBN_OK ? PyList_New(PyTuple_GET_SIZE(questions)) : cbn_py_graph_raise(graph, status, &err);
    cbn_graph_lock(g); /* the analysis describes the graph as it is */
    for (Py_ssize_t i = 0; list != NULL && i < PyTuple_GET_SIZE(questions); i++) {
        PyObject *item = answer(graph, e, PyTuple_GET_ITEM(questions, i));
        if (item == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, item);
    }
    cbn_graph_unlock(g);
    cbn_effects_free(e);
    Py_DECREF(questions);
    return list;
}

PyMethodDef cbn_effects_methods[] = {
    {"graph_effects", (PyCFunction)(void (*)(void))graph_effects, METH_FASTCALL,
     "Answers to questions about who writes whose memory."},
    {NULL, NULL, 0, NULL},
};
