/* SPDX-License-Identifier: BSD-3-Clause */
/* Layouts: convolution weights in channels_last, and strides that what reads an array, or the caller, may rely on.
 *
 * What the strides were the host has noted at the nodes; force_stride_order(x, strides) is x while x has them. */
#include "graph/passes.h"

#include <string.h>

#include "base/cbn_alloc.h"

static cbn_status call(cbn_freeze *f, cbn_host callable, const char *name, cbn_value *args, uint32_t nargs,
                       const cbn_value *kw, uint32_t nkw, cbn_node_id *out) {
    cbn_str text;
    CBN_TRY(cbn_graph_intern(f->g, name, strlen(name), &text, f->err));
    cbn_graph_host(f->g)->retain(callable);
    const cbn_node_spec spec = {.op = CBN_NODE_CALL_FUNCTION,
                                .target = cbn_value_host(callable),
                                .args = args,
                                .nargs = nargs,
                                .kw = kw,
                                .nkw = nkw,
                                .name = text};
    const cbn_status status = cbn_graph_create(f->g, &spec, out, f->err);
    if (status != CBN_OK) cbn_value_release(f->g, spec.target);
    return status;
}

/* The user's insertion point, untouched by a step: these steps erase nothing. */
typedef struct place {
    cbn_node_id anchor;
    bool after;
} place;

static place place_save(const cbn_graph *g) {
    place p;
    p.anchor = cbn_graph_insert_anchor(g, &p.after);
    return p;
}

static void place_restore(cbn_graph *g, const place *p) {
    if (p->after) cbn_graph_set_insert_after(g, p->anchor);
    else cbn_graph_set_insert_point(g, p->anchor);
}

/* ---- force_stride_order ------------------------------------------------------------------------------------------ */
/* Is this node force_stride_order, of these very strides if they are known? */
static bool forces(const cbn_graph *g, cbn_node_id id, const cbn_strides *s) {
    cbn_bound b;
    cbn_error ignored;
    if (cbn_graph_node(g, id)->opcode != CBN_OP_PRIMS_FORCE_STRIDE_ORDER_DEFAULT) return false;
    if (s->ndim < 0) return true;
    if (cbn_op_bind(g, id, &b, &ignored) != CBN_OK) return false;
    const cbn_value *v = &b.v[1];
    if ((v->tag != CBN_V_LIST && v->tag != CBN_V_TUPLE) || v->u.seq->count != (uint32_t)s->ndim) return false;
    for (int i = 0; i < s->ndim; i++) {
        if (v->u.seq->v[i].tag != CBN_V_INT || v->u.seq->v[i].u.i != s->stride[i]) return false;
    }
    return true;
}

/* force_stride_order(input, strides) in front of `before`, with the input's shape and strides. */
static cbn_status force(cbn_freeze *f, const cbn_layout_host *host, cbn_node_id input, const cbn_strides *s,
                        cbn_node_id before, cbn_node_id *out) {
    cbn_value items[CBN_MAX_DIMS], args[2] = {cbn_value_node(input)};
    for (int i = 0; i < s->ndim; i++) items[i] = cbn_value_int(s->stride[i]);
    CBN_TRY(cbn_value_seq(f->g, CBN_V_TUPLE, items, (uint32_t)s->ndim, NULL, &args[1], f->err));
    cbn_graph_set_insert_point(f->g, before);
    const cbn_status status = call(f, host->force, "force_stride_order", args, 2, NULL, 0, out);
    if (status != CBN_OK) {
        cbn_value_release(f->g, args[1]);
        return status;
    }
    const cbn_tensor_meta *t = cbn_graph_node(f->g, input)->tensor;
    return t != NULL ? cbn_graph_set_tensor(f->g, *out, t, f->err) : CBN_OK;
}

/* What the host noted at a node, as far as it fits the node's shape. */
static cbn_status strides_of(cbn_freeze *f, const cbn_layout_host *host, cbn_node_id id, cbn_strides *out) {
    const cbn_node *n = cbn_graph_node(f->g, id);
    *out = (cbn_strides){.ndim = CBN_STRIDES_UNKNOWN};
    if (n->meta == NULL) return CBN_OK;
    cbn_graph_lock(f->g); /* host code may run */
    const cbn_status status = host->strides(n->meta, out, f->err);
    cbn_graph_unlock(f->g);
    if (out->ndim >= 0 && n->tensor != NULL && n->tensor->ndim != out->ndim) out->ndim = CBN_STRIDES_UNKNOWN;
    return status;
}

static const char not_dense[] = "it has gaps or overlaps in memory: no copy would have its strides";

/* ---- inputs of as_strided ---------------------------------------------------------------------------------------- */
/* Does nobody but `user` see this memory? A new array with one user. */
static bool is_fresh(const cbn_graph *g, cbn_node_id id, cbn_node_id user) {
    const cbn_node *n = cbn_graph_node(g, id);
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(g), n->opcode);
    cbn_bound b;
    cbn_error ignored;
    if (op == NULL || (op->effect != CBN_EFFECT_PURE) || op->nreturns != 1) return false;
    if (cbn_node_single_user(g, id) != user || cbn_op_bind(g, id, &b, &ignored) != CBN_OK) return false;
    for (int i = 0; i < b.n; i++) {
        if (op->params[i].aliased && (op->params[i].variadic || b.v[i].tag != CBN_V_NONE)) return false;
        if (strncmp(op->name, "operator.", 9) == 0 && cbn_value_is_seq(&b.v[i])) return false; /* [x] + [y] holds x */
    }
    return true;
}

static cbn_status input_layout(cbn_freeze *f, const cbn_layout_host *host, const cbn_effects *effects,
                               cbn_node_id id) {
    cbn_graph *g = f->g;
    cbn_bound b;
    cbn_error ignored; /* a call that does not fit the schema fails when it runs, as before */
    if (cbn_op_bind(g, id, &b, &ignored) != CBN_OK || b.v[0].tag != CBN_V_NODE) {
        return cbn_freeze_keep(f, CBN_STEP_INPUT_LAYOUT, CBN_FREEZE_UNSUPPORTED, id, 0, NULL);
    }
    const cbn_node_id input = b.v[0].u.node;
    const cbn_opcode opcode = cbn_graph_node(g, id)->opcode;
    cbn_strides s;
    CBN_TRY(strides_of(f, host, input, &s));
    if (forces(g, input, &s)) return CBN_OK;
    if (s.ndim < 0) {
        return cbn_freeze_keep(f, CBN_STEP_INPUT_LAYOUT, CBN_FREEZE_STRIDES_UNKNOWN, id, input,
                               s.ndim == CBN_STRIDES_NOT_DENSE ? not_dense : NULL);
    }
    const cbn_value *offset = cbn_bound_get(&b, "storage_offset");
    if (s.offset != 0 && offset != NULL && offset->tag != CBN_V_NONE) {
        return cbn_freeze_keep(f, CBN_STEP_INPUT_LAYOUT, CBN_FREEZE_UNSUPPORTED, id, input,
                               "storage_offset counts from the memory of another array, which no copy would have");
    }
    const bool scatter = opcode == CBN_OP_ATEN_AS_STRIDED_SCATTER_DEFAULT; /* reads only */
    if (!scatter && !is_fresh(g, input, id)) {
        if (opcode == CBN_OP_ATEN_AS_STRIDED__DEFAULT) {
            return cbn_freeze_keep(f, CBN_STEP_INPUT_LAYOUT, CBN_FREEZE_IN_PLACE, id, input, NULL);
        }
        if (cbn_effects_written(effects, input)) {
            return cbn_freeze_keep(f, CBN_STEP_INPUT_LAYOUT, CBN_FREEZE_MUTATED, id,
                                   cbn_effects_writer(effects, input, 0, 0), NULL);
        }
    }
    cbn_node_id forced;
    CBN_TRY(force(f, host, input, &s, id, &forced));
    CBN_TRY(cbn_graph_replace_input(g, id, input, forced, f->err));
    return cbn_freeze_done(f, CBN_STEP_INPUT_LAYOUT, id, cbn_graph_node(g, forced)->name);
}

cbn_status cbn_pass_input_layout(cbn_freeze *f, const cbn_layout_host *host) {
    const place here = place_save(f->g);
    cbn_effects *effects = NULL;
    cbn_status status = CBN_OK;
    for (cbn_node_id id = cbn_graph_first(f->g); status == CBN_OK && id != 0; id = cbn_graph_next(f->g, id)) {
        if (!cbn_is_as_strided(cbn_graph_node(f->g, id)->opcode)) continue;
        if (effects == NULL) status = cbn_effects_build(f->g, f->root, &effects, f->err);
        if (status == CBN_OK) status = input_layout(f, host, effects, id);
    }
    cbn_effects_free(effects);
    place_restore(f->g, &here);
    return status;
}

/* ---- outputs ----------------------------------------------------------------------------------------------------- */
/* What classes of memory hold. */
typedef struct memory {
    const cbn_effects *effects;
    uint32_t classes;
    bool *outside;         /* an input or an attribute of the module */
    cbn_node_id *returned; /* the first output */
    cbn_node_id *forced;   /* by node: what the output returns instead; 0: the node itself */
} memory;

static cbn_status memory_look(cbn_freeze *f, memory *m) {
    const cbn_graph *g = f->g;
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const uint32_t class = cbn_effects_class(m->effects, id);
        if (class != UINT32_MAX) m->classes = CBN_MAX(m->classes, class + 1);
    }
    m->outside = cbn_calloc((m->classes + 1) * sizeof *m->outside);
    m->returned = cbn_calloc((m->classes + 1) * sizeof *m->returned);
    m->forced = cbn_calloc(cbn_graph_slots(g) * sizeof *m->forced); /* of nodes that are there now */
    if (m->outside == NULL || m->returned == NULL || m->forced == NULL) {
        return cbn_fail_memory(f->err, "classes of memory", (m->classes + 1) * sizeof *m->returned);
    }
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const cbn_node *n = cbn_graph_node(g, id);
        const uint32_t class = cbn_effects_class(m->effects, id);
        const bool outside = n->op == CBN_NODE_PLACEHOLDER || n->op == CBN_NODE_GET_ATTR;
        if (class != UINT32_MAX && outside) m->outside[class] = true;
    }
    return CBN_OK;
}

static cbn_status is_frozen_layer(cbn_freeze *f, cbn_node_id id, bool *out) {
    if (cbn_graph_node(f->g, id)->op != CBN_NODE_CALL_MODULE) return CBN_OK;
    cbn_host module;
    cbn_module_info info;
    cbn_graph_lock(f->g); /* host code may run */
    cbn_status status = cbn_freeze_resolve(f, id, &module);
    const bool found = status == CBN_OK && module != NULL;
    if (found) status = cbn_graph_host(f->g)->module(module, &info, f->err);
    cbn_graph_unlock(f->g);
    *out = found && status == CBN_OK && info.kind == CBN_MODULE_FROZEN && !info.hooked;
    return status;
}

/* Does this operator give a new array in C order, whatever the layout of what it is given? The package's kernels do. */
static bool gives_c_order(const cbn_graph *g, cbn_node_id id) {
    const cbn_opcode opcode = cbn_graph_node(g, id)->opcode;
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(g), opcode);
    cbn_bound b;
    cbn_error ignored;
    if (op == NULL || op->effect != CBN_EFFECT_PURE || cbn_op_bind(g, id, &b, &ignored) != CBN_OK) return false;
    const cbn_value *out = cbn_bound_get(&b, "out");
    if (out != NULL && out->tag != CBN_V_NONE) return false;
    if (opcode == CBN_OP_ATEN_CLONE_DEFAULT) {
        const cbn_value *format = cbn_bound_get(&b, "memory_format");
        return format != NULL && format->tag == CBN_V_STR &&
               strcmp(cbn_graph_str(g, format->u.str, NULL), "contiguous_format") == 0;
    }
    switch (op->family) {
    case CBN_FAMILY_CONV:
    case CBN_FAMILY_CONV_TRANSPOSE:
    case CBN_FAMILY_CONVOLUTION:
    case CBN_FAMILY_LINEAR:
    case CBN_FAMILY_BATCH_NORM:
    case CBN_FAMILY_EFFICIENT: return true;
    case CBN_FAMILY_ACTIVATION: return strncmp(op->name, "functional.", 11) == 0 || opcode == CBN_OP_ATEN_RELU_DEFAULT;
    default: return false;
    }
}

static bool is_c_order(const cbn_strides *s) {
    if (s->ndim < 0) return false;
    for (int i = 1; i < s->ndim; i++) {
        if (s->stride[i] > s->stride[i - 1]) return false;
    }
    return true;
}

static cbn_status output_layout(cbn_freeze *f, const cbn_layout_host *host, memory *m, cbn_node_id output,
                                cbn_node_id id, bool shared) {
    cbn_graph *g = f->g;
    const cbn_tensor_meta *t = cbn_graph_node(g, id)->tensor;
    if (t != NULL && t->ndim < 0) return CBN_OK; /* no array */
    const uint32_t class = cbn_effects_class(m->effects, id);
    cbn_strides s;
    CBN_TRY(strides_of(f, host, id, &s));
    if (forces(g, id, &s)) return CBN_OK;
    if (class == UINT32_MAX || m->outside[class]) {
        return cbn_freeze_keep(f, CBN_STEP_OUTPUT_LAYOUT, CBN_FREEZE_ALIASES_OUTPUT, id, 0,
                               "it may be memory of an input or of the module: a copy would be noticed");
    }
    if (shared) {
        return cbn_freeze_keep(f, CBN_STEP_OUTPUT_LAYOUT, CBN_FREEZE_ALIASES_OUTPUT, id, m->returned[class],
                               "two outputs may share memory: a copy would be noticed");
    }
    if (s.ndim == CBN_STRIDES_UNKNOWN || is_c_order(&s)) {
        /* It has them in any case. Unknown are those of a layer that BatchNorm or arithmetic was folded into: C order. */
        bool layer = false;
        CBN_TRY(is_frozen_layer(f, id, &layer));
        if (layer || gives_c_order(g, id)) return CBN_OK;
    }
    if (s.ndim < 0) {
        return cbn_freeze_keep(f, CBN_STEP_OUTPUT_LAYOUT, CBN_FREEZE_STRIDES_UNKNOWN, id, 0,
                               s.ndim == CBN_STRIDES_NOT_DENSE ? not_dense : NULL);
    }
    CBN_TRY(force(f, host, id, &s, output, &m->forced[id]));
    return cbn_freeze_done(f, CBN_STEP_OUTPUT_LAYOUT, id, cbn_graph_node(g, m->forced[id])->name);
}

static cbn_node_id instead(cbn_node_id id, void *arg) {
    const memory *m = arg;
    return m->forced[id] != 0 ? m->forced[id] : id;
}

/* All at once: there may be thousands. */
static cbn_status replace_outputs(cbn_freeze *f, memory *m, cbn_node_id output) {
    cbn_graph *g = f->g;
    const cbn_args *a = cbn_graph_node(g, output)->args;
    const uint32_t nargs = a->nargs, nkw = a->nkw, all = nargs + 2 * nkw;
    cbn_value *v = cbn_alloc_array(all, sizeof *v);
    if (v == NULL) return cbn_fail_memory(f->err, "outputs", all * sizeof *v);
    uint32_t n = 0;
    cbn_status status = CBN_OK;
    for (; status == CBN_OK && n < all; n += status == CBN_OK) {
        status = cbn_value_map(g, g, &cbn_graph_node(g, output)->args->v[n], instead, m, &v[n], f->err);
    }
    if (status == CBN_OK) status = cbn_graph_set_args(g, output, v, nargs, v + nargs, nkw, f->err);
    for (uint32_t i = 0; status != CBN_OK && i < n; i++) cbn_value_release(g, v[i]);
    cbn_free(v);
    return status;
}

/* The nodes that the output reads, each once, and whether another one has the same memory. */
static cbn_status outputs(cbn_freeze *f, const cbn_layout_host *host, memory *m, cbn_node_id output,
                          cbn_node_id *ids, bool *shared) {
    const cbn_graph *g = f->g;
    uint32_t n = 0;
    for (uint32_t e = cbn_graph_node(g, output)->first_input; e != 0; e = cbn_graph_edge(g, e)->next_input) {
        const cbn_node_id id = cbn_graph_edge(g, e)->producer;
        const uint32_t class = cbn_effects_class(m->effects, id);
        ids[n++] = id;
        if (class == UINT32_MAX) continue;
        if (m->returned[class] == 0) m->returned[class] = id;
        else shared[class] = true;
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t class = cbn_effects_class(m->effects, ids[i]);
        CBN_TRY(output_layout(f, host, m, output, ids[i], class != UINT32_MAX && shared[class]));
    }
    return f->changed > 0 ? replace_outputs(f, m, output) : CBN_OK;
}

cbn_status cbn_pass_output_layout(cbn_freeze *f, const cbn_layout_host *host) {
    const cbn_node_id output = cbn_graph_output(f->g);
    if (output == 0 || cbn_graph_node(f->g, output)->n_inputs == 0) return CBN_OK;
    const place here = place_save(f->g);
    cbn_effects *effects;
    CBN_TRY(cbn_effects_build(f->g, f->root, &effects, f->err));
    memory m = {.effects = effects};
    cbn_status status = memory_look(f, &m);
    const size_t n = cbn_graph_node(f->g, output)->n_inputs;
    cbn_node_id *ids = cbn_alloc_array(n, sizeof *ids);
    bool *shared = cbn_calloc(m.classes + 1);
    if (status == CBN_OK && (ids == NULL || shared == NULL)) {
        status = cbn_fail_memory(f->err, "outputs", n * sizeof *ids);
    }
    if (status == CBN_OK) status = outputs(f, host, &m, output, ids, shared);
    cbn_free(shared);
    cbn_free(ids);
    cbn_free(m.outside);
    cbn_free(m.returned);
    cbn_free(m.forced);
    cbn_effects_free(effects);
    place_restore(f->g, &here);
    return status;
}

/* ---- weights in channels_last ------------------------------------------------------------------------------------ */
static bool is_conv2d(const cbn_op *op) {
    if (op == NULL) return false;
    if (op->family == CBN_FAMILY_CONVOLUTION) return true; /* its weight will tell */
    return (op->family == CBN_FAMILY_CONV || op->family == CBN_FAMILY_CONV_TRANSPOSE) && op->nd == 2;
}

static bool is_clone(const cbn_graph *g, cbn_node_id id) {
    return cbn_graph_node(g, id)->opcode == CBN_OP_ATEN_CLONE_DEFAULT;
}

/* clone(weight, memory_format="channels_last") right behind the weight. */
static cbn_status clone(cbn_freeze *f, const cbn_layout_host *host, cbn_node_id weight, const cbn_array_info *info,
                        cbn_node_id *out) {
    static const char key[] = "memory_format", format[] = "channels_last";
    cbn_str k, v;
    CBN_TRY(cbn_graph_intern(f->g, key, strlen(key), &k, f->err));
    CBN_TRY(cbn_graph_intern(f->g, format, strlen(format), &v, f->err));
    cbn_value args[1] = {cbn_value_node(weight)};
    const cbn_value kw[2] = {cbn_value_str(k), cbn_value_str(v)};
    cbn_graph_set_insert_after(f->g, weight);
    CBN_TRY(call(f, host->clone, "clone", args, 1, kw, 1, out));
    cbn_tensor_meta m = {.ndim = (int8_t)info->ndim, .kind = info->kind, .itemsize = info->itemsize};
    memcpy(m.shape, info->shape, (size_t)info->ndim * sizeof m.shape[0]);
    return cbn_graph_set_tensor(f->g, *out, &m, f->err);
}

/* The array that a get_attr node of the weight names, or NULL. */
static cbn_status array_of(cbn_freeze *f, const cbn_layout_host *host, cbn_node_id id, cbn_host *out,
                           cbn_array_info *info) {
    *out = NULL;
    cbn_host object;
    bool is_array = false;
    cbn_graph_lock(f->g); /* host code may run */
    cbn_status status = cbn_freeze_resolve(f, id, &object);
    if (status == CBN_OK && object != NULL && host->ndarray(object)) {
        status = cbn_graph_host(f->g)->array(object, info, &is_array, f->err);
    }
    cbn_graph_unlock(f->g);
    if (status == CBN_OK && is_array) *out = object;
    return status;
}

static cbn_status weight_layout(cbn_freeze *f, const cbn_layout_host *host, cbn_effects **effects, cbn_node_id id,
                                cbn_node_id *clones) {
    cbn_graph *g = f->g;
    cbn_bound b;
    cbn_error ignored; /* a call that does not fit the schema fails when it runs, as before */
    if (cbn_op_bind(g, id, &b, &ignored) != CBN_OK) return CBN_OK;
    const cbn_value *w = cbn_bound_get(&b, "weight");
    if (w->tag != CBN_V_NODE) {
        return cbn_freeze_keep(f, CBN_STEP_WEIGHT_LAYOUT, CBN_FREEZE_UNSUPPORTED, id, 0,
                               "its weight is not an attribute of the module");
    }
    const cbn_node_id weight = w->u.node;
    if (is_clone(g, weight)) return CBN_OK;
    if (cbn_graph_node(g, weight)->op != CBN_NODE_GET_ATTR) {
        const cbn_tensor_meta *t = cbn_graph_node(g, weight)->tensor;
        if (t != NULL && t->ndim != 4) return CBN_OK;
        return cbn_freeze_keep(f, CBN_STEP_WEIGHT_LAYOUT, CBN_FREEZE_NONCONST, id, weight, NULL);
    }
    cbn_host array;
    cbn_array_info info;
    CBN_TRY(array_of(f, host, weight, &array, &info));
    if (array == NULL) return cbn_freeze_keep(f, CBN_STEP_WEIGHT_LAYOUT, CBN_FREEZE_NOT_ARRAY, id, weight, NULL);
    if (info.ndim != 4 || host->channels_last(array)) return CBN_OK;
    if (*effects == NULL) CBN_TRY(cbn_effects_build(g, f->root, effects, f->err));
    if (cbn_effects_written(*effects, weight)) {
        return cbn_freeze_keep(f, CBN_STEP_WEIGHT_LAYOUT, CBN_FREEZE_MUTATED, id,
                               cbn_effects_writer(*effects, weight, 0, 0), NULL);
    }
    if (clones[weight] == 0) CBN_TRY(clone(f, host, weight, &info, &clones[weight]));
    CBN_TRY(cbn_graph_replace_input(g, id, weight, clones[weight], f->err));
    return cbn_freeze_done(f, CBN_STEP_WEIGHT_LAYOUT, id, cbn_graph_node(g, clones[weight])->name);
}

cbn_status cbn_pass_weight_layout(cbn_freeze *f, const cbn_layout_host *host) {
    const size_t slots = cbn_graph_slots(f->g); /* clones get ids beyond, or those of free slots: never a weight's */
    cbn_node_id *clones = cbn_calloc(slots * sizeof *clones);
    if (clones == NULL) return cbn_fail_memory(f->err, "clones of weights", slots * sizeof *clones);
    const place here = place_save(f->g);
    cbn_effects *effects = NULL;
    cbn_status status = CBN_OK;
    for (cbn_node_id id = cbn_graph_first(f->g); status == CBN_OK && id != 0; id = cbn_graph_next(f->g, id)) {
        const cbn_node *n = cbn_graph_node(f->g, id);
        if (!is_conv2d(cbn_op_table_row(cbn_graph_ops(f->g), n->opcode))) continue;
        status = weight_layout(f, host, &effects, id, clones);
    }
    cbn_effects_free(effects);
    cbn_free(clones);
    place_restore(f->g, &here);
    return status;
}
