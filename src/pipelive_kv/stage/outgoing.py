"""The layers that go to one target, and the connection to it, which may be made again."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelive_kv.errors import PipeliveError, ProtocolError
from pipelive_kv.migration import PatchSender
from pipelive_kv.stage.limits import RECONNECT_ATTEMPT, RECONNECT_TIMEOUT
from pipelive_kv.transport import Channel

_log = logging.getLogger(__name__)

_BETWEEN_ATTEMPTS = 0.05
"""Seconds between a failed attempt and the next."""


@dataclass
class Outgoing:
    """One target's share of a source's layers.

    Attributes:
        target: its rank.
        layers: these.
        connect: makes a connection within so many seconds.
        make_sender: for a connection.
        connect_again: as ``connect``, where a connection was lost; None for the same.
        sender: of the connection that is in use.
        finished: the target has confirmed the end.
        connection: the number of that connection, as the target counts them.
        reconnects: how often it was made again.
    """

    target: int
    layers: tuple[int, ...]
    connect: Callable[[float], Channel]
    make_sender: Callable[[Channel], PatchSender]
    connect_again: Callable[[float], Channel] | None = None
    sender: PatchSender = field(init=False)
    finished: bool = field(default=False, init=False)
    connection: int = field(default=0, init=False)
    reconnects: int = field(default=0, init=False)

    def open(self, timeout: float) -> None:
        """Make the first connection; raises what prevents it."""
        self.sender = self.make_sender(self.connect(timeout))

    @property
    def transport(self) -> str:
        """The kind of the connection."""
        return self.sender.channel.kind

    def is_lost(self, expected: int | None) -> bool:
        """Whether the connection has failed, or its target has not applied step ``expected``."""
        try:
            return self.sender.failed or (
                expected is not None and self.sender.applied_through < expected
            )
        except PipeliveError:  # it had failed, and nobody had looked since
            return True

    def reconnect(self, check: Callable[[], None]) -> tuple[PatchSender, int]:
        """Make the connection again after it was lost, trying for a while.

        ``check`` is called between attempts and raises where there is no use in it any more.

        Returns:
            The sender to go on with, and how many whole rounds of the connection in use so far are
            applied at the target, which takes no more of it.

        Raises:
            PipeliveError: why the last attempt failed.
        """
        self.sender.cancel()
        self.sender.channel.close()
        end = time.monotonic() + RECONNECT_TIMEOUT
        while True:
            check()
            try:
                channel = (self.connect_again or self.connect)(RECONNECT_ATTEMPT)
                try:
                    rounds = _read_rounds(channel.receive(RECONNECT_ATTEMPT))
                    sender = self.make_sender(channel)
                except BaseException:
                    channel.close()
                    raise
            except PipeliveError as error:
                if time.monotonic() >= end:
                    raise
                _log.info("stage %d cannot be reached again yet: %s", self.target, error)
                time.sleep(_BETWEEN_ATTEMPTS)
                continue
            # Where the target has never seen the last connection, nothing of it is applied.
            applied = rounds[self.connection] if self.connection < len(rounds) else 0
            self.sender, self.connection = sender, len(rounds)
            self.reconnects += 1
            return sender, applied


def _read_rounds(message: bytes) -> tuple[int, ...]:
    """How many rounds of each connection so far the target has applied."""
    if not message or len(message) % 8 or len(message) > 8 * 1024:
        raise ProtocolError(
            f"a target tells with {len(message)} bytes what it has applied, expected 8 for each "
            "connection before"
        )
    return struct.unpack(f"<{len(message) // 8}Q", message)
