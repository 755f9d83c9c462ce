/* SPDX-License-Identifier: BSD-3-Clause */
/* Layouts for Python: strides are noted in the metadata of nodes, by pyconvbn/_pass_layout.py. */
#include "python/py_freeze.h"

#include "graph/passes.h"
#include "python/py_passes.h"

static bool is_ndarray(cbn_host object) { return PyArray_Check((PyObject *)object); }

/* Are the axes n, h, w, c in this order in memory, without gaps? An axis of one entry has no say. */
static bool is_channels_last(cbn_host object) {
    PyArrayObject *a = object;
    static const int order[] = {1, 3, 2, 0};
    npy_intp step = PyArray_ITEMSIZE(a);
    for (int i = 0; i < 4; i++) {
        const npy_intp size = PyArray_DIM(a, order[i]);
        if (size != 1 && PyArray_STRIDE(a, order[i]) != step) return false;
        step *= size;
    }
    return true;
}

static bool read_int(PyObject *obj, int64_t *out) {
    *out = PyLong_CheckExact(obj) ? PyLong_AsLongLong(obj) : -1;
    if (*out >= 0) return true;
    PyErr_Clear(); /* too large: no strides of anything */
    return false;
}

/* meta["strides"]: a tuple of ints; None: the array is not dense. meta["storage_offset"]: not there when 0. */
static cbn_status strides(cbn_host meta, cbn_strides *out, cbn_error *err) {
    (void)err;
    out->ndim = CBN_STRIDES_UNKNOWN;
    if (!PyDict_Check((PyObject *)meta)) return CBN_OK;
    PyObject *key = PyUnicode_InternFromString("strides"), *offset_key = PyUnicode_InternFromString("storage_offset");
    PyObject *value = key == NULL ? NULL : Py_XNewRef(PyDict_GetItemWithError(meta, key)),
             *offset = offset_key == NULL || PyErr_Occurred() ? NULL
                                                              : Py_XNewRef(PyDict_GetItemWithError(meta, offset_key));
    if (value == Py_None) out->ndim = CBN_STRIDES_NOT_DENSE;
    if (value != NULL && PyTuple_Check(value) && PyTuple_GET_SIZE(value) <= CBN_MAX_DIMS) {
        bool ok = true;
        for (Py_ssize_t i = 0; ok && i < PyTuple_GET_SIZE(value); i++) {
            ok = read_int(PyTuple_GET_ITEM(value, i), &out->stride[i]);
        }
        if (ok && offset != NULL) ok = read_int(offset, &out->offset);
        if (ok) out->ndim = (int)PyTuple_GET_SIZE(value);
    }
    Py_XDECREF(key);
    Py_XDECREF(offset_key);
    Py_XDECREF(value);
    Py_XDECREF(offset);
    return PyErr_Occurred() ? CBN_HOST_ERROR : CBN_OK;
}

static cbn_status weight_step(cbn_freeze *f, void *arg) { return cbn_pass_weight_layout(f, arg); }
static cbn_status input_step(cbn_freeze *f, void *arg) { return cbn_pass_input_layout(f, arg); }
static cbn_status output_step(cbn_freeze *f, void *arg) { return cbn_pass_output_layout(f, arg); }

static PyObject *run(const char *name, cbn_py_step_fn step, PyObject *const *args, Py_ssize_t nargs) {
    if (!cbn_py_nargs(name, nargs, 3)) return NULL;
    cbn_layout_host host = {.force = args[2],
                            .clone = args[2],
                            .strides = strides,
                            .ndarray = is_ndarray,
                            .channels_last = is_channels_last};
    return cbn_py_step_run(args[0], args[1], step, &host);
}

/* pass_weight_layout(graph, root, clone) -> (changed, rows) */
static PyObject *pass_weight_layout(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    return run("pass_weight_layout", weight_step, args, nargs);
}

/* pass_input_layout(graph, root, force_stride_order) -> (changed, rows) */
static PyObject *pass_input_layout(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    return run("pass_input_layout", input_step, args, nargs);
}

/* pass_output_layout(graph, root, force_stride_order) -> (changed, rows) */
static PyObject *pass_output_layout(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    return run("pass_output_layout", output_step, args, nargs);
}

PyMethodDef cbn_pass_layout_methods[] = {
    {"pass_weight_layout", (PyCFunction)(void (*)(void))pass_weight_layout, METH_FASTCALL,
     "pass_weight_layout(graph, root, clone) -> (changed, rows)"},
    {"pass_input_layout", (PyCFunction)(void (*)(void))pass_input_layout, METH_FASTCALL,
     "pass_input_layout(graph, root, force_stride_order) -> (changed, rows)"},
    {"pass_output_layout", (PyCFunction)(void (*)(void))pass_output_layout, METH_FASTCALL,
     "pass_output_layout(graph, root, force_stride_order) -> (changed, rows)"},
    {0},
};
