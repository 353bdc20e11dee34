"""The giving side of a move: bulk copy, rounds of patches, write-through, and the tail."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from pipelive_kv.errors import CancelledError, DeadlineError
from pipelive_kv.messages import Converged, RoundRecord
from pipelive_kv.migration import SentStep
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.convergence import Convergence
from pipelive_kv.stage.limits import JOIN_TIMEOUT
from pipelive_kv.stage.outgoing import Outgoing
from pipelive_kv.stage.patch_thread import PatchThread, Ranges
from pipelive_kv.stage.source_state import SourceState
from pipelive_kv.tracker import DirtyTracker


class SourceSession:
    """Copies the moving layers of one stage to their targets while steps go on.

    The patch thread runs: the bulk of the live blocks first, in the background, then rounds that
    carry what the steps sealed since have written, each waiting for the one before to be applied.
    After :meth:`write_through` it sends each step's slots as soon as the step is sealed and waits
    for nothing, until :meth:`commit` names the last step it has to send; with that step's writes
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
        self._tracker = tracker
        self._block_size = block_size
        self._state = SourceState(epoch, ends_at, sealed=sealed)
        self._thread: threading.Thread | None = None
        # Everything written up to here lies in blocks that are live when the bulk starts, or in
        # blocks that are not; what is written later is in the log. So the log starts empty. Where
        # the targets have kept the layers, it says what they lack.
        collected = tracker.collect()
        self._start_seq = collected.through_seq
        self._lacking: Ranges | None = collected.ranges if resume else None
        self._patches = PatchThread(
            self._state,
            tracker,
            outgoing,
            background,
            start_seq=self._start_seq,
            verify=verify,
        )

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
        self._state.convergence.max_stop_ms = max_stop_ms
        self._thread = threading.Thread(
            target=self._patches.run,
            args=(ranges, max_rounds, weights),
            name=f"pipelive-patch-{self.epoch}",
            daemon=True,
        )
        self._thread.start()

    def sealed(self, seq: int) -> None:
        """Tell that the stage has completed the steps up to ``seq``."""
        with self._state.lock:
            self._state.sealed = seq
            self._state.lock.notify_all()

    def commit(self, step: int) -> None:
        """Tell, before step ``step`` is sealed, that it is the first of the new placement.

        The target writes the moved layers from that step on, so what this stage logs from then on
        must not be collected: its bytes of those slots are old. The tail has no deadline, since an
        idle engine may take its time to run the steps before. May be called twice.
        """
        with self._state.lock:
            if self._state.limit is not None:
                return
            self._tracker.hold_from(step)
            self._state.limit = step - 1
            self._state.wanted = True
            self._state.ends_at = math.inf
            if self._state.through is not None:
                self._state.through.end_after(step - 1)
            self._state.lock.notify_all()

    def await_converged(self, timeout: float) -> Converged:
        """Wait until the predicted stop time is below the limit; raises what the thread raised.

        Returns as well, saying so, where the rounds bring no gain any more; then the steps should
        write less before it is called again.
        """

        found = self._state.convergence

        def ready() -> bool:
            return found.reached is not None or found.is_stalled

        try:
            self._wait(ready, timeout, "to converge")
        except DeadlineError as error:
            if self._state.error is not None:
                raise
            raise DeadlineError(f"{error}; {found.prospect()}") from None
        with self._state.lock:
            # The next rounds are compared with this one, not with one of before the throttle.
            answer = found.reached or found.begin_again()
        if answer is None:
            raise CancelledError("the migration was cancelled")
        return answer

    def write_through(self, timeout: float) -> None:
        """From now on send each step's slots as soon as it is sealed; returns once that runs.

        No rate limit holds from here on: what is sent is what the steps write.
        """
        with self._state.lock:
            self._state.wanted = True
            self._state.lock.notify_all()
        self._wait(lambda: self._state.through is not None, timeout, "to write-through")

    def await_tail(self, timeout: float) -> None:
        """Wait until every write of the old placement is applied at the targets."""
        self._wait(lambda: self._state.tail_done, timeout, "to send the tail")

    def promise(self) -> None:
        """Go on patching until the outcome is known, however long that takes: the vote.

        Raises:
            PipeliveError: what the patch thread raised; it is too late for a promise.
        """
        with self._state.lock:
            if self._state.error is not None:
                raise self._state.error
            self._state.promised = True
            self._state.ends_at = math.inf

    @property
    def verified_slots(self) -> int:
        """Slots whose bytes were compared at both ends."""
        return self._patches.verified_slots

    @property
    def reconnects(self) -> int:
        """How often a connection was lost after the vote and made again."""
        return sum(move.reconnects for move in self.outgoing)

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """The rounds so far."""
        with self._state.lock:
            through = self._state.through
            found = list(self._state.rounds)
        if through is not None:
            found += [_record_of(step, self._state.convergence) for step in through.sent()]
        return tuple(found)

    @property
    def bytes_sent(self) -> int:
        """Bytes of KV sent so far, to all targets."""
        through = self._state.through
        return self._state.bytes_sent + (through.bytes_sent if through is not None else 0)

    @property
    def lag_steps(self) -> int:
        """Steps that the stage has completed and the targets have not applied.

        In write-through: that it has not sent, since nobody waits to hear that they are applied.
        """
        with self._state.lock:
            through = self._state.through
            done = max(self._state.applied, self._start_seq)
            if through is not None:
                done = max(done, through.sent_through)
            return max(0, int(min(self._state.sealed, self._state.last_to_send)) - done)

    def tail_seconds(self, last_end_ns: int) -> float:
        """From the end of the last old step, at ``last_end_ns``, until the tail was applied."""
        tail_ns = self._state.tail_ns
        return max(0, tail_ns - last_end_ns) * 1e-9 if tail_ns and last_end_ns else 0.0

    @property
    def predicted(self) -> Converged:
        """The last prediction before the tail.

        In write-through what is left to send at a switchover is what one step writes: as much as
        the step before the last one has written. Else, the prediction that let it converge.
        """
        through = self._state.through
        before = through.sent()[:-1] if through is not None else ()
        if before:
            step = before[-1]
            return self._state.convergence.predict(
                bytes=step.bytes,
                records=step.records,
                rounds=step.round,
                lag_steps=step.lag_steps,
            )
        return self._state.convergence.reached or Converged(0.0, 0, 0)

    def interrupt(self) -> None:
        """Let the patch thread end, without waiting for it. May be called twice."""
        with self._state.lock:
            self._state.stopping = True
            if self._state.through is not None:
                self._state.through.cancel()
            self._state.lock.notify_all()
        for move in self.outgoing:
            move.sender.cancel()

    def cancel(self) -> None:
        """End the patch thread; nothing is sent when this has returned. May be called twice."""
        self.interrupt()
        if self._thread is not None:
            self._thread.join(timeout=JOIN_TIMEOUT)

    def _wait(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        with self._state.lock:
            while not ready():
                if self._state.error is not None:
                    raise self._state.error
                self._state.check_stopping()
                rest = end - time.monotonic()
                if rest <= 0:
                    targets = ", ".join(f"stage {move.target}" for move in self.outgoing)
                    raise DeadlineError(
                        f"the patches to {targets} had not come {what} after {timeout:.1f} s"
                    )
                self._state.lock.wait(rest)


def _record_of(step: SentStep, convergence: Convergence) -> RoundRecord:
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
        predicted_stop_ms=1e3 * convergence.seconds(bytes=step.bytes, records=step.records),
        write_through=True,
    )
