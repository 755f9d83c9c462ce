# SPDX-License-Identifier: BSD-3-Clause
"""The innermost loops of the convolution kernels keep their sums in registers.

A compiler that spills an accumulator halves the speed and changes no result, so only the machine code tells.
"""

from __future__ import annotations

import ast
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$")
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")


@dataclass
class Instruction:
    address: int
    name: str
    operands: str


def setup_literal(name: str) -> Any:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def disassemble(isa: str, folder: Path) -> dict[str, list[Instruction]]:
    """Functions of the kernel object, compiled as setup.py does."""
    flags = next(f for name, _, f in setup_literal("ISAS") if name == isa)
    target = folder / f"isa_{isa}.o"
    subprocess.run(
        ["gcc", "-std=c11", "-O3", "-DNDEBUG", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-fwrapv",
         *flags, "-Icsrc", "-c", f"csrc/kernels/isa_{isa}.c", "-o", str(target)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(target)], check=True, capture_output=True, text=True
    )
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.stdout.splitlines():
        if start := FUNCTION.match(line):
            current = functions.setdefault(start[1], [])
        elif found := LINE.match(line):
            current.append(Instruction(int(found[1], 16), found[2], found[3]))
    return functions


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies between a backward jump and its target that hold no other such body."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for i, instruction in enumerate(code):
        target = re.match(r"^([0-9a-f]+)(?: <|$)", instruction.operands)
        if instruction.name.startswith("j") and target:
            start = index.get(int(target[1], 16))
            if start is not None and start <= i:
                spans.append((start, i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [code[a : b + 1] for a, b in inner]


def has_frame_pointer(code: list[Instruction]) -> bool:
    return any(i.name == "mov" and i.operands == "%rsp,%rbp" for i in code)


def stack_stores(body: list[Instruction], frame: bool) -> list[str]:
    """Instructions whose destination, the last operand, is on the stack."""
    stack = re.compile(r"(^|,)-?(0x[0-9a-f]+)?\(%r(sp|bp)[^)]*\)$" if frame else r"(^|,)-?(0x[0-9a-f]+)?\(%rsp[^)]*\)$")
    reads = re.compile(r"^(v?u?comis|cmp|test|prefetch|bt[bwlq]?$|nop|j)")
    return [
        f"{i.address:x}: {i.name} {i.operands}"
        for i in body
        if stack.search(i.operands.split(" #")[0].strip()) and not reads.match(i.name)
    ]


@pytest.fixture(scope="module", params=["avx2", "avx512"])
def functions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Instruction]]:
    if platform.machine() != "x86_64":
        pytest.skip(f"reads x86-64 machine code; this is {platform.machine()}")
    for tool in ("gcc", "objdump"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    return disassemble(request.param, tmp_path_factory.mktemp(request.param))


# Of 24 sums and 32 registers, gcc 12 still keeps one or two sums in memory: less than the loads of the loop take.
ALLOWED = {("tap_", "avx512"): 2}


@pytest.mark.parametrize("family", ["oc_", "px_", "px2_", "wg_", "ln_", "tap_"])
def test_no_stack_traffic(functions: dict[str, list[Instruction]], family: str) -> None:
    hot = {}
    for name, code in functions.items():
        if name.startswith(family):
            bodies = [b for b in innermost_loops(code) if any(i.name.startswith("vfmadd") for i in b)]
            if bodies:
                hot[name] = (bodies, has_frame_pointer(code))
    assert hot, f"no loop with fused multiply-adds in {family}*; there are {sorted(functions)}"
    found = []
    for name, (bodies, frame) in hot.items():
        allowed = ALLOWED.get((family, name.rsplit("_", 1)[-1]), 0)
        for stores in (stack_stores(body, frame) for body in bodies):
            if len(stores) > allowed:
                found += [f"{name}: {line}" for line in stores]
    assert not found, f"{len(found)} in {len(hot)} functions\n" + "\n".join(found[:40])


def test_the_check_sees_a_spill() -> None:
    """The reader of machine code finds what it looks for."""
    code = [
        Instruction(0x10, "mov", "%rsp,%rbp"),
        Instruction(0x14, "vfmadd231ps", "(%rax),%ymm0,%ymm1"),
        Instruction(0x18, "vmovaps", "%ymm1,-0x40(%rbp)"),
        Instruction(0x1C, "mov", "%rax,0x8(%rsp)"),
        Instruction(0x20, "mov", "0x8(%rsp),%rax"),
        Instruction(0x24, "jne", "14 <f+0x4>"),
    ]
    (body,) = innermost_loops(code)
    assert body[0].address == 0x14 and body[-1].name == "jne"
    assert len(stack_stores(body, has_frame_pointer(code))) == 2
