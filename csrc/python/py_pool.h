/* SPDX-License-Identifier: BSD-3-Clause */
/* Arrays for results whose memory is recycled. */
#ifndef CBN_PY_POOL_H
#define CBN_PY_POOL_H
#include "python/py_numpy.h"

/* Smaller arrays are left to NumPy, which the C library serves without new pages. */
enum { CBN_POOL_LEAST_BYTES = 64 << 10 };

/* Makes the allocator that pooled arrays name as theirs. Called once by the module. */
int cbn_pool_init(void);

/* A new C-contiguous plain ndarray that owns its memory. From CBN_POOL_LEAST_BYTES on this is a block of the scratch
 * pool (base/cbn_alloc.h) and goes back there when the array dies: a fresh one would cost a page fault for every 4 KB
 * (1.5 ms for 3 MB), often more than the work itself. NULL with an exception. */
PyArrayObject *cbn_pool_array(int ndim, const npy_intp *shape, int typenum);
#endif
