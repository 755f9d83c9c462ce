# SPDX-License-Identifier: BSD-3-Clause
"""Thread settings, configuration output and the self-check."""

import os
import subprocess
import sys

import pytest

import pyconvbn


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.sep,
        env={**{k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}, **environment})


def test_set_get_and_context_manager():
    before = pyconvbn.get_num_threads()
    try:
        pyconvbn.set_num_threads(3)
        assert pyconvbn.get_num_threads() == 3
        with pyconvbn.num_threads(1):
            assert pyconvbn.get_num_threads() == 1
            with pytest.raises(RuntimeError), pyconvbn.num_threads(2):
                raise RuntimeError
            assert pyconvbn.get_num_threads() == 1
        assert pyconvbn.get_num_threads() == 3
    finally:
        pyconvbn.set_num_threads(before)


@pytest.mark.parametrize("value,error", [(0, ValueError), (-1, ValueError), (2000, ValueError), (1.5, TypeError),
                                         ("2", TypeError), (True, TypeError), (None, TypeError)])
def test_bad_thread_counts(value, error):
    before = pyconvbn.get_num_threads()
    with pytest.raises(error, match="n: expected"):
        pyconvbn.set_num_threads(value)
    assert pyconvbn.get_num_threads() == before


SHOW = "import pyconvbn; from pyconvbn import _core; print(pyconvbn.get_num_threads(), _core.num_threads_source())"


@pytest.mark.parametrize("environment,expected", [
    ({"PYCONVBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, "3 PYCONVBN_NUM_THREADS"),
    ({"OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
    ({"OMP_NUM_THREADS": "5,2"}, "5 OMP_NUM_THREADS"),
    ({"PYCONVBN_NUM_THREADS": "many", "OMP_NUM_THREADS": "5"}, "5 OMP_NUM_THREADS"),
])
def test_environment_order(environment, expected):
    assert run_python(SHOW, **environment).stdout.strip() == expected


def test_default_is_the_usable_cores():
    count, source = run_python(SHOW).stdout.strip().split(" ", 1)
    assert 1 <= int(count) <= len(os.sched_getaffinity(0)) and source in ("affinity", "cgroup quota")
    core = min(os.sched_getaffinity(0))
    pinned = run_python(f"import os; os.sched_setaffinity(0, [{core}]); " + SHOW)
    assert pinned.stdout.split()[0] == "1"


def test_show_config_is_one_pasteable_block(capsys):
    pyconvbn.show_config()
    text = capsys.readouterr().out
    for word in ("pyconvbn:", "numpy:", "compiler:", "flags:", "cpu:", "isa:", "threads:"):
        assert word in text


def test_doctor_finds_this_installation_well():
    with pyconvbn.num_threads(1):
        report = pyconvbn.doctor()
    assert report.ok, str(report)
    assert {name for name, _, _ in report.checks} >= {"conv2d 3x3 + BatchNorm", "same bits on 1 and 2 threads"}
    assert report.to_dict()["ok"] is True and "[ok]" in str(report)


def test_masked_cpu_features_are_not_used():
    code = "from pyconvbn import _core; print(_core.cpu_info()['isa_active'])"
    assert run_python(code, PYCONVBN_DISABLE_CPU="avx512,avx2").stdout.strip() in ("scalar", "neon")
    assert "avx512" not in run_python(code, PYCONVBN_DISABLE_CPU="avx512").stdout
    bad = run_python("import warnings; warnings.simplefilter('error'); " + code, PYCONVBN_DISABLE_CPU="avx9000")
    assert bad.returncode != 0 and "avx9000" in bad.stderr


def test_a_thread_count_that_is_not_understood_is_told():
    result = run_python("import pyconvbn; pyconvbn.get_num_threads()", PYCONVBN_NUM_THREADS="many")
    assert result.returncode == 0 and "RuntimeWarning" in result.stderr and "'many'" in result.stderr


def test_threadpoolctl_controller():
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    code = (
        "import numpy, threadpoolctl, pyconvbn, pyconvbn.threadpool as t; t.register(); t.register(); "
        "mine = [i for i in threadpoolctl.threadpool_info() if i['user_api'] == 'pyconvbn']; "
        "assert len(mine) == 1, mine; pyconvbn.set_num_threads(2)\n"
        "with threadpoolctl.threadpool_limits(1, user_api='pyconvbn'): print(pyconvbn.get_num_threads())\n"
        "print(pyconvbn.get_num_threads())")
    result = run_python(code)
    assert result.stdout.split() == ["1", "2"], result.stderr


def test_source_tree_without_a_build_says_so(tmp_path):
    import shutil
    from pathlib import Path

    package = Path(pyconvbn.__file__).parent
    tree = tmp_path / "tree"
    shutil.copytree(package, tree / "pyconvbn", ignore=shutil.ignore_patterns("*.so", "__pycache__", "data"))
    (tree / "csrc").mkdir()
    result = subprocess.run([sys.executable, "-c", "import pyconvbn"], cwd=tree, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(tree)})
    assert result.returncode != 0
    assert "source tree" in result.stderr and "pip install" in result.stderr
