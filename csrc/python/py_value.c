/* SPDX-License-Identifier: BSD-3-Clause */
/* Python object <-> cbn_value. Nothing here may be surprised by code that runs meanwhile (__hash__ of a dict key, a
 * garbage collection that starts at an allocation): items are held while they are looked at, sequences retained while
 * they are read. */
#include "python/py_graph_priv.h"

#include "base/cbn_alloc.h"

/* immutable_list and immutable_dict are Python classes, loaded at the first list or dict. */
static PyTypeObject *list_class, *dict_class;

static bool load_classes(void) {
    if (dict_class != NULL) return true;
    PyObject *module = PyImport_ImportModule("pyconvbn.fx.immutable");
    if (module == NULL) return false;
    PyObject *list = PyObject_GetAttrString(module, "immutable_list");
    PyObject *dict = list ? PyObject_GetAttrString(module, "immutable_dict") : NULL;
    Py_DECREF(module);
    if (dict == NULL || !PyType_Check(list) || !PyType_Check(dict)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "pyconvbn.fx.immutable: expected two classes");
        Py_XDECREF(list);
        Py_XDECREF(dict);
        return false;
    }
    list_class = (PyTypeObject *)list;
    dict_class = (PyTypeObject *)dict;
    return true;
}

/* ---- object -> value ---- */

static bool too_deep(void) {
    PyErr_Format(PyExc_ValueError, "args: expected at most %d levels of nesting, got more", CBN_VALUE_MAX_DEPTH);
    return false;
}

static bool convert(cbn_graph_object *graph, PyObject *obj, int depth, cbn_value *out);

/* 1: a node somewhere in this container that the graph cannot look into; 0: none; -1: exception. */
static int holds_node(PyObject *obj, int depth) {
    if (cbn_py_is_node(obj)) return 1;
    const bool container = PyTuple_Check(obj) || PyList_Check(obj) || PyDict_Check(obj) || PyAnySet_CheckExact(obj);
    if (!container) return 0;
    if (depth > CBN_VALUE_MAX_DEPTH) return too_deep() ? 0 : -1;
    int found = 0;
    if (PyTuple_Check(obj) || PyList_Check(obj)) {
        for (Py_ssize_t i = 0; found == 0 && i < PySequence_Fast_GET_SIZE(obj); i++) {
            PyObject *item = Py_NewRef(PySequence_Fast_GET_ITEM(obj, i));
            found = holds_node(item, depth + 1);
            Py_DECREF(item);
        }
    } else if (PyDict_Check(obj)) {
        Py_ssize_t at = 0;
        PyObject *key, *value;
        while (found == 0 && PyDict_Next(obj, &at, &key, &value)) {
            Py_INCREF(key);
            Py_INCREF(value);
            found = holds_node(key, depth + 1);
            if (found == 0) found = holds_node(value, depth + 1);
            Py_DECREF(key);
            Py_DECREF(value);
        }
    } else {
        PyObject *it = PyObject_GetIter(obj), *item;
        if (it == NULL) return -1;
        while (found == 0 && (item = PyIter_Next(it)) != NULL) {
            found = holds_node(item, depth + 1);
            Py_DECREF(item);
        }
        Py_DECREF(it);
        if (found == 0 && PyErr_Occurred()) found = -1;
    }
    return found;
}

static bool convert_host(PyObject *obj, cbn_value *out) {
    const int found = holds_node(obj, 0);
    if (found < 0) return false;
    if (found > 0) {
        PyErr_Format(
            PyExc_TypeError,
            "args: expected nodes inside tuples, lists, dicts (as values) and slices only, got one inside a %.200s",
            Py_TYPE(obj)->tp_name);
        return false;
    }
    *out = cbn_value_host(Py_NewRef(obj));
    return true;
}

static bool convert_str(cbn_graph_object *graph, PyObject *obj, cbn_value *out) {
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(obj, &len);
    if (text == NULL) { /* lone surrogates: keep the object */
        if (!PyErr_ExceptionMatches(PyExc_UnicodeError)) return false;
        PyErr_Clear();
        return convert_host(obj, out);
    }
    cbn_error err;
    *out = (cbn_value){.tag = CBN_V_STR};
    const cbn_status status = cbn_graph_intern(graph->graph, text, (size_t)len, &out->u.str, &err);
    if (status != CBN_OK) cbn_py_raise(status, &err);
    return status == CBN_OK;
}

/* Makes the sequence of items[0..count), which are moved or released. */
static bool finish_seq(cbn_graph_object *graph, cbn_value_tag tag, cbn_value *items, uint32_t count, PyTypeObject *cls,
                       bool ok, cbn_value *out) {
    cbn_error err;
    if (ok) {
        Py_XINCREF(cls);
        const cbn_status status = cbn_value_seq(graph->graph, tag, items, count, cls, out, &err);
        if (status == CBN_OK) return true;
        Py_XDECREF(cls);
        cbn_py_raise(status, &err);
    }
    for (uint32_t i = 0; i < count; i++) cbn_value_release(graph->graph, items[i]);
    return false;
}

static cbn_value *room(cbn_value *few, Py_ssize_t count) {
    if (count <= CBN_PY_FEW / 2) return few;
    cbn_value *items = (uint64_t)count > UINT32_MAX ? NULL : cbn_alloc_array((size_t)count, sizeof *items);
    if (items == NULL) PyErr_NoMemory();
    return items;
}

static bool convert_list(cbn_graph_object *graph, cbn_value_tag tag, PyObject *obj, PyTypeObject *cls, int depth,
                         cbn_value *out) {
    cbn_value few[CBN_PY_FEW / 2];
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(obj);
    cbn_value *items = room(few, size);
    if (items == NULL) return false;
    uint32_t count = 0;
    bool ok = true;
    for (Py_ssize_t i = 0; ok && i < size && i < PySequence_Fast_GET_SIZE(obj); i++) {
        PyObject *item = Py_NewRef(PySequence_Fast_GET_ITEM(obj, i));
        ok = convert(graph, item, depth + 1, &items[count]);
        count += ok;
        Py_DECREF(item);
    }
    ok = finish_seq(graph, tag, items, count, cls, ok, out);
    if (items != few) cbn_free(items);
    return ok;
}

static bool convert_dict(cbn_graph_object *graph, PyObject *obj, int depth, cbn_value *out) {
    cbn_value few[CBN_PY_FEW / 2];
    const Py_ssize_t size = 2 * PyDict_GET_SIZE(obj);
    cbn_value *items = room(few, size);
    if (items == NULL) return false;
    uint32_t count = 0;
    bool ok = true;
    Py_ssize_t at = 0;
    PyObject *key, *value;
    while (ok && count + 2 <= size && PyDict_Next(obj, &at, &key, &value)) {
        Py_INCREF(key);
        Py_INCREF(value);
        ok = convert(graph, key, depth + 1, &items[count]);
        count += ok;
        if (ok && items[count - 1].has_nodes) {
            PyErr_SetString(PyExc_TypeError, "args: expected nodes as values of a dict only, got one as a key");
            ok = false;
        }
        if (ok) {
            ok = convert(graph, value, depth + 1, &items[count]);
            count += ok;
        }
        Py_DECREF(key);
        Py_DECREF(value);
    }
    ok = finish_seq(graph, CBN_V_DICT, items, count, NULL, ok, out);
    if (items != few) cbn_free(items);
    return ok;
}

static bool convert_slice(cbn_graph_object *graph, PyObject *obj, int depth, cbn_value *out) {
    const PySliceObject *slice = (PySliceObject *)obj;
    PyObject *const parts[3] = {slice->start, slice->stop, slice->step};
    cbn_value items[3];
    uint32_t count = 0;
    bool ok = true;
    for (int i = 0; ok && i < 3; i++) {
        ok = convert(graph, parts[i], depth + 1, &items[i]);
        count += ok;
    }
    return finish_seq(graph, CBN_V_SLICE, items, count, NULL, ok, out);
}

static bool is_namedtuple(PyTypeObject *type) {
    PyObject *fields = PyObject_GetAttr((PyObject *)type, cbn_ids._fields);
    if (fields == NULL) {
        PyErr_Clear();
        return false;
    }
    const bool yes = PyTuple_Check(fields);
    Py_DECREF(fields);
    return yes;
}

static bool convert(cbn_graph_object *graph, PyObject *obj, int depth, cbn_value *out) {
    PyTypeObject *type = Py_TYPE(obj);
    if (type == cbn_node_type) {
        cbn_node_id id;
        if (!cbn_py_node_get((PyObject *)graph, obj, "args", &id)) return false;
        *out = cbn_value_node(id);
        return true;
    }
    if (type == &PyLong_Type) {
        int overflow = 0;
        const long long i = PyLong_AsLongLongAndOverflow(obj, &overflow);
        if (overflow != 0) return convert_host(obj, out);
        *out = cbn_value_int(i);
        return true;
    }
    if (obj == Py_None) return *out = cbn_value_none(), true;
    if (type == &PyUnicode_Type) return convert_str(graph, obj, out);
    if (type == &PyBool_Type) return *out = cbn_value_bool(obj == Py_True), true;
    if (type == &PyFloat_Type) return *out = cbn_value_float(PyFloat_AS_DOUBLE(obj)), true;
    const bool subclassed = PyTuple_Check(obj) || PyList_Check(obj) || PyDict_Check(obj);
    if (!subclassed && type != &PySlice_Type) return convert_host(obj, out);

    if (depth >= CBN_VALUE_MAX_DEPTH) return too_deep();
    if ((PyList_Check(obj) && type != &PyList_Type) || (PyDict_Check(obj) && type != &PyDict_Type)) {
        if (!load_classes()) return false;
    }
    if (type == &PyTuple_Type) return convert_list(graph, CBN_V_TUPLE, obj, NULL, depth, out);
    if (type == &PyList_Type || type == list_class) return convert_list(graph, CBN_V_LIST, obj, NULL, depth, out);
    if (type == &PyDict_Type || type == dict_class) return convert_dict(graph, obj, depth, out);
    if (type == &PySlice_Type) return convert_slice(graph, obj, depth, out);
    if (PyTuple_Check(obj) && is_namedtuple(type)) return convert_list(graph, CBN_V_TUPLE, obj, type, depth, out);
    return convert_host(obj, out);
}

bool cbn_py_value_from_object(PyObject *graph, PyObject *obj, cbn_value *out) {
    return convert((cbn_graph_object *)graph, obj, 0, out);
}

/* ---- the arguments of a node ---- */

bool cbn_py_values_room(cbn_graph_object *graph, uint32_t nargs, uint32_t nkw, cbn_py_values *out) {
    const uint64_t size = nargs + 2 * (uint64_t)nkw;
    out->graph = graph;
    out->nargs = nargs;
    out->nkw = nkw;
    out->filled = 0;
    out->v = out->few;
    if (size > CBN_PY_FEW) out->v = cbn_alloc_array(size, sizeof *out->v);
    if (out->v == NULL) PyErr_NoMemory();
    return out->v != NULL;
}

void cbn_py_values_done(cbn_py_values *a, bool moved) {
    if (a->v == NULL) return;
    for (uint32_t i = 0; !moved && i < a->filled; i++) cbn_value_release(a->graph->graph, a->v[i]);
    if (a->v != a->few) cbn_free(a->v);
    a->v = NULL;
    a->filled = 0;
}

bool cbn_py_values_from(cbn_graph_object *graph, PyObject *args, PyObject *kwargs, cbn_py_values *out) {
    out->v = NULL;
    if (args == Py_None) args = NULL;
    if (kwargs == Py_None) kwargs = NULL;
    if (args != NULL && !PyTuple_Check(args)) {
        PyErr_Format(PyExc_TypeError, "args: expected a tuple, got %.200s", Py_TYPE(args)->tp_name);
        return false;
    }
    if (kwargs != NULL && !PyDict_Check(kwargs)) {
        PyErr_Format(PyExc_TypeError, "kwargs: expected a dict, got %.200s", Py_TYPE(kwargs)->tp_name);
        return false;
    }
    const Py_ssize_t nargs = args ? PyTuple_GET_SIZE(args) : 0, nkw = kwargs ? PyDict_GET_SIZE(kwargs) : 0;
    if (nargs > INT32_MAX / 4 || nkw > INT32_MAX / 4) return PyErr_NoMemory(), false;
    if (!cbn_py_values_room(graph, (uint32_t)nargs, (uint32_t)nkw, out)) return false;
    bool ok = true;
    for (Py_ssize_t i = 0; ok && i < nargs; i++) {
        ok = convert(graph, PyTuple_GET_ITEM(args, i), 0, &out->v[i]);
        out->filled += ok;
    }
    Py_ssize_t at = 0;
    PyObject *key, *value;
    uint32_t pairs = 0;
    while (ok && kwargs && pairs < out->nkw && PyDict_Next(kwargs, &at, &key, &value)) {
        if (!PyUnicode_CheckExact(key)) {
            PyErr_Format(PyExc_TypeError, "kwargs: expected str keys, got %.200s", Py_TYPE(key)->tp_name);
            ok = false;
            break;
        }
        Py_INCREF(value);
        ok = convert_str(graph, key, &out->v[out->filled]);
        if (ok && out->v[out->filled].tag != CBN_V_STR) {
            cbn_value_release(graph->graph, out->v[out->filled]);
            PyErr_SetString(PyExc_ValueError, "kwargs: expected keys that UTF-8 can spell");
            ok = false;
        }
        out->filled += ok;
        if (ok) {
            ok = convert(graph, value, 0, &out->v[out->filled]);
            out->filled += ok;
        }
        pairs += ok;
        Py_DECREF(value);
    }
    out->nkw = pairs; /* fewer only if a conversion changed the dict */
    if (!ok) {
        cbn_py_values_done(out, false);
        cbn_py_graph_flush_if(graph);
    }
    return ok;
}

/* ---- value -> object ---- */

PyObject *cbn_py_immutable_dict(PyObject *dict) {
    return load_classes() ? PyObject_CallOneArg((PyObject *)dict_class, dict) : NULL;
}

static PyObject *seq_to_object(PyObject *graph, const cbn_value *v) {
    const cbn_seq *s = v->u.seq;
    const Py_ssize_t count = s->count;
    if (v->tag == CBN_V_DICT) {
        PyObject *plain = PyDict_New();
        for (Py_ssize_t i = 0; plain != NULL && i + 1 < count; i += 2) {
            PyObject *key = cbn_py_value_to_object(graph, &s->v[i]);
            PyObject *value = key ? cbn_py_value_to_object(graph, &s->v[i + 1]) : NULL;
            if (value == NULL || PyDict_SetItem(plain, key, value) < 0) Py_CLEAR(plain);
            Py_XDECREF(key);
            Py_XDECREF(value);
        }
        PyObject *dict = plain ? cbn_py_immutable_dict(plain) : NULL;
        Py_XDECREF(plain);
        return dict;
    }
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        PyObject *item = cbn_py_value_to_object(graph, &s->v[i]);
        if (item == NULL) Py_CLEAR(tuple);
        else PyTuple_SET_ITEM(tuple, i, item);
    }
    if (tuple == NULL || (v->tag == CBN_V_TUPLE && s->cls == NULL)) return tuple;
    PyObject *result = NULL;
    if (v->tag == CBN_V_SLICE) {
        result = PySlice_New(PyTuple_GET_ITEM(tuple, 0), PyTuple_GET_ITEM(tuple, 1), PyTuple_GET_ITEM(tuple, 2));
    } else if (v->tag == CBN_V_LIST) {
        if (load_classes()) result = PyObject_CallOneArg((PyObject *)list_class, tuple);
    } else { /* a namedtuple, made without its __new__ */
        PyObject *args = PyTuple_Pack(1, tuple);
        if (args != NULL) result = PyTuple_Type.tp_new((PyTypeObject *)s->cls, args, NULL);
        Py_XDECREF(args);
    }
    Py_DECREF(tuple);
    return result;
}

PyObject *cbn_py_value_to_object(PyObject *graph, const cbn_value *v) {
    cbn_graph_object *self = (cbn_graph_object *)graph;
    switch ((cbn_value_tag)v->tag) {
    case CBN_V_NONE: Py_RETURN_NONE;
    case CBN_V_BOOL: return PyBool_FromLong(v->u.b);
    case CBN_V_INT: return PyLong_FromLongLong(v->u.i);
    case CBN_V_FLOAT: return PyFloat_FromDouble(v->u.f);
    case CBN_V_STR: return cbn_py_str(self->graph, v->u.str);
    case CBN_V_NODE: return cbn_py_node_view(graph, v->u.node);
    case CBN_V_HOST: return Py_NewRef((PyObject *)v->u.host);
    case CBN_V_TUPLE:
    case CBN_V_LIST:
    case CBN_V_DICT:
    case CBN_V_SLICE: break;
    }
    cbn_value held = cbn_value_retain(self->graph, *v);
    PyObject *obj = seq_to_object(graph, &held);
    cbn_value_release(self->graph, held);
    cbn_py_graph_flush_if(self);
    return obj;
}
