/* SPDX-License-Identifier: BSD-3-Clause */
/* The Node type: what names one node for ever (graph, id, generation), and its attributes. */
#include "python/py_graph_priv.h"

#include "graph/op_table.h"

#include <structmember.h>

/* ---- views ---- */

/* The slot's back pointer, if it is this generation's. An older one is of a node that was erased. */
static PyObject *existing_view(const cbn_node *n) {
    cbn_node_object *view = n->view;
    return view != NULL && view->gen == n->gen ? Py_NewRef((PyObject *)view) : NULL;
}

PyObject *cbn_py_node_view(PyObject *graph_obj, cbn_node_id id) {
    cbn_graph_object *graph = (cbn_graph_object *)graph_obj;
    const cbn_node *n = cbn_graph_node(graph->graph, id);
    PyObject *found = existing_view(n);
    if (found != NULL) return found;
    const uint32_t gen = n->gen;
    const cbn_str name = n->name;
    cbn_node_object *self = PyObject_GC_New(cbn_node_object, cbn_node_type);
    if (self == NULL) return NULL;
    self->graph = (cbn_graph_object *)Py_NewRef(graph_obj);
    self->id = id;
    self->gen = gen;
    self->name = name;
    self->weakrefs = NULL;
    /* The allocation may have started a collection, and that anything. */
    if (id < cbn_graph_slots(graph->graph)) {
        n = cbn_graph_node(graph->graph, id);
        if (n->gen == gen && (found = existing_view(n)) != NULL) {
            PyObject_GC_Track(self);
            Py_DECREF(self);
            return found;
        }
        if (n->gen == gen) cbn_graph_set_view(graph->graph, id, self);
    }
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

static void node_dealloc(cbn_node_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->graph != NULL) {
        cbn_graph *g = self->graph->graph;
        if (self->id < cbn_graph_slots(g) && cbn_graph_node(g, self->id)->view == self) {
            cbn_graph_set_view(g, self->id, NULL);
        }
    }
    if (self->weakrefs != NULL) PyObject_ClearWeakRefs((PyObject *)self);
    Py_CLEAR(self->graph);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

/* No tp_clear: cycles through a node pass through its graph, which has one; thus no node is
 * ever without its graph. */
static int node_traverse(cbn_node_object *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->graph);
    return 0;
}

bool cbn_py_node_is_live(const cbn_node_object *self) {
    return self->id == 0 || cbn_graph_alive(self->graph->graph, self->id, self->gen);
}

PyObject *cbn_py_node_name(const cbn_node_object *self) {
    const cbn_graph *g = self->graph->graph;
    if (self->id == 0) return PyUnicode_FromString("");
    return cbn_py_str(g, cbn_py_node_is_live(self) ? cbn_graph_node(g, self->id)->name : self->name);
}

static void raise_erased(const cbn_node_object *self, const char *argument) {
    PyObject *name = cbn_py_node_name(self);
    if (name == NULL) return;
    PyErr_Format(PyExc_RuntimeError, "%s%snode '%U' was erased from its graph", argument ? argument : "",
                 argument ? ": " : "", name);
    Py_DECREF(name);
}

const cbn_node *cbn_py_node_live(cbn_node_object *self) {
    if (cbn_py_node_is_live(self)) return cbn_graph_node(self->graph->graph, self->id);
    raise_erased(self, NULL);
    return NULL;
}

bool cbn_py_node_get_or_root(PyObject *graph, PyObject *node, const char *argument, cbn_node_id *out) {
    if (!cbn_py_is_node(node)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a Node, got %.200s", argument, Py_TYPE(node)->tp_name);
        return false;
    }
    const cbn_node_object *self = (cbn_node_object *)node;
    if ((PyObject *)self->graph != graph) {
        PyObject *name = cbn_py_node_name(self);
        if (name != NULL) PyErr_Format(PyExc_RuntimeError, "%s: node '%U' belongs to another graph", argument, name);
        Py_XDECREF(name);
        return false;
    }
    if (!cbn_py_node_is_live(self)) {
        raise_erased(self, argument);
        return false;
    }
    *out = self->id;
    return true;
}

bool cbn_py_node_get(PyObject *graph, PyObject *node, const char *argument, cbn_node_id *out) {
    if (!cbn_py_node_get_or_root(graph, node, argument, out)) return false;
    if (*out != 0) return true;
    PyErr_Format(PyExc_RuntimeError, "%s: expected a node, got the root of the graph", argument);
    return false;
}

/* ---- identity and order ---- */

static bool same(const cbn_node_object *a, const cbn_node_object *b) {
    return a == b || (a->graph == b->graph && a->id == b->id && a->gen == b->gen);
}

static PyObject *node_compare(PyObject *x, PyObject *y, int op) {
    if (!cbn_py_is_node(y)) Py_RETURN_NOTIMPLEMENTED;
    cbn_node_object *a = (cbn_node_object *)x, *b = (cbn_node_object *)y;
    const bool equal = same(a, b);
    if (op == Py_EQ || op == Py_NE) return PyBool_FromLong(equal == (op == Py_EQ));
    cbn_node_id p, q;
    if (!cbn_py_node_get_or_root((PyObject *)a->graph, x, "node", &p)) return NULL;
    if (!cbn_py_node_get_or_root((PyObject *)a->graph, y, "node", &q)) return NULL;
    if (equal) return PyBool_FromLong(op == Py_LE || op == Py_GE);
    const bool less = cbn_node_before(a->graph->graph, p, q);
    return PyBool_FromLong(less == (op == Py_LT || op == Py_LE));
}

static Py_hash_t node_hash(cbn_node_object *self) {
    uint64_t h = (uint64_t)(uintptr_t)self->graph >> 4;
    h = (h ^ ((uint64_t)self->gen << 32 | self->id)) * UINT64_C(0x9E3779B97F4A7C15);
    const Py_hash_t hash = (Py_hash_t)(h ^ h >> 29);
    return hash == -1 ? -2 : hash;
}

/* ---- arguments ---- */

static PyObject *changed_meanwhile(const cbn_node_object *self) {
    if (cbn_py_node_is_live(self)) PyErr_SetString(PyExc_RuntimeError, "a node changed while its arguments were read");
    else raise_erased(self, NULL);
    return NULL;
}

/* Item `at` of the arguments, which are as many as they were: else RuntimeError. */
static PyObject *argument(cbn_node_object *self, uint32_t nargs, uint32_t nkw, uint32_t at) {
    const cbn_args *a = cbn_py_node_is_live(self) ? cbn_graph_node(self->graph->graph, self->id)->args : NULL;
    if (a == NULL || a->nargs != nargs || a->nkw != nkw) return changed_meanwhile(self);
    const cbn_value v = a->v[at];
    return cbn_py_value_to_object((PyObject *)self->graph, &v);
}

PyObject *cbn_py_node_args(cbn_node_object *self) {
    const cbn_node *n = cbn_py_node_live(self);
    if (n == NULL) return NULL;
    const uint32_t nargs = n->args->nargs, nkw = n->args->nkw;
    PyObject *tuple = PyTuple_New(nargs);
    for (uint32_t i = 0; tuple != NULL && i < nargs; i++) {
        PyObject *item = argument(self, nargs, nkw, i);
        if (item == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, item);
    }
    return tuple;
}

PyObject *cbn_py_node_kwargs(cbn_node_object *self) {
    const cbn_node *n = cbn_py_node_live(self);
    if (n == NULL) return NULL;
    const uint32_t nargs = n->args->nargs, nkw = n->args->nkw;
    PyObject *dict = PyDict_New();
    for (uint32_t i = 0; dict != NULL && i < nkw; i++) {
        PyObject *key = argument(self, nargs, nkw, nargs + 2 * i);
        PyObject *value = key ? argument(self, nargs, nkw, nargs + 2 * i + 1) : NULL;
        if (value == NULL || PyDict_SetItem(dict, key, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    PyObject *result = dict ? cbn_py_immutable_dict(dict) : NULL;
    Py_XDECREF(dict);
    return result;
}

/* ---- attributes ---- */

/* The opening of a getter: the live node as `n`, or NULL returned. */
#define CBN_LIVE(self, failure)                                                                                        \
    const cbn_node *n = cbn_py_node_live(self);                                                                        \
    if (n == NULL) return failure

static PyObject *get_name(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    return cbn_py_node_name(self);
}

static PyObject *get_op(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    return Py_NewRef(cbn_ids.ops[n->op]);
}

static PyObject *get_target(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    if (self->id == 0) return PyUnicode_FromString("");
    const cbn_value v = n->target;
    return cbn_py_value_to_object((PyObject *)self->graph, &v);
}

static PyObject *get_args(cbn_node_object *self, void *unused) {
    (void)unused;
    return cbn_py_node_args(self);
}

static PyObject *get_kwargs(cbn_node_object *self, void *unused) {
    (void)unused;
    return cbn_py_node_kwargs(self);
}

static PyObject *get_users(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    return cbn_py_users_of(self);
}

static PyObject *get_inputs(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    const cbn_graph *g = self->graph->graph;
    PyObject *list = PyList_New(n->n_inputs);
    Py_ssize_t i = 0;
    if (list == NULL) return NULL;
    /* Each view is an allocation: start from the node again, by position. Inputs are few. */
    for (; i < PyList_GET_SIZE(list); i++) {
        const cbn_node *now = cbn_py_node_is_live(self) ? cbn_graph_node(g, self->id) : NULL;
        uint32_t e = now ? now->first_input : 0;
        for (Py_ssize_t k = 0; k < i && e != 0; k++) e = cbn_graph_edge(g, e)->next_input;
        PyObject *view =
            e ? cbn_py_node_view((PyObject *)self->graph, cbn_graph_edge(g, e)->producer) : changed_meanwhile(self);
        if (view == NULL) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SET_ITEM(list, i, view);
    }
    return list;
}

static PyObject *get_meta(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    if (n->meta != NULL) return Py_NewRef((PyObject *)n->meta);
    PyObject *dict = PyDict_New();
    if (dict == NULL) return NULL;
    n = cbn_py_node_live(self);
    if (n == NULL) Py_CLEAR(dict);
    else if (n->meta != NULL) Py_SETREF(dict, Py_NewRef((PyObject *)n->meta));
    else cbn_graph_set_meta(self->graph->graph, self->id, dict);
    return dict;
}

static int set_meta(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    if (value == NULL || !PyDict_Check(value)) {
        PyErr_Format(PyExc_TypeError, "meta: expected a dict, got %.200s", value ? Py_TYPE(value)->tp_name : "nothing");
        return -1;
    }
    if (cbn_py_node_live(self) == NULL) return -1;
    cbn_graph_set_meta(self->graph->graph, self->id, value);
    cbn_py_graph_flush_if(self->graph);
    return 0;
}

static PyObject *get_type(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    return Py_NewRef(n->type_expr ? (PyObject *)n->type_expr : Py_None);
}

static int set_type(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    if (cbn_py_node_live(self) == NULL) return -1;
    cbn_graph_set_type_expr(self->graph->graph, self->id, value == Py_None ? NULL : value);
    cbn_py_graph_flush_if(self->graph);
    return 0;
}

static PyObject *get_next(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    return cbn_py_node_view((PyObject *)self->graph, n->next);
}

static PyObject *get_prev(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    return cbn_py_node_view((PyObject *)self->graph, n->prev);
}

static PyObject *get_erased(cbn_node_object *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(!cbn_py_node_is_live(self));
}

static PyObject *get_stack_trace(cbn_node_object *self, void *unused) {
    (void)unused;
    CBN_LIVE(self, NULL);
    if (n->meta == NULL) Py_RETURN_NONE;
    PyObject *meta = Py_NewRef((PyObject *)n->meta), *text = PyDict_GetItemWithError(meta, cbn_ids.stack_trace);
    Py_XINCREF(text);
    Py_DECREF(meta);
    if (text != NULL || PyErr_Occurred()) return text;
    Py_RETURN_NONE;
}

static int set_stack_trace(cbn_node_object *self, PyObject *value, void *unused) {
    PyObject *meta = get_meta(self, unused);
    if (meta == NULL) return -1;
    const int status = PyDict_SetItem(meta, cbn_ids.stack_trace, value ? value : Py_None);
    Py_DECREF(meta);
    return status;
}

static int set_name(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    return cbn_py_node_put_name(self, value);
}

static int set_target(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    return cbn_py_node_put_target(self, value);
}

static int set_op(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    return cbn_py_node_put_op(self, value);
}

static int set_args(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    return cbn_py_node_put_args(self, value, NULL);
}

static int set_kwargs(cbn_node_object *self, PyObject *value, void *unused) {
    (void)unused;
    return cbn_py_node_put_args(self, NULL, value);
}

static PyGetSetDef getset[] = {
    {"name", (getter)get_name, (setter)set_name, "Name, unique in the graph. Assigning takes the text as it is.", NULL},
    {"op", (getter)get_op, (setter)set_op, "placeholder, get_attr, call_function, call_method, call_module or output.",
     NULL},
    {"target", (getter)get_target, (setter)set_target, "What is called: a callable for call_function, else a str.",
     NULL},
    {"args", (getter)get_args, (setter)set_args, "Positional arguments.", NULL},
    {"kwargs", (getter)get_kwargs, (setter)set_kwargs, "Keyword arguments.", NULL},
    {"users", (getter)get_users, NULL, "The nodes that use this one: mapping node -> None in order of first use.",
     NULL},
    {"all_input_nodes", (getter)get_inputs, NULL, "The nodes this one uses, each once, in order of first use.", NULL},
    {"meta", (getter)get_meta, (setter)set_meta, "A dict of anything about the node.", NULL},
    {"type", (getter)get_type, (setter)set_type, "Type of the value as written in the source, or None.", NULL},
    {"next", (getter)get_next, NULL, "The next node; the root after the last.", NULL},
    {"prev", (getter)get_prev, NULL, "The previous node; the root before the first.", NULL},
    {"stack_trace", (getter)get_stack_trace, (setter)set_stack_trace, "meta['stack_trace'], or None.", NULL},
    {"_erased", (getter)get_erased, NULL, "Was the node erased from its graph?", NULL},
    {0},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(cbn_node_object, weakrefs), READONLY, NULL},
    {"graph", T_OBJECT_EX, offsetof(cbn_node_object, graph), READONLY, "The graph of the node."},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "A node of a Graph. Made by the graph's methods."},
    {Py_tp_dealloc, node_dealloc},
    {Py_tp_traverse, node_traverse},
    {Py_tp_repr, cbn_py_node_name},
    {Py_tp_richcompare, node_compare},
    {Py_tp_hash, node_hash},
    {Py_tp_getset, getset},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec cbn_node_spec_py = {
    .name = "pyconvbn._core.Node",
    .basicsize = sizeof(cbn_node_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
