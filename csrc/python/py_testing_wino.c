/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: the Winograd kernels of each instruction set, on the caller's own memory: C-contiguous ndarrays of
 * the exact dtype. What would reach outside of them is refused. */
#include "python/py_error.h"
#include "python/py_module.h"

#include <string.h>

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
        PyErr_Format(PyExc_TypeError, "%s: expected None or a C-contiguous ndarray of the kernel's dtype", name);
        return false;
    }
    *out = (span){PyArray_DATA((PyArrayObject *)obj), PyArray_SIZE((PyArrayObject *)obj)};
    return true;
}

static PyObject *refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return NULL;
}

static bool is_axis(int n, int m) {
    return (n == 1 && m == 1) || (n == 4 && (m == 2 || m == 3)) || (n == 6 && m >= 2 && m <= 5);
}

/* Whether all of col[i] .. col[i] + more lie in 0 .. limit-1. */
static bool columns_ok(span col, int64_t more, int64_t limit) {
    const int32_t *c = col.data;
    for (int64_t i = 0; i < col.size; i++)
        if (c[i] < 0 || c[i] + more >= limit) return false;
    return true;
}

static PyObject *lanes_gather(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    PyObject *o[2];
    long long x_c, x0, w;
    int nch;
    span s, x;
    if (!PyArg_ParseTuple(args, "sOOLiLL:lanes_gather", &isa, &o[0], &o[1], &x_c, &nch, &x0, &w)) return NULL;
    const cbn_kernels *k = find_table(isa);
    if (!k || !span_get(o[0], "s", NPY_FLOAT, &s) || !span_get(o[1], "x", NPY_FLOAT, &x)) return NULL;
    if (nch < 1 || nch > k->lanes || x_c < 0 || w < 0 || x.size < (nch - 1) * x_c + w || s.size % k->lanes)
        return refuse("lanes_gather: an array is too small or nch is no number of lanes");
    k->lanes_gather(s.data, x.data, x_c, nch, x0, s.size / k->lanes, w);
    Py_RETURN_NONE;
}

static PyObject *lanes_scatter(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    PyObject *o[4];
    long long y_c;
    int nch;
    float lo, hi;
    span y, s, bias, residual;
    if (!PyArg_ParseTuple(args, "sOLiOOOff:lanes_scatter", &isa, &o[0], &y_c, &nch, &o[1], &o[2], &o[3], &lo, &hi))
        return NULL;
    const cbn_kernels *k = find_table(isa);
    if (!k || !span_get(o[0], "y", NPY_FLOAT, &y) || !span_get(o[1], "s", NPY_FLOAT, &s) ||
        !span_get(o[2], "bias", NPY_FLOAT, &bias) || !span_get(o[3], "residual", NPY_FLOAT, &residual))
        return NULL;
    const int64_t n = s.size / k->lanes, last = (nch - 1) * y_c + n;
    if (nch < 1 || nch > k->lanes || y_c < 0 || s.size % k->lanes || y.size < last || bias.size < nch ||
        (residual.data && residual.size < last))
        return refuse("lanes_scatter: an array is too small or nch is no number of lanes");
    const cbn_epilogue_args e = {bias.data, residual.data, lo, hi};
    bool nonfinite = false;
    k->lanes_scatter(y.data, y_c, nch, s.data, n, &e, &nonfinite);
    return PyBool_FromLong(nonfinite);
}

static PyObject *wino_in(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    PyObject *o[5];
    long long ncols, step, v_xi;
    int nh, nw;
    span x, row, col, tmp, v;
    if (!PyArg_ParseTuple(args, "siiOOLOLOOL:wino_in", &isa, &nh, &nw, &o[0], &o[1], &ncols, &o[2], &step, &o[3],
                          &o[4], &v_xi))
        return NULL;
    const cbn_kernels *k = find_table(isa);
    if (!k || !span_get(o[0], "x", NPY_FLOAT, &x) || !span_get(o[1], "row", NPY_INT64, &row) ||
        !span_get(o[2], "col", NPY_INT32, &col) || !span_get(o[3], "tmp", NPY_FLOAT, &tmp) ||
        !span_get(o[4], "v", NPY_FLOAT, &v))
        return NULL;
    if ((nh != 1 && nh != 4 && nh != 6) || (nw != 1 && nw != 4 && nw != 6) || row.size != nh)
        return refuse("wino_in: expected axes of 1, 4 or 6 points and as many rows");
    if (ncols < 0 || step < 1 || !columns_ok(col, (nw - 1) * step, ncols) || tmp.size < nh * ncols * k->lanes ||
        v_xi < 0 || v.size < (nh * nw - 1) * v_xi + col.size * k->lanes)
        return refuse("wino_in: col, tmp or v: too small or outside");
    cbn_wino_in_args a = {.nh = nh, .nw = nw, .ncols = ncols, .ntiles = col.size, .col = col.data, .step = step,
                          .tmp = tmp.data, .v = v.data, .v_xi = v_xi};
    for (int i = 0; i < nh; i++) {
        const int64_t at = ((const int64_t *)row.data)[i];
        if (at < 0 || at + ncols * k->lanes > x.size) return refuse("wino_in: x is too small");
        a.row[i] = (const float *)x.data + at;
    }
    k->wino_in(&a);
    Py_RETURN_NONE;
}

static PyObject *wino_gemm(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    PyObject *o[3];
    long long v_b, nk, chunk, m_t, m_v;
    int np, nv, add;
    span v, u, m;
    if (!PyArg_ParseTuple(args, "siiOLOLLOLLp:wino_gemm", &isa, &np, &nv, &o[0], &v_b, &o[1], &nk, &chunk, &o[2], &m_t,
                          &m_v, &add))
        return NULL;
    const cbn_kernels *k = find_table(isa);
    if (!k || !span_get(o[0], "v", NPY_FLOAT, &v) || !span_get(o[1], "u", NPY_FLOAT, &u) ||
        !span_get(o[2], "m", NPY_FLOAT, &m))
        return NULL;
    const int64_t L = k->lanes;
    if (np < 1 || nv < 1 || nv > 2 || nk < L || nk % L || chunk < L || chunk % L)
        return refuse("np, nv, nk, chunk: not for this instruction set");
    if (v_b < 0 || m_t < 0 || m_v < 0 || v.size < (nk / L - 1) * v_b + np * L || u.size < nk * nv * L ||
        m.size < (np - 1) * m_t + (nv - 1) * m_v + L)
        return refuse("wino_gemm: an array is too small for these tiles");
    const cbn_wino_gemm_args a = {v.data, v_b, u.data, nk, chunk, m.data, m_t, m_v, add};
    k->wino_gemm(np, nv, &a);
    Py_RETURN_NONE;
}

static PyObject *wino_out(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    PyObject *o[3];
    long long m_t, step, o_row;
    int nh, mh, nw, mw;
    span m, col, out;
    if (!PyArg_ParseTuple(args, "siiiiOLOLOL:wino_out", &isa, &nh, &mh, &nw, &mw, &o[0], &m_t, &o[1], &step, &o[2],
                          &o_row))
        return NULL;
    const cbn_kernels *k = find_table(isa);
    if (!k || !span_get(o[0], "m", NPY_FLOAT, &m) || !span_get(o[1], "col", NPY_INT32, &col) ||
        !span_get(o[2], "o", NPY_FLOAT, &out))
        return NULL;
    const int64_t L = k->lanes, tail = out.size - (mh - 1) * o_row;
    if (!is_axis(nh, mh) || !is_axis(nw, mw)) return refuse("wino_out: no such axes");
    if (step < 1 || m_t < 0 || o_row < 0 || (col.size > 0 && m.size < (col.size - 1) * m_t + nh * nw * L) ||
        !columns_ok(col, (mw - 1) * step, tail / L))
        return refuse("wino_out: col, m or o: too small or outside");
    const cbn_wino_out_args a = {.nh = nh, .nw = nw, .mh = mh, .mw = mw, .m = m.data, .m_t = m_t, .ntiles = col.size,
                                 .col = col.data, .step = step, .o = out.data, .o_row = o_row};
    k->wino_out(&a);
    Py_RETURN_NONE;
}

PyMethodDef cbn_testing_wino_methods[] = {
    {"lanes_gather", lanes_gather, METH_VARARGS, "lanes_gather(isa, s, x, x_c, nch, x0, w): s.size/lanes columns."},
    {"lanes_scatter", lanes_scatter, METH_VARARGS,
     "lanes_scatter(isa, y, y_c, nch, s, bias, residual, lo, hi) -> whether a number was not finite."},
    {"wino_in", wino_in, METH_VARARGS,
     "wino_in(isa, nh, nw, x, row, ncols, col, step, tmp, v, v_xi): row[i] is the offset in x of row i."},
    {"wino_gemm", wino_gemm, METH_VARARGS, "wino_gemm(isa, np, nv, v, v_b, u, nk, chunk, m, m_t, m_v, add): np tiles."},
    {"wino_out", wino_out, METH_VARARGS, "wino_out(isa, nh, mh, nw, mw, m, m_t, col, step, o, o_row)."},
    {NULL, NULL, 0, NULL},
};
