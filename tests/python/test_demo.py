# SPDX-License-Identifier: BSD-3-Clause
"""The demo's network, data and judgement: what is folded follows from the traced graph."""

from __future__ import annotations

import copy
import html
import html.parser
import importlib.resources
import importlib.util
import io
import pathlib
import re

import numpy as np
import pytest

from pyconvbn import Plan, _demo_measure, _demo_page, _demo_view, demo, fuse_conv_bn_eval, nn

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
    x = images[:100]
    logits = demo.reference_logits(net, x)
    for name, bn in net.named_modules():
        if not hasattr(bn, "running_mean"):
            continue
        mean, var = bn.running_mean, bn.running_var
        bn.running_mean, bn.running_var = np.zeros_like(mean), np.ones_like(var)
        try:
            without = demo.reference_logits(net, x)
        finally:
            bn.running_mean, bn.running_var = mean, var
        assert np.linalg.norm(without - logits) > 0.05 * np.linalg.norm(logits), name


def test_float64_accuracy_does_not_need_the_extension(loaded):
    net, images, labels = loaded
    logits = demo.reference_logits(net, images)
    assert logits.dtype == np.float64
    assert (logits.argmax(1) == labels).mean() >= 0.98


# -- the graph and its forms -------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(loaded):
    net, images, _ = loaded
    return demo.make_forms(net, images[:4].shape)


def _targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_module"]


def test_one_row_per_batch_norm(loaded, forms):
    net, _, _ = loaded
    rows = {row.target: row for row in forms.report.rows}
    assert set(rows) == {n for n, m in net.named_modules() if hasattr(m, "running_mean")}
    assert {name for name, row in rows.items() if row.outcome == "kept"} == {"norm"}
    assert rows["norm"].reason == "NOT_CONV" and rows["norm"].blocking == "add_1"
    assert all(row.reason == "OK" and row.outcome == "folded" for row in rows.values() if row.target != "norm")


def test_forms_are_what_they_are_called(forms):
    assert len([t for t in _targets(forms.unfused) if t.endswith(("bn", "norm"))]) == 10
    assert [t for t in _targets(forms.folded) if t.endswith(("bn", "norm"))] == ["norm"]
    calls = [n.name for n in forms.one_shot.graph.nodes if n.name.startswith("efficient_conv_bn_eval")]
    assert len(calls) == 9
    layers = [forms.frozen.get_submodule(target) for target in _targets(forms.frozen)]
    assert len(layers) == 11 and all(isinstance(layer, nn.FrozenLayer) for layer in layers)
    assert not [n for n in forms.frozen.graph.nodes if "batch_norm" in str(n.target)]
    assert forms.frozen.report.folds.counts == {"folded": 9, "planned": 1}


def test_forms_compute_the_network(loaded, forms):
    net, images, _ = loaded
    x = images[:5]
    exact = demo.reference_logits(net, x)
    for form in (forms.unfused, forms.one_shot, forms.folded, forms.frozen):
        assert np.abs(form(x) - exact).max() < 1e-5 * np.abs(exact).max()


def test_absorbed_is_what_the_plans_do(result):
    absorbed = {row.producer: row.absorbed for row in result.batch_norms if row.producer}
    # of the two convolutions that the block adds up, the one that runs last takes the other's result
    assert absorbed["res2.conv"] == [] and absorbed["shortcut.conv"] == ["add", "relu"]
    assert absorbed["up.conv"] == ["add"]
    assert absorbed["stem.conv"] == ["relu"]
    left = [node.name for node in result.forms.frozen.graph.nodes]
    assert "add" not in left and not [name for name in left if name.startswith("relu")]


# -- measurement and verdict -------------------------------------------------------------------

KEYS = ("unfused", "one_shot", "folded", "frozen")


def test_accuracy_is_high_and_unchanged(result):
    accuracy = result.accuracy
    assert accuracy["images"] == 597
    assert accuracy["unfused"] >= 0.98
    assert len({accuracy[key] for key in KEYS}) == 1


def test_demo_verifies(result):
    assert result.failures == []
    assert all(0 < result.error[key] < 1e-5 for key in KEYS)
    assert all(result.error[f"{key}_ratio"] <= result.error["ratio_limit"] for key in KEYS[1:])
    assert all(report.ok for report in result.reports.values())


def test_rows_have_what_was_measured(result):
    rows = {row.name: row for row in result.batch_norms}
    assert len(rows) == 10
    assert rows["up.bn"].layer == "ConvTranspose2d 3×3 48→32 g4 s2"
    assert rows["depthwise.bn"].layer == "Conv2d 3×3 depthwise 16"
    assert rows["shortcut.bn"].absorbed == ["add", "relu"]
    assert rows["norm"].absorbed == [] and rows["norm"].error_after is None
    for name, row in rows.items():
        assert name == "norm" or (0 < row.error_after < 1e-5 and row.algorithm)


def test_memory_and_time_are_measured(result):
    assert result.memory["weights"] >= 4 * 50_000
    assert 4 * 50_000 < result.memory["parameters"] < 4 * 100_000
    assert 0 < result.memory["activations_frozen"] < result.memory["activations"]
    assert all(result.time[f"{key}_us"] > 0 for key in KEYS)
    # By hand, from the shapes of the layers: 1.28 million multiply-adds, padding included.
    assert 2.0e6 < result.network["flops_per_image"] < 2.7e6
    assert result.network["nodes"] == {"unfused": 34, "one_shot": 43, "folded": 25, "frozen": 15}


def test_a_wrong_fold_is_found_and_named(monkeypatch):
    """An ε of 1e-3 instead of 1e-5 in one layer: small enough to keep the predictions."""
    right = demo.passes.fuse_conv_bn

    def wrong(gm):
        folded, report = right(gm)
        pair = gm.get_submodule("up.conv"), copy.deepcopy(gm.get_submodule("up.bn"))
        pair[1].eps = 1e-3
        folded.set_submodule("up.conv", fuse_conv_bn_eval(*pair))
        return folded, report

    monkeypatch.setattr(demo.passes, "fuse_conv_bn", wrong)
    found = _demo_measure.run_demo(images=50, batch=2, seconds=0.01)
    assert not found.verified
    assert any(text.startswith("up.bn: ") for text in found.failures)
    assert not any(text.startswith("res1.bn: ") for text in found.failures)
    assert any("folded: " in text and "up_conv" in text and "eps is 1e-3" in text for text in found.failures)
    assert not any(text.startswith("one_shot") for text in found.failures)


def test_a_wrong_plan_is_found(monkeypatch):
    right = demo.freezing.freeze

    def wrong(gm, x):
        frozen, inputs = right(gm, x)
        layer = frozen.get_submodule("stem_conv")
        arguments = {**layer.plan.params, "activation": None}
        plan = Plan(gm.stem.conv.weight, gm.stem.conv.bias, **arguments)  # neither folded nor followed by relu
        frozen.set_submodule("stem_conv", nn.FrozenLayer(plan))
        return frozen, inputs

    monkeypatch.setattr(demo.freezing, "freeze", wrong)
    found = _demo_measure.run_demo(images=50, batch=2, seconds=0.01)
    assert {text.split(":")[0] for text in found.failures} == {"frozen"}


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
        assert sum(line.split()[1:3] == [row.name, row.outcome] for line in text.splitlines()) == 1
    assert "NOT_CONV" in text and "99.16%" in text
    # One line for each node of the graph, and what became of it.
    assert text.count(" + BN\n") == 9 and "kept: NOT_CONV\n" in text


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


def test_screenshot_of_the_readme_is_there_and_small(root):
    picture = root / "benchmarks" / "demo_model" / "notebook.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


# -- page --------------------------------------------------------------------------------------


class _Balance(html.parser.HTMLParser):
    """Whether every tag that opens also closes."""

    VOID = {"meta", "br", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_shows_what_its_cells_give(result, tmp_path):
    path = tmp_path / "demo.html"
    _demo_page.write_page(result, path)
    page = path.read_text(encoding="utf-8")
    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    assert page.count("<svg") == 2 and ">before<" in page and ">after<" in page
    assert "10 BatchNorms: 9 folded, 1 kept" in page and "NOT_CONV" in page
    assert "verify: same up to rounding" in page
    assert "99.16% right before, 99.16% folded, 99.16% frozen" in page
    assert "src=" not in page and "href=" not in page  # one file, nothing to fetch


def test_cells_are_coloured_and_complete():
    for source in (*_demo_page.CELLS, "x = 'a<b' if 1 else f'{2}'  # c & d"):
        shown = _demo_page._coloured(source)
        plain = html.unescape(re.sub("<[^>]*>", "", shown))
        assert plain == source
    assert '<span class="k">if</span>' in shown and '<span class="c"># c &amp; d</span>' in shown


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
    assert np.allclose(demo.reference_logits(net, images), expected, rtol=1e-12, atol=1e-12)
