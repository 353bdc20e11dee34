"""A patch connection once both ends have proved who they are."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypedDict


class ChannelStats(TypedDict):
    """Messages and their bytes (framing not counted), since the channel was made."""

    messages_sent: int
    bytes_sent: int
    messages_received: int
    bytes_received: int


class Channel:
    """One duplex, ordered connection between the two ends of a move.

    Made by :meth:`PatchListener.accept` and :func:`connect`; handed to a
    :class:`~pipelive_kv.migration.PatchSender` or a
    :class:`~pipelive_kv.migration.PatchReceiver`.
    """

    def __init__(self, core: Any, *, reason: str = "", hello: dict[str, Any] | None = None) -> None:
        self._core = core
        self._reason = reason
        self._hello = dict(hello or {})

    @property
    def core(self) -> Any:
        """The channel of the compiled core."""
        return self._core

    @property
    def kind(self) -> str:
        """``"shm"``, ``"tcp"``, ``"p2p"`` or ``"nccl"``."""
        kind: str = self._core.kind
        return kind

    @property
    def reason(self) -> str:
        """Why it is of this kind, in words."""
        return self._reason

    @property
    def hello(self) -> dict[str, Any]:
        """What the peer said about itself, compared and found equal where both ends said it."""
        return dict(self._hello)

    @property
    def max_message_bytes(self) -> int:
        """The largest message it can carry."""
        size: int = self._core.max_message_bytes
        return size

    @property
    def max_bulk_bytes(self) -> int:
        """The most bytes of device memory that go beside one message from here; 0 for none."""
        size: int = self._core.max_bulk_bytes
        return size

    def send(self, data: Any, timeout: float) -> None:
        """Send a copy of ``data`` (any contiguous buffer) as one message.

        Raises DeadlineError, ClosedError, CancelledError, or InvalidArgumentError where it is empty
        or larger than ``max_message_bytes``.
        """
        self._core.send(data, timeout)

    def receive(self, timeout: float) -> bytes:
        """The next message; raises DeadlineError, ClosedError, CancelledError or ProtocolError."""
        message: bytes = self._core.receive(timeout)
        return message

    def cancel(self) -> None:
        """End everything at once, from any thread; the peer sees the channel closed."""
        self._core.cancel()

    def close(self) -> None:
        """End this end; the peer may still receive what was sent. From any thread."""
        self._core.close()

    def stats(self) -> ChannelStats:
        """Counters since the channel was made."""
        stats: ChannelStats = self._core.stats()
        return stats

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Channel(kind={self.kind!r}, reason={self._reason!r})"
