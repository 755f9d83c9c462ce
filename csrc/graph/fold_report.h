/* SPDX-License-Identifier: BSD-3-Clause */
/* Rows of a FoldReport: one for each BatchNorm of a graph, with the first reason that applies. */
#ifndef CBN_FOLD_REPORT_H
#define CBN_FOLD_REPORT_H
#include "graph/graph.h"

/* X(code, hint for the user), in the order in which they are asked. */
#define CBN_FOLD_REASONS(X)                                                                                            \
    X(SKIPPED_BY_USER, "named in skip=")                                                                               \
    X(BN_TRAINING, "the BatchNorm is in training mode: call eval() on it")                                             \
    X(NO_RUNNING_STATS, "the BatchNorm has no running statistics (track_running_stats=False)")                         \
    X(UNSUPPORTED_BN_OP, "this form of BatchNorm is not understood")                                                   \
    X(NOT_CONV, "its input is not the direct output of a convolution or linear layer")                                 \
    X(IS_OUTPUT, "the convolution's output is returned too")                                                           \
    X(MULTI_USER, "the convolution's output has other users")                                                          \
    X(CONV_TRAINING, "the convolution is in training mode: call eval() on it, or use efficient_conv_bn_eval")          \
    X(CHANNEL_MISMATCH, "the BatchNorm's channels are not the convolution's output channels")                          \
    X(LINEAR_ND, "the linear output is not 2-D: BatchNorm normalises axis 1, not the features")                        \
    X(MUTATED_BETWEEN, "a value of the pair may be written between the convolution and the BatchNorm")                 \
    X(WEIGHT_SHARED, "the weight shares memory with another value and cannot be given its own copy")                   \
    X(NONCONST_PARAM, "a parameter is computed at run time")                                                           \
    X(DTYPE_MIX, "parameters of mixed dtypes that one convolution cannot take")                                        \
    X(OUTPUT_SIZE_ARG, "output_size is not a constant")                                                                \
    X(NONFINITE_FOLD, "folding would give weights that are not finite (running_var + eps is 0, or beyond the dtype)")  \
    X(PADDED_PRE_BN, "a BatchNorm before a zero-padded convolution cannot be folded exactly")                          \
    X(HOOKED, "a module of the pair has forward hooks or a forward of its own")                                        \
    X(BN_OUTPUT_UNUSED, "nothing uses the BatchNorm's output")                                                         \
    X(OK, "")

typedef enum {
#define CBN_REASON_ENUM_(code, hint) CBN_REASON_##code,
    CBN_FOLD_REASONS(CBN_REASON_ENUM_)
#undef CBN_REASON_ENUM_
        CBN_REASON_COUNT
} cbn_fold_reason;

typedef enum { CBN_FORM_MODULE, CBN_FORM_FUNCTIONAL, CBN_FORM_ATEN } cbn_fold_form;
typedef enum { CBN_OUTCOME_KEPT, CBN_OUTCOME_FUSED, CBN_OUTCOME_FOLDED } cbn_fold_outcome;

typedef struct cbn_fold_row {
    cbn_str bn_name;       /* name of the BatchNorm node (it may be gone after the pass) */
    cbn_str bn_target;     /* its target as text, for module calls; CBN_STR_NONE otherwise */
    cbn_str conv_name;     /* name of the producer; CBN_STR_NONE: none */
    cbn_str blocking_name; /* node that stands in the way; CBN_STR_NONE: none */
    cbn_str new_name;      /* node that does the work now; CBN_STR_NONE: none */
    cbn_node_id bn, conv;  /* ids when the row was made */
    uint8_t form, outcome, reason;
    const char *hint;      /* static text for this very row, or NULL: that of the reason */
    bool run_time_rule;    /* linear output of unknown rank: decided at each call (fallback counted) */
    int64_t bytes_saved;   /* traffic the separate BatchNorm would have caused: 2 x its output; -1: unknown */
    int64_t flops_saved;   /* 2 x elements; -1: unknown */
} cbn_fold_row;

typedef struct cbn_fold_report {
    int count;
    cbn_fold_row *rows; /* in graph order */
} cbn_fold_report;
void cbn_fold_report_free(cbn_fold_report *r); /* zeroed is fine */
const char *cbn_fold_reason_name(cbn_fold_reason r);
const char *cbn_fold_reason_hint(cbn_fold_reason r);
#endif
