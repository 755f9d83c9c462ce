/* SPDX-License-Identifier: BSD-3-Clause */
/* Pool of POSIX threads with one mailbox word a worker; sleeping is by futex on that word.
 *
 * States of a mailbox:   IDLE -> PARKED (worker, spun long enough)      IDLE, PARKED -> JOB (owner)
 *                        JOB -> RUNNING (worker) -> IDLE                JOB -> IDLE (owner, takes it back)
 *                        RUNNING -> AWAITED (owner sleeps) -> IDLE      IDLE, PARKED -> QUIT (cbn_threads_stop)
 * The owner works too, and when nothing is left takes the job back from workers that have not begun, so a loop never
 * waits for a sleeping worker to be scheduled. No lock is ever held, so a forked child only has to forget the
 * workers. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "cpu/cbn_cpu.h"
#include "threads/cbn_parallel.h"
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    SPIN_NS = 100 * 1000,    /* as long as waking a parked thread can take, so waiting costs at most twice */
    CHUNKS_PER_THREAD = 16,  /* a worker that falls behind leaves at most so small a part of its share to the last moment */
    STACK_BYTES = 2 << 20
};
enum { IDLE, PARKED, JOB, RUNNING, AWAITED, QUIT };

typedef struct worker {
    _Alignas(CBN_CACHE_LINE) _Atomic uint32_t state;
    _Atomic int cpu; /* where it was when it last began to wait */
    _Atomic int tid; /* the system's number of the thread; 0 until it runs */
    int kept_off;    /* processor the owner last kept it off, or -1; owner only */
    int id;          /* as fn sees it; 0 is the owner */
    pthread_t thread;
} worker;

/* Chunks [next, end) that a thread takes first; others help when they have none of their own left. */
typedef struct share {
    _Alignas(CBN_CACHE_LINE) _Atomic int64_t next;
    int64_t end;
} share;

static struct {
    _Atomic bool busy; /* one caller owns everything below */
    worker workers[CBN_MAX_THREADS];
    int nworkers; /* started */
    _Atomic int64_t spin_ns;
    _Atomic int owner_cpu; /* where the running loop was started, */
    _Atomic int owner_tid; /* and by which thread */

    cbn_range_fn fn;
    void *arg;
    int64_t count, nchunks;
    int nthreads; /* of the running job, the owner among them */
    share shares[CBN_MAX_THREADS];
} pool;

static _Thread_local bool inside;
static _Thread_local int own_tid; /* asked for once: it is a system call */

/* ---- how many threads ---------------------------------------------------------------------- */
static _Atomic int set_by_user, cores_seen;
static int from_environment; /* 0: not given */
static const char *environment_name;
static char complaint[192];

/* OMP_NUM_THREADS may be a list, one number a nesting level: the first counts. */
static int parse_threads(const char *variable, bool list) {
    const char *text = getenv(variable);
    if (!text || !*text) return 0;
    char *end;
    errno = 0;
    const long n = strtol(text, &end, 10);
    while (*end == ' ') end++;
    if (end != text && n >= 1 && errno == 0 && (*end == 0 || (list && *end == ',')))
        return (int)CBN_MIN(n, (long)CBN_MAX_THREADS);
    if (!complaint[0])
        snprintf(complaint, sizeof complaint, "%s: '%.40s' is ignored; a whole number >= 1 was expected",
                 variable, text);
    return 0;
}

const char *cbn_threads_complaint(void) { return complaint[0] ? complaint : NULL; }

void cbn_threads_set(int n) {
    if (n >= 1) atomic_store(&set_by_user, CBN_MIN(n, (int)CBN_MAX_THREADS));
}

static int usable_cores(void) {
    int cores = atomic_load(&cores_seen);
    if (cores == 0) {
        cores = CBN_MIN(cbn_cpu_cores(NULL), (int)CBN_MAX_THREADS);
        atomic_store(&cores_seen, cores);
    }
    return cores;
}

int cbn_threads_get(const char **source) {
    const int user = atomic_load(&set_by_user);
    const char *by = "set_num_threads";
    int n = user;
    if (n == 0) {
        n = from_environment;
        by = environment_name;
    }
    if (n == 0) {
        if (source) {
            n = CBN_MIN(cbn_cpu_cores(&by), (int)CBN_MAX_THREADS);
            atomic_store(&cores_seen, n);
        } else {
            n = usable_cores();
        }
    }
    if (source) *source = by;
    return n;
}

/* ---- waiting ------------------------------------------------------------------------------- */
static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    while (atomic_load(word) == value)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Returns the first value that is not `value`, or `value` after the spinning time. */
static uint32_t spin_while(_Atomic uint32_t *word, uint32_t value) {
    const int64_t limit = atomic_load_explicit(&pool.spin_ns, memory_order_relaxed);
    uint32_t seen = atomic_load_explicit(word, memory_order_acquire);
    if (seen != value || limit == 0) return seen;
    const int64_t start = now_ns();
    do {
        for (int i = 0; i < 64; i++) {
            pause_briefly();
            seen = atomic_load_explicit(word, memory_order_acquire);
            if (seen != value) return seen;
        }
        sched_yield(); /* to whoever waits for this processor: it may be the thread that is waited for */
    } while (now_ns() - start < limit);
    return seen;
}

/* ---- working ------------------------------------------------------------------------------- */
static int64_t chunk_begin(int64_t k) {
    return k * (pool.count / pool.nchunks) + CBN_MIN(k, pool.count % pool.nchunks);
}

/* Half of what is left of a share, at least one chunk: fn is called a few times only, since it may prepare something at
 * the beginning of each range, yet what is left near the end is small. Returns how many; *first is the first of them. */
static int64_t take(share *s, int64_t *first) {
    int64_t k = atomic_load_explicit(&s->next, memory_order_relaxed), n;
    do {
        if (k >= s->end) return 0;
        n = (s->end - k + 1) / 2;
    } while (!atomic_compare_exchange_weak_explicit(&s->next, &k, k + n, memory_order_relaxed, memory_order_relaxed));
    *first = k;
    return n;
}

/* Own share first: the same thread then meets the same data in loop after loop. */
static void work(int id) {
    const cbn_fp_state fp = cbn_fp_fast_denormals();
    inside = true;
    for (int i = 0; i < pool.nthreads; i++) {
        int64_t first, n;
        while ((n = take(&pool.shares[(id + i) % pool.nthreads], &first)) > 0)
            pool.fn(pool.arg, chunk_begin(first), chunk_begin(first + n), id);
    }
    inside = false;
    cbn_fp_restore(fp);
}

/* A worker on the owner's processor only takes turns with it, and the system may leave it there for tens of
 * milliseconds although another processor idles (measured, after other thread pools had been at work). So it is
 * confined to the owner's other processors, which moves it at once: by itself when it finds out, */
static void leave_owner_cpu(void) {
    if (atomic_load_explicit(&pool.spin_ns, memory_order_relaxed) == 0) return; /* no processor for each thread */
    const int cpu = atomic_load_explicit(&pool.owner_cpu, memory_order_relaxed);
    if (sched_getcpu() == cpu) (void)cbn_cpu_keep_off(0, atomic_load_explicit(&pool.owner_tid, memory_order_relaxed), cpu);
}

/* or by the owner, when it has not even begun by the end of the loop. */
static void keep_off_owner_cpu(worker *w) {
    const int cpu = sched_getcpu(), tid = atomic_load_explicit(&w->tid, memory_order_relaxed);
    if (atomic_load_explicit(&pool.spin_ns, memory_order_relaxed) == 0 || tid == 0 || w->kept_off == cpu) return;
    if (cbn_cpu_keep_off(tid, 0, cpu)) w->kept_off = cpu;
}

static void *worker_main(void *self) {
    worker *w = self;
    char name[16];
    snprintf(name, sizeof name, "pyconvbn-%d", w->id);
    (void)pthread_setname_np(pthread_self(), name);
    atomic_store_explicit(&w->tid, (int)syscall(SYS_gettid), memory_order_relaxed);
    for (;;) {
        atomic_store_explicit(&w->cpu, sched_getcpu(), memory_order_relaxed);
        uint32_t seen = spin_while(&w->state, IDLE);
        if (seen == IDLE) {
            if (atomic_compare_exchange_strong(&w->state, &seen, PARKED)) sleep_while(&w->state, PARKED);
            continue;
        }
        if (seen == QUIT) return NULL;
        if (seen == JOB) leave_owner_cpu();
        if (seen == JOB && atomic_compare_exchange_strong(&w->state, &seen, RUNNING)) {
            work(w->id);
            if (atomic_exchange(&w->state, IDLE) == AWAITED) wake(&w->state);
        }
    }
}

/* Starts workers until there are `wanted`; returns how many there are. Owner only. */
static int start_workers(int wanted) {
    if (pool.nworkers >= wanted) return wanted;
    pthread_attr_t attr;
    if (pthread_attr_init(&attr) != 0) return pool.nworkers;
    (void)pthread_attr_setstacksize(&attr, STACK_BYTES);
    /* Signals belong to the program's own threads, but for those a worker's own fault raises: blocked, they would end
     * the process before a handler (faulthandler, a sanitizer) could say where. */
    static const int own_faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGABRT};
    sigset_t all, old;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof own_faults / sizeof own_faults[0]; i++) sigdelset(&all, own_faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (pool.nworkers < wanted) {
        worker *w = &pool.workers[pool.nworkers];
        atomic_store(&w->state, IDLE);
        atomic_store(&w->tid, 0);
        w->kept_off = -1;
        w->id = pool.nworkers + 1;
        if (pthread_create(&w->thread, &attr, worker_main, w) != 0) break;
        pool.nworkers++;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return CBN_MIN(pool.nworkers, wanted);
}

static void finish_worker(worker *w) {
    uint32_t seen = JOB;
    if (atomic_compare_exchange_strong(&w->state, &seen, IDLE)) {
        keep_off_owner_cpu(w);
        return;
    }
    if (seen != RUNNING || spin_while(&w->state, RUNNING) != RUNNING) return;
    seen = RUNNING;
    if (atomic_compare_exchange_strong(&w->state, &seen, AWAITED)) sleep_while(&w->state, AWAITED);
}

int64_t cbn_even_parts(int64_t count, int64_t parts, int64_t most, int threads) {
    for (int64_t p = parts; p <= CBN_MIN(most, 2 * parts); p++) {
        const int64_t items = count * p, rounds = cbn_ceil_div(items, threads);
        if (8 * (rounds * threads - items) <= items) return p;
    }
    return parts;
}

static bool own_pool(void) {
    bool free_ = false;
    return atomic_compare_exchange_strong(&pool.busy, &free_, true);
}

void cbn_parallel_for(int64_t count, int64_t grain, int max_workers, cbn_range_fn fn, void *arg) {
    if (count <= 0) return;
    int threads = inside ? 1 : max_workers > 0 ? max_workers : cbn_threads_get(NULL);
    threads = (int)CBN_MIN(CBN_MIN(threads, (int)CBN_MAX_THREADS), count / CBN_MAX(grain, 1));
    if (threads <= 1 || !own_pool()) {
        const cbn_fp_state fp = cbn_fp_fast_denormals();
        const bool was_inside = inside;
        inside = true;
        fn(arg, 0, count, 0);
        inside = was_inside;
        cbn_fp_restore(fp);
        return;
    }
    atomic_store_explicit(&pool.spin_ns, threads <= usable_cores() ? SPIN_NS : 0, memory_order_relaxed);
    const int nworkers = start_workers(threads - 1);
    pool.fn = fn;
    pool.arg = arg;
    pool.count = count;
    pool.nthreads = nworkers + 1;
    pool.nchunks = CBN_MIN(count / CBN_MAX(grain, 1), (int64_t)CHUNKS_PER_THREAD * pool.nthreads);
    for (int i = 0; i <= nworkers; i++) {
        atomic_store_explicit(&pool.shares[i].next, pool.nchunks * i / pool.nthreads, memory_order_relaxed);
        pool.shares[i].end = pool.nchunks * (i + 1) / pool.nthreads;
    }
    const int cpu = sched_getcpu();
    bool here = false; /* a worker may be waiting for this very processor */
    if (own_tid == 0) own_tid = (int)syscall(SYS_gettid);
    atomic_store_explicit(&pool.owner_cpu, cpu, memory_order_relaxed);
    atomic_store_explicit(&pool.owner_tid, own_tid, memory_order_relaxed);
    for (int i = 0; i < nworkers; i++) {
        worker *w = &pool.workers[i];
        const bool parked = atomic_exchange(&w->state, JOB) == PARKED;
        if (parked) wake(&w->state);
        here = here || parked || atomic_load_explicit(&w->cpu, memory_order_relaxed) == cpu;
    }
    if (here) sched_yield();
    work(0);
    for (int i = 0; i < nworkers; i++) finish_worker(&pool.workers[i]);
    atomic_store(&pool.busy, false);
}

void cbn_threads_stop(void) {
    if (inside || !own_pool()) return;
    for (int i = 0; i < pool.nworkers; i++) {
        worker *w = &pool.workers[i];
        if (atomic_exchange(&w->state, QUIT) == PARKED) wake(&w->state);
        pthread_join(w->thread, NULL);
    }
    pool.nworkers = 0;
    atomic_store(&pool.busy, false);
}

/* ---- loading and forking ------------------------------------------------------------------- */
/* Only the forking thread lives on in the child. */
static void forget_workers(void) {
    pool.nworkers = 0;
    own_tid = 0;
    atomic_store(&cores_seen, 0);
    if (!inside) atomic_store(&pool.busy, false);
}

__attribute__((constructor)) static void load(void) {
    static const char own[] = "PYCONVBN_NUM_THREADS", omp[] = "OMP_NUM_THREADS";
    from_environment = parse_threads(own, false);
    environment_name = own;
    if (from_environment == 0) {
        from_environment = parse_threads(omp, true);
        environment_name = omp;
    }
    pthread_atfork(NULL, NULL, forget_workers);
}
