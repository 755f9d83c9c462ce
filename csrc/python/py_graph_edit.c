/* SPDX-License-Identifier: BSD-3-Clause */
/* Graph methods that change the node list. Python facts first (names of callables run Python code), the graph last. */
#include "python/py_graph_priv.h"
#include "python/py_host_hold.h"

#include "graph/op_table.h"
#include "graph/passes.h"

/* The text a node's name is made from: __name__ of the callable, else the name of its class. New reference. */
static PyObject *name_of_callable(PyObject *target) {
    PyObject *name = PyObject_GetAttr(target, cbn_ids.__name__);
    if (name != NULL && PyUnicode_Check(name)) return name;
    if (name == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return NULL;
        PyErr_Clear();
    }
    Py_XDECREF(name);
    const char *dotted = Py_TYPE(target)->tp_name, *last = strrchr(dotted, '.');
    return PyUnicode_FromString(last ? last + 1 : dotted);
}

static const char *utf8_of(PyObject *text, const char *argument, Py_ssize_t *len) {
    const char *s = PyUnicode_AsUTF8AndSize(text, len);
    if (s == NULL && PyErr_ExceptionMatches(PyExc_UnicodeError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: expected text that UTF-8 can spell, got %A", argument, text);
    }
    return s;
}

static PyObject *create(cbn_graph_object *self, cbn_node_op op, PyObject *target, PyObject *args, PyObject *kwargs,
                        PyObject *name, PyObject *type_expr) {
    cbn_graph *g = self->graph;
    PyObject *base = NULL, *result = NULL; /* base: the name's origin when the target is a callable */
    cbn_py_values values; /* large, like err: neither is cleared */
    values.v = NULL;
    cbn_node_spec spec = {.op = op, .name = CBN_STR_NONE};
    const char *text = NULL;
    Py_ssize_t len = 0;
    cbn_error err;
    cbn_status status = CBN_OK;
    cbn_node_id id;
    bool have_target = false, moved = false;

    if (name == Py_None) name = NULL;
    if (type_expr == Py_None) type_expr = NULL;
    if (name != NULL && !PyUnicode_Check(name)) {
        PyErr_Format(PyExc_TypeError, "name: expected a str, got %.200s", Py_TYPE(name)->tp_name);
        return NULL;
    }
    if (op == CBN_NODE_CALL_FUNCTION) {
        if (!PyCallable_Check(target)) {
            PyErr_Format(PyExc_TypeError, "target: expected a callable for call_function, got %.200s",
                         Py_TYPE(target)->tp_name);
            return NULL;
        }
        if (name == NULL && (base = name_of_callable(target)) == NULL) return NULL;
    } else if (!PyUnicode_Check(target)) {
        PyErr_Format(PyExc_TypeError, "target: expected a str for %s, got %.200s", cbn_node_op_name(op),
                     Py_TYPE(target)->tp_name);
        return NULL;
    }
    if (name != NULL || base != NULL) {
        text = utf8_of(name ? name : base, "name", &len);
        if (text == NULL) goto done;
    }
    if (!cbn_py_values_from(self, args, kwargs, &values)) goto done;

    if (name != NULL) status = cbn_graph_intern(g, text, (size_t)len, &spec.name, &err);
    else if (base != NULL) status = cbn_graph_name_of_target(g, text, (size_t)len, &spec.name, &err);
    if (status != CBN_OK) goto done;
    if (op == CBN_NODE_CALL_FUNCTION) {
        spec.target = cbn_value_host(Py_NewRef(target));
    } else {
        Py_ssize_t target_len;
        const char *s = utf8_of(target, "target", &target_len);
        if (s == NULL) goto done;
        spec.target = (cbn_value){.tag = CBN_V_STR};
        status = cbn_graph_intern(g, s, (size_t)target_len, &spec.target.u.str, &err);
        if (status != CBN_OK) goto done;
    }
    have_target = true;
    spec.args = values.v;
    spec.nargs = values.nargs;
    spec.kw = values.v + values.nargs;
    spec.nkw = values.nkw;
    spec.type_expr = type_expr;
    status = cbn_graph_create(g, &spec, &id, &err);
    moved = status == CBN_OK;
    if (!moved) goto done;
    const uint32_t gen = cbn_graph_node(g, id)->gen;
    result = cbn_py_node_view((PyObject *)self, id);
    if (result == NULL && cbn_graph_alive(g, id, gen)) {
        status = cbn_graph_erase(g, id, &err); /* a failed call changes nothing */
        if (status != CBN_OK) status = CBN_OK; /* the exception that is set already says enough */
    }
done:
    if (have_target && !moved) cbn_value_release(g, spec.target);
    cbn_py_values_done(&values, moved);
    Py_XDECREF(base);
    if (status != CBN_OK) cbn_py_raise(status, &err);
    cbn_py_graph_flush_if(self);
    return result;
}

/* ---- create_node and its short forms ---- */

bool cbn_py_parse_op(PyObject *obj, cbn_node_op *out) {
    for (int op = 0; op < CBN_NODE_ROOT; op++) {
        if (obj == cbn_ids.ops[op]) {
            *out = (cbn_node_op)op;
            return true;
        }
    }
    if (obj != NULL && PyUnicode_Check(obj)) {
        for (int op = 0; op < CBN_NODE_ROOT; op++) {
            if (PyUnicode_Compare(obj, cbn_ids.ops[op]) == 0) {
                *out = (cbn_node_op)op;
                return true;
            }
        }
        PyErr_Format(PyExc_ValueError,
                     "op: expected one of placeholder, get_attr, call_function, call_method, call_module, "
                     "output, got %R",
                     obj);
        return false;
    }
    PyErr_Format(PyExc_TypeError, "op: expected a str, got %.200s", obj ? Py_TYPE(obj)->tp_name : "nothing");
    return false;
}

static PyObject *create_node(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.op,     &cbn_ids.target, &cbn_ids.args,
                                       &cbn_ids.kwargs, &cbn_ids.name,   &cbn_ids.type_expr};
    PyObject *a[6];
    cbn_node_op op;
    if (!cbn_py_sort_args("create_node", names, 6, 2, 6, args, nargs, kwnames, a)) return NULL;
    if (!cbn_py_parse_op(a[0], &op)) return NULL;
    return create(self, op, a[1], a[2], a[3], a[4], a[5]);
}

static PyObject *call_function(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.the_function, &cbn_ids.args, &cbn_ids.kwargs, &cbn_ids.type_expr,
                                       &cbn_ids.name};
    PyObject *a[5];
    if (!cbn_py_sort_args("call_function", names, 5, 1, 5, args, nargs, kwnames, a)) return NULL;
    return create(self, CBN_NODE_CALL_FUNCTION, a[0], a[1], a[2], a[4], a[3]);
}

static PyObject *call_method(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.method_name, &cbn_ids.args, &cbn_ids.kwargs, &cbn_ids.type_expr};
    PyObject *a[4];
    if (!cbn_py_sort_args("call_method", names, 4, 1, 4, args, nargs, kwnames, a)) return NULL;
    return create(self, CBN_NODE_CALL_METHOD, a[0], a[1], a[2], NULL, a[3]);
}

static PyObject *call_module(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.module_name, &cbn_ids.args, &cbn_ids.kwargs, &cbn_ids.type_expr};
    PyObject *a[4];
    if (!cbn_py_sort_args("call_module", names, 4, 1, 4, args, nargs, kwnames, a)) return NULL;
    return create(self, CBN_NODE_CALL_MODULE, a[0], a[1], a[2], NULL, a[3]);
}

static PyObject *get_attr(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.qualified_name, &cbn_ids.type_expr};
    PyObject *a[2];
    if (!cbn_py_sort_args("get_attr", names, 2, 1, 2, args, nargs, kwnames, a)) return NULL;
    return create(self, CBN_NODE_GET_ATTR, a[0], NULL, NULL, NULL, a[1]);
}

static PyObject *output(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.result, &cbn_ids.type_expr};
    PyObject *a[2];
    if (!cbn_py_sort_args("output", names, 2, 1, 2, args, nargs, kwnames, a)) return NULL;
    PyObject *tuple = PyTuple_Pack(1, a[0]);
    if (tuple == NULL) return NULL;
    PyObject *node = create(self, CBN_NODE_OUTPUT, cbn_ids.output, tuple, NULL, NULL, a[1]);
    Py_DECREF(tuple);
    return node;
}

/* ---- erasing, moving the insertion point, dead code ---- */

static PyObject *erase_node(cbn_graph_object *self, PyObject *node) {
    cbn_node_id id;
    cbn_error err;
    if (!cbn_py_node_get((PyObject *)self, node, "to_erase", &id)) return NULL;
    const cbn_status status = cbn_graph_erase(self->graph, id, &err);
    if (status != CBN_OK) return cbn_py_graph_raise((PyObject *)self, status, &err);
    cbn_py_graph_flush_if(self);
    Py_RETURN_NONE;
}

/* (node or None, after): None is the root. Returns the same for what was set before. */
static PyObject *set_insert_point(cbn_graph_object *self, PyObject *const *args, Py_ssize_t nargs) {
    cbn_node_id id = 0;
    bool after, was_after;
    if (!cbn_py_nargs("_set_insert_point", nargs, 2) || !cbn_py_bool(args[1], "after", &after)) return NULL;
    const cbn_node_id was = cbn_graph_insert_anchor(self->graph, &was_after);
    PyObject *view = was == 0 ? Py_NewRef(Py_None) : cbn_py_node_view((PyObject *)self, was);
    PyObject *before = view ? PyTuple_Pack(2, view, was_after ? Py_True : Py_False) : NULL;
    Py_XDECREF(view);
    if (before == NULL) return NULL;
    if (args[0] != Py_None && !cbn_py_node_get_or_root((PyObject *)self, args[0], "n", &id)) {
        Py_DECREF(before);
        return NULL;
    }
    if (after) cbn_graph_set_insert_after(self->graph, id);
    else cbn_graph_set_insert_point(self->graph, id);
    return before;
}

static PyObject *dce(cbn_graph_object *self, PyObject *unused) {
    (void)unused;
    cbn_error err = {0};
    uint32_t removed = 0;
    PyObject *owner = cbn_py_graph_owner(self);
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_pass_dce(self->graph, owner, false, &removed, &err);
    cbn_py_host_hold_end();
    if (status != CBN_OK) cbn_py_raise(status, &err);
    Py_XDECREF(owner);
    cbn_py_graph_flush_if(self);
    return status == CBN_OK ? PyBool_FromLong(removed > 0) : NULL;
}

static PyObject *clear(cbn_graph_object *self, PyObject *unused) {
    (void)unused;
    cbn_graph_clear(self->graph);
    cbn_py_graph_flush_if(self);
    Py_RETURN_NONE;
}

#define CBN_FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS
PyMethodDef cbn_graph_edit_methods[] = {
    {"create_node", CBN_FAST(create_node),
     "create_node($self, op, target, args=None, kwargs=None, name=None, type_expr=None)\n--\n\n"
     "Adds a node at the insertion point and returns it."},
    {"call_function", CBN_FAST(call_function),
     "call_function($self, the_function, args=None, kwargs=None, type_expr=None, name=None)\n--\n\n"
     "Adds a call of a Python callable."},
    {"call_method", CBN_FAST(call_method),
     "call_method($self, method_name, args=None, kwargs=None, type_expr=None)\n--\n\n"
     "Adds a call of a method of args[0]."},
    {"call_module", CBN_FAST(call_module),
     "call_module($self, module_name, args=None, kwargs=None, type_expr=None)\n--\n\n"
     "Adds a call of a submodule of the owning module."},
    {"get_attr", CBN_FAST(get_attr),
     "get_attr($self, qualified_name, type_expr=None)\n--\n\nAdds a node that reads an attribute of the owning "
     "module."},
    {"output", CBN_FAST(output), "output($self, result, type_expr=None)\n--\n\nAdds the node that returns `result`."},
    {"erase_node", (PyCFunction)erase_node, METH_O,
     "erase_node($self, to_erase, /)\n--\n\n"
     "Takes a node out of the graph. RuntimeError while it has users, and for nodes of other graphs."},
    {"_set_insert_point", (PyCFunction)(void (*)(void))set_insert_point, METH_FASTCALL,
     "_set_insert_point($self, node, after, /)\n--\n\n"
     "New nodes go before the node (after: right after it, each of them). Returns the arguments that lead back."},
    {"_dce", (PyCFunction)dce, METH_NOARGS, "_dce($self, /)\n--\n\nRemoves pure nodes without users; was there any?"},
    {"_clear", (PyCFunction)clear, METH_NOARGS, "_clear($self, /)\n--\n\nEmpties the graph."},
    {0},
};
