/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: conv_dw and the elementwise kernels of each instruction set, on the caller's own memory. The arrays are
 * used as they are, so that tests can put them between guard pages: C-contiguous ndarrays of the exact dtype. */
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

/* The memory of an array of `type` with at least `least` elements; *n receives how many there are. */
static void *raw(PyObject *obj, const char *name, int type, int64_t least, int64_t *n) {
    if (!PyArray_Check(obj) || PyArray_TYPE((PyArrayObject *)obj) != type ||
        !PyArray_ISCARRAY_RO((PyArrayObject *)obj)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous ndarray of the kernel's dtype", name);
        return NULL;
    }
    const int64_t size = PyArray_SIZE((PyArrayObject *)obj);
    if (size < least) {
        PyErr_Format(PyExc_ValueError, "%s: expected at least %lld elements, got %lld", name, (long long)least,
                     (long long)size);
        return NULL;
    }
    if (n) *n = size;
    return PyArray_DATA((PyArrayObject *)obj);
}

static PyObject *unary(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    static const char *const kinds[] = {"none",     "relu",      "relu6", "leaky_relu", "sigmoid",
                                        "hardtanh", "hardswish", "silu",  "gelu",       "gelu_tanh",
                                        NULL}; /* in the order of cbn_act */
    double a, b;
    int64_t n;
    if (!cbn_py_nargs("unary", nargs, 6)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    const int kind = k ? cbn_py_choice(args[1], "kind", kinds) : -1;
    if (kind < 0 || !cbn_py_double(args[2], "a", &a) || !cbn_py_double(args[3], "b", &b)) return NULL;
    float *y = raw(args[4], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? raw(args[5], "x", NPY_FLOAT, n, NULL) : NULL;
    if (!x) return NULL;
    k->unary((cbn_act)kind, (float)a, (float)b, y, x, n);
    Py_RETURN_NONE;
}

static PyObject *affine(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    double scale, shift;
    int64_t n;
    if (!cbn_py_nargs("affine", nargs, 5)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    if (!k || !cbn_py_double(args[3], "scale", &scale) || !cbn_py_double(args[4], "shift", &shift)) return NULL;
    float *y = raw(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? raw(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    if (!x) return NULL;
    k->affine(y, x, (float)scale, (float)shift, n);
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    double alpha;
    int64_t n;
    if (!cbn_py_nargs("add", nargs, 5)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    if (!k || !cbn_py_double(args[4], "alpha", &alpha)) return NULL;
    float *y = raw(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? raw(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    const float *z = x ? raw(args[3], "z", NPY_FLOAT, n, NULL) : NULL;
    if (!z) return NULL;
    k->add(y, x, z, (float)alpha, n);
    Py_RETURN_NONE;
}

static PyObject *mul(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    int64_t n;
    if (!cbn_py_nargs("mul", nargs, 4)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    if (!k) return NULL;
    float *y = raw(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? raw(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    const float *z = x ? raw(args[3], "z", NPY_FLOAT, n, NULL) : NULL;
    if (!z) return NULL;
    k->mul(y, x, z, n);
    Py_RETURN_NONE;
}

static PyObject *call_into(const char *name, bool max, PyObject *const *args, Py_ssize_t nargs) {
    int64_t n, step;
    if (!cbn_py_nargs(name, nargs, 4)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    if (!k || !cbn_py_int64(args[3], "step", &step)) return NULL;
    if (step < 1) {
        PyErr_Format(PyExc_ValueError, "step: expected >= 1, got %lld", (long long)step);
        return NULL;
    }
    float *y = raw(args[1], "y", NPY_FLOAT, 0, &n);
    const float *x = y ? raw(args[2], "x", NPY_FLOAT, n ? (n - 1) * step + 1 : 0, NULL) : NULL;
    if (!x) return NULL;
    if (max) k->max_into(y, x, step, n);
    else k->add_into(y, x, step, n);
    Py_RETURN_NONE;
}

static PyObject *max_into(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return call_into("max_into", true, args, nargs);
}
static PyObject *add_into(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    return call_into("add_into", false, args, nargs);
}

static PyObject *widen_f16(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    int64_t n;
    if (!cbn_py_nargs("widen_f16", nargs, 3)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    float *y = k ? raw(args[1], "y", NPY_FLOAT, 0, &n) : NULL;
    const uint16_t *x = y ? raw(args[2], "x", NPY_HALF, n, NULL) : NULL;
    if (!x) return NULL;
    k->widen_f16(y, x, n);
    Py_RETURN_NONE;
}

static PyObject *narrow_f16(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    int64_t n;
    if (!cbn_py_nargs("narrow_f16", nargs, 3)) return NULL;
    const cbn_kernels *k = find_table(args[0]);
    uint16_t *y = k ? raw(args[1], "y", NPY_HALF, 0, &n) : NULL;
    const float *x = y ? raw(args[2], "x", NPY_FLOAT, n, NULL) : NULL;
    if (!x) return NULL;
    k->narrow_f16(y, x, n);
    Py_RETURN_NONE;
}

static bool get_volume(PyObject *obj, const char *name, float **data, int64_t *shape) {
    *data = raw(obj, name, NPY_FLOAT, 0, NULL);
    if (!*data) return false;
    if (PyArray_NDIM((PyArrayObject *)obj) != 3) {
        PyErr_Format(PyExc_ValueError, "%s: expected 3 axes, got %d", name, PyArray_NDIM((PyArrayObject *)obj));
        return false;
    }
    for (int i = 0; i < 3; i++) shape[i] = PyArray_DIM((PyArrayObject *)obj, i);
    return true;
}

static PyObject *conv_dw(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    enum { ISA, Y, X, W, RESIDUAL, BIAS, LO, HI, STRIDE, PADDING, DILATION, PLANES, ROWS, COUNT };
    if (!cbn_py_nargs("conv_dw", nargs, COUNT)) return NULL;
    const cbn_kernels *k = find_table(args[ISA]);
    float *x, *w, *y, *residual = NULL;
    int64_t in[3], ks[3], out[3], rs[3], stride[3], pad[3], dil[3], planes[2], rows[2];
    double bias, lo, hi;
    if (!k || !get_volume(args[Y], "y", &y, out) || !get_volume(args[X], "x", &x, in) ||
        !get_volume(args[W], "w", &w, ks) ||
        (args[RESIDUAL] != Py_None && !get_volume(args[RESIDUAL], "residual", &residual, rs)) ||
        !cbn_py_double(args[BIAS], "bias", &bias) || !cbn_py_double(args[LO], "lo", &lo) ||
        !cbn_py_double(args[HI], "hi", &hi) || !cbn_py_ints(args[STRIDE], "stride", 3, stride) ||
        !cbn_py_ints(args[PADDING], "padding", 3, pad) || !cbn_py_ints(args[DILATION], "dilation", 3, dil) ||
        !cbn_py_ints(args[PLANES], "planes", 2, planes) || !cbn_py_ints(args[ROWS], "rows", 2, rows))
        return NULL;
    for (int i = 0; i < 3; i++) {
        if (ks[i] >= 1 && stride[i] >= 1 && dil[i] >= 1 && pad[i] >= 0 && (!residual || rs[i] == out[i])) continue;
        PyErr_SetString(PyExc_ValueError, "conv_dw: expected sizes >= 1 and a residual shaped as y");
        return NULL;
    }
    if (planes[0] < 0 || planes[1] > out[0] || rows[0] < 0 || rows[1] > out[1]) {
        PyErr_SetString(PyExc_ValueError, "conv_dw: expected planes and rows inside y");
        return NULL;
    }
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

#define CBN_METHOD_(name, signature)                                                               \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, PyDoc_STR(#name signature)}
PyMethodDef cbn_testing_vec_methods[] = {
    CBN_METHOD_(unary, "(isa, kind, a, b, y, x)"),
    CBN_METHOD_(affine, "(isa, y, x, scale, shift)"),
    CBN_METHOD_(add, "(isa, y, x, z, alpha)"),
    CBN_METHOD_(mul, "(isa, y, x, z)"),
    CBN_METHOD_(max_into, "(isa, y, x, step)"),
    CBN_METHOD_(add_into, "(isa, y, x, step)"),
    CBN_METHOD_(widen_f16, "(isa, y, x)"),
    CBN_METHOD_(narrow_f16, "(isa, y, x)"),
    CBN_METHOD_(conv_dw, "(isa, y, x, w, residual, bias, lo, hi, stride, padding, dilation, planes, rows)"),
    {NULL, NULL, 0, NULL},
};
