# SPDX-License-Identifier: BSD-3-Clause
"""What a random program may do: the steps of freezing_fuzz_program."""

from __future__ import annotations

import operator
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pyconvbn import functional as F
from pyconvbn import fx
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from freezing_fuzz_util import C, unknown, unknown_view, unknown_write  # noqa: E402


class Steps:
    """What a random program may do next; `Program` has the state."""

    def conv(self, source: Any = None) -> Any:
        found = source or (self.pick(4, 3, channels=True) if self.chance(0.95) else self.pick(3, 4))
        if found is None:
            return None
        node, value = found
        if self.chance(0.4):
            name = self.one(self.modules[str(value.ndim)] or ["conv_a"])
            args, kw = ((node,), {}) if self.chance(0.8) else ((), {"input": node})
            return self.run("call_module", name, args, kw)
        bias = self.attr("c_") if self.chance(0.5) else None
        if value.ndim == 3:
            w = self.attr("w_1d")
            f = self.one([F.conv1d, aten.conv1d.default, aten.conv_transpose1d.default])
            if f is F.conv1d and self.chance(0.5):
                return self.call(f, node, weight=w, bias=bias, padding=1)
            return self.call(f, node, w, bias, [1], [1])
        form = int(self.rng.integers(7))
        if form == 0:
            return self.call(F.conv2d, node, self.attr("w_a", "w_view", "w_tied", "w_flip"), bias, padding="same")
        if form == 1:
            return self.call(aten.conv2d.default, node, self.attr("w_a", "w_view", "w_tied"), bias, [1, 1], [1, 1])
        if form == 2:
            return self.call(aten.convolution.default, node, self.attr("w_g"), bias, [1, 1], [1, 1], [1, 1], False,
                             [0, 0], 2)
        if form == 3:
            return self.call(aten.convolution.default, node, self.attr("w_g"), bias, [1, 1], [1, 1], [1, 1], True,
                             [0, 0], 2)
        if form == 4:
            return self.call(F.conv_transpose2d, node, self.attr("w_a", "w_flip", "w_1"), bias, padding=0)
        if form == 5:
            return self.call(aten.conv2d.padding, node, self.attr("w_a", "w_tied"), bias, [1, 1], "same")
        return self.call(F.conv2d, node, self.attr("w_1"), bias)

    def batch_norm(self, source: Any = None) -> Any:
        found = source or self.pick(2, 3, 4, channels=True)
        if found is None:
            return None
        node, value = found
        if self.chance(0.4):
            return self.run("call_module", self.one(self.modules.get(f"bn{value.ndim}") or ["bn4_0"]), (node,))
        g, b = (self.attr("c_a", "c_b"), self.attr("c_")) if self.chance(0.8) else (None, None)
        mean, var = self.attr("c_mean", "c_a"), self.attr("c_var")
        training = self.chance(0.05)
        form = int(self.rng.integers(5))
        if form == 0:
            return self.run("call_function", F.batch_norm, (node, mean, var, g, b, training, 0.5, self.eps),
                            writes=training)
        if form == 1:
            return self.run("call_function", F.batch_norm, (node,), {
                "running_var": var, "running_mean": mean, "weight": g, "bias": b, "eps": self.eps})
        if form == 2:
            return self.run("call_function", aten.batch_norm.default,
                            (node, g, b, mean, var, training, 0.5, self.eps, True), writes=training)
        target = aten._native_batch_norm_legit_no_training.default
        if form == 3:
            made = self.call(target, node, g, b, mean, var, 0.5, self.eps)
        else:
            made = self.run("call_function", aten._native_batch_norm_legit.default,
                            (node, g, b, mean, var, training, 0.5, self.eps), writes=True)
        if made is None:
            return None
        return self.call(operator.getitem, made, 0 if self.chance(0.95) else 1)

    def linear(self, source: Any = None) -> Any:
        found = source or (self.pick(2) if self.chance(0.8) else self.pick())
        if found is None:
            return None
        node, value = found
        form = int(self.rng.integers(6))
        if form == 0:
            return self.run("call_module", self.one(self.modules["2"]), (node,))
        bias = self.attr("c_", "k_1") if self.chance(0.5) else None
        if form < 3:
            return self.call(self.one([F.linear, aten.linear.default]), node, self.attr("l_"), bias)
        if form == 3:
            return self.call(aten.mm.default, node, self.attr("l_"))
        if form == 4:
            return self.call(aten.addmm.default, self.attr("c_"), node, self.attr("l_"))
        return self.call(self.one([operator.matmul, aten.matmul.default]), node, self.attr("l_"))

    def parallel(self) -> None:
        found = self.pick(2)
        for _ in range(int(self.rng.integers(2, 4))):
            if found is not None:
                self.linear(found)

    def operand(self) -> Any:
        kind = int(self.rng.integers(5))
        if kind == 0:
            return self.one([2, 1, 0.5, -1, 3, 0, True, 2.0])
        if kind == 1:
            return self.one([np.float32(2), np.float64(0.5), np.int64(2), np.float16(-1), np.asarray(2.0)])
        if kind in (2, 3):
            return self.attr("k_", "c_")
        found = self.pick()
        return 1 if found is None else found[0]

    def binary(self, source: Any = None) -> Any:
        found = source or self.pick()
        if found is None:
            return None
        a, b = found[0], self.operand()
        form = int(self.rng.integers(8))
        simple = [operator.add, operator.sub, operator.mul, operator.add]
        if form < 4:
            return self.call(self.one(simple), *((a, b) if self.chance(0.7) else (b, a)))
        if form == 4:
            return self.call(self.one([operator.truediv, aten.div.Tensor]), a, self.one([2, 4.0, -2, np.float32(2)]))
        is_array = isinstance(b, fx.Node | np.ndarray)
        if form == 5 and is_array:
            return self.call(self.one([aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor]), a, b,
                             alpha=self.one([1, 2, -1]))
        if form == 6 and is_array:
            return self.call(self.one([aten.maximum.default, F.add, F.mul, aten.mul.Tensor, aten.copy.default]), a, b)
        return self.call(self.one([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default]), a, b)

    def activation(self, source: Any = None) -> Any:
        found = source or self.pick()
        if found is None:
            return None
        x = found[0]
        form = int(self.rng.integers(6))
        if form == 0:
            return self.run("call_module", "relu", (x,))
        if form == 1:
            return self.call(self.one([F.relu, aten.relu.default, F.relu6]), x)
        if form == 2:
            return self.call(aten.clamp_min.default, x, 0)
        if form == 3:
            return self.call(F.leaky_relu, x, self.one([0.5, 0.25]))
        if form == 4:
            return self.call(self.one([F.hardswish, F.silu, F.sigmoid, aten.silu.default]), x)
        return self.call(aten.clamp.default, x, self.one([0, -1, None]), self.one([6, 3]))

    def view(self) -> None:
        found = self.pick()
        if found is None:
            return
        x, v = found
        n, size = v.ndim, v.size
        axis = int(self.rng.integers(-n, n)) if n else 0
        form = int(self.rng.integers(14))
        flat = [-1] if size else [0]
        if form == 0:
            shape = self.one([flat, [size // C, C] if size % C == 0 else flat, list(v.shape), [1, *v.shape]])
            self.call(self.one([aten.view.default, aten.reshape.default, aten._unsafe_view.default]), x, shape)
        elif form == 1:
            self.run("call_method", self.one(["reshape", "ravel", "flatten"]), (x, -1) if False else (x,)) \
                if self.chance(0.5) else self.run("call_method", "reshape", (x, -1))
        elif form == 2 and n > 1:
            self.call(aten.transpose.int, x, axis, int(self.rng.integers(n)))
        elif form == 3:
            self.call(aten.permute.default, x, [int(i) for i in self.rng.permutation(n)])
        elif form == 4:
            self.call(aten.slice.Tensor, x, axis, self.one([0, 1, None]), self.one([2, None, -1]), self.one([1, 2]))
        elif form == 5:
            self.call(operator.getitem, x, self.one([slice(None), slice(None, None, -1), 0, (slice(None), slice(1, 3)),
                                                     Ellipsis, None, (Ellipsis, 0)]))
        elif form == 6:
            self.call(aten.expand.default, x, [2, *v.shape]) if self.chance(0.5) else self.call(
                aten.expand.default, x, [2 if s == 1 else s for s in v.shape])
        elif form == 7 and n:
            strides = [s // v.itemsize for s in v.strides]
            self.call(aten.as_strided.default, x, list(v.shape), strides)
        elif form == 8:
            self.call(aten.unsqueeze.default, x, axis)
        elif form == 9:
            self.call(self.one([aten.squeeze.default, aten.detach.default, aten.alias.default, aten.contiguous.default]),
                      x)
        elif form == 10:
            self.call(getattr, x, "T")
        elif form == 11:
            self.call(F.flatten, x, self.one([0, 1]))
        elif form == 12:
            self.call(aten.select.int, x, axis, 0)
        else:
            self.run("call_method", "transpose", (x,))

    def list_of(self) -> None:
        found = self.pick(1, 2, 3, 4)
        if found is None:
            return
        x, v = found
        axis = int(self.rng.integers(-v.ndim, v.ndim))
        target, arg = self.one([(aten.chunk.default, 2), (aten.split.Tensor, 2), (aten.unbind.int, None)])
        parts = self.call(target, x, axis) if arg is None else self.call(target, x, arg, axis)
        if parts is None:
            return
        count = len(self.nodes[-1][1])
        for _ in range(int(self.rng.integers(1, 3))):
            if count:
                self.call(operator.getitem, parts, int(self.rng.integers(count)))
        if self.chance(0.3):
            self.call(aten.cat.default, parts if self.chance(0.5) else [x, x], axis)

    def write(self) -> None:
        found = self.pick() if self.chance(0.7) else None
        x = found[0] if found is not None else self.attr("w_", "c_a", "c_b", "k_", "l_")
        form = int(self.rng.integers(8))
        b = self.operand()
        target, args, op = self.one([
            (aten.add_.Tensor, (x, b), "call_function"), (aten.relu_.default, (x,), "call_function"),
            (operator.iadd, (x, b), "call_function"), (operator.isub, (x, b), "call_function"),
            (operator.imul, (x, self.one([2, -1, 1, 0.5])), "call_function"), ("add_", (x, b), "call_method"),
            (aten.fill_.Scalar, (x, 2), "call_function"), (aten.copy_.default, (x, b), "call_function"),
            (aten.mul_.Tensor, (x, self.one([2, -1, 0.5])), "call_function"),
            (aten.clamp_.default, (x, -1, 2), "call_function"), ("relu_", (x,), "call_method"),
            (aten.leaky_relu_.default, (x, 0.5), "call_function"), ("fill", (x, 1), "call_method"),
        ])
        del form
        self.run(op, target, args, writes=True, keep=target != "fill")

    def set_item(self) -> None:
        found = self.pick(1, 2, 3, 4)
        if found is not None:
            self.run("call_function", operator.setitem, (found[0], self.one([0, slice(0, 1), Ellipsis]), self.operand()),
                     writes=True, keep=False)

    def out(self) -> None:
        found, into = self.pick(), self.pick()
        if found is None or into is None:
            return
        target = self.one([F.relu, F.relu6])
        args: tuple[Any, ...] = (found[0],)
        if self.chance(0.5):
            target, args = self.one([F.add, F.mul]), (found[0], self.operand())
        if self.chance(0.3) and found[1].ndim == 4:
            target, args = F.conv2d, (found[0], self.attr("w_1"))
        self.run("call_function", target, args, {"out": into[0]}, writes=True)

    def module(self) -> None:
        found = self.pick()
        if found is not None:
            self.run("call_module", self.one(self.modules["any"]), (found[0],))

    def strange(self) -> None:
        found = self.pick()
        if found is not None:
            target = self.one([unknown, unknown_view, unknown_write])
            self.run("call_function", target, (found[0],), writes=target is unknown_write)

    def random(self) -> None:
        found = self.pick(dtype=self.dtype)
        if found is not None:
            if self.chance(0.5):
                self.call(F.dropout, found[0], 0.5, self.chance(0.4))
            else:
                r = self.call(aten.rand_like.default, found[0])
                if r is not None and self.chance(0.5):
                    self.call(operator.add, found[0], r)

    def constant(self) -> None:
        a, b = self.attr("w_", "l_", "c_", "k_"), self.operand()
        if isinstance(a, fx.Node):
            form = int(self.rng.integers(7))
            if form < 3:
                self.call(self.one([operator.add, operator.mul, operator.sub, aten.add.Tensor]), a, b)
            elif form == 3:
                self.call(self.one([aten.neg.default, aten.abs.default, aten.relu.default, aten.clone.default]), a)
            elif form == 4:
                self.call(aten.sum.dim_IntList, a, [0], self.chance(0.5))
            elif form == 5:
                self.call(self.one([aten.zeros_like.default, aten.ones_like.default]), a)
            else:
                self.run("call_function", aten.full.default, (self.one([[C], [2, C], [1], []]), 2))

    def pure(self) -> None:
        found = self.pick()
        if found is None:
            return
        x, v = found
        form = int(self.rng.integers(9))
        if form == 0:
            self.call(F.max_pool2d, x, 3, 1, 1)
        elif form == 1:
            self.call(aten.sum.dim_IntList, x, [0] if v.ndim else [], self.chance(0.5))
        elif form == 2:
            self.call(aten.neg.default, x)
        elif form == 3:
            self.call(aten.clone.default, x)
        elif form == 4:
            self.call(F.pad, x, [1, 1])
        elif form == 5:
            self.run("call_function", aten.gt.Scalar, (x, 0), jumps=True)
        elif form == 6:
            self.call(aten.cat.default, [x, x], 0)
        elif form == 7:
            self.run("call_function", aten.round.default, (x,), jumps=True)
        else:
            self.call(aten.where.self, x, x, x)

    def cast(self) -> None:
        found = self.pick()
        if found is not None:
            dtype = self.one([np.float32, np.float64, np.float16, np.int64])
            if dtype is np.int64:
                self.run("call_method", "astype", (found[0], dtype), jumps=True)
            else:
                self.run("call_method", "astype", (found[0], dtype))

    def again(self) -> None:
        """An earlier call once more, to be merged or not."""
        old = [n for n, _ in self.nodes if n.op.startswith("call")]
        if old:
            n = self.one(old)
            self.run(n.op, n.target, tuple(n.args), dict(n.kwargs), writes=True)

    def chain(self) -> None:
        """What networks are made of: layer, BatchNorm, arithmetic, activation, residual."""
        start = self.pick(4, 3, 2, channels=True)
        if start is None:
            return
        make = self.linear if start[1].ndim == 2 else self.conv
        parts = [make]
        for _ in range(int(self.rng.integers(1, 5))):
            parts.append(self.one([self.batch_norm, self.binary, self.activation, self.batch_norm]))
        current: Any = start
        for part in parts:
            count = len(self.nodes)
            node = part(current)
            if node is None:
                continue
            found = next((pair for pair in reversed(self.nodes[count:]) if pair[0] is node), None)
            if found is not None and isinstance(found[1], np.ndarray):
                current = found
        if self.chance(0.3) and current is not start:
            self.call(operator.add, current[0], start[0])

    def _result(self) -> Any:
        fit = [n for n, v in self.nodes if n.op.startswith("call")] or [n for n, _ in self.nodes]
        if self.chance(0.2):
            fit = [n for n, _ in self.nodes]
        last = fit[-1]
        form = int(self.rng.integers(5))
        if form < 2:
            return last
        if form == 2:
            return (last, self.one(fit))
        if form == 3:
            return {"a": last, "b": [self.one(fit), (self.one(fit), 3)]}
        return [last, self.one(fit), self.one(fit)]
