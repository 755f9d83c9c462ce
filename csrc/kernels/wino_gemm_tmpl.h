/* SPDX-License-Identifier: BSD-3-Clause */
/* wino_gemm: tiles of the image by output channels, one point of a Winograd transform; contract in cbn_kernels.h.
 *
 * Needs    CBN_FN, the vec header, TILE_WINO_NP: most tiles of the image summed at a time.
 * Defines  CBN_FN(wino_gemm) and one instance for each (np, nv) up to (TILE_WINO_NP, 2).
 * Vector registers: np*nv sums + nv weights + 1 broadcast. */

enum {
    CBN_FN(WG_NV) = 2,
    /* How far ahead weights are fetched, in floats. A shorter distance disturbs the hardware's own fetching. */
    CBN_FN(WG_AHEAD) = 2048,
    /* Sums of so few channels begin with an unrolled run of their own, which takes up to an eighth less time. */
    CBN_FN(WG_SHORT) = 32,
    /* Channels of an unrolled run: all of a block, but no more code than the caches of decoded instructions hold. */
    CBN_FN(WG_RUN) = VF_LANES < 8 ? VF_LANES : TILE_WINO_NP > 8 ? 4 : 8
};

/* Touches the cache lines that start among n floats from `at` on, at a distance. */
CBN_INLINE void CBN_FN(wg_fetch)(const float *u, const int at, const int n) {
    CBN_UNROLL for (int f = at; f < at + n; f++)
        if (f % (CBN_CACHE_LINE / 4) == 0) __builtin_prefetch(u + f + CBN_FN(WG_AHEAD), 0, 3);
}

/* WG_RUN channels of np tiles; the first ones of a sum need no sums that are zero. */
CBN_INLINE void CBN_FN(wg_run)(const int np, const int nv, const bool first, const float *v, const float *u, vf *acc) {
    CBN_UNROLL for (int k = 0; k < CBN_FN(WG_RUN); k++) {
        CBN_FN(wg_fetch)(u, k * nv * VF_LANES, nv * VF_LANES);
        vf uv[CBN_FN(WG_NV)];
        CBN_UNROLL for (int j = 0; j < nv; j++) uv[j] = vf_pin(vf_load(u + (k * nv + j) * VF_LANES));
        CBN_UNROLL for (int t = 0; t < np; t++) {
            const vf s = vf_pin(vf_set1(v[t * VF_LANES + k]));
            CBN_UNROLL for (int j = 0; j < nv; j++) {
                vf *sum = &acc[t * nv + j];
                *sum = first && k == 0 ? vf_mul(s, uv[j]) : vf_fma(s, uv[j], *sum);
            }
            vf_keep(s);
        }
        CBN_UNROLL for (int j = 0; j < nv; j++) vf_keep(uv[j]);
    }
}

/* Groups of np tiles each, `count` of them from tile `first` on. */
CBN_INLINE void CBN_FN(wg_tiles)(const int np, const int nv, const cbn_wino_gemm_args *a, int64_t first,
                                 int64_t count) {
    const int run = CBN_FN(WG_RUN), u_run = run * nv * VF_LANES;
    const int64_t v_b = a->v_b, m_t = a->m_t, m_v = a->m_v, chunk = a->chunk / VF_LANES, nb = a->nk / VF_LANES;
    const float *v0 = a->v + first * VF_LANES;
    float *m0 = a->m + first * m_t;
    for (; count > 0; count--, v0 += np * VF_LANES, m0 += np * m_t) {
        const float *v = v0, *u = a->u;
        bool add = a->add;
        for (int64_t left = nb; left > 0; left -= chunk, add = true) {
            vf acc[TILE_WINO_NP * CBN_FN(WG_NV)];
            int64_t b = CBN_MIN(left, chunk);
            if (nb * VF_LANES <= CBN_FN(WG_SHORT)) {
                CBN_FN(wg_run)(np, nv, true, v, u, acc);
                u += u_run;
                for (int r = run; r < VF_LANES; r += run, u += u_run) CBN_FN(wg_run)(np, nv, false, v + r, u, acc);
                v += v_b;
                b--;
            } else {
                CBN_UNROLL for (int i = 0; i < np * nv; i++) acc[i] = vf_zero();
            }
            for (; b > 0; b--, v += v_b)
                for (int r = 0; r < VF_LANES; r += run, u += u_run) CBN_FN(wg_run)(np, nv, false, v + r, u, acc);
            float *m = m0;
            if (add) {
                CBN_UNROLL for (int t = 0; t < np; t++, m += m_t) {
                    CBN_UNROLL for (int j = 0; j < nv; j++)
                        vf_store(m + j * m_v, vf_add(vf_load(m + j * m_v), acc[t * nv + j]));
                }
            } else {
                CBN_UNROLL for (int t = 0; t < np; t++, m += m_t) {
                    CBN_UNROLL for (int j = 0; j < nv; j++) vf_store(m + j * m_v, acc[t * nv + j]);
                }
            }
        }
    }
}

/* Instances. The list stops at the tile size of the ISA. */
#define WG_INSTANCE_(np)                                                                                  \
    static void CBN_FN(CBN_CAT(wg_##np, x1))(const cbn_wino_gemm_args *a, int64_t first, int64_t count) { \
        CBN_FN(wg_tiles)(np, 1, a, first, count);                                                         \
    }                                                                                                     \
    static void CBN_FN(CBN_CAT(wg_##np, x2))(const cbn_wino_gemm_args *a, int64_t first, int64_t count) { \
        CBN_FN(wg_tiles)(np, 2, a, first, count);                                                         \
    }
#define WG_NAMES_(np) {CBN_FN(CBN_CAT(wg_##np, x1)), CBN_FN(CBN_CAT(wg_##np, x2))},
#define WG_FOR_4_(X) X(1) X(2) X(3) X(4)
#define WG_FOR_6_(X) WG_FOR_4_(X) X(5) X(6)
#define WG_FOR_14_(X) WG_FOR_6_(X) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#if TILE_WINO_NP == 4
#define WG_FOR_TILES_(X) WG_FOR_4_(X)
#elif TILE_WINO_NP == 6
#define WG_FOR_TILES_(X) WG_FOR_6_(X)
#elif TILE_WINO_NP == 14
#define WG_FOR_TILES_(X) WG_FOR_14_(X)
#else
#error "add a list for this TILE_WINO_NP"
#endif
WG_FOR_TILES_(WG_INSTANCE_)

static void CBN_FN(wino_gemm)(int np, int nv, const cbn_wino_gemm_args *a) {
    static void (*const tiles[TILE_WINO_NP][CBN_FN(WG_NV)])(const cbn_wino_gemm_args *, int64_t, int64_t) = {
        WG_FOR_TILES_(WG_NAMES_)};
    assert(np >= 1 && 1 <= nv && nv <= CBN_FN(WG_NV));
    assert(a->nk > 0 && a->nk % VF_LANES == 0 && a->chunk > 0 && a->chunk % VF_LANES == 0);
    /* Groups as equal as can be: few sums at a time wait for each other. */
    const unsigned groups = ((unsigned)np + TILE_WINO_NP - 1) / TILE_WINO_NP, most = (np + groups - 1) / groups;
    const unsigned smaller = groups * most - np, larger = groups - smaller;
    tiles[most - 1][nv - 1](a, 0, larger);
    if (smaller > 0) tiles[most - 2][nv - 1](a, (int64_t)larger * most, smaller);
}
