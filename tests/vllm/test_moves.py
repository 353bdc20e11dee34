"""Layers move inside vLLM while it decodes; every run is compared with one in which none moved."""

from __future__ import annotations

import random
import threading
import time

import pytest

import pipelive_kv.engines.vllm as live
from pipelive_kv import CancelledError, DeadlineError, InvalidArgumentError
from tests.vllm.runs import Mover, generate, prompts, start, while_generating

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EVEN, LATE, EARLY = [3, 3], [2, 4], [5, 1]


@pytest.fixture(scope="module", params=[True, False], ids=["prefix caching", "no prefix caching"])
def llm(request, tiny_llama, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("VLLM_PLUGINS", "pipelive")
    found = start(tiny_llama, enable_prefix_caching=request.param)
    yield found
    found.llm_engine.engine_core.shutdown()
    patch.undo()


@pytest.fixture
def unmoved(llm):
    """Run requests with the layers as they are; again must give the same (or nothing is shown)."""

    def run(wanted, tokens):
        first, second = generate(llm, wanted, tokens), generate(llm, wanted, tokens)
        assert first == second, "vLLM is not bit-stable here, so moved runs cannot be compared"
        return first

    return run


def test_tokens_are_the_same_over_ten_random_moves(llm, unmoved):
    dice = random.Random(4)
    wanted = prompts(4, shared=40)
    expected = unmoved(wanted, 400)
    splits = []
    for _ in range(10):
        first = dice.choice([n for n in range(1, 6) if not splits or n != splits[-1][0]])
        splits.append([first, 6 - first])
    with Mover(llm, splits) as mover:
        for _ in range(50):
            assert generate(llm, wanted, 400) == expected
            if len(mover.reports) + len(mover.errors) == len(splits):
                break
    assert mover.errors == []
    assert all(report["bytes_moved"] > 0 for report in mover.reports)
    assert live.status(llm)["layers"] == splits[-1]
    assert generate(llm, wanted, 400) == expected


def test_cached_blocks_that_nobody_uses_move_too(llm, unmoved):
    wanted = prompts(2, shared=128, seed=3)
    expected = unmoved(wanted, 20)
    here = live.status(llm)["layers"]
    live.reconfigure(llm, [6 - here[0], 6 - here[1]] if here[0] != 3 else EARLY)  # while idle
    assert generate(llm, wanted, 20) == expected


def test_requests_during_and_after_a_move(llm, unmoved):
    wanted = prompts(6, seed=9)
    expected = {tuple(p): unmoved([p], 60)[0] for p in wanted}
    base = prompts(2, seed=40)
    base_tokens = unmoved(base, 300)
    target = EARLY if live.status(llm)["layers"] != EARLY else LATE
    found, report = while_generating(llm, base, 300, lambda: live.reconfigure(llm, target))
    assert report["to"] == target
    assert found == base_tokens
    for prompt in wanted:
        assert generate(llm, [prompt], 60)[0] == expected[tuple(prompt)]


def test_a_cancelled_move_leaves_everything_as_it_was(llm, unmoved):
    wanted = prompts(3, seed=20)
    expected = unmoved(wanted, 300)
    before = live.status(llm)
    target = EARLY if before["layers"] != EARLY else LATE

    def act():
        live.reconfigure(llm, target, wait=False, rate_limit=1000.0)
        time.sleep(0.2)
        live.cancel(llm)
        while not live.status(llm)["job"]["final"]:
            time.sleep(0.02)
        return live.status(llm)

    found, after = while_generating(llm, wanted, 300, act)
    assert found == expected
    assert after["job"]["error"]["type"] == CancelledError.__name__
    assert after["layers"] == before["layers"]
    assert after["epoch"] == before["epoch"]


def test_a_move_past_its_deadline_is_given_up(llm):
    target = EARLY if live.status(llm)["layers"] != EARLY else LATE
    with pytest.raises(DeadlineError):
        live.reconfigure(llm, target, timeout=0.01)
    assert live.status(llm)["layers"] != target


@pytest.mark.parametrize("layers", [[6, 0], [3, 2], [2, 2, 2], [-1, 7], ["a", 3]])
def test_bad_splits_are_refused(llm, layers):
    with pytest.raises(InvalidArgumentError, match="layers is"):
        live.reconfigure(llm, layers)


def test_bad_options_are_refused(llm):
    with pytest.raises(InvalidArgumentError, match="speed"):
        live.reconfigure(llm, EARLY, speed=3)
    with pytest.raises(InvalidArgumentError, match="'peer'"):
        live.reconfigure(llm, EARLY, weights_from="peer")


def test_a_zeroed_move_changes_the_tokens(llm, unmoved):
    """The comparison can fail: with the moved KV zeroed, streams differ."""
    wanted = prompts(4, shared=30, seed=31)
    expected = unmoved(wanted, 300)
    target = EARLY if live.status(llm)["layers"] != EARLY else LATE
    done = threading.Event()

    def act():
        report = live.reconfigure(llm, target)
        llm.collective_rpc(_zero_kv)
        done.set()
        return report

    found, report = while_generating(llm, wanted, 300, act)
    assert done.is_set()
    assert report["to"] == target
    assert sum(a != b for a, b in zip(found, expected, strict=True)) > 0
    llm.reset_prefix_cache()


def _zero_kv(worker):
    for view in worker.model_runner.kv_caches:
        view[: worker.model_runner.pipelive.pool.capacity].zero_()


def test_memory_is_given_back(llm):
    from pipelive_kv.engines.vllm.worker import memory_of

    live.reconfigure(llm, EVEN)
    before = llm.collective_rpc(memory_of)
    for split in (EARLY, LATE, EVEN):
        live.reconfigure(llm, split)
    after = llm.collective_rpc(memory_of)
    for then, now in zip(before, after, strict=True):
        assert {k: now[k] for k in ("layers", "capacity", "kv_bytes", "weight_bytes")} == {
            k: then[k] for k in ("layers", "capacity", "kv_bytes", "weight_bytes")
        }
        assert now["kv_bytes"] + now["weight_bytes"] <= now["budget_bytes"]
