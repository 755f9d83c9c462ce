# SPDX-License-Identifier: BSD-3-Clause
"""The networks of networks.py in pyconvbn, ONNX Runtime and OpenVINO, and their float64 truth."""

import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
from networks import Network, Step
from numpy.typing import NDArray

Call = tuple[Callable[[], Any], Callable[[Any], Any]]
_BOUNDS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def truth(net: Network, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 evaluation: by PyTorch if it is installed, else by pyconvbn's reference row (slow, double throughout)."""
    try:
        import torch
    except ImportError:
        return own_double(net, x)
    functional, values = torch.nn.functional, {0: torch.from_numpy(x.astype(np.float64))}
    with torch.inference_mode():
        for number, step in enumerate(net.steps[1:], 1):
            source = [values[i] for i in step.sources]
            nd = len(step.shape) - 2
            if step.kind in ("conv", "linear"):
                w, b = (torch.from_numpy(a.astype(np.float64)) for a in (step.weight, step.bias))
                if step.kind == "linear":
                    y = functional.linear(source[0].flatten(1), w, b)
                else:
                    g = step.geometry
                    name = f"conv_transpose{nd}d" if g["transposed"] else f"conv{nd}d"
                    y = getattr(functional, name)(source[0], w, b, g["stride"], g["padding"], groups=g["groups"])
                if step.residual is not None:
                    y = y + values[step.residual]
                y = y.clamp(*_BOUNDS[step.activation])
            elif step.kind == "max_pool":
                g = step.geometry
                y = getattr(functional, f"max_pool{nd}d")(source[0], g["kernel"], g["stride"], g["padding"])
            elif step.kind == "global_pool":
                y = source[0].flatten(2).mean(2)
            else:
                y = torch.cat(source, 1)
            values[number] = y
            for old in _dead_after(net, number):
                values.pop(old, None)
    return values[len(net.steps) - 1].numpy()


def own_double(net: Network, x: NDArray[np.float32]) -> NDArray[np.float64]:
    import pyconvbn
    from pyconvbn import functional

    values: dict[int, Any] = {0: x.astype(np.float64)}
    for number, step in enumerate(net.steps[1:], 1):
        source = [values[i] for i in step.sources]
        if step.kind in ("conv", "linear"):
            plan = pyconvbn.Plan(step.weight.astype(np.float64), step.bias.astype(np.float64),
                                 activation=step.activation, **_plan_geometry(step))
            flat = source[0].reshape(len(x), -1) if step.kind == "linear" else source[0]
            values[number] = plan(flat, residual=None if step.residual is None else values[step.residual])
        else:
            values[number] = _other(functional, step, source, None)().reshape(step.shape)
    return values[len(net.steps) - 1]


def _dead_after(net: Network, number: int) -> list[int]:
    """Values whose last reader is step `number`."""
    last = {}
    for at, step in enumerate(net.steps):
        for source in (*step.sources, *([step.residual] if step.residual is not None else [])):
            last[source] = at
    return [value for value, at in last.items() if at == number]


def _plan_geometry(step: Step) -> dict[str, Any]:
    if step.kind == "linear":
        return {}
    return {name: step.geometry[name] for name in ("stride", "padding", "groups", "transposed")}


def _other(functional: Any, step: Step, source: list[Any], out: Any) -> Callable[[], Any]:
    """What is left to call at each pass."""
    nd = source[0].ndim - 2
    if step.kind == "max_pool":
        g, pool = step.geometry, getattr(functional, f"max_pool{nd}d")
        return lambda: pool(source[0], g["kernel"], g["stride"], g["padding"], out=out)
    if step.kind == "global_pool":
        mean = getattr(functional, f"adaptive_avg_pool{nd}d")
        y = None if out is None else out.reshape(*out.shape, *[1] * nd)
        return lambda: mean(source[0], 1, out=y)
    return lambda: functional.cat(source, 1, out=out)


class Ours:
    """One plan a layer. Every result has a place in a few buffers that are used again as soon as nobody reads them."""

    key = "ours"

    def __init__(self, threads: int, precision: str, tune: bool) -> None:
        import pyconvbn
        from pyconvbn import _core, functional

        self.pyconvbn, self.functional, self.precision, self.tune = pyconvbn, functional, precision, tune
        self.testing, self.build = _core._testing, _core.build_info()
        self.isa = _core.cpu_info()["isa_active"]
        pyconvbn.set_num_threads(threads)
        self.versions = {"pyconvbn": pyconvbn.__version__}
        self.calls: list[tuple[int, Callable[[], Any]]] = []
        self.plans: dict[int, Any] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}

    def prepare(self, net: Network, x: NDArray[np.float32]) -> Call:
        values, self.calls, self.plans = self._place(net, x), [], {}
        for number, step in enumerate(net.steps[1:], 1):
            out, source = values[number], [values[i] for i in step.sources]
            if step.kind in ("conv", "linear"):
                arg = source[0].reshape(len(x), -1) if step.kind == "linear" else source[0]
                plan = self.pyconvbn.Plan(step.weight, step.bias, activation=step.activation, precision=self.precision,
                                          input_shape=arg.shape, tune=self.tune, **_plan_geometry(step))
                self.plans[number], self.shapes[number] = plan, arg.shape
                residual = None if step.residual is None else values[step.residual]
                self.calls.append((number, lambda p=plan, a=arg, r=residual, o=out: p(a, residual=r, out=o)))
            elif step.kind == "concat" and all(np.shares_memory(part, out) for part in source):
                continue  # its parts were written in place
            else:
                self.calls.append((number, _other(self.functional, step, source, out)))
        order = [call for _, call in self.calls]

        def run() -> None:
            for call in order:
                call()

        return run, lambda _: values[len(net.steps) - 1].copy()

    @staticmethod
    def _place(net: Network, x: NDArray[np.float32]) -> dict[int, Any]:
        """An array for every step. Of one image the parts of a concatenation lie in its result from the start."""
        from problem import aligned_empty

        inside: dict[int, tuple[int, int]] = {}
        for number, step in enumerate(net.steps):
            if step.kind == "concat" and len(x) == 1:
                channel = 0
                for part in step.sources:
                    inside[part] = number, channel
                    channel += net.steps[part].shape[1]
        values: dict[int, Any] = {0: x}
        free: list[NDArray[np.float32]] = []
        held: dict[int, NDArray[np.float32]] = {}

        def place(number: int) -> NDArray[np.float32]:
            if number in values:
                return values[number]
            shape = net.steps[number].shape
            if number in inside:
                whole, channel = inside[number]
                values[number] = place(whole)[:, channel:channel + shape[1]]
                return values[number]
            size = math.prod(shape)
            fitting = [block for block in free if block.size >= size]
            block = min(fitting, key=lambda b: b.size) if fitting else aligned_empty((size,))
            free[:] = [b for b in free if b is not block]
            held[number] = block
            values[number] = block[:size].reshape(shape)
            return values[number]

        readers: dict[int, int] = {}
        for at, step in enumerate(net.steps):
            for source in (*step.sources, *([step.residual] if step.residual is not None else [])):
                readers[source] = at
                if source in inside:  # the block belongs to the concatenation
                    readers[inside[source][0]] = max(readers.get(inside[source][0], 0), at)
        for number in range(1, len(net.steps)):
            place(number)
            for value, at in readers.items():
                if at == number and value in held:
                    free.append(held.pop(value))
        return values

    def profile(self) -> dict[int, float]:
        """Median microseconds of every step, measured while the whole chain runs."""
        samples: dict[int, list[float]] = {number: [] for number, _ in self.calls}
        for _ in range(9):
            for number, call in self.calls:
                start = time.perf_counter()
                call()
                samples[number].append(time.perf_counter() - start)
        return {number: 1e6 * sorted(times)[len(times) // 2] for number, times in samples.items()}

    def algorithms(self) -> dict[int, str]:
        return {number: str(plan.explain(self.shapes[number])["algorithm"]) for number, plan in self.plans.items()}


class OnnxRuntime(peers.OnnxRuntime):
    def model(self, net: Network) -> bytes:
        helper, f32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        nodes, weights = [], []

        def node(kind: str, number: int, inputs: list[str], result: str, **attributes: Any) -> None:
            nodes.append(helper.make_node(kind, inputs, [result], name=f"step{number}_{kind}", **attributes))

        for number, step in enumerate(net.steps[1:], 1):
            source, result, g = [f"v{i}" for i in step.sources], f"v{number}", step.geometry
            if step.kind in ("conv", "linear"):
                for name, value in (("w", step.weight), ("b", step.bias)):
                    weights.append(self.onnx.numpy_helper.from_array(value, f"{name}{number}"))
                # The last operator of the step writes its result.
                stages = ["first"] + ["Add"] * (step.residual is not None) + ["act"] * (step.activation is not None)
                names = [f"{result}_{i}" for i in range(len(stages) - 1)] + [result]
                arguments = [source[0], f"w{number}", f"b{number}"]
                if step.kind == "linear":
                    if len(net.steps[step.sources[0]].shape) > 2:
                        node("Flatten", number, source, f"{result}_flat")
                        arguments[0] = f"{result}_flat"
                    node("Gemm", number, arguments, names[0], transB=1)
                else:
                    node("ConvTranspose" if g["transposed"] else "Conv", number, arguments, names[0],
                         strides=g["stride"], pads=g["padding"] * 2, group=g["groups"], kernel_shape=g["kernel"])
                if step.residual is not None:
                    node("Add", number, [names[0], f"v{step.residual}"], names[1])
                if step.activation == "relu":
                    node("Relu", number, [names[-2]], result)
                elif step.activation == "relu6":
                    node("Clip", number, [names[-2], "zero", "six"], result)
            elif step.kind == "max_pool":
                node("MaxPool", number, source, result, kernel_shape=g["kernel"], strides=g["stride"], pads=g["padding"] * 2)
            elif step.kind == "global_pool":
                node("GlobalAveragePool", number, source, f"{result}_maps")
                node("Flatten", number, [f"{result}_maps"], result)
            else:
                node("Concat", number, source, result, axis=1)
        for name, value in (("zero", 0.0), ("six", 6.0)):
            weights.append(self.onnx.numpy_helper.from_array(np.float32(value), name))
        last = len(net.steps) - 1
        graph = helper.make_graph(
            nodes, net.name, [helper.make_tensor_value_info("v0", f32, net.steps[0].shape)],
            [helper.make_tensor_value_info(f"v{last}", f32, net.steps[last].shape)], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return model.SerializeToString()

    def prepare(self, net: Network, x: NDArray[np.float32]) -> Call:
        self.bytes, self.x = self.model(net), x
        session = self.session(self.bytes)
        binding = session.io_binding()
        y = self.ort.OrtValue.ortvalue_from_numpy(np.empty(net.steps[-1].shape, np.float32))
        binding.bind_ortvalue_input("v0", self.ort.OrtValue.ortvalue_from_numpy(x))
        binding.bind_ortvalue_output(f"v{len(net.steps) - 1}", y)
        return lambda: session.run_with_iobinding(binding), lambda _: y.numpy()

    def profile(self) -> dict[int, float]:
        """Microseconds of every step as ONNX Runtime's own profile has them; reorders belong to no step."""
        session = self.session(self.bytes, str(Path(tempfile.mkdtemp()) / "ort"))
        runs = 6
        for _ in range(runs):
            session.run(None, {"v0": self.x})
        path = Path(session.end_profiling())
        events = json.loads(path.read_text())
        shutil.rmtree(path.parent)
        samples: dict[tuple[int, str], list[float]] = {}
        for event in events:
            # A node keeps its name, or gets that of its result where layouts were changed (v12_0_nchwc).
            # Flatten is a view; the product beside it may have got another name.
            found = re.match(r"(?:step|v)(\d+)_(?!Flatten|flat).*kernel_time$", event.get("name", ""))
            if event.get("cat") == "Node" and found:
                samples.setdefault((int(found[1]), event["name"]), []).append(event["dur"])
        return _summed(samples)


def _summed(samples: dict[tuple[int, str], list[float]]) -> dict[int, float]:
    """Medians of the operators of a step, added up. What runs inside of another operator takes no time of its own."""
    steps: dict[int, float] = {}
    for (number, _), times in samples.items():
        steps[number] = steps.get(number, 0.0) + sorted(times)[len(times) // 2]
    return {number: time for number, time in steps.items() if time > 0}


class OpenVino(peers.OpenVino):
    def model(self, net: Network) -> Any:
        from openvino import opset13 as op

        parameter = op.parameter(net.steps[0].shape, np.float32)
        values: dict[int, Any] = {0: parameter}
        for number, step in enumerate(net.steps[1:], 1):
            source, g = [values[i] for i in step.sources], step.geometry
            if step.kind == "linear":
                flat = op.reshape(source[0], np.array([step.shape[0], -1]), False)
                y = op.matmul(flat, op.constant(step.weight), False, True)
                y.set_friendly_name(f"step{number}_main")
                y = op.add(y, op.constant(step.bias[None]))
            elif step.kind == "conv":
                w, groups = step.weight, g["groups"]
                if groups > 1:
                    w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
                pads = list(g["padding"])
                make = {(False, False): op.convolution, (False, True): op.group_convolution,
                        (True, False): op.convolution_backprop_data,
                        (True, True): op.group_convolution_backprop_data}[g["transposed"], groups > 1]
                y = make(source[0], op.constant(w), strides=list(g["stride"]), pads_begin=pads, pads_end=pads,
                         dilations=[1] * len(pads))
                y.set_friendly_name(f"step{number}_main")
                y = op.add(y, op.constant(step.bias.reshape(1, -1, *[1] * len(pads))))
            elif step.kind == "max_pool":
                pads = list(g["padding"])
                y = op.max_pool(source[0], list(g["stride"]), [1] * len(pads), pads, pads, list(g["kernel"])).output(0)
            elif step.kind == "global_pool":
                axes = np.arange(2, len(net.steps[step.sources[0]].shape))
                y = op.reduce_mean(source[0], op.constant(axes), False)
            else:
                y = op.concat(source, 1)
            if step.residual is not None:
                y = op.add(y, values[step.residual])
            if step.activation == "relu":
                y = op.relu(y)
            elif step.activation == "relu6":
                y = op.clamp(y, 0.0, 6.0)
            if step.kind not in ("conv", "linear"):
                (y.get_node() if hasattr(y, "get_node") else y).set_friendly_name(f"step{number}_{step.kind}")
            values[number] = y
        return self.ov.Model([op.result(values[len(net.steps) - 1])], [parameter], net.name)

    def prepare(self, net: Network, x: NDArray[np.float32]) -> Call:
        self.graph, self.x = self.model(net), x
        request = self.request(self.graph, x)
        return lambda: request.infer(share_outputs=True), lambda _: request.get_output_tensor().data.copy()

    def profile(self) -> dict[int, float]:
        """Microseconds of every step as OpenVINO's own counters have them; reorders belong to no step."""
        request = self.request(self.graph, self.x, PERF_COUNT="YES")
        samples: dict[tuple[int, str], list[float]] = {}
        for _ in range(6):
            request.infer(share_outputs=True)
            for entry in request.get_profiling_info():
                found = re.match(r"step(\d+)_", entry.node_name)
                if found:
                    samples.setdefault((int(found[1]), entry.node_name), []).append(entry.real_time.total_seconds() * 1e6)
        return _summed(samples)


def load_peers(names: str, threads: int) -> tuple[list[Any], dict[str, str]]:
    """The peers that can be had, and for the others why not. ValueError for an unknown name."""
    known = {peer.key: peer for peer in (OnnxRuntime, OpenVino)}
    wanted = list(known) if names == "all" else [] if names == "none" else names.split(",")
    found, missing = [], {}
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown peer {name!r}, have {', '.join(known)}")
        try:
            found.append(known[name](threads))
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
