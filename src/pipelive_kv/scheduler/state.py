"""What the scheduler keeps, and what it needs of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipelive_kv.errors import PipeliveError
from pipelive_kv.messages import Resized
from pipelive_kv.placement import Placement
from pipelive_kv.protocol import SCHEDULER, SchedulerState
from pipelive_kv.record import DecisionRecord
from pipelive_kv.scheduler.retired import RetiredSteps


class BlockOwner(Protocol):
    """What the scheduler needs of whoever owns the block ids; ``BlockAllocator`` is one."""

    @property
    def capacity(self) -> int:
        """Ids below this number may be handed out."""

    def live(self) -> list[int]:
        """The ids whose content matters, ascending, cached and unreferenced ones included."""

    def release(self, ids: list[int], after_seq: int | None = None) -> None:
        """Take ids back; they are handed out again once step ``after_seq`` has retired."""

    def retire(self, seq: int) -> None:
        """Steps up to ``seq`` have left every stage."""

    def raise_capacity(self, capacity: int) -> None:
        """Hand out ids below ``capacity``."""

    def plan_shrink(self, capacity: int) -> dict[int, int]:
        """The moves {old: new} that empty the ids from ``capacity`` on."""

    def apply_shrink(
        self, capacity: int, moves: dict[int, int], after_seq: int | None = None
    ) -> None:
        """Carry out what was planned; the old ids are free once step ``after_seq`` has retired.

        Or its upper part: down to a ``capacity`` above the planned one, with those of the planned
        moves that leave ids from there on.
        """

    def cancel_shrink(self) -> None:
        """Forget what was planned; without a plan nothing happens."""


@dataclass
class ShrinkRequest:
    """A shrink that waits for a step."""

    epoch: int
    capacity: int
    ends_at: float
    waits_for: int = -1
    """The last step whose end can still make room."""
    waits: int = 0
    moved: int = 0
    """Blocks that the steps so far have moved."""
    outcome: Resized | PipeliveError | None = None


@dataclass
class Switch:
    """A switchover whose step is proposed."""

    epoch: int
    placement: Placement
    step: int
    record: DecisionRecord
    ends_at: float


@dataclass
class State:
    """All that changes; guarded by the scheduler's lock."""

    protocol: SchedulerState = SCHEDULER.start
    next_seq: int = 0
    retired: RetiredSteps = field(default_factory=RetiredSteps)
    epoch: int = 0
    newest_epoch: int = 0
    aborted: int = -1
    resize: int = 0
    moves: tuple[tuple[int, int], ...] = ()
    shrink: ShrinkRequest | None = None
    shrunk_for: int = -1
    """The epoch that the capacity was lowered for, as long as it may have to be raised again."""
    capacity_before: int = -1
    raise_to: int = -1
    """The capacity from the next step on, where it is higher."""
    switch: Switch | None = None
    held_by: int | None = None
    held_until: float = 0.0
    hold_s: float = 0.0
    switch_hold_s: float = 0.0
    share: float = 1.0
    throttled_until: float = 0.0
    closed: bool = False
    remap: list[Callable[[Mapping[int, int]], None]] = field(default_factory=list)
    capacity: list[Callable[[int], None]] = field(default_factory=list)
    short: list[Callable[[int], None]] = field(default_factory=list)
    wake: list[Callable[[], None]] = field(default_factory=list)
    throttle: list[Callable[[float], None]] = field(default_factory=list)


def runs_of(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ids as (first, count) runs."""
    runs: list[tuple[int, int]] = []
    for block in ids:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return tuple(runs)
