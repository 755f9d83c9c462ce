# SPDX-License-Identifier: BSD-3-Clause
"""The bug classes of the field, one network each: both passes give the right numbers, and a naive fold does not.

`naive` below is what is found in the wild: it looks at modules and positional arguments, folds along axis 0 with a
fixed eps, and writes the weights where they are. It is right for a plain pair, which is checked; each case says in
which way it fails.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import functional as F
from pyconvbn import fx, nn, passes, testing

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import checked, close, randomise, trace  # noqa: E402

D = np.float64


def naive(gm: Any, scale_bias: bool = True) -> None:
    modules = dict(gm.named_modules(remove_duplicate=False))
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            bn, source = modules[node.target], node.args[0]
            conv = modules[source.target] if source.op == "call_module" else None
            if not hasattr(bn, "running_mean") or not (hasattr(conv, "groups") or hasattr(conv, "in_features")):
                continue
            s = bn.weight / np.sqrt(bn.running_var + 1e-5)
            conv.weight[...] = conv.weight * s.reshape(-1, *[1] * (conv.weight.ndim - 1))
            conv.bias[...] = conv.bias * (s if scale_bias else 1) - bn.running_mean * s + bn.bias
        elif node.op == "call_function" and node.target is F.batch_norm:
            source, mean, var, gamma, beta, _, _, eps = node.args
            w, b = (getattr(gm, a.target) for a in source.args[1:3])
            s = getattr(gm, gamma.target) / np.sqrt(getattr(gm, var.target) + eps)
            w[...] = w * s.reshape(-1, *[1] * (w.ndim - 1))
            b[...] = (b - getattr(gm, mean.target)) * s + getattr(gm, beta.target)
        else:
            continue
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)


@dataclass
class Case:
    gm: Any
    x: Any
    wanted: Any
    #: what the naive fold does: "raises", "wrong" numbers, or "fine" where it has nothing to do
    naive: str
    efficient: tuple[str, ...] = ("OK",)
    fold: tuple[str, ...] = ("OK",)


CASES: dict[str, Callable[[np.random.Generator], Case]] = {}


def case(function: Callable[[np.random.Generator], Case]) -> Callable[[np.random.Generator], Case]:
    CASES[function.__name__] = function
    return function


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Any], Any], rng: np.random.Generator, **modules: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_run", run)
        for name, value in modules.items():
            setattr(self, name, value)
        randomise(self, rng)

    def forward(self, x: Any) -> Any:
        return self._run(self, x)


def conv(*args: Any, **kwargs: Any) -> Any:
    return nn.Conv1d(*args, dtype=D, **kwargs)


def norm(n: int = 2, **kwargs: Any) -> Any:
    # the default eps where the case is not about it, so that the naive fold gets that much right
    return nn.BatchNorm1d(n, dtype=D, **kwargs)


def data(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape or (2, 2, 5))


both = testing.reference_conv_bn


@case
def plain_pair(rng: np.random.Generator) -> Case:
    """The control."""
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm())
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn), "fine")


@case
def keyword_arguments(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(input=m.conv(input=x)), rng, conv=conv(2, 2, 1), bn=norm())
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn), "raises")


@case
def stride_and_bias_by_keyword(rng: np.random.Generator) -> Case:
    """pytorch 196165: keywords of the functional call were lost."""
    graph, w, b = fx.Graph(), data(rng, 4, 1, 3), data(rng, 4)
    m, v = data(rng, 4), rng.uniform(0.1, 4, 4)
    keywords = {"weight": w, "groups": 2, "bias": b, "stride": 2, "padding": 2}
    y = graph.call_function(F.conv1d, (graph.placeholder("x"),), keywords)
    graph.output(graph.call_function(F.batch_norm, (), {"input": y, "running_var": v, "running_mean": m, "eps": 0.25}))
    x = data(rng, 2, 2, 9)
    raw = testing.reference_conv(x, w, b, stride=2, padding=2, groups=2)
    return Case(fx.GraphModule({}, graph), x, testing.reference_batch_norm(raw, m, v, eps=0.25), "raises")


@case
def omitted_defaults(rng: np.random.Generator) -> Case:
    """pytorch 169011: five positional arguments of batch_norm were asserted to be eight."""
    graph, w, (m, g), v = fx.Graph(), data(rng, 3, 2, 1), data(rng, 2, 3), rng.uniform(0.1, 4, 3)
    y = graph.call_function(F.conv1d, (graph.placeholder("x"), w))
    graph.output(graph.call_function(F.batch_norm, (y, m, v, g)))
    x = data(rng)
    raw = testing.reference_conv(x, w, None)
    return Case(fx.GraphModule({}, graph), x, testing.reference_batch_norm(raw, m, v, g), "raises")


@case
def shared_conv_module(rng: np.random.Generator) -> Case:
    """pytorch 104593, 197539."""
    net = Net(lambda m, x: m.bn(m.conv(x)) + m.conv(x), rng, conv=conv(2, 2, 1), bn=norm())
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn) + both(x, net.conv), "wrong")


@case
def shared_conv_module_with_two_bns(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm(), bn2=norm())
    x = data(rng)
    two = ("OK", "OK")
    return Case(trace(net), x, both(x, net.conv, net.bn) + both(x, net.conv, net.bn2), "wrong", two, two)


@case
def shared_weight_array_of_two_modules(rng: np.random.Generator) -> Case:
    first, second = conv(2, 2, 1), conv(2, 2, 1)
    second.weight = first.weight
    net = Net(lambda m, x: m.bn(m.first(x)) + m.second(x), rng, first=first, second=second, bn=norm())
    x = data(rng)
    return Case(trace(net), x, both(x, first, net.bn) + both(x, second), "wrong")


@case
def views_of_one_base_array(rng: np.random.Generator) -> Case:
    base = data(rng, 8)
    first, second = conv(2, 2, 1), conv(2, 2, 1)
    first.weight, second.weight = base[:4].reshape(2, 2, 1), base[2:6].reshape(2, 2, 1)
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_module("bn", (graph.call_module("first", (x,)),))
    graph.output(graph.call_function(operator.add, (one, graph.call_module("second", (x,)))))
    net = Net(lambda m, x: x, rng, first=first, second=second, bn=norm())
    x = data(rng)
    return Case(fx.GraphModule(net, graph), x, both(x, first, net.bn) + both(x, second), "wrong")


@case
def two_bns_on_one_output(rng: np.random.Generator) -> Case:
    def run(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.bn(y) + m.bn2(y)

    net = Net(run, rng, conv=conv(2, 2, 1), bn=norm(), bn2=norm())
    x = data(rng)
    two = ("MULTI_USER", "MULTI_USER")
    return Case(trace(net), x, both(x, net.conv, net.bn) + both(x, net.conv, net.bn2), "wrong", two, two)


@case
def relu_between(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(F.relu(m.conv(x))), rng, conv=conv(2, 2, 1), bn=norm())
    x = data(rng)
    wanted = testing.reference_module(net.bn, np.maximum(both(x, net.conv), 0))
    return Case(trace(net), x, wanted, "fine", ("NOT_CONV",), ("NOT_CONV",))


@case
def bn_in_training(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm())
    net.bn.train()
    x = data(rng)
    wanted = testing.reference_module(net.bn, both(x, net.conv))
    return Case(trace(net), x, wanted, "wrong", ("BN_TRAINING",), ("BN_TRAINING",))


@case
def bn_without_statistics(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm(track_running_stats=False))
    x = data(rng)
    wanted = testing.reference_module(net.bn, both(x, net.conv))
    return Case(trace(net), x, wanted, "raises", ("NO_RUNNING_STATS",), ("NO_RUNNING_STATS",))


@case
def conv_output_returned(rng: np.random.Generator) -> Case:
    def run(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.bn(y), y

    net = Net(run, rng, conv=conv(2, 2, 1), bn=norm())
    x = data(rng)
    return Case(trace(net), x, (both(x, net.conv, net.bn), both(x, net.conv)), "wrong", ("IS_OUTPUT",), ("IS_OUTPUT",))


@case
def mutation_between(rng: np.random.Generator) -> Case:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("conv", (x,))
    graph.call_function(operator.iadd, (graph.get_attr("bn.running_mean"), 2.0))
    graph.output(graph.call_module("bn", (y,)))
    net = Net(lambda m, x: x, rng, conv=conv(2, 2, 1), bn=norm())
    later = copy.deepcopy(net.bn)
    later.running_mean[...] += 2.0
    x = data(rng)
    kept = ("MUTATED_BETWEEN",)
    return Case(fx.GraphModule(net, graph), x, both(x, net.conv, later), "wrong", kept, kept)


@case
def dotted_targets(rng: np.random.Generator) -> Case:
    block = nn.Sequential(nn.Sequential(conv(2, 2, 1), norm(eps=0.5)))
    net = Net(lambda m, x: m.block(x), rng, block=block)
    x = data(rng)
    return Case(trace(net), x, both(x, block[0][0], block[0][1]), "wrong")


@case
def linear_with_three_axes(rng: np.random.Generator) -> Case:
    """ao 4116: as many rows as features, so that the wrong axis raises nothing."""
    net = Net(lambda m, x: m.bn(m.linear(x)), rng, linear=nn.Linear(3, 4, dtype=D), bn=norm(4))
    x = data(rng, 2, 4, 3)
    wanted = testing.reference_module(net.bn, both(x, net.linear))
    return Case(trace(net), x, wanted, "wrong", ("OK",), ("LINEAR_ND",))


@case
def transposed_with_output_size(rng: np.random.Generator) -> Case:
    up = nn.ConvTranspose1d(2, 2, 3, stride=2, dtype=D)
    net = Net(lambda m, x: m.bn(m.up(x, output_size=[12])), rng, up=up, bn=norm(eps=0.1))
    x = data(rng)
    return Case(trace(net), x, both(x, net.up, net.bn, output_size=12), "wrong")


@case
def grouped_transposed(rng: np.random.Generator) -> Case:
    """pytorch 180995 and nearly every library: the channel of W[i, j] is (i // (ic/g)) * (oc/g) + j."""
    up = nn.ConvTranspose2d(6, 6, 3, groups=3, dtype=D)
    net = Net(lambda m, x: m.bn(m.up(x)), rng, up=up, bn=nn.BatchNorm2d(6, dtype=D))
    x = data(rng, 2, 6, 4, 5)
    return Case(trace(net), x, both(x, net.up, net.bn), "wrong")


@case
def depthwise_transposed(rng: np.random.Generator) -> Case:
    up = nn.ConvTranspose2d(4, 8, 3, groups=4, dtype=D)
    net = Net(lambda m, x: m.bn(m.up(x)), rng, up=up, bn=nn.BatchNorm2d(8, dtype=D))
    x = data(rng, 2, 4, 4, 5)
    return Case(trace(net), x, both(x, net.up, net.bn), "raises")


@case
def convolution_without_bias(rng: np.random.Generator) -> Case:
    """tt-metal 5317, and the unscaled bias of many: with and without."""
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1, bias=False), bn=norm())
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn), "raises")


@case
def convolution_bias_is_scaled(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm())
    net.conv.bias[...] = 100.0
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn), "wrong")


@case
def eps_of_its_own(rng: np.random.Generator) -> Case:
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm(eps=1.5))
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn), "wrong")


@case
def without_affine(rng: np.random.Generator) -> Case:
    """pytorch 72049, 122183."""
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm(affine=False))
    x = data(rng)
    return Case(trace(net), x, both(x, net.conv, net.bn), "raises")


@case
def bn_before_a_padded_convolution(rng: np.random.Generator) -> Case:
    """The interior would be right, the border wrong."""
    net = Net(lambda m, x: m.conv(m.bn(x)), rng, conv=conv(2, 2, 3, padding=1), bn=norm())
    x = data(rng)
    wanted = both(testing.reference_module(net.bn, x), net.conv)
    return Case(trace(net), x, wanted, "fine", ("NOT_CONV",), ("NOT_CONV",))


def outputs(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def right(gm: Any, x: Any, wanted: Any) -> None:
    for got, want in zip(outputs(copy.deepcopy(gm)(x)), outputs(wanted), strict=True):
        close(got, want)


@pytest.mark.parametrize("name", CASES)
def test_both_passes_are_right(name: str, rng: np.random.Generator) -> None:
    c = CASES[name](rng)
    right(c.gm, c.x, c.wanted)
    state = {k: np.array(v) for k, v in c.gm.state_dict().items()}
    folded, report = passes.fuse_conv_bn(c.gm)
    assert tuple(row.reason for row in checked(folded, report)) == c.fold
    right(folded, c.x, c.wanted)
    report = checked(c.gm, passes.efficient_conv_bn_eval(c.gm))
    assert tuple(row.reason for row in report) == c.efficient
    right(c.gm, c.x, c.wanted)
    assert all(np.array_equal(v, state[k]) for k, v in c.gm.state_dict().items()), "nobody's arrays were written"


@pytest.mark.parametrize("name", CASES)
def test_a_naive_fold_fails(name: str, rng: np.random.Generator) -> None:
    c = CASES[name](rng)
    try:
        naive(c.gm, scale_bias=name != "convolution_bias_is_scaled")
        right(c.gm, c.x, c.wanted)
    except (AttributeError, IndexError, TypeError, ValueError):
        outcome = "raises"
    except AssertionError:
        outcome = "wrong"
    else:
        outcome = "fine"
    assert outcome == c.naive


def test_stale_weights_after_training_resumed(rng: np.random.Generator) -> None:
    """pytorch 108863: the efficient form reads parameters at each call; a BatchNorm back in training is not fused."""
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm())
    gm, x = trace(net), data(rng)
    passes.efficient_conv_bn_eval(gm)
    right(gm, x, both(x, net.conv, net.bn))
    net.conv.weight[...] += 1
    net.bn.running_var[...] *= 2
    right(gm, x, both(x, net.conv, net.bn))
    net.bn.train()
    reference = testing.reference_module(net.bn, both(x, net.conv))
    right(gm, x, reference)


@pytest.mark.parametrize("bn_dtype", [np.float32, np.float64])
def test_half_conv_with_float_bn(bn_dtype: Any, rng: np.random.Generator) -> None:
    """pytorch 76578: folded in float64, rounded once; the result is the convolution's dtype."""
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=nn.Conv2d(3, 4, 3, dtype=np.float16),
              bn=nn.BatchNorm2d(4, dtype=bn_dtype))
    x = rng.normal(size=(1, 3, 6, 6)).astype(np.float16)
    gm = trace(net)
    folded, report = passes.fuse_conv_bn(gm)
    assert report.ok and folded.conv.weight.dtype == np.float16
    assert passes.efficient_conv_bn_eval(gm).ok
    for result in (folded(x), gm(x)):
        assert result.dtype == np.float16
    testing.assert_matches_reference(gm(x), x, net.conv, net.bn)
    testing.assert_matches_reference(folded(x), x, net.conv, net.bn)


def test_every_bn_has_a_row(rng: np.random.Generator) -> None:
    """Fold silently not applied: tf2onnx 2186, pytorch 141116."""
    for make in CASES.values():
        c = make(np.random.default_rng(0))
        modules = dict(c.gm.named_modules(remove_duplicate=False))
        bns = [n.name for n in c.gm.graph.nodes if n.op == "call_module" and hasattr(modules[n.target], "running_mean")
               or n.target is F.batch_norm]
        assert sorted(row.node for row in passes.fuse_conv_bn(c.gm)[1]) == sorted(bns)


def test_keyword_interrupt_and_counters_do_not_mix(rng: np.random.Generator) -> None:
    before = pyconvbn.counters["efficient_conv_bn_eval"]
    net = Net(lambda m, x: m.bn(m.conv(x)), rng, conv=conv(2, 2, 1), bn=norm())
    passes.fuse_conv_bn(trace(net))
    assert pyconvbn.counters["efficient_conv_bn_eval"] == before, "folding is counted by its own report"
