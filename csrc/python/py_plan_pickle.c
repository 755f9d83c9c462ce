/* SPDX-License-Identifier: BSD-3-Clause */
/* Pickling and update. The pickle holds the folded weights (ndarrays, so protocol 5 sends them out of band), the
 * constructor's geometry and the algorithm choices; packing is done anew by the reader, whose machine may differ. */
#include "python/py_error.h"
#include "python/py_plan.h"

/* A read-only ndarray over the plan's own memory, which it keeps alive. */
static PyObject *plan_view(cbn_plan_object *self, const void *data, int ndim, const npy_intp *shape) {
    const int typenum = cbn_dtype_typenum(cbn_plan_geometry(self->plan)->dtype);
    /* NumPy takes void *; without NPY_ARRAY_WRITEABLE nobody writes. */
    PyObject *view = PyArray_New(&PyArray_Type, ndim, shape, typenum, NULL, (void *)(uintptr_t)data, 0,
                                 NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED, NULL);
    if (view != NULL && PyArray_SetBaseObject((PyArrayObject *)view, Py_NewRef((PyObject *)self)) < 0) Py_CLEAR(view);
    return view;
}

static int weight_shape(const cbn_conv_geometry *g, npy_intp *shape) {
    shape[0] = g->transposed ? g->ic : g->oc;
    shape[1] = (g->transposed ? g->oc : g->ic) / g->g;
    for (int i = 0; i < g->nd; i++) shape[2 + i] = g->k[i];
    return g->nd + 2;
}

static PyObject *plan_params(cbn_plan_object *self) {
    return cbn_geometry_params(cbn_plan_geometry(self->plan), cbn_plan_get_options(self->plan));
}

PyObject *cbn_plan_reduce_ex(PyObject *op, PyObject *protocol) {
    (void)protocol; /* the arrays decide by it how they travel */
    cbn_plan_object *self = (cbn_plan_object *)op;
    const cbn_conv_geometry *g = cbn_plan_geometry(self->plan);
    npy_intp shape[2 + CBN_MAX_SPATIAL];
    const npy_intp oc = g->oc;
    PyObject *result = NULL;
    PyObject *module = PyImport_ImportModule("pyconvbn._core");
    PyObject *restore = module ? PyObject_GetAttrString(module, "_restore_plan") : NULL;
    PyObject *weight = plan_view(self, cbn_plan_weights(self->plan), weight_shape(g, shape), shape);
    PyObject *bias = plan_view(self, cbn_plan_bias(self->plan), 1, &oc);
    PyObject *params = plan_params(self);
    PyObject *choices = PyDict_Copy(self->choices);
    if (restore && weight && bias && params && choices) {
        result = Py_BuildValue("O(OOOOO)", restore, weight, bias, params, self->input_shape, choices);
    }
    Py_XDECREF(choices);
    Py_XDECREF(params);
    Py_XDECREF(bias);
    Py_XDECREF(weight);
    Py_XDECREF(restore);
    Py_XDECREF(module);
    return result;
}

/* Repeats fixed choices on `plan`. An algorithm that this machine or version lacks is left to the normal choice. */
static bool restore_choices(cbn_plan_object *plan, PyObject *choices) {
    Py_ssize_t at = 0;
    PyObject *key, *value;
    const cbn_conv_geometry *g = cbn_plan_geometry(plan->plan);
    while (PyDict_Next(choices, &at, &key, &value)) {
        int nd;
        npy_intp shape[2 + CBN_MAX_DIMS] = {1, g->ic};
        const char *name = PyUnicode_AsUTF8(value);
        if (name == NULL || !cbn_shape_parse(key, "choices", &nd, shape + 2)) return false;
        if (nd != g->nd) {
            PyErr_Format(PyExc_ValueError, "choices: expected %d sizes, got %d", g->nd, nd);
            return false;
        }
        if (cbn_plan_fix(plan, nd + 2, shape, name)) continue;
        const bool refused =
            PyErr_ExceptionMatches(PyExc_ValueError) || PyErr_ExceptionMatches(PyExc_NotImplementedError);
        if (!refused) return false;
        PyErr_Clear();
    }
    return true;
}

/* A plan of `type` with the geometry of `params`; input_shape is prepared after the choices are in place. */
static PyObject *rebuild(PyTypeObject *type, PyObject *weight, PyObject *bias, PyObject *bn, PyObject *params,
                         PyObject *input_shape, PyObject *choices, const cbn_kernels *kernels) {
    PyObject *args = PyTuple_Pack(2, weight, bias), *kwargs = PyDict_Copy(params), *plan = NULL;
    if (args != NULL && kwargs != NULL && (bn == NULL || PyDict_SetItemString(kwargs, "bn", bn) == 0)) {
        plan = cbn_plan_new(type, args, kwargs, kernels);
    }
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    if (plan != NULL && (!restore_choices((cbn_plan_object *)plan, choices) ||
                         !cbn_plan_prepare_shape((cbn_plan_object *)plan, input_shape))) {
        Py_CLEAR(plan);
    }
    return plan;
}

static PyObject *restore_plan(PyObject *module, PyObject *args) {
    PyObject *weight, *bias, *params, *input_shape, *choices;
    if (!PyArg_ParseTuple(args, "OOO!OO!:_restore_plan", &weight, &bias, &PyDict_Type, &params, &input_shape,
                          &PyDict_Type, &choices)) {
        return NULL;
    }
    PyObject *type = PyObject_GetAttrString(module, "Plan");
    if (type == NULL) return NULL;
    PyObject *plan = rebuild((PyTypeObject *)type, weight, bias, NULL, params, input_shape, choices, NULL);
    Py_DECREF(type);
    return plan;
}

PyMethodDef cbn_plan_module_methods[] = {
    {"_restore_plan", restore_plan, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* The layer stays the same layer: only its values change. */
static bool check_same_layer(cbn_plan_object *self, PyObject *weight_obj) {
    const cbn_conv_geometry *g = cbn_plan_geometry(self->plan);
    npy_intp want[2 + CBN_MAX_SPATIAL];
    const int ndim = weight_shape(g, want);
    cbn_array weight = {0};
    bool ok = false;
    if (!cbn_array_get(weight_obj, "weight", CBN_LAYOUT_STRIDED, &weight)) goto done;
    if (weight.dtype != g->dtype) {
        PyErr_Format(PyExc_TypeError, "weight: expected dtype %s (the plan's), got %s", cbn_dtype_name(g->dtype),
                     cbn_dtype_name(weight.dtype));
        goto done;
    }
    ok = cbn_array_ndim(&weight) == ndim && PyArray_CompareLists(cbn_array_shape(&weight), want, ndim);
    if (!ok) {
        PyObject *a = PyArray_IntTupleFromIntp(ndim, want);
        PyObject *b = a ? PyArray_IntTupleFromIntp(cbn_array_ndim(&weight), cbn_array_shape(&weight)) : NULL;
        if (b != NULL) PyErr_Format(PyExc_ValueError, "weight: expected shape %R (the plan's), got %R", a, b);
        Py_XDECREF(a);
        Py_XDECREF(b);
    }
done:
    cbn_array_release(&weight);
    return ok;
}

PyObject *cbn_plan_update(PyObject *op, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"weight", "bias", "bn", NULL};
    cbn_plan_object *self = (cbn_plan_object *)op;
    PyObject *weight, *bias = Py_None, *bn = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:update", names, &weight, &bias, &bn)) return NULL;
    if (!check_same_layer(self, weight)) return NULL;
    PyObject *params = plan_params(self);
    if (params == NULL) return NULL;
    PyObject *plan = rebuild(Py_TYPE(op), weight, bias, bn, params, self->input_shape, self->choices,
                             cbn_plan_get_options(self->plan)->kernels);
    Py_DECREF(params);
    return plan;
}
