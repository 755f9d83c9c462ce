# SPDX-License-Identifier: BSD-3-Clause
"""pyconvbn as one more rival: a prepared plan, BN folded by the plan itself."""

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
