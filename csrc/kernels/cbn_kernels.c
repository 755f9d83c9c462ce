/* SPDX-License-Identifier: BSD-3-Clause */
/* Which kernel tables were compiled, which of them this CPU can run, which one is used. */
#include "kernels/cbn_kernels.h"
#include "cpu/cbn_cpu.h"
#include "kernels/cbn_amx.h"

#ifdef CBN_HAVE_AVX512
extern const cbn_kernels cbn_kernels_avx512;
#endif
#ifdef CBN_HAVE_AVX2
extern const cbn_kernels cbn_kernels_avx2;
#endif
#ifdef CBN_HAVE_NEON
extern const cbn_kernels cbn_kernels_neon;
#endif
extern const cbn_kernels cbn_kernels_scalar;

/* The tables with a matrix unit are those without it and one pointer more; filled below. */
static cbn_kernels amx_emulated;
#if defined CBN_HAVE_AMX && defined CBN_HAVE_AVX512
static cbn_kernels amx_table;
#endif

static const cbn_kernels *const compiled[] = {
#if defined CBN_HAVE_AMX && defined CBN_HAVE_AVX512
    &amx_table,
#endif
#ifdef CBN_HAVE_AVX512
    &cbn_kernels_avx512,
#endif
#ifdef CBN_HAVE_AVX2
    &cbn_kernels_avx2,
#endif
#ifdef CBN_HAVE_NEON
    &cbn_kernels_neon,
#endif
    &cbn_kernels_scalar, NULL,
};
enum { COMPILED = sizeof compiled / sizeof compiled[0] - 1 };

static const cbn_kernels *available[COMPILED + 1];

/* When the library is loaded, before any thread can ask: afterwards the array is constant. */
__attribute__((constructor)) static void decide(void) {
    const uint32_t have = cbn_cpu_features();
    int n = 0;
#if defined CBN_HAVE_AMX && defined CBN_HAVE_AVX512
    amx_table = cbn_kernels_avx512;
    amx_table.isa = "amx";
    amx_table.needs |= CBN_CPU_AMX;
    amx_table.amx = &cbn_amx_hardware;
#endif
    for (int i = 0; i < COMPILED; i++)
        if ((compiled[i]->needs & ~have) == 0) available[n++] = compiled[i];
    amx_emulated = *available[0];
    amx_emulated.isa = "amx_emulated";
    amx_emulated.amx = &cbn_amx_emulated;
}

const cbn_kernels *const *cbn_kernels_compiled(void) { return compiled; }
const cbn_kernels *const *cbn_kernels_available(void) { return available; }
const cbn_kernels *cbn_kernels_active(void) { return available[0]; }
const cbn_kernels *cbn_kernels_amx_emulated(void) { return &amx_emulated; }

const char *const *cbn_kernel_names(int *count) {
    static const char *const names[] = {
#define CBN_NAME_(name, sig) #name,
        CBN_KERNEL_LIST(CBN_NAME_)
#undef CBN_NAME_
    };
    *count = (int)(sizeof names / sizeof names[0]);
    return names;
}
