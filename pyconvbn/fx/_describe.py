# SPDX-License-Identifier: BSD-3-Clause
"""What a node is to a reader: its kind and a short text, for drawings and reports.

Works on any graph with torch.fx's node attributes; nothing here imports or runs user code beyond
`str` of a target and attribute look-ups, both guarded.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

__all__ = ["Described", "attribute", "describe", "kind_of_name", "owning_module", "safe_text", "shape_text"]

# What XML 1.0 cannot hold, and lone surrogates, which no encoding can.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_CONVS = {
    *(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "convolution", "linear"
}  # fmt: skip
_ACTIVATIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "sigmoid", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu",
    "softmax", "log_softmax", "tanh", "elu", "prelu", "clamp", "dropout", "identity",
}  # fmt: skip
_POOLS = re.compile(r"(adaptive_)?(avg|max)_pool[123]d(_with_indices)?$|^interpolate$|^upsample")
_JOINS = {"add", "iadd", "add_", "sub", "mul", "imul", "mul_", "truediv", "div", "cat", "concat", "stack", "matmul"}
_FUSED = {"efficient_conv_bn_eval", "efficient_conv_bn_eval_decomposed"}


class Described(NamedTuple):
    """`kind`: conv, bn, fused, act, pool, join, io, param or other."""

    kind: str
    title: str  # "Conv2d 3×3 16→32 s2"
    where: str  # the module's dotted name, or the node's name


def safe_text(value: Any, limit: int = 200) -> str:
    """`str(value)` in printable characters, whatever `value` does."""
    try:
        text = str(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    text = _UNPRINTABLE.sub("\ufffd", text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def owning_module(graph: Any) -> Any:
    """The module that a graph's targets are names of; None when there is none."""
    try:
        return graph.owning_module
    except Exception:
        return None


def attribute(root: Any, target: Any) -> Any:
    """The object at a dotted path below `root`; None when there is none."""
    found = root
    if root is None or not isinstance(target, str):
        return None
    for name in target.split("."):
        try:
            found = getattr(found, name)
        except Exception:
            return None
    return found


def _function_name(target: Any) -> str:
    """"conv2d" of `functional.conv2d`, of "aten.conv2d.default" and of an overload object."""
    try:
        name = target.__name__
    except Exception:
        name = None
    if not isinstance(name, str):
        name = safe_text(target, 80)
    parts = name.split(".")
    if parts[0] in ("aten", "method") and len(parts) > 1:
        parts = parts[1:]
    return safe_text(parts[0], 80)


def kind_of_name(name: str) -> str:
    """Kind of a function, method or module class by its name."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    flat = snake.replace("_", "")
    if snake in _FUSED:
        return "fused"
    if "batch_norm" in snake or flat.startswith(("batchnorm", "syncbatchnorm")):
        return "bn"
    if snake in _CONVS or re.match(r"(conv(transpose)?[123]d|linear)$", flat):
        return "conv"
    if snake in _ACTIVATIONS or flat in _ACTIVATIONS:
        return "act"
    if _POOLS.search(snake) or re.match(r"(adaptive)?(avg|max)pool[123]d$", flat):
        return "pool"
    return "join" if snake in _JOINS else "other"


def module_kind(module: Any) -> str:
    """Kind of a module by its class or one of its bases: a subclass of Conv2d is a convolution."""
    for cls in type(module).__mro__:
        kind = kind_of_name(cls.__name__)
        if kind != "other":
            return kind
    return "other"


def _times(values: Any) -> str:
    values = values if isinstance(values, (tuple, list)) else (values,)
    return "×".join(safe_text(value, 12) for value in values)


def _geometry(module: Any) -> str:
    """"3×3 16→32 s2" of a convolution, "128→64" of a linear layer, "32" of a BatchNorm."""
    get = lambda name: getattr(module, name, None)  # noqa: E731
    if get("in_features") is not None:
        return f"{safe_text(get('in_features'), 12)}→{safe_text(get('out_features'), 12)}"
    if get("num_features") is not None:
        return safe_text(get("num_features"), 12)
    if get("in_channels") is None:
        return _times(get("kernel_size")) if get("kernel_size") is not None else ""
    groups = get("groups")
    parts = [_times(get("kernel_size"))]
    if isinstance(groups, int) and 1 < groups == get("in_channels") == get("out_channels"):
        parts.append(f"depthwise {groups}")
    else:
        parts.append(f"{safe_text(get('in_channels'), 12)}→{safe_text(get('out_channels'), 12)}")
        if groups not in (None, 1):
            parts.append(f"g{safe_text(groups, 12)}")
    for letter, values in (("s", get("stride")), ("d", get("dilation"))):
        values = values if isinstance(values, (tuple, list)) else (values,)
        if any(value not in (None, 1) for value in values):
            parts.append(letter + (_times(values[:1]) if len(set(values)) == 1 else _times(values)))
    return " ".join(parts)


def _module_title(module: Any) -> str:
    geometry = ""
    try:
        geometry = _geometry(module)
    except Exception:  # a foreign module's attributes may be anything
        pass
    return f"{type(module).__name__} {geometry}".rstrip()


def _frozen(module: Any, where: str) -> Described:
    """A prepared layer: what it is, and what became part of it."""
    name, kind = module.layer_name().replace("x", "×").replace(" -> ", "→").replace(",", ""), "conv"
    strides = module.plan.params["stride"]
    if any(stride != 1 for stride in strides):
        name += " s" + (_times(strides[:1]) if len(set(strides)) == 1 else _times(strides))
    parts = [name, *(["residual"] if module.residual else []), *([module.activation_name()] or [])]
    if name.startswith("scale"):
        kind = "bn"
    return Described("fused" if len([p for p in parts if p]) > 1 else kind, " + ".join(p for p in parts if p), where)


def _pair_title(node: Any, root: Any) -> str:
    """Title of a fused node: that of its convolution, found through the get_attr nodes it reads."""
    for used in node.all_input_nodes:
        module = attribute(root, used.target) if used.op == "get_attr" else None
        if module is not None and module_kind(module) == "conv":
            return f"{_module_title(module)} + BN"
    for argument in node.args:
        if callable(argument) and kind_of_name(_function_name(argument)) == "conv":
            return f"{_function_name(argument)} + BN"
    return "conv + BN"


def describe(node: Any, root: Any = None) -> Described:
    """Kind, title and place of `node`; `root` is the module its targets belong to."""
    name = safe_text(node.name, 80)
    if node.op in ("placeholder", "output"):
        return Described("io", "output" if node.op == "output" else f"input {name}", "")
    if node.op == "get_attr":
        return Described("param", safe_text(node.target, 80), name)
    if node.op == "call_module":
        module = attribute(root, node.target)
        where = safe_text(node.target, 80)
        if module is None:
            return Described("other", where, name)
        if type(module).__name__ == "FrozenLayer" and hasattr(module, "layer_name"):
            return _frozen(module, where)
        return Described(module_kind(module), _module_title(module), where)
    function = safe_text(node.target, 80) if node.op == "call_method" else _function_name(node.target)
    kind = kind_of_name(function)
    if kind == "fused":
        return Described(kind, _pair_title(node, root), name)
    return Described(kind, function, name)


def shape_text(node: Any) -> str:
    """"64×16×8×8", or "" when no shape was propagated."""
    try:
        meta = node.meta.get("tensor_meta")
        shape = getattr(meta, "shape", None)
        return "" if shape is None else "×".join(safe_text(int(size), 20) for size in shape)
    except Exception:
        return ""
