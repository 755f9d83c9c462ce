/* SPDX-License-Identifier: BSD-3-Clause */
/* Our operators as the C functions of _core that their Python functions call, with the same arguments. */
#include "python/py_exec.h"

#include "base/cbn_alloc.h"

#include <string.h>

/* What a C function takes, in order: words of
 *   nd      the row's number of spatial axes      *      all parameters of the row, in order
 *   'text   that string                           0.0    that number
 *   None    None                                  name   that parameter
 *   !name   that parameter if it is a constant other than None: the Python function does more for the rest
 *   name|0  that parameter, 0.0 if it is the constant None */
typedef struct recipe {
    cbn_opcode code;
    const char *function, *words;
} recipe;

#define CONV(nd)                                                                                                       \
    {CBN_OP_FUNCTIONAL_CONV##nd##D, "conv", "nd *"}, {CBN_OP_ATEN_CONV##nd##D_DEFAULT, "conv", "nd * None"},           \
        {CBN_OP_ATEN_CONV##nd##D_PADDING, "conv", "nd * None"},                                                        \
        {CBN_OP_FUNCTIONAL_CONV_TRANSPOSE##nd##D, "conv_transpose", "nd *"}
#define POOL(nd)                                                                                                       \
    {CBN_OP_FUNCTIONAL_MAX_POOL##nd##D, "max_pool", "nd *"}, {CBN_OP_FUNCTIONAL_ADAPTIVE_AVG_POOL##nd##D,              \
                                                              "adaptive_avg_pool", "nd *"}
#define UNARY(row, text) {CBN_OP_FUNCTIONAL_##row, "unary", "'" text " input 0.0 0.0 out"}

static const recipe recipes[] = {
    CONV(1),
    CONV(2),
    CONV(3),
    {CBN_OP_ATEN_CONV_TRANSPOSE1D_DEFAULT, "conv_transpose", "nd * None"},
    {CBN_OP_ATEN_CONV_TRANSPOSE2D_INPUT, "conv_transpose", "nd * None"},
    {CBN_OP_ATEN_CONV_TRANSPOSE3D_INPUT, "conv_transpose", "nd * None"},
    {CBN_OP_FUNCTIONAL_LINEAR, "linear", "*"},
    {CBN_OP_ATEN_LINEAR_DEFAULT, "linear", "* None"},
    {CBN_OP_FUNCTIONAL_BATCH_NORM, "batch_norm",
     "input running_mean running_var weight bias training !momentum eps out"},
    {CBN_OP_ATEN_BATCH_NORM_DEFAULT, "batch_norm",
     "input running_mean running_var weight bias training momentum eps None"},
    POOL(1),
    POOL(2),
    POOL(3),
    {CBN_OP_FUNCTIONAL_AVG_POOL1D, "avg_pool",
     "nd input kernel_size stride padding ceil_mode count_include_pad None out"},
    {CBN_OP_FUNCTIONAL_AVG_POOL2D, "avg_pool", "nd *"},
    {CBN_OP_FUNCTIONAL_AVG_POOL3D, "avg_pool", "nd *"},
    UNARY(RELU, "relu"),
    UNARY(RELU6, "relu6"),
    UNARY(SIGMOID, "sigmoid"),
    UNARY(SILU, "silu"),
    UNARY(HARDSWISH, "hardswish"),
    {CBN_OP_FUNCTIONAL_LEAKY_RELU, "unary", "'leaky_relu input negative_slope 0.0 out"},
    {CBN_OP_FUNCTIONAL_HARDTANH, "unary", "'hardtanh input min_val max_val out"},
    {CBN_OP_FUNCTIONAL_SOFTMAX, "softmax", "*"},
    {CBN_OP_FUNCTIONAL_ADD, "binary", "'add input other alpha out"},
    {CBN_OP_FUNCTIONAL_MUL, "binary", "'mul input other 1.0 out"},
    {CBN_OP_FUNCTIONAL_PAD, "pad", "input pad mode value|0 out"},
};

static const recipe *find(cbn_opcode code) {
    for (size_t i = 0; i < sizeof recipes / sizeof recipes[0]; i++) {
        if (recipes[i].code == code) return &recipes[i];
    }
    return NULL;
}

enum { MOST = CBN_OP_MAX_ARGS + 4 };
typedef struct building {
    const cbn_graph *g;
    const cbn_program *p;
    const cbn_bound *bound;
    cbn_py_arg args[MOST];
    uint32_t n;
} building;

static int put_object(building *b, PyObject *obj) {
    if (obj == NULL) return -1;
    if (b->n == MOST) {
        Py_DECREF(obj);
        return 0;
    }
    b->args[b->n++] = (cbn_py_arg){.kind = CBN_ARG_CONST, .obj = obj};
    return 1;
}

static int put_param(building *b, int i) {
    const cbn_param *p = &b->bound->op->params[i];
    if (p->variadic) return 0;
    if (!b->bound->given[i]) return put_object(b, cbn_py_op_default(p));
    if (b->n == MOST) return 0;
    if (!cbn_py_arg_make(b->g, b->p, &b->bound->v[i], true, &b->args[b->n])) return -1;
    b->n++;
    return 1;
}

static int put_word(building *b, const char *word, size_t len) {
    if (len == 2 && memcmp(word, "nd", 2) == 0) return put_object(b, PyLong_FromLong(b->bound->op->nd));
    if (len == 4 && memcmp(word, "None", 4) == 0) return put_object(b, Py_NewRef(Py_None));
    if (*word == '\'') return put_object(b, PyUnicode_FromStringAndSize(word + 1, (Py_ssize_t)len - 1));
    if (*word >= '0' && *word <= '9') return put_object(b, PyFloat_FromDouble(*word - '0')); /* 0.0 and 1.0 */
    if (*word == '*') {
        int done = 1;
        for (int i = 0; i < b->bound->n && done == 1; i++) done = put_param(b, i);
        return done;
    }
    const bool must = *word == '!', or_zero = len > 2 && memcmp(word + len - 2, "|0", 2) == 0;
    char name[32];
    const size_t n = len - must - (or_zero ? 2 : 0);
    assert(n < sizeof name);
    memcpy(name, word + must, n);
    name[n] = 0;
    const int i = cbn_op_param(b->bound->op, name);
    assert(i >= 0);
    if (must || or_zero) {
        const bool given = b->bound->given[i], none = b->bound->v[i].tag == CBN_V_NONE;
        if (b->bound->v[i].has_nodes || (must && given && none)) return 0;
        if (or_zero && none) return put_object(b, PyFloat_FromDouble(0.0));
    }
    return put_param(b, i);
}

int cbn_py_direct(const cbn_graph *g, const cbn_program *p, cbn_node_id id, cbn_py_step *step) {
    const cbn_node *node = cbn_graph_node(g, id);
    const recipe *r = cbn_py_operator_check(node->target.u.host) ? find(node->opcode) : NULL;
    cbn_bound bound;
    /* What the operator would refuse is left to the operator to refuse. */
    if (r == NULL || cbn_op_bind(g, id, &bound, NULL) != CBN_OK) return 0;
    building b = {.g = g, .p = p, .bound = &bound};
    int done = 1;
    for (const char *at = r->words; *at && done == 1;) {
        const size_t len = strcspn(at, " ");
        done = put_word(&b, at, len);
        at += len + (at[len] == ' ');
    }
    PyObject *function = NULL;
    cbn_py_arg *args = NULL;
    if (done == 1) {
        PyObject *core = PyImport_ImportModule("pyconvbn._core");
        function = core == NULL ? NULL : PyObject_GetAttrString(core, r->function);
        Py_XDECREF(core);
        args = function == NULL ? NULL : cbn_alloc_array(b.n, sizeof *args);
        if (function != NULL && args == NULL) PyErr_NoMemory();
        if (args == NULL) done = -1;
    }
    if (done != 1) {
        for (uint32_t i = 0; i < b.n; i++) cbn_py_arg_clear(&b.args[i]);
        Py_XDECREF(function);
        return done;
    }
    memcpy(args, b.args, b.n * sizeof *args);
    step->args = args;
    step->nargs = b.n;
    step->target = function;
    step->direct = true;
    return 1;
}
