/* SPDX-License-Identifier: BSD-3-Clause */
#include "python/py_array.h"

#include "python/py_error.h"
#include "python/py_pool.h"

static const int typenums[] = {[CBN_F16] = NPY_HALF, [CBN_F32] = NPY_FLOAT, [CBN_F64] = NPY_DOUBLE};
static const char *const dtype_names[] = {[CBN_F16] = "float16", [CBN_F32] = "float32", [CBN_F64] = "float64"};

int cbn_dtype_typenum(cbn_dtype t) { return typenums[t]; }
const char *cbn_dtype_name(cbn_dtype t) { return dtype_names[t]; }

/* Rewords a failed import of a foreign array so that it names the argument. Keeps MemoryError, KeyboardInterrupt. */
static void reword_import_failure(PyObject *obj, const char *name) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_RuntimeError) &&
        !PyErr_ExceptionMatches(PyExc_BufferError) && !PyErr_ExceptionMatches(PyExc_ValueError) &&
        !PyErr_ExceptionMatches(PyExc_AttributeError)) {
        return;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_Format(PyExc_TypeError, "%s: this %.200s cannot be read as a CPU array: %S", name,
                 Py_TYPE(obj)->tp_name, value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
}

/* -1 error, 0 no, 1 yes. torch is never imported here: without it no tensor can exist. */
static int is_torch_tensor(PyObject *obj) {
    PyObject *key = PyUnicode_FromString("torch");
    if (key == NULL) return -1;
    PyObject *torch = PyImport_GetModule(key);
    Py_DECREF(key);
    if (torch == NULL) return PyErr_Occurred() ? -1 : 0;
    PyObject *tensor = PyObject_GetAttrString(torch, "Tensor");
    Py_DECREF(torch);
    if (tensor == NULL) { /* a half-imported torch */
        PyErr_Clear();
        return 0;
    }
    const int result = PyObject_IsInstance(obj, tensor);
    Py_DECREF(tensor);
    return result;
}

static bool torch_on_cpu(PyObject *tensor, const char *name) {
    PyObject *device = PyObject_GetAttrString(tensor, "device");
    PyObject *type = device ? PyObject_GetAttrString(device, "type") : NULL;
    const bool known = type != NULL && PyUnicode_Check(type);
    const bool cpu = known && PyUnicode_CompareWithASCIIString(type, "cpu") == 0;
    if (known && !cpu) PyErr_Format(PyExc_TypeError, "%s: expected a tensor on the CPU, got one on %S", name, device);
    Py_XDECREF(type);
    Py_XDECREF(device);
    return cpu;
}

static PyObject *import_torch(PyObject *tensor, const char *name) {
    if (!torch_on_cpu(tensor, name)) return NULL;
    PyObject *dtype = PyObject_GetAttrString(tensor, "dtype");
    PyObject *detached = dtype ? PyObject_CallMethod(tensor, "detach", NULL) : NULL;
    /* Lazily negated views (imag of a conjugate) must be made real before NumPy may see them. */
    PyObject *plain = detached ? PyObject_CallMethod(detached, "resolve_neg", NULL) : NULL;
    PyObject *array = plain ? PyObject_CallMethod(plain, "numpy", NULL) : NULL;
    if (array == NULL && dtype != NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Format(PyExc_TypeError, "%s: expected a dense tensor of float16, float32 or float64, got dtype %S",
                     name, dtype);
    }
    Py_XDECREF(plain);
    Py_XDECREF(detached);
    Py_XDECREF(dtype);
    return array;
}

/* -1 error, 0 no, 1 yes: other than hasattr in C, an attribute that raises something else is not taken for none. */
static int has_attribute(PyObject *obj, const char *name) {
    PyObject *found = PyObject_GetAttrString(obj, name);
    if (found == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    Py_XDECREF(found);
    return found != NULL;
}

static PyObject *import_dlpack(PyObject *obj) {
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (numpy == NULL) return NULL;
    PyObject *array = PyObject_CallMethod(numpy, "from_dlpack", "O", obj);
    Py_DECREF(numpy);
    return array;
}

/* The memory of obj as an ndarray: a new reference, nothing copied. */
static PyArrayObject *import_array_like(PyObject *obj, const char *name) {
    if (PyArray_Check(obj)) return (PyArrayObject *)Py_NewRef(obj);
    PyObject *array = NULL;
    bool foreign = true;
    if (!PyList_Check(obj) && !PyTuple_Check(obj) && obj != Py_None) {
        const int torch = is_torch_tensor(obj);
        const int dlpack = torch != 0 ? torch : has_attribute(obj, "__dlpack__"); /* an ErasedArray raises here */
        const int interface = dlpack != 0 ? dlpack : has_attribute(obj, "__array_interface__");
        if (interface < 0) return NULL;
        if (torch) {
            array = import_torch(obj, name);
        } else if (dlpack) {
            array = import_dlpack(obj);
        } else if (interface) {
            array = PyArray_FromAny(obj, NULL, 0, 0, 0, NULL);
        } else {
            foreign = false;
        }
    } else {
        foreign = false;
    }
    if (!foreign) {
        PyErr_Format(PyExc_TypeError, "%s: expected an ndarray, a CPU torch.Tensor or a DLPack exporter, got %.200s",
                     name, Py_TYPE(obj)->tp_name);
        return NULL;
    }
    if (array == NULL) {
        reword_import_failure(obj, name);
        return NULL;
    }
    if (!PyArray_Check(array)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an array, got %.200s", name, Py_TYPE(array)->tp_name);
        Py_DECREF(array);
        return NULL;
    }
    return (PyArrayObject *)array;
}

static bool float_dtype(PyArrayObject *a, const char *name, cbn_dtype *out) {
    switch (PyArray_TYPE(a)) {
        case NPY_HALF: *out = CBN_F16; return true;
        case NPY_FLOAT: *out = CBN_F32; return true;
        case NPY_DOUBLE: *out = CBN_F64; return true;
        default:
            PyErr_Format(PyExc_TypeError, "%s: expected dtype float16, float32 or float64, got %S", name,
                         (PyObject *)PyArray_DESCR(a));
            return false;
    }
}

static const char *why_copy(PyArrayObject *a, cbn_layout layout) {
    if (!PyArray_ISNOTSWAPPED(a)) return "byte-swapped";
    if (!PyArray_ISALIGNED(a)) return "unaligned";
    if (layout == CBN_LAYOUT_C && !PyArray_IS_C_CONTIGUOUS(a)) return "not C-contiguous";
    return NULL;
}

bool cbn_array_open(PyObject *obj, const char *name, cbn_array *out) {
    out->source = import_array_like(obj, name);
    if (out->source == NULL || !float_dtype(out->source, name, &out->dtype)) return false;
    out->array = (PyArrayObject *)Py_NewRef((PyObject *)out->source);
    return true;
}

bool cbn_array_open_optional(PyObject *obj, const char *name, cbn_array *out) {
    return obj == NULL || obj == Py_None || cbn_array_open(obj, name, out);
}

bool cbn_array_settle(cbn_array *a, cbn_layout layout) {
    if (a->array == NULL) return true;
    a->copied = why_copy(a->source, layout);
    if (a->copied == NULL) return true;
    PyArray_Descr *native = PyArray_DescrFromType(typenums[a->dtype]);
    if (native == NULL) return false;
    /* K order for strided users, so that a fold keeps the memory layout of its weights. */
    const int flags = NPY_ARRAY_ALIGNED | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_ENSUREARRAY |
                      (layout == CBN_LAYOUT_C ? NPY_ARRAY_C_CONTIGUOUS : 0);
    PyObject *copy = PyArray_FromArray(a->source, native, flags);
    if (copy == NULL) return false;
    Py_SETREF(a->array, (PyArrayObject *)copy);
    return true;
}

bool cbn_array_get(PyObject *obj, const char *name, cbn_layout layout, cbn_array *out) {
    return cbn_array_open(obj, name, out) && cbn_array_settle(out, layout);
}

bool cbn_array_get_optional(PyObject *obj, const char *name, cbn_layout layout, cbn_array *out) {
    return obj == NULL || obj == Py_None || cbn_array_get(obj, name, layout, out);
}

void cbn_array_release(cbn_array *a) {
    Py_CLEAR(a->array);
    Py_CLEAR(a->source);
}

bool cbn_array_same_dtype(const cbn_array *a, const char *a_name, const cbn_array *b, const char *b_name) {
    if (b->array == NULL || a->dtype == b->dtype) return true;
    PyErr_Format(PyExc_TypeError, "%s and %s: expected one dtype, got %s and %s", a_name, b_name,
                 dtype_names[a->dtype], dtype_names[b->dtype]);
    return false;
}

bool cbn_array_strided(const cbn_array *a, const char *name, cbn_strided *out) {
    *out = (cbn_strided){0};
    if (a->array == NULL) return true;
    const int ndim = PyArray_NDIM(a->array);
    if (ndim > CBN_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s: expected at most %d axes, got %d", name, CBN_MAX_DIMS, ndim);
        return false;
    }
    out->data = PyArray_DATA(a->array);
    out->dtype = a->dtype;
    out->ndim = ndim;
    for (int i = 0; i < ndim; i++) {
        out->shape[i] = PyArray_DIM(a->array, i);
        out->stride_bytes[i] = PyArray_STRIDE(a->array, i);
    }
    return true;
}

bool cbn_array_get_inout(PyObject *obj, const char *name, cbn_array *out) {
    if (!cbn_array_get(obj, name, CBN_LAYOUT_STRIDED, out)) return false;
    if (PyArray_ISWRITEABLE(out->source)) return true;
    PyErr_Format(PyExc_ValueError, "%s: expected a writeable array, got a read-only one", name);
    return false;
}

bool cbn_array_write_back(const cbn_array *a) {
    if (a->array == a->source) return true;
    return PyArray_CopyInto(a->source, a->array) == 0;
}

/* ---- results ---- */

typedef struct extent { const char *begin, *end; } extent;

static extent memory_extent(PyArrayObject *a) {
    const char *lo = PyArray_BYTES(a), *hi = lo;
    if (PyArray_SIZE(a) == 0) return (extent){lo, lo};
    for (int i = 0; i < PyArray_NDIM(a); i++) {
        const npy_intp reach = (PyArray_DIM(a, i) - 1) * PyArray_STRIDE(a, i);
        if (reach < 0) lo += reach;
        else hi += reach;
    }
    return (extent){lo, hi + PyArray_ITEMSIZE(a)};
}

/* By bounds: an interleaved pair counts as overlapping, which costs a temporary but is never wrong. */
static bool may_overlap(PyArrayObject *a, PyArrayObject *b) {
    const extent x = memory_extent(a), y = memory_extent(b);
    return x.begin < y.end && y.begin < x.end && x.begin < x.end && y.begin < y.end;
}

static PyObject *shape_tuple(int ndim, const npy_intp *shape) { return PyArray_IntTupleFromIntp(ndim, shape); }

static bool check_out(PyObject *out, int ndim, const npy_intp *shape, cbn_dtype dtype) {
    if (!PyArray_Check(out)) {
        PyErr_Format(PyExc_TypeError, "out: expected an ndarray or None, got %.200s", Py_TYPE(out)->tp_name);
        return false;
    }
    PyArrayObject *a = (PyArrayObject *)out;
    if (PyArray_TYPE(a) != typenums[dtype] || !PyArray_ISNOTSWAPPED(a)) {
        PyErr_Format(PyExc_TypeError, "out: expected dtype %s, got %S", dtype_names[dtype],
                     (PyObject *)PyArray_DESCR(a));
        return false;
    }
    if (PyArray_NDIM(a) != ndim || !PyArray_CompareLists(PyArray_DIMS(a), shape, ndim)) {
        PyObject *want = shape_tuple(ndim, shape);
        PyObject *got = want ? shape_tuple(PyArray_NDIM(a), PyArray_DIMS(a)) : NULL;
        if (got != NULL) PyErr_Format(PyExc_ValueError, "out: expected shape %R, got %R", want, got);
        Py_XDECREF(want);
        Py_XDECREF(got);
        return false;
    }
    if (!PyArray_ISWRITEABLE(a)) {
        PyErr_SetString(PyExc_ValueError, "out: expected a writeable array, got a read-only one");
        return false;
    }
    for (int i = 0; i < ndim; i++) {
        if (PyArray_STRIDE(a, i) == 0 && shape[i] > 1) {
            PyErr_Format(PyExc_ValueError, "out: expected elements of their own, got stride 0 along axis %d", i);
            return false;
        }
    }
    return true;
}

PyArrayObject *cbn_array_new(int ndim, const npy_intp *shape, cbn_dtype dtype) {
    return cbn_pool_array(ndim, shape, typenums[dtype]);
}

bool cbn_output_begin(PyObject *out, int ndim, const npy_intp *shape, cbn_dtype dtype,
                      const cbn_array *const *inputs, int ninputs, cbn_output *o) {
    bool direct = true;
    if (out == NULL || out == Py_None) {
        o->result = (PyObject *)cbn_array_new(ndim, shape, dtype);
        if (o->result == NULL) return false;
    } else {
        if (!check_out(out, ndim, shape, dtype)) return false;
        PyArrayObject *a = (PyArrayObject *)out;
        direct = PyArray_IS_C_CONTIGUOUS(a) && PyArray_ISALIGNED(a);
        for (int i = 0; direct && i < ninputs; i++) {
            /* A copied input is out of reach already. */
            const cbn_array *in = inputs[i];
            if (in->array != NULL && in->copied == NULL && may_overlap(in->array, a)) direct = false;
        }
        o->result = Py_NewRef(out);
    }
    o->target = direct ? (PyArrayObject *)Py_NewRef(o->result) : cbn_array_new(ndim, shape, dtype);
    return o->target != NULL;
}

PyObject *cbn_output_finish(cbn_output *o) {
    if ((PyObject *)o->target != o->result && PyArray_CopyInto((PyArrayObject *)o->result, o->target) < 0) {
        return NULL;
    }
    PyObject *result = o->result;
    o->result = NULL;
    return result;
}

void cbn_output_release(cbn_output *o) {
    Py_CLEAR(o->result);
    Py_CLEAR(o->target);
}
