# SPDX-License-Identifier: BSD-3-Clause
"""Random ConvBN networks for the differential tests, with an evaluation of their own.

A network is a list of steps in single-assignment form. `RandomNet.forward` runs them with pyconvbn's modules and
functions; `reference` evaluates the same steps with the float64 NumPy references, without modules, tracing or C.
`expected_fused` says from the steps alone which BatchNorms have to be fused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pyconvbn import functional as F
from pyconvbn import nn
from pyconvbn import testing as ref

CHANNELS = 4
SPATIAL = {1: (7,), 2: (5, 6)}


@dataclass
class Step:
    """One value: `kind` applied to the values `args` (numbers of earlier steps; 0 is the input)."""

    kind: str
    args: tuple[int, ...]
    #: module path of conv/bn steps; prefix of the parameter names of the functional ones
    name: str = ""
    keywords: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def _randomise(bn: Any, rng: np.random.Generator) -> None:
    """Statistics and affine parameters far from the defaults."""
    n = bn.num_features
    if bn.running_mean is not None:
        bn.running_mean[...] = rng.normal(0, 2, n)
        bn.running_var[...] = rng.uniform(0.1, 6, n)
    if bn.weight is not None:
        bn.weight[...] = rng.uniform(0.3, 3, n) * rng.choice([-1, 1], n)
        bn.bias[...] = rng.normal(0, 2, n)


class RandomNet(nn.Module):
    def __init__(self, seed: int, dtype: Any = np.float64) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.nd = int(rng.integers(1, 3))
        self.dtype = np.dtype(dtype)
        self.steps: list[Step] = []
        self.convs: list[str] = []
        self.bns: list[str] = []
        self.block = nn.Sequential()
        self._build(rng)
        self.eval()
        for path, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm):
                _randomise(module, rng)
                if rng.random() < 0.08:
                    module.train()

    # -- building ------------------------------------------------------------------------------------------------
    def _place(self, stem: str, module: Any, rng: np.random.Generator) -> str:
        """Puts the module on the net itself or two containers deep; its path."""
        name = f"{stem}{len(self.convs) + len(self.bns)}"
        if rng.random() < 0.4:
            holder = nn.Sequential()
            inner = nn.ModuleList([module])
            self.block.add_module(name, holder)
            holder.add_module("inner", inner)
            return f"block.{name}.inner.0"
        self.add_module(name, module)
        return name

    def _new_conv(self, rng: np.random.Generator) -> str:
        kind = rng.choice(["k3", "k1", "grouped", "depthwise", "transposed", "grouped_transposed"])
        conv: Any = getattr(nn, f"Conv{self.nd}d")
        transposed: Any = getattr(nn, f"ConvTranspose{self.nd}d")
        common = {"bias": bool(rng.random() < 0.5), "dtype": self.dtype}
        c = CHANNELS
        module = {
            "k3": lambda: conv(c, c, 3, padding=1, **common),
            "k1": lambda: conv(c, c, 1, **common),
            "grouped": lambda: conv(c, c, 3, padding=2, dilation=2, groups=2, **common),
            "depthwise": lambda: conv(c, c, 3, padding=1, groups=c, **common),
            "transposed": lambda: transposed(c, c, 3, padding=1, **common),
            "grouped_transposed": lambda: transposed(c, c, 3, padding=1, groups=2, **common),
        }[str(kind)]()
        for p in (module.weight, module.bias):
            if p is not None:
                p[...] = rng.normal(0, 0.5, p.shape)
        if self.convs and rng.random() < 0.15:  # two modules on one weight array, or on views of it
            other = self.get_submodule(str(rng.choice(self.convs)))
            if type(other) is type(module) and other.weight.shape == module.weight.shape:
                module.weight = other.weight
        self.convs.append(self._place("conv", module, rng))
        return self.convs[-1]

    def _new_bn(self, rng: np.random.Generator) -> str:
        cls: Any = nn.SyncBatchNorm if rng.random() < 0.1 else getattr(nn, f"BatchNorm{self.nd}d")
        module = cls(
            CHANNELS, eps=float(rng.choice([1e-5, 1e-3, 0.1])), affine=bool(rng.random() < 0.85),
            track_running_stats=bool(rng.random() < 0.92), dtype=self.dtype,
        )
        self.bns.append(self._place("bn", module, rng))
        return self.bns[-1]

    def _functional_parameters(self, name: str, rng: np.random.Generator) -> None:
        c = CHANNELS
        shapes = {"w": (c, c) + (3,) * self.nd, "b": (c,), "g": (c,), "h": (c,), "m": (c,), "v": (c,)}
        for key, shape in shapes.items():
            value = rng.uniform(0.1, 4, shape) if key == "v" else rng.normal(0, 0.7, shape)
            if key in "mv":
                self.register_buffer(f"{name}_{key}", value.astype(self.dtype))
            else:
                setattr(self, f"{name}_{key}", nn.Parameter(value.astype(self.dtype)))

    def _add(self, kind: str, *args: int, **more: Any) -> int:
        self.steps.append(Step(kind, args, **more))
        return len(self.steps)

    def _conv_step(self, x: int, rng: np.random.Generator) -> int:
        if rng.random() < 0.25:
            name = f"f{len(self.steps)}"
            self._functional_parameters(name, rng)
            bias = bool(rng.random() < 0.5)
            return self._add("fconv", x, name=name, keywords=bool(rng.random() < 0.5), extra={"bias": bias})
        reuse = self.convs and rng.random() < 0.3
        path = str(rng.choice(self.convs)) if reuse else self._new_conv(rng)
        return self._add("conv", x, name=path, keywords=bool(rng.random() < 0.3))

    def _bn_step(self, x: int, rng: np.random.Generator) -> int:
        """Mostly of its producer's form: a module after a module, a function after a function."""
        functional = x > 0 and self.steps[x - 1].kind == "fconv"
        if functional != (rng.random() < 0.1):
            name = f"f{len(self.steps)}"
            self._functional_parameters(name, rng)
            extra = {"affine": bool(rng.random() < 0.8), "training": bool(rng.random() < 0.1),
                     "eps": float(rng.choice([1e-5, 0.01])), "default_eps": bool(rng.random() < 0.5)}
            return self._add("fbn", x, name=name, keywords=bool(rng.random() < 0.5), extra=extra)
        reuse = self.bns and rng.random() < 0.3
        path = str(rng.choice(self.bns)) if reuse else self._new_bn(rng)
        return self._add("bn", x, name=path, keywords=bool(rng.random() < 0.3))

    def _build(self, rng: np.random.Generator) -> None:
        for _ in range(int(rng.integers(3, 9))):
            last = len(self.steps)
            x = last if rng.random() < 0.75 else int(rng.integers(max(0, last - 4), last + 1))
            what = rng.choice(["convbn", "conv_bn_twice", "conv_relu_bn", "residual", "bn", "add", "scale"],
                              p=[0.45, 0.08, 0.08, 0.15, 0.06, 0.1, 0.08])
            if what == "convbn":
                self._bn_step(self._conv_step(x, rng), rng)
            elif what == "conv_bn_twice":
                y = self._conv_step(x, rng)
                self._add("add", self._bn_step(y, rng), self._bn_step(y, rng))
            elif what == "conv_relu_bn":
                self._bn_step(self._add("relu", self._conv_step(x, rng)), rng)
            elif what == "residual":
                y = self._add("relu", self._bn_step(self._conv_step(x, rng), rng))
                y = self._bn_step(self._conv_step(y, rng), rng)
                self._add("add", y, x)
            elif what == "bn":
                self._bn_step(x, rng)
            elif what == "add":
                self._add("add", x, len(self.steps))
            else:
                self._add("scale", x)
        # The last value, and now and then another one (a convolution's output may be among them).
        self.outputs = [len(self.steps)]
        if rng.random() < 0.3:
            self.outputs.append(int(rng.integers(1, len(self.steps) + 1)))

    # -- running -------------------------------------------------------------------------------------------------
    def _call(self, step: Step, x: list[Any]) -> Any:
        a = x[0]
        if step.kind in ("conv", "bn"):
            module = self.get_submodule(step.name)
            return module(input=a) if step.keywords else module(a)
        p: Callable[[str], Any] = lambda key: getattr(self, f"{step.name}_{key}")  # noqa: E731
        if step.kind == "fconv":
            conv = getattr(F, f"conv{self.nd}d")
            b = p("b") if step.extra["bias"] else None
            return conv(a, weight=p("w"), bias=b, padding=1) if step.keywords else conv(a, p("w"), b, 1, 1)
        if step.kind == "fbn":
            g, h = (p("g"), p("h")) if step.extra["affine"] else (None, None)
            eps = {} if step.extra["default_eps"] else {"eps": step.extra["eps"]}
            # statistics that training would write are copies: the reference has no side effects
            m, v = p("m"), p("v")
            if step.keywords:
                return F.batch_norm(input=a, running_var=v, running_mean=m, bias=h, weight=g,
                                    training=step.extra["training"], **eps)
            return F.batch_norm(a, m, v, g, h, step.extra["training"], 0.1, *eps.values())
        return {"relu": F.relu, "add": operator.add, "scale": lambda v: v * 0.5 + 0.25}[step.kind](*x)

    def forward(self, x: Any) -> Any:
        values = [x]
        for step in self.steps:
            values.append(self._call(step, [values[i] for i in step.args]))
        return values[self.outputs[0]] if len(self.outputs) == 1 else tuple(values[i] for i in self.outputs)

    # -- the oracles ---------------------------------------------------------------------------------------------
    def reference(self, x: Any) -> list[Any]:
        """The outputs in float64 by the naive references."""
        values = [np.asarray(x, np.float64)]
        for step in self.steps:
            a = values[step.args[0]]
            if step.kind in ("conv", "bn"):
                y = ref.reference_module(self.get_submodule(step.name), a)
            elif step.kind == "fconv":
                b = getattr(self, f"{step.name}_b") if step.extra["bias"] else None
                y = ref.reference_conv(a, getattr(self, f"{step.name}_w"), b, padding=1)
            elif step.kind == "fbn":
                g, h, m, v = (getattr(self, f"{step.name}_{key}") for key in "ghmv")
                if not step.extra["affine"]:
                    g = h = None
                eps = 1e-5 if step.extra["default_eps"] else step.extra["eps"]
                y = ref.reference_batch_norm(a, m, v, g, h, step.extra["training"], eps=eps)
            elif step.kind == "relu":
                y = np.maximum(a, 0)
            elif step.kind == "add":
                y = a + values[step.args[1]]
            else:
                y = a * 0.5 + 0.25
            values.append(np.asarray(y, np.float64))
        return [values[i] for i in self.outputs]

    def live(self) -> set[int]:
        """Values that an output needs."""
        wanted: set[int] = set()
        todo = list(self.outputs)
        while todo:
            i = todo.pop()
            if i not in wanted:
                wanted.add(i)
                todo += self.steps[i - 1].args if i else ()
        return wanted

    def bn_steps(self) -> list[Step]:
        return [s for s in self.steps if s.kind in ("bn", "fbn")]

    def expected_fused(self, chains: bool) -> int:
        """How many BatchNorm calls have to be fused: in eval mode with statistics, used, directly after a convolution of the
        same form that nothing else uses and that is not returned. With `chains`, what was folded is a convolution again."""
        uses: dict[int, int] = {}
        for step in self.steps:
            for i in set(step.args):
                uses[i] = uses.get(i, 0) + 1
        conv_like: dict[int, str] = {}  # value -> the form of the convolution that makes it
        count = 0
        for number, step in enumerate(self.steps, 1):
            if step.kind in ("conv", "fconv"):
                conv_like[number] = step.kind
            if step.kind not in ("bn", "fbn"):
                continue
            source = step.args[0]
            if conv_like.get(source) != {"bn": "conv", "fbn": "fconv"}[step.kind]:
                continue
            if step.kind == "bn":
                bn = self.get_submodule(step.name)
                ready = not bn.training and bn.running_mean is not None
            else:
                ready = not step.extra["training"]
            alone = uses[source] == 1 and source not in self.outputs
            used = uses.get(number, 0) > 0 or number in self.outputs
            if ready and alone and used:
                count += 1
                if chains:
                    conv_like[number] = conv_like[source]
        return count

    def example(self, rng: np.random.Generator) -> Any:
        return rng.normal(0, 1, (3, CHANNELS, *SPATIAL[self.nd])).astype(self.dtype)
