/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: panel_pack, interleave and conv_px2 of each instruction set, on the caller's own
 * memory. What would reach outside of the arrays is refused. */
#include "python/py_error.h"
#include "python/py_module.h"

#include <string.h>

#include "kernels/cbn_kernels.h"

static const cbn_kernels *find_table(PyObject *obj) {
    const char *isa = PyUnicode_Check(obj) ? PyUnicode_AsUTF8(obj) : NULL;
    for (const cbn_kernels *const *t = cbn_kernels_available(); isa && *t; t++)
        if (strcmp((*t)->isa, isa) == 0) return *t;
    if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got %R", obj);
    return NULL;
}

/* The memory of a C-contiguous array of `type` with ndim axes. */
static void *get(PyObject *obj, const char *name, int type, int ndim, int64_t *shape) {
    if (!PyArray_Check(obj) || PyArray_TYPE((PyArrayObject *)obj) != type ||
        PyArray_NDIM((PyArrayObject *)obj) != ndim || !PyArray_ISCARRAY_RO((PyArrayObject *)obj)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous ndarray of %d axes and the kernel's dtype",
                     name, ndim);
        return NULL;
    }
    for (int i = 0; i < ndim; i++) shape[i] = PyArray_DIM((PyArrayObject *)obj, i);
    return PyArray_DATA((PyArrayObject *)obj);
}

static bool refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return false;
}

/* moves: rows of x, out, lo, hi, n. */
static bool moves_get(PyObject *obj, int lanes, int64_t out_size, int64_t x_size, cbn_panel_move *moves,
                      int64_t most, int64_t *count) {
    int64_t shape[2];
    const int64_t *m = get(obj, "moves", NPY_INT64, 2, shape);
    if (!m) return false;
    if (shape[1] != 5 || shape[0] > most) return refuse("panel_pack: expected moves of 5 numbers");
    for (int64_t i = 0; i < shape[0]; i++, m += 5) {
        if (m[1] < 0 || m[4] < 1 || m[4] > lanes || m[1] + m[4] > out_size || m[2] < 0 || m[3] > lanes ||
            (m[2] < m[3] && (m[0] + m[2] < 0 || m[0] + m[3] > x_size)))
            return refuse("panel_pack: a move leaves the arrays");
        moves[i] = (cbn_panel_move){
            .x = m[0], .out = m[1], .lo = (int16_t)m[2], .hi = (int16_t)m[3], .n = (int16_t)m[4]};
    }
    *count = shape[0];
    return true;
}

static PyObject *panel_pack(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    enum { ISA, OUT, OUT_C, X, MOVES, COUNT, MOST = 256 };
    cbn_panel_move moves[MOST];
    int64_t out_size, shape[2], out_c, n;
    if (!cbn_py_nargs("panel_pack", nargs, COUNT)) return NULL;
    const cbn_kernels *k = find_table(args[ISA]);
    float *out = k ? get(args[OUT], "out", NPY_FLOAT, 1, &out_size) : NULL;
    const float *x = out ? get(args[X], "x", NPY_FLOAT, 2, shape) : NULL;
    if (!x || !cbn_py_ints(args[OUT_C], "out_c", 1, &out_c)) return NULL;
    /* Channels do not meet, so each has its out_c. */
    const int64_t room = CBN_MIN(out_c, out_size - CBN_MAX(shape[0] - 1, 0) * out_c);
    if (out_c < 0 || !moves_get(args[MOVES], k->lanes, room, shape[1], moves, MOST, &n)) {
        if (!PyErr_Occurred()) refuse("panel_pack: out_c is negative");
        return NULL;
    }
    k->panel_pack(out, out_c, x, shape[1], shape[0], moves, n);
    Py_RETURN_NONE;
}

static PyObject *interleave(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    enum { ISA, Y, S, N, BIAS, RESIDUAL, LO, HI, COUNT };
    int64_t ys[2], ss[3], rs[2], bs, n;
    double lo, hi;
    if (!cbn_py_nargs("interleave", nargs, COUNT)) return NULL;
    const cbn_kernels *k = find_table(args[ISA]);
    float *y = k ? get(args[Y], "y", NPY_FLOAT, 2, ys) : NULL;
    const float *s = y ? get(args[S], "s", NPY_FLOAT, 3, ss) : NULL;
    const float *bias = s ? get(args[BIAS], "bias", NPY_FLOAT, 1, &bs) : NULL;
    const float *residual = NULL;
    if (!bias || !cbn_py_ints(args[N], "n", 1, &n) || !cbn_py_double(args[LO], "lo", &lo) ||
        !cbn_py_double(args[HI], "hi", &hi))
        return NULL;
    if (args[RESIDUAL] != Py_None) {
        residual = get(args[RESIDUAL], "residual", NPY_FLOAT, 2, rs);
        if (!residual) return NULL;
        if (rs[0] != ys[0] || rs[1] != ys[1]) refuse("interleave: expected a residual shaped as y");
    }
    if (!PyErr_Occurred() &&
        (n < 0 || n > ys[1] || ss[1] < 1 || cbn_ceil_div(n, ss[1]) > ss[2] || ss[0] < ys[0] || bs < ys[0]))
        refuse("interleave: the arrays are too small");
    if (PyErr_Occurred()) return NULL;
    const cbn_epilogue_args e = {bias, residual, (float)lo, (float)hi};
    k->interleave(y, ys[1], (int)ys[0], (int)ss[1], s, ss[1] * ss[2], ss[2], n, &e);
    Py_RETURN_NONE;
}

static PyObject *conv_px2(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    enum { ISA, X, NP, COPY, W, MR, Y, BIAS, RESIDUAL, LO, HI, COUNT };
    int64_t xs[2], ys[2], rs[2], ws, bs, cs = 0, np, mr;
    double lo, hi;
    if (!cbn_py_nargs("conv_px2", nargs, COUNT)) return NULL;
    const cbn_kernels *k = find_table(args[ISA]);
    const float *x = k ? get(args[X], "x", NPY_FLOAT, 2, xs) : NULL;
    const float *w = x ? get(args[W], "w", NPY_FLOAT, 1, &ws) : NULL;
    float *y = w ? get(args[Y], "y", NPY_FLOAT, 2, ys) : NULL;
    const float *bias = y ? get(args[BIAS], "bias", NPY_FLOAT, 1, &bs) : NULL;
    if (!bias || !cbn_py_ints(args[NP], "np", 1, &np) || !cbn_py_ints(args[MR], "mr", 1, &mr) ||
        !cbn_py_double(args[LO], "lo", &lo) || !cbn_py_double(args[HI], "hi", &hi))
        return NULL;
    const float *residual = NULL;
    float *copy = NULL;
    if (args[RESIDUAL] != Py_None && !(residual = get(args[RESIDUAL], "residual", NPY_FLOAT, 2, rs)))
        return NULL;
    if (args[COPY] != Py_None && !(copy = get(args[COPY], "copy", NPY_FLOAT, 1, &cs))) return NULL;
    const int64_t whole = cbn_ceil_div(np, k->lanes) * k->lanes, rows = 2 * ys[0];
    if ((mr != k->px_mr && mr != k->px_mr - 2) || np < 1 || np > k->px_nv * k->lanes ||
        xs[1] < (copy ? np : whole) || (copy && cs < xs[0] * whole) || ys[0] < 1 || ys[1] < 2 * np ||
        bs < ys[0] || ws < cbn_ceil_div(rows, mr) * mr * xs[0] ||
        (residual && (rs[0] != ys[0] || rs[1] != ys[1]))) {
        refuse("conv_px2: the arrays do not fit each other");
        return NULL;
    }
    const cbn_conv_px_args a = {.x = x,
                                .x_ic = xs[1],
                                .x_padded = !copy,
                                .copy = copy,
                                .w = w,
                                .mr = (int32_t)mr,
                                .ic = xs[0],
                                .y = y,
                                .y_oc = ys[1],
                                .oc_valid = (int32_t)rows,
                                .np = (int32_t)np,
                                .epi = {bias, residual, (float)lo, (float)hi}};
    k->conv_px2(&a);
    Py_RETURN_NONE;
}

#define CBN_METHOD_(name, signature) \
    { #name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, PyDoc_STR(#name signature) }
PyMethodDef cbn_testing_phases_methods[] = {
    CBN_METHOD_(panel_pack, "(isa, out, out_c, x, moves)"),
    CBN_METHOD_(interleave, "(isa, y, s, n, bias, residual, lo, hi)"),
    CBN_METHOD_(conv_px2, "(isa, x, np, copy, w, mr, y, bias, residual, lo, hi)"),
    {NULL, NULL, 0, NULL},
};
