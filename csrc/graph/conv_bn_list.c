/* SPDX-License-Identifier: BSD-3-Clause */
/* All BatchNorms of a graph, those inside modules that it calls as a whole too, and their rows. */
#include "graph/conv_bn_priv.h"

#include "base/cbn_alloc.h"

#include <string.h>

static cbn_conv_bn_pair *add_pair(cbn_pair_list *list, cbn_error *err) {
    if (list->count == list->capacity) {
        const int capacity = list->capacity == 0 ? 16 : 2 * list->capacity;
        cbn_conv_bn_pair *v = cbn_alloc_array((size_t)capacity, sizeof *v);
        if (v == NULL) {
            if (cbn_fail_memory(err, "the list of BatchNorms", (size_t)capacity * sizeof *v) != CBN_OK) return NULL;
        }
        if (list->count > 0) memcpy(v, list->v, (size_t)list->count * sizeof *v);
        cbn_free(list->v);
        list->v = v;
        list->capacity = capacity;
    }
    return &list->v[list->count++];
}

typedef struct opaque_call {
    cbn_pair_context *c;
    cbn_node_id id;
    cbn_pair_list *list;
} opaque_call;

/* A row for a BatchNorm that the graph does not show. */
static cbn_status add_hidden(cbn_host bn, const char *path, void *arg) {
    const opaque_call *call = arg;
    cbn_pair_context *c = call->c;
    const cbn_node *n = cbn_graph_node(c->g, call->id);
    cbn_module_info info;
    CBN_TRY(c->vt->module(bn, &info, c->err));
    const char *outer = cbn_graph_str(c->g, n->target.u.str, NULL);
    const size_t len = strlen(outer) + 1 + strlen(path);
    char *text = cbn_alloc_array(len + 1, sizeof *text);
    if (text == NULL) return cbn_fail_memory(c->err, "the path of a BatchNorm", len + 1);
    memcpy(text, outer, strlen(outer));
    text[strlen(outer)] = '.';
    memcpy(text + strlen(outer) + 1, path, strlen(path) + 1);
    cbn_str inside;
    const cbn_status status = cbn_graph_intern(c->g, text, len, &inside, c->err);
    cbn_free(text);
    CBN_TRY(status);
    c->pair = add_pair(call->list, c->err);
    if (c->pair == NULL) return CBN_NO_MEMORY;
    *c->pair = (cbn_conv_bn_pair){.bn = call->id, .form = CBN_FORM_MODULE, .inside = inside};
    if (cbn_pair_skipped(c, n)) keep(c, CBN_REASON_SKIPPED_BY_USER, 0, NULL);
    else if (info.training) keep(c, CBN_REASON_BN_TRAINING, 0, NULL);
    else if (!info.frozen_bn) keep(c, CBN_REASON_NO_RUNNING_STATS, 0, NULL);
    else keep(c, CBN_REASON_UNSUPPORTED_BN_OP, 0, "inside a module that the graph calls as a whole: trace into it");
    return CBN_OK;
}

static cbn_status visit_opaque(cbn_pair_context *c, cbn_node_id id, cbn_pair_list *list) {
    const cbn_node *n = cbn_graph_node(c->g, id);
    cbn_host module = NULL;
    if (c->bn.m.kind != CBN_MODULE_OTHER || c->bn.m.pure || c->vt->batch_norms == NULL) return CBN_OK;
    if (c->host->root == NULL || n->target.tag != CBN_V_STR) return CBN_OK;
    CBN_TRY(c->vt->resolve(c->host->root, cbn_graph_str(c->g, n->target.u.str, NULL), &module, c->err));
    opaque_call call = {c, id, list};
    return module == NULL ? CBN_OK : c->vt->batch_norms(module, add_hidden, &call, c->err);
}

cbn_status cbn_pair_visit(cbn_pair_context *c, cbn_node_id id, cbn_pair_list *list) {
    const cbn_node *n = cbn_graph_node(c->g, id);
    bool bn = false, tuple = false;
    if (n->op == CBN_NODE_CALL_MODULE) {
        CBN_TRY(cbn_layer_read_module(c, id, &c->bn));
        bn = c->bn.m.kind == CBN_MODULE_BATCH_NORM;
        if (!bn) return visit_opaque(c, id, list);
    } else if (n->op == CBN_NODE_CALL_FUNCTION) {
        c->bn.family = cbn_node_family(c, n);
        c->bn.id = id;
        c->bn.module = false;
        tuple = c->bn.family == CBN_FAMILY_BATCH_NORM_TUPLE;
        bn = tuple || c->bn.family == CBN_FAMILY_BATCH_NORM;
    }
    if (!bn) return CBN_OK;
    c->pair = add_pair(list, c->err);
    if (c->pair == NULL) return CBN_NO_MEMORY;
    const uint8_t form = c->bn.module ? CBN_FORM_MODULE : CBN_FORM_FUNCTIONAL; /* or aten: known when bound */
    *c->pair = (cbn_conv_bn_pair){.bn = id, .form = form, .tuple = tuple, .inside = CBN_STR_NONE};
    return cbn_pair_interview(c);
}

static cbn_status find_all(cbn_pair_context *c, cbn_pair_list *list) {
    if (c->host->only != 0) return cbn_pair_visit(c, c->host->only, list);
    for (cbn_node_id id = cbn_graph_first(c->g); id != 0; id = cbn_graph_next(c->g, id)) {
        CBN_TRY(cbn_pair_visit(c, id, list));
    }
    return CBN_OK;
}

void cbn_pair_context_init(cbn_pair_context *c, cbn_graph *g, const cbn_pass_host *host, cbn_pair_purpose purpose,
                           cbn_error *err) {
    memset(c, 0, sizeof *c);
    c->g = g;
    c->vt = cbn_graph_host(g);
    c->host = host;
    c->purpose = purpose;
    c->err = err;
    for (int i = 0; i < CBN_TARGET_CACHE; i++) c->cache.target[i] = CBN_STR_NONE;
}

cbn_status cbn_pairs_find(cbn_graph *g, const cbn_pass_host *host, cbn_pair_purpose purpose, cbn_pair_list *out,
                          cbn_error *err) {
    *out = (cbn_pair_list){0};
    cbn_pair_context c;
    cbn_pair_context_init(&c, g, host, purpose, err);
    cbn_graph_lock(g);
    const cbn_status status = find_all(&c, out);
    cbn_graph_unlock(g);
    cbn_effects_free(c.effects);
    return status;
}

void cbn_pairs_free(cbn_pair_list *list) {
    cbn_free(list->v);
    *list = (cbn_pair_list){0};
}

static cbn_str name_of(const cbn_graph *g, cbn_node_id id) {
    return id == 0 ? CBN_STR_NONE : cbn_graph_node(g, id)->name;
}

/* What one pass over the output and back costs; -1 when the shape is not known. */
static void savings(const cbn_graph *g, const cbn_conv_bn_pair *p, cbn_fold_row *row) {
    row->bytes_saved = row->flops_saved = -1;
    const cbn_tensor_meta *t = cbn_graph_node(g, p->conv)->tensor;
    if (t == NULL && !p->tuple) t = cbn_graph_node(g, p->bn)->tensor;
    if (t == NULL || t->ndim < 0) return;
    int64_t elements = 1;
    for (int i = 0; i < t->ndim; i++) {
        if (__builtin_mul_overflow(elements, t->shape[i], &elements)) return;
    }
    int64_t bytes;
    if (elements > INT64_MAX / 2 || __builtin_mul_overflow(2 * elements, (int64_t)t->itemsize, &bytes)) return;
    row->bytes_saved = bytes;
    row->flops_saved = 2 * elements;
}

cbn_status cbn_pairs_report(const cbn_graph *g, const cbn_pair_list *list, cbn_fold_outcome good,
                            cbn_fold_report *report, cbn_error *err) {
    *report = (cbn_fold_report){0};
    report->rows = cbn_alloc_array((size_t)list->count, sizeof *report->rows);
    if (report->rows == NULL) return cbn_fail_memory(err, "a fold report", (size_t)list->count * sizeof *report->rows);
    report->count = list->count;
    for (int i = 0; i < list->count; i++) {
        const cbn_conv_bn_pair *p = &list->v[i];
        const cbn_node *bn = cbn_graph_node(g, p->bn);
        const bool fine = p->reason == CBN_REASON_OK;
        cbn_fold_row *row = &report->rows[i];
        *row = (cbn_fold_row){.bn_name = bn->name,
                              .bn_target = p->inside != CBN_STR_NONE           ? p->inside
                                           : bn->op == CBN_NODE_CALL_MODULE ? bn->target.u.str
                                                                            : CBN_STR_NONE,
                              .conv_name = name_of(g, p->conv),
                              .blocking_name = name_of(g, p->blocking),
                              .new_name = CBN_STR_NONE,
                              .bn = p->bn,
                              .conv = p->conv,
                              .form = p->form,
                              .outcome = (uint8_t)(fine ? good : CBN_OUTCOME_KEPT),
                              .reason = p->reason,
                              .hint = p->hint,
                              .run_time_rule = fine && p->run_time_rule};
        if (fine) savings(g, p, row);
    }
    return CBN_OK;
}
