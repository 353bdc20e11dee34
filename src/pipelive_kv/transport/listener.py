"""The listening end of patch connections."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelive_kv import _core
from pipelive_kv.errors import (
    ClosedError,
    DeadlineError,
    DeviceError,
    InvalidArgumentError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.transport import handshake, paths
from pipelive_kv.transport.abilities import Abilities, abilities, said_beside
from pipelive_kv.transport.address import Address, boot_id
from pipelive_kv.transport.channel import Channel
from pipelive_kv.transport.handshake import Agreed, Handshake, Hello, Send
from pipelive_kv.transport.sockets import check_same_user, detach, tcp_channel

SHM_RING_BYTES: int = _core.SHM_RING_BYTES
MAX_PENDING = 8
HANDSHAKE_SECONDS = 5.0


@dataclass(eq=False)
class _Pending:
    """A connection whose peer has not proved itself yet."""

    socket: socket.socket
    kind: Literal["shm", "tcp"]
    steps: Handshake
    ends_at: float
    wanted: int = 0
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)


class PatchListener:
    """Waits for the source of a move to connect.

    Args:
        kind: ``"tcp"``; ``"shm"`` for two processes of one host and one user; ``"p2p"``: the same,
            and payloads go from device memory to device memory; ``"nccl"``: payloads go by NCCL,
            the rest over TCP; ``"auto"`` takes the best of all that both ends can do, and falls
            back where setting it up fails. :attr:`Channel.reason` says what was taken and why. On
            a loopback address it leaves NCCL out, whose own sockets listen elsewhere, unless
            ``NCCL_SOCKET_IFNAME=lo``.
        key: the shared secret, 16 bytes or more.
        host: the address that TCP listens on. Nothing but loopback unless it is given.
        ring_bytes: of a shared-memory channel, for each direction; bounds its largest message.
        device: the core's device that the moving layers lie on (``PagePool.device``); None for
            host memory.
        hello: what this end says about itself. A field that both ends name must be equal, else both
            raise ProtocolError naming it.
        max_pending: connections that may be in their handshake at one time; for one more the
            oldest has to go, so that silent strangers do not keep the awaited peer out.
        handshake_timeout: seconds that a handshake may take.
        nccl_timeout: seconds that setting up NCCL, and falling back, may take.

    Raises InvalidArgumentError, and DeviceError where the address cannot be listened on.
    """

    def __init__(
        self,
        kind: str = "auto",
        *,
        key: bytes,
        host: str = "127.0.0.1",
        ring_bytes: int = SHM_RING_BYTES,
        hello: Hello | None = None,
        device: Any = None,
        max_pending: int = MAX_PENDING,
        handshake_timeout: float = HANDSHAKE_SECONDS,
        nccl_timeout: float = paths.NCCL_SECONDS,
    ) -> None:
        if kind not in ("tcp", "shm", "p2p", "nccl", "auto"):
            raise InvalidArgumentError(
                f"kind is {kind!r}, expected 'tcp', 'shm', 'p2p', 'nccl' or 'auto'"
            )
        if kind in ("p2p", "nccl") and device is None:
            raise InvalidArgumentError(f"kind is {kind!r}, which needs a device")
        if max_pending < 1:
            raise InvalidArgumentError(f"max_pending is {max_pending}, expected 1 or more")
        if not 0 < ring_bytes <= 1 << 40:
            raise InvalidArgumentError(f"ring_bytes is {ring_bytes}, expected 1 to 2**40")
        self._key = handshake.check_key(key)
        self._device = device
        self._abilities = abilities(device, kind, host=host)
        self._hello: Hello = {**(hello or {}), **self._abilities.hello()}
        self._ring_bytes = ring_bytes
        self._max_pending = max_pending
        self._handshake_timeout = handshake_timeout
        self._nccl_timeout = nccl_timeout
        self._pending: list[_Pending] = []
        self._refused: list[str] = []
        self._closed = False
        self._closing = threading.Lock()
        # Held by the thread that accepts; close() wakes that thread and then takes it.
        self._accepting = threading.Lock()
        with contextlib.ExitStack() as undo:
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._wake_read)
            undo.callback(os.close, self._wake_write)
            self._sockets: dict[socket.socket, Literal["shm", "tcp"]] = {}
            bound_host, port, path = "", 0, ""
            if kind not in ("shm", "p2p"):
                listening = _listen_tcp(host)
                undo.callback(listening.close)
                self._sockets[listening] = "tcp"
                bound_host, port = listening.getsockname()[:2]
            if kind not in ("tcp", "nccl"):
                path = f"@pipelive-{secrets.token_hex(16)}"
                listening = _listen_unix(path)
                undo.callback(listening.close)
                self._sockets[listening] = "shm"
            self._address = Address(bound_host, port, path, boot_id() if kind == "auto" else "")
            undo.pop_all()

    @property
    def address(self) -> str:
        """What :func:`connect` takes; it may travel in any message, it is no secret."""
        return str(self._address)

    @property
    def refused(self) -> tuple[str, ...]:
        """Why handshakes have failed so far, the last few."""
        return tuple(self._refused)

    def accept(self, timeout: float) -> Channel:
        """Wait for a peer that holds the key; who does not is turned away.

        Raises DeadlineError (naming the last refusal), ClosedError once closed, and ProtocolError
        where a peer that holds the key says something else about itself than ``hello``.
        """
        ends_at = time.monotonic() + timeout
        with self._accepting, selectors.DefaultSelector() as selector:
            self._check_open()
            selector.register(self._wake_read, selectors.EVENT_READ)
            for listening in self._sockets:
                selector.register(listening, selectors.EVENT_READ)
            for pending in self._pending:
                selector.register(pending.socket, _events(pending), pending)
            return self._accept(selector, ends_at, timeout)

    def close(self) -> None:
        """Stop listening; a waiting accept raises ClosedError. Channels made before live on."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        os.write(self._wake_write, b"x")
        with self._accepting:
            for pending in self._pending:
                pending.socket.close()
            self._pending.clear()
            for listening in self._sockets:
                listening.close()
            self._sockets.clear()
            os.close(self._wake_read)
            os.close(self._wake_write)

    def __enter__(self) -> PatchListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Of a listener that was never made completely there is nothing to close.
        if hasattr(self, "_address"):
            self.close()

    # -- inside accept -----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the patch listener was closed: {self._address}")

    def _accept(self, selector: selectors.BaseSelector, ends_at: float, timeout: float) -> Channel:
        while True:
            now = time.monotonic()
            if now >= ends_at:
                last = f"; the last refusal: {self._refused[-1]}" if self._refused else ""
                raise DeadlineError(
                    f"nobody with the right key connected to {self._address} within "
                    f"{timeout:.1f} s{last}"
                )
            for pending in [p for p in self._pending if p.ends_at <= now]:
                self._turn_away(selector, pending, "the handshake took too long")
            until = min([ends_at, *(pending.ends_at for pending in self._pending)])
            for key, _ in selector.select(max(0.0, until - now)):
                self._check_open()
                if key.fileobj in self._sockets:
                    self._greet(selector, key.fileobj)
                elif key.data in self._pending:  # not turned away since the selector saw it
                    channel = self._advance(selector, key.data)
                    if channel is not None:
                        return channel
            self._check_open()

    def _greet(self, selector: selectors.BaseSelector, listening: socket.socket) -> None:
        try:
            accepted, _ = listening.accept()
        except OSError:
            return  # it has gone again
        kind = self._sockets[listening]
        accepted.setblocking(False)
        try:
            if kind == "shm":
                check_same_user(accepted)
        except (ProtocolError, OSError) as error:
            self._note(str(error))
            accepted.close()
            return
        if len(self._pending) >= self._max_pending:
            # Who holds the key is through in milliseconds: the oldest is the least likely to.
            why = f"{self._max_pending} handshakes are under way already; this was the oldest"
            self._turn_away(selector, self._pending[0], why)
        steps = handshake.server(self._key, self._hello, kind)
        ends_at = time.monotonic() + self._handshake_timeout
        pending = _Pending(accepted, kind, steps, ends_at)
        _step(pending, None)
        self._pending.append(pending)
        selector.register(accepted, _events(pending), pending)

    def _advance(self, selector: selectors.BaseSelector, pending: _Pending) -> Channel | None:
        try:
            agreed = _pump(pending)
            if agreed is None:
                selector.modify(pending.socket, _events(pending), pending)
                return None
            selector.unregister(pending.socket)
            self._pending.remove(pending)
            return self._finish(pending, agreed)
        except handshake.HelloMismatchError as error:
            self._turn_away(selector, pending, str(error))
            raise  # it is the peer that was waited for, and it will not get better
        except (PipeliveError, OSError) as error:
            self._turn_away(selector, pending, str(error))
            return None

    def _turn_away(self, selector: selectors.BaseSelector, pending: _Pending, reason: str) -> None:
        self._note(reason)
        if pending in self._pending:
            self._pending.remove(pending)
            selector.unregister(pending.socket)
        pending.steps.close()
        pending.socket.close()

    def _note(self, reason: str) -> None:
        self._refused = [*self._refused[-15:], reason]

    def _finish(self, pending: _Pending, agreed: Agreed) -> Channel:
        pending.socket.setblocking(True)
        setup = paths.set_up_target(
            pending.socket,
            self._device,
            self._abilities,
            Abilities.of_hello(agreed.hello),
            pending.kind,
            time.monotonic() + self._handshake_timeout,
            nccl_seconds=self._nccl_timeout,
        )
        base = self._base_channel(pending)
        reason = f"the connecting end came over {pending.kind}; {setup.why}"
        return Channel(setup.channel(base), reason=reason, hello=said_beside(agreed.hello))

    def _base_channel(self, pending: _Pending) -> Any:
        if pending.kind == "tcp":
            return tcp_channel(pending.socket)
        memory = _core.shm_memory(self._ring_bytes)
        try:
            pending.socket.settimeout(self._handshake_timeout)
            socket.send_fds(pending.socket, [b"m"], [memory])
        except BaseException:
            os.close(memory)
            raise
        return _core.shm_channel(detach(pending.socket), memory, 0)


def _step(pending: _Pending, answer: bytes | None) -> Agreed | None:
    """Run the handshake until it wants bytes that are not there."""
    try:
        wish = next(pending.steps) if answer is None else pending.steps.send(answer)
        while isinstance(wish, Send):
            pending.outbox += wish.data
            wish = pending.steps.send(b"")
        pending.wanted = wish.size
    except StopIteration as stop:
        pending.wanted = 0
        agreed: Agreed = stop.value
        return agreed
    return None


def _pump(pending: _Pending) -> Agreed | None:
    """Move what the socket has and takes; the outcome once the last byte has gone."""
    agreed: Agreed | None = None
    failure: PipeliveError | None = None
    if pending.wanted:
        with contextlib.suppress(BlockingIOError):
            piece = pending.socket.recv(pending.wanted - len(pending.inbox))
            if not piece:
                raise ClosedError("the peer hung up in the handshake")
            pending.inbox += piece
        if len(pending.inbox) == pending.wanted:
            answer = bytes(pending.inbox)
            pending.inbox.clear()
            try:
                agreed = _step(pending, answer)
            except PipeliveError as error:
                failure = error  # once the verdict that says so is on its way
    if pending.outbox:
        # Frames are far smaller than a socket's buffer, so this ends soon or not at all.
        with contextlib.suppress(BlockingIOError):
            sent = pending.socket.send(pending.outbox)
            del pending.outbox[:sent]
    if failure is not None:
        raise failure
    if agreed is not None and pending.outbox:
        raise ClosedError("the peer did not take the end of the handshake")
    return agreed


def _events(pending: _Pending) -> int:
    return selectors.EVENT_READ | (selectors.EVENT_WRITE if pending.outbox else 0)


def _listen_tcp(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.bind((host, 0))
        listening.listen(MAX_PENDING)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise DeviceError(f"cannot listen on {host!r}: {error}") from error
    return listening


def _listen_unix(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind("\0" + path[1:])
        listening.listen(MAX_PENDING)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise DeviceError(f"cannot listen on a Unix socket: {error}") from error
    return listening
