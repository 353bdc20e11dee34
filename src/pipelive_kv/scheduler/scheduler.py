"""The engine scheduler's part: numbers steps, stamps placements, owns residency and remaps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from pipelive_kv.control import ControlClient, ControlEndpoint
from pipelive_kv.errors import (
    ClosedError,
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
    Throttle,
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
from pipelive_kv.scheduler.in_flight import WritesInFlight
from pipelive_kv.scheduler.residency import Residency
from pipelive_kv.scheduler.state import BlockOwner, State, Switch, runs_of

_log = logging.getLogger(__name__)

_LOOK_EVERY = 0.02
"""Seconds between two looks into the record while the switchover waits for word of its outcome."""


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
        defers_hazards: promise that the engine asks :meth:`is_hazard` of the steps whose writes a
            request depends on, and leaves the request out of a step where the answer is true. For
            engines whose steps may follow on from steps under way; the layer waits no longer then
            than under ``reads_retired``.
        record: the decision record, where it is not the coordinator's directory of files.
        moves_per_step: how many blocks may move before one step, which waits for them; a shrink
            with more takes several steps.

    Raises:
        InvalidArgumentError: ``moves_per_step`` is below 1.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        allocator: BlockOwner,
        control: ControlEndpoint | None = None,
        reads_retired: bool = False,
        defers_hazards: bool = False,
        record: DecisionRecord | None = None,
        moves_per_step: int = 64,
    ) -> None:
        if moves_per_step < 1:
            raise InvalidArgumentError(f"moves_per_step is {moves_per_step}, expected 1 or more")
        self._record = record
        self._names_needs = reads_retired or defers_hazards
        self._allocator = allocator
        self._placement = placement
        self._lock = threading.Condition()
        self._state = State()
        self._writes = WritesInFlight()
        self._residency = Residency(
            allocator, self._state, self._lock, moves_per_step=moves_per_step
        )
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
            return self._residency.wants_step or self._state.switch is not None

    @property
    def hold_seconds(self) -> float:
        """How long :meth:`stamp` has waited for decisions and holds, in total."""
        return self._state.hold_s

    def on_remap(self, callback: Callable[[Mapping[int, int]], None]) -> None:
        """Have ``callback({old: new})`` called inside :meth:`stamp` where block ids change."""
        self._state.remap.append(callback)

    def on_capacity(self, callback: Callable[[int], None]) -> None:
        """Have ``callback(capacity)`` called inside :meth:`stamp` where a new one takes effect.

        A lower capacity it may refuse by raising a PipeliveError, before anything has changed; a
        higher one it may not.
        """
        self._state.capacity.append(callback)

    def on_short(self, callback: Callable[[int], None]) -> None:
        """Have ``callback(lacking)`` called where that many live blocks stand against a shrink.

        It runs inside :meth:`stamp`. The engine may preempt or swap out requests and give their
        blocks back with :meth:`freed`; it is asked again while that makes them fewer, and the
        shrink is refused where it does not. Until the shrink is made, :attr:`wanted_capacity` says
        what the engine had better not exceed again.
        """
        self._state.short.append(callback)

    @property
    def wanted_capacity(self) -> int | None:
        """The capacity that a shrink under way is to reach; None without one."""
        request = self._state.shrink
        return request.capacity if request is not None else None

    def on_wants_step(self, callback: Callable[[], None]) -> None:
        """Have ``callback()`` called when :attr:`wants_step` becomes true: wake an idle engine.

        It runs in a thread of the control plane and must neither wait nor raise.
        """
        self._state.wake.append(callback)

    def on_throttle(self, callback: Callable[[float], None]) -> None:
        """Have ``callback(share)`` called where the engine is asked to write less, or as before.

        It runs in :meth:`stamp` or in a thread of the control plane; see :attr:`throttle`.
        """
        self._state.throttle.append(callback)

    @property
    def throttle(self) -> float:
        """The share, above 0, of its tokens per step that the engine is asked to keep to.

        Below 1 while a reconfiguration does not converge since steps write as fast as their writes
        can be sent, 1 as soon as it is over in whatever way. An engine that keeps to it, for
        instance by shorter chunks of prefill, lets the reconfiguration come to its end; one that
        does not need not.
        """
        return self._state.share

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
            if state.share < 1 and (time.monotonic() > state.throttled_until or self._is_alone()):
                self._set_share(1.0)
            state.retired.builder = threading.get_ident()
            self._wait_while_held()
            self._settle_retired()
            self._residency.apply()
            self._pass_switchover()
            self._settle_retired()
            stamp = Stamp(
                seq=state.next_seq,
                epoch=state.epoch,
                aborted=state.aborted,
                resize=state.resize,
                capacity=self._allocator.capacity,
                moves=state.moves,
                # Not only what a step reads: a block that it is the first to use again may be in
                # a patch of the step that used it last, which has retired too.
                needs=state.retired.through if self._names_needs else None,
            )
            state.next_seq += 1
            state.moves = ()
            self._lock.notify_all()
            return stamp

    def narrow(self, stamp: Stamp, *, touches: Iterable[int], writes: Iterable[int]) -> Stamp:
        """The stamp of a step of which the engine tells, once it is built, what it touches.

        For engines that promise nothing of what their steps follow on from. A layer that has just
        moved then waits for retired steps, and for those under way that write a block which this
        one touches; without it, for every step before. A step of which this is not told counts as
        one that writes every block, so it may be left out while nothing is being reconfigured.

        Args:
            stamp: what :meth:`stamp` returned last.
            touches: the ids of all blocks that hold KV of the step's requests.
            writes: those among them that the step writes.

        Raises:
            InvalidArgumentError: the stamp is not the last one.
        """
        with self._lock:
            if stamp.seq != self._state.next_seq - 1:
                raise InvalidArgumentError(
                    f"narrow: stamp is of step {stamp.seq}, expected the last one stamped, "
                    f"{self._state.next_seq - 1}"
                )
            if stamp.moves:  # blocks change their names with this step
                self._writes.forget()
                return stamp
            written = frozenset(writes)
            needs = self._writes.last_met(
                stamp.seq, self._state.retired.through, written.union(touches)
            )
            self._writes.note(stamp.seq, written)
        return msgspec.structs.replace(stamp, needs=needs)

    def retired(self, seq: int) -> None:
        """Tell that every stage has finished the steps up to ``seq``.

        From the thread that stamps, it counts at once; from another one, for the next stamp.
        """
        with self._lock:
            state = self._state
            if not 0 <= seq < state.next_seq:
                raise InvalidArgumentError(
                    f"retired(seq={seq}): expected the number of a stamped step, 0 to "
                    f"{state.next_seq - 1}"
                )
            if state.retired.tell(seq):
                self._allocator.retire(state.retired.through)
                self._lock.notify_all()

    def is_hazard(self, seq: int) -> bool:
        """Whether what depends on step ``seq`` must not run in the step that was just stamped.

        Ask it while a step is built, after :meth:`stamp`, with the last step that writes KV which a
        request of the new step would read: the chunk of its prompt before this one, or the step
        that computes blocks which it shares. It is true around a switchover alone, where that step
        is still under way in the old placement: its KV may come to the new one after the request.
        The wait ends when the steps that were under way at the switchover have retired.

        Args:
            seq: a stamped step, or -1 for none.
        """
        return self._state.retired.is_hazard(seq)

    def freed(self, ids: Iterable[int]) -> None:
        """Give block ids back; they are reused once the steps stamped so far have retired."""
        with self._lock:
            self._allocator.release(list(ids), self._residency.after_seq())

    def close(self) -> None:
        """Leave the control plane. May be called twice."""
        with self._lock:
            self._state.closed = True
            self._set_share(1.0)
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

    def _set_share(self, share: float) -> None:
        if share != self._state.share:
            self._state.share = share
            for callback in self._state.throttle:
                callback(share)

    def _is_alone(self) -> bool:
        """Whether the coordinator has gone, so that nobody will say what was decided."""
        return self._client is not None and not self._client.connected

    def _on_lost(self) -> None:
        with self._lock:
            self._set_share(1.0)
            self._lock.notify_all()

    def _settle_retired(self) -> None:
        if self._state.retired.settle():
            self._allocator.retire(self._state.retired.through)

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
                self._look_up()
        state.hold_s += time.monotonic() - start
        state.switch_hold_s = time.monotonic() - start
        switch = state.switch
        if switch is not None:
            self._take(STAMP_K, switch.epoch)
            state.epoch = switch.epoch
            state.retired.first_step = switch.step
            state.shrunk_for = state.capacity_before = -1
            self._placement = switch.placement
            state.switch = None

    def _look_up(self) -> None:
        """Word may be late, or lost: what is recorded holds all the same."""
        switch = self._state.switch
        if switch is None or self._state.protocol is not SchedulerState.PROPOSED:
            return  # word came at the very moment that the wait for it ended
        found = switch.record.read(switch.epoch)
        if found is not None:
            self._obey(found)

    def _ask_record(self, switch: Switch) -> None:
        """Nobody told the outcome in time: whoever writes the record first has decided."""
        abort = Decision(
            switch.epoch, "abort", reason="the scheduler reached the step without word"
        )
        try:
            decision = switch.record.decide(abort)
        except OSError as error:
            raise PipeliveError(
                f"whether step {switch.step} begins epoch {switch.epoch} was not told, and the "
                f"record cannot be used: {error}"
            ) from error
        self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        self._set_share(1.0)
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
        if isinstance(request, Throttle):
            return self._throttle(request)
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
                capacity=self._residency.capacity,
                live=len(self._allocator.live()),
                state=state.protocol.value,
                resize=state.resize,
                pending=self._pending(),
                capacity_before=state.capacity_before,
                switch_hold_s=state.switch_hold_s,
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
            self._take("Shrink", request.epoch)
            return self._residency.shrink(request, self._wake)

    def _raise_capacity(self, capacity: int) -> Done:
        with self._lock:
            self._take("RaiseCapacity")
            self._residency.raise_to(capacity)
            self._wake()
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

    def _throttle(self, request: Throttle) -> Done:
        if not 0 < request.share <= 1:
            raise InvalidArgumentError(f"share is {request.share}, expected above 0, up to 1")
        with self._lock:
            self._take("Throttle", request.epoch)
            self._state.throttled_until = time.monotonic() + request.timeout
            self._set_share(request.share)
        return Done()

    def _propose(self, request: Propose) -> Proposed:
        placement = Placement(request.stages)
        if self._record is None and not request.record:
            raise InvalidArgumentError(
                "record is not given, expected the one in which the coordinator records decisions"
            )
        record = self._record or FileDecisionRecord(request.record)
        with self._lock:
            state = self._state
            margin = 0 if state.held_by is not None else request.margin
            self._take("Propose", request.epoch)
            if state.switch is None:
                state.newest_epoch = request.epoch
                state.switch = Switch(
                    epoch=request.epoch,
                    placement=placement,
                    step=state.next_seq + margin,
                    record=record,
                    ends_at=time.monotonic() + request.timeout,
                )
            self._wake()
            return Proposed(state.switch.step)

    def _wake(self) -> None:
        for callback in self._state.wake:
            callback()

    def _settle(self, request: Settle) -> Done:
        with self._lock:
            self._take(event_of(request), request.epoch)
            self._set_share(1.0)
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
        self._residency.forget(epoch)
        state.aborted = max(state.aborted, epoch)
        state.newest_epoch = max(state.newest_epoch, epoch)
