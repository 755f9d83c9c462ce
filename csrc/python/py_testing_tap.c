/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: conv_tap and rows_copy of each instruction set. */
#include "python/py_module.h"
#include "python/py_testing.h"

static PyObject *conv_tap(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"isa", "mr",   "x",    "xpix",     "tap", "w",  "y", "ypix",
                            "y_oc", "lanes", "bias", "residual", "lo",  "hi", NULL};
    const char *isa;
    int mr;
    long long y_oc, lanes;
    float lo, hi;
    PyObject *o[8];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "siOOOOOOLLOOff:conv_tap", names, &isa, &mr, &o[0], &o[1], &o[2],
                                     &o[3], &o[4], &o[5], &y_oc, &lanes, &o[6], &o[7], &lo, &hi))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    cbn_span x, xpix, tap, w, y, ypix, bias, residual;
    if (!k || !cbn_testing_span(o[0], "x", NPY_FLOAT, &x) || !cbn_testing_span(o[1], "xpix", NPY_INT64, &xpix) ||
        !cbn_testing_span(o[2], "tap", NPY_INT32, &tap) || !cbn_testing_span(o[3], "w", NPY_FLOAT, &w) ||
        !cbn_testing_span(o[4], "y", NPY_FLOAT, &y) || !cbn_testing_span(o[5], "ypix", NPY_INT64, &ypix) ||
        !cbn_testing_span(o[6], "bias", NPY_FLOAT, &bias) || !cbn_testing_span(o[7], "residual", NPY_FLOAT, &residual))
        return NULL;
    if (mr < 1 || mr > k->tap_mr || lanes < 1 || lanes > k->lanes || y_oc < 0 || xpix.size != ypix.size)
        return cbn_testing_refuse("mr, lanes, pixels: not a tile of this instruction set");
    if (w.size < tap.size * mr || bias.size < mr) return cbn_testing_refuse("w or bias is too small");
    const int64_t *xp = xpix.data, *yp = ypix.data;
    const int32_t *t = tap.data;
    for (int64_t i = 0; i < xpix.size; i++) {
        for (int64_t j = 0; j < tap.size; j++)
            if (xp[i] + t[j] < 0 || xp[i] + t[j] + k->lanes > x.size) return cbn_testing_refuse("x is too small");
        const int64_t end = yp[i] + (mr - 1) * y_oc + lanes;
        if (yp[i] < 0 || end > y.size) return cbn_testing_refuse("y is too small");
        if (residual.data && end > residual.size) return cbn_testing_refuse("residual is too small");
    }
    const cbn_conv_tap_args a = {.x = x.data,
                                 .xpix = xpix.data,
                                 .tap = tap.data,
                                 .ntaps = tap.size,
                                 .w = w.data,
                                 .y = y.data,
                                 .ypix = ypix.data,
                                 .y_oc = y_oc,
                                 .nv = xpix.size,
                                 .lanes = lanes,
                                 .epi = {bias.data, residual.data, lo, hi}};
    k->conv_tap(mr, &a);
    Py_RETURN_NONE;
}

static PyObject *rows_copy(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"isa",   "to", "to_ic", "to_row", "x",    "x_ic", "x_row",
                            "ic",    "rows", "n",   "x0",     "step", "w",    NULL};
    const char *isa;
    long long to_ic, to_row, x_ic, x_row, ic, rows, n, x0, step, w;
    PyObject *o[2];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOLLOLLLLLLLL:rows_copy", names, &isa, &o[0], &to_ic, &to_row,
                                     &o[1], &x_ic, &x_row, &ic, &rows, &n, &x0, &step, &w))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    cbn_span to, x;
    if (!k || !cbn_testing_span(o[0], "to", NPY_FLOAT, &to) || !cbn_testing_span(o[1], "x", NPY_FLOAT, &x)) return NULL;
    if (n < 0 || n % k->lanes || step < 1 || w < 0 || ic < 0 || rows < 0 || to_ic < 0 || to_row < 0 || x_ic < 0 ||
        x_row < 0)
        return cbn_testing_refuse("sizes and steps must not be negative, n a multiple of the lanes");
    if (ic > 0 && rows > 0) {
        if ((ic - 1) * to_ic + (rows - 1) * to_row + n > to.size) return cbn_testing_refuse("to is too small");
        if (w > 0 && (ic - 1) * x_ic + (rows - 1) * x_row + w > x.size) return cbn_testing_refuse("x is too small");
    }
    const cbn_rows_copy_args a = {.to = to.data, .to_ic = to_ic, .to_row = to_row, .x = x.data, .x_ic = x_ic,
                                  .x_row = x_row, .ic = ic, .rows = rows, .n = n, .x0 = x0, .step = step, .w = w};
    k->rows_copy(&a);
    Py_RETURN_NONE;
}

static PyObject *tap_tiles(PyObject *module, PyObject *arg) {
    (void)module;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(arg));
    if (!k) return NULL;
    PyObject *list = PyList_New(0);
    for (int mr = 1; list && mr <= k->tap_mr; mr++) {
        PyObject *nv = PyLong_FromLong(cbn_tap_nv(k, mr));
        if (!nv || PyList_Append(list, nv) < 0) Py_CLEAR(list);
        Py_XDECREF(nv);
    }
    return list;
}

PyMethodDef cbn_testing_tap_methods[] = {
    {"conv_tap", (PyCFunction)(void (*)(void))conv_tap, METH_VARARGS | METH_KEYWORDS,
     "conv_tap(isa, mr, x, xpix, tap, w, y, ypix, y_oc, lanes, bias, residual, lo, hi)."},
    {"rows_copy", (PyCFunction)(void (*)(void))rows_copy, METH_VARARGS | METH_KEYWORDS,
     "rows_copy(isa, to, to_ic, to_row, x, x_ic, x_row, ic, rows, n, x0, step, w)."},
    {"tap_tiles", tap_tiles, METH_O, "tap_tiles(isa) -> vectors in a conv_tap tile of 1, 2, ... output channels."},
    {NULL, NULL, 0, NULL},
};
