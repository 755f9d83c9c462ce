/* SPDX-License-Identifier: BSD-3-Clause */
/* Inside the shape rules: what a rule is given, and how it reads its arguments. */
#ifndef CBN_SHAPE_PRIV_H
#define CBN_SHAPE_PRIV_H
#include "graph/graph_shape.h"

typedef struct cbn_shape_call {
    cbn_graph *g;
    cbn_host root;        /* may be NULL */
    const char *node;     /* name, for messages */
    const cbn_op *op;
    const cbn_bound *bound;
    cbn_tensor_meta out;  /* the rule's result */
    bool known;           /* set by a rule that filled `out` */
    cbn_error *err;
} cbn_shape_call;

typedef cbn_status (*cbn_shape_rule)(cbn_shape_call *c);
typedef struct cbn_shape_row {
    const char *name;
    cbn_shape_rule rule;
} cbn_shape_row;
/* Each ends with a NULL name. */
extern const cbn_shape_row cbn_shape_rules_layers[]; /* shape_layers.c */
extern const cbn_shape_row cbn_shape_rules_views[];  /* shape_views.c */

/* CBN_BAD_VALUE "node <name>: <text>". */
CBN_NODISCARD cbn_status cbn_shape_fail(cbn_shape_call *c, const char *fmt, ...) CBN_PRINTF(2, 3);
/* The bound value of a parameter; the first of two names that the row has; NULL: none. */
const cbn_value *cbn_shape_arg(const cbn_shape_call *c, const char *name);
/* Shape and dtype of an array argument (a node's value, or a constant array). *found false: not known, or no array. */
CBN_NODISCARD cbn_status cbn_shape_array(cbn_shape_call *c, const cbn_value *v, cbn_tensor_meta *out, bool *found);
/* The row's first argument. */
CBN_NODISCARD cbn_status cbn_shape_input(cbn_shape_call *c, cbn_tensor_meta *out, bool *found);
/* An int, or false (a node, None ...). */
bool cbn_shape_int(const cbn_value *v, int64_t *out);
bool cbn_shape_bool(const cbn_value *v, bool *out);
/* Ints of a list or tuple, or one int: the count, or -1 when they are not all constants or more than `room`. */
int cbn_shape_ints(const cbn_value *v, int64_t *out, int room);
/* Exactly n ints: one int (or a list of one) counts for all. False when not constant or of another length. */
bool cbn_shape_n_ints(const cbn_value *v, int n, int64_t *out);
/* The text of a string argument, or the row's default; NULL when it is something else. */
const char *cbn_shape_text(const cbn_shape_call *c, const char *name);
/* Done: this shape with the dtype of `like`. */
CBN_NODISCARD cbn_status cbn_shape_done(cbn_shape_call *c, const cbn_tensor_meta *like, int ndim, const int64_t *shape);
/* `dim` counted from the front, or CBN_BAD_VALUE naming the argument. A 0-d array takes 0 and -1. */
CBN_NODISCARD cbn_status cbn_shape_axis(cbn_shape_call *c, const char *name, int64_t dim, int ndim, int *out);
#endif
