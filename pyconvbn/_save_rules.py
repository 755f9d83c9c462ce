# SPDX-License-Identifier: BSD-3-Clause
"""What holds of the nodes of a saved graph, checked when it is written and when it is read."""

from __future__ import annotations

import functools
import keyword
import re
from typing import Any

from . import _core
from ._save_values import ATTRIBUTES
from .fx.graph_module import _RESERVED
from .nn.module import Module

__all__ = ["FORMAT", "JSON", "VERSION", "check_call", "check_path", "is_name"]

FORMAT, VERSION = "pyconvbn.graph", 1
JSON = "graph.json"
_PART = re.compile(r"[A-Za-z0-9_]{1,200}")
_ROWS = "method."
_OWN = frozenset({"_kinds", "_not_saved", "training", "meta", "class_name", "report"})


def is_name(text: Any) -> bool:
    """Fit for the name of a variable: printed graphs are Python code."""
    return type(text) is str and text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def check_path(target: Any) -> str:
    """A dotted path below a GraphModule that hides nothing of it; ValueError."""
    parts = target.split(".") if type(target) is str else [""]
    if len(parts) > 50 or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(f"{target!r:.100} is no dotted path of plain names")
    if parts[0] in _RESERVED or any(hasattr(Module, part) or part in _OWN for part in parts):
        raise ValueError(f"{target!r:.100} would hide an attribute of the module itself")
    return str(target)


def check_call(op: Any, target: Any, args: Any, kwargs: Any) -> None:
    """What else must hold of a node, whether it is saved or loaded; ValueError."""
    if op in ("get_attr", "call_module"):
        check_path(target)
    elif op == "placeholder":
        if type(target) is not str or not is_name(target.removeprefix("*").removeprefix("*")):
            raise ValueError(f"{target!r:.100} is no name of a parameter")
    elif op == "call_method":
        if type(target) is not str or _ROWS + target not in _methods():
            raise ValueError(f"there is no method {target!r:.100} in the op table")
    elif op == "call_function":
        if target == "builtins.getattr" and (
            kwargs or len(args) != 2 or type(args[1]) is not str or args[1] not in ATTRIBUTES
        ):
            raise ValueError(f"getattr may read one of {', '.join(sorted(ATTRIBUTES))} only")
    elif op != "output":
        raise ValueError(f"there is no op {op!r:.100}")


@functools.cache
def _methods() -> frozenset[str]:
    return frozenset(name for name in _core.op_names() if name.startswith(_ROWS))
