/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: the Winograd kernels of each instruction set. */
#include "python/py_module.h"
#include "python/py_testing.h"

#include "ops/wino_matrix.h"

static bool is_axis(int n, int m) {
    return (n == 1 && m == 1) || (n == 4 && (m == 2 || m == 3)) || (n == 6 && m >= 2 && m <= 5);
}

/* Whether all of col[i] .. col[i] + more lie in 0 .. limit-1. */
static bool columns_ok(cbn_span col, int64_t more, int64_t limit) {
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
    cbn_span s, x;
    if (!PyArg_ParseTuple(args, "sOOLiLL:lanes_gather", &isa, &o[0], &o[1], &x_c, &nch, &x0, &w)) return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    if (!k || !cbn_testing_span(o[0], "s", NPY_FLOAT, &s) || !cbn_testing_span(o[1], "x", NPY_FLOAT, &x)) return NULL;
    if (nch < 1 || nch > k->lanes || x_c < 0 || w < 0 || x.size < (nch - 1) * x_c + w || s.size % k->lanes)
        return cbn_testing_refuse("lanes_gather: an array is too small or nch is no number of lanes");
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
    cbn_span y, s, bias, residual;
    if (!PyArg_ParseTuple(args, "sOLiOOOff:lanes_scatter", &isa, &o[0], &y_c, &nch, &o[1], &o[2], &o[3], &lo, &hi))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    if (!k || !cbn_testing_span(o[0], "y", NPY_FLOAT, &y) || !cbn_testing_span(o[1], "s", NPY_FLOAT, &s) ||
        !cbn_testing_span(o[2], "bias", NPY_FLOAT, &bias) || !cbn_testing_span(o[3], "residual", NPY_FLOAT, &residual))
        return NULL;
    const int64_t n = s.size / k->lanes, last = (nch - 1) * y_c + n;
    if (nch < 1 || nch > k->lanes || y_c < 0 || s.size % k->lanes || y.size < last || bias.size < nch ||
        (residual.data && residual.size < last))
        return cbn_testing_refuse("lanes_scatter: an array is too small or nch is no number of lanes");
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
    cbn_span x, row, col, tmp, v;
    if (!PyArg_ParseTuple(args, "siiOOLOLOOL:wino_in", &isa, &nh, &nw, &o[0], &o[1], &ncols, &o[2], &step, &o[3],
                          &o[4], &v_xi))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    if (!k || !cbn_testing_span(o[0], "x", NPY_FLOAT, &x) || !cbn_testing_span(o[1], "row", NPY_INT64, &row) ||
        !cbn_testing_span(o[2], "col", NPY_INT32, &col) || !cbn_testing_span(o[3], "tmp", NPY_FLOAT, &tmp) ||
        !cbn_testing_span(o[4], "v", NPY_FLOAT, &v))
        return NULL;
    if ((nh != 1 && nh != 4 && nh != 6) || (nw != 1 && nw != 4 && nw != 6) || row.size != nh)
        return cbn_testing_refuse("wino_in: expected axes of 1, 4 or 6 points and as many rows");
    if (ncols < 0 || step < 1 || !columns_ok(col, (nw - 1) * step, ncols) || tmp.size < nh * ncols * k->lanes ||
        v_xi < 0 || v.size < (nh * nw - 1) * v_xi + col.size * k->lanes)
        return cbn_testing_refuse("wino_in: col, tmp or v: too small or outside");
    cbn_wino_in_args a = {.nh = nh, .nw = nw, .ncols = ncols, .ntiles = col.size, .col = col.data, .step = step,
                          .tmp = tmp.data, .v = v.data, .v_xi = v_xi};
    for (int i = 0; i < nh; i++) {
        const int64_t at = ((const int64_t *)row.data)[i];
        if (at < 0 || at + ncols * k->lanes > x.size) return cbn_testing_refuse("wino_in: x is too small");
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
    cbn_span v, u, m;
    if (!PyArg_ParseTuple(args, "siiOLOLLOLLp:wino_gemm", &isa, &np, &nv, &o[0], &v_b, &o[1], &nk, &chunk, &o[2], &m_t,
                          &m_v, &add))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    if (!k || !cbn_testing_span(o[0], "v", NPY_FLOAT, &v) || !cbn_testing_span(o[1], "u", NPY_FLOAT, &u) ||
        !cbn_testing_span(o[2], "m", NPY_FLOAT, &m))
        return NULL;
    const int64_t L = k->lanes;
    if (np < 1 || nv < 1 || nv > 2 || nk < L || nk % L || chunk < L || chunk % L)
        return cbn_testing_refuse("np, nv, nk, chunk: not for this instruction set");
    if (v_b < 0 || m_t < 0 || m_v < 0 || v.size < (nk / L - 1) * v_b + np * L || u.size < nk * nv * L ||
        m.size < (np - 1) * m_t + (nv - 1) * m_v + L)
        return cbn_testing_refuse("wino_gemm: an array is too small for these tiles");
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
    cbn_span m, col, out;
    if (!PyArg_ParseTuple(args, "siiiiOLOLOL:wino_out", &isa, &nh, &mh, &nw, &mw, &o[0], &m_t, &o[1], &step, &o[2],
                          &o_row))
        return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    if (!k || !cbn_testing_span(o[0], "m", NPY_FLOAT, &m) || !cbn_testing_span(o[1], "col", NPY_INT32, &col) ||
        !cbn_testing_span(o[2], "o", NPY_FLOAT, &out))
        return NULL;
    const int64_t L = k->lanes, tail = out.size - (mh - 1) * o_row;
    if (!is_axis(nh, mh) || !is_axis(nw, mw)) return cbn_testing_refuse("wino_out: no such axes");
    if (step < 1 || m_t < 0 || o_row < 0 || (col.size > 0 && m.size < (col.size - 1) * m_t + nh * nw * L) ||
        !columns_ok(col, (mw - 1) * step, tail / L))
        return cbn_testing_refuse("wino_out: col, m or o: too small or outside");
    const cbn_wino_out_args a = {.nh = nh, .nw = nw, .mh = mh, .mw = mw, .m = m.data, .m_t = m_t, .ntiles = col.size,
                                 .col = col.data, .step = step, .o = out.data, .o_row = o_row};
    k->wino_out(&a);
    Py_RETURN_NONE;
}

static PyObject *wino_weights(PyObject *module, PyObject *args) {
    (void)module;
    const char *isa;
    int nh, mh, nw, mw;
    PyObject *o[3];
    if (!PyArg_ParseTuple(args, "siiiiOOO:wino_weights", &isa, &nh, &mh, &nw, &mw, &o[0], &o[1], &o[2])) return NULL;
    const cbn_kernels *k = cbn_testing_table(isa);
    int64_t ws[3], ts[2], us[3];
    const float *w = k ? cbn_testing_axes(o[0], "w", NPY_FLOAT, 3, ws) : NULL;
    const int32_t *tap = w ? cbn_testing_axes(o[1], "tap", NPY_INT32, 2, ts) : NULL;
    float *u = tap ? cbn_testing_axes(o[2], "u", NPY_FLOAT, 3, us) : NULL;
    if (!u) return NULL;
    bool ok = is_axis(nh, mh) && is_axis(nw, mw) && ts[0] >= 1 && ts[0] <= nh - mh + 1 && ts[1] >= 1 &&
              ts[1] <= nw - mw + 1 && ws[2] == k->lanes && us[2] == k->lanes && us[0] == nh * nw && us[1] == ws[0];
    int32_t at[CBN_WINO_POINTS * CBN_WINO_POINTS];
    for (int64_t i = 0; ok && i < ts[0] * ts[1]; i++) {
        ok = tap[i] < ws[1];
        at[i] = tap[i] < 0 ? -1 : tap[i] * k->lanes;
    }
    if (!ok) return cbn_testing_refuse("wino_weights: the arguments do not fit each other");
    double gh[CBN_WINO_POINTS][CBN_WINO_POINTS], gw[CBN_WINO_POINTS][CBN_WINO_POINTS];
    cbn_wino_g(nh, mh, gh);
    cbn_wino_g(nw, mw, gw);
    const cbn_wino_weights_args a = {.nh = nh, .nw = nw, .high = (int)ts[0], .wide = (int)ts[1], .gh = gh[0],
                                     .gw = gw[0], .w = w, .w_c = ws[1] * k->lanes, .tap = at, .u = u,
                                     .u_c = k->lanes, .u_xi = ws[0] * k->lanes, .n = ws[0]};
    k->wino_weights(&a);
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
    {"wino_weights", wino_weights, METH_VARARGS,
     "wino_weights(isa, nh, mh, nw, mw, w, tap, u): w is [channel][tap][lane], tap [high][wide], "
     "u [point][channel][lane]."},
    {NULL, NULL, 0, NULL},
};
