/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "cpu/cbn_cpu.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

/* Written by the constructor below, before any thread can ask. */
static uint32_t features;
static char complaint[192];
static char name[64];
static cbn_cpu_caches caches;

static const struct {
    const char *name;
    uint32_t masks; /* avx512 code uses AVX2 instructions too */
} mask_names[] = {
    {"avx512", CBN_CPU_AVX512},
    {"avx2", CBN_CPU_AVX2 | CBN_CPU_AVX512},
    {"neon", CBN_CPU_NEON},
};
enum { N_MASK_NAMES = sizeof mask_names / sizeof mask_names[0] };

static uint32_t detect(void) {
#if defined(__x86_64__)
    uint32_t found = 0;
    unsigned a, b, c = 0, d;
    /* The builtin also asks whether the operating system saves the registers. */
    __builtin_cpu_init();
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) {
        found |= CBN_CPU_AVX2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found |= CBN_CPU_AVX512;
    }
    return found;
#elif defined(__aarch64__)
    return CBN_CPU_NEON; /* part of the base architecture */
#else
    return 0;
#endif
}

/* The tile state is large, so a process has to ask for it (Linux 5.16 on); threads made later inherit the permission. */
static bool grant_amx(void) {
#if defined(__x86_64__) && defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    const unsigned bits = 1u << 24 | 1u << 22; /* AMX-TILE, AMX-BF16 */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bits) != bits) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

static uint32_t read_mask(const char *list) {
    uint32_t mask = 0;
    while (list && *list) {
        list += strspn(list, ", \t");
        const size_t len = strcspn(list, ", \t");
        if (len == 0) break;
        int i = 0;
        while (i < N_MASK_NAMES &&
               (strlen(mask_names[i].name) != len || strncmp(mask_names[i].name, list, len) != 0))
            i++;
        if (i < N_MASK_NAMES) mask |= mask_names[i].masks;
        else if (!complaint[0])
            snprintf(complaint, sizeof complaint,
                     "PYCONVBN_DISABLE_CPU: unknown name '%.*s' is ignored; known are avx512, avx2, neon",
                     (int)CBN_MIN(len, (size_t)40), list);
        list += len;
    }
    return mask;
}

static void read_name(void) {
#if defined(__x86_64__)
    unsigned r[12];
    if (__get_cpuid(0x80000002u, &r[0], &r[1], &r[2], &r[3]) &&
        __get_cpuid(0x80000003u, &r[4], &r[5], &r[6], &r[7]) &&
        __get_cpuid(0x80000004u, &r[8], &r[9], &r[10], &r[11])) {
        char brand[sizeof r + 1];
        memcpy(brand, r, sizeof r);
        brand[sizeof r] = 0;
        const char *start = brand + strspn(brand, " ");
        snprintf(name, sizeof name, "%s", start);
        for (size_t n = strlen(name); n > 0 && name[n - 1] == ' '; n--) name[n - 1] = 0;
    }
#endif
    if (!name[0]) {
#if defined(__aarch64__)
        snprintf(name, sizeof name, "aarch64");
#else
        snprintf(name, sizeof name, "unknown");
#endif
    }
}

/* First line of a small file into buf, without its newline; false when there is none. */
static bool read_line(const char *path, char *buf, size_t size) {
    FILE *f = fopen(path, "re");
    if (!f) return false;
    const bool ok = fgets(buf, (int)size, f) != NULL;
    fclose(f);
    if (ok) buf[strcspn(buf, "\n")] = 0;
    return ok;
}

static size_t parse_size(const char *text) {
    char *end;
    const unsigned long n = strtoul(text, &end, 10);
    return *end == 'K' ? n << 10 : *end == 'M' ? n << 20 : n;
}

static size_t sysconf_size(int key) {
    const long n = sysconf(key);
    return n > 0 ? (size_t)n : 0;
}

static void read_caches(void) {
    for (int i = 0; i < 8; i++) {
        char path[96], level[16], type[32], size[32];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
        if (!read_line(path, level, sizeof level)) break;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/type", i);
        if (!read_line(path, type, sizeof type) || type[0] == 'I') continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        if (!read_line(path, size, sizeof size)) continue;
        size_t *const slot = level[0] == '1'   ? &caches.l1d
                             : level[0] == '2' ? &caches.l2
                             : level[0] == '3' ? &caches.l3
                                               : NULL;
        if (slot) *slot = parse_size(size);
    }
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    if (!caches.l1d) caches.l1d = sysconf_size(_SC_LEVEL1_DCACHE_SIZE);
    if (!caches.l2) caches.l2 = sysconf_size(_SC_LEVEL2_CACHE_SIZE);
    if (!caches.l3) caches.l3 = sysconf_size(_SC_LEVEL3_CACHE_SIZE);
#endif
    /* What today's smaller cores have. */
    if (!caches.l1d) caches.l1d = 32u << 10;
    if (!caches.l2) caches.l2 = 512u << 10;
    if (!caches.l3) caches.l3 = 4u << 20;
}

/* Early: other constructors ask for the features. */
__attribute__((constructor(101))) static void look_around(void) {
    features = detect() & ~read_mask(getenv("PYCONVBN_DISABLE_CPU"));
    const char *enable = getenv("PYCONVBN_ENABLE_CPU");
    if (enable && *enable && strcmp(enable, "amx") != 0 && !complaint[0])
        snprintf(complaint, sizeof complaint, "PYCONVBN_ENABLE_CPU: '%.40s' is ignored; known is amx", enable);
    if (enable && strcmp(enable, "amx") == 0 && features & CBN_CPU_AVX512 && grant_amx()) features |= CBN_CPU_AMX;
    read_name();
    read_caches();
}

uint32_t cbn_cpu_features(void) { return features; }
const char *cbn_cpu_mask_complaint(void) { return complaint[0] ? complaint : NULL; }
const char *cbn_cpu_name(void) { return name; }
cbn_cpu_caches cbn_cpu_cache_sizes(void) { return caches; }

/* ---- cores --------------------------------------------------------------------------------- */
enum { WORD_BITS = 8 * sizeof(unsigned long), MASK_WORDS = 8192 / WORD_BITS }; /* cpu_set_t ends at 1024 processors */

static int count_cpus(const unsigned long *mask) {
    int n = 0;
    for (int i = 0; i < MASK_WORDS; i++) n += __builtin_popcountl(mask[i]);
    return n;
}

static int affinity_cores(void) {
    unsigned long mask[MASK_WORDS] = {0};
    const bool told = sched_getaffinity(0, sizeof mask, (cpu_set_t *)mask) == 0;
    return CBN_MAX(told ? count_cpus(mask) : (int)sysconf(_SC_NPROCESSORS_ONLN), 1);
}

bool cbn_cpu_keep_off(int tid, int like, int cpu) {
    unsigned long mask[MASK_WORDS] = {0};
    if (cpu < 0 || cpu >= MASK_WORDS * WORD_BITS) return false;
    if (sched_getaffinity(like, sizeof mask, (cpu_set_t *)mask) != 0) return false;
    mask[cpu / WORD_BITS] &= ~(1ul << cpu % WORD_BITS);
    return count_cpus(mask) > 0 && sched_setaffinity(tid, sizeof mask, (const cpu_set_t *)mask) == 0;
}

/* "<quota> <period>" (v2) or the two v1 files of one control group; 0 when there is no limit. */
static double group_quota(const char *folder, bool v2) {
    char path[512], line[64];
    double quota = 0, period = 0;
    if (v2) {
        snprintf(path, sizeof path, "%s/cpu.max", folder);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%lf %lf", &quota, &period) != 2)
            return 0;
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", folder);
        if (!read_line(path, line, sizeof line)) return 0;
        quota = strtod(line, NULL);
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", folder);
        if (!read_line(path, line, sizeof line)) return 0;
        period = strtod(line, NULL);
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

/* A limit of any ancestor holds too, hence the walk up to the mount point. */
static double tightest_quota(const char *mount, const char *group, bool v2) {
    char folder[448];
    double least = 0;
    snprintf(folder, sizeof folder, "%s%s", mount, strcmp(group, "/") == 0 ? "" : group);
    for (;;) {
        const double q = group_quota(folder, v2);
        if (q > 0 && (least == 0 || q < least)) least = q;
        char *slash = strrchr(folder, '/');
        if (strlen(folder) <= strlen(mount) || !slash) return least;
        *slash = 0;
    }
}

static double cgroup_cores(void) {
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return 0;
    char line[512];
    double least = 0;
    while (fgets(line, sizeof line, f)) {
        /* hierarchy:controllers:path */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        controllers++;
        double q = 0;
        if (!controllers[0]) {
            q = tightest_quota("/sys/fs/cgroup", path, true);
        } else if (strcmp(controllers, "cpu") == 0 || strncmp(controllers, "cpu,", 4) == 0 ||
                   strstr(controllers, ",cpu,") || strcmp(controllers, "cpuacct,cpu") == 0) {
            q = tightest_quota("/sys/fs/cgroup/cpu", path, false);
        }
        if (q > 0 && (least == 0 || q < least)) least = q;
    }
    fclose(f);
    return least;
}

int cbn_cpu_cores(const char **source) {
    const int cores = affinity_cores();
    const double quota = cgroup_cores();
    const bool capped = quota > 0 && quota < (double)cores;
    if (source) *source = capped ? "cgroup quota" : "affinity";
    if (!capped) return cores;
    const int whole = (int)quota;
    return whole + (quota > whole);
}

/* ---- floating-point mode ------------------------------------------------------------------- */
#if defined(__x86_64__)
/* MXCSR: flush to zero, denormals are zero, all exceptions masked, rounding to nearest. */
enum { MXCSR_SET = 0x8000 | 0x0040 | 0x1F80, MXCSR_ROUNDING = 0x6000 };
cbn_fp_state cbn_fp_fast_denormals(void) {
    const unsigned old = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr((old & ~(unsigned)MXCSR_ROUNDING) | MXCSR_SET);
    return old;
}
/* Also drops the exception flags raised meanwhile. */
void cbn_fp_restore(cbn_fp_state s) { __builtin_ia32_ldmxcsr((unsigned)s); }
#elif defined(__aarch64__)
/* FPCR: FZ is bit 24, rounding mode bits 22 and 23. */
cbn_fp_state cbn_fp_fast_denormals(void) {
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    const uint64_t fast = (old & ~((uint64_t)3 << 22)) | (uint64_t)1 << 24;
    __asm__ volatile("msr fpcr, %0" : : "r"(fast) : "memory");
    return old;
}
void cbn_fp_restore(cbn_fp_state s) { __asm__ volatile("msr fpcr, %0" : : "r"(s) : "memory"); }
#else
cbn_fp_state cbn_fp_fast_denormals(void) { return 0; }
void cbn_fp_restore(cbn_fp_state s) { (void)s; }
#endif
