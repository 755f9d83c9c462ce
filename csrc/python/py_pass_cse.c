/* SPDX-License-Identifier: BSD-3-Clause */
/* Elimination of common subexpressions for Python: which literals are values, and the entry point. */
#include "python/py_freeze.h"

#include "graph/passes.h"
#include "python/py_passes.h"

#include <string.h>

enum { SCALAR_BYTES = 32 }; /* the largest of NumPy's numbers: complex long double */

/* The bytes of one of NumPy's own number types (not of a subclass); false: something else. */
static bool scalar_bytes(PyObject *obj, char bytes[SCALAR_BYTES], size_t *size) {
    if (!PyArray_IsScalar(obj, Number) && !PyArray_IsScalar(obj, Bool)) return false;
    PyArray_Descr *descr = PyArray_DescrFromScalar(obj);
    if (descr == NULL) return PyErr_Clear(), false;
    *size = (size_t)PyDataType_ELSIZE(descr);
    const bool plain = descr->typeobj == Py_TYPE(obj) && PyTypeNum_ISNUMBER(descr->type_num);
    const bool boolean = descr->type_num == NPY_BOOL;
    Py_DECREF(descr);
    if ((!plain && !boolean) || *size > SCALAR_BYTES) return false;
    memset(bytes, 0, SCALAR_BYTES); /* long doubles have bytes that nobody writes */
    PyArray_ScalarAsCtype(obj, bytes);
    return true;
}

static uint64_t hash_bytes(uint64_t h, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)bytes[i]) * UINT64_C(0x100000001b3); /* FNV-1a */
    return h;
}

/* Numbers beyond int64, complex numbers, bytes and NumPy's numbers: their own types exactly, whose hashes and comparisons
 * run no code but the interpreter's. */
static bool literal_hash(cbn_host h, uint64_t *out) {
    PyObject *obj = h;
    const uint64_t type = (uint64_t)(uintptr_t)Py_TYPE(obj);
    char bytes[SCALAR_BYTES];
    size_t size;
    if (PyComplex_CheckExact(obj)) {
        const Py_complex v = PyComplex_AsCComplex(obj);
        *out = hash_bytes(type, (const char *)&v, sizeof v);
        return true;
    }
    if (PyLong_CheckExact(obj) || PyBytes_CheckExact(obj)) {
        *out = type ^ (uint64_t)PyObject_Hash(obj);
        return true;
    }
    if (!scalar_bytes(obj, bytes, &size)) return false;
    *out = hash_bytes(type, bytes, size);
    return true;
}

static bool literal_same(cbn_host a, cbn_host b) {
    PyObject *x = a, *y = b;
    char p[SCALAR_BYTES], q[SCALAR_BYTES];
    size_t m, n;
    if (Py_TYPE(x) != Py_TYPE(y)) return false;
    if (PyComplex_CheckExact(x)) {
        const Py_complex v = PyComplex_AsCComplex(x), w = PyComplex_AsCComplex(y);
        return memcmp(&v, &w, sizeof v) == 0;
    }
    if (PyLong_CheckExact(x) || PyBytes_CheckExact(x)) {
        const int same = PyObject_RichCompareBool(x, y, Py_EQ);
        if (same < 0) PyErr_Clear();
        return same == 1;
    }
    return scalar_bytes(x, p, &m) && scalar_bytes(y, q, &n) && m == n && memcmp(p, q, m) == 0;
}

/* A module that does not say whether it trains is left alone as if it did. */
static cbn_status training(cbn_host module, bool *out, cbn_error *err) {
    (void)err;
    *out = true;
    PyObject *value = PyObject_GetAttrString(module, "training");
    if (value == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return CBN_HOST_ERROR;
        PyErr_Clear();
        return CBN_OK;
    }
    const int truth = PyObject_IsTrue(value);
    Py_DECREF(value);
    *out = truth != 0;
    return truth < 0 ? CBN_HOST_ERROR : CBN_OK;
}

static cbn_status step(cbn_freeze *f, void *arg) { return cbn_pass_cse(f, arg); }

/* pass_cse(graph, root) -> (nodes merged, rows) */
static PyObject *pass_cse(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_cse", nargs, 2)) return NULL;
    cbn_cse_host host = {.literal_hash = literal_hash, .literal_same = literal_same, .training = training};
    return cbn_py_step_run(args[0], args[1], step, &host);
}

PyMethodDef cbn_pass_cse_methods[] = {
    {"pass_cse", (PyCFunction)(void (*)(void))pass_cse, METH_FASTCALL, "pass_cse(graph, root) -> (nodes merged, rows)"},
    {0},
};
