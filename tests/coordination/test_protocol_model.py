"""Every order, loss, repetition, crash and death that the model permits; see protocol_model.py."""

from dataclasses import replace

import pytest
from protocol_model import Explorer
from protocol_world import Faults, Tables

from pipelive_kv.protocol import (
    DISCARDED,
    HELD_TOO_LONG,
    JOB,
    SCHEDULER,
    STAGE,
    STAMP_K,
    Age,
    Edge,
    Phase,
    Rule,
    SchedulerState,
    StageState,
)

CASES = {
    "nothing fails": Faults(steps=4),
    "a request or its answer is lost": Faults(losses=1, steps=3),
    "two are lost": Faults(losses=2),
    "a request is delivered twice": Faults(repeats=1),
    "the coordinator dies": Faults(crashes=1, steps=3),
    "the coordinator dies, twice": Faults(crashes=2),
    "the empty stage dies": Faults(deaths=1, steps=3),
    "a loss and a crash": Faults(losses=1, crashes=1),
    "a repetition and a crash": Faults(repeats=1, crashes=1),
    "a death and a crash": Faults(deaths=1, crashes=1),
}


@pytest.mark.parametrize("faults", CASES.values(), ids=CASES.keys())
def test_the_rules_hold_whatever_happens(faults):
    states, violation = Explorer(Tables(), faults).explore()
    print(f"{states} states")
    assert violation is None, str(violation)
    assert states > 1000


def _without_record(*phases):
    """The job's table, where nothing is written to or read from the record in these phases."""
    edges = [replace(e, record=None) if e.source in phases else e for e in JOB.edges]
    asks = {
        phase: tuple(replace(ask, record=None) for ask in JOB.asks[phase])
        for phase in (*phases, *((Phase.SWITCHING, Phase.RELEASING) * (Phase.ARMED in phases)))
    }
    return JOB.changed(asks=asks, edges=edges)


def _without_ask(phase, event):
    return JOB.changed(asks={phase: tuple(a for a in JOB.asks[phase] if a.event != event)})


def _stage(*rules, age=Age.SESSION):
    """The stage's table with more rules, and without those that they take the place of."""
    extra = [Rule(state, event, age, then) for state, event, then in rules]
    keys = {(rule.state, rule.event, rule.age) for rule in extra}
    replaced = [r for r in STAGE.rules if (r.state, r.event, r.age) in keys]
    return STAGE.changed(without=replaced, extra=extra)


def _scheduler(state, event, then):
    return SCHEDULER.changed(extra=[Rule(state, event, Age.SESSION, then)])


def _without_running(*events):
    gone = [r for r in STAGE.rules if r.age is Age.RUNNING and r.event in events]
    assert len(gone) == len(events)
    return STAGE.changed(without=gone)


_S = StageState
_UNARMED = _stage(
    (_S.WRITING, "Commit", _S.COMMITTED),
    (_S.WRITING, STAMP_K, _S.SWITCHED),
)

BROKEN = {
    "the record is skipped": (
        Tables(job=_without_record(Phase.ARMED)),
        Faults(crashes=1),
        "the record|without the decision",
    ),
    "an abort does not ask the record": (
        Tables(job=_without_record(Phase.ABORTING)),
        Faults(crashes=1),
        "given up what is committed|the record commit|in state idle",
    ),
    "no vote": (
        Tables(job=_without_ask(Phase.ARMED, "Arm")),
        Faults(),
        "of the new epoch in state writing",
    ),
    "no vote, and none is missed": (
        Tables(job=_without_ask(Phase.ARMED, "Arm"), stage=_UNARMED),
        Faults(),
        "activates un-armed",
    ),
    "an abort after the decision": (
        Tables(
            job=replace(
                _without_record(Phase.ABORTING),
                edges=(
                    *_without_record(Phase.ABORTING).edges,
                    Edge(Phase.SWITCHING, Phase.ABORTING),
                ),
            ),
            stage=_stage((_S.COMMITTED, "Abort", _S.ABORTING)),
            scheduler=_scheduler(SchedulerState.COMMITTED, "Settle(abort)", SchedulerState.SERVING),
        ),
        Faults(),
        "given up what is committed|in state idle|the record commit",
    ),
    "an abort fences nothing": (
        Tables(stage=_stage((_S.IDLE, "Prepare", _S.PREPARED), age=Age.OLD)),
        Faults(crashes=1),
        "is prepared after the abort",
    ),
    "k is stamped without word": (
        Tables(
            scheduler=_scheduler(SchedulerState.PROPOSED, STAMP_K, SchedulerState.SERVING),
        ),
        Faults(),
        "without the decision|the record",
    ),
    "the scheduler gives up by the clock": (
        Tables(
            scheduler=_scheduler(SchedulerState.PROPOSED, HELD_TOO_LONG, SchedulerState.SERVING),
        ),
        Faults(),
        "the record commit|given up what is committed",
    ),
    "an armed stage gives up by itself": (
        Tables(stage=_stage((_S.ARMED, DISCARDED, _S.IDLE))),
        Faults(),
        "given up what is committed|in state idle",
    ),
    "release cannot be said again": (
        Tables(stage=_without_running("Release")),
        Faults(losses=1),
        "no end can be reached",
    ),
    "a new coordinator cannot repeat what is done": (
        Tables(stage=_without_running("Commit")),
        Faults(crashes=1),
        "no end can be reached",
    ),
    "sources are not told k": (
        Tables(job=_without_ask(Phase.SWITCHING, "Commit")),
        Faults(),
        "no end can be reached",
    ),
    "the scheduler is not told": (
        Tables(job=_without_ask(Phase.ABORTING, "Settle(abort)")),
        Faults(),
        "the scheduler still waits after the abort",
    ),
    "a stage is not told of the abort": (
        Tables(job=_without_ask(Phase.ABORTING, "Abort")),
        Faults(),
        "after the abort",
    ),
}


@pytest.mark.parametrize(("tables", "faults", "found"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_table_is_found_out(tables, faults, found):
    _, violation = Explorer(tables, faults).explore()
    assert violation is not None
    print(violation)
    assert any(rule in violation.rule for rule in found.split("|")), str(violation)
