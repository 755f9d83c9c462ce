/* SPDX-License-Identifier: BSD-3-Clause */
/* The questions are asked in the order of CBN_FOLD_REASONS; the first answered with a reason ends the interview. */
#include "graph/conv_bn_priv.h"

#include <math.h>
#include <string.h>

/* Runs a question that may fail (status) or end the interview (true). */
#define ASK(expr)                                                                                                      \
    do {                                                                                                               \
        bool ask_done_ = false;                                                                                        \
        CBN_TRY(expr);                                                                                                 \
        if (ask_done_) return CBN_OK;                                                                                  \
    } while (0)

static bool is_aten(const cbn_layer *l) { return strncmp(l->b.op->name, "aten.", 5) == 0; }

static bool given(const cbn_layer *l, const char *name) {
    const cbn_value *v = cbn_layer_arg(l, name);
    return v != NULL && v->tag != CBN_V_NONE;
}

/* ---- the questions about the BatchNorm alone ---- */

static cbn_status ask_bn_mode(cbn_pair_context *c, bool *done) {
    const cbn_layer *l = &c->bn;
    const cbn_node *n = cbn_graph_node(c->g, l->id);
    if (cbn_pair_skipped(c, n)) return *done = keep(c, CBN_REASON_SKIPPED_BY_USER, 0, NULL), CBN_OK;
    if (!l->module) {
        bool fits;
        CBN_TRY(cbn_layer_bind(c, l->id, &c->bn, &fits));
        if (!fits) {
            return *done = keep(c, CBN_REASON_UNSUPPORTED_BN_OP, 0, "its arguments do not fit the operator's schema"),
                   CBN_OK;
        }
        c->pair->form = is_aten(l) ? CBN_FORM_ATEN : CBN_FORM_FUNCTIONAL;
    }
    const int training = l->module ? l->m.training : cbn_constant_truth(cbn_layer_arg(l, "training"));
    if (training != 0) {
        const char *hint = l->module       ? NULL
                           : training == 1 ? "called with training=True"
                                           : "training is computed at run time: pass a constant False";
        return *done = keep(c, CBN_REASON_BN_TRAINING, 0, hint), CBN_OK;
    }
    CBN_TRY(cbn_bn_params_read(c));
    if (c->p[P_MEAN].state == PARAM_ABSENT || c->p[P_VAR].state == PARAM_ABSENT) {
        *done = keep(c, CBN_REASON_NO_RUNNING_STATS, 0, NULL);
    }
    return CBN_OK;
}

/* The results of a tuple form may be read by getitem only, and only result 0 may be used. */
static bool tuple_is_read_by_item_0(const cbn_pair_context *c) {
    for (uint32_t e = cbn_graph_node(c->g, c->bn.id)->first_user; e != 0; e = cbn_graph_edge(c->g, e)->next_user) {
        const cbn_node *user = cbn_graph_node(c->g, cbn_graph_edge(c->g, e)->user);
        const cbn_args *a = user->args;
        if (cbn_node_family(c, user) != CBN_FAMILY_GETITEM || a->nargs != 2 || a->nkw != 0) return false;
        if (a->v[0].tag != CBN_V_NODE || a->v[1].tag != CBN_V_INT) return false;
        if (a->v[1].u.i != 0 && user->n_users != 0) return false;
    }
    return true;
}

static bool ask_bn_form(cbn_pair_context *c, const cbn_value **input) {
    cbn_layer *l = &c->bn;
    if (l->module) {
        if (!cbn_module_call_read(c->g, l->id, false, &l->call)) {
            return keep(c, CBN_REASON_UNSUPPORTED_BN_OP, 0, "called with other arguments than one input");
        }
        *input = l->call.input;
    } else {
        if (given(l, "out")) return keep(c, CBN_REASON_UNSUPPORTED_BN_OP, 0, "it writes into out=");
        if (c->pair->tuple && !tuple_is_read_by_item_0(c)) {
            return keep(c, CBN_REASON_UNSUPPORTED_BN_OP, 0, "more of its results than the first is used");
        }
        *input = cbn_layer_arg(l, "input");
    }
    if (c->eps_constant ? !(isfinite(c->eps_value) && c->eps_value >= 0.0)
                        : c->eps == NULL || c->eps->tag != CBN_V_NODE) {
        return keep(c, CBN_REASON_UNSUPPORTED_BN_OP, 0, "eps is not a finite number >= 0");
    }
    return false;
}

/* ---- the questions about the producer ---- */

static cbn_status ask_producer(cbn_pair_context *c, const cbn_value *input, bool *done) {
    if (input == NULL || input->tag != CBN_V_NODE) return *done = keep(c, CBN_REASON_NOT_CONV, 0, NULL), CBN_OK;
    const cbn_node_id id = input->u.node;
    const cbn_node *n = cbn_graph_node(c->g, id);
    cbn_layer *l = &c->conv;
    const char *hint = NULL;
    bool conv = false, understood = true;
    if (n->op == CBN_NODE_CALL_MODULE) {
        CBN_TRY(cbn_layer_read_module(c, id, l));
        conv = l->m.kind == CBN_MODULE_LINEAR || l->m.kind == CBN_MODULE_CONV || l->transposed;
        if (conv && c->bn.module && !cbn_module_call_read(c->g, id, l->transposed, &l->call)) {
            understood = false;
            hint = "the convolution is called with arguments that are not understood";
        }
    } else {
        l->family = cbn_node_family(c, n);
        conv = l->family == CBN_FAMILY_LINEAR || l->family == CBN_FAMILY_CONV ||
               l->family == CBN_FAMILY_CONV_TRANSPOSE || l->family == CBN_FAMILY_CONVOLUTION;
        if (conv) {
            CBN_TRY(cbn_layer_bind(c, id, l, &understood));
            if (!understood) hint = "the arguments of the convolution do not fit the operator's schema";
        }
        if (conv && understood && given(l, "out")) {
            understood = false;
            hint = "the convolution writes into out=";
        }
        if (conv && understood) {
            l->nd = l->family == CBN_FAMILY_CONVOLUTION ? -1 : l->b.op->nd;
            int transposed = l->family == CBN_FAMILY_CONV_TRANSPOSE;
            if (l->family == CBN_FAMILY_CONVOLUTION) transposed = cbn_constant_truth(cbn_layer_arg(l, "transposed"));
            l->transposed = transposed == 1;
            if (transposed < 0) {
                understood = false;
                hint = "transposed is computed at run time";
            }
        }
    }
    if (conv && understood && l->module != c->bn.module) {
        understood = false;
        hint = c->bn.module ? "a BatchNorm module after a functional convolution: use one form for both"
                            : "a functional batch_norm after a convolution module: use one form for both";
    }
    if (!conv || !understood) return *done = keep(c, CBN_REASON_NOT_CONV, id, hint), CBN_OK;
    c->pair->conv = id;
    return CBN_OK;
}

static bool count_node(cbn_node_id id, void *arg) {
    uint32_t *state = arg; /* {node, count} */
    state[1] += id == state[0];
    return true;
}

static bool ask_users(cbn_pair_context *c) {
    const cbn_node *conv = cbn_graph_node(c->g, c->conv.id);
    cbn_node_id other = 0;
    for (uint32_t e = conv->first_user; e != 0; e = cbn_graph_edge(c->g, e)->next_user) {
        const cbn_node_id user = cbn_graph_edge(c->g, e)->user;
        if (cbn_graph_node(c->g, user)->op == CBN_NODE_OUTPUT) return keep(c, CBN_REASON_IS_OUTPUT, user, NULL);
        if (user != c->bn.id && other == 0) other = user;
    }
    if (other != 0) return keep(c, CBN_REASON_MULTI_USER, other, NULL);
    const cbn_args *a = cbn_graph_node(c->g, c->bn.id)->args;
    uint32_t uses[2] = {c->conv.id, 0};
    for (uint32_t i = 0; i < a->nargs; i++) cbn_value_each_node(&a->v[i], count_node, uses);
    for (uint32_t k = 0; k < a->nkw; k++) cbn_value_each_node(cbn_args_kw(a, k), count_node, uses);
    if (uses[1] > 1) {
        return keep(c, CBN_REASON_MULTI_USER, c->bn.id, "the BatchNorm takes the convolution's output more than once");
    }
    if (c->purpose == CBN_PAIR_FOLD && c->conv.module && c->conv.m.training) {
        return keep(c, CBN_REASON_CONV_TRAINING, c->conv.id, NULL);
    }
    return false;
}

/* ---- shapes ---- */

/* Axes of the convolution's output; -1: not known. */
static const cbn_tensor_meta *output_meta(const cbn_pair_context *c) {
    const cbn_tensor_meta *t = cbn_graph_node(c->g, c->conv.id)->tensor;
    return t != NULL && t->ndim >= 0 ? t : NULL;
}

static int64_t groups_of(const cbn_pair_context *c) {
    if (c->conv.module) return c->conv.m.groups;
    const cbn_value *v = cbn_layer_arg(&c->conv, "groups");
    return v == NULL ? 1 : v->tag == CBN_V_INT ? v->u.i : -1;
}

static bool ask_channels(cbn_pair_context *c) {
    const cbn_layer *l = &c->conv;
    const cbn_pair_param *w = &c->p[P_WEIGHT];
    const bool linear = l->module ? l->m.kind == CBN_MODULE_LINEAR : l->family == CBN_FAMILY_LINEAR;
    int nd = l->nd;
    if (w->state == PARAM_ABSENT) return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id, "the convolution has no weight");
    if (nd < 0 && w->known) nd = w->ndim - 2;
    if (w->known && (w->ndim != nd + 2 || w->ndim > CBN_MAX_SPATIAL + 2)) {
        return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id, "the weight has not the convolution's number of axes");
    }
    int64_t out = l->module ? l->m.channels : -1;
    if (w->known) {
        const int64_t groups = groups_of(c);
        out = !l->transposed ? w->shape[0] : groups > 0 ? w->shape[1] * groups : -1;
    }
    int64_t length = -1;
    for (int i = P_BIAS; i < P_COUNT; i++) {
        const cbn_pair_param *p = &c->p[i];
        if (!p->known) continue;
        const bool of_bn = i != P_BIAS;
        const bool fits = p->ndim == 1 && (out < 0 || p->shape[0] == out || (linear && of_bn && p->shape[0] == 1)) &&
                          (!of_bn || length < 0 || p->shape[0] == length);
        if (!fits) return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id, NULL);
        if (of_bn) length = p->shape[0];
    }
    if (c->bn.module && out >= 0 && c->bn.m.channels != out && !(linear && c->bn.m.channels == 1)) {
        return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id, NULL);
    }
    const cbn_tensor_meta *t = output_meta(c);
    if (!linear) {
        if (c->bn.module && c->bn.nd >= 0 && c->bn.nd != nd) {
            return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id,
                        "the BatchNorm is for another number of axes than the convolution");
        }
        if (t != NULL && nd >= 0 && t->ndim != nd + 2) {
            return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id,
                        "the convolution's input has no batch axis: axis 1 of its output is not the channel axis");
        }
        return false;
    }
    /* Linear: the features are the last axis, BatchNorm normalises axis 1. */
    const int64_t features = c->bn.module ? c->bn.m.channels : length;
    const bool broadcast = t != NULL && t->ndim >= 2 && features == 1 && t->shape[1] == 1;
    if (t != NULL && t->ndim == 2 && features >= 0 && features != t->shape[1]) {
        return keep(c, CBN_REASON_CHANNEL_MISMATCH, l->id, NULL);
    }
    if (t != NULL && t->ndim != 2 && !broadcast) return keep(c, CBN_REASON_LINEAR_ND, l->id, NULL);
    if (t == NULL && c->bn.module && c->bn.nd > 1) {
        return keep(c, CBN_REASON_LINEAR_ND, l->id, "a BatchNorm2d or 3d takes inputs of four or five axes only");
    }
    if (t == NULL && c->purpose == CBN_PAIR_FOLD) {
        return keep(c, CBN_REASON_LINEAR_ND, l->id,
                    "how many axes the linear output has is not known: run fx.shape_prop(gm, example) first, or use "
                    "efficient_conv_bn_eval, which decides at each call");
    }
    c->pair->run_time_rule = t == NULL;
    return false;
}

/* ---- mutation ---- */

/* Can nothing stand between the two that writes? Asked first: nearly always it is so and no analysis is needed. */
static bool nothing_writes_between(const cbn_pair_context *c) {
    int steps = 0;
    for (cbn_node_id id = cbn_graph_next(c->g, c->conv.id); id != c->bn.id; id = cbn_graph_next(c->g, id)) {
        if (id == 0 || ++steps > 64) return false;
        const cbn_node *n = cbn_graph_node(c->g, id);
        if (n->op == CBN_NODE_GET_ATTR || n->op == CBN_NODE_PLACEHOLDER) continue;
        const cbn_op_family family = cbn_node_family(c, n);
        /* out= is always given by keyword, and a batch_norm may write its statistics */
        if (n->op != CBN_NODE_CALL_FUNCTION || n->opcode == 0 || n->args->nkw != 0 || family == CBN_FAMILY_BATCH_NORM ||
            family == CBN_FAMILY_BATCH_NORM_TUPLE) {
            return false;
        }
        const cbn_effect effect = cbn_op_table_row(cbn_graph_ops(c->g), n->opcode)->effect;
        if (effect != CBN_EFFECT_PURE && effect != CBN_EFFECT_VIEW && effect != CBN_EFFECT_RANDOM) return false;
    }
    return true;
}

/* The first writer of a parameter's memory but for the pair itself (what a hooked module does is asked elsewhere). */
static cbn_status writer_of(cbn_pair_context *c, const cbn_pair_param *p, cbn_node_id after, cbn_node_id before,
                            cbn_node_id *out) {
    *out = 0;
    if (p->state == PARAM_ABSENT || (p->node == 0 && p->array == NULL)) return CBN_OK;
    do {
        if (p->node != 0) *out = cbn_effects_writer(c->effects, p->node, after, before);
        else CBN_TRY(cbn_effects_array_writer(c->effects, p->array, after, before, out, c->err));
        after = *out;
    } while (*out != 0 && (*out == c->conv.id || *out == c->bn.id));
    return CBN_OK;
}

static cbn_status ask_mutation(cbn_pair_context *c, bool *done) {
    const bool fold = c->purpose == CBN_PAIR_FOLD;
    if (!fold && nothing_writes_between(c)) return CBN_OK;
    if (c->effects == NULL) CBN_TRY(cbn_effects_build(c->g, c->host->root, &c->effects, c->err));
    /* Folding freezes all six parameters for the whole run. The efficient node stands before a module's convolution
     * (what is read too early is the BatchNorm's) or before a functional BatchNorm (what is read too late is the
     * convolution's). */
    const cbn_node_id after = fold ? 0 : c->conv.id, before = fold ? 0 : c->bn.id;
    const int first = !fold && c->conv.module ? P_GAMMA : P_WEIGHT;
    const int last = fold || c->conv.module ? P_COUNT : P_GAMMA;
    cbn_node_id writer = 0;
    for (int i = first; i < last && writer == 0; i++) CBN_TRY(writer_of(c, &c->p[i], after, before, &writer));
    if (writer == 0 && !fold && !c->conv.module) {
        const cbn_value *x = cbn_layer_arg(&c->conv, "input");
        cbn_pair_param input;
        CBN_TRY(cbn_param_of_value(c, &input, x));
        CBN_TRY(writer_of(c, &input, after, before, &writer));
    }
    static const char frozen[] = "a parameter may be written while the graph runs; efficient_conv_bn_eval copes";
    if (writer != 0) *done = keep(c, CBN_REASON_MUTATED_BETWEEN, writer, fold ? frozen : NULL);
    return CBN_OK;
}

/* ---- the rest ---- */

static bool ask_constants(cbn_pair_context *c) {
    if (c->purpose == CBN_PAIR_FOLD) {
        for (int i = 0; i < P_COUNT; i++) {
            if (c->p[i].state != PARAM_RUN_TIME) continue;
            return keep(c, CBN_REASON_NONCONST_PARAM, c->p[i].node, NULL);
        }
        if (!c->eps_constant) return keep(c, CBN_REASON_NONCONST_PARAM, c->eps->u.node, "eps is computed at run time");
    }
    for (int i = 0; i < P_COUNT; i++) {
        const cbn_pair_param *p = &c->p[i];
        if (p->state == PARAM_CONSTANT && !p->known) {
            return keep(c, CBN_REASON_DTYPE_MIX, p->node, "a parameter is not an array that NumPy can read");
        }
        const bool one = i != P_BIAS || !c->p[P_WEIGHT].known || p->itemsize == c->p[P_WEIGHT].itemsize;
        if (!p->known) continue;
        if (p->kind != 'f' || p->itemsize > 8 || !one) return keep(c, CBN_REASON_DTYPE_MIX, p->node, NULL);
    }
    if (c->purpose == CBN_PAIR_EFFICIENT && c->conv.module && c->conv.call.output_size != NULL &&
        c->conv.call.output_size->has_nodes) {
        return keep(c, CBN_REASON_OUTPUT_SIZE_ARG, c->conv.id, NULL);
    }
    return false;
}

static cbn_status ask_finite(cbn_pair_context *c, bool *done) {
    if (c->host->finite == NULL || !c->eps_constant || c->p[P_WEIGHT].state != PARAM_CONSTANT) return CBN_OK;
    cbn_host bn[4];
    for (int i = 0; i < 4; i++) {
        if (c->p[P_GAMMA + i].state == PARAM_RUN_TIME) return CBN_OK;
        bn[i] = c->p[P_GAMMA + i].array;
    }
    bool finite = true;
    CBN_TRY(c->host->finite(bn, c->eps_value, c->p[P_WEIGHT].array, &finite, c->err));
    if (!finite) *done = keep(c, CBN_REASON_NONFINITE_FOLD, 0, NULL);
    return CBN_OK;
}

static bool ask_last(cbn_pair_context *c) {
    if (c->conv.module && c->conv.m.hooked) return keep(c, CBN_REASON_HOOKED, c->conv.id, NULL);
    if (c->bn.module && c->bn.m.hooked) return keep(c, CBN_REASON_HOOKED, c->bn.id, NULL);
    const cbn_node *bn = cbn_graph_node(c->g, c->bn.id);
    uint32_t used = bn->n_users;
    if (c->pair->tuple) {
        used = 0;
        for (uint32_t e = bn->first_user; e != 0; e = cbn_graph_edge(c->g, e)->next_user) {
            used += cbn_graph_node(c->g, cbn_graph_edge(c->g, e)->user)->n_users;
        }
    }
    return used == 0 && keep(c, CBN_REASON_BN_OUTPUT_UNUSED, 0, NULL);
}

cbn_status cbn_pair_interview(cbn_pair_context *c) {
    const cbn_value *input = NULL;
    ASK(ask_bn_mode(c, &ask_done_));
    if (ask_bn_form(c, &input)) return CBN_OK;
    ASK(ask_producer(c, input, &ask_done_));
    if (ask_users(c)) return CBN_OK;
    CBN_TRY(cbn_conv_params_read(c));
    if (ask_channels(c)) return CBN_OK;
    ASK(ask_mutation(c, &ask_done_));
    if (ask_constants(c)) return CBN_OK;
    ASK(ask_finite(c, &ask_done_));
    if (ask_last(c)) return CBN_OK;
    c->pair->reason = CBN_REASON_OK;
    return CBN_OK;
}
