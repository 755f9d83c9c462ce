/* SPDX-License-Identifier: BSD-3-Clause */
/* Included last by each isa_*.c: instantiates every template and emits the one table of that ISA.
 * Needs: the vec header, CBN_ISA, CBN_ISA_NEEDS (CPU feature bits), TILE_OC_NP, TILE_OC_NV,
 *     TILE_PX_MR, TILE_PX_NV, TILE_TAP_MR, TILE_TAP_ACC, TILE_WINO_NP. */
#define CBN_FN(name) CBN_CAT(name, CBN_ISA)

#include "kernels/conv_oc_tmpl.h"
#include "kernels/conv_px_tmpl.h"
#include "kernels/conv_tap_tmpl.h"
#include "kernels/conv_dw_tmpl.h"
#include "kernels/linear_tmpl.h"
#include "kernels/linear_raw_tmpl.h"
#include "kernels/wino_tmpl.h"
#include "kernels/wino_gemm_tmpl.h"
#include "kernels/wino_lanes_tmpl.h"
#include "kernels/wino_weights_tmpl.h"
#include "kernels/conv_px2_tmpl.h"
#include "kernels/phases_tmpl.h"
#include "kernels/vec_tmpl.h"
#include "kernels/pool_tmpl.h"
#include "kernels/peak_tmpl.h"

extern const cbn_kernels CBN_CAT(cbn_kernels, CBN_ISA);
const cbn_kernels CBN_CAT(cbn_kernels, CBN_ISA) = {.isa = CBN_STR(CBN_ISA),
                                                   .needs = CBN_ISA_NEEDS,
                                                   .lanes = VF_LANES,
                                                   .oc_np = TILE_OC_NP,
                                                   .oc_nv = TILE_OC_NV,
                                                   .px_mr = TILE_PX_MR,
                                                   .px_nv = TILE_PX_NV,
                                                   .tap_mr = TILE_TAP_MR,
                                                   .tap_acc = TILE_TAP_ACC,
                                                   .wino_np = TILE_WINO_NP,
#define CBN_INIT_(name, sig) .name = CBN_FN(name),
                                                   CBN_KERNEL_LIST(CBN_INIT_)
#undef CBN_INIT_
};
