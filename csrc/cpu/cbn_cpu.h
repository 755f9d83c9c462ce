/* SPDX-License-Identifier: BSD-3-Clause */
/* What machine is this: feature bits, cache sizes, usable cores. Decided once, then constant; thread-safe. */
#ifndef CBN_CPU_H
#define CBN_CPU_H
#include "base/cbn_base.h"

/* X(bit name, environment/mask name, __builtin_cpu_supports strings are in cbn_cpu.c) */
#define CBN_CPU_AVX2 (1u << 0)   /* AVX2 + FMA + F16C */
#define CBN_CPU_AVX512 (1u << 1) /* F, BW, DQ, VL */
#define CBN_CPU_NEON (1u << 2)
#define CBN_CPU_AMX (1u << 3) /* TILE, BF16; only with PYCONVBN_ENABLE_CPU=amx, and when the system grants its state */

/* Bits of this CPU (and its operating system), less what PYCONVBN_DISABLE_CPU (comma list of names: avx512, avx2,
 * neon) masks. Masking avx2 masks avx512 too, since the latter's code uses the former. */
uint32_t cbn_cpu_features(void);
/* NULL, or a sentence about an unknown name in PYCONVBN_DISABLE_CPU (the import raises it as a RuntimeWarning). */
const char *cbn_cpu_mask_complaint(void);
const char *cbn_cpu_name(void);

/* Bytes of the caches one core sees; sensible defaults where the system does not tell. Never 0. */
typedef struct cbn_cpu_caches { size_t l1d, l2, l3; } cbn_cpu_caches;
cbn_cpu_caches cbn_cpu_cache_sizes(void);

/* Cores this process may use: affinity mask capped by the cgroup (v1, v2) CPU quota, rounded up, at least 1.
 * *source (may be NULL) becomes "affinity" or "cgroup quota". Read anew at each call. */
int cbn_cpu_cores(const char **source);

/* Confines thread `tid` (0: the calling one) to the processors thread `like` (0) may use, all but `cpu`. False, and
 * nothing done, when none would remain or the system refuses. */
bool cbn_cpu_keep_off(int tid, int like, int cpu);

/* Denormals: sets flush-to-zero and denormals-are-zero, returns the state to restore. */
typedef uint64_t cbn_fp_state;
cbn_fp_state cbn_fp_fast_denormals(void);
void cbn_fp_restore(cbn_fp_state s);
#endif
