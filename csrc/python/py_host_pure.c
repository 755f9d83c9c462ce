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

int cbn_py_class_pure(PyTypeObject *type, bool *torch) {
    *torch = false;
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
