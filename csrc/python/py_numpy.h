/* SPDX-License-Identifier: BSD-3-Clause */
/* The one way into Python.h and the NumPy C API. Include first. module.c defines CBN_IMPORT_ARRAY before it. */
#ifndef CBN_PY_NUMPY_H
#define CBN_PY_NUMPY_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL cbn_array_api
#ifndef CBN_IMPORT_ARRAY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>
#endif
