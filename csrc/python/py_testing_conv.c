/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: conv_oc, conv_px and fma_peak of each instruction set, on the caller's own
 * memory. The arrays are used as they are, so that tests can put them between guard pages:
 * C-contiguous ndarrays of the exact dtype. What would reach outside of them is refused. */
#include "python/py_error.h"
#include "python/py_module.h"

#include <string.h>
#include <time.h>

#include "kernels/cbn_kernels.h"

static const cbn_kernels *find_table(const char *isa) {
    for (const cbn_kernels *const *t = cbn_kernels_available(); *t; t++)
        if (strcmp((*t)->isa, isa) == 0) return *t;
    PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got '%s'", isa);
    return NULL;
}

typedef struct span {
    void *data; /* NULL: the argument was None */
    int64_t size;
} span;

static bool span_get(PyObject *obj, const char *name, int type, span *out) {
    *out = (span){NULL, 0};
    if (obj == Py_None) return true;
    if (!PyArray_Check(obj) || PyArray_TYPE((PyArrayObject *)obj) != type ||
        !PyArray_ISCARRAY_RO((PyArrayObject *)obj)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected None or a C-contiguous ndarray of the kernel's dtype", name);
        return false;
    }
    *out = (span){PyArray_DATA((PyArrayObject *)obj), PyArray_SIZE((PyArrayObject *)obj)};
    return true;
}

static bool bad(const char *what) {
    PyErr_Format(PyExc_ValueError, "%s", what);
    return false;
}

/* Whether every a[i] + b[j] + more (more >= 0) lies in 0 .. size-1. No elements: nothing is
 * read. */
static bool reach_ok(span a, span b, int64_t more, int64_t size) {
    const int64_t *u = a.data, *v = b.data;
    for (int64_t i = 0; i < a.size; i++)
        for (int64_t j = 0; j < b.size; j++)
            if (u[i] + v[j] < 0 || u[i] + v[j] + more >= size) return false;
    return true;
}

static bool oc_reach_ok(const cbn_conv_oc_args *a, int vw, span x, span w, span acc, span y,
                        span bias, span residual, span xpix, span ypix, span tap_x, span tap_w) {
    int64_t zero = 0;
    const span origin = {&zero, 1};
    if (a->ic < 0 || a->x_ic < 0 || a->w_ic < 0 || a->y_oc < 1)
        return bad("sizes and steps must not be negative");
    if (tap_w.size != tap_x.size || ypix.size != xpix.size)
        return bad("lists of one tile must be equally long");
    if (a->oc_valid < 1 || a->oc_valid > vw) return bad("oc_valid: expected 1 to nv*lanes");
    if (bias.size < a->oc_valid) return bad("bias: expected oc_valid elements");
    if (a->ic > 0 && !reach_ok(xpix, tap_x, (a->ic - 1) * a->x_ic, x.size))
        return bad("x is too small");
    if (a->ic > 0 && !reach_ok(tap_w, origin, (a->ic - 1) * a->w_ic + vw - 1, w.size))
        return bad("w is too small");
    if (acc.data ? acc.size < xpix.size * vw : a->load_acc || !y.data)
        return bad("acc is too small");
    const int64_t more = (a->oc_valid - 1) * a->y_oc;
    if (y.data && !reach_ok(ypix, origin, more, y.size)) return bad("y is too small");
    if (residual.data && !reach_ok(ypix, origin, more, residual.size))
        return bad("residual is too small");
    return true;
}

static PyObject *conv_oc(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"isa",      "np",       "nv",   "x",     "xpix",     "x_ic",
                            "w",        "w_ic",     "ic",   "tap_x", "tap_w",    "acc",
                            "load_acc", "y",        "ypix", "y_oc",  "oc_valid", "y_run",
                            "bias",     "residual", "lo",   "hi",    NULL};
    const char *isa;
    int tile_np, nv, load_acc, oc_valid, y_run;
    long long x_ic, w_ic, ic, y_oc;
    PyObject *o[10];
    cbn_conv_oc_args a;
    memset(&a, 0, sizeof a);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "siiOOLOLLOOOpOOLipOOff:conv_oc", names, &isa,
                                     &tile_np, &nv, &o[0], &o[1], &x_ic, &o[2], &w_ic, &ic, &o[3],
                                     &o[4], &o[5], &load_acc, &o[6], &o[7], &y_oc, &oc_valid,
                                     &y_run, &o[8], &o[9], &a.epi.lo, &a.epi.hi))
        return NULL;
    const cbn_kernels *k = find_table(isa);
    span x, xpix, w, tap_x, tap_w, acc, y, ypix, bias, residual;
    if (!k || !span_get(o[0], "x", NPY_FLOAT, &x) || !span_get(o[1], "xpix", NPY_INT64, &xpix) ||
        !span_get(o[2], "w", NPY_FLOAT, &w) || !span_get(o[3], "tap_x", NPY_INT64, &tap_x) ||
        !span_get(o[4], "tap_w", NPY_INT64, &tap_w) || !span_get(o[5], "acc", NPY_FLOAT, &acc) ||
        !span_get(o[6], "y", NPY_FLOAT, &y) || !span_get(o[7], "ypix", NPY_INT64, &ypix) ||
        !span_get(o[8], "bias", NPY_FLOAT, &bias) ||
        !span_get(o[9], "residual", NPY_FLOAT, &residual))
        return NULL;
    if (tile_np < 1 || tile_np > k->oc_np || nv < 1 || nv > k->oc_nv || xpix.size != tile_np)
        return PyErr_Format(PyExc_ValueError, "np, nv, xpix: not a tile of this instruction set");
    a = (cbn_conv_oc_args){.x = x.data,
                           .xpix = xpix.data,
                           .x_ic = x_ic,
                           .w = w.data,
                           .w_ic = w_ic,
                           .ic = ic,
                           .ntaps = tap_x.size,
                           .tap_x = tap_x.data,
                           .tap_w = tap_w.data,
                           .acc = acc.data,
                           .load_acc = load_acc,
                           .y = y.data,
                           .ypix = ypix.data,
                           .y_oc = y_oc,
                           .oc_valid = oc_valid,
                           .y_run = y_run,
                           .epi = {bias.data, residual.data, a.epi.lo, a.epi.hi}};
    if (!oc_reach_ok(&a, nv * k->lanes, x, w, acc, y, bias, residual, xpix, ypix, tap_x, tap_w))
        return NULL;
    k->conv_oc(tile_np, nv, &a);
    Py_RETURN_NONE;
}

static PyObject *conv_px(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"isa",      "x",  "x_ic", "w",        "ic", "y",  "y_oc",
                            "oc_valid", "np", "bias", "residual", "lo", "hi", NULL};
    const char *isa;
    int oc_valid, tile_np;
    long long x_ic, ic, y_oc;
    float lo, hi;
    PyObject *o[5];
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sOLOLOLiiOOff:conv_px", names, &isa, &o[0],
                                     &x_ic, &o[1], &ic, &o[2], &y_oc, &oc_valid, &tile_np, &o[3],
                                     &o[4], &lo, &hi))
        return NULL;
    const cbn_kernels *k = find_table(isa);
    span x, w, y, bias, residual;
    if (!k || !span_get(o[0], "x", NPY_FLOAT, &x) || !span_get(o[1], "w", NPY_FLOAT, &w) ||
        !span_get(o[2], "y", NPY_FLOAT, &y) || !span_get(o[3], "bias", NPY_FLOAT, &bias) ||
        !span_get(o[4], "residual", NPY_FLOAT, &residual))
        return NULL;
    const int64_t last = (oc_valid - 1) * y_oc + tile_np;
    if (tile_np < 1 || tile_np > k->px_nv * k->lanes || oc_valid < 1 || oc_valid > k->px_mr ||
        ic < 0 || x_ic < 0 || y_oc < 0) {
        PyErr_SetString(PyExc_ValueError, "np, oc_valid, ic: not a tile of this instruction set");
        return NULL;
    }
    if ((ic > 0 && (x.size < (ic - 1) * x_ic + tile_np || w.size < ic * k->px_mr)) ||
        y.size < last || bias.size < oc_valid || (residual.data && residual.size < last)) {
        PyErr_SetString(PyExc_ValueError, "an array is too small for this tile");
        return NULL;
    }
    const cbn_conv_px_args a = {.x = x.data,
                                .x_ic = x_ic,
                                .w = w.data,
                                .mr = k->px_mr,
                                .ic = ic,
                                .y = y.data,
                                .y_oc = y_oc,
                                .oc_valid = oc_valid,
                                .np = tile_np,
                                .epi = {bias.data, residual.data, lo, hi}};
    k->conv_px(&a);
    Py_RETURN_NONE;
}

static PyObject *fma_peak(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    long long iters;
    if (!PyArg_ParseTuple(args, "sL:fma_peak", &isa, &iters)) return NULL;
    const cbn_kernels *k = find_table(isa);
    if (!k) return NULL;
    struct timespec begin, end;
    double flops;
    float sink;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    k->fma_peak(iters, &flops, &sink);
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds =
        (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    return Py_BuildValue("dd", flops, seconds);
}

static PyObject *tile_sizes(PyObject *module, PyObject *arg) {
    (void)module;
    const char *isa = PyUnicode_AsUTF8(arg);
    const cbn_kernels *k = isa ? find_table(isa) : NULL;
    if (!k) return NULL;
    return Py_BuildValue("{sisisisisisi}", "lanes", k->lanes, "oc_np", k->oc_np, "oc_nv", k->oc_nv,
                         "px_mr", k->px_mr, "px_nv", k->px_nv, "wino_np", k->wino_np);
}

PyMethodDef cbn_testing_conv_methods[] = {
    {"conv_oc", (PyCFunction)(void (*)(void))conv_oc, METH_VARARGS | METH_KEYWORDS,
     "conv_oc(isa, np, nv, x, xpix, x_ic, w, w_ic, ic, tap_x, tap_w, acc, load_acc, y, ypix, y_oc, "
     "oc_valid, y_run, bias, "
     "residual, lo, hi): one tile."},
    {"conv_px", (PyCFunction)(void (*)(void))conv_px, METH_VARARGS | METH_KEYWORDS,
     "conv_px(isa, x, x_ic, w, ic, y, y_oc, oc_valid, np, bias, residual, lo, hi): one tile."},
    {"fma_peak", fma_peak, METH_VARARGS, "fma_peak(isa, iters) -> (FLOPs done, seconds)."},
    {"tile_sizes", tile_sizes, METH_O, "tile_sizes(isa) -> lanes, oc_np, oc_nv, px_mr, px_nv, wino_np."},
    {NULL, NULL, 0, NULL},
};
