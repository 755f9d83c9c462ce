/* SPDX-License-Identifier: BSD-3-Clause */
/* The run loop. */
#include "python/py_exec.h"

#include "base/cbn_alloc.h"

#include <string.h>

enum { FEW_SLOTS = 48, FEW_ARGS = 24 };

/* ---- values ------------------------------------------------------------------------------------------------------------ */
static PyObject *build(const cbn_py_arg *a, PyObject *const *slots);

static PyObject *build_dict(const cbn_py_arg *a, PyObject *const *slots) {
    PyObject *dict = PyDict_New();
    for (uint32_t i = 0; dict != NULL && i < a->n; i += 2) {
        PyObject *key = build(&a->items[i], slots), *value = key == NULL ? NULL : build(&a->items[i + 1], slots);
        if (value == NULL || PyDict_SetItem(dict, key, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *build_slice(const cbn_py_arg *a, PyObject *const *slots) {
    PyObject *part[3] = {NULL, NULL, NULL}, *slice = NULL;
    bool ok = true;
    for (int i = 0; ok && i < 3; i++) ok = (part[i] = build(&a->items[i], slots)) != NULL;
    if (ok) slice = PySlice_New(part[0], part[1], part[2]);
    for (int i = 0; i < 3; i++) Py_XDECREF(part[i]);
    return slice;
}

/* The argument as an object of its own. New reference. */
static PyObject *build(const cbn_py_arg *a, PyObject *const *slots) {
    if (a->kind == CBN_ARG_CONST) return Py_NewRef(a->obj);
    if (a->kind == CBN_ARG_SLOT) return Py_NewRef(slots[a->n]);
    if (a->tag == CBN_V_DICT) return build_dict(a, slots);
    if (a->tag == CBN_V_SLICE) return build_slice(a, slots);
    PyObject *seq = a->tag == CBN_V_LIST ? PyList_New(a->n) : PyTuple_New(a->n);
    for (uint32_t i = 0; seq != NULL && i < a->n; i++) {
        PyObject *item = build(&a->items[i], slots);
        if (item == NULL) Py_CLEAR(seq);
        else if (a->tag == CBN_V_LIST) PyList_SET_ITEM(seq, i, item);
        else PyTuple_SET_ITEM(seq, i, item);
    }
    if (seq == NULL || a->obj == NULL) return seq;
    PyObject *named = PyObject_CallMethod((PyObject *)&PyTuple_Type, "__new__", "OO", a->obj, seq);
    Py_DECREF(seq);
    return named;
}

/* ---- the module's members ------------------------------------------------------------------------------------------------ */
/* The stored object itself: while a trace runs, attributes of modules can be proxies. */
static PyObject *member(PyObject *owner, PyObject *name) {
    static PyObject *module_type; /* owned, for the life of the process */
    if (module_type == NULL) {
        PyObject *module = PyImport_ImportModule("pyconvbn.nn.module");
        module_type = module == NULL ? NULL : PyObject_GetAttrString(module, "Module");
        Py_XDECREF(module);
        if (module_type == NULL) return NULL;
    }
    if (PyType_Check(module_type) && PyObject_TypeCheck(owner, (PyTypeObject *)module_type)) {
        PyObject *dict = PyObject_GenericGetDict(owner, NULL);
        if (dict == NULL) return NULL;
        PyObject *found = PyDict_GetItemWithError(dict, name);
        Py_XINCREF(found);
        Py_DECREF(dict);
        if (found != NULL || PyErr_Occurred()) return found;
    }
    return PyObject_GetAttr(owner, name);
}

static PyObject *joined(PyObject *path, Py_ssize_t count) {
    PyObject *dot = PyUnicode_FromString("."), *part = PyTuple_GetSlice(path, 0, count);
    PyObject *text = dot == NULL || part == NULL ? NULL : PyUnicode_Join(dot, part);
    Py_XDECREF(dot);
    Py_XDECREF(part);
    return text;
}

static PyObject *missing(PyObject *owner, PyObject *path, Py_ssize_t at) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return NULL;
    PyErr_Clear();
    PyObject *whole = joined(path, PyTuple_GET_SIZE(path));
    PyObject *where = at ? joined(path, at) : PyUnicode_FromString("the root");
    if (whole != NULL && where != NULL) {
        PyErr_Format(PyExc_AttributeError, "target %R: %U (%.100s) has no %R", whole, where, Py_TYPE(owner)->tp_name,
                     PyTuple_GET_ITEM(path, at));
    }
    Py_XDECREF(whole);
    Py_XDECREF(where);
    return NULL;
}

/* Looked up at each run, so that what was replaced meanwhile is seen. */
static PyObject *resolve(PyObject *root, PyObject *path) {
    PyObject *owner = Py_NewRef(root);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(path); i++) {
        PyObject *found = member(owner, PyTuple_GET_ITEM(path, i));
        if (found == NULL) missing(owner, path, i);
        Py_DECREF(owner);
        if (found == NULL) return NULL;
        owner = found;
    }
    return owner;
}

/* ---- steps --------------------------------------------------------------------------------------------------------------- */
/* argv has one free place before it. */
static PyObject *call(const cbn_py_step *s, PyObject *root, PyObject **argv, PyObject *const *slots) {
    const uint32_t count = s->nargs + s->nkw;
    uint32_t built = 0;
    PyObject *result = NULL, *callee = NULL;
    bool ok = true;
    for (uint32_t i = 0; i < count; i++) {
        const cbn_py_arg *a = &s->args[i];
        if (a->kind == CBN_ARG_CONST) argv[i] = a->obj;
        else if (a->kind == CBN_ARG_SLOT) argv[i] = slots[a->n];
        else if ((argv[i] = build(a, slots)) != NULL) built++;
        else {
            for (uint32_t k = 0; built && k < i; k++) {
                if (s->args[k].kind == CBN_ARG_SEQ) Py_DECREF(argv[k]);
            }
            return NULL;
        }
    }
    if (s->op == CBN_NODE_CALL_METHOD) {
        result = PyObject_VectorcallMethod(s->target, argv, s->nargs | PY_VECTORCALL_ARGUMENTS_OFFSET, s->kwnames);
    } else {
        if (s->op == CBN_NODE_CALL_MODULE) ok = (callee = resolve(root, s->target)) != NULL;
        if (ok) {
            result = PyObject_Vectorcall(callee != NULL ? callee : s->target, argv,
                                         s->nargs | PY_VECTORCALL_ARGUMENTS_OFFSET, s->kwnames);
        }
        Py_XDECREF(callee);
    }
    for (uint32_t k = 0; built && k < count; k++) {
        if (s->args[k].kind == CBN_ARG_SEQ) {
            Py_DECREF(argv[k]);
            built--;
        }
    }
    return result;
}

/* The value of a step. New reference. */
static PyObject *value_of(const cbn_py_step *s, PyObject *root, PyObject **bound, PyObject **argv,
                          PyObject *const *slots) {
    switch ((cbn_node_op)s->op) {
    case CBN_NODE_PLACEHOLDER:
        if (*bound != NULL) {
            PyObject *given = *bound;
            *bound = NULL;
            return given;
        }
        return build(&s->args[0], slots);
    case CBN_NODE_GET_ATTR: return resolve(root, s->target);
    case CBN_NODE_OUTPUT: return s->nargs ? build(&s->args[0], slots) : Py_NewRef(Py_None);
    default: return call(s, root, argv, slots);
    }
}

/* ---- failures ---------------------------------------------------------------------------------------------------------- */
static PyObject *take_exception(void) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL) PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
}

static void put_exception(PyObject *value) {
    PyErr_Restore(Py_NewRef(Py_TYPE(value)), value, PyException_GetTraceback(value));
}

/* Which node raised it, in a note; the exception stays as it is if no note can be made. */
static void add_note(const cbn_py_step *s, cbn_graph_object *graph) {
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return; /* KeyboardInterrupt, SystemExit */
    PyObject *error = take_exception(), *done = NULL;
    if (cbn_graph_alive(graph->graph, s->node, s->gen)) {
        PyObject *node = cbn_py_node_view((PyObject *)graph, s->node);
        PyObject *module = node == NULL ? NULL : PyImport_ImportModule("pyconvbn.fx.graph_module");
        if (module != NULL) done = PyObject_CallMethod(module, "add_node_note", "OO", error, node);
        Py_XDECREF(module);
        Py_XDECREF(node);
    } else {
        done = PyObject_CallMethod(error, "add_note", "s", "while executing a node that the call has erased");
    }
    if (done == NULL) PyErr_Clear();
    Py_XDECREF(done);
    put_exception(error);
}

PyObject *cbn_py_code_run(const cbn_py_code *code, cbn_graph_object *graph, PyObject *root, PyObject **bound) {
    PyObject *few_slots[FEW_SLOTS], *few_args[FEW_ARGS + 1];
    PyObject **slots = few_slots, **argv = few_args, *result = NULL;
    if (Py_EnterRecursiveCall(" while running a graph")) return NULL;
    if (code->nslots > FEW_SLOTS) slots = cbn_alloc_array(code->nslots, sizeof *slots);
    if (code->max_args > FEW_ARGS) argv = cbn_alloc_array((size_t)code->max_args + 1, sizeof *argv);
    if (slots == NULL || argv == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    memset(slots, 0, code->nslots * sizeof *slots);
    uint32_t input = 0;
    bool ok = true;
    for (uint32_t i = 0; i < code->nsteps; i++) {
        const cbn_py_step *s = &code->steps[i];
        ok = PyErr_CheckSignals() == 0;
        PyObject *value = ok ? value_of(s, root, bound + input, argv + 1, slots) : NULL;
        input += s->op == CBN_NODE_PLACEHOLDER;
        if (value == NULL) {
            ok = false;
            add_note(s, graph);
            break;
        }
        if (s->slot == CBN_SLOT_NONE) {
            result = value;
            break;
        }
        slots[s->slot] = value;
        for (uint32_t k = 0; k < s->n_free; k++) Py_CLEAR(slots[code->program.frees[s->first_free + k]]);
    }
    /* Dropping what is left can run anything: a pending exception waits aside. */
    PyObject *error = ok ? NULL : take_exception();
    for (uint32_t k = 0; k < code->nslots; k++) Py_XDECREF(slots[k]);
    if (error != NULL) put_exception(error);
    else if (result == NULL) result = Py_NewRef(Py_None); /* a graph without an output */
done:
    if (slots != few_slots) cbn_free(slots);
    if (argv != few_args) cbn_free(argv);
    Py_LeaveRecursiveCall();
    return result;
}
