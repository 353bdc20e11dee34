"""Which block ids are resident: raised and lowered in one order, that of the stamps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pipelive_kv.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    DeadlineError,
    OverBudgetError,
    PipeliveError,
)
from pipelive_kv.messages import Resized, Shrink
from pipelive_kv.scheduler.state import BlockOwner, ShrinkRequest, State

_log = logging.getLogger(__name__)

_WAITS = 3
"""How often a shrink waits for the steps under way to give back what is in quarantine."""


class Residency:
    """The capacity; every method is called with the scheduler's lock held.

    A change is wished for by the coordinator, in its threads, and takes effect in :meth:`apply`
    alone, between two steps. So whatever a step or a collect sees of block ids has one place in the
    order of the stamps, and an id is never handed out, moved or taken away beside it.

    A step waits for the blocks that move before it. So a shrink with more than ``moves_per_step``
    of them takes several steps, each of which lowers the capacity by as much as its moves allow.
    """

    def __init__(
        self,
        allocator: BlockOwner,
        state: State,
        lock: threading.Condition,
        *,
        moves_per_step: int,
    ) -> None:
        self._allocator = allocator
        self._state = state
        self._lock = lock
        self._moves_per_step = moves_per_step

    @property
    def capacity(self) -> int:
        """The capacity of the next step, unless it brings a shrink."""
        return max(self._allocator.capacity, self._state.raise_to)

    @property
    def wants_step(self) -> bool:
        """Whether a change waits for a step."""
        return self._state.shrink is not None or self.capacity > self._allocator.capacity

    def raise_to(self, capacity: int) -> None:
        """Have the next step raise the capacity; every stage has mapped the ids."""
        state = self._state
        state.raise_to = max(state.raise_to, capacity)
        if capacity >= state.capacity_before:
            state.shrunk_for = state.capacity_before = -1

    def shrink(self, request: Shrink, wake: Callable[[], None]) -> Resized:
        """Wait until steps have lowered the capacity.

        Where it raises, it may have been lowered in part.

        Raises:
            OverBudgetError: the live blocks do not fit, and the engine has not made room.
            DeadlineError: no step came, or none that could.
        """
        state = self._state
        if request.capacity >= self.capacity:
            return Resized(state.resize, self.capacity, 0)
        if state.shrink is not None:
            raise BusyError("Shrink: another shrink waits for a step")
        ends_at = time.monotonic() + request.timeout
        pending = ShrinkRequest(request.epoch, request.capacity, ends_at)
        state.shrink = pending
        wake()
        while pending.outcome is None and not state.closed:
            rest = pending.ends_at - time.monotonic()
            if rest <= 0:
                state.shrink = None
                raise DeadlineError(
                    f"the engine stamped no step, or too few, within {request.timeout:g} s, so "
                    f"the capacity could not shrink from {self.capacity} to {request.capacity} "
                    "blocks"
                )
            self._lock.wait(rest)
        if isinstance(pending.outcome, PipeliveError):
            raise pending.outcome
        if pending.outcome is None:
            raise ClosedError("Shrink: the scheduler was closed")
        return pending.outcome

    def forget(self, epoch: int) -> None:
        """The epoch is given up; a shrink for it that waits for a step does not come."""
        if self._state.shrink is not None and self._state.shrink.epoch == epoch:
            self._allocator.cancel_shrink()
            self._end(CancelledError(f"epoch {epoch} was given up"))

    # -- between two steps, in the engine's thread -------------------------------------------------

    def apply(self) -> None:
        """Carry out what was wished for, as far as it can be; the next stamp tells it."""
        self._raise()
        request = self._state.shrink
        while request is not None and self._state.shrink is request:
            try:
                self._try(request)
                return
            except BusyError as error:
                self._allocator.cancel_shrink()
                # A later step may find retired what is in quarantine now.
                if time.monotonic() >= request.ends_at:
                    self._end(error)
                return
            except OverBudgetError as error:
                self._allocator.cancel_shrink()
                if not self._make_room(request, error):
                    return
            except PipeliveError as error:
                self._allocator.cancel_shrink()
                self._end(error)

    def after_seq(self) -> int | None:
        """The last step that may still use ids freed now; None where no step is under way."""
        last = self._state.next_seq - 1
        return last if last > self._state.retired.through else None

    def _raise(self) -> None:
        state = self._state
        capacity, state.raise_to = state.raise_to, -1
        if capacity <= self._allocator.capacity:
            return
        try:
            self._allocator.raise_capacity(capacity)
        except PipeliveError:
            _log.exception("the capacity could not be raised to %d blocks", capacity)
            return
        for callback in state.capacity:
            callback(capacity)

    def _try(self, request: ShrinkRequest) -> None:
        state = self._state
        before = self._allocator.capacity
        capacity, moves = self._part_of(request.capacity)
        for refuse in state.capacity:
            refuse(capacity)
        self._allocator.apply_shrink(capacity, moves, self.after_seq())
        for remap in state.remap:
            if moves:
                remap(moves)
        if state.shrunk_for < 0:
            state.capacity_before = before
        state.shrunk_for = request.epoch
        state.resize += 1
        state.moves = tuple(sorted(moves.items()))
        request.moved += len(moves)
        if capacity == request.capacity:
            self._end(Resized(state.resize, capacity, request.moved))

    def _part_of(self, capacity: int) -> tuple[int, dict[int, int]]:
        """How far one step goes towards ``capacity``, and the moves {old: new} that it takes."""
        moves = self._allocator.plan_shrink(capacity)
        if len(moves) <= self._moves_per_step:
            return capacity, moves
        highest = sorted(moves)[-self._moves_per_step :]
        return highest[0], {old: moves[old] for old in highest}

    def _make_room(self, request: ShrinkRequest, error: PipeliveError) -> bool:
        """Whether to try again at once; otherwise a later step does, or the shrink is refused."""
        state = self._state
        live = len(self._allocator.live())
        if live > request.capacity:
            for callback in state.short:
                callback(live - request.capacity)
            if len(self._allocator.live()) < live:
                return True
        elif self._waits(request):
            return False
        self._end(error)
        return False

    def _waits(self, request: ShrinkRequest) -> bool:
        """Whether steps under way can still give back ids that the live ones could move to."""
        if time.monotonic() >= request.ends_at:
            return False
        if request.waits_for > self._state.retired.through:
            return True
        last = self.after_seq()
        if last is None or request.waits >= _WAITS:
            return False
        request.waits += 1
        request.waits_for = last
        return True

    def _end(self, outcome: Resized | PipeliveError) -> None:
        if self._state.shrink is not None:
            self._state.shrink.outcome = outcome
            self._state.shrink = None
