/* SPDX-License-Identifier: BSD-3-Clause */
/* What a node computes: its operator or module, and its arguments as the schema sees them. */
#include "graph/pass_cse.h"

#include <string.h>

enum { TAG_OF_TEXT = 0xfe }; /* a default string that the graph has never seen */

static const char UNKNOWN_MODULE[] = "a module of a class that is not known, or with hooks: its call may do anything";

/* ---- host objects ------------------------------------------------------------------------------------------------ */
cbn_status cbn_cse_read_attr(cbn_cse *c, cbn_node_id id) {
    CBN_TRY(cbn_freeze_resolve(c->f, id, &c->object[id]));
    c->holds_objects[id] = true;
    if (c->object[id] == NULL) return CBN_OK;
    const cbn_host_vtable *host = cbn_graph_host(c->g);
    cbn_array_info info;
    bool is_array;
    cbn_graph_lock(c->g);
    const cbn_status status = host->array(c->object[id], &info, &is_array, c->f->err);
    cbn_graph_unlock(c->g);
    if (status != CBN_OK) return status;
    c->holds_objects[id] = !is_array && !(host->plain != NULL && host->plain(c->object[id]));
    return CBN_OK;
}

static cbn_status module_info(cbn_cse *c, cbn_host module, cbn_module_info *out, bool *training) {
    cbn_graph_lock(c->g);
    cbn_status status = cbn_graph_host(c->g)->module(module, out, c->f->err);
    *training = out->training;
    /* The vtable does not say it of activations and such, where it matters for Dropout. */
    if (status == CBN_OK && out->kind == CBN_MODULE_OTHER && out->pure) {
        status = c->host->training(module, training, c->f->err);
    }
    cbn_graph_unlock(c->g);
    return status;
}

static cbn_freeze_reason of_module(const cbn_module_info *info, bool training) {
    if (info->kind == CBN_MODULE_OTHER && !info->pure) return CBN_FREEZE_UNKNOWN;
    if (info->hooked) return CBN_FREEZE_HOOKED;
    return training ? CBN_FREEZE_TRAINING : CBN_FREEZE_OK;
}

/* ---- operators --------------------------------------------------------------------------------------------------- */
/* x.view(2, 3) and x.view((2, 3)) are the same where both forms are documented to be. */
static bool flattens(const cbn_graph *g, cbn_node_id id, const cbn_bound *b) {
    switch (cbn_graph_node(g, id)->opcode) {
    case CBN_OP_METHOD_VIEW:
    case CBN_OP_METHOD_RESHAPE:
    case CBN_OP_METHOD_PERMUTE:
    case CBN_OP_METHOD_EXPAND:
        /* one node may itself be a sequence when the graph runs */
        return b->nrest > 1 || (b->nrest == 1 && b->rest[0].tag == CBN_V_INT);
    default: return false;
    }
}

/* The arguments of variadic parameter i as one key: how many, and where. 1 and the sequence itself when the form
 * matters. */
static uint32_t variadic(const cbn_graph *g, cbn_node_id id, const cbn_bound *b, int i, const cbn_value **first) {
    if (!b->given[i]) return 0;
    const bool one_sequence = cbn_value_is_seq(&b->v[i]) && b->rest == b->v[i].u.seq->v;
    *first = !one_sequence || flattens(g, id, b) ? b->rest : &b->v[i];
    return *first == &b->v[i] ? 1 : b->nrest;
}

/* Argument i, with a default string as a value like those that calls give. */
static cbn_value argument(const cbn_graph *g, const cbn_bound *b, int i) {
    const char *text = b->op->params[i].default_str;
    if (b->given[i] || text == NULL) return b->v[i];
    const cbn_str interned = cbn_graph_find_str(g, text, strlen(text));
    if (interned != CBN_STR_NONE) return cbn_value_str(interned);
    return (cbn_value){.tag = TAG_OF_TEXT};
}

/* getattr(x, "a", None) is not getattr(x, "a"): there a default that is given does something. */
static bool given_counts(const cbn_graph *g, cbn_node_id id) {
    return cbn_graph_node(g, id)->opcode == CBN_OP_BUILTINS_GETATTR;
}

static uint64_t hash_bound(const cbn_cse *c, uint64_t h, cbn_node_id id, const cbn_bound *b) {
    for (int i = 0; i < b->n; i++) {
        if (b->op->params[i].variadic) {
            const cbn_value *v = NULL;
            const uint32_t n = variadic(c->g, id, b, i, &v);
            for (uint32_t k = 0; k < n; k++) h = cbn_value_hash(&c->keys, h, &v[k]);
            h = cbn_hash_word(h, n);
            continue;
        }
        if (!b->given[i] && b->v[i].tag == CBN_V_NONE && b->op->params[i].default_str == NULL) continue;
        const cbn_value v = argument(c->g, b, i);
        if (v.tag == CBN_V_NONE) continue; /* as when it is not given */
        h = v.tag == TAG_OF_TEXT ? cbn_hash_word(h, TAG_OF_TEXT) : cbn_value_hash(&c->keys, h + (uint64_t)i, &v);
    }
    return h;
}

static bool bound_same(const cbn_cse *c, const cbn_bound *a, cbn_node_id a_id, const cbn_bound *b, cbn_node_id b_id) {
    for (int i = 0; i < a->n; i++) {
        if (given_counts(c->g, a_id) && a->given[i] != b->given[i]) return false;
        if (a->op->params[i].variadic) {
            const cbn_value *v = NULL, *w = NULL;
            const uint32_t n = variadic(c->g, a_id, a, i, &v);
            if (n != variadic(c->g, b_id, b, i, &w)) return false;
            for (uint32_t k = 0; k < n; k++) {
                if (!cbn_value_same(&c->keys, &v[k], &w[k])) return false;
            }
            continue;
        }
        if (!a->given[i] && !b->given[i]) continue;
        const cbn_value v = argument(c->g, a, i), w = argument(c->g, b, i);
        if (v.tag != w.tag) return false;
        if (!cbn_value_same(&c->keys, &v, &w)) return false;
    }
    return true;
}

/* The module that a get_attr node hands to an operator: known, in eval mode, without hooks. */
static cbn_status judge_module_argument(cbn_cse *c, const cbn_value *v, cbn_cse_key *key) {
    const cbn_host module = v != NULL && v->tag == CBN_V_NODE ? c->object[v->u.node] : NULL;
    if (key->reason != CBN_FREEZE_OK) return CBN_OK;
    key->reason = CBN_FREEZE_UNKNOWN;
    key->hint = UNKNOWN_MODULE;
    if (module == NULL || cbn_graph_node(c->g, v->u.node)->op != CBN_NODE_GET_ATTR) return CBN_OK;
    cbn_module_info info;
    bool training;
    CBN_TRY(module_info(c, module, &info, &training));
    /* A convolution computes the same in training; BatchNorm would change its statistics. */
    training = training && info.kind == CBN_MODULE_BATCH_NORM;
    key->reason = (uint8_t)of_module(&info, training);
    if (key->reason != CBN_FREEZE_UNKNOWN) key->hint = NULL;
    return CBN_OK;
}

/* Why two such calls of an operator cannot be one. */
static cbn_status judge_operator(cbn_cse *c, cbn_cse_key *key) {
    const cbn_bound *b = &key->bound;
    const bool normalises = b->op->family == CBN_FAMILY_BATCH_NORM || b->op->family == CBN_FAMILY_BATCH_NORM_TUPLE;
    if (normalises && cbn_bound_get(b, "training") != NULL && !cbn_bound_not_training(b)) {
        key->reason = CBN_FREEZE_TRAINING;
        return CBN_OK;
    }
    if (b->op->effect == CBN_EFFECT_RANDOM && !cbn_bound_not_training(b)) key->reason = CBN_FREEZE_RANDOM;
    if (b->op->effect == CBN_EFFECT_IMPURE) key->reason = CBN_FREEZE_IMPURE;
    for (int i = 0; key->reason == CBN_FREEZE_OK && i < b->n; i++) {
        if (cbn_bound_writes(b, i)) key->reason = CBN_FREEZE_IMPURE;
    }
    if (b->op->family != CBN_FAMILY_EFFICIENT) return CBN_OK;
    const cbn_value *bn = cbn_bound_get(b, "bn"), *conv = cbn_bound_get(b, "conv");
    if (bn != NULL) { /* it calls the modules where they cannot be one convolution */
        CBN_TRY(judge_module_argument(c, bn, key));
        return judge_module_argument(c, conv, key);
    }
    if (conv->tag != CBN_V_HOST || cbn_op_table_lookup(cbn_graph_ops(c->g), conv->u.host) == 0) {
        key->reason = CBN_FREEZE_UNKNOWN;
    }
    return CBN_OK;
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */
static uint64_t hash_raw(const cbn_cse *c, uint64_t h, const cbn_args *a) {
    for (uint32_t i = 0; i < a->nargs; i++) h = cbn_value_hash(&c->keys, h, &a->v[i]);
    for (uint32_t i = a->nargs; i < a->nargs + 2 * a->nkw; i++) h = cbn_value_hash(&c->keys, h, &a->v[i]);
    return cbn_hash_word(h, a->nargs);
}

static bool raw_same(const cbn_cse *c, const cbn_args *a, const cbn_args *b) {
    if (a == b) return true;
    if (a->nargs != b->nargs || a->nkw != b->nkw) return false;
    for (uint32_t i = 0; i < a->nargs + 2 * a->nkw; i++) {
        if (!cbn_value_same(&c->keys, &a->v[i], &b->v[i])) return false;
    }
    return true;
}

static uint64_t hash_target(const cbn_cse *c, const cbn_node *node) {
    const uint64_t h = cbn_hash_word(c->keys.seed, node->op);
    return cbn_value_hash(&c->keys, h, &node->target);
}

static cbn_status read_module(cbn_cse *c, cbn_cse_key *key) {
    CBN_TRY(cbn_freeze_resolve(c->f, key->id, &c->object[key->id]));
    const cbn_node *node = cbn_graph_node(c->g, key->id);
    const cbn_host module = c->object[key->id];
    uint64_t h = cbn_hash_word(cbn_hash_word(c->keys.seed, node->op), (uint64_t)(uintptr_t)module);
    key->reason = CBN_FREEZE_UNKNOWN;
    if (module == NULL) {
        h = hash_target(c, node);
    } else {
        cbn_module_info info;
        bool training;
        CBN_TRY(module_info(c, module, &info, &training));
        key->reason = (uint8_t)of_module(&info, training);
        key->layer = info.kind != CBN_MODULE_OTHER && !info.hooked &&
                     cbn_module_call_read(c->g, key->id, info.kind == CBN_MODULE_CONV_TRANSPOSE, &key->call);
        key->opaque = info.kind == CBN_MODULE_OTHER ? !info.pure : info.hooked;
    }
    if (key->reason == CBN_FREEZE_UNKNOWN) {
        key->hint = UNKNOWN_MODULE;
        key->opaque = true;
    }
    if (!key->layer) {
        key->hash = hash_raw(c, h, node->args);
        return CBN_OK;
    }
    h = cbn_value_hash(&c->keys, h, key->call.input);
    key->hash = key->call.output_size == NULL ? h : cbn_value_hash(&c->keys, h, key->call.output_size);
    return CBN_OK;
}

cbn_status cbn_cse_read_call(cbn_cse *c, cbn_node_id id, cbn_cse_key *out) {
    const cbn_node *node = cbn_graph_node(c->g, id);
    out->id = id;
    out->layer = out->opaque = out->bound_ok = false;
    out->reason = CBN_FREEZE_OK;
    out->hint = NULL;
    if (node->op == CBN_NODE_CALL_MODULE) return read_module(c, out);
    cbn_error ignored; /* a call that does not bind is like one of a callable that nobody knows */
    out->bound_ok = node->opcode != 0 && cbn_op_bind(c->g, id, &out->bound, &ignored) == CBN_OK;
    if (out->bound_ok) {
        out->hash = hash_bound(c, cbn_hash_word(c->keys.seed, node->opcode), id, &out->bound);
        return judge_operator(c, out);
    }
    out->opaque = true;
    out->reason = node->opcode == 0 ? CBN_FREEZE_UNKNOWN : CBN_FREEZE_UNSUPPORTED;
    out->hash = hash_raw(c, hash_target(c, node), node->args);
    return CBN_OK;
}

static bool layer_same(const cbn_cse *c, const cbn_cse_key *key, cbn_node_id earlier) {
    cbn_module_call call;
    if (!cbn_module_call_read(c->g, earlier, true, &call)) return false;
    const cbn_value *size = key->call.output_size;
    if (!cbn_value_same(&c->keys, key->call.input, call.input)) return false;
    if (size == NULL || call.output_size == NULL) return size == call.output_size;
    return cbn_value_same(&c->keys, size, call.output_size);
}

bool cbn_cse_same(const cbn_cse *c, const cbn_cse_key *key, cbn_node_id earlier) {
    const cbn_node *a = cbn_graph_node(c->g, earlier), *b = cbn_graph_node(c->g, key->id);
    if (a->op != b->op || a->opcode != b->opcode) return false;
    if (key->bound_ok) {
        cbn_bound bound;
        cbn_error ignored;
        return cbn_op_bind(c->g, earlier, &bound, &ignored) == CBN_OK &&
               bound_same(c, &key->bound, key->id, &bound, earlier);
    }
    if (a->op == CBN_NODE_CALL_MODULE) {
        if (c->object[earlier] != c->object[key->id]) return false;
        if (c->object[earlier] != NULL) return key->layer ? layer_same(c, key, earlier) : raw_same(c, a->args, b->args);
    }
    return cbn_value_same(&c->keys, &a->target, &b->target) && raw_same(c, a->args, b->args);
}
