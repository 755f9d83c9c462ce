/* SPDX-License-Identifier: BSD-3-Clause */
/* Values as parts of a key: a hash, and the comparison that goes with it.
 *
 * Two values are the same when their trees, the types of their leaves and the leaves are: 1, 1.0 and True differ, so do
 * tuple and list, 0.0 and -0.0; a NaN is the same as one of equal bits. Nodes are the same when they count as the same
 * node. Host objects are the same when they are one object, or by the host's word. No host code runs. */
#ifndef CBN_VALUE_HASH_H
#define CBN_VALUE_HASH_H
#include "graph/graph.h"

typedef struct cbn_value_keys {
    const cbn_node_id *same; /* by node id: the node that it counts as */
    uint64_t seed;           /* not to be guessed, so that nobody can prepare values of equal hash */
    /* Literals that are values rather than objects (numbers too large for int64, NumPy's scalars): false for all
     * others. Both functions must not run code of the user. */
    bool (*literal_hash)(cbn_host h, uint64_t *out);
    bool (*literal_same)(cbn_host a, cbn_host b); /* a and b are such literals, perhaps of different types */
} cbn_value_keys;

/* h and one word more. */
uint64_t cbn_hash_word(uint64_t h, uint64_t word);
uint64_t cbn_value_hash(const cbn_value_keys *k, uint64_t h, const cbn_value *v);
bool cbn_value_same(const cbn_value_keys *k, const cbn_value *a, const cbn_value *b);
#endif
