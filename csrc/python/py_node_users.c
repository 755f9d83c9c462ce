/* SPDX-License-Identifier: BSD-3-Clause */
/* Iterators over nodes, and node.users: a read-only mapping node -> None in order of first use, as torch.fx's dict. */
#include "python/py_graph_priv.h"

#include "base/cbn_alloc.h"

/* ---- iterators ---- */

/* Over the list (the graph knows of it and steps it back over erased nodes), or over pairs (id, generation) collected
 * when it was made. */
typedef struct node_iter {
    PyObject_HEAD
    cbn_graph_object *graph;
    bool listed;
    cbn_graph_iter list;
    uint32_t *pairs;
    Py_ssize_t at, count;
} node_iter;

static node_iter *new_iter(cbn_graph_object *graph) {
    node_iter *it = (node_iter *)cbn_node_iter_type->tp_alloc(cbn_node_iter_type, 0);
    if (it != NULL) it->graph = (cbn_graph_object *)Py_NewRef((PyObject *)graph);
    return it;
}

PyObject *cbn_py_iter_graph(cbn_graph_object *graph, bool reversed) {
    node_iter *it = new_iter(graph);
    if (it == NULL) return NULL;
    cbn_graph_iter_begin(graph->graph, reversed, &it->list);
    it->listed = true;
    return (PyObject *)it;
}

PyObject *cbn_py_iter_over(cbn_graph_object *graph, uint32_t *pairs, Py_ssize_t count) {
    node_iter *it = new_iter(graph);
    if (it == NULL) {
        cbn_free(pairs);
        return NULL;
    }
    it->pairs = pairs;
    it->count = count;
    return (PyObject *)it;
}

static PyObject *iter_next(node_iter *it) {
    if (it->graph == NULL) return NULL;
    cbn_graph *g = it->graph->graph;
    if (it->listed) {
        const cbn_node_id id = cbn_graph_iter_next(&it->list);
        return id == 0 ? NULL : cbn_py_node_view((PyObject *)it->graph, id);
    }
    while (it->at < it->count) {
        const uint32_t *pair = &it->pairs[2 * it->at++];
        if (cbn_graph_alive(g, pair[0], pair[1])) return cbn_py_node_view((PyObject *)it->graph, pair[0]);
    }
    return NULL;
}

static int iter_traverse(node_iter *it, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(it));
    Py_VISIT(it->graph);
    return 0;
}

static int iter_clear(node_iter *it) {
    if (it->listed) cbn_graph_iter_end(&it->list);
    it->listed = false;
    cbn_free(it->pairs);
    it->pairs = NULL;
    it->count = 0;
    Py_CLEAR(it->graph);
    return 0;
}

static void iter_dealloc(node_iter *it) {
    PyTypeObject *type = Py_TYPE(it);
    PyObject_GC_UnTrack(it);
    iter_clear(it);
    type->tp_free(it);
    Py_DECREF(type);
}

static PyType_Slot iter_slots[] = {
    {Py_tp_doc, "Iterator over nodes of a graph."},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, iter_next},
    {Py_tp_dealloc, iter_dealloc},
    {Py_tp_traverse, iter_traverse},
    {Py_tp_clear, iter_clear},
    {0, NULL},
};

PyType_Spec cbn_node_iter_spec = {
    .name = "pyconvbn._core.NodeIterator",
    .basicsize = sizeof(node_iter),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = iter_slots,
};

/* ---- users ---- */

typedef struct users_object {
    PyObject_HEAD
    cbn_node_object *node;
} users_object;

PyObject *cbn_py_users_of(cbn_node_object *node) {
    users_object *u = (users_object *)cbn_node_users_type->tp_alloc(cbn_node_users_type, 0);
    if (u != NULL) u->node = (cbn_node_object *)Py_NewRef((PyObject *)node);
    return (PyObject *)u;
}

static PyObject *users_iter(users_object *self) {
    const cbn_node *n = cbn_py_node_live(self->node);
    if (n == NULL) return NULL;
    const cbn_graph *g = self->node->graph->graph;
    uint32_t *pairs = cbn_alloc_array(n->n_users, 2 * sizeof *pairs);
    if (pairs == NULL) return PyErr_NoMemory();
    Py_ssize_t count = 0;
    for (uint32_t e = n->first_user; e != 0; e = cbn_graph_edge(g, e)->next_user) {
        const cbn_node_id user = cbn_graph_edge(g, e)->user;
        pairs[2 * count] = user;
        pairs[2 * count + 1] = cbn_graph_node(g, user)->gen;
        count++;
    }
    return cbn_py_iter_over(self->node->graph, pairs, count);
}

static Py_ssize_t users_length(users_object *self) {
    const cbn_node *n = cbn_py_node_live(self->node);
    return n ? (Py_ssize_t)n->n_users : -1;
}

static int users_contains(users_object *self, PyObject *obj) {
    const cbn_node *n = cbn_py_node_live(self->node);
    if (n == NULL) return -1;
    if (!cbn_py_is_node(obj)) return 0;
    const cbn_node_object *other = (cbn_node_object *)obj;
    if (other->graph != self->node->graph || !cbn_py_node_is_live(other)) return 0;
    /* Walk the shorter list: the users of this node or the inputs of that one. */
    const cbn_graph *g = self->node->graph->graph;
    const cbn_node *o = cbn_graph_node(g, other->id);
    if (n->n_users <= o->n_inputs) {
        for (uint32_t e = n->first_user; e != 0; e = cbn_graph_edge(g, e)->next_user) {
            if (cbn_graph_edge(g, e)->user == other->id) return 1;
        }
    } else {
        for (uint32_t e = o->first_input; e != 0; e = cbn_graph_edge(g, e)->next_input) {
            if (cbn_graph_edge(g, e)->producer == self->node->id) return 1;
        }
    }
    return 0;
}

static PyObject *users_subscript(users_object *self, PyObject *key) {
    const int there = users_contains(self, key);
    if (there > 0) Py_RETURN_NONE;
    if (there == 0) PyErr_SetObject(PyExc_KeyError, key);
    return NULL;
}

static PyObject *users_dict(users_object *self) {
    PyObject *it = users_iter(self), *user;
    PyObject *dict = it ? PyDict_New() : NULL;
    while (dict != NULL && (user = PyIter_Next(it)) != NULL) {
        if (PyDict_SetItem(dict, user, Py_None) < 0) Py_CLEAR(dict);
        Py_DECREF(user);
    }
    Py_XDECREF(it);
    if (dict != NULL && PyErr_Occurred()) Py_CLEAR(dict);
    return dict;
}

static PyObject *of_dict(users_object *self, const char *method) {
    PyObject *dict = users_dict(self);
    PyObject *result = dict ? PyObject_CallMethod(dict, method, NULL) : NULL;
    Py_XDECREF(dict);
    return result;
}

static PyObject *users_keys(users_object *self, PyObject *unused) {
    (void)unused;
    return of_dict(self, "keys");
}

static PyObject *users_values(users_object *self, PyObject *unused) {
    (void)unused;
    return of_dict(self, "values");
}

static PyObject *users_items(users_object *self, PyObject *unused) {
    (void)unused;
    return of_dict(self, "items");
}

static PyObject *users_copy(users_object *self, PyObject *unused) {
    (void)unused;
    return users_dict(self);
}

static PyObject *users_get(users_object *self, PyObject *const *args, Py_ssize_t nargs) {
    if (nargs < 1 || nargs > 2) {
        PyErr_Format(PyExc_TypeError, "get: expected 1 or 2 arguments, got %zd", nargs);
        return NULL;
    }
    const int there = users_contains(self, args[0]);
    if (there < 0) return NULL;
    return Py_NewRef(there > 0 || nargs == 1 ? Py_None : args[1]);
}

static PyObject *users_repr(users_object *self) {
    if (!cbn_py_node_is_live(self->node)) return PyUnicode_FromString("<users of an erased node>");
    PyObject *dict = users_dict(self);
    PyObject *text = dict ? PyObject_Repr(dict) : NULL;
    Py_XDECREF(dict);
    return text;
}

static PyObject *users_compare(users_object *self, PyObject *other, int op) {
    if (op != Py_EQ && op != Py_NE) Py_RETURN_NOTIMPLEMENTED;
    const bool both = Py_IS_TYPE(other, cbn_node_users_type);
    if (!both && !PyDict_Check(other)) Py_RETURN_NOTIMPLEMENTED;
    PyObject *a = users_dict(self), *b = NULL;
    if (a != NULL) b = both ? users_dict((users_object *)other) : Py_NewRef(other);
    PyObject *result = b ? PyObject_RichCompare(a, b, op) : NULL;
    Py_XDECREF(a);
    Py_XDECREF(b);
    return result;
}

static int users_traverse(users_object *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->node);
    return 0;
}

/* No tp_clear: the node's own chain (node -> graph) is where a cycle is broken, and methods may count on the node. */
static void users_dealloc(users_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    Py_CLEAR(self->node);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef users_methods[] = {
    {"keys", (PyCFunction)users_keys, METH_NOARGS, "keys($self, /)\n--\n\nThe users."},
    {"values", (PyCFunction)users_values, METH_NOARGS, "values($self, /)\n--\n\nNone for each user."},
    {"items", (PyCFunction)users_items, METH_NOARGS, "items($self, /)\n--\n\n(user, None) for each user."},
    {"get", (PyCFunction)(void (*)(void))users_get, METH_FASTCALL,
     "get($self, node, default=None, /)\n--\n\nNone for a user, else the default."},
    {"copy", (PyCFunction)users_copy, METH_NOARGS, "copy($self, /)\n--\n\nThe users as a dict."},
    {0},
};

static PyType_Slot users_slots[] = {
    {Py_tp_doc, "The users of a node: a read-only mapping node -> None in order of first use."},
    {Py_tp_iter, users_iter},
    {Py_mp_length, users_length},
    {Py_mp_subscript, users_subscript},
    {Py_sq_contains, users_contains},
    {Py_tp_repr, users_repr},
    {Py_tp_richcompare, users_compare},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_tp_methods, users_methods},
    {Py_tp_dealloc, users_dealloc},
    {Py_tp_traverse, users_traverse},
    {0, NULL},
};

PyType_Spec cbn_node_users_spec = {
    .name = "pyconvbn._core.NodeUsers",
    .basicsize = sizeof(users_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_MAPPING,
    .slots = users_slots,
};
