/* SPDX-License-Identifier: BSD-3-Clause */
/* What the passes ask of Python's modules and arrays: pyconvbn.nn and torch.nn alike. torch is never imported from
 * here: while it is not imported, none of its objects can exist. */
#include "python/py_graph.h"

#include "python/py_host_hold.h"
#include "python/py_host_pure.h"

#include <math.h>

/* X(identifier, attribute) */
#define ATTRIBUTES(X)                                                                                                  \
    X(training, "training")                                                                                            \
    X(groups, "groups")                                                                                                \
    X(eps, "eps")                                                                                                      \
    X(num_features, "num_features")                                                                                    \
    X(out_features, "out_features")                                                                                    \
    X(out_channels, "out_channels")                                                                                    \
    X(weight, "weight")                                                                                                \
    X(bias, "bias")                                                                                                    \
    X(running_mean, "running_mean")                                                                                    \
    X(running_var, "running_var")                                                                                      \
    X(forward, "forward")                                                                                              \
    X(call, "__call__")                                                                                                \
    X(conv_forward, "_conv_forward")                                                                                   \
    X(output_padding_fn, "_output_padding")                                                                            \
    X(output_padding_for, "output_padding_for")                                                                        \
    X(pad_amounts, "_pad_amounts")                                                                                     \
    X(forward_hooks, "_forward_hooks")                                                                                 \
    X(forward_pre_hooks, "_forward_pre_hooks")                                                                         \
    X(parameters, "_parameters")                                                                                       \
    X(buffers, "_buffers")                                                                                             \
    X(modules, "_modules")                                                                                             \
    X(inplace, "inplace")                                                                                              \
    X(getattribute, "__getattribute__")

#define ATTRIBUTE_FIELD_(id, text) PyObject *id;
static struct { ATTRIBUTES(ATTRIBUTE_FIELD_) bool ready; } names;
#undef ATTRIBUTE_FIELD_

static bool names_get(void) {
    if (names.ready) return true;
#define ATTRIBUTE_INTERN_(id, text)                                                                                    \
    if (names.id == NULL && (names.id = PyUnicode_InternFromString(text)) == NULL) return false;
    ATTRIBUTES(ATTRIBUTE_INTERN_)
#undef ATTRIBUTE_INTERN_
    names.ready = true;
    return true;
}

/* ---- keeping what was handed out ---- */

/* Handles are borrowed, but a property may make its value at each access and host code between two uses may replace an
 * attribute: what is handed out while a scope is open stays alive until the last one closes. */
static PyObject *held;
static int hold_depth;

void cbn_py_host_hold_begin(void) { hold_depth++; }

void cbn_py_host_hold_end(void) {
    if (--hold_depth > 0) return;
    PyObject *drop = held;
    held = NULL;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace); /* destructors must not meet a pending exception */
    Py_XDECREF(drop);
    PyErr_Restore(type, value, trace);
}

/* Steals `obj` and makes it borrowed: *out is NULL for an object that nobody else would keep alive. */
static cbn_status lend(PyObject *obj, cbn_host *out) {
    *out = NULL;
    if (hold_depth > 0) {
        if (held == NULL) held = PyList_New(0);
        const int status = held == NULL ? -1 : PyList_Append(held, obj);
        if (status == 0) *out = obj;
        Py_DECREF(obj);
        return status == 0 ? CBN_OK : CBN_HOST_ERROR;
    }
    if (Py_REFCNT(obj) > 1) *out = obj;
    Py_DECREF(obj);
    return CBN_OK;
}

/* ---- which class is what ---- */

typedef struct known_class {
    PyTypeObject *cls; /* owned */
    cbn_module_kind kind;
    int nd;
} known_class;

/* Ours, then torch's. A framework's classes are looked up when its module has been imported. */
static const struct { const char *name; cbn_module_kind kind; int nd; } stock[] = {
    {"Linear", CBN_MODULE_LINEAR, 0},
    {"Conv1d", CBN_MODULE_CONV, 1},
    {"Conv2d", CBN_MODULE_CONV, 2},
    {"Conv3d", CBN_MODULE_CONV, 3},
    {"ConvTranspose1d", CBN_MODULE_CONV_TRANSPOSE, 1},
    {"ConvTranspose2d", CBN_MODULE_CONV_TRANSPOSE, 2},
    {"ConvTranspose3d", CBN_MODULE_CONV_TRANSPOSE, 3},
    {"BatchNorm1d", CBN_MODULE_BATCH_NORM, 1},
    {"BatchNorm2d", CBN_MODULE_BATCH_NORM, 2},
    {"BatchNorm3d", CBN_MODULE_BATCH_NORM, 3},
    {"SyncBatchNorm", CBN_MODULE_BATCH_NORM, -1},
    {"FrozenLayer", CBN_MODULE_FROZEN, -1}, /* ours only */
    {"_BatchNorm", CBN_MODULE_BATCH_NORM, -1}, /* the base class, in a module of its own */
};
enum { STOCK = sizeof stock / sizeof stock[0] };
static known_class known[2][STOCK];
static const char *const nn_modules[2] = {"pyconvbn.nn", "torch.nn"};
static const char *const base_modules[2] = {"pyconvbn.nn.batchnorm", "torch.nn.modules.batchnorm"};

/* sys.modules[name], new reference; NULL without an exception when it is not imported. */
static PyObject *imported(const char *name) {
    PyObject *key = PyUnicode_FromString(name);
    if (key == NULL) return NULL;
    PyObject *module = PyImport_GetModule(key);
    Py_DECREF(key);
    return module;
}

/* 1: known[which] is filled; 0: not imported (completely); -1: exception. */
static int load_framework(int which) {
    known_class *row = known[which];
    if (row[STOCK - 1].cls != NULL) return 1;
    PyObject *home = imported(nn_modules[which]);
    PyObject *base = home ? imported(base_modules[which]) : NULL;
    int result = PyErr_Occurred() ? -1 : home != NULL && base != NULL;
    for (int i = 0; result == 1 && i < STOCK; i++) {
        if (which == 1 && stock[i].kind == CBN_MODULE_FROZEN) continue;
        PyObject *cls = PyObject_GetAttrString(i == STOCK - 1 ? base : home, stock[i].name);
        if (cls == NULL || !PyType_Check(cls)) { /* a module in the middle of its import */
            result = cls == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError) ? -1 : 0;
            if (result == 0) PyErr_Clear();
            Py_XDECREF(cls);
            break;
        }
        PyTypeObject *old = row[i].cls;
        row[i] = (known_class){(PyTypeObject *)cls, stock[i].kind, stock[i].nd};
        Py_XDECREF(old);
    }
    Py_XDECREF(home);
    Py_XDECREF(base);
    return result;
}

typedef struct class_facts {
    PyTypeObject *type; /* compared only, not owned: the version tag is never given to another class */
    unsigned int version;
    cbn_module_kind kind;
    int nd;
    bool overridden; /* a subclass computes something else: its own forward, or a parameter that is a property */
    bool plain;      /* no property stands before the instance's attributes */
    bool pure;       /* a module of no known kind that writes nothing */
    bool torch;      /* ... of torch's, and not when it works in place */
    PyObject *descriptors; /* names that stand before the instance's own attributes; NULL: all may. Owned by the cache */
} class_facts;

static class_facts class_cache[256];

static unsigned int version_of(PyTypeObject *type) {
#if PY_VERSION_HEX < 0x030C0000
    if (!PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    return type->tp_version_tag;
}

static bool is_data_descriptor(PyTypeObject *type, PyObject *name) {
    PyObject *found = _PyType_Lookup(type, name);
    return found != NULL && Py_TYPE(found)->tp_descr_set != NULL;
}

static const known_class *find_known(PyTypeObject *type) {
    PyObject *mro = type->tp_mro;
    if (mro == NULL) return NULL;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mro); i++) {
        PyTypeObject *cls = (PyTypeObject *)PyTuple_GET_ITEM(mro, i);
        for (int which = 0; which < 2; which++) {
            for (int k = 0; k < STOCK; k++) {
                if (known[which][k].cls == cls) return &known[which][k];
            }
        }
    }
    return NULL;
}

static bool has_own_getattribute(PyTypeObject *type) {
    return _PyType_Lookup(type, names.getattribute) != _PyType_Lookup(&PyBaseObject_Type, names.getattribute);
}

/* Names of the class's data descriptors, a new frozenset. NULL with an exception. */
static PyObject *descriptor_names(PyTypeObject *type) {
    PyObject *set = PyFrozenSet_New(NULL), *mro = type->tp_mro;
    for (Py_ssize_t i = 0; set != NULL && mro != NULL && i < PyTuple_GET_SIZE(mro); i++) {
        PyTypeObject *cls = (PyTypeObject *)PyTuple_GET_ITEM(mro, i);
        PyObject *key, *value;
        Py_ssize_t at = 0;
        while (set != NULL && cls->tp_dict != NULL && PyDict_Next(cls->tp_dict, &at, &key, &value)) {
            if (Py_TYPE(value)->tp_descr_set != NULL && PyUnicode_CheckExact(key) && PySet_Add(set, key) < 0) {
                Py_CLEAR(set);
            }
        }
    }
    return set;
}

static bool class_facts_of(PyTypeObject *type, class_facts *out) {
    class_facts *slot = &class_cache[((uintptr_t)type >> 5) & 255];
    if (slot->type == type && slot->version != 0 && slot->version == version_of(type)) {
        *out = *slot;
        return true;
    }
    *out = (class_facts){.type = type, .kind = CBN_MODULE_OTHER, .nd = -1, .plain = true};
    for (int which = 0; which < 2; which++) {
        if (load_framework(which) < 0) return false;
    }
    const known_class *base = find_known(type);
    if (base != NULL) {
        out->kind = base->kind;
        out->nd = base->nd;
        PyObject *const code[] = {names.forward,           names.call,               names.conv_forward,
                                  names.output_padding_fn, names.output_padding_for, names.pad_amounts};
        for (size_t i = 0; i < sizeof code / sizeof code[0]; i++) {
            if (_PyType_Lookup(type, code[i]) != _PyType_Lookup(base->cls, code[i])) out->overridden = true;
        }
        PyObject *const parameters[] = {names.weight, names.bias, names.running_mean, names.running_var};
        for (size_t i = 0; i < sizeof parameters / sizeof parameters[0]; i++) {
            if (is_data_descriptor(type, parameters[i])) out->overridden = true, out->plain = false;
        }
        PyObject *const facts[] = {names.training, names.groups, names.eps, names.num_features, names.out_features,
                                   names.out_channels};
        for (size_t i = 0; i < sizeof facts / sizeof facts[0]; i++) {
            if (is_data_descriptor(type, facts[i])) out->plain = false;
        }
        if (has_own_getattribute(type)) out->plain = false;
    } else {
        const int pure = cbn_py_class_pure(type, &out->torch);
        if (pure < 0) return false;
        out->pure = pure > 0;
    }
    /* This look-up also gives the class a version, so that it can be cached. */
    if (!has_own_getattribute(type) && (out->descriptors = descriptor_names(type)) == NULL) return false;
    out->version = version_of(type);
    Py_XSETREF(slot->descriptors, out->descriptors);
    *slot = *out;
    return true;
}

/* ---- attributes ---- */

/* The instance dict, borrowed for as long as obj lives; NULL without an exception when it has none. */
static PyObject *instance_dict(PyObject *obj) {
    PyObject *dict = PyObject_GenericGetDict(obj, NULL);
    if (dict == NULL) {
        PyErr_Clear();
        return NULL;
    }
    Py_DECREF(dict); /* the instance keeps it */
    return PyDict_Check(dict) ? dict : NULL;
}

/* torch keeps parameters, buffers and children in three dicts of the instance's. Borrowed; NULL: not there
 * (or an error). */
static PyObject *from_registries(PyObject *dict, PyObject *name) {
    PyObject *const registries[] = {names.parameters, names.buffers, names.modules};
    for (size_t i = 0; i < sizeof registries / sizeof registries[0]; i++) {
        PyObject *registry = PyDict_GetItemWithError(dict, registries[i]);
        if (registry == NULL && PyErr_Occurred()) return NULL;
        if (registry == NULL || !PyDict_Check(registry)) continue;
        PyObject *value = PyDict_GetItemWithError(registry, name);
        if (value != NULL || PyErr_Occurred()) return value;
    }
    return NULL;
}

/* getattr(obj, name) without the detour through a Python __getattr__ where that can be avoided. New reference; NULL
 * with AttributeError when it is not there. */
static PyObject *attribute(PyObject *obj, PyObject *dict, PyObject *name, bool plain) {
    if (plain && dict != NULL) {
        PyObject *value = PyDict_GetItemWithError(dict, name);
        if (value == NULL && !PyErr_Occurred() && _PyType_Lookup(Py_TYPE(obj), name) == NULL) {
            value = from_registries(dict, name);
        }
        if (value != NULL) return Py_NewRef(value);
        if (PyErr_Occurred()) return NULL;
    }
    return PyObject_GetAttr(obj, name);
}

/* 1, 0 (not there or None), -1. *out: borrowed. */
static int parameter(PyObject *obj, PyObject *dict, PyObject *name, bool plain, cbn_host *out) {
    *out = NULL;
    PyObject *value = attribute(obj, dict, name, plain);
    if (value == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        return 0;
    }
    if (value == Py_None) {
        Py_DECREF(value);
        return 0;
    }
    return lend(value, out) == CBN_OK ? 1 : -1;
}

static int integer(PyObject *obj, PyObject *dict, PyObject *name, bool plain, int64_t *out) {
    PyObject *value = attribute(obj, dict, name, plain);
    if (value == NULL) return -1;
    PyObject *index = PyNumber_Index(value);
    Py_DECREF(value);
    if (index == NULL) return -1;
    *out = PyLong_AsLongLong(index);
    Py_DECREF(index);
    return *out == -1 && PyErr_Occurred() ? -1 : 0;
}

static int truth(PyObject *obj, PyObject *dict, PyObject *name, bool plain, bool *out) {
    PyObject *value = attribute(obj, dict, name, plain);
    if (value == NULL) return -1;
    const int result = PyObject_IsTrue(value);
    Py_DECREF(value);
    *out = result > 0;
    return result < 0 ? -1 : 0;
}

static int non_empty(PyObject *dict, PyObject *name, bool *out) {
    PyObject *value = PyDict_GetItemWithError(dict, name);
    if (value == NULL) return PyErr_Occurred() ? -1 : 0;
    const int result = PyObject_IsTrue(value);
    if (result > 0) *out = true;
    return result < 0 ? -1 : 0;
}

static int instance_hooks(PyObject *dict, cbn_module_kind kind, bool *hooked) {
    if (dict == NULL) return 0;
    if (non_empty(dict, names.forward_hooks, hooked) < 0 || non_empty(dict, names.forward_pre_hooks, hooked) < 0) {
        return -1;
    }
    PyObject *const code[] = {names.forward, names.conv_forward, names.output_padding_fn, names.output_padding_for,
                              names.pad_amounts};
    const bool conv = kind == CBN_MODULE_CONV || kind == CBN_MODULE_CONV_TRANSPOSE; /* the others are theirs only */
    for (size_t i = 0; i < (conv ? sizeof code / sizeof code[0] : 1); i++) {
        const int at = PyDict_Contains(dict, code[i]);
        if (at < 0) return -1;
        *hooked |= at > 0;
    }
    return 0;
}
/* 1, 0, -1: is this module of a pure class what its class says? */
static int stays_pure(PyObject *obj, const class_facts *cls) {
    PyObject *dict = instance_dict(obj);
    bool impure = dict == NULL;
    if (instance_hooks(dict, cls->kind, &impure) < 0) return -1;
    if (dict != NULL && cls->torch && non_empty(dict, names.inplace, &impure) < 0) return -1;
    return !impure; /* ours keep the flag `inplace`, but never write their input */
}

/* Is the pending exception about an attribute that is not there or makes no sense? */
static bool is_about_an_attribute(void) {
    return PyErr_ExceptionMatches(PyExc_AttributeError) || PyErr_ExceptionMatches(PyExc_TypeError) ||
           PyErr_ExceptionMatches(PyExc_OverflowError);
}

/* A BatchNorm stays one whatever has become of eps and num_features: they get values that no pass accepts. */
static int describe_batch_norm(PyObject *obj, PyObject *dict, bool plain, cbn_module_info *out) {
    if (parameter(obj, dict, names.running_mean, plain, &out->mean) < 0) return -1;
    if (parameter(obj, dict, names.running_var, plain, &out->var) < 0) return -1;
    out->frozen_bn = !out->training && out->mean != NULL && out->var != NULL;
    PyObject *eps = attribute(obj, dict, names.eps, plain);
    out->eps = eps == NULL ? -1.0 : PyFloat_AsDouble(eps);
    Py_XDECREF(eps);
    if (PyErr_Occurred()) {
        if (!is_about_an_attribute()) return -1;
        PyErr_Clear();
        out->eps = NAN;
    }
    if (integer(obj, dict, names.num_features, plain, &out->channels) < 0) {
        if (!is_about_an_attribute()) return -1;
        PyErr_Clear();
        out->channels = -1;
    }
    return 0;
}

static int describe_module(PyObject *obj, const class_facts *cls, cbn_module_info *out) {
    PyObject *dict = instance_dict(obj);
    const bool plain = cls->plain;
    out->kind = cls->kind;
    out->nd = cls->nd;
    out->hooked = cls->overridden;
    out->groups = 1;
    if (instance_hooks(dict, cls->kind, &out->hooked) < 0) return -1;
    if (truth(obj, dict, names.training, plain, &out->training) < 0) return -1;
    if (cls->kind == CBN_MODULE_FROZEN) return 0;
    if (parameter(obj, dict, names.weight, plain, &out->weight) < 0) return -1;
    if (parameter(obj, dict, names.bias, plain, &out->bias) < 0) return -1;
    if (cls->kind == CBN_MODULE_LINEAR) return integer(obj, dict, names.out_features, plain, &out->channels);
    if (cls->kind == CBN_MODULE_BATCH_NORM) return describe_batch_norm(obj, dict, plain, out);
    if (integer(obj, dict, names.groups, plain, &out->groups) < 0) return -1;
    return integer(obj, dict, names.out_channels, plain, &out->channels);
}

cbn_status cbn_py_host_module(cbn_host h, cbn_module_info *out, cbn_error *err) {
    (void)err;
    *out = (cbn_module_info){.kind = CBN_MODULE_OTHER, .nd = -1};
    class_facts cls;
    if (!names_get() || !class_facts_of(Py_TYPE((PyObject *)h), &cls)) return CBN_HOST_ERROR;
    if (cls.kind == CBN_MODULE_OTHER) {
        const int pure = cls.pure ? stays_pure(h, &cls) : 0;
        out->pure = pure > 0;
        return pure < 0 ? CBN_HOST_ERROR : CBN_OK;
    }
    Py_INCREF((PyObject *)h); /* a property could drop the last reference to its owner */
    const int status = describe_module(h, &cls, out);
    Py_DECREF((PyObject *)h);
    out->pure = status == 0 && !out->hooked;
    if (status == 0) return CBN_OK;
    /* A module whose __init__ did not run, or with attributes that make no sense, is no layer that we know. */
    if (!is_about_an_attribute()) return CBN_HOST_ERROR;
    PyErr_Clear();
    *out = (cbn_module_info){.kind = CBN_MODULE_OTHER, .nd = -1};
    return CBN_OK;
}

/* ---- BatchNorms inside a module ---- */

/* fn for one (path, module) of named_modules(). */
static cbn_status offer(PyObject *item, cbn_status (*fn)(cbn_host bn, const char *path, void *arg), void *arg) {
    PyObject *path, *module;
    class_facts cls;
    if (!PyArg_ParseTuple(item, "OO:named_modules", &path, &module)) return CBN_HOST_ERROR;
    if (!class_facts_of(Py_TYPE(module), &cls)) return CBN_HOST_ERROR;
    const char *text = cls.kind == CBN_MODULE_BATCH_NORM ? PyUnicode_AsUTF8(path) : "";
    if (text == NULL) return CBN_HOST_ERROR;
    return *text == '\0' ? CBN_OK : fn(module, text, arg);
}

cbn_status cbn_py_host_batch_norms(cbn_host h, cbn_status (*fn)(cbn_host bn, const char *path, void *arg), void *arg,
                                   cbn_error *err) {
    (void)err;
    if (!names_get()) return CBN_HOST_ERROR;
    PyObject *modules = PyObject_CallMethod((PyObject *)h, "named_modules", NULL);
    PyObject *list = modules == NULL ? NULL : PySequence_List(modules);
    Py_XDECREF(modules);
    if (list == NULL) { /* no module, or one whose __init__ did not run */
        if (!is_about_an_attribute()) return CBN_HOST_ERROR;
        PyErr_Clear();
        return CBN_OK;
    }
    cbn_status status = CBN_OK;
    for (Py_ssize_t i = 0; status == CBN_OK && i < PyList_GET_SIZE(list); i++) {
        status = offer(PyList_GET_ITEM(list, i), fn, arg);
    }
    Py_DECREF(list);
    return status;
}

/* ---- dotted names ---- */

/* getattr(obj, *name), new reference. Members in the instance dict, nearly all there are, are found without a look at the
 * class's attributes one by one. */
static PyObject *member(PyObject *obj, PyObject **name) {
    class_facts cls;
    if (!class_facts_of(Py_TYPE(obj), &cls)) return NULL;
    PyObject *dict = instance_dict(obj);
    const int hidden = cls.descriptors == NULL ? 1 : PySet_Contains(cls.descriptors, *name);
    if (hidden < 0) return NULL;
    if (!hidden && dict != NULL) {
        PyObject *value = PyDict_GetItemWithError(dict, *name);
        if (value != NULL) return Py_NewRef(value);
        if (PyErr_Occurred()) return NULL;
    }
    PyUnicode_InternInPlace(name); /* the cache of _PyType_Lookup goes by identity */
    return attribute(obj, dict, *name, !hidden);
}

cbn_status cbn_py_host_resolve(cbn_host root, const char *target, cbn_host *out, cbn_error *err) {
    (void)err;
    *out = NULL;
    if (!names_get()) return CBN_HOST_ERROR;
    PyObject *at = Py_NewRef((PyObject *)root);
    for (const char *p = target; *p != '\0';) {
        const char *dot = p;
        while (*dot != '\0' && *dot != '.') dot++;
        PyObject *name = PyUnicode_DecodeUTF8(p, dot - p, "surrogatepass");
        PyObject *next = name == NULL ? NULL : member(at, &name);
        Py_XDECREF(name);
        if (next == NULL) {
            Py_DECREF(at);
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return CBN_HOST_ERROR;
            PyErr_Clear();
            return CBN_OK;
        }
        Py_SETREF(at, next);
        p = *dot == '.' ? dot + 1 : dot;
    }
    return lend(at, out);
}
