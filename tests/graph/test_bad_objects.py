# SPDX-License-Identifier: BSD-3-Clause
"""Objects that change the graph while a pass reads them."""

from __future__ import annotations

import copy
import gc
import operator
import os
import pickle
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyconvbn import _core, fx, nn, passes

sys.path.insert(0, str(Path(__file__).parent))
from bad_input_util import (  # noqa: E402
    CLEAN, Functions, Modules, PASSES, USES, X,
    by_hand, by_name, net, other, replace,
)


# ---- objects that change the graph while it is read ------------------------------------------------------------------


def erase_all(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        try:
            graph.erase_node(node)
        except RuntimeError:
            pass


def add_many(graph: fx.Graph) -> None:
    for _ in range(20):
        graph.call_function(abs, (graph.create_node("placeholder", "q"),))


def drop_args(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.args = ()


def reorder(graph: fx.Graph) -> None:
    nodes = list(graph.nodes)
    if len(nodes) > 1:
        nodes[0].prepend(nodes[-1])


def retarget(graph: fx.Graph) -> None:
    for node in graph.nodes:
        node.target = len if node.op == "call_function" else "zzz"


def rename(graph: fx.Graph) -> None:
    for i, node in enumerate(graph.nodes):
        node.name = f"renamed_{i}"


def drop_modules(graph: fx.Graph) -> None:
    for name in ("c", "b"):
        if graph.owning_module is not None and name in vars(graph.owning_module):
            delattr(graph.owning_module, name)


def swap_graph(graph: fx.Graph) -> None:
    if graph.owning_module is not None:
        graph.owning_module.graph = fx.Graph()
    gc.collect()


def run_passes(graph: fx.Graph) -> None:
    gm: Any = graph.owning_module
    if gm is not None:
        passes.efficient_conv_bn_eval(gm)
        passes.dce(gm)
        passes.fuse_conv_bn(gm, inplace=True)


def restore(graph: fx.Graph) -> None:
    graph._restore(graph._snapshot())


def intern(graph: fx.Graph) -> None:
    for i in range(100):
        try:
            graph.call_function(len, (f"{i}" * 1000,), {f"k{i}": 1}, None) if i % 2 else graph.get_attr(f"{i}" * 1000)
        except RuntimeError:
            pass


def raise_error(graph: fx.Graph) -> None:
    raise ZeroDivisionError


CHANGES = [erase_all, add_many, drop_args, reorder, retarget, rename, drop_modules, swap_graph, run_passes, restore,
           intern, raise_error]  # fmt: skip

bomb: list[Callable[[], None]] = []


def fire() -> None:
    if bomb:
        bomb[0]()


class Mine:
    """Whatever is asked of it, something else happens first."""

    def __eq__(self, other: object) -> bool:
        fire()
        return True

    def __hash__(self) -> int:
        fire()
        return 1

    def __repr__(self) -> str:
        fire()
        return "mine"

    def __bool__(self) -> bool:
        fire()
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        fire()
        return args[0]

    def __deepcopy__(self, memo: Any) -> Any:
        fire()
        return self

    def __float__(self) -> float:
        fire()
        return 1.0

    __index__ = __bool__  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        fire()
        return iter((1,))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        fire()
        return np.ones(2, np.float32)

    def __getattr__(self, name: str) -> Any:
        fire()
        raise AttributeError(name)

    def __del__(self) -> None:
        try:
            fire()
        except ZeroDivisionError:
            pass  # Python would only print it

    @property
    def shape(self) -> Any:
        fire()
        return (2,)


class MineConv(nn.Conv2d):
    def forward(self, *args: Any) -> Any:
        fire()
        return super().forward(*args)

    def __getattribute__(self, name: str) -> Any:
        if name in ("stride", "weight", "groups", "training", "__deepcopy__"):
            fire()
        return super().__getattribute__(name)


class MineNorm(nn.BatchNorm2d):
    def __getattribute__(self, name: str) -> Any:
        if name in ("weight", "eps", "training", "running_mean", "__deepcopy__"):
            fire()
        return super().__getattribute__(name)


def mine_literal() -> Any:
    gm = net()
    by_name(gm)["add"].args = (by_name(gm)["b"], Mine())
    return gm


def mine_target() -> Any:
    gm = net()
    node = by_name(gm)["b"]
    node.append(called := gm.graph.call_function(Mine(), (node,)))
    by_name(gm)["add"].args = (called, 1)
    return gm


def mine_key() -> Any:
    gm = net()
    node = by_name(gm)["b"]
    node.append(called := gm.graph.call_function(len, ({Mine(): node, "z": Mine()},)))
    by_name(gm)["add"].args = (called, 1)
    return gm


def mine_parameters() -> Any:
    gm = net(Functions)
    node = by_name(gm)["batch_norm"]
    node.args = (node.args[0], *[Mine() for _ in range(7)])
    return gm


def mine_attribute() -> Any:
    gm = net(Functions)
    gm.c.__dict__["weight"] = Mine()
    return gm


def mine_meta() -> Any:
    gm = net()
    for node in gm.graph.nodes:
        node.meta = {Mine(): Mine(), "tensor_meta": Mine()}
        node.type = Mine()
    return gm


def mine_modules() -> Any:
    return by_hand(MineConv(2, 2, 1), MineNorm(2))


def consistent(graph: fx.Graph) -> None:
    nodes = list(graph.nodes)
    assert len(nodes) == len(graph.nodes) == len({node.name for node in nodes})
    for node in nodes:
        assert all(node in used.users for used in node.all_input_nodes)
        assert all(node in user.all_input_nodes for user in node.users)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "make", [mine_literal, mine_target, mine_key, mine_parameters, mine_attribute, mine_meta, mine_modules]
)
def test_objects_that_change_the_graph_meanwhile(make: Callable[[], Any], change: Callable[[Any], None]) -> None:
    for name, use in USES.items():
        if name in ("verify", "html") and make is not mine_modules:
            continue  # several runs each; once is enough
        for times in (1, 12):
            gm = make()
            graph, left = gm.graph, [times]

            def change_once(graph: Any = graph, left: Any = left) -> None:
                if left[0] > 0:
                    left[0] -= 1
                    change(graph)

            bomb[:] = [change_once]
            try:
                use(gm)
            except (*CLEAN, ZeroDivisionError, pickle.PicklingError, RecursionError):
                pass
            finally:
                bomb.clear()
            consistent(graph)


@pytest.mark.parametrize("change", CHANGES)
def test_a_running_graph_that_changes(change: Callable[[Any], None]) -> None:
    gm = net()

    def edit(value: Any) -> Any:
        change(gm.graph)
        gc.collect()
        return value

    node = by_name(gm)["x"]
    node.append(called := gm.graph.call_function(edit, (node,)))
    by_name(gm)["c"].args = (called,)
    for _ in range(2):
        try:
            gm(X)
        except (*CLEAN, ZeroDivisionError):
            pass
        consistent(gm.graph)


def test_threads_run_copy_and_edit_one_graph() -> None:
    gm = net()
    graph, unexpected, end = gm.graph, [], time.monotonic() + 1.0
    rng = random.Random(5)

    def guarded(step: Callable[[], Any]) -> Callable[[], None]:
        def loop() -> None:
            while time.monotonic() < end:
                try:
                    step()
                except CLEAN:
                    pass  # the graph of this moment may be one that cannot run
                except BaseException as error:  # noqa: BLE001
                    unexpected.append(error)

        return loop

    def edit() -> None:
        nodes = list(graph.nodes)
        node = rng.choice(nodes[1:-1] or nodes)
        kind = rng.randrange(4)
        if kind == 0 and len(nodes) < 40:
            node.append(graph.call_function(operator.add, (node, 1)))
        elif kind == 1 and node.op == "call_function" and node.all_input_nodes:
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif kind == 2 and node.op == "call_function":
            graph.erase_node(node)
        else:
            node.args = node.args

    def look() -> None:
        for use in (copy.deepcopy, str, passes.dce, replace, lambda g: g.code, lambda g: passes.fuse_conv_bn(g)):
            use(gm)

    threads = [threading.Thread(target=guarded(step)) for step in (lambda: gm(X), lambda: gm(X), look, edit)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not unexpected, unexpected[:3]
    consistent(graph)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_runs_the_graph() -> None:
    gm = net()
    wanted, going = gm(X), [True]

    def run() -> None:
        while going[0]:
            gm(X)
            passes.fuse_conv_bn(gm)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(8):
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                same = np.array_equal(gm(X), wanted) and len(passes.fuse_conv_bn(gm)[1].rows) == 1
                os._exit(0 if same else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        going[0] = False
        thread.join()


# ---- what stays behind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Modules, Functions])
@pytest.mark.parametrize("name", USES)
def test_nothing_keeps_the_module_alive(name: str, cls: type[Modules]) -> None:
    gm = net(cls)
    result = USES[name](gm)
    for node in gm.graph.nodes:
        node.meta["node"] = node
    seen = [weakref.ref(thing) for thing in (gm, gm.graph, *gm.modules(), *gm.parameters())]
    del gm, result, node
    gc.collect()
    assert [ref() for ref in seen if ref() is not None] == []


@pytest.mark.parametrize("name", [*PASSES, "run", "deepcopy"])
def test_repeating_a_pass_keeps_no_memory(name: str) -> None:
    def once() -> None:
        USES[name](net())

    once()
    gc.collect()
    before = _core.alloc_stats()
    for _ in range(50):
        once()
    gc.collect()
    after = _core.alloc_stats()
    assert (after["live_bytes"], after["live_blocks"]) == (before["live_bytes"], before["live_blocks"])
