/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef CBN_PY_HOST_PURE_H
#define CBN_PY_HOST_PURE_H
#include "python/py_graph.h"

/* Do the modules of this exact class write nothing when they are called (activations, pooling, padding, dropout of pyconvbn.nn
 * and torch.nn)? 1, 0, or -1 with an exception. *torch: the class is torch's, whose modules may work in place. */
int cbn_py_class_pure(PyTypeObject *type, bool *torch);
#endif
