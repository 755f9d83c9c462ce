/* SPDX-License-Identifier: BSD-3-Clause */
/* The Graph type: life, garbage collection, what every other file of the binding needs. pyconvbn.fx.Graph, its subclass
 * in Python, adds what is not hot. */
#include "python/py_graph_priv.h"

#include "graph/op_table.h"

#include <structmember.h>

cbn_py_ids cbn_ids;
PyTypeObject *cbn_graph_type, *cbn_node_type, *cbn_node_iter_type, *cbn_node_users_type, *cbn_snapshot_type;

cbn_graph *cbn_py_graph_get(PyObject *graph, const char *argument) {
    if (cbn_py_is_graph(graph)) return ((cbn_graph_object *)graph)->graph;
    PyErr_Format(PyExc_TypeError, "%s: expected a Graph, got %.200s", argument, Py_TYPE(graph)->tp_name);
    return NULL;
}

void cbn_py_graph_flush(PyObject *graph) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_INCREF(graph); /* a destructor may drop the last reference of the caller's container */
    cbn_graph_flush(((cbn_graph_object *)graph)->graph);
    Py_DECREF(graph);
    PyErr_Restore(type, value, traceback);
}

PyObject *cbn_py_graph_raise(PyObject *graph, cbn_status status, const cbn_error *err) {
    cbn_py_raise(status, err);
    cbn_py_graph_flush_if((cbn_graph_object *)graph);
    return NULL;
}

PyObject *cbn_py_str(const cbn_graph *g, cbn_str s) {
    size_t len;
    const char *text = cbn_graph_str(g, s, &len);
    return PyUnicode_FromStringAndSize(text, (Py_ssize_t)len);
}

PyObject *cbn_py_str_or_none(const cbn_graph *g, cbn_str s) {
    if (s == CBN_STR_NONE) return Py_NewRef(Py_None);
    size_t len;
    const char *text = cbn_graph_str(g, s, &len);
    return PyUnicode_DecodeUTF8(text, (Py_ssize_t)len, "surrogatepass");
}

bool cbn_py_sort_args(const char *function, PyObject **const *names, int count, int required, int positional,
                      PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames, PyObject **slots) {
    if (nargs > positional) {
        PyErr_Format(PyExc_TypeError, "%s: expected at most %d positional arguments, got %zd", function, positional,
                     nargs);
        return false;
    }
    for (int i = 0; i < count; i++) slots[i] = i < nargs ? args[i] : NULL;
    const Py_ssize_t nkw = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    for (Py_ssize_t k = 0; k < nkw; k++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, k);
        int at = 0;
        while (at < count && name != *names[at]) at++;
        for (int i = 0; at == count && i < count; i++) { /* not interned */
            if (PyUnicode_Compare(name, *names[i]) == 0) at = i;
        }
        if (at == count || slots[at] != NULL) {
            PyErr_Format(PyExc_TypeError, at == count ? "%s: got an unexpected keyword argument '%U'"
                                                      : "%s: got the argument '%U' twice", function, name);
            return false;
        }
        slots[at] = args[nargs + k];
    }
    for (int i = 0; i < required; i++) {
        if (slots[i] != NULL) continue;
        PyErr_Format(PyExc_TypeError, "%s: expected the argument '%U', got none", function, *names[i]);
        return false;
    }
    return true;
}

/* ---- life ---- */

static void capsule_free(PyObject *capsule) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    cbn_graph_release(PyCapsule_GetPointer(capsule, CBN_GRAPH_CAPSULE));
    PyErr_Restore(type, value, traceback);
}

static PyObject *graph_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    cbn_graph_object *self = (cbn_graph_object *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    cbn_error err = {0};
    cbn_graph *graph = NULL;
    const cbn_status status = cbn_graph_new(&cbn_py_host_vtable, cbn_py_op_table(), &graph, &err);
    if (status != CBN_OK) {
        Py_DECREF(self);
        return cbn_py_raise(status, &err);
    }
    self->capsule = PyCapsule_New(graph, CBN_GRAPH_CAPSULE, capsule_free);
    if (self->capsule == NULL) {
        cbn_graph_release(graph);
        Py_DECREF(self);
        return NULL;
    }
    self->graph = graph;
    return (PyObject *)self;
}

/* Nobody else keeps the structure alive, so its handles are this object's. */
static bool sole_owner(cbn_graph_object *self) {
    return self->capsule != NULL && Py_REFCNT(self->capsule) == 1 && cbn_graph_refs(self->graph) == 1;
}

typedef struct visit_args { visitproc visit; void *arg; } visit_args;
static int visit_host(cbn_host h, void *arg) {
    const visit_args *v = arg;
    return v->visit(h, v->arg);
}

static int graph_traverse(cbn_graph_object *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->owner);
    Py_VISIT(self->tracer_cls);
    if (!sole_owner(self)) return 0;
    visit_args v = {visit, arg};
    return cbn_graph_visit_hosts(self->graph, visit_host, &v);
}

static int graph_clear(cbn_graph_object *self) {
    Py_CLEAR(self->owner);
    Py_CLEAR(self->tracer_cls);
    if (sole_owner(self)) {
        cbn_graph_clear(self->graph);
        cbn_py_graph_flush((PyObject *)self);
    }
    return 0;
}

static void graph_dealloc(cbn_graph_object *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->weakrefs != NULL) PyObject_ClearWeakRefs((PyObject *)self);
    Py_CLEAR(self->owner);
    Py_CLEAR(self->tracer_cls);
    Py_CLEAR(self->capsule);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- the owning module ----
 * A module holds its graph; were the graph to hold the module as well, weights of megabytes would wait for the garbage
 * collector. So the reference back is weak where the object allows it. */
static int set_owner(cbn_graph_object *self, PyObject *module) {
    PyObject *owner = NULL;
    if (module != NULL && module != Py_None) {
        owner = PyWeakref_NewRef(module, NULL);
        if (owner == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
            PyErr_Clear();
            owner = Py_NewRef(module);
        }
    }
    Py_XSETREF(self->owner, owner);
    return 0;
}

PyObject *cbn_py_graph_owner(cbn_graph_object *self) {
    if (self->owner == NULL) return NULL;
    PyObject *module = PyWeakref_CheckRef(self->owner) ? PyWeakref_GET_OBJECT(self->owner) : self->owner;
    return module == Py_None ? NULL : Py_NewRef(module);
}

static int graph_init(cbn_graph_object *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"owning_module", "tracer_cls", NULL};
    PyObject *module = NULL, *tracer_cls = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:Graph", names, &module, &tracer_cls)) return -1;
    if (tracer_cls == Py_None) tracer_cls = NULL;
    Py_XSETREF(self->tracer_cls, Py_XNewRef(tracer_cls));
    return set_owner(self, module);
}

static PyObject *get_owner(cbn_graph_object *self, void *unused) {
    (void)unused;
    PyObject *module = cbn_py_graph_owner(self);
    return module ? module : Py_NewRef(Py_None);
}

static int put_owner(cbn_graph_object *self, PyObject *value, void *unused) {
    (void)unused;
    return set_owner(self, value);
}

static PyObject *get_version(cbn_graph_object *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(cbn_graph_version(self->graph));
}

static PyObject *get_bytes(cbn_graph_object *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(cbn_graph_bytes(self->graph));
}

static PyObject *get_root(cbn_graph_object *self, void *unused) {
    (void)unused;
    return cbn_py_node_view((PyObject *)self, 0);
}

static PyGetSetDef getset[] = {
    {"owning_module", (getter)get_owner, (setter)put_owner,
     "The module that get_attr and call_module targets are looked up in, or None. Held weakly.", NULL},
    {"version", (getter)get_version, NULL, "Grows with every change of nodes, arguments, targets or order.", NULL},
    {"_nbytes", (getter)get_bytes, NULL, "Memory of the structure in bytes, Python objects not counted.", NULL},
    {"_root", (getter)get_root, NULL, "The sentinel before the first and after the last node.", NULL},
    {0},
};

static PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(cbn_graph_object, weakrefs), READONLY, NULL},
    {"_capsule", T_OBJECT, offsetof(cbn_graph_object, capsule), READONLY, "The PyCapsule that owns the C graph."},
    {"_tracer_cls", T_OBJECT, offsetof(cbn_graph_object, tracer_cls), READONLY, "As given to the constructor."},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Graph(owning_module=None, tracer_cls=None)\n--\n\nA list of nodes. The base of pyconvbn.fx.Graph."},
    {Py_tp_new, graph_new},
    {Py_tp_init, graph_init},
    {Py_tp_dealloc, graph_dealloc},
    {Py_tp_traverse, graph_traverse},
    {Py_tp_clear, graph_clear},
    {Py_tp_getset, getset},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec cbn_graph_spec = {
    .name = "pyconvbn._core.Graph",
    .basicsize = sizeof(cbn_graph_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

/* ---- types ---- */

static int intern_ids(void) {
#define CBN_PY_ID_INTERN_(id) if ((cbn_ids.id = PyUnicode_InternFromString(#id)) == NULL) return -1;
    CBN_PY_IDS(CBN_PY_ID_INTERN_)
#undef CBN_PY_ID_INTERN_
    for (int op = 0; op < CBN_NODE_OP_COUNT; op++) {
        cbn_ids.ops[op] = PyUnicode_InternFromString(cbn_node_op_name((cbn_node_op)op));
        if (cbn_ids.ops[op] == NULL) return -1;
    }
    return 0;
}

static PyTypeObject *make_type(PyObject *module, PyType_Spec *spec, PyMethodDef *const *methods) {
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    for (; type != NULL && methods != NULL && *methods != NULL; methods++) {
        for (PyMethodDef *m = *methods; m->ml_name != NULL; m++) {
            PyObject *method = PyDescr_NewMethod(type, m);
            if (method == NULL || PyObject_SetAttrString((PyObject *)type, m->ml_name, method) < 0) {
                Py_XDECREF(method);
                Py_CLEAR(type);
                return NULL;
            }
            Py_DECREF(method);
        }
    }
    return type;
}

int cbn_py_graph_types(PyObject *module) {
    /* One interpreter, one set of types: nodes of two copies of the module stay compatible. */
    if (cbn_graph_type == NULL) {
        PyMethodDef *const graph_methods[] = {cbn_graph_edit_methods, cbn_graph_read_methods, NULL};
        PyMethodDef *const node_methods[] = {cbn_node_edit_methods, NULL};
        if (intern_ids() < 0) return -1;
        if ((cbn_node_type = make_type(module, &cbn_node_spec_py, node_methods)) == NULL) return -1;
        if ((cbn_node_iter_type = make_type(module, &cbn_node_iter_spec, NULL)) == NULL) return -1;
        if ((cbn_node_users_type = make_type(module, &cbn_node_users_spec, NULL)) == NULL) return -1;
        if ((cbn_snapshot_type = make_type(module, &cbn_snapshot_spec, NULL)) == NULL) return -1;
        if ((cbn_graph_type = make_type(module, &cbn_graph_spec, graph_methods)) == NULL) return -1;
    }
    PyTypeObject *const named[] = {cbn_graph_type, cbn_node_type, cbn_node_users_type};
    for (size_t i = 0; i < sizeof named / sizeof *named; i++) {
        if (PyModule_AddType(module, named[i]) < 0) return -1;
    }
    return 0;
}
