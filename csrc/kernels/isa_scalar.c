/* SPDX-License-Identifier: BSD-3-Clause */
#include "cpu/cbn_cpu.h"
#include "kernels/cbn_kernels.h"
#include "simd/vec_scalar.h"
#define CBN_ISA scalar
#define CBN_ISA_NEEDS 0
#define TILE_OC_NP 4
#define TILE_OC_NV 4
#define TILE_PX_MR 4
#define TILE_PX_NV 4
#define TILE_TAP_MR 4
#define TILE_TAP_ACC 12
#define TILE_WINO_NP 4
#include "kernels/isa_body.h"
