/* SPDX-License-Identifier: BSD-3-Clause */
/* Constant folding for Python: nodes are run as the run loop runs them, their values kept by node id. */
#include "python/py_freeze.h"

#include "base/cbn_alloc.h"
#include "graph/passes.h"
#include "python/py_graph_priv.h"
#include "python/py_passes.h"

#include <string.h>

enum { FEW_ARGS = 24 };

typedef struct evaluation {
    PyObject *graph, *root;
    PyObject *wanted; /* constraint_fn(node); NULL: everything is wanted */
    PyObject *add;    /* add(array) -> name of the new constant */
    PyObject *copy;   /* copy(array, exact) -> a private copy, with axes of stride 0, or exactly the same strides */
    PyObject *parameter, *memmap; /* classes whose arrays compute as plain ones do */
    cbn_graph *g;
    PyObject **values; /* by node id */
    uint32_t count;
} evaluation;

/* ---- running a node ---------------------------------------------------------------------------------------------- */
static PyObject *argument(const evaluation *s, const cbn_value *v);

static PyObject *dict_argument(const evaluation *s, const cbn_seq *seq) {
    PyObject *dict = PyDict_New();
    for (uint32_t i = 0; dict != NULL && i < seq->count; i += 2) {
        PyObject *key = argument(s, &seq->v[i]), *value = key == NULL ? NULL : argument(s, &seq->v[i + 1]);
        if (value == NULL || PyDict_SetItem(dict, key, value) < 0) Py_CLEAR(dict);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *sequence_argument(const evaluation *s, cbn_value_tag tag, const cbn_seq *seq) {
    PyObject *items = tag == CBN_V_LIST ? PyList_New(seq->count) : PyTuple_New(seq->count);
    for (uint32_t i = 0; items != NULL && i < seq->count; i++) {
        PyObject *item = argument(s, &seq->v[i]);
        if (item == NULL) Py_CLEAR(items);
        else if (tag == CBN_V_LIST) PyList_SET_ITEM(items, i, item);
        else PyTuple_SET_ITEM(items, i, item);
    }
    if (items == NULL || (tag != CBN_V_SLICE && seq->cls == NULL)) return items;
    PyObject *result = NULL;
    if (tag == CBN_V_SLICE) {
        result = PySlice_New(PyTuple_GET_ITEM(items, 0), PyTuple_GET_ITEM(items, 1), PyTuple_GET_ITEM(items, 2));
    } else { /* a namedtuple, made without its __new__ */
        result = PyObject_CallMethod((PyObject *)&PyTuple_Type, "__new__", "OO", (PyObject *)seq->cls, items);
    }
    Py_DECREF(items);
    return result;
}

/* The graph is locked, so pointers into it stay valid whatever Python does. New reference. */
static PyObject *argument(const evaluation *s, const cbn_value *v) {
    if (v->tag == CBN_V_NODE) {
        PyObject *value = s->values[v->u.node];
        if (value != NULL) return Py_NewRef(value);
        PyErr_SetString(PyExc_RuntimeError, "constant folding: a value was dropped too early");
        return NULL;
    }
    if (!cbn_value_is_seq(v)) return cbn_py_value_to_object(s->graph, v);
    if (v->tag == CBN_V_DICT) return dict_argument(s, v->u.seq);
    return sequence_argument(s, (cbn_value_tag)v->tag, v->u.seq);
}

static PyObject *keyword_names(const evaluation *s, const cbn_args *args) {
    PyObject *names = PyTuple_New(args->nkw);
    for (uint32_t k = 0; names != NULL && k < args->nkw; k++) {
        PyObject *name = cbn_py_str_or_none(s->g, cbn_args_key(args, k));
        if (name == NULL) Py_CLEAR(names);
        else PyTuple_SET_ITEM(names, k, name);
    }
    return names;
}

/* argv has nargs + nkw values. */
static PyObject *call(const evaluation *s, const cbn_node *node, PyObject *const *argv, PyObject *names) {
    const size_t nargs = node->args->nargs;
    if (node->op == CBN_NODE_CALL_METHOD) {
        PyObject *name = nargs == 0 ? NULL : cbn_py_value_to_object(s->graph, &node->target);
        if (nargs == 0) PyErr_SetString(PyExc_RuntimeError, "a method call needs the object as its first argument");
        PyObject *result = name == NULL ? NULL : PyObject_VectorcallMethod(name, argv, nargs, names);
        Py_XDECREF(name);
        return result;
    }
    cbn_host callee = node->target.u.host;
    if (node->op == CBN_NODE_CALL_MODULE) {
        cbn_error err;
        const char *target = cbn_graph_str(s->g, node->target.u.str, NULL);
        if (cbn_py_host_resolve(s->root, target, &callee, &err) != CBN_OK) return NULL;
        if (callee == NULL) return PyErr_Format(PyExc_AttributeError, "target %s", target);
    }
    return PyObject_Vectorcall(callee, argv, nargs, names);
}

static PyObject *run_call(const evaluation *s, const cbn_node *node) {
    const cbn_args *args = node->args;
    const uint32_t count = args->nargs + args->nkw;
    PyObject *few[FEW_ARGS], **argv = few, *result = NULL;
    if (count > FEW_ARGS && (argv = cbn_alloc_array(count, sizeof *argv)) == NULL) return PyErr_NoMemory();
    PyObject *names = args->nkw == 0 ? NULL : keyword_names(s, args);
    bool ok = args->nkw == 0 || names != NULL;
    uint32_t made = 0;
    for (; ok && made < count; made += ok) {
        const cbn_value *v = made < args->nargs ? &args->v[made] : cbn_args_kw(args, made - args->nargs);
        ok = (argv[made] = argument(s, v)) != NULL;
    }
    if (ok) result = call(s, node, argv, names);
    for (uint32_t i = 0; i < made; i++) Py_DECREF(argv[i]);
    Py_XDECREF(names);
    if (argv != few) cbn_free(argv);
    return result;
}

static cbn_constant_kind kind_of(const evaluation *s, PyObject *value, bool result) {
    if (PyArray_Check(value)) {
        if (!result) return CBN_CONSTANT_ARRAY; /* read from where it is */
        const PyObject *type = (PyObject *)Py_TYPE(value);
        const bool plain = PyArray_CheckExact(value) || type == s->parameter || type == s->memmap;
        return plain && !PyDataType_REFCHK(PyArray_DESCR((PyArrayObject *)value)) ? CBN_CONSTANT_ARRAY
                                                                                  : CBN_CONSTANT_OTHER;
    }
    return PyArray_IsScalar(value, Floating) ? CBN_CONSTANT_SCALAR : CBN_CONSTANT_OTHER;
}

static cbn_status evaluate(void *arg, cbn_node_id id, cbn_constant_kind *kind) {
    evaluation *s = arg;
    const cbn_node *node = cbn_graph_node(s->g, id);
    *kind = CBN_CONSTANT_OTHER;
    if (node->op == CBN_NODE_GET_ATTR) {
        cbn_host found = NULL;
        cbn_error err;
        if (node->target.tag != CBN_V_STR) return CBN_OK;
        const char *target = cbn_graph_str(s->g, node->target.u.str, NULL);
        if (cbn_py_host_resolve(s->root, target, &found, &err) != CBN_OK) return CBN_HOST_ERROR;
        s->values[id] = Py_XNewRef((PyObject *)found);
    } else if ((s->values[id] = run_call(s, node)) == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) {
            return CBN_HOST_ERROR;
        }
        PyErr_Clear();
        *kind = CBN_CONSTANT_RAISED;
        return CBN_OK;
    }
    if (s->values[id] != NULL) *kind = kind_of(s, s->values[id], node->op != CBN_NODE_GET_ATTR);
    return CBN_OK;
}

static void drop(void *arg, cbn_node_id id) {
    evaluation *s = arg;
    Py_CLEAR(s->values[id]);
}

/* ---- what is asked of Python ------------------------------------------------------------------------------------- */
static cbn_status wanted(void *arg, cbn_node_id id, bool *out) {
    evaluation *s = arg;
    PyObject *node = cbn_py_node_view(s->graph, id);
    PyObject *answer = node == NULL ? NULL : PyObject_CallOneArg(s->wanted, node);
    const int truth = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(node);
    Py_XDECREF(answer);
    *out = truth > 0;
    return truth < 0 ? CBN_HOST_ERROR : CBN_OK;
}

static cbn_status training(void *arg, cbn_host module, bool *out) {
    (void)arg;
    PyObject *flag = PyObject_GetAttrString(module, "training");
    const int truth = flag == NULL ? -1 : PyObject_IsTrue(flag);
    Py_XDECREF(flag);
    *out = truth != 0;
    if (truth >= 0) return CBN_OK;
    if (!PyErr_ExceptionMatches(PyExc_Exception)) return CBN_HOST_ERROR;
    PyErr_Clear(); /* a module whose mode nobody can tell */
    return CBN_OK;
}

/* ---- new constants ----------------------------------------------------------------------------------------------- */
static bool has_zero_stride(PyArrayObject *a) {
    for (int i = 0; i < PyArray_NDIM(a); i++) {
        if (PyArray_STRIDE(a, i) == 0 && PyArray_DIM(a, i) > 1) return true;
    }
    return false;
}

/* A read-only array with the value that nobody else can write: the value itself if nobody else has it, else a copy with
 * the order of its strides, or exactly the same. Takes the reference. */
static PyArrayObject *private_array(const evaluation *s, PyObject *value, bool exact) {
    if (!PyArray_Check(value)) { /* a NumPy scalar */
        PyArrayObject *array = (PyArrayObject *)PyArray_FromAny(value, NULL, 0, 0, 0, NULL);
        Py_DECREF(value);
        return array;
    }
    PyArrayObject *a = (PyArrayObject *)value, *copy;
    if (PyArray_CheckExact(value) && Py_REFCNT(value) == 1 && PyArray_CHKFLAGS(a, NPY_ARRAY_OWNDATA)) return a;
    if (has_zero_stride(a) || exact) {
        copy = (PyArrayObject *)PyObject_CallFunctionObjArgs(s->copy, value, exact ? Py_True : Py_False, NULL);
    } else {
        copy = (PyArrayObject *)PyArray_NewLikeArray(a, NPY_KEEPORDER, NULL, 0);
        if (copy != NULL && PyArray_CopyInto(copy, a) < 0) Py_CLEAR(copy);
    }
    Py_DECREF(value);
    return copy;
}

static void describe(PyArrayObject *a, cbn_tensor_meta *meta) {
    if (PyArray_NDIM(a) > CBN_MAX_DIMS || PyArray_ITEMSIZE(a) > UINT8_MAX) return;
    meta->ndim = (int8_t)PyArray_NDIM(a);
    meta->kind = (int8_t)PyArray_DESCR(a)->kind;
    meta->itemsize = (uint8_t)PyArray_ITEMSIZE(a);
    for (int i = 0; i < PyArray_NDIM(a); i++) meta->shape[i] = PyArray_DIM(a, i);
}

static cbn_status constant(void *arg, cbn_node_id id, bool exact, cbn_str *target, cbn_tensor_meta *meta) {
    evaluation *s = arg;
    PyObject *value = s->values[id];
    s->values[id] = NULL;
    assert(value != NULL);
    cbn_graph_lock(s->g);
    PyArrayObject *array = private_array(s, value, exact);
    PyObject *name = NULL;
    if (array != NULL) {
        PyArray_CLEARFLAGS(array, NPY_ARRAY_WRITEABLE);
        describe(array, meta);
        name = PyObject_CallOneArg(s->add, (PyObject *)array);
        Py_DECREF(array);
    }
    cbn_graph_unlock(s->g);
    Py_ssize_t len;
    const char *text = name == NULL ? NULL : PyUnicode_AsUTF8AndSize(name, &len);
    cbn_error err;
    cbn_status status = text == NULL ? CBN_HOST_ERROR : cbn_graph_intern(s->g, text, (size_t)len, target, &err);
    if (status == CBN_NO_MEMORY) {
        PyErr_NoMemory();
        status = CBN_HOST_ERROR;
    }
    Py_XDECREF(name);
    return status;
}

/* ---- entry point ------------------------------------------------------------------------------------------------- */
static cbn_status step(cbn_freeze *f, void *arg) {
    evaluation *s = arg;
    s->g = f->g;
    s->count = cbn_graph_slots(f->g);
    s->values = cbn_calloc(s->count * sizeof *s->values);
    if (s->values == NULL) return cbn_fail_memory(f->err, "constant folding", s->count * sizeof *s->values);
    const cbn_constant_host host = {.arg = s,
                                    .evaluate = evaluate,
                                    .drop = drop,
                                    .wanted = s->wanted == NULL ? NULL : wanted,
                                    .training = training,
                                    .constant = constant};
    const cbn_status status = cbn_pass_constant_fold(f, &host);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback); /* dropping arrays may run anything */
    for (uint32_t i = 0; i < s->count; i++) Py_XDECREF(s->values[i]);
    cbn_free(s->values);
    PyErr_Restore(type, value, traceback);
    return status;
}

/* pass_constant_fold(graph, root, wanted, add, copy, classes) -> (nodes folded, rows); wanted: callable or None;
 * classes: nn.Parameter and numpy.memmap */
static PyObject *pass_constant_fold(PyObject *self, PyObject *const *args, Py_ssize_t nargs) {
    (void)self;
    if (!cbn_py_nargs("pass_constant_fold", nargs, 6)) return NULL;
    evaluation s = {.graph = args[0],
                 .root = args[1],
                 .wanted = args[2] == Py_None ? NULL : args[2],
                 .add = args[3],
                 .copy = args[4]};
    if (!PyArg_ParseTuple(args[5], "OO:classes", &s.parameter, &s.memmap)) return NULL;
    return cbn_py_step_run(args[0], args[1], step, &s);
}

PyMethodDef cbn_pass_constant_fold_methods[] = {
    {"pass_constant_fold", (PyCFunction)(void (*)(void))pass_constant_fold, METH_FASTCALL,
     "pass_constant_fold(graph, root, wanted, add, copy, classes) -> (nodes folded, rows)"},
    {0},
};
