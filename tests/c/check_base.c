/* SPDX-License-Identifier: BSD-3-Clause */
/* Status, processor facts and the thread pool. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "check.h"
#include "base/cbn_alloc.h"
#include "base/cbn_status.h"
#include "cpu/cbn_cpu.h"
#include "threads/cbn_parallel.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

CHECK_TEST(status_messages) {
    cbn_error e;
    CHECK(cbn_fail(&e, CBN_BAD_VALUE, "stride is %d", 0) == CBN_BAD_VALUE);
    CHECK(e.status == CBN_BAD_VALUE && e.reason == NULL && strcmp(e.message, "stride is 0") == 0);
    CHECK(cbn_fail_fold(&e, "SHARED", "x") == CBN_FOLD);
    CHECK(e.status == CBN_FOLD && strcmp(e.reason, "SHARED") == 0);
    CHECK(cbn_fail_memory(&e, "the packed weights", 12) == CBN_NO_MEMORY);
    CHECK(strcmp(e.message, "out of memory: the packed weights needs 12 bytes") == 0);
    CHECK(cbn_fail(NULL, CBN_BAD_TYPE, "nobody listens") == CBN_BAD_TYPE);
    char text[2 * sizeof e.message];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = 0;
    CHECK(cbn_fail(&e, CBN_BAD_VALUE, "%s", text) == CBN_BAD_VALUE);
    CHECK(strlen(e.message) == sizeof e.message - 1);
}

/* ---- cpu ----------------------------------------------------------------------------------- */
CHECK_TEST(cpu_facts) {
    const uint32_t f = cbn_cpu_features();
    CHECK(!(f & CBN_CPU_AVX512) || (f & CBN_CPU_AVX2));
    CHECK(cbn_cpu_name()[0] != 0);
    const cbn_cpu_caches c = cbn_cpu_cache_sizes();
    CHECK(c.l1d >= 4096 && c.l2 >= c.l1d && c.l3 > 0);
    const char *source = NULL;
    CHECK(cbn_cpu_cores(&source) >= 1 && source);
    CHECK(strcmp(source, "affinity") == 0 || strcmp(source, "cgroup quota") == 0);
}

CHECK_TEST(keeps_off_a_processor) {
    cpu_set_t before, after;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0);
    const int cpu = sched_getcpu(), n = CPU_COUNT(&before);
    CHECK(cbn_cpu_keep_off(0, 0, cpu) == (n > 1));
    CHECK(sched_getaffinity(0, sizeof after, &after) == 0);
    CHECK(CPU_COUNT(&after) == (n > 1 ? n - 1 : 1) && CPU_ISSET(cpu, &after) == (n == 1));
    CHECK(n == 1 || sched_getcpu() != cpu);
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    CHECK(!cbn_cpu_keep_off(0, 0, -1) && !cbn_cpu_keep_off(0, 0, 1 << 20));
}

CHECK_TEST(parts_suit_the_threads) {
    CHECK(cbn_even_parts(1, 5, 100, 1) == 5);
    CHECK(cbn_even_parts(1, 4, 100, 2) == 4);
    CHECK(cbn_even_parts(1, 5, 100, 2) == 6);
    CHECK(cbn_even_parts(3, 1, 100, 2) == 2);
    CHECK(cbn_even_parts(1, 5, 5, 2) == 5);
    CHECK(cbn_even_parts(1, 20, 100, 3) == 20);
    CHECK(cbn_even_parts(1, 1, 100, 64) == 1);
}

CHECK_TEST(denormals_are_flushed_and_restored) {
    if (check_under("valgrind")) {
        check_skip("valgrind does not know flushing to zero");
        return;
    }
    volatile float tiny = 1e-38f, half = 0.01f;
    CHECK(tiny * half != 0);
    const cbn_fp_state s = cbn_fp_fast_denormals();
    const float flushed = tiny * half;
    cbn_fp_restore(s);
    CHECK(flushed == 0);
    CHECK(tiny * half != 0);
}

/* ---- threads ------------------------------------------------------------------------------- */
enum { MAX_COUNT = 5000 };
static _Atomic int hits[MAX_COUNT];
static _Atomic int bad_calls, calls, nested_calls, workers_seen;
static _Atomic int active[CBN_MAX_THREADS];
static volatile float denormal = 1e-38f;
static bool flushes; /* valgrind does not */

static void mark(void *arg, int64_t begin, int64_t end, int worker) {
    const int64_t grain = *(const int64_t *)arg;
    atomic_fetch_add(&calls, 1);
    if (end - begin < grain && grain < end) atomic_fetch_add(&bad_calls, 1);
    if (atomic_fetch_add(&active[worker], 1) != 0) atomic_fetch_add(&bad_calls, 1);
    if (flushes && denormal * 0.01f != 0) atomic_fetch_add(&bad_calls, 1);
    int seen = atomic_load(&workers_seen);
    while (worker + 1 > seen && !atomic_compare_exchange_weak(&workers_seen, &seen, worker + 1)) {
    }
    for (int64_t i = begin; i < end; i++) atomic_fetch_add(&hits[i], 1);
    atomic_fetch_sub(&active[worker], 1);
}

static void check_loop(int64_t count, int64_t grain, int threads) {
    flushes = !check_under("valgrind");
    for (int i = 0; i < MAX_COUNT; i++) atomic_store(&hits[i], 0);
    atomic_store(&bad_calls, 0);
    atomic_store(&workers_seen, 0);
    cbn_parallel_for(count, grain, threads, mark, &grain);
    int wrong = 0;
    for (int64_t i = 0; i < MAX_COUNT; i++) wrong += atomic_load(&hits[i]) != (i < count);
    CHECK_MSG(wrong == 0, "count %d grain %d threads %d: %d items not run exactly once", (int)count,
              (int)grain, threads, wrong);
    CHECK(atomic_load(&bad_calls) == 0);
    CHECK(atomic_load(&workers_seen) <= CBN_MAX(threads, 1));
    CHECK(denormal * 0.01f != 0);
}

CHECK_TEST(parallel_for_covers_every_item_once) {
    static const int64_t counts[] = {0, 1, 2, 3, 7, 8, 63, 1000, MAX_COUNT};
    static const int64_t grains[] = {1, 2, 3, 100, 6000};
    static const int threads[] = {1, 2, 3, 8, 20};
    for (int c = 0; c < 9; c++)
        for (int g = 0; g < 5; g++)
            for (int t = 0; t < 5; t++) check_loop(counts[c], grains[g], threads[t]);
    for (int i = 0; i < 300; i++)
        check_loop(check_range(0, 400), check_range(1, 5), (int)check_range(1, 6));
    cbn_threads_stop();
    check_loop(1000, 1, 3); /* starts again */
    cbn_threads_stop();
}

static void inner(void *arg, int64_t begin, int64_t end, int worker) {
    (void)arg;
    if (begin != 0 || end != 50 || worker != 0) atomic_fetch_add(&bad_calls, 1);
    atomic_fetch_add(&nested_calls, 1);
}
static void outer(void *arg, int64_t begin, int64_t end, int worker) {
    (void)arg, (void)worker;
    for (int64_t i = begin; i < end; i++) cbn_parallel_for(50, 1, 4, inner, NULL);
    cbn_threads_stop(); /* refuses: a loop is running */
}

CHECK_TEST(parallel_for_nested_runs_serially) {
    atomic_store(&bad_calls, 0);
    atomic_store(&nested_calls, 0);
    cbn_parallel_for(100, 1, 4, outer, NULL);
    cbn_parallel_for(1, 1, 4, outer, NULL);
    CHECK(atomic_load(&nested_calls) == 101);
    CHECK(atomic_load(&bad_calls) == 0);
}

static void add_up(void *arg, int64_t begin, int64_t end, int worker) {
    (void)worker;
    _Atomic int64_t *sum = arg;
    int64_t s = 0;
    for (int64_t i = begin; i < end; i++) s += i;
    atomic_fetch_add(sum, s);
}
static void *caller(void *rounds) {
    for (int i = 0; i < (int)(uintptr_t)rounds; i++) {
        _Atomic int64_t sum = 0;
        cbn_parallel_for(1000 + i % 7, 10, 3, add_up, &sum);
        const int64_t n = 1000 + i % 7;
        if (atomic_load(&sum) != n * (n - 1) / 2) atomic_fetch_add(&bad_calls, 1);
    }
    return NULL;
}

CHECK_TEST(parallel_for_from_many_callers) {
    atomic_store(&bad_calls, 0);
    pthread_t t[8];
    for (int i = 0; i < 8; i++) pthread_create(&t[i], NULL, caller, (void *)(uintptr_t)500);
    for (int i = 0; i < 8; i++) pthread_join(t[i], NULL);
    CHECK(atomic_load(&bad_calls) == 0);
}

CHECK_TEST(parallel_for_survives_fork) {
    if (check_under("qemu")) {
        check_skip("qemu-user does not survive the fork of a program with threads");
        return;
    }
    caller((void *)(uintptr_t)10);
    for (int round = 0; round < 3; round++) {
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            alarm(20); /* a hang must not outlive the test */
            atomic_store(&bad_calls, 0);
            caller((void *)(uintptr_t)100);
            const pid_t grandchild = fork();
            if (grandchild == 0) {
                alarm(20);
                caller((void *)(uintptr_t)100);
                _exit(atomic_load(&bad_calls) ? 1 : 0);
            }
            int status = 1;
            waitpid(grandchild, &status, 0);
            _exit(atomic_load(&bad_calls) || status ? 1 : 0);
        }
        int status = 1;
        caller((void *)(uintptr_t)100);
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
}

static void *fork_meanwhile(void *arg) {
    (void)arg;
    for (int i = 0; i < 20; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);
            caller((void *)(uintptr_t)20);
            void *p = cbn_scratch_get(100000);
            cbn_scratch_put(p);
            _exit(atomic_load(&bad_calls) ? 1 : 0);
        }
        int status = 1;
        if (waitpid(child, &status, 0) != child || status != 0) atomic_fetch_add(&bad_calls, 1);
    }
    return NULL;
}

CHECK_TEST(fork_while_another_thread_owns_the_pool) {
    if (check_under("qemu")) {
        check_skip("qemu-user does not survive the fork of a program with threads");
        return;
    }
    atomic_store(&bad_calls, 0);
    pthread_t t;
    pthread_create(&t, NULL, fork_meanwhile, NULL);
    while (pthread_tryjoin_np(t, NULL) != 0) caller((void *)(uintptr_t)20);
    CHECK(atomic_load(&bad_calls) == 0);
}

CHECK_TEST(number_of_threads_can_change) {
    const char *source = NULL;
    const int first = cbn_threads_get(&source);
    CHECK(first >= 1 && source && strcmp(source, "set_num_threads") != 0);
    CHECK(cbn_threads_get(NULL) == first);
    static const int n[] = {4, 1, 2, 6, 3, 1};
    for (int i = 0; i < 6; i++) {
        cbn_threads_set(n[i]);
        CHECK(cbn_threads_get(&source) == n[i] && strcmp(source, "set_num_threads") == 0);
        atomic_store(&calls, 0);
        flushes = !check_under("valgrind");
        int64_t grain = 1;
        atomic_store(&workers_seen, 0);
        cbn_parallel_for(1000, grain, 0, mark, &grain);
        CHECK(atomic_load(&workers_seen) <= n[i]);
        CHECK((atomic_load(&calls) == 1) == (n[i] == 1));
    }
    cbn_threads_set(0);
    cbn_threads_set(-3);
    CHECK(cbn_threads_get(NULL) == 1);
    cbn_threads_set(1 << 20);
    CHECK(cbn_threads_get(NULL) == CBN_MAX_THREADS);
    cbn_threads_set(first);
}

static _Atomic int handled_elsewhere;
static pthread_t main_thread;
static void on_signal(int sig) {
    (void)sig;
    if (!pthread_equal(pthread_self(), main_thread)) atomic_fetch_add(&handled_elsewhere, 1);
}

CHECK_TEST(workers_take_no_signals) {
    caller((void *)(uintptr_t)5); /* workers exist */
    main_thread = pthread_self();
    struct sigaction act = {.sa_handler = on_signal}, old;
    sigaction(SIGUSR1, &act, &old);
    for (int i = 0; i < 50; i++) {
        kill(getpid(), SIGUSR1);
        caller((void *)(uintptr_t)2);
    }
    sigaction(SIGUSR1, &old, NULL);
    CHECK(atomic_load(&handled_elsewhere) == 0);
}

/* Runs this program again with an environment of its own; the child prints what it found. */
CHECK_TEST(environment_sets_threads) {
    if (check_under("qemu")) {
        check_skip("an emulated program cannot run itself again");
        return;
    }
    static const struct {
        const char *own, *omp;
        int want; /* 0: whatever the machine gives */
        bool complains;
    } cases[] = {
        {"3", "5", 3, false},      {"", "5", 5, false},      {"", "5,2", 5, false},
        {"x", "2", 2, true},       {"0", "", 0, true},       {"-1", "bad", 0, true},
        {"2 ", "", 2, false},      {"1e3", "4", 4, true},    {"99999999999999999999", "2", 2, true},
        {"100000", "", CBN_MAX_THREADS, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char command[1024], line[64] = "";
        snprintf(command, sizeof command,
                 "PYCONVBN_NUM_THREADS='%s' OMP_NUM_THREADS='%s' '%s' --list",
                 cases[i].own, cases[i].omp, check_program());
        FILE *f = popen(command, "r");
        if (!CHECK(f != NULL)) return;
        int n = -1, complains = -1;
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "threads %d complains %d", &n, &complains) == 2) break;
        while (fgets(line, sizeof line, f)) {
        }
        pclose(f);
        CHECK_MSG(cases[i].want == 0 ? n >= 1 : n == cases[i].want, "case %zu: %d threads", i, n);
        CHECK_MSG(complains == cases[i].complains, "case %zu: complains %d", i, complains);
    }
}

/* ---- benches ------------------------------------------------------------------------------- */
static void nothing(void *arg, int64_t begin, int64_t end, int worker) {
    (void)arg, (void)begin, (void)end, (void)worker;
}
/* Every thread must arrive: the loop lasts as long as the slowest hand-off. */
static _Atomic int arrived;
static void meet(void *arg, int64_t begin, int64_t end, int worker) {
    (void)arg, (void)worker;
    atomic_fetch_add(&arrived, (int)(end - begin));
    while (atomic_load_explicit(&arrived, memory_order_relaxed) < 2) {
    }
}
static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

CHECK_BENCH(parallel_for_handoff) {
    enum { N = 20000 };
    static double t[N];
    for (int mode = 0; mode < 3; mode++) {
        const int n = mode == 2 ? 300 : N;
        for (int i = 0; i < n; i++) {
            atomic_store(&arrived, 0);
            if (mode == 2) nanosleep(&(struct timespec){0, 1000000}, NULL);
            const double t0 = check_seconds();
            cbn_parallel_for(2, 1, 2, mode == 0 ? nothing : meet, NULL);
            t[i] = 1e6 * (check_seconds() - t0);
        }
        qsort(t, (size_t)n, sizeof t[0], by_value);
        static const char *const what[] = {"2 threads, spinning, empty", "2 threads, spinning, both must arrive",
                                           "2 threads, parked, both must arrive"};
        check_report(what[mode], "us (median)", t[n / 2]);
        check_report(what[mode], "us (90 %)", t[n * 9 / 10]);
    }
    for (int i = 0; i < N; i++) {
        const double t0 = check_seconds();
        cbn_parallel_for(1, 1, 1, nothing, NULL);
        t[i] = 1e6 * (check_seconds() - t0);
    }
    qsort(t, N, sizeof t[0], by_value);
    check_report("1 thread", "us (median)", t[N / 2]);
}
