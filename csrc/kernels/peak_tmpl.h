/* SPDX-License-Identifier: BSD-3-Clause */
/* fma_peak: what the machine can do at best, for "share of the peak". Needs CBN_FN and the vec
 * header. Registers: PEAK_ACC + 2; twelve chains cover latency 4 times two units on every CPU we
 * know. */
enum { PEAK_ACC = 12 };

static void CBN_FN(fma_peak)(int64_t iters, double *flops, float *sink) {
    vf acc[PEAK_ACC];
    CBN_UNROLL for (int i = 0; i < PEAK_ACC; i++) acc[i] = vf_set1((float)i);
    const vf m = vf_pin(vf_set1(0.999f)),
             c = vf_pin(vf_set1(0.5f)); /* stays near 500, no denormals */
    for (int64_t n = 0; n < iters; n++) {
        CBN_UNROLL for (int r = 0; r < 4; r++) {
            CBN_UNROLL for (int i = 0; i < PEAK_ACC; i++) acc[i] = vf_fma(acc[i], m, c);
        }
    }
    vf sum = vf_zero();
    CBN_UNROLL for (int i = 0; i < PEAK_ACC; i++) sum = vf_add(sum, acc[i]);
    float out[VF_LANES];
    vf_store(out, sum);
    *sink = out[0];
    *flops = 2.0 * 4.0 * PEAK_ACC * VF_LANES * (double)iters;
}
