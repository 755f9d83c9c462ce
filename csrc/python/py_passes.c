/* SPDX-License-Identifier: BSD-3-Clause */
/* The passes for Python: reports become lists of tuples, pyconvbn/report.py makes rows of them. */
#include "python/py_graph.h"

#include "base/cbn_alloc.h"
#include "graph/op_table.h"
#include "graph/passes.h"
#include "python/py_fold.h"
#include "python/py_host_hold.h"
#include "python/py_passes.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* ---- what the passes ask of arrays ---- */

static bool all_within(const double *v, int64_t n, double most) {
    for (int64_t i = 0; i < n; i++) {
        if (!(fabs(v[i]) <= most)) return false;
    }
    return true;
}

static bool coefficients_finite(const cbn_bn_arrays *bn, cbn_dtype dtype, bool *out) {
    static const double most[] = {[CBN_F16] = 65504.0, [CBN_F32] = FLT_MAX, [CBN_F64] = DBL_MAX};
    const int64_t channels = bn->bn.mean.shape[0];
    double *s = cbn_scratch_get((size_t)channels * 2 * sizeof *s);
    if (s == NULL) {
        PyErr_NoMemory();
        return false;
    }
    cbn_bn_scale_shift(&bn->bn, channels, s, s + channels);
    *out = all_within(s, 2 * channels, most[dtype]);
    cbn_scratch_put(s);
    return true;
}

/* A 1-D ndarray of native float32 or float64, or nothing (data NULL: absent): what nearly all parameters are. */
typedef struct vector {
    const char *data;
    npy_intp stride, length;
    bool wide; /* float64 */
} vector;

static bool vector_of(cbn_host h, vector *out) {
    *out = (vector){0};
    if (h == NULL) return true;
    PyArrayObject *a = h;
    if (!PyArray_Check((PyObject *)h) || PyArray_NDIM(a) != 1 || !PyArray_ISALIGNED(a) || !PyArray_ISNOTSWAPPED(a)) {
        return false;
    }
    const int type = PyArray_TYPE(a);
    *out = (vector){PyArray_BYTES(a), PyArray_STRIDE(a, 0), PyArray_DIM(a, 0), type == NPY_DOUBLE};
    return type == NPY_DOUBLE || type == NPY_FLOAT;
}

static double vector_at(const vector *v, npy_intp i, double absent) {
    if (v->data == NULL) return absent;
    const char *p = v->data + i * v->stride;
    return v->wide ? *(const double *)p : *(const float *)p;
}

/* The question for such arrays without copying their descriptions; false: not of that kind. */
static bool finite_directly(const cbn_host bn[4], double eps, cbn_host weight, bool *out) {
    vector v[4];
    for (int i = 0; i < 4; i++) {
        if (!vector_of(bn[i], &v[i])) return false;
    }
    for (int i = 0; i < 3; i++) {
        if (v[i].data != NULL && v[i].length != v[3].length) return false;
    }
    if (!PyArray_Check((PyObject *)weight)) return false;
    const int type = PyArray_TYPE((PyArrayObject *)weight);
    if (type != NPY_DOUBLE && type != NPY_FLOAT) return false;
    const double most = type == NPY_DOUBLE ? DBL_MAX : FLT_MAX;
    *out = true;
    for (npy_intp i = 0; *out && i < v[3].length; i++) {
        const double var = vector_at(&v[3], i, 1.0) + eps;
        if (!(var > 0.0)) {
            *out = false; /* also keeps the division quiet */
        } else {
            const double s = vector_at(&v[0], i, 1.0) * (1.0 / sqrt(var));
            const double t = vector_at(&v[1], i, 0.0) - vector_at(&v[2], i, 0.0) * s;
            *out = fabs(s) <= most && fabs(t) <= most;
        }
    }
    return true;
}

static PyObject *or_none(cbn_host h) { return h == NULL ? Py_None : (PyObject *)h; }

cbn_status cbn_py_coefficients_finite(const cbn_host bn[4], double eps, cbn_host weight, bool *out, cbn_error *err) {
    if (finite_directly(bn, eps, weight, out)) return CBN_OK;
    cbn_bn_arrays arrays = {0};
    cbn_array w = {0};
    PyObject *number = PyFloat_FromDouble(eps);
    bool ok = number != NULL &&
              cbn_bn_get(or_none(bn[0]), or_none(bn[1]), or_none(bn[2]), or_none(bn[3]), number,
                         &cbn_bn_attribute_names, &arrays) &&
              cbn_array_open(weight, "weight", &w);
    cbn_status status = CBN_OK;
    if (ok) {
        /* The interview has compared the lengths; host code may have changed an attribute since, so once more. */
        const int64_t channels = arrays.bn.mean.ndim == 1 ? arrays.bn.mean.shape[0] : 0;
        status = cbn_bn_check(&arrays.bn, channels, false, err);
        if (status == CBN_OK) ok = coefficients_finite(&arrays, w.dtype, out);
    }
    Py_XDECREF(number);
    cbn_array_release(&w);
    cbn_bn_release(&arrays);
    return ok ? status : CBN_HOST_ERROR;
}

/* ---- reports ---- */

static PyObject *count_or_none(int64_t v) { return v < 0 ? Py_NewRef(Py_None) : PyLong_FromLongLong(v); }

/* The Python string of a static text, made once for each place in `cache`. Borrowed; NULL with an exception. */
static PyObject *constant_text(PyObject **cache, const char *text) {
    if (*cache == NULL) *cache = PyUnicode_InternFromString(text);
    return *cache;
}

/* (node, target, outcome, reason, blocking, hint, form, bytes_saved, flops_saved, run_time_rule, new_node, conv). */
static PyObject *row_tuple(const cbn_graph *g, const cbn_fold_row *r) {
    static const char *const forms[] = {"module", "functional", "aten"};
    static const char *const outcomes[] = {"kept", "fused", "folded"};
    static PyObject *form_texts[3], *outcome_texts[3], *reason_texts[CBN_REASON_COUNT], *hint_texts[CBN_REASON_COUNT];
    PyObject *outcome = constant_text(&outcome_texts[r->outcome], outcomes[r->outcome]),
             *reason = constant_text(&reason_texts[r->reason], cbn_fold_reason_name(r->reason)),
             *form = constant_text(&form_texts[r->form], forms[r->form]),
             *hint = r->hint != NULL ? PyUnicode_FromString(r->hint)
                                     : Py_XNewRef(constant_text(&hint_texts[r->reason], cbn_fold_reason_hint(r->reason)));
    PyObject *bn = cbn_py_str_or_none(g, r->bn_name), *target = cbn_py_str_or_none(g, r->bn_target),
             *blocking = cbn_py_str_or_none(g, r->blocking_name), *new_name = cbn_py_str_or_none(g, r->new_name),
             *conv = cbn_py_str_or_none(g, r->conv_name), *bytes = count_or_none(r->bytes_saved),
             *flops = count_or_none(r->flops_saved), *row = NULL;
    PyObject *const owned[] = {hint, bn, target, blocking, new_name, conv, bytes, flops};
    bool ok = outcome != NULL && reason != NULL && form != NULL;
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) ok = ok && owned[i] != NULL;
    if (ok) {
        row = PyTuple_Pack(12, bn, target, outcome, reason, blocking, hint, form, bytes, flops,
                           r->run_time_rule ? Py_True : Py_False, new_name, conv);
    }
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) Py_XDECREF(owned[i]);
    return row;
}

PyObject *cbn_py_fold_rows(const cbn_graph *g, const cbn_fold_report *report) {
    PyObject *list = PyList_New(report->count);
    for (int i = 0; list != NULL && i < report->count; i++) {
        PyObject *row = row_tuple(g, &report->rows[i]);
        if (row == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, row);
    }
    return list;
}

/* ---- entry points ---- */

/* Patterns out of a tuple of str, borrowed from it. *out is freed with PyMem_Free. */
static bool patterns_of(PyObject *skip, const char ***out, int *count) {
    *out = NULL;
    *count = 0;
    if (!PyTuple_Check(skip) || PyTuple_GET_SIZE(skip) > 1 << 20) {
        PyErr_SetString(PyExc_TypeError, "skip: expected a tuple of str");
        return false;
    }
    const Py_ssize_t n = PyTuple_GET_SIZE(skip);
    *out = PyMem_Calloc((size_t)n + 1, sizeof **out);
    if (*out == NULL) return PyErr_NoMemory(), false;
    for (Py_ssize_t i = 0; i < n; i++) {
        (*out)[i] = PyUnicode_AsUTF8(PyTuple_GET_ITEM(skip, i));
        if ((*out)[i] == NULL) return false;
    }
    *count = (int)n;
    return true;
}

typedef cbn_status (*report_pass)(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report, cbn_error *err);

static PyObject *run_report_pass(report_pass pass, PyObject *graph, PyObject *skip, cbn_pass_host *host) {
    cbn_graph *g = cbn_py_graph_get(graph, "graph");
    if (g == NULL) return NULL;
    const char **patterns;
    PyObject *result = NULL;
    if (!patterns_of(skip, &patterns, &host->nskip)) {
        PyMem_Free(patterns);
        return NULL;
    }
    host->skip = patterns;
    host->finite = cbn_py_coefficients_finite;
    cbn_fold_report report = {0};
    cbn_error err = {0};
    cbn_graph_retain(g); /* host code may drop the Python object */
    cbn_py_host_hold_begin();
    const cbn_status status = pass(g, host, &report, &err);
    cbn_py_host_hold_end();
    if (status == CBN_OK) {
        result = cbn_py_fold_rows(g, &report);
        cbn_py_graph_flush(graph);
    } else {
        (void)cbn_py_graph_raise(graph, status, &err);
    }
    cbn_fold_report_free(&report);
    cbn_graph_release(g);
    PyMem_Free(patterns);
    return result;
}

static cbn_host root_of(PyObject *root) { return root == Py_None ? NULL : root; }

/* pass_efficient(graph, root, efficient, decomposed, skip, only) -> rows; only: this node alone, or None */
static PyObject *pass_efficient(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_efficient", nargs, 6)) return NULL;
    /* pyconvbn/passes.py has a snapshot, because making the report may fail too. */
    cbn_pass_host host = {
        .root = root_of(args[1]), .efficient = args[2], .decomposed = args[3], .caller_restores = true};
    if (args[5] != Py_None && !cbn_py_node_get(args[0], args[5], "only", &host.only)) return NULL;
    return run_report_pass(cbn_pass_efficient, args[0], args[4], &host);
}

/* pass_fuse_plan(graph, root, skip) -> rows */
static PyObject *pass_fuse_plan(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_fuse_plan", nargs, 3)) return NULL;
    cbn_pass_host host = {.root = root_of(args[1])};
    return run_report_pass(cbn_pass_fuse_plan, args[0], args[2], &host);
}

/* pass_dce(graph, root) -> how many nodes went */
static PyObject *pass_dce(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_dce", nargs, 2)) return NULL;
    cbn_graph *g = cbn_py_graph_get(args[0], "graph");
    if (g == NULL) return NULL;
    uint32_t removed = 0;
    cbn_error err = {0};
    cbn_graph_retain(g);
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_pass_dce(g, root_of(args[1]), true, &removed, &err);
    cbn_py_host_hold_end();
    PyObject *result = NULL;
    if (status == CBN_OK) {
        result = PyLong_FromUnsignedLong(removed);
        cbn_py_graph_flush(args[0]);
    } else {
        (void)cbn_py_graph_raise(args[0], status, &err);
    }
    cbn_graph_release(g);
    return result;
}

/* pass_bind(graph, node) -> (name of the operator's row, {argument: value}) of a call_function node; arguments that the
 * call does not give are not in the dict */
static PyObject *pass_bind(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_bind", nargs, 2)) return NULL;
    cbn_graph *g = cbn_py_graph_get(args[0], "graph");
    cbn_node_id id;
    if (g == NULL || !cbn_py_node_get(args[0], args[1], "node", &id)) return NULL;
    cbn_bound bound;
    cbn_error err = {0};
    const cbn_status status = cbn_op_bind(g, id, &bound, &err);
    if (status != CBN_OK) return cbn_py_graph_raise(args[0], status, &err);
    PyObject *values = PyDict_New();
    for (int i = 0; values != NULL && i < bound.n; i++) {
        if (!bound.given[i]) continue;
        PyObject *value = cbn_py_value_to_object(args[0], &bound.v[i]);
        if (value == NULL || PyDict_SetItemString(values, bound.op->params[i].name, value) < 0) Py_CLEAR(values);
        Py_XDECREF(value);
    }
    return values == NULL ? NULL : Py_BuildValue("(sN)", bound.op->name, values);
}

/* fold_reasons() -> ((code, hint), ...) in the order in which they are asked */
static PyObject *fold_reasons(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    PyObject *all = PyTuple_New(CBN_REASON_COUNT);
    for (int i = 0; all != NULL && i < CBN_REASON_COUNT; i++) {
        PyObject *one = Py_BuildValue("(ss)", cbn_fold_reason_name(i), cbn_fold_reason_hint(i));
        if (one == NULL) Py_CLEAR(all);
        else PyTuple_SET_ITEM(all, i, one);
    }
    return all;
}

PyMethodDef cbn_passes_methods[] = {
    {"pass_efficient", (PyCFunction)(void (*)(void))pass_efficient, METH_FASTCALL,
     "pass_efficient(graph, root, efficient, decomposed, skip, only) -> list of report rows"},
    {"pass_fuse_plan", (PyCFunction)(void (*)(void))pass_fuse_plan, METH_FASTCALL,
     "pass_fuse_plan(graph, root, skip) -> list of report rows; changes nothing"},
    {"pass_dce", (PyCFunction)(void (*)(void))pass_dce, METH_FASTCALL, "pass_dce(graph, root) -> nodes removed"},
    {"pass_bind", (PyCFunction)(void (*)(void))pass_bind, METH_FASTCALL, "pass_bind(graph, node) -> (row, arguments)"},
    {"fold_reasons", fold_reasons, METH_NOARGS, "fold_reasons() -> ((code, hint), ...)"},
    {0},
};
