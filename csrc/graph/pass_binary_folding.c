/* SPDX-License-Identifier: BSD-3-Clause */
/* One binary node with a constant on one side and a layer on the other: which fold it is, or the first reason
 * why not. */
#include "graph/pass_fold_layers.h"

#include <string.h>

/* ---- the operators ---- */

typedef enum { NOTHING, ADD, SUB, REVERSE_SUB, MUL, DIV, DIV_MODE } operation;
/* Who computes decides about dtypes: NumPy, torch's rules, or functions of floating arrays. */
typedef enum { OPERATOR, ATEN, FUNCTIONAL, METHOD } computes;
typedef struct operator_form {
    uint8_t operation, computes;
    bool in_place;
} operator_form;

static const operator_form forms[CBN_OP_COUNT + 1] = {
    [CBN_OP_OPERATOR_ADD] = {ADD, OPERATOR, false},
    [CBN_OP_OPERATOR_SUB] = {SUB, OPERATOR, false},
    [CBN_OP_OPERATOR_MUL] = {MUL, OPERATOR, false},
    [CBN_OP_OPERATOR_TRUEDIV] = {DIV, OPERATOR, false},
    [CBN_OP_OPERATOR_IADD] = {ADD, OPERATOR, true},
    [CBN_OP_OPERATOR_ISUB] = {SUB, OPERATOR, true},
    [CBN_OP_OPERATOR_IMUL] = {MUL, OPERATOR, true},
    [CBN_OP_OPERATOR_ITRUEDIV] = {DIV, OPERATOR, true},
    [CBN_OP_ATEN_ADD_TENSOR] = {ADD, ATEN, false},
    [CBN_OP_ATEN_ADD_SCALAR] = {ADD, ATEN, false},
    [CBN_OP_ATEN_ADD__TENSOR] = {ADD, ATEN, true},
    [CBN_OP_ATEN_ADD__SCALAR] = {ADD, ATEN, true},
    [CBN_OP_ATEN_SUB_TENSOR] = {SUB, ATEN, false},
    [CBN_OP_ATEN_SUB_SCALAR] = {SUB, ATEN, false},
    [CBN_OP_ATEN_SUB__TENSOR] = {SUB, ATEN, true},
    [CBN_OP_ATEN_SUB__SCALAR] = {SUB, ATEN, true},
    [CBN_OP_ATEN_MUL_TENSOR] = {MUL, ATEN, false},
    [CBN_OP_ATEN_MUL_SCALAR] = {MUL, ATEN, false},
    [CBN_OP_ATEN_MUL__TENSOR] = {MUL, ATEN, true},
    [CBN_OP_ATEN_MUL__SCALAR] = {MUL, ATEN, true},
    [CBN_OP_ATEN_DIV_TENSOR] = {DIV, ATEN, false},
    [CBN_OP_ATEN_DIV_SCALAR] = {DIV, ATEN, false},
    [CBN_OP_ATEN_DIV__TENSOR] = {DIV, ATEN, true},
    [CBN_OP_ATEN_DIV__SCALAR] = {DIV, ATEN, true},
    [CBN_OP_ATEN_DIV_TENSOR_MODE] = {DIV_MODE, ATEN, false},
    [CBN_OP_ATEN_RSUB_TENSOR] = {REVERSE_SUB, ATEN, false},
    [CBN_OP_ATEN_RSUB_SCALAR] = {REVERSE_SUB, ATEN, false},
    [CBN_OP_FUNCTIONAL_ADD] = {ADD, FUNCTIONAL, false},
    [CBN_OP_FUNCTIONAL_MUL] = {MUL, FUNCTIONAL, false},
    [CBN_OP_METHOD_ADD] = {ADD, METHOD, false},
    [CBN_OP_METHOD_SUB] = {SUB, METHOD, false},
    [CBN_OP_METHOD_MUL] = {MUL, METHOD, false},
    [CBN_OP_METHOD_DIV] = {DIV_MODE, METHOD, false},
    [CBN_OP_METHOD_ADD_] = {ADD, METHOD, true},
    [CBN_OP_METHOD_SUB_] = {SUB, METHOD, true},
    [CBN_OP_METHOD_MUL_] = {MUL, METHOD, true},
    [CBN_OP_METHOD_DIV_] = {DIV_MODE, METHOD, true},
};

/* ---- one interview ---- */

typedef struct interview {
    cbn_layer_folder *k;
    cbn_node_id id;
    operator_form form;
    cbn_bound b;
    bool layer_first;
    cbn_arith *how;
    cbn_arith_answer *out;
} interview;

static bool keep_it(interview *v, cbn_freeze_reason reason, cbn_node_id blocking, const char *hint) {
    v->out->reason = reason;
    v->out->blocking = blocking;
    v->out->hint = hint;
    return true;
}

static cbn_status operand_of_host(interview *v, cbn_host h, cbn_operand *out) {
    return v->k->host->operand(v->k->host->arg, h, out, v->k->err);
}

static cbn_status read_operand(interview *v, const cbn_value *value, cbn_operand *out) {
    *out = (cbn_operand){.what = CBN_OPERAND_OTHER};
    switch (value->tag) {
    case CBN_V_BOOL:
    case CBN_V_INT:
    case CBN_V_FLOAT:
        out->what = CBN_OPERAND_NUMBER;
        out->number = value->tag == CBN_V_FLOAT ? value->u.f
                      : value->tag == CBN_V_INT ? (double)value->u.i
                                                : (double)value->u.b;
        return CBN_OK;
    case CBN_V_HOST: return operand_of_host(v, value->u.host, out);
    case CBN_V_NODE: break;
    default:
        if (value->has_nodes) out->what = CBN_OPERAND_NONE;
        return CBN_OK;
    }
    const cbn_node *n = cbn_graph_node(v->k->g, value->u.node);
    out->what = CBN_OPERAND_NONE;
    if (n->op != CBN_NODE_GET_ATTR || n->target.tag != CBN_V_STR || v->k->f->root == NULL) return CBN_OK;
    cbn_host h;
    CBN_TRY(v->k->c.vt->resolve(v->k->f->root, cbn_graph_str(v->k->g, n->target.u.str, NULL), &h, v->k->err));
    if (h != NULL) CBN_TRY(operand_of_host(v, h, out));
    out->node = value->u.node;
    return CBN_OK;
}

typedef enum { IS_NOTHING, IS_LAYER, IS_CHAIN } producer;

/* What makes the other side: a layer; a BatchNorm or arithmetic that was not folded (there one is expected); other. */
static cbn_status producer_of(interview *v, cbn_node_id id, producer *out) {
    cbn_pair_context *c = &v->k->c;
    const cbn_node *n = cbn_graph_node(c->g, id);
    *out = IS_NOTHING;
    if (n->op == CBN_NODE_CALL_MODULE) {
        CBN_TRY(cbn_layer_read_module(c, id, &c->conv));
        const cbn_module_kind kind = c->conv.m.kind;
        *out = kind == CBN_MODULE_OTHER ? IS_NOTHING : kind == CBN_MODULE_BATCH_NORM ? IS_CHAIN : IS_LAYER;
        return CBN_OK;
    }
    switch (cbn_node_family(c, n)) {
    case CBN_FAMILY_LINEAR:
    case CBN_FAMILY_CONV:
    case CBN_FAMILY_CONV_TRANSPOSE:
    case CBN_FAMILY_CONVOLUTION: *out = IS_LAYER; return CBN_OK;
    case CBN_FAMILY_BATCH_NORM: *out = IS_CHAIN; return CBN_OK;
    case CBN_FAMILY_GETITEM:
        if (n->args->nargs > 0 && n->args->v[0].tag == CBN_V_NODE &&
            cbn_node_family(c, cbn_graph_node(c->g, n->args->v[0].u.node)) == CBN_FAMILY_BATCH_NORM_TUPLE) {
            *out = IS_CHAIN;
        }
        return CBN_OK;
    default:
        if (cbn_folder_flags(v->k, id) & CBN_FOLDER_ROW) *out = IS_CHAIN;
        return CBN_OK;
    }
}

/* Which side is the layer, which the constant. Sets out->expected. */
static cbn_status ask_sides(interview *v, producer *what) {
    for (int side = 0; side < 2; side++) {
        const cbn_value *value = &v->b.v[side];
        if (value->tag != CBN_V_NODE) continue;
        CBN_TRY(producer_of(v, value->u.node, what));
        if (*what == IS_NOTHING) continue;
        CBN_TRY(read_operand(v, &v->b.v[1 - side], &v->how->c));
        if (v->how->c.what == CBN_OPERAND_NONE) continue;
        v->layer_first = side == 0;
        v->how->layer = value->u.node;
        v->out->expected = true;
        return CBN_OK;
    }
    return CBN_OK;
}

/* ---- the operator ---- */

/* A number; false: not one that is known and that the operators take. */
static cbn_status read_alpha(interview *v, bool *known) {
    *known = true;
    v->how->alpha = 1.0;
    const cbn_value *value = cbn_bound_get(&v->b, "alpha");
    if (value == NULL || value->tag == CBN_V_NONE) return CBN_OK;
    cbn_operand alpha;
    CBN_TRY(read_operand(v, value, &alpha));
    *known = alpha.what == CBN_OPERAND_NUMBER || alpha.python_float;
    v->how->alpha = alpha.number;
    return CBN_OK;
}

static bool given_value(const interview *v, const char *name) {
    const cbn_value *value = cbn_bound_get(&v->b, name);
    return value != NULL && value->tag != CBN_V_NONE;
}

static cbn_status ask_operator(interview *v, bool *done) {
    static const char raises[] = "the call raises: the operator does not take such an operand";
    const cbn_operand *c = &v->how->c;
    if (v->form.in_place || given_value(v, "out")) return *done = keep_it(v, CBN_FREEZE_IN_PLACE, 0, NULL), CBN_OK;
    if (v->form.computes == METHOD) {
        return *done = keep_it(v, CBN_FREEZE_UNSUPPORTED, 0, "the call raises: arrays have no such method"), CBN_OK;
    }
    bool known;
    CBN_TRY(read_alpha(v, &known));
    if (!known) return *done = keep_it(v, CBN_FREEZE_UNSUPPORTED, 0, "alpha is not a constant number"), CBN_OK;
    if (c->what == CBN_OPERAND_OTHER) return *done = keep_it(v, CBN_FREEZE_UNSUPPORTED, c->node, NULL), CBN_OK;
    const bool number = c->what == CBN_OPERAND_NUMBER;
    if (number && (v->form.computes == FUNCTIONAL || (v->form.computes == ATEN && !v->layer_first))) {
        return *done = keep_it(v, CBN_FREEZE_UNSUPPORTED, 0, raises), CBN_OK;
    }
    const operation op = v->form.operation;
    const bool rounds = op == DIV_MODE && given_value(v, "rounding_mode");
    if (rounds || ((op == DIV || op == DIV_MODE) && !v->layer_first)) {
        return *done = keep_it(v, CBN_FREEZE_NOT_LINEAR, 0, NULL), CBN_OK;
    }
    const double alpha = v->how->alpha;
    switch (op) {
    case MUL: v->how->kind = CBN_ARITH_SCALE; break;
    case DIV:
    case DIV_MODE: v->how->kind = CBN_ARITH_DIVIDE; break;
    case REVERSE_SUB: /* other - alpha * self */
        v->how->kind = v->layer_first ? CBN_ARITH_REVERSE : CBN_ARITH_SHIFT;
        v->how->alpha = -alpha;
        break;
    default: /* self +- alpha * other */
        v->how->kind = v->layer_first ? CBN_ARITH_SHIFT : CBN_ARITH_REVERSE;
        v->how->alpha = op == SUB ? -alpha : alpha;
    }
    return CBN_OK;
}

/* ---- the layer ---- */

static bool given(const cbn_layer *l, const char *name) {
    const cbn_value *value = cbn_layer_arg(l, name);
    return value != NULL && value->tag != CBN_V_NONE;
}

/* Reads the layer into k->c.conv. */
static cbn_status ask_layer(interview *v, bool *done) {
    cbn_pair_context *c = &v->k->c;
    const cbn_node_id id = v->how->layer;
    cbn_layer *l = &c->conv;
    const char *hint = NULL;
    const cbn_node *n = cbn_graph_node(c->g, id);
    v->how->of = (cbn_fold_layer){.groups = 1};
    if (n->op == CBN_NODE_CALL_MODULE) {
        CBN_TRY(cbn_layer_read_module(c, id, l));
        if (l->m.training) return *done = keep_it(v, CBN_FREEZE_TRAINING, id, NULL), CBN_OK;
        if (l->m.hooked) return *done = keep_it(v, CBN_FREEZE_HOOKED, id, NULL), CBN_OK;
        v->how->of.linear = l->m.kind == CBN_MODULE_LINEAR;
        v->how->of.groups = l->m.groups;
    } else {
        bool fits;
        l->family = cbn_node_family(c, n);
        CBN_TRY(cbn_layer_bind(c, id, l, &fits));
        if (!fits) hint = "the arguments of the layer do not fit the operator's schema";
        else if (given(l, "out")) hint = "the layer writes into out=";
        if (hint == NULL) {
            l->nd = l->family == CBN_FAMILY_CONVOLUTION ? -1 : l->b.op->nd;
            int transposed = l->family == CBN_FAMILY_CONV_TRANSPOSE;
            if (l->family == CBN_FAMILY_CONVOLUTION) transposed = cbn_constant_truth(cbn_layer_arg(l, "transposed"));
            l->transposed = transposed == 1;
            const cbn_value *groups = cbn_layer_arg(l, "groups");
            if (transposed < 0 || (groups != NULL && groups->tag != CBN_V_INT)) {
                hint = "the layer's arguments are computed at run time";
            } else if (groups != NULL) {
                v->how->of.groups = groups->u.i;
            }
        }
        v->how->of.linear = l->family == CBN_FAMILY_LINEAR;
    }
    if (hint != NULL) return *done = keep_it(v, CBN_FREEZE_UNSUPPORTED, id, hint), CBN_OK;
    v->how->of.transposed = l->transposed;
    return CBN_OK;
}

static bool ask_users(interview *v) {
    const cbn_node *n = cbn_graph_node(v->k->g, v->how->layer);
    for (uint32_t e = n->first_user; e != 0; e = cbn_graph_edge(v->k->g, e)->next_user) {
        const cbn_node_id user = cbn_graph_edge(v->k->g, e)->user;
        if (user != v->id) return keep_it(v, CBN_FREEZE_MULTI_USER, user, NULL);
    }
    return false;
}

/* The weights: constants of one floating dtype, with as many axes and channels as the layer needs. */
static cbn_status ask_weights(interview *v, bool *done) {
    cbn_pair_context *c = &v->k->c;
    cbn_fold_layer *of = &v->how->of;
    const cbn_node_id id = v->how->layer;
    CBN_TRY(cbn_conv_params_read(c));
    const cbn_pair_param *w = &c->p[P_WEIGHT], *b = &c->p[P_BIAS];
    for (int i = P_WEIGHT; i <= P_BIAS; i++) {
        const cbn_pair_param *p = &c->p[i];
        if (p->state == PARAM_RUN_TIME) {
            *done = keep_it(v, CBN_FREEZE_NONCONST, p->node, "the layer's parameters are computed at run time");
            return CBN_OK;
        }
        const bool fits = p->known && p->kind == 'f' && p->itemsize <= 8 && p->itemsize == w->itemsize;
        if (p->state == PARAM_CONSTANT && !fits) {
            return *done = keep_it(v, CBN_FREEZE_DTYPE, p->node != 0 ? p->node : id, NULL), CBN_OK;
        }
    }
    static const char misfit[] = "the layer's weight and bias do not fit each other";
    if (c->conv.nd < 0) c->conv.nd = w->ndim - 2;
    const int nd = c->conv.nd;
    bool right = w->state == PARAM_CONSTANT && w->ndim == nd + 2 && nd <= CBN_MAX_SPATIAL && (nd > 0 || of->linear);
    if (right && of->transposed) {
        right = of->groups > 0 && w->shape[0] % of->groups == 0 &&
               !__builtin_mul_overflow(w->shape[1], of->groups, &of->channels);
    } else if (right) {
        of->channels = w->shape[0];
        right = of->groups > 0 && w->shape[0] % of->groups == 0;
    }
    right = right && (b->state == PARAM_ABSENT || (b->ndim == 1 && b->shape[0] == of->channels));
    if (!right) return *done = keep_it(v, CBN_FREEZE_UNSUPPORTED, id, misfit), CBN_OK;
    of->weight = w->array;
    of->bias = b->state == PARAM_CONSTANT ? b->array : NULL;
    return CBN_OK;
}

/* ---- memory ---- */

static cbn_status ask_one_memory(interview *v, cbn_node_id node, cbn_host array, bool *done) {
    cbn_effects *e = v->k->c.effects;
    cbn_node_id writer = 0;
    bool returned = false;
    if (node != 0) {
        writer = cbn_effects_writer(e, node, 0, 0);
        returned = cbn_effects_returned(e, node);
    } else {
        CBN_TRY(cbn_effects_array_writer(e, array, 0, 0, &writer, v->k->err));
        CBN_TRY(cbn_effects_array_returned(e, array, &returned, v->k->err));
    }
    if (writer != 0) *done = keep_it(v, CBN_FREEZE_MUTATED, writer, NULL);
    else if (returned) *done = keep_it(v, CBN_FREEZE_ALIASES_OUTPUT, node, NULL);
    return CBN_OK;
}

static cbn_status ask_memory(interview *v, bool *done) {
    cbn_layer_folder *k = v->k;
    if (k->c.effects == NULL) CBN_TRY(cbn_effects_build(k->g, k->f->root, &k->c.effects, k->err));
    for (int i = P_WEIGHT; i <= P_BIAS && !*done; i++) {
        const cbn_pair_param *p = &k->c.p[i];
        if (p->state == PARAM_CONSTANT) CBN_TRY(ask_one_memory(v, p->node, p->array, done));
    }
    const cbn_operand *o = &v->how->c;
    if (!*done && o->what == CBN_OPERAND_ARRAY) CBN_TRY(ask_one_memory(v, o->node, o->host, done));
    return CBN_OK;
}

static cbn_status ask_shared(interview *v, bool *done) {
    cbn_layer_folder *k = v->k;
    const cbn_pair_param *w = &k->c.p[P_WEIGHT];
    if (cbn_folder_flags(k, w->node) & CBN_FOLDER_MADE) return CBN_OK;
    if (!k->uses.built) CBN_TRY(cbn_memory_uses_build(&k->uses, k->g, k->f->root, k->err));
    cbn_array_info info;
    bool is_array;
    CBN_TRY(k->c.vt->array(w->array, &info, &is_array, k->err));
    cbn_node_id who;
    if (!is_array || info.lo == info.hi) return CBN_OK;
    const cbn_node_id own = w->node != 0 ? w->node : v->how->layer;
    if (cbn_memory_uses_count(&k->uses, k->g, info.lo, own, &who) <= 1) return CBN_OK;
    cbn_node_id other = 0; /* the first one: thousands may share a weight */
    for (uint32_t e = w->node == 0 ? 0 : cbn_graph_node(k->g, w->node)->first_user; other == 0 && e != 0;
         e = cbn_graph_edge(k->g, e)->next_user) {
        if (cbn_graph_edge(k->g, e)->user != v->how->layer) other = cbn_graph_edge(k->g, e)->user;
    }
    if (other != 0) who = other;
    k->shared = true;
    *done = keep_it(v, CBN_FREEZE_WEIGHT_SHARED, who, NULL);
    return CBN_OK;
}

/* ---- dtype and shape ---- */

/* Does a floating array of `itemsize` bytes keep its dtype beside the constant? Promotion is NumPy 2's. */
static bool keeps_dtype(const interview *v, int itemsize) {
    const cbn_operand *c = &v->how->c;
    if (c->what == CBN_OPERAND_NUMBER) return true;
    if (v->form.computes == ATEN && v->layer_first && c->python_float) return true;
    if (c->kind == 'f') return c->itemsize <= itemsize;
    if (c->kind == 'b') return true;
    if (c->kind != 'i' && c->kind != 'u') return false;
    /* torch's rule beside floating numbers; NumPy's: the smallest floating dtype that holds the integers */
    return v->form.computes == ATEN || itemsize >= CBN_MIN(2 * c->itemsize, 8);
}

static bool ask_dtype(interview *v) {
    const cbn_operand *c = &v->how->c;
    const int itemsize = v->k->c.p[P_WEIGHT].itemsize;
    const bool array = c->what == CBN_OPERAND_ARRAY;
    v->how->itemsize = (uint8_t)itemsize;
    if (array && memchr("fbiuc", c->kind, 5) == NULL) return keep_it(v, CBN_FREEZE_UNSUPPORTED, c->node, NULL);
    if (v->form.computes == FUNCTIONAL) {
        if (c->kind != 'f' || c->itemsize != itemsize) return keep_it(v, CBN_FREEZE_DTYPE, c->node, NULL);
        v->how->itemsize = 8; /* alpha is not rounded */
        return false;
    }
    if (!keeps_dtype(v, itemsize)) return keep_it(v, CBN_FREEZE_DTYPE_CHANGES, c->node, NULL);
    const bool narrow = array && c->kind == 'f' && c->itemsize < itemsize;
    if (v->how->kind == CBN_ARITH_SHIFT && narrow) v->how->itemsize = c->itemsize; /* alpha * c is of c's dtype */
    return false;
}

static bool ask_shape_linear(interview *v, int rank) {
    const cbn_operand *c = &v->how->c;
    if (c->ndim > (rank < 0 ? 2 : rank)) return keep_it(v, CBN_FREEZE_RANK_CHANGES, c->node, NULL);
    bool fits = c->ndim <= 2;
    for (int i = 0; fits && i < c->ndim; i++) {
        fits = c->shape[i] == 1 || (i == c->ndim - 1 && c->shape[i] == v->how->of.channels);
    }
    if (!fits) return keep_it(v, CBN_FREEZE_SHAPE_MISMATCH, c->node, NULL);
    if (c->ndim == 2 && rank < 0) return keep_it(v, CBN_FREEZE_SHAPE_UNKNOWN, v->how->layer, NULL);
    return false;
}

static bool ask_shape_conv(interview *v, int rank) {
    const cbn_operand *c = &v->how->c;
    const int full = v->k->c.conv.nd + 2;
    if (c->ndim > full || (rank >= 0 && c->ndim > rank)) return keep_it(v, CBN_FREEZE_RANK_CHANGES, c->node, NULL);
    const int channel = c->ndim - (full - 1); /* axis of the channels; negative: all axes are spatial */
    for (int i = 0; i < c->ndim; i++) {
        if (c->shape[i] != 1 && (i != channel || c->shape[i] != v->how->of.channels)) {
            return keep_it(v, CBN_FREEZE_SHAPE_MISMATCH, c->node, NULL);
        }
    }
    return false;
}

static bool ask_shape(interview *v) {
    if (v->how->c.what == CBN_OPERAND_NUMBER || v->how->c.ndim == 0) return false;
    const cbn_tensor_meta *t = cbn_graph_node(v->k->g, v->how->layer)->tensor;
    const int rank = t != NULL ? t->ndim : -1;
    return v->how->of.linear ? ask_shape_linear(v, rank) : ask_shape_conv(v, rank);
}

/* ---- all of them ---- */

#define ASK(expr)                                                                                                      \
    do {                                                                                                               \
        bool ask_done_ = false;                                                                                        \
        CBN_TRY(expr);                                                                                                 \
        if (ask_done_) return CBN_OK;                                                                                  \
    } while (0)

cbn_status cbn_arith_interview(cbn_layer_folder *k, cbn_node_id id, cbn_arith *how, cbn_arith_answer *out) {
    *out = (cbn_arith_answer){.reason = CBN_FREEZE_OK};
    const cbn_node *n = cbn_graph_node(k->g, id);
    if ((n->op != CBN_NODE_CALL_FUNCTION && n->op != CBN_NODE_CALL_METHOD) || n->opcode > CBN_OP_COUNT) return CBN_OK;
    interview v = {.k = k, .id = id, .form = forms[n->opcode], .how = how, .out = out};
    if (v.form.operation == NOTHING) return CBN_OK;
    const cbn_status bound = cbn_op_bind(k->g, id, &v.b, k->err);
    if (bound == CBN_BAD_TYPE || bound == CBN_BAD_VALUE) return CBN_OK; /* the call raises */
    CBN_TRY(bound);
    producer what = IS_NOTHING;
    CBN_TRY(ask_sides(&v, &what));
    if (!out->expected) return CBN_OK;
    ASK(ask_operator(&v, &ask_done_));
    if (what == IS_CHAIN) {
        keep_it(&v, CBN_FREEZE_NO_LAYER, how->layer, NULL);
        return CBN_OK;
    }
    ASK(ask_layer(&v, &ask_done_));
    if (ask_users(&v)) return CBN_OK;
    ASK(ask_weights(&v, &ask_done_));
    ASK(ask_memory(&v, &ask_done_));
    ASK(ask_shared(&v, &ask_done_));
    if (ask_dtype(&v) || ask_shape(&v)) return CBN_OK;
    if (k->c.conv.module) {
        out->module = true;
        keep_it(&v, CBN_FREEZE_UNSUPPORTED, how->layer, "the layer is a module that cannot be written as an operator");
    }
    return CBN_OK;
}
