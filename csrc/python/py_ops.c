/* SPDX-License-Identifier: BSD-3-Clause */
/* The process's op table: filled at import with Python's own operators, later with the package's. */
#include "python/py_ops.h"

#include <string.h>

static cbn_op_table *table; /* for the life of the process */

cbn_op_table *cbn_py_op_table(void) { return table; }

int cbn_py_ops_register(PyObject *callable, PyObject *name, cbn_opcode *code) {
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(name, &len);
    if (text == NULL) return -1;
    *code = cbn_op_table_find(table, text, (size_t)len);
    if (*code == 0) {
        PyErr_Format(PyExc_ValueError, "name: expected a row of the op table, got %R", name);
        return -1;
    }
    const bool fresh = cbn_op_table_lookup(table, callable) == 0;
    cbn_error err;
    const cbn_status status = cbn_op_table_register(table, callable, *code, &err);
    if (status != CBN_OK) {
        cbn_py_raise(status, &err);
        return -1;
    }
    if (fresh) Py_INCREF(callable); /* an address must not come to mean another object */
    return 0;
}

/* Rows "operator.x", "builtins.x", "math.x" are those modules' functions. */
static int register_module(const char *module_name) {
    PyObject *module = PyImport_ImportModule(module_name);
    if (module == NULL) return -1;
    const size_t prefix = strlen(module_name);
    int status = 0;
    for (int i = 1; status == 0 && i <= cbn_op_table_count(table); i++) {
        const char *row = cbn_op_table_row(table, (cbn_opcode)i)->name;
        if (strncmp(row, module_name, prefix) != 0 || row[prefix] != '.') continue;
        PyObject *callable = PyObject_GetAttrString(module, row + prefix + 1);
        PyObject *name = PyUnicode_FromString(row);
        cbn_opcode code;
        status = callable == NULL || name == NULL ? -1 : cbn_py_ops_register(callable, name, &code);
        Py_XDECREF(callable);
        Py_XDECREF(name);
    }
    Py_DECREF(module);
    return status;
}

/* ---- asking ------------------------------------------------------------------------------------------------------ */
PyObject *cbn_py_op_default(const cbn_param *p) {
    if (p->default_str != NULL) return PyUnicode_FromString(p->default_str);
    const cbn_value *v = &p->default_value;
    switch (v->tag) {
    case CBN_V_BOOL: return PyBool_FromLong(v->u.b);
    case CBN_V_INT: return PyLong_FromLongLong(v->u.i);
    case CBN_V_FLOAT: return PyFloat_FromDouble(v->u.f);
    case CBN_V_LIST: {
        PyObject *list = PyList_New(v->u.seq->count);
        for (uint32_t i = 0; list != NULL && i < v->u.seq->count; i++) {
            PyObject *item = PyLong_FromLongLong(v->u.seq->v[i].u.i);
            if (item == NULL) Py_CLEAR(list);
            else PyList_SET_ITEM(list, i, item);
        }
        return list;
    }
    default: Py_RETURN_NONE;
    }
}

static PyObject *op_names(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    const int count = cbn_op_table_count(table);
    PyObject *list = PyList_New(count);
    for (int i = 0; list != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(cbn_op_table_row(table, (cbn_opcode)(i + 1))->name);
        if (name == NULL) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, name);
    }
    return list;
}

static PyObject *op_lookup(PyObject *module, PyObject *callable) {
    (void)module;
    const cbn_op *row = cbn_op_table_row(table, cbn_op_table_lookup(table, callable));
    if (row == NULL) Py_RETURN_NONE;
    return PyUnicode_FromString(row->name);
}

static PyObject *op_register(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    (void)module;
    if (!cbn_py_nargs("op_register", nargs, 2)) return NULL;
    if (!PyCallable_Check(args[0]) || !PyUnicode_Check(args[1])) {
        PyErr_Format(PyExc_TypeError, "expected a callable and a str, got %.200s and %.200s", Py_TYPE(args[0])->tp_name,
                     Py_TYPE(args[1])->tp_name);
        return NULL;
    }
    cbn_opcode code;
    if (cbn_py_ops_register(args[0], args[1], &code) < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *param_info(const cbn_param *p) {
    PyObject *value = p->has_default ? cbn_py_op_default(p) : Py_NewRef(Py_None);
    if (value == NULL) return NULL;
    return Py_BuildValue("{s:s,s:s,s:N,s:N,s:N,s:N,s:N,s:N,s:N}", "name", p->name, "type", p->type, "optional",
                         PyBool_FromLong(p->optional), "keyword_only", PyBool_FromLong(p->keyword_only), "variadic",
                         PyBool_FromLong(p->variadic), "has_default", PyBool_FromLong(p->has_default), "default", value,
                         "aliased", PyBool_FromLong(p->aliased), "written", PyBool_FromLong(p->written));
}

static PyObject *op_info(PyObject *module, PyObject *name) {
    (void)module;
    static const char *const effects[] = {"pure", "view", "mutates", "random", "impure"};
    Py_ssize_t len = 0;
    const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &len) : NULL;
    if (text == NULL) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "name: expected a str, got %.200s", Py_TYPE(name)->tp_name);
        return NULL;
    }
    const cbn_op *row = cbn_op_table_row(table, cbn_op_table_find(table, text, (size_t)len));
    if (row == NULL) {
        PyErr_Format(PyExc_ValueError, "name: expected a row of the op table, got %R", name);
        return NULL;
    }
    PyObject *params = PyList_New(row->nparams);
    for (int i = 0; params != NULL && i < row->nparams; i++) {
        PyObject *p = param_info(&row->params[i]);
        if (p == NULL) Py_CLEAR(params);
        else PyList_SET_ITEM(params, i, p);
    }
    if (params == NULL) return NULL;
    return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s,s:i,s:i,s:N}", "name", row->name, "schema", row->schema, "doc",
                         row->doc, "effect", effects[row->effect], "shape_rule", row->shape_rule, "returns",
                         row->returns, "nreturns", row->nreturns, "nd", row->nd, "params", params);
}

static PyMethodDef methods[] = {
    {"op_names", op_names, METH_NOARGS, "Names of all rows."},
    {"op_lookup", op_lookup, METH_O, "Name of the row that a callable is, or None."},
    {"op_register", (PyCFunction)(void (*)(void))op_register, METH_FASTCALL, "Says that a callable is a row."},
    {"op_info", op_info, METH_O, "A row as a dict."},
    {NULL, NULL, 0, NULL},
};

int cbn_py_ops_init(PyObject *module) {
    if (table == NULL) {
        cbn_error err;
        const cbn_status status = cbn_op_table_new(&table, &err);
        if (status != CBN_OK) {
            cbn_py_raise(status, &err);
            return -1;
        }
        if (register_module("operator") < 0 || register_module("builtins") < 0 || register_module("math") < 0)
            return -1;
    }
    PyMethodDef *const tables[] = {methods, cbn_op_node_methods, cbn_effects_methods};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        if (PyModule_AddFunctions(module, tables[i]) < 0) return -1;
    }
    return cbn_py_operator_init(module);
}
