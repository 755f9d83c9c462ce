# SPDX-License-Identifier: BSD-3-Clause
"""A network with BatchNorms far from the defaults, and a fold by hand, for the tests of `verify`."""

from __future__ import annotations

import copy

import numpy as np

import pyconvbn
from pyconvbn import nn


def randomise(net: nn.Module, rng: np.random.Generator) -> nn.Module:
    """Statistics and parameters far from the defaults, eval mode."""
    for module in net.modules():
        if hasattr(module, "running_mean"):
            count = len(module.running_mean)
            module.running_mean[:] = rng.normal(size=count)
            module.running_var[:] = rng.uniform(0.05, 4, count)
            module.weight[:] = rng.normal(size=count) * 2
            module.bias[:] = rng.normal(size=count)
    return net.eval()


class Net(nn.Module):
    """Three convolutions with BatchNorm, one of them grouped and transposed, a residual, a linear end."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.b2 = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(8)
        self.c3, self.b3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.pool, self.flatten = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = self.relu(self.b1(self.c1(x)))
        x = self.relu(self.b2(self.up(x)))
        return self.last(self.flatten(self.pool(self.b3(self.c3(x)) + x)))


def fold(gm, wrong=None, make=None):
    """Folds by hand, independent of the passes; `make(conv, bn, folded)` replaces the fold of layer `wrong`."""
    gm = copy.deepcopy(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_module" or not hasattr(gm.get_submodule(node.target), "running_mean"):
            continue
        (source,) = node.all_input_nodes
        if source.op != "call_module" or not hasattr(gm.get_submodule(source.target), "weight"):
            continue
        conv, bn = gm.get_submodule(source.target), gm.get_submodule(node.target)
        fuse = pyconvbn.fuse_linear_bn_eval if hasattr(conv, "in_features") else pyconvbn.fuse_conv_bn_eval
        folded = fuse(conv, bn)
        if source.target == wrong:
            folded = make(conv, bn, folded)
        gm.set_submodule(source.target, folded)
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
    return gm


def gain(bn):
    return bn.weight / np.sqrt(bn.running_var + bn.eps)


def replaced(module, **arrays):
    for name, array in arrays.items():
        setattr(module, name, nn.Parameter(array.astype(np.float32)))
    return module
