/* SPDX-License-Identifier: BSD-3-Clause */
#include "cpu/cbn_cpu.h"
#include "kernels/cbn_kernels.h"
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "isa_avx2.c must be compiled with its ISA flags (see the ISA table of setup.py)"
#endif
#include "simd/vec_avx2.h"
#define CBN_ISA avx2
#define CBN_ISA_NEEDS CBN_CPU_AVX2
#define TILE_OC_NP 6
#define TILE_OC_NV 2
#define TILE_PX_MR 6
#define TILE_PX_NV 2
#define TILE_TAP_MR 4
#define TILE_TAP_ACC 12
#define TILE_WINO_NP 6
#include "kernels/isa_body.h"
