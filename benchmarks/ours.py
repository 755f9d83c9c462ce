# SPDX-License-Identifier: BSD-3-Clause
"""pyconvbn as rivals: a prepared plan, BN folded by the plan itself, and the operator that prepares nothing."""

from types import SimpleNamespace
from typing import Any

from layers import Layer
from peers import Prepared
from problem import EPS, Problem, aligned_empty


class Ours:
    def __init__(self, threads: int, precision: str, key: str = "ours") -> None:
        import pyconvbn
        from pyconvbn import _core

        self.key, self.title = key, f"pyconvbn, prepared plan, precision {precision}"
        self.core, self.testing = _core, _core._testing
        self.pyconvbn, self.precision = pyconvbn, precision
        pyconvbn.set_num_threads(threads)
        self.versions = {"pyconvbn": pyconvbn.__version__}
        self.plan: Any = None

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        layer = problem.layer
        bn = self.pyconvbn.BatchNormParams(problem.gamma, problem.beta, problem.mean, problem.var, EPS)
        plan = self.pyconvbn.Plan(
            problem.weight, bn=bn, precision=self.precision, input_shape=layer.input_shape,
            **self._geometry(layer))
        self.plan = plan
        x = problem.x
        if not reuse_out:
            return lambda: plan(x), lambda y: y
        y = aligned_empty(layer.output_shape)
        return lambda: plan(x, out=y), lambda y: y

    def algorithm(self, layer: Layer) -> str:
        """The algorithm of the plan prepared last."""
        return str(self.plan.explain(layer.input_shape)["algorithm"])

    @staticmethod
    def _geometry(layer: Layer) -> dict[str, Any]:
        if layer.nd == 0:
            return {}
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation,
                    "groups": layer.groups}
        if layer.transposed:
            geometry.update(transposed=True, output_padding=layer.output_padding)
        return geometry


class OneShot(Ours):
    """`efficient_conv_bn_eval`: folds, packs and runs in every call. Always of precision fp32."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, "fp32", "one_shot")
        self.title = "pyconvbn, efficient_conv_bn_eval, no plan"

    def prepare(self, problem: Problem, reuse_out: bool) -> Prepared:
        layer, fused = problem.layer, self.pyconvbn.efficient_conv_bn_eval
        # Modules are read by their attributes; making real ones would fill their weights with random numbers first.
        bn = SimpleNamespace(num_features=layer.oc, eps=EPS, training=False, weight=problem.gamma, bias=problem.beta,
                             running_mean=problem.mean, running_var=problem.var)
        conv = SimpleNamespace(weight=problem.weight, bias=None)
        if layer.nd == 0:
            conv.in_features, conv.out_features = layer.ic, layer.oc
        else:
            conv.in_channels, conv.out_channels, conv.kernel_size = layer.ic, layer.oc, layer.kernel
            vars(conv).update(self._geometry(layer))
        x = problem.x
        if not reuse_out:
            return lambda: fused(bn, conv, x), lambda y: y
        y = aligned_empty(layer.output_shape)
        return lambda: fused(bn, conv, x, out=y), lambda y: y

    def algorithm(self, layer: Layer) -> str:
        return ""  # a plan of one call tells nobody
