/* SPDX-License-Identifier: BSD-3-Clause */
#include "python/py_run.h"

#include "python/py_error.h"

/* The array itself, or a C-contiguous copy of it: a new reference. */
static PyArrayObject *contiguous(const cbn_array *a) {
    return a->array == NULL ? NULL : (PyArrayObject *)PyArray_FromArray(a->array, NULL, NPY_ARRAY_CARRAY_RO);
}

cbn_conv_plan *cbn_plan_from_arrays(const cbn_conv_geometry *g, const cbn_array *weight, const cbn_array *bias,
                                    const cbn_bn_arrays *bn, const cbn_plan_options *opt, PyArrayObject **w_kept,
                                    PyArrayObject **b_kept) {
    PyArrayObject *w = NULL, *b = NULL;
    assert(!opt->borrow || (w_kept && b_kept));
    cbn_conv_plan *plan = NULL;
    if (bn != NULL) {
        if (!cbn_fold_contiguous(g, weight, bias, bn, &w, &b)) goto done;
    } else {
        w = contiguous(weight);
        b = contiguous(bias);
        if (w == NULL || (bias->array != NULL && b == NULL)) goto done;
    }
    cbn_error err = {0};
    cbn_status status;
    const void *const w_data = PyArray_DATA(w), *const b_data = b ? PyArray_DATA(b) : NULL;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_plan_create(g, w_data, b_data, opt, &plan, &err);
    Py_END_ALLOW_THREADS
    if (status != CBN_OK) {
        plan = NULL;
        cbn_py_raise(status, &err);
    }
    if (opt->borrow && plan != NULL) {
        *w_kept = w;
        *b_kept = b;
        return plan;
    }
done:
    Py_XDECREF(w);
    Py_XDECREF(b);
    return plan;
}

static bool check_residual(const cbn_conv_geometry *g, const cbn_array *residual, int ndim, const npy_intp *shape) {
    if (residual->array == NULL) return true;
    if (residual->dtype != g->dtype) {
        PyErr_Format(PyExc_TypeError, "residual: expected dtype %s, got %s", cbn_dtype_name(g->dtype),
                     cbn_dtype_name(residual->dtype));
        return false;
    }
    if (cbn_array_ndim(residual) == ndim && PyArray_CompareLists(cbn_array_shape(residual), shape, ndim)) return true;
    PyObject *want = PyArray_IntTupleFromIntp(ndim, shape);
    PyObject *got = want ? PyArray_IntTupleFromIntp(cbn_array_ndim(residual), cbn_array_shape(residual)) : NULL;
    if (got != NULL) PyErr_Format(PyExc_ValueError, "residual: expected the output's shape %R, got %R", want, got);
    Py_XDECREF(want);
    Py_XDECREF(got);
    return false;
}

PyObject *cbn_plan_call(cbn_conv_plan *plan, const char *x_name, cbn_array *x, cbn_array *residual,
                        PyObject *out) {
    const cbn_conv_geometry *g = cbn_plan_geometry(plan);
    const npy_intp *x_shape = cbn_array_shape(x);
    cbn_io_shape io;
    int64_t out_spatial[CBN_MAX_SPATIAL];
    npy_intp y_shape[CBN_MAX_DIMS];
    cbn_error err;
    err.message[0] = '\0';
    err.reason = NULL;
    if (!cbn_io_split(g, x_name, cbn_array_ndim(x), x_shape, &io)) return NULL;
    cbn_status status = cbn_plan_output(plan, io.n, io.channels, io.in, out_spatial, &err);
    if (status != CBN_OK) return cbn_py_raise(status, &err);
    cbn_io_output(g, &io, x_shape, out_spatial, y_shape);
    if (!check_residual(g, residual, io.ndim, y_shape)) return NULL;
    if (!cbn_array_settle(x, CBN_LAYOUT_C) || !cbn_array_settle(residual, CBN_LAYOUT_C)) return NULL;

    cbn_output y = {0};
    PyObject *result = NULL;
    if (cbn_output_begin(out, io.ndim, y_shape, g->dtype, (const cbn_array *const[]){x, residual}, 2, &y)) {
        if (io.n > 0) {
            const void *const x_data = cbn_array_data(x), *const r_data = cbn_array_data(residual);
            void *const y_data = cbn_output_data(&y);
            Py_BEGIN_ALLOW_THREADS
            status = cbn_plan_run(plan, x_data, io.n, io.in, r_data, y_data, &err);
            Py_END_ALLOW_THREADS
        }
        result = status == CBN_OK ? cbn_output_finish(&y) : cbn_py_raise(status, &err);
    }
    cbn_output_release(&y);
    return result;
}
