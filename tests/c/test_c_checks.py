# SPDX-License-Identifier: BSD-3-Clause
"""The C checks in each of their modes (see checks.py), as one test each."""

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("checks.py")
SKIPPED = 77


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "sanitize", "valgrind", "simde", "neon"])
def test_c_checks(mode: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DRIVER), mode, "--out", str(tmp_path)], capture_output=True, text=True, timeout=1500
    )
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " 0 failed" in done.stdout
