/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: panel_pack, interleave and conv_px2 of each instruction set. */
#include "python/py_module.h"
#include "python/py_testing.h"

/* moves: rows of x, out, lo, hi, n, skip. */
static bool moves_get(PyObject *obj, int lanes, int64_t out_size, int64_t x_size, cbn_panel_move *moves,
                      int64_t most, int64_t *count) {
    int64_t shape[2];
    const int64_t *m = cbn_testing_axes(obj, "moves", NPY_INT64, 2, shape);
    if (!m) return false;
    if (shape[1] != 6 || shape[0] > most) {
        cbn_testing_refuse("panel_pack: expected moves of 6 numbers");
        return false;
    }
    for (int64_t i = 0; i < shape[0]; i++, m += 6) {
        if (m[1] < 0 || m[4] < 1 || m[4] > lanes || m[1] + m[4] > out_size || m[2] < 0 || m[3] > lanes ||
            m[5] < 0 || m[5] > 1 ||
            (m[2] < m[3] && (m[0] + m[2] * (1 + m[5]) < 0 || m[0] + (m[3] - 1) * (1 + m[5]) >= x_size))) {
            cbn_testing_refuse("panel_pack: a move leaves the arrays");
            return false;
        }
        moves[i] = (cbn_panel_move){
            .x = m[0], .out = m[1], .lo = (int16_t)m[2], .hi = (int16_t)m[3], .n = (int16_t)m[4],
            .skip = (int16_t)m[5]};
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
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[ISA]));
    float *out = k ? cbn_testing_axes(args[OUT], "out", NPY_FLOAT, 1, &out_size) : NULL;
    const float *x = out ? cbn_testing_axes(args[X], "x", NPY_FLOAT, 2, shape) : NULL;
    if (!x || !cbn_py_ints(args[OUT_C], "out_c", 1, &out_c)) return NULL;
    /* Channels do not meet, so each has its out_c. */
    const int64_t room = CBN_MIN(out_c, out_size - CBN_MAX(shape[0] - 1, 0) * out_c);
    if (out_c < 0 || !moves_get(args[MOVES], k->lanes, room, shape[1], moves, MOST, &n)) {
        if (!PyErr_Occurred()) cbn_testing_refuse("panel_pack: out_c is negative");
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
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[ISA]));
    float *y = k ? cbn_testing_axes(args[Y], "y", NPY_FLOAT, 2, ys) : NULL;
    const float *s = y ? cbn_testing_axes(args[S], "s", NPY_FLOAT, 3, ss) : NULL;
    const float *bias = s ? cbn_testing_axes(args[BIAS], "bias", NPY_FLOAT, 1, &bs) : NULL;
    const float *residual = NULL;
    if (!bias || !cbn_py_ints(args[N], "n", 1, &n) || !cbn_py_double(args[LO], "lo", &lo) ||
        !cbn_py_double(args[HI], "hi", &hi))
        return NULL;
    if (args[RESIDUAL] != Py_None) {
        residual = cbn_testing_axes(args[RESIDUAL], "residual", NPY_FLOAT, 2, rs);
        if (!residual) return NULL;
        if (rs[0] != ys[0] || rs[1] != ys[1]) cbn_testing_refuse("interleave: expected a residual shaped as y");
    }
    if (!PyErr_Occurred() &&
        (n < 0 || n > ys[1] || ss[1] < 1 || cbn_ceil_div(n, ss[1]) > ss[2] || ss[0] < ys[0] || bs < ys[0]))
        cbn_testing_refuse("interleave: the arrays are too small");
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
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[ISA]));
    const float *x = k ? cbn_testing_axes(args[X], "x", NPY_FLOAT, 2, xs) : NULL;
    const float *w = x ? cbn_testing_axes(args[W], "w", NPY_FLOAT, 1, &ws) : NULL;
    float *y = w ? cbn_testing_axes(args[Y], "y", NPY_FLOAT, 2, ys) : NULL;
    const float *bias = y ? cbn_testing_axes(args[BIAS], "bias", NPY_FLOAT, 1, &bs) : NULL;
    if (!bias || !cbn_py_ints(args[NP], "np", 1, &np) || !cbn_py_ints(args[MR], "mr", 1, &mr) ||
        !cbn_py_double(args[LO], "lo", &lo) || !cbn_py_double(args[HI], "hi", &hi))
        return NULL;
    const float *residual = NULL;
    float *copy = NULL;
    if (args[RESIDUAL] != Py_None && !(residual = cbn_testing_axes(args[RESIDUAL], "residual", NPY_FLOAT, 2, rs)))
        return NULL;
    if (args[COPY] != Py_None && !(copy = cbn_testing_axes(args[COPY], "copy", NPY_FLOAT, 1, &cs))) return NULL;
    const int64_t whole = cbn_ceil_div(np, k->lanes) * k->lanes, rows = 2 * ys[0];
    if ((mr != k->px_mr && mr != k->px_mr - 2) || np < 1 || np > k->px_nv * k->lanes ||
        xs[1] < (copy ? np : whole) || (copy && cs < xs[0] * whole) || ys[0] < 1 || ys[1] < 2 * np ||
        bs < ys[0] || ws < cbn_ceil_div(rows, mr) * mr * xs[0] ||
        (residual && (rs[0] != ys[0] || rs[1] != ys[1])))
        return cbn_testing_refuse("conv_px2: the arrays do not fit each other");
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

PyMethodDef cbn_testing_phases_methods[] = {
    CBN_TESTING_METHOD(panel_pack, "(isa, out, out_c, x, moves)"),
    CBN_TESTING_METHOD(interleave, "(isa, y, s, n, bias, residual, lo, hi)"),
    CBN_TESTING_METHOD(conv_px2, "(isa, x, np, copy, w, mr, y, bias, residual, lo, hi)"),
    {NULL, NULL, 0, NULL},
};
