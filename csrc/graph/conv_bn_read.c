/* SPDX-License-Identifier: BSD-3-Clause */
#include "graph/conv_bn_priv.h"

#include <string.h>

/* Two-pointer glob: * any run, ? any character. */
static bool glob(const char *pattern, const char *text) {
    const char *star = NULL, *resume = NULL;
    while (*text != '\0') {
        if (*pattern == '*') {
            star = pattern++;
            resume = text;
        } else if (*pattern == '?' || *pattern == *text) {
            pattern++;
            text++;
        } else if (star != NULL) {
            pattern = star + 1;
            text = ++resume;
        } else {
            return false;
        }
    }
    while (*pattern == '*') pattern++;
    return *pattern == '\0';
}

bool cbn_pair_skipped(const cbn_pair_context *c, const cbn_node *n) {
    for (int i = 0; i < c->host->nskip; i++) {
        if (glob(c->host->skip[i], cbn_graph_str(c->g, n->name, NULL))) return true;
        if (n->op == CBN_NODE_CALL_MODULE && n->target.tag == CBN_V_STR &&
            glob(c->host->skip[i], cbn_graph_str(c->g, n->target.u.str, NULL))) {
            return true;
        }
    }
    return false;
}

bool cbn_module_call_read(const cbn_graph *g, cbn_node_id id, bool sized, cbn_module_call *out) {
    const cbn_args *a = cbn_graph_node(g, id)->args;
    const cbn_value *got[2] = {NULL, NULL};
    static const char *const keys[2] = {"input", "output_size"};
    const uint32_t most = sized ? 2 : 1;
    if (a->nargs > most) return false;
    for (uint32_t i = 0; i < a->nargs; i++) got[i] = &a->v[i];
    for (uint32_t k = 0; k < a->nkw; k++) {
        const char *key = cbn_graph_str(g, cbn_args_key(a, k), NULL);
        uint32_t at = 0;
        while (at < most && strcmp(key, keys[at]) != 0) at++;
        if (at == most || got[at] != NULL) return false;
        got[at] = cbn_args_kw(a, k);
    }
    out->input = got[0];
    out->output_size = got[1] != NULL && got[1]->tag != CBN_V_NONE ? got[1] : NULL;
    return got[0] != NULL;
}

int cbn_constant_truth(const cbn_value *v) {
    if (v == NULL) return 0;
    if (v->tag == CBN_V_BOOL) return v->u.b;
    if (v->tag == CBN_V_INT) return v->u.i != 0;
    return -1;
}

cbn_status cbn_layer_read_module(cbn_pair_context *c, cbn_node_id id, cbn_layer *out) {
    const cbn_node *n = cbn_graph_node(c->g, id);
    out->id = id;
    out->module = true;
    out->m.kind = CBN_MODULE_OTHER;
    if (c->host->root == NULL || n->target.tag != CBN_V_STR) return CBN_OK;
    const cbn_str target = n->target.u.str;
    const uint32_t slot = target % CBN_TARGET_CACHE;
    if (c->cache.target[slot] != target) {
        cbn_host module;
        CBN_TRY(c->vt->resolve(c->host->root, cbn_graph_str(c->g, target, NULL), &module, c->err));
        if (module == NULL) return CBN_OK;
        c->cache.target[slot] = CBN_STR_NONE;
        CBN_TRY(c->vt->module(module, &c->cache.m[slot], c->err));
        c->cache.target[slot] = target;
    }
    out->m = c->cache.m[slot];
    out->nd = out->m.nd;
    out->transposed = out->m.kind == CBN_MODULE_CONV_TRANSPOSE;
    return CBN_OK;
}

cbn_op_family cbn_node_family(const cbn_pair_context *c, const cbn_node *n) {
    if (n->op != CBN_NODE_CALL_FUNCTION || n->opcode == 0) return CBN_FAMILY_NONE;
    const cbn_op *row = cbn_op_table_row(cbn_graph_ops(c->g), n->opcode);
    return row == NULL ? CBN_FAMILY_NONE : row->family;
}

cbn_status cbn_layer_bind(cbn_pair_context *c, cbn_node_id id, cbn_layer *out, bool *fits) {
    out->id = id;
    out->module = false;
    const cbn_status status = cbn_op_bind(c->g, id, &out->b, c->err);
    *fits = status == CBN_OK;
    return status == CBN_BAD_TYPE || status == CBN_BAD_VALUE ? CBN_OK : status;
}

static cbn_status constant_param(cbn_pair_context *c, cbn_pair_param *p, cbn_host h) {
    cbn_array_info info;
    bool is_array = false;
    CBN_TRY(c->vt->array(h, &info, &is_array, c->err));
    if (!is_array) {
        p->state = PARAM_RUN_TIME; /* whatever it is, it is no array that could be folded */
        return CBN_OK;
    }
    p->state = PARAM_CONSTANT;
    p->array = h;
    p->known = info.kind != 'O';
    p->kind = info.kind;
    p->itemsize = info.itemsize;
    p->ndim = info.ndim;
    for (int i = 0; i < info.ndim && i < CBN_MAX_SPATIAL + 2; i++) p->shape[i] = info.shape[i];
    return CBN_OK;
}

static cbn_status module_param(cbn_pair_context *c, cbn_pair_param *p, cbn_host h) {
    *p = (cbn_pair_param){0};
    return h == NULL ? CBN_OK : constant_param(c, p, h);
}

cbn_status cbn_param_of_value(cbn_pair_context *c, cbn_pair_param *p, const cbn_value *v) {
    *p = (cbn_pair_param){0};
    if (v == NULL || v->tag == CBN_V_NONE) return CBN_OK;
    if (v->tag == CBN_V_HOST) return constant_param(c, p, v->u.host);
    p->state = PARAM_RUN_TIME;
    if (v->tag != CBN_V_NODE) return CBN_OK;
    p->node = v->u.node;
    const cbn_node *n = cbn_graph_node(c->g, v->u.node);
    if (n->op == CBN_NODE_GET_ATTR && n->target.tag == CBN_V_STR && c->host->root != NULL) {
        cbn_host h;
        CBN_TRY(c->vt->resolve(c->host->root, cbn_graph_str(c->g, n->target.u.str, NULL), &h, c->err));
        return h == NULL ? CBN_OK : constant_param(c, p, h);
    }
    const cbn_tensor_meta *t = n->tensor;
    if (t != NULL && t->ndim >= 0) {
        p->known = true;
        p->kind = t->kind;
        p->itemsize = t->itemsize;
        p->ndim = t->ndim;
        for (int i = 0; i < t->ndim && i < CBN_MAX_SPATIAL + 2; i++) p->shape[i] = t->shape[i];
    }
    return CBN_OK;
}

cbn_status cbn_bn_params_read(cbn_pair_context *c) {
    const cbn_layer *l = &c->bn;
    if (l->module) {
        const cbn_host arrays[] = {l->m.weight, l->m.bias, l->m.mean, l->m.var};
        for (int i = 0; i < 4; i++) CBN_TRY(module_param(c, &c->p[P_GAMMA + i], arrays[i]));
        c->eps_value = l->m.eps;
        c->eps_constant = true;
        return CBN_OK;
    }
    static const char *const args[] = {"weight", "bias", "running_mean", "running_var"};
    for (int i = 0; i < 4; i++) CBN_TRY(cbn_param_of_value(c, &c->p[P_GAMMA + i], cbn_layer_arg(l, args[i])));
    c->eps = cbn_layer_arg(l, "eps");
    c->eps_constant = c->eps != NULL && (c->eps->tag == CBN_V_FLOAT || c->eps->tag == CBN_V_INT);
    if (c->eps_constant) c->eps_value = c->eps->tag == CBN_V_FLOAT ? c->eps->u.f : (double)c->eps->u.i;
    return CBN_OK;
}

cbn_status cbn_conv_params_read(cbn_pair_context *c) {
    const cbn_layer *l = &c->conv;
    if (l->module) {
        CBN_TRY(module_param(c, &c->p[P_WEIGHT], l->m.weight));
        return module_param(c, &c->p[P_BIAS], l->m.bias);
    }
    CBN_TRY(cbn_param_of_value(c, &c->p[P_WEIGHT], cbn_layer_arg(l, "weight")));
    return cbn_param_of_value(c, &c->p[P_BIAS], cbn_layer_arg(l, "bias"));
}
