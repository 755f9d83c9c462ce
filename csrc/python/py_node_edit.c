/* SPDX-License-Identifier: BSD-3-Clause */
/* What changes a node: names, targets, arguments, place in the list, uses. Python code (a callback, __index__) runs
 * before the graph is looked at, and the node is checked again after it. */
#include "python/py_graph_priv.h"
#include "python/py_host_hold.h"
#include "python/py_ops.h"

#include "graph/op_table.h"

static bool not_root(const cbn_node_object *self) {
    if (self->id != 0) return true;
    PyErr_SetString(PyExc_RuntimeError, "the root of a graph cannot be changed");
    return false;
}

/* The live node that may be changed, or NULL. */
static const cbn_node *editable(cbn_node_object *self) {
    const cbn_node *n = cbn_py_node_live(self);
    return n != NULL && not_root(self) ? n : NULL;
}

static int finish(cbn_node_object *self, cbn_status status, const cbn_error *err) {
    if (status != CBN_OK) cbn_py_raise(status, err);
    cbn_py_graph_flush_if(self->graph);
    return status == CBN_OK ? 0 : -1;
}

static PyObject *none_or_null(int status) {
    if (status < 0) return NULL;
    Py_RETURN_NONE;
}

static bool text_of(PyObject *value, const char *argument, const char **text, Py_ssize_t *len) {
    if (value == NULL || !PyUnicode_Check(value)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a str, got %.200s", argument,
                     value ? Py_TYPE(value)->tp_name : "nothing");
        return false;
    }
    *text = PyUnicode_AsUTF8AndSize(value, len);
    return *text != NULL;
}

/* ---- name, target, op ---- */

static int put_name(cbn_node_object *self, cbn_str name) {
    cbn_error err = {0};
    const cbn_status status = cbn_graph_set_name(self->graph->graph, self->id, name, &err);
    if (status == CBN_OK) self->name = name;
    return finish(self, status, &err);
}

int cbn_py_node_put_name(cbn_node_object *self, PyObject *value) {
    const char *text;
    Py_ssize_t len;
    cbn_error err = {0};
    cbn_str name;
    if (editable(self) == NULL || !text_of(value, "name", &text, &len)) return -1;
    const cbn_status status = cbn_graph_intern(self->graph->graph, text, (size_t)len, &name, &err);
    return status == CBN_OK ? put_name(self, name) : finish(self, status, &err);
}

static PyObject *rename_node(cbn_node_object *self, PyObject *candidate) {
    const char *text;
    Py_ssize_t len;
    cbn_error err = {0};
    cbn_str name;
    const cbn_node *n = editable(self);
    if (n == NULL || !text_of(candidate, "candidate", &text, &len)) return NULL;
    size_t own_len;
    const char *own = cbn_graph_str(self->graph->graph, n->name, &own_len);
    if (own_len == (size_t)len && memcmp(own, text, own_len) == 0) Py_RETURN_NONE;
    const cbn_status status = cbn_graph_unique_name(self->graph->graph, text, (size_t)len, &name, &err);
    return none_or_null(status == CBN_OK ? put_name(self, name) : finish(self, status, &err));
}

int cbn_py_node_put_target(cbn_node_object *self, PyObject *value) {
    const cbn_node *n = editable(self);
    cbn_graph *g = self->graph->graph;
    cbn_error err = {0};
    cbn_value target;
    if (n == NULL) return -1;
    if (n->op == CBN_NODE_CALL_FUNCTION) {
        if (value == NULL || !PyCallable_Check(value)) {
            PyErr_Format(PyExc_TypeError, "target: expected a callable for call_function, got %.200s",
                         value ? Py_TYPE(value)->tp_name : "nothing");
            return -1;
        }
        target = cbn_value_host(Py_NewRef(value));
    } else {
        const char *text;
        Py_ssize_t len;
        if (!text_of(value, "target", &text, &len)) return -1;
        target = (cbn_value){.tag = CBN_V_STR};
        const cbn_status interned = cbn_graph_intern(g, text, (size_t)len, &target.u.str, &err);
        if (interned != CBN_OK) return finish(self, interned, &err);
    }
    const cbn_status status = cbn_graph_set_target(g, self->id, target, &err);
    if (status != CBN_OK) cbn_value_release(g, target);
    return finish(self, status, &err);
}

int cbn_py_node_put_op(cbn_node_object *self, PyObject *value) {
    cbn_node_op op;
    cbn_error err = {0};
    if (editable(self) == NULL || !cbn_py_parse_op(value, &op)) return -1;
    return finish(self, cbn_graph_set_op(self->graph->graph, self->id, op, &err), &err);
}

/* ---- arguments ---- */

static int commit(cbn_node_object *self, cbn_py_values *a) {
    cbn_error err = {0};
    int result = -1;
    bool moved = false;
    if (editable(self) != NULL) {
        const cbn_status status =
            cbn_graph_set_args(self->graph->graph, self->id, a->v, a->nargs, a->v + a->nargs, a->nkw, &err);
        moved = status == CBN_OK;
        if (!moved) cbn_py_raise(status, &err);
        result = moved ? 0 : -1;
        /* The shape found for other arguments says nothing any more. */
        if (moved) (void)!cbn_graph_set_tensor(self->graph->graph, self->id, NULL, NULL);
    }
    cbn_py_values_done(a, moved);
    cbn_py_graph_flush_if(self->graph);
    return result;
}

static void keep(cbn_py_values *a, const cbn_value *from, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) a->v[a->filled++] = cbn_value_retain(a->graph->graph, from[i]);
}

/* args or kwargs as given; the other, NULL, stays. */
int cbn_py_node_put_args(cbn_node_object *self, PyObject *args, PyObject *kwargs) {
    cbn_py_values given = {0}, all = {0};
    if (args == NULL && kwargs == NULL) {
        PyErr_SetString(PyExc_TypeError, "args and kwargs of a node cannot be deleted");
        return -1;
    }
    if (args == Py_None || kwargs == Py_None) {
        PyErr_Format(PyExc_TypeError, "%s, got None", args ? "args: expected a tuple" : "kwargs: expected a dict");
        return -1;
    }
    if (editable(self) == NULL || !cbn_py_values_from(self->graph, args, kwargs, &given)) return -1;
    const cbn_node *n = editable(self);
    const cbn_args *old = n ? n->args : NULL;
    bool ok = old != NULL && (args != NULL ? cbn_py_values_room(self->graph, given.nargs, old->nkw, &all)
                                           : cbn_py_values_room(self->graph, old->nargs, given.nkw, &all));
    if (ok) {
        if (args == NULL) keep(&all, old->v, old->nargs);
        keep(&all, given.v, given.filled);
        if (args != NULL) keep(&all, old->v + old->nargs, 2 * old->nkw);
    }
    cbn_py_values_done(&given, false);
    if (ok) return commit(self, &all);
    cbn_py_graph_flush_if(self->graph);
    return -1;
}

typedef enum { REPLACE, INSERT } place;

static PyObject *put_one(cbn_node_object *self, PyObject *index, PyObject *arg, place how) {
    int64_t at;
    cbn_value v;
    cbn_py_values all = {0};
    if (editable(self) == NULL || !cbn_py_int64(index, "idx", &at)) return NULL;
    if (!cbn_py_value_from_object((PyObject *)self->graph, arg, &v)) {
        cbn_py_graph_flush_if(self->graph);
        return NULL;
    }
    const cbn_node *n = editable(self);
    const cbn_args *old = n ? n->args : NULL;
    bool ok = old != NULL;
    if (ok && how == REPLACE) {
        if (at < 0) at += old->nargs;
        ok = at >= 0 && at < old->nargs;
        if (!ok) PyErr_Format(PyExc_IndexError, "idx: expected an index of %u arguments, got %S", old->nargs, index);
    } else if (ok) {
        ok = at >= 0 && at <= old->nargs;
        if (!ok) PyErr_Format(PyExc_IndexError, "idx: expected 0 to %u, got %S", old->nargs, index);
    }
    ok = ok && cbn_py_values_room(self->graph, old->nargs + (how == INSERT), old->nkw, &all);
    if (!ok) {
        cbn_value_release(self->graph->graph, v);
        cbn_py_graph_flush_if(self->graph);
        return NULL;
    }
    const uint32_t i = (uint32_t)at, rest = i + (how == REPLACE);
    keep(&all, old->v, i);
    all.v[all.filled++] = v;
    keep(&all, old->v + rest, old->nargs - rest + 2 * old->nkw);
    return none_or_null(commit(self, &all));
}

static PyObject *update_arg(cbn_node_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.idx, &cbn_ids.arg};
    PyObject *a[2];
    if (!cbn_py_sort_args("update_arg", names, 2, 2, 2, args, nargs, kwnames, a)) return NULL;
    return put_one(self, a[0], a[1], REPLACE);
}

static PyObject *insert_arg(cbn_node_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.idx, &cbn_ids.arg};
    PyObject *a[2];
    if (!cbn_py_sort_args("insert_arg", names, 2, 2, 2, args, nargs, kwnames, a)) return NULL;
    return put_one(self, a[0], a[1], INSERT);
}

static PyObject *update_kwarg(cbn_node_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.key, &cbn_ids.arg};
    PyObject *a[2];
    if (!cbn_py_sort_args("update_kwarg", names, 2, 2, 2, args, nargs, kwnames, a)) return NULL;
    PyObject *old = cbn_py_node_kwargs(self), *kwargs = old ? PyDict_New() : NULL;
    int status = kwargs ? PyDict_Update(kwargs, old) : -1;
    if (status == 0) status = PyDict_SetItem(kwargs, a[0], a[1]);
    if (status == 0) status = cbn_py_node_put_args(self, NULL, kwargs);
    Py_XDECREF(old);
    Py_XDECREF(kwargs);
    return none_or_null(status);
}

/* ---- uses ---- */

static PyObject *replace_input_with(cbn_node_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.old_input, &cbn_ids.new_input};
    PyObject *a[2];
    cbn_node_id old_id, new_id;
    cbn_error err = {0};
    if (!cbn_py_sort_args("replace_input_with", names, 2, 2, 2, args, nargs, kwnames, a)) return NULL;
    if (editable(self) == NULL) return NULL;
    if (!cbn_py_node_get((PyObject *)self->graph, a[0], "old_input", &old_id)) return NULL;
    if (!cbn_py_node_get((PyObject *)self->graph, a[1], "new_input", &new_id)) return NULL;
    return none_or_null(
        finish(self, cbn_graph_replace_input(self->graph->graph, self->id, old_id, new_id, &err), &err));
}

static bool marked(cbn_node_id user, void *arg) {
    const cbn_graph_object *graph = ((void **)arg)[0];
    return cbn_graph_node(graph->graph, user)->mark == *(const uint32_t *)((void **)arg)[1];
}

/* The users for which the callback says yes (all without one), in order. */
static PyObject *chosen_users(cbn_node_object *self, PyObject *callback) {
    PyObject *users = cbn_py_users_of(self);
    PyObject *all = users ? PySequence_List(users) : NULL;
    Py_XDECREF(users);
    if (all == NULL || callback == NULL || callback == Py_None) return all;
    PyObject *chosen = PyList_New(0);
    for (Py_ssize_t i = 0; chosen != NULL && i < PyList_GET_SIZE(all); i++) {
        PyObject *user = PyList_GET_ITEM(all, i), *answer = PyObject_CallOneArg(callback, user);
        const int yes = answer ? PyObject_IsTrue(answer) : -1;
        Py_XDECREF(answer);
        if (yes < 0 || (yes > 0 && PyList_Append(chosen, user) < 0)) Py_CLEAR(chosen);
    }
    Py_DECREF(all);
    return chosen;
}

/* Copies this node's meta into the empty one of `other`. */
static int hand_on_meta(cbn_node_object *self, PyObject *other) {
    PyObject *to = PyObject_GetAttrString(other, "meta"),
             *from = to ? PyObject_GetAttrString((PyObject *)self, "meta") : NULL;
    int status = -1;
    if (from != NULL && PyDict_GET_SIZE(to) > 0) {
        PyErr_SetString(PyExc_ValueError, "propagate_meta: expected replace_with to have no meta, it has some");
    } else if (from != NULL) {
        status = PyDict_Update(to, from);
    }
    Py_XDECREF(to);
    Py_XDECREF(from);
    return status;
}

static PyObject *replace_all_uses_with(cbn_node_object *self, PyObject *const *args, Py_ssize_t nargs,
                                       PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.replace_with, &cbn_ids.delete_user_cb, &cbn_ids.propagate_meta};
    PyObject *a[3];
    bool propagate = false;
    cbn_node_id new_id;
    cbn_error err = {0};
    PyObject *graph = (PyObject *)self->graph;
    cbn_graph *g = self->graph->graph;
    if (!cbn_py_sort_args("replace_all_uses_with", names, 3, 1, 2, args, nargs, kwnames, a)) return NULL;
    if (a[2] != NULL && !cbn_py_bool(a[2], "propagate_meta", &propagate)) return NULL;
    if (editable(self) == NULL || !cbn_py_node_get(graph, a[0], "replace_with", &new_id)) return NULL;
    PyObject *chosen = chosen_users(self, a[1]);
    if (chosen == NULL) return NULL;
    /* The callback may have changed anything. */
    if (editable(self) == NULL || !cbn_py_node_get(graph, a[0], "replace_with", &new_id)) goto fail;
    if (propagate && hand_on_meta(self, a[0]) < 0) goto fail;
    if (editable(self) == NULL || !cbn_py_node_get(graph, a[0], "replace_with", &new_id)) goto fail;
    uint32_t mark = cbn_graph_new_mark(g);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(chosen); i++) {
        const cbn_node_object *user = (cbn_node_object *)PyList_GET_ITEM(chosen, i);
        if (cbn_py_node_is_live(user)) cbn_graph_set_mark(g, user->id, mark);
    }
    void *context[2] = {self->graph, &mark};
    if (finish(self, cbn_graph_replace_uses(g, self->id, new_id, marked, context, NULL, &err), &err) < 0) goto fail;
    return chosen;
fail:
    Py_DECREF(chosen);
    return NULL;
}

/* ---- place in the list ---- */

static PyObject *move(cbn_node_object *self, PyObject *x, bool after) {
    cbn_node_id id;
    cbn_error err = {0};
    cbn_graph *g = self->graph->graph;
    const cbn_node *n = cbn_py_node_live(self);
    if (n == NULL || !cbn_py_node_get((PyObject *)self->graph, x, "x", &id)) return NULL;
    if (id == self->id) Py_RETURN_NONE;
    cbn_node_id before = self->id;
    if (after) before = n->next;
    if (before == id) Py_RETURN_NONE; /* it is there already */
    return none_or_null(finish(self, cbn_graph_move_before(g, id, before, &err), &err));
}

static PyObject *prepend(cbn_node_object *self, PyObject *x) { return move(self, x, false); }
static PyObject *append(cbn_node_object *self, PyObject *x) { return move(self, x, true); }

/* ---- questions ---- */

static PyObject *is_impure(cbn_node_object *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    static PyObject **const names[] = {&cbn_ids.impure_random};
    PyObject *a[1];
    bool impure_random = true, impure = false;
    cbn_error err = {0};
    if (!cbn_py_sort_args("is_impure", names, 1, 0, 1, args, nargs, kwnames, a)) return NULL;
    if (a[0] != NULL && !cbn_py_bool(a[0], "impure_random", &impure_random)) return NULL;
    const cbn_node *n = editable(self);
    if (n == NULL) return NULL;
    if (!impure_random) {
        const cbn_op *row = cbn_op_table_row(cbn_graph_ops(self->graph->graph), n->opcode);
        if (row != NULL && row->effect == CBN_EFFECT_RANDOM) Py_RETURN_FALSE;
    }
    PyObject *owner = cbn_py_graph_owner(self->graph);
    cbn_py_host_hold_begin();
    const cbn_status status = cbn_node_impure(self->graph->graph, self->id, owner, &impure, &err);
    cbn_py_host_hold_end();
    const int done = finish(self, status, &err);
    Py_XDECREF(owner);
    return done < 0 ? NULL : PyBool_FromLong(impure);
}

static PyObject *bound_arguments(cbn_node_object *self, PyObject *unused) {
    (void)unused;
    return editable(self) ? cbn_py_op_bind((PyObject *)self->graph, self->id) : NULL;
}

static PyObject *reduce(cbn_node_object *self, PyObject *unused) {
    (void)unused;
    PyErr_Format(PyExc_TypeError, "node '%S': a node cannot be pickled by itself, its graph can", self);
    return NULL;
}

/* What takes no time to speak of is written in Python: pyconvbn.fx.node. */
static PyObject *in_python(const char *function, cbn_node_object *self, PyObject *args, PyObject *kwargs) {
    PyObject *module = PyImport_ImportModule("pyconvbn.fx.node");
    PyObject *f = module ? PyObject_GetAttrString(module, function) : NULL;
    const Py_ssize_t n = args ? PyTuple_GET_SIZE(args) : 0;
    PyObject *all = f ? PyTuple_New(n + 1) : NULL;
    PyObject *result = NULL;
    if (all != NULL) {
        PyTuple_SET_ITEM(all, 0, Py_NewRef((PyObject *)self));
        for (Py_ssize_t i = 0; i < n; i++) PyTuple_SET_ITEM(all, i + 1, Py_NewRef(PyTuple_GET_ITEM(args, i)));
        result = PyObject_Call(f, all, kwargs);
    }
    Py_XDECREF(all);
    Py_XDECREF(f);
    Py_XDECREF(module);
    return result;
}

static PyObject *format_node(cbn_node_object *self, PyObject *args, PyObject *kwargs) {
    return in_python("_format_node", self, args, kwargs);
}

static PyObject *repr_html(cbn_node_object *self, PyObject *unused) {
    (void)unused;
    return in_python("_repr_html", self, NULL, NULL);
}

static PyObject *deepcopy(cbn_node_object *self, PyObject *memo) {
    PyObject *args = PyTuple_Pack(1, memo);
    PyObject *copy = args ? in_python("_deepcopy", self, args, NULL) : NULL;
    Py_XDECREF(args);
    return copy;
}

#define CBN_FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL | METH_KEYWORDS
PyMethodDef cbn_node_edit_methods[] = {
    {"prepend", (PyCFunction)prepend, METH_O, "prepend($self, x, /)\n--\n\nMoves node x right before this one."},
    {"append", (PyCFunction)append, METH_O, "append($self, x, /)\n--\n\nMoves node x right after this one."},
    {"update_arg", CBN_FAST(update_arg), "update_arg($self, idx, arg)\n--\n\nReplaces one positional argument."},
    {"update_kwarg", CBN_FAST(update_kwarg),
     "update_kwarg($self, key, arg)\n--\n\nReplaces or adds a keyword argument."},
    {"insert_arg", CBN_FAST(insert_arg), "insert_arg($self, idx, arg)\n--\n\nInserts a positional argument."},
    {"replace_all_uses_with", CBN_FAST(replace_all_uses_with),
     "replace_all_uses_with($self, replace_with, delete_user_cb=None, *, propagate_meta=False)\n--\n\n"
     "Makes the users of this node (those the callback wants) use another. Returns them."},
    {"replace_input_with", CBN_FAST(replace_input_with),
     "replace_input_with($self, old_input, new_input)\n--\n\nReplaces an input of this node wherever it stands."},
    {"is_impure", CBN_FAST(is_impure),
     "is_impure($self, impure_random=True)\n--\n\nMust the node be kept though nobody uses its value?"},
    {"bound_arguments", (PyCFunction)bound_arguments, METH_NOARGS,
     "bound_arguments($self, /)\n--\n\nArguments by name of the operator's schema, defaults filled in."},
    {"format_node", (PyCFunction)(void (*)(void))format_node, METH_VARARGS | METH_KEYWORDS,
     "format_node($self, placeholder_names=None, maybe_return_typename=None)\n--\n\nThe node as a line of text."},
    {"_rename", (PyCFunction)rename_node, METH_O,
     "_rename($self, candidate, /)\n--\n\nGives the node a unique name made from the candidate."},
    {"_repr_html_", (PyCFunction)repr_html, METH_NOARGS, "_repr_html_($self, /)\n--\n\nFor notebooks."},
    {"__deepcopy__", (PyCFunction)deepcopy, METH_O,
     "__deepcopy__($self, memo, /)\n--\n\nThe counterpart in a deep copy of the graph."},
    {"__reduce__", (PyCFunction)reduce, METH_NOARGS, "__reduce__($self, /)\n--\n\nTypeError: pickle the graph."},
    {0},
};
