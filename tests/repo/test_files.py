# SPDX-License-Identifier: BSD-3-Clause
"""What every file of the tree keeps to."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pyconvbn", "csrc", "tests", "benchmarks")
SUFFIXES = {".c", ".h", ".py", ".pyi", ".sh", ".toml", ".ini"}
FILES = sorted(
    p
    for p in [*ROOT.iterdir(), *(q for f in FOLDERS for q in (ROOT / f).rglob("*"))]
    if p.is_file() and p.suffix in SUFFIXES and "__pycache__" not in p.parts and ".egg-info" not in str(p)
)
MAX_LINES = 500
MAX_COLUMNS = 130  # the aim is 100

# path -> why it may be longer
LONG: dict[str, str] = {
    "pyconvbn/testing.py": "mostly documentation of public functions",
    "tests/python/test_nn.py": "one short test for each rule of the modules",
}

# What the package may import besides itself, NumPy and the standard library; inside functions only.
OPTIONAL = {"matplotlib", "tqdm", "threadpoolctl", "IPython"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_first_line_is_the_license(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = lines[1] if lines and lines[0].startswith("#!") else lines[0] if lines else ""
    comment = "/* SPDX-License-Identifier: BSD-3-Clause */"
    assert first == (comment if path.suffix in {".c", ".h"} else "# SPDX-License-Identifier: BSD-3-Clause")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_size(path: Path) -> None:
    lines = path.read_text().splitlines()
    if name(path) not in LONG:
        assert len(lines) <= MAX_LINES, f"{name(path)} has {len(lines)} lines: split it, or say why in LONG"
    wide = [i for i, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not wide, f"{name(path)}: lines {wide} are wider than {MAX_COLUMNS} columns"


def test_long_list_is_not_stale() -> None:
    for path, reason in LONG.items():
        assert reason and len((ROOT / path).read_text().splitlines()) > MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=name)
def test_white_space(path: Path) -> None:
    text = path.read_text()
    assert text.endswith("\n") and not text.endswith("\n\n"), f"{name(path)}: exactly one line end at the end"
    bad = [i for i, line in enumerate(text.split("\n"), 1) if line != line.rstrip() or "\t" in line or "\r" in line]
    assert not bad, f"{name(path)}: trailing white space or tabs in lines {bad}"


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.module.split(".")[0], node.lineno))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "pyconvbn").rglob("*.py")), ids=name)
def test_package_needs_numpy_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = set(sys.stdlib_module_names) | {"numpy", "pyconvbn"}
    inside = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for _, line in imports(node)
    }
    for module, line in imports(tree):
        if module not in own:
            assert module in OPTIONAL, f"{name(path)}:{line} imports {module}"
            assert line in inside, f"{name(path)}:{line} imports {module} at import time"


def test_top_level_holds_nothing_else() -> None:
    expected = {*FOLDERS, "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"}
    made = {"build", "dist", "wheelhouse", "pyconvbn.egg-info", "__pycache__"}
    there = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert there - made <= expected, f"not expected at the top level: {sorted(there - made - expected)}"
    assert expected <= there | {"MANIFEST.in"}, f"missing: {sorted(expected - there)}"


def test_no_unfinished_marks() -> None:
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    found = [f"{name(p)}:{i}" for p in FILES for i, s in enumerate(p.read_text().splitlines(), 1) if words.search(s)]
    assert not found, found
