# SPDX-License-Identifier: BSD-3-Clause
"""The machine a run happens on: cores to use, memory settings, and the facts that stand above every table.

Imports nothing heavy: it works before NumPy starts its threads.
"""

import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Any

# Best first; an entry masks those behind which it stands when a lower one is asked for.
_ISAS = {"x86_64": ("avx512", "avx2", "scalar"), "aarch64": ("neon", "scalar")}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYCONVBN_NUM_THREADS")


def prepare(threads: int, isa: str | None) -> dict[str, Any]:
    """Pins the process, masks the CPU, lets malloc keep freed memory: before pyconvbn is imported. Facts of the run."""
    cpus = pin(threads)
    if isa:
        cap_isa(isa)
    return {**facts(cpus), "malloc_keeps": keep_freed_memory()}


def pin(threads: int) -> list[int]:
    """Restricts the process to `threads` CPUs on as many physical cores as there are; returns them."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise ValueError(f"--threads {threads}: this process may use 1 to {len(allowed)} CPUs")
    seen: dict[str, int] = {}
    rank = {}
    for cpu in allowed:
        siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        rank[cpu] = seen[siblings] = seen.get(siblings, -1) + 1
    chosen = sorted(sorted(allowed, key=lambda cpu: (rank[cpu], cpu))[:threads])
    os.sched_setaffinity(0, chosen)
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    return chosen


def cap_isa(isa: str) -> None:
    """Masks everything better than `isa`. Takes effect when pyconvbn is imported."""
    order = _ISAS.get(platform.machine(), ("scalar",))
    if isa not in order:
        raise ValueError(f"--isa {isa}: on {platform.machine()} choose one of {', '.join(order)}")
    os.environ["PYCONVBN_DISABLE_CPU"] = ",".join(order[:order.index(isa)])


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, so that peers that allocate their output do not fault in new pages each call.

    True if the C library (glibc) took it.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


class OtherLoad:
    """Share of the used CPUs' time that went to somebody else since construction."""

    def __init__(self, cpus: list[int]) -> None:
        self._cpus = {f"cpu{cpu}" for cpu in cpus}
        self._start = self._now()

    def _now(self) -> tuple[float, float, float]:
        ticks = os.sysconf("SC_CLK_TCK")
        busy = 0.0
        for line in (_read("/proc/stat") or "").splitlines():
            name, *values = line.split()
            if name in self._cpus:
                numbers = [int(value) for value in values[:8]]
                busy += (sum(numbers) - numbers[3] - numbers[4]) / ticks  # all but idle and iowait
        return time.perf_counter(), busy, time.process_time()

    def share(self) -> float:
        wall, busy, own = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return max(0.0, busy - own) / (wall * len(self._cpus)) if wall > 0 else 0.0


def facts(cpus: list[int]) -> dict[str, Any]:
    """What can be told without any of the libraries."""
    cpuinfo = _read("/proc/cpuinfo") or ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in cpuinfo.splitlines() if ":" in line)
    model = fields.get("model name") or fields.get("CPU part") or platform.processor() or "unknown"
    family = "/".join(fields[key] for key in ("cpu family", "model") if key in fields)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": f"{model} (family/model {family})" if family else model,
        "cpus_online": os.cpu_count(), "cpus_used": cpus,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not visible",
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled") or "not visible",
        "python": platform.python_version(),
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
