/* SPDX-License-Identifier: BSD-3-Clause */
/* Process-wide settings and facts: threads, CPU, build, memory. */
#include "python/py_error.h"
#include "python/py_module.h"

#include "base/cbn_alloc.h"
#include "cpu/cbn_cpu.h"
#include "kernels/cbn_kernels.h"
#include "threads/cbn_parallel.h"

#ifndef CBN_CFLAGS
#define CBN_CFLAGS ""
#endif
#ifndef CBN_NUMPY_VERSION
#define CBN_NUMPY_VERSION "unknown"
#endif

/* More threads than any machine has cores: a larger wish is a mistake. */
static const int64_t max_threads = 4096;

static PyObject *set_num_threads(PyObject *module, PyObject *arg) {
    (void)module;
    int64_t n;
    if (!cbn_py_int64(arg, "n", &n)) return NULL;
    if (n < 1 || n > max_threads) {
        PyErr_Format(PyExc_ValueError, "n: expected 1 to %lld threads, got %lld", (long long)max_threads, (long long)n);
        return NULL;
    }
    cbn_threads_set((int)n);
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(cbn_threads_get(NULL));
}

static PyObject *num_threads_source(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *source = "";
    (void)cbn_threads_get(&source);
    return PyUnicode_FromString(source);
}

static bool append_name(PyObject *list, const char *name) {
    PyObject *text = PyUnicode_FromString(name);
    const bool ok = text != NULL && PyList_Append(list, text) == 0;
    Py_XDECREF(text);
    return ok;
}

static PyObject *feature_list(void) {
    static const struct { uint32_t bit; const char *name; } rows[] = {
        {CBN_CPU_AVX2, "avx2"}, {CBN_CPU_AVX512, "avx512"}, {CBN_CPU_AMX, "amx"}, {CBN_CPU_NEON, "neon"}};
    const uint32_t bits = cbn_cpu_features();
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < sizeof rows / sizeof *rows; i++) {
        if ((bits & rows[i].bit) && !append_name(list, rows[i].name)) Py_CLEAR(list);
    }
    return list;
}

static PyObject *isa_list(const cbn_kernels *const *tables) {
    PyObject *list = PyList_New(0);
    for (; list != NULL && *tables != NULL; tables++) {
        if (!append_name(list, (*tables)->isa)) Py_CLEAR(list);
    }
    return list;
}

static PyObject *cpu_info(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const cbn_cpu_caches caches = cbn_cpu_cache_sizes();
    PyObject *features = feature_list(), *compiled = isa_list(cbn_kernels_compiled());
    PyObject *available = isa_list(cbn_kernels_available()), *result = NULL;
    if (features && compiled && available) {
        result = Py_BuildValue("{ss sO sn sn sn si sO sO ss}", "name", cbn_cpu_name(), "features", features, "l1d",
                               (Py_ssize_t)caches.l1d, "l2", (Py_ssize_t)caches.l2, "l3", (Py_ssize_t)caches.l3,
                               "cores", cbn_cpu_cores(NULL), "isa_compiled", compiled, "isa_available", available,
                               "isa_active", cbn_kernels_active()->isa);
    }
    Py_XDECREF(features);
    Py_XDECREF(compiled);
    Py_XDECREF(available);
    return result;
}

static PyObject *build_info(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
#ifdef __clang__
    const char *compiler = __VERSION__;
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    return Py_BuildValue("{ss ss ss ss}", "compiler", compiler, "cflags", CBN_CFLAGS, "numpy", CBN_NUMPY_VERSION,
                         "python", PY_VERSION);
}

static PyObject *alloc_stats(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    cbn_alloc_stats s;
    cbn_alloc_get_stats(&s);
    return Py_BuildValue("{sn sn sn sn sn}", "live_bytes", (Py_ssize_t)s.live_bytes, "live_blocks",
                         (Py_ssize_t)s.live_blocks, "peak_bytes", (Py_ssize_t)s.peak_bytes, "total_allocs",
                         (Py_ssize_t)s.total_allocs, "scratch_kept_bytes", (Py_ssize_t)s.scratch_kept_bytes);
}

PyMethodDef cbn_config_methods[] = {
    {"set_num_threads", set_num_threads, METH_O, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"num_threads_source", num_threads_source, METH_NOARGS, NULL},
    {"cpu_info", cpu_info, METH_NOARGS, NULL},
    {"build_info", build_info, METH_NOARGS, NULL},
    {"alloc_stats", alloc_stats, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
