/* SPDX-License-Identifier: BSD-3-Clause */
/* Which BatchNorm of a graph stands directly behind which convolution, and the first reason why the pair must stay two
 * operators. Shared by the passes that fuse and fold; nothing is changed here. */
#ifndef CBN_CONV_BN_PAIR_H
#define CBN_CONV_BN_PAIR_H
#include "graph/passes.h"

typedef enum {
    CBN_PAIR_EFFICIENT, /* parameters are read at each call */
    CBN_PAIR_FOLD       /* parameters are read now, once */
} cbn_pair_purpose;

typedef struct cbn_conv_bn_pair {
    cbn_node_id bn;
    cbn_node_id conv;     /* 0: the BatchNorm's input is no convolution */
    cbn_node_id blocking; /* 0: none */
    uint8_t form;         /* cbn_fold_form */
    uint8_t reason;       /* cbn_fold_reason */
    bool run_time_rule, tuple;
    const char *hint; /* static, or NULL */
    cbn_str inside;   /* path of a BatchNorm inside a module that `bn` calls as a whole; CBN_STR_NONE: `bn` is one */
} cbn_conv_bn_pair;

typedef struct cbn_pair_list {
    int count, capacity;
    cbn_conv_bn_pair *v; /* in graph order, one for each BatchNorm */
} cbn_pair_list;

/* Free the list also after a failure. The graph is locked meanwhile; host code may run. */
CBN_NODISCARD cbn_status cbn_pairs_find(cbn_graph *g, const cbn_pass_host *host, cbn_pair_purpose purpose,
                                        cbn_pair_list *out, cbn_error *err);
void cbn_pairs_free(cbn_pair_list *list);
/* One row for each pair as the graph is now; `good` is the outcome of those whose reason is OK. new_name is the pass's
 * to fill in. */
CBN_NODISCARD cbn_status cbn_pairs_report(const cbn_graph *g, const cbn_pair_list *list, cbn_fold_outcome good,
                                          cbn_fold_report *report, cbn_error *err);

/* What a call of a convolution module was given. */
typedef struct cbn_module_call {
    const cbn_value *input;
    const cbn_value *output_size; /* NULL: not given, or None */
} cbn_module_call;
/* False when the arguments are not (input) or, with `sized`, (input, output_size), each by position or keyword. */
bool cbn_module_call_read(const cbn_graph *g, cbn_node_id id, bool sized, cbn_module_call *out);
#endif
