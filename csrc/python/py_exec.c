/* SPDX-License-Identifier: BSD-3-Clause */
/* Program(graph): program(root, *args, **kwargs) runs the graph on the members of root. */
#include "python/py_exec.h"

#include "base/cbn_alloc.h"

#include <stddef.h>
#include <structmember.h>

typedef struct program_object {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *graph; /* a Graph */
    cbn_py_code *code; /* NULL until the first call */
} program_object;

/* ---- arguments to placeholders --------------------------------------------------------------------------------------- */
/* "GraphModule.forward()" in messages. */
static PyObject *caller_name(PyObject *root) {
    PyObject *name = PyObject_GetAttrString(root, "class_name");
    if (name == NULL || !PyUnicode_Check(name)) {
        PyErr_Clear();
        Py_XDECREF(name);
        return PyUnicode_FromFormat("%.100s.forward()", Py_TYPE(root)->tp_name);
    }
    PyObject *text = PyUnicode_FromFormat("%U.forward()", name);
    Py_DECREF(name);
    return text;
}

static bool refuse(PyObject *root, const char *format, PyObject *name) {
    PyObject *who = caller_name(root);
    if (who != NULL) PyErr_Format(PyExc_TypeError, format, who, name);
    Py_XDECREF(who);
    return false;
}

/* Where a name stands among the keywords; -1: nowhere. */
static Py_ssize_t keyword(PyObject *kwnames, PyObject *name) {
    const Py_ssize_t n = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    for (Py_ssize_t k = 0; k < n; k++) {
        PyObject *word = PyTuple_GET_ITEM(kwnames, k);
        if (word == name || PyUnicode_Compare(word, name) == 0) return k;
    }
    return -1;
}

/* The keywords not taken yet, as a dict. */
static PyObject *rest_of_keywords(PyObject *const *values, PyObject *kwnames, bool *taken) {
    PyObject *dict = PyDict_New();
    const Py_ssize_t n = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    for (Py_ssize_t k = 0; dict != NULL && k < n; k++) {
        if (taken[k]) continue;
        taken[k] = true;
        if (PyDict_SetItem(dict, PyTuple_GET_ITEM(kwnames, k), values[k]) < 0) Py_CLEAR(dict);
    }
    return dict;
}

static PyObject *rest_of_args(PyObject *const *args, Py_ssize_t count) {
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) PyTuple_SET_ITEM(tuple, i, Py_NewRef(args[i]));
    return tuple;
}

/* As a Python call binds them. bound is all NULL at first; the caller drops what is in it on failure. taken: one flag a
 * keyword, false. */
static bool bind(const cbn_py_code *code, PyObject *root, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
                 bool *taken, PyObject **bound) {
    const Py_ssize_t nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    Py_ssize_t next = 0;
    for (uint32_t i = 0; i < code->ninputs; i++) {
        const cbn_py_input *in = &code->inputs[i];
        if (in->kind == CBN_INPUT_KEYWORDS) {
            if ((bound[i] = rest_of_keywords(args + nargs, kwnames, taken)) == NULL) return false;
        } else if (in->kind == CBN_INPUT_REST) {
            if ((bound[i] = rest_of_args(args + next, nargs - next)) == NULL) return false;
            next = nargs;
        } else {
            const Py_ssize_t k = keyword(kwnames, in->name);
            if (next < nargs) {
                if (k >= 0 && !taken[k]) return refuse(root, "%U got multiple values for argument %R", in->name);
                bound[i] = Py_NewRef(args[next++]);
            } else if (k >= 0 && !taken[k]) {
                taken[k] = true;
                bound[i] = Py_NewRef(args[nargs + k]);
            } else if (in->step->nargs == 0) {
                return refuse(root, "%U missing a required argument: %R", in->name);
            }
        }
    }
    for (Py_ssize_t k = 0; k < nkw; k++) {
        if (!taken[k]) return refuse(root, "%U got an unexpected keyword argument %R", PyTuple_GET_ITEM(kwnames, k));
    }
    if (next == nargs) return true;
    PyObject *who = caller_name(root);
    if (who != NULL)
        PyErr_Format(PyExc_TypeError, "%U takes %u arguments, got %zd", who, (unsigned)code->ninputs, nargs + nkw);
    Py_XDECREF(who);
    return false;
}

/* ---- calling ------------------------------------------------------------------------------------------------------------ */
/* The code of the graph as it is now. New reference. */
static cbn_py_code *current_code(program_object *self) {
    cbn_graph *g = ((cbn_graph_object *)self->graph)->graph;
    if (self->code == NULL || self->code->program.version != cbn_graph_version(g)) {
        cbn_py_code *fresh = cbn_py_code_new((cbn_graph_object *)self->graph, true);
        if (fresh == NULL) return NULL;
        cbn_py_code *old = self->code;
        self->code = fresh;
        fresh->refs++;
        cbn_py_code_release(old); /* can run anything */
        return fresh;
    }
    self->code->refs++;
    return self->code;
}

static PyObject *program_vectorcall(PyObject *obj, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    enum { FEW = 16 };
    program_object *self = (program_object *)obj;
    const Py_ssize_t nargs = PyVectorcall_NARGS(nargsf), nkw = kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames);
    if (nargs < 1) {
        PyErr_SetString(PyExc_TypeError, "expected the module that the graph runs on as the first argument");
        return NULL;
    }
    if (self->graph == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the program was cleared");
        return NULL;
    }
    /* A tracer that calls the module: operators must see its proxies. */
    const bool traced = cbn_py_has_proxy(args + 1, nargs - 1 + nkw);
    cbn_py_code *code = traced ? cbn_py_code_new((cbn_graph_object *)self->graph, false) : current_code(self);
    if (code == NULL) return NULL;
    PyObject *graph = Py_NewRef(self->graph), *result = NULL; /* the call may drop everything else that holds it */
    PyObject *few_bound[FEW], **bound = few_bound;
    bool few_taken[FEW], *taken = few_taken;
    if (code->ninputs > FEW) bound = cbn_alloc_array(code->ninputs, sizeof *bound);
    if (nkw > FEW) taken = cbn_alloc_array((size_t)nkw, sizeof *taken);
    if (bound == NULL || taken == NULL) {
        PyErr_NoMemory();
    } else {
        for (uint32_t i = 0; i < code->ninputs; i++) bound[i] = NULL;
        for (Py_ssize_t k = 0; k < nkw; k++) taken[k] = false;
        if (bind(code, args[0], args + 1, nargs - 1, kwnames, taken, bound))
            result = cbn_py_code_run(code, (cbn_graph_object *)graph, args[0], bound);
        for (uint32_t i = 0; i < code->ninputs; i++) Py_XDECREF(bound[i]);
    }
    if (bound != few_bound) cbn_free(bound);
    if (taken != few_taken) cbn_free(taken);
    cbn_py_code_release(code);
    Py_DECREF(graph);
    return result;
}

static PyObject *program_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *words[] = {"graph", NULL};
    PyObject *graph;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O:Program", words, &graph)) return NULL;
    if (cbn_py_graph_get(graph, "graph") == NULL) return NULL;
    program_object *self = (program_object *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->vectorcall = program_vectorcall;
    self->graph = Py_NewRef(graph);
    return (PyObject *)self;
}

static int program_traverse(PyObject *obj, visitproc visit, void *arg) {
    program_object *self = (program_object *)obj;
    Py_VISIT(Py_TYPE(obj));
    Py_VISIT(self->graph);
    return self->code == NULL ? 0 : cbn_py_code_traverse(self->code, visit, arg);
}

static int program_clear(PyObject *obj) {
    program_object *self = (program_object *)obj;
    cbn_py_code *code = self->code;
    self->code = NULL;
    cbn_py_code_release(code);
    Py_CLEAR(self->graph);
    return 0;
}

static void program_dealloc(PyObject *obj) {
    PyTypeObject *type = Py_TYPE(obj);
    PyObject_GC_UnTrack(obj);
    program_clear(obj);
    type->tp_free(obj);
    Py_DECREF(type);
}

/* ---- looking at it ------------------------------------------------------------------------------------------------------- */
static PyObject *program_steps(PyObject *obj, PyObject *unused) {
    (void)unused;
    program_object *self = (program_object *)obj;
    cbn_py_code *code = self->graph == NULL ? NULL : current_code(self);
    PyObject *list = code == NULL ? NULL : PyList_New(0);
    const cbn_graph *g = list == NULL ? NULL : ((cbn_graph_object *)self->graph)->graph;
    for (uint32_t i = 0; list != NULL && i < code->nsteps; i++) {
        const cbn_py_step *s = &code->steps[i];
        PyObject *direct = s->direct ? PyObject_GetAttrString(s->target, "__name__") : Py_NewRef(Py_None);
        PyObject *row = direct == NULL ? NULL
                                       : Py_BuildValue("ssNI", cbn_graph_str(g, cbn_graph_node(g, s->node)->name, NULL),
                                                       cbn_node_op_name((cbn_node_op)s->op), direct, s->n_free);
        if (row == NULL || PyList_Append(list, row) < 0) Py_CLEAR(list);
        Py_XDECREF(row);
    }
    cbn_py_code_release(code);
    return list;
}

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(program_object, vectorcall), READONLY, NULL},
    {"graph", T_OBJECT, offsetof(program_object, graph), READONLY, "the graph that is run"},
    {NULL, 0, 0, 0, NULL},
};
static PyMethodDef methods[] = {
    {"steps", program_steps, METH_NOARGS,
     "(name, op, function of _core that is called directly or None, values freed afterwards) of each step."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot slots[] = {
    {Py_tp_doc, "Program(graph)\n--\n\nprogram(root, *args, **kwargs) runs the graph as it is then, on the members of root."},
    {Py_tp_new, program_new},
    {Py_tp_dealloc, program_dealloc},
    {Py_tp_traverse, program_traverse},
    {Py_tp_clear, program_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, members},
    {Py_tp_methods, methods},
    {0, NULL},
};
static PyType_Spec spec = {"pyconvbn._core.Program", sizeof(program_object), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, slots};

int cbn_py_exec_init(PyObject *module) {
    static PyTypeObject *type; /* owned, for the life of the process */
    if (type == NULL) type = (PyTypeObject *)PyType_FromSpec(&spec);
    return type == NULL ? -1 : PyModule_AddType(module, type);
}
