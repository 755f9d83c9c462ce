# SPDX-License-Identifier: BSD-3-Clause
"""The command line as a user meets it: another process, its output and its exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

import pyconvbn

DEMO = ("demo", "--images", "60", "--batch", "2")


def run(*args: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pyconvbn.cli", *args],
        capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run `main` in a process that was prepared by `code`."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return json.loads(run("demo", "--json", "--threads", "1").stdout)


def test_version():
    assert run("--version").stdout == f"pyconvbn {pyconvbn.__version__}\n"


def test_demo_json(report):
    assert set(report) == {
        "network", "machine", "batch_norms", "accuracy", "error", "time", "memory", "fold_report",
        "freeze_report", "verify", "verified", "failures",
    }  # fmt: skip
    assert report["verified"] is True and report["failures"] == []
    accuracy = report["accuracy"]
    assert accuracy["images"] == 597
    assert accuracy["unfused"] == accuracy["one_shot"] == accuracy["folded"] == accuracy["frozen"] >= 0.98
    assert report["time"]["batch"] == 64 and report["time"]["rounds"] >= 5
    assert report["machine"]["threads"] == 1
    assert report["machine"]["isa"] in pyconvbn._core.cpu_info()["isa_compiled"]


def test_demo_json_has_one_row_per_batch_norm(report):
    rows = report["batch_norms"]
    assert len({row["name"] for row in rows}) == len(rows) == 10
    assert [row["name"] for row in rows if row["outcome"] == "kept"] == ["norm"]
    assert {row["reason"] for row in rows} == {"OK", "NOT_CONV"}
    assert report["fold_report"]["counts"] == {"folded": 9, "kept": 1}
    assert all(report["verify"][form]["ok"] for form in ("one_shot", "folded", "frozen"))


def test_demo_text():
    text = run(*DEMO, COLUMNS="110").stdout
    for word in ("DigitsNet", "NOT_CONV", "accuracy", "one-shot fused", "frozen", "FoldReport", "verify", "✓ verified"):
        assert word in text
    assert "\x1b" not in text


def test_demo_text_in_ascii():
    done = run(*DEMO, PYTHONIOENCODING="ascii", COLUMNS="80")
    assert done.stdout.isascii() and "Conv2d 3x3 1->16" in done.stdout


@pytest.mark.parametrize(
    ("env", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_only_where_it_is_welcome(env, colour):
    ours, theirs = pty.openpty()
    plain = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyconvbn.cli", *DEMO], stdout=theirs,
            env={**plain, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **env},
        )  # fmt: skip
        os.close(theirs)
        received = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other end was closed
                break
            if not block:
                break
            received += block
        assert process.wait(timeout=60) == 0
    finally:
        os.close(ours)
    assert "✓ verified".encode() in received
    assert (b"\x1b[" in received) is colour


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "out.png"
    done = run(*DEMO, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in done.stdout


def test_plot_without_matplotlib(tmp_path):
    path = tmp_path / "out.png"
    done = run_code(
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pyconvbn.cli import main\n"
        f"sys.exit(main(['demo', '--plot', {str(path)!r}]))"
    )
    assert done.returncode == 2
    assert "needs matplotlib" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not path.exists()


def test_demo_needs_no_matplotlib():
    done = run_code(
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pyconvbn.cli import main\n"
        f"sys.exit(main({list(DEMO)!r}))"
    )
    assert done.returncode == 0, done.stderr


def test_failed_verification_is_exit_code_1():
    done = run_code(
        "import sys, pyconvbn.demo as demo\n"
        "from pyconvbn.cli import main\n"
        "right = demo.passes.fuse_conv_bn\n"
        "def wrong(gm):\n"
        "    folded, report = right(gm)\n"
        "    folded.stem.conv.bias[3] += 0.01\n"
        "    return folded, report\n"
        "demo.passes.fuse_conv_bn = wrong\n"
        f"sys.exit(main({list(DEMO)!r}))"
    )
    assert done.returncode == 1, done.stderr
    assert "verification failed" in done.stdout and "stem.bn" in done.stdout and "one_shot: " not in done.stdout


def test_page(tmp_path):
    path = tmp_path / "demo.html"
    assert str(path) in run(*DEMO, "--html", str(path)).stdout
    assert path.read_text(encoding="utf-8").count("<svg") == 2
    assert "is a folder" in run("demo", "--html", str(tmp_path), code=2).stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "required: command"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("demo", "--batch", "0"), "--batch: expected an integer of at least 1, got '0'"),
        (("demo", "--images", "many"), "--images: expected an integer of at least 1, got 'many'"),
        (("demo", "--images", "100000"), "images: expected 1 to 597, got 100000"),
        (("demo", "--threads", "9999"), "--threads: n: expected between 1 and 1024, got 9999"),
        (("demo", "--plot", "/no/such/folder/a.png"), "folder of '/no/such/folder/a.png'"),
        (("demo", "--html", "/no/such/folder/a.html"), "folder of '/no/such/folder/a.html'"),
        (("bench", "--batch", "-1"), "--batch: expected an integer of at least 1, got '-1'"),
    ],
)
def test_wrong_use_is_exit_code_2(args, message):
    done = run(*args, code=2)
    assert message in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_plot_of_unknown_kind():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert "got 'out.nonsense'" in run("demo", "--plot", "out.nonsense", code=2).stderr


def test_reader_that_leaves_early():
    process = subprocess.Popen(
        [sys.executable, "-m", "pyconvbn.cli", *DEMO],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert message == b""


def test_doctor():
    text = run("doctor").stdout
    assert "isa:" in text and "[ok]" in text
    assert json.loads(run("doctor", "--json").stdout)["ok"] is True


def test_bench_json():
    report = json.loads(run("bench", "--json", "--threads", "1").stdout)
    assert report["verified"] is True and len(report["layers"]) >= 5
    assert all(row["planned_us"] > 0 and row["failure"] is None for row in report["layers"])
    assert "benchmarks/run.py" in report["full_benchmark"]


def test_bench_text():
    text = run("bench", "--threads", "1").stdout
    assert "one-shot" in text and "benchmarks/run.py" in text
