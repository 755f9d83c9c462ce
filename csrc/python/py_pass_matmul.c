/* SPDX-License-Identifier: BSD-3-Clause */
/* Parallel products: the arithmetic on weights is pyconvbn/_pass_matmul.py's. */
#include "python/py_freeze.h"

#include "graph/passes.h"
#include "python/py_passes.h"

typedef struct joiner {
    cbn_matmul_host host;
    PyObject *parameter;   /* the class nn.Parameter; borrowed */
    PyObject *concatenate; /* concatenate(targets, axis) -> name of the new attribute; borrowed */
    PyObject *name;        /* the last answer */
} joiner;

/* A plain array or a parameter. What other classes of arrays make of a product is theirs. */
static bool is_ndarray(cbn_host object, void *arg) {
    const joiner *j = arg;
    return PyArray_CheckExact((PyObject *)object) || (PyObject *)Py_TYPE((PyObject *)object) == j->parameter;
}

static cbn_status concatenate(void *arg, const char *const *targets, int n, int axis, const char **name,
                              cbn_error *err) {
    (void)err;
    joiner *j = arg;
    PyObject *list = PyTuple_New(n);
    for (int i = 0; list != NULL && i < n; i++) {
        PyObject *text = PyUnicode_FromString(targets[i]);
        if (text == NULL) Py_CLEAR(list);
        else PyTuple_SET_ITEM(list, i, text);
    }
    if (list == NULL) return CBN_HOST_ERROR;
    PyObject *answer = PyObject_CallFunction(j->concatenate, "Ni", list, axis);
    if (answer == NULL) return CBN_HOST_ERROR;
    Py_XSETREF(j->name, answer);
    *name = PyUnicode_AsUTF8(answer); /* TypeError when it is no str */
    return *name == NULL ? CBN_HOST_ERROR : CBN_OK;
}

static cbn_status step(cbn_freeze *f, void *arg) { return cbn_pass_concat_matmul(f, arg); }

/* pass_concat_matmul(graph, root, slice, clone, parameter, concatenate) -> (changed, rows) */
static PyObject *pass_concat_matmul(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_concat_matmul", nargs, 6)) return NULL;
    joiner j = {.host = {.slice = args[2], .clone = args[3], .ndarray = is_ndarray, .concatenate = concatenate},
                .parameter = args[4],
                .concatenate = args[5]};
    j.host.arg = &j;
    PyObject *result = cbn_py_step_run(args[0], args[1], step, &j.host);
    Py_XDECREF(j.name);
    return result;
}

PyMethodDef cbn_pass_matmul_methods[] = {
    {"pass_concat_matmul", (PyCFunction)(void (*)(void))pass_concat_matmul, METH_FASTCALL,
     "pass_concat_matmul(graph, root, slice, clone, parameter, concatenate) -> (changed, rows)"},
    {0},
};
