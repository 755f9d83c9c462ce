/* SPDX-License-Identifier: BSD-3-Clause */
/* The functions of cbn_amx.h over six tile operations.
 *
 * Needs    AMX_NAME: "amx" or "amx_emulated"; AMX_TABLE: the name of the table; the tile operations, whose tile numbers are
 *          constants below 8:
 *              AMX_CONFIG()  AMX_RELEASE()  AMX_DECLARE (local state of a call, may be empty)
 *              AMX_ZERO(t)  AMX_LOAD(t, address, bytes between rows)  AMX_STORE(t, address, bytes between rows)
 *              AMX_DP(c, a, b): c[m][n] += sum over k < 16 of a[m][2k]*b[k][2n] + a[m][2k+1]*b[k][2n+1]
 * Defines  AMX_TABLE.
 * Tiles: 0-3 sums, 4 5 weights, 6 7 pixels. */
#include <string.h>
#include "kernels/cbn_amx.h"

static void amx_begin(void) { AMX_CONFIG(); }
static void amx_end(void) { AMX_RELEASE(); }

#define AMX_W_(term)                                                                     \
    AMX_LOAD(4, w + (term) * CBN_AMX_BLOCK * CBN_AMX_DEPTH, 64);                         \
    AMX_LOAD(5, w + ((term) * CBN_AMX_BLOCK + CBN_AMX_SIDE) * CBN_AMX_DEPTH, 64)
#define AMX_X_(term)                                  \
    AMX_LOAD(6, x + (term) * a->x_term, pitch);       \
    AMX_LOAD(7, x + (term) * a->x_term + CBN_AMX_SIDE, pitch)
#define AMX_PRODUCTS_ \
    AMX_DP(0, 4, 6);  \
    AMX_DP(1, 4, 7);  \
    AMX_DP(2, 5, 6);  \
    AMX_DP(3, 5, 7)

static void amx_tile(const cbn_amx_args *a) {
    AMX_DECLARE;
    const int64_t pitch = a->x_pair * (int64_t)sizeof(uint32_t);
    AMX_ZERO(0);
    AMX_ZERO(1);
    AMX_ZERO(2);
    AMX_ZERO(3);
    for (int64_t s = 0; s < a->steps; s++) {
        const uint16_t *w = a->w + a->w_at[s];
        const uint32_t *x = a->x + a->x_at[s];
        AMX_W_(2);
        AMX_X_(0);
        AMX_PRODUCTS_;
        AMX_W_(1);
        AMX_PRODUCTS_;
        AMX_X_(1);
        AMX_PRODUCTS_;
        AMX_W_(0);
        AMX_PRODUCTS_;
        AMX_X_(2);
        AMX_PRODUCTS_;
        AMX_X_(0);
        AMX_PRODUCTS_;
    }
    const int64_t row = CBN_AMX_BLOCK * (int64_t)sizeof(float);
    AMX_STORE(0, a->sums, row);
    AMX_STORE(1, a->sums + CBN_AMX_SIDE, row);
    AMX_STORE(2, a->sums + CBN_AMX_SIDE * CBN_AMX_BLOCK, row);
    AMX_STORE(3, a->sums + CBN_AMX_SIDE * CBN_AMX_BLOCK + CBN_AMX_SIDE, row);
}

/* Nearest bfloat16, ties to even, as the upper half of a float32; a finite number stays finite. */
CBN_INLINE uint32_t amx_round(uint32_t bits) {
    const uint32_t infinite = 0x7f800000u;
    uint32_t r = bits + 0x7fffu + (bits >> 16 & 1u);
    r = (r & infinite) == infinite ? bits : r; /* too large, infinite or NaN: cut */
    return r & 0xffff0000u;
}

CBN_INLINE void amx_terms(float value, uint32_t t[CBN_AMX_TERMS]) {
    uint32_t bits;
    float part;
    memcpy(&bits, &value, sizeof bits);
    /* A NaN whose payload is in the lower half would become infinite. */
    t[0] = amx_round(bits) | (value != value ? 0x00400000u : 0u);
    for (int i = 1; i < CBN_AMX_TERMS; i++) {
        memcpy(&part, &t[i - 1], sizeof part);
        value -= part;
        memcpy(&bits, &value, sizeof bits);
        t[i] = value - value == 0.0f ? amx_round(bits) : 0u;
    }
}

static void amx_split(uint32_t *p, int64_t term, const float *even, const float *odd, int64_t step, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t e[CBN_AMX_TERMS], o[CBN_AMX_TERMS] = {0};
        amx_terms(even[i * step], e);
        if (odd) amx_terms(odd[i * step], o);
        for (int t = 0; t < CBN_AMX_TERMS; t++) p[t * term + i] = e[t] >> 16 | o[t];
    }
}

static void amx_split_one(uint16_t *p, int64_t term, float value) {
    uint32_t t[CBN_AMX_TERMS];
    amx_terms(value, t);
    for (int i = 0; i < CBN_AMX_TERMS; i++) p[i * term] = (uint16_t)(t[i] >> 16);
}

const cbn_amx AMX_TABLE = {AMX_NAME, amx_begin, amx_end, amx_tile, amx_split, amx_split_one};
