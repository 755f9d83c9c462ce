/* SPDX-License-Identifier: BSD-3-Clause */
/* prepare_layers, for pyconvbn/_pass_plans.py, which makes the layers. */
#include "python/py_error.h"
#include "python/py_freeze.h"
#include "python/py_passes.h"

#include <string.h>

#include "graph/passes.h"

typedef struct maker {
    PyObject *graph, *layer;
    PyObject *geometries; /* encoded geometry -> its dict: most layers of a network share a few */
} maker;

static PyObject *arrays_tuple(const cbn_plan_request *r) {
    PyObject *items[4];
    for (int i = 0; i < 4; i++) items[i] = r->arrays[i] == NULL ? Py_None : (PyObject *)r->arrays[i];
    return PyTuple_Pack(4, items[0], items[1], items[2], items[3]);
}

/* Of a layer, the arguments that follow input, weight and bias, by name. */
static PyObject *new_geometry(PyObject *graph, const cbn_bound *b, int end) {
    PyObject *dict = PyDict_New();
    for (int i = 3; dict != NULL && i < end; i++) {
        const cbn_param *param = &b->op->params[i];
        PyObject *value = !b->given[i] && param->default_str != NULL ? PyUnicode_FromString(param->default_str)
                                                                     : cbn_py_value_to_object(graph, &b->v[i]);
        if (value == NULL || PyDict_SetItemString(dict, param->name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

typedef struct encoding {
    size_t len;
    char text[512];
} encoding;

static bool put(encoding *e, const void *data, size_t len) {
    if (e->len + len > sizeof e->text) return false;
    memcpy(e->text + e->len, data, len);
    e->len += len;
    return true;
}

/* Equal bytes, equal values. False: of another kind, or too long. */
static bool encode(encoding *e, const cbn_value *v) {
    if (!put(e, &v->tag, sizeof v->tag)) return false;
    switch ((cbn_value_tag)v->tag) {
    case CBN_V_NONE: return true;
    case CBN_V_BOOL: return put(e, &v->u.b, sizeof v->u.b);
    case CBN_V_INT: return put(e, &v->u.i, sizeof v->u.i);
    case CBN_V_STR: return put(e, &v->u.str, sizeof v->u.str);
    case CBN_V_TUPLE:
    case CBN_V_LIST:
        if (v->u.seq->cls != NULL || !put(e, &v->u.seq->count, sizeof v->u.seq->count)) return false;
        for (uint32_t i = 0; i < v->u.seq->count; i++) {
            if (!encode(e, &v->u.seq->v[i])) return false;
        }
        return true;
    default: return false;
    }
}

/* The same dict for equal arguments, where that is cheaply seen. */
static PyObject *geometry_dict(const maker *m, const cbn_plan_request *r) {
    const cbn_bound *b = r->call;
    int end = 3;
    if (r->kind != CBN_PLAN_PRODUCT && r->kind != CBN_PLAN_BATCH_NORM) {
        while (end < b->n && !b->op->params[end].keyword_only) end++;
    }
    encoding e = {0};
    bool ok = put(&e, &b->op, sizeof b->op);
    for (int i = 3; ok && i < end; i++) {
        const bool text = !b->given[i] && b->op->params[i].default_str != NULL;
        ok = put(&e, &text, sizeof text) && (text || encode(&e, &b->v[i]));
    }
    if (!ok) return new_geometry(m->graph, b, end);
    PyObject *key = PyBytes_FromStringAndSize(e.text, (Py_ssize_t)e.len), *dict = NULL;
    if (key != NULL) dict = Py_XNewRef(PyDict_GetItemWithError(m->geometries, key));
    if (dict == NULL && key != NULL && !PyErr_Occurred()) {
        dict = new_geometry(m->graph, b, end);
        if (dict != NULL && PyDict_SetItem(m->geometries, key, dict) < 0) Py_CLEAR(dict);
    }
    Py_XDECREF(key);
    return dict;
}

static PyObject *activation_object(const cbn_plan_request *r) {
    static const char *const names[] = {NULL, "relu", "relu6", "leaky_relu", "sigmoid", "hardswish", "silu"};
    if (r->activation == CBN_PLAN_NO_ACTIVATION) Py_RETURN_NONE;
    if (r->activation == CBN_PLAN_LEAKY_RELU) return Py_BuildValue("(sd)", names[r->activation], r->slope);
    return PyUnicode_FromString(names[r->activation]);
}

static PyObject *shape_tuple(const cbn_tensor_meta *m) {
    if (m == NULL) Py_RETURN_NONE;
    PyObject *shape = PyTuple_New(m->ndim);
    for (int i = 0; shape != NULL && i < m->ndim; i++) {
        PyObject *size = PyLong_FromLongLong(m->shape[i]);
        if (size == NULL) Py_CLEAR(shape);
        else PyTuple_SET_ITEM(shape, i, size);
    }
    return shape;
}

static cbn_status layer(void *arg, cbn_graph *g, const cbn_plan_request *r, cbn_str *target, cbn_error *err) {
    static const char *const kinds[] = {"conv", "conv_transpose", "convolution", "linear", "product", "batch_norm"};
    const maker *m = arg;
    PyObject *made = PyObject_CallFunction(
        m->layer, "NsNNNOiNd", cbn_py_str_or_none(g, cbn_graph_node(g, r->node)->name), kinds[r->kind],
        arrays_tuple(r), geometry_dict(m, r), activation_object(r), r->residual ? Py_True : Py_False,
        (int)r->itemsize, shape_tuple(r->input), r->eps);
    *target = CBN_STR_NONE;
    if (made == NULL) return CBN_HOST_ERROR;
    cbn_status status = CBN_OK;
    if (made != Py_None) {
        Py_ssize_t len;
        const char *text = PyUnicode_AsUTF8AndSize(made, &len); /* TypeError for what is no str */
        status = text == NULL ? CBN_HOST_ERROR : cbn_graph_intern(g, text, (size_t)len, target, err);
    }
    Py_DECREF(made);
    return status;
}

static cbn_status plans_step(cbn_freeze *f, void *arg) {
    return cbn_pass_plans(f, &(cbn_plans_host){.arg = arg, .layer = layer});
}

/* pass_plans(graph, root, layer) -> (nodes changed, rows) */
static PyObject *pass_plans(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_plans", nargs, 3)) return NULL;
    maker m = {args[0], args[2], PyDict_New()};
    PyObject *result = m.geometries == NULL ? NULL : cbn_py_step_run(args[0], args[1], plans_step, &m);
    Py_XDECREF(m.geometries);
    return result;
}

PyMethodDef cbn_pass_plans_methods[] = {
    {"pass_plans", (PyCFunction)(void (*)(void))pass_plans, METH_FASTCALL,
     "pass_plans(graph, root, layer) -> (nodes changed, rows)"},
    {0},
};
