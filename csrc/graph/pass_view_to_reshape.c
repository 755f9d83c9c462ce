/* SPDX-License-Identifier: BSD-3-Clause */
/* view -> reshape: what later steps do to strides must not make a graph fail that worked.
 *
 * A view shares its memory or raises, a reshape may copy. So a view stays where a copy could be told from a view: its
 * memory is written, or the caller gets it and has it by another way too. _unsafe_view is a copy here: it may become a
 * view only if nobody writes and the caller does not get it. */
#include "graph/passes.h"

#include <string.h>

typedef struct converter {
    cbn_freeze *f;
    cbn_graph *g;
    cbn_effects *effects;
    cbn_host reshape;
} converter;

/* ---- which form of x.view(...) ----------------------------------------------------------------------------------- */
/* NumPy's view takes a dtype where torch's takes sizes. A node counts as a size only if it is seen to be one. */
typedef enum { NO_SIZE, ONE_SIZE, SIZES } size_kind;

static const char *row_name(const cbn_graph *g, cbn_node_id id) {
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(g), cbn_graph_node(g, id)->opcode);
    return op == NULL ? "" : op->name;
}

static bool is_one_of(const char *name, const char *const *list) {
    while (*list != NULL && strcmp(name, *list) != 0) list++;
    return *list != NULL;
}

static size_kind kind_of(const cbn_graph *g, const cbn_value *v, int depth);

static size_kind kind_of_all(const cbn_graph *g, const cbn_value *v, uint32_t count, int depth) {
    for (uint32_t i = 0; i < count; i++) {
        if (kind_of(g, &v[i], depth) != ONE_SIZE) return NO_SIZE;
    }
    return count > 0 ? SIZES : NO_SIZE;
}

static size_kind kind_of_node(const cbn_graph *g, cbn_node_id id, int depth) {
    static const char *const counts[] = {"aten.sym_size.int", "builtins.len", "builtins.int", "math.floor", "math.ceil",
                                         "math.prod", "method.dim", "method.numel", NULL};
    static const char *const arithmetic[] = {"operator.add", "operator.sub",      "operator.mul",
                                             "operator.mod", "operator.floordiv", "operator.neg", NULL};
    const char *name = row_name(g, id);
    cbn_bound b;
    cbn_error ignored;
    if (depth == 0 || name[0] == '\0' || cbn_op_bind(g, id, &b, &ignored) != CBN_OK) return NO_SIZE;
    if (is_one_of(name, counts)) return ONE_SIZE;
    if (strcmp(name, "method.size") == 0) return cbn_graph_node(g, id)->args->nargs > 1 ? ONE_SIZE : SIZES;
    if (strcmp(name, "builtins.getattr") == 0 && b.v[1].tag == CBN_V_STR) {
        const char *attribute = cbn_graph_str(g, b.v[1].u.str, NULL);
        return strcmp(attribute, "shape") == 0 ? SIZES : strcmp(attribute, "ndim") == 0 ? ONE_SIZE : NO_SIZE;
    }
    if (b.op->family == CBN_FAMILY_GETITEM) {
        if (kind_of(g, &b.v[0], depth - 1) != SIZES) return NO_SIZE;
        return b.v[1].tag == CBN_V_INT ? ONE_SIZE : b.v[1].tag == CBN_V_SLICE ? SIZES : NO_SIZE;
    }
    if (!is_one_of(name, arithmetic)) return NO_SIZE;
    const size_kind first = kind_of(g, &b.v[0], depth - 1);
    return b.n == 1 || first == kind_of(g, &b.v[1], depth - 1) ? first : NO_SIZE;
}

static size_kind kind_of(const cbn_graph *g, const cbn_value *v, int depth) {
    switch (v->tag) {
    case CBN_V_INT: return ONE_SIZE;
    case CBN_V_NODE: return kind_of_node(g, v->u.node, depth);
    case CBN_V_TUPLE:
    case CBN_V_LIST: return kind_of_all(g, v->u.seq->v, v->u.seq->count, depth);
    default: return NO_SIZE;
    }
}

static bool takes_sizes(const cbn_graph *g, const cbn_bound *b) {
    enum { DEPTH = 6 };
    if (b->op != cbn_op_table_row(cbn_graph_ops(g), CBN_OP_METHOD_VIEW)) {
        return b->v[1].tag == CBN_V_LIST || b->v[1].tag == CBN_V_TUPLE || b->v[1].tag == CBN_V_NODE;
    }
    for (int i = 2; i < b->n; i++) {
        if (b->given[i]) return false; /* order=, shape= are not view's */
    }
    if (!b->given[1]) return false;
    if (b->nrest == 1 && b->rest[0].tag == CBN_V_NODE) return kind_of(g, b->rest, DEPTH) != NO_SIZE;
    return kind_of_all(g, b->rest, b->nrest, DEPTH) == SIZES;
}

/* ---- may it become a reshape? ------------------------------------------------------------------------------------ */
/* Is this one array, not a list that may hold several views of one memory? */
static bool is_one_array(const cbn_graph *g, cbn_node_id id) {
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(g), cbn_graph_node(g, id)->opcode);
    return op != NULL && op->nreturns == 1 && strncmp(op->name, "operator.", 9) != 0 &&
           strncmp(op->name, "builtins.", 9) != 0;
}

static cbn_freeze_reason obstacle(const converter *c, cbn_node_id id, const cbn_bound *b, bool copies,
                                  cbn_node_id *blocking) {
    const cbn_node_id base = b->v[0].tag == CBN_V_NODE ? b->v[0].u.node : 0;
    *blocking = 0;
    if (!takes_sizes(c->g, b)) return CBN_FREEZE_UNSUPPORTED;
    const bool written = cbn_effects_written(c->effects, id);
    if (written || (copies && base != 0 && cbn_effects_written(c->effects, base))) {
        *blocking = cbn_effects_writer(c->effects, written ? id : base, 0, 0);
        return CBN_FREEZE_MUTATED;
    }
    const cbn_node_id by = cbn_effects_returned_by(c->effects, id);
    if (by == 0) return CBN_FREEZE_OK;
    if (!copies && by != CBN_EFFECTS_MANY && is_one_array(c->g, by) && !cbn_effects_outside(c->effects, id)) {
        return CBN_FREEZE_OK;
    }
    *blocking = cbn_graph_output(c->g);
    return CBN_FREEZE_ALIASES_OUTPUT;
}

/* reshape has other names for its arguments: what was passed by keyword is passed by position. */
static cbn_status pass_by_position(const converter *c, cbn_node_id id, const cbn_bound *b) {
    if (cbn_graph_node(c->g, id)->args->nkw == 0) return CBN_OK;
    cbn_value args[2] = {cbn_value_retain(c->g, b->v[0]), cbn_value_retain(c->g, b->v[1])};
    const cbn_status status = cbn_graph_set_args(c->g, id, args, 2, NULL, 0, c->f->err);
    if (status != CBN_OK) {
        cbn_value_release(c->g, args[0]);
        cbn_value_release(c->g, args[1]);
    }
    return status;
}

static cbn_status set_target(const converter *c, cbn_node_id id) {
    cbn_str name;
    if (cbn_graph_node(c->g, id)->op == CBN_NODE_CALL_METHOD) {
        CBN_TRY(cbn_graph_intern(c->g, "reshape", 7, &name, c->f->err));
        return cbn_graph_set_target(c->g, id, cbn_value_str(name), c->f->err);
    }
    cbn_graph_host(c->g)->retain(c->reshape);
    const cbn_value target = cbn_value_host(c->reshape);
    const cbn_status status = cbn_graph_set_target(c->g, id, target, c->f->err);
    if (status != CBN_OK) cbn_value_release(c->g, target);
    return status;
}

static cbn_status convert(converter *c, cbn_node_id id) {
    cbn_bound b;
    cbn_error ignored;
    const bool copies = cbn_graph_node(c->g, id)->opcode == CBN_OP_ATEN__UNSAFE_VIEW_DEFAULT;
    if (cbn_op_bind(c->g, id, &b, &ignored) != CBN_OK) {
        return cbn_freeze_keep(c->f, CBN_STEP_VIEW, CBN_FREEZE_UNSUPPORTED, id, 0, NULL);
    }
    if (c->effects == NULL) CBN_TRY(cbn_effects_build(c->g, c->f->root, &c->effects, c->f->err));
    cbn_node_id blocking;
    const cbn_freeze_reason reason = obstacle(c, id, &b, copies, &blocking);
    if (reason != CBN_FREEZE_OK) return cbn_freeze_keep(c->f, CBN_STEP_VIEW, reason, id, blocking, NULL);
    CBN_TRY(pass_by_position(c, id, &b));
    CBN_TRY(set_target(c, id));
    return cbn_freeze_done(c->f, CBN_STEP_VIEW, id, CBN_STR_NONE);
}

cbn_status cbn_pass_view_to_reshape(cbn_freeze *f, cbn_host reshape) {
    converter c = {.f = f, .g = f->g, .reshape = reshape};
    cbn_status status = CBN_OK;
    for (cbn_node_id id = cbn_graph_first(f->g); status == CBN_OK && id != 0; id = cbn_graph_next(f->g, id)) {
        const cbn_opcode code = cbn_graph_node(f->g, id)->opcode;
        if (code == CBN_OP_ATEN_VIEW_DEFAULT || code == CBN_OP_ATEN__UNSAFE_VIEW_DEFAULT ||
            code == CBN_OP_METHOD_VIEW) {
            status = convert(&c, id);
        }
    }
    cbn_effects_free(c.effects);
    return status;
}
