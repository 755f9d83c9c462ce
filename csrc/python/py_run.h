/* SPDX-License-Identifier: BSD-3-Clause */
/* Making a plan from Python arrays and running it: shared by the one-call functions and the Plan type. */
#ifndef CBN_PY_RUN_H
#define CBN_PY_RUN_H
#include "python/py_array.h"
#include "python/py_fold.h"
#include "python/py_geometry.h"

/* weight and bias (array may be NULL) of any layout, of one dtype; bn NULL: nothing to fold. The plan owns copies, unless
 * opt->borrow: then *w_kept and *b_kept become new references (b: or NULL) to be kept as long as the plan; else both may be
 * NULL. NULL with an exception. */
cbn_conv_plan *cbn_plan_from_arrays(const cbn_conv_geometry *g, const cbn_array *weight, const cbn_array *bias,
                                    const cbn_bn_arrays *bn, const cbn_plan_options *opt, PyArrayObject **w_kept,
                                    PyArrayObject **b_kept);

/* plan(x): checks shapes, honours out, runs without the GIL. x and residual (array may be NULL) have been
 * opened and are settled here, after the shape checks; x has the plan's dtype. A new reference or NULL with an
 * exception. */
PyObject *cbn_plan_call(cbn_conv_plan *plan, const char *x_name, cbn_array *x, cbn_array *residual,
                        PyObject *out);
#endif
