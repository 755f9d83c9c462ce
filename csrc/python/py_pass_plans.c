/* SPDX-License-Identifier: BSD-3-Clause */
/* prepare_layers, for pyconvbn/_pass_plans.py, which makes the layers. */
#include "python/py_error.h"
#include "python/py_freeze.h"
#include "python/py_passes.h"

#include "graph/passes.h"

typedef struct maker {
    PyObject *graph, *layer;
} maker;

static PyObject *arrays_tuple(const cbn_plan_request *r) {
    PyObject *items[4];
    for (int i = 0; i < 4; i++) items[i] = r->arrays[i] == NULL ? Py_None : (PyObject *)r->arrays[i];
    return PyTuple_Pack(4, items[0], items[1], items[2], items[3]);
}

/* Of a layer, the arguments that follow input, weight and bias, by name. */
static PyObject *geometry_dict(PyObject *graph, const cbn_plan_request *r) {
    PyObject *dict = PyDict_New();
    const cbn_bound *b = r->call;
    const bool layer = r->kind != CBN_PLAN_PRODUCT && r->kind != CBN_PLAN_BATCH_NORM;
    for (int i = 3; dict != NULL && layer && i < b->n && !b->op->params[i].keyword_only; i++) {
        const cbn_param *param = &b->op->params[i];
        PyObject *value = !b->given[i] && param->default_str != NULL ? PyUnicode_FromString(param->default_str)
                                                                     : cbn_py_value_to_object(graph, &b->v[i]);
        if (value == NULL || PyDict_SetItemString(dict, param->name, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(value);
    }
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
        arrays_tuple(r), geometry_dict(m->graph, r), activation_object(r), r->residual ? Py_True : Py_False,
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
    return cbn_py_step_run(args[0], args[1], plans_step, &(maker){args[0], args[2]});
}

PyMethodDef cbn_pass_plans_methods[] = {
    {"pass_plans", (PyCFunction)(void (*)(void))pass_plans, METH_FASTCALL,
     "pass_plans(graph, root, layer) -> (nodes changed, rows)"},
    {0},
};
