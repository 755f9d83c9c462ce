/* SPDX-License-Identifier: BSD-3-Clause */
/* Small harness of the C checks. A file tests/c/check_<topic>.c holds
 *
 *     #include "check.h"
 *     CHECK_TEST(conv_px_sizes) { ... CHECK_MSG(a == b, "np=%d: %g != %g", np, a, b); }
 *     CHECK_BENCH(conv_px) { ... check_report("conv_px", "flop/cycle", value); }
 *
 * and is found by the driver (test_c_checks.py); nothing has to be listed. All of csrc but python/ is linked.
 * Check what each table does with   for (const cbn_kernels *const *t = check_tables(); *t; t++).
 *
 * A file whose text mentions CHECK_ISA is compiled once for each instruction set, with that set's compiler flags and
 *     CHECK_ISA         the bare name: scalar, avx2, avx512, neon (CBN_STR(CHECK_ISA) is the string)
 *     CHECK_VEC_HEADER  "simd/vec_<isa>.h"
 * defined, so the file writes `#include CHECK_VEC_HEADER`; its tests are named <test>.<isa> and are skipped, with a
 * line that says so, where the machine cannot run that instruction set. */
#ifndef CHECK_H
#define CHECK_H
#include "base/cbn_base.h"
#include "kernels/cbn_kernels.h"

/* ---- registering ------------------------------------------------------------------------------------------- */
typedef struct check_entry {
    const char *name;
    const char *isa; /* NULL: needs no particular instruction set */
    bool bench;
    void (*fn)(void);
    struct check_entry *next;
} check_entry;
void check_register(check_entry *e);

#ifdef CHECK_ISA
#define CHECK_ISA_NAME_ CBN_STR(CHECK_ISA)
#else
#define CHECK_ISA_NAME_ NULL
#endif
#define CHECK_REGISTER_(id, text, is_bench)                                                        \
    static void id(void);                                                                          \
    static check_entry id##_entry = {text, CHECK_ISA_NAME_, is_bench, id, NULL};                   \
    __attribute__((constructor)) static void id##_register(void) { check_register(&id##_entry); }  \
    static void id(void)
/* A test runs always, a bench only with --bench. Every test starts with the same seed (--seed to change). */
#define CHECK_TEST(name) CHECK_REGISTER_(check_test_##name, #name, false)
#define CHECK_BENCH(name) CHECK_REGISTER_(check_bench_##name, #name, true)

/* ---- asserting --------------------------------------------------------------------------------------------- */
/* Both are expressions with the value of the condition, so `if (!CHECK(x)) return;` works. A failure is printed (the
 * first few of a test) and the test goes on. */
bool check_fail(const char *file, int line, const char *fmt, ...) CBN_PRINTF(3, 4); /* returns false */
#define CHECK(cond) ((cond) ? true : check_fail(__FILE__, __LINE__, "%s", #cond))
#define CHECK_MSG(cond, ...) ((cond) ? true : check_fail(__FILE__, __LINE__, __VA_ARGS__))
int check_failures(void); /* of the running test so far */
/* What the program runs under, as the driver says in CHECK_UNDER: "" (plain), "sanitizers", "valgrind", "qemu". */
bool check_under(const char *what);
const char *check_program(void); /* to run it again */
/* Ends the accounting of the running test as skipped, with the reason printed; return afterwards. */
void check_skip(const char *reason);

/* Bit-exact comparison (NaN equals NaN); prints the first difference with its index. */
bool check_equal_f32(const float *got, const float *want, size_t n, const char *fmt, ...) CBN_PRINTF(4, 5);

/* ---- memory ------------------------------------------------------------------------------------------------ */
/* `bytes` between two inaccessible pages, filled with 0xFF (a NaN in every float type). CHECK_LEFT: starts right after
 * the guard page, 4096-aligned, so reading one element before it crashes. CHECK_RIGHT: ends right at the guard page,
 * so reading one element after it crashes (alignment is then that of bytes). The slack on the other side is at least
 * 256 bytes of a known pattern, verified when the block is released. bytes == 0 is fine. Never NULL (aborts). */
typedef enum { CHECK_LEFT, CHECK_RIGHT } check_side;
void *check_guard(size_t bytes, check_side side);
/* Released after each test; long loops release themselves: size_t m = check_mark(); ...; check_release(m). */
size_t check_mark(void);
void check_release(size_t mark); /* verifies the slack and frees every block made since the mark */
size_t check_live_blocks(void); /* of the allocator in base/cbn_alloc.h */
/* Elements nobody should have written: fill, later ask. The value is a NaN with a payload no arithmetic makes. */
void check_sentinel_fill(float *p, size_t n);
bool check_sentinel_is(float v);

/* ---- deterministic data ------------------------------------------------------------------------------------ */
uint64_t check_rand(void);
int64_t check_range(int64_t lo, int64_t hi);                      /* lo .. hi, both included */
void check_fill_int(float *p, size_t n, int lo, int hi);          /* whole numbers: sums are exact */
void check_fill_uniform(float *p, size_t n, double lo, double hi);

/* ---- instruction sets -------------------------------------------------------------------------------------- */
/* NULL-terminated: the tables this machine can run (all compiled ones when the program emulates them). */
const cbn_kernels *const *check_tables(void);
bool check_isa_runs(const char *isa);

/* ---- timing (benches) -------------------------------------------------------------------------------------- */
double check_seconds(void);  /* monotonic */
uint64_t check_ticks(void);  /* time stamp counter; nanoseconds where there is none */
void check_report(const char *what, const char *unit, double value);
#endif
