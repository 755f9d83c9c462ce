/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef CBN_PY_PASSES_H
#define CBN_PY_PASSES_H
#include "python/py_numpy.h"

extern PyMethodDef cbn_passes_methods[]; /* pass_efficient, pass_fuse_plan, pass_dce, fold_reasons */
#endif
