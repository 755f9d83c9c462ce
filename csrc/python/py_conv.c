/* SPDX-License-Identifier: BSD-3-Clause */
/* conv, conv_transpose, linear, conv_bn: each makes a plan of the arrays as they are now, runs it and forgets it. */
#include "python/py_error.h"
#include "python/py_module.h"
#include "python/py_run.h"

typedef struct conv_request {
    int nd;
    PyObject *input, *weight, *bias, *bn, *out; /* bn NULL: none */
    cbn_geometry_args geometry;
} conv_request;

/* BatchNorm reads axis 1 as channels: an input that makes this another axis than the output channels is refused. */
static bool check_bn_axes(const conv_request *r, const cbn_array *x, const cbn_conv_geometry *g,
                          const cbn_bn_arrays *bn) {
    const int axes = cbn_array_ndim(x);
    if (r->nd > 0) {
        if (axes == r->nd + 2) return true;
        PyErr_Format(PyExc_ValueError, "input: expected %d axes (batched: BatchNorm reads axis 1 as channels), got %d",
                     r->nd + 2, axes);
        return false;
    }
    const int64_t features = bn->bn.var.shape[0];
    if (axes == 2) {
        if (features == g->oc) return true;
        PyErr_Format(PyExc_ValueError, "bn.running_var: expected length %lld (out_features), got %lld",
                     (long long)g->oc, (long long)features);
        return false;
    }
    if (features == 1 && axes > 2 && cbn_array_shape(x)[1] == 1) return true;
    cbn_error err = {0};
    cbn_py_raise(cbn_fail_fold(&err, "LINEAR_ND",
                               "input: expected 2 axes for Linear + BatchNorm (axis 1 is BatchNorm's channel axis), "
                               "got %d; compute bn(linear(x))", axes), &err);
    return false;
}

/* What a plan of one call borrows. */
typedef struct borrowed {
    PyArrayObject *weight, *bias, *scale, *shift;
} borrowed;

static void borrowed_release(borrowed *b) {
    Py_XDECREF(b->weight);
    Py_XDECREF(b->bias);
    Py_XDECREF(b->scale);
    Py_XDECREF(b->shift);
}

/* Folding reads and writes the weights once, scaling the result afterwards the outputs: whichever are fewer. Those of one
 * image, lest results depend on the batch. */
static bool scaling_is_cheaper(const cbn_conv_geometry *g, const cbn_array *x, const cbn_array *weight) {
    if (g->dtype != CBN_F32 || cbn_array_ndim(x) != g->nd + 2) return false;
    int64_t in[CBN_MAX_SPATIAL] = {0};
    cbn_conv_desc d;
    cbn_error err = {0};
    for (int a = 0; a < g->nd; a++) in[a] = cbn_array_shape(x)[a + 2];
    if (cbn_conv_desc_make(g, 1, g->ic, in, &d, NULL, &err) != CBN_OK) return false; /* refused when it runs */
    return d.oc * d.out[0] * d.out[1] * d.out[2] < PyArray_SIZE(weight->array);
}

/* The scale and shift that BatchNorm comes to behind this layer: what folding makes of weights that are one. */
static bool scale_and_shift(const cbn_conv_geometry *g, const cbn_array *bias, const cbn_bn_arrays *bn, borrowed *b) {
    npy_intp shape[2 + CBN_MAX_SPATIAL];
    cbn_conv_geometry per_channel = *g;
    per_channel.g = 1;
    per_channel.transposed = false;
    for (int i = 0; i < g->nd + 2; i++) shape[i] = i == 0 ? (npy_intp)g->oc : 1;
    PyArrayObject *ones = cbn_array_new(g->nd + 2, shape, CBN_F32);
    if (ones == NULL) return false;
    for (int64_t i = 0; i < g->oc; i++) ((float *)PyArray_DATA(ones))[i] = 1.0f;
    const cbn_array weight = {.array = ones, .source = ones, .dtype = CBN_F32};
    const bool ok = cbn_fold_contiguous(&per_channel, &weight, bias, bn, &b->scale, &b->shift);
    Py_DECREF(ones);
    return ok;
}

/* NULL with an exception. */
static cbn_conv_plan *plan_for_one_call(const cbn_conv_geometry *g, const cbn_array *x, const cbn_array *weight,
                                        const cbn_array *bias, const cbn_bn_arrays *bn, borrowed *b) {
    cbn_plan_options options = {.precision = CBN_PRECISION_FP32, .borrow = true};
    if (bn == NULL || !scaling_is_cheaper(g, x, weight))
        return cbn_plan_from_arrays(g, weight, bias, bn, &options, &b->weight, &b->bias);
    if (!scale_and_shift(g, bias, bn, b)) return NULL;
    options.scale = PyArray_DATA(b->scale);
    options.shift = PyArray_DATA(b->shift);
    return cbn_plan_from_arrays(g, weight, &(cbn_array){0}, NULL, &options, &b->weight, &b->bias);
}

static PyObject *run_once(const conv_request *r) {
    cbn_array x = {0}, weight = {0}, bias = {0};
    cbn_bn_arrays bn = {0};
    borrowed kept = {0};
    cbn_conv_plan *plan = NULL;
    PyObject *result = NULL;
    cbn_conv_geometry g;
    if (!cbn_array_open(r->input, "input", &x) ||
        !cbn_array_get(r->weight, "weight", CBN_LAYOUT_STRIDED, &weight) ||
        !cbn_array_get_optional(r->bias, "bias", CBN_LAYOUT_STRIDED, &bias) ||
        !cbn_array_same_dtype(&x, "input", &weight, "weight") || !cbn_array_same_dtype(&x, "input", &bias, "bias") ||
        cbn_weight_axes(&weight, r->nd) < 0 || !cbn_geometry_parse(&r->geometry, r->nd, &weight, &bias, &g)) {
        goto done;
    }
    if (r->bn != NULL) {
        if (!cbn_bn_get_object(r->bn, &bn)) goto done;
        if (!check_bn_axes(r, &x, &g, &bn)) goto done;
    }
    plan = plan_for_one_call(&g, &x, &weight, &bias, r->bn ? &bn : NULL, &kept);
    if (plan != NULL) result = cbn_plan_call(plan, "input", &x, &(cbn_array){0}, r->out);
done:
    cbn_plan_destroy(plan);
    borrowed_release(&kept);
    cbn_bn_release(&bn);
    cbn_array_release(&bias);
    cbn_array_release(&weight);
    cbn_array_release(&x);
    return result;
}

static bool parse_nd(PyObject *obj, int least, int *nd) {
    int64_t value;
    if (!cbn_py_int64(obj, "nd", &value)) return false;
    if (value < least || value > CBN_MAX_SPATIAL) {
        PyErr_Format(PyExc_ValueError, "nd: expected %d to %d, got %lld", least, CBN_MAX_SPATIAL, (long long)value);
        return false;
    }
    *nd = (int)value;
    return true;
}

static PyObject *conv(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    conv_request r = {0};
    if (!cbn_py_nargs("conv", nargs, 9) || !parse_nd(a[0], 1, &r.nd)) return NULL;
    r.input = a[1], r.weight = a[2], r.bias = a[3], r.out = a[8];
    r.geometry = (cbn_geometry_args){.stride = a[4], .padding = a[5], .dilation = a[6], .groups = a[7]};
    return run_once(&r);
}

static PyObject *conv_transpose(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    conv_request r = {0};
    if (!cbn_py_nargs("conv_transpose", nargs, 10) || !parse_nd(a[0], 1, &r.nd)) return NULL;
    r.input = a[1], r.weight = a[2], r.bias = a[3], r.out = a[9];
    r.geometry = (cbn_geometry_args){.stride = a[4], .padding = a[5], .output_padding = a[6], .groups = a[7],
                                     .dilation = a[8], .transposed = Py_True};
    return run_once(&r);
}

static PyObject *linear(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("linear", nargs, 4)) return NULL;
    const conv_request r = {.input = a[0], .weight = a[1], .bias = a[2], .out = a[3]};
    return run_once(&r);
}

static PyObject *conv_bn(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    conv_request r = {0};
    if (!cbn_py_nargs("conv_bn", nargs, 13) || !parse_nd(a[0], 0, &r.nd)) return NULL;
    r.input = a[1], r.weight = a[2], r.bias = a[3], r.bn = a[4], r.out = a[12];
    r.geometry = (cbn_geometry_args){.stride = a[5], .padding = a[6], .padding_mode = a[7], .dilation = a[8],
                                     .groups = a[9], .transposed = a[10], .output_padding = a[11]};
    return run_once(&r);
}

static PyObject *as_array(PyObject *module, PyObject *const *a, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("as_array", nargs, 2)) return NULL;
    const char *name = PyUnicode_AsUTF8(a[1]);
    if (name == NULL) return NULL;
    cbn_array x = {0};
    PyObject *result = NULL;
    if (cbn_array_get(a[0], name, CBN_LAYOUT_STRIDED, &x)) {
        result = PyArray_FromArray(x.array, NULL, NPY_ARRAY_ENSUREARRAY);
    }
    cbn_array_release(&x);
    return result;
}

PyMethodDef cbn_conv_methods[] = {
    {"as_array", (PyCFunction)(void (*)(void))as_array, METH_FASTCALL, NULL},
    {"conv", (PyCFunction)(void (*)(void))conv, METH_FASTCALL, NULL},
    {"conv_transpose", (PyCFunction)(void (*)(void))conv_transpose, METH_FASTCALL, NULL},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, NULL},
    {"conv_bn", (PyCFunction)(void (*)(void))conv_bn, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
