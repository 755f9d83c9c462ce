# SPDX-License-Identifier: BSD-3-Clause
"""Folding BatchNorm into weights. The arithmetic is in C (csrc/ops/bn_fold.c), in float64, rounded once.

Source of the formula: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from . import _core
from ._modules import ConvRecord, check_bn, is_torch, read_bn, read_conv
from .errors import FoldError

__all__ = [
    "fuse_bn_conv_weights", "fuse_conv_bn_eval", "fuse_conv_bn_weights", "fuse_linear_bn_eval",
    "fuse_linear_bn_weights",
]

_Array = NDArray[Any]


def _like_parameters(folded: tuple[_Array, _Array], w: Any, b: Any | None) -> tuple[_Array, _Array]:
    """nn.Parameter in, nn.Parameter out (flags kept); plain arrays in, plain arrays out."""
    nn = sys.modules.get(f"{__package__}.nn")
    if nn is None or not isinstance(w, nn.Parameter):
        return folded
    return (
        nn.Parameter(folded[0], requires_grad=w.requires_grad),
        nn.Parameter(folded[1], requires_grad=bool(getattr(b, "requires_grad", False))),
    )


def fuse_conv_bn_weights(
    conv_w: Any, conv_b: Any | None, bn_rm: Any, bn_rv: Any, bn_eps: float, bn_w: Any | None,
    bn_b: Any | None, transpose: bool = False, groups: int = 1,
) -> tuple[_Array, _Array]:
    """Weights and bias of the one convolution that equals convolution followed by BatchNorm in eval mode.

    With ``s = bn_w / sqrt(bn_rv + bn_eps)``: ``W' = conv_w * s`` along the output channel, ``b' = (conv_b - bn_rm)
    * s + bn_b``. For grouped transposed weights element ``[i, j, ...]`` belongs to output channel
    ``(i // (in/groups)) * (out/groups) + j``.

    Args:
        conv_w: ``(out, in/groups, *kernel)``, transposed ``(in, out/groups, *kernel)``; float16/32/64, any strides.
        conv_b: ``(out,)`` or None (0).
        bn_rm, bn_rv, bn_w, bn_b: ``(out,)``, any float dtype; ``bn_w`` None is 1, ``bn_b`` None is 0.
        bn_eps: finite, >= 0.
        transpose: whether ``conv_w`` is a transposed convolution's weight.
        groups: needed for transposed weights, whose shape alone does not tell.

    Returns:
        ``(W', b')`` in ``conv_w``'s dtype and memory layout; nn.Parameter when ``conv_w`` is one.

    Raises:
        ValueError: a length that is not ``out``, a bad ``bn_eps`` or ``groups``, missing statistics.
        TypeError: not a float array, or dtypes of ``conv_w`` and ``conv_b`` that differ.

    Example:
        >>> import numpy as np, pyconvbn
        >>> W, b = pyconvbn.fuse_conv_bn_weights(
        ...     np.ones((2, 1, 1)), None, np.array([1., 2.]), np.array([4., 1.]), 0.0, None, None)
        >>> W.ravel(), b
        (array([0.5, 1. ]), array([-0.5, -2. ]))
    """
    folded = _core.fold_conv_bn(conv_w, conv_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b, transpose, groups)
    return _like_parameters(folded, conv_w, conv_b)


def fuse_linear_bn_weights(
    linear_w: Any, linear_b: Any | None, bn_rm: Any, bn_rv: Any, bn_eps: float, bn_w: Any | None,
    bn_b: Any | None,
) -> tuple[_Array, _Array]:
    """The same for a linear layer: ``linear_w`` is ``(out, in)``, the result ``((out, in), (out,))``.

    BatchNorm arrays of length 1 (``num_features == 1``) broadcast over the outputs. Raises as
    :func:`fuse_conv_bn_weights`.

    Example:
        >>> import numpy as np, pyconvbn
        >>> one = np.ones(1)
        >>> W, b = pyconvbn.fuse_linear_bn_weights(np.ones((3, 2)), None, one, one, 0.0, None, None)
        >>> W.shape, b
        ((3, 2), array([-1., -1., -1.]))
    """
    folded = _core.fold_linear_bn(linear_w, linear_b, bn_rm, bn_rv, bn_eps, bn_w, bn_b)
    return _like_parameters(folded, linear_w, linear_b)


def fuse_bn_conv_weights(
    bn_rm: Any, bn_rv: Any, bn_eps: float, bn_w: Any | None, bn_b: Any | None, conv_w: Any,
    conv_b: Any | None, *, padding: int | str | Sequence[int] = 0, padding_mode: str = "zeros", groups: int = 1,
    transpose: bool = False,
) -> tuple[_Array, _Array]:
    """Weights and bias of the one convolution that equals BatchNorm (eval) FOLLOWED BY convolution.

    With ``t = bn_b - bn_rm * s``: ``W' = conv_w * s`` along the input channel, ``b' = conv_b + sum(conv_w * t)``.
    Exact when ``t`` is 0 everywhere, or for a convolution (not transposed) without zero padding; otherwise zero
    padding would be padding after the shift and the border would be wrong.

    Args:
        bn_*: ``(in,)`` each. conv_w, conv_b, groups, transpose: as in :func:`fuse_conv_bn_weights`.
        padding, padding_mode: of the convolution, to decide exactness.

    Raises:
        FoldError: ``PADDED_PRE_BN``. ValueError, TypeError: as :func:`fuse_conv_bn_weights`.

    Example:
        >>> import numpy as np, pyconvbn
        >>> W, b = pyconvbn.fuse_bn_conv_weights(
        ...     np.array([1.]), np.array([4.]), 0.0, None, None, np.ones((1, 1, 3)), None)
        >>> W.ravel(), b
        (array([0.5, 0.5, 0.5]), array([-1.5]))
    """
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"padding: expected an int, a sequence of ints, 'valid' or 'same', got {padding!r}")
        # 'same' pads unless every kernel axis is 1
        unpadded = padding == "valid" or all(k == 1 for k in conv_w.shape[2:])
    elif isinstance(padding, Sequence):
        unpadded = not any(padding)
    else:
        unpadded = not padding
    folded = _core.fold_bn_conv(
        bn_rm, bn_rv, bn_eps, bn_w, bn_b, conv_w, conv_b, unpadded, padding_mode, groups, transpose
    )
    return _like_parameters(folded, conv_w, conv_b)


def _fold_record(record: ConvRecord, bn: Any) -> tuple[_Array, _Array]:
    """(W', b') of a convolution or linear module and the BatchNorm module behind it."""
    weight, bias, mean, var, eps = read_bn(bn)
    if record.nd == 0:
        return _core.fold_linear_bn(record.weight, record.bias, mean, var, eps, weight, bias)
    return _core.fold_conv_bn(
        record.weight, record.bias, mean, var, eps, weight, bias, record.transposed, record.groups
    )


_ATOMS = frozenset({type(None), bool, int, float, str})


def _is_flat(value: Any) -> bool:
    """Immutable all through: a deep copy of it is itself."""
    kind = type(value)
    return kind in _ATOMS or (kind is tuple and all(type(item) in _ATOMS for item in value))


def _deepcopy_without(module: Any, names: tuple[str, ...]) -> Any:
    """Deep copy of one of our modules whose attributes ``names``, about to be replaced, stay the originals.

    For our own classes this is one walk over the instance dict; copy.deepcopy takes ten times as long and would copy
    the weights only to drop them.
    """
    if not type(module).__module__.startswith("pyconvbn.nn."):
        return copy.deepcopy(module)
    clone = copy.copy(module)
    memo: dict[int, Any] = {id(module): clone}
    for name, value in vars(module).items():
        if not (name in names or _is_flat(value) or name in ("_kinds", "_not_saved")):
            vars(clone)[name] = copy.deepcopy(value, memo)
    return clone


def _fused_copy(module: Any, folded: tuple[_Array, _Array], what: str) -> Any:
    """Deep copy of ``module`` with the folded parameters, of the module's own framework."""
    if is_torch(module):
        fused = copy.deepcopy(module)
        torch = sys.modules["torch"]
        for name, value in zip(("weight", "bias"), folded):
            old = getattr(module, name)
            tensor = torch.from_numpy(value).to(old.device if old is not None else module.weight.device)
            setattr(fused, name, torch.nn.Parameter(tensor, old is not None and old.requires_grad))
        return fused
    from . import nn

    if not isinstance(module, nn.Module):
        raise TypeError(f"{what}: expected a pyconvbn.nn or torch.nn module, got {type(module).__name__}")
    fused = _deepcopy_without(module, ("weight", "bias"))
    for name, value in zip(("weight", "bias"), folded):
        old = getattr(module, name)
        setattr(fused, name, nn.Parameter(value, requires_grad=bool(getattr(old, "requires_grad", False))))
    return fused


def _fuse_modules(module: Any, bn: Any, what: str, transpose: bool | None) -> Any:
    record = read_conv(module, what)
    if (record.nd == 0) != (what == "linear"):
        expected = "a Linear module" if what == "linear" else "a Conv or ConvTranspose module"
        raise TypeError(f"{what}: expected {expected}, got {type(module).__name__}")
    if transpose is not None and bool(transpose) != record.transposed:
        raise ValueError(
            f"transpose: expected None or {record.transposed} for a {type(module).__name__}, got {transpose}"
        )
    check_bn(bn)
    if module.training:
        raise FoldError(
            f"{what} ({type(module).__name__}) is in training mode: folding would freeze weights that training "
            f"still changes; call {what}.eval()",
            "CONV_TRAINING",
        )
    return _fused_copy(module, _fold_record(record, bn), what)


def fuse_conv_bn_eval(conv: Any, bn: Any, transpose: bool | None = None) -> Any:
    """A deep copy of ``conv`` with ``bn`` folded in; the originals stay untouched.

    Args:
        conv: Conv1d/2d/3d or ConvTranspose1d/2d/3d (``pyconvbn.nn`` or ``torch.nn``), in eval mode.
        bn: BatchNorm in eval mode with running statistics.
        transpose: None reads it from the module; a contradiction is a ValueError.

    Raises:
        FoldError: ``BN_TRAINING``, ``CONV_TRAINING`` or ``NO_RUNNING_STATS``.
        ValueError, TypeError: as :func:`fuse_conv_bn_weights`.

    Example:
        >>> import pyconvbn
        >>> conv, bn = pyconvbn.nn.Conv1d(2, 4, 3).eval(), pyconvbn.nn.BatchNorm1d(4).eval()
        >>> pyconvbn.fuse_conv_bn_eval(conv, bn)
        Conv1d(2, 4, kernel_size=(3,), stride=(1,))
    """
    return _fuse_modules(conv, bn, "conv", transpose)


def fuse_linear_bn_eval(linear: Any, bn: Any) -> Any:
    """A deep copy of ``linear`` with ``bn`` folded in, right for 2-D outputs. Raises as :func:`fuse_conv_bn_eval`.

    Example:
        >>> import pyconvbn
        >>> linear, bn = pyconvbn.nn.Linear(2, 4).eval(), pyconvbn.nn.BatchNorm1d(4).eval()
        >>> pyconvbn.fuse_linear_bn_eval(linear, bn)
        Linear(in_features=2, out_features=4, bias=True)
    """
    return _fuse_modules(linear, bn, "linear", None)
