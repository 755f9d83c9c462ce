/* SPDX-License-Identifier: BSD-3-Clause */
/* Older versions of clang spell these names without the second underscore. */
#if !(defined(__AMX_TILE__) || defined(__AMXTILE__)) || !(defined(__AMX_BF16__) || defined(__AMXBF16__))
#error "isa_amx.c must be compiled with its ISA flags (see the ISA table of setup.py)"
#endif
#include "simd/tile_amx.h"
#define AMX_NAME "amx"
#define AMX_TABLE cbn_amx_hardware
#include "kernels/amx_tmpl.h"
