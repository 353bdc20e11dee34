"""Sockets of patch connections, from either end: whose they are, and handing them to the core."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Any

from pipelive_kv import _core
from pipelive_kv.errors import ProtocolError

MAX_TCP_MESSAGE_BYTES = 64 << 20
PROGRESS_BYTES = 64 << 10
PROGRESS_SECONDS = 5.0
_SOCKET_BUFFER_BYTES = 4 << 20
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


def tcp_channel(connected: socket.socket) -> Any:
    """The core's channel over a socket, which is the channel's from now on."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connected.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    return _core.tcp_channel(
        detach(connected), MAX_TCP_MESSAGE_BYTES, PROGRESS_BYTES, PROGRESS_SECONDS
    )


def detach(connected: socket.socket) -> int:
    """The descriptor of a socket that Python lets go of."""
    connected.setblocking(False)
    return connected.detach()


def check_same_user(connected: socket.socket) -> None:
    """Raise ProtocolError unless the peer at a Unix socket is of our own user."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.geteuid():
        raise ProtocolError(f"the peer is user {uid}, expected {os.geteuid()}, our own")
