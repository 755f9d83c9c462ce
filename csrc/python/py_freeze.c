/* SPDX-License-Identifier: BSD-3-Clause */
/* Steps of freezing: how they run, and their rows as tuples. pyconvbn/freeze_report.py makes objects of them. */
#include "python/py_freeze.h"

#include "graph/passes.h"
#include "python/py_host_hold.h"
#include "python/py_numpy.h"
#include "python/py_passes.h"

/* Texts that rows share, made once. */
static struct {
    PyObject *steps[CBN_STEP_COUNT], *reasons[CBN_FREEZE_REASON_COUNT], *hints[CBN_FREEZE_REASON_COUNT], *done, *kept;
} words;

static PyTypeObject *row_class; /* freeze_report.FreezeRow; NULL: tuple */

/* A new reference to the str of a static text. */
static PyObject *word(PyObject **slot, const char *text) {
    if (*slot == NULL) *slot = PyUnicode_InternFromString(text);
    return Py_XNewRef(*slot);
}

/* freeze_row_class(cls): rows are instances of this class from now on */
static PyObject *freeze_row_class(PyObject *self, PyObject *cls) {
    (void)self;
    PyTypeObject *type = (PyTypeObject *)cls;
    if (!PyType_Check(cls) || !PyType_IsSubtype(type, &PyTuple_Type) ||
        type->tp_basicsize != PyTuple_Type.tp_basicsize || type->tp_itemsize != PyTuple_Type.tp_itemsize) {
        PyErr_SetString(PyExc_TypeError, "cls: expected a class of tuples without attributes of their own");
        return NULL;
    }
    Py_XSETREF(row_class, (PyTypeObject *)Py_NewRef(cls));
    Py_RETURN_NONE;
}

/* There may be a hundred thousand: the object is made here, without a call of its class. */
PyObject *cbn_py_freeze_row(const cbn_graph *g, const cbn_freeze_row *r) {
    enum { FIELDS = 7 };
    PyObject *row = row_class == NULL ? PyTuple_New(FIELDS) : row_class->tp_alloc(row_class, FIELDS);
    if (row == NULL) return NULL;
    const bool done = r->reason == CBN_FREEZE_OK;
    PyObject *const fields[FIELDS] = {
        word(&words.steps[r->step], cbn_freeze_step_name(r->step)),
        cbn_py_str_or_none(g, r->node),
        word(done ? &words.done : &words.kept, done ? "done" : "kept"),
        word(&words.reasons[r->reason], cbn_freeze_reason_name(r->reason)),
        cbn_py_str_or_none(g, r->blocking),
        r->hint != NULL ? PyUnicode_FromString(r->hint)
                        : word(&words.hints[r->reason], cbn_freeze_reason_hint(r->reason)),
        cbn_py_str_or_none(g, r->into),
    };
    for (int i = 0; i < FIELDS; i++) {
        PyTuple_SET_ITEM(row, i, fields[i]);
        if (fields[i] == NULL) Py_CLEAR(row);
        if (row != NULL) continue;
        while (++i < FIELDS) Py_XDECREF(fields[i]);
        return NULL;
    }
    PyObject_GC_UnTrack(row); /* texts only: never part of a cycle, nothing for the collector to look at */
    return row;
}

static PyObject *rows_list(const cbn_freeze *f) {
    PyObject *list = PyList_New(f->report.count);
    for (uint32_t i = 0; list != NULL && i < f->report.count; i++) {
        PyObject *row = cbn_py_freeze_row(f->g, &f->report.rows[i]);
        if (row == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, row);
    }
    return list;
}

PyObject *cbn_py_step_run(PyObject *graph, PyObject *root, cbn_py_step_fn step, void *arg) {
    cbn_graph *g = cbn_py_graph_get(graph, "graph");
    if (g == NULL) return NULL;
    cbn_error err = {0};
    cbn_freeze f = {.g = g, .root = root == Py_None ? NULL : root, .err = &err};
    PyObject *result = NULL;
    cbn_graph_retain(g); /* host code may drop the Python object */
    cbn_py_host_hold_begin();
    const cbn_status status = step(&f, arg);
    cbn_py_host_hold_end();
    if (status == CBN_OK) {
        PyObject *rows = rows_list(&f);
        if (rows != NULL) result = Py_BuildValue("(IN)", f.changed, rows);
        cbn_py_graph_flush(graph);
    } else {
        (void)cbn_py_graph_raise(graph, status, &err);
    }
    cbn_freeze_report_free(&f.report);
    cbn_graph_release(g);
    return result;
}

/* freeze_reasons() -> ((code, hint), ...) */
static PyObject *freeze_reasons(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    PyObject *all = PyTuple_New(CBN_FREEZE_REASON_COUNT);
    for (int i = 0; all != NULL && i < CBN_FREEZE_REASON_COUNT; i++) {
        PyObject *one = Py_BuildValue("(ss)", cbn_freeze_reason_name(i), cbn_freeze_reason_hint(i));
        if (one == NULL) Py_CLEAR(all);
        else PyTuple_SET_ITEM(all, i, one);
    }
    return all;
}

/* freeze_steps() -> names in the order in which freezing runs them */
static PyObject *freeze_steps(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    PyObject *all = PyTuple_New(CBN_STEP_COUNT);
    for (int i = 0; all != NULL && i < CBN_STEP_COUNT; i++) {
        PyObject *one = PyUnicode_FromString(cbn_freeze_step_name(i));
        if (one == NULL) Py_CLEAR(all);
        else PyTuple_SET_ITEM(all, i, one);
    }
    return all;
}

static cbn_status dead_step(cbn_freeze *f, void *arg) {
    (void)arg;
    return cbn_pass_dead(f);
}

/* freeze_dead(graph, root) -> (nodes removed that did more than read an attribute, rows) */
static PyObject *freeze_dead(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("freeze_dead", nargs, 2)) return NULL;
    return cbn_py_step_run(args[0], args[1], dead_step, NULL);
}

static bool has_array(const cbn_value *v) {
    if (v->tag == CBN_V_HOST) return PyArray_Check((PyObject *)v->u.host);
    if (!cbn_value_is_seq(v)) return false;
    for (uint32_t i = 0; i < v->u.seq->count; i++) {
        if (has_array(&v->u.seq->v[i])) return true;
    }
    return false;
}

static bool takes_array(const cbn_args *a) {
    for (uint32_t i = 0; i < a->nargs; i++) {
        if (has_array(&a->v[i])) return true;
    }
    for (uint32_t k = 0; k < a->nkw; k++) {
        if (has_array(cbn_args_kw(a, k))) return true;
    }
    return false;
}

/* freeze_literals(graph) -> the nodes that have arrays among their arguments, nested ones too */
static PyObject *freeze_literals(PyObject *self, PyObject *graph) {
    (void)self;
    cbn_graph *g = cbn_py_graph_get(graph, "graph");
    PyObject *list = g == NULL ? NULL : PyList_New(0);
    for (cbn_node_id id = list == NULL ? 0 : cbn_graph_first(g); id != 0; id = cbn_graph_next(g, id)) {
        if (!takes_array(cbn_graph_node(g, id)->args)) continue;
        PyObject *node = cbn_py_node_view(graph, id);
        const bool ok = node != NULL && PyList_Append(list, node) == 0;
        Py_XDECREF(node);
        if (!ok) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

PyMethodDef cbn_freeze_methods[] = {
    {"freeze_literals", freeze_literals, METH_O, "freeze_literals(graph) -> nodes with arrays among their arguments"},
    {"freeze_dead", (PyCFunction)(void (*)(void))freeze_dead, METH_FASTCALL,
     "freeze_dead(graph, root) -> (nodes removed, rows)"},
    {"freeze_row_class", freeze_row_class, METH_O, "freeze_row_class(cls): the class of rows"},
    {"freeze_reasons", freeze_reasons, METH_NOARGS, "freeze_reasons() -> ((code, hint), ...)"},
    {"freeze_steps", freeze_steps, METH_NOARGS, "freeze_steps() -> (step, ...)"},
    {0},
};
