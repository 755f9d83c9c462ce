/* SPDX-License-Identifier: BSD-3-Clause */
/* How conv_bn_pair.c sees a pair: two layers and six parameters. Private to conv_bn_*.c and
 * to the pass that folds in one walk (pass_fold_layers.c). */
#ifndef CBN_CONV_BN_PRIV_H
#define CBN_CONV_BN_PRIV_H
#include "graph/conv_bn_pair.h"

/* One node as a layer: a module call, or an operator of the table with its arguments bound. */
typedef struct cbn_layer {
    cbn_node_id id;
    bool module;
    cbn_module_info m;
    cbn_module_call call;
    cbn_op_family family;
    cbn_bound b;
    bool transposed;
    int nd; /* spatial axes; -1: not known */
} cbn_layer;

/* One parameter: absent, an array that is known now, or a value of the run. */
typedef enum { PARAM_ABSENT, PARAM_CONSTANT, PARAM_RUN_TIME } cbn_param_state;
typedef struct cbn_pair_param {
    cbn_param_state state;
    cbn_host array;   /* PARAM_CONSTANT */
    cbn_node_id node; /* the node it comes from, 0: none */
    bool known;       /* the four below */
    char kind;
    uint8_t itemsize;
    int ndim;
    int64_t shape[CBN_MAX_SPATIAL + 2]; /* of the first axes */
} cbn_pair_param;
enum { P_WEIGHT, P_BIAS, P_GAMMA, P_BETA, P_MEAN, P_VAR, P_COUNT };

/* What a target turned out to be: a convolution is met twice, as a node and as the producer of the next one. */
enum { CBN_TARGET_CACHE = 64 };
typedef struct cbn_target_cache {
    cbn_str target[CBN_TARGET_CACHE]; /* CBN_STR_NONE: empty */
    cbn_module_info m[CBN_TARGET_CACHE];
} cbn_target_cache;

typedef struct cbn_pair_context {
    cbn_graph *g;
    const cbn_host_vtable *vt;
    const cbn_pass_host *host;
    cbn_pair_purpose purpose;
    cbn_effects *effects; /* built when first asked for */
    cbn_layer bn, conv;
    cbn_pair_param p[P_COUNT];
    const cbn_value *eps; /* functional forms */
    double eps_value;     /* when eps is a constant */
    bool eps_constant;
    cbn_conv_bn_pair *pair;
    cbn_error *err;
    cbn_target_cache cache;
} cbn_pair_context;

/* Gives c->pair its reason to stay; true. */
CBN_INLINE bool keep(cbn_pair_context *c, cbn_fold_reason reason, cbn_node_id blocking, const char *hint) {
    c->pair->reason = (uint8_t)reason;
    c->pair->blocking = blocking;
    c->pair->hint = hint;
    return true;
}
/* If the node is a BatchNorm: asks every question and adds it to the list; c->p and c->eps_value are then what was
 * read. If it calls a module that is none: adds those inside. Lock the graph. */
CBN_NODISCARD cbn_status cbn_pair_visit(cbn_pair_context *c, cbn_node_id id, cbn_pair_list *list);
/* An empty context. What it gathers in c->effects is the caller's to free. */
void cbn_pair_context_init(cbn_pair_context *c, cbn_graph *g, const cbn_pass_host *host, cbn_pair_purpose purpose,
                           cbn_error *err);
/* Asks every question about the BatchNorm in c->bn; c->pair has the answer. */
CBN_NODISCARD cbn_status cbn_pair_interview(cbn_pair_context *c);
/* m.kind is what the node's module is; OTHER when it is no module call or cannot be found. */
CBN_NODISCARD cbn_status cbn_layer_read_module(cbn_pair_context *c, cbn_node_id id, cbn_layer *out);
/* Binds an operator call; *fits false when the arguments do not fit the schema (the call itself would raise too). */
CBN_NODISCARD cbn_status cbn_layer_bind(cbn_pair_context *c, cbn_node_id id, cbn_layer *out, bool *fits);
cbn_op_family cbn_node_family(const cbn_pair_context *c, const cbn_node *n);
/* The bound value of an operator's argument; NULL: it has none of that name. */
CBN_INLINE const cbn_value *cbn_layer_arg(const cbn_layer *l, const char *name) { return cbn_bound_get(&l->b, name); }
/* 1, 0 (also for NULL); -1: not a constant. */
int cbn_constant_truth(const cbn_value *v);
CBN_NODISCARD cbn_status cbn_param_of_value(cbn_pair_context *c, cbn_pair_param *p, const cbn_value *v);
CBN_NODISCARD cbn_status cbn_bn_params_read(cbn_pair_context *c);
CBN_NODISCARD cbn_status cbn_conv_params_read(cbn_pair_context *c);
/* Is the node, or the module it calls, named by one of the patterns of host->skip? */
bool cbn_pair_skipped(const cbn_pair_context *c, const cbn_node *n);
#endif
