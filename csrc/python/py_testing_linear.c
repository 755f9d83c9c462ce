/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: the kernels linear and linear_raw of each instruction set. */
#include "python/py_module.h"
#include "python/py_testing.h"

static PyObject *run(PyObject *args, PyObject *kwargs, bool raw) {
    static char *names[] = {"isa", "rows", "x", "w", "ic", "oc", "y", "bias", "lo", "hi", NULL};
    const char *isa;
    int rows;
    long long ic, oc;
    float lo, hi;
    PyObject *o[4];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "siOOLLOOff:linear", names, &isa, &rows, &o[0], &o[1], &ic, &oc,
                                     &o[2], &o[3], &lo, &hi))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    if (!k) return NULL;
    if (rows < 1 || rows > (raw ? CBN_LINEAR_RAW_ROWS : CBN_LINEAR_ROWS) || ic < 0 || oc < 1 || ic > 1 << 24 || oc > 1 << 24)
        return cbn_testing_refuse("rows, ic, oc: not a call of this kernel");
    const int64_t width = 2 * k->lanes, padded = raw ? oc : cbn_ceil_div(oc, width) * width;
    const float *x = cbn_testing_array(o[0], "x", NPY_FLOAT, rows * ic, NULL);
    const float *w = x ? cbn_testing_array(o[1], "w", NPY_FLOAT, padded * ic, NULL) : NULL;
    float *y = w ? cbn_testing_array(o[2], "y", NPY_FLOAT, rows * oc, NULL) : NULL;
    const float *bias = y ? cbn_testing_array(o[3], "bias", NPY_FLOAT, oc, NULL) : NULL;
    if (!bias) return NULL;
    const cbn_linear_args a = {.x = x, .x_p = ic, .w = w, .w_b = raw ? ic : width * ic, .ic = ic, .y = y, .y_p = oc,
                               .oc_valid = oc, .first = true, .last = true, .epi = {bias, NULL, lo, hi}};
    (raw ? k->linear_raw : k->linear)(rows, &a);
    Py_RETURN_NONE;
}

static PyObject *linear(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return run(args, kwargs, false);
}

static PyObject *linear_raw(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return run(args, kwargs, true);
}

PyMethodDef cbn_testing_linear_methods[] = {
    {"linear", (PyCFunction)(void (*)(void))linear, METH_VARARGS | METH_KEYWORDS,
     "linear(isa, rows, x, w, ic, oc, y, bias, lo, hi): w is [blocks][ic][2*lanes]."},
    {"linear_raw", (PyCFunction)(void (*)(void))linear_raw, METH_VARARGS | METH_KEYWORDS,
     "linear_raw(isa, rows, x, w, ic, oc, y, bias, lo, hi): w is [oc][ic]."},
    {NULL, NULL, 0, NULL},
};
