/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: conv_dw and the elementwise kernels of each instruction set. */
#include "python/py_module.h"
#include "python/py_testing.h"

static PyObject *unary(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    static const char *const kinds[] = {"none",     "relu",      "relu6", "leaky_relu", "sigmoid",
                                        "hardtanh", "hardswish", "silu",  "gelu",       "gelu_tanh",
                                        NULL}; /* in the order of cbn_act */
    double a, b;
    int64_t n;
    if (!cbn_py_nargs("unary", nargs, 6)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    const int kind = k ? cbn_py_choice(args[1], "kind", kinds) : -1;
    if (kind < 0 || !cbn_py_double(args[2], "a", &a) || !cbn_py_double(args[3], "b", &b)) return NULL;
    float *y = cbn_testing_array(args[4], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? cbn_testing_array(args[5], "x", NPY_FLOAT, n, NULL) : NULL;
    if (!x) return NULL;
    k->unary((cbn_act)kind, (float)a, (float)b, y, x, n);
    Py_RETURN_NONE;
}

static PyObject *affine(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    double scale, shift;
    int64_t n;
    if (!cbn_py_nargs("affine", nargs, 5)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    if (!k || !cbn_py_double(args[3], "scale", &scale) || !cbn_py_double(args[4], "shift", &shift)) return NULL;
    float *y = cbn_testing_array(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? cbn_testing_array(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    if (!x) return NULL;
    k->affine(y, x, (float)scale, (float)shift, n);
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    double alpha;
    int64_t n;
    if (!cbn_py_nargs("add", nargs, 5)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    if (!k || !cbn_py_double(args[4], "alpha", &alpha)) return NULL;
    float *y = cbn_testing_array(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? cbn_testing_array(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    const float *z = x ? cbn_testing_array(args[3], "z", NPY_FLOAT, n, NULL) : NULL;
    if (!z) return NULL;
    k->add(y, x, z, (float)alpha, n);
    Py_RETURN_NONE;
}

static PyObject *mul(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    int64_t n;
    if (!cbn_py_nargs("mul", nargs, 4)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    if (!k) return NULL;
    float *y = cbn_testing_array(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? cbn_testing_array(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    const float *z = x ? cbn_testing_array(args[3], "z", NPY_FLOAT, n, NULL) : NULL;
    if (!z) return NULL;
    k->mul(y, x, z, n);
    Py_RETURN_NONE;
}

static PyObject *call_pool(const char *name, bool max, PyObject *const *args, Py_ssize_t nargs) {
    cbn_pool_args a;
    if (!cbn_py_nargs(name, nargs, 6)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    if (!k || !cbn_py_int64(args[3], "step", &a.step) || !cbn_py_ints(args[4], "taps", 2, a.taps) ||
        !cbn_py_ints(args[5], "apart", 2, a.apart))
        return NULL;
    if (a.step < 1 || a.taps[0] < 1 || a.taps[1] < 1 || a.apart[0] < 0 || a.apart[1] < 0)
        return cbn_testing_refuse("pooling: expected step and taps >= 1 and apart >= 0");
    a.y = cbn_testing_array(args[1], "y", NPY_FLOAT, 0, &a.n);
    const int64_t reach = (a.n - 1) * a.step + (a.taps[0] - 1) * a.apart[0] + (a.taps[1] - 1) * a.apart[1] + 1;
    a.x = a.y ? cbn_testing_array(args[2], "x", NPY_FLOAT, a.n ? reach : 0, NULL) : NULL;
    if (!a.x) return NULL;
    if (max) k->pool_max(&a);
    else k->pool_add(&a);
    Py_RETURN_NONE;
}

static PyObject *pool_max(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return call_pool("pool_max", true, args, nargs);
}
static PyObject *pool_add(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return call_pool("pool_add", false, args, nargs);
}

static PyObject *widen_f16(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    int64_t n;
    if (!cbn_py_nargs("widen_f16", nargs, 3)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    float *y = k ? cbn_testing_array(args[1], "y", NPY_FLOAT, 0, &n) : NULL;
    const uint16_t *x = y ? cbn_testing_array(args[2], "x", NPY_HALF, n, NULL) : NULL;
    if (!x) return NULL;
    k->widen_f16(y, x, n);
    Py_RETURN_NONE;
}

static PyObject *narrow_f16(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    int64_t n;
    if (!cbn_py_nargs("narrow_f16", nargs, 3)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[0]));
    uint16_t *y = k ? cbn_testing_array(args[1], "y", NPY_HALF, 0, &n) : NULL;
    const float *x = y ? cbn_testing_array(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    if (!x) return NULL;
    k->narrow_f16(y, x, n);
    Py_RETURN_NONE;
}

static PyObject *conv_dw(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    enum { ISA, Y, X, W, RESIDUAL, BIAS, LO, HI, STRIDE, PADDING, DILATION, PLANES, ROWS, COUNT };
    if (!cbn_py_nargs("conv_dw", nargs, COUNT)) return NULL;
    const cbn_kernels *k = cbn_testing_table(PyUnicode_AsUTF8(args[ISA]));
    int64_t in[3], ks[3], out[3], rs[3], stride[3], pad[3], dil[3], planes[2], rows[2];
    double bias, lo, hi;
    float *y = k ? cbn_testing_axes(args[Y], "y", NPY_FLOAT, 3, out) : NULL;
    const float *x = y ? cbn_testing_axes(args[X], "x", NPY_FLOAT, 3, in) : NULL;
    const float *w = x ? cbn_testing_axes(args[W], "w", NPY_FLOAT, 3, ks) : NULL, *residual = NULL;
    if (!w || (args[RESIDUAL] != Py_None &&
               !(residual = cbn_testing_axes(args[RESIDUAL], "residual", NPY_FLOAT, 3, rs))) ||
        !cbn_py_double(args[BIAS], "bias", &bias) || !cbn_py_double(args[LO], "lo", &lo) ||
        !cbn_py_double(args[HI], "hi", &hi) || !cbn_py_ints(args[STRIDE], "stride", 3, stride) ||
        !cbn_py_ints(args[PADDING], "padding", 3, pad) || !cbn_py_ints(args[DILATION], "dilation", 3, dil) ||
        !cbn_py_ints(args[PLANES], "planes", 2, planes) || !cbn_py_ints(args[ROWS], "rows", 2, rows))
        return NULL;
    for (int i = 0; i < 3; i++) {
        if (ks[i] >= 1 && stride[i] >= 1 && dil[i] >= 1 && pad[i] >= 0 && (!residual || rs[i] == out[i])) continue;
        return cbn_testing_refuse("conv_dw: expected sizes >= 1 and a residual shaped as y");
    }
    if (planes[0] < 0 || planes[1] > out[0] || rows[0] < 0 || rows[1] > out[1])
        return cbn_testing_refuse("conv_dw: expected planes and rows inside y");
    const cbn_conv_dw_args a = {
        .x = x, .w = w, .y = y, .residual = residual, .bias = (float)bias, .lo = (float)lo, .hi = (float)hi,
        .id = in[0], .ih = in[1], .iw = in[2], .od = out[0], .oh = out[1], .ow = out[2],
        .kd = (int32_t)ks[0], .kh = (int32_t)ks[1], .kw = (int32_t)ks[2],
        .sd = (int32_t)stride[0], .sh = (int32_t)stride[1], .sw = (int32_t)stride[2],
        .pd = (int32_t)pad[0], .ph = (int32_t)pad[1], .pw = (int32_t)pad[2],
        .dd = (int32_t)dil[0], .dh = (int32_t)dil[1], .dw = (int32_t)dil[2],
        .od0 = planes[0], .od1 = planes[1], .oh0 = rows[0], .oh1 = rows[1],
    };
    Py_BEGIN_ALLOW_THREADS
    k->conv_dw(&a);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyMethodDef cbn_testing_vec_methods[] = {
    CBN_TESTING_METHOD(unary, "(isa, kind, a, b, y, x)"),
    CBN_TESTING_METHOD(affine, "(isa, y, x, scale, shift)"),
    CBN_TESTING_METHOD(add, "(isa, y, x, z, alpha)"),
    CBN_TESTING_METHOD(mul, "(isa, y, x, z)"),
    CBN_TESTING_METHOD(pool_max, "(isa, y, x, step, taps, apart)"),
    CBN_TESTING_METHOD(pool_add, "(isa, y, x, step, taps, apart)"),
    CBN_TESTING_METHOD(widen_f16, "(isa, y, x)"),
    CBN_TESTING_METHOD(narrow_f16, "(isa, y, x)"),
    CBN_TESTING_METHOD(conv_dw, "(isa, y, x, w, residual, bias, lo, hi, stride, padding, dilation, planes, rows)"),
    {NULL, NULL, 0, NULL},
};
