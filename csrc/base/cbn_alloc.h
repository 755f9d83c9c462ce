/* SPDX-License-Identifier: BSD-3-Clause */
/* The only door to malloc: aligned, counted, with fault injection for tests. All functions are thread-safe. */
#ifndef CBN_ALLOC_H
#define CBN_ALLOC_H
#include "base/cbn_status.h"

/* `bytes` of memory aligned to 64 (2 MB-aligned and huge-page advised from 4 MB on), not zeroed.
 * NULL on failure or when a test asked for it. bytes == 0 gives a valid pointer. Owner: caller. */
void *cbn_alloc(size_t bytes);
void *cbn_calloc(size_t bytes);
/* Array of `count` items of `size` bytes; NULL also when the product overflows. */
void *cbn_alloc_array(size_t count, size_t size);
/* The same; when it is NULL, *err says that `what` needs so much memory (the status is CBN_NO_MEMORY). */
void *cbn_alloc_or_fail(size_t count, size_t size, const char *what, cbn_error *err);
void cbn_free(void *p); /* NULL is fine */
/* A block of at least `bytes` with the first bytes of p (NULL: none), which is freed; p stays valid on failure. Large blocks
 * move without a copy and without touching new memory. */
void *cbn_realloc(void *p, size_t bytes);

/* Between on and off this thread's larger blocks come from the scratch pool, and go back there when freed: for what
 * lives only as long as one call. Returns what was set before. */
bool cbn_alloc_recycle(bool on);

enum { CBN_SCRATCH_KEEP_BYTES = 64 << 20 };

/* Scratch blocks recycled through a small process-wide pool, so that steady state makes no system call and
 * takes no page fault. The pool keeps at most CBN_SCRATCH_KEEP_BYTES. */
void *cbn_scratch_get(size_t bytes);
void cbn_scratch_put(void *p); /* NULL is fine */
size_t cbn_scratch_room(const void *p); /* bytes of the block, at least those asked for */
void cbn_scratch_trim(void);   /* gives every kept block back */

/* `bytes` rounded up to cache lines, for blocks that lie one behind the other. */
CBN_INLINE size_t cbn_whole_lines(size_t bytes) {
    return (bytes + CBN_CACHE_LINE - 1) / CBN_CACHE_LINE * CBN_CACHE_LINE;
}

typedef struct cbn_alloc_stats {
    size_t live_bytes, live_blocks, peak_bytes, total_allocs, scratch_kept_bytes;
} cbn_alloc_stats;
/* Bytes are those asked for. Scratch in use counts as live, kept scratch (with the size of its class) does not. */
void cbn_alloc_get_stats(cbn_alloc_stats *out);
/* Bytes this thread has allocated and not freed, less those it freed for others: how much something takes is the difference
 * between before and after. */
int64_t cbn_alloc_thread_bytes(void);
void cbn_alloc_reset_peak(void);

/* Tests only: the n-th allocation from now on (0 = the next one) fails, once; n < 0 switches this off.
 * Scratch requests count as allocations even when the pool could serve them. */
void cbn_alloc_fail_after(int64_t n);
#endif
