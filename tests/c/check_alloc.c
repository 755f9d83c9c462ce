/* SPDX-License-Identifier: BSD-3-Clause */
/* base/: allocation and scratch blocks. */
#include "check.h"
#include "base/cbn_alloc.h"
#include "base/cbn_checked.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

static cbn_alloc_stats stats(void) {
    cbn_alloc_stats s;
    cbn_alloc_get_stats(&s);
    return s;
}

/* ---- base ---------------------------------------------------------------------------------- */
CHECK_TEST(alloc_realloc) {
    /* Through every kind of block: the C library's, direct mappings, from one to the other. */
    static const size_t sizes[] = {1, 100, 4096, 3u << 20, 5u << 20, (9u << 20) + 17, 40u << 20};
    cbn_alloc_stats before, after;
    cbn_alloc_get_stats(&before);
    unsigned char *p = cbn_realloc(NULL, sizes[0]);
    size_t have = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        cbn_alloc_fail_after(0);
        CHECK(i == 0 || cbn_realloc(p, sizes[i]) == NULL); /* p stays */
        cbn_alloc_fail_after(-1);
        p = cbn_realloc(p, sizes[i]);
        if (!CHECK(p != NULL && (uintptr_t)p % 64 == 0)) return;
        CHECK(sizes[i] < (size_t)4 << 20 || check_under("sanitizers") || (uintptr_t)p % ((size_t)2 << 20) == 0);
        size_t wrong = 0;
        for (size_t k = 0; k < have; k++) wrong += p[k] != (unsigned char)(k * 7 + k / 4096);
        CHECK_MSG(wrong == 0, "%zu bytes lost on the way to %zu", wrong, sizes[i]);
        for (size_t k = have; k < sizes[i]; k++) p[k] = (unsigned char)(k * 7 + k / 4096);
        have = sizes[i];
        CHECK(cbn_realloc(p, have / 2) == p);
        cbn_alloc_get_stats(&after);
        CHECK(after.live_blocks == before.live_blocks + 1 && after.live_bytes == before.live_bytes + have);
    }
    cbn_free(p);
    cbn_alloc_get_stats(&after);
    CHECK(after.live_blocks == before.live_blocks && after.live_bytes == before.live_bytes);
}

CHECK_TEST(alloc_alignment_and_counters) {
    const cbn_alloc_stats before = stats();
    static const size_t sizes[] = {0, 1, 63, 64, 65, 4096, (4u << 20) - 1, 4u << 20, (9u << 20) + 5};
    enum { N = sizeof sizes / sizeof sizes[0] };
    unsigned char *p[N];
    size_t sum = 0;
    for (int i = 0; i < N; i++) {
        p[i] = cbn_alloc(sizes[i]);
        CHECK(p[i] != NULL);
        const uintptr_t align = sizes[i] >= 4u << 20 ? 2u << 20 : 64;
        CHECK_MSG((uintptr_t)p[i] % align == 0, "%zu bytes at %p", sizes[i], (void *)p[i]);
        memset(p[i], i + 1, sizes[i]);
        sum += sizes[i];
    }
    CHECK(stats().live_bytes == before.live_bytes + sum);
    CHECK(stats().live_blocks == before.live_blocks + N);
    CHECK(stats().peak_bytes >= before.live_bytes + sum);
    for (int i = 0; i < N; i++) {
        for (size_t k = 0; k < sizes[i]; k += 997) CHECK(p[i][k] == i + 1);
        cbn_free(p[i]);
    }
    cbn_free(NULL);
    CHECK(stats().live_bytes == before.live_bytes);
    CHECK(stats().live_blocks == before.live_blocks);
    cbn_alloc_reset_peak();
    CHECK(stats().peak_bytes == stats().live_bytes);
}

CHECK_TEST(alloc_zeroed_and_overflow) {
    static const size_t sizes[] = {1, 4096, 5u << 20};
    for (int i = 0; i < 3; i++) {
        /* Dirty what the C library will hand out again. */
        unsigned char *p = cbn_alloc(sizes[i]);
        memset(p, 0xEE, sizes[i]);
        cbn_free(p);
        p = cbn_calloc(sizes[i]);
        for (size_t k = 0; k < sizes[i]; k++)
            if (!CHECK(p[k] == 0)) break;
        cbn_free(p);
    }
    CHECK(cbn_alloc_array(SIZE_MAX / 2, 3) == NULL);
    CHECK(cbn_alloc(SIZE_MAX) == NULL);
    CHECK(cbn_alloc((size_t)PTRDIFF_MAX) == NULL);
    void *p = cbn_alloc_array(3, 5);
    CHECK(p != NULL);
    cbn_free(p);
    int64_t out;
    CHECK(cbn_mul_ok(3, 5, &out) && out == 15);
    CHECK(!cbn_mul_ok(INT64_MAX, 2, &out));
    CHECK(!cbn_add_ok(INT64_MAX, 1, &out));
}

CHECK_TEST(alloc_fault_injection) {
    const cbn_alloc_stats before = stats();
    cbn_alloc_fail_after(2);
    void *a = cbn_alloc(10), *b = cbn_scratch_get(10), *c = cbn_alloc(10), *d = cbn_alloc(10);
    CHECK(a && b && !c && d);
    cbn_free(a);
    cbn_scratch_put(b);
    cbn_free(d);
    /* A kept block does not hide a scratch request from the injection. */
    cbn_alloc_fail_after(0);
    CHECK(cbn_scratch_get(10) == NULL);
    b = cbn_scratch_get(10);
    CHECK(b != NULL);
    cbn_scratch_put(b);
    cbn_alloc_fail_after(0);
    CHECK(cbn_calloc(10) == NULL);
    cbn_alloc_fail_after(0);
    cbn_alloc_fail_after(-1);
    a = cbn_alloc(10);
    CHECK(a != NULL);
    cbn_free(a);
    CHECK(stats().live_blocks == before.live_blocks && stats().live_bytes == before.live_bytes);
    CHECK(stats().total_allocs > before.total_allocs);
}

CHECK_TEST(scratch_is_recycled_and_bounded) {
    cbn_scratch_trim();
    CHECK(stats().scratch_kept_bytes == 0);
    const size_t live = stats().live_bytes;
    char *p = cbn_scratch_get(1000 * 1000);
    memset(p, 1, 1000 * 1000);
    CHECK((uintptr_t)p % 64 == 0);
    CHECK(stats().live_bytes >= live + 1000 * 1000);
    cbn_scratch_put(p);
    CHECK(stats().live_bytes == live);
    CHECK(stats().scratch_kept_bytes >= 1000 * 1000);
    char *q = cbn_scratch_get(900 * 1000); /* a little smaller fits too */
    CHECK(q == p);
    cbn_scratch_put(q);
    q = cbn_scratch_get(1000); /* a thousandth does not take it */
    CHECK(q != p);
    cbn_scratch_put(q);
    void *many[40];
    for (int i = 0; i < 40; i++) {
        many[i] = cbn_scratch_get((size_t)check_range(1, 6 << 20));
        memset(many[i], 7, 1);
    }
    for (int i = 0; i < 40; i++) {
        cbn_scratch_put(many[i]);
        CHECK(stats().scratch_kept_bytes <= CBN_SCRATCH_KEEP_BYTES);
    }
    p = cbn_scratch_get((size_t)CBN_SCRATCH_KEEP_BYTES + 1); /* too large to keep */
    CHECK(p != NULL);
    cbn_scratch_put(p);
    cbn_scratch_put(NULL);
    CHECK(stats().scratch_kept_bytes <= CBN_SCRATCH_KEEP_BYTES);
    cbn_scratch_trim();
    CHECK(stats().scratch_kept_bytes == 0 && stats().live_bytes == live);
}

static void *churn(void *seed_) {
    unsigned seed = (unsigned)(uintptr_t)seed_;
    for (int i = 0; i < 2000; i++) {
        const size_t n = (size_t)(rand_r(&seed) % 300000 + 1);
        unsigned char *p = cbn_scratch_get(n);
        p[0] = (unsigned char)seed;
        p[n - 1] = (unsigned char)seed;
        void *a = cbn_alloc(n % 1000);
        cbn_free(a);
        if (n > 1 && p[0] != (unsigned char)seed) abort(); /* somebody else has this block too */
        cbn_scratch_put(p);
    }
    return NULL;
}

CHECK_TEST(scratch_from_many_threads) {
    const cbn_alloc_stats before = stats();
    pthread_t t[4];
    for (int i = 0; i < 4; i++) pthread_create(&t[i], NULL, churn, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
    CHECK(stats().live_bytes == before.live_bytes && stats().live_blocks == before.live_blocks);
    cbn_scratch_trim();
    CHECK(stats().scratch_kept_bytes == 0);
}
