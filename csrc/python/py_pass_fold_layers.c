/* SPDX-License-Identifier: BSD-3-Clause */
/* Folding into weights for Python: the arithmetic of pass_fold_layers.c and where its results live. */
#include "python/py_freeze.h"

#include "base/cbn_alloc.h"
#include "graph/pass_fold_layers.h"
#include "python/py_fold.h"
#include "python/py_passes.h"

#include <fenv.h>
#include <math.h>
#include <string.h>

/* helper: what Python does for the fold (pyconvbn/_pass_layers.py, class _Helper). */
typedef struct weights_maker {
    PyObject *helper;
    PyObject *parameter; /* class nn.Parameter */
    PyObject *constants; /* the helper's: a ConstantStore, or None where nothing is made */
    PyObject *names, *hints; /* of the constants, by slot: also keeps their texts; texts of rows */
    PyObject *folded;    /* what was folded with BatchNorm: key of the arrays -> (weight slot, bias slot) */
    PyObject *fold_rows;
    PyObject *batched; /* set of names of layers */
    cbn_fold_layers_host host;
} weights_maker;

/* ---- operands ---- */

static void operand_of_array(PyArrayObject *a, cbn_operand *out) {
    out->what = CBN_OPERAND_ARRAY;
    out->kind = PyArray_DESCR(a)->kind;
    out->itemsize = (uint8_t)CBN_MIN(PyArray_ITEMSIZE(a), 255);
    out->ndim = PyArray_NDIM(a);
    for (int i = 0; i < CBN_MIN(out->ndim, CBN_MAX_DIMS); i++) out->shape[i] = PyArray_DIM(a, i);
}

static cbn_status read_operand(void *arg, cbn_host h, cbn_operand *out, cbn_error *err) {
    weights_maker *m = arg;
    PyObject *obj = h;
    (void)err;
    *out = (cbn_operand){.what = CBN_OPERAND_OTHER, .host = h};
    if (PyArray_CheckExact(obj) || (PyObject *)Py_TYPE(obj) == m->parameter) {
        operand_of_array((PyArrayObject *)obj, out);
        return CBN_OK;
    }
    if (PyArray_CheckScalar(obj)) { /* before the Python numbers: numpy.float64 is one of them */
        PyObject *array = PyArray_FromScalar(obj, NULL);
        if (array == NULL) return CBN_HOST_ERROR;
        operand_of_array((PyArrayObject *)array, out);
        Py_DECREF(array);
        out->python_float = PyFloat_Check(obj);
        if (out->python_float) out->number = PyFloat_AS_DOUBLE(obj);
        return CBN_OK;
    }
    if (PyComplex_CheckExact(obj)) {
        out->what = CBN_OPERAND_ARRAY;
        out->kind = 'c';
        out->itemsize = 16;
        return CBN_OK;
    }
    if (!PyFloat_CheckExact(obj) && !PyLong_CheckExact(obj) && !PyBool_Check(obj)) return CBN_OK;
    out->number = PyFloat_AsDouble(obj);
    if (out->number == -1.0 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return CBN_HOST_ERROR;
        PyErr_Clear();
        return CBN_OK;
    }
    out->what = CBN_OPERAND_NUMBER;
    return CBN_OK;
}

/* ---- can the dtype hold it? ---- */

enum { FINE, NOT_FINITE, SMALL };

/* The largest magnitude of each channel, as bit patterns (which order as the magnitudes do, Inf and NaN above all). */
#define SCAN_(name, type, mask)                                                                                        \
    static void name(const void *data, int64_t rows, int64_t inner, int64_t outer, int64_t per_group, int64_t across, \
                     uint64_t *peak) {                                                                                 \
        const type *p = data;                                                                                          \
        for (int64_t r = 0; r < rows; r++, p += inner) {                                                               \
            type most = 0;                                                                                             \
            for (int64_t i = 0; i < inner; i++) {                                                                      \
                const type bits = (type)(p[i] & (mask));                                                               \
                most = bits > most ? bits : most;                                                                      \
            }                                                                                                          \
            const int64_t c = across == 0 ? r : r / across / per_group * outer + r % across;                           \
            if (most > peak[c]) peak[c] = most;                                                                        \
        }                                                                                                              \
    }
SCAN_(peaks_of_f16, uint16_t, 0x7FFFu)
SCAN_(peaks_of_f32, uint32_t, 0x7FFFFFFFu)
SCAN_(peaks_of_f64, uint64_t, INT64_C(0x7FFFFFFFFFFFFFFF))

static int verdict(const uint64_t *peak, int64_t n, cbn_dtype dtype, bool weights) {
    /* Inf, and a quarter of the smallest normal number */
    static const uint64_t infinity[] = {
        [CBN_F16] = 0x7C00u, [CBN_F32] = 0x7F800000u, [CBN_F64] = UINT64_C(0x7FF0000000000000)};
    static const uint64_t quarter[] = {
        [CBN_F16] = 0x0100u, [CBN_F32] = 0x00200000u, [CBN_F64] = UINT64_C(0x0004000000000000)};
    int result = FINE;
    for (int64_t c = 0; c < n; c++) {
        if (peak[c] >= infinity[dtype]) return NOT_FINITE;
        if (weights && peak[c] < quarter[dtype]) result = SMALL;
    }
    return result;
}

static void peaks_of(cbn_dtype dtype, const void *data, int64_t rows, int64_t inner, int64_t outer, int64_t per_group,
                     int64_t across, uint64_t *peak) {
    if (dtype == CBN_F32) peaks_of_f32(data, rows, inner, outer, per_group, across, peak);
    else if (dtype == CBN_F64) peaks_of_f64(data, rows, inner, outer, per_group, across, peak);
    else peaks_of_f16(data, rows, inner, outer, per_group, across, peak);
}

/* FINE, NOT_FINITE or SMALL (some channel's weights are all tiny or zero); -1: exception. */
static int look_at(const cbn_fold_layer *l, PyArrayObject *w, PyArrayObject *b, cbn_dtype dtype) {
    uint64_t *peak = cbn_scratch_get((size_t)CBN_MAX(l->channels, 1) * sizeof *peak);
    if (peak == NULL) return PyErr_NoMemory(), -1;
    int result = FINE;
    if (b != NULL) {
        memset(peak, 0, (size_t)l->channels * sizeof *peak);
        peaks_of(dtype, PyArray_DATA(b), l->channels, 1, 0, 1, 0, peak);
        result = verdict(peak, l->channels, dtype, false);
    }
    if (result == FINE && w != NULL && PyArray_SIZE(w) > 0) {
        const npy_intp *shape = PyArray_DIMS(w);
        const int64_t rows = l->transposed ? shape[0] * shape[1] : shape[0];
        memset(peak, 0, (size_t)l->channels * sizeof *peak);
        peaks_of(dtype, PyArray_DATA(w), rows, PyArray_SIZE(w) / rows, l->transposed ? shape[1] : 0,
                 CBN_MAX(shape[0] / l->groups, 1), l->transposed ? shape[1] : 0, peak);
        result = verdict(peak, l->channels, dtype, true);
    }
    cbn_scratch_put(peak);
    return result;
}

static PyObject *or_none(void *h) { return h == NULL ? Py_None : (PyObject *)h; }

/* The helper's word: None (fine) or a hint, "" for the reason's own. */
static bool ask_helper(weights_maker *m, PyObject *answer, cbn_folded *out) {
    if (answer == NULL) return false;
    bool ok = true;
    if (answer != Py_None) {
        const char *text = PyUnicode_Check(answer) ? PyUnicode_AsUTF8(answer) : NULL;
        ok = text != NULL && PyList_Append(m->hints, answer) == 0;
        out->refused = ok;
        out->hint = ok && text[0] != '\0' ? text : NULL;
        if (!ok && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "helper: expected None or a str");
    }
    Py_DECREF(answer);
    return ok;
}

/* ---- constants ---- */

/* A read-only array that becomes an attribute. */
static bool add_constant(weights_maker *m, PyArrayObject *array, cbn_folded_constant *out) {
    PyArray_CLEARFLAGS(array, NPY_ARRAY_WRITEABLE);
    PyObject *name = cbn_py_constant_add(m->constants, (PyObject *)array);
    if (name == NULL) return false;
    out->is_new = true;
    out->slot = (uint32_t)PyList_GET_SIZE(m->names);
    out->name = PyUnicode_AsUTF8(name);
    const bool ok = out->name != NULL && PyList_Append(m->names, name) == 0;
    Py_DECREF(name);
    return ok;
}

static cbn_status note_batched(void *arg, const char *layer, cbn_error *err) {
    const weights_maker *m = arg;
    (void)err;
    PyObject *name = PyUnicode_FromString(layer);
    const bool ok = name != NULL && PySet_Add(m->batched, name) == 0;
    Py_XDECREF(name);
    return ok ? CBN_OK : CBN_HOST_ERROR;
}

static cbn_status drop(void *arg, uint32_t slot, cbn_error *err) {
    const weights_maker *m = arg;
    (void)err;
    PyObject *done = PyObject_CallMethod(m->helper, "drop", "O", PyList_GET_ITEM(m->names, slot));
    Py_XDECREF(done);
    return done == NULL ? CBN_HOST_ERROR : CBN_OK;
}

/* ---- folding ---- */

/* W' and b' for coefficients that are there. */
static bool fold(const cbn_fold_layer *l, const cbn_array *weight, const cbn_array *bias, const cbn_bn_arrays *bn,
                 PyArrayObject **w, PyArrayObject **b) {
    const cbn_conv_geometry g = {.nd = l->linear ? 0 : cbn_array_ndim(weight) - 2, .transposed = l->transposed,
                                 .g = l->groups};
    return cbn_fold_contiguous(&g, weight, bias, bn, w, b);
}

typedef struct fold_key {
    cbn_host weight, bias, bn[4];
    double eps;
    int64_t groups, kind;
} fold_key;

/* The same pair was folded before: its constants again. 1: yes, 0: no, -1: exception. */
static int folded_before(const weights_maker *m, PyObject *key, cbn_folded *out) {
    PyObject *slots = PyDict_GetItemWithError(m->folded, key);
    if (slots == NULL) return PyErr_Occurred() ? -1 : 0;
    const Py_ssize_t first = PyLong_AsSsize_t(slots);
    cbn_folded_constant *const made[2] = {&out->weight, &out->bias};
    for (int i = 0; i < 2; i++) {
        PyObject *name = PyList_GET_ITEM(m->names, first + i);
        *made[i] = (cbn_folded_constant){.is_new = true, .slot = (uint32_t)(first + i), .name = PyUnicode_AsUTF8(name)};
    }
    return 1;
}

static bool remember(const weights_maker *m, PyObject *key, const cbn_folded *made) {
    PyObject *first = PyLong_FromUnsignedLong(made->weight.slot);
    const bool ok = first != NULL && PyDict_SetItem(m->folded, key, first) == 0;
    Py_XDECREF(first);
    return ok;
}

static bool fold_bn_now(weights_maker *m, const cbn_fold_layer *l, const cbn_host bn[4], double eps, PyObject *key,
                        cbn_folded *out) {
    cbn_array weight = {0}, bias = {0};
    cbn_bn_arrays params = {0};
    PyArrayObject *w = NULL, *b = NULL;
    PyObject *number = PyFloat_FromDouble(eps);
    bool ok = number != NULL && cbn_array_get(l->weight, "weight", CBN_LAYOUT_STRIDED, &weight) &&
              cbn_array_get_optional(or_none(l->bias), "bias", CBN_LAYOUT_STRIDED, &bias) &&
              cbn_bn_get(or_none(bn[0]), or_none(bn[1]), or_none(bn[2]), or_none(bn[3]), number,
                         &cbn_bn_attribute_names, &params) &&
              fold(l, &weight, &bias, &params, &w, &b);
    if (ok) {
        const int found = look_at(l, w, b, weight.dtype);
        ok = found >= 0;
        if (found == NOT_FINITE) out->refused = true;
        if (found == SMALL) {
            ok = ask_helper(m, PyObject_CallMethod(m->helper, "bn_refusal", "OOOOOOL", w, b, l->weight, or_none(bn[0]),
                                                   or_none(bn[1]), l->transposed ? Py_True : Py_False,
                                                   (long long)l->groups),
                            out);
        }
    }
    if (ok && !out->refused) {
        ok = add_constant(m, w, &out->weight) && add_constant(m, b, &out->bias) && remember(m, key, out);
    }
    Py_XDECREF(w);
    Py_XDECREF(b);
    Py_XDECREF(number);
    cbn_bn_release(&params);
    cbn_array_release(&bias);
    cbn_array_release(&weight);
    return ok;
}

static cbn_status fold_bn(void *arg, const cbn_fold_layer *l, const cbn_host bn[4], double eps, cbn_folded *out,
                          cbn_error *err) {
    weights_maker *m = arg;
    (void)err;
    fold_key k;
    memset(&k, 0, sizeof k);
    k.weight = l->weight;
    k.bias = l->bias;
    memcpy(k.bn, bn, sizeof k.bn);
    k.eps = eps;
    k.groups = l->groups;
    k.kind = l->linear + 2 * l->transposed;
    PyObject *key = PyBytes_FromStringAndSize((const char *)&k, sizeof k);
    if (key == NULL) return CBN_HOST_ERROR;
    const int before = folded_before(m, key, out);
    const bool ok = before > 0 || (before == 0 && fold_bn_now(m, l, bn, eps, key, out));
    Py_DECREF(key);
    return ok ? CBN_OK : CBN_HOST_ERROR;
}

/* ---- arithmetic with constants ---- */

static double rounded(double v, cbn_dtype t) {
    double memory;
    cbn_store_f64(&memory, t, v);
    return cbn_load_f64(&memory, t);
}

static cbn_dtype dtype_of_size(int itemsize) { return itemsize == 2 ? CBN_F16 : itemsize == 4 ? CBN_F32 : CBN_F64; }

/* The constant as float64 numbers: one, or one for each channel. NULL with an exception. */
static PyArrayObject *numbers_of(const cbn_arith *how) {
    npy_intp one = 1;
    if (how->c.what == CBN_OPERAND_NUMBER || how->c.python_float) {
        PyArrayObject *a = (PyArrayObject *)PyArray_SimpleNew(1, &one, NPY_DOUBLE);
        if (a != NULL) *(double *)PyArray_DATA(a) = how->c.number;
        return a;
    }
    return (PyArrayObject *)PyArray_FROM_OTF(how->c.host, NPY_DOUBLE, NPY_ARRAY_IN_ARRAY | NPY_ARRAY_FORCECAST);
}

/* scale and shift of each channel: y * scale + shift. False: not finite. */
static bool coefficients(const cbn_arith *how, const double *c, int64_t n, cbn_dtype dtype, double *scale,
                         double *shift) {
    fenv_t before;
    feholdexcept(&before);
    const cbn_dtype narrow = dtype_of_size(how->itemsize);
    const double alpha = rounded(how->alpha, narrow);
    bool finite = isfinite(alpha);
    for (int64_t i = 0; finite && i < how->of.channels; i++) {
        const double v = rounded(c[n == 1 ? 0 : i], dtype);
        scale[i] = 1.0;
        shift[i] = 0.0;
        finite = isfinite(v);
        switch (how->kind) {
        case CBN_ARITH_SHIFT: shift[i] = how->itemsize == 8 ? alpha * v : rounded(alpha * v, narrow); break;
        case CBN_ARITH_REVERSE:
            scale[i] = alpha;
            shift[i] = v;
            break;
        case CBN_ARITH_SCALE: scale[i] = v; break;
        case CBN_ARITH_DIVIDE: scale[i] = 1.0 / v; break;
        }
        finite = finite && isfinite(scale[i]) && isfinite(shift[i]);
    }
    fesetenv(&before);
    return finite;
}

static bool all_equal(const double *v, int64_t n, double value) {
    for (int64_t i = 0; i < n; i++) {
        if (v[i] != value) return false;
    }
    return true;
}

static cbn_strided vector(double *data, int64_t n, int64_t stride) {
    return (cbn_strided){.data = data, .dtype = CBN_F64, .ndim = 1, .shape = {n}, .stride_bytes = {stride}};
}

/* y * scale + shift is a BatchNorm of mean 0, variance 1 and eps 0. */
static bool fold_coefficients(weights_maker *m, const cbn_fold_layer *l, const cbn_array *weight, const cbn_array *bias,
                              double *scale, double *shift, cbn_folded *out) {
    double zero = 0.0, one = 1.0;
    const int64_t n = l->channels, step = (int64_t)sizeof(double);
    const cbn_bn_arrays params = {.names = &cbn_bn_attribute_names,
                                  .bn = {.weight = vector(scale, n, step), .bias = vector(shift, n, step),
                                         .mean = vector(&zero, n, 0), .var = vector(&one, n, 0)}};
    const bool same_weight = all_equal(scale, n, 1.0);
    const bool bias_wanted = bias->array != NULL || !all_equal(shift, n, 0.0);
    PyArrayObject *w = NULL, *b = NULL;
    bool ok;
    if (same_weight) { /* only b': weights without elements */
        cbn_array none = {.dtype = weight->dtype};
        none.array = cbn_array_new(2, (const npy_intp[]){(npy_intp)n, 0}, weight->dtype);
        const cbn_fold_layer plain = {.linear = true, .groups = 1, .channels = n};
        ok = none.array != NULL && fold(&plain, &none, bias, &params, &w, &b);
        Py_XDECREF(none.array);
        Py_CLEAR(w);
    } else {
        ok = fold(l, weight, bias, &params, &w, &b);
    }
    if (ok) {
        const int found = look_at(l, w, b, weight->dtype);
        ok = found >= 0;
        if (found == NOT_FINITE) out->refused = true;
        if (found == SMALL) {
            npy_intp length = (npy_intp)n;
            PyObject *factors = PyArray_SimpleNewFromData(1, &length, NPY_DOUBLE, scale);
            ok = factors != NULL &&
                 ask_helper(m, PyObject_CallMethod(m->helper, "scale_refusal", "OOOOL", w, l->weight, factors,
                                                   l->transposed ? Py_True : Py_False, (long long)l->groups),
                            out);
            Py_XDECREF(factors);
        }
    }
    if (ok && !out->refused) {
        ok = (w == NULL || add_constant(m, w, &out->weight)) && (!bias_wanted || add_constant(m, b, &out->bias));
    }
    Py_XDECREF(w);
    Py_XDECREF(b);
    return ok;
}

static cbn_status fold_arith(void *arg, const cbn_arith *how, cbn_folded *out, cbn_error *err) {
    weights_maker *m = arg;
    (void)err;
    const cbn_fold_layer *l = &how->of;
    cbn_array weight = {0}, bias = {0};
    PyArrayObject *c = numbers_of(how);
    double *s = cbn_scratch_get((size_t)CBN_MAX(l->channels, 1) * 2 * sizeof *s);
    bool ok = c != NULL && s != NULL;
    if (c != NULL && s == NULL) PyErr_NoMemory();
    if (ok && PyArray_SIZE(c) != 1 && PyArray_SIZE(c) != l->channels) {
        ok = false; /* it was another when it was looked at */
        PyErr_SetString(PyExc_RuntimeError, "a constant changed its size while it was being folded");
    }
    ok = ok && cbn_array_get(l->weight, "weight", CBN_LAYOUT_STRIDED, &weight) &&
         cbn_array_get_optional(or_none(l->bias), "bias", CBN_LAYOUT_STRIDED, &bias);
    if (ok && !coefficients(how, PyArray_DATA(c), PyArray_SIZE(c), weight.dtype, s, s + l->channels)) {
        out->refused = true;
    } else if (ok) {
        ok = fold_coefficients(m, l, &weight, &bias, s, s + l->channels, out);
    }
    cbn_scratch_put(s);
    Py_XDECREF(c);
    cbn_array_release(&bias);
    cbn_array_release(&weight);
    return ok ? CBN_OK : CBN_HOST_ERROR;
}

/* ---- entry points ---- */

static void maker_free(weights_maker *m) {
    Py_XDECREF(m->parameter);
    Py_XDECREF(m->constants);
    Py_XDECREF(m->names);
    Py_XDECREF(m->hints);
    Py_XDECREF(m->folded);
    Py_XDECREF(m->fold_rows);
    Py_XDECREF(m->batched);
}

static bool maker_init(weights_maker *m, PyObject *helper) {
    *m = (weights_maker){.helper = helper, .names = PyList_New(0), .hints = PyList_New(0), .folded = PyDict_New(),
                         .batched = PySet_New(NULL)};
    m->parameter = PyObject_GetAttrString(helper, "parameter");
    if (m->parameter != NULL) m->constants = PyObject_GetAttrString(helper, "constants");
    m->host = (cbn_fold_layers_host){.arg = m, .operand = read_operand, .bn = fold_bn, .arith = fold_arith,
                                     .drop = drop, .batched = note_batched, .finite = cbn_py_coefficients_finite};
    return m->names != NULL && m->hints != NULL && m->folded != NULL && m->batched != NULL && m->constants != NULL;
}

static cbn_status fold_step(cbn_freeze *f, void *arg) {
    weights_maker *m = arg;
    cbn_fold_report folds = {0};
    cbn_status status = cbn_pass_fold_layers(f, &m->host, &folds);
    if (status == CBN_OK) {
        m->fold_rows = cbn_py_fold_rows(f->g, &folds);
        if (m->fold_rows == NULL) status = CBN_HOST_ERROR;
    }
    cbn_fold_report_free(&folds);
    return status;
}

/* pass_fold_layers(graph, root, helper, batch_norms, binary) -> (changed, rows, rows of BatchNorms, names of layers
 * that need a batch axis now) */
static PyObject *pass_fold_layers(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    weights_maker m;
    if (!cbn_py_nargs("pass_fold_layers", nargs, 5)) return NULL;
    PyObject *result = NULL, *whole = NULL;
    if (maker_init(&m, args[2]) && cbn_py_bool(args[3], "batch_norms", &m.host.batch_norms) &&
        cbn_py_bool(args[4], "binary", &m.host.binary)) {
        result = cbn_py_step_run(args[0], args[1], fold_step, &m);
    }
    if (result != NULL) {
        whole = PyTuple_Pack(4, PyTuple_GET_ITEM(result, 0), PyTuple_GET_ITEM(result, 1), m.fold_rows, m.batched);
    }
    Py_XDECREF(result);
    maker_free(&m);
    return whole;
}

typedef struct module_list {
    weights_maker m;
    PyObject *graph, *found;
} module_list;

static cbn_status add_module(void *arg, cbn_node_id id) {
    const module_list *l = arg;
    PyObject *view = cbn_py_node_view(l->graph, id);
    const bool ok = view != NULL && PyList_Append(l->found, view) == 0;
    Py_XDECREF(view);
    return ok ? CBN_OK : CBN_HOST_ERROR;
}

static cbn_status modules_step(cbn_freeze *f, void *arg) {
    module_list *l = arg;
    return cbn_pass_binary_modules(f, &l->m.host, add_module, l);
}

/* pass_binary_modules(graph, root, helper) -> nodes that call a layer whose arithmetic can be folded */
static PyObject *pass_binary_modules(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    module_list l;
    if (!cbn_py_nargs("pass_binary_modules", nargs, 3)) return NULL;
    l.graph = args[0];
    l.found = PyList_New(0);
    PyObject *done = NULL;
    if (maker_init(&l.m, args[2]) && l.found != NULL) done = cbn_py_step_run(args[0], args[1], modules_step, &l);
    maker_free(&l.m);
    if (done == NULL) Py_CLEAR(l.found);
    Py_XDECREF(done);
    return l.found;
}

PyMethodDef cbn_pass_fold_layers_methods[] = {
    {"pass_fold_layers", (PyCFunction)(void (*)(void))pass_fold_layers, METH_FASTCALL,
     "pass_fold_layers(graph, root, helper, batch_norms, binary) -> (changed, rows, rows of BatchNorms, layers)"},
    {"pass_binary_modules", (PyCFunction)(void (*)(void))pass_binary_modules, METH_FASTCALL,
     "pass_binary_modules(graph, root, helper) -> nodes"},
    {0},
};
