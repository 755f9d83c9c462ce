/* SPDX-License-Identifier: BSD-3-Clause */
/* Handles of the graph are Python objects: reference counts, comparison of literals, a word about one for messages.
 * What needs to look into arrays and modules is in py_host_module.c. */
#include "python/py_graph_priv.h"

#include <string.h>

static void retain(cbn_host h) { Py_INCREF((PyObject *)h); }
static void release(cbn_host h) { Py_DECREF((PyObject *)h); }

/* Same type and ==. Floats and complex numbers (subclasses such as numpy.float64) by bit pattern. An answer that is not
 * a truth value, as arrays give it, is no. */
static cbn_status equal(cbn_host a, cbn_host b, bool *out, cbn_error *err) {
    PyObject *x = a, *y = b;
    (void)err;
    *out = false;
    if (Py_TYPE(x) != Py_TYPE(y) || PyArray_Check(x)) return CBN_OK;
    if (PyFloat_Check(x)) {
        const double p = PyFloat_AS_DOUBLE(x), q = PyFloat_AS_DOUBLE(y);
        *out = memcmp(&p, &q, sizeof p) == 0;
        return CBN_OK;
    }
    if (PyComplex_Check(x)) {
        const Py_complex p = PyComplex_AsCComplex(x), q = PyComplex_AsCComplex(y);
        *out = memcmp(&p, &q, sizeof p) == 0;
        return CBN_OK;
    }
    PyObject *answer = PyObject_RichCompare(x, y, Py_EQ);
    if (answer == NULL) return CBN_HOST_ERROR;
    if (PyBool_Check(answer)) *out = answer == Py_True;
    else if (PyArray_IsScalar(answer, Bool)) *out = PyObject_IsTrue(answer) == 1;
    Py_DECREF(answer);
    return CBN_OK;
}

/* "module.name" of a callable, repr() of anything else; NULL with an exception. */
static PyObject *describe_text(PyObject *obj) {
    if (!PyCallable_Check(obj)) return PyObject_Repr(obj);
    PyObject *name = PyObject_GetAttr(obj, cbn_ids.__name__);
    if (name == NULL || !PyUnicode_Check(name)) {
        PyErr_Clear();
        Py_XDECREF(name);
        return PyObject_Repr(obj);
    }
    PyObject *module = PyObject_GetAttrString(obj, "__module__");
    if (module == NULL || !PyUnicode_Check(module)) {
        PyErr_Clear();
        Py_XDECREF(module);
        return name;
    }
    PyObject *text = PyUnicode_FromFormat("%U.%U", module, name);
    Py_DECREF(module);
    Py_DECREF(name);
    return text;
}

static void describe(cbn_host h, char *buf, size_t size) {
    if (size == 0) return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *text = describe_text(h);
    Py_ssize_t len = 0;
    const char *utf8 = text != NULL && PyUnicode_Check(text) ? PyUnicode_AsUTF8AndSize(text, &len) : NULL;
    if (utf8 == NULL) {
        PyOS_snprintf(buf, size, "<%s>", Py_TYPE((PyObject *)h)->tp_name);
    } else {
        size_t n = CBN_MIN((size_t)len, size - 1);
        while (n > 0 && n < (size_t)len && ((unsigned char)utf8[n] & 0xC0) == 0x80) n--; /* not through a character */
        memcpy(buf, utf8, n);
        buf[n] = '\0';
    }
    Py_XDECREF(text);
    PyErr_Restore(type, value, traceback);
}

const cbn_host_vtable cbn_py_host_vtable = {
    .retain = retain,
    .release = release,
    .equal = equal,
    .describe = describe,
    .array = cbn_py_host_array,
    .resolve = cbn_py_host_resolve,
    .module = cbn_py_host_module,
    .module_arrays = cbn_py_host_module_arrays,
    .batch_norms = cbn_py_host_batch_norms,
    .plain = cbn_py_host_plain,
};
