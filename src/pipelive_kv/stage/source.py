"""The giving side of a move: bulk copy, rounds of patches, write-through, and the tail."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from pipelive_kv.errors import (
    CancelledError,
    ClosedError,
    CorruptError,
    DeadlineError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.messages import Converged, RoundRecord
from pipelive_kv.migration import SentStep, WriteThrough
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.convergence import Convergence
from pipelive_kv.stage.limits import (
    JOIN_TIMEOUT,
    MOST_RECONNECTS,
    STALL_TIMEOUT,
    TRANSFER_TIMEOUT,
)
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.tracker import DirtyTracker

_log = logging.getLogger(__name__)

Ranges = npt.NDArray[np.uint64]
_LOOK_AGAIN = 0.01  # seconds that a wait for the GPU may keep a cancel waiting
_LOOK_AT_CLOCK = 1.0  # seconds between two looks at the session's deadline in write-through


@dataclass
class _Shared:
    """What the engine's thread, the control plane's and the patch thread share."""

    sealed: int = -1
    promised: bool = False
    """The stage has voted: a connection that is lost is made again."""
    limit: int | None = None
    """The last step that ran the old placement; its writes are the tail."""
    applied: int = -1
    stopping: bool = False
    convergence: Convergence = field(default_factory=Convergence)
    wanted: bool = False
    """Write-through was asked for."""
    through: WriteThrough | None = None
    """Write-through, once it runs."""
    error: PipeliveError | None = None
    rounds: list[RoundRecord] = field(default_factory=list)
    tail_done: bool = False
    tail_ns: int = 0
    """When the tail was applied."""
    bytes_sent: int = 0


class SourceSession:
    """Copies the moving layers of one stage to their targets while steps go on.

    The patch thread runs: the bulk of the live blocks first, in the background, then rounds that carry what the steps
    sealed since have written, each waiting for the one before to be applied. After
    :meth:`write_through` it sends each step's slots as soon as the step is sealed and waits for
    nothing, until :meth:`commit` names the last step it has to send; with that step's writes
    applied at every target, the tail is over.
    """

    def __init__(
        self,
        epoch: int,
        tracker: DirtyTracker,
        outgoing: Sequence[Outgoing],
        background: Background,
        *,
        sealed: int,
        block_size: int,
        verify: bool,
        ends_at: float,
        resume: bool = False,
    ) -> None:
        self.epoch = epoch
        self.outgoing = tuple(outgoing)
        self._background = background
        self._tracker = tracker
        self._block_size = block_size
        self._verify = verify
        self._ends_at = ends_at
        self._lock = threading.Condition()
        self._shared = _Shared(sealed=sealed)
        self._sent: list[Ranges] = []
        self._thread: threading.Thread | None = None
        self.verified_slots = 0
        self._doubts = 0
        # Everything written up to here lies in blocks that are live when the bulk starts, or in
        # blocks that are not; what is written later is in the log. So the log starts empty. Where
        # the targets have kept the layers, it says what they lack.
        collected = tracker.collect()
        self._start_seq = collected.through_seq
        self._lacking: Ranges | None = collected.ranges if resume else None

    # -- called by the stage -----------------------------------------------------------------------

    def start(
        self,
        live: Sequence[tuple[int, int]],
        *,
        max_stop_ms: float,
        max_rounds: int,
        weights: Callable[[Outgoing], None] | None,
    ) -> None:
        """Start the patch thread with the live blocks, given as (first, count) runs of ids."""
        ranges = np.array(live, dtype=np.uint64).reshape(-1, 2) * np.uint64(self._block_size)
        if self._lacking is not None:
            ranges = self._lacking
        self._shared.convergence.max_stop_ms = max_stop_ms
        self._thread = threading.Thread(
            target=self._run,
            args=(ranges, max_rounds, weights),
            name=f"pipelive-patch-{self.epoch}",
            daemon=True,
        )
        self._thread.start()

    def sealed(self, seq: int) -> None:
        """Tell that the stage has completed the steps up to ``seq``."""
        with self._lock:
            self._shared.sealed = seq
            self._lock.notify_all()

    def commit(self, step: int) -> None:
        """Tell, before step ``step`` is sealed, that it is the first of the new placement.

        The target writes the moved layers from that step on, so what this stage logs from then on
        must not be collected: its bytes of those slots are old. The tail has no deadline, since an
        idle engine may take its time to run the steps before. May be called twice.
        """
        with self._lock:
            if self._shared.limit is not None:
                return
            self._tracker.hold_from(step)
            self._shared.limit = step - 1
            self._shared.wanted = True
            self._ends_at = math.inf
            if self._shared.through is not None:
                self._shared.through.end_after(step - 1)
            self._lock.notify_all()

    def await_converged(self, timeout: float) -> Converged:
        """Wait until the predicted stop time is below the limit; raises what the thread raised.

        Returns as well, saying so, where the rounds bring no gain any more; then the steps should
        write less before it is called again.
        """

        found = self._shared.convergence

        def ready() -> bool:
            return found.reached is not None or found.is_stalled

        try:
            self._wait(ready, timeout, "to converge")
        except DeadlineError as error:
            if self._shared.error is not None:
                raise
            raise DeadlineError(f"{error}; {found.prospect()}") from None
        with self._lock:
            # The next rounds are compared with this one, not with one of before the throttle.
            answer = found.reached or found.begin_again()
        if answer is None:
            raise CancelledError("the migration was cancelled")
        return answer

    def write_through(self, timeout: float) -> None:
        """From now on send each step's slots as soon as it is sealed; returns once that runs.

        No rate limit holds from here on: what is sent is what the steps write.
        """
        with self._lock:
            self._shared.wanted = True
            self._lock.notify_all()
        self._wait(lambda: self._shared.through is not None, timeout, "to write-through")

    def await_tail(self, timeout: float) -> None:
        """Wait until every write of the old placement is applied at the targets."""
        self._wait(lambda: self._shared.tail_done, timeout, "to send the tail")

    def promise(self) -> None:
        """Go on patching until the outcome is known, however long that takes: the vote.

        Raises:
            PipeliveError: what the patch thread raised; it is too late for a promise.
        """
        with self._lock:
            if self._shared.error is not None:
                raise self._shared.error
            self._shared.promised = True
            self._ends_at = math.inf

    @property
    def reconnects(self) -> int:
        """How often a connection was lost after the vote and made again."""
        return sum(move.reconnects for move in self.outgoing)

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """The rounds so far."""
        with self._lock:
            through = self._shared.through
            found = list(self._shared.rounds)
        if through is not None:
            found += [self._record_of(step) for step in through.sent()]
        return tuple(found)

    @property
    def bytes_sent(self) -> int:
        """Bytes of KV sent so far, to all targets."""
        through = self._shared.through
        return self._shared.bytes_sent + (through.bytes_sent if through is not None else 0)

    @property
    def lag_steps(self) -> int:
        """Steps that the stage has completed and the targets have not applied.

        In write-through: that it has not sent, since nobody waits to hear that they are applied.
        """
        with self._lock:
            through = self._shared.through
            done = max(self._shared.applied, self._start_seq)
            if through is not None:
                done = max(done, through.sent_through)
            return max(0, int(min(self._shared.sealed, self._last_to_send)) - done)

    def tail_seconds(self, last_end_ns: int) -> float:
        """From the end of the last old step, at ``last_end_ns``, until the tail was applied."""
        tail_ns = self._shared.tail_ns
        return max(0, tail_ns - last_end_ns) * 1e-9 if tail_ns and last_end_ns else 0.0

    @property
    def _last_to_send(self) -> float:
        return math.inf if self._shared.limit is None else self._shared.limit

    @property
    def predicted(self) -> Converged:
        """The last prediction before the tail.

        In write-through what is left to send at a switchover is what one step writes: as much as
        the step before the last one has written. Else, the prediction that let it converge.
        """
        through = self._shared.through
        before = through.sent()[:-1] if through is not None else ()
        if before:
            step = before[-1]
            return self._shared.convergence.predict(
                bytes=step.bytes,
                records=step.records,
                rounds=step.round,
                lag_steps=step.lag_steps,
            )
        return self._shared.convergence.reached or Converged(0.0, 0, 0)

    def interrupt(self) -> None:
        """Let the patch thread end, without waiting for it. May be called twice."""
        with self._lock:
            self._shared.stopping = True
            if self._shared.through is not None:
                self._shared.through.cancel()
            self._lock.notify_all()
        for move in self.outgoing:
            move.sender.cancel()

    def cancel(self) -> None:
        """End the patch thread; nothing is sent when this has returned. May be called twice."""
        self.interrupt()
        if self._thread is not None:
            self._thread.join(timeout=JOIN_TIMEOUT)

    # -- the patch thread --------------------------------------------------------------------------

    def _run(
        self,
        live: Ranges,
        max_rounds: int,
        weights: Callable[[Outgoing], None] | None,
    ) -> None:
        try:
            self._background.run(lambda: self._bulk(live, weights))
            through = self._begin_steps(*self._patch(max_rounds))
            while not self._send_steps(through):
                pass
        except PipeliveError as error:
            self._end(error)
        except Exception as error:  # a defect of ours must not leave the others waiting
            self._end(PipeliveError(f"patch thread: {type(error).__name__}: {error}"))
        finally:
            self._tracker.release_hold()
            for move in self.outgoing:
                move.sender.channel.close()

    def _bulk(self, live: Ranges, weights: Callable[[Outgoing], None] | None) -> None:
        if weights is not None:
            for move in self.outgoing:
                weights(move)
        # How long it takes beside busy cores says nothing of what follows.
        self._round(0, self._start_seq, live, learn=not self._background.is_nice)

    def _patch(self, max_rounds: int) -> tuple[int, int]:
        """Rounds until write-through is wanted; returns the next number and what is sent."""
        number, sent_through = 1, self._start_seq
        while True:
            with self._lock:
                if self._shared.stopping:
                    raise CancelledError("the migration was cancelled")
                if self._shared.wanted:
                    return number, sent_through
            collected = self._tracker.collect()
            if collected.through_seq <= sent_through and not collected.num_slots:
                self._converge(0, number, max_rounds)
                self._await_work(sent_through)
                continue
            self._round(number, collected.through_seq, collected.ranges)
            sent_through = collected.through_seq
            self._converge(self._tracker.pending_slots, number, max_rounds, after_round=True)
            number += 1

    def _begin_steps(self, number: int, sent_through: int) -> WriteThrough:
        senders = [move.sender for move in self.outgoing]
        for sender in senders:
            sender.set_rate_limit(None)
        through = WriteThrough(
            self._tracker,
            senders,
            sent_through=sent_through,
            first_round=number,
            keep_ranges=self._verify,
            message_timeout=STALL_TIMEOUT,
        )
        with self._lock:
            if self._shared.stopping:
                raise CancelledError("the migration was cancelled")
            if self._shared.limit is not None:
                through.end_after(self._shared.limit)
            self._shared.through = through
            self._lock.notify_all()
        return through

    def _send_steps(self, through: WriteThrough) -> bool:
        """Go on to the end, or to the loss of a connection; False where it was made again."""
        try:
            while not through.run(_LOOK_AT_CLOCK):
                self._rest()
            self._shared.tail_ns = self._shared.tail_ns or time.monotonic_ns()
            self._finish(through)
        except (ClosedError, CorruptError, DeadlineError, ProtocolError) as error:
            self._reconnect(through, error)
            return False
        return True

    def _reconnect(self, through: WriteThrough, error: PipeliveError) -> None:
        """Make anew what is lost; raises ``error`` before the vote, or where nothing is lost."""
        self._check_promised(error)
        expected = through.sent_through if isinstance(error, DeadlineError) else None
        lost = [(place, move) for place, move in enumerate(self.outgoing) if move.is_lost(expected)]
        if not lost or self._doubts > 1 or self.reconnects >= MOST_RECONNECTS:
            raise error
        for place, move in lost:
            _log.warning(
                "epoch %d: the connection to stage %d is made again: %s",
                self.epoch,
                move.target,
                error,
            )
            sender, applied = move.reconnect(lambda: self._check_promised(error))
            try:
                self._check_promised(error)
                through.resume(place, sender, applied)
            except (ClosedError, CorruptError, DeadlineError, ProtocolError) as again:
                # Lost again; the next attempt goes on from there.
                _log.warning("epoch %d: lost again: %s", self.epoch, again)

    def _check_promised(self, error: PipeliveError) -> None:
        with self._lock:
            if self._shared.stopping:
                raise CancelledError("the migration was cancelled")
            if not self._shared.promised:
                raise error

    def _record_of(self, step: SentStep) -> RoundRecord:
        predicted = self._shared.convergence.seconds(bytes=step.bytes, records=step.records)
        return RoundRecord(
            number=step.round,
            through_seq=step.through_seq,
            slots=step.slots,
            bytes=step.bytes,
            records=step.records,
            start_ns=step.start_ns,
            end_ns=step.end_ns,
            busy_s=step.busy_seconds,
            lag_steps=step.lag_steps,
            predicted_stop_ms=1e3 * predicted,
            write_through=True,
        )

    def _round(self, number: int, through: int, ranges: Ranges, *, learn: bool = True) -> None:
        start_ns = time.monotonic_ns()
        records = sent = 0
        busy = 0.0
        for move in self.outgoing:
            stats = move.sender.send_round(number, through, ranges, timeout=self._rest())
            records += stats.records
            sent += stats.bytes
            busy += stats.busy_seconds
        for move in self.outgoing:
            move.sender.wait_applied(through, timeout=self._rest())
        if self._verify:
            self._sent.append(ranges)
        slots = int(ranges[:, 1].sum()) if len(ranges) else 0
        if learn:
            self._shared.convergence.observe(bytes=sent, records=records, seconds=busy)
        with self._lock:
            self._shared.applied = max(self._shared.applied, through)
            self._shared.bytes_sent += sent
            self._shared.rounds.append(
                RoundRecord(
                    number=number,
                    through_seq=through,
                    slots=slots,
                    bytes=sent,
                    records=records,
                    start_ns=start_ns,
                    end_ns=time.monotonic_ns(),
                    busy_s=busy,
                    lag_steps=max(0, self._shared.sealed - through),
                )
            )

    def _converge(
        self, pending: int, number: int, max_rounds: int, *, after_round: bool = False
    ) -> None:
        rows = sum(len(move.layers) * move.sender.slot_bytes for move in self.outgoing)
        with self._lock:
            shared, convergence = self._shared, self._shared.convergence
            found = convergence.predict(
                bytes=pending * rows,
                records=max(1, pending),
                rounds=number,
                lag_steps=max(0, shared.sealed - shared.applied),
            )
            if after_round and shared.rounds:
                shared.rounds[-1] = msgspec.structs.replace(
                    shared.rounds[-1], predicted_stop_ms=found.predicted_stop_ms
                )
            convergence.note(found, after_round=after_round)
            if convergence.reached is None and after_round and number >= max_rounds:
                raise DeadlineError(
                    f"patching did not converge in {max_rounds} rounds: {convergence.prospect()}"
                )
            self._lock.notify_all()

    def _await_work(self, sent_through: int) -> None:
        with self._lock:
            shared = self._shared
            while not (shared.stopping or shared.wanted or shared.sealed > sent_through):
                self._rest()
                # Nothing may come: the engine is idle, or the deadline passes.
                self._lock.wait(min(TRANSFER_TIMEOUT, self._ends_at - time.monotonic()))
            if shared.sealed <= sent_through:
                return
        # The engine has ended the step; the GPU may still be at it.
        with contextlib.suppress(DeadlineError):
            self._tracker.wait_sealed(sent_through + 1, _LOOK_AGAIN)

    def _finish(self, through: WriteThrough) -> None:
        rest = [move for move in self.outgoing if not move.finished]
        if self._verify:
            ranges = np.concatenate([*self._sent, through.ranges])
            for move in rest:
                self._verify_at(move, ranges)
            self.verified_slots = int(ranges[:, 1].sum())
        for move in rest:
            move.sender.finish(timeout=self._rest())
            move.finished = True
        with self._lock:
            self._shared.tail_done = True
            self._lock.notify_all()

    def _verify_at(self, move: Outgoing, ranges: Ranges) -> None:
        try:
            move.sender.verify(ranges, timeout=self._rest())
        except CorruptError:
            # An answer may have been damaged on its way; twice, it is the bytes that differ.
            self._doubts += 1
            raise

    def _end(self, error: PipeliveError) -> None:
        with self._lock:
            if self._shared.error is None:
                self._shared.error = error
            self._lock.notify_all()
        for move in self.outgoing:
            move.sender.cancel()

    def _rest(self) -> float:
        """How long a message may take: not the session's deadline, which ends with a promise."""
        with self._lock:
            if time.monotonic() >= self._ends_at:
                self._shared.error = DeadlineError(
                    f"the migration of epoch {self.epoch} ran past its deadline"
                )
                raise self._shared.error
        return TRANSFER_TIMEOUT

    def _wait(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        with self._lock:
            while not ready():
                if self._shared.error is not None:
                    raise self._shared.error
                if self._shared.stopping:
                    raise CancelledError("the migration was cancelled")
                rest = end - time.monotonic()
                if rest <= 0:
                    targets = ", ".join(f"stage {move.target}" for move in self.outgoing)
                    raise DeadlineError(
                        f"the patches to {targets} had not come {what} after {timeout:.1f} s"
                    )
                self._lock.wait(rest)
