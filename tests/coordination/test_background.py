"""Threads that load and map beside the steps: their niceness, and what comes back from them."""

from __future__ import annotations

import os
import platform
import threading

import pytest

import pipelive_kv as pk
from pipelive_kv.stage.background import Background

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="niceness is a thread's on Linux")
BLOCK = pk.KVSpec(num_kv_heads=1, head_dim=8, dtype="float32", block_size=2)


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@LINUX
def test_a_call_is_made_with_the_niceness_and_leaves_none_behind():
    before = niceness()
    assert Background(7).run(niceness) == min(19, before + 7)
    with Background(3).threads(2) as pool:
        found = [pool.submit(niceness).result() for _ in range(4)]
    assert found == [min(19, before + 3)] * 4
    assert niceness() == before


def test_without_niceness_it_is_the_thread_that_asks():
    assert Background().run(threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("nice", [0, 5])
def test_what_a_call_raises_comes_back(nice):
    def fail() -> None:
        raise pk.CorruptError("a layer")

    with pytest.raises(pk.CorruptError, match="a layer"):
        Background(nice).run(fail)


@pytest.mark.parametrize("nice", [-1, 20])
def test_a_stage_refuses_other_niceness(nice):
    pool = pk.KVPool(BLOCK, num_layers=2, layers=[0, 1], max_blocks=4, capacity=4, budget="8MiB")
    with pool, pytest.raises(pk.InvalidArgumentError, match=f"background_nice is {nice}"):
        pk.Stage(
            pp_rank=0,
            pp_size=1,
            pool=pool,
            placement=pk.Placement.from_counts([2]),
            background_nice=nice,
        )
