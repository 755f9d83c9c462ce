/* SPDX-License-Identifier: BSD-3-Clause */
/* Convolutions, linear layers and what is left of BatchNorm become prepared layers, which the host makes.
 *
 * The list is walked backwards, so that of two convolutions that are added the later one takes the other's result as its
 * residual. A layer takes in an addition and an activation behind it where each is the only user of what stands before it;
 * it then stands where the last of them stood, and keeps the node (id and name) of the convolution. */
#include <math.h>
#include <string.h>

#include "base/cbn_alloc.h"
#include "graph/passes.h"

typedef struct planner {
    cbn_freeze *f;
    cbn_graph *g;
    const cbn_host_vtable *vt;
    const cbn_plans_host *host;
    cbn_effects *effects;
    uint8_t *used; /* by node id: a constant that a layer has taken in */
    uint32_t slots;
    cbn_str residual; /* "residual" */
} planner;

/* Why a node stays. */
typedef struct refusal {
    cbn_freeze_reason reason; /* OK: it does not */
    cbn_node_id blocking;
    const char *hint;
} refusal;

static void refuse(refusal *r, cbn_freeze_reason reason, cbn_node_id blocking, const char *hint) {
    *r = (refusal){reason, blocking, hint};
}

/* ---- constants --------------------------------------------------------------------------------------------------- */
typedef struct constant {
    cbn_host array; /* NULL: None, or not given */
    cbn_array_info info;
} constant;

static cbn_status literal_constant(planner *p, cbn_host h, constant *out, refusal *why) {
    bool is_array;
    CBN_TRY(p->vt->array(h, &out->info, &is_array, p->f->err));
    if (!is_array) {
        refuse(why, CBN_FREEZE_NOT_ARRAY, 0, NULL);
        return CBN_OK;
    }
    cbn_node_id writer;
    CBN_TRY(cbn_effects_array_writer(p->effects, h, 0, 0, &writer, p->f->err));
    bool returned;
    CBN_TRY(cbn_effects_array_returned(p->effects, h, &returned, p->f->err));
    if (writer != 0) refuse(why, CBN_FREEZE_MUTATED, writer, NULL);
    else if (returned) refuse(why, CBN_FREEZE_ALIASES_OUTPUT, cbn_graph_output(p->g), NULL);
    out->array = h;
    return CBN_OK;
}

/* An array argument that is known now and stays as it is; `why` says why not. */
static cbn_status read_constant(planner *p, const cbn_value *v, constant *out, refusal *why) {
    *out = (constant){0};
    if (v == NULL || v->tag == CBN_V_NONE || why->reason != CBN_FREEZE_OK) return CBN_OK;
    if (v->tag == CBN_V_HOST) return literal_constant(p, v->u.host, out, why);
    if (v->tag != CBN_V_NODE) {
        refuse(why, CBN_FREEZE_NOT_ARRAY, 0, NULL);
        return CBN_OK;
    }
    const cbn_node_id id = v->u.node;
    const cbn_node *n = cbn_graph_node(p->g, id);
    if (n->op != CBN_NODE_GET_ATTR || p->f->root == NULL) {
        refuse(why, CBN_FREEZE_NONCONST, id, NULL);
        return CBN_OK;
    }
    cbn_host h;
    bool is_array = false;
    cbn_graph_lock(p->g);
    cbn_status status = cbn_freeze_resolve(p->f, id, &h);
    if (status == CBN_OK && h != NULL) status = p->vt->array(h, &out->info, &is_array, p->f->err);
    cbn_graph_unlock(p->g);
    if (status != CBN_OK) return status;
    if (!is_array) refuse(why, CBN_FREEZE_NOT_ARRAY, id, NULL);
    else if (cbn_effects_written(p->effects, id)) refuse(why, CBN_FREEZE_MUTATED, id, NULL);
    else if (cbn_effects_returned(p->effects, id)) refuse(why, CBN_FREEZE_ALIASES_OUTPUT, id, NULL);
    out->array = h;
    return CBN_OK;
}

static bool floating(char kind, uint8_t itemsize) {
    return kind == 'f' && (itemsize == 2 || itemsize == 4 || itemsize == 8);
}

static bool number(const cbn_value *v, double *out) {
    if (v == NULL) return false;
    if (v->tag == CBN_V_FLOAT) *out = v->u.f;
    else if (v->tag == CBN_V_INT) *out = (double)v->u.i;
    else return false;
    return true;
}

static bool is_number(const cbn_value *v, double wanted) {
    double x;
    return number(v, &x) && x == wanted;
}

static bool absent(const cbn_bound *b, const char *name) {
    const cbn_value *v = cbn_bound_get(b, name);
    return v == NULL || v->tag == CBN_V_NONE;
}

/* ---- what stands behind a layer ---------------------------------------------------------------------------------- */
static const struct { cbn_opcode code; cbn_plan_activation activation; } activations[] = {
    {CBN_OP_FUNCTIONAL_RELU, CBN_PLAN_RELU},
    {CBN_OP_ATEN_RELU_DEFAULT, CBN_PLAN_RELU},
    {CBN_OP_ATEN_RELU__DEFAULT, CBN_PLAN_RELU},
    {CBN_OP_METHOD_RELU, CBN_PLAN_RELU},
    {CBN_OP_METHOD_RELU_, CBN_PLAN_RELU},
    {CBN_OP_FUNCTIONAL_RELU6, CBN_PLAN_RELU6},
    {CBN_OP_ATEN_RELU6_DEFAULT, CBN_PLAN_RELU6},
    {CBN_OP_ATEN_RELU6__DEFAULT, CBN_PLAN_RELU6},
    {CBN_OP_FUNCTIONAL_HARDTANH, CBN_PLAN_RELU6}, /* from 0 to 6 */
    {CBN_OP_ATEN_HARDTANH_DEFAULT, CBN_PLAN_RELU6},
    {CBN_OP_ATEN_HARDTANH__DEFAULT, CBN_PLAN_RELU6},
    {CBN_OP_FUNCTIONAL_LEAKY_RELU, CBN_PLAN_LEAKY_RELU},
    {CBN_OP_ATEN_LEAKY_RELU_DEFAULT, CBN_PLAN_LEAKY_RELU},
    {CBN_OP_ATEN_LEAKY_RELU__DEFAULT, CBN_PLAN_LEAKY_RELU},
    {CBN_OP_FUNCTIONAL_SIGMOID, CBN_PLAN_SIGMOID},
    {CBN_OP_ATEN_SIGMOID_DEFAULT, CBN_PLAN_SIGMOID},
    {CBN_OP_ATEN_SIGMOID__DEFAULT, CBN_PLAN_SIGMOID},
    {CBN_OP_METHOD_SIGMOID, CBN_PLAN_SIGMOID},
    {CBN_OP_METHOD_SIGMOID_, CBN_PLAN_SIGMOID},
    {CBN_OP_FUNCTIONAL_HARDSWISH, CBN_PLAN_HARDSWISH},
    {CBN_OP_ATEN_HARDSWISH_DEFAULT, CBN_PLAN_HARDSWISH},
    {CBN_OP_ATEN_HARDSWISH__DEFAULT, CBN_PLAN_HARDSWISH},
    {CBN_OP_FUNCTIONAL_SILU, CBN_PLAN_SILU},
    {CBN_OP_ATEN_SILU_DEFAULT, CBN_PLAN_SILU},
    {CBN_OP_ATEN_SILU__DEFAULT, CBN_PLAN_SILU},
};

/* Is node `id` an activation of `of`, of a kind that a plan applies? */
static bool read_activation(const planner *p, cbn_node_id id, cbn_node_id of, cbn_plan_request *r) {
    const cbn_opcode code = cbn_graph_node(p->g, id)->opcode;
    size_t i = 0;
    const size_t n = sizeof activations / sizeof *activations;
    while (i < n && activations[i].code != code) i++;
    cbn_bound b;
    cbn_error ignored;
    if (code == 0 || i == n || cbn_op_bind(p->g, id, &b, &ignored) != CBN_OK) return false;
    if (b.v[0].tag != CBN_V_NODE || b.v[0].u.node != of || !absent(&b, "out")) return false;
    const cbn_plan_activation kind = activations[i].activation;
    double slope = 0.0;
    if (kind == CBN_PLAN_LEAKY_RELU && !(number(cbn_bound_get(&b, "negative_slope"), &slope) && isfinite(slope))) {
        return false;
    }
    if (cbn_op_param(b.op, "min_val") >= 0 &&
        !(is_number(cbn_bound_get(&b, "min_val"), 0.0) && is_number(cbn_bound_get(&b, "max_val"), 6.0))) {
        return false;
    }
    r->activation = kind;
    r->slope = slope;
    return true;
}

/* Is node `id` the sum of `of` and an array of its very shape and dtype? That other array, else 0. */
static cbn_node_id read_sum(const planner *p, cbn_node_id id, cbn_node_id of) {
    const cbn_opcode code = cbn_graph_node(p->g, id)->opcode;
    const bool plain = code == CBN_OP_OPERATOR_ADD || code == CBN_OP_ATEN_ADD_TENSOR ||
                       code == CBN_OP_FUNCTIONAL_ADD || code == CBN_OP_METHOD_ADD;
    const bool in_place = code == CBN_OP_OPERATOR_IADD || code == CBN_OP_ATEN_ADD__TENSOR ||
                          code == CBN_OP_METHOD_ADD_;
    cbn_bound b;
    cbn_error ignored;
    if ((!plain && !in_place) || cbn_op_bind(p->g, id, &b, &ignored) != CBN_OK) return 0;
    if (b.n < 2 || b.v[0].tag != CBN_V_NODE || b.v[1].tag != CBN_V_NODE || !absent(&b, "out")) return 0;
    const cbn_value *alpha = cbn_bound_get(&b, "alpha");
    if (alpha != NULL && !is_number(alpha, 1.0)) return 0;
    const cbn_node_id first = b.v[0].u.node, second = b.v[1].u.node;
    if (first == second || (first != of && second != of)) return 0;
    if (in_place && first != of) return 0; /* it writes the other one */
    const cbn_node_id other = first == of ? second : first;
    const cbn_tensor_meta *x = cbn_graph_node(p->g, of)->tensor, *y = cbn_graph_node(p->g, other)->tensor;
    if (x == NULL || y == NULL || x->ndim < 0 || x->ndim != y->ndim) return 0;
    if (x->kind != 'f' || y->kind != 'f' || x->itemsize != y->itemsize) return 0;
    return memcmp(x->shape, y->shape, (size_t)x->ndim * sizeof *x->shape) == 0 ? other : 0;
}

/* What the layer takes in. Its inputs are read where `last` stands, so nothing may write them before. */
typedef struct chain {
    cbn_node_id sum, activation, residual, last;
} chain;

static void find_chain(const planner *p, cbn_node_id id, cbn_node_id x, cbn_plan_request *r, chain *c) {
    *c = (chain){.last = id};
    r->activation = CBN_PLAN_NO_ACTIVATION;
    cbn_node_id next = cbn_node_single_user(p->g, id);
    if (next != 0 && r->kind != CBN_PLAN_BATCH_NORM) {
        const cbn_node_id other = read_sum(p, next, id);
        if (other != 0 && cbn_effects_writer(p->effects, x, id, next) == 0) {
            c->sum = c->last = next;
            c->residual = other;
            next = cbn_node_single_user(p->g, next);
        }
    }
    if (next == 0 || !read_activation(p, next, c->last, r)) return;
    if (cbn_effects_writer(p->effects, x, id, next) != 0 ||
        (c->residual != 0 && cbn_effects_writer(p->effects, c->residual, c->sum, next) != 0)) {
        r->activation = CBN_PLAN_NO_ACTIVATION;
        return;
    }
    c->activation = c->last = next;
}

/* ---- which calls ------------------------------------------------------------------------------------------------- */
/* The dtype of the input, if known, must be that of the constants. */
static const char unknown_dtype[] =
    "the dtype of its input is not known: pass example_inputs, or run fx.shape_prop(gm, example) first";
static void check_input(cbn_node_id x, const cbn_plan_request *r, bool must_know, refusal *why) {
    if (why->reason != CBN_FREEZE_OK) return;
    if (r->input == NULL) {
        if (must_know) refuse(why, CBN_FREEZE_SHAPE_UNKNOWN, x, unknown_dtype);
        return;
    }
    if (r->input->kind != 'f' || r->input->itemsize != r->itemsize) refuse(why, CBN_FREEZE_DTYPE, x, NULL);
}

static bool constant_geometry(const cbn_bound *b) {
    for (int i = 3; i < b->n; i++) {
        if (b->v[i].has_nodes) return false;
    }
    return true;
}

static cbn_status read_layer(planner *p, cbn_plan_request *r, constant c[4], refusal *why) {
    const cbn_bound *b = r->call;
    CBN_TRY(read_constant(p, cbn_bound_get(b, "weight"), &c[0], why));
    CBN_TRY(read_constant(p, cbn_bound_get(b, "bias"), &c[1], why));
    if (why->reason != CBN_FREEZE_OK) return CBN_OK;
    r->itemsize = c[0].info.itemsize;
    if (c[0].array == NULL) refuse(why, CBN_FREEZE_NONCONST, 0, NULL);
    else if (!absent(b, "out")) refuse(why, CBN_FREEZE_IN_PLACE, 0, "it writes its result into an array that is there");
    else if (!floating(c[0].info.kind, r->itemsize)) refuse(why, CBN_FREEZE_DTYPE, 0, NULL);
    else if (c[1].array != NULL && (c[1].info.kind != 'f' || c[1].info.itemsize != r->itemsize))
        refuse(why, CBN_FREEZE_DTYPE, 0, NULL);
    else if (!constant_geometry(b))
        refuse(why, CBN_FREEZE_NONCONST, 0, "stride, padding or the like is computed at run time");
    if (why->reason == CBN_FREEZE_OK) check_input(r->x, r, false, why);
    return CBN_OK;
}

/* x @ weight, with or without a bias: only where the second factor is a constant matrix; *candidate false otherwise. */
static cbn_status read_product(planner *p, cbn_plan_request *r, constant c[4], refusal *why, bool *candidate) {
    const cbn_bound *b = r->call;
    const bool sum = cbn_op_param(b->op, "mat1") >= 0;
    *candidate = false;
    if (b->n < 2 + sum) return CBN_OK;
    CBN_TRY(read_constant(p, &b->v[1 + sum], &c[0], why));
    if (why->reason != CBN_FREEZE_OK || c[0].array == NULL || c[0].info.ndim != 2 || c[0].info.kind != 'f') return CBN_OK;
    *candidate = true;
    r->itemsize = c[0].info.itemsize;
    if (!floating('f', r->itemsize)) refuse(why, CBN_FREEZE_DTYPE, 0, NULL);
    if (sum) {
        CBN_TRY(read_constant(p, &b->v[0], &c[1], why));
        if (why->reason != CBN_FREEZE_OK) return CBN_OK;
        if (c[1].info.kind != 'f' || c[1].info.itemsize != r->itemsize) refuse(why, CBN_FREEZE_DTYPE, 0, NULL);
        else if (c[1].info.ndim != 1 || c[1].info.shape[0] != c[0].info.shape[1])
            refuse(why, CBN_FREEZE_SHAPE_MISMATCH, 0, NULL);
        else if (!is_number(cbn_bound_get(b, "beta"), 1.0) || !is_number(cbn_bound_get(b, "alpha"), 1.0))
            refuse(why, CBN_FREEZE_UNSUPPORTED, 0, "alpha and beta other than 1");
    }
    check_input(r->x, r, true, why);
    return CBN_OK;
}

static cbn_status read_batch_norm(planner *p, cbn_plan_request *r, constant c[4], refusal *why) {
    static const char *const names[4] = {"weight", "bias", "running_mean", "running_var"};
    const cbn_bound *b = r->call;
    if (b->op->family == CBN_FAMILY_BATCH_NORM_TUPLE) {
        refuse(why, CBN_FREEZE_UNSUPPORTED, 0, "a BatchNorm that gives a tuple");
        return CBN_OK;
    }
    if (!cbn_bound_not_training(b)) {
        refuse(why, CBN_FREEZE_TRAINING, 0, NULL);
        return CBN_OK;
    }
    for (int i = 0; i < 4; i++) CBN_TRY(read_constant(p, cbn_bound_get(b, names[i]), &c[i], why));
    if (why->reason != CBN_FREEZE_OK) return CBN_OK;
    if (!absent(b, "out")) refuse(why, CBN_FREEZE_IN_PLACE, 0, "it writes its result into an array that is there");
    else if (c[2].array == NULL || c[3].array == NULL || !number(cbn_bound_get(b, "eps"), &r->eps))
        refuse(why, CBN_FREEZE_UNSUPPORTED, 0, NULL);
    for (int i = 0; i < 4 && why->reason == CBN_FREEZE_OK; i++) {
        if (c[i].array != NULL && c[i].info.kind != 'f') refuse(why, CBN_FREEZE_DTYPE, 0, NULL);
    }
    if (r->input != NULL) r->itemsize = r->input->itemsize;
    check_input(r->x, r, true, why);
    if (why->reason == CBN_FREEZE_OK && !floating(r->input->kind, r->itemsize)) refuse(why, CBN_FREEZE_DTYPE, r->x, NULL);
    return CBN_OK;
}

/* Fills the request from the node; *candidate false: nobody expects a plan of it. */
static cbn_status read_call(planner *p, cbn_node_id id, cbn_bound *b, cbn_plan_request *r, constant c[4], refusal *why,
                            bool *candidate) {
    const cbn_node *n = cbn_graph_node(p->g, id);
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(p->g), n->opcode);
    *candidate = false;
    if (op == NULL) return CBN_OK;
    switch (op->family) {
    case CBN_FAMILY_CONV: r->kind = CBN_PLAN_CONV; break;
    case CBN_FAMILY_CONV_TRANSPOSE: r->kind = CBN_PLAN_CONV_TRANSPOSE; break;
    case CBN_FAMILY_CONVOLUTION: r->kind = CBN_PLAN_CONVOLUTION; break;
    case CBN_FAMILY_LINEAR: r->kind = CBN_PLAN_LINEAR; break;
    case CBN_FAMILY_BATCH_NORM:
    case CBN_FAMILY_BATCH_NORM_TUPLE: r->kind = CBN_PLAN_BATCH_NORM; break;
    default:
        if (n->opcode != CBN_OP_ATEN_MM_DEFAULT && n->opcode != CBN_OP_ATEN_MATMUL_DEFAULT &&
            n->opcode != CBN_OP_ATEN_ADDMM_DEFAULT && n->opcode != CBN_OP_OPERATOR_MATMUL) {
            return CBN_OK;
        }
        r->kind = CBN_PLAN_PRODUCT;
    }
    cbn_error ignored;
    if (cbn_op_bind(p->g, id, b, &ignored) != CBN_OK) { /* the call raises too */
        *candidate = r->kind != CBN_PLAN_PRODUCT;
        refuse(why, CBN_FREEZE_UNSUPPORTED, 0, "its arguments do not fit the operator");
        return CBN_OK;
    }
    r->call = b;
    const cbn_value *x = &b->v[r->kind == CBN_PLAN_PRODUCT && cbn_op_param(op, "mat1") >= 0 ? 1 : 0];
    *candidate = r->kind != CBN_PLAN_PRODUCT;
    if (x->tag != CBN_V_NODE) {
        refuse(why, CBN_FREEZE_UNSUPPORTED, 0, "its input is a constant");
        return CBN_OK;
    }
    r->x = x->u.node;
    r->input = cbn_graph_node(p->g, r->x)->tensor;
    if (r->input != NULL && r->input->ndim < 0) r->input = NULL;
    if (r->kind == CBN_PLAN_PRODUCT) return read_product(p, r, c, why, candidate);
    return r->kind == CBN_PLAN_BATCH_NORM ? read_batch_norm(p, r, c, why) : read_layer(p, r, c, why);
}

/* ---- editing ----------------------------------------------------------------------------------------------------- */
static void note_constants(planner *p, const cbn_node *n) {
    for (uint32_t edge = n->first_input; edge != 0; edge = cbn_graph_edge(p->g, edge)->next_input) {
        const cbn_node_id id = cbn_graph_edge(p->g, edge)->producer;
        if (cbn_graph_node(p->g, id)->op == CBN_NODE_GET_ATTR && id < p->slots) p->used[id] = 1;
    }
}

static cbn_status replace(planner *p, cbn_node_id id, cbn_node_id x, const chain *c, cbn_str target) {
    cbn_graph *g = p->g;
    cbn_error *err = p->f->err;
    note_constants(p, cbn_graph_node(g, id));
    if (c->activation != 0) CBN_TRY(cbn_freeze_done(p->f, CBN_STEP_PLAN, c->activation, target));
    if (c->sum != 0) CBN_TRY(cbn_freeze_done(p->f, CBN_STEP_PLAN, c->sum, target));
    CBN_TRY(cbn_freeze_done(p->f, CBN_STEP_PLAN, id, target));
    if (c->last != id) {
        const cbn_node_id before = cbn_graph_next(g, c->last);
        if (cbn_graph_node(g, id)->tensor == NULL && cbn_graph_node(g, c->last)->tensor != NULL) {
            CBN_TRY(cbn_graph_set_tensor(g, id, cbn_graph_node(g, c->last)->tensor, err));
        }
        const cbn_host meta = cbn_graph_node(g, c->last)->meta;
        if (meta != NULL) cbn_graph_set_meta(g, id, meta);
        CBN_TRY(cbn_effects_substitute(p->effects, c->last, id, err));
        CBN_TRY(cbn_graph_replace_uses(g, c->last, id, NULL, NULL, NULL, err));
        if (c->activation != 0) CBN_TRY(cbn_graph_erase(g, c->activation, err));
        if (c->sum != 0) CBN_TRY(cbn_graph_erase(g, c->sum, err));
        CBN_TRY(cbn_graph_move_before(g, id, before, err));
    }
    CBN_TRY(cbn_graph_set_op(g, id, CBN_NODE_CALL_MODULE, err));
    CBN_TRY(cbn_graph_set_target(g, id, cbn_value_str(target), err));
    const cbn_value args[1] = {cbn_value_node(x)};
    const cbn_value kw[2] = {cbn_value_str(p->residual), cbn_value_node(c->residual)};
    return cbn_graph_set_args(g, id, args, 1, kw, c->residual != 0, err);
}

static cbn_status plan_call(planner *p, cbn_node_id id) {
    cbn_bound b;
    cbn_plan_request r = {.node = id};
    constant c[4] = {{0}};
    refusal why = {0};
    bool candidate;
    CBN_TRY(read_call(p, id, &b, &r, c, &why, &candidate));
    if (!candidate) return CBN_OK;
    if (why.reason != CBN_FREEZE_OK) {
        return cbn_freeze_keep(p->f, CBN_STEP_PLAN, why.reason, id, why.blocking, why.hint);
    }
    for (int i = 0; i < 4; i++) r.arrays[i] = c[i].array;
    chain found;
    find_chain(p, id, r.x, &r, &found);
    r.residual = found.residual != 0;
    cbn_str target = CBN_STR_NONE;
    cbn_graph_lock(p->g);
    cbn_status status = p->host->layer(p->host->arg, p->g, &r, &target, p->f->err);
    cbn_graph_unlock(p->g);
    if (status != CBN_OK) return status;
    if (target == CBN_STR_NONE) return cbn_freeze_keep(p->f, CBN_STEP_PLAN, CBN_FREEZE_UNSUPPORTED, id, 0, NULL);
    return replace(p, id, r.x, &found, target);
}

/* A module that is a layer, but not a prepared one. */
static cbn_status look_at_module(planner *p, cbn_node_id id) {
    cbn_host module;
    cbn_module_info info;
    cbn_graph_lock(p->g);
    cbn_status status = cbn_freeze_resolve(p->f, id, &module);
    if (status == CBN_OK && module != NULL) status = p->vt->module(module, &info, p->f->err);
    cbn_graph_unlock(p->g);
    if (status != CBN_OK || module == NULL) return status;
    if (info.kind == CBN_MODULE_OTHER || info.kind == CBN_MODULE_FROZEN) return CBN_OK;
    cbn_freeze_reason reason = CBN_FREEZE_UNSUPPORTED;
    const char *hint = "a call of a module, not of an operator: freeze() lowers it first";
    if (info.hooked) reason = CBN_FREEZE_HOOKED, hint = NULL;
    else if (info.kind == CBN_MODULE_BATCH_NORM && info.training) reason = CBN_FREEZE_TRAINING, hint = NULL;
    return cbn_freeze_keep(p->f, CBN_STEP_PLAN, reason, id, 0, hint);
}

static cbn_status walk(planner *p) {
    for (cbn_node_id id = cbn_graph_prev(p->g, 0), prev; id != 0; id = prev) {
        prev = cbn_graph_prev(p->g, id); /* what goes or moves stands behind */
        const cbn_node *n = cbn_graph_node(p->g, id);
        if (n->op == CBN_NODE_CALL_FUNCTION) CBN_TRY(plan_call(p, id));
        else if (n->op == CBN_NODE_CALL_MODULE) CBN_TRY(look_at_module(p, id));
    }
    for (cbn_node_id id = cbn_graph_prev(p->g, 0), prev; id != 0; id = prev) {
        prev = cbn_graph_prev(p->g, id);
        if (id < p->slots && p->used[id] && cbn_graph_node(p->g, id)->n_users == 0) {
            CBN_TRY(cbn_graph_erase(p->g, id, p->f->err));
        }
    }
    return CBN_OK;
}

cbn_status cbn_pass_plans(cbn_freeze *f, const cbn_plans_host *host) {
    planner p = {.f = f, .g = f->g, .vt = cbn_graph_host(f->g), .host = host, .slots = cbn_graph_slots(f->g)};
    CBN_TRY(cbn_graph_intern(p.g, "residual", 8, &p.residual, f->err));
    CBN_TRY(cbn_effects_build(p.g, f->root, &p.effects, f->err));
    p.used = cbn_calloc(p.slots);
    const cbn_status status =
        p.used == NULL ? cbn_fail_memory(f->err, "a list of nodes", p.slots) : walk(&p);
    cbn_free(p.used);
    cbn_effects_free(p.effects);
    return status;
}
