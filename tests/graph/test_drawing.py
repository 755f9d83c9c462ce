# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of graphs: what is in them, that they are well-formed, and the layout's rules."""

from __future__ import annotations

import operator
import random
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional, fx, nn
from pyconvbn.fx import _layout, drawing
from pyconvbn.fx._describe import describe, kind_of_name, safe_text

SVG = "{http://www.w3.org/2000/svg}"


class Net(nn.Module):
    """conv -> bn -> relu, and a BatchNorm behind the addition of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.side = nn.Conv2d(8, 8, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.eval()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.norm(self.side(x) + x)


@pytest.fixture
def net():
    return fx.symbolic_trace(Net())


def _report(**rows):
    """A stand-in for a FoldReport: name -> (outcome, reason, new node)."""
    return SimpleNamespace(
        rows=[
            SimpleNamespace(node=name, outcome=outcome, reason=reason, hint=f"hint of {reason}", new_node=new)
            for name, (outcome, reason, new) in rows.items()
        ]
    )


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def words(svg: str) -> list[str]:
    return [element.text or "" for element in parse(svg).iter(f"{SVG}text")]


def boxes(svg: str) -> dict[str, tuple[str, float, float, float]]:
    """Title of each box -> (kind, x, y, width)."""
    found = {}
    for group in parse(svg).iter(f"{SVG}g"):
        rect, text = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        kind = rect.get("class").removeprefix("cbn-")
        found[text.text] = (kind, *(float(rect.get(key)) for key in ("x", "y", "width")))
    return found


# -- pictures ------------------------------------------------------------------------------------


def test_every_node_but_parameters_is_drawn_once(net):
    svg = drawing.draw(net)
    titles = boxes(svg)
    assert set(titles) == {
        "input x", "Conv2d 3×3 3→8", "BatchNorm2d 8", "ReLU", "Conv2d 1×1 depthwise 8", "add", "output",
    }  # fmt: skip
    assert len([*parse(svg).iter(f"{SVG}g")]) == len(net.graph.nodes) == 8
    assert titles["Conv2d 3×3 3→8"][0] == "conv" and titles["add"][0] == "join"


def test_a_chain_is_stacked_and_a_branch_is_not(net):
    svg = drawing.draw(net)
    place = boxes(svg)
    _, x, y, width = place["Conv2d 3×3 3→8"]
    assert place["ReLU"][1:] == (x, y + 2 * 27, width)  # 24 high and 3 apart
    assert place["Conv2d 1×1 depthwise 8"][2] > place["ReLU"][2] + 24
    # Edges: x -> stack, stack -> side, stack -> add, side -> add, add (with norm below it) -> output.
    assert len(re.findall('class="cbn-edge"', svg)) == 5


def test_report_colours_pairs_and_says_why_one_stays(net):
    report = _report(bn=("folded", "OK", "conv"), norm=("kept", "NOT_CONV", None))
    svg = drawing.draw(net, report=report)
    place = boxes(svg)
    assert place["Conv2d 3×3 3→8"][0] == "fused"
    assert place["BatchNorm2d 8 · NOT_CONV"][0] == "kept"
    assert "hint of NOT_CONV" in svg
    assert len(re.findall('class="cbn-pair"', svg)) == 1


def test_before_and_after_keep_common_nodes_level(net):
    after = fx.symbolic_trace(Net())
    for node in after.graph.nodes:
        if node.name == "bn":
            node.replace_all_uses_with(node.args[0])
            after.graph.erase_node(node)
    report = _report(bn=("folded", "OK", "conv"), norm=("kept", "NOT_CONV", None))
    svg = drawing.draw_before_after(net, after, report, title="two graphs")
    text = words(svg)
    assert {"before", "after", "two graphs", "8 nodes, 2 BatchNorms", "7 nodes, 1 BatchNorm"} <= set(text)
    heights: dict[str, set[str]] = {}
    for group in parse(svg).iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title").text, group.find(f"{SVG}rect")
        heights.setdefault(title.split(":")[0], set()).add(rect.get("y"))
    assert len(heights["conv"]) == len(heights["side"]) == len(heights["add"]) == len(heights["output"]) == 1
    assert "Conv2d 3×3 3→8 + BN" in boxes(svg)
    assert "after: 7 nodes" in parse(svg).find(f"{SVG}desc").text


def test_fused_nodes_are_named_by_their_convolution(net):
    pyconvbn.passes.efficient_conv_bn_eval(net)
    svg = drawing.draw(net)
    assert boxes(svg)["Conv2d 3×3 3→8 + BN"][0] == "fused"
    # The two get_attr nodes are in the tooltip, not boxes.
    assert "reads " in svg and "get_conv" not in " ".join(words(svg))


def test_shapes_stand_at_the_edges(net):
    assert "1×3×6×6" not in words(drawing.draw(net))
    fx.shape_prop(net, (1, 3, 6, 6))
    assert {"1×3×6×6", "1×8×6×6"} <= set(words(drawing.draw(net)))


def test_picture_is_the_same_each_time(net):
    assert drawing.draw(net) == drawing.draw(net)
    assert drawing.draw(fx.symbolic_trace(Net())) == drawing.draw(net)


def test_it_can_be_read_without_eyes_and_in_the_dark(net):
    svg = drawing.draw(net, title="demo")
    root = parse(svg)
    assert root.get("role") == "img" and root.get("aria-label") == "demo"
    assert root.find(f"{SVG}title").text == "demo" and "8 nodes" in root.find(f"{SVG}desc").text
    assert "prefers-color-scheme:dark" in svg


HOSTILE = "</text><script>alert(1)</script>&\"'\x00\x1b\ufffe"


def test_hostile_text_is_only_text():
    graph = fx.Graph()
    x = graph.placeholder("x")

    def strange(value):
        return value

    strange.__name__ = HOSTILE
    y = graph.call_function(strange, (x,))
    z = graph.call_module(HOSTILE.replace(".", ""), (y,))
    graph.output(z)
    svg = drawing.draw(graph, title=HOSTILE)
    assert "<script" not in svg
    parse(svg)
    svg.encode("utf-8")
    dot = drawing.to_dot(graph)
    assert all(line.endswith((";", "{", "}")) for line in dot.splitlines())
    dot.encode("utf-8")


class Nasty:
    """A target that cannot even be printed."""

    def __call__(self, x):
        return x

    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__

    def __getattr__(self, name):
        raise ZeroDivisionError(name)


def test_a_target_that_raises_is_drawn():
    graph = fx.Graph()
    node = graph.create_node("call_function", Nasty(), (graph.placeholder("x"),), name="nasty")
    graph.output(node)
    assert "<Nasty>" in " ".join(words(drawing.draw(graph)))
    assert safe_text(Nasty()) == "<Nasty>"
    assert safe_text("a\ud800b\nc") == "a\ufffdb\ufffdc" and len(safe_text("x" * 999)) == 200


def test_large_graphs_are_drawn_in_part():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(5000):
        x = graph.call_function(functional.relu, (x,))
    graph.output(x)
    svg = drawing.draw(graph)
    assert any("4702 more nodes" in text for text in words(svg))
    assert len(svg) < 200_000


def test_many_long_edges_stay_small():
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for _ in range(200):
        values.append(graph.call_function(functional.cat, (list(values),)))
    graph.output(values[-1])
    assert len(drawing.draw(graph)) < 6_000_000


def test_empty_graph_and_other_things():
    parse(drawing.draw(fx.Graph()))
    with pytest.raises(TypeError, match="^graph: expected a Graph or a GraphModule, got int$"):
        drawing.draw(3)
    with pytest.raises(TypeError, match="^graph: expected a Graph"):
        drawing.to_dot("x")


def test_notebook_shows_the_picture(net):
    for shown in (net, net.graph):
        text = shown._repr_html_()
        assert text.startswith("<div") and "<svg" in text and text.endswith("</div>")


def test_dot_has_every_node_and_edge(net):
    dot = drawing.to_dot(net, report=_report(norm=("kept", "NOT_CONV", None)))
    assert dot.startswith("digraph {") and dot.endswith("}\n")
    assert dot.count(" -> ") == sum(len(node.all_input_nodes) for node in net.graph.nodes)
    assert dot.count("[label=") - len(re.findall(r"-> n\d+ \[label=", dot)) == len(net.graph.nodes)
    assert "NOT_CONV" in dot


# -- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("conv2d", "conv"), ("conv_transpose3d", "conv"), ("ConvTranspose1d", "conv"), ("Linear", "conv"),
        ("linear", "conv"), ("BatchNorm2d", "bn"), ("SyncBatchNorm", "bn"), ("batch_norm", "bn"),
        ("_native_batch_norm_legit_no_training", "bn"), ("efficient_conv_bn_eval_decomposed", "fused"),
        ("ReLU6", "act"), ("Hardswish", "act"), ("relu_", "act"), ("AdaptiveAvgPool2d", "pool"),
        ("max_pool2d_with_indices", "pool"), ("cat", "join"), ("flatten", "other"), ("convert", "other"),
    ],
)  # fmt: skip
def test_kind_of_name(name, kind):
    assert kind_of_name(name) == kind


def test_subclasses_and_overloads_have_their_kind():
    class Mine(nn.Conv2d):
        pass

    root = nn.Module()
    root.mine = Mine(2, 4, (3, 1), stride=(2, 1), dilation=2, groups=2)
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_module("mine", (x,))
    assert describe(node, root) == ("conv", "Mine 3×1 2→4 g2 s2×1 d2", "mine")
    aten = graph.call_function(pyconvbn.ops.aten.conv2d.default, (x, x))
    assert describe(aten, root)[:2] == ("conv", "conv2d")
    assert describe(graph.call_function(operator.add, (x, x)), None)[:2] == ("join", "add")


# -- layout --------------------------------------------------------------------------------------


def _random_graph(seed):
    chance = random.Random(seed)
    count = chance.randrange(1, 40)
    edges = sorted({
        (source, target)
        for target in range(1, count) for source in [chance.randrange(target) for _ in range(chance.randrange(4))]
    })  # fmt: skip
    sizes = [(chance.uniform(40, 200), chance.choice([24, 51, 78])) for _ in range(count)]
    return sizes, edges


@pytest.mark.parametrize("seed", range(25))
def test_boxes_do_not_touch_and_edges_go_down(seed):
    sizes, edges = _random_graph(seed)
    layers = _layout.assign_layers(len(sizes), edges)
    assert all(layers[source] < layers[target] for source, target in edges)
    heights = [0.0] * (max(layers) + 1)
    for (_, height), layer in zip(sizes, layers):
        heights[layer] = max(heights[layer], height)
    drawn = _layout.place(sizes, edges, layers, heights, layer_gap=30)
    rows: dict[int, list[tuple[float, float]]] = {}
    for (width, _), x, layer in zip(sizes, drawn.x, layers):
        rows.setdefault(layer, []).append((x - width / 2, x + width / 2))
    for row in rows.values():
        row.sort()
        assert row[0][0] >= -1e-6 and row[-1][1] <= drawn.width + 1e-6
        assert all(left[1] + 20 < right[0] for left, right in zip(row, row[1:]))
    for (source, target), path in zip(edges, drawn.paths):
        assert path[0] == (drawn.x[source], drawn.y[source] + sizes[source][1])
        assert path[-1] == (drawn.x[target], drawn.y[target])
        assert all(upper[1] <= lower[1] for upper, lower in zip(path, path[1:]))


@pytest.mark.parametrize("seed", range(25))
def test_passing_edges_keep_clear_of_boxes(seed):
    sizes, edges = _random_graph(seed)
    layers = _layout.assign_layers(len(sizes), edges)
    heights = [78.0] * (max(layers) + 1)
    drawn = _layout.place(sizes, edges, layers, heights, layer_gap=30)
    for path in drawn.paths:
        for (x, top), (_, bottom) in zip(path[2:-1:2], path[3:-1:2]):
            for (width, _), centre, y in zip(sizes, drawn.x, drawn.y):
                inside = top <= y < bottom and abs(x - centre) < width / 2 + 5
                assert not inside


def test_sweeps_undo_a_crossing():
    # 0 -> 3, 1 -> 2 cross when both layers stand in order.
    drawn = _layout.place([(50, 24)] * 4, [(0, 3), (1, 2)], [0, 0, 1, 1], [24, 24], layer_gap=20)
    assert (drawn.x[0] < drawn.x[1]) == (drawn.x[3] < drawn.x[2])


def test_a_chain_is_straight_and_late_inputs_stand_low():
    layers = _layout.assign_layers(5, [(0, 1), (1, 2), (2, 3), (4, 3)][:3])
    assert layers == [0, 1, 2, 3, 0]
    assert _layout.assign_layers(4, [(0, 1), (1, 3), (2, 3)]) == [0, 1, 1, 2]
    drawn = _layout.place([(50, 24)] * 4, [(0, 1), (1, 2), (2, 3)], [0, 1, 2, 3], [24] * 4, layer_gap=20)
    assert len({round(x, 6) for x in drawn.x}) == 1


def test_least_squares_is_the_optimum():
    rng = np.random.default_rng(3)
    for _ in range(20):
        wanted, gaps = rng.normal(size=6) * 30, rng.uniform(5, 20, 5)
        weights = rng.uniform(0.5, 3, 6)
        best = np.array(_layout._least_squares(list(wanted), list(gaps), list(weights)))
        assert (np.diff(best) >= gaps - 1e-9).all()
        cost = (weights * (best - wanted) ** 2).sum()
        for _ in range(200):
            other = np.array(best) + rng.normal(size=6)
            if (np.diff(other) >= gaps).all():
                assert (weights * (other - wanted) ** 2).sum() >= cost - 1e-9
