# SPDX-License-Identifier: BSD-3-Clause
"""Shared fixtures. The reference and its tolerances are pyconvbn.testing; there is no second one here."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


# A shared machine is slow at times. What lands must not depend on luck: new shapes are found by running at home.
hypothesis.settings.register_profile("home", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "home")


def pytest_report_header() -> list[str]:
    import pyconvbn._core as core

    cpu = core.cpu_info()
    mask = os.environ.get("PYCONVBN_DISABLE_CPU", "")
    return [
        f"pyconvbn: {cpu['name']} ({platform.machine()}), available {' '.join(cpu['isa_available'])}, "
        f"active {cpu['isa_active']}, mask {mask or 'none'}, {core.get_num_threads()} threads",
        f"pyconvbn from {core.__file__}",
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    import pyconvbn._core as core

    if item.get_closest_marker("vector_isa") and core.cpu_info()["isa_active"] == "scalar":
        pytest.skip("the active instruction set is scalar: other algorithms win there")


def _seed_of(node_id: str) -> int:
    """A seed of the test's own that does not change from run to run."""
    value = 0
    for char in node_id:
        value = (value * 131 + ord(char)) % (2**32)
    return value


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed for this test; part of what a failure prints."""
    return _seed_of(request.node.nodeid)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session", autouse=True)
def away_from_the_source_tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Python processes that tests start import the installed package, not the tree's uncompiled one."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The source tree, which the tests are part of."""
    return ROOT


@pytest.fixture(scope="session")
def isas() -> list[str]:
    """Names of the instruction sets this machine (and the mask) can run, best first."""
    import pyconvbn._core as core

    return list(core.cpu_info()["isa_available"])


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Restores the number of threads after the test."""
    import pyconvbn._core as core

    before = core.get_num_threads()
    yield
    core.set_num_threads(before)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch, the second oracle; tests that take it are skipped where it is not installed."""
    return pytest.importorskip("torch", reason="torch (the 'oracle' extra) is not installed")
