# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation shows works: every Python block of README.md in order, every docstring example."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re

import numpy as np
import pytest

import pyconvbn

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pyconvbn.__path__, "pyconvbn.")
    if not module.name.endswith("._core")
)


def readme_blocks(text):
    """(code, expected output or None): a python block, and the plain block that directly follows it."""
    pattern = r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?"
    return [(match[1], match[2] or None) for match in re.finditer(pattern, text, re.S)]


def shape_of(text):
    """Output with its numbers that differ between machines (kernels, timings, sizes) taken out."""
    return re.sub(r"[\d.]+", "#", text).split()


def test_readme_blocks_run_in_order(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = readme_blocks((root / "README.md").read_text())
    assert len(blocks) >= 5
    namespace = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)  # noqa: S102
        if expected is not None and "avx" not in expected:
            assert shape_of(printed.getvalue()) == shape_of(expected), code


@pytest.mark.parametrize("name", ["pyconvbn", *MODULES])
def test_docstring_examples(name):
    module = importlib.import_module(name)
    # as after `from pyconvbn.nn import *`, which the short examples of modules assume
    names = {key: getattr(pyconvbn.nn, key) for key in pyconvbn.nn.__all__ if key not in vars(module)}
    result = doctest.testmod(
        module, extraglobs={"np": np, **names}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_every_public_function_has_a_docstring():
    bare = []
    for name in pyconvbn.__all__:
        value = getattr(pyconvbn, name)
        if callable(value) and not (value.__doc__ or "").strip():
            bare.append(name)
    for module in ("functional", "testing"):
        for name in getattr(pyconvbn, module).__all__:
            value = getattr(getattr(pyconvbn, module), name)
            if callable(value) and not (value.__doc__ or "").strip():
                bare.append(f"{module}.{name}")
    assert not bare
