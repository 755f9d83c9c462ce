# SPDX-License-Identifier: BSD-3-Clause
"""Networks and uses of graphs for the tests of bad input."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

import pyconvbn
from pyconvbn import _core, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn.fx import subgraph_rewriter

X = np.ones((1, 2, 3, 3), np.float32)
CLEAN = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)


class Nameless:
    def __call__(self, *args: Any) -> Any:
        return args[0]


class Hostile(Nameless):
    """Every question is answered with an exception."""

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("eq")

    def __hash__(self) -> int:
        raise ZeroDivisionError("hash")

    def __repr__(self) -> str:
        raise ZeroDivisionError("repr")

    def __bool__(self) -> bool:
        raise ZeroDivisionError("bool")


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(2, 2, 1)
        self.b = nn.BatchNorm2d(2)

    def forward(self, x: Any) -> Any:
        return self.b(self.c(x)) + 1


class Functions(Modules):
    def forward(self, x: Any) -> Any:
        y = F.conv2d(x, self.c.weight, self.c.bias)
        b = self.b
        return F.batch_norm(y, b.running_mean, b.running_var, b.weight, b.bias) + 1


def net(cls: type[Modules] = Modules) -> Any:
    return fx.symbolic_trace(cls().eval())


def by_name(gm: Any) -> dict[str, Any]:
    return {node.name: node for node in gm.graph.nodes}


def by_hand(conv: Any, bn: Any) -> Any:
    """bn(conv(x)) + 1 with modules that a trace would look into."""
    graph = fx.Graph()
    y = graph.call_module("b", (graph.call_module("c", (graph.placeholder("x"),)),))
    graph.output(graph.call_function(operator.add, (y, 1)))
    return fx.GraphModule({"c": conv.eval(), "b": bn.eval()}, graph)


def state(gm: Any) -> Any:
    """All that a failed call may not change."""
    graph = gm.graph
    return (
        str(graph),
        [(n.name, dict(n.meta), [user.name for user in n.users], _core.op_tensor(n)) for n in graph.nodes],
        [(name, id(module), sorted(vars(module))) for name, module in gm.named_modules(remove_duplicate=False)],
        {name: array.tobytes() for name, array in gm.state_dict().items()},
    )


def add_one(x: Any) -> Any:
    return x + 1


def other(x: Any) -> Any:
    return (x - 1) * 2


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fresh = nn.ReLU()

    def forward(self, x: Any) -> Any:
        return self.fresh(x)


def replace(gm: Any) -> Any:
    return subgraph_rewriter.replace_pattern(gm, add_one, other)


PASSES: dict[str, Callable[[Any], Any]] = {
    "efficient": passes.efficient_conv_bn_eval,
    "fuse": lambda gm: passes.fuse_conv_bn(gm)[0],
    "fuse_inplace": lambda gm: passes.fuse_conv_bn(gm, inplace=True),
    "pre_grad": passes.pre_grad,
    "dce": passes.dce,
    "replace": replace,
    "shape_prop": lambda gm: fx.shape_prop(gm, X),
    "to_aten": lambda gm: fx.to_aten(gm, lift_params=True),
}
USES: dict[str, Callable[[Any], Any]] = {
    **PASSES,
    "run": lambda gm: gm(X),
    "interpreter": lambda gm: fx.Interpreter(gm).run(X),
    "transformer": lambda gm: fx.Transformer(gm).transform(),
    "trace": fx.symbolic_trace,
    "lint": lambda gm: gm.graph.lint(),
    "eliminate_dead_code": lambda gm: gm.graph.eliminate_dead_code(),
    "deepcopy": copy.deepcopy,
    "graph_copy": lambda gm: fx.Graph().graph_copy(gm.graph, {}),
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "verify": lambda gm: pyconvbn.verify(gm, gm, (X,)),
    "code": lambda gm: gm.code,
    "str": lambda gm: str(gm.graph),
    "table": lambda gm: gm.graph._table(),
    "html": lambda gm: gm._repr_html_(),
    "delete_unused": lambda gm: gm.delete_all_unused_submodules(),
}
#: Those that only show a graph, whatever it is.
SHOWS = {"code", "str", "table", "html", "delete_unused"}


def circle() -> Any:
    gm = net()
    by_name(gm)["c"].args = (by_name(gm)["b"],)
    return gm
