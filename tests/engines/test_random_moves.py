"""Twenty random reconfigurations of one engine under load: every token as if nothing had moved."""

from __future__ import annotations

import random

import pytest

from pipelive_kv.engines.reference import Engine, Request

from .test_live_moves import Mover, config, serve

LAYERS = 6
MOVES = 20
# They arrive one after the other, so that some prefill and some decode whenever layers move.
REQUESTS = [
    Request(
        tuple((11 * i + k * k) % 150 + 3 for k in range(12 + 7 * (i % 5))),
        90,
        arrival_step=40 * i,
        temperature=float(i % 2),
        seed=i,
        stop_at_eos=False,
    )
    for i in range(16)
]


def random_plan(stages: int, seed: int) -> list[list[int]]:
    source = random.Random(seed)
    plan: list[list[int]] = []
    while len(plan) < MOVES:
        cuts = sorted(source.randint(0, LAYERS) for _ in range(stages - 1))
        counts = [high - low for low, high in zip([0, *cuts], [*cuts, LAYERS], strict=True)]
        if not plan or counts != plan[-1]:
            plan.append(counts)
    return plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "first", "transport"),
    [
        ("qwen3", [3, 3], "shm"),
        ("qwen3", [2, 2, 2], "tcp"),
        ("mistral", [3, 3], "tcp"),
        ("mistral", [2, 2, 2], "shm"),
    ],
)
def test_tokens_are_the_same_over_random_moves(tiny, family, first, transport):
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    plan = random_plan(len(first), seed)
    path = tiny(family)
    with Engine(config(path, first, reconfigurable=False)) as engine:
        still = serve(engine, requests=REQUESTS)
    with Engine(config(path, first, transport=transport)) as engine:
        mover = Mover(engine, plan)
        tokens = serve(engine, mover, REQUESTS)
        for job, counts in zip(mover.jobs, plan, strict=True):
            assert list(job.wait(1).new.counts) == counts
    assert tokens == still
    under_load = {step.epoch for step in mover.steps if step.rows}
    assert len(under_load) > MOVES // 2
