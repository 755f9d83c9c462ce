/* SPDX-License-Identifier: BSD-3-Clause */
/* _core: batch_norm, unary, binary, softmax, pooling, pad. */
#include "python/py_array.h"
#include "python/py_error.h"
#include "python/py_module.h"

#include "base/cbn_checked.h"
#include "ops/nn_ops.h"

/* Hands a finished computation over: the result, or the exception that belongs to `status`. */
static PyObject *finish(cbn_status status, const cbn_error *err, cbn_output *y) {
    return status == CBN_OK ? cbn_output_finish(y) : cbn_py_raise(status, err);
}

static bool check_ndim(const cbn_array *a, const char *name, int least, int most) {
    const int ndim = cbn_array_ndim(a);
    if (ndim >= least && ndim <= most) return true;
    PyErr_Format(PyExc_ValueError, "%s: expected %d to %d axes, got %d", name, least, most, ndim);
    return false;
}

/* ---- batch_norm -------------------------------------------------------------------------------------------------- */

enum { BN_WEIGHT, BN_BIAS, BN_MEAN, BN_VAR, BN_ARRAYS };
static const char *const bn_names[BN_ARRAYS] = {"weight", "bias", "running_mean", "running_var"};

static bool get_bn_array(PyObject *obj, int which, bool inout, cbn_array *a, cbn_strided *out) {
    const char *name = bn_names[which];
    if (obj != Py_None && inout) {
        if (!cbn_array_get_inout(obj, name, a)) return false;
    } else if (!cbn_array_get_optional(obj, name, CBN_LAYOUT_STRIDED, a)) {
        return false;
    }
    return cbn_array_strided(a, name, out);
}

static PyObject *batch_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("batch_norm", nargs, 9)) return NULL;
    PyObject *const objects[BN_ARRAYS] = {args[3], args[4], args[1], args[2]};
    cbn_array x = {0}, p[BN_ARRAYS] = {0};
    cbn_output y = {0};
    cbn_bn bn = {0};
    cbn_strided *const fields[BN_ARRAYS] = {&bn.weight, &bn.bias, &bn.mean, &bn.var};
    cbn_error err = {0};
    PyObject *result = NULL;
    bool training;
    double momentum;
    if (!cbn_py_bool(args[5], "training", &training) || !cbn_py_double(args[6], "momentum", &momentum) ||
        !cbn_py_double(args[7], "eps", &bn.eps) || !cbn_array_get(args[0], "input", CBN_LAYOUT_C, &x) ||
        !check_ndim(&x, "input", 2, CBN_MAX_DIMS))
        goto done;
    for (int i = 0; i < BN_ARRAYS; i++)
        if (!get_bn_array(objects[i], i, training && i >= BN_MEAN, &p[i], fields[i])) goto done;
    const npy_intp *shape = cbn_array_shape(&x);
    int64_t inner = 1;
    for (int i = 2; i < cbn_array_ndim(&x); i++) inner *= shape[i];
    if (!cbn_output_begin(args[8], cbn_array_ndim(&x), shape, x.dtype,
                          (const cbn_array *[]){&x, &p[0], &p[1], &p[2], &p[3]}, 5, &y))
        goto done;
    cbn_status status;
    Py_BEGIN_ALLOW_THREADS
    status = training ? cbn_batch_norm_train(x.dtype, shape[0], shape[1], inner, cbn_array_data(&x), &bn, momentum,
                                             cbn_output_data(&y), &err)
                      : cbn_batch_norm_eval(x.dtype, shape[0], shape[1], inner, cbn_array_data(&x), &bn,
                                            cbn_output_data(&y), &err);
    Py_END_ALLOW_THREADS
    if (status == CBN_OK && training) {
        if (p[BN_MEAN].array && !cbn_array_write_back(&p[BN_MEAN])) goto done;
        if (p[BN_VAR].array && !cbn_array_write_back(&p[BN_VAR])) goto done;
    }
    result = finish(status, &err, &y);
done:
    cbn_output_release(&y);
    for (int i = 0; i < BN_ARRAYS; i++) cbn_array_release(&p[i]);
    cbn_array_release(&x);
    return result;
}

/* ---- elementwise ------------------------------------------------------------------------------------------------- */

static PyObject *unary(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    static const char *const kinds[] = {"relu",      "relu6", "leaky_relu", "sigmoid",   "hardtanh",
                                        "hardswish", "silu",  "gelu",       "gelu_tanh", NULL};
    static const cbn_act acts[] = {CBN_ACT_RELU,      CBN_ACT_RELU6, CBN_ACT_LEAKY_RELU,
                                   CBN_ACT_SIGMOID,   CBN_ACT_HARDTANH, CBN_ACT_HARDSWISH,
                                   CBN_ACT_SILU,      CBN_ACT_GELU,  CBN_ACT_GELU_TANH};
    if (!cbn_py_nargs("unary", nargs, 5)) return NULL;
    cbn_array x = {0};
    cbn_output y = {0};
    cbn_error err = {0};
    PyObject *result = NULL;
    double a, b;
    const int kind = cbn_py_choice(args[0], "kind", kinds);
    if (kind < 0 || !cbn_py_double(args[2], "a", &a) || !cbn_py_double(args[3], "b", &b) ||
        !cbn_array_get(args[1], "input", CBN_LAYOUT_C, &x))
        goto done;
    if (!cbn_output_begin(args[4], cbn_array_ndim(&x), cbn_array_shape(&x), x.dtype, (const cbn_array *[]){&x}, 1, &y))
        goto done;
    const int64_t n = PyArray_SIZE(x.array);
    cbn_status status;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_unary(x.dtype, acts[kind], a, b, cbn_array_data(&x), cbn_output_data(&y), n, &err);
    Py_END_ALLOW_THREADS
    result = finish(status, &err, &y);
done:
    cbn_output_release(&y);
    cbn_array_release(&x);
    return result;
}

/* NumPy's broadcasting of two C-contiguous arrays: the common shape, and strides in elements with 0 on repeated axes. */
static bool broadcast(const cbn_array *x, const cbn_array *z, int *ndim, npy_intp *shape, int64_t *xs, int64_t *zs) {
    const cbn_array *const operand[2] = {x, z};
    int64_t *const strides[2] = {xs, zs};
    *ndim = CBN_MAX(cbn_array_ndim(x), cbn_array_ndim(z));
    int64_t pitch[2] = {1, 1};
    for (int a = *ndim - 1; a >= 0; a--) {
        npy_intp size[2];
        for (int o = 0; o < 2; o++) {
            const int own = a - (*ndim - cbn_array_ndim(operand[o]));
            size[o] = own >= 0 ? cbn_array_shape(operand[o])[own] : 1;
            strides[o][a] = size[o] == 1 ? 0 : pitch[o];
            pitch[o] *= size[o];
        }
        if (size[0] != size[1] && size[0] != 1 && size[1] != 1) {
            PyErr_Format(PyExc_ValueError, "y: expected a shape that broadcasts with x, got sizes %zd and %zd on axis %d",
                         (Py_ssize_t)size[1], (Py_ssize_t)size[0], a);
            return false;
        }
        shape[a] = size[0] == 1 ? size[1] : size[0];
    }
    return true;
}

static PyObject *binary(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    static const char *const kinds[] = {"add", "mul", NULL};
    if (!cbn_py_nargs("binary", nargs, 5)) return NULL;
    cbn_array x = {0}, z = {0};
    cbn_output y = {0};
    cbn_error err = {0};
    PyObject *result = NULL;
    double alpha;
    int ndim;
    npy_intp shape[CBN_MAX_DIMS];
    int64_t sizes[CBN_MAX_DIMS], xs[CBN_MAX_DIMS], zs[CBN_MAX_DIMS];
    const int kind = cbn_py_choice(args[0], "kind", kinds);
    if (kind < 0 || !cbn_py_double(args[3], "alpha", &alpha) || !cbn_array_get(args[1], "x", CBN_LAYOUT_C, &x) ||
        !cbn_array_get(args[2], "y", CBN_LAYOUT_C, &z) || !cbn_array_same_dtype(&x, "x", &z, "y") ||
        !check_ndim(&x, "x", 0, CBN_MAX_DIMS) || !check_ndim(&z, "y", 0, CBN_MAX_DIMS) ||
        !broadcast(&x, &z, &ndim, shape, xs, zs))
        goto done;
    for (int a = 0; a < ndim; a++) sizes[a] = shape[a];
    if (!cbn_output_begin(args[4], ndim, shape, x.dtype, (const cbn_array *[]){&x, &z}, 2, &y)) goto done;
    cbn_status status;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_binary(x.dtype, kind == 0 ? CBN_BINARY_ADD : CBN_BINARY_MUL, ndim, sizes, cbn_array_data(&x), xs,
                        cbn_array_data(&z), zs, alpha, cbn_output_data(&y), &err);
    Py_END_ALLOW_THREADS
    result = finish(status, &err, &y);
done:
    cbn_output_release(&y);
    cbn_array_release(&x);
    cbn_array_release(&z);
    return result;
}

static PyObject *softmax(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("softmax", nargs, 3)) return NULL;
    cbn_array x = {0};
    cbn_output y = {0};
    cbn_error err = {0};
    PyObject *result = NULL;
    int64_t axis, outer = 1, inner = 1;
    if (!cbn_py_int64(args[1], "axis", &axis) || !cbn_array_get(args[0], "input", CBN_LAYOUT_C, &x)) goto done;
    const int ndim = cbn_array_ndim(&x);
    const npy_intp *shape = cbn_array_shape(&x);
    if (axis < -ndim || axis >= ndim) {
        PyErr_Format(PyExc_ValueError, "axis: expected %d to %d, got %lld", -ndim, ndim - 1, (long long)axis);
        goto done;
    }
    if (axis < 0) axis += ndim;
    for (int a = 0; a < ndim; a++) {
        if (a < axis) outer *= shape[a];
        if (a > axis) inner *= shape[a];
    }
    if (!cbn_output_begin(args[2], ndim, shape, x.dtype, (const cbn_array *[]){&x}, 1, &y)) goto done;
    cbn_status status;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_softmax(x.dtype, outer, shape[axis], inner, cbn_array_data(&x), cbn_output_data(&y), &err);
    Py_END_ALLOW_THREADS
    result = finish(status, &err, &y);
done:
    cbn_output_release(&y);
    cbn_array_release(&x);
    return result;
}

/* ---- pooling ----------------------------------------------------------------------------------------------------- */

/* The input of a pooling function: [channels][spatial...] or [batch][channels][spatial...]. */
static bool get_pool_input(PyObject *nd_obj, PyObject *obj, int *nd, cbn_array *x, int64_t *planes, int64_t *in) {
    int64_t axes;
    if (!cbn_py_int64(nd_obj, "nd", &axes)) return false;
    if (axes < 1 || axes > CBN_MAX_SPATIAL) {
        PyErr_Format(PyExc_ValueError, "nd: expected 1 to %d, got %lld", CBN_MAX_SPATIAL, (long long)axes);
        return false;
    }
    *nd = (int)axes;
    if (!cbn_array_get(obj, "input", CBN_LAYOUT_C, x) || !check_ndim(x, "input", *nd + 1, *nd + 2)) return false;
    const int lead = cbn_array_ndim(x) - *nd;
    *planes = 1;
    for (int a = 0; a < lead; a++) *planes *= cbn_array_shape(x)[a];
    for (int a = 0; a < *nd; a++) in[a] = cbn_array_shape(x)[lead + a];
    return true;
}

typedef cbn_status (*pool_fn)(const cbn_pool_desc *d, const void *x, void *y, cbn_error *err);

static PyObject *run_pool(const cbn_array *x, const cbn_pool_desc *d, pool_fn fn, PyObject *out) {
    cbn_output y = {0};
    cbn_error err = {0};
    PyObject *result = NULL;
    npy_intp shape[2 + CBN_MAX_SPATIAL];
    const int ndim = cbn_array_ndim(x);
    for (int a = 0; a < ndim; a++) {
        const int axis = a - (ndim - d->nd);
        shape[a] = axis < 0 ? cbn_array_shape(x)[a] : d->out[CBN_MAX_SPATIAL - d->nd + axis];
    }
    if (!cbn_output_begin(out, ndim, shape, x->dtype, (const cbn_array *[]){x}, 1, &y)) goto done;
    cbn_status status;
    Py_BEGIN_ALLOW_THREADS
    status = fn(d, cbn_array_data(x), cbn_output_data(&y), &err);
    Py_END_ALLOW_THREADS
    result = finish(status, &err, &y);
done:
    cbn_output_release(&y);
    return result;
}

static bool get_window(PyObject *const *args, int nd, int64_t *k, int64_t *stride, int64_t *pad) {
    return cbn_py_ints(args[0], "kernel_size", nd, k) &&
           cbn_py_ints(args[1] == Py_None ? args[0] : args[1], "stride", nd, stride) &&
           cbn_py_ints(args[2], "padding", nd, pad);
}

static PyObject *max_pool(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("max_pool", nargs, 8)) return NULL;
    cbn_array x = {0};
    cbn_pool_desc d;
    cbn_error err = {0};
    PyObject *result = NULL;
    int nd;
    int64_t planes, in[CBN_MAX_SPATIAL], k[CBN_MAX_SPATIAL], stride[CBN_MAX_SPATIAL], pad[CBN_MAX_SPATIAL],
        dil[CBN_MAX_SPATIAL];
    bool ceil_mode;
    if (!get_pool_input(args[0], args[1], &nd, &x, &planes, in) || !get_window(args + 2, nd, k, stride, pad) ||
        !cbn_py_ints(args[5], "dilation", nd, dil) || !cbn_py_bool(args[6], "ceil_mode", &ceil_mode))
        goto done;
    const cbn_status status = cbn_pool_desc_make(x.dtype, nd, planes, in, k, stride, pad, dil, ceil_mode, &d, &err);
    result = status == CBN_OK ? run_pool(&x, &d, cbn_max_pool, args[7]) : cbn_py_raise(status, &err);
done:
    cbn_array_release(&x);
    return result;
}

static PyObject *avg_pool(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("avg_pool", nargs, 9)) return NULL;
    cbn_array x = {0};
    cbn_pool_desc d;
    cbn_error err = {0};
    PyObject *result = NULL;
    int nd;
    int64_t planes, in[CBN_MAX_SPATIAL], k[CBN_MAX_SPATIAL], stride[CBN_MAX_SPATIAL], pad[CBN_MAX_SPATIAL];
    int64_t divisor = 0;
    bool ceil_mode, include_pad;
    if (!get_pool_input(args[0], args[1], &nd, &x, &planes, in) || !get_window(args + 2, nd, k, stride, pad) ||
        !cbn_py_bool(args[5], "ceil_mode", &ceil_mode) || !cbn_py_bool(args[6], "count_include_pad", &include_pad) ||
        (args[7] != Py_None && !cbn_py_int64(args[7], "divisor_override", &divisor)))
        goto done;
    if (args[7] != Py_None && divisor == 0) {
        PyErr_SetString(PyExc_ValueError, "divisor_override: expected None or a number other than 0, got 0");
        goto done;
    }
    const cbn_status status = cbn_pool_desc_make(x.dtype, nd, planes, in, k, stride, pad, NULL, ceil_mode, &d, &err);
    d.count_include_pad = include_pad;
    d.divisor = divisor;
    result = status == CBN_OK ? run_pool(&x, &d, cbn_avg_pool, args[8]) : cbn_py_raise(status, &err);
done:
    cbn_array_release(&x);
    return result;
}

/* output_size: an integer for all axes or one entry per axis; None keeps the input's size. */
static bool get_output_size(PyObject *obj, int nd, const int64_t *in, int64_t *out) {
    if (obj == Py_None || !PySequence_Check(obj)) {
        int64_t all = 0;
        if (obj != Py_None && !cbn_py_int64(obj, "output_size", &all)) return false;
        for (int a = 0; a < nd; a++) out[a] = obj == Py_None ? in[a] : all;
    } else {
        const Py_ssize_t count = PySequence_Size(obj);
        if (count < 0) return false;
        if (count != nd && count != 1) {
            PyErr_Format(PyExc_ValueError, "output_size: expected %d entries, got %zd", nd, count);
            return false;
        }
        for (int a = 0; a < nd; a++) {
            PyObject *item = PySequence_GetItem(obj, count == 1 ? 0 : a);
            if (!item) return false;
            const bool ok = item == Py_None || cbn_py_int64(item, "output_size", &out[a]);
            if (item == Py_None) out[a] = in[a];
            Py_DECREF(item);
            if (!ok) return false;
        }
    }
    for (int a = 0; a < nd; a++) {
        if (out[a] >= 1) continue;
        PyErr_Format(PyExc_ValueError, "output_size: expected >= 1, got %lld", (long long)out[a]);
        return false;
    }
    return true;
}

static PyObject *adaptive_avg_pool(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("adaptive_avg_pool", nargs, 4)) return NULL;
    cbn_array x = {0};
    PyObject *result = NULL;
    int nd;
    int64_t planes, in[CBN_MAX_SPATIAL], out[CBN_MAX_SPATIAL];
    if (!get_pool_input(args[0], args[1], &nd, &x, &planes, in) || !get_output_size(args[2], nd, in, out)) goto done;
    cbn_pool_desc d = {.dtype = x.dtype, .nd = nd, .planes = planes};
    for (int i = 0; i < CBN_MAX_SPATIAL; i++) {
        const int u = i - (CBN_MAX_SPATIAL - nd);
        d.in[i] = u < 0 ? 1 : in[u];
        d.out[i] = u < 0 ? 1 : out[u];
        int64_t product;
        if (d.in[i] < 1 || !cbn_mul_ok(d.in[i], d.out[i] + 1, &product)) {
            PyErr_Format(PyExc_ValueError, "input: expected spatial sizes >= 1 that fit output_size %lld, got %lld",
                         (long long)d.out[i], (long long)d.in[i]);
            goto done;
        }
    }
    result = run_pool(&x, &d, cbn_adaptive_avg_pool, args[3]);
done:
    cbn_array_release(&x);
    return result;
}

/* ---- pad --------------------------------------------------------------------------------------------------------- */

static PyObject *pad(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    static const char *const modes[] = {"constant", "reflect", "replicate", "circular", NULL};
    static const cbn_pad_mode codes[] = {CBN_MODE_ZEROS, CBN_MODE_REFLECT, CBN_MODE_REPLICATE, CBN_MODE_CIRCULAR};
    if (!cbn_py_nargs("pad", nargs, 5)) return NULL;
    cbn_array x = {0};
    cbn_output y = {0};
    cbn_error err = {0};
    PyObject *result = NULL;
    double value;
    int64_t amounts[2 * CBN_MAX_DIMS], shape[CBN_MAX_DIMS], lo[CBN_MAX_DIMS] = {0}, hi[CBN_MAX_DIMS] = {0};
    int64_t sizes[CBN_MAX_DIMS];
    npy_intp out_shape[CBN_MAX_DIMS];
    const int mode = cbn_py_choice(args[2], "mode", modes);
    if (mode < 0 || !cbn_py_double(args[3], "value", &value) || !cbn_array_get(args[0], "input", CBN_LAYOUT_C, &x) ||
        !check_ndim(&x, "input", 0, CBN_MAX_DIMS))
        goto done;
    const int ndim = cbn_array_ndim(&x);
    const Py_ssize_t count = PySequence_Size(args[1]);
    if (count < 0) {
        PyErr_Format(PyExc_TypeError, "padding: expected a sequence of integers, got %.80s", Py_TYPE(args[1])->tp_name);
        goto done;
    }
    if (count % 2 || count > 2 * ndim) {
        PyErr_Format(PyExc_ValueError, "padding: expected an even number of entries up to %d, got %zd", 2 * ndim, count);
        goto done;
    }
    if (count > 0 && !cbn_py_ints(args[1], "padding", (int)count, amounts)) goto done;
    for (int a = 0; a < ndim; a++) shape[a] = cbn_array_shape(&x)[a];
    for (int i = 0; i < (int)count / 2; i++) {
        lo[ndim - 1 - i] = amounts[2 * i];
        hi[ndim - 1 - i] = amounts[2 * i + 1];
    }
    cbn_status status = cbn_pad_shape(ndim, shape, lo, hi, codes[mode], sizes, &err);
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        goto done;
    }
    for (int a = 0; a < ndim; a++) out_shape[a] = (npy_intp)sizes[a];
    if (!cbn_output_begin(args[4], ndim, out_shape, x.dtype, (const cbn_array *[]){&x}, 1, &y)) goto done;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_pad(x.dtype, ndim, shape, lo, hi, codes[mode], value, cbn_array_data(&x), cbn_output_data(&y), &err);
    Py_END_ALLOW_THREADS
    result = finish(status, &err, &y);
done:
    cbn_output_release(&y);
    cbn_array_release(&x);
    return result;
}

#define CBN_METHOD_(name, signature)                                                               \
    {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, PyDoc_STR(#name signature)}
PyMethodDef cbn_nnops_methods[] = {
    CBN_METHOD_(batch_norm, "(input, running_mean, running_var, weight, bias, training, momentum, eps, out, /)"),
    CBN_METHOD_(unary, "(kind, input, a, b, out, /)"),
    CBN_METHOD_(binary, "(kind, x, y, alpha, out, /)"),
    CBN_METHOD_(softmax, "(input, axis, out, /)"),
    CBN_METHOD_(max_pool, "(nd, input, kernel_size, stride, padding, dilation, ceil_mode, out, /)"),
    CBN_METHOD_(avg_pool,
                "(nd, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, out, /)"),
    CBN_METHOD_(adaptive_avg_pool, "(nd, input, output_size, out, /)"),
    CBN_METHOD_(pad, "(input, padding, mode, value, out, /)"),
    {NULL, NULL, 0, NULL},
};
