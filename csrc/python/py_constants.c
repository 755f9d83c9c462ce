/* SPDX-License-Identifier: BSD-3-Clause */
/* Where freezing puts the arrays it makes: names of the form <stem><number> in a module's instance dict. There may be a
 * hundred thousand of them. */
#include "python/py_freeze.h"
#include "python/py_passes.h"

#include <structmember.h>

#include <string.h>

typedef struct constant_store {
    PyObject_HEAD
    PyObject *attributes, *kinds; /* dicts of the module: all it has, and which of that is what */
    PyObject *stem, *names;       /* of all that was added, in order */
    unsigned long long next;
} constant_store;

static PyTypeObject *store_type;
static PyObject *buffer_kind, *add_name;
static const PyObject *own_add; /* the method, as the type has it */

/* ---- names ---- */

/* <stem><number>, a new str. */
static PyObject *numbered(PyObject *stem, unsigned long long number) {
    char text[128], digits[24];
    Py_ssize_t len;
    const char *utf8 = PyUnicode_AsUTF8AndSize(stem, &len);
    if (utf8 == NULL) return NULL;
    int n = 0;
    do digits[n++] = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    if ((size_t)len + (size_t)n > sizeof text) {
        PyErr_SetString(PyExc_ValueError, "stem: too long");
        return NULL;
    }
    memcpy(text, utf8, (size_t)len);
    while (n > 0) text[len++] = digits[--n];
    return PyUnicode_FromStringAndSize(text, len);
}

static PyObject *store_add(constant_store *self, PyObject *array) {
    if (self->names == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "add: the store was not initialised");
        return NULL;
    }
    for (;;) {
        PyObject *name = numbered(self->stem, self->next++);
        if (name == NULL) return NULL;
        const Py_ssize_t before = PyDict_GET_SIZE(self->attributes);
        const PyObject *found = PyDict_SetDefault(self->attributes, name, array);
        if (found != NULL && PyDict_GET_SIZE(self->attributes) == before) { /* taken */
            Py_DECREF(name);
            continue;
        }
        /* On the list first: what is on it is taken away again if anything fails. */
        if (found != NULL && PyList_Append(self->names, name) == 0 &&
            PyDict_SetItem(self->kinds, name, buffer_kind) == 0) {
            return name;
        }
        Py_DECREF(name);
        return NULL;
    }
}

PyObject *cbn_py_constant_add(PyObject *store, PyObject *array) {
    if (PyObject_TypeCheck(store, store_type) && _PyType_Lookup(Py_TYPE(store), add_name) == own_add) {
        return store_add((constant_store *)store, array);
    }
    PyObject *name = PyObject_CallMethodOneArg(store, add_name, array);
    if (name != NULL && !PyUnicode_Check(name)) {
        PyErr_Format(PyExc_TypeError, "add: expected a str, got %.200s", Py_TYPE(name)->tp_name);
        Py_CLEAR(name);
    }
    return name;
}

/* ---- the type ---- */

static int store_init(constant_store *self, PyObject *args, PyObject *kwargs) {
    PyObject *attributes, *kinds, *stem;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "ConstantStore takes no keyword arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "O!O!U", &PyDict_Type, &attributes, &PyDict_Type, &kinds, &stem)) return -1;
    PyObject *names = PyList_New(0);
    if (names == NULL) return -1;
    Py_XSETREF(self->attributes, Py_NewRef(attributes));
    Py_XSETREF(self->kinds, Py_NewRef(kinds));
    Py_XSETREF(self->stem, Py_NewRef(stem));
    Py_XSETREF(self->names, names);
    self->next = 0;
    return 0;
}

static int store_traverse(constant_store *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->attributes);
    Py_VISIT(self->kinds);
    Py_VISIT(self->names);
    return 0;
}

static int store_clear(constant_store *self) {
    Py_CLEAR(self->attributes);
    Py_CLEAR(self->kinds);
    Py_CLEAR(self->stem);
    Py_CLEAR(self->names);
    return 0;
}

static void store_dealloc(constant_store *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    store_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef store_methods[] = {
    {"add", (PyCFunction)store_add, METH_O, "add(array) -> the name of a new attribute that is the array"},
    {0},
};
static PyMemberDef store_members[] = {
    {"names", T_OBJECT, offsetof(constant_store, names), READONLY, "names of what was added, in order"},
    {0},
};
static PyType_Slot store_slots[] = {
    {Py_tp_init, store_init},       {Py_tp_traverse, store_traverse}, {Py_tp_clear, store_clear},
    {Py_tp_dealloc, store_dealloc}, {Py_tp_methods, store_methods},   {Py_tp_members, store_members},
    {Py_tp_doc, "ConstantStore(attributes, kinds, stem): numbered attributes of a module."},
    {0, NULL},
};
static PyType_Spec store_spec = {
    .name = "pyconvbn._core.ConstantStore",
    .basicsize = sizeof(constant_store),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = store_slots,
};

int cbn_py_constants_init(PyObject *module) {
    if (buffer_kind == NULL && (buffer_kind = PyUnicode_InternFromString("buffer")) == NULL) return -1;
    if (add_name == NULL && (add_name = PyUnicode_InternFromString("add")) == NULL) return -1;
    if (store_type == NULL && (store_type = (PyTypeObject *)PyType_FromSpec(&store_spec)) == NULL) return -1;
    if (PyModule_AddType(module, store_type) < 0) return -1;
    own_add = _PyType_Lookup(store_type, add_name);
    return 0;
}

/* ---- looking for names ---- */

/* constant_names(attributes, stem) -> the names in a dict that start with `stem`, in order */
static PyObject *constant_names(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("constant_names", nargs, 2)) return NULL;
    if (!PyDict_Check(args[0]) || !PyUnicode_Check(args[1]) || !PyUnicode_IS_ASCII(args[1])) {
        PyErr_SetString(PyExc_TypeError, "constant_names: expected a dict and an ASCII str");
        return NULL;
    }
    const size_t len = (size_t)PyUnicode_GET_LENGTH(args[1]);
    const void *stem = PyUnicode_1BYTE_DATA(args[1]);
    PyObject *list = PyList_New(0), *key;
    Py_ssize_t at = 0;
    while (list != NULL && PyDict_Next(args[0], &at, &key, NULL)) {
        if (!PyUnicode_Check(key) || PyUnicode_KIND(key) != PyUnicode_1BYTE_KIND) continue; /* ASCII is in one byte */
        if ((size_t)PyUnicode_GET_LENGTH(key) < len || memcmp(PyUnicode_1BYTE_DATA(key), stem, len) != 0) continue;
        if (PyList_Append(list, key) < 0) Py_CLEAR(list);
    }
    return list;
}

/* constants_unused(graph, names) -> those of the names that no get_attr node reads (as the first part of its target) */
static PyObject *constants_unused(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("constants_unused", nargs, 2)) return NULL;
    cbn_graph *g = cbn_py_graph_get(args[0], "graph");
    if (g == NULL) return NULL;
    if (!PyList_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "names: expected a list");
        return NULL;
    }
    PyObject *list = PyList_New(0), *used = PySet_New(NULL);
    bool ok = list != NULL && used != NULL;
    for (cbn_node_id id = cbn_graph_first(g); ok && id != 0; id = cbn_graph_next(g, id)) {
        const cbn_node *n = cbn_graph_node(g, id);
        if (n->op != CBN_NODE_GET_ATTR) continue;
        size_t len;
        const char *target = cbn_graph_str(g, n->target.u.str, &len), *dot = memchr(target, '.', len);
        PyObject *name = PyUnicode_DecodeUTF8(target, dot == NULL ? (Py_ssize_t)len : dot - target, "surrogatepass");
        ok = name != NULL && PySet_Add(used, name) == 0;
        Py_XDECREF(name);
    }
    for (Py_ssize_t i = 0; ok && i < PyList_GET_SIZE(args[1]); i++) {
        PyObject *name = PyList_GET_ITEM(args[1], i);
        const int found = PySet_Contains(used, name);
        ok = found > 0 || (found == 0 && PyList_Append(list, name) == 0);
    }
    Py_XDECREF(used);
    if (!ok) Py_CLEAR(list);
    return list;
}

PyMethodDef cbn_constants_methods[] = {
    {"constant_names", (PyCFunction)(void (*)(void))constant_names, METH_FASTCALL,
     "constant_names(attributes, stem) -> names that start with it"},
    {"constants_unused", (PyCFunction)(void (*)(void))constants_unused, METH_FASTCALL,
     "constants_unused(graph, names) -> those that no get_attr node reads"},
    {0},
};
