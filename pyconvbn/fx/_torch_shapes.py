# SPDX-License-Identifier: BSD-3-Clause
"""Rows for what changes shapes, dtypes and memory, and for facts about tensors.

Where a torch method and an ndarray method of one name differ (view, transpose, size ...), the target follows torch.
"""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np

from .. import functional as F
from . import _torch_numpy as T
from ._torch_table import FUNCTIONS, Call, as_dims, as_sizes, call, given, is_attribute, is_shape, is_size, row, view
from ._torch_values import Unsupported


# -- shapes ----------------------------------------------------------------------------------------------------------
@row(methods="view")
def _view_method(input, *size, dtype=None):
    if dtype is not None or (len(size) == 1 and isinstance(size[0], np.dtype)):
        raise Unsupported("view as another dtype")
    return _shaped("view.default", input, size)


@row(methods="reshape")
def _reshape_method(input, *shape):
    return _shaped("reshape.default", input, shape)


@row("reshape")
def _reshape(input, shape):
    return view("reshape.default", input, list(shape) if isinstance(shape, tuple) else shape)


def _shaped(name: str, input: Any, sizes: tuple[Any, ...]) -> Call:
    """`x.view(2, 3)`, `x.view((2, 3))`, `x.view(y.shape)`, `x.view(y.size(0))`: a single node is an int or a shape."""
    if len(sizes) == 1 and not isinstance(sizes[0], (int, tuple, list)):
        if is_shape(sizes[0]):
            return view(name, input, sizes[0])
        if not is_size(sizes[0]):
            raise Unsupported("a size that is computed in a way that does not tell whether it is an int or a shape")
    return view(name, input, as_sizes(sizes))


@row(methods="view_as reshape_as")
def _view_as(input, other):
    return view("view_as.default", input, other)


@row(methods="permute")
def _permute_method(input, *dims):
    return view("permute.default", input, as_sizes(dims))


@row("permute")
def _permute(input, dims):
    return view("permute.default", input, list(dims))


@row("transpose", "swapaxes", "swapdims", methods="transpose swapaxes swapdims")
def _transpose(input, dim0, dim1):
    return view("transpose.int", input, dim0, dim1)


@row("t", methods="t")
def _t(input):
    return view("t.default", input)


@row("movedim", "moveaxis", methods="movedim moveaxis")
def _movedim(input, source, destination):
    return call(T.movedim, input, source, destination)


@row("flatten", methods="flatten")
def _flatten(input, start_dim=0, end_dim=-1):
    return view(F.flatten, input, start_dim, end_dim)


@row("unflatten", methods="unflatten")
def _unflatten(input, dim, sizes):
    return call(T.unflatten, input, dim, list(sizes))


@row("unsqueeze", methods="unsqueeze")
def _unsqueeze(input, dim):
    return view("unsqueeze.default", input, dim)


@row("squeeze", methods="squeeze")
def _squeeze(input, dim=None):
    if dim is None:
        return view("squeeze.default", input)
    return view("squeeze.dims", input, list(dim)) if isinstance(dim, (tuple, list)) else view("squeeze.dim", input, dim)


@row(methods="expand")
def _expand(input, *size, implicit=False):
    return _shaped("expand.default", input, size)


@row(methods="expand_as")
def _expand_as(input, other):
    return view("expand_as.default", input, other)


@row(methods="repeat")
def _repeat(input, *repeats):
    return call("repeat.default", input, as_sizes(repeats))


@row("chunk", methods="chunk")
def _chunk(input, chunks, dim=0):
    return view("chunk.default", input, chunks, dim)


@row("split", methods="split")
def _split(input, split_size, dim=0):
    if isinstance(split_size, (tuple, list)):
        return view("split_with_sizes.default", input, list(split_size), dim)
    return view("split.Tensor", input, split_size, dim)


FUNCTIONS["split"] = row()(lambda tensor, split_size_or_sections, dim=0: _split(tensor, split_size_or_sections, dim))


@row("unbind", methods="unbind")
def _unbind(input, dim=0):
    return view("unbind.int", input, dim)


@row("narrow", methods="narrow")
def _narrow(input, dim, start, length):
    return view("narrow.default", input, dim, start, length)


@row("select", methods="select")
def _select(input, dim, index):
    return view("select.int", input, dim, index)


@row("cat", "concat", "concatenate")
def _cat(tensors, dim=0, *, out=None):
    given(out=(out, None))
    return call(F.cat, tensors, dim)


@row("stack")
def _stack(tensors, dim=0, *, out=None):
    given(out=(out, None))
    return call("stack.default", tensors, dim)


@row("flip", methods="flip")
def _flip(input, *dims):
    return call("flip.default", input, as_sizes(dims))


@row("roll", methods="roll")
def _roll(input, shifts, dims=None):
    return call("roll.default", input, as_dims(shifts), [] if dims is None else as_dims(dims))


@row("nn.functional.pad")
def _pad(input, pad, mode="constant", value=None):
    return call(F.pad, input, pad, mode, value)


@row("nn.functional.interpolate")
def _interpolate(
    input, size=None, scale_factor=None, mode="nearest", align_corners=None, recompute_scale_factor=None,
    antialias=False,
):
    given(recompute_scale_factor=(recompute_scale_factor or None, None), antialias=(antialias, False))
    if mode not in ("nearest", "bilinear"):
        raise Unsupported(f"the argument mode={mode!r}; 'nearest' and 'bilinear' are there")
    return call(F.interpolate, input, size, scale_factor, mode, align_corners)


@row("nn.functional.upsample")
def _upsample(input, size=None, scale_factor=None, mode="nearest", align_corners=None):
    return _interpolate(input, size, scale_factor, mode, align_corners)


@row("pixel_shuffle", "nn.functional.pixel_shuffle")
def _pixel_shuffle(input, upscale_factor):
    return call("pixel_shuffle.default", input, upscale_factor)


@row("pixel_unshuffle", "nn.functional.pixel_unshuffle")
def _pixel_unshuffle(input, downscale_factor):
    return call("pixel_unshuffle.default", input, downscale_factor)


@row("channel_shuffle", "nn.functional.channel_shuffle")
def _channel_shuffle(input, groups):
    return call("channel_shuffle.default", input, groups)


@row("nn.functional.normalize")
def _normalize(input, p=2.0, dim=1, eps=1e-12, out=None):
    given(out=(out, None))
    return call(T.normalize, input, p, dim, eps)


@row("einsum")
def _einsum(equation, *operands):
    return Call(T.einsum, (equation, *operands), {}, False)


@row("as_strided", methods="as_strided")
def _as_strided(input, size, stride, storage_offset=None):
    return view("as_strided.default", input, size, stride, storage_offset)


@row("as_strided_", methods="as_strided_")
def _as_strided_(input, size, stride, storage_offset=None):
    raise Unsupported("as_strided_ changes the strides of its argument")


# -- copies, dtypes, facts -------------------------------------------------------------------------------------------
@row("nn.functional.dropout")
def _dropout(input, p=0.5, training=True, inplace=False):
    return view(F.dropout, input, p, training)._replace(inplace=inplace)


@row("dropout")
def _torch_dropout(input, p, train):
    return view(F.dropout, input, p, train)


@row(methods="contiguous")
def _contiguous(input, *, memory_format=None):
    return view("contiguous.default", input)


@row("clone", methods="clone")
def _clone(input, *, memory_format=None):
    return call("clone.default", input)


@row("detach", methods="detach cpu requires_grad_")
def _detach(input, *_):
    return view("alias.default", input)


@row(methods="to")
def _to(input, *args, dtype=None, device=None, other=None, non_blocking=False, copy=False, memory_format=None):
    if any(isinstance(arg, str) and arg.partition(":")[0] != "cpu" for arg in (*args, device)):
        raise Unsupported("another device than the CPU")
    wanted = [arg for arg in (*args, dtype, other) if arg is not None and not isinstance(arg, (str, bool))]
    wanted = [arg for arg in wanted if not (is_attribute(arg, "device"))]
    copy = copy or any(arg is True for arg in args[2:])
    if not wanted:
        return call("clone.default", input) if copy else view("alias.default", input)
    if isinstance(wanted[0], np.dtype) or is_attribute(wanted[0], "dtype"):
        return view("to.dtype", input, wanted[0], False, copy)
    return call(T.to_dtype_of, input, wanted[0])


@row(methods="type")
def _type(input, dtype=None):
    if not isinstance(dtype, np.dtype):
        raise Unsupported(f"type({dtype!r})")
    return view("to.dtype", input, dtype)


@row(methods="type_as")
def _type_as(input, other):
    return call(T.to_dtype_of, input, other)


for _method, _dtype in (("float", np.float32), ("double", np.float64), ("half", np.float16), ("int", np.int32),
                        ("long", np.int64), ("bool", np.bool_)):
    row(methods=_method)(lambda input, memory_format=None, _dtype=_dtype: view("to.dtype", input, np.dtype(_dtype)))


@row(methods="size")
def _size(input, dim=None):
    return call(builtins.getattr, input, "shape") if dim is None else call("sym_size.int", input, dim)


@row(methods="dim ndimension")
def _dim(input):
    return call(builtins.getattr, input, "ndim")


@row("numel", methods="numel nelement")
def _numel(input):
    return call(builtins.getattr, input, "size")


@row(methods="is_floating_point")
def _is_floating_point(input):
    return call(T.is_floating_point, input)


# copy_, zero_ and fill_: what is written, as tensors have them in place only.
@row(methods="copy")
def _copy(input, src, non_blocking=False):
    return call("copy.default", input, src)


@row(methods="zero")
def _zero(input):
    return call("full_like.default", input, 0)


@row(methods="fill")
def _fill(input, value):
    if not isinstance(value, (bool, int, float)):
        raise Unsupported("fill_ with a tensor as value")
    return call("full_like.default", input, value)


def _factory(name: str, value: Any) -> None:
    def adapter(*size, out=None, dtype=None, layout=None, device=None, requires_grad=False, pin_memory=False):
        return call("full.default", as_sizes(size), value, dtype=np.dtype(np.float32) if dtype is None else dtype)

    def like(input, *, dtype=None, layout=None, device=None, requires_grad=False, memory_format=None):
        return call("full_like.default", input, value, dtype=dtype)

    row(name)(adapter)
    row(f"{name}_like")(like)


_factory("zeros", 0)
_factory("ones", 1)


@row("_assert")
def _assert(condition, message):
    return call(T.check, condition, message)


@row("fx._symbolic_trace._assert_is_none")
def _assert_is_none(value, message):
    return call(T.check_none, value, message)
