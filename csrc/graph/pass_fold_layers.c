/* SPDX-License-Identifier: BSD-3-Clause */
/* The walk and the edit. A fold gives the layer new constants, the node behind it goes, and the walk goes on. */
#include "graph/pass_fold_layers.h"

#include <string.h>

#include "base/cbn_alloc.h"

/* ---- rows -------------------------------------------------------------------------------------------------------- */

/* A row for a BatchNorm: at the end, or in a later walk where its earlier row stands. */
static cbn_status put_fold_row(cbn_layer_folder *k, const cbn_fold_row *row) {
    cbn_fold_report *r = k->folds;
    if (k->again) {
        while (k->next_fold < r->count && r->rows[k->next_fold].outcome != CBN_OUTCOME_KEPT) k->next_fold++;
        if (k->next_fold < r->count) {
            r->rows[k->next_fold++] = *row;
            return CBN_OK;
        }
    }
    if (r->count == k->fold_room) {
        const int room = k->fold_room == 0 ? 16 : k->fold_room * 2;
        cbn_fold_row *larger = cbn_realloc(r->rows, (size_t)room * sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(k->err, "a fold report", (size_t)room * sizeof *larger);
        r->rows = larger;
        k->fold_room = room;
    }
    r->rows[r->count++] = *row;
    return CBN_OK;
}

/* In a later walk: the row just added goes where the earlier one of its node stands. */
static void settle_row(cbn_layer_folder *k) {
    cbn_freeze_report *r = &k->f->report;
    if (!k->again) return;
    const cbn_freeze_row row = r->rows[r->count - 1];
    while (k->next_row < r->count - 1 && r->rows[k->next_row].reason == CBN_FREEZE_OK) k->next_row++;
    if (k->next_row == r->count - 1) return;
    r->rows[k->next_row++] = row;
    r->count--;
}

static cbn_status reserve_flags(cbn_layer_folder *k, cbn_node_id id) {
    if (id < k->flag_room) return CBN_OK;
    const uint32_t room = CBN_MAX(cbn_graph_slots(k->g), id + 1) + 64;
    uint8_t *flags = cbn_realloc(k->flags, room * sizeof *flags);
    if (flags != NULL) k->flags = flags;
    uint32_t *slot_of = flags == NULL ? NULL : cbn_realloc(k->slot_of, room * sizeof *slot_of);
    if (slot_of == NULL) return cbn_fail_memory(k->err, "the nodes that were folded", room * sizeof *slot_of);
    k->slot_of = slot_of;
    memset(k->flags + k->flag_room, 0, room - k->flag_room);
    k->flag_room = room;
    return CBN_OK;
}

/* ---- the edit ---------------------------------------------------------------------------------------------------- */

static cbn_status erase(cbn_layer_folder *k, cbn_node_id id) {
    const cbn_node_id prev = cbn_graph_prev(k->g, id), next = cbn_graph_next(k->g, id);
    CBN_TRY(cbn_graph_erase(k->g, id, k->err));
    if (k->anchor == id) k->anchor = k->after ? prev : next;
    if (id < k->flag_room) {
        if (k->flags[id] & CBN_FOLDER_MADE) k->slot_uses[k->slot_of[id]]--;
        k->flags[id] = 0;
    }
    return CBN_OK;
}

/* The get_attr nodes that a node reads, to be looked at when it no longer does. Of a call that folds there are few. */
enum { MOST_INPUTS = 16 };
typedef struct inputs {
    int count;
    cbn_node_id id[MOST_INPUTS];
} inputs;

static void note_inputs(const cbn_graph *g, cbn_node_id id, inputs *in) {
    for (uint32_t e = cbn_graph_node(g, id)->first_input; e != 0; e = cbn_graph_edge(g, e)->next_input) {
        const cbn_node_id producer = cbn_graph_edge(g, e)->producer;
        if (cbn_graph_node(g, producer)->op == CBN_NODE_GET_ATTR && in->count < MOST_INPUTS) {
            in->id[in->count++] = producer;
        }
    }
}

/* After the change: a get_attr among them that nobody reads any more goes. */
static cbn_status sweep(cbn_layer_folder *k, const inputs *in) {
    for (int i = 0; i < in->count; i++) {
        const cbn_node *n = cbn_graph_node(k->g, in->id[i]);
        if (k->uses.built && !(cbn_folder_flags(k, in->id[i]) & CBN_FOLDER_MADE)) {
            cbn_memory_uses_drop_node(&k->uses, in->id[i]);
        }
        if (n->op == CBN_NODE_GET_ATTR && n->n_users == 0) CBN_TRY(erase(k, in->id[i]));
    }
    return CBN_OK;
}

static void drop_array(cbn_layer_folder *k, cbn_host array) {
    cbn_array_info info;
    bool is_array;
    cbn_error ignored;
    if (!k->uses.built || array == NULL) return;
    cbn_graph_lock(k->g);
    if (k->c.vt->array(array, &info, &is_array, &ignored) == CBN_OK && is_array && info.lo != info.hi) {
        cbn_memory_uses_drop(&k->uses, info.lo);
    }
    cbn_graph_unlock(k->g);
}

/* A get_attr of a new constant before the layer. */
static cbn_status make_constant(cbn_layer_folder *k, cbn_node_id layer, const cbn_folded_constant *made,
                                const cbn_tensor_meta *meta, cbn_node_id *out) {
    cbn_str target;
    CBN_TRY(cbn_graph_intern(k->g, made->name, strlen(made->name), &target, k->err));
    cbn_graph_set_insert_point(k->g, layer);
    const cbn_node_spec spec = {.op = CBN_NODE_GET_ATTR, .target = cbn_value_str(target), .name = CBN_STR_NONE};
    CBN_TRY(cbn_graph_create(k->g, &spec, out, k->err));
    CBN_TRY(cbn_graph_set_tensor(k->g, *out, meta, k->err));
    if (k->c.effects != NULL) CBN_TRY(cbn_effects_add_fresh(k->c.effects, *out, k->err));
    CBN_TRY(reserve_flags(k, *out));
    if (made->slot >= k->slot_room) {
        const uint32_t room = CBN_MAX(2 * k->slot_room, made->slot + 64);
        uint32_t *larger = cbn_realloc(k->slot_uses, room * sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(k->err, "the constants that were made", room * sizeof *larger);
        memset(larger + k->slot_room, 0, (room - k->slot_room) * sizeof *larger);
        k->slot_uses = larger;
        k->slot_room = room;
    }
    k->nslots = CBN_MAX(k->nslots, made->slot + 1);
    k->slot_uses[made->slot]++;
    k->slot_of[*out] = made->slot;
    k->flags[*out] = CBN_FOLDER_MADE;
    return CBN_OK;
}

/* The layer's arguments with another weight (0: the same) and bias, everything else as it was given. */
static cbn_status set_weights(cbn_layer_folder *k, cbn_node_id layer, cbn_node_id weight, cbn_node_id bias) {
    const cbn_args *a = cbn_graph_node(k->g, layer)->args;
    const cbn_bound *b = &k->c.conv.b;
    const uint32_t at[2] = {(uint32_t)cbn_op_param(b->op, "weight"), (uint32_t)cbn_op_param(b->op, "bias")};
    const cbn_node_id node[2] = {weight, bias};
    cbn_value args[CBN_OP_MAX_ARGS + 2], kw[2 * CBN_OP_MAX_ARGS + 2];
    uint32_t nargs = a->nargs, nkw = a->nkw;
    assert(nargs <= CBN_OP_MAX_ARGS && nkw < CBN_OP_MAX_ARGS);
    for (uint32_t i = 0; i < nargs; i++) args[i] = a->v[i];
    for (uint32_t i = 0; i < 2 * nkw; i++) kw[i] = a->v[nargs + i];
    for (int which = 0; which < 2; which++) {
        if (node[which] == 0) continue;
        const cbn_value value = cbn_value_node(node[which]);
        uint32_t key = 0;
        const char *name = b->op->params[at[which]].name;
        while (key < nkw && strcmp(cbn_graph_str(k->g, kw[2 * key].u.str, NULL), name) != 0) key++;
        if (at[which] < nargs) args[at[which]] = value;
        else if (key < nkw) kw[2 * key + 1] = value;
        else if (at[which] == nargs) args[nargs++] = value;
        else {
            kw[2 * nkw] = cbn_value_str(k->bias); /* the weight is always given */
            kw[2 * nkw++ + 1] = value;
        }
    }
    for (uint32_t i = 0; i < nargs; i++) args[i] = cbn_value_retain(k->g, args[i]);
    for (uint32_t i = 0; i < 2 * nkw; i++) kw[i] = cbn_value_retain(k->g, kw[i]);
    const cbn_status status = cbn_graph_set_args(k->g, layer, args, nargs, kw, nkw, k->err);
    if (status != CBN_OK) {
        for (uint32_t i = 0; i < nargs; i++) cbn_value_release(k->g, args[i]);
        for (uint32_t i = 0; i < 2 * nkw; i++) cbn_value_release(k->g, kw[i]);
    }
    return status;
}

static cbn_status replace_weights(cbn_layer_folder *k, cbn_node_id layer, int64_t channels, const cbn_folded *made) {
    const cbn_pair_param *w = &k->c.p[P_WEIGHT], *b = &k->c.p[P_BIAS];
    inputs old = {0};
    if (made->weight.is_new && w->node != 0) old.id[old.count++] = w->node;
    if (made->bias.is_new && b->node != 0 && b->node != w->node) old.id[old.count++] = b->node;
    cbn_node_id weight = 0, bias = 0;
    cbn_tensor_meta meta = {.ndim = (int8_t)w->ndim, .kind = w->kind, .itemsize = w->itemsize};
    for (int i = 0; i < w->ndim; i++) meta.shape[i] = w->shape[i];
    if (made->weight.is_new) CBN_TRY(make_constant(k, layer, &made->weight, &meta, &weight));
    meta.ndim = 1;
    meta.shape[0] = channels;
    if (made->bias.is_new) CBN_TRY(make_constant(k, layer, &made->bias, &meta, &bias));
    if (made->weight.is_new && w->node == 0) drop_array(k, w->array);
    if (made->bias.is_new && b->node == 0) drop_array(k, b->array);
    CBN_TRY(set_weights(k, layer, weight, bias));
    return sweep(k, &old);
}

/* The layer's node does what `id` did; for tuples the getitem nodes go too. */
static cbn_status hand_over(cbn_layer_folder *k, cbn_node_id layer, cbn_node_id id, bool tuple) {
    inputs in = {0};
    note_inputs(k->g, id, &in);
    const cbn_tensor_meta *t = tuple ? NULL : cbn_graph_node(k->g, id)->tensor;
    if (t != NULL && cbn_graph_node(k->g, layer)->tensor == NULL) CBN_TRY(cbn_graph_set_tensor(k->g, layer, t, k->err));
    if (k->c.effects != NULL) CBN_TRY(cbn_effects_substitute(k->c.effects, id, layer, k->err));
    uint32_t edge;
    while (tuple && (edge = cbn_graph_node(k->g, id)->first_user) != 0) {
        const cbn_node_id item = cbn_graph_edge(k->g, edge)->user;
        CBN_TRY(cbn_graph_replace_uses(k->g, item, layer, NULL, NULL, NULL, k->err));
        CBN_TRY(erase(k, item));
    }
    CBN_TRY(cbn_graph_replace_uses(k->g, id, layer, NULL, NULL, NULL, k->err));
    CBN_TRY(erase(k, id));
    return sweep(k, &in);
}

/* A fold that holds for one number of axes only. */
static cbn_status note_batched(cbn_layer_folder *k, cbn_node_id layer) {
    cbn_graph_lock(k->g);
    const char *name = cbn_graph_str(k->g, cbn_graph_node(k->g, layer)->name, NULL);
    const cbn_status status = k->host->batched(k->host->arg, name, k->err);
    cbn_graph_unlock(k->g);
    return status;
}

/* ---- BatchNorm --------------------------------------------------------------------------------------------------- */

static void keep_pair(cbn_conv_bn_pair *p, cbn_fold_reason reason, cbn_node_id blocking, const char *hint) {
    p->reason = (uint8_t)reason;
    p->blocking = blocking;
    p->hint = hint;
}

/* What a fold for good needs beyond what folding into a copy does. */
static cbn_status ask_more(cbn_layer_folder *k, cbn_conv_bn_pair *p) {
    if (p->reason != CBN_REASON_OK) return CBN_OK;
    if (k->c.bn.module) {
        keep_pair(p, CBN_REASON_UNSUPPORTED_BN_OP, p->conv, "the modules were not written as operators");
        return CBN_OK;
    }
    for (int i = 0; i < P_COUNT; i++) {
        const cbn_pair_param *param = &k->c.p[i];
        bool returned = false;
        if (param->node != 0) returned = cbn_effects_returned(k->c.effects, param->node);
        else if (param->state == PARAM_CONSTANT) {
            CBN_TRY(cbn_effects_array_returned(k->c.effects, param->array, &returned, k->err));
        }
        if (!returned) continue;
        keep_pair(p, CBN_REASON_NONCONST_PARAM, param->node,
                  "the graph returns its memory, which the caller may write");
        return CBN_OK;
    }
    return CBN_OK;
}

static cbn_status fold_bn(cbn_layer_folder *k, cbn_conv_bn_pair *p, cbn_folded *made, cbn_fold_layer *layer) {
    const cbn_layer *l = &k->c.conv;
    const cbn_pair_param *w = &k->c.p[P_WEIGHT];
    const cbn_value *groups = cbn_layer_arg(l, "groups");
    if (groups != NULL && groups->tag != CBN_V_INT) {
        keep_pair(p, CBN_REASON_NONCONST_PARAM, p->conv, "groups is computed at run time");
        return CBN_OK;
    }
    *layer = (cbn_fold_layer){.weight = w->array,
                              .bias = k->c.p[P_BIAS].array,
                              .linear = l->family == CBN_FAMILY_LINEAR,
                              .transposed = l->transposed,
                              .groups = groups != NULL ? groups->u.i : 1};
    layer->channels = l->transposed ? w->shape[1] * layer->groups : w->shape[0];
    cbn_host bn[4];
    for (int i = 0; i < 4; i++) bn[i] = k->c.p[P_GAMMA + i].array;
    cbn_graph_lock(k->g);
    const cbn_status status = k->host->bn(k->host->arg, layer, bn, k->c.eps_value, made, k->err);
    cbn_graph_unlock(k->g);
    if (status == CBN_OK && made->refused) keep_pair(p, CBN_REASON_NONFINITE_FOLD, 0, made->hint);
    return status;
}

static cbn_status visit_bn(cbn_layer_folder *k, cbn_node_id id) {
    k->pairs.count = 0;
    cbn_graph_lock(k->g);
    const cbn_status status = cbn_pair_visit(&k->c, id, &k->pairs);
    cbn_graph_unlock(k->g);
    CBN_TRY(status);
    if (k->pairs.count == 0) return CBN_OK;
    cbn_conv_bn_pair *p = &k->pairs.v[0];
    cbn_folded made = {0};
    cbn_fold_layer layer = {0};
    const bool one = k->pairs.count == 1 && p->inside == CBN_STR_NONE;
    if (one) CBN_TRY(ask_more(k, p));
    if (one && p->reason == CBN_REASON_OK) CBN_TRY(fold_bn(k, p, &made, &layer));
    cbn_fold_report rows;
    CBN_TRY(cbn_pairs_report(k->g, &k->pairs, CBN_OUTCOME_FOLDED, &rows, k->err));
    cbn_status put = CBN_OK;
    for (int i = 0; put == CBN_OK && i < rows.count; i++) {
        if (rows.rows[i].reason == CBN_REASON_OK) rows.rows[i].new_name = rows.rows[i].conv_name;
        put = put_fold_row(k, &rows.rows[i]);
    }
    cbn_fold_report_free(&rows);
    CBN_TRY(put);
    if (!one || p->reason != CBN_REASON_OK) return CBN_OK;
    k->f->changed++;
    for (int i = P_GAMMA; i < P_COUNT; i++) {
        if (k->c.p[i].node == 0) drop_array(k, k->c.p[i].array);
    }
    const bool broadcasts = layer.linear && k->c.p[P_MEAN].shape[0] == 1;
    if (!broadcasts) CBN_TRY(note_batched(k, p->conv));
    CBN_TRY(replace_weights(k, p->conv, layer.channels, &made));
    return hand_over(k, p->conv, id, p->tuple);
}

/* ---- arithmetic -------------------------------------------------------------------------------------------------- */

static cbn_status keep_binary(cbn_layer_folder *k, cbn_node_id id, const cbn_arith_answer *a) {
    CBN_TRY(reserve_flags(k, id));
    k->flags[id] |= CBN_FOLDER_ROW;
    CBN_TRY(cbn_freeze_keep(k->f, CBN_STEP_BINARY, a->reason, id, a->blocking, a->hint));
    settle_row(k);
    return CBN_OK;
}

static cbn_status visit_binary(cbn_layer_folder *k, cbn_node_id id) {
    cbn_arith how = {0};
    cbn_arith_answer answer;
    cbn_folded made = {0};
    cbn_graph_lock(k->g);
    cbn_status status = cbn_arith_interview(k, id, &how, &answer);
    if (status == CBN_OK && answer.expected && answer.reason == CBN_FREEZE_OK) {
        status = k->host->arith(k->host->arg, &how, &made, k->err);
    }
    cbn_graph_unlock(k->g);
    CBN_TRY(status);
    if (!answer.expected) return CBN_OK;
    if (made.refused) answer = (cbn_arith_answer){.reason = CBN_FREEZE_NONFINITE, .hint = made.hint};
    if (answer.reason != CBN_FREEZE_OK) return keep_binary(k, id, &answer);
    CBN_TRY(cbn_freeze_done(k->f, CBN_STEP_BINARY, id, cbn_graph_node(k->g, how.layer)->name));
    settle_row(k);
    if (how.c.node == 0 && how.c.what == CBN_OPERAND_ARRAY) drop_array(k, how.c.host);
    const bool all_axes = how.c.what == CBN_OPERAND_ARRAY && !how.of.linear && how.c.ndim == k->c.conv.nd + 2;
    if (all_axes) CBN_TRY(note_batched(k, how.layer));
    CBN_TRY(replace_weights(k, how.layer, how.of.channels, &made));
    return hand_over(k, how.layer, id, false);
}

/* ---- the walk ---------------------------------------------------------------------------------------------------- */

static cbn_status visit(cbn_layer_folder *k, cbn_node_id id) {
    const cbn_node *n = cbn_graph_node(k->g, id);
    const cbn_op_family family = n->op == CBN_NODE_CALL_METHOD && n->opcode != 0 ? CBN_FAMILY_BINARY
                                                                                : cbn_node_family(&k->c, n);
    const bool bn = n->op == CBN_NODE_CALL_MODULE || family == CBN_FAMILY_BATCH_NORM ||
                    family == CBN_FAMILY_BATCH_NORM_TUPLE;
    if (bn) return k->host->batch_norms ? visit_bn(k, id) : CBN_OK;
    return family == CBN_FAMILY_BINARY && k->host->binary ? visit_binary(k, id) : CBN_OK;
}

static cbn_status walk(cbn_layer_folder *k) {
    cbn_graph_iter it = {0};
    cbn_graph_iter_begin(k->g, false, &it);
    cbn_status status = CBN_OK;
    for (cbn_node_id id; status == CBN_OK && (id = cbn_graph_iter_next(&it)) != 0;) status = visit(k, id);
    cbn_graph_iter_end(&it);
    return status;
}

/* A weight that was shared may have one user left now that others have weights of their own. Each further walk folds
 * at least one node or is the last. */
static cbn_status walk_all(cbn_layer_folder *k) {
    for (uint32_t changed = UINT32_MAX; changed != k->f->changed; k->again = true) {
        changed = k->f->changed;
        k->shared = false;
        k->next_fold = 0;
        k->next_row = 0;
        CBN_TRY(walk(k));
        if (!k->shared) break;
    }
    return CBN_OK;
}

static cbn_status drop_unused(cbn_layer_folder *k) {
    for (uint32_t slot = 0; slot < k->nslots; slot++) {
        if (k->slot_uses[slot] == 0) CBN_TRY(k->host->drop(k->host->arg, slot, k->err));
    }
    return CBN_OK;
}

static void folder_init(cbn_layer_folder *k, cbn_freeze *f, const cbn_fold_layers_host *host) {
    memset(k, 0, sizeof *k);
    k->f = f;
    k->g = f->g;
    k->host = host;
    k->err = f->err;
    k->pass = (cbn_pass_host){.root = f->root, .finite = host->finite, .caller_restores = true};
    cbn_pair_context_init(&k->c, f->g, &k->pass, CBN_PAIR_FOLD, f->err);
}

static void folder_free(cbn_layer_folder *k) {
    cbn_effects_free(k->c.effects);
    cbn_pairs_free(&k->pairs);
    cbn_memory_uses_free(&k->uses);
    cbn_free(k->flags);
    cbn_free(k->slot_of);
    cbn_free(k->slot_uses);
}

cbn_status cbn_pass_fold_layers(cbn_freeze *f, const cbn_fold_layers_host *host, cbn_fold_report *folds) {
    cbn_layer_folder k;
    folder_init(&k, f, host);
    k.folds = folds;
    k.anchor = cbn_graph_insert_anchor(f->g, &k.after);
    cbn_status status = cbn_graph_intern(f->g, "bias", 4, &k.bias, f->err);
    if (status == CBN_OK) status = walk_all(&k);
    if (status == CBN_OK) status = drop_unused(&k);
    if (k.after) cbn_graph_set_insert_after(f->g, k.anchor);
    else cbn_graph_set_insert_point(f->g, k.anchor);
    folder_free(&k);
    return status;
}

cbn_status cbn_pass_binary_modules(cbn_freeze *f, const cbn_fold_layers_host *host,
                                   cbn_status (*fn)(void *arg, cbn_node_id id), void *arg) {
    cbn_layer_folder k;
    folder_init(&k, f, host);
    cbn_status status = CBN_OK;
    cbn_graph_lock(f->g);
    for (cbn_node_id id = cbn_graph_first(f->g); status == CBN_OK && id != 0; id = cbn_graph_next(f->g, id)) {
        cbn_arith how = {0};
        cbn_arith_answer answer;
        status = cbn_arith_interview(&k, id, &how, &answer);
        if (status == CBN_OK && answer.module) status = fn(arg, how.layer);
    }
    cbn_graph_unlock(f->g);
    folder_free(&k);
    return status;
}
