/* SPDX-License-Identifier: BSD-3-Clause */
/* The doubly linked list and its order labels.
 *
 * Labels answer "does a stand before b" in one comparison. A node between two others takes the middle; where there is
 * no room left, the smallest aligned range of labels around the spot that is sparse enough is spread out evenly. A
 * range of 2^i labels counts as sparse with at most (2/1.5)^i nodes, which costs O(log n) moved labels an insertion,
 * amortised (Bender, Cole, Demaine, Farach-Colton, Zito: "Two simplified algorithms for maintaining order in a list",
 * 2002). */
#include "graph/graph_priv.h"

static const uint64_t STEP = (uint64_t)1 << 32; /* between nodes appended at the end */

/* Spreads labels so that a free one follows `id`, which may be the root (label 0). */
static void make_room(cbn_graph_state *s, cbn_node_id id) {
    cbn_node *n = s->nodes;
    const uint64_t label = n[id].order;
    cbn_node_id first = id ? id : n[0].next, last = first;
    uint64_t count = 1;
    double most = 1;
    for (int bits = 1; bits <= 64; bits++) {
        const uint64_t size_1 = bits == 64 ? UINT64_MAX : ((uint64_t)1 << bits) - 1;
        uint64_t lo = label & ~size_1;
        const uint64_t hi = lo + size_1;
        if (lo == 0) lo = 1; /* label 0 is the root's */
        most *= 2 / 1.5;
        while (n[first].prev && n[n[first].prev].order >= lo) {
            first = n[first].prev;
            count++;
        }
        while (n[last].next && n[n[last].next].order <= hi) {
            last = n[last].next;
            count++;
        }
        /* 2 count + 1 labels at least: then one is free after each node. */
        if (((double)count > most || (hi - lo) / 2 < count + 1) && bits < 64) continue;
        const uint64_t step = (hi - lo) / (count + 1);
        uint64_t at = lo;
        for (cbn_node_id k = first;; k = n[k].next) {
            at += step;
            n[k].order = at;
            if (k == last) return;
        }
    }
}

void cbn_list_insert(cbn_graph_state *s, cbn_node_id id, cbn_node_id before) {
    cbn_node *n = s->nodes;
    const cbn_node_id prev = n[before].prev;
    for (int tries = 0;; tries++) {
        const uint64_t lo = n[prev].order;
        if (!before && lo <= UINT64_MAX - 2 * STEP) {
            n[id].order = lo + STEP;
            break;
        }
        const uint64_t hi = before ? n[before].order : UINT64_MAX;
        if (hi - lo >= 2) {
            n[id].order = lo + (hi - lo) / 2;
            break;
        }
        assert(tries == 0);
        (void)tries;
        make_room(s, prev);
    }
    n[id].prev = prev;
    n[id].next = before;
    n[prev].next = id;
    n[before].prev = id;
}

void cbn_list_remove(cbn_graph_state *s, cbn_node_id id) {
    cbn_node *n = s->nodes;
    n[n[id].prev].next = n[id].next;
    n[n[id].next].prev = n[id].prev;
}
