"""Requests give their blocks up so that layers can move, and say the same in the end."""

from __future__ import annotations

import pytest

from pipelive_kv.coordinator import MigrationOptions
from pipelive_kv.engines.reference import Engine, EngineConfig, Request
from pipelive_kv.errors import OverBudgetError
from pipelive_kv.placement import Placement

REQUESTS = [
    Request(
        tuple((5 * i + k * k) % 150 + 3 for k in range(60 + 7 * i)),
        40,
        arrival_step=2 * i,
        temperature=float(i % 2),
        seed=i,
        stop_at_eos=False,
    )
    for i in range(7)
]
BUDGET = "1200KiB"


def config(path, **settings) -> EngineConfig:
    given = {"block_size": 8, "chunk": 16, "page_bytes": 64 << 10, "max_blocks": 128, **settings}
    return EngineConfig(path, Placement.from_counts([3, 3]), **given)


def serve(engine: Engine, *, move: bool) -> tuple[list[list[int]], list]:
    """The tokens of all requests; layers move while they run."""
    ids = [engine.submit(request) for request in REQUESTS]
    jobs = []

    def on_step(record) -> None:
        if move and record.seq == 50:
            jobs.append(
                engine.reconfigure(
                    Placement.from_counts([6, 0]),
                    timeout=60,
                    options=MigrationOptions(max_stop_ms=1000),
                )
            )

    results = engine.run(on_step=on_step, until=lambda: all(job.phase.is_final for job in jobs))
    return [results[number].tokens for number in ids], jobs


def test_preempted_requests_say_the_same(tiny):
    path = tiny("qwen3")
    with Engine(config(path, reconfigurable=False)) as engine:
        expected, _ = serve(engine, move=False)
    with Engine(config(path, budget=BUDGET, preempt=True, capacity=100)) as engine:
        tokens, (job,) = serve(engine, move=True)
        report = job.wait(1)
        assert engine.preempted > 0
        assert engine.placement.counts == (6, 0)
    assert report.capacity_during < 100
    assert tokens == expected


def test_without_it_the_move_is_refused(tiny):
    path = tiny("qwen3")
    with Engine(config(path, budget=BUDGET, capacity=100)) as engine:
        _, (job,) = serve(engine, move=True)
        with pytest.raises(OverBudgetError, match="live blocks"):
            job.wait(1)
        assert engine.preempted == 0
        assert engine.placement.counts == (3, 3)
