/* SPDX-License-Identifier: BSD-3-Clause */
#include "python/py_geometry.h"

#include "base/cbn_checked.h"
#include "python/py_error.h"

#include <math.h>

static const char *const mode_names[] = {[CBN_MODE_ZEROS] = "zeros", [CBN_MODE_REFLECT] = "reflect",
                                         [CBN_MODE_REPLICATE] = "replicate", [CBN_MODE_CIRCULAR] = "circular",
                                         NULL};
static const char *const precision_names[] = {[CBN_PRECISION_STRICT] = "strict", [CBN_PRECISION_FP32] = "fp32",
                                              [CBN_PRECISION_FAST] = "fast", NULL};
/* The order is that of `activations` below. */
static const char *const activation_names[] = {"relu", "relu6", "hardswish", "silu", "sigmoid", "leaky_relu", NULL};
static const cbn_act activations[] = {CBN_ACT_RELU, CBN_ACT_RELU6, CBN_ACT_HARDSWISH, CBN_ACT_SILU,
                                      CBN_ACT_SIGMOID, CBN_ACT_LEAKY_RELU};

/* ---- geometry ---- */

/* A linear operator has no spatial axes: an argument about them may only say nothing. */
static bool check_no_axes(PyObject *obj, const char *name, int64_t neutral) {
    if (PySequence_Check(obj) && !PyUnicode_Check(obj) && PySequence_Size(obj) == 0) return true;
    int64_t value;
    if (!PyErr_Occurred() && !PyUnicode_Check(obj) && cbn_py_ints(obj, name, 1, &value) && value == neutral) {
        return true;
    }
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: expected %lld for a linear operator (it has no spatial axes), got %R", name,
                 (long long)neutral, obj);
    return false;
}

static bool parse_axes(PyObject *obj, const char *name, int nd, int64_t neutral, int64_t *out) {
    for (int i = 0; i < nd; i++) out[i] = neutral;
    if (obj == NULL) return true;
    return nd == 0 ? check_no_axes(obj, name, neutral) : cbn_py_ints(obj, name, nd, out);
}

static bool parse_padding(PyObject *obj, int nd, cbn_conv_geometry *g) {
    g->pad_kind = CBN_PAD_EXPLICIT;
    if (obj == NULL || !PyUnicode_Check(obj) || nd == 0) return parse_axes(obj, "padding", nd, 0, g->pad);
    static const char *const kinds[] = {"valid", "same", NULL};
    for (int i = 0; kinds[i] != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(obj, kinds[i]) != 0) continue;
        g->pad_kind = i == 0 ? CBN_PAD_VALID : CBN_PAD_SAME;
        for (int a = 0; a < nd; a++) g->pad[a] = 0;
        return true;
    }
    PyErr_Format(PyExc_ValueError, "padding: expected an int, %d ints, 'valid' or 'same', got %R", nd, obj);
    return false;
}

int cbn_weight_axes(const cbn_array *weight, int nd) {
    const int axes = cbn_array_ndim(weight);
    if (nd >= 0 && axes != nd + 2) {
        PyErr_Format(PyExc_ValueError, "weight: expected %d axes, got %d", nd + 2, axes);
        return -1;
    }
    if (axes < 2 || axes > 2 + CBN_MAX_SPATIAL) {
        PyErr_Format(PyExc_ValueError, "weight: expected 2 (linear) to %d axes, got %d", 2 + CBN_MAX_SPATIAL, axes);
        return -1;
    }
    return axes - 2;
}

bool cbn_geometry_parse(const cbn_geometry_args *args, int nd, const cbn_array *weight, const cbn_array *bias,
                        cbn_conv_geometry *g) {
    *g = (cbn_conv_geometry){.dtype = weight->dtype, .nd = nd, .g = 1, .pad_mode = CBN_MODE_ZEROS};
    if (args->transposed != NULL && !cbn_py_bool(args->transposed, "transposed", &g->transposed)) return false;
    if (args->groups != NULL && !cbn_py_int64(args->groups, "groups", &g->g)) return false;
    if (!parse_axes(args->stride, "stride", nd, 1, g->stride)) return false;
    if (!parse_axes(args->dilation, "dilation", nd, 1, g->dil)) return false;
    if (!parse_axes(args->output_padding, "output_padding", nd, 0, g->output_pad)) return false;
    if (!parse_padding(args->padding, nd, g)) return false;
    if (args->padding_mode != NULL) {
        const int mode = cbn_py_choice(args->padding_mode, "padding_mode", mode_names);
        if (mode < 0) return false;
        g->pad_mode = (cbn_pad_mode)mode;
    }
    if (bias->array != NULL && cbn_array_ndim(bias) != 1) {
        PyErr_Format(PyExc_ValueError, "bias: expected 1 axis, got %d", cbn_array_ndim(bias));
        return false;
    }
    int64_t weight_shape[2 + CBN_MAX_SPATIAL];
    for (int i = 0; i < nd + 2; i++) weight_shape[i] = cbn_array_shape(weight)[i];
    cbn_error err = {0};
    const cbn_status status =
        cbn_conv_geometry_check(g, weight_shape, bias->array ? cbn_array_shape(bias)[0] : -1, &err);
    if (status != CBN_OK) cbn_py_raise(status, &err);
    return status == CBN_OK;
}

/* ---- options ---- */

bool cbn_activation_parse(PyObject *obj, cbn_plan_options *opt) {
    opt->activation = CBN_ACT_NONE;
    opt->act_a = opt->act_b = 0.0;
    if (obj == NULL || obj == Py_None) return true;
    PyObject *name = obj, *slope = NULL;
    if (PyTuple_Check(obj) && PyTuple_GET_SIZE(obj) == 2) {
        name = PyTuple_GET_ITEM(obj, 0);
        slope = PyTuple_GET_ITEM(obj, 1);
    }
    int found = -1;
    for (int i = 0; PyUnicode_Check(name) && activation_names[i] != NULL; i++) {
        if (PyUnicode_CompareWithASCIIString(name, activation_names[i]) == 0) found = i;
    }
    const bool takes_slope = found >= 0 && activations[found] == CBN_ACT_LEAKY_RELU;
    if (found < 0 || takes_slope != (slope != NULL)) {
        PyErr_Format(PyUnicode_Check(name) ? PyExc_ValueError : PyExc_TypeError,
                     "activation: expected None, 'relu', 'relu6', 'hardswish', 'silu', 'sigmoid' or "
                     "('leaky_relu', slope), got %R", obj);
        return false;
    }
    opt->activation = activations[found];
    double a;
    if (slope == NULL) return true;
    if (!cbn_py_double(slope, "activation", &a)) return false;
    if (!isfinite(a)) {
        PyErr_Format(PyExc_ValueError, "activation: expected a finite slope, got %R", slope);
        return false;
    }
    opt->act_a = a;
    return true;
}

PyObject *cbn_activation_object(const cbn_plan_options *opt) {
    for (int i = 0; activation_names[i] != NULL; i++) {
        if (activations[i] != opt->activation) continue;
        if (opt->activation == CBN_ACT_LEAKY_RELU) {
            return Py_BuildValue("(sd)", activation_names[i], opt->act_a);
        }
        return PyUnicode_FromString(activation_names[i]);
    }
    return Py_NewRef(Py_None);
}

bool cbn_precision_parse(PyObject *obj, cbn_precision *out) {
    *out = CBN_PRECISION_FP32;
    if (obj == NULL) return true;
    const int choice = cbn_py_choice(obj, "precision", precision_names);
    if (choice >= 0) *out = (cbn_precision)choice;
    return choice >= 0;
}

const char *cbn_precision_name(cbn_precision p) { return precision_names[p]; }

static PyObject *axes_tuple(const int64_t *values, int nd) {
    PyObject *tuple = PyTuple_New(nd);
    for (int i = 0; tuple != NULL && i < nd; i++) {
        PyObject *item = PyLong_FromLongLong(values[i]);
        if (item == NULL) {
            Py_CLEAR(tuple);
            break;
        }
        PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

PyObject *cbn_geometry_params(const cbn_conv_geometry *g, const cbn_plan_options *opt) {
    PyObject *stride = axes_tuple(g->stride, g->nd), *dilation = axes_tuple(g->dil, g->nd);
    PyObject *output_padding = axes_tuple(g->output_pad, g->nd);
    PyObject *padding = g->pad_kind == CBN_PAD_EXPLICIT ? axes_tuple(g->pad, g->nd)
                        : PyUnicode_FromString(g->pad_kind == CBN_PAD_SAME ? "same" : "valid");
    PyObject *activation = cbn_activation_object(opt);
    PyObject *dict = NULL;
    if (stride && dilation && output_padding && padding && activation) {
        dict = Py_BuildValue("{sO sO ss sO sL sO sO sO ss}", "stride", stride, "padding", padding, "padding_mode",
                             mode_names[g->pad_mode], "dilation", dilation, "groups", (long long)g->g, "transposed",
                             g->transposed ? Py_True : Py_False, "output_padding", output_padding, "activation",
                             activation, "precision", precision_names[opt->precision]);
    }
    Py_XDECREF(stride);
    Py_XDECREF(dilation);
    Py_XDECREF(output_padding);
    Py_XDECREF(padding);
    Py_XDECREF(activation);
    return dict;
}

/* ---- shapes ---- */

bool cbn_io_split(const cbn_conv_geometry *g, const char *name, int ndim, const npy_intp *shape, cbn_io_shape *out) {
    *out = (cbn_io_shape){.ndim = ndim, .batched = true, .n = 1};
    if (g->nd == 0) {
        if (ndim < 1 || ndim > CBN_MAX_DIMS) {
            PyErr_Format(PyExc_ValueError, "%s: expected 1 to %d axes, got %d", name, CBN_MAX_DIMS, ndim);
            return false;
        }
        for (int i = 0; i < ndim - 1; i++) {
            if (cbn_mul_ok(out->n, shape[i], &out->n)) continue;
            PyErr_Format(PyExc_ValueError, "%s: expected a size below 2^63, got more", name);
            return false;
        }
        out->channels = shape[ndim - 1];
        return true;
    }
    if (ndim != g->nd + 1 && ndim != g->nd + 2) {
        PyErr_Format(PyExc_ValueError, "%s: expected %d (unbatched) or %d axes, got %d", name, g->nd + 1, g->nd + 2,
                     ndim);
        return false;
    }
    out->batched = ndim == g->nd + 2;
    if (out->batched) out->n = *shape++;
    out->channels = *shape++;
    for (int i = 0; i < g->nd; i++) out->in[i] = shape[i];
    return true;
}

void cbn_io_output(const cbn_conv_geometry *g, const cbn_io_shape *io, const npy_intp *input_shape,
                   const int64_t *out_spatial, npy_intp *out_shape) {
    if (g->nd == 0) {
        for (int i = 0; i < io->ndim - 1; i++) out_shape[i] = input_shape[i];
        out_shape[io->ndim - 1] = g->oc;
        return;
    }
    if (io->batched) *out_shape++ = io->n;
    *out_shape++ = g->oc;
    for (int i = 0; i < g->nd; i++) out_shape[i] = out_spatial[i];
}

bool cbn_shape_parse(PyObject *obj, const char *name, int *ndim, npy_intp *shape) {
    PyObject *items = PyUnicode_Check(obj) ? NULL : PySequence_Fast(obj, "");
    if (items == NULL) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: expected a sequence of ints, got %R", name, obj);
        return false;
    }
    bool ok = false;
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
    if (count > CBN_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: expected at most %d axes, got %zd", name, CBN_MAX_DIMS, count);
        goto done;
    }
    *ndim = (int)count;
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t value;
        if (!cbn_py_int64(PySequence_Fast_GET_ITEM(items, i), name, &value)) goto done;
        if (value < 0) {
            PyErr_Format(PyExc_ValueError, "%s: expected sizes >= 0, got %lld on axis %zd", name, (long long)value, i);
            goto done;
        }
        shape[i] = (npy_intp)value;
    }
    ok = true;
done:
    Py_DECREF(items);
    return ok;
}

/* floor(a / b) for b > 0. */
static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

void cbn_geometry_halo(const cbn_conv_geometry *g, int axis, int64_t *before, int64_t *after) {
    const int64_t reach = g->dil[axis] * (g->k[axis] - 1), s = g->stride[axis];
    const int64_t pad = g->pad_kind == CBN_PAD_SAME ? reach / 2 : g->pad[axis];
    int64_t lo, hi;
    if (g->transposed) {
        /* output o reads input i where i*s - pad + t*dil = o for a tap t */
        lo = floor_div(reach - pad, s);
        hi = floor_div(pad + s - 1, s);
    } else {
        lo = pad;
        hi = reach - pad - (s - 1);
    }
    *before = CBN_MAX(lo, 0);
    *after = CBN_MAX(hi, 0);
}
