/* SPDX-License-Identifier: BSD-3-Clause */
/* What depends on constants alone is computed now.
 *
 * One walk forward decides which nodes are known and has the host compute them; values that nobody needs any more are
 * dropped on the way. One walk backward decides what becomes of them: a node stays as long as somebody uses it who is
 * not known himself; if its value is an array it becomes a constant. Only then is the graph edited. */
#include "graph/passes.h"

#include <string.h>

#include "base/cbn_alloc.h"

/* What is known of a node's value. */
typedef enum {
    RUN_TIME, /* nothing */
    BLOCKED,  /* an array of the module whose contents may change: `reason` */
    KNOWN,    /* computed, or nobody needs it */
    PINNED    /* computed, but the node stays */
} knowledge;

typedef enum { STAYS, GOES, BECOMES } fate; /* BECOMES: a constant */

typedef struct cell {
    uint8_t known, kind, reason, fate; /* knowledge, cbn_constant_kind, cbn_freeze_reason (OK: none), fate */
    bool needed;      /* somebody who stays takes its value: it is not dropped */
    bool asked;       /* a node that stays may ask for more than its numbers: strides, class */
    uint32_t pending; /* users that have not been computed yet */
    cbn_node_id blocking;
    cbn_str into;
} cell;

typedef struct fold {
    cbn_freeze *f;
    cbn_graph *g;
    const cbn_constant_host *host;
    cbn_effects *effects;
    cell *cells;        /* by node id */
    cbn_node_id *stack; /* values to be dropped */
    bool anything;      /* a call is known */
    cbn_error *err;
} fold;

/* The first reason not to fold a node, with what stands in the way. */
static void refuse(cell *c, cbn_freeze_reason reason, cbn_node_id blocking) {
    if (c->reason != CBN_FREEZE_OK) return;
    c->reason = (uint8_t)reason;
    c->blocking = blocking;
}

/* ---- may this node be computed now? ------------------------------------------------------------------------------ */

typedef struct look {
    fold *w;
    cell *c;
} look;

/* An array that the node reads without a node for it: a module's, or one in its arguments. */
static cbn_status look_at_array(cbn_host array, void *arg) {
    const look *l = arg;
    fold *w = l->w;
    cbn_node_id writer;
    bool returned;
    CBN_TRY(cbn_effects_array_writer(w->effects, array, 0, 0, &writer, w->err));
    if (writer != 0) refuse(l->c, CBN_FREEZE_MUTATED, writer);
    CBN_TRY(cbn_effects_array_returned(w->effects, array, &returned, w->err));
    if (returned) refuse(l->c, CBN_FREEZE_ALIASES_OUTPUT, cbn_graph_output(w->g));
    return CBN_OK;
}

static cbn_status look_at_literals(const look *l, const cbn_value *v) {
    if (cbn_value_is_seq(v)) {
        for (uint32_t i = 0; i < v->u.seq->count; i++) CBN_TRY(look_at_literals(l, &v->u.seq->v[i]));
        return CBN_OK;
    }
    return v->tag == CBN_V_HOST ? look_at_array(v->u.host, (void *)l) : CBN_OK;
}

static cbn_status look_at_module(const look *l, const cbn_node *node) {
    fold *w = l->w;
    const cbn_host_vtable *vt = cbn_graph_host(w->g);
    cbn_host module = NULL;
    if (w->f->root != NULL && node->target.tag == CBN_V_STR) {
        CBN_TRY(vt->resolve(w->f->root, cbn_graph_str(w->g, node->target.u.str, NULL), &module, w->err));
    }
    if (module == NULL) return refuse(l->c, CBN_FREEZE_UNKNOWN, 0), CBN_OK;
    cbn_module_info info;
    CBN_TRY(vt->module(module, &info, w->err));
    if (info.hooked) refuse(l->c, CBN_FREEZE_HOOKED, 0);
    if (!info.pure) refuse(l->c, CBN_FREEZE_UNKNOWN, 0);
    if (l->c->reason != CBN_FREEZE_OK) return CBN_OK;
    bool training;
    CBN_TRY(w->host->training(w->host->arg, module, &training));
    if (training) refuse(l->c, CBN_FREEZE_TRAINING, 0);
    return vt->module_arrays(module, look_at_array, (void *)l, w->err);
}

/* Is its value the same at each call, and nothing else done? */
static cbn_status look_at_operator(const look *l, cbn_node_id id, const cbn_node *node) {
    fold *w = l->w;
    if (node->op == CBN_NODE_CALL_MODULE) return look_at_module(l, node);
    if (node->opcode == 0) return refuse(l->c, CBN_FREEZE_UNKNOWN, 0), CBN_OK;
    cbn_bound bound;
    cbn_error ignored; /* the call raises when it runs */
    if (cbn_op_bind(w->g, id, &bound, &ignored) != CBN_OK) return refuse(l->c, CBN_FREEZE_UNSUPPORTED, 0), CBN_OK;
    if (bound.op->effect == CBN_EFFECT_RANDOM && !cbn_bound_not_training(&bound)) refuse(l->c, CBN_FREEZE_RANDOM, 0);
    bool impure;
    CBN_TRY(cbn_node_impure(w->g, id, w->f->root, &impure, w->err));
    if (impure) refuse(l->c, CBN_FREEZE_IMPURE, 0);
    return CBN_OK;
}

static cbn_op_family family_of(const fold *w, const cbn_node *node) {
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(w->g), node->opcode);
    return op == NULL ? CBN_FAMILY_NONE : op->family;
}

/* Asks everything about a call none of whose inputs is a value of the run; c->reason is OK if it may be computed. */
static cbn_status interview(fold *w, cbn_node_id id, cell *c) {
    const cbn_node *node = cbn_graph_node(w->g, id);
    const look l = {w, c};
    CBN_TRY(look_at_operator(&l, id, node));
    for (uint32_t e = node->first_input; e != 0; e = cbn_graph_edge(w->g, e)->next_input) {
        const cbn_node_id input = cbn_graph_edge(w->g, e)->producer;
        if (w->cells[input].known == BLOCKED) refuse(c, (cbn_freeze_reason)w->cells[input].reason, input);
    }
    if (c->reason != CBN_FREEZE_OK) return CBN_OK;
    for (uint32_t i = 0; i < node->args->nargs; i++) CBN_TRY(look_at_literals(&l, &node->args->v[i]));
    for (uint32_t k = 0; k < node->args->nkw; k++) CBN_TRY(look_at_literals(&l, cbn_args_kw(node->args, k)));
    if (cbn_effects_written(w->effects, id)) {
        refuse(c, CBN_FREEZE_MUTATED, cbn_effects_writer(w->effects, id, 0, 0));
    }
    if (family_of(w, node) == CBN_FAMILY_DEQUANTIZE) refuse(c, CBN_FREEZE_DEQUANTIZE, 0);
    if (c->reason != CBN_FREEZE_OK || w->host->wanted == NULL) return CBN_OK;
    bool wanted;
    CBN_TRY(w->host->wanted(w->host->arg, id, &wanted));
    if (!wanted) refuse(c, CBN_FREEZE_CONSTRAINT, 0);
    return CBN_OK;
}

/* ---- forward: computing ------------------------------------------------------------------------------------------ */

/* One user less: pushes what nobody needs any more. A value that is no array may yet have to be computed at run time,
 * and then needs its inputs, so those are let go of only together with it. */
static void let_go_inputs(fold *w, cbn_node_id id, uint32_t *depth) {
    for (uint32_t e = cbn_graph_node(w->g, id)->first_input; e != 0; e = cbn_graph_edge(w->g, e)->next_input) {
        const cbn_node_id input = cbn_graph_edge(w->g, e)->producer;
        cell *c = &w->cells[input];
        if (--c->pending == 0 && !c->needed && c->known >= KNOWN) w->stack[(*depth)++] = input;
    }
}

static void computed(fold *w, cbn_node_id id) {
    uint32_t depth = 0;
    let_go_inputs(w, id, &depth);
    while (depth > 0) {
        const cbn_node_id value = w->stack[--depth];
        w->host->drop(w->host->arg, value);
        const cell *c = &w->cells[value];
        const bool call = cbn_graph_node(w->g, value)->op != CBN_NODE_GET_ATTR;
        if (call && c->known == KNOWN && c->kind != CBN_CONSTANT_ARRAY) let_go_inputs(w, value, &depth);
    }
}

static cbn_status visit_get_attr(fold *w, cbn_node_id id, cell *c) {
    cbn_constant_kind kind;
    CBN_TRY(w->host->evaluate(w->host->arg, id, &kind));
    c->kind = (uint8_t)kind;
    if (kind == CBN_CONSTANT_ARRAY) {
        c->known = KNOWN;
        if (cbn_effects_written(w->effects, id)) {
            refuse(c, CBN_FREEZE_MUTATED, cbn_effects_writer(w->effects, id, 0, 0));
        } else if (cbn_effects_returned(w->effects, id)) {
            refuse(c, CBN_FREEZE_ALIASES_OUTPUT, cbn_graph_output(w->g));
        }
        if (c->reason != CBN_FREEZE_OK) c->known = BLOCKED;
    }
    if (c->known != KNOWN) w->host->drop(w->host->arg, id);
    return CBN_OK;
}

static cbn_status visit_call(fold *w, cbn_node_id id, cell *c) {
    const cbn_node *node = cbn_graph_node(w->g, id);
    for (uint32_t e = node->first_input; e != 0; e = cbn_graph_edge(w->g, e)->next_input) {
        if (w->cells[cbn_graph_edge(w->g, e)->producer].known == RUN_TIME) return CBN_OK;
    }
    CBN_TRY(interview(w, id, c));
    if (c->reason != CBN_FREEZE_OK) return CBN_OK;
    c->known = KNOWN;
    w->anything = true;
    if (node->n_users == 0) return CBN_OK; /* dead: not computed, its inputs may be */
    cbn_constant_kind kind;
    CBN_TRY(w->host->evaluate(w->host->arg, id, &kind));
    c->kind = (uint8_t)kind;
    if (kind == CBN_CONSTANT_RAISED) {
        refuse(c, CBN_FREEZE_RAISED, 0);
        c->known = RUN_TIME;
    } else if (cbn_effects_returned(w->effects, id)) {
        refuse(c, kind == CBN_CONSTANT_OTHER ? CBN_FREEZE_NOT_ARRAY : CBN_FREEZE_ALIASES_OUTPUT,
               cbn_graph_output(w->g));
        c->known = PINNED;
    }
    return CBN_OK;
}

static cbn_status visit(fold *w, cbn_node_id id) {
    const cbn_node *node = cbn_graph_node(w->g, id);
    cell *c = &w->cells[id];
    c->pending = node->n_users;
    switch (node->op) {
    case CBN_NODE_GET_ATTR: CBN_TRY(visit_get_attr(w, id, c)); break;
    case CBN_NODE_CALL_FUNCTION:
    case CBN_NODE_CALL_METHOD:
    case CBN_NODE_CALL_MODULE: CBN_TRY(visit_call(w, id, c)); break;
    default: break;
    }
    if (c->known == KNOWN) {
        if (node->op != CBN_NODE_GET_ATTR && (c->kind == CBN_CONSTANT_ARRAY || node->n_users == 0)) computed(w, id);
        return CBN_OK;
    }
    for (uint32_t e = node->first_input; e != 0; e = cbn_graph_edge(w->g, e)->next_input) {
        const cbn_node_id input = cbn_graph_edge(w->g, e)->producer;
        if (w->cells[input].known != PINNED) w->cells[input].needed = true;
        else if (--w->cells[input].pending == 0) w->host->drop(w->host->arg, input);
    }
    return CBN_OK;
}

static cbn_status compute(fold *w) {
    CBN_TRY(cbn_effects_build(w->g, w->f->root, &w->effects, w->err));
    cbn_graph_lock(w->g);
    cbn_status status = CBN_OK;
    for (cbn_node_id id = cbn_graph_first(w->g); status == CBN_OK && id != 0; id = cbn_graph_next(w->g, id)) {
        status = visit(w, id);
    }
    cbn_graph_unlock(w->g);
    return status;
}

/* ---- backward: deciding ------------------------------------------------------------------------------------------ */

/* Does the user give the same for a 0-d array as for a NumPy scalar of floating dtype? Python's arithmetic does;
 * numpy.float64 is a Python float, for which most operators have rules of their own. */
static bool takes_either(const fold *w, cbn_node_id user) {
    const cbn_node *node = cbn_graph_node(w->g, user);
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(w->g), node->opcode);
    return op != NULL && op->family == CBN_FAMILY_BINARY && strncmp(op->name, "operator.", 9) == 0;
}

static void decide(fold *w, cbn_node_id id) {
    const cbn_node *node = cbn_graph_node(w->g, id);
    cell *c = &w->cells[id];
    if (c->known != KNOWN && c->known != PINNED) return;
    bool live = false, either = true;
    for (uint32_t e = node->first_user; e != 0; e = cbn_graph_edge(w->g, e)->next_user) {
        const cbn_node_id user = cbn_graph_edge(w->g, e)->user;
        if (w->cells[user].fate != STAYS) continue;
        live = true;
        either = either && takes_either(w, user);
        c->asked |= w->cells[user].known != RUN_TIME && w->cells[user].kind == CBN_CONSTANT_OTHER;
    }
    if (node->op == CBN_NODE_GET_ATTR) {
        if (!live && node->n_users > 0) c->fate = GOES; /* one without users before is not ours to remove */
    } else if (!live) {
        c->fate = GOES;
    } else if (c->known == PINNED) {
        return; /* it has its reason */
    } else if (c->kind == CBN_CONSTANT_ARRAY || (c->kind == CBN_CONSTANT_SCALAR && either)) {
        c->fate = BECOMES;
    } else {
        refuse(c, CBN_FREEZE_NOT_ARRAY, 0);
    }
}

/* ---- editing ----------------------------------------------------------------------------------------------------- */

static bool is_call(const cbn_node *node) {
    return node->op == CBN_NODE_CALL_FUNCTION || node->op == CBN_NODE_CALL_METHOD || node->op == CBN_NODE_CALL_MODULE;
}

static cbn_status make_constants(fold *w) {
    for (cbn_node_id id = cbn_graph_first(w->g); id != 0; id = cbn_graph_next(w->g, id)) {
        if (w->cells[id].fate != BECOMES) continue;
        cbn_tensor_meta meta = {.ndim = -1};
        CBN_TRY(w->host->constant(w->host->arg, id, w->cells[id].asked, &w->cells[id].into, &meta));
        CBN_TRY(cbn_graph_set_tensor(w->g, id, meta.ndim < 0 ? NULL : &meta, w->err));
    }
    return CBN_OK;
}

/* What went is now in the constant that its first user became, or is in. */
static void follow(fold *w) {
    for (cbn_node_id id = cbn_graph_prev(w->g, 0); id != 0; id = cbn_graph_prev(w->g, id)) {
        if (w->cells[id].fate != GOES) continue;
        const uint32_t e = cbn_graph_node(w->g, id)->first_user;
        w->cells[id].into = e == 0 ? CBN_STR_NONE : w->cells[cbn_graph_edge(w->g, e)->user].into;
    }
}

static cbn_status report(fold *w) {
    for (cbn_node_id id = cbn_graph_first(w->g); id != 0; id = cbn_graph_next(w->g, id)) {
        const cell *c = &w->cells[id];
        if (!is_call(cbn_graph_node(w->g, id))) continue;
        if (c->fate != STAYS) {
            CBN_TRY(cbn_freeze_done(w->f, CBN_STEP_CONSTANT, id, c->into));
        } else if (c->reason != CBN_FREEZE_OK) {
            CBN_TRY(cbn_freeze_keep(w->f, CBN_STEP_CONSTANT, (cbn_freeze_reason)c->reason, id, c->blocking, NULL));
        }
    }
    return CBN_OK;
}

static cbn_status become_constant(fold *w, cbn_node_id id, cbn_str target) {
    CBN_TRY(cbn_graph_set_args(w->g, id, NULL, 0, NULL, 0, w->err));
    CBN_TRY(cbn_graph_set_op(w->g, id, CBN_NODE_GET_ATTR, w->err));
    return cbn_graph_set_target(w->g, id, cbn_value_str(target), w->err);
}

static cbn_status edit(fold *w) {
    for (cbn_node_id id = cbn_graph_prev(w->g, 0), prev; id != 0; id = prev) {
        prev = cbn_graph_prev(w->g, id);
        const cell *c = &w->cells[id];
        if (c->fate == BECOMES) CBN_TRY(become_constant(w, id, c->into));
        else if (c->fate == GOES) CBN_TRY(cbn_graph_erase(w->g, id, w->err));
    }
    return CBN_OK;
}

static cbn_status run(fold *w) {
    const size_t slots = cbn_graph_slots(w->g);
    w->cells = cbn_calloc(slots * sizeof *w->cells);
    w->stack = cbn_alloc_array(slots, sizeof *w->stack);
    if (w->cells == NULL || w->stack == NULL) {
        return cbn_fail_memory(w->err, "constant folding", slots * (sizeof *w->cells + sizeof *w->stack));
    }
    CBN_TRY(compute(w));
    if (w->anything) {
        for (cbn_node_id id = cbn_graph_prev(w->g, 0); id != 0; id = cbn_graph_prev(w->g, id)) decide(w, id);
        CBN_TRY(make_constants(w));
        follow(w);
    }
    CBN_TRY(report(w));
    return w->f->changed > 0 ? edit(w) : CBN_OK;
}

cbn_status cbn_pass_constant_fold(cbn_freeze *f, const cbn_constant_host *host) {
    fold w = {.f = f, .g = f->g, .host = host, .err = f->err};
    const cbn_status status = run(&w);
    cbn_effects_free(w.effects);
    cbn_free(w.cells);
    cbn_free(w.stack);
    return status;
}
