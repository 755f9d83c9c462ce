/* SPDX-License-Identifier: BSD-3-Clause */
/* The passes, one per pass_<name>.c. A failed pass leaves the graph as it was (snapshot). */
#ifndef CBN_PASSES_H
#define CBN_PASSES_H
#include "graph/effects.h"
#include "graph/fold_report.h"
#include "graph/freeze.h"

/* What a pass needs from the host beside the graph. Handles are borrowed. */
typedef struct cbn_pass_host {
    cbn_host root;           /* owning module; NULL: module targets and get_attr cannot be resolved */
    cbn_host efficient;      /* callable of inserted nodes: efficient_conv_bn_eval */
    cbn_host decomposed;     /* efficient_conv_bn_eval_decomposed */
    const char *const *skip; /* names or glob patterns (* and ?) of nodes or module targets to leave alone */
    int nskip;
    bool caller_restores; /* the caller has a snapshot and goes back to it when anything fails: the pass takes none */
    cbn_node_id only; /* this node alone, if it is a BatchNorm; 0: the whole graph */
    /* Are the scales gamma/sqrt(var + eps) finite in the dtype of `weight`, and the shifts finite? bn: gamma, beta,
     * mean, var, the first two may be NULL. NULL function: not asked. Host code may run. */
    cbn_status (*finite)(const cbn_host bn[4], double eps, cbn_host weight, bool *out, cbn_error *err);
} cbn_pass_host;

/* Fuses conv -> BatchNorm into one call that reads the parameters at run time (SEMANTICS: "The pass"); three forms. */
CBN_NODISCARD cbn_status cbn_pass_efficient(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report,
                                            cbn_error *err);
/* Decides which pairs can have the BatchNorm folded into the weights; changes nothing. Rows with outcome FOLDED are the
 * pairs to fold; the host makes the weights and then edits the graph. */
CBN_NODISCARD cbn_status cbn_pass_fuse_plan(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report,
                                            cbn_error *err);
/* Dead code: removes nodes without users, last to first, that cbn_node_impure does not protect;
 * keep_unknown: nor calls of what is not in the tables, which may write (torch.fx removes them). */
CBN_NODISCARD cbn_status cbn_pass_dce(cbn_graph *g, cbn_host root, bool keep_unknown, uint32_t *removed,
                                     cbn_error *err);
/* The same as a step of freezing: a row for each node that went, but for those that only read an attribute. */
CBN_NODISCARD cbn_status cbn_pass_dead(cbn_freeze *f);

/* ---- steps of freezing: freeze.h says what they have in common --------------------------------------------------- */
/* aten.view.default, aten._unsafe_view.default and the method view become reshape, in place, where nobody can tell a
 * copy from a view. `reshape`: the callable aten.reshape.default. */
CBN_NODISCARD cbn_status cbn_pass_view_to_reshape(cbn_freeze *f, cbn_host reshape);

typedef struct cbn_params_host {
    const cbn_host *params; /* arrays of the first placeholders */
    uint32_t nparams;
    const uint8_t *given; /* for each of them what somebody else found out: CBN_FREEZE_OK (may become a constant), MUTATED
                             or ALIASES_OUTPUT; NULL: the analysis of effects.h */
    const char *stem;     /* how constants are called, a number follows */
    /* The attribute under which get_attr nodes find the array from now on: one for each array; CBN_STR_NONE: this is not
     * an array that can be one. Host code may run. */
    cbn_status (*constant)(cbn_graph *g, cbn_host array, cbn_str *name, void *arg, cbn_error *err);
    void *arg;
} cbn_params_host;
/* Parameters that are neither written nor returned become constants, in place: the first placeholders and the get_attr
 * nodes of arrays get get_attr nodes of `constant`. */
CBN_NODISCARD cbn_status cbn_pass_params(cbn_freeze *f, const cbn_params_host *host);
/* Constant folding: what the host does. Functions of status return CBN_HOST_ERROR with the exception kept. */
typedef enum {
    CBN_CONSTANT_OTHER,  /* neither */
    CBN_CONSTANT_ARRAY,  /* an array that can become a constant */
    CBN_CONSTANT_SCALAR, /* a NumPy scalar of floating dtype: likewise, where a 0-d array does the same */
    CBN_CONSTANT_RAISED  /* no value: the node raised an exception, which is forgotten */
} cbn_constant_kind;
typedef struct cbn_constant_host {
    void *arg; /* of all of them */
    /* Runs a call whose inputs have values, or resolves a get_attr; the value is kept for the node. */
    cbn_status (*evaluate)(void *arg, cbn_node_id id, cbn_constant_kind *kind);
    void (*drop)(void *arg, cbn_node_id id); /* the value is not needed any more */
    cbn_status (*wanted)(void *arg, cbn_node_id id, bool *out); /* may be NULL: all are */
    cbn_status (*training)(void *arg, cbn_host module, bool *out);
    /* Makes the node's value an attribute of the module: its name, and its shape if that can be told. exact: strides
     * and class matter too. */
    cbn_status (*constant)(void *arg, cbn_node_id id, bool exact, cbn_str *target, cbn_tensor_meta *meta);
} cbn_constant_host;
/* Computes what depends on constants alone. */
CBN_NODISCARD cbn_status cbn_pass_constant_fold(cbn_freeze *f, const cbn_constant_host *host);

/* What cbn_pass_cse asks the host. */
typedef struct cbn_cse_host {
    /* Literals that are compared by value, not by identity: see cbn_value_keys. */
    bool (*literal_hash)(cbn_host h, uint64_t *out);
    bool (*literal_same)(cbn_host a, cbn_host b);
    /* Is a module in training mode? Host code may run. */
    cbn_status (*training)(cbn_host module, bool *out, cbn_error *err);
} cbn_cse_host;
/* Common subexpressions: nodes that compute the same become the first of them. Rows: the merged, and the equal ones that
 * had to stay. */
CBN_NODISCARD cbn_status cbn_pass_cse(cbn_freeze *f, const cbn_cse_host *host);

/* pass_concat_matmul.c */
enum { CBN_MATMUL_GROUP = 3 };
typedef struct cbn_matmul_host {
    cbn_host slice, clone; /* the callables aten.slice.Tensor and aten.clone.default */
    /* May the array under this handle be joined with others? */
    bool (*ndarray)(cbn_host object, void *arg);
    /* Joins the arrays under these attributes of the owning module along an axis; *name, valid until the next call: the
     * attribute that has the result. Host code may run. */
    cbn_status (*concatenate)(void *arg, const char *const *targets, int n, int axis, const char **name, cbn_error *err);
    void *arg;
} cbn_matmul_host;
/* Products of one input with constant weights of equal shape and dtype become one product each two or three. */
CBN_NODISCARD cbn_status cbn_pass_concat_matmul(cbn_freeze *f, const cbn_matmul_host *host);

/* pass_layout.c */
enum { CBN_STRIDES_UNKNOWN = -1, CBN_STRIDES_NOT_DENSE = -2 };
typedef struct cbn_strides {
    int ndim;       /* or one of the above */
    int64_t offset; /* of the first element in the memory it is part of */
    int64_t stride[CBN_MAX_DIMS];
} cbn_strides;
typedef struct cbn_layout_host {
    cbn_host force, clone; /* the callables prims.force_stride_order.default and aten.clone.default */
    /* What a node's metadata say of the strides it had. Host code may run. */
    cbn_status (*strides)(cbn_host meta, cbn_strides *out, cbn_error *err);
    bool (*ndarray)(cbn_host object);
    bool (*channels_last)(cbn_host array); /* is this array of four axes so already? */
} cbn_layout_host;
/* Constant weights of 2-D convolutions get a clone in channels_last. */
CBN_NODISCARD cbn_status cbn_pass_weight_layout(cbn_freeze *f, const cbn_layout_host *host);
/* The inputs of as_strided, as_strided_ and as_strided_scatter are forced to have the strides they had. */
CBN_NODISCARD cbn_status cbn_pass_input_layout(cbn_freeze *f, const cbn_layout_host *host);
/* So are the outputs. */
CBN_NODISCARD cbn_status cbn_pass_output_layout(cbn_freeze *f, const cbn_layout_host *host);

/* ---- prepared layers ---------------------------------------------------------------------------------------------- */
typedef enum {
    CBN_PLAN_CONV,
    CBN_PLAN_CONV_TRANSPOSE,
    CBN_PLAN_CONVOLUTION, /* `transposed` is an argument */
    CBN_PLAN_LINEAR,
    CBN_PLAN_PRODUCT, /* x @ weight [+ bias] */
    CBN_PLAN_BATCH_NORM
} cbn_plan_kind;
typedef enum {
    CBN_PLAN_NO_ACTIVATION,
    CBN_PLAN_RELU,
    CBN_PLAN_RELU6,
    CBN_PLAN_LEAKY_RELU,
    CBN_PLAN_SIGMOID,
    CBN_PLAN_HARDSWISH,
    CBN_PLAN_SILU
} cbn_plan_activation;
/* A layer that the host is asked to make. */
typedef struct cbn_plan_request {
    cbn_node_id node, x;
    cbn_plan_kind kind;
    const cbn_bound *call;
    cbn_host arrays[4]; /* weight, bias; of a BatchNorm gamma, beta, mean, var; NULL: None */
    double eps;         /* of a BatchNorm */
    cbn_plan_activation activation;
    double slope;       /* of a leaky ReLU */
    bool residual;      /* an array is added before the activation */
    uint8_t itemsize;   /* of the floating dtype */
    const cbn_tensor_meta *input; /* NULL: not known */
} cbn_plan_request;
typedef struct cbn_plans_host {
    void *arg;
    /* Makes the layer and puts it where `target` says; CBN_STR_NONE: it cannot be made. The graph is locked. */
    cbn_status (*layer)(void *arg, cbn_graph *g, const cbn_plan_request *r, cbn_str *target, cbn_error *err);
} cbn_plans_host;
/* Calls of convolutions, linear layers and BatchNorm in eval on constants become calls of prepared layers, which take in
 * an addition and an activation behind them. Rows come in reverse order. */
CBN_NODISCARD cbn_status cbn_pass_plans(cbn_freeze *f, const cbn_plans_host *host);
#endif
