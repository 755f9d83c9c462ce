/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef CBN_PY_HOST_PURE_H
#define CBN_PY_HOST_PURE_H
#include "python/py_graph.h"

/* Does a call of this module write nothing (activations, pooling, padding, dropout of pyconvbn.nn and torch.nn: exact
 * classes,
 * without hooks or a forward of the instance's own, torch's not in place)? -1 with an exception. */
int cbn_py_host_pure(PyObject *module);
#endif
