/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: the kernel linear of each instruction set on the caller's own memory. The arrays are used as they
 * are (C-contiguous float32), and what would reach outside of them is refused. */
#include "python/py_error.h"
#include "python/py_module.h"

#include <string.h>

#include "kernels/cbn_kernels.h"

/* The floats of an ndarray, NULL and an error when it is something else or has fewer than `least`. */
static float *floats(PyObject *obj, const char *name, int64_t least) {
    if (!PyArray_Check(obj) || PyArray_TYPE((PyArrayObject *)obj) != NPY_FLOAT ||
        !PyArray_ISCARRAY_RO((PyArrayObject *)obj)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous ndarray of float32", name);
        return NULL;
    }
    if (PyArray_SIZE((PyArrayObject *)obj) < least) {
        PyErr_Format(PyExc_ValueError, "%s: too small", name);
        return NULL;
    }
    return PyArray_DATA((PyArrayObject *)obj);
}

static PyObject *linear(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"isa", "rows", "x", "w", "ic", "oc", "y", "bias", "lo", "hi", NULL};
    const char *isa;
    int rows;
    long long ic, oc;
    float lo, hi;
    PyObject *o[4];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "siOOLLOOff:linear", names, &isa, &rows, &o[0], &o[1], &ic, &oc,
                                     &o[2], &o[3], &lo, &hi))
        return NULL;
    const cbn_kernels *k = NULL;
    for (const cbn_kernels *const *t = cbn_kernels_available(); *t; t++)
        if (strcmp((*t)->isa, isa) == 0) k = *t;
    if (!k) return PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got '%s'", isa);
    if (rows < 1 || rows > CBN_LINEAR_ROWS || ic < 0 || oc < 1 || ic > 1 << 24 || oc > 1 << 24)
        return PyErr_Format(PyExc_ValueError, "rows, ic, oc: not a call of this kernel");
    const int64_t width = 2 * k->lanes, packed = cbn_ceil_div(oc, width) * width;
    const float *x = floats(o[0], "x", rows * ic), *w = x ? floats(o[1], "w", packed * ic) : NULL;
    float *y = w ? floats(o[2], "y", rows * oc) : NULL;
    const float *bias = y ? floats(o[3], "bias", oc) : NULL;
    if (!bias) return NULL;
    const cbn_linear_args a = {.x = x, .x_p = ic, .w = w, .w_b = width * ic, .ic = ic, .y = y, .y_p = oc,
                               .oc_valid = oc, .first = true, .last = true, .epi = {bias, NULL, lo, hi}};
    k->linear(rows, &a);
    Py_RETURN_NONE;
}

PyMethodDef cbn_testing_linear_methods[] = {
    {"linear", (PyCFunction)(void (*)(void))linear, METH_VARARGS | METH_KEYWORDS,
     "linear(isa, rows, x, w, ic, oc, y, bias, lo, hi): w is [blocks][ic][2*lanes]."},
    {NULL, NULL, 0, NULL},
};
