"""The layers that come from one source: the connection, and the thread that applies patches."""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable

from pipelive_kv.errors import CancelledError, DeadlineError, PipeliveError
from pipelive_kv.migration import PatchReceiver
from pipelive_kv.stage.background import Background
from pipelive_kv.stage.limits import (
    JOIN_TIMEOUT,
    RECONNECT_ATTEMPT,
    RECONNECT_TIMEOUT,
    SESSION_TIMEOUT,
)
from pipelive_kv.transport import Channel, PatchListener

_log = logging.getLogger(__name__)


class Incoming:
    """Applies what one source sends, over as many connections as that takes.

    Before the vote there is one connection, and its loss ends the session. After :meth:`arm` the
    source may make it again: what came over the old one has then ended for good, and the source is
    told how many whole rounds of each earlier connection are applied, so that it sends the rest and
    nothing else. By the time it does, this stage may have written to the same slots itself.

    Args:
        source: the rank that the layers come from.
        layers: these.
        listener: where the source connects.
        make_receiver: for a connection.
        background: whose thread applies the bulk.
        ends_at: on the monotonic clock; for the first connection.
    """

    def __init__(
        self,
        source: int,
        layers: tuple[int, ...],
        listener: PatchListener,
        make_receiver: Callable[[Channel], PatchReceiver],
        background: Background,
        ends_at: float,
    ) -> None:
        self.source = source
        self.layers = layers
        self._listener = listener
        self._make_receiver = make_receiver
        self._background = background
        self._ends_at = ends_at
        self._lock = threading.Condition()
        self._receiver: PatchReceiver | None = None
        self._connections = 0
        self._rounds_before: list[int] = []
        """Whole rounds that were applied over each connection that has ended."""
        self._applied_before = -1
        """All writes of steps up to this one came over connections that have ended."""
        self._armed = False
        self._error: PipeliveError | None = None
        self._finished = False
        self._cancelled = False
        name = f"pipelive-apply-from-{source}"
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        """Where the source connects."""
        return self._listener.address

    @property
    def reconnects(self) -> int:
        """How often the connection was made again."""
        return max(0, self._connections - 1)

    def receiver(self, timeout: float) -> PatchReceiver:
        """The receiver, once the source has connected; raises what the thread raised."""
        end = time.monotonic() + timeout
        with self._lock:
            while self._receiver is None:
                self._check_locked()
                rest = end - time.monotonic()
                if rest <= 0:
                    raise DeadlineError(
                        f"stage {self.source} did not connect within {timeout:.1f} s"
                    )
                self._lock.wait(rest)
            return self._receiver

    def wait_applied(self, seq: int, timeout: float) -> None:
        """The gate: wait until all writes of steps up to ``seq`` are applied."""
        end = time.monotonic() + timeout
        while True:
            receiver = self.receiver(max(0.0, end - time.monotonic()))
            if self._applied_before >= seq:
                return
            try:
                receiver.wait_applied(seq, timeout=max(0.0, end - time.monotonic()))
                return
            except PipeliveError as error:
                if isinstance(error, DeadlineError) and time.monotonic() >= end:
                    raise
                self._await_next(receiver, error, end)

    def wait_finished(self, timeout: float) -> None:
        """Wait until the source has said that it is done (and verified, if it verifies)."""
        end = time.monotonic() + timeout
        with self._lock:
            while not self._finished:
                self._check_locked()
                rest = end - time.monotonic()
                if rest <= 0:
                    raise DeadlineError(
                        f"stage {self.source} did not finish its patches within {timeout:.1f} s"
                    )
                self._lock.wait(rest)

    def arm(self) -> None:
        """From now on the source may connect again; raises what the thread raised, if it did."""
        with self._lock:
            self._check_locked()
            if self._armed:
                return
            self._armed = True
            again = threading.Thread(
                target=self._accept_again, name=f"{self._threads[0].name}-again", daemon=True
            )
            self._threads.append(again)
            again.start()

    def interrupt(self) -> None:
        """Let the threads end, without waiting for them. May be called twice."""
        with self._lock:
            self._cancelled = True
            receiver = self._receiver
            self._lock.notify_all()
        self._listener.close()
        if receiver is not None:
            receiver.cancel()

    def cancel(self) -> None:
        """Nothing is written any more when this has returned. May be called twice."""
        self.interrupt()
        for thread in tuple(self._threads):
            thread.join(timeout=JOIN_TIMEOUT)

    def _check_locked(self) -> None:
        if self._error is not None:
            raise self._error
        if self._cancelled:
            raise CancelledError(f"the move from stage {self.source} was cancelled")

    # -- the thread that applies -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            channel = self._listener.accept(timeout=max(0.0, self._ends_at - time.monotonic()))
            receiver: PatchReceiver | None = self._take(channel)
            while receiver is not None:
                receiver = self._apply(receiver)
        except PipeliveError as error:
            self._end(error)
        except Exception as error:  # a defect of ours must not leave the others waiting
            self._end(PipeliveError(f"apply thread: {type(error).__name__}: {error}"))
        finally:
            self._listener.close()

    def _take(self, channel: Channel) -> PatchReceiver:
        receiver = self._make_receiver(channel)
        with self._lock:
            if self._cancelled or self._error is not None:
                receiver.cancel()
            self._connections += 1
            self._receiver = receiver
            self._lock.notify_all()
        return receiver

    def _apply(self, receiver: PatchReceiver) -> PatchReceiver | None:
        """Apply all that comes; the receiver to go on with, None where the source has finished."""
        try:
            finished = False
            if not self._rounds_before:  # the bulk; steps may wait for whatever comes later
                finished = self._background.run(lambda: receiver.run(SESSION_TIMEOUT, rounds=1))
            if not finished:
                receiver.run(SESSION_TIMEOUT)
            with self._lock:
                self._finished = True
                self._lock.notify_all()
            return None
        except PipeliveError as error:
            with self._lock:
                self._rounds_before.append(receiver.rounds_applied)
                self._applied_before = max(self._applied_before, receiver.applied_through)
                self._lock.notify_all()
            if self._armed and not self._cancelled:
                _log.warning(
                    "the connection from stage %d was lost, waiting for another: %s",
                    self.source,
                    error,
                )
            return self._await_next(receiver, error, time.monotonic() + RECONNECT_TIMEOUT)
        finally:
            receiver.channel.close()

    def _await_next(self, old: PatchReceiver, error: PipeliveError, end: float) -> PatchReceiver:
        """The receiver of another connection than ``old``'s; raises ``error`` if none can come."""
        with self._lock:
            while self._receiver is old:
                rest = end - time.monotonic()
                if not self._armed or self._cancelled or self._error is not None or rest <= 0:
                    raise self._error or error
                self._lock.wait(rest)
            if self._receiver is None:
                raise error
            return self._receiver

    def _end(self, error: PipeliveError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
            self._lock.notify_all()

    # -- the thread that takes further connections -------------------------------------------------

    def _accept_again(self) -> None:
        while True:
            try:
                channel = self._listener.accept(timeout=SESSION_TIMEOUT)
            except PipeliveError:
                return  # the listener was closed: it is over, in whatever way
            try:
                self._replace(channel)
            except PipeliveError as error:
                _log.warning("stage %d connected again, in vain: %s", self.source, error)
                channel.close()

    def _replace(self, channel: Channel) -> None:
        """Go on over ``channel``, once nothing of the connections before can land any more."""
        with self._lock:
            old = self._receiver
        if old is not None:
            old.cancel()
        with self._lock:
            ended = self._lock.wait_for(
                lambda: self._is_over() or len(self._rounds_before) == self._connections,
                JOIN_TIMEOUT,
            )
            if not ended or self._is_over():
                raise CancelledError(f"the move from stage {self.source} is over")
            rounds = tuple(self._rounds_before)
        channel.send(struct.pack(f"<{len(rounds)}Q", *rounds), RECONNECT_ATTEMPT)
        self._take(channel)

    def _is_over(self) -> bool:
        return self._finished or self._cancelled or self._error is not None
