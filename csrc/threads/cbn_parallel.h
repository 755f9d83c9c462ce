/* SPDX-License-Identifier: BSD-3-Clause */
/* One parallel loop over a process-wide pool. Back-end: pool_pthread.c. */
#ifndef CBN_PARALLEL_H
#define CBN_PARALLEL_H
#include "base/cbn_base.h"

/* Work of items [begin, end); `worker` is 0 .. workers-1 and unique among the calls running at one time within
 * one cbn_parallel_for. */
typedef void (*cbn_range_fn)(void *arg, int64_t begin, int64_t end, int worker);

/* Equal to: fn(arg, 0, count, 0), cut into chunks of at least `grain` items run by up to `max_workers` threads
 * (0: the configured number), the caller among them. Denormals are flushed while fn runs and the caller's
 * floating-point state is restored. Runs serially when the pool is busy with another caller, when called from
 * inside fn, or when one chunk is all there is: callers from several threads never deadlock and never oversubscribe.
 * Workers start at first use (in a forked child at its own first use), spin for about 100 us after their last work,
 * then park; they do not spin where more threads than cores are asked for. A worker that meets the caller on its
 * processor is confined to the caller's other ones. Never fails: when a thread can't be made the loop is run by those
 * there are. */
void cbn_parallel_for(int64_t count, int64_t grain, int max_workers, cbn_range_fn fn, void *arg);

enum { CBN_MAX_THREADS = 256 };

/* How many parts, `parts` .. `most`, each of `count` equal pieces of work had better be cut into for `threads` threads:
 * the fewest that leave no thread idle for longer than an eighth of its work near the end, or `parts`. */
int64_t cbn_even_parts(int64_t count, int64_t parts, int64_t most, int threads);

/* Threads a loop started now would use, 1 .. CBN_MAX_THREADS. Order: set_num_threads > PYCONVBN_NUM_THREADS >
 * OMP_NUM_THREADS > cores. *source (may be NULL) becomes the name of what decided. The environment is read when the
 * library is loaded; the number of cores at the first call and then whenever source is asked for. */
int cbn_threads_get(const char **source);
/* n >= 1; smaller values are ignored (the binding validates). */
void cbn_threads_set(int n);
/* NULL, or a sentence about a value of the environment that was ignored (for a RuntimeWarning at import). */
const char *cbn_threads_complaint(void);
/* Ends the workers, unless a loop is running; the next loop starts new ones. For leak checks. */
void cbn_threads_stop(void);
#endif
