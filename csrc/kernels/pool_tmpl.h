/* SPDX-License-Identifier: BSD-3-Clause */
/* Pooling along a line: pool_max, pool_add; contracts in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header.
 * Defines  CBN_FN(pool_max), CBN_FN(pool_add). */

/* x[0], x[step], ... x[(count-1)*step] in the first lanes, count <= VF_LANES. */
CBN_INLINE vf CBN_FN(pool_load)(const float *x, int64_t step, int64_t count) {
    float lane[VF_LANES] = {0};
    if (step == 1) return count == VF_LANES ? vf_load(x) : vf_load_n(x, count);
    for (int64_t l = 0; l < count; l++) lane[l] = x[l * step];
    return vf_load(lane);
}

/* One vector of results, `count` of them wanted. even: x is read up to x[2*VF_LANES - 1]. */
CBN_INLINE vf CBN_FN(pool_vector)(const bool max, const bool even, const int64_t rows, const int64_t taps,
                                  int64_t step, int64_t count, const float *x, const cbn_pool_args *a) {
    vf s = vf_zero();
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t t = 0; t < taps; t++) {
            const float *at = x + r * a->apart[0] + t * a->apart[1];
            const vf v = even ? vf_even_mixed(vf_load(at), vf_load(at + VF_LANES)) : CBN_FN(pool_load)(at, step, count);
            if (r + t == 0) s = v;
            else s = max ? vf_if_nan(s, s, vf_max(s, v)) : vf_add(s, v);
        }
    }
    return even ? vf_unmix(s) : s;
}

/* step: 1, 2, or 0 for any other. */
CBN_INLINE void CBN_FN(pool_line)(const bool max, const int64_t step, const int64_t rows, const int64_t taps,
                                  const cbn_pool_args *a) {
    const int64_t any = step ? step : a->step;
    const float *x = a->x;
    float *y = a->y;
    int64_t left = a->n;
    /* The gap after the last result may not be read. */
    for (; left >= VF_LANES + (step == 2); left -= VF_LANES, x += any * VF_LANES, y += VF_LANES)
        vf_store(y, CBN_FN(pool_vector)(max, step == 2, rows, taps, any, VF_LANES, x, a));
    if (left > 0) vf_store_n(y, CBN_FN(pool_vector)(max, false, rows, taps, any, left, x, a), left);
}

/* Small windows with all their loads unrolled. */
CBN_INLINE void CBN_FN(pool_steps)(const bool max, const int64_t step, const cbn_pool_args *a) {
    if (a->taps[0] == 1 && a->taps[1] == 2) CBN_FN(pool_line)(max, step, 1, 2, a);
    else if (a->taps[0] == 1 && a->taps[1] == 3) CBN_FN(pool_line)(max, step, 1, 3, a);
    else CBN_FN(pool_line)(max, step, a->taps[0], a->taps[1], a);
}

CBN_INLINE void CBN_FN(pool_any)(const bool max, const cbn_pool_args *a) {
    assert(a->n >= 0 && a->step >= 1 && a->taps[0] >= 1 && a->taps[1] >= 1);
    if (a->step == 1) CBN_FN(pool_steps)(max, 1, a);
    else if (a->step == 2) CBN_FN(pool_steps)(max, 2, a);
    else CBN_FN(pool_steps)(max, 0, a);
}

static void CBN_FN(pool_max)(const cbn_pool_args *a) { CBN_FN(pool_any)(true, a); }
static void CBN_FN(pool_add)(const cbn_pool_args *a) { CBN_FN(pool_any)(false, a); }
