# SPDX-License-Identifier: BSD-3-Clause
"""The demo's network, data and judgement: what is fused follows from the network itself."""

from __future__ import annotations

import importlib.resources
import importlib.util
import io
import pathlib

import numpy as np
import pytest

from pyconvbn import _demo_measure, _demo_view, demo, nn

DATA = importlib.resources.files("pyconvbn") / "data"


@pytest.fixture(scope="module")
def loaded():
    return demo.load_demo()


@pytest.fixture(scope="module")
def result():
    return _demo_measure.run_demo(batch=4, seconds=0.05)


# -- data --------------------------------------------------------------------------------------


def test_data_is_small_and_says_where_it_comes_from():
    with importlib.resources.as_file(DATA / "digits_demo.npz") as path:
        assert path.stat().st_size < 500_000
    text = (DATA / "PROVENANCE.md").read_text(encoding="utf-8")
    for fact in ("Optical Recognition of Handwritten Digits", "UCI", "CC BY 4.0", "seed"):
        assert fact in text


def test_images_are_real_pixels_of_every_class(loaded):
    _, images, labels = loaded
    assert images.shape == (597, 1, 8, 8) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 16
    assert np.array_equal(images, np.rint(images))
    assert set(labels) == set(range(10)) and np.bincount(labels).min() > 40


def test_images_are_the_end_of_the_public_data_set(loaded):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = datasets.load_digits()
    _, images, labels = loaded
    assert np.array_equal(images[:, 0], digits.images[-len(images) :])
    assert np.array_equal(labels, digits.target[-len(labels) :])


def test_statistics_are_far_from_zero_and_one(loaded):
    """Otherwise a fold that forgets them would pass: it must move the logits of every layer."""
    net, images, _ = loaded
    reference = demo.Reference(net)
    x = images[:100]
    logits = net(x, reference)
    for row in demo.batch_norm_rows(net, x):
        bn = net.get_submodule(row.name)
        mean, var = bn.running_mean, bn.running_var
        bn.running_mean, bn.running_var = np.zeros_like(mean), np.ones_like(var)
        try:
            without = net(x, reference)
        finally:
            bn.running_mean, bn.running_var = mean, var
        assert np.linalg.norm(without - logits) > 0.05 * np.linalg.norm(logits), row.name


def test_float64_accuracy_does_not_need_the_extension(loaded):
    net, images, labels = loaded
    logits = net(images, demo.Reference(net))
    assert logits.dtype == np.float64
    assert (logits.argmax(1) == labels).mean() >= 0.98


# -- which BatchNorms are fused ----------------------------------------------------------------


def test_one_row_per_batch_norm(loaded):
    net, images, _ = loaded
    rows = {row.name: row for row in demo.batch_norm_rows(net, images[:2])}
    assert set(rows) == {n for n, m in net.named_modules() if hasattr(m, "running_mean")}
    assert {name for name, row in rows.items() if row.outcome == "kept"} == {"norm"}
    assert rows["norm"].reason == "NOT_CONV" and rows["norm"].producer == "add"
    assert all(row.reason == "OK" for row in rows.values() if row.outcome == "fused")
    assert rows["up.bn"].layer == "transposed 3x3 48->32 s2 g4"
    assert rows["depthwise.bn"].layer == "depthwise 3x3 16->16"


class _Small(nn.Module):
    """conv -> bn, with hooks for each way in which fusing must be refused."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Linear(3, 3) if kind == "linear 3d" else nn.Conv1d(3, 3, 1)
        self.bn = nn.BatchNorm1d(3)
        self.eval()

    def forward(self, x, run=None):
        run = demo.Unfused(self) if run is None else run
        if self.kind == "input":
            return run.module("bn", x)
        if self.kind == "relu":
            return run.module("bn", run.relu(run.module("conv", x)))
        if self.kind == "two users":
            y = run.module("conv", x)
            return run.add(run.module("bn", y), y)
        if self.kind == "also output":
            y = run.module("conv", x)
            run.module("bn", y)
            return y
        return run.module("bn", run.module("conv", x))


def _reason(net: nn.Module) -> tuple[str, str]:
    (row,) = demo.batch_norm_rows(net, np.ones((3, 3, 3), np.float32))
    assert (row.outcome == "fused") == (row.reason == "OK")
    return row.reason, row.detail


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("plain", "OK"),
        ("input", "NOT_CONV"),
        ("relu", "NOT_CONV"),
        ("two users", "MULTI_USER"),
        ("also output", "MULTI_USER"),
        ("linear 3d", "LINEAR_ND"),
    ],
)
def test_reason_from_structure(kind, reason):
    assert _reason(_Small(kind))[0] == reason


def test_reason_from_state():
    net = _Small()
    net.bn.train()
    assert _reason(net)[0] == "BN_TRAINING"
    net.eval().conv.train()
    assert _reason(net)[0] == "CONV_TRAINING"
    net.eval()
    net.bn.eps = 0.0
    net.bn.running_var[1] = 0.0
    assert _reason(net)[0] == "NONFINITE_FOLD"


def test_reason_without_running_statistics():
    net = _Small()
    net.bn = nn.BatchNorm1d(3, track_running_stats=False).eval()
    assert _reason(net)[0] == "NO_RUNNING_STATS"


def test_a_kept_batch_norm_runs_unfused(loaded):
    """Leaving a pair out of the fused set must change who computes it, not the result."""
    net, images, _ = loaded
    x = images[:3]
    planned = demo.Planned(net, {"stem.bn"})
    assert np.allclose(net(x, planned), net(x), rtol=1e-4, atol=1e-4)
    # The layers without BN to fuse are planned by themselves.
    assert set(planned.absorbed) == {"stem.bn"}


# -- measurement and verdict -------------------------------------------------------------------


def test_accuracy_is_high_and_unchanged(result):
    accuracy = result.accuracy
    assert accuracy["images"] == 597
    assert accuracy["unfused"] >= 0.98
    assert accuracy["unfused"] == accuracy["one_shot"] == accuracy["planned"]


def test_demo_verifies(result):
    assert result.failures == []
    assert all(0 < result.error[key] < 1e-5 for key in ("unfused", "one_shot", "planned"))
    assert result.error["planned_ratio"] <= result.error["ratio_limit"]


def test_absorbed_is_what_the_plans_did(result):
    rows = {row.name: row for row in result.batch_norms}
    assert rows["res2.bn"].absorbed == ["add", "relu"]
    assert rows["up.bn"].absorbed == ["add"]
    assert rows["shortcut.bn"].absorbed == []
    assert rows["norm"].absorbed == [] and rows["norm"].error_after is None


def test_memory_and_time_are_measured(result):
    assert result.memory["weights"] >= 4 * 50_000
    assert all(result.time[f"{key}_us"] > 0 for key in ("unfused", "one_shot", "planned"))
    # By hand, from the shapes of the layers: 1.28 million multiply-adds, padding included.
    assert 2.0e6 < result.network["flops_per_image"] < 2.7e6


def test_a_wrong_fold_is_found(monkeypatch):
    """An ε of 1e-3 instead of 1e-5 in the fold: small enough to keep the predictions."""
    right = demo._efficient.efficient_conv_bn_eval

    def wrong(bn, conv, x):
        eps, bn.eps = bn.eps, 1e-3
        try:
            return right(bn, conv, x)
        finally:
            bn.eps = eps

    monkeypatch.setattr(demo._efficient, "efficient_conv_bn_eval", wrong)
    found = _demo_measure.run_demo(images=50, batch=2, seconds=0.01)
    assert not found.verified
    assert any(text.startswith("one_shot: error is") for text in found.failures)


def test_a_wrong_plan_is_named(monkeypatch):
    real = demo.plan.Plan

    class Forgetful:
        @staticmethod
        def from_modules(conv, bn, *, activation):
            # A plan that forgets the BatchNorm of two layers.
            forgotten = conv.weight.shape[0] == 16
            return real.from_modules(conv, None if forgotten else bn, activation=activation)

    monkeypatch.setattr(demo.plan, "Plan", Forgetful)
    found = _demo_measure.run_demo(images=50, batch=2, seconds=0.01)
    assert any(text.startswith("stem.bn: ") for text in found.failures)
    assert not any(text.startswith("res1.bn: ") for text in found.failures)


def test_error_ratio_of_nan_fails():
    exact = np.ones((2, 3))
    good = exact.astype(np.float32)
    assert not _demo_measure._error_ratio(good, np.full_like(good, np.nan), exact) <= 4.0
    assert _demo_measure._error_ratio(good, good, exact) == 1.0


@pytest.mark.parametrize(("argument", "value"), [("images", 0), ("images", 598), ("batch", 0)])
def test_limits_are_named(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got {value}$"):
        _demo_measure.run_demo(**{argument: value})


def test_timing_takes_turns():
    calls = []
    medians, best, rounds = _demo_measure.time_interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, seconds=0.0
    )
    assert "".join(calls) == "abc" * (rounds + 1)
    assert set(medians) == set(best) == set("abc")
    assert all(best[name] <= medians[name] for name in medians)


# -- text --------------------------------------------------------------------------------------


def _terminal(encoding: str, columns: int, monkeypatch) -> _demo_view.Terminal:
    monkeypatch.setenv("COLUMNS", str(columns))
    return _demo_view.Terminal(io.TextIOWrapper(io.BytesIO(), encoding=encoding))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("columns", [80, 100, 200])
def test_text_fits_encoding_and_width(result, encoding, columns, monkeypatch):
    text = _demo_view.demo_text(result, _terminal(encoding, columns, monkeypatch))
    text.encode(encoding)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= columns
    for row in result.batch_norms:
        assert sum(line.split()[1:2] == [row.name] for line in text.splitlines()) == 1
    assert "NOT_CONV" in text and "99.16%" in text


def test_text_names_failures(result, monkeypatch):
    monkeypatch.setattr(result, "failures", ["stem.bn: 3 elements are outside the tolerance"])
    text = _demo_view.demo_text(result, _terminal("utf-8", 100, monkeypatch))
    assert "verification failed" in text and "stem.bn: 3 elements" in text
    assert "verified" not in text


def test_half_blocks_show_the_image(monkeypatch):
    image = np.zeros((8, 8))
    image[0, 0] = image[1, 1] = image[6:8, 2] = 16
    lines = _demo_view._digit_lines(image, _terminal("utf-8", 80, monkeypatch))
    assert lines == ["▀▄      ", " " * 8, " " * 8, "  █     "]
    assert len(_demo_view._digit_lines(image, _terminal("ascii", 80, monkeypatch))) == 8


def test_plot_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "demo.png"
    _demo_view.draw_plot(result, path)
    head = path.read_bytes()
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20], "big") == 1300


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_network_is_the_one_that_was_trained(loaded):
    """The training script's own PyTorch network, given our weights, computes our logits."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    script = pathlib.Path(__file__).parents[2] / "benchmarks" / "demo_model" / "train.py"
    spec = importlib.util.spec_from_file_location("demo_model_train", script)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    net, images, _ = loaded
    theirs = train.DigitsNet()
    state = {key: torch.tensor(np.array(value)) for key, value in net.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        expected = theirs.double().eval()(torch.tensor(images).double()).numpy()
    assert np.allclose(net(images, demo.Reference(net)), expected, rtol=1e-12, atol=1e-12)
