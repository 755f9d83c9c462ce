/* SPDX-License-Identifier: BSD-3-Clause */
#include "cpu/cbn_cpu.h"
#include "kernels/cbn_kernels.h"
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) ||                   \
    !defined(__AVX512VL__)
#error "isa_avx512.c must be compiled with its ISA flags (see the ISA table of setup.py)"
#endif
#include "simd/vec_avx512.h"
#define CBN_ISA avx512
#define CBN_ISA_NEEDS CBN_CPU_AVX512
#define TILE_OC_NP 6
#define TILE_OC_NV 4
#define TILE_PX_MR 8
#define TILE_PX_NV 3
#define TILE_TAP_MR 8
#define TILE_TAP_ACC 24
#define TILE_WINO_NP 14
#include "kernels/isa_body.h"
