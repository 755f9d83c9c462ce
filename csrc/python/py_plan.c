/* SPDX-License-Identifier: BSD-3-Clause */
/* The Plan type: construction and the call. What it tells about itself and pickling have their own files. */
#include "python/py_plan.h"

#include "python/py_error.h"
#include "python/py_module.h"
#include "python/py_run.h"

#include <structmember.h>

/* ---- the call ---- */

static void count_copy(cbn_plan_object *self, const char *what, const cbn_array *a) {
    if (a->copied == NULL) return;
    for (int i = 0; i < CBN_PLAN_COPY_KINDS; i++) {
        cbn_copy_count *c = &self->copies[i];
        if (c->what == NULL) *c = (cbn_copy_count){what, a->copied, 0};
        if (c->what != what || c->why != a->copied) continue;
        c->times++;
        return;
    }
}

static PyObject *call(cbn_plan_object *self, PyObject *x_obj, PyObject *residual_obj, PyObject *out) {
    cbn_array x = {0}, residual = {0};
    PyObject *result = NULL;
    const cbn_dtype dtype = cbn_plan_geometry(self->plan)->dtype;
    if (cbn_array_open(x_obj, "x", &x)) {
        if (x.dtype != dtype) {
            PyErr_Format(PyExc_TypeError, "x and weight: expected one dtype, got %s and %s", cbn_dtype_name(x.dtype),
                         cbn_dtype_name(dtype));
        } else if (cbn_array_open_optional(residual_obj, "residual", &residual)) {
            result = cbn_plan_call(self->plan, "x", &x, &residual, out);
        }
    }
    if (result != NULL) {
        self->calls++;
        count_copy(self, "x", &x);
        count_copy(self, "residual", &residual);
    }
    cbn_array_release(&residual);
    cbn_array_release(&x);
    return result;
}

static PyObject *plan_vectorcall(PyObject *self, PyObject *const *args, size_t nargsf, PyObject *kwnames) {
    const Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
    const Py_ssize_t nkw = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
    PyObject *x = nargs > 0 ? args[0] : NULL, *residual = NULL, *out = NULL;
    if (nargs > 1) {
        PyErr_Format(PyExc_TypeError, "Plan call: expected 1 positional argument (x), got %zd", nargs);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < nkw; i++) {
        PyObject *name = PyTuple_GET_ITEM(kwnames, i);
        if (PyUnicode_CompareWithASCIIString(name, "out") == 0) {
            out = args[nargs + i];
        } else if (PyUnicode_CompareWithASCIIString(name, "residual") == 0) {
            residual = args[nargs + i];
        } else if (PyUnicode_CompareWithASCIIString(name, "x") == 0 && x == NULL) {
            x = args[nargs + i];
        } else {
            PyErr_Format(PyExc_TypeError, "Plan call: expected x, residual= and out=, got an argument %R%s", name,
                         PyUnicode_CompareWithASCIIString(name, "x") == 0 ? " twice" : "");
            return NULL;
        }
    }
    if (x == NULL) {
        PyErr_SetString(PyExc_TypeError, "Plan call: expected the argument x, got none");
        return NULL;
    }
    return call((cbn_plan_object *)self, x, residual, out);
}

/* ---- construction ---- */

typedef struct plan_args {
    PyObject *weight, *bias, *bn, *activation, *precision, *input_shape, *tune;
    cbn_geometry_args geometry;
} plan_args;

static bool parse_args(PyObject *args, PyObject *kwargs, plan_args *a) {
    static char *names[] = {"weight",   "bias",   "bn",         "stride",         "padding",    "padding_mode",
                            "dilation", "groups", "transposed", "output_padding", "activation", "precision",
                            "input_shape", "tune", NULL};
    cbn_geometry_args *g = &a->geometry;
    return PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$OOOOOOOOOOOO:Plan", names, &a->weight, &a->bias, &a->bn,
                                       &g->stride, &g->padding, &g->padding_mode, &g->dilation, &g->groups,
                                       &g->transposed, &g->output_padding, &a->activation, &a->precision,
                                       &a->input_shape, &a->tune);
}

static cbn_conv_plan *make_plan(const plan_args *a, const cbn_kernels *kernels) {
    cbn_array weight = {0}, bias = {0};
    cbn_bn_arrays bn = {0};
    cbn_conv_plan *plan = NULL;
    cbn_conv_geometry g;
    cbn_plan_options options = {.kernels = kernels};
    int nd;
    const bool has_bn = a->bn != NULL && a->bn != Py_None;
    if (!cbn_array_get(a->weight, "weight", CBN_LAYOUT_STRIDED, &weight)) goto done;
    if (!cbn_array_get_optional(a->bias, "bias", CBN_LAYOUT_STRIDED, &bias)) goto done;
    if (!cbn_array_same_dtype(&weight, "weight", &bias, "bias")) goto done;
    if ((nd = cbn_weight_axes(&weight, -1)) < 0) goto done;
    if (!cbn_geometry_parse(&a->geometry, nd, &weight, &bias, &g)) goto done;
    if (!cbn_activation_parse(a->activation, &options)) goto done;
    if (!cbn_precision_parse(a->precision, &options.precision)) goto done;
    if (has_bn && !cbn_bn_get_object(a->bn, &bn)) goto done;
    plan = cbn_plan_from_arrays(&g, &weight, &bias, has_bn ? &bn : NULL, &options, NULL, NULL);
done:
    cbn_bn_release(&bn);
    cbn_array_release(&bias);
    cbn_array_release(&weight);
    return plan;
}

static bool fail(cbn_status status, const cbn_error *err) {
    if (status != CBN_OK) cbn_py_raise(status, err);
    return status == CBN_OK;
}

/* Checks the shape against the plan and cuts it. */
static bool split_checked(cbn_plan_object *self, int ndim, const npy_intp *shape, cbn_io_shape *io) {
    int64_t out[CBN_MAX_SPATIAL];
    cbn_error err = {0};
    if (!cbn_io_split(cbn_plan_geometry(self->plan), "input_shape", ndim, shape, io)) return false;
    return fail(cbn_plan_output(self->plan, io->n, io->channels, io->in, out, &err), &err);
}

static bool remember(cbn_plan_object *self, const cbn_io_shape *io, const char *algorithm) {
    const int nd = cbn_plan_geometry(self->plan)->nd;
    npy_intp spatial[CBN_MAX_SPATIAL];
    for (int i = 0; i < nd; i++) spatial[i] = io->in[i];
    PyObject *key = PyArray_IntTupleFromIntp(nd, spatial), *name = PyUnicode_FromString(algorithm);
    const bool ok = key && name && PyDict_SetItem(self->choices, key, name) == 0;
    Py_XDECREF(key);
    Py_XDECREF(name);
    return ok;
}

bool cbn_plan_fix(cbn_plan_object *self, int ndim, const npy_intp *shape, const char *algorithm) {
    cbn_io_shape io;
    cbn_error err = {0};
    if (!split_checked(self, ndim, shape, &io)) return false;
    if (!fail(cbn_plan_force(self->plan, io.in, algorithm, &err), &err)) return false;
    return remember(self, &io, algorithm);
}

static bool tune_shape(cbn_plan_object *self, const cbn_io_shape *io) {
    cbn_error err = {0};
    cbn_status status;
    cbn_plan_report report;
    Py_BEGIN_ALLOW_THREADS
    status = cbn_plan_tune(self->plan, io->in, &err);
    if (status == CBN_OK) status = cbn_plan_explain(self->plan, 1, io->in, &report, &err);
    Py_END_ALLOW_THREADS
    return fail(status, &err) && remember(self, io, report.algorithm);
}

static bool prepare_shape(cbn_plan_object *self, PyObject *shape_obj, bool tune) {
    int ndim;
    npy_intp shape[CBN_MAX_DIMS];
    cbn_io_shape io;
    cbn_error err = {0};
    cbn_status status;
    if (!cbn_shape_parse(shape_obj, "input_shape", &ndim, shape)) return false;
    if (!split_checked(self, ndim, shape, &io)) return false;
    PyObject *tuple = PyArray_IntTupleFromIntp(ndim, shape);
    if (tuple == NULL) return false;
    Py_SETREF(self->input_shape, tuple);
    if (tune) return tune_shape(self, &io);
    Py_BEGIN_ALLOW_THREADS
    status = cbn_plan_prepare(self->plan, io.in, &err);
    Py_END_ALLOW_THREADS
    return fail(status, &err);
}

bool cbn_plan_prepare_shape(cbn_plan_object *self, PyObject *input_shape) {
    return input_shape == Py_None || prepare_shape(self, input_shape, false);
}

PyObject *cbn_plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs, const cbn_kernels *kernels) {
    plan_args a = {0};
    bool tune = false;
    if (!parse_args(args, kwargs, &a)) return NULL;
    if (a.tune != NULL && !cbn_py_bool(a.tune, "tune", &tune)) return NULL;
    const bool has_shape = a.input_shape != NULL && a.input_shape != Py_None;
    if (tune && !has_shape) {
        PyErr_SetString(PyExc_ValueError, "input_shape: expected a shape with tune=True, got None");
        return NULL;
    }
    cbn_plan_object *self = (cbn_plan_object *)type->tp_alloc(type, 0);
    if (self == NULL) return NULL;
    self->vectorcall = plan_vectorcall;
    self->input_shape = Py_NewRef(Py_None);
    self->choices = PyDict_New();
    if (self->choices != NULL) self->plan = make_plan(&a, kernels);
    if (self->plan == NULL || (has_shape && !prepare_shape(self, a.input_shape, tune))) Py_CLEAR(self);
    return (PyObject *)self;
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    return cbn_plan_new(type, args, kwargs, NULL);
}

static PyObject *from_modules(PyObject *cls, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"conv", "bn", "activation", "precision", "input_shape", "tune", NULL};
    PyObject *conv, *bn = Py_None, *rest[4] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$OOOO:from_modules", names, &conv, &bn, &rest[0], &rest[1],
                                     &rest[2], &rest[3])) {
        return NULL;
    }
    PyObject *plan = NULL, *arguments = NULL, *none = NULL;
    PyObject *module = PyImport_ImportModule("pyconvbn.plan");
    if (module == NULL) return NULL;
    arguments = PyObject_CallMethod(module, "_plan_arguments", "OO", conv, bn);
    none = PyTuple_New(0);
    bool ok = arguments != NULL && none != NULL;
    for (int i = 0; ok && i < 4; i++) {
        if (rest[i] != NULL) ok = PyDict_SetItemString(arguments, names[2 + i], rest[i]) == 0;
    }
    if (ok) plan = PyObject_Call(cls, none, arguments);
    Py_XDECREF(none);
    Py_XDECREF(arguments);
    Py_DECREF(module);
    return plan;
}

/* ---- life ---- */

static int plan_traverse(PyObject *op, visitproc visit, void *arg) {
    cbn_plan_object *self = (cbn_plan_object *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->input_shape);
    Py_VISIT(self->choices);
    return 0;
}

static int plan_clear(PyObject *op) {
    cbn_plan_object *self = (cbn_plan_object *)op;
    Py_CLEAR(self->input_shape);
    Py_CLEAR(self->choices);
    return 0;
}

static void plan_dealloc(PyObject *op) {
    cbn_plan_object *self = (cbn_plan_object *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL) PyObject_ClearWeakRefs(op);
    (void)plan_clear(op);
    cbn_plan_destroy(self->plan);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyObject *get_dtype(PyObject *op, void *closure) {
    (void)closure;
    const cbn_dtype dtype = cbn_plan_geometry(((cbn_plan_object *)op)->plan)->dtype;
    return (PyObject *)PyArray_DescrFromType(cbn_dtype_typenum(dtype));
}

static PyObject *get_params(PyObject *op, void *closure) {
    (void)closure;
    const cbn_conv_plan *plan = ((cbn_plan_object *)op)->plan;
    return cbn_geometry_params(cbn_plan_geometry(plan), cbn_plan_get_options(plan));
}

/* Nothing can change it, so a copy is the plan itself. */
static PyObject *return_self(PyObject *self, PyObject *unused) {
    (void)unused;
    return Py_NewRef(self);
}

static PyGetSetDef getset[] = {
    {"dtype", get_dtype, NULL, "dtype of input, weight and result", NULL},
    {"params", get_params, NULL, "the geometry arguments of the constructor, as a new dict", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(cbn_plan_object, vectorcall), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(cbn_plan_object, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

#define KEYWORDS(f) ((PyCFunction)(void (*)(void))(f))

static PyMethodDef methods[] = {
    {"from_modules", KEYWORDS(from_modules), METH_CLASS | METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("from_modules($type, conv, bn=None, *, activation=None, precision='fp32', input_shape=None, "
               "tune=False)\n--\n\n"
               "Plan of a Linear, Conv or ConvTranspose module (pyconvbn.nn or torch.nn) and a BatchNorm in eval "
               "mode.\n\nRaises FoldError when bn is in training mode or has no running statistics.")},
    {"output_shape", cbn_plan_output_shape, METH_O,
     PyDoc_STR("output_shape($self, input_shape, /)\n--\n\nShape of the result for an input of this shape.")},
    {"explain", KEYWORDS(cbn_plan_explain_method), METH_FASTCALL | METH_KEYWORDS,
     PyDoc_STR("explain($self, input_shape=None)\n--\n\n"
               "What a call does for this input shape (None: the one given to the constructor): instruction set, "
               "algorithm, tile,\ncopies made so far with their reason, and why each other algorithm was not taken: why it "
               "cannot serve, or\nits estimated or measured time next to that of the chosen one.")},
    {"memory", cbn_plan_memory, METH_O,
     PyDoc_STR("memory($self, input_shape, /)\n--\n\nBytes: weights (held by the plan), workspace (of one call), "
               "input, output.")},
    {"cost", cbn_plan_cost, METH_O,
     PyDoc_STR("cost($self, input_shape, /)\n--\n\nflops (all taps), flops_real (padding not counted), bytes (input, "
               "weights and output once).")},
    {"halo", cbn_plan_halo, METH_NOARGS,
     PyDoc_STR("halo($self)\n--\n\nPer spatial axis (before, after): input elements beyond a tile, "
               "cut at a multiple of the stride, that its outputs read.")},
    {"update", KEYWORDS(cbn_plan_update), METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR("update($self, weight, bias=None, bn=None)\n--\n\n"
               "A new plan of other values with the same geometry, options and algorithm choices. weight is required: "
               "a plan\nkeeps only folded weights.")},
    {"_repr_html_", cbn_plan_repr_html, METH_NOARGS, NULL},
    {"__reduce_ex__", cbn_plan_reduce_ex, METH_O, NULL},
    {"__copy__", return_self, METH_NOARGS, NULL},
    {"__deepcopy__", return_self, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(plan_doc,
"Plan(weight, bias=None, *, bn=None, stride=1, padding=0, padding_mode='zeros', dilation=1, groups=1, "
"transposed=False, output_padding=0, activation=None, precision='fp32', input_shape=None, tune=False)\n--\n\n"
"A convolution or linear operator with BatchNorm folded in and its weights packed once.\n"
"\n"
"plan(x, *, residual=None, out=None) computes activation(bn(conv(x)) + residual). A plan never changes, may be\n"
"called from many threads at once and can be pickled. Results have the same bits for any number of threads and\n"
"any batch size.\n"
"\n"
"Args:\n"
"    weight: (oc, ic/groups, *k), transposed (ic, oc/groups, *k), linear (out, in); float16, float32 or float64.\n"
"    bias: (oc,) of the same dtype, or None.\n"
"    bn: BatchNorm module in eval mode or BatchNormParams, or None. s = weight / sqrt(running_var + eps),\n"
"        W' = W*s, b' = (b - running_mean)*s + bias, in float64, rounded once.\n"
"    stride, padding, padding_mode, dilation, groups, output_padding: as in torch.nn; padding also 'same', 'valid'.\n"
"    activation: None, 'relu', 'relu6', 'hardswish', 'silu', 'sigmoid' or ('leaky_relu', slope).\n"
"    precision: 'strict', 'fp32' or 'fast'. 'fast' may take 1x1 convolutions of many channels by one level of\n"
"        Strassen's product (1969; Winograd's variant, 1971): rms error about 2 to 2.5 times that of a sequential\n"
"        sum. With n channels and u = 2**-24 the error is at most (18*(n*n/4 + 3*n) - 6*n)*u*max|w|*max|x| (Higham,\n"
"        Accuracy and Stability of Numerical Algorithms, 2002, 23.2.2): beside the largest, not beside each output.\n"
"    input_shape: choose the algorithm and pack for this shape now instead of at the first call.\n"
"    tune: measure the candidates on input_shape and keep the fastest.\n"
"\n"
"Raises:\n"
"    TypeError: not an array, another dtype, dtypes that differ.\n"
"    ValueError: sizes that do not fit; the message names the argument. FoldError for a bn that cannot be folded.\n"
"    MemoryError: no memory for the packed weights.\n"
"\n"
"Example:\n"
"    >>> import numpy as np, pyconvbn\n"
"    >>> one = np.ones(4, np.float32)\n"
"    >>> plan = pyconvbn.Plan(np.ones((4, 3, 3, 3), np.float32), padding=1,\n"
"    ...                      bn=pyconvbn.BatchNormParams(one, None, one, one), activation='relu')\n"
"    >>> plan(np.ones((2, 3, 8, 8), np.float32)).shape\n"
"    (2, 4, 8, 8)\n"
"\n"
"Source of the fold: Jacob et al., arXiv 1712.05877, section 3.2.");

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)plan_doc},
    {Py_tp_new, plan_new},
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_traverse, plan_traverse},
    {Py_tp_clear, plan_clear},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_repr, cbn_plan_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec cbn_plan_spec = {
    .name = "pyconvbn.Plan",
    .basicsize = sizeof(cbn_plan_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
