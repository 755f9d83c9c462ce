# SPDX-License-Identifier: BSD-3-Clause
"""`freeze` as a whole: the matrix of the contract, PyTorch's own families of cases, and what it promises."""

from __future__ import annotations

import copy
import operator
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyconvbn
from pyconvbn import config, freezing, fx, nn, passes
from pyconvbn import functional as F
from pyconvbn.demo import load_demo
from pyconvbn.ops import aten

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import KINDS, Pair, randomise  # noqa: E402


class Fn(nn.Module):
    """A forward over parameters and modules given by name."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, value in members.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, np.ndarray) else value)
        self._function = [forward]
        self.eval()

    def forward(self, x: Any) -> Any:
        return self._function[0](self, x)


def freeze(net: Any, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    """(traced, frozen), after checking what holds of every freezing."""
    gm = net if isinstance(net, fx.GraphModule) else fx.symbolic_trace(net)
    text = str(gm.graph)
    frozen, preserved = pyconvbn.freeze(gm, inputs or None, **options)
    assert str(gm.graph) == text, "the input graph was changed"
    frozen.graph.lint()
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    kept = [node for node in frozen.graph.nodes if node.op == "placeholder"]
    assert [placeholders[i].name for i in preserved] == [node.name for node in kept]
    assert isinstance(frozen.report, freezing.FreezeReport)
    again, same = pyconvbn.freeze(frozen, [inputs[i - len(placeholders)] for i in preserved] if inputs else None)
    assert str(again.graph) == str(frozen.graph), "freezing twice changes nothing"
    assert same == list(range(len(kept)))
    assert not [row for row in again.report if row.outcome == "done"], str(again.report)
    return gm, frozen


def good(gm: Any, frozen: Any, *inputs: Any) -> None:
    """As near to float64 as the graph it was made from."""
    report = pyconvbn.verify(gm, frozen, inputs if len(inputs) > 1 else inputs[0])
    assert report.ok, str(report)


def names(gm: Any) -> list[str]:
    return [node.op if node.op != "call_function" else str(node.target) for node in gm.graph.nodes]


def batch_norms(gm: Any) -> list[str]:
    return [name for name in names(gm) if "batch_norm" in name]


# ---- conv + BatchNorm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "functional", "aten"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [False, True], ids=["", "shapes"])
def test_conv_bn(kind: str, bias: bool, form: str, known: bool, rng: np.random.Generator) -> None:
    x = rng.normal(size=KINDS[kind][2]).astype(np.float32)
    net = Pair(kind, rng, form=form, bias=bias)
    gm, frozen = freeze(net, *([x] if known else []))
    good(gm, frozen, x)
    if kind == "linear" and not known:
        assert [row.reason for row in frozen.report.folds] == ["LINEAR_ND"]
    else:
        assert names(frozen) == ["placeholder", "call_module", "output"]
        assert [row.outcome for row in frozen.report.folds] == ["folded"]
    assert len(frozen.report.folds) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes(dtype: Any, rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 4, 7, 6)).astype(dtype)
    gm, frozen = freeze(Pair("conv2d", rng, dtype=dtype), x)
    good(gm, frozen, x)
    assert frozen(x).dtype == dtype and not batch_norms(frozen)


class TwoNorms(nn.Module):
    """One convolution module, called twice, each time with a BatchNorm of its own."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def norm(self, bn: Any, x: Any) -> Any:
        if not self.functional:
            return bn(x)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, bn.eps)

    def forward(self, x: Any) -> Any:
        x = self.norm(self.bn1, self.conv(x))
        return self.norm(self.bn2, self.conv(x))


@pytest.mark.parametrize("functional", [False, True])
def test_two_norms_on_one_conv(functional: bool, rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    gm, frozen = freeze(randomise(TwoNorms(functional), rng), x)
    good(gm, frozen, x)
    assert not batch_norms(frozen) and frozen.report.folds.counts == {"folded": 2}


@pytest.mark.parametrize("functional", [False, True])
def test_one_norm_called_twice_on_equal_input(functional: bool, rng: np.random.Generator) -> None:
    """Two equal calls merge; each BatchNorm call has its row all the same."""
    net = TwoNorms(functional)
    randomise(net, rng)
    x = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    gm = fx.symbolic_trace(Fn(lambda m, v: net.norm(net.bn1, net.conv(v)) * net.norm(net.bn1, net.conv(v)), net=net))
    gm, frozen = freeze(gm, x)
    good(gm, frozen, x)
    assert len(frozen.report.folds) == 2 and frozen.report.folds.ok
    assert sorted(row.outcome for row in frozen.report.folds) == ["folded", "removed"]
    assert names(frozen).count("call_module") == 1


def test_a_module_called_twice(rng: np.random.Generator) -> None:
    conv, bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    x = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    net = randomise(Fn(lambda m, v: m.bn(m.conv(m.bn(m.conv(v)))), conv=conv, bn=bn), rng)
    gm, frozen = freeze(net, x)
    good(gm, frozen, x)
    assert frozen.report.folds.counts == {"folded": 2}


def test_forms_mixed(rng: np.random.Generator) -> None:
    """A functional batch_norm behind a convolution module: one form after lowering."""
    bn = nn.BatchNorm2d(4)
    net = Fn(
        lambda m, v: F.batch_norm(m.conv(v), bn.running_mean, bn.running_var, m.bn.weight, m.bn.bias, False, 0.1, 1e-3),
        conv=nn.Conv2d(4, 4, 3), bn=bn,
    )
    x = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    gm, frozen = freeze(randomise(net, rng), x)
    good(gm, frozen, x)
    assert frozen.report.folds.counts == {"folded": 1}


def test_training_stays(rng: np.random.Generator) -> None:
    """A BatchNorm in training: kept, its statistics are those of the original and go on being updated."""
    net = Pair("conv2d", rng)
    net.bn1.train()
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    twin = copy.deepcopy(net)
    gm = fx.symbolic_trace(net)
    frozen, _ = pyconvbn.freeze(gm, x)
    assert [row.reason for row in frozen.report.folds] == ["BN_TRAINING"]
    for _ in range(3):
        assert np.allclose(frozen(x), twin(x), atol=1e-4)
    assert np.allclose(net.bn1.running_mean, twin.bn1.running_mean, rtol=1e-4, atol=1e-5)
    assert net.bn1.num_batches_tracked == twin.bn1.num_batches_tracked


def test_hooked_modules_are_called(rng: np.random.Generator) -> None:
    net = Pair("conv2d", rng)
    seen: list[Any] = []
    net.conv1.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    gm, frozen = freeze(net, x)
    seen.clear()
    frozen(x)
    assert seen == [(2, 4, 7, 6)]
    assert frozen.report.folds[0].outcome in ("kept", "planned")


# ---- parameters that are written or returned -----------------------------------------------------------------------------


def in_place(gm: Any) -> Any:
    """The graph with `p * 10` made `p += 10`, which Python does not show to a tracer."""
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function" and 10.0 in n.args]
    node.target = operator.iadd
    return gm


@pytest.mark.parametrize("add", ["iadd", "aten"])
def test_mutated_parameter(add: str) -> None:
    """The second call sees what the first one wrote, and so does the owner of the parameter."""
    net = Fn(lambda m, x: x + (m.p * 10.0 if add == "iadd" else aten.add_.Tensor(m.p, 10.0)), p=np.zeros(3, np.float32))
    x = np.ones(3, np.float32)
    gm = fx.symbolic_trace(net)
    gm, frozen = freeze(in_place(gm) if add == "iadd" else gm, x)
    net.p[...] = 0
    assert frozen(x).tolist() == [11] * 3
    assert frozen(x).tolist() == [21] * 3
    assert net.p.tolist() == [20] * 3
    rows = [row for row in frozen.report if row.step == "parameter" and row.outcome == "kept"]
    assert [row.reason for row in rows] == ["MUTATED"]


def test_weight_of_a_convolution_mutated(rng: np.random.Generator) -> None:
    conv, bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    net = randomise(Fn(lambda m, x: (aten.mul_.Tensor(m.conv.weight, 2.0), m.bn(m.conv(x)))[1], conv=conv, bn=bn), rng)
    x = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
    twin = copy.deepcopy(net)
    gm = fx.symbolic_trace(net)
    frozen, _ = pyconvbn.freeze(gm, x)
    for _ in range(2):
        assert np.allclose(frozen(x), twin(x), rtol=1e-4, atol=1e-4)
    assert frozen.report.folds[0].reason == "MUTATED_BETWEEN"


def test_returned_parameter_is_the_parameter() -> None:
    net = Fn(lambda m, x: (m.p, m.p[1:], x + m.q), p=np.arange(4.0), q=np.arange(3.0))
    gm, frozen = freeze(net, np.ones(3))
    whole, part, rest = frozen(np.ones(3))
    assert whole is net.p and np.shares_memory(part, net.p)
    net.p += 1
    assert frozen(np.ones(3))[1].tolist() == [2, 3, 4]
    net.q += 1  # a constant now: later writes do not matter
    assert frozen(np.ones(3))[2].tolist() == [1, 2, 3]


def test_results_are_fresh_at_each_call() -> None:
    net = Fn(lambda m, x: (m.p * 2, x), p=np.arange(3.0))
    gm, frozen = freeze(net, np.ones(3))
    first = frozen(np.ones(3))[0]
    first += 100
    assert frozen(np.ones(3))[0].tolist() == [0, 2, 4]


def test_lifted_graph(rng: np.random.Generator) -> None:
    net = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), rng)
    x = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
    gm = fx.to_aten(fx.symbolic_trace(net), [x.shape], lift_params=True)
    params = gm.meta["params_flat"]
    frozen, preserved = pyconvbn.freeze(gm, [*params, x])
    count = sum(node.op == "placeholder" for node in gm.graph.nodes)
    assert preserved == [count - 1]
    assert np.allclose(frozen(x), gm(*params, x), rtol=1e-4, atol=1e-4)
    assert frozen.report.folds.counts == {"folded": 1}


def test_lifted_graph_with_a_written_parameter(rng: np.random.Generator) -> None:
    net = Fn(lambda m, x: x * m.q + aten.add_.Tensor(m.p, 10.0), p=np.zeros(3), q=np.full(3, 2.0))
    gm = fx.to_aten(fx.symbolic_trace(net), [(3,)], lift_params=True)
    order = gm.meta["params_names"]
    frozen, preserved = pyconvbn.freeze(gm, np.ones(3))
    assert preserved == [order.index("p"), 2]
    p, x = np.zeros(3), np.ones(3)
    assert frozen(p, x).tolist() == [12] * 3 and frozen(p, x).tolist() == [22] * 3 and p.tolist() == [20] * 3


# ---- the other steps together ---------------------------------------------------------------------------------------------


def test_weights_computed_from_weights(rng: np.random.Generator) -> None:
    net = Fn(
        lambda m, x: F.conv2d(x, m.w * 2 - 1, m.b.reshape(-1)) * m.s + 1.0,
        w=rng.normal(size=(4, 3, 3, 3)), b=rng.normal(size=(2, 2)), s=rng.normal(size=(1, 4, 1, 1)),
    )
    x = rng.normal(size=(2, 3, 6, 6))
    gm, frozen = freeze(net, x)
    good(gm, frozen, x)
    assert names(frozen) == ["placeholder", "call_module", "output"]


def test_dtype_change_is_not_folded(rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    net = Fn(lambda m, v: m.conv(v) * m.s, conv=nn.Conv2d(4, 4, 3), s=rng.normal(size=(4, 1, 1)))
    gm, frozen = freeze(net, x)
    assert frozen(x).dtype == np.float64 == gm(x).dtype
    assert "DTYPE_CHANGES" in [row.reason for row in frozen.report if row.step == "binary"]
    assert np.allclose(frozen(x), gm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "products"), [(2, 1), (3, 1), (4, 2)])
def test_parallel_products(count: int, products: int, rng: np.random.Generator) -> None:
    net = Fn(
        lambda m, x: sum(F.relu(getattr(m, f"l{i}")(x)) for i in range(count)),
        **{f"l{i}": nn.Linear(8, 8) for i in range(count)},
    )
    x = rng.normal(size=(5, 8)).astype(np.float32)
    gm, frozen = freeze(net, x)
    good(gm, frozen, x)
    assert names(frozen).count("call_module") == products


def test_unequal_parallel_products_stay(rng: np.random.Generator) -> None:
    net = Fn(lambda m, x: F.relu(m.a(x)).sum() + F.relu(m.b(x)).sum(), a=nn.Linear(8, 8), b=nn.Linear(8, 6))
    x = rng.normal(size=(5, 8)).astype(np.float32)
    gm, frozen = freeze(net, x)
    assert np.allclose(frozen(x), gm(x), rtol=1e-4)
    assert names(frozen).count("call_module") == 2
    assert "UNEQUAL" in [row.reason for row in frozen.report if row.step == "matmul"]


def test_random_operators_are_run_at_each_call() -> None:
    net = Fn(lambda m, x: x + aten.rand_like.default(m.p), p=np.zeros(1000))
    gm, frozen = freeze(net, np.zeros(1000))
    assert not np.array_equal(frozen(np.zeros(1000)), frozen(np.zeros(1000)))


def test_channels_last_weights(rng: np.random.Generator) -> None:
    net = Pair("conv2d", rng)
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    gm = fx.symbolic_trace(net)
    plain, _ = pyconvbn.freeze(gm, x)
    passes.convert_conv_weights_to_channels_last(gm)
    frozen, _ = pyconvbn.freeze(gm, x)
    assert np.array_equal(frozen(x), plain(x)) and names(frozen) == names(plain)
    assert frozen(x).strides == plain(x).strides


def test_output_strides(rng: np.random.Generator) -> None:
    net = Fn(lambda m, x: (m.conv(x).transpose(0, 2, 3, 1), m.conv(x) + 1), conv=nn.Conv2d(4, 4, 1))
    x = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)
    gm, frozen = freeze(net, x)
    for before, after in zip(gm(x), frozen(x), strict=True):
        assert np.allclose(before, after, atol=1e-5) and before.strides == after.strides


def test_activations_and_residuals_become_part_of_the_layer(rng: np.random.Generator) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.b1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.c2, self.b2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Any) -> Any:
            return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + x)

    x = rng.normal(size=(2, 4, 6, 6)).astype(np.float32)
    gm, frozen = freeze(randomise(Block(), rng), x)
    good(gm, frozen, x)
    assert names(frozen) == ["placeholder", "call_module", "call_module", "output"]
    # without shapes nobody knows that the addition does not broadcast
    gm, frozen = freeze(gm)
    good(gm, frozen, x)


def test_other_shapes_than_the_example(rng: np.random.Generator) -> None:
    """What ran before freezing runs afterwards, also where the example's shapes looked like more than they were."""
    net = Fn(lambda m, x: F.relu(m.conv(x) + m.p), conv=nn.Conv2d(4, 4, 1), p=rng.normal(size=(1, 4, 3, 3)).astype("f"))
    one = rng.normal(size=(1, 4, 3, 3)).astype(np.float32)
    gm, frozen = freeze(net, one)
    many = rng.normal(size=(5, 4, 3, 3)).astype(np.float32)
    good(gm, frozen, many)
    assert frozen(one[:0]).shape == (0, 4, 3, 3)


def test_folding_asks_for_the_batch_axis(rng: np.random.Generator) -> None:
    """An unbatched input would have made a BatchNorm of its own axes: refused, not silently another result."""
    gm, frozen = freeze(Pair("conv2d", rng))
    with pytest.raises(ValueError, match="axes|dimension|ndim|4"):
        frozen(rng.normal(size=(4, 7, 7)).astype(np.float32))


# ---- what is promised -----------------------------------------------------------------------------------------------------


def test_later_writes_do_not_matter(rng: np.random.Generator) -> None:
    net = Pair("conv2d", rng)
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    gm, frozen = freeze(net, x)
    before = frozen(x)
    for array in [*net.parameters(), *net.buffers()]:
        array[...] = 7
    assert np.array_equal(frozen(x), before)


def test_pickle_copies_and_threads(rng: np.random.Generator) -> None:
    net, images, _ = load_demo()
    x = images[:8]
    gm, frozen = freeze(net, x)
    good(gm, frozen, images)
    assert not batch_norms(frozen)
    assert len(frozen.report.folds) == 10 and frozen.report.folds.ok
    want = frozen(x)
    for other in (pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen), copy.copy(frozen)):
        assert np.array_equal(other(x), want)
        assert str(other.report) == str(frozen.report)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(5):
            if not np.array_equal(frozen(x), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "Plan" in repr(frozen) or "FrozenLayer" in repr(frozen)


def test_a_failure_leaves_everything(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step in turn fails."""
    net = Pair("conv2d", rng)
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    gm = fx.symbolic_trace(net)
    text, attributes, want = str(gm.graph), set(vars(gm)), gm(x)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    steps = [
        (freezing, name) for name in ("lower_modules", "fold_layers", "prepare_layers", "needs_strides", "merge_folds",
                                      "_remove_dead")
    ] + [
        (passes, name) for name in ("view_to_reshape", "replace_params_with_constants", "cse", "constant_fold",
                                    "concat_matmuls", "enforce_as_strided_input_layout", "enforce_output_layout")
    ]
    for module, name in steps:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(KeyboardInterrupt):
                pyconvbn.freeze(gm, x, discard_parameters=True)
        assert str(gm.graph) == text and set(vars(gm)) == attributes, name
        assert np.array_equal(gm(x), want), name


def test_discard_parameters(rng: np.random.Generator) -> None:
    net = Pair("conv2d", rng)
    x = rng.normal(size=(2, 4, 7, 6)).astype(np.float32)
    gm = fx.symbolic_trace(net)
    want = gm(x)
    before = config.freezing_discard_parameters
    config.freezing_discard_parameters = True
    try:
        frozen, _ = pyconvbn.freeze(gm, x)
    finally:
        config.freezing_discard_parameters = before
    assert np.allclose(frozen(x), want, rtol=1e-4, atol=1e-4)
    for broken in (gm, net):
        with pytest.raises(RuntimeError, match="weight"):
            broken(x)
    assert isinstance(net.conv1.weight, pyconvbn.ErasedArray) and net.conv1.weight.requires_grad


def test_discard_keeps_what_the_frozen_graph_needs() -> None:
    net = Fn(lambda m, x: x * m.q + aten.add_.Tensor(m.p, 1.0), p=np.zeros(3), q=np.ones(3))
    gm = fx.symbolic_trace(net)
    frozen, _ = pyconvbn.freeze(gm, np.ones(3), discard_parameters=True)
    assert isinstance(net.q, pyconvbn.ErasedArray) and not isinstance(net.p, pyconvbn.ErasedArray)
    assert frozen(np.ones(3)).tolist() == [2] * 3 and frozen(np.ones(3)).tolist() == [3] * 3
    assert "IN_USE" in [row.reason for row in frozen.report if row.step == "discard"]


def test_wrong_arguments() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(TypeError, match="gm: expected a GraphModule"):
        pyconvbn.freeze(net)  # type: ignore[arg-type]
    gm = fx.symbolic_trace(net)
    x = np.ones((1, 3, 5, 5), np.float32)
    with pytest.raises(ValueError, match="example_inputs: expected at most 1"):
        pyconvbn.freeze(gm, [x, x])
    with pytest.raises(TypeError, match=r"example_inputs\[0\]"):
        pyconvbn.freeze(gm, "image")
    with pytest.raises(ValueError, match="_0"):
        pyconvbn.freeze(gm, np.ones((1, 2, 5, 5), np.float32))
