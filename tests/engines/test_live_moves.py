"""Layers move between the stages of a running engine, and nobody can tell from the tokens."""

from __future__ import annotations

import os
import signal

import pytest

from pipelive_kv.coordinator import MigrationOptions
from pipelive_kv.demo.corrupt import zero_moved_layer
from pipelive_kv.engines.reference import Engine, EngineConfig, EngineFailedError, Request
from pipelive_kv.errors import InvalidArgumentError, PipeliveError
from pipelive_kv.models.smollm import smollm2
from pipelive_kv.placement import Placement

REQUESTS = [
    Request(
        tuple((7 * i + k * k) % 150 + 3 for k in range(10 + 9 * i)),
        40,
        arrival_step=4 * i,
        temperature=float(i % 2),
        seed=i,
        stop_at_eos=False,
    )
    for i in range(6)
]


def config(path, counts, **settings) -> EngineConfig:
    given = {"block_size": 8, "chunk": 16, "page_bytes": 64 << 10, "max_blocks": 128, **settings}
    return EngineConfig(path, Placement.from_counts(counts), **given)


class Mover:
    """Starts one reconfiguration after the other while the engine runs."""

    def __init__(self, engine: Engine, plan, *, first_step: int = 10, **options) -> None:
        self.engine = engine
        self.plan = [Placement.from_counts(counts) for counts in plan]
        self.first_step = first_step
        self.options = MigrationOptions(**{"max_stop_ms": 1000.0, **options})
        self.jobs = []
        self.steps = []

    @property
    def over(self) -> bool:
        """Asked when no request is left: no step would call on_step any more."""
        self._go_on()
        return not self.plan and all(job.phase.is_final for job in self.jobs)

    def on_step(self, record) -> None:
        self.steps.append(record)
        if record.seq >= self.first_step:
            self._go_on()

    def _go_on(self) -> None:
        if self.plan and (not self.jobs or self.jobs[-1].phase.is_final):
            placement = self.plan.pop(0)
            self.jobs.append(self.engine.reconfigure(placement, timeout=60, options=self.options))


def serve(engine: Engine, mover: Mover | None = None, requests=REQUESTS) -> list[list[int]]:
    ids = [engine.submit(request) for request in requests]
    if mover is None:
        results = engine.run()
    else:
        results = engine.run(on_step=mover.on_step, until=lambda: mover.over)
    return [results[number].tokens for number in ids]


@pytest.fixture(scope="module")
def still():
    """Give the tokens of an engine that never moves anything; remembered by model."""
    known: dict[object, list[list[int]]] = {}

    def get(path) -> list[list[int]]:
        if path not in known:
            with Engine(config(path, [3, 3], reconfigurable=False)) as engine:
                known[path] = serve(engine)
        return known[path]

    return get


@pytest.mark.parametrize(
    ("family", "settings", "options"),
    [
        ("qwen3", {}, {}),
        ("mistral", {"transport": "tcp"}, {"verify": True}),
        ("llama", {"lanes": 3}, {"weights_from": "peer"}),
        ("gemma2", {}, {"mode": "stop_and_copy"}),
    ],
)
def test_tokens_are_the_same(tiny, still, family, settings, options):
    path = tiny(family)
    plan = [[5, 1], [1, 5], [6, 0], [0, 6], [3, 3]]
    with Engine(config(path, [3, 3], **settings)) as engine:
        mover = Mover(engine, plan, **options)
        tokens = serve(engine, mover)
        for job, counts in zip(mover.jobs, plan, strict=True):
            report = job.wait(1)
            assert report.new == Placement.from_counts(counts)
            if options.get("verify"):
                assert sum(stage.verified_slots for stage in report.stages) > 0
        assert engine.placement == Placement.from_counts(plan[-1])
    assert tokens == still(path)
    counts_by_epoch = [(3, 3), *map(tuple, plan)]
    for step in mover.steps:
        assert tuple(times.num_layers for times in step.stages) == counts_by_epoch[step.epoch]
    # Every placement but the last one of a fast machine has really run tokens.
    assert {step.epoch for step in mover.steps if step.rows} >= {0, 1, 2}


def test_chunks_of_a_prompt_follow_each_other_over_switchovers(tiny, monkeypatch):
    """The next chunk of a prompt is put off where the one before is under way at a switchover."""
    path = tiny("qwen3")
    shape = {"chunk": 4, "max_tokens": 160, "max_batch": 2, "max_blocks": 128}
    requests = [
        Request(tuple((5 * i + 3 * k) % 150 + 3 for k in range(150)), 3, stop_at_eos=False)
        for i in range(4)
    ]
    with Engine(config(path, [3, 3], reconfigurable=False, **shape)) as engine:
        expected = serve(engine, None, requests)
    with Engine(config(path, [3, 3], chunks_in_flight=3, **shape)) as engine:
        ask, answers = engine.scheduler.is_hazard, []
        monkeypatch.setattr(
            engine.scheduler, "is_hazard", lambda seq: answers.append(ask(seq)) or answers[-1]
        )
        mover = Mover(engine, [[5, 1], [1, 5], [4, 2], [2, 4]], first_step=4)
        assert serve(engine, mover, requests) == expected
        for job in mover.jobs:
            job.wait(1)
    assert any(answers)


def test_tokens_are_the_same_there_and_back_under_leases(tiny, still):
    path = tiny("qwen3")
    with Engine(config(path, [3, 3])) as engine:
        mover = Mover(engine, [[5, 1], [3, 3], [1, 5], [3, 3]], lease_steps=10**6)
        assert serve(engine, mover) == still(path)
        for job in mover.jobs:
            job.wait(1)
        assert mover.jobs[1] is mover.jobs[0].lease
        assert mover.jobs[3] is mover.jobs[2].lease
    assert {step.epoch for step in mover.steps if step.rows} >= {0, 1, 2}


def test_lost_kv_is_noticed(tiny, still):
    """The comparison of tokens finds a moved layer without its KV."""
    path = tiny("qwen3")
    with Engine(config(path, [3, 3], wrap_hooks=zero_moved_layer)) as engine:
        mover = Mover(engine, [[5, 1]])
        assert serve(engine, mover) != still(path)
        mover.jobs[0].wait(1)


def test_three_stages_swap(tiny, still):
    path = tiny("qwen3")
    with Engine(config(path, [2, 2, 2])) as engine:
        mover = Mover(engine, [[4, 0, 2], [1, 1, 4], [2, 2, 2]])
        assert serve(engine, mover) == still(path)
        for job in mover.jobs:
            job.wait(1)


def test_capacity_shrinks_blocks_move_and_it_grows_again(tiny, still):
    """The union of layers does not fit beside all blocks: ids above the new capacity are moved."""
    path = tiny("qwen3")
    remaps = []
    with Engine(config(path, [3, 3], budget="1400KiB", max_blocks=100, max_batch=4)) as engine:
        engine.scheduler.on_remap(remaps.append)
        # Two long prompts take the low ids and end; what came after them goes on in higher ones.
        first = [Request((9,) * 200, 4, stop_at_eos=False) for _ in range(2)]
        mover = Mover(engine, [[5, 1], [3, 3]], first_step=76)
        high = serve(engine, mover, first + REQUESTS[:2])
        tokens = serve(engine, Mover(engine, []), REQUESTS)
        reports = [job.wait(1) for job in mover.jobs]
    assert high[2:] == still(path)[:2]
    assert tokens == still(path)
    assert sum(len(moves) for moves in remaps) == reports[0].blocks_moved > 0
    assert reports[0].capacity_during < reports[0].capacity_before == 100
    assert reports[1].capacity_after == 100


def test_an_idle_engine_moves_layers_too(tiny, still):
    path = tiny("qwen3")
    with Engine(config(path, [3, 3])) as engine:
        job = engine.reconfigure(Placement.from_counts([2, 4]), timeout=30)
        engine.run(until=lambda: job.phase.is_final)
        job.wait(1)
        assert engine.placement.counts == (2, 4)
        assert serve(engine) == still(path)


def test_refusal_leaves_the_old_placement_serving(tiny, still):
    path = tiny("qwen3")
    with Engine(config(path, [3, 3], budget="1400KiB", max_blocks=100)) as engine:
        with pytest.raises(InvalidArgumentError):
            engine.reconfigure(Placement.from_counts([3, 4])).wait(5)
        mover = Mover(engine, [[6, 0]])
        mover.options = MigrationOptions(max_rounds=1, max_stop_ms=1e-6)
        assert serve(engine, mover) == still(path)
        with pytest.raises(PipeliveError):
            mover.jobs[0].wait(1)
        assert engine.placement.counts == (3, 3)
        again = engine.reconfigure(Placement.from_counts([4, 2]), timeout=30)
        engine.run(until=lambda: again.phase.is_final)
        again.wait(1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stage_killed_in_a_move_is_named(tiny, rank):
    with Engine(config(tiny("qwen3"), [3, 3], step_timeout=10)) as engine:
        pids = engine.pids
        for request in REQUESTS:
            engine.submit(request)

        def on_step(record) -> None:
            if record.seq == 12:
                engine.reconfigure(
                    Placement.from_counts([5, 1]),
                    timeout=20,
                    on_phase=lambda phase: (
                        os.kill(pids[rank], signal.SIGKILL) if phase.value == "patching" else None
                    ),
                )

        with pytest.raises(EngineFailedError, match=f"stage {rank} died .*SIGKILL"):
            engine.run(on_step=on_step, until=lambda: False)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_moves_and_says_the_same():
    try:
        path = smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    text = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
    requests = [Request(text[i:], 14, stop_at_eos=False) for i in range(2)]
    shape = {"block_size": 16, "max_blocks": 32, "max_batch": 1, "page_bytes": 2 << 20}
    with Engine(config(path, [24, 6], reconfigurable=False, **shape)) as engine:
        expected = serve(engine, None, requests)
    with Engine(config(path, [24, 6], **shape)) as engine:
        mover = Mover(engine, [[21, 9], [24, 6]], first_step=4)
        assert serve(engine, mover, requests) == expected
        for job in mover.jobs:
            job.wait(1)
