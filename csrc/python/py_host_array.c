/* SPDX-License-Identifier: BSD-3-Clause */
/* The memory of arrays, and all arrays that a module holds. torch is never imported from here: while it is not
 * imported, none of its objects can exist. */
#include "python/py_graph.h"

static PyTypeObject *torch_tensor; /* owned */
static PyObject *name_dlpack, *name_kinds, *name_modules;

static bool names_get(void) {
    if (name_dlpack == NULL) name_dlpack = PyUnicode_InternFromString("__dlpack__");
    if (name_kinds == NULL) name_kinds = PyUnicode_InternFromString("_kinds");
    if (name_modules == NULL) name_modules = PyUnicode_InternFromString("_modules");
    return name_dlpack != NULL && name_kinds != NULL && name_modules != NULL;
}

static void info_of_array(PyArrayObject *a, cbn_array_info *out) {
    out->ndim = PyArray_NDIM(a); /* field by field: entries of shape beyond ndim are nobody's business */
    out->kind = PyArray_DESCR(a)->kind;
    out->finite = false;
    const npy_intp itemsize = PyArray_ITEMSIZE(a);
    out->itemsize = (uint8_t)CBN_MIN(itemsize, 255);
    const char *lo = PyArray_BYTES(a), *hi = lo;
    for (int i = 0; i < out->ndim; i++) {
        if (i < CBN_MAX_DIMS) out->shape[i] = PyArray_DIM(a, i);
        const npy_intp reach = (PyArray_DIM(a, i) - 1) * PyArray_STRIDE(a, i);
        if (reach < 0) lo += reach;
        else hi += reach;
    }
    const bool empty = PyArray_SIZE(a) == 0;
    out->lo = empty ? PyArray_BYTES(a) : lo;
    out->hi = empty ? out->lo : hi + itemsize;
    if (out->ndim > CBN_MAX_DIMS) out->ndim = CBN_MAX_DIMS; /* NumPy 2 allows 64 axes; only the range matters then */
}

static bool is_torch_tensor(PyObject *obj, bool *out) {
    *out = false;
    if (torch_tensor == NULL) {
        PyObject *key = PyUnicode_FromString("torch");
        PyObject *torch = key == NULL ? NULL : PyImport_GetModule(key);
        Py_XDECREF(key);
        if (torch == NULL) return !PyErr_Occurred();
        PyObject *cls = PyObject_GetAttrString(torch, "Tensor");
        Py_DECREF(torch);
        if (cls == NULL || !PyType_Check(cls)) { /* in the middle of its import */
            Py_XDECREF(cls);
            PyErr_Clear();
            return true;
        }
        torch_tensor = (PyTypeObject *)cls;
    }
    *out = PyType_IsSubtype(Py_TYPE(obj), torch_tensor);
    return true;
}

/* A tensor that NumPy cannot show (device, dtype, not initialised): an array that may share memory with anything. */
static void info_unknown(cbn_array_info *out) {
    *out = (cbn_array_info){.lo = NULL, .hi = (const char *)UINTPTR_MAX, .ndim = 0, .kind = 'O'};
}

cbn_status cbn_py_host_array(cbn_host h, cbn_array_info *out, bool *is_array, cbn_error *err) {
    (void)err;
    PyObject *obj = h;
    *is_array = false;
    if (PyArray_Check(obj)) {
        info_of_array((PyArrayObject *)obj, out);
        *is_array = true;
        return CBN_OK;
    }
    bool tensor;
    if (!names_get() || !is_torch_tensor(obj, &tensor)) return CBN_HOST_ERROR;
    PyObject *array = NULL;
    if (tensor) {
        PyObject *detached = PyObject_CallMethod(obj, "detach", NULL);
        array = detached == NULL ? NULL : PyObject_CallMethod(detached, "numpy", NULL);
        Py_XDECREF(detached);
    } else if (_PyType_Lookup(Py_TYPE(obj), name_dlpack) != NULL) {
        PyObject *numpy = PyImport_ImportModule("numpy");
        array = numpy == NULL ? NULL : PyObject_CallMethod(numpy, "from_dlpack", "O", obj);
        Py_XDECREF(numpy);
    } else {
        return CBN_OK;
    }
    *is_array = true;
    if (array != NULL && PyArray_Check(array)) {
        info_of_array((PyArrayObject *)array, out);
    } else {
        if (array == NULL && !PyErr_ExceptionMatches(PyExc_Exception)) return CBN_HOST_ERROR;
        PyErr_Clear();
        info_unknown(out);
    }
    Py_XDECREF(array);
    return CBN_OK;
}

/* Subclasses may hold anything; np.void is a window on memory. */
bool cbn_py_host_plain(cbn_host h) {
    PyObject *obj = h;
    if (PyTuple_CheckExact(obj)) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(obj); i++) {
            PyObject *item = PyTuple_GET_ITEM(obj, i);
            if (PyTuple_Check(item) || !cbn_py_host_plain(item)) return false;
        }
        return true;
    }
    return obj == Py_None || PyBool_Check(obj) || PyLong_CheckExact(obj) || PyFloat_CheckExact(obj) ||
           PyComplex_CheckExact(obj) || PyUnicode_CheckExact(obj) || PyArray_IsScalar(obj, Number) ||
           PyArray_IsScalar(obj, Bool);
}

/* ---- everything a module holds ---- */

typedef struct walk {
    cbn_status (*fn)(cbn_host array, void *arg);
    void *arg;
    cbn_error *err;
    PyObject *seen; /* ids */
} walk;

static cbn_status walk_object(walk *w, PyObject *obj, int nesting);

static cbn_status walk_items(walk *w, PyObject *list, int nesting) {
    cbn_status status = CBN_OK;
    for (Py_ssize_t i = 0; status == CBN_OK && i < PyList_GET_SIZE(list); i++) {
        status = walk_object(w, PyList_GET_ITEM(list, i), nesting);
    }
    Py_DECREF(list);
    return status;
}

/* nesting: how many levels of list, tuple and dict may still be entered (a module's own dicts are always). */
static cbn_status walk_object(walk *w, PyObject *obj, int nesting) {
    if (PyUnicode_Check(obj) || PyLong_Check(obj) || PyFloat_Check(obj) || obj == Py_None) return CBN_OK;
    if (PyTuple_Check(obj) || PyList_Check(obj) || PyDict_Check(obj)) {
        if (nesting == 0) return CBN_OK;
        /* A list of its own: host code may change the original while we walk. */
        PyObject *items = PyDict_Check(obj) ? PyDict_Values(obj) : PySequence_List(obj);
        return items == NULL ? CBN_HOST_ERROR : walk_items(w, items, nesting - 1);
    }
    cbn_array_info info;
    bool is_array;
    CBN_TRY(cbn_py_host_array(obj, &info, &is_array, w->err));
    if (is_array) return w->fn(obj, w->arg);
    PyObject *dict = PyType_Check(obj) ? NULL : PyObject_GenericGetDict(obj, NULL);
    if (dict == NULL) return PyErr_Clear(), CBN_OK; /* it holds nothing */
    Py_DECREF(dict);                                /* the instance keeps it */
    if (!PyDict_Check(dict)) return CBN_OK;
    const int ours = PyDict_Contains(dict, name_kinds), theirs = PyDict_Contains(dict, name_modules);
    if (ours < 0 || theirs < 0) return CBN_HOST_ERROR;
    if (!ours && !theirs) return CBN_OK; /* no module */
    PyObject *id = PyLong_FromVoidPtr(obj);
    const int seen = id == NULL ? -1 : PySet_Contains(w->seen, id);
    if (seen != 0 || PySet_Add(w->seen, id) < 0) {
        Py_XDECREF(id);
        return seen == 1 ? CBN_OK : CBN_HOST_ERROR;
    }
    Py_DECREF(id);
    if (Py_EnterRecursiveCall(" while walking the arrays of a module")) return CBN_HOST_ERROR;
    PyObject *items = PyDict_Values(dict);
    const cbn_status status = items == NULL ? CBN_HOST_ERROR : walk_items(w, items, 2);
    Py_LeaveRecursiveCall();
    return status;
}

cbn_status cbn_py_host_module_arrays(cbn_host h, cbn_status (*fn)(cbn_host array, void *arg), void *arg,
                                     cbn_error *err) {
    if (!names_get()) return CBN_HOST_ERROR;
    walk w = {fn, arg, err, PySet_New(NULL)};
    if (w.seen == NULL) return CBN_HOST_ERROR;
    const cbn_status status = walk_object(&w, h, 0);
    Py_DECREF(w.seen);
    return status;
}
