# SPDX-License-Identifier: BSD-3-Clause
"""A random program, built node by node while it runs: see freezing_fuzz_util."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pyconvbn import fx, nn

sys.path.insert(0, str(Path(__file__).parent))
from freezing_fuzz_steps import Steps  # noqa: E402
from freezing_fuzz_util import C, Reads, Scale, Shouting, arrays_of, hook, leaves, on_grid, small  # noqa: E402


class Program(Steps):
    """`gm`, the module `root` that it reads, and inputs to call it with."""

    def __init__(self, seed: int, length: int | None = None) -> None:
        self.rng = np.random.default_rng([seed, 7])
        rng = self.rng
        self.dtype = np.dtype(self.one([np.float32, np.float32, np.float64, np.float16]))
        self.g = fx.Graph()
        self.nodes: list[tuple[Any, Any]] = []  # (node, value)
        self.done = False
        self.made = 0
        self.root = nn.Module()
        self.params: list[str] = []
        self._members()
        shapes: list[tuple[int, ...]] = [(2, C, 5, 5)]
        if rng.random() < 0.5:
            shapes.append((2, C, 5, 5))
        if rng.random() < 0.6:
            shapes.append((3, C))
        if rng.random() < 0.3:
            shapes.append((2, C, 6))
        self.specs = [(s, self.dtype if rng.random() < 0.9 else np.dtype(np.int64)) for s in shapes]
        self.specs[0] = (shapes[0], self.dtype)
        self.strided = [int(rng.integers(0, 5)) for _ in shapes]
        self.literals: list[Any] = []
        self.example = self.inputs(0)
        for i, value in enumerate(self.example_copy()):
            self.nodes.append((self.g.placeholder(f"in{i}"), value))
        self.values_in = [value for _, value in self.nodes]
        before = {k: v.copy() for k, v in arrays_of(self.root).items()}
        steps = int(rng.integers(2, 16)) if length is None else length
        with np.errstate(all="ignore"):
            tries = 0
            while self.made < steps and not self.done and tries < 8 * steps:
                tries += 1
                self.step()
        for k, v in arrays_of(self.root).items():
            v[...] = before[k]
        for literal, was in self.literals:
            literal[...] = was
        self.g.output(self._result())
        self.root.eval()
        for name in self.training:
            self.root.get_submodule(name).train()
        self.gm = fx.GraphModule(self.root, self.g)
        self.gm.graph.lint()

    # -- choices -------------------------------------------------------------------------------------------------------
    def one(self, items: Any) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def ints(self, shape: Any, dtype: Any = None, low: int = -2, high: int = 3) -> Any:
        return self.rng.integers(low, high, shape).astype(self.dtype if dtype is None else dtype)

    # -- members -------------------------------------------------------------------------------------------------------
    def _member(self, name: str, array: Any, param: bool | None = None) -> Any:
        if (self.chance(0.5) if param is None else param) and array.dtype.kind == "f":
            setattr(self.root, name, nn.Parameter(array))
        else:
            self.root.register_buffer(name, array)
        self.params.append(name)
        return getattr(self.root, name)

    def _members(self) -> None:
        rng, dtype = self.rng, self.dtype
        self.training: list[str] = []
        m = self._member
        big = self.ints((2 * C * C * 9,))
        base = m("w_big", big)
        m("w_a", self.ints((C, C, 3, 3)))
        if self.chance(0.5):
            m("w_view", np.asarray(base)[:C * C * 9].reshape(C, C, 3, 3), False)
        if self.chance(0.3):
            m("w_tied", self.root.w_a, None)
        if self.chance(0.3):
            m("w_flip", np.asarray(self.root.w_a)[::-1], False)
        m("w_1", self.ints((C, C, 1, 1)))
        m("w_g", self.ints((C, 2, 3, 3)))
        m("w_1d", self.ints((C, C, 3)))
        m("l_a", self.ints((C, C)))
        m("l_b", self.ints((C, C)) if self.chance(0.5) else np.asarray(self.root.l_a)[::-1])
        m("l_c", self.ints((C, C)) if self.chance(0.5) else np.asarray(self.root.l_a).T)
        for name in ("c_a", "c_b", "c_mean"):
            m(name, self.ints((C,)))
        self.eps = float(self.one([0.25, 1.0, 0.0625]))
        m("c_var", (self.one([[1, 4, 4, 1], [1, 1, 1, 1], [4, 16, 4, 1]]) - np.full(C, self.eps)).astype(dtype), False)
        m("k_0d", np.asarray(2, self.one([dtype, np.float32, np.float64, np.int64])))
        m("k_1", self.ints((1,)))
        m("k_c11", self.ints((C, 1, 1)))
        m("k_1c11", self.ints((1, C, 1, 1), self.one([dtype, dtype, np.float64, np.float16, np.int64])))
        m("k_full", self.ints((2, C, 5, 5)))
        self.modules: dict[str, list[str]] = {"4": [], "3": [], "2": [], "bn4": [], "bn3": [], "bn2": [], "any": []}
        self._layers()
        del rng

    def _layers(self) -> None:
        r, dtype = self.root, self.dtype

        def add(kind: str, name: str, module: Any) -> None:
            setattr(r, name, module)
            for p in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if isinstance(p, np.ndarray):
                    p[...] = self.ints(p.shape)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean[...] = self.ints(C)
                module.running_var[...] = np.asarray(self.one([[1, 4, 4, 1], [4, 16, 1, 1]])) - module.eps
                if module.weight is not None:
                    module.weight[...] = np.asarray(self.one([[1, 2, -1, 2], [1, 1, 0, 1]]))
            if self.chance(0.06):
                module.register_forward_hook(hook)
            self.modules[kind].append(name)

        bias = lambda: self.chance(0.5)  # noqa: E731
        mode = self.one(["zeros", "zeros", "reflect", "circular"])
        add("4", "conv_a", nn.Conv2d(C, C, 3, padding=1, bias=bias(), dtype=dtype, padding_mode=mode))
        add("4", "conv_b", nn.Conv2d(C, C, 1, groups=self.one([1, 2, 4]), bias=bias(), dtype=dtype))
        add("4", "conv_t", nn.ConvTranspose2d(C, C, 3, padding=1, groups=self.one([1, 2]), bias=bias(), dtype=dtype))
        if self.chance(0.3):
            add("4", "conv_own", Shouting(C, C, 1, dtype=dtype))
        if self.chance(0.3):  # two layers on one weight
            r.conv_a2 = nn.Conv2d(C, C, 3, padding=1, dtype=dtype)
            r.conv_a2.weight = r.conv_a.weight if self.chance(0.5) else r.w_a
            r.conv_a2.bias[...] = self.ints(C)
            self.modules["4"].append("conv_a2")
        add("3", "conv_1d", nn.Conv1d(C, C, 3, padding=1, bias=bias(), dtype=dtype))
        add("2", "fc_a", nn.Linear(C, C, bias=bias(), dtype=dtype))
        add("2", "fc_b", nn.Linear(C, C, bias=bias(), dtype=dtype))
        if self.chance(0.3):
            r.fc_b.weight = r.l_a
        for nd, cls in (("4", nn.BatchNorm2d), ("3", nn.BatchNorm1d), ("2", nn.BatchNorm1d)):
            for i in range(2):
                affine = self.chance(0.8)
                track = self.chance(0.93)
                add(f"bn{nd}", f"bn{nd}_{i}",
                    cls(C, eps=self.eps, affine=affine, track_running_stats=track, dtype=dtype))
                if self.chance(0.05):
                    self.training.append(f"bn{nd}_{i}")
        r.relu, r.drop, r.same = nn.ReLU(), nn.Dropout(), nn.Identity()
        self.modules["any"] += ["relu", "drop", "same"]
        if self.chance(0.3):
            r.user = Scale(dtype)
            self.modules["any"].append("user")
        if self.chance(0.3):
            r.reads = Reads(self.one([r.w_a, r.conv_a.weight, r.c_a]))
            self.modules["any"].append("reads")
        if self.chance(0.1):
            self.training.append("drop")

    # -- inputs --------------------------------------------------------------------------------------------------------
    def inputs(self, number: int, batch: int | None = None, strides: bool = True) -> list[Any]:
        """Number 0 is the example; another batch size on request."""
        rng = np.random.default_rng([number, 3])
        found = []
        for (shape, dtype), form in zip(self.specs, self.strided, strict=True):
            if batch is not None:
                shape = (batch, *shape[1:])
            value = rng.integers(-3, 4, shape).astype(dtype)
            found.append(_laid_out(value, form if strides else number % 5))
        return found

    def example_copy(self) -> list[Any]:
        return self.inputs(0)

    # -- steps ---------------------------------------------------------------------------------------------------------
    def pick(self, *ndims: int, dtype: Any = None, channels: bool = False) -> tuple[Any, Any] | None:
        fit = [
            (n, v) for n, v in self.nodes if isinstance(v, np.ndarray) and (not ndims or v.ndim in ndims)
            and (dtype is None or v.dtype == dtype) and (not channels or (v.ndim > 1 and v.shape[1] == C))
        ]
        if not fit:
            return None
        recent = fit[-4:] if self.chance(0.7) else fit
        return self.one(recent)

    def run(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *,
            writes: bool = False, jumps: bool = False, keep: bool = True) -> Any:
        """Adds the node if it runs on the values met so far."""
        kwargs = kwargs or {}
        values = {node: value for node, value in self.nodes}
        concrete = lambda a: fx.node.map_arg(a, lambda n: values[n])  # noqa: E731
        try:
            cargs, ckwargs = concrete(args), concrete(kwargs)
        except KeyError:
            return None
        if jumps and not all(on_grid(v) for v in leaves((cargs, ckwargs)) if isinstance(v, np.ndarray | np.generic)):
            return None
        saved = [(a, a.copy()) for a in leaves((cargs, ckwargs)) if isinstance(a, np.ndarray)] if writes else []
        try:
            if op == "call_function":
                result = target(*cargs, **ckwargs)
            elif op == "call_method":
                result = getattr(cargs[0], target)(*cargs[1:], **ckwargs)
            elif op == "call_module":
                was = {k: v.copy() for k, v in arrays_of(self.root).items()}
                module = self.root.get_submodule(target)
                module.eval()
                if target in self.training:
                    module.train()
                result = module(*cargs, **ckwargs)
                del was
            else:
                result = getattr(self.root, target)
        except (ValueError, TypeError, IndexError, NotImplementedError, AttributeError):
            for a, was in saved:
                if a.flags.writeable:
                    a[...] = was
            return None
        if not small(result) or not all(small(v) for v in self.values_in):
            if writes:
                for a, was in saved:
                    if a.flags.writeable:
                        a[...] = was
            return None
        if op == "get_attr":
            node = self.g.get_attr(target)
        else:
            node = self.g.create_node(op, target, args, kwargs)
        self.made += 1
        if keep:
            self.nodes.append((node, result))
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run("call_function", target, args, kwargs)

    def attr(self, *prefixes: str) -> Any:
        """A parameter as a node, or (rarely) as the array itself or as a literal of its own."""
        names = [n for n in self.params if n.startswith(prefixes)]
        name = self.one(names)
        array = getattr(self.root, name)
        if self.chance(0.08):
            own = np.array(array)
            self.literals.append((own, own.copy()))
            return own
        if self.chance(0.04):
            return array
        for node, value in self.nodes:  # often the very node once more
            if value is array and self.chance(0.5):
                return node
        node = self.g.get_attr(name)
        self.nodes.append((node, array))
        return node

    def step(self) -> None:
        kinds = {
            self.conv: 5, self.batch_norm: 4, self.linear: 3, self.binary: 5, self.activation: 4, self.view: 4,
            self.write: 2, self.out: 0.5, self.list_of: 1, self.module: 1.5, self.strange: 1, self.random: 0.4,
            self.constant: 2, self.pure: 2, self.again: 1.5, self.set_item: 0.4, self.chain: 5, self.parallel: 1,
            self.cast: 0.7,
        }
        weights = np.asarray(list(kinds.values()))
        list(kinds)[int(self.rng.choice(len(kinds), p=weights / weights.sum()))]()


def _laid_out(value: Any, form: int) -> Any:
    """The same numbers with other strides."""
    if form == 1 and value.ndim > 1:
        return np.asfortranarray(value)
    if form == 2 and value.ndim == 4:
        return np.ascontiguousarray(value.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if form == 3 and value.size:
        wide = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
        wide[..., ::2] = value
        return wide[..., ::2]
    return value
