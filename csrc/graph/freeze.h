/* SPDX-License-Identifier: BSD-3-Clause */
/* What the steps of freezing have in common: the rows of a FreezeReport and what a step is given.
 *
 * A step is a function cbn_pass_<name>(cbn_freeze *f, ...). It reads arguments through cbn_op_bind, asks effects.h who
 * writes and returns what, adds a row for each node it changed and for each it might have been expected to change, with
 * the first reason why not. When it fails the graph may be half changed: the caller has a snapshot and goes back to it. */
#ifndef CBN_FREEZE_H
#define CBN_FREEZE_H
#include "graph/effects.h"

/* X(step, name as the user sees it) */
#define CBN_FREEZE_STEPS(X)                                                                                            \
    X(LOWER, "lower")                 /* module calls became operators */                                              \
    X(VIEW, "view")                   /* view -> reshape */                                                            \
    X(PARAMETER, "parameter")         /* a parameter became a constant */                                              \
    X(CSE, "cse")                     /* equal computations merged */                                                  \
    X(CONSTANT, "constant")           /* computed once, now */                                                         \
    X(BINARY, "binary")               /* arithmetic folded into a convolution */                                       \
    X(MATMUL, "matmul")               /* parallel products became one */                                               \
    X(WEIGHT_LAYOUT, "weight_layout") /* channels_last weights */                                                      \
    X(INPUT_LAYOUT, "input_layout")   /* inputs of as_strided keep their strides */                                    \
    X(OUTPUT_LAYOUT, "output_layout") /* outputs keep their strides */                                                 \
    X(DEAD, "dead")                   /* nobody needs it any more */                                                   \
    X(PLAN, "plan")                   /* prepared operators */                                                         \
    X(DISCARD, "discard")             /* parameters erased from the module */

typedef enum {
#define CBN_FREEZE_STEP_ENUM_(step, name) CBN_STEP_##step,
    CBN_FREEZE_STEPS(CBN_FREEZE_STEP_ENUM_)
#undef CBN_FREEZE_STEP_ENUM_
        CBN_STEP_COUNT
} cbn_freeze_step;

/* X(code, hint for the user). OK: done. */
#define CBN_FREEZE_REASONS(X)                                                                                          \
    X(OK, "")                                                                                                          \
    X(MUTATED, "its memory, or that of an argument, may be written while the graph runs")                              \
    X(ALIASES_OUTPUT, "it may share memory with what the graph returns, which the caller may write")                   \
    X(RANDOM, "it gives another value at each call")                                                                   \
    X(IMPURE, "it does more than give a value")                                                                        \
    X(UNKNOWN, "an operator that is not in the op table: it may do anything")                                          \
    X(TRAINING, "it is in training mode: call eval() on it")                                                           \
    X(HOOKED, "the module has forward hooks or a forward of its own")                                                  \
    X(UNSUPPORTED, "this form of the call is not understood")                                                          \
    X(CONSTRAINT, "constraint_fn does not want it")                                                                    \
    X(DEQUANTIZE, "a dequantization stays behind its quantized constant")                                              \
    X(RAISED, "computing it raised an exception, as the graph will")                                                   \
    X(NOT_ARRAY, "its value is not an array")                                                                          \
    X(NONCONST, "an operand is computed at run time")                                                                  \
    X(NO_LAYER, "its input is not the direct output of a convolution or linear layer")                                 \
    X(MULTI_USER, "the layer's output has other users")                                                                \
    X(WEIGHT_SHARED, "another node uses the weight too")                                                               \
    X(RANK_CHANGES, "the result would have another number of axes")                                                    \
    X(SHAPE_MISMATCH, "the operand is not one number, or one for each output channel")                                 \
    X(SHAPE_UNKNOWN, "the number of axes is not known: pass example_inputs, or run fx.shape_prop(gm, example) first")  \
    X(DTYPE_CHANGES, "the result would have another dtype than the layer's")                                           \
    X(DTYPE, "dtypes that one operator cannot take")                                                                   \
    X(NOT_LINEAR, "a layer's output below the line, or a rounding mode, is not linear")                                \
    X(IN_PLACE, "it writes its operand in place")                                                                      \
    X(NONFINITE, "the folded weights would not be finite")                                                             \
    X(UNEQUAL, "the weights have different shapes or dtypes")                                                          \
    X(STRIDES_UNKNOWN, "the strides it had are not known: pass example_inputs")                                        \
    X(IN_USE, "the frozen graph still uses it")

typedef enum {
#define CBN_FREEZE_REASON_ENUM_(code, hint) CBN_FREEZE_##code,
    CBN_FREEZE_REASONS(CBN_FREEZE_REASON_ENUM_)
#undef CBN_FREEZE_REASON_ENUM_
        CBN_FREEZE_REASON_COUNT
} cbn_freeze_reason;

typedef struct cbn_freeze_row {
    uint8_t step, reason; /* CBN_FREEZE_OK: done */
    cbn_str node;         /* name of the node before the step (it may be gone now) */
    cbn_str blocking;     /* node that stands in the way; CBN_STR_NONE: none */
    cbn_str into;         /* done: name or target of what it is now (the node it was merged or folded into, the name of
                             the constant); CBN_STR_NONE: itself */
    const char *hint;     /* static text for this very row, or NULL: that of the reason */
} cbn_freeze_row;

typedef struct cbn_freeze_report {
    uint32_t count, room;
    cbn_freeze_row *rows; /* in the order in which they were added */
} cbn_freeze_report;
void cbn_freeze_report_free(cbn_freeze_report *r); /* zeroed is fine */
const char *cbn_freeze_step_name(int step);
const char *cbn_freeze_reason_name(int reason);
const char *cbn_freeze_reason_hint(int reason);

/* One step at work. */
typedef struct cbn_freeze {
    cbn_graph *g;
    cbn_host root;    /* owning module: get_attr and call_module targets are resolved from it; NULL: none */
    cbn_freeze_report report;
    uint32_t changed; /* what the step counts as done */
    cbn_error *err;
} cbn_freeze;

/* Adds a row and, for a done one (OK), counts it in f->changed. `blocking` is a live node or 0. */
CBN_NODISCARD cbn_status cbn_freeze_done(cbn_freeze *f, cbn_freeze_step step, cbn_node_id node, cbn_str into);
CBN_NODISCARD cbn_status cbn_freeze_keep(cbn_freeze *f, cbn_freeze_step step, cbn_freeze_reason reason,
                                         cbn_node_id node, cbn_node_id blocking, const char *hint);

/* What a get_attr or call_module node names, borrowed; NULL: nothing is found. Host code may run: the graph is locked
 * meanwhile. */
CBN_NODISCARD cbn_status cbn_freeze_resolve(const cbn_freeze *f, cbn_node_id node, cbn_host *out);
/* The operators that read memory by the strides they are given. */
bool cbn_is_as_strided(cbn_opcode opcode);
#endif
