"""The thread that sends: the bulk, rounds of patches, each step's writes, and the tail."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from pipelive_kv.errors import (
    ClosedError,
    CorruptError,
    DeadlineError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.messages import RoundRecord
from pipelive_kv.migration import WriteThrough
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.limits import MOST_RECONNECTS, STALL_TIMEOUT, TRANSFER_TIMEOUT
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.stage.source_state import SourceState
from pipelive_kv.tracker import DirtyTracker

_log = logging.getLogger(__name__)

Ranges = npt.NDArray[np.uint64]
_LOOK_AGAIN = 0.01  # seconds that a wait for the GPU may keep a cancel waiting
_LOOK_AT_CLOCK = 1.0  # seconds between two looks at the session's deadline in write-through


class PatchThread:
    """What a source's patch thread does, and what it alone knows.

    Args:
        state: shared with the session.
        tracker: says what the steps have written.
        outgoing: where the layers go.
        background: whose thread sends the bulk.
        start_seq: all that steps up to this one have written is in the bulk.
        verify: compare digests of all that was sent at the end.
    """

    def __init__(
        self,
        state: SourceState,
        tracker: DirtyTracker,
        outgoing: Sequence[Outgoing],
        background: Background,
        *,
        start_seq: int,
        verify: bool,
    ) -> None:
        self._state = state
        self._tracker = tracker
        self._outgoing = tuple(outgoing)
        self._background = background
        self._start_seq = start_seq
        self._verify = verify
        self._sent: list[Ranges] = []
        self._doubts = 0
        self.verified_slots = 0

    def run(
        self,
        live: Ranges,
        max_rounds: int,
        weights: Callable[[Outgoing], None] | None,
    ) -> None:
        """From the bulk to the confirmed end of the tail; what goes wrong is left in the state."""
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
            for move in self._outgoing:
                move.sender.channel.close()

    def _bulk(self, live: Ranges, weights: Callable[[Outgoing], None] | None) -> None:
        if weights is not None:
            for move in self._outgoing:
                weights(move)
        # How long it takes beside busy cores says nothing of what follows.
        self._round(0, self._start_seq, live, learn=not self._background.is_nice)

    def _patch(self, max_rounds: int) -> tuple[int, int]:
        """Rounds until write-through is wanted; returns the next number and what is sent."""
        number, sent_through = 1, self._start_seq
        while True:
            with self._state.lock:
                self._state.check_stopping()
                if self._state.wanted:
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
        senders = [move.sender for move in self._outgoing]
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
        with self._state.lock:
            self._state.check_stopping()
            if self._state.limit is not None:
                through.end_after(self._state.limit)
            self._state.through = through
            self._state.lock.notify_all()
        return through

    def _send_steps(self, through: WriteThrough) -> bool:
        """Go on to the end, or to the loss of a connection; False where it was made again."""
        try:
            while not through.run(_LOOK_AT_CLOCK):
                self._state.rest()
            self._state.tail_ns = self._state.tail_ns or time.monotonic_ns()
            self._finish(through)
        except (ClosedError, CorruptError, DeadlineError, ProtocolError) as error:
            self._reconnect(through, error)
            return False
        return True

    def _reconnect(self, through: WriteThrough, error: PipeliveError) -> None:
        """Make anew what is lost; raises ``error`` before the vote, or where nothing is lost."""
        self._state.check_promised(error)
        expected = through.sent_through if isinstance(error, DeadlineError) else None
        lost = [
            (place, move) for place, move in enumerate(self._outgoing) if move.is_lost(expected)
        ]
        if (
            not lost
            or self._doubts > 1
            or sum(move.reconnects for move in self._outgoing) >= MOST_RECONNECTS
        ):
            raise error
        for place, move in lost:
            _log.warning(
                "epoch %d: the connection to stage %d is made again: %s",
                self._state.epoch,
                move.target,
                error,
            )
            sender, applied = move.reconnect(lambda: self._state.check_promised(error))
            try:
                self._state.check_promised(error)
                through.resume(place, sender, applied)
            except (ClosedError, CorruptError, DeadlineError, ProtocolError) as again:
                # Lost again; the next attempt goes on from there.
                _log.warning("epoch %d: lost again: %s", self._state.epoch, again)

    def _round(self, number: int, through: int, ranges: Ranges, *, learn: bool = True) -> None:
        start_ns = time.monotonic_ns()
        records = sent = 0
        busy = 0.0
        for move in self._outgoing:
            stats = move.sender.send_round(number, through, ranges, timeout=self._state.rest())
            records += stats.records
            sent += stats.bytes
            busy += stats.busy_seconds
        for move in self._outgoing:
            move.sender.wait_applied(through, timeout=self._state.rest())
        if self._verify:
            self._sent.append(ranges)
        slots = int(ranges[:, 1].sum()) if len(ranges) else 0
        if learn:
            self._state.convergence.observe(bytes=sent, records=records, seconds=busy)
        with self._state.lock:
            self._state.applied = max(self._state.applied, through)
            self._state.bytes_sent += sent
            self._state.rounds.append(
                RoundRecord(
                    number=number,
                    through_seq=through,
                    slots=slots,
                    bytes=sent,
                    records=records,
                    start_ns=start_ns,
                    end_ns=time.monotonic_ns(),
                    busy_s=busy,
                    lag_steps=max(0, self._state.sealed - through),
                )
            )

    def _converge(
        self, pending: int, number: int, max_rounds: int, *, after_round: bool = False
    ) -> None:
        rows = sum(len(move.layers) * move.sender.slot_bytes for move in self._outgoing)
        with self._state.lock:
            shared, convergence = self._state, self._state.convergence
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
            self._state.lock.notify_all()

    def _await_work(self, sent_through: int) -> None:
        with self._state.lock:
            shared = self._state
            while not (shared.stopping or shared.wanted or shared.sealed > sent_through):
                self._state.rest()
                # Nothing may come: the engine is idle, or the deadline passes.
                self._state.lock.wait(min(TRANSFER_TIMEOUT, self._state.ends_at - time.monotonic()))
            if shared.sealed <= sent_through:
                return
        # The engine has ended the step; the GPU may still be at it.
        with contextlib.suppress(DeadlineError):
            self._tracker.wait_sealed(sent_through + 1, _LOOK_AGAIN)

    def _finish(self, through: WriteThrough) -> None:
        rest = [move for move in self._outgoing if not move.finished]
        if self._verify:
            ranges = np.concatenate([*self._sent, through.ranges])
            for move in rest:
                self._verify_at(move, ranges)
            self.verified_slots = int(ranges[:, 1].sum())
        for move in rest:
            move.sender.finish(timeout=self._state.rest())
            move.finished = True
        with self._state.lock:
            self._state.tail_done = True
            self._state.lock.notify_all()

    def _verify_at(self, move: Outgoing, ranges: Ranges) -> None:
        try:
            move.sender.verify(ranges, timeout=self._state.rest())
        except CorruptError:
            # An answer may have been damaged on its way; twice, it is the bytes that differ.
            self._doubts += 1
            raise

    def _end(self, error: PipeliveError) -> None:
        self._state.fail(error)
        for move in self._outgoing:
            move.sender.cancel()
