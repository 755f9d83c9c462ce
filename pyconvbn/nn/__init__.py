# SPDX-License-Identifier: BSD-3-Clause
"""Modules with the names, attributes and state_dict keys of `torch.nn`, holding NumPy arrays.

They are records for inference, not a training framework: no gradients.

    >>> import numpy as np
    >>> from pyconvbn import nn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> net(np.zeros((1, 1, 8, 8), np.float32)).shape
    (1, 4, 6, 6)
"""

from .activation import GELU, Hardswish, LeakyReLU, ReLU, ReLU6, Sigmoid, SiLU
from .batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from .containers import ModuleList, Sequential
from .conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from .frozen import FrozenLayer
from .init import manual_seed
from .linear import Dropout, Flatten, Identity, Linear, Upsample
from .module import Module
from .parameter import Parameter
from .pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
)
from .state import IncompatibleKeys, StateDictError

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "Flatten",
    "FrozenLayer",
    "GELU",
    "Hardswish",
    "Identity",
    "IncompatibleKeys",
    "LeakyReLU",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "Module",
    "ModuleList",
    "Parameter",
    "ReLU",
    "ReLU6",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "StateDictError",
    "SyncBatchNorm",
    "Upsample",
    "manual_seed",
]
