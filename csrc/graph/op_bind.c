/* SPDX-License-Identifier: BSD-3-Clause */
/* A node's arguments against its row's schema. */
#include "graph/op_table.h"

#include <string.h>

int cbn_op_param(const cbn_op *op, const char *name) {
    for (int i = 0; i < op->nparams; i++) {
        if (strcmp(op->params[i].name, name) == 0) return i;
    }
    return -1;
}

const cbn_value *cbn_bound_get(const cbn_bound *b, const char *name) {
    const int i = cbn_op_param(b->op, name);
    return i < 0 ? NULL : &b->v[i];
}

static int positional_params(const cbn_op *op) {
    int n = 0;
    while (n < op->nparams && !op->params[n].keyword_only) n++;
    return n;
}

/* Everything from `first` on goes to the variadic parameter i: one sequence, or the values themselves. */
static void bind_rest(cbn_bound *b, int i, const cbn_value *first, uint32_t count) {
    b->v[i] = *first;
    b->given[i] = true;
    const bool one_sequence = count == 1 && (first->tag == CBN_V_TUPLE || first->tag == CBN_V_LIST);
    b->rest = one_sequence ? first->u.seq->v : first;
    b->nrest = one_sequence ? first->u.seq->count : count;
}

static cbn_status bind_positional(const cbn_args *args, const char *node, cbn_bound *out, cbn_error *err) {
    const cbn_op *op = out->op;
    const int npositional = positional_params(op);
    for (uint32_t i = 0; i < args->nargs; i++) {
        if (i >= (uint32_t)npositional) {
            return cbn_fail(err, CBN_BAD_TYPE, "%s: expected at most %d positional arguments, got %u (node %s)",
                            op->name, npositional, args->nargs, node);
        }
        if (op->params[i].variadic) {
            bind_rest(out, (int)i, &args->v[i], args->nargs - i);
            return CBN_OK;
        }
        out->v[i] = args->v[i];
        out->given[i] = true;
    }
    return CBN_OK;
}

static cbn_status bind_keywords(const cbn_graph *g, const cbn_args *args, const char *node, cbn_bound *out,
                                cbn_error *err) {
    const cbn_op *op = out->op;
    for (uint32_t k = 0; k < args->nkw; k++) {
        const char *key = cbn_graph_str(g, cbn_args_key(args, k), NULL);
        const int i = cbn_op_param(op, key);
        if (i < 0) {
            return cbn_fail(err, CBN_BAD_TYPE, "%s: unexpected keyword argument '%.60s' (node %s)", op->name, key,
                            node);
        }
        if (out->given[i]) {
            return cbn_fail(err, CBN_BAD_TYPE, "%s: argument '%s' is given twice (node %s)", op->name, key, node);
        }
        if (op->params[i].variadic) {
            bind_rest(out, i, cbn_args_kw(args, k), 1);
        } else {
            out->v[i] = *cbn_args_kw(args, k);
            out->given[i] = true;
        }
    }
    return CBN_OK;
}

cbn_status cbn_op_bind(const cbn_graph *g, cbn_node_id id, cbn_bound *out, cbn_error *err) {
    const cbn_node *node = cbn_graph_node(g, id);
    const cbn_op_table *table = cbn_graph_ops(g);
    const cbn_op *op = table == NULL ? NULL : cbn_op_table_row(table, node->opcode);
    const char *name = cbn_graph_str(g, node->name, NULL);
    *out = (cbn_bound){.op = op};
    if (op == NULL) {
        return cbn_fail(err, CBN_BAD_VALUE, "node %s: its target has no schema: it is not in the op table", name);
    }
    out->n = op->nparams;
    CBN_TRY(bind_positional(node->args, name, out, err));
    CBN_TRY(bind_keywords(g, node->args, name, out, err));
    for (int i = 0; i < op->nparams; i++) {
        const cbn_param *p = &op->params[i];
        if (out->given[i]) continue;
        if (!p->has_default && !p->variadic) {
            return cbn_fail(err, CBN_BAD_TYPE, "%s: missing argument '%s' (node %s)", op->name, p->name, name);
        }
        out->v[i] = p->has_default ? p->default_value : cbn_value_none();
    }
    return CBN_OK;
}

/* ---- what a call does beyond its result -------------------------------------------------------------------------- */
bool cbn_bound_not_training(const cbn_bound *b) {
    const cbn_value *v = cbn_bound_get(b, "training");
    if (v == NULL) v = cbn_bound_get(b, "train");
    return v != NULL && ((v->tag == CBN_V_BOOL && !v->u.b) || (v->tag == CBN_V_INT && v->u.i == 0));
}

static bool is_running_statistic(const char *name) {
    return strcmp(name, "running_mean") == 0 || strcmp(name, "running_var") == 0;
}

bool cbn_bound_writes(const cbn_bound *b, int i) {
    const cbn_param *p = &b->op->params[i];
    if (b->v[i].tag == CBN_V_NONE) return false;
    switch (b->op->family) {
    case CBN_FAMILY_BATCH_NORM:
        if (is_running_statistic(p->name)) return !cbn_bound_not_training(b);
        return p->written;
    case CBN_FAMILY_BATCH_NORM_TUPLE:
        /* The functional form returns new statistics, the one without training only reads them. */
        if (!is_running_statistic(p->name)) return p->written;
        return cbn_bound_get(b, "training") != NULL && b->op->nreturns == 3 && !cbn_bound_not_training(b);
    default: return p->written;
    }
}

static bool bound_is_impure(const cbn_bound *b) {
    if (b->op->effect == CBN_EFFECT_IMPURE) return true;
    if (b->op->effect == CBN_EFFECT_RANDOM && !cbn_bound_not_training(b)) return true;
    for (int i = 0; i < b->n; i++) {
        if (cbn_bound_writes(b, i)) return true;
    }
    return false;
}

/* relu_ and __imul__, but not __getitem__ or __invert__: how methods are named that write their object. */
static bool named_as_writing(const char *name, size_t len) {
    static const char *const in_place[] = {"__iadd__", "__isub__", "__imul__",    "__imatmul__", "__itruediv__",
                                           "__ifloordiv__", "__imod__", "__ipow__", "__ilshift__", "__irshift__",
                                           "__iand__", "__ixor__", "__ior__",     "__setitem__", "__delitem__"};
    for (size_t i = 0; i < sizeof in_place / sizeof in_place[0]; i++) {
        if (strcmp(name, in_place[i]) == 0) return true;
    }
    return len > 1 && name[len - 1] == '_' && name[len - 2] != '_';
}

/* Unknown callables too take what they write into as out=. */
static bool given_out(const cbn_graph *g, const cbn_node *node) {
    for (uint32_t k = 0; k < node->args->nkw; k++) {
        if (strcmp(cbn_graph_str(g, cbn_args_key(node->args, k), NULL), "out") == 0) {
            return cbn_args_kw(node->args, k)->tag != CBN_V_NONE;
        }
    }
    return false;
}

static cbn_status module_impure(const cbn_graph *g, const cbn_node *node, cbn_host root, bool *out, cbn_error *err) {
    const cbn_host_vtable *host = cbn_graph_host(g);
    if (root == NULL || node->target.tag != CBN_V_STR) return CBN_OK;
    cbn_host module;
    CBN_TRY(host->resolve(root, cbn_graph_str(g, node->target.u.str, NULL), &module, err));
    if (module == NULL) return CBN_OK;
    cbn_module_info info;
    CBN_TRY(host->module(module, &info, err));
    *out = info.kind == CBN_MODULE_BATCH_NORM && info.training;
    return CBN_OK;
}

cbn_status cbn_node_impure(const cbn_graph *g, cbn_node_id id, cbn_host root, bool *out, cbn_error *err) {
    const cbn_node *node = cbn_graph_node(g, id);
    *out = false;
    switch (node->op) {
    case CBN_NODE_GET_ATTR: return CBN_OK;
    case CBN_NODE_CALL_MODULE: return module_impure(g, node, root, out, err);
    case CBN_NODE_CALL_FUNCTION:
    case CBN_NODE_CALL_METHOD: break;
    default: *out = true; return CBN_OK;
    }
    if (node->opcode == 0) {
        size_t len = 0;
        const bool method = node->op == CBN_NODE_CALL_METHOD && node->target.tag == CBN_V_STR;
        const char *name = method ? cbn_graph_str(g, node->target.u.str, &len) : "";
        *out = named_as_writing(name, len) || given_out(g, node);
        return CBN_OK;
    }
    cbn_bound bound;
    cbn_error ignored; /* a call that does not bind raises when it runs: not ours to remove */
    *out = cbn_op_bind(g, id, &bound, &ignored) != CBN_OK || bound_is_impure(&bound);
    return CBN_OK;
}
