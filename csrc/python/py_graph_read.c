/* SPDX-License-Identifier: BSD-3-Clause */
/* Graph methods that read, copy, or keep the whole: iteration, find, lint, snapshots, copies. */
#include "python/py_graph_priv.h"

#include "base/cbn_alloc.h"

static PyObject *iter_nodes(cbn_graph_object *self, PyObject *reversed_obj) {
    bool reversed;
    if (!cbn_py_bool(reversed_obj, "reversed", &reversed)) return NULL;
    return cbn_py_iter_graph(self, reversed);
}

static PyObject *count_nodes(cbn_graph_object *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromUnsignedLong(cbn_graph_count(self->graph));
}

static PyObject *output_node(cbn_graph_object *self, PyObject *unused) {
    (void)unused;
    const cbn_node_id id = cbn_graph_output(self->graph);
    if (id != 0) return cbn_py_node_view((PyObject *)self, id);
    PyErr_SetString(PyExc_RuntimeError, "the graph has no output node");
    return NULL;
}

typedef struct wanted {
    int op;           /* CBN_NODE_OP_COUNT: any */
    PyObject *target; /* NULL: any */
    cbn_str text;     /* the target when it is a str */
} wanted;

/* 1: the node is one of those, 0: it is not, -1: exception. Runs the target's __eq__: the graph may change meanwhile. */
static int matches(cbn_graph_object *self, cbn_node_id id, const wanted *w) {
    const cbn_node *n = cbn_graph_node(self->graph, id);
    if (w->op != CBN_NODE_OP_COUNT && n->op != w->op) return 0;
    if (w->target == NULL) return 1;
    if (n->target.tag == CBN_V_STR) return n->target.u.str == w->text;
    if (w->text != CBN_STR_NONE) return 0;
    const uint32_t gen = n->gen;
    PyObject *own = Py_NewRef((PyObject *)n->target.u.host);
    const int same = PyObject_RichCompareBool(own, w->target, Py_EQ); /* identity first */
    Py_DECREF(own);
    return same > 0 ? cbn_graph_alive(self->graph, id, gen) : same;
}

/* _find(op or None, target or None): nodes in order. */
static PyObject *find(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs) {
    if (!cbn_py_nargs("_find", nargs, 2)) return NULL;
    wanted w = {CBN_NODE_OP_COUNT, args[1] == Py_None ? NULL : args[1], CBN_STR_NONE};
    if (args[0] != Py_None) {
        if (!PyUnicode_Check(args[0])) {
            PyErr_Format(PyExc_TypeError, "op: expected a str, got %.200s", Py_TYPE(args[0])->tp_name);
            return NULL;
        }
        for (w.op = 0; w.op < CBN_NODE_OP_COUNT && PyUnicode_Compare(args[0], cbn_ids.ops[w.op]) != 0;) w.op++;
        if (w.op == CBN_NODE_OP_COUNT) return PyList_New(0);
    }
    if (w.target != NULL && PyUnicode_Check(w.target)) {
        Py_ssize_t len;
        const char *s = PyUnicode_AsUTF8AndSize(w.target, &len);
        if (s == NULL) PyErr_Clear();
        else w.text = cbn_graph_find_str(self->graph, s, (size_t)len);
        if (w.text == CBN_STR_NONE) return PyList_New(0);
    }
    PyObject *found = PyList_New(0);
    cbn_graph_iter it;
    cbn_graph_iter_begin(self->graph, false, &it);
    cbn_node_id id;
    while (found != NULL && (id = cbn_graph_iter_next(&it)) != 0) {
        const int match = matches(self, id, &w);
        PyObject *view = match > 0 ? cbn_py_node_view((PyObject *)self, id) : NULL;
        if (match < 0 || (match > 0 && (view == NULL || PyList_Append(found, view) < 0))) Py_CLEAR(found);
        Py_XDECREF(view);
    }
    cbn_graph_iter_end(&it);
    return found;
}

static PyObject *verify(cbn_graph_object *self, PyObject *unused) {
    (void)unused;
    cbn_error err = {0};
    const cbn_status status = cbn_graph_verify(self->graph, &err);
    if (status != CBN_OK) return cbn_py_graph_raise((PyObject *)self, status, &err);
    Py_RETURN_NONE;
}

/* ---- copies ---- */

/* Names that were assigned (node.name = ...) and could not have been made otherwise are copied as they are. */
static cbn_status same_names(cbn_graph *g, const cbn_graph *source, const cbn_node_id *map, uint32_t slots,
                             cbn_error *err) {
    for (uint32_t i = 1; i < slots; i++) {
        if (map[i] == 0) continue;
        size_t len, own_len;
        const char *name = cbn_graph_str(source, cbn_graph_node(source, i)->name, &len);
        const char *own = cbn_graph_str(g, cbn_graph_node(g, map[i])->name, &own_len);
        if (len == own_len && memcmp(name, own, len) == 0) continue;
        cbn_str s;
        CBN_TRY(cbn_graph_intern(g, name, len, &s, err));
        CBN_TRY(cbn_graph_set_name(g, map[i], s, err));
    }
    return CBN_OK;
}

/* The copy's meta dict: one of its own with the same items, as in torch.fx. A list of (node, copy) in *pairs. */
static bool own_meta(cbn_graph_object *self, cbn_graph_object *source, cbn_node_id id, cbn_node_id copy_id,
                     PyObject *pairs) {
    const cbn_node *n = id < cbn_graph_slots(source->graph) ? cbn_graph_node(source->graph, id) : NULL;
    PyObject *from = n && n->op < CBN_NODE_ROOT ? n->meta : NULL;
    if (from == NULL || PyDict_GET_SIZE(from) == 0) return true;
    Py_INCREF(from);
    PyObject *meta = PyDict_Copy(from), *pair = NULL;
    PyObject *a = meta ? cbn_py_node_view((PyObject *)source, id) : NULL;
    PyObject *b = a ? cbn_py_node_view((PyObject *)self, copy_id) : NULL;
    bool ok = b != NULL && PyObject_SetAttrString(b, "meta", meta) == 0;
    if (ok) ok = (pair = PyTuple_Pack(2, a, b)) != NULL && PyList_Append(pairs, pair) == 0;
    Py_XDECREF(pair);
    Py_XDECREF(b);
    Py_XDECREF(a);
    Py_XDECREF(meta);
    Py_DECREF(from);
    return ok;
}

/* _copy_from(source): makes an empty graph a copy of another; a list of (node of source, copy) for those with meta. */
static PyObject *copy_from(cbn_graph_object *self, PyObject *source_obj) {
    if (cbn_py_graph_get(source_obj, "source") == NULL) return NULL;
    cbn_graph_object *source = (cbn_graph_object *)source_obj;
    const uint32_t slots = cbn_graph_slots(source->graph);
    if (cbn_graph_count(self->graph) != 0) {
        PyErr_SetString(PyExc_RuntimeError, "_copy_from: expected an empty graph");
        return NULL;
    }
    cbn_node_id *map = cbn_calloc((size_t)slots * sizeof *map);
    if (map == NULL) return PyErr_NoMemory();
    PyObject *pairs = NULL;
    cbn_error err = {0};
    cbn_status status = cbn_graph_copy_nodes(self->graph, source->graph, map, &err);
    if (status == CBN_OK) status = same_names(self->graph, source->graph, map, slots, &err);
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        goto done;
    }
    pairs = PyList_New(0);
    for (uint32_t i = 1; pairs != NULL && i < slots; i++) {
        if (map[i] != 0 && !own_meta(self, source, i, map[i], pairs)) Py_CLEAR(pairs);
    }
done:
    cbn_free(map);
    cbn_py_graph_flush_if(self);
    return pairs;
}

/* ---- snapshots ---- */

typedef struct snapshot_object {
    PyObject_HEAD
    cbn_graph_object *graph;
    cbn_graph_snapshot *snapshot; /* NULL: used */
    uint64_t version;             /* of the graph when it was taken */
} snapshot_object;

static PyObject *snapshot(cbn_graph_object *self, PyObject *unused) {
    (void)unused;
    snapshot_object *s = (snapshot_object *)cbn_snapshot_type->tp_alloc(cbn_snapshot_type, 0);
    if (s == NULL) return NULL;
    cbn_error err = {0};
    const cbn_status status = cbn_graph_snapshot_take(self->graph, &s->snapshot, &err);
    if (status != CBN_OK) {
        s->snapshot = NULL;
        Py_DECREF(s);
        return cbn_py_graph_raise((PyObject *)self, status, &err);
    }
    s->graph = (cbn_graph_object *)Py_NewRef((PyObject *)self);
    s->version = cbn_graph_version(self->graph);
    return (PyObject *)s;
}

static PyObject *restore(cbn_graph_object *self, PyObject *obj) {
    if (!Py_IS_TYPE(obj, cbn_snapshot_type)) {
        PyErr_Format(PyExc_TypeError, "snapshot: expected what _snapshot() returned, got %.200s",
                     Py_TYPE(obj)->tp_name);
        return NULL;
    }
    snapshot_object *s = (snapshot_object *)obj;
    if (s->graph != self || s->snapshot == NULL) {
        PyErr_SetString(PyExc_RuntimeError, s->snapshot == NULL ? "snapshot: it was restored already"
                                                                : "snapshot: it belongs to another graph");
        return NULL;
    }
    if (cbn_graph_locked(self->graph) && s->version != cbn_graph_version(self->graph)) {
        PyErr_SetString(PyExc_RuntimeError, "the graph cannot be changed while a pass is reading it");
        return NULL;
    }
    cbn_graph_snapshot *state = s->snapshot;
    s->snapshot = NULL;
    cbn_graph_snapshot_restore(self->graph, state);
    cbn_py_graph_flush_if(self);
    Py_RETURN_NONE;
}

static int snapshot_traverse(snapshot_object *s, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(s));
    Py_VISIT(s->graph);
    return 0;
}

static int snapshot_clear(snapshot_object *s) {
    if (s->snapshot != NULL) {
        cbn_graph_snapshot_drop(s->graph->graph, s->snapshot);
        s->snapshot = NULL;
        cbn_py_graph_flush_if(s->graph);
    }
    Py_CLEAR(s->graph);
    return 0;
}

static void snapshot_dealloc(snapshot_object *s) {
    PyTypeObject *type = Py_TYPE(s);
    PyObject_GC_UnTrack(s);
    snapshot_clear(s);
    type->tp_free(s);
    Py_DECREF(type);
}

static PyType_Slot snapshot_slots[] = {
    {Py_tp_doc, "State of a graph, for Graph._restore."},
    {Py_tp_dealloc, snapshot_dealloc},
    {Py_tp_traverse, snapshot_traverse},
    {Py_tp_clear, snapshot_clear},
    {0, NULL},
};

PyType_Spec cbn_snapshot_spec = {
    .name = "pyconvbn._core.GraphSnapshot",
    .basicsize = sizeof(snapshot_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = snapshot_slots,
};

PyMethodDef cbn_graph_read_methods[] = {
    {"_iter", (PyCFunction)iter_nodes, METH_O,
     "_iter($self, reversed, /)\n--\n\nAn iterator over the nodes that goes on whatever is erased meanwhile."},
    {"_count", (PyCFunction)count_nodes, METH_NOARGS, "_count($self, /)\n--\n\nNumber of nodes."},
    {"output_node", (PyCFunction)output_node, METH_NOARGS,
     "output_node($self, /)\n--\n\nThe output node; RuntimeError if there is none."},
    {"_find", (PyCFunction)(void (*)(void))find, METH_FASTCALL,
     "_find($self, op, target, /)\n--\n\nNodes with this op and target, in order; None is any."},
    {"_verify", (PyCFunction)verify, METH_NOARGS, "_verify($self, /)\n--\n\nRuntimeError naming what is wrong."},
    {"_copy_from", (PyCFunction)copy_from, METH_O,
     "_copy_from($self, source, /)\n--\n\nMakes an empty graph a copy. Returns (node, copy) for those with meta."},
    {"_snapshot", (PyCFunction)snapshot, METH_NOARGS, "_snapshot($self, /)\n--\n\nThe whole state, for _restore."},
    {"_restore", (PyCFunction)restore, METH_O,
     "_restore($self, snapshot, /)\n--\n\nBack to the state of a snapshot, which is used up."},
    {0},
};
