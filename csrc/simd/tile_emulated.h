/* SPDX-License-Identifier: BSD-3-Clause */
/* The tile operations of kernels/amx_tmpl.h in plain C: their specification, and what tests run where there is no such unit. */
#ifndef CBN_TILE_EMULATED_H
#define CBN_TILE_EMULATED_H
#include <math.h>
#include <string.h>
#include "base/cbn_base.h"

typedef struct tile_file {
    unsigned char row[8][16][64];
} tile_file;

CBN_INLINE void tile_load(tile_file *f, int t, const void *p, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy(f->row[t][i], (const char *)p + i * stride, 64);
}

CBN_INLINE void tile_store(const tile_file *f, int t, void *p, int64_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)p + i * stride, f->row[t][i], 64);
}

CBN_INLINE float widened(const unsigned char *p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* As the manual of TDPBF16PS has it: even and odd products in chains of their own, added at the end. */
CBN_INLINE void tile_dp(tile_file *f, int c, int a, int b) {
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 16; n++) {
            float even = 0.0f, odd = 0.0f, sum;
            for (int k = 0; k < 16; k++) {
                even = fmaf(widened(&f->row[a][m][4 * k]), widened(&f->row[b][k][4 * n]), even);
                odd = fmaf(widened(&f->row[a][m][4 * k + 2]), widened(&f->row[b][k][4 * n + 2]), odd);
            }
            memcpy(&sum, &f->row[c][m][4 * n], sizeof sum);
            sum += even + odd;
            memcpy(&f->row[c][m][4 * n], &sum, sizeof sum);
        }
    }
}

#define AMX_DECLARE tile_file tiles
#define AMX_CONFIG() (void)0
#define AMX_RELEASE() (void)0
#define AMX_ZERO(t) memset(tiles.row[t], 0, sizeof tiles.row[t])
#define AMX_LOAD(t, p, stride) tile_load(&tiles, t, p, stride)
#define AMX_STORE(t, p, stride) tile_store(&tiles, t, p, stride)
#define AMX_DP(c, a, b) tile_dp(&tiles, c, a, b)
#endif
