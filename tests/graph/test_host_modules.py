# SPDX-License-Identifier: BSD-3-Clause
"""What the passes know of modules: pyconvbn.nn's and torch.nn's, subclasses, hooks, properties, and hostile ones."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import fx, nn, passes

sys.path.insert(0, str(Path(__file__).parent))
from passes_util import checked, randomise  # noqa: E402


def graph_of(conv: Any, bn: Any) -> Any:
    """bn(conv(x)) with both as leaves, whatever they are."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("bn", (graph.call_module("conv", (x,)),)))
    return fx.GraphModule({"conv": conv, "bn": bn}, graph)


def verdicts(conv: Any, bn: Any) -> tuple[str, str]:
    """Reason of the efficient pass and of folding."""
    gm = graph_of(conv, bn)
    fold = passes.fuse_conv_bn(gm, inplace=True)[1]
    efficient = checked(gm := graph_of(conv, bn), passes.efficient_conv_bn_eval(gm))
    return (efficient[0].reason if len(efficient) else "no BatchNorm", fold[0].reason if len(fold) else "no BatchNorm")


CONVS = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("which", ["nn", "torch"])
def test_convolutions_of_both_frameworks(name: str, which: str, request: pytest.FixtureRequest) -> None:
    lib = nn if which == "nn" else request.getfixturevalue("torch").nn
    conv = getattr(lib, name)(4, 6, 3, groups=2).eval()
    norms = [getattr(lib, f"BatchNorm{name[-2:]}"), lib.SyncBatchNorm]
    for norm in norms:
        assert verdicts(conv, norm(6).eval()) == ("OK", "OK")
    other = getattr(lib, "BatchNorm3d" if name[-2] != "3" else "BatchNorm2d")
    assert verdicts(conv, other(6).eval()) == ("CHANNEL_MISMATCH", "CHANNEL_MISMATCH")
    assert verdicts(conv, norms[0](4).eval()) == ("CHANNEL_MISMATCH", "CHANNEL_MISMATCH")


@pytest.mark.parametrize("which", ["nn", "torch"])
def test_subclasses(which: str, request: pytest.FixtureRequest) -> None:
    lib: Any = nn if which == "nn" else request.getfixturevalue("torch").nn
    base = type(lib.BatchNorm2d(1)).__mro__[1]

    class Conv(lib.Conv2d):  # type: ignore[misc,name-defined]
        pass

    class Norm(lib.BatchNorm2d):  # type: ignore[misc,name-defined]
        pass

    class Base(base):  # type: ignore[misc]
        def _check_input_dim(self, input: Any) -> None:
            pass

    class Own(lib.Conv2d):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    class OwnNorm(lib.BatchNorm2d):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x) + 1

    class OwnCall(lib.Conv2d):  # type: ignore[misc,name-defined]
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + 1

    conv, norm = Conv(2, 3, 1).eval(), Norm(3).eval()
    assert verdicts(conv, norm) == ("OK", "OK")
    assert verdicts(conv, Base(3).eval()) == ("OK", "OK")
    assert verdicts(Own(2, 3, 1).eval(), norm) == ("HOOKED", "HOOKED")
    assert verdicts(OwnCall(2, 3, 1).eval(), norm) == ("HOOKED", "HOOKED")
    assert verdicts(conv, OwnNorm(3).eval()) == ("HOOKED", "HOOKED")
    # a class whose forward is replaced later is seen too
    Conv.forward = lambda self, x: x
    assert verdicts(conv, norm) == ("HOOKED", "HOOKED")
    del Conv.forward
    assert verdicts(conv, norm) == ("OK", "OK")


@pytest.mark.parametrize("which", ["nn", "torch"])
def test_hooks_and_methods_of_an_instance(which: str, request: pytest.FixtureRequest) -> None:
    lib: Any = nn if which == "nn" else request.getfixturevalue("torch").nn
    conv, norm = lib.Conv2d(2, 3, 1).eval(), lib.BatchNorm2d(3).eval()
    for module in (conv, norm):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: None)
            assert verdicts(conv, norm) == ("HOOKED", "HOOKED")
            handle.remove()
            assert verdicts(conv, norm) == ("OK", "OK")
        module.forward = module.forward
        assert verdicts(conv, norm) == ("HOOKED", "HOOKED")
        del module.forward


def test_torchs_own_ways_to_compute_a_weight(torch: Any) -> None:
    norm = torch.nn.BatchNorm2d(3).eval()
    parametrized = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(2, 3, 1)).eval()
    assert verdicts(parametrized, norm) == ("HOOKED", "HOOKED")
    lazy = torch.nn.LazyConv2d(3, 1).eval()
    assert verdicts(lazy, norm)[1] != "OK"
    half = torch.nn.Conv2d(2, 3, 1).to(torch.bfloat16).eval()
    assert verdicts(half, norm) == ("DTYPE_MIX", "DTYPE_MIX")
    meta = torch.nn.Conv2d(2, 3, 1, device="meta").eval()
    assert verdicts(meta, norm) == ("DTYPE_MIX", "DTYPE_MIX")


def test_what_is_no_batchnorm_has_no_row(torch: Any) -> None:
    for norm in (nn.ReLU(), nn.Identity(), torch.nn.InstanceNorm2d(3), torch.nn.LayerNorm(3), object()):
        assert verdicts(nn.Conv2d(2, 3, 1).eval(), norm) == ("no BatchNorm", "no BatchNorm")


def test_what_is_no_convolution() -> None:
    norm = nn.BatchNorm2d(3).eval()

    class LooksLikeOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.groups, self.out_channels = nn.Parameter(np.ones((3, 2, 1, 1))), None, 1, 3

    for module in (nn.ReLU(), LooksLikeOne(), nn.Sequential(nn.Conv2d(2, 3, 1))):
        assert verdicts(module, norm)[0] == "NOT_CONV"


def test_half_made_modules() -> None:
    """Attributes missing or of no sense: no layer that is known, and never a crash."""
    conv, norm = nn.Conv2d(2, 3, 1).eval(), nn.BatchNorm2d(3).eval()
    for name, value in [("groups", "two"), ("out_channels", None), ("training", "delete"), ("groups", 1 << 80)]:
        broken = nn.Conv2d(2, 3, 1).eval()
        if value == "delete":
            del broken.__dict__[name]
        else:
            object.__setattr__(broken, name, value)
        assert verdicts(broken, norm)[0] == "NOT_CONV"
    for name, value, reason in [("eps", "small", "UNSUPPORTED_BN_OP"), ("num_features", 2.5, "CHANNEL_MISMATCH")]:
        broken = nn.BatchNorm2d(3).eval()
        object.__setattr__(broken, name, value)
        assert verdicts(conv, broken) == (reason, reason)
    assert verdicts(conv, object.__new__(nn.BatchNorm2d)) == ("no BatchNorm", "no BatchNorm")
    for value in (3, "mean", [1.0, 2.0, 3.0]):
        broken = nn.BatchNorm2d(3).eval()
        object.__setattr__(broken, "running_mean", value)
        assert verdicts(conv, broken)[1] == "NONCONST_PARAM"


def test_properties_that_make_a_new_array_at_each_access() -> None:
    class Fresh(nn.BatchNorm2d):
        running_mean: Any = property(lambda self: np.ones(3, np.float32), lambda self, value: None)

    norm = nn.BatchNorm2d(3).eval()
    norm.__class__ = Fresh
    for _ in range(50):
        assert verdicts(nn.Conv2d(2, 3, 1).eval(), norm) == ("HOOKED", "HOOKED")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_what_an_attribute_raises_comes_out(error: type[BaseException]) -> None:
    def fail(self: Any) -> Any:
        raise error("from the attribute")

    class Hostile(nn.BatchNorm2d):
        running_var: Any = property(fail, lambda self, value: None)

    norm = nn.BatchNorm2d(3).eval()
    norm.__class__ = Hostile
    gm = graph_of(nn.Conv2d(2, 3, 1).eval(), norm)
    text = str(gm.graph)
    for run in (passes.efficient_conv_bn_eval, passes.fuse_conv_bn):
        with pytest.raises(error, match="from the attribute"):
            run(gm)
        assert str(gm.graph) == text


def test_a_module_that_replaces_itself_while_it_is_looked_at() -> None:
    class Trickster(nn.BatchNorm2d):
        owner: Any = None

        @property
        def num_features(self) -> int:
            if Trickster.owner is not None:
                object.__setattr__(Trickster.owner, "bn", None)
                object.__setattr__(Trickster.owner, "conv", None)
                self.__dict__.clear()
                gc.collect()
            return 3

        @num_features.setter
        def num_features(self, value: int) -> None:
            pass

    norm = nn.BatchNorm2d(3).eval()
    norm.__class__ = Trickster
    gm = graph_of(nn.Conv2d(2, 3, 1).eval(), norm)
    del norm
    Trickster.owner = gm
    try:
        passes.efficient_conv_bn_eval(gm)
    except (AttributeError, RuntimeError, TypeError):
        pass
    finally:
        Trickster.owner = None


def test_passes_keep_no_module_class_or_array_alive() -> None:
    class Local(nn.Conv2d):
        pass

    model = randomise(nn.Sequential(Local(2, 3, 1), nn.BatchNorm2d(3)), np.random.default_rng(0))
    gm = graph_of(model[0], model[1])
    folded, _ = passes.fuse_conv_bn(gm)
    passes.efficient_conv_bn_eval(gm)
    refs = [weakref.ref(o) for o in (model, model[0], model[1], gm, folded, Local)]
    arrays = [weakref.ref(model[0].weight), weakref.ref(model[1].running_mean)]
    del model, gm, folded, Local
    gc.collect()
    assert [r() for r in refs + arrays] == [None] * len(refs + arrays)


def test_target_that_is_not_there_is_no_batchnorm() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("bn", (graph.call_module("conv", (x,)),)))
    gm = fx.GraphModule({"conv": nn.Conv2d(2, 3, 1).eval(), "bn": nn.BatchNorm2d(3).eval()}, graph)
    del gm.conv
    (row,) = passes.efficient_conv_bn_eval(gm)
    assert row.reason == "NOT_CONV" and row.blocking == "conv"
    del gm.bn
    assert len(passes.efficient_conv_bn_eval(gm)) == 0
