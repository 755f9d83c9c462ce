/* SPDX-License-Identifier: BSD-3-Clause */
/* pyconvbn._core and its private submodule _testing. */
#define CBN_IMPORT_ARRAY
#include "python/py_numpy.h"

#include "cpu/cbn_cpu.h"
#include "python/py_exec.h"
#include "python/py_pool.h"
#include "python/py_graph_priv.h"
#include "python/py_module.h"
#include "python/py_ops.h"
#include "python/py_passes.h"
#include "python/py_plan.h"
#include "threads/cbn_parallel.h"

#ifndef CBN_VERSION
#define CBN_VERSION "0"
#endif

typedef struct module_state {
    PyObject *plan_type;
} module_state;

static int add_submodule(PyObject *core) {
    PyObject *testing = PyModule_New("pyconvbn._core._testing");
    if (testing == NULL) return -1;
    int status = 0;
    PyMethodDef *const tables[] = {cbn_testing_methods, cbn_testing_conv_methods,
                                   cbn_testing_tap_methods, cbn_testing_vec_methods,
                                   cbn_testing_phases_methods, cbn_testing_linear_methods,
                                   cbn_testing_wino_methods};
    for (size_t i = 0; status == 0 && i < sizeof tables / sizeof *tables; i++) {
        status = PyModule_AddFunctions(testing, tables[i]);
    }
    /* Known to the import system, so that "import pyconvbn._core._testing" finds it too. */
    if (status == 0) status = PyDict_SetItemString(PyImport_GetModuleDict(), "pyconvbn._core._testing", testing);
    if (status == 0) status = PyModule_AddObjectRef(core, "_testing", testing);
    Py_DECREF(testing);
    return status;
}

static int module_exec(PyObject *module) {
    import_array1(-1);
    PyMethodDef *const tables[] = {
        cbn_conv_methods,  cbn_fold_methods,   cbn_nnops_methods,  cbn_config_methods, cbn_plan_module_methods,
        cbn_match_methods, cbn_passes_methods, cbn_freeze_methods,
        cbn_pass_plans_methods, cbn_constants_methods, cbn_lower_methods,
        cbn_pass_fold_layers_methods, cbn_pass_params_methods,
        cbn_pass_constant_fold_methods,
        cbn_pass_cse_methods,
        cbn_pass_matmul_methods, cbn_pass_layout_methods,
    };
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (PyModule_AddFunctions(module, tables[i]) < 0) return -1;
    }
    if (PyModule_AddStringConstant(module, "__version__", CBN_VERSION) < 0) return -1;

    module_state *state = PyModule_GetState(module);
    state->plan_type = PyType_FromModuleAndSpec(module, &cbn_plan_spec, NULL);
    if (state->plan_type == NULL || PyModule_AddType(module, (PyTypeObject *)state->plan_type) < 0) return -1;
    if (cbn_pool_init() < 0 || cbn_py_ops_init(module) < 0) return -1;
    if (cbn_py_graph_types(module) < 0) return -1;
    if (cbn_py_exec_init(module) < 0 || cbn_py_constants_init(module) < 0) return -1;
    if (add_submodule(module) < 0) return -1;

    /* Settings of the environment that could not be understood are used by nobody, so somebody must say so. */
    const char *const complaints[] = {cbn_cpu_mask_complaint(), cbn_threads_complaint()};
    for (size_t i = 0; i < sizeof complaints / sizeof complaints[0]; i++)
        if (complaints[i] != NULL && PyErr_WarnEx(PyExc_RuntimeWarning, complaints[i], 1) < 0) return -1;
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->plan_type);
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->plan_type);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters /* NumPy lives in the main interpreter only */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "pyconvbn._core",
    .m_doc = "C extension of pyconvbn. Private: use the package's Python modules.",
    .m_size = sizeof(module_state),
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
