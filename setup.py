# SPDX-License-Identifier: BSD-3-Clause
"""Builds pyconvbn._core. Everything static is in pyproject.toml.

Environment: PYCONVBN_STRICT_ISA=1 (an instruction set the compiler cannot build is an error, not a message),
PYCONVBN_WERROR=1, PYCONVBN_SANITIZE=address,undefined, PYCONVBN_JOBS=n, PYCONVBN_SKIP_ISA=avx512,amx (left out of the build).
"""

import os
import platform
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent

# (isa, machines it is built on (None: all), flags). One row per csrc/kernels/isa_<isa>.c; nothing else here knows
# about kernels. tests/c reads this table too.
ISAS = [
    ("avx512", ("x86_64",),
     ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]),
    ("amx", ("x86_64",), ["-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
    ("avx2", ("x86_64",), ["-mavx2", "-mfma", "-mf16c"]),
    ("neon", ("aarch64",), []),
    ("scalar", None, ["-Os"]),  # the fallback: its size matters, its speed hardly
]  # fmt: skip
LAYERS = ["base", "cpu", "threads", "kernels", "ops", "graph", "python"]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wvla"]
# -ffp-contract=off: a fused multiply-add is written as one or there is none, so all instruction sets agree.
CFLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0", *WARNINGS]
LDFLAGS = ["-Wl,--exclude-libs,ALL"]
#: Local symbols serve debuggers only. Folders that chase pointers: -O3 would make them larger, not faster.
STRIP, POINTER_CHASERS = ["-Wl,-s"], ("graph", "python")


def sources() -> list[str]:
    return sorted(
        str(p.relative_to(ROOT))
        for layer in LAYERS
        for p in (ROOT / "csrc" / layer).glob("*.c")
        if not p.name.startswith("isa_")
    )


def enabled(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def sanitize() -> tuple[list[str], list[str]]:
    """(compile flags, link flags) of PYCONVBN_SANITIZE."""
    kinds = os.environ.get("PYCONVBN_SANITIZE", "")
    if not kinds:
        return [], []
    flags = [f"-fsanitize={kinds}", "-fno-omit-frame-pointer"]
    if "undefined" in kinds:
        flags.append("-fno-sanitize-recover=undefined")
    return [*flags, "-g1", "-O1", "-UNDEBUG"], flags


class IsaBuildExt(build_ext):
    """Compiles every C file as its own job, isa_*.c with the flags of their row, and links the objects."""

    def build_extension(self, ext: Extension) -> None:
        # Flags may come from the environment: objects of other flags are as stale as those of older sources.
        stamp = Path(self.build_temp) / "pyconvbn-flags"
        wanted = repr([self.compiler.compiler_so, ext.extra_compile_args, ext.extra_link_args, ISAS,
                       os.environ.get("PYCONVBN_SKIP_ISA")])
        fresh = stamp.is_file() and stamp.read_text() == wanted
        if fresh and not self.force and not newer_group(ext.depends, self.get_ext_fullpath(ext.name), "newer"):
            return
        chasers = () if sanitize()[0] else POINTER_CHASERS
        jobs = [(source, ["-O2"] if Path(source).parent.name in chasers else []) for source in ext.sources]
        for isa, machines, flags in ISAS:
            if machines and platform.machine() not in machines:
                continue
            if isa in os.environ.get("PYCONVBN_SKIP_ISA", "").split(","):
                continue
            if not self.understands(flags):
                message = f"pyconvbn: this compiler cannot build for {isa} ({' '.join(flags)})"
                if enabled("PYCONVBN_STRICT_ISA"):
                    raise CompileError(message)
                print(f"{message}; going on without it", file=sys.stderr)
                continue
            ext.define_macros.append((f"CBN_HAVE_{isa.upper()}", None))
            jobs.append((f"csrc/kernels/isa_{isa}.c", flags))

        def compile_one(job: tuple[str, list[str]]) -> list[str]:
            source, flags = job
            return self.compiler.compile(
                [source], output_dir=self.build_temp, macros=ext.define_macros, include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags], depends=ext.depends,
            )  # fmt: skip

        # Slowest files first (the kernels of the widest vectors), so that the cores finish together.
        jobs.sort(key=lambda job: -len(job[1]))
        workers = int(os.environ.get("PYCONVBN_JOBS", "0")) or min(8, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool:
            for objects in pool.map(compile_one, jobs):
                ext.extra_objects += objects
        declared, ext.sources = ext.sources, []
        forced, self.force = self.force, True  # the objects are new, whatever the sources' dates say
        try:
            super().build_extension(ext)
        finally:
            ext.sources, self.force = declared, forced
        stamp.write_text(wanted)

    def understands(self, flags: list[str]) -> bool:
        if not flags:
            return True
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / "probe.c"
            probe.write_text("#include <immintrin.h>\nint probe(void);\nint probe(void) { return 0; }\n")
            try:
                self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


def main() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        sys.exit(
            "pyconvbn is built for Linux on x86_64 and aarch64 only; "
            f"this is {platform.system()} on {platform.machine()}."
        )
    import numpy

    with open(ROOT / "pyproject.toml", "rb") as file:
        version = tomllib.load(file)["project"]["version"]
    extra_compile, extra_link = sanitize()
    cflags = CFLAGS + (["-Werror"] if enabled("PYCONVBN_WERROR") else []) + extra_compile
    setup(
        ext_modules=[
            Extension(
                "pyconvbn._core",
                sources(),
                # NumPy's headers are not ours to keep free of warnings.
                include_dirs=["csrc"],
                depends=["setup.py", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[ch]"))],
                define_macros=[
                    ("CBN_VERSION", f'"{version}"'),
                    ("CBN_CFLAGS", f'"{" ".join(cflags)}"'),
                    ("CBN_NUMPY_VERSION", f'"{numpy.__version__}"'),
                ],
                extra_compile_args=["-pthread", "-isystem", numpy.get_include(), *cflags],
                extra_link_args=["-pthread", *LDFLAGS, *(extra_link or STRIP)],
                libraries=["m"],
            )
        ],
        cmdclass={"build_ext": IsaBuildExt},
    )


if __name__ == "__main__":
    main()
