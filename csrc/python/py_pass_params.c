/* SPDX-License-Identifier: BSD-3-Clause */
/* view_to_reshape and the freezing of parameters, for pyconvbn/_pass_params.py. */
#include "python/py_error.h"
#include "python/py_freeze.h"
#include "python/py_passes.h"

#include <string.h>

#include "graph/passes.h"

static cbn_status view_step(cbn_freeze *f, void *reshape) { return cbn_pass_view_to_reshape(f, reshape); }

/* pass_view_to_reshape(graph, root, reshape) -> (nodes changed, rows) */
static PyObject *pass_view_to_reshape(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_view_to_reshape", nargs, 3)) return NULL;
    return cbn_py_step_run(args[0], args[1], view_step, args[2]);
}

typedef struct maker {
    PyObject *constants, *names; /* _pass_run.Constants; {id of an array: name of its constant} */
} maker;

/* The name in the dict, else a new constant. New reference. */
static PyObject *constant_name(const maker *m, PyObject *array) {
    PyObject *key = PyLong_FromVoidPtr(array), *name = NULL;
    if (key != NULL) name = Py_XNewRef(PyDict_GetItemWithError(m->names, key));
    if (name == NULL && !PyErr_Occurred()) {
        name = cbn_py_constant_add(m->constants, array);
        if (name != NULL && PyDict_SetItem(m->names, key, name) < 0) Py_CLEAR(name);
    }
    Py_XDECREF(key);
    return name;
}

static cbn_status constant(cbn_graph *g, cbn_host array, cbn_str *out, void *arg, cbn_error *err) {
    *out = CBN_STR_NONE;
    if (!PyArray_Check((PyObject *)array)) return CBN_OK; /* a tensor */
    cbn_graph_lock(g);
    PyObject *name = constant_name(arg, array);
    cbn_graph_unlock(g);
    Py_ssize_t len = 0;
    const char *text = name == NULL ? NULL : PyUnicode_AsUTF8AndSize(name, &len);
    const cbn_status status = text == NULL ? CBN_HOST_ERROR : cbn_graph_intern(g, text, (size_t)len, out, err);
    Py_XDECREF(name);
    return status;
}

static cbn_status params_step(cbn_freeze *f, void *host) { return cbn_pass_params(f, host); }

/* "M": mutated, "O": aliases an output, anything else: may become a constant. */
static bool reasons_of(PyObject *given, Py_ssize_t count, uint8_t **out) {
    *out = NULL;
    if (given == Py_None) return true;
    if (!PyBytes_Check(given) || PyBytes_GET_SIZE(given) != count) {
        PyErr_SetString(PyExc_TypeError, "given: expected None or bytes, one for each parameter");
        return false;
    }
    *out = PyMem_Calloc((size_t)count + 1, 1);
    if (*out == NULL) return PyErr_NoMemory(), false;
    for (Py_ssize_t i = 0; i < count; i++) {
        const char c = PyBytes_AS_STRING(given)[i];
        (*out)[i] = c == 'M' ? CBN_FREEZE_MUTATED : c == 'O' ? CBN_FREEZE_ALIASES_OUTPUT : CBN_FREEZE_OK;
    }
    return true;
}

static bool all_arrays(PyObject *params) {
    if (!PyTuple_Check(params) || PyTuple_GET_SIZE(params) > INT32_MAX) {
        PyErr_SetString(PyExc_TypeError, "params: expected a tuple of arrays");
        return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(params); i++) {
        PyObject *item = PyTuple_GET_ITEM(params, i);
        if (!PyArray_Check(item)) {
            PyErr_Format(PyExc_TypeError, "params: expected arrays, got %.200s", Py_TYPE(item)->tp_name);
            return false;
        }
    }
    return true;
}

/* pass_params(graph, root, constants, names, params, given) -> (nodes changed, rows) */
static PyObject *pass_params(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_params", nargs, 6)) return NULL;
    maker m = {args[2], args[3]};
    PyObject *params = args[4];
    uint8_t *given;
    if (!PyDict_Check(m.names)) {
        PyErr_SetString(PyExc_TypeError, "names: expected a dict");
        return NULL;
    }
    if (!all_arrays(params) || !reasons_of(args[5], PyTuple_GET_SIZE(params), &given)) return NULL;
    cbn_params_host host = {.nparams = (uint32_t)PyTuple_GET_SIZE(params),
                            .params = (const cbn_host *)PySequence_Fast_ITEMS(params),
                            .given = given,
                            .stem = "_frozen_param",
                            .constant = constant,
                            .arg = &m};
    PyObject *result = cbn_py_step_run(args[0], args[1], params_step, &host);
    PyMem_Free(given);
    return result;
}

PyMethodDef cbn_pass_params_methods[] = {
    {"pass_view_to_reshape", (PyCFunction)(void (*)(void))pass_view_to_reshape, METH_FASTCALL,
     "pass_view_to_reshape(graph, root, reshape) -> (nodes changed, rows)"},
    {"pass_params", (PyCFunction)(void (*)(void))pass_params, METH_FASTCALL,
     "pass_params(graph, root, constants, names, params, given) -> (nodes changed, rows)"},
    {0},
};
