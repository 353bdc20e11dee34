"""Runs that never happened: what the demo's report, trace and picture are tested with."""

from __future__ import annotations

import random

from pipelive_kv.coordinator import Phase, PhaseSpan, Report
from pipelive_kv.demo.baselines import Baselines
from pipelive_kv.demo.recorder import Recorder, Sample, Switchover
from pipelive_kv.demo.report import RestartReport
from pipelive_kv.demo.scenario import Arrival, Outcome
from pipelive_kv.engines.reference import StageTimes, StepRecord
from pipelive_kv.messages import Progress, RoundRecord, Switched
from pipelive_kv.placement import Placement

OLD, NEW = Placement.from_counts([20, 10]), Placement.from_counts([10, 20])
START = 1000.0
STEP = 0.05
REQUESTS = 6
PHASES = (
    (Phase.PLANNED, 0.01), (Phase.ADMITTED, 0.03), (Phase.STAGING, 1.1), (Phase.PATCHING, 0.3),
    (Phase.ARMED, 0.02), (Phase.SWITCHING, 0.12), (Phase.RELEASING, 0.05),
)  # fmt: skip


def ns(seconds: float) -> int:
    return int(seconds * 1e9)


def report(
    epoch: int, old: Placement, new: Placement, start: float, step: int, at: float
) -> Report:
    moves = tuple(old.moves_to(new))
    found = Report(epoch, old, new, moves, step=step, capacity_before=200, capacity_during=180,
                   capacity_after=200)  # fmt: skip
    for phase, seconds in PHASES:
        scale = 1.0 if moves else 0.1
        found.phases.append(PhaseSpan(phase, ns(start), ns(start + seconds * scale)))
        start += seconds * scale
    rounds = tuple(
        RoundRecord(number=n, through_seq=step - 20 + n, slots=2400 if n == 0 else 14 - n // 2,
                    bytes=(2400 if n == 0 else 14 - n // 2) * 15360, records=10,
                    start_ns=ns(at - 1.2 + 0.1 * n), end_ns=ns(at - 1.2 + 0.1 * n + 0.04),
                    busy_s=0.03, lag_steps=max(0, 8 - n))
        for n in range(11)
    )  # fmt: skip
    found.stages = tuple(
        Switched(rank=rank, step=step, last_old_end_ns=ns(at + 0.02 * rank - 0.002),
                 first_new_start_ns=ns(at + 0.02 * rank), activate_s=0.0002,
                 gate_s=0.0015 if rank == 1 and moves else 0.0, predicted_stop_ms=4.0,
                 rounds=rounds if rank == 0 and moves else (),
                 transport="shm" if rank == 0 and moves else "", verified_slots=0)
        for rank in range(2)
    )  # fmt: skip
    return found


def recorder(switches: list[tuple[str, str, Placement, Placement, int]], steps: int = 400,
             hold: float = 0.0) -> Recorder:  # fmt: skip
    """`switches`: name, mode, old, new, step."""
    made = Recorder(started=START)
    draw = random.Random(0)
    now = START
    epochs = {step: epoch for epoch, (*_, step) in enumerate(switches, 1)}
    epoch, placement = 0, OLD
    free = [now, now]
    done = [now, now]
    for seq in range(steps):
        if seq in epochs:
            epoch = epochs[seq]
            name, mode, old, new, _ = switches[epoch - 1]
            if mode == "stop_and_copy":
                free = [max(free) + hold] * 2
            start = max(free[0], now) - (1.65 if mode == "live" else 0.1)
            found = report(epoch, old, new, start, seq, free[0])
            made.switchovers.append(Switchover(name, mode, found, REQUESTS))
            placement = new
        kind = "prefill" if seq < 40 else "decode"
        stages = []
        ready = free[0]
        for rank in range(2):
            seconds = STEP * (0.3 + placement.counts[rank] / 20) * draw.uniform(0.9, 1.1)
            begin = max(free[rank], ready, done[seq % 2])
            stages.append(StageTimes(rank, begin, begin, begin + seconds, 0.0,
                                     placement.counts[rank]))  # fmt: skip
            free[rank] = ready = begin + seconds
        done[seq % 2] = ready
        if kind == "decode":
            for request in range(seq % 2, REQUESTS, 2):
                made.on_token(request, 100 + seq, ready)
        made.on_step(StepRecord(seq, epoch, kind, stages[0].begin, ready, 3, tuple(stages)))
        if seq % 3 == 0:
            moving = any(0 <= step - seq < 20 for *_, step in switches)
            made.samples.append(Sample(ready, tuple(
                Progress(rank=rank, epoch=epoch, seq=seq, rounds=0, bytes_sent=0,
                         lag_steps=draw.randrange(6) if moving else 0,
                         used_bytes=(20 if moving else placement.counts[rank]) * 24 << 20,
                         held_bytes=500 << 20, peak_bytes=480 << 20, capacity=200)
                for rank in range(2)
            )))  # fmt: skip
    made.ended = max(free)
    return made


def moved() -> Outcome:
    switches = [
        ("no-op 1", "no-op", OLD, OLD, 90),
        ("move 1", "live", OLD, NEW, 150),
        ("no-op 2", "no-op", NEW, NEW, 200),
        ("move 2", "live", NEW, OLD, 270),
        ("no-op 3", "no-op", OLD, OLD, 320),
    ]
    return Outcome(recorder(switches), (101, 102), [Arrival(5, 130, "move 1", "staging")])


def baselines() -> Baselines:
    held = recorder([("stop-and-copy", "stop_and_copy", OLD, NEW, 120)], steps=150, hold=0.4)
    return Baselines(held, RestartReport((10, 20), (20, 10), 9000.0, 6000.0, 5, 2000))


def unmoved() -> Outcome:
    return Outcome(recorder([]), (103, 104))
