# SPDX-License-Identifier: BSD-3-Clause
"""Batch normalisation modules."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import functional as F
from .init import check_int, float_dtype
from .module import Module
from .parameter import Parameter, as_ndarray


class _BatchNorm(Module):
    """`(x - mean)/sqrt(var + eps) * weight + bias` along axis 1.

    In eval the running statistics are used (those of the batch with `track_running_stats=False`),
    in training those of the batch, and the running ones move by `momentum`; None averages over all
    batches seen, counted in `num_batches_tracked`. `affine=False` has no weight and bias,
    `bias=False` no bias. Raises `ValueError` or `TypeError` naming the argument that does not fit.
    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167).

    >>> BatchNorm2d(8).eval()(np.ones((1, 8, 2, 2), np.float32)).shape
    (1, 8, 2, 2)
    """

    input_ndims: ClassVar[tuple[int, ...]]
    weight: Any  # an ndarray or None, as the four below
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = check_int(num_features, "num_features", 0)
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps: expected a finite number >= 0, got {eps}")
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        size, resolved = self.num_features, float_dtype(dtype)

        def parameter(wanted: bool, value: float) -> Parameter | None:
            return Parameter(np.full(size, value, resolved)) if affine and wanted else None

        self.register_parameter("weight", parameter(True, 1.0))
        self.register_parameter("bias", parameter(bias, 0.0))
        tracked = track_running_stats
        self.register_buffer("running_mean", np.zeros(size, resolved) if tracked else None)
        self.register_buffer("running_var", np.ones(size, resolved) if tracked else None)
        self.register_buffer("num_batches_tracked", np.zeros((), np.int64) if tracked else None)

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0, variance 1 and no batches, in place."""
        for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            array = getattr(self, name)
            if array is not None:
                array[...] = value

    def _check_input_dim(self, ndim: int) -> None:
        if ndim not in self.input_ndims:
            wanted = " or ".join(f"{n}-D" for n in self.input_ndims)
            raise ValueError(f"input: {type(self).__name__} expects {wanted}, got {ndim}-D")

    def forward(self, input: Any) -> NDArray[Any]:
        """Normalise `input`; in training also update the running statistics in place."""
        x = as_ndarray(input, "input")
        self._check_input_dim(x.ndim)
        update = self.training and self.track_running_stats
        count = self.num_batches_tracked if update else None
        if self.momentum is not None:
            factor = float(self.momentum)
        else:
            factor = 0.0 if count is None else 1.0 / (int(count) + 1)
        mean, var = self.running_mean, self.running_var
        use_batch = self.training or (mean is None and var is None)
        if self.training and not update:
            mean = var = None
        y = F.batch_norm(x, mean, var, self.weight, self.bias, use_batch, factor, self.eps)
        if count is not None:
            count[...] += 1  # last, so that a failed call changes nothing
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_ndims = (2, 3)


class BatchNorm2d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_ndims = (4,)


class BatchNorm3d(_BatchNorm):
    __doc__ = _BatchNorm.__doc__
    input_ndims = (5,)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation for input of two or more axes; one process, so nothing to synchronise."""

    input_ndims = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        *,
        bias: bool = True,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, bias=bias, dtype=dtype
        )
        self.process_group = process_group

    def _check_input_dim(self, ndim: int) -> None:
        if ndim < 2:
            raise ValueError(f"input: SyncBatchNorm expects at least 2-D, got {ndim}-D")
