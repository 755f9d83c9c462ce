/* SPDX-License-Identifier: BSD-3-Clause */
/* From a graph to steps with everything about them that does not change from call to call. */
#include "python/py_exec.h"

#include "base/cbn_alloc.h"

#include <string.h>

/* ---- arguments ------------------------------------------------------------------------------------------------------- */
void cbn_py_arg_clear(cbn_py_arg *a) {
    for (uint32_t i = 0; a->kind == CBN_ARG_SEQ && i < a->n; i++) cbn_py_arg_clear(&a->items[i]);
    if (a->kind == CBN_ARG_SEQ) cbn_free(a->items);
    Py_XDECREF(a->obj);
    *a = (cbn_py_arg){.kind = CBN_ARG_CONST};
}

/* The object of a sequence whose items are all constants. */
static PyObject *join(cbn_value_tag tag, PyObject *cls, cbn_py_arg *items, uint32_t n) {
    if (tag == CBN_V_SLICE) return PySlice_New(items[0].obj, items[1].obj, items[2].obj);
    if (tag == CBN_V_DICT) {
        PyObject *dict = PyDict_New();
        for (uint32_t i = 0; dict != NULL && i < n; i += 2) {
            if (PyDict_SetItem(dict, items[i].obj, items[i + 1].obj) < 0) Py_CLEAR(dict);
        }
        return dict;
    }
    PyObject *seq = tag == CBN_V_LIST ? PyList_New(n) : PyTuple_New(n);
    for (uint32_t i = 0; seq != NULL && i < n; i++) {
        PyObject *item = Py_NewRef(items[i].obj);
        if (tag == CBN_V_LIST) PyList_SET_ITEM(seq, i, item);
        else PyTuple_SET_ITEM(seq, i, item);
    }
    if (seq == NULL || cls == NULL) return seq;
    /* A named tuple is made as tuple.__new__ makes it: its own constructor takes the items one by one. */
    PyObject *named = PyObject_CallMethod((PyObject *)&PyTuple_Type, "__new__", "OO", cls, seq);
    Py_DECREF(seq);
    return named;
}

static bool make_seq(const cbn_graph *g, const cbn_program *p, const cbn_value *v, bool shared, cbn_py_arg *out) {
    const cbn_seq *s = v->u.seq;
    *out = (cbn_py_arg){.kind = CBN_ARG_SEQ, .tag = v->tag, .obj = Py_XNewRef((PyObject *)s->cls)};
    out->items = cbn_alloc_array(s->count, sizeof *out->items);
    if (out->items == NULL) {
        PyErr_NoMemory();
        cbn_py_arg_clear(out);
        return false;
    }
    bool constant = shared || v->tag == CBN_V_TUPLE || v->tag == CBN_V_SLICE;
    for (uint32_t i = 0; i < s->count; i++) {
        if (!cbn_py_arg_make(g, p, &s->v[i], shared, &out->items[i])) {
            cbn_py_arg_clear(out);
            return false;
        }
        out->n++;
        constant = constant && out->items[i].kind == CBN_ARG_CONST;
    }
    if (!constant) return true;
    PyObject *obj = join((cbn_value_tag)v->tag, out->obj, out->items, out->n);
    cbn_py_arg_clear(out);
    out->obj = obj;
    return obj != NULL;
}

bool cbn_py_arg_make(const cbn_graph *g, const cbn_program *p, const cbn_value *v, bool shared, cbn_py_arg *out) {
    *out = (cbn_py_arg){.kind = CBN_ARG_CONST};
    switch ((cbn_value_tag)v->tag) {
    case CBN_V_NONE: out->obj = Py_NewRef(Py_None); break;
    case CBN_V_BOOL: out->obj = PyBool_FromLong(v->u.b); break;
    case CBN_V_INT: out->obj = PyLong_FromLongLong(v->u.i); break;
    case CBN_V_FLOAT: out->obj = PyFloat_FromDouble(v->u.f); break;
    case CBN_V_STR: out->obj = cbn_py_str(g, v->u.str); break;
    case CBN_V_HOST: out->obj = Py_NewRef((PyObject *)v->u.host); break;
    case CBN_V_NODE:
        *out = (cbn_py_arg){.kind = CBN_ARG_SLOT, .n = p->slot_of[v->u.node]};
        return true;
    case CBN_V_TUPLE:
    case CBN_V_LIST:
    case CBN_V_DICT:
    case CBN_V_SLICE: return make_seq(g, p, v, shared, out);
    }
    return out->obj != NULL;
}

static int traverse_arg(const cbn_py_arg *a, visitproc visit, void *arg) {
    Py_VISIT(a->obj);
    for (uint32_t i = 0; a->kind == CBN_ARG_SEQ && i < a->n; i++) {
        const int r = traverse_arg(&a->items[i], visit, arg);
        if (r) return r;
    }
    return 0;
}

/* ---- code -------------------------------------------------------------------------------------------------------------- */
void cbn_py_code_release(cbn_py_code *code) {
    if (code == NULL || --code->refs) return;
    for (uint32_t i = 0; i < code->nsteps; i++) {
        cbn_py_step *s = &code->steps[i];
        for (uint32_t k = 0; s->args != NULL && k < s->nargs + s->nkw; k++) cbn_py_arg_clear(&s->args[k]);
        cbn_free(s->args);
        Py_XDECREF(s->target);
        Py_XDECREF(s->kwnames);
    }
    for (uint32_t i = 0; i < code->ninputs; i++) Py_XDECREF(code->inputs[i].name);
    cbn_free(code->steps);
    cbn_free(code->inputs);
    cbn_program_free(&code->program);
    cbn_free(code);
}

int cbn_py_code_traverse(const cbn_py_code *code, visitproc visit, void *arg) {
    for (uint32_t i = 0; i < code->nsteps; i++) {
        const cbn_py_step *s = &code->steps[i];
        Py_VISIT(s->target);
        for (uint32_t k = 0; s->args != NULL && k < s->nargs + s->nkw; k++) {
            const int r = traverse_arg(&s->args[k], visit, arg);
            if (r) return r;
        }
    }
    return 0;
}

/* Arguments of a node as they stand. */
static bool plain_args(const cbn_graph *g, const cbn_program *p, const cbn_node *n, cbn_py_step *s) {
    const cbn_args *a = n->args;
    s->args = cbn_calloc(((size_t)a->nargs + a->nkw) * sizeof *s->args);
    if (s->args == NULL) {
        PyErr_NoMemory();
        return false;
    }
    s->nargs = a->nargs;
    s->nkw = a->nkw;
    for (uint32_t i = 0; i < a->nargs; i++) {
        if (!cbn_py_arg_make(g, p, &a->v[i], false, &s->args[i])) return false;
    }
    if (a->nkw == 0) return true;
    s->kwnames = PyTuple_New(a->nkw);
    if (s->kwnames == NULL) return false;
    for (uint32_t k = 0; k < a->nkw; k++) {
        PyObject *key = cbn_py_str(g, cbn_args_key(a, k));
        if (key == NULL) return false;
        PyUnicode_InternInPlace(&key);
        PyTuple_SET_ITEM(s->kwnames, k, key);
        if (!cbn_py_arg_make(g, p, cbn_args_kw(a, k), false, &s->args[a->nargs + k])) return false;
    }
    return true;
}

/* "layer1.0.conv" as a tuple of names. */
static PyObject *path_of(const cbn_graph *g, cbn_str target) {
    PyObject *text = cbn_py_str(g, target), *dot = PyUnicode_FromString("."), *parts = NULL, *path = NULL;
    if (text != NULL && dot != NULL) parts = PyUnicode_Split(text, dot, -1);
    if (parts != NULL) path = PyList_AsTuple(parts);
    for (Py_ssize_t i = 0; path != NULL && i < PyTuple_GET_SIZE(path); i++) {
        PyObject *part = Py_NewRef(PyTuple_GET_ITEM(path, i));
        PyUnicode_InternInPlace(&part);
        PyObject *old = PyTuple_GET_ITEM(path, i);
        PyTuple_SET_ITEM(path, i, part);
        Py_DECREF(old);
    }
    Py_XDECREF(text);
    Py_XDECREF(dot);
    Py_XDECREF(parts);
    return path;
}

static bool wrong_target(const cbn_graph *g, const cbn_node *n) {
    PyErr_Format(PyExc_RuntimeError, "node '%s': target of %s must be a %s; see graph.lint()",
                 cbn_graph_str(g, n->name, NULL), cbn_node_op_name((cbn_node_op)n->op),
                 n->op == CBN_NODE_CALL_FUNCTION ? "callable" : "string");
    return false;
}

static bool make_input(const cbn_graph *g, const cbn_node *n, cbn_py_code *code, cbn_py_step *s) {
    size_t len;
    const char *name = cbn_graph_str(g, n->target.u.str, &len);
    const size_t stars = len > 1 && name[0] == '*' ? (name[1] == '*' ? 2 : 1) : 0;
    cbn_py_input *in = &code->inputs[code->ninputs];
    *in = (cbn_py_input){.kind = stars == 2   ? CBN_INPUT_KEYWORDS
                                 : stars == 1 ? CBN_INPUT_REST
                                              : CBN_INPUT_PLAIN,
                         .step = s};
    in->name = PyUnicode_DecodeUTF8(name + stars, (Py_ssize_t)(len - stars), NULL);
    if (in->name == NULL) return false;
    PyUnicode_InternInPlace(&in->name);
    code->ninputs++;
    return plain_args(g, &code->program, n, s);
}

static bool make_step(const cbn_graph *g, cbn_py_code *code, const cbn_step *from, cbn_py_step *s) {
    const cbn_program *p = &code->program;
    const cbn_node *n = cbn_graph_node(g, from->node);
    *s = (cbn_py_step){.op = n->op,
                       .node = from->node,
                       .gen = n->gen,
                       .slot = from->slot,
                       .first_free = from->first_free,
                       .n_free = from->n_free};
    if (n->target.tag != (n->op == CBN_NODE_CALL_FUNCTION ? CBN_V_HOST : CBN_V_STR)) return wrong_target(g, n);
    if (n->op == CBN_NODE_PLACEHOLDER) return make_input(g, n, code, s);
    if (n->op == CBN_NODE_CALL_FUNCTION) {
        const int direct = code->direct ? cbn_py_direct(g, p, from->node, s) : 0;
        if (direct) return direct > 0;
        s->target = Py_NewRef((PyObject *)n->target.u.host);
    } else if (n->op == CBN_NODE_CALL_METHOD) {
        s->target = cbn_py_str(g, n->target.u.str);
        if (s->target != NULL) PyUnicode_InternInPlace(&s->target);
        if (s->target != NULL && n->args->nargs == 0) {
            PyErr_Format(PyExc_RuntimeError, "node '%s': call_method needs the object as its first argument",
                         cbn_graph_str(g, n->name, NULL));
            return false;
        }
    } else if (n->op != CBN_NODE_OUTPUT) {
        s->target = path_of(g, n->target.u.str);
    }
    return (s->target != NULL || n->op == CBN_NODE_OUTPUT) && plain_args(g, p, n, s);
}

static bool fill(const cbn_graph *g, cbn_py_code *code) {
    cbn_error err;
    const cbn_status status = cbn_program_build(g, &code->program, &err);
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        return false;
    }
    const cbn_program *p = &code->program;
    code->nslots = p->nslots;
    code->steps = cbn_alloc_array(p->nsteps, sizeof *code->steps);
    code->inputs = cbn_alloc_array(p->ninputs, sizeof *code->inputs);
    if (code->steps == NULL || code->inputs == NULL) {
        PyErr_NoMemory();
        return false;
    }
    for (uint32_t i = 0; i < p->nsteps; i++) {
        cbn_py_step *s = &code->steps[i];
        code->nsteps++;
        if (!make_step(g, code, &p->steps[i], s)) return false;
        if (s->op != CBN_NODE_PLACEHOLDER) code->max_args = CBN_MAX(code->max_args, s->nargs + s->nkw);
    }
    return true;
}

cbn_py_code *cbn_py_code_new(cbn_graph_object *graph, bool direct) {
    cbn_py_code *code = cbn_calloc(sizeof *code);
    if (code == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    code->refs = 1;
    code->direct = direct;
    /* Making objects can start a garbage collection, which can run anything. */
    cbn_graph_lock(graph->graph);
    const bool ok = fill(graph->graph, code);
    cbn_graph_unlock(graph->graph);
    if (ok) return code;
    cbn_py_code_release(code);
    return NULL;
}
