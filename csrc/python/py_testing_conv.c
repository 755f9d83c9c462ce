/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: conv_oc, conv_px and fma_peak of each instruction set. */
#include "python/py_module.h"
#include "python/py_testing.h"

#include <string.h>
#include <time.h>

/* Whether every a[i] + b[j] + more (more >= 0) lies in 0 .. size-1. No elements: nothing is
 * read. */
static bool reach_ok(cbn_span a, cbn_span b, int64_t more, int64_t size) {
    const int64_t *u = a.data, *v = b.data;
    for (int64_t i = 0; i < a.size; i++)
        for (int64_t j = 0; j < b.size; j++)
            if (u[i] + v[j] < 0 || u[i] + v[j] + more >= size) return false;
    return true;
}

/* What does not fit, NULL when everything does. */
static const char *oc_misfit(const cbn_conv_oc_args *a, int vw, cbn_span x, cbn_span w, cbn_span acc, cbn_span y,
                             cbn_span bias, cbn_span residual, cbn_span xpix, cbn_span ypix, cbn_span tap_x,
                             cbn_span tap_w) {
    int64_t zero = 0;
    const cbn_span origin = {&zero, 1};
    if (a->ic < 0 || a->x_ic < 0 || a->w_ic < 0 || a->y_oc < 1)
        return "sizes and steps must not be negative";
    if (tap_w.size != tap_x.size || ypix.size != xpix.size) return "lists of one tile must be equally long";
    if (a->oc_valid < 1 || a->oc_valid > vw) return "oc_valid: expected 1 to nv*lanes";
    if (bias.size < a->oc_valid) return "bias: expected oc_valid elements";
    if (a->ic > 0 && !reach_ok(xpix, tap_x, (a->ic - 1) * a->x_ic, x.size)) return "x is too small";
    if (a->ic > 0 && !reach_ok(tap_w, origin, (a->ic - 1) * a->w_ic + vw - 1, w.size)) return "w is too small";
    if (acc.data ? acc.size < xpix.size * vw : a->load_acc || !y.data) return "acc is too small";
    const int64_t more = (a->oc_valid - 1) * a->y_oc;
    if (y.data && !reach_ok(ypix, origin, more, y.size)) return "y is too small";
    if (residual.data && !reach_ok(ypix, origin, more, residual.size)) return "residual is too small";
    return NULL;
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
    const cbn_kernels *k = cbn_testing_table(isa);
    cbn_span x, xpix, w, tap_x, tap_w, acc, y, ypix, bias, residual;
    if (!k || !cbn_testing_span(o[0], "x", NPY_FLOAT, &x) || !cbn_testing_span(o[1], "xpix", NPY_INT64, &xpix) ||
        !cbn_testing_span(o[2], "w", NPY_FLOAT, &w) || !cbn_testing_span(o[3], "tap_x", NPY_INT64, &tap_x) ||
        !cbn_testing_span(o[4], "tap_w", NPY_INT64, &tap_w) || !cbn_testing_span(o[5], "acc", NPY_FLOAT, &acc) ||
        !cbn_testing_span(o[6], "y", NPY_FLOAT, &y) || !cbn_testing_span(o[7], "ypix", NPY_INT64, &ypix) ||
        !cbn_testing_span(o[8], "bias", NPY_FLOAT, &bias) ||
        !cbn_testing_span(o[9], "residual", NPY_FLOAT, &residual))
        return NULL;
    if (tile_np < 1 || tile_np > k->oc_np || nv < 1 || nv > k->oc_nv || xpix.size != tile_np)
        return cbn_testing_refuse("np, nv, xpix: not a tile of this instruction set");
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
    const char *misfit = oc_misfit(&a, nv * k->lanes, x, w, acc, y, bias, residual, xpix, ypix, tap_x, tap_w);
    if (misfit) return cbn_testing_refuse(misfit);
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
    const cbn_kernels *k = cbn_testing_table(isa);
    cbn_span x, w, y, bias, residual;
    if (!k || !cbn_testing_span(o[0], "x", NPY_FLOAT, &x) || !cbn_testing_span(o[1], "w", NPY_FLOAT, &w) ||
        !cbn_testing_span(o[2], "y", NPY_FLOAT, &y) || !cbn_testing_span(o[3], "bias", NPY_FLOAT, &bias) ||
        !cbn_testing_span(o[4], "residual", NPY_FLOAT, &residual))
        return NULL;
    const int64_t last = (oc_valid - 1) * y_oc + tile_np;
    if (tile_np < 1 || tile_np > k->px_nv * k->lanes || oc_valid < 1 || oc_valid > k->px_mr ||
        ic < 0 || x_ic < 0 || y_oc < 0)
        return cbn_testing_refuse("np, oc_valid, ic: not a tile of this instruction set");
    if ((ic > 0 && (x.size < (ic - 1) * x_ic + tile_np || w.size < ic * k->px_mr)) ||
        y.size < last || bias.size < oc_valid || (residual.data && residual.size < last))
        return cbn_testing_refuse("an array is too small for this tile");
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
    const cbn_kernels *k = cbn_testing_table(isa);
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
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(arg));
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
