/* SPDX-License-Identifier: BSD-3-Clause */
/* The tile operations of kernels/amx_tmpl.h as AMX instructions. Tile numbers are constants. */
#ifndef CBN_TILE_AMX_H
#define CBN_TILE_AMX_H
#include <immintrin.h>
#include "base/cbn_base.h"

/* Palette 1: eight tiles of 16 rows of 64 bytes. */
typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_config;

CBN_INLINE void tiles_configure(void) {
    tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.bytes[i] = 64;
        c.rows[i] = 16;
    }
    _tile_loadconfig(&c);
}

#define AMX_DECLARE (void)0
#define AMX_CONFIG() tiles_configure()
#define AMX_RELEASE() _tile_release()
#define AMX_ZERO(t) _tile_zero(t)
#define AMX_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define AMX_STORE(t, p, stride) _tile_stored(t, p, stride)
#define AMX_DP(c, a, b) _tile_dpbf16ps(c, a, b)
#endif
