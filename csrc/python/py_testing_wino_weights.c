/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: wino_weights of each instruction set on the caller's own memory. What would reach outside of the
 * arrays is refused. */
#include "python/py_error.h"
#include "python/py_module.h"

#include <string.h>

#include "kernels/cbn_kernels.h"
#include "ops/wino_matrix.h"

/* The memory of a C-contiguous array of `type` with `ndim` axes, NULL and an error when it is something else. */
static void *get(PyObject *obj, const char *name, int type, int ndim, int64_t *shape) {
    if (!PyArray_Check(obj) || PyArray_TYPE((PyArrayObject *)obj) != type ||
        PyArray_NDIM((PyArrayObject *)obj) != ndim || !PyArray_ISCARRAY_RO((PyArrayObject *)obj)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous ndarray of %d axes and the kernel's dtype", name, ndim);
        return NULL;
    }
    for (int i = 0; i < ndim; i++) shape[i] = PyArray_DIM((PyArrayObject *)obj, i);
    return PyArray_DATA((PyArrayObject *)obj);
}

static bool is_axis(int n, int m) { return (n == 1 && m == 1) || (n == 4 && m >= 2 && m < 4) || (n == 6 && m >= 2 && m < 6); }

static PyObject *wino_weights(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    int nh, mh, nw, mw;
    PyObject *o[3];
    if (!PyArg_ParseTuple(args, "siiiiOOO:wino_weights", &isa, &nh, &mh, &nw, &mw, &o[0], &o[1], &o[2])) return NULL;
    const cbn_kernels *k = NULL;
    for (const cbn_kernels *const *t = cbn_kernels_available(); *t; t++)
        if (strcmp((*t)->isa, isa) == 0) k = *t;
    if (!k) return PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got '%s'", isa);
    int64_t ws[3], ts[2], us[3];
    const float *w = get(o[0], "w", NPY_FLOAT, 3, ws);
    const int32_t *tap = w ? get(o[1], "tap", NPY_INT32, 2, ts) : NULL;
    float *u = tap ? get(o[2], "u", NPY_FLOAT, 3, us) : NULL;
    if (!u) return NULL;
    bool ok = is_axis(nh, mh) && is_axis(nw, mw) && ts[0] >= 1 && ts[0] <= nh - mh + 1 && ts[1] >= 1 &&
              ts[1] <= nw - mw + 1 && ws[2] == k->lanes && us[2] == k->lanes && us[0] == nh * nw && us[1] == ws[0];
    int32_t at[CBN_WINO_POINTS * CBN_WINO_POINTS];
    for (int64_t i = 0; ok && i < ts[0] * ts[1]; i++) {
        ok = tap[i] < ws[1];
        at[i] = tap[i] < 0 ? -1 : tap[i] * k->lanes;
    }
    if (!ok) return PyErr_Format(PyExc_ValueError, "wino_weights: the arguments do not fit each other");
    double gh[CBN_WINO_POINTS][CBN_WINO_POINTS], gw[CBN_WINO_POINTS][CBN_WINO_POINTS];
    cbn_wino_g(nh, mh, gh);
    cbn_wino_g(nw, mw, gw);
    const cbn_wino_weights_args a = {.nh = nh, .nw = nw, .high = (int)ts[0], .wide = (int)ts[1], .gh = gh[0], .gw = gw[0],
                                     .w = w, .w_c = ws[1] * k->lanes, .tap = at, .u = u, .u_c = k->lanes,
                                     .u_xi = ws[0] * k->lanes, .n = ws[0]};
    k->wino_weights(&a);
    Py_RETURN_NONE;
}

PyMethodDef cbn_testing_wino_weights_methods[] = {
    {"wino_weights", wino_weights, METH_VARARGS,
     "wino_weights(isa, nh, mh, nw, mw, w, tap, u): w is [channel][tap][lane], tap [high][wide], u [point][channel][lane]."},
    {NULL, NULL, 0, NULL},
};
