/* SPDX-License-Identifier: BSD-3-Clause */
/* The node list: an FX-like graph without any Python in it.
 *
 * Nodes live in one growable array and are named by 32-bit ids; a slot's generation changes when it is reused, so that
 * (id, generation) names one node for ever and a stale pair is found out. Links, users and inputs are ids too.
 * Arguments are trees of cbn_value in immutable, reference-counted blocks. What only the host understands (callables,
 * modules, arrays, dicts of metadata) is an opaque cbn_host, kept alive through a vtable.
 *
 * Rules of every function here
 *  - not thread-safe: the host serialises (the binding holds the GIL);
 *  - a failure leaves the graph as it was;
 *  - no host code runs inside, except the vtable's `equal`, `repr` and `describe` family where a function says so:
 *    handles to be dropped are queued and released by cbn_graph_flush, which the host calls when no pointer into the
 *    graph is held;
 *  - pointers to nodes, values and strings are valid until the next call that changes the graph. */
#ifndef CBN_GRAPH_H
#define CBN_GRAPH_H
#include "base/cbn_status.h"
#include "graph/value.h"

typedef struct cbn_graph cbn_graph;
typedef struct cbn_op_table cbn_op_table; /* graph/op_table.h */
typedef uint16_t cbn_opcode;              /* row of the op table; 0 = unknown to it */

/* X(enumerator, name as the user sees it) */
#define CBN_NODE_OPS(X)                                                                                                \
    X(PLACEHOLDER, "placeholder")                                                                                      \
    X(GET_ATTR, "get_attr")                                                                                            \
    X(CALL_FUNCTION, "call_function")                                                                                  \
    X(CALL_METHOD, "call_method")                                                                                      \
    X(CALL_MODULE, "call_module")                                                                                      \
    X(OUTPUT, "output")                                                                                                \
    X(ROOT, "root")

typedef enum {
#define CBN_NODE_OP_ENUM_(e, name) CBN_NODE_##e,
    CBN_NODE_OPS(CBN_NODE_OP_ENUM_)
#undef CBN_NODE_OP_ENUM_
        CBN_NODE_OP_COUNT
} cbn_node_op;

const char *cbn_node_op_name(cbn_node_op op);
/* CBN_NODE_OP_COUNT when there is no such op. */
cbn_node_op cbn_node_op_parse(const char *name, size_t len);

/* Shape and dtype of a node's value as shape propagation found them. Immutable, reference-counted. */
typedef struct cbn_tensor_meta {
    uint32_t refs;
    int8_t ndim;      /* -1: not an array (or not one array) */
    int8_t kind;      /* 'f' floating, 'i' 'u' 'b' 'c' 'O' as NumPy's dtype.kind */
    uint8_t itemsize; /* bytes */
    int64_t shape[CBN_MAX_DIMS];
} cbn_tensor_meta;
/* A copy to be changed. Not by assignment: a node's shape has memory for its own axes only. */
cbn_tensor_meta cbn_tensor_copy(const cbn_tensor_meta *t);

/* Arguments of a node: args[0..nargs), then nkw pairs (STR key, value). Immutable, reference-counted. */
typedef struct cbn_args {
    uint32_t refs, nargs, nkw;
    cbn_value v[];
} cbn_args;
CBN_INLINE cbn_str cbn_args_key(const cbn_args *a, uint32_t k) { return a->v[a->nargs + 2 * k].u.str; }
CBN_INLINE const cbn_value *cbn_args_kw(const cbn_args *a, uint32_t k) { return &a->v[a->nargs + 2 * k + 1]; }

/* To be read by everyone, written by graph*.c only. Id 0 is the root (sentinel): root.next is the first node, root.prev
 * the last. A free slot has op == CBN_NODE_OP_COUNT. */
typedef struct cbn_node {
    uint32_t gen;
    cbn_node_id prev, next;
    uint8_t op;                                /* cbn_node_op */
    cbn_opcode opcode;                         /* of the target: call_function by handle, call_method by name */
    cbn_str name;
    uint32_t first_input, last_input, n_inputs; /* edges, in order of first use; see cbn_edge */
    uint32_t first_user, last_user, n_users;
    uint32_t mark;                             /* scratch of whoever walks: compare with cbn_graph_new_mark */
    cbn_value target;                          /* STR, or HOST for call_function */
    cbn_args *args;                            /* never NULL */
    uint64_t order;                            /* grows along the list: cbn_node_before */
    cbn_host meta, type_expr;                  /* may be NULL */
    void *view;                                /* the host's, borrowed; NULL on creation; kept by restore */
    cbn_tensor_meta *tensor;                   /* NULL: unknown */
} cbn_node;

/* One (producer, user) pair, however often the user takes that producer. Edge 0 is none. */
typedef struct cbn_edge {
    cbn_node_id producer, user;
    uint32_t prev_user, next_user;   /* list of the producer's users */
    uint32_t prev_input, next_input; /* list of the user's inputs */
} cbn_edge;

/* ---- life ------------------------------------------------------------------------------------------------------- */
/* `host` and `ops` must outlive the graph; ops may be NULL (every opcode is 0). One reference. */
CBN_NODISCARD cbn_status cbn_graph_new(const cbn_host_vtable *host, const cbn_op_table *ops, cbn_graph **out,
                                       cbn_error *err);
void cbn_graph_retain(cbn_graph *g);
/* Drops one reference; at the last one everything is released, handles at once (host code may run, last of all). */
void cbn_graph_release(cbn_graph *g);
uint32_t cbn_graph_refs(const cbn_graph *g);
/* Empties the graph (all nodes stale); handles go to the queue. */
void cbn_graph_clear(cbn_graph *g);
/* Releases queued handles; host code may run and may use this graph. */
void cbn_graph_flush(cbn_graph *g);
bool cbn_graph_needs_flush(const cbn_graph *g);
/* Calls fn once for each reference to a handle the graph holds (queue and live snapshots included), stopping at a
 * non-zero result, which it returns: what a tracing garbage collector needs. */
int cbn_graph_visit_hosts(const cbn_graph *g, int (*fn)(cbn_host h, void *arg), void *arg);
const cbn_host_vtable *cbn_graph_host(const cbn_graph *g);
const cbn_op_table *cbn_graph_ops(const cbn_graph *g);
size_t cbn_graph_bytes(const cbn_graph *g); /* memory of the structure, host objects not counted */
/* Grows with every change of nodes, arguments, targets or order. */
uint64_t cbn_graph_version(const cbn_graph *g);
/* While locked (a count), every function that changes the graph fails with CBN_BAD_STATE. Passes hold it while host
 * code may run (equal, describe). */
void cbn_graph_lock(cbn_graph *g);
void cbn_graph_unlock(cbn_graph *g);
bool cbn_graph_locked(const cbn_graph *g);

/* ---- strings and names (graph_names.c) --------------------------------------------------------------------------- */
CBN_NODISCARD cbn_status cbn_graph_intern(cbn_graph *g, const char *s, size_t len, cbn_str *out, cbn_error *err);
/* The id if this string is interned already, else CBN_STR_NONE. */
cbn_str cbn_graph_find_str(const cbn_graph *g, const char *s, size_t len);
const char *cbn_graph_str(const cbn_graph *g, cbn_str s, size_t *len); /* NUL-terminated; len may be NULL */
/* A name no node of this graph had before, made from an explicit candidate as torch.fx does it: characters outside
 * [0-9A-Za-z_] become '_' (a run: one), a leading digit gets '_' before it, "" becomes "_unnamed"; then unique by
 * counting; keywords and builtins of Python are avoided. */
CBN_NODISCARD cbn_status cbn_graph_unique_name(cbn_graph *g, const char *cand, size_t len, cbn_str *out,
                                               cbn_error *err);
/* What torch.fx makes of a target before it makes it unique: double underscores dropped, snake_case. Interned. */
CBN_NODISCARD cbn_status cbn_graph_name_of_target(cbn_graph *g, const char *target, size_t len, cbn_str *out,
                                                  cbn_error *err);

/* ---- reading ----------------------------------------------------------------------------------------------------- */
const cbn_node *cbn_graph_node(const cbn_graph *g, cbn_node_id id); /* id must be in range */
const cbn_edge *cbn_graph_edge(const cbn_graph *g, uint32_t edge);
uint32_t cbn_graph_slots(const cbn_graph *g); /* ids are below this */
uint32_t cbn_graph_count(const cbn_graph *g); /* live nodes, the root not counted */
bool cbn_graph_alive(const cbn_graph *g, cbn_node_id id, uint32_t gen);
bool cbn_node_before(const cbn_graph *g, cbn_node_id a, cbn_node_id b); /* strictly earlier in the list */
cbn_node_id cbn_graph_first(const cbn_graph *g); /* 0 when empty */
cbn_node_id cbn_graph_next(const cbn_graph *g, cbn_node_id id); /* 0 at the end */
cbn_node_id cbn_graph_prev(const cbn_graph *g, cbn_node_id id);
cbn_node_id cbn_graph_output(const cbn_graph *g); /* the last output node, 0 if none */
/* The only user, or 0 when there are none or several. */
cbn_node_id cbn_node_single_user(const cbn_graph *g, cbn_node_id id);
/* A number no node's mark has (marks start at 0). Marks are writable scratch: cbn_graph_set_mark. */
uint32_t cbn_graph_new_mark(cbn_graph *g);
void cbn_graph_set_mark(cbn_graph *g, cbn_node_id id, uint32_t mark);

/* ---- changing ---------------------------------------------------------------------------------------------------- */
typedef struct cbn_node_spec {
    cbn_node_op op;
    cbn_value target;      /* moved on success */
    const cbn_value *args; /* nargs values, each moved on success (the array stays the caller's) */
    uint32_t nargs;
    const cbn_value *kw; /* 2 * nkw values: STR key, value */
    uint32_t nkw;
    cbn_str name;      /* candidate, interned; CBN_STR_NONE: from the target (STR targets; HOST targets: "_unnamed"
                          unless the caller gave a name derived from the callable with cbn_graph_name_of_target) */
    cbn_host type_expr; /* retained by the graph; NULL: none */
    cbn_host meta;      /* retained by the graph; NULL: none */
} cbn_node_spec;

/* Inserts at the insertion point. Nodes in arguments must be alive in this graph (CBN_BAD_STATE otherwise). */
CBN_NODISCARD cbn_status cbn_graph_create(cbn_graph *g, const cbn_node_spec *spec, cbn_node_id *out, cbn_error *err);
/* New nodes go before this node; 0 = at the end. */
cbn_node_id cbn_graph_insert_point(const cbn_graph *g);
void cbn_graph_set_insert_point(cbn_graph *g, cbn_node_id before);
/* New nodes go right after this node (0 = at the start): of several the last made comes first, as in torch.fx's
 * inserting_after. */
void cbn_graph_set_insert_after(cbn_graph *g, cbn_node_id after);
/* The anchor as it was set, to be put back later: the node, and whether new nodes go after it. */
cbn_node_id cbn_graph_insert_anchor(const cbn_graph *g, bool *after);
/* CBN_BAD_STATE "Tried to erase Node x but it still had N users in the graph"; its inputs lose this user. */
CBN_NODISCARD cbn_status cbn_graph_erase(cbn_graph *g, cbn_node_id id, cbn_error *err);
/* Replaces all arguments (values moved as in cbn_graph_create): the node leaves the user lists of its old inputs and
 * joins the ends of the new ones', as torch.fx does. */
CBN_NODISCARD cbn_status cbn_graph_set_args(cbn_graph *g, cbn_node_id id, const cbn_value *args, uint32_t nargs,
                                            const cbn_value *kw, uint32_t nkw, cbn_error *err);
CBN_NODISCARD cbn_status cbn_graph_set_target(cbn_graph *g, cbn_node_id id, cbn_value target, cbn_error *err);
CBN_NODISCARD cbn_status cbn_graph_set_op(cbn_graph *g, cbn_node_id id, cbn_node_op op, cbn_error *err);
/* The name as given: the caller made it unique. */
CBN_NODISCARD cbn_status cbn_graph_set_name(cbn_graph *g, cbn_node_id id, cbn_str name, cbn_error *err);
void cbn_graph_set_meta(cbn_graph *g, cbn_node_id id, cbn_host meta);           /* retained; NULL allowed */
void cbn_graph_set_type_expr(cbn_graph *g, cbn_node_id id, cbn_host type_expr); /* retained; NULL allowed */
void cbn_graph_set_view(cbn_graph *g, cbn_node_id id, void *view);
/* Copies *meta (refs ignored); NULL forgets. */
CBN_NODISCARD cbn_status cbn_graph_set_tensor(cbn_graph *g, cbn_node_id id, const cbn_tensor_meta *meta,
                                              cbn_error *err);
/* In every user of old_id (that keep(user, arg) wants, when keep is not NULL) old_id becomes new_id. *count: users
 * changed (may be NULL). old_id == new_id changes nothing. keep must not change the graph. */
CBN_NODISCARD cbn_status cbn_graph_replace_uses(cbn_graph *g, cbn_node_id old_id, cbn_node_id new_id,
                                                bool (*keep)(cbn_node_id user, void *arg), void *arg, uint32_t *count,
                                                cbn_error *err);
CBN_NODISCARD cbn_status cbn_graph_replace_input(cbn_graph *g, cbn_node_id user, cbn_node_id old_id,
                                                 cbn_node_id new_id, cbn_error *err);
/* Moves `id` so that it stands before `before` (0: at the end). No check of dependencies, as in torch.fx. */
CBN_NODISCARD cbn_status cbn_graph_move_before(cbn_graph *g, cbn_node_id id, cbn_node_id before, cbn_error *err);

/* ---- walking while the graph changes ----------------------------------------------------------------------------- */
/* Registered with the graph: when the node under the cursor is erased the cursor steps back, so that the next step
 * gives what would have come next. Zero-initialise; begin, next until 0, end. */
typedef struct cbn_graph_iter {
    struct cbn_graph_iter *prev, *next;
    cbn_graph *graph;
    cbn_node_id cursor; /* last node given, 0 before the first */
    bool reversed, done;
} cbn_graph_iter;
void cbn_graph_iter_begin(cbn_graph *g, bool reversed, cbn_graph_iter *it);
cbn_node_id cbn_graph_iter_next(cbn_graph_iter *it); /* 0 at the end */
void cbn_graph_iter_end(cbn_graph_iter *it);

/* ---- all or nothing ---------------------------------------------------------------------------------------------- */
/* A copy of the whole state (argument blocks are shared): O(nodes), tens of nanoseconds a node. */
typedef struct cbn_graph_snapshot cbn_graph_snapshot;
CBN_NODISCARD cbn_status cbn_graph_snapshot_take(cbn_graph *g, cbn_graph_snapshot **out, cbn_error *err);
/* Back to the state of the snapshot (which is consumed). Cannot fail. Nodes keep their (id, generation); nodes created
 * since are stale; generations and names used since are not given out again. On a locked graph, which cannot have
 * changed since a snapshot taken while it was locked, it only drops the snapshot. */
void cbn_graph_snapshot_restore(cbn_graph *g, cbn_graph_snapshot *s);
void cbn_graph_snapshot_drop(cbn_graph *g, cbn_graph_snapshot *s); /* NULL is fine */

/* ---- whole graphs ------------------------------------------------------------------------------------------------ */
/* Appends copies of src's nodes (outputs too) at dst's insertion point; map has cbn_graph_slots(src) entries and gives
 * for each source id the copy (0: not copied); entries set before the call (placeholders bound to nodes of dst) are
 * used and not copied. Names are explicit candidates of dst. Type expressions and shapes are shared; meta is not
 * copied (NULL): the host's dicts are the host's to copy. Both graphs share one vtable. */
CBN_NODISCARD cbn_status cbn_graph_copy_nodes(cbn_graph *dst, const cbn_graph *src, cbn_node_id *map, cbn_error *err);
/* One node with arguments through map (every node it uses must have an entry). */
CBN_NODISCARD cbn_status cbn_graph_copy_node(cbn_graph *dst, const cbn_graph *src, cbn_node_id id,
                                             const cbn_node_id *map, cbn_node_id *out, cbn_error *err);

/* lint: legal ops and targets, arguments alive and of this graph, defined before use, unique names, user lists exact
 * in both directions, links consistent, at most one output and nothing after it that is used. CBN_BAD_STATE whose
 * message names the node. */
CBN_NODISCARD cbn_status cbn_graph_verify(const cbn_graph *g, cbn_error *err);

/* Removes nodes without users that are pure, last to first; keep(id, arg) true keeps a node (NULL: the op table
 * decides: placeholder, output and what cbn_node_impure says stay). *removed counts. */
CBN_NODISCARD cbn_status cbn_graph_dce(cbn_graph *g, bool (*keep)(cbn_node_id id, void *arg), void *arg,
                                       uint32_t *removed, cbn_error *err);
#endif
