/* SPDX-License-Identifier: BSD-3-Clause */
/* The vector operations of the depthwise and elementwise kernels, for each CHECK_ISA: masked loads between guard pages,
 * de-interleaving, rounding and scaling. */
#include "check.h"
#include CHECK_VEC_HEADER
#include <math.h>

CHECK_TEST(vf_load_range_touches_its_lanes_only) {
    for (int64_t lo = 0; lo <= VF_LANES; lo++)
        for (int64_t hi = 0; hi <= VF_LANES; hi++) {
            const int64_t n = hi > lo ? hi - lo : 0;
            for (int side = 0; side < 2; side++) {
                const size_t mark = check_mark();
                float *p = check_guard((size_t)n * sizeof *p, (check_side)side), got[VF_LANES], want[VF_LANES];
                check_fill_int(p, (size_t)n, 1, 99);
                vf_store(got, vf_load_range(p - lo, lo, hi));
                for (int64_t i = 0; i < VF_LANES; i++) want[i] = i >= lo && i < hi ? p[i - lo] : 0.0f;
                check_equal_f32(got, want, VF_LANES, "lanes [%d, %d)", (int)lo, (int)hi);
                vf_store(got, vf_load_mask(p - lo, vf_mask(lo, hi)));
                check_equal_f32(got, want, VF_LANES, "mask [%d, %d)", (int)lo, (int)hi);
                check_release(mark);
            }
        }
}

CHECK_TEST(vf_mixed_order_is_undone) {
    float x[2 * VF_LANES], got[VF_LANES], want[VF_LANES];
    check_fill_int(x, 2 * VF_LANES, 1, 999);
    const vf a = vf_load(x), b = vf_load(x + VF_LANES);
    /* One lane: a has the even position, b the odd one. */
    for (int odd = 0; odd < 2; odd++) {
        for (int i = 0; i < VF_LANES; i++) want[i] = x[2 * i + odd];
        vf_store(got, odd ? vf_odd(a, b) : vf_even(a, b));
        check_equal_f32(got, want, VF_LANES, odd ? "odd" : "even");
        vf_store(got, vf_unmix(odd ? vf_odd_mixed(a, b) : vf_even_mixed(a, b)));
        check_equal_f32(got, want, VF_LANES, odd ? "odd mixed" : "even mixed");
    }
    /* The same order for both, so sums of the two can be put right at the end. */
    for (int i = 0; i < VF_LANES; i++) want[i] = x[2 * i] + x[2 * i + 1];
    vf_store(got, vf_unmix(vf_add(vf_even_mixed(a, b), vf_odd_mixed(a, b))));
    check_equal_f32(got, want, VF_LANES, "sum");
}

CHECK_TEST(vf_zip_undoes_even_and_odd) {
    float x[2 * VF_LANES], got[2 * VF_LANES];
    check_fill_int(x, 2 * VF_LANES, 1, 999);
    const vf a = vf_load(x), b = vf_load(x + VF_LANES);
    vf_store(got, vf_zip_lo(vf_even(a, b), vf_odd(a, b)));
    vf_store(got + VF_LANES, vf_zip_hi(vf_even(a, b), vf_odd(a, b)));
    check_equal_f32(got, x, 2 * VF_LANES, "zip");
}

CHECK_TEST(vf_round_and_scale2) {
    for (int n = -126; n <= 127; n++) {
        float got[VF_LANES], want[VF_LANES];
        for (int i = 0; i < VF_LANES; i++) want[i] = ldexpf(1.25f, n);
        vf_store(got, vf_scale2(vf_set1(1.25f), vf_set1((float)n)));
        check_equal_f32(got, want, VF_LANES, "1.25 * 2^%d", n);
    }
    for (float v = -9.0f; v <= 9.0f; v += 0.125f) {
        float got[VF_LANES], want[VF_LANES];
        for (int i = 0; i < VF_LANES; i++) want[i] = rintf(v);
        vf_store(got, vf_add(vf_round(vf_set1(v)), vf_zero())); /* -0 + 0 is 0: its sign is not specified */
        for (int i = 0; i < VF_LANES; i++) want[i] += 0.0f;
        check_equal_f32(got, want, VF_LANES, "round %g", (double)v);
    }
}
