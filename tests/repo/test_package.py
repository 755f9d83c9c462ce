# SPDX-License-Identifier: BSD-3-Clause
"""Promises about the installed package: size, symbols, import time, version."""

from __future__ import annotations

import importlib.metadata
import io
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyconvbn
from pyconvbn import _core

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(pyconvbn.__file__).resolve().parent
MAX_WHEEL_BYTES = 2_000_000
MAX_INSTALLED_BYTES = 4_000_000
MAX_IMPORT_MS = 20.0
# Modules that cost milliseconds and that nobody needs before the first call.
HEAVY = {
    "argparse", "asyncio", "concurrent", "cProfile", "email", "html", "http", "importlib.metadata", "inspect",
    "IPython", "json", "logging.config", "matplotlib", "multiprocessing", "onnx", "onnxruntime", "pandas", "pdb",
    "scipy", "sklearn", "sqlite3", "torch", "tqdm", "unittest", "urllib.request", "xml",
}  # fmt: skip


def test_only_the_init_function_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    assert _core.__file__ is not None
    listing = subprocess.run([nm, "-D", "--defined-only", _core.__file__], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert symbols == ["PyInit__core"]


def shipped_files() -> list[Path]:
    return [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def test_size() -> None:
    if "sanitize" in _core.build_info()["cflags"]:
        pytest.skip("a sanitizer build is large")
    files = shipped_files()
    assert sum(p.stat().st_size for p in files) < MAX_INSTALLED_BYTES
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, str(path.relative_to(PACKAGE)))
    assert wheel.tell() < MAX_WHEEL_BYTES


def test_data_and_stubs_are_shipped() -> None:
    names = {str(p.relative_to(PACKAGE)) for p in shipped_files()}
    assert {"py.typed", "_core.pyi", "data/PROVENANCE.md"} <= names
    source = {str(p.relative_to(ROOT / "pyconvbn")) for p in (ROOT / "pyconvbn").rglob("*.py")}
    assert source <= names, f"not installed: {sorted(source - names)}"


def test_dependencies() -> None:
    requires = importlib.metadata.requires("pyconvbn") or []
    needed = [r for r in requires if "extra ==" not in r]
    assert [re.match(r"[\w-]+", r)[0] for r in needed] == ["numpy"]  # type: ignore[index]


def in_new_process(code: str) -> str:
    # -P: from the source tree, too, import the installed package and not the tree's uncompiled one
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_time() -> None:
    if "sanitize" in _core.build_info()["cflags"]:
        pytest.skip("a sanitizer build is slow")
    code = (
        "import numpy, time; start = time.perf_counter(); import pyconvbn; "
        "print(1e3 * (time.perf_counter() - start))"
    )
    in_new_process(code)  # the compiled .pyc files are written here
    medians = []
    for _ in range(3):  # a busy machine gets another chance
        medians.append(statistics.median(float(in_new_process(code)) for _ in range(7)))
        if medians[-1] < MAX_IMPORT_MS:
            return
    pytest.fail(f"import pyconvbn takes {medians} ms over numpy (median of 7), promised {MAX_IMPORT_MS}")


def test_import_brings_nothing_heavy() -> None:
    code = (
        "import sys, numpy; before = set(sys.modules); import pyconvbn; print(*sorted(set(sys.modules) - before))"
    )
    new = set(in_new_process(code).split())
    assert "pyconvbn" in new
    heavy = {m for m in new if m in HEAVY or m.split(".")[0] in HEAVY}
    assert not heavy, f"import pyconvbn imports {sorted(heavy)}"
    foreign = {m.split(".")[0] for m in new} - set(sys.stdlib_module_names) - {"pyconvbn", "numpy"}
    assert not foreign, f"import pyconvbn imports {sorted(foreign)}"


def test_one_version() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    assert pyconvbn.__version__ == version
    assert _core.__version__ == version
    assert importlib.metadata.version("pyconvbn") == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_build_info_names_the_flags() -> None:
    flags = _core.build_info()["cflags"].split()
    assert "-ffp-contract=off" in flags and "-ffast-math" not in flags
    assert not [f for f in flags if f.startswith("-march")]
