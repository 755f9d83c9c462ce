/* SPDX-License-Identifier: BSD-3-Clause */
/* The array owns its block by NumPy's own means, a memory handler, so it behaves as any other array: flags.owndata is
 * true, base is None, resize works. Only the handler of the arrays made here is set, never the one of the thread. */
#include "python/py_pool.h"

#include "base/cbn_alloc.h"

#include <string.h>

static PyObject *handler_capsule;

/* NumPy calls these three when it resizes an array or makes one under this handler. */
static void *pool_malloc(void *context, size_t bytes) {
    (void)context;
    return cbn_scratch_get(bytes);
}

static void *pool_calloc(void *context, size_t count, size_t size) {
    size_t bytes;
    (void)context;
    if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
    void *p = cbn_scratch_get(bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

static void *pool_realloc(void *context, void *old, size_t bytes) {
    (void)context;
    if (old == NULL) return cbn_scratch_get(bytes);
    const size_t room = cbn_scratch_room(old);
    if (bytes <= room) return old;
    void *p = cbn_scratch_get(bytes);
    if (p == NULL) return NULL;
    memcpy(p, old, room);
    cbn_scratch_put(old);
    return p;
}

static void pool_free(void *context, void *p, size_t bytes) {
    (void)context;
    (void)bytes;
    cbn_scratch_put(p);
}

static PyDataMem_Handler handler = {"pyconvbn", 1, {NULL, pool_malloc, pool_calloc, pool_realloc, pool_free}};

int cbn_pool_init(void) {
    if (handler_capsule == NULL) handler_capsule = PyCapsule_New(&handler, "mem_handler", NULL);
    return handler_capsule ? 0 : -1;
}

/* 0: too many, or not worth it. */
static size_t pooled_bytes(int ndim, const npy_intp *shape, int typenum) {
    size_t bytes = typenum == NPY_DOUBLE ? 8 : typenum == NPY_FLOAT ? 4 : typenum == NPY_HALF ? 2 : 0;
    for (int i = 0; i < ndim; i++)
        if (shape[i] < 0 || __builtin_mul_overflow(bytes, (size_t)shape[i], &bytes)) return 0;
    return bytes >= CBN_POOL_LEAST_BYTES && bytes <= CBN_SCRATCH_KEEP_BYTES ? bytes : 0;
}

PyArrayObject *cbn_pool_array(int ndim, const npy_intp *shape, int typenum) {
    const size_t bytes = pooled_bytes(ndim, shape, typenum);
    void *block = bytes ? cbn_scratch_get(bytes) : NULL;
    if (block == NULL) return (PyArrayObject *)PyArray_SimpleNew(ndim, shape, typenum);
    PyArrayObject *a = (PyArrayObject *)PyArray_New(&PyArray_Type, ndim, shape, typenum, NULL, block, 0,
                                                    NPY_ARRAY_CARRAY, NULL);
    if (a == NULL) {
        cbn_scratch_put(block);
        return NULL;
    }
    ((PyArrayObject_fields *)a)->mem_handler = Py_NewRef(handler_capsule);
    PyArray_ENABLEFLAGS(a, NPY_ARRAY_OWNDATA);
    return a;
}
