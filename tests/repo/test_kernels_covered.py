# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel of the list has a test and a benchmark entry, and every table has every kernel."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from pyconvbn import _core

ROOT = Path(__file__).resolve().parents[2]
KERNELS = _core._testing.kernel_names()
ISAS = ("avx512", "avx2", "neon", "scalar")


def test_list_agrees_with_the_header() -> None:
    header = (ROOT / "csrc" / "kernels" / "cbn_kernels.h").read_text()
    macro = header[header.index("#define CBN_KERNEL_LIST(X)") :].split("\n\n")[0]
    assert re.findall(r"^\s+X\((\w+),", macro, re.M) == list(KERNELS)
    assert len(set(KERNELS)) == len(KERNELS) > 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_has_a_test(kernel: str) -> None:
    texts = {p: p.read_text() for p in (ROOT / "tests" / "kernels").rglob("test_*.py")}
    texts |= {p: p.read_text() for p in (ROOT / "tests" / "c").glob("check_*.c")}
    # In C a kernel is called through its table: (*t)->name or k->name; in Python by its name in _testing.
    users = [
        p.name for p, text in texts.items() if re.search(rf"->{kernel}\s*\(|[\"'.]{kernel}\b|\b{kernel}\s*\(", text)
    ]
    assert users, f"no test calls the kernel {kernel}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_has_a_benchmark(kernel: str) -> None:
    path = ROOT / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("benchmarks_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    assert kernel in module.KERNEL_BENCHES


def test_no_stale_benchmark() -> None:
    text = (ROOT / "benchmarks" / "kernels.py").read_text()
    stale = set(re.findall(r"^def bench_(\w+)\(", text, re.M)) - set(KERNELS)
    assert not stale


def test_isa_files_and_build_table_agree() -> None:
    files = {p.stem.removeprefix("isa_") for p in (ROOT / "csrc" / "kernels").glob("isa_*.c")}
    table = re.search(r"^ISAS = \[\n(.*?)^\]", (ROOT / "setup.py").read_text(), re.S | re.M)
    assert table is not None
    assert files == set(re.findall(r'^\s+\("(\w+)"', table[1], re.M)) == {*ISAS, "amx"}
    vectors = {p.stem.removeprefix("vec_") for p in (ROOT / "csrc" / "simd").glob("vec_*.h")}
    assert vectors == files - {"amx"}


def test_vector_headers_define_the_same_operations() -> None:
    """The scalar header is the specification: nobody has more, nobody has less."""
    operations = {
        isa: set(
            re.findall(
                r"^CBN_INLINE [\w ]+?\**\s*\**(vf_\w*[a-z0-9])\(",
                (ROOT / "csrc" / "simd" / f"vec_{isa}.h").read_text(),
                re.M,
            )
        )
        for isa in ISAS
    }
    assert len(operations["scalar"]) >= 15
    for isa, names in operations.items():
        assert names == operations["scalar"], f"vec_{isa}.h: {sorted(names ^ operations['scalar'])}"


def test_available_tables_are_tested() -> None:
    info = _core.cpu_info()
    assert list(_core._testing.isas()) == list(info["isa_available"])
    assert set(info["isa_available"]) <= set(info["isa_compiled"]) <= {*ISAS, "amx"}
    assert info["isa_available"][-1] == "scalar"
    assert info["isa_active"] == info["isa_available"][0]
