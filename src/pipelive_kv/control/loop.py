"""One thread that owns one zmq socket, with a queue into it that any thread may use."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

_log = logging.getLogger(__name__)


class SocketLoop:
    """Runs a zmq socket in a thread of its own, since zmq sockets belong to one thread.

    ``on_message`` gets the frames of each message, ``on_tick`` is called about every ``tick``
    seconds; both run in the loop's thread and must not block. So do ``on_event``, which gets what
    happens to the socket's connections where ``events`` asks for it (zmq.EVENT_*), and
    ``on_unsent``, which gets the first frame of a message that could not be sent since its receiver
    has gone.
    """

    def __init__(
        self,
        name: str,
        make_socket: Callable[[], zmq.Socket[bytes]],
        on_message: Callable[[list[bytes]], None],
        on_tick: Callable[[], None],
        tick: float = 0.5,
        *,
        events: int = 0,
        on_event: Callable[[int], None] | None = None,
        on_unsent: Callable[[bytes], None] | None = None,
    ) -> None:
        self._outbox: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._on_message = on_message
        self._on_tick = on_tick
        self._tick = tick
        self._stopping = threading.Event()
        self._events, self._on_event, self._on_unsent = events, on_event, on_unsent
        self._socket = make_socket()
        self._monitor = self._socket.get_monitor_socket(events) if on_event is not None else None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def send(self, frames: list[bytes]) -> None:
        """Queue a message; returns at once."""
        self._outbox.put(frames)
        self._wake()

    def close(self) -> None:
        """Send what is queued, end the thread and close the socket. May be called twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
        self._wake_reader.close()
        self._wake_writer.close()

    def _wake(self) -> None:
        # A full pipe means that a wake-up is pending already; a closed one that nobody waits.
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        next_tick = 0.0
        try:
            while not self._stopping.is_set():
                now = time.monotonic()
                if now >= next_tick:
                    self._on_tick()
                    next_tick = now + self._tick
                ready = dict(poller.poll(max(0, int((next_tick - now) * 1000))))
                if self._wake_reader.fileno() in ready:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_reader.recv(4096)
                self._flush()
                if self._monitor is not None and self._monitor in ready:
                    self._watch(self._monitor)
                if self._socket in ready:
                    self._receive()
            self._flush()
        except Exception:
            _log.exception("%s ended by an error", self._thread.name)
        finally:
            if self._monitor is not None:
                self._socket.disable_monitor()
            self._socket.close(linger=200)

    def _watch(self, monitor: zmq.Socket[bytes]) -> None:
        found = recv_monitor_message(monitor)
        if self._on_event is not None:
            self._on_event(int(found["event"]))

    def _flush(self) -> None:
        while True:
            try:
                frames = self._outbox.get_nowait()
            except queue.Empty:
                return
            try:
                self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
            except zmq.ZMQError as error:
                # The peer is gone or its queue is full: whoever waits for an answer has a deadline.
                _log.debug("%s: a message could not be sent: %s", self._thread.name, error)
                if error.errno == zmq.EHOSTUNREACH and self._on_unsent is not None:
                    self._on_unsent(frames[0])

    def _receive(self) -> None:
        for _ in range(100):
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_message(frames)
            except Exception:
                _log.exception("%s: a message could not be handled", self._thread.name)
