/* SPDX-License-Identifier: BSD-3-Clause */
/* BatchNorm parameters from Python, and folding them into C-contiguous weights for the fused operators. */
#ifndef CBN_PY_FOLD_H
#define CBN_PY_FOLD_H
#include "python/py_array.h"

#include "ops/conv_desc.h"

/* Names of the five parameters in messages. */
typedef struct cbn_bn_names { const char *weight, *bias, *mean, *var, *eps; } cbn_bn_names;
extern const cbn_bn_names cbn_bn_attribute_names; /* bn.weight, bn.bias, bn.running_mean, ... */

/* Zero-initialise; release always. `bn` describes the arrays for ops/. */
typedef struct cbn_bn_arrays {
    cbn_array weight, bias, mean, var;
    cbn_bn bn;
    const cbn_bn_names *names;
} cbn_bn_arrays;

/* weight and bias may be None. A statistic that is None: FoldError NO_RUNNING_STATS. */
CBN_NODISCARD bool cbn_bn_get(PyObject *weight, PyObject *bias, PyObject *mean, PyObject *var, PyObject *eps,
                              const cbn_bn_names *names, cbn_bn_arrays *out);
/* From a module, BatchNormParams or 5-tuple. A module in training mode: FoldError BN_TRAINING. */
CBN_NODISCARD bool cbn_bn_get_object(PyObject *obj, cbn_bn_arrays *out);
void cbn_bn_release(cbn_bn_arrays *a);

/* W' and b' of weight, bias (array may be NULL) and bn for this geometry, as new C-contiguous ndarrays. */
CBN_NODISCARD bool cbn_fold_contiguous(const cbn_conv_geometry *g, const cbn_array *weight, const cbn_array *bias,
                                       const cbn_bn_arrays *bn, PyArrayObject **w_out, PyArrayObject **b_out);
#endif
