# SPDX-License-Identifier: BSD-3-Clause
"""Stub of the C extension. Private: the public face is the package's Python modules."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[Any]
_IntOrSeq = int | Sequence[int]
_Activation = str | tuple[str, float] | None

__version__: str

# Every array argument below takes an ndarray of any strides, a DLPack exporter on the CPU or a CPU
# torch.Tensor; every result is an ndarray. `out` is None or an exact-shape, exact-dtype ndarray.

# The coercion every operator applies: an ndarray view of `obj` (any strides), or TypeError naming `argument`.
def as_array(obj: Any, argument: str, /) -> _Array: ...

# -- convolution family (nd = number of spatial axes, 1 to 3) --------------------------------------------------
def conv(
    nd: int, input: Any, weight: Any, bias: Any | None, stride: _IntOrSeq, padding: _IntOrSeq | str,
    dilation: _IntOrSeq, groups: int, out: _Array | None, /,
) -> _Array: ...
def conv_transpose(
    nd: int, input: Any, weight: Any, bias: Any | None, stride: _IntOrSeq, padding: _IntOrSeq,
    output_padding: _IntOrSeq, groups: int, dilation: _IntOrSeq, out: _Array | None, /,
) -> _Array: ...
def linear(input: Any, weight: Any, bias: Any | None, out: _Array | None, /) -> _Array: ...

# bn is None or the 5-tuple (weight | None, bias | None, running_mean, running_var, eps).
# The one-call fused operator: nd = 0 is linear, 1 to 3 conv (transposed or not); parameters read now.
def conv_bn(
    nd: int, input: Any, weight: Any, bias: Any | None, bn: tuple[Any, Any, Any, Any, float],
    stride: _IntOrSeq, padding: _IntOrSeq | str, padding_mode: str, dilation: _IntOrSeq, groups: int,
    transposed: bool, output_padding: _IntOrSeq, out: _Array | None, /,
) -> _Array: ...

# -- folding (fold_linear_bn: num_features 1 broadcasts) -------------------------------------------------------
def fold_conv_bn(
    conv_w: Any, conv_b: Any | None, bn_rm: Any, bn_rv: Any, bn_eps: float, bn_w: Any | None,
    bn_b: Any | None, transpose: bool, groups: int, /,
) -> tuple[_Array, _Array]: ...
def fold_linear_bn(
    linear_w: Any, linear_b: Any | None, bn_rm: Any, bn_rv: Any, bn_eps: float, bn_w: Any | None,
    bn_b: Any | None, /,
) -> tuple[_Array, _Array]: ...
def fold_bn_conv(
    bn_rm: Any, bn_rv: Any, bn_eps: float, bn_w: Any | None, bn_b: Any | None, conv_w: Any,
    conv_b: Any | None, padding_is_zero: bool, padding_mode: str, groups: int, transpose: bool, /,
) -> tuple[_Array, _Array]: ...

# -- normalisation, elementwise, pooling, shape ----------------------------------------------------------------
# training=True updates running_mean/running_var in place with the weight `momentum` (already resolved).
def batch_norm(
    input: Any, running_mean: Any | None, running_var: Any | None, weight: Any | None, bias: Any | None,
    training: bool, momentum: float, eps: float, out: _Array | None, /,
) -> _Array: ...
# kind: relu relu6 leaky_relu sigmoid hardtanh hardswish silu gelu gelu_tanh; a, b are its parameters
# (leaky_relu: slope; hardtanh: min, max).
def unary(kind: str, input: Any, a: float, b: float, out: _Array | None, /) -> _Array: ...
# kind: add mul; NumPy broadcasting, one common dtype; alpha scales the second operand of add.
def binary(kind: str, x: Any, y: Any, alpha: float, out: _Array | None, /) -> _Array: ...
def softmax(input: Any, axis: int, out: _Array | None, /) -> _Array: ...
def max_pool(
    nd: int, input: Any, kernel_size: _IntOrSeq, stride: _IntOrSeq | None, padding: _IntOrSeq,
    dilation: _IntOrSeq, ceil_mode: bool, out: _Array | None, /,
) -> _Array: ...
def avg_pool(
    nd: int, input: Any, kernel_size: _IntOrSeq, stride: _IntOrSeq | None, padding: _IntOrSeq,
    ceil_mode: bool, count_include_pad: bool, divisor_override: int | None, out: _Array | None, /,
) -> _Array: ...
def adaptive_avg_pool(
    nd: int, input: Any, output_size: int | None | Sequence[int | None], out: _Array | None, /,
) -> _Array: ...
# padding as torch.nn.functional.pad: pairs for the last axis first; mode constant reflect replicate circular.
def pad(input: Any, padding: Sequence[int], mode: str, value: float, out: _Array | None, /) -> _Array: ...

# -- prepared operator -----------------------------------------------------------------------------------------
class Plan:
    """Prepared ConvBN. Final type; see pyconvbn.Plan for the public documentation."""

    def __new__(
        cls, weight: Any, bias: Any | None = None, *, bn: Any | None = None, stride: _IntOrSeq = 1,
        padding: _IntOrSeq | str = 0, padding_mode: str = "zeros", dilation: _IntOrSeq = 1, groups: int = 1,
        transposed: bool = False, output_padding: _IntOrSeq = 0, activation: _Activation = None,
        precision: Literal["strict", "fp32", "fast"] = "fp32",
        input_shape: Sequence[int] | None = None, tune: bool = False,
    ) -> Plan: ...
    @classmethod
    def from_modules(
        cls, conv: Any, bn: Any | None = None, *, activation: _Activation = None,
        precision: Literal["strict", "fp32", "fast"] = "fp32",
        input_shape: Sequence[int] | None = None, tune: bool = False,
    ) -> Plan: ...
    def __call__(self, x: Any, *, residual: Any | None = None, out: _Array | None = None) -> _Array: ...
    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, ...]: ...
    # {"isa","algorithm","tile","dtype","precision","copies":[...],"candidates":[(name, reason-or-"chosen"),...]}
    def explain(self, input_shape: Sequence[int] | None = None) -> Any: ...
    # bytes: {"weights","workspace","input","output"}
    def memory(self, input_shape: Sequence[int]) -> dict[str, int]: ...
    # {"flops","flops_real" (padded taps not counted),"bytes"}
    def cost(self, input_shape: Sequence[int]) -> dict[str, int]: ...
    def halo(self) -> tuple[tuple[int, int], ...]: ...
    def update(self, weight: Any, bias: Any | None = None, bn: Any | None = None) -> Plan: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def params(self) -> dict[str, Any]: ...  # the constructor's geometry arguments
    def __reduce_ex__(self, protocol: int, /) -> Any: ...
    def _repr_html_(self) -> str: ...

# -- process-wide settings and facts ---------------------------------------------------------------------------
def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def num_threads_source() -> str: ...  # "set_num_threads", "PYCONVBN_NUM_THREADS", "OMP_NUM_THREADS", "affinity", "cgroup quota"
# {"name","features":[...],"l1d","l2","l3" (bytes),
# "cores","isa_compiled":[...],"isa_available":[...],"isa_active"}
def cpu_info() -> dict[str, Any]: ...
def build_info() -> dict[str, Any]: ...  # {"compiler","cflags","numpy","python"}
def alloc_stats() -> dict[str, int]: ...  # {"live_bytes","live_blocks","peak_bytes","total_allocs"}

class _testing_module: ...
_testing: Any  # submodule: one function per kernel and ISA, fault injection; used by tests/ only
