/* SPDX-License-Identifier: BSD-3-Clause */
/* The harness behind check.h and its main: [--list] [--bench] [--seed N] [name part ...] */
#define _GNU_SOURCE
#include "base/cbn_alloc.h"
#include "check.h"
#include "threads/cbn_parallel.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SHOWN_FAILURES = 5, SLACK = 256, MAX_BLOCKS = 4096, SLACK_BYTE = 0xA5 };

static check_entry *entries;
static const char *current = "";
static int failures;
static const char *skipped;
static const char *program;
static uint64_t rng;

void check_register(check_entry *e) {
    check_entry **at = &entries;
    while (*at && strcmp((*at)->name, e->name) <= 0) at = &(*at)->next;
    e->next = *at;
    *at = e;
}

static void print_failure(const char *file, int line, const char *fmt, va_list ap) {
    if (++failures > SHOWN_FAILURES) return;
    printf("  %s:%d: %s: ", file, line, current);
    vprintf(fmt, ap);
    printf("\n");
    fflush(stdout);
}

bool check_fail(const char *file, int line, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    print_failure(file, line, fmt, ap);
    va_end(ap);
    return false;
}

int check_failures(void) { return failures; }
void check_skip(const char *reason) { skipped = reason; }

bool check_under(const char *what) {
    const char *under = getenv("CHECK_UNDER");
    return strcmp(under ? under : "", what) == 0;
}
const char *check_program(void) { return program; }

bool check_equal_f32(const float *got, const float *want, size_t n, const char *fmt, ...) {
    for (size_t i = 0; i < n; i++) {
        uint32_t a, b;
        memcpy(&a, &got[i], sizeof a);
        memcpy(&b, &want[i], sizeof b);
        if (a == b || (got[i] != got[i] && want[i] != want[i])) continue;
        char what[256];
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(what, sizeof what, fmt, ap);
        va_end(ap);
        return check_fail(__FILE__, __LINE__, "%s: element %zu of %zu is %.9g (0x%08x), expected %.9g (0x%08x)",
                          what, i, n, (double)got[i], a, (double)want[i], b);
    }
    return true;
}

/* ---- guarded blocks ---------------------------------------------------------------------------------------- */
typedef struct block {
    unsigned char *map, *body, *data; /* body: the accessible pages */
    size_t map_bytes, body_bytes, bytes;
} block;
static block blocks[MAX_BLOCKS];
static size_t nblocks;

static void die(const char *what) {
    printf("  %s: %s\n", current, what);
    exit(2);
}

void *check_guard(size_t bytes, check_side side) {
    if (nblocks == MAX_BLOCKS) die("too many guarded blocks: release some with check_mark/check_release");
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    block *b = &blocks[nblocks];
    b->bytes = bytes;
    b->body_bytes = (bytes + SLACK + page - 1) / page * page;
    b->map_bytes = b->body_bytes + 2 * page;
    void *map = mmap(NULL, b->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) die("mmap failed");
    b->map = map;
    b->body = b->map + page;
    if (mprotect(b->body, b->body_bytes, PROT_READ | PROT_WRITE) != 0) die("mprotect failed");
    memset(b->body, SLACK_BYTE, b->body_bytes);
    b->data = side == CHECK_LEFT ? b->body : b->body + b->body_bytes - bytes;
    memset(b->data, 0xFF, bytes);
    nblocks++;
    return b->data;
}

size_t check_mark(void) { return nblocks; }

void check_release(size_t mark) {
    while (nblocks > mark) {
        const block *b = &blocks[--nblocks];
        for (size_t i = 0; i < b->body_bytes; i++) {
            const unsigned char *p = b->body + i;
            if ((p < b->data || p >= b->data + b->bytes) && *p != SLACK_BYTE) {
                check_fail(__FILE__, __LINE__, "byte %td of a block of %zu bytes was overwritten", p - b->data,
                           b->bytes);
                break;
            }
        }
        munmap(b->map, b->map_bytes);
    }
}

static const uint32_t SENTINEL = 0xFFC0DEADu;
size_t check_live_blocks(void) {
    cbn_alloc_stats s;
    cbn_alloc_get_stats(&s);
    return s.live_blocks;
}

void check_sentinel_fill(float *p, size_t n) {
    for (size_t i = 0; i < n; i++) memcpy(&p[i], &SENTINEL, sizeof SENTINEL);
}
bool check_sentinel_is(float v) { return memcmp(&v, &SENTINEL, sizeof SENTINEL) == 0; }

/* ---- data -------------------------------------------------------------------------------------------------- */
/* splitmix64 (Steele, Lea, Flood 2014): every seed is a good one. */
uint64_t check_rand(void) {
    uint64_t z = (rng += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
int64_t check_range(int64_t lo, int64_t hi) { return lo + (int64_t)(check_rand() % (uint64_t)(hi - lo + 1)); }
void check_fill_int(float *p, size_t n, int lo, int hi) {
    for (size_t i = 0; i < n; i++) p[i] = (float)check_range(lo, hi);
}
void check_fill_uniform(float *p, size_t n, double lo, double hi) {
    for (size_t i = 0; i < n; i++) p[i] = (float)(lo + (hi - lo) * ((double)(check_rand() >> 11) * 0x1p-53));
}

/* ---- instruction sets -------------------------------------------------------------------------------------- */
const cbn_kernels *const *check_tables(void) {
#ifdef CHECK_ALL_COMPILED
    return cbn_kernels_compiled();
#else
    return cbn_kernels_available();
#endif
}
bool check_isa_runs(const char *isa) {
    for (const cbn_kernels *const *t = check_tables(); *t; t++)
        if (strcmp((*t)->isa, isa) == 0) return true;
    return false;
}

/* ---- timing ------------------------------------------------------------------------------------------------ */
double check_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
uint64_t check_ticks(void) {
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
#endif
}
void check_report(const char *what, const char *unit, double value) {
    printf("  %-44s %12.3f %s\n", what, value, unit);
    fflush(stdout);
}

/* ---- main -------------------------------------------------------------------------------------------------- */
static bool wanted(const char *label, int argc, char **argv) {
    bool any = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--seed") == 0) {
            i++;
            continue;
        }
        if (argv[i][0] == '-') continue;
        any = true;
        if (strstr(label, argv[i])) return true;
    }
    return !any;
}

int main(int argc, char **argv) {
    program = argv[0];
    setvbuf(stdout, NULL, _IOLBF, 0); /* nothing buffered that a forked child could print again */
    bool list = false, bench = false;
    uint64_t seed = 20240229;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) list = true;
        else if (strcmp(argv[i], "--bench") == 0) bench = true;
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) seed = strtoull(argv[++i], NULL, 0);
        else if (argv[i][0] == '-') {
            printf("usage: %s [--list] [--bench] [--seed N] [name part ...]\n", argv[0]);
            return 2;
        }
    }
    printf("threads %d complains %d\n", cbn_threads_get(NULL), cbn_threads_complaint() != NULL);
    printf("tables:");
    for (const cbn_kernels *const *t = check_tables(); *t; t++) printf(" %s", (*t)->isa);
    printf("\n");
    int ran = 0, bad = 0, nskipped = 0;
    for (const check_entry *e = entries; e; e = e->next) {
        char label[128];
        snprintf(label, sizeof label, "%s%s%s", e->name, e->isa ? "." : "", e->isa ? e->isa : "");
        if (e->bench != bench || !wanted(label, argc, argv)) continue;
        if (list) {
            printf("%s\n", label);
            continue;
        }
        if (e->isa && !check_isa_runs(e->isa)) {
            printf("SKIP %s: this machine (or the mask) has no %s\n", label, e->isa);
            nskipped++;
            continue;
        }
        current = label;
        failures = 0;
        skipped = NULL;
        rng = seed;
        const double t0 = check_seconds();
        e->fn();
        check_release(0);
        if (skipped) {
            printf("SKIP %s: %s\n", label, skipped);
            nskipped++;
            continue;
        }
        ran++;
        bad += failures > 0;
        printf("%s %s (%.2f s%s", failures ? "FAIL" : "ok  ", label, check_seconds() - t0, failures ? "" : ")\n");
        if (failures) printf(", %d failures)\n", failures);
        fflush(stdout);
    }
    if (list) return 0;
    printf("%d run, %d failed, %d skipped (seed %llu)\n", ran, bad, nskipped, (unsigned long long)seed);
    if (ran == 0) printf("nothing matched\n");
    return bad || ran == 0;
}
