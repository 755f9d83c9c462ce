/* SPDX-License-Identifier: BSD-3-Clause */
/* Packing weights: rows become lanes. */
#ifndef CBN_CONV_PACK_H
#define CBN_CONV_PACK_H
#include "base/cbn_base.h"

/* Blocks of `lanes` output channels: w[group][channel][k] becomes out[group][block][k][lane], k < count, with zeros in the
 * lanes beyond a group's last channel. Several threads share the work. */
void cbn_pack_blocks(float *out, int64_t lanes, const float *w, int64_t groups, int64_t channels, int64_t count);
/* One block: out[k][lane] = rows[lane * row_step + k] for lane < valid. */
void cbn_pack_rows(float *CBN_RESTRICT out, int64_t lanes, const float *CBN_RESTRICT rows, int64_t row_step,
                   int64_t valid, int64_t count);
#endif
