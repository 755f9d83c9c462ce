/* SPDX-License-Identifier: BSD-3-Clause */
/* Folding BatchNorm and arithmetic with constants into the weights of convolutions and linear layers.
 *
 * One walk in list order. A fold leaves a layer with constant weights, so whatever follows it is met by the same walk
 * and folds as well: a chain conv -> add -> BatchNorm -> mul ends as one convolution. */
#ifndef CBN_PASS_FOLD_LAYERS_H
#define CBN_PASS_FOLD_LAYERS_H
#include "graph/conv_bn_priv.h"
#include "graph/freeze.h"

/* The layer whose weights change. */
typedef struct cbn_fold_layer {
    cbn_host weight, bias; /* bias: NULL when it has none */
    bool linear, transposed;
    int64_t groups, channels; /* channels: of the output */
} cbn_fold_layer;

/* One side of a binary operator as far as it is known before the graph runs. */
typedef enum {
    CBN_OPERAND_NONE,   /* a value of the run */
    CBN_OPERAND_OTHER,  /* known, but neither number nor array */
    CBN_OPERAND_NUMBER, /* of Python: it takes the dtype of what it meets */
    CBN_OPERAND_ARRAY   /* an ndarray or a NumPy scalar */
} cbn_operand_kind;
typedef struct cbn_operand {
    uint8_t what;      /* cbn_operand_kind */
    bool python_float; /* a NumPy scalar that is a Python float too: a number to the operators that look for one */
    double number;     /* NUMBER, and with python_float */
    cbn_host host;     /* NULL: a number of the graph's own */
    cbn_node_id node;  /* the get_attr it is read by; 0: none */
    char kind;         /* ARRAY: the next four */
    uint8_t itemsize;
    int ndim;
    int64_t shape[CBN_MAX_DIMS];
} cbn_operand;

/* What the operator does to the layer's output y, with a constant c. */
typedef enum {
    CBN_ARITH_SHIFT,   /* y + alpha * c */
    CBN_ARITH_REVERSE, /* alpha * y + c */
    CBN_ARITH_SCALE,   /* y * c */
    CBN_ARITH_DIVIDE   /* y / c */
} cbn_arith_kind;
typedef struct cbn_arith {
    cbn_arith_kind kind;
    double alpha;
    uint8_t itemsize;  /* of the floating dtype in which alpha * c (SHIFT) or alpha (REVERSE) is rounded */
    cbn_operand c;
    cbn_node_id layer; /* the node whose output y is */
    cbn_fold_layer of;
} cbn_arith;

/* Weights with something folded in. `slot` counts the constants that were made, `name` is the attribute. */
typedef struct cbn_folded_constant {
    bool is_new; /* false: this one stays */
    uint32_t slot;
    const char *name; /* valid until the walk ends */
} cbn_folded_constant;
typedef struct cbn_folded {
    bool refused;     /* not finite, or too small to keep their bits */
    const char *hint; /* refused: why, valid until the rows are read; NULL: the reason's own */
    cbn_folded_constant weight, bias;
} cbn_folded;

/* What needs the host. Each may run host code; the graph is locked meanwhile. */
typedef struct cbn_fold_layers_host {
    void *arg;
    cbn_status (*operand)(void *arg, cbn_host h, cbn_operand *out, cbn_error *err);
    cbn_status (*bn)(void *arg, const cbn_fold_layer *layer, const cbn_host bn[4], double eps, cbn_folded *out,
                     cbn_error *err);
    cbn_status (*arith)(void *arg, const cbn_arith *how, cbn_folded *out, cbn_error *err);
    cbn_status (*drop)(void *arg, uint32_t slot, cbn_error *err); /* nobody uses this constant any more */
    /* The fold into this layer took its input to have a batch axis: another number of axes would go wrong now. */
    cbn_status (*batched)(void *arg, const char *layer, cbn_error *err);
    cbn_status (*finite)(const cbn_host bn[4], double eps, cbn_host weight, bool *out, cbn_error *err);
    bool batch_norms, binary; /* what to fold */
} cbn_fold_layers_host;

/* Folds. Rows for binary operators go to f->report, for every BatchNorm (if host->batch_norms) to *folds. */
CBN_NODISCARD cbn_status cbn_pass_fold_layers(cbn_freeze *f, const cbn_fold_layers_host *host, cbn_fold_report *folds);
/* Calls fn for each call of a layer module whose arithmetic could be folded if the call were an operator. Changes
 * nothing. */
CBN_NODISCARD cbn_status cbn_pass_binary_modules(cbn_freeze *f, const cbn_fold_layers_host *host,
                                                 cbn_status (*fn)(void *arg, cbn_node_id id), void *arg);

/* ---- between the files of this pass ---- */

/* How often the graph uses the memory of each array. pass_fold_uses.c. */
typedef struct cbn_memory_uses {
    bool built;
    struct cbn_memory_range *ranges; /* sorted, disjoint */
    uint32_t count, room;
    uintptr_t *start; /* of the array of each get_attr node, by id; 0: none */
    uint32_t slots;
} cbn_memory_uses;
void cbn_memory_uses_free(cbn_memory_uses *u); /* zeroed is fine */
CBN_NODISCARD cbn_status cbn_memory_uses_build(cbn_memory_uses *u, cbn_graph *g, cbn_host root, cbn_error *err);
/* Uses of the memory that begins at `lo`, and a node that has it, other than `but` (0: not known). */
uint32_t cbn_memory_uses_count(const cbn_memory_uses *u, const cbn_graph *g, const char *lo, cbn_node_id but,
                               cbn_node_id *who);
void cbn_memory_uses_drop(cbn_memory_uses *u, const char *lo);
void cbn_memory_uses_drop_node(cbn_memory_uses *u, cbn_node_id get_attr);

/* The walk. */
typedef struct cbn_layer_folder {
    cbn_freeze *f;
    cbn_graph *g;
    const cbn_fold_layers_host *host;
    cbn_pass_host pass;
    cbn_pair_context c; /* what an interview has read */
    cbn_pair_list pairs;
    cbn_memory_uses uses;
    uint8_t *flags; /* by node id: CBN_FOLDER_* */
    uint32_t flag_room;
    uint32_t *slot_of; /* by node id: constant of a node that we made */
    uint32_t *slot_uses, nslots, slot_room;
    bool shared; /* some weight was shared: its other user may be gone at the end */
    cbn_fold_report *folds;
    int fold_room;
    bool again; /* a later walk: rows take the place of those kept before */
    int next_fold;
    uint32_t next_row;
    cbn_node_id anchor;
    bool after;
    cbn_str bias; /* the word */
    cbn_error *err;
} cbn_layer_folder;
enum { CBN_FOLDER_MADE = 1, CBN_FOLDER_ROW = 2 };
CBN_INLINE uint8_t cbn_folder_flags(const cbn_layer_folder *k, cbn_node_id id) {
    return id < k->flag_room ? k->flags[id] : 0;
}

/* The interview of one binary node. *expected false: nobody would expect a row. *reason OK: *how says what to fold. */
typedef struct cbn_arith_answer {
    bool expected, module; /* module: the layer is a module call, all else is fine */
    cbn_freeze_reason reason;
    cbn_node_id blocking;
    const char *hint;
} cbn_arith_answer;
CBN_NODISCARD cbn_status cbn_arith_interview(cbn_layer_folder *k, cbn_node_id id, cbn_arith *how,
                                             cbn_arith_answer *out);
#endif
