/* SPDX-License-Identifier: BSD-3-Clause */
/* pool_max and pool_add of every table: guard pages on either side, whole numbers, windows of every shape. */
#include "check.h"
#include <math.h>
#include <string.h>

static float *floats(int64_t n, int side) { return check_guard((size_t)n * sizeof(float), (check_side)side); }

static void check_window(const cbn_kernels *k, const cbn_pool_args *shape, int side) {
    const size_t mark = check_mark();
    cbn_pool_args a = *shape;
    const int64_t span = (a.taps[0] - 1) * a.apart[0] + (a.taps[1] - 1) * a.apart[1];
    const int64_t reach = a.n ? (a.n - 1) * a.step + span + 1 : 0;
    float *x = floats(reach, side), *max = floats(a.n, side), *sum = floats(a.n, side);
    check_fill_int(x, (size_t)reach, -9, 9);
    if (reach > 40) x[7] = NAN, x[20] = -INFINITY, x[33] = INFINITY;
    for (int64_t i = 0; i < a.n; i++) {
        max[i] = -INFINITY;
        sum[i] = 0.0f;
        for (int64_t r = 0; r < a.taps[0]; r++)
            for (int64_t t = 0; t < a.taps[1]; t++) {
                const float v = x[i * a.step + r * a.apart[0] + t * a.apart[1]];
                sum[i] += v;
                if (v != v || v > max[i]) max[i] = v;
            }
    }
    a.x = x;
    a.y = floats(a.n, side);
    k->pool_max(&a);
    check_equal_f32(a.y, max, (size_t)a.n, "pool_max %s n=%lld step=%lld", k->isa, (long long)a.n, (long long)a.step);
    k->pool_add(&a);
    check_equal_f32(a.y, sum, (size_t)a.n, "pool_add %s n=%lld step=%lld", k->isa, (long long)a.n, (long long)a.step);
    check_release(mark);
}

CHECK_TEST(pool_windows) {
    static const int64_t windows[][4] = {/* taps, apart */
                                         {1, 1, 0, 0}, {1, 2, 0, 1}, {1, 3, 0, 1}, {1, 3, 0, 5},   {1, 2, 0, 40},
                                         {1, 7, 0, 2}, {2, 1, 9, 0}, {2, 2, 50, 1}, {3, 3, 60, 7}, {3, 2, 4, 21}};
    for (const cbn_kernels *const *t = check_tables(); *t; t++) {
        const int64_t lanes = (*t)->lanes, sizes[] = {0,         1,             lanes - 1,     lanes, lanes + 1,
                                                      2 * lanes, 2 * lanes + 3, 3 * lanes - 1, 97};
        for (size_t i = 0; i < sizeof windows / sizeof *windows; i++)
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
                for (int64_t step = 1; step <= 4; step++)
                    for (int side = 0; side < 2; side++) {
                        cbn_pool_args a = {.n = sizes[s], .step = step};
                        memcpy(a.taps, windows[i], sizeof a.taps);
                        memcpy(a.apart, windows[i] + 2, sizeof a.apart);
                        check_window(*t, &a, side);
                    }
    }
}
