# SPDX-License-Identifier: BSD-3-Clause
"""The rivals: each gets the folded parameters, its favourite layout and everything prepared that it can prepare.

A peer is a class with `key` (for the command line), `title`, a constructor that takes the number of threads and
raises ImportError when its library is missing, `versions`, and `prepare(problem, reuse_out)`, which returns the call
to be timed and a function that turns that call's result into an ndarray laid out as the reference.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from layers import Layer
from problem import Floats, Problem

Prepared = tuple[Callable[[], Any], Callable[[Any], Floats]]


class Unsupported(Exception):
    """This peer has no such layer."""


class Peer(Protocol):
    key: str
    title: str
    versions: dict[str, str]

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared: ...


class _Torch:
    def __init__(self, threads: int) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        # Some builds may lower float32 matrix products to bfloat16 or TF32 when told so; never here.
        torch.set_float32_matmul_precision("highest")
        with contextlib.suppress(RuntimeError):  # settable once a process
            torch.set_num_interop_threads(1)
        # Entered for good: per-call contexts would be timed.
        torch.inference_mode().__enter__()
        self.versions = {"torch": torch.__version__}

    def tensors(self, problem: Problem) -> tuple[Any, Any, Any]:
        torch = self.torch
        return (torch.from_numpy(problem.x), torch.from_numpy(problem.folded_weight),
                torch.from_numpy(problem.folded_bias))

    def operator(self, layer: Layer, nd: int) -> Callable[..., Any]:
        functional = self.torch.nn.functional
        return getattr(functional, f"conv_transpose{nd}d" if layer.transposed else f"conv{nd}d")


def _fetch_torch(shape: tuple[int, ...]) -> Callable[[Any], Floats]:
    def fetch(y: Any) -> Floats:
        return (y.to_dense() if y.is_mkldnn else y).contiguous().reshape(shape).numpy()
    return fetch


def _conv_arguments(layer: Layer, pad_axes: int = 0) -> tuple[Any, ...]:
    """Positional arguments after (x, w, b), with `pad_axes` unit axes in front."""
    stride = (1,) * pad_axes + layer.stride
    padding = (0,) * pad_axes + layer.padding
    dilation = (1,) * pad_axes + layer.dilation
    if layer.transposed:
        return stride, padding, (0,) * pad_axes + layer.output_padding, layer.groups, dilation
    return stride, padding, dilation, layer.groups


class TorchEager(_Torch):
    key, title = "eager", "PyTorch eager, NCHW"

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        layer = problem.layer
        x, w, b = self.tensors(problem)
        fetch = _fetch_torch(layer.output_shape)
        if layer.nd == 0:
            linear = self.torch.nn.functional.linear
            return lambda: linear(x, w, b), fetch
        operator, arguments = self.operator(layer, layer.nd), _conv_arguments(layer)
        return lambda: operator(x, w, b, *arguments), fetch


class TorchChannelsLast(_Torch):
    key, title = "cl", "PyTorch eager, channels_last"

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        torch, layer = self.torch, problem.layer
        if layer.nd == 0:
            raise Unsupported("a linear layer has no channels-last layout")
        x, w, b = self.tensors(problem)
        unit = int(layer.nd == 1)  # PyTorch has no 1-D channels_last: one more axis of size 1
        if unit:
            x, w = x.unsqueeze(2), w.unsqueeze(2)
        memory_format = torch.channels_last_3d if layer.nd == 3 else torch.channels_last
        x = x.contiguous(memory_format=memory_format)
        w = w.contiguous(memory_format=memory_format)
        operator, arguments = self.operator(layer, layer.nd + unit), _conv_arguments(layer, unit)
        return lambda: operator(x, w, b, *arguments), _fetch_torch(layer.output_shape)


class TorchPacked(_Torch):
    """Weights reordered once for oneDNN: what PyTorch's own compiler emits after freezing."""

    key, title = "mkldnn", "PyTorch oneDNN, packed weights"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if not self.torch.backends.mkldnn.is_available():
            raise ImportError("this PyTorch build has no oneDNN")

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        torch, layer, ops = self.torch, problem.layer, self.torch.ops.mkldnn
        x, w, b = self.tensors(problem)
        fetch = _fetch_torch(layer.output_shape)
        if layer.nd == 0:
            packed = ops._reorder_linear_weight(w, layer.n)
            linear = ops._linear_pointwise
            return lambda: linear(x, packed, b, "none", [], ""), fetch
        unit = int(layer.nd == 1)
        if unit:
            x, w = x.unsqueeze(2), w.unsqueeze(2)
        memory_format = torch.channels_last_3d if layer.nd == 3 else torch.channels_last
        x = x.contiguous(memory_format=memory_format)
        axes = layer.nd + unit
        if layer.transposed:
            if axes != 2:
                raise Unsupported("packed transposed convolution is 2-D only")
            stride, padding, extra, groups, dilation = _conv_arguments(layer, unit)
            packed = ops._reorder_convolution_transpose_weight(
                w, padding, extra, stride, dilation, groups, x.shape)
            operator = ops._convolution_transpose_pointwise
            arguments = (padding, extra, stride, dilation, groups, "none", [], "")
        else:
            stride, padding, dilation, groups = _conv_arguments(layer, unit)
            if axes == 3:
                packed = torch._C._nn.mkldnn_reorder_conv3d_weight(
                    w.to_mkldnn(), padding, stride, dilation, groups, x.shape)
            else:
                packed = ops._reorder_convolution_weight(w, padding, stride, dilation, groups, x.shape)
            operator = ops._convolution_pointwise
            arguments = (padding, stride, dilation, groups, "none", [], "")
        return lambda: operator(x, packed, b, *arguments), fetch


class OnnxRuntime:
    key, title = "ort", "ONNX Runtime"

    def __init__(self, threads: int) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.ort, self.threads = onnx, onnxruntime, threads
        self.versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def model(self, problem: Problem) -> bytes:
        layer, helper, f32 = problem.layer, self.onnx.helper, self.onnx.TensorProto.FLOAT
        if layer.nd == 0:
            node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
        else:
            attributes = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups,
                          "pads": layer.padding * 2, "kernel_shape": layer.kernel}
            if layer.transposed:
                attributes["output_padding"] = layer.output_padding
            kind = "ConvTranspose" if layer.transposed else "Conv"
            node = helper.make_node(kind, ["x", "w", "b"], ["y"], **attributes)
        from_array = self.onnx.numpy_helper.from_array
        graph = helper.make_graph(
            [node], "layer", [helper.make_tensor_value_info("x", f32, layer.input_shape)],
            [helper.make_tensor_value_info("y", f32, layer.output_shape)],
            [from_array(problem.folded_weight, "w"), from_array(problem.folded_bias, "b")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return model.SerializeToString()

    def session(self, model: bytes, profile_prefix: str | None = None) -> Any:
        """With a prefix it writes a profile to a file whose name begins so."""
        ort = self.ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        ort, session = self.ort, self.session(self.model(problem))
        if not reuse_out:
            feed = {"x": problem.x}
            return lambda: session.run(None, feed), lambda result: result[0]
        binding = session.io_binding()
        x = ort.OrtValue.ortvalue_from_numpy(problem.x)
        y = ort.OrtValue.ortvalue_from_numpy(np.empty(problem.layer.output_shape, np.float32))
        binding.bind_ortvalue_input("x", x)
        binding.bind_ortvalue_output("y", y)
        return lambda: session.run_with_iobinding(binding), lambda _: y.numpy()


class OpenVino:
    key, title = "ov", "OpenVINO"

    def __init__(self, threads: int) -> None:
        import openvino

        self.ov, self.core = openvino, openvino.Core()
        self.config = {
            "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY",
            "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads), "ENABLE_CPU_PINNING": "NO",
        }
        self.versions = {"openvino": openvino.__version__}

    def model(self, problem: Problem) -> Any:
        from openvino import opset13 as op

        layer = problem.layer
        x = op.parameter(layer.input_shape, np.float32)
        if layer.nd == 0:
            y = op.matmul(x, op.constant(problem.folded_weight), False, True)
            bias_shape: tuple[int, ...] = (1, layer.oc)
        else:
            pads, groups, w = list(layer.padding), layer.groups, problem.folded_weight
            if groups > 1:
                w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
            geometry = {"strides": list(layer.stride), "pads_begin": pads, "pads_end": pads,
                        "dilations": list(layer.dilation)}
            if layer.transposed:
                geometry["output_padding"] = list(layer.output_padding)
                make = op.group_convolution_backprop_data if groups > 1 else op.convolution_backprop_data
            else:
                make = op.group_convolution if groups > 1 else op.convolution
            y = make(x, op.constant(w), **geometry)
            bias_shape = (1, layer.oc, *[1] * layer.nd)
        y = op.add(y, op.constant(problem.folded_bias.reshape(bias_shape)))
        return self.ov.Model([op.result(y)], [x], "layer")

    def request(self, model: Any, x: Floats, **config: str) -> Any:
        """An inference request on x; RuntimeError when OpenVINO would lower the precision."""
        compiled = self.core.compile_model(model, "CPU", {**self.config, **config})
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if precision != "f32":
            raise RuntimeError(f"OpenVINO runs {precision}, asked for f32")
        request = compiled.create_infer_request()
        request.set_input_tensor(self.ov.Tensor(x, shared_memory=True))
        return request

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        request = self.request(self.model(problem), problem.x)
        # The request owns its output, so reuse_out makes no difference; without share_outputs it would be copied.
        infer = request.infer
        return lambda: infer(share_outputs=True), lambda _: request.get_output_tensor().data.copy()


PEERS: dict[str, type] = {
    peer.key: peer for peer in (TorchEager, TorchChannelsLast, TorchPacked, OnnxRuntime, OpenVino)
}


def load_peers(names: list[str], threads: int) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be had, and for the others why not. ValueError for an unknown name."""
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}, have {', '.join(PEERS)}")
        try:
            peers.append(PEERS[name](threads))
        except ImportError as error:
            missing[name] = str(error)
    return peers, missing
