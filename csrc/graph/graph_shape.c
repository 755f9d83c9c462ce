/* SPDX-License-Identifier: BSD-3-Clause */
/* Shape propagation through one node: reading arguments, the rules for elementwise operators, the driver. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "graph/shape_priv.h"

/* ---- what rules use ---------------------------------------------------------------------------------------------- */
cbn_status cbn_shape_fail(cbn_shape_call *c, const char *fmt, ...) {
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    return cbn_fail(c->err, CBN_BAD_VALUE, "node %s: %s: %s", c->node, c->op->name, text);
}

const cbn_value *cbn_shape_arg(const cbn_shape_call *c, const char *name) { return cbn_bound_get(c->bound, name); }

static cbn_tensor_meta meta_of_array(const cbn_array_info *info) {
    cbn_tensor_meta m = {.ndim = (int8_t)info->ndim, .kind = info->kind, .itemsize = info->itemsize};
    memcpy(m.shape, info->shape, sizeof m.shape);
    return m;
}

static cbn_status array_of_host(cbn_shape_call *c, cbn_host h, cbn_tensor_meta *out, bool *found) {
    cbn_array_info info;
    CBN_TRY(cbn_graph_host(c->g)->array(h, &info, found, c->err));
    *found = *found && info.kind != 'O';
    if (*found) *out = meta_of_array(&info);
    return CBN_OK;
}

cbn_status cbn_shape_array(cbn_shape_call *c, const cbn_value *v, cbn_tensor_meta *out, bool *found) {
    *found = false;
    if (v == NULL) return CBN_OK;
    if (v->tag == CBN_V_HOST) return array_of_host(c, v->u.host, out, found);
    if (v->tag != CBN_V_NODE) return CBN_OK;
    const cbn_tensor_meta *m = cbn_graph_node(c->g, v->u.node)->tensor;
    *found = m != NULL && m->ndim >= 0;
    if (*found) *out = *m;
    return CBN_OK;
}

cbn_status cbn_shape_input(cbn_shape_call *c, cbn_tensor_meta *out, bool *found) {
    *found = false;
    return c->bound->n == 0 ? CBN_OK : cbn_shape_array(c, &c->bound->v[0], out, found);
}

bool cbn_shape_int(const cbn_value *v, int64_t *out) {
    if (v == NULL || v->tag != CBN_V_INT) return false;
    *out = v->u.i;
    return true;
}

bool cbn_shape_bool(const cbn_value *v, bool *out) {
    if (v == NULL || v->tag != CBN_V_BOOL) return false;
    *out = v->u.b;
    return true;
}

int cbn_shape_ints(const cbn_value *v, int64_t *out, int room) {
    if (v == NULL) return -1;
    if (v->tag == CBN_V_INT) {
        out[0] = v->u.i;
        return 1;
    }
    if ((v->tag != CBN_V_LIST && v->tag != CBN_V_TUPLE) || v->u.seq->count > (uint32_t)room) return -1;
    for (uint32_t i = 0; i < v->u.seq->count; i++) {
        if (!cbn_shape_int(&v->u.seq->v[i], &out[i])) return -1;
    }
    return (int)v->u.seq->count;
}

bool cbn_shape_n_ints(const cbn_value *v, int n, int64_t *out) {
    const int count = cbn_shape_ints(v, out, n);
    for (int i = 1; count == 1 && i < n; i++) out[i] = out[0];
    return count == 1 || count == n;
}

const char *cbn_shape_text(const cbn_shape_call *c, const char *name) {
    const int i = cbn_op_param(c->op, name);
    if (i < 0) return NULL;
    if (!c->bound->given[i]) return c->op->params[i].default_str;
    const cbn_value *v = &c->bound->v[i];
    return v->tag == CBN_V_STR ? cbn_graph_str(c->g, v->u.str, NULL) : NULL;
}

cbn_status cbn_shape_done(cbn_shape_call *c, const cbn_tensor_meta *like, int ndim, const int64_t *shape) {
    if (ndim > CBN_MAX_DIMS) return cbn_shape_fail(c, "more than %d axes", CBN_MAX_DIMS);
    c->out = (cbn_tensor_meta){.ndim = (int8_t)ndim, .kind = like->kind, .itemsize = like->itemsize};
    if (ndim > 0) memcpy(c->out.shape, shape, (size_t)ndim * sizeof *shape);
    c->known = true;
    return CBN_OK;
}

cbn_status cbn_shape_axis(cbn_shape_call *c, const char *name, int64_t dim, int ndim, int *out) {
    const int bound = CBN_MAX(ndim, 1);
    if (dim < -bound || dim >= bound) {
        return cbn_shape_fail(c, "%s: expected between %d and %d, got %lld", name, -bound, bound - 1, (long long)dim);
    }
    *out = (int)(dim < 0 ? dim + bound : dim);
    return CBN_OK;
}

/* ---- elementwise ------------------------------------------------------------------------------------------------- */
static bool has_dtype_argument(const cbn_shape_call *c) {
    const cbn_value *v = cbn_shape_arg(c, "dtype");
    return v != NULL && v->tag != CBN_V_NONE;
}

static bool is_floating(const cbn_tensor_meta *m) { return m->kind == 'f'; }

/* Functions of integers may give floating numbers, so only floating ones are predicted. */
static cbn_status rule_same(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || !is_floating(&x) || has_dtype_argument(c)) return CBN_OK;
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

static cbn_status rule_cast(cbn_shape_call *c) {
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found) return CBN_OK;
    x.kind = 'f';
    x.itemsize = strstr(c->op->name, "half") ? 2 : strstr(c->op->name, "double") ? 8 : 4;
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

/* The dtype that an argument names: a text, or a host object that says it ("numpy.int8", "dtype('int8')"). */
static bool named_dtype(const cbn_shape_call *c, const cbn_value *v, cbn_tensor_meta *out) {
    static const struct { const char *name; char kind; uint8_t itemsize; } dtypes[] = {
        {"int8", 'i', 1},  {"uint8", 'u', 1},   {"int16", 'i', 2},   {"uint16", 'u', 2},
        {"int32", 'i', 4}, {"float16", 'f', 2}, {"float32", 'f', 4}, {"float64", 'f', 8}};
    char text[64] = "";
    if (v->tag == CBN_V_HOST) cbn_graph_host(c->g)->describe(v->u.host, text, sizeof text);
    const char *name = v->tag == CBN_V_STR ? cbn_graph_str(c->g, v->u.str, NULL) : text;
    const size_t skip = strcspn(name, ".'");
    if (name[skip] != '\0') name += skip + 1;
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        const size_t n = strlen(dtypes[i].name);
        if (strncmp(name, dtypes[i].name, n) != 0 || (name[n] != '\0' && strcmp(name + n, "')") != 0)) continue;
        out->kind = dtypes[i].kind;
        out->itemsize = dtypes[i].itemsize;
        return true;
    }
    return false;
}

/* To integers and back. */
static cbn_status rule_quantize(cbn_shape_call *c) {
    const bool back = c->op->family == CBN_FAMILY_DEQUANTIZE;
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_input(c, &x, &found));
    if (!found || (back ? x.kind != 'i' && x.kind != 'u' : !is_floating(&x) || x.itemsize > 4)) return CBN_OK;
    const cbn_value *dtype = cbn_shape_arg(c, back ? "out_dtype" : "dtype");
    if (back && dtype->tag == CBN_V_NONE) {
        x.kind = 'f';
        x.itemsize = 4;
    } else if (!named_dtype(c, dtype, &x) || is_floating(&x) != back) {
        return CBN_OK;
    }
    return cbn_shape_done(c, &x, x.ndim, x.shape);
}

static cbn_status broadcast(cbn_shape_call *c, const cbn_tensor_meta *a, const cbn_tensor_meta *b, int *ndim,
                            int64_t *shape) {
    *ndim = CBN_MAX(a->ndim, b->ndim);
    for (int i = 0; i < *ndim; i++) {
        const int ia = i - (*ndim - a->ndim), ib = i - (*ndim - b->ndim);
        const int64_t p = ia < 0 ? 1 : a->shape[ia], q = ib < 0 ? 1 : b->shape[ib];
        if (p != q && p != 1 && q != 1) {
            return cbn_shape_fail(c, "sizes %lld and %lld of axis %d do not broadcast", (long long)p, (long long)q,
                                  i - *ndim);
        }
        shape[i] = p == 1 ? q : p;
    }
    return CBN_OK;
}

/* The two sides of arithmetic: each an array or a number. *both false: not known. A number has no axes and no say in
 * the
 * dtype; two arrays of different widths give the wider. */
static cbn_status two_sides(cbn_shape_call *c, cbn_tensor_meta *out, bool *both) {
    cbn_tensor_meta side[2];
    bool found[2], number[2];
    *both = false;
    if (c->bound->n < 2) return CBN_OK;
    for (int i = 0; i < 2; i++) {
        const cbn_value *v = &c->bound->v[i];
        CBN_TRY(cbn_shape_array(c, v, &side[i], &found[i]));
        number[i] = v->tag == CBN_V_BOOL || v->tag == CBN_V_INT || v->tag == CBN_V_FLOAT;
        if (!found[i]) side[i] = (cbn_tensor_meta){0};
        if (!(found[i] ? is_floating(&side[i]) : number[i])) return CBN_OK;
    }
    if (number[0] && number[1]) return CBN_OK;
    int ndim;
    int64_t shape[CBN_MAX_DIMS];
    CBN_TRY(broadcast(c, &side[0], &side[1], &ndim, shape));
    if (found[0] && found[1] && side[0].itemsize != side[1].itemsize) {
        if (strncmp(c->op->name, "functional.", 11) == 0) return CBN_OK; /* refuses mixed dtypes: let it say so */
        /* NumPy before 2 lets a 0-d array have no say in the dtype. */
        if (side[0].ndim == 0 || side[1].ndim == 0) return CBN_OK;
    }
    *out = side[found[0] && (!found[1] || side[0].itemsize >= side[1].itemsize) ? 0 : 1];
    out->ndim = (int8_t)ndim;
    memcpy(out->shape, shape, (size_t)ndim * sizeof *shape);
    if (!c->op->params[0].written) {
        *both = true;
        return CBN_OK;
    }
    /* In place: the result is the first side, which the other must fit. */
    bool fits = found[0] && ndim == side[0].ndim;
    for (int i = 0; fits && i < ndim; i++) fits = shape[i] == side[0].shape[i];
    if (!fits) return cbn_shape_fail(c, "the other operand does not fit the array that is written");
    *out = side[0];
    *both = true;
    return CBN_OK;
}

static cbn_status rule_broadcast(cbn_shape_call *c) {
    cbn_tensor_meta m;
    bool both;
    CBN_TRY(two_sides(c, &m, &both));
    return both ? cbn_shape_done(c, &m, m.ndim, m.shape) : CBN_OK;
}

static cbn_status rule_compare(cbn_shape_call *c) {
    cbn_tensor_meta m;
    bool both = false;
    if (c->bound->n >= 2) CBN_TRY(two_sides(c, &m, &both));
    else CBN_TRY(cbn_shape_input(c, &m, &both));
    if (!both) return CBN_OK;
    m.kind = 'b';
    m.itemsize = 1;
    return cbn_shape_done(c, &m, m.ndim, m.shape);
}

static const cbn_shape_row elementwise[] = {
    {"same", rule_same},           {"cast", rule_cast},       {"broadcast", rule_broadcast},
    {"divide", rule_broadcast},    {"compare", rule_compare},
    {"quantize", rule_quantize},   {NULL, NULL},
};

/* ---- the driver -------------------------------------------------------------------------------------------------- */
static cbn_shape_rule find_rule(const char *name) {
    const cbn_shape_row *const tables[] = {elementwise, cbn_shape_rules_layers, cbn_shape_rules_views};
    for (size_t t = 0; t < sizeof tables / sizeof tables[0]; t++) {
        for (const cbn_shape_row *row = tables[t]; row->name != NULL; row++) {
            if (strcmp(row->name, name) == 0) return row->rule;
        }
    }
    return NULL;
}

/* Arrays of the module: their own shapes. */
static cbn_status infer_get_attr(cbn_shape_call *c, const cbn_node *node) {
    if (c->root == NULL || node->target.tag != CBN_V_STR) return CBN_OK;
    cbn_host object;
    CBN_TRY(cbn_graph_host(c->g)->resolve(c->root, cbn_graph_str(c->g, node->target.u.str, NULL), &object, c->err));
    if (object == NULL) return CBN_OK;
    cbn_tensor_meta m;
    CBN_TRY(array_of_host(c, object, &m, &c->known));
    if (c->known) c->out = m;
    return CBN_OK;
}

/* BatchNorm keeps the shape, Linear changes the last axis. A convolution's geometry is the host's to know. */
static cbn_status infer_module(cbn_shape_call *c, const cbn_node *node) {
    const cbn_args *args = node->args;
    if (c->root == NULL || node->target.tag != CBN_V_STR || args->nargs + args->nkw != 1) return CBN_OK;
    if (args->nkw == 1 && strcmp(cbn_graph_str(c->g, cbn_args_key(args, 0), NULL), "input") != 0) return CBN_OK;
    const cbn_value *input = args->nkw == 1 ? cbn_args_kw(args, 0) : &args->v[0];
    const cbn_host_vtable *host = cbn_graph_host(c->g);
    cbn_host module;
    CBN_TRY(host->resolve(c->root, cbn_graph_str(c->g, node->target.u.str, NULL), &module, c->err));
    if (module == NULL) return CBN_OK;
    cbn_module_info info;
    CBN_TRY(host->module(module, &info, c->err));
    if (info.hooked || (info.kind != CBN_MODULE_BATCH_NORM && info.kind != CBN_MODULE_LINEAR)) return CBN_OK;
    cbn_tensor_meta x;
    bool found;
    CBN_TRY(cbn_shape_array(c, input, &x, &found));
    if (!found || !is_floating(&x) || x.ndim < 1) return CBN_OK;
    if (info.kind == CBN_MODULE_LINEAR) x.shape[x.ndim - 1] = info.channels;
    c->out = x;
    c->known = true;
    return CBN_OK;
}

static cbn_status infer_call(cbn_shape_call *c, cbn_node_id id) {
    const cbn_op *op = cbn_op_table_row(cbn_graph_ops(c->g), cbn_graph_node(c->g, id)->opcode);
    const cbn_shape_rule rule = op == NULL || op->shape_rule[0] == '\0' ? NULL : find_rule(op->shape_rule);
    if (rule == NULL) return CBN_OK;
    cbn_bound bound;
    CBN_TRY(cbn_op_bind(c->g, id, &bound, c->err));
    c->op = op;
    c->bound = &bound;
    const cbn_status status = rule(c);
    c->bound = NULL;
    return status;
}

cbn_status cbn_graph_infer_shape(cbn_graph *g, cbn_node_id id, cbn_host root, bool *known, cbn_error *err) {
    const cbn_node *node = cbn_graph_node(g, id);
    *known = false;
    if (cbn_graph_ops(g) == NULL) return CBN_OK;
    cbn_shape_call c = {.g = g, .root = root, .node = cbn_graph_str(g, node->name, NULL), .err = err};
    cbn_graph_lock(g);
    cbn_status status = CBN_OK;
    switch (node->op) {
    case CBN_NODE_GET_ATTR: status = infer_get_attr(&c, node); break;
    case CBN_NODE_CALL_MODULE: status = infer_module(&c, node); break;
    case CBN_NODE_CALL_FUNCTION:
    case CBN_NODE_CALL_METHOD: status = infer_call(&c, id); break;
    default: break;
    }
    cbn_graph_unlock(g);
    if (status != CBN_OK || !c.known) return status;
    CBN_TRY(cbn_graph_set_tensor(g, id, &c.out, err));
    *known = true;
    return CBN_OK;
}

cbn_status cbn_graph_infer_shapes(cbn_graph *g, cbn_host root, cbn_status (*unknown)(cbn_node_id id, void *arg),
                                  void *arg, cbn_error *err) {
    for (cbn_node_id id = cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        const uint8_t op = cbn_graph_node(g, id)->op;
        if (op == CBN_NODE_PLACEHOLDER || op == CBN_NODE_OUTPUT) continue;
        bool known;
        CBN_TRY(cbn_graph_infer_shape(g, id, root, &known, err));
        if (known || op == CBN_NODE_GET_ATTR) continue;
        CBN_TRY(cbn_graph_set_tensor(g, id, NULL, err));
        CBN_TRY(unknown(id, arg));
    }
    return CBN_OK;
}
