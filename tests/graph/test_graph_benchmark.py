# SPDX-License-Identifier: BSD-3-Clause
"""benchmarks/graph.py runs, measures every task it has and notices a wrong result. No timings asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "graph.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    sys.modules.pop("graph", None)
    import graph

    yield graph
    sys.modules.pop("graph", None)


def test_every_task_runs(tmp_path):
    target = tmp_path / "graph.json"
    done = run("--nodes", "60", "--rounds", "1", "--max-nodes", "1000", "--own-only", "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    tasks = {row["task"]: row for row in result["tasks"]}
    expected = {"create", "erase", "lint", "dce", "trace", "replace", "efficient", "fuse", "overhead", "resident"}
    assert expected <= set(tasks)
    assert all(row["ours"] > 0 for name, row in tasks.items() if name not in ("overhead", "resident"))
    assert [row["nodes"] for row in result["growth"]] == [1000]
    for name in tasks:
        assert name in done.stdout


def test_beside_torch(torch, script, tmp_path):
    target = tmp_path / "graph.json"
    done = run("--nodes", "30", "--rounds", "1", "--max-nodes", "0", "--no-memory", "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    compared = {row["task"] for row in result["tasks"] if row["same"]}
    expected = {name for name, task in script.TASKS.items() if task.result is not None and not task.ours_only}
    assert compared == expected and len(expected) >= 9
    assert set(result["info"]["versions"]) == {"ours", "torch"}


def test_a_different_result_is_seen(script):
    """Both libraries are ours here; the second one makes another graph."""

    class Other(script.Library):
        def __init__(self):
            super().__init__("ours")
            self.name = "torch"

    def prepare(library, nodes):
        return script.chain(library, nodes if library.name == "ours" else nodes + 2)

    task = script.Task("t", "", None, prepare, lambda library, graph: None, script.graph_after)
    libraries = [script.Library("ours"), Other()]
    assert script.measure(task, libraries, 8, 1)["same"] is False
    same = script.Task("t", "", None, lambda library, n: script.chain(library, n), lambda *_: None, script.graph_after)
    assert script.measure(same, libraries, 8, 1)["same"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--match", "no such task"), "no task matches"), (("--match", "("), "--match"), (("--nodes", "2"), "at least 6")],
)
def test_refuses_clearly(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
