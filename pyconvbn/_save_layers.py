# SPDX-License-Identifier: BSD-3-Clause
"""Modules in a file. Of prepared layers the folded weights, the geometry and the choice of algorithms; packing is done
anew. Of other layers of `pyconvbn.nn` their attributes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from . import _core
from ._save_values import Unsupported
from .nn.module import Module

__all__ = ["layer_state", "plan_state", "restore_layer", "restore_plan"]

_PARAMS = "stride padding padding_mode dilation groups transposed output_padding activation precision".split()
_BOOKS = frozenset({"training", "_kinds", "_not_saved"})
#: Attributes of a FrozenLayer, and whether they are kept: the others follow from those.
_FROZEN = {"plan": True, "kind": True, "residual": True, "input_shape": True, "input_ndim": True, "_by_channel": False}
_PLAIN = (
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d "
    "BatchNorm3d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Dropout Flatten GELU Hardswish "
    "Identity LeakyReLU Linear MaxPool1d MaxPool2d MaxPool3d ReLU ReLU6 SiLU Sigmoid SyncBatchNorm Upsample"
).split()
_MAX_SIZE = 1 << 31  # of an axis or a step: beyond it sizes of arrays could no longer be counted


@functools.cache
def _classes() -> dict[str, type]:
    from . import nn

    return {name: getattr(nn, name) for name in _PLAIN}


def layer_state(module: Any) -> dict[str, Any]:
    """What makes up a layer, the plan of a prepared one as an object; Unsupported for other modules."""
    from .nn import FrozenLayer

    kind = type(module)
    name = kind.__name__
    if kind is not FrozenLayer and _classes().get(name) is not kind:
        raise Unsupported(f"the {name} that it calls is no layer of pyconvbn.nn; only these and operators can be saved")
    if module._hooked or "forward" in module.__dict__:
        raise Unsupported(f"the {name} that it calls has hooks or a forward of its own")
    members = {key: value for key, value in vars(module).items() if key not in _BOOKS}
    if kind is FrozenLayer:
        other = members.keys() - _FROZEN.keys()
        if other:
            raise Unsupported(f"the {name} that it calls has an attribute {min(other)!r} of its own")
        return {"class": name, **{key: members[key] for key, kept in _FROZEN.items() if kept}}
    state = {"class": name, "training": module.training, "kinds": module._kinds, "temporary": sorted(module._not_saved)}
    return state | {f".{key}": value for key, value in members.items()}


def restore_layer(values: dict[str, Any]) -> Module:
    """The layer of a state, its plan made again."""
    from .nn import FrozenLayer

    name = values.pop("class", None)
    if name != "FrozenLayer":
        return _plain(name, values)
    _same_keys(values, [key for key, kept in _FROZEN.items() if kept], "a layer")
    if type(values["kind"]) is not str or type(values["residual"]) is not bool:
        raise ValueError("kind or residual is damaged")
    shape, ndim = values["input_shape"], values["input_ndim"]
    if ndim is not None and (type(ndim) is not int or not 0 < ndim <= 5):
        raise ValueError("input_ndim is damaged")
    return FrozenLayer(
        values["plan"], kind=values["kind"], residual=values["residual"],
        input_shape=None if shape is None else _sizes(shape, "input_shape"), input_ndim=ndim,
    )


def _plain(name: Any, values: dict[str, Any]) -> Module:
    """A layer with these attributes, which are data and can only be used as such."""
    cls = _classes().get(name) if type(name) is str else None
    if cls is None:
        raise ValueError(f"there is no layer {name!r:.100}")
    training, kinds = values.pop("training", None), values.pop("kinds", None)
    temporary = values.pop("temporary", None)
    if type(training) is not bool or type(kinds) is not dict or type(temporary) is not list:
        raise ValueError(f"the {name} is damaged")
    module: Module = cls.__new__(cls)
    Module.__init__(module)
    object.__setattr__(module, "training", training)
    for key, value in values.items():
        attribute = key.removeprefix(".")
        if key == attribute or not attribute.isidentifier() or attribute.startswith("_"):
            raise ValueError(f"the {name} has an attribute {key!r:.100}")
        if callable(getattr(cls, attribute, None)) or isinstance(value, type | dict):
            raise ValueError(f"the {name} cannot have a {attribute!r:.100} of its own")
        module.__dict__[attribute] = value
    for attribute, kind in kinds.items():
        array = module.__dict__.get(attribute, 0)
        if kind not in ("parameter", "buffer") or not (array is None or isinstance(array, np.ndarray)):
            raise ValueError(f"the {name} has no {str(kind)[:100]} {str(attribute)[:100]!r}")
    module._kinds.update(kinds)
    if any(type(attribute) is not str or attribute not in kinds for attribute in temporary):
        raise ValueError(f"the {name} is damaged")
    module._not_saved.update(temporary)
    repr(module)  # reads most attributes
    return module


def plan_state(plan: Any) -> dict[str, Any]:
    """What makes up a Plan."""
    weight, bias, params, input_shape, choices = plan.__reduce_ex__(5)[1]
    return {"weight": weight, "bias": bias, "params": params, "input_shape": input_shape, "choices": choices}


def restore_plan(values: dict[str, Any]) -> Any:
    """The Plan of a state, packed for this machine; ValueError or TypeError if there is no such plan."""
    _same_keys(values, ("weight", "bias", "params", "input_shape", "choices"), "a plan")
    weight, bias, params, shape, choices = values.values()
    for array in (weight, bias):
        if type(array) is not np.ndarray or not array.flags.c_contiguous or array.dtype != weight.dtype:
            raise ValueError("weight and bias of a plan are no arrays of one dtype")
    _same_keys(params, _PARAMS, "params")
    for name in ("stride", "padding", "dilation", "output_padding"):
        if type(params[name]) is not str:
            _sizes(params[name], name)
    if type(params["groups"]) is not int or type(params["transposed"]) is not bool:
        raise ValueError("groups or transposed is damaged")
    if shape is not None:
        _sizes(shape, "input_shape")
    if type(choices) is not dict:
        raise ValueError("the choices are damaged")
    for key, name in choices.items():
        _sizes(key, "choices")
        if type(name) is not str:
            raise ValueError("a choice is damaged")
    return _core._restore_plan(weight, bias, params, shape, choices)


def _same_keys(found: Any, names: Any, what: str) -> None:
    if type(found) is not dict or list(found) != list(names):
        raise ValueError(f"{what} does not have exactly {', '.join(names)}")


def _sizes(found: Any, what: str) -> tuple[int, ...]:
    if type(found) is not tuple or len(found) > 8 or any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in found):
        raise ValueError(f"{what}: {str(found)[:100]!r} are no sizes")
    return found
