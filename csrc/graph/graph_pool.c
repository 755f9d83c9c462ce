/* SPDX-License-Identifier: BSD-3-Clause */
/* Cells of argument blocks, sequences and tensor records, in chunks of one kind and size class; the queue of handles.
 *
 * A block that dies with handles in it becomes its own entry of the queue: the handles are moved to its front, so that
 * queueing needs no memory and cannot fail. */
#include "graph/graph_priv.h"

#include <string.h>

enum {
    CHUNK_HEAD = 64,
    CHUNK_BYTES = 4 << 20, /* at most: from here on memory comes in huge pages */
    FIRST_CELLS = 8,
    HEAD = 16,
    UNIT = 16,
    SMALL_UNITS = 8,
    MAX_UNITS = 512
};
_Static_assert(sizeof(cbn_chunk) <= CHUNK_HEAD, "the head must fit before the cells");
_Static_assert(offsetof(cbn_seq, v) == HEAD && offsetof(cbn_args, v) == HEAD, "values follow a head of one unit");
_Static_assert(sizeof(cbn_value) == UNIT, "a value is one unit");
_Static_assert(offsetof(cbn_cell, handles) == HEAD, "handles lie where values lay");

/* Up to 8 units each number has its class, then four classes for each doubling. */
static uint32_t class_of(uint32_t units) {
    if (units <= 1) return 0;
    if (units <= SMALL_UNITS) return units - 1;
    if (units > MAX_UNITS) return CBN_CELL_LARGE;
    const uint32_t lg = 31 - (uint32_t)__builtin_clz(units - 1);
    return SMALL_UNITS + (lg - 3) * 4 + (((units - 1) >> (lg - 2)) - 4);
}

static uint32_t class_units(uint32_t c) {
    if (c < SMALL_UNITS) return c + 1;
    const uint32_t lg = 3 + (c - SMALL_UNITS) / 4;
    return (5 + (c - SMALL_UNITS) % 4) << (lg - 2);
}

/* Readers may copy a whole cbn_tensor_meta out of a cell that holds a few axes only: the room behind the last cell. */
static size_t tail_of(cbn_cell_kind kind) { return kind == CBN_CELL_TENSOR ? sizeof(cbn_tensor_meta) : 0; }

static void *chunk_cell(const cbn_chunk *c, uint32_t i) {
    return (char *)(uintptr_t)c + CHUNK_HEAD + (size_t)i * c->cell_bytes;
}

static void *large_get(cbn_graph *g, cbn_cell_kind kind, uint32_t units) {
    const size_t bytes = HEAD + (size_t)units * UNIT;
    cbn_chunk *c = cbn_alloc(CHUNK_HEAD + bytes + tail_of(kind));
    if (!c) return NULL;
    *c = (cbn_chunk){.next = g->large, .kind = kind, .used = 1, .capacity = units};
    if (g->large) g->large->prev = c;
    g->large = c;
    g->cell_bytes += bytes;
    cbn_cell *cell = chunk_cell(c, 0);
    cell->refs = 1;
    return cell;
}

static void large_put(cbn_graph *g, void *cell) {
    cbn_chunk *c = (cbn_chunk *)((char *)cell - CHUNK_HEAD);
    if (c->prev) c->prev->next = c->next;
    else g->large = c->next;
    if (c->next) c->next->prev = c->prev;
    g->cell_bytes -= HEAD + (size_t)c->capacity * UNIT;
    cbn_free(c);
}

static bool chunk_add(cbn_graph *g, cbn_pool *p, cbn_cell_kind kind, uint32_t class) {
    const uint32_t cell_bytes = HEAD + class_units(class) * UNIT;
    const uint32_t most = CBN_MAX((CHUNK_BYTES - 2 * CHUNK_HEAD) / cell_bytes, 4u);
    const uint32_t have = p->chunks ? p->chunks->capacity : 0;
    const uint32_t cells = CBN_MIN(have ? have + have / 2 : (uint32_t)FIRST_CELLS, most);
    const size_t bytes = CHUNK_HEAD + (size_t)cells * cell_bytes + tail_of(kind);
    cbn_chunk *c = cbn_alloc(bytes);
    if (!c) return false;
    *c = (cbn_chunk){.next = p->chunks, .kind = kind, .cell_bytes = cell_bytes, .capacity = cells};
    p->chunks = c;
    g->cell_bytes += bytes;
    return true;
}

void *cbn_cell_get(cbn_graph *g, cbn_cell_kind kind, uint32_t units) {
    const uint32_t class = class_of(units);
    if (class == CBN_CELL_LARGE) return large_get(g, kind, units);
    cbn_pool *p = &g->pools[kind][class];
    cbn_cell *cell = p->free;
    if (cell) {
        p->free = cell->next;
    } else {
        if ((!p->chunks || p->chunks->used == p->chunks->capacity) && !chunk_add(g, p, kind, class)) return NULL;
        cell = chunk_cell(p->chunks, p->chunks->used++);
    }
    cell->refs = 1;
    return cell;
}

static void put_class(cbn_graph *g, cbn_cell_kind kind, uint32_t class, void *where) {
    if (class == CBN_CELL_LARGE) {
        large_put(g, where);
        return;
    }
    cbn_cell *cell = where;
    cell->refs = 0;
    cell->next = g->pools[kind][class].free;
    g->pools[kind][class].free = cell;
}

void cbn_cell_put(cbn_graph *g, cbn_cell_kind kind, uint32_t units, void *cell) {
    put_class(g, kind, class_of(units), cell);
}

void cbn_pool_free(cbn_graph *g) {
    for (int k = 0; k < CBN_CELL_KINDS; k++) {
        for (int c = 0; c < CBN_CELL_CLASSES; c++) {
            for (cbn_chunk *p = g->pools[k][c].chunks, *next; p; p = next) {
                next = p->next;
                cbn_free(p);
            }
            g->pools[k][c] = (cbn_pool){NULL, NULL};
        }
    }
    for (cbn_chunk *p = g->large, *next; p; p = next) {
        next = p->next;
        cbn_free(p);
    }
    g->large = NULL;
    g->cell_bytes = 0;
}

/* ---- blocks that die --------------------------------------------------------------------------------------------- */
static void queue_cell(cbn_graph *g, cbn_cell *cell, cbn_cell_kind kind, uint32_t class, uint32_t n) {
    cell->refs = CBN_CELL_DEAD | (uint32_t)kind << 8 | class;
    cell->n = n;
    cell->next = g->dead_cells;
    g->dead_cells = cell;
}

void cbn_host_queue(cbn_graph *g, cbn_host h) {
    if (!h) return;
    cbn_cell *cell = cbn_cell_get(g, CBN_CELL_SEQ, 1);
    if (!cell) {
        /* No memory for the entry: better to run host code here, as the callers' last action, than to leak. */
        g->host->release(h);
        return;
    }
    cell->handles[0] = h;
    queue_cell(g, cell, CBN_CELL_SEQ, 0, 1);
}

/* The last reference to a block is gone: its sequences lose one, its handles wait for the flush. Recursion is bounded
 * by CBN_VALUE_MAX_DEPTH. */
static void cell_die(cbn_graph *g, cbn_cell_kind kind, void *where, cbn_value *v, uint32_t count, cbn_host cls) {
    cbn_cell *cell = where;
    uint32_t n = 0;
    for (uint32_t i = 0; i < count; i++) {
        const cbn_value x = v[i];
        /* Handle n lies at 8 n, inside a value that was read: n <= i. */
        if (x.tag == CBN_V_HOST) cell->handles[n++] = x.u.host;
        else if (cbn_value_is_seq(&x)) cbn_seq_release(g, x.u.seq);
    }
    if (cls) cell->handles[n++] = cls;
    if (n) queue_cell(g, cell, kind, class_of(count), n);
    else cbn_cell_put(g, kind, count, cell);
}

void cbn_seq_release(cbn_graph *g, cbn_seq *s) {
    if (--s->refs == 0) cell_die(g, CBN_CELL_SEQ, s, s->v, s->count, s->cls);
}

cbn_args *cbn_args_new(cbn_graph *g, const cbn_value *args, uint32_t nargs, const cbn_value *kw, uint32_t nkw) {
    if ((uint64_t)nargs + 2 * (uint64_t)nkw > UINT32_MAX / 4) return NULL;
    cbn_args *a = cbn_cell_get(g, CBN_CELL_ARGS, nargs + 2 * nkw);
    if (!a) return NULL;
    a->nargs = nargs;
    a->nkw = nkw;
    if (nargs) memcpy(a->v, args, nargs * sizeof *args);
    if (nkw) memcpy(a->v + nargs, kw, 2 * (size_t)nkw * sizeof *kw);
    return a;
}

void cbn_args_forget(cbn_graph *g, cbn_args *a) {
    if (a) cbn_cell_put(g, CBN_CELL_ARGS, a->nargs + 2 * a->nkw, a);
}

void cbn_args_release(cbn_graph *g, cbn_args *a) {
    if (a && --a->refs == 0) cell_die(g, CBN_CELL_ARGS, a, a->v, a->nargs + 2 * a->nkw, NULL);
}

/* Axes are two to a unit after the head's eight bytes of them. */
static uint32_t tensor_units(int ndim) { return ndim <= 1 ? 1 : (uint32_t)ndim / 2; }

void cbn_tensor_release(cbn_graph *g, cbn_tensor_meta *t) {
    if (t && --t->refs == 0) cbn_cell_put(g, CBN_CELL_TENSOR, tensor_units(t->ndim), t);
}

cbn_tensor_meta cbn_tensor_copy(const cbn_tensor_meta *t) {
    cbn_tensor_meta copy = {.ndim = t->ndim, .kind = t->kind, .itemsize = t->itemsize};
    if (t->ndim > 0) memcpy(copy.shape, t->shape, (size_t)t->ndim * sizeof t->shape[0]);
    return copy;
}

cbn_status cbn_graph_set_tensor(cbn_graph *g, cbn_node_id id, const cbn_tensor_meta *meta, cbn_error *err) {
    CBN_TRY(cbn_node_check(g, id, "node", err));
    cbn_tensor_meta *t = NULL;
    if (meta) {
        if (meta->ndim < -1 || meta->ndim > CBN_MAX_DIMS)
            return cbn_fail(err, CBN_BAD_VALUE, "tensor meta: ndim must be -1 to %d, got %d", CBN_MAX_DIMS, meta->ndim);
        t = cbn_cell_get(g, CBN_CELL_TENSOR, tensor_units(meta->ndim));
        if (!t) return cbn_fail_memory(err, "shape of a node", sizeof *t);
        const size_t axes = meta->ndim > 0 ? (size_t)meta->ndim : 0;
        memcpy(t, meta, offsetof(cbn_tensor_meta, shape) + axes * sizeof meta->shape[0]);
        t->refs = 1;
    }
    cbn_tensor_release(g, g->s.nodes[id].tensor);
    g->s.nodes[id].tensor = t;
    return CBN_OK;
}

/* ---- the queue --------------------------------------------------------------------------------------------------- */
bool cbn_graph_needs_flush(const cbn_graph *g) { return g->dead_cells || g->dead_node || g->dead_snapshots; }

/* Each entry is taken off its list before the host runs, so that host code may change, flush or drop this graph. */
void cbn_graph_flush(cbn_graph *g) {
    if (!cbn_graph_needs_flush(g)) return;
    g->refs++;
    while (cbn_graph_needs_flush(g)) {
        if (g->dead_cells) {
            cbn_cell *cell = g->dead_cells;
            if (cell->n > 1) {
                g->host->release(cell->handles[--cell->n]); /* n is lowered before the call */
                continue;
            }
            const cbn_host last = cell->handles[0];
            const uint32_t what = cell->refs & ~CBN_CELL_DEAD;
            g->dead_cells = cell->next;
            put_class(g, (cbn_cell_kind)(what >> 8), what & 0xff, cell);
            g->host->release(last);
        } else if (g->dead_node) {
            const cbn_node_id id = g->dead_node;
            cbn_node *n = &g->s.nodes[id];
            const cbn_host h[3] = {n->target.tag == CBN_V_HOST ? n->target.u.host : NULL, n->meta, n->type_expr};
            g->dead_node = n->next;
            n->target = cbn_value_none();
            n->meta = n->type_expr = NULL;
            n->next = g->s.free_node;
            g->s.free_node = id;
            for (int i = 0; i < 3; i++) {
                if (h[i]) g->host->release(h[i]);
            }
        } else {
            cbn_graph_snapshot *s = g->dead_snapshots;
            g->dead_snapshots = s->next;
            cbn_snapshot_release_now(g, s);
        }
    }
    cbn_graph_release(g);
}

static int visit_values(const cbn_value *v, uint32_t n, int (*fn)(cbn_host h, void *arg), void *arg) {
    int r = 0;
    for (uint32_t i = 0; i < n && !r; i++) {
        if (v[i].tag == CBN_V_HOST) r = fn(v[i].u.host, arg);
    }
    return r;
}

static int visit_chunk(const cbn_chunk *c, int (*fn)(cbn_host h, void *arg), void *arg) {
    int r = 0;
    for (uint32_t i = 0; i < c->used && !r; i++) {
        const void *cell = chunk_cell(c, i);
        const uint32_t refs = ((const cbn_cell *)cell)->refs;
        if (!refs || refs & CBN_CELL_DEAD) continue;
        if (c->kind == CBN_CELL_ARGS) {
            const cbn_args *a = cell;
            r = visit_values(a->v, a->nargs + 2 * a->nkw, fn, arg);
        } else {
            const cbn_seq *s = cell;
            r = visit_values(s->v, s->count, fn, arg);
            if (!r && s->cls) r = fn(s->cls, arg);
        }
    }
    return r;
}

int cbn_pool_visit(const cbn_graph *g, int (*fn)(cbn_host h, void *arg), void *arg) {
    int r = 0;
    for (int k = 0; k < CBN_CELL_TENSOR; k++) {
        for (int c = 0; c < CBN_CELL_CLASSES; c++) {
            for (const cbn_chunk *p = g->pools[k][c].chunks; p && !r; p = p->next) r = visit_chunk(p, fn, arg);
        }
    }
    for (const cbn_chunk *p = g->large; p && !r; p = p->next) {
        if (p->kind != CBN_CELL_TENSOR) r = visit_chunk(p, fn, arg);
    }
    for (const cbn_cell *d = g->dead_cells; d && !r; d = d->next) {
        for (uint32_t i = 0; i < d->n && !r; i++) r = fn(d->handles[i], arg);
    }
    return r;
}
