/* SPDX-License-Identifier: BSD-3-Clause */
/* Which modules without parameters of their own are known to write nothing: the frameworks' activations, pooling and
 * such. */
#include "python/py_host_pure.h"

#include <string.h>

/* Names of classes, ours and torch.nn's. Their result may be their input (Identity, Flatten, Dropout). */
static const char *const pure_classes[] = {
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "ChannelShuffle",
    "CircularPad1d",
    "CircularPad2d",
    "CircularPad3d",
    "ConstantPad1d",
    "ConstantPad2d",
    "ConstantPad3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "ELU",
    "Flatten",
    "GELU",
    "GLU",
    "GroupNorm",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LayerNorm",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Mish",
    "PReLU",
    "PixelShuffle",
    "PixelUnshuffle",
    "ReLU",
    "ReLU6",
    "ReflectionPad1d",
    "ReflectionPad2d",
    "ReflectionPad3d",
    "ReplicationPad1d",
    "ReplicationPad2d",
    "ReplicationPad3d",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "Softplus",
    "Softsign",
    "Tanh",
    "Unflatten",
    "Upsample",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
    "ZeroPad1d",
    "ZeroPad2d",
    "ZeroPad3d",
};

static const char *short_name(PyTypeObject *type) {
    const char *dot = strrchr(type->tp_name, '.');
    return dot == NULL ? type->tp_name : dot + 1;
}

/* 1, 0, -1: is this exact class one of the frameworks' own of those names? */
static int known_class(PyTypeObject *type, bool *torch) {
    const char *name = short_name(type);
    bool listed = false;
    for (size_t i = 0; !listed && i < sizeof pure_classes / sizeof pure_classes[0]; i++) {
        listed = strcmp(name, pure_classes[i]) == 0;
    }
    if (!listed || !PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)) return 0;
    PyObject *module = PyDict_GetItemString(type->tp_dict, "__module__");
    if (module == NULL || !PyUnicode_Check(module)) return 0;
    const char *text = PyUnicode_AsUTF8(module);
    if (text == NULL) return -1;
    *torch = strncmp(text, "torch.nn.modules.", 17) == 0;
    return *torch || strncmp(text, "pyconvbn.nn.", 12) == 0;
}

/* 1, 0, -1: is the instance's entry there and true? */
static int holds(PyObject *dict, const char *name) {
    PyObject *value = PyDict_GetItemString(dict, name);
    return value == NULL ? 0 : PyObject_IsTrue(value);
}

int cbn_py_host_pure(PyObject *module) {
    bool torch = false;
    const int known = known_class(Py_TYPE(module), &torch);
    if (known <= 0) return known;
    PyObject *dict = PyObject_GenericGetDict(module, NULL);
    if (dict == NULL) {
        PyErr_Clear();
        return 0;
    }
    int impure = PyDict_GetItemString(dict, "forward") != NULL;
    static const char *const hooks[] = {"_forward_hooks", "_forward_pre_hooks"};
    for (size_t i = 0; impure == 0 && i < sizeof hooks / sizeof hooks[0]; i++) impure = holds(dict, hooks[i]);
    if (impure == 0 && torch) impure = holds(dict, "inplace"); /* ours keep the flag, but never write their input */
    Py_DECREF(dict);
    return impure < 0 ? -1 : !impure;
}
