/* SPDX-License-Identifier: BSD-3-Clause */
/* _core._testing: what tests need and users must not: fault injection, a chosen ISA, a forced algorithm. The kernels
 * themselves are in the other py_testing_*.c; what these share is here. */
#include "python/py_module.h"
#include "python/py_plan.h"
#include "python/py_testing.h"

#include "base/cbn_alloc.h"

#include <string.h>

const cbn_kernels *cbn_testing_table(const char *isa) {
    for (const cbn_kernels *const *t = cbn_kernels_available(); isa != NULL && *t != NULL; t++)
        if (strcmp((*t)->isa, isa) == 0) return *t;
    if (isa != NULL) PyErr_Format(PyExc_ValueError, "isa: expected one of isas(), got '%s'", isa);
    return NULL;
}

static PyArrayObject *array_of(PyObject *obj, int type) {
    const bool fits = PyArray_Check(obj) && PyArray_TYPE((PyArrayObject *)obj) == type &&
                      PyArray_ISCARRAY_RO((PyArrayObject *)obj);
    return fits ? (PyArrayObject *)obj : NULL;
}

bool cbn_testing_span(PyObject *obj, const char *name, int type, cbn_span *out) {
    *out = (cbn_span){NULL, 0};
    if (obj == Py_None) return true;
    PyArrayObject *array = array_of(obj, type);
    if (array == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: expected None or a C-contiguous ndarray of the kernel's dtype", name);
        return false;
    }
    *out = (cbn_span){PyArray_DATA(array), PyArray_SIZE(array)};
    return true;
}

void *cbn_testing_array(PyObject *obj, const char *name, int type, int64_t least, int64_t *n) {
    PyArrayObject *array = array_of(obj, type);
    if (array == NULL)
        return PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous ndarray of the kernel's dtype", name);
    const int64_t size = PyArray_SIZE(array);
    if (size < least)
        return PyErr_Format(PyExc_ValueError, "%s: expected at least %lld elements, got %lld", name, (long long)least,
                            (long long)size);
    if (n != NULL) *n = size;
    return PyArray_DATA(array);
}

void *cbn_testing_axes(PyObject *obj, const char *name, int type, int ndim, int64_t *shape) {
    PyArrayObject *array = array_of(obj, type);
    if (array == NULL || PyArray_NDIM(array) != ndim)
        return PyErr_Format(PyExc_TypeError, "%s: expected a C-contiguous ndarray of %d axes and the kernel's dtype",
                            name, ndim);
    for (int i = 0; i < ndim; i++) shape[i] = PyArray_DIM(array, i);
    return PyArray_DATA(array);
}

PyObject *cbn_testing_refuse(const char *what) {
    PyErr_SetString(PyExc_ValueError, what);
    return NULL;
}

static PyObject *kernel_names(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    int count = 0;
    const char *const *names = cbn_kernel_names(&count);
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, name);
    }
    return tuple;
}

static PyObject *isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const cbn_kernels *const *tables = cbn_kernels_available();
    Py_ssize_t count = 0;
    while (tables[count] != NULL) count++;
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(tables[i]->isa);
        if (name == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, name);
    }
    return tuple;
}

static PyObject *active_isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(cbn_kernels_active()->isa);
}

static PyObject *alloc_fail_after(PyObject *module, PyObject *arg) {
    (void)module;
    int64_t n;
    if (!cbn_py_int64(arg, "n", &n)) return NULL;
    cbn_alloc_fail_after(n);
    Py_RETURN_NONE;
}

static PyObject *alloc_reset_peak(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    cbn_alloc_reset_peak();
    Py_RETURN_NONE;
}

static PyObject *scratch_trim(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    cbn_scratch_trim();
    Py_RETURN_NONE;
}

static PyTypeObject *plan_type(void) {
    PyObject *core = PyImport_ImportModule("pyconvbn._core");
    PyObject *type = core ? PyObject_GetAttrString(core, "Plan") : NULL;
    Py_XDECREF(core);
    return (PyTypeObject *)type;
}

static PyObject *plan_with_isa(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    if (PyTuple_GET_SIZE(args) < 1) {
        PyErr_SetString(PyExc_TypeError, "plan_with_isa: expected isa and the arguments of Plan");
        return NULL;
    }
    const char *isa = PyUnicode_AsUTF8(PyTuple_GET_ITEM(args, 0));
    const bool emulated = isa != NULL && strcmp(isa, "amx_emulated") == 0;
    const cbn_kernels *kernels = emulated ? cbn_kernels_amx_emulated() : cbn_testing_table(isa);
    if (kernels == NULL) return NULL;
    PyTypeObject *type = plan_type();
    PyObject *rest = type ? PyTuple_GetSlice(args, 1, PyTuple_GET_SIZE(args)) : NULL;
    PyObject *plan = rest ? cbn_plan_new(type, rest, kwargs, kernels) : NULL;
    Py_XDECREF(rest);
    Py_XDECREF(type);
    return plan;
}

static PyObject *plan_force(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("plan_force", nargs, 3)) return NULL;
    PyTypeObject *type = plan_type();
    if (type == NULL) return NULL;
    const bool is_plan = Py_IS_TYPE(args[0], type);
    Py_DECREF(type);
    const char *algorithm = PyUnicode_AsUTF8(args[2]);
    int ndim;
    npy_intp shape[CBN_MAX_DIMS];
    if (algorithm == NULL || !cbn_shape_parse(args[1], "input_shape", &ndim, shape)) return NULL;
    if (!is_plan) {
        PyErr_SetString(PyExc_TypeError, "plan: expected a Plan");
        return NULL;
    }
    if (!cbn_plan_fix((cbn_plan_object *)args[0], ndim, shape, algorithm)) return NULL;
    Py_RETURN_NONE;
}

PyMethodDef cbn_testing_methods[] = {
    {"kernel_names", kernel_names, METH_NOARGS, PyDoc_STR("Names of the kernel families.")},
    {"isas", isas, METH_NOARGS, PyDoc_STR("Kernel tables this (masked) CPU can run, best first.")},
    {"active_isa", active_isa, METH_NOARGS, PyDoc_STR("The table new plans use.")},
    {"alloc_fail_after", alloc_fail_after, METH_O,
     PyDoc_STR("The n-th allocation from now on fails once (0: the next one); n < 0: off.")},
    {"alloc_reset_peak", alloc_reset_peak, METH_NOARGS, NULL},
    {"scratch_trim", scratch_trim, METH_NOARGS, PyDoc_STR("Frees the kept scratch blocks.")},
    {"plan_with_isa", (PyCFunction)(void (*)(void))plan_with_isa, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("plan_with_isa(isa, *args, **kwargs): Plan(*args, **kwargs) on that kernel table.")},
    {"plan_force", (PyCFunction)(void (*)(void))plan_force, METH_FASTCALL,
     PyDoc_STR("plan_force(plan, input_shape, algorithm): fixes the algorithm for this shape.")},
    {NULL, NULL, 0, NULL},
};
