/* SPDX-License-Identifier: BSD-3-Clause */
/* Arrays in, arrays out: what every public function accepts (ndarray of any layout, DLPack exporter, torch.Tensor)
 * becomes memory a C function can use, and out= is honoured. All functions need the GIL.
 *
 * Typical use:
 *     cbn_array x = {0};
 *     cbn_output y = {0};
 *     PyObject *result = NULL;
 *     if (!cbn_array_get(obj, "input", CBN_LAYOUT_C, &x)) goto done;
 *     if (!cbn_output_begin(out, ndim, shape, x.dtype, (const cbn_array *[]){&x}, 1, &y)) goto done;
 *     ... compute from cbn_array_data(&x) into cbn_output_data(&y) ...
 *     result = cbn_output_finish(&y);
 * done:
 *     cbn_output_release(&y);
 *     cbn_array_release(&x);
 *     return result;
 */
#ifndef CBN_PY_ARRAY_H
#define CBN_PY_ARRAY_H
#include "python/py_numpy.h"

#include "base/cbn_base.h"
#include "ops/bn_fold.h"

typedef enum {
    CBN_LAYOUT_C,      /* C-contiguous */
    CBN_LAYOUT_STRIDED /* any strides (for code that takes a cbn_strided) */
} cbn_layout;

/* An input. Zero-initialise; release always, also after a failed get. array == NULL: the argument was None. */
typedef struct cbn_array {
    PyArrayObject *array;  /* owned: aligned, native byte order, of the layout asked for; may be a subclass */
    PyArrayObject *source; /* owned: the caller's memory; == array when nothing was copied */
    cbn_dtype dtype;
    const char *copied; /* NULL, or why a copy was needed: "not C-contiguous", "byte-swapped", "unaligned" */
} cbn_array;

/* Accepts float16, float32 and float64. TypeError names `name` and the dtype or type for everything else, None and
 * nested lists included. Never writes to the object. */
CBN_NODISCARD bool cbn_array_get(PyObject *obj, const char *name, cbn_layout layout, cbn_array *out);
/* The same; None (or obj == NULL) leaves out->array NULL. */
CBN_NODISCARD bool cbn_array_get_optional(PyObject *obj, const char *name, cbn_layout layout, cbn_array *out);
/* The two halves of cbn_array_get, for callers that check shapes before anything is copied: open copies nothing
 * (array == source, of any layout and byte order), settle makes the copy if `layout` needs one. */
CBN_NODISCARD bool cbn_array_open(PyObject *obj, const char *name, cbn_array *out);
CBN_NODISCARD bool cbn_array_open_optional(PyObject *obj, const char *name, cbn_array *out);
CBN_NODISCARD bool cbn_array_settle(cbn_array *a, cbn_layout layout);
void cbn_array_release(cbn_array *a);

CBN_INLINE void *cbn_array_data(const cbn_array *a) { return a->array ? PyArray_DATA(a->array) : NULL; }
CBN_INLINE int cbn_array_ndim(const cbn_array *a) { return PyArray_NDIM(a->array); }
CBN_INLINE npy_intp *cbn_array_shape(const cbn_array *a) { return PyArray_DIMS(a->array); }

/* TypeError naming both arguments and dtypes unless equal; an absent b passes. */
CBN_NODISCARD bool cbn_array_same_dtype(const cbn_array *a, const char *a_name, const cbn_array *b,
                                        const char *b_name);
/* A description for ops/ (data NULL when absent). ValueError naming `name` beyond CBN_MAX_DIMS axes. */
CBN_NODISCARD bool cbn_array_strided(const cbn_array *a, const char *name, cbn_strided *out);

/* ---- running statistics and other arrays that are written in place ---- */
/* As cbn_array_get with CBN_LAYOUT_STRIDED, but the memory must be the caller's own: ValueError naming `name` if it is
 * read-only. A layout that needs a copy (byte-swapped, unaligned) is copied; cbn_array_write_back puts it back. */
CBN_NODISCARD bool cbn_array_get_inout(PyObject *obj, const char *name, cbn_array *out);
CBN_NODISCARD bool cbn_array_write_back(const cbn_array *a);

/* ---- results ---- */
/* Zero-initialise; release always. */
typedef struct cbn_output {
    PyObject *result;      /* owned: what the caller gets: its own out, or a new plain ndarray */
    PyArrayObject *target; /* owned: C-contiguous memory to compute into; == result where that serves */
} cbn_output;

/* out == NULL or None: a new C-contiguous ndarray. Else `out` must be a writeable ndarray of exactly this shape and
 * dtype (TypeError / ValueError naming out, expected, got); any strides. When it is not C-contiguous and aligned, or
 * may overlap one of the inputs, target is a temporary that cbn_output_finish copies. */
CBN_NODISCARD bool cbn_output_begin(PyObject *out, int ndim, const npy_intp *shape, cbn_dtype dtype,
                                    const cbn_array *const *inputs, int ninputs, cbn_output *o);
CBN_INLINE void *cbn_output_data(const cbn_output *o) { return PyArray_DATA(o->target); }
/* Copies the temporary if there is one and hands the result over (a new reference), or NULL with an exception. */
PyObject *cbn_output_finish(cbn_output *o);
void cbn_output_release(cbn_output *o);

/* A new C-contiguous plain ndarray, large ones in recycled memory (py_pool.h); MemoryError / ValueError for impossible
 * sizes. */
PyArrayObject *cbn_array_new(int ndim, const npy_intp *shape, cbn_dtype dtype);
int cbn_dtype_typenum(cbn_dtype t); /* NPY_HALF ... */
const char *cbn_dtype_name(cbn_dtype t);
#endif
