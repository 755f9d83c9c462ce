/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef CBN_PY_PASSES_H
#define CBN_PY_PASSES_H
#include "python/py_numpy.h"

#include "graph/fold_report.h"

extern PyMethodDef cbn_passes_methods[]; /* pass_efficient, pass_fuse_plan, pass_dce, fold_reasons */
extern PyMethodDef cbn_pass_fold_layers_methods[]; /* pass_fold_layers, pass_binary_modules */
extern PyMethodDef cbn_freeze_methods[]; /* freeze_reasons, freeze_steps */
extern PyMethodDef cbn_pass_params_methods[]; /* pass_view_to_reshape, pass_params */
extern PyMethodDef cbn_pass_constant_fold_methods[];
extern PyMethodDef cbn_pass_cse_methods[];
extern PyMethodDef cbn_pass_matmul_methods[]; /* pass_concat_matmul */
extern PyMethodDef cbn_pass_layout_methods[]; /* pass_weight_layout, pass_input_layout, pass_output_layout */
/* cbn_pass_host.finite. */
cbn_status cbn_py_coefficients_finite(const cbn_host bn[4], double eps, cbn_host weight, bool *out, cbn_error *err);
/* The rows of a FoldReport as a list of tuples, a new reference. */
PyObject *cbn_py_fold_rows(const cbn_graph *g, const cbn_fold_report *report);
extern PyMethodDef cbn_pass_plans_methods[];
extern PyMethodDef cbn_constants_methods[]; /* constant_names, constants_unused */
extern PyMethodDef cbn_lower_methods[]; /* lower_layer */
int cbn_py_constants_init(PyObject *module); /* class ConstantStore */
#endif
