/* SPDX-License-Identifier: BSD-3-Clause */
/* The method tables that module.c joins into _core and _core._testing. Each ends with an all-zero row. */
#ifndef CBN_PY_MODULE_H
#define CBN_PY_MODULE_H
#include "python/py_numpy.h"

extern PyMethodDef cbn_conv_methods[];   /* py_conv.c: conv, conv_transpose, linear, conv_bn */
extern PyMethodDef cbn_fold_methods[];   /* py_fold.c */
extern PyMethodDef cbn_config_methods[]; /* py_config.c */
extern PyMethodDef cbn_nnops_methods[];  /* py_nnops.c: batch_norm, unary, binary, softmax, pooling, pad */
extern PyMethodDef cbn_match_methods[];  /* py_match.c */

/* _core._testing */
extern PyMethodDef cbn_testing_methods[];      /* py_testing.c */
extern PyMethodDef cbn_testing_conv_methods[]; /* py_testing_conv.c: the convolution kernels of each ISA */
extern PyMethodDef cbn_testing_phases_methods[]; /* py_testing_phases.c: panel_pack, interleave of each ISA */
extern PyMethodDef cbn_testing_linear_methods[]; /* py_testing_linear.c: linear of each ISA */
extern PyMethodDef cbn_testing_tap_methods[];  /* py_testing_tap.c: conv_tap and rows_copy of each ISA */
extern PyMethodDef cbn_testing_vec_methods[];  /* py_testing_vec.c: the elementwise kernels of each ISA */
extern PyMethodDef cbn_testing_wino_methods[]; /* py_testing_wino.c: the Winograd kernels of each ISA */

extern PyType_Spec cbn_plan_spec; /* py_plan.c */
#endif
