"""The connecting end of a patch connection."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelive_kv import _core
from pipelive_kv.errors import (
    ClosedError,
    DeadlineError,
    DeviceError,
    PipeliveError,
    ProtocolError,
)
from pipelive_kv.transport import handshake, paths
from pipelive_kv.transport.abilities import Abilities, abilities, said_beside
from pipelive_kv.transport.address import Address, boot_id
from pipelive_kv.transport.channel import Channel
from pipelive_kv.transport.handshake import Agreed, Handshake, Hello, Send
from pipelive_kv.transport.sockets import check_same_user, detach, tcp_channel


def connect(
    address: str,
    *,
    key: bytes,
    timeout: float,
    hello: Hello | None = None,
    device: Any = None,
    again: bool = False,
) -> Channel:
    """Connect to a ``PatchListener`` and prove to each other that both hold ``key``.

    For an ``auto`` address, shared memory is taken where the listener is on this host and its Unix
    socket can be reached. Over that, payloads go from the memory of ``device`` (where the moving
    layers lie; the core's, None for host memory) to the listener's by P2P or NCCL where both ends
    can and the listener's kind allows it. :attr:`Channel.reason` says what was taken and why.
    ``again`` is said where a connection that was lost is made again, in a hurry: NCCL, which takes
    long to come up and may be what was lost, is then left out.

    Raises DeadlineError after ``timeout`` seconds, ProtocolError where the peer does not hold the
    key or differs in a field of ``hello`` (named), ClosedError where it hangs up, DeviceError where
    it cannot be reached.
    """
    handshake.check_key(key)
    ends_at = time.monotonic() + timeout
    where = Address.parse(address)
    said = _Own(key, dict(hello or {}), device, abilities(device, "auto", again=again))
    if where.kind == "tcp":
        return _connect_tcp(where, said, ends_at, "the address is one for tcp")
    if where.kind == "shm":
        return _connect_shm(where, said, ends_at, "the address is one for shared memory")
    own = boot_id()
    if not own or own != where.boot_id:
        why = f"the listener is on another host (boot id {where.boot_id[:8]}, here {own[:8]})"
        return _connect_tcp(where, said, ends_at, why)
    try:
        why = "the listener is on this host"
        return _connect_shm(where, said, ends_at, why)
    except DeviceError as error:
        why = f"the listener is on this host, but its Unix socket is out of reach: {error}"
        return _connect_tcp(where, said, ends_at, why)


@dataclass(frozen=True)
class _Own:
    """What the connecting end brings."""

    key: bytes
    hello: Hello
    device: Any
    abilities: Abilities

    def handshake(self) -> Handshake:
        return handshake.client(self.key, {**self.hello, **self.abilities.hello()})

    def set_up(
        self, connected: socket.socket, agreed: Agreed, base: str, ends_at: float
    ) -> paths.Setup:
        peer = Abilities.of_hello(agreed.hello)
        return paths.set_up_source(connected, self.device, self.abilities, peer, base, ends_at)


def _connect_tcp(where: Address, own: _Own, ends_at: float, why: str) -> Channel:
    with _reaching(where, ends_at):
        connected = socket.create_connection(where.tcp, timeout=_rest(ends_at, where))
    with contextlib.ExitStack() as undo:
        undo.callback(connected.close)
        agreed = _shake(connected, where, own.handshake(), "tcp", ends_at)
        setup = own.set_up(connected, agreed, "tcp", ends_at)
        base = tcp_channel(connected)
        undo.pop_all()
    return Channel(
        setup.channel(base), reason=f"{why}; {setup.why}", hello=said_beside(agreed.hello)
    )


def _connect_shm(where: Address, own: _Own, ends_at: float, why: str) -> Channel:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(connected.close)
        with _reaching(where, ends_at):
            connected.settimeout(_rest(ends_at, where))
            connected.connect(where.unix)
        check_same_user(connected)
        agreed = _shake(connected, where, own.handshake(), "shm", ends_at)
        setup = own.set_up(connected, agreed, "shm", ends_at)
        with _reaching(where, ends_at):
            connected.settimeout(_rest(ends_at, where))
            data, fds, _, _ = socket.recv_fds(connected, 1, 1)
        for fd in fds[1:]:
            os.close(fd)
        if not data:
            raise ClosedError(f"{where} hung up before it passed its memory")
        if not fds:
            raise ProtocolError(f"{where} passed no memory")
        undo.pop_all()
        base = _core.shm_channel(detach(connected), fds[0], 1)
    return Channel(
        setup.channel(base), reason=f"{why}; {setup.why}", hello=said_beside(agreed.hello)
    )


def _shake(
    connected: socket.socket, where: Address, steps: Handshake, kind: str, ends_at: float
) -> Agreed:
    """Drive a handshake over a socket that may block."""
    answer: bytes | None = None
    with _reaching(where, ends_at):
        while True:
            try:
                wish = next(steps) if answer is None else steps.send(answer)
            except StopIteration as stop:
                agreed: Agreed = stop.value
                break
            connected.settimeout(_rest(ends_at, where))
            if isinstance(wish, Send):
                connected.sendall(wish.data)
                answer = b""
                continue
            received = bytearray()
            while len(received) < wish.size:
                connected.settimeout(_rest(ends_at, where))
                piece = connected.recv(wish.size - len(received))
                if not piece:
                    raise ClosedError(
                        f"{where} hung up in the handshake; most often the keys differ"
                    )
                received += piece
            answer = bytes(received)
    if agreed.kind != kind:
        raise ProtocolError(f"{where} offers {agreed.kind} where {kind} was asked for")
    return agreed


def _rest(ends_at: float, where: Address) -> float:
    rest = ends_at - time.monotonic()
    if rest <= 0:
        raise DeadlineError(f"{where} did not finish the handshake in time")
    return rest


@contextlib.contextmanager
def _reaching(where: Address, ends_at: float) -> Iterator[None]:
    """Our errors instead of the socket module's."""
    try:
        yield
    except TimeoutError as error:
        if isinstance(error, PipeliveError):
            raise
        raise DeadlineError(f"{where} did not answer in time") from error
    except (ConnectionResetError, BrokenPipeError) as error:
        raise ClosedError(f"{where} hung up in the handshake: {error}") from error
    except OSError as error:
        if isinstance(error, PipeliveError):
            raise
        raise DeviceError(f"cannot reach {where}: {error}") from error
