/* SPDX-License-Identifier: BSD-3-Clause */
#include "python/py_error.h"


/* A new reference, or NULL with an exception. Looked up at the moment of the failure: the package need not be
 * imported for the extension to work, and errors are rare. */
static PyObject *fold_error_type(void) {
    PyObject *module = PyImport_ImportModule("pyconvbn.errors");
    if (module == NULL) return NULL;
    PyObject *type = PyObject_GetAttrString(module, "FoldError");
    Py_DECREF(module);
    return type;
}

static PyObject *raise_fold_error(const cbn_error *err) {
    PyObject *type = fold_error_type();
    if (type == NULL) return NULL;
    PyObject *exc = PyObject_CallFunction(type, "sz", err->message, err->reason);
    if (exc != NULL) PyErr_SetObject(type, exc);
    Py_XDECREF(exc);
    Py_DECREF(type);
    return NULL;
}

PyObject *cbn_py_raise(cbn_status status, const cbn_error *err) {
    /* FoldError is no constant of this process: NULL in the table sends it to raise_fold_error. */
    PyObject *const FoldError = NULL;
    PyObject *const table[] = {
#define CBN_STATUS_EXC_(code, exc) [CBN_##code] = exc,
        CBN_STATUS_LIST(CBN_STATUS_EXC_)
#undef CBN_STATUS_EXC_
    };
    assert(status != CBN_OK);
    if (status == CBN_HOST_ERROR) {
        /* A callback (an object's __eq__, an attribute) raised: its exception is set already. */
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_SystemError, "a callback failed without an exception");
        return NULL;
    }
    if (table[status] == NULL) return raise_fold_error(err);
    PyErr_SetString(table[status], err->message);
    return NULL;
}

bool cbn_py_nargs(const char *function, Py_ssize_t got, Py_ssize_t want) {
    if (got == want) return true;
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", function, want, got);
    return false;
}

bool cbn_py_int64(PyObject *obj, const char *name, int64_t *out) {
    PyObject *index = PyNumber_Index(obj);
    if (index == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return false;
        PyErr_Format(PyExc_TypeError, "%s: expected an int, got %.200s", name, Py_TYPE(obj)->tp_name);
        return false;
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected an int of 64 bits, got %S", name, index);
        Py_DECREF(index);
        return false;
    }
    Py_DECREF(index);
    *out = (int64_t)value;
    return true;
}

bool cbn_py_ints(PyObject *obj, const char *name, int count, int64_t *out) {
    if (PyIndex_Check(obj) && !PySequence_Check(obj)) {
        int64_t value;
        if (!cbn_py_int64(obj, name, &value)) return false;
        for (int i = 0; i < count; i++) out[i] = value;
        return true;
    }
    if (PyUnicode_Check(obj) || PyBytes_Check(obj) || !PySequence_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an int or %d ints, got %R", name, count, obj);
        return false;
    }
    PyObject *items = PySequence_Fast(obj, "expected a sequence");
    if (items == NULL) {
        /* A 0-d array has __len__ in its type but no length: it is a plain integer. */
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return false;
        PyErr_Clear();
        int64_t value;
        if (!cbn_py_int64(obj, name, &value)) return false;
        for (int i = 0; i < count; i++) out[i] = value;
        return true;
    }
    bool ok = false;
    const Py_ssize_t got = PySequence_Fast_GET_SIZE(items);
    if (got != count && got != 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected an int or %d ints, got %zd: %R", name, count, got, obj);
        goto done;
    }
    for (int i = 0; i < count; i++) {
        PyObject *item = PySequence_Fast_GET_ITEM(items, got == 1 ? 0 : i);
        if (!cbn_py_int64(item, name, &out[i])) goto done;
    }
    ok = true;
done:
    Py_DECREF(items);
    return ok;
}

bool cbn_py_double(PyObject *obj, const char *name, double *out) {
    const double value = PyFloat_AsDouble(obj);
    if (value == -1.0 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Format(PyExc_TypeError, "%s: expected a float, got %.200s", name, Py_TYPE(obj)->tp_name);
        } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Format(PyExc_ValueError, "%s: expected a float, got an int beyond its range", name);
        }
        return false;
    }
    *out = value;
    return true;
}

bool cbn_py_bool(PyObject *obj, const char *name, bool *out) {
    if (PyBool_Check(obj)) {
        *out = obj == Py_True;
        return true;
    }
    if (PyArray_IsScalar(obj, Bool)) {
        *out = PyObject_IsTrue(obj) == 1;
        return true;
    }
    PyErr_Format(PyExc_TypeError, "%s: expected True or False, got %R", name, obj);
    return false;
}

int cbn_py_choice(PyObject *obj, const char *name, const char *const *choices) {
    const bool is_str = PyUnicode_Check(obj);
    for (int i = 0; is_str && choices[i] != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(obj, choices[i]) == 0) return i;
    }
    char list[256];
    int used = 0;
    list[0] = '\0';
    for (int i = 0; choices[i] != NULL && used < (int)sizeof list; i++) {
        used += PyOS_snprintf(list + used, sizeof list - (size_t)used, "%s'%s'", i ? ", " : "", choices[i]);
    }
    PyErr_Format(is_str ? PyExc_ValueError : PyExc_TypeError, "%s: expected one of %s, got %R", name, list, obj);
    return -1;
}
