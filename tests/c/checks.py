# SPDX-License-Identifier: BSD-3-Clause
"""Compiles csrc (without python/) and tests/c/*.c into one program and runs it.

    python tests/c/checks.py MODE [--out DIR] [--build-only] [arguments of the program ...]

MODE  plain     as the extension is built
      sanitize  AddressSanitizer and UndefinedBehaviorSanitizer
      valgrind  memcheck, AVX-512 masked (valgrind does not know it)
      simde     the AVX-512 kernels emulated by SIMDe, for machines without AVX-512
      neon      cross-compiled for aarch64, run by qemu-user

Arguments of the program: [--list] [--bench] [--seed N] [name part ...]
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
MODES = ("plain", "sanitize", "valgrind", "simde", "neon")
CROSS_CC = "aarch64-linux-gnu-gcc"
SIMDE_HEADER = Path("/usr/include/simde/x86/avx512.h")
SIMDE_FLAGS = [
    f"-I{HERE / 'simde_shim'}", "-DSIMDE_NO_NATIVE", "-D__AVX512F__=1", "-D__AVX512BW__=1",
    "-D__AVX512DQ__=1", "-D__AVX512VL__=1", "-Wno-psabi", "-Og",  # -O2 takes a minute over the emulation
]  # fmt: skip


def _setup_literal(name: str) -> Any:
    """The value a literal has in setup.py, which cannot be imported without setuptools."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise SystemExit(f"setup.py has no {name}")


def compiler(mode: str) -> str:
    return CROSS_CC if mode == "neon" else os.environ.get("CC", "gcc").split()[0]


def missing(mode: str) -> str | None:
    """Why this machine cannot run a mode, or None."""
    if shutil.which(compiler(mode)) is None:
        return f"{compiler(mode)} is not installed"
    if mode == "valgrind" and shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if mode == "valgrind" and platform.machine() != "x86_64":
        return "the valgrind run is for x86_64"
    if mode == "simde" and not SIMDE_HEADER.exists():
        return f"{SIMDE_HEADER} is not there (Debian: libsimde-dev)"
    if mode == "neon" and shutil.which("qemu-aarch64") is None:
        return "qemu-aarch64 is not installed (Debian: qemu-user)"
    if mode == "sanitize":
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.c"
            probe.write_text("int main(void) { return 0; }\n")
            command = [compiler(mode), "-fsanitize=address,undefined", str(probe), "-o", f"{folder}/probe"]
            if subprocess.run(command, capture_output=True).returncode:
                return f"{compiler(mode)} has no sanitizer libraries"
    return None


def _machine_has(flag: str) -> bool:
    try:
        return re.search(rf"^flags.*\b{flag}\b", Path("/proc/cpuinfo").read_text(), re.M) is not None
    except OSError:
        return False


def _jobs(mode: str) -> list[tuple[Path, str, list[str]]]:
    """(source, object name, flags) of every object of the program."""
    isas, warnings = _setup_literal("ISAS"), _setup_literal("WARNINGS")
    machine = "aarch64" if mode == "neon" else platform.machine()
    common = [
        "-std=c11", "-ffp-contract=off", "-g", "-pthread", f"-I{CSRC}", f"-I{HERE}", *warnings,
        *{
            "sanitize": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
                         "-fno-omit-frame-pointer"],
            "simde": ["-O2", "-DCHECK_ALL_COMPILED"],
        }.get(mode, ["-O2"]),
    ]  # fmt: skip
    rows: dict[str, list[str]] = {}
    for isa, machines, flags in isas:
        if machines and machine not in machines:
            continue
        # Instrumented kernels take long to compile: only those that will run.
        if isa in ("avx512", "amx") and (mode == "valgrind" or (mode == "sanitize" and not _machine_has("avx512f"))):
            continue
        if mode == "simde":
            if isa in ("avx2", "amx"):  # the matrix unit is emulated by our own means
                continue
            # Real vectors of the compiler's own choice make the emulation bearable.
            fast = ["-mavx2", "-mfma", "-mf16c"] if _machine_has("avx2") else []
            flags = [*SIMDE_FLAGS, *fast] if isa == "avx512" else flags
        rows[isa] = flags
    common += [f"-DCBN_HAVE_{isa.upper()}" for isa in rows]

    jobs = []
    for isa, flags in rows.items():
        jobs.append((CSRC / "kernels" / f"isa_{isa}.c", f"isa_{isa}", [*common, *flags]))
    for source in sorted(HERE.glob("check_*.c")):
        if re.search(r"\bCHECK_ISA\b", source.read_text()):
            for isa, flags in rows.items():
                if isa == "amx":  # has no vectors of its own
                    continue
                define = [f"-DCHECK_ISA={isa}", f'-DCHECK_VEC_HEADER="simd/vec_{isa}.h"']
                jobs.append((source, f"{source.stem}.{isa}", [*common, *flags, *define]))
        else:
            jobs.append((source, source.stem, common))
    for layer in ("base", "cpu", "threads", "kernels", "ops", "graph"):
        for source in sorted((CSRC / layer).glob("*.c")):
            if not source.name.startswith("isa_"):
                jobs.append((source, source.stem, common))
    return jobs


def build(mode: str, out: Path) -> Path:
    """Compiles and links; returns the program. Raises SystemExit with the compiler's words on failure."""
    out.mkdir(parents=True, exist_ok=True)
    cc = compiler(mode)

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")

    def one(job: tuple[Path, str, list[str]]) -> str:
        source, name, flags = job
        target = str(out / f"{name}.o")
        run([cc, *flags, "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        objects = list(pool.map(one, _jobs(mode)))
    program = out / f"check_{mode}"
    link = {"sanitize": ["-fsanitize=address,undefined"], "neon": ["-static"]}.get(mode, [])
    run([cc, *link, *objects, "-pthread", "-lm", "-o", str(program)])
    return program


def run(mode: str, program: Path, arguments: list[str]) -> int:
    """Runs the program as its mode asks for; returns its exit status."""
    env = dict(os.environ)
    command = [str(program), *arguments]
    if mode == "sanitize":
        env["CHECK_UNDER"] = "sanitizers"
    elif mode == "valgrind":
        env |= {"CHECK_UNDER": "valgrind", "PYCONVBN_DISABLE_CPU": "avx512"}
        command = [
            "valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--fair-sched=try",
            "--errors-for-leak-kinds=definite", "--show-leak-kinds=definite", *command,
        ]  # fmt: skip
    elif mode == "neon":
        env["CHECK_UNDER"] = "qemu"
        command = ["qemu-aarch64", *command]
    return subprocess.run(command, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--out", type=Path, help="folder for objects and program (default: a temporary one)")
    parser.add_argument("--build-only", action="store_true")
    options, arguments = parser.parse_known_args()
    reason = missing(options.mode)
    if reason:
        print(f"SKIP {options.mode}: {reason}")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        program = build(options.mode, options.out or Path(folder))
        return 0 if options.build_only else run(options.mode, program, arguments)


if __name__ == "__main__":
    sys.exit(main())
