"""Layers move inside vLLM while it decodes; every run is compared with one in which none moved.

Prefix caching is on here; test_server.py moves without it.
"""

from __future__ import annotations

import random
from functools import partial

import pytest

from pipelive_kv import (
    BusyError,
    CancelledError,
    DeadlineError,
    InvalidArgumentError,
    OverBudgetError,
)
from tests.vllm.runs import Engine, prompts, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BLOCKS = 400  # of 32 tokens, at three layers each
PHASES = ["planned", "admitted", "staging", "patching", "write_through", "armed"]
DECIDED = ["switching", "releasing"]


@pytest.fixture(scope="module")
def engine(tiny_llama):
    found = Engine(
        tiny_llama,
        enable_prefix_caching=True,
        num_gpu_blocks_override=BLOCKS,
        max_num_seqs=40,
        max_num_batched_tokens=128,  # long prompts are prefilled in chunks
    )
    yield found
    found.close()


@pytest.fixture(autouse=True)
def nothing_is_left_under_way(engine):
    yield
    job = engine.status()["job"]
    if job is not None and not (job["final"] and (job["lease"] is None or job["lease"]["final"])):
        engine.cancel()
        engine.ended()
        engine.lease_ended()


def test_tokens_are_the_same_over_ten_random_moves(engine):
    dice = random.Random(4)
    wanted = prompts(4, shared=40)
    expected = engine.unmoved(wanted, 100)
    here, moved = engine.status()["layers"][0], 0
    for number in range(10):
        here = dice.choice([n for n in range(1, 6) if n != here])
        streams = [engine.submit(prompt, 100) for prompt in wanted]
        streams[0].await_tokens(5 + 3 * number)
        report = engine.reconfigure([here, 6 - here], verify=number % 2 == 1)
        moved += report["bytes_moved"] > 0
        assert report["to"] == [here, 6 - here]
        assert [stream.result() for stream in streams] == expected
    assert moved == 10
    assert engine.generate(wanted, 100) == expected


def test_several_moves_in_one_request(engine):
    wanted = prompts(4, shared=40, seed=2)
    expected = engine.unmoved(wanted, 400)
    streams = [engine.submit(prompt, 400) for prompt in wanted]
    streams[0].await_tokens(5)
    for split in ([1, 5], [4, 2], [2, 4]):
        engine.reconfigure(split)
    assert [stream.result() for stream in streams] == expected


def test_a_lease_takes_the_old_split_up_again(engine):
    wanted = prompts(3, seed=12)
    expected = engine.unmoved(wanted, 200)
    old = engine.status()["layers"]
    streams = [engine.submit(prompt, 200) for prompt in wanted]
    streams[0].await_tokens(5)
    there = engine.reconfigure(engine.elsewhere(), lease_steps=100_000)
    back = engine.reconfigure(old)
    assert [stream.result() for stream in streams] == expected
    assert engine.status()["layers"] == old
    assert back["bytes_moved"] <= there["bytes_moved"]
    assert engine.generate(wanted, 200) == expected


def test_a_lease_can_be_let_go(engine):
    wanted = prompts(3, seed=13)
    expected = engine.unmoved(wanted, 200)
    streams = [engine.submit(prompt, 200) for prompt in wanted]
    streams[0].await_tokens(5)
    engine.reconfigure(engine.elsewhere(), lease_steps=100_000)
    with pytest.raises(BusyError):
        engine.reconfigure([1, 5])
    assert not engine.status()["job"]["lease"]["final"]
    engine.cancel()
    engine.lease_ended()
    engine.reconfigure([1, 5])
    assert [stream.result() for stream in streams] == expected
    assert engine.status()["layers"] == [1, 5]


def test_cached_blocks_that_nobody_uses_move_too(engine):
    wanted = prompts(2, shared=128, seed=3)
    expected = engine.unmoved(wanted, 20)
    report = engine.reconfigure(engine.elsewhere())  # while idle
    assert report["bytes_moved"] > 0
    before = engine.status()["blocks"]["live"]
    assert engine.generate(wanted, 20) == expected
    assert engine.status()["blocks"]["live"] <= before + 1  # what was cached was found again


def test_requests_that_leave_around_the_switchover(engine):
    """vLLM hands their blocks out again while their last step still runs."""
    stay, leave = prompts(3, seed=15), prompts(6, seed=16, length=100)
    late = prompts(3, seed=17, length=200)
    expected = engine.unmoved(stay, 200), engine.unmoved(late, 20)
    for _ in range(2):
        streams = [engine.submit(prompt, 200) for prompt in stay]
        going = [engine.submit(prompt, 300) for prompt in leave]
        for stream in (*streams, *going):
            stream.await_tokens(5)
        target = engine.elsewhere()
        engine.begin(target, pause=True)
        engine.await_phase("armed", held=True)
        engine.proceed()
        for stream in going:
            stream.task.cancel()
        added = [engine.submit(prompt, 20) for prompt in late]
        assert engine.ended()["layers"] == target
        assert [stream.result() for stream in streams] == expected[0]
        assert [stream.result() for stream in added] == expected[1]


@pytest.mark.parametrize("phase", PHASES + DECIDED)
def test_requests_that_arrive_in_a_phase(engine, phase):
    """A short one and one that is prefilled in chunks; then two batches are in flight.

    Phases that nothing holds may be over when the requests come."""
    base, late = prompts(3, seed=9), [*prompts(1, seed=50), *prompts(1, seed=60, length=400)]
    expected = engine.unmoved(base, 120), engine.unmoved(late, 60)
    streams = [engine.submit(prompt, 120) for prompt in base]
    streams[0].await_tokens(5)
    target = engine.elsewhere()
    engine.begin(target, pause=True, rate_limit=1e6 if phase == "staging" else 3e6)
    if phase in DECIDED:
        engine.await_phase("armed", held=True)
        engine.proceed()
    engine.await_phase(phase, held=phase in ("staging", "armed"))
    added = [engine.submit(prompt, 60) for prompt in late]
    added[1].await_tokens(1)
    if phase in ("patching", "write_through", "armed"):
        engine.await_phase("armed", held=True)
    engine.proceed()
    after = engine.ended()
    assert after["layers"] == target, after
    assert [s.result() for s in streams] == expected[0]
    assert [s.result() for s in added] == expected[1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_move_cancelled_in_a_phase_leaves_everything_as_it_was(engine, phase):
    wanted = prompts(3, seed=20)
    expected = engine.unmoved(wanted, 80)
    before, held = engine.status(), engine.memory()
    streams = [engine.submit(prompt, 80) for prompt in wanted]
    streams[0].await_tokens(5)
    slow = 2e4 if phase in ("staging", "patching") else 0.0
    # Patching goes on until the cancel, or is over soon.
    limit = 1000.0 if phase in ("write_through", "armed") else 0.01
    engine.begin(engine.elsewhere(), pause=True, rate_limit=slow, max_stop_ms=limit)
    engine.await_phase(phase, held=phase in ("staging", "patching", "armed"))
    engine.cancel()
    after = engine.ended()
    assert after["job"]["error"]["type"] == CancelledError.__name__
    assert (after["layers"], after["epoch"]) == (before["layers"], before["epoch"])
    assert [stream.result() for stream in streams] == expected
    assert engine.memory() == held
    assert engine.generate(wanted, 80) == expected


def test_a_move_past_its_deadline_is_given_up(engine):
    before = engine.status()["layers"]
    with pytest.raises(DeadlineError):
        engine.reconfigure(engine.elsewhere(), timeout=0.01)
    assert engine.status()["layers"] == before


def test_a_second_move_is_refused_while_one_is_under_way(engine):
    engine.begin(engine.elsewhere(), pause=True)
    with pytest.raises(BusyError):
        engine.reconfigure(engine.elsewhere())
    engine.cancel()
    engine.ended()


@pytest.mark.parametrize("layers", [[6, 0], [3, 2], [2, 2, 2], [-1, 7], ["a", 3], [True, 5], []])
def test_bad_splits_are_refused(engine, layers):
    with pytest.raises(InvalidArgumentError, match="layers is"):
        engine.reconfigure(layers)


def test_bad_options_are_refused(engine):
    with pytest.raises(InvalidArgumentError, match="speed"):
        engine.reconfigure([3, 3], speed=3)
    with pytest.raises(InvalidArgumentError, match="'peer'"):
        engine.reconfigure([3, 3], weights_from="peer")


def test_the_cache_shrinks_under_load_and_grows_again(engine):
    """Room for 24 requests at the start, not at their end: some are preempted meanwhile."""
    engine.reconfigure([3, 3])
    held = engine.memory()
    wanted = prompts(24, seed=70, length=180)
    expected = engine.unmoved(wanted, 200)
    preempted = _preemptions()
    streams = [engine.submit(prompt, 200) for prompt in wanted]
    until(lambda: all(len(stream.tokens) >= 8 for stream in streams))
    engine.begin([5, 1], pause=True)
    engine.await_phase("armed", held=True)
    during = engine.status()["blocks"]["capacity"]
    assert during < BLOCKS
    assert max(m["kv_bytes"] + m["weight_bytes"] - m["budget_bytes"] for m in engine.memory()) <= 0
    until(lambda: _preemptions() > preempted)
    engine.proceed()
    after = engine.ended()
    assert after["layers"] == [5, 1], after
    assert [stream.result() for stream in streams] == expected
    engine.reconfigure([3, 3])
    assert engine.status()["blocks"]["capacity"] >= BLOCKS
    now = engine.memory()
    for name in ("layers", "kv_bytes", "kv_held_bytes", "weight_bytes"):
        assert [m[name] for m in now] == [m[name] for m in held]


def test_a_shrink_that_does_not_fit_is_refused_with_the_blocks_named(engine):
    wanted = prompts(30, seed=90, length=340)
    expected = engine.unmoved(wanted, 30)
    before, held = engine.status(), engine.memory()
    streams = [engine.submit(prompt, 30) for prompt in wanted]
    until(lambda: all(stream.tokens for stream in streams))
    with pytest.raises(OverBudgetError, match=r"blocks are in use .* busy above are \[\d+"):
        engine.reconfigure([5, 1])
    assert engine.status()["layers"] == before["layers"]
    assert [stream.result() for stream in streams] == expected
    assert engine.memory() == held


def test_memory_is_given_back(engine):
    """Weights and KV of layers that went are gone from the worker's memory."""
    engine.reconfigure([3, 3])
    before, built = engine.memory(), engine.on_workers(_weights_alive)
    for split in ([5, 1], [1, 5], [3, 3]):
        engine.reconfigure(split)
        assert [n for n, _ in engine.on_workers(_weights_alive)] == split
        physical = engine.on_workers(_kv_memory)
        for held, (mapped, behind) in zip(engine.memory(), physical, strict=True):
            assert 0 < mapped <= held["kv_bytes"]
            assert behind <= held["kv_held_bytes"]
            assert behind + held["weight_bytes"] <= held["budget_bytes"]
        # What one rank has given away is no longer behind its pool.
        if split != [3, 3]:
            assert physical[split.index(1)][1] < physical[split.index(5)][1]
    names = ("layers", "capacity", "kv_bytes", "kv_held_bytes", "weight_bytes")
    after = engine.memory()
    assert [[m[n] for n in names] for m in after] == [[m[n] for n in names] for m in before]
    assert engine.on_workers(_weights_alive) == built


def test_zeroed_kv_changes_the_tokens(engine):
    """The comparison can fail: with the KV that came with the move zeroed, streams differ."""
    wanted = prompts(4, shared=30, seed=31)
    expected = engine.unmoved(wanted, 80)
    streams = [engine.submit(prompt, 80) for prompt in wanted]
    streams[0].await_tokens(5)
    old = engine.status()["layers"][0]
    new = engine.reconfigure(engine.elsewhere())["to"][0]
    gained = range(min(old, new), max(old, new))
    zeroed = engine.on_workers(partial(_zero_kv, gained=gained))
    assert zeroed == ([len(gained), 0] if new > old else [0, len(gained)])
    found = [stream.result() for stream in streams]
    assert sum(a != b for a, b in zip(found, expected, strict=True)) > 0
    engine.wait(engine.llm.reset_prefix_cache())


def _preemptions() -> float:
    """As vLLM counts them."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for found in REGISTRY.collect()
        for sample in found.samples
        if sample.name == "vllm:num_preemptions_total"
    )


def _zero_kv(worker, gained):
    """Zero the KV of those layers where they run now; how many of them do here."""
    state = worker.model_runner.pipelive
    here = [layer for layer in state.layers.attention_names if layer in gained]
    for layer in here:
        state.kv_view(layer)[: state.pool.capacity].zero_()
    return len(here)


def _kv_memory(worker):
    """Resident bytes of the pool's mappings by smaps, and the physical memory behind them."""
    import os
    import re

    name, mapped, inside = "/memfd:pipelive_kv", 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = name in line
            elif inside and line.startswith("Rss:"):
                mapped += int(line.split()[1]) << 10
    behind = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith(name):
                status = os.fstat(int(number))
                behind[status.st_ino] = status.st_blocks * 512
        except OSError:
            continue
    return mapped, sum(behind.values())


def _weights_alive(worker):
    """(attention layers that exist in the process, layers that it has in its bookkeeping)."""
    import gc

    from vllm.model_executor.layers.attention import Attention

    alive = sum(type(found) is Attention for found in gc.get_objects())
    return alive, len(worker.model_runner.pipelive.layers.layers)
