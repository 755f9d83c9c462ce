/* SPDX-License-Identifier: BSD-3-Clause */
/* Rough clock cycles on one core, for choosing among algorithms. Only ratios matter, and only where algorithms of very
 * different kinds compete: within a few per cent `tune=True` knows better. */
#ifndef CBN_CONV_COST_H
#define CBN_CONV_COST_H
#include "kernels/cbn_kernels.h"
#include "ops/conv_desc.h"

/* Multiply-adds at `share` (0..1) of what two vector FMAs a cycle give. */
CBN_INLINE double cbn_cost_fma(const cbn_kernels *k, double fmas, double share) {
    return fmas / (2.0 * k->lanes * share);
}

/* Multiply-adds of one image that meet the image (padded taps not counted). */
CBN_INLINE double cbn_cost_real_fmas(const cbn_conv_desc *d) {
    return 0.5 * (double)cbn_conv_flops_real(d);
}
#endif
