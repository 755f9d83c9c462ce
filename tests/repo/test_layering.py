# SPDX-License-Identifier: BSD-3-Clause
"""The rules of csrc/README.md, read off the sources."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".c", ".h"})

# folder -> folders it may include from (itself too)
ALLOWED = {
    "base": {"base"},
    "cpu": {"cpu", "base"},
    "threads": {"threads", "cpu", "base"},
    "simd": {"simd", "base"},
    "kernels": {"kernels", "simd", "cpu", "base"},
    "ops": {"ops", "kernels", "threads", "cpu", "base"},
    "graph": {"graph", "ops", "threads", "cpu", "base"},
    "python": {"python", "graph", "ops", "kernels", "threads", "cpu", "base"},
}
KERNEL_CONTRACTS = {"kernels/cbn_kernels.h", "kernels/cbn_amx.h"}

# what -> (pattern in code without comments and strings, folders where it may stand)
CONFINED = {
    "Python.h": (r"#\s*include\s*<(Python|structmember)\.h>", {"python"}),
    "NumPy headers": (r"#\s*include\s*<numpy/", {"python"}),
    "intrinsics headers": (r"#\s*include\s*<(\w*intrin|arm_neon|arm_sve)\.h>", {"simd"}),
    "intrinsics": (r"\b(_mm(256|512)?_\w+|__m(128|256|512)[di]?|float32x4_t)\b", {"simd"}),
    "threads": (r"#\s*include\s*<(pthread|threads|semaphore)\.h>|\bpthread_\w+\s*\(", {"threads"}),
    "allocation": (
        r"(?<![\w>.])(malloc|calloc|realloc|free|aligned_alloc|posix_memalign|memalign|mmap|munmap|strdup)\s*\(",
        {"base"},
    ),
    "getenv": (r"\b(secure_)?getenv\s*\(", {"cpu", "threads", "python"}),
}


def folder(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def code(path: Path) -> str:
    """The text without comments and string literals, on the same lines."""
    text = without_comments(path.read_text())
    return re.sub(r'(?<!include )"(\\.|[^"\\\n])*"', '""', text)


def includes(path: Path) -> list[str]:
    """Names in quotes; macro includes have none."""
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', without_comments(path.read_text()), re.M)


def name(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_there_is_something_to_check() -> None:
    assert {folder(p) for p in SOURCES} == set(ALLOWED)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_includes_go_one_way(path: Path) -> None:
    for target in includes(path):
        assert (CSRC / target).is_file(), f'{name(path)} includes "{target}": not a path from csrc/'
        layer = target.split("/")[0]
        assert layer in ALLOWED[folder(path)], f"{name(path)} may not include {target}"
        if layer == "kernels" and folder(path) != "kernels":
            assert target in KERNEL_CONTRACTS, f"{name(path)} may include {KERNEL_CONTRACTS} only, not {target}"


def test_vectors_are_seen_by_isa_files_only() -> None:
    for path in SOURCES:
        wants_simd = any(t.startswith("simd/") for t in includes(path))
        if wants_simd and folder(path) != "simd":
            assert path.name.startswith("isa_") or path.name == "amx_emulated.c", f"{name(path)} includes a vector header"
        templates = [t for t in includes(path) if t.endswith("_tmpl.h")]
        if folder(path) == "kernels" and templates and path.name != "isa_body.h":
            assert path.name.endswith("_tmpl.h") or path.name.startswith("isa_") or path.name == "amx_emulated.c", name(path)


def test_kernels_neither_allocate_nor_thread_nor_report() -> None:
    for path in SOURCES:
        if folder(path) == "kernels":
            banned = [t for t in includes(path) if t in {"base/cbn_alloc.h", "base/cbn_status.h"}]
            assert not banned, f"{name(path)} includes {banned}"
            assert "stdio.h" not in path.read_text(), f"{name(path)} wants to print"


@pytest.mark.parametrize("what", CONFINED)
def test_confinement(what: str) -> None:
    pattern, homes = CONFINED[what]
    found = []
    for path in SOURCES:
        if folder(path) not in homes:
            for number, line in enumerate(code(path).splitlines(), 1):
                if re.search(pattern, line):
                    found.append(f"{name(path)}:{number}: {line.strip()}")
    assert not found, f"{what} belong in {sorted(homes)} only:\n" + "\n".join(found)
    assert any(re.search(pattern, code(p)) for p in SOURCES if folder(p) in homes), "the pattern finds nothing at home"


def test_basenames_are_unique() -> None:
    twice = [n for n, k in Counter(p.name for p in CSRC.rglob("*") if p.is_file()).items() if k > 1 and n != "README.md"]
    assert not twice


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix == ".h"], ids=name)
def test_headers_are_guarded(path: Path) -> None:
    """Templates are meant to be included once an instruction set and have no guard."""
    template = path.name.endswith("_tmpl.h") or path.name == "isa_body.h"
    guard = re.search(r"#ifndef (CBN_\w+_H)\n#define \1\n", path.read_text())
    assert bool(guard) != template, f"{name(path)}: {'no guard expected' if template else 'guard missing'}"


def test_python_comes_first() -> None:
    """Python.h sets feature macros of the system headers, so nothing may include one of those before it."""
    for path in SOURCES:
        if folder(path) == "python":
            found = includes(path)
            assert not found or found[0].startswith("python/"), f"{name(path)} includes {found[0]} first"
