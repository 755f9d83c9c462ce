/* SPDX-License-Identifier: BSD-3-Clause */
/* Alias classes by union-find, memory ranges by one sort, writers of each class in list order. */
#include "graph/effects_priv.h"

#include <stdlib.h>
#include <string.h>

#include "base/cbn_alloc.h"

cbn_status cbn_u32s_push(cbn_u32s *a, uint32_t value, cbn_error *err) {
    if (a->n == a->room) {
        const uint32_t room = a->room == 0 ? 64 : a->room * 2;
        uint32_t *larger = cbn_alloc_array(room, sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(err, "effects", room * sizeof *larger);
        if (a->n > 0) memcpy(larger, a->v, a->n * sizeof *larger);
        cbn_free(a->v);
        a->v = larger;
        a->room = room;
    }
    a->v[a->n++] = value;
    return CBN_OK;
}

/* ---- building ---------------------------------------------------------------------------------------------------- */
uint32_t cbn_effects_find(cbn_effects *e, uint32_t x) {
    uint32_t *parent = e->parent.v;
    while (parent[x] != x) x = parent[x] = parent[parent[x]];
    return x;
}

void cbn_effects_join(cbn_effects *e, uint32_t a, uint32_t b) {
    a = cbn_effects_find(e, a);
    b = cbn_effects_find(e, b);
    if (a != b) e->parent.v[CBN_MAX(a, b)] = CBN_MIN(a, b);
}

cbn_status cbn_effects_mark(cbn_effects *e, uint32_t element, cbn_node_id node, cbn_error *err) {
    CBN_TRY(cbn_u32s_push(&e->written, element, err));
    const cbn_status status = cbn_u32s_push(&e->writer, node, err);
    if (status != CBN_OK) e->written.n--;
    return status;
}

cbn_status cbn_effects_return(cbn_effects *e, uint32_t element, cbn_error *err) {
    return cbn_u32s_push(&e->returned, element, err);
}

cbn_status cbn_effects_share(cbn_effects *e, uint32_t element, cbn_error *err) {
    return cbn_u32s_push(&e->outside, element, err);
}

static cbn_status add_range(cbn_effects *e, uintptr_t lo, uintptr_t hi, uint32_t element, cbn_error *err) {
    if (e->nranges == e->range_room) {
        const uint32_t room = e->range_room == 0 ? 64 : e->range_room * 2;
        cbn_interval *larger = cbn_alloc_array(room, sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(err, "effects", room * sizeof *larger);
        if (e->nranges > 0) memcpy(larger, e->ranges, e->nranges * sizeof *larger);
        cbn_free(e->ranges);
        e->ranges = larger;
        e->range_room = room;
    }
    e->ranges[e->nranges++] = (cbn_interval){lo, hi, element};
    return CBN_OK;
}

cbn_status cbn_effects_add_array(cbn_effects *e, cbn_host array, uint32_t joined_with, bool *is_array,
                                 uint32_t *element, cbn_error *err) {
    cbn_array_info info;
    CBN_TRY(cbn_graph_host(e->g)->array(array, &info, is_array, err));
    if (!*is_array) return CBN_OK;
    *element = joined_with;
    if (joined_with == UINT32_MAX) {
        *element = e->parent.n;
        CBN_TRY(cbn_u32s_push(&e->parent, e->parent.n, err));
    }
    if (e->no_root) cbn_effects_join(e, *element, e->anything);
    if (info.lo == info.hi) return CBN_OK;
    return add_range(e, (uintptr_t)info.lo, (uintptr_t)info.hi, *element, err);
}

static int by_start(const void *a, const void *b) {
    const cbn_interval *p = a, *q = b;
    return (p->lo > q->lo) - (p->lo < q->lo);
}

/* Ranges that overlap become one, their elements one class. */
static void merge_ranges(cbn_effects *e) {
    if (e->nranges == 0) return;
    qsort(e->ranges, e->nranges, sizeof *e->ranges, by_start);
    uint32_t n = 0;
    for (uint32_t i = 1; i < e->nranges; i++) {
        cbn_interval *last = &e->ranges[n];
        const cbn_interval *next = &e->ranges[i];
        if (next->lo < last->hi) {
            cbn_effects_join(e, last->element, next->element);
            last->hi = CBN_MAX(last->hi, next->hi);
        } else {
            e->ranges[++n] = *next;
        }
    }
    e->nranges = n + 1;
}

/* From the pairs (element, node), which are in list order, the list of each class. */
static cbn_status sort_writers(cbn_effects *e, cbn_error *err) {
    const uint32_t classes = e->parent.n, pairs = e->written.n;
    for (uint32_t x = 0; x < classes; x++)
        e->parent.v[x] = cbn_effects_find(e, x); /* roots are the smallest: one pass */
    e->first.v = cbn_calloc((classes + 1) * sizeof *e->first.v);
    e->by_class.v = cbn_alloc_array(pairs, sizeof *e->by_class.v);
    if (e->first.v == NULL || e->by_class.v == NULL) return cbn_fail_memory(err, "effects", (classes + pairs) * 4u);
    uint32_t *first = e->first.v;
    for (uint32_t i = 0; i < pairs; i++) first[e->parent.v[e->written.v[i]] + 1]++;
    for (uint32_t c = 0; c < classes; c++) first[c + 1] += first[c];
    /* Filled through first[c] as the cursor, which then stands where first[c + 1] stood: shift back. */
    for (uint32_t i = 0; i < pairs; i++) e->by_class.v[first[e->parent.v[e->written.v[i]]]++] = e->writer.v[i];
    memmove(first + 1, first, classes * sizeof *first);
    first[0] = 0;
    e->first.n = e->first.room = classes + 1;
    e->by_class.n = pairs;
    return CBN_OK;
}

/* Instead of a list of elements, a number for each class: the element, MANY if it has several or it is no node. */
static cbn_status by_class(cbn_effects *e, cbn_u32s *list, cbn_error *err) {
    uint32_t *of = cbn_calloc((e->parent.n + 1) * sizeof *of);
    if (of == NULL) return cbn_fail_memory(err, "effects", (e->parent.n + 1) * sizeof *of);
    for (uint32_t i = 0; i < list->n; i++) {
        uint32_t *here = &of[e->parent.v[list->v[i]]];
        *here = *here == 0 && list->v[i] < e->anything ? list->v[i] : CBN_EFFECTS_MANY;
    }
    cbn_free(list->v);
    *list = (cbn_u32s){of, e->parent.n, e->parent.n + 1};
    return CBN_OK;
}

/* What belongs to others: what is listed, and all arrays that are no node's value. */
static cbn_status mark_outside(cbn_effects *e, cbn_error *err) {
    for (uint32_t x = e->anything; x < e->parent.n; x++) CBN_TRY(cbn_effects_share(e, x, err));
    return by_class(e, &e->outside, err);
}

/* Elements become classes; from here on parent is indexed by node id. */
static void settle(cbn_effects *e) {
    for (uint32_t i = 0; i < e->nranges; i++) e->ranges[i].element = e->parent.v[e->ranges[i].element];
    e->parent.n = e->anything;
    e->anything = e->parent.v[e->anything];
}

static cbn_status look_at_all(cbn_effects *e, cbn_host root, cbn_error *err) {
    const uint32_t slots = cbn_graph_slots(e->g);
    e->anything = slots;
    for (uint32_t i = 0; i < slots; i++) {
        CBN_TRY(cbn_u32s_push(&e->gens, 0, err));
        CBN_TRY(cbn_u32s_push(&e->lists, 0, err));
    }
    for (uint32_t i = 0; i <= slots; i++) CBN_TRY(cbn_u32s_push(&e->parent, i, err));
    for (cbn_node_id id = cbn_graph_first(e->g); id != 0; id = cbn_graph_next(e->g, id)) {
        e->gens.v[id] = cbn_graph_node(e->g, id)->gen + 1;
        CBN_TRY(cbn_effects_node(e, id, root, err));
    }
    merge_ranges(e);
    for (uint32_t x = 0; x < e->parent.n && !e->unknown; x++) {
        e->unknown = x != e->anything && cbn_effects_find(e, x) == cbn_effects_find(e, e->anything);
    }
    for (uint32_t i = 0; e->unknown && i < e->nranges; i++) cbn_effects_join(e, e->ranges[i].element, e->anything);
    CBN_TRY(sort_writers(e, err));
    CBN_TRY(by_class(e, &e->returned, err));
    CBN_TRY(mark_outside(e, err));
    settle(e);
    return CBN_OK;
}

cbn_status cbn_effects_build(cbn_graph *g, cbn_host root, cbn_effects **out, cbn_error *err) {
    return cbn_effects_build_with(g, root, NULL, 0, out, err);
}

cbn_status cbn_effects_build_with(cbn_graph *g, cbn_host root, const cbn_host *inputs, uint32_t ninputs,
                                  cbn_effects **out, cbn_error *err) {
    *out = NULL;
    cbn_effects *e = cbn_calloc(sizeof *e);
    if (e == NULL) return cbn_fail_memory(err, "effects", sizeof *e);
    e->g = g;
    e->no_root = root == NULL;
    e->inputs = inputs;
    e->ninputs = ninputs;
    cbn_graph_lock(g);
    const cbn_status status = look_at_all(e, root, err);
    cbn_graph_unlock(g);
    if (status != CBN_OK) cbn_effects_free(e);
    else *out = e;
    return status;
}

void cbn_effects_free(cbn_effects *e) {
    if (e == NULL) return;
    cbn_u32s *const lists[] = {&e->parent, &e->gens,  &e->written, &e->writer,
                               &e->first,  &e->by_class, &e->returned, &e->outside, &e->lists};
    for (size_t i = 0; i < sizeof lists / sizeof lists[0]; i++) cbn_free(lists[i]->v);
    cbn_free(e->ranges);
    cbn_free(e);
}

/* ---- asking ------------------------------------------------------------------------------------------------------ */
enum { NOT_SEEN = UINT32_MAX };

/* The class of a live node's value, or NOT_SEEN. */
static uint32_t class_of(const cbn_effects *e, cbn_node_id id) {
    if (id >= e->parent.n || e->gens.v[id] != cbn_graph_node(e->g, id)->gen + 1) return NOT_SEEN;
    return e->parent.v[id];
}

static cbn_status put_in_class(cbn_effects *e, cbn_node_id new_id, uint32_t class, cbn_error *err) {
    while (e->parent.n <= new_id) {
        if (e->gens.n == e->parent.n) CBN_TRY(cbn_u32s_push(&e->gens, 0, err));
        CBN_TRY(cbn_u32s_push(&e->parent, NOT_SEEN, err));
    }
    e->parent.v[new_id] = class;
    e->gens.v[new_id] = class == NOT_SEEN ? 0 : cbn_graph_node(e->g, new_id)->gen + 1;
    return CBN_OK;
}

cbn_status cbn_effects_substitute(cbn_effects *e, cbn_node_id old_id, cbn_node_id new_id, cbn_error *err) {
    const uint32_t class = old_id < e->parent.n && e->gens.v[old_id] != 0 ? e->parent.v[old_id] : NOT_SEEN;
    return put_in_class(e, new_id, class, err);
}

cbn_status cbn_effects_add_fresh(cbn_effects *e, cbn_node_id new_id, cbn_error *err) {
    const uint32_t class = e->first.n - 1; /* its list of writers is empty: it begins and ends where the last ended */
    while (e->returned.n <= class) CBN_TRY(cbn_u32s_push(&e->returned, 0, err));
    CBN_TRY(cbn_u32s_push(&e->first, e->first.v[class], err));
    return put_in_class(e, new_id, class, err);
}

static bool between(const cbn_effects *e, cbn_node_id id, cbn_node_id after, cbn_node_id before) {
    if (e->gens.v[id] != cbn_graph_node(e->g, id)->gen + 1 || cbn_graph_node(e->g, id)->op == CBN_NODE_OP_COUNT) {
        return false; /* erased since */
    }
    return (after == 0 || cbn_node_before(e->g, after, id)) && (before == 0 || cbn_node_before(e->g, id, before));
}

/* The first of a list in list order that stands between. */
static cbn_node_id first_between(const cbn_effects *e, const uint32_t *list, uint32_t count, cbn_node_id after,
                                 cbn_node_id before) {
    uint32_t lo = 0, hi = count;
    while (after != 0 && lo < hi) { /* the first that is not before or at `after` */
        const uint32_t mid = lo + (hi - lo) / 2;
        if (cbn_graph_node(e->g, list[mid])->op == CBN_NODE_OP_COUNT) { /* erased: it has no place any more */
            lo = 0;
            break;
        }
        if (cbn_node_before(e->g, after, list[mid])) hi = mid;
        else lo = mid + 1;
    }
    for (; lo < count; lo++) {
        if (between(e, list[lo], after, before)) return list[lo];
        if (before != 0 && cbn_graph_node(e->g, list[lo])->op != CBN_NODE_OP_COUNT &&
            !cbn_node_before(e->g, list[lo], before)) {
            return 0;
        }
    }
    return 0;
}

static cbn_node_id writer_of_class(const cbn_effects *e, uint32_t class, cbn_node_id after, cbn_node_id before) {
    if (class == NOT_SEEN) return first_between(e, e->writer.v, e->writer.n, after, before);
    const uint32_t at = e->first.v[class];
    return first_between(e, e->by_class.v + at, e->first.v[class + 1] - at, after, before);
}

cbn_node_id cbn_effects_writer(const cbn_effects *e, cbn_node_id value, cbn_node_id after, cbn_node_id before) {
    return writer_of_class(e, class_of(e, value), after, before);
}

/* The first range that ends behind `start`. */
static uint32_t first_range(const cbn_effects *e, uintptr_t start) {
    uint32_t lo = 0, hi = e->nranges;
    while (lo < hi) {
        const uint32_t mid = lo + (hi - lo) / 2;
        if (e->ranges[mid].hi > start) hi = mid;
        else lo = mid + 1;
    }
    return lo;
}

cbn_status cbn_effects_array_writer(const cbn_effects *e, cbn_host array, cbn_node_id after, cbn_node_id before,
                                    cbn_node_id *out, cbn_error *err) {
    *out = 0;
    cbn_array_info info;
    bool is_array;
    cbn_graph_lock(e->g);
    const cbn_status status = cbn_graph_host(e->g)->array(array, &info, &is_array, err);
    cbn_graph_unlock(e->g);
    if (status != CBN_OK || !is_array) return status;
    if (e->no_root || e->unknown) {
        *out = writer_of_class(e, e->anything, after, before);
        return CBN_OK;
    }
    const uintptr_t start = (uintptr_t)info.lo, end = (uintptr_t)info.hi;
    for (uint32_t i = first_range(e, start); i < e->nranges && e->ranges[i].lo < end; i++) {
        const cbn_node_id found = writer_of_class(e, e->ranges[i].element, after, before);
        if (found != 0 && (*out == 0 || cbn_node_before(e->g, found, *out))) *out = found;
    }
    return CBN_OK;
}

cbn_status cbn_effects_array_returned(const cbn_effects *e, cbn_host array, bool *out, cbn_error *err) {
    *out = false;
    cbn_array_info info;
    bool is_array;
    cbn_graph_lock(e->g);
    const cbn_status status = cbn_graph_host(e->g)->array(array, &info, &is_array, err);
    cbn_graph_unlock(e->g);
    if (status != CBN_OK || !is_array) return status;
    if (e->no_root || e->unknown) *out = e->returned.v[e->anything] != 0;
    const uintptr_t start = (uintptr_t)info.lo, end = (uintptr_t)info.hi;
    for (uint32_t i = first_range(e, start); !*out && i < e->nranges && e->ranges[i].lo < end; i++) {
        *out = e->returned.v[e->ranges[i].element] != 0;
    }
    return CBN_OK;
}

bool cbn_effects_may_alias(const cbn_effects *e, cbn_node_id a, cbn_node_id b) {
    const uint32_t p = class_of(e, a), q = class_of(e, b);
    return p == NOT_SEEN || q == NOT_SEEN || p == q;
}

uint32_t cbn_effects_class(const cbn_effects *e, cbn_node_id value) { return class_of(e, value); }

bool cbn_effects_written(const cbn_effects *e, cbn_node_id value) {
    const uint32_t class = class_of(e, value);
    return class == NOT_SEEN ? e->writer.n > 0 : e->first.v[class + 1] > e->first.v[class];
}

cbn_node_id cbn_effects_returned_by(const cbn_effects *e, cbn_node_id value) {
    const uint32_t class = class_of(e, value);
    return class == NOT_SEEN ? CBN_EFFECTS_MANY : e->returned.v[class];
}

bool cbn_effects_returned(const cbn_effects *e, cbn_node_id value) { return cbn_effects_returned_by(e, value) != 0; }

bool cbn_effects_outside(const cbn_effects *e, cbn_node_id value) {
    const uint32_t class = class_of(e, value);
    return class == NOT_SEEN || e->outside.v[class] != 0;
}
