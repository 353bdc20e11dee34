"""The reference engine: processes, tokens, failures."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelive_kv.engines.reference import Engine, EngineConfig, EngineFailedError, Request
from pipelive_kv.engines.reference.messages import Sample
from pipelive_kv.engines.reference.sampling import draw
from pipelive_kv.errors import DeadlineError
from pipelive_kv.placement import Placement


def prompt(number: int) -> tuple[int, ...]:
    return tuple((7 * i * i + 13 * number + 3 * i) % 150 + 5 for i in range(6 + 9 * number))


def config(path, counts, **settings) -> EngineConfig:
    given = {
        "block_size": 8,
        "chunk": 16,
        "page_bytes": 64 << 10,
        "max_batch": 2,
        "reconfigurable": False,
        **settings,
    }
    return EngineConfig(path, Placement.from_counts(counts), **given)


def serve(engine: Engine, requests) -> list[list[int]]:
    ids = [engine.submit(request) for request in requests]
    results = engine.run()
    return [results[number].tokens for number in ids]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("counts", [(6,), (4, 2), (2, 0, 4)])
def test_tokens_equal_stock(tiny, counts):
    path = tiny("qwen3")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    requests = [Request(prompt(i), 10 + i, arrival_step=5 * i, stop_at_eos=False) for i in range(6)]
    tokens, steps = [], []
    with Engine(config(path, counts)) as engine:
        ids = [engine.submit(request) for request in requests]
        results = engine.run(
            on_token=lambda number, token, at: tokens.append((number, token, at)),
            on_step=steps.append,
        )
        pids = engine.pids
    for number, request in zip(ids, requests, strict=True):
        expected = model.generate(
            torch.tensor([request.prompt]), max_new_tokens=request.max_new_tokens, do_sample=False
        )
        result = results[number]
        assert result.tokens == expected[0, len(request.prompt) :].tolist()
        assert result.finish == "length"
        assert result.tokens == [token for owner, token, _ in tokens if owner == number]
        assert result.token_times == [at for owner, _, at in tokens if owner == number]
        assert result.arrival <= result.token_times[0]
        assert result.ttft > 0
        assert result.tpot > 0
    assert [step.seq for step in steps] == list(range(len(steps)))
    for step in steps:
        assert [times.rank for times in step.stages] == list(range(len(counts)))
        assert [times.num_layers for times in step.stages] == list(counts)
        assert all(times.begin <= times.start <= times.end for times in step.stages)
    assert all(gone(pid) for pid in pids)


def test_tokens_do_not_depend_on_what_else_runs(tiny):
    """Greedy and drawn texts are the same alone, in company, and when they wait for blocks."""
    path = tiny("llama")
    requests = [
        Request(prompt(i), 12, temperature=0.0 if i % 2 else 1.5, seed=i, stop_at_eos=False)
        for i in range(4)
    ]
    with Engine(config(path, (6,), lanes=2)) as engine:
        alone = [serve(engine, [request])[0] for request in requests]
        together = serve(engine, requests)
    with Engine(config(path, (3, 3), lanes=3, max_blocks=8)) as engine:
        waiting = serve(engine, requests)
    assert alone == together == waiting
    assert alone[0] != alone[2]


def test_drawing_depends_on_seed_and_position_alone():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    same = logits[[1, 1, 1]]
    first = draw(logits, [Sample(1, 4, 0.8, 9)])
    assert draw(same, [Sample(2, 4, 0.8, 9)]) == first
    drawn = {draw(same, [Sample(0, at, 0.8, 9)])[0] for at in range(40)}
    assert len(drawn) > 5
    assert draw(logits, [Sample(2, 0, 0.0, 0)]) == [int(logits[2].argmax())]


def test_requests_are_checked(tiny):
    with Engine(config(tiny("llama"), (6,), max_tokens=64)) as engine:
        with pytest.raises(ValueError, match="max_tokens is 64"):
            engine.submit(Request((1,) * 60, 10))
        with pytest.raises(ValueError, match="0 to 159"):
            engine.submit(Request((160,), 10))
        with pytest.raises(ValueError, match="not made reconfigurable"):
            engine.reconfigure(Placement.from_counts([6]))
        assert engine.run() == {}


def test_wrong_placement_is_refused(tiny):
    with pytest.raises(ValueError, match="has 5 layers, the model 6"):
        Engine(config(tiny("llama"), (5,)))


def test_a_stage_that_cannot_start_is_named(tiny, tmp_path):
    path = tiny("llama", num_hidden_layers=6)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EngineFailedError, match=r"stage [01] failed: WeightsError: .*truncated"):
        Engine(config(path, (3, 3)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_stage_is_named(tiny, rank):
    with Engine(config(tiny("llama"), (3, 3))) as engine:
        engine.submit(Request(prompt(1), 60, stop_at_eos=False))
        pids = engine.pids

        def kill(record) -> None:
            if record.seq == 6:
                os.kill(pids[rank], signal.SIGKILL)

        with pytest.raises(EngineFailedError, match=f"stage {rank} died .*SIGKILL"):
            engine.run(on_step=kill)
    assert all(gone(pid) for pid in pids)


def test_a_stage_that_hangs_is_named(tiny):
    with Engine(config(tiny("llama"), (3, 3), step_timeout=1.0)) as engine:
        engine.submit(Request(prompt(1), 60, stop_at_eos=False))
        pids = engine.pids

        def stop(record) -> None:
            if record.seq == 6:
                os.kill(pids[1], signal.SIGSTOP)

        with pytest.raises(DeadlineError, match=r"within 1 s; stages \[1\] have not"):
            engine.run(on_step=stop)
    assert all(gone(pid) for pid in pids)


def test_memory_of_a_stage_is_bounded(tiny):
    with pytest.raises(EngineFailedError, match="stage 0 failed: OverBudgetError"):
        Engine(config(tiny("llama"), (6,), budget="200KiB"))


def test_closing_twice_and_dropping(tiny):
    engine = Engine(config(tiny("llama"), (6,)))
    engine.close()
    engine.close()
    with pytest.raises(Exception, match="closed"):
        engine.submit(Request((1,), 1))
    engine = Engine(config(tiny("llama"), (6,)))
    pids = engine.pids
    engine._stages._reap()  # what the interpreter does for an engine that nobody closed
    assert all(gone(pid) for pid in pids)
    engine.close()
