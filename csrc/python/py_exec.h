/* SPDX-License-Identifier: BSD-3-Clause */
/* Program: a graph prepared for running. py_exec.c is the type and its calls, py_exec_run.c the loop, py_exec_code.c
 * prepares, py_exec_direct.c knows which of our operators are called without their Python wrapper. */
#ifndef CBN_PY_EXEC_H
#define CBN_PY_EXEC_H
#include "python/py_graph_priv.h"

#include "graph/graph_exec.h"
#include "python/py_ops.h"

typedef enum { CBN_ARG_CONST, CBN_ARG_SLOT, CBN_ARG_SEQ } cbn_py_arg_kind;

/* Where an argument comes from. */
typedef struct cbn_py_arg {
    uint8_t kind, tag; /* tag of CBN_ARG_SEQ: built anew at each call, since the callee may keep or change it */
    uint32_t n;        /* the slot, or how many items (a dict: keys and values) */
    PyObject *obj;     /* CONST: the object; SEQ: class of a named tuple, or NULL */
    struct cbn_py_arg *items;
} cbn_py_arg;

typedef struct cbn_py_step {
    uint8_t op; /* cbn_node_op */
    bool direct;
    cbn_node_id node;
    uint32_t gen;
    uint32_t slot, first_free, n_free;
    uint32_t nargs, nkw; /* for a placeholder, nargs is its number */
    cbn_py_arg *args;    /* by position, then by keyword */
    PyObject *target;    /* callable, name of the method, or tuple of the parts of a path; the output has none */
    PyObject *kwnames;   /* tuple, or NULL */
} cbn_py_step;

typedef enum { CBN_INPUT_PLAIN, CBN_INPUT_REST, CBN_INPUT_KEYWORDS } cbn_py_input_kind; /* x, *args, **kwargs */
typedef struct cbn_py_input {
    PyObject *name; /* without stars */
    cbn_py_input_kind kind;
    const cbn_py_step *step; /* its default is args[0] of the node */
} cbn_py_input;

/* Immutable once made; a run holds a reference, so that editing the graph meanwhile does no harm. */
typedef struct cbn_py_code {
    size_t refs;
    cbn_program program;
    cbn_py_step *steps;
    cbn_py_input *inputs;
    uint32_t nsteps, ninputs, nslots, max_args;
    bool direct;
} cbn_py_code;

/* NULL with an exception. The graph is locked meanwhile. direct: our operators are called without their Python wrapper,
 * which is what looks for proxies. */
cbn_py_code *cbn_py_code_new(cbn_graph_object *graph, bool direct);
void cbn_py_code_release(cbn_py_code *code); /* NULL is fine */
int cbn_py_code_traverse(const cbn_py_code *code, visitproc visit, void *arg);

/* bound: an object (owned, taken over) for each input, NULL: the default. New reference. */
PyObject *cbn_py_code_run(const cbn_py_code *code, cbn_graph_object *graph, PyObject *root, PyObject **bound);

/* Converts v. shared: sequences without nodes become constants, for callees that only read them. */
CBN_NODISCARD bool cbn_py_arg_make(const cbn_graph *g, const cbn_program *p, const cbn_value *v, bool shared,
                                   cbn_py_arg *out);
void cbn_py_arg_clear(cbn_py_arg *a);

/* Fills args, nargs and target of a call_function step with the C function behind our operator and all its arguments. 1; 0: the
 * step has to call its target; -1 with an exception. */
int cbn_py_direct(const cbn_graph *g, const cbn_program *p, cbn_node_id id, cbn_py_step *step);

int cbn_py_exec_init(PyObject *module);
#endif
