/* SPDX-License-Identifier: BSD-3-Clause */
/* The matrix G of Winograd's F(m, r): weights of r taps to values at n = m + r - 1 points. The matrices of inputs and
 * outputs are part of the kernels (kernels/wino_tmpl.h); cbn_kernels.h says which points there are. */
#ifndef CBN_WINO_MATRIX_H
#define CBN_WINO_MATRIX_H
#include "base/cbn_base.h"

enum { CBN_WINO_POINTS = 6 };

/* g[i][b], i < n, b < n - m + 1: what tap b adds to the value at point i. n is 1, 4 or 6. */
void cbn_wino_g(int n, int m, double g[CBN_WINO_POINTS][CBN_WINO_POINTS]);
#endif
