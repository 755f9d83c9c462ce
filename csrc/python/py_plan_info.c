/* SPDX-License-Identifier: BSD-3-Clause */
/* What a plan tells about itself: shapes, algorithm, memory, cost. */
#include "python/py_error.h"
#include "python/py_plan.h"


/* An input_shape argument, checked against the plan. */
typedef struct asked_shape {
    npy_intp shape[CBN_MAX_DIMS];
    cbn_io_shape io;
    int64_t out[CBN_MAX_SPATIAL];
} asked_shape;

static bool read_shape(cbn_plan_object *self, PyObject *obj, asked_shape *s) {
    int ndim;
    cbn_error err = {0};
    if (!cbn_shape_parse(obj, "input_shape", &ndim, s->shape)) return false;
    if (!cbn_io_split(cbn_plan_geometry(self->plan), "input_shape", ndim, s->shape, &s->io)) return false;
    const cbn_status status = cbn_plan_output(self->plan, s->io.n, s->io.channels, s->io.in, s->out, &err);
    if (status != CBN_OK) cbn_py_raise(status, &err);
    return status == CBN_OK;
}

static bool read_report(cbn_plan_object *self, PyObject *obj, asked_shape *s, cbn_plan_report *report) {
    cbn_error err = {0};
    cbn_status status;
    if (!read_shape(self, obj, s)) return false;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_plan_explain(self->plan, s->io.n, s->io.in, report, &err);
    Py_END_ALLOW_THREADS
    if (status != CBN_OK) cbn_py_raise(status, &err);
    return status == CBN_OK;
}

PyObject *cbn_plan_output_shape(PyObject *op, PyObject *input_shape) {
    cbn_plan_object *self = (cbn_plan_object *)op;
    asked_shape s;
    npy_intp shape[CBN_MAX_DIMS];
    if (!read_shape(self, input_shape, &s)) return NULL;
    cbn_io_output(cbn_plan_geometry(self->plan), &s.io, s.shape, s.out, shape);
    return PyArray_IntTupleFromIntp(s.io.ndim, shape);
}

PyObject *cbn_plan_memory(PyObject *op, PyObject *input_shape) {
    asked_shape s;
    cbn_plan_report r;
    if (!read_report((cbn_plan_object *)op, input_shape, &s, &r)) return NULL;
    return Py_BuildValue("{sn sn sn sn sn sn}", "weights", (Py_ssize_t)(r.weight_bytes + r.packed_bytes), "packed",
                         (Py_ssize_t)r.packed_bytes, "plan", (Py_ssize_t)r.plan_bytes, "workspace",
                         (Py_ssize_t)r.workspace_bytes, "input", (Py_ssize_t)r.input_bytes, "output",
                         (Py_ssize_t)r.output_bytes);
}

PyObject *cbn_plan_cost(PyObject *op, PyObject *input_shape) {
    cbn_plan_object *self = (cbn_plan_object *)op;
    const cbn_conv_geometry *g = cbn_plan_geometry(self->plan);
    asked_shape s;
    cbn_plan_report r;
    if (!read_report(self, input_shape, &s, &r)) return NULL;
    /* Checked when the plan was made: this product fits. */
    int64_t weights = g->oc * (g->ic / g->g);
    for (int i = 0; i < g->nd; i++) weights *= g->k[i];
    const int64_t bytes = (weights + g->oc) * (int64_t)cbn_dtype_size(g->dtype) + (int64_t)r.input_bytes +
                          (int64_t)r.output_bytes;
    return Py_BuildValue("{sL sL sL}", "flops", (long long)r.flops, "flops_real", (long long)r.flops_real, "bytes",
                         (long long)bytes);
}

PyObject *cbn_plan_halo(PyObject *op, PyObject *unused) {
    (void)unused;
    const cbn_conv_geometry *g = cbn_plan_geometry(((cbn_plan_object *)op)->plan);
    PyObject *tuple = PyTuple_New(g->nd);
    for (int i = 0; tuple != NULL && i < g->nd; i++) {
        int64_t before, after;
        cbn_geometry_halo(g, i, &before, &after);
        PyObject *pair = Py_BuildValue("(LL)", (long long)before, (long long)after);
        if (pair == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, pair);
    }
    return tuple;
}

/* ---- explain ---- */

static bool append_text(PyObject *list, PyObject *text) {
    const bool ok = text != NULL && PyList_Append(list, text) == 0;
    Py_XDECREF(text);
    return ok;
}

static PyObject *copies_list(const cbn_plan_object *self) {
    static const char *const modes[] = {"zeros", "reflect", "replicate", "circular"};
    PyObject *list = PyList_New(0);
    bool ok = list != NULL;
    const cbn_pad_mode mode = cbn_plan_geometry(self->plan)->pad_mode;
    if (ok && mode != CBN_MODE_ZEROS) {
        ok = append_text(list, PyUnicode_FromFormat("x: padded into a temporary (padding_mode='%s')", modes[mode]));
    }
    for (int i = 0; ok && i < CBN_PLAN_COPY_KINDS && self->copies[i].what != NULL; i++) {
        const cbn_copy_count *c = &self->copies[i];
        ok = append_text(list, PyUnicode_FromFormat("%s: copied in %llu of %llu calls: %s", c->what, c->times,
                                                    self->calls, c->why));
    }
    if (!ok) Py_CLEAR(list);
    return list;
}

static PyObject *candidates_list(const cbn_plan_report *r) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < r->ncandidates; i++) {
        const cbn_plan_candidate *c = &r->candidates[i];
        if (!append_text(list, Py_BuildValue("(ss)", c->name, c->reason ? c->reason : "chosen"))) Py_CLEAR(list);
    }
    return list;
}

/* Of the algorithms that tuning measured. */
static PyObject *seconds_dict(const cbn_plan_report *r) {
    PyObject *dict = PyDict_New();
    for (int i = 0; dict != NULL && r->tuned && i < r->ncandidates; i++) {
        if (!(r->candidates[i].seconds > 0)) continue;
        PyObject *seconds = PyFloat_FromDouble(r->candidates[i].seconds);
        if (seconds == NULL || PyDict_SetItemString(dict, r->candidates[i].name, seconds) < 0) Py_CLEAR(dict);
        Py_XDECREF(seconds);
    }
    return dict;
}

static PyObject *facts_dict(const cbn_plan_object *self, const cbn_plan_report *r) {
    PyObject *copies = copies_list(self), *candidates = candidates_list(r), *seconds = seconds_dict(r), *facts = NULL;
    if (copies != NULL && candidates != NULL && seconds != NULL) {
        facts = Py_BuildValue("{ss ss ss ss ss sO sO sO sO}", "isa", r->isa, "algorithm", r->algorithm, "tile", r->tile,
                              "dtype", cbn_dtype_name(cbn_plan_geometry(self->plan)->dtype), "precision",
                              cbn_precision_name(cbn_plan_get_options(self->plan)->precision), "tuned",
                              r->tuned ? Py_True : Py_False, "seconds", seconds, "copies", copies, "candidates",
                              candidates);
    }
    Py_XDECREF(seconds);
    Py_XDECREF(copies);
    Py_XDECREF(candidates);
    return facts;
}

static PyObject *call_formatter(const char *function, PyObject *argument) {
    PyObject *module = PyImport_ImportModule("pyconvbn.plan");
    if (module == NULL) return NULL;
    PyObject *result = PyObject_CallMethod(module, function, "O", argument);
    Py_DECREF(module);
    return result;
}

PyObject *cbn_plan_explain_method(PyObject *op, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    cbn_plan_object *self = (cbn_plan_object *)op;
    const Py_ssize_t nkw = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    if (nargs + nkw > 1 ||
        (nkw == 1 && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "input_shape") != 0)) {
        PyErr_SetString(PyExc_TypeError, "explain: expected one argument, input_shape");
        return NULL;
    }
    PyObject *shape = nargs + nkw == 1 && args[0] != Py_None ? args[0] : self->input_shape;
    if (shape == Py_None) {
        PyErr_SetString(PyExc_ValueError,
                        "input_shape: expected a shape, got None (the plan was made without one)");
        return NULL;
    }
    asked_shape s;
    cbn_plan_report report;
    if (!read_report(self, shape, &s, &report)) return NULL;
    PyObject *facts = facts_dict(self, &report);
    if (facts == NULL) return NULL;
    PyObject *result = call_formatter("_explanation", facts);
    Py_DECREF(facts);
    return result;
}

PyObject *cbn_plan_repr_html(PyObject *self, PyObject *unused) {
    (void)unused;
    return call_formatter("_plan_html", self);
}

PyObject *cbn_plan_repr(PyObject *op) {
    const cbn_conv_plan *plan = ((cbn_plan_object *)op)->plan;
    const cbn_conv_geometry *g = cbn_plan_geometry(plan);
    const char *dtype = cbn_dtype_name(g->dtype);
    PyObject *activation = cbn_activation_object(cbn_plan_get_options(plan)), *text = NULL;
    if (activation == NULL) return NULL;
    if (g->nd == 0) {
        text = PyUnicode_FromFormat("<pyconvbn.Plan linear %lld -> %lld, %s, activation %R>", (long long)g->ic,
                                    (long long)g->oc, dtype, activation);
    } else {
        PyObject *kernel = PyUnicode_FromFormat("%lld", (long long)g->k[0]);
        for (int i = 1; kernel != NULL && i < g->nd; i++) {
            Py_SETREF(kernel, PyUnicode_FromFormat("%Ux%lld", kernel, (long long)g->k[i]));
        }
        if (kernel != NULL) {
            text = PyUnicode_FromFormat("<pyconvbn.Plan conv%s%dd %lld -> %lld, kernel %U, groups %lld, %s, "
                                        "activation %R>",
                                        g->transposed ? "_transpose" : "", g->nd, (long long)g->ic, (long long)g->oc,
                                        kernel, (long long)g->g, dtype, activation);
        }
        Py_XDECREF(kernel);
    }
    Py_DECREF(activation);
    return text;
}
