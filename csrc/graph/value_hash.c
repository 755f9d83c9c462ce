/* SPDX-License-Identifier: BSD-3-Clause */
/* Recursion is bounded by CBN_VALUE_MAX_DEPTH, as everywhere over values. */
#include "graph/value_hash.h"

#include <string.h>

/* The mixing of MurmurHash3's 64-bit finaliser (A. Appleby, public domain), once for each word: two multiplications,
 * so that no pair of differences cancels whatever h is. */
uint64_t cbn_hash_word(uint64_t h, uint64_t word) {
    h ^= word;
    h ^= h >> 33;
    h *= UINT64_C(0xff51afd7ed558ccd);
    h ^= h >> 33;
    h *= UINT64_C(0xc4ceb9fe1a85ec53);
    return h ^ (h >> 33);
}

static uint64_t pointer_bits(const void *p) { return (uint64_t)(uintptr_t)p; }

uint64_t cbn_value_hash(const cbn_value_keys *k, uint64_t h, const cbn_value *v) {
    uint64_t word = 0;
    h += (uint64_t)v->tag + 1; /* mixed with the word that follows */
    switch ((cbn_value_tag)v->tag) {
    case CBN_V_NONE: break;
    case CBN_V_BOOL: word = v->u.b; break;
    case CBN_V_INT: word = (uint64_t)v->u.i; break;
    case CBN_V_FLOAT: memcpy(&word, &v->u.f, sizeof word); break;
    case CBN_V_STR: word = v->u.str; break;
    case CBN_V_NODE: word = k->same[v->u.node]; break;
    case CBN_V_HOST:
        if (!k->literal_hash(v->u.host, &word)) word = pointer_bits(v->u.host);
        break;
    case CBN_V_TUPLE:
    case CBN_V_LIST:
    case CBN_V_DICT:
    case CBN_V_SLICE: {
        const cbn_seq *s = v->u.seq;
        h = cbn_hash_word(h, pointer_bits(s->cls));
        for (uint32_t i = 0; i < s->count; i++) h = cbn_value_hash(k, h, &s->v[i]);
        word = s->count;
        break;
    }
    }
    return cbn_hash_word(h, word);
}

static bool literals_same(const cbn_value_keys *k, cbn_host a, cbn_host b) {
    uint64_t p, q;
    if (a == b) return true;
    return k->literal_hash(a, &p) && k->literal_hash(b, &q) && p == q && k->literal_same(a, b);
}

bool cbn_value_same(const cbn_value_keys *k, const cbn_value *a, const cbn_value *b) {
    if (a->tag != b->tag) return false;
    switch ((cbn_value_tag)a->tag) {
    case CBN_V_NONE: return true;
    case CBN_V_BOOL: return a->u.b == b->u.b;
    case CBN_V_INT: return a->u.i == b->u.i;
    case CBN_V_FLOAT: return memcmp(&a->u.f, &b->u.f, sizeof a->u.f) == 0;
    case CBN_V_STR: return a->u.str == b->u.str;
    case CBN_V_NODE: return k->same[a->u.node] == k->same[b->u.node];
    case CBN_V_HOST: return literals_same(k, a->u.host, b->u.host);
    case CBN_V_TUPLE:
    case CBN_V_LIST:
    case CBN_V_DICT:
    case CBN_V_SLICE: break;
    }
    const cbn_seq *s = a->u.seq, *t = b->u.seq;
    if (s == t) return true;
    if (s->count != t->count || s->cls != t->cls) return false;
    for (uint32_t i = 0; i < s->count; i++) {
        if (!cbn_value_same(k, &s->v[i], &t->v[i])) return false;
    }
    return true;
}
