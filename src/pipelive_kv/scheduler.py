"""The engine scheduler's part: numbers steps, stamps placements, owns residency and remaps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pipelive_kv.control import ControlClient, ControlEndpoint
from pipelive_kv.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    DeadlineError,
    InvalidArgumentError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.messages import (
    Answer,
    DescribeScheduler,
    Done,
    Held,
    Hold,
    ListLive,
    LiveBlocks,
    Propose,
    Proposed,
    RaiseCapacity,
    Request,
    Resized,
    SchedulerInfo,
    Settle,
    Shrink,
    Stamp,
)
from pipelive_kv.placement import Placement
from pipelive_kv.protocol import (
    HELD_TOO_LONG,
    RECORD_ABORT,
    RECORD_COMMIT,
    SCHEDULER,
    STAMP_K,
    SchedulerState,
    age_of,
    event_of,
)
from pipelive_kv.record import Decision, DecisionRecord, FileDecisionRecord

_log = logging.getLogger(__name__)

_LOOK_EVERY = 0.02
"""Seconds between two looks into the record while the switchover waits for word of its outcome."""


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
        """Carry out what was planned; the old ids are free once step ``after_seq`` has retired."""

    def cancel_shrink(self) -> None:
        """Forget what was planned; without a plan nothing happens."""


@dataclass
class _ShrinkRequest:
    epoch: int
    capacity: int
    ends_at: float
    outcome: Resized | PipeliveError | None = None


@dataclass
class _Switch:
    epoch: int
    placement: Placement
    step: int
    record: DecisionRecord
    ends_at: float


@dataclass
class _State:
    """All that changes; guarded by the scheduler's lock."""

    protocol: SchedulerState = SCHEDULER.start
    next_seq: int = 0
    retired: int = -1
    epoch: int = 0
    newest_epoch: int = 0
    aborted: int = -1
    resize: int = 0
    moves: tuple[tuple[int, int], ...] = ()
    shrink: _ShrinkRequest | None = None
    shrunk_for: int = -1
    """The epoch that the capacity was lowered for, as long as it may have to be raised again."""
    capacity_before: int = -1
    switch: _Switch | None = None
    held_by: int | None = None
    held_until: float = 0.0
    hold_s: float = 0.0
    closed: bool = False
    remap: list[Callable[[Mapping[int, int]], None]] = field(default_factory=list)
    capacity: list[Callable[[int], None]] = field(default_factory=list)


class Scheduler:
    """Held by the engine's scheduler. The engine calls, in its own thread and in this order:

    1. :meth:`stamp` before it builds a step (a remap may change its block tables here);
    2. sends the stamp along with the step's message to every stage;
    3. :meth:`retired` when the step's results are back, :meth:`freed` when a request has ended.

    When it has nothing to run but :attr:`wants_step` is true, it runs a step without tokens, so
    that a reconfiguration also completes while the engine is idle.

    Args:
        placement: the placement of the first step.
        allocator: the owner of the block ids.
        control: where the coordinator listens; None for an engine that never reconfigures.
        reads_retired: promise that a step touches only what retired steps have written: no step
            is stamped while one that it follows on from is under way. A layer that has just moved
            then waits for the writes of retired steps alone, not for steps of other micro-batches
            that are still on their way through the pipeline.
        record: the decision record, where it is not the coordinator's directory of files.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        allocator: BlockOwner,
        control: ControlEndpoint | None = None,
        reads_retired: bool = False,
        record: DecisionRecord | None = None,
    ) -> None:
        self._record = record
        self._reads_retired = reads_retired
        self._allocator = allocator
        self._placement = placement
        self._lock = threading.Condition()
        self._state = _State()
        self._client = (
            ControlClient(control, "scheduler", self._handle, self._on_lost)
            if control is not None
            else None
        )

    # -- the engine's side -------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The placement of the step that was stamped last."""
        return self._placement

    @property
    def epoch(self) -> int:
        """The epoch of the step that was stamped last."""
        return self._state.epoch

    @property
    def next_seq(self) -> int:
        """The number of the next step."""
        return self._state.next_seq

    @property
    def wants_step(self) -> bool:
        """Whether a step without tokens would bring a reconfiguration forward."""
        with self._lock:
            state = self._state
            return state.shrink is not None or state.switch is not None

    @property
    def hold_seconds(self) -> float:
        """How long :meth:`stamp` has waited for decisions and holds, in total."""
        return self._state.hold_s

    def on_remap(self, callback: Callable[[Mapping[int, int]], None]) -> None:
        """Have ``callback({old: new})`` called inside :meth:`stamp` where block ids change."""
        self._state.remap.append(callback)

    def on_capacity(self, callback: Callable[[int], None]) -> None:
        """Have ``callback(capacity)`` called before a new capacity takes effect.

        It runs inside :meth:`stamp` for a lower capacity, and may refuse that by raising a
        PipeliveError; for a higher one it runs in a thread of the control plane and must not raise.
        """
        self._state.capacity.append(callback)

    def stamp(self) -> Stamp:
        """The next step's stamp.

        Waits where the step is the switchover and its decision is not known yet, or where a
        stop-and-copy reconfiguration holds the engine; both waits have a deadline.

        Raises:
            ClosedError: the scheduler was closed.
            CorruptError: the decision record cannot be read.
        """
        with self._lock:
            state = self._state
            if state.closed:
                raise ClosedError("Scheduler.stamp: the scheduler is closed")
            self._wait_while_held()
            self._try_shrink()
            self._pass_switchover()
            stamp = Stamp(
                seq=state.next_seq,
                epoch=state.epoch,
                aborted=state.aborted,
                resize=state.resize,
                capacity=self._allocator.capacity,
                moves=state.moves,
                # Not only what a step reads: a block that it is the first to use again may be in
                # a patch of the step that used it last, which has retired too.
                needs=state.retired if self._reads_retired else None,
            )
            state.next_seq += 1
            state.moves = ()
            self._lock.notify_all()
            return stamp

    def retired(self, seq: int) -> None:
        """Tell that every stage has finished the steps up to ``seq``."""
        with self._lock:
            state = self._state
            if not 0 <= seq < state.next_seq:
                raise InvalidArgumentError(
                    f"retired(seq={seq}): expected the number of a stamped step, 0 to "
                    f"{state.next_seq - 1}"
                )
            if seq > state.retired:
                state.retired = seq
                self._allocator.retire(seq)
                self._lock.notify_all()

    def freed(self, ids: Iterable[int]) -> None:
        """Give block ids back; they are reused once the steps stamped so far have retired."""
        with self._lock:
            self._allocator.release(list(ids), self._after_seq())

    def close(self) -> None:
        """Leave the control plane. May be called twice."""
        with self._lock:
            self._state.closed = True
            self._lock.notify_all()
        if self._client is not None:
            self._client.close()

    # -- inside stamp(), with the lock held --------------------------------------------------------

    def _take(self, event: str, epoch: int | None = None) -> None:
        """Move on as the protocol's table says; raises ProtocolError where it must not."""
        state = self._state
        session = state.switch.epoch if state.switch is not None else state.held_by
        age = age_of(epoch, session=session, running=state.epoch, given_up=state.aborted)
        state.protocol = SCHEDULER.next(state.protocol, event, age)

    def _wait_while_held(self) -> None:
        state = self._state
        start = time.monotonic()
        while state.held_by is not None and not state.closed:
            rest = state.held_until - time.monotonic()
            if rest <= 0 or self._is_alone():
                _log.error("epoch %d held the engine for too long; going on", state.held_by)
                if state.protocol is SchedulerState.HELD:
                    self._take(HELD_TOO_LONG, state.held_by)
                state.held_by = None
                break
            self._lock.wait(rest)
        state.hold_s += time.monotonic() - start

    def _is_alone(self) -> bool:
        """Whether the coordinator has gone, so that nobody will say what was decided."""
        return self._client is not None and not self._client.connected

    def _on_lost(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _after_seq(self) -> int | None:
        """The last step that may still use ids freed now; None where no step is under way."""
        last = self._state.next_seq - 1
        return last if last > self._state.retired else None

    def _try_shrink(self) -> None:
        state, request = self._state, self._state.shrink
        if request is None:
            return
        before = self._allocator.capacity
        try:
            for refuse in state.capacity:
                refuse(request.capacity)
            moves = self._allocator.plan_shrink(request.capacity)
            self._allocator.apply_shrink(request.capacity, moves, self._after_seq())
        except PipeliveError as error:
            self._allocator.cancel_shrink()
            # Freed ids may still be in quarantine; the next step may find them retired.
            if not isinstance(error, BusyError) or time.monotonic() >= request.ends_at:
                self._end_shrink(error)
            return
        for remap in state.remap:
            if moves:
                remap(moves)
        if state.shrunk_for < 0:
            state.capacity_before = before
        state.shrunk_for = request.epoch
        state.resize += 1
        state.moves = tuple(sorted(moves.items()))
        self._end_shrink(Resized(state.resize, request.capacity, len(moves)))

    def _end_shrink(self, outcome: Resized | PipeliveError) -> None:
        if self._state.shrink is not None:
            self._state.shrink.outcome = outcome
            self._state.shrink = None

    def _pass_switchover(self) -> None:
        state = self._state
        if state.switch is None or state.next_seq < state.switch.step:
            return
        start = time.monotonic()
        while state.switch is not None and state.protocol is SchedulerState.PROPOSED:
            rest = state.switch.ends_at - time.monotonic()
            if rest <= 0 or self._is_alone() or state.closed:
                self._ask_record(state.switch)
            elif not self._lock.wait(min(rest, _LOOK_EVERY)):
                self._look_up(state.switch)
        state.hold_s += time.monotonic() - start
        switch = state.switch
        if switch is not None:
            self._take(STAMP_K, switch.epoch)
            state.epoch = switch.epoch
            state.shrunk_for = state.capacity_before = -1
            self._placement = switch.placement
            state.switch = None

    def _look_up(self, switch: _Switch) -> None:
        """Word may be late, or lost: what is recorded holds all the same."""
        found = switch.record.read(switch.epoch)
        if found is not None:
            self._obey(found)

    def _ask_record(self, switch: _Switch) -> None:
        """Nobody told the outcome in time: whoever writes the record first has decided."""
        decision = switch.record.decide(
            Decision(switch.epoch, "abort", reason="the scheduler reached the step without word")
        )
        self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        if decision.outcome == "commit":
            self._take(RECORD_COMMIT, decision.epoch)
        else:
            self._take(RECORD_ABORT, decision.epoch)
            self._forget(decision.epoch)

    # -- the coordinator's side --------------------------------------------------------------------

    def _handle(self, request: Request) -> Answer:
        if isinstance(request, DescribeScheduler):
            return self._describe()
        if isinstance(request, Shrink):
            return self._shrink(request)
        if isinstance(request, RaiseCapacity):
            return self._raise_capacity(request.capacity)
        if isinstance(request, ListLive):
            return self._list_live()
        if isinstance(request, Hold):
            return self._hold(request)
        if isinstance(request, Propose):
            return self._propose(request)
        if isinstance(request, Settle):
            return self._settle(request)
        raise ProtocolError(f"the scheduler does not answer {type(request).__name__}")

    def _describe(self) -> SchedulerInfo:
        with self._lock:
            state = self._state
            return SchedulerInfo(
                epoch=state.epoch,
                newest_epoch=state.newest_epoch,
                stages=self._placement.stages,
                next_seq=state.next_seq,
                capacity=self._allocator.capacity,
                live=len(self._allocator.live()),
                state=state.protocol.value,
                resize=state.resize,
                pending=self._pending(),
                capacity_before=state.capacity_before,
            )

    def _pending(self) -> int:
        state = self._state
        if state.switch is not None:
            return state.switch.epoch
        if state.held_by is not None:
            return state.held_by
        return state.shrink.epoch if state.shrink is not None else state.shrunk_for

    def _shrink(self, request: Shrink) -> Resized:
        with self._lock:
            state = self._state
            self._take("Shrink", request.epoch)
            if request.capacity >= self._allocator.capacity:
                return Resized(state.resize, self._allocator.capacity, 0)
            if state.shrink is not None:
                raise BusyError("Shrink: another shrink waits for a step")
            ends_at = time.monotonic() + request.timeout
            pending = _ShrinkRequest(request.epoch, request.capacity, ends_at)
            state.shrink = pending
            while pending.outcome is None and not state.closed:
                rest = pending.ends_at - time.monotonic()
                if rest <= 0:
                    state.shrink = None
                    raise DeadlineError(
                        f"the engine stamped no step within {request.timeout:g} s, so the capacity "
                        f"could not shrink to {request.capacity} blocks"
                    )
                self._lock.wait(rest)
            if isinstance(pending.outcome, PipeliveError):
                raise pending.outcome
            if pending.outcome is None:
                raise ClosedError("Shrink: the scheduler was closed")
            return pending.outcome

    def _raise_capacity(self, capacity: int) -> Done:
        with self._lock:
            self._take("RaiseCapacity")
            if capacity > self._allocator.capacity:
                self._allocator.raise_capacity(capacity)
                for callback in self._state.capacity:
                    callback(capacity)
            if capacity >= self._state.capacity_before:
                self._state.shrunk_for = self._state.capacity_before = -1
        return Done()

    def _list_live(self) -> LiveBlocks:
        with self._lock:
            return LiveBlocks(runs_of(self._allocator.live()), self._state.next_seq)

    def _hold(self, request: Hold) -> Held:
        with self._lock:
            state = self._state
            self._take("Hold", request.epoch)
            # Whether the last step has ended the stages are asked: the engine's thread, which would
            # tell that it retired, may already wait in stamp().
            state.held_by = request.epoch
            state.held_until = time.monotonic() + request.timeout
            return Held(state.next_seq - 1)

    def _propose(self, request: Propose) -> Proposed:
        placement = Placement(request.stages)
        with self._lock:
            state = self._state
            margin = 0 if state.held_by is not None else request.margin
            self._take("Propose", request.epoch)
            if state.switch is None:
                state.newest_epoch = request.epoch
                state.switch = _Switch(
                    epoch=request.epoch,
                    placement=placement,
                    step=state.next_seq + margin,
                    record=self._record or FileDecisionRecord(request.record),
                    ends_at=time.monotonic() + request.timeout,
                )
            return Proposed(state.switch.step)

    def _settle(self, request: Settle) -> Done:
        with self._lock:
            self._take(event_of(request), request.epoch)
            if request.commit:
                self._release_hold(request.epoch)
            else:
                self._forget(request.epoch)
            self._lock.notify_all()
        return Done()

    def _release_hold(self, epoch: int) -> None:
        if self._state.held_by == epoch:
            self._state.held_by = None

    def _forget(self, epoch: int) -> None:
        """The epoch is given up: nothing of it stays, and nothing of it is taken any more."""
        state = self._state
        self._release_hold(epoch)
        if state.switch is not None and state.switch.epoch == epoch:
            state.switch = None
        if state.shrink is not None and state.shrink.epoch == epoch:
            self._allocator.cancel_shrink()
            self._end_shrink(CancelledError(f"epoch {epoch} was given up"))
        state.aborted = max(state.aborted, epoch)
        state.newest_epoch = max(state.newest_epoch, epoch)


def runs_of(ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ids as (first, count) runs."""
    runs: list[tuple[int, int]] = []
    for block in ids:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return tuple(runs)
