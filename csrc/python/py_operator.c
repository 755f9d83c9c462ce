/* SPDX-License-Identifier: BSD-3-Clause */
/* Operator: a function of the package that knows its row of the op table and lets a tracer see its calls. */
#include "python/py_ops.h"

#include <stddef.h>
#include <structmember.h>

typedef struct py_operator {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function; /* what is called */
    PyObject *dict;     /* __name__, __doc__, __wrapped__ ... and the user's attributes */
    PyObject *weakrefs;
    PyObject *name; /* of the row */
    cbn_opcode code;
} py_operator;

static PyTypeObject *operator_type, *overload_type; /* owned, for the life of the process */
static PyTypeObject *proxy_type;                    /* owned; NULL: nobody traces */
static PyObject *proxy_handler;                     /* owned */

bool cbn_py_operator_check(PyObject *obj) { return operator_type != NULL && PyObject_TypeCheck(obj, operator_type); }
PyObject *cbn_py_operator_function(PyObject *op) { return ((py_operator *)op)->function; }
cbn_opcode cbn_py_operator_code(PyObject *op) { return ((py_operator *)op)->code; }

/* ---- calling ----------------------------------------------------------------------------------------------------- */
#define NEVER_PROXY (Py_TPFLAGS_LONG_SUBCLASS | Py_TPFLAGS_UNICODE_SUBCLASS | Py_TPFLAGS_DICT_SUBCLASS)

CBN_INLINE bool is_proxy(PyObject *obj) {
    PyTypeObject *type = Py_TYPE(obj);
    if (type == &PyArray_Type || obj == Py_None || (type->tp_flags & NEVER_PROXY) != 0) return false;
    return type == proxy_type || PyType_IsSubtype(type, proxy_type);
}

/* Is one of the values, or an item of a list or tuple among them, a proxy? */
static bool has_proxy(PyObject *const *values, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *obj = values[i];
        if (PyTuple_Check(obj) || PyList_Check(obj)) {
            for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(obj); k++) {
                if (is_proxy(PySequence_Fast_GET_ITEM(obj, k))) return true;
            }
        } else if (is_proxy(obj)) {
            return true;
        }
    }
    return false;
}

bool cbn_py_has_proxy(PyObject *const *values, Py_ssize_t count) {
    return proxy_type != NULL && has_proxy(values, count);
}

static PyObject *call_handler(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames) {
    PyObject *result = NULL, *kwargs = PyDict_New(), *tuple = PyTuple_New(nargs);
    if (kwargs == NULL || tuple == NULL) goto done;
    for (Py_ssize_t i = 0; i < nargs; i++) PyTuple_SET_ITEM(tuple, i, Py_NewRef(args[i]));
    for (Py_ssize_t k = 0; kwnames != NULL && k < PyTuple_GET_SIZE(kwnames); k++) {
        if (PyDict_SetItem(kwargs, PyTuple_GET_ITEM(kwnames, k), args[nargs + k]) < 0) goto done;
    }
    PyObject *handler = Py_NewRef(proxy_handler); /* it may replace itself */
    result = PyObject_CallFunctionObjArgs(handler, self, tuple, kwargs, NULL);
    Py_DECREF(handler);
done:
    Py_XDECREF(tuple);
    Py_XDECREF(kwargs);
    return result;
}

static PyObject *operator_vectorcall(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    if (proxy_type != NULL) {
        const Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
        const Py_ssize_t total = nargs + (kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames));
        if (has_proxy(args, total)) return call_handler(self, args, nargs, kwnames);
    }
    return PyObject_Vectorcall(((py_operator *)self)->function, args, nargsf, kwnames);
}

/* ---- making ------------------------------------------------------------------------------------------------------ */
static PyObject *operator_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *words[] = {"function", "name", NULL};
    PyObject *function, *name;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OU:Operator", words, &function, &name)) return NULL;
    if (!PyCallable_Check(function)) {
        PyErr_Format(PyExc_TypeError, "function: expected a callable, got %.200s", Py_TYPE(function)->tp_name);
        return NULL;
    }
    py_operator *self = (py_operator *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->vectorcall = operator_vectorcall;
    self->function = Py_NewRef(function);
    self->name = Py_NewRef(name);
    self->dict = PyDict_New();
    if (self->dict == NULL) goto fail;
    static const char *const copied[] = {"__module__", "__name__", "__qualname__", "__doc__", "__annotations__"};
    for (size_t i = 0; i < sizeof copied / sizeof copied[0]; i++) {
        PyObject *value = PyObject_GetAttrString(function, copied[i]);
        if (value == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) goto fail;
            PyErr_Clear();
            continue;
        }
        const int status = PyDict_SetItemString(self->dict, copied[i], value);
        Py_DECREF(value);
        if (status < 0) goto fail;
    }
    if (PyDict_SetItemString(self->dict, "__wrapped__", function) < 0) goto fail;
    if (cbn_py_ops_register((PyObject *)self, name, &self->code) < 0) goto fail;
    return (PyObject *)self;
fail:
    Py_DECREF(self);
    return NULL;
}

static int operator_traverse(PyObject *obj, visitproc visit, void *arg) {
    py_operator *self = (py_operator *)obj;
    Py_VISIT(Py_TYPE(obj));
    Py_VISIT(self->function);
    Py_VISIT(self->dict);
    return 0;
}

/* The table keeps every operator, so this runs only for one whose construction failed. */
static void operator_dealloc(PyObject *obj) {
    py_operator *self = (py_operator *)obj;
    PyTypeObject *type = Py_TYPE(obj);
    PyObject_GC_UnTrack(obj);
    if (self->weakrefs != NULL) PyObject_ClearWeakRefs(obj);
    Py_XDECREF(self->function);
    Py_XDECREF(self->dict);
    Py_XDECREF(self->name);
    type->tp_free(obj);
    Py_DECREF(type);
}

/* ---- being looked at --------------------------------------------------------------------------------------------- */
static PyObject *operator_repr(PyObject *obj) {
    return PyUnicode_FromFormat("<Operator %U>", ((py_operator *)obj)->name);
}

/* As PyTorch shows its overloads. */
static PyObject *overload_repr(PyObject *obj) {
    PyObject *name = ((py_operator *)obj)->name;
    const Py_ssize_t n = PyUnicode_GET_LENGTH(name);
    const Py_ssize_t dot = PyUnicode_FindChar(name, '.', 0, n, -1);
    if (dot < 0) return operator_repr(obj);
    PyObject *op = PyUnicode_Substring(name, 0, dot), *overload = PyUnicode_Substring(name, dot + 1, n);
    PyObject *text = op == NULL || overload == NULL
                         ? NULL
                         : PyUnicode_FromFormat("<OpOverload(op='%U', overload='%U')>", op, overload);
    Py_XDECREF(op);
    Py_XDECREF(overload);
    return text;
}

static PyObject *overload_str(PyObject *obj) { return Py_NewRef(((py_operator *)obj)->name); }

/* pickle and copy find it again by its qualified name. */
static PyObject *operator_reduce(PyObject *obj, PyObject *unused) {
    (void)unused;
    return PyObject_GetAttrString(obj, "__qualname__");
}

static PyObject *operator_get(PyObject *obj, PyObject *instance, PyObject *type) {
    (void)type;
    return instance == NULL || instance == Py_None ? Py_NewRef(obj) : PyMethod_New(obj, instance);
}

static PyObject *overload_get(PyObject *obj, PyObject *instance, PyObject *type) {
    (void)instance;
    (void)type;
    return Py_NewRef(obj);
}

static PyObject *operator_get_schema(PyObject *obj, void *unused) {
    (void)unused;
    return PyUnicode_FromString(cbn_op_table_row(cbn_py_op_table(), ((py_operator *)obj)->code)->schema);
}

static PyMemberDef operator_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(py_operator, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(py_operator, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(py_operator, weakrefs), READONLY, NULL},
    {"op_name", T_OBJECT_EX, offsetof(py_operator, name), READONLY, "name of the row, such as functional.conv2d"},
    {"opcode", T_USHORT, offsetof(py_operator, code), READONLY, "number of the row"},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef operator_getset[] = {
    {"schema", operator_get_schema, NULL, "arguments and results in the notation of PyTorch's operators", NULL},
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef operator_methods[] = {
    {"__reduce__", operator_reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot operator_slots[] = {
    {Py_tp_doc, "Operator(function, name)\n--\n\nA callable that is the row `name` of the op table; calls `function`."},
    {Py_tp_new, operator_new},
    {Py_tp_dealloc, operator_dealloc},
    {Py_tp_traverse, operator_traverse},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_repr, operator_repr},
    {Py_tp_descr_get, operator_get},
    {Py_tp_members, operator_members},
    {Py_tp_getset, operator_getset},
    {Py_tp_methods, operator_methods},
    {0, NULL},
};
#define OPERATOR_FLAGS (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL)
static PyType_Spec operator_spec = {"pyconvbn._core.Operator", sizeof(py_operator), 0,
                                    OPERATOR_FLAGS | Py_TPFLAGS_BASETYPE, operator_slots};

static PyType_Slot overload_slots[] = {
    {Py_tp_dealloc, operator_dealloc},
    {Py_tp_traverse, operator_traverse},
    {Py_tp_doc, "OpOverload(function, name)\n--\n\nAn Operator of `pyconvbn.ops`, shown as PyTorch shows its own."},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_repr, overload_repr},
    {Py_tp_str, overload_str},
    {Py_tp_descr_get, overload_get},
    {Py_tp_members, operator_members},
    {0, NULL},
};
static PyType_Spec overload_spec = {"pyconvbn._core.OpOverload", sizeof(py_operator), 0, OPERATOR_FLAGS,
                                    overload_slots};

/* ---- tracing ----------------------------------------------------------------------------------------------------- */
static PyObject *set_proxy_handler(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("set_proxy_handler", nargs, 2)) return NULL;
    if (!PyType_Check(args[0])) {
        PyErr_Format(PyExc_TypeError, "type: expected a class, got %.200s", Py_TYPE(args[0])->tp_name);
        return NULL;
    }
    if (!PyCallable_Check(args[1])) {
        PyErr_Format(PyExc_TypeError, "handler: expected a callable, got %.200s", Py_TYPE(args[1])->tp_name);
        return NULL;
    }
    PyTypeObject *old_type = proxy_type;
    PyObject *old_handler = proxy_handler;
    proxy_handler = Py_NewRef(args[1]);
    proxy_type = (PyTypeObject *)Py_NewRef(args[0]);
    Py_XDECREF((PyObject *)old_type);
    Py_XDECREF(old_handler);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"set_proxy_handler", (PyCFunction)(void (*)(void))set_proxy_handler, METH_FASTCALL,
     "A call of an operator with an instance of `type` goes to handler(operator, args, kwargs)."},
    {NULL, NULL, 0, NULL},
};

int cbn_py_operator_init(PyObject *module) {
    if (operator_type == NULL) {
        operator_type = (PyTypeObject *)PyType_FromSpec(&operator_spec);
        if (operator_type == NULL) return -1;
        overload_type = (PyTypeObject *)PyType_FromSpecWithBases(&overload_spec, (PyObject *)operator_type);
        if (overload_type == NULL) return -1;
    }
    if (PyModule_AddType(module, operator_type) < 0 || PyModule_AddType(module, overload_type) < 0) return -1;
    return PyModule_AddFunctions(module, methods);
}
