/* SPDX-License-Identifier: BSD-3-Clause */
/* The inside of cbn_graph, shared by the files that implement graph.h and value.h. Nobody else includes this. */
#ifndef CBN_GRAPH_PRIV_H
#define CBN_GRAPH_PRIV_H
#include "base/cbn_alloc.h"
#include "graph/graph.h"
#include "graph/op_table.h"

/* ---- cells: the memory of argument blocks, sequences and tensor records (graph_pool.c) --------------------------- */
/* Every cell starts with a uint32 count of references: 0 marks a free cell, CBN_CELL_DEAD one that waits for
 * cbn_graph_flush, anything else a live one, so that walking the chunks finds all live cells. */
typedef enum { CBN_CELL_ARGS, CBN_CELL_SEQ, CBN_CELL_TENSOR, CBN_CELL_KINDS } cbn_cell_kind;
enum {
    CBN_CELL_CLASSES = 32, /* up to 512 values */
    CBN_CELL_LARGE = CBN_CELL_CLASSES
};
#define CBN_CELL_DEAD 0x80000000u

/* A free cell (refs 0) or a dead one: CBN_CELL_DEAD | kind << 8 | class, and the handles it must still give back. */
typedef struct cbn_cell {
    uint32_t refs, n;
    struct cbn_cell *next;
    cbn_host handles[];
} cbn_cell;

typedef struct cbn_chunk {
    struct cbn_chunk *prev, *next; /* prev only for large cells */
    uint32_t kind, cell_bytes, used, capacity;
} cbn_chunk;

typedef struct cbn_pool {
    cbn_chunk *chunks; /* the first one has room, or none */
    cbn_cell *free;
} cbn_pool;

/* ---- names ------------------------------------------------------------------------------------------------------- */
enum {
    CBN_NAME_USED = 1,       /* given to a node */
    CBN_NAME_CLASSIFIED = 2, /* the next two are known */
    CBN_NAME_CLEAN = 4,      /* an identifier of ASCII letters, digits, '_' */
    CBN_NAME_RESERVED = 8,
    CBN_NAME_DENSE_MAX = (1 << 28) - 1
};
typedef struct cbn_str_entry {
    uint32_t offset;
    uint32_t count;      /* as the base of names: the last number given */
    uint32_t dense : 28; /* as the base of names: base_1 to base_<dense> are used */
    uint32_t flags : 4;  /* CBN_NAME_... */
} cbn_str_entry;

typedef struct cbn_strings {
    char *text;
    size_t text_len, text_cap;
    cbn_str_entry *entries; /* one more than count: the last gives the end of the text */
    uint32_t count, cap;
    uint64_t *table; /* open addressing, table_mask + 1 places: hash above, id or CBN_STR_NONE below */
    uint32_t table_mask;
} cbn_strings;

/* ---- the node list as a value: what a snapshot copies ------------------------------------------------------------ */
typedef struct cbn_graph_state {
    cbn_node *nodes;
    uint32_t nslots, node_cap;
    uint32_t count;     /* live nodes */
    uint32_t free_node; /* list through next */
    cbn_edge *edges;
    uint32_t nedges, edge_cap; /* slots ever used, edge 0 included */
    uint32_t free_edge, n_free_edges; /* list through next_user */
    cbn_node_id insert_anchor;
    bool insert_after;
} cbn_graph_state;

struct cbn_graph_snapshot {
    struct cbn_graph_snapshot *prev, *next;
    cbn_graph_state state;
};

struct cbn_graph {
    uint32_t refs, locked;
    const cbn_host_vtable *host;
    const cbn_op_table *ops;
    cbn_graph_state s;
    uint32_t dead_node; /* erased nodes whose handles wait for the flush: list through next */
    uint32_t last_gen, mark;
    uint64_t version;
    cbn_graph_iter *iters;
    cbn_graph_snapshot *snapshots;      /* live ones */
    cbn_graph_snapshot *dead_snapshots; /* waiting for the flush */
    cbn_cell *dead_cells;
    cbn_strings strings;
    cbn_pool pools[CBN_CELL_KINDS][CBN_CELL_CLASSES];
    cbn_chunk *large;
    size_t cell_bytes; /* of all chunks */
};

/* ---- graph_pool.c ------------------------------------------------------------------------------------------------ */
/* A cell for `units` values of 16 bytes after a head of 16 (units 0 counts as 1), refs 1. NULL: out of memory. */
void *cbn_cell_get(cbn_graph *g, cbn_cell_kind kind, uint32_t units);
void cbn_cell_put(cbn_graph *g, cbn_cell_kind kind, uint32_t units, void *cell);
void cbn_pool_free(cbn_graph *g); /* every chunk */
int cbn_pool_visit(const cbn_graph *g, int (*fn)(cbn_host h, void *arg), void *arg);
/* Queues one handle for the flush. */
void cbn_host_queue(cbn_graph *g, cbn_host h);
/* NULL: out of memory. The values are copied, not retained. */
cbn_args *cbn_args_new(cbn_graph *g, const cbn_value *args, uint32_t nargs, const cbn_value *kw, uint32_t nkw);
void cbn_args_forget(cbn_graph *g, cbn_args *a); /* gives the block back, its values stay the caller's */
void cbn_args_release(cbn_graph *g, cbn_args *a);
void cbn_seq_release(cbn_graph *g, cbn_seq *s);
void cbn_tensor_release(cbn_graph *g, cbn_tensor_meta *t);

/* ---- graph_names.c ----------------------------------------------------------------------------------------------- */
/* As cbn_graph_unique_name from a string interned already. Marks the result as used. */
CBN_NODISCARD cbn_status cbn_name_make(cbn_graph *g, cbn_str cand, cbn_str *out, cbn_error *err);
void cbn_name_use(cbn_graph *g, cbn_str name);
void cbn_strings_free(cbn_strings *s);
size_t cbn_strings_bytes(const cbn_strings *s);

/* ---- graph_order.c ----------------------------------------------------------------------------------------------- */
/* Puts a node that is in no list before `before` (0: at the end) and gives it an order label; takes it out. */
void cbn_list_insert(cbn_graph_state *s, cbn_node_id id, cbn_node_id before);
void cbn_list_remove(cbn_graph_state *s, cbn_node_id id);

/* ---- graph_edit.c ------------------------------------------------------------------------------------------------ */
CBN_NODISCARD cbn_status cbn_graph_may_change(const cbn_graph *g, cbn_error *err);
/* "x" of the node in messages: its name, or "?" . */
const char *cbn_node_label(const cbn_graph *g, cbn_node_id id);
CBN_NODISCARD cbn_status cbn_node_check(const cbn_graph *g, cbn_node_id id, const char *what, cbn_error *err);
/* Erases a node without users; cannot fail. */
void cbn_node_erase(cbn_graph *g, cbn_node_id id);
/* Releases all a slot holds, handles at once (host code may run); leaves the slot empty. */
void cbn_slot_release_now(cbn_graph *g, cbn_node *n);
/* v with every old_id replaced; a new reference. NULL-safe out on failure. */
CBN_NODISCARD cbn_status cbn_value_swap(cbn_graph *g, const cbn_value *v, cbn_node_id old_id, cbn_node_id new_id,
                                        cbn_value *out, cbn_error *err);

/* ---- graph_state.c ----------------------------------------------------------------------------------------------- */
void cbn_iters_leave(cbn_graph *g, cbn_node_id id); /* the node is about to leave the list */
void cbn_iters_detach(cbn_graph *g);
void cbn_snapshot_release_now(cbn_graph *g, cbn_graph_snapshot *s); /* unlinked already */
#endif
