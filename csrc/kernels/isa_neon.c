/* SPDX-License-Identifier: BSD-3-Clause */
#include "cpu/cbn_cpu.h"
#include "kernels/cbn_kernels.h"
#if !defined(__aarch64__)
#error "isa_neon.c is for 64-bit Arm (see the ISA table of setup.py)"
#endif
#include "simd/vec_neon.h"
#define CBN_ISA neon
#define CBN_ISA_NEEDS CBN_CPU_NEON
#define TILE_OC_NP 6
#define TILE_OC_NV 4
#define TILE_PX_MR 8
#define TILE_PX_NV 3
#define TILE_TAP_MR 8
#define TILE_TAP_ACC 24
#define TILE_WINO_NP 14
#include "kernels/isa_body.h"
