/* SPDX-License-Identifier: BSD-3-Clause */
#include "python/py_fold.h"

#include "base/cbn_checked.h"
#include "python/py_error.h"
#include "python/py_module.h"

#include <math.h>

const cbn_bn_names cbn_bn_attribute_names = {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.eps"};
static const cbn_bn_names function_names = {"bn_w", "bn_b", "bn_rm", "bn_rv", "bn_eps"};

/* ---- parameters ---- */

static bool get_vector(PyObject *obj, const char *name, cbn_array *array, cbn_strided *out) {
    if (!cbn_array_get_optional(obj, name, CBN_LAYOUT_STRIDED, array)) return false;
    if (array->array != NULL && cbn_array_ndim(array) != 1) {
        PyErr_Format(PyExc_ValueError, "%s: expected 1 axis, got %d", name, cbn_array_ndim(array));
        return false;
    }
    return cbn_array_strided(array, name, out);
}

static bool need_statistic(PyObject *obj, const char *name) {
    if (obj != Py_None) return true;
    cbn_error err = {0};
    cbn_py_raise(cbn_fail_fold(&err, "NO_RUNNING_STATS",
                               "%s: expected an array, got None; a BatchNorm without running statistics cannot "
                               "be folded",
                               name), &err);
    return false;
}

bool cbn_bn_get(PyObject *weight, PyObject *bias, PyObject *mean, PyObject *var, PyObject *eps,
                const cbn_bn_names *names, cbn_bn_arrays *out) {
    out->names = names;
    return need_statistic(mean, names->mean) && need_statistic(var, names->var) &&
           get_vector(weight, names->weight, &out->weight, &out->bn.weight) &&
           get_vector(bias, names->bias, &out->bias, &out->bn.bias) &&
           get_vector(mean, names->mean, &out->mean, &out->bn.mean) &&
           get_vector(var, names->var, &out->var, &out->bn.var) && cbn_py_double(eps, names->eps, &out->bn.eps);
}

static bool check_not_training(PyObject *obj) {
    if (!PyObject_HasAttrString(obj, "training")) return true; /* a record of parameters, not a module */
    PyObject *training = PyObject_GetAttrString(obj, "training");
    const int on = training ? PyObject_IsTrue(training) : -1;
    Py_XDECREF(training);
    if (on <= 0) return on == 0;
    cbn_error err = {0};
    cbn_py_raise(cbn_fail_fold(&err, "BN_TRAINING",
                               "bn: expected a BatchNorm in eval mode, got a %.80s in training mode; call bn.eval()",
                               Py_TYPE(obj)->tp_name), &err);
    return false;
}

bool cbn_bn_get_object(PyObject *obj, cbn_bn_arrays *out) {
    static const char *const attributes[] = {"weight", "bias", "running_mean", "running_var", "eps"};
    PyObject *field[5] = {NULL};
    bool ok = false;
    if (PyTuple_Check(obj) && PyTuple_GET_SIZE(obj) == 5) {
        for (int i = 0; i < 5; i++) field[i] = Py_NewRef(PyTuple_GET_ITEM(obj, i));
    } else {
        for (int i = 0; i < 5; i++) {
            field[i] = PyObject_GetAttrString(obj, attributes[i]);
            if (field[i] != NULL) continue;
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) goto done;
            PyErr_Format(PyExc_TypeError,
                         "bn: expected a BatchNorm module or BatchNormParams, got %.200s (it has no attribute '%s')",
                         Py_TYPE(obj)->tp_name, attributes[i]);
            goto done;
        }
        if (!check_not_training(obj)) goto done;
    }
    ok = cbn_bn_get(field[0], field[1], field[2], field[3], field[4], &cbn_bn_attribute_names, out);
done:
    for (int i = 0; i < 5; i++) Py_XDECREF(field[i]);
    return ok;
}

void cbn_bn_release(cbn_bn_arrays *a) {
    cbn_array_release(&a->weight);
    cbn_array_release(&a->bias);
    cbn_array_release(&a->mean);
    cbn_array_release(&a->var);
}

/* The checks of cbn_bn_check, under the names that this caller knows the parameters by. */
static bool check_parameters(const cbn_bn_arrays *a, int64_t channels, bool allow_one) {
    const struct { const cbn_strided *v; const char *name; } vectors[] = {
        {&a->bn.mean, a->names->mean}, {&a->bn.var, a->names->var},
        {&a->bn.weight, a->names->weight}, {&a->bn.bias, a->names->bias}};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        const cbn_strided *v = vectors[i].v;
        if (v->data == NULL || v->shape[0] == channels || (allow_one && v->shape[0] == 1)) continue;
        PyErr_Format(PyExc_ValueError, "%s: expected length %lld%s (out_channels), got %lld", vectors[i].name,
                     (long long)channels, allow_one ? " or 1" : "", (long long)v->shape[0]);
        return false;
    }
    if (isfinite(a->bn.eps) && a->bn.eps >= 0.0) return true;
    PyObject *got = PyFloat_FromDouble(a->bn.eps);
    if (got != NULL) PyErr_Format(PyExc_ValueError, "%s: expected a finite number >= 0, got %R", a->names->eps, got);
    Py_XDECREF(got);
    return false;
}

/* ---- folding ---- */

typedef enum { FOLD_CONV, FOLD_LINEAR, FOLD_BN_FIRST } fold_kind;

typedef struct fold_request {
    fold_kind kind;
    bool transposed, padding_is_zero, zeros_mode;
    int64_t groups;
    const cbn_array *weight, *bias;
    const char *weight_name, *bias_name;
    const cbn_bn_arrays *bn;
} fold_request;

/* Sizes that must agree before results are allocated: *channels of the output. */
static bool check_fold(const fold_request *r, int64_t *channels) {
    const npy_intp *shape = cbn_array_shape(r->weight);
    const int axes = cbn_array_ndim(r->weight);
    const int least = r->kind == FOLD_LINEAR ? 2 : r->transposed ? 2 : 1;
    if (axes < least || (r->kind == FOLD_LINEAR && axes != 2)) {
        PyErr_Format(PyExc_ValueError, "%s: expected %s%d axes, got %d", r->weight_name,
                     r->kind == FOLD_LINEAR ? "" : "at least ", least, axes);
        return false;
    }
    if (r->groups < 1) {
        PyErr_Format(PyExc_ValueError, "groups: expected >= 1, got %lld", (long long)r->groups);
        return false;
    }
    *channels = shape[0];
    if (r->transposed && !cbn_mul_ok(shape[1], r->groups, channels)) {
        PyErr_Format(PyExc_ValueError, "groups: expected a number that weight sizes can hold, got %lld",
                     (long long)r->groups);
        return false;
    }
    return r->kind == FOLD_BN_FIRST || check_parameters(r->bn, *channels, r->kind == FOLD_LINEAR);
}

/* Runs the fold into w_out (any strides) and a new bias vector. */
static bool fold_into(const fold_request *r, PyArrayObject *w_out, int64_t channels, PyArrayObject **b_out) {
    const npy_intp length = (npy_intp)channels;
    *b_out = cbn_array_new(1, &length, r->weight->dtype);
    if (*b_out == NULL) return false;
    const cbn_array w_result = {.array = w_out, .dtype = r->weight->dtype};
    const cbn_array b_result = {.array = *b_out, .dtype = r->weight->dtype};
    cbn_strided w, b, wo, bo;
    if (!cbn_array_strided(r->weight, r->weight_name, &w) || !cbn_array_strided(r->bias, r->bias_name, &b) ||
        !cbn_array_strided(&w_result, r->weight_name, &wo) || !cbn_array_strided(&b_result, r->bias_name, &bo)) {
        return false;
    }
    cbn_error err = {0};
    cbn_status status;
    Py_BEGIN_ALLOW_THREADS
    if (r->kind == FOLD_BN_FIRST) {
        status = cbn_fold_bn_conv(&r->bn->bn, &w, &b, r->padding_is_zero, r->zeros_mode, r->transposed, r->groups, &wo,
                                  &bo, &err);
    } else {
        status = cbn_fold_conv_bn(&w, &b, &r->bn->bn, r->kind == FOLD_LINEAR, r->transposed, r->groups, &wo, &bo, &err);
    }
    Py_END_ALLOW_THREADS
    if (status != CBN_OK) cbn_py_raise(status, &err);
    return status == CBN_OK;
}

static PyObject *fold(const fold_request *r) {
    PyArrayObject *w_out = NULL, *b_out = NULL;
    PyObject *result = NULL;
    int64_t channels;
    if (!cbn_array_same_dtype(r->weight, r->weight_name, r->bias, r->bias_name)) return NULL;
    if (!check_fold(r, &channels)) return NULL;
    PyArray_Descr *native = PyArray_DescrFromType(cbn_dtype_typenum(r->weight->dtype));
    w_out = (PyArrayObject *)PyArray_NewLikeArray(r->weight->source, NPY_KEEPORDER, native, 0);
    if (w_out != NULL && fold_into(r, w_out, channels, &b_out)) result = PyTuple_Pack(2, w_out, b_out);
    Py_XDECREF(w_out);
    Py_XDECREF(b_out);
    return result;
}

bool cbn_fold_contiguous(const cbn_conv_geometry *g, const cbn_array *weight, const cbn_array *bias,
                         const cbn_bn_arrays *bn, PyArrayObject **w_out, PyArrayObject **b_out) {
    const fold_request r = {.kind = g->nd == 0 ? FOLD_LINEAR : FOLD_CONV, .transposed = g->transposed, .groups = g->g,
                            .weight = weight, .bias = bias, .weight_name = "weight", .bias_name = "bias", .bn = bn};
    int64_t channels;
    if (!check_fold(&r, &channels)) return false;
    *w_out = cbn_array_new(cbn_array_ndim(weight), cbn_array_shape(weight), weight->dtype);
    return *w_out != NULL && fold_into(&r, *w_out, channels, b_out);
}

/* ---- the functions ---- */

static PyObject *fold_with(fold_request *r, PyObject *w_obj, PyObject *b_obj, PyObject *const *bn /* w b rm rv eps */) {
    cbn_array weight = {0}, bias = {0};
    cbn_bn_arrays params = {0};
    PyObject *result = NULL;
    if (cbn_array_get(w_obj, r->weight_name, CBN_LAYOUT_STRIDED, &weight) &&
        get_vector(b_obj, r->bias_name, &bias, &(cbn_strided){0}) &&
        cbn_bn_get(bn[0], bn[1], bn[2], bn[3], bn[4], &function_names, &params)) {
        r->weight = &weight;
        r->bias = &bias;
        r->bn = &params;
        result = fold(r);
    }
    cbn_bn_release(&params);
    cbn_array_release(&bias);
    cbn_array_release(&weight);
    return result;
}

static PyObject *fold_conv_bn(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    fold_request r = {.kind = FOLD_CONV, .weight_name = "conv_w", .bias_name = "conv_b"};
    if (!cbn_py_nargs("fold_conv_bn", nargs, 9) || !cbn_py_bool(a[7], "transpose", &r.transposed) ||
        !cbn_py_int64(a[8], "groups", &r.groups)) {
        return NULL;
    }
    return fold_with(&r, a[0], a[1], (PyObject *const[]){a[5], a[6], a[2], a[3], a[4]});
}

static PyObject *fold_linear_bn(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    fold_request r = {.kind = FOLD_LINEAR, .weight_name = "linear_w", .bias_name = "linear_b", .groups = 1};
    if (!cbn_py_nargs("fold_linear_bn", nargs, 7)) return NULL;
    return fold_with(&r, a[0], a[1], (PyObject *const[]){a[5], a[6], a[2], a[3], a[4]});
}

static PyObject *fold_bn_conv(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    static const char *const modes[] = {"zeros", "reflect", "replicate", "circular", NULL};
    fold_request r = {.kind = FOLD_BN_FIRST, .weight_name = "conv_w", .bias_name = "conv_b"};
    if (!cbn_py_nargs("fold_bn_conv", nargs, 11) || !cbn_py_bool(a[7], "padding_is_zero", &r.padding_is_zero) ||
        !cbn_py_int64(a[9], "groups", &r.groups) || !cbn_py_bool(a[10], "transpose", &r.transposed)) {
        return NULL;
    }
    const int mode = cbn_py_choice(a[8], "padding_mode", modes);
    if (mode < 0) return NULL;
    r.zeros_mode = mode == 0;
    return fold_with(&r, a[5], a[6], (PyObject *const[]){a[3], a[4], a[0], a[1], a[2]});
}

PyMethodDef cbn_fold_methods[] = {
    {"fold_conv_bn", (PyCFunction)(void (*)(void))fold_conv_bn, METH_FASTCALL, NULL},
    {"fold_linear_bn", (PyCFunction)(void (*)(void))fold_linear_bn, METH_FASTCALL, NULL},
    {"fold_bn_conv", (PyCFunction)(void (*)(void))fold_bn_conv, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
