/* SPDX-License-Identifier: BSD-3-Clause */
/* conv -> BatchNorm (eval) becomes one call that reads all parameters when it runs (arXiv 2305.11624).
 *
 * All pairs are judged on the untouched graph, then rewritten one by one: pairs share no node but an input, and writers
 * stay where they are, so no rewriting changes the verdict on another pair. */
#include "graph/conv_bn_pair.h"

#include <string.h>

enum { DECOMPOSED_ARGS = 10 };

typedef struct rewriter {
    cbn_graph *g;
    const cbn_host_vtable *vt;
    const cbn_pass_host *host;
    cbn_node_id fused;  /* the last node made */
    cbn_node_id anchor; /* the user's insertion point, which may be a node that goes */
    bool after;
    cbn_str efficient, get_conv, get_bn, output_size; /* interned once */
    cbn_error *err;
} rewriter;

static cbn_status intern(rewriter *r, const char *text, cbn_str *out) {
    return cbn_graph_intern(r->g, text, strlen(text), out, r->err);
}

static cbn_status intern_all(rewriter *r) {
    CBN_TRY(intern(r, "efficient_conv_bn_eval", &r->efficient));
    CBN_TRY(intern(r, "get_conv", &r->get_conv));
    CBN_TRY(intern(r, "get_bn", &r->get_bn));
    return intern(r, "output_size", &r->output_size);
}

static void release_all(cbn_graph *g, cbn_value *v, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) cbn_value_release(g, v[i]);
}

/* call_function of `callable` with the metadata of `bn`. The values are moved, on failure released. */
static cbn_status make_call(rewriter *r, cbn_host callable, cbn_value *args, uint32_t nargs, cbn_value *kw,
                            uint32_t nkw, cbn_node_id bn) {
    const cbn_node *from = cbn_graph_node(r->g, bn);
    r->vt->retain(callable);
    const cbn_node_spec spec = {.op = CBN_NODE_CALL_FUNCTION,
                                .target = cbn_value_host(callable),
                                .args = args,
                                .nargs = nargs,
                                .kw = kw,
                                .nkw = nkw,
                                .name = r->efficient,
                                .type_expr = from->type_expr,
                                .meta = from->meta};
    const cbn_status status = cbn_graph_create(r->g, &spec, &r->fused, r->err);
    if (status == CBN_OK) return CBN_OK;
    cbn_value_release(r->g, spec.target);
    release_all(r->g, args, nargs);
    release_all(r->g, kw, 2 * nkw);
    return status;
}

static cbn_status make_get_attr(rewriter *r, cbn_str name, cbn_str target, cbn_node_id *out) {
    const cbn_node_spec spec = {.op = CBN_NODE_GET_ATTR, .target = cbn_value_str(target), .name = name};
    return cbn_graph_create(r->g, &spec, out, r->err);
}

static cbn_status rewrite_modules(rewriter *r, const cbn_conv_bn_pair *p) {
    cbn_graph_set_insert_point(r->g, p->conv);
    cbn_node_id get_conv, get_bn;
    CBN_TRY(make_get_attr(r, r->get_conv, cbn_graph_node(r->g, p->conv)->target.u.str, &get_conv));
    CBN_TRY(make_get_attr(r, r->get_bn, cbn_graph_node(r->g, p->bn)->target.u.str, &get_bn));
    cbn_module_call call;
    const bool understood = cbn_module_call_read(r->g, p->conv, true, &call);
    assert(understood);
    (void)understood;
    cbn_value args[3] = {cbn_value_node(get_bn), cbn_value_node(get_conv), cbn_value_retain(r->g, *call.input)};
    cbn_value kw[2] = {cbn_value_str(r->output_size), cbn_value_none()};
    if (call.output_size != NULL) kw[1] = cbn_value_retain(r->g, *call.output_size);
    return make_call(r, r->host->efficient, args, 3, kw, call.output_size != NULL, p->bn);
}

/* A value of the graph's own equal to argument i: what the call gave, or the schema's default. */
static cbn_status argument(rewriter *r, const cbn_bound *b, int i, cbn_value *out) {
    const cbn_param *p = &b->op->params[i];
    if (b->given[i] || !cbn_value_is_seq(&b->v[i])) {
        *out = cbn_value_retain(r->g, b->v[i]);
        if (b->given[i] || p->default_str == NULL) return CBN_OK;
        cbn_str text;
        CBN_TRY(cbn_graph_intern(r->g, p->default_str, strlen(p->default_str), &text, r->err));
        *out = cbn_value_str(text);
        return CBN_OK;
    }
    /* A default list belongs to the table: a copy, of integers. */
    cbn_value items[CBN_MAX_DIMS];
    const cbn_seq *seq = b->v[i].u.seq;
    assert(seq->count <= CBN_MAX_DIMS);
    for (uint32_t k = 0; k < seq->count; k++) items[k] = seq->v[k];
    return cbn_value_seq(r->g, CBN_V_LIST, items, seq->count, NULL, out, r->err);
}

static cbn_status by_name(rewriter *r, const cbn_bound *b, const char *name, cbn_value *out) {
    return argument(r, b, cbn_op_param(b->op, name), out);
}

/* What follows (input, weight, bias) up to the last argument given, as a tuple. */
static cbn_status remaining(rewriter *r, const cbn_bound *b, cbn_value *out) {
    cbn_value items[CBN_OP_MAX_ARGS];
    int last = 2;
    for (int i = 3; i < b->n && !b->op->params[i].keyword_only; i++) {
        if (b->given[i]) last = i;
    }
    uint32_t n = 0;
    cbn_status status = CBN_OK;
    for (int i = 3; status == CBN_OK && i <= last; i++) {
        status = argument(r, b, i, &items[n]);
        n += status == CBN_OK;
    }
    if (status == CBN_OK) status = cbn_value_seq(r->g, CBN_V_TUPLE, items, n, NULL, out, r->err);
    if (status != CBN_OK) release_all(r->g, items, n);
    return status;
}

static cbn_status rewrite_functions(rewriter *r, const cbn_conv_bn_pair *p) {
    cbn_graph_set_insert_point(r->g, p->bn);
    cbn_bound bn, conv;
    CBN_TRY(cbn_op_bind(r->g, p->bn, &bn, r->err));
    CBN_TRY(cbn_op_bind(r->g, p->conv, &conv, r->err));
    static const struct { bool of_conv; const char *name; } source[DECOMPOSED_ARGS] = {
        {false, "weight"}, {false, "bias"},  {false, "running_mean"}, {false, "running_var"}, {false, "eps"},
        {true, NULL},      {true, "weight"}, {true, "bias"},          {true, "input"},        {true, NULL}};
    cbn_value args[DECOMPOSED_ARGS];
    uint32_t n = 0;
    cbn_status status = CBN_OK;
    while (status == CBN_OK && n < DECOMPOSED_ARGS) {
        if (source[n].name != NULL) {
            status = by_name(r, source[n].of_conv ? &conv : &bn, source[n].name, &args[n]);
        } else if (n == DECOMPOSED_ARGS - 1) {
            status = remaining(r, &conv, &args[n]);
        } else {
            args[n] = cbn_value_retain(r->g, cbn_graph_node(r->g, p->conv)->target);
        }
        n += status == CBN_OK;
    }
    if (status != CBN_OK) {
        release_all(r->g, args, n);
        return status;
    }
    return make_call(r, r->host->decomposed, args, n, NULL, 0, p->bn);
}

static cbn_status erase(rewriter *r, cbn_node_id id) {
    const cbn_node_id prev = cbn_graph_prev(r->g, id), next = cbn_graph_next(r->g, id);
    CBN_TRY(cbn_graph_erase(r->g, id, r->err));
    if (r->anchor == id) r->anchor = r->after ? prev : next;
    return CBN_OK;
}

/* Users of the BatchNorm take `fused`; for the tuple forms those are the users of its getitem nodes, which go. */
static cbn_status hand_over(rewriter *r, const cbn_conv_bn_pair *p) {
    if (!p->tuple) return cbn_graph_replace_uses(r->g, p->bn, r->fused, NULL, NULL, NULL, r->err);
    uint32_t edge;
    while ((edge = cbn_graph_node(r->g, p->bn)->first_user) != 0) {
        const cbn_node_id item = cbn_graph_edge(r->g, edge)->user;
        CBN_TRY(cbn_graph_replace_uses(r->g, item, r->fused, NULL, NULL, NULL, r->err));
        CBN_TRY(erase(r, item));
    }
    return CBN_OK;
}

static cbn_status rewrite(rewriter *r, const cbn_conv_bn_pair *p) {
    CBN_TRY(p->form == CBN_FORM_MODULE ? rewrite_modules(r, p) : rewrite_functions(r, p));
    const cbn_tensor_meta *t = cbn_graph_node(r->g, p->tuple ? p->conv : p->bn)->tensor; /* of a tuple: no shape */
    if (t != NULL) CBN_TRY(cbn_graph_set_tensor(r->g, r->fused, t, r->err));
    CBN_TRY(hand_over(r, p));
    CBN_TRY(erase(r, p->bn));
    return erase(r, p->conv);
}

static cbn_status rewrite_all(rewriter *r, const cbn_pair_list *pairs, cbn_fold_report *report) {
    cbn_graph_snapshot *snapshot = NULL;
    if (!r->host->caller_restores) CBN_TRY(cbn_graph_snapshot_take(r->g, &snapshot, r->err));
    r->anchor = cbn_graph_insert_anchor(r->g, &r->after);
    cbn_status status = intern_all(r);
    for (int i = 0; status == CBN_OK && i < pairs->count; i++) {
        const cbn_conv_bn_pair *p = &pairs->v[i];
        if (p->reason != CBN_REASON_OK) continue;
        status = rewrite(r, p);
        if (status == CBN_OK) report->rows[i].new_name = cbn_graph_node(r->g, r->fused)->name;
    }
    if (status == CBN_OK) {
        if (r->after) cbn_graph_set_insert_after(r->g, r->anchor);
        else cbn_graph_set_insert_point(r->g, r->anchor);
        cbn_graph_snapshot_drop(r->g, snapshot);
    } else if (snapshot != NULL) {
        cbn_graph_snapshot_restore(r->g, snapshot);
    }
    return status;
}

cbn_status cbn_pass_efficient(cbn_graph *g, const cbn_pass_host *host, cbn_fold_report *report, cbn_error *err) {
    *report = (cbn_fold_report){0};
    cbn_pair_list pairs;
    cbn_status status = cbn_pairs_find(g, host, CBN_PAIR_EFFICIENT, &pairs, err);
    if (status == CBN_OK) status = cbn_pairs_report(g, &pairs, CBN_OUTCOME_FUSED, report, err);
    int found = 0;
    for (int i = 0; status == CBN_OK && i < pairs.count; i++) found += pairs.v[i].reason == CBN_REASON_OK;
    if (status == CBN_OK && found > 0) {
        rewriter r = {.g = g, .vt = cbn_graph_host(g), .host = host, .err = err};
        status = rewrite_all(&r, &pairs, report);
    }
    cbn_pairs_free(&pairs);
    if (status != CBN_OK) cbn_fold_report_free(report);
    return status;
}
