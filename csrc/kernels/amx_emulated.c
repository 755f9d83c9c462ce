/* SPDX-License-Identifier: BSD-3-Clause */
#include "simd/tile_emulated.h"
#define AMX_NAME "amx_emulated"
#define AMX_TABLE cbn_amx_emulated
#include "kernels/amx_tmpl.h"
