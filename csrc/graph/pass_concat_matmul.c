/* SPDX-License-Identifier: BSD-3-Clause */
/* Parallel products of one input with constant weights of equal shape become one product, two or three at a time.
 * All are judged on the untouched graph, then groups are rewritten. A group's input may be the result of a product that
 * was rewritten before: arguments are read anew then. */
#include "graph/passes.h"

#include <string.h>

#include "base/cbn_alloc.h"

enum { STRIDED = 4 };

/* Where the operands are among the parameters of a row. */
typedef struct operands {
    int input, weight, bias; /* bias -1: none */
    bool rows;               /* the weight is [n, k]: its rows are the outputs */
} operands;

typedef struct product {
    cbn_node_id id, input, weight, bias; /* bias 0: none */
    uint32_t next;                       /* next product of this input, 0: none; list order */
    operands form;
    cbn_array_info w, b;
    bool returned;  /* the caller may get its memory */
    uint8_t reason; /* cbn_freeze_reason: OK until something stands in the way */
    cbn_node_id blocking;
    const char *hint;
} product;

typedef struct pass {
    cbn_freeze *f;
    const cbn_matmul_host *host;
    const cbn_host_vtable *vt;
    cbn_effects *effects;
    product *products; /* 1 .. n */
    uint32_t n, room;
    uint32_t *first, *last; /* by input: products */
    uint8_t *memory;        /* by class: how many nodes have it, 0 .. 2, and STRIDED if as_strided reads it */
    uint32_t *order;        /* products of one input, sorted by what may be joined */
    uint32_t *groups;       /* by product that starts a group: its size */
    uint32_t *follower;     /* by product in a group: the next one */
    cbn_str concat, slice, memory_format, contiguous;
    cbn_node_id anchor; /* the user's insertion point, which may be a node that goes */
    bool after;
} pass;

static bool form_of(cbn_opcode opcode, operands *out) {
    switch (opcode) {
    case CBN_OP_ATEN_MM_DEFAULT:
    case CBN_OP_ATEN_MATMUL_DEFAULT:
    case CBN_OP_OPERATOR_MATMUL:
    case CBN_OP_METHOD_MATMUL:
    case CBN_OP_METHOD_MM: *out = (operands){0, 1, -1, false}; return true;
    case CBN_OP_ATEN_LINEAR_DEFAULT:
    case CBN_OP_FUNCTIONAL_LINEAR: *out = (operands){0, 1, 2, true}; return true;
    case CBN_OP_ATEN_ADDMM_DEFAULT: *out = (operands){1, 2, 0, false}; return true;
    default: return false;
    }
}

/* ---- finding products -------------------------------------------------------------------------------------------- */
static cbn_status add_product(pass *p, cbn_node_id id, const operands *form, const cbn_bound *b) {
    if (p->n + 1 >= p->room) {
        const uint32_t room = p->room == 0 ? 32 : p->room * 2;
        product *larger = cbn_realloc(p->products, room * sizeof *larger);
        if (larger == NULL) return cbn_fail_memory(p->f->err, "products", room * sizeof *larger);
        p->products = larger;
        p->room = room;
    }
    const cbn_node_id input = b->v[form->input].u.node;
    const uint32_t at = ++p->n;
    p->products[at] = (product){.id = id, .input = input, .form = *form};
    if (p->first[input] == 0) p->first[input] = at;
    else p->products[p->last[input]].next = at;
    p->last[input] = at;
    return CBN_OK;
}

/* Is this a product that this pass made: are its only users two or three equal parts of its last axis? */
static bool is_joined(const cbn_graph *g, cbn_node_id id) {
    int64_t width = 0, covered = 0;
    const cbn_node *n = cbn_graph_node(g, id);
    if (n->n_users < 2 || n->n_users > CBN_MATMUL_GROUP) return false;
    for (uint32_t edge = n->first_user; edge != 0; edge = cbn_graph_edge(g, edge)->next_user) {
        const cbn_node *user = cbn_graph_node(g, cbn_graph_edge(g, edge)->user);
        if (user->opcode != CBN_OP_ATEN_SLICE_TENSOR || user->args->nargs != 4 || user->args->nkw != 0) return false;
        const cbn_value *v = user->args->v;
        if (v[1].tag != CBN_V_INT || v[1].u.i != -1 || v[2].tag != CBN_V_INT || v[3].tag != CBN_V_INT) return false;
        if (width == 0) width = v[3].u.i - v[2].u.i;
        if (v[2].u.i != covered || v[3].u.i != covered + width) return false;
        covered += width;
    }
    return width > 0;
}

static cbn_status find_products(pass *p) {
    cbn_graph *g = p->f->g;
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        operands form;
        cbn_bound b;
        cbn_error ignored; /* a call that does not fit the schema fails when it runs, as before */
        if (!form_of(cbn_graph_node(g, id)->opcode, &form) || is_joined(g, id)) continue;
        if (cbn_op_bind(g, id, &b, &ignored) != CBN_OK || b.v[form.input].tag != CBN_V_NODE) continue;
        CBN_TRY(add_product(p, id, &form, &b));
    }
    return CBN_OK;
}

/* One look at every node: how many have each class of memory, which classes as_strided reads. */
static cbn_status look_at_memory(pass *p) {
    cbn_graph *g = p->f->g;
    uint32_t classes = 0;
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const uint32_t class = cbn_effects_class(p->effects, id);
        if (class != UINT32_MAX) classes = CBN_MAX(classes, class + 1);
    }
    p->memory = cbn_calloc(classes + 1);
    if (p->memory == NULL) return cbn_fail_memory(p->f->err, "classes of memory", classes + 1);
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const cbn_node *node = cbn_graph_node(g, id);
        const uint32_t class = cbn_effects_class(p->effects, id);
        if (class != UINT32_MAX && (p->memory[class] & ~STRIDED) < 2) p->memory[class]++;
        if (!cbn_is_as_strided(node->opcode)) continue;
        for (uint32_t edge = node->first_input; edge != 0; edge = cbn_graph_edge(g, edge)->next_input) {
            const uint32_t read = cbn_effects_class(p->effects, cbn_graph_edge(g, edge)->producer);
            if (read != UINT32_MAX) p->memory[read] |= STRIDED;
        }
    }
    return CBN_OK;
}

/* ---- judging one ------------------------------------------------------------------------------------------------- */
static void keep(product *q, cbn_freeze_reason reason, cbn_node_id blocking, const char *hint) {
    q->reason = (uint8_t)reason;
    q->blocking = blocking;
    q->hint = hint;
}

/* A get_attr node of an ndarray that nothing writes, or a reason. */
static cbn_status constant(pass *p, product *q, const cbn_value *v, cbn_node_id *node, cbn_array_info *info) {
    cbn_graph *g = p->f->g;
    if (v->tag != CBN_V_NODE) {
        keep(q, CBN_FREEZE_UNSUPPORTED, 0, "its weight or bias is not an attribute of the module");
        return CBN_OK;
    }
    *node = v->u.node;
    const cbn_node *n = cbn_graph_node(g, *node);
    if (n->op != CBN_NODE_GET_ATTR) {
        keep(q, CBN_FREEZE_NONCONST, *node, NULL);
        return CBN_OK;
    }
    cbn_host object;
    bool is_array = false;
    cbn_graph_lock(g); /* host code may run */
    cbn_status status = cbn_freeze_resolve(p->f, *node, &object);
    if (status == CBN_OK && object != NULL && p->host->ndarray(object, p->host->arg)) {
        status = p->vt->array(object, info, &is_array, p->f->err);
    }
    cbn_graph_unlock(g);
    if (status != CBN_OK) return status;
    if (!is_array) keep(q, CBN_FREEZE_NOT_ARRAY, *node, NULL);
    else if (cbn_effects_written(p->effects, *node)) {
        keep(q, CBN_FREEZE_MUTATED, cbn_effects_writer(p->effects, *node, 0, 0), NULL);
    }
    return CBN_OK;
}

static bool is_one(const cbn_value *v) {
    return v == NULL || (v->tag == CBN_V_INT && v->u.i == 1) || (v->tag == CBN_V_FLOAT && v->u.f == 1.0);
}

/* Another node than q's that uses the weight, 0: none to name. */
static cbn_node_id other_user(const cbn_graph *g, const product *q) {
    for (uint32_t edge = cbn_graph_node(g, q->weight)->first_user; edge != 0;
         edge = cbn_graph_edge(g, edge)->next_user) {
        if (cbn_graph_edge(g, edge)->user != q->id) return cbn_graph_edge(g, edge)->user;
    }
    return 0;
}

static cbn_status judge_operands(pass *p, product *q, const cbn_bound *b) {
    CBN_TRY(constant(p, q, &b->v[q->form.weight], &q->weight, &q->w));
    if (q->reason != CBN_FREEZE_OK) return CBN_OK;
    if (q->w.ndim != 2 || q->weight == q->input) {
        keep(q, CBN_FREEZE_UNSUPPORTED, 0, "its weight is not a constant matrix");
        return CBN_OK;
    }
    const uint32_t class = cbn_effects_class(p->effects, q->weight);
    if (cbn_graph_node(p->f->g, q->weight)->n_users != 1 || class == UINT32_MAX ||
        (p->memory[class] & ~STRIDED) != 1) {
        keep(q, CBN_FREEZE_WEIGHT_SHARED, other_user(p->f->g, q), NULL);
        return CBN_OK;
    }
    if (strchr("fiubc", q->w.kind) == NULL) {
        keep(q, CBN_FREEZE_DTYPE, 0, NULL);
        return CBN_OK;
    }
    if (q->form.bias < 0 || b->v[q->form.bias].tag == CBN_V_NONE) return CBN_OK;
    CBN_TRY(constant(p, q, &b->v[q->form.bias], &q->bias, &q->b));
    const int64_t n = q->w.shape[q->form.rows ? 0 : 1];
    if (q->reason != CBN_FREEZE_OK) return CBN_OK;
    if (q->b.ndim != 1 || q->b.shape[0] != n) keep(q, CBN_FREEZE_SHAPE_MISMATCH, q->bias, NULL);
    else if (q->bias == q->input || q->bias == q->weight) keep(q, CBN_FREEZE_UNSUPPORTED, q->bias, NULL);
    return CBN_OK;
}

static cbn_status judge(pass *p, product *q) {
    cbn_graph *g = p->f->g;
    cbn_bound b;
    CBN_TRY(cbn_op_bind(g, q->id, &b, p->f->err));
    const cbn_value *out = cbn_bound_get(&b, "out");
    if (out != NULL && out->tag != CBN_V_NONE) {
        keep(q, CBN_FREEZE_IN_PLACE, 0, "it writes into out=");
        return CBN_OK;
    }
    CBN_TRY(judge_operands(p, q, &b));
    if (q->reason != CBN_FREEZE_OK) return CBN_OK;
    if (!is_one(cbn_bound_get(&b, "beta")) || !is_one(cbn_bound_get(&b, "alpha"))) {
        keep(q, CBN_FREEZE_UNSUPPORTED, 0, "beta and alpha are not both 1");
        return CBN_OK;
    }
    /* The parts are views of one array: nobody may write one; what the caller gets is a copy. */
    const uint32_t class = cbn_effects_class(p->effects, q->id);
    q->returned = cbn_effects_returned(p->effects, q->id);
    if (cbn_effects_written(p->effects, q->id)) {
        keep(q, CBN_FREEZE_MUTATED, cbn_effects_writer(p->effects, q->id, 0, 0), NULL);
    } else if (class == UINT32_MAX || (p->memory[class] & STRIDED) != 0) {
        keep(q, CBN_FREEZE_UNSUPPORTED, 0, "as_strided reads its memory, which would be another");
    }
    return CBN_OK;
}

/* ---- forming groups ---------------------------------------------------------------------------------------------- */
static int compare_info(const cbn_array_info *a, const cbn_array_info *b) {
    if (a->kind != b->kind) return a->kind < b->kind ? -1 : 1;
    if (a->itemsize != b->itemsize) return a->itemsize < b->itemsize ? -1 : 1;
    if (a->ndim != b->ndim) return a->ndim < b->ndim ? -1 : 1;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i]) return a->shape[i] < b->shape[i] ? -1 : 1;
    }
    return 0;
}

/* 0: the two may be joined. */
static int compare(const pass *p, const product *a, const product *b) {
    const cbn_opcode x = cbn_graph_node(p->f->g, a->id)->opcode, y = cbn_graph_node(p->f->g, b->id)->opcode;
    if (x != y) return x < y ? -1 : 1;
    const int weights = compare_info(&a->w, &b->w);
    if (weights != 0) return weights;
    if ((a->bias != 0) != (b->bias != 0)) return a->bias != 0 ? 1 : -1;
    return a->bias != 0 ? compare_info(&a->b, &b->b) : 0;
}

/* Stable merge sort of v[0 .. n), with room for n more behind. */
static void sort(const pass *p, uint32_t *v, uint32_t n, uint32_t *room) {
    if (n < 2) return;
    const uint32_t half = n / 2;
    sort(p, v, half, room);
    sort(p, v + half, n - half, room);
    memcpy(room, v, half * sizeof *v);
    uint32_t i = 0, j = half, k = 0;
    while (i < half) {
        if (j < n && compare(p, &p->products[v[j]], &p->products[room[i]]) < 0) v[k++] = v[j++];
        else v[k++] = room[i++];
    }
}

/* Products v[0 .. n) may be joined: by threes, but never leaving one alone. */
static void chunk(pass *p, const uint32_t *v, uint32_t n) {
    for (uint32_t i = 0; i < n;) {
        const uint32_t left = n - i, size = left == 4 || left == 2 ? 2 : 3;
        p->groups[v[i]] = size;
        for (uint32_t k = 1; k < size; k++) p->follower[v[i + k - 1]] = v[i + k];
        i += size;
    }
}

/* Equal products, in list order: cut where the input is written in between. */
static void cut(pass *p, const uint32_t *v, uint32_t n) {
    cbn_node_id before = 0; /* the writer in front of this part */
    for (uint32_t i = 0; i < n;) {
        uint32_t end = i + 1;
        cbn_node_id writer = 0;
        const product *q = &p->products[v[i]];
        while (end < n && writer == 0) {
            writer = cbn_effects_writer(p->effects, q->input, p->products[v[end - 1]].id, p->products[v[end]].id);
            end += writer == 0;
        }
        if (end - i == 1) keep(&p->products[v[i]], CBN_FREEZE_MUTATED, writer != 0 ? writer : before, NULL);
        else chunk(p, v + i, end - i);
        before = writer;
        i = end;
    }
}

static cbn_status group(pass *p, uint32_t head) {
    uint32_t n = 0, good = 0;
    for (uint32_t i = head; i != 0; i = p->products[i].next, n++) {
        CBN_TRY(judge(p, &p->products[i]));
        if (p->products[i].reason == CBN_FREEZE_OK) p->order[good++] = i;
    }
    if (good == 1 && n > 1) { /* the others stay, so it does, for the first one's reason */
        uint32_t other = head;
        while (p->products[other].reason == CBN_FREEZE_OK) other = p->products[other].next;
        const product *o = &p->products[other];
        keep(&p->products[p->order[0]], (cbn_freeze_reason)o->reason, o->id, "the product beside it cannot be joined");
        return CBN_OK;
    }
    sort(p, p->order, good, p->order + p->n);
    for (uint32_t i = 0; i < good;) {
        uint32_t end = i + 1;
        while (end < good && compare(p, &p->products[p->order[i]], &p->products[p->order[end]]) == 0) end++;
        if (end - i > 1) cut(p, p->order + i, end - i);
        else keep(&p->products[p->order[i]], CBN_FREEZE_UNEQUAL, p->products[p->order[i == 0 ? 1 : 0]].id, NULL);
        i = end;
    }
    return CBN_OK;
}

/* ---- rewriting --------------------------------------------------------------------------------------------------- */
static cbn_status erase(pass *p, cbn_node_id id) {
    const cbn_node_id prev = cbn_graph_prev(p->f->g, id), next = cbn_graph_next(p->f->g, id);
    CBN_TRY(cbn_graph_erase(p->f->g, id, p->f->err));
    if (p->anchor == id) p->anchor = p->after ? prev : next;
    return CBN_OK;
}

static cbn_status create(pass *p, const cbn_node_spec *spec, cbn_node_id *out) {
    const cbn_status status = cbn_graph_create(p->f->g, spec, out, p->f->err);
    if (status != CBN_OK) cbn_value_release(p->f->g, spec->target);
    return status;
}

/* One constant of several, and the get_attr node that reads it. */
static cbn_status concatenate(pass *p, const cbn_node_id *nodes, int n, const cbn_array_info *one, int axis,
                              cbn_node_id *out) {
    cbn_graph *g = p->f->g;
    const char *targets[CBN_MATMUL_GROUP];
    for (int i = 0; i < n; i++) targets[i] = cbn_graph_str(g, cbn_graph_node(g, nodes[i])->target.u.str, NULL);
    const char *name = NULL;
    cbn_graph_lock(g);
    const cbn_status status = p->host->concatenate(p->host->arg, targets, n, axis, &name, p->f->err);
    cbn_graph_unlock(g);
    if (status != CBN_OK) return status;
    cbn_str target;
    CBN_TRY(cbn_graph_intern(g, name, strlen(name), &target, p->f->err));
    const cbn_node_spec spec = {.op = CBN_NODE_GET_ATTR, .target = cbn_value_str(target), .name = target};
    CBN_TRY(cbn_graph_create(g, &spec, out, p->f->err));
    cbn_tensor_meta m = {.ndim = (int8_t)one->ndim, .kind = one->kind, .itemsize = one->itemsize};
    for (int i = 0; i < one->ndim; i++) m.shape[i] = one->shape[i] * (i == axis ? n : 1);
    return cbn_graph_set_tensor(g, *out, &m, p->f->err);
}

/* The call of the first product with other operands, at its place. */
static cbn_status make_product(pass *p, const product *q, cbn_node_id weight, cbn_node_id bias, cbn_node_id *out) {
    cbn_graph *g = p->f->g;
    cbn_bound b;
    CBN_TRY(cbn_op_bind(g, q->id, &b, p->f->err));
    cbn_value args[3];
    args[q->form.input] = cbn_value_node(b.v[q->form.input].u.node);
    args[q->form.weight] = cbn_value_node(weight);
    if (bias != 0) args[q->form.bias] = cbn_value_node(bias);
    const cbn_node *from = cbn_graph_node(g, q->id);
    const cbn_node_spec spec = {.op = (cbn_node_op)from->op,
                                .target = cbn_value_retain(g, from->target),
                                .args = args,
                                .nargs = bias != 0 ? 3 : 2,
                                .name = p->concat};
    return create(p, &spec, out);
}

/* The last axis of `whole` from one entry to another, as an array of its own where the caller may get it. */
static cbn_status make_part(pass *p, cbn_node_id whole, const product *q, int64_t from, int64_t to, cbn_node_id *out) {
    cbn_graph *g = p->f->g;
    cbn_value args[] = {cbn_value_node(whole), cbn_value_int(-1), cbn_value_int(from), cbn_value_int(to)};
    const cbn_value kw[] = {cbn_value_str(p->memory_format), cbn_value_str(p->contiguous)};
    cbn_node_spec spec = {.op = CBN_NODE_CALL_FUNCTION, .args = args, .nargs = 4};
    for (bool last = !q->returned;; last = true) {
        const cbn_host callable = spec.nargs == 4 ? p->host->slice : p->host->clone;
        const cbn_node *old = cbn_graph_node(g, q->id);
        spec.name = last ? old->name : p->slice;
        spec.meta = last ? old->meta : NULL;
        spec.type_expr = last ? old->type_expr : NULL;
        p->vt->retain(callable);
        spec.target = cbn_value_host(callable);
        CBN_TRY(create(p, &spec, out));
        const cbn_tensor_meta *t = cbn_graph_node(g, q->id)->tensor;
        if (t != NULL) CBN_TRY(cbn_graph_set_tensor(g, *out, t, p->f->err));
        if (last) return CBN_OK;
        args[0] = cbn_value_node(*out);
        spec.nargs = 1;
        spec.kw = kw;
        spec.nkw = 1;
    }
}

/* Users go to the part, which takes over the name; what only the old product read goes with it. */
static cbn_status retire(pass *p, const product *q, cbn_node_id part) {
    cbn_graph *g = p->f->g;
    const cbn_str name = cbn_graph_node(g, q->id)->name;
    CBN_TRY(cbn_graph_replace_uses(g, q->id, part, NULL, NULL, NULL, p->f->err));
    CBN_TRY(erase(p, q->id));
    CBN_TRY(cbn_graph_set_name(g, part, name, p->f->err));
    CBN_TRY(erase(p, q->weight));
    const cbn_node *bias = cbn_graph_node(g, q->bias); /* of several products perhaps */
    return q->bias != 0 && bias->op == CBN_NODE_GET_ATTR && bias->n_users == 0 ? erase(p, q->bias) : CBN_OK;
}

static cbn_status rewrite(pass *p, uint32_t first) {
    cbn_graph *g = p->f->g;
    const product *member[CBN_MATMUL_GROUP];
    cbn_node_id weights[CBN_MATMUL_GROUP], biases[CBN_MATMUL_GROUP], weight, bias = 0, whole, part[CBN_MATMUL_GROUP];
    int n = 0;
    for (uint32_t i = first, left = p->groups[first]; left > 0; left--, i = p->follower[i], n++) {
        member[n] = &p->products[i];
        weights[n] = member[n]->weight;
        biases[n] = member[n]->bias;
    }
    const product *q = member[0];
    cbn_graph_set_insert_point(g, q->id);
    CBN_TRY(concatenate(p, weights, n, &q->w, q->form.rows ? 0 : 1, &weight));
    if (q->bias != 0) CBN_TRY(concatenate(p, biases, n, &q->b, 0, &bias));
    CBN_TRY(make_product(p, q, weight, bias, &whole));
    const int64_t width = q->w.shape[q->form.rows ? 0 : 1];
    const cbn_tensor_meta *t = cbn_graph_node(g, q->id)->tensor;
    if (t != NULL && t->ndim > 0) {
        cbn_tensor_meta m = cbn_tensor_copy(t);
        m.shape[m.ndim - 1] = width * n;
        CBN_TRY(cbn_graph_set_tensor(g, whole, &m, p->f->err));
    }
    const cbn_str into = cbn_graph_node(g, whole)->name;
    for (int i = 0; i < n; i++) {
        CBN_TRY(cbn_freeze_done(p->f, CBN_STEP_MATMUL, member[i]->id, into));
        CBN_TRY(make_part(p, whole, member[i], i * width, (i + 1) * width, &part[i]));
    }
    for (int i = 0; i < n; i++) CBN_TRY(retire(p, member[i], part[i]));
    return CBN_OK;
}

/* First the rows that name nodes which may go, then the groups. */
static cbn_status apply(pass *p) {
    static const char *const words[] = {"concat_matmul", "slice_tensor", "memory_format", "contiguous_format"};
    cbn_str *const interned[] = {&p->concat, &p->slice, &p->memory_format, &p->contiguous};
    for (int i = 0; i < 4; i++) CBN_TRY(cbn_graph_intern(p->f->g, words[i], strlen(words[i]), interned[i], p->f->err));
    for (uint32_t i = 1; i <= p->n; i++) {
        const product *q = &p->products[i];
        if (q->reason == CBN_FREEZE_OK) continue;
        CBN_TRY(cbn_freeze_keep(p->f, CBN_STEP_MATMUL, (cbn_freeze_reason)q->reason, q->id, q->blocking, q->hint));
    }
    for (uint32_t i = 1; i <= p->n; i++) {
        if (p->groups[i] != 0) CBN_TRY(rewrite(p, i));
    }
    return CBN_OK;
}

static cbn_status run(pass *p) {
    const size_t inputs = 2 * (size_t)cbn_graph_slots(p->f->g) * sizeof *p->first;
    p->first = cbn_calloc(inputs);
    if (p->first == NULL) return cbn_fail_memory(p->f->err, "inputs of products", inputs);
    p->last = p->first + cbn_graph_slots(p->f->g);
    CBN_TRY(find_products(p));
    bool parallel = false;
    for (uint32_t i = 1; i <= p->n; i++) parallel = parallel || p->products[i].next != 0;
    if (!parallel) return CBN_OK;
    const size_t n = (size_t)p->n + 1;
    p->order = cbn_calloc(4 * n * sizeof *p->order); /* twice n to sort, groups, followers */
    if (p->order == NULL) return cbn_fail_memory(p->f->err, "groups of products", 4 * n * sizeof *p->order);
    p->groups = p->order + 2 * n;
    p->follower = p->order + 3 * n;
    CBN_TRY(cbn_effects_build(p->f->g, p->f->root, &p->effects, p->f->err));
    CBN_TRY(look_at_memory(p));
    for (uint32_t i = 1; i <= p->n; i++) {
        if (p->first[p->products[i].input] == i && p->products[i].next != 0) CBN_TRY(group(p, i));
    }
    return apply(p);
}

cbn_status cbn_pass_concat_matmul(cbn_freeze *f, const cbn_matmul_host *host) {
    pass p = {.f = f, .host = host, .vt = cbn_graph_host(f->g)};
    p.anchor = cbn_graph_insert_anchor(f->g, &p.after);
    const cbn_status status = run(&p);
    if (status == CBN_OK) { /* else the caller goes back to a snapshot, which has it */
        if (p.after) cbn_graph_set_insert_after(f->g, p.anchor);
        else cbn_graph_set_insert_point(f->g, p.anchor);
    }
    cbn_effects_free(p.effects);
    cbn_free(p.products);
    cbn_free(p.first);
    cbn_free(p.memory);
    cbn_free(p.order);
    return status;
}
