"""What the model of the protocol knows of the world at one moment; see protocol_model.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipelive_kv.protocol import (
    JOB,
    SCHEDULER,
    STAGE,
    JobTable,
    Machine,
    Phase,
    SchedulerState,
    StageState,
)

EPOCH = 1
SOURCES = {0: (1,), 1: (), 2: (1,)}
"""For each stage, the stages that it gains layers from."""
TARGETS = {0: (), 1: (0, 2), 2: ()}
EMPTY = 2
"""The stage that holds nothing in the old placement."""
UNDECIDED = (
    Phase.ADMITTED,
    Phase.STAGING,
    Phase.PATCHING,
    Phase.WRITE_THROUGH,
    Phase.ARMED,
)


@dataclass(frozen=True)
class Tables:
    job: JobTable = JOB
    stage: Machine = STAGE
    scheduler: Machine = SCHEDULER


@dataclass(frozen=True)
class Faults:
    """How often each kind of fault may strike in one run."""

    losses: int = 0
    repeats: int = 0
    crashes: int = 0
    deaths: int = 0
    steps: int = 2
    """How many steps the engine runs, k and the ones around it among them."""


class Stage(NamedTuple):
    state: StageState = StageState.IDLE
    epoch: int = 0
    given_up: int = 0
    told: bool = False
    """Knows k: its source side sends the tail without waiting for later steps."""
    voted: bool = False
    ran: int = 0
    """Steps completed."""
    alive: bool = True


class Scheduler(NamedTuple):
    state: SchedulerState = SchedulerState.SERVING
    given_up: int = 0
    epoch: int = 0
    k: int = -1


class Coordinator(NamedTuple):
    phase: Phase = Phase.ADMITTED
    ask: int = 0
    """Which of the phase's asks is under way; beyond the last: all are answered."""
    waits: frozenset[int] = frozenset()
    """The stages that have not answered it; -1 stands for the scheduler."""
    recorded: str = ""
    k: int = -1


class Faulty(NamedTuple):
    losses: int
    repeats: int
    crashes: int
    deaths: int


class World(NamedTuple):
    coordinator: Coordinator
    stages: tuple[Stage, Stage, Stage]
    scheduler: Scheduler
    stamps: tuple[int, ...]
    """The epoch of every step that was stamped."""
    record: tuple[str, int]
    """Outcome and k; ("", -1) while there is none."""
    requests: frozenset[tuple[str, int]]
    """On their way: event and receiver."""
    zombie: int
    """k, where a stopped coordinator may still write a commit; -1 where there is none."""
    faults: Faulty


@dataclass
class Violation:
    rule: str
    trace: list[str]

    def __str__(self) -> str:
        return f"{self.rule}\n  " + "\n  ".join(self.trace)


class BrokenError(Exception):
    """A rule does not hold."""


def with_stage(world: World, index: int, **changes: object) -> World:
    stages = list(world.stages)
    stages[index] = stages[index]._replace(**changes)
    return world._replace(stages=tuple(stages))
