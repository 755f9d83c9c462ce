/* SPDX-License-Identifier: BSD-3-Clause */
/* The operators the graph knows: one row of graph_ops.def each, with the schema that binding, defaults, purity,
 * aliasing, shape
 * rules, execution and documentation come from. */
#ifndef CBN_OP_TABLE_H
#define CBN_OP_TABLE_H
#include "graph/graph.h"

/* What an operator does to its arguments. */
typedef enum {
    CBN_EFFECT_PURE,    /* new value, arguments untouched */
    CBN_EFFECT_VIEW,    /* the result may share memory with the arguments marked (a) in the schema */
    CBN_EFFECT_MUTATES, /* writes the arguments marked (a!) in the schema; the result shares memory with them */
    CBN_EFFECT_RANDOM,  /* another value at each call */
    CBN_EFFECT_IMPURE   /* must be kept for its effect */
} cbn_effect;

/* Which family a row belongs to: what the passes ask. */
typedef enum {
    CBN_FAMILY_NONE,
    CBN_FAMILY_LINEAR,
    CBN_FAMILY_CONV, /* conv1d/2d/3d, functional or aten */
    CBN_FAMILY_CONV_TRANSPOSE,
    CBN_FAMILY_CONVOLUTION, /* aten.convolution: transposed is an argument */
    CBN_FAMILY_BATCH_NORM, /* one result; arguments are named input, weight, bias, running_mean, running_var, ... */
    CBN_FAMILY_BATCH_NORM_TUPLE, /* _native_batch_norm_legit*: result is a tuple */
    CBN_FAMILY_ACTIVATION,
    CBN_FAMILY_BINARY,
    CBN_FAMILY_GETITEM,
    CBN_FAMILY_EFFICIENT, /* efficient_conv_bn_eval, _decomposed */
    CBN_FAMILY_QUANTIZE,  /* floating numbers to integers, with a scale and a zero point */
    CBN_FAMILY_DEQUANTIZE /* and back */
} cbn_op_family;

enum { CBN_OP_MAX_ARGS = 16 };

/* Opcodes by name: CBN_OP_<row>, 1 .. CBN_OP_COUNT. */
enum {
    CBN_OP_UNKNOWN = 0,
#define CBN_OP(row, name, schema, effect, family, nd, shape_rule, doc) CBN_OP_##row,
#include "graph/graph_ops.def"
#undef CBN_OP
    CBN_OP_END_,
    CBN_OP_COUNT = CBN_OP_END_ - 1
};

typedef struct cbn_param {
    const char *name;
    const char *type;     /* as written: "Tensor", "Tensor?", "int[2]", "float", "bool", "str", "Any" */
    bool optional;        /* type ends with '?' : None is legal */
    bool keyword_only;
    bool has_default;
    bool variadic;        /* type ends with "...": the rest of the positional arguments, or one sequence of them */
    bool aliased, written; /* (a) or (a!); (a!) */
    cbn_value default_value; /* NONE, BOOL, INT, FLOAT, LIST of INT (the table's); NONE for a string: see default_str */
    const char *default_text; /* as written; NULL: no default */
    const char *default_str;  /* a string default without its quotes, else NULL */
} cbn_param;

typedef struct cbn_op {
    const char *name;   /* "aten.conv2d.default", "functional.conv2d", "operator.add", "method.view" */
    const char *schema; /* "(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, ...) -> Tensor" */
    cbn_effect effect;
    cbn_op_family family;
    int nd; /* spatial axes of the convolution and pooling rows, else 0 */
    const char *shape_rule; /* name of a rule in graph_shape.c, or "" */
    const char *doc;        /* one line, for the user */
    const char *returns;    /* "Tensor", "(Tensor, Tensor)" ... */
    int nreturns;           /* results of a tuple; 1: one value; -1: a list of unknown length */
    int nparams;
    cbn_param params[CBN_OP_MAX_ARGS];
} cbn_op;

/* The table with its parsed schemas: built once, immutable afterwards but for the handles. */
CBN_NODISCARD cbn_status cbn_op_table_new(cbn_op_table **out, cbn_error *err);
void cbn_op_table_free(cbn_op_table *t); /* handles are the owner's to release */
int cbn_op_table_count(const cbn_op_table *t); /* rows; opcodes are 1 .. count */
const cbn_op *cbn_op_table_row(const cbn_op_table *t, cbn_opcode code); /* NULL for 0 */
cbn_opcode cbn_op_table_find(const cbn_op_table *t, const char *name, size_t len); /* by full name; 0: none */
/* The host says: this callable is that row (several callables may be one row). The handle must stay alive. */
CBN_NODISCARD cbn_status cbn_op_table_register(cbn_op_table *t, cbn_host callable, cbn_opcode code, cbn_error *err);
cbn_opcode cbn_op_table_lookup(const cbn_op_table *t, cbn_host callable);             /* 0: unknown; t may be NULL */
cbn_opcode cbn_op_table_method(const cbn_op_table *t, const char *name, size_t len);  /* call_method targets */

/* The arguments of a node in the order of the schema, defaults filled in. Positions the call does not give and that
 * have no
 * default (or a default string) are tag CBN_V_NONE. given: the call has it. A variadic parameter has its values in
 * rest,
 * however they were passed (v is then the sequence, or the first of them). Borrowed values. */
typedef struct cbn_bound {
    const cbn_op *op;
    int n;
    cbn_value v[CBN_OP_MAX_ARGS];
    bool given[CBN_OP_MAX_ARGS];
    const cbn_value *rest;
    uint32_t nrest;
} cbn_bound;
/* CBN_BAD_TYPE naming the operator and the argument: unknown or doubled keyword, too many, a required one missing.
 * CBN_BAD_VALUE when the node's opcode is 0. */
CBN_NODISCARD cbn_status cbn_op_bind(const cbn_graph *g, cbn_node_id id, cbn_bound *out, cbn_error *err);
/* Position of a parameter by name, -1 if the row has none; the bound value, or NULL. */
int cbn_op_param(const cbn_op *op, const char *name);
const cbn_value *cbn_bound_get(const cbn_bound *b, const char *name);
/* Does this call write its argument i? (a!) arguments that are not None; the running statistics of a batch_norm whose
 * `training` is not the constant False. */
bool cbn_bound_writes(const cbn_bound *b, int i);
/* Is a constant False bound to `training` or `train`? */
bool cbn_bound_not_training(const cbn_bound *b);

/* Must a node be kept though nobody uses its value? placeholder and output: yes; rows that write or are impure or
 * random:
 * yes; batch_norm with training true (or not a constant): yes; an unknown callable or method: as torch.fx, no, unless
 * its
 * method name ends in a single '_'; call_module: training BatchNorm yes (needs `root`, the owning module or NULL),
 * else no. */
CBN_NODISCARD cbn_status cbn_node_impure(const cbn_graph *g, cbn_node_id id, cbn_host root, bool *out, cbn_error *err);
#endif
