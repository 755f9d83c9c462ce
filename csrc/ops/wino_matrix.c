/* SPDX-License-Identifier: BSD-3-Clause */
#include "ops/wino_matrix.h"

void cbn_wino_g(int n, int m, double g[CBN_WINO_POINTS][CBN_WINO_POINTS]) {
    static const double points4[] = {0, 1, -1}, points6[] = {0, 5 / 8.0, -5 / 8.0, 3 / 2.0, -3 / 2.0};
    assert(n == 1 || n == 4 || n == 6);
    const double *p = n == 4 ? points4 : points6;
    const int r = n - m + 1;
    for (int i = 0; i < n - 1; i++) {
        double power = 1.0;
        for (int j = 0; j < n - 1; j++)
            if (j != i) power /= p[i] - p[j];
        for (int b = 0; b < r; b++, power *= p[i]) g[i][b] = power;
    }
    /* The point at infinity sees the last tap alone. With one point this is all there is. */
    for (int b = 0; b < r; b++) g[n - 1][b] = b == r - 1 ? 1.0 : 0.0;
}
