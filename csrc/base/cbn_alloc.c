/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "base/cbn_alloc.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    ALIGN = 64,
    HUGE_PAGE = 2 << 20,
    LARGE = 4 << 20, /* from here on blocks are mapped directly: huge pages, and given back when freed */
    RECYCLED = 64 << 10, /* smaller blocks are not worth a place in the pool */
    MAGIC = 0x63626e61
};

/* Stands in the 64 bytes before every block. */
typedef struct header {
    void *base;
    size_t base_bytes; /* of a direct mapping; 0: base came from the C library */
    size_t bytes;      /* as counted in the statistics */
    int scratch_class; /* -1: not scratch */
    bool recycled;     /* scratch that cbn_alloc gave out */
    uint32_t magic;
} header;
_Static_assert(sizeof(header) <= ALIGN, "the header must fit before the block");

static header *header_of(void *p) {
    header *h = (header *)((char *)p - ALIGN);
    assert(h->magic == MAGIC);
    return h;
}

/* ---- statistics and fault injection -------------------------------------------------------- */
static atomic_size_t live_bytes, live_blocks, peak_bytes, total_allocs, kept_bytes;
static _Atomic int64_t fail_countdown = -1;

static _Thread_local int64_t thread_bytes;

int64_t cbn_alloc_thread_bytes(void) { return thread_bytes; }

static void count_in(size_t bytes) {
    thread_bytes += (int64_t)bytes;
    const size_t now = atomic_fetch_add(&live_bytes, bytes) + bytes;
    atomic_fetch_add(&live_blocks, 1);
    size_t peak = atomic_load(&peak_bytes);
    while (now > peak && !atomic_compare_exchange_weak(&peak_bytes, &peak, now)) {
    }
}

static void count_out(size_t bytes) {
    thread_bytes -= (int64_t)bytes;
    atomic_fetch_sub(&live_bytes, bytes);
    atomic_fetch_sub(&live_blocks, 1);
}

static bool must_fail(void) {
    atomic_fetch_add(&total_allocs, 1);
    return atomic_load(&fail_countdown) >= 0 && atomic_fetch_sub(&fail_countdown, 1) == 0;
}

void cbn_alloc_fail_after(int64_t n) { atomic_store(&fail_countdown, n); }

void cbn_alloc_get_stats(cbn_alloc_stats *out) {
    out->live_bytes = atomic_load(&live_bytes);
    out->live_blocks = atomic_load(&live_blocks);
    out->peak_bytes = atomic_load(&peak_bytes);
    out->total_allocs = atomic_load(&total_allocs);
    out->scratch_kept_bytes = atomic_load(&kept_bytes);
}

void cbn_alloc_reset_peak(void) { atomic_store(&peak_bytes, atomic_load(&live_bytes)); }

/* ---- raw blocks ---------------------------------------------------------------------------- */
static void *finish(void *base, size_t base_bytes, void *p, size_t bytes) {
    *(header *)((char *)p - ALIGN) = (header){base, base_bytes, bytes, -1, false, MAGIC};
    return p;
}

#if !defined(__SANITIZE_ADDRESS__)
/* A mapping of its own whose block starts on a huge page; the header is in the small page before it. */
static void *map_large(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t body = (bytes + page - 1) / page * page, total = body + HUGE_PAGE + page;
    char *map = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return NULL;
    const uintptr_t first = (uintptr_t)map + page;
    char *p = map + page + (HUGE_PAGE - first % HUGE_PAGE) % HUGE_PAGE;
    char *base = p - page;
    if (base > map) munmap(map, (size_t)(base - map));
    if (map + total > p + body) munmap(p + body, (size_t)(map + total - (p + body)));
    /* Advice only: where huge pages are switched off small ones do. */
    (void)madvise(p, body, MADV_HUGEPAGE);
    return finish(base, page + body, p, bytes);
}
#endif

static void *raw_alloc(size_t bytes) {
    if (bytes > PTRDIFF_MAX - 2 * (size_t)LARGE) return NULL;
#if !defined(__SANITIZE_ADDRESS__) /* the sanitizer only watches the C library's blocks */
    if (bytes >= LARGE) return map_large(bytes);
#endif
    const size_t align = bytes >= LARGE ? HUGE_PAGE : ALIGN;
    char *base = aligned_alloc(align, align + (bytes + align - 1) / align * align);
    return base ? finish(base, 0, base + align, bytes) : NULL;
}

static void raw_free(header *h) {
    h->magic = 0;
    if (h->base_bytes) munmap(h->base, h->base_bytes);
    else free(h->base);
}

static _Thread_local bool recycling;

bool cbn_alloc_recycle(bool on) {
    const bool before = recycling;
    recycling = on;
    return before;
}

void *cbn_alloc(size_t bytes) {
    if (recycling && bytes >= RECYCLED) {
        void *scratch = cbn_scratch_get(bytes);
        if (scratch) header_of(scratch)->recycled = true;
        return scratch;
    }
    void *p = must_fail() ? NULL : raw_alloc(bytes);
    if (p) count_in(bytes);
    return p;
}

void *cbn_calloc(size_t bytes) {
    void *p = cbn_alloc(bytes);
    if (p && (!header_of(p)->base_bytes || header_of(p)->recycled)) memset(p, 0, bytes); /* fresh mappings are zero */
    return p;
}

void *cbn_alloc_array(size_t count, size_t size) {
    size_t bytes;
    return __builtin_mul_overflow(count, size, &bytes) ? NULL : cbn_alloc(bytes);
}

void *cbn_alloc_or_fail(size_t count, size_t size, const char *what, cbn_error *err) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) bytes = SIZE_MAX;
    void *p = bytes < SIZE_MAX ? cbn_alloc(bytes) : NULL;
    const cbn_status status = p != NULL ? CBN_OK : cbn_fail_memory(err, what, bytes);
    (void)status;
    return p;
}

void cbn_free(void *p) {
    if (!p) return;
    header *h = header_of(p);
    if (h->recycled) {
        h->recycled = false;
        cbn_scratch_put(p);
        return;
    }
    assert(h->scratch_class < 0);
    count_out(h->bytes);
    raw_free(h);
}

#if !defined(__SANITIZE_ADDRESS__)
/* The pages of a mapping moved into a larger one: no copy, no page cleared. NULL: not possible. */
static void *move_large(header *h, size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *const old = (char *)h->base + page;
    const header was = *h;
    void *p = map_large(bytes);
    if (!p) return NULL;
    if (mremap(old, was.base_bytes - page, was.base_bytes - page, MREMAP_MAYMOVE | MREMAP_FIXED, p) == MAP_FAILED) {
        raw_free(header_of(p));
        return NULL;
    }
    munmap(was.base, page);
    return p;
}
#endif

void *cbn_realloc(void *p, size_t bytes) {
    if (!p) return cbn_alloc(bytes);
    header *h = header_of(p);
    assert(h->scratch_class < 0 || h->recycled);
    const size_t old = h->bytes;
    if (bytes <= old) return p;
#if !defined(__SANITIZE_ADDRESS__)
    if (h->base_bytes && !h->recycled && bytes <= PTRDIFF_MAX - 2 * (size_t)LARGE) {
        if (must_fail()) return NULL;
        void *moved = move_large(h, bytes);
        if (moved) {
            count_in(bytes);
            count_out(old);
            return moved;
        }
    }
#endif
    void *copy = cbn_alloc(bytes);
    if (!copy) return NULL;
    memcpy(copy, p, old);
    cbn_free(p);
    return copy;
}

/* ---- scratch ------------------------------------------------------------------------------- */
/* Free blocks lie in slots of their size class. A slot is one atomic pointer, taken by exchange and filled by
 * compare-exchange: no lock, so nothing can be left locked in a forked child. The class tells the size, so
 * nobody reads a block that another thread may be giving back. */
enum {
    STEPS = 4, /* classes an octave: at most 25 % is wasted */
    MIN_SHIFT = 12,
    MAX_SHIFT = 26,
    CLASSES = (MAX_SHIFT - MIN_SHIFT) * STEPS + 1,
    SLOTS = 16,
    REACH = STEPS /* take a block up to this many classes (twice) too large */
};
_Static_assert((size_t)1 << MAX_SHIFT == CBN_SCRATCH_KEEP_BYTES, "the largest class is all that is kept");

static _Atomic(void *) slots[CLASSES][SLOTS];

static size_t class_bytes(int c) {
    return ((size_t)(STEPS + c % STEPS) << (MIN_SHIFT + c / STEPS)) / STEPS;
}

/* Smallest class that holds `bytes`; CLASSES when none does. */
static int class_of(size_t bytes) {
    if (bytes > CBN_SCRATCH_KEEP_BYTES) return CLASSES;
    int lo = 0, hi = CLASSES - 1;
    while (lo < hi) {
        const int mid = (lo + hi) / 2;
        if (class_bytes(mid) >= bytes) hi = mid;
        else lo = mid + 1;
    }
    return lo;
}

void *cbn_scratch_get(size_t bytes) {
    if (must_fail()) return NULL;
    const int c = class_of(bytes);
    for (int k = c; k < CLASSES && k <= c + REACH; k++) {
        for (int s = 0; s < SLOTS; s++) {
            if (!atomic_load_explicit(&slots[k][s], memory_order_relaxed)) continue;
            void *p = atomic_exchange(&slots[k][s], NULL);
            if (!p) continue;
            atomic_fetch_sub(&kept_bytes, class_bytes(k));
            header_of(p)->bytes = bytes;
            count_in(bytes);
            return p;
        }
    }
    const size_t size = c < CLASSES ? class_bytes(c) : bytes;
    void *p = raw_alloc(size);
    if (!p) return NULL;
    header_of(p)->scratch_class = c;
    header_of(p)->bytes = bytes;
    count_in(bytes);
    return p;
}

typedef enum { KEPT, NO_SLOT, NO_ROOM } kept;

static kept keep(void *p, int c) {
    const size_t size = class_bytes(c);
    kept result = NO_ROOM;
    if (atomic_fetch_add(&kept_bytes, size) + size <= CBN_SCRATCH_KEEP_BYTES) {
        result = NO_SLOT;
        for (int s = 0; s < SLOTS; s++) {
            void *none = NULL;
            if (atomic_compare_exchange_strong(&slots[c][s], &none, p)) return KEPT;
        }
    }
    atomic_fetch_sub(&kept_bytes, size);
    return result;
}

void cbn_scratch_put(void *p) {
    if (!p) return;
    header *h = header_of(p);
    const int c = h->scratch_class;
    assert(c >= 0);
    count_out(h->bytes);
    if (c < CLASSES) {
        kept result = keep(p, c);
        if (result == NO_ROOM) { /* full of what earlier shapes left: start over with the sizes in use now */
            cbn_scratch_trim();
            result = keep(p, c);
        }
        if (result == KEPT) return;
    }
    raw_free(h);
}

size_t cbn_scratch_room(const void *p) {
    const header *h = (const header *)((const char *)p - ALIGN);
    assert(h->magic == MAGIC && h->scratch_class >= 0);
    return h->scratch_class < CLASSES ? class_bytes(h->scratch_class) : h->bytes;
}

void cbn_scratch_trim(void) {
    for (int c = 0; c < CLASSES; c++) {
        for (int s = 0; s < SLOTS; s++) {
            void *p = atomic_exchange(&slots[c][s], NULL);
            if (!p) continue;
            atomic_fetch_sub(&kept_bytes, class_bytes(c));
            raw_free(header_of(p));
        }
    }
}
