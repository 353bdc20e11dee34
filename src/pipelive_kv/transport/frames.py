"""What the two ends of a connection say to each other while they set up the path of payloads."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from pipelive_kv.errors import ClosedError, DeadlineError, PipeliveError, ProtocolError

_MAX_FRAME_BYTES = 16 << 10
_MOST_DESCRIPTORS = 4
_LENGTH = struct.Struct(">I")


class Frames:
    """JSON objects behind their length, over a socket that may block until ``ends_at``."""

    def __init__(self, connected: socket.socket, ends_at: float) -> None:
        self._socket = connected
        self.ends_at = ends_at

    def fileno(self) -> int:
        """The socket's; readable once the peer has said more, or has gone."""
        return self._socket.fileno()

    def send(self, content: Mapping[str, Any], fd: int | None = None) -> None:
        """Send one object, over a Unix socket also a descriptor, which stays the caller's."""
        body = json.dumps(content).encode()
        data = _LENGTH.pack(len(body)) + body
        with self._patiently():
            if fd is not None:
                # The descriptor goes with the first byte, so that it cannot come apart from it.
                socket.send_fds(self._socket, [data[:1]], [fd])
                data = data[1:]
            self._socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next object; descriptors that come with it are closed.

        Raises ProtocolError for what is none, ClosedError, DeadlineError.
        """
        content, fds = self.receive_with_fds()
        for fd in fds:
            os.close(fd)
        return content

    def receive_with_fds(self) -> tuple[dict[str, Any], list[int]]:
        """As :meth:`receive`; the descriptors belong to the caller."""
        fds: list[int] = []
        try:
            (size,) = _LENGTH.unpack(self._exactly(_LENGTH.size, fds))
            if not 0 < size <= _MAX_FRAME_BYTES:
                raise ProtocolError(f"a frame of {size} bytes while setting up")
            try:
                content = json.loads(self._exactly(size, fds))
            except (ValueError, RecursionError) as error:
                raise ProtocolError(f"a frame while setting up is no JSON: {error}") from None
            if not isinstance(content, dict):
                raise ProtocolError("a frame while setting up is no JSON object")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return content, fds

    def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = bytearray()
        with self._patiently():
            while len(data) < size:
                self._socket.settimeout(self._rest())
                if self._socket.family == socket.AF_UNIX:
                    piece, more, _, _ = socket.recv_fds(self._socket, size - len(data), 4)
                    fds += more
                    if len(fds) > _MOST_DESCRIPTORS:
                        raise ProtocolError(f"{len(fds)} descriptors came while setting up")
                else:
                    piece = self._socket.recv(size - len(data))
                if not piece:
                    raise ClosedError("the peer hung up while the path was set up")
                data += piece
        return bytes(data)

    def _rest(self) -> float:
        rest = self.ends_at - time.monotonic()
        if rest <= 0:
            raise DeadlineError("the peer did not finish setting up the path in time")
        return rest

    @contextlib.contextmanager
    def _patiently(self) -> Any:
        try:
            self._socket.settimeout(self._rest())
            yield
        except PipeliveError:
            raise
        except TimeoutError as error:
            raise DeadlineError("the peer did not finish setting up the path in time") from error
        except OSError as error:
            raise ClosedError(f"the peer hung up while the path was set up: {error}") from error
